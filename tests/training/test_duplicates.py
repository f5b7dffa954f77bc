import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from support import tiny
from support.corrupt import encoded
from support.tiny import all_keys, write_tar
from torch import Tensor

import training.cli.main
from dalle.data.reader import ShardData
from rerank import CLIP
from training.data.check_data import check_data
from training.data.duplicates import Pair, copies, features_of, find_duplicates, near_pairs, nearest
from training.data.manifest import Manifest, open_with_manifest


def unit_vectors(n: int, seed: int) -> Tensor:
    vectors = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def smooth(seed: int) -> Image.Image:
    """A picture of coarse blotches: a random one of 4×4 pixels, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def members(pictures: dict[str, Image.Image]) -> list[tuple[str, bytes]]:
    made = []
    for key, picture in pictures.items():
        made += [(f"{key}.png", encoded(picture, "PNG")), (f"{key}.txt", f"picture {key}".encode())]
    return made


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(tiny.recipe().clip.model).eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures in two shards: b3 is a0 again as a JPEG would be, b4 a little brighter than a1."""
    first = {f"a{i}": smooth(i) for i in range(6)}
    second = {f"b{i}": smooth(10 + i) for i in range(6)}
    second["b3"] = first["a0"].copy()
    second["b4"] = ImageEnhance.Brightness(first["a1"]).enhance(1.02)
    write_tar(tmp_path / "data" / "0.tar", members(first))
    write_tar(tmp_path / "data" / "1.tar", members(second))
    return tmp_path / "data"


@pytest.mark.parametrize("block", [3, 7, 100])
def test_pairs_by_blocks_are_those_of_all_cosines(block: int) -> None:
    vectors, others = unit_vectors(20, 0), unit_vectors(13, 1)
    among, between = vectors @ vectors.T, vectors @ others.T
    expected = {(i, j) for i in range(20) for j in range(i + 1, 20) if among[i, j] >= 0.3}
    found = near_pairs(vectors, None, 0.3, block=block)
    assert {(pair.first, pair.second) for pair in found} == expected
    assert len(found) == len(expected) > 5
    assert [pair.cosine for pair in found] == sorted((pair.cosine for pair in found), reverse=True)
    found = near_pairs(vectors, others, 0.3, block=block)
    assert {(pair.first, pair.second) for pair in found} == set(map(tuple, (between >= 0.3).nonzero().tolist()))
    best = nearest(vectors, others, block=block)
    assert {pair.second: pair.first for pair in best} == dict(enumerate(between.argmax(0).tolist()))
    assert [pair.cosine for pair in best] == pytest.approx(between.max(0).values.sort(descending=True).values.tolist())


def test_when_there_are_too_many_pairs_the_nearest_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    vectors = unit_vectors(40, 0)
    everything = near_pairs(vectors, None, -1.0)
    assert len(everything) == 780
    kept = near_pairs(vectors, None, -1.0, most=25, block=8)
    assert {pair[1:] for pair in kept} == {pair[1:] for pair in everything[:25]}
    assert len(kept) == 25
    assert "more than 25 pairs" in caplog.text


def test_of_two_copies_the_later_goes_and_a_chain_keeps_what_is_no_pair() -> None:
    pairs = [Pair(0.99, 0, 1), Pair(0.98, 1, 2), Pair(0.97, 2, 3), Pair(0.96, 0, 5), Pair(0.99, 1, 5)]
    # 1 goes for 0; 2 is near 1 only, which is gone, so it stays; 3 goes for 2
    assert copies(pairs) == {1: pairs[0], 3: pairs[2], 5: pairs[3]}


def test_the_features_are_those_of_the_pictures_and_unreadable_ones_are_left_out(tmp_path: Path, clip: CLIP) -> None:
    shard = write_tar(tmp_path / "s.tar", [*members({"a": smooth(0)}), ("bad.png", b"x"), *members({"b": smooth(1)})])
    features, numbers = features_of(ShardData.open([shard], captions=False), clip)
    assert numbers == [0, 2]
    assert features.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert features[0] @ features[1] < 0.999999


def test_copies_within_data_are_found_listed_shown_and_left_out_of_training(
    data: Path, tmp_path: Path, clip: CLIP
) -> None:
    out = tmp_path / "found"
    found = find_duplicates(ShardData.open([data], captions=False), None, clip, out, threshold=0.9999)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert pairs[0] == {
        "cosine": pytest.approx(1.0),
        "shard": f"{data.name}/0.tar",
        "key": "a0",
        "other_shard": f"{data.name}/1.tar",
        "other_key": "b3",
    }
    assert {(pair["key"], pair["other_key"]) for pair in pairs} >= {("a0", "b3")}
    left_out = {json.loads(line)["key"] for line in (out / "excluded.jsonl").read_text().splitlines()}
    assert "b3" in left_out
    assert "a0" not in left_out
    assert found.n_excluded == len(left_out)
    assert Image.open(out / "pairs.png").width > 300
    check_data([data], tmp_path / "m", exclude=[out / "excluded.jsonl"])
    kept = open_with_manifest([data], Manifest.open(tmp_path / "m"), captions=True)
    assert set(all_keys(kept)) == {f"a{i}" for i in range(6)} | {f"b{i}" for i in range(6)} - left_out


def test_overlap_lists_the_nearest_training_picture_of_every_validation_picture(
    data: Path, tmp_path: Path, clip: CLIP
) -> None:
    validation = write_tar(tmp_path / "v.tar", members({"v0": smooth(77), "v1": smooth(3), "v2": smooth(78)}))
    train, held_out = (ShardData.open([path], captions=False) for path in (data, validation))
    out = tmp_path / "found"
    found = find_duplicates(train, held_out, clip, out, threshold=1.0)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert sorted(pair["other_key"] for pair in pairs) == ["v0", "v1", "v2"]
    assert (pairs[0]["key"], pairs[0]["other_key"]) == ("a3", "v1")
    assert [pair["cosine"] for pair in pairs] == sorted((pair["cosine"] for pair in pairs), reverse=True)
    (line,) = (out / "excluded.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "shard": f"{data.name}/0.tar",
        "key": "a3",
        "reason": f"cosine 1.0000 with v1 in {tmp_path.name}/v.tar",
    }
    assert (found.n_against, found.n_overlapping, found.n_excluded) == (3, 1, 1)
    assert "1 (33.3%) of the others have such a picture in the data" in str(found)


def test_the_command_finds_them_with_the_clip_of_a_bundle(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["duplicates", "--data", str(data), "--clip", str(bundle), "--out", str(tmp_path / "found")]
    assert training.cli.main.main([*command, "--threshold", "1", "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "12 pictures, among themselves" in shown
    assert "excluded.jsonl to `dalle-train check-data --exclude-keys`" in shown
    assert json.loads((tmp_path / "found" / "excluded.jsonl").read_text().splitlines()[0])["key"] == "b3"
    assert training.cli.main.main([*command, "--threshold", "1.5"]) == 1
    assert "the threshold must be a cosine" in capsys.readouterr().err


def test_a_list_of_no_duplicates_leaves_nothing_out(tmp_path: Path, clip: CLIP) -> None:
    path = write_tar(tmp_path / "s.tar", members({"a": smooth(1), "b": smooth(2)}))
    found = find_duplicates(ShardData.open([path], captions=False), None, clip, tmp_path / "found", threshold=1.0)
    assert found.n_excluded == 0
    check_data([path], tmp_path / "m", exclude=[tmp_path / "found" / "excluded.jsonl"])
