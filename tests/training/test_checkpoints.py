import dataclasses
import itertools
import logging
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.checkpoints import Killed, forge_digests, kill_at
from support.engines import Bomb, Objective, config, data, engine_of, train
from support.runs import NewRun, Run, send

import training.cli.main
import training.cli.train
import training.ranks.job
from training.config import OptimizerConfig
from training.engine.checkpoints import digest_of, latest_tag, read_manifest, resumable_tags, write_manifest
from training.engine.optimizer import settings_of
from training.patches import tensors_only
from training.ranks.ranks import Ranks, join
from training.ranks.stop import Interrupted
from training.stages.dvae import WarmupStage, train_dvae
from training.stages.inputs import Inputs

TAGS = ["step00000001", "step00000002", "step00000003"]


@pytest.fixture
def ranks() -> Ranks:
    return join()


@pytest.fixture
def new_run(tmp_path: Path, shards: Path) -> NewRun:
    def make(name: str) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        return Run(folder, tiny.open_world(shards), join())

    return make


@pytest.fixture
def saved(tmp_path: Path, ranks: Ranks) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    engine = engine_of(Objective(), config(keep_last=3), ranks)
    for step in (1, 2, 3):
        train(engine, range(step - 1, step))
        engine.save(tmp_path, step, {"n": step})
    return tmp_path


def loaded(folder: Path, tag: str | None = None, **changes: Any) -> dict[str, Any]:
    return engine_of(Objective(seed=1), config(**changes), join()).load(folder, tag)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- what is kept


def test_every_file_is_listed_with_its_size_and_digest_and_no_script_is_left(saved: Path) -> None:
    for tag in TAGS:
        folder = saved / tag
        files = read_manifest(folder)["files"]
        assert sorted([*files, "checkpoint.json"]) == names(folder)
        assert {name: digest_of(folder / name) for name in files} == files


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [7]), (2, 0, [6, 7]), (1, 3, [3, 6, 7]), (2, 4, [4, 6, 7]), (3, 1, [1, 2, 3, 4, 5, 6, 7])],
)
def test_the_newest_are_kept_and_multiples_for_good(
    tmp_path: Path, ranks: Ranks, keep_last: int, keep_every: int, kept: list[int]
) -> None:
    engine = engine_of(Objective(), config(keep_last=keep_last, keep_every=keep_every), ranks)
    for step in range(1, 8):
        engine.save(tmp_path, step, {})
    assert names(tmp_path) == ["latest", *(f"step{step:08d}" for step in kept)]


def test_incomplete_folders_are_neither_counted_as_kept_nor_offered(saved: Path, ranks: Ranks) -> None:
    (saved / TAGS[1] / "checkpoint.json").unlink()  # as a deletion that was interrupted leaves it
    shutil.copytree(saved / TAGS[2], saved / "step00000009")  # complete, but its save never came to `latest`
    (saved / "step00000012").mkdir()
    assert resumable_tags(saved) == [TAGS[2], TAGS[0]]
    engine_of(Objective(), config(keep_last=3), ranks).save(saved, 4, {})
    assert names(saved) == ["latest", TAGS[0], TAGS[2], "step00000004"]


