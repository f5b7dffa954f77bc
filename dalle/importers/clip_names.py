"""What the weights of a CLIP are called: by OpenAI and open_clip, by Hugging Face, and here."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rerank.config import CLIPConfig
from storage.checkpoints.tensors import Tensors, summary

Style = Literal["OpenAI", "Hugging Face"]

_BLOCK = (
    (r"\.norm1\.", ".ln_1."),
    (r"\.norm2\.", ".ln_2."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.mlp_in\.", ".mlp.c_fc."),
    (r"\.mlp_out\.", ".mlp.c_proj."),
)
_OPENAI = (
    (r"^vision\.patches\.", "visual.conv1."),
    (r"^vision\.position_embedding$", "visual.positional_embedding"),
    (r"^vision\.norm_(pre|post)\.", r"visual.ln_\1."),
    (r"^vision\.blocks\.", "visual.transformer.resblocks."),
    (r"^vision\.projection\.weight$", "visual.proj"),
    (r"^vision\.", "visual."),
    (r"^text\.blocks\.", "transformer.resblocks."),
    (r"^text\.position_embedding$", "positional_embedding"),
    (r"^text\.norm_final\.", "ln_final."),
    (r"^text\.projection\.weight$", "text_projection"),
    (r"^text\.", ""),
    *_BLOCK,
)
"""From our names to OpenAI's, one after the other."""
_RESNET = (
    (r"^vision\.stem\.", "visual."),
    (r"\.downsample\.conv\.", ".downsample.0."),
    (r"\.downsample\.bn\.", ".downsample.1."),
    (r"^vision\.pool\.position_embedding$", "visual.attnpool.positional_embedding"),
    (r"^vision\.pool\.query\.", "visual.attnpool.q_proj."),
    (r"^vision\.pool\.key\.", "visual.attnpool.k_proj."),
    (r"^vision\.pool\.value\.", "visual.attnpool.v_proj."),
    (r"^vision\.pool\.out\.", "visual.attnpool.c_proj."),
)
_HUGGING_FACE = (
    (r"^vision\.patches\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^text\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^(vision|text)\.position_embedding$", r"\1_model.embeddings.position_embedding.weight"),
    (r"^vision\.norm_pre\.", "vision_model.pre_layrnorm."),
    (r"^vision\.norm_post\.", "vision_model.post_layernorm."),
    (r"^text\.norm_final\.", "text_model.final_layer_norm."),
    (r"^vision\.projection\.", "visual_projection."),
    (r"^text\.projection\.", "text_projection."),
    (r"^(vision|text)\.blocks\.", r"\1_model.encoder.layers."),
    (r"\.norm(1|2)\.", r".layer_norm\1."),
    (r"\.attention\.qkv\.", ".self_attn.(q|k|v)_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.mlp_in\.", ".mlp.fc1."),
    (r"\.mlp_out\.", ".mlp.fc2."),
)
_LEFT_OUT = re.compile(
    r"(.*\.)?(num_batches_tracked|position_ids|attn_mask)|input_resolution|context_length|vocab_size"
)
"""Names that no weights have: counters, numbers of positions, a mask, and sizes."""

_TELL_TALES = (
    ("logit_bias", "a SigLIP"),
    ("text_decoder.", "a CoCa"),
    ("visual.trunk.", "a CLIP whose image tower is one of timm's"),
    ("text.transformer.embeddings.", "a CLIP whose text tower is one of Hugging Face's"),
    ("vision_model.", "one half of a CLIP, or another model of pictures and texts"),
    ("text_model.", "one half of a CLIP, or another model of pictures and texts"),
    ("model.diffusion_model.", "Stable Diffusion"),
    ("transformer.layers.0.attention.query_key_value.", "ruDALLE's transformer"),
    ("quantize.", "a VQGAN"),
    ("vae.", "a DALLE-pytorch"),
    ("decoder.embed_tokens.", "a DALL·E mini"),
    ("model.decoder.", "a DALL·E mini"),
    ("module.", "a model saved from a parallel one"),
)
"""What other files begin with."""


@dataclass(frozen=True)
class Source:
    """Where a weight of ours comes from."""

    names: Sequence[str]
    """In the file; several are put one below the other."""
    is_transposed: bool = False

    def read(self, tensors: Tensors) -> Tensor:
        """Return the weight, float32, in memory of its own."""
        parts = [tensors[name] for name in self.names]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        return weight.T.contiguous() if self.is_transposed else weight


def find_clip(tensors: Tensors) -> tuple[Tensors, Style]:
    """Return the part of a checkpoint that is a CLIP, and whose names it has.

    Raises:
        ValueError: there is none; the message says what the file is instead, if that can be told.
    """
    for prefix in ("", "state_dict.", "model.", "module.", "state_dict.module."):
        part = tensors.under(prefix)
        if "logit_scale" not in part or "logit_bias" in part:
            continue
        has_text = "token_embedding.weight" in part or "text.token_embedding.weight" in part
        if has_text and "visual.conv1.weight" in part:
            return part, "OpenAI"
        if {f"{tower}_model.embeddings.position_embedding.weight" for tower in ("vision", "text")} <= part.keys():
            return part, "Hugging Face"
    found = next((what for start, what in _TELL_TALES for name in tensors if name.startswith(start)), None)
    shown = f"it looks like {found}" if found else f"it holds {summary(list(tensors)[:100]) or 'no tensors'}"
    raise ValueError(
        f"{tensors.path} is no CLIP that is read here: {shown}; expected a CLIP of OpenAI, open_clip or Hugging Face "
        "with both towers"
    )


def sources(config: CLIPConfig, ours: Sequence[str], style: Style, *, has_text_prefix: bool) -> Iterator[Source]:
    """Return where each weight of a CLIP comes from.

    Args:
        config: of the CLIP.
        ours: names of its weights.
        style: whose names the file has.
        has_text_prefix: the names of the text tower begin with "text.", as open_clip writes some.
    """
    stages = [(stage, block) for stage, n_blocks in enumerate(config.resnet, start=1) for block in range(n_blocks)]
    for name in ours:
        found = name
        if name.startswith("vision.") and stages:
            found = re.sub(r"^vision\.blocks\.(\d+)", lambda m: "visual.layer{}.{}".format(*stages[int(m[1])]), found)
            found = _renamed(found, _RESNET)
        else:
            found = _renamed(found, _OPENAI if style == "OpenAI" else _HUGGING_FACE)
        if has_text_prefix and name.startswith("text."):
            found = f"text.{found}"
        names = [found.replace("(q|k|v)", part) for part in "qkv"] if "(q|k|v)" in found else [found]
        yield Source(names, is_transposed=style == "OpenAI" and name.endswith(".projection.weight"))


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def left_out(name: str) -> bool:
    """Return whether a name is of something that a CLIP's file may hold beside the weights."""
    return _LEFT_OUT.fullmatch(name) is not None
