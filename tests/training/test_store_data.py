"""Shards in stores, on the web and S3, give what the same shards give from a local folder."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import s3
from servers.web import Web, serving
from support import tiny

pytest.importorskip("aiohttp", reason="nothing here reads the web: pip install 'dalle[http]'")

import training.cli.main
import training.ranks.job
import training.recipes
from dalle.data.names import expand_shards
from dalle.data.reader import ShardData
from dvae import DVAE
from rerank import CLIP
from storage.stores import errors, files
from storage.stores.errors import Patience, StoreError
from training.data.batches import Share, batches
from training.data.manifest import Manifest, open_with_manifest
from training.run_files import read_metrics
from training.stages.inputs import Inputs
from training.stages.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)
    monkeypatch.setattr(errors, "PATIENCE", Patience(attempts=3, stall_s=20.0, min_speed=1, first_wait_s=0.01))


@pytest.fixture
def web(shards: Path, tmp_path: Path) -> Iterator[Web]:
    shutil.copytree(shards, tmp_path / "served" / "world")
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def bucket(shards: Path, s3_bucket: str) -> str:
    s3.put_folder(shards, "world")
    return s3_bucket


@pytest.fixture(params=["web", pytest.param("s3", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> str:
    """The URL of the folder of shards, in either store."""
    return (
        f"{request.getfixturevalue('web').url if request.param == 'web' else request.getfixturevalue('bucket')}/world"
    )


def run(*arguments: object) -> int:
    return training.cli.main.main([str(argument) for argument in arguments])


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_names_folders_patterns_and_ranges_of_stores_are_shards(world: str, shards: Path) -> None:
    local = names(expand_shards([shards]))
    assert len(local) == 3
    assert names(expand_shards([world])) == names(expand_shards([f"{world}/"])) == local
    assert names(expand_shards([f"{world}/*-00000[01].tar"])) == local[:2]
    assert names(expand_shards([f"{world}/world-{{000000..000002}}.tar"])) == local
    assert names(expand_shards([Path(f"{world}/{local[1]}"), f"{world}/{local[1]}"])) == local[1:2]
    with pytest.raises(FileNotFoundError, match=r"no shards at .*/nothing/: expected \*\.tar there"):
        expand_shards([f"{world}/nothing/"])
    assert expand_shards([f"{world}/nothing/"], skip_missing=True) == []
    with pytest.raises(ValueError, match=r"x\.tar\.gz is compressed"):
        expand_shards([f"{world}/x.tar.gz"])


def test_samples_are_those_of_a_local_folder(world: str, shards: Path) -> None:
    local, remote = ShardData.open([shards], captions=True), ShardData.open([world], captions=True)
    assert [remote.fingerprint(n) for n in range(3)] == [local.fingerprint(n) for n in range(3)]
    for shard in remote.shards[1:]:
        shard.unlink(missing_ok=True)  # as if others had needed the room
    for i in range(len(local)):
        assert remote.read(i).image_bytes == local.read(i).image_bytes
        assert remote.captions(i) == local.captions(i)


def test_shards_that_left_the_cache_do_not_stay_open(web: Web, shards: Path) -> None:
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    files.use_cache(None, 1.5 * max(sizes) / 1e9)
    data, local = ShardData.open([f"{web.url}/world"], captions=True), ShardData.open([shards], captions=True)
    for i in range(0, 24, 4):
        assert data.read(i).image_bytes == local.read(i).image_bytes
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this loop
            links.append(os.readlink(link))
    assert sum("/cache/shards/" in link and "(deleted)" in link for link in links) <= 1


def bundle_in(folder: Path, shards: Path) -> Path:
    """Make a bundle with a tokenizer and a dVAE."""
    train_tokenizer(tiny.recipe(), Inputs(data=[shards], out=folder), lambda line: None)
    torch.manual_seed(0)
    DVAE(tiny.recipe().dvae.model).save(folder / "dvae")
    return folder


def losses(bundle: Path, stage: str) -> list[float]:
    return [line["loss"] for line in read_metrics(bundle / "training" / stage)]


def test_encoding_and_training_from_a_store_give_the_same_losses(world: str, shards: Path, tmp_path: Path) -> None:
    found = {}
    for name, data in (("local", shards), ("remote", world)):
        out = bundle_in(tmp_path / name, shards)
        tokens = tmp_path / name / "tokens"
        assert run("clip", "tiny", "--data", data, "--validation", data, "--out", out) == 0
        assert run("encode", "--data", data, "--dvae", out / "dvae", "--out", tokens, "--crops", 2, "--workers", 0) == 0
        assert run("transformer", "tiny", "--data", tokens, "--out", out) == 0
        found[name] = (
            losses(out, "clip"),
            losses(out, "transformer"),
            [p.read_bytes() for p in sorted(tokens.iterdir())],
        )
    assert len(found["local"][0]) == 5
    assert found["remote"] == found["local"]
    assert CLIP.load(tmp_path / "remote" / "clip")


def test_a_manifest_opens_shards_of_a_store_without_fetching_them(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = f"{web.url}/world/world-{{000000..000002}}.tar"
    assert run("check-data", "--data", urls, "--out", tmp_path / "m", "--workers", 2, "--cache", tmp_path / "one") == 0
    assert set(web.gets().values()) == {1}
    files.use_cache(tmp_path / "two", 1)
    web.seen.clear()
    data = open_with_manifest([urls], Manifest.open(tmp_path / "m"), captions=True)
    assert (len(data), data.report.n_lost, web.gets()) == (24, 0, {})
    data.read(0)
    assert web.gets() == {"world-000000.tar": 1}
    (tmp_path / "served" / "world" / "world-000001.tar").unlink()
    files.use_cache(tmp_path / "three", 1)
    data = open_with_manifest([urls], Manifest.open(tmp_path / "m"), captions=True)
    assert (len(data), data.report.n_lost) == (24, 8)


def test_a_store_that_fails_ends_the_run_in_words(
    web: Web, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle_in(tmp_path / "out", shards)
    web.always = "403"
    assert run("clip", "tiny", "--data", f"{web.url}/world/world-{{000000..000002}}.tar", "--out", out) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {web.url}/world/world-000000.tar cannot be read, its store forbids it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_fails_later_is_no_fault_of_samples(
    web: Web, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = ShardData.open([f"{web.url}/world"], captions=True)
    for shard in data.shards:
        shard.unlink()
    web.always = "500"
    share = Share(seed=1, micro_batch=4)
    with pytest.raises(StoreError, match="cannot be read, its store fails"):
        next(batches(data, lambda *_: {}, share, workers=workers))
    assert "unusable sample" not in caplog.text


def test_a_shard_that_is_gone_later_counts_as_bad_samples(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    data = ShardData.open([f"{web.url}/world"], captions=True)
    data.shards[1].unlink()
    (web.folder / "world" / "world-000001.tar").unlink()
    share = Share(seed=1, micro_batch=24, max_steps=1)
    size = {"size": torch.tensor(0)}
    with caplog.at_level(logging.WARNING):
        (batch,) = batches(data, lambda *_: size, share, max_bad_fraction=0.5)
    assert batch.n_bad == 8
    assert "no http" in caplog.text
    assert "world-000001.tar in its store: check the name, or restore it" in caplog.text
    with pytest.raises(ValueError, match=r"8 unusable samples .*--max-bad-fraction"):
        list(batches(data, lambda *_: size, share, max_bad_fraction=0.1))


@pytest.mark.slow
def test_image_tokens_are_written_to_a_store_and_read_from_there(bucket: str, shards: Path, tmp_path: Path) -> None:
    out, tokens = bundle_in(tmp_path / "out", shards), tmp_path / "tokens"
    given = ["--data", f"{bucket}/world", "--dvae", out / "dvae", "--crops", "2", "--workers", "0"]
    assert run("encode", *given, "--out", tokens) == 0
    assert run("encode", *given, "--out", f"{bucket}/tokens") == 0
    written = s3.keys("tokens/")
    assert written == [f"tokens/world-00000{n}.tar" for n in range(3)]
    local, remote = (ShardData.open([one], captions=True, encoded=True) for one in (tokens, f"{bucket}/tokens"))
    assert all((local.read(i).image_tokens == remote.read(i).image_tokens).all() for i in range(24))
    assert run("encode", *given, "--out", f"{bucket}/tokens", "--cache", tmp_path / "another") == 0
    assert run("encode", *given, "--seed", "1", "--out", f"{bucket}/tokens") == 1
    assert run("encode", *given, "--seed", "1", "--fresh", "--out", f"{bucket}/tokens") == 0
    changed = ShardData.open([f"{bucket}/tokens"], captions=True, encoded=True)
    assert changed.encoding != local.encoding


@pytest.mark.slow
def test_a_manifest_is_kept_in_a_store(bucket: str, shards: Path, tmp_path: Path) -> None:
    check = ["check-data", "--data", f"{bucket}/world", "--out", f"{bucket}/manifest", "--workers", "0"]
    assert run(*check, "--cache", tmp_path / "one") == 0
    assert [key for key in s3.keys("manifest/") if "shards/" not in key] == ["manifest/summary.json"]
    records = s3.keys("manifest/shards")
    assert run(*check, "--cache", tmp_path / "two") == 0
    assert s3.keys("manifest/shards") == records
    out = bundle_in(tmp_path / "out", shards)
    given = ["--data", f"{bucket}/world", "--manifest", f"{bucket}/manifest", "--out", out]
    assert run("clip", "tiny", *given, "--cache", tmp_path / "three") == 0


def test_what_we_write_webdataset_reads_and_what_it_writes_we_read(shards: Path, tmp_path: Path) -> None:
    import webdataset

    ours = ShardData.open([shards], captions=True)
    urls = [str(path) for path in expand_shards([shards])]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [one["__key__"] for one in theirs] == [ours.key(i) for i in range(24)]
    assert [one["png"] for one in theirs] == [ours.read(i).image_bytes for i in range(24)]
    assert [tuple(one["txt"].decode().splitlines()) for one in theirs] == [ours.captions(i) for i in range(24)]
    with webdataset.ShardWriter(str(tmp_path / "theirs-%06d.tar"), maxcount=10, verbose=0) as writer:
        for one in theirs:
            writer.write({"__key__": one["__key__"], "png": one["png"], "txt": one["txt"].decode()})
    again = ShardData.open([tmp_path], captions=True)
    assert len(again.shards) == 3
    assert [again.key(i) for i in range(24)] == [ours.key(i) for i in range(24)]
    assert [again.read(i).image_bytes for i in range(24)] == [ours.read(i).image_bytes for i in range(24)]
    assert [again.captions(i) for i in range(24)] == [ours.captions(i) for i in range(24)]
