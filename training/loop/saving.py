"""What a run keeps: checkpoints, the exported averages, and the checks that neither is of weights that diverged."""

import dataclasses

from training.engine.checkpoints import checkpoint_tag, latest_tag, resumable_tags, step_of
from training.loop.records import draw_samples, log_validation, show
from training.loop.run import Run
from training.ranks.world import agree, on_first_rank


def save(run: Run, done: int) -> None:
    """Save a checkpoint after `done` steps. Collective.

    Raises:
        ValueError: training has diverged.
        OSError: it could not be written.
    """
    check_skipped(run, done)
    _require_finite(run, done)
    show(run, done)  # before the checkpoint: a run that resumes from it starts with the next step
    run.observe_losses(done)
    run.engine.save(run.spec.checkpoints, done, dataclasses.asdict(run.state(done)))
    run.world.watch.touch()


def export(run: Run, done: int) -> None:
    """Write the stage's directory for use, of the averaged weights. Collective."""
    on_first_rank(lambda: run.stage.export(run.engine.averaged_weights(), done), run.world)
    run.world.watch.touch()


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
        log_validation(run, done)
        draw_samples(run, done)
        save(run, done)


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
    averages = run.engine.averaged_weights()
    wrong = [f"{name} has values that are not finite" for name, w in averages.items() if not w.isfinite().all()]
    if not run.engine.weights_are_finite():
        wrong.append("a weight is not finite")
    if agree(bool(wrong), run.world):
        raise _diverged(run, wrong[0] if wrong else "the averaged weights are not finite", done)


def _diverged(run: Run, what: str, done: int, *, before: int | None = None) -> ValueError:
    """Return the error that names the checkpoint to go back to: the last one, or the last up to step `before`."""
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
