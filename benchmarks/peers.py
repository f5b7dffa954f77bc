"""The peers: DALLE-pytorch 1.6.6 and OpenAI's DALL-E 0.1 as published, and a static-cache decoder written out.

The packages are those of benchmarks/peers.txt, which `make bench` installs into the folder `peers` of the virtual
environment.

Legend: N candidates  T text positions  S stream  D width  H heads  K head dim  V vocabulary
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.family.blocks import Block
from dalle.model import DALLE, DALLEConfig
from dvae import DVAE

FOLDER = Path(sys.prefix) / "peers"

STAND_INS = (
    "requests",
    "omegaconf",
    "pkg_resources",
    "taming",
    "taming.models",
    "taming.models.vqgan",
    "transformers",
    "youtokentome",
)
"""What the peers import at the top and use only for what is not measured: downloads, VQGAN, and other people's
tokenizers.

Some are gone from the index or no longer install, and others would bring torchvision. What is measured is all theirs.
"""


class _StandIn(types.ModuleType):
    """An empty module, every name of which is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let imports inside find the stand-ins where a package is missing. Afterwards nobody else must meet them."""
    missing = [name for name in STAND_INS if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in missing})
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in missing:
            del sys.modules[name]


def package(name: str) -> Any:
    """Import a peer.

    Raises:
        FileNotFoundError: it is not installed.
    """
    with _stand_ins():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"{error.name} is missing; expected benchmarks/peers.txt installed in {FOLDER}, as `make bench` does"
            ) from error


# ------------------------------------------------------------------------------------------------ DALLE-pytorch

SPARSE_TYPES = ("full", "axial_row", "axial_col", "conv_like")
"""All of DALLE-pytorch's attention types that run; its layers cycle through them. Its own default is full attention."""


def dalle_pytorch(config: DALLEConfig, attn_types: tuple[str, ...] = ("full",)) -> Any:
    """Return DALLE-pytorch's DALLE of our shape, with its defaults otherwise: GEGLU, rotary positions, shifted tokens.

    Its dVAE is an empty one: it is asked for nothing but its sizes and, by `one_token`, for tokens to begin with.
    """
    package_ = package("dalle_pytorch")

    class GivenTokens(package_.DiscreteVAE):  # type: ignore[misc,name-defined]  # it takes only its own classes
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_layers, self.channels = 3, 3
            self.image_size = config.grid * 2**self.num_layers
            self.num_tokens = config.image_vocab

        def get_codebook_indices(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), config.grid**2, dtype=torch.int64)

        def decode(self, tokens: Tensor) -> Tensor:
            return tokens

    return package_.DALLE(
        dim=config.d_model,
        vae=GivenTokens(),
        num_text_tokens=config.text_vocab,
        text_seq_len=config.text_len,
        depth=config.n_layers,
        heads=config.n_heads,
        dim_head=config.d_head,
        attn_types=attn_types,
    )


def one_token(model: Any, text: Tensor, position: int) -> None:
    """Have DALLE-pytorch's `generate_images`, as shipped, sample the token at one position.

    It begins with `position` given tokens, and is told that a picture has one token more: one turn of its loop.

    Args:
        model: of `dalle_pytorch`.
        text: int64 (N, T).
        position: how many image tokens are there already.
    """
    side = model.vae.image_size
    model.image_seq_len, whole = position + 1, model.image_seq_len
    try:
        picture = torch.zeros(1, 3, 1, 1).expand(len(text), 3, side, side)
        tokens = model.generate_images(text, img=picture, num_init_img_tokens=position)
    finally:
        model.image_seq_len = whole
    assert tokens.shape == (len(text), position + 1)


# ------------------------------------------------------------------------------------------------ OpenAI's DALL-E


