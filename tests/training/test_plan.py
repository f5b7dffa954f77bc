"""Plans: the model of memory against what autograd keeps and processes hold, arithmetic, recommendations, the text."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.training_memory import CASES, kept_by_autograd, measured
from dalle.attention import KINDS, Kind
from dalle.model import DALLE, DALLEConfig
from dalle.output.text import GIB
from training.cli.main import main
from training.config import Precision
from training.engine.parts.buffers import MAX_BUCKET
from training.plan.activations import Activations, activations
from training.plan.flops import flops_per_sample, training_flops
from training.plan.memory_model import Memory, Run, host_peak, moments, peak, training_peak
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.plan.state import Mode, Sizes, modes_of, preset_name, shapes_only, state_bytes
from training.plan.text import text
from training.plan.types import RESERVED_FRACTION, Plan
from training.recipes import recipe


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ZeRO 3, DeepSpeed's linear stays in its place in this process, and keeps other tensors."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


PRECISIONS: tuple[Precision, ...] = ("fp32", "autocast", "bf16")


def small(kind: Kind = "row", grid: int = 16, **changes: int) -> DALLEConfig:
    return DALLEConfig(
        **{"n_layers": 2, "d_model": 64, "n_heads": 4, "text_len": 32, "text_vocab": 300, "image_vocab": 64} | changes,
        grid=grid,
        conv_kernel=5,
        attention=kind,
    )


def predicted(config: DALLEConfig, precision: Precision, n: int, *, checkpointing: bool = False) -> Activations:
    return activations(config, precision, n, checkpointing=checkpointing, device="cpu")


def run_of(mode: Mode, **changes: object) -> Run:
    config = small()
    with shapes_only():
        sizes = Sizes.of(DALLE(config))
    settings = {"sizes": sizes, "gpus": 4, "micro_batch": 2, "accumulation": 1, "checkpointing": False}
    return Run(config=config, mode=mode, **{**settings, **changes})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- against what is measured


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("grid", [8, 16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_autograd_keeps(kind: Kind, precision: Precision, grid: int, micro_batch: int) -> None:
    config = small(kind, grid)
    kept = kept_by_autograd(config, precision, micro_batch, checkpointing=False)
    assert predicted(config, precision, micro_batch).kept == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("changes", [{"n_heads": 1}, {"n_layers": 5}, {"d_model": 96}, {"text_len": 9}])
def test_what_is_kept_follows_every_size(changes: dict[str, int]) -> None:
    config = small(**changes)
    for precision in PRECISIONS:
        kept = kept_by_autograd(config, precision, 2, checkpointing=False)
        assert predicted(config, precision, 2).kept == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_recomputed_layers_only_the_inputs_are_kept(precision: Precision) -> None:
    config = small()
    kept = kept_by_autograd(config, precision, 2, checkpointing=True)
    assert predicted(config, precision, 2, checkpointing=True).kept == pytest.approx(kept, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_peaks_are_within_15_percent_of_those_of_processes(name: str) -> None:
    assert CASES[name].predicted()[1].total == pytest.approx(measured(name), rel=0.15)


# ----------------------------------------------------------------------------------------- the model of memory


def test_the_measured_cases_differ_in_what_decides_about_memory() -> None:
    cases = CASES.values()
    assert len({case.config for case in cases}) >= 3
    assert {case.precision for case in cases} == set(PRECISIONS)
    assert {case.zero_stage for case in cases} == {0, 1, 2, 3}
    assert {case.ranks for case in cases} == {1, 2}
    assert {case.checkpointing for case in cases} == {False, True}
    assert max(case.accumulation for case in cases) > 1


def test_parameters_are_counted_as_the_model_counts_them() -> None:
    config = small()
    model = DALLE(config)
    with shapes_only():
        sizes = Sizes.of(DALLE(config))
    assert sizes.total == model.n_parameters()["total"]
    assert sizes.largest == max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("mode", [*modes_of("fp32"), *modes_of("autocast"), *modes_of("bf16")], ids=preset_name)
def test_the_peak_is_the_largest_moment_and_holds_at_least_the_state(mode: Mode) -> None:
    run = run_of(mode)
    name, memory = peak(run)
    found = moments(run)
    assert set(found) == {"start", "encoding", "loss", "backward", "reduction", "update"}
    assert memory == found[name]
    assert memory.total == max(moment.total for moment in found.values())
    if mode.offload == "none":
        state = state_bytes(run.sizes.total, mode.precision, mode.zero_stage, run.gpus)
        assert found["update"].total >= state.weights + state.optimizer


def test_a_total_is_the_sum_of_everything_on_the_device() -> None:
    values = {field.name: 10.0**i for i, field in enumerate(dataclasses.fields(Memory))}
    assert Memory(**values).total == sum(values.values()) - values["host"]


def test_more_is_kept_with_more_samples_and_less_with_checkpointing() -> None:
    config = small(n_layers=8)
    sizes = [predicted(config, "fp32", n).kept for n in (1, 2, 4)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]))
    checkpointed = predicted(config, "fp32", 4, checkpointing=True)
    assert checkpointed.kept + checkpointed.layer < sizes[2] / 2


def test_every_stage_shares_more() -> None:
    sizes = {"matrices": 1_900_000_000, "largest_matrix": 16_000_000}
    large = Sizes(total=2_000_000_000, largest=20_000_000, persistent=1_000_000, **sizes)
    run = run_of(Mode(zero_stage=1, precision="fp32"), gpus=64, sizes=large)
    peaks = [
        training_peak(dataclasses.replace(run, mode=Mode(zero_stage=stage, precision="fp32")))[1].total
        for stage in range(4)
    ]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_leaves_the_device_for_the_host(stage: int) -> None:
    kept = run_of(Mode(zero_stage=stage, precision="bf16"))
    offloaded = run_of(Mode(zero_stage=stage, precision="bf16", offload="optimizer"))
    moved = 12.0 * kept.sizes.total / kept.gpus  # moments and float32 weights
    assert moments(kept)["loss"].optimizer == moved
    assert moments(offloaded)["loss"].optimizer == 0
    assert host_peak(offloaded) - host_peak(kept) >= moved


@pytest.mark.parametrize("mode", [*modes_of("fp32"), *modes_of("bf16")], ids=preset_name)
def test_muon_needs_one_moment_where_adamw_needs_two(mode: Mode) -> None:
    adamw, muon = run_of(mode), run_of(mode, optimizer="muon")
    assert adamw.sizes.matrices == 2 * 12 * 64**2
    assert adamw.sizes.largest_matrix == 4 * 64**2
    saved = 4.0 * adamw.sizes.matrices / (adamw.gpus if mode.zero_stage else 1)
    before, after = moments(adamw)["loss"], moments(muon)["loss"]
    where = "optimizer" if mode.offload == "none" else "host"
    assert getattr(before, where) - getattr(after, where) == pytest.approx(saved)
    assert moments(muon)["update"].working > moments(adamw)["update"].working


def test_offloaded_weights_are_on_the_host() -> None:
    both = run_of(Mode(zero_stage=3, precision="bf16", offload="parameters"))
    optimizer = run_of(Mode(zero_stage=3, precision="bf16", offload="optimizer"))
    share = 2.0 * both.sizes.total / both.gpus
    assert moments(optimizer)["loss"].weights - moments(both)["loss"].weights == pytest.approx(share)
    assert host_peak(both) - host_peak(optimizer) == pytest.approx(share)


def test_gradients_of_earlier_micro_batches_are_there_in_the_forward_pass() -> None:
    mode = Mode(zero_stage=0, precision="fp32")
    one, two = moments(run_of(mode))["loss"], moments(run_of(mode, accumulation=2))["loss"]
    assert (one.gradients, two.gradients) == (0, 4 * run_of(mode).sizes.total)


def test_the_dvae_encodes_a_micro_batch_at_a_time_beside_its_weights() -> None:
    run = run_of(Mode(zero_stage=0, precision="fp32"), micro_batch=3, dvae_weights=1e9, dvae_working=5e8)
    encoding = moments(run)["encoding"]
    assert encoding.working == 3 * 5e8
    assert encoding.weights == 4 * run.sizes.total + 1e9
    assert peak(run)[0] == "encoding"


def test_a_buffer_of_gradients_is_no_larger_than_the_model_nor_than_deepspeeds() -> None:
    run = run_of(Mode(zero_stage=2, precision="fp32"))
    huge = dataclasses.replace(run, sizes=dataclasses.replace(run.sizes, total=10 * MAX_BUCKET))
    assert 4 * run.sizes.total <= moments(run)["reduction"].deepspeed < 12 * run.sizes.total
    assert 4 * MAX_BUCKET <= moments(huge)["reduction"].deepspeed < 12 * MAX_BUCKET


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, "not trained at ZeRO stage 0"),
        ({"zero_stage": 1, "precision": "fp32", "offload": "optimizer"}, "stages 2 and 3"),
        ({"zero_stage": 2, "precision": "fp32", "offload": "parameters"}, "needs ZeRO stage 3"),
    ],
)
def test_a_mode_that_is_not_trained_is_refused(mode: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Mode(**mode)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def paper() -> Plan:
    return make_plan(recipe("12b"), PlanOptions(gpus=64, gpu_memory=80))


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    usable = 24 * GIB * (1 - RESERVED_FRACTION)
    plan = make_plan(recipe("1.3b"), PlanOptions(gpus=8, gpu_memory=24))
    found = {mode.preset: mode.largest_micro_batch for mode in plan.modes}
    assert len(set(found.values())) > 1
    for preset, largest in found.items():
        mode = next(mode for mode in plan.modes if mode.preset == preset)
        for n, total in mode.totals.items():
            assert (total <= usable) == (n <= largest)


def test_time_is_arithmetic_over_what_the_gpus_are_assumed_to_do(paper: Plan) -> None:
    per_s = 64 * 989e12 * 0.4
    assert paper.tokens_per_day == pytest.approx(86_400 * per_s / paper.flops_per_sample * 1280)
    assert paper.days == pytest.approx(430_000 * 1024 * paper.flops_per_sample / per_s / 86_400)
    faster = make_plan(recipe("12b"), PlanOptions(gpus=64, gpu_memory=80, mfu=0.2, peak_tflops=312))
    assert paper.tokens_per_day / faster.tokens_per_day == pytest.approx(2 * 989 / 312)


def test_arithmetic_of_the_pairs_that_the_masks_allow_is_less_than_that_of_all() -> None:
    config = recipe("12b").transformer.model
    whole = flops_per_sample(config, 64 * 12 * config.d_model**2)
    assert 0.9 * whole < training_flops(config) < whole


def test_parts_of_the_other_stages_are_counted(paper: Plan) -> None:
    assert paper.dvae.parameters == {"encoder": 53_786_240, "decoder": 43_829_766, "total": 97_616_006}
    assert paper.clip.parameters["total"] == 151_277_313
    # 258 GFLOP to decode a picture with the default sizes: see dvae/model.py
    assert paper.dvae.flops_per_sample > 3 * 258e9
    # ViT-B/32: 4.4 billion multiplications, and additions, for the picture, and 3.0 for the text
    assert paper.clip.flops_per_sample == pytest.approx(3 * 2 * 7.4e9, rel=0.01)
    assert paper.clip.state[0].total == 16 * paper.clip.parameters["total"]
    # shared, and with DeepSpeed's copy of the weights
    assert paper.clip.state[3].total == pytest.approx((16 + 4) * paper.clip.parameters["total"] / 64)


def test_the_first_mode_that_fits_is_recommended_with_the_command() -> None:
    plan = make_plan(recipe("2.8b"), PlanOptions(gpus=8, gpu_memory=80))
    chosen = plan.recommendation
    assert chosen is not None
    fitting = [mode.preset for mode in plan.modes if mode.fits]
    assert chosen.preset == fitting[0]
    assert chosen.micro_batch == plan.micro_batch
    assert f"dalle-train transformer 2.8b --data SHARDS --out RUN {_options(plan)}" in chosen.command
    assert "--num_gpus 8" in chosen.command


def _options(plan: Plan) -> str:
    chosen = next(mode for mode in plan.modes if plan.recommendation and mode.preset == plan.recommendation.preset)
    return next(
        options
        for options in (
            f"--preset {chosen.preset} --micro-batch {plan.micro_batch}",
            f"--zero-stage {chosen.mode.zero_stage} --precision {chosen.mode.precision}",
        )
        if plan.recommendation and options in plan.recommendation.command
    )


def test_a_smaller_micro_batch_is_recommended_where_the_recipes_does_not_fit() -> None:
    plan = make_plan(recipe("1.3b"), PlanOptions(gpus=64, gpu_memory=5))
    chosen = plan.recommendation
    assert chosen is not None
    assert not any(mode.fits for mode in plan.modes if mode.mode.offload == "none")
    assert "offload" not in chosen.preset
    assert chosen.micro_batch < plan.micro_batch
    assert (1024 // 64) % chosen.micro_batch == 0
    assert f"--micro-batch {chosen.micro_batch}" in chosen.command
    assert "micro-batch 16 does not fit" in chosen.reason


def test_where_nothing_fits_it_says_what_would() -> None:
    plan = make_plan(recipe("12b"), PlanOptions(gpus=1, gpu_memory=4))
    assert plan.recommendation is None
    assert all(mode.largest_micro_batch == 0 for mode in plan.modes)
    said = text(plan)
    assert "Nothing fits 1 GPU of 4 GiB" in said
    needed = next(line for line in plan.advice if line.startswith("GPUs of"))
    enough = make_plan(recipe("12b"), PlanOptions(gpus=1, gpu_memory=int(needed.split()[2])))
    assert enough.recommendation is not None


def test_more_gpus_and_checkpointing_are_what_would_fit() -> None:
    base = recipe("1.3b")
    train = dataclasses.replace(base.transformer.train, activation_checkpointing=False)
    greedy = dataclasses.replace(base, transformer=dataclasses.replace(base.transformer, train=train))
    plan = make_plan(greedy, PlanOptions(gpus=1, gpu_memory=2.5))
    assert plan.recommendation is None
    advised = [line.split(":")[0] for line in plan.advice]
    assert advised[0] == "activation checkpointing"
    assert advised[1].endswith("GPUs")
    more = make_plan(base, PlanOptions(gpus=int(advised[1].split()[0]), gpu_memory=2.5))
    assert more.recommendation is not None


@pytest.mark.parametrize("name", ["12b", "demo"])
def test_a_plan_as_json_says_what_the_text_says(name: str) -> None:
    plan = make_plan(recipe(name), PlanOptions(gpus=8, gpu_memory=80))
    content = json.loads(plan.as_json())
    assert content["parameters"]["total"] == plan.parameters["total"]
    assert f"{content['parameters']['total']:,}" in text(plan)
    assert "e+" not in text(plan), "large numbers are in words"
    assert [mode["preset"] for mode in content["modes"]] == [mode.preset for mode in plan.modes]
    assert content["modes"][0]["peak"]["weights"] == plan.modes[0].peak.weights
    assert content["flops_per_token"] * plan.tokens_per_sample == pytest.approx(plan.flops_per_sample)
    assert content["measured"] is False
    assert math.isfinite(content["days"])


def test_modes_are_named_as_the_presets_are() -> None:
    names = [preset_name(mode) for mode in modes_of("bf16")]
    assert names == [
        "autocast",
        "zero1-bf16",
        "zero2-bf16",
        "zero3-bf16",
        "zero2-offload-bf16",
        "zero3-offload-bf16",
    ]
    assert preset_name(modes_of("fp32")[0]) == "fp32"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"micro_batch": 3}, "--micro-batch 3 does not divide the 128 samples"),
        ({"micro_batch": 0}, "give one of 1, 2, 4, 8, 16, 32, 64, 128"),
        ({"mfu": 0.0}, "--mfu must be above 0"),
        ({"mfu": 1.5}, "--mfu must be above 0 and at most 1"),
        ({"peak_tflops": -1.0}, "--peak-tflops must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_plan(recipe("1.3b"), PlanOptions(**arguments))  # type: ignore[arg-type]


def test_the_command_line_takes_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "4", "--gpu-memory", "40", "--micro-batch", "2", "--precision", "fp32", "--mfu", "0.3"]
    assert main(["plan", "1.3b", *options, "--peak-tflops", "19.5", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["gpus"], content["micro_batch"], content["precision"]) == (4, 2, "fp32")
    assert (content["mfu"], content["peak_tflops"]) == (0.3, 19.5)
    assert content["accumulation"] == 1024 // 8
    assert main(["plan", "1.3b", *options]) == 0
    said = capsys.readouterr().out
    assert "micro-batch 2" in said
    assert "30% of 67 TFLOP/s" in said


def test_nothing_is_allocated_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    original = DALLE.initialise

    def initialise(model: DALLE, generator: torch.Generator | None = None) -> None:
        made.append(model.device)
        original(model, generator)

    monkeypatch.setattr(DALLE, "initialise", initialise)
    make_plan(recipe("12b"), PlanOptions(gpus=64, gpu_memory=80))
    assert {device.type for device in made} == {"meta"}


def test_a_plan_with_muon_says_so_and_needs_less(paper: Plan) -> None:
    muon = make_plan(recipe("12b"), PlanOptions(gpus=64, gpu_memory=80, optimizer="muon"))
    assert paper.recommendation is not None
    assert muon.recommendation is not None
    assert muon.recommendation.command == f"{paper.recommendation.command} --optimizer muon"
    assert "bf16, muon" in text(muon)
    assert all(
        ours.peak.optimizer < theirs.peak.optimizer
        for ours, theirs in zip(muon.modes[:4], paper.modes[:4], strict=True)
    )
