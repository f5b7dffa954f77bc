"""Measures how often CLIP prefers a true caption to the same with something exchanged.

A CLIP that treats captions as bags of words is at chance, 50%, where things are exchanged or a relation becomes its
inverse, however well it finds a caption among others (Yuksekgonul et al. 2023, arXiv 2210.01936, 3).

Legend: N pictures and their captions  W wrong captions  E features
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.output.text import Say, aligned
from dalle.pipeline import Pipeline
from dvae.images import to_tensor
from rerank import CLIP
from rerank.score import embed_captions, embed_images
from training.drawings.shapes import Scene, Split, caption, draw, parse, random_scene
from training.drawings.wrong_captions import EXCHANGES, Exchange, Replacement, told_alike, wrong_scene

PictureSource = Callable[[Sequence[Scene], np.random.Generator], Tensor]
"""Returns a picture of each scene, float32 (N,3,H,W) in [0, 1]."""

SPLITS: tuple[Split, ...] = get_args(Split)
_MEANINGS: dict[str, str] = {
    "things": "the two things exchanged",
    "colours": "their colours exchanged",
    "shapes": "their shapes exchanged",
    "sizes": "their sizes exchanged",
    "relation": "left of ↔ right of, above ↔ below",
    "axis": "left of ↔ above, right of ↔ below",
    "a colour": "a colour replaced",
    "a shape": "a shape replaced",
    "a size": "a size replaced",
    "the background": "the background replaced",
}


@dataclass(frozen=True, kw_only=True)
class ExchangedCaptions:
    """Fractions of pictures whose true caption is nearer than the wrong one; chance is a half."""

    scenes: int
    """Pictures of each cell."""
    fractions: Mapping[str, Mapping[Split, float]]
    """By kind of exchange, then by the split of the scenes, in [0, 1]."""

    def table(self) -> str:
        """Return the fractions as aligned lines."""
        title = f"CLIP prefers the true caption ({self.scenes} scenes a cell, chance 50%)"
        rows = [[title, *SPLITS]]
        for kind, row in self.fractions.items():
            rows.append([f"  {_MEANINGS[kind]}", *(f"{row[split]:.1%}" for split in SPLITS)])
        return aligned(rows, "<>")


def drawn_pictures(size: int) -> PictureSource:
    """Return the source of drawings, size × size pixels."""

    def pictures(scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
        return torch.stack([to_tensor(draw(scene, rng, size=size)) for scene in scenes])

    return pictures


def exchanged_captions_table(
    clip: CLIP,
    pictures: PictureSource | None = None,
    *,
    scenes: int = 200,
    seed: int = 0,
    kinds: Sequence[Exchange | Replacement] = EXCHANGES,
) -> ExchangedCaptions:
    """Compare the cosines of pictures with their captions and with wrong ones, for every kind of exchange and split.

    A scene counts for a kind only where the exchange changes its meaning, so two equal sizes are not exchanged; one
    scene serves as many kinds as it can.

    Args:
        clip: the model, with its tokenizer.
        pictures: makes the picture of a scene; None draws it in CLIP's picture size, at least 48 pixels.
        scenes: pictures of each cell, at least 1.
        seed: of scenes, captions and pictures, at least 0.
        kinds: of exchanges and replacements.

    Raises:
        ValueError: scenes is below 1, or a kind is unknown.
    """
    if scenes < 1:
        raise ValueError(f"scenes is {scenes}; it must be at least 1")
    unknown = [kind for kind in kinds if kind not in _MEANINGS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no kind of exchange; expected some of {', '.join(_MEANINGS)}")
    source = pictures if pictures is not None else drawn_pictures(max(48, clip.config.image_size))
    fractions: dict[str, dict[Split, float]] = {kind: {} for kind in kinds}
    for number, split in enumerate(SPLITS):
        for kind, fraction in _fractions(clip, source, split, scenes, kinds, np.random.default_rng([seed, number])):
            fractions[kind][split] = fraction
    return ExchangedCaptions(scenes=scenes, fractions=fractions)


def _fractions(
    clip: CLIP,
    pictures: PictureSource,
    split: Split,
    count: int,
    kinds: Sequence[Exchange | Replacement],
    rng: np.random.Generator,
) -> list[tuple[Exchange | Replacement, float]]:
    """Return each kind's fraction on scenes of one split."""
    scenes: list[Scene] = []
    captions: list[str] = []
    wrong: dict[Exchange | Replacement, list[tuple[int, str]]] = {kind: [] for kind in kinds}
    while any(len(found) < count for found in wrong.values()):
        scene = random_scene(rng, split=split, share_of_three=0.0)
        told = caption(scene, rng)
        others = {kind: wrong_scene(scene, kind, rng) for kind in kinds if len(wrong[kind]) < count}
        for kind, other in others.items():
            if other is not None:
                wrong[kind].append((len(scenes), told_alike(told, other, kind)))
        if any(others.values()):
            scenes.append(scene)
            captions.append(told)
    images_NE = embed_images(clip, pictures(scenes, rng))
    right_N = (images_NE * embed_captions(clip, captions)).sum(dim=1)
    result = []
    for kind, found in wrong.items():
        own_W = torch.tensor([index for index, _ in found], device=images_NE.device)
        wrong_W = (images_NE[own_W] * embed_captions(clip, [told for _, told in found])).sum(dim=1)
        result.append((kind, float((right_N[own_W] > wrong_W).float().mean())))
    return result


def is_of_the_world(captions: Sequence[str]) -> bool:
    """Return whether there are captions and all are of the built-in world."""
    try:
        for told in captions:
            parse(told)
    except ValueError:
        return False
    return bool(captions)


def measure_exchanged(pipe: Pipeline, data: ShardData, say: Say) -> Mapping[str, object]:
    """Measure the table for a bundle if all captions of some data are of the built-in world.

    Returns:
        The entries "is_of_the_world" and, if so, "exchanged_captions" of evaluation.json.
    """
    captions = []
    for i in range(len(data)):
        with contextlib.suppress(ValueError, OSError):  # lost or damaged
            captions.append(data.captions(i)[0])
    if not is_of_the_world(captions):
        return {"is_of_the_world": False}
    exchanged = exchanged_captions_table(pipe.clip)
    say(exchanged.table())
    return {"is_of_the_world": True, "exchanged_captions": asdict(exchanged)}
