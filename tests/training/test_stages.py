import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor

import training.stages.dvae
import training.stages.transformer
from dalle import sampling
from dalle.data.order import Order
from dalle.data.reader import Sample, ShardData
from dalle.model import DALLE
from dalle.output.sheets import MAX_CELL
from dalle.sampling import Samples, Sampling, SamplingDefaults
from dalle.tokenizer import Tokenizer
from dvae import DVAE, DVAEConfig
from dvae.images import map_pixels, unmap_pixels
from dvae.loss import DVAELoss, dvae_loss
from dvae.metrics import code_usage, psnr
from rerank import CLIP, CLIPTokenizer
from rerank.loss import contrastive_loss
from training.config import OptimizerConfig
from training.drawings.shapes import parse
from training.drawings.wrong_captions import FEW_KINDS, Source, wrong_scene
from training.engine.objective import MicroBatch, Objective
from training.loop.fit import fit
from training.loop.run_folder import RunSpec
from training.ranks.ranks import join
from training.run_files import read_metrics
from training.schedules import Cosine, WarmupCosine
from training.stage_recipes import DVAERecipe, TransformerRecipe
from training.stages.clip import CLIPStage, CLIPWarmupStage, check_negatives
from training.stages.codebook import POSTERIOR_ENTROPY, _kmeans, _rarity, initialise_codebook
from training.stages.dvae import DVAEStage, WarmupStage, autoencoder_loss
from training.stages.transformer import TransformerStage


@pytest.fixture
def data(shards: Path) -> ShardData:
    return tiny.open_world(shards)


@pytest.fixture
def sample(data: ShardData) -> Sample:
    return data.read(0)


def spec(folder: Path) -> RunSpec:
    return RunSpec(directory=folder / "run", description={"stage": "test"})


def metric(folder: Path, name: str) -> list[float]:
    lines = read_metrics(folder / "run")
    return [line[name] for line in lines if line["split"] == "train"]


# --------------------------------------------------------------------------------------------------------- dVAE


N_CODES = 64


def dvae_recipe() -> DVAERecipe:
    """A dVAE of 64 codes that a second of warm-up and two of training make usable."""
    optimizer = OptimizerConfig(betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.1)
    warmup = tiny.train_config(
        steps=150,
        global_batch=8,
        learning_rate=WarmupCosine(peak=4e-3, warmup=5, steps=150, final=4e-4),
        optimizer=optimizer,
        ema_decay=0.0,
        log_every=30,
    )
    train = dataclasses.replace(
        warmup, steps=60, learning_rate=WarmupCosine(peak=3e-4, warmup=5, steps=60, final=3e-5), ema_decay=0.9
    )
    return DVAERecipe(
        model=DVAEConfig(n_hid=16, n_init=8, n_groups=3, n_blocks=1, vocab_size=N_CODES, image_size=16),
        train=train,
        warmup=warmup,
        kl_weight=Cosine(start=0.0, end=0.1, steps=60),
        temperature=Cosine(start=0.3, end=1 / 16, steps=50),
        flip=False,
    )


def pictures_of(data: ShardData) -> torch.Tensor:
    recipe = tiny.recipe().dvae
    images, keys = DVAEStage(recipe, DVAE(recipe.model), Path("unused"), data, {}).first_images(len(data), data)
    assert len(keys) == len(data)
    return images


@pytest.fixture(scope="module")
def warm_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of a warm-up: the autoencoder, and its run; not to be changed."""
    folder, data, recipe = tmp_path_factory.mktemp("warm"), tiny.open_world(shards), dvae_recipe()
    torch.manual_seed(0)
    stage = WarmupStage(recipe, DVAE(recipe.model), folder / "autoencoder", data, {})
    assert recipe.warmup is not None
    fit(stage, recipe.warmup, join(), data, data, spec(folder), lambda line: None)
    return folder


@pytest.fixture
def warm(warm_run: Path) -> DVAE:
    return DVAE.load(warm_run / "autoencoder")


@pytest.fixture
def images(data: ShardData) -> torch.Tensor:
    return pictures_of(data)


def bottleneck(model: DVAE, images: torch.Tensor) -> torch.Tensor:
    """What an autoencoder's decoder reads at every position: (B,Y,X,C)."""
    with torch.no_grad():
        return model.decoder.blocks[0](model.encoder(map_pixels(images))).permute(0, 2, 3, 1)


