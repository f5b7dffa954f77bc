"""The one engine of all neural stages: DeepSpeed, on one CPU process as on many GPUs. The only file that imports deepspeed.

In order: joining the process group, the DeepSpeed configuration, the engine (step, weights), and its checkpoints.
DeepSpeed 0.19.8 is pinned: the comments marked "0.19.8" rely on what that version does.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.config import OptimizerConfig, TrainConfig
from training.ema import EMA

logger = logging.getLogger(__name__)

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0


def join_world() -> World:
    """Join the process group a launcher (`deepspeed`, `torchrun`) describes in the environment, or make one of a single process.

    A second call in the same process returns the group that is there.
    """
    # 0.19.8 calls torch.distributed functions that torch 2.13 has renamed; every rank would say so for each of them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        if launched:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank a thread per core: ranks on one machine would slow each other tenfold.
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        if n_local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_local))
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def leave_world() -> None:
    """Leave the process group; without it gloo aborts at interpreter exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def agree(flag: bool, world: World) -> bool:
    """Return whether any rank raised its flag; every rank gets the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the mean of a float tensor over all ranks."""
    if world.size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world.size


# DeepSpeed's documented top-level options that make sense here; anything else is more likely a typing error than a wish.
_USER_KEYS = frozenset(
    [
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
        "activation_checkpointing",
        "aio",
        "checkpoint",
        "tensorboard",
        "csv_monitor",
        "wandb",
        "disable_allgather",
        "seq_parallel_communication_data_type",
        "use_node_local_storage",
        "timers",
        "compile",
    ]
)


