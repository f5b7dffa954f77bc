import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvae import DVAE, DVAEConfig
from dvae.images import map_pixels
from dvae.loss import dvae_loss, gumbel_softmax, kl_to_uniform, logit_laplace_nll


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.floats(-1.5, 0.5))
def test_the_logit_laplace_density_integrates_to_1(mu: float, ln_b: float) -> None:
    # midpoints in the logit, where the tails are thin; dx = x(1-x) dt
    t = torch.linspace(mu - 40, mu + 40, 400_001, dtype=torch.float64)
    x = t.sigmoid().clamp(1e-15, 1 - 1e-15).reshape(1, 1, 1, -1)
    stats = torch.tensor([mu, ln_b]).reshape(1, 2, 1, 1)
    density = (-logit_laplace_nll(x, stats)).exp()
    inside = ((x > 1e-12) & (x < 1 - 1e-12)).double()
    total = (density * x * (1 - x) * inside).sum() * (t[1] - t[0])
    assert float(total) == pytest.approx(1.0, abs=1e-3)


def test_the_likelihood_is_the_formula_of_the_paper() -> None:
    x, mu, b = 0.3, 0.7, 0.2
    stats = torch.cat([torch.full((1, 3, 1, 1), mu), torch.full((1, 3, 1, 1), math.log(b))], dim=1)
    nll = logit_laplace_nll(torch.full((1, 3, 1, 1), x), stats)
    density = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    assert nll.tolist()[0][1][0][0] == pytest.approx(-math.log(density), rel=1e-5)


def test_the_likelihood_is_highest_at_its_location() -> None:
    x = torch.full((1, 3, 1, 1), 0.3)
    ln_b = torch.zeros(1, 3, 1, 1)
    at, beside = (logit_laplace_nll(x, torch.cat([mu, ln_b], 1)).mean() for mu in (x.logit(), x.logit() + 0.1))
    assert beside - at == pytest.approx(0.1, abs=1e-6)


def test_the_kl_is_0_for_uniform_logits_and_ln_v_for_a_certain_token() -> None:
    uniform = torch.full((1, 8192, 2, 2), 3.0)
    certain = torch.zeros(1, 8192, 2, 2)
    certain[:, 5] = 1000.0
    assert kl_to_uniform(uniform).abs().max() < 1e-5
    assert kl_to_uniform(certain).tolist() == [[[pytest.approx(math.log(8192))] * 2] * 2]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.floats(0, 30), st.integers(0, 1000))
def test_the_kl_stays_between_0_and_ln_v(vocab: int, scale: float, seed: int) -> None:
    kl = kl_to_uniform(scale * torch.randn(2, vocab, 3, 3, generator=generator(seed)))
    assert tuple(kl.shape) == (2, 3, 3)
    assert kl.min() > -1e-5
    assert kl.max() < math.log(vocab) + 1e-5


def test_a_relaxed_sample_is_soft_sums_to_1_and_sharpens() -> None:
    logits = torch.randn(2, 16, 4, 4, generator=generator())
    warm, cold = (gumbel_softmax(logits, tau, generator(1)) for tau in (1.0, 1 / 16))
    assert torch.allclose(warm.sum(1), torch.ones(2, 4, 4))
    assert (warm > 0).all()
    assert warm.max(1).values.mean() < 0.8 < cold.max(1).values.mean()
    assert torch.equal(warm.argmax(1), cold.argmax(1))
    assert torch.equal(warm, gumbel_softmax(logits, 1.0, generator(1)))


def test_relaxed_samples_fall_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).reshape(1, 4, 1, 1).expand(1, 4, 200, 200)
    counts = gumbel_softmax(logits, 0.5, generator()).argmax(1).flatten().bincount(minlength=4)
    assert torch.allclose(counts / counts.sum(), logits[0, :, 0, 0].softmax(0), atol=0.01)


def test_the_sample_carries_a_gradient_without_rounding() -> None:
    logits = torch.zeros(1, 4, 1, 1, requires_grad=True)
    gumbel_softmax(logits, 0.5, generator())[0, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].item() > 0
    with pytest.raises(ValueError, match=r"temperature \(0\) must be above 0"):
        gumbel_softmax(logits, 0)


def loss_of(n_groups: int, kl_weight: float, images: torch.Tensor) -> object:
    config = DVAEConfig(n_hid=8, n_init=4, n_groups=n_groups, n_blocks=1, vocab_size=16, image_size=16)
    dvae = DVAE(config, generator=generator())
    return dvae_loss(dvae, images, temperature=1.0, kl_weight=kl_weight, generator=generator(1))


def test_beta_is_divided_by_192_per_token_for_a_downsampling_of_8() -> None:
    images = torch.rand(2, 3, 16, 16, generator=generator())
    for n_groups, divisor in ((4, 192), (3, 48), (1, 3)):
        without, with_kl = loss_of(n_groups, 0.0, images), loss_of(n_groups, 6.6, images)
        assert torch.equal(without.total, without.nll)
        assert (with_kl.total - without.total).item() == pytest.approx(6.6 / divisor * with_kl.kl.item(), rel=1e-3)


def test_the_loss_is_the_sum_over_dimensions_and_positions_over_the_dimensions() -> None:
    images = torch.rand(2, 3, 16, 16, generator=generator())
    config = DVAEConfig(n_hid=8, n_init=4, n_groups=2, n_blocks=1, vocab_size=16, image_size=16)
    dvae = DVAE(config, generator=generator())
    loss = dvae_loss(dvae, images, temperature=0.7, kl_weight=3.0, generator=generator(1))
    x = map_pixels(images)
    stats = dvae.decoder(gumbel_softmax(dvae.encoder(x), 0.7, generator(1)))
    sums = logit_laplace_nll(x, stats).sum((1, 2, 3)) + 3.0 * kl_to_uniform(loss.logits).sum((1, 2))
    assert torch.allclose(loss.total, (sums / (16 * 16 * 3)).mean())


def test_a_few_steps_lower_the_loss() -> None:
    images = torch.rand(4, 3, 1, 1, generator=generator()).expand(4, 3, 16, 16).contiguous()
    config = DVAEConfig(n_hid=16, n_init=16, n_groups=3, n_blocks=1, vocab_size=16, image_size=16)
    dvae = DVAE(config, generator=generator())
    optimizer = torch.optim.Adam(dvae.parameters(), 3e-3)
    noise, losses = generator(1), []
    for _ in range(40):
        loss = dvae_loss(dvae, images, temperature=0.5, kl_weight=0.0, generator=noise)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert all(weight.grad is not None for weight in dvae.parameters())
    assert losses[-1] < losses[0] - 0.3
