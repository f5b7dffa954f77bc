"""The one engine of all neural stages: DeepSpeed, on one CPU process as on many GPUs.

DeepSpeed 0.19.8 is pinned: the comments marked "0.19.8" rely on what that version does.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.checkpoints import (
    READ_ERRORS,
    WRITE_ERRORS,
    checkpoint_tag,
    errors_kept,
    latest_tag,
    publish,
    read_checkpoint,
    sync_files,
    tensors_only,
)
from training.config import OptimizerConfig, TrainConfig
from training.deepspeed_config import deepspeed_config, is_half
from training.ema import EMA
from training.reduction import Reduction
from training.world import World, agree, on_first_rank

Metrics = dict[str, Tensor]


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
        self._reduction = Reduction(self.model, config, world)
        self._engine = _initialize(objective, adamw, self.deepspeed_config, config.deepspeed_config)
        self._reduction.attach(self._engine)
        self.stage: int = self.deepspeed_config["zero_optimization"].get("stage", 0)
        self._must_gather = self.stage == 3 or is_half(self.deepspeed_config)
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
        means = {name: value / self.accumulation for name, value in sums.items()} | self._reduction.metrics()
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
        on_first_rank(lambda: publish(directory, tag, self.config.keep_last), self.world)

    def _write(self, directory: Path, tag: str, meta: dict[str, Any]) -> Exception | None:
        """Write this rank's files of a checkpoint; returns what went wrong, so that all ranks hear of it."""
        errors: list[Exception] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with errors_kept(errors):
                self._engine.save_checkpoint(str(directory), tag=tag, client_state={}, save_latest=False)
            if not errors:
                self._reduction.save(directory / tag)
            if self._ema is not None and not errors:
                average = {name: tensor.contiguous() for name, tensor in self._ema.average.items()}
                save_file(average, directory / tag / "ema.safetensors")
                meta |= {"ranks": self.world.size, "zero_stage": self.stage}
                (directory / tag / "checkpoint.json").write_text(json.dumps(meta, indent=2))
                sync_files(directory / tag)
        except (*WRITE_ERRORS, SafetensorError) as error:
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
            with tensors_only():
                path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
            if path is None:
                raise FileNotFoundError("files are missing")
            if self._ema is not None:
                self._ema.load(load_file(directory / tag / "ema.safetensors"))
            self._reduction.load(directory / tag, meta["ranks"])
        except (*READ_ERRORS, SafetensorError) as caught:
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
