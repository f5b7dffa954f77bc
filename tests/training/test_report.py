import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny
from support.runs import Run as FitRun
from support.status import NOW, RunFolder

import training.cli.main
from dalle.evaluation.distances import Reference, distances
from dalle.evaluation.nested.curves import Estimate, Point
from dalle.evaluation.numbers.moments import Moments
from dalle.evaluation.result import BestOfN, Result
from training.ranks.ranks import join
from training.report.curves import MAX_COLUMNS, MAX_POINTS, Curve, chart, heat_map, label
from training.report.report import MAX_SHEETS, page, write_report
from training.report.runs import read_run

VOID = {"meta", "input", "img", "br"}
PICTURES = ("data:image/jpeg;base64,", "data:image/png;base64,")
ATTACK = '<script>alert(1)</script><img src="http://evil/x" onerror="alert(2)">"\'&'


class Checker(HTMLParser):
    """Collects what a page consists of, and that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def require_harmless(self) -> None:
        """Balanced, without scripts, and without a reference to anything outside."""
        assert self.wrong == []
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
            assert not any(name.startswith("on") for name in attributes), attributes
            for name in ("src", "href", "xlink:href", "action"):
                assert (attributes.get(name) or "#").startswith(("#", *PICTURES)), attributes


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., RunFolder]:
    return lambda *parts: RunFolder(tmp_path.joinpath(*(parts or ("run",))))


def sheet(run: RunFolder, step: int, size: tuple[int, int] = (64, 48)) -> None:
    path = run.path / "samples" / f"step{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (step % 256, 0, 0)).save(path)


def full(run: RunFolder) -> RunFolder:
    run.config().lines(100, text_loss=2.0, grad_norm=1.0).validation(50, 4.0).validation(100, 3.0).checkpoint(100)
    with (run.path / "metrics.jsonl").open("a") as file:
        for step in range(10, 101, 10):
            rows = [100.0 / row for row in range(1, 5)]
            file.write(json.dumps({"step": step, "split": "train", "image_perplexity_by_row": rows}) + "\n")
    for step in (50, 100):
        sheet(run, step)
    return run.said("finished")


def html_of(*runs: RunFolder) -> str:
    return page([read_run(run.path) for run in runs], "mine", NOW)


def test_a_page_shows_curves_perplexities_samples_checkpoints_and_the_configuration(folder: Any) -> None:
    html = html_of(full(folder()))
    checker = Checker(html)
    checker.require_harmless()
    text = " ".join(checker.text)
    for expected in (
        "loss",
        "text loss, nats per token",
        "gradient norm",
        "perplexity of image tokens, train",
        "step 50",
        "step00000100",
        "3.0 KiB",
        "finished",
        "abc",
        "2.13.0",
        '"n_layers": 2',
    ):
        assert expected in text, expected
    styles = [attributes.get("style") or "" for tag, attributes in checker.tags if tag == "path"]
    drawn = {split: sum(f"stroke: var(--{split})" in style for style in styles) for split in ("train", "validation")}
    assert drawn == {"train": 2 * 3, "validation": 2}, "each metric once with linear and once with logarithmic steps"
    assert [tag for tag, _ in checker.tags].count("image") == 1


def test_a_page_forbids_scripts_and_requests(folder: Any) -> None:
    checker = Checker(html_of(full(folder())))
    (policy,) = [attributes["content"] for tag, attributes in checker.tags if "http-equiv" in attributes]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_that_hold_html_are_shown_as_they_are(folder: Any) -> None:
    run = folder("run").config(recipe=ATTACK).lines(20, **{ATTACK: 1.0}).said("failed", ATTACK)
    record = json.loads((run.path / "config.json").read_text())
    record["run"] |= {"stage": ATTACK, "captions": [ATTACK], ATTACK: ATTACK}
    record["git"] = ATTACK
    (run.path / "config.json").write_text(json.dumps(record))
    with (run.path / "metrics.jsonl").open("a") as file:
        line = {"step": 30, "split": ATTACK, "time": ATTACK, "loss": ATTACK, "image_perplexity_by_row": [ATTACK]}
        file.write(json.dumps(line) + "\n")
    html = page([read_run(run.path)], ATTACK, NOW)
    checker = Checker(html)
    checker.require_harmless()
    assert "<script" not in html
    assert "".join(checker.text).count("<script>alert(1)</script>") >= 6, "it is text"


def test_sample_sheets_are_small_pictures_in_the_page_spread_over_the_steps(folder: Any) -> None:
    run = folder().config().lines(20)
    for step in range(1, 31):
        sheet(run, step, size=(3000, 500))
    (run.path / "samples" / "step00000031.png").write_bytes(b"no picture")
    html = html_of(run)
    checker = Checker(html)
    images = [attributes for tag, attributes in checker.tags if tag == "img"]
    assert len(images) == MAX_SHEETS - 1
    assert "step00000031.png cannot be read" in html
    assert images[-1]["alt"] == "transformer: samples at step 1"
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").partition(",")[2]))) as picture:
            assert picture.format == "JPEG"
            assert picture.size == (1000, 167)


def test_a_sheet_that_would_be_large_is_made_smaller(folder: Any) -> None:
    import numpy as np

    run = folder().config().lines(20)
    (run.path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.path / "samples" / "step00000001.png")
    assert len(html_of(run)) < 700_000


def test_a_page_of_runs_that_have_hardly_begun_or_are_damaged(folder: Any) -> None:
    begun = folder("begun").config().said("running")
    damaged = folder("damaged")
    (damaged.path / "metrics.jsonl").write_text('{"step": 1, "lo')
    checker = Checker(html_of(begun, damaged))
    checker.require_harmless()
    assert "No metrics yet." in checker.text
    assert "config.json is missing or damaged." in checker.text


def test_the_command_writes_the_page_where_it_is_told(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = full(folder("bundle", "training", "transformer"))
    bundle = run.path.parents[1]
    assert training.cli.main.main(["report", str(bundle)]) == 0
    assert capsys.readouterr().out.strip() == str(bundle / "report.html")
    out = bundle.parent / "pages" / "mine.html"
    assert training.cli.main.main(["report", str(run.path), "--out", str(out)]) == 0
    Checker(out.read_text()).require_harmless()
    assert sorted(path.name for path in out.parent.iterdir()) == ["mine.html"]


def test_a_page_of_a_real_run(tmp_path: Path, shards: Path) -> None:
    run = FitRun(tmp_path, tiny.open_world(shards), join())
    run(tiny.train_config(steps=6, validate_every=2, sample_every=3), validation=run.data)
    target = write_report(tmp_path / "run")
    checker = Checker(target.read_text())
    checker.require_harmless()
    told = {(attributes.get("alt") or "").rpartition(": ")[2] for _, attributes in checker.tags}
    assert {"samples at step 3", "samples at step 6"} <= told
    assert "finished" in "".join(checker.text)


def test_pictures_and_quality_come_first_on_a_page(folder: Any) -> None:
    first = full(folder("all", "mine", "training", "dvae"))
    second = full(folder("all", "mine", "training", "transformer"))
    html = html_of(first, second)
    positions = [html.index(part) for part in ("validation: loss 3", "<img ", "<main>", "Earlier samples", "state")]
    assert positions[:4] == sorted(positions[:4])
    shown = [attributes["alt"] for tag, attributes in Checker(html).tags if tag == "img"]
    assert [alt.rpartition(" ")[2] for alt in shown] == ["100", "100", "50", "50"], (
        "the newest of each run, then others"
    )


def test_a_page_fits_a_narrow_screen(folder: Any) -> None:
    checker = Checker(html_of(full(folder())))
    style = checker.text[next(i for i, text in enumerate(checker.text) if "color-scheme" in text)]
    assert "overflow-x" not in style
    assert "overflow-wrap: anywhere" in style
    assert "white-space: pre-wrap" in style
    tags = [tag for tag, _ in checker.tags]
    assert tags.count("pre") == 1, "config.json alone; the status is a table, whose cells wrap"
    for tag, attributes in checker.tags:
        assert tag != "svg" or not {"width", "height"} & attributes.keys(), "it is as wide as its place"


def test_a_page_has_colours_for_light_and_dark_screens_in_its_curves_too(folder: Any) -> None:
    html = html_of(full(folder()))
    assert "@media (prefers-color-scheme: dark)" in html
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svgs)) == set()
    used = set(re.findall(r"var\((--\w+)\)", svgs))
    assert used == {"--faint", "--rule", "--train", "--validation"}
    assert all(html.count(f"{name}: #") == 2 for name in used)


def test_no_id_is_used_twice_on_a_page(folder: Any) -> None:
    checker = Checker(html_of(full(folder("a")), full(folder("b"))))
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


# --------------------------------------------------------------------------------------------------------- curves


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    match = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--{kind}\)', svg)
    assert match is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", match[1])]


def curve(points: list[tuple[int, float]]) -> list[Curve]:
    return [Curve(kind="train", points=points)]


def test_a_curve_that_falls_goes_down_and_to_the_right() -> None:
    svg = chart(curve([(1, 4.0), (2, 3.0), (3, 2.0)]), log_x=False)
    (x0, y0), (x1, y1), (x2, y2) = places(svg, "train")
    assert x0 < x1 < x2
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y0 < y1 < y2, "SVG counts from the top"
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2)


def test_on_logarithmic_axes_equal_factors_are_equal_distances() -> None:
    svg = chart(curve([(1, 1.0), (10, 100.0), (100, 10_000.0)]), log_x=True)
    (x0, y0), (x1, y1), (x2, y2) = places(svg, "train")
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2)


def test_a_long_curve_keeps_its_peaks_as_a_band() -> None:
    points = [(step, 100.0 if step == 5000 else 10.0) for step in range(1, 10_001)]
    svg = chart(curve(points), log_x=False)
    assert len(places(svg, "train")) <= MAX_POINTS
    assert len(svg) < 20_000
    band = re.search(r'<path d="([^"]*)"[^>]*style="fill: var\(--train\)', svg)
    assert band is not None
    assert min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", band[1])) < 30


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e30, 5])
@pytest.mark.parametrize("log_x", [True, False])
def test_a_single_or_constant_value_is_drawn_too(value: float, log_x: bool) -> None:
    for points in ([(7, value)], [(0, value), (7, value), (9, value)]):
        svg = chart(curve(points), log_x=log_x)
        assert Checker(svg).wrong == []
        assert "nan" not in svg
        assert "inf" not in svg
    assert chart(curve([]), log_x=log_x) == ""


def test_marks_of_axes_are_numbers_that_people_read() -> None:
    labels = {0: "0", 3e-4: "0.0003", 1e-6: "1e-06", 0.1 + 0.2: "0.3", 1500: "1500", 12_500: "12.5k", 2.5e6: "2.5M"}
    assert {value: label(value) for value in labels} == labels
    assert label(-3e9) == "-3G"


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1500.0, 123_456.0, 9e14])
def test_no_mark_of_an_axis_is_cut_off(scale: float) -> None:
    svg = chart(curve([(step, scale * (1 + step / 1000)) for step in range(0, 1000, 7)]), log_x=False)
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', svg)
    marks = re.findall(r"<text ([^>]*)>([^<]+)</text>", svg)
    assert len(marks) >= 6
    for attributes, text in marks:
        left = mark_start(attributes, text)
        assert left >= 0, (text, attributes)
        assert left + LETTER * len(text) <= float(width) + LETTER, (text, attributes)


LETTER = 5.2
"""Units that a digit of the charts' text is wide, at most."""


