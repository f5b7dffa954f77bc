"""`dalle score`: how likely pictures are after a caption, and after none."""

import json
from dataclasses import dataclass

from dalle.best_of_n import check_caption
from dalle.cli.command import resolve_device
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, Caption, Device, Flag, JSONLines, PictureSources
from dalle.cli.ranking import tell_left_out
from dalle.cli.terminal import print_table, warn_of_skipped
from dalle.data.pictures import Pictures, in_batches
from dalle.pipeline import Pipeline
from dvae.images import resize_and_crop
from dvae.remarks import REMARKS

AT_ONCE = 32
"""Pictures that are held at the same time."""
HEADS = ("nats", "per token", "without caption", "difference", "picture")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Tell how likely pictures are after a caption: log p(picture | caption), in nats, beside that without caption."""

    caption: Caption
    pictures: PictureSources
    bundle: Bundle = DEFAULT_BUNDLE
    as_json: JSONLines = False
    rows: Flag = False
    """Also print the sums of each row of tokens, from the top."""
    follow_links: Flag = False
    """Read links to pictures and to folders that lie in folders, too."""
    device: Device = "auto"

    def run(self) -> None:
        """Print the table, or a JSON object for each picture."""
        check_caption(self.caption)
        pictures = Pictures(self.pictures, follow_links=self.follow_links)
        pipe = Pipeline.load(self.bundle, resolve_device(self.device))
        side, grid = pipe.dvae.config.image_size, pipe.dalle.config.grid
        rows: list[list[str]] = []
        for batch in in_batches(((name, resize_and_crop(image, side)) for name, image in pictures), AT_ONCE):
            found = pipe.likelihood(self.caption, [image for _, image in batch])
            with_caption, without = found.with_caption.sum(1).tolist(), found.without_caption.sum(1).tolist()
            by_row = found.by_row(grid).tolist()
            for (name, _), nats, alone, of_rows in zip(batch, with_caption, without, by_row, strict=True):
                if self.as_json:
                    record = {"picture": name, "nats": nats, "nats_per_token": nats / grid**2}
                    print(json.dumps({**record, "nats_without_caption": alone, "nats_by_row": of_rows}))
                    continue
                rows.append([f"{nats:.1f}", f"{nats / grid**2:.3f}", f"{alone:.1f}", f"{nats - alone:+.1f}", name])
                if self.rows:
                    rows.append([*[""] * (len(HEADS) - 1), " ".join(f"{value:.1f}" for value in of_rows)])
        tell_left_out(pictures.left_out)
        warn_of_skipped(pictures.skipped, pictures.problems)
        REMARKS.log_totals()
        if rows:
            print_table(HEADS, rows)
