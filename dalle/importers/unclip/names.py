"""What diffusers calls the weights of unCLIP's networks, beside our names of them.

Source: huggingface/diffusers at 58eb52c, its models and pipelines/deprecated/unclip.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storage.checkpoints.tensors import Tensors, summary
from unclip.unet import Layer, UNet


def _alone(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Source:
    """Where a weight of ours comes from."""

    names: tuple[str, ...]
    """In the files."""
    make: Callable[[Sequence[Tensor]], Tensor] = _alone
    """Makes it of those."""


Sources = dict[str, Source]


class Found(Mapping[str, Tensor]):
    """Weights by our names. Looking one up reads it and keeps nothing: look once.

    Args:
        files: by the part of the model, its tensors; names in sources begin with the part and a slash.
        sources: our names -> where they come from.
        given: weights that are in no file.

    Raises:
        ValueError: a weight is missing, or a file has one that is not known.
    """

    def __init__(self, files: Mapping[str, Tensors], sources: Sources, given: Mapping[str, Tensor]) -> None:
        self._files, self._sources, self._given = files, sources, given
        used = {name for source in sources.values() for name in source.names}
        for part, tensors in files.items():
            there = {f"{part}/{name}" for name in tensors}
            wanted = {name for name in used if name.startswith(f"{part}/")}
            if missing := sorted(wanted - there):
                raise ValueError(
                    f"{tensors.path} has no {missing[0].partition('/')[2]}, and {len(missing)} weights are missing in "
                    "all: it is cut, or its config.json is of another model"
                )
            if unknown := sorted(there - wanted):
                shown = summary([name.partition("/")[2] for name in unknown[:100]], depth=2)
                raise ValueError(f"{tensors.path} has {len(unknown)} weights that are not known here: {shown}")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._given:
            return self._given[name]
        source = self._sources[name]
        parts = [part.partition("/") for part in source.names]
        return source.make([self._files[part][inner] for part, _, inner in parts]).contiguous()

    def __iter__(self) -> Iterator[str]:
        yield from self._sources
        yield from self._given

    def __len__(self) -> int:
        return len(self._sources) + len(self._given)


def _below(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _plain(ours: str, theirs: str) -> Sources:
    """Return the sources of a layer's weight and bias."""
    return {f"{ours}.{kind}": Source((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}


def _stacked(ours: str, theirs: Sequence[str]) -> Sources:
    """Return the sources of a layer that is several of theirs, one below the other."""
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": Source(tuple(f"{name}.{kind}" for name in theirs), _below) for kind in kinds}


def _row(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].flatten()


def prior_sources(n_layers: int) -> Sources:
    """Return where the weights of a prior come from, but for those that stand in for a caption."""
    pairs = {
        "text_states": "encoder_hidden_states_proj",
        "text_features": "embedding_proj",
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "noised": "proj_in",
        "norm": "norm_out",
        "answer": "proj_to_clip_embeddings",
    }
    for i in range(n_layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        pairs |= {
            f"{ours}.out": f"{theirs}.attn1.to_out.0",
            f"{ours}.norm1": f"{theirs}.norm1",
            f"{ours}.norm2": f"{theirs}.norm3",
            f"{ours}.mlp_in": f"{theirs}.ff.net.0.proj",
            f"{ours}.mlp_out": f"{theirs}.ff.net.2",
        }
    sources: Sources = {}
    for ours, theirs in pairs.items():
        sources |= _plain(ours, f"prior/{theirs}")
    for i in range(n_layers):
        names = [f"prior/transformer_blocks.{i}.attn1.to_{kind}" for kind in "qkv"]
        sources |= _stacked(f"blocks.{i}.qkv", names)
    sources["positions"] = Source(("prior/positional_embedding",), lambda parts: parts[0][0])
    sources["last"] = Source(("prior/prd_embedding",), _row)
    sources["mean"] = Source(("prior/clip_mean",), _row)
    sources["deviation"] = Source(("prior/clip_std",), _row)
    return sources


def condition_sources(n_tokens: int) -> Sources:
    """Return where the weights of a decoder come from that are not its U-Net's, nor stand in for a caption."""
    sources: Sources = {}
    for ours, theirs in {
        "image_time": "clip_image_embeddings_project_to_time_embeddings",
        "text_time": "embedding_proj",
        "text_states": "encoder_hidden_states_proj",
        "text_norm": "text_encoder_hidden_states_norm",
    }.items():
        sources |= _plain(ours, f"text_proj/{theirs}")

    def by_token(parts: Sequence[Tensor]) -> Tensor:
        # theirs: all tokens' first channels, then all tokens' second ones; ours: token by token
        given = parts[0]
        return given.view(-1, n_tokens, *given.shape[1:]).transpose(0, 1).flatten(0, 1)

    for kind in ("weight", "bias"):
        sources[f"tokens.{kind}"] = Source((f"text_proj/clip_extra_context_tokens_proj.{kind}",), by_token)
    sources["null_image"] = Source(("text_proj/learned_classifier_free_guidance_embeddings",))
    return sources


def unet_sources(unet: UNet, part: str, ours: str = "unet") -> Sources:
    """Return where the weights of a U-Net come from.

    Args:
        unet: one of the same sizes, such as on the meta device.
        part: the part of the model that it is.
        ours: what our names begin with.
    """
    sources: Sources = {}
    for name, theirs in {
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }.items():
        sources |= _plain(f"{ours}.{name}", f"{part}/{theirs}")
    n_blocks, n_levels = unet.config.n_blocks, len(unet.config.multiples)
    for layers, their_levels, per_level, resampler in (
        (unet.down, "down_blocks", n_blocks, "downsamplers"),
        (unet.up, "up_blocks", n_blocks + 1, "upsamplers"),
    ):
        ours_levels = their_levels.partition("_")[0]
        for index, layer in enumerate(layers):
            level, place = divmod(index, per_level + 1)
            own = f"{ours}.{ours_levels}.{index}"
            theirs = f"{part}/{their_levels}.{level}"
            assert level < n_levels
            sources |= _layer(layer, own, theirs, place if place < per_level else None, resampler)
    for index, layer in enumerate(unet.middle):
        sources |= _layer(layer, f"{ours}.middle.{index}", f"{part}/mid_block", index, "")
    return sources


def _layer(layer: nn.Module, ours: str, theirs: str, place: int | None, resampler: str) -> Sources:
    """Return the sources of a residual block, and of attention after it; `place` is None for one that resamples."""
    assert isinstance(layer, Layer)
    block = f"{theirs}.{resampler}.0" if place is None else f"{theirs}.resnets.{place}"
    pairs = {"norm_in": "norm1", "conv_in": "conv1", "embedding": "time_emb_proj", "norm_out": "norm2"}
    pairs["conv_out"] = "conv2"
    if isinstance(layer.block.skip, nn.Conv2d):
        pairs["skip"] = "conv_shortcut"
    sources: Sources = {}
    for own, name in pairs.items():
        sources |= _plain(f"{ours}.block.{own}", f"{block}.{name}")
    if layer.attention is not None:
        attention = f"{theirs}.attentions.{place}"
        sources |= _plain(f"{ours}.attention.norm", f"{attention}.group_norm")
        sources |= _stacked(f"{ours}.attention.qkv", [f"{attention}.to_{kind}" for kind in "qkv"])
        sources |= _plain(f"{ours}.attention.out", f"{attention}.to_out.0")
        if layer.attention.context_kv is not None:
            sources |= _stacked(f"{ours}.attention.context_kv", [f"{attention}.add_{kind}_proj" for kind in "kv"])
    return sources
