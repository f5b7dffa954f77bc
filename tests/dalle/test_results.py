import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.best_of_n import Result
from dalle.output import results
from dalle.output.results import ResultWriter
from dalle.output.sheets import slug

CAPTION = "a red cube"


def drawn(caption: str = CAPTION, k: int = 2, seed: int = 0) -> Result:
    numbers = torch.rand(k, generator=torch.Generator().manual_seed(seed))
    return Result(
        caption=caption,
        images=numbers[:, None, None, None].expand(k, 3, 4, 4),
        scores=numbers,
        log_likelihoods=-numbers,
        tokens=torch.zeros(k, 4, dtype=torch.int64),
        candidates=tuple(range(k)),
        rank="clip",
    )


def write(out: Path, *drawings: Result, seed: int = 0) -> None:
    with ResultWriter(out) as writer:
        for result in drawings:
            writer.add(result, {"seed": seed}, {})


def checked_lines(out: Path) -> list[dict]:
    """The lines, each of which must name a picture of its own that says the same."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    for line in lines:
        with Image.open(out / line["file"]) as image:
            held = {name: json.loads(image.text[name]) for name in ("rank", "score", "candidate", "seed")}
            assert {**held, "caption": image.text["caption"], "file": image.text["file"]} == {
                name: line[name] for name in (*held, "caption", "file")
            }
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_caption_made_again_replaces_its_pictures_and_no_others(tmp_path, caplog):
    caplog.set_level("INFO", "dalle")
    write(tmp_path, drawn(k=3), drawn("another"))
    write(tmp_path, drawn(k=2, seed=1), seed=1)
    assert [(line["caption"], line["seed"]) for line in checked_lines(tmp_path)] == [("another", 0)] * 2 + [
        (CAPTION, 1)
    ] * 2
    assert names(tmp_path / slug(CAPTION)) == ["01.png", "02.png"]
    assert "replaced the 3 pictures of an earlier run" in caplog.text
    assert names(tmp_path) == sorted([slug(CAPTION), "another", "results.jsonl"])


def test_what_a_run_writes_meanwhile_stays(tmp_path, caplog):
    caplog.set_level("INFO", "dalle")
    write(tmp_path, drawn())
    with ResultWriter(tmp_path) as first:
        write(tmp_path, drawn(k=3, seed=1), seed=1)  # begins while another is under way
        first.add(drawn(seed=2), {"seed": 2}, {})
    lines = checked_lines(tmp_path)
    assert sorted(line["seed"] for line in lines) == [1, 1, 1, 2, 2]
    assert [line["file"] for line in lines if line["seed"] == 1] == [f"{slug(CAPTION)}/0{i}.png" for i in (3, 4, 5)]
    assert "stay: the new ones begin with 03.png" in caplog.text


def test_what_was_written_since_a_run_began_stays(tmp_path):
    write(tmp_path, drawn())
    for seed, age_s, kept in ((1, 60.0, [0, 0, 1, 1]), (2, 0.0, [2, 2])):
        with ResultWriter(tmp_path, age_s) as writer:
            writer.add(drawn(seed=seed), {"seed": seed}, {})
        assert [line["seed"] for line in checked_lines(tmp_path)] == kept


def test_pictures_that_no_line_names_stay(tmp_path):
    folder = tmp_path / slug(CAPTION)
    folder.mkdir()
    (folder / "02.png").write_text("somebody's")
    write(tmp_path, drawn())
    assert (folder / "02.png").read_text() == "somebody's"
    assert [line["file"] for line in checked_lines(tmp_path)] == [f"{slug(CAPTION)}/0{i}.png" for i in (3, 4)]


def test_captions_whose_folders_have_one_name_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "slug", lambda caption: "same")
    write(tmp_path, drawn("one"), drawn("two", seed=1))
    assert [line["file"] for line in checked_lines(tmp_path)] == [f"same/0{i}.png" for i in (1, 2, 3, 4)]
    write(tmp_path, drawn("one", seed=2), seed=2)
    assert (
        sorted((line["caption"], line["seed"]) for line in checked_lines(tmp_path))
        == [("one", 2)] * 2 + [("two", 0)] * 2
    )


def _write_some(out: Path, number: int) -> None:
    for i in range(4):
        write(out, drawn(seed=number), drawn(f"caption {i} of {number}"), seed=number)


def test_runs_at_once_lose_and_mix_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    with ResultWriter(tmp_path):  # so that none of them begins alone
        runs = [context.Process(target=_write_some, args=(tmp_path, number)) for number in range(4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
        assert [run.exitcode for run in runs] == [0] * 4
    lines = checked_lines(tmp_path)
    assert len(lines) == 4 * 4 * 2 * 2
    assert sorted(line["seed"] for line in lines if line["caption"] == CAPTION) == sorted([*range(4)] * 8)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def _end_in_the_middle(out: Path) -> None:
    with ResultWriter(out) as writer:
        writer.add(drawn(), {"seed": 1}, {})
        results._append = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
        writer.add(drawn("another"), {"seed": 1}, {})


def test_a_run_that_is_killed_keeps_nobody_out(tmp_path):
    run = multiprocessing.get_context("fork").Process(target=_end_in_the_middle, args=(tmp_path,))
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    assert len(checked_lines(tmp_path)) == 2
    write(tmp_path, drawn(seed=2), seed=2)
    assert [line["seed"] for line in checked_lines(tmp_path)] == [2, 2]
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path, caplog):
    write(tmp_path, drawn())
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes() + b'{"caption": "x", "fi')
    write(tmp_path, drawn("another"))
    assert [line["caption"] for line in checked_lines(tmp_path)] == [CAPTION] * 2 + ["another"] * 2
    assert "was cut short by a crash" in caplog.text


def test_a_last_line_without_an_end_is_kept(tmp_path):
    write(tmp_path, drawn())
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    write(tmp_path, drawn("another"))
    assert len(checked_lines(tmp_path)) == 4


@pytest.mark.parametrize(
    "text",
    [
        "notes",
        "[" * 100_000,
        "[" * 100_000 + "\n",
        '{"caption": "x"}\n',
        '{"caption": "x", "file": "../../precious.png"}\n',
    ],
)
def test_a_file_of_something_else_is_not_touched(tmp_path, text):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"is not a results\.jsonl"):
        write(tmp_path, drawn())
    assert (tmp_path / "results.jsonl").read_text() == text
    assert names(tmp_path) == ["results.jsonl"]


def test_a_full_disk_is_named_and_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path, drawn())
    before = checked_lines(tmp_path)

    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as filled:
        filled.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write(tmp_path, drawn(seed=1), seed=1)
    assert caught.value.filename == str(tmp_path / slug(CAPTION))
    assert checked_lines(tmp_path) == before
    assert names(tmp_path / slug(CAPTION)) == ["01.png", "02.png"]


def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", drawn())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {slug(CAPTION): 0o750, "01.png": 0o640, "02.png": 0o640, "results.jsonl": 0o640}
