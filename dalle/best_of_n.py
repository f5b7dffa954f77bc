"""The best K of N candidates of a caption: what is asked for, how candidates are ranked, and which are kept.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP).

Letters: N candidates  K kept ones  I image positions  J image positions of the top rows  E features of CLIP
         H, W pixels
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dalle.sampling import Ranking, Sampling, check_ranking
from rerank import CLIP
from rerank.score import embed_captions, embed_images
from storage.errors import check_whole, wrong_type
from storage.text import is_visible

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 10**9
"""Of one caption: years of sampling."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: the best `keep` of `n` candidates of a caption."""

    caption: str
    """Any text but an empty one."""
    n: int = 64
    """Candidates to sample."""
    keep: int = 8
    """How many of them to return."""
    early_abandon: bool = False
    """Drop half of every batch when half of the rows are sampled: those whose top halves fit the caption worse by CLIP,
    whatever the ranking. Not in the paper: the result is not the best of n whole pictures, and depends on the batch
    size."""

    def __post_init__(self) -> None:
        check_caption(self.caption)
        check_keep(self.keep, self.n)
        n_finished = (self.n + 1) // 2
        if self.early_abandon and self.keep > n_finished:
            raise ValueError(
                f"keep is {self.keep}, but early abandon finishes only {n_finished} of {self.n} candidates: "
                f"keep 1 to {n_finished}"
            )


def check_caption(caption: str) -> None:
    """Raise ValueError for a caption with nothing to see, or one that is no string or no Unicode text."""
    if not isinstance(caption, str):
        raise wrong_type("the caption", caption, "a string: one caption")
    if not is_visible(caption):
        raise ValueError("the caption is empty: say what the picture should show")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the caption {caption[:60]!r} is not Unicode text ({error.reason}): give it in UTF-8"
        ) from error


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError for no captions, or for one that `check_caption` refuses."""
    if isinstance(captions, str):
        raise wrong_type("captions", captions, "a list of captions")
    if not captions:
        raise ValueError("no captions: give at least one")
    for caption in captions:
        check_caption(caption)


def check_n(n: int) -> None:
    """Raise ValueError for a number of candidates that cannot be sampled."""
    check_whole("n", n)
    if not 1 <= n <= MAX_CANDIDATES:
        raise ValueError(f"n is {n}; at least 1 candidate must be sampled, and at most {MAX_CANDIDATES:,}")


def check_keep(keep: int, n: int) -> None:
    """Raise ValueError for a number n of candidates that cannot be sampled, or of which keep cannot be kept."""
    check_n(n)
    check_whole("keep", keep)
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep}, but {n} candidates are sampled: keep 1 to {n} of them, or sample more")


def n_given(prefix: Tensor | None) -> int:
    """Return how many image tokens a prefix gives to every candidate.

    Raises:
        ValueError: it is no tensor.
    """
    if prefix is not None and not (isinstance(prefix, Tensor) and prefix.ndim):
        raise wrong_type("prefix", prefix, "a tensor of image tokens, as Pipeline.prefix makes it of a picture")
    return 0 if prefix is None else prefix.shape[-1]


def check_top_is_open(prefix: Tensor | None, grid: int) -> None:
    """Raise ValueError if early abandon has nothing to judge: the top half of all pictures is given."""
    given = n_given(prefix)
    if given >= grid // 2 * grid:
        raise ValueError(
            f"early abandon judges candidates by the top {grid // 2} of their {grid} rows of tokens, but the first "
            f"{given} tokens are given to all of them: give fewer rows, or leave early abandon off"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Ranked:
    """The best K candidates of a caption, best first, however they were drawn; all tensors are on the CPU."""

    caption: str
    """As given."""
    images: Tensor
    """float32 (K, 3, H, W) in [0, 1]."""
    scores: Tensor
    """float32 (K,) in [-1, 1]: CLIP's cosine of caption and picture."""
    candidates: tuple[int, ...]
    """The numbers of the candidates: candidate k is a function of (seed, caption, k) and the settings."""
    rank: Ranking
    """What they are ranked by."""

    def __repr__(self) -> str:
        k, _, height, width = self.images.shape
        scores = ", ".join(f"{score:.3f}" for score in self.scores[:3].tolist())
        more = ", …" if k > 3 else ""
        caption = self.caption if len(self.caption) <= 60 else f"{self.caption[:59]}…"
        sizes = f"{k} of {width}×{height} pixels"
        return f"{type(self).__name__}(caption={caption!r}, {sizes}, scores {scores}{more}, rank={self.rank!r})"

    def described(self) -> list[dict[str, Any]]:
        """Return what is to be said of each picture."""
        numbers = zip(self.candidates, self.scores.tolist(), strict=True)
        return [
            {"rank": i, "ranked_by": self.rank, "score": score, "candidate": k}
            for i, (k, score) in enumerate(numbers, start=1)
        ]


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(Ranked):
    """The best K candidates of a caption, drawn as tokens."""

    log_likelihoods: Tensor
    """float32 (K,), nats: see `Samples`."""
    tokens: Tensor
    """int64 (K, I), raster order."""

    def described(self) -> list[dict[str, Any]]:
        """Return what is to be said of each picture."""
        both = zip(super().described(), self.log_likelihoods.tolist(), strict=True)
        return [{**said, "log_likelihood": log_likelihood} for said, log_likelihood in both]


