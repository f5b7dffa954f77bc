"""The autoregressive prior: a caption, as CLIP's text tower sees it, to the tokens of an embedding, one after another.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.2 and C. A causal transformer reads the caption's states, its embedding
z_t, a token of the dot product z_i·z_t, and the tokens of z_i's components so far, and tells the next one.

Deviation: the paper encodes the caption's text ids in a transformer of its own, of width 2,048; here the states of
CLIP's text tower are read, as by the diffusion prior. All components share one table of embeddings and one head, and a
caption that is left out leaves its dot product out: the paper does not say either.

Letters: B batch  E embedding  L text positions  W width  K dimensions  V buckets
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.autoregressive.buckets import Buckets, drawn_tokens
from unclip.conditions import NullText, Text, drawn_mask
from unclip.prior import Block, CaptionTransformer, Memory, TransformerSizes, check_size, visible_positions
from unclip.sampling import OnPass, guided

KIND = "prior-autoregressive"
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(TransformerSizes):
    """Sizes of an autoregressive prior; the defaults are the paper's decoder and buckets."""

    width: int = 1664
    """Of the transformer."""
    n_heads: int = 26
    """Its attention heads; divide `width`."""
    dimensions: int = 319
    """K, principal components of an embedding that are kept."""
    buckets: int = 1024
    """V, into which each is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("dimensions", self.dimensions)
        check_size("buckets", self.buckets, least=2)
        if self.dimensions > self.embed_dim:
            raise ValueError(f"dimensions ({self.dimensions}) must be at most embed_dim ({self.embed_dim})")


class AutoregressivePrior(CaptionTransformer[AutoregressiveConfig]):
    """The prior; its buckets are nothing until they are set.

    Args:
        config: the sizes.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor

    kind = KIND
    config_type = AutoregressiveConfig

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__(config)
        width, dimensions = config.width, config.dimensions
        self.text_states = nn.Linear(config.text_width, width)
        self.text_features = nn.Linear(config.embed_dim, width)
        self.positions = nn.Parameter(torch.randn(config.text_len + 1 + dimensions, width) * _DEVIATION)
        self.dots = nn.Embedding(config.buckets + 1, width)
        """Of the dot product's tokens; the last one is of a caption that is left out."""
        self.values = nn.Embedding(config.buckets, width)
        """Of the components' tokens."""
        for table in (self.dots, self.values):
            nn.init.normal_(table.weight, std=_DEVIATION)
        self.null_text = NullText(config.embed_dim, config.null_length, config.text_width)
        self.blocks = nn.ModuleList(Block(width, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Linear(width, config.buckets)
        self.register_buffer("mean", torch.zeros(config.embed_dim))
        """Of `Buckets`, as the others."""
        self.register_buffer("components", torch.zeros(dimensions, config.embed_dim))
        self.register_buffer("low", torch.zeros(1 + dimensions))
        self.register_buffer("high", torch.ones(1 + dimensions))
        self.register_buffer("counts", torch.ones(config.buckets))

    @property
    def buckets(self) -> Buckets:
        """What turns embeddings into tokens."""
        return Buckets(self.mean, self.components, self.low, self.high, self.counts)

    def set_buckets(self, buckets: Buckets) -> None:
        """Take over buckets of the configuration's sizes."""
        for name, value in buckets._asdict().items():
            getattr(self, name).copy_(value)

    def unquantised(self, tokens: Tensor) -> Tensor:
        """Return embeddings float32 (B, E) of tokens (B, K); of unit length if the configuration says so."""
        embeddings = self.buckets.embeddings(tokens)
        return F.normalize(embeddings, dim=-1) if self.config.normalised else embeddings

    def forward(self, tokens: Tensor, text: Text) -> Tensor:
        """Return logits float32 (B, n, V) of the first n components: of each, given the tokens before it.

        Args:
            tokens: int64 (B, n), n from 1 to K: of the dot product, V for none, then of the first n - 1 components.
            text: of B captions.

        Raises:
            ValueError: the text does not fit the configuration.
        """
        h_BSW = torch.cat([self._read(text), self._told(tokens, 0)], dim=1)
        h_BSW, _ = self._blocks(h_BSW, visible_positions(text), None)
        return self._answered(h_BSW[:, -tokens.shape[1] :])

    @torch.no_grad()
    def continued(self, tokens: Tensor, place: int, memory: Memory, visible: Tensor) -> tuple[Tensor, Memory]:
        """Return the logits of one component, float32 (B, V), and the memory with one position more.

        Args:
            tokens: int64 (B,), the one before it.
            place: the component's number, from 0.
            memory: of all positions before, from `remember` or this.
            visible: from `remember`.
        """
        h_BSW, memory = self._blocks(self._told(tokens[:, None], place), visible, memory)
        return self._answered(h_BSW[:, -1]), memory

    def _told(self, tokens: Tensor, place: int) -> Tensor:
        """Return the positions (B, n, W) of tokens (B, n), the first of which is before the component `place`."""
        first = self.dots(tokens[:, :1]) if place == 0 else self.values(tokens[:, :1])
        told = torch.cat([first, self.values(tokens[:, 1:])], dim=1)
        begin = self.config.text_len + 1 + place
        return told + self.positions[begin : begin + tokens.shape[1]]

    def _answered(self, h: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.norm(h)).float()
        return logits


def autoregressive_loss(
    prior: AutoregressivePrior, tokens: Tensor, text: Text, seed: int, dropped: float
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of a component's token in nats, a scalar, and that of each component, (K,).

    Args:
        prior: the prior.
        tokens: int64 (B, 1+K), of `Buckets.tokens`.
        text: of the captions.
        seed: of which captions are left out.
        dropped: share of captions that are left out, whole: states, z_t and dot product together.
    """
    generator = torch.Generator().manual_seed(seed)
    is_dropped = drawn_mask(len(tokens), dropped, generator, tokens.device)
    dots = torch.where(is_dropped, prior.config.buckets, tokens[:, 0])
    logits = prior(torch.cat([dots[:, None], tokens[:, 1:-1]], dim=1), prior.null_text(text, is_dropped))
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return nats.mean(), nats.mean(dim=0)


@torch.no_grad()
def draw_tokens(
    prior: AutoregressivePrior, text: Text, uniform: Tensor, guidance: float = 1.0, on_pass: OnPass | None = None
) -> Tensor:
    """Return tokens int64 (B, K) of embeddings of captions, each read once: earlier keys and values are kept.

    Args:
        prior: in evaluation mode.
        text: of B captions.
        uniform: (B, 1+K), in [0, 1): by which the dot product's token and each component's are drawn.
        guidance: of the logits, away from those without a caption; 1 is none.
        on_pass: told of each component.
    """
    dots = prior.buckets.dot_tokens(uniform[:, 0])
    told = [(dots, *prior.remember(text))]
    if guidance != 1:
        null = prior.null_text(text, torch.ones_like(dots, dtype=torch.bool))
        told.append((torch.full_like(dots, prior.config.buckets), *prior.remember(null)))
    drawn = []
    for place in range(prior.config.dimensions):
        answers = [prior.continued(before, place, memory, visible) for before, memory, visible in told]
        logits = guided(answers[0][0], answers[-1][0], guidance, prior.config.buckets)
        drawn.append(drawn_tokens(logits.softmax(dim=-1), uniform[:, place + 1]))
        told = [(drawn[-1], memory, visible) for (_, memory), (_, _, visible) in zip(answers, told, strict=True)]
        if on_pass is not None:
            on_pass()
    return torch.stack(drawn, dim=1)
