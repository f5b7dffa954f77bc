import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dalle.gallery import MAX_CELL
from dalle.model import DALLE
from dalle.tokenizer import Tokenizer
from dvae import DVAE, DVAEConfig
from dvae.metrics import code_usage
from rerank import CLIP, CLIPTokenizer
from training.clip import CLIPStage, check_negatives
from training.config import OptimizerConfig
from training.data import Sample, ShardData
from training.dvae import DVAEObjective, DVAEStage, scale_encoder_output
from training.engine import join_world
from training.fit import RunPlan, fit
from training.metrics import read_metrics
from training.recipes import DVAERecipe, TransformerRecipe
from training.schedules import Cosine, WarmupCosine
from training.transformer import TransformerStage


@pytest.fixture
def data(shards: Path) -> ShardData:
    return tiny.open_world(shards)


@pytest.fixture
def sample(data: ShardData) -> Sample:
    return data.read(0)


def plan(folder: Path) -> RunPlan:
    return RunPlan(directory=folder / "run", description={"stage": "test"})


def metric(folder: Path, name: str) -> list[float]:
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return [line[name] for line in lines if line["split"] == "train"]


# --------------------------------------------------------------------------------------------------------- dVAE


def dvae_recipe(gain: float) -> DVAERecipe:
    train = tiny.train_config(
        steps=120,
        global_batch=8,
        learning_rate=WarmupCosine(peak=4e-3, warmup=5, steps=120, final=4e-4),
        optimizer=OptimizerConfig(betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.0),
        ema_decay=0.9,
        log_every=40,
    )
    return DVAERecipe(
        model=DVAEConfig(n_hid=16, n_init=16, n_groups=3, n_blocks=1, vocab_size=64, image_size=16),
        train=train,
        kl_weight=Cosine(start=0.0, end=1.0, steps=60),
        temperature=Cosine(start=1.0, end=1 / 16, steps=100),
        encoder_output_gain=gain,
        flip=False,
    )


def test_a_small_dvae_does_not_collapse(tmp_path: Path, data: ShardData) -> None:
    recipe = dvae_recipe(gain=8.0)
    torch.manual_seed(0)
    model = DVAE(recipe.model)
    scale_encoder_output(model, recipe.encoder_output_gain)
    stage = DVAEStage(recipe, model, tmp_path / "dvae", data, {})
    fit(stage, recipe.train, join_world(), data, None, plan(tmp_path), lambda line: None)
    trained = DVAE.load(tmp_path / "dvae")
    images = torch.stack(
        [stage.transform_for_validation(data.read(i), np.random.default_rng(0))["images"] for i in range(len(data))]
    )
    usage = code_usage(trained.encode(images), 64)
    # a gain of 1 leaves 4 codes, a perplexity of at most 1.5, and errors of 0.11 to 0.24 for three seeds
    assert usage.used >= 7
    assert usage.perplexity >= 2
    assert (trained.decode(trained.encode(images)) - images).square().mean() < 0.1


def test_the_gain_scales_the_logits_of_the_encoder_and_1_changes_nothing() -> None:
    model = DVAE(tiny.recipe().dvae.model)
    x = torch.rand(2, 3, 16, 16)
    before = model.encoder(x)
    scale_encoder_output(model, 1.0)
    assert torch.equal(model.encoder(x), before)
    scale_encoder_output(model, 8.0)
    torch.testing.assert_close(model.encoder(x), 8 * before)


def test_the_noise_of_a_dvae_step_is_a_function_of_its_seed() -> None:
    objective = DVAEObjective(DVAE(tiny.recipe().dvae.model))
    images = torch.rand(2, 3, 16, 16)

    def loss(noise_seed: int) -> float:
        options = {"temperature": 1.0, "kl_weight": 0.0, "noise_seed": noise_seed, "measure": False}
        return objective(images, **options)[0].item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_dvae_schedules_follow_the_step(data: ShardData, tmp_path: Path) -> None:
    recipe = dvae_recipe(gain=1.0)
    stage = DVAEStage(recipe, DVAE(recipe.model), tmp_path / "dvae", data, {})
    start, end = (stage.prepare({"images": torch.rand(1, 3, 16, 16)}, s, 0, measure=False) for s in (0, 10_000))
    assert (start["temperature"], start["kl_weight"]) == (1.0, 0.0)
    assert (end["temperature"], end["kl_weight"]) == (1 / 16, 1.0)


def test_the_dvae_preview_shows_pictures_beside_their_reconstructions(data: ShardData, tmp_path: Path) -> None:
    model = DVAE(tiny.recipe().dvae.model)
    stage = DVAEStage(tiny.recipe().dvae, model, tmp_path / "dvae", data, {})
    picture = stage.picture(dict(model.named_parameters()))
    assert picture is not None
    assert picture.width > 2 * 16


# -------------------------------------------------------------------------------------------------- transformer


def transformer_stage(folder: Path, data: ShardData, recipe: TransformerRecipe) -> TransformerStage:
    captions = [caption for index in range(len(data)) for caption in data.captions(index)]
    tokenizer = Tokenizer.train(captions, vocab_size=300)
    model_config = dataclasses.replace(recipe.model, text_vocab=tokenizer.vocab_size, text_len=64)
    torch.manual_seed(0)
    model = DALLE(model_config)
    dvae = DVAE(tiny.recipe().dvae.model)
    scale_encoder_output(dvae, 50.0)
    return TransformerStage(recipe, model, tokenizer, dvae, folder / "dalle", captions[:2], {"recipe": "tiny"})


