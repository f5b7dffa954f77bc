import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.engines import Bomb, Objective, averages_of, config, data, engine_of, train, user_json
from torch import Tensor, nn

from dalle.model import DALLE
from dvae import DVAE
from rerank import CLIP
from training.config import OptimizerConfig
from training.engine.checkpoints import latest_tag, read_checkpoint
from training.engine.deepspeed_config import resolve
from training.engine.engine import Engine
from training.engine.optimizer import decay_groups
from training.ranks.ranks import Ranks, join


def halves(step: int) -> list[dict[str, Tensor]]:
    return [{name: tensor[part] for name, tensor in data(step).items()} for part in (slice(0, 2), slice(2, 4))]


@pytest.fixture
def ranks() -> Ranks:
    return join()


# ------------------------------------------------------------------------------------------------ weight decay


def dalle_model() -> nn.Module:
    return DALLE(tiny.recipe().transformer.model)


def dvae_model() -> nn.Module:
    return DVAE(tiny.recipe().dvae.model)


def clip_model() -> nn.Module:
    return CLIP(tiny.recipe().clip.model)


@pytest.mark.parametrize(
    ("make", "decayed", "exempt"),
    [
        (
            dalle_model,
            {"blocks.0.attention.qkv.weight", "blocks.1.mlp.out.weight", "text_head.weight", "image_head.weight"},
            {
                "text_embedding.weight",
                "text_position_embedding.weight",
                "row_embedding.weight",
                "blocks.0.mlp.wide.bias",
                "final_norm.weight",
            },
        ),
        (
            dvae_model,
            {"encoder.blocks.input.weight", "decoder.blocks.output.conv.weight"},
            {"encoder.blocks.input.bias", "decoder.blocks.output.conv.bias"},
        ),
        (
            clip_model,
            {"vision.projection.weight", "text.projection.weight"},
            {
                "logit_scale",
                "text.token_embedding.weight",
                "text.position_embedding",
                "vision.class_embedding",
                "vision.position_embedding",
            },
        ),
    ],
)
def test_gains_biases_and_embeddings_are_exempt_from_weight_decay(
    make: Callable[[], nn.Module], decayed: set[str], exempt: set[str]
) -> None:
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in decay_groups(model, OptimizerConfig(weight_decay=0.1))
    }
    assert groups[0.1] | groups[0.0] == set(names.values())
    assert not groups[0.1] & groups[0.0]
    assert decayed <= groups[0.1]
    assert exempt <= groups[0.0]
    assert not [name for name in groups[0.1] if name.endswith("bias") or "norm" in name or "embedding" in name]


# --------------------------------------------------------------------------------------- DeepSpeed's configuration


def test_clipping_is_always_explicit_and_the_batch_is_derived() -> None:
    unclipped = config(
        global_batch=12, micro_batch=2, optimizer=OptimizerConfig(gradient_clipping=0.0), precision="fp32"
    )
    derived = resolve(unclipped, 3).deepspeed
    assert derived["gradient_clipping"] == 0.0
    assert derived["timers"]["throughput"]["enabled"] is False  # its clock waits for a GPU
    assert derived["train_micro_batch_size_per_gpu"] == 2
    assert derived["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size to 8, the run's is 4"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu to 3, the run's is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps to 2, the run's is 1"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ({"optimizer": {"type": "Adam"}}, "which the recipe decides"),
        ({"checkpoint": {"load_universal": True}}, "which the training loop decides"),
        ({"bf16": {"enabled": True}}, "half precision at ZeRO stage 0"),
        ({"bf16": True}, "expected an object"),
        ('{"zero_optimization": ', "not valid JSON"),
        ([1], "holds a list"),
        ("[" * 100_000, r"ds\.json is not valid JSON \(it is nested"),
        ('{"gradient_clipping": ' + "1" * 5000 + "}", r"ds\.json is not valid JSON"),
        ('{"gradient_clipping": ' + "1" * 400 + "}", r"gradient_clipping to 1.*: expected 0 or more, up to 1e\+30"),
        ('{"gradient_clipping": NaN}', "gradient_clipping to NaN: expected 0 or more"),
    ],
)
def test_a_wrong_deepspeed_json_is_refused_in_words(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(config(deepspeed_config=user_json(tmp_path, content)), 1)


def test_a_deepspeed_json_is_merged_over_what_is_derived_and_auto_leaves_it(tmp_path: Path) -> None:
    content = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
    }
    merged = resolve(config(deepspeed_config=user_json(tmp_path, content)), 1).deepspeed
    assert merged["train_batch_size"] == 4
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert merged["bf16"] == {}


