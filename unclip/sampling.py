"""From noise to a sample and back: noise, and the loops over a process's steps, for any network.

Noise is a pure function of (seed, caption, candidate, purpose), so no candidate depends on the others of its batch.

DDPM with a learned, fixed or analytic variance (Ho et al. 2020), DDIM with any eta and its inversion (Song et al. 2020;
Ramesh et al. 2022, 3). What a network predicts may be guided: Ho & Salimans 2021, arXiv 2207.12598.

Letters: B batch  C channels  … the other dimensions of a sample
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from unclip.diffusion import Diffusion, Prediction

Network = Callable[[Tensor, Tensor], Tensor]
"""Takes x_t (B, C, …) and timesteps (B,), returns its prediction (B, C, …), or (B, 2C, …) with a learned variance."""
OnPass = Callable[[], None]
"""Called after each pass of a network; what it raises ends the sampling."""
DrawNoise = Callable[[int], Tensor]
"""Returns the noise (B, C, …) of a step, by its timestep."""
Sampler = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class Noise:
    """Sources of noise, one for each row of a batch."""

    rows: tuple[str, ...]
    """What each row's noise is a function of, beside the purpose."""

    @classmethod
    def of(cls, seed: int, caption: str, candidates: Sequence[int]) -> Self:
        """Return the sources of a caption's candidates, by their numbers, in a run with `seed`."""
        return cls(tuple(f"{seed}\0{candidate}\0{caption}" for candidate in candidates))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Return standard normal noise, float32 (B, *shape), drawn on the CPU and so equal on all devices.

        Args:
            purpose: what it is for, such as "decoder, step 17": noise of different purposes is independent.
            shape: of one row.
            device: of the result.
        """
        drawn = [torch.randn(*shape, generator=_generator(f"{row}\0{purpose}")) for row in self.rows]
        return torch.stack(drawn).to(device)

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Return noise that is uniform in [0, 1), otherwise as `normal`."""
        drawn = [torch.rand(*shape, generator=_generator(f"{row}\0{purpose}")) for row in self.rows]
        return torch.stack(drawn).to(device)


def _generator(text: str) -> torch.Generator:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Estimate(NamedTuple):
    """What a network says of x_t."""

    x0: Tensor
    """(B, C, …)."""
    log_variance: Tensor | None
    """(B, C, …), of the step back; None if the network has no learned variance."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network with what is needed to read its predictions."""

    network: Network
    prediction: Prediction
    """What it predicts."""
    process: Diffusion
    """The steps that are taken."""
    clamp: float | None = None
    """x̂_0 is kept within ± this: 1 for pictures, None for no bounds."""
    known: tuple[Tensor, Tensor] | None = None
    """What is known of x_0, (B, C, …), and a mask (B, 1, …) that is 1 where it is: x̂_0 has it at every step."""
    on_pass: OnPass | None = None
    """Told of each estimate."""

    @torch.no_grad()
    def estimate(self, x: Tensor, step: int) -> Estimate:
        """Return x̂_0, clamped, and the log variance of x_t (B, C, …) at a step."""
        output = self.network(x, self.process.timesteps_of(step, x)).to(x.dtype)
        if self.on_pass is not None:
            self.on_pass()
        log_variance = None
        if output.shape[1] == 2 * x.shape[1]:
            output, fractions = output.chunk(2, dim=1)
            log_variance = self.process.log_variance(fractions, step)
        x0 = self.process.x0_of(self.prediction, output, x, step)
        if self.clamp is not None:
            x0 = x0.clamp(-self.clamp, self.clamp)
        if self.known is not None:
            known, mask = self.known
            x0 = mask * known + (1 - mask) * x0
        return Estimate(x0, log_variance)


