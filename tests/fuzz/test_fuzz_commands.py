"""The same doors through the command lines: exit code 0 or 1, and every line on stderr one of ours."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import damaged, json_files, picture
from odd_folders import folders, write
from odd_json import EXCLUDED, METRICS, RESULT, RUN_CONFIG
from odd_pictures import corpus
from odd_shards import FORMATS, members, tar_of, whole_tar
from odd_tables import tables_of_people

from dalle.cli.main import main as dalle
from training.cli.main import main as train

PREFIXES = ("error: ", "warning: ", "note: ")


def knock(door: Door, main: Callable[[Sequence[str]], int], *arguments: object, names: str) -> str:
    """Run a command as a door, and return what it printed."""
    out, err = io.StringIO(), io.StringIO()

    def check() -> int:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        lines = [line for line in err.getvalue().splitlines() if line.strip()]
        strange = [line for line in lines if not line.startswith(PREFIXES)]
        assert not strange, f"on stderr: {strange[:3]}"
        assert code in (0, 1), f"exit code {code}"
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == code, f"exit code {code} with {errors}"
        if code:
            raise ValueError(errors[0])
        return sum(line.startswith("warning: ") for line in lines)

    door.knock(check, names=names)
    return out.getvalue()


@fuzz(60)
@given(files=folders(), as_table=st.booleans(), table=tables_of_people())
def test_dalle_train_shards(
    files: dict[bytes, bytes], as_table: bool, table: tuple[list[str], str, str], tmp_path: Path, door: Door
) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    folder.mkdir()
    write(files, folder)
    (folder / "a.jpg").write_bytes(picture("JPEG")) if not (folder / "a.jpg").is_dir() else None
    source = folder
    if as_table:
        source = folder / "table.csv"
        source.write_bytes(table[2].join(table[0]).encode("utf-8", "replace"))
    printed = knock(door, train, "shards", source, "--out", out, names="source")
    if printed:
        report = json.loads((out / "report.json").read_text())
        n = report["n_samples"] + sum(report["skipped"].values()) + report["n_joined"]
        require_kept(report["n_rows"] == n, report)
        require_kept(f"{report['n_rows']:,}" in printed.splitlines()[0], printed)


SHARDS = st.one_of(
    st.tuples(members(), st.sampled_from(FORMATS)).map(lambda one: tar_of(*one)), damaged(whole_tar(FORMATS[0]))
)


@fuzz(60)
@given(data=st.lists(SHARDS, min_size=1, max_size=2), excluded=json_files(EXCLUDED), exclude=st.booleans())
def test_dalle_train_check_data(data: list[bytes], excluded: bytes, exclude: bool, tmp_path: Path, door: Door) -> None:
    shards = tmp_path / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    for number, one in enumerate(data):
        (shards / f"{number}.tar").write_bytes(one)
    (tmp_path / "excluded.jsonl").write_bytes(excluded)
    more = ["--exclude-keys", tmp_path / "excluded.jsonl"] if exclude else []
    knock(
        door,
        train,
        "check-data",
        "--data",
        shards,
        "--workers",
        0,
        *more,
        names="excluded.jsonl" if exclude else "shards",
    )


@fuzz(40)
@given(metrics=st.lists(json_files(METRICS), max_size=3), config=json_files(RUN_CONFIG))
def test_dalle_train_status_and_report(metrics: list[bytes], config: bytes, tmp_path: Path, door: Door) -> None:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_bytes(b"\n".join(metrics))
    (run / "config.json").write_bytes(config)
    knock(door, train, "status", run, names="run")
    knock(door, train, "report", run, "--out", tmp_path / "report.html", names="run")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


@fuzz(50)
@given(
    numbers=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    data=st.data(),
    shard=SHARDS,
    verb=st.sampled_from(("rank", "search", "reconstruct")),
)
def test_dalle_with_pictures(
    numbers: list[int],
    data: st.DataObject,
    shard: bytes,
    verb: str,
    bundle: Path,
    pictures: Path,
    tmp_path: Path,
    door: Door,
) -> None:
    shutil.rmtree(pictures)
    pictures.mkdir()
    for number in numbers:
        (pictures / f"{number}.jpg").write_bytes(data.draw(damaged(corpus()[number % len(corpus())][1], 2)))
    (tmp_path / "shard.tar").write_bytes(shard)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    match verb:
        case "rank":
            source = data.draw(st.sampled_from((pictures, tmp_path / "shard.tar")))
            knock(door, dalle, "rank", "a red cube", source, "--bundle", bundle, names=source.name)
        case "search":
            knock(door, dalle, "search", "a red cube", pictures, "--bundle", bundle, names="pictures")
        case "reconstruct":
            knock(door, dalle, "reconstruct", pictures, "--bundle", bundle, "--out", out, names="pictures")


@fuzz(25)
@given(captions=st.one_of(st.binary(max_size=30), st.just("a red cube\n🙂".encode())), results=json_files(RESULT))
def test_dalle_generate(captions: bytes, results: bytes, bundle: Path, tmp_path: Path, door: Door) -> None:
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (tmp_path / "captions.txt").write_bytes(captions)
    (out / "results.jsonl").write_bytes(results)
    before = (out / "results.jsonl").read_bytes()
    arguments = ["generate", "--captions", tmp_path / "captions.txt", "--bundle", bundle, "--out", out]
    knock(door, dalle, *arguments, "-n", 1, "--keep", 1, names="")
    try:
        was_right = json.loads(before).keys() >= {"caption", "file"}
    except (ValueError, AttributeError, RecursionError):
        was_right = False
    if was_right and door.counts["right"]:
        kept = (out / "results.jsonl").read_bytes()
        # lines of this caption, and of pictures in its folder, are replaced with the pictures
        is_replaced = b"a red cube" in before or b"a-red-cube" in before
        require_kept(before.strip() in kept or is_replaced, "a line of results.jsonl")
