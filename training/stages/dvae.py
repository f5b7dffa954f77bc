"""The first stage: training a dVAE on pictures alone (Ramesh et al. 2021, 2.1, A.2).

Small dVAEs are warmed up as autoencoders and get a codebook from that; the paper's start from random weights.

Shapes: B batch  C channels of the codebook  Y,X grid of tokens  H,W picture in pixels.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.data.reader import Sample, ShardData
from dalle.output.sheets import side_by_side
from dalle.output.text import Say
from dvae import DVAE
from dvae.images import dvae_augmentation, map_pixels, open_image, resize_and_crop, to_image, to_tensor, unmap_pixels
from dvae.loss import dvae_loss, logit_laplace_nll
from dvae.metrics import code_usage
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stage_recipes import DVAERecipe
from training.stages.codebook import initialise_codebook
from training.stages.inputs import Inputs, first_readable
from training.stages.locks import alone_in
from training.stages.program import Program

CODEBOOK_IMAGES = 1024
"""Pictures from which the codebook of a warmed-up dVAE is made."""


Model = TypeVar("Model", bound=nn.Module)

SCALE_FIT_WEIGHT = 1e-4
"""Of the likelihood's scales in the warm-up: far below the squared error's own gradient."""


def autoencoder_loss(model: DVAE, images: Tensor, *, noise: float = 0.0, noise_seed: int = 0) -> tuple[Tensor, Tensors]:
    """Return the squared error of a dVAE without tokens, whose decoder reads the encoder's output, and its PSNR.

    The likelihood of the dVAE's loss weighs an edge that is still wrong less than a background that is nearly right,
    because it also fits a scale to every pixel; the squared error learns edges several times faster. The scales are
    fitted beside it, so lightly that they do not steer the rest, and are right when the likelihood takes over.

    Noise on the bottleneck stands for what the codebook will round: what matters little to the picture is then told by
    small differences, which rounding may lose, and what matters by large ones. Only training has it.

    Args:
        model: the dVAE.
        images: (B,3,H,W) float32 in [0, 1].
        noise: standard deviation of the Gaussian noise on the bottleneck, in units of the bottleneck's own RMS.
        noise_seed: of the noise.
    """
    pixels = map_pixels(images)
    rows_BCYX = model.decoder.rows(model.encoder(pixels))
    if model.training and noise:
        generator = torch.Generator(images.device).manual_seed(noise_seed)
        gaussian = torch.randn(rows_BCYX.shape, generator=generator, device=images.device)
        rows_BCYX = rows_BCYX + noise * rows_BCYX.detach().square().mean().sqrt() * gaussian
    mu, ln_b = model.decoder.from_rows(rows_BCYX).chunk(2, dim=1)
    error = (torch.sigmoid(mu) - pixels).square().mean()
    nll = logit_laplace_nll(pixels, torch.cat([mu.detach(), ln_b], dim=1)).mean()
    reconstructions = unmap_pixels(torch.sigmoid(mu.detach()))
    psnr = -10.0 * (reconstructions - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()
    return error + SCALE_FIT_WEIGHT * nll, {"psnr": psnr.mean(), "nll": nll.detach()}


def _pictures_of(batch: MicroBatch) -> Tensor:
    """Return a batch's pictures in the memory layout in which convolutions are fastest; layers keep it."""
    return batch.tensors["images"].contiguous(memory_format=torch.channels_last)


