import os
from pathlib import Path

import pytest
from PIL import Image

from storage.drawn import is_sheet
from storage.text import MAX_JSON_DEPTH, decode_text, is_visible, lines_of, lines_with_ends, parse_json, read_text


def test_only_three_line_ends_make_lines() -> None:
    inside = "form\x0cfeed \x0bvertical \x1csep \x85next \u2028line \u2029paragraph"
    text = f"{inside}\nsecond\r\nthird\rfourth"
    assert lines_of(text) == [inside, "second", "third", "fourth"]
    assert "".join(lines_with_ends(text)) == text
    assert lines_of("") == []
    assert lines_of("\n\n") == ["", ""]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_all_usual_marks_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("日本 🎈\r\nb".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "日本 🎈\r\nb"


def test_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a caf\u00e9".encode("cp1252"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 \(.* at byte 5\): save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"\xff\xfe")  # a mark alone


def test_json_of_any_depth_is_read_or_refused() -> None:
    deep = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(deep)
    assert parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in (f"[{deep}]", '{"a":' * 500 + "1" + "}" * 500, "[" * 100_000):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            parse_json(text)


@pytest.mark.parametrize(
    "blank", ["", " \t\n", "\u200b", "\ufeff\u2060\u00ad", "\0\x1b", "\u3164\u2800", "\ufe0f\u0301"]
)
def test_a_text_without_ink_is_not_visible(blank: str) -> None:
    assert not is_visible(blank)
    assert is_visible(f"{blank}.")


@pytest.mark.parametrize("text", ["a", "日", "🎈", "?", "7", "\U0001fadf", "\ue000"])
def test_letters_signs_and_new_characters_are_visible(text: str) -> None:
    assert is_visible(text)


def test_another_programs_picture_is_no_sheet(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert not is_sheet(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert not is_sheet(tmp_path / "pipe.png"), "nobody would ever write to it"
    assert not is_sheet(tmp_path / "gone.png")
