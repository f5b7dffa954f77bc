"""DALL·E 2's stages, trained a few steps on the built-in world with a CLIP that stays as it is."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.ranks import on_ranks

import training.cli.main
from dalle.unclip.pipeline import UnCLIP
from dvae import DVAE
from rerank import CLIP, CLIPTokenizer
from storage.models.directory import directory_hash
from training.cli.train import COMMANDS, read
from training.plan.flops import upsampler_flops
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.plan.state import shapes_only
from training.plan.text import text as plan_text
from training.ranks.ranks import Ranks, join, on_first_rank
from training.recipes import RECIPES, Recipe, recipe
from training.run_files import read_metrics
from training.schedules import WarmupCosine
from training.stages.inputs import RUNS, Inputs
from training.stages.unclip.decoder import train_decoder, whitened_codebook
from training.stages.unclip.prior import train_prior
from training.stages.unclip.upsampler import train_upsampler
from training.unclip_recipes import DecoderRecipe, PriorRecipe, UpsamplerRecipe
from unclip import AutoregressivePrior, Decoder, Prior, Upsampler
from unclip.autoregressive.prior import AutoregressiveConfig
from unclip.decoder import DecoderConfig
from unclip.prior import PriorConfig, embedding_scale
from unclip.unet import UNet
from unclip.upsampler import UpsamplerConfig


def chosen(**changes: object) -> Recipe:
    train = tiny.train_config(**changes)
    decoder = DecoderConfig(
        image_size=8, width=32, multiples=(1, 2), n_blocks=1, attention=(1,), head_width=16, context_width=16
    )
    upsampler = UpsamplerConfig(image_size=16, input_size=8, crop=8, width=32, multiples=(1, 2), n_blocks=1)
    return dataclasses.replace(
        tiny.recipe(),
        decoder=DecoderRecipe(model=decoder, train=train, sample_steps=2),
        prior=PriorRecipe(model=PriorConfig(width=32, n_layers=1, n_heads=2), train=train),
        upsampler=UpsamplerRecipe(model=upsampler, train=train, sample_steps=2),
    )


def autoregressive(**changes: object) -> Recipe:
    model = AutoregressiveConfig(width=32, n_layers=1, n_heads=2, dimensions=4, buckets=8)
    prior = PriorRecipe(prior_kind="autoregressive", autoregressive=model, train=tiny.train_config(**changes))
    return dataclasses.replace(tiny.recipe(), prior=prior)


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a CLIP alone; not to be changed."""
    out = tmp_path_factory.mktemp("clip") / "bundle"
    tokenizer = CLIPTokenizer.train(["a small red circle left of a blue square"], 300)
    torch.manual_seed(0)
    config = dataclasses.replace(tiny.recipe().clip.model, vocab_size=tokenizer.vocab_size)
    CLIP(config, tokenizer).save(out / "clip")
    return out


def inputs(with_clip: Path, shards: Path, out: Path) -> Inputs:
    shutil.copytree(with_clip, out, dirs_exist_ok=True)
    return Inputs(data=[shards], validation=[shards], out=out)


def quiet(line: str) -> None:
    return None


def losses(out: Path, run: str = "decoder") -> dict[int, float]:
    lines = read_metrics(out / RUNS / run)
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train" and "loss" in line}


def test_a_decoder_trains_resumes_exactly_and_shows_what_it_draws(
    with_clip: Path, shards: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_decoder(chosen(), inputs(with_clip, shards, whole), join(), quiet)
    train_decoder(chosen(steps=2), inputs(with_clip, shards, parts), join(), quiet)
    train_decoder(chosen(), inputs(with_clip, shards, parts), join(), quiet)
    assert losses(whole) == losses(parts)
    assert len(losses(whole)) == 4
    trained, resumed = Decoder.load(whole / "decoder"), Decoder.load(parts / "decoder")
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    config = trained.config
    assert (config.embed_dim, config.text_width, config.text_len) == (8, 16, 24)
    assert config.scale == pytest.approx(embedding_scale(8))
    assert (whole / "decoder" / "config.json").read_text().count(directory_hash(with_clip / "clip")) == 1
    measured = list(read_metrics(whole / RUNS / "decoder"))
    assert any({"mse", "vb", "mse_by_quarter"} <= line.keys() for line in measured)
    assert list((whole / RUNS / "decoder").rglob("*.png"))


def of_codes(**changes: object) -> Recipe:
    """A recipe whose decoder draws codes, inpaints and is trained by Muon; the dVAE's sizes are not in it yet."""
    model = DecoderConfig(
        image_size=2,
        codes=3,
        in_channels=5,
        out_channels=2,
        width=32,
        multiples=(1,),
        n_blocks=1,
        attention=(0,),
        head_width=16,
        context_width=16,
        prediction="v",
    )
    train = tiny.train_config(**changes)
    train = dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, kind="muon"))
    return dataclasses.replace(chosen(), decoder=DecoderRecipe(model=model, train=train, sample_steps=2, noise_shift=3))


