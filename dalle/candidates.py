"""Candidates of a caption: what each of them depends on, how they are ranked, and which of them are kept.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP).

Letters: N candidates  K kept ones  I image positions  H, W pixels
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

Progress = Callable[[float, int], None]
"""Called with (candidates done, those under way counted in part; how many there will be)."""

Ranking = Literal["clip", "likelihood", "both"]
"""By CLIP's cosine of caption and picture, by the transformer's log p(tokens | caption), or by the mean of the places
that a candidate has in these two."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a candidate depends on besides its number, the caption, the models and what is given of its picture."""

    seed: int = 0
    """Same seed, same candidates, however many are sampled."""
    temperature: float = 1.0
    """Logits are divided by it; below 1 is less varied, and 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only; None, or as many as there are, for all."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability only; None or 1 for all."""
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


def check_ranking(rank: str) -> None:
    """Raise ValueError unless there is such a ranking."""
    if rank not in get_args(Ranking):
        raise ValueError(f"unknown ranking {rank!r}: give {' or '.join(get_args(Ranking))}")


def check_top_k(top_k: int | None, vocab: int) -> None:
    """Raise ValueError if top_k is above the number of image tokens to choose from."""
    if top_k is not None and top_k > vocab:
        raise ValueError(f"top_k ({top_k}) must be at most the image vocabulary, {vocab}; give {vocab} for all tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How candidates are sampled and ranked unless told otherwise; unless given, as in the paper.

    A recipe has them, a bundle keeps them in the metadata of its transformer.
    """

    temperature: float = 1.0
    """See `Sampling`, also for the next three."""
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    rank: Ranking = "clip"
    """What is best."""

    def __post_init__(self) -> None:
        self.sampling()  # checks the ranges
        check_ranking(self.rank)

    def sampling(self, seed: int = 0) -> Sampling:
        """Return the settings that a candidate of a run with this seed depends on."""
        return Sampling(
            seed=seed, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, guidance=self.guidance
        )

    def updated(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        rank: Ranking | None = None,
    ) -> Self:
        """Return these settings with those that are given, not None, in their place.

        Raises:
            ValueError: one is out of range.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        options["rank"] = rank
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Read what `dataclasses.asdict` made of some, as JSON keeps it; what is missing is as in the paper.

        Raises:
            ValueError: it is something else, or out of range.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise ValueError(f"expected an object with {', '.join(known)}, got {values!r}")
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}: expected {', '.join(known)}")
        kinds: dict[str, tuple[type, ...]] = {"top_k": (int, type(None)), "top_p": (int, float, type(None))}
        for name, value in values.items():
            expected = (str,) if name == "rank" else kinds.get(name, (int, float))
            if type(value) not in expected:
                wanted = {"rank": "a string", "top_k": "a whole number"}.get(name, "a number")
                raise ValueError(f"{name} is {value!r}, expected {wanted}")
        return cls(**values)

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-k {self.top_k}"] if self.top_k is not None else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        parts += [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        ranked_by = {"clip": "CLIP", "likelihood": "likelihood", "both": "CLIP and likelihood"}[self.rank]
        return f"{', '.join(parts)}, ranked by {ranked_by}"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The candidates of P captions, n of each."""

    tokens: Tensor
    """int64 (P, n, I), raster order."""
    log_likelihoods: Tensor
    """float32 (P, n), nats: log p(tokens | caption), the sum over the tokens that were sampled, under the transformer
    itself: at temperature 1, over all tokens, without guidance, whatever they were sampled with."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best K of the candidates of one caption, best first by the ranking that was asked for."""

    caption: str
    """As it was given."""
    images: Tensor
    """float32 (K, 3, H, W) in [0, 1], on the CPU."""
    scores: Tensor
    """float32 (K,) in [-1, 1]: cosine of caption and picture under CLIP; descending if they are ranked by it alone; on
    the CPU."""
    log_likelihoods: Tensor
    """float32 (K,), nats: see `Samples`; descending if they are ranked by it alone; on the CPU."""
    tokens: Tensor
    """int64 (K, I), raster order, on the CPU."""
    candidates: tuple[int, ...]
    """Which of the candidates these are: candidate k is a function of (seed, caption, k) and the settings."""
    rank: Ranking
    """What they are ranked by."""


