"""DALL·E mini: its cache, its sizes, its directory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.family.mini import cache
from dalle.family.mini.config import MEGA, MINI, MiniConfig
from dalle.family.mini.model import DALLEMini
from dalle.family.transformers import candidate_bytes, decoding, load_transformer
from dalle.sampling import Sampling, sample
from storage.models.stored import n_weights

TINY = MiniConfig(
    encoder_layers=2,
    decoder_layers=3,
    d_model=32,
    n_heads=4,
    d_glu=24,
    text_len=10,
    grid=4,
    text_vocab=50,
    n_text_ids=53,
    image_vocab=40,
    n_image_ids=44,
    start_of_image=40,
)
CAPTIONS = [[7, 8, 9], [], list(range(10, 30)), [3]]


def random_model(config: MiniConfig = TINY) -> DALLEMini:
    """A model in which every weight matters."""
    torch.manual_seed(0)
    model = DALLEMini(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
            else:
                weight.copy_(torch.randn_like(weight) * (1.5 * weight.shape[1] ** -0.5))
    return model


def tokens(n: int, config: MiniConfig = TINY) -> Tensor:
    return torch.randint(config.image_vocab, (n, config.stream.n_image), generator=torch.Generator().manual_seed(3))


def test_text_rows_begin_end_and_are_padded_and_cut() -> None:
    rows = TINY.text_rows(CAPTIONS)
    assert rows[0].tolist() == [0, 7, 8, 9, 2, 1, 1, 1, 1, 1]
    assert rows[2].tolist() == [0, *range(10, 18), 2]
    assert TINY.null_caption().tolist() == rows[1].tolist() == [0, 2, *[1] * 8]
    fitted = TINY.fitted(text_vocab=60, image_vocab=32, grid=5)
    assert fitted.null_caption().tolist() == [60, 62, *[61] * 8]
    assert (fitted.n_text_ids, fitted.n_image_ids, fitted.start_of_image, fitted.grid) == (63, 33, 32, 5)


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize("m", [0, 5])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_decoding_gives_the_logits_of_a_full_pass(has_scales: bool, m: int, compiled: bool) -> None:
    config = replace(TINY, norm_scales=has_scales)
    model, text, counts = random_model(config), TINY.text_rows(CAPTIONS), [2, 2, 1, 3]
    image_tokens = tokens(sum(counts))
    prompts = torch.arange(4).repeat_interleave(torch.tensor(counts))
    prefix = torch.stack([image_tokens[prompts == p][0, :m] for p in range(4)])
    image_tokens[:, :m] = prefix[prompts]
    expected = model(text[prompts], image_tokens)
    decoder = decoding(model, text, counts, prefix, compile=compiled)
    for i in range(m, config.stream.n_image):
        inputs = image_tokens[:, i - 1] if i else torch.zeros_like(prompts)
        torch.testing.assert_close(decoder.step(inputs), expected[:, i], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="all 16 image tokens are decoded"):
        decoder.step(image_tokens[:, 0])


def test_dropped_candidates_do_not_change_the_others() -> None:
    model, text, image_tokens = random_model(), TINY.text_rows(CAPTIONS[:2]), tokens(5)
    kept = torch.tensor([0, 2, 4])
    whole, fewer = (cache.MiniDecoder(model, text, [3, 2]) for _ in range(2))
    for i in range(6):
        rows = kept if i >= 3 else torch.arange(5)
        expected = whole.step(image_tokens[:, i - 1])
        torch.testing.assert_close(fewer.step(image_tokens[rows, i - 1]), expected[rows], atol=1e-6, rtol=1e-5)
        if i == 2:
            fewer.keep(kept)
    with pytest.raises(ValueError, match="at least one of each prompt"):
        fewer.keep(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 counts for 1 prompts"):
        cache.MiniDecoder(model, text[:1], [1, 1])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_candidate_is_the_same_alone_and_among_64(guidance: float) -> None:
    model, text = random_model(), TINY.text_rows(CAPTIONS[:1])
    settings = Sampling(guidance=guidance, top_k=30)
    many = sample(model, text, range(64), settings)
    assert len(many.tokens[0].unique(dim=0)) == 64
    assert many.tokens.max() < TINY.image_vocab
    for k in (0, 17, 63):
        alone = sample(model, text, [k], settings)
        assert alone.tokens[0, 0].tolist() == many.tokens[0, k].tolist()
        torch.testing.assert_close(alone.log_likelihoods[0, 0], many.log_likelihoods[0, k], atol=1e-4, rtol=1e-5)
    top = many.tokens[0, 5, :8]
    assert sample(model, text, [9], settings, prefix=top).tokens[0, 0, :8].tolist() == top.tolist()


def test_likelihoods_are_those_of_a_full_pass_over_image_tokens_alone() -> None:
    model, text = random_model(), TINY.text_rows(CAPTIONS[:1])
    drawn = sample(model, text, [1, 2], Sampling(guidance=3.0))
    logits = model(text.expand(2, -1), drawn.tokens[0])
    assert logits.shape == (2, 16, TINY.image_vocab)
    chosen = logits.log_softmax(-1).gather(2, drawn.tokens[0, :, :, None])
    torch.testing.assert_close(chosen.sum((1, 2)), drawn.log_likelihoods[0], atol=1e-4, rtol=1e-5)


def test_what_stands_behind_the_end_of_a_caption_changes_nothing() -> None:
    model, image_tokens = random_model(), tokens(1)
    longer = random_model(replace(TINY, text_len=14))
    state = {**longer.state_dict(), **model.state_dict()}
    own = model.encoder.position_embedding.weight
    state["encoder.position_embedding.weight"] = torch.cat([own, torch.randn(4, 32)])
    longer.load_state_dict(state)
    rows = [one.config.text_rows([[7, 8, 9]]) for one in (model, longer)]
    torch.testing.assert_close(model(rows[0], image_tokens), longer(rows[1], image_tokens), atol=1e-5, rtol=1e-5)


def test_a_picture_depends_on_its_caption_and_a_token_on_those_before_it() -> None:
    model, image_tokens = random_model(), tokens(1)
    first, second = (model(TINY.text_rows([caption]), image_tokens) for caption in CAPTIONS[:2])
    assert (first - second).abs().max() > 0.1
    changed = image_tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % TINY.image_vocab
    again = model(TINY.text_rows([CAPTIONS[0]]), changed)
    assert torch.equal(again[:, :7], first[:, :7])
    assert ((again - first)[:, 7:].abs().amax(-1) > 0).all()


def test_recomputing_layers_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = random_model().train()
        model.activation_checkpointing = recompute
        model(TINY.text_rows(CAPTIONS[:2]), tokens(2)).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_saved_model_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    model = random_model()
    model.save(tmp_path / "dalle", {"a": 1})
    loaded = load_transformer(tmp_path / "dalle")
    assert isinstance(loaded, DALLEMini)
    assert loaded.metadata == {"a": 1}
    assert loaded.config == TINY
    text = TINY.text_rows(CAPTIONS[:1])
    assert torch.equal(loaded(text, tokens(1)), model(text, tokens(1)))


def test_the_published_sizes_have_the_published_numbers_of_parameters() -> None:
    for config, encoder, decoder in ((MINI, 202.6, 235.3), (MEGA, 1110.2, 1477.7)):
        with torch.device("meta"):
            model, counted = DALLEMini(config), DALLEMini(replace(config, norm_scales=True))
        # min-dalle's modules have a scale in every norm, its files do not
        assert [round(n_weights(part) / 1e6, 1) for part in (counted.encoder, counted.decoder)] == [encoder, decoder]
        counts = model.n_parameters()
        assert counts["total"] == n_weights(model)
        assert candidate_bytes(model) == 2 * config.decoder_layers * 256 * config.d_model * 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_heads": 5}, r"d_model \(32\) must be a multiple of n_heads"),
        ({"text_len": 2}, "must be at least 3"),
        ({"pad": 0}, "must be three of the 53 text ids"),
        ({"n_text_ids": 40}, "must be at least text_vocab"),
        ({"start_of_image": 44}, "must hold the 40 image tokens and start of image"),
        ({"d_glu": 0}, "must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changed)  # type: ignore[arg-type]
