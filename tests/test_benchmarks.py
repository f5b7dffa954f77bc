"""The benchmarks measure what they say: operations counted, the peer that we wrote, ratios, lines met and not met."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import decode, gpu, measure, summary
from benchmarks.flops import decoding_flops, read_cache
from benchmarks.measure import Line, Options, Report
from benchmarks.peers import StaticCache
from dalle.model import DALLE, DALLEConfig
from dalle.stream import image_inputs
from training.plan.flops import attended, attention_flops, linear_flops, training_flops

SMALL = DALLEConfig(n_layers=3, d_model=32, n_heads=2, text_len=7, grid=4, text_vocab=24, image_vocab=16, conv_kernel=3)
DENSE = dataclasses.replace(SMALL, attention="dense")


def small_model(config: DALLEConfig) -> DALLE:
    torch.manual_seed(0)
    model = DALLE(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.image_head.weight)
    return model


def counted(config: DALLEConfig, batch: int) -> int:
    """Operations of a forward pass without attention, as torch counts them."""
    text = torch.zeros(batch, config.text_len, dtype=torch.int64)
    image_tokens = torch.zeros(batch, config.grid**2, dtype=torch.int64)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        small_model(config)(text, image_tokens)
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for operation, n in by_operation.items() if "attention" not in str(operation))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_counted_operations_are_those_that_torch_counts(batch: int) -> None:
    assert batch * linear_flops(DENSE) == counted(DENSE, batch)


def test_attention_is_counted_by_the_keys_that_a_query_may_see() -> None:
    length = SMALL.stream.length
    assert attended(DENSE) == 3 * length * (length + 1) // 2
    assert attended(SMALL) < attended(DENSE)
    assert attention_flops(DENSE) == 4 * 32 * attended(DENSE)


def test_the_measured_shape_has_the_floors_that_the_page_names() -> None:
    assert round(training_flops(decode.SHAPE) / 1e9) == 251
    assert round(decoding_flops(decode.SHAPE) / 2e6, 1) == 29.4
    per_candidate = read_cache(decode.SHAPE, 2) - read_cache(decode.SHAPE, 1)
    assert per_candidate == pytest.approx(2 * 512 * (5 * 32.5 + 2 * 16.5 + 56.4), rel=0.02)  # row, column, conv


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_static_cache_gives_the_logits_of_a_whole_forward_pass(lean: bool, compiled: bool) -> None:
    model = small_model(DENSE)
    text = torch.randint(24, (1, 7)).expand(3, -1)
    tokens = torch.randint(16, (3, 16))
    decoder = StaticCache(model, text, lean=lean, compiled=compiled)
    inputs = image_inputs(tokens, 16)
    found = torch.stack([decoder.step(inputs[:, i], i) for i in range(16)], dim=1)
    torch.testing.assert_close(found, model(text, tokens)[1], atol=1e-5, rtol=1e-5)
    assert decoder.bytes_per_candidate() == 2 * 3 * SMALL.stream.length * 32 * 4


def test_a_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians() -> None:
    times = {"slow": [2.0, 30.0, 3.0], "fast": [1.0, 10.0, 2.0]}
    assert measure.ratio(times, "slow", "fast") == 2.0
    assert median(times["slow"]) / median(times["fast"]) == 1.5


def test_subjects_run_in_turns() -> None:
    ran: list[str] = []
    subjects = {name: lambda name=name: ran.append(name) for name in "ab"}
    times = measure.in_turns(subjects, rounds=2, warmup=1, units=10)  # type: ignore[arg-type]
    assert "".join(ran) == "ababab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_a_cost_that_grows_along_the_picture_is_integrated() -> None:
    starts = [0, 256, 512, 768, 1023]
    assert decode.over_the_picture(starts, [float(i) for i in starts]) == pytest.approx(1023 / 2)
    assert decode.over_the_picture([100, 900], [3.0, 3.0]) == pytest.approx(3.0)
    assert decode.spread(3, 24) == [0, 500, 1000]


def test_peak_memory_is_above_what_was_held_before() -> None:
    held = torch.ones(30 * measure.MIB // 4)
    peak = measure.PeakMemory()
    torch.ones(40 * measure.MIB // 4)
    assert held.numel() > 0
    assert 39 <= peak.bytes() / measure.MIB <= 60


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "met"),
    [
        (2.0, 1.9, False, True),
        (1.9, 1.9, False, True),
        (1.8, 1.9, False, False),
        (0.5, 0.4, True, False),
        (0.3, 0.4, True, True),
    ],
)
def test_a_line_is_met_where_its_limit_is_reached(value: float, limit: float, at_most: bool, met: bool) -> None:
    line = Line(what="a step", against="a peer", value=value, limit=limit, at_most=at_most)
    assert line.met is met
    (row,) = summary.lines_table([line]).rows
    assert row[-1] == ("met" if met else "NOT MET")


def write(folder: Path, values: Sequence[float]) -> Report:
    report = Report(benchmark="decode", samples={"N=1": {"ours": [0.123456789]}})
    report.table("A table", ["", "ms"], [["ours", 1.2345], ["theirs", None]])
    for value in values:
        report.line("decode", "a peer", value, 2.0)
    report.write(folder / "decode.json")
    return report


def test_results_are_read_back_with_what_they_were_measured_on(tmp_path: Path) -> None:
    report = write(tmp_path, [1.0, 3.0])
    found = summary.results(tmp_path)
    assert summary.lines(found) == report.lines
    content = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    assert {"cpu", "cores", "threads", "memory_gib", "instructions"} <= content["machine"].keys()
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["dalle-pytorch"] == "1.6.6"
    assert {"date", "command", "commit"} <= content.keys()
    assert content["samples"]["N=1"]["ours"] == [0.123457]


def test_the_page_is_filled_where_there_are_results_and_kept_where_there_are_none(tmp_path: Path) -> None:
    write(tmp_path, [3.0])
    page = "# A\n\n<!-- decode -->\nold\n<!-- end -->\n\ntext\n\n<!-- dvae -->\nkept\n<!-- end -->\n"
    filled = summary.filled(page, summary.blocks(summary.results(tmp_path)))
    assert "old" not in filled
    assert "| ours | 1.23 |" in filled
    assert "| theirs | – |" in filled
    assert "kept" in filled
    assert "text" in filled
    assert summary.filled(filled, summary.blocks(summary.results(tmp_path))) == filled


def test_no_results_are_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make bench"):
        summary.results(tmp_path)


def test_every_place_of_the_pages_belongs_to_a_benchmark() -> None:
    pages = [page.read_text(encoding="utf-8") for page in summary.PAGES]
    for_users, every_table = (
        {line[5:-4] for line in page.splitlines() if line.startswith("<!-- ")} - {"end"} for page in pages
    )
    assert for_users == {"ratios", "machine"}
    assert every_table <= {*summary.BENCHMARKS, "machine", "lines", "rates"}
    assert {name for name in summary.BENCHMARKS if (summary.RESULTS / f"{name}.json").exists()} <= every_table
    assert all(f"images/{file}" in pages[1] for file, *_ in summary.PLOTS.values())
    assert pages[0].count("](images/") == 3


def test_the_pages_say_what_the_results_say() -> None:
    made = summary.blocks(summary.results())
    for page in summary.PAGES:
        text = page.read_text(encoding="utf-8")
        assert summary.filled(text, made) == text
    shown = {(line.what, line.against) for line in summary.lines(summary.results())}
    assert set(summary.HEADLINES) <= shown


def test_a_part_that_fails_on_a_gpu_takes_no_other_results_with_it(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"

    def works(_options: Options, report: Report) -> None:
        report.line("a step", "a peer", 2.0, 1.0)

    def fails(_options: Options, report: Report) -> None:
        assert json.loads(out.read_text())["lines"], "written before the next part begins"
        raise RuntimeError("no such kernel")

    parts: dict[str, gpu.Part] = {"first": works, "second": fails, "third": works}
    assert not gpu.run(parts, Options(), out, minutes=10)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert len(content["lines"]) == 2
    assert content["notes"][0] == "second failed: no such kernel"
    assert gpu.run({"first": works}, Options(), out, minutes=10)
    assert not gpu.run({"first": works}, Options(), out, minutes=-1), "nothing was measured"
    assert "not measured" in json.loads(out.read_text(encoding="utf-8"))["notes"][0]


def test_tests_that_failed_on_a_gpu_are_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="left_out"><skipped/>'
        '</testcase><testcase classname="b" name="bad"><failure message="1 &lt; 2&#10;more"/></testcase></testsuite>'
        "</testsuites>"
    )
    assert gpu.read_tests(tmp_path / "tests.xml") == {"a.good": "", "b.bad": "1 < 2"}
