"""The commands of `dalle-train` that train: tokenizer, dvae, clip, transformer, encode, and all of them."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from dalle.cli.command import parse, resolve_device
from dalle.cli.options import Device
from dalle.output.text import to_stderr
from training.cli.options import (
    STAGES,
    AllOptions,
    CLIPStageOptions,
    DemoOptions,
    DVAEOwnOptions,
    InAdvanced,
    InCheckpoints,
    InData,
    InMemory,
    InStage,
    InValidation,
    InWatching,
    Main,
    OrderOptions,
    RecipeName,
    Stage,
    StageOptions,
    TransformerOwnOptions,
    TransformerStageOptions,
    VocabularyOptions,
    all_options,
    arguments_of,
    changed_recipe,
    defaults,
    given_options,
    recipe_name,
    values_of,
    values_of_all,
)
from training.config import (
    CheckpointOptions,
    ClippingOptions,
    MemoryOptions,
    ReadingOptions,
    RunOptions,
    TrainConfig,
    ValidationOptions,
    WatchingOptions,
)
from training.demo.demo import is_finished, run_demo
from training.demo.unclip import run_unclip_demo
from training.plan.machine import MachinePlan, plan_here
from training.ranks.job import JobOptions, joined, to_stderr_if_open
from training.ranks.stop import Interrupted
from training.recipes import Recipe, recipe, recipes_with
from training.stage_recipes import CLIPOptions
from training.stages.all import train_all, train_all_side_by_side
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.encode import EncodeConfig, EncodeOptions
from training.stages.encoded import encode_data
from training.stages.inputs import BundleOptions, Inputs, ResumeOptions, ShardOptions, ValidationShardOptions
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer
from training.stages.unclip.decoder import train_decoder
from training.stages.unclip.prior import train_prior
from training.stages.unclip.upsampler import train_upsampler
from training.unclip_recipes import DecoderOptions, PriorOptions, UpsamplerOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """A command, and the words that gave it."""

    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Of `dalle-train`, the verb first."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by name."""
        return given_options(self, self.arguments)

    def inputs(self) -> Inputs:
        """Return what the training programs take."""
        names = {field.name for field in fields(Inputs)}
        return Inputs(**{name: value for name, value in all_options(self) if name in names})


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand(TrainCommand):
    """Train the BPE on the captions of shards."""

    recipe: RecipeName
    bundle: Main[BundleOptions]
    vocabulary: Main[VocabularyOptions]
    shards: InData[ShardOptions]

    def run(self) -> None:
        """Train it."""
        chosen = dataclasses.replace(recipe(self.recipe), text_vocab=self.vocabulary.vocab_size)
        train_tokenizer(chosen, self.inputs(), to_stderr)

    @classmethod
    def values(cls, chosen: Recipe) -> dict[str, Any]:
        """Return a recipe's values for the options."""
        return {"vocab_size": chosen.text_vocab}


@dataclass(frozen=True, kw_only=True)
class StageCommand(TrainCommand):
    """Train one neural stage."""

    stage: ClassVar[Stage]
    recipe: RecipeName
    bundle: Main[BundleOptions]
    size: Main[StageOptions]
    precision_and_seed: Main[RunOptions]
    own: InStage[object]
    shards: InData[ShardOptions]
    reading: InData[ReadingOptions]
    validation_shards: InValidation[ValidationShardOptions]
    validating: InValidation[ValidationOptions]
    saving: InCheckpoints[CheckpointOptions]
    resuming: InCheckpoints[ResumeOptions]
    memory: InMemory[MemoryOptions]
    watching: InWatching[WatchingOptions]
    job: InWatching[JobOptions]
    clipping: InAdvanced[ClippingOptions]

    @classmethod
    def values(cls, chosen: Recipe) -> dict[str, Any]:
        """Return a recipe's values for the options."""
        return values_of(chosen, cls.stage)

    def changed(self) -> Recipe:
        """Return the recipe with the options that were given."""
        return changed_recipe(recipe(self.recipe), self.stage, self.given())


@dataclass(frozen=True, kw_only=True)
class DVAECommand(StageCommand):
    """Train a dVAE on the pictures of shards.

    Small recipes warm it up as an autoencoder first, with the same options, and steps that --steps scales too.
    """

    own: Annotated[InStage[DVAEOwnOptions], tyro.conf.arg(name="dVAE")]
    stage = "dvae"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_dvae(chosen, inputs, ranks, say, init=self.own.init)


@dataclass(frozen=True, kw_only=True)
class CLIPCommand(StageCommand):
    """Train CLIP, the reranker; its negatives are the whole batch across ranks."""

    own: Annotated[InStage[CLIPOptions], tyro.conf.arg(name="CLIP")]
    stage = "clip"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_clip(chosen, inputs, ranks, say)


@dataclass(frozen=True, kw_only=True)
class TransformerCommand(StageCommand):
    """Train the transformer on captions and image tokens.

    Shards of pictures are encoded by the dVAE in every step; shards of image tokens, which `dalle-train encode` makes
    of them, are read as they are.
    """

    own: Annotated[InStage[TransformerOwnOptions], tyro.conf.arg(name="transformer")]
    stage = "transformer"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_transformer(chosen, inputs, ranks, say, tokenizer=self.own.tokenizer, dvae=self.own.dvae)


