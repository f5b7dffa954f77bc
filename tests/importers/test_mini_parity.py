"""Imported DALL·E minis beside min-dalle's own modules, with the same random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_files import IMAGE_VOCAB, N_IMAGE, N_TEXT, SIZES, dalle_mini, min_dalle, published_state, random_mini
from references import reference
from torch import Tensor, nn

from dalle.family.mini.cache import MiniDecoder
from dalle.family.mini.model import DALLEMini
from dalle.importers.mini.importing import import_dalle_mini, import_min_dalle
from dalle.sampler.draw import guide

N_POSITIONS = 256


def their_modules(model: DALLEMini) -> tuple[nn.Module, nn.Module]:
    """min-dalle's encoder and decoder with a model's weights; norms without a scale keep 1."""
    encoder_module = reference("min_dalle.models.dalle_bart_encoder")
    decoder_module = reference("min_dalle.models.dalle_bart_decoder")
    sizes = {"embed_count": SIZES["d_model"], "attention_head_count": SIZES["n_heads"], "device": "cpu"}
    sizes["glu_embed_count"] = SIZES["d_glu"]
    encoder = encoder_module.DalleBartEncoder(
        layer_count=SIZES["encoder_layers"], text_vocab_count=N_TEXT, text_token_count=SIZES["text_len"], **sizes
    )
    decoder = decoder_module.DalleBartDecoder(
        layer_count=SIZES["decoder_layers"], image_vocab_count=N_IMAGE - 1, **sizes
    )
    state = published_state(model)
    for tower, module in (("encoder", encoder), ("decoder", decoder)):
        own = {name.removeprefix(f"{tower}."): value for name, value in state.items() if name.startswith(tower)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        assert not unexpected
        assert all(name.endswith(("ln.weight", "norm.weight", "ln0.weight", "ln1.weight")) for name in missing)
    return encoder.eval(), decoder.eval()


@pytest.fixture(params=["min-dalle", "flax", "flax without scan"])
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> DALLEMini:
    model = random_mini()
    if request.param == "min-dalle":
        return import_min_dalle(min_dalle(tmp_path, model), image_vocab=IMAGE_VOCAB).model
    folder = dalle_mini(tmp_path, model, is_stacked=request.param == "flax", decoder_start_token_id=IMAGE_VOCAB)
    return import_dalle_mini(folder, image_vocab=IMAGE_VOCAB).model


def theirs(model: DALLEMini, text: Tensor, prev: Tensor, index: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """min-dalle's logits for rows of the empty caption and then of the caption: (2B, n, V)."""
    encoder, decoder = their_modules(model)
    with torch.no_grad():
        encoded: Any = encoder(text)
        half = len(prev)
        rows = [0] * half + [1] * half
        logits, state = decoder(
            attention_mask=text[rows].not_equal(1)[:, None, None, :],
            encoder_state=encoded[rows],
            attention_state=state,
            prev_tokens=prev,
            token_index=index,
        )
    return logits[..., :IMAGE_VOCAB], state


@torch.no_grad()
def test_full_passes_and_cached_decoding_agree_with_min_dalle(imported: DALLEMini) -> None:
    config = imported.config
    text = torch.stack([config.null_caption(), config.text_rows([[9, 8, 7, 200]])[0]])
    tokens = torch.randint(IMAGE_VOCAB, (2, N_POSITIONS), generator=torch.Generator().manual_seed(1))
    inputs = imported.inputs(tokens)
    index = torch.arange(N_POSITIONS)
    state = torch.zeros(SIZES["decoder_layers"], 8, N_POSITIONS, SIZES["d_model"])
    full, _ = theirs(imported, text, inputs, index, state)
    rows = text[[0, 0, 1, 1]]
    ours = imported(rows, tokens.repeat(2, 1))
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
    decoder = MiniDecoder(imported, text, [2, 2])
    for i in range(6):
        step, state = theirs(imported, text, inputs[:, [i]], index[[i]], state)
        own = decoder.step(inputs[:, i].repeat(2))
        torch.testing.assert_close(own, step[:, 0], atol=1e-5, rtol=0)
        # their guidance: (1 - s) · without + s · with
        without, given = step[:, 0].chunk(2)
        swapped = torch.cat([own[2:], own[:2]])
        torch.testing.assert_close(guide(swapped, 16.0), without * (1 - 16) + given * 16, atol=5e-4, rtol=0)


def test_their_modules_have_the_published_numbers_of_parameters() -> None:
    encoder_module = reference("min_dalle.models.dalle_bart_encoder")
    config = replace(random_mini().config, norm_scales=True)
    with torch.device("meta"):
        encoder = encoder_module.DalleBartEncoder(2, 128, 2, N_TEXT, 12, 72, "meta")
        model = DALLEMini(config)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in model.encoder.parameters())
