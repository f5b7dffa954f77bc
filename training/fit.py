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
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.gallery import save_png
from dalle.progress import duration
from training.batches import Batch, batches, validation_batches
from training.checkpoints import checkpoint_tag, latest_tag, read_checkpoint, replace_text
from training.config import TrainConfig
from training.data import Sample, ShardData
from training.engine import Engine
from training.metrics import MetricLog, Report
from training.schedules import LearningRate
from training.world import World, agree, mean_over_ranks, on_first_rank, require_same

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

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
        """What is trained is `objective.model`; `objective(**prepare(...))` returns (loss, metrics of 0-d tensors)."""

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


class Interrupted(Exception):  # noqa: N818  # not an error
    """The program was asked to stop; what is done is saved, and the same command goes on from it."""


class StopSignals:
    """While it lasts, SIGINT and SIGTERM only raise a flag: the step under way ends, and a checkpoint is saved.

    A second SIGINT is a KeyboardInterrupt. SIGTERM may come any number of times: from a launcher, and from the watch
    that finds the launcher gone.
    """

    def __init__(self) -> None:
        self.raised = False
        """Whether one has come."""
        self._n_interrupts = 0

    def __enter__(self) -> "StopSignals":
        self._handlers = {number: signal.signal(number, self._raise_flag) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _raise_flag(self, number: int, _frame: FrameType | None) -> None:
        self._n_interrupts += number == signal.SIGINT
        if self._n_interrupts > 1:
            raise KeyboardInterrupt
        self.raised = True


class _Means:
    """Running means of metrics that are not all there at every step; nothing is read from the device before `take`."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: int = 1) -> None:
        """Take metrics into account, as often as `weight` says."""
        for name, value in metrics.items():
            value = weight * value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + weight

    def take(self, world: World) -> dict[str, float]:
        """Return the means over steps and ranks, and start anew.

        Collective: every rank must have added the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[name].to(world.device) / self._counts[name] for name in names])
        values = mean_over_ranks(means, world).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Where a run reads and writes, and what is written down about it."""

    directory: Path
    """The run's directory."""
    description: dict[str, Any]
    """What identifies the run in config.json: stage, recipe, model. A resumed run must agree."""
    fresh: bool = False
    """Start anew although there is a checkpoint."""

    def described(self) -> dict[str, Any]:
        """Return the description as config.json gives it back."""
        described: dict[str, Any] = json.loads(json.dumps(self.description, default=str))
        return described


def fit(
    stage: Stage,
    config: TrainConfig,
    world: World,
    train: ShardData,
    validation: ShardData | None,
    plan: RunPlan,
    report: Report,
) -> None:
    """Train a stage, from its newest checkpoint if there is one, and export the averaged weights to `stage.directory`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        ValueError: the run in `plan.directory` is another one, the ranks were not told the same, too many samples are
            unusable, or the loss or the weights are not finite.
        OSError: something could not be written.
    """
    checkpoints = plan.directory / "checkpoints"
    data = [part and ([path.name for path in part.shards], len(part), part.encoding) for part in (train, validation)]
    require_same({"options": (config, plan), "data": data}, world)
    _claim(plan, config, world)
    if not plan.fresh and _is_finished(checkpoints, config):
        report(
            f"{stage.name}: the {config.steps} steps in {plan.directory} are done (--fresh trains anew, --steps trains "
            "longer)"
        )
        if (stage.directory / "config.json").is_file():
            return
    world.watch.follow(plan.directory)
    engine = Engine(stage.objective, config, world)
    rate = LearningRate(config.learning_rate)
    start, n_bad = 0, 0
    if not plan.fresh and latest_tag(checkpoints) is not None:
        state = engine.load(checkpoints)
        start, n_bad = int(state["step"]), int(state["bad_samples"])
        rate.restore(state["learning_rate"])
        report(f"{stage.name}: going on from step {start} of {config.steps}")
    log = MetricLog(plan.directory, start) if world.is_first else None
    loop = _Loop(stage, config, world, engine, rate, plan, validation, log, report, n_bad_before=n_bad)
    try:
        with StopSignals() as stop:
            loop.run(train, start, stop)
            loop.finish(max(start, config.steps))
            if agree(stop.raised, world):
                raise Interrupted(f"stopped: {stage.name} is finished, and saved in {plan.directory}")
    finally:
        world.watch.rest()
        if log is not None:
            log.close()


