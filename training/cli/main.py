"""`dalle-train`: every step from pictures to a bundle."""

import dataclasses
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import resolve_device, run_program
from dalle.data.reader import ShardData
from dalle.evaluation.bundle import evaluate_bundle
from dalle.output.progress import Progress, printable
from rerank import CLIP
from training.cli.look import DESCRIPTION, PROGRAM, ReportCommand, StatusCommand, read
from training.config import GradientScaling, Offload, OptimizerKind, Precision, TrainConfig
from training.data.check_data import check_data
from training.data.check_report import report as check_report
from training.data.duplicates import EXCLUDED, SHEET, find_duplicates
from training.data.filters import ShardFilter
from training.data.shards import make_shards
from training.demo.demo import run_demo
from training.engine.deepspeed_config import preset_list, preset_path, with_files
from training.metrics import Report, to_stderr
from training.plan.machine import MachinePlan, plan_here
from training.plan.plan import make_plan
from training.plan.text import recipe_list, text
from training.plan.types import PlanOptions
from training.ranks.environment import is_supervised, tell_supervisor
from training.ranks.stop import Interrupted
from training.ranks.supervisor import supervise
from training.ranks.watch import TIMEOUT_S
from training.ranks.world import World, join_world, leave_world
from training.recipes import DVAERecipe, Recipe, recipe
from training.stages.all import train_all, train_all_side_by_side
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.encode import EncodeConfig
from training.stages.encoded import encode_data
from training.stages.exchanged_captions import measure_exchanged
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Shards:
    recipe: tyro.conf.Positional[str]
    """Name of a recipe; `dalle-train plan` lists them."""
    data: tuple[str, ...]
    """Shards to train on: files, folders, globs or brace ranges such as shards/{000000..000099}.tar."""
    out: Path
    """The bundle's directory: tokenizer.json, dvae/, dalle/ and clip/ for use, training/ with the runs behind them."""
    fresh: bool = False
    """Start anew, over a run that is there. Without it, a run goes on from its newest checkpoint."""
    skip_damaged_shards: bool = False
    """Use the whole samples of truncated shards instead of stopping."""
    manifest: Path | None = None
    """Folder that `dalle-train check-data --out` wrote about these shards. With it, samples that shards have lost and
    bytes that have changed since are noticed, and count as unusable; the order of all the others stays."""

    def inputs(self) -> Inputs:
        """Return what the programs take."""
        return Inputs(
            data=self.data,
            out=self.out,
            fresh=self.fresh,
            skip_damaged_shards=self.skip_damaged_shards,
            manifest=self.manifest,
        )


@dataclass(frozen=True, kw_only=True)
class _Data(_Shards):
    validation: tuple[str, ...] = ()
    """Shards to validate on."""
    validation_manifest: Path | None = None
    """Folder that `dalle-train check-data --out` wrote about the shards to validate on."""

    def inputs(self) -> Inputs:
        """Return what the programs take."""
        return dataclasses.replace(
            super().inputs(), validation=self.validation, validation_manifest=self.validation_manifest
        )


@dataclass(frozen=True, kw_only=True)
class _Watched:
    timeout: float = TIMEOUT_S
    """Seconds in which something must move, four times as many before the first step. After that the stacks of all
    ranks are written to stacks/ in the run's directory, the ranks that fell behind are named, and training ends."""
    auto_restart: int = 0
    """How often to start training again, from its newest checkpoint, after a crash, a kill, a lost rank or a hang."""


