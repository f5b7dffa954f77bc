"""Cuts a tensor into the ranks' parts, and puts it together again.

It is laid flat and cut into equal parts, rank by rank; the last ones are shorter, or empty. DeepSpeed's stage 3 cuts
its parameters in the same way.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from training.ranks.ranks import Ranks


def size_of_part(numel: int, n_ranks: int) -> int:
    """Return the elements of every part but the last ones of a tensor."""
    return -(-numel // n_ranks)


def bounds(numel: int, ranks: Ranks) -> tuple[int, int]:
    """Return where this rank's part of a tensor begins, and where it ends."""
    size = size_of_part(numel, ranks.size)
    return min(ranks.rank * size, numel), min((ranks.rank + 1) * size, numel)


def part_of(whole: Tensor, ranks: Ranks) -> Tensor:
    """Return a copy of this rank's part of a tensor, flat."""
    begin, end = bounds(whole.numel(), ranks)
    return whole.detach().reshape(-1)[begin:end].clone()


def whole_of(part: Tensor, shape: Sequence[int], ranks: Ranks) -> Tensor:
    """Return the tensor that the ranks hold in parts, on their devices. Collective."""
    if ranks.size == 1:
        return part.to(ranks.device).view(shape)
    flat, own = _flat(part, shape, ranks)
    dist.all_gather_into_tensor(flat, own)
    return flat[: math.prod(shape)].view(shape)


def whole_on(rank: int, part: Tensor, shape: Sequence[int], ranks: Ranks) -> Tensor | None:
    """Return the tensor that the ranks hold in parts on one of them, and None on the others. Collective."""
    if ranks.size == 1:
        return part.to(ranks.device).view(shape)
    flat, own = _flat(part, shape, ranks)
    if ranks.rank != rank:
        dist.gather(own, dst=rank)
        return None
    dist.gather(own, list(flat.chunk(ranks.size)), dst=rank)
    return flat[: math.prod(shape)].view(shape)


def _flat(part: Tensor, shape: Sequence[int], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return memory for all parts, one after the other, and this rank's part with zeros up to their size."""
    size = size_of_part(math.prod(shape), ranks.size)
    own = torch.zeros(size, dtype=part.dtype, device=ranks.device)
    own[: len(part)] = part
    return torch.empty(size * ranks.size, dtype=part.dtype, device=ranks.device), own