def codebook(model: DVAE) -> torch.Tensor:
    """What the decoder makes of every token: (K,C)."""
    read = model.decoder.blocks[0]
    return (read.weight[:, :, 0, 0] + read.bias[:, None]).detach().T


def test_a_warm_up_learns_to_reconstruct_without_tokens(warm_run: Path, warm: DVAE, images: torch.Tensor) -> None:
    learned = metric(warm_run, "psnr")
    assert learned[-1] > learned[0] + 4
    with torch.no_grad():
        _, metrics = autoencoder_loss(warm, images)
    (validated,) = (line for line in read_metrics(warm_run / "run") if line["split"] == "validation")
    assert metrics["psnr"].item() == pytest.approx(validated["psnr"], rel=1e-4)
    assert not (warm_run / "run" / "samples").exists()


def test_with_its_codebook_a_dvae_replaces_every_position_by_the_nearest_centre(
    warm: DVAE, images: torch.Tensor
) -> None:
    old, new = warm, copy.deepcopy(warm)
    initialise_codebook(new, images, seed=0)
    e_BYXC, centres_KC = bottleneck(old, images).double(), codebook(new).double()
    distance_BYXK = (e_BYXC[..., None, :] - centres_KC).square().sum(dim=-1)
    tokens_BYX = new.encode(images)
    torch.testing.assert_close(
        distance_BYXK.gather(-1, tokens_BYX[..., None])[..., 0],
        distance_BYXK.amin(dim=-1),
        atol=1e-5 * float(distance_BYXK.mean()),  # of two centres equally near, rounding decides
        rtol=1e-5,
    )
    centres_BCYX = centres_KC.float()[tokens_BYX].permute(0, 3, 1, 2)
    with torch.no_grad():
        stats = old.decoder.blocks[1:](centres_BCYX)
    torch.testing.assert_close(new.decode(tokens_BYX), unmap_pixels(stats[:, :3].sigmoid()))


def test_the_codebook_loses_little_of_what_the_warm_up_learned(warm: DVAE, images: torch.Tensor) -> None:
    with torch.no_grad():
        before = autoencoder_loss(warm, images)[1]["psnr"].item()
    initialise_codebook(warm, images, seed=0)
    assert psnr(images, warm.decode(warm.encode(images))).mean().item() > before - 0.5


def test_nearly_all_codes_are_used_and_the_encoder_is_nearly_decided(warm: DVAE, images: torch.Tensor) -> None:
    initialise_codebook(warm, images, seed=0)
    assert code_usage(warm.encode(images), N_CODES).used >= 0.95 * N_CODES
    with torch.no_grad():
        log_p = warm.encoder(map_pixels(images)).log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean().item()
    assert entropy == pytest.approx(POSTERIOR_ENTROPY, rel=0.02)


