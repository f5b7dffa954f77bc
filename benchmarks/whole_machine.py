"""The stages of the demonstration's recipe by one process or several, of one thread or several, alone or two at once.

    python -m benchmarks.whole_machine --cores 2 --seconds 30 --rounds 3

Each alternative is started as `dalle-train all` starts it, left alone for the seconds, and killed; the rounds go
through all of them in turns. The table has the best round's wall time of a step, and the processor time that a rank
spent on one, which other programs on the machine disturb less: from that, `training/plan/machine.py` has its numbers.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dalle.output.text import aligned
from dvae import DVAE
from training.data.shards import write_shards
from training.drawings.drawing import draw_world
from training.ranks.side_by_side import Job, start_job
from training.recipes import recipe
from training.run_files import read_metrics
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer

N_PICTURES = 2_000
PATIENCE_S = 300.0
STAGES = ("dvae-warmup", "clip", "transformer")
Alternative = tuple[tuple[str, int, int], ...]
"""Stages that run at once: name, ranks, threads of each."""


def alternatives(n_cores: int) -> Iterator[Alternative]:
    """Yield what is compared: for every stage one thread, a thread per core, and ranks; then two stages at once."""
    for stage in STAGES:
        yield ((stage, 1, 1),)
        yield ((stage, 1, n_cores),)
        yield from (((stage, ranks, 1),) for ranks in (2, 4, 8, 16) if ranks <= n_cores)
    half = n_cores // 2
    yield ("dvae-warmup", half, 1), ("clip", half, 1)
    yield ("dvae-warmup", n_cores, 1), ("clip", n_cores, 1)


def prepare(folder: Path) -> None:
    """Draw a world, and make the tokenizer and the dVAE, of random weights, that the transformer needs."""
    demo = recipe("demo")
    size = demo.dvae.model.image_size
    drawn = draw_world(N_PICTURES, 0, size=size, share_of_three=0.0, processes=1)
    write_shards(drawn, folder / "world", "world", 1_000)
    train_tokenizer(demo, Inputs(data=[folder / "world"], out=folder / "bundle"), print)
    torch.manual_seed(0)
    DVAE(demo.dvae.model).save(folder / "bundle" / "dvae", metadata={})


def measured(folder: Path, chosen: Alternative, seconds: float, precision: str) -> list[tuple[float, float]]:
    """Return the wall and the processor seconds of a step of each stage.

    Raises:
        RuntimeError: a stage has ended early, or has not begun in time.
    """
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "bundle", out)
    more = ("--log-every", "5", "--checkpoint-every", "1000000", "--precision", precision)
    children = []
    for stage, ranks, threads in chosen:
        command = (stage.removesuffix("-warmup"), "demo", "--data", str(folder / "world"), "--out", str(out), *more)
        children.append(start_job(Job(stage=stage, arguments=command, ranks=ranks, threads=threads)))
    everyone = [child for of_stage in children for child in of_stage]

    def moment() -> list[tuple[int, float, float]]:
        """Return the last step of every stage, when it was, and the most processor time of one of its ranks."""
        lines = [read_metrics(out / "training" / stage) for stage, _, _ in chosen]
        spent = [max(processor_s(child.process.pid) for child in of_stage) for of_stage in children]
        return [
            (line[-1]["step"], line[-1]["time"], s) if line else (0, 0.0, s)
            for line, s in zip(lines, spent, strict=True)
        ]

    try:
        deadline = time.monotonic() + PATIENCE_S
        while not all(step for step, _, _ in moment()):
            if time.monotonic() > deadline or any(child.process.poll() is not None for child in everyone):
                raise RuntimeError(f"{chosen} did not train")
            time.sleep(0.1)
        before = moment()
        time.sleep(seconds)
        while any(now[0] < then[0] + 10 for then, now in zip(before, moment(), strict=True)):
            time.sleep(0.1)
        after = moment()
    finally:
        for child in everyone:
            child.process.kill()
            child.process.wait()
    pairs = zip(before, after, strict=True)
    return [((b[1] - a[1]) / (b[0] - a[0]), (b[2] - a[2]) / (b[0] - a[0])) for a, b in pairs]


def processor_s(pid: int) -> float:
    """Return the processor seconds that a process has taken, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="autocast")
    options = parser.parse_args()
    everything = list(alternatives(options.cores))
    best: dict[Alternative, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number in range(options.rounds):
            for chosen in everything:
                print(f"round {number + 1}: {chosen}", file=sys.stderr, flush=True)
                found = measured(Path(folder), chosen, options.seconds, options.precision)
                pairs = zip(found, best.get(chosen, found), strict=True)
                best[chosen] = [(min(a[0], b[0]), min(a[1], b[1])) for a, b in pairs]
    rows = [["stage", "s/step", "processor s/step/rank"]]
    for chosen, found in best.items():
        for (stage, ranks, threads), (wall, processor) in zip(chosen, found, strict=True):
            beside = (
                f", beside {' and '.join(name for name, _, _ in chosen if name != stage)}" if len(chosen) > 1 else ""
            )
            rows.append([f"{stage} {ranks} × {threads}{beside}", f"{wall:.3f}", f"{processor:.3f}"])
    print(aligned(rows, "<>"))


if __name__ == "__main__":
    main()
