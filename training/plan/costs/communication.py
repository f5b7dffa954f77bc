"""Computes what the ranks send each other in a step, and how long that takes.

What goes into collectives was read in DeepSpeed 0.19.8, and is held to what torch.distributed is given on several
processes (tests/training/test_communication.py). At stages 1 and 2 that version sums gradients by all-reduce, not by
the reduce-scatter of the ZeRO paper (Rajbhandari et al. 2020, section 7): twice the bytes.

What crosses the wires is that of rings. Over N ranks, of n bytes each sends 2n(N-1)/N in an all-reduce, n(N-1)/N in a
reduce-scatter or an all-gather, and n where one rank gets or gives all (Patarasu and Yuan 2009;
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). A ring leaves every host once, so a host sends to
others as many bytes as one GPU sends. Latency is not counted, nor are the few bytes of norms and flags.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dalle.family.transformers import Trained
from training.config import OptimizerKind
from training.engine.muon import DTYPES, block_matrices
from training.engine.powersgd import compressed_names, n_in_factors
from training.plan.activations import FLOAT, Device, widths
from training.plan.state import PERSISTENT, Mode, modes_of, preset_name

HALF = 2
"""Bytes of a bfloat16, and of the 16-bit numbers of the paper."""
_IN_HALF = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that DeepSpeed sends in 16 bits under autocast at stages 1 to 3: these classes, not those derived from
them."""


