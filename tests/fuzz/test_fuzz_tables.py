"""Tables of captions: CSV, TSV, JSONL, JSON and COCO's annotations."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import CAPTIONS, ODD_TEXTS, damaged, expected_captions, json_files
from odd_tables import NAMES, tables_of_people
from PIL import Image

from dalle.data.captions import captions_of
from dalle.data.reader import ShardData
from storage.text import is_visible, read_text
from training.data.shards import make_shards
from training.data.sources.listing import list_source
from training.data.sources.pictures import Listing
from training.data.sources.records import CAPTION_COLUMNS, IMAGE_COLUMNS

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the pictures, and without a table."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "sub").mkdir()
    for name in NAMES:
        Image.new("RGB", (9, 9), (len(name), 40, 200)).save(folder / name)
    yield folder
    shutil.rmtree(folder)


@st.composite
def csv_tables(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]], str]:
    """The bytes of a sound table as programs write them, its rows (picture, caption), and its ending."""
    delimiter = draw(st.sampled_from(",;\t|"))
    columns = ["id"] * draw(st.booleans()) + [draw(st.sampled_from(IMAGE_COLUMNS))]
    columns += [draw(st.sampled_from(CAPTION_COLUMNS))]
    columns += ["width"] * draw(st.booleans())
    if draw(st.booleans()):
        columns.reverse()
    text = st.one_of(CAPTIONS, st.lists(st.sampled_from(("a", '"', ",", ";", "|", "\t", "\n", "'", "é")), max_size=6))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        caption = draw(text)
        rows.append(
            (draw(st.sampled_from((*NAMES, "gone.jpg"))), caption if isinstance(caption, str) else "".join(caption))
        )
    file = io.StringIO(newline="")
    quoting = draw(st.sampled_from((csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC)))
    end = draw(st.sampled_from(("\n", "\r\n")))
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(columns)
    for number, (image, caption) in enumerate(rows):
        values = {"id": number, "width": 640}
        names = {name: image for name in columns if name in IMAGE_COLUMNS}
        writer.writerow([names.get(name, values.get(name, caption)) for name in columns])
    mark = f"sep={delimiter}{end}" if draw(st.booleans()) else ""
    return (
        (mark + file.getvalue()).encode(draw(st.sampled_from(ENCODINGS))),
        rows,
        ".tsv" if delimiter == "\t" else ".csv",
    )


def is_row_like(caption: str) -> bool:
    """Whether a caption has lines that the product may take for rows; of these it says so."""
    return "\n" in caption or "\r" in caption


def expected(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The captions of each picture that is there, by its name without the ending."""
    found: dict[str, list[str]] = {}
    for image, caption in rows:
        words = " ".join(caption.split())
        if image in NAMES and is_visible(words):
            found.setdefault(image, []).append(words)
    return {image: list(dict.fromkeys(captions)) for image, captions in found.items()}


def listed(path: Path) -> Listing:
    listing = list_source(path, None)
    for picture in listing.pictures:
        assert (picture.path is None) <= (picture.skip is not None), picture
        assert picture.path is None or picture.path.is_relative_to(path.parent), "a file outside of the folder"
    return listing


@fuzz(600)
@given(table=csv_tables())
def test_sound_tables(table: tuple[bytes, list[tuple[str, str]], str], folder: Path, door: Door) -> None:
    data, rows, ending = table
    path = folder / f"table{ending}"
    path.write_bytes(data)

    def check() -> int:
        listing = listed(path)
        if not any(is_row_like(caption) for _, caption in rows):
            require_kept(listing.n_rows == len(rows), f"{listing.n_rows} rows of {len(rows)}")
        require_kept(listing.n_rows >= len(rows), f"{listing.n_rows} rows of {len(rows)}")
        found = {picture.name: picture for picture in listing.pictures if picture.skip is None}
        for image, captions in expected(rows).items():
            kept = dict.fromkeys(" ".join(caption.split()) for caption in found[image].captions)
            require_kept([one for one in kept if is_visible(one)] == captions, (image, kept, captions))
        return sum(picture.skip is not None for picture in listing.pictures)

    door.knock(check, names=path.name)
    path.unlink()


