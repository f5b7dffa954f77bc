"""`dalle variations`: draws a share of a picture's tokens anew, from fine to coarse."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.best_of_n import check_caption
from dalle.budget import OnProgress
from dalle.cli.editing.redrawing import Drawn, Redrawing
from dalle.editing.variations import check_strength, usable_settings
from dvae.images import open_image, to_image


@dataclass(frozen=True, kw_only=True)
class Variations(Redrawing):
    """Draw a share of a picture anew, from fine to coarse, so that it fits all that is kept, and a caption if given."""

    caption: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[CAPTION]", help_behavior_hint="(default: none)")
    ] = ""
    """What the picture shows; without, candidates are ranked by likelihood."""
    strength: float = 0.5
    """Share of the picture's tokens that is drawn anew: 0 is the reconstruction, 1 a new sample of the caption."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/variations")
    """Folder for a folder of PNGs, sheet.png and results.jsonl."""

    def run(self) -> None:
        """Sample, rank and write the pictures."""
        if self.caption:
            check_caption(self.caption)
        elif self.sampling.rank in ("clip", "both"):
            raise ValueError(
                f"--rank {self.sampling.rank} needs a caption for CLIP to compare the pictures with, but none was "
                "given: give one after the picture, or --rank likelihood"
            )
        elif self.sampling.guidance not in (None, 1):
            raise ValueError(
                f"--guidance {self.sampling.guidance:g} needs a caption to follow, but none was given: give one after "
                "the picture, or leave --guidance out"
            )
        self.check()
        check_strength(self.strength)
        image = open_image(self.picture)
        pipe = self.compute.load(self.bundle)
        chosen = usable_settings(self.sampling.of(pipe.defaults), self.caption)

        def draw(batch_size: int, progress: OnProgress) -> Drawn:
            varied = pipe.variations(
                image,
                self.caption,
                n=self.n,
                keep=self.keep,
                strength=self.strength,
                seed=self.seed,
                settings=chosen,
                batch_size=batch_size,
                progress=progress,
            )
            changed = sum(varied.n_changed) / len(varied.n_changed)
            return Drawn(
                result=varied,
                before=[
                    ("original", to_image(varied.pixels)),
                    ("reconstruction", to_image(varied.reconstruction)),
                    ("drawn anew", varied.shown()),
                ],
                settings={"strength": self.strength},
                each=[{"changed_tokens": n} for n in varied.n_changed],
                told=f"of those drawn anew, {changed:.1f} are other tokens than the picture's, on average",
            )

        self.write(self.out, pipe, chosen, draw)
