"""Training DALL·E 2's diffusion prior on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.2)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dalle.output.text import Say
from training.config import TrainConfig
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.inputs import Inputs
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import ConditionedStage, train_conditioned, with_weights
from training.unclip_recipes import PriorRecipe
from unclip.decoding import loss_by_quarter
from unclip.embeddings import measured_errors, prior_loss
from unclip.prior import Prior, PriorConfig
from unclip.sampling import Noise

MEASURED = 256
"""Samples on which the errors are measured that set the variances in sampling."""


class PriorStage(ConditionedStage[PriorRecipe, Prior]):
    """The prior, as `fit` trains it; the exported prior's errors are measured on the previews."""

    name = "prior"

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `prior_loss`, and metrics.

        These are the squared error of each quarter of the noise, the cosine of what is predicted with the picture's
        own embedding, and the fraction of captions cut.
        """
        tensors = batch.tensors
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        loss, parts = prior_loss(self.model, embeddings, text, batch.noise_seed, self.recipe.dropped)
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
    """Train the prior; returns its directory; raises as `train_conditioned`."""

    def made(config: PriorConfig, train: TrainConfig, program: Program) -> Prior:
        prior = Prior(config).to(ranks.device)
        prior.activation_checkpointing = train.activation_checkpointing
        return prior

    return train_conditioned(PriorStage, made, recipe, inputs, ranks, say)