def mark_start(attributes: str, text: str) -> float:
    (x,) = re.findall(r'x="([\d.]+)"', attributes)
    anchor = re.findall(r"text-anchor: (\w+)", attributes)
    share = {"end": 1.0, "middle": 0.5}.get(anchor[0], 0.0) if anchor else 0.0
    return float(x) - share * LETTER * len(text)


def pixels_of(svg: str) -> Image.Image:
    (data,) = re.findall(r'xlink:href="data:image/png;base64,([^"]*)"', svg)
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_a_heat_map_is_dark_where_values_are_low() -> None:
    svg = heat_map([(10, [1.0, 100.0]), (20, [10.0, 10.0])])
    pixels = pixels_of(svg)
    assert pixels.size == (2, 2)
    assert sorted(colour for _, colour in pixels.getcolors() or []) == [(32, 144, 140), (68, 1, 84), (253, 231, 36)]
    assert Checker(svg).wrong == []
    assert heat_map([]) == ""


def test_a_heat_map_of_a_long_run_stays_small() -> None:
    svg = heat_map([(step, [float(row + 1) for row in range(32)]) for step in range(1, 20_000)])
    assert pixels_of(svg).size == (MAX_COLUMNS, 32)
    assert len(svg) < 30_000


# ------------------------------------------------------------------------------------------------ evaluations


