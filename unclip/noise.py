"""Noise as a pure function of (seed, caption, candidate, purpose): no candidate depends on the others of its batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Sources of noise, one for each row of a batch."""

    rows: tuple[str, ...]
    """What each row's noise is a function of, beside the purpose."""

    @classmethod
    def of(cls, seed: int, caption: str, candidates: Sequence[int]) -> Self:
        """Return the sources of a caption's candidates, by their numbers, in a run with `seed`."""
        return cls(tuple(f"{seed}\0{candidate}\0{caption}" for candidate in candidates))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Return standard normal noise, float32 (B, *shape), drawn on the CPU and so equal on all devices.

        Args:
            purpose: what it is for, such as "decoder, step 17": noise of different purposes is independent.
            shape: of one row.
            device: of the result.
        """
        drawn = [torch.randn(*shape, generator=_generator(f"{row}\0{purpose}")) for row in self.rows]
        return torch.stack(drawn).to(device)


def _generator(text: str) -> torch.Generator:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
