"""What candidates cost: the memory that decides how many share a batch, and the work that progress is counted in."""

import math
from collections.abc import Callable, Iterator

import torch

from dalle.family.transformers import Transformer, candidate_bytes, caption_bytes, n_step_weights
from dalle.sampling import DRAWING_BYTES
from dvae.codec import Codec
from dvae.fast.model import pictures_at_once
from rerank import CLIP
from storage.errors import check_whole
from storage.models.stored import n_weights

CPU_MEMORY_BUDGET = 2 << 30
"""Bytes that a batch may take on a CPU, unless told; on a GPU it is half of what is free."""
MAX_PICTURES_AT_ONCE = 32
"""Pictures decoded and scored at the same time: with more, a CPU is slower, because they outgrow its caches, a GPU
hardly faster, and progress waits for them."""
MAX_TRIED_COUNTS = 1000
"""Numbers of batches that are tried for equal ones."""

OnProgress = Callable[[float, int], None]
"""Called with (candidates done, those under way counted in part; how many there will be)."""


def memory_budget(device: torch.device, memory: int | None) -> int:
    """Return the bytes that a batch may take: `memory`, or what suits the device."""
    if memory is not None:
        return memory
    if device.type != "cuda":
        return CPU_MEMORY_BUDGET
    # what torch holds for later use is free as well
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + held) // 2


def candidates_at_once(dalle: Transformer, budget: int, n: int, *, n_captions: int = 1, guided: bool = False) -> int:
    """Return how many candidates to sample at once: as many as fit, in batches of equal size.

    There is no other limit: a step reads the weights and the captions once for the whole batch, so the time per
    candidate falls as long as there is memory.

    Args:
        dalle: the transformer.
        budget: bytes for the batch, beside the weights.
        n: candidates of each caption.
        n_captions: captions that share batches.
        guided: whether each candidate is computed twice.
    """
    times = 2 if guided else 1
    each = times * (candidate_bytes(dalle) + DRAWING_BYTES * dalle.config.image_vocab)
    caption = times * caption_bytes(dalle)
    whole_captions = budget // (caption + n * each)
    if whole_captions > 0:
        return n * equal_batches(n_captions, whole_captions)
    return equal_batches(n, (budget - caption) // each)


def decoded_at_once(dvae: Codec, budget: int, n: int) -> int:
    """Return how many of n pictures to decode and score at once, in batches of equal size."""
    return equal_batches(n, min(MAX_PICTURES_AT_ONCE, pictures_at_once(dvae.config, budget)))


def equal_batches(n: int, max_size: int) -> int:
    """Return the size of the fewest batches of at most `max_size` of n; 1 if not even one is allowed.

    Prefer equal batches, up to 1.5 times as many: each new size is compiled again. If those do not divide n, the last
    batch is smaller.
    """
    fewest = math.ceil(n / max(1, max_size))
    most = min(fewest * 3 // 2, fewest + MAX_TRIED_COUNTS)
    equal = (n // count for count in range(fewest, most + 1) if n % count == 0)
    return next(equal, math.ceil(n / fewest))


def batches(n_captions: int, n: int, size: int) -> Iterator[tuple[range, range]]:
    """Split n candidates of each caption into (captions, candidates) of at most `size` products.

    All candidates of a caption are in one batch if they fit, so that it is read once.
    """
    n_rows = max(1, size // n)
    for row in range(0, n_captions, n_rows):
        for k in range(0, n, size):
            yield range(row, min(row + n_rows, n_captions)), range(k, min(k + size, n))


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError for a batch size below 1; None leaves the choice to the memory."""
    if batch_size is not None:
        check_whole("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def check_memory(memory: int | None) -> None:
    """Raise ValueError for less memory than a byte; None leaves the choice to the device."""
    if memory is not None:
        check_whole("memory", memory)
        if memory < 1:
            raise ValueError(f"memory is {memory} bytes; it must be above 0")


def sampling_share(dalle: Transformer, dvae: Codec, clip: CLIP) -> float:
    """Return sampling's share of a candidate's multiplications, in (0, 1); the rest is decoding and scoring.

    Progress counted so runs evenly even if decoding takes longer than sampling.
    """
    grid = dalle.config.grid
    sampling = grid**2 * n_step_weights(dalle)
    share: float = sampling / (sampling + dvae.decoding_products(grid) + scoring_products(clip))
    return share


def scoring_products(clip: CLIP) -> int:
    """Return the multiplications, about, of scoring a picture."""
    return (clip.config.n_patches + 1) * n_weights(clip.vision.blocks)


class BatchProgress:
    """Counts the candidates of a batch as done in part: first while it is sampled, then while it is judged.

    Args:
        progress: is told; None for nobody.
        before: candidates of earlier batches.
        n: those of this batch.
        total: those of all batches.
        sampling_share: part of the work that is done once a candidate is sampled.
    """

    def __init__(
        self, progress: OnProgress | None, *, before: int, n: int, total: int, sampling_share: float = 1.0
    ) -> None:
        self._progress = progress
        self._before, self._n, self._total = before, n, total
        self._sampling_share = sampling_share

    def sampled(self, step: int, n_steps: int) -> None:
        """Report that `step` of `n_steps` image positions are sampled."""
        self._tell(self._sampling_share * step / n_steps)

    def judged(self, n_judged: int, n: int) -> None:
        """Report that `n_judged` of the n remaining candidates are decoded and scored."""
        self._tell(1 - (1 - self._sampling_share) * (1 - n_judged / n))

    def _tell(self, share: float) -> None:
        if self._progress is not None:
            self._progress(self._before + self._n * share, self._total)
