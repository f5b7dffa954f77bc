"""Options of the training commands: their groups in --help, their defaults, and how they change a recipe.

A command is a dataclass of groups. A group is a class whose name ends with Options, which a configuration inherits: an
option's name, type and help stand once, where its value is used. Its default is that of the recipe named on the command
line.

1. `recipe_name` and `defaults`: the recipe is looked for first, and its values are what the parser starts from.
2. `given_options`: what the user typed, as against what the recipe says.
3. `changed_recipe`: the recipe with these. What is impossible is refused here, before any data is read.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from training.config import MAX_STEPS, LayerOptions, OptimizerConfig, OptimizerKind, SizeOptions, TrainConfig
from training.engine.deepspeed_config import with_files
from training.recipes import RECIPES, Recipe, stage_of
from training.schedules import Cosine
from training.stage_recipes import CLIPOptions, DVAERecipe, TransformerOptions

Stage = Literal["dvae", "clip", "transformer", "decoder", "prior", "upsampler"]
STAGES: tuple[Stage, ...] = ("dvae", "clip", "transformer")
"""Those that are trained together; those of DALL·E 2 have commands of their own."""
T = TypeVar("T")

# Where a group stands in --help; its options have no prefix. Only in a stage's own group do switches have a --no-… too:
# all others are off in every recipe.
_SWITCHES: Any = tyro.conf.FlagCreatePairsOff
_WITHOUT_PREFIX: Any = tyro.conf.OmitArgPrefixes
Main = Annotated[T, tyro.conf.arg(name="", help=""), _SWITCHES]
InData = Annotated[T, tyro.conf.arg(name="data", help=""), _WITHOUT_PREFIX, _SWITCHES]
InValidation = Annotated[T, tyro.conf.arg(name="validation and samples", help=""), _WITHOUT_PREFIX, _SWITCHES]
InCheckpoints = Annotated[T, tyro.conf.arg(name="checkpoints", help=""), _WITHOUT_PREFIX, _SWITCHES]
InMemory = Annotated[T, tyro.conf.arg(name="memory and ranks", help=""), _WITHOUT_PREFIX, _SWITCHES]
InWatching = Annotated[T, tyro.conf.arg(name="watching", help=""), _WITHOUT_PREFIX, _SWITCHES]
InAdvanced = Annotated[T, tyro.conf.arg(name="advanced", help=""), _WITHOUT_PREFIX, _SWITCHES]
InStage = Annotated[T, tyro.conf.arg(help=""), _WITHOUT_PREFIX]
"""The group of a stage's own options, named for the field."""
Switch = Annotated[bool, _SWITCHES]
"""A single option that is off unless it is given."""
RecipeName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help=f"Name of a recipe: {', '.join(RECIPES)}.")
]


@dataclass(frozen=True, kw_only=True)
class StageOptions(SizeOptions):
    """Size and learning rate of the stage's run."""

    learning_rate: float
    """Highest learning rate; the recipe's schedule is scaled to it."""
    optimizer: OptimizerKind
    """adamw, or muon (the dVAE refuses it): Muon for the matrices of the layers, with the same
    learning rate and weight decay, and AdamW for everything else. A run resumes with the one that it began with."""


@dataclass(frozen=True, kw_only=True)
class CLIPStageOptions(CLIPOptions, StageOptions):
    """Size and learning rate of CLIP's run, and its own options."""


@dataclass(frozen=True, kw_only=True)
class TransformerStageOptions(LayerOptions, TransformerOptions, StageOptions):
    """Size and learning rate of the transformer's run, and its own options."""


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """The tokenizer's vocabulary."""

    vocab_size: int
    """Largest number of entries."""


@dataclass(frozen=True, kw_only=True)
class DVAEOwnOptions:
    """The dVAE's: what a study of tokenizers changes of a recipe."""

    codes: int
    """Size of the codebook: different image tokens."""
    downsampling: int
    """Pixels per token along a side: a power of two. Each doubling adds a group of blocks to encoder and decoder."""
    image_size: int
    """Side in pixels of the pictures that it is trained on, a multiple of the downsampling."""
    kl_weight: float
    """Highest weight β of the KL term; the recipe's schedule is scaled to it. 0 for none."""
    warmup: bool
    """Train as an autoencoder first, and make the codebook from that. A recipe that has no such run cannot."""
    init: Path | None = None
    """Directory of a dVAE to start from, for example imported weights; by default random weights."""


