"""What a recipe needs, before anything is allocated: parameters, arithmetic, bytes per GPU in every mode, and time.

Models are constructed on the meta device, so that the 12-billion-parameter recipe is planned in a second on a laptop.
The bytes are those of training/plan/memory_model.py.

Order of the file: what a plan is, how it is made, what is recommended, and the text.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from dalle.model import DALLE, DALLEConfig
from dvae.model import DVAE, DVAEConfig
from rerank.model import CLIP
from training.config import OptimizerKind, Precision, TrainConfig
from training.engine.deepspeed_config import PRESETS
from training.engine.muon import block_matrices
from training.plan.flops import clip_flops, dvae_flops, training_flops
from training.plan.memory_model import (
    Memory,
    Mode,
    Run,
    Sizes,
    StateBytes,
    host_peak,
    moments,
    peak,
    shapes_only,
    state_bytes,
    training_peak,
)
from training.recipes import RECIPES, Recipe

GIB = 1 << 30
RESERVED_FRACTION = 0.08
"""Of a GPU's memory, for the CUDA context, NCCL's buffers and fragmentation."""
MOST_SAMPLES = 32
"""The largest micro-batch that the plan shows beside its own."""
H100_TFLOPS = {False: 989.0, True: 67.0}
"""Dense matrix products of one H100 (SXM) by its data sheet: in 16 bits, and in float32."""
GPUS_PER_NODE = 8


# ---------------------------------------------------------------------------------------- what a plan is


@dataclass(frozen=True, kw_only=True)
class ModePlan:
    """One way to share the state, and what it needs."""

    preset: str
    """Name of the preset that trains so."""
    mode: Mode
    """Stage, precision, and what lies in the host's memory."""
    moment: str
    """When the peak of a step is."""
    peak: Memory
    """Bytes on one GPU then, at the plan's micro-batch."""
    total: float
    """Their sum."""
    start: float
    """Bytes on one GPU while training starts, before ZeRO has shared out the model."""
    host: float
    """Bytes in the host's memory, at most, of the first of its ranks."""
    fits: bool
    """Whether the plan's micro-batch fits."""
    totals: dict[int, float]
    """Peak bytes by micro-batch, of start or step."""
    largest_micro_batch: int
    """Of those that divide a GPU's share of the batch, the largest that fits; 0 if none does."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to train with."""

    preset: str
    """The mode's name."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    reason: str
    """Why, in a line."""
    command: str
    """What to type."""


@dataclass(frozen=True, kw_only=True)
class OtherStage:
    """What the dVAE or CLIP needs, without its activations."""

    parameters: dict[str, int]
    """By part; and "total"."""
    flops_per_sample: float
    """Of forward and backward pass: three times the forward's products and convolutions."""
    precision: Precision
    """Of its run."""
    state: dict[int, StateBytes]
    """Bytes on one GPU, by ZeRO stage."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs on a number of GPUs."""

    recipe: str
    purpose: str
    model: DALLEConfig
    """The transformer."""
    gpus: int
    gpu_memory_gib: float
    precision: Precision
    """Of the run; at stage 0 bf16 is autocast."""
    optimizer: OptimizerKind
    """Of the layers' matrices."""
    checkpointing: bool
    """Whether the backward pass recomputes each layer."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    accumulation: int
    """Micro-batches per step."""
    global_batch: int
    steps: int
    parameters: dict[str, int]
    """By group; and "total"."""
    flops_per_sample: float
    """See `flops_per_sample`."""
    sparse_flops_per_sample: float
    """With only the keys of attention that the masks allow; see `training_flops`."""
    mfu: float
    """The fraction of the GPUs' arithmetic that is assumed to be used."""
    peak_tflops: float
    """Of one GPU."""
    modes: tuple[ModePlan, ...]
    """What each way to share the state needs."""
    recommendation: Recommendation | None
    """None if nothing fits."""
    advice: tuple[str, ...]
    """What would fit, where nothing does."""
    dvae: OtherStage
    clip: OtherStage

    @property
    def tokens_per_sample(self) -> int:
        """Positions of the stream."""
        return self.model.stream.length

    @property
    def tokens_per_day(self) -> float:
        """At the assumed fraction of the arithmetic."""
        flops_per_day = self.gpus * self.peak_tflops * 1e12 * self.mfu * 86_400
        return flops_per_day / self.flops_per_sample * self.tokens_per_sample

    @property
    def days(self) -> float:
        """For all steps."""
        return self.steps * self.global_batch * self.tokens_per_sample / self.tokens_per_day

    def as_json(self) -> str:
        """Return everything; sizes are in bytes. `measured` says that CUDA's are not."""
        derived = {
            "flops_per_token": self.flops_per_sample / self.tokens_per_sample,
            "flops_per_step": self.flops_per_sample * self.global_batch,
            "tokens_per_day": self.tokens_per_day,
            "days": self.days,
            "device": "cuda",
            "measured": False,
        }
        return json.dumps(dataclasses.asdict(self) | derived, indent=2)


