"""What pictures become before they are compared: prepared by a profile, then features, and logits where it has classes.

Letters: N pictures  D features  K classes
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle.evaluation.features.nets import CLIPFeatures, FeatureNet, InceptionFeatures, in_equal_batches
from dalle.evaluation.features.profiles import PROFILES, Profile, ProfileName, load_profile, prepared
from rerank import CLIP

OWN = "own"
"""In place of files of weights: the image tower of a CLIP."""


@dataclass(frozen=True, eq=False)
class PictureNetwork:
    """The networks of a profile, and how pictures reach them."""

    profile: Profile
    net: FeatureNet
    """Of distances."""
    classes: InceptionFeatures | None = None
    """Of the Inception Score; None without."""

    def __call__(
        self, images: Iterable[Image.Image], radius: float = 0, progress: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """Return "features" (N,D), and "logits" (N,K) if there are classes: float32 on the CPU.

        Args:
            images: N pictures of any size.
            radius: of the blur; 0 for none.
            progress: called with the number of pictures done.

        Raises:
            ValueError: there are no pictures.
        """
        pixels = (prepared(image, self.profile, radius=radius) for image in images)
        rows = in_equal_batches(self._compute, pixels, progress=progress)
        dimension = self.net.dimension
        found = {"features": rows[:, :dimension]}
        return found if self.classes is None else {**found, "logits": rows[:, dimension:]}

    def _compute(self, pixels: Tensor) -> Tensor:
        if self.classes is None:
            return self.net.features(pixels)
        if self.classes is self.net:
            return torch.cat(self.classes.features_and_logits(pixels), dim=1)
        return torch.cat([self.net.features(pixels), self.classes.features_and_logits(pixels)[1]], dim=1)

    @property
    def n_numbers(self) -> int:
        """Numbers of each picture."""
        return self.net.dimension + (0 if self.classes is None else len(self.classes.net.fc.weight))

    def identity(self) -> dict[str, Any]:
        """Return all that its numbers depend on."""
        classes = None if self.classes is None else self.classes.hash
        return {"profile": self.profile.name, "net": self.net.name, "weights": self.net.hash, "classes": classes}


def load_network(
    features: Sequence[str], profile: ProfileName | None, clip: CLIP | None, clip_hash: str, device: torch.device
) -> PictureNetwork:
    """Return the network that the options ask for.

    Args:
        features: "own", or files of weights.
        profile: by default "own" for that, "tf" for files.
        clip: whose image tower "own" means; None if there is none.
        clip_hash: its hash.
        device: where it computes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the profile and the features do not go together, or a file is no such network.
    """
    name = profile or ("own" if list(features) == [OWN] else "tf")
    if (name == "own") != (list(features) == [OWN]):
        raise ValueError(
            f"--profile own is for --features own, but --features is {' '.join(features)}: leave one of them out"
            if name == "own"
            else f"--profile {name} needs Inception's weights: give their files with --features, or leave --profile out"
        )
    if name == "own":
        if clip is None:
            raise ValueError(
                "--features own needs a CLIP, which a folder of pictures does not have: name one with --judge BUNDLE, "
                "or give files of Inception's weights with --features"
            )
        return PictureNetwork(PROFILES["own"], CLIPFeatures(clip, clip_hash))
    nets = load_profile(PROFILES[name], [Path(path) for path in features], device)
    return PictureNetwork(PROFILES[name], nets.features, nets.classes)