def test_folders_of_other_names_are_left_alone(saved: Path, ranks: Ranks) -> None:
    others = ["step1", "step00000001.bak", "mine"]
    for name in others:
        (saved / name).mkdir()
    engine_of(Objective(), config(keep_last=1), ranks).save(saved, 4, {})
    assert names(saved) == sorted(["latest", "step00000004", *others])


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "training.engine.checkpoints.tags_in"])
def test_what_latest_names_is_kept_whatever_fails_after_that(
    saved: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    replace = os.replace

    def fail(*_: object) -> None:
        raise OSError("the file system went away")

    def replace_and_fail_from_now_on(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "latest":
            monkeypatch.setattr(call, fail)

    engine = engine_of(Objective(), config(keep_last=1), ranks)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_fail_from_now_on)
        engine.save(saved, 4, {"n": 4})
    monkeypatch.undo()
    assert (saved / "latest").read_text() == "step00000004"
    assert ("old checkpoints could not be dropped" in caplog.text) == (call == "training.engine.checkpoints.tags_in")
    assert loaded(saved) == {"n": 4}


# ------------------------------------------------------------------------------------------------ what is loaded

DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip_a_byte,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 20),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}
FILES = ["mp_rank_00_model_states.pt", "ema.safetensors", "random_00000.safetensors", "checkpoint.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_good_one(
    saved: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    DAMAGES[damage](saved / TAGS[2] / name)
    flip_a_byte(saved / TAGS[1] / FILES[0])
    before = names(saved / TAGS[2])
    with caplog.at_level(logging.WARNING):
        assert loaded(saved) == {"n": 1}
    assert f"{TAGS[2]}/{name}" in caplog.text
    assert f"going back to {saved / TAGS[0]}" in caplog.text
    assert names(saved / TAGS[2]) == before, "the broken one stays, for whoever wants to see why"
    caplog.clear()
    assert loaded(saved) == {"n": 1}
    assert not caplog.text, "it is not offered again"


def test_a_broken_checkpoint_is_gone_when_the_run_has_saved_again(saved: Path, ranks: Ranks) -> None:
    flip_a_byte(saved / TAGS[2] / FILES[0])
    engine = engine_of(Objective(), config(keep_last=5), ranks)
    engine.load(saved)
    engine.save(saved, 7, {"n": 7})
    assert names(saved) == ["latest", *TAGS[:2], "step00000007"]
    assert loaded(saved) == {"n": 7}


def test_without_any_good_checkpoint_the_error_names_all_that_are_bad(saved: Path) -> None:
    for tag in TAGS:
        flip_a_byte(saved / tag / FILES[0])
    with pytest.raises(ValueError, match=f"{TAGS[2]}.*{TAGS[1]}.*{TAGS[0]}.*its digest does not match.*--fresh"):
        loaded(saved)


def test_a_folder_with_special_characters_in_its_name_is_resumed_from(tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "b [c+d]*?"
    engine_of(Objective(), config(), ranks).save(folder, 1, {"n": 1})
    assert loaded(folder) == {"n": 1}


def test_no_checkpoint_at_all_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        loaded(tmp_path / "nothing")


@pytest.mark.parametrize(
    "text", [None, "", "\n", "../../x", "/etc", "step00000099/../step00000001", "step1", "..", b"\xff"]
)
def test_a_latest_that_names_no_checkpoint_is_the_newest_complete_one(
    saved: Path, caplog: pytest.LogCaptureFixture, text: str | bytes | None
) -> None:
    latest = saved / "latest"
    if text is None:
        latest.unlink()
    else:
        latest.write_bytes(text if isinstance(text, bytes) else text.encode())
    (saved / "step00000012").mkdir()
    assert latest_tag(saved) == TAGS[2]
    assert loaded(saved) == {"n": 3}
    assert "did not name a checkpoint" in caplog.text
    assert latest.read_text() == TAGS[2]


def test_a_latest_that_names_what_is_not_there_goes_back_to_what_is(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(saved / TAGS[2])
    assert loaded(saved) == {"n": 2}
    assert f"{TAGS[2]}/checkpoint.json is missing" in caplog.text


def test_a_named_checkpoint_is_gone_back_to_or_refused(saved: Path) -> None:
    assert loaded(saved, TAGS[0]) == {"n": 1}
    assert latest_tag(saved) == TAGS[0], "what came after is out"
    assert loaded(saved) == {"n": 1}
    assert loaded(saved, TAGS[2]) == {"n": 3}, "and is there until the run has saved again"
    flip_a_byte(saved / TAGS[1] / FILES[1])
    with pytest.raises(ValueError, match=rf"{TAGS[1]} cannot be loaded.*ema\.safetensors"):
        loaded(saved, TAGS[1])


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"},
        {"files": {}},
        {"files": {"../latest": {"bytes": 12, "blake2b": ""}}},
        {"files": []},
        {"ranks": None},
        {"state": 5},
    ],
)
def test_a_manifest_that_is_forged_is_damage(saved: Path, change: dict[str, Any]) -> None:
    write_manifest(saved / TAGS[2], {**read_manifest(saved / TAGS[2]), **change})
    assert loaded(saved) == {"n": 2}


def test_a_manifest_that_lacks_something_is_damage(saved: Path) -> None:
    manifest = read_manifest(saved / TAGS[2])
    for name in manifest.keys() - {"optimizer"}:  # which version 0.1 did not write
        write_manifest(saved / TAGS[2], {key: value for key, value in manifest.items() if key != name})
        (saved / "latest").write_text(TAGS[2])
        assert loaded(saved) == {"n": 2}


def test_a_number_changed_in_the_manifest_is_noticed(saved: Path) -> None:
    path = saved / TAGS[2] / "checkpoint.json"
    path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
    assert loaded(saved) == {"n": 2}


def test_random_states_go_on_where_they_were(tmp_path: Path, ranks: Ranks) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    engine = engine_of(Objective(), config(), ranks)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    draw()
    engine.save(tmp_path, 1, {})
    expected = draw()
    draw()
    engine.load(tmp_path)
    assert draw() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_moves_between_stages_1_and_2(tmp_path: Path, ranks: Ranks, before: int, after: int) -> None:
    straight = engine_of(Objective(), config(zero_stage=before), ranks)
    expected = train(straight, range(6))
    first = engine_of(Objective(), config(zero_stage=before), ranks)
    train(first, range(3))
    first.save(tmp_path, 3, {})
    second = engine_of(Objective(seed=1), config(zero_stage=after), ranks)
    second.load(tmp_path)
    assert train(second, range(3, 6)) == pytest.approx(expected[3:], rel=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "use"), [(0, 1, "0"), (0, 3, "0"), (2, 0, "1 or 2"), (3, 1, "3"), (2, 3, "1 or 2")]
)
def test_other_moves_between_stages_are_refused_in_words(
    tmp_path: Path, ranks: Ranks, before: int, after: int, use: str
) -> None:
    engine_of(Objective(), config(zero_stage=before), ranks).save(tmp_path, 1, {})
    with pytest.raises(
        ValueError, match=f"saved at ZeRO stage {before}, this run is at {after}: use --zero-stage {use}"
    ):
        loaded(tmp_path, zero_stage=after)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")),
        *(pytest.param(3, precision, marks=pytest.mark.slow) for precision in ("fp32", "bf16")),
    ],
)
@pytest.mark.parametrize("clips", [(0.5, None), (None, 0.5), (None, None)])
def test_a_run_goes_on_with_its_own_settings_and_not_with_those_it_was_saved_with(
    tmp_path: Path, ranks: Ranks, stage: int, precision: str, clips: tuple[float | None, float | None]
) -> None:
    mode = {"zero_stage": stage, "precision": precision}
    before = OptimizerConfig(gradient_clipping=0.0, weight_decay=0.5, variance_clip=clips[0])
    after = OptimizerConfig(
        gradient_clipping=1e-3, weight_decay=0.0, betas=(0.5, 0.6), eps=1e-3, variance_clip=clips[1]
    )
    engine_of(Objective(), config(optimizer=before, **mode), ranks).save(tmp_path, 1, {})
    engine = engine_of(Objective(seed=1), config(optimizer=after, **mode), ranks)
    own = settings_of(engine._engine.optimizer)
    engine.load(tmp_path)
    assert settings_of(engine._engine.optimizer) == own
    assert own[0]["betas"] == (0.5, 0.6)
    engine.train()
    before_step = {name: weight.detach().clone() for name, weight in engine._gather().items()}
    tensors = data(1)
    engine.step([{**tensors, "x": tensors["x"].to(next(engine.model.parameters()).dtype)}], 1e-2, 1)
    assert getattr(engine._engine.optimizer, "clip_grad", 1e-3) == 1e-3
    # with so large an eps, a gradient of so small a norm moves the weights by much less than the rate
    moved = torch.cat([(weight - before_step[name]).flatten() for name, weight in engine._gather().items()])
    assert 0 < moved.abs().max() < 5e-3


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resuming_prints_nothing(tmp_path: Path, ranks: Ranks, capfd: pytest.CaptureFixture[str], stage: int) -> None:
    engine_of(Objective(), config(zero_stage=stage, precision="bf16"), ranks).save(tmp_path, 1, {})
    engine = engine_of(Objective(), config(zero_stage=stage, precision="bf16"), ranks)
    capfd.readouterr()
    engine.load(tmp_path)
    assert capfd.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------ forgery


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_code_in_a_checkpoint_with_consistent_digests_does_not_run(tmp_path: Path, ranks: Ranks, stage: int) -> None:
    engine = engine_of(Objective(), config(zero_stage=stage), ranks)
    engine.save(tmp_path, 1, {})
    folder = tmp_path / "step00000001"
    files = list(read_manifest(folder)["files"])
    assert len(files) == (4 if stage else 3)
    for name in files:
        good = (folder / name).read_bytes()
        torch.save({"module": Bomb(tmp_path / "ran"), "optimizer_state_dict": Bomb(tmp_path / "ran")}, folder / name)
        forge_digests(folder)
        with pytest.raises(ValueError, match=r"cannot be loaded.*as they were written"):
            loaded(tmp_path, zero_stage=stage)
        assert not (tmp_path / "ran").exists()
        (folder / name).write_bytes(good)
        forge_digests(folder)
    assert loaded(tmp_path, zero_stage=stage) == {}


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("content", [5, None, [], {}, {"module": 5, "optimizer_state_dict": []}], ids=str)
def test_harmless_things_of_wrong_types_are_an_error_in_words(
    tmp_path: Path, ranks: Ranks, stage: int, content: object
) -> None:
    engine_of(Objective(), config(zero_stage=stage), ranks).save(tmp_path, 1, {})
    folder = tmp_path / "step00000001"
    for name in [name for name in read_manifest(folder)["files"] if name.endswith(".pt")]:
        good = (folder / name).read_bytes()
        torch.save(content, folder / name)
        forge_digests(folder)
        with pytest.raises(ValueError, match=r"cannot be loaded.*as they were written"):
            loaded(tmp_path, zero_stage=stage)
        (folder / name).write_bytes(good)
        forge_digests(folder)
    assert loaded(tmp_path, zero_stage=stage) == {}


