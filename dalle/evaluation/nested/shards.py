"""The folder of a run: shards of captions, each written whole, by any number of processes, and read back in order.

A process claims a shard by the lock of a hidden folder, measures it, and writes it. What a killed one has claimed is
free again. All shards carry the key of the run, and those of another key are refused.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle.evaluation.nested.settings import difference, key_of
from storage.atomic import replace_file, replace_text
from storage.lock import FolderInUseError, locked, require_free
from storage.text import parse_json

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
POLL_S = 0.2
"""Seconds between two looks for a shard that another process measures."""
LONGEST_WAIT_S = 60.0
"""For the lock of run.json, which is held for moments."""


class ShardFolder:
    """The shards of one run; any number of processes may work in it at once.

    Args:
        folder: made if need be.
        identity: all that the numbers depend on.
        n_shards: how many shards there will be.
        batch_size: candidates sampled at once, if this process begins the run.
        fresh: forget what is there.

    Raises:
        ValueError: another run is there; or fresh is asked of one of several processes, or while others work there.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], n_shards: int, *, batch_size: int, fresh: bool = False
    ) -> None:
        self.folder, self.key, self.n_shards, self.identity = folder, key_of(identity), n_shards, dict(identity)
        if fresh and n_processes() > 1:
            raise ValueError(
                f"--fresh was given to {n_processes()} processes, of which each would delete what the others write: "
                f"delete {folder} yourself, and start them without --fresh"
            )
        with locked(folder, wait_s=LONGEST_WAIT_S):
            if fresh:
                self._forget()
            known = _read_run(folder / RUN_FILE)
            if known is None:
                known = {"key": self.key, "batch_size": batch_size, "settings": dict(identity)}
                replace_text(folder / RUN_FILE, json.dumps(known, indent=2) + "\n")
        if known["key"] != self.key:
            words = "; ".join(difference(known["settings"], identity)) or "its settings are not those of its key"
            raise ValueError(
                f"{folder} holds another run ({words}): give another --out, or --fresh to begin anew there"
            )
        self.batch_size = int(known["batch_size"])
        """Of the process that began the run: last digits may depend on it."""

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{number:05}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there."""
        return [number for number in range(self.n_shards) if not self.path(number).is_file()]

    def unclaimed(self, *, wait: bool) -> Iterator[int]:
        """Yield the shards that this process is to measure, each while its claim is held.

        Args:
            wait: go on until all shards are there, and take over what others leave undone; else until every missing
                shard is another's.
        """
        while missing := self.missing():
            n_taken = 0
            for number in missing:
                with _claimed(self.folder / f".{number:05}") as is_mine:
                    if is_mine and not self.path(number).is_file():
                        n_taken += 1
                        yield number
            if n_taken == 0:
                if not wait:
                    return
                time.sleep(POLL_S)

    def write(self, number: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a shard, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        texts = {"key": self.key, "about": json.dumps(about)}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        replace_file(self.path(number), lambda partial: save_file(kept, partial, metadata=texts))

    def read(self, number: int, names: Sequence[str], column: int | None = None) -> tuple[dict[str, Tensor], Any]:
        """Return those tensors of a shard that it has of some names, and what was said about them.

        Args:
            number: of the shard.
            names: of tensors.
            column: along their second axis, which alone is read; None for all.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        path = self.path(number)
        try:
            with safe_open(path, framework="pt") as file:
                texts, held = file.metadata() or {}, set(file.keys())
                tensors = {
                    name: file.get_tensor(name) if column is None else file.get_slice(name)[:, column]
                    for name in held.intersection(names)
                }
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it, and run the same command again") from error
        if texts.get("key") != self.key:
            raise ValueError(
                f"{path} is of another run (key {texts.get('key')}, expected {self.key}): delete it, and run the same "
                "command again"
            )
        return tensors, json.loads(texts["about"])

    def _forget(self) -> None:
        for claim in self.folder.glob(".[0-9]*"):
            require_free(claim)  # its holder would go on, and write a shard of the run that is forgotten
        (self.folder / RUN_FILE).unlink(missing_ok=True)  # first: shards without it belong to no run
        for path in self.folder.glob("[0-9]*.safetensors"):
            path.unlink()
        for claim in self.folder.glob(".[0-9]*"):
            shutil.rmtree(claim, ignore_errors=True)


def _read_run(path: Path) -> dict[str, Any] | None:
    """Return what run.json says; None if there is none.

    Raises:
        ValueError: it is not one of ours.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if {"key", "batch_size", "settings"} <= found.keys():
            return dict(found)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is not of an evaluation: give another --out, or --fresh to begin anew there")


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Yield whether this process holds the claim of a shard meanwhile."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            is_mine = True
        except (FolderInUseError, FileNotFoundError):  # its holder may remove the folder at this moment
            is_mine = False
        yield is_mine


def n_processes() -> int:
    """Return how many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this is the process that joins the shards and prints: rank 0, or one that no launcher started."""
    return os.environ.get("RANK", "0") == "0"
