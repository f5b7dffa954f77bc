"""The commands with DALL·E 2's bundles: what they write, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle.cli.main import main
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from dvae.images import open_image, to_image

CAPTION = "a red cube on a blue cube"
STEPS = ["--steps", "3", "--upsampler-steps", "2"]
CAPTION_STEPS = [*STEPS, "--prior-steps", "2"]
DRAWING = Drawing(steps=3, upsampler_steps=2, prior_steps=2)


@pytest.fixture
def files(pictures: tuple[Image.Image, Image.Image], tmp_path: Path) -> tuple[Path, Path]:
    """Two pictures as files."""
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def written(out: Path, hashes: dict[str, str], **expected: Any) -> list[dict[str, Any]]:
    """The lines of a folder, each of which a picture says too."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for line in lines:
        assert {name: line[name] for name in expected} == expected
        assert line["hashes"] == hashes
        with Image.open(out / line["file"]) as picture:
            assert picture.size == (16, 16)
            told = {name: picture.text[name] for name in line if isinstance(line[name], str)}  # type: ignore[attr-defined]
            numbers = {name: json.loads(picture.text[name]) for name in line if name not in told}  # type: ignore[attr-defined]
            assert told | numbers == line
    return lines


def assert_drawn(out: Path, lines: list[dict[str, Any]], images: torch.Tensor) -> None:
    for line, image in zip(lines, images, strict=True):
        assert Image.open(out / line["file"]).tobytes() == to_image(image).tobytes()


