"""What a training run of the transformer holds on a CPU: peaks of fresh processes, and what autograd keeps.

python -m benchmarks.training_memory CASE RANK STORE    # one rank of a case, which prints the bytes of its peak

Large pieces of memory go back to the system as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that a peak is that
of what is in use and not of what the allocator keeps.
"""

import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import ROOT, PeakMemory, say
from dalle.loss import training_loss
from dalle.model import DALLE, DALLEConfig
from dalle.stream import start_id
from training.config import OptimizerConfig, OptimizerKind, Precision, TrainConfig
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.objective import Objective
from training.plan.memory_model import Memory, Run, peak
from training.plan.state import Mode, Sizes, shapes_only
from training.ranks.ranks import Ranks, join, leave
from training.schedules import WarmupCosine
from training.stages.transformer import transformer_loss

STEPS = 2
"""The optimizer's state appears at the end of the first one."""
MMAP_THRESHOLD = 1 << 18
"""Bytes from which memory is taken from the system piece by piece."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to measure."""

    config: DALLEConfig
    """The transformer."""
    zero_stage: int = 0
    precision: Precision = "fp32"
    ranks: int = 1
    """Processes."""
    micro_batch: int
    """Samples per rank and forward pass."""
    accumulation: int = 1
    """Micro-batches per step."""
    checkpointing: bool = False
    """Whether layers are recomputed."""
    optimizer: OptimizerKind = "adamw"
    """Of the layers' matrices."""

    def run(self) -> Run:
        """Return what the model of memory is asked."""
        return Run(
            config=self.config,
            sizes=self._sizes(),
            mode=Mode(zero_stage=self.zero_stage, precision=self.precision),
            gpus=self.ranks,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            checkpointing=self.checkpointing,
            device="cpu",
            optimizer=self.optimizer,
        )

    def _sizes(self) -> Sizes:
        with shapes_only():
            return Sizes.of(DALLE(self.config))

    def predicted(self) -> tuple[str, Memory]:
        """Return the moment of the predicted peak, and what is held then."""
        return peak(self.run())

    def train_config(self) -> TrainConfig:
        """Return the run's configuration; its weights are averaged in every step."""
        return TrainConfig(
            steps=STEPS,
            global_batch=self.ranks * self.micro_batch * self.accumulation,
            micro_batch=self.micro_batch,
            optimizer=OptimizerConfig(kind=self.optimizer),
            learning_rate=WarmupCosine(peak=1e-4, warmup=1, steps=100),
            ema_every=1,
            precision=self.precision,
            zero_stage=self.zero_stage,
        )


def _shape(**changes: int) -> DALLEConfig:
    base = DALLEConfig(
        n_layers=12, d_model=256, n_heads=4, text_len=64, grid=16, text_vocab=2048, image_vocab=512, conv_kernel=7
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # all of them are numbers


CASES: dict[str, Case] = {
    "deep, fp32, ZeRO 0": Case(config=_shape(n_layers=20, d_model=192, n_heads=3), micro_batch=4),
    "wide, fp32, ZeRO 0, 2 accumulated": Case(
        config=_shape(n_layers=4, d_model=512, n_heads=8), micro_batch=3, accumulation=2
    ),
    "checkpointing, fp32, ZeRO 0": Case(config=_shape(grid=24), micro_batch=4, checkpointing=True),
    "autocast, ZeRO 0": Case(config=_shape(), micro_batch=4, precision="autocast"),
    "fp32, ZeRO 1": Case(config=_shape(), micro_batch=4, zero_stage=1),
    "bf16, ZeRO 1": Case(config=_shape(), micro_batch=4, precision="bf16", zero_stage=1),
    "fp32, ZeRO 1, 2 ranks": Case(config=_shape(), micro_batch=2, zero_stage=1, ranks=2),
    "bf16, ZeRO 2, 2 ranks": Case(config=_shape(), micro_batch=2, precision="bf16", zero_stage=2, ranks=2),
    "fp32, ZeRO 3, 2 ranks": Case(config=_shape(), micro_batch=2, zero_stage=3, ranks=2),
    "Muon, fp32, ZeRO 0": Case(config=_shape(), micro_batch=1, optimizer="muon"),
    "Muon, fp32, ZeRO 1": Case(config=_shape(), micro_batch=4, zero_stage=1, optimizer="muon"),
    "Muon, bf16, ZeRO 1": Case(config=_shape(), micro_batch=4, precision="bf16", zero_stage=1, optimizer="muon"),
    "Muon, fp32, ZeRO 2, 2 ranks": Case(config=_shape(), micro_batch=2, zero_stage=2, ranks=2, optimizer="muon"),
    "Muon, fp32, ZeRO 3, 2 ranks": Case(config=_shape(), micro_batch=2, zero_stage=3, ranks=2, optimizer="muon"),
}


# ------------------------------------------------------------------------------------------------ processes


def measured(name: str) -> int:
    """Return the bytes of the peak of a case's first rank, from processes of its own.

    Raises:
        RuntimeError: a rank failed.
    """
    ranks = CASES[name].ranks
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
        "MALLOC_TRIM_THRESHOLD_": str(MMAP_THRESHOLD),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    say(f"peak memory: {name}")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training_memory", name, str(rank), f"{folder}/store"],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [process.communicate() for process in started]
        finally:
            for process in started:
                process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name} failed:\n{errors[-2000:]}")
    return int(said[0][0].split()[-1])


def main(name: str, rank: str, store: str) -> None:
    """Train one rank of a case, and print the peak above what it held with everything imported."""
    case = CASES[name]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=case.ranks)
    ranks = join()
    # three layers, one of each kind, of the same shapes: what the matrix library keeps for a shape is not the model's
    _train(dataclasses.replace(case, config=dataclasses.replace(case.config, n_layers=3)), ranks)
    gc.collect()
    peak_memory = PeakMemory()
    _train(case, ranks)
    print(peak_memory.bytes())
    leave()


def _train(case: Case, ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = DALLE(case.config)
    model.activation_checkpointing = case.checkpointing
    engine = Engine(Objective(model, partial(transformer_loss, model)), resolve(case.train_config(), ranks.size), ranks)
    engine.train()
    for step in range(STEPS):
        engine.step(_micro_batches(case), 1e-4, step)


def _micro_batches(case: Case) -> list[dict[str, Tensor]]:
    batches = [batch(case.config, case.micro_batch) for _ in range(case.accumulation)]
    n_cut = torch.zeros(case.micro_batch)
    return [{"text": text, "image_tokens": image_tokens, "n_cut": n_cut} for text, image_tokens in batches]


def batch(config: DALLEConfig, n: int) -> tuple[Tensor, Tensor]:
    """Return random captions, none of which has pads, and image tokens."""
    text = torch.randint(config.text_vocab, (n, config.text_len))
    text[:, 0] = start_id(config.text_vocab)
    return text, torch.randint(config.image_vocab, (n, config.grid**2))


# ------------------------------------------------------------------------------------------------ autograd


def kept_by_autograd(config: DALLEConfig, precision: Precision, micro_batch: int, *, checkpointing: bool) -> int:
    """Return the bytes of all memory that a forward pass has saved for the backward pass, parameters left out.

    With checkpointing the layers' own are not seen.
    """
    model = DALLE(config)
    if precision == "bf16":
        model = model.bfloat16()
    model.activation_checkpointing = checkpointing
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    text, image_tokens = batch(config, micro_batch)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"),
    ):
        loss = training_loss(model, text, image_tokens).total
    assert loss.requires_grad, "the graph, and what it keeps, is alive while it is counted"
    return sum(kept.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
