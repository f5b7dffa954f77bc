"""Computes the peak bytes of the transformer's training on one GPU and its host, for every way to share the state.

Who holds which part of the state is in state.py. What DeepSpeed 0.19.8 adds was read in its source, in runtime/zero:
buckets of gradients and their flattened copies, a float32 copy of the weights that an optimizer owns, partitions of
gradients that are flattened once more, and the layers that stage 3 has gathered.

The peak is the largest of six points of a step, each a `Memory` of its own: not everything is held at once.

Measured against processes on a CPU by benchmarks/plan.py. Figures for CUDA are derived, not measured.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from dalle.model import DALLEConfig
from training.config import OptimizerKind
from training.engine.muon import DTYPES
from training.engine.parts.buffers import MAX_BUCKET, bucket, fetched, live
from training.plan.activations import FLOAT, Activations, Device, activations, block_bytes, widths
from training.plan.state import Mode, Sizes, StateBytes, state_bytes

SUB_GROUP = 1_000_000_000
"""Parameters that stage 3 updates at a time (`sub_group_size`, its default)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at one moment on the device of the first rank, which has the most, and in its host's memory."""

    weights: float = 0.0
    """The transformer's parameters, and the frozen dVAE's, which encodes the pictures."""
    gradients: float = 0.0
    """Gradients of all micro-batches so far."""
    optimizer: float = 0.0
    """Moments, and the float32 weights beside the model's."""
    averages: float = 0.0
    """Averaged weights for export: on the first rank only, or at stage 3 each rank's part."""
    activations: float = 0.0
    """Activations kept for the backward pass."""
    logits: float = 0.0
    """Logits that exist at a time."""
    working: float = 0.0
    """Working memory of a layer, the loss or the dVAE."""
    deepspeed: float = 0.0
    """Buckets of gradients, flattened copies, gathered weights."""
    host: float = 0.0
    """Bytes in the host's memory; not in `total`."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(float(getattr(self, field.name)) for field in fields(self) if field.name != "host")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings that determine the memory of a rank."""

    config: DALLEConfig
    """The transformer."""
    sizes: Sizes
    """Its parameters."""
    mode: Mode
    """How the state is shared."""
    gpus: int
    """Data-parallel ranks."""
    micro_batch: int
    """Samples per rank and forward pass."""
    accumulation: int
    """Micro-batches per optimizer step."""
    checkpointing: bool
    """Whether the backward pass recomputes each layer."""
    device: Device = "cuda"
    """Device of the training; a CPU is its own host."""
    optimizer: OptimizerKind = "adamw"
    """Optimizer of the layers' matrices."""
    samples: int = 8
    """Sample pictures on a sheet."""
    dvae_weights: float = 0.0
    """Bytes of the dVAE; 0 if the pictures were encoded before."""
    dvae_working: float = 0.0
    """Working bytes of the dVAE per picture."""

    @property
    def by_muon(self) -> int:
        """Parameters that Muon updates."""
        return self.sizes.matrices if self.optimizer == "muon" else 0


def peak(run: Run) -> tuple[str, Memory]:
    """Return the moment at which a rank holds the most, and its memory then."""
    return _largest(moments(run))


def peak_bytes(run: Run, global_batch: int, micro_batch: int) -> float:
    """Return the peak with another micro-batch, and as many of them as make the batch."""
    accumulation = global_batch // (run.gpus * micro_batch)
    return peak(dataclasses.replace(run, micro_batch=micro_batch, accumulation=accumulation))[1].total


def training_peak(run: Run) -> tuple[str, Memory]:
    """Return the same without the start: the peak of a step."""
    return _largest({name: memory for name, memory in moments(run).items() if name != "start"})


def _largest(found: Mapping[str, Memory]) -> tuple[str, Memory]:
    name = max(found, key=lambda key: found[key].total)
    return name, found[name]


