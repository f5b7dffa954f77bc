"""Every precision, ZeRO stage and offloading: what they are told, that they agree, and steps that are not finite."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import tiny
from support.engines import Objective, averages_of, config, data, engine_of, transformer_objective, user_json
from support.modes import MODES, allow_every_precision
from support.ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import training.cli.main
import training.loop.fit
import training.loop.throughput
import training.recipes
from dalle.model import DALLE
from dalle.sampling import Sampling, sample
from dalle.stream import text_row
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from training.cli.options import changed_run
from training.config import OptimizerConfig, TrainConfig
from training.engine.deepspeed_config import PRESETS, preset_path, resolve, with_files
from training.engine.engine import Engine
from training.engine.optimizer import VarianceClippedAdamW, build_optimizer
from training.engine.parts.ema import EMA
from training.loop.skipped_steps import SkippedSteps
from training.ranks.ranks import Ranks, join
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in PRESETS.glob("*.json"))
HALF = {"bf16", "fp16"}
PRECISION_KEYS = {"autocast": "torch_autocast", "bf16": "bf16", "fp16": "fp16"}
"""What DeepSpeed calls the precisions."""


@pytest.fixture
def ranks() -> Ranks:
    return join()


@pytest.fixture
def with_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DeepSpeed believe that this CPU computes in float16; it does, slowly."""
    from deepspeed import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True, raising=False)


# ------------------------------------------------------------------------------------- presets and what they change


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "recipe",
    [{}, {"precision": "bf16", "zero_stage": 2}, {"precision": "autocast"}, {"precision": "autocast-fp16"}],
)
def test_a_preset_is_what_its_name_says_whatever_the_recipe_says(name: str, recipe: dict[str, Any]) -> None:
    merged = resolve(config(preset=name, **recipe), 1).deepspeed
    precision = name.split("-")[-1]
    assert merged["zero_optimization"]["stage"] == (int(name[4]) if name.startswith("zero") else 0)
    for key, called in (("bf16", "bf16"), ("fp16", "fp16"), ("torch_autocast", "autocast")):
        assert bool(merged.get(key, {}).get("enabled")) == (precision == called)
    assert ("offload_optimizer" in merged["zero_optimization"]) == ("offload" in name)
    assert ("offload_param" in merged["zero_optimization"]) == (name == "zero3-offload-bf16")
    assert merged.get("data_types") == ({"grad_accum_dtype": "fp32"} if precision in HALF else None)
    assert merged["gradient_clipping"] == 1.0
    assert merged["zero_force_ds_cpu_optimizer"] is False
    assert "purpose" not in merged
    assert with_files(config(preset=name, **recipe))[0].precision == precision


def test_every_preset_is_listed_with_what_it_is_for_and_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"fp32", "zero1-bf16", "zero2-bf16", "zero2-offload-bf16", "zero3-bf16", "zero3-offload-bf16"} <= set(NAMES)
    assert training.cli.main.main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name in NAMES:
        content = json.loads(preset_path(name).read_text())
        assert f"{name} " in listed
        assert content["purpose"] in listed
        assert training.cli.main.main(["presets", name]) == 0
        assert json.loads(capsys.readouterr().out) == content
    assert training.cli.main.main(["presets", "zero2-fb16"]) == 1
    assert "did you mean 'zero2-" in capsys.readouterr().err


def test_a_copy_of_a_preset_is_a_configuration_of_ones_own(tmp_path: Path) -> None:
    for name in NAMES:
        copy = Path(shutil.copy(preset_path(name), tmp_path / "ds.json"))
        assert resolve(config(deepspeed_config=copy), 1).deepspeed == resolve(config(preset=name), 1).deepspeed


def test_presets_are_package_data() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "training.engine"
    ]
    found = {path for pattern in declared for path in (ROOT / "training" / "engine").glob(pattern)}
    assert set(PRESETS.iterdir()) <= found