class _Loop:
    """One run of the training loop: what its parts share."""

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        world: World,
        engine: Engine,
        rate: LearningRate,
        plan: RunPlan,
        validation: ShardData | None,
        log: MetricLog | None,
        report: Report,
        *,
        n_bad_before: int,
    ) -> None:
        self.stage, self.config, self.world, self.engine, self.rate = stage, config, world, engine, rate
        self.plan, self.validation, self.log, self.report = plan, validation, log, report
        self.n_bad, self.n_bad_before = 0, n_bad_before
        self.last_step: Mapping[str, Tensor] = {}
        self.unobserved: list[Tensor] = []
        """Losses of the last steps, on the device, that the schedule has not seen."""
        self.vote_every = VOTE_EVERY if world.size > 1 and world.device.type == "cuda" else 1
        self.has_warned_of_cut = False

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
        means, timer = _Means(), _Timer(start, config.steps)
        for step in range(start, config.steps):
            done = step + 1
            measure = done % config.log_every == 0 or done == config.steps
            learning_rate = self.rate.at(step)
            metrics = engine.step(self._micro_batches(stream, step, timer, measure=measure), learning_rate, step)
            self.world.watch.touch(done)
            means.add(metrics)
            self.last_step = metrics
            if self.rate.follows_loss:
                self.unobserved.append(metrics["loss"].detach().float())
                if len(self.unobserved) >= self.rate.n_undecided(done - len(self.unobserved)):
                    self._observe_losses(done)
            if measure:
                self._log_training(done, means.take(self.world), learning_rate, timer)
            if done % self.vote_every == 0 and agree(stop.raised, self.world) and done < config.steps:
                self._save(done)
                command = "the same command without --fresh" if self.plan.fresh else "the same command"
                raise Interrupted(
                    f"stopped at step {done} of {config.steps}, saved in {self.plan.directory}: {command} goes on from "
                    "there"
                )
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
        self._require_finite(done)
        self._export(done)
        if latest_tag(self.plan.directory / "checkpoints") != checkpoint_tag(done):
            self._validate(done)
            self._sample(done)
            self._save(done)

    def _micro_batches(
        self, stream: Iterator[Batch], step: int, timer: "_Timer", *, measure: bool
    ) -> Iterator[dict[str, Any]]:
        for micro in range(self.engine.accumulation):
            waited_from = time.perf_counter()
            batch = next(stream)
            timer.waited_s += time.perf_counter() - waited_from
            self.world.watch.touch()
            self.n_bad += batch.n_bad
            tensors = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.tensors.items()}
            position = (step * self.engine.accumulation + micro) * self.world.size + self.world.rank
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

    def _log_training(self, done: int, values: dict[str, float], learning_rate: float, timer: "_Timer") -> None:
        interval_s, wait = timer.lap()
        samples = timer.steps_in_lap(done) * self.config.global_batch
        values |= {
            "learning_rate": learning_rate,
            f"{self.stage.unit}_per_s": samples * self.stage.units_per_sample / interval_s,
            "data_wait": wait,
            "bad_samples": float(self._bad_samples()),
        }
        if self.log is not None:
            self.log.write(done, "train", values)
            self._report_training(done, values, timer)
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"the loss is {values['loss']}", done)

    def _report_training(self, done: int, values: Mapping[str, float], timer: "_Timer") -> None:
        unit, config = self.stage.unit, self.config
        if values.get("captions_cut") and not self.has_warned_of_cut:
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
        """Measure the objective on the validation samples, the same ones every time; every rank measures them all."""
        if self.validation is None:
            return
        self.engine.model.eval()
        means = _Means()
        stream = validation_batches(
            self.validation,
            self.stage.transform_for_validation,
            self.engine.micro_batch,
            max_bad_fraction=self.config.max_bad_fraction,
        )
        for index, batch in enumerate(stream):
            tensors = {name: tensor.to(self.world.device) for name, tensor in batch.tensors.items()}
            loss, metrics = self.engine.forward(self.stage.prepare(tensors, done, index, measure=True))
            means.add({"loss": loss, **metrics}, len(batch.keys))
            self.world.watch.touch()
        self.engine.train()
        values = means.take(self.world)
        if self.log is not None:
            self.log.write(done, "validation", values)
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.report(f"{self.stage.name} {done}/{self.config.steps}  validation: {shown}")

    def _sample(self, done: int) -> None:
        def draw() -> None:
            picture = self.stage.picture(self.engine.averaged_weights())
            if picture is not None:
                folder = self.plan.directory / "samples"
                folder.mkdir(exist_ok=True)
                save_png(picture, folder / f"{checkpoint_tag(done)}.png")

        on_first_rank(draw, self.world)
        self.world.watch.touch()

    def _bad_samples(self) -> int:
        """Return the number of unusable samples of all ranks since the run's first step. Collective."""
        here = torch.tensor(self.n_bad, dtype=torch.float64, device=self.world.device)
        return self.n_bad_before + round(mean_over_ranks(here, self.world).item() * self.world.size)

    def _require_finite(self, done: int) -> None:
        """Raise ValueError unless the last step's loss, on every rank, and the averaged weights are finite. Collective.

        A gradient that is not finite is no reason to stop: DeepSpeed leaves out such a step above ZeRO 0, and at 0 the
        weights show it.
        """
        loss, weights = self.last_step.get("loss"), self.engine.averaged_weights()
        wrong = [f"loss is {loss.item()}"] if loss is not None and not loss.isfinite().all() else []
        wrong += [f"{name} has values that are not finite" for name, w in weights.items() if not w.isfinite().all()]
        if agree(bool(wrong), self.world):
            raise self._diverged(f"the {wrong[0]}" if wrong else "the loss of another rank is not finite", done)

    def _diverged(self, what: str, done: int) -> ValueError:
        checkpoints = self.plan.directory / "checkpoints"
        tag = latest_tag(checkpoints)
        good = (
            f"{checkpoints / tag} is the last good checkpoint: go on from it" if tag else "nothing is saved: start anew"
        )
        return ValueError(
            f"{what} at step {done}, training has diverged and this step is not saved. {good} with another --seed or "
            "--precision"
        )

    def _save(self, done: int) -> None:
        self._require_finite(done)
        self._show(done)  # before: a run that goes on from this checkpoint would not make up for it
        self._observe_losses(done)
        state = {"step": done, "learning_rate": self.rate.state(), "bad_samples": self._bad_samples()}
        self.engine.save(self.plan.directory / "checkpoints", done, state)
        self.world.watch.touch()

    def _export(self, done: int) -> None:
        on_first_rank(lambda: self.stage.export(self.engine.averaged_weights(), done), self.world)
        self.world.watch.touch()