def test_a_value_that_deepspeed_refuses_is_an_error_that_names_the_file(tmp_path: Path, ranks: Ranks) -> None:
    path = user_json(tmp_path, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}})
    with pytest.raises(ValueError, match=r"DeepSpeed refuses .*ds\.json"):
        engine_of(Objective(), config(deepspeed_config=path), ranks)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistNetworkError("the connection was closed"),
        RuntimeError("Connection closed by peer"),
    ],
)
def test_a_start_that_fails_for_another_reason_does_not_blame_the_json(
    tmp_path: Path, ranks: Ranks, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(deepspeed, "initialize", fail)
    path = user_json(tmp_path, {"zero_optimization": {"stage": 2}})
    with pytest.raises(type(error)) as raised:
        engine_of(Objective(), config(deepspeed_config=path), ranks)
    assert raised.value is error


def test_half_precision_at_stage_0_and_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="needs zero_stage 1"):
        config(precision="bf16")
    for wrong in (
        {"steps": 0},
        {"workers": -1},
        {"seed": -1},
        {"zero_stage": 4},
        {"global_batch": 5, "micro_batch": 2},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config(**wrong)
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 ranks"):
        config(global_batch=4).batch_of(3)


# -------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_step_is_that_of_torchs_adamw_with_clipping(ranks: Ranks, micro_batch: int) -> None:
    settings = config(micro_batch=micro_batch)
    engine = engine_of(Objective(), settings, ranks)
    engine.train()
    reference = Objective()
    optimizer = torch.optim.AdamW(decay_groups(reference.model, settings.optimizer), betas=settings.optimizer.betas)
    for step in range(6):
        rate = 1e-2 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss, _ = reference(**data(step))
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0) > 1, "the clipping must matter"
        optimizer.step()
        metrics = engine.step(halves(step) if micro_batch == 2 else [data(step)], rate, step)
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["half"].item() == pytest.approx(loss.item() / 2, rel=1e-5)
    for ours, theirs in zip(engine.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_clipping_large_gradients_are_left_alone(ranks: Ranks) -> None:
    # AdamW hardly feels the scale of gradients, its eps does
    settings = config(optimizer=OptimizerConfig(gradient_clipping=0.0, eps=10.0, weight_decay=0.0))
    engine = engine_of(Objective(), settings, ranks)
    reference = Objective()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.96), eps=10.0, weight_decay=0.0)
    reference(**data(0))[0].backward()
    optimizer.step()
    train(engine, range(1))
    for ours, theirs in zip(engine.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_all_zero_stages_give_the_same_losses_and_averaged_weights(ranks: Ranks) -> None:
    losses, averages = [], []
    for stage in range(4):
        engine = engine_of(Objective(), config(zero_stage=stage), ranks)
        losses.append(train(engine, range(5)))
        averages.append(averages_of(engine))
    for stage in range(1, 4):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-6), f"ZeRO {stage}"
        for name, weight in averages[0].items():
            torch.testing.assert_close(averages[stage][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_and_averages_its_float32_masters(ranks: Ranks, stage: int) -> None:
    reference = engine_of(Objective(), config(), ranks)
    engine = engine_of(Objective(), config(zero_stage=stage, precision="bf16"), ranks)

    def step(one: Engine, dtype: torch.dtype, number: int) -> float:
        tensors = data(number)
        return one.step([{"x": tensors["x"].to(dtype), "y": tensors["y"]}], 1e-3, number)["loss"].item()

    for number in range(3):
        expected = step(reference, torch.float32, number)
        assert step(engine, torch.bfloat16, number) == pytest.approx(expected, rel=0.02)
    average = averages_of(engine)
    assert {weight.dtype for weight in average.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in average.values())


def test_the_gradient_norm_is_that_before_clipping(ranks: Ranks) -> None:
    reference = Objective()
    reference(**data(0))[0].backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    for stage in (1, 2, 3):  # DeepSpeed does not tell it at stage 0
        engine = engine_of(Objective(), config(zero_stage=stage), ranks)
        engine.train()
        assert float(engine.step([data(0)], 1e-2, 0)["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def test_averaged_weights_are_the_exponential_moving_average(ranks: Ranks) -> None:
    engine = engine_of(Objective(), config(ema_decay=0.7, ema_every=2), ranks)
    expected = {name: weight.detach().clone() for name, weight in engine.model.named_parameters()}
    for step in range(5):
        train(engine, range(step, step + 1))
        if step % 2 == 1:
            for name, weight in engine.model.named_parameters():
                expected[name] = 0.7 * expected[name] + 0.3 * weight.detach()
    for name, weight in averages_of(engine).items():
        torch.testing.assert_close(weight, expected[name])


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_engine_goes_on_bit_for_bit(tmp_path: Path, ranks: Ranks, stage: int) -> None:
    straight = engine_of(Objective(), config(zero_stage=stage), ranks)
    expected = train(straight, range(6))
    first = engine_of(Objective(), config(zero_stage=stage), ranks)
    losses = train(first, range(3))
    first.save(tmp_path, 3, {"rate": 0.5})
    second = engine_of(Objective(seed=1), config(zero_stage=stage), ranks)
    assert second.load(tmp_path) == {"rate": 0.5}
    assert losses + train(second, range(3, 6)) == expected
    for name, weight in averages_of(straight).items():
        assert torch.equal(averages_of(second)[name], weight)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, ranks: Ranks) -> None:
    engine = engine_of(Objective(), config(keep_last=2), ranks)
    (tmp_path / "step00000099").mkdir()  # what an interrupted save of a later step has left
    for step in (1, 2, 10):
        engine.save(tmp_path, step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step00000002", "step00000010"]
    assert latest_tag(tmp_path) == "step00000010"
    assert read_checkpoint(tmp_path)["step"] == 10


@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(
    tmp_path: Path, ranks: Ranks, stage: int
) -> None:
    engine = engine_of(Objective(), config(zero_stage=stage), ranks)
    engine.save(tmp_path, 1, {})
    pickles = list((tmp_path / "step00000001").glob("*.pt"))
    assert len(pickles) == (2 if stage else 1)
    for path in pickles:
        good = path.read_bytes()
        torch.save({"module": Bomb(tmp_path / "ran"), "optimizer_state_dict": Bomb(tmp_path / "ran")}, path)
        with pytest.raises(ValueError, match="cannot be loaded"):
            engine.load(tmp_path)
        assert not (tmp_path / "ran").exists()
        path.write_bytes(good)
    engine.load(tmp_path)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "ema.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(
    tmp_path: Path, ranks: Ranks, name: str, damage: str
) -> None:
    engine = engine_of(Objective(), config(), ranks)
    engine.save(tmp_path, 1, {})
    path = tmp_path / "step00000001" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"step00000001.*latest.*--fresh"):
        engine.load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    engine_of(Objective(), config(), ranks).save(tmp_path, 1, {})
    with pytest.raises(ValueError, match="of another model"):
        engine_of(Objective(width=6), config(), ranks).load(tmp_path)


def test_a_checkpoint_of_a_stage_that_cannot_be_gone_on_from_is_refused_in_words(tmp_path: Path, ranks: Ranks) -> None:
    engine_of(Objective(), config(zero_stage=1), ranks).save(tmp_path, 1, {})
    for stage in (0, 3):
        with pytest.raises(ValueError, match=f"at ZeRO stage 1, this run is at {stage}: use --zero-stage 1 or 2"):
            engine_of(Objective(), config(zero_stage=stage), ranks).load(tmp_path)


@pytest.mark.parametrize("writer", ["torch.save", "training.engine.engine.save_file"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_is_an_os_error_and_leaves_the_checkpoint_before(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, writer: str, error: Exception
) -> None:
    engine = engine_of(Objective(), config(), ranks)
    train(engine, range(2))
    engine.save(tmp_path, 2, {"n": 2})
    train(engine, range(2, 3))

    def full(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 30, free=1 << 10))
        with pytest.raises(OSError, match=r"could not save .*step00000003.*free some space.*step00000002 is kept"):
            engine.save(tmp_path, 3, {"n": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step00000002"]
    assert engine_of(Objective(), config(), ranks).load(tmp_path) == {"n": 2}
    engine.save(tmp_path, 3, {"n": 3})
    assert latest_tag(tmp_path) == "step00000003"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("write failed")])
def test_only_of_a_full_disk_is_it_said_that_space_is_missing(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("torch.save", fails)
    with pytest.raises(OSError, match=r"could not save .*no earlier checkpoint exists") as caught:
        engine_of(Objective(), config(), ranks).save(tmp_path, 3, {"n": 3})
    assert "space" not in str(caught.value)


def test_saved_averages_are_those_of_the_engine(tmp_path: Path, ranks: Ranks) -> None:
    engine = engine_of(Objective(), config(), ranks)
    train(engine, range(3))
    engine.save(tmp_path, 3, {})
    saved = load_file(tmp_path / "step00000003" / "ema.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        name: tensor.tolist() for name, tensor in averages_of(engine).items()
    }
    assert all(math.isfinite(tensor.sum().item()) for tensor in saved.values())