def guided(conditional: Tensor, unconditional: Tensor, guidance: float, channels: int) -> Tensor:
    """Return what is predicted with guidance: the variance is not guided, it is the conditional one's.

    Args:
        conditional: (B, C, …), a prediction of `channels` channels, and perhaps a variance behind it.
        unconditional: of the same shape.
        guidance: 1 is the conditional prediction, exactly; 0 the unconditional one.
        channels: of the prediction.
    """
    if guidance == 1:
        return conditional
    mean, base = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([base + guidance * (mean - base), conditional[:, channels:]], dim=1)


@torch.no_grad()
def sample_ddpm(predictor: Predictor, start: Tensor, draw: DrawNoise, variances: Tensor | None = None) -> Tensor:
    """Return x_0 (B, C, …) by ancestral sampling from x_T.

    Args:
        predictor: the network and the steps.
        start: (B, C, …), x_T.
        draw: the noise of each step.
        variances: (N,) of each step; by default the learned ones, or β̃ of a network without.
    """
    x, process = start, predictor.process
    for step in reversed(range(len(process))):
        x0, log_variance = predictor.estimate(x, step)
        if variances is not None:
            chosen: Tensor | float = float(variances[step].log())
        else:
            chosen = float(process.posterior_variances[step].log()) if log_variance is None else log_variance
        noise = draw(process.timesteps[step]) if step else x
        x = process.ddpm_step(x, x0, step, noise, chosen)
    return x


@torch.no_grad()
def sample_ddim(predictor: Predictor, start: Tensor, draw: DrawNoise, eta: float = 0.0) -> Tensor:
    """Return x_0 (B, C, …) by DDIM from x_T; `draw` is asked only if eta is above 0."""
    x, process = start, predictor.process
    for step in reversed(range(len(process))):
        noise = draw(process.timesteps[step]) if eta and step else None
        x = process.ddim_step(x, predictor.estimate(x, step).x0, step, eta, noise)
    return x


def sample(
    predictor: Predictor, start: Tensor, draw: DrawNoise, *, sampler: Sampler = "ddim", eta: float = 0.0
) -> Tensor:
    """Return x_0 (B, C, …) by the sampler of that name.

    Raises:
        ValueError: there is no such sampler, or eta is not in [0, 1], or is given to DDPM.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(get_args(Sampler))}")
    if not 0 <= eta <= 1 or (eta and sampler == "ddpm"):
        raise ValueError(f"eta is {eta}; expected a number in [0, 1], and 0 for ddpm")
    if sampler == "ddpm":
        return sample_ddpm(predictor, start, draw)
    return sample_ddim(predictor, start, draw, eta)


@torch.no_grad()
def invert_ddim(predictor: Predictor, x0: Tensor, corrections: int = 1) -> Tensor:
    """Return x_T (B, C, …) from which `sample_ddim` with eta 0 and the same predictor gives x_0 back.

    Going up, the network is asked at the lower of two steps. A correction asks it again at the upper one, where the way
    back will ask it: with enough of them, the inversion is exact.

    Args:
        predictor: as in sampling, but without clamping, known parts or guidance, which have no inverse.
        x0: (B, C, …).
        corrections: passes of the network for each step beyond the first, 0 or more.

    Raises:
        ValueError: the predictor clamps, or knows parts.
    """
    if predictor.clamp is not None or predictor.known is not None:
        raise ValueError("a predictor that clamps, or that is given known parts, cannot be inverted")
    x, process = x0, predictor.process
    for step in range(len(process)):
        # below the first step there is no noise to tell; the estimate of the first step stands in
        told, told_at = x, max(0, step - 1)
        for _ in range(1 + corrections):
            x0_told = predictor.estimate(told, told_at).x0
            told = process.ddim_step_up(x, x0_told, process.noise_of(x0_told, told, told_at), step)
            told_at = step
        x = told
    return x


def signed(images: Tensor) -> Tensor:
    """Return pixels of [0, 1] in [-1, 1], as they are noised."""
    return images * 2 - 1


def unsigned(pixels: Tensor) -> Tensor:
    """Return pixels of [-1, 1] in [0, 1]; what is outside is clamped."""
    return ((pixels + 1) / 2).clamp(0, 1)