# ---------------------------------------------------------------------------------------- how it is made


def flops_per_sample(config: DALLEConfig, n_block_parameters: int) -> float:
    """Return the floating-point operations of a training step per sample, forward and backward.

    6 for each weight of a matrix and position it is applied to: the blocks' at all S positions, the text head's at the
    text's, the image head's at the image's. Attention's own two products, computed for all S² pairs and masked, are
    4·S²·d per layer forward, 12·S²·d with the backward pass. That is how model FLOPs utilisation is usually counted;
    `training_flops` counts only the pairs that the masks allow.
    """
    n_image = config.grid**2
    stream = config.text_len + n_image
    heads = config.d_model * (config.text_len * config.text_vocab + n_image * config.image_vocab)
    attention = 12.0 * config.n_layers * stream**2 * config.d_model
    return 6.0 * (n_block_parameters * stream + heads) + attention


def plan(recipe: Recipe, gpus: int, gpu_memory_gib: float) -> str:
    """Return the plan of a recipe as a text; see `make_plan`."""
    return text(make_plan(recipe, gpus, gpu_memory_gib))


def make_plan(
    recipe: Recipe,
    gpus: int,
    gpu_memory_gib: float,
    *,
    micro_batch: int | None = None,
    precision: Precision | None = None,
    optimizer: OptimizerKind | None = None,
    mfu: float = 0.4,
    peak_tflops: float | None = None,
) -> Plan:
    """Return what a recipe's transformer needs, and a little about its dVAE and CLIP.

    Args:
        recipe: what is planned.
        gpus: data-parallel GPUs.
        gpu_memory_gib: memory of one, GiB.
        micro_batch: samples per GPU and forward pass; the recipe's, or the share of a GPU if that is less, if None.
        precision: instead of the recipe's.
        optimizer: instead of the recipe's.
        mfu: fraction of the GPUs' arithmetic that is assumed to be used, above 0, at most 1.
        peak_tflops: of one GPU, 10¹² operations a second; an H100's if None.

    Raises:
        ValueError: fewer than one GPU, no memory, GPUs that cannot share the batch evenly, a micro-batch that does not
            divide the share of a GPU, or a fraction that is none.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if gpu_memory_gib <= 0:
        raise ValueError(f"--gpu-memory must be above 0 GiB, got {gpu_memory_gib}")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, got {mfu}")
    if peak_tflops is not None and peak_tflops <= 0:
        raise ValueError(f"--peak-tflops must be above 0, got {peak_tflops}")
    config, train = recipe.transformer.model, recipe.transformer.train
    precision, optimizer = precision or train.precision, optimizer or train.optimizer.kind
    samples = _micro_batch(train, gpus, micro_batch)
    with shapes_only():
        model, dvae, clip = DALLE(config), DVAE(recipe.dvae.model), CLIP(recipe.clip.model)
    parameters = model.n_parameters()
    run = Run(
        config=config,
        sizes=Sizes.of(model),
        mode=Mode(zero_stage=0, precision="fp32"),
        gpus=gpus,
        micro_batch=samples,
        accumulation=train.global_batch // (gpus * samples),
        checkpointing=train.activation_checkpointing,
        optimizer=optimizer,
        dvae_weights=4.0 * sum(parameter.numel() for parameter in dvae.parameters()),
        dvae_working=_dvae_working(recipe.dvae.model),
    )
    modes = tuple(_mode_plan(run, mode, train, gpu_memory_gib) for mode in modes_of(precision))
    recommendation = _recommended(recipe, gpus, samples, modes, optimizer)
    return Plan(
        recipe=recipe.name,
        purpose=recipe.purpose,
        model=config,
        gpus=gpus,
        gpu_memory_gib=gpu_memory_gib,
        precision=precision,
        optimizer=optimizer,
        checkpointing=train.activation_checkpointing,
        micro_batch=samples,
        accumulation=train.global_batch // (gpus * samples),
        global_batch=train.global_batch,
        steps=train.steps,
        parameters=parameters,
        flops_per_sample=flops_per_sample(config, parameters["attention"] + parameters["mlp"]),
        sparse_flops_per_sample=float(training_flops(config)),
        mfu=mfu,
        peak_tflops=peak_tflops or H100_TFLOPS[precision == "fp32"],
        modes=modes,
        recommendation=recommendation,
        advice=() if recommendation else tuple(_advice(run, precision, train, gpu_memory_gib)),
        dvae=_other_stage(
            {"encoder": dvae.encoder, "decoder": dvae.decoder}, dvae, dvae_flops(dvae.config), recipe.dvae.train, gpus
        ),
        clip=_other_stage(
            {"image tower": clip.vision, "text tower": clip.text},
            clip,
            clip_flops(clip.config, recipe.clip.captions_per_picture),
            recipe.clip.train,
            gpus,
        ),
    )


def modes_of(precision: Precision) -> tuple[Mode, ...]:
    """Return the modes that are compared, from the least communication to the least memory.

    Half precision is not trained at stage 0: that row is autocast.
    """
    return (
        Mode(zero_stage=0, precision=precision if precision == "fp32" else "autocast"),
        Mode(zero_stage=1, precision=precision),
        Mode(zero_stage=2, precision=precision),
        Mode(zero_stage=3, precision=precision),
        Mode(zero_stage=2, precision=precision, offload="optimizer"),
        Mode(zero_stage=3, precision=precision, offload="parameters"),
    )


def preset_name(mode: Mode) -> str:
    """Return the name of the preset of a mode, such as zero2-offload-bf16; at stage 0 the precision's."""
    if mode.zero_stage == 0:
        return mode.precision
    offload = "" if mode.offload == "none" else "-offload"
    return f"zero{mode.zero_stage}{offload}-{mode.precision}"


