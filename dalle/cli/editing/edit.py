"""`dalle edit`: draws any part of a picture anew, so that it fits the caption and what is kept."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from torch import Tensor

from dalle.best_of_n import check_caption
from dalle.budget import OnProgress
from dalle.cli.editing.redrawing import Drawn, Redrawing
from dalle.cli.unclip.options import CaptionOptions, check_only_dalle
from dalle.cli.unclip.writing import Sheet, write_pictures
from dalle.editing.regions import Region
from dalle.unclip.metadata import settings_of
from dalle.unclip.parts import kind_of
from dvae.images import open_image
from unclip.decoding import GUIDANCE


@dataclass(frozen=True, kw_only=True)
class Edit(Redrawing):
    """Draw a part of a picture anew, so that it fits a caption and all that is kept."""

    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION", help_behavior_hint="")]
    """What the whole picture should show."""
    mask: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")]
    """A picture of the same proportions: transparent, or white, where it is drawn anew."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/edits")
    """Folder for a folder of PNGs, sheet.png and results.jsonl."""
    unclip: tyro.conf.OmitArgPrefixes[CaptionOptions] = dataclasses.field(default_factory=CaptionOptions)

    def run(self) -> None:
        """Sample, rank and write the pictures."""
        check_caption(self.caption)
        self.check()
        by_unclip = kind_of(self.bundle, self.unclip.model) == "unclip"
        if by_unclip:
            check_only_dalle(vars(self.sampling) | {"compile": self.compute.compile})
        else:
            self.unclip.check_unused()
        draw = self._unclip if by_unclip else self._dalle
        draw(open_image(self.picture), open_image(self.mask, keep_alpha=True))

    def _dalle(self, image: Image.Image, mask: Image.Image) -> None:
        """Draw by the bundle's transformer."""
        pipe = self.compute.load(self.bundle)
        self._region(image, mask, pipe.dvae.config.image_size)
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
                before=_before(edited.region),
                settings={"mask": str(self.mask), "original_seam": edited.region.original_seam},
                each=[{"seam": seam} for seam in edited.seams.tolist()],
                told=_told(edited.region, edited.seams),
            )

        self.write(self.out, pipe, chosen, draw)

    def _unclip(self, image: Image.Image, mask: Image.Image) -> None:
        """Draw by the bundle's DALL·E 2."""
        drawing = self.unclip.drawing(GUIDANCE if self.sampling.guidance is None else self.sampling.guidance)
        unclip = self.unclip.load(self.bundle, self.compute)
        region = self._region(image, mask, unclip.image_size)
        settings = {
            "seed": self.seed,
            "image": str(self.picture),
            "mask": str(self.mask),
            "original_seam": region.original_seam,
            **settings_of(unclip, drawing, GUIDANCE, self.n, batch_size=self.compute.batch_size, of_captions=True),
        }
        edited = write_pictures(
            self.out,
            lambda progress: unclip.edit(
                image,
                mask,
                self.caption,
                n=self.n,
                keep=self.keep,
                seed=self.seed,
                drawing=drawing,
                batch_size=self.compute.batch_size,
                progress=progress,
            ),
            Sheet(
                title=f"best {self.keep} of {self.n}, seed {self.seed}, {drawing}, ranked by CLIP",
                before=_before(region),
                label=lambda said: f"#{said['candidate']}  {said['score']:.3f}",
            ),
            settings,
            unclip.hashes,
        )
        print(_told(region, edited.seams))

    def _region(self, image: Image.Image, mask: Image.Image, side: int) -> Region:
        """Return what is drawn anew, of pictures of `side` pixels; raises ValueError if that is nothing."""
        region = Region.of(image, mask, side)
        if not region.is_new.any():
            raise ValueError(
                f"{self.mask} has nothing transparent or white in the middle square, which the bundle sees: "
                "make transparent (alpha 0), or white, what is to be drawn anew"
            )
        return region


def _before(region: Region) -> list[tuple[str, Image.Image]]:
    """Return the pictures that begin the sheet, with their labels."""
    return [("original", region.original()), ("drawn anew", region.shown())]


def _told(region: Region, seams: Tensor) -> str:
    return (
        f"across the border pixels differ by {float(seams.mean()):.1f} of 255; "
        f"{region.original_seam:.1f} in the picture as it was"
    )
