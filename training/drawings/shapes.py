"""The built-in captioned world: scenes, their captions, what is never trained, and their pictures.

A scene is a row or column of two (sometimes three) things on a plain background. Everything that varies on
purpose is said in every caption (colours, shapes, sizes, relation, background), so that a picture can be
checked against its caption exactly: `training/drawings/shape_checker.py` reads it back from pixels. What is not said
(exact size, shade, lighting, grain) varies a little, so that the likelihood has something to model.

Order of the file: the things, the captions, the held-out combinations, the pictures, the data set.

Legend: Y, X pixels of a picture; C its three channels.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WORLD_VERSION = 5
"""Changes with what is drawn, said or held out: what was trained on another version is not gone on with."""

Relation = Literal["left of", "right of", "above", "below"]
Split = Literal["trained", "pair", "relation"]

# Far apart, in RGB distance: the closest two by 96, and each from every background by 155 or more.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "green": (20, 165, 70),
    "blue": (40, 80, 235),
    "yellow": (250, 225, 50),
    "purple": (130, 40, 185),
    "orange": (245, 130, 20),
    "magenta": (235, 40, 170),
    "brown": (150, 95, 45),
    "lime": (150, 215, 40),
    "teal": (0, 150, 165),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 242),
    "black": (18, 18, 18),
    "cyan": (130, 225, 230),
}
SIZES: dict[str, tuple[float, float]] = {"small": (7.7, 8.3), "large": (10.9, 11.5)}
"""Range of the radius of a thing, in 64ths of the picture's side."""

INVERSE: dict[str, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


def _circle(n_corners: int) -> list[tuple[float, float]]:
    angles = np.arange(n_corners) * (2 * np.pi / n_corners)
    return [(float(np.cos(angle)), float(np.sin(angle))) for angle in angles]


# Corners around the centroid in units of the radius, y down. The factors make all look about equally large. Of any two,
# drawn equally large on the same centroid, at most 84% of what either covers is covered by both.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _circle(48),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.2), (1.04, 0.6), (-1.04, 0.6)],
    "diamond": [(0.0, -1.2), (0.9, 0.0), (0.0, 1.2), (-0.9, 0.0)],
    "cross": [
        *[(-0.34, -1.12), (0.34, -1.12), (0.34, -0.34), (1.12, -0.34), (1.12, 0.34), (0.34, 0.34)],
        *[(0.34, 1.12), (-0.34, 1.12), (-0.34, 0.34), (-1.12, 0.34), (-1.12, -0.34), (-0.34, -0.34)],
    ],
    "bar": [(-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)],
    "hourglass": [(-1.0, -1.1), (1.0, -1.1), (0.2, 0.0), (1.0, 1.1), (-1.0, 1.1), (-0.2, 0.0)],
    "bowtie": [(-1.1, -1.0), (-1.1, 1.0), (0.0, 0.2), (1.1, 1.0), (1.1, -1.0), (0.0, -0.2)],
}


def _known(kind: str, word: str, words: Collection[str]) -> None:
    if word not in words:
        raise ValueError(f"{word!r} is not a {kind}; expected one of {', '.join(words)}")


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Raises:
        ValueError: a word that this world does not know.
    """

    colour: str
    shape: str
    size: str

    def __post_init__(self) -> None:
        _known("colour", self.colour, COLOURS)
        _known("shape", self.shape, OUTLINES)
        _known("size", self.size, SIZES)

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape): the unit of which some combinations are never trained."""
        return self.colour, self.shape

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two or three things; each stands in the same relation to the next one.

    Raises:
        ValueError: an unknown relation or background, not two or three things, or a large thing among three.
    """

    things: tuple[Thing, ...]
    relation: Relation
    background: str

    def __post_init__(self) -> None:
        _known("relation", self.relation, INVERSE)
        _known("background", self.background, BACKGROUNDS)
        if len(self.things) not in (2, 3):
            raise ValueError(f"a scene has two or three things, not {len(self.things)}")
        if len(self.things) == 3 and any(thing.size != "small" for thing in self.things):
            raise ValueError("only small things fit three in a row: say small for each of the three")

    def reversed(self) -> "Scene":
        """The same scene told from its other end."""
        return replace(self, things=self.things[::-1], relation=INVERSE[self.relation])

    def canonical(self) -> "Scene":
        """The same scene told from the left or from above: equal scenes have equal canonical scenes."""
        return self if self.relation in ("left of", "above") else self.reversed()


# ---- captions ---------------------------------------------------------------------------------------------

# `parse` tries them in this order: the ones with an opening of their own come first.
_PHRASINGS = (
    "there is {things} on a {background} background",
    "on a {background} background, {things}",
    "a {background} background with {things}",
    "a picture of {things} on a {background} background",
    "{things} on a {background} background",
)
FROM_ONE_END = len(_PHRASINGS)
"""How many of a scene's `captions`, the first ones, are told from the left or from above."""


