"""What `dalle-train plan` says of checkpoints and communication, beside real ones: bytes, and seconds on this machine.

Ranks are processes with gloo that run the real engine. The disk is that of the temporary folder (TMPDIR), and its speed
is measured as `plan --out` does. Before a checkpoint is verified or converted it is dropped from memory.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from benchmarks import collectives, measure
from benchmarks.measure import MIB, Cell, Options, Report, elapsed
from dalle.model import DALLE, KIND, DALLEConfig
from storage.models.directory import WEIGHTS_FILE, save_directory
from training.config import OptimizerConfig, OptimizerKind, Precision, TrainConfig
from training.engine.checkpoints import UNIVERSAL, first_good, read_manifest
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.objective import Objective
from training.engine.resharding import convert
from training.plan.costs.checkpoints import GB, Checkpoint, Saved, Speeds, checkpoint_of, measured_speeds
from training.plan.costs.communication import Counts, Traffic
from training.plan.state import Mode, shapes_only
from training.ranks.ranks import Ranks, join, leave
from training.run_files import checkpoint_tag
from training.schedules import WarmupCosine
from training.stages.transformer import transformer_loss

BYTES_OFF, TIME_FACTOR = 0.01, 2.0
"""That planned bytes may be off, as a fraction, and planned seconds, as a factor."""
LARGE = DALLEConfig(
    n_layers=8, d_model=512, n_heads=8, text_len=16, grid=4, text_vocab=2048, image_vocab=512, conv_kernel=3
)
TAG = checkpoint_tag(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run that saves."""

    zero_stage: int
    ranks: int
    config: DALLEConfig = LARGE
    precision: Precision = "fp32"
    optimizer: OptimizerKind = "adamw"
    powersgd_rank: int = 0

    def train_config(self) -> TrainConfig:
        """Return the run's configuration."""
        return TrainConfig(
            steps=1,
            global_batch=self.ranks,
            micro_batch=1,
            optimizer=OptimizerConfig(kind=self.optimizer),
            learning_rate=WarmupCosine(peak=1e-4, warmup=1, steps=100),
            precision=self.precision,
            zero_stage=self.zero_stage,
            powersgd_rank=self.powersgd_rank,
        )

    def planned(self, speeds: Speeds) -> Checkpoint:
        """Return what the plan says of its checkpoint."""
        with shapes_only():
            counts = Counts.of(DALLE(self.config), self.powersgd_rank)
        saved = Saved(
            total=counts.total,
            by_muon=counts.matrices if self.optimizer == "muon" else 0,
            compressed=counts.compressed,
        )
        mode = Mode(zero_stage=self.zero_stage, precision=self.precision)
        return checkpoint_of(saved, mode, self.ranks, self.train_config(), speeds)


CHECKPOINTS = {
    "ZeRO 0, 1 rank": Case(zero_stage=0, ranks=1),
    "ZeRO 0, 2 ranks, PowerSGD": Case(zero_stage=0, ranks=2, powersgd_rank=16),
    "ZeRO 1, 2 ranks, bf16": Case(zero_stage=1, ranks=2, precision="bf16"),
    "ZeRO 2, 2 ranks, muon": Case(zero_stage=2, ranks=2, optimizer="muon"),
    "ZeRO 3, 2 ranks, bf16": Case(zero_stage=3, ranks=2, precision="bf16"),
    "ZeRO 3, 4 ranks": Case(zero_stage=3, ranks=4),
}


# ------------------------------------------------------------------------------------------------ checkpoints


def bytes_by_rank(folder: Path, ranks: int) -> list[int]:
    """Return the bytes of a checkpoint's files, by the rank that wrote them."""
    sums = [0] * ranks
    for name, digest in read_manifest(folder)["files"].items():
        rank = re.search(r"(?:rank_?|random_|ema_)(\d+)", name)
        sums[int(rank[1]) if rank else 0] += digest["bytes"]
    return sums


