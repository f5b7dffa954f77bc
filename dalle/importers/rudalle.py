"""ruDALLE (Malevich, Emojich, Surrealist XL, Kandinsky) into a transformer of ours (ai-forever/ru-dalle at 0255cec)."""

import re
from pathlib import Path
from typing import Literal

import torch

from dalle.attention import Kind, mask
from dalle.family.variants.config import VariantConfig
from dalle.importers.licence import stated_licence
from dalle.importers.variants import ImportedVariant, Source, n_layers, renamed, streamed
from dalle.sampling import SamplingDefaults
from storage.checkpoints.tensors import Tensors, open_tensors, sha256, summary

Version = Literal["v2", "v3"]
SAMPLING = SamplingDefaults(top_k=2048, top_p=0.995)
"""As its README samples."""
LICENCE = "not stated in this file: Apache-2.0 is the code of ru-dalle; see the page that it is from"

_HEADS = {2048: 16, 3840: 60, 768: 12}
"""Attention heads by width, which weights do not show: of Malevich and its like, Kandinsky, and the package's dummy."""
_CONV: dict[Version, Kind] = {"v2": "conv torus", "v3": "conv cut"}
_NAMES = (
    (r"^text_embedding\.", "text_embeddings."),
    (r"^text_position_embedding\.", "text_pos_embeddings."),
    (r"^image_embedding\.", "image_embeddings."),
    (r"^place_embeddings\.0\.", "image_row_embeddings."),
    (r"^place_embeddings\.1\.", "image_col_embeddings."),
    (r"^final_norm\.0\.", "transformer.final_layernorm."),
    (r"^final_norm\.1\.", "to_logits.0."),
    (r"^(text|image)_head\.", "to_logits.1."),
    (r"^blocks\.", "transformer.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.attention\.qkv\.", ".attention.query_key_value."),
    (r"\.attention\.out\.", ".attention.dense."),
    (r"\.attention_end\.", ".before_first_addition_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.mlp\.0\.", ".mlp.dense_h_to_4h."),
    (r"\.mlp\.2\.", ".mlp.dense_4h_to_h."),
    (r"\.mlp_end\.", ".before_second_addition_layernorm."),
)
"""From our names to theirs, one after the other."""
_LEFT_OUT = r"transformer\.(row|col|conv)_mask"
_WHAT = "a ruDALLE, such as Malevich's pytorch_model_v3.bin"


def published_name(name: str) -> str:
    """Return what ruDALLE calls the weight of ours of this name; both heads are the rows of one weight."""
    return renamed(name, _NAMES)


def import_rudalle(weights: Path, *, version: Version | None = None, heads: int | None = None) -> ImportedVariant:
    """Open the weights of a ruDALLE.

    Args:
        weights: pytorch_model.bin.
        version: only for weights without masks, which alone show it.
        heads: attention heads; None for the published number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, damaged, names code, or is computed in another way.
    """
    tensors = open_tensors(weights)
    try:
        n_positions, d_model = tensors.shape("text_pos_embeddings.weight")
        grid, _ = tensors.shape("image_row_embeddings.weight")
        n_text_ids, _ = tensors.shape("text_embeddings.weight")
        image_vocab, _ = tensors.shape("image_embeddings.weight")
    except (KeyError, ValueError):
        raise ValueError(
            f"{weights} is no ruDALLE: it holds {summary(list(tensors)[:100]) or 'no tensors'}; expected {_WHAT}"
        ) from None
    if heads is None and d_model not in _HEADS:
        raise ValueError(f"{weights} is {d_model} wide, as no published ruDALLE is: say how many heads it has, --heads")
    depth = n_layers(tensors, "transformer.layers.")
    if depth % 4 == 2:
        raise ValueError(f"{weights} has {depth} layers, the last of which would attend to columns: not read here")
    text_len = n_positions - 1
    try:
        config = VariantConfig(
            n_layers=depth,
            d_model=d_model,
            n_heads=_HEADS[d_model] if heads is None else heads,
            text_len=text_len,
            grid=grid,
            text_vocab=n_text_ids - text_len,
            image_vocab=image_vocab,
            variant=f"ruDALLE {_version(tensors, text_len, grid, version)}",
        )
    except ValueError as error:
        raise ValueError(f"{weights} has impossible sizes: {error}; expected {_WHAT}") from error
    rows = {"text_head": slice(None, n_text_ids), "image_head": slice(n_text_ids, None)}

    def source(name: str) -> Source:
        return Source([published_name(name)], rows.get(name.split(".")[0]))

    return ImportedVariant(
        model=streamed(config, tensors, source, what=_WHAT, left_out=_LEFT_OUT),
        files={weights: sha256(weights)},
        format=tensors.format,
        assumed=f"{'as published' if heads is None else 'as given'}, GELU by tanh",
        left=[name for name in tensors if re.fullmatch(_LEFT_OUT, name)],
        licence=stated_licence(weights) or LICENCE,
        sampling=SAMPLING,
    )


def _version(tensors: Tensors, text_len: int, grid: int, said: Version | None) -> Version:
    """Return the version whose masks the checkpoint has; nothing else shows it.

    Raises:
        ValueError: it has other masks; or none, and the version is not given.
    """
    names = ("row_mask", "col_mask", "conv_mask")
    stored = {name: tensors[f"transformer.{name}"] != 0 for name in names if f"transformer.{name}" in tensors}
    kinds: dict[str, list[Kind]] = {"row_mask": ["row"], "col_mask": ["column"], "conv_mask": list(_CONV.values())}
    for name, stored_SS in stored.items():
        if not any(torch.equal(stored_SS, mask(kind, text_len, grid)) for kind in kinds[name]):
            raise ValueError(f"{tensors.path} has another {name} than the published v2 and v3: not read here")
    fitting = list(_CONV)
    if "conv_mask" in stored:
        fitting = [key for key, conv in _CONV.items() if torch.equal(stored["conv_mask"], mask(conv, text_len, grid))]
    if said not in (None, *fitting):
        raise ValueError(f"{tensors.path} has the conv_mask of {fitting[0]}, but the version was given as {said}")
    found = fitting[0] if len(fitting) == 1 else said
    if found is None:
        raise ValueError(
            f"{tensors.path} does not show whether it is of v2 or v3, which its conv_mask would: say --version v3 "
            "(Malevich's pytorch_model_v3.bin, Surrealist XL, Kandinsky) or v2 (pytorch_model_v2.bin, Emojich)"
        )
    return found
