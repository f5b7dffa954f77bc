"""Counts the operations that the models' arithmetic needs, from the configuration alone.

A matrix product of m×k by k×n is 2·m·k·n. Attention is counted with the keys that the mask allows, twice (scores,
values). A backward pass has one product for the gradient of each factor, twice the forward pass; that of attention
has five products to the forward pass's two, since the scores, which nobody stores, are computed again. Softmax,
norms, activations and the optimizer count as nothing.
"""

from collections import Counter

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.attention import mask
from dalle.family.mini.config import MiniConfig
from dalle.family.transformers import TrainedConfig
from dalle.model import DALLEConfig
from dvae.model import DVAEConfig
from rerank.config import CLIPConfig
from unclip import Decoder, Prior, Upsampler
from unclip.conditions import Text


def attended(config: DALLEConfig) -> int:
    """Return the pairs of query and key that the masks allow, summed over the layers, of one sample."""
    return sum(
        n_layers * int(mask(kind, config.text_len, config.grid, config.conv_kernel).sum())
        for kind, n_layers in Counter(config.kinds).items()
    )


def block_weights(config: DALLEConfig) -> int:
    """Return the entries of the matrices of all layers: 12·D² each."""
    return config.n_layers * 12 * config.d_model**2


def linear_flops(config: DALLEConfig) -> int:
    """Return the operations of one sample's forward pass without attention: layers, and each position's head."""
    stream, d = config.stream, config.d_model
    heads = 2 * d * (config.text_len * config.text_vocab + stream.n_image * config.image_vocab)
    return 2 * block_weights(config) * stream.length + heads


def attention_flops(config: DALLEConfig) -> int:
    """Return the operations of one sample's attention in the forward pass: scores, and the weighted values."""
    return 2 * 2 * config.d_model * attended(config)


def training_flops(config: TrainedConfig) -> int:
    """Return the operations of one sample's forward and backward pass: 251 GFLOP for the benchmarks' shape."""
    if isinstance(config, MiniConfig):
        return round(_mini_flops(config))
    return 3 * linear_flops(config) + attention_flops(config) * 7 // 2


def flops_per_sample(config: TrainedConfig, n_block_parameters: int) -> float:
    """Return the floating-point operations of a training step per sample, forward and backward.

    6 for each weight of a matrix and position it is applied to: the blocks' at all S positions, the text head's at the
    text's, the image head's at the image's. Attention's own two products, computed for all S² pairs and masked, are
    4·S²·d per layer forward, 12·S²·d with the backward pass. That is how model FLOPs utilisation is usually counted;
    `training_flops` counts only the pairs that the masks allow.
    """
    if isinstance(config, MiniConfig):
        return _mini_flops(config)
    n_image = config.grid**2
    stream = config.text_len + n_image
    heads = config.d_model * (config.text_len * config.text_vocab + n_image * config.image_vocab)
    attention = 12.0 * config.n_layers * stream**2 * config.d_model
    return 6.0 * (n_block_parameters * stream + heads) + attention


def _mini_flops(config: MiniConfig) -> float:
    """Return the same of an encoder-decoder: its encoder works on the text's positions, its decoder on the image's."""
    T, I, D = config.text_len, config.stream.n_image, config.d_model  # noqa: E741  # the legend's letters
    glu = 3 * D * config.d_glu
    encoder = config.encoder_layers * (4 * D**2 + glu) * T
    decoder = config.decoder_layers * ((6 * D**2 + glu) * I + 2 * D**2 * T)
    attention = config.encoder_layers * T**2 + config.decoder_layers * (I**2 + I * T)
    return 6.0 * (encoder + decoder + D * config.image_vocab * I) + 12.0 * attention * D


def dvae_flops(config: DVAEConfig) -> int:
    """Return the operations of one picture's forward pass through a dVAE, encoder and decoder."""
    side, narrow = config.image_size**2, config.grid**2
    n_in, counted = config.n_hid, 7 * 7 * 3 * config.n_hid * side
    for group in range(config.n_groups):
        width, positions = config.n_hid * 2**group, side // 4**group
        for _ in range(config.n_blocks):
            first, others = _block_weights(n_in, width, (config.encoder_kernel,) * 3 + (1,))
            counted += positions * (first + others)
            n_in = width
    counted += narrow * (n_in * config.vocab_size + config.vocab_size * config.n_init)
    n_in = config.n_init
    for group in reversed(range(config.n_groups)):
        width, positions = config.n_hid * 2**group, side // 4**group
        for block in range(config.n_blocks):
            first, others = _block_weights(n_in, width, (1, 3, 3, 3))
            # a group's first layers are computed before the picture is enlarged: see `Block.forward_enlarged`
            is_before = block == 0 and group < config.n_groups - 1
            counted += (positions // 4 if is_before else positions) * first + positions * others
            n_in = width
    return 2 * (counted + side * n_in * 6)


def _block_weights(n_in: int, n_out: int, kernels: tuple[int, int, int, int]) -> tuple[int, int]:
    """Return a dVAE block's weights: of its first convolution and the skip path, and of the other three."""
    skip = n_in * n_out if n_in != n_out else 0
    hidden = n_out // 4
    first, second, third, last = (kernel**2 for kernel in kernels)
    return first * n_in * hidden + skip, (second + third) * hidden**2 + last * hidden * n_out


def clip_flops(config: CLIPConfig, captions: int = 1) -> int:
    """Return the operations of one pair's forward pass through CLIP's towers; attention between all positions.

    Args:
        config: the model.
        captions: captions that the text tower reads for each picture, wrong ones and paraphrases included.
    """
    pixels = config.n_patches * 3 * config.patch_size**2 * config.vision_width
    towers = (
        (config.vision_layers, config.n_patches + 1, config.vision_width),
        (config.text_layers * captions, config.context_length, config.text_width),
    )
    layers = sum(n * (12 * length * width**2 + 2 * length**2 * width) for n, length, width in towers)
    projections = (config.vision_width + config.text_width) * config.embed_dim
    return 2 * (pixels + layers + projections)


def decoder_flops(decoder: Decoder) -> int:
    """Return the operations of a picture's pass through DALL·E 2's decoder, on the meta device, conditions included."""
    config = decoder.config
    text = _any_text(config.embed_dim, config.text_len, config.text_width)
    x = torch.empty(1, config.channels, config.image_size, config.image_size, device="meta")
    return _counted(decoder, x, torch.zeros(1, device="meta"), text.features, text)


def prior_flops(prior: Prior) -> int:
    """Return the operations of an embedding's pass through DALL·E 2's prior, on the meta device."""
    config = prior.config
    text = _any_text(config.embed_dim, config.text_len, config.text_width)
    return _counted(prior, text.features, torch.zeros(1, device="meta"), text)


def upsampler_flops(upsampler: Upsampler) -> int:
    """Return the operations of a crop's pass through one of DALL·E 2's upsamplers, on the meta device."""
    x = torch.empty(1, 3, upsampler.config.crop, upsampler.config.crop, device="meta")
    return _counted(upsampler, x, torch.zeros(1, device="meta"), x)


def _any_text(embed_dim: int, text_len: int, text_width: int) -> Text:
    seen = torch.ones(1, text_len, dtype=torch.bool, device="meta")
    states = torch.empty(1, text_len, text_width, device="meta")
    return Text(torch.empty(1, embed_dim, device="meta"), states, seen)


def _counted(model: nn.Module, *inputs: object) -> int:
    """Return the operations of a forward pass on the meta device, as torch counts those of products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return int(counter.get_total_flops())
