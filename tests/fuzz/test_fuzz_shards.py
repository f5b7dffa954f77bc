"""Shards: whole ones with odd members, damaged ones, headers that hold anything, shards of image tokens."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import damaged, index_files, json_files
from odd_shards import FORMATS, WHOLE, Member, member, members, tar_of, whole_tar

from dalle.data.image_tokens import Description, Encoding, pack
from dalle.data.index import index_shard, with_captions
from dalle.data.index_file import MIN_KEPT, keep
from dalle.data.pictures import Pictures
from dalle.data.reader import ShardData
from dalle.data.shard import state_of
from dalle.data.usable import usable_part
from dvae.images import open_image
from storage.tar import whole_members
from training.data.check_shard import check_shard
from training.data.record import ShardRecord


def check_counts(path: Path) -> int:
    """Require that samples of a shard and those left out are all its keys, read all, and return the number left out."""
    index = index_shard(path)
    data = path.read_bytes()
    for captions in (True, False):
        if index.tokens is None:
            part, report = usable_part(index, captions=captions)
            n = report.n_samples + report.n_without_image + report.n_without_caption
            require_kept(n == len(index.keys), f"{len(index.keys)} keys, {n} told of")
            require_kept(len(part.keys) == report.n_samples, "samples")
    record = check_shard(path)
    assert record.index.has_caption is not None
    require_kept(list(record.index.keys) == list(index.keys), "the check finds other keys")
    record.save(path.with_name("record.index"))
    again = ShardRecord.load(path.with_name("record.index"))
    require_kept(list(again.index.keys) == list(index.keys), "keys of a record")
    if index.damage is not None:
        return 1
    opened = ShardData.open([path], captions=index.tokens is None, encoded=index.tokens is not None)
    n_bad = 0
    for i in range(len(opened)):
        try:
            sample = opened.read(i)
            require_kept(sample.image_bytes in data, "bytes of a picture")
            if index.tokens is None:
                open_image(sample.image_bytes, sample.source)
        except (ValueError, OSError) as error:
            require_kept(path.name in str(error), f"{error} names no shard")
            n_bad += 1
    require_kept(len(opened) + len(record.problems) - n_bad >= len(index.keys) - n_bad, record.problems)
    return n_bad + len(index.keys) - len(opened)


@fuzz(600)
@given(found=members(), form=st.sampled_from(FORMATS))
def test_shards_with_odd_members(found: list[Member], form: int, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_of(found, form))
    door.knock(lambda: check_counts(path), names=path.name)


@fuzz(600)
@given(data=st.tuples(members(), st.sampled_from(FORMATS)).flatmap(lambda one: damaged(tar_of(*one))))
def test_damaged_shards(data: bytes, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    door.knock(lambda: check_counts(path), names=path.name)


@fuzz(400)
@given(form=st.sampled_from(FORMATS), at=st.integers(0, 10**6), cut=st.booleans(), bit=st.integers(0, 7))
def test_cuts_and_flips_are_noticed(form: int, at: int, cut: bool, bit: int, tmp_path: Path, door: Door) -> None:
    """Without a manifest: a member is there whole, or the damage is told."""
    data = bytearray(whole_tar(form))
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path = tmp_path / "shard.tar"
    path.write_bytes(data)

    def check() -> int:
        found, damage = whole_members(path)
        names = [(member.name, member.size) for member in found]
        is_whole = names == [(name, len(content)) for name, content in WHOLE]
        require_kept(is_whole or damage is not None, f"{len(found)} members of {len(WHOLE)}, and no damage")
        return damage is not None

    door.knock(check, names=path.name)


def base_256(number: int, n: int) -> bytes:
    """A number of a tar header as GNU writes large and negative ones."""
    return bytes([0x80 if number >= 0 else 0xFF]) + (number % (1 << 8 * (n - 1))).to_bytes(n - 1, "big")


SIZES = st.one_of(
    st.integers(-(2**80), 2**80).map(lambda number: base_256(number, 12)),
    st.sampled_from((-1, -512, -1024, 2**33, 2**62, 2**63 - 1, 2**63, 2**70)).map(lambda number: base_256(number, 12)),
    st.integers(0, 5000).map(lambda number: b"%011o\0" % number),
    st.binary(min_size=12, max_size=12),
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Blocks of a tar whose headers have right checksums and hold anything."""
    blocks = b""
    for _ in range(draw(st.integers(1, 6))):
        block = bytearray(tarfile.TarInfo(draw(st.sampled_from(("000.png", "000.txt", "././@LongLink")))).tobuf())
        block[156:157] = draw(st.sampled_from([bytes([kind]) for kind in b"0\x001235VLKxgXSDMNZ7"]))
        if draw(st.booleans()):
            block[124:136] = draw(SIZES)
        if draw(st.integers(0, 3)) == 0:
            at = draw(st.integers(0, 511))
            piece = draw(st.binary(min_size=1, max_size=12))
            block[at : at + len(piece)] = piece
            block = block[:512]
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        body = draw(
            st.one_of(st.just(b""), st.sampled_from((b"30 path=000.png\n", b"12 size=-5\n", b"9 a=1\n", b"999 a=1\n")))
        )
        blocks += bytes(block) + body + bytes(-len(body) % 512)
        blocks *= draw(st.sampled_from((1, 1, 1, 1, 300)))
        blocks = blocks[: 1 << 21]
    return blocks + bytes(draw(st.sampled_from((0, 512, 1024))))


