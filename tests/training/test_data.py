import gzip
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.tiny import all_keys, samples_of, write_tar

from dalle.data.index import IMAGE, index_shard
from dalle.data.names import expand_shards
from dalle.data.reader import Sample, ShardData, sample_rng


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tar(tmp_path / "data-000000.tar", samples_of(range(0, 6)))
    write_tar(tmp_path / "data-000001.tar", samples_of(range(6, 11)))
    return tmp_path


@pytest.fixture
def data(shards: Path) -> ShardData:
    return ShardData.open([shards], captions=True)


# names to paths


def test_folders_globs_and_braces_expand_to_each_shard_once(shards: Path) -> None:
    write_tar(shards / "deep" / "er" / "data-000002.tar", samples_of(range(1)))
    write_tar(shards / ".making-x" / "data-000009.tar", samples_of(range(1)))
    first, second, third = shards / "data-000000.tar", shards / "data-000001.tar", shards / "deep/er/data-000002.tar"
    assert expand_shards([shards]) == [first, second, third]
    assert expand_shards([f"{shards}/data-{{000000..000001}}.tar"]) == [first, second]
    assert expand_shards([f"{shards}/data-00000{{1,0}}.tar"]) == [second, first]
    assert expand_shards([f"{shards}/*.tar", first]) == [first, second]
    assert expand_shards([f"{shards}/deep/**/*.tar"]) == [third]


@pytest.mark.parametrize("url", ["pipe:touch owned", " pipe:cat x", "ftp://host/a.tar", "file:/a.tar"])
def test_urls_and_pipes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL or a command"):
        expand_shards([url])


