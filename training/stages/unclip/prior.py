"""Training DALL·E 2's diffusion prior on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.2)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.output.text import Say
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.inputs import Inputs
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import ConditionedStage, FrozenCLIP, with_weights
from training.unclip_recipes import PriorRecipe
from unclip.decoding import loss_by_quarter
from unclip.embeddings import measured_errors, prior_loss
from unclip.prior import Prior, embedding_scale
from unclip.sampling import Noise

MEASURED = 256
"""Samples on which the errors are measured that set the variances in sampling."""


class PriorStage(ConditionedStage):
    """The prior, as `fit` trains it.

    Args:
        recipe: the stage's recipe.
        model: the prior.
        frozen: the CLIP.
        directory: where the prior is exported.
        previews: samples on which the exported prior's errors are measured.
        metadata: written beside the configuration.
    """

    name = "prior"

    def __init__(
        self,
        recipe: PriorRecipe,
        model: Prior,
        frozen: FrozenCLIP,
        directory: Path,
        previews: ShardData,
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__(model, frozen, directory, previews, metadata)
        self.recipe, self._config = recipe, model.config

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `prior_loss`, and metrics.

        These are the squared error of each quarter of the noise, the cosine of what is predicted with the picture's
        own embedding, and the fraction of captions cut.
        """
        tensors = batch.tensors
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        model = self.model
        assert isinstance(model, Prior)
        loss, parts = prior_loss(model, embeddings, text, batch.noise_seed, self.recipe.dropped)
        return loss, {
            "cosine": parts["cosine"].mean(),
            "mse_by_quarter": loss_by_quarter(parts["mse"], parts["t"]),
            "captions_cut": tensors["n_cut"].float().mean(),
        }

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the prior's directory, with the errors from which the variances in sampling are made."""
        prior = with_weights(lambda: Prior(self._config), weights)
        samples, captions = self.first_samples(MEASURED)
        if captions:
            device = next(self.model.parameters()).device
            embeddings, text = self._frozen.told(samples["seen"].to(device), samples["text"].to(device))
            noise = Noise.of(0, "errors", range(len(captions)))
            prior = prior.to(device)
            prior.errors.copy_(measured_errors(prior, embeddings, text, noise))
        prior.save(self.directory, {**self.metadata, "step": step, "errors_measured_on": len(captions)})


@alone_in("prior")
def train_prior(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train the prior on the bundle's CLIP; returns its directory.

    Raises:
        FileNotFoundError: the bundle has no CLIP.
        ValueError: the recipe has no prior; or as `fit`.
    """
    stage_recipe = recipe.prior
    if stage_recipe is None:
        raise ValueError(f"the recipe {recipe.name} has no prior: use one of DALL·E 2, such as unclip-cpu")
    frozen = FrozenCLIP(inputs.out / "clip")
    program = Program.open(inputs, ranks, say, captions=True)
    clip = frozen.clip.config
    config = dataclasses.replace(
        stage_recipe.model,
        embed_dim=clip.embed_dim,
        text_width=clip.text_width,
        text_len=clip.context_length,
        scale=embedding_scale(clip.embed_dim),
    )
    torch.manual_seed(stage_recipe.train.seed)
    model = Prior(config).to(ranks.device)
    model.activation_checkpointing = stage_recipe.train.activation_checkpointing
    metadata = {"recipe": recipe.name, "clip_hash": frozen.hash}
    previews = program.validation or program.data
    stage = PriorStage(stage_recipe, model, frozen, inputs.out / "prior", previews, metadata)
    description = {"recipe": recipe.name, "model": dataclasses.asdict(config), "clip_hash": frozen.hash}
    program.fit(stage, stage_recipe.train, program.spec("prior", description, stage_recipe))
    return stage.directory
