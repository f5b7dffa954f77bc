"""How the cores of a machine without a GPU are shared among the stages of a recipe: a pure function, `machine_plan`.

The tensors of the recipes for CPUs are small, so that a second thread hardly helps one process; a second rank takes
nearly half of the time of a step. CLIP needs neither tokenizer nor dVAE, and may be trained beside them; the
transformer needs both.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from dalle.model import DALLE
from dvae import DVAE
from rerank import CLIP
from training.config import TrainConfig
from training.flops import clip_flops, dvae_flops, training_flops
from training.memory_model import shapes_only
from training.recipes import Recipe
from training.watchdog import ATTEMPT

StageName = Literal["tokenizer", "dvae", "clip", "encode", "transformer"]
GIB = 1 << 30
TOKENIZER_S = 8.0
START_S = 8.0
"""Seconds from the start of a process to its first step."""
FLOPS = {"dvae": 31e9, "clip": 62e9, "transformer": 38e9}
"""Operations per second of one core in the part of a step that ranks share."""
STEP_S = {"dvae": 0.08, "clip": 0.35, "transformer": 0.08}
"""Seconds of a step that every rank spends, however few its samples are.

Both are fitted to steps of the demonstration's recipe on two busy cores of an AMD EPYC without bfloat16, in float32,
one thread a rank (2026-11-26). With 1 and 2 ranks: the warm-up of the dVAE 0.28 and 0.18 s, CLIP with 64 pictures 1.24
and 1.07 s, with 32 pictures 0.64 and 0.52 s, the transformer 0.75 and 0.38 s. CLIP gains least from a second rank.
`python -m benchmarks.whole_machine` measures them.
"""
PROCESS_GIB = 1.0
"""Of a rank and the process that reads for it, beside the state of its model."""
BYTES_PER_PARAMETER = 20
"""Weight, gradient, two moments and average, in float32."""
USABLE = 0.5
"""Of the memory that is available; activations are not counted."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of the work takes, in seconds of one core."""

    fixed_s: float
    """Spent by every rank."""
    shared_s: float
    """Shared among the ranks."""

    def seconds(self, ranks: int) -> float:
        """Return how long it takes."""
        return self.fixed_s + self.shared_s / ranks


@dataclass(frozen=True, kw_only=True)
class Share:
    """A stage's part of the machine."""

    stage: StageName
    """The stage."""
    ranks: int = 1
    """Processes that train it together."""
    threads: int = 1
    """Of each of them."""

    def __str__(self) -> str:
        return f"{self.stage} by {self.ranks} process{'es' if self.ranks > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class MachinePlan:
    """Which stages are trained at the same time, and by how many processes."""

    phases: tuple[tuple[Share, ...], ...] = ()
    """One after the other; the stages of a phase run side by side. None: everything in this process, one at a time."""
    seconds: dict[str, float] = field(default_factory=dict)
    """About how long each part takes on its share; "dvae-warmup" is a part of "dvae", and so of "clip"."""
    reason: str = ""
    """Why it is one at a time, for the user; empty where nothing need be said."""


