"""DALL·E mini and mega: a BART-like encoder reads the caption, a decoder predicts image tokens and attends to it.

As borisdayma/dalle-mini at f0be4de computes it, src/dalle_mini/model/modeling.py, with the options of its two published
models:

- Embeddings of tokens and of positions are added and normalised.
- Encoder: h += norm(attention(norm(h))); h += glu(h). Decoder: the same with causal attention, and between the two
  h += norm(attention to the encoder's output(norm(h))). Then a final norm, and the head.
- glu(x) = W₂ norm(gelu(W₀ x̂) · W₁ x̂) of x̂ = norm(x), with the exact GELU.
- No matrix has a bias. Norms that come before a matrix have a bias and no scale.
- No position attends to a pad of the caption.

Image position i is fed image token i-1 (position 0: start of image) and predicts image token i.

Legend: B batch  T text positions  I image positions  J some image positions  S either  D width  H heads  K head dim
        G width of the GLU  V image vocabulary
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle.cross_entropy import Head, linear_cross_entropy
from dalle.family.mini.config import MiniConfig
from dalle.model import begin_from_codebook
from dalle.stream import check_ids
from dvae.compilation import can_compile
from storage.models.stored import StoredModel, n_weights

KIND = "dalle-mini"
"""Kind of the model's directory, in its config.json."""
EPS = 1e-5
"""Of all norms."""
INIT_STD = 0.02
"""Standard deviation of all first weights."""


class Norm(nn.Module):
    """LayerNorm with a bias, and a scale only where it has one."""

    def __init__(self, d: int, *, has_scale: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d)) if has_scale else None
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for (..., D)."""
        return F.layer_norm(x, self.bias.shape, self.weight, self.bias, EPS)

    def reset_parameters(self) -> None:
        """Set scale 1 and bias 0."""
        nn.init.zeros_(self.bias)
        if self.weight is not None:
            nn.init.ones_(self.weight)


def _linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def heads(x: Tensor, n_heads: int, parts: int) -> tuple[Tensor, ...]:
    """Split (B, S, parts · D) into that many of (B, H, S, K)."""
    B, S, _ = x.shape
    return tuple(x.view(B, S, parts, n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0))


def joined(x_BHSK: Tensor) -> Tensor:
    """Return what the heads found side by side, (B, S, D)."""
    return x_BHSK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of positions to one another."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv = _linear(d, 3 * d)
        self.out = _linear(d, d)


class CrossAttention(nn.Module):
    """Attention of image positions to the caption's."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = _linear(d, d)
        self.key_value = _linear(d, 2 * d)
        self.out = _linear(d, d)


