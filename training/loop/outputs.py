"""What a run writes: lines of metrics, validation, sample pictures, checkpoints, and the export.

Nothing is saved of weights that have diverged.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle.output.sheets import save_png
from dalle.output.text import duration
from training.engine.checkpoints import latest_tag, resumable_tags
from training.loop.run import Run
from training.loop.throughput import Timer, peak_memory_gib
from training.loop.validation import validate
from training.ranks.ranks import from_all_ranks, max_over_ranks, on_first_rank
from training.run_files import checkpoint_tag, sheet_path, step_of

logger = logging.getLogger(__name__)

_SHOWN = ("loss", "text_loss", "image_loss", "psnr", "hard_psnr", "codes_used", "accuracy", "grad_norm")
"""Metrics in the line that is said; metrics.jsonl has all."""
_MAX_LOSS = 700.0
"""Nats; e to a larger power is no float."""


def log_training(run: Run, done: int, learning_rate: float, timer: Timer) -> None:
    """Write the means since the last line to the log, and say the most important of them. Collective."""
    values = run.means.take(run.ranks)
    interval = timer.interval(done)
    samples_per_s = interval.steps * run.config.global_batch / interval.elapsed_s
    values |= {
        "learning_rate": learning_rate,
        f"{run.stage.unit}_per_s": samples_per_s * run.stage.units_per_sample,
        "data_wait": interval.data_wait,
        "peak_memory_gib": max_over_ranks(peak_memory_gib(run.ranks.device), run.ranks),
        "bad_samples": float(run.bad_samples()),
        "skipped_steps": float(run.skipped.n),
    }
    if run.peak_flops is not None and run.spec.flops_per_sample is not None:
        values["mfu"] = samples_per_s * run.spec.flops_per_sample / run.peak_flops
    _name_perplexities(values)
    speed = f"{values[f'{run.stage.unit}_per_s']:,.0f} {run.stage.unit}/s"
    shown = {name: value for name, value in values.items() if name in _SHOWN}
    _log(run, done, "train", values, f"{_in_words(shown)}  {speed}  {duration(timer.left_s(done))} left")
    if values.get("captions_cut", 0.0) > 0 and not run.has_warned_of_cut:
        run.has_warned_of_cut = True
        if run.ranks.is_first:
            logger.warning(
                "%.1f%% of the captions since the last line were too long and were cut; metrics.jsonl counts them as "
                "captions_cut",
                100 * values["captions_cut"],
            )


def show(run: Run, done: int) -> None:
    """Validate, and draw samples, where they are due after this step; the last step has its own. Collective.

    If the run is asked to stop meanwhile, nothing is shown, and `run.to_show` says so.
    """
    if done >= run.config.steps:
        return
    is_due = run.config.validate_every and done % run.config.validate_every == 0
    run.to_show = bool(is_due) and not log_validation(run, done, may_stop=True)
    if run.to_show:
        return
    if run.config.sample_every and done % run.config.sample_every == 0:
        draw_samples(run, done)


def log_validation(run: Run, done: int, *, may_stop: bool) -> bool:
    """Measure the loss on the validation samples, if there are any, and write it to the log. Collective.

    Returns whether that is done: it is not if it `may_stop`, and a signal asks the run to.
    """
    if run.validation is None:
        return True
    with run.engine.validating():
        values = validate(run, run.validation, done, may_stop=may_stop)
    if values is None:
        return False
    _name_perplexities(values)
    shown = {name: value for name, value in values.items() if not isinstance(value, list)}
    _log(run, done, "validation", values, f"validation: {_in_words(shown)}")
    return True


def draw_samples(run: Run, done: int) -> None:
    """Save the stage's sample picture, if it has one. Collective."""

    def draw(weights: Mapping[str, Tensor]) -> None:
        try:
            picture = run.stage.picture(weights)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.warning("no sample sheet: the whole model does not fit beside what training holds")
            return
        if picture is not None:
            path = sheet_path(run.spec.directory, done)
            save_png(picture, path)
            assert run.log is not None
            run.log.picture(done, path)

    run.engine.averages.use(draw, run.stage.help_to_draw)
    run.ranks.watch.touch()


