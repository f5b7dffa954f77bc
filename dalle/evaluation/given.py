"""Pictures that another system has made for a list of captions: which file is of which caption."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from dalle.data.pictures import picture_files
from dalle.evaluation.nested.captions import Row
from dvae.images import open_image


class GivenPictures:
    """One picture of each row, opened when it is needed, any number of times.

    Files are matched with rows by number where all have one: that of the file, or of the first folder, as in
    00012.png, or 00012/samples/0000.png in GenEval's layout, of whose samples the first counts. Otherwise there must be
    as many files as rows, which are those of the rows in order: by their numbers if each has its own, else by name.

    Args:
        folder: of the pictures.
        rows: in the order of their numbers.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pictures, or not those of all rows.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        found = picture_files(folder)
        files = found.without_sheets(found.files)
        self.files: list[Path]
        """Of the rows, in their order."""
        numbered: dict[int, Path] = {}
        for file in files:
            match = re.match(r"\D*(\d{1,12})\D*$", file.relative_to(folder).parts[0].split(".")[0])
            if match is not None:
                numbered.setdefault(int(match[1]), file)
        numbers = [row.number for row in rows]
        missing = [number for number in numbers if number not in numbered]
        if not missing:
            self.files = [numbered[number] for number in numbers]
        elif len(files) == len(rows):
            self.files = [numbered[number] for number in sorted(numbered)] if len(numbered) == len(files) else files
        else:
            raise ValueError(
                f"{folder} holds {len(files):,} pictures for {len(rows):,} captions, and none is called "
                f"{missing[0]:05}: name each by the number of its caption, from 0, such as 00012.png, or give as many "
                "as captions"
            )

    def __iter__(self) -> Iterator[Image.Image]:
        """Open them one after the other.

        Raises:
            ValueError: one cannot be read.
        """
        return map(open_image, self.files)