def rank_order(scores: Tensor | None, log_likelihoods: Tensor | None, rank: Ranking) -> Tensor:
    """Return the numbers of N candidates, best first; of equal ones the earlier.

    By both, the order is that of the mean of two places: one among CLIP's scores, one among the likelihoods. Places
    have no unit, so neither number outweighs the other.

    Deviation: the paper ranks by CLIP alone (§2.6).

    Args:
        scores: float (N,), CLIP's, or (…, N) for many captions; may be None when ranked by likelihood.
        log_likelihoods: float (N,) or (…, N); may be None when ranked by CLIP.
        rank: what is best.

    Returns:
        int64 (N,) or (…, N).

    Raises:
        ValueError: an unknown ranking.
    """
    check_ranking(rank)
    if rank == "clip":
        assert scores is not None, "ranking by clip needs scores"
        return scores.argsort(descending=True, stable=True)
    assert log_likelihoods is not None, f"ranking by {rank} needs likelihoods"
    if rank == "likelihood":
        return log_likelihoods.argsort(descending=True, stable=True)
    assert scores is not None, "ranking by both needs scores"
    return (_places(scores) + _places(log_likelihoods)).argsort(stable=True)


def _places(values_N: Tensor) -> Tensor:
    """Return how many values are higher than each, int64 (…, N)."""
    return torch.searchsorted((-values_N).sort().values, (-values_N).contiguous())


class Candidates(NamedTuple):
    """Candidates of one caption, a row for each."""

    numbers: Tensor
    """int64 (N,)."""
    tokens: Tensor | None = None
    """int64 (N, I); None of pictures that are not drawn as tokens."""
    log_likelihoods: Tensor | None = None
    """float32 (N,); None as well."""
    scores: Tensor | None = None
    """float32 (N,); None before the pictures are scored."""
    images: Tensor | None = None
    """float32 (N, 3, H, W); None if they are not held."""

    def take(self, rows: Tensor) -> Self:
        """Copy some of them to the CPU, in the order of int64 `rows`."""
        return self._with_each(lambda x: x[rows.to(x.device)].cpu())

    def split(self, size: int) -> Iterator[Self]:
        """Yield them, `size` at a time: views."""
        for first in range(0, len(self.numbers), size):
            yield self._with_each(itemgetter(slice(first, first + size)))

    def followed_by(self, others: Self) -> Self:
        """Return these and then others, with the same fields known."""
        following = iter(x for x in others if x is not None)
        return self._with_each(lambda x: torch.cat([x, next(following)]))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a change to every field that is not None."""
        return self._replace(**{name: change(x) for name, x in self._asdict().items() if x is not None})


class Best:
    """The candidates seen so far that can still be among the best.

    Ranked by CLIP or by likelihood, only the best K so far are held; their pictures too, if ranked by CLIP. Ranked by
    both, a place depends on all others, so all candidates are held, without pictures.

    Args:
        keep: K, how many are the best, at least 1.
        rank: what is best.
    """

    def __init__(self, keep: int, rank: Ranking) -> None:
        self.rank: Ranking = rank
        self._keep = keep
        self._held: Candidates | None = None

    def add(self, candidates: Candidates) -> None:
        """Consider candidates that come after those seen; they need scores unless ranked by likelihood."""
        if self.rank != "clip":
            candidates = candidates._replace(images=None)
        # Earlier candidates come first, and ranking keeps the order of equal ones. What is not among the best of its
        # own batch is not even copied.
        own = candidates.take(self._contenders(candidates))
        joined = own if self._held is None else self._held.followed_by(own)
        self._held = joined.take(self._contenders(joined))

    def kept(self) -> Candidates:
        """Return the best K, best first; on the CPU."""
        assert self._held is not None, "no candidates were added"
        return self._held.take(rank_order(self._held.scores, self._held.log_likelihoods, self.rank)[: self._keep])

    def _contenders(self, candidates: Candidates) -> Tensor:
        if self.rank == "both":
            return torch.arange(len(candidates.numbers))
        return rank_order(candidates.scores, candidates.log_likelihoods, self.rank)[: self._keep]


class BetterHalf:
    """Chooses the half of a batch that early abandon continues with, and remembers it.

    Args:
        score: scores (N,) of unfinished candidates, from their tokens so far (N, J).
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


