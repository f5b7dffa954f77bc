"""A transformer whose layers are spread over the ranks, so that it can be sampled from where no rank has room for it.

All ranks sample in step. Each layer is computed by the one rank that has it, and sent to all others: a few numbers for
each candidate and position. The first rank has the embeddings and the head, and the first layer, so that the tokens
that it draws are those of the model; what the others draw is not used.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.attention import Attend
from dalle.cache import bytes_per_caption, pattern_sizes
from dalle.model import DALLE, DALLEConfig
from dalle.sampling import DRAWING_BYTES
from training.engine.parts.averages import WeightsInParts
from training.ranks.ranks import agree

_LAYERS = "blocks."
FLOAT32 = 4
"""Bytes of a number."""


class _Layer(nn.Module):
    """A layer that one rank has and computes for all."""

    def __init__(self, layer: nn.Module | None, owner: int) -> None:
        super().__init__()
        self.layer = layer
        """None on the other ranks."""
        self._owner = owner

    def forward(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        """Return the residual stream after this layer, (B, S, D). Collective."""
        output: Tensor = torch.empty_like(h_BSD) if self.layer is None else self.layer(h_BSD, attend).contiguous()
        dist.broadcast(output, src=self._owner)
        return output


def owner_of(layer: int, n_layers: int, n_ranks: int) -> int:
    """Return the rank that has a layer: ranks own consecutive layers, in numbers that differ by at most one."""
    return layer * n_ranks // n_layers


def spread(config: DALLEConfig, weights: WeightsInParts, n_rows: int) -> DALLE:
    """Return a transformer to be sampled from by all ranks in step, on their devices. Collective.

    Args:
        config: of the transformer.
        weights: of all its layers.
        n_rows: candidates that are sampled at once, each of a caption of its own; twice as many with guidance.

    Raises:
        OutOfMemoryError: on all ranks, because the device of one has no room for its layers and what sampling takes.
    """
    ranks = weights.ranks
    with torch.device("meta"):
        model = DALLE(config)
    owners = [owner_of(layer, config.n_layers, ranks.size) for layer in range(config.n_layers)]
    layer_of = {name: int(name.split(".")[1]) if name.startswith(_LAYERS) else None for name in weights}
    owner_by_name = {name: 0 if layer is None else owners[layer] for name, layer in layer_of.items()}
    sizes = [shape.numel() for name, shape in weights.shapes.items() if owner_by_name[name] == ranks.rank]
    largest = max(shape.numel() for shape in weights.shapes.values())
    needed = FLOAT32 * (sum(sizes) + 3 * largest)
    needed += _sampling_bytes(config, [layer for layer, owner in enumerate(owners) if owner == ranks.rank], n_rows)
    if agree(_free_bytes(ranks.device) < needed, ranks):
        raise torch.OutOfMemoryError("a rank has no room for its share of the layers")
    for name, shape in weights.shapes.items():
        layer = layer_of[name]
        value = weights.on(owner_by_name[name], name)
        if value is None and layer is not None:
            continue
        if value is None:  # takes no memory, whatever its shape
            value = torch.zeros((), device=ranks.device).expand(shape)
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, nn.Parameter(value, requires_grad=False))
    layers = zip(model.blocks, owners, strict=True)
    model.blocks = nn.ModuleList(_Layer(block if owner == ranks.rank else None, owner) for block, owner in layers)
    return model.eval()


def _sampling_bytes(config: DALLEConfig, layers: Sequence[int], n_rows: int) -> int:
    """Return the memory that sampling takes on the rank with some of the layers, beside the weights."""
    sizes = [pattern_sizes(config.kinds[layer], config.grid, config.conv_kernel) for layer in layers]
    candidate = sum(2 * lanes * slots * config.d_model * FLOAT32 for lanes, slots in sizes)
    caption = bytes_per_caption(dataclasses.replace(config, n_layers=max(1, len(layers))), torch.float32)
    return n_rows * (candidate + caption + DRAWING_BYTES * config.image_vocab)


def _free_bytes(device: torch.device) -> float:
    """Return the bytes that a GPU has for new tensors; a host is not asked."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
