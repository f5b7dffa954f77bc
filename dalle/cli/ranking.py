"""What `dalle rank`, `search` and `reconstruct` share: CLIP, what is told of pictures, and the contact sheet."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle.cli.command import resolve_device
from dalle.cli.terminal import print_table
from dalle.data.bundle import bundle_part
from dalle.data.pictures import SHEET, in_words
from dalle.output.sheets import MAX_CELL, Section, contact_sheet, save_png, slug
from rerank import CLIP

logger = logging.getLogger(__name__)

SHEET_PICTURES = 16
"""Pictures on the contact sheet, which would otherwise grow without limit."""


def load_clip(clip: Path | None, bundle: Path, device: str) -> CLIP:
    """Load a CLIP directory, by default that of the bundle."""
    return CLIP.load(clip or bundle_part(bundle, "clip")).to(resolve_device(device))


def thumbnail(image: Image.Image) -> Image.Image:
    """Return a copy of a picture that is no larger than its place on a contact sheet."""
    small = image.copy()
    small.thumbnail((MAX_CELL, MAX_CELL))
    return small


def tell_left_out(left_out: Counter[str]) -> None:
    """Log how many files of folders were not read, by reason; own sheets only as a note."""
    sheets = Counter({SHEET: left_out[SHEET]})
    if reasons := in_words(left_out - sheets):
        logger.warning("left out of the folders: %s", reasons)
    if reasons := in_words(sheets):
        logger.info("left out of the folders: %s", reasons)


def print_ranking(ranking: Sequence[tuple[float, str]], *, as_json: bool) -> None:
    """Print scores and names of pictures."""
    if as_json:
        for score, name in ranking:
            print(json.dumps({"score": score, "picture": name}))
    else:
        print_table(["score", "picture"], [[f"{score:.4f}", name] for score, name in ranking])


def write_ranking(caption: str, pictures: Sequence[tuple[float, str, Image.Image]], out: Path) -> None:
    """Write a contact sheet named for the caption, with (score, name, picture) in the given order; none for none."""
    if not pictures:
        logger.warning("no sheet was written: none of the pictures can be read any more")
        return
    images = [image for _, _, image in pictures]
    labels = [f"{score:.3f}  {Path(name).name}" for score, name, _ in pictures]
    path = out / f"{slug(caption)}.png"
    save_png(contact_sheet([Section(caption, images, labels)], columns=4), path, {"caption": caption})
    logger.info("%s shown in %s", "the best is" if len(images) == 1 else f"the best {len(images)} are", path)
