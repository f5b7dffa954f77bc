"""The second stage: training the transformer on captions and image tokens (Ramesh et al. 2021, 2.2, B).

The image tokens are encoded in every step, of pictures augmented anew, or were encoded once by `encode.py`.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from dalle.family.losses import training_loss
from dalle.family.transformers import Trained, kind_of, new_transformer
from dalle.model import DALLEConfig
from dalle.output.sheets import contact_sheet
from dalle.output.text import Say
from dalle.sampling import candidate_seed, check_top_k, sample
from dalle.tokenizer import Tokenizer
from dvae.codec import Codec, load_codec
from dvae.images import open_image, resize_and_crop, to_image, to_tensor, transformer_augmentation
from storage.atomic import copy_folder
from storage.models.directory import directory_hash, save_directory
from training.engine.deepspeed_config import with_files
from training.engine.objective import MicroBatch, Tensors
from training.engine.parts.averages import WeightsInParts
from training.engine.parts.drawing import drawn_in_parts, made_whole
from training.engine.parts.spread import spread
from training.loop.run_folder import refuse_another_run
from training.plan.flops import flops_per_sample
from training.ranks.ranks import Ranks, on_first_rank
from training.recipes import Recipe
from training.stage_recipes import TransformerRecipe
from training.stages.dvae import channels_last
from training.stages.inputs import Inputs
from training.stages.locks import alone_in
from training.stages.program import Program


def transformer_loss(model: Trained, text: Tensor, image_tokens: Tensor, n_cut: Tensor) -> tuple[Tensor, Tensors]:
    """Return the weighted loss of a batch, and metrics.

    The metrics are the text and image losses in nats per token (that of text if the model predicts it), the image loss
    of each row of the grid, (Y,), and the fraction of captions cut.

    Args:
        model: the transformer.
        text: (B,T) int64 text ids.
        image_tokens: (B,I) int64.
        n_cut: (B,) int64, 1 where the caption was longer than the text part of the stream.
    """
    loss = training_loss(model, text, image_tokens)
    return loss.total, {
        **({} if loss.text is None else {"text_loss": loss.text.detach()}),
        "image_loss": loss.image.detach(),
        "image_loss_by_row": loss.image_by_row,
        "captions_cut": n_cut.float().mean(),
    }


def _one_view(tokens_VYX: NDArray[np.integer[Any]], view: int) -> Tensors:
    """Return the (I,) int64 image tokens of one view of a picture."""
    return {"image_tokens": torch.from_numpy(tokens_VYX[view].astype(np.int64).flatten())}


class TransformerStage:
    """The transformer, as `fit` trains it.

    Args:
        recipe: the stage's recipe.
        model: the transformer.
        tokenizer: of the captions.
        dvae: frozen; encodes pictures, after augmentation, without Gumbel noise, and decodes the sample sheets. If the
            data is encoded, it moves to the model's device at the first sheet.
        directory: where the transformer is exported.
        captions: that the sample sheets illustrate.
        metadata: written beside the configuration.

    Raises:
        ValueError: a probability of the recipe is outside [0, 1], or its top_k is above the image vocabulary.
    """

    name = "transformer"
    unit = "tokens"

    def __init__(
        self,
        recipe: TransformerRecipe,
        model: Trained,
        tokenizer: Tokenizer,
        dvae: Codec,
        directory: Path,
        captions: Sequence[str],
        metadata: Mapping[str, Any],
    ) -> None:
        for option in ("bpe_dropout", "null_caption_probability"):
            if not 0 <= getattr(recipe, option) <= 1:
                raise ValueError(f"{option} is a probability, in [0, 1], got {getattr(recipe, option)}")
        check_top_k(recipe.sampling.top_k, model.config.image_vocab)
        self.recipe, self.directory, self.metadata = recipe, directory, metadata
        self.model = model
        self.units_per_sample = model.config.text_len + model.config.grid**2
        self._config, self._tokenizer, self._captions = model.config, tokenizer, list(captions)
        self._dvae = dvae.eval().requires_grad_(False)
        self._like = {
            name: torch.empty_like(weight, device="meta", dtype=torch.float32)
            for name, weight in model.state_dict().items()
        }

    def transform(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the augmented picture (Listing 2) and the ids of a caption, with BPE dropout.

        By chance the caption is the empty one; in the first steps it may be one of the first captions only: see
        `TransformerRecipe.first_captions`. An encoded sample has the tokens of one of its random crops instead of the
        picture.
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
        ids = self._tokenizer.encode("" if is_null else caption, dropout=self.recipe.bpe_dropout, rng=rng)
        return {**image, **self._text(ids)}

    def transform_for_validation(self, sample: Sample, rng: np.random.Generator) -> Tensors:
        """Return the centre crop, or its tokens, and the first caption, without dropout."""
        if sample.image_tokens is None:
            picture = open_image(sample.image_bytes, sample.source)
            image = {"images": to_tensor(resize_and_crop(picture, self._dvae.config.image_size))}
        else:
            image = _one_view(sample.image_tokens, 0)
        return {**image, **self._text(self._tokenizer.encode(sample.captions[0]))}

    def _text(self, ids: list[int]) -> Tensors:
        """Return the text ids of a caption's tokens, and 1 if it is too long."""
        return {
            "text": self._config.text_rows([ids])[0],
            "n_cut": torch.tensor(int(len(ids) > self._config.max_caption)),
        }

    def loss(self, batch: MicroBatch, step: int) -> tuple[Tensor, Tensors]:
        """Return the loss and the metrics of `transformer_loss`; encodes pictures, unless they are encoded."""
        tensors = dict(batch.tensors)
        if "images" in tensors:
            images = tensors.pop("images").contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, enabled=False):
                tensors["image_tokens"] = self._dvae_on(images.device).encode(images).flatten(1)
        return transformer_loss(self.model, **tensors)

    def picture(self, weights: Mapping[str, Tensor]) -> Image.Image | None:
        """Sample a picture for each of the captions, as the recipe says, on one sheet.

        With weights of which each rank holds a part, all ranks sample, each with some of the layers; an
        encoder-decoder, which is not spread over ranks, draws no pictures then.
        """
        if not self._captions:
            return None
        if isinstance(weights, WeightsInParts) and weights.ranks.size > 1:
            if not isinstance(self._config, DALLEConfig):
                return None
            weights.call_all()
            tokens = self._sampled(spread(self._config, weights, self._n_rows))
        else:
            tokens = self._sampled(self._with(weights).to(next(self.model.parameters()).device))
        images = self._dvae_on(tokens.device).decode(tokens.view(-1, self._config.grid, self._config.grid))
        return contact_sheet([("", [to_image(image) for image in images], self._captions)])

    def help_to_draw(self, weights: WeightsInParts) -> None:
        """Sample in step with the first rank, with this rank's layers; where one has no room, no rank samples."""
        assert isinstance(self._config, DALLEConfig)  # others call nobody
        with contextlib.suppress(torch.OutOfMemoryError):  # `picture` has it, too
            self._sampled(spread(self._config, weights, self._n_rows))

    @property
    def _n_rows(self) -> int:
        """Candidates of a sheet, twice as many with guidance."""
        return len(self._captions) * (2 if self.recipe.sampling.sampling().is_guided else 1)

    def _sampled(self, model: Trained) -> Tensor:
        """Return the image tokens of a candidate for each of the captions, (P, I)."""
        text = self._config.text_rows([self._tokenizer.encode(caption) for caption in self._captions])
        seeds = [candidate_seed(0, caption, 0) for caption in self._captions]
        return sample(model, text.to(model.device), seeds, self.recipe.sampling.sampling()).tokens[:, 0]

    def export(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the transformer's directory, one weight at a time."""
        metadata = {**self.metadata, "step": step}
        save_directory(self.directory, kind_of(self._config), self._config, weights, metadata=metadata, like=self._like)

    def _dvae_on(self, device: torch.device) -> Codec:
        if next(self._dvae.parameters()).device != device:
            self._dvae = self._dvae.to(device)
        return self._dvae

    def _with(self, weights: Mapping[str, Tensor]) -> Trained:
        with torch.device("meta"):
            model = new_transformer(self._config)
        model.load_state_dict(
            {name: weight.detach().cpu() for name, weight in weights.items()}, strict=True, assign=True
        )
        return model.eval()


@alone_in("transformer")
def train_transformer(
    recipe: Recipe,
    inputs: Inputs,
    ranks: Ranks,
    say: Say,
    *,
    tokenizer: Path | None = None,
    dvae: Path | None = None,
) -> Path:
    """Train the transformer on the bundle's tokenizer and dVAE; returns its directory.

    The data may be shards of image tokens of this dVAE.

    Args:
        recipe: of all stages.
        inputs: shards of captioned pictures, or of image tokens.
        ranks: the ranks of the run.
        say: told how far it is.
        tokenizer: a file to copy into the bundle, if it has none.
        dvae: a directory to copy into the bundle, if it has none.

    Raises:
        FileNotFoundError: the tokenizer or the dVAE is missing.
        ValueError: the bundle holds another tokenizer or dVAE than the one given; the image tokens are of another dVAE;
            or as `fit`.
    """
    stage_recipe = recipe.transformer
    text_bpe = Tokenizer.load(tokenizer or inputs.out / "tokenizer.json")
    dvae_directory = dvae or inputs.out / "dvae"
    image_coder = channels_last(load_codec(dvae_directory))
    program = Program.open(inputs, ranks, say, captions=True, encoded=True)
    _require_tokens_of(image_coder, dvae_directory, program.data, program.validation)
    if program.data.encoding is None:  # otherwise only the sample sheets need it, on the first rank
        image_coder = image_coder.to(ranks.device)
    model = _new_model(stage_recipe, text_bpe, image_coder, ranks)
    model.activation_checkpointing = stage_recipe.train.activation_checkpointing
    if stage_recipe.train.compile:
        model.compile_layers(ranks.device)
    hashes = {"tokenizer_hash": text_bpe.hash, "dvae_hash": directory_hash(dvae_directory)}
    metadata = {
        "recipe": recipe.name,
        "null_caption_probability": stage_recipe.null_caption_probability,
        "sampling": dataclasses.asdict(stage_recipe.sampling),
        **hashes,
    }
    captions = _preview_captions(program.validation or program.data, 8)
    stage = TransformerStage(stage_recipe, model, text_bpe, image_coder, inputs.out / "dalle", captions, metadata)
    description = {"recipe": recipe.name, "model": dataclasses.asdict(model.config), **hashes}
    sizes = model.n_parameters()
    flops = flops_per_sample(model.config, sizes["attention"] + sizes["mlp"])
    spec = program.spec("transformer", description, stage_recipe, flops)
    refuse_another_run(spec)  # before anything is copied into the bundle
    on_first_rank(lambda: _complete_bundle(inputs.out, tokenizer, dvae), ranks)
    program.fit(stage, stage_recipe.train, spec)
    return stage.directory


def _new_model(recipe: TransformerRecipe, tokenizer: Tokenizer, dvae: Codec, ranks: Ranks) -> Trained:
    """Return the recipe's model for a tokenizer and a dVAE, its weights drawn with the run's seed.

    At ZeRO stage 3 it is drawn in parts: no rank holds it whole. Collective.
    """
    sizes = {"image_vocab": dvae.config.vocab_size, "grid": dvae.config.grid}
    config = recipe.model.fitted(text_vocab=tokenizer.vocab_size, **sizes)
    is_in_parts = with_files(recipe.train)[0].zero_stage == 3
    torch.manual_seed(recipe.train.seed)
    with drawn_in_parts(ranks) if is_in_parts else contextlib.nullcontext():
        model = new_transformer(config)
        if recipe.init_scale != 1:
            model.initialise(scale=recipe.init_scale)
    if recipe.init_from_codebook:
        changed = (model.image_embedding, model.image_head)
        with made_whole(changed, ranks) if is_in_parts else contextlib.nullcontext():
            model.initialise_from_codebook(dvae.codebook.cpu())
    return model if is_in_parts else model.to(ranks.device)


def _preview_captions(data: ShardData, count: int) -> list[str]:
    """Return a caption of each of the first samples whose captions can be read."""
    found: list[str] = []
    for i in range(len(data)):
        if len(found) == count:
            break
        with contextlib.suppress(ValueError, OSError):
            found.append(data.captions(i)[0])
    return found


def _require_tokens_of(dvae: Codec, directory: Path, train: ShardData, validation: ShardData | None) -> None:
    """Check that image tokens in place of pictures are of a dVAE, and have random crops to train on.

    Raises:
        ValueError: they are of another dVAE, or of centre crops only.
    """
    for data in (train, validation):
        if data is None or data.encoding is None:
            continue
        expected = dataclasses.replace(
            data.encoding,
            dvae_hash=directory_hash(directory),
            image_size=dvae.config.image_size,
            grid=dvae.config.grid,
            vocab_size=dvae.config.vocab_size,
        )
        differences = data.encoding.differences(expected)
        if differences:
            raise ValueError(
                f"{data.shards[0]} holds image tokens of another dVAE than {directory} ({differences}): encode the "
                f"pictures again with `dalle-train encode --dvae {directory}`, or give --dvae the one they are of"
            )
    if train.encoding is not None and train.encoding.crops == 0:
        raise ValueError(
            f"{train.shards[0]} holds the tokens of centre crops only, which are for validation: encode the pictures "
            "with --crops 1 or more"
        )


def _complete_bundle(out: Path, tokenizer: Path | None, dvae: Path | None) -> None:
    """Copy the given tokenizer and dVAE into a bundle that has none.

    Raises:
        ValueError: it has others.
    """
    if tokenizer is not None:
        named, target = Tokenizer.load(tokenizer), out / "tokenizer.json"
        if not target.exists():
            named.save(target)
        _require_equal(Tokenizer.load(target).hash, target, named.hash, tokenizer, option="--tokenizer")
    if dvae is not None:
        load_codec(dvae)  # whole, before it is copied
        target = out / "dvae"
        if not target.exists():
            copy_folder(dvae, target)
        _require_equal(directory_hash(target), target, directory_hash(dvae), dvae, option="--dvae")


def _require_equal(held: str, target: Path, wanted: str, named: Path, *, option: str) -> None:
    if held != wanted:
        raise ValueError(
            f"{target} is another than {option} {named} ({held} and {wanted}): a bundle has one of each; give another "
            f"--out, leave out {option}, or delete {target}"
        )
