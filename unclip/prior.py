"""The diffusion prior: a caption, as CLIP's text tower sees it, to an embedding of a picture of it.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.2 and table 3; kakaobrain/karlo at 3c68a50 for what the paper leaves
open. A causal transformer reads the caption's states, its embedding z_t, the timestep and z_i with noise, and tells at
a learned last position what z_i is without noise. The text is before everything else, so nothing of it depends on the
noise, and in sampling it is read once.

Deviation: the paper encodes the caption's text ids in this transformer; here, as in all public unCLIPs, the states of
CLIP's text tower are read.

Letters: B batch  E embedding  L text positions  D text width  S positions  W width  H heads  K head width
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from storage.models.stored import StoredModel
from unclip.conditions import NullText, Text
from unclip.diffusion import Diffusion, Schedule
from unclip.unet import TimestepMLP

KIND = "prior"
COORDINATE_DEVIATION = 0.5375
"""Of a scaled embedding's coordinates: about that of pixels in [-1, 1]. The paper multiplies by 17.2 at E = 1024."""
_EXTRA_POSITIONS = 4
"""After the text's states: z_t, the timestep, z_i with noise, and the position where the answer is read."""
_DEVIATION = 0.02

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (B, H, S, K)."""


def embedding_scale(embed_dim: int) -> float:
    """Return the factor of unit embeddings that gives their coordinates the deviation of pixels."""
    return COORDINATE_DEVIATION * math.sqrt(embed_dim)


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Sizes of a transformer that reads captions; the defaults are those of the paper's diffusion prior."""

    embed_dim: int = 1024
    """Numbers of an embedding."""
    text_width: int = 1024
    """Width of the text tower's states."""
    text_len: int = 256
    """Text positions, at most."""
    width: int = 2048
    """Of the transformer."""
    n_layers: int = 24
    """Its blocks."""
    n_heads: int = 32
    """Its attention heads; divide `width`."""
    normalised: bool = True
    """Whether embeddings are of unit length, and so is what is sampled."""
    null_length: int = 1
    """Positions of what stands in for a caption that is left out."""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "text_width", "text_len", "width", "n_layers", "n_heads", "null_length")
        for name in sizes:
            check_size(name, getattr(self, name))
        if self.width % self.n_heads or self.width % 2:
            raise ValueError(f"width ({self.width}) must be even and a multiple of n_heads ({self.n_heads})")
        if self.null_length > self.text_len:
            raise ValueError(f"null_length ({self.null_length}) must be at most text_len ({self.text_len})")


