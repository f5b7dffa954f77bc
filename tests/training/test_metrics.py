import errno
import json
import logging
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny
from support.runs import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dalle.data.reader import ShardData
from training.loop import throughput
from training.loop.means import Means
from training.loop.metrics import MetricLog
from training.loop.sinks import require_wandb
from training.loop.throughput import Timer, gpu_peak_flops, peak_flops, peak_memory_gib
from training.plan.flops import flops_per_sample
from training.ranks.ranks import join
from training.ranks.stop import Interrupted
from training.ranks.watch import RankLostError, Watch
from training.run_files import read_metrics
from training.stages.all import train_all
from training.stages.inputs import Inputs


class FakeWandb(types.ModuleType):
    """What of Weights & Biases is used."""

    class Image:
        def __init__(self, path: str) -> None:
            self.path = path

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[str, int, dict[str, Any]]] = []
        """Id of the run, step, values."""
        self.broken: str | None = None
        self.finished: list[str] = []

    def init(self, **settings: Any) -> Any:
        if self.broken == "init":
            raise ConnectionError("no route to host")
        self.runs.append(settings)
        return self._Run(self, settings["id"])

    class _Run:
        def __init__(self, wandb: "FakeWandb", name: str) -> None:
            self.wandb, self.name = wandb, name

        def log(self, values: dict[str, Any], step: int) -> None:
            if self.wandb.broken == "log":
                raise ConnectionError("no route to host")
            self.wandb.logged.append((self.name, step, values))

        def finish(self) -> None:
            self.wandb.finished.append(self.name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Run:
    return Run(tmp_path, tiny.open_world(shards), join())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, round(event.value, 4)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_every_number_goes_to_every_sink_and_lists_number_by_number(tmp_path: Path, wandb: FakeWandb) -> None:
    log = MetricLog(tmp_path, 0, wandb_project="mine")
    log.write(1, "train", {"loss": 2.0, "by_row": [1.0, math.inf]})
    log.write(1, "validation", {"loss": 3.0})
    Image.new("RGB", (3, 2)).save(tmp_path / "sheet.png")
    log.picture(1, tmp_path / "sheet.png")
    log.close()
    lines = read_metrics(tmp_path)
    assert [(line["split"], line["loss"]) for line in lines] == [("train", 2.0), ("validation", 3.0)]
    assert lines[0]["by_row"] == [1.0, None]
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.0)],
        "train/by_row/00": [(1, 1.0)],
        "train/by_row/01": [(1, math.inf)],
        "validation/loss": [(1, 3.0)],
    }
    assert [values for _, _, values in wandb.logged[:2]] == [
        {"train/loss": 2.0, "train/by_row/00": 1.0, "train/by_row/01": math.inf},
        {"validation/loss": 3.0},
    ]
    assert wandb.logged[2][2]["samples"].path == str(tmp_path / "sheet.png")
    assert wandb.runs[0]["project"] == "mine"
    assert wandb.runs[0]["dir"] == str(tmp_path)
    assert len(wandb.finished) == 1


def test_a_resumed_run_goes_on_in_the_same_place_and_sends_nothing_twice(tmp_path: Path, wandb: FakeWandb) -> None:
    def steps(start: int, stop: int) -> None:
        log = MetricLog(tmp_path, start, wandb_project="mine")
        for step in range(start + 1, stop):
            log.write(step, "train", {"loss": float(step)})
        log.close()

    steps(0, 6)
    steps(3, 9)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    assert [step for _, step, _ in wandb.logged] == list(range(1, 9))
    assert len({name for name, _, _ in wandb.logged}) == 1
    assert wandb.runs[1]["resume"] == "allow"
    steps(0, 2)  # anew
    assert len({settings["id"] for settings in wandb.runs}) == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.usefixtures("no_wandb")
def test_weights_and_biases_is_imported_only_where_it_is_asked_for_and_missing_it_is_said_in_words(run: Run) -> None:
    run(tiny.train_config(steps=1))
    with pytest.raises(ValueError, match=r"--wandb needs Weights & Biases.*pip install wandb"):
        require_wandb()
    before = (run.folder / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"--wandb needs"):
        run(tiny.train_config(steps=3, wandb="mine"), fresh=True)
    assert (run.folder / "run" / "metrics.jsonl").read_text() == before, "before anything is touched"


