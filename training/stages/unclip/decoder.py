"""Training DALL·E 2's decoder on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.1)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle.output.sheets import side_by_side
from dalle.output.text import Say
from dvae.images import to_image
from training.config import TrainConfig
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.dvae import channels_last
from training.stages.inputs import Inputs
from training.stages.locks import alone_in
from training.stages.unclip.conditioned import PREVIEWS, ConditionedStage, train_conditioned, with_weights
from training.unclip_recipes import DecoderRecipe
from unclip.decoder import Decoder, DecoderConfig
from unclip.decoding import decode, decoder_loss, loss_by_quarter
from unclip.sampling import Noise


class DecoderStage(ConditionedStage[DecoderRecipe, Decoder]):
    """The decoder, as `fit` trains it; sheets show previews beside what is decoded of their embeddings and captions."""

    name = "decoder"

    @property
    def image_size(self) -> int:  # type: ignore[override]  # where others have none
        """Side in pixels of the pictures."""
        return int(self._config.image_size)

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `decoder_loss`, and metrics: its parts, those of each quarter of the noise, captions cut.

        The parts are the squared error, and the variational bound in bits per dimension if a variance is learned.
        """
        tensors = batch.tensors
        images = tensors["images"].contiguous(memory_format=torch.channels_last)
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        loss, parts = decoder_loss(
            self.model,
            images,
            embeddings,
            text,
            batch.noise_seed,
            no_image=self.recipe.no_image,
            no_text=self.recipe.no_text,
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
        decoder = with_weights(lambda: Decoder(self._config), weights).to(next(self.model.parameters()).device)
        device = decoder.null_image.device
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
        with_weights(lambda: Decoder(self._config), weights).save(self.directory, {**self.metadata, "step": step})


@alone_in("decoder")
def train_decoder(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train the decoder; returns its directory; raises as `train_conditioned`."""

    def made(config: DecoderConfig, train: TrainConfig) -> Decoder:
        decoder = channels_last(Decoder(config).to(ranks.device))
        decoder.unet.activation_checkpointing = train.activation_checkpointing
        return decoder

    return train_conditioned(DecoderStage, made, recipe, inputs, ranks, say)
