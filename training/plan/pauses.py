"""Computes the memory of a rank while a run does not train: it validates, saves, exports, and draws sample pictures."""

import torch

from dalle.cache import bytes_per_candidate
from training.plan.activations import FLOAT, activations, widths
from training.plan.memory_model import Memory, Run, at_rest, fetched_ahead, gathered


def pauses(run: Run) -> dict[str, Memory]:
    """Return the memory of the first rank, which has the most, at each point.

    "validation": a forward pass. "saving": DeepSpeed writes from where things lie. "export": the averages are written
    tensor by tensor, at stage 3 put together from the ranks' parts. "sampling": the averages are used as a model, of
    which at stage 3 each rank has some layers.
    """
    gathers = 3.0 * FLOAT * run.sizes.largest if run.mode.zero_stage == 3 else 0.0
    return {
        "validation": at_rest(run, _validation(run)),
        "saving": at_rest(run, Memory()),
        "export": at_rest(run, Memory(working=gathers)),
        "sampling": at_rest(run, _sampling(run, gathers)),
    }


def _validation(run: Run) -> Memory:
    acts = activations(
        run.config, run.mode.precision, run.micro_batch, checkpointing=run.checkpointing, device=run.device
    )
    width = widths(run.mode.precision)
    positions = run.micro_batch * run.config.stream.length
    # the stream, queries, keys and values, and the MLP's hidden values of one layer
    layer = positions * run.config.d_model * (2 * width.stream + 8 * width.branch)
    return Memory(activations=float(layer), logits=acts.logits, deepspeed=gathered(run) + fetched_ahead(run))


def _sampling(run: Run, gathers: float) -> Memory:
    cache = run.samples * bytes_per_candidate(run.config, torch.float32)
    if run.mode.zero_stage == 3 and run.gpus > 1:
        layers = 12 * run.config.d_model**2 * run.config.n_layers
        most = -(-run.config.n_layers // run.gpus) / run.config.n_layers
        weights = FLOAT * (layers * most + run.sizes.total - layers)
        return Memory(weights=weights, working=gathers + cache * most)
    whole = 0.0 if run.device == "cpu" else float(FLOAT * run.sizes.total)  # a CPU's averages are used where they lie
    return Memory(weights=whole, working=float(cache), host=whole)
