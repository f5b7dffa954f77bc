"""Inputs for the doors: odd folders."""

import os
from pathlib import Path

from hypothesis import strategies as st
from odd import CAPTIONS, ODD_TEXTS, damaged, json_files, picture

PICTURE = picture()


STEMS = (
    "a",
    "b",
    "a.b",
    "é",
    "e\u0301",
    "IMG 1",
    "x (1)",
    "🙂",
    "-x",
    "~a",
    "a,b",
    'a"b',
    "100%",
    "a'",
    "x\ny",
    "n\x1b[31m",
)


BYTE_STEMS = (b"caf\xe9", b"\xff")


ENDINGS = (
    ".jpg",
    ".JPG",
    ".png",
    ".jpeg",
    ".webp",
    ".heic",
    ".tif",
    ".bmp",
    ".gif",
    ".cr2",
    ".mp4",
    "",
    ".pdf",
    ".csv",
)


TEXT_ENDINGS = (".txt", ".TXT", ".cap", ".json", ".JSON", ".caption", ".text", ".txt.bak")


FOLDERS = ("", "", "sub/", "sub/deep/", ".hidden/", "a.jpg/", "__MACOSX/")


CONTENTS = st.one_of(
    CAPTIONS.map(str.encode),
    st.lists(CAPTIONS, max_size=3).map("\n".join).map(str.encode),
    st.sampled_from(ODD_TEXTS).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from((b"", b"\n", b"\xff\xfea\0", b"\xff", b"caf\xe9", b"\0" * 20, b"a\x85b", b"one\rtwo")),
    json_files({"caption": "a red cube", "width": 3}),
    json_files({"captions": ["one", "two"], "url": "x"}),
    st.binary(max_size=20),
)


@st.composite
def folders(draw: st.DrawFn) -> dict[bytes, bytes]:
    """The contents of the files of a folder, by their paths."""
    files = {b"base.png": PICTURE, b"base.txt": b"a red cube"} if draw(st.integers(0, 2)) else {}
    for _ in range(draw(st.integers(1, 10))):
        stem = draw(
            st.one_of(st.sampled_from(STEMS[:3]).map(os.fsencode), st.sampled_from(STEMS + BYTE_STEMS).map(os.fsencode))
        )
        stem = draw(st.sampled_from(FOLDERS)).encode() + stem
        if draw(st.integers(0, 2)):
            content = draw(st.one_of(st.just(PICTURE), st.just(PICTURE), damaged(PICTURE), st.just(b"")))
            files[stem + draw(st.sampled_from(ENDINGS)).encode()] = content
        if draw(st.integers(0, 2)):
            files[stem + draw(st.sampled_from(TEXT_ENDINGS)).encode()] = draw(CONTENTS)
    return files


def write(files: dict[bytes, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (IsADirectoryError, NotADirectoryError, FileExistsError):
            continue