@dataclass(frozen=True, kw_only=True)
class _Stage(_Data, _Watched):
    steps: int | None = None
    """Optimizer steps; the recipe's if not given, as with all options below. Schedules that end at a step (learning
    rate, β, τ) are stretched in proportion, also when a run goes on, whose rate then jumps; warm-up and plateaus of the
    paper's transformer, and the intervals of validation and samples, stay as they are."""
    learning_rate: float | None = None
    """Highest learning rate; the recipe's schedule is scaled to it."""
    global_batch: int | None = None
    """Samples per optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Samples per rank and forward pass; gradient accumulation is derived."""
    precision: Precision | None = None
    """fp32, autocast (bfloat16 arithmetic, float32 weights), autocast-fp16 (float16 arithmetic in the transformer's
    residual branches, float32 weights), bf16 or fp16 (weights of half precision, float32 masters; need ZeRO 1, 2 or 3).
    fp16 has a dynamic loss scale, and needs a device that computes in it."""
    zero_stage: int | None = None
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload: Offload | None = None
    """What is kept and updated in the CPU's memory: none, optimizer (ZeRO 1, 2 or 3) or parameters (too; ZeRO 3)."""
    optimizer: OptimizerKind | None = None
    """adamw, or muon (transformer and CLIP): Muon for the matrices of the layers and AdamW for everything else, with
    the same learning rate and weight decay. Not the paper's. A run goes on with the one that it began with."""
    gradient_clipping: float | None = None
    """Largest global gradient norm; 0 for none."""
    variance_clip: float | None = None
    """Largest value of AdamW's running variance; the paper's is 5."""
    max_skipped_steps: int | None = None
    """Stop when more than this many steps in a row are skipped because a loss or gradient is not finite."""
    preset: str | None = None
    """Precision, ZeRO stage and offloading at once: a name that `dalle-train presets` lists."""
    deepspeed_config: Path | None = None
    """Your own DeepSpeed JSON, merged over what is derived. It may change what the recipe says; where it contradicts
    another option, or the batch, both are named and nothing is started."""
    seed: int | None = None
    """Of weights, sample order, augmentation and noise."""
    workers: int | None = None
    """Reading processes per rank."""
    max_bad_fraction: float | None = None
    """Stop when more than this fraction of the samples is unusable."""
    log_every: int | None = None
    """Steps between two lines of metrics."""
    validate_every: int | None = None
    """Steps between two validations; 0 for the end only."""
    validation_samples: int | None = None
    """Validate on this many of the validation samples, chosen by chance but always the same, instead of on all."""
    sample_every: int | None = None
    """Steps between two sample pictures; 0 for the end only."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints."""
    peak_tflops: float | None = None
    """TFLOP/s that one of the devices can do at best, for the model FLOP/s utilisation (MFU) that is logged. Known for
    common GPUs, and measured on a CPU."""
    wandb: str | None = None
    """Log to this project of Weights & Biases too; needs `pip install wandb`. With WANDB_MODE=offline it
    stays on the disk."""
    keep_last: int | None = None
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of it are kept for good; 0 for none."""
    resume: bool = False
    """Go on from the newest good checkpoint, as happens without it if there is one; with it, there must be one."""
    resume_from: str | None = None
    """Go back to this checkpoint, such as step00000500. From then on it is the newest: a run that is started again goes
    on from it, and later ones are deleted when the run saves again."""

    def inputs(self) -> Inputs:
        """Return what the programs take."""
        return dataclasses.replace(super().inputs(), resume=self.resume, resume_from=self.resume_from)

    def override(self, config: TrainConfig) -> TrainConfig:
        """Return the recipe's run with the options that were given.

        Raises:
            ValueError: they are impossible, or contradict a preset or a DeepSpeed JSON.
        """
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate is {self.learning_rate}; expected a number above 0, such as 1e-4")
        names = {field.name for field in dataclasses.fields(self)} & {
            field.name for field in dataclasses.fields(config)
        }
        names -= {"learning_rate", "optimizer"}  # a number and a kind here, a schedule and all settings there
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        in_optimizer = {name: getattr(self, name) for name in ("gradient_clipping", "variance_clip")}
        in_optimizer["kind"] = self.optimizer
        in_optimizer = {name: value for name, value in in_optimizer.items() if value is not None}
        given["optimizer"] = dataclasses.replace(config.optimizer, **in_optimizer)
        changed = dataclasses.replace(config, **given, said=tuple(sorted({*given, *in_optimizer} - {"optimizer"})))
        schedule = config.learning_rate.stretched(changed.steps / config.steps)
        if self.learning_rate is not None:
            schedule = schedule.with_peak(self.learning_rate)
        run = dataclasses.replace(changed, learning_rate=schedule)
        with_files(run)  # before anything is read
        return run


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand(_Shards):
    """Train the BPE from the captions of shards."""

    vocab_size: int | None = None
    """Entries, at most; the recipe's if not given."""


