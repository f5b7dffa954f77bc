"""DALL·E 2 (Ramesh et al. 2022): a prior from captions to embeddings of pictures, a decoder, upsamplers."""

from unclip.autoregressive.prior import AutoregressivePrior
from unclip.decoder import Decoder
from unclip.diffusion import Diffusion
from unclip.prior import Prior
from unclip.upsampler import Upsampler

__all__ = ["AutoregressivePrior", "Decoder", "Diffusion", "Prior", "Upsampler"]