def papers_rank(width: int) -> int:
    """Return the rank of PowerSGD's factors at a width: the paper's 512, 640 and 896 at 1920, 2688 and 3968 (table 1).

    Other widths have the same share, in steps of 128, or of 8 below 1024.
    """
    step = 128 if width >= 1024 else 8
    return -(-width * 896 // (3968 * step)) * step


# ------------------------------------------------------------------------------------------ what is sent


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module with parameters of its own, which stage 3 gathers together."""

    total: int
    """Its parameters."""
    shared: int
    """Those that stage 3 shares."""
    in_half: bool
    """Whether autocast sends them in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of a transformer's parameters, by how they are sent."""

    total: int
    """All."""
    linear: int
    """Of the layers that autocast sends in 16 bits."""
    small: int
    """Of tensors too small for stage 3 to share."""
    small_linear: int
    """Of those, the ones that autocast sends in 16 bits."""
    matrices: int
    """Of the layers' matrices."""
    layers: int
    width: int
    """D."""
    parts: tuple[Part, ...]
    """In the order of the forward pass."""
    compressed: int
    """Of the matrices that PowerSGD compresses."""
    factors: int
    """Numbers that it sends in their place."""

    @classmethod
    def of(cls, model: Trained, powersgd_rank: int, *, persistent: int = PERSISTENT) -> "Counts":
        """Count a model's, which may be on the meta device.

        Args:
            model: the transformer.
            powersgd_rank: columns of PowerSGD's factors; 0 if nothing is compressed.
            persistent: parameters of a tensor below which stage 3 does not share it.
        """
        parts = tuple(_parts(model, persistent))
        linear = [part for part in parts if part.in_half]
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        compressed = compressed_names(model, powersgd_rank) if powersgd_rank else []
        return cls(
            total=sum(part.total for part in parts),
            linear=sum(part.total for part in linear),
            small=sum(part.total - part.shared for part in parts),
            small_linear=sum(part.total - part.shared for part in linear),
            matrices=sum(matrix.numel() for matrix in block_matrices(model)),
            layers=model.config.n_layers,
            width=model.config.d_model,
            parts=parts,
            compressed=sum(shapes[name].numel() for name in compressed),
            factors=sum(n_in_factors(shapes[name], powersgd_rank) for name in compressed),
        )


def _parts(model: Trained, persistent: int) -> Iterator[Part]:
    for module in model.modules():
        sizes = [parameter.numel() for parameter in module.parameters(recurse=False)]
        if sizes:
            shared = sum(size for size in sizes if size >= persistent)
            yield Part(total=sum(sizes), shared=shared, in_half=type(module) in _IN_HALF)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that every rank gives to, or gets from, the collectives of one step."""

    all_reduced: float = 0.0
    scattered: float = 0.0
    """Into reduce-scatters."""
    gathered: float = 0.0
    """Out of all-gathers."""
    by_one: float = 0.0
    """Summed on one rank, or sent by one to all."""

    def sent(self, ranks: int) -> float:
        """Return the bytes that a rank sends on, in rings of so many."""
        if ranks == 1:
            return 0.0
        return (2 * self.all_reduced + self.scattered + self.gathered) * (ranks - 1) / ranks + self.by_one


@dataclass(frozen=True, kw_only=True)
class Step:
    """What determines the traffic of a step."""

    counts: Counts
    mode: Mode
    """Stage and precision; offloading sends nothing."""
    accumulation: int
    """Micro-batches."""
    ema_every: int
    """Steps between two updates of the averaged weights."""
    live: int
    """Parameters that stage 3 has gathered at a time, at most."""
    optimizer: OptimizerKind = "adamw"
    powersgd: bool = False
    """Whether gradients are sent as factors; stages 0 and 1."""
    device: Device = "cuda"


def traffic(step: Step) -> Traffic:
    """Return a step's traffic, the updates of averaged weights evenly shared among the steps."""
    counts, mode = step.counts, step.mode
    stage, weight = mode.zero_stage, widths(mode.precision).weight
    gradients = _in_precision(counts.total, counts.linear, mode) if stage else FLOAT * counts.total
    if step.powersgd:  # one more number says whether all gradients are finite
        gradients = float(FLOAT * (counts.total - counts.compressed + counts.factors + 1))
    reduced, scattered, gathered = 0.0, 0.0, 0.0
    if stage < 2:
        reduced = gradients
    elif stage == 2:
        reduced = step.accumulation * gradients
    else:
        scattered = step.accumulation * gradients
        gathered = step.accumulation * _fetched(step) + _in_precision(counts.small, counts.small_linear, mode)
    if stage in (1, 2):
        gathered = float(weight * counts.total)
    if stage in (1, 2) and mode.is_half:  # at stage 3 each rank averages its part
        reduced += FLOAT * counts.total / step.ema_every  # of the optimizer's float32 weights
    muon = counts.matrices * DTYPES[step.device].itemsize if step.optimizer == "muon" else 0
    return Traffic(
        all_reduced=reduced, scattered=scattered, gathered=gathered, by_one=float(muon * (2 if stage else 1))
    )


def _in_precision(total: int, linear: int, mode: Mode) -> float:
    """Return the bytes of parameters as DeepSpeed sends them, `linear` of which are in 16 bits under autocast."""
    width = widths(mode.precision).weight
    return float(HALF * linear + width * (total - linear) if mode.precision == "autocast" else width * total)


def _fetched(step: Step) -> float:
    """Return the bytes that stage 3 gathers for a micro-batch: all it shares, for the forward and the backward pass.

    The backward pass begins with the last parts, and those that may stay gathered, `step.live` parameters, are not
    gathered again for it. Layers that are computed once more are gathered once for that and the backward pass.
    """
    needed, there = 0.0, 0
    for part in reversed(step.counts.parts):
        there += part.shared
        size = _in_precision(part.shared, part.shared if part.in_half else 0, step.mode)
        needed += size if there <= step.live else 2 * size
    return needed


def papers_mix(step: Step, powersgd_rank: int, per_host: int) -> tuple[Traffic, Traffic]:
    """Return the traffic of the paper's own training: of each GPU among those of its host, and with those of others.

    The GPUs of a host share the weights, which each gathers for the forward and for the backward pass; gradients are
    reduce-scattered in the host. Between hosts, each GPU averages its share of them: matrices as PowerSGD's factors,
    whose columns are shared, too, all else in float32 (Ramesh et al. 2021, 2.5 and E). Matrices and factors have 16
    bits. It is not built here.
    """
    counts, m = step.counts, per_host
    others = counts.total - counts.matrices
    passed = float(step.accumulation * (HALF * counts.matrices + FLOAT * others))
    d, r = counts.width, min(powersgd_rank, counts.width)
    # a layer has four matrices of d × d and two of d × 4d: along their longer sides, 12 d in all, the GPUs share them,
    # and hold the shorter ones, 6 d in all, whole; r / m columns of the factors are each GPU's
    factors = counts.layers * (6 * d * r / m + 12 * d * r / m**2)
    return (
        Traffic(scattered=passed, gathered=2 * passed),
        Traffic(all_reduced=HALF * factors + FLOAT * others / m),
    )


# ------------------------------------------------------------------------------------------ how long it takes


@dataclass(frozen=True, kw_only=True)
class Network:
    """GPUs, their hosts, and the speeds between them, in bytes a second and direction."""

    gpus: int
    per_host: int
    """GPUs of a host."""
    in_host: float
    """From a GPU to another of its host."""
    between_hosts: float
    """From a host to all others."""

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.gpus // self.per_host


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one GPU sends in a step, on average, and the time that all need for it."""

    in_host: float
    """Bytes to GPUs of its host."""
    between_hosts: float
    """Bytes to other hosts."""
    seconds: float


def sent_by_all(traffic: Traffic, network: Network) -> Sent:
    """Return what is sent in rings of all GPUs, which the slower of both ways holds up."""
    bytes_each = traffic.sent(network.gpus)
    leaving = 1 / network.per_host if network.hosts > 1 else 0.0
    between_s = bytes_each / network.between_hosts if network.hosts > 1 else 0.0
    in_host_s = bytes_each / network.in_host if network.per_host > 1 else 0.0
    return Sent(
        in_host=bytes_each * (1 - leaving), between_hosts=bytes_each * leaving, seconds=max(in_host_s, between_s)
    )


def sent_by_hosts(in_host: Traffic, between: Traffic, network: Network) -> Sent:
    """Return what is sent in rings within hosts, and then, by each GPU, in rings of one GPU of each host."""
    near, far = in_host.sent(network.per_host), between.sent(network.hosts)
    seconds = near / network.in_host + network.per_host * far / network.between_hosts
    return Sent(in_host=near, between_hosts=far, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What GPUs send in one way to train, and what a step then takes."""

    name: str
    """The mode's preset; PowerSGD and the paper's mix have names of their own."""
    sent: Sent
    """By one GPU in a step."""
    overlaps: bool
    """Whether GPUs send while they compute: a step then takes the longer of the two times, else their sum."""
    step_s: float
    """Seconds of a step."""
    days: float
    """For all steps."""


def communications(
    step: Step, powersgd_rank: int, network: Network, *, computing_s: float, steps: int
) -> Iterator[Communication]:
    """Yield what is sent at each stage, with PowerSGD at stage 0, and in the paper's mix.

    DeepSpeed 0.19.8 overlaps by default at stage 3 alone.

    Args:
        step: the run's; its mode says the precision.
        powersgd_rank: columns of PowerSGD's factors.
        network: GPUs and speeds.
        computing_s: seconds of a step without communication.
        steps: of the run.
    """

    def row(name: str, sent: Sent, *, overlaps: bool) -> Communication:
        step_s = max(computing_s, sent.seconds) if overlaps else computing_s + sent.seconds
        return Communication(name=name, sent=sent, overlaps=overlaps, step_s=step_s, days=steps * step_s / 86_400)

    whole, *shared = (mode for mode in modes_of(step.mode.precision) if mode.offload == "none")
    compressed = dataclasses.replace(step, mode=whole, powersgd=True)
    for mode in (whole, *shared):
        sent = sent_by_all(traffic(dataclasses.replace(step, mode=mode)), network)
        yield row(preset_name(mode), sent, overlaps=mode.zero_stage == 3)
    if network.gpus > 1:
        yield row(f"PowerSGD, rank {powersgd_rank}", sent_by_all(traffic(compressed), network), overlaps=False)
    if network.hosts > 1:
        in_host, between = papers_mix(step, powersgd_rank, network.per_host)
        yield row("paper's mix *", sent_by_hosts(in_host, between, network), overlaps=True)
