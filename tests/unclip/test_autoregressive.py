import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_weights import with_random_weights
from torch import Tensor
from torch.nn import functional as F

from unclip import AutoregressivePrior, Prior
from unclip.autoregressive.buckets import Buckets, drawn_tokens
from unclip.autoregressive.prior import AutoregressiveConfig, autoregressive_loss, draw_tokens
from unclip.conditions import Text
from unclip.embeddings import load_prior, sample_embeddings
from unclip.prior import PriorConfig
from unclip.sampling import Noise

TINY = AutoregressiveConfig(
    embed_dim=8, text_width=12, text_len=6, width=32, n_layers=2, n_heads=4, dimensions=5, buckets=7
)


def units(count: int, seed: int = 1) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def some_text(count: int = 3, seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 3, 1])[:count, None]
    return Text(units(count, seed + 5), torch.randn(count, 6, 12, generator=generator), mask)


def some_buckets(dimensions: int = 5, buckets: int = 7) -> Buckets:
    return Buckets.of(units(200), units(200, seed=2), dimensions, buckets)


def tiny(config: AutoregressiveConfig = TINY) -> AutoregressivePrior:
    prior = with_random_weights(AutoregressivePrior(config))
    prior.set_buckets(some_buckets())
    return prior


# ------------------------------------------------------------------------------------------------ buckets


def test_embeddings_come_back_within_half_a_bucket_and_outliers_in_the_last_ones() -> None:
    given, features = units(200), units(200, seed=2)
    buckets = Buckets.of(given, features, 8, 50)
    tokens = buckets.tokens(given, features)
    assert tokens.shape == (200, 9)
    assert tokens.amin(dim=0).tolist() == [0] * 9
    assert tokens.amax(dim=0).tolist() == [49] * 9
    width = (buckets.high - buckets.low)[1:] / 50
    errors = (buckets.embeddings(tokens[:, 1:]) - given) @ buckets.components.T
    assert (errors.abs() <= width / 2 * 1.001).all()
    assert (errors.abs().amax(dim=0) > width / 2 * 0.9).all()
    far = buckets.tokens(buckets.mean + 9 * buckets.components[:1] - 9 * buckets.components[1:2], features[:1])
    assert far[0, 1:3].tolist() == [49, 0]
    spread = (given - buckets.mean) @ buckets.components.T
    assert (spread.var(dim=0).diff() < 0).all()


def test_tokens_are_the_same_under_autocast() -> None:
    buckets, given, features = some_buckets(buckets=1000), units(50), units(50, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = buckets.tokens(given, features)
    assert torch.equal(found, buckets.tokens(given, features))


def test_dot_products_are_drawn_from_the_upper_half_of_those_that_were_met() -> None:
    given, features = units(201), units(201, seed=2)
    buckets = Buckets.of(given, features, 5, 40)
    met = buckets.tokens(given, features)[:, 0]
    assert torch.equal(buckets.counts, torch.bincount(met, minlength=40).float())
    drawn = buckets.dot_tokens(torch.linspace(0, 1 - 1e-6, 1000))
    assert drawn[0] == met.median()
    assert drawn[-1] == met.max()
    assert set(drawn.tolist()) == set(met[met >= met.median()].tolist())
    share = float((drawn == met.max()).float().mean())
    assert share == pytest.approx(2 * float((met == met.max()).float().mean()), abs=2e-3)


def test_tokens_are_drawn_with_the_probability_of_their_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0])
    drawn = drawn_tokens(weights.expand(1000, -1), torch.arange(1000) / 1000)
    assert torch.bincount(drawn, minlength=4).tolist() == [0, 250, 0, 750]


