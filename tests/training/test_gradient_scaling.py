"""Per-resblock gradient scaling: its rules, and what it keeps of gradients in a real block."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.engines import Objective, averages_of, engine_of, transformer_objective
from support.ranks import on_ranks
from torch import Tensor

from dalle.model import DALLE
from training.config import TrainConfig
from training.engine.engine import Engine
from training.engine.gradient_scaling import ResblockScales, ResblockScaling, resblock_parameters, run_in_float16
from training.ranks.ranks import Ranks, join


@pytest.fixture
def ranks() -> Ranks:
    return join()


def transformer(seed: int = 0) -> DALLE:
    torch.manual_seed(seed)
    model = DALLE(tiny.recipe().transformer.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(step: int = 0, n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(300, (n, 24), generator=generator)
    text[:, 0] = 300
    tokens = torch.randint(32, (n, 16), generator=generator)
    return {"text": text, "image_tokens": tokens, "n_cut": torch.zeros(n, dtype=torch.int64)}


def config(**changes: Any) -> TrainConfig:
    return tiny.train_config(**{"precision": "autocast-fp16", "gradient_scaling": "per-resblock", **changes})


# ------------------------------------------------------------------------------------------------------ the rules


def exponents(scales: ResblockScales) -> list[float]:
    """Thousandths of a power of two, as which all the paper's factors are whole: ×2^(1/1000) is +1, ÷√2 is -500."""
    return [1000 * math.log2(value) for value in scales.values]


def follow(scales: ResblockScales, outcomes: Sequence[Sequence[bool]]) -> list[list[float]]:
    found = []
    for are_finite in outcomes:
        scales.update(are_finite)
        found.append(exponents(scales))
    return found


