"""Shares the cores of a machine without a GPU among the stages of a recipe: a pure function, `machine_plan`.

CLIP needs neither tokenizer nor dVAE, and may be trained beside them; the transformer needs both. The cores of a stage
are shared among ranks, which divide its batch, or among the threads of a rank: whatever takes less time.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from dalle.family.transformers import new_transformer
from dalle.output.text import GIB
from dvae import DVAE
from rerank import CLIP
from training.config import TrainConfig
from training.plan.flops import clip_flops, dvae_flops, training_flops
from training.plan.state import shapes_only
from training.ranks.environment import ATTEMPT
from training.recipes import Recipe

TrainedStage = Literal["dvae", "clip", "transformer"]
StageName = Literal["tokenizer", "dvae", "clip", "encode", "transformer"]
TOKENIZER_S = 8.0
START_S = 8.0
"""Seconds from the start of a process to its first step."""
FLOPS = {"dvae": 31e9, "clip": 62e9, "transformer": 41e9}
"""Operations per second of one thread in the part of a step that ranks share."""
STEP_S = {"dvae": 0.08, "clip": 0.35, "transformer": 0.25}
"""Seconds of a step that every rank of one thread spends, whatever its number of samples.

Both are fitted to steps of the demonstration's recipe on two cores of an AMD EPYC without bfloat16, in float32
(2026-11-26). With 1 and 2 ranks: the warm-up of the dVAE 0.28 and 0.18 s, CLIP with 64 pictures 1.24 and 1.07 s, with
32 pictures 0.64 and 0.52 s, the transformer 0.87 and 0.56 s. `python -m benchmarks.whole_machine` measures them.
"""
SERIAL = 0.15
"""Share of a rank's work that more threads do not speed up: the transformer with two threads takes 0.50 s."""
PROCESS_GIB = 1.0
"""GiB of a rank and the process that reads for it, without the state of its model."""
BYTES_PER_PARAMETER = 20
"""Float32 weight, gradient, two moments and average."""
USABLE = 0.5
"""Fraction of the available memory to use; the rest is for activations, which are not counted."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time of a part of the work, in seconds of one core."""

    fixed_s: float
    """Spent by every rank."""
    shared_s: float
    """Shared among the ranks."""

    def seconds(self, ranks: int, threads: int = 1) -> float:
        """Return the seconds that it takes on some ranks with some threads each."""
        return (self.fixed_s + self.shared_s / ranks) * (SERIAL + (1 - SERIAL) / threads)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A stage's part of the machine."""

    stage: StageName
    """The stage."""
    ranks: int = 1
    """Processes that train it together."""
    threads: int = 1
    """Threads of each process."""

    def __str__(self) -> str:
        threads = f" of {self.threads} threads" if self.threads > 1 else ""
        return f"{self.stage} by {self.ranks} process{'es' if self.ranks > 1 else ''}{threads}"


@dataclass(frozen=True, kw_only=True)
class MachinePlan:
    """The stages to train at the same time, and the processes of each."""

    phases: tuple[tuple[Share, ...], ...] = ()
    """One after the other; the stages of a phase run side by side. Empty: everything in this process, one at a time."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Estimated seconds of each part on its share; "dvae-warmup" is a part of "dvae", and so of "clip"."""
    reason: str = ""
    """Reason for one stage at a time, for the user; may be empty."""


def costs(recipe: Recipe) -> dict[str, Cost]:
    """Return the cost of every part of a recipe."""
    runs = {"dvae": recipe.dvae.train, "clip": recipe.clip.train, "transformer": recipe.transformer.train}
    for stage, warmup in (("dvae", recipe.dvae.warmup), ("clip", recipe.clip.warmup)):
        if warmup is not None:
            runs[f"{stage}-warmup"] = warmup
    encoding = dvae_flops(recipe.dvae.model) // 2
    flops = {
        "dvae": 3 * dvae_flops(recipe.dvae.model),
        "clip": 3 * clip_flops(recipe.clip.model, recipe.clip.captions_per_picture),
        "transformer": training_flops(recipe.transformer.model) + encoding,
    }
    found = {"tokenizer": Cost(fixed_s=TOKENIZER_S, shared_s=0.0)}
    for part, run in runs.items():
        stage = part.removesuffix("-warmup")
        found[part] = Cost(
            fixed_s=run.steps * STEP_S[stage] + (0.0 if f"{part}-warmup" in runs else START_S),
            shared_s=run.steps * run.global_batch * flops[stage] / FLOPS[stage],
        )
    return found


