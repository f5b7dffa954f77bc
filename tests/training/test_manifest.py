import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from servers.web import serving
from support import tiny
from support.corrupt import encoded, noise
from support.tiny import all_keys, samples_of, write_tar
from torch import Tensor

import training.cli.main
import training.data.check_data
import training.data.check_shard
from dalle.data.index import ShardIndex
from dalle.data.reader import Sample, ShardData
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from storage.exclusions import Excluded
from storage.stores import errors, files
from storage.stores.errors import Patience
from training.data.batches import Share, batches, validation_batches
from training.data.check_data import _record_name, check_data
from training.data.check_report import Summary, report
from training.data.check_shard import check_shard
from training.data.manifest import Entry, Manifest, open_with_manifest
from training.data.record import ShardRecord
from training.ranks.ranks import join
from training.stages.encode import EncodeConfig, encode_shards

N = 30


def picture(number: int) -> bytes:
    return encoded(noise(np.random.default_rng(number)).resize((48, 48)), "JPEG")


def members(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    made = []
    for number in numbers:
        made += [(f"k{number:03}.jpg", picture(number)), (f"k{number:03}.txt", f"picture number {number}".encode())]
    return made


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten pictures."""
    for shard in range(3):
        write_tar(tmp_path / "data" / f"{shard:06}.tar", members(range(10 * shard, 10 * shard + 10)))
    return tmp_path / "data"


@pytest.fixture
def manifest(shards: Path, tmp_path: Path) -> Path:
    check_data([shards], tmp_path / "manifest")
    return tmp_path / "manifest"


def open_with(manifest: Path, shards: Path, **options: bool) -> ShardData:
    return open_with_manifest([shards], Manifest.open(manifest), **{"captions": True, **options})


def transform(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    return {"length": torch.tensor(len(sample.image_bytes)), "noise": torch.tensor(rng.random())}


def keys_of(data: ShardData, count: int = N, *, start_step: int = 0, workers: int = 0) -> list[str]:
    share = Share(seed=3, micro_batch=1, start_step=start_step)
    stream = batches(data, transform, share, max_bad_fraction=0.5, workers=workers)
    return [batch.keys[0] for batch in islice(stream, count)]


def truncate(shard: Path, n_samples: int) -> None:
    """Leave the first samples of a shard, and half of the next one."""
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[2 * n_samples].offset_data + 100
    with shard.open("rb+") as file:
        file.truncate(end)


def flip(shard: Path, at: int) -> None:
    with shard.open("rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def place_of(shard: Path, member: str) -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return tar.getmember(member)


# ------------------------------------------------------------------------------------------------------- checking


def test_everything_in_a_shard_is_counted(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    wide = encoded(noise(np.random.default_rng(0)).resize((300, 100)), "PNG")
    shard = write_tar(
        tmp_path / "s.tar",
        [
            *members(range(4)),
            ("k000.jpg", b"again"),
            link,
            ("broken.jpg", b"no picture"),
            ("broken.txt", b"a caption"),
            ("wide.png", wide),
            ("wide.txt", b"a wide one\n\nin two captions"),
            ("alone.jpg", picture(9)),
            ("words.txt", b"words alone"),
            ("latin.jpg", picture(10)),
            ("latin.txt", b"\xff\xfe"),
            ("blank.jpg", picture(11)),
            ("blank.txt", b" \n"),
            ("bomb.jpg", picture(12)),
            ("bomb.json", b"[" * 200_000),
        ],
    )
    record = check_shard(shard)
    assert record.counts["samples"] == {
        "keys": 11,
        "pairs": 6,
        "pictures without a caption": 1,
        "captions without a picture": 1,
        "members that come twice": 1,
        "links, devices and unsafe names": 1,
    }
    assert record.counts["unusable pictures"] == {"is not a picture": 1}
    assert record.counts["unusable captions"] == {
        "is not UTF-8": 1,
        "is blank": 1,
        "is in JSON that cannot be read": 1,
    }
    assert record.counts["caption words"] == {"3": 6, "2": 2}
    assert record.counts["aspect ratio"]["2 to 4"] == 1
    assert {record.index.keys[i]: problem for i, problem in record.problems.items()} == {
        "broken": "picture is not a picture",
        "alone": "no caption",
        "words": "no picture",
        "latin": "caption is not UTF-8",
        "blank": "caption is blank",
        "bomb": "caption is in JSON that cannot be read",
    }


def test_a_record_reads_back_as_it_was_written(shards: Path, tmp_path: Path) -> None:
    write_tar(shards / "000000.tar", [*members(range(9)), ("bad.jpg", b"x"), ("words.txt", b"y")])
    record = check_shard(shards / "000000.tar")
    record.save(tmp_path / "a.index")
    again = ShardRecord.load(tmp_path / "a.index")
    again.save(tmp_path / "b.index")
    assert (tmp_path / "a.index").read_bytes() == (tmp_path / "b.index").read_bytes()
    assert (again.problems, again.counts, again.changed_ns) == (record.problems, record.counts, record.changed_ns)
    assert again.index.path == record.index.path
    assert (again.index.places == record.index.places).all()
    assert again.index.checksums is not None
    assert len(set(again.index.checksums[:, 0].tolist())) == 11


def test_the_report_says_what_is_wrong_and_what_to_do(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nothing is wrong" in report(check_data([shards], out), out)
    write_tar(shards / "000003.tar", [*members([1]), ("bad.jpg", b"x"), ("bad.txt", b"y")])
    (shards / "000004.tar").write_bytes(b"")
    summary = check_data([shards], out)
    text = report(summary, out)
    assert (summary.n_repeated_keys, summary.repeated_keys, summary.n_repeated_pictures) == (1, ("k001",), 1)
    assert "000004.tar is empty" in text
    assert "1 × picture is not a picture" in text
    assert "3.12% of the pictures cannot be used: training replaces them, up to --max-bad-fraction" in text
    assert "1 × picture of another sample before, byte for byte" in text
    (line,) = (out / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "shard": "data/000003.tar",
        "key": "k001",
        "reason": "the same picture as k001 in data/000000.tar",
    }
    (line,) = (out / "unusable.jsonl").read_text().splitlines()
    assert json.loads(line) == {"shard": "data/000003.tar", "key": "bad", "reason": "picture is not a picture"}


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("v1.jpg", "a0.v1.jpg has the field 'v1.jpg', because a key ends at the first dot"),
        ("heic", "format .heic is not read: save it as JPEG"),
        ("npy", "a0.npy is none of its kinds"),
    ],
)
def test_samples_without_picture_and_caption_are_never_silent(tmp_path: Path, field: str, told: str) -> None:
    shard = write_tar(tmp_path / "s.tar", [(f"a{n}.{field}", picture(n)) for n in range(6)])
    for out in (tmp_path / "m", tmp_path / "m"):  # the second one reads the records
        text = report(check_data([shard], out), out)
        assert "nothing is wrong" not in text
        assert "6 × sample without picture and caption" in text
        assert f"without a picture: a0 ({told}" in text
        assert "no sample of 6 can be used as a captioned picture" in text
    write_tar(tmp_path / "half.tar", [(f"a{n}.{field}", picture(n)) for n in range(6)] + members(range(2)))
    text = report(check_data([tmp_path / "half.tar"], tmp_path / "h"), None)
    assert "6 × sample without picture and caption: left out" in text


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ([], "no samples: expected members called KEY.jpg and KEY.txt"),
        ([("a.jpg", picture(0)), ("a.json", b'{"url": "x"}')], "1 × caption is missing in its JSON"),
        ([("a.jpg", picture(0)), ("a.txt", b"\xe2\x80\x8b")], "1 × caption is blank"),
        ([("a.jpg", picture(0))], "1 × picture without a caption"),
        ([("a.txt", b"x")], "1 × caption without a picture"),
    ],
)
def test_nothing_is_wrong_only_if_every_sample_is_usable(
    tmp_path: Path, extra: list[tuple[str, bytes]], told: str
) -> None:
    text = report(check_data([write_tar(tmp_path / "s.tar", extra)], tmp_path / "m"), None)
    assert "nothing is wrong" not in text
    assert told in text


def test_usable_samples_and_those_of_each_problem_are_all_samples(tmp_path: Path) -> None:
    odd = [
        ("bad.jpg", b"x"),
        ("bad.txt", b"y"),
        ("worse.jpg", b"x"),
        ("c.heic", b"x"),
        ("c.txt", b"y"),
        ("d.heic", b"x"),
    ]
    shard = write_tar(tmp_path / "s.tar", [*members(range(4)), *odd])
    text = report(check_data([shard], tmp_path / "m"), None)
    told = [
        r"usable +4  4 not",
        "    1 × picture is not a picture",
        "    1 × no picture",
        "    1 × no picture and no caption",
    ]
    assert all(re.search(f"^{line}$", text, re.MULTILINE) for line in [*told, "    1 × no caption"])


def test_a_picture_with_more_dots_beside_one_of_its_key_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = [
        ("k000.edited.jpg", picture(9)),
        ("k001.HEIC", b"x"),
        ("k002.note", b"x"),
        ("e.1.jpg", b"x"),
        ("e.2.jpg", b"x"),
    ]
    shard = write_tar(tmp_path / "s.tar", [*members(range(4)), *more])
    text = report(check_data([shard], tmp_path / "m"), None)
    assert "3 × further picture or caption of a sample: the first counts" in text
    assert "1 × sample without picture and caption" in text
    ShardData.open([shard], captions=True)
    assert "left out of the shards: 3 duplicates" in caplog.text


def test_numbers_of_processes_out_of_range_are_refused(tmp_path: Path) -> None:
    for workers in (-1, 1025, 10**30):
        with pytest.raises(ValueError, match=r"workers must be 0 to 1,024, got"):
            check_data([tmp_path], tmp_path / "m", workers=workers)


def test_what_is_known_is_not_read_again_and_what_changed_is(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert check_data([shards], out).n_read == 3
    again = check_data([shards], out)
    assert again.n_read == 0
    (out / "summary.json").unlink()
    next(iter(sorted((out / "shards").iterdir()))).write_text("{")
    assert check_data([shards], out).n_read == 1
    write_tar(shards / "000001.tar", members(range(5)))
    assert check_data([shards], out, overwrite=True).n_read == 1
    tokenizer = Tokenizer.train(["picture number 1"] * 3, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    with_tokens = check_data([shards], out, tokenizer=tmp_path / "tokenizer.json")
    assert with_tokens.n_read == 3
    assert with_tokens.counts["caption tokens"].total() == 25


def test_a_shard_that_cannot_be_read_is_named_and_tried_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.data.check_shard.index_shard

    def fail_at_one(path: Path, **options: bool) -> ShardIndex:
        if path.name == "000001.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # as reading an open file does: without its name
        return original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.data.check_shard, "index_shard", fail_at_one)
        summary = check_data([shards], tmp_path / "m")
        assert summary.damaged == ("000001.tar cannot be read (Input/output error)",)
        assert (summary.counts["samples"]["pairs"], check_data([shards], tmp_path / "m").n_read) == (20, 1)
    again = check_data([shards], tmp_path / "m")
    assert (again.n_read, again.damaged, again.counts["samples"]["pairs"]) == (1, (), 30)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_manifest_knows_is_not_lost_by_checking_damaged_shards_into_it(shards: Path, manifest: Path) -> None:
    before = contents(manifest)
    truncate(shards / "000001.tar", 4)
    (shards / "000002.tar").unlink()
    with pytest.raises(
        ValueError, match=r"000001\.tar has changed; 000002\.tar is gone.*another --out, or --overwrite to replace it"
    ):
        check_data([shards], manifest)
    moved = shards.rename(shards.with_name("moved"))
    with pytest.raises(ValueError, match=r"000001\.tar has changed; 000002\.tar is gone"):
        check_data([moved], manifest)
    (moved / "lines.jsonl").write_text('{"key": "k001"}\n')
    with pytest.raises(ValueError, match=r"1 samples are to be left out, and 0 were"):
        check_data([moved / "000000.tar"], manifest, exclude=[moved / "lines.jsonl"])
    assert contents(manifest) == before
    data = open_with(manifest, moved)
    assert (len(data), data.report.n_lost) == (30, 16)
    command = ["check-data", "--data", str(moved), "--workers", "0", "--out", str(manifest)]
    assert [training.cli.main.main(command), training.cli.main.main([*command, "--overwrite"])] == [1, 0]
    assert [entry.n_samples for entry in Manifest.open(manifest).entries] == [10, 4]


def test_a_manifest_may_grow_by_new_shards_and_follow_moved_ones(
    shards: Path, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = shards.rename(shards.with_name("moved"))
    check_data([moved], manifest)
    assert "new in the manifest" not in caplog.text
    with pytest.raises(ValueError, match="the shards are in another order"):
        check_data(sorted(moved.iterdir(), reverse=True), manifest)
    write_tar(moved / "000003.tar", members(range(30, 40)))
    with caplog.at_level(logging.WARNING):
        assert check_data([moved], manifest).n_read == 1
    assert "1 shard is new in the manifest" in caplog.text
    assert len(open_with(manifest, moved)) == 40


@pytest.mark.slow
def test_parallel_processes_find_the_same(shards: Path, tmp_path: Path) -> None:
    def facts(summary: Summary) -> dict[str, object]:
        return dict(vars(summary))

    assert facts(check_data([shards], tmp_path / "one")) == facts(check_data([shards], tmp_path / "two", workers=2))
    assert [p.read_bytes() for p in sorted((tmp_path / "one" / "shards").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "two" / "shards").iterdir())
    ]


def test_a_killed_process_ends_the_check_and_what_was_checked_is_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_data([shards / "000000.tar"], tmp_path / "m")
    with monkeypatch.context() as patch:  # which the forked process has, too
        patch.setattr(training.data.check_data, "check_shard", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(OSError, match="a process that checks shards was killed"):
            check_data([shards], tmp_path / "m", workers=1)
    assert check_data([shards], tmp_path / "m").n_read == 2


def test_the_command_prints_the_report_and_findings_are_no_error(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(shards / "000001.tar", 4)
    command = ["check-data", "--data", str(shards), "--workers", "0"]
    assert training.cli.main.main(command) == 0
    out = capsys.readouterr().out
    assert "damaged: 000001.tar ends in the middle of a sample (truncated)" in out
    assert not (tmp_path / "manifest").exists()
    assert training.cli.main.main([*command, "--out", str(tmp_path / "manifest")]) == 0
    assert "--manifest" in capsys.readouterr().out
    assert len(Manifest.open(tmp_path / "manifest").entries) == 3
    assert training.cli.main.main(["check-data", "--data", str(tmp_path / "nothing.tar")]) == 1
    assert "no shard" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ training


def test_a_manifest_changes_nothing_about_whole_shards(shards: Path, manifest: Path) -> None:
    without, data = ShardData.open([shards], captions=True), open_with(manifest, shards)
    assert all_keys(data) == all_keys(without)
    assert data.shards == without.shards
    assert [data.read(i) for i in range(N)] == [without.read(i) for i in range(N)]
    assert [data.fingerprint(shard) for shard in range(3)] == [without.fingerprint(shard) for shard in range(3)]
    assert data.report == without.report
    assert keys_of(data) == keys_of(without)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_stays_when_a_shard_loses_samples(
    shards: Path, manifest: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    whole = keys_of(open_with(manifest, shards), 2 * N)
    truncate(shards / "000001.tar", 4)
    with caplog.at_level(logging.WARNING):
        data = open_with(manifest, shards)
    assert "000001.tar: 4 of 10 samples are left (ends in the middle of a sample (truncated))" in caplog.text
    assert (len(data), data.report.n_lost) == (N, 6)
    lost = {f"k{number:03}" for number in range(14, 20)}
    stream = list(
        islice(batches(data, transform, Share(seed=3, micro_batch=1), max_bad_fraction=0.2, workers=workers), 2 * N)
    )
    assert sum(batch.n_bad for batch in stream) == 12
    for before, batch in zip(whole, stream, strict=True):
        assert batch.keys == [before] if before not in lost else batch.keys[0] not in lost
    # a run that goes on from a later step sees what it would have seen
    assert keys_of(data, 10, start_step=20, workers=workers) == [batch.keys[0] for batch in stream[20:30]]


def test_without_a_manifest_the_same_damage_stops_or_gives_another_order(shards: Path) -> None:
    whole = keys_of(ShardData.open([shards], captions=True))
    truncate(shards / "000001.tar", 4)
    with pytest.raises(ValueError, match="4 whole samples before it"):
        ShardData.open([shards], captions=True)
    less = ShardData.open([shards], captions=True, skip_damaged=True)
    assert len(less) == N - 6
    assert [key for key in whole if key in all_keys(less)] != keys_of(less, N - 6)


def test_more_lost_samples_than_allowed_stop_at_once_and_list_the_shards(shards: Path, manifest: Path) -> None:
    truncate(shards / "000001.tar", 4)
    (shards / "000002.tar").unlink()
    data = open_with(manifest, shards)
    with pytest.raises(
        ValueError,
        match=r"16 of the 30 samples .* lost, more than --max-bad-fraction 0\.5 allows: 000001\.tar: 4 of 10 samples "
        r"are left .*; 000002\.tar: 0 of 10 samples are left \(the shard is missing\)",
    ):
        batches(data, transform, Share(seed=0, micro_batch=1), max_bad_fraction=0.5)
    with pytest.raises(ValueError, match=r"16 of the 30"):
        next(validation_batches(data, transform, 4, max_bad_fraction=0.1))
    assert keys_of_allowed(data) == 30


def keys_of_allowed(data: ShardData) -> int:
    return len(list(islice(batches(data, transform, Share(seed=0, micro_batch=1), max_bad_fraction=0.6), 30)))


def test_a_missing_shard_is_no_error_by_a_range_or_a_folder(shards: Path, manifest: Path) -> None:
    (shards / "000001.tar").unlink()
    for pattern in (str(shards), f"{shards}/{{000000..000002}}.tar"):
        data = open_with_manifest([pattern], Manifest.open(manifest), captions=True)
        assert (len(data), data.report.n_lost) == (30, 10)
        with pytest.raises(ValueError, match="the sample is lost"):
            data.read(12)
    shutil.rmtree(shards)
    with pytest.raises(ValueError, match=r"nothing that the manifest .* knows is left: 000000\.tar: 0 of 10"):
        open_with(manifest, shards)


def test_a_shard_of_a_store_with_wrong_bytes_is_damage_and_no_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="nothing here reads the web: pip install 'dalle[http]'")
    monkeypatch.setattr(errors, "PATIENCE", Patience(attempts=2, first_wait_s=0.01))
    for table in ("_remotes", "_failures", "_caches"):
        monkeypatch.setattr(files, table, {})
    monkeypatch.setattr(files, "_chosen", None)
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    with serving(shards) as web:
        urls = [f"{web.url}/{{000000..000002}}.tar"]
        check_data(urls, tmp_path / "m")
        before = shards / "000001.tar"
        before.with_name("000001.tar.sha256").write_text(hashlib.sha256(before.read_bytes()).hexdigest())
        write_tar(before, members(range(5, 15)))
        os.utime(before, (10**9, 10**9))  # servers tell whole seconds
        files.use_cache(tmp_path / "another", 1)
        data = open_with_manifest(urls, Manifest.open(tmp_path / "m"), captions=True)
        assert (len(data), data.report.n_lost, data.is_lost(9), data.is_lost(10)) == (N, 10, False, True)
        assert "has other bytes than it should (SHA-256 beside it" in data.report.damaged_shards[0]
        summary = check_data(urls, tmp_path / "new")
    assert [line.partition(" (")[0] for line in summary.damaged] == ["000001.tar cannot be read"]
    assert summary.counts["samples"]["pairs"] == 20


def test_shards_that_the_manifest_does_not_know_are_left_out(
    shards: Path, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(shards / "000003.tar", members(range(30, 40)))
    data = open_with(manifest, shards)
    assert len(data) == N
    assert "000003.tar is left out: the manifest in" in caplog.text


def test_data_may_be_moved(shards: Path, manifest: Path, tmp_path: Path) -> None:
    before = keys_of(open_with(manifest, shards))
    moved = shards.rename(tmp_path / "elsewhere")
    assert keys_of(open_with(manifest, moved)) == before


def test_shards_of_one_name_in_two_folders_are_told_apart(shards: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    write_tar(both / "a" / "0.tar", members(range(5)))
    write_tar(both / "b" / "0.tar", members(range(5, 10)))
    check_data([both], tmp_path / "m")
    assert [entry.name for entry in Manifest.open(tmp_path / "m").entries] == ["a/0.tar", "b/0.tar"]
    moved = both.rename(tmp_path / "moved")
    assert open_with(tmp_path / "m", moved).report.n_lost == 0
    (moved / "a" / "0.tar").unlink()
    data = open_with(tmp_path / "m", moved)
    assert [i for i in range(10) if data.is_lost(i)] == [0, 1, 2, 3, 4]


def test_a_flipped_bit_in_a_picture_that_still_decodes_is_noticed(shards: Path, manifest: Path) -> None:
    shard = shards / "000000.tar"
    place, status = place_of(shard, "k003.jpg"), shard.stat()
    flip(shard, place.offset_data + place.size // 2)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # a failing disk does not tell
    assert ShardData.open([shards], captions=True).read(3).image_bytes != picture(3)
    data = open_with(manifest, shards)
    with pytest.raises(ValueError, match=r"000000\.tar: k003\.jpg: its bytes are not those that the manifest knows"):
        data.read(3)
    stream = list(islice(batches(data, transform, Share(seed=0, micro_batch=1), max_bad_fraction=0.1), N))
    assert sum(batch.n_bad for batch in stream) == 1
    assert "k003" not in {batch.keys[0] for batch in stream}


def test_a_flipped_bit_in_a_caption_is_noticed(shards: Path, manifest: Path) -> None:
    flip(shards / "000000.tar", place_of(shards / "000000.tar", "k003.txt").offset_data)
    assert ShardData.open([shards], captions=True).captions(3) == ("qicture number 3",)
    with pytest.raises(ValueError, match="another checksum"):
        open_with(manifest, shards).captions(3)


def test_a_flipped_bit_in_a_header_loses_nothing(
    shards: Path, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = [open_with(manifest, shards).read(i) for i in range(N)]
    flip(shards / "000001.tar", place_of(shards / "000001.tar", "k013.jpg").offset + 3)
    with pytest.raises(ValueError, match="damaged header"):
        ShardData.open([shards], captions=True)
    with caplog.at_level(logging.WARNING):
        data = open_with(manifest, shards)
    assert "000001.tar: 10 of 10 samples are left (has a damaged header at byte" in caplog.text
    assert [data.read(i) for i in range(N)] == before


def test_a_shard_that_was_made_again_with_fewer_samples_is_searched(shards: Path, manifest: Path) -> None:
    write_tar(shards / "000001.tar", members([19, 11, 13]))
    data = open_with(manifest, shards)
    assert [i for i in range(10, 20) if not data.is_lost(i)] == [11, 13, 19]
    for i in (11, 13, 19):
        assert data.read(i).image_bytes == picture(i)


@pytest.mark.parametrize("content", [b"", b"no tar file at all", bytes(10_000)])
def test_a_shard_of_which_nothing_is_left_is_lost(shards: Path, manifest: Path, content: bytes) -> None:
    (shards / "000001.tar").write_bytes(content)
    assert open_with(manifest, shards).report.n_lost == 10


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_flipped_no_wrong_sample_is_read(shards: Path, manifest: Path, seed: int) -> None:
    whole = ShardData.open([shards], captions=True)
    samples = [whole.read(i) for i in range(N)]
    chance = random.Random(seed)
    for shard in shards.iterdir():
        for _ in range(20):
            flip(shard, chance.randrange(shard.stat().st_size))
    data = open_with(manifest, shards)
    assert all_keys(data) == all_keys(whole)
    n_read = 0
    for i, sample in enumerate(samples):
        try:
            assert data.read(i) == sample
            n_read += 1
        except ValueError:
            continue
    assert n_read > 0


def test_samples_to_leave_out_have_no_number(shards: Path, tmp_path: Path) -> None:
    lines = [
        {"shard": "000001.tar", "key": "k011"},
        {"key": "k025", "reason": "anywhere"},
        {"shard": "x", "key": "k001"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    check_data([shards], tmp_path / "m", exclude=[tmp_path / "a.jsonl"])
    data = open_with(tmp_path / "m", shards)
    assert set(all_keys(ShardData.open([shards], captions=True))) - set(all_keys(data)) == {"k011", "k025"}
    assert (len(data), data.report.n_excluded) == (28, 2)
    again = check_data([shards], tmp_path / "m", overwrite=True)
    assert (again.n_excluded, again.n_read) == (0, 0)
    assert len(open_with(tmp_path / "m", shards)) == 30
    for text, message in (("{", "line 1, cannot be read"), ('{"key": 1}', "must be texts"), ("[]", "line 1")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            Excluded.read([tmp_path / "a.jsonl"])
    with pytest.raises(FileNotFoundError, match="expected lines such as"):
        check_data([shards], tmp_path / "m", exclude=[tmp_path / "gone"])


def test_copies_in_one_data_set_are_not_left_out_of_another_with_equal_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", [*members([0, 1]), ("k002.jpg", picture(0)), ("k002.txt", b"again")])
    write_tar(tmp_path / "b" / "0.tar", members([2, 3]))
    check_data([tmp_path / "a"], tmp_path / "ma")
    (line,) = (copies := tmp_path / "ma" / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line)["shard"] == "a/0.tar"
    both = [tmp_path / "a", tmp_path / "b"]
    check_data(both, tmp_path / "m", exclude=[copies])
    data = open_with_manifest(both, Manifest.open(tmp_path / "m"), captions=True)
    assert all_keys(data) == ["k000", "k001", "k002", "k003"]
    copies.write_text('{"shard": "0.tar", "key": "k002"}\n')
    with pytest.raises(
        ValueError, match=r"'k002' of shard '0\.tar' means a sample of .*a/0\.tar and one of .*b/0\.tar"
    ):
        check_data(both, tmp_path / "m2", exclude=[copies])
    assert not (tmp_path / "m2" / "summary.json").exists()


def test_copies_that_check_data_lists_can_be_left_out(shards: Path, tmp_path: Path) -> None:
    write_tar(shards / "000003.tar", [("copy.jpg", picture(5)), ("copy.txt", b"again"), *members([40])])
    command = ["check-data", "--data", str(shards), "--out", str(tmp_path / "m"), "--workers", "0"]
    assert training.cli.main.main(command) == 0
    exclude = ["--exclude-keys", str(tmp_path / "m" / "duplicates.jsonl")]
    assert training.cli.main.main([*command, *exclude]) == 1, "a run may have begun with the manifest"
    assert training.cli.main.main([*command, *exclude, "--overwrite"]) == 0
    assert set(all_keys(ShardData.open([shards], captions=True))) - set(
        all_keys(open_with(tmp_path / "m", shards))
    ) == {"copy"}


def test_a_manifest_without_captions_knows_pictures_without_them(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [*members(range(3)), ("alone.jpg", picture(9)), ("words.txt", b"x")])
    check_data([shard], tmp_path / "m")
    data = open_with(tmp_path / "m", shard, captions=False)
    assert all_keys(data) == all_keys(ShardData.open([shard], captions=False)) == ["k000", "k001", "k002", "alone"]
    assert data.report.n_without_image == 1
    with_captions = open_with(tmp_path / "m", shard)
    assert with_captions.report == ShardData.open([shard], captions=True).report


def test_a_manifest_that_is_damaged_missing_or_of_another_version_is_refused(shards: Path, manifest: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with `dalle-train check-data`"):
        Manifest.open(shards)
    summary = json.loads((manifest / "summary.json").read_text())
    record = manifest / "shards" / summary["shards"][0]["record"]
    whole = record.read_bytes()
    for content in (b"", b"[]", b'{"format": 1}' * 9, whole[:-300], whole.replace(b"[", b"{")):
        record.write_bytes(content)
        with pytest.raises(ValueError, match="make it again with `dalle-train check-data`"):
            open_with(manifest, shards).read(0)
        os.utime(shards / "000000.tar", ns=(0, 5))  # a changed shard is compared with its record at the start
        with pytest.raises(ValueError, match="make it again with `dalle-train check-data`"):
            open_with(manifest, shards)
        os.utime(shards / "000000.tar", ns=(0, summary["shards"][0]["state"][1]))
    record.write_bytes(whole)
    first = summary["shards"][0]
    changes = ({"format": 99}, {"shards": [{}]}, *({"shards": [{**first, "path": odd}]} for odd in (5, [], None)))
    more = (
        {"shards": [{**first, name: odd}]} for name, odd in (("record", "../x.json"), ("state", []), ("state", [5]))
    )
    for change in (*changes, *more):
        (manifest / "summary.json").write_text(json.dumps({**summary, **change}))
        with pytest.raises(ValueError, match=r"summary\.json cannot be used"):
            Manifest.open(manifest)


def test_image_tokens_have_manifests_too(tmp_path: Path) -> None:
    shards = tiny.write_world(tmp_path / "world", 12)
    dvae = DVAE(tiny.recipe().dvae.model)
    config = EncodeConfig(crops=1, workers=0)
    encode_shards([shards], tmp_path / "tokens", dvae, "hash", config, join())
    summary = check_data([tmp_path / "tokens"], tmp_path / "m")
    assert summary.counts["samples"]["pairs"] == 12
    assert not summary.counts["unusable pictures"]
    data = open_with(tmp_path / "m", tmp_path / "tokens", encoded=True)
    without = ShardData.open([tmp_path / "tokens"], captions=True, encoded=True)
    assert data.encoding == without.encoding
    assert keys_of_tokens(data) == keys_of_tokens(without)
    with pytest.raises(ValueError, match="pictures are needed here"):
        open_with(tmp_path / "m", tmp_path / "tokens")
    shard = sorted((tmp_path / "tokens").glob("*.tar"))[0]
    flip(shard, place_of(shard, f"{data.key(2)}.txt").offset_data)
    with pytest.raises(ValueError, match="another checksum"):
        open_with(tmp_path / "m", tmp_path / "tokens", encoded=True).read(2)
    shard.unlink()
    assert open_with(tmp_path / "m", tmp_path / "tokens", encoded=True).report.n_lost == 8


def keys_of_tokens(data: ShardData) -> list[str]:
    return [f"{data.key(i)} {data.read(i).image_tokens}" for i in data.order(0, 0)]


def test_encoding_with_a_manifest_leaves_changed_pictures_out_and_wants_all_shards(tmp_path: Path) -> None:
    shards = tiny.write_world(tmp_path / "world", 16)
    check_data([shards], tmp_path / "m")
    key = all_keys(ShardData.open([shards], captions=True))[9]
    flip(shards / "world-000001.tar", place_of(shards / "world-000001.tar", f"{key}.txt").offset_data)
    dvae, config = (
        DVAE(tiny.recipe().dvae.model),
        EncodeConfig(crops=1, workers=0, max_bad_fraction=0.1, manifest=tmp_path / "m"),
    )
    made = encode_shards([shards], tmp_path / "tokens", dvae, "hash", config, join())
    assert (made.n_samples, made.n_skipped) == (15, 1)
    (shards / "world-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"not those of the manifest .*: world-000000\.tar is missing"):
        encode_shards([shards], tmp_path / "more", dvae, "hash", config, join())


def test_samples_of_bad_pictures_keep_their_numbers(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", samples_of(range(6), bad=[2]))
    summary = check_data([shard], tmp_path / "m")
    assert summary.counts["unusable pictures"].total() == 6  # single bytes are no pictures, and still have numbers
    assert all_keys(open_with(tmp_path / "m", shard)) == all_keys(ShardData.open([shard], captions=True))


# ----------------------------------------------------------------------------------------------- many samples


def test_unchanged_shards_are_known_by_the_summary_alone(
    shards: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ShardData.open([shards], captions=True)
    read: list[str] = []
    load = Manifest.record

    def noted(self: Manifest, entry: Entry) -> ShardRecord:
        read.append(entry.name)
        return load(self, entry)

    monkeypatch.setattr(Manifest, "record", noted)
    data = open_with(manifest, shards)
    assert (len(data), data.report) == (N, expected.report)
    assert [data.fingerprint(number) for number in range(3)] == [expected.fingerprint(number) for number in range(3)]
    assert read == []
    data.read(12)
    assert read == ["000001.tar"]


def test_only_shards_that_a_list_names_are_read_at_the_start(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.jsonl").write_text('{"shard": "data/000001.tar", "key": "k013"}\n')
    check_data([shards], tmp_path / "m", exclude=[tmp_path / "out.jsonl"])
    read: list[str] = []
    load = Manifest.record

    def noted(self: Manifest, entry: Entry) -> ShardRecord:
        read.append(entry.name)
        return load(self, entry)

    monkeypatch.setattr(Manifest, "record", noted)
    data = open_with(tmp_path / "m", shards)
    assert read == ["000001.tar"]
    assert (len(data), data.report.n_excluded) == (N - 1, 1)
    assert [data.key(i) for i in (12, 13, 14)] == ["k012", "k014", "k015"]


def test_a_copy_with_other_times_is_read_like_the_original(shards: Path, manifest: Path) -> None:
    before = [open_with(manifest, shards).read(i) for i in range(N)]
    for shard in shards.iterdir():
        os.utime(shard, ns=(0, 5))
    data = open_with(manifest, shards)
    assert [data.read(i) for i in range(N)] == before
    assert all(shard.index is None for shard in data._shards), "their records hold"


def test_a_manifest_of_version_0_1_is_read_and_goes_on_in_the_new_form(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0.1", tmp_path / "old")
    shards, manifest = tmp_path / "old" / "shards", tmp_path / "old" / "manifest"
    with_old = open_with(manifest, shards)
    without = ShardData.open([shards], captions=True)
    assert (with_old.report, all_keys(with_old)) == (without.report, all_keys(without))
    shard, summary = shards / "world-000000.tar", json.loads((manifest / "summary.json").read_text())
    (row,) = summary["shards"]
    old = (manifest / "shards" / row["record"]).rename(manifest / "shards" / _record_name(shard))
    old = old.rename(old.with_suffix(".json"))
    row |= {"path": str(shard), "record": old.name}
    (manifest / "summary.json").write_text(json.dumps(summary))
    os.utime(shard, ns=(0, json.loads(old.read_text())["changed_ns"]))
    assert check_data([shards], manifest).n_read == 0
    entries = Manifest.open(manifest).entries
    assert all(entry.record.endswith(".index") and set(entry.parts) == {True, False} for entry in entries)
    assert all_keys(open_with(manifest, shards)) == all_keys(without)
