"""Pictures that another system has made for a list of captions: which file is of which caption."""

import re
from collections.abc import Sequence
from pathlib import Path

from dalle.data.pictures import picture_files
from dalle.evaluation.nested.captions import Row


def given_files(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Return the file of each row's picture.

    Files are matched with rows by number where all have one: that of the file, or of the first folder, as in
    00012.png, or 00012/samples/0000.png in GenEval's layout, of whose samples the first counts. Otherwise there must be
    as many files as rows, which are those of the rows in order: by their numbers if each has its own, else by name.

    Args:
        folder: of the pictures.
        rows: in the order of their numbers.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pictures, not those of all rows, or two of one number.
    """
    found = picture_files(folder)
    files = found.without_sheets(found.files)
    numbered: dict[int, Path] = {}
    twice: dict[int, Path] = {}
    for file in files:
        name = file.relative_to(folder).parts[0]
        match = re.match(r"\D*(\d{1,12})\D*$", name.split(".")[0])
        if match is not None:
            first = numbered.setdefault(int(match[1]), file)
            if first.relative_to(folder).parts[0] != name:
                twice[int(match[1])] = file
    numbers = [row.number for row in rows]
    missing = [number for number in numbers if number not in numbered]
    if not missing:
        if doubled := [number for number in numbers if number in twice]:
            raise ValueError(
                f"{numbered[doubled[0]]} and {twice[doubled[0]]} have the same number: give one picture of each caption"
            )
        return [numbered[number] for number in numbers]
    if len(files) == len(rows):
        return [numbered[number] for number in sorted(numbered)] if len(numbered) == len(files) else files
    raise ValueError(
        f"{folder} holds {len(files):,} pictures for {len(rows):,} captions, and none has the number {missing[0]}: "
        "name each by the number of its caption, from 0, such as 00012.png, or give as many pictures as captions"
    )
