"""Finding the pictures that a user names: single files, folders and the shards of a data set.

A single picture that cannot be read is an error; in a folder or shard it is skipped and its name kept, so
that the caller can say how many there were.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from PIL import Image

from dvae.images import open_image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"}
)
"""Files with these endings are taken for pictures in folders and shards."""
TAR_BLOCK = 512

Item = TypeVar("Item")


def picture_files(folder: str | Path) -> list[Path]:
    """All pictures in a folder and the folders in it, sorted; hidden files and folders are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, judged by the names.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder with pictures")
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if _is_picture(name)]
    if not files:
        raise ValueError(f"no pictures in the folder {folder}: expected files like a.png, b.jpg or c.webp")
    return sorted(files)


class Pictures:
    """The pictures in files, folders and shards, read one at a time, in the order given.

    Args:
        sources: picture files, folders, and tar files with pictures in them.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: no sources, or a folder without pictures.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        if not sources:
            raise ValueError("no pictures: give picture files, folders or shards (.tar)")
        self.skipped: list[str] = []
        """Why each picture of a folder or shard that could not be read was left out."""
        self._files: list[tuple[Path, bool]] = []
        for source in map(Path, sources):
            if source.is_dir():
                self._files += [(path, False) for path in picture_files(source)]
            elif source.is_file():
                self._files.append((source, True))
            else:
                raise FileNotFoundError(f"no picture, folder or shard at {source}")

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield names and RGB pictures.

        Raises:
            ValueError: a picture that was named itself cannot be read, none of the others can, or a shard is
                cut off or no tar file.
        """
        n_readable = 0
        for name, image in self._readable():
            n_readable += 1
            yield name, image
        if n_readable == 0:
            raise ValueError(f"none of the {len(self.skipped)} pictures can be read; the first: {self.skipped[0]}")

    def _readable(self) -> Iterator[tuple[str, Image.Image]]:
        for path, is_named in self._files:
            if path.suffix.lower() == ".tar":
                yield from self._in_shard(path)
            elif is_named:
                yield str(path), open_image(path)
            else:
                try:
                    image = open_image(path)
                except (ValueError, OSError) as error:
                    self.skipped.append(str(error))
                else:
                    yield str(path), image

    def _in_shard(self, shard: Path) -> Iterator[tuple[str, Image.Image]]:
        n_pictures = 0
        for member, data in _shard_files(shard):
            if not _is_picture(member):
                continue
            n_pictures += 1
            name = f"{shard.name}/{member}"
            try:
                image = open_image(data, name)
            except ValueError as error:
                self.skipped.append(str(error))
            else:
                yield name, image
        if n_pictures == 0:
            raise ValueError(f"no pictures in the shard {shard}: expected members like 000.jpg or 000.png")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _shard_files(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar file.

    Raises:
        ValueError: it is no tar file, or its end is missing.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a whole tar file ({error}): copy or make it again") from error
    # tarfile takes a file that ends between two members, or inside a header, for a whole one
    with shard.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAR_BLOCK))
        if size % TAR_BLOCK or any(file.read()):
            raise ValueError(f"{shard} is cut off after {size} bytes: its end is missing; copy or make it again")