@pytest.mark.slow
def test_an_installed_wheel_has_the_presets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for package in ("dalle", "dvae", "rerank", "storage", "training", "unclip"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "wheels"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next((source / "wheels").glob("*.whl"))).namelist()
    assert {f"training/engine/presets/{name}.json" for name in NAMES} <= set(names)


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        (
            {"zero_stage": 2},
            {"zero_optimization": {"stage": 3}},
            r"says zero stage 3, and --zero-stage says 2",
        ),
        ({"precision": "fp32"}, {"bf16": {"enabled": True}}, r"says precision bf16, and --precision says fp32"),
        ({"precision": "bf16"}, {"bf16": {"enabled": False}}, r"says precision fp32, and --precision says bf16"),
        ({"precision": "bf16"}, {"fp16": {"enabled": True}}, r"says precision fp16, and --precision says bf16"),
        ({}, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, r"enables bf16 and fp16: choose one"),
        ({"gradient_clipping": 4.0}, {"gradient_clipping": 1.0}, r"clipping 1\.0, and --gradient-clipping says 4\.0"),
        (
            {"offload": "none"},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            r"says offload optimizer, and --offload says none",
        ),
        (
            {"preset": "zero2-bf16", "zero_stage": 1},
            None,
            r"preset zero2-bf16 says zero stage 2, and --zero-st",
        ),
        ({"preset": "zero2-bf16", "precision": "fp32"}, None, r"preset zero2-bf16 says precision bf16"),
        (
            {"preset": "zero2-bf16"},
            {"zero_optimization": {"stage": 3}},
            r"ds\.json sets zero_optimization\.stage to 3, and the preset zero2-bf16 to 2",
        ),
        (
            {"preset": "zero1-autocast"},
            {"bf16": {"enabled": True}},
            r"bf16, and preset zero1-autocast says",
        ),
        (
            {"preset": "fp32", "precision": "autocast-fp16"},
            None,
            r"preset fp32 says precision fp32, and --precision says autocast-fp16",
        ),
        ({"preset": "zero9"}, None, r"no preset is called 'zero9'"),
        ({}, {"zero_optimization": {"stage": "two"}}, r"stage to \"two\": expected 0, 1, 2 or 3"),
        ({}, {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, r"parameters needs zero_stage 3"),
        ({}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"needs zero_stage 1, 2 or 3"),
        (
            {},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            r"offload_optimizer\.device to \"nvme\": expected \"cpu\" or \"none\"",
        ),
        ({}, {"gradient_clipping": "much"}, r"gradient_clipping to \"much\": expected 0 or more"),
        ({}, {"bf16": {"enabled": True, "check_grad_overflow": False}}, r"steps that are not finite are skipped"),
        ({}, {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, r"steps that are not finite are skipped"),
        ({"variance_clip": 0.0}, None, r"variance_clip must be above 0"),
        ({"precision": "fp16"}, None, r"precision fp16 needs zero_stage 1, 2 or 3"),
        ({"offload": "parameters", "zero_stage": 2}, None, r"offload parameters needs zero_stage 3"),
        ({"max_skipped_steps": -1}, None, r"max_skipped_steps must be at least 0"),
        ({"powersgd_rank": 2, "preset": "zero2-bf16"}, None, r"powersgd_rank needs zero_stage 0 or 1, got 2"),
        ({"gradient_scaling": "per-resblock", "preset": "fp32"}, None, r"is for precision autocast-fp16, got fp32"),
    ],
)
def test_a_contradiction_names_both_sides(
    tmp_path: Path, options: dict[str, Any], content: object, message: str
) -> None:
    if content is not None:
        options = {**options, "deepspeed_config": user_json(tmp_path, content)}
    with pytest.raises(ValueError, match=message):
        changed_run(config(), options)


def test_a_json_may_change_what_the_recipe_says_and_a_line_tells_each_change(tmp_path: Path) -> None:
    content = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "gradient_clipping": 2.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    }
    path = user_json(tmp_path, content)
    recipe = config(precision="autocast", deepspeed_config=path)
    changed, lines = with_files(recipe)
    assert (changed.precision, changed.zero_stage, changed.offload) == ("bf16", 2, "optimizer")
    assert changed.optimizer.gradient_clipping == 2.0
    assert lines == [
        f"{path}: precision bf16, instead of the recipe's autocast",
        f"{path}: zero stage 2, instead of the recipe's 0",
        f"{path}: offload optimizer, instead of the recipe's none",
        f"{path}: gradient clipping 2.0, instead of the recipe's 1.0",
        f'{path}: data_types.grad_accum_dtype "bf16", instead of "fp32"',
        f"{path}: zero_optimization.offload_optimizer.pin_memory false, instead of true",
    ]
    merged = resolve(recipe, 1).deepspeed
    assert "torch_autocast" not in merged
    assert {key: merged[key] for key in content} == content