def test_no_reader_that_asks_for_free_unpickling_gets_it_while_deepspeed_reads(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "good.pt")
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "bad.pt")
    original = torch.load
    with tensors_only():
        assert torch.load(tmp_path / "good.pt", weights_only=False)["a"].tolist() == [0.0]
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert torch.load is original


# ------------------------------------------------------------------------------------- killed while it is saving


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_save_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path, ranks: Ranks, stage: int) -> None:
    start = tmp_path / "start"
    engine = engine_of(Objective(), config(zero_stage=stage, keep_last=1), ranks)
    engine.save(start, 1, {"n": 1})
    outcomes = []
    for moment in itertools.count():
        folder = shutil.copytree(start, tmp_path / f"{moment}")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                engine.save(folder, 2, {"n": 2})
                was_killed = False
            except Killed:
                was_killed = True
        outcomes.append(step_gone_on_from(folder, stage))
        if not was_killed:
            break
    assert len(outcomes) > 15, "the moments must be many"
    assert outcomes == sorted(outcomes), "once the new one is named, it is what loads"
    assert set(outcomes) == {1, 2}


def step_gone_on_from(folder: Path, stage: int) -> int:
    """Load, save the next step, and load that; returns the step that was loaded first."""
    step = int(loaded(folder, zero_stage=stage)["n"])
    after = step + 1
    engine_of(Objective(), config(zero_stage=stage, keep_last=1), join()).save(folder, after, {"n": after})
    assert {name for name in names(folder) if not name.startswith(".")} == {"latest", f"step{after:08d}"}
    assert loaded(folder, zero_stage=stage) == {"n": after}
    return step


