"""What `dalle rank`, `search` and `reconstruct` read of people's folders, and what they tell of the rest."""

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalle.cli import features, search
from dalle.cli.main import main
from dalle.data import pictures
from dalle.data.pictures import LINK, SHEET, Pictures, picture_files
from dalle.output.sheets import contact_sheet, save_png, slug
from dvae.images import to_image
from dvae.remarks import REMARKS
from storage.models.directory import directory_hash
from storage.tar import write_tar

CAPTION = "a red cube on a blue cube"


def noise(seed: int) -> Image.Image:
    return to_image(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder of its own."""
    path = tmp_path / "pictures"
    (path / "deeper").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b.png", "deeper/c.png"]):
        noise(seed).save(path / name)
    return path


@pytest.fixture
def ranked(bundle, tmp_path, capsys):
    """Runs rank or search and returns the names of the pictures, and the messages."""

    def run(verb: str, *arguments: object) -> tuple[list[str], str]:
        options = ["--bundle", str(bundle), "--out", str(tmp_path / "out"), "--json"]
        assert main([verb, CAPTION, *map(str, arguments), *options]) == 0
        output = capsys.readouterr()
        names = [json.loads(line)["picture"] for line in output.out.splitlines()]
        return sorted(Path(name).name for name in names), output.err

    return run


@pytest.mark.parametrize("verb", ["rank", "search"])
def test_every_ending_counts_and_what_is_not_read_is_told(verb, folder, ranked):
    for name in ("web.JFIF", "old.jpe", "x.jfi", "y.PNG"):
        noise(7).save(folder / name, "PNG" if name.endswith("PNG") else "JPEG")
    for name in ("1.HEIC", "2.heic", "deeper/3.cr2", ".4.heic", "notes.txt"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    found, messages = ranked(verb, folder)
    assert found == ["a.png", "b.png", "c.png", "old.jpe", "web.JFIF", "x.jfi", "y.PNG"]
    told = "warning: left out of the folders: 2 × format .heic is not read: save it as JPEG"
    assert told in messages
    assert "1 × format .cr2 is not read: develop it" in messages


def test_a_folder_of_nothing_that_is_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    (tmp_path / "b.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match=rf"no pictures in the folder .*1 × format .heic .*; 1 × {LINK}$"):
        Pictures([tmp_path])


@pytest.mark.parametrize("verb", ["rank", "search"])
def test_links_are_left_out_and_counted_unless_they_are_asked_for(verb, folder, tmp_path, ranked):
    noise(5).save(tmp_path / "far.png")
    (tmp_path / "others").mkdir()
    noise(6).save(tmp_path / "others" / "other.png")
    (folder / "near.png").symlink_to(tmp_path / "far.png")
    (folder / "linked").symlink_to(tmp_path / "others")
    found, messages = ranked(verb, folder)
    assert found == ["a.png", "b.png", "c.png"]
    assert f"warning: left out of the folders: 2 × {LINK}\n" in messages
    found, messages = ranked(verb, folder, "--follow-links")
    assert found == ["a.png", "b.png", "c.png", "near.png", "other.png"]
    assert "left out" not in messages


def test_links_that_stay_in_the_folder_are_read(folder):
    (folder / "twin.png").symlink_to("a.png")
    (folder / "gone.png").symlink_to("nothing.png")
    found = picture_files(folder)
    assert [file.name for file in found.files] == ["a.png", "b.png", "c.png", "twin.png"]
    assert dict(found.left_out) == {LINK: 1}


@pytest.mark.parametrize("verb", ["rank", "search"])
def test_many_unreadable_pictures_are_counted_by_problem(verb, folder, ranked):
    (folder / "empty.jpg").touch()
    for n in range(7):
        (folder / f"page {n}.jpg").write_text("<html>")
    found, messages = ranked(verb, folder)
    assert found == ["a.png", "b.png", "c.png"]
    assert "warning: 8 pictures were skipped (7 × not a picture, 1 × empty): " in messages


def test_what_a_user_names_may_be_a_link(folder, tmp_path, ranked):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    assert ranked("rank", tmp_path / "link", tmp_path / "link.png")[0] == ["a.png", "b.png", "c.png", "link.png"]


def test_links_in_circles_end_and_no_picture_is_read_twice(folder):
    (folder / "deeper" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "deeper")
    (folder / "self").symlink_to(folder / "self")
    found = picture_files(folder, follow_links=True)
    assert sorted(file.name for file in found.files) == ["a.png", "b.png", "c.png"]


def test_a_folder_that_cannot_be_read_is_counted(folder, monkeypatch):
    def walk(top, onerror, **_options):
        onerror(PermissionError(13, "Permission denied", str(folder / "deeper")))
        yield str(top), [], ["a.png"]

    monkeypatch.setattr(pictures.os, "walk", walk)
    assert dict(picture_files(folder).left_out) == {"unreadable folder (Permission denied)": 1}


@pytest.mark.parametrize("verb", ["rank", "search"])
def test_sheets_that_this_program_drew_are_no_input(verb, bundle, folder, capsys):
    for note in ("", f"note: left out of the folders: 1 × {SHEET}\n"):
        assert main([verb, CAPTION, str(folder), "--bundle", str(bundle), "--out", str(folder)]) == 0
        output = capsys.readouterr()
        assert len(output.out.splitlines()) == 1 + 3
        assert note in output.err
    sheet = folder / f"{slug(CAPTION)}.png"
    assert [name for name, _ in Pictures([sheet])] == [str(sheet)]  # asked for by name
    (folder / "only").mkdir()
    save_png(contact_sheet([("", [noise(0)], [""])]), folder / "only" / "sheet.png")
    with pytest.raises(ValueError, match=rf"no pictures in the folder .*only: .*1 × {SHEET}"):
        Pictures([folder / "only"])


def test_a_pipe_with_the_name_of_a_picture_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    found = Pictures([folder])
    assert len(list(found)) == 3
    assert "pipe.png is empty" in found.skipped[0]


@pytest.mark.parametrize("name", ["s.tar.gz", "S.TGZ"])
def test_a_compressed_shard_is_refused_in_the_words_of_training(name, bundle, tmp_path, capsys):
    (tmp_path / name).write_bytes(gzip.compress(b"a tar" * 999))
    for command in (["rank", CAPTION], ["reconstruct"]):
        assert main([*command, str(tmp_path / name), "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(f"{name} is compressed (gzip): samples are read at random places, so gunzip it first")


def test_samples_of_a_shard_without_a_picture_are_counted(folder, tmp_path):
    members = {"0.png": (folder / "a.png").read_bytes(), "1.heic": b"x", "2.txt": b"a caption", "2.HEIC": b"x"}
    write_tar(tmp_path / "s.tar", members.items())
    found = Pictures([tmp_path / "s.tar"])
    assert [name for name, _ in found] == ["s.tar/0.png"]
    assert found.skipped == ["s.tar/… 2 samples without a picture of a format that is read"]
    assert found.problems.total() == 2


ODD_NAMES = [b"not utf-8 \xff.png", b"line\nend.png", b"red \x1b[31m.png", "e\u0301 🐈.png".encode()]


def test_odd_names_are_printed_and_written_safely(bundle, folder, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"folder \xfe\x07")
    odd.mkdir()
    for name in ODD_NAMES:
        shutil.copy(folder / "a.png", odd / os.fsdecode(name))
    (odd / os.fsdecode(b"broken \xff\n\x1b.png")).write_bytes(b"no picture")
    for command in (["rank", CAPTION], ["search", CAPTION], ["reconstruct"]):
        where = [str(odd), "--bundle", str(bundle), "--out", str(odd / "out")]
        assert main([*command, *where]) == 0
        output = capsys.readouterr()
        assert not {character for character in output.out + output.err if not character.isprintable()} - {"\n"}
        assert len([line for line in output.out.splitlines() if ".png" in line and "see" not in line]) == len(ODD_NAMES)
        if command != ["reconstruct"]:
            assert main([*command, *where, "--json"]) == 0
            found = {json.loads(line)["picture"] for line in capsys.readouterr().out.splitlines()}
            assert {os.path.basename(os.fsencode(name)) for name in found} == set(ODD_NAMES)
    report = json.loads((odd / "out" / "metrics.json").read_text())
    assert {os.path.basename(os.fsencode(entry["name"])) for entry in report["pictures"]} == set(ODD_NAMES)


# what search keeps, and what vanishes


def test_search_keeps_what_it_has_embedded_as_it_goes(bundle, folder, monkeypatch, pipe):
    monkeypatch.setattr(features, "EMBEDDING_BATCH", 1)
    monkeypatch.setattr(features, "KEEP_EVERY_S", 0.0)
    clip_hash = directory_hash(bundle / "clip")
    kept = []

    def count(_done: float, _total: int) -> None:
        kept.append(len(features._read(features.feature_file(folder, clip_hash), pipe.clip.config.embed_dim)))
        monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: 1e9 * len(kept)))  # a pause has passed

    features.folder_features(pipe.clip, clip_hash, folder, progress=count)
    assert kept == [0, 1, 2]


def test_a_search_ended_by_sigterm_is_continued(bundle, folder, monkeypatch, pipe, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(features, "EMBEDDING_BATCH", 2)
    ended = []
    monkeypatch.setattr(features.os, "kill", lambda _process, number: ended.append(number))
    clip_hash = directory_hash(bundle / "clip")
    with pytest.raises(features._Terminated):
        features.folder_features(pipe.clip, clip_hash, folder, progress=lambda *_: signal.raise_signal(signal.SIGTERM))
    assert ended == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "2 of 3 pictures are embedded and kept: the next search continues" in caplog.messages
    assert features.folder_features(pipe.clip, clip_hash, folder).n_embedded == 1


def test_features_that_cannot_be_kept_name_the_file(bundle, folder, monkeypatch, pipe, caplog):
    def full(_path, _write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "replace_file", full)
    monkeypatch.setattr(features, "EMBEDDING_BATCH", 1)
    monkeypatch.setattr(features, "KEEP_EVERY_S", -1e9)
    features.folder_features(pipe.clip, "hash", folder)
    told = [message for message in caplog.messages if "could not be kept" in message]
    assert len(told) == 2  # while it went, and at the end
    assert all(str(features.feature_file(folder, "hash")) in message for message in told)


@pytest.mark.parametrize("gone", [1, 3])
def test_a_picture_that_vanishes_leaves_the_rest_of_the_sheet(gone, bundle, folder, tmp_path, capsys, monkeypatch):
    print_ranking = search.print_ranking

    def print_and_delete(ranking, *, as_json):
        print_ranking(ranking, as_json=as_json)
        for _, name in ranking[:gone]:
            Path(name).unlink()

    monkeypatch.setattr(search, "print_ranking", print_and_delete)
    assert main(["search", CAPTION, str(folder), "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 0
    messages = capsys.readouterr().err
    assert messages.count("warning: left out of the sheet: no picture at") == gone
    assert (tmp_path / "out" / f"{slug(CAPTION)}.png").exists() == (gone < 3)
    assert ("no sheet was written" in messages) == (gone == 3)


def test_animations_are_counted_rather_than_repeated(bundle, folder, tmp_path, capsys):
    REMARKS.log_totals()  # and begin anew
    for n in range(12):
        noise(n).save(folder / f"{n}.webp", save_all=True, append_images=[noise(99)])
    assert main(["search", CAPTION, str(folder), "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "animated" in line]
    assert len(told) == 3
    assert told[0].startswith("warning: ")
    assert "only the first of its 2 frames is used" in told[0]
    assert "10 pictures so far are animated" in told[1]
    assert "12 pictures in all are animated" in told[2]