def test_too_few_embeddings_have_no_components() -> None:
    with pytest.raises(ValueError, match="5 embeddings have no 5 principal components"):
        Buckets.of(units(5), units(5), 5, 7)


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_the_cross_entropy_of_each_component_given_those_before_it() -> None:
    prior, text = tiny(), some_text()
    tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
    loss, nats = autoregressive_loss(prior, tokens, text, seed=0, dropped=0.0)
    by_hand = [
        -prior(tokens[:, :n], text)[row, -1].log_softmax(dim=-1)[tokens[row, n]]
        for n in range(1, 6)
        for row in range(3)
    ]
    expected = torch.stack(by_hand).view(5, 3)
    torch.testing.assert_close(nats, expected.mean(dim=1))
    torch.testing.assert_close(loss, expected.mean())
    flat = AutoregressivePrior(TINY)
    for parameter in flat.answer.parameters():
        parameter.data.zero_()
    assert autoregressive_loss(flat, tokens, text, 0, 0.0)[0].item() == pytest.approx(math.log(7))


def test_a_component_sees_what_is_before_it_alone() -> None:
    prior, text = tiny(), some_text()
    tokens = torch.zeros(3, 5, dtype=torch.long)
    logits = prior(tokens, text)
    assert logits.shape == (3, 5, 7)
    for place in range(5):
        changed = tokens.clone()
        changed[:, place] = 3
        other = prior(changed, text)
        torch.testing.assert_close(other[:, :place], logits[:, :place])
        assert (other[:, place:] - logits[:, place:]).abs().amin(dim=(0, 1)).max() > 1e-4
    states = text.states.clone()
    states[1, 2:] += 1  # padding
    torch.testing.assert_close(prior(tokens, text._replace(states=states)), logits)


def test_a_caption_is_left_out_whole_and_with_its_dot_product() -> None:
    prior = tiny()
    tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
    others = torch.cat([(tokens[:, :1] + 1) % 7, tokens[:, 1:]], dim=1)

    def loss(tokens: Tensor, text: Text, dropped: float) -> Tensor:
        return autoregressive_loss(prior, tokens, text, 0, dropped)[0]

    assert torch.equal(loss(tokens, some_text(), 1.0), loss(others, some_text(seed=3), 1.0))
    assert not torch.allclose(loss(tokens, some_text(), 0.0), loss(others, some_text(), 0.0))
    assert not torch.allclose(loss(tokens, some_text(), 0.0), loss(tokens, some_text(seed=3), 0.0))
    assert not torch.allclose(loss(tokens, some_text(), 0.0), loss(tokens, some_text(), 1.0))


def test_layers_computed_again_give_the_same_gradients() -> None:
    tokens, gradients = torch.ones(3, 6, dtype=torch.long), []
    for again in (False, True):
        torch.manual_seed(0)
        prior = AutoregressivePrior(TINY)
        prior.activation_checkpointing = again
        autoregressive_loss(prior, tokens, some_text(), 0, 0.5)[0].backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


def test_a_prior_learns_which_embedding_belongs_to_which_caption() -> None:
    torch.manual_seed(0)
    given, text = units(5).repeat(8, 1), some_text(5)
    many = Text(*(torch.cat([tensor] * 8) for tensor in text))

    def pictures(seed: int) -> Tensor:
        return F.normalize(given + 0.3 * units(40, seed), dim=-1)

    prior = AutoregressivePrior(replace(TINY, dimensions=4, buckets=16))
    buckets = Buckets.of(pictures(0), many.features, 4, 16)
    prior.set_buckets(buckets)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for step in range(60):
        loss, _ = autoregressive_loss(prior, buckets.tokens(pictures(step), many.features), many, step, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval().requires_grad_(False)
    drawn = sample_embeddings(prior, text, Noise.of(0, "", range(5)))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(5))
    assert ((drawn @ given[:5].T).argmax(dim=1) == torch.arange(5)).all()


# ------------------------------------------------------------------------------------------------ sampling


