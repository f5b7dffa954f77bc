"""Near-duplicates by the features of CLIP: within some data, or between training and validation data.

1. `features_of` embeds the pictures, in batches.
2. `near_pairs` and `nearest` compare all with all by the cosine, a block at a time: N × N numbers never exist.
3. `find_duplicates` does both and writes pairs.jsonl, a contact sheet of the pairs, from which a person chooses the
   threshold, and excluded.jsonl, which `dalle-train check-data --exclude-keys` takes.

Source: Ramesh et al. 2021, §3.2: the nearest training picture of each validation picture, sorted, and a threshold
chosen by looking at them.

Letters: N, M pictures  E features
"""

import heapq
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from dalle.output.sheets import Section, contact_sheet, save_png
from dvae.images import open_image
from rerank import CLIP
from rerank.pixels import clip_view
from rerank.score import embed_images
from storage.atomic import replace_text
from storage.exclusions import listed_names, sample_line, write_lines
from training.data.batches import BadSamples, parts_in_order

logger = logging.getLogger(__name__)

BLOCK = 4096
"""Rows and columns of the cosines that are held at once."""
MAX_PAIRS = 1_000_000
"""Pairs to keep, the nearest ones."""
BELOW_THRESHOLD = 0.04
"""Cosine below the threshold down to which pairs are shown too, so that it can be judged from both sides."""
BAND = 0.01
"""Width of the bands of cosines on the sheet."""
PAIRS_PER_BAND = 6
MAX_BANDS = 30
PAIRS, SHEET, EXCLUDED = "pairs.jsonl", "pairs.png", "excluded.jsonl"

_BATCH = 64


