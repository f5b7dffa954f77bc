import errno
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny
from support.runs import AtStep, MeanColours, NewRun, Run, send

import training.loop.fit
from dalle.data.reader import ShardData
from dvae.images import open_image, to_tensor
from training.engine.checkpoints import read_checkpoint
from training.engine.engine import Engine
from training.ranks.ranks import join
from training.ranks.stop import Interrupted
from training.run_files import read_metrics
from training.schedules import WarmupPlateau


@pytest.fixture
def data(shards: Path) -> ShardData:
    return tiny.open_world(shards)


@pytest.fixture
def new_run(tmp_path: Path, data: ShardData) -> Callable[[str], Run]:
    def make(name: str) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        return Run(folder, data, join())

    return make


def test_a_run_leaves_metrics_a_checkpoint_a_sample_and_the_export(new_run: NewRun) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=5, log_every=2, checkpoint_every=2, sample_every=2))
    assert sorted(run.losses) == [2, 4, 5]
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == "step00000005"
    assert sorted(path.name for path in (run.folder / "run" / "samples").iterdir()) == [
        "step00000002.png",
        "step00000004.png",
        "step00000005.png",
    ]
    assert run.stage.exported == [2, 4, 5]
    assert list((run.folder / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(new_run: NewRun, number: int) -> None:
    plateau = WarmupPlateau(peak=1e-2, warmup=1, window=2, patience=1, threshold=0.9)
    config = tiny.train_config(steps=9, learning_rate=plateau, global_batch=4, micro_batch=2)
    straight, stopped = new_run("straight"), new_run("stopped")
    straight(config)
    with pytest.raises(Interrupted, match=r"stopped at step 4 of 9.*the same command resumes"):
        stopped(config, at_step=send(number, 3))
    stopped(config)
    assert any("resuming from step 4 of 9" in line for line in stopped.said)
    assert stopped.losses == straight.losses
    assert sorted(stopped.losses) == list(range(1, 10))
    assert stopped.weights == straight.weights


def test_the_reading_processes_outlive_a_signal_to_the_whole_job(new_run: NewRun) -> None:
    def end_of_job(step: int) -> None:
        if step == 3:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            pids = [*(worker.pid for worker in workers), os.getpid()]
            subprocess.run(["sh", "-c", f"kill -TERM {' '.join(map(str, pids))}"], check=True)

    run = new_run("a")
    with pytest.raises(Interrupted, match="step 4"):
        run(tiny.train_config(steps=30, workers=2), at_step=end_of_job)


def test_a_line_of_metrics_is_the_same_whether_or_not_its_steps_were_interrupted(new_run: NewRun) -> None:
    straight, interrupted = new_run("straight"), new_run("interrupted")
    straight(tiny.train_config(steps=8, log_every=4))
    with pytest.raises(Interrupted):
        interrupted(tiny.train_config(steps=8, log_every=4), at_step=send(signal.SIGTERM, at=5))
    interrupted(tiny.train_config(steps=8, log_every=4))
    assert interrupted.losses == straight.losses


def test_a_signal_before_the_first_step_stops_in_order_and_the_same_command_starts(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = training.loop.fit.Engine

    def slowly(*arguments: Any) -> Engine:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments)

    run = new_run("run")
    with monkeypatch.context() as patch:
        patch.setattr(training.loop.fit, "Engine", slowly)
        with pytest.raises(Interrupted, match="stopped before the next step"):
            run(tiny.train_config(steps=2))
    run(tiny.train_config(steps=2))
    assert list(run.losses) == [1, 2]


def test_going_on_with_another_batch_or_seed_is_said(new_run: NewRun, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run("run")
    run(tiny.train_config(steps=2))
    run(tiny.train_config(steps=4, seed=1))
    assert "seed was 0 and is 1: the resumed run sees other samples" in caplog.text


def test_lines_written_after_the_checkpoint_are_not_there_twice_after_a_crash(new_run: NewRun) -> None:
    def crash(step: int) -> None:
        if step == 5:
            raise RuntimeError("power failure")

    config = tiny.train_config(steps=7, checkpoint_every=3)
    straight, crashed = new_run("straight"), new_run("crashed")
    straight(config)
    with pytest.raises(RuntimeError, match="power failure"):
        crashed(config, at_step=crash)
    assert sorted(crashed.losses) == [1, 2, 3, 4, 5]
    crashed(config)
    assert crashed.losses == straight.losses
    assert crashed.weights == straight.weights


def test_a_signal_during_the_last_step_does_not_lose_the_end(new_run: NewRun) -> None:
    run = new_run("a")
    with pytest.raises(Interrupted, match="is finished"):
        run(tiny.train_config(steps=4, checkpoint_every=2), at_step=send(signal.SIGTERM, 3))
    assert run.stage.exported == [2, 4]


def test_a_finished_run_is_not_trained_again_and_more_steps_go_on(new_run: NewRun) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=3))
    before = run.weights
    run(tiny.train_config(steps=3))
    assert "3 steps" in run.said[-1]
    assert run.stage.exported == []
    assert run.weights == before
    run(tiny.train_config(steps=2))  # fewer: as finished
    assert run.weights == before
    run(tiny.train_config(steps=5))
    assert sorted(run.losses) == [1, 2, 3, 4, 5]


def test_an_export_that_failed_is_made_up_for(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = new_run("a")
    with monkeypatch.context() as patch:
        patch.setattr(MeanColours, "export", full)
        with pytest.raises(OSError, match="No space left"):
            run(tiny.train_config(steps=3))
    run(tiny.train_config(steps=3))
    assert run.stage.exported == [3]
    (run.folder / "model" / "config.json").unlink()
    run(tiny.train_config(steps=3))
    assert run.stage.exported == [3], "a deleted export is made anew"


def test_a_full_disk_stops_training_and_the_same_command_goes_on(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    def fill(step: int) -> None:
        if step == 2:
            monkeypatch.setattr(torch, "save", full)

    config = tiny.train_config(steps=6, checkpoint_every=2)
    run = new_run("a")
    with pytest.raises(OSError, match=r"could not save .*file write failed.*step00000002 is kept"):
        run(config, at_step=fill)
    monkeypatch.undo()
    run(config)
    assert any("resuming from step 2" in line for line in run.said)
    assert sorted(run.losses) == [1, 2, 3, 4, 5, 6]


def test_fresh_trains_anew(new_run: NewRun) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=3))
    folder = run.folder / "run"
    (folder / "stacks").mkdir()
    events = set((folder / "tensorboard").iterdir())
    run(tiny.train_config(steps=2, seed=1), fresh=True, recipe="another")
    assert sorted(run.losses) == [1, 2]
    assert [path.name for path in (folder / "samples").iterdir()] == ["step00000002.png"]
    assert events.isdisjoint((folder / "tensorboard").iterdir())
    assert not (folder / "stacks").exists()
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == "step00000002"


def test_a_run_of_another_recipe_in_the_same_place_is_refused(new_run: NewRun) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=2))
    with pytest.raises(ValueError, match=r"another recipe: give another --out, the same recipe, or --fresh"):
        run(tiny.train_config(steps=4), recipe="another")
    (run.folder / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged.*--fresh"):
        run(tiny.train_config(steps=4))


def spoil_losses(run: Run, steps: range) -> AtStep:
    """Make the loss of some steps NaN."""

    def at_step(step: int) -> None:
        run.stage.scale = float("nan") if step in steps else 1.0

    return at_step


def test_too_many_steps_in_a_row_that_are_not_finite_stop_training_and_name_the_checkpoint(new_run: NewRun) -> None:
    run = new_run("a")
    with pytest.raises(ValueError, match=r"more than 1 steps in a row were skipped.*at step 2, .*nothing is saved"):
        run(tiny.train_config(steps=6, log_every=2, max_skipped_steps=1), scale=float("nan"))
    run = new_run("b")
    config = tiny.train_config(steps=20, log_every=50, checkpoint_every=3, max_skipped_steps=4)
    with pytest.raises(ValueError, match=r"more than 4 steps in a row.*step00000003 is the last good checkpoint"):
        run(config, at_step=spoil_losses(run, range(4, 20)))
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == "step00000006", "saved, but after the first"


def test_steps_that_are_not_finite_are_skipped_counted_and_told_and_the_run_goes_on(new_run: NewRun) -> None:
    spoilt, resumed = new_run("spoilt"), new_run("resumed")
    spoilt(tiny.train_config(steps=8, log_every=2), at_step=spoil_losses(spoilt, range(2, 5)))
    told = [line for line in spoilt.said if "is skipped" in line]
    assert [line.split(",")[0] for line in told] == [f"colours: step {n} is skipped" for n in (3, 4, 5)]
    assert told[0].partition("its samples are ")[2].count(",") == 3, "four samples"
    lines = read_metrics(spoilt.folder / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 2, 3, 3]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    assert read_checkpoint(spoilt.folder / "run" / "checkpoints")["state"]["skipped_steps"] == 3

    def spoil_and_stop(step: int) -> None:
        spoil_losses(resumed, range(2, 5))(step)
        send(signal.SIGTERM, 3)(step)

    with pytest.raises(Interrupted):
        resumed(tiny.train_config(steps=8, log_every=2), at_step=spoil_and_stop)
    resumed(tiny.train_config(steps=8, log_every=2), at_step=spoil_losses(resumed, range(2, 5)))
    assert resumed.weights == spoilt.weights
    assert [line["skipped_steps"] for line in read_metrics(resumed.folder / "run")] == [0, 2, 3, 3]


def test_a_plateau_does_not_see_losses_that_are_not_finite(new_run: NewRun) -> None:
    run = new_run("a")
    plateau = WarmupPlateau(peak=1e-2, warmup=0, window=2, patience=1, threshold=0.9)
    run(tiny.train_config(steps=5, learning_rate=plateau), at_step=spoil_losses(run, range(1, 3)))
    state = read_checkpoint(run.folder / "run" / "checkpoints")["state"]["learning_rate"]
    losses = run.losses
    assert state["best"] == pytest.approx((losses[1] + losses[4]) / 2, rel=1e-6)
    assert state["losses"] == pytest.approx([losses[5]], rel=1e-6)


def test_a_run_all_of_whose_steps_were_skipped_is_not_finished(new_run: NewRun) -> None:
    run = new_run("a")
    with pytest.raises(ValueError, match="all steps were skipped"):
        run(tiny.train_config(steps=3), scale=float("nan"))
    assert run.stage.exported == []


@pytest.mark.parametrize("steps", [8, 4])  # in between and at the end
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(new_run: NewRun, steps: int) -> None:
    run = new_run("a")

    def spoil(step: int) -> None:
        if step == 3:
            with torch.no_grad():
                run.stage.model.bias.fill_(float("inf"))

    config = tiny.train_config(steps=steps, checkpoint_every=2, ema_every=100)  # the averages have not seen it
    with pytest.raises(ValueError, match=r"at step 4.*step00000002 is the last good"):
        run(config, at_step=spoil)
    assert (run.folder / "run" / "checkpoints" / "latest").read_text() == "step00000002"
    assert run.stage.exported == [2]


def test_a_fresh_run_that_is_interrupted_goes_on_without_fresh(new_run: NewRun) -> None:
    with pytest.raises(Interrupted, match=r"the same command without --fresh resumes"):
        new_run("a")(tiny.train_config(steps=9), at_step=send(signal.SIGTERM, 3), fresh=True)


def test_bad_samples_are_counted_from_the_first_step_of_the_run(new_run: NewRun, tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for number in range(4):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16)).save(buffer, "png")
            image = b"no picture" if number == 0 else buffer.getvalue()
            for name, content in ((f"{number}.png", image), (f"{number}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def counts(run: Run) -> list[float]:
        return [line["bad_samples"] for line in read_metrics(run.folder / "run")]

    config = tiny.train_config(steps=6, max_bad_fraction=1.0)
    straight, stopped = new_run("straight"), new_run("stopped")
    for run in (straight, stopped):
        run.data = ShardData.open([tmp_path / "mixed.tar"], captions=True)
    straight(config)
    with pytest.raises(Interrupted):
        stopped(config, at_step=send(signal.SIGTERM, 3))
    stopped(config)
    assert counts(straight)[-1] > counts(straight)[0]
    assert counts(stopped) == counts(straight)


def test_too_many_unusable_pictures_stop_training(tmp_path: Path, new_run: NewRun) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(4):
            for name, content in ((f"{number}.png", b"no picture"), (f"{number}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    run = new_run("a")
    run.data = ShardData.open([tmp_path], captions=True)
    with pytest.raises(ValueError, match=r"bad\.tar.*--max-bad-fraction"):
        run(tiny.train_config())


def test_validation_weighs_every_picture_alike(new_run: NewRun, data: ShardData) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=2, global_batch=10, validate_every=1), validation=data)  # 24 pictures: 10, 10 and 4
    lines = [line for line in read_metrics(run.folder / "run") if line["split"] == "validation"]
    pictures = [to_tensor(open_image(data.read(index).image_bytes)) for index in range(len(data))]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["brightness"] == pytest.approx(float(torch.stack(pictures).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("has_bfloat16", "said", "computed_in"),
    [(False, (), "fp32"), (False, ("precision",), "autocast"), (True, (), "autocast")],
)
def test_a_cpu_without_bfloat16_computes_in_fp32_unless_told_otherwise(
    new_run: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
    has_bfloat16: bool,
    said: tuple[str, ...],
    computed_in: str,
) -> None:
    monkeypatch.setattr(training.loop.fit, "has_bfloat16_arithmetic", lambda device: has_bfloat16)
    run = new_run("run")
    run(tiny.train_config(steps=1, precision="autocast", said=said))
    assert json.loads((run.folder / "run" / "config.json").read_text())["training"]["precision"] == computed_in
    assert any("this CPU only emulates bfloat16" in line for line in run.said) == (computed_in == "fp32")


@pytest.mark.parametrize(("preset", "computed_in"), [("autocast", "autocast"), ("fp32", "fp32")])
def test_a_preset_says_how_a_cpu_without_bfloat16_computes(
    new_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, preset: str, computed_in: str
) -> None:
    monkeypatch.setattr(training.loop.fit, "has_bfloat16_arithmetic", lambda device: False)
    run = new_run("run")
    run(tiny.train_config(steps=1, precision="autocast", preset=preset))
    assert not any("emulates bfloat16" in line or "instead of the recipe's fp32" in line for line in run.said)
    assert any(f"precision {computed_in}, instead" in line for line in run.said) == (computed_in == "fp32")
