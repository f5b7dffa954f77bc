"""Finding the pictures that a user names: single files, folders and the shards of a data set.

A single picture that cannot be read is an error; in a folder or shard it is skipped, and
`Pictures.skipped` names it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL import Image

from dalle.data.endings import is_picture
from dalle.data.index import ShardIndex, index_shard
from dalle.data.reader import ShardData, usable_part
from dvae.images import open_image
from storage.tar import DamagedTarError

Item = TypeVar("Item")


def picture_files(folder: str | Path) -> list[Path]:
    """Return all pictures in a folder and the folders in it, sorted; hidden files and folders are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, judged by the names.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder with pictures")
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if is_picture(name)]
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
        """A reason for each picture of a folder or shard that could not be read."""
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
                damaged, compressed or no tar file.
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
        index = _whole_index(shard)
        left_out = _left_out(index)
        part, report = usable_part(index, captions=False)
        if not part.keys and not left_out:
            raise ValueError(f"no pictures in the shard {shard}: expected members like 000.jpg or 000.png")
        self.skipped += [f"{shard.name}/{reason}" for reason in left_out]
        data = ShardData([part], report, captions=False)
        for i, member in enumerate(data.names):
            name = f"{shard.name}/{member}"
            try:
                image = open_image(data.read(i).image_bytes, name)
            except ValueError as error:
                self.skipped.append(str(error))
            else:
                yield name, image


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _whole_index(shard: Path) -> ShardIndex:
    """Return the index of a tar file.

    Raises:
        ValueError: it is damaged, which would lose pictures silently, compressed, or no tar file.
    """
    try:
        index = index_shard(shard)
    except DamagedTarError as error:
        raise ValueError(f"{error}; copy or make it again") from error
    if index.damage is not None:
        raise ValueError(f"{shard} {index.damage}: {len(index.keys):,} whole samples before it; copy or make it again")
    return index


def _left_out(index: ShardIndex) -> list[str]:
    """Return the names of pictures that a shard has and its index leaves out, each with the reason."""
    ignored = "is a link, a sparse file, or leads out of a folder: expected a plain file"
    reasons = [f"{name} {ignored}" for name in index.ignored_names if is_picture(name)]
    has_image = index.has_image.tolist()
    reasons += [f"{name} is empty" for name, has in zip(index.image_names, has_image, strict=True) if name and not has]
    if index.n_duplicates:
        reasons.append(f"… {index.n_duplicates:,} members whose sample has such a member already: the first one counts")
    return reasons
