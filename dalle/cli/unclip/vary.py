"""`dalle vary`: other pictures with the gist of one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.computing import DeviceOptions
from dalle.cli.options import DEFAULT_BUNDLE, UnCLIPBundle
from dalle.cli.unclip.options import DecoderOptions
from dalle.cli.unclip.writing import Sheet, write_pictures
from dalle.unclip.metadata import settings_of
from dalle.unclip.settings import check_share
from dvae.images import open_image, resize_and_crop


@dataclass(frozen=True, kw_only=True)
class Vary:
    """Draw other pictures with the gist of one, by DALL·E 2: its embedding by CLIP stays, its noise changes."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")]
    """The picture; its centre is seen."""
    bundle: UnCLIPBundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """Pictures to draw."""
    eta: float = 0.7
    """How much noise is new: 0 draws the picture again, 1 is as far as it goes."""
    seed: int = 0
    """Same seed, same pictures."""
    guidance: float = 1.0
    """Above 1 the pictures are clearer, and less like the one they are of."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/varied")
    """Folder for a folder of PNGs, sheet.png and results.jsonl."""
    decoding: tyro.conf.OmitArgPrefixes[DecoderOptions] = dataclasses.field(default_factory=DecoderOptions)
    compute: tyro.conf.OmitArgPrefixes[DeviceOptions] = dataclasses.field(default_factory=DeviceOptions)

    def run(self) -> None:
        """Draw and write the pictures."""
        check_share("eta", self.eta)
        drawing = self.decoding.drawing(self.guidance)
        image = open_image(self.picture)
        unclip = self.decoding.load(self.bundle, self.compute)
        write_pictures(
            self.out,
            lambda progress: unclip.variations(
                image,
                n=self.n,
                eta=self.eta,
                seed=self.seed,
                drawing=drawing,
                batch_size=self.compute.batch_size,
                progress=progress,
            ),
            Sheet(
                title=f"eta {self.eta:g}, seed {self.seed}, {drawing}",
                before=[("original", resize_and_crop(image, unclip.image_size))],
                label=lambda said: f"#{said['candidate']}  {said['score']:.3f}",
            ),
            {
                "seed": self.seed,
                "eta": self.eta,
                "image": str(self.picture),
                **settings_of(unclip, drawing, 1, self.n, batch_size=self.compute.batch_size),
            },
            unclip.hashes,
        )