def saved(ranks: Ranks, case: Case, folder: Path) -> dict[str, Any]:
    """Take a step with the real engine and save it; return the bytes by rank, and seconds. Collective.

    The seconds of all but the saving are those of the first rank: verifying, converting, exporting.
    """
    torch.manual_seed(0)
    model = DALLE(case.config)
    objective = Objective(model, partial(transformer_loss, model))
    engine = Engine(objective, resolve(case.train_config(), ranks.size), ranks)
    engine.train()
    engine.step([collectives.micro_batch(case.config)], 1e-4, 0)
    save_s = elapsed(lambda: engine.save(folder, 1, {}))
    _forget(folder / TAG)
    dist.barrier()
    verify_s = elapsed(lambda: first_good(folder, [TAG], ranks))
    export_s = elapsed(lambda: engine.averages.use(lambda weights: _export(case.config, weights, folder / "export")))
    _forget(folder / TAG)
    is_converted = case.zero_stage > 0
    convert_s = elapsed(lambda: convert(folder, TAG, ranks)) if is_converted else 0.0
    return {
        "bytes": bytes_by_rank(folder / TAG, ranks.size),
        "export": (folder / "export" / WEIGHTS_FILE).stat().st_size,
        "joined": _size(folder / UNIVERSAL) if is_converted else 0,
        "seconds": {"save": save_s, "verify": verify_s, "export": export_s, "convert": convert_s},
    }


def _export(config: DALLEConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    with torch.device("meta"):
        like = DALLE(config).state_dict()
    save_directory(folder, KIND, config, weights, like=like)


def _forget(folder: Path) -> None:
    """Drop a folder's files from memory, so that the disk is read."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkpoints(options: Options, report: Report) -> None:
    """Bytes and seconds of checkpoints."""
    speeds = measured_speeds(Path(tempfile.gettempdir()))
    report.notes.append(
        f"GB/s: the disk writes {speeds.write / GB:.2g} and reads {speeds.read / GB:.2g}, a process packs "
        f"{speeds.pack / GB:.2g} and digests {speeds.digest / GB:.2g}"
    )
    sizes: list[list[Cell]] = []
    times: list[list[Cell]] = []
    for name, case in list(CHECKPOINTS.items())[: 1 if options.quick else None]:
        measure.say(f"checkpoints: {name}")
        plan = case.planned(speeds)
        with tempfile.TemporaryDirectory() as folder:
            found = on_ranks(case.ranks, saved, case, Path(folder) / "run")[0]
        first, *others = found["bytes"]
        pairs = [(first, plan.first), (max(others, default=0), plan.other if others else 0)]
        pairs += [
            (sum(found["bytes"]), plan.total),
            (found["export"], plan.export),
            (found["joined"], plan.converted - 3 * plan.export if found["joined"] else 0),
        ]
        off = max(abs(planned / real - 1) for real, planned in pairs if real)
        sizes.append([name, *(value / MIB for pair in pairs for value in pair), off])
        report.line("planned bytes of a checkpoint", name, off, BYTES_OFF, at_most=True, unit=" of it off")
        for what, real in found["seconds"].items():
            if real:
                planned = getattr(plan, f"{what}_s")
                factor = max(real / planned, planned / real)
                times.append([f"{name}: {what}", real, planned, planned / real])
                report.line(f"planned seconds to {what}", name, factor, TIME_FACTOR, at_most=True, unit="× off")
    heads = [
        f"{what}, {source}" for what in ("first", "other", "all", "export", "joined") for source in ("real", "plan")
    ]
    report.table("Checkpoints, MiB", ["", *heads, "off"], sizes)
    report.table("Checkpoints, seconds", ["", "real", "plan", "plan ÷ real"], times)


# ------------------------------------------------------------------------------------------------ communication


def sent(options: Options, report: Report) -> None:
    """Bytes that a step gives to torch.distributed."""
    rows: list[list[Cell]] = []
    for name, case in list(collectives.CASES.items())[: 1 if options.quick else None]:
        for ranks in (2, 4):
            measure.say(f"communication: {name}, {ranks} ranks")
            found, plan = on_ranks(ranks, collectives.found, case)[0], case.planned()
            for field in dataclasses.fields(Traffic):
                real, planned = found[field.name], getattr(plan, field.name)
                if real or planned:
                    rows.append([f"{name}, {ranks} ranks", field.name, real / 1024, planned / 1024, planned / real])
    report.table("Bytes of a step in collectives, KiB", ["", "kind", "real", "plan", "plan ÷ real"], rows)
    off = max(abs(float(row[4] or 0) - 1) for row in rows)
    report.line("planned bytes of collectives", "all cases", off, BYTES_OFF, at_most=True, unit=" of it off")


# ------------------------------------------------------------------------------------------------ processes


def on_ranks(n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(ranks, *arguments)` returns on each of n ranks, processes of their own; as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (n, folder, function, arguments), nprocs=n)  # type: ignore[attr-defined, no-untyped-call]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]


def _rank(rank: int, n: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_SIZE=str(n))
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    answer = function(join(), *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    leave()


if __name__ == "__main__":
    measure.main("costs", __doc__, {"sent": sent, "checkpoints": checkpoints})
