"""The folder that DALL·E 2's verbs write, as `dalle generate` does: PNGs with metadata, a sheet and results.jsonl."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dalle.budget import OnProgress
from dalle.cli.start import age_s
from dalle.output.progress import progress_bar
from dalle.output.results import Pictures, ResultWriter
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.output.text import counted, duration, printable
from dvae.images import to_image

Drawn = TypeVar("Drawn", bound=Pictures)
Labelled = Sequence[tuple[str, Image.Image]]
"""Pictures with what stands under them."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A sheet of what was drawn."""

    title: str
    label: Callable[[Mapping[str, Any]], str]
    """What stands under a picture, from what is said of it."""
    before: Labelled = ()
    """Pictures before those that were drawn."""
    after: Labelled = ()
    """Pictures after them."""
    name: str = "sheet.png"
    columns: int = 8
    """Pictures of a row, at most."""

    def drawn(self, pictures: Pictures) -> Image.Image:
        """Return the sheet."""
        labels = [self.label(said) for said in pictures.described()]
        drawn = zip(labels, map(to_image, pictures.images), strict=True)
        names, images = zip(*self.before, *drawn, *self.after, strict=True)
        return contact_sheet([Section(pictures.caption, images, names)], title=self.title, columns=self.columns)


def write_pictures(
    out: Path,
    draw: Callable[[OnProgress], Drawn],
    sheet: Sheet,
    settings: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> Drawn:
    """Draw pictures, write them and their sheet, and say so; returns them.

    Args:
        out: the folder.
        draw: draws them, and tells of its progress.
        sheet: how the sheet is drawn.
        settings: what pictures depend on, for their metadata.
        hashes: of the models, for their metadata.
    """
    started_at = time.monotonic()
    with ResultWriter(out, age_s()) as writer:
        with progress_bar("pictures") as progress:
            pictures = draw(progress)
        writer.add(pictures, settings, hashes)
        save_png(sheet.drawn(pictures), out / sheet.name)
    elapsed_s = time.monotonic() - started_at
    print(
        f"{counted(len(pictures.images), 'picture')} in {printable(str(out))}: see {sheet.name} and results.jsonl "
        f"({duration(elapsed_s)})"
    )
    return pictures
