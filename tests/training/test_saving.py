"""Checkpoints that come from a local disk: they are those of a run without one, and exist when all has arrived."""

import threading
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.engines import Objective, averages_of, config, engine_of, train
from support.ranks import on_ranks
from support.runs import Run, send

from storage.errors import reason_of
from training.engine import saving
from training.engine.checkpoints import FileDigest, digest_of, latest_tag, read_manifest
from training.engine.saving import moved
from training.ranks.ranks import Ranks, join
from training.ranks.stop import Interrupted


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def ranks() -> Ranks:
    return join()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files arrive once it is set."""
    opened = threading.Event()

    def moved_late(source: Path, target: Path) -> FileDigest:
        assert opened.wait(60)
        return moved(source, target)

    monkeypatch.setattr(saving, "moved", moved_late)
    return opened


def test_a_staged_checkpoint_is_published_when_all_of_it_has_arrived(
    tmp_path: Path, ranks: Ranks, gate: threading.Event
) -> None:
    engine = engine_of(Objective(), config(stage_dir=tmp_path / "local"), ranks)
    train(engine, range(2))
    engine.save(tmp_path / "c", 2, {"n": 2})
    expected = averages_of(engine)
    train(engine, range(2, 3))
    engine.saver.publish_staged(wait=False)
    assert latest_tag(tmp_path / "c") is None
    gate.set()
    engine.saver.publish_staged()
    assert latest_tag(tmp_path / "c") == "step00000002"
    folder = tmp_path / "c" / "step00000002"
    manifest = read_manifest(folder)
    assert {name: digest_of(folder / name) for name in manifest["files"]} == manifest["files"]
    assert not files_in(tmp_path / "local")
    resumed = engine_of(Objective(seed=1), config(), ranks)
    assert resumed.load(tmp_path / "c") == {"n": 2}
    assert all((average == expected[name]).all() for name, average in averages_of(resumed).items())


def test_the_next_save_waits_for_the_one_under_way(tmp_path: Path, ranks: Ranks, gate: threading.Event) -> None:
    engine = engine_of(Objective(), config(stage_dir=tmp_path / "local"), ranks)
    engine.save(tmp_path / "c", 1, {})
    threading.Timer(0.2, gate.set).start()
    engine.save(tmp_path / "c", 2, {})
    assert latest_tag(tmp_path / "c") == "step00000001"
    engine.saver.publish_staged()
    assert latest_tag(tmp_path / "c") == "step00000002"


def test_what_arrives_otherwise_than_it_left_is_no_checkpoint(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(Objective(), config(stage_dir=tmp_path / "local"), ranks)
    engine.save(tmp_path / "c", 1, {"n": 1})
    engine.saver.publish_staged()
    original = Path.open

    def open_spoilt(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = original(path, mode, *arguments, **options)
        if mode == "wb" and path.name == "ema.safetensors" and "local" not in path.parts:
            file.write(b"?")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_spoilt)
        engine.save(tmp_path / "c", 2, {"n": 2})
        with pytest.raises(OSError, match=r"ema\.safetensors is not what was copied.*step00000001 is kept"):
            engine.saver.publish_staged()
    assert not (tmp_path / "c" / "step00000002").exists()
    assert engine_of(Objective(), config(), ranks).load(tmp_path / "c") == {"n": 1}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("of a library"), OSError("of the disk")])
def test_whatever_stops_the_move_of_files_drops_the_checkpoint(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = engine_of(Objective(), config(stage_dir=tmp_path / "local"), ranks)
    engine.save(tmp_path / "c", 1, {"n": 1})
    engine.saver.publish_staged()

    def fail(source: Path, target: Path) -> FileDigest:
        raise error

    monkeypatch.setattr(saving, "moved", fail)
    engine.save(tmp_path / "c", 2, {"n": 2})
    with pytest.raises(OSError, match=rf"{reason_of(error)}.*step00000001 is kept"):
        engine.saver.publish_staged()
    assert not (tmp_path / "c" / "step00000002").exists()


def save_without_room(ranks: Ranks, folder: Path) -> str:
    """Save where the second rank's local disk is a file."""
    engine = engine_of(Objective(), config(stage_dir=folder / f"local{ranks.rank}"), ranks)
    if ranks.rank:
        (folder / "local1").write_text("no folder")
    try:
        engine.save(folder / "c", 1, {})
    except OSError as error:
        return str(error)
    return "saved"


def test_a_rank_without_a_local_disk_stops_all_in_words(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, save_without_room, tmp_path)
    assert "another rank cannot write to its --stage-dir" in first
    assert "Not a directory" in second
    assert latest_tag(tmp_path / "c") is None


@pytest.mark.parametrize("until", [5, 8])
def test_a_run_that_ends_or_is_stopped_waits_for_its_last_checkpoint(tmp_path: Path, shards: Path, until: int) -> None:
    settings = tiny.train_config(steps=8, checkpoint_every=2, stage_dir=tmp_path / "local")
    run = Run(tmp_path, tiny.open_world(shards), join())
    if until < 8:
        with pytest.raises(Interrupted):
            run(settings, at_step=send(15, until - 1))
    else:
        run(settings)
    assert latest_tag(tmp_path / "run" / "checkpoints") == f"step{until:08d}"
    assert not files_in(tmp_path / "local")
    run(settings)
    straight = Run(tmp_path / "straight", tiny.open_world(shards), join())
    (tmp_path / "straight").mkdir()
    straight(tiny.train_config(steps=8, checkpoint_every=2))
    assert run.losses == straight.losses
