"""Schedules: the dVAE's cosines and the transformer's warm-up with plateau halving (Ramesh et al. 2021, A.2, B.2)."""

import math
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From `start` to `end` along half a cosine, constant afterwards.

    The paper's schedule for β, τ and the dVAE's step size (A.2).
    """

    start: float
    """Value at step 0."""
    end: float
    """Value from step `steps` on."""
    steps: int
    """Number of optimizer steps between the two."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a cosine schedule needs at least 1 step, got {self.steps}")

    @property
    def peak(self) -> float:
        """The highest value."""
        return max(self.start, self.end)

    def stretched(self, factor: float) -> Self:
        """Return the schedule over `factor` times as many steps."""
        return replace(self, steps=max(1, round(self.steps * factor)))

    def with_peak(self, peak: float) -> Self:
        """Return the schedule with another value at its highest point, and all others in proportion."""
        return replace(self, start=peak * (self.start / self.peak), end=peak * (self.end / self.peak))

    def at(self, step: int) -> float:
        """Return the value before optimizer step number `step` (from 0)."""
        progress = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up to `peak`, then half a cosine to `final`.

    CLIP's schedule, and ours for runs too short for a plateau.
    """

    peak: float
    """Highest learning rate, reached at the end of the warm-up."""
    warmup: int
    """Optimizer steps of linear warm-up."""
    steps: int
    """Optimizer step at which `final` is reached, warm-up included."""
    final: float = 0.0
    """Learning rate from `steps` on."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be at least 0 and below steps ({self.steps})")

    def stretched(self, factor: float) -> Self:
        """Return the schedule over `factor` times as many steps, warm-up included."""
        steps = max(1, round(self.steps * factor))
        return replace(self, warmup=min(round(self.warmup * factor), steps - 1), steps=steps)

    def with_peak(self, peak: float) -> Self:
        """Return the schedule with another peak, and all other rates in proportion."""
        return replace(self, peak=peak, final=self.final * peak / self.peak)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step number `step` (from 0)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return Cosine(start=self.peak, end=self.final, steps=self.steps - self.warmup).at(step - self.warmup)


@dataclass(frozen=True, kw_only=True)
class WarmupPlateau:
    """Linear warm-up to `peak`, halved whenever the training loss stops falling, `halvings` times at most (B.2).

    The paper halved by hand. Deviation: here the loss, averaged over `window` steps, has to fall by `threshold`
    (relative) within `patience` windows, or the rate is halved.
    """

    peak: float = 4.5e-4
    """Highest learning rate."""
    warmup: int = 5_000
    """Optimizer steps of linear warm-up."""
    halvings: int = 5
    """How often the rate may be halved: 5 ends at 1/32 of the peak."""
    window: int = 1_000
    """Steps over which the training loss is averaged before it is compared."""
    patience: int = 10
    """Windows without progress before a halving."""
    threshold: float = 1e-3
    """Relative fall of the loss that counts as progress."""

    def __post_init__(self) -> None:
        if min(self.warmup, self.halvings) < 0 or min(self.window, self.patience) < 1:
            raise ValueError("warmup and halvings must be at least 0, window and patience at least 1")

    def stretched(self, factor: float) -> Self:
        """Return the schedule as it is: it follows the loss, not the length of the run."""
        return self

    def with_peak(self, peak: float) -> Self:
        """Return the schedule with another peak, and all other rates in proportion."""
        return replace(self, peak=peak)

    def at(self, step: int, n_halvings: int = 0) -> float:
        """Return the learning rate of optimizer step number `step` (from 0) after `n_halvings` halvings."""
        warm = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return self.peak * warm * 0.5**n_halvings


Schedule = Cosine | WarmupCosine | WarmupPlateau


@dataclass
class LearningRate:
    """The learning rate of a run: a schedule, and what a plateau schedule has to remember, which is the run's state."""

    schedule: Schedule
    n_halvings: int = 0
    best: float = math.inf
    windows_without_progress: int = 0
    losses: list[float] = field(default_factory=list)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step number `step`."""
        if isinstance(self.schedule, WarmupPlateau):
            return self.schedule.at(step, self.n_halvings)
        return self.schedule.at(step)

    @property
    def follows_loss(self) -> bool:
        """Whether `observe` has to be called with the loss of every step, averaged over all ranks."""
        return isinstance(self.schedule, WarmupPlateau)

    def n_undecided(self, step: int) -> int:
        """Return how many losses, from that of `step` on, may be observed late: the last one may change the rate."""
        schedule = self.schedule
        if not isinstance(schedule, WarmupPlateau):
            return 0
        return schedule.window - len(self.losses) + max(0, schedule.warmup - step)

    def observe(self, step: int, loss: float) -> None:
        """Take the training loss of a step into account; halves the rate when the loss has stopped falling.

        A loss that is not finite, whose step was skipped, says nothing.
        """
        schedule = self.schedule
        if not isinstance(schedule, WarmupPlateau) or step < schedule.warmup or not math.isfinite(loss):
            return
        self.losses.append(loss)
        if len(self.losses) < schedule.window:
            return
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        if mean < self.best - abs(self.best) * schedule.threshold or not math.isfinite(self.best):
            self.best = mean
            self.windows_without_progress = 0
            return
        self.windows_without_progress += 1
        if self.windows_without_progress >= schedule.patience and self.n_halvings < schedule.halvings:
            self.n_halvings += 1
            self.windows_without_progress = 0

    def state(self) -> dict[str, float | int | list[float]]:
        """Return what a resumed run needs."""
        return {
            "n_halvings": self.n_halvings,
            "best": self.best,
            "windows_without_progress": self.windows_without_progress,
            "losses": list(self.losses),
        }

    def restore(self, state: dict[str, float | int | list[float]]) -> None:
        """Take over what `state` returned."""
        self.n_halvings = int(state["n_halvings"])  # type: ignore[arg-type]
        self.best = float(state["best"])  # type: ignore[arg-type]
        self.windows_without_progress = int(state["windows_without_progress"])  # type: ignore[arg-type]
        self.losses = list(state["losses"])  # type: ignore[arg-type]
