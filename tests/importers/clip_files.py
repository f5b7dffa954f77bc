"""Tiny CLIPs of random weights in the formats in which CLIPs are published, made by hand."""

import gzip
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from rerank import CLIP, CLIPConfig, CLIPTokenizer

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("i", "n"), ("in", "g</w>"), ("1", "2</w>")]
TINY = CLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    vision_heads=2,
    context_length=16,
    vocab_size=514 + len(MERGES),
    text_width=64,
    text_layers=2,
    text_heads=1,
    embed_dim=24,
    resize="shortest",
)
OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": TINY.vocab_size, "width": 64, "heads": 1, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"},
}


def vocabulary(folder: Path) -> Path:
    """OpenAI's list of merges: a line with its version, then a merge a line, more than are used."""
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), "z z", "z q", ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def random_clip(config: CLIPConfig = TINY) -> CLIP:
    """A CLIP in which every weight and every bias matters."""
    generator = torch.Generator().manual_seed(0)
    clip = CLIP(config, CLIPTokenizer.openai(MERGES)).eval()
    with torch.no_grad():
        for name, weight in [*clip.named_parameters(), *clip.named_buffers()]:
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if "norm" in name or ".bn" in name:
                weight.abs_().add_(0.5)
    return clip


def openai_state(clip: CLIP) -> "OrderedDict[str, Tensor]":
    """The weights under OpenAI's names (openai/CLIP at d05afc4, clip/model.py), a vision transformer's."""
    renamed = {
        "vision.patches.weight": "visual.conv1.weight",
        "vision.class_embedding": "visual.class_embedding",
        "vision.position_embedding": "visual.positional_embedding",
        "vision.projection.weight": "visual.proj",
        "text.token_embedding.weight": "token_embedding.weight",
        "text.position_embedding": "positional_embedding",
        "text.projection.weight": "text_projection",
        "logit_scale": "logit_scale",
    }
    parts = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attention.qkv.": "attn.in_proj_",
        "attention.out.": "attn.out_proj.",
        "mlp_in.": "mlp.c_fc.",
        "mlp_out.": "mlp.c_proj.",
    }
    state = OrderedDict()
    for name, value in clip.state_dict().items():
        if found := re.fullmatch(r"(vision|text)\.blocks\.(\d+)\.(.*?)(weight|bias)", name):
            tower = {"vision": "visual.transformer", "text": "transformer"}[found[1]]
            name_there = f"{tower}.resblocks.{found[2]}.{parts[found[3]]}{found[4]}"
        elif found := re.fullmatch(r"vision\.norm_(pre|post)\.(weight|bias)", name):
            name_there = f"visual.ln_{found[1]}.{found[2]}"
        elif found := re.fullmatch(r"text\.norm_final\.(weight|bias)", name):
            name_there = f"ln_final.{found[1]}"
        else:
            name_there = renamed[name]
        state[name_there] = value.T if name.endswith("projection.weight") else value
    return state


class _Anything(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + sum(parameter.float().sum() for parameter in self.parameters())


def script(state: "OrderedDict[str, Tensor]", path: Path) -> Path:
    """Write a TorchScript archive of a module with these weights and the numbers that OpenAI's have."""
    root = _Anything()
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 521}
    for name, value in {**state, **{name: torch.tensor(size) for name, size in sizes.items()}}.items():
        *parents, leaf = name.split(".")
        here: nn.Module = root
        for parent in parents:
            if parent not in here._modules:
                here.add_module(parent, _Anything())
            here = here.get_submodule(parent)
        if value.is_floating_point():
            here.register_parameter(leaf, nn.Parameter(value))
        else:
            here.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(root, torch.ones(1)).save(str(path))
    return path