def test_a_run_logs_to_weights_and_biases(run: Run, wandb: FakeWandb) -> None:
    run(tiny.train_config(steps=2, wandb="mine"))
    assert wandb.runs[0]["config"]["run"]["recipe"] == "tiny"
    assert [step for _, step, values in wandb.logged if "train/loss" in values] == [1, 2]
    assert "samples" in wandb.logged[-1][2]
    assert (run.folder / "run" / "wandb-id").read_text().strip() == wandb.runs[0]["id"]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_network_that_is_gone_is_said_once_and_training_goes_on(
    run: Run, wandb: FakeWandb, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.broken = broken
    run(tiny.train_config(steps=4, wandb="mine"))
    assert sorted(run.losses) == [1, 2, 3, 4]
    warnings = [record.getMessage() for record in caplog.records if "given up" in record.getMessage()]
    assert len(warnings) == 1
    assert "Weights & Biases is given up for this run (no route to host)" in warnings[0]


def test_a_disk_that_is_full_for_tensorboard_is_said_once_and_training_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run(tiny.train_config(steps=4))
    assert sorted(run.losses) == [1, 2, 3, 4]
    assert [record.getMessage().startswith("TensorBoard is given up") for record in caplog.records].count(True) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_metrics_jsonl_that_cannot_be_written_stops_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def open_full(self: Path, *arguments: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if self.name == "metrics.jsonl" else self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny.train_config(steps=4))


def test_how_a_run_ended_is_written_down(run: Run) -> None:
    def said() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run.folder / "run" / "state.json").read_text())
        return found

    def while_running(step: int) -> None:
        assert said()["state"] == "running"
        if step == 2:
            raise Interrupted("asked to stop")

    with pytest.raises(Interrupted):
        run(tiny.train_config(steps=4), at_step=while_running)
    assert (said()["state"], said()["reason"]) == ("stopped", "asked to stop")
    run(tiny.train_config(steps=4))
    assert said()["state"] == "finished"
    with pytest.raises(ValueError, match="diverged"):
        run(tiny.train_config(steps=6, max_skipped_steps=1), scale=float("nan"))
    assert said()["state"] == "failed"
    assert "diverged" in said()["reason"]


def test_how_a_run_ended_is_written_down_before_anything_waits_for_a_network(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str] = []
    state = tmp_path / "state.json"
    monkeypatch.setattr(FakeWandb._Run, "finish", lambda run: states.append(json.loads(state.read_text())["state"]))
    log = MetricLog(tmp_path, 0, wandb_project="mine")
    log.close("failed", "rank 1 is gone")
    assert states == ["failed"]


def test_the_reason_why_a_run_failed_is_the_rank_that_is_gone_where_one_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")

    monkeypatch.setattr(Watch, "lost_rank_error", lambda *_: RankLostError("rank 1 is gone"))
    with pytest.raises(RuntimeError, match="Connection closed"):
        run(tiny.train_config(steps=4), at_step=fail)
    assert json.loads((run.folder / "run" / "state.json").read_text())["reason"] == "rank 1 is gone"


# ---------------------------------------------------------------------------------------------------------- means


def test_means_weigh_what_was_added_and_a_weight_of_nothing_adds_a_name_only() -> None:
    means = Means()
    means.add({"loss": torch.tensor(1.0), "rows": torch.tensor([1.0, 2.0])}, 3)
    means.add({"loss": torch.tensor(5.0)})
    means.add({"loss": torch.tensor(math.nan), "rows": torch.tensor([math.nan, 7.0])}, 0)
    assert means.take(join()) == {"loss": 2.0, "rows": [1.0, 2.0]}
    assert means.take(join()) == {}


def test_a_step_whose_weight_the_device_says_is_nothing_leaves_no_trace() -> None:
    means = Means()
    means.add({"loss": torch.tensor(math.inf)}, torch.tensor(0))
    assert math.isnan(means.take(join())["loss"])
    means.add({"loss": torch.tensor(2.0), "rows": torch.tensor([1.0, 2.0])}, torch.tensor(1))
    means.add({"loss": torch.tensor(math.nan), "rows": torch.tensor([math.inf, 2.0])}, torch.tensor(0))
    assert means.take(join()) == {"loss": 2.0, "rows": [1.0, 2.0]}


# ----------------------------------------------------------------------------------------------------- throughput


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla T4", 65, 8.1),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, half: float, single: float) -> None:
    assert gpu_peak_flops(name, "autocast") == half * 1e12
    assert gpu_peak_flops(name, "bf16") == half * 1e12
    assert gpu_peak_flops(name, "fp32") == single * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "Radeon", "NVIDIA T400"])
