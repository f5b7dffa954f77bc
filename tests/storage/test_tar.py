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
