"""Validation: the loss on held-out samples, the same ones every time, shared out among the ranks."""

import math
from typing import Any

import torch
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.output.progress import progress_bar
from training.data.batches import validation_batches
from training.engine.objective import MicroBatch
from training.loop.means import Means
from training.loop.run import Run
from training.loop.stage import Stage
from training.ranks.ranks import Ranks, agree, mean_over_ranks

MAX_BATCH = 64
"""Samples in a batch if the run does not say how many a rank can hold. The size is the same for any number of ranks,
because some metrics depend on it: CLIP's accuracy, the codes that a batch uses."""


def validate(run: Run, data: ShardData, step: int, *, may_stop: bool) -> dict[str, Any] | None:
    """Return the metrics of a stage's loss on the validation samples, and the number of samples. Collective.

    Returns None if it `may_stop` before its end and a signal asks the run to.

    Every rank computes as many batches as the others, because at ZeRO stage 3 they gather the weights together: a rank
    that has run out repeats a batch with weight 0.

    Raises:
        ValueError: too many samples are unusable, or all.
        OSError: the validation of another rank failed.
    """
    stage, config, ranks = run.stage, run.config, run.ranks
    batch_size = config.micro_batch or min(config.global_batch, MAX_BATCH)
    n_chosen = min(config.validation_samples or len(data), len(data))
    rounds = math.ceil(math.ceil(n_chosen / batch_size) / ranks.size)
    batches = validation_batches(
        data,
        stage.transform_for_validation,
        batch_size,
        max_bad_fraction=config.max_bad_fraction,
        samples=n_chosen,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    means, n_measured = Means(), 0
    error: Exception | None = None
    spare: dict[str, Tensor] = {}
    if ranks.size > 1:  # every rank needs a batch before the first one gathers weights for its own
        try:
            spare = _any_batch(stage, data, batch_size, config.max_bad_fraction)
        except (ValueError, OSError) as caught:
            error = caught
        _agree_on(error, ranks)
    with progress_bar("validation samples") as progress:
        for turn in range(rounds):
            if may_stop and agree(run.stop.raised, ranks):
                return None
            weight = 0
            try:
                batch = next(batches, None) if error is None else None
                if batch is not None and batch.numbers:
                    spare, weight = batch.tensors, len(batch.numbers)
            except (ValueError, OSError) as caught:
                error = error or caught
            if not spare or (weight == 0 and ranks.size == 1):
                continue
            micro_batch = MicroBatch(tensors=spare, noise_seed=turn * ranks.size + ranks.rank, measure=True)
            loss, metrics = run.engine.forward({"batch": micro_batch, "step": step})
            means.add({"loss": loss, **metrics}, weight)
            n_measured += weight
            ranks.watch.touch()
            if ranks.is_first:
                progress(min(n_chosen, (turn + 1) * ranks.size * batch_size), n_chosen)
    return _result(means, n_measured, error, ranks)


def _any_batch(stage: Stage, data: ShardData, batch_size: int, max_bad_fraction: float) -> dict[str, Tensor]:
    """Return the tensors of the first batch that has a usable sample; raises ValueError if there is none."""
    batches = validation_batches(data, stage.transform_for_validation, batch_size, max_bad_fraction=max_bad_fraction)
    return next(batch.tensors for batch in batches if batch.numbers)


def _agree_on(error: Exception | None, ranks: Ranks) -> None:
    """Raise this rank's error, or an OSError if only another rank has one. Collective."""
    if agree(error is not None, ranks):
        raise error if error is not None else OSError("the validation of another rank failed: see its message")


def _result(means: Means, n_measured: int, error: Exception | None, ranks: Ranks) -> dict[str, Any]:
    _agree_on(error, ranks)
    here = torch.tensor(n_measured, dtype=torch.float64, device=ranks.device)
    total = round(mean_over_ranks(here, ranks).item() * ranks.size)
    if total == 0:
        raise ValueError("none of the validation samples is usable: `--validation` needs other shards")
    return {**means.take(ranks), "samples": total}