@dataclass(frozen=True, kw_only=True)
class TransformerOwnOptions(LayerOptions, TransformerOptions):
    """The transformer's."""

    tokenizer: Path | None = None
    """tokenizer.json to copy into OUT, which may hold no other; by default OUT/tokenizer.json is used."""
    dvae: Path | None = None
    """Directory of a dVAE to copy into OUT, which may hold no other; by default OUT/dvae is used."""


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """How stages share a machine."""

    one_at_a_time: bool = False
    """Train one stage after the other, in this process, as on GPUs, under a launcher, and where memory is short. The
    results differ by rounding and the dVAE's noise only."""


@dataclass(frozen=True, kw_only=True)
class AllOptions(OrderOptions):
    """How stages share a machine, and whether pictures are encoded once."""

    encode_crops: int | None = None
    """Random crops of each picture to encode once, before the transformer, into OUT/encoded; every epoch takes one of
    them. By default the dVAE encodes another crop in every step."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The demonstration's bundle."""

    out: Path = Path("runs/demo")
    """Directory of the bundle, the sheet and the table."""
    fresh: bool = False
    """Train anew instead of reusing what is there."""
    unclip: bool = False
    """Then train DALL·E 2's prior and decoder beside it, as the recipe says, and show all they do."""


# ------------------------------------------------------------------------------------------------ defaults


def recipe_name(arguments: Sequence[str]) -> str | None:
    """Return the recipe that a command line seems to name: its first word, or the first that is one's name."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    return next((word for word in arguments if word in RECIPES), None)


def values_of(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Return what a recipe says about a stage, by the names of the options."""
    of = stage_of(recipe, stage)
    owners = (of, of.train, of.train.optimizer)
    values = {field.name: getattr(owner, field.name) for owner in owners for field in fields(owner)}
    values |= {"learning_rate": of.train.learning_rate.peak, "optimizer": of.train.optimizer.kind}
    if stage == "dvae":
        values |= {"kl_weight": of.kl_weight.peak, "warmup": of.warmup is not None}
        values |= {"codes": of.model.vocab_size, "downsampling": of.model.downsampling}
        values |= {"image_size": of.model.image_size}
    return values


