"""The training programs: what each stage reads, what it trains, where it writes.

Shared by `dalle-train` and the demonstration. All stages of a bundle share one directory: tokenizer.json, dvae/, dalle/
and clip/ for use, and `training/<stage>/` with the runs behind them.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle.model import DALLE
from dalle.output.progress import Progress
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from rerank.model import CLIP
from rerank.tokenizer import CLIPTokenizer
from storage.atomic import copy_folder, replace_text
from storage.model_directory import directory_hash
from training.config import TrainConfig
from training.data.manifest import Manifest
from training.data.reader import ShardData
from training.data.shard_index import expand_shards
from training.engine.checkpoints import latest_tag
from training.loop.fit import RunPlan, fit, refuse_another_run
from training.metrics import Report
from training.plan.machine import MachinePlan, Share
from training.plan.plan import flops_per_sample
from training.ranks.side_by_side import Job, TimeLeft, run_jobs
from training.ranks.world import World, on_first_rank
from training.recipes import Recipe
from training.stages.clip import CLIPStage, CLIPWarmupStage, check_negatives
from training.stages.dvae import DVAEStage, WarmupStage, initialise_codebook
from training.stages.encode import EncodeConfig, EncodeReport, encode_shards, token_shards
from training.stages.evaluate import evaluate_bundle
from training.stages.transformer import TransformerStage

logger = logging.getLogger(__name__)

CODEBOOK_IMAGES = 1024
"""Pictures from whose positions the codebook of a warmed-up dVAE is made."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every stage is given."""

    data: Sequence[str | Path]
    """Shards to train on: files, folders, globs or brace ranges."""
    validation: Sequence[str | Path] = ()
    """Shards to validate on."""
    out: Path
    """The bundle's directory."""
    fresh: bool = False
    """Start anew although there is a checkpoint."""
    resume: bool = False
    """Go on from a checkpoint: there must be one."""
    resume_from: str | None = None
    """The checkpoint to go back to, such as step00000500; None for the newest."""
    skip_damaged_shards: bool = False
    """Use the whole samples of truncated shards instead of stopping."""
    manifest: Path | None = None
    """Folder that `dalle-train check-data` wrote about the shards to train on."""
    validation_manifest: Path | None = None
    """The same about the shards to validate on."""

    def __post_init__(self) -> None:
        if self.fresh and (self.resume or self.resume_from is not None):
            raise ValueError("--fresh starts anew, --resume and --resume-from go on: give one of them")

    def open(self, *, captions: bool, encoded: bool = False) -> tuple[ShardData, ShardData | None]:
        """Return the training and the validation data.

        Args:
            captions: whether samples need captions.
            encoded: whether image tokens will do in place of pictures.

        Raises:
            FileNotFoundError: there are no shards.
            ValueError: a shard is damaged, has nothing usable in it, or has image tokens in place of pictures; a
                manifest cannot be used.
        """
        train = self._open(self.data, self.manifest, captions=captions, encoded=encoded)
        return train, self.open_validation(captions=captions, encoded=encoded) if self.validation else None

    def open_validation(self, *, captions: bool, encoded: bool = False) -> ShardData:
        """Return the validation data; arguments and errors as those of `open`."""
        return self._open(self.validation, self.validation_manifest, captions=captions, encoded=encoded)

    def _open(
        self, patterns: Sequence[str | Path], manifest: Path | None, *, captions: bool, encoded: bool
    ) -> ShardData:
        return ShardData.open(
            patterns,
            captions=captions,
            encoded=encoded,
            skip_damaged=self.skip_damaged_shards,
            manifest=None if manifest is None else Manifest.open(manifest),
        )

    def run_directory(self, stage: str) -> Path:
        """Return where a stage's run is kept."""
        return self.out / "training" / stage

    def run_plan(self, stage: str, description: dict[str, Any], *, flops_per_sample: float | None = None) -> RunPlan:
        """Return where a stage's run reads and writes, and how it starts."""
        return RunPlan(
            directory=self.run_directory(stage),
            description=description,
            fresh=self.fresh,
            resume=self.resume,
            resume_from=self.resume_from,
            flops_per_sample=flops_per_sample,
        )


