"""`dalle reconstruct` with several tokenizers: measures them on the same pictures, and writes sheets and plots."""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.cli.command import resolve_device
from dalle.cli.ranking import tell_left_out
from dalle.cli.terminal import print_table, warn_of_skipped
from dalle.data.pictures import Pictures, in_batches
from dalle.evaluation.reconstruction import BATCH_SIZE, Measures
from dalle.evaluation.tokenizers.comparison import Compared, Comparison, Standing
from dalle.evaluation.tokenizers.contenders import load_contenders, model_directory
from dalle.evaluation.tokenizers.pictures import codes_sheet, comparison_sheet, worst_sheet
from dalle.evaluation.tokenizers.plots import save_rate_distortion, save_usage
from dalle.evaluation.tokenizers.rates import TOKENS_PER_CODE
from dalle.output.sheets import save_png, slug
from dalle.output.text import counted, printable
from dvae.remarks import REMARKS
from rerank import CLIP
from storage.atomic import replace_text
from storage.models.directory import directory_hash

logger = logging.getLogger(__name__)

HEADS = ("PSNR dB", "SSIM", "MS-SSIM", "codes", "of", "perplexity", "bits raw", "entropy", "transformer", "bits/pixel")
TOLD_EVERY_S = 10.0
"""Seconds between two notes of how far it is."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a comparison is asked for."""

    tokenizers: tuple[Path, ...]
    """Directories of tokenizers or bundles."""
    clip: Path | None
    """Directory of a CLIP or a bundle, for the distance of its features; None for no distance."""
    size: int | None
    """Side in pixels at which all tokenizers encode; None for each at its own."""
    sheet_limit: int
    """Pictures on the sheet at most."""
    codes: bool
    """Draw what codes draw and where they are used."""
    out: Path
    """Folder of what is written; it is there."""
    device: str


def compare(pictures: Pictures, choices: Choices) -> None:
    """Print a table with a line for each tokenizer, and write sheets, plots and comparison.json."""
    device = resolve_device(choices.device)
    contenders = load_contenders(choices.tokenizers, device=device, size=choices.size)
    clip, clip_name = None, ""
    if choices.clip is not None:
        directory = model_directory(choices.clip, "clip")
        clip, clip_name = CLIP.load(directory).to(device), f"FD-own-clip {directory_hash(directory)[:8]}"
    comparison = Comparison(contenders, clip=clip)
    _tell_sizes(comparison)
    shown = _go_through(comparison, pictures, choices.sheet_limit)
    tell_left_out(pictures.left_out)
    warn_of_skipped(pictures.skipped, pictures.problems)
    REMARKS.log_totals()
    standings = comparison.standings()
    _print(standings, comparison, clip_name)
    names = [contender.name for contender in contenders]
    out = choices.out
    save_png(comparison_sheet(shown, names), out / "reconstructions.png")
    save_png(worst_sheet(comparison.worst, names), out / "worst.png")
    plots = [out / f"rate-distortion.{ending}" for ending in ("svg", "png")]
    save_rate_distortion(standings, plots, distance_name=clip_name)
    written = ["comparison.json", "reconstructions.png", "worst.png", "rate-distortion.svg and .png"]
    if choices.codes:
        save_usage(standings, out / "codes.png")
        for one in standings:
            save_png(codes_sheet(one), out / f"codes-{slug(one.contender.name)}.png")
        written.append("codes.png and codes-….png")
    report = _report(comparison, standings, clip_name)
    report |= {"skipped": pictures.skipped, "left_out": +pictures.left_out}
    replace_text(out / "comparison.json", json.dumps(report, indent=2))
    n = counted(len(comparison.names), "picture")
    print(f"{n}, {counted(len(standings), 'tokenizer')}: see {', '.join(written)} in {printable(str(out))}")


def _go_through(comparison: Comparison, pictures: Pictures, limit: int) -> list[Compared]:
    """Compare on all pictures; returns the first `limit`."""
    shown: list[Compared] = []
    told = time.monotonic()
    for batch in in_batches(pictures, BATCH_SIZE):
        found = comparison.add(batch, pictures.captions)
        shown += found[: limit - len(shown)]
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            logger.info("%s compared", counted(len(comparison.names), "picture"))
    return shown


