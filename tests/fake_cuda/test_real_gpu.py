"""What is claimed of GPUs, on a real one: what waits for nothing does not wait, and the programs train and generate."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dalle.cache import Decoder
from dalle.loss import training_loss
from dalle.model import DALLE, DALLEConfig
from dalle.pipeline import Pipeline
from training.engine.objective import MicroBatch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SIZES = DALLEConfig(n_layers=4, d_model=128, n_heads=2, text_len=19, grid=8, text_vocab=64, image_vocab=128)


@contextmanager
def no_waits() -> Iterator[None]:
    """Let torch raise an error where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def streams(batch: int) -> dict[str, torch.Tensor]:
    text = torch.randint(SIZES.text_vocab, (batch, SIZES.text_len))
    return {"text": text, "image_tokens": torch.randint(SIZES.image_vocab, (batch, 64))}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_at_zero_0_waits_for_nothing(compiled: bool) -> None:
    model = DALLE(SIZES).cuda()
    if compiled:
        model.compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        batch = MicroBatch(tensors=streams(4), noise_seed=0, measure=False).to(torch.device("cuda"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = training_loss(model, **batch.tensors).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, and makes the masks
    with no_waits():
        step()


def test_a_recorded_step_waits_for_nothing() -> None:
    model = DALLE(SIZES).cuda().eval()
    decoder = Decoder(model, streams(1)["text"].cuda(), counts=[8])
    inputs = torch.zeros(8, dtype=torch.int64, device="cuda")
    for _ in range(8):  # a graph for each column
        decoder.step(inputs)
    with no_waits():
        decoder.step(inputs)


MODES = [[], ["--zero-stage", "1", "--precision", "bf16"], ["--zero-stage", "3", "--precision", "bf16"]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode) or "as the recipe says")
def test_all_stages_train_and_the_bundle_generates(tmp_path: Path, mode: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")])}
    environment.pop("DS_ACCELERATOR", None)

    def program(*words: object) -> None:
        command = [sys.executable, ROOT / "tests" / "training" / "support" / "tiny_cli.py", *words]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    made = f"from support import tiny; from pathlib import Path; tiny.write_world(Path({str(tmp_path / 'world')!r}))"
    subprocess.run([sys.executable, "-c", made], env=environment, check=True)
    program("all", "tiny", "--data", tmp_path / "world", "--out", tmp_path / "bundle", *mode)
    result = Pipeline.load(tmp_path / "bundle", "cuda").generate("a small red circle", n=4, keep=2)
    assert result.images.isfinite().all()
