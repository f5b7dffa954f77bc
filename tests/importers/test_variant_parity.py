"""Imported ruDALLEs beside the package that wrote them, and minDALL-E beside a plain forward pass of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from references import reference
from torch import Tensor
from torch.nn import functional as F
from variant_files import RUDALLE, mindalle_state, random_model, saved, streams, with_random_weights

from dalle.family.transformers import decoding
from dalle.family.variants.model import VariantDALLE
from dalle.importers.rudalle import Version, import_rudalle


def package_model(version: Version) -> Any:
    """ruDALLE's own model of the tiny sizes."""
    module = reference("rudalle.dalle.model")
    config = RUDALLE
    model = module.DalleModel(
        device="cpu",
        num_layers=config.n_layers,
        vocab_size=config.n_text_ids,
        hidden_size=config.d_model,
        num_attention_heads=config.n_heads,
        embedding_dropout_prob=0.1,
        attention_dropout_prob=0.1,
        output_dropout_prob=0.1,
        text_seq_length=config.text_len,
        image_tokens_per_dim=config.grid,
        image_vocab_size=config.image_vocab,
        cogview_sandwich_layernorm=True,
        cogview_pb_relax=True,
        hf_version=version,
    )
    return with_random_weights(model)


def imported(file: Path) -> VariantDALLE:
    """The transformer in a file of ruDALLE's, saved and loaded."""
    import_rudalle(file, heads=RUDALLE.n_heads).model.save(file.with_suffix(""))
    return VariantDALLE.load(file.with_suffix(""))


def ids_of(text: Tensor) -> Tensor:
    """What ruDALLE's package takes: 0 for pads."""
    return torch.where(text >= RUDALLE.text_vocab, 0, text)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalle_computes_the_same_in_one_pass(tmp_path: Path, version: Version, half: bool) -> None:
    theirs = package_model(version)
    if half:
        theirs = theirs.half().float()
    state = {
        name: value.half() if half and value.is_floating_point() else value
        for name, value in theirs.state_dict().items()
    }
    ours = imported(saved(state, tmp_path / "pytorch_model.bin"))
    assert ours.config.variant == f"ruDALLE {version}"
    text, tokens = streams(RUDALLE, 3)
    length, T = RUDALLE.stream.length, RUDALLE.text_len
    mask = torch.ones(3, 1, length, length).tril()
    logits, _ = theirs(torch.cat([ids_of(text), tokens], dim=1), mask)
    text_logits, image_logits = ours(text, tokens)
    n_text = RUDALLE.n_text_ids
    first = T if version == "v2" else T - 1
    torch.testing.assert_close(text_logits, logits[:, :T, :n_text], atol=1e-5, rtol=0)
    expected = logits[:, first : first + tokens.shape[1], n_text:]
    torch.testing.assert_close(image_logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalle_decodes_the_same_with_its_cache_and_ours(tmp_path: Path, version: Version) -> None:
    theirs = package_model(version)
    ours = imported(saved(theirs.state_dict(), tmp_path / "pytorch_model.bin"))
    text, tokens = streams(RUDALLE, 2)
    length, n_text = RUDALLE.stream.length, RUDALLE.n_text_ids
    mask = torch.ones(2, 1, length, length).tril()
    out, cache = ids_of(text), None
    decoder = decoding(ours, text, [1, 1])
    for i in range(tokens.shape[1]):
        logits, cache = theirs(out, mask, use_cache=True, cache=cache)
        mine = decoder.step(tokens[:, i - 1])
        torch.testing.assert_close(mine, logits[:, -1, n_text:], atol=1e-5, rtol=0)
        out = torch.cat([out, tokens[:, i : i + 1]], dim=1)


def plain_mindalle(state: dict[str, Tensor], n_heads: int, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Text and image logits as kakaobrain/minDALL-E computes them (e548007, dalle/models/stage2)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    T, I = text.shape[1], tokens.shape[1]  # noqa: E741  # as everywhere here
    x = torch.cat(
        [
            state["tok_emb_txt.weight"][text] + state["pos_emb_txt.weight"][:T],
            state["tok_emb_img.weight"][tokens] + state["pos_emb_img.weight"][:I],
        ],
        dim=1,
    )
    layers = len([name for name in state if name.endswith(".ln1.weight")])
    hidden = torch.ones(T + I, T + I).triu(1).bool()
    for block in (f"blocks.{layer}" for layer in range(layers)):
        normal = norm(f"{block}.ln1", x)
        q, k, v = (
            linear(f"{block}.attn.{part}", normal).view(*x.shape[:2], n_heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + linear(f"{block}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.2", F.gelu(linear(f"{block}.mlp.0", norm(f"{block}.ln2", x))))
    x = norm("ln_f", x)
    return linear("head_txt", x[:, : T - 1]), linear("head_img", x[:, T - 1 : -1])


def test_mindalle_computes_the_same_as_a_plain_pass() -> None:
    model = random_model("minDALL-E")
    text, tokens = streams(model.config, 3)
    text_logits, image_logits = plain_mindalle(mindalle_state(model), model.config.n_heads, text, tokens)
    ours = model(text, tokens)
    torch.testing.assert_close(ours[0][:, :-1], text_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], image_logits, atol=1e-5, rtol=0)
