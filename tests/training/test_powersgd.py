"""PowerSGD: what it sends, what it keeps for later, and that ranks stay the same."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support import tiny
from support.engines import Objective, config, data, engine_of, transformer_objective
from support.ranks import on_ranks
from torch import Tensor, nn

from dalle.model import DALLE
from dalle.tokenizer import Tokenizer
from training.config import OptimizerConfig
from training.drawings.shapes import world as drawings
from training.engine.powersgd import PowerSGD, compressed_names, expected_ratio
from training.ranks.ranks import Ranks, join

SHAPES = {"square": (12, 12), "tall": (24, 6), "wide": (6, 20), "convolution": (8, 3, 2, 2), "bias": (12,)}
MATRICES = ["square", "tall", "wide", "convolution"]


@pytest.fixture
def ranks() -> Ranks:
    return join()


def powersgd(ranks: Ranks, rank: int, seed: int = 0) -> PowerSGD:
    return PowerSGD(
        {name: torch.zeros(shape) for name, shape in SHAPES.items()}, MATRICES, rank=rank, seed=seed, ranks=ranks
    )


def gradients(step: int, rank: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------------------------- what is compressed


def test_embeddings_heads_gains_and_biases_are_not_compressed() -> None:
    model = DALLE(tiny.recipe().transformer.model)
    names = compressed_names(model, rank=2)
    assert names == [
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attention.qkv", "attention.out", "mlp.wide", "mlp.out")
    ]


def test_a_matrix_whose_factors_are_larger_than_it_is_is_sent_whole() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    assert compressed_names(model, rank=8) == ["0.weight"]
    assert compressed_names(model, rank=1) == ["0.weight", "1.weight"]
    assert compressed_names(model, rank=32) == []


def test_the_share_of_a_layers_matrices_is_4r_by_3d() -> None:
    d, r = 96, 12
    shapes = {"qkv": (3 * d, d), "out": (d, d), "wide": (4 * d, d), "narrow": (d, 4 * d)}
    assert expected_ratio(shapes, shapes, r) == pytest.approx(4 * r / (3 * d))


def test_the_share_of_the_papers_shards_is_5r_by_8d() -> None:
    d, r, m = 3968, 896, 8
    shapes = dict.fromkeys(("q", "k", "v", "out"), (d, d // m))
    shapes |= {"wide": (d, 4 * d // m), "narrow": (4 * d // m, d)}
    assert expected_ratio(shapes, shapes, r // m) == pytest.approx(5 * r / (8 * d))


# ------------------------------------------------------------------------------------------------- what comes out


def test_at_full_rank_gradients_are_what_they_were(ranks: Ranks) -> None:
    compressor, given = powersgd(ranks, rank=100), gradients(0)
    found = copied(given)
    compressor.reduce_(found)
    for name, gradient in given.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_at_low_rank_matrices_have_that_rank_and_biases_are_exact(ranks: Ranks) -> None:
    compressor, given = powersgd(ranks, rank=2), gradients(0)
    found = copied(given)
    compressor.reduce_(found)
    assert torch.equal(found["bias"], given["bias"])
    for name in MATRICES:
        assert torch.linalg.matrix_rank(found[name].flatten(1), rtol=1e-4) == 2
        assert found[name].shape == given[name].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_came_out_and_what_is_kept_are_all_that_went_in(ranks: Ranks, dtype: torch.dtype) -> None:
    compressor = powersgd(ranks, rank=2)
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    taken = copied(given)
    for step in range(20):
        now = {name: gradient.to(dtype) for name, gradient in gradients(step).items()}
        for name, gradient in now.items():
            given[name] += gradient.float()
        compressor.reduce_(now)
        for name, gradient in now.items():
            taken[name] += gradient.float()
    for name in MATRICES:
        kept = compressor.state()[f"error.{name}"]
        total, late = given[name].flatten(1), (given[name] - taken[name]).flatten(1)
        assert late.norm() > 0.1 * total.norm(), "nothing is late"
        torch.testing.assert_close(kept, late.T if len(late) > late.shape[1] else late, rtol=1e-4, atol=1e-4)


def test_the_columns_that_a_matrix_is_projected_on_are_fixed_and_gaussian(ranks: Ranks) -> None:
    """A buffer of zeros and the same gradient give the same result at any step, whatever came between."""
    given, found = gradients(0), []
    compressor = powersgd(ranks, rank=2)
    for step in range(3):
        again = copied(given)
        compressor.load_state([powersgd(ranks, rank=2).state()])
        compressor.reduce_(again)
        found.append(again)
        compressor.reduce_(gradients(step + 1))
    for name in MATRICES:
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])
    other = copied(given)
    powersgd(ranks, rank=2, seed=1).reduce_(other)
    assert not torch.allclose(other["square"], found[0]["square"])


def test_the_norm_of_what_is_decompressed_is_the_norm_of_the_second_factor(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that clipping by the decompressed gradients is step 9 of E.2."""
    sent: list[Tensor] = []
    all_reduce = dist.all_reduce

    def keep(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.clone())
        return all_reduce(tensor, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", keep)
    found = gradients(0)
    powersgd(ranks, rank=3).reduce_(found)
    _, _, second = sent
    decompressed = torch.cat([found[name].flatten() for name in MATRICES])
    assert decompressed.norm().item() == pytest.approx(second.norm().item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_out_the_step_and_keeps_the_buffers(ranks: Ranks) -> None:
    for name in SHAPES:
        for value in (torch.inf, -torch.inf, torch.nan):
            compressor = powersgd(ranks, rank=2)
            compressor.reduce_(gradients(0))
            before = copied(compressor.state())
            wrong = gradients(1)
            wrong[name].view(-1)[3] = value
            compressor.reduce_(wrong)
            assert all(gradient.isnan().all() for gradient in wrong.values())
            assert all(torch.equal(tensor, before[key]) for key, tensor in compressor.state().items())


def test_a_step_asks_the_device_three_times_whatever_the_number_of_matrices(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, is_true = [0], Tensor.__bool__

    def counted(tensor: Tensor) -> bool:
        asked[0] += 1
        return is_true(tensor)

    compressor = powersgd(ranks, rank=2)
    monkeypatch.setattr(Tensor, "__bool__", counted)
    compressor.reduce_(gradients(0))
    assert asked == [3]


def test_factors_that_overflow_leave_out_the_step_and_keep_finite_buffers(ranks: Ranks) -> None:
    compressor, huge = powersgd(ranks, rank=2), gradients(0)
    huge["square"].fill_(3e38)
    compressor.reduce_(huge)
    assert all(gradient.isnan().all() for gradient in huge.values())
    after = compressor.state()
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert torch.equal(after["error.wide"], gradients(0)["wide"]), "the late part of the others was lost"


# ------------------------------------------------------------------------------------------------ what is saved


def test_buffers_go_on_from_their_state(ranks: Ranks) -> None:
    compressor, other = powersgd(ranks, rank=2), powersgd(ranks, rank=2, seed=5)
    compressor.reduce_(gradients(0))
    other.load_state([copied(compressor.state())])
    expected, found = gradients(1), gradients(1)
    compressor.reduce_(expected)
    other.reduce_(found)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_buffers_of_other_parameters_are_refused(ranks: Ranks) -> None:
    state = powersgd(ranks, rank=2).state()
    for wrong in ({**state, "error.square": torch.zeros(2, 2)}, {"seed": state["seed"]}):
        with pytest.raises(ValueError, match="of another model or rank"):
            powersgd(ranks, rank=2).load_state([wrong])


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_above_1_are_refused_in_words(stage: int) -> None:
    with pytest.raises(ValueError, match=f"powersgd_rank needs zero_stage 0 or 1, got {stage}"):
        config(powersgd_rank=2, zero_stage=stage)


def test_what_the_users_configuration_makes_impossible_is_refused_in_words(tmp_path: Path, ranks: Ranks) -> None:
    for content, message in (
        ('{"zero_optimization": {"stage": 2}}', "needs (ZeRO |zero_)stage 0 or 1, .* 2"),
        ('{"zero_optimization": {"stage": 1, "reduce_scatter": true}}', "reduce_scatter and overlap_comm to be false"),
    ):
        path = tmp_path / "ds.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            engine_of(Objective(), config(powersgd_rank=1, deepspeed_config=path), ranks)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_changes_no_weight(ranks: Ranks, stage: int) -> None:
    engine = engine_of(Objective(), config(powersgd_rank=1, zero_stage=stage), ranks)
    engine.train()
    engine.step([data(0)], 1e-2, 0)
    before = copied(dict(engine.model.named_parameters()))
    wrong = data(1)
    wrong["y"][0, 0] = torch.inf
    engine.step([wrong], 1e-2, 1)
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    engine.step([data(2)], 1e-2, 2)
    assert all(bool(p.isfinite().all()) for p in engine.model.parameters())


# ---------------------------------------------------------------------------------------------------- two ranks


def own_half(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    n = len(next(iter(tensors.values()))) // ranks.size
    return {name: tensor[ranks.rank * n : (ranks.rank + 1) * n] for name, tensor in tensors.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    whole = b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors.values())
    return hashlib.sha256(whole).hexdigest()


def averaged_on_a_rank(ranks: Ranks, rank: int) -> dict[str, Any]:
    """What 10 steps of different gradients on each rank come to: taken, kept, and the digest of each result."""
    compressor = powersgd(ranks, rank=rank)
    given = {name: torch.zeros(SHAPES[name]) for name in MATRICES}
    taken, digests = copied(given), []
    for step in range(10):
        for name in MATRICES:
            given[name] += (gradients(step, 0)[name] + gradients(step, 1)[name]) / 2
        now = gradients(step, ranks.rank)
        compressor.reduce_(now)
        digests.append(digest(now))
        for name in MATRICES:
            taken[name] += now[name]
    kept = {name: compressor.state()[f"error.{name}"].tolist() for name in MATRICES}
    late = {name: (given[name] - taken[name]).flatten(1).tolist() for name in MATRICES}
    return {"digests": digests, "kept": kept, "late": late}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 100])
def test_two_ranks_get_the_same_bits_and_keep_together_what_is_late(tmp_path: Path, rank: int) -> None:
    first, second = on_ranks(tmp_path, averaged_on_a_rank, rank)
    assert first["digests"] == second["digests"]
    for name in MATRICES:
        kept = (torch.tensor(first["kept"][name]) + torch.tensor(second["kept"][name])) / 2
        late = torch.tensor(first["late"][name])
        torch.testing.assert_close(kept, late.T if len(late) > late.shape[1] else late, rtol=1e-3, atol=1e-4)


def engine_steps(ranks: Ranks, folder: Path, changes: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    if "deepspeed_config" in changes:
        folder.mkdir(exist_ok=True)
        path = folder / f"ds{ranks.rank}.json"
        path.write_text(json.dumps(changes["deepspeed_config"]))
        changes = {**changes, "deepspeed_config": path}
    engine = engine_of(Objective(width=32), config(**changes), ranks)
    if first:
        engine.load(folder)
    engine.train()
    dtype = next(engine.model.parameters()).dtype

    def inputs(step: int) -> dict[str, Tensor]:
        return {**data(step), "x": data(step)["x"].to(dtype)}

    losses, digests = [], []
    for step in range(first, last):
        half = own_half(inputs(step), ranks)
        n = len(half["x"]) // engine.accumulation
        parts = [{name: tensor[at : at + n] for name, tensor in half.items()} for at in range(0, len(half["x"]), n)]
        engine.step(parts, 1e-2, step)
        losses.append(engine.forward(inputs(step + 1))[0].item())
        digests.append(digest(dict(engine.model.named_parameters())))
    engine.save(folder, last, {})
    return {"losses": losses, "digests": digests}


MODES = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 0, "micro_batch": 1},
    {"zero_stage": 1, "micro_batch": 1},
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 1, "precision": "bf16", "deepspeed_config": {"data_types": {"grad_accum_dtype": "bf16"}}},
    {"zero_stage": 1, "precision": "autocast"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODES, ids=str)
def test_ranks_stay_bit_identical_and_resume_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "powersgd_rank": 1}
    first, second = on_ranks(tmp_path, engine_steps, tmp_path / "a", changes, 0, 20)
    assert first == second
    assert len(set(first["digests"])) == 20, "the weights stood still"
    on_ranks(tmp_path, engine_steps, tmp_path / "b", changes, 0, 10)
    again, _ = on_ranks(tmp_path, engine_steps, tmp_path / "b", changes, 10, 20)
    assert again["losses"] == first["losses"][10:]
    assert again["digests"] == first["digests"][10:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_buffers_survive_another_number_of_ranks(tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "a"
    on_ranks(tmp_path, engine_steps, folder, {"zero_stage": stage, "powersgd_rank": 1}, 0, 4)
    checkpoint = folder / "step00000004"
    files = sorted(path.name for path in checkpoint.glob("powersgd*"))
    assert files == ["powersgd_rank00000.safetensors", "powersgd_rank00001.safetensors"]
    found = engine_steps(join(), folder, {"zero_stage": stage, "powersgd_rank": 1}, 4, 8)
    straight = engine_steps(join(), tmp_path / "b", {"zero_stage": stage, "powersgd_rank": 1}, 0, 8)
    assert found["losses"] == pytest.approx(straight["losses"][4:], rel=1e-4)
    assert [path.name for path in (folder / "step00000008").glob("powersgd*")] == files[:1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_at_full_rank_a_run_is_the_plain_run(tmp_path: Path, stage: int) -> None:
    plain, _ = on_ranks(tmp_path, engine_steps, tmp_path / "a", {"zero_stage": stage}, 0, 10)
    found, _ = on_ranks(tmp_path, full_rank_steps, tmp_path / "b", {"zero_stage": stage}, 0, 10)
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)


def full_rank_steps(ranks: Ranks, folder: Path, changes: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """`engine_steps` with all matrices compressed at full rank, where a run would send them whole."""
    import training.engine.reduction

    training.engine.reduction.compressed_names = lambda model, rank: [
        n for n, p in model.named_parameters() if p.ndim > 1
    ]
    return engine_steps(ranks, folder, {**changes, "powersgd_rank": 64}, first, last)


def transformer(width: int = 32) -> DALLE:
    torch.manual_seed(0)
    return DALLE(dataclasses.replace(tiny.recipe().transformer.model, d_model=width, n_heads=2))


def learned_pairs(n: int) -> dict[str, Tensor]:
    """Captions and 4×4 pictures of 32 colours of the built-in world, as the transformer takes them."""
    pictures = list(drawings(n, 0, size=32))
    tokenizer = Tokenizer.train([picture.captions[0] for picture in pictures], 300)
    text, _ = tokenizer.text([picture.captions[0] for picture in pictures], 24)
    small = [picture.image.convert("RGB").resize((4, 4), Image.Resampling.BOX) for picture in pictures]
    colours = torch.tensor([list(picture.getdata()) for picture in small])
    tokens = (colours[..., 0] // 64) * 8 + (colours[..., 1] // 64) * 2 + colours[..., 2] // 128
    return {"text": text, "image_tokens": tokens, "n_cut": torch.zeros(n, dtype=torch.int64)}


def batches_of(pairs: Mapping[str, Tensor], n_steps: int, size: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    n = len(pairs["text"])
    for _ in range(n_steps):
        chosen = torch.randperm(n, generator=generator)[:size]
        yield {name: tensor[chosen] for name, tensor in pairs.items()}


def learn(ranks: Ranks, n_steps: int, n_pairs: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train a tiny transformer; returns the loss before and after, and what a step sent, as counted outside."""
    settings = {"global_batch": 16, "optimizer": OptimizerConfig(), **changes}
    engine = engine_of(transformer_objective(transformer()), tiny.train_config(**settings), ranks)
    engine.train()
    counted = [0]
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        count_calls(name, counted)
    pairs = learned_pairs(n_pairs)
    before = engine.forward(pairs)[0].item()
    metrics: dict[str, Tensor] = {}
    for step, whole in enumerate(batches_of(pairs, n_steps, 16)):
        counted[0] = 0
        rate = 5e-4 * min(1, (step + 1) / 20)
        metrics = engine.step([own_half(whole, ranks)], rate, step)
    sent = {name: value.item() for name, value in metrics.items() if name.startswith("bytes_")}
    return {"before": before, "after": engine.forward(pairs)[0].item(), "bytes": counted[0], **sent}


def count_calls(name: str, counted: list[int]) -> None:
    """Count the bytes that go into a collective of this process from now on."""
    original = getattr(dist, name)

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counted[0] += tensor.numel() * tensor.element_size()
        return original(tensor, *arguments, **options)

    setattr(dist, name, counting)


VOTES = 256
"""Bytes of norms and votes, at most, that a step exchanges beside its gradients."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_as_many_bytes_are_sent_as_the_formula_says(tmp_path: Path, stage: int) -> None:
    rank, model = 4, transformer()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = expected_ratio(shapes, compressed_names(model, rank), rank)
    plain, _ = on_ranks(tmp_path, learn, 2, 32, {"zero_stage": stage})
    full = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert full <= plain["bytes"] <= full + VOTES
    for found in on_ranks(tmp_path, learn, 2, 32, {"zero_stage": stage, "powersgd_rank": rank}):
        assert found["bytes_full"] == full
        assert found["bytes_sent"] / full == pytest.approx(expected, rel=0.05)
        assert found["bytes_ratio"] == pytest.approx(found["bytes_sent"] / full)
        assert found["bytes_sent"] <= found["bytes"] <= found["bytes_sent"] + VOTES
        layers = 4 * 12 * 32**2 * 2
        in_factors = found["bytes_sent"] - (full - layers)
        assert in_factors / layers == pytest.approx(4 * rank / (3 * 32), rel=0.05)


@pytest.mark.slow
def test_after_300_steps_the_loss_is_within_one_percent_of_plain_training(tmp_path: Path) -> None:
    plain, _ = on_ranks(tmp_path, learn, 300, 1024, {})
    found, other = on_ranks(tmp_path, learn, 300, 1024, {"powersgd_rank": 8})
    assert found == other
    assert plain["after"] < 0.3 * plain["before"], "nothing was learned"
    assert found["after"] == pytest.approx(plain["after"], rel=0.01)
