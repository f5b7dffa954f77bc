"""`dalle generate`: pictures for captions, the best of many candidates."""

import dataclasses
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from dalle.best_of_n import Request, Result
from dalle.cli.command import resolve_device
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Device, Flag
from dalle.cli.start import age_s
from dalle.data.bundle import Precision
from dalle.output.progress import part_of, progress_bar
from dalle.output.results import ResultWriter
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.output.text import counted, duration, printable
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking, Sampling, SamplingDefaults
from dvae.images import open_image, to_image
from storage.text import decode_text, is_visible, lines_of

logger = logging.getLogger(__name__)

PAPER_KEEP_SHARE = 15 / 32
"""Rows that are kept by default when completing, of all: 15 of 32 in the paper."""
EARLY_ABANDON_NOTE = "half of every batch was dropped half-finished: not the best of n whole candidates"
"""In the metadata of pictures."""
UNITS = {"B": 1} | {
    f"{prefix}{unit}": factor**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, factor in (("B", 1000), ("IB", 1024))
}
"""Of memory, in bytes."""
SHEET_CAPTIONS = 100
"""Captions on the contact sheet, which would otherwise grow without limit."""
AS_THE_BUNDLE = "(default: as the bundle says)"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How candidates are sampled and ranked."""

    temperature: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=AS_THE_BUNDLE)] = None
    """Below 1 the pictures are less varied; 0 always takes the likeliest token."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=AS_THE_BUNDLE)] = None
    """Sample from the k likeliest tokens only; as many as there are for all."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=AS_THE_BUNDLE)] = None
    """Sample from the likeliest tokens that together have this probability only; 1 for all."""
    guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=AS_THE_BUNDLE)] = None
    """Above 1 follows the caption more closely, at twice the computation; 1 leaves it off."""
    rank: Annotated[
        Ranking | None, tyro.conf.arg(metavar="{clip,likelihood,both}", help_behavior_hint=AS_THE_BUNDLE)
    ] = None
    """Best first by CLIP's score, by the transformer's log-likelihood, or by the mean of the places in both."""
    paper_sampling: Flag = False
    """Sample and rank as in the paper, whatever the bundle says: temperature 1, all tokens, no guidance, by CLIP."""

    def of(self, defaults: SamplingDefaults) -> SamplingDefaults:
        """Return a bundle's settings with these options in their place.

        Raises:
            ValueError: an option is out of range, or stands beside --paper-sampling.
        """
        options = {name: value for name, value in vars(self).items() if name != "paper_sampling"}
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if self.paper_sampling and given:
            raise ValueError(
                f"--paper-sampling is {SamplingDefaults()}: leave out {' and '.join(given)}, or --paper-sampling"
            )
        return SamplingDefaults() if self.paper_sampling else defaults.updated(**options)


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """How a given picture is completed."""

    image: Annotated[Path | None, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")] = None
    """A picture whose top is kept and whose rest is made new."""
    keep_rows: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 15 of 32, as in the paper)")
    ] = None
    """Rows of tokens of that picture to keep."""

    def open(self) -> Image.Image | None:
        """Open the picture, if there is one.

        Raises:
            ValueError: rows without a picture, or not a picture.
        """
        if self.image is not None:
            return open_image(self.image)
        if self.keep_rows is not None:
            raise ValueError(f"--keep-rows is {self.keep_rows}, but no picture is given: add --image PICTURE")
        return None

    def rows(self, grid: int) -> int:
        """Return how many of `grid` rows are kept."""
        return self.keep_rows if self.keep_rows is not None else int(grid * PAPER_KEEP_SHARE)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Speed and memory."""

    device: Device = "auto"
    precision: Precision = "fp32"
    """bf16 is faster; in fp32 candidates do not depend on the batch size."""
    compile: Flag = False
    """Compile sampling and decoding on a CPU: takes a minute at first, worth it for many candidates of large models."""
    memory: Annotated[
        str | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: 2GiB; on a GPU half of what is free)")
    ] = None
    """Memory that a batch may take, like 4GB or 512MiB."""
    batch_size: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as many as fit the memory)")
    ] = None
    """Candidates sampled at the same time."""

    def load(self, bundle: Path) -> Pipeline:
        """Load a bundle."""
        return Pipeline.load(
            bundle,
            resolve_device(self.device),
            precision=self.precision,
            memory=None if self.memory is None else n_bytes(self.memory),
            compile=self.compile,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateComputeOptions(ComputeOptions):
    """Speed and memory."""

    early_abandon: Flag = False
    """Drop the half of each batch that fits worse at half of its rows: faster, but it changes the distribution."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample pictures for captions and keep the best by CLIP, by likelihood or by both."""

    captions: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION...", help_behavior_hint="")
    ] = ()
    """What the pictures should show; several captions are several sets of pictures."""
    captions_file: Annotated[Path | None, tyro.conf.arg(name="captions", metavar="FILE", help_behavior_hint="")] = None
    """A text file with more captions, one on each line, in UTF-8."""
    bundle: Bundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """Candidates sampled for each caption."""
    keep: int = 8
    """How many of them to keep, best first."""
    seed: int = 0
    """Same seed, same pictures."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/samples")
    """Folder for a folder of PNGs per caption, sheet.png and results.jsonl."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    completion: tyro.conf.OmitArgPrefixes[CompletionOptions] = CompletionOptions()
    compute: tyro.conf.OmitArgPrefixes[GenerateComputeOptions] = GenerateComputeOptions()

    def run(self) -> None:
        """Sample, rank and write the pictures, caption by caption."""
        requests = [
            Request(caption=caption, n=self.n, keep=self.keep, early_abandon=self.compute.early_abandon)
            for caption in self._all_captions()
        ]
        self.sampling.of(SamplingDefaults()).sampling(self.seed)  # raises for wrong options before a model is loaded
        image = self.completion.open()
        pipe = self.compute.load(self.bundle)
        chosen = self.sampling.of(pipe.defaults)
        sampling = chosen.sampling(self.seed)
        keep_rows, prefix = None, None
        if image is not None:
            keep_rows = self.completion.rows(pipe.dalle.config.grid)
            prefix = pipe.prefix(image, keep_rows)
        # once, so that it is the same for all captions whatever memory is free later
        batch_size = self.compute.batch_size
        if batch_size is None:
            early_abandon = self.compute.early_abandon
            batch_size = pipe.default_batch_size(self.n, guided=sampling.is_guided, early_abandon=early_abandon)
        settings = self._settings(sampling, keep_rows, batch_size)
        sections: list[Section] = []
        started_at = time.monotonic()
        with ResultWriter(self.out, age_s()) as writer:
            logger.info("sampling at %s", chosen)
            try:
                with progress_bar("candidates") as progress:
                    for i, request in enumerate(requests):
                        result = pipe.best(
                            request,
                            sampling,
                            rank=chosen.rank,
                            prefix=prefix,
                            batch_size=batch_size,
                            progress=part_of(progress, i * self.n, len(requests) * self.n),
                        )
                        writer.add(result, settings, pipe.hashes)
                        if i < SHEET_CAPTIONS:
                            sections.append(section_of(result))
            except BaseException:
                with suppress(OSError):  # the disk may be what failed
                    self._write_sheet(sections, chosen, len(requests))
                raise
            elapsed_s = time.monotonic() - started_at
            self._write_sheet(sections, chosen, len(requests))
        pictures, candidates = len(requests) * self.keep, len(requests) * self.n
        print(
            f"{counted(pictures, 'picture')} in {printable(str(self.out))}: see sheet.png and results.jsonl "
            f"({counted(candidates, 'candidate')} in {duration(elapsed_s)})"
        )

    def _write_sheet(self, sections: Sequence[Section], chosen: SamplingDefaults, n_captions: int) -> None:
        """Write the sheet of the captions that are done, if there are any."""
        if not sections:
            return
        if len(sections) < n_captions:
            logger.info("sheet.png shows the first %d of %s", len(sections), counted(n_captions, "caption"))
        path = self.out / "sheet.png"
        if path.exists():
            logger.info("replaced the sheet.png of an earlier run")
        save_png(contact_sheet(sections, title=self._title(chosen)), path)

    def _all_captions(self) -> list[str]:
        """Return the captions given and those in the file, each once."""
        captions = [*self.captions, *(read_captions(self.captions_file) if self.captions_file else ())]
        if not captions:
            raise ValueError('no captions: give some, as in `dalle generate "a red cube"`, or --captions FILE')
        different = list(dict.fromkeys(captions))
        if len(different) < len(captions):
            logger.info("%s left out that are given already", counted(len(captions) - len(different), "caption"))
        return different

    def _title(self, chosen: SamplingDefaults) -> str:
        abandoned = ", half of them abandoned early" if self.compute.early_abandon else ""
        return f"best {self.keep} of {self.n}{abandoned}, seed {self.seed}, {chosen}"

    def _settings(self, sampling: Sampling, keep_rows: int | None, batch_size: int) -> dict[str, Any]:
        """Return what else a picture depends on, for its metadata; without the options that are off."""
        image, compute = self.completion.image, self.compute
        depends_on_batch = compute.early_abandon or compute.precision != "fp32"
        settings = {
            **dataclasses.asdict(sampling),
            "image": None if image is None else str(image),
            "keep_rows": keep_rows,
            "precision": compute.precision,
            "early_abandon": EARLY_ABANDON_NOTE if compute.early_abandon else None,
            "batch_size": min(batch_size, self.n) if depends_on_batch else None,
        }
        return {name: value for name, value in settings.items() if value is not None}


