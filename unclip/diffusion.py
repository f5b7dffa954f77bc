"""Gaussian diffusion in discrete steps: schedules, noising, what a network predicts, steps back, respacing.

Sources: Ho et al. 2020 (DDPM, arXiv 2006.11239); Nichol & Dhariwal 2021 (cosine schedule, learned variances, arXiv
2102.09672); Song et al. 2020 (DDIM, arXiv 2010.02502); Salimans & Ho 2022 (v, arXiv 2202.00512); Bao et al. 2022
(Analytic-DPM, arXiv 2201.06503). No model is known here, and nothing is drawn: noise is an argument.

A step is a place 0 … N-1 in a process of N steps, the last the noisiest. In a respaced process step i stands for the
timestep `timesteps[i]` of the process that the network was trained on, and the network is always given that.

Letters: B batch  … a sample's own dimensions  N steps  T steps of the schedule
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine"]
Prediction = Literal["noise", "x0", "v"]
"""What a network predicts of x_t = α·x_0 + σ·noise: the noise, x_0 itself, or v = α·noise - σ·x_0."""
MAX_STEPS = 100_000
_LARGEST_BETA = 0.999
_COSINE_OFFSET = 0.008


class Diffusion:
    """A process of N steps: x_0 without noise to almost pure noise. All tables are float64 on the CPU.

    Args:
        schedule: linear (Ho et al. 2020, stretched to `n_steps`) or cosine.
        n_steps: T, the steps of the schedule.
        timesteps: those of the T steps that are taken, rising; None for all.

    Raises:
        ValueError: an unknown schedule, too few or too many steps, or timesteps that are not rising within 0 … T-1.
    """

    def __init__(
        self, schedule: Schedule = "cosine", n_steps: int = 1000, timesteps: Sequence[int] | None = None
    ) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(get_args(Schedule))}")
        if type(n_steps) is not int or not 1 <= n_steps <= MAX_STEPS:
            raise ValueError(f"n_steps is {n_steps!r}; expected a whole number from 1 to {MAX_STEPS:,}")
        steps = list(range(n_steps)) if timesteps is None else [int(step) for step in timesteps]
        if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= n_steps:
            raise ValueError(f"timesteps are {steps[:5]}…; expected rising whole numbers within 0 … {n_steps - 1}")
        self.schedule, self.n_steps = schedule, n_steps
        self.timesteps = steps
        """Of each step, the timestep that the network is given."""
        self.alphas_bar = _alphas_bar(schedule, n_steps)[steps]
        """(N,): the share of x_0 in the variance of x_t, ᾱ."""
        self.alphas_bar_before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])
        """(N,): ᾱ of the step below; 1 below the first."""
        self.betas = 1 - self.alphas_bar / self.alphas_bar_before
        """(N,): variance that a step adds."""
        self.posterior_variances = self.betas * (1 - self.alphas_bar_before) / (1 - self.alphas_bar)
        """(N,): of x_{t-1} given x_t and x_0, β̃; 0 at the first step."""
        # the first is 0: as Nichol & Dhariwal do, its neighbour's stands in
        least = self.posterior_variances.clone()
        least[0] = least[1] if len(steps) > 1 else self.betas[0]
        self.log_variance_range = (least.log(), self.betas.log())
        """(N,) each: log β̃ and log β, between which a learned variance lies."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def respaced(self, count: int) -> "Diffusion":
        """Return the process of `count` of the schedule's timesteps, evenly from the first to the last, both taken.

        Of one step, the last timestep is taken.

        Raises:
            ValueError: count is not a whole number from 1 to T.
        """
        if type(count) is not int or not 1 <= count <= self.n_steps:
            raise ValueError(f"steps is {count!r}; expected a whole number from 1 to {self.n_steps}")
        last = self.n_steps - 1
        chosen = [last] if count == 1 else [round(i * last / (count - 1)) for i in range(count)]
        return Diffusion(self.schedule, self.n_steps, chosen)

    def timesteps_of(self, steps: int | Tensor, like: Tensor) -> Tensor:
        """Return what the network is given for `steps`: int64 (B,) on the device of `like` (B, …)."""
        if isinstance(steps, int):
            return torch.full((len(like),), self.timesteps[steps], device=like.device)
        return torch.tensor(self.timesteps)[steps.cpu()].to(like.device)

    def noised(self, x0: Tensor, noise: Tensor, steps: int | Tensor) -> Tensor:
        """Return x_t (B, …), a sample of q(x_t | x_0), from x_0 and standard normal noise (B, …).

        Args:
            x0: (B, …) float.
            noise: of the same shape.
            steps: one for all, or int64 (B,).
        """
        alpha, sigma = self._alpha_sigma(steps, x0)
        return alpha * x0 + sigma * noise

    def target(self, prediction: Prediction, x0: Tensor, noise: Tensor, steps: int | Tensor) -> Tensor:
        """Return what a network of this kind should say of `noised(x0, noise, steps)`; arguments as there."""
        if prediction == "x0":
            return x0
        if prediction == "noise":
            return noise
        alpha, sigma = self._alpha_sigma(steps, x0)
        return alpha * noise - sigma * x0

    def x0_of(self, prediction: Prediction, output: Tensor, x: Tensor, steps: int | Tensor) -> Tensor:
        """Return x̂_0 (B, …) from what a network said of x_t (B, …)."""
        if prediction == "x0":
            return output
        alpha, sigma = self._alpha_sigma(steps, x)
        if prediction == "v":
            return alpha * x - sigma * output
        return (x - sigma * output) / alpha

    def noise_of(self, x0: Tensor, x: Tensor, steps: int | Tensor) -> Tensor:
        """Return the noise (B, …) in x_t if x_0 is right."""
        alpha, sigma = self._alpha_sigma(steps, x)
        return (x - alpha * x0) / sigma

    def posterior_mean(self, x0: Tensor, x: Tensor, steps: int | Tensor) -> Tensor:
        """Return the mean (B, …) of x_{t-1} given x_t and x_0 (Ho et al. 2020, equation 7)."""
        weight_x0 = self.alphas_bar_before.sqrt() * self.betas / (1 - self.alphas_bar)
        weight_x = (1 - self.betas).sqrt() * (1 - self.alphas_bar_before) / (1 - self.alphas_bar)
        return _at(weight_x0, steps, x) * x0 + _at(weight_x, steps, x) * x

    def log_variance(self, fractions: Tensor, steps: int | Tensor) -> Tensor:
        """Return log σ² (B, …) of a learned variance: -1 is log β̃, 1 is log β, what is between is interpolated.

        Nothing is clamped (Nichol & Dhariwal 2021, equation 15).
        """
        low, high = (_at(table, steps, fractions) for table in self.log_variance_range)
        return low + (fractions + 1) / 2 * (high - low)

    def ddpm_step(self, x: Tensor, x0: Tensor, step: int, noise: Tensor, log_variance: Tensor | float) -> Tensor:
        """Return x one step below (B, …); below the first step that is x_0 itself, without noise.

        Args:
            x: (B, …), x_t.
            x0: (B, …), what it is estimated to be without noise.
            step: 0 … N-1.
            noise: (B, …), standard normal.
            log_variance: log σ², a number or (B, …).
        """
        if step == 0:
            return x0
        deviation = torch.exp(0.5 * torch.as_tensor(log_variance, dtype=x.dtype, device=x.device))
        return self.posterior_mean(x0, x, step) + deviation * noise

    def ddim_step(self, x: Tensor, x0: Tensor, step: int, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """Return x one step below (Song et al. 2020, equation 12); below the first step that is x_0 itself.

        Args:
            x: (B, …), x_t.
            x0: (B, …), what it is estimated to be without noise.
            step: 0 … N-1.
            eta: 0 adds no noise; 1 has the variance of `ddpm_step` with β̃.
            noise: (B, …), standard normal; needed if eta is above 0.
        """
        if step == 0:
            return x0
        before = float(self.alphas_bar_before[step])
        variance = eta**2 * float(self.posterior_variances[step])
        mean = math.sqrt(before) * x0 + math.sqrt(max(0.0, 1 - before - variance)) * self.noise_of(x0, x, step)
        if not eta:
            return mean
        assert noise is not None, "eta above 0 needs noise"
        return mean + math.sqrt(variance) * noise

    def ddim_step_up(self, x: Tensor, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return x at `step` from x one step below it, the inverse of `ddim_step` without noise.

        With what the network tells at the result itself, this is the exact inverse. Where x is more picture than noise,
        the noise is taken as told and x_0 follows from x, otherwise the other way round: what little x holds of the one
        is no base to tell the other from.

        Args:
            x: (B, …), one step below; x_0 itself below the first.
            x0: (B, …), what it is estimated to be without noise.
            noise: (B, …), what it is estimated to hold.
            step: 0 … N-1, of the result.
        """
        here, before = float(self.alphas_bar[step]), float(self.alphas_bar_before[step])
        if before > 0.5:
            x0 = (x - math.sqrt(1 - before) * noise) / math.sqrt(before)
        else:
            noise = (x - math.sqrt(before) * x0) / math.sqrt(1 - before)
        return math.sqrt(here) * x0 + math.sqrt(1 - here) * noise

    def analytic_variances(self, errors: Tensor) -> Tensor:
        """Return the variances (N,) float64 of steps back that are best for a network with these errors.

        Bao et al. 2022 for a network that predicts x_0: β̃ plus the squared weight of x_0 in the mean, times the error.

        Args:
            errors: (N,) mean squared errors per coordinate of x̂_0 at each step; 0 gives β̃.

        Raises:
            ValueError: another number of errors, or one below 0.
        """
        if errors.shape != (len(self),) or not bool((errors >= 0).all()):
            raise ValueError(f"errors have the shape {tuple(errors.shape)}; expected {len(self)} numbers of at least 0")
        weights = self.alphas_bar_before.sqrt() * self.betas / (1 - self.alphas_bar)
        return self.posterior_variances + weights.square() * errors.double().cpu()

    def _alpha_sigma(self, steps: int | Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        return _at(self.alphas_bar.sqrt(), steps, like), _at((1 - self.alphas_bar).sqrt(), steps, like)


def _at(table: Tensor, steps: int | Tensor, like: Tensor) -> float | Tensor:
    """Return a table's values at the steps, to be multiplied with `like` (B, …): a number, or float32 (B,1,…)."""
    if isinstance(steps, int):
        return float(table[steps])
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = table[steps.cpu()].to(like.device, dtype)
    return values.view(-1, *[1] * (like.ndim - 1))


def _alphas_bar(schedule: Schedule, n_steps: int) -> Tensor:
    """Return ᾱ of all steps, (T,) float64."""
    if schedule == "linear":
        # 1e-4 to 0.02 in 1000 steps, and as much noise in all with any other number
        ends = [min(_LARGEST_BETA, end * 1000 / n_steps) for end in (1e-4, 0.02)]
        betas = torch.linspace(ends[0], ends[1], n_steps, dtype=torch.float64)
    else:
        times = torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
        curve = ((times + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2).cos().square()
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=_LARGEST_BETA)
    return (1 - betas).cumprod(0)
