"""The files of an evaluation beside its JSON: pictures in the layouts that other programs read, lines, sheets.

Letters: K kept candidates  I image positions
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dalle.evaluation.nested.curves import RANKINGS, best_picks
from dalle.evaluation.nested.run import Nested
from dalle.evaluation.nested.sample import picks
from dalle.output.sheets import Section, contact_sheet, save_png
from dalle.pipeline import Pipeline
from dvae.images import to_image
from storage.atomic import replace_file, replace_text

Layout = Literal["plain", "geneval"]
"""How pictures lie in their folder: "plain", a file 00012.png for each row; "geneval", a folder 00012/ with
metadata.jsonl and samples/0000.png …, which GenEval's evaluate_images.py reads (https://github.com/djghosh13/geneval)."""
SHOWN = 8
"""Best and worst pictures of the sheet."""
DIGITS = 9
"""Significant ones of a float32 in captions.jsonl: all."""


def write_pictures(pipe: Pipeline, nested: Nested, folder: Path, layout: Layout) -> int:
    """Write the pictures of every caption, and return how many there are.

    Raises:
        OSError: the folder cannot be written to.
    """
    n_picks = len(nested.settings.best_of)
    n_pictures = 0
    for row, tokens_KI in zip(nested.rows, nested.read("tokens"), strict=True):
        # the best of M; or, where there are several pictures, the best of each group
        are_groups = layout == "geneval" and nested.settings.pictures > 1
        chosen = tokens_KI[n_picks:] if are_groups else tokens_KI[[n_picks - 1]]
        images = [to_image(image) for image in pipe.decode(chosen.long())]
        if layout == "plain":
            folder.mkdir(parents=True, exist_ok=True)
            save_png(images[0], folder / f"{row.number:05}.png", {"caption": row.caption})
        else:
            own = folder / f"{row.number:05}"
            (own / "samples").mkdir(parents=True, exist_ok=True)
            replace_text(own / "metadata.jsonl", row.source or json.dumps({"prompt": row.caption}, ensure_ascii=False))
            for number, image in enumerate(images):
                save_png(image, own / "samples" / f"{number:04}.png")
        n_pictures += len(images)
    return n_pictures


def write_lines(nested: Nested, path: Path) -> None:
    """Write captions.jsonl, from which any number can be told again.

    It has of each caption its row, seed, picks by every ranking, and what was measured of each candidate.

    Raises:
        OSError: it cannot be written.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(nested))

    replace_file(path, write)


def _lines(nested: Nested) -> Iterator[dict[str, Any]]:
    best_of = nested.settings.best_of
    picked = {rank: picks(nested.scores, nested.log_likelihoods, rank, best_of).tolist() for rank in RANKINGS}
    for place, row in enumerate(nested.rows):
        of_each: dict[str, Any] = {
            "clip": _floats(nested.scores[place]),
            "log_likelihood": _floats(nested.log_likelihoods[place]),
        }
        if nested.judged is not None:
            of_each["judge"] = _floats(nested.judged[place])
        if nested.right is not None:
            of_each["right"] = nested.right[place].tolist()
        yield {
            "row": row.number,
            "caption": row.caption,
            "seed": nested.settings.sampling.seed,
            "picks": {rank: dict(zip(best_of, ks[place], strict=True)) for rank, ks in picked.items()},
            "candidates": of_each,
        }


def _floats(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def best_and_worst(pipe: Pipeline, nested: Nested) -> Image.Image:
    """Return a sheet of the picks of M that the judge, or else the CLIP that ranks, finds best and worst."""
    n_picks = len(nested.settings.best_of)
    values = nested.scores if nested.judged is None else nested.judged
    values_R = values.gather(1, best_picks(nested)[:, None])[:, 0]
    order = values_R.argsort(descending=True, stable=True).tolist()
    tokens = nested.read("tokens", n_picks - 1)
    sections = []
    for title, places in (("best", order[:SHOWN]), ("worst", order[-SHOWN:][::-1])):
        images = [to_image(pipe.decode(tokens[[place]].long())[0]) for place in places]
        labels = [f"{values_R[place]:.3f}  {nested.rows[place].caption}" for place in places]
        sections.append(Section(title, images, labels))
    by = "the judge" if nested.judged is not None else "the CLIP that ranks"
    return contact_sheet(sections, title=f"best of {nested.settings.m}, by {by}", columns=SHOWN // 2)
