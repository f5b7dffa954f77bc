"""Reads pictures of the built-in world back from their pixels and compares them with captions.

In order: the background from the border; what differs from it, cut into connected pieces; each piece's
colour, then how much of it covers each pixel; the shape whose ideal mask of the same area fits best; the size
from that area; the order from the centres. Nothing is learned and nothing is guessed: what is unclear stays
None and matches no caption.

Everything happens at 64×64 pixels, so the limits below are in pixels of such a picture.

Legend: Y, X pixels; C the three channels, float32 in [0, 255].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.drawings.shapes import BACKGROUNDS, COLOURS, OUTLINES, SIZES, Relation, Scene, coverage, parse

_SIDE = 64
_FOREGROUND_DISTANCE = 45.0  # RGB distance from the background; grain and uneven light stay below it
_COLOUR_DISTANCE = 75.0  # RGB distance within which a colour still bears a name
_PLAIN_SHARE = 0.8  # of the inside of a thing must be within that distance of its colour
_SPECK_AREA = 10  # pixels; a small thing has 60 or more
_SHAPE_FIT = 0.75  # least overlap (intersection over union) with the ideal mask
_SHAPE_LEAD = 0.02  # least distance of that overlap from the next best shape's
_SOFTNESS = (0.0, 0.8, 1.4)  # standard deviations in pixels: the masks are tried this much blurred
_RADII = (SIZES["small"][0] - 1.5, SIZES["large"][1] + 2.0)  # pixels; outside, it is neither small nor large
_LARGE_RADIUS = (SIZES["small"][1] + SIZES["large"][0]) / 2
_LINE_SLOPE = 1.5  # a relation needs the centres this much further apart along its axis than across


@dataclass(frozen=True)
class FoundThing:
    """What was read of one piece; None where it is unclear."""

    colour: str | None
    shape: str | None
    size: str | None
    centre: tuple[float, float]
    """(x, y) of the centroid as fractions of the picture's side"""
    fit: float
    """overlap with the ideal mask of the best shape, in [0, 1]"""

    def __str__(self) -> str:
        return " ".join(word or "unclear" for word in (self.size, self.colour, self.shape))


