"""The decoder: an embedding of a picture, and a caption, to a small picture; and back to the noise it came from.

It draws pixels, as in the paper, or the vectors of a dVAE's codebook, "codes", which that dVAE turns into pixels: far
fewer, and so sooner learned. What is drawn is the nearest code at each place of a grid. Latent diffusion (Rombach et
al. 2022, arXiv 2112.10752) does so with what its autoencoder makes of a picture.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.1 and table 3; kakaobrain/karlo at 3c68a50 for what the paper leaves
open; Nichol et al. 2021 (GLIDE, arXiv 2112.10741), 4.3, for inpainting. A U-Net is told z_i twice, in the timestep's
embedding and as context tokens of its attention, beside the caption's states.

Deviation: the paper draws pixels only, and enlarges them.

Deviation: the paper's text path is a transformer of its own, 1.2 billion parameters; here, as in all public unCLIPs,
the states of CLIP's text tower are read.

Letters: B batch  C channels  H,W picture in pixels, or grid of codes  E embedding  M embedding of the timestep
         S context positions  D context width  V codes
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.models.directory import ADDED_LATER
from storage.models.stored import StoredModel
from unclip.conditions import NullText, Text
from unclip.diffusion import Diffusion, Prediction, Schedule
from unclip.sampling import signed, unsigned
from unclip.unet import UNet, UNetConfig

KIND = "decoder"
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(UNetConfig):
    """Sizes of a decoder; the defaults are the paper's, 2,253 million parameters with the conditions.

    If it draws codes, `image_size` is the side of their grid, and `out_channels` the numbers of a code.
    """

    context_width: int = 2048
    """Width of the vectors that attention sees beside the picture."""
    embed_dim: int = 1024
    """Numbers of an embedding."""
    text_width: int = 1024
    """Width of the text tower's states."""
    text_len: int = 256
    """Text positions, at most."""
    n_tokens: int = 4
    """Context positions that an embedding becomes."""
    prediction: Prediction = "noise"
    """What is predicted. The noise in the paper; v learns far sooner where training is short."""
    schedule: Schedule = "cosine"
    """Of the noise."""
    n_steps: int = 1000
    """Steps of the schedule."""
    scale: float = 17.2
    """Factor of embeddings before they are read: see `embedding_scale` in unclip/prior.py."""
    normalised: bool = True
    """Whether it was trained on embeddings of unit length."""
    null_length: int = 1
    """Positions of what stands in for a caption that is left out."""
    codes: int = field(default=0, metadata=ADDED_LATER)
    """Size of the codebook, if it draws codes; 0 for pixels."""
    code_side: int = field(default=1, metadata=ADDED_LATER)
    """Side in pixels of what a code stands for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context_width", "embed_dim", "text_width", "text_len", "n_tokens", "null_length", "code_side"):
            value = getattr(self, name)
            if type(value) is not int or not value >= 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        if self.null_length > self.text_len:
            raise ValueError(f"null_length ({self.null_length}) must be at most text_len ({self.text_len})")
        if type(self.codes) is not int or self.codes < 0:
            raise ValueError(f"codes ({self.codes!r}) must be a whole number of at least 0")
        if not self.codes and self.code_side != 1:
            raise ValueError(f"code_side ({self.code_side}) must be 1 where there are no codes")
        if self.in_channels not in (self.channels, 2 * self.channels + 1):
            raise ValueError(
                f"in_channels ({self.in_channels}) must be {self.channels}, or {2 * self.channels + 1} for inpainting"
            )
        if not self.codes and self.out_channels not in (3, 6):
            raise ValueError(f"out_channels ({self.out_channels}) must be 3, or 6 with a learned variance")
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction ({self.prediction!r}) must be one of {', '.join(get_args(Prediction))}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale ({self.scale}) must be a number above 0")
        Diffusion(self.schedule, self.n_steps)  # checks both

    @property
    def inpaints(self) -> bool:
        """Whether it reads what is known of a picture."""
        return self.in_channels > self.channels

    @property
    def channels(self) -> int:
        """C, of what noise is added to: those of pixels, or the numbers of a code."""
        return self.out_channels if self.codes else 3

    @property
    def picture_size(self) -> int:
        """Side in pixels of the pictures."""
        return self.image_size * self.code_side


class Codec(Protocol):
    """What turns pictures into tokens and back."""

    @property
    def config(self) -> Any:
        """Its sizes, and `bytes_per_picture`, the memory that a picture takes."""

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens int64 (B, Y, X) of pictures (B, 3, H, W) in [0, 1]."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1] of tokens (B, Y, X)."""


