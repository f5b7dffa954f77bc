"""The discrete VAE of DALL·E: pictures to tokens and back."""

from dvae.model import DVAE, DVAEConfig

__all__ = ["DVAE", "DVAEConfig"]
