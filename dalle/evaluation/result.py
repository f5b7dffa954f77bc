"""What an evaluation of best of N found: as lines for people, and as JSON from which every number can be told again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dalle.evaluation.distances import Distances
from dalle.evaluation.features.names import distance_name
from dalle.evaluation.features.nets import FeatureNet
from dalle.evaluation.nested.curves import GIVEN, ORACLE, Point, Recalled
from dalle.output.text import aligned, counted

NAMES = {"clip": "CLIP", "likelihood": "likelihood", "both": "both", ORACLE: "any of N (oracle)", GIVEN: "as given"}
"""Of rankings."""
STAR = (
    "The same CLIP picks and judges: its cosines rise with N by selection alone, and show nothing of the pictures. "
    "Name another one with --judge."
)
METRICS = {
    "right": "right by the checker",
    "judge": "cosine by the judge",
    "clip": "cosine by the CLIP that ranks",
}
"""Fields of a `Point`, in the order in which they are shown; evaluation.json holds the words for the report."""


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Of the same captions: all of them, or those that no list leaves out."""

    captions: int
    curve: list[Point] = field(default_factory=list)
    recalled: list[Recalled] = field(default_factory=list)
    distances: dict[int, Distances] = field(default_factory=dict)
    """By N, at radius 0; of the kept ranking's picks."""
    blurred: dict[float, Distances] = field(default_factory=dict)
    """By radius, of the best of M."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """An evaluation of best of N."""

    protocol: dict[str, Any]
    """All that the numbers depend on."""
    lines: list[str]
    """The same for people."""
    rank: str
    """Whose picks have distances and retrieval."""
    has_judge: bool
    net: FeatureNet | None
    """Of the distances; None without."""
    found: BestOfN
    without: BestOfN | None = None
    """The same without the samples of a list."""
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "protocol": self.protocol,
            "ranked_by": self.rank,
            "same_clip_picks_and_judges": not self.has_judge,
            "titles": METRICS,
            "star": "" if self.has_judge else STAR,
            **self._numbers(self.found),
            "without_overlap": None if self.without is None else self._numbers(self.without),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        }

    def _numbers(self, found: BestOfN) -> dict[str, Any]:
        numbers = asdict(found)
        numbers["blurred"] = {f"{radius:g}": each for radius, each in numbers["blurred"].items()}
        for of_sets in (numbers["distances"], numbers["blurred"]):
            for each in of_sets.values():
                assert self.net is not None
                each["name"] = distance_name(self.net, each["n"])
                del each["notes"]
        return {**numbers, "notes": list(_notes(found))}

    def text(self) -> str:
        """Return the protocol and the tables."""
        parts = [*self.lines, *self._parts(self.found)]
        notes = _notes(self.found)
        if self.without is not None:
            parts += [self._left(self.found, self.without), *self._parts(self.without)]
            notes |= _notes(self.without)
        parts += [f"note: {note}" for note in notes]
        if not self.has_judge:
            parts.append(f"* {STAR}")
        return "\n".join(parts)

    def _left(self, found: BestOfN, without: BestOfN) -> str:
        line = f"without the samples of --without: {without.captions:,} of {counted(found.captions, 'caption')}"
        if not found.distances or not without.distances:
            return line
        n_reference, n_left = (next(iter(each.distances.values())).n_reference for each in (found, without))
        if n_left == n_reference:
            return f"{line}; all {n_reference:,} reference pictures, of which the lists name none"
        return f"{line}; {n_left:,} of {n_reference:,} reference pictures"

    def _parts(self, found: BestOfN) -> list[str]:
        parts = [curve_table(found.curve, starred=not self.has_judge)] if found.curve else []
        if found.recalled:
            parts.append(recalled_table(found.recalled, self.rank, starred=not self.has_judge))
        if self.net is not None and not found.distances:
            parts.append(f"{counted(found.captions, 'caption')}: no distances, which need at least 2")
        of_picks = {f"best of {n}": each for n, each in found.distances.items()}
        blurred = {f"blur radius {radius:g}": each for radius, each in found.blurred.items()}
        for rows in (of_picks, blurred):
            if rows and self.net is not None:
                parts.append(distance_table(rows, self.net))
        return parts


def _notes(found: BestOfN) -> dict[str, None]:
    """Return what must be said of the distances, each once."""
    every = (*found.distances.values(), *found.blurred.values())
    return dict.fromkeys(note for each in every for note in each.notes)


def curve_table(points: Sequence[Point], *, starred: bool = False) -> str:
    """Return a block for each metric: a line for each ranking, a column for each N.

    Args:
        points: of `curve`.
        starred: whether the CLIP that ranks is all that judges.
    """
    ns = sorted({point.n for point in points})
    rows: list[list[str]] = []
    for metric, title in METRICS.items():
        known = {(p.rank, p.n): each for p in points if (each := getattr(p, metric)) is not None}
        if not known:
            continue
        star = "*" if starred and metric == "clip" else ""
        rows.append([f"{title}{star}, best of", *map(str, ns), f"95% at {ns[-1]}"])
        for rank in NAMES:
            of_rank = [known[rank, n] for n in ns if (rank, n) in known]
            if not of_rank:
                continue
            last = of_rank[-1]
            interval = f"{_number(metric, last.low)} … {_number(metric, last.high)}"
            rows.append([f"  {NAMES[rank]}", *(_number(metric, each.mean) for each in of_rank), interval])
            if len(ns) > 1 and last.subsets is not None:
                rows.append(["    over all subsets", *(_number(metric, each.subsets) for each in of_rank)])
    return aligned(rows, "<>")


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if metric == "right" else f"{value:.4f}"


def recalled_table(recalled: Sequence[Recalled], rank: str, *, starred: bool = False) -> str:
    """Return how often the right one of all is found, a line for each N."""
    ks = list(recalled[0].chance)
    star = "*" if starred else ""
    recall_at = f"R@{', '.join(map(str, ks))}"
    rows = [[f"retrieval{star}, best by {NAMES[rank]}", f"picture of a caption, {recall_at}", "caption of a picture"]]
    for one in recalled:
        rows.append(
            [f"  best of {one.n}", *(_shares([found[k].mean for k in ks]) for found in (one.pictures, one.captions))]
        )
    chance = _shares([recalled[0].chance[k] for k in ks])
    return aligned([*rows, ["  chance", chance, chance]], "<>")


def _shares(values: Sequence[float]) -> str:
    return "  ".join(f"{value:6.1%}" for value in values)


def distance_table(rows: Mapping[str, Distances], net: FeatureNet) -> str:
    """Return a line for each set of pictures, which says of how many pictures and which weights it is."""
    lines = [["distance", "of", "", "±", "floor", "FD∞", "KID", "MMD", "IS", "precision", "recall"]]
    for label, each in rows.items():
        floor = "–" if each.floor is None else f"{each.floor.distance:.4g} (n={each.floor.n:,})"
        near, score = each.neighbours, each.inception_score
        lines.append(
            [
                distance_name(net, each.n),
                label,
                f"{each.fd:.4g}",
                f"{each.spread:.2g}",
                floor,
                _or_dash(each.limit),
                "–" if each.kid is None else f"{each.kid.mean:.3g}",
                _or_dash(each.mmd),
                "–" if score is None else f"{score.mean:.2f} ± {score.std:.2f}",
                "–" if near is None else f"{near.precision:.3f}",
                "–" if near is None else f"{near.recall:.3f}",
            ]
        )
    return aligned(lines, "<<>")


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
