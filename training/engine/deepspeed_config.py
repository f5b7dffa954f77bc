"""Resolves a run, once: recipe and options, a preset, a DeepSpeed JSON and the number of ranks to one configuration.

An option, a preset and a JSON that contradict each other are an error that names them. They go before the recipe, with
a note.

DeepSpeed 0.19.8 is pinned: options are explicit where that version's defaults are wrong.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from dalle.output.text import aligned
from storage.text import parse_json
from training.config import HALF_PRECISIONS, Offload, Precision, TrainConfig

# DeepSpeed's documented top-level options that make sense here; anything else is probably a typing error.
_USER_KEYS = frozenset(
    [
        "purpose",  # ours: a line for `dalle-train presets`
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
        "aio",
        "tensorboard",
        "csv_monitor",
        "wandb",
        "disable_allgather",
        "seq_parallel_communication_data_type",
        "timers",
        "compile",
    ]
)
_DECIDED_KEYS = {
    "optimizer": "the recipe",
    "scheduler": "the recipe",
    "checkpoint": "the training loop",
    "use_node_local_storage": "the training loop",
    "activation_checkpointing": "--activation-checkpointing",
}
"""Options of DeepSpeed that the user may not set, and who decides them."""
MAX_CLIPPING = 1e30
"""A gradient norm above all of them."""
_OBJECT_KEYS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
"""Options whose value must be an object."""
_PRECISION_KEYS: dict[Precision, str] = {"bf16": "bf16", "fp16": "fp16", "autocast": "torch_autocast"}
"""Objects that DeepSpeed has for the precisions; float32 has none."""
_GUARDS = {
    "bf16.check_grad_overflow": "steps that are not finite are skipped",
    "zero_optimization.compute_grad_norm": "steps that are not finite are skipped",
}
"""Options that must stay on, and what depends on them."""

PRESETS = Path(__file__).parent / "presets"
"""The configurations that come with the program, to copy and change."""


def preset_list() -> str:
    """Return a line for each preset, with its name and purpose, and the folder."""
    paths = sorted(PRESETS.glob("*.json"))
    table = aligned([(path.stem, json.loads(path.read_text())["purpose"]) for path in paths])
    return "\n".join([table, "", f"`dalle-train presets NAME` prints one; they are in {PRESETS}"])


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ValueError: no preset has this name.
    """
    names = sorted(path.stem for path in PRESETS.glob("*.json"))
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"no preset is called {name!r}{hint} There are {', '.join(names)}; a file of your own goes to "
            "--deepspeed-config"
        )
    return PRESETS / f"{name}.json"


