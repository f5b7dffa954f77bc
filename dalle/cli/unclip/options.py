"""How DALL·E 2 draws, as options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import resolve_device
from dalle.cli.computing import DeviceOptions
from dalle.unclip.parts import Kind
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from unclip.sampling import Sampler


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How DALL·E 2 draws."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 50)")] = None
    """Steps of the decoder."""
    upsampler_steps: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 27, then 15; 7 of Karlo's)")
    ] = None
    """Steps of each upsampler."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="(default: the largest)")] = None
    """Side of the pictures: the decoder's or an upsampler's, after which nothing is enlarged."""

    def given(self) -> list[str]:
        """Return the options that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]

    def drawing(self, guidance: float | None) -> Drawing:
        """Return the settings; raises ValueError for an option out of range."""
        options = {name: value for name, value in vars(self).items() if name not in ("size", "model")}
        return Drawing().updated(guidance=guidance, **options)

    def load(self, bundle: Path, compute: DeviceOptions) -> UnCLIP:
        """Load DALL·E 2's parts of a bundle."""
        return UnCLIP.load(
            bundle,
            resolve_device(compute.device),
            size=self.size,
            precision=compute.precision,
            memory=compute.memory_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(DecoderOptions):
    """How DALL·E 2 draws captions; for bundles with its parts."""

    model: Annotated[
        Kind | None, tyro.conf.arg(metavar="{dalle,unclip}", help_behavior_hint="(default: dalle if it is there)")
    ] = None
    """Which model of the bundle draws: DALL·E, or DALL·E 2, which is unclip."""
    sampler: Annotated[Sampler | None, tyro.conf.arg(metavar="{ddim,ddpm}", help_behavior_hint="(default: ddim)")] = (
        None
    )
    """Of the decoder: ddpm is the paper's, and wants some 250 steps."""
    prior_steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 64)")] = None
    """Steps of a diffusion prior; an autoregressive one has a step for each of its tokens."""
    prior_guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 1)")] = None
    """Guidance of the prior; 1 is none, and best in the paper."""

    def check_unused(self) -> None:
        """Raise ValueError for options of DALL·E 2 where DALL·E draws."""
        given = [option for option in self.given() if option != "--model"]
        if given:
            raise ValueError(
                f"{' and '.join(given)} are for DALL·E 2, but DALL·E draws here: leave them out, or add --model unclip"
            )


def check_only_dalle(options: Mapping[str, object]) -> None:
    """Raise ValueError for options of DALL·E alone, name -> value, that are given where DALL·E 2 draws."""
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if name != "guidance" and value is not None and value is not False
    ]
    if given:
        raise ValueError(f"{' and '.join(given)} are for DALL·E, but DALL·E 2 draws here: leave them out")
