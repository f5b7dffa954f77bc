"""An objective so small that an engine takes no time."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import training.engine.objective
from dalle.model import DALLE
from support import tiny
from training.config import OptimizerConfig, TrainConfig
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.ranks.ranks import Ranks
from training.stages.transformer import transformer_loss


class Objective(nn.Module):
    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = F.mse_loss(self.model(x).float(), y)
        return loss, {"half": loss.detach() / 2}


def transformer_objective(model: DALLE) -> training.engine.objective.Objective:
    return training.engine.objective.Objective(model, partial(transformer_loss, model))


def data(step: int, n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(n, 4, generator=generator),
        "y": 9 * torch.randn(n, 2, generator=generator),
    }


def engine_of(objective: nn.Module, config: TrainConfig, ranks: Ranks) -> Engine:
    return Engine(objective, resolve(config, ranks.size), ranks)


def config(**changes: Any) -> TrainConfig:
    return tiny.train_config(**{"optimizer": OptimizerConfig(gradient_clipping=1.0), **changes})


def train(engine: Engine, steps: range) -> list[float]:
    engine.train()
    return [engine.step([data(step)], 1e-2, step)["loss"].item() for step in steps]


def averages_of(engine: Engine) -> dict[str, Tensor]:
    """Return copies of the averaged weights on the first rank, and nothing on others. Collective."""
    found: dict[str, Tensor] = {}
    engine.averages.use(lambda weights: found.update({name: weight.clone() for name, weight in weights.items()}))
    return found


def user_json(folder: Path, content: object) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)
