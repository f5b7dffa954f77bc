"""`dalle caption`: which of given captions fits a picture best, by the transformer's likelihood, by CLIP or by both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import resolve_device
from dalle.cli.generate import AS_THE_BUNDLE, read_captions
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, CaptionJSONLines, Device
from dalle.cli.terminal import print_table
from dalle.output.progress import progress_bar
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking
from dvae.images import open_image

HEADS = ("nats", "per token", "against none", "CLIP", "caption")


@dataclass(frozen=True, kw_only=True)
class RankCaptions:
    """Rank captions by how well they fit a picture: log p(picture | caption) in nats, and CLIP's score."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE", help_behavior_hint="")]
    """The picture; it is resized and cropped to the bundle's size."""
    candidates: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")]
    """A text file with captions, one on each line, in UTF-8."""
    rank: Annotated[
        Ranking | None, tyro.conf.arg(metavar="{clip,likelihood,both}", help_behavior_hint=AS_THE_BUNDLE)
    ] = None
    """Best first by CLIP's score, by the transformer's log-likelihood, or by the mean of the places in both."""
    bundle: Bundle = DEFAULT_BUNDLE
    as_json: CaptionJSONLines = False
    device: Device = "auto"

    def run(self) -> None:
        """Print the table, or a JSON object for each caption."""
        captions = list(dict.fromkeys(read_captions(self.candidates)))
        if len(captions) == 1:
            raise ValueError(f"{self.candidates} holds one caption: give at least two to rank, one on each line")
        image = open_image(self.picture)
        pipe = Pipeline.load(self.bundle, resolve_device(self.device))
        with progress_bar("captions") as progress:
            found = pipe.rank_captions(image, captions, rank=self.rank, progress=progress)
        n_tokens, alone = pipe.dalle.config.stream.n_image, found.without_caption
        rows: list[list[str]] = []
        for caption, nats, score in zip(
            found.captions, found.log_likelihoods.tolist(), found.scores.tolist(), strict=True
        ):
            if self.as_json:
                record = {"caption": caption, "ranked_by": found.rank, "nats": nats, "nats_per_token": nats / n_tokens}
                print(json.dumps({**record, "nats_without_caption": alone, "score": score}))
                continue
            rows.append([f"{nats:.1f}", f"{nats / n_tokens:.3f}", f"{nats - alone:+.1f}", f"{score:.4f}", caption])
        if rows:
            print_table(HEADS, rows)
