"""The second stage: training the transformer on captions and image tokens (Ramesh et al. 2021, 2.2, B).

The image tokens are encoded in every step, of pictures augmented anew, or were encoded once by `encode.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dalle.candidates import check_top_k
from dalle.loss import training_loss
from dalle.model import DALLE
from dalle.output.sheets import contact_sheet
from dalle.sampling import candidate_seed, sample
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from dvae.images import open_image, resize_and_crop, to_image, to_tensor, transformer_augmentation
from training.data.reader import Sample
from training.loop.fit import Tensors
from training.recipes import TransformerRecipe


class TransformerObjective(nn.Module):
    """The stream's loss as a module, so that the engine sees one forward pass."""

    def __init__(self, model: DALLE) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, image_tokens: Tensor, n_cut: Tensor) -> tuple[Tensor, Tensors]:
        """Return the weighted loss of a batch, and metrics.

        The metrics are the text and image losses in nats per token, the image loss of each row of the grid,
        (Y,), and the fraction of captions cut.

        Args:
            text: (B,T) int64 text ids.
            image_tokens: (B,I) int64.
            n_cut: (B,) int64, 1 where the caption was longer than the text part of the stream.
        """
        loss = training_loss(self.model, text, image_tokens)
        return loss.total, {
            "text_loss": loss.text.detach(),
            "image_loss": loss.image.detach(),
            "image_loss_by_row": loss.image_by_row,
            "captions_cut": n_cut.float().mean(),
        }


def _one_view(tokens_VYX: NDArray[np.integer[Any]], view: int) -> Tensors:
    """Return the (I,) int64 image tokens of one view of a picture."""
    return {"image_tokens": torch.from_numpy(tokens_VYX[view].astype(np.int64).flatten())}


class TransformerStage:
    """What `fit` needs to know to train the transformer.

    Args:
        recipe: the stage's recipe.
        model: the transformer.
        tokenizer: of the captions.
        dvae: frozen; encodes pictures, after augmentation, without Gumbel noise, and decodes the sample sheets. With
            data that was encoded before, no step touches it, and it stays on its device until there is a sheet.
        directory: where the transformer is exported.
        captions: that the sample sheets illustrate.
        metadata: written beside the configuration.

    Raises:
        ValueError: a probability of the recipe is none, or its top_k is above the image vocabulary.
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
        check_top_k(recipe.sampling.top_k, model.config.image_vocab)
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.objective = TransformerObjective(model)
        self.units_per_sample = model.config.text_len + model.config.grid**2
        self._config, self._tokenizer, self._captions = model.config, tokenizer, list(captions)
        self._dvae = dvae.eval().requires_grad_(False)

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture (Listing 2) and the ids of one caption, or by chance of the empty one.

        In the first steps it may be one of the first captions only: see `TransformerRecipe.first_captions`.
        The ids are those of BPE dropout. In place of the picture, a sample that was encoded has the tokens of one of
        its random crops.
        """
        if sample.image_tokens is None:
            picture = open_image(sample.image_bytes, sample.source)
            image = {"images": to_tensor(transformer_augmentation(picture, self._dvae.config.image_size, rng))}
        else:
            image = _one_view(sample.image_tokens, int(rng.integers(1, len(sample.image_tokens))))
        captions, train = sample.captions, self.recipe.train
        if self.recipe.first_captions and sample.position < self.recipe.first_share * train.steps * train.global_batch:
            captions = captions[: self.recipe.first_captions]
        caption = captions[rng.integers(len(captions))]
        is_null = rng.random() < self.recipe.null_caption_probability
        text, n_cut = self._tokenizer.text(
            ["" if is_null else caption], self._config.text_len, dropout=self.recipe.bpe_dropout, rngs=[rng]
        )
        return {**image, "text": text[0], "n_cut": torch.tensor(n_cut)}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the centre crop, or its tokens, and the first caption, without dropout."""
        if sample.image_tokens is None:
            picture = open_image(sample.image_bytes, sample.source)
            image = {"images": to_tensor(resize_and_crop(picture, self._dvae.config.image_size))}
        else:
            image = _one_view(sample.image_tokens, 0)
        text, n_cut = self._tokenizer.text([sample.captions[0]], self._config.text_len)
        return {**image, "text": text[0], "n_cut": torch.tensor(n_cut)}

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Encode the pictures, unless they are encoded."""
        if "image_tokens" in tensors:
            return dict(tensors)
        images = tensors["images"].contiguous(memory_format=torch.channels_last)
        image_tokens = self._dvae_on(images.device).encode(images).flatten(1)
        return {"text": tensors["text"], "image_tokens": image_tokens, "n_cut": tensors["n_cut"]}

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return a sheet of one sample for each of the captions, sampled as the recipe says."""
        if not self._captions:
            return None
        model = self._with(weights)
        text, _ = self._tokenizer.text(self._captions, self._config.text_len)
        seeds = [candidate_seed(0, caption, 0) for caption in self._captions]
        device = next(self.objective.parameters()).device
        sampling = self.recipe.sampling
        tokens = sample(
            model.to(device),
            text.to(device),
            seeds=seeds,
            n=1,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            guidance=sampling.guidance,
        ).tokens[:, 0]
        images = self._dvae_on(device).decode(tokens.view(-1, self._config.grid, self._config.grid))
        return contact_sheet([("", [to_image(image) for image in images], self._captions)])

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the transformer's directory."""
        self._with(weights).save(self.directory, metadata={**self.metadata, "step": step})

    def _dvae_on(self, device: torch.device) -> DVAE:
        if next(self._dvae.parameters()).device != device:
            self._dvae = self._dvae.to(device)
        return self._dvae

    def _with(self, weights: Mapping[str, Tensor]) -> DALLE:
        with torch.device("meta"):
            model = DALLE(self._config)
        model.load_state_dict(
            {name: weight.detach().cpu() for name, weight in weights.items()}, strict=True, assign=True
        )
        return model.eval()
