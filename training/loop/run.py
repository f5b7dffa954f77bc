"""One run in training: what its steps, its records and its checkpoints share."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dalle.data.order import Shuffle
from dalle.data.reader import ShardData
from dalle.output.text import Say
from training.config import TrainConfig
from training.engine.engine import Engine
from training.loop.means import Means
from training.loop.metrics import MetricLog
from training.loop.run_folder import KEPT, ORDER, RunSpec
from training.loop.skipped_steps import SkippedSteps
from training.loop.stage import Stage
from training.loop.throughput import total_peak_flops
from training.ranks.ranks import Ranks, from_all_ranks, mean_over_ranks
from training.ranks.stop import StopSignals
from training.schedules import LearningRate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds of the loop, in plain numbers; the engine saves weights, optimizer and averages."""

    step: int
    """Optimizer steps done."""
    learning_rate: dict[str, Any]
    """State of the schedule."""
    bad_samples: int
    """Unusable samples of all ranks since the run's first step."""
    skipped_steps: int
    """Steps that were not finite since the run's first step."""
    skipped_in_row: tuple[int, int | None]
    """Skipped steps in a row up to this one, and the first of them."""
    means: list[dict[str, Any]]
    """Sums and counts since the last line of metrics, of each rank."""
    order: dict[str, int]
    """Options that decide which samples a step sees; up to version 0.1 without those of `Shuffle`."""
    to_show: bool = False
    """Whether this step's validation and sample pictures are left to the run that resumes."""


@dataclass(kw_only=True)
class Run:
    """One run in training."""

    stage: Stage
    config: TrainConfig
    """As it is trained: see `resolve`."""
    ranks: Ranks
    spec: RunSpec
    engine: Engine
    shuffle: Shuffle
    """How the samples of training are shuffled."""
    validation: ShardData | None
    say: Say
    """Told how far the run is."""
    stop: StopSignals
    """Asks the run to stop."""
    log: MetricLog | None = None
    """Of the first rank."""

    rate: LearningRate = field(init=False)
    means: Means = field(init=False, default_factory=Means)
    """Of the metrics since the last line."""
    skipped: SkippedSteps = field(init=False)
    losses: list[Tensor] = field(init=False, default_factory=list)
    """Losses of the last steps, on the device, that a schedule which follows them has not seen."""
    n_bad: int = field(init=False, default=0)
    """Unusable samples of this rank since it was started."""
    n_bad_before: int = field(init=False, default=0)
    """Unusable samples of all ranks before."""
    peak_flops: float | None = field(init=False, default=None)
    """FLOP/s of all ranks' devices at best; None if unknown, or not needed."""
    to_show: bool = field(init=False, default=False)
    """Whether the validation of this step was left for a stop."""
    has_warned_of_cut: bool = field(init=False, default=False)
    """Whether a warning has said that captions are cut."""

    def __post_init__(self) -> None:
        config = self.config
        self.rate = LearningRate(config.learning_rate)
        self.skipped = SkippedSteps(
            config.max_skipped_steps, self.ranks, lambda line: self.say(f"{self.stage.name}: {line}")
        )
        if self.spec.flops_per_sample is not None:
            self.peak_flops = total_peak_flops(config, self.ranks)

    def state(self, done: int) -> TrainState:
        """Return the state after `done` steps. Collective."""
        return TrainState(
            step=done,
            learning_rate=self.rate.state(),
            bad_samples=self.bad_samples(),
            skipped_steps=self.skipped.n,
            skipped_in_row=(self.skipped.n_in_row, self.skipped.first_in_row),
            means=from_all_ranks(self.means.state(), self.ranks),
            order={
                **{name: getattr(self.config, name) for name in ORDER},
                **{f"shuffle_{name}": value for name, value in asdict(self.shuffle).items()},
            },
            to_show=self.to_show,
        )

    def restore(self, state: TrainState) -> None:
        """Resume from a state; a warning says so if the samples that follow are other ones."""
        self.rate.restore(state.learning_rate)
        self.n_bad_before, self.to_show = state.bad_samples, state.to_show
        self.skipped.n = state.skipped_steps
        self.skipped.n_in_row, self.skipped.first_in_row = state.skipped_in_row
        if len(state.means) == self.ranks.size:
            self.means.restore(state.means[self.ranks.rank], self.ranks.device)
        changed = [name for name in ORDER if state.order[name] != getattr(self.config, name)]
        if changed and self.ranks.is_first:
            logger.warning(
                "%s: the resumed run sees other samples than it would have seen",
                " and ".join(f"{n} was {state.order[n]} and is {getattr(self.config, n)}" for n in changed),
            )
        self._restore_shuffle(state.order)

    def _restore_shuffle(self, order: Mapping[str, int]) -> None:
        """Shuffle as the run began; says so where it was told otherwise.

        With another global batch, which shows other samples anyway, streams are shared out by that one: each rank stays
        in few of them.
        """
        names = {f"shuffle_{one.name}": one.name for one in fields(Shuffle)}
        began = Shuffle(**{names[name]: value for name, value in order.items() if name in names})
        for option in KEPT:
            was, now = getattr(began, names[option]), getattr(self.shuffle, names[option])
            if getattr(self.config, option) is not None and was != now and self.ranks.is_first:
                logger.warning("%s is %d: the run began with %d, and keeps it", option, now, was)
        if began.window and order["global_batch"] != (batch := self.config.global_batch):
            began = replace(began, batch=batch, streams=min(began.streams, batch))
        self.shuffle = began

    def bad_samples(self) -> int:
        """Return the number of unusable samples of all ranks since the run's first step. Collective."""
        here = torch.tensor(self.n_bad, dtype=torch.float64, device=self.ranks.device)
        return self.n_bad_before + round(mean_over_ranks(here, self.ranks).item() * self.ranks.size)

    def observe_losses(self, done: int) -> None:
        """Let the schedule see the losses of the last steps, up to step `done`. Collective; waits for the device."""
        if self.losses:
            losses = mean_over_ranks(torch.stack(self.losses), self.ranks).tolist()
            for step, loss in enumerate(losses, done - len(losses)):
                self.rate.observe(step, loss)
            self.losses.clear()