@pytest.mark.parametrize("preset", [name for name in NAMES if "fp16" not in name])
def test_engine_log_and_config_json_have_the_precision_and_stage_of_a_preset(
    preset: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[str] = []
    monkeypatch.setattr(training.loop.throughput, "peak_flops", lambda device, precision, peak: peaks.append(precision))
    monkeypatch.setattr(training.loop.fit, "has_bfloat16_arithmetic", lambda device: True)
    engines: list[Engine] = []
    monkeypatch.setattr(training.loop.fit, "Engine", lambda *given: engines.append(Engine(*given)) or engines[-1])
    recipe = tiny.recipe(precision="autocast", preset=preset, steps=1)
    train_tokenizer(recipe, Inputs(data=[shards], out=tmp_path), print)
    DVAE(recipe.dvae.model).save(tmp_path / "dvae", metadata={})
    train_transformer(recipe, Inputs(data=[shards], out=tmp_path), join(), lambda line: None)
    (engine,) = engines
    written = json.loads((tmp_path / "training" / "transformer" / "config.json").read_text())["training"]
    assert (written["precision"], written["preset"]) == (engine.config.precision, preset)
    assert (written["zero_stage"], written["offload"]) == (engine.stage, engine.config.offload)
    assert peaks == [engine.config.precision]
    is_enabled = {name: engine.deepspeed_config.get(key, {}).get("enabled") for name, key in PRECISION_KEYS.items()}
    assert [name for name, on in is_enabled.items() if on] == [engine.config.precision] * (preset != "fp32")


def test_what_a_preset_makes_possible_is_not_refused_for_the_recipe_that_it_replaces() -> None:
    recipe = config(precision="bf16", zero_stage=2)
    changed, _ = with_files(changed_run(recipe, {"preset": "autocast", "powersgd_rank": 64}))
    assert (changed.precision, changed.zero_stage, changed.powersgd_rank) == ("autocast", 0, 64)


def test_options_that_agree_with_a_preset_are_no_contradiction() -> None:
    options = {"preset": "zero2-bf16", "precision": "bf16", "zero_stage": 2}
    changed, _ = with_files(changed_run(config(), options))
    assert (changed.precision, changed.zero_stage) == ("bf16", 2)


def test_the_batch_is_said_once_and_told_in_one_line(ranks: Ranks) -> None:
    engine = engine_of(Objective(), config(global_batch=12, micro_batch=3), ranks)
    assert engine.batch == "global batch 12 = 3 per process × 1 process × 4 accumulated"


# ------------------------------------------------------------------------------------------------- modes that agree


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return transformer_objective(DALLE(tiny.recipe().transformer.model))


def tokens(step: int, n: int = 8) -> dict[str, Tensor]:
    """A batch of the transformer's objective, with captions of several lengths."""
    model = tiny.recipe().transformer.model
    generator = torch.Generator().manual_seed(step)
    text = [
        text_row(
            torch.randint(model.text_vocab, (3 + i,), generator=generator).tolist(), model.text_vocab, model.text_len
        )
        for i in range(n)
    ]
    image_tokens = torch.randint(model.image_vocab, (n, model.grid**2), generator=generator)
    return {"text": torch.tensor(text), "image_tokens": image_tokens, "n_cut": torch.zeros(n)}


def parts(tensors: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    chunks = {name: tensor.chunk(n) for name, tensor in tensors.items()}
    return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(n)]


def run_of(precision: str, stage: int, offload: str, accumulation: int = 1, ranks: int = 1, **more: Any) -> TrainConfig:
    return config(
        global_batch=8,
        micro_batch=8 // (accumulation * ranks),
        precision=precision,
        zero_stage=stage,
        offload=offload,
        **more,
    )


def losses(engine: Engine, ranks: Ranks, steps: int = 4) -> list[float]:
    engine.train()
    found = []
    for step in range(steps):
        own = parts(tokens(step), ranks.size)[ranks.rank]
        # the rate is low: AdamW's first steps would turn rounding in a gradient near 0 into a visible difference
        loss = engine.step(parts(own, engine.accumulation), 1e-4, step)["loss"].clone()
        dist.all_reduce(loss)
        found.append(loss.item() / ranks.size)
    return found


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """Losses of one process in float32 at ZeRO 0, without accumulation."""
    return losses(engine_of(transformer(), run_of("fp32", 0, "none"), join()), join())


def tolerance(precision: str) -> float:
    return 1e-5 if precision == "fp32" else 1e-2


@pytest.mark.parametrize(
    ("precision", "stage", "offload"),
    [pytest.param(*mode, marks=pytest.mark.slow) if mode[1] == 3 and mode[0] != "fp32" else mode for mode in MODES],
)
def test_every_mode_gives_the_losses_of_float32_whole(
    ranks: Ranks, reference: list[float], precision: str, stage: int, offload: str
) -> None:
    engine = engine_of(transformer(), run_of(precision, stage, offload), ranks)
    assert losses(engine, ranks) == pytest.approx(reference, abs=tolerance(precision))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage", "offload"), MODES)
def test_accumulation_changes_nothing(ranks: Ranks, precision: str, stage: int, offload: str) -> None:
    model = tiny.recipe().transformer.model
    # captions are counted per micro-batch: see docs/paper.md; without them the losses are the same
    empty = torch.tensor(text_row([], model.text_vocab, model.text_len))

    def run(n: int) -> tuple[list[float], dict[str, Tensor]]:
        engine = engine_of(transformer(), run_of(precision, stage, offload, n), ranks)
        engine.train()
        batches = [{**tokens(step), "text": empty.expand(8, -1)} for step in range(3)]
        found = [engine.step(parts(batch, n), 1e-4, step)["loss"].item() for step, batch in enumerate(batches)]
        return found, averages_of(engine)

    once, weights = run(1)
    for accumulation in (2, 4):
        often, others = run(accumulation)
        assert often == pytest.approx(once, abs=tolerance(precision))
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-5 if precision == "fp32" else 4e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_half_precision_are_accumulated_in_float32(ranks: Ranks, stage: int) -> None:
    """31 small gradients after a large one: in bfloat16, whose numbers have 8 bits, they would add nothing to it."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.model(x.bfloat16()).float().sum(), {}

    n, unclipped = 32, OptimizerConfig(gradient_clipping=0.0)
    settings = config(global_batch=n, micro_batch=1, precision="bf16", zero_stage=stage, optimizer=unclipped)
    engine = engine_of(Slope(), settings, ranks)
    engine.train()
    large, small = torch.full((1, 2), 256.0), torch.full((1, 2), 0.75)
    norm = engine.step([{"x": large}] + [{"x": small}] * (n - 1), 1e-3, 0)["grad_norm"]
    assert float(norm) == pytest.approx(math.sqrt(2) * (256 + 31 * 0.75) / 32, rel=5e-3)


def test_fp16_is_refused_in_words_where_the_device_has_none(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False, raising=False)
    with pytest.raises(ValueError, match="this cpu does not compute in fp16: use precision bf16, autocast or fp32"):
        engine_of(Objective(), config(precision="fp16", zero_stage=1), ranks)


@pytest.mark.usefixtures("with_fp16")
@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_fp16_trains_with_a_loss_scale_and_lowers_it_where_it_is_too_large(
    ranks: Ranks, reference: list[float], stage: int, tmp_path: Path
) -> None:
    path = user_json(tmp_path, {"fp16": {"initial_scale_power": 30, "hysteresis": 1}})
    engine = engine_of(transformer(), run_of("fp16", stage, "none", deepspeed_config=path), ranks)
    engine.train()
    scales, applied = [], []
    for _ in range(30):
        metrics = engine.step([tokens(0)], 0.0, 0)
        scales.append(metrics["loss_scale"].item())
        applied.append(engine.applied)
        assert engine.overflowed == (not engine.applied)
        if engine.applied:
            break
    assert scales[0] == 2**30
    assert len(scales) > 1
    assert all(later == earlier / 2 for earlier, later in itertools.pairwise(scales))
    assert applied == [0] * (len(applied) - 1) + [1]
    assert losses(engine, ranks) == pytest.approx(reference, abs=1e-2)


@pytest.mark.usefixtures("with_fp16")
def test_fp16_at_its_smallest_loss_scale_is_told_apart_from_an_overflow(ranks: Ranks, tmp_path: Path) -> None:
    path = user_json(tmp_path, {"fp16": {"initial_scale_power": 1, "hysteresis": 1}})
    engine = engine_of(transformer(), run_of("fp16", 2, "none", deepspeed_config=path), ranks)
    engine.train()
    with torch.no_grad():
        engine.model.get_parameter("final_norm.bias")[0] = math.nan
    told = []
    for step in range(4):
        engine.step([tokens(step)], 1e-4, step)
        told.append((engine.applied, engine.overflowed))
    assert told == [(0, True), (0, False), (0, False), (0, False)]


# ------------------------------------------------------------------------------------------- steps not finite


class _Tilted(torch.autograd.Function):
    """The same number, with something added to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slope)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream + ctx.saved_tensors[0], None


