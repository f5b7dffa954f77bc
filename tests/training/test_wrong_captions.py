"""Wrong captions: never of the same meaning, different as said, a function of the generator; and the table of them."""

import zlib
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor

from rerank import CLIP, CLIPConfig, CLIPTokenizer
from training.drawings.shapes import (
    Scene,
    Split,
    Thing,
    captions,
    held_out_reason,
    parse,
    random_scene,
)
from training.drawings.wrong_captions import (
    EXCHANGES,
    KINDS,
    SOURCES,
    Exchange,
    Replacement,
    told_alike,
    wrong_drawn_caption,
    wrong_real_caption,
    wrong_scene,
)
from training.stages.exchanged_captions import drawn_pictures, exchanged_captions_table, is_of_the_world

BIG, SMALL = Thing("red", "circle", "large"), Thing("blue", "square", "small")
SCENE = Scene((BIG, SMALL), "left of", "white")
CAPTION = "a picture of a large red circle left of a small blue square on a white background"
SPLITS: tuple[Split, ...] = ("trained", "pair", "relation")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenes(n: int = 60) -> list[Scene]:
    generator = rng(1)
    return [random_scene(generator, split=SPLITS[i % 3], share_of_three=0.4) for i in range(n)]


# ------------------------------------------------------------------------------------------- the built-in world


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("things", "a picture of a small blue square left of a large red circle on a white background"),
        ("colours", "a picture of a large blue circle left of a small red square on a white background"),
        ("shapes", "a picture of a large red square left of a small blue circle on a white background"),
        ("sizes", "a picture of a small red circle left of a large blue square on a white background"),
        ("relation", "a picture of a large red circle right of a small blue square on a white background"),
        ("axis", "a picture of a large red circle above a small blue square on a white background"),
    ],
)
def test_an_exchange_changes_what_it_says_and_no_other_word(kind: Exchange, expected: str) -> None:
    other = wrong_scene(SCENE, kind, rng())
    assert other is not None
    assert told_alike(CAPTION, other, kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_scene_never_means_the_same(kind: Exchange | Replacement) -> None:
    n_made = 0
    for number, scene in enumerate(scenes()):
        other = wrong_scene(scene.reversed(), kind, rng(number))
        if other is None:
            continue
        n_made += 1
        assert other.canonical() != scene.canonical()
        assert all(parse(told_alike(told, other, kind)) == other for told in captions(scene))
    assert n_made >= 10


def test_a_replacement_changes_one_word() -> None:
    for kind, seed in product(("a colour", "a shape", "a size", "the background"), range(8)):
        other = wrong_scene(SCENE, kind, rng(seed))
        assert other is not None
        words = zip(CAPTION.split(), told_alike(CAPTION, other, kind).split(), strict=True)
        assert sum(a != b for a, b in words) == 1


@pytest.mark.parametrize("kind", ["colours", "shapes", "sizes"])
def test_what_both_things_share_cannot_be_exchanged(kind: Exchange) -> None:
    alike = {"colours": "colour", "shapes": "shape", "sizes": "size"}[kind]
    other = Thing(**{**vars(SMALL), alike: getattr(BIG, alike)})
    assert wrong_scene(Scene((BIG, other), "above", "black"), kind, rng()) is None


def test_three_small_things_exchange_and_replace_no_sizes() -> None:
    small = tuple(Thing(colour, "circle", "small") for colour in ("red", "green", "blue"))
    row = Scene(small, "left of", "white")
    assert wrong_scene(row, "sizes", rng()) is None
    assert wrong_scene(row, "a size", rng()) is None  # a large one would not fit
    assert wrong_scene(row, "colours", rng()) is not None


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_captions_are_a_function_of_the_generator(source: str) -> None:
    wrong = SOURCES[source]  # type: ignore[index]
    made = [wrong(CAPTION, rng(seed)) for seed in range(20)]
    assert made == [wrong(CAPTION, rng(seed)) for seed in range(20)]
    assert len(set(made)) > 5
    assert CAPTION not in made


def test_wrong_drawn_captions_are_never_of_held_out_combinations() -> None:
    for number, scene in enumerate(scenes(90)):
        told = captions(scene)[number % 10]
        wrong = wrong_drawn_caption(told.upper(), rng(number))
        assert wrong is not None or held_out_reason(scene) is not None
        if wrong is not None:
            assert parse(wrong) != parse(told)
            assert held_out_reason(parse(wrong)) is None


def test_the_world_source_makes_nothing_of_other_captions() -> None:
    assert wrong_drawn_caption("a dog left of a cat", rng()) is None


# ----------------------------------------------------------------------------------------------- other captions


def wrong_words(told: str) -> set[str | None]:
    return {wrong_real_caption(told, rng(seed)) for seed in range(60)}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("A red ball and a blue car.", "a blue ball and a red car."),
        ("two dogs chase three cats", "three dogs chase two cats"),
        ("a small dog beside a huge tree", "a huge dog beside a small tree"),
        ("a small dog under the old table", "the old table under a small dog"),
        ("the man on the left of a car", "the man on the right of a car"),
        ("a lamp above a bed", "a lamp below a bed"),
        ("An orange cat asleep", "a red cat asleep"),
        ("a white cat asleep", "an orange cat asleep"),
    ],
)
def test_words_of_one_kind_are_exchanged_or_replaced(told: str, expected: str) -> None:
    assert expected in wrong_words(told)


