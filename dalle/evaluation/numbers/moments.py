"""Number, mean and co-moment of features, in float64, mergeable.

Moments of shards are merged in the order of the shards, whoever computed them, so any number of processes gets the bits
of one.

Letters: N pictures  D features
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.atomic import replace_file


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The first two moments of N feature vectors; all that a Fréchet distance needs of them."""

    n: int
    """Pictures, at least 1."""
    mean: Tensor
    """float64 (D,)"""
    comoment: Tensor
    """float64 (D,D): the sum over pictures of (x − mean)(x − mean)ᵀ."""

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance, float64 (D,D).

        Raises:
            ValueError: there is one picture alone.
        """
        if self.n < 2:
            raise ValueError("a covariance needs at least 2 pictures, got 1: give more pictures")
        return self.comoment / (self.n - 1)

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of features (N,D) of any float type, on the CPU.

        Raises:
            ValueError: there are none, they are of another shape, or some are not finite.
        """
        features_ND = checked_features(features)
        mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - mean_D
        comoment_DD = centred_ND.T @ centred_ND
        # a product that is computed in tiles need not be symmetric to the last bit
        return cls(n=len(features_ND), mean=mean_D, comoment=(comoment_DD + comoment_DD.T) / 2)

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of pictures (Chan, Golub and LeVeque 1979, the pairwise formula).

        Raises:
            ValueError: they have different numbers of features.
        """
        if self.dimension != other.dimension:
            raise ValueError(
                f"moments of {self.dimension} and of {other.dimension} features cannot be merged: "
                "compute both with the same network"
            )
        n = self.n + other.n
        step_D = other.mean - self.mean
        return Moments(
            n=n,
            mean=self.mean + step_D * (other.n / n),
            comoment=self.comoment + other.comoment + torch.outer(step_D, step_D) * (self.n * other.n / n),
        )

    def save(
        self, path: Path | str, about: Mapping[str, str] | None = None, *, also: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: the file.
            about: texts that `load` gives back, such as what the moments are of.
            also: further tensors for the file, of other names.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"n": torch.tensor(self.n), "mean": self.mean, "comoment": self.comoment, **(also or {})}
        replace_file(path, lambda partial: save_file(tensors, partial, metadata=dict(about or {})))

    @classmethod
    def load(cls, path: Path | str) -> tuple["Moments", dict[str, str]]:
        """Read a file of `save`: the moments, bit for bit, and what was said about them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no moments, or is cut off, or a number in it is not finite.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}: expected moments of features, in safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in ("n", "mean", "comoment")}
                about = dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(
                f"{path} holds no moments ({error}); expected a safetensors file with n, mean, comoment"
            ) from error
        mean_D, comoment_DD = found["mean"], found["comoment"]
        n = int(found["n"]) if found["n"].shape == () else 0
        if n < 1 or mean_D.ndim != 1 or comoment_DD.shape != (len(mean_D), len(mean_D)):
            raise ValueError(
                f"{path}: n {n}, mean {tuple(mean_D.shape)}, comoment {tuple(comoment_DD.shape)} "
                "do not belong together; compute the moments again"
            )
        if (mean_D.dtype, comoment_DD.dtype) != (torch.float64, torch.float64):
            raise ValueError(f"{path} has moments in {mean_D.dtype}, expected torch.float64; compute the moments again")
        if not (mean_D.isfinite().all() and comoment_DD.isfinite().all()):
            raise ValueError(f"{path} has moments that are not finite; compute them again")
        return cls(n=n, mean=mean_D, comoment=comoment_DD), about


def merge(parts: Iterable[Moments]) -> Moments:
    """Merge the moments of shards in the order given, which decides the last bits.

    Raises:
        ValueError: there are none, or they have different numbers of features.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("no moments to merge: give those of at least one shard")
    return reduce(Moments.merged, parts)


def checked_features(features: Tensor, name: str = "the features") -> Tensor:
    """Return features (N,D) in float64 on the CPU.

    Raises:
        ValueError: there are none, they are of another shape, or some are not finite; `name` is in the message.
    """
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name} are {features.dtype} of shape {tuple(features.shape)}; "
            "expected floats of shape (pictures, features)"
        )
    features_ND = features.detach().to("cpu", torch.float64)
    if not features_ND.isfinite().all():
        row = int((~features_ND.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} of picture {row} are not finite: the network or its weights are wrong")
    return features_ND
