"""The loop of a run, in sight: read micro-batches, take an optimizer step, record it, and save once in a while."""

import numpy as np

from dalle.data.reader import ShardData
from training.data.batches import Batch, Share, batches
from training.engine.objective import MicroBatch
from training.loop.outputs import check_skipped, export, log_training, save, show
from training.loop.run import Run
from training.loop.throughput import Timer
from training.ranks.ranks import agree
from training.ranks.stop import Interrupted

VOTE_EVERY = 10
"""Steps between two votes of several GPUs on whether to stop. A vote waits for the device; a signal is obeyed so many
steps late at most."""


def train_steps(run: Run, data: ShardData, start: int) -> None:
    """Take the steps from `start` to the last one.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step under way is done and saved.
        ValueError: too many samples are unusable, too many steps in a row were skipped, or weights are not finite.
        OSError: something could not be written.
    """
    config, engine, ranks = run.config, run.engine, run.ranks
    share = Share(
        seed=config.seed,
        micro_batch=engine.micro_batch,
        accumulation=engine.accumulation,
        rank=ranks.rank,
        world_size=ranks.size,
        start_step=start,
        max_steps=config.steps,
    )
    workers, max_bad_fraction = config.workers, config.max_bad_fraction
    stream = batches(
        data, run.stage.transform, share, workers=workers, max_bad_fraction=max_bad_fraction, shuffle=run.shuffle
    )
    vote_every = VOTE_EVERY if ranks.size > 1 and ranks.device.type == "cuda" else 1
    engine.train()
    if run.to_show:  # what the run before this one was stopped in
        show(run, start)
        if run.to_show:
            raise _interrupted(run, start)
    timer = Timer(start, config.steps)
    for step in range(start, config.steps):
        done = step + 1
        is_logged = done % config.log_every == 0 or done == config.steps
        learning_rate = run.rate.at(step)

        read = []
        for _ in range(engine.accumulation):
            with timer.waiting():
                read.append(next(stream))
            ranks.watch.touch()
        micro_batches = [_micro_batch(run, batch, step, micro, is_logged) for micro, batch in enumerate(read)]

        metrics = engine.step([{"batch": batch, "step": step} for batch in micro_batches], learning_rate, step)
        ranks.watch.touch(done)

        run.n_bad += sum(batch.n_bad for batch in read)
        run.means.add(metrics, engine.applied)
        keys = [key for batch in read for key in batch.keys]
        run.skipped.add(step, engine.applied, metrics["loss"], keys, overflowed=engine.overflowed)
        if run.rate.follows_loss:
            run.losses.append(metrics["loss"].detach().float())
            if len(run.losses) >= run.rate.n_undecided(done - len(run.losses)):
                run.observe_losses(done)
        if is_logged or run.skipped.is_check_due:
            check_skipped(run, done)
        if is_logged:
            log_training(run, done, learning_rate, timer)

        if done % vote_every == 0:
            engine.saver.publish_staged(wait=False)
        if done % vote_every == 0 and agree(run.stop.raised, ranks) and done < config.steps:
            save(run, done, is_last=True)
            raise _interrupted(run, done)
        with timer.paused():
            if done % config.checkpoint_every == 0 and done < config.steps:
                save(run, done)
                export(run, done)
            else:
                show(run, done)
        if run.to_show:  # a signal came meanwhile
            if done % config.checkpoint_every:
                save(run, done)
            raise _interrupted(run, done)
        timer.step_done(done)


def _interrupted(run: Run, done: int) -> Interrupted:
    return Interrupted(
        f"stopped at step {done} of {run.config.steps}, saved in {run.spec.directory}: {run.spec.resume_command()} "
        "resumes from there"
    )


def _micro_batch(run: Run, batch: Batch, step: int, micro: int, is_logged: bool) -> MicroBatch:
    """Return micro-batch number `micro` of a step, on the host."""
    # the micro-batch's place in the order of the samples: with the same micro-batch, other ranks draw the same noise
    position = (step * run.ranks.size + run.ranks.rank) * run.engine.accumulation + micro
    noise_seed = int(np.random.SeedSequence((run.config.seed, position)).generate_state(1, np.uint64)[0] >> 1)
    return MicroBatch(tensors=batch.tensors, noise_seed=noise_seed, measure=is_logged)