def train_tokenizer(recipe: Recipe, inputs: Inputs, report: Report) -> Path:
    """Train the BPE on all captions of the shards; returns the file.

    Raises:
        ValueError: there is one, and `inputs.fresh` does not say to replace it.
    """
    path = inputs.out / "tokenizer.json"
    if path.exists() and not inputs.fresh:
        raise ValueError(
            f"{path} is there, and a transformer may have been trained with it: give another --out, or --fresh to "
            "replace it"
        )
    data, _ = inputs.open(captions=True, encoded=True)
    tokenizer = Tokenizer.train(_all_captions(data), vocab_size=recipe.text_vocab)
    inputs.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    report(f"tokenizer: {tokenizer.vocab_size} entries from the captions of {len(data)} samples, saved as {path}")
    return path


def train_dvae(recipe: Recipe, inputs: Inputs, world: World, report: Report, *, init: Path | None = None) -> Path:
    """Train a dVAE, from scratch or from the directory `init`; returns its directory.

    From scratch, it is warmed up first if the recipe says so.
    """
    stage_recipe = recipe.dvae
    data, validation = inputs.open(captions=False)
    goes_on = _goes_on("dvae", inputs, world)
    torch.manual_seed(stage_recipe.train.seed)
    model = DVAE.load(init) if init is not None else DVAE(stage_recipe.model)
    if init is None and stage_recipe.warmup is not None and not goes_on:  # else the weights come from the checkpoint
        model = _warmed_up(recipe, stage_recipe.warmup, model, inputs, data, validation, world, report)
        inputs = dataclasses.replace(inputs, resume=False, resume_from=None)  # the warm-up has gone on
    model = _channels_last(model.to(world.device))
    directory = inputs.out / "dvae"
    stage = DVAEStage(stage_recipe, model, directory, validation or data, {"recipe": recipe.name})
    description = {
        "stage": "dvae",
        "recipe": recipe.name,
        "model": dataclasses.asdict(model.config),
        "init": str(init) if init else None,
    }
    plan = inputs.run_plan("dvae", description)
    _note_data(plan, data, world)
    fit(stage, stage_recipe.train, world, data, validation, plan, report)
    return directory


def _goes_on(stage: str, inputs: Inputs, world: World) -> bool:
    """Return whether a stage goes on from a checkpoint, and so needs no warm-up; made afresh, it has none from now on.

    Else a command interrupted in the warm-up would later go on from what was there before.
    """
    checkpoints = inputs.run_directory(stage) / "checkpoints"
    if inputs.fresh:
        on_first_rank(lambda: shutil.rmtree(checkpoints, ignore_errors=True), world)
    return not inputs.fresh and latest_tag(checkpoints) is not None


def _warmed_up(
    recipe: Recipe,
    warmup: TrainConfig,
    model: DVAE,
    inputs: Inputs,
    data: ShardData,
    validation: ShardData | None,
    world: World,
    report: Report,
) -> DVAE:
    """Train a new dVAE as an autoencoder, and return it with a codebook made from what it has learned."""
    run = inputs.run_directory("dvae-warmup")
    model = _channels_last(model.to(world.device))
    stage = WarmupStage(recipe.dvae, model, run / "autoencoder", validation or data, {"recipe": recipe.name})
    description = {"stage": stage.name, "recipe": recipe.name, "model": dataclasses.asdict(model.config)}
    plan = inputs.run_plan("dvae-warmup", description)
    fit(stage, warmup, world, data, validation, plan, report)
    warm = DVAE.load(stage.directory)
    images, _ = stage.first_images(CODEBOOK_IMAGES, data)
    initialise_codebook(warm, images, seed=warmup.seed)
    return warm


def _channels_last(model: DVAE) -> DVAE:
    """Put a dVAE's weights into the memory layout in which convolutions are fastest; ZeRO 1 to 3 undo it."""
    placed: DVAE = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return placed


