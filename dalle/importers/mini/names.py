"""What DALL·E mini's weights are called: by min-dalle, by the published flax files, and here.

Sources: kuprel/min-dalle at 73621fb, min_dalle/models/; borisdayma/dalle-mini at f0be4de,
src/dalle_mini/model/modeling.py; kuprel/min-dalle-flax at 2967237, which converts one to the other.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_BLOCK = (
    # ours, min-dalle's, flax's
    (r"attention_norm\.", "pre_self_attn_layer_norm.", "LayerNorm_0."),
    (r"attention\.qkv\.", "self_attn.(q|k|v)_proj.", "FlaxBartAttention_0.(q|k|v)_proj."),
    (r"attention\.out\.", "self_attn.out_proj.", "FlaxBartAttention_0.out_proj."),
    (r"attention_out_norm\.", "self_attn_layer_norm.", "LayerNorm_1."),
    (r"cross_norm\.", "pre_encoder_attn_layer_norm.", "LayerNorm_2."),
    (r"cross\.query\.", "encoder_attn.q_proj.", "FlaxBartAttention_1.q_proj."),
    (r"cross\.key_value\.", "encoder_attn.(k|v)_proj.", "FlaxBartAttention_1.(k|v)_proj."),
    (r"cross\.out\.", "encoder_attn.out_proj.", "FlaxBartAttention_1.out_proj."),
    (r"cross_out_norm\.", "encoder_attn_layer_norm.", "LayerNorm_3."),
    (r"glu\.norm\.", "glu.ln0.", "GLU_0.LayerNorm_0."),
    (r"glu\.wide\.", "glu.fc(0|1).", "GLU_0.Dense_(0|1)."),
    (r"glu\.middle_norm\.", "glu.ln1.", "GLU_0.LayerNorm_1."),
    (r"glu\.out\.", "glu.fc2.", "GLU_0.Dense_2."),
)
_OUTSIDE = (
    (r"embedding\.", "embed_tokens."),
    (r"position_embedding\.", "embed_positions."),
    (r"embedding_norm\.", "layernorm_embedding."),
    (r"final_norm\.", "final_ln."),
    (r"head\.", "lm_head."),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file, or a layer of it, belongs in the model."""

    weight: str
    """Name of our weight."""
    part: int = 0
    """Which of the `parts` that are put one below the other."""
    parts: int = 1
    layer: int | None = None
    """Which layer of a tensor that holds them all; None for all of the tensor."""
    is_transposed: bool = False

    def fill(self, weight: Tensor, tensor: Tensor) -> None:
        """Copy what belongs here into our weight; ValueError if its shape is another."""
        value = tensor if self.layer is None else tensor[self.layer]
        value = value.T if self.is_transposed else value
        rows = weight.chunk(self.parts)[self.part]
        if value.shape != rows.shape:
            raise ValueError(f"{self.weight} has the shape {tuple(value.shape)} instead of {tuple(rows.shape)}")
        rows.copy_(value)


def min_dalle_places(ours: list[str]) -> Iterator[tuple[str, Place]]:
    """Return the tensors of encoder.pt and decoder.pt, named "encoder." and "decoder." in front, and their places."""
    for name in ours:
        tower, rest = name.split(".", 1)
        block = re.match(r"blocks\.(\d+)\.", rest)
        theirs = _renamed(rest[block.end() :], 1) if block else _renamed_outside(rest)
        where = f"{tower}.layers.{block[1]}." if block else f"{tower}."
        for part, parts, found in _alternatives(theirs):
            yield where + found, Place(name, part, parts)


def flax_places(ours: list[str], *, is_stacked: bool) -> Iterator[tuple[str, Place]]:
    """Return the tensors of flax_model.msgpack and their places; with stacked layers a tensor has many."""
    for name in ours:
        tower, rest = name.split(".", 1)
        kind = f"FlaxBart{tower.capitalize()}Layer"
        block = re.match(r"blocks\.(\d+)\.", rest)
        theirs = _renamed(rest[block.end() :], 2) if block else _renamed_outside(rest)
        is_norm, is_embedding = "ln" in theirs or "LayerNorm" in theirs or "layernorm" in theirs, "embed_" in theirs
        is_matrix = not is_norm and not is_embedding
        end = "embedding" if is_embedding else "kernel" if is_matrix else "scale"
        theirs = theirs.removesuffix("weight") + end if theirs.endswith(".weight") else theirs
        layer = int(block[1]) if block else None
        if theirs.startswith("lm_head"):
            where = ""
        elif block is None:
            where = f"model.{tower}."
        else:
            where = f"model.{tower}.layers." + (f"{kind}s." if is_stacked else f"{kind}_{layer}.")
        for part, parts, found in _alternatives(theirs):
            yield where + found, Place(name, part, parts, layer if is_stacked else None, is_transposed=is_matrix)


def _renamed(name: str, style: int) -> str:
    for rule in _BLOCK:
        if re.match(rule[0], name):
            return re.sub(f"^{rule[0]}", rule[style], name)
    raise AssertionError(f"{name} has no name elsewhere")


def _renamed_outside(name: str) -> str:
    for ours, theirs in _OUTSIDE:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    raise AssertionError(f"{name} has no name elsewhere")


def _alternatives(name: str) -> list[tuple[int, int, str]]:
    """Return (part, parts, name) of each tensor that a name with (a|b) in it stands for."""
    found = re.search(r"\((.*?)\)", name)
    if found is None:
        return [(0, 1, name)]
    parts = found[1].split("|")
    return [(number, len(parts), name.replace(found[0], part)) for number, part in enumerate(parts)]
