"""Dirty and hostile data: training goes on within bounds, no rank waits for ever, and nothing in a shard is run."""

import io
import json
import logging
import os
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny
from support.corrupt import CORRUPT, UNUSUAL, corrupt_pictures, encoded, noise, png_of_size
from support.ranks import on_ranks
from support.tiny import all_keys, write_tar
from torch import Tensor

import training.cli.data
import training.cli.main
import training.ranks.job
import training.recipes
from dalle.cli.terminal import set_up_logging
from dalle.data.reader import Sample, ShardData
from dalle.output.text import printable
from dvae import DVAE
from dvae.images import open_image
from training.data.batches import Share, batches
from training.data.check_data import check_data
from training.data.check_report import report
from training.data.manifest import Manifest, open_with_manifest
from training.data.shards import make_shards
from training.data.sources.pictures import LINK
from training.drawings.shapes import world
from training.ranks.ranks import Ranks, join
from training.run_files import read_metrics
from training.stages.clip import train_clip
from training.stages.encode import EncodeConfig, encode_shards
from training.stages.inputs import Inputs

N_CORRUPT = 200


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` is a recipe, and a command leaves the process group to the next one: DeepSpeed cannot join a second."""
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)


def world_members(numbers: Sequence[int], broken: Mapping[int, bytes] | None = None) -> list[tuple[str, bytes]]:
    """Members of captioned pictures of the built-in world, with broken pictures in place of some."""
    drawings = list(world(max(numbers) + 1, 0, size=32))
    members = []
    for i in numbers:
        data = (broken or {}).get(i) or encoded(drawings[i].image, "PNG")
        members += [(f"k{i:04}.png", data), (f"k{i:04}.txt", drawings[i].captions[0].encode())]
    return members


def dirty_set(folder: Path, n: int) -> set[str]:
    """Three shards of n samples, 200 of which are corrupt; returns the keys of those."""
    chosen = np.random.default_rng(0).permutation(n)[:N_CORRUPT].tolist()
    pictures = (data for _, data in corrupt_pictures(0))
    broken = dict(zip(chosen, pictures, strict=False))
    for shard, numbers in enumerate(np.array_split(np.arange(n), 3)):
        write_tar(folder / f"{shard:06}.tar", world_members(numbers.tolist(), broken))
    return {f"k{i:04}" for i in chosen}


def decode(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    return {"size": torch.tensor(open_image(sample.image_bytes, sample.source).size)}


# ---------------------------------------------------------------------------------------------------- corrupt pictures


def test_corrupt_pictures_are_of_many_kinds_and_none_can_be_opened() -> None:
    made = list(islice(corrupt_pictures(0), N_CORRUPT))
    assert len({kind for kind, _ in made}) == len(CORRUPT) >= 12
    for kind, data in made:
        with pytest.raises(ValueError, match="picture") as refusal:
            open_image(data, f"the picture ({kind})")
        assert str(refusal.value).startswith(f"the picture ({kind})")
    assert made == list(islice(corrupt_pictures(0), N_CORRUPT)) != list(islice(corrupt_pictures(1), N_CORRUPT))


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_pictures_are_fine(kind: str) -> None:
    picture = open_image(UNUSUAL[kind](np.random.default_rng(0)))
    assert picture.mode == "RGB"
    assert min(picture.size) >= 40


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_exactly_the_200_corrupt_pictures_are_counted_in_an_epoch(tmp_path: Path, workers: int) -> None:
    bad = dirty_set(tmp_path, 500)
    data = ShardData.open([tmp_path], captions=True)
    assert len(data) == 500
    for epoch in range(2):
        stream = batches(
            data, decode, Share(seed=0, micro_batch=10, start_step=50 * epoch), workers=workers, max_bad_fraction=0.4
        )
        read = list(islice(stream, 50))
        assert sum(batch.n_bad for batch in read) == N_CORRUPT
        assert not bad & {key for batch in read for key in batch.keys}
    with pytest.raises(ValueError, match=r"--max-bad-fraction 0\.3 allows; most are in .*000000\.tar \(\d+\)"):
        list(islice(batches(data, decode, Share(seed=0, micro_batch=10), max_bad_fraction=0.3), 100))


def test_check_data_finds_exactly_them(tmp_path: Path) -> None:
    bad = dirty_set(tmp_path / "data", 300)
    summary = check_data([tmp_path / "data"], tmp_path / "m")
    assert summary.counts["unusable pictures"].total() == N_CORRUPT
    listed = [json.loads(line)["key"] for line in (tmp_path / "m" / "unusable.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(bad)
    assert "66.67% of the pictures cannot be used" in report(summary, tmp_path / "m")


@pytest.mark.slow
def test_training_goes_on_over_200_corrupt_pictures_and_its_metrics_count_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty_set(tmp_path / "data", 480)
    check_data([tmp_path / "data"], tmp_path / "m")
    command = ["clip", "tiny", "--data", str(tmp_path / "data"), "--steps", "60", "--global-batch", "8"]
    options = ["--log-every", "20", "--manifest", str(tmp_path / "m"), "--out", str(tmp_path / "out")]
    assert training.cli.main.main([*command, *options, "--max-bad-fraction", "0.45"]) == 0
    lines = read_metrics(tmp_path / "out" / "training" / "clip")
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["bad_samples"] == N_CORRUPT
    assert training.cli.main.main([*command, "--fresh", *options]) == 1
    assert "--max-bad-fraction 0.01 allows; most are in" in capsys.readouterr().err


@pytest.mark.slow
def test_training_goes_on_exactly_when_a_shard_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(4):
        write_tar(tmp_path / "data" / f"{shard}.tar", world_members(range(12 * shard, 12 * shard + 12)))
    check_data([tmp_path / "data"], tmp_path / "m")
    command = ["clip", "tiny", "--data", str(tmp_path / "data"), "--global-batch", "4", "--out", str(tmp_path / "out")]
    command += ["--manifest", str(tmp_path / "m")]
    assert training.cli.main.main([*command, "--steps", "4"]) == 0
    (tmp_path / "data" / "2.tar").unlink()
    assert training.cli.main.main([*command, "--steps", "12"]) == 1
    assert "12 of the 48 samples that the manifest knows are lost" in capsys.readouterr().err
    assert training.cli.main.main([*command, "--steps", "12", "--max-bad-fraction", "0.3"]) == 0
    errors = capsys.readouterr().err
    assert "2.tar: 0 of 12 samples are left (the shard is missing)" in errors
    assert "resuming from step 4 of 12" in errors
    assert "from here on their order is another" not in errors
    lines = read_metrics(tmp_path / "out" / "training" / "clip")
    # steps 5 to 12 are the rest of the only epoch: what is lost and was not seen before is counted
    order = open_with_manifest([tmp_path / "data"], Manifest.open(tmp_path / "m"), captions=True).order(0, 0)
    assert lines[-1]["bad_samples"] == sum(24 <= i < 36 for i in order[16:].tolist()) > 0


@pytest.mark.slow
def test_another_order_of_the_samples_is_never_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", world_members(range(12 * shard, 12 * shard + 12)))
    command = ["dvae", "tiny", "--data", str(tmp_path / "data"), "--global-batch", "4", "--out", str(tmp_path / "out")]
    assert training.cli.main.main([*command, "--steps", "2"]) == 0
    assert training.cli.main.main([*command, "--steps", "3"]) == 0
    assert "order is another" not in capsys.readouterr().err
    write_tar(tmp_path / "data" / "1.tar", world_members(range(12, 20)))
    assert training.cli.main.main([*command, "--steps", "4"]) == 0
    assert "began with 24 samples, and resumes with 20" in (errors := capsys.readouterr().err)
    assert "1.tar: 12 samples, now 8" in errors


@pytest.mark.slow
def test_as_many_other_samples_are_never_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(3):
        write_tar(tmp_path / "data" / f"{shard}.tar", world_members(range(12 * shard, 12 * shard + 12)))
    steps = iter(range(1, 9))

    def warnings(folder: Path, *names: str) -> str:
        data = [str(folder / name) for name in names]
        options = ["--steps", str(next(steps)), "--global-batch", "4", "--out", str(tmp_path / "out")]
        assert training.cli.main.main(["dvae", "tiny", "--data", *data, *options]) == 0
        return "".join(line for line in capsys.readouterr().err.splitlines() if "other samples" in line)

    data = tmp_path / "data"
    assert not warnings(data, "0.tar", "1.tar")
    assert not warnings(data, "0.tar", "1.tar")
    assert "(1.tar is in the place of 0.tar)" in warnings(data, "1.tar", "0.tar")
    assert "(2.tar is in the place of 0.tar)" in warnings(data, "1.tar", "2.tar")
    (data / "2.tar").write_bytes((data / "0.tar").read_bytes())
    assert "(2.tar is in the place of 2.tar)" in warnings(data, "1.tar", "2.tar")
    assert not warnings(data.rename(tmp_path / "moved"), "1.tar", "2.tar")


# -------------------------------------------------------------------------------------------------------- several ranks


def unequal_shards(folder: Path) -> Path:
    """Shards of 1, 7 and 20 samples."""
    for shard, (first, end) in enumerate(((0, 1), (1, 8), (8, 28))):
        write_tar(folder / f"{shard}.tar", world_members(range(first, end)))
    return folder


def keys_by_step(shards: Path, workers: int, rank: int = 0, size: int = 1) -> list[list[str]]:
    """The keys of each of 14 steps of 4 samples, two epochs, that a rank sees."""
    stream = batches(
        ShardData.open([shards], captions=True),
        decode,
        Share(seed=5, micro_batch=4 // size, rank=rank, world_size=size, max_steps=14),
        workers=workers,
    )
    return [batch.keys for batch in stream]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_unequal_shards_give_every_step_the_same_samples_however_they_are_read(
    tmp_path: Path, workers: int, size: int
) -> None:
    shards = unequal_shards(tmp_path)
    whole = keys_by_step(shards, workers=0)
    parts = [keys_by_step(shards, workers, rank, size) for rank in range(size)]
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole
    assert sorted(key for step in whole[:7] for key in step) == [f"k{i:04}" for i in range(28)]


def keys_on_rank(ranks: Ranks, shards: Path, workers: int) -> list[list[str]]:
    return keys_by_step(shards, workers, ranks.rank, ranks.size)


def train_on_rank(ranks: Ranks, shards: Path, out: Path, workers: int) -> str:
    train_clip(tiny.recipe(steps=9, global_batch=8, workers=workers), Inputs(data=[shards], out=out), ranks, print)
    return "done"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_two_ranks_share_unequal_shards_and_none_waits(tmp_path: Path, workers: int) -> None:
    shards = unequal_shards(tmp_path / "data")
    whole = keys_by_step(shards, workers=0)
    parts = on_ranks(tmp_path / "keys", keys_on_rank, shards, workers)
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole
    assert on_ranks(tmp_path / "train", train_on_rank, shards, tmp_path / "out", workers) == ["done", "done"]


def fail_on_rank(_: Ranks, shards: Path, out: Path) -> str:
    with training.ranks.job.joined() as (ranks, report):
        recipe = tiny.recipe(steps=8, global_batch=8, max_bad_fraction=0.1)
        train_clip(recipe, Inputs(data=[shards], out=out), ranks, report)
    return "done"


@pytest.mark.slow
def test_when_one_rank_meets_too_many_bad_samples_all_end(tmp_path: Path) -> None:
    n, per_rank = 64, 4
    whole = ShardData.open([write_tar(tmp_path / "whole.tar", world_members(range(n)))], captions=True)
    order = whole.order(0, 0).tolist()
    of_first_rank = [order[8 * step + place] for step in range(3) for place in range(per_rank)]
    broken = dict(zip(of_first_rank, (data for _, data in corrupt_pictures(0)), strict=False))
    write_tar(tmp_path / "data" / "hurt.tar", world_members(range(n), broken))
    first, second = on_ranks(tmp_path / "store", fail_on_rank, tmp_path / "data", tmp_path / "out")
    assert first.startswith("ValueError: ")
    assert "--max-bad-fraction 0.1 allows; most are in" in first
    assert "hurt.tar" in first
    assert "done" not in second  # it ended too, and not because it was through


# ------------------------------------------------------------------------------------------------------- hostile shards


class _Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def hostile_members(owned: Path) -> list[tuple[str, bytes] | tarfile.TarInfo]:
    """Two good samples among everything that a shard should not hold."""
    payload = pickle.dumps(_Touch(owned))
    members: list[tuple[str, bytes] | tarfile.TarInfo] = []
    kinds = {
        "s": tarfile.SYMTYPE,
        "h": tarfile.LNKTYPE,
        "c": tarfile.CHRTYPE,
        "b": tarfile.BLKTYPE,
        "f": tarfile.FIFOTYPE,
    }
    for name, kind in kinds.items():
        info = tarfile.TarInfo(f"{name}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        members.append(info)
    picture = encoded(noise(np.random.default_rng(0)), "JPEG")
    for name in ("../../up.jpg", "/tmp/absolute-9d1f.jpg", "a/../../b.jpg"):
        members += [(name, picture), (name.replace(".jpg", ".txt"), b"outside")]
    for field in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "ten", "cls", "sh"):
        members += [(f"x.{field}", payload)]
    members += [("x.jpg", picture), ("x.txt", b"with pickles beside it")]
    members += [("bomb.jpg", png_of_size(100_000, 100_000)), ("bomb.txt", b"a bomb")]
    for number, text in enumerate((b"[" * 100_000, b'{"captions": ' * 50_000, b'{"caption": ' + b"9" * 100_000 + b"}")):
        members += [(f"json{number}.jpg", picture), (f"json{number}.json", text)]
    members += [("\x1b[2Jevil\nname.jpg", b"no picture"), ("\x1b[2Jevil\nname.txt", b"\x1b[31mred")]
    return [*members, ("y.jpg", picture), ("y.txt", b"the last one")]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "data" / "hostile.tar", hostile_members(tmp_path / "owned"))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_hostile_members_are_ignored_or_refused_when_read(hostile: Path, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    data = ShardData.open([hostile], captions=True)
    assert all_keys(data) == ["x", "bomb", "\x1b[2Jevil\nname", "y"]
    assert data.report.n_ignored_members == 11
    stream = batches(data, decode, Share(seed=0, micro_batch=1), max_bad_fraction=0.5)
    assert {key for batch in islice(stream, 4) for key in batch.keys} == {"x", "y"}
    assert files_below(tmp_path) == before


def test_hostile_members_are_named_by_check_data(
    hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["check-data", "--data", str(hostile), "--workers", "0", "--out", str(tmp_path / "m")]
    assert training.cli.main.main(command) == 0
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "11 links, devices and unsafe names: never looked at" in shown.out
    assert "1 × picture is too large" in shown.out
    assert "3 × caption is in JSON that cannot be read" in shown.out
    assert not (tmp_path / "owned").exists()
    assert not Path("/tmp/absolute-9d1f.jpg").exists()
    assert {path.split("/")[0] for path in files_below(tmp_path)} == {"data", "m"}


def test_hostile_members_are_not_encoded(hostile: Path, tmp_path: Path) -> None:
    config = EncodeConfig(crops=1, workers=0, max_bad_fraction=0.5)
    dvae = DVAE(tiny.recipe().dvae.model)
    made = encode_shards([hostile], tmp_path / "tokens", dvae, "hash", config, join())
    assert (made.n_samples, made.n_skipped) == (2, 2)
    with tarfile.open(made.shards[0]) as tar:
        assert tar.getnames() == [".encoded.json", "x.txt", "x.tokens", "y.txt", "y.tokens"]
    assert not (tmp_path / "owned").exists()
    assert {path.split("/")[0] for path in files_below(tmp_path)} == {"data", "tokens"}


@pytest.mark.parametrize("name", ["pipe:touch owned", "PIPE: touch owned", "ftp://host/a.tar", "ssh://b/{0..9}.tar"])
@pytest.mark.parametrize("command", ["check-data", "clip", "encode", "duplicates"])
def test_no_shard_name_is_a_command(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    DVAE(tiny.recipe().dvae.model).save(tmp_path / "dvae")
    options = {
        "check-data": ["check-data"],
        "clip": ["clip", "tiny", "--out", "out"],
        "encode": ["encode", "--dvae", "dvae", "--out", "out"],
        "duplicates": ["duplicates", "--clip", "dvae", "--out", "out"],
    }[command]
    if command == "duplicates":
        monkeypatch.setattr(training.cli.data.CLIP, "load", lambda path: torch.nn.Identity())
    assert training.cli.main.main([*options, "--data", name]) == 1
    assert "is a URL or a command: shards are read from local files and from stores" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("size", "damage"), [(1 << 40, "truncated"), (-(1 << 40), "damaged header"), (-1, "damaged")])
def test_sizes_that_cannot_be_are_damage(tmp_path: Path, size: int, damage: str) -> None:
    info = tarfile.TarInfo("big.jpg")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"1"), ("a.txt", b"x"), ("b.jpg", b"1"), ("b.txt", b"x")])
    with tarfile.open(good) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    (tmp_path / "s.tar").write_bytes(good.read_bytes()[:end] + header + bytes(2048))
    with pytest.raises(ValueError, match=damage):
        ShardData.open([tmp_path / "s.tar"], captions=True)
    summary = check_data([tmp_path / "s.tar"], tmp_path / "m")
    assert damage in summary.damaged[0]
    assert summary.counts["samples"]["pairs"] >= 1


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logging.getLogger("training.data.batches").warning("unusable sample %s", "\x1b[2J\x07evil\r\nname\u202e")
    assert capsys.readouterr().err == "warning: unusable sample \\x1b[2J\\x07evil name\\u202e\n"
    assert printable("日本 🎈\n") == "日本 🎈\n"


# ------------------------------------------------------------------------------------------------------ hostile sources


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_name_no_file_outside_the_folder_of_pictures(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    picture = encoded(Image.new("RGB", (20, 20)), "PNG")
    (inside / "good.png").write_bytes(picture)
    (tmp_path / "secret.png").write_bytes(picture)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "device.png").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe.png")
    names = ["good.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "../" * 20 + "etc/passwd"]
    names += ["/etc/passwd", "device.png", "pipe.png", "pipe:touch owned", "file:///etc/passwd", "a\0b.png"]
    table = inside / f"t.{kind}"
    if kind == "csv":
        table.write_text("image,caption\n" + "".join(f'"{name}",words\n' for name in names if "\0" not in name))
    else:
        table.write_text("".join(json.dumps({"image": name, "caption": "words"}) + "\n" for name in names))
    made = make_shards(table, tmp_path / "out")
    assert made.n_samples == 1
    assert made.skipped["outside the folder of pictures"] == 4
    assert made.skipped[LINK] == 1
    assert made.skipped["URL, not a file: download it first"] == 1
    with tarfile.open(made.shards[0]) as tar:
        assert tar.getnames() == ["good.json", "good.png", "good.txt"]
    assert not Path("owned").exists()


def test_a_caption_file_that_links_outside_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("good", "bad"):
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(Image.new("RGB", (20, 20)), "PNG"))
    (tmp_path / "in" / "good.txt").write_text("good")
    (tmp_path / "in" / "bad.txt").symlink_to("/etc/passwd")
    made = make_shards(tmp_path / "in", tmp_path / "out")
    assert made.skipped == {LINK: 1}


def test_bombs_make_no_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in (("good", encoded(Image.new("RGB", (20, 20)), "PNG")), ("bomb", png_of_size(100_000, 100_000))):
        (tmp_path / "in" / f"{name}.png").write_bytes(data)
        (tmp_path / "in" / f"{name}.txt").write_text("words")
    assert make_shards(tmp_path / "in", tmp_path / "out").skipped == {"picture too large": 1}


def test_names_with_control_characters_are_not_printed_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    (tmp_path / "in" / "good.png").write_bytes(buffer.getvalue())
    (tmp_path / "in" / "good.txt").write_text("good")
    (tmp_path / "in" / "\x1b[2J\nbad.png").write_bytes(b"bad")
    (tmp_path / "in" / "\x1b[2J\nbad.txt").write_text("bad")
    assert training.cli.main.main(["shards", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\\x1b[2J bad.png" in shown.out
