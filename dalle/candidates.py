"""Candidates of a caption: what each of them depends on, and which of them are kept.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP).

Letters: N candidates  K kept ones  I image positions  H, W pixels
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Progress = Callable[[float, int], None]
"""Called with (candidates done, those under way counted in part; how many there will be)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a candidate depends on besides its number, the caption, the models and what is given of its picture."""

    seed: int = 0
    """Same seed, same candidates, however many are sampled."""
    temperature: float = 1.0
    """Logits are divided by it; below 1 is less varied, and 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability only."""
    guidance: float = 1.0
    """How far to go from "no caption" towards the caption; 1 is plain sampling. It costs a second pass, and needs a
    model that saw empty captions in training."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature ({self.temperature}) must be at least 0 (0: the likeliest token) and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1; leave it out for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; leave it out for all tokens")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance ({self.guidance}) must be at least 0 (1: none) and finite")

    @property
    def is_guided(self) -> bool:
        """Whether every candidate is computed twice: with its caption and with none."""
        return self.guidance != 1


PAPER_SAMPLING = Sampling()
"""As the paper samples (§2.6, §3.3): temperature 1, all tokens."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best K of the candidates of one caption, best first."""

    caption: str
    """As it was given."""
    images: Tensor
    """float32 (K, 3, H, W) in [0, 1], on the CPU."""
    scores: Tensor
    """float32 (K,) in [-1, 1], descending: cosine of caption and picture under CLIP; on the CPU."""
    tokens: Tensor
    """int64 (K, I), raster order, on the CPU."""
    candidates: tuple[int, ...]
    """Which of the candidates these are: candidate k is a function of (seed, caption, k) and the settings."""


def check_request(captions: Sequence[str], *, n: int, keep: int, early_abandon: bool = False) -> None:
    """Raise ValueError unless there are captions, none of them empty, and as many candidates as are to be kept."""
    if not captions:
        raise ValueError("no captions: give at least one")
    if not all(caption.strip() for caption in captions):
        raise ValueError("the caption is empty: say what the picture should show")
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 candidate must be sampled")
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep}, but {n} candidates are sampled: keep 1 to {n} of them, or sample more")
    n_finished = (n + 1) // 2
    if early_abandon and keep > n_finished:
        raise ValueError(
            f"keep is {keep}, but early abandon finishes only {n_finished} of {n} candidates: keep 1 to {n_finished}"
        )


def batches(n_captions: int, n: int, size: int) -> Iterator[tuple[range, range]]:
    """Split n candidates of each caption into (captions, candidates) of at most `size` products.

    All candidates of a caption are in one batch if they fit, so that it is read once.
    """
    n_rows = max(1, size // n)
    for row in range(0, n_captions, n_rows):
        for k in range(0, n, size):
            yield range(row, min(row + n_rows, n_captions)), range(k, min(k + size, n))


def equal_batches(n: int, largest: int) -> int:
    """Return the size of the fewest batches of at most `largest` of n; 1 if not even one is allowed.

    For equal ones a step is compiled once, which is worth half as many batches again; where even those do not divide
    n, the last batch is smaller.
    """
    fewest = math.ceil(n / max(1, largest))
    equal = (n // count for count in range(fewest, fewest * 3 // 2 + 1) if n % count == 0)
    return next(equal, math.ceil(n / fewest))


class Best:
    """The best of the candidates seen so far, best first; of equal ones the earlier. Nothing else is held.

    Args:
        keep: how many, at least 1.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._candidates: list[int] = []
        self._scores_K = torch.empty(0)
        self._tokens_KI = torch.empty(0, dtype=torch.int64)
        self._images = torch.empty(0)

    def add(self, candidates: Sequence[int], tokens: Tensor, images: Tensor, scores: Tensor) -> None:
        """Consider more candidates, which come after those seen.

        Args:
            candidates: their N numbers.
            tokens: int64 (N, I).
            images: float32 (N, 3, H, W).
            scores: float32 (N,).
        """
        # Sorting is stable, and earlier candidates come first: equal scores keep their order. What is not among the
        # best of its own batch is not even copied.
        own_K = scores.argsort(descending=True, stable=True)[: self._keep]
        scores_K = torch.cat([self._scores_K, scores[own_K].cpu()])
        order_K = scores_K.argsort(descending=True, stable=True)[: self._keep]
        joined = [*self._candidates, *(candidates[i] for i in own_K.tolist())]
        self._candidates = [joined[i] for i in order_K.tolist()]
        self._scores_K = scores_K[order_K]
        self._tokens_KI = torch.cat([self._tokens_KI, tokens[own_K.to(tokens.device)].cpu()])[order_K]
        self._images = torch.cat([self._images, images[own_K].cpu()])[order_K]

    def result(self, caption: str) -> Result:
        """Return what is held, as the result for a caption."""
        return Result(
            caption=caption,
            images=self._images,
            scores=self._scores_K,
            tokens=self._tokens_KI,
            candidates=tuple(self._candidates),
        )


class BetterHalf:
    """Chooses the candidates of a batch that go on when half of their rows are sampled, and remembers which.

    Args:
        score: how well candidates fit their caption, (N,), by their tokens so far, (N, J).
    """

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self._score = score
        self.kept: list[int] = []
        """Places in the batch, ascending."""

    def __call__(self, tokens_NJ: Tensor) -> Tensor:
        """Return the places of the better half, int64 ascending; of an odd number the larger half."""
        better_K = self._score(tokens_NJ).argsort(descending=True, stable=True)[: (len(tokens_NJ) + 1) // 2]
        kept_K = better_K.sort().values
        self.kept = kept_K.tolist()
        return kept_K


class BatchProgress:
    """Tells how many candidates are done while a batch is under way: first it is sampled, then judged.

    Args:
        progress: is told; None for nobody.
        before: candidates of earlier batches.
        n: those of this batch.
        total: those of all batches.
        sampling_share: how much of the work on a candidate is done once it is sampled.
    """

    def __init__(
        self, progress: Progress | None, *, before: int, n: int, total: int, sampling_share: float = 1.0
    ) -> None:
        self._progress = progress
        self._before, self._n, self._total = before, n, total
        self._sampling_share = sampling_share

    def sampled(self, step: int, n_steps: int) -> None:
        """Some steps of sampling are done."""
        self._tell(self._sampling_share * step / n_steps)

    def judged(self, n_judged: int, n: int) -> None:
        """Some of the candidates are decoded and scored."""
        self._tell(1 - (1 - self._sampling_share) * (1 - n_judged / n))

    def _tell(self, share: float) -> None:
        if self._progress is not None:
            self._progress(self._before + self._n * share, self._total)
