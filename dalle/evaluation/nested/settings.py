"""What a run is told, and the key that names all that its numbers depend on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dalle.best_of_n import MAX_CANDIDATES
from dalle.data.bundle import Precision
from dalle.sampling import PAPER_SAMPLING, Ranking, Sampling, check_ranking

VERSION = 1
"""Of what is computed and kept; raised with any change after which the same settings give other numbers."""
GENEVAL_PICTURES = 4
"""Pictures of a caption in GenEval's layout."""


@dataclass(frozen=True, kw_only=True)
class NestedSettings:
    """What is sampled and kept."""

    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    """N, ascending; the last one is M, the candidates of each caption."""
    sampling: Sampling = PAPER_SAMPLING
    """How they are sampled; candidate k of a caption depends on (seed, row, caption, k)."""
    rank: Ranking = "clip"
    """Whose picks are kept, with their features."""
    precision: Precision = "fp32"
    """Of sampling and decoding; only named here: the pipeline has it already."""
    pictures: int = 1
    """Pictures of a caption to write: beside the best of M, the best of each of as many groups of M / pictures."""
    shard_rows: int = 64
    """Captions of a shard: what is lost at most when a process is killed."""
    batch_size: int | None = None
    """Candidates sampled at once; None for as many as fit the memory of the process that begins the run."""

    def __post_init__(self) -> None:
        check_ranking(self.rank)
        given = ",".join(map(str, self.best_of))
        if not self.best_of or list(self.best_of) != sorted({*self.best_of}):
            raise ValueError(f"--best-of is {given!r}; expected ascending numbers of candidates, such as 1,2,4,8,16")
        if not 1 <= self.best_of[0] <= self.best_of[-1] <= MAX_CANDIDATES:
            raise ValueError(f"--best-of is {given}; expected numbers from 1 to {MAX_CANDIDATES:,}")
        if self.pictures < 1 or self.best_of[-1] % self.pictures:
            raise ValueError(
                f"the last --best-of is {self.best_of[-1]}, which {self.pictures} does not divide: of each caption "
                f"{self.pictures} pictures are written, each the best of as many candidates; give a multiple of "
                f"{self.pictures}"
            )
        if self.shard_rows < 1:
            raise ValueError(f"--shard-captions is {self.shard_rows}; it must be at least 1")

    @property
    def m(self) -> int:
        """Candidates of each caption."""
        return self.best_of[-1]

    def identity(self, captions: str, hashes: Mapping[str, str], measured: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that the numbers of a run depend on, as JSON values.

        Args:
            captions: hash of the list.
            hashes: part of the bundle -> hash.
            measured: what looks at the candidates, each with its hash.
        """
        own = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return {"version": VERSION, "captions": captions, "bundle": dict(hashes), **_json(own), **_json(measured)}


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they come back from a JSON file."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def key_of(identity: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that name a run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return in words what differs between two identities: "sampling seed is 0 there, 1 here"."""
    words = []
    for name in sorted({*found, *wanted}):
        there, here = found.get(name), wanted.get(name)
        called = f"{prefix}{name}".replace("_", " ")
        if isinstance(there, dict) and isinstance(here, dict):
            words += difference(there, here, f"{called} ")
        elif there != here:
            words.append(f"{called} is {json.dumps(there)} there, {json.dumps(here)} here")
    return words
