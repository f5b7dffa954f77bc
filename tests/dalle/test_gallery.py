import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle.output.sheets import Section, contact_sheet, save_png, side_by_side, slug

RED = (255, 0, 0)


def red(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, RED)


def sheet_of(images: list[Image.Image], labels: list[str], columns: int = 8) -> Image.Image:
    return contact_sheet([("", images, labels)], columns=columns)


def share_of(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, found in image.getcolors(1 << 24) if found == colour)


def test_small_pictures_are_at_least_128_pixels_wide_on_the_sheet() -> None:
    assert share_of(sheet_of([red()], ["a label"]), RED) == 128 * 128


def test_large_and_narrow_pictures_fit_their_place() -> None:
    sheet = sheet_of([red((3000, 2)), red((1, 1)), red((2, 3000))], ["wide", "tiny", "tall"], columns=3)
    assert max(sheet.size) < 900


def test_every_picture_of_every_section_is_on_the_sheet() -> None:
    sections = [Section("a heading", [red()] * 3, ["x"] * 3), Section("another", [red()], ["y"])]
    sheet = contact_sheet(sections, title="title", columns=2)
    assert share_of(sheet, RED) == 4 * 128 * 128


def test_labels_change_the_sheet_and_long_ones_do_not_widen_it() -> None:
    short = sheet_of([red()], ["0.1"])
    long = sheet_of([red()], ["antidisestablishmentarianism" * 500])
    assert short.tobytes() != sheet_of([red()], ["0.2"]).tobytes()
    assert long.width == short.width
    assert long.height < 400


@pytest.mark.parametrize("text", ["", "一只猫坐在椅子上", "🦄🌈", "\ud83d", "a\0b", "line\nline", "ß×·–…", " " * 50])
def test_any_text_can_be_a_title_a_heading_and_a_label(text: str) -> None:
    sheet = contact_sheet([Section(text, [red()], [text])], title=text)
    assert share_of(sheet, RED) == 128 * 128


def test_sheets_say_what_is_wrong_with_their_arguments() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        sheet_of([], [])
    with pytest.raises(ValueError, match="2 pictures and 1 labels"):
        sheet_of([red(), red()], ["one"])
    with pytest.raises(ValueError, match="columns is 0"):
        sheet_of([red()], [""], columns=0)
    with pytest.raises(ValueError, match="1 originals and 2 reconstructions"):
        side_by_side([red()], [red(), red()], [""])


def test_the_original_is_left_of_its_reconstruction() -> None:
    blue = Image.new("RGB", (128, 128), (0, 0, 255))
    sheet = side_by_side([red((128, 128))], [blue], ["PSNR 12.0"], title="")
    assert sheet.getpixel((20, 20)) == RED
    assert sheet.getpixel((sheet.width - 20, 20)) == (0, 0, 255)


def test_inputs_of_a_sheet_are_not_modified() -> None:
    image = red((10, 20))
    sheet_of([image], ["x"])
    assert (image.size, image.getpixel((0, 0))) == ((10, 20), RED)


def test_metadata_is_read_back_from_the_png_also_beyond_ascii(tmp_path) -> None:
    metadata = {"caption": "一只猫 🐈\nnew line", "score": "0.25", "seed": "0"}
    save_png(red(), tmp_path / "x.png", metadata)
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == metadata
        assert image.size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_metadata_that_png_cannot_hold_is_replaced_or_refused(tmp_path) -> None:
    save_png(red(), tmp_path / "x.png", {"caption": "a\0b\ud83d"})
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["caption"] == "a\N{REPLACEMENT CHARACTER}b?"
    with pytest.raises(ValueError, match="PNG keyword"):
        save_png(red(), tmp_path / "y.png", {"": "text"})


def test_a_failed_write_keeps_the_older_file(tmp_path, monkeypatch) -> None:
    save_png(red(), tmp_path / "x.png", {"caption": "older"})

    def full_disk(self: Image.Image, path, **options) -> None:
        path.write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(red(), tmp_path / "x.png", {"caption": "newer"})
    monkeypatch.undo()
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == {"caption": "older"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_plain_captions_are_readable_slugs() -> None:
    assert slug("a red cube on a blue cube") == "a-red-cube-on-a-blue-cube"


@pytest.mark.parametrize(
    "text",
    ["../../etc/passwd", "", "🦄", "一只猫", "x" * 10_000, ".hidden", "con", "a/b\\c", "-rf", "\0", "\ud83d"],
)
def test_slugs_are_safe_file_names(text: str) -> None:
    name = slug(text)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert len(name) <= 60
    assert name != "con"


def test_different_texts_have_different_slugs() -> None:
    texts = [
        "a red cube",
        "A red cube",
        "a red-cube",
        "a  red cube",
        "a red cube.",
        "",
        "🦄",
        "🐈",
        "x" * 99,
        "x" * 98,
    ]
    texts.append(slug("A red cube").replace("-", " "))  # a plain text that spells the slug of another one
    assert len({slug(text) for text in texts}) == len(texts)


def test_a_slug_needs_room_for_its_digits() -> None:
    with pytest.raises(ValueError, match="max_length is 5"):
        slug("a caption", 5)


@given(st.text(), st.integers(12, 80))
def test_a_slug_is_never_empty_nor_too_long(text: str, max_length: int) -> None:
    assert re.fullmatch(rf"[a-z0-9][a-z0-9-]{{0,{max_length - 1}}}", slug(text, max_length))


def test_marks_frame_the_pictures_in_their_colours_and_change_no_picture() -> None:
    sections = [Section("a heading", [red()] * 2, ["x", "y"], ["#00ff00", "#0000ff"])]
    sheet = contact_sheet(sections)
    assert share_of(sheet, RED) == 2 * 128 * 128
    for colour in ((0, 255, 0), (0, 0, 255)):
        assert share_of(sheet, colour) >= 4 * 4 * 128
    with pytest.raises(ValueError, match="2 pictures and 1 marks"):
        contact_sheet([Section("", [red()] * 2, ["x", "y"], ["#00ff00"])])
