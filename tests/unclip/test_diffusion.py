import math

import pytest
import torch
from torch import Tensor

from unclip.diffusion import Diffusion, Prediction, Schedule
from unclip.loss import denoising_loss, gaussian_divergence, pixel_nll, variational_bits
from unclip.sampling import Noise, Predictor, guided, invert_ddim, sample, sample_ddim, sample_ddpm

SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine")
PREDICTIONS: tuple[Prediction, ...] = ("noise", "x0", "v")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "last", "rtol"), [("linear", 4.0358e-5, 1e-3), ("cosine", 2.4e-9, 0.02)])
def test_the_schedules_are_the_published_ones(schedule: Schedule, last: float, rtol: float) -> None:
    process = Diffusion(schedule)
    betas = process.betas
    assert process.alphas_bar.dtype == torch.float64
    assert float(process.alphas_bar[-1]) == pytest.approx(last, rel=rtol)
    if schedule == "linear":
        assert float(betas[0]) == pytest.approx(1e-4)
        assert float(betas[-1]) == pytest.approx(0.02)
        half = Diffusion(schedule, 500).alphas_bar
        assert float(half[-1]) == pytest.approx(last, rel=0.1)
    else:
        assert float(betas.max()) == pytest.approx(0.999)
        middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert float(process.alphas_bar[499]) == pytest.approx(middle)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_in_one_go_has_the_marginals_of_noising_step_by_step(schedule: Schedule) -> None:
    process = Diffusion(schedule, 30)
    mean, variance = 1.7, 0.0
    for step, beta in enumerate(process.betas.tolist()):
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        x0, noise = torch.tensor([[1.7]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
        assert float(process.noised(x0, 0 * noise, step)) == pytest.approx(mean)
        assert float(process.noised(0 * x0, noise, step)) == pytest.approx(math.sqrt(variance))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [1000, 27])
def test_the_posterior_is_bayes_rule_for_gaussians(schedule: Schedule, count: int) -> None:
    process = Diffusion(schedule).respaced(count)
    x0, x = normal(4, 3, seed=1), normal(4, 3, seed=2)
    for step in (1, count // 2, count - 1):
        before, beta = process.alphas_bar_before[step], process.betas[step]
        # prior N(√ᾱ' x_0, 1-ᾱ'), likelihood of x_t: N(√(1-β) x', β)
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x / beta) / precision
        torch.testing.assert_close(process.posterior_mean(x0, x, step), mean)
        assert float(process.posterior_variances[step]) == pytest.approx(float(1 / precision))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_predicted_tells_x0_and_the_noise(prediction: Prediction) -> None:
    process = Diffusion()
    x0, noise, steps = normal(5, 3, 2, 2), normal(5, 3, 2, 2, seed=1), torch.tensor([0, 1, 300, 700, 990])
    x = process.noised(x0, noise, steps)
    target = process.target(prediction, x0, noise, steps)
    torch.testing.assert_close(process.x0_of(prediction, target, x, steps), x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(process.noise_of(x0, x, steps), noise, atol=1e-9, rtol=0)
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(process.noised(x0[row : row + 1], noise[row : row + 1], step), x[row : row + 1])


def test_a_respaced_process_tells_the_network_the_timesteps_it_was_trained_on() -> None:
    process = Diffusion().respaced(5)
    assert process.timesteps == [0, 250, 500, 749, 999]
    torch.testing.assert_close(process.alphas_bar, Diffusion().alphas_bar[process.timesteps])
    seen = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(timesteps.tolist())
        return x

    predictor = Predictor(network=network, prediction="v", process=process)
    sample_ddim(predictor, normal(2, 3), lambda step: normal(2, 3))
    assert seen == [[999] * 2, [749] * 2, [500] * 2, [250] * 2, [0] * 2]
    assert process.timesteps_of(torch.tensor([0, 4]), normal(2, 1)).tolist() == [0, 999]
    assert Diffusion(n_steps=10).respaced(1).timesteps == [9]


MEAN, VARIANCE = 0.3, 0.25
"""Of the Gaussian from which x_0 comes in the tests of sampling: its best denoiser is known."""


def best_denoiser(process: Diffusion, prediction: Prediction, *, learned: bool = False) -> Predictor:
    """E[x_0 | x_t], and the exact variance of the step back."""
    table = dict(zip(process.timesteps, range(len(process)), strict=True))

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        step = table[int(timesteps[0])]
        bar = float(process.alphas_bar[step])
        gain = math.sqrt(bar) * VARIANCE / (bar * VARIANCE + 1 - bar)
        x0 = MEAN + gain * (x - math.sqrt(bar) * MEAN)
        output = process.target(prediction, x0, process.noise_of(x0, x, step), step)
        if not learned:
            return output
        low, high = (float(each[step]) for each in process.log_variance_range)
        exact = math.log(float(exact_variances(process)[step]))
        return torch.cat([output, torch.full_like(output, 2 * (exact - low) / (high - low) - 1)], dim=1)

    return Predictor(network=network, prediction=prediction, process=process)


def best_errors(process: Diffusion) -> Tensor:
    """The variance of x_0 given x_t, which is the error of the best denoiser."""
    bar = process.alphas_bar
    return VARIANCE * (1 - bar) / (bar * VARIANCE + 1 - bar)


def exact_variances(process: Diffusion) -> Tensor:
    """The variance of x_{t-1} given x_t, by Bayes' rule on the marginals."""
    before, betas = process.alphas_bar_before, process.betas
    marginal = before * VARIANCE + 1 - before
    return 1 / (1 / marginal + (1 - betas) / betas)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_of_a_known_denoiser_is_the_known_map(prediction: Prediction) -> None:
    # without noise, a Gaussian's flow keeps the number of standard deviations from the mean
    process = Diffusion("cosine", 1500)
    predictor = best_denoiser(process, prediction)
    start = normal(16, 2)
    end = sample_ddim(predictor, start, lambda step: start)
    torch.testing.assert_close(end, MEAN + math.sqrt(VARIANCE) * start, atol=6e-3, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inversion_finds_the_start_of_ddim(schedule: Schedule, prediction: Prediction) -> None:
    predictor = best_denoiser(Diffusion(schedule).respaced(20), prediction)
    start = normal(16, 2, seed=3)
    end = sample_ddim(predictor, start, lambda step: start)
    errors = [float((invert_ddim(predictor, end, corrections) - start).abs().max()) for corrections in (0, 1, 2, 12)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4
    again = sample_ddim(predictor, invert_ddim(predictor, end, 12), lambda step: start)
    torch.testing.assert_close(again, end, atol=1e-4, rtol=0)


def test_inversion_refuses_what_has_no_inverse() -> None:
    predictor = Predictor(network=lambda x, t: x, prediction="v", process=Diffusion(), clamp=1.0)
    with pytest.raises(ValueError, match="cannot be inverted"):
        invert_ddim(predictor, normal(1, 1))


def test_the_best_variance_by_the_errors_is_the_exact_one() -> None:
    process = Diffusion("cosine").respaced(12)
    # of Gaussian data the step back is exactly Gaussian
    torch.testing.assert_close(process.analytic_variances(best_errors(process))[1:], exact_variances(process)[1:])
    assert torch.equal(process.analytic_variances(torch.zeros(12)), process.posterior_variances)
    with pytest.raises(ValueError, match="12 numbers of at least 0"):
        process.analytic_variances(torch.zeros(11))


@pytest.mark.parametrize("how", ["learned", "analytic", "eta"])
def test_a_few_steps_with_exact_variances_draw_the_right_distribution(how: str) -> None:
    process = Diffusion("cosine").respaced(6)
    predictor = best_denoiser(process, "v", learned=how == "learned")
    start = normal(40_000, 1)

    def draw(timestep: int) -> Tensor:
        return normal(40_000, 1, seed=timestep + 1)

    if how == "eta":
        x = sample_ddim(predictor, start, draw, eta=1.0)
        plain = sample_ddpm(predictor, start, draw)
        torch.testing.assert_close(x, plain)  # DDIM with eta 1 is DDPM with β̃
        return
    variances = process.analytic_variances(best_errors(process)) if how == "analytic" else None
    x = sample_ddpm(predictor, start, draw, variances)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    # the last step adds no noise, as it should not: it tells E[x_0 | x_1]
    expected = VARIANCE - float(best_errors(process)[0])
    assert float(x.var()) == pytest.approx(expected, abs=0.005)
    assert float(sample_ddpm(best_denoiser(process, "v"), start, draw).var()) < expected - 0.02


def test_the_last_step_returns_x0_itself() -> None:
    process = Diffusion().respaced(10)
    x, x0, noise = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    assert torch.equal(process.ddpm_step(x, x0, 0, noise, 0.0), x0)
    assert torch.equal(process.ddim_step(x, x0, 0, 1.0, noise), x0)


def test_known_pixels_are_there_in_the_end_and_x0_is_clamped() -> None:
    pixels, mask = torch.full((1, 3, 4, 4), 0.25), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    predictor = Predictor(
        network=lambda x, t: x + 9, prediction="x0", process=Diffusion().respaced(4), clamp=1.0, known=(pixels, mask)
    )
    drawn = sample(predictor, normal(1, 3, 4, 4).float(), lambda step: torch.zeros(1, 3, 4, 4), sampler="ddpm")
    assert torch.equal(drawn[..., :2], pixels[..., :2])
    assert (drawn[..., 2:] == 1).all()


def test_guidance_is_affine_and_leaves_the_variance_alone() -> None:
    conditional, unconditional = normal(2, 6, 2, 2), normal(2, 6, 2, 2, seed=1)
    assert guided(conditional, unconditional, 1.0, 3) is conditional
    at = {scale: guided(conditional, unconditional, scale, 3) for scale in (0.0, 2.0, 4.0)}
    torch.testing.assert_close(at[0.0][:, :3], unconditional[:, :3])
    torch.testing.assert_close(at[2.0][:, :3], (at[0.0] + at[4.0])[:, :3] / 2)
    assert all(torch.equal(each[:, 3:], conditional[:, 3:]) for each in at.values())


def test_divergence_and_pixel_likelihood_are_those_of_the_definitions() -> None:
    mean, other = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    log_variance, other_log_variance = torch.tensor(-1.0).double(), torch.tensor(0.5).double()
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    q = torch.distributions.Normal(other, (0.5 * other_log_variance).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_divergence(mean, log_variance, other, other_log_variance), expected)
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for spread in (-7.0, 0.0):
        nll = pixel_nll(values, mean.expand(256), torch.full((256,), spread).double())
        assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-3)  # the bins cover the line once
        narrow = torch.distributions.Normal(mean, math.exp(spread / 2))
        bins = narrow.cdf(values[1:-1] + 1 / 255) - narrow.cdf(values[1:-1] - 1 / 255)
        inside = bins > 1e-9
        torch.testing.assert_close((-nll[1:-1]).exp()[inside], bins[inside], rtol=1e-5, atol=0)


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_error_alone() -> None:
    process = Diffusion("cosine", 100)
    x0 = (normal(8, 3, 4, 4).clamp(-1, 1) * 127.5).round().div(127.5).float()
    noise, steps = normal(8, 3, 4, 4, seed=1).float(), torch.tensor([0, 1, 5, 20, 50, 80, 98, 99])
    mean = normal(8, 3, 4, 4, seed=2).float().requires_grad_()
    fractions = normal(8, 3, 4, 4, seed=3).float().requires_grad_()
    loss, parts = denoising_loss(process, "noise", torch.cat([mean, fractions], dim=1), x0, noise, steps)
    x = process.noised(x0, noise, steps)
    x0_predicted = process.x0_of("noise", mean, x, steps)
    bits = variational_bits(process, x0_predicted, fractions, x0, x, steps)
    torch.testing.assert_close(parts["vb"], bits)
    torch.testing.assert_close(parts["mse"], (mean - noise).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss, parts["mse"] + 0.1 * bits)  # 0.001 times 100 steps
    loss.sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, 2 * (mean.detach() - noise) / 48)
    assert fractions.grad is not None
    assert (fractions.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    alone, parts = denoising_loss(process, "noise", mean.detach(), x0, noise, steps)
    assert torch.equal(alone, parts["mse"])
    assert "vb" not in parts


def test_the_bound_is_least_at_the_variance_that_is_right() -> None:
    process = Diffusion("cosine", 50)
    x0, noise, steps = normal(400, 1, 8).float().clamp(-1, 1), normal(400, 1, 8, seed=1).float(), torch.full((400,), 30)
    x = process.noised(x0, noise, steps)
    guess = x0 + 0.3 * normal(400, 1, 8, seed=2).float()
    exact = process.analytic_variances(torch.full((50,), 0.09))[30].log()
    low, high = (each[30] for each in process.log_variance_range)
    right = float(2 * (exact - low) / (high - low) - 1)

    def bits(fraction: float) -> float:
        return float(variational_bits(process, guess, torch.full_like(x, fraction), x0, x, steps).mean())

    assert bits(right) < min(bits(right - 0.2), bits(right + 0.2))


def test_noise_is_a_function_of_seed_caption_candidate_and_purpose() -> None:
    alone = Noise.of(3, "a cat", [5]).normal("start", (3, 4))
    among = (Noise.of(3, "a dog", [0]) + Noise.of(3, "a cat", [4, 5])).normal("start", (3, 4))
    assert torch.equal(among[2:], alone)
    others = [
        Noise.of(4, "a cat", [5]).normal("start", (3, 4)),
        Noise.of(3, "a cat.", [5]).normal("start", (3, 4)),
        Noise.of(3, "a cat", [5]).normal("step 1", (3, 4)),
        *among[:2, None].unbind(0),
    ]
    assert not any(torch.equal(other, alone) for other in others)
    many = Noise.of(0, "", range(2000)).normal("start", (5,))
    assert abs(float(many.mean())) < 0.03
    assert float(many.std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "square"}, "expected one of linear, cosine"),
        ({"n_steps": 0}, "whole number from 1"),
        ({"timesteps": [3, 2]}, "rising"),
        ({"timesteps": [0, 1000]}, "within 0 … 999"),
    ],
)
def test_impossible_processes_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diffusion(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from 1 to 1000"):
        Diffusion().respaced(1001)


def test_impossible_samplers_are_refused() -> None:
    predictor = Predictor(network=lambda x, t: x, prediction="v", process=Diffusion())
    for wrong in ({"sampler": "euler"}, {"eta": 1.5}, {"sampler": "ddpm", "eta": 0.5}):
        with pytest.raises(ValueError, match="expected"):
            sample(predictor, normal(1, 1), lambda step: normal(1, 1), **wrong)  # type: ignore[arg-type]