def test_scales_follow_the_rules_of_the_paper_step_by_step() -> None:
    scales = ResblockScales(2, n_ranks=4)
    assert scales.values == [4 * 2.0**13] * 2
    outcomes = [[True, True], [True, False], [False, True], [True, False], [False, True], [True, True]]
    by_hand = [[15001, 15001], [15002, 14501], [14502, 14502], [14503, 14502], [14503, 14503], [14504, 14504]]
    for found, expected in zip(follow(scales, outcomes), by_hand, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_scale_is_divided_at_most_once_within_125_updates() -> None:
    scales = ResblockScales(1, n_ranks=1)
    found = [values[0] for values in follow(scales, [[False]] * 251)]
    assert found[:125] == pytest.approx([12500] * 125)
    assert found[125:250] == pytest.approx([12000] * 125)
    assert found[250] == pytest.approx(11500)


def test_the_rest_after_a_division_does_not_stop_growth() -> None:
    scales = ResblockScales(1, n_ranks=1)
    found = [values[0] for values in follow(scales, [[False], [True], [True], [False], [True]])]
    assert found == pytest.approx([12500, 12501, 12502, 12502, 12503])


@pytest.mark.parametrize("n_ranks", [1, 8])
def test_scales_stay_within_the_clamps(n_ranks: int) -> None:
    highest, lowest = ResblockScales(1, n_ranks), ResblockScales(1, n_ranks)
    for _ in range(11_001):
        highest.update([True])
    assert highest.values == [n_ranks * 2.0**24]
    for _ in range(12 * 125):
        lowest.update([False])
    assert lowest.values[0] == pytest.approx(n_ranks * 2.0**7)
    for _ in range(250):
        lowest.update([False])
    assert lowest.values == [n_ranks * 2.0**7]


def test_scales_go_on_from_their_state_and_in_proportion_to_the_ranks() -> None:
    scales = ResblockScales(2, n_ranks=2)
    follow(scales, [[True, False], [False, True], [True, True]])
    state = json.loads(json.dumps(scales.state()))
    same, more = ResblockScales(2, n_ranks=2), ResblockScales(2, n_ranks=8)
    same.load_state(state)
    more.load_state(state)
    outcomes = [[False, False]] * 130
    assert follow(same, outcomes) == follow(scales, outcomes)
    assert [value + 2000 for value in exponents(same)] == pytest.approx(follow(more, outcomes)[-1])


@pytest.mark.parametrize(
    "change",
    [
        {"values": [8192.0]},
        {"values": [8192.0, math.nan]},
        {"values": [8192.0, 1e30]},
        {"values": None},
        {"divided_at": ["x", 0]},
        {"n_ranks": 0},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    scales = ResblockScales(2, n_ranks=1)
    with pytest.raises(ValueError, match="gradient scales"):
        scales.load_state({**scales.state(), **change})


# ------------------------------------------------------------------------------------------- gradients in a model


def gradients(
    model: DALLE, upstream: float, prepare: Callable[[DALLE], object] = lambda model: None
) -> dict[str, Tensor]:
    """The gradients of `upstream` times the loss."""
    prepare(model)
    loss, _ = transformer_objective(model)(**batch())
    (upstream * loss).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def scaled_gradients(
    upstream: float, ranks: Ranks, exponents: Sequence[int]
) -> tuple[ResblockScaling, dict[str, Tensor]]:
    """The same under per-resblock scales of these powers of two, divided out."""
    model = transformer()
    scaling = ResblockScaling(model, ranks)
    values = [ranks.size * 2.0**exponent for exponent in exponents]
    scaling.load_state({**scaling.rules.state(), "values": values})
    found = gradients(model, upstream)
    scaling.unscale_(found)
    return scaling, found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_the_resblocks_are_attention_and_mlp_of_every_layer_with_their_norms() -> None:
    groups = resblock_parameters(transformer())
    assert [len(group) for group in groups] == [6, 6, 6, 6]
    assert all(name.startswith("blocks.1.attention") for name in groups[2])
    assert "blocks.0.mlp_norm.weight" in groups[1]
    outside = {name for name, _ in transformer().named_parameters()} - {name for group in groups for name in group}
    assert not [name for name in outside if name.startswith("blocks")]


def test_gradients_are_those_of_float32_to_the_rounding_of_float16(ranks: Ranks) -> None:
    expected = gradients(transformer(), 1.0)
    scaling, found = scaled_gradients(1.0, ranks, [13] * 4)
    assert not scaling.overflowed
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        if "qkv.bias" not in name:  # of keys it is 0 but for rounding
            assert relative_error(found[name], gradient) < 1e-2, name
    assert not torch.equal(found["blocks.0.mlp.out.weight"], expected["blocks.0.mlp.out.weight"]), "all in float32"


def test_an_underflow_is_lost_without_scaling_and_kept_with_it(ranks: Ranks) -> None:
    tiny_loss = 1e-7
    expected = gradients(transformer(), tiny_loss)
    lost = gradients(transformer(), tiny_loss, run_in_float16)
    _, kept = scaled_gradients(tiny_loss, ranks, [24] * 4)
    for name in ("blocks.1.mlp.out.weight", "blocks.1.mlp.wide.weight", "blocks.0.attention.qkv.weight"):
        assert expected[name].abs().max() > 0
        assert lost[name].abs().max() == 0, name
        assert relative_error(kept[name], expected[name]) < 1e-2, name
    assert relative_error(lost["image_head.weight"], expected["image_head.weight"]) < 1e-2


def test_what_overflows_in_one_branch_lowers_its_scale_only(ranks: Ranks) -> None:
    middle = 2
    loss = 10.0
    scaling, found = scaled_gradients(loss, ranks, [7, 7, 24, 7])
    groups = resblock_parameters(transformer())
    finite = [all(bool(found[name].isfinite().all()) for name in group) for group in groups]
    assert finite == [index != middle for index in range(4)]
    assert scaling.overflowed
    values = exponents(scaling.rules)
    assert values[middle] == pytest.approx(23_500)
    assert [value for index, value in enumerate(values) if index != middle] == pytest.approx([7001] * 3)


def test_the_backward_pass_of_recomputed_layers_is_scaled_too(ranks: Ranks) -> None:
    def recompute(model: DALLE) -> None:
        model.activation_checkpointing = True
        ResblockScaling(model, ranks)

    expected = gradients(transformer(), 1.0, lambda model: ResblockScaling(model, ranks))
    for name, gradient in gradients(transformer(), 1.0, recompute).items():
        assert torch.equal(gradient, expected[name])


# ---------------------------------------------------------------------------------------------- in the engine


def steps(engine: Engine, first: int, last: int) -> list[dict[str, float]]:
    engine.train()
    found = [engine.step([batch(step)], 1e-2, step) for step in range(first, last)]
    return [{name: value.item() for name, value in metrics.items() if value.ndim == 0} for metrics in found]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_in_float16_follows_one_in_float32_and_resumes_with_its_scales(
    tmp_path: Path, ranks: Ranks, stage: int
) -> None:
    plain = engine_of(transformer_objective(transformer()), tiny.train_config(zero_stage=stage), ranks)
    expected = [metrics["loss"] for metrics in steps(plain, 0, 4)]
    engine = engine_of(transformer_objective(transformer()), config(zero_stage=stage), ranks)
    found = steps(engine, 0, 2)
    engine.save(tmp_path, 2, {})
    found += steps(engine, 2, 4)
    assert [metrics["loss"] for metrics in found] == pytest.approx(expected, rel=2e-3)
    assert [metrics["scale_min"] for metrics in found] == pytest.approx([2 ** (13 + n / 1000) for n in range(1, 5)])
    resumed = engine_of(transformer_objective(transformer(1)), config(zero_stage=stage), ranks)
    resumed.load(tmp_path)
    assert steps(resumed, 2, 4) == found[2:]


def test_accumulated_gradients_are_unscaled_once(ranks: Ranks) -> None:
    found = []
    for micro_batch in (4, 2):
        engine = engine_of(transformer_objective(transformer()), config(micro_batch=micro_batch), ranks)
        engine.train()
        whole = batch()
        parts = [
            {name: tensor[at : at + micro_batch] for name, tensor in whole.items()} for at in range(0, 4, micro_batch)
        ]
        engine.step(parts, 1e-2, 0)
        found.append(averages_of(engine)["blocks.0.mlp.out.weight"].clone())
    assert relative_error(found[1], found[0]) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 2}, "gradient_scaling per-resblock needs zero_stage 0 or 1, got 2"),
        ({"precision": "autocast"}, "is for precision autocast-fp16, got autocast"),
        ({"compile": True}, "autocast-fp16 cannot be compiled"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("scaling", ["none", "per-resblock"])
def test_other_models_are_refused_in_words(ranks: Ranks, scaling: str) -> None:
    with pytest.raises(ValueError, match="autocast-fp16 is the transformer's alone"):
        engine_of(Objective(), config(gradient_scaling=scaling), ranks)


def test_another_precision_of_the_users_is_refused_in_words(tmp_path: Path, ranks: Ranks) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}))
    with pytest.raises(ValueError, match="autocast-fp16"):
        engine_of(transformer_objective(transformer()), config(deepspeed_config=path), ranks)


