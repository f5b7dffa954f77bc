"""Two trainings and four `dalle generate` with one --out, begun at random moments."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from support import tiny
from support.waiting import wait_for

SHARED, N_RUNS = "a red cube", 4


def begun(log: Path, *command: object) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_one_training_is_refused_and_no_sample_is_lost(tmp_path: Path, bundle: Path, seed: int) -> None:
    out, data = tmp_path / "out", tiny.write_world(tmp_path / "data")
    train = (
        Path(tiny.__file__).with_name("tiny_cli.py"),
        "dvae",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--steps",
        100_000,
        "--log-every",
        1000,
    )
    sample = ("-m", "dalle", "generate", "--bundle", bundle, "--out", out, "-n", 4, "--keep", 2)
    commands: list[tuple[object, ...]] = [train, train]
    commands += [(*sample, SHARED, f"only of {k}", "--seed", k) for k in range(N_RUNS)]
    rng = random.Random(seed)
    order = rng.sample(range(len(commands)), len(commands))
    jobs = {}
    try:
        for k in order:
            jobs[k] = begun(tmp_path / f"{k}.log", *commands[k])
            time.sleep(rng.uniform(0, 1))
        assert [jobs[2 + k].wait(120) for k in range(N_RUNS)] == [0] * N_RUNS
        wait_for(lambda: any(jobs[k].poll() is not None for k in (0, 1)))
        (running,) = (k for k in (0, 1) if jobs[k].poll() is None)
        told = (tmp_path / f"{1 - running}.log").read_text().splitlines()[-1]
        holder = re.escape(f"process {jobs[running].pid} on host {socket.gethostname()}")
        assert re.search(rf"^error: .*dvae is in use by {holder}, last sign of life \d+ s ago", told)
        assert jobs[1 - running].returncode == 1
        wait_for(lambda: list(out.glob("training/*/metrics.jsonl")))
        jobs[running].send_signal(signal.SIGINT)
        jobs[running].wait(60)
        assert list(out.glob("training/*/checkpoints/latest"))
    finally:
        for job in jobs.values():
            job.kill()
    _require_all_samples(out)


def _require_all_samples(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    expected = {(caption, k): 2 for k in range(N_RUNS) for caption in (SHARED, f"only of {k}")}
    assert Counter((line["caption"], line["seed"]) for line in lines) == expected
    for line in lines:
        with Image.open(out / line["file"]) as image:
            told = image.text  # type: ignore[attr-defined]
        assert (told["caption"], told["seed"], told["file"]) == (line["caption"], str(line["seed"]), line["file"])
    pictures = {str(path.relative_to(out)) for path in out.glob("*/*.png")}
    assert pictures == {line["file"] for line in lines}