def test_the_peak_of_another_gpu_with_a_similar_name_is_not_guessed(name: str) -> None:
    assert gpu_peak_flops(name, "bf16") is None


@pytest.mark.slow
def test_the_peak_of_a_cpu_is_measured_and_a_given_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    measured = peak_flops(cpu, "fp32")
    assert measured is not None
    assert measured > 1e8
    assert peak_flops(cpu, "fp32", 3.5) == 3.5e12
    clock = iter([0.0, 2.0] * 100)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert peak_flops(cpu, "autocast") == 1024**3


def test_measuring_the_peak_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    peak_flops(torch.device("cpu"), "fp32")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is held now")
def test_the_most_memory_a_process_has_taken_is_no_less_than_what_it_holds() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held_gib = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.9 * held_gib < peak_memory_gib(torch.device("cpu")) < 50 * held_gib


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_an_interval_counts_training_only_and_how_much_of_it_was_waiting(clock: list[float]) -> None:
    timer = Timer(start=10, steps=100)
    clock[0] += 6
    with timer.waiting():
        clock[0] += 2
    with timer.paused():
        clock[0] += 50
    interval = timer.interval(14)
    assert (interval.steps, interval.elapsed_s, interval.data_wait) == (4, 8, 0.25)
    clock[0] += 1
    assert timer.interval(15).elapsed_s == 1


# --------------------------------------------------------------------------------------------- what a run measures


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics of all stages."""
    out = tmp_path_factory.mktemp("all") / "bundle"
    recipe = tiny.recipe(steps=2, peak_tflops=0.5, validation_samples=10)
    train_all(recipe, Inputs(data=[shards], validation=[shards], out=out), join(), lambda line: None)
    stages = ("dvae-warmup", "dvae", "clip", "transformer")
    return {stage: read_metrics(out / "training" / stage) for stage in stages}


def test_every_stage_says_how_fast_it_is_and_what_it_takes(lines: dict[str, list[dict[str, Any]]]) -> None:
    for stage, found in lines.items():
        for line in found:
            if line["split"] == "train":
                speed = "tokens_per_s" if stage == "transformer" else "images_per_s"
                assert line[speed] > 0
                assert 0 <= line["data_wait"] <= 1
                assert 0 < line["peak_memory_gib"] < 100
                assert {"loss", "learning_rate", "bad_samples"} <= line.keys()
            else:
                assert line["samples"] == 10
    assert {"codes_used", "perplexity"} <= lines["dvae"][0].keys()


def test_the_utilisation_is_the_model_s_operations_over_what_the_device_can_do(
    lines: dict[str, list[dict[str, Any]]], tmp_path: Path, shards: Path
) -> None:
    from dalle.model import DALLE

    line = lines["transformer"][0]
    config = tiny.recipe().transformer.model
    sizes = DALLE(config).n_parameters()
    flops = flops_per_sample(config, sizes["attention"] + sizes["mlp"])
    samples_per_s = line["tokens_per_s"] / (config.text_len + config.grid**2)
    assert line["mfu"] == pytest.approx(samples_per_s * flops / 0.5e12, rel=0.3)  # the vocabularies differ a little
    assert "mfu" not in lines["dvae"][0]


def test_perplexity_by_row_is_e_to_the_mean_loss_of_the_row(lines: dict[str, list[dict[str, Any]]]) -> None:
    for line in lines["transformer"]:
        rows = line["image_perplexity_by_row"]
        assert len(rows) == 4
        mean_loss = sum(math.log(row) for row in rows) / len(rows)
        assert mean_loss == pytest.approx(line["image_loss"], rel=1e-4)
        assert "image_loss_by_row" not in line


def test_nothing_is_read_from_the_device_between_two_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    read: list[int] = []
    item, to_list = torch.Tensor.item, torch.Tensor.tolist
    step_now = [0]

    def noted(original: Any) -> Any:
        def call(self: torch.Tensor, *arguments: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("training."):
                read.append(step_now[0])
            return original(self, *arguments)

        return call

    monkeypatch.setattr(torch.Tensor, "item", noted(item))
    monkeypatch.setattr(torch.Tensor, "tolist", noted(to_list))
    run(tiny.train_config(steps=9, log_every=3), at_step=lambda step: step_now.__setitem__(0, step))
    assert set(read) == {2, 5, 8}


def test_a_run_warns_of_nothing(run: Run, caplog: pytest.LogCaptureFixture, shards: Path) -> None:
    with caplog.at_level(logging.WARNING):
        run(tiny.train_config(steps=2), validation=ShardData.open([shards], captions=True))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("training")] == []