def check_size(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless a size is a whole number of at least `least`."""
    if type(value) is not int or not value >= least:
        raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(TransformerSizes):
    """Sizes of a prior, and how embeddings are scaled; the defaults are the paper's, 1,226 million parameters."""

    schedule: Schedule = "cosine"
    """Of the noise."""
    n_steps: int = 1000
    """Steps of the schedule."""
    scale: float = 17.2
    """Factor of embeddings before noise is added, taken back at the end: see `embedding_scale`."""
    clamp: float = 0.0
    """Bound of the coordinates of what is predicted when sampling, in scaled units; 0 for none, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale < math.inf or not 0 <= self.clamp < math.inf:
            raise ValueError(f"scale ({self.scale}) must be above 0, and clamp ({self.clamp}) at least 0")
        Diffusion(self.schedule, self.n_steps)  # checks both


Sizes = TypeVar("Sizes", bound=TransformerSizes)


class Block(nn.Module):
    """A transformer block with its LayerNorms before attention and MLP; the MLP is four times as wide."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(
        self, h_BSW: Tensor, mask: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return (B, S, W), and the keys and values of all positions.

        Args:
            h_BSW: positions.
            mask: bool (B, 1, S, S'), True where a position sees another.
            before: keys and values of positions before these.
        """
        qkv = self.qkv(self.norm1(h_BSW)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHSK, k_BHSK, v_BHSK = qkv
        if before is not None:
            k_BHSK, v_BHSK = (torch.cat(pair, dim=2) for pair in zip(before, (k_BHSK, v_BHSK), strict=True))
        seen = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask)
        h_BSW = h_BSW + self.out(seen.transpose(1, 2).flatten(2))
        h_BSW = h_BSW + self.mlp_out(F.gelu(self.mlp_in(self.norm2(h_BSW))))
        return h_BSW, (k_BHSK, v_BHSK)


class CaptionTransformer(StoredModel[Sizes]):
    """A causal transformer that reads a caption's states and z_t first, and then what a prior asks it.

    Args:
        config: the sizes.
    """

    text_states: nn.Linear
    text_features: nn.Linear
    positions: nn.Parameter
    """(…, W): those of the states, that of z_t, and those of what comes after."""
    null_text: NullText
    blocks: nn.ModuleList
    norm: nn.LayerNorm
    answer: nn.Linear

    def __init__(self, config: Sizes) -> None:
        super().__init__(config)
        self.activation_checkpointing = False
        """Whether blocks are computed again in the backward pass instead of being kept."""

    @torch.no_grad()
    def remember(self, text: Text) -> tuple[Memory, Tensor]:
        """Return the keys and values of a text, and which of its positions are seen, bool (B, L+1).

        Raises:
            ValueError: the text does not fit the configuration.
        """
        h_BSW, visible = self._read(text), visible_positions(text)
        _, memory = self._blocks(h_BSW, visible, None)
        return memory, visible

    def _read(self, text: Text) -> Tensor:
        """Return the positions of a text, (B, L+1, W); the last ones of the table are not the text's."""
        config = self.config
        text.checked(config.embed_dim, config.text_len, config.text_width)
        dtype = self.answer.weight.dtype
        states = self.text_states(text.states.to(dtype)) + self.positions[: text.states.shape[1]]
        features = self.text_features(text.features.to(dtype)) + self.positions[config.text_len]
        return torch.cat([states, features[:, None]], dim=1)

    def _blocks(self, h_BSW: Tensor, visible: Tensor, before: Memory | None) -> tuple[Tensor, Memory]:
        """Return what the blocks make of positions (B, S, W) after those before, and all keys and values.

        Args:
            h_BSW: positions.
            visible: bool (B, L+1), which positions of the text are seen; later ones are.
            before: keys and values of all positions before these.
        """
        n_before = before[0][0].shape[2] if before else 0
        mask = _causal(visible, h_BSW.shape[1], n_before + h_BSW.shape[1])
        memory: Memory = []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            inputs = (h_BSW, mask, before[i] if before else None)
            h_BSW, kept = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if not torch.is_grad_enabled():
                memory.append(kept)
        return h_BSW, memory


class Prior(CaptionTransformer[PriorConfig]):
    """The prior.

    Args:
        config: the sizes.
    """

    mean: Tensor
    deviation: Tensor
    errors: Tensor

    kind = KIND
    config_type = PriorConfig

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.text_states = nn.Linear(config.text_width, width)
        self.text_features = nn.Linear(config.embed_dim, width)
        self.time = TimestepMLP(width, width)
        self.noised = nn.Linear(config.embed_dim, width)
        self.positions = nn.Parameter(torch.randn(config.text_len + _EXTRA_POSITIONS, width) * _DEVIATION)
        self.last = nn.Parameter(torch.randn(width) * _DEVIATION)
        self.null_text = NullText(config.embed_dim, config.null_length, config.text_width)
        self.blocks = nn.ModuleList(Block(width, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Linear(width, config.embed_dim)
        self.register_buffer("mean", torch.zeros(config.embed_dim))
        """(E,): subtracted from embeddings before they are scaled; 0 unless imported."""
        self.register_buffer("deviation", torch.ones(config.embed_dim))
        """(E,): they are divided by then; 1 unless imported."""
        self.register_buffer("errors", torch.zeros(config.n_steps))
        """(T,): mean squared errors of predictions, scaled, for the best variances; 0 until they are measured."""

    @property
    def process(self) -> Diffusion:
        """The steps that it is trained on."""
        return Diffusion(self.config.schedule, self.config.n_steps)

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Return embeddings (B, E) as noise is added to them."""
        return (embeddings.float() - self.mean) / self.deviation * self.config.scale

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Return embeddings (B, E) from scaled ones; of unit length if the configuration says so."""
        embeddings = scaled.float() / self.config.scale * self.deviation + self.mean
        return F.normalize(embeddings, dim=-1) if self.config.normalised else embeddings

    def forward(self, x: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """Return x̂_0, what scaled embeddings are without noise: float32 (B, E).

        Args:
            x: float (B, E), scaled embeddings with noise.
            timesteps: (B,).
            text: of B captions.

        Raises:
            ValueError: the text does not fit the configuration.
        """
        h_BSW = torch.cat([self._read(text), self._asked(x, timesteps)], dim=1)
        h_BSW, _ = self._blocks(h_BSW, visible_positions(text), None)
        return self._answered(h_BSW)

    def continued(self, x: Tensor, timesteps: Tensor, memory: Memory, visible: Tensor) -> Tensor:
        """Return what `forward` does, from a text that `remember` has read."""
        h_BSW, _ = self._blocks(self._asked(x, timesteps), visible, memory)
        return self._answered(h_BSW)

    def _asked(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Return the positions after a text, (B, 3, W)."""
        noised = self.noised(x.to(self.answer.weight.dtype))
        asked = torch.stack([self.time(timesteps), noised, self.last.expand_as(noised)], dim=1)
        return asked + self.positions[self.config.text_len + 1 :]

    def _answered(self, h_BSW: Tensor) -> Tensor:
        output: Tensor = self.answer(self.norm(h_BSW[:, -1])).float()
        return output


def visible_positions(text: Text) -> Tensor:
    """Return which positions of a text, z_t among them, are seen: bool (B, L+1)."""
    return F.pad(text.mask, (0, 1), value=True)


def _causal(visible: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Return who sees whom, bool (B, 1, Q, S): the last Q of S positions see what is visible up to themselves.

    Args:
        visible: bool (B, L), of the first positions; those after them are visible.
        n_queries: Q.
        n_keys: S, at least L.
    """
    all_visible = F.pad(visible, (0, n_keys - visible.shape[1]), value=True)
    earlier = torch.ones(n_queries, n_keys, dtype=torch.bool, device=visible.device).tril(n_keys - n_queries)
    return all_visible[:, None, None] & earlier
