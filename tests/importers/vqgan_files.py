"""Tiny VQGANs of random weights in the formats in which VQGANs are published, and their forward pass, plainly."""

import re
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.vqgan import VQGAN, VQGANConfig

State = Mapping[str, Tensor]
TINY = VQGANConfig(
    width=32,
    multiples=(1, 2, 2),
    n_blocks=2,
    attention=(2,),
    z_channels=24,
    code_width=12,
    vocab_size=40,
    image_size=32,
)


def with_random_weights(model: nn.Module, seed: int = 0) -> Any:
    """The same module with weights and biases all of which matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = max(1, weight[0].numel())
            drawn = torch.randn(weight.shape, generator=generator) * (fan_in**-0.5 if weight.ndim > 1 else 0.2)
            weight.copy_(drawn.abs() + 0.5 if "norm" in name and name.endswith("weight") else drawn)
    return model.eval()


def random_vqgan(config: VQGANConfig = TINY, seed: int = 0) -> VQGAN:
    vqgan: VQGAN = with_random_weights(VQGAN(config), seed)
    return vqgan


def random_images(n: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(1)).float() / 255


def taming_state(vqgan: VQGAN) -> "OrderedDict[str, Tensor]":
    """The weights as taming-transformers names them (3ba01b2, taming/models/vqgan.py)."""
    codes = "quantize.embed.weight" if vqgan.config.quantiser == "gumbel" else "quantize.embedding.weight"
    return OrderedDict(
        (codes if name == "quantize.embedding.weight" else name, value) for name, value in vqgan.state_dict().items()
    )


def lightning(state: State, path: Path) -> Path:
    """Write a checkpoint as PyTorch Lightning did for f16-16384: with losses, optimizers, and a class as a key."""
    losses = {
        "loss.perceptual_loss.net.slice1.0.weight": torch.ones(3),
        "loss.discriminator.main.0.bias": torch.ones(2),
    }
    name = "pytorch_lightning.callbacks.model_checkpoint"
    parts = name.split(".")
    modules = {".".join(parts[: i + 1]): types.ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))}
    callback = type("ModelCheckpoint", (), {"__module__": name})
    vars(modules[name])["ModelCheckpoint"] = callback
    content = {
        "epoch": 12,
        "global_step": 3000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "lr_schedulers": [],
        "state_dict": OrderedDict({**state, **losses}),
    }
    with pytest.MonkeyPatch.context() as patch:
        for module_name, module in modules.items():
            patch.setitem(sys.modules, module_name, module)
        torch.save(content, path)
    return path


def flax(state: State, path: Path, *, old_norms: bool = False) -> Path:
    """Write what flax.serialization.to_bytes makes of vqgan-jax's weights (10ef240): kernels HWIO, lists as `up_0`."""
    nested: dict[str, Any] = {}
    for name, value in state.items():
        *parents, leaf = re.sub(r"\b(down|up|block|attn)\.(\d+)", r"\1_\2", name).split(".")
        is_norm = "norm" in parents[-1]
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
        if leaf == "weight":
            leaf = "scale" if is_norm else "embedding" if parents[-1] == "embedding" else "kernel"
        array = value.permute(2, 3, 1, 0) if leaf == "kernel" else value
        here[leaf] = (array[None, None, None] if is_norm and old_norms else array).contiguous().numpy()
    path.write_bytes(
        msgpack.packb(
            nested,
            default=lambda a: msgpack.ExtType(1, msgpack.packb((a.shape, a.dtype.name, a.tobytes()))),
            strict_types=True,
        )
    )
    return path


def detoker(state: State, path: Path) -> Path:
    """Write the half that min-dalle has (73621fb, min_dalle/models/vqgan_detokenizer.py)."""
    kept = {name: value for name, value in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    torch.save({"embedding.weight": state["quantize.embedding.weight"], **kept}, path)
    return path


@torch.no_grad()
def plain_encode(state: State, images: Tensor) -> Tensor:
    """Tokens of pictures in [-1, 1], from weights of taming's names, in the plainest way."""
    x, level = _conv(state, "encoder.conv_in", images), 0
    while f"encoder.down.{level}.block.0.conv1.weight" in state:
        x = _level(state, f"encoder.down.{level}", x)
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            weight, bias = (state[f"encoder.down.{level}.downsample.conv.{leaf}"] for leaf in ("weight", "bias"))
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
        level += 1
    z = _conv(
        state,
        "quant_conv",
        _conv(state, "encoder.conv_out", _normed(state, "encoder.norm_out", _mid(state, "encoder", x))),
    )
    if "quantize.proj.weight" in state:
        return _conv(state, "quantize.proj", z).argmax(dim=1)
    differences = z.permute(0, 2, 3, 1)[..., None, :] - state["quantize.embedding.weight"]
    return differences.square().sum(dim=-1).argmin(dim=-1)


@torch.no_grad()
def plain_decode(state: State, tokens: Tensor) -> Tensor:
    """Pixels of tokens in the range of the weights, not clipped."""
    codes = state["quantize.embed.weight" if "quantize.embed.weight" in state else "quantize.embedding.weight"]
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", codes[tokens].permute(0, 3, 1, 2)))
    x = _mid(state, "decoder", x)
    for level in reversed(range(16)):
        if f"decoder.up.{level}.block.0.conv1.weight" in state:
            x = _level(state, f"decoder.up.{level}", x)
            if level:
                x = _conv(state, f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return _conv(state, "decoder.conv_out", _normed(state, "decoder.norm_out", x))


def _conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.unflatten(1, (32, -1)).flatten(2)
    mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, correction=0, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).view_as(x)
    return normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _normed(state: State, name: str, x: Tensor) -> Tensor:
    normed = _norm(state, name, x)
    return normed * normed.sigmoid()


def _block(state: State, name: str, x: Tensor) -> Tensor:
    h = _conv(state, f"{name}.conv1", _normed(state, f"{name}.norm1", x))
    h = _conv(state, f"{name}.conv2", _normed(state, f"{name}.norm2", h))
    return h + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def _attention(state: State, name: str, x: Tensor) -> Tensor:
    h = _norm(state, f"{name}.norm", x)
    q, k, v = (_conv(state, f"{name}.{part}", h).flatten(2) for part in "qkv")
    weights = torch.einsum("bcq,bck->bqk", q, k).div(x.shape[1] ** 0.5).softmax(dim=2)
    return x + _conv(state, f"{name}.proj_out", torch.einsum("bqk,bck->bcq", weights, v).view_as(x))


def _level(state: State, name: str, x: Tensor) -> Tensor:
    for b in range(16):
        if f"{name}.block.{b}.conv1.weight" in state:
            x = _block(state, f"{name}.block.{b}", x)
        if f"{name}.attn.{b}.q.weight" in state:
            x = _attention(state, f"{name}.attn.{b}", x)
    return x


def _mid(state: State, half: str, x: Tensor) -> Tensor:
    x = _attention(state, f"{half}.mid.attn_1", _block(state, f"{half}.mid.block_1", x))
    return _block(state, f"{half}.mid.block_2", x)
