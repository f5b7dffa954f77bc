"""Training the reranker: CLIP on pictures and captions (Radford et al. 2021, 2.3).

The negatives of a pair are all others of the global batch, across ranks, and, if the recipe says so, wrong captions
made of its own.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample
from dalle.output.text import Say
from dvae.images import open_image, square_crop, to_tensor
from rerank.loss import contrastive_loss
from rerank.model import CLIP
from rerank.pixels import clip_view
from rerank.tokenizer import CLIPTokenizer
from storage.models.directory import as_written_before
from training.drawings.wrong_captions import SOURCES
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts
from training.ranks.ranks import Ranks, on_first_rank
from training.recipes import Recipe
from training.stage_recipes import CLIPRecipe
from training.stages.inputs import Inputs, all_captions
from training.stages.locks import alone_in
from training.stages.program import Program


def clip_loss(
    model: CLIP,
    images: Tensor,
    text: Tensor,
    n_cut: Tensor,
    wrong_text: Tensor | None = None,
    is_wrong: Tensor | None = None,
    other_text: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """Return the symmetric contrastive loss over the batches of all ranks, and metrics.

    Deviation: if the recipe says so, each picture has wrong captions as further negatives (Yuksekgonul et al. 2023,
    arXiv 2210.01936), here of this picture alone; and another caption of the picture is treated as a second view of it,
    whose right caption is to be found in the same way: the text tower then learns what a caption says from captions
    alone, long before the pictures tell it.

    The metrics are how often the right caption is the nearest of the batch's, the logit scale, the fraction of captions
    cut, with hard negatives how many of them are farther from their picture than the right caption, and with
    paraphrases their part of the loss.

    Args:
        model: CLIP.
        images: (B,3,H,W) float32 in [0, 1].
        text: (B,L) int64 ids.
        n_cut: (B,) int64, 1 where the caption was longer than the text tower's context.
        wrong_text: (B,M,L) int64 ids of captions that are wrong for the picture; None if it has none.
        is_wrong: (B,M) bool, False where there is no such caption.
        other_text: (B,L) int64 ids of another caption of the picture, or again the same; None to leave it out.
    """
    given = [text, wrong_text, other_text]
    texts = [each.flatten(0, -2) for each in given if each is not None]
    # one pass for all texts, because ZeRO 3 wants one pass through the model
    ids = _without_common_pads(torch.cat(texts), end_id=model.config.vocab_size - 1)
    features, all_features, logit_scale = model(images, ids)
    text_features, *others = all_features.split([len(each) for each in texts])
    other_features = others.pop() if other_text is not None else None
    wrong_features = others.pop().unflatten(0, (len(images), -1)) if wrong_text is not None else None
    text_features = _gather(text_features)
    all_wrong = None if is_wrong is None else _gather(is_wrong.float()).bool()
    loss, features, wrong_cosines = _choose(features, text_features, logit_scale, wrong_features, all_wrong)
    with torch.no_grad():
        cosines_BB = features @ text_features.T
        is_nearest = cosines_BB.argmax(dim=1) == torch.arange(len(cosines_BB), device=cosines_BB.device)
        metrics = {
            "accuracy": is_nearest.float().mean(),
            "logit_scale": logit_scale.detach(),
            "captions_cut": n_cut.float().mean(),
        }
        if wrong_cosines is not None and all_wrong is not None:
            is_farther = (wrong_cosines < cosines_BB.diagonal()[:, None]) & all_wrong
            metrics["hard_negatives_right"] = is_farther.sum() / all_wrong.sum().clamp(min=1)
    if other_features is not None:
        paraphrase_loss, _, _ = _choose(other_features, text_features, logit_scale, wrong_features, all_wrong)
        metrics["paraphrase_loss"] = paraphrase_loss.detach()
        loss = loss + paraphrase_loss
    return loss, metrics


def _without_common_pads(texts: Tensor, end_id: int) -> Tensor:
    """Return (N,L) ids up to the last end-of-text of any row: the text tower is causal, so no feature changes."""
    longest = int((texts == end_id).int().argmax(dim=1).max()) + 1
    return texts[:, :longest]


def _choose(
    views: Tensor, texts: Tensor, logit_scale: Tensor, wrong_features: Tensor | None, is_wrong: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the contrastive loss of views of pictures and the captions, all views, and their wrong captions' cosines.

    Args:
        views: (B,E), features of this rank's pictures, or of other captions of them.
        texts: (B·ranks,E), features of the captions of all ranks.
        logit_scale: scalar.
        wrong_features: (B,M,E), features of captions that are wrong for this rank's pictures; None if they have none.
        is_wrong: (B·ranks,M) bool, False where there is no such caption.

    Returns:
        The loss; the views of all ranks, (B·ranks,E); their cosines with their wrong captions, (B·ranks,M), or None.
    """
    wrong_cosines = None
    if wrong_features is not None:
        # the cosines cross the ranks, not the features: a picture's wrong captions are negatives for itself only
        wrong_cosines = _gather(torch.einsum("be,bme->bm", views, wrong_features))
    views = _gather(views)
    return contrastive_loss(views, texts, logit_scale, wrong_cosines, is_wrong), views, wrong_cosines


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
    """CLIP, as `fit` trains it.

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
    is_warmup = False

    def __init__(
        self,
        recipe: CLIPRecipe,
        model: CLIP,
        tokenizer: CLIPTokenizer,
        directory: Path,
        metadata: Mapping[str, Any],
    ) -> None:
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.model = model
        self._config, self._tokenizer = model.config, tokenizer

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return a random square crop, one of the captions, and what else of it the recipe wants."""
        image = square_crop(open_image(sample.image_bytes, sample.source), self._config.image_size, rng)
        captions = self._captions(sample)
        return self._tensors(to_tensor(image), captions, int(rng.integers(len(captions))), rng)

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the picture as it is seen when it is scored, the first caption, and what else the recipe wants."""
        image = open_image(sample.image_bytes, sample.source)
        return self._tensors(clip_view(image, self._config.view), self._captions(sample), 0, rng)

    def _captions(self, sample: Sample) -> Sequence[str]:
        """Return the captions of a sample that are trained on."""
        return sample.captions

    def _tensors(self, image: Tensor, captions: Sequence[str], chosen: int, rng: np.random.Generator) -> Tensors:
        text, n_cut = self._tokenizer.tokenize_counting([captions[chosen]], self._config.context_length)
        tensors = {"images": image, "text": text[0], "n_cut": torch.tensor(n_cut)}
        n_wrong = self.recipe.hard_negatives
        if n_wrong:
            wrong_caption = SOURCES[self.recipe.wrong_captions]
            wrong = [wrong_caption(captions[chosen], rng, of_few_kinds=self.is_warmup) for _ in range(n_wrong)]
            # in place of one that is missing stands an empty caption, which is masked
            ids, _ = self._tokenizer.tokenize_counting([told or "" for told in wrong], self._config.context_length)
            tensors |= {"wrong_text": ids, "is_wrong": torch.tensor([told is not None for told in wrong])}
        if self.recipe.paraphrases:
            other = (chosen + int(rng.integers(1, max(2, len(captions))))) % len(captions)
            ids, _ = self._tokenizer.tokenize_counting([captions[other]], self._config.context_length)
            tensors["other_text"] = ids[0]
        return tensors

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss and the metrics of `clip_loss`."""
        return clip_loss(self.model, **batch.tensors)

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Return None: CLIP draws nothing."""
        return None

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Do nothing: the first rank draws alone."""

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write CLIP's directory."""
        model = CLIP(self._config, self._tokenizer)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in weights.items()}, strict=True)
        model.save(self.directory, metadata={**self.metadata, "step": step})