def train_transformer(
    recipe: Recipe,
    inputs: Inputs,
    world: World,
    report: Report,
    *,
    tokenizer: Path | None = None,
    dvae: Path | None = None,
) -> Path:
    """Train the transformer, on the bundle's tokenizer and dVAE; returns its directory.

    A tokenizer file and a dVAE's directory that are named are copied into the bundle, which cannot be loaded without.
    The data may be shards of image tokens of this dVAE.

    Raises:
        FileNotFoundError: the tokenizer or the dVAE is missing.
        ValueError: the bundle holds another tokenizer or dVAE than the one named; the image tokens are of another dVAE;
            or as `fit`.
    """
    stage_recipe = recipe.transformer
    text_bpe = Tokenizer.load(tokenizer or inputs.out / "tokenizer.json")
    dvae_directory = dvae or inputs.out / "dvae"
    image_coder = _channels_last(DVAE.load(dvae_directory))
    data, validation = inputs.open(captions=True, encoded=True)
    _require_tokens_of(image_coder, dvae_directory, data, validation)
    if data.encoding is None:  # else only the sample sheets need it, on the first rank
        image_coder = image_coder.to(world.device)
    config = dataclasses.replace(
        stage_recipe.model,
        text_vocab=text_bpe.vocab_size,
        image_vocab=image_coder.config.vocab_size,
        grid=image_coder.config.grid,
    )
    torch.manual_seed(stage_recipe.train.seed)
    model = DALLE(config)
    if stage_recipe.init_scale != 1:
        model.initialise(scale=stage_recipe.init_scale)
    if stage_recipe.init_from_codebook:
        model.initialise_from_codebook(image_coder.decoder.codebook.cpu())
    model = model.to(world.device)
    model.activation_checkpointing = stage_recipe.train.activation_checkpointing
    if stage_recipe.train.compile:
        model.compile_layers()
    hashes = {"tokenizer_hash": text_bpe.hash, "dvae_hash": directory_hash(dvae_directory)}
    metadata = {
        "recipe": recipe.name,
        "null_caption_probability": stage_recipe.null_caption_probability,
        "sampling": dataclasses.asdict(stage_recipe.sampling),
        **hashes,
    }
    captions = _first_captions(validation or data, 8)
    directory = inputs.out / "dalle"
    stage = TransformerStage(stage_recipe, model, text_bpe, image_coder, directory, captions, metadata)
    description = {"stage": "transformer", "recipe": recipe.name, "model": dataclasses.asdict(config), **hashes}
    sizes = model.n_parameters()
    flops = flops_per_sample(config, sizes["attention"] + sizes["mlp"])
    plan = inputs.run_plan("transformer", description, flops_per_sample=flops)
    refuse_another_run(plan)  # before the bundle is given parts
    on_first_rank(lambda: _complete_bundle(inputs.out, tokenizer, dvae), world)
    _note_data(plan, data, world)
    fit(stage, stage_recipe.train, world, data, validation, plan, report)
    return directory


def _first_captions(data: ShardData, count: int) -> list[str]:
    """Return a caption of each of the first samples whose captions can be read."""
    found: list[str] = []
    for i in range(len(data)):
        if len(found) == count:
            break
        with contextlib.suppress(ValueError, OSError):
            found.append(data.captions(i)[0])
    return found


def _require_tokens_of(dvae: DVAE, directory: Path, train: ShardData, validation: ShardData | None) -> None:
    """Check that image tokens in place of pictures are those of a dVAE, and that there are random crops to train on.

    Raises:
        ValueError: they are stale, or there are none.
    """
    for data in (train, validation):
        if data is None or data.encoding is None:
            continue
        expected = dataclasses.replace(
            data.encoding,
            dvae_hash=directory_hash(directory),
            image_size=dvae.config.image_size,
            grid=dvae.config.grid,
            vocab_size=dvae.config.vocab_size,
        )
        differences = data.encoding.differences(expected)
        if differences:
            raise ValueError(
                f"{data.shards[0]} holds image tokens of another dVAE than {directory} ({differences}): encode the "
                f"pictures again with `dalle-train encode --dvae {directory}`, or give --dvae the one they are of"
            )
    if train.encoding is not None and train.encoding.crops == 0:
        raise ValueError(
            f"{train.shards[0]} holds the tokens of centre crops only, which are for validation: encode the pictures "
            "with --crops 1 or more"
        )


def _complete_bundle(out: Path, tokenizer: Path | None, dvae: Path | None) -> None:
    """Copy the tokenizer and the dVAE that were named into a bundle that has none.

    Raises:
        ValueError: it has others.
    """
    if tokenizer is not None:
        named, target = Tokenizer.load(tokenizer), out / "tokenizer.json"
        if not target.exists():
            named.save(target)
        _require_equal(Tokenizer.load(target).hash, target, named.hash, tokenizer, option="--tokenizer")
    if dvae is not None:
        DVAE.load(dvae)  # whole, before it is copied
        target = out / "dvae"
        if not target.exists():
            copy_folder(dvae, target)
        _require_equal(directory_hash(target), target, directory_hash(dvae), dvae, option="--dvae")