def test_a_codebook_is_a_function_of_its_seed(warm: DVAE, images: torch.Tensor) -> None:
    models = [copy.deepcopy(warm) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(1)  # the global generator does not enter
        initialise_codebook(model, images, seed=seed)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(codebook(models[0]), codebook(models[2]))
    assert first.keys() == other.keys()


def test_pictures_with_fewer_distinct_positions_than_codes_give_a_finite_codebook(warm: DVAE) -> None:
    grey = torch.full((3, 3, 16, 16), 0.5)  # a few kinds of positions: corners, edges, inside
    old = copy.deepcopy(warm)
    initialise_codebook(warm, grey, seed=0)
    assert all(weight.isfinite().all() for weight in warm.state_dict().values())
    e_BYXC = bottleneck(old, grey)
    torch.testing.assert_close(codebook(warm)[warm.encode(grey)], e_BYXC, atol=1e-4, rtol=1e-4)


def test_kmeans_finds_the_means_of_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    means_KC = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points_KNC = means_KC[:, None] + 0.1 * torch.randn(4, 50, 2, generator=generator)
    centres_KC = _kmeans(points_KNC.flatten(0, 1), 4, torch.ones(200), generator)
    expected_KC = points_KNC.mean(dim=1)
    distances_KK = torch.cdist(centres_KC, expected_KC)
    assert distances_KK.amin(dim=0).max() < 1e-4


def test_rare_points_weigh_as_much_as_common_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(9_000, 2, generator=generator)
    rare = 20 + torch.randn(1_000, 2, generator=generator)
    weights = _rarity(torch.cat([common, rare]), generator)
    assert 0.5 < weights[9_000:].sum() / weights[:9_000].sum() < 2


@pytest.mark.parametrize("n_points", [1, 3, 40])
def test_kmeans_centres_are_points_where_there_are_fewer_points_than_centres(n_points: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points_NC = torch.randn(n_points, 5, generator=generator).repeat(3, 1)
    centres_KC = _kmeans(points_NC, 64, torch.ones(len(points_NC)), generator)
    assert centres_KC.isfinite().all()
    assert (centres_KC[:, None] - points_NC).abs().amax(dim=-1).amin(dim=1).max() < 1e-5


@pytest.mark.slow
def test_a_small_dvae_keeps_its_codes_alive(tmp_path: Path, data: ShardData, warm: DVAE, images: torch.Tensor) -> None:
    recipe = dvae_recipe()
    with torch.no_grad():
        mean_psnr = psnr(images, images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)).mean().item()
    initialise_codebook(warm, images, seed=0)
    stage = DVAEStage(recipe, warm, tmp_path / "dvae", data, {})
    fit(stage, recipe.train, join(), data, None, spec(tmp_path), lambda line: None)
    trained = DVAE.load(tmp_path / "dvae")
    tokens = trained.encode(images)
    usage = code_usage(tokens, N_CODES)
    assert usage.used >= N_CODES / 2  # from random weights, 1 to 8 are left after 210 steps
    assert usage.perplexity >= N_CODES / 4
    assert psnr(images, trained.decode(tokens)).mean().item() > mean_psnr + 4


def batch_of(tensors: dict[str, torch.Tensor], *, noise_seed: int = 0) -> MicroBatch:
    return MicroBatch(tensors=tensors, noise_seed=noise_seed, measure=False)


def test_the_noise_of_a_dvae_step_is_a_function_of_its_seed(data: ShardData, tmp_path: Path) -> None:
    recipe = tiny.recipe().dvae
    stage = DVAEStage(recipe, DVAE(recipe.model), tmp_path / "dvae", data, {})
    images = torch.rand(2, 3, 16, 16)

    def loss(noise_seed: int) -> float:
        return stage.loss(batch_of({"images": images}, noise_seed=noise_seed), 0)[0].item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_dvae_schedules_follow_the_step(data: ShardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dvae_recipe()
    stage = DVAEStage(recipe, DVAE(recipe.model), tmp_path / "dvae", data, {})
    used: list[tuple[float, float]] = []

    def watched(*arguments: Any, temperature: float, kl_weight: float, **options: Any) -> DVAELoss:
        used.append((temperature, kl_weight))
        return dvae_loss(*arguments, temperature=temperature, kl_weight=kl_weight, **options)

    monkeypatch.setattr(training.stages.dvae, "dvae_loss", watched)
    for step in (0, 10_000):
        stage.loss(batch_of({"images": torch.rand(1, 3, 16, 16)}), step)
    assert used == [(0.3, 0.0), (1 / 16, 0.1)]


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
    initialise_codebook(dvae, pictures_of(data), seed=0)  # tokens that differ from picture to picture
    return TransformerStage(recipe, model, tokenizer, dvae, folder / "dalle", captions[:2], {"recipe": "tiny"})


@pytest.mark.slow
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
    monkeypatch.setattr(Order, "number", lambda _, position: position % 4)
    fit(stage, train, join(), data, None, spec(tmp_path), lambda line: None)
    text, image = metric(tmp_path, "text_loss"), metric(tmp_path, "image_loss")
    assert text[-1] < 0.35
    assert image[-1] < 0.35
    assert metric(tmp_path, "loss")[-1] == pytest.approx(text[-1] / 8 + image[-1] * 7 / 8, rel=1e-3)
    assert metric(tmp_path, "captions_cut") == [0.0] * 4
    assert DALLE.load(tmp_path / "dalle").metadata == {"recipe": "tiny", "step": 120}


def test_sample_sheets_are_sampled_as_the_recipe_says(
    tmp_path: Path, data: ShardData, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = SamplingDefaults(temperature=0.5, top_k=3, top_p=0.9, guidance=2.0)
    stage = transformer_stage(tmp_path, data, dataclasses.replace(tiny.recipe().transformer, sampling=chosen))
    told: list[Sampling] = []

    def watched(model: DALLE, text: Tensor, seeds: list[int], settings: Sampling) -> Samples:
        told.append(settings)
        return sampling.sample(model, text, seeds, settings)

    monkeypatch.setattr(training.stages.transformer, "sample", watched)
    assert stage.picture(dict(stage.model.named_parameters())) is not None
    assert told == [Sampling(temperature=0.5, top_k=3, top_p=0.9, guidance=2.0)]
    large = dataclasses.replace(chosen, top_k=33)
    with pytest.raises(ValueError, match=r"top_k \(33\) must be at most the image vocabulary, 32"):
        transformer_stage(tmp_path, data, dataclasses.replace(tiny.recipe().transformer, sampling=large))


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
    assert all("dvae" not in name for name, _ in Objective(stage.model, stage.loss).named_parameters())
    tensors = {"text": torch.zeros(2, 64, dtype=torch.long), "n_cut": torch.zeros(2)}
    loss, _ = stage.loss(batch_of({**tensors, "images": torch.rand(2, 3, 16, 16)}), 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in stage._dvae.parameters())


def test_the_dvae_of_the_transformer_encodes_in_float32_under_autocast(
    tmp_path: Path, data: ShardData, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = transformer_stage(tmp_path, data, tiny.recipe().transformer)
    images = torch.rand(8, 3, 16, 16)
    read: list[torch.Tensor] = []
    original = stage._dvae.encoder.forward
    monkeypatch.setattr(stage._dvae.encoder, "forward", lambda pixels: read.append(original(pixels)) or read[-1])
    tensors = {"text": torch.zeros(8, 64, dtype=torch.long), "n_cut": torch.zeros(8)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage.loss(batch_of({**tensors, "images": images}), 0)
    assert read[0].dtype == torch.float32


def test_the_transformer_preview_has_a_sample_for_each_caption(tmp_path: Path, data: ShardData) -> None:
    stage = transformer_stage(tmp_path, data, tiny.recipe().transformer)
    picture = stage.picture(dict(stage.model.named_parameters()))
    assert picture is not None
    assert picture.width < 3 * MAX_CELL


# --------------------------------------------------------------------------------------------------------- CLIP


def test_in_its_first_steps_the_transformer_may_read_the_first_captions_only(data: ShardData) -> None:
    made = tiny.recipe(steps=10, global_batch=4).transformer
    recipe = dataclasses.replace(made, first_captions=5, first_share=0.5, bpe_dropout=0.0)
    captions = [caption for index in range(len(data)) for caption in data.captions(index)]
    tokenizer = Tokenizer.train(captions, vocab_size=400)
    dvae = DVAE(tiny.recipe().dvae.model)
    model = DALLE(dataclasses.replace(recipe.model, text_vocab=tokenizer.vocab_size, text_len=64))
    stage = TransformerStage(recipe, model, tokenizer, dvae, Path("unused"), [], {})
    sample = data.read(0)

    def read(position: int) -> set[int]:
        placed = dataclasses.replace(sample, position=position)
        texts = [stage.transform(placed, np.random.default_rng(seed))["text"] for seed in range(80)]
        all_texts = tokenizer.text(sample.captions, 64)[0]
        return {k for text in texts for k in range(10) if torch.equal(text, all_texts[k])}

    assert read(0) == read(19) == {0, 1, 2, 3, 4}
    assert read(20) == set(range(10))


@pytest.mark.slow
def test_clip_learns_which_caption_belongs_to_which_picture(tmp_path: Path, data: ShardData) -> None:
    recipe = tiny.recipe(steps=200, global_batch=12, log_every=30).clip
    train = dataclasses.replace(recipe.train, learning_rate=WarmupCosine(peak=5e-3, warmup=5, steps=200))
    captions = [caption for index in range(len(data)) for caption in data.captions(index)]
    tokenizer = CLIPTokenizer.train(captions, 300)
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size, context_length=64)
    torch.manual_seed(0)
    stage = CLIPStage(recipe, CLIP(config, tokenizer), tokenizer, tmp_path / "clip", {})
    fit(stage, train, join(), data, data, spec(tmp_path), lambda line: None)
    losses = metric(tmp_path, "loss")
    assert losses[-1] < 0.75 * losses[0]
    assert metric(tmp_path, "captions_cut")[-1] == 0.0
    assert CLIP.load(tmp_path / "clip").tokenizer is not None


def test_the_noise_of_the_warm_up_is_on_the_bottleneck_and_only_in_training() -> None:
    torch.manual_seed(0)
    model = DVAE(tiny.recipe().dvae.model)
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size)
    plain = autoencoder_loss(model, images)[0]
    rows = model.decoder.rows(model.encoder(map_pixels(images)))
    gaussian = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    mu, _ = model.decoder.from_rows(rows + 0.3 * rows.square().mean().sqrt() * gaussian).chunk(2, dim=1)
    loss, metrics = autoencoder_loss(model, images, noise=0.3, noise_seed=5)
    error = (unmap_pixels(torch.sigmoid(mu)) - images).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(metrics["psnr"], (-10 * error.log10()).mean().detach())
    assert loss != plain
    torch.testing.assert_close(autoencoder_loss(model.eval(), images, noise=0.3, noise_seed=5)[0], plain)


def test_clip_counts_captions_that_are_too_long(tmp_path: Path, sample: Sample) -> None:
    tokenizer = CLIPTokenizer.train(["a red circle"], 300)
    config = dataclasses.replace(tiny.recipe().clip.model, vocab_size=tokenizer.vocab_size, context_length=8)
    stage = CLIPStage(tiny.recipe().clip, CLIP(config, tokenizer), tokenizer, tmp_path / "clip", {})
    tensors = stage.transform(sample, np.random.default_rng(0))
    assert tensors["n_cut"].item() == 1
    assert tensors["text"].shape == (8,)


def clip_stage(folder: Path, data: ShardData, hard_negatives: int, source: Source = "world") -> CLIPStage:
    recipe = dataclasses.replace(tiny.recipe().clip, hard_negatives=hard_negatives, wrong_captions=source)
    tokenizer = CLIPTokenizer.train([told for index in range(len(data)) for told in data.captions(index)], 400)
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size, context_length=64)
    torch.manual_seed(0)
    return CLIPStage(recipe, CLIP(config, tokenizer), tokenizer, folder / "clip", {})


def test_hard_negatives_are_wrong_captions_of_the_same_picture(tmp_path: Path, data: ShardData, sample: Sample) -> None:
    stage = clip_stage(tmp_path, data, 3)
    for seed in range(5):
        tensors, again = (stage.transform(sample, np.random.default_rng(seed)) for _ in range(2))
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
        assert tensors["wrong_text"].shape == (3, 64)
        assert tensors["is_wrong"].tolist() == [True] * 3
        right = parse(stage._tokenizer.decode(tensors["text"].tolist()))
        assert all(parse(stage._tokenizer.decode(row.tolist())) != right for row in tensors["wrong_text"])


def test_without_hard_negatives_a_batch_is_what_it_was(tmp_path: Path, data: ShardData, sample: Sample) -> None:
    without, having = (
        clip_stage(tmp_path, data, count).transform(sample, np.random.default_rng(4)) for count in (0, 2)
    )
    assert set(without) == {"images", "text", "n_cut"}
    assert all(torch.equal(tensor, having[name]) for name, tensor in without.items())


def test_pictures_without_wrong_captions_have_the_loss_of_no_hard_negatives(
    tmp_path: Path, data: ShardData, sample: Sample
) -> None:
    loose = dataclasses.replace(sample, captions=["a dog"])
    losses = []
    for count in (0, 2):
        stage = clip_stage(tmp_path, data, count)
        tensors = [stage.transform(loose, np.random.default_rng(seed)) for seed in range(4)]
        batch = {name: torch.stack([sample[name] for sample in tensors]) for name in tensors[0]}
        loss, metrics = stage.loss(batch_of(batch), 0)
        losses.append(loss)
    assert metrics["hard_negatives_right"] == 0
    torch.testing.assert_close(losses[1], losses[0])


def words_of(caption: str) -> str:
    return " ".join(caption.replace(",", " ").split())


def test_the_warm_up_of_clip_reads_the_first_captions_and_wrong_ones_of_few_kinds(
    tmp_path: Path, data: ShardData, sample: Sample
) -> None:
    made = clip_stage(tmp_path, data, 2)
    recipe = dataclasses.replace(made.recipe, warmup_captions=5, paraphrases=True)
    stage = CLIPWarmupStage(recipe, made.model, made._tokenizer, tmp_path / "clip", {})
    read = {"text": set(), "other_text": set()}
    scene = parse(sample.captions[0])
    few = {wrong_scene(scene, kind, np.random.default_rng(seed)) for kind in FEW_KINDS for seed in range(400)}
    for seed in range(60):
        tensors = stage.transform(sample, np.random.default_rng(seed))
        for name, found in read.items():
            found.add(words_of(stage._tokenizer.decode(tensors[name].tolist())))
        assert not torch.equal(tensors["text"], tensors["other_text"])
        wrong = [parse(stage._tokenizer.decode(row.tolist())) for row in tensors["wrong_text"]]
        assert set(wrong) <= few
    first = {words_of(caption) for caption in sample.captions[:5]}
    assert read == {"text": first, "other_text": first}


def test_another_caption_of_the_picture_is_a_second_view_of_it(tmp_path: Path, data: ShardData, sample: Sample) -> None:
    made = clip_stage(tmp_path, data, 2)
    stage = CLIPStage(
        dataclasses.replace(made.recipe, paraphrases=True), made.model, made._tokenizer, tmp_path / "clip", {}
    )
    tensors = [stage.transform(sample, np.random.default_rng(seed)) for seed in range(4)]
    batch = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
    loss, metrics = stage.loss(batch_of(batch), 0)
    without, _ = stage.loss(batch_of({name: tensor for name, tensor in batch.items() if name != "other_text"}), 0)
    model = made.model
    views, texts = model.encode_text(batch["other_text"]), model.encode_text(batch["text"])
    wrong = model.encode_text(batch["wrong_text"].flatten(0, 1)).unflatten(0, (4, 2))
    cosines = torch.einsum("be,bme->bm", views, wrong)
    expected = contrastive_loss(views, texts, model.logit_scale.exp(), cosines, batch["is_wrong"])
    torch.testing.assert_close(metrics["paraphrase_loss"], expected.detach())
    torch.testing.assert_close(loss, without + expected)


def test_a_picture_with_one_caption_is_its_own_paraphrase(tmp_path: Path, data: ShardData, sample: Sample) -> None:
    made = clip_stage(tmp_path, data, 0)
    recipe = dataclasses.replace(made.recipe, paraphrases=True)
    stage = CLIPStage(recipe, made.model, made._tokenizer, tmp_path / "clip", {})
    one = dataclasses.replace(sample, captions=sample.captions[:1])
    tensors = stage.transform(one, np.random.default_rng(0))
    assert torch.equal(tensors["text"], tensors["other_text"])


@pytest.mark.slow
def test_clip_learns_the_order_of_two_things_from_hard_negatives(tmp_path: Path, data: ShardData) -> None:
    train = tiny.train_config(steps=150, global_batch=12, log_every=50)
    train = dataclasses.replace(train, learning_rate=WarmupCosine(peak=5e-3, warmup=5, steps=150))
    stage = clip_stage(tmp_path, data, 3)
    fit(stage, train, join(), data, data, spec(tmp_path), lambda line: None)
    right = metric(tmp_path, "hard_negatives_right")
    assert right[-1] > right[0] + 0.05
    assert right[-1] > 0.6


def test_clip_refuses_gradient_accumulation() -> None:
    check_negatives(1)
    with pytest.raises(ValueError, match="negatives are the whole batch"):
        check_negatives(2)
