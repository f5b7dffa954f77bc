"""DALL·E mini trained by the transformer's stage."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support import tiny

from dalle.data.reader import ShardData
from dalle.evaluation.bundle import evaluate
from dalle.family.losses import training_loss
from dalle.family.mini.config import MiniConfig
from dalle.family.mini.model import DALLEMini
from dalle.family.transformers import load_transformer
from dalle.pipeline import Pipeline
from dvae import DVAE
from rerank import CLIP, CLIPTokenizer
from storage.models.directory import directory_hash
from training.plan.flops import flops_per_sample
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.ranks.ranks import join
from training.recipes import Recipe, recipe
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer

SIZES = MiniConfig(encoder_layers=1, decoder_layers=2, d_model=16, n_heads=2, d_glu=24, text_len=24, grid=4)


def chosen(**changes: object) -> Recipe:
    base = tiny.recipe(**changes)
    model = SIZES.fitted(text_vocab=300, image_vocab=32, grid=4)
    transformer = dataclasses.replace(base.transformer, model=model, init_from_codebook=True, init_scale=2.0)
    return dataclasses.replace(base, transformer=transformer)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A bundle without a transformer."""
    out = tmp_path_factory.mktemp("mini") / "bundle"
    train_tokenizer(chosen(), Inputs(data=[shards], out=out), lambda line: None)
    torch.manual_seed(0)
    DVAE(chosen().dvae.model).save(out / "dvae")
    tokenizer = CLIPTokenizer.train(["a small red circle"], 300)
    CLIP(dataclasses.replace(chosen().clip.model, vocab_size=tokenizer.vocab_size), tokenizer).save(out / "clip")
    return out


def train(begun: Path, out: Path, shards: Path, **changes: object) -> str:
    inputs = Inputs(data=[shards], validation=[shards], out=out)
    parts = {"tokenizer": begun / "tokenizer.json", "dvae": begun / "dvae"}
    return directory_hash(train_transformer(chosen(**changes), inputs, join(), lambda line: None, **parts))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(begun: Path, tmp_path: Path, shards: Path) -> None:
    settings: dict[str, object] = {"validate_every": 2, "sample_every": 2, "checkpoint_every": 2}
    whole = train(begun, tmp_path / "whole", shards, **settings)
    train(begun, tmp_path / "parts", shards, **settings, steps=2)
    assert train(begun, tmp_path / "parts", shards, **settings) == whole
    lines = [json.loads(line) for line in (tmp_path / "whole/training/transformer/metrics.jsonl").open()]
    assert all(line["loss"] == line["image_loss"] and "text_loss" not in line for line in lines)
    assert {line["split"] for line in lines} == {"train", "validation"}
    assert list((tmp_path / "whole/training/transformer/samples").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1},
        pytest.param({"zero_stage": 3}, marks=pytest.mark.slow),
        {"precision": "autocast"},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_every_mode_learns_the_same(begun: Path, tmp_path: Path, shards: Path, changes: dict[str, object]) -> None:
    """After two steps the averaged weights are those of a plain run."""
    for name, settings in (("plain", {}), ("mode", changes)):
        train(begun, tmp_path / name, shards, steps=2, **settings)
    plain, mode = (load_transformer(tmp_path / name / "dalle").state_dict() for name in ("plain", "mode"))
    drawn_in_parts = changes.get("zero_stage") == 3  # other random numbers
    for name, weight in plain.items():
        assert weight.shape == mode[name].shape
        if not drawn_in_parts:
            torch.testing.assert_close(mode[name], weight, atol=4e-3 if "precision" in changes else 1e-5, rtol=0)


def test_a_trained_bundle_draws_and_is_measured(begun: Path, tmp_path: Path, shards: Path) -> None:
    train(begun, tmp_path, shards)
    (tmp_path / "clip").symlink_to(begun / "clip")
    pipe = Pipeline.load(tmp_path)
    assert isinstance(pipe.dalle, DALLEMini)
    assert pipe.generate("a small red circle", n=3, keep=1).images.shape == (1, 3, 16, 16)
    measured = evaluate(pipe, ShardData.open([shards], captions=True))
    assert measured.text_loss is None
    assert measured.image_loss > 0
    assert "none: captions are only read" in measured.table()


def test_its_loss_is_the_mean_over_all_image_tokens() -> None:
    torch.manual_seed(0)
    model = DALLEMini(SIZES.fitted(text_vocab=300, image_vocab=32, grid=4))
    text, tokens = model.config.text_rows([[3, 4], [5]]), torch.randint(32, (2, 16))
    loss = training_loss(model, text, tokens)
    logits = model(text, tokens)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(loss.total, each.mean())
    torch.testing.assert_close(loss.image_by_row, each.view(2, 4, 4).mean((0, 2)))
    assert loss.text is None
    loss.total.backward()
    assert model.image_head.weight.grad is not None
    assert model.image_head.weight.grad[32:].abs().sum() == 0


def test_codes_that_look_alike_begin_alike() -> None:
    model = DALLEMini(SIZES.fitted(text_vocab=300, image_vocab=32, grid=4))
    codebook = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    codebook[1] = codebook[0] + 0.01
    model.initialise_from_codebook(codebook)
    for rows in (model.image_embedding.weight, model.image_head.weight):
        assert torch.cosine_similarity(rows[0], rows[1], dim=0) > 0.6
    with pytest.raises(ValueError, match="the codebook has 31 rows"):
        model.initialise_from_codebook(codebook[:31])


def test_its_recipe_costs_a_step_about_as_much_as_the_demonstration() -> None:
    mini, demo = (make_plan(recipe(name), PlanOptions()) for name in ("mini-cpu", "demo"))
    assert 0.7 < mini.sparse_flops_per_sample / demo.sparse_flops_per_sample < 1.3
    assert mini.parameters["total"] == sum(n for name, n in mini.parameters.items() if name != "total")


def test_its_arithmetic_is_that_of_its_matrices() -> None:
    config = SIZES.fitted(text_vocab=300, image_vocab=32, grid=4)
    counts = []
    for layers in (1, 2):
        taller = dataclasses.replace(config, decoder_layers=layers)
        counts.append(flops_per_sample(taller, 0))
    d, g, n, t = 16, 24, 16, 24
    products = 6 * ((6 * d * d + 3 * d * g) * n + 2 * d * d * t)
    assert counts[1] - counts[0] == products + 12 * d * (n * n + n * t)
