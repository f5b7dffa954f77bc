"""Training DALL·E 2's decoder on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.1).

A decoder that draws codes is trained on those of the bundle's dVAE, which stays as it is too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample
from dalle.output.sheets import side_by_side
from dalle.output.text import Say
from dvae.codec import load_codec
from dvae.images import open_image, resize_and_crop, to_image, to_tensor
from storage.models.directory import directory_hash
from training.config import TrainConfig
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.dvae import channels_last
from training.stages.inputs import Inputs, first_readable
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import PREVIEWS, ConditionedStage, train_conditioned, with_weights
from training.unclip_recipes import DecoderRecipe
from unclip.decoder import Decoder, DecoderConfig
from unclip.decoding import decode, decoder_loss, loss_by_quarter
from unclip.sampling import Noise

PICTURES_FOR_CODES, AT_ONCE = 512, 16
"""Pictures of the training data from which it is told how often each code is met, and those encoded together."""


class DecoderStage(ConditionedStage[DecoderRecipe, Decoder]):
    """The decoder, as `fit` trains it; sheets show previews beside what is decoded of their embeddings and captions."""

    name = "decoder"

    @property
    def image_size(self) -> int:  # type: ignore[override]  # where others have none
        """Side in pixels of the pictures."""
        return int(self._config.picture_size)

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `decoder_loss`, and metrics: its parts, those of each quarter of the noise, captions cut.

        The parts are the squared error, and the variational bound in bits per dimension if a variance is learned.
        """
        tensors = batch.tensors
        images = tensors["images"]
        if not self._config.codes:
            images = images.contiguous(memory_format=torch.channels_last)
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        loss, parts = decoder_loss(
            self.model,
            images,
            embeddings,
            text,
            batch.noise_seed,
            no_image=self.recipe.no_image,
            no_text=self.recipe.no_text,
            nothing_known=self.recipe.nothing_known,
            noise_shift=self.recipe.noise_shift,
        )
        metrics = {name: value.mean() for name, value in parts.items() if name != "t"}
        metrics["mse_by_quarter"] = loss_by_quarter(parts["mse"], parts["t"])
        metrics["captions_cut"] = tensors["n_cut"].float().mean()
        return loss, metrics

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return preview pictures beside what is decoded from their embeddings and captions."""
        samples, captions = self.first_samples(PREVIEWS)
        if not captions:
            return None
        device = self.model.null_image.device
        decoder = self._with(weights).to(device)
        embeddings, text = self._frozen.told(samples["seen"].to(device), samples["text"].to(device))
        drawn = decode(
            decoder,
            embeddings,
            text,
            Noise.of(0, "sample sheet", range(len(captions))),
            steps=self.recipe.sample_steps,
            guidance=self.recipe.guidance,
        )
        originals = [to_image(image) for image in samples["images"]]
        return side_by_side(originals, [to_image(image) for image in drawn], captions, title="original | decoded")

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the decoder's directory."""
        self._with(weights).save(self.directory, {**self.metadata, "step": step})

    def _with(self, weights: Mapping[str, Tensor]) -> Decoder:
        """Return a decoder with averaged weights, on the CPU, which draws what the model draws."""
        decoder = with_weights(lambda: Decoder(self._config), weights)
        if self._config.codes:
            decoder.vectors.copy_(self.model.vectors)
            decoder.use_codec(self.model.codec)
        return decoder


@alone_in("decoder")
def train_decoder(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train the decoder; returns its directory.

    Raises:
        FileNotFoundError: the bundle has no dVAE, and the decoder draws codes.
        ValueError: none of the first pictures can be read; or as `train_conditioned`.
    """

    def made(config: DecoderConfig, train: TrainConfig, program: Program) -> Decoder:
        decoder = _of_codes(config, inputs.out / "dvae", program) if config.codes else Decoder(config)
        decoder = channels_last(decoder.to(ranks.device))
        decoder.unet.activation_checkpointing = train.activation_checkpointing
        return decoder

    return train_conditioned(DecoderStage, made, recipe, inputs, ranks, say)


def _of_codes(config: DecoderConfig, directory: Path, program: Program) -> Decoder:
    """Return a new decoder that draws the codes of a dVAE, whose sizes replace those of the configuration."""
    codec = load_codec(directory, program.ranks.device).requires_grad_(False)
    side, channels = codec.config.image_size, codec.codebook.shape[1]
    decoder = Decoder(
        dataclasses.replace(
            config,
            codes=codec.config.vocab_size,
            code_side=codec.config.downsampling,
            image_size=codec.config.grid,
            in_channels=2 * channels + 1 if config.inpaints else channels,
            out_channels=channels,
        )
    )

    def seen(sample: Sample) -> Tensor:
        return to_tensor(resize_and_crop(open_image(sample.image_bytes, sample.source), side))

    images = [image for _, image in first_readable(program.data, PICTURES_FOR_CODES, seen)]
    if not images:
        raise ValueError(f"none of the first {PICTURES_FOR_CODES} pictures of --data can be read")
    tokens = [
        codec.encode(torch.stack(images[first : first + AT_ONCE]).to(program.ranks.device))
        for first in range(0, len(images), AT_ONCE)
    ]
    decoder.vectors.copy_(whitened_codebook(codec.codebook, torch.cat(tokens)))
    decoder.use_codec(codec)
    decoder.metadata = {"dvae_hash": directory_hash(directory)}
    return decoder


def whitened_codebook(codebook: Tensor, tokens: Tensor) -> Tensor:
    """Return a codebook's vectors, shifted, turned and scaled to deviation 1 in each coordinate: float32 (V, C).

    A token counts by the square root of how often it is met, and once more: frequent ones, of the background, do not
    decide alone, nor do the vectors of those that are never met become large.

    Args:
        codebook: (V, C).
        tokens: int64 of any shape, of pictures like those that will be drawn.
    """
    vectors = codebook.detach().double()
    counts = torch.bincount(tokens.flatten().to(vectors.device), minlength=len(vectors))
    weights = (counts + 1).double().sqrt()
    weights = (weights / weights.sum())[:, None]
    vectors = vectors - (weights * vectors).sum(dim=0)
    variances, axes = torch.linalg.eigh((vectors * weights).T @ vectors)
    # the sign of an axis is any: that of its largest coordinate is made positive
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0)[None]).sign()
    whitened: Tensor = vectors @ axes / variances.clamp(min=variances[-1] * 1e-6).sqrt()
    return whitened.float()
