"""Pictures of a folder and all below it, with captions in files beside them: KEY.jpg, KEY.txt.

Every other file is listed by kind, so that nothing is lost without a word. What this program drew or wrote itself,
and hidden files, are no pictures.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from dalle.data.captions import MAX_TEXT_BYTES, CaptionError, captions_of
from dalle.data.endings import CAPTION_ENDINGS, ending_of, is_picture, not_read
from dalle.data.index_file import ENDING
from storage.drawn import is_sheet
from training.data.sources.pictures import LINK_TO_FOLDER, Listing, SkippedError, SourcePicture, locate

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")
_OWN_TABLES = re.compile(r"(.*-)?report\.json|(unusable|duplicates|excluded|pairs)\.jsonl|.*_stats\.json")
_RESULTS = "results.jsonl"


def list_folder(folder: Path, *, follow_links: bool = False) -> Listing:
    """Return the pictures of a folder in the order of their names, and its other files.

    Args:
        folder: searched with the folders in it.
        follow_links: whether links to folders, and links that lead out of the folder, are followed.

    Raises:
        ValueError: it holds no pictures.
        OSError: it cannot be read.
    """
    found = _Folder(folder, follow_links)
    found.walk()
    if not found.pictures:
        raise ValueError(_no_pictures(folder, found))
    return Listing(pictures=found.pictures, noun="picture", others=found.others, tables=found.tables)


def _no_pictures(folder: Path, found: "_Folder") -> str:
    hint = ""
    if shards := found.others.get(".tar file"):
        hint = f"; {PurePath(shards[0]).name} looks like a shard: shards are used as they are"
    elif found.tables:
        hint = f"; {found.tables[0].name} may be a table: give it itself"
    return f"no pictures in the folder {folder}: expected *.jpg, *.png, … with *.txt beside them{hint}"


class _Folder:
    """Lists one folder."""

    def __init__(self, folder: Path, follow_links: bool) -> None:
        self._folder, self._follow_links = folder, follow_links
        self._entered = {folder.resolve()}
        self.pictures: list[SourcePicture] = []
        self.others: dict[str, list[str]] = {}
        self.tables: list[Path] = []

    def walk(self) -> None:
        """List everything below the folder."""
        for parent, folders, files in os.walk(self._folder, onerror=self._refused, followlinks=self._follow_links):
            here = Path(parent)
            if here != self._folder and _RESULTS in files and _holds_results(here):
                self._other("folder of `dalle generate`", here)
                folders.clear()
                continue
            folders[:] = [name for name in sorted(folders) if self._is_to_enter(here / name)]
            self._add_files(here, sorted(files))

    def _refused(self, error: OSError) -> None:
        if error.filename is None or Path(error.filename) == self._folder:
            raise error
        self._skip(Path(error.filename), "unreadable folder")

    def _is_to_enter(self, path: Path) -> bool:
        if path.name.startswith("."):
            self._other("hidden folder", path)
            return False
        if path.is_symlink() and not self._follow_links:
            self._skip(path, LINK_TO_FOLDER)
            return False
        if self._follow_links:  # which may lead in circles
            real = path.resolve()
            if real in self._entered:
                self._skip(path, "link to a folder that is read already")
                return False
            self._entered.add(real)
        return True

    def _add_files(self, here: Path, names: Sequence[str]) -> None:
        """Sort the files of one folder into pictures, their captions, and others."""
        beside: dict[str, dict[str, str]] = {}  # by stem and ending
        for name in reversed(names):  # of A.TXT and A.txt the second
            if ending_of(name) in CAPTION_ENDINGS and not name.startswith("."):
                beside.setdefault(PurePath(name).stem, {}).setdefault(ending_of(name), name)
        captions = {name for of_one in beside.values() for name in of_one.values()}
        stems = set()
        for name in names:
            path = here / name
            if name.startswith("."):
                self._other("hidden file", path)
            elif (reason := not_read(name)) is not None:
                stems.add(path.stem)
                self._skip(path, reason)
            elif is_picture(name):
                if is_sheet(path):
                    self._other("sheet that this program drew", path)
                    continue
                stems.add(path.stem)
                self._add_picture(path, beside.get(path.stem, {}))
            elif name not in captions:
                self._add_other(path)
        for stem, of_one in beside.items():
            self._add_unused(here, of_one, has_picture=stem in stems)

    def _add_picture(self, path: Path, beside: Mapping[str, str]) -> None:
        try:
            located = locate(self._name(path), [self._folder], follow_links=self._follow_links)
            captions = self._captions(path.parent, beside)
        except SkippedError as skip:
            self._skip(path, str(skip))
        else:
            self.pictures.append(SourcePicture(name=self._name(path), path=located, captions=captions))

    def _captions(self, here: Path, beside: Mapping[str, str]) -> tuple[str, ...]:
        """Read the captions in the first of the files beside a picture that is not empty."""
        is_blank = False
        for ending in CAPTION_ENDINGS:
            if ending not in beside:
                continue
            path = locate(self._name(here / beside[ending]), [self._folder], follow_links=self._follow_links)
            try:
                if path.stat().st_size > MAX_TEXT_BYTES:
                    raise SkippedError("caption is too large")
                data = path.read_bytes()
                if data:
                    captions = captions_of(data, is_json=ending == ".json")
                    return captions or (() if ending == ".json" else ("",))
            except CaptionError as error:
                raise SkippedError(error.reason) from None
            except OSError:
                raise SkippedError("unreadable file") from None
            is_blank = True
        return ("",) if is_blank else ()

    def _add_unused(self, here: Path, of_one: Mapping[str, str], *, has_picture: bool) -> None:
        """List the files of captions of one stem that are beside no picture, or beside a file that counts before."""
        texts = [of_one[ending] for ending in CAPTION_ENDINGS if ending in of_one and ending != ".json"]
        for name in texts[1:] if has_picture else texts:
            self._other("second caption file of a picture" if has_picture else "caption without a picture", here / name)
        if not has_picture and ".json" in of_one:
            self._add_other(here / of_one[".json"])

    def _add_other(self, path: Path) -> None:
        ending = ending_of(path)
        if path.name.lower().endswith(f".tar{ENDING}"):  # made of the shard beside it
            return
        if ending in _TABLES and _OWN_TABLES.fullmatch(path.name) is None:
            self.tables.append(path)
        self._other(f"{ending} file" if re.fullmatch(r"\.[a-z0-9]{1,9}", ending) else "file without an ending", path)

    def _other(self, kind: str, path: Path) -> None:
        self.others.setdefault(kind, []).append(self._name(path))

    def _skip(self, path: Path, reason: str) -> None:
        self.pictures.append(SourcePicture(name=self._name(path), skip=reason))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _holds_results(folder: Path) -> bool:
    """Return whether results.jsonl in a folder is that of `dalle generate`."""
    try:
        with (folder / _RESULTS).open(encoding="utf-8") as file:
            line = json.loads(file.readline(1 << 20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"caption", "file", "ranked_by"} <= line.keys()
