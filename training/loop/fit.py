"""The one training loop: every neural stage goes through `fit`.

A stage says what is trained and how a batch becomes the objective's arguments; `fit` does the rest: the engine, the
order of the data, the schedules, metrics, sample pictures, checkpoints, interruption and resume, and the export of the
averaged weights.

A run's directory holds config.json, metrics.jsonl, tensorboard/, checkpoints/ and samples/.
"""

import dataclasses
import json
import logging
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.output.progress import duration
from dalle.output.sheets import save_png
from storage.atomic import replace_text
from training.config import TrainConfig
from training.data.batches import Batch, batches
from training.data.reader import Sample, ShardData
from training.engine.checkpoints import (
    candidates,
    checkpoint_tag,
    from_all_ranks,
    latest_tag,
    require_tag,
    step_of,
)
from training.engine.deepspeed_config import with_files
from training.engine.engine import Engine
from training.loop.means import Means
from training.loop.skipped_steps import SkippedSteps
from training.loop.throughput import Timer, has_bfloat16_arithmetic, peak_flops, peak_memory_gib
from training.loop.validation import validate
from training.metrics import MetricLog, Report, RunState, require_wandb
from training.ranks.stop import Interrupted, StopSignals
from training.ranks.world import World, agree, max_over_ranks, mean_over_ranks, on_first_rank, require_same
from training.schedules import LearningRate

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_ORDER = ("seed", "global_batch")
"""Options on which it depends which samples a step sees."""
VOTE_EVERY = 10
"""Steps between two votes of several GPUs on whether to stop: a vote waits until the device has done all its work. So a
signal is obeyed up to that many steps late."""


class Stage(Protocol):
    """What a neural stage tells `fit`."""

    @property
    def name(self) -> str:
        """The stage: dvae-warmup, dvae, transformer or clip."""

    @property
    def objective(self) -> nn.Module:
        """What is trained is `objective.model`; `objective(**prepare(...))` returns the loss and a dictionary of
        metrics, 0-d tensors or 1-d ones.
        """

    @property
    def unit(self) -> str:
        """What throughput counts: images or tokens."""

    @property
    def units_per_sample(self) -> int:
        """How many of them a sample has."""

    @property
    def directory(self) -> Path:
        """The directory for use that `export` writes."""

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a training sample's tensors, augmented by `rng`; runs in the loader's processes."""

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a validation sample's tensors, without augmentation."""

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Return the objective's keyword arguments for a batch on the device.

        `noise_seed` is the micro-batch's own; with `measure`, the objective returns its costly metrics too.
        """

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return a picture that shows how far these weights are, or None if there is nothing to show."""

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the directory for use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Where a run reads and writes, and what is written down about it."""

    directory: Path
    """The run's directory."""
    description: dict[str, Any]
    """What identifies the run in config.json: stage, recipe, model. A resumed run must agree."""
    fresh: bool = False
    """Start anew although there is a checkpoint."""
    resume: bool = False
    """Go on from a checkpoint: there must be one."""
    resume_from: str | None = None
    """The checkpoint to go back to, such as step00000500; None for the newest."""
    flops_per_sample: float | None = None
    """Floating-point operations of a training step per sample, forward and backward; None where that is not known."""

    def described(self) -> dict[str, Any]:
        """Return the description as config.json gives it back."""
        described: dict[str, Any] = json.loads(json.dumps(self.description, default=str))
        return described

    def tag(self) -> str | None:
        """Return the name of the checkpoint to go on from; None for a run from the start.

        Raises:
            ValueError: the run must go on from one, and it is not there.
        """
        checkpoints = self.directory / "checkpoints"
        if self.resume_from is not None:
            require_tag(checkpoints, self.resume_from)
            return self.resume_from
        tag = None if self.fresh else latest_tag(checkpoints)
        if tag is None and self.resume:
            raise ValueError(f"no checkpoint in {checkpoints} to --resume from: leave it out to start a new run")
        return tag

    def command(self) -> str:
        """Return which command goes on with an interrupted run."""
        option = "--fresh" if self.fresh else "--resume-from" if self.resume_from is not None else None
        return f"the same command without {option}" if option else "the same command"


