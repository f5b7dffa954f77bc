"""Two jobs in one bundle: the second is refused by name, and a dead first one keeps nobody out."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import tiny

import training.cli.main
import training.plan.machine
import training.ranks.job
import training.recipes
import training.stages.locks
from dvae import DVAE
from storage.lock import LOCK, locked
from storage.models.directory import directory_hash
from training.ranks.environment import PARENT
from training.ranks.ranks import join, leave
from training.stages.dvae import train_dvae
from training.stages.inputs import Inputs
from training.stages.locks import bundle_lock

HOLD = """
import sys, time
from pathlib import Path
from storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.plan.machine, "usable_cores", lambda: 1)
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", lambda: tiny.recipe(steps=1))
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)
    monkeypatch.setattr(training.stages.locks, "ENDING_S", 0.0)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Let another process hold a folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: object) -> int:
    return training.cli.main.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("held", "command"),
    [
        ("training/dvae", ("dvae", "tiny")),
        ("training/clip", ("clip", "tiny", "--fresh")),
        ("training/tokenizer", ("tokenizer", "tiny")),
        ("training", ("dvae", "tiny")),
        ("training", ("tokenizer", "tiny")),
        ("training/clip", ("all", "tiny", "--fresh")),
        ("training", ("all", "tiny")),
        ("training", ("demo",)),
    ],
)
def test_a_second_training_is_refused_by_name_and_changes_nothing(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], held: str, command: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    (out / "training" / "clip" / "checkpoints").mkdir(parents=True)
    data = () if command[0] == "demo" else ("--data", shards)
    with held_elsewhere(out / held) as other:
        before = contents(out)
        assert run(*command, *data, "--out", out) == 1
        said = capsys.readouterr().err
        assert f"{out / held} is in use by process {other.pid} on host " in said
        assert ", last sign of life" in said
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
        assert contents(out) == before
        assert (out / "training" / "clip" / "checkpoints").is_dir()


def test_another_encoding_into_the_same_folder_is_refused(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    DVAE(tiny.recipe().dvae.model).save(tmp_path / "dvae")
    command = ("encode", "--data", shards, "--dvae", tmp_path / "dvae", "--out", tmp_path / "tokens", "--workers", 0)
    with held_elsewhere(tmp_path / "tokens"):
        assert run(*command) == 1
        assert "is in use by process" in capsys.readouterr().err
    assert run(*command) == 0


def test_a_killed_training_keeps_nobody_out_and_locks_go_with_their_holders(tmp_path: Path, shards: Path) -> None:
    for folder in ("training", "training/dvae"):
        with held_elsewhere(tmp_path / folder) as other:
            other.send_signal(signal.SIGKILL)
    assert (tmp_path / "training" / "dvae" / LOCK).exists()
    assert run("dvae", "tiny", "--data", shards, "--out", tmp_path) == 0
    assert not (tmp_path / "training" / "dvae" / LOCK).exists()
    with held_elsewhere(tmp_path / "training" / "clip"):
        assert run("dvae", "tiny", "--data", shards, "--out", tmp_path) == 0, "stages may be trained side by side"


@pytest.mark.slow
def test_the_end_of_a_job_that_is_ending_is_waited_for(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.stages.locks, "ENDING_S", 60.0)
    with held_elsewhere(tmp_path / "training" / "dvae") as other:
        # waited for, or it would stay a zombie, which counts as alive until it has been silent for long
        threading.Timer(2.0, lambda: (other.terminate(), other.wait())).start()
        assert run("dvae", "tiny", "--data", shards, "--out", tmp_path) == 0


@pytest.mark.parametrize("is_child", [False, True])
def test_the_stages_of_a_job_are_not_kept_out_by_its_own_lock(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, is_child: bool
) -> None:
    command = ("dvae", "tiny", "--data", shards, "--out", tmp_path)
    if is_child:
        with held_elsewhere(tmp_path / "training") as parent:
            monkeypatch.setenv(PARENT, str(parent.pid))
            monkeypatch.setattr("training.ranks.watch.launchers", lambda pid: ())
            assert run(*command) == 0
    else:
        with bundle_lock(tmp_path):
            assert run(*command) == 0


def test_an_error_before_the_first_step_leaves_no_folder(tmp_path: Path) -> None:
    assert run("dvae", "tiny", "--data", tmp_path / "none", "--out", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()


def test_a_training_that_lost_its_run_to_another_ends(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training.stages.locks, "end_process", said.append)
    monkeypatch.setattr("storage.lock.SILENCE_S", 0.03)
    with locked(tmp_path / "elsewhere"):
        other = (tmp_path / "elsewhere" / LOCK).read_bytes()

    def steal(line: str) -> None:
        if "dvae 1/1" in line:
            (tmp_path / "stolen").write_bytes(other)
            (tmp_path / "stolen").replace(tmp_path / "training" / "dvae" / LOCK)

    train_dvae(tiny.recipe(steps=1), Inputs(data=[shards], out=tmp_path), join(), steal)
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    assert any("training/dvae was lost" in line for line in said)


# ------------------------------------------------------------------------------------------- a caller's settings


@pytest.mark.parametrize(
    "setting",
    ["autocast", "inference", "meta", *(pytest.param(s, marks=pytest.mark.slow) for s in ("no_grad", "float64"))],
)
def test_training_is_undisturbed_by_what_its_caller_has_set(tmp_path: Path, shards: Path, setting: str) -> None:
    def train(name: str) -> str:
        inputs = Inputs(data=[shards], out=tmp_path / name)
        return directory_hash(train_dvae(tiny.recipe(steps=1), inputs, join(), lambda line: None))

    plain, dtype = train("plain"), torch.get_default_dtype()
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "meta": lambda: torch.device("meta"),
    }
    if setting == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            assert train(setting) == plain
            assert torch.get_default_dtype() == torch.float64, "the caller's setting is kept"
        finally:
            torch.set_default_dtype(dtype)
    else:
        with contexts[setting]():
            assert train(setting) == plain


def test_a_process_that_has_left_its_group_can_train_again(tmp_path: Path, shards: Path) -> None:
    for name in ("first", "second"):
        train_dvae(tiny.recipe(steps=1), Inputs(data=[shards], out=tmp_path / name), join(), lambda line: None)
        leave()


def test_a_thread_can_train(tmp_path: Path, shards: Path) -> None:
    made: list[Path] = []
    inputs = Inputs(data=[shards], out=tmp_path)
    ranks = join()
    thread = threading.Thread(
        target=lambda: made.append(train_dvae(tiny.recipe(steps=1), inputs, ranks, lambda line: None))
    )
    thread.start()
    thread.join()
    assert made == [tmp_path / "dvae"]
