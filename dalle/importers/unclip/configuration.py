"""The sizes of unCLIP's networks from the config.json files of diffusers; what is computed in another way is refused.

Source: huggingface/diffusers at 58eb52c; kakaobrain/karlo at 3c68a50 for the schedules.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle.importers.clip_configs import read_json
from unclip.decoder import DecoderConfig
from unclip.prior import PriorConfig
from unclip.unet import GROUPS
from unclip.upsampler import UpsamplerConfig

N_STEPS = 1000


class Configuration:
    """A config.json, read field by field.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: expected the folder of an unCLIP as diffusers has it")
        self.path = path
        self._values = read_json(path)

    def require(self, **expected: Any) -> None:
        """Raise ValueError unless fields have the values with which they are computed here; missing ones may be None.

        A tuple stands for one of several.
        """
        for name, value in expected.items():
            found = self._values.get(name)
            if found not in (value if isinstance(value, tuple) else (value,)):
                raise ValueError(f"{self.path} says {name} {found!r}; only {value!r} is computed here")

    def number(self, name: str, default: int | None = None) -> int:
        """Return a whole number; ValueError if there is none."""
        value = self._values.get(name, default)
        if type(value) is not int:
            raise ValueError(f"{self.path} says {name} {value!r}; expected a whole number")
        return value

    def words(self, name: str) -> list[Any]:
        """Return a list; ValueError if there is none."""
        value = self._values.get(name)
        if not isinstance(value, list):
            raise ValueError(f"{self.path} says {name} {value!r}; expected a list")
        return value

    def get(self, name: str) -> Any:
        """Return a field as it is; None if it is missing."""
        return self._values.get(name)


def read_prior(config: Configuration, schedule: Configuration, null_length: int) -> PriorConfig:
    """Return a prior's sizes.

    Args:
        config: of the network.
        schedule: of its scheduler.
        null_length: positions of what stands in for a caption.

    Raises:
        ValueError: it is computed in another way, or sizes are impossible.
    """
    config.require(
        added_emb_type=("prd", None),
        encoder_hid_proj_type=("linear", None),
        embedding_proj_norm_type=None,
        norm_in_type=None,
        time_embed_act_fn=("silu", None),
        time_embed_dim=None,
        embedding_proj_dim=None,
        clip_embed_dim=None,
        additional_embeddings=(4, None),
    )
    _require_schedule(schedule, prediction="sample")
    n_heads, head_width = config.number("num_attention_heads", 32), config.number("attention_head_dim", 64)
    clamp = schedule.get("clip_sample_range") if schedule.get("clip_sample") else 0
    return PriorConfig(
        embed_dim=config.number("embedding_dim", 768),
        text_width=config.number("embedding_dim", 768),
        text_len=config.number("num_embeddings", 77),
        width=n_heads * head_width,
        n_layers=config.number("num_layers", 20),
        n_heads=n_heads,
        n_steps=schedule.number("num_train_timesteps", N_STEPS),
        scale=1.0,
        normalised=False,
        clamp=float(clamp or 0),
        null_length=null_length,
    )


def read_decoder(
    config: Configuration, text: Configuration, schedule: Configuration, text_len: int, null_length: int
) -> DecoderConfig:
    """Return a decoder's sizes.

    Args:
        config: of its U-Net.
        text: of what projects its conditions.
        schedule: of its scheduler.
        text_len: positions of captions.
        null_length: positions of what stands in for a caption.

    Raises:
        ValueError: it is computed in another way, or sizes are impossible.
    """
    config.require(class_embed_type="identity", only_cross_attention=(False, None), mid_block_type=_MIDDLE)
    _require_schedule(schedule, prediction="epsilon", variance="learned_range")
    embed_dim = text.number("clip_embeddings_dim", 768)
    width = config.number("cross_attention_dim")
    text.require(cross_attention_dim=width, time_embed_dim=4 * _widths(config)[0])
    return DecoderConfig(
        **_unet(config, attending="SimpleCrossAttn"),
        head_width=config.number("attention_head_dim"),
        context_width=width,
        embed_dim=embed_dim,
        text_width=embed_dim,
        text_len=text_len,
        n_tokens=text.number("clip_extra_context_tokens", 4),
        n_steps=schedule.number("num_train_timesteps", N_STEPS),
        scale=1.0,
        normalised=False,
        null_length=null_length,
    )