class SpoilableObjective(Objective):
    """The batch says what is added to its loss, and to its gradient."""

    def forward(self, x: Tensor, y: Tensor, loss: Tensor, slope: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        predicted = self.model(x.to(self.model[0].weight.dtype)).float()
        return F.mse_loss(_Tilted.apply(predicted, slope), y) + loss, {}


def spoilable(step: int, *, loss: float = 0.0, slope: float = 0.0) -> dict[str, Tensor]:
    return {**data(step), "loss": torch.tensor(loss), "slope": torch.tensor(slope)}


def state_of(engine: Engine) -> dict[str, Any]:
    """The weights, moments, step counts and averaged weights of this rank."""
    optimizer = engine._engine.optimizer
    states = (optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer).state
    moments = [state[name].clone() for state in states.values() for name in ("step", "exp_avg", "exp_avg_sq")]
    weights = engine._gather()
    return {
        "moments": moments,
        "weights": {name: weight.detach().clone() for name, weight in weights.items()},
        "averages": {name: average.clone() for name, average in averages_of(engine).items()},
    }


BAD = {
    "a loss that is NaN": {"loss": math.nan},
    "a loss that is infinite, with a finite gradient": {"loss": math.inf},
    "a gradient that is NaN": {"slope": math.nan},
    "a gradient that is infinite": {"slope": math.inf},
}


@pytest.mark.slow
@pytest.mark.parametrize("variance_clip", [None, 5.0])
@pytest.mark.parametrize(("precision", "stage", "offload"), MODES)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    ranks: Ranks, precision: str, stage: int, offload: str, variance_clip: float | None
) -> None:
    """At the first step too, where there are no moments yet, and in one of several accumulated batches."""
    optimizer = OptimizerConfig(gradient_clipping=1.0, variance_clip=variance_clip)
    settings = config(
        global_batch=8, micro_batch=4, precision=precision, zero_stage=stage, offload=offload, optimizer=optimizer
    )
    spoilt = dict(zip((0, 3, 4, 6), BAD.values(), strict=True))

    def run(steps: list[int]) -> tuple[list[int], dict[str, Any]]:
        engine = engine_of(SpoilableObjective(), settings, ranks)
        engine.train()
        applied = []
        for step in steps:
            engine.step([spoilable(step), spoilable(step + 50, **spoilt.get(step, {}))], 1e-2, step)
            applied.append(int(engine.applied))
            assert engine.overflowed is False
        return applied, state_of(engine)

    applied, state = run(list(range(8)))
    expected_applied, expected = run([step for step in range(8) if step not in spoilt])
    assert applied == [int(step not in spoilt) for step in range(8)]
    assert expected_applied == [1] * 4
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_what_only_the_device_knows_of_a_step_reaches_the_averages_there() -> None:
    weights = {"w": torch.tensor([1.0, 2.0])}
    for applied in (0, 1):
        told, kept_there = EMA({"w": torch.zeros(2)}, 0.9), EMA({"w": torch.zeros(2)}, 0.9)
        told.update(weights, applied)
        kept_there.update(weights, torch.tensor(float(applied)))
        assert torch.equal(told.average["w"], kept_there.average["w"])
        assert torch.allclose(told.average["w"], 0.1 * applied * weights["w"])


