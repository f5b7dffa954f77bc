"""Inputs for the doors: odd shards."""

import io
import tarfile

from hypothesis import strategies as st
from odd import CAPTIONS, ODD_TEXTS, damaged, json_files, picture

PICTURE = picture()


KEYS = ("000", "001", "a/002", "./003", "é", "x y", "caf\udce9", "../up", "/abs", "a.b/c", "-", "k" * 120, "n\nl", "🙂")


FIELDS = ("jpg", "PNG", "png", "img", "txt", "txt", "json", "cap", "heic", "cls", "v1.jpg", "seg.png", "", "jpg.jpg")


TYPES = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.CONTTYPE,
    b"Z",
    b"S",
)


FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


CONTENTS = {
    "txt": st.one_of(CAPTIONS.map(str.encode), st.sampled_from((b"", b"\xff", b" \n", b"one\ntwo", b"\0"))),
    "json": json_files({"caption": "a red cube", "key": "000"}).filter(lambda data: len(data) < 9000),
}


PICTURES = st.one_of(st.just(PICTURE), st.just(PICTURE), st.just(b""), st.binary(max_size=30), damaged(PICTURE))


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes) -> Member:
    """A plain file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    """Members of a tar: pictures and captions of a few keys, links, folders, devices, strange names."""
    found = [member("base.png", PICTURE), member("base.txt", b"a cube")] * draw(st.sampled_from((0, 1, 1)))
    for _ in range(draw(st.integers(1, 10))):
        field = draw(st.sampled_from(FIELDS))
        content = draw(CONTENTS.get(field, PICTURES))
        info = tarfile.TarInfo(f"{draw(st.sampled_from(KEYS[:3] * 4 + KEYS))}.{field}".rstrip("."))
        if draw(st.integers(0, 9)) == 0:
            info.type = draw(st.sampled_from(TYPES))
            info.linkname = draw(st.sampled_from(("000.jpg", "/etc/passwd", "../x")))
            content = b""
        if draw(st.integers(0, 9)) == 0:
            record = draw(
                st.sampled_from(("path", "size", "hdrcharset", "GNU.sparse.map", "GNU.sparse.major", "mtime", "x"))
            )
            info.pax_headers = {record: draw(st.sampled_from((*ODD_TEXTS[:30], "000.jpg", "10", "-1", "1,2,3", "1.0")))}
        info.size = len(content)
        found.append((info, content))
    return found


def tar_of(found: list[Member], form: int) -> bytes:
    """A tar's bytes; members that the format cannot hold are left out."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for info, content in found:
            try:
                header = info.tobuf(form, "utf-8", "surrogateescape")
            except (ValueError, UnicodeError):
                continue
            file.write(header + content + bytes(-len(content) % 512))
        tar.offset = file.tell()
    return file.getvalue()


WHOLE = [(f"{i:03}.{field}", content) for i in range(6) for field, content in (("png", PICTURE), ("txt", b"a cube"))]


def whole_tar(form: int) -> bytes:
    return tar_of([member(*one) for one in WHOLE], form)