def test_an_evaluation_is_shown_without_any_run(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 4, generator=generator)
    reference = Reference(moments=Moments.of(real), features=real, note="reference: 40 pictures")
    by_n = {n: distances(torch.randn(20, 4, generator=generator) + 1 / n, reference) for n in (1, 2)}
    right = Estimate(mean=0.25, low=0.2, high=0.3, subsets=0.26)
    points = [Point(rank=rank, n=n, right=right, clip=right) for rank in ("clip", "oracle") for n in (1, 2)]
    found = BestOfN(captions=20, curve=points, distances=by_n, blurred={0: by_n[1], 2.0: by_n[2]})
    net = SimpleNamespace(name="own-clip", hash="0123456789abcdef")
    result = Result(protocol={"seed": 7}, lines=[], rank="clip", has_judge=False, net=net, found=found)
    (tmp_path / "evaluation.json").write_text(json.dumps({"psnr": 30.0, "best_of": result.as_json()}))
    html = write_report(tmp_path).read_text()
    assert html.count("data:image/png;base64,") == 4  # right, cosine, distance over N and over blur
    assert html.count("FD-own-clip (n=20, weights 01234567)") >= 4
    assert "The same CLIP picks and judges" in html
    assert "&#34;seed&#34;: 7" in html
    assert "<script" not in html


def test_an_evaluation_that_is_none_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("{", '{"best_of": 3}', '{"best_of": {"curve": []}}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(FileNotFoundError, match="there is no run"):
            write_report(tmp_path)
        assert "left out of the report" in caplog.text
    (tmp_path / "evaluation.json").write_text('{"psnr": 30.0}')
    with pytest.raises(FileNotFoundError, match="there is no run"):
        write_report(tmp_path)
