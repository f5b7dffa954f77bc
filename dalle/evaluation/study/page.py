"""The page of a study: pairs of pictures of two systems, which stands alone and asks the two questions of the paper.

Source: Ramesh et al. 2021, 3.1 and figure 7: which picture is more realistic, and which matches the caption better, one
picture of each system, five people a pair. The paper does not say how sides are drawn: here the first system is on the
left for half of the captions, which a seed chooses. There are no ties to choose.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle.evaluation.nested.captions import Row, list_hash
from storage.atomic import replace_text
from storage.text import parse_json, read_text

TEMPLATE = Path(__file__).with_name("study.html")
PLACE = "/*STUDY*/"
PNG_SIDE, JPEG_QUALITY = 128, 95
"""Larger pictures are JPEGs in the page, of both systems: a thousand pairs of PNGs would be more than browsers open."""


def write_study(
    first: Iterable[Image.Image], second: Iterable[Image.Image], rows: Sequence[Row], path: Path, *, seed: int = 0
) -> Path:
    """Write the page, and beside it its key, which tells which side is whose, and stays with who counts.

    Args:
        first: pictures of system A, one of each row.
        second: of system B.
        rows: their captions.
        path: the page; the key is `key_path(path)`.
        seed: of the sides and the order of the pairs.

    Returns:
        The file of the key.

    Raises:
        OSError: one cannot be written.
        ValueError: a picture cannot be read, or the key of another study is there.
    """
    rng = np.random.default_rng(seed)
    first_is_left = rng.permutation(len(rows)) % 2 == 0
    items: list[dict[str, Any]] = []
    digest = hashlib.sha256(f"{seed} {list_hash(rows)}".encode())
    for row, a, b, a_is_left in zip(rows, first, second, first_is_left.tolist(), strict=True):
        left, right = (a, b) if a_is_left else (b, a)
        item = {"row": row.number, "caption": row.caption, "left": _data_url(left), "right": _data_url(right)}
        digest.update(f"{item['left']} {item['right']}".encode())
        items.append(item)
    key = digest.hexdigest()[:16]
    shown = {"key": key, "items": [items[place] for place in rng.permutation(len(items)).tolist()]}
    # no "<" in the page's JSON: a caption must not end its element
    text = json.dumps(shown).replace("<", "\\u003c")
    _check_free(key_path(path), key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text))
    lefts = {
        str(row.number): "A" if is_left else "B" for row, is_left in zip(rows, first_is_left.tolist(), strict=True)
    }
    replace_text(key_path(path), json.dumps({"study": key, "seed": seed, "left": lefts}, indent=1) + "\n")
    return key_path(path)


def key_path(page: Path) -> Path:
    """Return the file of a page's key."""
    return page.with_suffix(".key.json")


def _check_free(file: Path, study: str) -> None:
    """Raise ValueError where the key of another study would be lost, without which its votes cannot be counted."""
    if not file.is_file():
        return
    known = parse_json(read_text(file))
    if not isinstance(known, dict) or known.get("study") != study:
        raise ValueError(f"{file} is the key of another study, whose votes need it: give another --page, or delete it")


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= PNG_SIDE else "jpeg"
    image.convert("RGB").save(buffer, kind, **({} if kind == "png" else {"quality": JPEG_QUALITY, "subsampling": 0}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
