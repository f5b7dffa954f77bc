"""The first stage: training a dVAE on pictures alone (Ramesh et al. 2021, 2.1, A.2).

Small dVAEs are warmed up as autoencoders and get a codebook from that; the paper's start from random weights.

Shapes: B batch  C channels of the codebook  N positions  K codes  Y,X grid of tokens  H,W picture in pixels.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.output.sheets import side_by_side
from dvae import DVAE
from dvae.images import dvae_augmentation, map_pixels, open_image, resize_and_crop, to_image, to_tensor, unmap_pixels
from dvae.loss import dvae_loss, logit_laplace_nll
from dvae.metrics import code_usage
from training.data.reader import Sample, ShardData
from training.loop.fit import Tensors
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


SCALE_FIT_WEIGHT = 1e-4
"""Of the likelihood's scales in the warm-up: far below the squared error's own gradient."""


class AutoencoderObjective(nn.Module):
    """The squared error of a dVAE without tokens: the encoder's output goes to the decoder as it is.

    The likelihood of the dVAE's loss weighs an edge that is still wrong less than a background that is nearly right,
    because it also fits a scale to every pixel; the squared error learns edges several times faster. The scales are
    fitted beside it, so lightly that they do not steer the rest, and are right when the likelihood takes over.

    Noise on the bottleneck stands for what the codebook will round: what matters little to the picture is then told by
    small differences, which rounding may lose, and what matters by large ones. Only training has it.
    """

    def __init__(self, model: DVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, *, noise: float = 0.0, noise_seed: int = 0) -> tuple[Tensor, Tensors]:
        """Return the mean squared error of a batch, and its PSNR.

        Args:
            images: (B,3,H,W) float32 in [0, 1].
            noise: standard deviation of the Gaussian noise on the bottleneck, in units of the bottleneck's own RMS.
            noise_seed: of the noise.
        """
        pixels = map_pixels(images)
        rows_BCYX = self.model.decoder.rows(self.model.encoder(pixels))
        if self.model.training and noise:
            generator = torch.Generator(images.device).manual_seed(noise_seed)
            gaussian = torch.randn(rows_BCYX.shape, generator=generator, device=images.device)
            rows_BCYX = rows_BCYX + noise * rows_BCYX.detach().square().mean().sqrt() * gaussian
        mu, ln_b = self.model.decoder.from_rows(rows_BCYX).chunk(2, dim=1)
        error = (torch.sigmoid(mu) - pixels).square().mean()
        nll = logit_laplace_nll(pixels, torch.cat([mu.detach(), ln_b], dim=1)).mean()
        reconstructions = unmap_pixels(torch.sigmoid(mu.detach()))
        psnr = -10.0 * (reconstructions - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()
        return error + SCALE_FIT_WEIGHT * nll, {"psnr": psnr.mean(), "nll": nll.detach()}


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
        self.objective: DVAEObjective | AutoencoderObjective = DVAEObjective(model)
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
        images, labels = self.first_images(8, self._previews)
        if not labels:
            return None
        with torch.no_grad():
            reconstructions = model.decode(model.encode(images))
        return side_by_side(
            [to_image(image) for image in images], [to_image(image) for image in reconstructions], labels
        )

    def first_images(self, count: int, data: ShardData) -> tuple[Tensor, list[str]]:
        """Return the readable ones of the first `count` pictures of some data, (N,3,H,W) in [0, 1], and their keys."""
        images, keys = [], []
        for index in range(min(count, len(data))):
            try:
                sample = data.read(index)
                images.append(self.transform_for_validation(sample, np.random.default_rng(0))["images"])
            except (ValueError, OSError):
                continue
            keys.append(sample.key)
        return torch.stack(images) if images else torch.empty(0), keys

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the dVAE's directory."""
        self._with(weights).save(self.directory, metadata={**self.metadata, "step": step})

    def _with(self, weights: Mapping[str, Tensor]) -> DVAE:
        model = DVAE(self._config)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in weights.items()}, strict=True)
        return model.eval()


class WarmupStage(DVAEStage):
    """What `fit` needs to know to warm a dVAE up as an autoencoder, before it has a codebook.

    Deviation: the paper starts from random weights. A small dVAE does not get far from there in minutes: its untrained
    decoder ignores the tokens, and all but a handful of codes die. `initialise_codebook` turns the warmed-up
    autoencoder into a dVAE with all codes alive.
    """

    name = "dvae-warmup"

    def __init__(
        self, recipe: DVAERecipe, model: DVAE, directory: Path, previews: ShardData, metadata: Mapping[str, Any]
    ) -> None:
        super().__init__(recipe, model, directory, previews, metadata)
        self.objective = AutoencoderObjective(model)

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Add the noise of this step."""
        return {
            "images": tensors["images"].contiguous(memory_format=torch.channels_last),
            "noise": self.recipe.warmup_noise.at(step),
            "noise_seed": noise_seed,
        }

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return None: there are no tokens to reconstruct from yet."""
        return None


KMEANS_POSITIONS, KMEANS_ROUNDS = 60_000, 10
"""Positions from which the codebook is made, and Lloyd's rounds."""
RARITY_CELLS, RARITY_PASSES = 256, 2
"""Cells of the clusterings that tell how densely positions lie, and how many follow each other."""
ENTROPY_POSITIONS = 4_000
"""Positions on which the posterior's entropy is measured."""
POSTERIOR_ENTROPY = 0.05
"""Nats per position: how undecided the encoder is between neighbouring codes when it gets its codebook; so little that
the Gumbel noise seldom picks another code than the nearest."""


