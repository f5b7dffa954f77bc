"""Training DALL·E 2's prior, of either kind, on captioned pictures, with a frozen CLIP (Ramesh et al. 2022, 2.2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.output.text import Say
from storage.models.directory import WEIGHTS_FILE, directory_kind
from training.config import TrainConfig
from training.engine.objective import MicroBatch, Tensors
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.inputs import Inputs, first_readable
from training.stages.locks import alone_in
from training.stages.program import Program
from training.stages.unclip.conditioned import ConditionedStage, stacked, train_conditioned, with_weights
from training.unclip_recipes import PriorRecipe
from unclip.autoregressive.buckets import Buckets
from unclip.autoregressive.prior import AutoregressiveConfig, AutoregressivePrior, autoregressive_loss
from unclip.decoding import loss_by_quarter
from unclip.embeddings import AnyPrior, measured_errors, prior_loss
from unclip.prior import Prior
from unclip.sampling import Noise

MEASURED = 256
"""Samples on which the errors are measured that set the variances in sampling."""
SAMPLES_FOR_BUCKETS, AT_ONCE = 4096, 64
"""Samples of the training data from which an autoregressive prior's components and buckets are made, and those that are
read together."""


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


class AutoregressiveStage(ConditionedStage[PriorRecipe, AutoregressivePrior]):
    """The autoregressive prior, as `fit` trains it; its buckets are made of the first samples of the data."""

    name = "prior"
    _buckets: Buckets
    """As they were measured: the model's own may be rounded to the run's precision."""

    @classmethod
    def config_of(cls, recipe: PriorRecipe) -> AutoregressiveConfig:
        """Return the configuration."""
        return recipe.autoregressive

    def prepare(self, data: ShardData) -> None:
        """Measure the buckets.

        Raises:
            ValueError: fewer samples can be read than the prior has dimensions.
        """
        device, found = self.model.mean.device, []
        for start in range(0, SAMPLES_FOR_BUCKETS, AT_ONCE):
            some = first_readable(data, AT_ONCE, self._centre, start=start)
            if some:
                samples = stacked([tensors for _, tensors in some])
                embeddings, text = self._frozen.told(samples["seen"].to(device), samples["text"].to(device))
                found.append(torch.stack([embeddings, text.features]))
        embeddings, features = torch.cat(found, dim=1) if found else torch.zeros(2, 0, 0)
        if len(embeddings) <= self._config.dimensions:
            raise ValueError(
                f"of the first {SAMPLES_FOR_BUCKETS:,} samples of --data {len(embeddings)} can be read; a prior of "
                f"{self._config.dimensions} dimensions needs more"
            )
        self._buckets = Buckets.of(embeddings, features, self._config.dimensions, self._config.buckets)
        self.model.set_buckets(self._buckets)

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss of `autoregressive_loss`, and metrics.

        These are the cross entropy of the first component, and the fraction of captions cut.
        """
        tensors = batch.tensors
        embeddings, text = self._frozen.told(tensors["seen"], tensors["text"])
        tokens = self._buckets.tokens(embeddings, text.features)
        loss, nats = autoregressive_loss(self.model, tokens, text, batch.noise_seed, self.recipe.dropped)
        return loss, {"first_component": nats[0], "captions_cut": tensors["n_cut"].float().mean()}

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the prior's directory."""
        prior = with_weights(lambda: AutoregressivePrior(self._config), weights)
        prior.set_buckets(self._buckets)
        prior.save(self.directory, {**self.metadata, "step": step})


@alone_in("prior")
def train_prior(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train the prior of the kind that the recipe says; returns its directory.

    Raises:
        ValueError: the bundle has a prior of the other kind; or as `train_conditioned`.
    """
    model: type[AnyPrior] = Prior
    stage: type[ConditionedStage[Any, Any]] = PriorStage
    if recipe.prior is not None and recipe.prior.prior_kind == "autoregressive":
        model, stage = AutoregressivePrior, AutoregressiveStage
    directory = inputs.out / "prior"
    found = directory_kind(directory, expected=model.kind) if (directory / WEIGHTS_FILE).exists() else model.kind
    if found != model.kind:
        raise ValueError(
            f"{directory} holds a {found}, and a {model.kind} is asked for: move it away, or give another --out"
        )

    def made(config: Any, train: TrainConfig, program: Program) -> AnyPrior:
        prior = model(config).to(ranks.device)
        prior.activation_checkpointing = train.activation_checkpointing
        return prior

    return train_conditioned(stage, made, recipe, inputs, ranks, say)