class GLU(nn.Module):
    """A gated layer, normalised before and within."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.norm = Norm(config.d_model, has_scale=config.norm_scales)
        self.wide = _linear(config.d_model, 2 * config.d_glu)
        """The gate's rows, then the others."""
        self.middle_norm = Norm(config.d_glu, has_scale=config.norm_scales)
        self.out = _linear(config.d_glu, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the branch, (B, S, D)."""
        gate_BSG, x_BSG = self.wide(self.norm(x_BSD)).chunk(2, dim=-1)
        output: Tensor = self.out(self.middle_norm(F.gelu(gate_BSG) * x_BSG))
        return output


class EncoderBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.attention_norm = Norm(config.d_model, has_scale=config.norm_scales)
        self.attention = SelfAttention(config.d_model)
        self.attention_out_norm = Norm(config.d_model, has_scale=True)
        self.glu = GLU(config)

    def forward(self, h_BTD: Tensor, is_text_B11T: Tensor) -> Tensor:
        """Return the residual stream after this layer, (B, T, D)."""
        q, k, v = heads(self.attention.qkv(self.attention_norm(h_BTD)), self.n_heads, 3)
        found_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=is_text_B11T)
        h_BTD = h_BTD + self.attention_out_norm(self.attention.out(joined(found_BHTK)))
        output: Tensor = h_BTD + self.glu(h_BTD)
        return output


class DecoderBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.attention_norm = Norm(config.d_model, has_scale=config.norm_scales)
        self.attention = SelfAttention(config.d_model)
        self.attention_out_norm = Norm(config.d_model, has_scale=True)
        self.cross_norm = Norm(config.d_model, has_scale=config.norm_scales)
        self.cross = CrossAttention(config.d_model)
        self.cross_out_norm = Norm(config.d_model, has_scale=True)
        self.glu = GLU(config)

    def forward(self, h_BJD: Tensor, encoded_BTD: Tensor, is_text_B11T: Tensor) -> Tensor:
        """Return the residual stream after this layer, (B, J, D)."""
        q, k, v = self.own(h_BJD)
        h_BJD = self.with_own(h_BJD, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        q = self.asked(h_BJD)
        k, v = self.told(encoded_BTD)
        return self.with_told(h_BJD, F.scaled_dot_product_attention(q, k, v, attn_mask=is_text_B11T))

    def own(self, h_BJD: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values of image positions among themselves, (B, H, J, K) each."""
        return heads(self.attention.qkv(self.attention_norm(h_BJD)), self.n_heads, 3)

    def with_own(self, h_BJD: Tensor, found_BHJK: Tensor) -> Tensor:
        """Add what was found among the image positions, (B, J, D)."""
        output: Tensor = h_BJD + self.attention_out_norm(self.attention.out(joined(found_BHJK)))
        return output

    def asked(self, h_BJD: Tensor) -> Tensor:
        """Return the queries to the caption, (B, H, J, K)."""
        return heads(self.cross.query(self.cross_norm(h_BJD)), self.n_heads, 1)[0]

    def told(self, encoded_BTD: Tensor) -> tuple[Tensor, ...]:
        """Return the caption's keys and values, (B, H, T, K) each."""
        return heads(self.cross.key_value(encoded_BTD), self.n_heads, 2)

    def with_told(self, h_BJD: Tensor, found_BHJK: Tensor) -> Tensor:
        """Add what was found in the caption, and the gated layer: the residual stream after this layer, (B, J, D)."""
        h_BJD = h_BJD + self.cross_out_norm(self.cross.out(joined(found_BHJK)))
        output: Tensor = h_BJD + self.glu(h_BJD)
        return output


class ImageHead(Head):
    """The head, of whose rows only those of image tokens are used."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config.d_model, config.n_image_ids)
        self.vocab = config.image_vocab

    def used(self) -> Tensor:
        """Return the rows of image tokens, (V, D)."""
        return self.weight[: self.vocab]

    def forward(  # type: ignore[override]  # as Head
        self, h_BID: Tensor, targets_BI: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, float32 (B, I, V), or given targets their cross entropies: the sum, and each, (B, I)."""
        if targets_BI is not None:
            total, losses_N = linear_cross_entropy(h_BID.flatten(0, 1), self.used(), targets_BI.flatten())
            return total, losses_N.view(targets_BI.shape)
        with torch.autocast(h_BID.device.type, enabled=False):
            return F.linear(h_BID.float(), self.used().float())


class Encoder(nn.Module):
    """Reads captions."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.pad = config.pad
        self.embedding = nn.Embedding(config.n_text_ids, config.d_model)
        self.position_embedding = nn.Embedding(config.text_len, config.d_model)
        self.embedding_norm = Norm(config.d_model, has_scale=True)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.final_norm = Norm(config.d_model, has_scale=config.norm_scales)

    def forward(self, text_BT: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """Return the encoded captions, (B, T, D), and where they are text, bool (B, 1, 1, T)."""
        is_text_B11T = (text_BT != self.pad)[:, None, None]
        places_T = torch.arange(text_BT.shape[1], device=text_BT.device)
        h_BTD = self.embedding_norm(self.embedding(text_BT) + self.position_embedding(places_T))
        for block in self.blocks:
            h_BTD = _run(block, recompute, h_BTD, is_text_B11T)
        return self.final_norm(h_BTD), is_text_B11T


class ImageDecoder(nn.Module):
    """Predicts image tokens."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_image_ids, config.d_model)
        self.position_embedding = nn.Embedding(config.stream.n_image, config.d_model)
        self.embedding_norm = Norm(config.d_model, has_scale=True)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.final_norm = Norm(config.d_model, has_scale=config.norm_scales)
        self.head = ImageHead(config)

    def embed(self, inputs_BJ: Tensor) -> Tensor:
        """Return the residual stream of the first J positions before the first layer, (B, J, D)."""
        places_J = torch.arange(inputs_BJ.shape[1], device=inputs_BJ.device)
        output: Tensor = self.embedding_norm(self.embedding(inputs_BJ) + self.position_embedding(places_J))
        return output

    def layers(self) -> list[DecoderBlock]:
        """Return the layers as DecoderBlocks: a ModuleList knows only Modules."""
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]