@fuzz(800)
@given(data=headers())
def test_headers_of_tars(data: bytes, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    door.knock(lambda: check_counts(path), names=path.name)


ENCODING = Encoding(dvae_hash="0" * 16, image_size=16, grid=2, vocab_size=32, crops=1, seed=0)
TOKENS = pack(np.arange(8).reshape(2, 2, 2), ENCODING)
DESCRIPTION = Description(encoding=ENCODING, source="world.tar", source_fingerprint="1" * 16).to_json()


@fuzz(300)
@given(description=st.one_of(json_files(json.loads(DESCRIPTION)), damaged(DESCRIPTION)), tokens=damaged(TOKENS))
def test_shards_of_image_tokens(description: bytes, tokens: bytes, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "shard.tar"
    found = ((".encoded.json", description), ("000.txt", b"a cube"), ("000.tokens", tokens))
    path.write_bytes(tar_of([member(*one) for one in found], tarfile.USTAR_FORMAT))
    door.knock(lambda: check_counts(path), names=path.name)


@fuzz(150)
@given(
    data=st.one_of(
        members().map(lambda found: tar_of(found, tarfile.GNU_FORMAT)), damaged(whole_tar(tarfile.GNU_FORMAT))
    )
)
def test_shards_of_pictures_to_rank(data: bytes, tmp_path: Path, door: Door) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)

    def check() -> int:
        pictures = Pictures([path])
        names = [name for name, _ in pictures]
        require_kept(len(names) == len(set(names)) or pictures.skipped != [], names)
        for reason in pictures.skipped:
            require_kept(path.name in reason, reason)
        return len(pictures.skipped)

    door.knock(check, names=path.name)
    assert os.listdir(tmp_path) == [path.name]


@fuzz(300)
@given(data=st.data())
def test_kept_indexes(data: st.DataObject, tmp_path: Path, door: Door) -> None:
    """An index that lies beside a shard is right, made again, or refused in words."""
    path, kept = tmp_path / "shard.tar", tmp_path / "shard.tar.index"
    if not path.exists():
        found = [
            (f"{i:04}.{field}", content) for i in range(MIN_KEPT) for field, content in (("png", b"x"), ("txt", b"a"))
        ]
        path.write_bytes(tar_of([member(*one) for one in found], tarfile.USTAR_FORMAT))
        os.utime(path, ns=(10**18, 10**18))
    kept.unlink(missing_ok=True)
    keep(with_captions(index_shard(path)), state_of(path))
    kept.write_bytes(data.draw(index_files(kept.read_bytes())))

    def check() -> int:
        opened = ShardData.open([path], captions=True)
        n_bad = 0
        for i in (0, 1, len(opened) - 1):
            try:
                opened.read(i)
            except (ValueError, OSError) as error:
                require_kept(path.name in str(error), f"{error} names no shard")
                n_bad += 1
        return n_bad + MIN_KEPT - len(opened)

    door.knock(check, names=path.name)