def _require_equal(held: str, target: Path, wanted: str, named: Path, *, option: str) -> None:
    if held != wanted:
        raise ValueError(
            f"{target} is another than {option} {named} ({held} and {wanted}): a bundle has one of each; give another "
            f"--out, leave out {option}, or delete {target}"
        )


def train_clip(recipe: Recipe, inputs: Inputs, world: World, report: Report) -> Path:
    """Train CLIP, with a BPE of its own; returns its directory."""
    stage_recipe = recipe.clip
    check_negatives(stage_recipe.train.batch_of(world.size)[1])
    data, validation = inputs.open(captions=True)
    tokenizer = _clip_tokenizer(inputs, data, stage_recipe.model.vocab_size, world)
    config = dataclasses.replace(stage_recipe.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(stage_recipe.train.seed)
    model = CLIP(config, tokenizer)
    if stage_recipe.embedding_scale != 1:
        model.initialise(embedding_scale=stage_recipe.embedding_scale)
    metadata = {"recipe": recipe.name}
    description = {
        "recipe": recipe.name,
        "model": dataclasses.asdict(config),
        "tokenizer_hash": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16],
    }
    if stage_recipe.warmup is not None and not _goes_on("clip", inputs, world):
        directory = inputs.run_directory("clip-warmup") / "model"
        warmup = CLIPWarmupStage(stage_recipe, model.to(world.device), tokenizer, directory, metadata)
        plan = inputs.run_plan("clip-warmup", {"stage": "clip-warmup", **description})
        fit(warmup, stage_recipe.warmup, world, data, validation, plan, report)
        model = CLIP.load(directory)
        inputs = dataclasses.replace(inputs, resume=False, resume_from=None)  # the warm-up has gone on
    directory = inputs.out / "clip"
    stage = CLIPStage(stage_recipe, model.to(world.device), tokenizer, directory, metadata)
    plan = inputs.run_plan("clip", {"stage": "clip", **description})
    _note_data(plan, data, world)
    fit(stage, stage_recipe.train, world, data, validation, plan, report)
    return directory


def _clip_tokenizer(inputs: Inputs, data: ShardData, vocab_size: int, world: World) -> CLIPTokenizer:
    """Return a tokenizer trained on the captions; the run's own if it goes on and captions have been lost since."""
    run = inputs.run_directory("clip")
    path = run / "tokenizer.json"
    unreadable = np.flatnonzero(data.is_lost).tolist()
    tokenizer = CLIPTokenizer.train(_all_captions(data, unreadable), vocab_size=vocab_size)
    if unreadable and path.is_file() and not inputs.fresh and latest_tag(run / "checkpoints") is not None:
        return CLIPTokenizer.load(path)

    def save() -> None:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)

    on_first_rank(save, world)
    return tokenizer


def _note_data(plan: RunPlan, data: ShardData, world: World) -> None:
    """Write down what samples a run is trained on; when it goes on with others, a warning says so.

    The order of the samples depends on their number, and which they are on the order of the shards: neither must
    change without a word. Shards may be moved.
    """
    refuse_another_run(plan)
    path = plan.directory / "data.json"
    counts = {str(shard): len(data.samples_of(number)) for number, shard in enumerate(data.shards)}
    order = [[shard.name, data.fingerprint(number)] for number, shard in enumerate(data.shards)]
    now = {"samples": len(data), "shards": counts, "order": order}

    def note() -> None:
        if path.is_file() and not plan.fresh and latest_tag(plan.directory / "checkpoints") is not None:
            _warn_of_another_order(json.loads(path.read_text("utf-8")), now)
        plan.directory.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=1) + "\n")

    on_first_rank(note, world)


def _warn_of_another_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before["samples"] == now["samples"]:
        shards = zip(before.get("order", now["order"]), now["order"], strict=False)  # runs of before have none
        others = [(old[0], new[0]) for old, new in shards if old != new]
        if others:
            logger.warning(
                "the run goes on with as many samples as it began with, and with other shards, or in another order "
                "(where %s was is %s): from here on it may see other samples than it would have seen; give those it "
                "began with, in their order",
                *others[0],
            )
        return
    changed = [
        f"{shard}: {count:,} samples, now {now['shards'].get(shard, 0):,}"
        for shard, count in before["shards"].items()
        if count != now["shards"].get(shard, 0)
    ]
    logger.warning(
        "the run began with %d samples, and goes on with %d (%s): from here on their order is another; with a manifest "
        "of the shards as they were (--manifest), lost samples keep their places",
        before["samples"],
        now["samples"],
        "; ".join(changed[:5]) or "there are more shards",
    )


