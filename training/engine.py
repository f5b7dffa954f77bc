"""The one engine of all neural stages: DeepSpeed, on one CPU process as on many GPUs.

No other file imports deepspeed.

In order: joining the process group, the DeepSpeed configuration, the engine (step, weights), and its checkpoints.
DeepSpeed 0.19.8 is pinned: the comments marked "0.19.8" rely on what that version does.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.config import OptimizerConfig, TrainConfig
from training.ema import EMA

logger = logging.getLogger(__name__)

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of a process among the ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0


def join_world() -> World:
    """Join the process group that a launcher (`deepspeed`, `torchrun`) describes, or make one of a single process.

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
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not say so to mypy
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank a thread per core: on one machine they slow each other tenfold.
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        if n_local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_local))
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def leave_world(*, after_error: bool = False) -> None:
    """Leave the process group; without it gloo aborts at interpreter exit.

    Args:
        after_error: do not wait for the other ranks, which may never come.
    """
    if not dist.is_initialized() or (after_error and dist.get_backend() != "gloo"):
        return  # NCCL would wait for the work that is under way; the launcher ends the other ranks
    if not after_error:
        dist.barrier()
    dist.destroy_process_group()


def agree(flag: bool, world: World) -> bool:
    """Return whether any rank raised its flag; every rank gets the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def on_first_rank(action: Callable[[], object], world: World) -> None:
    """Do something on the first rank while the others wait; where it fails, it fails on all of them.

    Raises:
        ValueError, OSError: what `action` raises; on the other ranks, an OSError that says so.
    """
    error: Exception | None = None
    if world.is_first:
        try:
            action()
        except (ValueError, OSError) as caught:
            error = caught
    if agree(error is not None, world):
        raise error if error is not None else OSError("stopped, because the first rank failed: see its message")


def require_same(values: Mapping[str, object], world: World) -> None:
    """Check that all ranks were given the same, compared by its representation.

    Raises:
        ValueError: they were not; names what differs.
    """
    if world.size == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in values.values()]
    low = torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=world.device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = [name for name, is_same in zip(values, (low == high).tolist(), strict=True) if not is_same]
    if different:
        raise ValueError(
            f"the ranks differ in {' and '.join(different)}: start all of them with the same command, and let all "
            "see the same files"
        )


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the mean of a float tensor over all ranks."""
    if world.size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world.size


# DeepSpeed's documented top-level options that make sense here; anything else is likelier a typing error than a wish.
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
"""Options of DeepSpeed that are not the user's, and who decides them."""
_OBJECT_KEYS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
"""Options whose value is looked into here."""


def read_user_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON of the user's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, a key that is not an option of DeepSpeed or that is not the user's to
            decide, or one of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}: --deepspeed-config expects a JSON file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    config = _without_auto(config)
    for key in _OBJECT_KEYS:
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path} sets {key} to {json.dumps(config[key])}: expected an object, as DeepSpeed does")
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without the values "auto", which leave a decision to the program, that is, to us."""
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


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
        if user.get(key, derived[key]) != derived[key]:
            raise ValueError(
                f"{path} sets {key} to {user[key]}, the run's is {derived[key]}: remove it there, and say the batch "
                "once, with --global-batch and --micro-batch"
            )
    merged = _merge(derived, user)
    if _is_half(merged) and merged["zero_optimization"].get("stage", 0) == 0:
        raise ValueError(
            f"{path} asks for half precision at ZeRO stage 0, where DeepSpeed takes a wrong Adam step: set "
            "zero_optimization.stage to 1 or more"
        )
    return merged


def _is_half(config: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed configuration keeps the weights in half precision."""
    return any(config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))