def read_user_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON, without values "auto", which leave a decision to this program.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or not an object; a key is not an option of DeepSpeed, is decided here, or has a value of
            another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}: --deepspeed-config expects a JSON file")
    try:
        config = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        message = f"{path} is not valid JSON ({error}): --deepspeed-config expects a DeepSpeed configuration"
        raise ValueError(message) from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: a DeepSpeed configuration is a JSON object")
    for key in config:
        if key in _DECIDED_KEYS:
            raise ValueError(f"{path} sets {key!r}, which {_DECIDED_KEYS[key]} decides: remove it")
        if key not in _USER_KEYS:
            close = get_close_matches(key, _USER_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} sets {key!r}, which is not an option of DeepSpeed here{hint}")
    config = _without_auto({key: value for key, value in config.items() if key != "purpose"})
    for key in _OBJECT_KEYS:
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path} sets {key} to {json.dumps(config[key])}: expected an object, as DeepSpeed does")
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Drop values "auto", at any depth."""
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` in place of its own, nested objects merged."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A run as it is trained: engine, log, config.json and status all have this one."""

    config: TrainConfig
    """The recipe's run with what options, preset and JSON say."""
    micro_batch: int
    """Samples per rank and forward pass."""
    accumulation: int
    """Micro-batches per rank and optimizer step."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration."""
    notes: list[str]
    """A line for everything of the recipe that was changed."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """A DeepSpeed configuration that a run was given."""

    name: str
    """As messages call it."""
    content: dict[str, Any]

    def precision(self, current: Precision) -> Precision | None:
        """Return the precision that it asks for in place of the current one; None if it says nothing."""
        is_on = {name: bool(self.content.get(key, {}).get("enabled")) for name, key in _PRECISION_KEYS.items()}
        wanted = [name for name, on in is_on.items() if on]
        if len(wanted) > 1:
            raise ValueError(f"{self.name} enables {' and '.join(wanted)}: choose one precision")
        if wanted:
            return wanted[0]
        switched_off = {name for name, key in _PRECISION_KEYS.items() if "enabled" in self.content.get(key, {})}
        is_fp32 = current in switched_off or len(switched_off) == len(_PRECISION_KEYS)
        return "fp32" if is_fp32 else None

    def zero_stage(self) -> int | None:
        """Return the ZeRO stage that it asks for; None if it says nothing."""
        stage = self.content.get("zero_optimization", {}).get("stage")
        if stage is not None and (isinstance(stage, bool) or stage not in range(4)):
            raise ValueError(f"{self.name} sets zero_optimization.stage to {json.dumps(stage)}: expected 0, 1, 2 or 3")
        return None if stage is None else int(stage)

    def offload(self) -> Offload | None:
        """Return what it offloads; None if it says nothing."""
        zero = self.content.get("zero_optimization", {})
        blocks = {key: zero.get(key) for key in ("offload_param", "offload_optimizer") if key in zero}
        for key, block in blocks.items():
            if not isinstance(block, dict):
                raise ValueError(f"{self.name} sets zero_optimization.{key} to {json.dumps(block)}: expected an object")
            device = block.get("device", "none")
            if device not in ("cpu", "none"):
                raise ValueError(
                    f'{self.name} sets zero_optimization.{key}.device to {json.dumps(device)}: expected "cpu" or '
                    '"none"; offloading to disks is not supported here'
                )
        used = {key for key, block in blocks.items() if block.get("device", "none") != "none"}
        if "offload_param" in used:
            return "parameters"
        return "optimizer" if used else ("none" if blocks else None)

    def gradient_clipping(self) -> float | None:
        """Return the gradient norm that it clips at; None if it says nothing."""
        clipping = self.content.get("gradient_clipping")
        if clipping is None:
            return None
        is_number = isinstance(clipping, int | float) and not isinstance(clipping, bool)
        if not is_number or not 0 <= clipping <= MAX_CLIPPING:  # which refuses nan, too
            expected = f"expected 0 or more, up to {MAX_CLIPPING:g}"
            raise ValueError(f"{self.name} sets gradient_clipping to {json.dumps(clipping)}: {expected}")
        return float(clipping)


def _files(config: TrainConfig) -> list[_File]:
    """Read the configurations a run was given, the preset first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they contradict each other, or switch off the check that steps are finite.
    """
    paths = {}
    if config.preset is not None:
        paths[f"preset {config.preset}"] = preset_path(config.preset)
    if config.deepspeed_config is not None:
        paths[str(config.deepspeed_config)] = config.deepspeed_config
    files = [_File(name=name, content=read_user_config(path)) for name, path in paths.items()]
    set_by: dict[str, tuple[Any, str]] = {}
    for file in files:
        for key, value in _leaves(file.content).items():
            if key in _GUARDS and not value:
                raise ValueError(f"{file.name} switches {key} off, by which {_GUARDS[key]}: remove it")
            before, who = set_by.setdefault(key, (value, file.name))
            if who != file.name and before != value:
                raise ValueError(
                    f"{file.name} sets {key} to {json.dumps(value)}, and the {who} to {json.dumps(before)}: "
                    f"`dalle-train presets {config.preset}` prints the preset, to be copied and changed"
                )
    return files


def with_files(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Return a run with what its preset and its DeepSpeed JSON say, and a note for everything that they change.

    They change what the recipe says, not what the user said in options. `TrainConfig.said` then also names what they
    say.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is refused, or contradicts an option; both are named.
    """
    return _merged(config, _files(config))