def forget_runs(out: Path) -> None:
    """Delete the checkpoints of all stages and the image tokens: nothing goes on from what is to be made anew."""
    for made in (*(out / "training").glob("*/checkpoints"), *out.glob("encoded")):
        shutil.rmtree(made)


def _all_captions(data: ShardData, unreadable: list[int] | None = None) -> Iterator[str]:
    """Yield every caption; unreadable ones, which training will count as bad samples, are left out.

    Their samples are added to `unreadable`.
    """
    for index in np.flatnonzero(~data.is_lost):
        try:
            yield from data.captions(int(index))
        except (ValueError, OSError) as error:
            logger.warning("a caption is left out of the vocabulary: %s", error)
            if unreadable is not None:
                unreadable.append(int(index))


def encode_data(
    data: Sequence[str | Path],
    out: Path,
    dvae: Path,
    config: EncodeConfig,
    world: World,
    report: Report,
    *,
    fresh: bool = False,
    skip_damaged_shards: bool = False,
    manifest: Path | None = None,
) -> EncodeReport:
    """Make shards of image tokens of shards of captioned pictures, with the dVAE in a directory; see `encode_shards`.

    Raises:
        FileNotFoundError: the dVAE is missing; and as `encode_shards`.
    """
    coder = _channels_last(DVAE.load(dvae, world.device))
    with Progress("pictures") as progress:
        made = encode_shards(
            data,
            out,
            coder,
            directory_hash(dvae),
            config,
            world,
            fresh=fresh,
            skip_damaged=skip_damaged_shards,
            manifest=None if manifest is None else Manifest.open(manifest),
            progress=progress.update if world.is_first else None,
        )
    report(f"{made}: {out}")
    return made


def _encoded(recipe: Recipe, inputs: Inputs, crops: int, world: World, report: Report) -> Inputs:
    """Encode the pictures with the bundle's dVAE; returns the inputs with image tokens in place of the pictures."""
    train = recipe.transformer.train
    config = EncodeConfig(crops=crops, seed=train.seed, workers=train.workers, max_bad_fraction=train.max_bad_fraction)
    shards = {
        name: encode_data(
            of.data,
            inputs.out / "encoded" / name,
            inputs.out / "dvae",
            dataclasses.replace(config, crops=its_crops),
            world,
            report,
            fresh=inputs.fresh,
            skip_damaged_shards=inputs.skip_damaged_shards,
            manifest=of.manifest,
        ).shards
        for name, its_crops, of in _to_encode(inputs, crops)
    }
    return _with_tokens(inputs, shards)


def _to_encode(inputs: Inputs, crops: int) -> Iterator[tuple[str, int, Inputs]]:
    """Yield what is encoded: its name, the random crops of each picture, and the shards."""
    yield "train", crops, inputs
    if inputs.validation:
        yield "validation", 0, dataclasses.replace(inputs, data=inputs.validation, manifest=inputs.validation_manifest)


def _with_tokens(inputs: Inputs, shards: Mapping[str, Sequence[Path]]) -> Inputs:
    """Return the inputs with shards of image tokens, by the names of `_to_encode`, in place of those of pictures.

    The manifests are of the shards of pictures; image tokens have checksums of their own.
    """
    return dataclasses.replace(
        inputs, data=shards["train"], validation=shards.get("validation", ()), manifest=None, validation_manifest=None
    )


def train_all(recipe: Recipe, inputs: Inputs, world: World, report: Report, *, encode_crops: int | None = None) -> None:
    """Train everything, one part after the other, and evaluate the bundle on the validation data.

    Args:
        recipe: of all stages.
        inputs: shards of captioned pictures.
        world: this process's place.
        report: told how far it is.
        encode_crops: random crops of each picture to encode once, for the transformer; None encodes in every step.

    Raises:
        ValueError: encode_crops is below 1; and as the stages.
    """
    _require_crops(encode_crops)
    if inputs.fresh:
        on_first_rank(lambda: forget_runs(inputs.out), world)
    if inputs.fresh or not (inputs.out / "tokenizer.json").is_file():
        on_first_rank(lambda: train_tokenizer(recipe, inputs, report), world)
    train_dvae(recipe, inputs, world, report)
    train_clip(recipe, inputs, world, report)
    images = inputs if encode_crops is None else _encoded(recipe, inputs, encode_crops, world, report)
    train_transformer(recipe, images, world, report)
    if inputs.validation:
        validation = inputs.open_validation(captions=True)
        on_first_rank(lambda: evaluate_bundle(inputs.out, validation, report, device=str(world.device)), world)