# --------------------------------------------------------------------------------------------------- through fit


def test_fit_goes_back_past_a_broken_checkpoint_and_ends_as_if_nothing_had_been(
    new_run: NewRun, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny.train_config(steps=9, checkpoint_every=2)
    straight, broken = new_run("straight"), new_run("broken")
    straight(settings)
    with pytest.raises(Interrupted):
        broken(settings, at_step=send(signal.SIGTERM, 6))
    folder = broken.folder / "run" / "checkpoints"
    flip_a_byte(folder / "step00000007" / FILES[0])
    broken(settings)
    assert "going back to" in caplog.text
    assert any("resuming from step 6" in line for line in broken.said)
    assert broken.losses == straight.losses
    assert broken.weights == straight.weights
    assert names(folder) == ["latest", "step00000008", "step00000009"]


def test_fit_goes_back_to_a_named_step_and_the_same_command_then_goes_on(new_run: NewRun) -> None:
    settings = tiny.train_config(steps=8, checkpoint_every=2, keep_last=4)
    straight, run = new_run("straight"), new_run("a")
    straight(settings)
    run(settings)
    with pytest.raises(Interrupted, match="the same command without --resume-from resumes"):
        run(settings, at_step=send(signal.SIGTERM, 4), resume_from="step00000004")
    assert any("resuming from step 4 of 8" in line for line in run.said)
    assert sorted(run.losses) == [1, 2, 3, 4, 5], "lines of later steps are gone"
    assert names(run.folder / "run" / "checkpoints") == ["latest", "step00000002", "step00000004", "step00000005"]
    run(settings)
    assert any("resuming from step 5 of 8" in line for line in run.said)
    assert run.losses == straight.losses
    assert run.weights == straight.weights


def test_resume_needs_a_checkpoint_and_a_named_one_must_be_there(new_run: NewRun) -> None:
    run = new_run("a")
    with pytest.raises(ValueError, match=r"no checkpoint in .* to --resume from"):
        run(tiny.train_config(steps=2), resume=True)
    assert not (run.folder / "run").exists()
    run(tiny.train_config(steps=2))
    for tag in ("step00000001", "../checkpoints", "2"):
        with pytest.raises(ValueError, match="there are step00000002"):
            run(tiny.train_config(steps=4), resume_from=tag)
    run(tiny.train_config(steps=4), resume=True)
    assert sorted(run.losses) == [1, 2, 3, 4]


def test_a_finished_run_whose_last_checkpoint_is_cut_is_trained_to_its_end_again(new_run: NewRun) -> None:
    run = new_run("a")
    settings = tiny.train_config(steps=4, checkpoint_every=2)
    run(settings)
    before = run.weights
    os.truncate(run.folder / "run" / "checkpoints" / "step00000004" / FILES[0], 100)
    run(settings)
    assert any("resuming from step 2 of 4" in line for line in run.said)
    assert run.weights == before


def test_fresh_and_resume_contradict_each_other(shards: Path, tmp_path: Path) -> None:
    for changes in ({"resume": True}, {"resume_from": TAGS[0]}):
        with pytest.raises(ValueError, match="give one of them"):
            Inputs(data=[shards], out=tmp_path, fresh=True, **changes)  # type: ignore[arg-type]


def test_resume_goes_on_with_a_warm_up_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Ranks
) -> None:
    def stop_at(last: int) -> Callable[..., Any]:
        original = WarmupStage.loss

        def loss(self: WarmupStage, batch: Any, step: int) -> Any:
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, step)

        return loss

    said: list[str] = []
    inputs = Inputs(data=[shards], out=tmp_path)
    resumed = dataclasses.replace(inputs, resume=True)
    with pytest.raises(ValueError, match=r"dvae-warmup/checkpoints to --resume from"):
        train_dvae(tiny.recipe(), resumed, ranks, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(WarmupStage, "loss", stop_at(1))
        with pytest.raises(Interrupted):
            train_dvae(tiny.recipe(), inputs, ranks, said.append)
    train_dvae(tiny.recipe(), resumed, ranks, said.append)
    assert any(line.startswith("dvae-warmup: resuming from step 2") for line in said)
    assert latest_tag(tmp_path / "training" / "dvae" / "checkpoints") == "step00000004"


def test_the_command_line_has_the_options_of_keeping_and_resuming(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, Inputs]] = []
    monkeypatch.setattr(training.cli.train, "train_clip", lambda recipe, inputs, *_: given.append((recipe, inputs)))
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)
    command = ["clip", "demo", "--data", str(shards), "--out", str(tmp_path)]
    options = ["--keep-last", "3", "--keep-every", "500", "--resume-from", TAGS[0], "--resume"]
    assert training.cli.main.main([*command, *options]) == 0
    recipe, inputs = given[0]
    assert (recipe.clip.train.keep_last, recipe.clip.train.keep_every) == (3, 500)
    assert (inputs.resume, inputs.resume_from) == (True, TAGS[0])