def fit(
    stage: Stage,
    config: TrainConfig,
    world: World,
    train: ShardData,
    validation: ShardData | None,
    plan: RunPlan,
    report: Report,
) -> None:
    """Train a stage, from its newest good checkpoint if there is one, and export the averaged weights.

    They go to `stage.directory`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        ValueError: the run in `plan.directory` is another one or has no good checkpoint to go on from, the ranks were
            not told the same, too many samples are unusable, too many steps in a row were skipped, or the weights are
            not finite.
        OSError: something could not be written.
    """
    checkpoints = plan.directory / "checkpoints"
    data = [part and ([path.name for path in part.shards], len(part), part.encoding) for part in (train, validation)]
    require_same({"options": (config, plan), "data": data}, world)
    config = _resolved(stage.name, config, world, report)
    tag = plan.tag()
    if config.wandb is not None:
        on_first_rank(require_wandb, world)
    _claim(plan, config, world)
    if tag is not None and step_of(tag) >= config.steps and plan.resume_from is None:
        report(
            f"{stage.name}: the {config.steps} steps in {plan.directory} are done (--fresh trains anew, --steps trains "
            "longer)"
        )
        if (stage.directory / "config.json").is_file():
            return
    world.watch.follow(plan.directory, lambda: latest_tag(checkpoints))
    try:
        with StopSignals() as stop:
            _train(stage, config, world, train, validation, plan, report, stop, tag)
    finally:
        world.watch.rest()


def _resolved(name: str, config: TrainConfig, world: World, report: Report) -> TrainConfig:
    """Return the run as it is trained: engine, log, config.json and status all have it from here. Collective.

    It has what its preset and its DeepSpeed JSON say; and it is in float32 where its recipe alone says autocast and a
    rank only emulates bfloat16.
    """
    config, changes = with_files(config)
    for line in changes:
        report(f"{name}: {line}")
    is_open = config.precision == "autocast" and "precision" not in config.said
    if not is_open or not agree(not has_bfloat16_arithmetic(world.device), world):
        return config
    report(
        f"{name}: computing in fp32, not in autocast as the recipe says: this CPU only emulates bfloat16, "
        "several times slower (`dalle-train STAGE … --precision autocast` insists on it)"
    )
    return dataclasses.replace(config, precision="fp32")


def _train(
    stage: Stage,
    config: TrainConfig,
    world: World,
    train: ShardData,
    validation: ShardData | None,
    plan: RunPlan,
    report: Report,
    stop: StopSignals,
    tag: str | None,
) -> None:
    """Build the engine, load the checkpoint `tag` if there is one, and train to the end, or until `stop`."""
    engine = Engine(stage.objective, config, world)
    report(f"{stage.name}: {engine.batch}")
    state: dict[str, Any] = {}
    if tag is not None:
        state = engine.load(plan.directory / "checkpoints", plan.resume_from, report)
        report(f"{stage.name}: going on from step {state['step']} of {config.steps}")
    if agree(stop.raised, world):
        raise Interrupted(f"stopped before the next step in {plan.directory}: {plan.command()} goes on")
    start = int(state.get("step", 0))
    log = _open_log(plan, start, config, world)
    try:
        loop = _Loop(stage, config, world, engine, plan, validation, log, report, state)
        loop.run(train, start, stop)
        loop.finish(max(start, config.steps))
        if agree(stop.raised, world):
            raise Interrupted(f"stopped: {stage.name} is finished, and saved in {plan.directory}")
    finally:
        if log is not None:
            error = sys.exception()
            log.close(*_ending(world.watch.loss_error(error) or error))