@dataclass(frozen=True, kw_only=True)
class DVAECommand(_Stage):
    """Train a dVAE on the pictures of shards.

    Small recipes warm it up as an autoencoder first, with the same options but as many steps as the recipe says.
    """

    init: Path | None = None
    """Go on training this dVAE, for example imported weights, instead of starting from scratch."""


@dataclass(frozen=True, kw_only=True)
class TransformerCommand(_Stage):
    """Train the transformer on captions and image tokens.

    Shards of pictures are encoded by the dVAE in every step; shards of image tokens, which `dalle-train encode` makes
    of them, are read as they are.
    """

    tokenizer: Path | None = None
    """tokenizer.json to use, copied into OUT, which may hold no other; OUT/tokenizer.json if not given."""
    dvae: Path | None = None
    """dVAE directory to use, copied into OUT, which may hold no other; OUT/dvae if not given."""
    init_scale: float | None = None
    """Factor of the standard deviations of the first weights; 1 for the paper's. Not used when a run goes on."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool | None = None
    """Compile the layers: faster steps, after a minute or so at the start. Where that fails, a warning says why."""
    gradient_scaling: GradientScaling | None = None
    """per-resblock: the paper's gradient scale for each residual branch. Needs autocast-fp16, ZeRO 0 or 1."""
    powersgd_rank: int | None = None
    """Send the gradients of matrices as factors of this rank: less to send, some of it late. ZeRO 0 or 1; 0 for off."""
    null_caption_probability: float | None = None
    """Fraction of captions replaced by the empty one; guidance needs some, such as 0.1."""


@dataclass(frozen=True, kw_only=True)
class CLIPCommand(_Stage):
    """Train CLIP, the reranker; its negatives are the whole batch across ranks."""

    hard_negatives: int | None = None
    """Wrong captions per picture, made of its own by exchanging or replacing words, as further negatives, because the
    captions of other pictures hardly ask for order; the recipe's if not given, none but for the built-in world. The
    text tower reads them all: 3 make its work four times as large."""


@dataclass(frozen=True, kw_only=True)
class AllCommand(_Data, _Watched):
    """Train tokenizer, dVAE, CLIP and transformer with one recipe, and evaluate the bundle.

    On CPU cores, stages that do not need each other are trained side by side, each by one or more processes.
    """

    one_at_a_time: bool = False
    """Train one stage after the other, in this process; so it is on GPUs, under a launcher, and where memory is short.
    The results are the same but for rounding."""
    encode_crops: int | None = None
    """Encode the pictures once, before the transformer: this many random crops of each, of which every epoch takes one.
    The image tokens go to OUT/encoded. Without it the dVAE encodes in every step, another crop each time."""


@dataclass(frozen=True, kw_only=True)
class EncodeCommand:
    """Encode pictures once: make shards of image tokens, for `dalle-train transformer`, of shards of pictures.

    The captions stay with them. Of every picture the random crops are encoded that training would see, of which every
    epoch will take one, and the centre crop, which validation uses. The same command goes on where it was interrupted.
    """

    data: tuple[str, ...]
    """Shards of captioned pictures: files, folders, globs or brace ranges such as shards/{000000..000099}.tar."""
    dvae: Path
    """Directory of the dVAE, such as runs/mine/dvae. The transformer can be trained with this one only."""
    out: Path
    """Folder for the shards of image tokens: one for each shard of pictures, of the same name."""
    crops: int = EncodeConfig.crops
    """Random crops of each picture, besides the centre crop. 0 for shards of validation pictures."""
    seed: int = EncodeConfig.seed
    """Of the random crops."""
    batch_size: int = EncodeConfig.batch_size
    """Crops that the dVAE encodes at once."""
    workers: int = EncodeConfig.workers
    """Processes that read and crop, per rank."""
    max_bad_fraction: float = EncodeConfig.max_bad_fraction
    """Stop when more than this fraction of the pictures is unusable."""
    device: str | None = None
    """Where to compute: cpu, cuda or cuda:1; the rank's GPU if there is one, otherwise the CPU, if not given."""
    fresh: bool = False
    """Encode anew, over shards of image tokens that are there."""
    skip_damaged_shards: bool = False
    """Use the whole samples of truncated shards instead of stopping."""
    manifest: Path | None = None
    """Folder that `dalle-train check-data --out` wrote about these shards: what changed since is noticed."""

    def config(self) -> EncodeConfig:
        """Return what the program takes."""
        names = [field.name for field in dataclasses.fields(EncodeConfig)]
        return EncodeConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure a bundle on captioned pictures it was not trained on, and sample a sheet."""

    bundle: tyro.conf.Positional[Path]
    """The bundle's directory."""
    data: tuple[str, ...]
    """Shards to measure on."""
    captions: int = 5
    """Captions of these shards to sample for the sheet."""
    device: str = "cpu"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """Draw a small world, train everything on it, sample, rerank and check: minutes on two CPU cores.

    Stages that do not need each other are trained side by side, each by one or more processes.
    """

    out: Path = Path("runs/demo")
    """Where the bundle, the sheet and the table go."""
    seed: int = 0
    """Of weights, sample order and noise in all stages; the world and the captions that are checked stay the same."""
    fresh: bool = False
    """Train anew instead of reusing what is there."""
    one_at_a_time: bool = False
    """Train one stage after the other, in this process, as where memory is short. The results are the same but for
    rounding."""


