"""`dalle edit`: draws any part of a picture anew, so that it fits the caption and what is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.best_of_n import check_caption
from dalle.budget import OnProgress
from dalle.cli.editing.redrawing import Drawn, Redrawing
from dalle.editing.regions import Region
from dvae.images import open_image


@dataclass(frozen=True, kw_only=True)
class Edit(Redrawing):
    """Draw a part of a picture anew, so that it fits a caption and all that is kept."""

    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION", help_behavior_hint="")]
    """What the whole picture should show."""
    mask: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")]
    """A picture of the same proportions: transparent, or white, where it is drawn anew."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/edits")
    """Folder for a folder of PNGs, sheet.png and results.jsonl."""

    def run(self) -> None:
        """Sample, rank and write the pictures."""
        check_caption(self.caption)
        self.check()
        image, mask = open_image(self.picture), open_image(self.mask, keep_alpha=True)
        pipe = self.compute.load(self.bundle)
        if not Region.of(image, mask, pipe.dvae.config.image_size).is_new.any():
            raise ValueError(
                f"{self.mask} has nothing transparent or white in the middle square, which the bundle sees: "
                "make transparent (alpha 0), or white, what is to be drawn anew"
            )
        chosen = self.sampling.of(pipe.defaults)

        def draw(batch_size: int, progress: OnProgress) -> Drawn:
            edited = pipe.edit(
                image,
                mask,
                self.caption,
                n=self.n,
                keep=self.keep,
                seed=self.seed,
                settings=chosen,
                batch_size=batch_size,
                progress=progress,
            )
            return Drawn(
                result=edited,
                before=[("original", edited.region.original()), ("drawn anew", edited.region.shown())],
                settings={"mask": str(self.mask), "original_seam": edited.region.original_seam},
                each=[{"seam": seam} for seam in edited.seams.tolist()],
                told=f"across the border pixels differ by {float(edited.seams.mean()):.1f} of 255; "
                f"{edited.region.original_seam:.1f} in the picture as it was",
            )

        self.write(self.out, pipe, chosen, draw)