class Judge:
    """Decodes candidates of one caption and scores their pictures by CLIP, a few at a time.

    Args:
        caption: what the pictures should show.
        clip: scores them.
        decode: turns image tokens (N, I), or the first (N, J) in whole rows, into pictures (N, 3, H, W).
        at_once: returns how many of n pictures to decode at the same time.
    """

    def __init__(
        self, caption: str, clip: CLIP, decode: Callable[[Tensor], Tensor], at_once: Callable[[int], int]
    ) -> None:
        self._caption, self._clip, self.decode, self._at_once = caption, clip, decode, at_once
        self._caption_E = embed_captions(clip, [caption])[0]

    def judge(self, best: Best, candidates: Candidates, on_judged: Callable[[int, int], None] | None = None) -> None:
        """Offer candidates to `best`, decoded and scored unless it ranks by likelihood.

        Args:
            best: keeps the best of them.
            candidates: N of them, on any device.
            on_judged: called with (candidates done, N).
        """
        n = len(candidates.numbers)
        if best.rank == "likelihood":
            best.add(candidates)
            if on_judged is not None:
                on_judged(n, n)
            return
        n_judged = 0
        for some in candidates.split(self._at_once(n)):
            # nothing here may hold the pictures while the next ones are decoded
            best.add(self._seen(some))
            n_judged += len(some.numbers)
            if on_judged is not None:
                on_judged(n_judged, n)

    def result(self, best: Best) -> Result:
        """Return the best; their pictures are decoded and scored now if they were not held."""
        kept = best.kept()
        if kept.images is None:
            unseen = kept._replace(scores=None)
            parts = [self._seen(some) for some in unseen.split(self._at_once(len(kept.numbers)))]
            kept = functools.reduce(Candidates.followed_by, parts)
        assert kept.scores is not None
        assert kept.images is not None
        assert kept.tokens is not None
        assert kept.log_likelihoods is not None
        return Result(
            caption=self._caption,
            images=kept.images.cpu(),
            scores=kept.scores.cpu(),
            log_likelihoods=kept.log_likelihoods,
            tokens=kept.tokens,
            candidates=tuple(kept.numbers.tolist()),
            rank=best.rank,
        )

    def score_tops(self, tokens_NJ: Tensor) -> Tensor:
        """Return the scores (N,) of pictures of which only the top rows are known.

        CLIP was trained on whole square pictures, so the rest is filled with the top's mean colour. Of the fillings
        that need nothing but the top, its scores predicted best which pictures of the demonstration become good; a
        crop hides more of the top, and grey or white is something to see.
        """
        scores = []
        for some_NJ in torch.split(tokens_NJ, self._at_once(len(tokens_NJ))):
            top = self.decode(some_NJ)
            ground = top.mean((2, 3), keepdim=True).expand(-1, -1, top.shape[3] - top.shape[2], top.shape[3])
            scores.append(self._scores(torch.cat([top, ground], dim=2)))
        return torch.cat(scores)

    def _seen(self, candidates: Candidates) -> Candidates:
        """Return candidates with pictures and scores."""
        assert candidates.tokens is not None
        images = self.decode(candidates.tokens)
        return candidates._replace(images=images, scores=self._scores(images))

    def _scores(self, images: Tensor) -> Tensor:
        return embed_images(self._clip, images) @ self._caption_E


class Warnings:
    """Warns of settings and of their results, of each once.

    Args:
        knows_null_caption: whether the transformer met empty captions in training.
    """

    def __init__(self, knows_null_caption: bool) -> None:
        self._knows_null_caption = knows_null_caption
        self._told: set[str] = set()

    def about_guidance(self, sampling: Sampling) -> None:
        """Warn of guidance that compares with what the transformer never saw."""
        if sampling.is_guided and not self._knows_null_caption:
            self._once(
                f"guidance is {sampling.guidance:g}, but this transformer never saw an empty caption in training, "
                "which guidance compares with: expect worse pictures; train with a null_caption_probability above 0"
            )

    def about_caption(self, caption: str) -> None:
        """Warn of no caption where the transformer never saw that."""
        if not caption and not self._knows_null_caption:
            self._once(
                "there is no caption, but this transformer never saw an empty one in training: expect worse pictures; "
                "give a caption that says what the picture shows"
            )

    def about_equal_ones(self, result: Result, sampling: Sampling) -> None:
        """Warn of pictures that are all equal."""
        n = len(result.tokens)
        if n > 1 and bool((result.tokens == result.tokens[0]).all()):
            self._once(f"all {n} pictures are equal: sample one, or at a temperature above {sampling.temperature:g}")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)
