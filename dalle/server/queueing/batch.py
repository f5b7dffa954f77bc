"""Several works sampled as one batch: each gets the candidates, and the bytes, that it would get alone.

A step reads the weights once for the whole batch, so works with the same settings cost little more together than one of
them. Each is decoded and scored by itself, in the same groups as when it is alone.

Letters: W works  n candidates of one work  B all candidates  T text positions  J image tokens so far
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import Best, Candidates, Judge, Request, Result, check_keep
from dalle.budget import batches, memory_budget
from dalle.editing.edit import edit
from dalle.editing.redraw import Redrawn
from dalle.editing.regions import Region
from dalle.editing.variations import variations
from dalle.family.transformers import candidate_bytes, caption_bytes
from dalle.pipeline import Pipeline
from dalle.sampling import (
    DRAWING_BYTES,
    Ranking,
    Samples,
    Sampling,
    SamplingDefaults,
    candidate_seed,
    sample_each,
    undisturbed,
)
from dalle.unclip.parts import Kind
from dalle.unclip.settings import Drawing

MAX_TOGETHER = 512
"""Candidates of several works in one batch: with more, the first to come would wait long for the last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Varying:
    """A picture whose variations are drawn; equal to itself only."""

    image: Image.Image
    """As the model that draws sees it."""
    strength: float
    """Share of its tokens that is drawn anew, or, of DALL·E 2, of its noise."""


Source = Region | Varying
"""A picture of which something is drawn anew."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything that the pictures of one request depend on; equal works have equal pictures."""

    caption: str
    """Checked before; of variations it may be empty."""
    n: int
    """Candidates to sample."""
    keep: int
    """How many of them to return, best first."""
    sampling: Sampling
    rank: Ranking
    source: Source | None = None
    """None for whole new pictures."""
    drawing: Drawing | None = None
    """How DALL·E 2 draws them; None where DALL·E does."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.n)

    @property
    def by(self) -> Kind:
        """Which of the bundle's models draws."""
        return "dalle" if self.drawing is None else "unclip"

    def goes_with(self, other: "Work") -> bool:
        """Return whether both can share a batch: of whole new pictures, with all settings but the seed equal.

        The particles that draw a picture's parts anew are a population of their own, and DALL·E 2 draws one caption.
        """
        if any(work.source is not None or work.drawing is not None for work in (self, other)):
            return False
        return replace(self.sampling, seed=0) == replace(other.sampling, seed=0)


class Watch(Protocol):
    """What is told while works are under way; whatever it raises ends all of them at once."""

    def begun(self, work: Work, judge: Judge) -> None:
        """Take note of what decodes the candidates of a work."""

    def sampled(self, tokens: dict[Work, Tensor]) -> Collection[Work]:
        """Take note of the tokens so far, int64 (n, J) for each work; returns the works that nobody waits for."""
        ...

    def judged(self, work: Work) -> None:
        """Take note that a work goes on: some candidates of it were decoded and scored."""


def fits(pipe: Pipeline, works: Sequence[Work]) -> bool:
    """Return whether works, which go with one another, can share a batch: by memory and by `MAX_TOGETHER`."""
    if sum(work.n for work in works) > MAX_TOGETHER:
        return False
    guided = works[0].sampling.is_guided
    if any(pipe.default_batch_size(work.n, guided=guided) < work.n for work in works):
        return False
    each = candidate_bytes(pipe.dalle) + DRAWING_BYTES * pipe.dalle.config.image_vocab
    needed = sum(caption_bytes(pipe.dalle) + work.n * each for work in works)
    return (2 if guided else 1) * needed <= memory_budget(pipe.dalle.device, pipe.memory)


@undisturbed()
def draw(pipe: Pipeline, works: Sequence[Work], watch: Watch) -> dict[Work, Result]:
    """Sample works in one batch, or one work in as many as its memory asks for; then decode, score and choose.

    Args:
        pipe: the bundle.
        works: different ones that go with one another, and fit if there are several; one with a source is alone.
        watch: is told.

    Returns:
        The best of each work that somebody still waited for at the end.
    """
    if works[0].source is not None:
        return {works[0]: _redraw(pipe, works[0], works[0].source, watch)}
    text_WT = pipe.dalle.config.text_rows([pipe.tokenizer.encode(work.caption) for work in works])
    judges = {work: pipe.judge(work.caption) for work in works}
    bests = {work: Best(work.keep, work.rank) for work in works}
    for work, judge in judges.items():
        watch.begun(work, judge)
    n = works[0].n
    size = pipe.default_batch_size(n, guided=works[0].sampling.is_guided) if len(works) == 1 else n
    left = set(works)
    for _, ks in batches(1, n, size):
        numbers = {work: ks if len(works) == 1 else range(work.n) for work in works}
        for work, samples in _sample(pipe, text_WT, numbers, watch).items():
            if samples is None:
                left.discard(work)
                continue
            candidates = Candidates(torch.tensor(numbers[work]), samples.tokens[0], samples.log_likelihoods[0])
            judges[work].judge(bests[work], candidates, lambda *_, work=work: watch.judged(work))
        if not left:
            break
    return {work: judges[work].result(bests[work]) for work in works if work in left}


def _redraw(pipe: Pipeline, work: Work, source: Source, watch: Watch) -> Redrawn:
    """Draw something of a picture anew, by particles."""
    sampling = {name: value for name, value in asdict(work.sampling).items() if name != "seed"}
    settings = SamplingDefaults(rank=work.rank, **sampling)
    told: dict[str, Any] = {
        "progress": lambda *_: watch.judged(work),
        "on_tokens": lambda tokens_nJ: watch.sampled({work: tokens_nJ}),
    }
    caption, n, keep, seed = work.caption, work.n, work.keep, work.sampling.seed
    if isinstance(source, Region):
        watch.begun(work, pipe.judge(caption, source.paste))
        request = Request(caption=caption, n=n, keep=keep)
        return edit(pipe, source, request, settings, seed=seed, **told)
    watch.begun(work, pipe.judge(caption))
    options: dict[str, Any] = {"n": n, "keep": keep, "strength": source.strength, "seed": seed, **told}
    return variations(pipe, source.image, caption, settings, **options)


def _sample(pipe: Pipeline, text_WT: Tensor, numbers: dict[Work, range], watch: Watch) -> dict[Work, Samples | None]:
    """Sample the numbered candidates of each work as one batch; None for works that nobody waits for any more."""
    works = list(numbers)
    seeds = [[candidate_seed(work.sampling.seed, work.caption, k) for k in ks] for work, ks in numbers.items()]
    sizes = [len(some) for some in seeds]
    dropped: set[Work] = set()

    def on_step(tokens_BJ: Tensor) -> Tensor | None:
        rows = dict(zip(works, torch.split(tokens_BJ, sizes), strict=True))
        gone = set(watch.sampled({work: rows[work] for work in works if work not in dropped})) - dropped
        if not gone:
            return None
        dropped.update(gone)
        # of a work that nobody waits for, one candidate stays: a decoder wants one of each prompt
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        sizes[:] = [1 if work in gone else size for work, size in zip(works, sizes, strict=True)]
        return torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])

    found = sample_each(
        pipe.dalle,
        text_WT,
        seeds,
        works[0].sampling,
        on_step=on_step,
        compile=pipe.compile,
    )
    return {work: None if work in dropped else samples for work, samples in zip(works, found, strict=True)}


Draw = Callable[[Pipeline, Sequence[Work], Watch], dict[Work, Result]]
"""`draw`, or what stands for it in a test."""
