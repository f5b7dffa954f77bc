"""What a training step waits for on a GPU: counted on one that is not there, and listed in docs/performance.md.

The whole loop runs, from shards to lines of metrics, with DeepSpeed's engine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phantom import CAN_PRETEND

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
AUTOCAST = {"precision": "autocast"}
BF16 = {"precision": "bf16"}
SCALES = {"precision": "autocast-fp16", "gradient_scaling": "per-resblock"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dVAE": ("dvae", AUTOCAST),
    "CLIP": ("clip", AUTOCAST),
    "transformer": ("transformer", AUTOCAST),
    "transformer, per-resblock scales": ("transformer", SCALES),
    "transformer, PowerSGD": ("transformer", AUTOCAST | {"powersgd_rank": 4}),
    "transformer, bf16, ZeRO 1": ("transformer", BF16 | {"zero_stage": 1}),
    "transformer, bf16, ZeRO 2": ("transformer", BF16 | {"zero_stage": 2}),
}


def waits(folder: Path, stage: str, options: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what a step waited for, without ("step") and with a line of metrics ("logged")."""
    given = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    command = [sys.executable, str(HERE / "phantom_run.py"), str(folder), stage, *given]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, found: dict[str, dict[str, int]]) -> str:
    """Return the line of the page for a run."""
    step, logged = found["step"], found["logged"]
    places = ", ".join(f"{place} {n}×" if n > 1 else place for place, n in sorted(step.items()))
    more = sum(logged.values()) - sum(step.values())
    return f"| {name} | {sum(step.values())} | {places or '–'} | {more} |"


@pytest.mark.slow
@pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux and g++")
@pytest.mark.parametrize("name", RUNS)
def test_what_a_step_waits_for_on_a_gpu_is_what_the_page_says(tmp_path: Path, name: str) -> None:
    line = row(name, waits(tmp_path, *RUNS[name]))
    assert line in PAGE.read_text(encoding="utf-8").splitlines(), line