def n_bytes(size: str) -> int:
    """Return how many bytes a size like "4GB", "1.5 GiB" or "512mib" is.

    Raises:
        ValueError: it is not a number above 0 with a unit.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([a-z]+)", size.strip(), re.IGNORECASE)
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise ValueError(f"the memory {size!r} is not a number with a unit: give something like 4GB, 1.5GiB or 512MB")
    return int(float(match[1]) * factor)


def read_captions(file: Path) -> list[str]:
    """Read the captions of a text file, one on each line; lines with nothing to see are left out (logged).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 (or UTF-16 with its mark), a line holds a NUL, or there are no captions.
    """
    if not file.exists() or file.is_dir():  # a pipe is read as well
        raise FileNotFoundError(f"no captions at {file}: expected a text file with one caption on each line")
    data = file.read_bytes()
    try:
        lines = lines_of(decode_text(data))
    except UnicodeDecodeError as error:
        number = len(re.findall(rb"\r\n|\n|\r", data[: error.start])) + 1
        raise ValueError(f"{file}, line {number} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(f"{file}, line {number} holds a NUL, as UTF-16 text and binary files do: save it as UTF-8")
    captions = [line.strip() for line in lines if is_visible(line)]
    if not captions:
        raise ValueError(f"no captions in {file}: expected one on each line")
    if len(captions) < len(lines):
        n_empty = counted(len(lines) - len(captions), "empty line")
        logger.info("%s in %s; %s left out", counted(len(captions), "caption"), file, n_empty)
    return captions


def section_of(result: Result) -> Section:
    """Return the pictures of a caption for the contact sheet."""
    numbers = zip(result.candidates, result.scores.tolist(), result.log_likelihoods.tolist(), strict=True)
    labels = [f"#{k}  {score:.3f}  {log_likelihood:.0f} nats" for k, score, log_likelihood in numbers]
    return Section(result.caption, [to_image(image) for image in result.images], labels)
