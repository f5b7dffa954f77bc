import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.conditions import Text
from unclip.embeddings import measured_errors, prior_loss, sample_embeddings
from unclip.prior import Prior, PriorConfig, embedding_scale
from unclip.sampling import Noise

TINY = PriorConfig(
    embed_dim=8, text_width=12, text_len=6, width=32, n_layers=2, n_heads=4, n_steps=50, scale=embedding_scale(8)
)


def tiny(config: PriorConfig = TINY) -> Prior:
    torch.manual_seed(0)
    return Prior(config).eval().requires_grad_(False)


def some_text(count: int = 3, length: int = 6, seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, 8, generator=generator), dim=-1)
    mask = torch.arange(length) < torch.tensor([length, 2, 4, 3, 1])[:count, None]
    return Text(features, torch.randn(count, length, 12, generator=generator), mask)


def embeddings(count: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rows(text: Text, chosen: slice) -> Text:
    return Text(*(tensor[chosen] for tensor in text))


def test_the_papers_prior_has_1226_million_parameters() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Prior(PriorConfig()).parameters())
    assert round(count / 1e6) == 1226


def test_the_scale_gives_coordinates_the_deviation_of_pixels() -> None:
    assert embedding_scale(1024) == pytest.approx(17.2)
    for width in (128, 768):
        unit = F.normalize(torch.randn(500, width, generator=torch.Generator().manual_seed(0)), dim=-1)
        prior = tiny(replace(TINY, embed_dim=width, scale=embedding_scale(width)))
        assert float(prior.scaled(unit).std()) == pytest.approx(0.5375, rel=0.05)
        torch.testing.assert_close(prior.unscaled(prior.scaled(unit)), unit)


def test_embeddings_that_are_no_unit_vectors_are_whitened_and_come_back() -> None:
    prior = tiny(replace(TINY, normalised=False, scale=1.0))
    given = 3 + 2 * torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    prior.mean.copy_(given.mean(dim=0))
    prior.deviation.copy_(given.std(dim=0))
    scaled = prior.scaled(given)
    torch.testing.assert_close(scaled.std(dim=0), torch.ones(8))
    torch.testing.assert_close(prior.unscaled(scaled), given)


@pytest.mark.parametrize("length", [6, 4])
def test_a_text_that_was_read_once_gives_the_same_as_one_that_is_read_each_time(length: int) -> None:
    prior, text = tiny(), some_text(length=length)
    x, timesteps = embeddings(3), torch.tensor([0, 20, 49])
    memory, visible = prior.remember(text)
    expected = prior(x, timesteps, text)
    torch.testing.assert_close(prior.continued(x, timesteps, memory, visible), expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 0.05


def test_padding_is_not_seen_and_everything_else_is() -> None:
    prior, text = tiny(), some_text()
    x, timesteps = embeddings(3), torch.tensor([5, 5, 5])
    out = prior(x, timesteps, text)
    states = text.states.clone()
    states[1, 2:] += 1  # row 1 has two positions
    torch.testing.assert_close(prior(x, timesteps, text._replace(states=states))[1], out[1])
    shorter = Text(text.features[1:2], text.states[1:2, :2], text.mask[1:2, :2])
    torch.testing.assert_close(prior(x[1:2], timesteps[1:2], shorter)[0], out[1], atol=1e-6, rtol=1e-5)
    states[1, 1] += 1
    for changed in (
        prior(x, timesteps, text._replace(states=states)),
        prior(x, timesteps, text._replace(features=text.features.roll(1, 0))),
        prior(x, timesteps + 1, text),
        prior(x + 1, timesteps, text),
    ):
        assert (changed[1] - out[1]).abs().max() > 1e-3


def test_captions_are_left_out_by_row_and_the_null_is_no_padding() -> None:
    prior, text = tiny(), some_text()
    dropped = prior.null_text(text, torch.tensor([True, False, True]))
    assert torch.equal(dropped.features[0], prior.null_text.features)
    assert torch.equal(
        dropped.mask, torch.tensor([[True] + [False] * 5, [True] * 2 + [False] * 4, [True] + [False] * 5])
    )
    assert torch.equal(dropped.states[1], text.states[1])
    x, timesteps = embeddings(3), torch.tensor([5, 5, 5])
    out = prior(x, timesteps, dropped)
    assert torch.equal(out[1], prior(x, timesteps, text)[1])
    torch.testing.assert_close(prior(x, timesteps, prior.null_text(some_text(seed=9), torch.ones(3).bool()))[0], out[0])
    padded = dropped._replace(states=torch.zeros_like(dropped.states), features=torch.zeros_like(dropped.features))
    assert not torch.allclose(prior(x, timesteps, padded)[0], out[0])


def test_the_loss_is_a_function_of_its_seed_and_of_the_share_left_out() -> None:
    prior, text, given = tiny(), some_text(5), embeddings(5)
    loss, metrics = prior_loss(prior, given, text, seed=3)
    again, _ = prior_loss(prior, given, text, seed=3)
    other, _ = prior_loss(prior, given, text, seed=4)
    assert torch.equal(loss, again)
    assert loss != other
    torch.testing.assert_close(loss, metrics["mse"].mean())
    assert metrics["cosine"].shape == metrics["t"].shape == (5,)
    without, _ = prior_loss(prior, given, text, seed=3, dropped=1.0)
    other_captions, _ = prior_loss(prior, given, some_text(5, seed=8), seed=3, dropped=1.0)
    assert torch.equal(without, other_captions)


def test_a_prior_learns_which_embedding_belongs_to_which_caption() -> None:
    torch.manual_seed(0)
    prior, text, given = Prior(TINY), some_text(5), embeddings(5)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for step in range(60):
        many = Text(*(torch.cat([tensor] * 8) for tensor in text))
        loss, _ = prior_loss(prior, given.repeat(8, 1), many, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval().requires_grad_(False)
    drawn = sample_embeddings(prior, text, Noise.of(0, "", range(5)), steps=10)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(5))
    assert ((drawn @ given.T).argmax(dim=1) == torch.arange(5)).all()
    errors = measured_errors(prior, given, text, Noise.of(0, "held out", range(5)), points=9)
    assert errors.shape == (50,)
    assert errors[0] < errors[-1] < 0.5375**2  # less than that of the mean


def test_samples_depend_on_neither_the_batch_nor_its_other_rows() -> None:
    prior, text = tiny(), some_text()
    noise = Noise.of(1, "a", [0]) + Noise.of(1, "b", [0, 1])
    together = sample_embeddings(prior, text, noise, steps=5, guidance=2.0)
    alone = sample_embeddings(prior, rows(text, slice(1, 2)), Noise.of(1, "b", [0]), steps=5, guidance=2.0)
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=0)
    assert not torch.allclose(sample_embeddings(prior, text, Noise.of(2, "b", range(3)), steps=5), together)