def read_user_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON of the user's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or a key that is not an option of DeepSpeed, or one that the recipe decides.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}: --deepspeed-config expects a JSON file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): --deepspeed-config expects a DeepSpeed configuration"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: a DeepSpeed configuration is a JSON object")
    for key in config:
        if key in ("optimizer", "scheduler"):
            raise ValueError(
                f"{path} sets {key!r}, which the recipe decides: remove it, and use the recipe's options instead"
            )
        if key not in _USER_KEYS:
            close = get_close_matches(key, _USER_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} sets {key!r}, which is not an option of DeepSpeed here{hint}")
    return config


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` in place of its own, nested objects merged."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: what `config` says, and the user's JSON over it.

    Raises:
        ValueError: the two say different batch sizes, or the user's JSON asks for half precision at stage 0.
    """
    micro, accumulation = config.batch_of(world_size)
    derived: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # Always explicit: DeepSpeed 0.19.8 clips at 1.0 when the key is absent.
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True}
        if config.zero_stage >= 2:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    elif config.precision == "autocast":
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if config.deepspeed_config is None:
        return derived
    path = config.deepspeed_config
    user = read_user_config(path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in user and user[key] not in ("auto", derived[key]):
            raise ValueError(
                f"{path} sets {key} to {user[key]}, the run's is {derived[key]}: remove it there, and say the batch once, with "
                "--global-batch and --micro-batch"
            )
    merged = _merge(derived, {key: value for key, value in user.items() if value != "auto"})
    half = any(isinstance(merged.get(key), dict) and merged[key].get("enabled") for key in ("bf16", "fp16"))
    stage = merged["zero_optimization"].get("stage", 0) if isinstance(merged["zero_optimization"], dict) else None
    if half and stage == 0:
        raise ValueError(
            f"{path} asks for half precision at ZeRO stage 0, where DeepSpeed takes a wrong Adam step: set zero_optimization.stage to 1 or more"
        )
    return merged


def decay_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the parameters for weight decay: matrices and convolutions decay; gains, biases and embeddings do not.

    The paper does not say which parameters are exempt; it lists "gains, biases, embeddings, and unembeddings" as the special ones (D).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        is_exempt = parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name
        (exempt if is_exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Engine:
    """A model in training: its weights, optimizer and averaged weights, over all ranks.

    Args:
        objective: `objective.model` is what is trained; `objective(**tensors)` returns (loss, metrics of 0-d tensors).
        config: the run.
        world: this process's place.

    Raises:
        ValueError: the user's DeepSpeed JSON is refused.
    """

    def __init__(self, objective: nn.Module, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.micro_batch, self.accumulation = config.batch_of(world.size)
        self.deepspeed_config = deepspeed_config(config, world.size)
        self.model = cast(nn.Module, objective.model)
        optimizer = config.optimizer
        adamw = torch.optim.AdamW(
            decay_groups(self.model, optimizer),
            lr=config.learning_rate.at(0),
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._engine = _initialize(objective, adamw, self.deepspeed_config, config.deepspeed_config)
        zero = self.deepspeed_config["zero_optimization"]
        self.stage: int = zero.get("stage", 0)
        half = any(self.deepspeed_config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))
        self._must_gather = self.stage == 3 or half
        weights = self._gather()
        self._ema = EMA(weights, config.ema_decay) if world.is_first else None

    def train(self) -> None:
        """Put the model in training mode."""
        self._engine.train()

    def forward(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Return the loss and the metrics of one micro-batch, without a gradient."""
        with torch.no_grad():
            return cast(tuple[Tensor, Metrics], self._engine(**tensors))

    def step(self, micro_batches: Iterable[Mapping[str, Tensor]], learning_rate: float, step: int) -> Metrics:
        """Take optimizer step number `step` (from 0) on this rank's `accumulation` micro-batches.

        Returns:
            The metrics of the objective, and the loss, averaged over the micro-batches; the gradient norm where DeepSpeed knows it.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums: Metrics = {}
        for tensors in micro_batches:
            loss, metrics = self._engine(**tensors)
            self._engine.backward(loss)
            self._engine.step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        means = {name: value / self.accumulation for name, value in sums.items()}
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            means["grad_norm"] = torch.as_tensor(norm)
        if (step + 1) % self.config.ema_every == 0:
            weights = self._gather()
            if self._ema is not None:
                self._ema.update(weights)
        return means

    def _gather(self) -> dict[str, Tensor]:
        """Return the model's weights in float32, whole: on the first rank, and elsewhere where that costs nothing. Collective."""
        if not self._must_gather:
            return dict(self.model.named_parameters())
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self.model.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if self.world.is_first:
                gathered[name] = whole.reshape(getattr(parameter, "ds_shape", parameter.shape))
        return gathered

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, on the first rank; other ranks get an empty dictionary. No communication."""
        return self._ema.average if self._ema is not None else {}

    def save(self, directory: Path, step: int, state: Mapping[str, Any]) -> None:
        """Save a checkpoint to resume from, complete before `latest` names it; then drop the oldest.

        Args:
            directory: where checkpoints of the run are kept.
            step: optimizer steps taken so far; names the checkpoint.
            state: plain numbers, strings and lists that `load` returns.

        Raises:
            OSError: it could not be written; the previous checkpoint stays good.
        """
        tag = f"step{step:08d}"
        meta = {"step": step, "ranks": self.world.size, "zero_stage": self.stage, "state": dict(state)}
        error: OSError | RuntimeError | None = None
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._engine.save_checkpoint(str(directory), tag=tag, client_state={}, save_latest=False)
            if self._ema is not None:
                save_file(
                    {name: tensor.contiguous() for name, tensor in self._ema.average.items()},
                    directory / tag / "ema.safetensors",
                )
                (directory / tag / "checkpoint.json").write_text(json.dumps(meta, indent=2))
                _sync_files(directory / tag)
        except (OSError, RuntimeError) as caught:  # torch's zip writer raises RuntimeError when the disk is full
            error = caught
        except Exception as caught:  # safetensors has an error class of its own
            if type(caught).__name__ != "SafetensorError":
                raise
            error = RuntimeError(str(caught))
        failed = agree(error is not None, self.world)
        if self.world.is_first:
            if failed:
                shutil.rmtree(directory / tag, ignore_errors=True)
            else:
                _replace_text(directory / "latest", tag)
                _rotate(directory, self.config.keep_last)
        if failed:
            reason = str(error).splitlines()[0] if error else "another rank could not write its part"
            kept = latest_tag(directory)
            raise OSError(
                f"could not save the checkpoint {directory / tag} ({reason}): free some space and start again; "
                + (f"{kept} is kept and will be resumed from" if kept else "no earlier checkpoint exists")
            )
        if self.world.size > 1:
            dist.barrier()

    def load(self, directory: Path) -> dict[str, Any]:
        """Resume from the newest checkpoint of `directory`; returns the state given to `save`.

        Raises:
            ValueError: it is damaged, of another model, or of another number of ranks.
        """
        tag = latest_tag(directory)
        if tag is None:
            raise FileNotFoundError(f"no checkpoint in {directory}")
        meta = read_checkpoint(directory)
        if meta["ranks"] != self.world.size and (meta["zero_stage"] > 0 or self.stage > 0):
            raise ValueError(
                f"{directory / tag} was saved by {meta['ranks']} ranks at ZeRO stage {meta['zero_stage']}, this run has {self.world.size}: "
                f"start it with {meta['ranks']}"
            )
        if meta["zero_stage"] != self.stage:
            raise ValueError(
                f"{directory / tag} was saved at ZeRO stage {meta['zero_stage']}, this run is at {self.stage}: use --zero-stage {meta['zero_stage']}"
            )
        try:
            with _tensors_only():
                path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
        except (RuntimeError, AssertionError, KeyError, EOFError, OSError) as error:
            raise ValueError(
                f"the checkpoint {directory / tag} cannot be loaded ({str(error).splitlines()[0]}): it is damaged, or of another model. "
                f"Name an earlier one in {directory / 'latest'}, or start afresh with --fresh"
            ) from error
        if path is None:
            raise ValueError(
                f"the checkpoint {directory / tag} is incomplete: name an earlier one in {directory / 'latest'}, or use --fresh"
            )
        if self._ema is not None:
            self._ema.load(load_file(directory / tag / "ema.safetensors"))
        return dict(meta["state"])


def _initialize(
    objective: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], user_path: Path | None
) -> Any:
    """Return DeepSpeed's engine, with no operator compiled at start-up and its chatter kept to warnings."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.ERROR)
    if deepspeed.get_accelerator().device_name() == "cpu":
        # 0.19.8 would compile a shared-memory all-reduce here (27 s, and it hangs for ever on a stale lock); it only serves inference.
        deepspeed.ops.__compatible_ops__ = {}
    try:
        engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    except Exception as error:
        if user_path is None:
            raise
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"DeepSpeed refuses {user_path}: {' '.join(str(error).split())[:300] or first_line}"
        ) from error
    return engine


@contextmanager
def _tensors_only() -> Any:
    """While it lasts, DeepSpeed reads checkpoints without executing anything in them (0.19.8 would unpickle freely)."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(_self: object, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    original = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]):
            yield
    finally:
        TorchCheckpointEngine.load = original


def latest_tag(directory: Path) -> str | None:
    """Return the name of the newest complete checkpoint in `directory`, or None."""
    latest = directory / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text().strip()
    return tag if tag and (directory / tag).is_dir() else None


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says of itself: step, ranks, zero_stage, state.

    Raises:
        ValueError: that file is missing or damaged.
    """
    path = directory / (latest_tag(directory) or "") / "checkpoint.json"
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}): name an earlier checkpoint in {directory / 'latest'}, or use --fresh"
        ) from None


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _rotate(directory: Path, keep: int) -> None:
    tags: Sequence[Path] = sorted(path for path in directory.glob("step*") if path.is_dir())
    for old in tags[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