def decay_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the parameters for weight decay: matrices and convolutions decay; gains, biases and embeddings do not.

    The paper does not say which parameters are exempt; it lists "gains, biases, embeddings, and unembeddings" as the
    special ones (D).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
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
        self.stage: int = self.deepspeed_config["zero_optimization"].get("stage", 0)
        self._must_gather = self.stage == 3 or _is_half(self.deepspeed_config)
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
            The metrics of the objective, and the loss, averaged over the micro-batches; the gradient norm where
            DeepSpeed knows it.
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
        """Return the model's weights in float32, whole. Collective.

        Where they must be gathered, only the first rank gets them, on the CPU, and so is their average: a GPU that
        holds a part of them has no room for all.
        """
        if not self._must_gather:
            return dict(self.model.named_parameters())
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self.model.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if self.world.is_first:
                gathered[name] = whole.reshape(getattr(parameter, "ds_shape", parameter.shape)).cpu()
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
        tag = checkpoint_tag(step)
        error = self._write(directory, tag, {"step": step, "state": dict(state)})
        failed = agree(error is not None, self.world)
        if failed:
            if self.world.is_first:
                shutil.rmtree(directory / tag, ignore_errors=True)
            reason = str(error).splitlines()[0] if error else "another rank could not write its part"
            kept = latest_tag(directory)
            raise OSError(
                f"could not save the checkpoint {directory / tag} ({reason}): free some space and start again; "
                + (f"{kept} is kept and will be resumed from" if kept else "no earlier checkpoint exists")
            )
        on_first_rank(lambda: _publish(directory, tag, self.config.keep_last), self.world)

    def _write(self, directory: Path, tag: str, meta: dict[str, Any]) -> Exception | None:
        """Write this rank's files of a checkpoint; returns what went wrong, so that all ranks hear of it."""
        errors: list[Exception] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _errors_kept(errors):
                self._engine.save_checkpoint(str(directory), tag=tag, client_state={}, save_latest=False)
            if self._ema is not None and not errors:
                average = {name: tensor.contiguous() for name, tensor in self._ema.average.items()}
                save_file(average, directory / tag / "ema.safetensors")
                meta |= {"ranks": self.world.size, "zero_stage": self.stage}
                (directory / tag / "checkpoint.json").write_text(json.dumps(meta, indent=2))
                _sync_files(directory / tag)
        except (*_WRITE_ERRORS, SafetensorError) as error:
            errors.append(error)
        return errors[0] if errors else None

    def load(self, directory: Path) -> dict[str, Any]:
        """Resume from the newest checkpoint of `directory`; returns the state given to `save`.

        Raises:
            ValueError: it is damaged, of another model, or of another number of ranks.
        """
        tag = latest_tag(directory)
        if tag is None:
            raise FileNotFoundError(f"no checkpoint in {directory}")
        meta = read_checkpoint(directory)
        self._require_fitting(meta, directory / tag)
        error: Exception | None = None
        try:
            with _tensors_only():
                path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
            if path is None:
                raise FileNotFoundError("files are missing")
            if self._ema is not None:
                self._ema.load(load_file(directory / tag / "ema.safetensors"))
        except (*_READ_ERRORS, SafetensorError) as caught:
            error = caught
        if agree(error is not None, self.world):
            reason = (str(error).splitlines() or [type(error).__name__])[0] if error else "by another rank"
            raise ValueError(
                f"the checkpoint {directory / tag} cannot be loaded ({reason}): it is damaged, or of another model. "
                f"Name an earlier one in {directory / 'latest'}, or start afresh with --fresh"
            ) from error
        return dict(meta["state"])

    def _require_fitting(self, meta: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ValueError unless a checkpoint was saved by as many ranks and at the same ZeRO stage.

        Stage 0 is an exception: every rank has everything, and any number of them can go on.
        """
        ranks, stage = meta["ranks"], meta["zero_stage"]
        if ranks != self.world.size and (stage > 0 or self.stage > 0):
            raise ValueError(
                f"{checkpoint} was saved by {ranks} ranks at ZeRO stage {stage}, this run has {self.world.size}: "
                f"start it with {ranks}"
            )
        if stage != self.stage:
            raise ValueError(
                f"{checkpoint} was saved at ZeRO stage {stage}, this run is at {self.stage}: use --zero-stage {stage}"
            )


_WRITE_ERRORS = (OSError, RuntimeError)
"""torch's zip writer raises RuntimeError when the disk is full."""
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, pickle.UnpicklingError)
"""What torch and DeepSpeed raise for damaged, forged and foreign checkpoints."""


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
        # 0.19.8 would compile a shared-memory all-reduce here, which takes 27 s, hangs for ever on a stale lock, and
        # only serves inference.
        deepspeed.ops.__compatible_ops__ = {}
    try:
        with _any_shape_broadcast():
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    except Exception as error:
        if user_path is None:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"DeepSpeed refuses {user_path}: {reason}") from error
    return engine


@contextmanager
def _any_shape_broadcast() -> Iterator[None]:
    """While it lasts, DeepSpeed gives all ranks the first one's weights whatever their shape and memory layout.

    0.19.8 views them as bytes, which fails for a scalar, such as CLIP's logit scale, and for channels last.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    def broadcast(engine: Any) -> None:
        for parameter in engine.module.parameters():
            dist.broadcast(parameter.data, src=0)

    def partition(init: Any, parameter: Any) -> None:  # of stage 3
        init._convert_to_deepspeed_param(parameter)
        parameter.data = parameter.data.contiguous()
        dist.broadcast(parameter.data, src=0)
        parameter.partition()

    originals = DeepSpeedEngine._broadcast_model, Init._zero_init_param
    DeepSpeedEngine._broadcast_model, Init._zero_init_param = broadcast, partition
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = originals


@contextmanager
def _errors_kept(errors: list[Exception]) -> Iterator[None]:
    """While it lasts, DeepSpeed's failing writes end up in `errors`, and no rank leaves the others in a barrier."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    original = TorchCheckpointEngine.save

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except _WRITE_ERRORS as error:
            errors.append(error)

    TorchCheckpointEngine.save = save
    try:
        yield
    finally:
        TorchCheckpointEngine.save = original


@contextmanager
def _tensors_only() -> Iterator[None]:
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


def checkpoint_tag(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step{step:08d}"


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
            f"{path} is missing or damaged ({error}): name an earlier checkpoint in {directory / 'latest'}, "
            "or use --fresh"
        ) from None


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _publish(directory: Path, tag: str, keep: int) -> None:
    """Let `latest` name a complete checkpoint; drop older ones, and what interrupted saves of later steps have left."""
    replace_text(directory / "latest", tag)
    tags = sorted(path for path in directory.glob("step*") if path.is_dir())
    complete = [path for path in tags if path.name <= tag]
    for path in tags:
        if path not in complete[-keep:]:
            shutil.rmtree(path, ignore_errors=True)