@dataclass(frozen=True, kw_only=True)
class ShardsCommand:
    """Make WebDataset shards from pictures and captions.

    The source is a folder of pictures with .txt captions beside them, a CSV, TSV or JSONL file, or the JSON of COCO.
    """

    source: tyro.conf.Positional[Path]
    """Folder, table or annotation file."""
    out: Path
    """Folder for the shards and report.json."""
    images: Path | None = None
    """Folder that the table's picture names are relative to; the table's own if not given."""
    samples_per_shard: int = 1000
    """Samples in one tar."""
    paper_filters: bool = False
    """Filter as the paper does, as far as it says how: captions of at least 3 words that are not mostly boilerplate,
    and aspect ratios within 1/2 … 2. Options below take precedence."""
    min_caption_chars: int | None = None
    """Captions of fewer characters are left out."""
    max_caption_chars: int | None = None
    """Captions of more characters are left out."""
    min_caption_words: int | None = None
    """Captions of fewer words are left out."""
    max_caption_words: int | None = None
    """Captions of more words are left out."""
    drop_boilerplate: bool = False
    """Leave out captions such as "photographed on 3 March 2019" or "stock photo", with hardly a word besides."""
    min_side: int | None = None
    """Pictures with a side of fewer pixels are left out."""
    max_aspect_ratio: float | None = None
    """Pictures longer than this times their width, or wider, are left out; the paper's is 2."""
    overwrite: bool = False
    """Replace shards of the same name that are there."""

    def keep(self) -> ShardFilter:
        """Return which pictures are kept."""
        chosen = ShardFilter.of_the_paper() if self.paper_filters else ShardFilter()
        names = ("min_caption_chars", "max_caption_chars", "min_caption_words", "max_caption_words", "min_side")
        given = {name: getattr(self, name) for name in (*names, "max_aspect_ratio") if getattr(self, name) is not None}
        return dataclasses.replace(chosen, **given, drop_boilerplate=self.drop_boilerplate or chosen.drop_boilerplate)


