"""Finding the pictures that a user names: single files, folders and the shards of a data set.

A single picture that cannot be read is an error; in a folder or shard it is skipped, and
`Pictures.skipped` names it.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from dalle.data.captions import MAX_TEXT_BYTES, CaptionError, captions_of
from dalle.data.endings import CAPTION_ENDINGS, is_picture, not_read
from dalle.data.index import ShardIndex, index_shard
from dalle.data.reader import ShardData
from dalle.data.shard import Shard
from dalle.data.usable import usable_part
from dvae.images import PictureError, open_image
from storage.drawn import is_sheet
from storage.tar import COMPRESSED_ENDINGS, DamagedTarError

Item = TypeVar("Item")
_SHARD_ENDINGS = (".tar", *COMPRESSED_ENDINGS)
"""Endings of shards, also of compressed ones, which are refused in words."""
LINK = "link: --follow-links reads it"
SHEET = "sheet that this program drew"


class FolderPictures(NamedTuple):
    """The pictures of a folder and the folders in it, judged by their names."""

    files: list[Path]
    """Sorted; hidden files and folders are left out."""
    left_out: Counter[str]
    """Numbers of other files and folders left out, by reason."""

    def without_sheets(self, files: Sequence[Path]) -> list[Path]:
        """Return those of the files that are no sheets of this program, and count the others as left out."""
        kept = [file for file in files if not is_sheet(file)]
        self.left_out.update({SHEET: len(files) - len(kept)})
        return kept

    def no_pictures(self, folder: Path) -> ValueError:
        """Return the error for a folder that holds none."""
        reasons = in_words(self.left_out)
        left_out = f"; left out: {reasons}" if reasons else ""
        return ValueError(f"no pictures in the folder {folder}: expected files like a.png, b.jpg or c.webp{left_out}")


def picture_files(folder: str | Path, *, follow_links: bool = False) -> FolderPictures:
    """Return all pictures in a folder and the folders in it.

    Args:
        folder: the folder; it may be a link itself.
        follow_links: read links to folders too, each folder once, and those to files elsewhere.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a folder with pictures")
    found = FolderPictures([], Counter())
    entered = {folder.resolve()}

    def refused(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.left_out[f"unreadable folder ({error.strerror})"] += 1

    def is_to_enter(path: Path) -> bool:
        if path.name.startswith("."):
            return False
        if path.is_symlink() and not follow_links:
            found.left_out[LINK] += 1
            return False
        # links may lead in circles
        place = path.resolve() if follow_links else path
        is_new = place not in entered
        entered.add(place)
        return is_new

    inside = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=refused, followlinks=follow_links):
        folders[:] = [name for name in sorted(folders) if is_to_enter(Path(parent, name))]
        for file in (Path(parent, name) for name in names):
            is_left_out = is_picture(file) and not follow_links and _is_link_out(file, inside)
            reason = not_read(file) or (LINK if is_left_out else None)
            if reason is not None:
                found.left_out[reason] += 1
            elif is_picture(file):
                found.files.append(file)
    if not found.files:
        raise found.no_pictures(folder)
    found.files.sort()
    return found


def _is_link_out(file: Path, folder: Path) -> bool:
    """Return whether a file is a link to something else than a file within a folder, which has no links on its path."""
    if not file.is_symlink():
        return False
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return True
    return not (target.is_relative_to(folder) and target.is_file())


def problem_of(error: Exception) -> str:
    """Return what an error of `open_image` says of the picture, in words that can be counted."""
    if isinstance(error, PictureError):
        return error.problem
    reason = getattr(error, "strerror", None)
    return f"cannot be read ({reason})" if reason else "cannot be read"


def in_words(left_out: Counter[str]) -> str:
    """Return numbers of files left out with their reasons, the largest first; empty if there are none."""
    return "; ".join(f"{count:,} × {reason}" for reason, count in left_out.most_common() if count)