def drawn_slowly(prior: AutoregressivePrior, text: Text, uniform: Tensor, guidance: float) -> Tensor:
    """The reference: the whole sequence is read anew for every token."""
    dots = prior.buckets.dot_tokens(uniform[:, 0])[:, None]
    null = prior.null_text(text, torch.ones(len(dots), dtype=torch.bool))
    tokens = torch.zeros(len(dots), 0, dtype=torch.long)
    for place in range(prior.config.dimensions):
        conditional = prior(torch.cat([dots, tokens], dim=1), text)[:, -1]
        base = prior(torch.cat([torch.full_like(dots, prior.config.buckets), tokens], dim=1), null)[:, -1]
        probabilities = (base + guidance * (conditional - base)).softmax(dim=-1)
        tokens = torch.cat([tokens, drawn_tokens(probabilities, uniform[:, place + 1])[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_tokens_are_those_of_reading_everything_anew_for_each(guidance: float) -> None:
    prior, text = tiny(), some_text(5).repeated(8)
    uniform = Noise.of(0, "", range(40)).uniform("tokens", [6])
    passes: list[None] = []
    drawn = draw_tokens(prior, text, uniform, guidance, on_pass=lambda: passes.append(None))
    assert torch.equal(drawn, drawn_slowly(prior, text, uniform, guidance))
    assert len(passes) == 5
    assert len(drawn.unique(dim=0)) > 30


def test_samples_depend_on_neither_the_batch_nor_its_other_rows() -> None:
    prior, text = tiny(), some_text()
    noise = Noise.of(1, "a", [0]) + Noise.of(1, "b", [0, 1])
    together = sample_embeddings(prior, text, noise, guidance=2.0)
    for row, alone in enumerate([Noise.of(1, "a", [0]), Noise.of(1, "b", [0]), Noise.of(1, "b", [1])]):
        one = Text(*(tensor[row : row + 1] for tensor in text))
        drawn = sample_embeddings(prior, one, alone, guidance=2.0)
        torch.testing.assert_close(drawn[0], together[row], atol=1e-6, rtol=0)
    assert not torch.allclose(sample_embeddings(prior, text, Noise.of(2, "b", range(3)), guidance=2.0), together)


def test_of_several_candidates_the_closest_to_the_caption_is_returned() -> None:
    prior, text, noise = tiny(), some_text(), Noise.of(0, "", range(3))
    dots = [(sample_embeddings(prior, text, noise, candidates=k) * text.features).sum(dim=1) for k in (1, 2, 6)]
    assert (dots[0] <= dots[1] + 1e-6).all()
    assert (dots[1] <= dots[2] + 1e-6).all()
    assert (dots[0] < dots[2]).any()


# ------------------------------------------------------------------------------------------------ the directory


def test_a_saved_prior_is_loaded_by_its_kind(tmp_path: Path) -> None:
    prior, text, noise = tiny(replace(TINY, normalised=False)), some_text(), Noise.of(0, "", range(3))
    prior.save(tmp_path / "tokens")
    Prior(PriorConfig(width=32, n_layers=1, n_heads=2)).save(tmp_path / "noise")
    loaded = load_prior(tmp_path / "tokens")
    assert isinstance(loaded, AutoregressivePrior)
    assert isinstance(load_prior(tmp_path / "noise"), Prior)
    drawn = sample_embeddings(loaded, text, noise)
    assert torch.equal(drawn, sample_embeddings(prior, text, noise))
    assert not torch.allclose(drawn.norm(dim=1), torch.ones(3), atol=1e-3)
    with pytest.raises(ValueError, match="take them from the CLIP that the model was trained with"):
        sample_embeddings(loaded, text._replace(features=text.features[:, :4]), noise)
    with pytest.raises(FileNotFoundError, match="no prior in"):
        load_prior(tmp_path / "nothing")


def test_the_papers_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoregressivePrior(AutoregressiveConfig()).parameters())
    assert round(count / 1e6) == 807


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"dimensions": 9}, "dimensions .9. must be at most embed_dim .8."),
        ({"dimensions": 0}, "dimensions"),
        ({"buckets": 1}, "buckets"),
        ({"n_heads": 3}, "n_heads"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(TINY, **wrong)  # type: ignore[arg-type]
