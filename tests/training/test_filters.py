from pathlib import Path

import pytest
from PIL import Image
from support.corrupt import encoded

import training.cli.main
from training.data.filters import ShardFilter, is_boilerplate

BOILERPLATE = [
    "photographed on March 3rd, 2019",
    "Photographed on 3 March 2019",
    "photo taken on 03/03/2019 at 10:35 am",
    "Picture taken on Sunday, March 3, 2019",
    "taken 2019-03-03 10:35:07",
    "Image taken in Sept. 2012",
    "shot on 3rd of May 1998",
    "Uploaded on 3.3.2019",
    "Photo uploaded: Jan 5, 2011",
    "2019-03-03",
    "March 2019.",
    "Date: 12 December 2005",
    "Image may contain: sky",
    "This image may contain person",
    "Stock Photo",
    "royalty free stock images",
    "Stock photography by Getty Images",
    "Photo by John Smith",
    "photo credit: Jane Doe",
    "© 2014 Jane Doe",
    "(c) 2014. All rights reserved.",
    "Click to enlarge",
    "IMG_2034.JPG",
    "DSC01234",
    "No description available",
    "Untitled",
    "https://example.org/pictures/12",
]

CAPTIONS = [
    "a red bird on a branch",
    "the clock tower of the old town hall at night, photographed on March 3rd, 2019",
    "a man taking a photo of a dog by the sea",
    "two women sit in a room with a picture on the wall",
    "children march through the street in May",
    "a bowl of fresh fruit, stock photo",
    "a 1957 car parked before a diner",
    "image of a cat by the window",
    "click beetle sitting on a green leaf",
    "may contain nuts: a bag of almonds on a table",
    "cat",
]


@pytest.mark.parametrize("caption", BOILERPLATE)
def test_boilerplate_is_recognised(caption: str) -> None:
    assert is_boilerplate(caption)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_no_boilerplate(caption: str) -> None:
    assert not is_boilerplate(caption)


def test_long_captions_are_searched_in_no_time() -> None:
    for caption in ("a" * 2000, "1 " * 1000, "photo " * 333, "-" * 2000, "march " * 333, "\u00a9 " * 1000):
        is_boilerplate(caption)
    assert not is_boilerplate("photographed on March 3rd, 2019 " * 1000)


def test_captions_are_kept_or_counted_by_reason() -> None:
    keep = ShardFilter(
        min_caption_chars=4, max_caption_chars=40, min_caption_words=2, max_caption_words=4, drop_boilerplate=True
    )
    captions = ["a  red\nbird", "no", "", "word", "one two three four five", "x" * 41, "taken on May 2019"]
    kept, left_out = keep.kept(captions)
    assert kept == ["a red bird"]
    assert left_out == {
        "caption too short": 1,
        "empty caption": 1,
        "caption of too few words": 1,
        "caption of too many words": 1,
        "caption too long": 1,
        "caption mostly boilerplate": 1,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_caption_chars": 0},
        {"min_caption_words": 0},
        {"min_side": 0},
        {"min_caption_chars": 5, "max_caption_chars": 4},
        {"min_caption_words": 5, "max_caption_words": 4},
        {"max_aspect_ratio": 0.5},
        {"max_aspect_ratio": float("nan")},
    ],
)
def test_filters_that_keep_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        ShardFilter(**wrong)  # type: ignore[arg-type]


def test_the_papers_filters_leave_out_what_they_should_and_count_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pictures = {
        "good": ((40, 20), "a red square, alone\nphotographed on March 3rd, 2019\nred square"),
        "tall": ((20, 41), "a tall red picture"),
        "dated": ((20, 20), "photographed on March 3rd, 2019"),
        "short": ((20, 20), "red square"),
    }
    for name, (size, captions) in pictures.items():
        (source / f"{name}.png").write_bytes(encoded(Image.new("RGB", size, (200, 0, 0)), "PNG"))
        (source / f"{name}.txt").write_text(captions)
    command = ["shards", str(source), "--out", str(tmp_path / "out")]
    assert training.cli.main.main([*command, "--paper-filters"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    lines = [" ".join(" ".join(row).split()) for row in rows]
    assert lines == [
        "read 4 pictures: 1 written, 3 skipped",
        "written 1 picture, 1 caption, 1 shard",
        "skipped 3 pictures",
        "caption mostly boilerplate 1 dated.png",
        "caption of too few words 1 short.png",
        "picture too elongated 1 tall.png",
        "left out 2 captions of pictures that were written",
        "caption mostly boilerplate 1",
        "caption of too few words 1",
    ]
    assert training.cli.main.main([*command, "--overwrite", "--paper-filters", "--min-caption-words", "2"]) == 0
    assert "written" in (out := capsys.readouterr().out)
    assert " 2  pictures, 3 captions" in out
    assert training.cli.main.main([*command, "--overwrite", "--min-side", "30", "--max-caption-words", "3"]) == 1
    assert "picture too small" in capsys.readouterr().err
