"""A recipe and shards so small that a stage trains in a second: shared by the tests of the training programs."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle.data.reader import ShardData
from dalle.model import DALLEConfig
from dalle.sampling import SamplingDefaults
from dvae import DVAEConfig
from rerank import CLIPConfig
from training.config import OptimizerConfig, TrainConfig
from training.data.shards import write_shards
from training.drawings.shapes import world
from training.recipes import Recipe
from training.schedules import Cosine, WarmupCosine
from training.stage_recipes import CLIPRecipe, DVAERecipe, TransformerRecipe

IMAGE_SIZE, N_SAMPLES = 16, 24


def train_config(**changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "steps": 4,
        "global_batch": 4,
        "learning_rate": WarmupCosine(peak=2e-3, warmup=2, steps=100),
        "ema_decay": 0.5,
        "ema_every": 1,
        "log_every": 1,
        "checkpoint_every": 1000,
        "workers": 0,
    }
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def recipe(**changes: object) -> Recipe:
    """A recipe whose three stages, and the dVAE's warm-up, are trained as `train_config(**changes)` says."""
    train = train_config(**changes)
    dvae = DVAERecipe(
        model=DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=IMAGE_SIZE),
        train=train,
        kl_weight=Cosine(start=0.0, end=1.0, steps=50),
        temperature=Cosine(start=1.0, end=0.5, steps=50),
        warmup=train,
        flip=False,
    )
    transformer = TransformerRecipe(
        model=DALLEConfig(
            n_layers=2, d_model=16, n_heads=2, text_len=24, grid=4, text_vocab=300, image_vocab=32, conv_kernel=3
        ),
        train=train,
        sampling=SamplingDefaults(temperature=0.9, top_p=0.95),
    )
    clip = CLIPRecipe(
        model=CLIPConfig(
            image_size=IMAGE_SIZE,
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            context_length=24,
            vocab_size=300,
            text_width=16,
            text_layers=1,
            text_heads=2,
            embed_dim=8,
        ),
        train=TrainConfig(
            **{**vars(train), "optimizer": OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, gradient_clipping=0.0)}
        ),
    )
    return Recipe(name="tiny", purpose="tests", text_vocab=300, dvae=dvae, transformer=transformer, clip=clip)


def write_world(folder: Path, n: int = N_SAMPLES, *, seed: int = 0, size: int = 32, per_shard: int = 8) -> Path:
    """Draw the built-in world into shards."""

    def samples() -> Iterator[tuple[str, bytes, str, Sequence[str], dict[str, object]]]:
        for drawing in world(n, seed, size=size):
            buffer = io.BytesIO()
            drawing.image.save(buffer, "png")
            yield drawing.key, buffer.getvalue(), "png", drawing.captions, {}

    write_shards(samples(), folder, "world", per_shard)
    return folder


def all_keys(data: ShardData) -> list[str]:
    return [data.key(i) for i in range(len(data))]


def open_world(folder: Path, *, captions: bool = True) -> ShardData:
    return ShardData.open([folder], captions=captions)


def write_tar(path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples_of(numbers: range, bad: Sequence[int] = ()) -> list[tuple[str, bytes]]:
    members = []
    for number in numbers:
        picture = b"BROKEN" if number in bad else bytes([number])
        members += [(f"k{number:03}.jpg", picture), (f"k{number:03}.txt", f"caption {number}\n\nanother".encode())]
    return members
