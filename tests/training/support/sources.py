"""Folders of pictures for `dalle-train shards`, and what its shards hold."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from dalle.data.reader import ShardData
from support.corrupt import encoded
from training.data.shards_report import ShardReport


def pictures_in(folder: Path, names: Iterable[str], *, captions: bool = False) -> Path:
    """Small JPEGs of these names, whatever their endings, perhaps each with a caption beside it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("RGB", (16, 16), "red"), "JPEG"))
        if captions:
            path.with_suffix(".txt").write_text(f"caption of {path.stem}", "utf-8", "replace")
    return folder


def captions_in(report: ShardReport) -> dict[str, tuple[str, ...]]:
    data = ShardData.open(report.shards, captions=True)
    return {sample.key: sample.captions for sample in map(data.read, range(len(data)))}
