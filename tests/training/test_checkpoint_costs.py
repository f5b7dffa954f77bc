"""What the plan says of checkpoints: bytes of real ones, what is kept, and times that follow from speeds."""

import dataclasses
from pathlib import Path

import pytest
from support.ranks import on_ranks

from benchmarks.costs import Case, saved
from dalle.model import DALLEConfig
from dalle.output.text import GIB
from training.cli.main import main
from training.config import TrainConfig
from training.plan.costs.checkpoints import GB, Checkpoint, Saved, Speeds, checkpoint_of, measured_speeds
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.plan.state import Mode
from training.plan.text import text
from training.recipes import RECIPES, recipe

SMALL = DALLEConfig(
    n_layers=4, d_model=192, n_heads=4, text_len=16, grid=4, text_vocab=1024, image_vocab=256, conv_kernel=3
)

CASES = {
    "stage 0": Case(zero_stage=0, ranks=1),
    "stage 0, PowerSGD": Case(zero_stage=0, ranks=2, powersgd_rank=8),
    "stage 1": Case(zero_stage=1, ranks=2),
    "stage 1, bf16": Case(zero_stage=1, ranks=2, precision="bf16"),
    "stage 2, bf16, muon": Case(zero_stage=2, ranks=2, precision="bf16", optimizer="muon"),
    "stage 3": Case(zero_stage=3, ranks=2),
    "stage 3, bf16, 4 ranks": Case(zero_stage=3, ranks=4, precision="bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_have_the_bytes_of_the_plan(tmp_path: Path, name: str) -> None:
    case = dataclasses.replace(CASES[name], config=SMALL)
    plan = case.planned(Speeds())
    found = on_ranks(tmp_path, saved, case, tmp_path / "run", n_ranks=case.ranks)[0]
    assert isinstance(found, dict), found
    first, *others = found["bytes"]
    assert first == pytest.approx(plan.first, rel=0.01)
    for other in others:
        assert other == pytest.approx(plan.other, rel=0.01, abs=20_000)  # the states of the generators have 15,000
    assert sum(found["bytes"]) == pytest.approx(plan.total, rel=0.01)
    assert found["export"] == pytest.approx(plan.export, rel=0.01)
    if found["joined"]:  # three files for each parameter, beside pieces, and what is copied
        assert found["joined"] == pytest.approx(plan.converted - 3 * plan.export, rel=0.03)


def plan_of(stage: int = 1, ranks: int = 4, speeds: Speeds | None = None, **changes: object) -> Checkpoint:
    settings: dict[str, object] = {"steps": 10_000, "global_batch": 4, "checkpoint_every": 1_000, **changes}
    mode = Mode(zero_stage=stage, precision="fp32")
    return checkpoint_of(Saved(total=10**9), mode, ranks, TrainConfig(**settings), speeds or Speeds())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({"keep_last": 2}, 3),  # one is written before the oldest is dropped
        ({"keep_last": 1}, 2),
        ({"keep_last": 2, "keep_every": 5_000}, 5),
        ({"keep_last": 2, "keep_every": 1_500}, 6),  # of those that are saved: 3,000, 6,000 and 9,000
        ({"keep_last": 50}, 10),
        ({"steps": 500}, 1),
    ],
)
def test_what_is_kept_is_the_newest_those_for_good_and_one_being_written(changes: dict[str, object], n: int) -> None:
    plan = plan_of(**changes)
    assert plan.kept == n * plan.total + 2 * plan.export


def test_a_slower_disk_takes_longer_and_more_processes_do_not_change_that() -> None:
    slow, fast = (plan_of(speeds=Speeds(write=speed, read=speed)) for speed in (GB, 4 * GB))
    for name in ("save_s", "verify_s", "export_s", "convert_s"):
        assert getattr(slow, name) > getattr(fast, name)
    assert slow.save_s - fast.save_s == pytest.approx(0.75 * slow.total / GB)


def test_the_first_rank_holds_up_the_others_below_stage_3() -> None:
    shared = plan_of(stage=3, ranks=1024)
    assert shared.first == shared.other
    plan = plan_of(stage=2, ranks=1024)
    assert plan.first > 4e9 > 100 * plan.other
    assert plan.save_s > plan.first / Speeds().pack + plan.first / Speeds().digest


def test_only_what_ranks_share_must_be_converted() -> None:
    assert plan_of(stage=0).converted == plan_of(stage=0).convert_s == 0
    assert plan_of(stage=2).converted == 28e9
    assert plan_of(stage=3).converted == 27e9  # a fourth of the optimizer's state is copied, that of the first rank


# ------------------------------------------------------------------------------------------------ in the plan


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("unclip-paper") else n for n in RECIPES]
)
def test_every_recipe_says_what_its_checkpoints_take(name: str) -> None:
    plan = make_plan(recipe(name), PlanOptions())
    said = text(plan)
    for mode in plan.modes:
        assert mode.checkpoint.total >= 12 * plan.parameters["total"]
        if mode.mode.offload == "none":
            assert f"{mode.checkpoint.total / GIB:,.3g}" in said
    for stage in (plan.dvae, plan.clip):
        assert stage.checkpoint.export == 4 * stage.parameters["total"]
        assert f"checkpoint {stage.checkpoint.total / GIB:.2f} GiB" in said


@pytest.mark.slow
def test_the_disk_of_the_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = measured_speeds(tmp_path / "not" / "there" / "yet")
    assert min(speeds.write, speeds.read, speeds.pack, speeds.digest) > 0
    assert list(tmp_path.iterdir()) == []
    assert main(["plan", "demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "(measured)" in said
    assert "GiB left" in said
    assert main(["plan", "demo", "--disk", "0.5"]) == 0
    assert "writes 0.5 and reads 0.5 GB/s (given)" in capsys.readouterr().out
