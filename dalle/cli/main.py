"""The command line `dalle`: generate, rank, search, reconstruct, import-dvae.

Results go to files and stdout, messages to stderr. What a user can cause ends in one line and exit code 1.
How a command line is run at all is in `dalle/cli/command.py`.
"""

import dataclasses
import json
import logging
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image

from dalle.best_of_n import Request, Result, check_caption
from dalle.cli.command import run_program
from dalle.data.bundle import Precision, bundle_part
from dalle.data.pictures import Pictures, in_batches
from dalle.evaluation.reconstruction import Measures, Reconstruction, mean, reconstructions
from dalle.output.progress import Progress, duration
from dalle.output.results import ResultWriter
from dalle.output.sheets import MAX_CELL, Section, contact_sheet, save_png, side_by_side, slug
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking, Sampling, SamplingDefaults
from dalle.search import EMBEDDING_BATCH, folder_features
from dvae import DVAE
from dvae.images import open_image, to_image
from dvae.openai import import_openai
from rerank import CLIP
from rerank.score import clip_view, embed_captions, embed_images
from storage.atomic import replace_text
from storage.model_directory import directory_hash

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = Path("runs/demo")
PAPER_KEEP_SHARE = 15 / 32
"""Share of the rows that is kept by default when completing: 15 of 32 in the paper."""
EARLY_ABANDON_NOTE = "half of every batch was dropped half-finished: not the best of n whole candidates"
"""In the metadata of pictures."""
UNITS = {"B": 1} | {
    f"{prefix}{unit}": factor**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, factor in (("B", 1000), ("IB", 1024))
}
"""Of memory, in bytes."""
SHEET_CAPTIONS = 100
SHEET_PICTURES = 16
"""Most captions, and pictures of a ranking, on a contact sheet, which would otherwise grow without limit."""
SHOWN_REASONS = 5
MEASURE_HEADS = ("PSNR dB", "SSIM", "MS-SSIM", "bits/pixel", "codes", "picture")

