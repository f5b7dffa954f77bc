"""The demonstration of DALL·E 2: what it refuses, and what it says of models that are always right or do nothing."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import with_random_weights
from tiny_unclip import write_unclip
from torch import Tensor
from torch.nn import functional as F

import training.demo.unclip
from dalle.editing.regions import Mask, Region
from dalle.unclip.settings import Drawing
from dvae.images import to_tensor
from rerank import CLIP
from rerank.tokenizer import CLIPTokenizer
from training.cli.main import main
from training.demo.unclip import (
    SOURCES,
    THETAS,
    Attribute,
    changed,
    measure,
    of_differences,
    of_edits,
    of_interpolations,
    of_variations,
    position,
    run_unclip_demo,
    some_scenes,
    words,
)
from training.drawings.shape_checker import difference, read_scene
from training.drawings.shapes import Scene, Split, caption, draw, held_out_reason, parse
from training.ranks.ranks import join
from training.recipes import recipe
from unclip import Decoder

SIDE = 48


def drawn(scene: Scene, seed: int = 0) -> Image.Image:
    return draw(scene, np.random.default_rng(seed), size=SIDE)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene.canonical() for scene in some_scenes(4, "trained", seed=1)]


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> list[Image.Image]:
    return [drawn(scene) for scene in scenes]


class Model:
    """Stands in for UnCLIP: gives every picture back, or edits as it is told."""

    image_size = SIDE

    def __init__(self, edits: bool = True, pastes: bool = True) -> None:
        self.edits, self.pastes = edits, pastes

    def variations(self, picture: Image.Image, *, n: int, **how: Any) -> Any:
        return SimpleNamespace(images=self._same(picture, n))

    def text_diff(self, picture: Image.Image, before: str, after: str, *, n: int, **how: Any) -> Any:
        each = [{"theta": 0.0}] * n
        return SimpleNamespace(images=self._same(picture, n), each=each)

    def edit(self, picture: Image.Image, mask: Mask, caption: str, *, n: int, **how: Any) -> Any:
        region = Region.of(picture, mask, SIDE)
        images = self._same(drawn(parse(caption), 7) if self.edits else picture, n)
        return SimpleNamespace(images=region.paste(images) if self.pastes else images, region=region)

    def _same(self, picture: Image.Image, n: int) -> Tensor:
        return to_tensor(picture).expand(n, -1, -1, -1)


def test_scenes_are_always_the_same(scenes: list[Scene]) -> None:
    assert scenes == [scene.canonical() for scene in some_scenes(4, "trained", seed=1)]


@pytest.mark.parametrize("attribute", ["colour", "shape", "background"])
def test_one_attribute_is_changed_and_the_scene_stays_of_a_trained_kind(
    attribute: Attribute, scenes: list[Scene]
) -> None:
    for scene in scenes:
        other = changed(scene, attribute, np.random.default_rng(0))
        differ = [
            name for name in ("colour", "shape", "size", "background") if words(scene, name) != words(other, name)
        ]
        assert differ == [attribute]
        assert held_out_reason(other) is None


def test_a_picture_is_its_own_scene_and_no_other(scenes: list[Scene], pictures: list[Image.Image]) -> None:
    readings = [read_scene(picture) for picture in pictures]
    found = torch.tensor([[difference(scene, reading) is None for scene in scenes] for reading in readings])
    assert torch.equal(found, torch.eye(4, dtype=torch.bool))


def test_variations_that_are_the_picture_keep_everything_and_do_not_differ(
    scenes: list[Scene], pictures: list[Image.Image]
) -> None:
    model: Any = Model()
    found = of_variations(model, pictures, scenes)
    assert found.numbers == {"background": 1, "colour": 1, "shape": 1, "size": 1, "all": 1, "differ": 0}
    others = of_variations(model, pictures[1:] + pictures[:1], scenes).numbers
    assert others["all"] == 0


def test_a_picture_that_stays_has_not_changed_as_named_and_all_else_is_as_it_was(
    scenes: list[Scene], pictures: list[Image.Image]
) -> None:
    model: Any = Model()
    numbers = of_differences(model, pictures, scenes).numbers
    shares = {name: set(each.values()) for name, each in numbers.items() if isinstance(each, dict)}
    assert len(next(iter(numbers.values()))) == THETAS + 1  # type: ignore[arg-type]
    for attribute in ("colour", "shape", "background"):
        assert shares[f"{attribute}: changed as named"] == {0.0}
        assert shares[f"{attribute}: all else as it was"] == {1.0}
        assert shares[f"{attribute}: both"] == {0.0}


def test_a_picture_of_one_end_is_as_far_from_the_middle_as_one_of_the_other(
    scenes: list[Scene], pictures: list[Image.Image]
) -> None:
    first, last = scenes[:2]
    there, back = (position(read_scene(picture), first, last) for picture in (pictures[1], pictures[0]))
    differ = [
        before != after
        for name in ("background", "colour", "shape", "size")
        for before, after in zip(words(first, name), words(last, name), strict=True)
    ]
    assert (there, back) == (sum(differ), -sum(differ))
    assert sum(differ) > 0
    assert position(read_scene(pictures[0]), first, first) == 0


def test_an_interpolation_that_stands_still_and_then_jumps_never_goes_back(
    scenes: list[Scene], pictures: list[Image.Image]
) -> None:
    ends = {False: pictures[:2], True: pictures[1::-1]}

    class Jumps(Model):
        clip = SimpleNamespace(encode_image=lambda images: F.normalize(images.flatten(1), dim=1))

        def __init__(self, returns: bool) -> None:
            self.returns = returns

        def interpolate(self, a: Image.Image, b: Image.Image, *, n: int, **how: Any) -> Any:
            images = [to_tensor(a)] * (n - 3) + [to_tensor(b), to_tensor(a if self.returns else b), to_tensor(b)]
            return SimpleNamespace(images=torch.stack(images), each=[{"theta": 0.0}] * n)

        def seen(self, picture: Image.Image) -> Any:
            return SimpleNamespace(pixels=to_tensor(picture)[None])

    for returns, two in ends.items():
        model: Any = Jumps(returns)
        numbers: Any = of_interpolations(model, two, [scenes[1], scenes[0]] if returns else scenes[:2]).numbers
        assert numbers["1 candidate"] == numbers["8 candidates"]
        numbers = numbers["1 candidate"]
        steps = (numbers["steps_forward"], numbers["steps_nowhere"], numbers["steps_back"])
        assert steps == ((2 / 8, 5 / 8, 1 / 8) if returns else (1 / 8, 7 / 8, 0))
        assert numbers["steps_back_by_checker"] == returns / 8
        assert numbers["ends_psnr"] == pytest.approx(100)


@pytest.mark.parametrize(("edits", "pastes"), [(True, True), (False, True), (True, False)])
def test_edits_that_are_made_are_right_and_kept_pixels_are_those_of_the_picture(
    edits: bool, pastes: bool, scenes: list[Scene], pictures: list[Image.Image]
) -> None:
    model: Any = Model(edits, pastes)
    numbers = of_edits(model, pictures, scenes).numbers
    assert numbers == {name: {"best": edits, "each": edits, "exact": pastes} for name in ("colour", "shape")}


@pytest.mark.slow
def test_everything_is_measured_and_written(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.demo.unclip, "CANDIDATES", 2)
    for name in ("DRAWING", "FROM_NOISE"):
        monkeypatch.setattr(training.demo.unclip, name, Drawing(steps=2))
    # a tokenizer of the world's words, so that whole captions are read
    clip, rng = CLIP.load(bundle / "clip"), np.random.default_rng(0)
    told = [caption(scene, rng) for scene in some_scenes(200, "trained", seed=1)]
    tokenizer = CLIPTokenizer.train(told, 600)
    CLIP(replace(clip.config, vocab_size=tokenizer.vocab_size), tokenizer).save(tmp_path / "clip")
    path = write_unclip(tmp_path / "tiny", tmp_path / "clip", side=32)
    decoder = Decoder.load(path / "decoder")
    with_random_weights(decoder.inpainting()).save(path / "decoder", decoder.metadata)
    measure(path, tmp_path / "measured", lambda line: None, n_captions=1, n_pictures=2)
    numbers = json.loads((tmp_path / "measured" / "table.json").read_text())
    assert [*numbers] == ["captions", "inversion", "variations", "text differences", "interpolation", "edits"]
    shares = {"best_of_1", "best_by_clip", "any", "first_enlarged", "best_enlarged"}
    kinds = {f"{split}, {source}" for split in get_args(Split) for source in SOURCES}
    assert {name: {*found} for name, found in numbers["captions"].items()} == dict.fromkeys(kinds, shares)
    assert numbers["edits"]["colour"]["exact"] == 1
    table = (tmp_path / "measured" / "table.txt").read_text()
    sheets = [f"{name.replace(' ', '-')}.png" for name in numbers if name != "inversion"]
    for name in numbers:
        assert f"{name}\n" in table
    assert sorted(file.name for file in (tmp_path / "measured").glob("*.png")) == sorted(sheets)


def test_a_finished_demonstration_takes_no_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text("{}")
    command = ["demo", "--unclip", "--out", str(tmp_path)]
    assert main([*command, "--dvae.steps", "7"]) == 1
    assert (
        f"the demonstration in {tmp_path} is finished, and --dvae.steps would change nothing" in capsys.readouterr().err
    )
    assert main([*command, "--auto-restart", "2"]) == 1
    assert "--auto-restart does not go with --unclip" in capsys.readouterr().err


def test_another_world_and_several_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "world.json").write_text('{"version": 0}')
    ranks = join()
    with pytest.raises(ValueError, match="a demonstration of another world"):
        run_unclip_demo(recipe("demo"), tmp_path, ranks, print)
    with pytest.raises(ValueError, match="the demonstration runs in one process"):
        run_unclip_demo(recipe("demo"), tmp_path, replace(ranks, size=2), print)
