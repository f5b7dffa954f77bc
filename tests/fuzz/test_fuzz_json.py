"""JSON that users write or damage: configurations, manifests, tokenizers, lists of samples, a run's own files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import ODD_JSON, damaged, index_files, json_files
from odd_json import EXCLUDED, METRICS, RESULT, RUN_CONFIG
from support import tiny

from dalle.data.bundle import load_bundle, sampling_defaults
from dalle.data.reader import ShardData
from dalle.output.results import ResultWriter
from dalle.tokenizer import Tokenizer
from rerank import CLIPTokenizer
from storage.exclusions import Excluded
from training.data.check_data import check_data
from training.data.check_report import report as check_report
from training.data.manifest import Manifest, open_with_manifest
from training.data.record import ShardRecord, located, state_if_there
from training.engine.checkpoints import latest_tag, read_manifest, write_manifest
from training.engine.deepspeed_config import resolve
from training.loop.run_folder import RunSpec
from training.ranks.ranks import Ranks
from training.report.report import write_report
from training.report.status import show_status
from training.stages.inputs import note_data

DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "torch_autocast": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "steps_per_print": 10,
    "compile": {},
}


@fuzz(1200)
@given(data=json_files(DEEPSPEED))
def test_deepspeed_json(data: bytes, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(data)

    def check() -> int:
        resolved = resolve(tiny.train_config(deepspeed_config=path), 1)
        json.dumps(resolved.deepspeed)
        return 0

    door.knock(check, names=path.name)


@pytest.fixture(scope="module")
def models(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("models") / "tiny"))


@fuzz(800)
@given(data=st.data(), part=st.sampled_from(("dvae", "dalle", "clip")))
def test_configurations_of_models(data: st.DataObject, part: str, bundle: Path, models: Path, door: Door) -> None:
    whole = json.loads((bundle / part / "config.json").read_bytes())
    if data.draw(st.booleans()):  # a size
        name = data.draw(st.sampled_from(sorted(whole["config"])))
        whole["config"][name] = data.draw(
            st.one_of(st.sampled_from(ODD_JSON), st.integers(-3, 50), st.integers(0, 2**40))
        )
    (models / part / "config.json").write_bytes(data.draw(json_files(whole)))

    def check() -> int:
        loaded = load_bundle(models, "cpu", "fp32")
        sampling_defaults(loaded.dalle)
        return 0

    door.knock(check, names="tiny" if part != "dalle" else "")
    shutil.copy(bundle / part / "config.json", models / part / "config.json")


@fuzz(600)
@given(data=st.data(), name=st.sampled_from(("tokenizer.json", "clip/tokenizer.json")))
def test_tokenizers(data: st.DataObject, name: str, bundle: Path, tmp_path: Path, door: Door) -> None:
    whole = json.loads((bundle / name).read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.draw(json_files(whole)))

    def check() -> int:
        if name == "tokenizer.json":
            tokenizer = Tokenizer.load(path)
            require_kept(tokenizer.decode(tokenizer.encode("a red cube")) == "a red cube", "text")
        else:
            require_kept(CLIPTokenizer.load(path).tokenize(["a red cube"], 24).shape == (1, 24), "text")
        return 0

    door.knock(check, names=path.name)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shards, and the manifest of both."""
    folder = tmp_path_factory.mktemp("checked")
    tiny.write_world(folder / "shards", 6)
    check_data([folder / "shards"], folder / "manifest")
    return folder


@fuzz(500)
@given(data=st.data(), which=st.integers(0, 9))
def test_manifests(data: st.DataObject, which: int, checked: Path, tmp_path: Path, door: Door) -> None:
    copy = tmp_path / "manifest"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checked / "manifest", copy)
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    path = paths[which % len(paths)]
    whole = path.read_bytes()
    changes = json_files(json.loads(whole)) if path.suffix == ".json" else index_files(whole)
    path.write_bytes(data.draw(changes))

    def check() -> int:
        manifest = Manifest.open(copy)
        opened = open_with_manifest([checked / "shards"], manifest, captions=True)
        n_bad = 0
        for i in range(len(opened)):
            try:
                opened.read(i)
            except (ValueError, OSError):
                n_bad += 1
        return n_bad + opened.report.n_without_caption + opened.report.n_without_image

    def check_again() -> int:
        check_report(check_data([checked / "shards"], copy), copy)
        return 0

    door.knock(check, names="manifest")
    door.knock(check_again, names="manifest")


FIXTURES = Path(__file__).parents[1] / "fixtures/v0.1"


@fuzz(400)
@given(data=st.data())
def test_records_of_version_0_1(data: st.DataObject, tmp_path: Path, door: Door) -> None:
    (whole,) = (FIXTURES / "manifest/shards").iterdir()
    path = tmp_path / "record.json"
    path.write_bytes(data.draw(json_files(json.loads(whole.read_bytes()))))

    def check() -> int:
        shard = FIXTURES / "shards/world-000000.tar"
        index, _ = located(ShardRecord.load(path), shard, state_if_there(shard))
        assert index.lost is not None
        return int(index.lost.sum())

    door.knock(check, names=path.name)