def test_of_several_candidates_the_closest_to_the_caption_is_returned() -> None:
    prior, text, noise = tiny(), some_text(), Noise.of(0, "", range(3))
    dots = [
        (sample_embeddings(prior, text, noise, steps=4, candidates=k) * text.features).sum(dim=1) for k in (1, 2, 6)
    ]
    assert (dots[0] <= dots[1] + 1e-6).all()
    assert (dots[1] <= dots[2] + 1e-6).all()
    assert (dots[0] < dots[2]).any()


def test_guidance_1_is_no_guidance_and_2_is_twice_as_far_from_the_null() -> None:
    prior, text, noise = tiny(replace(TINY, normalised=False)), some_text(), Noise.of(0, "", range(3))

    def one_step(guidance: float) -> Tensor:
        return sample_embeddings(prior, text, noise, steps=1, guidance=guidance, candidates=1)

    null = prior.null_text(text, torch.ones(3, dtype=torch.bool))
    start = noise.normal("prior 0, start", [8])
    unguided = prior.unscaled(prior(start, torch.full((3,), 49), text))
    torch.testing.assert_close(one_step(1.0), unguided)
    torch.testing.assert_close(one_step(0.0), prior.unscaled(prior(start, torch.full((3,), 49), null)))
    torch.testing.assert_close(one_step(2.0) - one_step(1.0), one_step(1.0) - one_step(0.0), atol=1e-6, rtol=1e-4)


def test_measured_errors_set_the_variances() -> None:
    prior, text, noise = tiny(), some_text(), Noise.of(0, "", range(3))
    few = sample_embeddings(prior, text, noise, steps=5, candidates=1)
    prior.errors.fill_(0.2)
    more = sample_embeddings(prior, text, noise, steps=5, candidates=1)
    assert not torch.allclose(few, more)


def test_layers_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        prior = Prior(TINY)
        prior.activation_checkpointing = again
        prior_loss(prior, embeddings(3), some_text(), seed=0)[0].backward()
        gradients.append({name: parameter.grad for name, parameter in prior.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_saved_prior_is_the_same_and_wrong_text_is_refused(tmp_path: Path) -> None:
    prior, text = tiny(), some_text()
    prior.errors.uniform_(generator=torch.Generator().manual_seed(0))
    prior.save(tmp_path / "prior")
    loaded = Prior.load(tmp_path / "prior")
    assert loaded.config == TINY
    assert torch.equal(loaded.errors, prior.errors)
    x, timesteps = embeddings(3), torch.tensor([1, 2, 3])
    assert torch.equal(loaded(x, timesteps, text), prior(x, timesteps, text))
    with pytest.raises(ValueError, match="take them from the CLIP that the model was trained with"):
        loaded(x, timesteps, text._replace(features=text.features[:, :4]))
    with pytest.raises(ValueError, match="as many rows as captions"):
        sample_embeddings(loaded, text, Noise.of(0, "", [0]))


@pytest.mark.parametrize(
    "wrong", [{"n_heads": 3}, {"null_length": 7}, {"scale": math.inf}, {"clamp": -1.0}, {"width": 0}, {"n_steps": 0}]
)
def test_impossible_sizes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(TINY, **wrong)  # type: ignore[arg-type]