# --------------------------------------------------------------------------------------------------- two ranks


def scaled_on_a_rank(ranks: Ranks) -> dict[str, Any]:
    model = transformer()
    scaling = ResblockScaling(model, ranks)
    scaling.load_state({**scaling.rules.state(), "values": [2 * 2.0**7] * 3 + [2 * 2.0**24]})
    found = gradients(model, 10.0 if ranks.rank == 1 else 1e-6)
    is_finite_here = bool(found["blocks.1.mlp.out.weight"].isfinite().all())
    scaling.unscale_(found)
    return {"finite": is_finite_here, "state": scaling.rules.state()}


@pytest.mark.slow
def test_an_overflow_on_one_rank_lowers_the_scale_on_both(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, scaled_on_a_rank)
    assert [first["finite"], second["finite"]] == [True, False]
    assert first["state"] == second["state"]
    growth = 2 ** (1 / 1000)
    expected = [2 * 2.0**7 * growth] * 3 + [2 * 2.0**24 / math.sqrt(2)]
    assert first["state"]["values"] == pytest.approx(expected)


def losses_on_ranks(ranks: Ranks, stage: int) -> list[float]:
    engine = engine_of(transformer_objective(transformer()), config(zero_stage=stage), ranks)
    engine.train()
    own = slice(2 * ranks.rank, 2 * ranks.rank + 2) if ranks.size == 2 else slice(None)
    losses = []
    for step in range(3):
        tensors = {name: tensor[own] for name, tensor in batch(step).items()}
        engine.step([tensors], 1e-2, step)
        whole, _ = engine.forward(batch(step + 1))
        losses.append(whole.item())
    return losses


def save_after_two_steps(ranks: Ranks, folder: Path, stage: int) -> list[dict[str, float]]:
    engine = engine_of(transformer_objective(transformer()), config(zero_stage=stage, global_batch=8), ranks)
    found = steps(engine, 0, 2)  # the same batch on every rank
    engine.save(folder, 2, {})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_with_scales_goes_on_with_another_number_of_ranks(tmp_path: Path, stage: int) -> None:
    begun, _ = on_ranks(tmp_path, save_after_two_steps, tmp_path / "a", stage)
    resumed = engine_of(transformer_objective(transformer(1)), config(zero_stage=stage, global_batch=4), join())
    resumed.load(tmp_path / "a")
    ended = steps(resumed, 2, 4)
    straight = engine_of(transformer_objective(transformer()), config(zero_stage=stage), join())
    expected = [metrics["loss"] for metrics in steps(straight, 0, 4)]
    assert [metrics["loss"] for metrics in begun + ended] == pytest.approx(expected, rel=2e-3)
    assert [metrics["scale_min"] for metrics in begun] == pytest.approx([2 * 2 ** (13 + n / 1000) for n in (1, 2)])
    assert [metrics["scale_min"] for metrics in ended] == pytest.approx([2 ** (13 + n / 1000) for n in (3, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_in_float16_train_like_one(tmp_path: Path, stage: int) -> None:
    expected = losses_on_ranks(join(), stage)
    first, second = on_ranks(tmp_path, losses_on_ranks, stage)
    assert first == second
    assert first == pytest.approx(expected, rel=2e-3)