def host_peak(run: Run) -> float:
    """Return the peak bytes of a rank in its host's memory."""
    return max(memory.host for memory in moments(run).values())


def moments(run: Run) -> dict[str, Memory]:
    """Return a rank's memory at each moment that can be the peak.

    "start": DeepSpeed takes over the model. "encoding": the dVAE encodes a micro-batch. "loss": the end of the forward
    pass. "backward": the pass through the last layer, or the first. "reduction": gradients are summed over the
    ranks. "update": the optimizer's step, and the averaging of weights.
    """
    acts = activations(
        run.config, run.mode.precision, run.micro_batch, checkpointing=run.checkpointing, device=run.device
    )
    moving = {
        "encoding": [_encoding(run)],
        "loss": [_loss(run, acts)],
        "backward": [_backward_begins(run, acts), _backward_ends(run, acts)],
        "reduction": [_reduction(run, acts)],
        "update": [_update(run)],
    }
    fixed = _fixed(run)
    found = {"start": _on_one_machine(run, _start(run))}
    for name, parts in moving.items():
        whole = [_on_one_machine(run, _sum([fixed, part])) for part in parts]
        found[name] = max(whole, key=lambda memory: memory.total)
    return found


def at_rest(run: Run, extra: Memory) -> Memory:
    """Return a rank's memory between two steps, with something more: without what stage 3 gathers in a step."""
    fixed = dataclasses.replace(_fixed(run), deepspeed=_bucket(run) if run.mode.zero_stage == 3 else 0.0)
    return _on_one_machine(run, _sum([fixed, Memory(gradients=_between_steps(run)), extra]))


def _between_steps(run: Run) -> float:
    """Return the bytes of gradients that stay after a step."""
    return _carried(run) if run.mode.zero_stage == 3 or run.mode.has_whole_gradients else 0.0


def _sum(parts: Iterable[Memory]) -> Memory:
    parts = list(parts)
    return Memory(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(Memory)})


def _on_one_machine(run: Run, memory: Memory) -> Memory:
    """Return `memory`; on a CPU, the host's bytes count as the optimizer's."""
    if run.device != "cpu":
        return memory
    values = {field.name: getattr(memory, field.name) for field in fields(Memory)}
    return Memory(**values | {"optimizer": memory.optimizer + memory.host, "host": 0.0})


# ------------------------------------------------------------------------------------------ always there


def _fixed(run: Run) -> Memory:
    """Return the memory held at every moment of a step: weights, optimizer, averages."""
    n, mode, stage = run.sizes.total, run.mode, run.mode.zero_stage
    state = state_bytes(n, mode.precision, stage, run.gpus, by_muon=run.by_muon)
    weights = state.weights
    host = 0.0
    if stage == 3:
        weights += run.sizes.persistent * widths(mode.precision).weight
    if mode.offload == "parameters":
        weights, host = weights - state.weights, state.weights
    averages = FLOAT * n / (run.gpus if stage == 3 else 1)
    if mode.offload != "none":
        host += _offloaded(run, state)
    averages_on_host = stage == 3 or mode.is_half
    if averages_on_host:
        host += averages
    return Memory(
        weights=weights + run.dvae_weights,
        optimizer=0.0 if mode.offload != "none" else state.optimizer,
        averages=0.0 if averages_on_host else averages,
        deepspeed=gathered(run) + (_bucket(run) if stage == 3 else 0.0),
        host=host,
    )


def _offloaded(run: Run, state: StateBytes) -> float:
    """Return the host's bytes of an offloaded optimizer: moments, float32 weights and gradients, and buffers."""
    n, width = run.sizes.total / run.gpus, widths(run.mode.precision).weight
    moments_and_copies = n * (8 + FLOAT + FLOAT) - FLOAT * run.by_muon / run.gpus
    if run.mode.zero_stage == 3:
        return moments_and_copies + state.gradients
    accumulated = n * FLOAT if run.accumulation > 1 and not run.mode.is_half else 0.0
    return moments_and_copies + n * width + run.sizes.largest * width + accumulated


