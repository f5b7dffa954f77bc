"""Profiles: network, resize, crop and reference as one named thing, for scales that look alike are not one.

The same pictures score several points lower by TensorFlow's network than by that of the paper's figure.

Letters: S side  B batch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from dalle.evaluation.features.inception import LAYOUTS, LayoutName
from dalle.evaluation.features.inception_file import InceptionFile, load_inception
from dalle.evaluation.features.nets import InceptionFeatures
from dalle.evaluation.features.resize import Resize
from dvae.images import resize_and_crop

Crop = Literal["centre", "squash"]
ProfileName = Literal["own", "dalle2021", "tf", "clean"]

SIDE = 256
"""Side in pixels at which pictures of both sides are blurred, and from which networks resize."""
BLURS = (0, 1, 2, 4, 8)
"""Radii of the paper's sweep (3.1), in pixels at 256 × 256."""


@dataclass(frozen=True)
class Profile:
    """How numbers of one scale come about."""

    name: ProfileName
    crop: Crop
    """How pictures become squares. "centre": the shorter side is resized with Lanczos, and the centre cropped.
    "squash": both sides are resized, bilinear, whatever becomes of the shape."""
    reference: str
    """Which pictures the published numbers were measured against."""
    scale: str = ""
    """Ends the name of its Inception networks; "" of a profile without."""
    resize: Resize | None = None
    network: LayoutName | None = None
    """Of the Fréchet distance."""
    classifier: LayoutName | None = None
    """Of the Inception Score."""
    unnormalised: bool = False
    """Whether the distance's network gets pixels of [0, 1] through the map that is for normalised ones."""


PROFILES: dict[ProfileName, Profile] = {
    "own": Profile("own", "centre", "nothing is published on it"),
    "dalle2021": Profile(
        "dalle2021",
        "squash",
        "all pictures of the validation set",
        scale="dmgan",
        resize="pil-bilinear",
        network="imagenet",
        classifier="tf",
        unnormalised=True,
    ),
    "tf": Profile(
        "tf", "centre", "all pictures of the validation set", scale="tf", resize="tf1", network="tf", classifier="tf"
    ),
    "clean": Profile(
        "clean",
        "centre",
        "all pictures of the validation set",
        scale="clean",
        resize="pil-bicubic-float",
        network="tf",
        classifier="tf",
    ),
}
"""By name. "own" is of a CLIP of ours, and comparable with itself alone.

- "dalle2021": DM-GAN's scripts (MinfengZhu/DM-GAN at d515995, eval/FID and eval/IS), which the paper's figure is by.
  Torchvision's network for the distance, TensorFlow's for the Inception Score. Deviation: pictures pass 256 × 256,
  where they are blurred, on their way to 299; the last, incomplete batch is kept.
- "tf": TensorFlow's network and its own resize, as torch-fidelity has them.
- "clean": the same network after clean-fid's resize.
"""


def prepared(image: Image.Image, profile: Profile, *, radius: float = 0, side: int = SIDE) -> Tensor:
    """Return a picture as both sides of a comparison are seen: cropped, resized, blurred, in bytes.

    Args:
        image: RGB, any size.
        profile: says how it is cropped.
        radius: of Pillow's GaussianBlur, in pixels of the result: its standard deviation. 0 leaves every bit.
        side: S of the result.

    Returns:
        uint8 (3,S,S)

    Raises:
        ValueError: the picture is not RGB, the radius is below 0 or no number, or the side below 1.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture is of Pillow's mode {image.mode}; expected RGB: open it with open_image")
    if not 0 <= radius < float("inf") or side < 1:
        raise ValueError(
            f"blur radius {radius} and side {side}; expected a radius of 0 or more, and a side of 1 or more"
        )
    if profile.crop == "squash":
        square = image.resize((side, side), Image.Resampling.BILINEAR)
    else:
        square = resize_and_crop(image, side)
    if radius > 0:
        square = square.filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ProfileNets:
    """The networks of a profile."""

    features: InceptionFeatures
    """Of distances."""
    classes: InceptionFeatures | None
    """Of the Inception Score; the same as `features` if one network serves both, None if its file was not given."""


def load_profile(profile: Profile, files: Sequence[Path | str], device: torch.device | str = "cpu") -> ProfileNets:
    """Load the networks of a profile from the user's files, each known by its contents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file of the distance's network is not among them, one is of no use, or one is no such network.
    """
    if profile.network is None or profile.classifier is None or profile.resize is None:
        raise ValueError(f"the profile {profile.name} takes its features from a CLIP, not from files of weights")
    needed = {profile.network, profile.classifier}
    found: dict[LayoutName, InceptionFile] = {}
    for path in files:
        file = load_inception(path, device)
        name = file.net.layout.name
        if name not in needed or name in found:
            why = "was given before" if name in found else f"the profile {profile.name} has no use for"
            raise ValueError(f"{path} holds the network {name}, which {why}; {_wanted(profile)}")
        found[name] = file
    if profile.network not in found:
        raise ValueError(f"no file has the weights for the distance of the profile {profile.name}; {_wanted(profile)}")
    features = _net(found[profile.network], profile, profile.unnormalised)
    if profile.classifier == profile.network:
        return ProfileNets(features, features)
    return ProfileNets(
        features, _net(found[profile.classifier], profile, False) if profile.classifier in found else None
    )


def _net(file: InceptionFile, profile: Profile, unnormalised: bool) -> InceptionFeatures:
    assert profile.resize is not None
    pixels = unnormalised_pixels if unnormalised else tf_pixels
    return InceptionFeatures(file.net, file.sha256, f"inception-{profile.scale}", profile.resize, pixels)


def _wanted(profile: Profile) -> str:
    assert profile.network is not None
    wanted = f"expected {LAYOUTS[profile.network].file}"
    if profile.classifier is None or profile.classifier == profile.network:
        return wanted
    return f"{wanted} for the distance, and for the Inception Score {LAYOUTS[profile.classifier].file}"


def tf_pixels(pixels: Tensor) -> Tensor:
    """Map 0 … 255 to −1 … 1, as the graph of TensorFlow's network does."""
    return (pixels - 128) / 128


def unnormalised_pixels(pixels: Tensor) -> Tensor:
    """Map 0 … 255 as DM-GAN's script does, to about −0.03 … 0.43.

    The map turns pixels with ImageNet's mean and deviation into −1 … 1; the script applies it to [0, 1]. A slip, but
    its numbers are on the scale that it makes.
    """
    mean_and_std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=pixels.device)[:, :, None, None]
    return pixels / 255 * (mean_and_std[1] / 0.5) + (mean_and_std[0] - 0.5) / 0.5
