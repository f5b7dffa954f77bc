"""A plan as text with its tables, and the list of recipes."""

from collections.abc import Iterator

from dalle.output.text import GIB, aligned, duration
from training.plan.costs.checkpoints import GB, Checkpoint
from training.plan.state import Mode
from training.plan.types import RESERVED_FRACTION, OtherStage, Plan
from training.recipes import RECIPES


def text(plan: Plan) -> str:
    """Return a plan as text for a terminal."""
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
        aligned([(name, f"{count:,}") for name, count in plan.parameters.items()], "<>", indent=4),
        "",
        f"  {tera:.3g} TFLOP per sample and training step{more}; {plan.sparse_flops_per_sample / 1e12:.3g} with only "
        "the keys that the masks allow",
        f"  {plan.flops_per_sample / plan.tokens_per_sample / 1e9:.3g} GFLOP per token, "
        f"{_count(tera * plan.global_batch)} TFLOP per step of {plan.global_batch} samples",
        f"  {_count(plan.tokens_per_day)} tokens a day, {_duration(plan.days)} for all steps, "
        f"{_gpu_hours(plan, plan.days)}, on {_gpus(plan)} at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s each",
        "",
        *_memory_table(plan),
        "",
        *_micro_batch_table(plan),
        "",
        *_communication_table(plan),
        *_checkpoint_table(plan),
        "",
        *_recommendation_lines(plan),
        "",
        *_stage_lines("dVAE", plan.dvae, "picture"),
        *_stage_lines("CLIP", plan.clip, "pair"),
        *(line for name, stage in plan.unclip.items() for line in _stage_lines(f"DALL·E 2's {name}", stage, "picture")),
    ]
    return "\n".join(lines)


def _gpus(plan: Plan) -> str:
    return f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"


def _count(value: float) -> str:
    """Return a number for people: "12.3", "10,737", "33.6 billion", and "0" below a thousandth."""
    if value < 0.001:
        return "0"
    names = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"))
    size, name = next(((size, name) for size, name in names if value >= size), (1, ""))
    return f"{value / size:,.1f}{name}" if name else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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
"""Fields of `Memory`, and their heads in the table."""


def _label(mode: Mode) -> str:
    placed = {"none": "", "optimizer": "+ optimizer on CPU", "parameters": "+ weights, too"}[mode.offload]
    return f"  {placed}" if placed else f"ZeRO {mode.zero_stage} {mode.precision}"


def _memory_table(plan: Plan) -> Iterator[str]:
    """Yield the table of bytes per GPU by mode."""
    recipes = RECIPES[plan.recipe]().transformer.train.micro_batch if plan.recipe in RECIPES else None
    advice = "" if recipes in (None, plan.micro_batch) else f"; train with --micro-batch {plan.micro_batch}"
    yield (
        f"  GiB per GPU at the peak, on {_gpus(plan)} of {plan.gpu_memory_gib:g} GiB, micro-batch {plan.micro_batch}, "
        f"activation checkpointing {'on' if plan.checkpointing else 'off'}{advice}"
    )
    rows = [["", *_COLUMNS.values(), "total", "at", "start", "samples", "host/rank", "largest micro-batch"]]
    for row in sorted(plan.modes, key=lambda row: row.mode.zero_stage):
        parts = [f"{getattr(row.peak, name) / GIB:.2f}" for name in _COLUMNS]
        at_start = [f"{row.start / GIB:.1f}", f"{row.sampling / GIB:.1f}", f"{row.host / GIB:.1f}"]
        largest = str(row.largest_micro_batch or "does not fit")
        rows.append([_label(row.mode), *parts, f"{row.total / GIB:.2f}", row.moment, *at_start, largest])
    yield aligned(rows, "<" + ">" * (len(_COLUMNS) + 1) + "<>>><", indent=4)
    yield (
        f"  Of the first rank, which has the averages (at ZeRO 3 a part of them); {RESERVED_FRACTION:.0%} of a GPU is "
        "kept free."
    )
    yield "  Start: while ZeRO shares out the model; at ZeRO 3 no rank builds more than its part. Samples: while sample"
    yield "  pictures are drawn, which are left out where there is no room."
    yield "  Host: memory there for each rank, so a machine needs as much for each of its GPUs."
    yield "  Derived for CUDA, not measured; the same model on a CPU is held to measured peaks (benchmarks/plan.py)."


def _micro_batch_table(plan: Plan) -> Iterator[str]:
    usable = plan.gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB
    yield "  GiB per GPU at the peak of a step, the start left out, by micro-batch; in parentheses what does not fit"
    rows = [["", *map(str, plan.modes[0].totals)]]
    for row in sorted(plan.modes, key=lambda row: row.mode.zero_stage):
        cells = (f"{total / GIB:.1f}" if total <= usable else f"({total / GIB:.1f})" for total in row.totals.values())
        rows.append([row.preset, *cells])
    yield aligned(rows, "<>", indent=4)


def _recommendation_lines(plan: Plan) -> Iterator[str]:
    chosen = plan.recommendation
    if chosen is not None:
        yield f"  Recommended: {chosen.preset}, micro-batch {chosen.micro_batch}: {chosen.reason}"
        yield f"    {chosen.command}"
        return
    yield f"  Nothing fits {_gpus(plan)} of {plan.gpu_memory_gib:g} GiB, not even micro-batch 1. What would:"
    yield from (f"    {line}" for line in plan.advice)