def openai_dvae(dvae: DVAE) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return OpenAI's encode and decode, as its notebook uses the package, with the weights of one of our paper-size
    dVAEs.

    Returns:
        pictures (B,3,H,W) in [0, 1] -> tokens (B,H/8,W/8), and tokens -> pictures.
    """
    dall_e = package("dall_e")
    config = dvae.config
    sizes = {"n_hid": config.n_hid, "n_blk_per_group": config.n_blocks, "vocab_size": config.vocab_size}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(**sizes, n_init=config.n_init)
    for theirs, ours in ((encoder, dvae.encoder), (decoder, dvae.decoder)):
        renamed = {name.replace(".weight", ".w").replace(".bias", ".b"): w for name, w in ours.state_dict().items()}
        theirs.load_state_dict(renamed)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        tokens: Tensor = torch.argmax(encoder(dall_e.map_pixels(images)), dim=1)
        return tokens

    @torch.no_grad()
    def decode(tokens: Tensor) -> Tensor:
        one_hot = F.one_hot(tokens, num_classes=config.vocab_size).permute(0, 3, 1, 2).float()
        pictures: Tensor = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot).float()[:, :3]))
        return pictures

    return encode, decode


# ------------------------------------------------------------------------------------------------ static cache


class StaticCache:
    """A decoder with a preallocated cache of all S positions for each of N candidates, as LlamaGen's.

    The caption is read N times and kept N times, every step attends to the whole cache through a row of the causal
    mask, and positions are tensors, so that a compiled step is compiled once. Written from a description of LlamaGen
    (FoundationVision/LlamaGen at 5a50452, autoregressive/models), for the weights of one of our models with dense
    attention.

    LlamaGen, like gpt-fast, repeats the heads of keys and values for the queries that share them, once where none
    does: a copy of the whole cache in each step. `lean` reads it where it is: the same decoder at its best.

    Args:
        model: a DALLE with `attention="dense"`.
        text: int64 (N, T): the caption, N times.
        lean: read the cache where it is.
        compiled: compile the step, as LlamaGen can.
    """

    def __init__(self, model: DALLE, text: Tensor, *, lean: bool = False, compiled: bool = False) -> None:
        config, n = model.config, len(text)
        self.model = model
        self.lean = lean
        size = (n, config.n_heads, config.stream.length, config.d_head)
        self.keys = [torch.zeros(size, dtype=model.dtype) for _ in config.kinds]
        self.values = [torch.zeros(size, dtype=model.dtype) for _ in config.kinds]
        self.mask_SS = torch.ones(size[2], size[2], dtype=torch.bool).tril_()
        self._step = torch.compile(self._forward, fullgraph=True, dynamic=False) if compiled else self._forward
        with torch.inference_mode():
            self._run(model.embed_text(text), torch.arange(config.text_len))

    def bytes_per_candidate(self) -> int:
        """Return the bytes of one candidate's part of the cache."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    @torch.inference_mode()
    def step(self, inputs: Tensor, position: int) -> Tensor:
        """Return the logits of the image token at a position.

        Args:
            inputs: int64 (N,), the token before it, or start of image.
            position: of the image token, from 0.
        """
        return self._step(inputs, torch.tensor([position]))

    def _forward(self, inputs_N: Tensor, position_1: Tensor) -> Tensor:
        model, config = self.model, self.model.config
        row_1D = model.row_embedding(position_1 // config.grid)
        column_1D = model.column_embedding(position_1 % config.grid)
        h_N1D = (model.image_embedding(inputs_N) + row_1D + column_1D)[:, None]
        return self._run(h_N1D, position_1 + config.text_len)

    def _run(self, h_NPD: Tensor, positions_P: Tensor) -> Tensor:
        """Run the layers on some positions, writing the cache; return the last one's image logits, (N, V)."""
        model, mask_PS = self.model, self.mask_SS[positions_P]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            qkv = block.attention.qkv(block.attention_norm(h_NPD)).unflatten(-1, (3, model.config.n_heads, -1))
            q_NHPK, k_NHPK, v_NHPK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            k_NHSK = self.keys[layer].index_copy_(2, positions_P, k_NHPK)
            v_NHSK = self.values[layer].index_copy_(2, positions_P, v_NHPK)
            if not self.lean:
                k_NHSK, v_NHSK = k_NHSK.repeat_interleave(1, dim=1), v_NHSK.repeat_interleave(1, dim=1)
            mixed_NHPK = F.scaled_dot_product_attention(q_NHPK, k_NHSK, v_NHSK, attn_mask=mask_PS)
            h_NPD = h_NPD + block.attention.out(mixed_NHPK.transpose(1, 2).flatten(2))
            h_NPD = h_NPD + block.mlp(block.mlp_norm(h_NPD))
        logits: Tensor = model.image_head(model.final_norm(h_NPD[:, -1]))
        return logits


def multinomial(logits: Tensor) -> Tensor:
    """Return one token per row, int64 (N,), drawn as such decoders do: softmax, then torch's multinomial."""
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
