"""CLIP's features of the pictures of a folder, computed once and kept in the folder for the next search.

The file `.dalle-search-<hash of the CLIP>.safetensors` holds a feature vector per picture, and in its metadata the
name, size and time of change of each file. Only new and changed pictures are embedded again.

Letters: N pictures  E features
"""

import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle.data.pictures import picture_files, problem_of
from dalle.output.text import counted
from dvae.images import open_image
from rerank import CLIP
from rerank.pixels import clip_view
from rerank.score import embed_images
from storage.atomic import replace_file
from storage.text import parse_json

logger = logging.getLogger(__name__)

VIEW = "bicubic square"
"""Version of CLIP's preprocessing, `clip_view`; cached features of another version are recomputed."""
EMBEDDING_BATCH = 32
"""Pictures embedded at once."""
KEEP_EVERY_S = 120.0
"""Seconds after which what was embedded is kept, though more is to be embedded."""


class Entry(NamedTuple):
    """One picture as it was when it was embedded."""

    size: int
    """Bytes of the file."""
    changed_ns: int
    """Time of its last change; a file with the same size and time counts as unchanged."""
    feature: Tensor
    """Unit vector, float32 (E,), on the CPU."""


class FolderFeatures(NamedTuple):
    """CLIP's features of a folder."""

    files: list[Path]
    """The N pictures that could be read."""
    features: Tensor
    """Unit vectors, float32 (N, E), on the CPU."""
    unreadable: list[str]
    """Why each of the others could not be read."""
    problems: Counter[str]
    """Their numbers, by problem."""
    left_out: Counter[str]
    """Numbers of other files that are not read, by reason."""
    n_embedded: int
    """How many were embedded now rather than read from the cache."""


def folder_features(
    clip: CLIP,
    clip_hash: str,
    folder: str | Path,
    *,
    follow_links: bool = False,
    progress: Callable[[float, int], None] | None = None,
) -> FolderFeatures:
    """Embed the pictures of a folder, using and updating the features kept in it.

    They are kept every few minutes, and when Ctrl-C or SIGTERM ends the work: the next call continues it.

    Args:
        clip: the model.
        clip_hash: the hash of its directory, which names the file: features of two models are never mixed.
        folder: searched with the folders in it.
        follow_links: read links to pictures and to folders, too.
        progress: called with (pictures embedded, pictures to embed).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in it can be read.
    """
    folder = Path(folder)
    found = picture_files(folder, follow_links=follow_links)
    kept_at = feature_file(folder, clip_hash)
    known = _read(kept_at, clip.config.embed_dim)
    names = {file: str(file.relative_to(folder)) for file in found.files}
    entries = {name: known[name] for file, name in names.items() if name in known and _is_current(known[name], file)}
    n_known = len(entries)
    unseen = found.without_sheets([file for file, name in names.items() if name not in entries])
    unreadable: list[tuple[str, str]] = []
    n_done, next_time, is_kept = 0, time.monotonic() + KEEP_EVERY_S, len(known) == n_known
    with _sigterm_raises():
        try:
            for start in range(0, len(unseen), EMBEDDING_BATCH):
                batch = {names[file]: file for file in unseen[start : start + EMBEDDING_BATCH]}
                embedded = _embed(clip, batch, unreadable)
                entries |= embedded
                is_kept = is_kept and not embedded
                n_done = start + len(batch)
                if progress is not None:
                    progress(n_done, len(unseen))
                if not is_kept and time.monotonic() >= next_time:
                    began = time.monotonic()
                    is_kept = _write(kept_at, entries)
                    # a folder that cannot be written to is tried once more, at the end
                    pause = max(KEEP_EVERY_S, 20 * (time.monotonic() - began)) if is_kept else math.inf
                    next_time = time.monotonic() + pause
        finally:
            if not is_kept:
                is_kept = _write(kept_at, entries)
            if n_done < len(unseen) and is_kept:
                done = f"{n_done:,} of {counted(len(unseen), 'picture')}"
                logger.info("%s are embedded and kept: the next search continues", done)
    if not entries:
        if not unreadable:
            raise found.no_pictures(folder)
        raise ValueError(f"none of the {len(unseen)} pictures in {folder} can be read; the first: {unreadable[0][0]}")
    files = [file for file, name in names.items() if name in entries]
    return FolderFeatures(
        files=files,
        features=torch.stack([entries[names[file]].feature for file in files]),
        unreadable=[message for message, _ in unreadable],
        problems=Counter(problem for _, problem in unreadable),
        left_out=found.left_out,
        n_embedded=len(entries) - n_known,
    )


class _Terminated(BaseException):
    """Tells that SIGTERM came."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise in the block, and end the process after it; only where nothing else handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def feature_file(folder: Path, clip_hash: str) -> Path:
    """Return where the features of a folder under one CLIP are kept."""
    return folder / f".dalle-search-{clip_hash}.safetensors"


def _embed(clip: CLIP, files: Mapping[str, Path], unreadable: list[tuple[str, str]]) -> dict[str, Entry]:
    """Return entries of the files that can be read; add messages and problems of the others to `unreadable`."""
    images: list[Tensor] = []
    states: dict[str, tuple[int, int]] = {}
    for name, file in files.items():
        try:
            state = _state(file)  # before reading: a change while reading shows next time
            images.append(clip_view(open_image(file), clip.config.view))
        except (ValueError, OSError) as error:
            unreadable.append((str(error), problem_of(error)))
        else:
            states[name] = state
    if not images:
        return {}
    features_NE = embed_images(clip, torch.stack(images)).float().cpu()
    return {name: Entry(*state, feature) for (name, state), feature in zip(states.items(), features_NE, strict=True)}


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _is_current(entry: Entry, file: Path) -> bool:
    try:
        return (entry.size, entry.changed_ns) == _state(file)
    except OSError:
        return False


def _read(path: Path, embed_dim: int) -> dict[str, Entry]:
    """Read the entries by name; none, with a warning, if the file is not one of `_write`."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            pictures = parse_json(metadata["pictures"])
            features_NE = file.get_tensor("features")
        if metadata.get("view") != VIEW:
            raise ValueError("it was made with another preprocessing")
        if features_NE.shape != (len(pictures), embed_dim) or features_NE.dtype != torch.float32:
            shape = tuple(features_NE.shape)
            raise ValueError(f"{features_NE.dtype} features of shape {shape} for {len(pictures)} pictures")
        return {
            str(name): Entry(int(size), int(changed_ns), feature)
            for (name, size, changed_ns), feature in zip(pictures, features_NE, strict=True)
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        logger.warning("%s cannot be used (%s): embedding the folder again", path, error)
        return {}


def _write(path: Path, entries: Mapping[str, Entry]) -> bool:
    """Write the entries, and return whether that worked; if the folder is not writable, only warn."""
    pictures = [[name, entry.size, entry.changed_ns] for name, entry in entries.items()]
    features_NE = torch.stack([entry.feature for entry in entries.values()]) if entries else torch.empty(0, 0)
    metadata = {"pictures": json.dumps(pictures), "view": VIEW}
    try:
        replace_file(path, lambda partial: save_file({"features": features_NE}, partial, metadata=metadata))
    except (SafetensorError, OSError) as error:
        logger.warning(
            "the features could not be kept beside the pictures, in %s (%s): the next search computes them again",
            path,
            error,
        )
        return False
    return True
