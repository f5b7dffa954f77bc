import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.status import NOW, RunFolder

import training.cli.main
from training.report import status
from training.report.runs import find_runs
from training.report.status import ASCII_BLOCKS, BLOCKS, ago, show_status, size, sparkline


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., RunFolder]:
    return lambda *parts: RunFolder(tmp_path.joinpath(*(parts or ("run",))))


NewFolder = Callable[..., RunFolder]


def test_a_run_that_goes_on_says_how_far_it_is_and_how_long_it_will_take(folder: NewFolder) -> None:
    run = folder().config(steps=100).lines(40, until=NOW - 4).said("running", at=NOW - 60)
    text = run.summary()
    assert "transformer, recipe demo" in text
    assert "running, last sign of life 4 s ago" in text
    assert "step 40 of 100 (40.0%), 1:00 left" in text


@pytest.mark.parametrize(("silence_s", "state"), [(100, "running"), (119, "running"), (121, "no sign of life since")])
def test_a_run_that_should_have_written_something_shows_no_sign_of_life(
    folder: NewFolder, silence_s: float, state: str
) -> None:
    run = folder().config().lines(40, until=NOW - silence_s).said("running", at=NOW - 3000)
    assert state in run.summary()


def test_a_run_whose_steps_take_long_has_longer_to_write_something(folder: NewFolder) -> None:
    run = folder().config(log_every=1000).lines(40, until=NOW - 4000).said("running")
    assert "running" in run.summary(NOW)
    assert "no sign of life since" in run.summary(NOW + 6000)


def test_how_a_run_ended_is_told(folder: NewFolder) -> None:
    stopped = folder("a").config().lines(40).checkpoint(40).said("stopped", "stopped at step 40 of 100")
    assert "stopped, 2027-01-15" in stopped.summary(NOW + 30 * 86400)
    assert "30 days ago: stopped at step 40 of 100" in stopped.summary(NOW + 30 * 86400)
    assert "1:00 of training left" in stopped.summary()
    failed = folder("b").config().lines(40).said("failed", "No space left on device")
    assert ": No space left on device" in failed.summary()
    finished = folder("c").config().lines(100).checkpoint(100).said("finished")
    assert "finished" in finished.summary()
    assert "left" not in finished.summary().split("progress")[1].splitlines()[0]


def test_a_run_that_left_no_word_is_judged_by_its_checkpoint_and_its_lines(folder: NewFolder) -> None:
    assert "finished" in folder("a").config().lines(100).checkpoint(100).summary(NOW + 1e6)
    assert "no sign of life since" in folder("b").config().lines(40).checkpoint(40).summary(NOW + 1e6)
    assert "running" in folder("c").config().lines(40).summary(NOW + 10)
    assert "finished" in folder("d").config().lines(100).checkpoint(100).said("stopped").summary()


def test_time_in_which_nothing_ran_is_not_counted_as_time_of_steps(folder: NewFolder) -> None:
    run = folder().config(steps=200).lines(100, until=NOW - 86_400)
    for step in range(110, 141, 10):
        with (run.path / "metrics.jsonl").open("a") as file:
            line = {"step": step, "split": "train", "time": NOW - (140 - step), "loss": 1.0}
            file.write(json.dumps(line) + "\n")
    assert "1:00 left" in run.summary()


def test_losses_come_with_their_change_and_a_curve(folder: NewFolder) -> None:
    text = folder().config().lines(100, text_loss=2.5).validation(50, 4.0).validation(100, 3.5).summary()
    assert "loss         3 (-1 in 50 steps)" in text
    assert "text loss    2.5 (+0 in 50 steps)" in text
    assert "█▇▇▆▅▄▃▂▁▁" in text.replace(" ", "") or BLOCKS[-1] in text
    assert "step 100, 1,500 samples: loss 3.5 (-0.5 in 50 steps)" in text


def test_speed_and_health_are_shown_where_they_are_known(folder: NewFolder) -> None:
    values = {
        "learning_rate": 3e-4,
        "grad_norm": 0.5,
        "tokens_per_s": 41_234.0,
        "mfu": 0.381,
        "data_wait": 0.02,
        "peak_memory_gib": 3.14159,
        "bad_samples": 7.0,
        "skipped_steps": 2.0,
        "loss_scale": 65536.0,
    }
    text = folder("a").config().lines(20, **values).summary()
    assert "learning rate 0.0003, gradient norm 0.5, loss scale 65,536, skipped steps 2" in text
    assert "41,234 tokens/s, MFU 38.1%, waiting for data 2.0%, 3.14 GiB at most" in text
    assert "bad samples 7" in text
    assert "GiB free" in text or "MiB free" in text or "TiB free" in text
    assert "MFU" not in folder("b").config().lines(20).summary()


def test_checkpoints_are_listed_with_size_and_age_and_what_is_no_good_is_named(folder: NewFolder) -> None:
    run = folder().config().lines(40).checkpoint(20, saved_at=NOW - 7300).checkpoint(40)
    assert "step 40, 3.0 KiB, 5 min ago; step 20, 3.0 KiB, 2 h ago (older)" in run.summary()
    alone = folder("b").config().lines(40).checkpoint(40, is_latest=False)
    assert "step 40, 3.0 KiB, 5 min ago (not complete)" in alone.summary()


