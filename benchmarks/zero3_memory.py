"""What each rank holds at ZeRO stage 3, from construction to sampling, beside what `dalle-train plan` counts.

All of it on this CPU, in processes of their own: peaks above what a rank held with everything imported and used once.

python -m benchmarks.zero3_memory                        # the table
python -m benchmarks.zero3_memory SIZE RANKS RANK FOLDER  # one rank, which prints the bytes of its peaks
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.measure import MIB, ROOT, Options, PeakMemory, Report, say
from benchmarks.training_memory import MMAP_THRESHOLD, Case, batch
from dalle.model import DALLE, KIND, DALLEConfig
from dalle.sampling import sample
from storage.models.directory import save_directory
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.objective import Objective
from training.engine.parts.averages import WeightsInParts
from training.engine.parts.drawing import drawn_in_parts
from training.engine.parts.spread import spread
from training.plan.memory_model import moments, training_peak
from training.plan.pauses import pauses
from training.ranks.ranks import Ranks, join, leave
from training.stages.transformer import transformer_loss

RANKS = (1, 2, 4)
STEPS = 2
TOLERANCE = 0.10
"""That a planned peak may be off, as a fraction of the measured one."""
SIZES = {
    "small": DALLEConfig(n_layers=12, d_model=512, n_heads=8, text_len=16, grid=8, text_vocab=2048, image_vocab=512),
    "large": DALLEConfig(n_layers=24, d_model=1024, n_heads=16, text_len=16, grid=8, text_vocab=2048, image_vocab=512),
}
"""The larger one is what fits a machine of 24 GiB beside others."""


def _case(config: DALLEConfig, ranks: int) -> Case:
    return Case(config=config, zero_stage=3, ranks=ranks, micro_batch=1)


# ------------------------------------------------------------------------------------------------ one rank


@contextmanager
def _measured(peaks: dict[str, int], name: str, before: int) -> Iterator[None]:
    """Add the peak within, above `before`, to `peaks`."""
    peak = PeakMemory()
    yield
    peaks[name] = peak.absolute() - before


def _life(config: DALLEConfig, ranks: Ranks, folder: Path) -> dict[str, int]:
    """Do with a model what a run does; returns the peak bytes at each point."""
    gc.collect()
    before = PeakMemory().absolute()
    peaks: dict[str, int] = {}
    at = partial(_measured, peaks, before=before)
    case = _case(config, ranks.size)
    text, image_tokens = batch(config, 1)
    tensors = {"text": text, "image_tokens": image_tokens, "n_cut": torch.zeros(1)}
    with at("start"):
        torch.manual_seed(0)
        with drawn_in_parts(ranks):
            model = DALLE(config)
        like = {name: torch.empty_like(weight) for name, weight in model.state_dict().items()}
        objective = Objective(model, partial(transformer_loss, model))
        engine = Engine(objective, resolve(case.train_config(), ranks.size), ranks)
    with at("step"):
        engine.train()
        for step in range(STEPS):
            engine.step([tensors], 1e-4, step)
    with at("validation"), engine.validating():
        engine.forward(tensors)
    with at("saving"):
        engine.save(folder / "checkpoints", STEPS, {})
    with at("export"):
        engine.averages.use(lambda weights: save_directory(folder / "model", KIND, config, weights, like=like))

    def drawn(weights: WeightsInParts) -> None:
        sample(spread(config, weights, 1), text, [0])

    def draw(weights: WeightsInParts) -> None:
        weights.call_all()
        drawn(weights)

    with at("sampling"):
        engine.averages.use(draw, drawn)  # type: ignore[arg-type]  # at stage 3
    return peaks


def main(size: str, n_ranks: str, rank: str, folder: str) -> None:
    """Run one rank, and print its peaks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(n_ranks))
    ranks = join()
    config = SIZES[size]
    # layers of the same shapes: what the matrix library keeps for a shape is not the model's
    _life(dataclasses.replace(config, n_layers=4), ranks, Path(folder) / "first")
    print(json.dumps(_life(config, ranks, Path(folder) / "second")))
    leave()


# ------------------------------------------------------------------------------------------------ all ranks


def measured(size: str, n_ranks: int) -> list[dict[str, int]]:
    """Return the peaks of every rank by point, from processes of their own.

    Raises:
        RuntimeError: a rank failed.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
        "MALLOC_TRIM_THRESHOLD_": str(MMAP_THRESHOLD),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_SIZE": str(n_ranks),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    say(f"peak memory: {size}, {n_ranks} ranks")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.zero3_memory", size, str(n_ranks), str(rank), folder],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(n_ranks)
        ]
        try:
            said = [process.communicate() for process in started]
        finally:
            for process in started:
                process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{size} on {n_ranks} ranks failed:\n{errors[-3000:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


def predicted(config: DALLEConfig, n_ranks: int) -> dict[str, float]:
    """Return the bytes that the plan counts at each point."""
    run = dataclasses.replace(_case(config, n_ranks).run(), samples=1)
    return {
        "start": moments(run)["start"].total,
        "step": training_peak(run)[1].total,
        **{name: memory.total for name, memory in pauses(run).items()},
    }


def shares(options: Options, report: Report) -> None:
    """Peaks of every rank, at each point of a run."""
    size = "small" if options.quick else "large"
    rows: list[list[measure.Cell]] = []
    for n_ranks in RANKS:
        found = measured(size, n_ranks)
        planned = predicted(SIZES[size], n_ranks)
        for name in found[0]:
            of_ranks = [peaks[name] / MIB for peaks in found]
            plan = planned[name] / MIB
            rows.append([f"{n_ranks}", name, max(of_ranks), min(of_ranks), plan, plan / max(of_ranks)])
            report.samples[f"{n_ranks} ranks, {name}"] = {"measured": of_ranks, "planned": [plan]}
            off = abs(plan / max(of_ranks) - 1)
            report.line("planned peak", f"{n_ranks} ranks, {name}", off, TOLERANCE, at_most=True, unit=" of it off")
    columns = ["ranks", "at", "most, MiB", "least, MiB", "planned, MiB", "planned ÷ most"]
    report.table("Peak memory of a rank at ZeRO stage 3", columns, rows)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIZES:
        main(*sys.argv[1:])
    else:
        measure.main("zero3_memory", __doc__, {"shares": shares})
