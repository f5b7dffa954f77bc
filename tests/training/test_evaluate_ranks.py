"""`dalle-train evaluate` killed in the middle, and by several processes: the same bits as one process at one go."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.ranks import LAUNCHERS, launch
from support.tiny import write_tar

pytestmark = pytest.mark.slow

N = 7
PATIENCE_S = 300


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    buffers = [io.BytesIO() for _ in range(N)]
    for number, buffer in enumerate(buffers):
        Image.new("RGB", (16, 16), (30 * number, 99, 200 - 20 * number)).save(buffer, "png")
    members = [(f"{i}.png", buffer.getvalue()) for i, buffer in enumerate(buffers)]
    members += [(f"{i}.txt", b"a dog left of a cat") for i in range(N)]
    return write_tar(tmp_path_factory.mktemp("shards") / "0.tar", sorted(members))


def command(bundle: Path, shard: Path, out: Path) -> list[str]:
    options = ["--best-of", "1,2", "--blur", "0", "--shard-captions", "1", "--captions", "1", "--device", "cpu"]
    return ["evaluate", str(bundle), "--data", str(shard), *options, "--out", str(out)]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
def alone(bundle: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes at one go."""
    out = tmp_path_factory.mktemp("alone")
    end(start(command(bundle, shard, out)))
    assert len(shards_in(out)) == N
    return out


def test_a_killed_run_started_again_says_the_same(bundle: Path, shard: Path, alone: Path, tmp_path: Path) -> None:
    process = start(command(bundle, shard, tmp_path))
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "evaluation" / "00002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "evaluation.json").exists()
    end(start(command(bundle, shard, tmp_path)))
    assert found_in(tmp_path) == found_in(alone)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_too(launcher: str, bundle: Path, shard: Path, alone: Path, tmp_path: Path) -> None:
    port = 29_700 + list(LAUNCHERS).index(launcher) + os.getpid() % 200
    code, output = launch(launcher, port, command(bundle, shard, tmp_path))
    assert code == 0, output
    assert shards_in(tmp_path) == shards_in(alone)
    assert found_in(tmp_path) == found_in(alone)