Device = Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda or cuda:1; auto takes cuda if there is one.")]
Caption = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION", help="What the pictures should show.")]
PictureSources = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PICTURE...", help="Pictures, folders or shards (.tar)."),
]
Bundle = Annotated[Path, tyro.conf.arg(help="Directory with tokenizer.json, dvae/, dalle/ and clip/.")]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample pictures for captions and keep the best by CLIP, by likelihood or by both."""

    captions: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION...")] = ()
    """What the pictures should show; several captions are several sets of pictures."""
    captions_file: Annotated[Path | None, tyro.conf.arg(name="captions")] = None
    """A text file with more captions, one on each line."""
    bundle: Bundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """Candidates sampled for each caption."""
    keep: int = 8
    """How many of them to keep, best first."""
    seed: int = 0
    """Same seed, same pictures."""
    temperature: float | None = None
    """Below 1 the pictures are less varied; 0 always takes the likeliest token. By default as the bundle says, and as
    the paper does if it says nothing."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only; as many as there are for all. By default as the bundle says."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability only; 1 for all. By default as the bundle
    says."""
    guidance: float | None = None
    """Above 1 follows the caption more closely, at twice the computation; 1 is none. By default as the bundle says."""
    rank: Ranking | None = None
    """What is best: clip, what CLIP finds fits the caption best; likelihood, what the transformer finds likeliest for
    it, and only what is kept is decoded; both, the mean of the places in these two. By default as the bundle says."""
    paper_sampling: bool = False
    """Sample and rank as in the paper, whatever the bundle says: temperature 1, all tokens, no guidance, by CLIP."""
    image: Path | None = None
    """A picture whose top is kept and whose rest is made new."""
    keep_rows: int | None = None
    """Rows of tokens of that picture to keep; by default 15 of 32, as in the paper."""
    early_abandon: bool = False
    """Drop half of each batch when half of its rows are sampled: those whose unfinished pictures fit the caption worse.
    Faster, but it changes the distribution: what is kept is not the best of n whole candidates."""
    precision: Precision = "fp32"
    """bf16 is faster; in fp32 candidates do not depend on the batch size."""
    compile: bool = False
    """Compile sampling and decoding on a CPU: takes a minute at first, worth it for many candidates of large models."""
    memory: str | None = None
    """Memory that a batch may take, like 4GB or 512MiB; by default 2GiB, on a GPU half of what is free."""
    batch_size: int | None = None
    """Candidates sampled at the same time; by default as many as fit the memory."""
    out: Path = Path("runs/samples")
    """Folder for a folder of PNGs per caption, sheet.png and results.jsonl."""
    device: Device = "auto"

    def run(self) -> None:
        """Sample, rank and write the pictures, caption by caption."""
        requests = [
            Request(caption=caption, n=self.n, keep=self.keep, early_abandon=self.early_abandon)
            for caption in self._all_captions()
        ]
        self._settings_of(SamplingDefaults())  # whether the options are right, before any model is loaded
        if self.keep_rows is not None and self.image is None:
            raise ValueError(f"--keep-rows is {self.keep_rows}, but no picture is given: add --image PICTURE")
        image = open_image(self.image) if self.image is not None else None
        pipe = self._pipeline()
        chosen = self._settings_of(pipe.defaults)
        sampling = chosen.sampling(self.seed)
        keep_rows, prefix = None, None
        if image is not None:
            keep_rows = self._rows(pipe.dalle.config.grid)
            prefix = pipe.prefix(image, keep_rows)
        # once, so that it is the same for all captions whatever memory is free later
        batch_size = self.batch_size
        if batch_size is None:
            batch_size = pipe.default_batch_size(self.n, guided=sampling.is_guided, early_abandon=self.early_abandon)
        settings = self._settings(sampling, keep_rows, batch_size)
        writer = ResultWriter(self.out)
        logger.info("sampling at %s", chosen)
        sections = []
        with Progress("candidates") as progress:
            for i, request in enumerate(requests):
                result = pipe.best(
                    request,
                    sampling,
                    rank=chosen.rank,
                    prefix=prefix,
                    batch_size=batch_size,
                    progress=progress.after(i * self.n, len(requests) * self.n),
                )
                writer.add(result, settings, pipe.hashes)
                if i < SHEET_CAPTIONS:
                    sections.append(_section(result))
            elapsed_s = progress.elapsed_s()
        if len(requests) > SHEET_CAPTIONS:
            logger.info("sheet.png shows the first %d of %d captions", SHEET_CAPTIONS, len(requests))
        save_png(contact_sheet(sections, title=self._title(chosen)), self.out / "sheet.png")
        print(
            f"{len(requests) * self.keep} pictures in {self.out}: see sheet.png and results.jsonl "
            f"({len(requests) * self.n} candidates in {duration(elapsed_s)})"
        )

    def _settings_of(self, defaults: SamplingDefaults) -> SamplingDefaults:
        """Return the settings of sampling and ranking that the options make of a bundle's defaults.

        Raises:
            ValueError: an option is out of range, or stands beside --paper-sampling.
        """
        options = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "guidance", "rank")}
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if self.paper_sampling and given:
            raise ValueError(
                f"--paper-sampling is {SamplingDefaults()}: leave out {' and '.join(given)}, or --paper-sampling"
            )
        return SamplingDefaults() if self.paper_sampling else defaults.updated(**options)

    def _pipeline(self) -> Pipeline:
        return Pipeline.load(
            self.bundle,
            resolve_device(self.device),
            precision=self.precision,
            memory=None if self.memory is None else n_bytes(self.memory),
            compile=self.compile,
        )

    def _all_captions(self) -> list[str]:
        """The captions given and those in the file, each once."""
        captions = [*self.captions, *(read_captions(self.captions_file) if self.captions_file else ())]
        if not captions:
            raise ValueError('no captions: give some, as in `dalle generate "a red cube"`, or --captions FILE')
        different = list(dict.fromkeys(captions))
        if len(different) < len(captions):
            logger.info("%d captions are given more than once: each is used once", len(captions) - len(different))
        return different

    def _rows(self, grid: int) -> int:
        return self.keep_rows if self.keep_rows is not None else int(grid * PAPER_KEEP_SHARE)

    def _title(self, chosen: SamplingDefaults) -> str:
        abandoned = ", half of them abandoned early" if self.early_abandon else ""
        return f"best {self.keep} of {self.n}{abandoned}, seed {self.seed}, {chosen}"

    def _settings(self, sampling: Sampling, keep_rows: int | None, batch_size: int) -> dict[str, Any]:
        """What else a picture depends on, for its metadata; options that are off are left out."""
        settings = {
            **dataclasses.asdict(sampling),
            "image": None if self.image is None else str(self.image),
            "keep_rows": keep_rows,
            "precision": self.precision,
            "early_abandon": EARLY_ABANDON_NOTE if self.early_abandon else None,
            # without these two no candidate depends on it
            "batch_size": min(batch_size, self.n) if self.early_abandon or self.precision != "fp32" else None,
        }
        return {name: value for name, value in settings.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Score any pictures against a caption with CLIP, best first."""

    caption: Caption
    pictures: PictureSources
    bundle: Bundle = DEFAULT_BUNDLE
    clip: Path | None = None
    """Directory of a CLIP; by default the bundle's."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object per picture instead of a table."""
    out: Path | None = None
    """Folder for a contact sheet of the best; by default none is made."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the pictures with their scores."""
        check_caption(self.caption)
        pictures = Pictures(self.pictures)
        if self.out is not None:
            check_writable(self.out)
        clip = load_clip(self.clip, self.bundle, self.device)
        caption_E = embed_captions(clip, [self.caption])[0]
        ranking: list[tuple[float, str]] = []
        shown: list[tuple[float, str, Image.Image]] = []
        # pictures can be large and many: of each only what CLIP sees is held, and what the sheet shows of the best
        size = clip.config.image_size
        reduced = ((name, clip_view(image, size), thumbnail(image)) for name, image in pictures)
        for batch in in_batches(reduced, EMBEDDING_BATCH):
            scores = (embed_images(clip, torch.stack([pixels for _, pixels, _ in batch])) @ caption_E).tolist()
            for (name, _, image), score in zip(batch, scores, strict=True):
                ranking.append((score, name))
                shown.append((score, name, image))
            shown = sorted(shown, key=lambda entry: -entry[0])[:SHEET_PICTURES]
        report_skipped(pictures.skipped)
        print_ranking(sorted(ranking, key=lambda entry: -entry[0]), as_json=self.as_json)
        if self.out is not None:
            write_ranking(self.caption, shown, self.out)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the pictures of a folder that fit a caption best; what CLIP sees in them is kept in the folder."""

    caption: Caption
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Searched with the folders in it."""
    top: int = 16
    """How many pictures to show."""
    bundle: Bundle = DEFAULT_BUNDLE
    clip: Path | None = None
    """Directory of a CLIP; by default the bundle's."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object per picture instead of a table."""
    out: Path = Path("runs/search")
    """Folder for a contact sheet, named for the caption."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the best pictures with their scores, and write the sheet."""
        check_caption(self.caption)
        if self.top < 1:
            raise ValueError(f"--top is {self.top}; it must be at least 1")
        check_writable(self.out)
        clip = load_clip(self.clip, self.bundle, self.device)
        clip_hash = directory_hash(self.clip or self.bundle / "clip")
        with Progress("pictures") as progress:
            found = folder_features(clip, clip_hash, self.folder, progress=progress.update)
        report_skipped(found.unreadable)
        logger.info("%d pictures, %d of them new or changed", len(found.files), found.n_embedded)
        caption_E = embed_captions(clip, [self.caption])[0].cpu()
        scores_N, order_N = (found.features @ caption_E).sort(descending=True, stable=True)
        files = [found.files[i] for i in order_N[: self.top].tolist()]
        ranking = list(zip(scores_N.tolist(), map(str, files), strict=False))
        print_ranking(ranking, as_json=self.as_json)
        shown = [(score, name, thumbnail(open_image(Path(name)))) for score, name in ranking[:SHEET_PICTURES]]
        write_ranking(self.caption, shown, self.out)


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Show pictures beside what a dVAE makes of their tokens, and measure how close it comes."""

    pictures: PictureSources
    bundle: Bundle = DEFAULT_BUNDLE
    dvae: Path | None = None
    """Directory of a dVAE; by default the bundle's."""
    size: int | None = None
    """Pixels per side to resize and crop to; by default the dVAE's."""
    sheet_limit: int = 16
    """Most pictures on the side-by-side sheet; all are measured."""
    out: Path = Path("runs/reconstructions")
    """Folder for reconstructions.png and metrics.json."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the table, and write the sheet and the numbers."""
        if self.sheet_limit < 1:
            raise ValueError(f"--sheet-limit is {self.sheet_limit}; it must be at least 1")
        pictures = Pictures(self.pictures)
        check_writable(self.out)
        path = self.dvae if self.dvae is not None else bundle_part(self.bundle, "dvae")
        dvae = DVAE.load(path).to(resolve_device(self.device))
        size = self.size if self.size is not None else dvae.config.image_size
        measures: list[tuple[str, Measures]] = []
        shown: list[Reconstruction] = []
        for one in reconstructions(dvae, pictures, size):
            measures.append((one.name, one.measures))
            if len(shown) < self.sheet_limit:
                shown.append(one)
        report_skipped(pictures.skipped)
        means = mean([row for _, row in measures])
        print_table(MEASURE_HEADS, [_measure_row(name, row) for name, row in [*measures, ("mean", means)]])
        sheet = side_by_side(
            [one.original for one in shown],
            [one.image for one in shown],
            [f"{Path(one.name).name}\n{one.measures.psnr:.2f} dB" for one in shown],
        )
        save_png(sheet, self.out / "reconstructions.png")
        report = {
            "dvae": directory_hash(path),
            "size": size,
            "mean": _finite(means),
            "pictures": [{"name": name, **_finite(row)} for name, row in measures],
            "skipped": pictures.skipped,
        }
        text = json.dumps(report, indent=2)
        replace_text(self.out / "metrics.json", text)
        print(f"{len(measures)} pictures measured: see reconstructions.png and metrics.json in {self.out}")


