"""All stages of a bundle: one after the other, or several at once, in child processes.

A bundle is one directory: tokenizer.json, dvae/, dalle/ and clip/ for use, and `training/<stage>/` with the runs behind
them.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dalle.evaluation.bundle import evaluate_bundle
from dalle.output.text import Say
from training.plan.machine import MachinePlan, Share
from training.ranks.ranks import Ranks, on_first_rank
from training.ranks.side_by_side import Job, TimeLeft, run_jobs
from training.recipes import Recipe
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.encode import MAX_CROPS
from training.stages.encoded import encode_inputs, encoded_inputs, shards_to_encode
from training.stages.exchanged_captions import measure_exchanged
from training.stages.inputs import ENCODED, Inputs, forget_runs
from training.stages.locks import bundle_lock, held
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer


def train_all(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say, *, encode_crops: int | None = None) -> None:
    """Train all stages, one after the other, and evaluate the bundle on the validation data, if there are any.

    Args:
        recipe: of all stages.
        inputs: shards of captioned pictures.
        ranks: the ranks of the run.
        say: told how far it is.
        encode_crops: random crops of each picture to encode once, for the transformer; None to encode in every step.

    Raises:
        FolderInUseError: another job trains in this bundle.
        ValueError: encode_crops is below 1; or as the stages.
    """
    _require_crops(encode_crops)
    with held(bundle_lock(inputs.out), ranks):
        if inputs.fresh:
            on_first_rank(lambda: forget_runs(inputs.out), ranks)
        if inputs.fresh or not (inputs.out / "tokenizer.json").is_file():
            on_first_rank(lambda: train_tokenizer(recipe, inputs, say), ranks)
        train_dvae(recipe, inputs, ranks, say)
        train_clip(recipe, inputs, ranks, say)
        images = inputs if encode_crops is None else encode_inputs(recipe, inputs, encode_crops, ranks, say)
        train_transformer(recipe, images, ranks, say)
        if inputs.validation:
            validation = inputs.open_validation(captions=True)
            device = str(ranks.device)
            on_first_rank(
                lambda: evaluate_bundle(inputs.out, validation, say, device=device, also=measure_exchanged), ranks
            )
        say(what_next(inputs))


def what_next(inputs: Inputs) -> str:
    """Return where the trained bundle is, whether it was measured, and the command that samples from it."""
    out = shlex.quote(str(inputs.out))
    measuring = f"; not measured, for want of --validation: `dalle-train evaluate {out} --data SHARDS` measures it"
    return f'bundle: {inputs.out}{"" if inputs.validation else measuring}\nnext:   dalle generate "…" --bundle {out}'


def _require_crops(encode_crops: int | None) -> None:
    if encode_crops is not None and encode_crops < 1:
        raise ValueError(f"--encode-crops must be at least 1, got {encode_crops}: the transformer trains on them")
    if encode_crops is not None and encode_crops > MAX_CROPS:
        raise ValueError(f"--encode-crops must be at most {MAX_CROPS:,}, got {encode_crops:,}")


# ------------------------------------------------------------------------------------------------ side by side


def train_all_side_by_side(
    recipe: Recipe,
    inputs: Inputs,
    plan: MachinePlan,
    say: Say,
    *,
    encode_crops: int | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Train as `train_all` does, in child processes as the plan says; only rounding and the dVAE's noise differ.

    Args:
        recipe: of all stages; children find it by its name.
        inputs: shards of captioned pictures.
        plan: has phases.
        say: told how far it is.
        encode_crops: as for `train_all`.
        options: more options of each neural stage's command, by its name, besides those of `inputs`.

    Raises:
        FolderInUseError: another job trains in this bundle.
        ValueError: encode_crops is below 1.
        Interrupted, OSError: as `run_jobs`.
    """
    _require_crops(encode_crops)
    with bundle_lock(inputs.out):
        if inputs.fresh:
            forget_runs(inputs.out)
        time_left = TimeLeft(time_of(plan))
        run_phases(recipe, inputs, plan, time_left, say, encode_crops=encode_crops, options=options)
        if inputs.validation:
            evaluate_bundle(inputs.out, inputs.open_validation(captions=True), say, also=measure_exchanged)
        say(what_next(inputs))


