"""From captions to the table of best of N: of a bundle, which samples, and of pictures that another system has made.

Letters: R captions  M candidates of each  J values of N  D features  E features of CLIP
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.data.pictures import in_batches
from dalle.evaluation.distances import Distances, Reference, distances
from dalle.evaluation.nested.captions import Row
from dalle.evaluation.nested.curves import GIVEN, Point, cosines, curve, rate, recall, recalled
from dalle.evaluation.nested.run import Nested, run_nested
from dalle.evaluation.nested.sample import Checker, Looks, Stopwatch, at
from dalle.evaluation.nested.settings import NestedSettings
from dalle.evaluation.nested.shards import is_first_process
from dalle.evaluation.networks import PictureNetwork
from dalle.evaluation.references import RealPictures
from dalle.evaluation.result import BestOfN, Result
from dalle.output.progress import OnProgress, part_of, progress_bar
from dalle.output.text import Say
from dalle.pipeline import Pipeline
from dvae.images import open_image, to_tensor
from rerank import CLIP
from rerank.score import embed_captions, embed_images

EMBEDDED_AT_ONCE = 32
LEAST_FOR_DISTANCE = 2
"""Captions of which there are distances."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A CLIP that judges and chooses nothing."""

    clip: CLIP
    hash: str


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real pictures to compare with, and what both sides leave out for a second time."""

    network: PictureNetwork
    pictures: RealPictures | Reference
    """Those of shards, or moments of others."""
    radii: tuple[float, ...] = (0,)
    keep_pictures: Tensor | None = None
    """bool (M,): the pictures that --without leaves; None without it, or where there are moments, which stay whole."""

    def at(self, radius: float, *, kept: bool = False) -> Reference | None:
        """Return the reference at a radius; None where there are moments alone, which are of radius 0."""
        if isinstance(self.pictures, RealPictures):
            return self.pictures.at(radius, self.keep_pictures if kept else None)
        return self.pictures if radius == 0 else None


def evaluate_bundle_best_of(
    pipe: Pipeline,
    rows: Sequence[Row],
    settings: NestedSettings,
    out: Path,
    say: Say,
    *,
    judge: Judge | None = None,
    checker: Checker | None = None,
    real: Real | None = None,
    keep_rows: Tensor | None = None,
    fresh: bool = False,
) -> tuple[Nested, Result] | None:
    """Sample a bundle, or go on where an earlier start has ended, and measure best of N.

    Args:
        pipe: the bundle.
        rows: the captions.
        settings: what to sample.
        out: the folder of the shards.
        say: told how far it is.
        judge: another CLIP.
        checker: knows the truth of every caption.
        real: pictures to compare with.
        keep_rows: bool (R,): the captions that --without leaves.
        fresh: forget what is there.

    Returns:
        None in all processes of a launcher but the first.

    Raises:
        ValueError, OSError: as `run_nested`.
    """
    network = None if real is None else real.network
    radii = (0.0,) if real is None or isinstance(real.pictures, Reference) else real.radii
    looks = Looks(judge=None if judge is None else judge.clip, checker=checker, network=network, radii=radii)
    measured: dict[str, Any] = {
        "judge": None if judge is None else judge.hash,
        "checked": checker is not None,
        "network": None if network is None else network.identity(),
        "radii": list(radii),
    }
    if real is not None and is_first_process():
        for radius in radii:
            real.at(radius)  # a picture that cannot be read is told before what may take days
    nested = run_nested(pipe, rows, settings, looks, out, say, measured=measured, fresh=fresh)
    if nested is None:
        return None
    watch = Stopwatch()
    n_sets = len(settings.best_of) + len(radii) - 1
    with watch.timing("numbers"), progress_bar("distances") as progress:
        each = _each(progress, n_sets if keep_rows is None else 2 * n_sets)
        found = _of_nested(nested, real, radii, each)
        without = None
        if keep_rows is not None:
            without = _of_nested(nested.only(keep_rows), real, radii, each, kept=True)
    chosen = settings.sampling
    protocol = {
        **settings.identity(nested.folder.identity["captions"], pipe.hashes, measured),
        "key": nested.folder.key,
        "n_captions": len(rows),
        "batch_size": nested.folder.batch_size,
        "reference": _reference_of(real),
        "n_without": None if keep_rows is None else int((~keep_rows).sum()),
    }
    lines = [
        f"{len(rows):,} captions × {settings.m} candidates, seed {chosen.seed}, temperature {chosen.temperature:g}, "
        f"picks by {settings.rank}; run {nested.folder.key[:8]}",
        *_reference_lines(real),
    ]
    result = Result(
        protocol=protocol,
        lines=lines,
        rank=settings.rank,
        has_judge=judge is not None,
        net=None if network is None else network.net,
        found=found,
        without=without,
        seconds={**nested.seconds, **watch.seconds},
    )
    return nested, result


def _each(progress: OnProgress, n_sets: int) -> Iterator[OnProgress]:
    """Yield for each set of pictures what is to be told how far its numbers are."""
    return (part_of(progress, n_before, n_sets) for n_before in itertools.count())


def _of_nested(
    nested: Nested, real: Real | None, radii: Sequence[float], each: Iterator[OnProgress], *, kept: bool = False
) -> BestOfN:
    best_of = nested.settings.best_of
    found = BestOfN(captions=len(nested.rows), curve=curve(nested), recalled=recalled(nested))
    if real is None or len(nested.rows) < LEAST_FOR_DISTANCE:
        return found

    has_classes = real.network.classes is not None

    def of(radius: float, column: int | None) -> Distances:
        logits = nested.read(at("logits", radius), column) if has_classes else None
        return distances(nested.read(at("features", radius), column), references[radius], logits, progress=next(each))

    references = {radius: reference for radius in radii if (reference := real.at(radius, kept=kept)) is not None}
    by_n = {n: of(0, column) for column, n in enumerate(best_of)}
    blurred = {radius: of(radius, None) if radius else by_n[best_of[-1]] for radius in radii} if len(radii) > 1 else {}
    return replace(found, distances=by_n, blurred=blurred)


def evaluate_pictures(
    files: Sequence[Path],
    rows: Sequence[Row],
    *,
    judge: Judge | None = None,
    checker: Checker | None = None,
    real: Real | None = None,
    keep_rows: Tensor | None = None,
    protocol: Mapping[str, Any],
    lines: Sequence[str],
) -> Result:
    """Measure pictures that are there, one of each caption.

    Args:
        files: R pictures of any size.
        rows: their captions.
        judge: measures how well they fit.
        checker: knows the truth of every caption.
        real: pictures to compare with.
        keep_rows: bool (R,): the captions that --without leaves.
        protocol: where pictures and captions come from.
        lines: the same for people.

    Raises:
        ValueError: a picture cannot be read.
    """
    watch = Stopwatch()
    seen = _look(files, [row.caption for row in rows], judge, checker, real, watch)
    all_rows = torch.ones(len(rows), dtype=torch.bool)
    n_sets = len(seen.features)
    with watch.timing("numbers"), progress_bar("distances") as progress:
        each = _each(progress, n_sets if keep_rows is None else 2 * n_sets)
        found = _of_pictures(seen, all_rows, real, each)
        without = None if keep_rows is None else _of_pictures(seen, keep_rows, real, each, kept=True)
    return Result(
        protocol={**protocol, "judge": None if judge is None else judge.hash, "reference": _reference_of(real)},
        lines=[*lines, *_reference_lines(real)],
        rank=GIVEN,
        has_judge=True,
        net=None if real is None else real.network.net,
        found=found,
        without=without,
        seconds=watch.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What is seen in R pictures that are there."""

    clip_features: tuple[Tensor, Tensor] | None
    """The judge's unit features of captions and of pictures, (R,E) each."""
    verdicts: Tensor | None
    """The checker's, bool (R,)."""
    features: Mapping[float, Mapping[str, Tensor]]
    """The network's, by the radius of the blur; empty where there is nothing to compare with."""