@dataclass(frozen=True, kw_only=True)
class ImportDVAE:
    """Turn OpenAI's published encoder.pkl and decoder.pkl into a dVAE directory, executing nothing of them."""

    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """The published encoder.pkl."""
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")]
    """The published decoder.pkl."""
    out: Path = Path("runs/openai-dvae")
    """The directory to write."""

    def run(self) -> None:
        """Read both files and write the directory."""
        check_writable(self.out.parent)
        import_openai(self.encoder, self.decoder).save(self.out, metadata={"source": "OpenAI's published weights"})
        print(f"dVAE {directory_hash(self.out)} in {self.out}")


Commands = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Rank, tyro.conf.subcommand("rank")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    | Annotated[ImportDVAE, tyro.conf.subcommand("import-dvae")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dalle`; returns the exit code."""
    description = "Pictures from captions, and what belongs to it: ranking, searching, reconstructing."
    return run_program(Commands, lambda command: command.run(), argv, prog="dalle", description=description)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name, with "auto" for the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: give cpu, cuda, cuda:1 … or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"no device {name} here, there are {torch.cuda.device_count()} CUDA devices: give --device cpu"
        )
    return device


def n_bytes(size: str) -> int:
    """Return how many bytes a size like "4GB", "1.5 GiB" or "512mib" is.

    Raises:
        ValueError: it is no number above 0 with a unit.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([a-z]+)", size.strip(), re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise ValueError(f"the memory {size!r} is not a number with a unit: give something like 4GB, 1.5GiB or 512MB")
    return int(float(match[1]) * factor)


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and raise OSError now, not after an hour of computing, if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def load_clip(clip: Path | None, bundle: Path, device: str) -> CLIP:
    """Load a CLIP directory, by default that of the bundle."""
    return CLIP.load(clip or bundle_part(bundle, "clip")).to(resolve_device(device))


def read_captions(file: Path) -> list[str]:
    """The captions in a text file, one on each line; blank lines do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or has no captions.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no captions at {file}: expected a text file with one caption on each line")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"no captions in {file}: expected one on each line")
    return captions


def report_skipped(reasons: Sequence[str]) -> None:
    """Warn of pictures that were left out: how many, and the reasons of the first."""
    if reasons:
        more = f"; and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
        logger.warning("%d pictures were skipped: %s%s", len(reasons), "; ".join(reasons[:SHOWN_REASONS]), more)


def thumbnail(image: Image.Image) -> Image.Image:
    """A picture no larger than its place on a contact sheet."""
    small = image.copy()
    small.thumbnail((MAX_CELL, MAX_CELL))
    return small


def print_ranking(ranking: Sequence[tuple[float, str]], *, as_json: bool) -> None:
    """Print scores and names of pictures."""
    if as_json:
        for score, name in ranking:
            print(json.dumps({"score": score, "picture": name}))
    else:
        print_table(["score", "picture"], [[f"{score:.4f}", name] for score, name in ranking])


def write_ranking(caption: str, pictures: Sequence[tuple[float, str, Image.Image]], out: Path) -> None:
    """Write a contact sheet named for the caption, with (score, name, picture) in the given order."""
    images = [image for _, _, image in pictures]
    labels = [f"{score:.3f}  {Path(name).name}" for score, name, _ in pictures]
    path = out / f"{slug(caption)}.png"
    save_png(contact_sheet([Section(caption, images, labels)], columns=4), path, {"caption": caption})
    logger.info("the best %d are shown in %s", len(images), path)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: numbers to the right, and the last column, which is a name, to the left."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads) - 1)]
    for row in [heads, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


def _section(result: Result) -> Section:
    numbers = zip(result.candidates, result.scores.tolist(), result.log_likelihoods.tolist(), strict=True)
    labels = [f"#{k}  {score:.3f}  {log_likelihood:.0f} nats" for k, score, log_likelihood in numbers]
    return Section(result.caption, [to_image(image) for image in result.images], labels)


def _measure_row(name: str, measures: Measures) -> list[str]:
    ms_ssim = "-" if measures.ms_ssim is None else f"{measures.ms_ssim:.4f}"
    row = [f"{measures.psnr:.2f}", f"{measures.ssim:.4f}", ms_ssim, f"{measures.bits_per_pixel:.3f}"]
    return [*row, f"{measures.codes_used:.4g}", name]


def _finite(measures: Measures) -> dict[str, float | None]:
    """The measures for JSON, which has no infinity: the PSNR of an exact copy, for example."""
    values = dataclasses.asdict(measures)
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
