"""Training DALL·E 2's upsamplers on pictures alone: crops, and the same in small (Ramesh et al. 2022, 2.1)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from dalle.output.sheets import side_by_side
from dalle.output.text import Say
from dvae.images import dvae_augmentation, open_image, resize_and_crop, to_image, to_tensor
from dvae.metrics import psnr
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts
from training.ranks.ranks import Ranks
from training.recipes import Recipe, stage_of
from training.stages.dvae import channels_last
from training.stages.inputs import Inputs, first_readable
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import PREVIEWS, with_weights
from training.unclip_recipes import UpsamplerRecipe
from unclip.decoding import loss_by_quarter
from unclip.degradation import crop_pair, small_picture
from unclip.sampling import Noise
from unclip.upsampler import Upsampler, upsample, upsampler_loss


class UpsamplerStage:
    """An upsampler, as `fit` trains it.

    Args:
        recipe: the stage's recipe.
        model: the upsampler.
        directory: where it is exported.
        previews: pictures that the sheets show beside those made of them in small.
        metadata: written beside the configuration.
    """

    unit = "images"
    units_per_sample = 1

    def __init__(
        self,
        recipe: UpsamplerRecipe,
        model: Upsampler,
        directory: Path,
        previews: ShardData,
        metadata: Mapping[str, Any],
    ) -> None:
        self.name = directory.name
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.model, self._config, self._previews = model, model.config, previews

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a crop of the picture, and the same of it in small, degraded; nothing is mirrored."""
        image = open_image(sample.image_bytes, sample.source)
        large = dvae_augmentation(image, self._config.image_size, rng, flip=False)
        small = small_picture(large, self._config.input_size, self._config.degradation, rng)
        images, smalls = crop_pair(large, small, self._config.crop, rng)
        return {"images": images, "small": smalls}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the same of the middle, not degraded."""
        large = self._whole(sample)
        small = small_picture(large, self._config.input_size, "none", rng)
        images, smalls = crop_pair(large, small, self._config.crop, None)
        return {"images": images, "small": smalls}

    def _whole(self, sample: Sample) -> Image.Image:
        return resize_and_crop(open_image(sample.image_bytes, sample.source), self._config.image_size)

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `upsampler_loss`, and the squared error of each quarter of the noise."""
        images = batch.tensors["images"].contiguous(memory_format=torch.channels_last)
        loss, parts = upsampler_loss(self.model, images, batch.tensors["small"], batch.noise_seed)
        return loss, {"mse_by_quarter": loss_by_quarter(parts["mse"], parts["t"])}

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return preview pictures beside those made of them in small, with their PSNR and that of bilinear ones."""
        found = [image for _, image in first_readable(self._previews, PREVIEWS, self._whole)]
        if not found:
            return None
        upsampler = with_weights(lambda: Upsampler(self._config), weights).to(next(self.model.parameters()).device)
        device = next(upsampler.parameters()).device
        rng = np.random.default_rng(0)
        small = torch.stack([to_tensor(small_picture(each, self._config.input_size, "none", rng)) for each in found])
        noise = Noise.of(0, "sample sheet", range(len(found)))
        drawn = upsample(upsampler, small.to(device), noise, steps=self.recipe.sample_steps).cpu()
        enlarged = (upsampler.enlarged(small.to(device) * 2 - 1).cpu() + 1) / 2
        whole = torch.stack([to_tensor(each) for each in found])
        both = zip(psnr(whole, drawn).tolist(), psnr(whole, enlarged).tolist(), strict=True)
        labels = [f"{ours:.1f} dB, bilinear {bilinear:.1f}" for ours, bilinear in both]
        return side_by_side(found, [to_image(image) for image in drawn], labels, title="original | enlarged")

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Do nothing: the first rank draws alone."""

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the upsampler's directory."""
        with_weights(lambda: Upsampler(self._config), weights).save(self.directory, {**self.metadata, "step": step})


@alone_in("upsampler")
def train_upsampler(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train the recipe's upsampler; returns its directory, which is named for the size of its pictures, as its run is.

    Raises:
        ValueError: the recipe has no upsampler; or as `fit`.
    """
    stage_recipe: UpsamplerRecipe = stage_of(recipe, "upsampler")
    program = Program.open(inputs, ranks, say, captions=False)
    config = stage_recipe.model
    torch.manual_seed(stage_recipe.train.seed)
    model = channels_last(Upsampler(config).to(ranks.device))
    model.unet.activation_checkpointing = stage_recipe.train.activation_checkpointing
    directory = inputs.out / f"upsampler-{config.image_size}"
    previews = program.validation or program.data
    stage = UpsamplerStage(stage_recipe, model, directory, previews, {"recipe": recipe.name})
    description = {"recipe": recipe.name, "model": dataclasses.asdict(config)}
    program.fit(stage, stage_recipe.train, program.spec(directory.name, description, stage_recipe))
    return directory