def _look(
    files: Sequence[Path],
    captions: Sequence[str],
    judge: Judge | None,
    checker: Checker | None,
    real: Real | None,
    watch: Stopwatch,
) -> _Seen:
    """Look at pictures, one of each caption."""
    clip_features: tuple[Tensor, Tensor] | None = None
    verdicts: Tensor | None = None
    features: dict[float, dict[str, Tensor]] = {}
    if judge is not None:
        with watch.timing("judging"), progress_bar("pictures judged") as progress:
            images = []
            for some in in_batches(files, EMBEDDED_AT_ONCE):
                images.append(_embedded(judge.clip, some))
                progress(sum(map(len, images)), len(files))
            clip_features = (embed_captions(judge.clip, captions).cpu(), torch.cat(images))
    if checker is not None:
        with watch.timing("checking"):
            verdicts = torch.tensor(
                [checker(open_image(file), caption) for file, caption in zip(files, captions, strict=True)]
            )
    if real is not None:
        radii = [radius for radius in real.radii if real.at(radius) is not None]
        with watch.timing("features"), progress_bar("pictures") as progress:
            features = _features(real.network, files, radii, progress)
    return _Seen(clip_features=clip_features, verdicts=verdicts, features=features)


def _of_pictures(
    seen: _Seen, keep_R: Tensor, real: Real | None, each: Iterator[OnProgress], *, kept: bool = False
) -> BestOfN:
    """Return the numbers of the pictures that are kept."""
    kept_features = None if seen.clip_features is None else tuple(some[keep_R] for some in seen.clip_features)
    judged = None if kept_features is None else cosines(kept_features[0], kept_features[1])
    right = None if seen.verdicts is None else rate(seen.verdicts[keep_R])
    found = BestOfN(
        captions=int(keep_R.sum()),
        curve=[] if judged is None and right is None else [Point(rank=GIVEN, n=1, judge=judged, right=right)],
        recalled=[] if kept_features is None else [recall(kept_features[0], kept_features[1], 1)],
    )
    if real is None or found.captions < LEAST_FOR_DISTANCE:
        return found
    measured: dict[float, Distances] = {}
    for radius, of_radius in seen.features.items():
        reference = real.at(radius, kept=kept)
        assert reference is not None
        logits = of_radius["logits"][keep_R] if "logits" in of_radius else None
        measured[radius] = distances(of_radius["features"][keep_R], reference, logits, progress=next(each))
    by_n = {1: measured[0]} if 0 in measured else {}
    return replace(found, distances=by_n, blurred=measured if len(measured) > 1 else {})


