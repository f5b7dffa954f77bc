"""Folders as people have them: every picture is written or skipped with a reason, every other file is told by kind."""

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from support.sources import captions_in, pictures_in

import training.cli.main
from dalle.output.sheets import contact_sheet, save_png
from storage.drawn import is_sheet
from training.data.shards import make_shards, write_shards
from training.data.shards_report import ShardReport
from training.data.sources.folders import list_folder
from training.data.sources.pictures import LINK, LINK_TO_FOLDER


def put(path: Path, text: str = "a caption") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def files_add_up(report: ShardReport, folder: Path) -> bool:
    """Whether pictures, their captions and the other files are all files of a folder."""
    n_files = sum(path.is_file() for path in folder.rglob("*"))
    return n_files == report.n_rows + report.n_samples + sum(report.others.values())


# endings


def test_all_endings_of_pictures_are_read_or_counted_in_any_case(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JFIF", "c.jpe", "d.JFI", "e.JPEG", "f.heic", "g.HEIC", "h.Nef", "i.svg"]
    report = make_shards(pictures_in(tmp_path / "in", names, captions=True), tmp_path / "out")
    assert sorted(captions_in(report)) == ["a", "b", "c", "d", "e"]
    assert report.skipped == {
        "format .heic is not read: save it as JPEG, for example with heif-convert": 2,
        "format .nef is not read: develop it to JPEG or TIFF": 1,
        "format .svg is not read: draw it as PNG": 1,
    }
    assert (report.n_rows, report.others) == (9, {})


def test_captions_have_the_endings_that_they_have_in_shards_in_any_case(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", [f"{name}.JPG" for name in "abcdefgh"])
    for name in ("a.TXT", "b.caption", "c.Cap", "d.text"):
        put(tmp_path / "in" / name, f"of {name[0]}")
    for name, record in (("e", {"caption": "of e"}), ("f", {"prompt": "of f"}), ("g", {"url": "x"}), ("h", [1])):
        put(tmp_path / "in" / f"{name}.json", json.dumps(record))
    report = make_shards(tmp_path / "in", tmp_path / "out")
    assert captions_in(report) == {name: (f"of {name}",) for name in "abcdef"}
    assert report.skipped == {"no caption": 2}


def test_the_text_wins_over_the_json_unless_it_is_empty(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    for name in "abcd":
        put(tmp_path / "in" / f"{name}.json", json.dumps({"caption": f"json {name}"}))
    put(tmp_path / "in" / "a.txt", "text a")
    put(tmp_path / "in" / "b.txt", "")
    put(tmp_path / "in" / "c.txt", " \n")
    put(tmp_path / "in" / "d.caption", "caption d")
    put(tmp_path / "in" / "d.txt", "text d")
    report = make_shards(tmp_path / "in", tmp_path / "out")
    assert captions_in(report) == {"a": ("text a",), "b": ("json b",), "d": ("text d",)}
    assert (report.skipped, report.others) == ({"empty caption": 1}, {"second caption file of a picture": 1})


def test_captions_that_cannot_be_read_are_skipped_with_the_reason(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"])
    (tmp_path / "in" / "f.txt").write_bytes("no mark".encode("utf-16-le"))
    (tmp_path / "in" / "a.txt").write_bytes("Bob\u2019s".encode("cp1252"))
    put(tmp_path / "in" / "b.json", "{")
    put(tmp_path / "in" / "c.txt", "\u200b\ufeff")
    (tmp_path / "in" / "d.txt").write_bytes("UTF-16 \u2019".encode("utf-16"))
    put(tmp_path / "in" / "e.txt", "form\x0cfeed\u2028one")
    report = make_shards(tmp_path / "in", tmp_path / "out")
    assert captions_in(report) == {"d": ("UTF-16 \u2019",), "e": ("form feed one",)}
    reasons = ["caption is not UTF-8", "caption is in JSON that cannot be read", "empty caption"]
    assert report.skipped == {**dict.fromkeys(reasons, 1), "caption is not UTF-8": 2}


def test_other_files_are_told_by_kind(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "in", ["a.jpg", "deep/b.jpg"], captions=True)
    for name in ("lonely.txt", "Thumbs.db", "x.XMP", "y.xmp", "LICENSE", "odd.e\nnding", ".hidden.jpg", "t.csv"):
        put(folder / name)
    report = make_shards(folder, tmp_path / "out")
    assert report.others == {
        "caption without a picture": 1,
        ".db file": 1,
        ".xmp file": 2,
        "file without an ending": 2,
        "hidden file": 1,
        ".csv file": 1,
    }
    assert files_add_up(report, folder)
    assert report.examples["caption without a picture"] == ("lonely.txt",)
    assert [".xmp", "file", "2", "x.XMP,", "y.xmp"] in [line.split() for line in report.table().splitlines()]


# tables in folders


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv", "labels.parquet", "all.json"])
def test_a_folder_without_captions_names_the_table_that_is_in_it(tmp_path: Path, name: str) -> None:
    folder = pictures_in(tmp_path / "in", ["0.jpg", "1.jpg"])
    put(folder / name, "{}")
    with pytest.raises(
        ValueError, match=rf"2 × no caption \(0\.jpg, 1\.jpg\); \S*{name} may hold the captions: give the table itself"
    ):
        make_shards(folder, tmp_path / "out")
    put(folder / "0.txt")
    report = make_shards(folder, tmp_path / "out")
    assert f"{name} may hold the captions" in report.table()


# links


def test_links_are_followed_only_when_asked_and_never_in_circles(tmp_path: Path) -> None:
    library = pictures_in(tmp_path / "library", ["0.jpg", "1.jpg", "deep/2.jpg"], captions=True)
    chosen = pictures_in(tmp_path / "chosen", ["own.jpg"], captions=True)
    for name in ("0.jpg", "0.txt", "deep"):
        (chosen / name).symlink_to(library / name)
    (chosen / "again").symlink_to(library / "deep")
    (chosen / "circle").symlink_to(chosen)
    (chosen / "itself.jpg").symlink_to(chosen / "itself.jpg")
    (chosen / "broken.jpg").symlink_to(library / "gone.jpg")
    report = make_shards(chosen, tmp_path / "out")
    assert sorted(captions_in(report)) == ["own"]
    assert report.skipped == {LINK_TO_FOLDER: 3, LINK: 1, "link to no file": 2}
    assert report.n_rows == report.n_samples + report.n_skipped
    followed = make_shards(chosen, tmp_path / "two", follow_links=True)
    assert sorted(captions_in(followed)) == ["0", "again/2", "own"]
    assert followed.skipped["link to a folder that is read already"] == 2


def test_the_option_follows_links_of_tables_too_but_not_names_that_lead_out(tmp_path: Path) -> None:
    pictures_in(tmp_path, ["secret.jpg", "in/a.jpg"])
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    put(tmp_path / "in" / "t.csv", "file,caption\na.jpg,a\nlink.jpg,b\n../secret.jpg,c\n")
    command = ["shards", str(tmp_path / "in" / "t.csv"), "--out", str(tmp_path / "out")]
    assert training.cli.main.main(command) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == {
        LINK: 1,
        "outside the folder of pictures": 1,
    }
    assert training.cli.main.main([*command, "--overwrite", "--follow-links"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == {
        "outside the folder of pictures": 1
    }


def test_a_folder_that_may_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures_in(tmp_path / "in", ["a.jpg", "shut/b.jpg"], captions=True)
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [(picture.name, picture.skip) for picture in list_folder(folder).pictures] == [
        ("a.jpg", None),
        ("shut", "unreadable folder"),
    ]


# what this program wrote itself


def test_what_this_program_drew_is_no_picture_of_a_folder(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "in", ["a.jpg"], captions=True)
    picture = Image.new("RGB", (16, 16))
    save_png(contact_sheet([("", [picture], [""])]), folder / "sheet.png")
    save_png(picture, folder / "mine.png")
    (folder / "generated" / "a-cat").mkdir(parents=True)
    save_png(picture, folder / "generated" / "a-cat" / "01.png")
    line = {"caption": "a cat", "file": "a-cat/01.png", "rank": 1, "ranked_by": "clip"}
    put(folder / "generated" / "results.jsonl", json.dumps(line) + "\n")
    assert is_sheet(folder / "sheet.png")
    make_shards(folder, folder / "out")
    report = make_shards(folder, folder / "out", overwrite=True)
    assert report.others == {
        "sheet that this program drew": 1,
        "folder of `dalle generate`": 1,
        ".tar file": 1,
        ".json file": 1,
    }
    assert (report.skipped, report.tables) == ({"no caption": 1}, ())
    written = make_shards(folder / "generated" / "results.jsonl", tmp_path / "out")
    assert captions_in(written) == {"a-cat/01": ("a cat",)}


def test_the_report_of_a_second_source_does_not_replace_the_firsts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_shards(pictures_in(tmp_path / name, ["a.jpg"], captions=True), tmp_path / "out")
    make_shards(tmp_path / "one", tmp_path / "out", overwrite=True)
    reports = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {name: report["shards"][0]["name"] for name, report in reports.items()} == {
        "report.json": "one-000000.tar",
        "two-report.json": "two-000000.tar",
    }


def test_names_that_are_not_utf8_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(os.fsdecode(bytes(tmp_path) + b"/in\xff\x1b"))
    pictures_in(source, ["good.jpg", os.fsdecode(b"caf\xe9.jpg")], captions=True)
    pictures_in(source, [os.fsdecode(b"bare\xe9\x1b[2J.jpg")])
    assert training.cli.main.main(["shards", str(source), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (saved["n_samples"], saved["skipped"]) == (2, {"no caption": 1})
    assert training.cli.main.main(["check-data", "--data", str(tmp_path / "out"), "--workers", "0"]) == 0


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("training.data.shards.write_tar", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/out'") as error:
        write_shards([("a", b"", "jpg", ["x"], {})], tmp_path / "out", "x")
    assert error.value.filename == str(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [0, -1, 10**30])
def test_numbers_out_of_range_are_refused_before_the_source_is_read(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=r"samples_per_shard must be 1 to 1,000,000,000, got"):
        make_shards(tmp_path / "gone", tmp_path / "out", samples_per_shard=count)