class Pictures:
    """The pictures in files, folders and shards, read one at a time, in the order given.

    Args:
        sources: picture files, folders, and tar files with pictures in them.
        follow_links: read links in folders too; a link that is a source itself is always read.
        captions: read the captions beside the pictures, too.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: no sources, or a folder without pictures.
    """

    def __init__(self, sources: Sequence[str | Path], *, follow_links: bool = False, captions: bool = False) -> None:
        if not sources:
            raise ValueError("no pictures: give picture files, folders or shards (.tar)")
        self.skipped: list[str] = []
        """A reason for each picture of a folder or shard that could not be read."""
        self.problems: Counter[str] = Counter()
        """Their numbers, by problem."""
        self.left_out: Counter[str] = Counter()
        """Numbers of other files in folders that are not read, by reason."""
        self.captions: dict[str, str] = {}
        """The first caption of each picture that has one which can be read, by the picture's name, if asked for."""
        self._reads_captions = captions
        self._files: list[tuple[Path, bool]] = []
        for source in map(Path, sources):
            if source.is_dir():
                found = picture_files(source, follow_links=follow_links)
                files = found.without_sheets(found.files)
                if not files:
                    raise found.no_pictures(source)
                self._files += [(file, False) for file in files]
                self.left_out += found.left_out
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
            if path.name.lower().endswith(_SHARD_ENDINGS):
                yield from self._in_shard(path)
                continue
            if self._reads_captions:
                self._keep_caption(str(path), _caption_files(path))
            if is_named:
                yield str(path), open_image(path)
            else:
                try:
                    image = open_image(path)
                except (ValueError, OSError) as error:
                    self._skip(str(error), problem_of(error))
                else:
                    yield str(path), image

    def _in_shard(self, shard: Path) -> Iterator[tuple[str, Image.Image]]:
        index = _whole_index(shard)
        left_out = _left_out(index)
        part, report = usable_part(index, captions=False)
        if not part.keys and not left_out:
            raise ValueError(f"no pictures in the shard {shard}: expected members like 000.jpg or 000.png")
        if n_without := sum(not name for name in index.image_names):
            without = "without a picture of a format that is read"
            left_out.append((f"… {n_without:,} samples {without}", without, n_without))
        for message, problem, n in left_out:
            self._skip(f"{shard.name}/{message}", problem, n)
        if not part.keys:
            return
        data = ShardData([Shard.held(part)], report, captions=False)
        for i in range(len(data)):
            name = f"{shard.name}/{data.name(i)}"
            if self._reads_captions:
                self._keep_caption(name, data.caption_members(i))
            try:
                image = open_image(data.read(i).image_bytes, name)
            except ValueError as error:
                self._skip(str(error), problem_of(error))
            else:
                yield name, image

    def _keep_caption(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keep the first caption in files, which are named by their ending without its dot; none will do."""
        for ending, data in files.items():
            with suppress(CaptionError):
                if found := captions_of(data, is_json=ending == "json"):
                    self.captions[name] = found[0]
                    return

    def _skip(self, message: str, problem: str, n: int = 1) -> None:
        self.skipped.append(message)
        self.problems[problem] += n


def _caption_files(picture: Path) -> dict[str, bytes]:
    """Return the bytes of the files of captions beside a picture, by their endings without the dot."""
    found = {}
    for file in map(picture.with_suffix, CAPTION_ENDINGS):
        with suppress(OSError):
            if file.is_file() and file.stat().st_size <= MAX_TEXT_BYTES:
                found[file.suffix[1:]] = file.read_bytes()
    return found


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


def _left_out(index: ShardIndex) -> list[tuple[str, str, int]]:
    """Return messages about the pictures that a shard has and its index leaves out, each with problem and number."""
    ignored = "is a link, a sparse file, or leads out of a folder"
    left_out = [
        (f"{name} {ignored}: expected a plain file", ignored, 1) for name in index.ignored_names if is_picture(name)
    ]
    has_image = index.has_image.tolist()
    names = [name for name, has in zip(index.image_names, has_image, strict=True) if name and not has]
    left_out += [(f"{name} is empty", "is empty", 1) for name in names]
    if n := index.n_duplicates:
        problem = "whose sample has such a member already"
        left_out.append((f"… {n:,} members {problem}: the first one counts", problem, n))
    return left_out
