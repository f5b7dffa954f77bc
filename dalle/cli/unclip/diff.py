"""`dalle diff`: a picture, changed as one caption differs from another."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.best_of_n import check_caption
from dalle.cli.computing import DeviceOptions
from dalle.cli.options import DEFAULT_BUNDLE, UnCLIPBundle
from dalle.cli.unclip.options import DecoderOptions
from dalle.cli.unclip.writing import Sheet, write_pictures
from dalle.unclip.manipulations import check_places
from dalle.unclip.metadata import settings_of
from dalle.unclip.settings import check_share
from dvae.images import open_image, resize_and_crop


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Change a picture as one caption differs from another, further and further, by DALL·E 2."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")]
    """The picture; its centre is seen."""
    before: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE", help_behavior_hint="")]
    """What it shows; something as general as "a photo" does as well."""
    after: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER", help_behavior_hint="")]
    """What it should become."""
    bundle: UnCLIPBundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 9
    """Pictures to draw; the first is the picture, drawn again."""
    theta: float = 0.4
    """How far the last of them goes, 0.25 to 0.5 in the paper; 1 forgets the picture."""
    seed: int = 0
    """Of what is enlarged."""
    guidance: float = 1.0
    """Above 1 the pictures are clearer, and less like the one they are of."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/changed")
    """Folder for a folder of PNGs, strip.png and results.jsonl."""
    decoding: tyro.conf.OmitArgPrefixes[DecoderOptions] = dataclasses.field(default_factory=DecoderOptions)
    compute: tyro.conf.OmitArgPrefixes[DeviceOptions] = dataclasses.field(default_factory=DeviceOptions)

    def run(self) -> None:
        """Draw and write the pictures."""
        for caption in (self.before, self.after):
            check_caption(caption)
        check_share("theta", self.theta)
        check_places(self.n)
        drawing = self.decoding.drawing(self.guidance)
        image = open_image(self.picture)
        unclip = self.decoding.load(self.bundle, self.compute)
        write_pictures(
            self.out,
            lambda progress: unclip.text_diff(
                image,
                self.before,
                self.after,
                theta=self.theta,
                n=self.n,
                seed=self.seed,
                drawing=drawing,
                batch_size=self.compute.batch_size,
                progress=progress,
            ),
            Sheet(
                name="strip.png",
                title=f"before: {self.before}; {drawing}",
                before=[("original", resize_and_crop(image, unclip.image_size))],
                label=lambda said: f"theta {said['theta']:.2f}",
                columns=self.n + 1,
            ),
            {
                "seed": self.seed,
                "before": self.before,
                "eta": 0.0,
                "image": str(self.picture),
                **settings_of(unclip, drawing, 1, self.n, batch_size=self.compute.batch_size),
            },
            unclip.hashes,
        )
