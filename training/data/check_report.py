"""The findings of `dalle-train check-data` in words."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dalle.output.text import aligned, counted
from training.data.check_shard import ASPECT_RATIOS
from training.data.record import Counts

UNUSABLE, DUPLICATES = "unusable.jsonl", "duplicates.jsonl"
"""Names of the lists in a manifest's folder."""
NAMED_IN_REPORT = 5
"""Shards or keys that a message names."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and findings of all shards."""

    n_shards: int
    """Shards checked."""
    n_read: int
    """Shards read now; the others were known."""
    n_bytes: int
    """Size of all shards."""
    counts: Counts
    damaged: tuple[str, ...]
    """Shards that cannot be read to their end, with the reason."""
    n_repeated_keys: int
    """Samples whose key another sample before them has."""
    repeated_keys: tuple[str, ...]
    """The first few of those keys."""
    n_repeated_pictures: int
    """Samples whose picture is, byte for byte, that of another sample before them."""
    n_excluded: int
    """Lines of samples to leave out."""
    problems: Mapping[str, int] = field(default_factory=dict)
    """Samples that cannot be used as captioned pictures, by problem: each sample once."""
    n_with_neither: int = 0
    """Samples with neither a picture nor a caption."""
    without_picture: tuple[str, ...] = ()
    """The first few samples without a picture, each with the member that was perhaps meant to be it."""

    @property
    def n_problems(self) -> int:
        """Samples that cannot be used as captioned pictures."""
        return sum(self.problems.values())


def report(summary: Summary, out: Path | None) -> str:
    """Return a summary as lines of text, with a remedy for each finding.

    Args:
        summary: of all shards.
        out: folder of the manifest, if it is kept.
    """
    samples = summary.counts["samples"]
    rows = [
        ("shards", f"{summary.n_shards:,}", f"{summary.n_bytes / 1e9:,.2f} GB; {summary.n_read:,} of them read now"),
        ("samples", f"{samples['keys']:,}", ""),
        ("pictures with a caption", f"{samples['pairs']:,}", ""),
        (
            "usable",
            f"{samples['keys'] - summary.n_problems:,}",
            f"{summary.n_problems:,} not" if summary.n_problems else "",
        ),
    ]
    lines = [aligned(rows, "<><")]
    lines += [f"    {count:,} × {problem}" for problem, count in summary.problems.items()]
    for subject in ("caption characters", "caption words", "caption tokens"):
        if summary.counts[subject]:
            lines.append(f"{subject}: {_quantiles(summary.counts[subject])}")
    for subject in ("shorter side", "aspect ratio"):
        if summary.counts[subject]:
            lines.append(f"{subject}: {_shares(summary.counts[subject], subject)}")
    found = _findings(summary, out)
    lines += ["", "found:" if found else "nothing is wrong", *(f"  {line}" for line in found)]
    if out is not None:
        lines += ["", f"the manifest is {out}: give it to the training commands as --manifest {out}"]
    return "\n".join(lines)


def _quantiles(lengths: Counter[str]) -> str:
    values = sorted((int(length), count) for length, count in lengths.items())
    total = sum(count for _, count in values)
    ends = np.cumsum([count for _, count in values])
    shown = [("least", 0.0), ("5%", 0.05), ("median", 0.5), ("95%", 0.95), ("most", 1.0)]
    at = [
        values[min(int(np.searchsorted(ends, max(1, math.ceil(share * total)))), len(values) - 1)] for _, share in shown
    ]
    return ", ".join(f"{name} {value}" for (name, _), (value, _) in zip(shown, at, strict=True))


def _shares(found: Counter[str], subject: str) -> str:
    order = [name for _, name in ASPECT_RATIOS] if subject == "aspect ratio" else sorted(found, key=_first_number)
    names = [name for name in [*order, "above 4"] if found[name]]
    return ", ".join(f"{name}: {found[name]:,} ({found[name] / found.total():.1%})" for name in names)


def _first_number(name: str) -> int:
    return int(name.split()[0])


def _findings(summary: Summary, out: Path | None) -> list[str]:
    """Return a line for each kind of problem."""
    samples, found = summary.counts["samples"], []

    def list_of(name: str) -> str:
        return f" ({out / name} lists them)" if out is not None else ""

    for shard in summary.damaged[:NAMED_IN_REPORT]:
        found.append(f"damaged: {' '.join(shard.split())}; copy or make it again, or train with --skip-damaged-shards")
    if len(summary.damaged) > NAMED_IN_REPORT:
        found.append(f"damaged: {len(summary.damaged) - NAMED_IN_REPORT:,} more shards")
    for subject, what in (("unusable pictures", "picture"), ("unusable captions", "caption")):
        for problem, count in summary.counts[subject].most_common():
            found.append(f"{count:,} × {what} {problem}{list_of(UNUSABLE)}")
    if summary.counts["unusable pictures"]:
        share = summary.counts["unusable pictures"].total() / max(1, samples["keys"])
        found.append(f"{share:.2%} of the pictures cannot be used: training replaces them, up to --max-bad-fraction")
    for subject, count, what in (
        ("picture without a caption", samples["pictures without a caption"], "left out where captions are needed"),
        ("caption without a picture", samples["captions without a picture"], "left out"),
        ("sample without picture and caption", summary.n_with_neither, "left out"),
    ):
        if count:
            found.append(f"{count:,} × {subject}{list_of(UNUSABLE)}: {what}")
    if summary.without_picture:
        first = "; ".join(" ".join(name.split()) for name in summary.without_picture[:2])
        found.append(f"without a picture: {first}" + ("; …" if len(summary.without_picture) > 2 else ""))
    if samples["members that come twice"]:
        found.append(
            f"{samples['members that come twice']:,} × further picture or caption of a sample: the first counts"
        )
    if samples["links, devices and unsafe names"]:
        found.append(f"{samples['links, devices and unsafe names']:,} links, devices and unsafe names: never looked at")
    if summary.n_repeated_keys:
        keys = ", ".join(map(repr, summary.repeated_keys))
        found.append(
            f"{summary.n_repeated_keys:,} × key that another shard has too, such as {keys}: they draw the same crops; "
            "rename them, or leave the copies out"
        )
    if summary.n_repeated_pictures:
        found.append(
            f"{summary.n_repeated_pictures:,} × picture of another sample before, byte for byte"
            f"{list_of(DUPLICATES)}: to leave them out, give that list to --exclude-keys, with --overwrite"
        )
    elongated = sum(summary.counts["aspect ratio"][name] for name in ("below 1/4", "1/4 to 1/2", "2 to 4", "above 4"))
    if elongated:
        found.append(
            f"{elongated:,} × picture outside 1/2 … 2, of which a square crop shows little; the paper drops them"
        )
    if summary.n_excluded:
        found.append(f"to be left out: {counted(summary.n_excluded, 'line')} of samples")
    if not samples["keys"]:
        found.append("no samples: expected members called KEY.jpg and KEY.txt")
    elif summary.n_problems == samples["keys"]:
        found.append(f"no sample of {samples['keys']:,} can be used as a captioned picture")
    elif summary.n_problems and not found:
        found.append(f"{summary.n_problems:,} × sample that cannot be used{list_of(UNUSABLE)}")
    return found
