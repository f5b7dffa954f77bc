import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle.cli.main import main
from dalle.editing.regions import Region
from dalle.sampling import SamplingDefaults
from dvae.images import open_image, to_image

CAPTION = "a red cube on a blue cube"
SIDE = 16
PAPER = SamplingDefaults()


def picture(width=SIDE, height=SIDE):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def box(left, top, right, bottom, width=SIDE, height=SIDE):
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def white(mask):
    return Image.fromarray(mask.astype(np.uint8) * 255)


def with_hole(image, mask):
    holed = image.convert("RGBA")
    holed.putalpha(white(~mask))
    return holed


def test_a_mask_is_booleans_white_or_transparency():
    image, mask = picture(), box(4, 5, 9, 10)
    forms = [mask, torch.from_numpy(mask), white(mask), white(mask).convert("1"), with_hole(image, mask)]
    forms.append(white(mask).convert("RGBA"))  # opaque everywhere: the white of it counts
    for form in forms:
        assert torch.equal(Region.of(image, form, SIDE).is_new, torch.from_numpy(mask))


def test_a_token_is_unknown_if_its_cell_touches_the_mask():
    unknown = Region.of(picture(), box(3, 8, 5, 9), SIDE).unknown(4).reshape(4, 4)
    assert unknown.nonzero().tolist() == [[2, 0], [2, 1]]


def test_a_pixel_that_a_large_mask_touches_is_drawn_anew():
    mask = box(101, 101, 102, 102, width=400, height=320)
    region = Region.of(picture(400, 320), mask, SIDE)
    assert int(region.is_new.sum()) == 1
    assert region.is_new[5, 3]  # 40 columns are cropped, a pixel is 20 wide


def test_a_small_mask_of_a_large_picture_is_enlarged():
    region = Region.of(picture(320, 320), box(1, 0, 2, 1, width=4, height=4), SIDE)
    assert region.is_new.nonzero().tolist() == [[y, x] for y in range(4) for x in range(4, 8)]


def test_the_seam_is_the_difference_of_neighbours_across_the_border():
    image = Image.new("RGB", (SIDE, SIDE), (10, 10, 10))
    region = Region.of(image, box(8, 0, SIDE, SIDE), SIDE)
    drawn = region.paste(torch.full((1, 3, SIDE, SIDE), 40 / 255))
    assert region.original_seam == 0
    assert region.seams(drawn).tolist() == [pytest.approx(30, abs=1e-3)]
    assert Region.of(image, np.ones((SIDE, SIDE), dtype=bool), SIDE).original_seam == 0  # there is no border


def test_kept_pixels_come_back_exactly(pipe):
    image, mask = picture(), box(3, 6, 11, 13)
    edited = pipe.edit(image, mask, CAPTION, n=12, keep=5, settings=PAPER)
    drawn = pipe.decode(edited.tokens)
    for pixels, decoded in zip(edited.images, drawn, strict=True):
        shown = np.asarray(to_image(pixels))
        assert np.array_equal(shown[~mask], np.asarray(image)[~mask])
        assert np.array_equal(shown[mask], np.asarray(to_image(decoded))[mask])
    known = ~Region.of(image, mask, SIDE).unknown(4)
    tokens = pipe.dvae.encode(Region.of(image, mask, SIDE).pixels[None]).flatten()
    assert torch.equal(edited.tokens[:, known], tokens[known].expand(len(edited.tokens), -1))
    assert edited.n_unknown == int((~known).sum())
    assert (edited.scores.diff() <= 0).all()