def machine_plan(n_cores: int, memory_gib: float, recipe: Recipe, *, encodes: bool = False) -> MachinePlan:
    """Return the fastest plan, by `costs`, that the memory allows.

    Tokenizer, dVAE and CLIP come first, side by side or one after the other; then the transformer on all cores. The
    ranks of a stage divide its batch evenly; CLIP's batch is not accumulated.

    Args:
        n_cores: cores to use.
        memory_gib: available memory, GiB.
        recipe: the recipe.
        encodes: whether the pictures are encoded once, before the transformer.
    """
    if n_cores < 2:
        return MachinePlan(seconds=seconds_alone(recipe), reason="one stage at a time: there is one core")
    cost, need, usable = costs(recipe), _rank_gib(recipe), USABLE * memory_gib
    tokenizer = Share(stage="tokenizer")

    def seconds(share: Share) -> float:
        parts = (share.stage, f"{share.stage}-warmup")
        return sum(cost[part].seconds(share.ranks, share.threads) for part in parts if part in cost)

    def shares(stage: TrainedStage, cores: int) -> list[Share]:
        """Return the ways of a stage to use some cores."""
        return [Share(stage=stage, ranks=n, threads=cores // n) for n in _ranks(recipe, stage, cores)]

    def fits(*beside: Share) -> bool:
        return sum(share.ranks * need[share.stage] for share in beside) <= usable

    # each with its seconds and its processes: the fewer, the better
    options: list[tuple[float, int, tuple[tuple[Share, ...], ...]]] = []
    for cores in range(1, n_cores):
        for dvae, clip in product(shares("dvae", cores), shares("clip", n_cores - cores)):
            if fits(dvae, clip, tokenizer):
                options.append((max(seconds(dvae), seconds(clip)), dvae.ranks + clip.ranks, ((dvae, clip, tokenizer),)))
    for dvae, clip in product(shares("dvae", n_cores), shares("clip", n_cores)):
        if fits(dvae, tokenizer) and fits(clip):
            in_turn = (dvae, tokenizer), (clip,)
            options.append((seconds(dvae) + seconds(clip), max(dvae.ranks, clip.ranks), in_turn))
    last = [share for share in shares("transformer", n_cores) if fits(share)]
    if not options or not last:
        least = max(need["dvae"] + need["tokenizer"], need["transformer"])
        reason = (
            f"one stage at a time: {memory_gib:.1f} GiB of memory are available, and several processes need "
            f"{least / USABLE:.1f} GiB"
        )
        return MachinePlan(seconds=seconds_alone(recipe), reason=reason)
    *_, phases = min(options, key=lambda option: option[:2])
    if encodes:
        phases += ((Share(stage="encode", ranks=n_cores),),)
    phases += ((min(last, key=seconds),),)
    chosen = {share.stage: share for beside in phases for share in beside}
    parts = {}
    for part, of in cost.items():
        share = chosen[part.removesuffix("-warmup")]  # type: ignore[index]
        parts[part] = of.seconds(share.ranks, share.threads)
    return MachinePlan(phases=phases, seconds=parts)


def plan_here(recipe: Recipe, *, encodes: bool = False, one_at_a_time: bool = False) -> MachinePlan:
    """Return the plan for this machine.

    It trains one stage at a time under a launcher or a supervisor, and on GPUs, where a stage uses all of them.
    """
    is_launched = "WORLD_SIZE" in os.environ or ATTEMPT in os.environ
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if one_at_a_time or is_launched or on_gpu:
        return MachinePlan(seconds=seconds_alone(recipe))
    return machine_plan(usable_cores(), available_gib(), recipe, encodes=encodes)


def usable_cores() -> int:
    """Return the number of cores to use: OMP_NUM_THREADS, a CPU affinity or a container may lower it."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        limits.append(int(os.environ["OMP_NUM_THREADS"]))
    quota = _words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdecimal():
        limits.append(round(int(quota[0]) / int(quota[1])))
    return max(1, min(limits))


def available_gib() -> float:
    """Return the available GiB of the machine or the container; infinity if neither is known."""
    limits = [float("inf")]
    for line in _words(Path("/proc/meminfo"), "\n"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    most, taken = (_words(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if most and taken and most[0].isdecimal():
        counts = _words(Path("/sys/fs/cgroup/memory.stat"))
        cached = int(counts[counts.index("inactive_file") + 1]) if "inactive_file" in counts else 0
        limits.append(int(most[0]) - int(taken[0]) + cached)  # cached files give way
    return min(limits) / GIB


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().split(separator)
    except OSError:
        return []


def seconds_alone(recipe: Recipe) -> dict[str, float]:
    """Return the estimated seconds of each part in one process."""
    return {part: cost.seconds(1) for part, cost in costs(recipe).items()}


def _ranks(recipe: Recipe, stage: TrainedStage, n_cores: int) -> Iterator[int]:
    """Yield the numbers of ranks that divide a stage's batch: powers of two, at most `n_cores`."""
    ranks, chosen = 1, getattr(recipe, stage)
    runs = [run for run in (chosen.train, getattr(chosen, "warmup", None)) if run is not None]
    while ranks <= n_cores:
        if all(_divides(run, ranks, may_accumulate=stage != "clip") for run in runs):
            yield ranks
        ranks *= 2


def _divides(run: TrainConfig, ranks: int, *, may_accumulate: bool) -> bool:
    micro = run.micro_batch or run.global_batch // ranks
    if micro == 0 or run.global_batch % (micro * ranks):
        return False
    return may_accumulate or micro * ranks == run.global_batch


def _rank_gib(recipe: Recipe) -> dict[str, float]:
    """Return the GiB of a rank of each stage."""
    with shapes_only():
        dvae = sum(weight.numel() for weight in DVAE(recipe.dvae.model).parameters())
        clip = sum(weight.numel() for weight in CLIP(recipe.clip.model).parameters())
        transformer = sum(weight.numel() for weight in new_transformer(recipe.transformer.model).parameters())
    sizes = {"tokenizer": 0, "dvae": dvae, "clip": clip, "transformer": transformer}
    return {stage: PROCESS_GIB + BYTES_PER_PARAMETER * n / GIB for stage, n in sizes.items()}
