"""Tables as people write them: every row is a picture that is written, skipped and counted, or joined to another."""

import csv
import json
import logging
import random
from pathlib import Path

import pytest
from PIL import Image
from support.corrupt import encoded
from support.sources import captions_in, pictures_in

import training.cli.main
from training.data.shards import make_shards
from training.data.shards_report import ShardReport
from training.data.sources.listing import list_source

N = 12
CAPTIONS = ["a plain one", '"the unbalanced quote', *(f"caption {n}" for n in range(2, N))]


def table(folder: Path, name: str, text: str, *, pictures: int = N) -> Path:
    """A table beside the pictures 0.jpg, 1.jpg, … in images/."""
    pictures_in(folder / "images", [f"{n}.jpg" for n in range(pictures)])
    (folder / name).write_bytes(text.encode())
    return folder / name


def rows_add_up(report: ShardReport) -> bool:
    return report.n_rows == report.n_samples + report.n_skipped + report.n_joined


# quotes


@pytest.mark.parametrize(
    ("name", "delimiter", "is_image_first"), [("t.tsv", "\t", False), ("t.csv", "|", True), ("t.csv", ",", False)]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_never_closes_swallows_no_rows(
    tmp_path: Path, name: str, delimiter: str, is_image_first: bool, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("caption", "file"), *((caption, f"{n}.jpg") for n, caption in enumerate(CAPTIONS))]
    lines = [delimiter.join(reversed(row) if is_image_first else row) for row in rows]
    with caplog.at_level(logging.WARNING):
        report = make_shards(table(tmp_path, name, end.join(lines)), tmp_path / "out")
    assert captions_in(report) == {str(n): (caption,) for n, caption in enumerate(CAPTIONS)}
    assert (report.n_rows, report.n_samples, report.n_skipped) == (N, N, 0)
    assert "1 line with a quote that does not close" in caplog.text
    assert "(line 3)" in caplog.text


@pytest.mark.parametrize("closing", ['a tube of 5"', 'a "quoted" word', '"', '"closed"', 'x ""'])
def test_a_quote_that_closes_on_a_later_row_swallows_no_rows(tmp_path: Path, closing: str) -> None:
    captions = [*CAPTIONS[:6], closing, *CAPTIONS[7:]]
    text = "caption\tfile\n" + "".join(f"{caption}\t{n}.jpg\n" for n, caption in enumerate(captions))
    report = make_shards(table(tmp_path, "t.tsv", text), tmp_path / "out")
    made = captions_in(report)
    assert made["1"] == ('"the unbalanced quote',)
    assert [made[str(n)] for n in (2, 3, 4, 5, 7, 11)] == [(CAPTIONS[n],) for n in (2, 3, 4, 5, 7, 11)]
    assert (report.n_rows, report.n_samples, rows_add_up(report)) == (N, N, True)


def test_quoted_fields_with_line_ends_separators_and_quotes_stay_whole(tmp_path: Path) -> None:
    text = 'file,caption\n0.jpg,"two\nlines, a ""quoted"" word"\n1.jpg,"a cat, sits\r\n\r\nb, c, d"\n2.jpg,"plain"\n'
    report = make_shards(table(tmp_path, "t.csv", text), tmp_path / "out")
    assert captions_in(report) == {
        "0": ('two lines, a "quoted" word',),
        "1": ("a cat, sits b, c, d",),
        "2": ("plain",),
    }
    assert report.n_rows == 3


def test_a_quoted_word_at_the_start_of_a_caption_is_no_quoted_field(tmp_path: Path) -> None:
    text = 'caption,file\n"Stop" sign,0.jpg\n"a ""big"" dog",1.jpg\n"a \\"small\\" dog",2.jpg\n'
    report = make_shards(table(tmp_path, "t.csv", text), tmp_path / "out")
    assert captions_in(report) == {"0": ('"Stop" sign',), "1": ('a "big" dog',), "2": ('a "small" dog',)}


def test_many_open_quotes_take_no_square_of_time(tmp_path: Path) -> None:
    text = "caption\tfile\n" + "".join(f'"open {n}\tgone{n}\n' for n in range(2_000)) + "last\t0.jpg\n"
    report = make_shards(table(tmp_path, "t.tsv", text, pictures=1), tmp_path / "out")
    assert (report.n_rows, report.n_samples, report.skipped) == (2_001, 1, {"missing image": 2_000})


_PIECES = ['"', '""', "a", " ", "word", ",", "|", "\\", "'", "é", '"x"', ", ", "\u2028", "\x0b", '5"']


def captions_of(chance: random.Random, pieces: list[str]) -> list[str]:
    return ["".join(chance.choices(pieces, k=chance.randrange(1, 9))) + "z" for _ in range(chance.randrange(1, 15))]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_quotes_an_unquoted_table_has_no_row_is_lost_or_shifted(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(20):
        delimiter = chance.choice("\t|")
        captions = [text.replace(delimiter, "") for text in captions_of(chance, _PIECES)]
        lines = ["file" + delimiter + "caption", *(f"{n}.jpg{delimiter}{text}" for n, text in enumerate(captions))]
        if chance.random() < 0.5:
            lines = [delimiter.join(line.split(delimiter)[::-1]) for line in lines]
        source = tmp_path / f"{number}.csv"
        source.write_bytes(chance.choice(["\n", "\r\n", "\r"]).join(lines).encode())
        pictures = list_source(source, None).pictures
        assert [picture.name for picture in pictures] == [f"{n}.jpg" for n in range(len(captions))], lines
        for picture, caption in zip(pictures, captions, strict=True):
            (found,) = picture.captions
            assert found.replace('"', "") == caption.replace('"', ""), lines


@pytest.mark.parametrize("seed", range(20))
def test_well_quoted_tables_come_back_as_they_were(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(20):
        captions = captions_of(chance, [*_PIECES, "\n", "\r\n", "\n\n", "\t", ";"])
        source = tmp_path / f"{number}.csv"
        with source.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=chance.choice(",;\t|"), quoting=chance.choice([0, 1]))
            writer.writerow(["caption", "n", "file"])
            writer.writerows([text, n, f"{n}.jpg"] for n, text in enumerate(captions))
        listing = list_source(source, None)
        assert [picture.captions for picture in listing.pictures] == [(text,) for text in captions]


# separators and counts


def test_separators_in_an_unquoted_caption_are_part_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "file,caption\n0.jpg,a cat, sitting, alone\n1.jpg,plain,,\n2.jpg\n,,\n"
    report = make_shards(table(tmp_path, "t.csv", text), tmp_path / "out")
    assert captions_in(report) == {"0": ("a cat, sitting, alone",), "1": ("plain",)}
    assert (report.n_rows, report.skipped) == (3, {"no caption": 1})
    assert "1 line with more ',' than the header: taken as part of the caption (line 2)" in caplog.text
    first = make_shards(table(tmp_path, "u.csv", "caption,file\na cat, sitting,0.jpg\n"), tmp_path / "out")
    assert captions_in(first) == {"0": ("a cat, sitting",)}


def test_where_a_separator_belongs_is_not_guessed_in_wider_tables(tmp_path: Path) -> None:
    text = "file,caption,licence\n0.jpg,a cat, sitting,CC0\n1.jpg,plain,CC0\n"
    report = make_shards(table(tmp_path, "t.csv", text), tmp_path / "out")
    assert (report.n_rows, report.skipped) == (2, {"more fields than the header": 1})
    assert report.examples["more fields than the header"] == ("line 2",)


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\nfile;caption\r\n0.jpg;a, b\r\n",  # as Excel writes it
        '\ufefffile,caption\n0.jpg,"a, b"\n',
        "\n\nfile|caption\n0.jpg|a, b\n",
        "file\tcaption\n0.jpg\ta, b\n",
    ],
)
def test_any_usual_separator_and_mark_is_understood(tmp_path: Path, text: str) -> None:
    for name in ("t.csv", "t.tsv"):
        report = make_shards(table(tmp_path, name, text, pictures=1), tmp_path / "out", overwrite=True)
        assert captions_in(report) == {"0": ("a, b",)}


