"""Trains a stage for a few steps on a GPU that is not there, and prints what every step waited for, as JSON.

`phantom_run.py FOLDER STAGE [option=value …]`: the options are those of `TrainConfig`. A process of its own, because
DeepSpeed chooses its device once.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ |= {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"}  # before DeepSpeed is imported
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from phantom import phantom_gpu  # noqa: E402
from support import tiny  # noqa: E402

from dvae import DVAE  # noqa: E402
from training.loop.throughput import Timer  # noqa: E402
from training.ranks.ranks import Ranks  # noqa: E402
from training.recipes import Recipe  # noqa: E402
from training.stages.clip import train_clip  # noqa: E402
from training.stages.dvae import train_dvae  # noqa: E402
from training.stages.inputs import Inputs  # noqa: E402
from training.stages.tokenizer import train_tokenizer  # noqa: E402
from training.stages.transformer import train_transformer  # noqa: E402

STAGES = {"dvae": train_dvae, "clip": train_clip, "transformer": train_transformer}
LOG_EVERY, STEPS = 3, 6


class _EnoughError(Exception):
    """Ends the run before it saves tensors that have no contents."""


def recipe_of(options: dict[str, object]) -> Recipe:
    """Return the tests' recipe, its stages trained with these options, without warm-ups."""
    recipe = tiny.recipe(**{"log_every": LOG_EVERY, "steps": STEPS + 1, "ema_every": STEPS + 1, **options})
    return dataclasses.replace(recipe, dvae=dataclasses.replace(recipe.dvae, warmup=None))


def main() -> None:
    """Run, and print the waits of a step without a line of metrics and of one with it."""
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    options = {name: json.loads(value) for name, value in (given.split("=", 1) for given in sys.argv[3:])}
    recipe = recipe_of(options)
    inputs = Inputs(data=[tiny.write_world(folder / "world")], out=folder / "bundle")
    train_tokenizer(recipe, inputs, lambda _: None)
    torch.manual_seed(0)
    DVAE(recipe.dvae.model).save(folder / "bundle" / "dvae")
    if stage == "dvae":
        inputs = dataclasses.replace(inputs, out=folder / "another")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks(rank=0, size=1, device=torch.device("cuda", 0))
    steps: list[Counter[str]] = []

    with phantom_gpu() as gpu:
        no_gradient_is_wrong = ("training/engine/powersgd:reduce_", "deepspeed utils:is_invalid_grad_norm")
        gpu.reads |= dict.fromkeys(no_gradient_is_wrong, False)

        def step_done(_timer: Timer, done: int) -> None:
            steps.append(Counter(gpu.waits))
            gpu.waits.clear()
            if done == STEPS:
                raise _EnoughError

        with mock.patch.object(Timer, "step_done", step_done), contextlib.suppress(_EnoughError):
            STAGES[stage](recipe, inputs, ranks, lambda line: print(line, file=sys.stderr))
    dist.destroy_process_group()
    assert len(steps) == STEPS
    print(json.dumps({"step": steps[STEPS - 2], "logged": steps[STEPS - 1], "all": steps}))


if __name__ == "__main__":
    main()