def test_generate_draws_by_dalle_2_where_the_bundle_has_it_alone(
    unclip_bundle: Path, unclip: UnCLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--bundle", unclip_bundle, "-n", 3, "--keep", 2, "--out", out, "--seed", 5]
    assert run("generate", CAPTION, "a cat", *given, *CAPTION_STEPS) == 0
    told = capsys.readouterr()
    assert "4 pictures" in told.out
    assert "note: sampling at guidance 3, 3 steps of ddim, 2 of the prior, ranked by CLIP\n" in told.err
    lines = written(
        out, unclip.hashes, seed=5, model="unclip", guidance=3.0, steps=3, prior_steps=2, upsampler_steps=[2]
    )
    assert [(line["caption"], line["rank"]) for line in lines] == [
        (CAPTION, 1),
        (CAPTION, 2),
        ("a cat", 1),
        ("a cat", 2),
    ]
    result = unclip.generate(CAPTION, n=3, keep=2, seed=5, steps=3, prior_steps=2, upsampler_steps=2)
    assert_drawn(out, lines[:2], result.images)
    assert "log_likelihood" not in lines[0]
    assert (out / "sheet.png").exists()
    assert run("generate", CAPTION, *given, *CAPTION_STEPS, "--guidance", 1, "--size", 8) == 0
    line = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    assert (line["guidance"], line["upsampler_steps"]) == (1.0, [])
    assert Image.open(out / line["file"]).size == (8, 8)


def test_generate_draws_by_dalle_where_both_are_unless_told(
    bundle_copy: Path, unclip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("prior", "decoder", "upsampler-16"):
        shutil.copytree(unclip_bundle / part, bundle_copy / part)
    given = ["--bundle", bundle_copy, "-n", 2, "--keep", 1]
    assert run("generate", CAPTION, *given, "--out", tmp_path / "one") == 0
    assert "log_likelihood" in (tmp_path / "one/results.jsonl").read_text()
    assert run("generate", CAPTION, *given, "--out", tmp_path / "two", "--model", "unclip", *CAPTION_STEPS) == 0
    assert '"model": "unclip"' in (tmp_path / "two/results.jsonl").read_text()
    capsys.readouterr()
    assert run("generate", CAPTION, *given, "--out", tmp_path / "three", "--steps", 3) == 1
    assert "error: --steps are for DALL·E 2, but DALL·E draws here" in capsys.readouterr().err
    shutil.rmtree(bundle_copy / "decoder")
    assert run("generate", CAPTION, *given, "--out", tmp_path / "four", "--model", "unclip") == 1
    assert "has no decoder: make it with `dalle-train decoder`" in capsys.readouterr().err


def test_vary_writes_pictures_with_the_gist_of_one(
    unclip_bundle: Path, unclip: UnCLIP, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("vary", files[0], "--bundle", unclip_bundle, "-n", 2, "--eta", 0.5, "--out", out, *STEPS) == 0
    lines = written(out, unclip.hashes, seed=0, eta=0.5, guidance=1.0, steps=3, image=str(files[0]), caption="")
    assert [line["candidate"] for line in lines] == [0, 1]
    assert_drawn(out, lines, unclip.variations(open_image(files[0]), n=2, eta=0.5, drawing=DRAWING).images)
    assert Image.open(out / "sheet.png").width > 3 * 128


def test_blend_writes_a_strip_from_one_picture_to_another(
    unclip_bundle: Path, unclip: UnCLIP, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ["--bundle", unclip_bundle, "-n", 3, "--out", out, *STEPS]
    assert run("blend", *files, *given, "--keep-ends") == 0
    expected = {"image": str(files[0]), "last_image": str(files[1]), "eta": 0.0}
    lines = written(out, unclip.hashes, keep_ends=True, candidates=8, guidance=1, **expected)
    assert [line["theta"] for line in lines] == [0, 0.5, 1]
    between = unclip.interpolate(*map(open_image, files), n=3, keep_ends=True, drawing=DRAWING)
    assert_drawn(out, lines, between.images)
    assert Image.open(out / "strip.png").width > 5 * 128
    assert run("blend", *files, *given, "--candidates", 1) == 0
    written(out, unclip.hashes, keep_ends=False, candidates=1, guidance=3.0, **expected)
    assert run("blend", *files, *given, "--precision", "bf16") == 0
    written(out, unclip.hashes, batch_size=10, **expected)  # 8 in the middle and both ends, all at once


def test_diff_writes_a_strip_from_a_picture_towards_a_caption(
    unclip_bundle: Path, unclip: UnCLIP, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ["--bundle", unclip_bundle, "-n", 3, "--theta", 0.5, "--out", out, *STEPS]
    assert run("diff", files[0], "a red cube", "a sphere", *given) == 0
    lines = written(out, unclip.hashes, before="a red cube", caption="a sphere", guidance=1.0, image=str(files[0]))
    assert [line["theta"] for line in lines] == [0, 0.25, 0.5]
    changed = unclip.text_diff(open_image(files[0]), "a red cube", "a sphere", theta=0.5, n=3, drawing=DRAWING)
    assert_drawn(out, lines, changed.images)
    assert Image.open(out / "strip.png").width > 4 * 128


def test_edit_draws_by_dalle_2_and_keeps_what_is_kept(
    editing_bundle: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mask = tmp_path / "out", Image.new("L", (30, 20))
    mask.paste(255, (9, 4, 17, 11))
    mask.save(tmp_path / "mask.png")
    given = ["--mask", tmp_path / "mask.png", "--bundle", editing_bundle, "-n", 3, "--keep", 2, "--out", out]
    assert run("edit", files[0], CAPTION, *given, *CAPTION_STEPS) == 0
    assert "across the border pixels differ by" in capsys.readouterr().out
    unclip = UnCLIP.load(editing_bundle)
    lines = written(out, unclip.hashes, guidance=3.0, image=str(files[0]), mask=str(tmp_path / "mask.png"))
    edited = unclip.edit(open_image(files[0]), mask, CAPTION, n=3, keep=2, drawing=DRAWING)
    assert_drawn(out, lines, edited.images)
    assert [line["seam"] for line in lines] == edited.seams.tolist()
    assert (out / "sheet.png").exists()


def test_options_of_the_other_model_are_refused(
    bundle: Path, unclip_bundle: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_two = "are for DALL·E, but DALL·E 2 draws here: leave them out"
    edit = ["edit", files[0], CAPTION, "--mask", files[1]]
    for message, arguments in {
        f"--temperature and --paper-sampling {of_two}": [
            *("generate", CAPTION, "--temperature", "1", "--paper-sampling"),
            *("--bundle", unclip_bundle),
        ],
        f"--image and --compile and --early-abandon {of_two}": [
            *("generate", CAPTION, "--image", files[0], "--compile", "--early-abandon", "--bundle", unclip_bundle)
        ],
        f"--top-k {of_two}": [*edit, "--top-k", "3", "--bundle", unclip_bundle],
        "this decoder cannot edit: it has no channels": [*edit, "--bundle", unclip_bundle],
        "--steps and --sampler are for DALL·E 2, but DALL·E draws here": [
            *(*edit, "--steps", "3", "--sampler", "ddpm", "--bundle", bundle)
        ],
        f"the bundle {bundle} has no prior": ["vary", files[0], "--bundle", bundle],
        "eta is 2.0; expected a number from 0 to 1": ["vary", files[0], "--eta", 2, "--bundle", unclip_bundle],
        "theta is 2.0; expected": ["diff", files[0], "a", "b", "--theta", 2, "--bundle", unclip_bundle],
        "the caption is empty": ["diff", files[0], "a", " ", "--bundle", unclip_bundle],
        "n is 0; at least 1": ["vary", files[0], "-n", 0, "--precision", "bf16", "--bundle", unclip_bundle],
        "n is 1; it must be at least 2": ["diff", files[0], "a", "b", "-n", 1, "--bundle", unclip_bundle],
        "n is -3; at least 1": ["blend", *files, "-n", -3, "--precision", "bf16", "--bundle", unclip_bundle],
        "no picture at nothing.png": ["blend", files[0], "nothing.png", "--bundle", unclip_bundle],
    }.items():
        assert run(*arguments, "--out", tmp_path / "out") == 1
        told = capsys.readouterr().err
        assert f"error: {message}" in told
        assert "Traceback" not in told