@dataclass(frozen=True, kw_only=True)
class DecoderCommand(StageCommand):
    """Train DALL·E 2's decoder on captioned pictures, with the bundle's CLIP, which stays as it is."""

    own: Annotated[InStage[DecoderOptions], tyro.conf.arg(name="decoder")]
    stage = "decoder"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_decoder(chosen, inputs, ranks, say)


@dataclass(frozen=True, kw_only=True)
class PriorCommand(StageCommand):
    """Train DALL·E 2's prior on captioned pictures, with the bundle's CLIP, which stays as it is."""

    own: Annotated[InStage[PriorOptions], tyro.conf.arg(name="prior")]
    stage = "prior"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_prior(chosen, inputs, ranks, say)


@dataclass(frozen=True, kw_only=True)
class UpsamplerCommand(StageCommand):
    """Train DALL·E 2's upsampler on pictures: crops of them, and the same in small."""

    own: Annotated[InStage[UpsamplerOptions], tyro.conf.arg(name="upsampler")]
    stage = "upsampler"

    def run(self) -> None:
        """Train it."""
        chosen, inputs = self.changed(), self.inputs()
        with joined(self.job, self.arguments) as (ranks, say):
            train_upsampler(chosen, inputs, ranks, say)


# ------------------------------------------------------------------------------------------------ several stages


@dataclass(frozen=True, kw_only=True)
class StagesCommand(TrainCommand):
    """Train all stages. Options without a stage's name go to every one."""

    bundle: Main[object]
    order: Main[OrderOptions]
    precision_and_seed: Main[RunOptions]
    dvae: StageOptions
    clip: CLIPStageOptions
    transformer: TransformerStageOptions
    reading: InData[ReadingOptions]
    validating: InValidation[ValidationOptions]
    saving: InCheckpoints[CheckpointOptions]
    memory: InMemory[MemoryOptions]
    watching: InWatching[WatchingOptions]
    job: InWatching[JobOptions]

    @classmethod
    def values(cls, chosen: Recipe) -> dict[str, Any]:
        """Return a recipe's values for the options."""
        return values_of_all(chosen)

    def given_to(self, stage: Stage) -> dict[str, Any]:
        """Return the options that were given to a stage: to every one, and to it alone."""
        shared = {field.name for kind in (TrainConfig, JobOptions) for field in fields(kind)}
        given = self.given()
        return {name: value for name, value in given.items() if name in shared} | {
            name.removeprefix(f"{stage}."): value for name, value in given.items() if name.startswith(f"{stage}.")
        }

    def changed(self, chosen: Recipe) -> Recipe:
        """Return a recipe with the options that were given."""
        for stage in STAGES:
            chosen = changed_recipe(chosen, stage, self.given_to(stage))
        return chosen

    def stage_arguments(self) -> dict[str, list[str]]:
        """Return what the command of each stage is given, besides data and folders."""
        return {stage: arguments_of(self.given_to(stage)) for stage in STAGES}


@dataclass(frozen=True, kw_only=True)
class AllCommand(StagesCommand):
    """Train tokenizer, dVAE, CLIP and transformer with one recipe, and, with --validation, measure the bundle.

    On CPU cores, stages that do not need each other are trained side by side, each by one or more processes. Options
    without a stage's name go to every stage; where stages differ, no default is shown.
    """

    recipe: RecipeName
    bundle: Main[BundleOptions]
    order: Main[AllOptions]
    shards: InData[ShardOptions]
    validation_shards: InValidation[ValidationShardOptions]

    def run(self) -> None:
        """Train everything."""
        chosen, inputs = self.changed(recipe(self.recipe)), self.inputs()
        plan = plan_here(chosen, encodes=self.order.encode_crops is not None, one_at_a_time=self.order.one_at_a_time)
        if plan.phases:
            self._side_by_side(chosen, inputs, plan)
            return
        if plan.reason:
            logger.info(plan.reason)
        with joined(self.job, self.arguments) as (ranks, say):
            train_all(chosen, inputs, ranks, say, encode_crops=self.order.encode_crops)

    def _side_by_side(self, chosen: Recipe, inputs: Inputs, plan: MachinePlan) -> None:
        self.job.check()
        try:
            train_all_side_by_side(
                chosen,
                inputs,
                plan,
                to_stderr_if_open,
                encode_crops=self.order.encode_crops,
                options=self.stage_arguments(),
            )
        except Interrupted as stopped:
            to_stderr_if_open(str(stopped))
            raise


