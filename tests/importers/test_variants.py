"""Transformers of others in our parts: decoding one position at a time is held to the whole stream at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variant_files import CONFIGS, random_model, streams

from dalle.attention import Kind, image_mask, mask
from dalle.cache import Decoder, bytes_per_candidate, slot_pattern
from dalle.family.transformers import load_transformer
from dalle.family.variants.config import VARIANTS, VariantConfig
from dalle.family.variants.model import VariantDALLE, VariantDecoder
from dalle.model import DALLE, DALLEConfig
from dalle.sampling import Sampling, sample

BORDERS: tuple[Kind, ...] = ("conv cut", "conv torus")


def decoded(decoder: Decoder, tokens_BI: Tensor, first: int = 0) -> Tensor:
    """Logits of all positions from `first`, (B, I-first, V), the decoder being fed these tokens."""
    start = torch.full_like(tokens_BI[:, :1], decoder.model.config.image_vocab)
    inputs = torch.cat([start, tokens_BI], dim=1)
    return torch.stack([decoder.step(inputs[:, i]) for i in range(first, tokens_BI.shape[1])], dim=1)


@pytest.mark.parametrize("kind", BORDERS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (2, 3), (4, 3), (5, 11), (6, 3), (7, 5), (8, 11), (13, 11)])
def test_a_conv_window_is_cut_or_wrapped_at_the_border(kind: Kind, grid: int, kernel: int) -> None:
    half = kernel // 2
    for query in range(grid**2):
        seen = set()
        for down in range(-half, half + 1):
            for right in range(-half, half + 1):
                row, column = query // grid + down, query % grid + right
                if kind == "conv torus":
                    row, column = row % grid, column % grid
                if 0 <= row < grid and 0 <= column < grid and row * grid + column <= query:
                    seen.add(row * grid + column)
        assert set(image_mask(kind, grid, kernel)[query].nonzero()[:, 0].tolist()) == seen
    whole = mask(kind, 3, grid, kernel)
    assert torch.equal(whole[3:, 3:], image_mask(kind, grid, kernel))
    assert bool(whole[3:, :3].all())
    assert torch.equal(whole[:3], torch.ones(3, 3 + grid**2).tril().bool())


@pytest.mark.parametrize("kind", BORDERS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (2, 3), (4, 3), (5, 11), (6, 3), (7, 5), (8, 11), (13, 11)])
def test_the_slots_that_are_seen_hold_the_keys_of_the_border_masks(kind: Kind, grid: int, kernel: int) -> None:
    pattern, allowed = slot_pattern(kind, grid, kernel, torch.device("cpu")), image_mask(kind, grid, kernel)
    held: dict[int, int] = {}
    for i in range(grid**2):
        held[int(pattern.slots[i])] = i
        seen = sorted(held[slot] for slot in range(pattern.n_slots) if pattern.bias[i, slot] == 0)
        assert seen == allowed[i].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("variant", CONFIGS)
def test_cached_logits_equal_uncached_ones_wherever_decoding_begins(variant: str) -> None:
    model = random_model(variant)
    text, tokens = streams(model.config, 2)
    uncached = model(text, tokens)[1]
    I = tokens.shape[1]  # noqa: E741  # as everywhere here
    for m in (0, 1, I // 3, I - 1, I):
        decoder = VariantDecoder(model, text, [1, 1], tokens[:, :m])
        if m < tokens.shape[1]:
            torch.testing.assert_close(decoded(decoder, tokens, first=m), uncached[:, m:], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=f"all {tokens.shape[1]} image tokens are decoded"):
            decoder.step(tokens[:, 0])


@pytest.mark.parametrize("variant", CONFIGS)
def test_of_64_candidates_each_has_the_logits_that_it_has_alone(variant: str) -> None:
    model = random_model(variant)
    text, _ = streams(model.config, 1)
    _, tokens = streams(model.config, 64)
    together = decoded(VariantDecoder(model, text, [64]), tokens)
    for k in (0, 17, 63):
        alone = decoded(VariantDecoder(model, text, [1]), tokens[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("n_before", [0, 6])
def test_candidates_kept_at_any_time_go_on_as_if_alone(variant: str, n_before: int) -> None:
    model = random_model(variant)
    text, _ = streams(model.config, 2)
    _, tokens = streams(model.config, 5)
    decoder = VariantDecoder(model, text, [3, 2])
    for i in range(n_before):
        decoder.step(tokens[:, i - 1])
    kept = torch.tensor([0, 2, 4])
    decoder.keep(kept)
    reference = model(text[[0, 0, 1]], tokens[kept])[1][:, n_before:]
    torch.testing.assert_close(decoded(decoder, tokens[kept], first=n_before), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", CONFIGS)
def test_samples_have_the_likelihood_of_one_pass_and_keep_their_prefix(variant: str) -> None:
    model = random_model(variant)
    text, tokens = streams(model.config, 2)
    prefix = tokens[:, :7]
    samples = sample(model, text, [3, 4, 5, 6], Sampling(guidance=1.5, top_k=9), prefix=prefix)
    assert torch.equal(samples.tokens[:, :, :7], prefix[:, None].expand(-1, 2, -1))
    log_p = model(text.repeat_interleave(2, dim=0), samples.tokens.flatten(0, 1))[1].log_softmax(-1)
    chosen = log_p.gather(-1, samples.tokens.flatten(0, 1)[..., None])[:, 7:, 0].sum(1)
    torch.testing.assert_close(samples.log_likelihoods.flatten(), chosen, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_bfloat16_decoder_is_close_to_the_bfloat16_model(variant: str) -> None:
    model = random_model(variant).bfloat16()
    text, tokens = streams(model.config, 4)
    cached, uncached = decoded(VariantDecoder(model, text, [1] * 4), tokens), model(text, tokens)[1]
    assert (cached - uncached).norm() < 0.03 * uncached.norm()


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGS)
def test_a_compiled_step_of_a_variant_computes_what_an_eager_one_does(variant: str) -> None:
    model = random_model(variant)
    text, _ = streams(model.config, 1)
    _, tokens = streams(model.config, 3)
    compiled = decoded(VariantDecoder(model, text, [3], compile=True), tokens)
    torch.testing.assert_close(compiled, decoded(VariantDecoder(model, text, [3]), tokens), rtol=1e-4, atol=1e-4)


def test_captions_become_the_text_ids_of_each_model() -> None:
    rudalle = replace(CONFIGS["ruDALLE v3"], text_len=6)
    assert rudalle.text_rows([[7, 8], [], [9] * 9]).tolist() == [
        [2, 7, 8, 3, 44, 45],
        [2, 3, 42, 43, 44, 45],
        [2, 9, 9, 9, 9, 9],
    ]
    assert (rudalle.n_text_ids, rudalle.max_caption) == (46, 5)
    mindalle = replace(CONFIGS["minDALL-E"], text_len=4)
    assert mindalle.text_rows([[7, 8], [9] * 9]).tolist() == [[7, 8, 1, 1], [9, 9, 9, 9]]
    assert mindalle.null_caption().tolist() == [1, 1, 1, 1]
    assert (mindalle.n_text_ids, mindalle.max_caption) == (40, 4)


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_saved_variant_is_loaded_by_its_kind(tmp_path: Path, variant: str) -> None:
    model = random_model(variant)
    model.save(tmp_path / "dalle", metadata={"source": "a"})
    loaded = load_transformer(tmp_path / "dalle")
    assert isinstance(loaded, VariantDALLE)
    assert (loaded.config, loaded.metadata) == (model.config, {"source": "a"})
    text, tokens = streams(model.config, 2)
    for mine, theirs in zip(loaded(text, tokens), model(text, tokens), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="holds a dalle-variant, not a dalle"):
        DALLE.load(tmp_path / "dalle")


def test_a_variants_config_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="unknown variant 'x': expected ruDALLE v3, ruDALLE v2, minDALL-E"):
        replace(CONFIGS["minDALL-E"], variant="x")
    with pytest.raises(ValueError, match=r"pad \(40\) must be a text id, 0 to 39"):
        replace(CONFIGS["minDALL-E"], pad=40)
    assert set(VARIANTS) == set(CONFIGS)


RUDALLE: dict[str, Any] = {"text_len": 128, "grid": 32, "text_vocab": 16_384, "image_vocab": 8_192}
PUBLISHED: dict[str, tuple[dict[str, Any], str, int]] = {
    "Malevich, Emojich": ({**RUDALLE, "n_layers": 24, "d_model": 2048, "n_heads": 16}, "ruDALLE v2", 1_310_410_880),
    "Malevich, Surrealist": ({**RUDALLE, "n_layers": 24, "d_model": 2048, "n_heads": 16}, "ruDALLE v3", 1_310_410_880),
    "Kandinsky": ({**RUDALLE, "n_layers": 64, "d_model": 3840, "n_heads": 60}, "ruDALLE v3", 11_519_306_624),
    "minDALL-E": (
        {"text_len": 64, "grid": 16, "text_vocab": 16_384, "image_vocab": 16_384}
        | {"n_layers": 42, "d_model": 1536, "n_heads": 24, "attention": "dense"},
        "minDALL-E",
        1_291_081_728,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_numbers_of_parameters(name: str) -> None:
    sizes, variant, count = PUBLISHED[name]
    with torch.device("meta"):
        model = VariantDALLE(VariantConfig(**sizes, variant=variant))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_torus_costs_the_whole_picture_in_the_last_layer_alone() -> None:
    config = {**RUDALLE, "n_layers": 24, "d_model": 2048, "n_heads": 16}
    paper, v3, v2 = (
        bytes_per_candidate(kind, torch.float32)
        for kind in (
            DALLEConfig(**config),
            VariantConfig(**config, variant="ruDALLE v3"),
            VariantConfig(**config, variant="ruDALLE v2"),
        )
    )
    assert paper == v3
    assert v2 - v3 == 2 * (1024 - 166) * 2048 * 4