class CLIPWarmupStage(CLIPStage):
    """CLIP's warm-up on captions that are told alike, before those told in all ways.

    Deviation: not in the CLIP paper. Where the order of words says which thing is where, a model that has not
    learned to see where things are gains nothing by reading order, and one that has not learned to read order gains
    nothing by seeing it. If the first thing told always stands on the same side, both are learned in minutes, and the
    other ways of telling soon after. The wrong captions are of the few kinds that take longest to learn.
    """

    name = "clip-warmup"
    is_warmup = True

    def _captions(self, sample: Sample) -> Sequence[str]:
        return sample.captions[: self.recipe.warmup_captions]


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


@alone_in("clip")
def train_clip(recipe: Recipe, inputs: Inputs, ranks: Ranks, say: Say) -> Path:
    """Train CLIP, with a BPE of its own; returns its directory. It is warmed up first if the recipe says so."""
    stage_recipe = recipe.clip
    check_negatives(stage_recipe.train.batch_of(ranks.size)[1])
    program = Program.open(inputs, ranks, say, captions=True)
    tokenizer = _clip_tokenizer(program, stage_recipe.model.vocab_size)
    config = dataclasses.replace(stage_recipe.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(stage_recipe.train.seed)
    model = CLIP(config, tokenizer)
    if stage_recipe.embedding_scale != 1:
        model.initialise(embedding_scale=stage_recipe.embedding_scale)
    metadata = {"recipe": recipe.name}
    description = {
        "recipe": recipe.name,
        "model": as_written_before(config),
        "tokenizer_hash": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16],
    }
    if stage_recipe.warmup is not None and program.needs_warmup("clip"):
        directory = inputs.run_directory("clip-warmup") / "model"
        warmup = CLIPWarmupStage(stage_recipe, model.to(ranks.device), tokenizer, directory, metadata)
        program = program.warm_up(warmup, stage_recipe.warmup, description, stage_recipe)
        model = CLIP.load(directory)
    stage = CLIPStage(stage_recipe, model.to(ranks.device), tokenizer, inputs.out / "clip", metadata)
    program.fit(stage, stage_recipe.train, program.spec("clip", description, stage_recipe))
    return stage.directory


def _clip_tokenizer(program: Program, vocab_size: int) -> CLIPTokenizer:
    """Return the tokenizer of the run that is resumed, or of its warm-up; otherwise one trained on the captions."""
    path = program.inputs.run_directory("clip") / "tokenizer.json"
    if path.is_file() and any(program.has_checkpoint(stage) for stage in ("clip", "clip-warmup")):
        return CLIPTokenizer.load(path)
    tokenizer = CLIPTokenizer.train(all_captions(program.data), vocab_size=vocab_size)
    if tokenizer.vocab_size < vocab_size:
        program.say(f"clip: the captions gave a vocabulary of {tokenizer.vocab_size:,}, not {vocab_size:,}")

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)

    on_first_rank(save, program.ranks)
    return tokenizer
