"""How DALL·E 2 draws: steps, guidance, and the samplers.

The paper draws embeddings in 64 steps, pictures in 250 by DDPM, and enlarges them in 27 and 15 by DDIM (Ramesh et al.
2022, table 3); Karlo enlarges in 7 by DDPM.
"""

import dataclasses
from dataclasses import dataclass
from typing import get_args

from storage.errors import check_number, check_whole
from unclip import Upsampler
from unclip.decoding import GUIDANCE
from unclip.embeddings import CANDIDATES, SAMPLING_STEPS
from unclip.sampling import Sampler

MAX_GUIDANCE = 1000
"""Above it, pictures are not even finite."""
KARLO_STEPS = 7
"""Of an upsampler whose last step is a network of its own."""
UPSAMPLER_STEPS = (27, 15)
"""Of the first upsampler, and of those after it."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn."""

    guidance: float | None = None
    """Of the decoder, away from "no picture and no caption"; 1 is none. None for 3, and for 1 where a picture is drawn
    from its own noise: with guidance, that does not give it back."""
    prior_guidance: float = 1.0
    """Of the prior, away from "no caption"; the paper found that more than 1 hurts."""
    prior_steps: int = SAMPLING_STEPS
    """Of a diffusion prior; an autoregressive one has a step for each of its tokens, whatever this says."""
    prior_candidates: int = CANDIDATES
    """Embeddings that are drawn for each picture; the one that fits its caption best is kept."""
    steps: int = 50
    """Of the decoder."""
    sampler: Sampler = "ddim"
    """Of the decoder: ddpm is the paper's, and wants more steps."""
    upsampler_steps: int | None = None
    """Of each upsampler; None for 27 of the first and 15 of others, or 7 of Karlo's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "sampler":
                if value not in get_args(Sampler):
                    raise ValueError(f"sampler is {value!r}; expected one of {', '.join(get_args(Sampler))}")
            elif name.endswith("guidance"):
                _check_guidance(name, value)
            elif value is not None:
                check_whole(name, value)
                if value < 1:
                    raise ValueError(f"{name} is {value}; it must be at least 1")

    def updated(self, **options: object) -> "Drawing":
        """Return these with options in their place; None keeps this one's.

        Raises:
            ValueError: an option is out of range.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(self, **given)  # type: ignore[arg-type]

    def guidance_or(self, default: float = GUIDANCE) -> float:
        """Return the decoder's guidance, which is `default` unless it is given."""
        return default if self.guidance is None else float(self.guidance)

    def enlarging(self, upsampler: Upsampler, place: int) -> tuple[int, Sampler]:
        """Return the steps and the sampler of an upsampler, by its place among them, from 0."""
        if upsampler.config.has_last:
            return self.upsampler_steps or KARLO_STEPS, "ddpm"
        return self.upsampler_steps or UPSAMPLER_STEPS[min(place, 1)], "ddim"

    def __str__(self) -> str:
        guidance = [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        prior = [] if self.prior_guidance == 1 else [f"of the prior {self.prior_guidance:g}"]
        return ", ".join([*guidance, *prior, f"{self.steps} steps of {self.sampler}"])


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless a number is from 0 to 1."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; expected a number from 0 to 1")


def _check_guidance(name: str, value: object) -> None:
    if value is None and name == "guidance":
        return
    check_number(name, value)
    assert isinstance(value, int | float)
    if not 0 <= value <= MAX_GUIDANCE:
        raise ValueError(f"{name} is {value}; expected a number from 0 to {MAX_GUIDANCE}, and 1 for none")
