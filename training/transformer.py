"""The second stage: training the transformer on captions and image tokens (Ramesh et al. 2021, 2.2, B)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.gallery import contact_sheet
from dalle.loss import stream_loss
from dalle.model import DALLE
from dalle.sampling import candidate_seed, sample
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from dvae.images import open_image, resize_and_crop, to_image, to_tensor, transformer_augmentation
from training.data import Sample
from training.fit import Tensors
from training.recipes import TransformerRecipe


class TransformerObjective(nn.Module):
    """The stream's loss as a module, so that the engine sees one forward pass."""

    def __init__(self, model: DALLE) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, image_tokens: Tensor, n_cut: Tensor) -> tuple[Tensor, Tensors]:
        """Return the weighted loss of a batch, and metrics.

        The metrics are the text and image losses in nats per token, and the fraction of captions cut.

        Args:
            text: (B,T) int64 text ids.
            image_tokens: (B,I) int64.
            n_cut: (B,) int64, 1 where the caption was longer than the text part of the stream.
        """
        text_logits, image_logits = self.model(text, image_tokens)
        loss = stream_loss(text_logits, image_logits, text, image_tokens, self.model.config)
        return loss.total, {
            "text_loss": loss.text.detach(),
            "image_loss": loss.image.detach(),
            "captions_cut": n_cut.float().mean(),
        }


class TransformerStage:
    """What `fit` needs to know to train the transformer.

    Args:
        recipe: the stage's recipe.
        model: the transformer.
        tokenizer: of the captions.
        dvae: frozen; encodes the pictures on the fly, after augmentation, without Gumbel noise.
        directory: where the transformer is exported.
        captions: that the sample sheets illustrate.
        metadata: written beside the configuration.

    Raises:
        ValueError: a probability of the recipe is none.
    """

    name = "transformer"
    unit = "tokens"

    def __init__(
        self,
        recipe: TransformerRecipe,
        model: DALLE,
        tokenizer: Tokenizer,
        dvae: DVAE,
        directory: Path,
        captions: Sequence[str],
        metadata: Mapping[str, Any],
    ) -> None:
        for option in ("bpe_dropout", "null_caption_probability"):
            if not 0 <= getattr(recipe, option) <= 1:
                raise ValueError(f"{option} is a probability, in [0, 1], got {getattr(recipe, option)}")
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.objective = TransformerObjective(model)
        self.units_per_sample = model.config.text_len + model.config.grid**2
        self._config, self._tokenizer, self._captions = model.config, tokenizer, list(captions)
        self._dvae = dvae.eval().requires_grad_(False)

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture (Listing 2) and the ids of one caption, or by chance of the empty one.

        The ids are those of BPE dropout.
        """
        picture = open_image(sample.image_bytes, sample.source)
        image = transformer_augmentation(picture, self._dvae.config.image_size, rng)
        caption = sample.captions[rng.integers(len(sample.captions))]
        is_null = rng.random() < self.recipe.null_caption_probability
        text, n_cut = self._tokenizer.text(
            ["" if is_null else caption], self._config.text_len, dropout=self.recipe.bpe_dropout, rngs=[rng]
        )
        return {"images": to_tensor(image), "text": text[0], "n_cut": torch.tensor(n_cut)}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the centre crop and the first caption, without dropout."""
        image = resize_and_crop(open_image(sample.image_bytes, sample.source), self._dvae.config.image_size)
        text, n_cut = self._tokenizer.text([sample.captions[0]], self._config.text_len)
        return {"images": to_tensor(image), "text": text[0], "n_cut": torch.tensor(n_cut)}

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Encode the pictures."""
        images = tensors["images"].contiguous(memory_format=torch.channels_last)
        image_tokens = self._dvae.encode(images).flatten(1)
        return {"text": tensors["text"], "image_tokens": image_tokens, "n_cut": tensors["n_cut"]}

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return a sheet of one sample for each of the captions."""
        if not self._captions:
            return None
        model = self._with(weights)
        text, _ = self._tokenizer.text(self._captions, self._config.text_len)
        seeds = [candidate_seed(0, caption, 0) for caption in self._captions]
        device = next(self._dvae.parameters()).device
        tokens = sample(model.to(device), text.to(device), seeds=seeds, n=1)[:, 0]
        images = self._dvae.decode(tokens.view(-1, self._config.grid, self._config.grid))
        return contact_sheet([("", [to_image(image) for image in images], self._captions)])

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the transformer's directory."""
        self._with(weights).save(self.directory, metadata={**self.metadata, "step": step})

    def _with(self, weights: Mapping[str, Tensor]) -> DALLE:
        with torch.device("meta"):
            model = DALLE(self._config)
        model.load_state_dict(
            {name: weight.detach().cpu() for name, weight in weights.items()}, strict=True, assign=True
        )
        return model.eval()