def test_damaged_files_are_left_out_and_counted(folder: NewFolder) -> None:
    run = folder().config().lines(40)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 50, "lo\n\xff\xfe\n[1, 2]\n{"no": "step"}\n{"step": "x"}\n\n')
        file.write(b'{"step": 60, "split": "train", "loss": null}\n{"step": 70, "loss": "<b>"}\n')
    text = run.summary()
    assert "5 lines of metrics.jsonl cannot be read" in text
    assert "step 70 of 100" in text
    assert "4.2 (" in text
    (run.path / "config.json").write_text("{")
    assert "step 70" in run.summary()
    (run.path / "checkpoints").write_text("no folder")
    assert "checkpoints  none" in run.summary()


def test_numbers_that_nothing_can_hold_are_left_out(folder: NewFolder) -> None:
    run = folder().config().lines(40)
    with (run.path / "metrics.jsonl").open("a") as file:
        for odd in ("1" * 400, "-3", "1e308", "true", "[" * 100_000):
            file.write(f'{{"step": {odd}, "split": "train", "loss": 1}}\n')
            file.write(f'{{"step": 50, "split": "train", "loss": {odd}, "time": {odd}}}\n')
    (run.path / "state.json").write_text('{"state": "failed", "time": 1e300}')
    assert "step 50 of 100" in run.summary()
    (run.path / "config.json").write_text('{"run": {}, "training": {"steps": 0, "log_every": -1}}')
    assert "step 50\n" in run.summary()
    (run.path / "config.json").write_text("[" * 100_000)
    assert "step 50\n" in run.summary()


def test_a_run_that_has_only_begun_is_a_run(folder: NewFolder) -> None:
    text = folder().config().said("running", at=NOW - 30).summary()
    assert "running, last sign of life 30 s ago" in text
    assert "step 0 of 100" in text


def test_names_cannot_command_the_terminal(folder: NewFolder) -> None:
    text = folder().config(recipe="\x1b[2Jdemo\n").lines(20).said("failed", "\x1b]0;title\x07").summary()
    assert "\x1b" not in text
    assert "recipe \\x1b[2Jdemo\n" in text, "named as everywhere else, in one line"
    assert "\x07" not in text


def test_runs_are_found_in_a_run_a_bundle_and_a_folder_of_bundles(tmp_path: Path, folder: NewFolder) -> None:
    first = folder("all", "mine", "training", "dvae").config().path
    second = folder("all", "mine", "training", "transformer").config().path
    third = folder("all", "other", "training", "clip").config().path
    os.utime(first / "config.json", (NOW, NOW))
    os.utime(second / "config.json", (NOW - 10, NOW - 10))
    (tmp_path / "all" / "mine" / "dvae").mkdir()
    (tmp_path / "all" / "mine" / "dvae" / "config.json").write_text('{"format": 1}')  # a model, no run
    assert find_runs(second) == [second]
    assert find_runs(tmp_path / "all" / "mine") == [second, first], "in the order of their start"
    assert find_runs(tmp_path / "all" / "mine" / "training") == [second, first]
    assert find_runs(tmp_path / "all") == [second, first, third]


def test_where_there_is_no_run_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no run in .*: expected a run's directory"):
        show_status(tmp_path)
    for arguments in (["status", str(tmp_path)], ["status", str(tmp_path / "gone")], ["report", str(tmp_path)]):
        assert training.cli.main.main(arguments) == 1
        assert capsys.readouterr().err.startswith("error: there is no")
    with pytest.raises(ValueError, match="--watch must be above 0"):
        show_status(tmp_path, watch_s=0)


def test_the_command_prints_every_run(folder: NewFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("dvae", "transformer"):
        folder("bundle", "training", stage).config().lines(40, until=time.time())
    assert training.cli.main.main(["status", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("step 40 of 100") == 2
    assert "\x1b" not in shown, "a pipe gets plain text"


def test_watching_shows_it_again_until_it_has_ended(folder: NewFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder().config().lines(40, until=time.time())
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            run.said("stopped", "asked to", at=time.time())

    monkeypatch.setattr(status.time, "sleep", wait)
    out = io.StringIO()
    show_status(run.path, watch_s=7, out=out)
    assert waited == [7, 7]
    assert out.getvalue().count("step 40 of 100") == 3


def test_ctrl_c_ends_watching_quietly(folder: NewFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupt)
    show_status(folder().config().lines(40, until=time.time()).path, watch_s=1, out=io.StringIO())


@pytest.mark.parametrize("verb", ["status", "report"])
def test_what_only_reads_does_not_wait_for_torch(folder: NewFolder, verb: str) -> None:
    run = folder("läuft").config().lines(40)
    program = (
        "import sys; from training.cli.main import main\ncode = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if verb == "status" else "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", program, verb, str(run.path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert verb == "report" or ASCII_BLOCKS[-1] in done.stdout, "a terminal without UTF-8 gets other blocks"


def test_a_curve_goes_from_low_to_high() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([1, 1, 1]) == BLOCKS[0] * 3
    assert sparkline([1]) == ""
    assert sparkline([*range(600)], width=8) == BLOCKS
    assert sparkline([0, 7], ASCII_BLOCKS) == ASCII_BLOCKS[0] + ASCII_BLOCKS[-1]


def test_sizes_and_ages_are_for_people() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 << 30: "5.0 GiB", 3 << 50: "3072.0 TiB"}
    assert {n_bytes: size(n_bytes) for n_bytes in sizes} == sizes
    ages = {3: "3 s ago", 119: "119 s ago", 121: "2 min ago", 7300: "2 h ago", 200_000: "2 days ago"}
    assert {seconds: ago(seconds) for seconds in ages} == ages
    assert ago(-5) == "in the future by this clock"