def captions(scene: Scene) -> tuple[str, ...]:
    """Everything that is said of a scene, of 13 to 23 words: the five phrasings from the left or from above, then from
    the other end.
    """
    told = [
        f" {way.relation} ".join(str(thing) for thing in way.things)
        for way in (scene.canonical(), scene.canonical().reversed())
    ]
    return tuple(
        phrasing.format(things=things, background=scene.background) for things, phrasing in product(told, _PHRASINGS)
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the captions of a scene, each as likely as the others."""
    phrasings = captions(scene)
    return phrasings[int(rng.integers(len(phrasings)))]


def parse(caption: str) -> Scene:
    """The canonical scene that a caption tells: the inverse of `captions`.

    Case, spacing and a final full stop do not matter.

    Raises:
        ValueError: names the words that were not understood.
    """
    told = " ".join(caption.lower().rstrip(" .\n").split())
    for phrasing in _PHRASINGS:
        pattern = phrasing.format(things="(?P<things>.+)", background="(?P<background>[^ ,]+)")
        if match := re.fullmatch(pattern, told):
            break
    else:
        expected = "; ".join(_PHRASINGS)
        raise ValueError(f"caption {caption!r} is not of this world; expected one of: {expected}")
    try:
        return _parse_things(match["things"], match["background"]).canonical()
    except ValueError as error:
        raise ValueError(f"caption {caption!r}: {error}") from error


def _parse_things(told: str, background: str) -> Scene:
    *parts, last = re.split(f" ({'|'.join(INVERSE)}) ", told)
    relations = set(parts[1::2])
    if len(relations) != 1:
        raise ValueError(f"expected one relation ({', '.join(INVERSE)}) in {told!r}, found {len(relations)}")
    things = []
    for phrase in [*parts[::2], last]:
        match = re.fullmatch(r"a (\S+) (\S+) (\S+)", phrase)
        if not match:
            raise ValueError(f"expected 'a <size> <colour> <shape>', not {phrase!r}")
        size, colour, shape = match.groups()
        things.append(Thing(colour, shape, size))
    relation = next(name for name in INVERSE.values() if name in relations)
    return Scene(tuple(things), relation, background)


# ---- combinations that are never trained ------------------------------------------------------------------

PAIRS: tuple[tuple[str, str], ...] = tuple(product(COLOURS, OUTLINES))

# Spread evenly: every colour is held out with one shape, and every shape with one colour or two.
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "cross"),
        ("green", "bar"),
        ("blue", "hourglass"),
        ("yellow", "triangle"),
        ("purple", "circle"),
        ("orange", "diamond"),
        ("magenta", "square"),
        ("brown", "bowtie"),
        ("lime", "cross"),
        ("teal", "bar"),
    }
)


@cache
def is_held_out_relation(first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> bool:
    """Whether "pair, relation, pair" belongs to the fifth that is never trained.

    It is decided by a hash of the canonical triple (told from the left or from above), so it is the same for
    both ways of telling it and on every machine. The mirrored scene is another triple with its own answer.
    """
    if relation in ("right of", "below"):
        first, relation, second = second, INVERSE[relation], first
    digest = hashlib.sha256(f"{' '.join(first)} {relation} {' '.join(second)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


def held_out_reason(scene: Scene) -> Literal["pair", "relation"] | None:
    """Why a scene is never trained: a (colour, shape) pair, else a relation between pairs; None: it is."""
    if any(thing.pair in HELD_OUT_PAIRS for thing in scene.things):
        return "pair"
    if any(is_held_out_relation(a.pair, scene.relation, b.pair) for a, b in pairwise(scene.things)):
        return "relation"
    return None


def random_scene(rng: np.random.Generator, *, split: Split = "trained", share_of_three: float = 0.1) -> Scene:
    """A canonical scene of a split, every one with the same number of things as likely as the others.

    No (colour, shape) pair occurs twice in a scene.

    Args:
        rng: the source of all randomness.
        split: "trained": nothing held out occurs in it; "pair": at least one held-out (colour, shape) pair;
            "relation": trained pairs only, at least one held-out relation between them.
        share_of_three: share of scenes with three things, in [0, 1].

    Raises:
        ValueError: an unknown split or a share outside [0, 1].
    """
    if split not in ("trained", "pair", "relation"):
        raise ValueError(f"split is {split!r}; expected 'trained', 'pair' or 'relation'")
    if not 0 <= share_of_three <= 1:
        raise ValueError(f"share_of_three is {share_of_three}; expected a number from 0 to 1")
    n_things = 3 if rng.random() < share_of_three else 2
    reason = None if split == "trained" else split
    while True:
        scene = _any_scene(rng, n_things)
        if held_out_reason(scene) == reason:
            return scene


def _any_scene(rng: np.random.Generator, n_things: int) -> Scene:
    pairs = [PAIRS[k] for k in rng.choice(len(PAIRS), size=n_things, replace=False)]
    share_of_large = 0.5 if n_things == 2 else 0.0
    things = tuple(
        Thing(colour, shape, "large" if rng.random() < share_of_large else "small") for colour, shape in pairs
    )
    relation: Relation = "left of" if rng.random() < 0.5 else "above"
    return Scene(things, relation, list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))])


# ---- pictures ---------------------------------------------------------------------------------------------

_OVERSAMPLING = 4


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> NDArray[np.float32]:
    """How much of each pixel a shape covers: the anti-aliased mask of which pictures are made and checked.

    Args:
        shape: a key of OUTLINES.
        x: the centroid in pixels, 0 the left edge of the picture, `size` the right one.
        y: the same from the top.
        radius: in pixels.
        size: the side of the picture in pixels.

    Returns:
        float32 (Y, X) in [0, 1], Y = X = size.
    """
    mask = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    # Pillow rounds corners down and fills the pixels of both ends, so this is centred without a half added
    corners = [((x + u * radius) * _OVERSAMPLING, (y + v * radius) * _OVERSAMPLING) for u, v in OUTLINES[shape]]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return np.asarray(mask.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255)


def draw(scene: Scene, rng: np.random.Generator, *, size: int = 64) -> Image.Image:
    """A picture of a scene: its things in equal parts of the picture, with a little of everything unsaid.

    Neighbours never touch (at least 4.6 of 64 pixels between them). They stand exactly in line, at multiples of a
    twelfth of the side: a small dVAE, whose tokens stand on such a lattice too, learns the edges of all shapes in
    minutes.

    Args:
        scene: what to draw.
        rng: exact sizes, shades, lighting and grain.
        size: side of the picture in pixels, at least 32 (reading it back is tested from 48).

    Returns:
        RGB picture, size × size.

    Raises:
        ValueError: size is below 32.
    """
    if size < 32:
        raise ValueError(f"size is {size}; the shapes need pictures of at least 32 pixels")
    scene = scene.canonical()
    unit = size / 64
    picture_YXC = _lit_background(scene.background, rng, size)
    n_things = len(scene.things)
    for k, thing in enumerate(scene.things):
        radius = rng.uniform(*SIZES[thing.size])
        along = (k + 0.5) * 64 / n_things
        x, y = (along, 32.0) if scene.relation == "left of" else (32.0, along)
        shade = np.array(COLOURS[thing.colour], np.float32) + rng.normal(0, 2, 3).astype(np.float32)
        mask_YX1 = coverage(thing.shape, x * unit, y * unit, radius * unit, size)[..., None]
        picture_YXC += mask_YX1 * (shade - picture_YXC)
    picture_YXC += 2.0 * rng.standard_normal(picture_YXC.shape, dtype=np.float32)
    return Image.fromarray(np.clip(picture_YXC + 0.5, 0, 255).astype(np.uint8))


def _lit_background(background: str, rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """The background's shade with a slight slope of light across it: float32 (Y, X, C) in [0, 255]."""
    shade = np.array(BACKGROUNDS[background], np.float32) + np.float32(rng.uniform(-2, 2))
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope_y, slope_x = rng.uniform(-2, 2, 2).astype(np.float32)
    light_YX = slope_y * ramp[:, None] + slope_x * ramp[None, :]
    lit_YXC: NDArray[np.float32] = light_YX[..., None] + shade
    return lit_YXC


# ---- the data set -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One captioned picture of the world."""

    key: str
    """names the drawing in a data set: split, seed and number; no dots, as shards want it"""
    image: Image.Image
    captions: tuple[str, ...]
    """all that may be said of it"""
    scene: Scene


def world(
    n: int, seed: int, *, split: Split = "trained", size: int = 64, share_of_three: float = 0.1, start: int = 0
) -> Iterator[Drawing]:
    """The first n drawings of a data set; drawing i is a function of (seed, i) and the options alone.

    Args:
        n: how many.
        seed: at least 0; other seeds give other drawings.
        split: which combinations, see `random_scene`.
        size: side of the pictures in pixels.
        share_of_three: share of scenes with three things.
        start: the drawing to begin with.
    """
    for i in range(start, n):
        rng = np.random.default_rng([seed, i])
        scene = random_scene(rng, split=split, share_of_three=share_of_three)
        yield Drawing(f"{split}-{seed}-{i:06d}", draw(scene, rng, size=size), captions(scene), scene)
