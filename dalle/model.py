"""DALL·E: a decoder-only sparse transformer over text and image tokens (Ramesh et al. 2021, §2.2, B.1, Fig 10).

Particulars:

- One stream: T text positions, then I image positions. Text and image have separate embeddings and separate,
  untied heads.
- A text position carries its text id's embedding and a text-position embedding; pads have an id, and so a
  vector, per position.
- An image position carries the embedding of the token before it (the first: start of image), and the row and
  column embedding of the position it predicts.
- Each layer attends sparsely, of the kind `DALLEConfig.kinds` says (see attention.py).
- Pre-LN residual blocks, GELU as x·σ(1.702x), biases, no dropout. The initialisation is the Sparse
  Transformer's (Child et al. 2019), to whose configuration the paper refers.

The model maps ids to logits and does nothing else: loss.py, cache.py and sampling.py take a model.

Legend: B batch  S stream = T+I  T text positions  I image positions  J some image positions  D width
        V vocabulary
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.attention import KINDS, Attend, Kind, PaperKind, layer_kinds, stored_mask
from dalle.cross_entropy import Head
from dalle.family.blocks import Block
from dalle.sparse_attention import prepare_compilation, sparse_attention
from dalle.stream import Stream, check_ids, image_inputs, n_image_ids, n_text_ids, null_caption, text_rows
from dvae.compilation import can_compile
from storage.models.stored import StoredModel, n_weights

KIND = "dalle"
"""Kind of the model's directory, in its config.json."""


