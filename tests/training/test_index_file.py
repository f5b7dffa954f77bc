"""Indexes of shards in files: what is kept is used, what is damaged or of another shard is made again."""

import json
import logging
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import all_keys, samples_of, write_tar

import dalle.data.shard
from dalle.data import index_file
from dalle.data.index import ShardIndex, Texts, index_shard, with_captions
from dalle.data.index_file import IndexFileError, index_bytes, read_header, read_index, with_prefix
from dalle.data.names import expand_shards
from dalle.data.order import Shuffle
from dalle.data.reader import ShardData
from training.data.batches import Share, batches
from training.data.sources.folders import list_folder

N = 12


@pytest.fixture(autouse=True)
def kept_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "MIN_KEPT", 2)
    monkeypatch.setattr(index_file, "SETTLED_S", -1e9)
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [*samples_of(range(N)), ("blank.jpg", b"1"), ("blank.txt", b" "), ("words.txt", b"x"), ("é b.jpg", b"2")]
    return write_tar(tmp_path / "data" / "s.tar", members)


def opened(shard: Path, *, captions: bool = True) -> ShardData:
    return ShardData.open([shard.parent], captions=captions)


def refuse_to_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is indexed again")

    monkeypatch.setattr(dalle.data.shard, "index_shard", refuse)


def test_an_index_reads_back_as_it_was_written(shard: Path, tmp_path: Path) -> None:
    for index in (index_shard(shard), with_captions(index_shard(shard))):
        path = tmp_path / "i"
        path.write_bytes(index_bytes(index, 7, {"more": 1}))
        again, header = read_index(path, shard)
        assert (list(again.keys), list(again.image_names)) == (list(index.keys), list(index.image_names))
        assert (again.places == index.places).all()
        assert again.problems == index.problems
        assert (again.n_ignored, again.n_duplicates, again.damage) == (0, 0, None)
        assert header.record["more"] == 1
        assert (again.has_caption is None) == (index.has_caption is None)
        assert read_header(path) == header
    assert index.has_caption is not None
    assert again.has_caption is not None
    assert again.has_caption.tolist() == index.has_caption.tolist()


def test_names_that_are_not_utf_8_and_an_empty_shard_are_kept_too(tmp_path: Path) -> None:
    texts = ["", "a", "\udcff", "\ud800x", "é"]
    assert list(Texts.of(texts)) == texts
    assert Texts.of(texts)[1:3] == texts[1:3]
    assert list(Texts.of(texts).chosen(np.array([4, 2]))) == ["é", "\udcff"]
    assert list(Texts.of([])) == []
    empty = index_shard(write_tar(tmp_path / "e.tar", []))
    (tmp_path / "i").write_bytes(index_bytes(empty, 0, {}))
    assert len(read_index(tmp_path / "i", tmp_path / "e.tar")[0].keys) == 0


@pytest.mark.parametrize("captions", [True, False])
def test_the_second_time_no_shard_is_indexed(shard: Path, monkeypatch: pytest.MonkeyPatch, captions: bool) -> None:
    monkeypatch.setattr(index_file, "MIN_KEPT", 1000)
    fresh = opened(shard, captions=captions)
    monkeypatch.setattr(index_file, "MIN_KEPT", 2)
    assert not list(shard.parent.glob("*.index"))
    first = opened(shard, captions=captions)
    refuse_to_index(monkeypatch)
    again = opened(shard, captions=captions)
    assert fresh.report == first.report == again.report
    assert fresh.fingerprint(0) == first.fingerprint(0) == again.fingerprint(0)
    for data in (first, again):
        assert [data.read(i) for i in range(len(data))] == [fresh.read(i) for i in range(len(fresh))]


def test_captions_are_read_into_the_index_when_they_are_needed(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(opened(shard, captions=False)) == N + 2
    assert len(opened(shard, captions=True)) == N
    refuse_to_index(monkeypatch)
    assert (len(opened(shard, captions=False)), len(opened(shard, captions=True))) == (N + 2, N)


def test_a_small_or_a_new_shard_has_no_index(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "SETTLED_S", 3600.0)
    opened(shard)
    monkeypatch.setattr(index_file, "SETTLED_S", -1e9)
    monkeypatch.setattr(index_file, "MIN_KEPT", N + 10)
    opened(shard)
    assert sorted(path.name for path in shard.parent.iterdir()) == ["s.tar"]


def test_an_index_whose_folder_cannot_be_written_is_kept_in_the_cache(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.with_name("s.tar.index").mkdir()
    opened(shard)
    (kept,) = (tmp_path / "cache").rglob("*.index")
    assert read_header(kept).shard == "s.tar"
    refuse_to_index(monkeypatch)
    assert len(opened(shard)) == N
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("a file")
    monkeypatch.undo()
    monkeypatch.setattr(index_file, "MIN_KEPT", 2)
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))
    assert len(opened(shard)) == N, "an index that is kept nowhere stays in memory"