def _micro_batch(train: TrainConfig, gpus: int, wanted: int | None) -> int:
    """Return the samples per GPU and forward pass: those wanted, or the recipe's, or fewer if many share the batch.

    Raises:
        ValueError: the GPUs cannot share the batch evenly, or the samples wanted do not divide the share of one.
    """
    share, rest = divmod(train.global_batch, gpus)
    if rest:
        raise ValueError(
            f"{gpus} GPUs cannot share a batch of {train.global_batch} evenly: give --gpus a number that divides it"
        )
    if wanted is None:
        return math.gcd(train.micro_batch or share, share)
    if wanted < 1 or share % wanted:
        raise ValueError(
            f"--micro-batch {wanted} does not divide the {share} samples of a GPU (a batch of {train.global_batch} on "
            f"{gpus} GPUs): give one of {', '.join(map(str, _divisors(share)))}"
        )
    return wanted


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _dvae_working(config: DVAEConfig) -> float:
    """Return the bytes that the encoder works in per picture: in its first group a block's input, branch and sum."""
    return 4.0 * 3 * config.n_hid * config.image_size**2


def _mode_plan(run: Run, mode: Mode, train: TrainConfig, gpu_memory_gib: float) -> ModePlan:
    usable = gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB
    run = dataclasses.replace(run, mode=mode)
    totals = {n: _total(run, train, n) for n in _divisors(train.global_batch // run.gpus)}
    shown = {n for n in totals if n <= MOST_SAMPLES and n.bit_count() == 1} | {run.micro_batch}
    moment, memory = training_peak(run)
    start = moments(run)["start"].total
    return ModePlan(
        preset=preset_name(mode),
        mode=mode,
        moment=moment,
        peak=memory,
        total=memory.total,
        start=start,
        host=host_peak(run),
        fits=max(memory.total, start) <= usable,
        totals={n: total for n, total in totals.items() if n in shown},
        largest_micro_batch=max((n for n, total in totals.items() if total <= usable), default=0),
    )


def _total(run: Run, train: TrainConfig, micro_batch: int) -> float:
    """Return the peak bytes with another micro-batch, and as many of them as make the batch."""
    accumulation = train.global_batch // (run.gpus * micro_batch)
    return peak(dataclasses.replace(run, micro_batch=micro_batch, accumulation=accumulation))[1].total


def _other_stage(
    parts: Mapping[str, nn.Module], model: nn.Module, forward_flops: int, train: TrainConfig, gpus: int
) -> OtherStage:
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    by_muon = sum(p.numel() for p in block_matrices(model)) if train.optimizer.kind == "muon" else 0
    stages = range(1 if train.precision == "bf16" else 0, 4)
    return OtherStage(
        parameters=counts | {"total": total},
        flops_per_sample=3.0 * forward_flops,
        precision=train.precision,
        state={stage: state_bytes(total, train.precision, stage, gpus, by_muon=by_muon) for stage in stages},
    )


# ---------------------------------------------------------------------------------------- what is recommended


def _recommended(
    recipe: Recipe, gpus: int, micro_batch: int, modes: tuple[ModePlan, ...], optimizer: OptimizerKind
) -> Recommendation | None:
    """Return the first mode that fits the micro-batch, else the one that fits the largest; None if none fits any.

    Nothing is offloaded where a smaller micro-batch will do: that costs less time than the way to the host and back.
    """
    on_gpu = [mode for mode in modes if mode.mode.offload == "none" and mode.largest_micro_batch]
    candidates = on_gpu or [mode for mode in modes if mode.largest_micro_batch]
    if not candidates:
        return None
    chosen = next((mode for mode in candidates if mode.fits), None)
    if chosen is None:
        chosen = max(candidates, key=lambda mode: mode.largest_micro_batch)
    samples = micro_batch if chosen.fits else chosen.largest_micro_batch
    if not chosen.fits:
        why = f"micro-batch {micro_batch} does not fit, and of the modes that fit one this takes the largest"
    elif chosen is modes[0]:
        why = "it fits, and every stage only adds communication"
    else:
        why = f"{modes[modes.index(chosen) - 1].preset} does not fit micro-batch {samples}"
    reason = f"{_meaning(chosen.mode)}; {why}"
    command = _command(recipe, chosen, samples, gpus)
    if optimizer != recipe.transformer.train.optimizer.kind:
        command += f" --optimizer {optimizer}"
    return Recommendation(preset=chosen.preset, micro_batch=samples, reason=reason, command=command)


def _meaning(mode: Mode) -> str:
    shared = ("nothing is shared", "the optimizer is shared", "optimizer and gradients are shared", "all is shared")
    placed = {
        "none": "",
        "optimizer": ", the optimizer lies and steps on the CPU",
        "parameters": ", weights and optimizer lie on the CPU",
    }
    return f"{shared[mode.zero_stage]}{placed[mode.offload]}"


def _command(recipe: Recipe, chosen: ModePlan, micro_batch: int, gpus: int) -> str:
    """Return the command that trains so; several nodes need a hostfile."""
    launcher = f"--num_gpus {gpus}" if gpus <= GPUS_PER_NODE else "--hostfile HOSTS"
    return (
        f"deepspeed {launcher} --no_python --no_local_rank dalle-train transformer {recipe.name} --data SHARDS "
        f"--out RUN {_options(chosen.mode)} --micro-batch {micro_batch}"
    )


def _options(mode: Mode) -> str:
    """Return the options that choose a mode: its preset, or, where none comes with the program, one by one."""
    preset = preset_name(mode)
    if (PRESETS / f"{preset}.json").is_file():
        return f"--preset {preset}"
    offload = "" if mode.offload == "none" else f" --offload {mode.offload}"
    return f"--zero-stage {mode.zero_stage} --precision {mode.precision}{offload}"


def _advice(run: Run, precision: Precision, train: TrainConfig, gpu_memory_gib: float) -> Iterator[str]:
    """Yield what would fit, a line each: recomputing layers, more GPUs, larger ones."""
    usable = gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB

    def least(run: Run) -> tuple[float, str]:
        runs = (dataclasses.replace(run, mode=mode) for mode in modes_of(precision))
        return min((_total(one, train, 1), preset_name(one.mode)) for one in runs)

    if not run.checkpointing:
        run = dataclasses.replace(run, checkpointing=True)
        total, preset = least(run)
        if total <= usable:
            yield f"activation checkpointing: {preset} then needs {total / GIB:.1f} GiB at micro-batch 1"
    for gpus in _divisors(train.global_batch):
        if gpus <= run.gpus:
            continue
        total, preset = least(dataclasses.replace(run, gpus=gpus))
        if total <= usable:
            yield f"{gpus} GPUs: {preset} then needs {total / GIB:.1f} GiB at micro-batch 1"
            break
    total, preset = least(run)
    yield f"GPUs of {math.ceil(total / GIB / (1 - RESERVED_FRACTION))} GiB: {preset} needs {total / GIB:.1f} of them"


# ---------------------------------------------------------------------------------------- the text


def text(plan: Plan) -> str:
    """Return a plan as a text with its tables."""
    config, checkpointed = plan.model, plan.checkpointing
    tera = plan.flops_per_sample / 1e12
    more = " (a third more with checkpointing)" if checkpointed else ""
    lines = [
        f"{plan.recipe}: {plan.purpose}",
        "",
        f"  {config.n_layers} layers, width {config.d_model}, {config.n_heads} heads; "
        f"{config.text_len} text + {config.grid}×{config.grid} image positions",
        f"  vocabularies {config.text_vocab:,} + {config.image_vocab:,}; "
        f"batch {plan.global_batch}, {plan.steps:,} steps, {plan.precision}, {plan.optimizer}",
        "",
        "  parameters",
        *(f"    {name:<22}{count:>18,}" for name, count in plan.parameters.items()),
        "",
        f"  {tera:.3g} TFLOP per sample and training step{more}; {plan.sparse_flops_per_sample / 1e12:.3g} with only "
        "the keys that the masks allow",
        f"  {plan.flops_per_sample / plan.tokens_per_sample / 1e9:.3g} GFLOP per token, "
        f"{tera * plan.global_batch:,.3g} TFLOP per step of {plan.global_batch} samples",
        f"  {plan.tokens_per_day:.3g} tokens/day, {_duration(plan.days)} for all steps, on {_gpus(plan)} at "
        f"{plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s each",
        "",
        *_memory_table(plan),
        "",
        *_micro_batch_table(plan),
        "",
        *_recommendation_lines(plan),
        "",
        *_stage_lines("dVAE", plan.dvae, "picture"),
        *_stage_lines("CLIP", plan.clip, "pair"),
    ]
    return "\n".join(lines)


def _gpus(plan: Plan) -> str:
    return f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"


def _duration(days: float) -> str:
    return f"{days:,.3g} days" if days >= 1 else f"{days * 24:.2g} hours"


_COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "averages": "averages",
    "activations": "activat.",
    "logits": "logits",
    "working": "working",
    "deepspeed": "DeepSpeed",
}
"""Parts of a `Memory`, as the table calls them."""


def _label(mode: Mode) -> str:
    placed = {"none": "", "optimizer": "+ optimizer on CPU", "parameters": "+ weights, too"}[mode.offload]
    return f"  {placed}" if placed else f"ZeRO {mode.zero_stage} {mode.precision}"


def _memory_table(plan: Plan) -> Iterator[str]:
    """Yield the table of bytes per GPU, a line for each mode."""
    recipes = RECIPES[plan.recipe]().transformer.train.micro_batch if plan.recipe in RECIPES else None
    advice = "" if recipes in (None, plan.micro_batch) else f"; train with --micro-batch {plan.micro_batch}"
    yield (
        f"  GiB per GPU at the peak, on {_gpus(plan)} of {plan.gpu_memory_gib:g} GiB, micro-batch {plan.micro_batch}, "
        f"activation checkpointing {'on' if plan.checkpointing else 'off'}{advice}"
    )
    heads = "".join(f"{name:>10}" for name in _COLUMNS.values())
    yield f"    {'':<21}{heads}{'total':>8} at         {'start':>7}{'host':>7}  largest micro-batch"
    for row in sorted(plan.modes, key=lambda row: row.mode.zero_stage):
        cells = "".join(f"{getattr(row.peak, name) / GIB:>10.2f}" for name in _COLUMNS)
        yield (
            f"    {_label(row.mode):<21}{cells}{row.total / GIB:>8.2f} {row.moment:<10}{row.start / GIB:>8.1f}"
            f"{row.host / GIB:>7.1f}  {row.largest_micro_batch or 'does not fit'}"
        )
    yield (
        f"  Of the first rank, which has the averages; {RESERVED_FRACTION:.0%} of a GPU are kept free. Start: before "
        "ZeRO has shared out the model."
    )
    yield "  Host: of its memory, for this rank; every one needs as much as the model in float32 there while it starts."
    yield "  Derived for CUDA, not measured; the same model on a CPU is held to measured peaks (benchmarks/plan.py)."


def _micro_batch_table(plan: Plan) -> Iterator[str]:
    usable = plan.gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB
    yield "  GiB per GPU by micro-batch; in parentheses what does not fit"
    yield f"    {'':<21}{''.join(f'{n:>10}' for n in plan.modes[0].totals)}"
    for row in sorted(plan.modes, key=lambda row: row.mode.zero_stage):
        cells = (f"{total / GIB:.1f}" if total <= usable else f"({total / GIB:.1f})" for total in row.totals.values())
        yield f"    {row.preset:<21}{''.join(f'{cell:>10}' for cell in cells)}"


def _recommendation_lines(plan: Plan) -> Iterator[str]:
    chosen = plan.recommendation
    if chosen is not None:
        yield f"  Recommended: {chosen.preset}, micro-batch {chosen.micro_batch}: {chosen.reason}"
        yield f"    {chosen.command}"
        return
    yield f"  Nothing fits {_gpus(plan)} of {plan.gpu_memory_gib:g} GiB, not even micro-batch 1. What would:"
    yield from (f"    {line}" for line in plan.advice)


def _stage_lines(title: str, stage: OtherStage, unit: str) -> Iterator[str]:
    parts = ", ".join(f"{part} {count:,}" for part, count in stage.parameters.items() if part != "total")
    states = ", ".join(f"{number}: {state.total / GIB:.2f}" for number, state in stage.state.items())
    yield (
        f"  {title}: {stage.parameters['total']:,} parameters ({parts}), {stage.flops_per_sample / 1e9:,.0f} GFLOP "
        f"to train on a {unit}"
    )
    yield f"    GiB per GPU without activations, {stage.precision}, by ZeRO stage: {states}"


def recipe_list() -> str:
    """Return the recipes, a line each."""
    return "\n".join(f"  {name:<12}{make().purpose}" for name, make in RECIPES.items())