def _merged(config: TrainConfig, files: Sequence[_File]) -> tuple[TrainConfig, list[str]]:
    notes: list[str] = []
    values: dict[str, Any] = {
        "precision": config.precision,
        "zero_stage": config.zero_stage,
        "offload": config.offload,
        "gradient_clipping": config.optimizer.gradient_clipping,
    }
    set_by = {name: f"--{name.replace('_', '-')}" for name in values if name in config.said}
    for file in files:
        asked = {
            "precision": file.precision(values["precision"]),
            "zero_stage": file.zero_stage(),
            "offload": file.offload(),
            "gradient_clipping": file.gradient_clipping(),
        }
        for name, value in asked.items():
            if value is None:
                continue
            what = name.replace("_", " ")
            if value != values[name]:
                if name in set_by:
                    raise ValueError(
                        f"{file.name} says {what} {value}, and {set_by[name]} says {values[name]}: leave one out"
                    )
                notes.append(f"{file.name}: {what} {value}, instead of the recipe's {values[name]}")
                values[name] = value
            set_by[name] = file.name
    if values["precision"] in HALF_PRECISIONS and values["zero_stage"] == 0 and files:
        raise ValueError(
            f"{' and '.join(file.name for file in files)}: half precision at ZeRO stage 0, where DeepSpeed "
            "takes a wrong Adam step: set zero_optimization.stage, or --zero-stage, to 1 or more"
        )
    optimizer = dataclasses.replace(config.optimizer, gradient_clipping=values.pop("gradient_clipping"))
    # without files, so that TrainConfig refuses values that do not go together
    changed = dataclasses.replace(config, **values, optimizer=optimizer, preset=None, deepspeed_config=None)
    derived = _leaves(_derived(changed))
    for file in files:
        for key, value in _leaves(file.content).items():
            if key in derived and derived[key] != value:
                notes.append(f"{file.name}: {key} {json.dumps(value)}, instead of {json.dumps(derived[key])}")
    said = tuple(sorted({*config.said, *set_by}))
    merged = dataclasses.replace(changed, preset=config.preset, deepspeed_config=config.deepspeed_config, said=said)
    return merged, notes


def _derived(config: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run without files, but for the batch."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if config.powersgd_rank:
        zero |= {"reduce_scatter": False, "overlap_comm": False}
    derived: dict[str, Any] = {
        # explicit: DeepSpeed 0.19.8 clips at 1.0 when the key is absent
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        # the optimizer is torch's, also on the CPU: DeepSpeed's own is compiled at the start of every run
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer.kind == "muon" or config.optimizer.variance_clip is not None,
        "steps_per_print": 2**31,
        # 0.19.8 times every micro-batch unless told otherwise, and waits for a GPU before and after it
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision == "autocast":
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision in HALF_PRECISIONS:
        derived[config.precision] = {"enabled": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


def resolve(config: TrainConfig, ranks: int, *, emulates_bfloat16: bool = False) -> ResolvedConfig:
    """Resolve a run: options, preset and JSON must agree, and go before the recipe.

    Args:
        config: recipe and options.
        ranks: number of ranks.
        emulates_bfloat16: whether a rank has no bfloat16 arithmetic; a run whose recipe alone says autocast then
            computes in float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is refused; options, preset and JSON contradict each other; or the batch cannot be divided.
    """
    files = _files(config)
    config, notes = _merged(config, files)
    if emulates_bfloat16 and config.precision == "autocast" and "precision" not in config.said:
        config = dataclasses.replace(config, precision="fp32")
        notes.append(
            "computing in fp32, not in autocast as the recipe says: this CPU only emulates bfloat16, "
            "several times slower (`dalle-train STAGE … --precision autocast` insists on it)"
        )
    micro_batch, accumulation = config.batch_of(ranks)
    batch = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    deepspeed = batch | _derived(config)
    for file in files:
        for key, value in batch.items():
            if key in file.content and file.content[key] != value:
                raise ValueError(
                    f"{file.name} sets {key} to {file.content[key]}, the run's is {value}: remove it there, and say "
                    "the batch once, with --global-batch and --micro-batch"
                )
        deepspeed = _merge(deepspeed, file.content)
    return ResolvedConfig(
        config=config, micro_batch=micro_batch, accumulation=accumulation, deepspeed=deepspeed, notes=notes
    )


def is_half(config: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed configuration keeps the weights in half precision."""
    return any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))


def weight_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the type of the weights that a DeepSpeed configuration computes with."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((kind for key, kind in kinds.items() if config.get(key, {}).get("enabled")), torch.float32)
