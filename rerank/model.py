"""CLIP: an image tower and a text tower whose unit features agree for a picture and its caption.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", §2.4,
§2.5, figure 3; sizes and initialisation of the published ViT-B/32 (https://github.com/openai/CLIP). Unusual:

- QuickGELU, x · sigmoid(1.702 x), in place of GELU, which others' CLIPs have;
- the image feature is read at a class token, with a LayerNorm before and after the transformer;
- the text tower is causal and its feature is read at end-of-text, the highest id of the row;
- LayerNorm computes in float32 whatever the weights are; both features leave in float32 with unit length;
- resizing, cropping and normalising the pixels is part of `encode_image`;
- five of the published image towers are ResNets, `rerank/resnet.py`.

Letters: B batch  C channels  P patches  S positions (P+1 image, L text)  L text positions  D width
         E features shared by both towers
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rerank.blocks import Attention, Block, LayerNorm
from rerank.config import CLIPConfig
from rerank.pixels import check_images, normalised_pixels
from rerank.resnet import ResNetTower
from rerank.tokenizer import CLIPTokenizer
from storage.models.directory import TOKENIZER_FILE, load_directory, load_weights, save_directory

KIND = "clip"
TOKENIZER_HASH = "tokenizer_sha256"
INITIAL_TEMPERATURE = 0.07
MAX_LOGIT_SCALE = 100.0


class VisionTower(nn.Module):
    """Vision transformer; the feature is read at the class token, which is position 0."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, heads, patch = config.vision_width, config.vision_heads, config.patch_size
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(config.n_patches + 1, width))
        self.norm_pre = LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, is_causal=False, mlp=config.vision_mlp, activation=config.activation)
            for _ in range(config.vision_layers)
        )
        self.norm_post = LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, E), not yet of unit length, of normalised pixels (B, 3, image_size, image_size)."""
        patches_BPD = self.patches(pixels_BCHW.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(patches_BPD), 1, -1)
        h_BSD = self.norm_pre(torch.cat([class_B1D, patches_BPD], dim=1) + self.position_embedding)
        for block in self.blocks:
            h_BSD = block(h_BSD)
        output: Tensor = self.projection(self.norm_post(h_BSD[:, 0]))
        return output


class TextTower(nn.Module):
    """Causal transformer; the feature is read at the first end-of-text, so what follows it has no effect."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, heads = config.text_width, config.text_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, is_causal=True, mlp=config.text_mlp, activation=config.activation)
            for _ in range(config.text_layers)
        )
        self.norm_final = LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return features (B, E), not yet of unit length, of text ids (B, L)."""
        return self.features(self.hidden(ids_BL), ids_BL)

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """Return what the blocks make of text ids, (B, L, D), before the last LayerNorm."""
        h_BSD: Tensor = self.token_embedding(ids_BL) + self.position_embedding[: ids_BL.shape[1]]
        for block in self.blocks:
            h_BSD = block(h_BSD)
        return h_BSD

    def features(self, h_BSD: Tensor, ids_BL: Tensor) -> Tensor:
        """Return features (B, E), not yet of unit length, of what `hidden` returns."""
        # argmax gives the first of equals, and end-of-text is the highest id
        end_B = ids_BL.argmax(dim=1)
        h_BD = h_BSD[torch.arange(len(ids_BL), device=ids_BL.device), end_B]
        output: Tensor = self.projection(self.norm_final(h_BD))
        return output


class TextStates(NamedTuple):
    """What the text tower makes of captions, at every position."""

    features: Tensor
    """float32 (B, E)."""
    states: Tensor
    """float32 (B, L, D), after the last LayerNorm."""
    mask: Tensor
    """bool (B, L), True up to the end-of-text."""


class CLIP(nn.Module):
    """Both towers, the learned logit scale, and the tokenizer that makes the text tower's ids.

    Args:
        config: the sizes.
        tokenizer: has exactly config.vocab_size ids. Without one the model computes features of ids and
            trains, but cannot be saved and cannot read captions.

    Raises:
        ValueError: tokenizer and config disagree on the vocabulary.
    """

    def __init__(self, config: CLIPConfig, tokenizer: CLIPTokenizer | None = None) -> None:
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids but vocab_size is {config.vocab_size}: "
                "set vocab_size to the tokenizer's"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.vision: VisionTower | ResNetTower = ResNetTower(config) if config.resnet else VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.initialise()

    @torch.no_grad()
    def initialise(self, *, embedding_scale: float = 1.0) -> None:
        """Draw the weights from torch's global generator. w: width and n: layers of the tower.

        A ResNet's weights stay as its layers drew them.

        =============================================  ==========================================
        text token embedding                           normal, std 0.02 · embedding_scale
        text position embedding                        normal, std 0.01 · embedding_scale
        image class and position embedding             normal, std w^-½ · embedding_scale
        both projections                               normal, std w^-½
        text attention: query, key, value              normal, std w^-½
        text attention out, second MLP matrix          normal, std w^-½ (2n)^-½
        text first MLP matrix                          normal, std (2w)^-½
        image attention: query, key, value             Xavier uniform over the joint (3w, w) matrix
        biases of attention, both towers               0
        logit scale                                    ln(1 / 0.07)
        everything else                                as PyTorch's layers
        =============================================  ==========================================

        Args:
            embedding_scale: above 0; 1 as published. With 8, small towers learn the order of words many times sooner:
                with 1, the first block's attention, an average over the caption, drowns the words themselves.

        Raises:
            ValueError: embedding_scale is not a number above 0.
        """
        if not 0 < embedding_scale < math.inf:
            raise ValueError(f"embedding_scale must be a number above 0, got {embedding_scale}")
        config = self.config
        vision_std = embedding_scale * config.vision_width**-0.5
        nn.init.normal_(self.text.token_embedding.weight, std=embedding_scale * 0.02)
        nn.init.normal_(self.text.position_embedding, std=embedding_scale * 0.01)
        if isinstance(self.vision, VisionTower):
            nn.init.normal_(self.vision.class_embedding, std=vision_std)
            nn.init.normal_(self.vision.position_embedding, std=vision_std)
            nn.init.normal_(self.vision.projection.weight, std=config.vision_width**-0.5)
        nn.init.normal_(self.text.projection.weight, std=config.text_width**-0.5)
        residual_std = config.text_width**-0.5 * (2 * config.text_layers) ** -0.5
        for module in self.text.modules():
            if isinstance(module, Block):
                nn.init.normal_(module.attention.qkv.weight, std=config.text_width**-0.5)
                nn.init.normal_(module.attention.out.weight, std=residual_std)
                nn.init.normal_(module.mlp_in.weight, std=(2 * config.text_width) ** -0.5)
                nn.init.normal_(module.mlp_out.weight, std=residual_std)
        for module in self.vision.modules():
            if isinstance(module, Attention):
                nn.init.xavier_uniform_(module.qkv.weight)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.qkv.bias)
                nn.init.zeros_(module.out.bias)
        self.logit_scale.fill_(math.log(1 / INITIAL_TEMPERATURE))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.logit_scale.device

    def encode_image(self, images: Tensor, *, normalise: bool = True) -> Tensor:
        """Return unit features of images.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB, any size: `normalised_pixels` resizes and crops.
            normalise: False for features as the tower gives them, which some models of others read.

        Returns:
            float32 (B, E), each row of length 1 if normalised.

        Raises:
            ValueError: images of another rank, number of channels or dtype; on the CPU also of another range.
        """
        check_images(images)
        features_BE: Tensor = self.vision(normalised_pixels(images, self.config.view)).float()
        return F.normalize(features_BE, dim=-1) if normalise else features_BE

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return unit features of captions.

        Args:
            ids: int64 (B, L) from `CLIPTokenizer.tokenize`, L ≤ context_length, each row with an end-of-text.

        Returns:
            float32 (B, E), each row of length 1.

        Raises:
            ValueError: ids of another rank or dtype, or too many; on the CPU also such that are no ids of a caption.
        """
        _check_ids(ids, self.config)
        return F.normalize(self.text(ids).float(), dim=-1)

    def text_states(self, ids: Tensor, *, normalise: bool = True) -> TextStates:
        """Return the features of captions, as `encode_text` does, and the text tower's states at every position.

        Args:
            ids: as for `encode_text`.
            normalise: False for features as the tower gives them.

        Raises:
            ValueError: see `encode_text`.
        """
        _check_ids(ids, self.config)
        h_BLD = self.text.hidden(ids)
        features_BE = self.text.features(h_BLD, ids).float()
        mask_BL = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(dim=1, keepdim=True)
        states_BLD = self.text.norm_final(h_BLD).float()
        return TextStates(F.normalize(features_BE, dim=-1) if normalise else features_BE, states_BLD, mask_BL)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit features of images and captions, and the factor of their cosines, for `contrastive_loss`.

        Args:
            images: as for `encode_image`.
            ids: as for `encode_text`.

        Returns:
            image features (B, E), text features (B, E), exp_logit_scale (); all float32.
        """
        return self.encode_image(images), self.encode_text(ids), self.exp_logit_scale()

    def exp_logit_scale(self) -> Tensor:
        """Return the factor that turns a cosine into a logit, clipped to at most 100 (§2.5); float32 scalar.

        Clipping here, not the stored parameter, holds for any optimizer, also with float32 copies of half-precision
        weights. Above the limit, a gradient that would raise the parameter is dropped and one that would lower it
        passes, so it does not get stuck as under a clamp.
        """
        log_scale = self.logit_scale.float()
        limit = math.log(MAX_LOGIT_SCALE)
        clipped = log_scale + (log_scale.clamp(max=limit) - log_scale).detach()
        if clipped.requires_grad:
            is_over = log_scale.detach() >= limit
            clipped.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: torch.where(is_over, gradient.clamp(min=0), gradient)
            )
        return clipped.exp()

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write config, weights, tokenizer and the metadata with the tokenizer's sha256 to a model directory.

        Raises:
            ValueError: there is no tokenizer, without which the directory could not score a caption.
        """
        if self.tokenizer is None:
            raise ValueError(f"no tokenizer to save in {path} with this CLIP: use CLIP(config, tokenizer)")
        text = self.tokenizer.to_json().encode()
        save_directory(
            path,
            KIND,
            self.config,
            self.state_dict(),
            metadata={**(metadata or {}), TOKENIZER_HASH: hashlib.sha256(text).hexdigest()},
            files={TOKENIZER_FILE: text},
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a directory written by `save`, onto the CPU, for use (in evaluation mode).

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            ValueError: it holds something else, is damaged, or its tokenizer is not the one saved with it.
        """
        config, state, metadata = load_directory(path, KIND, CLIPConfig)
        tokenizer_file = Path(path) / TOKENIZER_FILE
        tokenizer = CLIPTokenizer.load(tokenizer_file)
        # with other ids the model would load and every score would be noise
        if hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() != metadata.get(TOKENIZER_HASH):
            raise ValueError(
                f"{tokenizer_file} is not the tokenizer that was saved with this CLIP "
                f"({TOKENIZER_HASH} in config.json): copy or save the directory again"
            )
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"{path} holds a tokenizer of {tokenizer.vocab_size} ids, and its config.json says vocab_size "
                f"{config.vocab_size}: copy or save the directory again"
            )
        with torch.device("meta"):
            clip = cls(config, tokenizer)
        load_weights(clip, state, path)
        return clip.eval()


def _check_ids(ids: Tensor, config: CLIPConfig) -> None:
    longest = config.context_length
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0 or ids.shape[1] > longest:
        raise ValueError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)}; expected int64 (B, L) with L at most {longest}"
        )
    end_id = config.vocab_size - 1
    if ids.device.type == "cpu" and not ((ids.amax(dim=1) == end_id).all() and (ids >= 0).all()):  # a GPU would wait
        raise ValueError(
            f"every row of ids must hold an end-of-text ({end_id}) and otherwise ids from 0 to {end_id - 1}; "
            "got a row that does not: make rows with this model's tokenizer (CLIPTokenizer.tokenize)"
        )
