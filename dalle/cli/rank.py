"""`dalle rank`: scores any pictures against a caption with CLIP."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from dalle.best_of_n import check_caption
from dalle.cli.features import EMBEDDING_BATCH
from dalle.cli.options import (
    DEFAULT_BUNDLE,
    Bundle,
    Caption,
    Device,
    Flag,
    JSONLines,
    OwnCLIP,
    PictureSources,
    check_writable,
)
from dalle.cli.ranking import SHEET_PICTURES, load_clip, print_ranking, tell_left_out, thumbnail, write_ranking
from dalle.cli.terminal import warn_of_skipped
from dalle.data.pictures import Pictures, in_batches
from dvae.remarks import REMARKS
from rerank.pixels import clip_view
from rerank.score import embed_captions, embed_images


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Score any pictures against a caption with CLIP, best first."""

    caption: Caption
    pictures: PictureSources
    bundle: Bundle = DEFAULT_BUNDLE
    clip: OwnCLIP = None
    as_json: JSONLines = False
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: no sheet)")] = None
    """Folder for a contact sheet of the best."""
    follow_links: Flag = False
    """Read links to pictures and to folders that lie in folders, too."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the pictures with their scores."""
        check_caption(self.caption)
        pictures = Pictures(self.pictures, follow_links=self.follow_links)
        if self.out is not None:
            check_writable(self.out)
        clip = load_clip(self.clip, self.bundle, self.device)
        caption_E = embed_captions(clip, [self.caption])[0]
        ranking: list[tuple[float, str]] = []
        shown: list[tuple[float, str, Image.Image]] = []
        # pictures can be large and many: of each only what CLIP sees is held, and what the sheet shows of the best
        view = clip.config.view
        reduced = ((name, clip_view(image, view), thumbnail(image)) for name, image in pictures)
        for batch in in_batches(reduced, EMBEDDING_BATCH):
            scores = (embed_images(clip, torch.stack([pixels for _, pixels, _ in batch])) @ caption_E).tolist()
            for (name, _, image), score in zip(batch, scores, strict=True):
                ranking.append((score, name))
                shown.append((score, name, image))
            shown = sorted(shown, key=lambda entry: -entry[0])[:SHEET_PICTURES]
        tell_left_out(pictures.left_out)
        warn_of_skipped(pictures.skipped, pictures.problems)
        REMARKS.log_totals()
        print_ranking(sorted(ranking, key=lambda entry: -entry[0]), as_json=self.as_json)
        if self.out is not None:
            write_ranking(self.caption, shown, self.out)