class _Loop:
    """One run of the training loop: what its parts share."""

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        world: World,
        engine: Engine,
        plan: RunPlan,
        validation: ShardData | None,
        log: MetricLog | None,
        report: Report,
        state: Mapping[str, Any],
    ) -> None:
        self.stage, self.config, self.world, self.engine = stage, config, world, engine
        self.plan, self.validation, self.log, self.report = plan, validation, log, report
        self.rate, self.means = LearningRate(config.learning_rate), Means()
        self.n_bad, self.n_bad_before = 0, int(state.get("bad_samples", 0))
        self.keys: list[str] = []
        """Samples of the step under way."""
        self.skipped = SkippedSteps(config.max_skipped_steps, world, lambda line: report(f"{stage.name}: {line}"))
        self.unobserved: list[Tensor] = []
        """Losses of the last steps, on the device, that the schedule has not seen."""
        self.vote_every = VOTE_EVERY if world.size > 1 and world.device.type == "cuda" else 1
        self.has_warned_of_cut = False
        self.peak_flops = total_peak_flops(plan, config, world)
        if state:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `_state` returned; a warning says so if other samples come than without the interruption."""
        self.rate.restore(state["learning_rate"])
        self.skipped.n = state["skipped_steps"]
        self.skipped.n_in_row, self.skipped.first_in_row = state["skipped_in_row"]
        means: list[dict[str, Any]] = state["means"]
        if len(means) == self.world.size:
            self.means.restore(means[self.world.rank], self.world.device)
        changed = [name for name in _ORDER if state["order"][name] != getattr(self.config, name)]
        if changed and self.world.is_first:
            logger.warning(
                "%s: the run goes on with other samples than it would have seen",
                " and ".join(f"{n} was {state['order'][n]} and is {getattr(self.config, n)}" for n in changed),
            )

    def _state(self, done: int) -> dict[str, Any]:
        """Return what a checkpoint says of the loop, in plain numbers. Collective."""
        return {
            "step": done,
            "learning_rate": self.rate.state(),
            "bad_samples": self._bad_samples(),
            "skipped_steps": self.skipped.n,
            "skipped_in_row": [self.skipped.n_in_row, self.skipped.first_in_row],
            "means": from_all_ranks(self.means.state(), self.world),
            "order": {name: getattr(self.config, name) for name in _ORDER},
        }

    def run(self, data: ShardData, start: int, stop: StopSignals) -> None:
        """Take the steps from `start` to the end."""
        config, engine = self.config, self.engine
        stream = batches(
            data,
            self.stage.transform,
            seed=config.seed,
            micro_batch=engine.micro_batch,
            accumulation=engine.accumulation,
            rank=self.world.rank,
            world_size=self.world.size,
            start_step=start,
            max_steps=config.steps,
            workers=config.workers,
            max_bad_fraction=config.max_bad_fraction,
        )
        engine.train()
        means, timer = self.means, Timer(start, config.steps)
        for step in range(start, config.steps):
            done = step + 1
            measure = done % config.log_every == 0 or done == config.steps
            learning_rate = self.rate.at(step)
            self.keys = []
            metrics = engine.step(self._micro_batches(stream, step, timer, measure=measure), learning_rate, step)
            self.world.watch.touch(done)
            means.add(metrics, engine.taken)
            self.skipped.add(step, engine.taken, metrics["loss"], self.keys, is_overflow=engine.was_overflow)
            if self.rate.follows_loss:
                self.unobserved.append(metrics["loss"].detach().float())
                if len(self.unobserved) >= self.rate.n_undecided(done - len(self.unobserved)):
                    self._observe_losses(done)
            if measure or self.skipped.is_due:
                self._look_at_skipped(done)
            if measure:
                self._log_training(done, means.take(self.world), learning_rate, timer)
            if done % self.vote_every == 0 and agree(stop.raised, self.world) and done < config.steps:
                self._save(done)
                raise Interrupted(
                    f"stopped at step {done} of {config.steps}, saved in {self.plan.directory}: {self.plan.command()} "
                    "goes on from there"
                )
            with timer.aside():
                self._once_in_a_while(done)
            timer.unit_done(done)

    def _observe_losses(self, done: int) -> None:
        """Let the schedule see the losses of the last steps; all at once: each look waits for the device."""
        if self.unobserved:
            losses = mean_over_ranks(torch.stack(self.unobserved), self.world).tolist()
            for step, loss in enumerate(losses, done - len(losses)):
                self.rate.observe(step, loss)
            self.unobserved.clear()

    def finish(self, done: int) -> None:
        """Export, validate, show and save the end of the run, at step `done`.

        In this order: a checkpoint of the last step, which no run goes on from, says that all the rest is there.
        """
        self._look_at_skipped(done)
        if self.skipped.n >= done:
            raise self._diverged("all steps were skipped, their loss or gradient not being finite, as seen", done)
        self._require_finite(done)
        self._export(done)
        if latest_tag(self.plan.directory / "checkpoints") != checkpoint_tag(done):
            self._validate(done)
            self._sample(done)
            self._save(done)

    def _micro_batches(
        self, stream: Iterator[Batch], step: int, timer: Timer, *, measure: bool
    ) -> Iterator[dict[str, Any]]:
        for micro in range(self.engine.accumulation):
            waited_from = time.perf_counter()
            batch = next(stream)
            timer.waited_s += time.perf_counter() - waited_from
            self.world.watch.touch()
            self.n_bad += batch.n_bad
            self.keys += batch.keys
            tensors = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.tensors.items()}
            # that of the micro-batch in the order of the samples: as many ranks as may be, the noise is the same
            position = (step * self.world.size + self.world.rank) * self.engine.accumulation + micro
            noise_seed = int(np.random.SeedSequence((self.config.seed, position)).generate_state(1, np.uint64)[0] >> 1)
            yield self.stage.prepare(tensors, step, noise_seed, measure=measure)

    def _once_in_a_while(self, done: int) -> None:
        config = self.config
        if done == config.steps:
            return
        if done % config.checkpoint_every == 0:
            self._save(done)
            self._export(done)
        else:
            self._show(done)

    def _show(self, done: int) -> None:
        """Validate, and draw samples, if this step is one of those after which that is done."""
        config = self.config
        if done >= config.steps:  # the end has its own
            return
        if config.validate_every and done % config.validate_every == 0:
            self._validate(done)
        if config.sample_every and done % config.sample_every == 0:
            self._sample(done)

    def _log_training(self, done: int, values: dict[str, Any], learning_rate: float, timer: Timer) -> None:
        lap = timer.lap(done)
        samples_per_s = lap.steps * self.config.global_batch / lap.elapsed_s
        values |= {
            "learning_rate": learning_rate,
            f"{self.stage.unit}_per_s": samples_per_s * self.stage.units_per_sample,
            "data_wait": lap.data_wait,
            "peak_memory_gib": max_over_ranks(peak_memory_gib(self.world.device), self.world),
            "bad_samples": float(self._bad_samples()),
            "skipped_steps": float(self.skipped.n),
        }
        if self.peak_flops is not None and self.plan.flops_per_sample is not None:
            values["mfu"] = samples_per_s * self.plan.flops_per_sample / self.peak_flops
        _name_perplexities(values)

        def tell() -> None:
            assert self.log is not None
            self.log.write(done, "train", values)
            self._report_training(done, values, timer)

        on_first_rank(tell, self.world)

    def _report_training(self, done: int, values: Mapping[str, Any], timer: Timer) -> None:
        unit, config = self.stage.unit, self.config
        if values.get("captions_cut", 0.0) > 0 and not self.has_warned_of_cut:
            self.has_warned_of_cut = True
            logger.warning(
                "%.1f%% of the captions since the last line were too long and were cut; metrics.jsonl counts them as "
                "captions_cut",
                100 * values["captions_cut"],
            )
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if name in _SHOWN)
        speed = f"{values[f'{unit}_per_s']:,.0f} {unit}/s"
        left = f"{duration(timer.left_s(done))} left"
        self.report(f"{self.stage.name} {done}/{config.steps}  {shown}  {speed}  {left}")

    def _validate(self, done: int) -> None:
        """Measure the objective on the validation samples, the same ones every time, shared out among the ranks."""
        if self.validation is None:
            return
        self.engine.model.eval()
        values = validate(self.stage, self.engine, self.validation, self.config, self.world, done)
        self.engine.train()
        _name_perplexities(values)

        def tell() -> None:
            assert self.log is not None
            self.log.write(done, "validation", values)
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if not isinstance(value, list))
            self.report(f"{self.stage.name} {done}/{self.config.steps}  validation: {shown}")

        on_first_rank(tell, self.world)

    def _sample(self, done: int) -> None:
        def draw() -> None:
            try:
                picture = self.stage.picture(self.engine.averaged_weights())
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                logger.warning("no sample sheet: the whole model does not fit beside what training holds")
                return
            if picture is not None:
                folder = self.plan.directory / "samples"
                folder.mkdir(exist_ok=True)
                path = folder / f"{checkpoint_tag(done)}.png"
                save_png(picture, path)
                assert self.log is not None
                self.log.picture(done, path)

        on_first_rank(draw, self.world)
        self.world.watch.touch()

    def _bad_samples(self) -> int:
        """Return the number of unusable samples of all ranks since the run's first step. Collective."""
        here = torch.tensor(self.n_bad, dtype=torch.float64, device=self.world.device)
        return self.n_bad_before + round(mean_over_ranks(here, self.world).item() * self.world.size)

    def _look_at_skipped(self, done: int) -> None:
        """Hear of the steps that were skipped. Collective.

        Raises:
            ValueError: too many in a row.
        """
        if self.skipped.look():
            limit = self.config.max_skipped_steps
            what = f"more than {limit} steps in a row were skipped, their loss or gradient not being finite, as seen"
            raise self._diverged(what, done, before=self.skipped.first_in_row)

    def _require_finite(self, done: int) -> None:
        """Raise ValueError unless the weights and the averaged weights are finite. Collective."""
        averages = self.engine.averaged_weights()
        wrong = [f"{name} has values that are not finite" for name, w in averages.items() if not w.isfinite().all()]
        if not self.engine.weights_are_finite():
            wrong.append("a weight is not finite")
        if agree(bool(wrong), self.world):
            raise self._diverged(wrong[0] if wrong else "the averaged weights are not finite", done)

    def _diverged(self, what: str, done: int, *, before: int | None = None) -> ValueError:
        """Return the error that says from which checkpoint to go back: the last one, or the last `before` a step."""
        checkpoints = self.plan.directory / "checkpoints"
        tag = latest_tag(checkpoints)
        if tag is not None and before is not None:
            tag = next((earlier for earlier in candidates(checkpoints) if step_of(earlier) <= before), tag)
        good = (
            f"{checkpoints / tag} is the last good checkpoint: go on from it" if tag else "nothing is saved: start anew"
        )
        return ValueError(
            f"{what} at step {done}, training has diverged and this step is not saved. {good} with another --seed or "
            "--precision"
        )

    def _save(self, done: int) -> None:
        self._look_at_skipped(done)
        self._require_finite(done)
        self._show(done)  # before: a run that goes on from this checkpoint would not make up for it
        self._observe_losses(done)
        self.engine.save(self.plan.directory / "checkpoints", done, self._state(done))
        self.world.watch.touch()

    def _export(self, done: int) -> None:
        on_first_rank(lambda: self.stage.export(self.engine.averaged_weights(), done), self.world)
        self.world.watch.touch()