def costs(recipe: Recipe) -> dict[str, Cost]:
    """Return what every part of a recipe takes."""
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
    """Return the fastest way to train a recipe's stages, by `costs`, that the memory allows.

    First tokenizer, dVAE and CLIP, side by side or one after the other, then the transformer on all cores, which needs
    them. The ranks of a stage divide its batch evenly and have a core each; CLIP's batch is not accumulated.

    Args:
        n_cores: that may be used.
        memory_gib: that is available.
        recipe: of all stages.
        encodes: whether the pictures are encoded once, before the transformer.
    """
    if n_cores < 2:
        return MachinePlan(seconds=seconds_alone(recipe), reason="one stage at a time: there is one core")
    cost, need = costs(recipe), _rank_gib(recipe)
    usable = USABLE * memory_gib

    def seconds(stage: str, ranks: int) -> float:
        return sum(cost[part].seconds(ranks) for part in (stage, f"{stage}-warmup") if part in cost)

    options: list[tuple[float, int, tuple[tuple[Share, ...], ...]]] = []
    tokenizer = Share(stage="tokenizer")
    for dvae, clip in product(_ranks(recipe, "dvae", n_cores), _ranks(recipe, "clip", n_cores)):
        times = seconds("dvae", dvae), seconds("clip", clip)
        threads = n_cores // (dvae + clip)
        if threads and dvae * need["dvae"] + clip * need["clip"] + PROCESS_GIB <= usable:
            shares = (_share("dvae", dvae, threads), _share("clip", clip, threads), tokenizer)
            options.append((max(times), dvae + clip, (shares,)))
        if max(dvae * need["dvae"] + PROCESS_GIB, clip * need["clip"]) <= usable:
            first = (_share("dvae", dvae, n_cores // dvae), tokenizer)
            options.append((sum(times), max(dvae, clip), (first, (_share("clip", clip, n_cores // clip),))))
    fitting = [n for n in _ranks(recipe, "transformer", n_cores) if n * need["transformer"] <= usable]
    if not options or not fitting:
        least = max(need["dvae"] + PROCESS_GIB, need["transformer"])
        reason = (
            f"one stage at a time: {memory_gib:.1f} GiB of memory are available, and several processes need "
            f"{least / USABLE:.1f} GiB"
        )
        return MachinePlan(seconds=seconds_alone(recipe), reason=reason)
    *_, phases = min(options, key=lambda option: option[:2])
    if encodes:
        phases += ((_share("encode", n_cores, 1),),)
    last = min(fitting, key=lambda ranks: seconds("transformer", ranks))
    phases += ((_share("transformer", last, n_cores // last),),)
    ranks = {share.stage: share.ranks for shares in phases for share in shares}
    parts = {part: cost[part].seconds(ranks[part.removesuffix("-warmup")]) for part in cost}  # type: ignore[index]
    return MachinePlan(phases=phases, seconds=parts)


def plan_here(recipe: Recipe, *, encodes: bool = False, one_at_a_time: bool = False) -> MachinePlan:
    """Return the plan of this machine.

    One stage at a time under a launcher or a supervisor, and on GPUs, which every stage has for itself.
    """
    is_launched = "WORLD_SIZE" in os.environ or ATTEMPT in os.environ
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if one_at_a_time or is_launched or on_gpu:
        return MachinePlan(seconds=seconds_alone(recipe))
    return machine_plan(usable_cores(), available_gib(), recipe, encodes=encodes)


def usable_cores() -> int:
    """Return how many cores this process may use: OMP_NUM_THREADS, a CPU affinity or a container may say fewer."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        limits.append(int(os.environ["OMP_NUM_THREADS"]))
    quota = _words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdecimal():
        limits.append(round(int(quota[0]) / int(quota[1])))
    return max(1, min(limits))


def available_gib() -> float:
    """Return the memory that is available, of the machine or the container; without end where neither says."""
    limits = [float("inf")]
    for line in _words(Path("/proc/meminfo"), "\n"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    most, taken = (_words(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if most and taken and most[0].isdecimal():
        counts = _words(Path("/sys/fs/cgroup/memory.stat"))
        cached = int(counts[counts.index("inactive_file") + 1]) if "inactive_file" in counts else 0
        limits.append(int(most[0]) - int(taken[0]) + cached)  # what files left in memory gives way
    return min(limits) / GIB


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().split(separator)
    except OSError:
        return []


def seconds_alone(recipe: Recipe) -> dict[str, float]:
    """Return about how long each part takes in one process."""
    return {part: cost.seconds(1) for part, cost in costs(recipe).items()}


def _share(stage: StageName, ranks: int, threads: int) -> Share:
    return Share(stage=stage, ranks=ranks, threads=threads)


def _ranks(recipe: Recipe, stage: Literal["dvae", "clip", "transformer"], n_cores: int) -> Iterator[int]:
    """Yield the powers of two, up to the number of cores, among which a stage's batch can be divided."""
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
    """Return the GiB that a rank of every stage takes."""
    with shapes_only():
        dvae = sum(weight.numel() for weight in DVAE(recipe.dvae.model).parameters())
        clip = sum(weight.numel() for weight in CLIP(recipe.clip.model).parameters())
        transformer = sum(weight.numel() for weight in DALLE(recipe.transformer.model).parameters())
    sizes = {"dvae": dvae, "clip": clip, "transformer": transformer}
    return {stage: PROCESS_GIB + BYTES_PER_PARAMETER * n / GIB for stage, n in sizes.items()}