def read_upsampler(
    config: Configuration, schedule: Configuration, input_size: int, *, has_last: bool
) -> UpsamplerConfig:
    """Return an upsampler's sizes.

    Args:
        config: of its U-Net.
        schedule: of its scheduler.
        input_size: side in pixels of what it enlarges.
        has_last: whether another network takes the last step.

    Raises:
        ValueError: it is computed in another way, or sizes are impossible.
    """
    config.require(add_attention=False, class_embed_type=None)
    _require_schedule(schedule, prediction="epsilon", variance="fixed_small_log")
    sizes = _unet(config, attending="Attn")
    if sizes.pop("attention") or not sizes["image_size"]:
        raise ValueError(f"{config.path} is of a network with attention; only upsamplers without are computed here")
    return UpsamplerConfig(
        **sizes,
        middle_attention=False,
        input_size=input_size,
        crop=sizes["image_size"],
        n_steps=schedule.number("num_train_timesteps", N_STEPS),
        degradation="none",
        enlarging="bicubic",
        has_last=has_last,
    )


_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"


def _unet(config: Configuration, attending: str) -> dict[str, Any]:
    """Return the fields of a U-Net; `attending` begins the names of levels with attention."""
    config.require(
        center_input_sample=(False, None),
        act_fn=("silu", None),
        norm_num_groups=(GROUPS, None),
        norm_eps=(1e-5, None),
        flip_sin_to_cos=(True, None),
        freq_shift=(0, None),
        resnet_time_scale_shift=("scale_shift", "default"),
        time_embedding_type=("positional", None),
        time_embedding_dim=None,
    )
    widths = _widths(config)
    levels = _levels(config.words("down_block_types"), "Down", attending, config.path)
    if _levels(config.words("up_block_types"), "Up", attending, config.path)[::-1] != levels:
        raise ValueError(f"{config.path} has attention at other levels on the way up than on the way down")
    if any(width % widths[0] for width in widths) or len(levels) != len(widths):
        raise ValueError(f"{config.path} has levels of {widths} channels, {len(levels)} in all: expected multiples")
    return {
        "image_size": config.number("sample_size"),
        "in_channels": config.number("in_channels"),
        "out_channels": config.number("out_channels"),
        "width": widths[0],
        "multiples": tuple(width // widths[0] for width in widths),
        "n_blocks": config.number("layers_per_block"),
        "attention": tuple(level for level, attends in enumerate(levels) if attends),
        "scale_shift": config.get("resnet_time_scale_shift") == "scale_shift",
        "dropout": 0.0,
    }


def _widths(config: Configuration) -> list[int]:
    widths = config.words("block_out_channels")
    if not widths or any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(f"{config.path} says block_out_channels {widths!r}; expected whole numbers above 0")
    return widths


def _levels(kinds: Sequence[Any], way: str, attending: str, path: Path) -> list[bool]:
    """Return which levels have attention."""
    known: Mapping[str, bool] = {f"Resnet{way}sampleBlock2D": False, f"{attending}{way}Block2D": True}
    if odd := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"{path} has a level of the kind {odd[0]!r}; expected {' or '.join(known)}")
    return [known[kind] for kind in kinds]


def _require_schedule(schedule: Configuration, *, prediction: str, variance: str | None = None) -> None:
    schedule.require(_class_name="UnCLIPScheduler", prediction_type=prediction)
    schedule.require(beta_schedule=("squaredcos_cap_v2", None))
    if variance is not None:
        schedule.require(variance_type=variance)