@dataclass(frozen=True, kw_only=True)
class DemoCommand(StagesCommand):
    """Draw a small world, train everything on it, sample, rerank and check: minutes on two CPU cores.

    Stages that do not need each other are trained side by side, each by one or more processes. Options without a
    stage's name go to every stage; where stages differ, no default is shown. The world and the captions that are
    checked stay the same.
    """

    bundle: Main[DemoOptions]

    def run(self) -> None:
        """Make the demonstration."""
        chosen = self.changed(recipe("demo"))
        if not self.bundle.unclip:
            self._run_dalle(chosen)
            return
        if self.job.auto_restart:
            raise ValueError("--auto-restart does not go with --unclip: make the demonstration with it first")
        if self.bundle.fresh or not is_finished(self.bundle.out):
            self._run_dalle(chosen)
        elif others := [word for word in self.arguments if re.match("--(?!unclip|out)", word)]:
            raise ValueError(
                f"the demonstration in {self.bundle.out} is finished, and {', '.join(others)} would change nothing: "
                "leave that out, or give --fresh to make all anew"
            )
        with joined(self.job, self.arguments) as (ranks, say):
            run_unclip_demo(chosen, self.bundle.out, ranks, say, fresh=self.bundle.fresh)

    def _run_dalle(self, chosen: Recipe) -> None:
        plan = plan_here(chosen, one_at_a_time=self.order.one_at_a_time)
        # with phases, every stage is restarted by itself
        job = dataclasses.replace(self.job, auto_restart=0) if plan.phases else self.job
        with joined(job, self.arguments) as (ranks, say):
            run_demo(
                chosen,
                self.bundle.out,
                ranks,
                say,
                fresh=self.bundle.fresh,
                plan=plan,
                options=self.stage_arguments(),
            )


# ------------------------------------------------------------------------------------------------ image tokens


@dataclass(frozen=True, kw_only=True)
class EncodeCommand(TrainCommand):
    """Encode pictures once: make shards of image tokens, for `dalle-train transformer`, of shards of pictures.

    The captions stay with them. Of every picture the random crops are encoded that training would see, of which every
    epoch will take one, and the centre crop, which validation uses. The same command resumes where it was interrupted.
    """

    data: tuple[str, ...]
    """Shards of captioned pictures: files, folders, globs or brace ranges such as shards/{000000..000099}.tar."""
    dvae: Path
    """Directory of the dVAE, such as runs/mine/dvae; the transformer can be trained with this one only."""
    out: Path
    """Folder for the shards of image tokens, or its URL in a store: one for each shard of pictures, of its name."""
    device: Device = "auto"
    encoding: Main[EncodeOptions]
    shards: InData[ShardOptions]

    def run(self) -> None:
        """Encode them."""
        config = EncodeConfig(**dataclasses.asdict(self.encoding), **dataclasses.asdict(self.shards))
        with joined() as (ranks, say):
            if self.device != "auto":
                ranks = dataclasses.replace(ranks, device=resolve_device(self.device))
            encode_data(self.data, self.out, self.dvae, config, ranks, say)


# ------------------------------------------------------------------------------------------------ reading a command

Command = (
    TokenizerCommand
    | DVAECommand
    | CLIPCommand
    | TransformerCommand
    | DecoderCommand
    | PriorCommand
    | UpsamplerCommand
    | EncodeCommand
    | AllCommand
    | DemoCommand
)
COMMANDS: dict[str, type[Command]] = {
    "demo": DemoCommand,
    "all": AllCommand,
    "tokenizer": TokenizerCommand,
    "dvae": DVAECommand,
    "clip": CLIPCommand,
    "encode": EncodeCommand,
    "transformer": TransformerCommand,
    "decoder": DecoderCommand,
    "prior": PriorCommand,
    "upsampler": UpsamplerCommand,
}


def read(verb: str, arguments: Sequence[str]) -> Command:
    """Return the command that the arguments after the verb say.

    The recipe's values are the defaults. The parser finds the recipe itself: where it was looked for in the wrong
    place, it is parsed once more.

    Raises:
        ValueError: there is no such recipe.
        SystemExit: as `dalle.cli.command.parse`.
    """
    kind = COMMANDS[verb]
    command = _parsed(kind, verb, arguments, recipe_name(arguments))
    named = getattr(command, "recipe", None)
    if named is not None and named != recipe_name(arguments):
        command = _parsed(kind, verb, arguments, named)
    return dataclasses.replace(command, arguments=(verb, *arguments))


def _first_recipe(kind: type[Command]) -> str:
    """Return the first recipe that has what a command trains."""
    stage = kind.stage if issubclass(kind, StageCommand) else "dvae"
    return recipes_with(stage)[0]


def _parsed(kind: type[Command], verb: str, arguments: Sequence[str], named: str | None) -> Command:
    description = kind.__doc__ or ""
    if issubclass(kind, EncodeCommand):
        default = None
    else:
        has_recipe = not issubclass(kind, DemoCommand)
        chosen = recipe(named if has_recipe and named is not None else _first_recipe(kind))
        default = defaults(kind, kind.values(chosen))
        if has_recipe:
            description += f" Defaults are those of the recipe {chosen.name}"
            description += "." if named else f": `dalle-train {verb} RECIPE --help` shows another's."
    if {"-h", "--help"} & set(arguments):
        arguments = ["--help"]  # with a recipe before it, help would leave RECIPE out
    found: Command = parse(kind, arguments, prog=f"dalle-train {verb}", description=description, default=default)
    return found