_SHOWN = ("loss", "text_loss", "image_loss", "psnr", "hard_psnr", "codes_used", "accuracy", "grad_norm")


class _Timer:
    """Times the loop: laps between two lines of metrics, and what is left."""

    def __init__(self, start: int, steps: int) -> None:
        self.steps = steps
        self.waited_s = 0.0
        self._lap_from, self._lap_step = time.perf_counter(), start
        self._started_at, self._first_step = time.perf_counter(), start

    def lap(self) -> tuple[float, float]:
        """Return the seconds since the last lap, and the fraction of them spent waiting for data; start a new lap."""
        now = time.perf_counter()
        interval_s, waited_s = max(now - self._lap_from, 1e-9), self.waited_s
        self._lap_from, self.waited_s = now, 0.0
        return interval_s, waited_s / interval_s

    def steps_in_lap(self, done: int) -> int:
        """Return the number of steps since this was last asked."""
        steps, self._lap_step = done - self._lap_step, done
        return steps

    def unit_done(self, done: int) -> None:
        """Forget the first step, which pays for warming up, when estimating what is left."""
        if done == self._first_step + 1:
            self._started_at, self._first_step = time.perf_counter(), done

    def left_s(self, done: int) -> float:
        """Return the estimated seconds until the last step."""
        taken = done - self._first_step
        return (time.perf_counter() - self._started_at) / taken * (self.steps - done) if taken > 0 else 0.0


def _is_finished(checkpoints: Path, config: TrainConfig) -> bool:
    return latest_tag(checkpoints) is not None and int(read_checkpoint(checkpoints)["step"]) >= config.steps


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
        shutil.rmtree(plan.directory / "checkpoints", ignore_errors=True)
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