_SHOWN = ("loss", "text_loss", "image_loss", "psnr", "hard_psnr", "codes_used", "accuracy", "grad_norm")


def _name_perplexities(values: dict[str, Any]) -> None:
    """Replace losses by row of the image, in nats, by perplexities, in place: e to the mean, no mean of e to each."""
    losses = values.pop("image_loss_by_row", None)
    if losses is not None:
        perplexities = [math.exp(loss) if loss < _LARGEST_LOSS else math.inf for loss in losses]
        values["image_perplexity_by_row"] = [float(f"{value:.6g}") for value in perplexities]


_LARGEST_LOSS = 700.0
"""Nats; e to more than that is no float. A loss that is not a number is no smaller, either."""


def total_peak_flops(plan: RunPlan, config: TrainConfig, world: World) -> float | None:
    """Return what the devices of all ranks together can do at best, per second, where that is needed and known."""
    if plan.flops_per_sample is None:
        return None
    here = peak_flops(world.device, config.precision, config.peak_tflops)
    total = mean_over_ranks(torch.tensor(here or math.nan, dtype=torch.float64, device=world.device), world).item()
    return total * world.size if math.isfinite(total) else None


def _open_log(plan: RunPlan, step: int, config: TrainConfig, world: World) -> MetricLog | None:
    """Return the log of a run that goes on from a step, on the first rank; where that fails, it fails on all."""
    logs: list[MetricLog] = []
    on_first_rank(lambda: logs.append(MetricLog(plan.directory, step, wandb_project=config.wandb)), world)
    return logs[0] if logs else None