@fuzz(600)
@given(lines=st.lists(json_files(EXCLUDED).filter(lambda line: len(line) < 9000), max_size=3))
def test_lists_of_samples(lines: list[bytes], tmp_path: Path, door: Door) -> None:
    path = tmp_path / "excluded.jsonl"
    path.write_bytes(b"\n".join(lines))

    def check() -> int:
        excluded = Excluded.read([path])
        rows = excluded.rows(["00000001", "b"], "/data/shards/tiny-000000.tar")
        require_kept(len(rows) == 2, rows)
        return int(rows.sum())

    door.knock(check, names=path.name)


@fuzz(400)
@given(lines=st.lists(json_files(RESULT), min_size=1, max_size=3), is_torn=st.booleans())
def test_results(lines: list[bytes], is_torn: bool, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "results.jsonl"
    whole = b"\n".join(lines) + b"\n" * (not is_torn)
    path.write_bytes(whole)

    def check() -> int:
        with ResultWriter(tmp_path):
            pass
        return 0

    door.knock(check, names=path.name)
    require_kept(path.read_bytes() == whole, "results.jsonl was changed")


RUN_STATE = {"state": "failed", "reason": "a full disk", "time": 1.7e9, "host": "here"}


@fuzz(500)
@given(
    metrics=st.lists(json_files(METRICS), max_size=4),
    config=json_files(RUN_CONFIG),
    state=json_files(RUN_STATE),
    latest=st.sampled_from((b"step00000010", b"\xff", b"", b"../x")),
    with_report=st.integers(0, 19),
)
def test_files_of_a_run(
    metrics: list[bytes], config: bytes, state: bytes, latest: bytes, with_report: int, tmp_path: Path, door: Door
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes(b"\n".join(metrics))
    (run / "config.json").write_bytes(config)
    (run / "state.json").write_bytes(state)
    (run / "checkpoints/latest").write_bytes(latest)

    def check() -> int:
        with (tmp_path / "out").open("w", encoding="utf-8", errors="strict") as out:
            show_status(tmp_path, out=out)
        if with_report == 0:
            write_report(tmp_path, tmp_path / "report.html")
        return 0

    door.knock(check, names=tmp_path.name)


CHECKPOINT = {
    "step": 10,
    "ranks": 1,
    "zero_stage": 0,
    "state": {"seed": 0},
    "files": {"x.pt": {"bytes": 3, "blake2b": "0"}},
}


@fuzz(400)
@given(data=st.one_of(json_files(CHECKPOINT), st.just(b"")), signed=st.booleans())
def test_manifests_of_checkpoints(data: bytes, signed: bool, tmp_path: Path, door: Door) -> None:
    folder = tmp_path / "checkpoints/step00000010"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.json"
    path.write_bytes(data)
    if signed:
        try:
            write_manifest(folder, json.loads(data))
        except (ValueError, TypeError, RecursionError):
            path.write_bytes(data)

    def check() -> int:
        require_kept(latest_tag(tmp_path / "checkpoints") == folder.name, "the only checkpoint")
        read_manifest(folder)
        return 0

    door.knock(check, names=path.name)


@fuzz(300)
@given(data=st.data())
def test_data_json_of_a_run(data: st.DataObject, checked: Path, tmp_path: Path, door: Door) -> None:
    shards = ShardData.open([checked / "shards"], captions=True)
    run, ranks = tmp_path / "run", Ranks(rank=0, size=1, device=torch.device("cpu"))
    note_data(RunSpec(directory=run, description={}), shards, None, ranks)
    folder = run / "checkpoints/step00000010"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").write_text("{}")
    whole = json.loads((run / "data.json").read_bytes())
    (run / "data.json").write_bytes(data.draw(json_files(whole)))

    def check() -> int:
        note_data(RunSpec(directory=run, description={}), shards, None, ranks)
        return 0

    try:
        door.knock(check, names="data.json")
    finally:
        shutil.rmtree(run)


Reader = Callable[[Path], object]


@fuzz(200)
@given(
    data=st.binary(max_size=200).flatmap(damaged), name=st.sampled_from(("ds.json", "tokenizer.json", "results.jsonl"))
)
def test_files_that_are_no_json(data: bytes, name: str, tmp_path: Path, door: Door) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    readers: dict[str, Reader] = {
        "ds.json": lambda path: resolve(tiny.train_config(deepspeed_config=path), 1),
        "tokenizer.json": Tokenizer.load,
        "results.jsonl": lambda path: ResultWriter(path.parent).__enter__().__exit__(),
    }

    def check() -> int:
        readers[name](path)
        return 0

    door.knock(check, names=name)