def with_dvae(given: Inputs, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    DVAE(tiny.recipe().dvae.model).save(given.out / "dvae")
    return given


def test_a_decoder_of_codes_trains_on_the_bundles_dvae_and_resumes_exactly(
    with_clip: Path, shards: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_decoder(of_codes(), with_dvae(inputs(with_clip, shards, whole)), join(), quiet)
    train_decoder(of_codes(steps=2), with_dvae(inputs(with_clip, shards, parts)), join(), quiet)
    train_decoder(of_codes(), inputs(with_clip, shards, parts), join(), quiet)
    assert losses(whole) == losses(parts)
    trained, resumed = Decoder.load(whole / "decoder"), Decoder.load(parts / "decoder")
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    dvae = DVAE.load(whole / "dvae")
    config = trained.config
    assert (config.codes, config.image_size) == (dvae.config.vocab_size, dvae.config.grid)
    assert config.picture_size == dvae.config.image_size
    assert config.inpaints
    assert trained.metadata["dvae_hash"] == directory_hash(whole / "dvae")
    assert trained.vectors.std() > 0
    assert list((whole / RUNS / "decoder").rglob("*.png"))
    unclip = UnCLIP.load(whole)
    assert unclip.decoder.codec.config == dvae.config
    with_dvae(Inputs(data=[shards], out=whole), seed=1)
    with pytest.raises(ValueError, match="the decoder was trained with the dVAE"):
        UnCLIP.load(whole)
    shutil.rmtree(whole / "dvae")
    with pytest.raises(FileNotFoundError, match="has no dvae, whose codes its decoder draws"):
        UnCLIP.load(whole)


def test_a_decoder_of_codes_needs_a_dvae_and_pictures(with_clip: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dvae in"):
        train_decoder(of_codes(), inputs(with_clip, shards, tmp_path), join(), quiet)


PROGRAMS: dict[str, tuple[Callable[..., Path], Callable[..., Recipe], str]] = {
    "decoder": (train_decoder, chosen, "decoder"),
    "decoder of codes": (train_decoder, of_codes, "decoder"),
    "prior": (train_prior, chosen, "prior"),
    "autoregressive prior": (train_prior, autoregressive, "prior"),
    "upsampler": (train_upsampler, chosen, "upsampler-16"),
}


def trained_losses(ranks: Ranks, name: str, bundle: Path, out: Path, shards: Path, stage: int) -> list[float]:
    train, make, run = PROGRAMS[name]
    on_first_rank(lambda: shutil.copytree(bundle, out), ranks)
    # at a high rate, AdamW's first steps would turn rounding in a gradient near 0 into a visible difference
    rate = WarmupCosine(peak=1e-5, warmup=2, steps=100)
    recipe = make(micro_batch=2, zero_stage=stage, precision="fp32", learning_rate=rate)
    train(recipe, Inputs(data=[shards], validation=[shards], out=out), ranks, quiet)
    lines = [line for line in read_metrics(out / RUNS / run) if line["split"] == "train" and "loss" in line]
    return [line[name] for line in lines for name in ("loss", "grad_norm")]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_two_ranks_train_what_one_trains_at_every_stage_of_zero(
    name: str, with_clip: Path, shards: Path, tmp_path: Path
) -> None:
    bundle = with_dvae(inputs(with_clip, shards, tmp_path / "bundle")).out
    expected = trained_losses(join(), name, bundle, tmp_path / "one", shards, 0)
    assert len(expected) == 8
    for stage in (0, 1, 2, 3):
        out = tmp_path / f"two-{stage}"
        found = on_ranks(tmp_path / f"store-{stage}", trained_losses, name, bundle, out, shards, stage)
        assert found[0] == pytest.approx(expected, rel=1e-4), stage


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior", "autoregressive prior", "upsampler"])
def test_the_other_stages_resume_exactly_too(name: str, with_clip: Path, shards: Path, tmp_path: Path) -> None:
    train, make, run = PROGRAMS[name]
    for out, lasts in (("whole", (4,)), ("parts", (2, 4))):
        given = inputs(with_clip, shards, tmp_path / out)
        for steps in lasts:
            train(make(steps=steps), given, join(), quiet)
    assert losses(tmp_path / "whole", run) == losses(tmp_path / "parts", run)
    kind = {"prior": Prior, "autoregressive prior": AutoregressivePrior, "upsampler": Upsampler}[name]
    whole, parts = (kind.load(tmp_path / out / run).state_dict() for out in ("whole", "parts"))
    for weight, value in whole.items():
        assert torch.equal(value, parts[weight]), weight


def test_a_whitened_codebook_has_independent_coordinates_of_deviation_one() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3
    tokens = torch.randint(64, (8, 6, 6), generator=generator)
    vectors = whitened_codebook(codebook, tokens)
    weights = (torch.bincount(tokens.flatten(), minlength=64) + 1).sqrt()
    weights = (weights / weights.sum())[:, None]
    assert (weights * vectors).sum(dim=0).abs().max() < 1e-5
    assert torch.allclose((vectors * weights).T @ vectors, torch.eye(4), atol=1e-5)
    assert whitened_codebook(codebook, torch.tensor([3])).abs().max() < 10


def test_a_prior_trains_and_measures_its_errors(with_clip: Path, shards: Path, tmp_path: Path) -> None:
    train_prior(chosen(), inputs(with_clip, shards, tmp_path), join(), quiet)
    prior = Prior.load(tmp_path / "prior")
    assert (prior.config.embed_dim, prior.config.text_width, prior.config.text_len) == (8, 16, 24)
    assert prior.errors.shape == (1000,)
    assert (prior.errors > 0).all()
    assert any("cosine" in line for line in read_metrics(tmp_path / RUNS / "prior"))


def test_an_autoregressive_prior_trains_on_tokens_of_its_own_data_and_draws_for_the_bundle(
    with_clip: Path, shards: Path, tmp_path: Path
) -> None:
    given = inputs(with_clip, shards, tmp_path)
    train_prior(autoregressive(), given, join(), quiet)
    prior = AutoregressivePrior.load(tmp_path / "prior")
    assert (prior.config.embed_dim, prior.config.text_width, prior.config.text_len) == (8, 16, 24)
    torch.testing.assert_close(prior.components @ prior.components.T, torch.eye(4))
    assert prior.counts.sum() > 8
    assert (prior.high > prior.low).all()
    assert prior.metadata["clip_hash"] == directory_hash(with_clip / "clip")
    assert any("first_component" in line for line in read_metrics(tmp_path / RUNS / "prior"))
    with pytest.raises(ValueError, match="holds a prior-autoregressive, and a prior is asked for"):
        train_prior(chosen(), given, join(), quiet)
    Decoder(
        dataclasses.replace(chosen().decoder.model, embed_dim=8, text_width=16, text_len=24)  # type: ignore[union-attr]
    ).save(tmp_path / "decoder", {"clip_hash": directory_hash(tmp_path / "clip")})
    drawn = [UnCLIP.load(tmp_path).generate("a red square", n=3, keep=3, steps=2, batch_size=size) for size in (3, 2)]
    assert drawn[0].candidates == drawn[1].candidates
    torch.testing.assert_close(drawn[0].images, drawn[1].images, atol=1e-4, rtol=0)


def test_an_autoregressive_prior_needs_more_samples_than_dimensions(
    with_clip: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.stages.unclip.prior.SAMPLES_FOR_BUCKETS", 4)
    monkeypatch.setattr("training.stages.unclip.prior.AT_ONCE", 2)
    with pytest.raises(ValueError, match="samples of --data 4 can be read; a prior of 4 dimensions needs more"):
        train_prior(autoregressive(), inputs(with_clip, shards, tmp_path), join(), quiet)


def test_the_kind_of_prior_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["unclip-cpu", "--data", "x", "--out", "y"]
    changed = [read("prior", [*words, *more]).changed() for more in ([], ["--prior-kind", "autoregressive"])]  # type: ignore[union-attr]
    assert [each.prior.prior_kind for each in changed if each.prior] == ["diffusion", "autoregressive"]
    with pytest.raises(ValueError, match="prior_kind is 'both'"):
        dataclasses.replace(changed[0].prior, prior_kind="both")  # type: ignore[type-var]


def test_an_upsampler_trains_and_shows_itself_beside_bilinear_enlargement(shards: Path, tmp_path: Path) -> None:
    given = Inputs(data=[shards], validation=[shards], out=tmp_path)
    assert train_upsampler(chosen(), given, join(), quiet) == tmp_path / "upsampler-16"
    assert Upsampler.load(tmp_path / "upsampler-16").config.factor == 2
    assert list((tmp_path / RUNS / "upsampler-16").rglob("*.png"))


def test_the_papers_recipes_have_the_papers_sizes() -> None:
    paper, second = recipe("unclip-paper"), recipe("unclip-paper-1024")
    assert paper.decoder is not None
    assert paper.prior is not None
    assert paper.upsampler is not None
    assert second.upsampler is not None
    with torch.device("meta"):
        models = [
            Decoder(paper.decoder.model),
            Prior(paper.prior.model),
            UNet(paper.upsampler.model),
            UNet(second.upsampler.model),
            CLIP(paper.clip.model),
        ]
    millions = [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in models]
    assert millions[:4] == [2253, 1226, 730, 282]  # "3.5B" counts a text transformer, "700M", "300M"
    assert 900 < millions[4] < 1100


@pytest.mark.slow
def test_a_plan_tells_what_the_stages_need() -> None:
    plan = make_plan(recipe("unclip-paper"), PlanOptions(gpus=64))
    assert {name: round(stage.parameters["total"] / 1e6) for name, stage in plan.unclip.items()} == {
        "prior": 1226,
        "decoder": 2253,
        "upsampler": 730,
    }
    # a forward pass of the paper's decoder is 1.6 TFLOP, a training step three times that
    assert plan.unclip["decoder"].flops_per_sample == pytest.approx(3 * 1.6e12, rel=0.05)
    told = plan_text(plan)
    assert "DALL·E 2's decoder: 2,252,866,054 parameters" in told
    assert not make_plan(recipe("12b"), PlanOptions(gpus=64)).unclip
    assert set(make_plan(recipe("demo"), PlanOptions()).unclip) == {"prior", "decoder"}  # of codes
    second = recipe("unclip-paper-1024").upsampler
    assert second is not None
    with shapes_only():
        whole = Upsampler(dataclasses.replace(second.model, crop=1024))
    assert upsampler_flops(whole) == pytest.approx(19.8e12, rel=0.01)


@pytest.mark.parametrize("verb", ["decoder", "prior", "upsampler"])
def test_a_recipe_without_the_stage_is_named_with_those_that_have_it(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.cli.main.main([verb, "icons-cpu", "--data", "x", "--out", "y"]) == 1
    error = capsys.readouterr().err
    with_it = "unclip-cpu" if verb == "upsampler" else "demo, unclip-cpu"
    assert f"the recipe icons-cpu has no {verb}: use one of {with_it}" in error
    assert "Traceback" not in error
    command = read(verb, ["unclip-cpu", "--data", "x", "--out", "y", "--steps", "7"])
    assert isinstance(command, COMMANDS[verb])
    stage = getattr(command.changed(), verb)  # type: ignore[union-attr]
    assert stage.train.steps == 7


def test_a_bundle_without_a_clip_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no clip in"):
        train_decoder(chosen(), Inputs(data=[shards], out=tmp_path), join(), quiet)


def test_recipes_without_the_stages_have_none_of_them() -> None:
    having = {name for name in RECIPES if recipe(name).decoder is not None}
    assert having == {"demo", "unclip-cpu", "unclip-paper", "unclip-paper-1024"}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero_stage"), [("autocast", 0), ("bf16", 2), ("bf16", 3)])
def test_the_stages_train_in_lower_precision_and_where_ranks_share_their_state(
    with_clip: Path, shards: Path, tmp_path: Path, precision: str, zero_stage: int
) -> None:
    shared = chosen(zero_stage=zero_stage, precision=precision, steps=2)
    given = inputs(with_clip, shards, tmp_path)
    decoder = Decoder.load(train_decoder(shared, given, join(), quiet))
    prior = Prior.load(train_prior(shared, given, join(), quiet))
    upsampler = Upsampler.load(train_upsampler(shared, given, join(), quiet))
    # which begin at zero
    assert decoder.unet.conv_out.weight.any()
    assert upsampler.unet.conv_out.weight.any()
    assert (prior.errors > 0).all()
    for model in (decoder, prior, upsampler):
        assert all(weight.isfinite().all() for weight in model.parameters())
    for stage in ("decoder", "prior", "upsampler-16"):
        assert [line["loss"] for line in read_metrics(tmp_path / RUNS / stage) if line["split"] == "train"]