def _log(run: Run, done: int, split: str, values: Mapping[str, Any], line: str) -> None:
    """Write values to the log and say a line, on the first rank. Collective."""

    def write() -> None:
        assert run.log is not None
        run.log.write(done, split, values)
        run.say(f"{run.stage.name} {done}/{run.config.steps}  {line}")

    on_first_rank(write, run.ranks)


def _in_words(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


def _name_perplexities(values: dict[str, Any]) -> None:
    """Replace the image losses by row, in nats, by perplexities, in place: e to the mean, not the mean of e to each."""
    losses = values.pop("image_loss_by_row", None)
    if losses is not None:
        # written so that NaN, too, becomes infinity
        perplexities = [math.exp(loss) if loss < _MAX_LOSS else math.inf for loss in losses]
        values["image_perplexity_by_row"] = [float(f"{value:.6g}") for value in perplexities]


# ------------------------------------------------------------------------------------------------------- saving


def save(run: Run, done: int, *, is_last: bool = False) -> None:
    """Save a checkpoint after `done` steps; the last one is published before anything else happens. Collective.

    Raises:
        ValueError: training has diverged.
        OSError: it could not be written.
    """
    check_skipped(run, done)
    _require_finite(run, done)
    show(run, done)  # before the checkpoint: a run that resumes from it starts with the next step
    run.observe_losses(done)
    run.engine.save(run.spec.checkpoints, done, dataclasses.asdict(run.state(done)))
    if is_last or run.to_show:
        run.engine.saver.publish_staged()
    run.ranks.watch.touch()


def export(run: Run, done: int) -> None:
    """Write the stage's directory for use, of the averaged weights. Collective."""
    run.engine.averages.use(lambda weights: run.stage.export(weights, done))
    run.ranks.watch.touch()


def finish(run: Run, done: int) -> None:
    """Export, validate, draw samples and save the end of a run, at step `done`. Collective.

    The checkpoint is saved last: its presence means that export, samples and validation exist.

    Raises:
        ValueError: training has diverged.
        OSError: something could not be written.
    """
    check_skipped(run, done)
    if run.skipped.n >= done:
        raise _diverged(run, "all steps were skipped, their loss or gradient not being finite, as seen", done)
    _require_finite(run, done)
    export(run, done)
    if latest_tag(run.spec.checkpoints) != checkpoint_tag(done):
        log_validation(run, done, may_stop=False)
        draw_samples(run, done)
        save(run, done, is_last=True)


def check_skipped(run: Run, done: int) -> None:
    """Count the steps that were skipped since the last check. Collective.

    Raises:
        ValueError: too many in a row were.
    """
    if run.skipped.check():
        limit = run.config.max_skipped_steps
        what = f"more than {limit} steps in a row were skipped, their loss or gradient not being finite, as seen"
        raise _diverged(run, what, done, before=run.skipped.first_in_row)


def _require_finite(run: Run, done: int) -> None:
    """Raise ValueError unless the weights and the averaged weights are finite. Collective."""
    averages = [name for names in from_all_ranks(run.engine.averages.not_finite()[:1], run.ranks) for name in names]
    wrong = [f"{name} has values that are not finite" for name in averages]
    if not run.engine.weights_are_finite():
        wrong.append("a weight is not finite")
    if wrong:
        raise _diverged(run, wrong[0], done)


def _diverged(run: Run, what: str, done: int, *, before: int | None = None) -> ValueError:
    """Return the error that names the checkpoint to go back to: the last one, or the last up to step `before`.

    Collective: one that is on its way from a local disk is good, and waited for.
    """
    run.engine.saver.publish_staged()
    tag = latest_tag(run.spec.checkpoints)
    if tag is not None and before is not None:
        tag = next((earlier for earlier in resumable_tags(run.spec.checkpoints) if step_of(earlier) <= before), tag)
    advice = (
        f"{run.spec.checkpoints / tag} is the last good checkpoint: resume from it"
        if tag
        else "nothing is saved: start anew"
    )
    return ValueError(
        f"{what} at step {done}, training has diverged and this step is not saved. {advice} with another --seed or "
        "--precision"
    )
