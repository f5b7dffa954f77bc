"""`dalle-train evaluate` killed in the middle, and by several processes: the same bits as one process at one go."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.ranks import LAUNCHERS, launch
from support.tiny import write_world

pytestmark = pytest.mark.slow

N = 7
PATIENCE_S = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), N, size=16)


def command(bundle: Path, world: Path, out: Path) -> list[str]:
    options = ["--best-of", "1,2,4", "--blur", "0,1", "--shard-captions", "1", "--captions", "1", "--device", "cpu"]
    return ["evaluate", str(bundle), "--data", str(world), *options, "--out", str(out)]


def start(arguments: list[str], **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    program = [sys.executable, "-m", "training.cli", *arguments]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output


def found_in(out: Path) -> dict[str, object]:
    """All that was measured but the times and the machine."""
    record = json.loads((out / "evaluation.json").read_text())
    record["best_of"].pop("seconds")
    record.pop("environment")
    return {**record, "lines": (out / "captions.jsonl").read_text()}


def shards_in(out: Path) -> list[dict[str, bytes]]:
    paths = sorted((out / "evaluation").glob("0*.safetensors"))
    return [{name: tensor.tobytes() for name, tensor in load_file(path).items()} for path in paths]


@pytest.fixture(scope="module")
def alone(bundle: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes at one go."""
    out = tmp_path_factory.mktemp("alone")
    end(start(command(bundle, world, out)))
    assert len(shards_in(out)) == N
    return out


def test_a_killed_run_started_again_says_the_same(bundle: Path, world: Path, alone: Path, tmp_path: Path) -> None:
    process = start(command(bundle, world, tmp_path))
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "evaluation" / "00002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "evaluation.json").exists()
    end(start(command(bundle, world, tmp_path)))
    assert found_in(tmp_path) == found_in(alone)


def test_two_processes_say_what_one_says(bundle: Path, world: Path, alone: Path, tmp_path: Path) -> None:
    ranks = [start(command(bundle, world, tmp_path), RANK=f"{rank}", WORLD_SIZE="2") for rank in range(2)]
    for process in ranks:
        end(process)
    assert shards_in(tmp_path) == shards_in(alone)
    assert found_in(tmp_path) == found_in(alone)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_too(launcher: str, bundle: Path, world: Path, alone: Path, tmp_path: Path) -> None:
    port = 29_700 + list(LAUNCHERS).index(launcher) + os.getpid() % 200
    code, output = launch(launcher, port, command(bundle, world, tmp_path))
    assert code == 0, output
    assert found_in(tmp_path) == found_in(alone)
