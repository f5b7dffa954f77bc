"""What `dalle edit` and `dalle variations` share: options, and the folder that they write."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from dalle.best_of_n import check_keep
from dalle.budget import OnProgress
from dalle.cli.computing import ComputeOptions
from dalle.cli.generate import SamplingOptions, section_of
from dalle.cli.options import DEFAULT_BUNDLE, Bundle
from dalle.cli.start import age_s
from dalle.editing.redraw import Redrawn
from dalle.output.progress import progress_bar
from dalle.output.results import ResultWriter
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.output.text import counted, duration, printable
from dalle.pipeline import Pipeline
from dalle.sampling import SamplingDefaults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn, and what is to be said and shown of it."""

    result: Redrawn
    before: Sequence[tuple[str, Image.Image]]
    """Pictures that begin the sheet, with their labels."""
    settings: dict[str, Any]
    """What else the pictures depend on, for their metadata."""
    each: Sequence[dict[str, Any]]
    """The same of each picture."""
    told: str
    """The last line that is printed."""


@dataclass(frozen=True, kw_only=True)
class Redrawing:
    """Options of what starts from a picture."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")]
    """The picture; it is resized and cropped to the bundle's size."""
    bundle: Bundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """Candidates, which are sampled together."""
    keep: int = 8
    """How many of them to keep at most, best first."""
    seed: int = 0
    """Same seed, same pictures."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def check(self) -> None:
        """Raise ValueError for wrong options before a model is loaded."""
        check_keep(self.keep, self.n)
        self.sampling.of(SamplingDefaults()).sampling(self.seed)

    def write(
        self,
        out: Path,
        pipe: Pipeline,
        chosen: SamplingDefaults,
        draw: Callable[[int, OnProgress], Drawn],
    ) -> None:
        """Draw, write the pictures, the sheet and results.jsonl, and say so.

        Args:
            out: the folder.
            pipe: the bundle.
            chosen: settings of sampling and ranking.
            draw: given the batch size, and what is told of progress.
        """
        batch_size = self.compute.batch_size
        if batch_size is None:
            batch_size = pipe.default_batch_size(self.n, guided=chosen.guidance != 1)
        started_at = time.monotonic()
        with ResultWriter(out, age_s()) as writer:
            logger.info("sampling at %s", chosen)
            with progress_bar("candidates") as progress:
                drawn = draw(batch_size, progress)
            result = drawn.result
            writer.add(result, self._settings(chosen, drawn, min(batch_size, self.n)), pipe.hashes, drawn.each)
            save_png(self._sheet(drawn, chosen), out / "sheet.png")
        elapsed_s = time.monotonic() - started_at
        n_tokens = pipe.dalle.config.stream.n_image
        print(
            f"{counted(len(result.candidates), 'picture')} in {printable(str(out))}: see sheet.png and "
            f"results.jsonl ({result.n_unknown} of {counted(n_tokens, 'token')} drawn anew; "
            f"{counted(self.n, 'candidate')} in {duration(elapsed_s)}, {result.n_different:,} distinct)\n"
            f"{drawn.told}"
        )

    def _sheet(self, drawn: Drawn, chosen: SamplingDefaults) -> Image.Image:
        section = section_of(drawn.result)
        labels, images = zip(*drawn.before, strict=True)
        title = f"best {len(drawn.result.candidates)} of {self.n}, seed {self.seed}, {chosen}"
        whole = Section(section.heading, [*images, *section.images], [*labels, *section.labels])
        return contact_sheet([whole], title=title)

    def _settings(self, chosen: SamplingDefaults, drawn: Drawn, batch_size: int) -> dict[str, Any]:
        return {
            **{k: v for k, v in dataclasses.asdict(chosen.sampling(self.seed)).items() if v is not None},
            "image": str(self.picture),
            "n": self.n,
            "batch_size": batch_size,
            "unknown_tokens": drawn.result.n_unknown,
            "precision": self.compute.precision,
            **drawn.settings,
        }
