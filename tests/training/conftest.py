import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import s3
from support import tiny

from dvae import DVAE
from rerank import CLIP, CLIPTokenizer
from training.recipes import recipe
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, also by the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards of the built-in world, 24 captioned pictures; not to be changed."""
    return tiny.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """The URL of a bucket on loopback, which the tests of a module share."""
    with s3.s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and a bundle of the demo's sizes without a transformer."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.write_world(folder / "world", size=64)
    chosen, out = recipe("demo"), folder / "bundle"
    train_tokenizer(chosen, Inputs(data=[folder / "world"], out=out), lambda line: None)
    torch.manual_seed(0)
    DVAE(chosen.dvae.model).save(out / "dvae")
    tokenizer = CLIPTokenizer.train(["a small red circle"], 300)
    config = dataclasses.replace(chosen.clip.model, vocab_size=tokenizer.vocab_size)
    CLIP(config, tokenizer).save(out / "clip")
    return folder