@dataclass(frozen=True, kw_only=True)
class CheckDataCommand:
    """Check shards: read and decode everything in them once, and say what is wrong and what to do.

    Nothing in the shards is changed. What is found is no error: the exit code is 0.
    """

    data: tuple[str, ...]
    """Shards: files, folders, globs or brace ranges such as shards/{000000..000099}.tar; also those of image tokens."""
    out: Path | None = None
    """Folder for the manifest, which training takes as --manifest; shards that it knows and that have not changed are
    not read again. Without it, only the report is printed."""
    workers: int | None = None
    """Processes that read; one for each core if not given, 0 for this one alone."""
    tokenizer: Path | None = None
    """tokenizer.json, to count the captions' tokens."""
    exclude_keys: tuple[Path, ...] = ()
    """Files of samples that training with this manifest leaves out, such as its own duplicates.jsonl or unusable.jsonl,
    or the excluded.jsonl of `dalle-train duplicates`: lines of {"shard": …, "key": …}."""
    overwrite: bool = False
    """Replace what the manifest in OUT knows: shards that have changed or are gone, and samples left out. A run that
    began with it may need it as it was."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesCommand:
    """Find near-duplicates by CLIP's features: within some pictures, or between those to train and to validate on.

    OUT gets pairs.jsonl, the pairs with their cosines (with --against: the nearest picture for each of those);
    pairs.png, which shows pairs by their cosine, to choose the threshold by; and excluded.jsonl, what to leave out.
    """

    data: tuple[str, ...]
    """Shards of pictures in which copies are looked for."""
    clip: Path
    """Directory of a CLIP, or of a bundle."""
    out: Path
    """Folder for what is found."""
    against: tuple[str, ...] = ()
    """Shards of validation pictures: pictures of --data near one of these are to be left out. Without it, the pictures
    of --data are compared among themselves, and the later one of two is to be left out."""
    threshold: float = 0.97
    """Cosine from which two pictures are taken to be the same. It depends on the CLIP: look at pairs.png."""
    workers: int = 1
    """Processes that read."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:1."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Show what a recipe needs: parameters, arithmetic, bytes per GPU in every mode, time, and what to train with."""

    recipe: tyro.conf.Positional[str | None] = None
    """Name of a recipe; without one, all are listed."""
    gpus: int = 8
    """GPUs to share the work."""
    gpu_memory: float = 80.0
    """Memory of one of them, GiB."""
    micro_batch: int | None = None
    """Samples per GPU and forward pass; the recipe's, or the share of a GPU if that is less, if not given."""
    precision: Precision | None = None
    """Instead of the recipe's."""
    optimizer: OptimizerKind | None = None
    """Of the layers' matrices, instead of the recipe's: muon needs half of AdamW's moments for them."""
    mfu: float = 0.4
    """Fraction of the GPUs' arithmetic that training is assumed to use; its log names the real one."""
    peak_tflops: float | None = None
    """Arithmetic of one GPU, 10¹² operations a second: 312 for an A100, 989 for an H100, which is the default."""
    json: bool = False
    """Print it as JSON, sizes in bytes."""


@dataclass(frozen=True, kw_only=True)
class PresetsCommand:
    """List the DeepSpeed configurations that --preset takes, or print one to be copied and changed."""

    name: tyro.conf.Positional[str | None] = None
    """Name of a preset; without one, all are listed."""


