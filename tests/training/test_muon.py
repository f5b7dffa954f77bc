"""Muon at every ZeRO stage: held to torch's own on the whole gradient, and what goes on, and what is refused."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.engines import averages_of, engine_of
from support.modes import allow_every_precision
from support.ranks import on_ranks
from torch import Tensor, nn
from torch.optim import _muon

import training.engine.engine
import training.engine.muon
from dalle.model import DALLE, DALLEConfig
from dvae import DVAE
from rerank import CLIP
from training.config import OptimizerConfig, Precision, TrainConfig
from training.engine.engine import Engine
from training.engine.muon import MuonAdamW, block_matrices, orthogonal
from training.engine.objective import Objective
from training.engine.optimizer import build_optimizer, decay_groups
from training.ranks.ranks import Ranks, join
from training.stages.transformer import transformer_loss

RATE = 1e-3
STEPS = 4
TOLERANCE = 2e-3
"""Of what a parameter moves by; with another momentum, weight decay or clipping it is 0.12 or more."""
BFLOAT16_TOLERANCE = 0.06
"""The same where Newton-Schulz rounds to bfloat16, whose steps are 0.4% to 0.8%: gradients summed in another order give
updates 2% to 4% off."""
HALF_TOLERANCE = 0.25
"""The same for the matrices alone, where gradients are themselves rounded to 8 or 11 bits: 15% to 21% off."""
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
def ranks() -> Ranks:
    return join()


def faulty_loss(model: DALLE, fault: Tensor | None = None, **tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The transformer's loss, which can be made NaN."""
    loss, metrics = transformer_loss(model, **tensors)
    return (loss if fault is None else loss * fault), metrics


def objective() -> Objective:
    """A transformer whose heads are not 0, and whose matrices end between the parts of two ranks, or three."""
    torch.manual_seed(0)
    config = DALLEConfig(
        n_layers=3, d_model=10, n_heads=2, text_len=6, grid=3, text_vocab=20, image_vocab=11, conv_kernel=3
    )
    model = DALLE(config)
    for head in (model.text_head, model.image_head):
        nn.init.normal_(head.weight, std=0.3)
    return Objective(model, partial(faulty_loss, model))


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(20, (12, 6), generator=generator)
    image_tokens = torch.randint(11, (12, 9), generator=generator)
    return {"text": text, "image_tokens": image_tokens, "n_cut": torch.zeros(12)}


def micro_batches(ranks: Ranks, step: int, accumulation: int) -> list[dict[str, Tensor]]:
    size = 12 // ranks.size // accumulation
    starts = [(ranks.rank * accumulation + number) * size for number in range(accumulation)]
    return [{name: tensor[start : start + size] for name, tensor in batch(step).items()} for start in starts]


def settings(**changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(
        kind="muon", weight_decay=0.5, gradient_clipping=0.5, variance_clip=changes.pop("variance_clip", None)
    )
    return tiny.train_config(**{"global_batch": 12, "optimizer": optimizer, **changes})


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: weight.detach().float().clone() for name, weight in engine._gather().items()}


def trained(ranks: Ranks, config: TrainConfig, first: int = 0, last: int = STEPS, folder: Path | None = None) -> Engine:
    if config.precision == "fp16":
        allow_every_precision()
    engine = engine_of(objective(), config, ranks)
    if first:
        assert folder is not None
        engine.load(folder)
    engine.train()
    for step in range(first, last):
        engine.step(micro_batches(ranks, step, engine.accumulation), RATE, step)
    if folder is not None:
        engine.save(folder, last, {})
    return engine