@torch.no_grad()
def initialise_codebook(model: DVAE, images: Tensor, *, seed: int) -> None:
    """Turn a warmed-up autoencoder into a dVAE that quantises its bottleneck, in place.

    The bottleneck is what the decoder's input convolution makes of the encoder's output: e = E(Wh + b) + c for the
    encoder's last features h. The codebook becomes the centres e_k of a k-means clustering of it, in which rare
    positions weigh as much as common ones: else most codes would be shades of backgrounds, between which tokens
    switch at random. The encoder's output convolution becomes logit k = s · (e · e_k − |e_k|² / 2), which is −s/2
    times the squared distance to a centre, up to a term that all logits share, and is again linear in h. So argmax
    picks the nearest centre; s makes the
    posterior's mean entropy POSTERIOR_ENTROPY. k-means initialisation of codebooks: Zeghidour et al. 2021
    (SoundStream), 3.

    Args:
        model: trained by `WarmupStage`.
        images: (N,3,H,W) float32 in [0, 1].
        seed: of the choice of positions and centres.
    """
    generator = torch.Generator().manual_seed(seed)
    read = cast(nn.Conv2d, model.decoder.blocks.get_submodule("input"))
    code = cast(nn.Conv2d, model.encoder.blocks.get_submodule("output.conv"))
    assert read.bias is not None
    assert code.bias is not None
    bottlenecks = [read(model.encoder(map_pixels(chunk))) for chunk in torch.split(images, 64)]
    e_NC = torch.cat([e_BCYX.permute(0, 2, 3, 1).flatten(0, 2) for e_BCYX in bottlenecks])
    e_NC = e_NC[torch.randperm(len(e_NC), generator=generator)[:KMEANS_POSITIONS]]
    centres_KC = _kmeans(e_NC, model.config.vocab_size, _rarity(e_NC, generator), generator)
    half_norms_K = centres_KC.square().sum(dim=1) / 2
    # with fewer distinct positions than codes, some centres coincide: only one of each can be told from the others
    used = torch.bincount((e_NC @ centres_KC.T - half_norms_K).argmax(dim=1), minlength=len(centres_KC)) > 0
    scores_NK = e_NC[:ENTROPY_POSITIONS] @ centres_KC[used].T - half_norms_K[used]
    scale = _scale_for_entropy(scores_NK, POSTERIOR_ENTROPY)
    E, W = read.weight[:, :, 0, 0], code.weight[:, :, 0, 0]
    bias_K = scale * (centres_KC @ (E @ code.bias + read.bias) - half_norms_K)
    code.weight.copy_((scale * centres_KC @ E @ W)[:, :, None, None])
    code.bias.copy_(bias_K)
    read.weight.copy_(centres_KC.T[:, :, None, None])
    read.bias.zero_()


def _rarity(points_NC: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight for each point, (N,): about the inverse of how densely the points lie there.

    It is one over the number of points in the same cell of a clustering; clustering again with these weights
    makes the cells more even.
    """
    weights_N = points_NC.new_ones(len(points_NC))
    for _ in range(RARITY_PASSES):
        nearest_N = _nearest(points_NC, _kmeans(points_NC, RARITY_CELLS, weights_N, generator))
        weights_N = 1 / torch.bincount(nearest_N, minlength=RARITY_CELLS)[nearest_N]
    return weights_N


def _kmeans(points_NC: Tensor, k: int, weights_N: Tensor, generator: torch.Generator) -> Tensor:
    """Return k centres, (K,C), of weighted points: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds.

    A centre that is nearest to no point stays where it is; with fewer distinct points than k, some coincide.
    """
    chosen = [0]
    distance_N = (points_NC - points_NC[0]).square().sum(dim=1)
    for _ in range(k - 1):
        chosen.append(int(torch.multinomial((weights_N * distance_N).clamp_min(1e-12), 1, generator=generator)))
        distance_N = torch.minimum(distance_N, (points_NC - points_NC[chosen[-1]]).square().sum(dim=1))
    centres_KC = points_NC[chosen].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest_N = _nearest(points_NC, centres_KC)
        weight_K1 = points_NC.new_zeros(k).index_add_(0, nearest_N, weights_N)[:, None]
        sums_KC = torch.zeros_like(centres_KC).index_add_(0, nearest_N, weights_N[:, None] * points_NC)
        centres_KC = torch.where(weight_K1 > 0, sums_KC / weight_K1, centres_KC)
    return centres_KC


def _nearest(points_NC: Tensor, centres_KC: Tensor) -> Tensor:
    """Return the number of the centre that each point is nearest to, (N,)."""
    return (points_NC @ centres_KC.T - centres_KC.square().sum(dim=1) / 2).argmax(dim=1)


def _scale_for_entropy(scores_NK: Tensor, entropy: float) -> float:
    """Return the factor at which the softmax of scores has this mean entropy, in nats; its logarithm is bisected."""
    low, high = 1e-6, 1e9
    for _ in range(60):
        scale = math.sqrt(low * high)
        log_p = (scale * scores_NK).log_softmax(dim=1)
        too_flat = -(log_p.exp() * log_p).sum(dim=1).mean().item() > entropy
        low, high = (scale, high) if too_flat else (low, scale)
    return scale