def _features(
    network: PictureNetwork, files: Sequence[Path], radii: Sequence[float], progress: OnProgress
) -> dict[float, dict[str, Tensor]]:
    """Return what the network makes of pictures at each radius."""
    n = len(files)

    def at(radius: float, told: OnProgress) -> dict[str, Tensor]:
        return network(map(open_image, files), radius, lambda done: told(done, n))

    return {radius: at(radius, part_of(progress, i * n, len(radii) * n)) for i, radius in enumerate(radii)}


def _embedded(clip: CLIP, files: Sequence[Path]) -> Tensor:
    """Return unit features of pictures of any sizes, float32 (B,E) on the CPU."""
    return torch.cat([embed_images(clip, to_tensor(open_image(file))[None]) for file in files]).cpu()


def _reference_of(real: Real | None) -> dict[str, Any] | None:
    """Return where the reference comes from, as JSON values that are the same whether it was in the cache or not."""
    if real is None:
        return None
    profile = real.network.profile
    own = {**real.network.identity(), "crop": profile.crop, "published_against": profile.reference}
    pictures = real.pictures.hash if isinstance(real.pictures, RealPictures) else real.pictures.note
    return {**own, "pictures": pictures}


def _reference_lines(real: Real | None) -> list[str]:
    if real is None:
        return ["no real pictures to compare with: no distances"]
    reference = real.at(0)
    assert reference is not None
    profile = real.network.profile
    radii = ", ".join(f"{radius:g}" for radius in real.radii)
    return [
        f"profile {profile.name}: {real.network.net.name}, weights {real.network.net.hash[:8]}, crop {profile.crop}, "
        f"blur {radii}",
        reference.note,
    ]