# ---------------------------------------------------------------------------------------------- skipped steps


def skipped(limit: int) -> tuple[SkippedSteps, list[str]]:
    said: list[str] = []
    return SkippedSteps(limit, join(), said.append), said


@pytest.mark.parametrize("flag", [int, lambda applied: torch.tensor(float(applied))])
def test_skipped_steps_are_counted_told_and_bounded_in_a_row(flag: Callable[[int], int | Tensor]) -> None:
    steps, said = skipped(limit=2)
    for number, applied in enumerate([1, 0, 0, 1, 0, 0]):
        steps.add(number, flag(applied), torch.tensor(1.0), [f"key{number}"])
    assert not steps.check()
    assert (steps.n, steps.first_in_row) == (4, 4)
    steps.add(6, flag(0), torch.tensor(math.nan), [f"k{i}" for i in range(50)])
    assert steps.check()
    assert steps.first_in_row == 4
    assert said[0] == "step 2 is skipped, the gradient is not finite: its samples are key1"
    assert said[-1].startswith("step 7 is skipped, the loss is nan: its samples are k0, k1, ")
    assert said[-1].endswith(" k19 and 30 more")


def test_overflows_are_counted_but_are_not_a_row() -> None:
    steps, said = skipped(limit=1)
    for number in range(5):
        steps.add(number, 0, torch.tensor(1.0), ["key"], overflowed=True)
        assert not steps.check()
    assert steps.n == 5
    assert said[0] == "step 1 is skipped: its float16 gradient overflowed, the loss scale falls"
    for number in (5, 6):
        steps.add(number, 0, torch.tensor(1.0), ["key"])
    assert steps.check()