def test_whatever_byte_is_changed_or_cut_the_index_is_refused(shard: Path, tmp_path: Path) -> None:
    whole = index_bytes(with_captions(index_shard(shard)), 7, {})
    path = tmp_path / "i"
    changed = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (*range(40), *range(40, len(whole), 7))]
    cut = [whole[:n] for n in range(0, len(whole), 61)]
    for content in (*changed, *cut, whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(IndexFileError):
            read_index(path, shard)


def test_a_damaged_index_is_told_of_and_made_again(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = all_keys(opened(shard))
    path = shard.with_name("s.tar.index")
    whole = path.read_bytes()
    for content, reason in (
        (b"", "it is no index file"),
        (b"no index at all, but text that is long enough", "it is no index file"),
        (whole[:8] + b"\xff" + whole[9:], "it is of version 255"),
        (whole[:60] + b"\0" + whole[61:], "its header is damaged"),
        (whole[:-1], "it was cut off"),
        (whole[:-3] + b"\0\0\0", "its columns are damaged"),
    ):
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert all_keys(opened(shard)) == expected
        assert f"s.tar.index cannot be used ({reason}" in caplog.text
    assert all_keys(opened(shard)) == expected


def test_an_index_that_says_there_is_nothing_usable_is_not_believed(shard: Path) -> None:
    expected = all_keys(opened(shard))
    path = shard.with_name("s.tar.index")
    record = {**read_header(path).record}
    record["parts"] = {"captions": {"fingerprint": "0" * 16, "n_samples": 0}}
    body = path.read_bytes()[-record["columns_bytes"] :]
    path.write_bytes(with_prefix(json.dumps(record).encode()) + body)
    assert all_keys(opened(shard)) == expected


def test_the_index_of_another_shard_or_of_an_earlier_state_is_not_used(shard: Path) -> None:
    opened(shard)
    other = write_tar(shard.with_name("t.tar"), samples_of(range(20, 25)))
    shutil.copy(shard.with_name("s.tar.index"), other.with_name("t.tar.index"))
    assert all_keys(ShardData.open([other], captions=True)) == [f"k{i:03}" for i in range(20, 25)]
    write_tar(shard, samples_of(range(30, 30 + N)))
    os.utime(shard, ns=(0, 5))
    assert all_keys(ShardData.open([shard], captions=True)) == [f"k{i:03}" for i in range(30, 30 + N)]


def test_a_shard_that_changes_under_its_index_is_noticed(shard: Path) -> None:
    data = opened(shard)
    os.utime(shard, ns=(0, 5))
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        data.read(0)


def test_an_index_that_vanishes_is_made_again(shard: Path) -> None:
    data = opened(shard)
    shard.with_name("s.tar.index").unlink()
    assert data.key(0) == "k000"


def test_an_index_beside_a_shard_is_no_other_file_of_the_folder(shard: Path) -> None:
    opened(shard)
    (shard.parent / "a.png").write_bytes(b"")
    found = list_folder(shard.parent)
    assert found.others == {".tar file": ["s.tar"]}
    assert expand_shards([shard.parent]) == [shard]


def test_more_shards_than_are_held_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle.data.reader._MAX_OPEN", 2)
    monkeypatch.setattr("dalle.data.reader._MAX_HELD", 7)
    for number in range(5):
        write_tar(tmp_path / "data" / f"{number}.tar", samples_of(range(3 * number, 3 * number + 3)))
    data = opened(tmp_path / "data" / "x")
    for i in (0, 14, 3, 9, 1, 6, 14, 0):
        assert data.read(i).key == f"k{i:03}"
    assert [data.fingerprint(number) for number in range(5)] == [
        opened(tmp_path / "data" / "x").fingerprint(number) for number in range(5)
    ]


def test_indexes_of_shards_that_are_read_by_turns_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle.data.reader._MAX_HELD", 6)
    for number in range(16):
        write_tar(tmp_path / "data" / f"{number:02}.tar", samples_of(range(3 * number, 3 * number + 3)))
    data, read = opened(tmp_path / "data" / "x"), list[str]()
    load = dalle.data.shard.kept_index

    def noted(path: Path, state: tuple[int, int]) -> ShardIndex | None:
        read.append(path.name)
        return load(path, state)

    monkeypatch.setattr(dalle.data.shard, "kept_index", noted)
    shuffle, size = Shuffle(window=2, streams=4, batch=4), {"size": torch.tensor(0)}
    for share in (Share(seed=1, micro_batch=4, max_steps=12), Share(seed=1, micro_batch=2, world_size=2, max_steps=12)):
        read.clear()
        keys = [key for batch in batches(data, lambda *_: size, share, shuffle=shuffle) for key in batch.keys]
        assert len(keys) == len(set(keys)) == 12 * share.micro_batch
        assert len(read) == len(set(read))


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    sizes = []
    for n in (20, 240):
        folder = tmp_path / str(n)
        for number in range(4):
            write_tar(folder / f"{number}.tar", samples_of(range(n)))
        opened(folder / "x")
        held = []
        for _ in range(5):  # the least of them: other threads of the process allocate, too
            tracemalloc.start()
            data = opened(folder / "x")
            held.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
            assert len(data) == 4 * n
        sizes.append(min(held))
    assert sizes[1] < 1.2 * sizes[0] + 2000
