"""`dalle edit`: draws any part of a picture anew, so that it fits the caption and what is kept."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from dalle.best_of_n import Request
from dalle.cli.generate import ComputeOptions, SamplingOptions, section_of
from dalle.cli.options import DEFAULT_BUNDLE, Bundle
from dalle.cli.start import age_s
from dalle.editing.edit import Edited
from dalle.editing.regions import open_mask
from dalle.output.progress import progress_bar
from dalle.output.results import ResultWriter
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.output.text import counted, duration, printable
from dalle.sampling import SamplingDefaults
from dvae.images import open_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Draw a part of a picture anew, so that it fits a caption and all that is kept."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")]
    """The picture; it is resized and cropped to the bundle's size."""
    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION", help_behavior_hint="")]
    """What the whole picture should show."""
    mask: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")]
    """A picture of the same proportions: transparent, or white, where it is drawn anew."""
    bundle: Bundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """Candidates, which are sampled together."""
    keep: int = 8
    """How many of them to keep at most, best first."""
    seed: int = 0
    """Same seed, same pictures."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/edits")
    """Folder for a folder of PNGs, sheet.png and results.jsonl."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> None:
        """Sample, rank and write the pictures."""
        request = Request(caption=self.caption, n=self.n, keep=self.keep)
        self.sampling.of(SamplingDefaults()).sampling(self.seed)  # raises for wrong options before a model is loaded
        image, mask = open_image(self.picture), open_mask(self.mask)
        pipe = self.compute.load(self.bundle)
        chosen = self.sampling.of(pipe.defaults)
        batch_size = self.compute.batch_size
        if batch_size is None:
            batch_size = pipe.default_batch_size(request.n, guided=chosen.guidance != 1)
        started_at = time.monotonic()
        with ResultWriter(self.out, age_s()) as writer:
            logger.info("sampling at %s", chosen)
            with progress_bar("candidates") as progress:
                edited = pipe.edit(
                    image,
                    mask,
                    request.caption,
                    n=request.n,
                    keep=request.keep,
                    seed=self.seed,
                    settings=chosen,
                    batch_size=batch_size,
                    progress=progress,
                )
            seams = [{"seam": seam} for seam in edited.seams.tolist()]
            writer.add(edited, self._settings(chosen, edited, min(batch_size, self.n)), pipe.hashes, seams)
            save_png(self._sheet(edited, chosen), self.out / "sheet.png")
        elapsed_s = time.monotonic() - started_at
        n_tokens = pipe.dalle.config.stream.n_image
        print(
            f"{counted(len(edited.candidates), 'picture')} in {printable(str(self.out))}: see sheet.png and "
            f"results.jsonl ({edited.n_unknown} of {counted(n_tokens, 'token')} drawn anew; "
            f"{counted(self.n, 'candidate')} in {duration(elapsed_s)}, {edited.n_different:,} different ones)\n"
            f"across the border pixels differ by {float(edited.seams.mean()):.1f} of 255; "
            f"{edited.region.original_seam:.1f} in the picture as it was"
        )

    def _sheet(self, edited: Edited, chosen: SamplingDefaults) -> Image.Image:
        section = section_of(edited)
        images = [edited.region.original(), edited.region.shown(), *section.images]
        labels = ["original", "drawn anew", *section.labels]
        title = f"best {len(edited.candidates)} of {self.n}, seed {self.seed}, {chosen}"
        return contact_sheet([Section(edited.caption, images, labels)], title=title)

    def _settings(self, chosen: SamplingDefaults, edited: Edited, batch_size: int) -> dict[str, Any]:
        """Return what else the pictures depend on, for their metadata."""
        return {
            **{k: v for k, v in dataclasses.asdict(chosen.sampling(self.seed)).items() if v is not None},
            "image": str(self.picture),
            "mask": str(self.mask),
            "n": self.n,
            "batch_size": batch_size,
            "unknown_tokens": edited.n_unknown,
            "original_seam": edited.region.original_seam,
            "precision": self.compute.precision,
        }