def test_a_check_is_due_before_a_row_can_be_much_too_long() -> None:
    steps, _ = skipped(limit=3)
    for number in range(3):
        steps.add(number, 1, torch.tensor(1.0), [])
        assert not steps.is_check_due
    steps.add(3, 1, torch.tensor(1.0), [])
    assert steps.is_check_due


# ---------------------------------------------------------------------------------------------- variance clip


def clipped_adamw(
    weight: Tensor, gradients: list[Tensor], rate: float, optimizer: OptimizerConfig
) -> tuple[Tensor, Tensor]:
    """AdamW with a bound on the running variance, as one writes it down; returns weight and variance in float64."""
    weight, mean, variance = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    beta1, beta2 = optimizer.betas
    assert optimizer.variance_clip is not None
    for n, gradient in enumerate(gradients, 1):
        mean = beta1 * mean + (1 - beta1) * gradient.double()
        variance = (beta2 * variance + (1 - beta2) * gradient.double() ** 2).clamp(max=optimizer.variance_clip)
        update = (mean / (1 - beta1**n)) / ((variance / (1 - beta2**n)).sqrt() + optimizer.eps)
        weight = weight - rate * (update + optimizer.weight_decay * weight)
    return weight, variance


class Given(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3, bias=False)

    def forward(self, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.model.weight * gradient).sum(), {}


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer")])
def test_the_running_variance_is_at_most_its_bound_before_it_is_used(ranks: Ranks, stage: int, offload: str) -> None:
    optimizer = OptimizerConfig(gradient_clipping=0.0, variance_clip=5.0)
    engine = engine_of(Given(), config(zero_stage=stage, offload=offload, optimizer=optimizer), ranks)
    engine.train()
    before = engine._gather()["weight"].detach().clone().cpu()
    generator = torch.Generator().manual_seed(0)
    # 0.04 of the square of a gradient of 30 is above the bound, that of a gradient of 1 far below
    gradients = [torch.randn(3, 4, generator=generator) * torch.tensor([0.1, 1, 30, 300]) for _ in range(5)]
    for step, gradient in enumerate(gradients):
        engine.step([{"gradient": gradient}], 1e-2, step)
    weight, variance = clipped_adamw(before, gradients, 1e-2, optimizer)
    unbounded, large = clipped_adamw(before, gradients, 1e-2, dataclasses.replace(optimizer, variance_clip=math.inf))
    assert variance.max() == 5.0
    assert large.max() > 100
    torch.testing.assert_close(engine._gather()["weight"].detach().cpu().double(), weight, rtol=1e-5, atol=1e-6)
    assert (weight - unbounded).abs().max() > 1e-2
    largest = max(moment.max() for moment in state_of(engine)["moments"][2::3])
    assert largest == 5.0