class Pair(NamedTuple):
    """Two pictures."""

    cosine: float
    """Of their features, in [-1, 1]."""
    first: int
    """Number of a sample of the data."""
    second: int
    """A later one of the same data, or one of the data it is compared against."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesReport:
    """Numbers of pictures and pairs."""

    n_pictures: int
    """Pictures of the data that could be embedded."""
    n_against: int
    """Pictures that they were compared against; 0 if among themselves."""
    n_pairs: int
    """Pairs at or above the threshold."""
    n_overlapping: int
    """Pictures of the other data that have a pair at or above the threshold."""
    n_excluded: int
    """Pictures of the data to leave out."""

    def __str__(self) -> str:
        among = f"and {self.n_against:,} to compare them against" if self.n_against else "among themselves"
        lines = [
            f"{self.n_pictures:,} pictures, {among}: {self.n_pairs:,} pairs at the threshold or above",
            f"{self.n_excluded:,} pictures of the data to leave out",
        ]
        if self.n_against:
            share = self.n_overlapping / self.n_against
            lines.insert(1, f"{self.n_overlapping:,} ({share:.1%}) of the others have such a picture in the data")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- the numbers


def features_of(
    data: ShardData, clip: CLIP, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, list[int]]:
    """Embed the pictures of some data.

    Args:
        data: of pictures; those that cannot be read are left out.
        clip: computes on the device that it is on.
        workers: processes that read.
        progress: called with (pictures done, pictures).

    Returns:
        Unit vectors, float32 (N, E) on the CPU, and the numbers of their samples.

    Raises:
        ValueError: none can be read.
    """

    def view(sample: Sample, _: np.random.Generator) -> dict[str, Tensor]:
        return {"view": clip_view(open_image(sample.image_bytes, sample.source), clip.config.view)}

    parts = (range(first, min(first + _BATCH, len(data))) for first in range(0, len(data), _BATCH))
    bad_samples = BadSamples(data, max_fraction=1.0)
    features: list[Tensor] = []
    numbers: list[int] = []
    for n_done, batch in enumerate(parts_in_order(data, view, parts, bad_samples, workers=workers), start=1):
        if batch.numbers:
            features.append(embed_images(clip, batch.tensors["view"]).float().cpu())
            numbers += batch.numbers
        if progress is not None:
            progress(min(n_done * _BATCH, len(data)), len(data))
    if not features:
        raise bad_samples.error(f"all {len(data):,} pictures are unusable")
    return torch.cat(features), numbers


def near_pairs(
    features: Tensor, others: Tensor | None, floor: float, *, most: int = MAX_PAIRS, block: int = BLOCK
) -> list[Pair]:
    """Return the pairs of rows whose cosine is at least `floor`, the nearest first.

    Args:
        features: unit vectors (N, E).
        others: unit vectors (M, E) that make pairs with those of `features`; None for pairs among themselves.
        floor: least cosine.
        most: pairs to keep; when there are more, the nearest are kept, and a warning says so.
        block: rows and columns that are compared at once.
    """
    columns = features if others is None else others
    kept: list[Pair] = []  # a heap, the farthest pair first
    is_full = False
    for top in range(0, len(features), block):
        rows = features[top : top + block]
        for left in range(top if others is None else 0, len(columns), block):
            cosines = rows @ columns[left : left + block].T
            is_near = cosines >= (kept[0].cosine if len(kept) == most else floor)
            if others is None and left == top:
                is_near = is_near.triu(1)
            for i, j in is_near.nonzero().tolist():
                pair = Pair(float(cosines[i, j]), top + i, left + j)
                if len(kept) < most:
                    heapq.heappush(kept, pair)
                else:
                    heapq.heappushpop(kept, pair)
                    is_full = True
    if is_full:
        logger.warning("more than %d pairs have a cosine of %g: the nearest are kept; raise --threshold", most, floor)
    return sorted(kept, key=lambda pair: (-pair.cosine, pair.first, pair.second))


def nearest(features: Tensor, others: Tensor, *, block: int = BLOCK) -> list[Pair]:
    """Return the nearest of the features (N, E) for each of the others (M, E), the nearest pair first."""
    best = torch.full((len(others),), -2.0)
    at = torch.zeros(len(others), dtype=torch.int64)
    for left in range(0, len(others), block):
        columns = others[left : left + block]
        for top in range(0, len(features), block):
            cosines, rows = (features[top : top + block] @ columns.T).max(0)
            here = slice(left, left + len(columns))
            is_nearer = cosines > best[here]
            best[here] = torch.where(is_nearer, cosines, best[here])
            at[here] = torch.where(is_nearer, top + rows, at[here])
    pairs = [Pair(cosine, row, j) for j, (cosine, row) in enumerate(zip(best.tolist(), at.tolist(), strict=True))]
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.first, pair.second))


def copies(pairs: Sequence[Pair]) -> dict[int, Pair]:
    """Return which pictures to leave out so that no two of the rest are a pair, each with its pair.

    Keep the earlier of each pair, so that a chain a~b~c keeps a and c.
    """
    earlier: dict[int, list[Pair]] = {}
    for pair in pairs:
        earlier.setdefault(pair.second, []).append(pair)
    left_out: dict[int, Pair] = {}
    for second in sorted(earlier):
        kept = [pair for pair in earlier[second] if pair.first not in left_out]
        if kept:
            left_out[second] = max(kept)
    return left_out


# ------------------------------------------------------------------------------------------------------- the program


def find_duplicates(
    data: ShardData,
    against: ShardData | None,
    clip: CLIP,
    out: Path,
    *,
    threshold: float,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DuplicatesReport:
    """Find pictures that are nearly the same, and write lists and a sheet of them to a folder.

    Args:
        data: searched for copies, usually the training data; opened without captions.
        against: other data, usually for validation: lists the pictures of `data` near one of these as excluded; None
            compares the pictures of `data` among themselves, and lists the later one of two.
        clip: makes the features.
        out: folder for pairs.jsonl, pairs.png and excluded.jsonl; made if it is missing.
        threshold: least cosine of two pictures that count as the same, in (-1, 1].
        workers: processes that read.
        progress: called with (pictures embedded, pictures), for both data one after the other.

    Raises:
        ValueError: the threshold is out of range, or no picture can be read.
        OSError: something cannot be written.
    """
    if not -1 < threshold <= 1:
        raise ValueError(f"the threshold must be a cosine above -1 and up to 1, got {threshold}")
    out.mkdir(parents=True, exist_ok=True)
    features, numbers = features_of(data, clip, workers=workers, progress=progress)
    others, other_numbers = (
        (None, numbers) if against is None else features_of(against, clip, workers=workers, progress=progress)
    )
    # float32 products of unit vectors are off by some 1e-7: equal pictures have to reach a threshold of 1
    floor = threshold - 1e-6
    shown = [
        Pair(pair.cosine, numbers[pair.first], other_numbers[pair.second])
        for pair in near_pairs(features, others, floor - BELOW_THRESHOLD)
    ]
    pairs = [pair for pair in shown if pair.cosine >= floor]
    if others is None:
        left_out = copies(pairs)
    else:
        left_out = {}
        for pair in pairs:
            left_out.setdefault(pair.first, pair)
    names = _Names(data, against)
    listed = (
        pairs
        if others is None
        else [Pair(pair.cosine, numbers[pair.first], other_numbers[pair.second]) for pair in nearest(features, others)]
    )
    write_lines(out / PAIRS, (names.line(pair) for pair in listed))
    replace_text(out / EXCLUDED, "".join(names.reason(number, left_out[number]) for number in sorted(left_out)))
    _save_sheet(out / SHEET, shown, data, against or data, threshold)
    return DuplicatesReport(
        n_pictures=len(features),
        n_against=0 if others is None else len(others),
        n_pairs=len(pairs),
        n_overlapping=0 if others is None else len({pair.second for pair in pairs}),
        n_excluded=len(left_out),
    )


class _Names:
    """Names of samples in the files."""

    def __init__(self, data: ShardData, against: ShardData | None) -> None:
        self._of_data = _sample_names(data)
        self._of_others = self._of_data if against is None else _sample_names(against)

    def line(self, pair: Pair) -> str:
        first, second = self._of_data(pair.first), self._of_others(pair.second)
        record = {"cosine": round(pair.cosine, 6), "shard": first[0], "key": first[1]}
        return json.dumps({**record, "other_shard": second[0], "other_key": second[1]}) + "\n"

    def reason(self, number: int, pair: Pair) -> str:
        is_first = number == pair.first
        shard, key = (self._of_others if is_first else self._of_data)(pair.second if is_first else pair.first)
        return sample_line(*self._of_data(number), f"cosine {pair.cosine:.4f} with {key} in {shard}")


def _sample_names(data: ShardData) -> Callable[[int], tuple[str, str]]:
    shards = dict(zip(data.shards, listed_names(data.shards), strict=True))
    return lambda i: (shards[data.shard_of(i)], data.key(i))


def _save_sheet(path: Path, pairs: Sequence[Pair], data: ShardData, others: ShardData, threshold: float) -> None:
    """Draw the nearest pairs of every band of cosines around the threshold; nothing if there is no pair."""
    bands: dict[int, list[Pair]] = {}
    for pair in pairs:
        band = bands.setdefault(int(np.floor((pair.cosine - threshold) / BAND + 1e-4)), [])
        if len(band) < PAIRS_PER_BAND:
            band.append(pair)
    # a threshold is judged by the lowest bands, below and above it
    chosen = sorted(sorted(bands)[:MAX_BANDS], reverse=True)
    sections = [Section(_heading(band, threshold), *_pictures(bands[band], data, others)) for band in chosen]
    sections = [section for section in sections if section.images]
    if sections:
        title = f"pairs of pictures by the cosine of their features; threshold {threshold:g}"
        save_png(contact_sheet(sections, title=title, columns=2 * (PAIRS_PER_BAND // 2)), path)
    else:
        path.unlink(missing_ok=True)


def _heading(band: int, threshold: float) -> str:
    low = threshold + band * BAND
    return f"cosine {low:.3f} to {min(1.0, low + BAND):.3f}: {'taken to be the same' if band >= 0 else 'kept'}"


def _pictures(pairs: Sequence[Pair], data: ShardData, others: ShardData) -> tuple[list[Image.Image], list[str]]:
    images: list[Image.Image] = []
    labels: list[str] = []
    for pair in pairs:
        for source, number in ((data, pair.first), (others, pair.second)):
            images.append(open_image(source.read(number).image_bytes, source.source(number)))
            labels.append(f"{pair.cosine:.3f} {source.key(number)}")
    return images, labels