@pytest.mark.parametrize(
    ("told", "same"),
    [
        ("a black and white dog", "a white and black dog"),
        ("a red, white and blue flag", "a blue, white and red flag"),
        ("a dog and a cat", "a cat and a dog"),
        ("a cat next to a dog", "a dog next to a cat"),
        ("a big dog and a large cat", "a large dog and a big cat"),
    ],
)
def test_an_exchange_that_means_the_same_is_not_made(told: str, same: str) -> None:
    assert same not in wrong_words(told)


@pytest.mark.parametrize("told", ["", "nothing here", "a redhead standing right next to him", "a cat and a dog"])
def test_captions_without_such_words_have_no_wrong_ones(told: str) -> None:
    assert wrong_words(told) == {None}


# ------------------------------------------------------------------------------------------------------ the table


def code(told: str) -> Tensor:
    """A unit vector of a text, the same for the same text only."""
    generator = torch.Generator().manual_seed(zlib.crc32(told.encode()))
    return torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)


class FakeCLIP(CLIP):
    """Its features of a picture are those of the scene whose number it shows; it hears all of a caption, or nothing."""

    def __init__(self, *, hears_order: bool) -> None:
        # every word is one id, so that a caption can be had back
        tokenizer = CLIPTokenizer.train([told for scene in scenes(400) for told in captions(scene)], 600)
        config = {**vars(tiny.recipe().clip.model), "vocab_size": tokenizer.vocab_size, "context_length": 60}
        super().__init__(CLIPConfig(**config), tokenizer)
        self._read, self._hears_order = tokenizer, hears_order
        self._scenes: list[Scene] = []

    def numbered(self, shown: Sequence[Scene], _rng: np.random.Generator) -> Tensor:
        self._scenes = [scene.canonical() for scene in shown]
        return (torch.arange(len(shown), dtype=torch.float32) / 4096)[:, None, None, None].expand(-1, 3, 2, 2)

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.stack([code(str(self._scenes[round(float(image[0, 0, 0]) * 4096)])) for image in images])

    def encode_text(self, ids: Tensor) -> Tensor:
        told = [parse(self._read.decode(row.tolist())) for row in ids]
        return torch.stack([code(str(scene) if self._hears_order else f"noise {scene}") for scene in told])


def test_the_table_of_a_perfect_clip_is_all_ones() -> None:
    clip = FakeCLIP(hears_order=True)
    found = exchanged_captions_table(clip, clip.numbered, scenes=40, kinds=KINDS)
    assert list(found.fractions) == list(KINDS)
    assert all(dict(row) == dict.fromkeys(SPLITS, 1.0) for row in found.fractions.values())


def test_the_table_of_a_clip_that_guesses_is_chance() -> None:
    clip = FakeCLIP(hears_order=False)
    found = exchanged_captions_table(clip, clip.numbered, scenes=100)
    cells = [fraction for row in found.fractions.values() for fraction in row.values()]
    assert all(0.3 < fraction < 0.7 for fraction in cells)  # four standard deviations
    assert 0.4 < np.mean(cells) < 0.6


def test_the_table_is_seeded_and_shows_drawings_by_default() -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train([CAPTION], 300)
    config = {**vars(tiny.recipe().clip.model), "vocab_size": tokenizer.vocab_size, "context_length": 60}
    clip = CLIP(CLIPConfig(**config), tokenizer)
    first = exchanged_captions_table(clip, scenes=12, seed=3)
    assert first == exchanged_captions_table(clip, drawn_pictures(48), scenes=12, seed=3)
    assert first != exchanged_captions_table(clip, scenes=12, seed=4)
    lines = first.table().splitlines()
    assert len(lines) == 1 + len(EXCHANGES)
    assert len({len(line) for line in lines}) == 1


def test_a_table_of_nothing_is_refused() -> None:
    clip = FakeCLIP(hears_order=True)
    with pytest.raises(ValueError, match="at least 1"):
        exchanged_captions_table(clip, scenes=0)
    with pytest.raises(ValueError, match="'smells' is no kind of exchange"):
        exchanged_captions_table(clip, kinds=["smells"])  # type: ignore[list-item]


def test_captions_of_the_world_are_told_from_others() -> None:
    assert is_of_the_world([CAPTION, CAPTION.upper()])
    assert not is_of_the_world([CAPTION, "a dog"])
    assert not is_of_the_world([])
