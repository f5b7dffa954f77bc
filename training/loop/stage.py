"""The interface between the loop and a neural stage: model, samples, loss, and what a run leaves behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from dalle.data.reader import Sample
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts


class Stage(Protocol):
    """A neural stage, as `fit` trains it."""

    @property
    def name(self) -> str:
        """The stage: dvae-warmup, dvae, transformer, clip-warmup, clip, decoder, prior or upsampler."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""

    @property
    def unit(self) -> str:
        """The unit of throughput: images or tokens."""

    @property
    def units_per_sample(self) -> int:
        """Units in a sample."""

    @property
    def directory(self) -> Path:
        """The directory for use that `export` writes."""

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a training sample's tensors, augmented by `rng`; runs in the loader's processes."""

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a validation sample's tensors, without augmentation."""

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of a micro-batch on the device at optimizer step `step`, and its metrics, 0-d or 1-d.

        DeepSpeed runs it: under precision autocast everything in it is autocast.
        """

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Draw samples with these weights; None if the stage has nothing to show. On the first rank."""

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Do this rank's share of a picture for which `picture` calls all ranks."""

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the directory for use."""