@dataclass(frozen=True)
class Reading:
    """What was read of a picture."""

    things: tuple[FoundThing, ...]
    """from the left or from above, by the axis along which they are spread more"""
    relation: Relation | None
    """"left of" or "above", of each thing to the next; None if they are not in line or fewer than two"""
    background: str | None


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its caption says."""

    right: bool
    reason: str
    """the first difference in words; "right" if there is none"""
    found: Reading


def check(image: Image.Image | NDArray[np.uint8], caption: str) -> Verdict:
    """Whether a picture shows exactly what a caption of the built-in world says.

    Args:
        image: a square picture, or its pixels as uint8 (Y, X, 3).
        caption: any phrasing of `training.drawings.shapes.captions`.

    Raises:
        ValueError: the picture is not square RGB, or the caption is not of this world.
    """
    scene = parse(caption)
    found = read_scene(image)
    reason = difference(scene, found)
    return Verdict(reason is None, reason or "right", found)


def difference(scene: Scene, found: Reading) -> str | None:
    """Return in words how a picture first differs from a canonical scene; None if it shows it."""
    if found.background != scene.background:
        return f"the background is {found.background or 'unclear'}, not {scene.background}"
    if len(found.things) != len(scene.things):
        return f"found {len(found.things)} things, not {len(scene.things)}"
    if found.relation != scene.relation:
        return f"the things are {_ORDER[found.relation]}, not {_ORDER[scene.relation]}"
    for position, (thing, wanted) in enumerate(zip(found.things, scene.things, strict=True), start=1):
        if (thing.colour, thing.shape, thing.size) != (wanted.colour, wanted.shape, wanted.size):
            return f"thing {position} is a {thing}, not {wanted}"
    return None


_ORDER = {"left of": "in a row", "above": "in a column", None: "not in line"}


def read_scene(image: Image.Image | NDArray[np.uint8]) -> Reading:
    """Reads things, their order and the background from pixels alone.

    Args:
        image: a square picture, or its pixels as uint8 (Y, X, 3).

    Raises:
        ValueError: the picture is not square RGB.
    """
    picture = _picture(image)
    pixels_YXC = np.asarray(picture, dtype=np.float32)
    border_NC = np.concatenate([pixels_YXC[[0, 1, -2, -1]], pixels_YXC[:, [0, 1, -2, -1]].swapaxes(0, 1)])
    background_C = np.median(border_NC.reshape(-1, 3), axis=0)
    # smoothed: grain is not a thing
    smooth_YXC = np.asarray(picture.filter(ImageFilter.BoxBlur(1)), dtype=np.float32)
    distance_YX = np.linalg.norm(smooth_YXC - background_C, axis=-1)
    things = [
        _read_thing(pixels_YXC, smooth_YXC, background_C, piece_YX)
        for piece_YX in connected_pieces(distance_YX > _FOREGROUND_DISTANCE)
        if np.count_nonzero(piece_YX) >= _SPECK_AREA
    ]
    things, relation = _in_order(things)
    return Reading(tuple(things), relation, _nearest(background_C, BACKGROUNDS))


def _picture(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 pixels (Y, X, 3), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if image.mode != "RGB" or image.width != image.height:
        raise ValueError(f"expected a square RGB picture, not {image.mode} {image.width}×{image.height}")
    if image.width != _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return image


def connected_pieces(mask_YX: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected pieces of a mask, each a mask of its own, in the order of their topmost rows.

    Runs of True in a row are joined with the runs of the row above that they touch.
    """
    padded = np.pad(mask_YX, ((0, 0), (1, 1))).astype(np.int8)
    edges = np.argwhere(np.diff(padded, axis=1))  # (row, column) of every start and end, alternating
    runs = [(int(row), int(start), int(end)) for (row, start), (_, end) in zip(edges[::2], edges[1::2], strict=True)]
    parent = list(range(len(runs)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    for k, (row, start, end) in enumerate(runs):
        for above in range(k - 1, -1, -1):
            if runs[above][0] < row - 1:
                break
            if runs[above][0] == row - 1 and runs[above][1] < end and start < runs[above][2]:
                a, b = sorted((root(above), root(k)))
                parent[b] = a
    pieces: dict[int, NDArray[np.bool_]] = {}
    for k, (row, start, end) in enumerate(runs):
        pieces.setdefault(root(k), np.zeros_like(mask_YX))[row, start:end] = True
    return list(pieces.values())


def _read_thing(
    pixels_YXC: NDArray[np.float32],
    smooth_YXC: NDArray[np.float32],
    background_C: NDArray[np.float32],
    piece_YX: NDArray[np.bool_],
) -> FoundThing:
    colour_C, is_plain = _plain_colour(smooth_YXC[piece_YX], background_C)
    contrast_C = colour_C - background_C
    # at least 1: a piece as bright as the background has no rim to be measured, and must not divide by zero
    unclipped_YX = (pixels_YXC - background_C) @ contrast_C / max(contrast_C @ contrast_C, 1.0)
    share_YX = np.where(_grown(piece_YX), np.clip(unclipped_YX, 0, 1), 0).astype(np.float32)
    area = float(share_YX.sum())
    if area < _SPECK_AREA or not is_plain:
        y, x = np.argwhere(piece_YX).mean(0) + 0.5
        return FoundThing(None, None, None, (float(x) / _SIDE, float(y) / _SIDE), fit=0.0)

    at = np.arange(_SIDE) + 0.5
    x, y = float(share_YX.sum(0) @ at) / area, float(share_YX.sum(1) @ at) / area
    radii = {shape: (area / unit_area) ** 0.5 for shape, unit_area in _UNIT_AREAS.items()}
    fits = {shape: _fit(share_YX, coverage(shape, x, y, radii[shape], _SIDE)) for shape in OUTLINES}
    next_best, shape = sorted(fits, key=lambda name: fits[name])[-2:]
    is_clear = fits[shape] >= max(_SHAPE_FIT, fits[next_best] + _SHAPE_LEAD)
    size = "large" if radii[shape] > _LARGE_RADIUS else "small"
    return FoundThing(
        colour=_nearest(colour_C, COLOURS),
        shape=shape if is_clear else None,
        size=size if _RADII[0] <= radii[shape] <= _RADII[1] else None,
        centre=(x / _SIDE, y / _SIDE),
        fit=fits[shape],
    )


def _plain_colour(piece_NC: NDArray[np.float32], background_C: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """The colour of a piece's pixels, and whether nearly all of its inside has it.

    Only pixels far from the background count: the rim is mixed with it.
    """
    distance_N = np.linalg.norm(piece_NC - background_C, axis=-1)
    inside_MC = piece_NC[distance_N >= 0.8 * np.quantile(distance_N, 0.9)]
    colour_C = np.median(inside_MC, axis=0)
    near_M = np.linalg.norm(inside_MC - colour_C, axis=-1) <= _COLOUR_DISTANCE
    return colour_C, bool(near_M.mean() >= _PLAIN_SHARE)


def _polygon_area(corners: list[tuple[float, float]]) -> float:
    closed = [*corners, corners[0]]
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairwise(closed))) / 2


_UNIT_AREAS = {shape: _polygon_area(corners) for shape, corners in OUTLINES.items()}


def _fit(share_YX: NDArray[np.float32], mask_YX: NDArray[np.float32]) -> float:
    """Intersection over union of two soft masks, the second as soft as suits the first best."""
    mask = Image.fromarray((mask_YX * 255).astype(np.uint8))
    overlaps = []
    for softness in _SOFTNESS:
        soft_YX = np.asarray(mask.filter(ImageFilter.GaussianBlur(softness)), dtype=np.float32) / 255
        overlaps.append(float(np.minimum(share_YX, soft_YX).sum() / np.maximum(share_YX, soft_YX).sum()))
    return max(overlaps)


def _grown(mask_YX: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its neighbours: there the anti-aliased rim of a piece lies."""
    padded = np.pad(mask_YX, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _nearest(colour_C: NDArray[np.float32], palette: Mapping[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour_C - np.array(rgb, np.float32))) for name, rgb in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= _COLOUR_DISTANCE else None


def _in_order(things: list[FoundThing]) -> tuple[list[FoundThing], Relation | None]:
    if len(things) < 2:
        return things, None
    centres_NX = np.array([thing.centre for thing in things])
    axis = int(np.argmax(np.ptp(centres_NX, axis=0)))
    things = sorted(things, key=lambda thing: thing.centre[axis])
    for first, second in pairwise(things):
        along = second.centre[axis] - first.centre[axis]
        across = abs(second.centre[1 - axis] - first.centre[1 - axis])
        if along < _LINE_SLOPE * across:
            return things, None
    return things, "left of" if axis == 0 else "above"
