"""Training the reranker: CLIP on pictures and captions (Radford et al. 2021, 2.3).

The negatives of a pair are all others of the global batch, across ranks, and by choice wrong captions made of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from dvae.images import open_image, square_crop, to_tensor
from rerank.model import CLIP, contrastive_loss
from rerank.score import clip_view
from rerank.tokenizer import CLIPTokenizer
from training.data import Sample
from training.fit import Tensors
from training.recipes import CLIPRecipe
from training.wrong_captions import SOURCES


class CLIPObjective(nn.Module):
    """The contrastive loss as a module, so that the engine sees one forward pass.

    Deviation: by choice, each picture has wrong captions as further negatives (Yuksekgonul et al. 2023, arXiv
    2210.01936), here of this picture alone.
    """

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        n_cut: Tensor,
        wrong_text: Tensor | None = None,
        is_wrong: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Return the symmetric loss over the batches of all ranks, and metrics.

        The metrics are how often the right caption is the nearest of the batch's, the logit scale, the fraction of
        captions cut, and with hard negatives how many of them are farther from their picture than the right caption.

        Args:
            images: (B,3,H,W) float32 in [0, 1].
            text: (B,L) int64 ids.
            n_cut: (B,) int64, 1 where the caption was longer than the text tower's context.
            wrong_text: (B,M,L) int64 ids of captions that are wrong for the picture; None for none.
            is_wrong: (B,M) bool, False where there is no such caption.
        """
        wrong: tuple[Tensor, Tensor] | None = None
        if wrong_text is None or is_wrong is None:
            image_features, text_features, logit_scale = self.model(images, text)
        else:
            # one pass for all texts, because ZeRO 3 wants one pass through the model
            n_images, n_wrong = is_wrong.shape
            texts = self._without_common_pads(torch.cat([text, wrong_text.flatten(0, 1)]))
            image_features, all_features, logit_scale = self.model(images, texts)
            text_features, wrong_features = all_features[:n_images], all_features[n_images:]
            cosines = torch.einsum("be,bme->bm", image_features, wrong_features.unflatten(0, (n_images, n_wrong)))
            # the cosines cross the ranks, not the features: a picture's wrong captions are negatives for itself only
            wrong = (_gather(cosines), _gather(is_wrong.float()).bool())
        image_features, text_features = _gather(image_features), _gather(text_features)
        loss = contrastive_loss(image_features, text_features, logit_scale, *(wrong or ()))
        with torch.no_grad():
            cosines_BB = image_features @ text_features.T
            is_nearest = cosines_BB.argmax(dim=1) == torch.arange(len(cosines_BB), device=cosines_BB.device)
            metrics = {
                "accuracy": is_nearest.float().mean(),
                "logit_scale": logit_scale.detach(),
                "captions_cut": n_cut.float().mean(),
            }
            if wrong is not None:
                is_farther = (wrong[0] < cosines_BB.diagonal()[:, None]) & wrong[1]
                metrics["hard_negatives_right"] = is_farther.sum() / wrong[1].sum().clamp(min=1)
        return loss, metrics

    def _without_common_pads(self, texts: Tensor) -> Tensor:
        """Return (N,L) ids up to the last end-of-text of any row: the text tower is causal, so no feature changes."""
        end_id = self.model.config.vocab_size - 1
        longest = int((texts == end_id).int().argmax(dim=1).max()) + 1
        return texts[:, :longest]


class _AllGather(torch.autograd.Function):
    """The rows of all ranks; backward, each rank gets the sum of all ranks' gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()  # the gradient may be others', too
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(features: Tensor) -> Tensor:
    """Return the rows of all ranks, (B·ranks, …), with a gradient.

    Every rank computes the same loss of the same features; the backward pass sums the ranks' gradients and the engine
    averages them, which together is the gradient of that one loss.
    """
    if not torch.is_grad_enabled() or dist.get_world_size() == 1:
        return features
    gathered: Tensor = _AllGather.apply(features)  # type: ignore[no-untyped-call]
    return gathered


class CLIPStage:
    """What `fit` needs to know to train CLIP.

    Args:
        recipe: the stage's recipe.
        model: CLIP.
        tokenizer: the model's.
        directory: where CLIP is exported.
        metadata: written beside the configuration.
    """

    name = "clip"
    unit = "images"
    units_per_sample = 1

    def __init__(
        self,
        recipe: CLIPRecipe,
        model: CLIP,
        tokenizer: CLIPTokenizer,
        directory: Path,
        metadata: Mapping[str, Any],
    ) -> None:
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.objective = CLIPObjective(model)
        self._config, self._tokenizer = model.config, tokenizer

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a random square crop and one of the captions, and wrong ones where the recipe wants hard negatives."""
        image = square_crop(open_image(sample.image_bytes, sample.source), self._config.image_size, rng)
        return self._tensors(to_tensor(image), sample.captions[rng.integers(len(sample.captions))], rng)

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the picture as it is seen when it is scored, and the first caption."""
        image = open_image(sample.image_bytes, sample.source)
        return self._tensors(clip_view(image, self._config.image_size), sample.captions[0], rng)

    def _tensors(self, image: Tensor, caption: str, rng: np.random.Generator) -> Tensors:
        text, n_cut = self._tokenizer.tokenize_counting([caption], self._config.context_length)
        tensors = {"images": image, "text": text[0], "n_cut": torch.tensor(n_cut)}
        n_wrong = self.recipe.hard_negatives
        if n_wrong == 0:
            return tensors
        wrong_caption = SOURCES[self.recipe.wrong_captions]
        wrong = [wrong_caption(caption, rng) for _ in range(n_wrong)]
        # in place of one that is missing stands an empty caption, which is masked
        wrong_text, _ = self._tokenizer.tokenize_counting([told or "" for told in wrong], self._config.context_length)
        return {**tensors, "wrong_text": wrong_text, "is_wrong": torch.tensor([told is not None for told in wrong])}

    def prepare(self, tensors: Tensors, step: int, noise_seed: int, *, measure: bool) -> dict[str, Any]:
        """Return the batch as it is."""
        return dict(tensors)

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return None: CLIP draws nothing."""
        return None

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write CLIP's directory."""
        model = CLIP(self._config, self._tokenizer)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in weights.items()}, strict=True)
        model.save(self.directory, metadata={**self.metadata, "step": step})


def check_negatives(accumulation: int) -> None:
    """Refuse gradient accumulation, which would silently shrink the set of negatives.

    Raises:
        ValueError: the batch is split into several micro-batches.
    """
    if accumulation > 1:
        raise ValueError(
            f"CLIP's negatives are the whole batch, but it would be split into {accumulation} micro-batches per rank: "
            "lower --global-batch, raise --micro-batch, or use more ranks"
        )