class DVAEStage:
    """A dVAE, as `fit` trains it.

    Args:
        recipe: the stage's recipe.
        model: a new dVAE, or a trained one.
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
        self.model, self._config, self._previews = model, model.config, previews

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture (Listing 1)."""
        image = open_image(sample.image_bytes, sample.source)
        return {"images": to_tensor(dvae_augmentation(image, self._config.image_size, rng, flip=self.recipe.flip))}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the picture, resized and centre-cropped."""
        image = open_image(sample.image_bytes, sample.source)
        return {"images": to_tensor(resize_and_crop(image, self._config.image_size))}

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss at the schedules' values of this step, and its parts.

        If the batch is measured, the metrics also have codes_used, perplexity and hard_psnr, the PSNR of decoding the
        argmax tokens.
        """
        images = _pictures_of(batch)
        generator = torch.Generator(images.device).manual_seed(batch.noise_seed)
        temperature, kl_weight = self.recipe.temperature.at(step), self.recipe.kl_weight.at(step)
        loss = dvae_loss(self.model, images, temperature=temperature, kl_weight=kl_weight, generator=generator)
        metrics = {"nll": loss.nll.detach(), "kl": loss.kl.detach()}
        if batch.measure:
            with torch.no_grad():
                tokens = loss.logits.argmax(dim=1)
                usage = code_usage(tokens, self.model.config.vocab_size)
                error = (self.model.decode(tokens) - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
                metrics["hard_psnr"] = (-10.0 * error.log10()).mean()
                metrics["codes_used"] = torch.tensor(float(usage.used))
                metrics["perplexity"] = torch.tensor(float(usage.perplexity))
        return loss.total, metrics

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return preview pictures above their reconstructions."""
        model = self._with(weights)
        images, labels = self.first_images(8, self._previews)
        if not labels:
            return None
        with torch.no_grad():
            reconstructions = model.decode(model.encode(images))
        return side_by_side(
            [to_image(image) for image in images], [to_image(image) for image in reconstructions], labels
        )

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Do nothing: the first rank draws alone."""

    def first_images(self, count: int, data: ShardData) -> tuple[Tensor, list[str]]:
        """Return the readable ones of the first `count` pictures of some data, (N,3,H,W) in [0, 1], and their keys."""

        def read(sample: Sample) -> Tensor:
            return self.transform_for_validation(sample, np.random.default_rng(0))["images"]

        found = first_readable(data, count, read)
        images = [image for _, image in found]
        return torch.stack(images) if images else torch.empty(0), [sample.key for sample, _ in found]

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the dVAE's directory."""
        self._with(weights).save(self.directory, metadata={**self.metadata, "step": step})

    def _with(self, weights: Mapping[str, Tensor]) -> DVAE:
        model = DVAE(self._config)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in weights.items()}, strict=True)
        return model.eval()


class WarmupStage(DVAEStage):
    """A dVAE's warm-up as an autoencoder, before it has a codebook.

    Deviation: the paper starts from random weights. A small dVAE does not get far from there in minutes: its untrained
    decoder ignores the tokens, and all but a handful of codes die. `initialise_codebook` turns the warmed-up
    autoencoder into a dVAE with all codes alive.
    """

    name = "dvae-warmup"

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the autoencoder's loss with the noise of this step, and its metrics."""
        noise = self.recipe.warmup_noise.at(step)
        return autoencoder_loss(self.model, _pictures_of(batch), noise=noise, noise_seed=batch.noise_seed)

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return None: there are no tokens to reconstruct from yet."""
        return None


@alone_in("dvae")
def train_dvae(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say, *, init: Path | None = None) -> Path:
    """Train a dVAE, from scratch or from the directory `init`; returns its directory.

    From scratch, it is warmed up first if the recipe says so.
    """
    stage_recipe = recipe.dvae
    program = Program.open(inputs, ranks, say, captions=False)
    needs_warmup = program.needs_warmup("dvae")
    torch.manual_seed(stage_recipe.train.seed)
    model = DVAE.load(init) if init is not None else DVAE(stage_recipe.model)
    previews, metadata = program.validation or program.data, {"recipe": recipe.name}
    description = {"recipe": recipe.name, "model": dataclasses.asdict(model.config)}
    model = channels_last(model.to(ranks.device))
    if init is None and stage_recipe.warmup is not None and needs_warmup:
        directory = inputs.run_directory("dvae-warmup") / "autoencoder"
        warmup = WarmupStage(stage_recipe, model, directory, previews, metadata)
        program = program.warm_up(warmup, stage_recipe.warmup, description, stage_recipe)
        model = DVAE.load(directory)
        images, _ = warmup.first_images(CODEBOOK_IMAGES, program.data)
        initialise_codebook(model, images, seed=stage_recipe.warmup.seed)
        model = channels_last(model.to(ranks.device))
    stage = DVAEStage(stage_recipe, model, inputs.out / "dvae", previews, metadata)
    spec = program.spec("dvae", {**description, "init": str(init) if init else None}, stage_recipe)
    program.fit(stage, stage_recipe.train, spec)
    return stage.directory


def channels_last(model: Model) -> Model:
    """Return a model whose weights have the memory layout in which convolutions are fastest; ZeRO 1 to 3 undo it."""
    placed: Model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return placed
