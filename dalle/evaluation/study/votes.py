"""Counting the votes of a study: majorities, their interval, how far voters agree, and who was too fast to look."""

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from dalle.evaluation.numbers.bootstrap import wilson
from dalle.output.text import aligned
from storage.text import parse_json, read_text

QUESTIONS = {"realistic": "more realistic", "match": "matches the caption better"}
COLUMNS = ("study", "voter", "row", "question", "side", "seconds")
FAST_S = 1.0
"""Voters whose median answer takes less are listed."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer."""

    voter: str
    row: int
    question: str
    system: str
    """"A" or "B"."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Count:
    """The answers to one question."""

    question: str
    first: int
    """Captions for which most voters chose A."""
    second: int
    """The same for B."""
    tied: int
    """Captions with as many votes for both; they are in no rate."""
    short: int
    """Captions with fewer votes than were asked for, those without any among them."""
    agreement: float | None
    """Part of all pairs of voters of a caption who chose the same; None without any."""

    @property
    def rate(self) -> float | None:
        """Part of the captions with a majority whose majority is for A; None without any."""
        decided = self.first + self.second
        return self.first / decided if decided else None


def read_votes(files: Sequence[Path], key: Path) -> tuple[list[Vote], int]:
    """Read files of votes, and resolve their sides by the study's key.

    Returns:
        The votes, and how many captions the study has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is of another study, or a line is no vote, or a voter has voted twice on the same.
    """
    known = parse_json(read_text(key))
    if not isinstance(known, dict) or not {"study", "left"} <= known.keys():
        raise ValueError(f"{key} is no key of a study: give the .key.json that was written beside its page")
    votes: list[Vote] = []
    seen: set[tuple[str, int, str]] = set()
    for file in files:
        for number, line in enumerate(csv.DictReader(io.StringIO(read_text(file))), start=2):
            vote = _vote(file, number, line, known)
            what = (vote.voter, vote.row, vote.question)
            if what in seen:
                raise ValueError(
                    f"{file}, line {number}: {vote.voter} has voted on row {vote.row} already, in this file or one "
                    "before it: give each file once, and have voters take different names"
                )
            seen.add(what)
            votes.append(vote)
    if not votes:
        raise ValueError(f"no votes in {', '.join(map(str, files))}")
    return votes, len(known["left"])


def _vote(file: Path, number: int, line: dict[str, Any], known: dict[str, Any]) -> Vote:
    if line.get("study") not in (known["study"], None):
        raise ValueError(f"{file}, line {number} is of another study ({line['study']}, expected {known['study']})")
    try:
        left = known["left"][str(int(line["row"]))]
        side, question = line["side"], line["question"]
        if side not in ("left", "right") or question not in QUESTIONS:
            raise ValueError(f"{question!r}, {side!r}")
        system = left if side == "left" else {"A": "B", "B": "A"}[left]
        seconds = float(line["seconds"])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{seconds} seconds")
        return Vote(voter=line["voter"], row=int(line["row"]), question=question, system=system, seconds=seconds)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file}, line {number} is no vote ({error}): expected {','.join(COLUMNS)}") from None


def count(votes: Sequence[Vote], n_asked: int, n_captions: int) -> list[Count]:
    """Return the counts of both questions; a caption is decided by the majority of its votes, however many it has.

    Args:
        votes: of all voters that count.
        n_asked: votes that each caption should have.
        n_captions: of the study.
    """
    counts = []
    for question in QUESTIONS:
        by_row: dict[int, list[str]] = defaultdict(list)
        for vote in votes:
            if vote.question == question:
                by_row[vote.row].append(vote.system)
        majorities = Counter(_majority(systems) for systems in by_row.values())
        pairs = [a == b for systems in by_row.values() for a, b in combinations(systems, 2)]
        counts.append(
            Count(
                question=question,
                first=majorities["A"],
                second=majorities["B"],
                tied=majorities[""],
                short=n_captions - sum(len(systems) >= n_asked for systems in by_row.values()),
                agreement=sum(pairs) / len(pairs) if pairs else None,
            )
        )
    return counts


def _majority(systems: Sequence[str]) -> str:
    first = systems.count("A")
    return "" if 2 * first == len(systems) else "A" if 2 * first > len(systems) else "B"


def seconds_of(votes: Sequence[Vote]) -> dict[str, float]:
    """Return the median seconds of each voter's answers, the fastest first."""
    by_voter: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        by_voter[vote.voter].append(vote.seconds)
    return dict(sorted(((voter, median(each)) for voter, each in by_voter.items()), key=lambda pair: pair[1]))


def table(counts: Sequence[Count], n_asked: int) -> str:
    """Return a line for each question."""
    heads = ["majority", "for A", "95%", "A", "B", "tied", f"under {n_asked} votes", "voters agree"]
    rows = [heads]
    for one in counts:
        rate = one.rate
        low, high = wilson(one.first, one.first + one.second) if rate is not None else (0.0, 0.0)
        share, interval = ("–", "–") if rate is None else (f"{rate:.1%}", f"{low:.1%} … {high:.1%}")
        agreement = "–" if one.agreement is None else f"{one.agreement:.1%}"
        numbers = [str(value) for value in (one.first, one.second, one.tied, one.short)]
        rows.append([QUESTIONS[one.question], share, interval, *numbers, agreement])
    return aligned(rows, "<>")
