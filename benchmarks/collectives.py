"""What one rank gives to torch.distributed in a training step, and what the plan says of it."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_memory import batch
from dalle.model import DALLE, DALLEConfig
from training.config import OptimizerConfig, OptimizerKind, Precision, TrainConfig
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.objective import Objective
from training.plan.costs.communication import Counts, Step, Traffic, traffic
from training.plan.state import PERSISTENT, Mode, shapes_only
from training.ranks.ranks import Ranks
from training.schedules import WarmupCosine
from training.stages.transformer import transformer_loss

CONFIG = DALLEConfig(
    n_layers=4, d_model=64, n_heads=4, text_len=16, grid=4, text_vocab=300, image_vocab=64, conv_kernel=3
)
_KINDS = {
    "allreduce_": "all_reduced",
    "_reduce_scatter_base_": "scattered",
    "reduce_scatter_": "scattered",
    "_allgather_base_": "gathered",
    "allgather_": "gathered",
    "reduce_": "by_one",
    "broadcast_": "by_one",
}
"""Fields of `Traffic`, by torch's operation."""
_CONTROL = 64
"""Bytes below which a collective is of norms or flags, which the plan leaves out."""
_NEVER = 1_000_000
"""Steps that no case has."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to train."""

    zero_stage: int
    precision: Precision = "fp32"
    accumulation: int = 1
    checkpointing: bool = False
    optimizer: OptimizerKind = "adamw"
    powersgd_rank: int = 0
    averages: bool = False
    """Whether the weights are averaged in the step that is looked at."""
    live: int = 1_000_000_000
    """Parameters that stage 3 has gathered at a time, at most."""
    persistent: int = PERSISTENT
    """Parameters of a tensor below which stage 3 does not share it."""

    def planned(self) -> Traffic:
        """Return what the plan says that a step sends."""
        with shapes_only():
            counts = Counts.of(DALLE(CONFIG), self.powersgd_rank, persistent=self.persistent)
        return traffic(
            Step(
                counts=counts,
                mode=Mode(zero_stage=self.zero_stage, precision=self.precision),
                accumulation=self.accumulation,
                ema_every=1 if self.averages else _NEVER,
                optimizer=self.optimizer,
                powersgd=self.powersgd_rank > 0,
                device="cpu",
                live=self.live,
            )
        )


_LIVE, _PERSISTENT = 200_000, 1_000
"""Elements at stage 3: about a layer is kept, and matrices are shared."""

CASES: dict[str, Case] = {
    "stage 0": Case(zero_stage=0, accumulation=2, averages=True),
    "stage 0, autocast": Case(zero_stage=0, precision="autocast"),
    "stage 0, muon": Case(zero_stage=0, optimizer="muon"),
    "stage 1": Case(zero_stage=1, accumulation=2, averages=True),
    "stage 1, bf16": Case(zero_stage=1, precision="bf16", averages=True),
    "stage 1, muon": Case(zero_stage=1, optimizer="muon"),
    "stage 2": Case(zero_stage=2, accumulation=2),
    "stage 2, bf16": Case(zero_stage=2, precision="bf16", averages=True),
    "stage 2, autocast": Case(zero_stage=2, precision="autocast"),
    "stage 3, all kept": Case(zero_stage=3, accumulation=2, averages=True, persistent=1_000),
    "stage 3, nothing shared": Case(zero_stage=3),
    "stage 3": Case(zero_stage=3, accumulation=2, live=_LIVE, persistent=_PERSISTENT),
    "stage 3, bf16, checkpointing": Case(
        zero_stage=3, precision="bf16", checkpointing=True, live=_LIVE, persistent=_PERSISTENT
    ),
    "stage 3, autocast": Case(zero_stage=3, precision="autocast", live=_LIVE, persistent=_PERSISTENT),
    "PowerSGD": Case(zero_stage=0, powersgd_rank=4, accumulation=2),
    "PowerSGD, stage 1": Case(zero_stage=1, powersgd_rank=4),
}


class _Collectives(TorchDispatchMode):
    """Sums the bytes of all collectives while it is entered, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            size = max((_bytes(argument) for argument in args), default=0)
            if size >= _CONTROL:
                self.sums[_KINDS[func.overloadpacket.__name__]] += size
        return func(*args, **(kwargs or {}))


def _bytes(argument: object) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def found(ranks: Ranks, case: Case) -> dict[str, float]:
    """Train three steps with the real engine, and return the last one's traffic, by the names of its fields.

    Stage 3 knows its order of work from the second step on. Collective.
    """
    config = TrainConfig(
        steps=3,
        global_batch=ranks.size * case.accumulation,
        micro_batch=1,
        optimizer=OptimizerConfig(kind=case.optimizer),
        learning_rate=WarmupCosine(peak=1e-4, warmup=1, steps=100),
        ema_every=1 if case.averages else _NEVER,
        precision=case.precision,
        zero_stage=case.zero_stage,
        powersgd_rank=case.powersgd_rank,
    )
    resolved = resolve(config, ranks.size)
    zero = {
        "stage3_max_reuse_distance": case.live,
        "stage3_max_live_parameters": case.live,
        "stage3_prefetch_bucket_size": case.live // 20,
        "stage3_param_persistence_threshold": case.persistent,
    }
    deepspeed = {**resolved.deepspeed, "zero_optimization": {**resolved.deepspeed["zero_optimization"], **zero}}
    torch.manual_seed(0)
    model = DALLE(CONFIG)
    model.activation_checkpointing = case.checkpointing
    objective = Objective(model, partial(transformer_loss, model))
    engine = Engine(objective, dataclasses.replace(resolved, deepspeed=deepspeed), ranks)
    engine.train()
    for step in range(config.steps):
        micro_batches = [micro_batch(CONFIG) for _ in range(case.accumulation)]
        with _Collectives() as collectives:
            engine.step(micro_batches, 1e-4, step)
    return {field.name: float(collectives.sums[field.name]) for field in dataclasses.fields(Traffic)}


def micro_batch(config: DALLEConfig) -> dict[str, Tensor]:
    """Return a micro-batch of one random sample."""
    text, image_tokens = batch(config, 1)
    return {"text": text, "image_tokens": image_tokens, "n_cut": torch.zeros(1)}