def time_of(plan: MachinePlan) -> list[list[dict[str, float]]]:
    """Return the seconds of all parts of a plan, by phase and lane; a warm-up is a part of its stage's lane.

    A plan without phases has one stage after the other.
    """

    def lane(stage: str) -> dict[str, float]:
        return {part: plan.seconds[part] for part in (f"{stage}-warmup", stage) if part in plan.seconds}

    one_at_a_time = [["tokenizer"], ["dvae"], ["clip"], ["transformer"]]
    phases = [[share.stage for share in shares] for shares in plan.phases] or one_at_a_time
    return [[lane(stage) for stage in stages] for stages in phases]


def run_phases(
    recipe: Recipe,
    inputs: Inputs,
    plan: MachinePlan,
    time_left: TimeLeft,
    say: Say,
    *,
    encode_crops: int | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Train all stages in child processes; arguments and errors as those of `train_all_side_by_side`."""
    for shares in plan.phases:
        beside = ", beside ".join(str(share) for share in shares)
        say(f"\n{beside} ({time_left})")
        jobs = [job for share in shares for job in _jobs(recipe, inputs, share, encode_crops, options or {})]
        run_jobs(jobs, time_left, say)
        for share in shares:
            time_left.end(share.stage)  # a stage that was there has no job


def _jobs(
    recipe: Recipe, inputs: Inputs, share: Share, encode_crops: int | None, options: Mapping[str, Sequence[str]]
) -> Iterator[Job]:
    """Yield the commands of a stage; none for a tokenizer that exists."""

    def job(name: str, *arguments: object, ranks: int = share.ranks) -> Job:
        return Job(stage=name, arguments=tuple(map(str, arguments)), ranks=ranks, threads=share.threads)

    match share.stage:
        case "tokenizer":
            if inputs.fresh or not (inputs.out / "tokenizer.json").is_file():
                yield job("tokenizer", "tokenizer", recipe.name, *_arguments(inputs, inputs.out, validates=False))
        case "encode":
            assert encode_crops is not None, "the plan encodes what nobody asked for"
            train = recipe.transformer.train
            same: list[object] = ["--dvae", inputs.out / "dvae", "--seed", train.seed, "--workers", train.workers]
            same += ["--max-bad-fraction", train.max_bad_fraction]
            for name, crops, of in shards_to_encode(inputs, encode_crops):
                target = inputs.out / ENCODED / name
                arguments = ["encode", *_arguments(of, target, validates=False), *same, "--crops", crops]
                # at the same time; there are few of these beside the pictures to train on
                yield job(f"encode {name}", *arguments, ranks=share.ranks if name == "train" else 1)
        case stage:
            images = encoded_inputs(inputs) if stage == "transformer" and encode_crops is not None else inputs
            yield job(stage, stage, recipe.name, *_arguments(images, inputs.out), *options.get(stage, ()))


def _arguments(inputs: Inputs, out: Path, *, validates: bool = True) -> Iterator[object]:
    """Yield the options for inputs; `validates`: whether the command takes validation data."""
    yield from ("--data", *inputs.data, "--out", out)
    if inputs.manifest is not None:
        yield from ("--manifest", inputs.manifest)
    if validates and inputs.validation:
        yield from ("--validation", *inputs.validation)
        if inputs.validation_manifest is not None:
            yield from ("--validation-manifest", inputs.validation_manifest)
    if inputs.cache is not None:
        yield from ("--cache", inputs.cache)
    if inputs.cache_gb is not None:
        yield from ("--cache-gb", inputs.cache_gb)
    if inputs.fresh:
        yield "--fresh"
    if inputs.skip_damaged_shards:
        yield "--skip-damaged-shards"