def rank_order(scores: Tensor | None, log_likelihoods: Tensor, rank: Ranking) -> Tensor:
    """Return the numbers of N candidates, best first; of equal ones the earlier.

    By both, the order is that of the mean of two places: how many candidates CLIP puts before it, and how many are
    likelier. Places have no unit, so neither of the two numbers outweighs the other.

    Deviation: the paper ranks by CLIP alone (§2.6).

    Args:
        scores: float (N,), CLIP's; None will do for the ranking by likelihood.
        log_likelihoods: float (N,).
        rank: what is best.

    Returns:
        int64 (N,).

    Raises:
        ValueError: there is no such ranking.
    """
    check_ranking(rank)
    if rank == "likelihood":
        return log_likelihoods.argsort(descending=True, stable=True)
    assert scores is not None, f"ranking by {rank} needs scores"
    if rank == "clip":
        return scores.argsort(descending=True, stable=True)
    return (_places(scores) + _places(log_likelihoods)).argsort(stable=True)


def _places(values_N: Tensor) -> Tensor:
    """How many values are higher than each, int64 (N,)."""
    return torch.searchsorted((-values_N).sort().values, -values_N)


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


class Candidates(NamedTuple):
    """Candidates of one caption, a row for each."""

    numbers: Tensor
    """int64 (N,)."""
    tokens: Tensor
    """int64 (N, I)."""
    log_likelihoods: Tensor
    """float32 (N,)."""
    scores: Tensor | None = None
    """float32 (N,); None where nobody has looked at the pictures."""
    images: Tensor | None = None
    """float32 (N, 3, H, W); None where they are not held."""

    def take(self, rows: Tensor) -> "Candidates":
        """Return some of them, in the order of int64 `rows`: a copy, on the CPU."""
        return self._with_each(lambda x: x[rows.to(x.device)].cpu())

    def split(self, size: int) -> Iterator["Candidates"]:
        """Yield them, `size` at a time: views."""
        for first in range(0, len(self.numbers), size):
            yield self._with_each(itemgetter(slice(first, first + size)))

    def followed_by(self, others: "Candidates") -> "Candidates":
        """Return these and others, of which as much is known."""
        following = iter(x for x in others if x is not None)
        return self._with_each(lambda x: torch.cat([x, next(following)]))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Candidates":
        """Return what is known of them, changed: field by field, in their order."""
        numbers, tokens, log_likelihoods = map(change, (self.numbers, self.tokens, self.log_likelihoods))
        scores, images = (None if x is None else change(x) for x in (self.scores, self.images))
        return Candidates(numbers, tokens, log_likelihoods, scores, images)


class Best:
    """The candidates seen so far that can be among the best; nothing else is held.

    Ranked by CLIP or by likelihood, those are the best so far, and ranked by CLIP alone with their pictures, which had
    to be seen. By both, a place depends on all others: all are held, without pictures.

    Args:
        keep: how many are the best, at least 1.
        rank: what is best.
    """

    def __init__(self, keep: int, rank: Ranking) -> None:
        self.rank: Ranking = rank
        self._keep = keep
        self._held: Candidates | None = None

    def add(self, candidates: Candidates) -> None:
        """Consider more candidates, which come after those seen; with scores, unless ranked by likelihood."""
        if self.rank != "clip":
            candidates = candidates._replace(images=None)
        # Earlier candidates come first, and ranking keeps the order of equal ones. What is not among the best of its
        # own batch is not even copied.
        own = candidates.take(self._contenders(candidates))
        joined = own if self._held is None else self._held.followed_by(own)
        self._held = joined.take(self._contenders(joined))

    def kept(self) -> Candidates:
        """Return the best of what was added, best first; on the CPU."""
        assert self._held is not None, "no candidates were added"
        return self._held.take(rank_order(self._held.scores, self._held.log_likelihoods, self.rank)[: self._keep])

    def _contenders(self, candidates: Candidates) -> Tensor:
        if self.rank == "both":
            return torch.arange(len(candidates.numbers))
        return rank_order(candidates.scores, candidates.log_likelihoods, self.rank)[: self._keep]


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
