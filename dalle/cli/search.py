"""`dalle search`: finds the pictures of a folder that fit a caption best."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from dalle.best_of_n import check_caption
from dalle.cli.features import folder_features
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Caption, Device, Flag, JSONLines, OwnCLIP, check_writable
from dalle.cli.ranking import SHEET_PICTURES, load_clip, print_ranking, tell_left_out, thumbnail, write_ranking
from dalle.cli.terminal import warn_of_skipped
from dalle.output.progress import progress_bar
from dalle.output.text import counted
from dvae.images import open_image
from dvae.remarks import REMARKS
from rerank.score import embed_captions
from storage.models.directory import directory_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the pictures of a folder that fit a caption best; CLIP's features are kept in the folder."""

    caption: Caption
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder to search, with the folders in it."""
    top: int = 16
    """How many pictures to list."""
    bundle: Bundle = DEFAULT_BUNDLE
    clip: OwnCLIP = None
    as_json: JSONLines = False
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/search")
    """Folder for a contact sheet, named for the caption."""
    follow_links: Flag = False
    """Read links to pictures and to folders, too."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the best pictures with their scores, and write the sheet."""
        check_caption(self.caption)
        if self.top < 1:
            raise ValueError(f"--top is {self.top}; it must be at least 1")
        check_writable(self.out)
        clip = load_clip(self.clip, self.bundle, self.device)
        clip_hash = directory_hash(self.clip or self.bundle / "clip")
        with progress_bar("pictures") as progress:
            found = folder_features(clip, clip_hash, self.folder, follow_links=self.follow_links, progress=progress)
        tell_left_out(found.left_out)
        warn_of_skipped(found.unreadable, found.problems)
        logger.info("%s, %s of them new or changed", counted(len(found.files), "picture"), f"{found.n_embedded:,}")
        caption_E = embed_captions(clip, [self.caption])[0].cpu()
        scores_N, order_N = (found.features @ caption_E).sort(descending=True, stable=True)
        files = [found.files[i] for i in order_N[: self.top].tolist()]
        ranking = list(zip(scores_N.tolist(), map(str, files), strict=False))
        print_ranking(ranking, as_json=self.as_json)
        shown: list[tuple[float, str, Image.Image]] = []
        for score, name in ranking[:SHEET_PICTURES]:
            try:
                shown.append((score, name, thumbnail(open_image(Path(name)))))
            except (ValueError, OSError) as error:  # it has changed since it was embedded
                logger.warning("left out of the sheet: %s", error)
        REMARKS.log_totals()
        write_ranking(self.caption, shown, self.out)
