"""A VQGAN in a dVAE's place: encoding, training on its tokens, and the bundle that comes of it."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from support import tiny

import training.cli.main
from dalle.cli.main import main
from dalle.data.reader import ShardData
from dalle.model import DALLE
from dalle.pipeline import Pipeline
from dvae.vqgan import VQGAN, VQGANConfig
from storage.models.directory import directory_hash
from training.ranks.ranks import join
from training.run_files import read_metrics
from training.stages.encode import views
from training.stages.inputs import Inputs
from training.stages.transformer import train_transformer

CONFIG = VQGANConfig(
    width=32,
    multiples=(1, 1, 2),
    n_blocks=1,
    attention=(2,),
    z_channels=16,
    code_width=8,
    vocab_size=40,
    image_size=tiny.IMAGE_SIZE,
)


def save_vqgan(path: Path, config: VQGANConfig = CONFIG) -> Path:
    torch.manual_seed(0)
    VQGAN(config).save(path)
    return path


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vqgan(tmp_path_factory.mktemp("vqgan") / "model")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, shards: Path, vqgan: Path) -> Path:
    """The tokens of `shards`, by the command; not to be changed."""
    out = tmp_path_factory.mktemp("encoded") / "tokens"
    command = ["encode", "--data", shards, "--dvae", vqgan, "--out", out, "--crops", 2, "--workers", 0]
    assert training.cli.main.main([str(argument) for argument in command]) == 0
    return out


def test_encode_writes_the_tokens_that_a_vqgan_gives(encoded: Path, shards: Path, vqgan: Path) -> None:
    tokens = ShardData.open([encoded], captions=True, encoded=True)
    assert tokens.encoding is not None
    assert tokens.encoding.dvae_hash == directory_hash(vqgan)
    assert (tokens.encoding.grid, tokens.encoding.vocab_size) == (4, 40)
    coder, pictures = VQGAN.load(vqgan), tiny.open_world(shards)
    for i in range(0, len(pictures), 7):
        expected = coder.encode(views(pictures.read(i), tokens.encoding))
        assert torch.equal(torch.from_numpy(tokens.read(i).image_tokens.astype("int64")), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bundle: Path, shards: Path, vqgan: Path) -> Path:
    """A bundle whose transformer has trained a few steps on pictures that the VQGAN encodes."""
    out = tmp_path_factory.mktemp("trained") / "bundle"
    out.mkdir()
    for part in ("tokenizer.json", "clip"):
        copy = shutil.copytree if (bundle / part).is_dir() else shutil.copy
        copy(bundle / part, out / part)
    inputs = Inputs(data=[shards], validation=[shards], out=out)
    transformer = dataclasses.replace(tiny.recipe().transformer, bpe_dropout=0.0, init_from_codebook=True)
    recipe = dataclasses.replace(tiny.recipe(), transformer=transformer)
    train_transformer(recipe, inputs, join(), lambda line: None, dvae=vqgan)
    return out


def test_a_transformer_trains_on_a_vqgans_tokens(trained: Path, vqgan: Path) -> None:
    model = DALLE.load(trained / "dalle")
    assert (model.config.image_vocab, model.config.grid) == (40, 4)
    assert model.metadata["dvae_hash"] == directory_hash(vqgan) == directory_hash(trained / "dvae")
    lines = read_metrics(trained / "training" / "transformer")
    assert [line["split"] for line in lines] == ["train"] * 4 + ["validation"]
    assert (trained / "training" / "transformer" / "samples" / "step00000004.png").is_file()


def test_training_on_encoded_tokens_needs_the_same_vqgan(
    tmp_path: Path, bundle: Path, encoded: Path, vqgan: Path
) -> None:
    def train(out: Path, dvae: Path) -> DALLE:
        inputs = Inputs(data=[encoded], validation=[encoded], out=out)
        tokenizer = bundle / "tokenizer.json"
        return DALLE.load(
            train_transformer(tiny.recipe(), inputs, join(), lambda line: None, tokenizer=tokenizer, dvae=dvae)
        )

    assert train(tmp_path / "out", vqgan).metadata["dvae_hash"] == directory_hash(vqgan)
    other = save_vqgan(tmp_path / "other", dataclasses.replace(CONFIG, pixels="unit"))
    with pytest.raises(ValueError, match="holds image tokens of another dVAE"):
        train(tmp_path / "third", other)


def test_a_bundle_with_a_vqgan_generates_ranks_and_completes(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["generate", "a red cube", "--bundle", str(trained), "-n", "6", "--keep", "2", "--out", str(out)]
    assert main(argv) == 0
    picture = next(out.glob("*/*.png"))
    argv = [
        "generate",
        "a red cube",
        "--bundle",
        str(trained),
        "-n",
        "2",
        "--keep",
        "2",
        "--out",
        str(tmp_path / "top"),
    ]
    assert main([*argv, "--image", str(picture), "--keep-rows", "2"]) == 0
    pipe = Pipeline.load(trained)
    result = pipe.generate("a red cube", n=4, keep=4)
    decoded = VQGAN.load(trained / "dvae").decode(result.tokens.view(4, 4, 4))
    torch.testing.assert_close(result.images, decoded)


def test_a_bundle_whose_vqgan_only_decodes_generates_but_completes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "bundle")
    whole = VQGAN.load(copy / "dvae")
    half = VQGAN(dataclasses.replace(CONFIG, has_encoder=False))
    half.load_state_dict({name: whole.state_dict()[name] for name in half.state_dict()})
    shutil.rmtree(copy / "dvae")
    half.save(copy / "dvae")
    model = DALLE.load(copy / "dalle")
    model.save(copy / "dalle", {**model.metadata, "dvae_hash": directory_hash(copy / "dvae")})
    argv = ["generate", "a red cube", "--bundle", str(copy), "-n", "2", "--keep", "1", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    capsys.readouterr()
    picture = next((tmp_path / "out").glob("*/*.png"))
    assert main([*argv[:-1], str(tmp_path / "top"), "--image", str(picture), "--keep-rows", "2"]) == 1
    assert "has no encoder, it only decodes" in capsys.readouterr().err