def _require_crops(encode_crops: int | None) -> None:
    if encode_crops is not None and encode_crops < 1:
        raise ValueError(f"--encode-crops must be at least 1, got {encode_crops}: the transformer trains on them")


# ------------------------------------------------------------------------------------------------ side by side


def train_all_side_by_side(
    recipe: Recipe,
    inputs: Inputs,
    plan: MachinePlan,
    report: Report,
    *,
    encode_crops: int | None = None,
    options: Sequence[str] = (),
) -> None:
    """Do what `train_all` does, in child processes as the plan says; the results are the same but for rounding.

    Args:
        recipe: one that has a name.
        inputs: shards of captioned pictures.
        plan: has phases.
        report: told how far it is.
        encode_crops: as for `train_all`.
        options: of the commands of the neural stages, besides what `inputs` says.

    Raises:
        ValueError: encode_crops is below 1.
        Interrupted, OSError: as `run_jobs`.
    """
    _require_crops(encode_crops)
    if inputs.fresh:
        forget_runs(inputs.out)
    time_left = TimeLeft(time_of(plan))
    run_phases(recipe, inputs, plan, time_left, report, encode_crops=encode_crops, options=options)
    if inputs.validation:
        evaluate_bundle(inputs.out, inputs.open_validation(captions=True), report, device="cpu")


def time_of(plan: MachinePlan) -> list[list[dict[str, float]]]:
    """Return the seconds of all parts of a plan, by phase and lane; the warm-up is a part of the dVAE's lane.

    Without phases, one stage comes after the other.
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
    report: Report,
    *,
    encode_crops: int | None = None,
    options: Sequence[str] = (),
) -> None:
    """Train all stages in child processes; arguments and errors as those of `train_all_side_by_side`."""
    for shares in plan.phases:
        beside = ", beside ".join(str(share) for share in shares)
        report(f"\n{beside} ({time_left})")
        jobs = [job for share in shares for job in _jobs(recipe, inputs, share, encode_crops, options)]
        run_jobs(jobs, time_left, report)
        for share in shares:
            time_left.end(share.stage)  # also of what was there


def _jobs(
    recipe: Recipe, inputs: Inputs, share: Share, encode_crops: int | None, options: Sequence[str]
) -> Iterator[Job]:
    """Yield the commands of a stage; none for a tokenizer that is there."""

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
            for name, crops, of in _to_encode(inputs, encode_crops):
                target = inputs.out / "encoded" / name
                arguments = ["encode", *_arguments(of, target, validates=False), *same, "--crops", crops]
                # few beside the pictures to train on, at the same time
                yield job(f"encode {name}", *arguments, ranks=share.ranks if name == "train" else 1)
        case stage:
            images = _encoded_inputs(inputs) if stage == "transformer" and encode_crops is not None else inputs
            yield job(stage, stage, recipe.name, *_arguments(images, inputs.out), *options)


def _encoded_inputs(inputs: Inputs) -> Inputs:
    """Return the inputs with the image tokens that were made of their shards, as `_encoded` does."""
    shards: dict[str, list[Path]] = {}
    for name, _, of in _to_encode(inputs, 1):
        targets = token_shards(expand_shards(of.data), inputs.out / "encoded" / name)
        shards[name] = [target for target in targets.values() if target.exists()]
    return _with_tokens(inputs, shards)


def _arguments(inputs: Inputs, out: Path, *, validates: bool = True) -> Iterator[object]:
    """Yield the options that say the same as inputs; `validates`: whether the command takes validation data."""
    yield from ("--data", *inputs.data, "--out", out)
    if inputs.manifest is not None:
        yield from ("--manifest", inputs.manifest)
    if validates and inputs.validation:
        yield from ("--validation", *inputs.validation)
        if inputs.validation_manifest is not None:
            yield from ("--validation-manifest", inputs.validation_manifest)
    if inputs.fresh:
        yield "--fresh"
    if inputs.skip_damaged_shards:
        yield "--skip-damaged-shards"