def test_what_is_not_there_is_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shard .*data-000002\.tar \(one of .*000000\.\.000002"):
        expand_shards([f"{shards}/data-{{000000..000002}}.tar"])
    with pytest.raises(FileNotFoundError, match=r"no shard .*x\*\.tar"):
        expand_shards([f"{shards}/x*.tar"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no shards in the folder .*nothing: expected \*\.tar"):
        expand_shards([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no shards were given"):
        expand_shards([])
    for pattern in ("x-{0..999999999999}.tar", "x-{0..999999}-{0..9}.tar", "x-{9..1}.tar"):
        with pytest.raises(ValueError, match="expected 1 to 1,000,000"):
            expand_shards([pattern])


def test_compressed_shards_are_refused_by_name_and_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = write_tar(tmp_path / "a" / "x.tar", samples_of(range(2))).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed \(gzip\).*gunzip it first"):
        expand_shards([tmp_path / "a.tar.gz"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x.TAR").write_bytes(plain)
    (tmp_path / "kept" / "y.tar.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "kept" / "link").symlink_to(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in expand_shards([tmp_path / "kept"])] == ["x.TAR"]
    assert "y.tar.gz is compressed: gunzip it first; link is a link to a folder" in caplog.text
    (tmp_path / "b.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(ValueError, match=r"b\.tar is compressed \(gzip\).*gunzip"):
        ShardData.open([tmp_path / "b.tar"], captions=True, skip_damaged=True)


# one shard


def test_an_img2dataset_shard_is_read_as_it_is(tmp_path: Path) -> None:
    members = []
    for number in range(3):
        key = f"{number:09}"
        about = json.dumps({"caption": f"json {number}", "url": "http://x", "status": "success"}).encode()
        members += [(f"{key}.jpg", bytes([number])), (f"{key}.json", about), (f"{key}.txt", f"text {number}".encode())]
    data = ShardData.open([write_tar(tmp_path / "00000.tar", members)], captions=True)
    assert all_keys(data) == ["000000000", "000000001", "000000002"]
    assert data.read(2) == Sample(
        key="000000002", image_bytes=b"\2", captions=("text 2",), source=f"{tmp_path}/00000.tar: 000000002.jpg"
    )


def test_captions_come_from_json_when_there_is_no_text(tmp_path: Path) -> None:
    members = [("a.png", b"1"), ("a.json", b'{"captions": ["one", " ", "two\\nlines"]}')]
    members += [("b.webp", b"1"), ("b.json", b'{"caption": "three"}'), ("c.PNG", b"1"), ("c.CAP", b"four")]
    data = ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert [data.read(i).captions for i in range(3)] == [("one", "two lines"), ("three",), ("four",)]
    assert data.captions(1) == ("three",)


def test_text_wins_over_json_and_json_may_call_the_caption_otherwise(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.json", b'{"caption": "json"}'), ("a.txt", b"text"), ("b.jpg", b"1"), ("b.txt", b"")]
    members += [("b.json", b'{"caption": "", "prompt": "four"}'), ("c.JFIF", b"1"), ("c.json", b'{"text": ["x", 7]}')]
    data = ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert [data.captions(i) for i in range(3)] == [("text",), ("four",), ("x",)]


def test_a_caption_is_a_line_with_something_to_see(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\rthree\n\u200b\nform\x0cfeed\u2028x", "\ufeff\u200b\n", "\ufeffmarked"]
    members = [(f"{i}.{field}", data) for i, text in enumerate(texts) for field, data in (("jpg", b"1"), ("txt", text))]
    members = [(name, data if isinstance(data, bytes) else data.encode()) for name, data in members]
    members += [("3.jpg", b"1"), ("3.txt", "é".encode("utf-16"))]
    data = ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert all_keys(data) == ["0", "2", "3"]
    assert data.captions(0) == ("one", "two", "three", "form\x0cfeed\u2028x")
    assert (data.captions(1), data.captions(2)) == (("marked",), ("é",))


def dotted(numbers: range) -> list[tuple[str, bytes]]:
    """Samples whose names have more dots than that of the field."""
    return [(f"p{n}.v1.{field}", data) for n in numbers for field, data in (("jpg", b"1"), ("txt", b"x"))]


def test_names_with_more_dots_are_told_with_the_field_that_they_gave(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "p0: p0.v1.jpg has the field 'v1.jpg', because a key ends at the first dot"
    with pytest.raises(ValueError, match=rf"all\.tar has no pictures: expected KEY.*; found {told}"):
        ShardData.open([write_tar(tmp_path / "all.tar", dotted(range(6)))], captions=True)
    half = write_tar(tmp_path / "half.tar", [*dotted(range(6)), *samples_of(range(2))])
    with caplog.at_level(logging.WARNING):
        assert ShardData.open([half], captions=True).report.n_without_image == 6
    assert f"left out of the shards: 6 without image ({told} of a name; p1:" in caplog.text


def test_captions_that_cannot_be_read_are_told_with_reason_and_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [*samples_of(range(2)), ("curly.jpg", b"1"), ("curly.txt", "Bob\u2019s".encode("cp1252"))]
    members += [("none.jpg", b"1"), ("odd.jpg", b"1"), ("odd.json", b'{"url": "x"}')]
    with caplog.at_level(logging.WARNING):
        data = ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert data.report.n_without_caption == 3
    assert "3 without caption (curly: caption is not UTF-8; none; odd: caption is missing in its JSON)" in caplog.text


def test_pictures_of_formats_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        *samples_of(range(2)),
        ("phone.HEIC", b"1"),
        ("phone.txt", b"x"),
        ("empty.jpg", b""),
        ("empty.txt", b"x"),
    ]
    with caplog.at_level(logging.WARNING):
        ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert "(phone: format .heic is not read: save it as JPEG" in caplog.text
    assert "empty: empty.jpg is empty" in caplog.text


def test_members_of_a_sample_may_lie_apart_and_keys_end_at_the_first_dot(tmp_path: Path) -> None:
    names = ["./d.x/a.txt", "./d.x/a.seg.png", "b.jpg", "./d.x/a.jpg", "b.txt", "._b.jpg", "noextension"]
    data = ShardData.open([write_tar(tmp_path / "s.tar", [(n, n.encode()) for n in names])], captions=True)
    assert all_keys(data) == ["d.x/a", "b"]
    assert data.read(0).image_bytes == b"./d.x/a.jpg"


def test_links_devices_and_names_that_lead_outside_are_ignored_and_counted(tmp_path: Path) -> None:
    hostile: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        hostile.append(info)
    hostile += [("../../up.jpg", b"1"), ("/etc/abs.jpg", b"1")]
    path = write_tar(tmp_path / "s.tar", [*hostile, *samples_of(range(2))])
    data = ShardData.open([path], captions=True)
    assert all_keys(data) == ["k000", "k001"]
    assert data.report.n_ignored_members == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]


def test_the_first_of_duplicate_members_counts(tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.txt", b"x"), ("a.jpg", b"22")]))
    assert (index.keys, index.n_duplicates, index.places[0, IMAGE, 1]) == (("a",), 1, 1)


def test_a_truncated_shard_is_refused_and_its_whole_samples_can_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples_of(range(5))).read_bytes()
    cut = tmp_path / "cut.tar"
    # A sample is 4 blocks: cut at every block of the last one, within headers, within data, and between members.
    for n_bytes, n_whole in (
        (16 * 512, 4),
        (16 * 512 + 100, 4),
        (17 * 512, 4),
        (17 * 512 + 1, 4),
        (18 * 512, 4),
        (19 * 512, 4),
    ):
        cut.write_bytes(whole[:n_bytes])
        message = (
            rf"cut\.tar ends in the middle of a sample \(truncated\): {n_whole} whole samples before it; make it again"
        )
        for captions in (True, False):
            with pytest.raises(ValueError, match=message):
                ShardData.open([cut], captions=captions)
            data = ShardData.open([cut], captions=captions, skip_damaged=True)
            assert all_keys(data) == [f"k{number:03}" for number in range(n_whole)]
            assert len(data.report.damaged_shards) == 1
    assert "which are used" in caplog.text


def test_a_damaged_header_and_joined_tars_do_not_lose_samples_silently(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples_of(range(5))).read_bytes()
    (tmp_path / "hurt.tar").write_bytes(whole[: 8 * 512] + b"\xff" * 200 + whole[8 * 512 + 200 :])
    with pytest.raises(ValueError, match=r"damaged header at byte 4,096: 2 whole samples before it"):
        ShardData.open([tmp_path / "hurt.tar"], captions=True)
    (tmp_path / "joined.tar").write_bytes(whole + whole)
    with pytest.raises(ValueError, match="two tar files joined"):
        ShardData.open([tmp_path / "joined.tar"], captions=True)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", r"is empty \(0 bytes\)"), (b"garbage" * 999, "is not a tar file")]
)
def test_what_is_no_tar_is_refused_or_left_out(shards: Path, content: bytes, message: str) -> None:
    (shards / "zzz.tar").write_bytes(content)
    with pytest.raises(ValueError, match=rf"zzz\.tar {message}.*--skip-damaged-shards"):
        ShardData.open([shards], captions=True)
    data = ShardData.open([shards], captions=True, skip_damaged=True)
    assert len(data) == 11
    assert len(data.report.damaged_shards) == 1
    with pytest.raises(ValueError, match="no usable shard among 1"):
        ShardData.open([shards / "zzz.tar"], captions=True, skip_damaged=True)


def test_shards_without_captions_pictures_or_samples_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("y.jpg", b"1"), ("y.txt", b" \n"), ("y.json", b"{}")])
    with pytest.raises(ValueError, match=r"a\.tar has no captions: expected KEY\.txt beside KEY\.jpg"):
        ShardData.open([path], captions=True)
    assert len(ShardData.open([path], captions=False)) == 2
    path = write_tar(tmp_path / "b.tar", [("x.npy", b"1"), ("x.txt", b"1")])
    with pytest.raises(ValueError, match=r"b\.tar has no pictures"):
        ShardData.open([path], captions=False)
    with pytest.raises(ValueError, match=r"c\.tar has no samples"):
        ShardData.open([write_tar(tmp_path / "c.tar", [])], captions=False)


# all data


def test_samples_without_picture_or_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    members = [*samples_of(range(2)), ("p.txt", b"x"), ("c.jpg", b"1"), ("d.jpg", b"1"), ("d.txt", b"\n \n")]
    members += [("e.jpg", b"1"), ("e.txt", b"\xff\xfe"), ("f.jpg", b""), ("f.txt", b"x")]
    data = ShardData.open([write_tar(tmp_path / "s.tar", members)], captions=True)
    assert len(data) == 2
    assert (data.report.n_without_image, data.report.n_without_caption) == (2, 3)
    assert data.read(0).captions == ("caption 0", "another")


def test_a_shard_that_changes_after_indexing_is_noticed(shards: Path, data: ShardData) -> None:
    (shards / "data-000001.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        data.read(10)


def test_epochs_are_different_permutations_that_a_seed_repeats(data: ShardData) -> None:
    orders = [data.order(seed, epoch) for seed in (0, 1) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(11))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert data.order(1, 2).tolist() == orders[-1].tolist()


def test_randomness_of_a_sample_is_its_own_and_repeatable() -> None:
    names = [(0, 0, "a", "x"), (1, 0, "a", "x"), (0, 1, "a", "x"), (0, 0, "b", "x"), (0, 0, "a", "y")]
    draws = [sample_rng(*name).random() for name in names]
    assert len(set(draws)) == 5
    assert draws == [sample_rng(*name).random() for name in names]
    assert sample_rng(np.int64(1), 0, "a", "x").random() == draws[1]  # type: ignore[arg-type]
    assert draws[0] == pytest.approx(0.6941063636, abs=1e-9)  # the same on every machine
