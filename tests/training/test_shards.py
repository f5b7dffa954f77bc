import csv
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.data.reader import ShardData
from dvae.images import open_image, to_tensor
from training.data.batches import Share, batches
from training.data.filters import ShardFilter
from training.data.shards import RawSample, make_shards, safe_key, write_shards
from training.data.shards_report import ShardReport
from training.data.sources.pictures import LINK, LINK_TO_FOLDER


def picture(colour: tuple[int, int, int] = (200, 30, 30), kind: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def raw(count: int) -> Iterator[RawSample]:
    for number in range(count):
        yield RawSample(f"k{number}", picture((number, 0, 0)), "png", [f"caption {number}"], {"n": number})


def made(report: ShardReport) -> dict[str, tuple[str, ...]]:
    data = ShardData.open(report.shards, captions=True)
    return {sample.key: sample.captions for sample in map(data.read, range(len(data)))}


# writing


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_shards(raw(5), tmp_path / name, "x", 2) for name in ("one", "two"))
    assert [path.name for path in one] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert sorted(os.listdir(tmp_path / "one")) == [path.name for path in one]


def test_a_sample_is_a_picture_its_captions_and_json(tmp_path: Path) -> None:
    sample = RawSample("a", b"PIXELS", "jpg", ["one\n line", "日本 🎈"], {"licence": "CC0"})
    with tarfile.open(write_shards([sample], tmp_path, "x")[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {member.mtime for member in tar} == {0}
    assert members["a.jpg"] == b"PIXELS"
    assert members["a.txt"].decode() == "one line\n日本 🎈"
    assert json.loads(members["a.json"]) == {"key": "a", "captions": ["one line", "日本 🎈"], "licence": "CC0"}


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[RawSample]:
        yield from raw(5)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shards(failing(), tmp_path, "x", 2)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_replaced_only_when_asked(tmp_path: Path) -> None:
    write_shards(raw(5), tmp_path, "x", 2)
    write_shards(raw(1), tmp_path, "x-y", 2)
    with pytest.raises(ValueError, match=r"x-000000\.tar is there already"):
        write_shards(raw(1), tmp_path, "x")
    write_shards(raw(1), tmp_path, "x", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["x-000000.tar", "x-y-000000.tar"]


def test_wrong_samples_and_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples to write"):
        write_shards([], tmp_path, "x")
    with pytest.raises(ValueError, match="two samples have the key 'k0'"):
        write_shards([*raw(1), *raw(1)], tmp_path, "x")
    with pytest.raises(ValueError, match="extension 'exe'"):
        write_shards([RawSample("a", b"", "exe", [], {})], tmp_path, "x")
    with pytest.raises(ValueError, match="prefix"):
        write_shards(raw(1), tmp_path, "../x")
    with pytest.raises(ValueError, match="samples_per_shard"):
        write_shards(raw(1), tmp_path, "x", 0)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "..\\..\\x",
        "a b.c",
        "..",
        "",
        "x" * 300,
        "é" * 300,
        "\udc80",
        "a\0b",
    ],
)
def test_keys_lead_nowhere_and_fit_a_tar(name: str) -> None:
    key = safe_key(name)
    assert key
    assert all(part.strip(".") == part != "" for part in key.split("/"))
    assert len(f"{key}.json".encode()) <= 100
    assert safe_key(key) == key


def test_plain_keys_stay_and_changed_ones_stay_different() -> None:
    for name in ("000000397133", "birds/heron-1_b", "日本/犬"):
        assert safe_key(name) == name
    assert len({safe_key(name) for name in ("a.b", "a b", "a_b", "a?b", "./a_b.")}) == 5


# sources


def test_a_folder_makes_shards_that_read_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    jpeg = picture(kind="JPEG")
    put(source / "a.JPG", jpeg)
    put(source / "a.txt", "\ufeffa red picture\r\n\r\nall red\n")
    put(source / "deep" / "b.webp", picture(kind="WEBP"))
    put(source / "deep" / "b.txt", "deeper")
    put(source / "c.bmp", picture((1, 2, 3), "BMP"))
    put(source / "c.txt", "dark")
    report = make_shards(source, tmp_path / "out", samples_per_shard=2)
    assert made(report) == {"a": ("a red picture", "all red"), "c": ("dark",), "deep/b": ("deeper",)}
    assert (report.n_samples, report.n_captions, report.n_skipped, len(report.shards)) == (3, 4, 0, 2)
    data = ShardData.open([tmp_path / "out"], captions=True)
    assert data.read(0).image_bytes == jpeg
    # BMP is stored as PNG
    assert data.source(1).endswith("c.png")
    assert open_image(data.read(1).image_bytes).getpixel((0, 0)) == (1, 2, 3)
    stream = batches(
        data, lambda sample, rng: {"image": to_tensor(open_image(sample.image_bytes))}, Share(seed=0, micro_batch=3)
    )
    assert next(stream).tensors["image"].shape == torch.Size([3, 3, 12, 16])


def test_what_a_folder_loses_is_counted_by_reason_and_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    outside = put(tmp_path / "outside" / "o.png", picture())
    whole = picture(kind="JPEG", size=(64, 64))
    for name, image, caption in (
        ("good", picture(), "fine"),
        ("nocaption", picture(), None),
        ("blank", picture(), " \n\n"),
        ("cut", whole[: len(whole) // 2], "x"),
        ("garbage", b"not a picture", "x"),
        ("empty", b"", "x"),
        ("dot", picture(size=(1, 1)), "x"),
        ("latin", picture(), None),
        ("twice", picture(), "x"),
    ):
        put(source / f"{name}.png", image)
        if caption is not None:
            put(source / f"{name}.txt", caption)
    put(source / "latin.txt", "é".encode("latin-1"))
    put(source / "twice.webp", picture(kind="WEBP"))
    put(source / ".hidden.png", picture())
    (source / "link.png").symlink_to(outside)
    put(source / "link.txt", "x")
    (source / "linked").symlink_to(outside.parent)
    report = make_shards(source, tmp_path / "out")
    assert made(report) == {"good": ("fine",), "twice": ("x",)}
    assert report.examples == {
        "no caption": ("nocaption.png",),
        "empty caption": ("blank.png",),
        "corrupt image": ("cut.png", "garbage.png"),
        "empty image file": ("empty.png",),
        "picture too small": ("dot.png",),
        "caption is not UTF-8": ("latin.png",),
        "duplicate key": ("twice.webp",),
        LINK: ("link.png",),
        LINK_TO_FOLDER: ("linked",),
        "hidden file": (".hidden.png",),
    }
    assert report.skipped["corrupt image"] == 2
    assert report.n_skipped == 10
    lines = report.table().splitlines()
    assert lines[0].split() == ["read", "12", "pictures:", "2", "written,", "10", "skipped"]
    assert lines[1].split() == ["written", "2", "pictures,", "2", "captions,", "1", "shard"]
    assert any(line.split() == ["corrupt", "image", "2", "cut.png,", "garbage.png"] for line in lines)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["skipped"]["corrupt image"] == 2
    assert saved["shards"][0]["name"] == "source-000000.tar"


def test_filters_leave_pictures_out_and_say_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, size, caption in (
        ("good", (20, 16), "just right\nno"),
        ("small", (20, 9), "just right"),
        ("long", (64, 16), "just right"),
        ("short", (16, 16), "no"),
        ("wordy", (16, 16), "far too long a caption"),
    ):
        put(source / f"{name}.png", picture(size=size))
        put(source / f"{name}.txt", caption)
    put(source / "bare.png", picture(size=(16, 16)))
    keep = ShardFilter(min_caption_chars=5, max_caption_chars=12, min_side=10, max_aspect_ratio=2)
    report = make_shards(source, tmp_path / "out", keep=keep)
    assert made(report) == {"good": ("just right",)}
    assert report.skipped == dict.fromkeys(
        ["no caption", "picture too elongated", "caption too short", "picture too small", "caption too long"], 1
    )
    everything = make_shards(source, tmp_path / "all", keep=ShardFilter(need_captions=False))
    assert (everything.n_samples, everything.n_skipped) == (6, 0)
    with pytest.raises(ValueError, match="need check"):
        dataclasses.replace(keep, check=False)
    with pytest.raises(ValueError, match="max_caption_chars"):
        ShardFilter(min_caption_chars=5, max_caption_chars=4)


def test_without_check_pictures_are_not_decoded(tmp_path: Path) -> None:
    whole = picture(kind="JPEG", size=(64, 64))
    put(tmp_path / "s" / "cut.jpg", whole[: len(whole) // 2])
    put(tmp_path / "s" / "cut.txt", "x")
    assert make_shards(tmp_path / "s", tmp_path / "out", keep=ShardFilter(check=False)).n_samples == 1


@pytest.mark.parametrize(
    ("name", "delimiter", "columns"),
    [("t.csv", ",", ("caption", "image")), ("t.csv", ";", (" Image ", "TITLE")), ("t.tsv", "\t", ("filepath", "text"))],
)
def test_tables_find_their_columns_and_rows_of_one_picture_join(
    tmp_path: Path, name: str, delimiter: str, columns: tuple[str, str]
) -> None:
    put(tmp_path / "one.png", picture())
    put(tmp_path / "images" / "two.png", picture())
    put(tmp_path.parent / f"{tmp_path.name}-secret.png", picture())
    rows = [
        ("one.png", 'first, "quoted"\nline; x'),
        ("two.png", "second"),
        ("one.png", "again"),
        (str(tmp_path / "one.png"), "absolute"),
        ("gone.png", "x"),
        (f"../{tmp_path.name}-secret.png", "x"),
        ("http://host/x.png", "x"),
        ("", "x"),
        ("images/two.png", ""),
    ]
    is_image_first = columns[0] != "caption"
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", *columns])
        writer.writerows([["7", *(row if is_image_first else row[::-1])] for row in rows])
    report = make_shards(tmp_path / name, tmp_path / "out")
    assert made(report) == {"one": ('first, "quoted" line; x', "again"), "two": ("second",)}
    assert report.skipped == dict.fromkeys(
        [
            "duplicate key",
            "missing image",
            "outside the folder of pictures",
            "URL, not a file: download it first",
            "malformed row",
            "empty caption",
        ],
        1,
    )


def test_a_table_without_known_columns_lists_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no caption column among 'image', 'words': expected one called caption, captions"
    ):
        make_shards(put(tmp_path / "t.csv", "image,words\na,b\n"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no image column among 'a', 'b'"):
        make_shards(put(tmp_path / "t.tsv", "a\tb\n1\t2\n"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no image column among none"):
        make_shards(put(tmp_path / "e.csv", ""), tmp_path / "out")
    with pytest.raises(ValueError, match=r"no image column among 'x'"):
        make_shards(put(tmp_path / "t.jsonl", '{"x": 1}\n'), tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_records_take_one_caption_or_a_list(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / "pics" / f"{name}.png", picture())
    records = [
        {"file_name": "a.png", "captions": ["one", "two"]},
        {"file_name": "b.png", "captions": "three"},
        {"file_name": "c.png", "captions": None},
        ["no object"],
        {"file_name": 7, "captions": "x"},
    ]
    text = json.dumps(records) if suffix == ".json" else "\n".join([*map(json.dumps, records), "{broken", ""])
    report = make_shards(put(tmp_path / f"t{suffix}", text), tmp_path / "out", images=tmp_path / "pics")
    assert made(report) == {"a": ("one", "two"), "b": ("three",)}
    assert report.skipped == {"malformed row": 3 if suffix == ".jsonl" else 2, "no caption": 1}


def test_coco_annotations_find_their_pictures_and_all_captions(tmp_path: Path) -> None:
    for number in (1, 2):
        put(tmp_path / "val2017" / f"{number:012}.jpg", picture(kind="JPEG"))
    data = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg"} for n in (1, 2, 3, 4)],
        "annotations": [{"id": n, "image_id": image, "caption": f"caption {n}"} for n, image in enumerate((1, 1, 3))],
    }
    source = put(tmp_path / "annotations" / "captions_val2017.json", json.dumps(data))
    report = make_shards(source, tmp_path / "out")
    assert made(report) == {"000000000001": ("caption 0", "caption 1")}
    assert report.skipped == {"missing image": 2, "no caption": 1}
    assert make_shards(source, tmp_path / "other", images=tmp_path / "val2017").skipped == report.skipped
    data["annotations"] = [{"id": 1, "image_id": 1, "bbox": []}]
    with pytest.raises(ValueError, match="have no captions"):
        make_shards(put(tmp_path / "instances.json", json.dumps(data)), tmp_path / "third")
    with pytest.raises(ValueError, match="not COCO's caption format"):
        make_shards(
            put(tmp_path / "wrong.json", '{"images": [{}], "annotations": [{"caption": "x"}]}'), tmp_path / "third"
        )


def test_sources_that_cannot_be_used_are_named_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in the folder .*nothing"):
        make_shards(tmp_path / "nothing", out)
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures"):
        make_shards(tmp_path / "missing.csv", out)
    with pytest.raises(ValueError, match="a shard already"):
        make_shards(put(tmp_path / "x.tar", b""), out)
    with pytest.raises(ValueError, match=r"file of type \.pdf"):
        make_shards(put(tmp_path / "x.pdf", b""), out)
    with pytest.raises(ValueError, match="is not JSON"):
        make_shards(put(tmp_path / "x.json", "{"), out)
    with pytest.raises(ValueError, match="is not UTF-8"):
        make_shards(put(tmp_path / "x.csv", b"image,caption\n\xff,x\n"), out)
    with pytest.raises(ValueError, match=r"none of 1 picture in .*bad can be used: 1 × no caption \(a\.png\)"):
        make_shards(put(tmp_path / "bad" / "a.png", picture()).parent, out)
    assert list(tmp_path.glob("out/*")) == []


def test_progress_counts_up_to_all_pictures(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "s" / f"{number}.png", picture())
        put(tmp_path / "s" / f"{number}.txt", "x")
    seen: list[tuple[int, int]] = []
    make_shards(tmp_path / "s", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