def test_without_variances_above_the_bound_it_is_torchs_adamw(ranks: Ranks) -> None:
    settings = OptimizerConfig()
    ours, theirs = Objective(), Objective()
    clipped = build_optimizer(ours.model, dataclasses.replace(settings, variance_clip=1e6), 1e-2, ranks)
    plain = build_optimizer(theirs.model, settings, 1e-2, ranks)
    assert isinstance(clipped, VarianceClippedAdamW)
    assert not isinstance(plain, VarianceClippedAdamW)
    for step in range(5):
        for objective, optimizer in ((ours, clipped), (theirs, plain)):
            optimizer.zero_grad()
            objective(**data(step))[0].backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- two ranks


Mode = tuple[str, int, str]
RANK_MODES: list[Mode] = [*MODES, ("fp16", 1, "none"), ("fp16", 3, "none")]
SPOILT_MODES: list[Mode] = [
    mode for mode in MODES if mode not in {("fp32", 1, "optimizer"), ("fp32", 3, "optimizer"), ("autocast", 1, "none")}
]


def rank_losses(ranks: Ranks, modes: list[Mode], accumulation: int) -> list[list[float]]:
    allow_every_precision()
    return [losses(engine_of(transformer(), run_of(*mode, accumulation, ranks.size), ranks), ranks) for mode in modes]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_mode_gives_the_same_losses_on_two_ranks(tmp_path: Path, stage: int, accumulation: int) -> None:
    modes = [("fp32", 0, "none"), *(mode for mode in RANK_MODES if mode[1] == stage)]
    for reference, *found in on_ranks(tmp_path, rank_losses, modes, accumulation):
        for mode, given in zip(modes[1:], found, strict=True):
            assert given == pytest.approx(reference, abs=tolerance(mode[0])), mode


def steps_with_a_bad_one(ranks: Ranks, mode: Mode, spoilt: int | None, bad: str) -> tuple[list[int], Any]:
    """Steps 0 to 3; step 1 is bad on one rank alone, or left out."""
    precision, stage, offload = mode
    settings = config(global_batch=16, micro_batch=4, precision=precision, zero_stage=stage, offload=offload)
    engine = engine_of(SpoilableObjective(), settings, ranks)
    engine.train()
    applied = []
    for step in range(4):
        if step == 1 and spoilt is None:
            continue
        value = BAD[bad] if step == 1 and ranks.rank == spoilt else {}
        own = [spoilable(10 * step + ranks.rank), spoilable(10 * step + 5 + ranks.rank, **value)]
        engine.step(own, 1e-2, step)
        applied.append(int(engine.applied))
    return applied, as_lists(state_of(engine))


def as_lists(state: Any) -> Any:
    """Return nested tensors as lists: a tensor does not outlive the process that sends it."""
    if isinstance(state, dict):
        return {name: as_lists(part) for name, part in state.items()}
    return [as_lists(part) for part in state] if isinstance(state, list) else state.tolist()


def bad_on_one(ranks: Ranks, mode: Mode) -> list[tuple[list[int], Any]]:
    """The run without a step; then with it, bad on the first rank, and on the second one."""
    runs = [(None, ""), (0, "a loss that is NaN"), (1, "a gradient that is infinite"), (1, "a loss that is NaN")]
    return [steps_with_a_bad_one(ranks, mode, spoilt, bad) for spoilt, bad in runs]