def _run(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
    return output


class DALLEMini(StoredModel[MiniConfig]):
    """The model: text ids and image tokens in, logits of image tokens out."""

    kind = KIND
    config_type = MiniConfig

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        self.activation_checkpointing = False
        """Recompute each layer in the backward pass rather than keep its activations."""
        self.encoder = Encoder(config)
        self.decoder = ImageDecoder(config)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None, *, scale: float = 1.0) -> None:
        """Set all parameters anew: matrices and embeddings N(0, 0.02), norms to scale 1 and bias 0.

        Args:
            generator: of the random numbers; torch's global one by default.
            scale: factor of the standard deviation; above 0.

        Raises:
            ValueError: the scale is not a number above 0.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of the initialisation must be a number above 0, got {scale}")
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=scale * INIT_STD, generator=generator)
            elif isinstance(module, Norm):
                module.reset_parameters()

    @torch.no_grad()
    def initialise_from_codebook(self, codebook_VC: Tensor) -> None:
        """Give image tokens that look alike similar embeddings and heads; as `DALLE.initialise_from_codebook`."""
        begin_from_codebook(codebook_VC, self.image_embedding.weight[: self.config.image_vocab], self.image_head.used())

    def forward(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the logits of every image token.

        Args:
            text: int64 (B, T), text ids as `MiniConfig.text_rows` makes them.
            image_tokens: int64 (B, I), raster order. The last one is not an input, only a target.

        Returns:
            float32 (B, I, V).

        Raises:
            ValueError: for a wrong shape or dtype; on the CPU also for ids out of range.
        """
        logits_BIV: Tensor = self.decoder.head(self.states(text, image_tokens))
        return logits_BIV

    def states(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the input of the head, (B, I, D), for `forward`'s arguments."""
        config = self.config
        check_ids("text", text, config.text_len, config.n_text_ids)
        check_ids("image_tokens", image_tokens, config.stream.n_image, config.image_vocab)
        if len(text) != len(image_tokens):
            raise ValueError(f"{len(text)} captions and {len(image_tokens)} images: expected one caption per image")
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        encoded_BTD, is_text_B11T = self.encoder(text, recompute=recompute)
        h_BID = self.decoder.embed(self.inputs(image_tokens))
        for block in self.decoder.blocks:
            h_BID = _run(block, recompute, h_BID, encoded_BTD, is_text_B11T)
        output: Tensor = self.decoder.final_norm(h_BID)
        return output

    def inputs(self, image_tokens_Bm: Tensor) -> Tensor:
        """Return what the first m image positions are fed, int64 (B, m): start of image, then the tokens before."""
        shifted_Bm = F.pad(image_tokens_Bm, (1, 0), value=self.config.start_of_image)
        return shifted_Bm[:, : image_tokens_Bm.shape[1]]

    def compile_layers(self, device: torch.device | None = None) -> None:
        """Compile every layer, for training, if that works on the device."""
        if can_compile(device or self.device):
            for block in [*self.encoder.blocks, *self.decoder.blocks]:
                block.compile(dynamic=False)

    @property
    def image_embedding(self) -> nn.Embedding:
        """Of image tokens, with start of image behind them."""
        return self.decoder.embedding

    @property
    def image_head(self) -> ImageHead:
        """Of image tokens, with rows behind them that are not used."""
        return self.decoder.head

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.decoder.final_norm.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream's parameters."""
        return self.decoder.final_norm.bias.dtype

    def n_parameters(self) -> dict[str, int]:
        """Return the number of parameters by group: embeddings, attention, mlp, norms, heads; and "total"."""
        encoder, decoder = self.encoder, self.decoder
        blocks = [*encoder.blocks, *decoder.blocks]
        inner = [module for block in blocks for module in block.modules()]
        embeddings = (encoder.embedding, encoder.position_embedding, decoder.embedding, decoder.position_embedding)
        groups: dict[str, Iterable[nn.Module]] = {
            "embeddings": embeddings,
            "attention": [m for m in inner if isinstance(m, SelfAttention | CrossAttention)],
            "mlp": [linear for m in inner if isinstance(m, GLU) for linear in (m.wide, m.out)],
            "norms": [module for module in self.modules() if isinstance(module, Norm)],
            "heads": [decoder.head],
        }
        counts = {name: sum(map(n_weights, modules)) for name, modules in groups.items()}
        total = n_weights(self)
        assert sum(counts.values()) == total, "a parameter belongs to no group, or to two"
        return {**counts, "total": total}