class Conditions(NamedTuple):
    """What a U-Net is told of embeddings and captions."""

    embedding: Tensor
    """(B, M)."""
    context: Tensor
    """(B, S, D)."""
    mask: Tensor
    """bool (B, S)."""


class Known(NamedTuple):
    """Pixels, or codes, that are known."""

    x0: Tensor
    """float (B, C, H, W), as `Decoder.encoded` returns it; what is not known in it is not looked at."""
    mask: Tensor
    """float (B, 1, H, W), 1 where they are known and 0 where not."""


class Decoder(StoredModel[DecoderConfig]):
    """The decoder.

    Args:
        config: the sizes.
    """

    vectors: Tensor

    kind = KIND
    config_type = DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self._codec: tuple[Codec, ...] = ()  # in a tuple, so that it does not become a part of this module
        if config.codes:
            self.register_buffer("vectors", torch.zeros(config.codes, config.channels))
            """(V, C): of each code, as noise is added to it."""
        width = config.context_width
        self.unet = UNet(config)
        self.image_time = nn.Linear(config.embed_dim, config.embedding_width)
        self.text_time = nn.Linear(config.embed_dim, config.embedding_width)
        self.tokens = nn.Linear(config.embed_dim, config.n_tokens * width)
        self.text_states = nn.Linear(config.text_width, width)
        self.text_norm = nn.LayerNorm(width)
        self.null_image = nn.Parameter(torch.randn(config.embed_dim) * _DEVIATION)
        self.null_text = NullText(config.embed_dim, config.null_length, config.text_width)

    @property
    def process(self) -> Diffusion:
        """The steps that it is trained on."""
        return Diffusion(self.config.schedule, self.config.n_steps)

    def use_codec(self, codec: Codec) -> None:
        """Set what turns codes into pixels: the dVAE that this was trained with; it does not become a part of this."""
        self._codec = (codec,)

    def encoded(self, images: Tensor) -> Tensor:
        """Return pictures as noise is added to them, float32 (B, C, H, W).

        Args:
            images: float (B, 3, `picture_size`, `picture_size`) in [0, 1].
        """
        if not self.config.codes:
            return signed(images.float())
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.codec.encode(images.float())
        return self.vectors.float()[tokens].permute(0, 3, 1, 2).contiguous()

    def pictures(self, x0: Tensor) -> Tensor:
        """Return pictures, float32 (B, 3, `picture_size`, `picture_size`) in [0, 1], of what was drawn (B, C, H, W)."""
        if not self.config.codes:
            return unsigned(x0)
        return self.codec.decode(nearest_tokens(self.vectors.float(), x0))

    @property
    def codec(self) -> Codec:
        """What turns codes into pixels; ValueError before `use_codec`."""
        if not self._codec:
            raise ValueError(
                "this decoder draws codes: give it its dVAE, `decoder.use_codec(load_codec(bundle / 'dvae'))`"
            )
        return self._codec[0]

    def known(self, images: Tensor, is_known: Tensor) -> Known:
        """Return what is known of pictures; a code that stands for any pixel that is not known is not known.

        Args:
            images: float (B, 3, `picture_size`, `picture_size`) in [0, 1].
            is_known: bool (B, `picture_size`, `picture_size`), True where a pixel is known.
        """
        mask = -F.max_pool2d(-is_known[:, None].float(), self.config.code_side)
        return Known(self.encoded(images), mask)

    def scaled(self, embeddings: Tensor, is_dropped: Tensor) -> Tensor:
        """Return embeddings (B, E) as they are read, with the learned null in the rows that are dropped."""
        return torch.where(is_dropped[:, None], self.null_image.float(), embeddings.float() * self.config.scale)

    def conditions(
        self, embeddings: Tensor, text: Text, no_image: Tensor | None = None, no_text: Tensor | None = None
    ) -> Conditions:
        """Return what the U-Net is told, the same at all steps.

        Args:
            embeddings: (B, E), of pictures, as CLIP gives them.
            text: of B captions.
            no_image: bool (B,), True where the embedding is left out; None to keep all.
            no_text: bool (B,), True where the caption is left out; None to keep all.

        Raises:
            ValueError: embeddings or text do not fit the configuration.
        """
        config = self.config
        text.checked(config.embed_dim, config.text_len, config.text_width)
        if embeddings.shape != text.features.shape:
            raise ValueError(
                f"embeddings are {tuple(embeddings.shape)}; expected {tuple(text.features.shape)}, one for each caption"
            )
        nothing = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
        text = self.null_text(text, nothing if no_text is None else no_text)
        dtype = self.tokens.weight.dtype
        read = self.scaled(embeddings, nothing if no_image is None else no_image).to(dtype)
        tokens = self.tokens(read).unflatten(1, (config.n_tokens, -1))
        states = self.text_norm(self.text_states(text.states.to(dtype)))
        return Conditions(
            self.image_time(read) + self.text_time(text.features.to(dtype)),
            torch.cat([tokens, states], dim=1),
            F.pad(text.mask, (config.n_tokens, 0), value=True),
        )

    def predict(self, x: Tensor, timesteps: Tensor, conditions: Conditions, known: Known | None = None) -> Tensor:
        """Return what `config.prediction` says, and perhaps a variance behind it, (B, C or 2C, H, W).

        Args:
            x: float (B, C, H, W), pictures or codes with noise.
            timesteps: (B,).
            conditions: of B rows.
            known: what is known of the pictures, for a decoder that inpaints; None for nothing.

        Raises:
            ValueError: something is known, and the decoder does not inpaint.
        """
        if known is not None and not self.config.inpaints:
            raise ValueError("this decoder does not inpaint: it has no channels for what is known of a picture")
        if self.config.inpaints:
            shape = (len(x), self.config.channels + 1, *x.shape[2:])
            told = x.new_zeros(shape) if known is None else torch.cat([known.x0 * known.mask, known.mask], dim=1)
            x = torch.cat([x, told], dim=1)
        output: Tensor = self.unet(x, timesteps, conditions.embedding, conditions.context, conditions.mask)
        return output

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        embeddings: Tensor,
        text: Text,
        no_image: Tensor | None = None,
        no_text: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Return `predict` with `conditions`; arguments as theirs."""
        return self.predict(x, timesteps, self.conditions(embeddings, text, no_image, no_text), known)

    def inpainting(self) -> "Decoder":
        """Return a copy that reads what is known too, and does not heed it before it is trained to (GLIDE, 4.3)."""
        if self.config.inpaints:
            raise ValueError("this decoder inpaints already")
        more = self.config.channels + 1
        decoder = type(self)(dataclasses.replace(self.config, in_channels=self.config.channels + more))
        decoder._codec, decoder.metadata = self._codec, dict(self.metadata)
        state = {name: weight.clone() for name, weight in self.state_dict().items()}
        state["unet.conv_in.weight"] = F.pad(state["unet.conv_in.weight"], (0, 0, 0, 0, 0, more))
        decoder.load_state_dict(state, strict=True)
        return decoder.train(self.training)


def nearest_tokens(vectors: Tensor, x: Tensor) -> Tensor:
    """Return the token whose vector is nearest at each place, int64 (B, Y, X); a picture at a time, to save memory.

    Args:
        vectors: float32 (V, C).
        x: (B, C, Y, X).
    """
    tokens = [torch.cdist(picture.float().flatten(1).T, vectors).argmin(dim=1) for picture in x]
    return torch.stack(tokens).view(len(x), *x.shape[2:])