def values_of_all(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values for options of all stages, None where stages differ, and for those of each stage."""
    each = {stage: values_of(recipe, stage) for stage in STAGES}
    shared = {
        name: value if all(other.get(name) == value for other in each.values()) else None
        for name, value in each["dvae"].items()
    }
    return shared | each


def defaults(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of a command or a group with these values; others have the class's defaults, or must be given.

    Args:
        kind: the dataclass.
        values: by name; of a group whose options have a prefix, a mapping by the name of its field.
    """
    made: dict[str, Any] = {}
    for name, annotation, default in _fields(kind):
        inner = _without_annotations(annotation)
        if is_dataclass(inner):
            nested = values.get(name)
            made[name] = defaults(inner, nested if isinstance(nested, Mapping) else values)  # type: ignore[arg-type]
        elif name in values:
            made[name] = values[name]
        elif default is dataclasses.MISSING:
            made[name] = tyro.MISSING
    return kind(**made)


def _fields(kind: type) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, annotation and default of a dataclass's fields."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield field.name, hints[field.name], default


def _without_annotations(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


# ------------------------------------------------------------------------------------------------ what was given


def given_options(command: object, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of the options that a command line names, by name; that of --dvae.steps is "dvae.steps"."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    names |= {re.sub(r"(^|\.)no_", r"\1", name) for name in names}  # --no-compile says something about compile
    return {name: value for name, value in all_options(command) if name in names}


def all_options(command: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a command with their values."""
    for name, annotation, _ in _fields(type(command)):
        value = getattr(command, name)
        if is_dataclass(value):
            yield from all_options(value, prefix if get_origin(annotation) is Annotated else f"{prefix}{name}.")
        else:
            yield prefix + name, value


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give these options."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


# ------------------------------------------------------------------------------------------------ what it changes


def changed_recipe(recipe: Recipe, stage: Stage, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with the options that were given to one stage; options of other things are ignored.

    Its warm-up takes the same options, but has its own learning rate, and its own steps, in the same proportion.

    Raises:
        ValueError: an option is impossible, or contradicts a preset or a DeepSpeed JSON.
        FileNotFoundError: there is no such JSON.
    """
    of = stage_of(recipe, stage)
    objects = {"kl_weight", "warmup"}  # there; as options a number and a word
    changes = {name: options[name] for name in options.keys() & {field.name for field in fields(of)} - objects}
    changes["train"] = train = changed_run(of.train, options)
    factor = train.steps / of.train.steps
    if getattr(of, "warmup", None) is not None:
        of_warmup = {name: value for name, value in options.items() if name != "learning_rate"}
        if "steps" in options:
            of_warmup["steps"] = min(MAX_STEPS, max(1, round(of.warmup.steps * factor)))
        changes["warmup"] = changed_run(of.warmup, of_warmup)
    if stage == "dvae":
        schedules = ("kl_weight", "temperature", "warmup_noise")
        changes |= {name: getattr(of, name).stretched(factor) for name in schedules}
        changes |= _changed_dvae(of, changes["kl_weight"], options)
    return dataclasses.replace(recipe, **{stage: dataclasses.replace(of, **changes)})


def _changed_dvae(of: DVAERecipe, kl_weight: Cosine, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dVAE's recipe that its own options change.

    Args:
        of: the recipe.
        kl_weight: its schedule, stretched.
        options: those that were given, by name.

    Raises:
        ValueError: one is impossible.
    """
    asked: dict[str, int | None] = {"vocab_size": options.get("codes"), "image_size": options.get("image_size")}
    f = options.get("downsampling")
    if options.get("init") is not None and {"codes", "downsampling", "image_size"} & options.keys():
        raise ValueError("--codes, --downsampling and --image-size do not go with --init: sizes are those of its dVAE")
    if f is not None:
        if f < 1 or f & (f - 1):
            raise ValueError(f"--downsampling is {f}; expected a power of two, such as 4 or 8")
        asked["n_groups"] = f.bit_length()
    sizes = {name: value for name, value in asked.items() if value is not None}
    changes: dict[str, Any] = {"model": dataclasses.replace(of.model, **sizes)} if sizes else {}
    weight = options.get("kl_weight")
    if weight is not None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"--kl-weight is {weight}; expected a number of at least 0, such as 6.6")
        changes["kl_weight"] = kl_weight.with_peak(weight)
    if options.get("warmup") is False:
        changes["warmup"] = None
    elif options.get("warmup") and of.warmup is None:
        raise ValueError(
            "--warmup: this recipe has no warm-up; those of small models have: demo, icons-cpu, photos-cpu"
        )
    return changes


def changed_run(run: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return a run with the options that were given; options of other things are ignored.

    Schedules that end at a step are stretched with the steps; a learning rate is the peak of the schedule.

    Raises:
        ValueError, FileNotFoundError: as `changed_recipe`.
    """
    rate = options.get("learning_rate")
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"--learning-rate is {rate}; expected a number above 0, such as 1e-4")
    own = {field.name for field in fields(TrainConfig)} - {"learning_rate", "optimizer", "said"}  # objects there
    given = {name: options[name] for name in options.keys() & own}
    of_optimizer = {name: options[name] for name in options.keys() & {field.name for field in fields(OptimizerConfig)}}
    if "optimizer" in options:
        of_optimizer["kind"] = options["optimizer"]
    changed = dataclasses.replace(run, **given)  # checked, before it is calculated with
    schedule = run.learning_rate.stretched(changed.steps / run.steps)
    changed = dataclasses.replace(
        changed,
        optimizer=dataclasses.replace(run.optimizer, **of_optimizer),
        learning_rate=schedule if rate is None else schedule.with_peak(rate),
        said=tuple(sorted({*given, *of_optimizer})),
    )
    with_files(changed)  # refuses contradictions
    return changed
