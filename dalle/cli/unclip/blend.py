"""`dalle blend`: pictures between two."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.computing import DeviceOptions
from dalle.cli.options import DEFAULT_BUNDLE, Flag, UnCLIPBundle
from dalle.cli.unclip.options import DecoderOptions
from dalle.cli.unclip.writing import Sheet, write_pictures
from dalle.unclip.manipulations import CANDIDATES_BETWEEN, rows_between
from dalle.unclip.metadata import settings_of
from dvae.images import open_image, resize_and_crop
from unclip.decoding import GUIDANCE


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Draw pictures between two, by DALL·E 2: of embeddings on the way from the one's to the other's."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """The picture to begin with; its centre is seen."""
    last: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """The picture to end with."""
    bundle: UnCLIPBundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 9
    """Pictures to draw, at equal distances, with both ends."""
    keep_ends: Flag = False
    """Draw the two pictures again at the ends, from their own noise, not from the same new noise for all."""
    candidates: int = CANDIDATES_BETWEEN
    """Pictures to draw for each place between the ends; one is kept, so that by CLIP no picture goes back towards A if
    that is possible. 1 draws as the paper does, some 5 times as fast."""
    seed: int = 0
    """Same seed, same pictures."""
    guidance: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=f"(default: {GUIDANCE:g}; 1 with --keep-ends)")
    ] = None
    """Above 1 the pictures are clearer, and the ends less like the two."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/blended")
    """Folder for a folder of PNGs, strip.png and results.jsonl."""
    decoding: tyro.conf.OmitArgPrefixes[DecoderOptions] = dataclasses.field(default_factory=DecoderOptions)
    compute: tyro.conf.OmitArgPrefixes[DeviceOptions] = dataclasses.field(default_factory=DeviceOptions)

    def run(self) -> None:
        """Draw and write the pictures."""
        drawing = self.decoding.drawing(self.guidance)
        drawn, guidance = len(rows_between(self.n, self.candidates)), 1 if self.keep_ends else GUIDANCE
        images = [open_image(path) for path in (self.first, self.last)]
        unclip = self.decoding.load(self.bundle, self.compute)
        first, last = (resize_and_crop(image, unclip.image_size) for image in images)
        noise = "their own noise" if self.keep_ends else "the same noise"
        write_pictures(
            self.out,
            lambda progress: unclip.interpolate(
                *images,
                n=self.n,
                keep_ends=self.keep_ends,
                candidates=self.candidates,
                seed=self.seed,
                drawing=drawing,
                batch_size=self.compute.batch_size,
                progress=progress,
            ),
            Sheet(
                name="strip.png",
                title=f"from {noise}, seed {self.seed}, {drawing}",
                before=[("first", first)],
                after=[("last", last)],
                label=lambda said: f"theta {said['theta']:.2f}",
                columns=self.n + 2,
            ),
            {
                "seed": self.seed,
                "keep_ends": self.keep_ends,
                "candidates": self.candidates,
                "eta": 0.0,
                "image": str(self.first),
                "last_image": str(self.last),
                **settings_of(unclip, drawing, guidance, drawn, batch_size=self.compute.batch_size),
            },
            unclip.hashes,
        )