@pytest.mark.slow
@pytest.mark.parametrize("mode", SPOILT_MODES)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_leaves_no_trace(tmp_path: Path, mode: Mode) -> None:
    for (_, expected), *runs in on_ranks(tmp_path, bad_on_one, mode):
        for applied, state in runs:
            assert applied == [1, 0, 1, 1]
            assert state == expected


def told_of_skipped(ranks: Ranks) -> list[str]:
    said: list[str] = []
    steps = SkippedSteps(5, ranks, said.append)
    loss = math.nan if ranks.rank == 1 else 1.0
    steps.add(0, 1, torch.tensor(1.0), ["fine"])
    steps.add(1, 0, torch.tensor(loss), [f"rank{ranks.rank}-{i}" for i in range(3)])
    steps.check()
    return said


@pytest.mark.slow
def test_the_samples_of_all_ranks_are_named_those_to_blame_first(tmp_path: Path) -> None:
    for said in on_ranks(tmp_path, told_of_skipped):
        assert said == [
            "step 2 is skipped, the loss is nan: its samples are rank1-0, rank1-1, rank1-2, rank0-0, rank0-1, rank0-2"
        ]


# ----------------------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a bundle with a tokenizer and a dVAE, but no transformer."""
    folder = tmp_path_factory.mktemp("modes")
    tiny.write_world(folder / "world")
    train_tokenizer(tiny.recipe(), Inputs(data=[folder / "world"], out=folder / "bundle"), lambda line: None)
    torch.manual_seed(0)
    DVAE(tiny.recipe().dvae.model).save(folder / "bundle" / "dvae")
    return folder


def train_exported(ranks: Ranks, folder: Path, modes: list[Mode]) -> list[list[str]]:
    """Train a bundle's transformer in each mode; returns what was said."""
    allow_every_precision()
    said: list[list[str]] = []
    for precision, stage, offload in modes:
        # the first of so few steps must not be spent on lowering the loss scale
        scale = user_json(folder, {"fp16": {"initial_scale_power": 8}}) if precision == "fp16" else None
        chosen = tiny.recipe(
            global_batch=8, precision=precision, zero_stage=stage, offload=offload, deepspeed_config=scale
        )
        said.append([])
        out = folder / f"{precision}-{stage}-{offload}"
        train_transformer(chosen, Inputs(data=[folder / "world"], out=out), ranks, said[-1].append)
    return said


def generated(bundle: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The exported weights, and the tokens at temperature 0 of two captions."""
    model = DALLE.load(bundle / "dalle")
    tokenizer = Tokenizer.load(bundle / "tokenizer.json")
    text, _ = tokenizer.text(["a small red circle", "a large blue square"], model.config.text_len)
    return load_file(bundle / "dalle" / "model.safetensors"), sample(
        model, text, [0, 0], Sampling(temperature=0.0)
    ).tokens


EXPORTED = [mode for mode in RANK_MODES if mode[:2] != ("autocast", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_export_of_every_mode_draws_the_same_pictures(tmp_path: Path, untrained: Path, stage: int) -> None:
    modes = [("fp32", 0, "none"), *(mode for mode in EXPORTED if mode[1] == stage)]
    if stage == 1:
        modes.append(("autocast", 0, "none"))
    folder = shutil.copytree(untrained, tmp_path / "modes")
    bundles = [shutil.copytree(folder / "bundle", folder / "-".join(map(str, mode))) for mode in modes]
    said, _ = on_ranks(tmp_path / "ranks", train_exported, folder, modes)
    assert all("transformer: global batch 8 = 4 per process × 2 processes × 1 accumulated" in lines for lines in said)
    (expected_weights, expected), *others = map(generated, bundles)
    for mode, (weights, drawn) in zip(modes[1:], others, strict=True):
        assert {name: weight.shape for name, weight in weights.items()} == {
            name: weight.shape for name, weight in expected_weights.items()
        }
        far = max(float((weights[name] - weight).abs().max()) for name, weight in expected_weights.items())
        assert far < 1e-5 if mode[0] == "fp32" else 0 < far < 1e-2, mode
        same = float((drawn == expected).float().mean())
        assert same == 1.0 if mode[0] == "fp32" else same > 0.5, mode
