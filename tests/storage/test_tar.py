import errno
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.tar import DamagedTarError, first_member, whole_members, write_tar

MEMBERS = [(".about.json", b"{}"), ("b.x/a.txt", b"one"), ("b.x/a.jpg", b"")]


def test_members_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, MEMBERS)
    members, damage = whole_members(path)
    data = path.read_bytes()
    assert damage is None
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in members] == MEMBERS
    assert all(member.is_safe for member in members)
    assert first_member(path) == members[0]


def test_the_same_members_make_the_same_bytes_of_no_user(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS)
    write_tar(tmp_path / "b.tar", iter(MEMBERS))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, "", "", 0o644)}


def test_a_failure_leaves_the_older_file(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, bytes]]:
        yield MEMBERS[0]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tar(tmp_path / "s.tar", MEMBERS)
    before = (tmp_path / "s.tar").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_tar(tmp_path / "s.tar", failing())
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]
    assert (tmp_path / "s.tar").read_bytes() == before


@pytest.mark.parametrize(("content", "told"), [(b"", "is empty"), (b"x" * 600, "is not a tar file")])
def test_a_file_without_members_is_told_apart_from_a_damaged_one(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DamagedTarError, match=told):
        whole_members(tmp_path / "s.tar")


def test_links_and_names_that_lead_outside_are_not_safe(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("../b.jpg", tarfile.REGTYPE), ("c", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    members, _ = whole_members(tmp_path / "s.tar")
    assert [(m.name, m.is_safe, m.is_folder) for m in members] == [
        ("a.jpg", False, False),
        ("../b.jpg", False, False),
        ("c", False, True),
    ]


def header(kind: bytes, size: bytes = b"%011o\0" % 0) -> bytes:
    """A header with the right checksum."""
    block = bytearray(tarfile.TarInfo("a.txt").tobuf())
    block[156:157], block[124:136], block[148:156] = kind, size, b" " * 8
    block[482] = kind == b"S"  # more of a sparse file's places follow
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def large(number: int) -> bytes:
    """A size as GNU writes those that are large, or below 0."""
    return (b"\x80" if number >= 0 else b"\xff") + (number % (1 << 88)).to_bytes(11, "big")


@pytest.mark.parametrize(
    "block",
    [
        header(b"L") * 2000,
        header(b"L", large(-512)),
        header(b"x", large(-1024)),
        header(b"x", large(2**40)),
        header(b"0", large(-1)),
        header(b"Z", large(2**70)),
        header(b"S"),
        header(b"x", b"%011o\0" % 40) + b"40 size=-1000000000000000000000000000000\n".ljust(512, b"\0") + header(b"0"),
    ],
    ids=["names of names", "negative name", "negative", "long", "below 0", "beyond", "sparse", "pax"],
)
def test_headers_that_hold_anything_are_damage(tmp_path: Path, block: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(header(b"0") + block)
    members, damage = whole_members(path)
    assert members[0].name == "a.txt"
    assert damage is not None
    path.write_bytes(block)
    try:
        _, damage = whole_members(path)
    except DamagedTarError:
        return
    assert damage is not None
