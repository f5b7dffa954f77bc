"""Training DALL·E 2's decoder on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.1)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.output.sheets import side_by_side
from dalle.output.text import Say
from dvae.images import to_image
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.dvae import channels_last
from training.stages.inputs import Inputs
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import ConditionedStage, FrozenCLIP, with_weights
from training.unclip_recipes import DecoderRecipe
from unclip.decoder import Decoder, DecoderConfig
from unclip.decoding import decode, decoder_loss, loss_by_quarter
from unclip.prior import embedding_scale
from unclip.sampling import Noise

PREVIEWS = 8
"""Pictures on a sample sheet."""


class DecoderStage(ConditionedStage):
    """The decoder, as `fit` trains it.

    Args:
        recipe: the stage's recipe.
        model: the decoder.
        frozen: the CLIP.
        directory: where the decoder is exported.
        previews: samples whose pictures the sheets show beside what is decoded from their embeddings and captions.
        metadata: written beside the configuration.
    """

    name = "decoder"

    def __init__(
        self,
        recipe: DecoderRecipe,
        model: Decoder,
        frozen: FrozenCLIP,
        directory: Path,
        previews: ShardData,
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__(model, frozen, directory, previews, metadata)
        self.recipe, self._config = recipe, model.config
        self.image_size = model.config.image_size

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `decoder_loss`, and metrics: its parts, those of each quarter of the noise, captions cut.

        The parts are the squared error, and the variational bound in bits per dimension if a variance is learned.
        """
        tensors = batch.tensors
        images = tensors["images"].contiguous(memory_format=torch.channels_last)
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        model = self.model
        assert isinstance(model, Decoder)
        loss, parts = decoder_loss(
            model,
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
    """Train the decoder on the bundle's CLIP; returns its directory.

    Raises:
        FileNotFoundError: the bundle has no CLIP.
        ValueError: the recipe has no decoder; or as `fit`.
    """
    stage_recipe = recipe.decoder
    if stage_recipe is None:
        raise ValueError(f"the recipe {recipe.name} has no decoder: use one of DALL·E 2, such as unclip-cpu")
    frozen = FrozenCLIP(inputs.out / "clip")
    program = Program.open(inputs, ranks, say, captions=True)
    config = fitted(stage_recipe.model, frozen)
    torch.manual_seed(stage_recipe.train.seed)
    model = channels_last(Decoder(config).to(ranks.device))
    model.unet.activation_checkpointing = stage_recipe.train.activation_checkpointing
    metadata = {"recipe": recipe.name, "clip_hash": frozen.hash}
    previews = program.validation or program.data
    stage = DecoderStage(stage_recipe, model, frozen, inputs.out / "decoder", previews, metadata)
    description = {"recipe": recipe.name, "model": dataclasses.asdict(config), "clip_hash": frozen.hash}
    program.fit(stage, stage_recipe.train, program.spec("decoder", description, stage_recipe))
    return stage.directory


def fitted(config: DecoderConfig, frozen: FrozenCLIP) -> DecoderConfig:
    """Return a decoder's sizes for a CLIP."""
    clip = frozen.clip.config
    return dataclasses.replace(
        config,
        embed_dim=clip.embed_dim,
        text_width=clip.text_width,
        text_len=clip.context_length,
        scale=embedding_scale(clip.embed_dim),
    )
