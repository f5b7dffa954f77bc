"""A plan as a text with its tables, and the list of the recipes."""

from collections.abc import Iterator

from training.plan.state import Mode
from training.plan.types import GIB, RESERVED_FRACTION, OtherStage, Plan
from training.recipes import RECIPES


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