def reference(
    steps: int = STEPS, precision: Precision = "fp32", *, iterations: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Train by torch's own Muon and AdamW, on the gradient of the whole batch; iterations in float32, or its own."""
    with pytest.MonkeyPatch.context() as patch:
        if iterations == torch.float32:
            patch.setattr(_muon, "_zeropower_via_newtonschulz", lambda gradient, *_: orthogonal(gradient))
        return trained_by_torch(steps, precision)


def trained_by_torch(steps: int, precision: Precision) -> dict[str, Tensor]:
    plain = objective()
    half = objective().bfloat16() if precision == "bf16" else None
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
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss, _ = (half or plain)(**batch(step))
        loss.backward()
        if half is not None:
            for weight, copy in zip(plain.parameters(), half.parameters(), strict=True):
                assert copy.grad is not None
                weight.grad, copy.grad = copy.grad.float(), None
        norm = nn.utils.clip_grad_norm_(plain.parameters(), rates.gradient_clipping)
        assert norm > rates.gradient_clipping
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        if half is not None:
            half.load_state_dict(plain.state_dict())
    return {name: weight.detach() for name, weight in plain.model.named_parameters()}


def difference(
    found: dict[str, Tensor], precision: Precision = "fp32", *, iterations: torch.dtype = torch.float32
) -> float:
    """Return by how much weights are not the reference's, as a fraction of what those have moved by.

    The largest of all parameters; in half precision of Muon's, since AdamW makes much of what should be 0 and is not.
    """
    start, expected = dict(objective().model.named_parameters()), reference(precision=precision, iterations=iterations)
    assert found.keys() == expected.keys()
    muons = {name for name in start if name.startswith("blocks.") and start[name].ndim == 2}
    assert len(muons) == MATRICES
    names = start.keys() if precision == "fp32" else muons
    return max(((found[n] - expected[n]).norm() / (expected[n] - start[n]).norm()).item() for n in names)


# -------------------------------------------------------------------------------------- torch's own, at every stage


def weights_and_calls(ranks: Ranks, config: TrainConfig) -> tuple[dict[str, Any], int]:
    """Train; returns the weights, as lists, and how many matrices this rank orthogonalised."""
    calls = 0

    def counted(matrix: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return orthogonal(matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.engine.muon, "orthogonal", counted)
        weights = weights_of(trained(ranks, config))
    return {name: weight.tolist() for name, weight in weights.items()}, calls


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_rank_trains_as_torchs_muon_does(ranks: Ranks, stage: int) -> None:
    weights, calls = weights_and_calls(ranks, settings(zero_stage=stage, micro_batch=4))
    assert calls == MATRICES * STEPS
    assert difference({name: torch.tensor(weight) for name, weight in weights.items()}) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 2])
def test_as_on_a_gpu_it_trains_as_torchs_muon_does_in_bfloat16(
    ranks: Ranks, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.engine.muon.DTYPES, "cpu", torch.bfloat16)
    weights = weights_of(trained(ranks, settings(zero_stage=stage, micro_batch=4)))
    assert difference(weights, iterations=torch.bfloat16) < BFLOAT16_TOLERANCE


def orders(ranks: Ranks, config: TrainConfig) -> list[str]:
    """Train one step; returns what this rank did with matrices, in order: "sum" over the ranks or "orthogonalise"."""
    done: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.engine.muon, "orthogonal", noted("orthogonalise", orthogonal))
        patch.setattr(training.engine.muon, "sum_on", noted("sum", training.engine.muon.sum_on))
        trained(ranks, config, last=1)
    return done


@pytest.mark.slow
def test_ranks_orthogonalise_at_the_same_time_after_all_sums(tmp_path: Path) -> None:
    for done in on_ranks(tmp_path, orders, settings(zero_stage=2)):
        assert done == ["sum", "sum", "orthogonalise"] * (MATRICES // 2)


@pytest.mark.parametrize("shape", [(30, 10), (10, 40), (12, 12)])
def test_the_iterations_in_float32_are_torchs_without_their_rounding(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    found, rounded = orthogonal(matrix), orthogonal(matrix.bfloat16()).float()
    assert torch.equal(matrix, before)
    assert (found - rounded).norm() / found.norm() < 0.02
    values = torch.linalg.svdvals(found)
    assert 0.5 < values.min() <= values.max() < 1.5
    assert not orthogonal(torch.zeros(shape)).any()


@pytest.mark.parametrize("stage", [0, 1, 2])  # at stage 3 the linear layers round otherwise
def test_where_gradients_are_the_same_so_is_the_first_step(ranks: Ranks, stage: int) -> None:
    weights = weights_of(trained(ranks, settings(zero_stage=stage), last=1))
    for name, weight in reference(steps=1).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_ranks_train_as_torchs_muon_does(tmp_path: Path, stage: int, n_ranks: int) -> None:
    answers = on_ranks(tmp_path, weights_and_calls, settings(zero_stage=stage, micro_batch=2), n_ranks=n_ranks)
    assert not [answer for answer in answers if isinstance(answer, str)], answers
    for _, calls in answers:
        assert calls == MATRICES * STEPS / n_ranks  # each matrix once, by one of the ranks
    weights = {name: torch.tensor(weight) for name, weight in answers[0][0].items()}
    assert difference(weights) < TOLERANCE


# -------------------------------------------------------------------------------------------- going on, and leaving out


def state_of(engine: Engine) -> dict[str, Tensor]:
    """The weights, moments and averages of this rank."""
    optimizer = engine._engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state
    moments = {f"{i} {name}": value.clone() for i, one in enumerate(states.values()) for name, value in one.items()}
    averages = {f"average of {name}": average.clone() for name, average in averages_of(engine).items()}
    return moments | averages | weights_of(engine)


def run_of(mode: tuple[str, int, str], **changes: Any) -> TrainConfig:
    precision, stage, offload = mode
    return settings(precision=precision, zero_stage=stage, offload=offload, **changes)


def changes_of_resuming(ranks: Ranks, folder: Path, run: TrainConfig) -> list[str]:
    """Train at once and in two parts; returns the names of what is not the same, bit for bit."""
    whole = state_of(trained(ranks, run, folder=folder / "whole"))
    trained(ranks, run, last=2, folder=folder / "parts")
    parts = state_of(trained(ranks, run, first=2, folder=folder / "parts"))
    assert parts.keys() == whole.keys()
    n_variances = sum(name.endswith("exp_avg_sq") for name in whole)
    assert 0 < n_variances < sum(name.endswith("exp_avg") for name in whole)
    return [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])]


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert changes_of_resuming(ranks, tmp_path, settings(zero_stage=stage)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode)))
def test_two_ranks_go_on_bit_for_bit_in_every_mode(tmp_path: Path, mode: tuple[str, int, str]) -> None:
    assert on_ranks(tmp_path, changes_of_resuming, tmp_path, run_of(mode)) == [[], []]


