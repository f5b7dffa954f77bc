"""The first stage: training a dVAE on pictures alone (Ramesh et al. 2021, 2.1, A.2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.gallery import side_by_side
from dvae import DVAE
from dvae.images import dvae_augmentation, open_image, resize_and_crop, to_image, to_tensor
from dvae.loss import dvae_loss
from dvae.metrics import code_usage
from training.data import Sample, ShardData
from training.fit import Tensors
from training.recipes import DVAERecipe


class DVAEObjective(nn.Module):
    """The dVAE's loss as a module, so that the engine sees one forward pass."""

    def __init__(self, model: DVAE) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, *, temperature: float, kl_weight: float, noise_seed: int, measure: bool
    ) -> tuple[Tensor, Tensors]:
        """Return the loss of a batch, and its parts; with `measure`, also what argmax tokens do.

        Args:
            images: (B,3,H,W) float32 in [0, 1].
            temperature: τ of the Gumbel-softmax.
            kl_weight: β.
            noise_seed: of the Gumbel noise.
            measure: also return codes_used, perplexity and hard_psnr, the PSNR of decoding the argmax tokens.
        """
        generator = torch.Generator(images.device).manual_seed(noise_seed)
        loss = dvae_loss(self.model, images, temperature=temperature, kl_weight=kl_weight, generator=generator)
        metrics = {"nll": loss.nll.detach(), "kl": loss.kl.detach()}
        if measure:
            with torch.no_grad():
                tokens = loss.logits.argmax(dim=1)
                usage = code_usage(tokens, self.model.config.vocab_size)
                error = (self.model.decode(tokens) - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
                metrics["hard_psnr"] = (-10.0 * error.log10()).mean()
                metrics["codes_used"] = torch.tensor(float(usage.used))
                metrics["perplexity"] = torch.tensor(float(usage.perplexity))
        return loss.total, metrics


class DVAEStage:
    """What `fit` needs to know to train a dVAE.

    Args:
        recipe: the stage's recipe.
        model: a new dVAE, or one to go on training.
        directory: where the dVAE is exported.
        previews: pictures that the sample sheets show with their reconstructions.
        metadata: written beside the configuration.
    """

    name = "dvae"
    unit = "images"
    units_per_sample = 1

    def __init__(
        self, recipe: DVAERecipe, model: DVAE, directory: Path, previews: ShardData, metadata: Mapping[str, Any]
    ) -> None:
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.objective = DVAEObjective(model)
        self._config = model.config
        self._previews = previews

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture (Listing 1)."""
        image = open_image(sample.image_bytes, sample.source)
        return {"images": to_tensor(dvae_augmentation(image, self._config.image_size, rng, flip=self.recipe.flip))}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the picture, resized and centre-cropped."""
        image = open_image(sample.image_bytes, sample.source)
        return {"images": to_tensor(resize_and_crop(image, self._config.image_size))}

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Add the schedules' values at this step.

        The pictures go in channels last, in which convolutions are fastest, and stay so from layer to layer.
        """
        return {
            "images": tensors["images"].contiguous(memory_format=torch.channels_last),
            "temperature": self.recipe.temperature.at(step),
            "kl_weight": self.recipe.kl_weight.at(step),
            "noise_seed": noise_seed,
            "measure": measure,
        }

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return preview pictures above their reconstructions."""
        model = self._with(weights)
        originals, labels = [], []
        for index in range(min(8, len(self._previews))):
            try:
                sample = self._previews.read(index)
                originals.append(self.transform_for_validation(sample, np.random.default_rng(0))["images"])
            except ValueError:
                continue
            labels.append(sample.key)
        if not originals:
            return None
        images = torch.stack(originals)
        with torch.no_grad():
            reconstructions = model.decode(model.encode(images))
        return side_by_side(
            [to_image(image) for image in images], [to_image(image) for image in reconstructions], labels
        )

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the dVAE's directory."""
        self._with(weights).save(self.directory, metadata={**self.metadata, "step": step})

    def _with(self, weights: Mapping[str, Tensor]) -> DVAE:
        model = DVAE(self._config)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in weights.items()}, strict=True)
        return model.eval()


@torch.no_grad()
def scale_encoder_output(model: DVAE, gain: float) -> None:
    """Scale the encoder's output convolution, in place, before training starts.

    Deviation: with the plain initialisation, the logits of a small dVAE are so alike that the Gumbel noise drowns them;
    the decoder learns to ignore the tokens and all but a handful of codes die. Logits `gain` times larger carry a
    signal from the first step.
    """
    model.encoder.get_submodule("blocks.output.conv").get_parameter("weight").mul_(gain)