Command = (
    Annotated[DemoCommand, tyro.conf.subcommand("demo")]
    | Annotated[AllCommand, tyro.conf.subcommand("all")]
    | Annotated[ShardsCommand, tyro.conf.subcommand("shards")]
    | Annotated[CheckDataCommand, tyro.conf.subcommand("check-data")]
    | Annotated[DuplicatesCommand, tyro.conf.subcommand("duplicates")]
    | Annotated[TokenizerCommand, tyro.conf.subcommand("tokenizer")]
    | Annotated[DVAECommand, tyro.conf.subcommand("dvae")]
    | Annotated[EncodeCommand, tyro.conf.subcommand("encode")]
    | Annotated[TransformerCommand, tyro.conf.subcommand("transformer")]
    | Annotated[CLIPCommand, tyro.conf.subcommand("clip")]
    | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
    | Annotated[StatusCommand, tyro.conf.subcommand("status")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[PresetsCommand, tyro.conf.subcommand("presets")]
)


class _Ended(Exception):  # noqa: N818  # not an error
    """The training of a supervised job has ended."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _to_whoever_listens(line: str) -> None:
    """Print a line; a terminal or a launcher that is gone, and its end of the pipe with it, stops no training."""
    with suppress(OSError):
        to_stderr(line)


def _warn_of_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in a line that a thread, such as the one that writes TensorBoard's files, could not write."""
    if isinstance(failed.exc_value, OSError):
        logger.warning("%s ended: %s", failed.thread.name if failed.thread else "a thread", failed.exc_value)
    else:
        threading.__excepthook__(failed)


@contextmanager
def _world(timeout_s: float = TIMEOUT_S) -> Iterator[tuple[World, Report]]:
    """Join the ranks; inside, `report` prints on the first one alone.

    Args:
        timeout_s: seconds without progress in a run after which it counts as hung.

    Raises:
        Interrupted: what was raised inside, after it was reported.
        RankLostError: another rank is gone; in place of the RuntimeError that a collective raised inside.
    """
    world = join_world(timeout_s)
    report: Report = _to_whoever_listens if world.is_first else (lambda _line: None)
    world.watch.start()
    hook, threading.excepthook = threading.excepthook, _warn_of_a_thread
    try:
        yield world, report
        leave_world()
    except Interrupted as stopped:
        report(str(stopped))
        leave_world()
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None and world.watch.run:
            error.filename = str(world.watch.run)  # of a file that was open: the disk is full, or fails
        lost = world.watch.lost_rank_error(error)
        if lost is None:
            if isinstance(error, ValueError):
                tell_supervisor("final")
            world.watch.tell_failure(" ".join(str(error).split()) or type(error).__name__)
        else:
            tell_supervisor("lost")
        leave_world(after_error=True)
        if lost is not None:
            raise lost from error
        raise
    finally:
        threading.excepthook = hook
        world.watch.stop()


def _run(command: Command, argv: Sequence[str]) -> None:
    plan = MachinePlan()
    if isinstance(command, AllCommand):
        plan = plan_here(
            recipe(command.recipe), encodes=command.encode_crops is not None, one_at_a_time=command.one_at_a_time
        )
    if isinstance(command, _Watched):
        _require_sensible(command)
        if command.auto_restart and not is_supervised() and not plan.phases:  # else every stage is, by itself
            raise _Ended(supervise(argv, command.auto_restart))
    match command:
        case ShardsCommand():
            _make_shards(command)
        case CheckDataCommand():
            _check_data(command)
        case DuplicatesCommand():
            _find_duplicates(command)
        case PlanCommand():
            print(recipe_list() if command.recipe is None else _plan(command, recipe(command.recipe)))
        case StatusCommand() | ReportCommand():
            read(command)
        case PresetsCommand():
            print(preset_list() if command.name is None else preset_path(command.name).read_text().rstrip())
        case EvaluateCommand():
            data = ShardData.open(command.data, captions=True)
            device = str(resolve_device(command.device))
            n = command.captions
            evaluate_bundle(command.bundle, data, to_stderr, n_captions=n, device=device, also=measure_exchanged)
        case DemoCommand():
            chosen = recipe("demo").with_seed(command.seed)
            plan = plan_here(chosen, one_at_a_time=command.one_at_a_time)
            with _world() as (world, report):
                run_demo(chosen, command.out, world, report, fresh=command.fresh, plan=plan)
        case AllCommand() if plan.phases:
            _train_side_by_side(command, plan)
        case EncodeCommand():
            config = command.config()
            with _world() as (world, report):
                _encode(command, config, world, report)
        case _:
            if plan.reason:
                logger.info(plan.reason)
            _train(command, recipe(command.recipe))


def _train_side_by_side(command: AllCommand, plan: MachinePlan) -> None:
    try:
        train_all_side_by_side(
            recipe(command.recipe),
            command.inputs(),
            plan,
            _to_whoever_listens,
            encode_crops=command.encode_crops,
            options=("--timeout", str(command.timeout), "--auto-restart", str(command.auto_restart)),
        )
    except Interrupted as stopped:
        _to_whoever_listens(str(stopped))
        raise


def _require_sensible(command: _Watched) -> None:
    if not 0 < command.timeout < math.inf:
        raise ValueError(f"--timeout is {command.timeout}; expected seconds above 0, such as 1800")
    if command.auto_restart < 0:
        raise ValueError(f"--auto-restart is {command.auto_restart}; expected a number of restarts, such as 3")


def _train(command: _Shards, chosen: Recipe) -> None:
    """Run one of the training programs with the options given."""
    inputs = command.inputs()
    match command:
        case TokenizerCommand():
            vocab = command.vocab_size if command.vocab_size is not None else chosen.text_vocab
            train_tokenizer(dataclasses.replace(chosen, text_vocab=vocab), inputs, to_stderr)
        case DVAECommand():
            changed = dataclasses.replace(chosen, dvae=_overridden(command, chosen.dvae))
            with _world(command.timeout) as (world, report):
                train_dvae(changed, inputs, world, report, init=command.init)
        case TransformerCommand():
            transformer = dataclasses.replace(chosen.transformer, train=command.override(chosen.transformer.train))
            names = ("null_caption_probability", "init_scale")
            given = {name: getattr(command, name) for name in names if getattr(command, name) is not None}
            transformer = dataclasses.replace(transformer, **given)
            with _world(command.timeout) as (world, report):
                changed = dataclasses.replace(chosen, transformer=transformer)
                train_transformer(changed, inputs, world, report, tokenizer=command.tokenizer, dvae=command.dvae)
        case CLIPCommand():
            clip = dataclasses.replace(
                chosen.clip,
                train=command.override(chosen.clip.train),
                warmup=_warmup(command, chosen.clip.warmup),
            )
            if command.hard_negatives is not None:
                clip = dataclasses.replace(clip, hard_negatives=command.hard_negatives)
            with _world(command.timeout) as (world, report):
                train_clip(dataclasses.replace(chosen, clip=clip), inputs, world, report)
        case AllCommand():
            with _world(command.timeout) as (world, report):
                train_all(chosen, inputs, world, report, encode_crops=command.encode_crops)


def _warmup(command: _Stage, warmup: TrainConfig | None) -> TrainConfig | None:
    """Return a warm-up with the options that were given, but its own steps and learning rate."""
    return warmup and dataclasses.replace(command, steps=None, learning_rate=None).override(warmup)


def _overridden(command: DVAECommand, chosen: DVAERecipe) -> DVAERecipe:
    """Return the dVAE's recipe with the options that were given."""
    train = command.override(chosen.train)
    factor = train.steps / chosen.train.steps
    return dataclasses.replace(
        chosen,
        train=train,
        kl_weight=chosen.kl_weight.stretched(factor),
        temperature=chosen.temperature.stretched(factor),
        warmup=_warmup(command, chosen.warmup),
    )


def _plan(command: PlanCommand, chosen: Recipe) -> str:
    """Return what `plan` prints."""
    names = [field.name for field in dataclasses.fields(PlanOptions)]
    made = make_plan(chosen, PlanOptions(**{name: getattr(command, name) for name in names}))
    return made.as_json() if command.json else text(made)


def _encode(command: EncodeCommand, config: EncodeConfig, world: World, report: Report) -> None:
    if command.device is not None:
        world = dataclasses.replace(world, device=resolve_device(command.device))
    encode_data(command.data, command.out, command.dvae, config, world, report)


def _check_data(command: CheckDataCommand) -> None:
    workers = command.workers if command.workers is not None else os.cpu_count() or 1
    with ExitStack() as stack:
        out = command.out
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(Progress("shards"))
        summary = check_data(
            command.data,
            out,
            workers=workers,
            tokenizer=command.tokenizer,
            exclude=command.exclude_keys,
            overwrite=command.overwrite,
            progress=progress.update,
        )
    print(printable(check_report(summary, command.out)))


def _find_duplicates(command: DuplicatesCommand) -> None:
    directory = command.clip / "clip" if (command.clip / "clip").is_dir() else command.clip
    clip = CLIP.load(directory).to(resolve_device(command.device)).eval()
    data = ShardData.open(command.data, captions=False)
    against = ShardData.open(command.against, captions=False) if command.against else None
    with Progress("pictures") as progress:
        found = find_duplicates(
            data,
            against,
            clip,
            command.out,
            threshold=command.threshold,
            workers=command.workers,
            progress=progress.update,
        )
    print(f"{found}\nto choose the threshold, look at {command.out / SHEET}")
    if found.n_excluded:
        print(f"to leave them out, give {command.out / EXCLUDED} to `dalle-train check-data --exclude-keys`")


def _make_shards(command: ShardsCommand) -> None:
    with Progress("pictures") as progress:
        report = make_shards(
            command.source,
            command.out,
            images=command.images,
            samples_per_shard=command.samples_per_shard,
            keep=command.keep(),
            overwrite=command.overwrite,
            progress=progress.update,
        )
    print(printable(report.table()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dalle-train`; returns the exit code: 1 after an error, otherwise 0.

    An interruption that saved everything is a success too: the scheduler that asked for it repeats the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return run_program(Command, partial(_run, argv=arguments), arguments, prog=PROGRAM, description=DESCRIPTION)
    except Interrupted:
        return 0
    except _Ended as ended:
        return ended.code