def gathered(run: Run) -> float:
    """Return the bytes of the layers that stage 3 keeps gathered."""
    if run.mode.zero_stage < 3:
        return 0.0
    return float(live(run.sizes.total, run.sizes.largest) * widths(run.mode.precision).weight)


def fetched_ahead(run: Run) -> float:
    """Return the bytes of the buffer that stage 3 gathers weights into, before they are copied out."""
    if run.mode.zero_stage < 3:
        return 0.0
    n = max(fetched(run.sizes.total, run.sizes.largest), run.sizes.largest)
    return float(n * widths(run.mode.precision).weight)


def _bucket(run: Run) -> float:
    """Return the bytes of the buffer of gradients."""
    if run.mode.zero_stage == 0 or run.mode.has_whole_gradients:
        return 0.0
    n = bucket(run.mode.zero_stage, run.sizes.total, run.sizes.largest)
    return float(n * widths(run.mode.precision).weight)


def _carried(run: Run) -> float:
    """Return the bytes of gradients of earlier micro-batches."""
    if run.mode.has_whole_gradients:
        return _whole_gradients(run)
    if run.mode.zero_stage == 3:
        return _own_gradients(run)
    if run.accumulation == 1:
        return 0.0
    return _whole_gradients(run) if run.mode.zero_stage < 2 else _own_gradients(run)


def _whole_gradients(run: Run) -> float:
    """Return the bytes of the gradients of all weights, before they are shared."""
    width = widths(run.mode.precision).weight
    return float(run.sizes.total * (width + FLOAT if run.mode.has_whole_gradients else width))


def _own_gradients(run: Run) -> float:
    """Return the bytes of the gradients of a rank's own part of the weights."""
    if run.mode.offload != "none" and (run.mode.zero_stage == 3 or not run.mode.is_half):
        return 0.0  # in the host's memory
    return run.sizes.total * run.mode.accumulated / run.gpus


# ------------------------------------------------------------------------------------------ moments


def _start(run: Run) -> Memory:
    """Return the memory at the start: every rank builds the model in float32, and stages 1 and 2 flatten it.

    At stage 3 it builds its part, tensor by tensor, and copies it.
    """
    n, width, stage = run.sizes.total, widths(run.mode.precision).weight, run.mode.zero_stage
    if stage == 3:
        return _start_in_parts(run)
    whole = float(FLOAT * n)
    flat = {0: 0.0, 1: width * n + FLOAT * n / run.gpus, 2: width * n + FLOAT * n / run.gpus}
    return Memory(
        weights=max(whole, width * n + flat[stage]) + run.dvae_weights,
        host=0.0 if run.device == "cpu" else whole,
    )


def _start_in_parts(run: Run) -> Memory:
    """Return the memory at the start of stage 3: the parts as they are drawn, DeepSpeed's two copies, the averages."""
    part, width = run.sizes.total / run.gpus, widths(run.mode.precision).weight
    gathers = 3.0 * FLOAT * run.sizes.largest
    return Memory(
        weights=(0.0 if run.mode.offload == "parameters" else width * part) + run.dvae_weights,
        gradients=_own_gradients(run),
        optimizer=0.0 if run.mode.offload != "none" else FLOAT * part,
        averages=FLOAT * part if run.device == "cpu" else 0.0,
        deepspeed=gathers,
        host=0.0 if run.device == "cpu" else FLOAT * part + gathers,
    )


def _encoding(run: Run) -> Memory:
    return Memory(gradients=_carried(run), working=run.dvae_working * run.micro_batch)


def _loss(run: Run, acts: Activations) -> Memory:
    casts = acts.casts if run.checkpointing else 0.0
    return Memory(
        gradients=_carried(run),
        activations=acts.kept + casts,
        logits=acts.logits,
        working=acts.in_loss,
    )