def _tell_sizes(comparison: Comparison) -> None:
    sizes = {contender.size for contender in comparison.contenders}
    if len(sizes) > 1:
        reads = ", ".join(f"{contender.name} {contender.size}" for contender in comparison.contenders)
        logger.info(
            "each reads pictures at its own size (%s) and is measured at %d pixels, enlarged where it is smaller",
            reads,
            comparison.size,
        )


def _print(standings: list[Standing], comparison: Comparison, clip_name: str) -> None:
    heads = [*HEADS, *([clip_name] if clip_name else []), "tokenizer"]
    print_table(heads, [_row(one, has_distance=bool(clip_name)) for one in standings])
    n = len(comparison.names)
    if any(one.rates.transformer is not None for one in standings):
        cut = "".join(f"; {one.contender.name} cut {one.n_cut:,} of them" for one in standings if one.n_cut)
        print(f"bits under the transformer: given the caption for {comparison.n_captions:,} of {n:,} pictures{cut}")
    found = [one.distance for one in standings if one.distance is not None]
    if found:
        floor = "none, of fewer than 4 pictures" if found[0].floor is None else f"{found[0].floor:.4g} (n={n // 2})"
        note = "" if found[0].note is None else f"; {found[0].note}"
        print(f"{clip_name} (n={found[0].n}): floor, two halves of the originals, {floor}{note}")
    elif clip_name:
        logger.warning("no distance of features: it needs at least 2 pictures, there is 1")
    few = [one.contender.name for one in standings if one.tokens.numel() < TOKENS_PER_CODE * _vocabulary(one)]
    if few:
        logger.warning(
            "there are fewer than %d tokens for each code of %s: codes used, perplexity and entropy are too low; "
            "give more pictures",
            TOKENS_PER_CODE,
            ", ".join(few),
        )


def _vocabulary(one: Standing) -> int:
    return one.contender.codec.config.vocab_size


def _row(one: Standing, *, has_distance: bool) -> list[str]:
    mean, rates = one.mean, one.rates
    cells = [f"{mean.psnr:.2f}", f"{mean.ssim:.4f}", "-" if mean.ms_ssim is None else f"{mean.ms_ssim:.4f}"]
    cells += [f"{rates.usage.used:,}", f"{_vocabulary(one):,}", f"{rates.usage.perplexity:.1f}"]
    cells += ["-" if bits is None else f"{bits:,.0f}" for bits in (rates.raw, rates.entropy, rates.transformer)]
    cells.append(f"{mean.bits_per_pixel:.3f}")
    if has_distance:
        cells.append("-" if one.distance is None else f"{one.distance.distance:.4g}")
    return [*cells, one.contender.name]


def _report(comparison: Comparison, standings: list[Standing], clip_name: str) -> dict[str, Any]:
    """Return everything that was found, for JSON."""
    return {
        "size": comparison.size,
        "n": len(comparison.names),
        "n_captions": comparison.n_captions,
        "distance": clip_name or None,
        "tokenizers": [_tokenizer_report(one, comparison) for one in standings],
    }


def _tokenizer_report(one: Standing, comparison: Comparison) -> dict[str, Any]:
    contender, rates = one.contender, one.rates
    return {
        "name": contender.name,
        "hash": contender.hash,
        "size": contender.size,
        "downsampling": contender.codec.config.downsampling,
        "codes": _vocabulary(one),
        "mean": finite(one.mean),
        "codes_used": rates.usage.used,
        "perplexity": rates.usage.perplexity,
        "tokens": rates.tokens,
        "captions_cut": one.n_cut,
        "bits": {"raw": rates.raw, "entropy": rates.entropy, "transformer": rates.transformer},
        "bits_per_pixel": rates.per_pixel(comparison.size**2),
        "distance": None if one.distance is None else dataclasses.asdict(one.distance),
        "pictures": [
            {"name": name, **finite(measures)} for name, measures in zip(comparison.names, one.measures, strict=True)
        ],
    }


def finite(measures: Measures) -> dict[str, float | None]:
    """Return the measures for JSON, which has no infinity, such as the PSNR of an exact copy."""
    values = dataclasses.asdict(measures)
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
