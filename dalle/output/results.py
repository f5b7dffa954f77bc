"""The folder that `dalle generate` writes: a folder of PNGs per caption, and results.jsonl with a line per PNG."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.best_of_n import Result
from dalle.output.sheets import save_png, slug
from dvae.images import to_image
from storage.atomic import replace_file

logger = logging.getLogger(__name__)


class ResultWriter:
    """Writes the pictures of captions to a folder: DIR/<slug>/NN.png and results.jsonl.

    Captions of earlier runs stay; a caption that is made again replaces its own pictures and lines (logged).

    Args:
        out: the folder; made if need be.

    Raises:
        OSError: it cannot be written to.
        ValueError: it holds a results.jsonl of something else.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self._lines = _read_results(self._path)
        # fails now rather than after an hour of sampling
        self._save()

    def add(self, result: Result, settings: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        """Write the pictures of one caption."""
        folder = slug(result.caption)
        (self._out / folder).mkdir(exist_ok=True)
        older = [line for line in self._lines if line["caption"] == result.caption]
        lines = []
        numbers = zip(result.candidates, result.scores.tolist(), result.log_likelihoods.tolist(), strict=True)
        for rank, (image, (k, score, log_likelihood)) in enumerate(zip(result.images, numbers, strict=True), start=1):
            file = f"{folder}/{rank:02}.png"
            line = {"caption": result.caption, "file": file, "rank": rank, "ranked_by": result.rank}
            line |= {"score": score, "log_likelihood": log_likelihood, "candidate": k}
            line |= {**settings, "hashes": dict(hashes)}
            save_png(to_image(image), self._out / file, _texts(line))
            lines.append(line)
        for file in {line["file"] for line in older} - {line["file"] for line in lines}:
            (self._out / file).unlink(missing_ok=True)
        if older:
            logger.info("replaced the %d pictures of an earlier run in %s", len(older), self._out / folder)
        self._lines = [line for line in self._lines if line["caption"] != result.caption] + lines
        self._save()

    def _save(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
        replace_file(self._path, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def _texts(line: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in line.items()}


def _read_results(path: Path) -> list[dict[str, Any]]:
    """Read the lines of an earlier run; none if there is no file.

    Raises:
        ValueError: the file was not written by `ResultWriter`, and must hence not be replaced.
    """
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        # the names are removed when their captions are made again: only such as we write
        if all(
            isinstance(line["caption"], str) and re.fullmatch(r"[a-z0-9-]+/\d+\.png", line["file"]) for line in lines
        ):
            return lines
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not a results.jsonl of `dalle generate`: give another folder with --out")