def _backward_begins(run: Run, acts: Activations) -> Memory:
    in_bucket = _bucket(run) if run.device == "cuda" and run.mode.zero_stage in (1, 2) else 0.0
    return Memory(
        gradients=_carried(run), activations=acts.kept, working=acts.layer, deepspeed=in_bucket + fetched_ahead(run)
    )


def _backward_ends(run: Run, acts: Activations) -> Memory:
    """Return the moment of the first layer's backward pass, when the gradients of all others are there."""
    kind = run.config.kinds[0]
    layer = block_bytes(run.config, kind, run.mode.precision, run.micro_batch, run.device)
    stage = run.mode.zero_stage
    bucket = _bucket(run) if stage == 2 or (stage == 1 and run.device == "cuda") else 0.0
    return Memory(
        gradients=_whole_gradients(run) if stage < 2 else _own_gradients(run),
        activations=0.0 if run.checkpointing else layer,
        working=acts.layer,
        deepspeed=bucket + fetched_ahead(run),
    )


def _reduction(run: Run, acts: Activations) -> Memory:
    """Return the moment when a bucket of gradients is flattened, and summed.

    With more parameters than a bucket holds, stages 2 and 3 do so the first time while activations are still there.
    """
    n, stage, width = run.sizes.total, run.mode.zero_stage, widths(run.mode.precision).weight
    held = bucket(stage, n, run.sizes.largest)
    flat = float(held * width)
    if stage == 0:
        return Memory(gradients=_whole_gradients(run), deepspeed=flat)
    if run.mode.has_whole_gradients:
        return Memory(gradients=_whole_gradients(run), deepspeed=float(FLOAT * n) if n <= MAX_BUCKET else 0.0)
    own = _own_gradients(run)
    if stage == 1:
        return Memory(gradients=max(0, n - MAX_BUCKET) * width + own, deepspeed=_bucket(run) + flat)
    left = 1 - held / n
    scattered = FLOAT * held / run.gpus if stage == 3 else 0.0
    return Memory(
        gradients=own,
        activations=acts.kept * left,
        working=acts.layer if left else 0.0,
        deepspeed=(_bucket(run) if stage == 2 else 0.0) + flat + scattered,
    )


def _update(run: Run) -> Memory:
    """Return the moment of the optimizer's step: a partition of gradients is flattened, in float32.

    Muon puts one matrix together at a time, of float32 gradients and momentum, and then iterates, at 3.75 times its
    size: the matrix, two products of its size, and three of its smaller side squared (for 1:4, ¼ each). At stage 0 it
    copies the gradient first, to leave out a step that is not finite.
    """
    n, stage = run.sizes.total, run.mode.zero_stage
    gathers_on_host = _copied_for_averages(run)
    whole = DTYPES[run.device].itemsize
    bytes_each = max(whole + (2 * FLOAT if stage == 0 else FLOAT), 3.75 * whole)
    working = bytes_each * run.sizes.largest_matrix if run.optimizer == "muon" else 0.0
    if stage == 0 or run.mode.has_whole_gradients:
        return Memory(gradients=_whole_gradients(run), working=working, host=gathers_on_host)
    own = _own_gradients(run)
    flat = 0.0
    if run.mode.offload == "none":
        flat = FLOAT * (n / run.gpus if stage < 3 else min(n / run.gpus, SUB_GROUP))
    return Memory(
        gradients=own, working=working, deepspeed=max(flat, 2.0 * FLOAT * run.sizes.largest), host=gathers_on_host
    )


def _copied_for_averages(run: Run) -> float:
    """Return the host's bytes of the current weights while they are averaged; those of a CPU's own part are there."""
    if run.mode.zero_stage == 3:
        return 0.0 if run.device == "cpu" else FLOAT * run.sizes.total / run.gpus
    return float(FLOAT * run.sizes.total) if run.mode.is_half else 0.0
