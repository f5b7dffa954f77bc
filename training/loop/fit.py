"""`fit`: one run of a neural stage, from its newest good checkpoint to the exported weights.

A stage says what is trained: its model, its loss, its samples (stage.py). The rest is here: signals, the run's folder
(run_folder.py), the engine, the loop (loop.py), and what it writes (outputs.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dalle.data.order import Shuffle
from dalle.data.reader import ShardData
from dalle.output.text import Say, counted
from storage.errors import reason_of
from training.config import TrainConfig
from training.engine.checkpoints import latest_tag
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.objective import Objective
from training.loop.loop import train_steps
from training.loop.metrics import MetricLog
from training.loop.outputs import finish
from training.loop.run import Run, TrainState
from training.loop.run_folder import RunSpec, claim
from training.loop.sinks import require_wandb
from training.loop.stage import Stage
from training.loop.throughput import has_bfloat16_arithmetic
from training.ranks.ranks import Ranks, agree, on_first_rank, require_same
from training.ranks.stop import Interrupted, StopSignals
from training.run_files import RunState, step_of


def fit(
    stage: Stage,
    config: TrainConfig,
    ranks: Ranks,
    train: ShardData,
    validation: ShardData | None,
    spec: RunSpec,
    say: Say,
) -> None:
    """Train a stage, from its newest good checkpoint if there is one, and export the averaged weights.

    They go to `stage.directory`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything is saved.
        ValueError: the run in `spec.directory` is another one or has no good checkpoint to resume from, the ranks were
            not told the same, too many samples are unusable, too many steps in a row were skipped, or the weights are
            not finite.
        OSError: something could not be written.
    """
    data = [part and ([path.name for path in part.shards], len(part), part.encoding) for part in (train, validation)]
    require_same({"options": (config, spec), "data": data}, ranks)
    emulates_bfloat16 = agree(not has_bfloat16_arithmetic(ranks.device), ranks)
    resolved = resolve(config, ranks.size, emulates_bfloat16=emulates_bfloat16)
    config = resolved.config
    shuffle = Shuffle.of(
        train.counts, config.global_batch, window=config.shuffle_window, streams=config.shuffle_streams
    )
    for note in resolved.notes:
        say(f"{stage.name}: {note}")
    tag = spec.tag()
    if config.wandb is not None:
        on_first_rank(require_wandb, ranks)
    changes = claim(spec, config, ranks)
    if tag is not None and step_of(tag) >= config.steps and spec.resume_from is None:
        say(
            f"{stage.name}: the {config.steps} steps in {spec.directory} are done (--fresh trains anew, --steps trains "
            "longer)"
        )
        if (stage.directory / "config.json").is_file():
            return
    for change in changes:
        say(f"{stage.name}: {change}")
    ranks.watch.follow(spec.directory, lambda: latest_tag(spec.checkpoints))
    try:
        with StopSignals() as stop:
            engine = Engine(Objective(stage.model, stage.loss), resolved, ranks)
            say(f"{stage.name}: {counted(len(train), 'sample')} in {counted(len(train.shards), 'shard')}")
            say(f"{stage.name}: {engine.batch}")
            run = Run(
                stage=stage,
                config=config,
                ranks=ranks,
                spec=spec,
                engine=engine,
                shuffle=shuffle,
                validation=validation,
                say=say,
                stop=stop,
            )
            start = 0 if tag is None else _resume(run)
            if run.shuffle.window:
                say(f"{stage.name}: {run.shuffle}")
            if agree(stop.raised, ranks):
                raise Interrupted(f"stopped before the next step in {spec.directory}: {spec.resume_command()} resumes")
            with _log_opened(run, start):
                train_steps(run, train, start)
                finish(run, max(start, config.steps))
                if agree(stop.raised, ranks):
                    raise Interrupted(f"stopped: {stage.name} is finished, and saved in {spec.directory}")
    finally:
        ranks.watch.unfollow()


def _resume(run: Run) -> int:
    """Load the checkpoint that the run resumes from, and return the number of steps done. Collective."""
    state = TrainState(**run.engine.load(run.spec.checkpoints, run.spec.resume_from, run.say))
    run.say(f"{run.stage.name}: resuming from step {state.step} of {run.config.steps}")
    run.restore(state)
    return state.step


@contextmanager
def _log_opened(run: Run, start: int) -> Iterator[None]:
    """Give the run its log on the first rank, and close it with how the run ended. Collective."""
    config, spec, ranks = run.config, run.spec, run.ranks

    def open_log() -> None:
        run.log = MetricLog(spec.directory, start, wandb_project=config.wandb)

    on_first_rank(open_log, ranks)
    try:
        yield
    except BaseException as error:
        if run.log is not None:
            run.log.close(*_ending(ranks.watch.lost_rank_error(error) or error))
        raise
    if run.log is not None:
        run.log.close()


def _ending(error: BaseException) -> tuple[RunState, str]:
    """Return how an error ends a run, and why."""
    return "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed", reason_of(error)
