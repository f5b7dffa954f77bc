"""The report of making shards: what was written, what was skipped and why, so that nothing is lost uncounted."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dalle.output.text import aligned, counted
from storage.atomic import replace_text
from training.data.sources.pictures import Listing

_NAMED = 5  # for each reason


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Shards made of a source, and what was left out."""

    source: str
    """The folder or file."""
    shards: tuple[Path, ...]
    """Shards written, in order."""
    noun: str
    """Name of what the source lists: "row" or "picture"."""
    n_rows: int
    """Rows or pictures listed: those written and skipped, and those joined."""
    n_joined: int
    """Rows that name a picture of a row before, and add their captions to it."""
    n_samples: int
    """Pictures written."""
    n_captions: int
    """Captions written."""
    skipped: Mapping[str, int]
    """Pictures left out, by reason, the most frequent first."""
    captions_left_out: Mapping[str, int]
    """Captions left out of the pictures that were written, by reason."""
    examples: Mapping[str, tuple[str, ...]]
    """The first few names for each reason."""
    others: Mapping[str, int]
    """Files of a folder that are neither pictures nor their captions, by kind."""
    tables: tuple[str, ...]
    """Names of files of a folder that may be tables of its captions."""

    @property
    def n_skipped(self) -> int:
        """Pictures left out."""
        return sum(self.skipped.values())

    def table(self) -> str:
        """Return the report as lines of text."""
        joined = f", {self.n_joined:,} joined to a picture of another row" if self.n_joined else ""
        note = f"{_noun(self.noun, self.n_rows)}: {self.n_samples:,} written, {self.n_skipped:,} skipped{joined}"
        rows = [("read", f"{self.n_rows:,}", note)]
        note = f"{_noun('picture', self.n_samples)}, {counted(self.n_captions, 'caption')}, "
        rows.append(("written", f"{self.n_samples:,}", note + counted(len(self.shards), "shard")))
        rows.append(("skipped", f"{self.n_skipped:,}", _noun("picture", self.n_skipped)))
        rows += self._reasons(self.skipped)
        if self.captions_left_out:
            note = "captions of pictures that were written"
            rows.append(("left out", f"{sum(self.captions_left_out.values()):,}", note))
            rows += [(f"  {reason}", f"{count:,}", "") for reason, count in self.captions_left_out.items()]
        if self.others:
            rows.append(("not read", f"{sum(self.others.values()):,}", "other files of the folder"))
            rows += self._reasons(self.others)
        lines = [aligned(rows, "<><")]
        if self.tables and self.skipped.get("no caption"):
            lines.append(f"{listed(self.tables)} may hold the captions: give the table itself in place of the folder")
        return "\n".join(lines)

    def _reasons(self, counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
        """Return a row for each reason, with the first few names."""
        rows = []
        for reason, count in counts.items():
            names = self.examples.get(reason, ())
            more = ", …" if names and count > len(names) else ""
            rows.append((f"  {reason}", f"{count:,}", " ".join(", ".join(names).split()) + more))
        return rows


def _noun(noun: str, n: int) -> str:
    return counted(n, noun).split()[1]


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


class Tally:
    """Counts while shards are being written."""

    def __init__(self) -> None:
        self.n_samples = 0
        self.n_captions = 0
        self.skipped: Counter[str] = Counter()
        self.captions_left_out: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def skip(self, reason: str, name: str) -> None:
        """Count a picture that is left out."""
        self.skipped[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(_text(name))

    def report(self, source: Path, listing: Listing, shards: Sequence[Path]) -> ShardReport:
        """Return what was counted."""
        named = {kind: names[:_NAMED] for kind, names in listing.others.items()}
        return ShardReport(
            source=_text(str(source)),
            shards=tuple(shards),
            noun=listing.noun,
            n_rows=listing.n_rows,
            n_joined=listing.n_rows - len(listing.pictures),
            n_samples=self.n_samples,
            n_captions=self.n_captions,
            skipped=dict(self.skipped.most_common()),
            captions_left_out=dict(self.captions_left_out.most_common()),
            examples={reason: tuple(map(_text, names)) for reason, names in (named | self.examples).items()},
            others={kind: len(names) for kind, names in listing.others.items()},
            tables=tuple(_text(path.name) for path in listing.tables),
        )


def _text(name: str) -> str:
    """Return a name that is not UTF-8 without its lone surrogates, which no file can hold."""
    return name.encode("utf-8", "replace").decode()


def write_report(report: ShardReport, out: Path, prefix: str) -> None:
    """Write the report's file; it names shards with their checksums instead of paths.

    Args:
        report: to write.
        out: folder of the shards.
        prefix: of their names.

    Raises:
        OSError: the file cannot be written.
    """
    shards = []
    for path in report.shards:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    text = json.dumps({**asdict(report), "shards": shards}, ensure_ascii=False, indent=2)
    replace_text(_report_file(out, prefix), text + "\n")


def _report_file(out: Path, prefix: str) -> Path:
    """Return report.json, or PREFIX-report.json where the former tells of the shards of another prefix."""
    first = out / "report.json"
    try:
        names = [shard["name"] for shard in json.loads(first.read_text("utf-8"))["shards"]]
    except FileNotFoundError:
        return first
    except (ValueError, KeyError, TypeError, RecursionError):  # somebody else's
        names = [""]
    ours = all(re.fullmatch(re.escape(prefix) + r"-\d{6,}\.tar", name) for name in names)
    return first if ours else out / f"{prefix}-report.json"
