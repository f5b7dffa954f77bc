"""Sizes of the buffers in which DeepSpeed 0.19.8 holds parameters and gradients whole.

Its defaults are those of a model of many billions: it allocates a whole bucket of gradients, at stage 3 for good, and
there keeps a billion parameters gathered, so that a rank would hold all of a smaller model.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

MAX_BUCKET = 500_000_000
"""Gradients that are reduced at a time, DeepSpeed's default."""
MAX_LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered, DeepSpeed's default."""
MAX_FETCHED = 50_000_000
"""Parameters that stage 3 gathers ahead, DeepSpeed's default."""
SHARE = 16
"""Stage 3 keeps 1/16 of the model gathered, at least its largest tensor."""


def bucket(zero_stage: int, total: int, largest: int) -> int:
    """Return the gradients that are reduced at a time.

    Args:
        zero_stage: of the run.
        total: parameters of the model.
        largest: parameters of its largest tensor.
    """
    return min(MAX_BUCKET, total if zero_stage < 3 else max(total // SHARE, largest))


def live(total: int, largest: int) -> int:
    """Return the parameters that stage 3 keeps gathered for their next use."""
    return min(MAX_LIVE, max(total // SHARE, largest))


def fetched(total: int, largest: int) -> int:
    """Return the parameters that stage 3 gathers ahead."""
    return min(MAX_FETCHED, live(total, largest))


def buffer_sizes(zero_stage: int, shapes: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Return the options of `zero_optimization` that go with a model whose parameters have these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    total, largest = sum(sizes), max(sizes)
    options = {"reduce_bucket_size": bucket(zero_stage, total, largest)}
    if zero_stage == 3:
        options |= {
            "stage3_max_live_parameters": live(total, largest),
            "stage3_max_reuse_distance": live(total, largest),
            "stage3_prefetch_bucket_size": fetched(total, largest),
        }
    return options
