"""What ranks send each other: planned, and given to torch.distributed by the real engine; and how long it takes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from support.ranks import on_ranks

from benchmarks.collectives import CASES, CONFIG, found
from dalle.model import DALLE
from training.cli.main import main
from training.plan.costs.communication import (
    Communication,
    Counts,
    Network,
    Step,
    Traffic,
    papers_mix,
    papers_rank,
    sent_by_all,
    sent_by_hosts,
    traffic,
)
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.plan.state import Mode, shapes_only
from training.plan.text import text
from training.plan.types import Plan
from training.recipes import recipe


def counts(**options: int) -> Counts:
    with shapes_only():
        return Counts.of(DALLE(CONFIG), powersgd_rank=4, **options)


def step_of(stage: int, **changes: object) -> Step:
    settings = {"counts": counts(), "accumulation": 1, "ema_every": 10**9, "live": 10**9, **changes}
    return Step(mode=Mode(zero_stage=stage, precision="fp32"), **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- against what is sent


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_give_to_torch_what_the_plan_says(tmp_path: Path, name: str, n_ranks: int) -> None:
    planned = CASES[name].planned()
    # what is shared out is filled up to equal parts: a few numbers for each tensor
    for sent in on_ranks(tmp_path, found, CASES[name], n_ranks=n_ranks):
        assert isinstance(sent, dict), sent
        for field in dataclasses.fields(Traffic):
            assert sent[field.name] == pytest.approx(getattr(planned, field.name), rel=0.005), field.name


def test_stages_send_more_and_powersgd_less() -> None:
    by_stage = [traffic(step_of(stage, accumulation=2)).sent(64) for stage in range(4)]
    assert by_stage[0] < by_stage[1] < by_stage[2]
    assert traffic(step_of(0, powersgd=True)).sent(64) < by_stage[0]


def test_stage_3_gathers_once_what_it_can_keep_and_else_for_both_passes() -> None:
    def gathered(live: int) -> float:
        return traffic(step_of(3, counts=counts(persistent=0), live=live)).gathered

    whole = 4.0 * counts().total
    assert gathered(10**9) == pytest.approx(whole)
    assert gathered(0) == pytest.approx(2 * whole)
    assert gathered(counts().total // 2) == pytest.approx(1.5 * whole, rel=0.05)


# ------------------------------------------------------------------------------------- formulas


def network(gpus: int = 64, per_host: int = 8) -> Network:
    return Network(gpus=gpus, per_host=per_host, in_host=400.0, between_hosts=100.0)


def test_a_ring_sends_what_nccls_formulas_say() -> None:
    one = 1000.0
    assert Traffic(all_reduced=one).sent(4) == 1500
    assert Traffic(scattered=one).sent(4) == Traffic(gathered=one).sent(4) == 750
    assert Traffic(by_one=one).sent(4) == one
    assert Traffic(all_reduced=one, by_one=one).sent(1) == 0


def test_a_host_sends_to_others_what_one_gpu_sends() -> None:
    sent = sent_by_all(Traffic(gathered=6400.0), network())
    assert sent.in_host + sent.between_hosts == pytest.approx(6300)
    assert 8 * sent.between_hosts == pytest.approx(6300)
    assert sent.seconds == pytest.approx(6300 / 100)


def test_nothing_leaves_a_single_host() -> None:
    sent = sent_by_all(Traffic(gathered=800.0), network(gpus=8))
    assert (sent.in_host, sent.between_hosts) == (700, 0)
    assert sent.seconds == pytest.approx(700 / 400)


def test_rings_of_one_gpu_of_each_host_share_its_network() -> None:
    sent = sent_by_hosts(Traffic(scattered=800.0), Traffic(all_reduced=400.0), network())
    assert (sent.in_host, sent.between_hosts) == (700, 700)
    assert sent.seconds == pytest.approx(700 / 400 + 8 * 700 / 100)


def test_the_papers_ranks_are_those_of_its_table() -> None:
    assert [papers_rank(width) for width in (1920, 2688, 3968)] == [512, 640, 896]
    assert papers_rank(256) == 64


def test_the_papers_mix_sends_5r_by_8d_of_a_share_between_hosts() -> None:
    with shapes_only():
        paper = Counts.of(DALLE(recipe("12b").transformer.model), 896)
    in_host, between = papers_mix(step_of(0, counts=paper), 896, 8)
    others = paper.total - paper.matrices
    matrices = 2 * paper.matrices / 8 * 5 * 896 / (8 * 3968)
    assert between.all_reduced == pytest.approx(matrices + 4 * others / 8)
    assert in_host.gathered == 2 * in_host.scattered
    assert in_host.scattered == pytest.approx(24.6e9, rel=0.05)  # 12 billion parameters of 16 bits


# ------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def paper() -> Plan:
    return make_plan(recipe("12b"), PlanOptions(gpus=64, network=3200, gpu_hour_price=2))


def row(plan: Plan, name: str) -> Communication:
    return next(row for row in plan.communication if row.name.startswith(name))


def test_a_step_is_the_sum_of_its_times_or_the_longer_one(paper: Plan) -> None:
    for one in paper.communication:
        expected = max(paper.computing_s, one.sent.seconds) if one.overlaps else paper.computing_s + one.sent.seconds
        assert one.step_s == expected
        assert one.days == pytest.approx(430_000 * one.step_s / 86_400)
    assert [one.name for one in paper.communication if one.overlaps] == ["zero3-bf16", "paper's mix *"]


def test_powersgd_and_the_papers_mix_send_little_to_other_hosts(paper: Plan) -> None:
    zero2, powersgd, mix = (row(paper, name).sent.between_hosts for name in ("zero2", "PowerSGD", "paper's mix"))
    assert mix < powersgd < zero2


def test_gpu_hours_are_told_and_their_cost_if_there_is_a_price(paper: Plan) -> None:
    hours = paper.days * 24 * 64
    assert paper.gpu_hours == pytest.approx(hours)
    assert f"{hours:,.0f} GPU-hours (cost {2 * hours:,.0f})" in text(paper)
    free = text(make_plan(recipe("12b"), PlanOptions(gpus=64)))
    assert f"{hours:,.0f} GPU-hours, on 64 GPUs" in free
    assert "cost" not in free


def test_without_a_network_nothing_is_said_of_it() -> None:
    plan = make_plan(recipe("12b"), PlanOptions(gpus=64))
    assert plan.communication == ()
    assert "that a GPU sends" not in text(plan)


@pytest.mark.parametrize("gpus", [1, 8])
def test_on_one_host_nothing_is_sent_to_others(gpus: int) -> None:
    plan = make_plan(recipe("demo"), PlanOptions(gpus=gpus, network=100))
    assert all(one.sent.between_hosts == 0 for one in plan.communication)
    assert any(one.sent.in_host > 0 for one in plan.communication) == (gpus > 1)
    assert "paper's mix *" not in text(plan)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"network": 0.0}, "--network must be above 0"),
        ({"network": 100.0, "gpus": 12}, "--gpus 12 do not fill hosts of 8"),
        ({"gpu_link": math.inf}, "--gpu-link must be above 0"),
        ({"gpu_hour_price": -1.0}, "--gpu-hour-price must be above 0"),
        ({"gpus_per_host": 0}, "--gpus-per-host must be at least 1"),
        ({"powersgd_rank": 0}, "--powersgd-rank must be at least 1"),
        ({"disk": 0.0}, "--disk must be above 0"),
    ],
)
def test_impossible_speeds_are_refused(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_plan(recipe("1.3b"), PlanOptions(**arguments))  # type: ignore[arg-type]


def test_the_command_line_takes_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--gpus",
        "16",
        "--network",
        "400",
        "--gpu-link",
        "512",
        "--powersgd-rank",
        "256",
        "--gpu-hour-price",
        "1",
    ]
    assert main(["plan", "2.8b", *options, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["network"] == {"gpus": 16, "per_host": 8, "in_host": 64e9, "between_hosts": 50e9}
    assert content["communication"][4]["name"] == "PowerSGD, rank 256"
