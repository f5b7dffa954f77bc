"""Folders of pictures with captions in files beside them."""

import os
from collections import Counter
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import CAPTIONS, ODD_TEXTS, damaged, expected_captions, json_files, picture

from dalle.data.endings import CAPTION_ENDINGS, ending_of, is_picture
from dalle.data.reader import ShardData
from training.data.shards import make_shards
from training.data.sources.listing import list_source
from training.data.sources.pictures import Listing

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


def check_all_is_told_of(listing: Listing, folder: Path) -> None:
    """Require that every file is a picture, a caption of one, or counted among the others."""
    told = {picture.name for picture in listing.pictures}
    told |= {name for names in listing.others.values() for name in names}
    hidden = [name for names in listing.others.values() for name in names if PurePath(name).name.startswith(".")]
    captions: Counter[tuple[str, bool]] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in told or any(PurePath(name).is_relative_to(one) for one in hidden):
            continue
        require_kept(ending_of(name) in CAPTION_ENDINGS, f"{name!r} is told of nowhere")
        has_picture = any(
            is_picture(one) for one in told if PurePath(one).with_suffix("") == PurePath(name).with_suffix("")
        )
        skipped = any(PurePath(one).with_suffix("") == PurePath(name).with_suffix("") for one in told)
        require_kept(has_picture or skipped, f"{name!r} is beside no picture")
        captions[PurePath(name).with_suffix("").as_posix(), ending_of(name) == ".json"] += 1
    require_kept(max(captions.values(), default=1) == 1, f"a second caption: {captions}")
    names = [picture.name for picture in listing.pictures]
    require_kept(len(names) == len(set(names)), "a picture twice")


@fuzz(1000)
@given(files=folders())
def test_folders(files: dict[bytes, bytes], tmp_path: Path, door: Door) -> None:
    with TemporaryDirectory(dir=tmp_path) as name:
        folder = Path(name)
        write(files, folder)

        def check() -> int:
            listing = list_source(folder, None)
            check_all_is_told_of(listing, folder)
            for picture in listing.pictures:
                text = (folder / picture.name).with_suffix(".txt")
                if picture.skip is None and text.is_file() and text.stat().st_size:
                    found = [line for line in picture.captions if line]
                    require_kept(found == expected_captions(text.read_bytes()), (picture.name, found))
            return sum(picture.skip is not None for picture in listing.pictures)

        door.knock(check, names=folder.name)


@fuzz(100)
@given(files=folders())
def test_folders_become_shards(files: dict[bytes, bytes], tmp_path: Path, door: Door) -> None:
    with TemporaryDirectory(dir=tmp_path) as name, TemporaryDirectory(dir=tmp_path) as out:
        folder = Path(name)
        write(files, folder)

        def check() -> int:
            report = make_shards(folder, Path(out))
            require_kept(report.n_rows == report.n_samples + report.n_skipped, report)
            data = ShardData.open([out], captions=True)
            require_kept(len(data) == report.n_samples, f"{len(data)} samples of {report.n_samples}")
            require_kept(sum(len(data.read(i).captions) for i in range(len(data))) == report.n_captions, report)
            return report.n_skipped

        door.knock(check, names=folder.name)
