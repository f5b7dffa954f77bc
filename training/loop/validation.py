"""Validation: the same samples every time, whatever the ranks and workers; the ranks share the batches out."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle.output.progress import Progress
from training.config import TrainConfig
from training.data.batches import validation_batches
from training.data.reader import ShardData
from training.engine.engine import Engine
from training.loop.means import Means
from training.ranks.world import World, agree, mean_over_ranks

if TYPE_CHECKING:
    from training.loop.fit import Stage

LARGEST_BATCH = 64
"""Samples in a batch where the run does not say how many a rank can hold. The size does not depend on the number of
ranks, because some metrics do on the size: CLIP's accuracy, the codes that a batch uses."""


def validate(
    stage: "Stage", engine: Engine, data: ShardData, config: TrainConfig, world: World, step: int
) -> dict[str, Any]:
    """Return the metrics of a stage's objective on the validation samples, and how many samples there were. Collective.

    Every rank computes as many batches as the others, because at ZeRO stage 3 they gather the weights together: one
    that has none left computes another's, which does not count.

    Raises:
        ValueError: too many samples are unusable, or all.
        OSError: another rank could not go on.
    """
    batch_size = config.micro_batch or min(config.global_batch, LARGEST_BATCH)
    n_chosen = min(config.validation_samples or len(data), len(data))
    rounds = math.ceil(math.ceil(n_chosen / batch_size) / world.size)
    batches = validation_batches(
        data,
        stage.transform_for_validation,
        batch_size,
        max_bad_fraction=config.max_bad_fraction,
        samples=n_chosen,
        rank=world.rank,
        world_size=world.size,
    )
    means, n_measured = Means(), 0
    error: Exception | None = None
    spare: dict[str, Tensor] = {}
    if world.size > 1:  # so that every rank has one before the first of them is gathered for
        try:
            spare = _any_batch(stage, data, batch_size, config.max_bad_fraction)
        except (ValueError, OSError) as caught:
            error = caught
        _agree_on(error, world)
    with Progress("validation samples") as progress:
        for turn in range(rounds):
            weight = 0
            try:
                batch = next(batches, None) if error is None else None
                if batch is not None and batch.numbers:
                    spare, weight = batch.tensors, len(batch.numbers)
            except (ValueError, OSError) as caught:
                error = error or caught
            if not spare or (weight == 0 and world.size == 1):
                continue
            tensors = {name: tensor.to(world.device) for name, tensor in spare.items()}
            number = turn * world.size + world.rank
            loss, metrics = engine.forward(stage.prepare(tensors, step, number, measure=True))
            means.add({"loss": loss, **metrics}, weight)
            n_measured += weight
            world.watch.touch()
            if world.is_first:
                progress.update(min(n_chosen, (turn + 1) * world.size * batch_size), n_chosen)
    return _result(means, n_measured, error, world)


def _any_batch(stage: "Stage", data: ShardData, batch_size: int, max_bad_fraction: float) -> dict[str, Tensor]:
    """Return the tensors of the first batch that has a usable sample; raises ValueError if there is none."""
    batches = validation_batches(data, stage.transform_for_validation, batch_size, max_bad_fraction=max_bad_fraction)
    return next(batch.tensors for batch in batches if batch.numbers)


def _agree_on(error: Exception | None, world: World) -> None:
    """Raise this rank's error, or another one where another rank has one. Collective."""
    if agree(error is not None, world):
        raise error if error is not None else OSError("the validation of another rank failed: see its message")


def _result(means: Means, n_measured: int, error: Exception | None, world: World) -> dict[str, Any]:
    _agree_on(error, world)
    here = torch.tensor(n_measured, dtype=torch.float64, device=world.device)
    total = round(mean_over_ranks(here, world).item() * world.size)
    if total == 0:
        raise ValueError("none of the validation samples is usable: `--validation` needs other shards")
    return {**means.take(world), "samples": total}