@fuzz(1200)
@given(table=tables_of_people(), encoding=st.sampled_from(ENCODINGS))
def test_tables_of_people(table: tuple[list[str], str, str], encoding: str, folder: Path, door: Door) -> None:
    lines, delimiter, end = table
    path = folder / "table.csv"
    path.write_bytes(end.join(lines).encode(encoding, "replace"))
    plain = [line.encode("utf-8", "replace").decode() for line in lines[1:] if not set(line) & set('"\r\n\0')]
    rows = [line.split(delimiter) for line in plain if line.count(delimiter) == 1]

    def check() -> int:
        listing = listed(path)
        n_said = sum(line.strip("\r\n") != "" and any(part.strip() for part in line.split(delimiter)) for line in plain)
        require_kept(listing.n_rows >= n_said, f"{listing.n_rows} rows of {n_said}")
        found = {(one.name, caption) for one in listing.pictures if one.skip is None for caption in one.captions}
        for image, caption in rows:
            require_kept(image not in NAMES or (image, caption) in found, (image, caption))
        return sum(picture.skip is not None for picture in listing.pictures)

    door.knock(check, names=path.name)
    path.unlink()


@fuzz(800)
@given(data=csv_tables().flatmap(lambda table: damaged(table[0], 6)))
def test_damaged_tables(data: bytes, folder: Path, door: Door) -> None:
    path = folder / "table.csv"
    path.write_bytes(data)

    def check() -> int:
        return sum(picture.skip is not None for picture in listed(path).pictures)

    door.knock(check, names=path.name)
    path.unlink()


RECORDS: list[dict[str, Any]] = [
    {"image": "a.jpg", "caption": "one"},
    {"image": "b.PNG", "captions": ["two", "three"], "width": 5},
    {"file_name": "gone.jpg", "text": "four"},
    {"path": "sub/e.jpg", "prompt": "five"},
]
COCO: dict[str, Any] = {
    "info": {"year": 2017},
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.PNG", "license": 3}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "one"},
        {"id": 11, "image_id": 1, "caption": "two"},
        {"id": 12, "image_id": 3, "caption": "three"},
    ],
}


@fuzz(800)
@given(data=st.one_of(json_files(RECORDS), json_files(COCO)))
def test_json_tables(data: bytes, folder: Path, door: Door) -> None:
    path = folder / "captions.json"
    path.write_bytes(data)

    def check() -> int:
        listing = listed(path)
        value = json.loads(data.decode("utf-16" if data[:2] == b"\xff\xfe" else "utf-8-sig"))
        if isinstance(value, list):
            require_kept(listing.n_rows == len(value), f"{listing.n_rows} rows of {len(value)}")
        else:
            require_kept(listing.n_rows >= len(value["images"]), f"{listing.n_rows} rows of {len(value['images'])}")
        return sum(picture.skip is not None for picture in listing.pictures)

    door.knock(check, names=path.name)
    path.unlink()


@fuzz(600)
@given(
    lines=st.lists(
        st.sampled_from(RECORDS).flatmap(json_files).filter(lambda one: len(one) < 9000), min_size=1, max_size=4
    )
)
def test_json_lines(lines: list[bytes], folder: Path, door: Door) -> None:
    path = folder / "captions.jsonl"
    path.write_bytes(b"\n".join(lines))

    def check() -> int:
        listing = listed(path)
        n = len([line for line in read_text(path).replace("\r", "\n").split("\n") if line.strip()])
        require_kept(listing.n_rows == n, f"{listing.n_rows} rows of {n}")
        return sum(picture.skip is not None for picture in listing.pictures)

    door.knock(check, names=path.name)
    path.unlink()


@fuzz(50)
@given(table=tables_of_people())
def test_tables_become_shards(table: tuple[list[str], str, str], folder: Path, door: Door) -> None:
    lines, _, end = table
    path = folder / "table.csv"
    path.write_bytes(end.join(lines).encode("utf-8", "replace"))

    def check() -> int:
        with TemporaryDirectory() as out:
            report = make_shards(path, Path(out))
            n = report.n_samples + report.n_skipped + report.n_joined
            require_kept(report.n_rows == n, f"{report.n_rows} rows, {n} told of")
            data = ShardData.open([out], captions=True)
            captions = [data.read(i).captions for i in range(len(data))]
        require_kept(len(data) == report.n_samples, "samples")
        require_kept(sum(map(len, captions)) == report.n_captions, "captions")
        return report.n_skipped

    door.knock(check, names=path.name)
    path.unlink()


@fuzz(1200)
@given(
    data=st.one_of(
        st.binary(max_size=40),
        st.sampled_from(ODD_TEXTS).flatmap(lambda text: damaged(text.encode("utf-8", "replace"))),
    )
)
def test_captions_in_text_files(data: bytes, door: Door) -> None:
    def check() -> int:
        captions = captions_of(data, is_json=False)
        require_kept(list(captions) == expected_captions(data), captions)
        return not captions

    door.knock(check, names="caption is not")
