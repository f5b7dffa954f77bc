"""A CLIP's configuration: sizes, and what published models differ in."""

from dataclasses import dataclass, field
from typing import get_args

from rerank.blocks import Activation
from rerank.pixels import PIXEL_MEAN, PIXEL_STD, Interpolation, Resize, View
from storage.models.directory import ADDED_LATER


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of both towers, and what published models differ in.

    The defaults are OpenAI's ViT-B/32 (151,277,313 parameters), but for its view of pictures.
    """

    image_size: int = 224
    """Side in pixels of the square that the image tower sees."""
    patch_size: int = 32
    """Side in pixels of one patch; divides image_size. Of a ResNet, what its strides multiply to, 32."""
    vision_width: int = 768
    """Width of the image tower; of a ResNet, of its stem."""
    vision_layers: int = 12
    """Number of blocks of the image tower."""
    vision_heads: int = 12
    """Attention heads of the image tower, of a ResNet in its pooling; divides vision_width."""
    context_length: int = 77
    """Number of text positions, start and end of text included."""
    vocab_size: int = 49408
    """Number of text ids; the last one is end-of-text, the one before it start-of-text."""
    text_width: int = 512
    """Width of the text tower."""
    text_layers: int = 12
    """Number of blocks of the text tower."""
    text_heads: int = 8
    """Attention heads of the text tower; divides text_width."""
    embed_dim: int = 512
    """Length of the feature vectors that are compared."""
    vision_mlp: int | None = field(default=None, metadata=ADDED_LATER)
    """Width of the MLPs in the image tower's blocks; None for four times vision_width."""
    text_mlp: int | None = field(default=None, metadata=ADDED_LATER)
    """Width of the MLPs in the text tower's blocks; None for four times text_width."""
    resnet: tuple[int, ...] = field(default=(), metadata=ADDED_LATER)
    """Blocks in each of a ResNet's four stages, which sum to vision_layers; () for a vision transformer."""
    activation: Activation = field(default="quick_gelu", metadata=ADDED_LATER)
    """Of both towers' MLPs. The weights do not show it, and with the wrong one the features are a little off."""
    pixel_mean: tuple[float, ...] = field(default=PIXEL_MEAN, metadata=ADDED_LATER)
    """What is subtracted from red, green and blue in [0, 1]."""
    pixel_std: tuple[float, ...] = field(default=PIXEL_STD, metadata=ADDED_LATER)
    """What they are divided by then."""
    resize: Resize = field(default="square", metadata=ADDED_LATER)
    """How a picture becomes a square: see `View`."""
    interpolation: Interpolation = field(default="bicubic", metadata=ADDED_LATER)
    """Of resizing by Pillow, that is if `resize` is not "square"."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for total, divisor in (
            ("image_size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            whole, part = getattr(self, total), getattr(self, divisor)
            if whole % part:
                raise ValueError(f"{total} ({whole}) must be a multiple of {divisor} ({part})")
        for name in ("context_length", "vocab_size"):
            value = getattr(self, name)
            if value < 3:
                raise ValueError(f"{name} is {value}; it must be at least 3: start, end and one id")

        for name, known in (
            ("activation", get_args(Activation)),
            ("resize", get_args(Resize)),
            ("interpolation", get_args(Interpolation)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or not min(self.pixel_std) > 0:
            raise ValueError("pixel_mean and pixel_std must be three numbers each, those of pixel_std above 0")
        if self.resnet and (len(self.resnet) != 4 or sum(self.resnet) != self.vision_layers or self.patch_size != 32):
            raise ValueError(
                f"resnet is {self.resnet}; it must be four numbers that sum to vision_layers ({self.vision_layers}), "
                f"and patch_size 32, not {self.patch_size}"
            )

    @property
    def view(self) -> View:
        """How it sees pictures."""
        return View(self.image_size, self.resize, self.interpolation, self.pixel_mean, self.pixel_std)

    @property
    def n_patches(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2