def _gpu_hours(plan: Plan, days: float) -> str:
    """Return "30,400 GPU-hours", with their cost if a price is given."""
    hours = days * 24 * plan.gpus
    cost = "" if plan.gpu_hour_price is None else f" (cost {hours * plan.gpu_hour_price:,.0f})"
    return f"{_count(hours)} GPU-hours{cost}"


def _communication_table(plan: Plan) -> Iterator[str]:
    """Yield the table of what GPUs send each other, if there are several and the network is known."""
    network = plan.network
    if network is None or network.gpus == 1:
        return
    hosts = f"{network.hosts} host{'s' if network.hosts > 1 else ''} of {network.per_host}"
    yield (
        f"  GiB that a GPU sends in a step; {hosts}, {network.in_host * 8 / 1e9:,.6g} Gbit/s from GPU to GPU, "
        f"{network.between_hosts * 8 / 1e9:,.6g} from host to host"
    )
    rows = [["", "in its host", "to others", "sending", "a step", "all steps", "GPU-hours"]]
    for row in plan.communication:
        sent = [_count(row.sent.in_host / GIB), _count(row.sent.between_hosts / GIB), f"{_count(row.sent.seconds)} s"]
        hours = _gpu_hours(plan, row.days).replace(" GPU-hours", "")
        rows.append([row.name, *sent, f"{_count(row.step_s)} s", _duration(row.days), hours])
    yield aligned(rows, "<>", indent=4)
    yield (
        f"  A step computes for {_count(plan.computing_s)} s and then sends; stage 3 and the paper's mix send "
        "meanwhile. Rings at full speed, derived, not measured."
    )
    if network.hosts > 1:
        yield "  * The GPUs of a host share the weights, and hosts exchange PowerSGD's factors; not built here."
    yield ""


def _checkpoint_table(plan: Plan) -> Iterator[str]:
    """Yield the table of what a checkpoint takes."""
    yield (
        f"  GiB of a checkpoint, one every {plan.checkpoint_every:,} steps; the ranks' disk writes "
        f"{plan.disk.write / GB:.2g} and reads {plan.disk.read / GB:.2g} GB/s ({plan.disk.source})"
    )
    rows = [["", "first rank", "each other", "in all", "on the disk", "save", "of the time", "verify", "convert"]]
    for row in sorted(plan.modes, key=lambda row: row.mode.zero_stage):
        if row.mode.offload == "none":
            rows.append([row.preset, *_checkpoint_cells(row.checkpoint, plan.checkpoint_every * plan.computing_s)])
    yield aligned(rows, "<>", indent=4)
    export, converted = plan.modes[0].checkpoint, max(row.checkpoint.converted for row in plan.modes)
    kept = f"the newest {plan.keep_last}" if plan.keep_last > 1 else "the newest"
    for_good = f", those of every {plan.keep_every:,} steps" if plan.keep_every else ""
    yield (
        f"  On the disk at most: {kept}{for_good}, one that is being written, and the export twice, which has "
        f"{_count(export.export / GIB)} GiB and takes {duration(export.export_s)}."
    )
    yield (
        "  Of the time: saving and exporting, beside computing. Convert: to another number of ranks, which adds "
        f"{_count(converted / GIB)} GiB for a while."
    )
    if plan.disk_free is not None:
        yield f"  The disk has {plan.disk_free / GIB:,.0f} GiB left."


def _checkpoint_cells(checkpoint: Checkpoint, computing_s: float) -> list[str]:
    """Return the cells of a row; `computing_s` are the seconds between two checkpoints."""
    sizes = (checkpoint.first, checkpoint.other, checkpoint.total, checkpoint.kept)
    writing_s = checkpoint.save_s + checkpoint.export_s
    return [
        *(_count(size / GIB) for size in sizes),
        duration(checkpoint.save_s),
        f"{writing_s / (writing_s + computing_s):.1%}",
        duration(checkpoint.verify_s),
        duration(checkpoint.convert_s) if checkpoint.converted else "-",
    ]


def _stage_lines(title: str, stage: OtherStage, unit: str) -> Iterator[str]:
    parts = ", ".join(f"{part} {count:,}" for part, count in stage.parameters.items() if part != "total")
    states = ", ".join(f"{number}: {state.total / GIB:.2f}" for number, state in stage.state.items())
    yield (
        f"  {title}: {stage.parameters['total']:,} parameters ({parts}), {stage.flops_per_sample / 1e9:,.0f} GFLOP "
        f"to train on a {unit}"
    )
    yield f"    GiB per GPU without activations, {stage.precision}, by ZeRO stage: {states}"
    saved = stage.checkpoint
    yield (
        f"    checkpoint {saved.total / GIB:.2f} GiB, {duration(saved.save_s)} to save; export {saved.export / GIB:.2f}"
        f" GiB; {saved.kept / GIB:.2f} GiB on the disk at most"
    )


def recipe_list() -> str:
    """Return the recipes, a line each."""
    return aligned([(name, make().purpose) for name, make in RECIPES.items()], indent=2)
