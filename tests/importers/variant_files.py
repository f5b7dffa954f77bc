"""Tiny ruDALLEs and minDALL-Es of random weights, and files in the formats in which they are published."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.attention import mask
from dalle.family.variants.config import VariantConfig
from dalle.family.variants.model import VariantDALLE

RUDALLE = VariantConfig(n_layers=4, d_model=32, n_heads=2, text_len=12, grid=8, text_vocab=40, image_vocab=30)
"""Its layers attend to row, column, row and conv."""
CONFIGS = {
    "ruDALLE v3": RUDALLE,
    "ruDALLE v2": replace(RUDALLE, variant="ruDALLE v2"),
    "minDALL-E": replace(
        RUDALLE, variant="minDALL-E", attention="dense", grid=4, n_layers=2, d_model=128, pad=1, text_len=16
    ),
}
LAYERS = {
    "input_layernorm": "attention_norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "before_first_addition_layernorm": "attention_end",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.0",
    "mlp.dense_4h_to_h": "mlp.2",
    "before_second_addition_layernorm": "mlp_end",
}
"""ruDALLE's names of the parts of a layer, and ours."""


def with_random_weights(model: nn.Module) -> nn.Module:
    """The same module with weights, biases and scales all of which matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 and "mb" not in name else 0.3
            drawn = torch.randn(weight.shape, generator=generator) * scale
            weight.copy_(drawn.abs() + 0.5 if weight.ndim == 1 and name.endswith("weight") else drawn)
    return model.eval().requires_grad_(False)


def random_model(variant: str, **changed: Any) -> VariantDALLE:
    """A tiny model, the same at each call."""
    model = with_random_weights(VariantDALLE(replace(CONFIGS[variant], **changed)))
    assert isinstance(model, VariantDALLE)
    return model


def streams(config: VariantConfig, n: int) -> tuple[Tensor, Tensor]:
    """Random text ids, with pads, and image tokens, int64 (n, T) and (n, I)."""
    generator = torch.Generator().manual_seed(1)
    captions = [torch.randint(4, config.text_vocab, (5 + i % 9,), generator=generator).tolist() for i in range(n)]
    tokens = torch.randint(0, config.image_vocab, (n, config.stream.n_image), generator=generator)
    return config.text_rows(captions), tokens


def rudalle_state(model: VariantDALLE) -> "OrderedDict[str, Tensor]":
    """The state dict of ruDALLE's package for the weights of a model."""
    ours, config = model.state_dict(), model.config
    state = OrderedDict(
        {
            "text_embeddings.weight": ours["text_embedding.weight"],
            "image_embeddings.weight": ours["image_embedding.weight"],
            "text_pos_embeddings.weight": ours["text_position_embedding.weight"],
            "image_row_embeddings.weight": ours["place_embeddings.0.weight"],
            "image_col_embeddings.weight": ours["place_embeddings.1.weight"],
        }
    )
    for end in ("weight", "bias"):
        state[f"to_logits.0.{end}"] = ours[f"final_norm.1.{end}"]
        state[f"to_logits.1.{end}"] = torch.cat([ours[f"text_head.{end}"], ours[f"image_head.{end}"]])
        state[f"transformer.final_layernorm.{end}"] = ours[f"final_norm.0.{end}"]
        for layer in range(config.n_layers):
            for theirs, mine in LAYERS.items():
                state[f"transformer.layers.{layer}.{theirs}.{end}"] = ours[f"blocks.{layer}.{mine}.{end}"]
    for name, kind in (("row", "row"), ("col", "column"), ("conv", config.kinds[-1])):
        state[f"transformer.{name}_mask"] = mask(kind, config.text_len, config.grid)  # type: ignore[arg-type]
    return state


def mindalle_state(model: VariantDALLE) -> "OrderedDict[str, Tensor]":
    """The state dict of minDALL-E's stage 2 for the weights of a model."""
    ours = model.state_dict()
    state = OrderedDict(
        {
            "tok_emb_img.weight": ours["image_embedding.weight"],
            "tok_emb_txt.weight": ours["text_embedding.weight"],
            "pos_emb_img.weight": ours["place_embeddings.0.weight"],
            "pos_emb_txt.weight": ours["text_position_embedding.weight"],
            "head_img.weight": ours["image_head.weight"],
            "head_txt.weight": ours["text_head.weight"],
        }
    )
    parts = {
        "ln1": "attention_norm",
        "ln2": "mlp_norm",
        "attn.proj": "attention.out",
        "mlp.0": "mlp.0",
        "mlp.2": "mlp.2",
    }
    for end in ("weight", "bias"):
        state[f"ln_f.{end}"] = ours[f"final_norm.0.{end}"]
        for layer in range(model.config.n_layers):
            for theirs, mine in parts.items():
                state[f"blocks.{layer}.{theirs}.{end}"] = ours[f"blocks.{layer}.{mine}.{end}"]
            for name, part in zip(
                ("query", "key", "value"), ours[f"blocks.{layer}.attention.qkv.{end}"].chunk(3), strict=True
            ):
                state[f"blocks.{layer}.attn.{name}.{end}"] = part.clone()
    return state


def saved(state: object, file: Path) -> Path:
    """A file of torch.save."""
    torch.save(state, file)
    return file