@dataclass(frozen=True, kw_only=True)
class DALLEConfig:
    """Sizes of the transformer; the defaults are the paper's 12-billion-parameter model (B.1)."""

    n_layers: int = 64
    """Transformer layers, each an attention and an MLP residual block."""
    d_model: int = 3968
    """Width of the residual stream."""
    n_heads: int = 62
    """Attention heads; d_model must be a multiple of it."""
    text_len: int = 256
    """Text positions, start of text included."""
    grid: int = 32
    """Rows, and columns, of image tokens: the dVAE's grid."""
    text_vocab: int = 16_384
    """BPE tokens: the tokenizer's vocabulary size."""
    image_vocab: int = 8_192
    """Image tokens: the dVAE's vocabulary size."""
    conv_kernel: int = 11
    """Width of the window of conv layers in image positions, odd."""
    attention: Literal["paper", PaperKind] = "paper"
    """The paper's order of kinds (row and column, conv last), or one kind in every layer."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "text_vocab", "image_vocab", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel ({self.conv_kernel}) must be odd: the window is centred on its query")
        if self.attention not in ("paper", *KINDS):
            raise ValueError(f"unknown attention {self.attention!r}: expected paper, {', '.join(KINDS)}")
        Stream(self.text_len, self.grid)  # raises for sizes that make no stream

    @property
    def stream(self) -> Stream:
        """The layout of the stream."""
        return Stream(self.text_len, self.grid)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The attention kind of every layer."""
        if self.attention == "paper":
            return layer_kinds(self.n_layers)
        return (self.attention,) * self.n_layers

    def fitted(self, *, text_vocab: int, image_vocab: int, grid: int) -> Self:
        """Return these sizes for a tokenizer and a codec."""
        return replace(self, text_vocab=text_vocab, image_vocab=image_vocab, grid=grid)

    @property
    def n_text_ids(self) -> int:
        """Text ids: those of the tokenizer, start of text, and the pads."""
        return n_text_ids(self.text_vocab, self.text_len)

    @property
    def max_caption(self) -> int:
        """Tokens of a caption that are read; the rest is cut."""
        return self.text_len - 1

    def text_rows(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the text ids of the tokens of B captions, int64 (B, T): see stream.py."""
        return text_rows(captions, self.text_vocab, self.text_len)

    def null_caption(self) -> Tensor:
        """Return the text ids of "no caption", int64 (T,)."""
        return null_caption(self.text_vocab, self.text_len)

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


OWN_SHARE = 0.3
"""Random share of the variance of an image embedding that starts from the codebook."""


def begin_from_codebook(codebook_VC: Tensor, embedding_VD: Tensor, head_VD: Tensor) -> None:
    """Write into embeddings and head: see `DALLE.initialise_from_codebook`."""
    V, C = codebook_VC.shape
    if len(embedding_VD) != V:
        raise ValueError(f"the codebook has {V} rows, and the model {len(embedding_VD)} image tokens")
    D = embedding_VD.shape[1]
    rows_VC = codebook_VC - codebook_VC.mean(dim=0)
    rows_VC = rows_VC / rows_VC.square().mean().sqrt().clamp_min(1e-12)

    def projected(std: float) -> Tensor:
        return std * rows_VC @ torch.randn(C, D, device=rows_VC.device) / math.sqrt(C)

    own = math.sqrt(OWN_SHARE) * embedding_VD
    embedding_VD.copy_(math.sqrt(1 - OWN_SHARE) * projected(float(embedding_VD.std())) + own)
    head_VD.copy_(projected(1 / math.sqrt(D)))


class DALLE(StoredModel[DALLEConfig]):
    """The transformer: text ids and image tokens in, next-token logits out."""

    kind = KIND
    config_type = DALLEConfig

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__(config)
        self.activation_checkpointing = False
        """Recompute each layer in the backward pass rather than keep its activations."""
        d = config.d_model
        self.text_embedding = nn.Embedding(config.n_text_ids, d)
        self.text_position_embedding = nn.Embedding(config.text_len, d)
        self.image_embedding = nn.Embedding(n_image_ids(config.image_vocab), d)
        self.row_embedding = nn.Embedding(config.grid, d)
        self.column_embedding = nn.Embedding(config.grid, d)
        self.blocks = nn.ModuleList(Block(d, config.n_heads) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(d)
        self.text_head = Head(d, config.text_vocab)
        self.image_head = Head(d, config.image_vocab)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None, *, scale: float = 1.0) -> None:
        """Set all parameters anew, as the Sparse Transformer does (Child et al. 2019, §5.2 and §6).

        | parameter                                   | value                                               |
        |---------------------------------------------|-----------------------------------------------------|
        | text and image embeddings                   | N(0, 0.125 / √d)                                    |
        | text-position embedding                     | N(0, 0.125 / √d), one position embedding is added   |
        | row and column embeddings                   | N(0, 0.125 / √(2d)), two are added                  |
        | weights of qkv and of the MLP's first layer | N(0, 0.125 / √d_in)                                 |
        | weights that end a residual branch          | N(0, 0.125 / √d_in / √(2 · n_layers))               |
        | text and image heads                        | 0                                                   |
        | biases                                      | 0                                                   |
        | layer norms                                 | gain 1, bias 0                                      |

        The second number of N is the standard deviation. Uses torch's global generator unless one is given.

        Args:
            generator: of the random numbers.
            scale: factor of all standard deviations; above 0.

        Raises:
            ValueError: the scale is not a number above 0.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of the initialisation must be a number above 0, got {scale}")
        d = self.config.d_model

        def normal(weight: Tensor, std: float) -> None:
            nn.init.normal_(weight, std=scale * std, generator=generator)

        for embedding in (self.text_embedding, self.image_embedding, self.text_position_embedding):
            normal(embedding.weight, std=0.125 / math.sqrt(d))
        for embedding in (self.row_embedding, self.column_embedding):
            normal(embedding.weight, std=0.125 / math.sqrt(2 * d))
        for block in self._blocks():
            for linear in (block.attention.qkv, block.mlp.wide):
                normal(linear.weight, std=0.125 / math.sqrt(linear.in_features))
            for linear in (block.attention.out, block.mlp.out):
                normal(linear.weight, std=0.125 / math.sqrt(linear.in_features * 2 * self.config.n_layers))
            for linear in (block.attention.qkv, block.attention.out, block.mlp.wide, block.mlp.out):
                nn.init.zeros_(linear.bias)
            block.attention_norm.reset_parameters()
            block.mlp_norm.reset_parameters()
        self.final_norm.reset_parameters()
        nn.init.zeros_(self.text_head.weight)
        nn.init.zeros_(self.image_head.weight)

    @torch.no_grad()
    def initialise_from_codebook(self, codebook_VC: Tensor) -> None:
        """Give image tokens that look alike similar embeddings and heads: random projections of the dVAE's rows.

        Deviation: the paper's image embeddings are random. Here, what the model learns about a token also holds for
        similar ones, such as the same edge in another colour, so small models need fewer steps.

        Args:
            codebook_VC: float32, a row for each image token, in any units: `dvae.codebook`.

        Raises:
            ValueError: there are not as many rows as image tokens.
        """
        V = self.config.image_vocab
        # without start of image
        begin_from_codebook(codebook_VC, self.image_embedding.weight[:V], self.image_head.weight)

    def forward(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every position's next token.

        Args:
            text: int64 (B, T), text ids as `Tokenizer.text` makes them.
            image_tokens: int64 (B, I), raster order. The last one is not an input, only a target.

        Returns:
            Text logits, float32 (B, T, V_text): position t predicts the token of text position t+1. Image
            logits, float32 (B, I, V_image): position i predicts image token i.

        Raises:
            ValueError: for a wrong shape or dtype; on the CPU also for ids out of range.
        """
        h_BSD = self.states(text, image_tokens)
        T = self.config.text_len
        return self.text_head(h_BSD[:, :T]), self.image_head(h_BSD[:, T:])

    def states(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the input of the heads, (B, S, D), for `forward`'s arguments: the normalised final residual stream."""
        config = self.config
        check_ids("text", text, config.text_len, config.n_text_ids)
        check_ids("image_tokens", image_tokens, config.stream.n_image, config.image_vocab)
        if len(text) != len(image_tokens):
            raise ValueError(f"{len(text)} captions and {len(image_tokens)} images: expected one caption per image")
        h_BSD = self.embed(text, image_tokens)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block, kind in zip(self.blocks, config.kinds, strict=True):
            attend = self._attend(kind)
            h_BSD = checkpoint(block, h_BSD, attend, use_reentrant=False) if recompute else block(h_BSD, attend)
        output: Tensor = self.final_norm(h_BSD)
        return output

    def embed(self, text_BT: Tensor, tokens_BJ: Tensor) -> Tensor:
        """Return the residual stream of the text and of the first J image positions before the first layer.

        Args:
            text_BT: text ids.
            tokens_BJ: the first J image tokens; each is fed to the position after it.
        """
        inputs_BJ = image_inputs(tokens_BJ, self.config.image_vocab)
        return torch.cat([self.embed_text(text_BT), self.embed_image(inputs_BJ)], dim=1)

    def embed_text(self, text_BT: Tensor) -> Tensor:
        """Return the residual stream of the text positions before the first layer, (B, T, D)."""
        positions_T = torch.arange(self.config.text_len, device=text_BT.device)
        output: Tensor = self.text_embedding(text_BT) + self.text_position_embedding(positions_T)
        return output

    def embed_image(self, inputs_BJ: Tensor) -> Tensor:
        """Return the residual stream of the first J image positions before the first layer, (B, J, D).

        Args:
            inputs_BJ: image ids fed to these positions, see `stream.image_inputs`.
        """
        output: Tensor = self.image_embedding(inputs_BJ) + self.image_places()[: inputs_BJ.shape[1]]
        return output

    def image_places(self) -> Tensor:
        """Return the sum of row and column embedding of every image position, (I, D)."""
        stream, device = self.config.stream, self.device
        output: Tensor = self.row_embedding(stream.rows(device)) + self.column_embedding(stream.columns(device))
        return output

    def _attend(self, kind: Kind) -> Attend:
        """Return the attention of a kind of layer."""
        config = self.config
        return partial(
            sparse_attention, kind=kind, text_len=config.text_len, grid=config.grid, kernel=config.conv_kernel
        )

    def compile_layers(self, device: torch.device | None = None) -> None:
        """Compile every layer, for training: faster steps, after about a minute at the first one.

        `device` is the one that the model will run on, if it is not there yet. Other batch sizes, such as a smaller
        last batch or validation's, are compiled when they occur. Without a C++ compiler the layers stay as they are,
        and a warning says why.
        """
        device = device or self.device
        if not can_compile(device):
            return
        config = self.config
        prepare_compilation(config.kinds, config.text_len, config.grid, config.conv_kernel, device)
        for block in self._blocks():
            block.compile(dynamic=False)

    def mask(self, kind: Kind) -> Tensor:
        """Return the attention mask of a kind on this model's device, bool (S, S)."""
        config = self.config
        return stored_mask(kind, config.text_len, config.grid, config.conv_kernel, self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream's parameters."""
        return self.final_norm.weight.dtype

    def n_parameters(self) -> dict[str, int]:
        """Return the number of parameters by group: embeddings, attention, mlp, norms, heads; and "total"."""
        blocks = self._blocks()
        groups: dict[str, Iterable[nn.Module]] = {
            "embeddings": [module for module in self.children() if isinstance(module, nn.Embedding)],
            "attention": [block.attention for block in blocks],
            "mlp": [block.mlp for block in blocks],
            "norms": [self.final_norm, *(b.attention_norm for b in blocks), *(b.mlp_norm for b in blocks)],
            "heads": [self.text_head, self.image_head],
        }
        counts = {name: sum(map(n_weights, modules)) for name, modules in groups.items()}
        total = n_weights(self)
        assert sum(counts.values()) == total, "a parameter belongs to no group, or to two"
        return {**counts, "total": total}

    def _blocks(self) -> list[Block]:
        """Return the layers as Blocks: a ModuleList knows only Modules."""
        return [block for block in self.blocks if isinstance(block, Block)]