def weights_after(ranks: Ranks, folder: Path, run: TrainConfig, first: int, last: int) -> dict[str, Any]:
    engine = trained(ranks, run, first, last, folder)
    variances = [state for state in state_of(engine) if state.endswith("exp_avg_sq")]
    assert len(variances) < len([state for state in state_of(engine) if state.endswith("exp_avg")])
    return {name: weight.tolist() for name, weight in weights_of(engine).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(("fp32", 0), ("fp32", 0)), (("fp32", 1), ("fp32", 2)), (("fp32", 2), ("fp32", 1)), (("fp32", 3), ("fp32", 3))]
    + [(("bf16", stage), ("bf16", stage)) for stage in (1, 2, 3)],
)
def test_a_run_goes_on_with_other_ranks(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    first, second = (run_of((*mode, "none")) for mode in (before, after))  # type: ignore[arg-type]
    turns = [(2, first, 0, 1), (1, second, 1, 2), (3, second, 2, 3), (2, second, 3, STEPS)]
    for n_ranks, run, start, end in turns:
        answers = on_ranks(tmp_path / "ranks", weights_after, tmp_path / "run", run, start, end, n_ranks=n_ranks)
        assert not [answer for answer in answers if isinstance(answer, str)], answers
    found = {name: torch.tensor(weight) for name, weight in answers[0].items()}
    precision: Precision = second.precision
    assert difference(found, precision) < (TOLERANCE if precision == "fp32" else HALF_TOLERANCE)


def kept_of_a_skipped_step(ranks: Ranks, run: TrainConfig) -> list[str]:
    """Leave out a step, and take the next one; returns the names of what the one left out has changed."""
    engine = trained(ranks, run, last=2)
    before = state_of(engine)
    faulty = [tensors | {"fault": torch.tensor(math.nan)} for tensors in micro_batches(ranks, 2, engine.accumulation)]
    engine.step(faulty, RATE, 2)
    assert not engine.applied
    after = state_of(engine)
    engine.step(micro_batches(ranks, 3, engine.accumulation), RATE, 3)
    assert engine.applied
    assert all(torch.isfinite(tensor).all() for tensor in state_of(engine).values())
    moved = state_of(engine)
    assert not any(torch.equal(moved[name], before[name]) for name in moved if "exp_avg" in name)
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize("variance_clip", [None, 5.0])
def test_a_step_left_out_changes_nothing(ranks: Ranks, variance_clip: float | None) -> None:
    assert kept_of_a_skipped_step(ranks, settings(variance_clip=variance_clip)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [mode for mode in MODES if mode[0] != "fp16"], ids=lambda mode: "-".join(map(str, mode))
)
def test_two_ranks_leave_out_a_step_in_every_mode(tmp_path: Path, mode: tuple[str, int, str]) -> None:
    assert on_ranks(tmp_path, kept_of_a_skipped_step, run_of(mode)) == [[], []]


# -------------------------------------------------------------------------------------------- what it goes with


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1, "offload": "optimizer"},
        {"zero_stage": 2, "offload": "optimizer", "micro_batch": 2},
        {"zero_stage": 3, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "parameters", "micro_batch": 2},
        {"zero_stage": 0, "variance_clip": 5.0},
        {"zero_stage": 2, "variance_clip": 5.0},
        {"zero_stage": 0, "powersgd_rank": 64},
        {"zero_stage": 1, "powersgd_rank": 64},
        {"zero_stage": 0, "precision": "autocast-fp16", "gradient_scaling": "per-resblock"},
        {"zero_stage": 1, "precision": "autocast-fp16", "gradient_scaling": "per-resblock"},
        *[{"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)],
        *[{"zero_stage": stage, "precision": "autocast"} for stage in (0, 1, 2, 3)],
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_two_ranks_train_as_torchs_muon_does_in_other_modes(tmp_path: Path, changes: dict[str, Any]) -> None:
    answers = on_ranks(tmp_path, weights_and_calls, settings(**changes))
    assert not [answer for answer in answers if isinstance(answer, str)], answers
    weights = {name: torch.tensor(weight) for name, weight in answers[0][0].items()}
    precision = changes.get("precision", "fp32")
    assert difference(weights, precision) < (TOLERANCE if precision == "fp32" else HALF_TOLERANCE)


def test_of_clip_the_matrices_of_both_towers_are_muons() -> None:
    model = CLIP(tiny.recipe().clip.model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {names[id(weight)] for weight in block_matrices(model)}
    layers = ("attention.qkv", "attention.out", "mlp_in", "mlp_out")
    assert found == {f"{tower}.blocks.0.{layer}.weight" for tower in ("vision", "text") for layer in layers}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_trained_as_a_matrix_with_a_row_for_each_channel(
    ranks: Ranks, layout: torch.memory_format
) -> None:
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.down = nn.ModuleList([layer])

    torch.manual_seed(0)
    convolution = Model(nn.Conv2d(3, 5, 3).to(memory_format=layout))  # type: ignore[call-overload]
    linear = Model(nn.Linear(27, 5))
    (weight,), (matrix,) = block_matrices(convolution), block_matrices(linear)
    matrix.data = weight.detach().reshape(5, 27).clone()
    for model in (convolution, linear):
        optimizer = build_optimizer(model, settings().optimizer, RATE, ranks)
        for step in range(3):
            for parameter in model.parameters():
                drawn = torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(step))
                form = layout if parameter.ndim == 4 else torch.contiguous_format
                parameter.grad = drawn.view(parameter.shape).contiguous(memory_format=form)
            optimizer.step()
    assert torch.allclose(weight.reshape(5, 27), matrix, atol=1e-6)


def test_every_parameter_is_in_one_group(ranks: Ranks) -> None:
    model = objective().model
    optimizer = build_optimizer(model, settings().optimizer, RATE, ranks)
    assert isinstance(optimizer, MuonAdamW)
    parameters = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(parameters) == sorted(id(weight) for weight in model.parameters())
    (muon,) = [group for group in optimizer.param_groups if "momentum" in group]
    assert [id(weight) for weight in muon["params"]] == [id(weight) for weight in block_matrices(model)]
    assert muon["weight_decay"] == 0.5


def test_a_model_without_blocks_is_refused(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"DVAE has none: use --optimizer adamw"):
        build_optimizer(DVAE(tiny.recipe().dvae.model), OptimizerConfig(kind="muon"), RATE, ranks)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_of_the_other_optimizer_is_refused(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    muon = settings(zero_stage=stage)
    adamw = dataclasses.replace(muon, optimizer=dataclasses.replace(muon.optimizer, kind="adamw"))
    for saved, now in ((muon, adamw), (adamw, muon)):
        folder = tmp_path / saved.optimizer.kind
        trained(ranks, saved, last=1, folder=folder)
        kind, other = saved.optimizer.kind, now.optimizer.kind
        with pytest.raises(ValueError, match=f"saved with optimizer {kind}, .*{other}.*--optimizer {kind}.*--fresh"):
            engine_of(objective(), now, ranks).load(folder)


def test_a_checkpoint_from_before_there_was_muon_is_adamws(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw = dataclasses.replace(settings(), optimizer=OptimizerConfig())
    trained(ranks, adamw, last=1, folder=tmp_path)
    read = training.engine.engine.read_manifest
    monkeypatch.setattr(
        training.engine.engine,
        "read_manifest",
        lambda folder: {k: v for k, v in read(folder).items() if k != "optimizer"},
    )
    trained(ranks, adamw, first=1, last=2, folder=tmp_path)
    with pytest.raises(ValueError, match="saved with optimizer adamw"):
        engine_of(objective(), settings(), ranks).load(tmp_path)
