"""`dalle generate`: pictures for captions, the best of many candidates."""

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from dalle.best_of_n import Ranked, Request, Result
from dalle.budget import OnProgress
from dalle.cli.computing import ComputeOptions
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Flag
from dalle.cli.start import age_s
from dalle.cli.unclip.options import CaptionOptions, check_only_dalle
from dalle.output.progress import part_of, progress_bar
from dalle.output.results import ResultWriter
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.output.text import counted, duration, printable
from dalle.sampling import Ranking, Sampling, SamplingDefaults
from dalle.unclip.metadata import settings_of
from dalle.unclip.parts import kind_of
from dvae.images import open_image, to_image
from storage.text import decode_text, is_visible, lines_of
from unclip.decoding import GUIDANCE

logger = logging.getLogger(__name__)

PAPER_KEEP_SHARE = 15 / 32
"""Rows that are kept by default when completing, of all: 15 of 32 in the paper."""
EARLY_ABANDON_NOTE = "half of every batch was dropped half-finished: not the best of n whole candidates"
"""In the metadata of pictures."""
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
class GenerateComputeOptions(ComputeOptions):
    """Speed and memory."""

    early_abandon: Flag = False
    """Drop the half of each batch that fits worse at half of its rows: faster, but it changes the distribution."""


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """What draws captions."""

    best: Callable[[Request, OnProgress], Ranked]
    chosen: str
    """Its settings, in words."""
    settings: Mapping[str, Any]
    """What else pictures depend on, for their metadata."""
    hashes: Mapping[str, str]
    """Of the models."""


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
    unclip: tyro.conf.OmitArgPrefixes[CaptionOptions] = dataclasses.field(default_factory=CaptionOptions)
    compute: tyro.conf.OmitArgPrefixes[GenerateComputeOptions] = GenerateComputeOptions()

    def run(self) -> None:
        """Sample, rank and write the pictures, caption by caption."""
        requests = [
            Request(caption=caption, n=self.n, keep=self.keep, early_abandon=self.compute.early_abandon)
            for caption in self._all_captions()
        ]
        drawer = self._unclip() if kind_of(self.bundle, self.unclip.model) == "unclip" else self._dalle()
        sections: list[Section] = []
        started_at = time.monotonic()
        with ResultWriter(self.out, age_s()) as writer:
            logger.info("sampling at %s", drawer.chosen)
            try:
                with progress_bar("candidates") as progress:
                    for i, request in enumerate(requests):
                        result = drawer.best(request, part_of(progress, i * self.n, len(requests) * self.n))
                        writer.add(result, drawer.settings, drawer.hashes)
                        if i < SHEET_CAPTIONS:
                            sections.append(section_of(result))
            except BaseException:
                with suppress(OSError):  # the disk may be what failed
                    self._write_sheet(sections, drawer.chosen, len(requests))
                raise
            elapsed_s = time.monotonic() - started_at
            self._write_sheet(sections, drawer.chosen, len(requests))
        pictures, candidates = len(requests) * self.keep, len(requests) * self.n
        print(
            f"{counted(pictures, 'picture')} in {printable(str(self.out))}: see sheet.png and results.jsonl "
            f"({counted(candidates, 'candidate')} in {duration(elapsed_s)})"
        )

    def _dalle(self) -> Drawer:
        """Return the bundle's transformer, which samples image tokens."""
        self.unclip.check_unused()
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

        def best(request: Request, progress: OnProgress) -> Ranked:
            return pipe.best(
                request, sampling, rank=chosen.rank, prefix=prefix, batch_size=batch_size, progress=progress
            )

        settings = self._settings(sampling, keep_rows, batch_size)
        return Drawer(best=best, chosen=str(chosen), settings=settings, hashes=pipe.hashes)

    def _unclip(self) -> Drawer:
        """Return the bundle's DALL·E 2."""
        compute = self.compute
        given = vars(self.sampling) | vars(self.completion)
        check_only_dalle(given | {"compile": compute.compile, "early_abandon": compute.early_abandon})
        drawing = self.unclip.drawing(GUIDANCE if self.sampling.guidance is None else self.sampling.guidance)
        unclip = self.unclip.load(self.bundle, compute)
        batch_size = compute.batch_size
        if batch_size is None:
            batch_size = unclip.default_batch_size(self.n, drawing, of_captions=True)

        def best(request: Request, progress: OnProgress) -> Ranked:
            return unclip.best(request, drawing, seed=self.seed, batch_size=batch_size, progress=progress)

        told = settings_of(unclip, drawing, GUIDANCE, self.n, batch_size=compute.batch_size, of_captions=True)
        settings = {"seed": self.seed, **told}
        chosen = f"{drawing}, {settings['prior_steps']} of the prior, ranked by CLIP"
        return Drawer(best=best, chosen=chosen, settings=settings, hashes=unclip.hashes)

    def _write_sheet(self, sections: Sequence[Section], chosen: str, n_captions: int) -> None:
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

    def _title(self, chosen: str) -> str:
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


def section_of(result: Ranked) -> Section:
    """Return the pictures of a caption for the contact sheet."""
    labels = [f"#{k}  {score:.3f}" for k, score in zip(result.candidates, result.scores.tolist(), strict=True)]
    if isinstance(result, Result):
        nats = result.log_likelihoods.tolist()
        labels = [f"{label}  {of_one:.0f} nats" for label, of_one in zip(labels, nats, strict=True)]
    return Section(result.caption, [to_image(image) for image in result.images], labels)