def test_the_same_seed_makes_the_same_edit(pipe):
    first, again, other = (pipe.edit(picture(), box(3, 6, 11, 13), CAPTION, n=8, keep=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.images, again.images)
    assert first.candidates == again.candidates
    assert not torch.equal(first.tokens[0], other.tokens[0])


def test_everything_drawn_anew_is_plain_generation(pipe):
    edited = pipe.edit(picture(), np.ones((SIDE, SIDE), dtype=bool), CAPTION, n=8, keep=8, settings=PAPER)
    plain = pipe.generate(CAPTION, n=8, keep=8)
    assert edited.candidates == plain.candidates
    assert torch.equal(edited.tokens, plain.tokens)
    assert torch.equal(edited.images, plain.images)
    assert torch.equal(edited.log_likelihoods, plain.log_likelihoods)


def test_a_kept_top_is_completed_as_by_generation(pipe):
    image = picture()
    edited = pipe.edit(image, box(0, 8, SIDE, SIDE), CAPTION, n=8, keep=8, settings=PAPER)
    completed = pipe.generate(CAPTION, n=8, keep=8, prefix=pipe.prefix(image, 2))
    assert dict(zip(edited.candidates, edited.tokens.tolist(), strict=True)) == dict(
        zip(completed.candidates, completed.tokens.tolist(), strict=True)
    )


def test_nothing_drawn_anew_returns_the_picture(pipe):
    image = picture()
    edited = pipe.edit(image, np.zeros((SIDE, SIDE), dtype=bool), CAPTION, n=4, keep=2)
    assert len(edited.images) == 1
    assert np.array_equal(np.asarray(to_image(edited.images[0])), np.asarray(image))
    assert edited.n_unknown == 0


def test_batches_are_populations_joined_by_their_weights(pipe):
    told = []
    edited = pipe.edit(
        picture(),
        box(3, 6, 11, 13),
        CAPTION,
        n=12,
        keep=12,
        batch_size=5,
        settings=PAPER,
        progress=lambda done, total: told.append((done, total)),
    )
    assert edited.n_different == len(edited.candidates) <= 12
    assert len({tuple(tokens) for tokens in edited.tokens.tolist()}) == len(edited.candidates)
    assert told[-1] == (12, 12)
    assert 1 <= edited.effective <= 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": box(0, 0, 4, 4, width=32)}, "the mask has 32×16 pixels, the picture 16×16: give a mask of the same"),
        ({"mask": np.zeros((SIDE, SIDE))}, "booleans of shape"),
        ({"mask": "mask.png"}, "booleans of shape"),
        ({"image": "picture.png"}, "a picture, opened by"),
        ({"caption": " "}, "the caption is empty"),
        ({"n": 4, "keep": 5}, "keep is 5, but 4 candidates"),
        ({"seed": -1, "n": 1, "keep": 1, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_words(pipe, change, message):
    arguments = {"image": picture(), "mask": box(0, 0, 4, 4), "caption": CAPTION} | change
    with pytest.raises(ValueError, match=message):
        pipe.edit(**arguments)


@pytest.fixture
def files(tmp_path):
    picture().save(tmp_path / "picture.png")
    white(box(3, 6, 11, 13)).save(tmp_path / "mask.png")
    return tmp_path


def arguments(bundle, files, *more):
    given = [files / "picture.png", CAPTION, "--mask", files / "mask.png", "--bundle", bundle, "--out", files / "out"]
    return ["edit", *map(str, given), "-n", "6", "--keep", "3", "--device", "cpu", *more]


def test_dalle_edit_writes_pictures_sheet_and_results(bundle, files, capsys):
    assert main(arguments(bundle, files, "--paper-sampling")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d pictures? in .*out: see sheet.png and results.jsonl \(\d+ of 16 tokens drawn anew", printed)
    assert "across the border pixels differ by" in printed
    lines = [json.loads(line) for line in (files / "out/results.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert line["mask"].endswith("mask.png")
        assert line["seam"] >= 0
        with Image.open(files / "out" / line["file"]) as written:
            assert json.loads(written.text["seam"]) == line["seam"]
            kept = ~box(3, 6, 11, 13)
            assert np.array_equal(np.asarray(written)[kept], np.asarray(picture())[kept])
    assert open_image(files / "out/sheet.png").width > 3 * 128


HOLE = box(2, 2, 5, 6)
TURNED = Image.Exif()
TURNED[0x0112] = 6
LARGE_TEXT = PngInfo()
LARGE_TEXT.add_text("notes", "x" * (2 << 20), zip=True)


def in_a_palette():
    image = Image.fromarray(HOLE.astype(np.uint8))
    image.putpalette([255, 255, 255, 255, 0, 0])
    return image


@pytest.mark.parametrize(
    ("image", "name", "options"),
    [
        (with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE), "mask.png", {}),
        (with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE), "mask.tif", {}),
        (with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE), "mask.webp", {"lossless": True}),
        (with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE).convert("LA"), "mask.png", {}),
        (
            with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE).transpose(Image.Transpose.ROTATE_90),
            "mask.png",
            {"exif": TURNED},
        ),
        (with_hole(Image.new("RGB", (SIDE, SIDE), "white"), HOLE), "mask.png", {"pnginfo": LARGE_TEXT}),
        (in_a_palette(), "mask.png", {"transparency": 1}),
        (in_a_palette(), "mask.gif", {"transparency": 1}),
        (Image.fromarray(HOLE.astype(np.uint16) * 300), "mask.png", {"transparency": 300}),
    ],
    ids=["PNG", "TIFF", "WebP", "grey", "turned", "with a large text", "palette", "GIF", "16 bits"],
)
def test_a_transparent_hole_in_a_file_is_the_mask(tmp_path, image, name, options):
    image.save(tmp_path / name, **options)
    mask = open_image(tmp_path / name, keep_alpha=True)
    assert torch.equal(Region.of(picture(), mask, SIDE).is_new, torch.from_numpy(HOLE))


def test_a_mask_of_16_bits_is_white_where_it_is_bright():
    bright = Image.fromarray(np.where(HOLE, 60_000, 300).astype(np.uint16))
    assert torch.equal(Region.of(picture(), bright, SIDE).is_new, torch.from_numpy(HOLE))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda files: (files / "mask.png").unlink(), "no picture at"),
        (lambda files: (files / "mask.png").write_bytes(b"no picture"), "is not a picture"),
        (lambda files: white(box(0, 0, 9, 9, width=40)).save(files / "mask.png"), "of the same proportions"),
        (lambda files: (files / "picture.png").unlink(), "no picture at"),
        (lambda files: white(box(0, 0, 0, 0)).save(files / "mask.png"), "nothing transparent or white"),
        (lambda files: (files / "out").write_text(""), "out is a file: give a folder"),
    ],
)
def test_dalle_edit_tells_what_is_wrong_in_one_line(bundle, files, capsys, break_it, message):
    break_it(files)
    assert main(arguments(bundle, files)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (files / "out/results.jsonl").exists()