def test_tables_in_utf16_are_read_and_nul_bytes_are_told(tmp_path: Path) -> None:
    source = table(tmp_path, "t.csv", "", pictures=1)
    source.write_bytes("file,caption\n0.jpg,é 🎈\n".encode("utf-16"))
    assert captions_in(make_shards(source, tmp_path / "out")) == {"0": ("é 🎈",)}
    source.write_bytes("file,caption\n0.jpg,x\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="NUL bytes in its first line: no text, or UTF-16 without its mark"):
        make_shards(source, tmp_path / "two")
    source.write_bytes(b"file,caption\n0.jpg,a\0b\n\0.jpg,c\n")
    report = make_shards(source, tmp_path / "three")
    assert report.skipped == {"missing image": 1}
    assert captions_in(report) == {"0": ("a b",)}


def test_very_long_fields_are_read(tmp_path: Path) -> None:
    text = f"file,caption,base64\n0.jpg,{'long ' * 40_000},{'A' * 1_000_000}\n"
    report = make_shards(table(tmp_path, "t.csv", text, pictures=1), tmp_path / "out")
    assert len(captions_in(report)["0"][0]) == 5 * 40_000 - 1


def test_two_columns_of_one_name_and_tables_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 columns called 'Caption': expected one"):
        make_shards(table(tmp_path, "t.csv", "caption,file,Caption\na,0.jpg,b\n"), tmp_path / "out")
    for name, text in (("t.csv", "caption,file\n"), ("t.jsonl", ""), ("t.json", "[]")):
        with pytest.raises(ValueError, match="lists no pictures: expected a row for each"):
            make_shards(table(tmp_path, name, text), tmp_path / "out")


def test_rows_are_written_skipped_or_joined_and_always_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["0.jpg,one", "0.jpg,two", "0.jpg,one", "1.jpg,", "gone.jpg,x", ",y", "http://h/a.jpg,z", "2.jpg,\u200b"]
    source = table(tmp_path, "t.csv", "\n".join(["file,caption", *rows, ""]))
    report = make_shards(source, tmp_path / "out")
    assert (report.n_rows, report.n_joined, report.n_samples, report.n_skipped) == (8, 2, 1, 5)
    assert report.skipped["empty caption"] == 2
    assert rows_add_up(report)
    assert training.cli.main.main(["shards", str(source), "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        "read 8 rows: 1 written, 5 skipped, 2 joined to a picture of another row",
        "written 1 picture, 2 captions, 1 shard",
        "skipped 5 pictures",
    ]


# names


def test_names_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    pictures_in(tmp_path / "photos", ["7.jpg", "caf\u00e9.jpg"])
    text = (
        "file,caption\nphotos\\7.jpg,seven\nphotos/cafe\u0301.jpg,a café\nC:\\photos\\8.jpg,x\n..\\..\\etc\\x.jpg,y\n"
    )
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    report = make_shards(tmp_path / "t.csv", tmp_path / "out")
    assert captions_in(report) == {"photos/7": ("seven",), "photos/café": ("a café",)}
    assert report.skipped == {"missing image": 2}


def test_pictures_that_are_not_read_are_counted_by_ending(tmp_path: Path) -> None:
    pictures_in(tmp_path, ["a.JFIF", "b.HEIC", "c.heic", "d.nef"])
    (tmp_path / "t.csv").write_text("file,caption\na.JFIF,a\nb.HEIC,b\nc.heic,c\nd.nef,d\n")
    report = make_shards(tmp_path / "t.csv", tmp_path / "out")
    assert captions_in(report) == {"a": ("a",)}
    assert report.skipped == {
        "format .heic is not read: save it as JPEG, for example with heif-convert": 2,
        "format .nef is not read: develop it to JPEG or TIFF": 1,
    }


# JSON


def test_records_of_other_fields_are_read_and_captions_that_are_no_text_counted(tmp_path: Path) -> None:
    pictures_in(tmp_path, [f"{n}.png" for n in range(6)])
    records: list[object] = [
        {"file": "0.png"},
        {"file": "1.png", "text": "a\u2028b"},
        {"file": "2.png", "prompt": "c"},
        {"file": "3.png", "caption": 7},
        {"file": "4.png", "captions": ["d", 8, None, {}]},
        {"caption": "of nothing"},
    ]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    report = make_shards(tmp_path / "t.jsonl", tmp_path / "out")
    assert captions_in(report) == {"1": ("a b",), "2": ("c",), "4": ("d",)}
    assert report.skipped == {"no caption": 1, "caption is no text": 1, "malformed row": 1}
    assert report.captions_left_out == {"caption is no text": 2}
    assert rows_add_up(report)


def test_captions_of_pictures_that_coco_does_not_list_are_counted(tmp_path: Path) -> None:
    pictures_in(tmp_path, ["1.jpg"])
    data = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": n, "caption": f"caption {n}"} for n in (1, 2, 2, 3)],
    }
    (tmp_path / "captions_x.json").write_text(json.dumps(data))
    report = make_shards(tmp_path / "captions_x.json", tmp_path / "out")
    assert report.skipped == {"captions of a picture that is not among the images": 2}
    assert rows_add_up(report)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("t.parquet", "pandas"),
        ("t.xlsx", "save it as CSV"),
        ("t.csv.gz", "unpack it first"),
        ("t.txt", r"call it \.csv"),
    ],
)
def test_files_that_are_not_read_are_refused_with_what_to_do(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"is a file of type .*: expected a folder of pictures.*{advice}"):
        make_shards(tmp_path / name, tmp_path / "out")


def test_a_binary_file_called_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(encoded(Image.new("RGB", (64, 64)), "PNG"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        make_shards(tmp_path / "t.csv", tmp_path / "out")
    (tmp_path / "t.csv").write_text('"' + "x" * 300_000)
    with pytest.raises(ValueError, match="no image column among"):
        make_shards(tmp_path / "t.csv", tmp_path / "out")
