"""What decoder and prior share: a frozen CLIP that tells of pictures and captions, and samples read for both.

Letters: B batch  E embedding  L text positions  D text width
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from dalle.output.text import Say
from dvae.images import open_image, resize_and_crop, to_tensor, transformer_augmentation
from rerank import CLIP
from storage.models.directory import as_written_before, directory_hash
from storage.models.stored import StoredModel
from training.config import TrainConfig
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts
from training.ranks.ranks import Ranks
from training.recipes import Recipe, stage_of
from training.stages.inputs import Inputs, first_readable
from training.stages.program import Program
from unclip.conditions import Text
from unclip.degradation import shrunk
from unclip.prior import embedding_scale

Model = TypeVar("Model", bound=StoredModel[Any])
RecipeOf = TypeVar("RecipeOf")
PREVIEWS = 8
"""Pictures on a sample sheet."""


class FrozenCLIP:
    """A CLIP that is not trained.

    Args:
        directory: of the CLIP.

    Raises:
        FileNotFoundError, ValueError: as `CLIP.load`.
    """

    def __init__(self, directory: Path) -> None:
        self.clip = CLIP.load(directory).requires_grad_(False)
        self.hash = directory_hash(directory)

    def ids(self, caption: str) -> Tensors:
        """Return a caption's ids, (L,), and 1 if it was too long."""
        assert self.clip.tokenizer is not None
        text, n_cut = self.clip.tokenizer.tokenize_counting([caption], self.clip.config.context_length)
        return {"text": text[0], "n_cut": torch.tensor(n_cut)}

    @torch.no_grad()
    def told(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Text]:
        """Return the embeddings of pictures (B, E), and what the text tower makes of captions, all in float32.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            ids: int64 (B, L).
        """
        if self.clip.device != images.device:
            self.clip = self.clip.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            # padding behind the longest caption of the batch is seen by nobody
            longest = int(ids.argmax(dim=1).max()) + 1
            return self.clip.encode_image(images), Text(*self.clip.text_states(ids[:, :longest]))


class ConditionedStage(ABC, Generic[RecipeOf, Model]):
    """A stage that reads captioned pictures and a frozen CLIP.

    Args:
        recipe: the stage's recipe.
        model: that is trained.
        frozen: the CLIP.
        directory: where the model is exported.
        previews: samples that are shown, and on which what is exported is measured.
        metadata: written beside the configuration.
    """

    name: ClassVar[str]
    unit = "images"
    units_per_sample = 1
    image_size = 0
    """Side in pixels of the pictures that are trained on; 0 for none."""

    def __init__(
        self,
        recipe: RecipeOf,
        model: Model,
        frozen: FrozenCLIP,
        directory: Path,
        previews: ShardData,
        metadata: Mapping[str, Any],
    ) -> None:
        self.recipe, self.model, self.directory, self.metadata = recipe, model, directory, metadata
        self._config, self._frozen, self._previews = model.config, frozen, previews

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture, as CLIP and the model see it, and one of its captions; nothing is mirrored."""
        image = transformer_augmentation(open_image(sample.image_bytes, sample.source), self._side, rng)
        return self._tensors(image, sample.captions[int(rng.integers(len(sample.captions)))])

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the centre of the picture and its first caption."""
        image = resize_and_crop(open_image(sample.image_bytes, sample.source), self._side)
        return self._tensors(image, sample.captions[0])

    @property
    def _side(self) -> int:
        """Of the view that CLIP sees, whole, and that the model sees in small."""
        return max(self.image_size, self._frozen.clip.config.image_size)

    def _tensors(self, image: Image.Image, caption: str) -> Tensors:
        tensors = {"seen": to_tensor(image), **self._frozen.ids(caption)}
        if self.image_size:
            tensors["images"] = to_tensor(shrunk(image, self.image_size))
        return tensors

    def first_samples(self, count: int) -> tuple[Tensors, list[str]]:
        """Return the readable ones of the first `count` previews, stacked, and their captions."""
        found = first_readable(self._previews, count, self._centre)
        return stacked([tensors for _, tensors in found]), [sample.captions[0] for sample, _ in found]

    def _centre(self, sample: Sample) -> Tensors:
        return self.transform_for_validation(sample, np.random.default_rng(0))

    @classmethod
    def config_of(cls, recipe: RecipeOf) -> Any:
        """Return the configuration of the recipe's model."""
        return recipe.model  # type: ignore[attr-defined]

    def prepare(self, data: ShardData) -> None:
        """Set what the model holds beside its weights, before a run begins or goes on: nothing here.

        Args:
            data: that it is trained on.
        """

    @abstractmethod
    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss and the metrics."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the model's directory."""

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return None: there is nothing to show."""
        return None

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Do nothing: the first rank draws alone."""


def train_conditioned(
    kind: type[ConditionedStage[Any, Model]],
    make: Callable[[Any, TrainConfig, Program], Model],
    recipe: Recipe,
    inputs: Inputs,
    ranks: Ranks,
    say: Say,
) -> Path:
    """Train a stage on the bundle's CLIP; returns the directory of its model.

    Args:
        kind: the stage.
        make: returns a new model of a configuration, on the rank's device, for a run; what it knows beside its
            configuration is in its metadata.
        recipe: that has the stage.
        inputs: data and bundle.
        ranks: of the run.
        say: told how far the run is.

    Raises:
        FileNotFoundError: the bundle has no CLIP.
        ValueError: the recipe does not have the stage; or as `fit`.
    """
    of = stage_of(recipe, kind.name)
    frozen = FrozenCLIP(inputs.out / "clip")
    program = Program.open(inputs, ranks, say, captions=True)
    clip, config = frozen.clip.config, kind.config_of(of)
    sizes: dict[str, float] = {
        "embed_dim": clip.embed_dim,
        "text_width": clip.text_width,
        "text_len": clip.context_length,
    }
    if hasattr(config, "scale"):
        sizes["scale"] = embedding_scale(clip.embed_dim)
    config = dataclasses.replace(config, **sizes)
    torch.manual_seed(of.train.seed)
    model = make(config, of.train, program)
    metadata = {"recipe": recipe.name, "clip_hash": frozen.hash, **model.metadata}
    stage = kind(of, model, frozen, inputs.out / kind.name, program.validation or program.data, metadata)
    stage.prepare(program.data)
    program.fit(stage, of.train, program.spec(kind.name, {**metadata, "model": as_written_before(model.config)}, of))
    return stage.directory


def stacked(samples: Sequence[Tensors]) -> Tensors:
    """Return the tensors of samples as those of a batch; none of no samples."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in (samples[0] if samples else {})}


def with_weights(make: Callable[[], Model], weights: Mapping[str, Tensor]) -> Model:
    """Return a new model with averaged weights, on the CPU, for use; what it holds beside weights stays as it is made.

    The first weights, which are replaced, are drawn without moving the generator, from which dropout draws.
    """
    with torch.random.fork_rng(devices=[]):
        model = make()
    state = {**model.state_dict(), **{name: weight.detach().cpu() for name, weight in weights.items()}}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
