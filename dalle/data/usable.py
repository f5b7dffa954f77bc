"""The samples of one shard that can be used, and the counts of those that are left out.

`Part` is what is kept of them beside a shard's index.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dalle.data.captions import JSON_FIELDS, NO_CAPTION
from dalle.data.image_tokens import TOKENS_FIELD, Description
from dalle.data.index import IMAGE, JSON, NO_PICTURE, TEXT, ShardIndex, with_captions

logger = logging.getLogger(__name__)

_MAX_COUNT = 1 << 40  # samples or members of a shard
_NAMED = 3  # samples that a warning names
_LISTS = ("damaged_shards", "problems")  # of a report; everything else is counted


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of the samples in use and left out; those of several shards add up."""

    n_samples: int = 0
    """Samples in use."""
    n_without_image: int = 0
    """Samples left out because they have neither a picture nor image tokens."""
    n_without_caption: int = 0
    """Samples left out because they have no caption, a blank one or an unreadable one."""
    n_duplicates: int = 0
    """Members left out because their sample had such a member already."""
    n_ignored_members: int = 0
    """Links, devices and names that lead out of a folder."""
    n_excluded: int = 0
    """Samples left out because the manifest excludes them."""
    n_lost: int = 0
    """Samples in use that a manifest knows and that are not there any more."""
    damaged_shards: tuple[str, ...] = ()
    """Shards used in part or not at all, with the reason (with skip_damaged or a manifest only)."""
    problems: tuple[tuple[str, str], ...] = ()
    """The first few samples of each shard left out for want of a picture or caption: what is missing, name and why."""

    @classmethod
    def total(cls, reports: Sequence["DataReport"]) -> "DataReport":
        """Return the sums of the counts, and all shards and problems in the order of the reports."""
        columns = {one.name: [getattr(report, one.name) for report in reports] for one in fields(cls)}
        joined: dict[str, Any] = {
            name: tuple(value for values in columns.pop(name) for value in values) for name in _LISTS
        }
        return cls(**{name: sum(values) for name, values in columns.items()}, **joined)

    def log(self) -> None:
        """Log a warning for each kind of sample or member that is left out."""
        for name in ("n_without_image", "n_without_caption", "n_duplicates", "n_ignored_members", "n_excluded"):
            if count := getattr(self, name):
                named = [text for kind, text in self.problems if kind == name][:_NAMED]
                more = "; …" if count > len(named) else ""
                shown = f" ({'; '.join(named)}{more})" if named else ""
                what = name.removeprefix("n_").replace("_", " ")
                logger.warning("left out of the shards: %d %s%s", count, what, shown)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The usable samples of a shard, counted: with a caption each, or pictures alone."""

    report: DataReport
    fingerprint: str
    """Of the usable ones, as `fingerprint` gives it."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts that are not 0, and the fingerprint."""
        return {"fingerprint": self.fingerprint, **{k: v for k, v in asdict(self.report).items() if v}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read the record of `to_json`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        values = dict(record.items())
        fingerprint, problems = values.pop("fingerprint"), values.pop("problems", ())
        is_sound = all(type(value) is int and 0 <= value < _MAX_COUNT for value in values.values())
        if not isinstance(fingerprint, str) or not is_sound:
            raise ValueError("its counts are none")
        named = tuple((str(kind), str(text)) for kind, text in problems)
        return cls(report=DataReport(**values, problems=named), fingerprint=fingerprint)


def shard_to_json(tokens: Description | None, parts: Mapping[bool, Part]) -> dict[str, Any]:
    """Return what a record of a shard says of its image tokens, if it has them, and of its usable samples."""
    return {
        "tokens": None if tokens is None else json.loads(tokens.to_json()),
        "parts": {"captions" if kind else "pictures": part.to_json() for kind, part in parts.items()},
    }


def shard_from_json(record: Mapping[str, Any], path: Path) -> tuple[Description | None, dict[bool, Part]]:
    """Read what `shard_to_json` returns; either may be missing.

    Args:
        record: that holds it.
        path: for messages.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    tokens = record.get("tokens")
    return (
        None if tokens is None else Description.from_json(json.dumps(tokens).encode(), path),
        {kind == "captions": Part.from_json(part) for kind, part in record.get("parts", {}).items()},
    )


def fingerprint(index: ShardIndex) -> str:
    """Return 16 hexadecimal digits of the keys, places and sizes of an index."""
    digest = hashlib.blake2b(repr(list(index.keys)).encode(), digest_size=8)
    for kind in (IMAGE, TEXT, JSON):
        digest.update(index.places[:, kind].astype("<i8").tobytes())
    return digest.hexdigest()


def parts_of(index: ShardIndex) -> dict[bool, Part]:
    """Return the counts of a shard's usable samples, with captions (True) as far as they are known, and without."""
    parts = {}
    for captions in (False, True):
        if not captions or index.has_caption is not None:
            part, report = usable_part(index, captions=captions, encoded=True)
            parts[captions] = Part(report=report, fingerprint=fingerprint(part))
    return parts


def refuse_tokens(shard: Path, tokens: Description | None) -> None:
    """Check that a shard holds pictures.

    Raises:
        ValueError: it holds image tokens.
    """
    if tokens is not None:
        raise ValueError(
            f"{shard} holds image tokens, and pictures are needed here: give the shards that it was made of by "
            f"`dalle-train encode` ({tokens.source}, …)"
        )


def usable_part(
    index: ShardIndex, *, captions: bool, encoded: bool = False, excluded: NDArray[np.bool_] | None = None
) -> tuple[ShardIndex, DataReport]:
    """Return the samples of a shard that have a picture, and a caption if needed, and the counts of all.

    Args:
        index: of the whole shard; its captions are read here unless `has_caption` is known.
        captions: whether samples need captions.
        encoded: whether image tokens will do in place of pictures.
        excluded: (n,) samples to leave out.

    Raises:
        ValueError: the shard holds image tokens, and pictures are needed.
    """
    if not encoded:
        refuse_tokens(index.path, index.tokens)
    wanted = has_image = index.has_image
    if captions:
        index = index if index.has_caption is not None else with_captions(index)
        assert index.has_caption is not None
        wanted = has_image & index.has_caption
    left_out = np.zeros_like(wanted) if excluded is None else wanted & excluded
    part = index.chosen(np.flatnonzero(wanted & ~left_out))
    report = DataReport(
        n_samples=len(part.keys),
        n_without_image=int((~has_image).sum()),
        n_without_caption=int((has_image & ~wanted).sum()),
        n_duplicates=index.n_duplicates,
        n_ignored_members=index.n_ignored,
        n_excluded=int(left_out.sum()),
        n_lost=0 if part.lost is None else int(part.lost.sum()),
        problems=(
            *_named(index, "n_without_image", np.flatnonzero(~has_image)),
            *_named(index, "n_without_caption", np.flatnonzero(has_image & ~wanted)),
        ),
    )
    return part, report


def _named(index: ShardIndex, kind: str, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
    """Return the names of the first few of some samples, each with its problem where it is more than the kind says."""
    found = []
    for i in rows[:_NAMED].tolist():
        problem = index.problems.get(i, NO_CAPTION)
        if problem.startswith(NO_PICTURE) or problem == NO_CAPTION:
            problem = problem.partition(": ")[2]  # the member that was perhaps meant to be the picture
        found.append((kind, f"{index.keys[i]}: {problem}" if problem else index.keys[i]))
    return found


def nothing_usable(index: ShardIndex, report: DataReport) -> str:
    """Return the message for a whole shard without a usable sample."""
    named = dict(reversed(report.problems))  # the first of each kind
    if not index.keys:
        return f"shard {index.path} has no samples: expected members called KEY.jpg and KEY.txt"
    if index.has_image.any():
        return (
            f"shard {index.path} has no captions: expected KEY.txt beside KEY.jpg (UTF-8, one caption a line), "
            f"or KEY.json with one of {', '.join(JSON_FIELDS)}; found {named['n_without_caption']}"
        )
    if index.tokens is not None:
        return f"shard {index.path} has no image tokens: expected KEY.{TOKENS_FIELD} in it; encode its pictures again"
    return (
        f"shard {index.path} has no pictures: expected KEY.jpg, KEY.png or the like in it; "
        f"found {named['n_without_image']}"
    )