def test_the_transformer_learns_a_batch_by_heart(
    tmp_path: Path, data: ShardData, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tiny.train_config(
        steps=120, global_batch=4, learning_rate=WarmupCosine(peak=1e-2, warmup=10, steps=120), log_every=30
    )
    recipe = dataclasses.replace(tiny.recipe().transformer, train=train, bpe_dropout=0.0)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, d_model=32))
    stage = transformer_stage(tmp_path, data, recipe)
    monkeypatch.setattr(stage, "transform", stage.transform_for_validation)
    monkeypatch.setattr(data, "order", lambda seed, epoch: np.resize(np.arange(4), len(data)))
    fit(stage, train, join_world(), data, None, plan(tmp_path), lambda line: None)
    text, image = metric(tmp_path, "text_loss"), metric(tmp_path, "image_loss")
    assert text[-1] < 0.35
    assert image[-1] < 0.35
    assert metric(tmp_path, "loss")[-1] == pytest.approx(text[-1] / 8 + image[-1] * 7 / 8, rel=1e-3)
    assert metric(tmp_path, "captions_cut") == [0.0] * 4
    assert DALLE.load(tmp_path / "dalle").metadata == {"recipe": "tiny", "step": 120}


@pytest.mark.parametrize(("probability", "fewest", "most"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_captions_are_left_out_as_often_as_the_recipe_says(
    tmp_path: Path, data: ShardData, sample: Sample, probability: float, fewest: int, most: int
) -> None:
    recipe = dataclasses.replace(tiny.recipe().transformer, null_caption_probability=probability)
    stage = transformer_stage(tmp_path, data, recipe)
    empty = stage._tokenizer.text([""], 64)[0][0]
    texts = [stage.transform(sample, np.random.default_rng(seed))["text"] for seed in range(200)]
    assert fewest <= sum(torch.equal(text, empty) for text in texts) <= most


def test_a_probability_out_of_range_is_refused(tmp_path: Path, data: ShardData) -> None:
    recipe = dataclasses.replace(tiny.recipe().transformer, null_caption_probability=1.5)
    with pytest.raises(ValueError, match="null_caption_probability is a probability"):
        transformer_stage(tmp_path, data, recipe)


def test_training_varies_captions_and_pictures_and_validation_does_not(
    tmp_path: Path, data: ShardData, sample: Sample
) -> None:
    stage = transformer_stage(tmp_path, data, tiny.recipe().transformer)
    generators = [np.random.default_rng(seed) for seed in range(6)]
    trained = [stage.transform(sample, rng) for rng in generators]
    measured = [stage.transform_for_validation(sample, rng) for rng in generators]
    assert len({tuple(tensors["text"].tolist()) for tensors in trained}) > 1
    assert len({tuple(tensors["text"].tolist()) for tensors in measured}) == 1
    assert all(torch.equal(tensors["images"], measured[0]["images"]) for tensors in measured)


def test_the_dvae_of_the_transformer_is_frozen(tmp_path: Path, data: ShardData) -> None:
    stage = transformer_stage(tmp_path, data, tiny.recipe().transformer)
    assert not any(parameter.requires_grad for parameter in stage._dvae.parameters())
    assert all("dvae" not in name for name, _ in stage.objective.named_parameters())
    arguments = stage.prepare(
        {"images": torch.rand(2, 3, 16, 16), "text": torch.zeros(2, 64), "n_cut": torch.zeros(2)}, 0, 0, measure=False
    )
    assert arguments["image_tokens"].shape == (2, 16)


def test_the_transformer_preview_has_a_sample_for_each_caption(tmp_path: Path, data: ShardData) -> None:
    stage = transformer_stage(tmp_path, data, tiny.recipe().transformer)
    picture = stage.picture(dict(stage.objective.model.named_parameters()))
    assert picture is not None
    assert picture.width < 3 * MAX_CELL


# --------------------------------------------------------------------------------------------------------- CLIP


def test_clip_learns_which_caption_belongs_to_which_picture(tmp_path: Path, data: ShardData) -> None:
    recipe = tiny.recipe(steps=120, global_batch=12, log_every=30).clip
    train = dataclasses.replace(recipe.train, learning_rate=WarmupCosine(peak=5e-3, warmup=5, steps=120))
    captions = [caption for index in range(len(data)) for caption in data.captions(index)]
    tokenizer = CLIPTokenizer.train(captions, 300)
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size, context_length=64)
    torch.manual_seed(0)
    stage = CLIPStage(recipe, CLIP(config, tokenizer), tokenizer, tmp_path / "clip", {})
    fit(stage, train, join_world(), data, data, plan(tmp_path), lambda line: None)
    losses = metric(tmp_path, "loss")
    assert losses[-1] < 0.75 * losses[0]
    assert metric(tmp_path, "captions_cut")[-1] == 0.0
    assert CLIP.load(tmp_path / "clip").tokenizer is not None


def test_clip_counts_captions_that_are_too_long(tmp_path: Path, sample: Sample) -> None:
    tokenizer = CLIPTokenizer.train(["a red circle"], 300)
    config = dataclasses.replace(tiny.recipe().clip.model, vocab_size=tokenizer.vocab_size, context_length=8)
    stage = CLIPStage(tiny.recipe().clip, CLIP(config, tokenizer), tokenizer, tmp_path / "clip", {})
    tensors = stage.transform(sample, np.random.default_rng(0))
    assert tensors["n_cut"].item() == 1
    assert tensors["text"].shape == (8,)


def test_clip_refuses_gradient_accumulation() -> None:
    check_negatives(1)
    with pytest.raises(ValueError, match="negatives are the whole batch"):
        check_negatives(2)
