"""Muon at every ZeRO stage: held to torch's own on the whole gradient, and what goes on, and what is refused."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_engine import Objective
from test_modes import allow_fp16
from test_ranks import on_ranks
from torch import Tensor, nn
from torch.optim import _muon

from dalle.model import DALLE, DALLEConfig
from dvae import DVAE
from rerank import CLIP
from training.config import OptimizerConfig, TrainConfig
from training.engine import Engine, build_optimizer, decay_groups
from training.muon import MuonAdamW, block_matrices
from training.transformer import TransformerObjective
from training.world import World, join_world

RATE = 1e-3
STEPS = 4
TOLERANCE = 0.06
"""Of what a matrix moves by. Newton-Schulz rounds to bfloat16, whose steps are 0.4% to 0.8%, so that gradients summed in
another order give updates 2% to 4% off; with another momentum, weight decay or clipping they are 12% off or more."""
MATRICES = 12
MODES = [
    ("fp32", 0, "none"),
    ("fp32", 1, "none"),
    ("fp32", 2, "none"),
    ("fp32", 3, "none"),
    ("fp32", 1, "optimizer"),
    ("fp32", 2, "optimizer"),
    ("fp32", 3, "parameters"),
    ("autocast", 0, "none"),
    ("bf16", 1, "none"),
    ("bf16", 2, "none"),
    ("bf16", 3, "none"),
    ("bf16", 2, "optimizer"),
    ("fp16", 2, "none"),
]


@pytest.fixture
def world() -> World:
    return join_world()


def objective() -> TransformerObjective:
    """A transformer whose heads are not 0, and whose matrices end between the parts of two ranks, or three."""
    torch.manual_seed(0)
    config = DALLEConfig(
        n_layers=3, d_model=10, n_heads=2, text_len=6, grid=3, text_vocab=20, image_vocab=11, conv_kernel=3
    )
    model = DALLE(config)
    for head in (model.text_head, model.image_head):
        nn.init.normal_(head.weight, std=0.3)
    return TransformerObjective(model)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(20, (12, 6), generator=generator)
    image_tokens = torch.randint(11, (12, 9), generator=generator)
    return {"text": text, "image_tokens": image_tokens, "n_cut": torch.zeros(12)}


def micro_batches(world: World, step: int, accumulation: int) -> Iterator[dict[str, Tensor]]:
    size = 12 // world.size // accumulation
    for number in range(accumulation):
        start = (world.rank * accumulation + number) * size
        yield {name: tensor[start : start + size] for name, tensor in batch(step).items()}


def settings(**changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(
        kind="muon", weight_decay=0.5, gradient_clipping=0.5, variance_clip=changes.pop("variance_clip", None)
    )
    return tiny.train_config(**{"global_batch": 12, "optimizer": optimizer, **changes})


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: weight.detach().float().clone() for name, weight in engine._gather().items()}


def trained(world: World, config: TrainConfig, first: int = 0, last: int = STEPS, folder: Path | None = None) -> Engine:
    allow_fp16()
    engine = Engine(objective(), config, world)
    if first:
        assert folder is not None
        engine.load(folder)
    engine.train()
    for step in range(first, last):
        engine.step(micro_batches(world, step, engine.accumulation), RATE, step)
    if folder is not None:
        engine.save(folder, last, {})
    return engine


def reference(steps: int = STEPS) -> dict[str, Tensor]:
    """Train by torch's own Muon and AdamW, on the gradient of the whole batch."""
    plain = objective()
    rates = settings().optimizer
    muon = torch.optim.Muon(
        block_matrices(plain.model),
        lr=RATE,
        weight_decay=rates.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(decay_groups(plain.model, rates), lr=RATE, betas=rates.betas)
    for step in range(steps):
        loss, _ = plain(**batch(step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), rates.gradient_clipping)
        assert norm > rates.gradient_clipping
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    return {name: weight.detach() for name, weight in plain.model.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return by how much weights differ, as a fraction of what they have moved by; the largest of all parameters."""
    assert found.keys() == expected.keys()
    start = dict(objective().model.named_parameters())
    return max(((found[name] - w).norm() / (w - start[name]).norm()).item() for name, w in expected.items())


# -------------------------------------------------------------------------------------- torch's own, at every stage


def weights_and_calls(world: World, config: TrainConfig) -> tuple[dict[str, Any], int]:
    """Train; returns the weights, as lists, and how many matrices this rank orthogonalised."""
    calls = 0
    original = _muon._zeropower_via_newtonschulz

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_muon, "_zeropower_via_newtonschulz", counted)
        weights = weights_of(trained(world, config))
    return {name: weight.tolist() for name, weight in weights.items()}, calls


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_trains_as_torchs_muon_does(world: World, stage: int) -> None:
    weights, calls = weights_and_calls(world, settings(zero_stage=stage, micro_batch=4))
    assert calls == MATRICES * STEPS
    assert difference({name: torch.tensor(weight) for name, weight in weights.items()}, reference()) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 1, 2])  # at stage 3 the linear layers round otherwise
def test_where_gradients_are_the_same_so_is_the_first_step(world: World, stage: int) -> None:
    weights = weights_of(trained(world, settings(zero_stage=stage), last=1))
    for name, weight in reference(steps=1).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_ranks_train_as_torchs_muon_does(tmp_path: Path, stage: int, n_ranks: int) -> None:
    answers = on_ranks(
        tmp_path, weights_and_calls, settings(zero_stage=stage, micro_batch=2), n_ranks=n_ranks
    )
    assert not [answer for answer in answers if isinstance(answer, str)], answers
    for _, calls in answers:
        assert calls == MATRICES * STEPS / n_ranks  # each matrix once, by one of the ranks
    weights = {name: torch.tensor(weight) for name, weight in answers[0][0].items()}
    assert difference(weights, reference()) < TOLERANCE
