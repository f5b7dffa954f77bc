"""A stage so small that a run takes no time, and `fit` in a folder of its own."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.data.reader import Sample, ShardData
from dvae.images import open_image, to_tensor
from training.config import TrainConfig
from training.engine.objective import MicroBatch
from training.engine.parts.averages import WeightsInParts
from training.loop.fit import fit
from training.loop.run_folder import RunSpec
from training.ranks.ranks import Ranks
from training.run_files import read_metrics

AtStep = Callable[[int], None]


class MeanColours:
    """A stage that learns the sum of a picture's mean colours."""

    name, unit, units_per_sample = "colours", "images", 1

    def __init__(self, directory: Path, at_step: AtStep | None = None, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.directory, self.model = directory, nn.Linear(3, 1)
        self.at_step, self.scale = at_step, scale
        self.exported: list[int] = []

    def transform(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        x = to_tensor(open_image(sample.image_bytes, sample.source)).mean(dim=(1, 2))
        return {"x": x + 0.01 * torch.from_numpy(rng.normal(size=3)).float()}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"x": to_tensor(open_image(sample.image_bytes, sample.source)).mean(dim=(1, 2))}

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.at_step is not None:
            self.at_step(step)
        x, generator = batch.tensors["x"], torch.Generator().manual_seed(batch.noise_seed)
        noise = 0.01 * torch.randn(x.shape, generator=generator)
        error = self.model(x + noise).squeeze(1) - x.sum(dim=1)
        return self.scale * error.square().mean(), {"brightness": x.mean()}

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        return Image.new("RGB", (4, 4)) if weights else None

    def help_to_draw(self, weights: WeightsInParts) -> None:
        pass

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        self.exported.append(step)
        self.directory.mkdir(exist_ok=True)
        save_file(dict(weights), self.directory / "model.safetensors")
        (self.directory / "config.json").write_text("{}")


class Run:
    """`fit` in a folder of its own."""

    def __init__(self, folder: Path, data: ShardData, ranks: Ranks) -> None:
        self.folder, self.data, self.ranks = folder, data, ranks
        self.said: list[str] = []
        self.stage = MeanColours(folder / "model")

    def __call__(
        self,
        config: TrainConfig,
        *,
        at_step: AtStep | None = None,
        scale: float = 1.0,
        fresh: bool = False,
        resume: bool = False,
        resume_from: str | None = None,
        recipe: str = "tiny",
        validation: ShardData | None = None,
        directory: Path | None = None,
    ) -> None:
        self.stage = MeanColours(directory or self.folder / "model", at_step, scale)
        description = {"stage": "colours", "recipe": recipe, "model": {"width": 3}}
        directory = self.folder / "run"
        spec = RunSpec(
            directory=directory, description=description, fresh=fresh, resume=resume, resume_from=resume_from
        )
        fit(self.stage, config, self.ranks, self.data, validation, spec, self.said.append)

    @property
    def losses(self) -> dict[int, float]:
        lines = [line for line in read_metrics(self.folder / "run") if line["split"] == "train"]
        assert len({line["step"] for line in lines}) == len(lines), "each step has one line"
        return {line["step"]: line["loss"] for line in lines}

    @property
    def weights(self) -> dict[str, list[float]]:
        saved = load_file(self.folder / "model" / "model.safetensors")
        return {name: tensor.flatten().tolist() for name, tensor in saved.items()}


NewRun = Callable[[str], Run]


def send(number: int, at: int) -> AtStep:
    """Send this process a signal while step `at` is computed."""

    sent: list[int] = []

    def at_step(step: int) -> None:
        if step == at and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return at_step