def _ending(error: BaseException | None) -> tuple[RunState, str]:
    """Return how a run ended, and why."""
    if error is None:
        return "finished", ""
    reason = " ".join(str(error).split()) or type(error).__name__
    return "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed", reason


def _claim(plan: RunPlan, config: TrainConfig, world: World) -> None:
    """Write config.json, or check that the one that is there describes the same run.

    Raises:
        ValueError: the directory holds a run of another model or recipe.
    """
    refuse_another_run(plan)
    agree(False, world)  # every rank has read the files before the first one writes
    on_first_rank(lambda: _write_claim(plan, config, world), world)


def refuse_another_run(plan: RunPlan) -> None:
    """Check that a run that is there and would go on is the planned one.

    Raises:
        ValueError: it is a run of another model or recipe.
    """
    path = plan.directory / "config.json"
    has_checkpoint = latest_tag(plan.directory / "checkpoints") is not None
    if path.is_file() and has_checkpoint and not plan.fresh:
        described = plan.described()
        there = _run_of(path)
        different = sorted(key for key in described.keys() | there.keys() if described.get(key) != there.get(key))
        if different:
            raise ValueError(
                f"{plan.directory} holds a run with another {' and '.join(different)}: give another --out, the same "
                f"{' and '.join(different)}, or --fresh to train anew over it"
            )


def _run_of(path: Path) -> dict[str, Any]:
    """Return what a run's config.json says of it."""
    try:
        run = json.loads(path.read_text())["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or use --fresh to train anew") from None
    return dict(run)


def _write_claim(plan: RunPlan, config: TrainConfig, world: World) -> None:
    plan.directory.mkdir(parents=True, exist_ok=True)
    if plan.fresh:
        for name in ("checkpoints", "samples", "stacks", "tensorboard"):
            shutil.rmtree(plan.directory / name, ignore_errors=True)
    record = {
        "run": plan.described(),
        "training": dataclasses.asdict(config),
        "ranks": world.size,
        "device": str(world.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": _git_commit(),
    }
    replace_text(plan.directory / "config.json", json.dumps(record, indent=2, default=str))


def _git_commit() -> str | None:
    """Return the commit this code is at, if it is run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
