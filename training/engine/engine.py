"""The one engine of all neural stages: DeepSpeed, on one CPU process as on many GPUs.

DeepSpeed 0.19.8 is pinned: comments marked "0.19.8" rely on what that version does.
"""

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.output.text import Say
from storage.atomic import write_public
from training.engine import resharding
from training.engine.checkpoints import (
    READ_ERRORS,
    UNIVERSAL,
    first_good,
    first_line,
    plain_path,
    read_manifest,
    resumable_tags,
    set_latest,
)
from training.engine.deepspeed_config import ResolvedConfig, is_half
from training.engine.muon import MuonAdamW
from training.engine.objective import Tensors, not_finite_throughout, on_device, unfuse_linear_layers
from training.engine.optimizer import build_optimizer, restore_settings, settings_of
from training.engine.parts.averages import AveragesInParts
from training.engine.parts.buffers import buffer_sizes
from training.engine.parts.cutting import bounds
from training.engine.parts.ema import Averages, Weights
from training.engine.parts.start import start
from training.engine.random_states import random_file, random_states, restore_random_states
from training.engine.reduction import Reduction
from training.engine.saving import Saver
from training.patches import (
    leave_gradients_whole,
    tensors_only,
    writes_recorded,
)
from training.ranks.ranks import Ranks, agree, from_all_ranks, on_first_rank
from training.run_files import LATEST, checkpoint_tag

logger = logging.getLogger(__name__)


class Engine:
    """A model in training: its weights, optimizer and averaged weights, over all ranks.

    Args:
        objective: a module with a `model`, which is trained; called with keyword arguments, it returns the loss and its
            metrics, 0-d or 1-d tensors.
        config: the run, as `resolve` returns it.
        ranks: the ranks of the run.

    Raises:
        ValueError: DeepSpeed refuses the user's JSON, or the model has no matrices for Muon.
    """

    def __init__(self, objective: nn.Module, config: ResolvedConfig, ranks: Ranks) -> None:
        self.ranks, self.config, self.stage = ranks, config.config, config.config.zero_stage
        self.micro_batch, self.accumulation = config.micro_batch, config.accumulation
        self.model = cast(nn.Module, objective.model)
        shapes = {name: weight.shape for name, weight in self.model.named_parameters()}
        zero = {**buffer_sizes(self.stage, shapes.values()), **config.deepspeed["zero_optimization"]}
        self.deepspeed_config = {**config.deepspeed, "zero_optimization": zero}
        optimizer = build_optimizer(self.model, self.config.optimizer, self.config.learning_rate.at(0), ranks)
        self._reduction = Reduction(self.model, self.config, ranks)
        self._engine = start(objective, optimizer, self.deepspeed_config, self.config.deepspeed_config, ranks)
        self._reduction.attach(self._engine)
        if self.stage == 3:
            unfuse_linear_layers(self.model)
        if isinstance(optimizer, MuonAdamW) and self.stage > 0:
            optimizer.place(self._engine.optimizer)
        if self.stage == 0:
            self._norm = torch.zeros(())
            optimizer.register_step_pre_hook(self._clip)
            leave_gradients_whole(self._engine)
        self.applied: int | Tensor = 1
        """Whether the last step was applied: 1 or 0, as a 0-d tensor where only the GPU knows."""
        self.overflowed = False
        """Whether the last step was skipped because float16's loss scale, which has room to fall, was too large."""
        self.averages = self._averages(shapes)
        self.saver = Saver(self.config, ranks)

    @property
    def batch(self) -> str:
        """The parts of the global batch, in one line."""
        unit, units = ("GPU", "GPUs") if self.ranks.device.type == "cuda" else ("process", "processes")
        units = unit if self.ranks.size == 1 else units
        return (
            f"global batch {self.config.global_batch} = {self.micro_batch} per {unit} × {self.ranks.size} {units} × "
            f"{self.accumulation} accumulated"
        )

    def train(self) -> None:
        """Switch the model to training mode."""
        self._engine.train()

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Switch the model to evaluation meanwhile; then give back what stage 3 has left gathered. Collective."""
        self.model.eval()
        yield
        self.train()
        if self.stage == 3:  # 0.19.8: as around a checkpoint; a backward pass would have done it
            self._engine.optimizer.checkpoint_event_prologue()
            self._engine.optimizer.checkpoint_event_epilogue()

    def forward(self, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensors]:
        """Return the loss and the metrics of the objective for one micro-batch, without a gradient."""
        with torch.no_grad():
            return self._loss(arguments)

    def _loss(self, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensors]:
        return cast(tuple[Tensor, Tensors], self._engine(**on_device(arguments, self.ranks.device)))

    def step(self, micro_batches: Sequence[Mapping[str, Any]], learning_rate: float, step: int) -> Tensors:
        """Take an optimizer step.

        If the loss of any rank, or the gradient, is not finite, all ranks skip the step: weights, moments, their count
        and the averaged weights stay as they are. `applied` then says so.

        Args:
            micro_batches: the objective's arguments for each of this rank's `accumulation` micro-batches; tensors move
                to the device one micro-batch at a time.
            learning_rate: of this step.
            step: number of the step, from 0.

        Returns:
            The metrics of the objective, and the loss, averaged over the micro-batches; the gradient norm before
            clipping; with float16, the loss scale.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums: Tensors = {}
        scale = self._loss_scale
        for arguments in micro_batches:
            loss, metrics = self._loss(arguments)
            self._engine.backward(not_finite_throughout(loss))
            # after the last backward pass this clips and applies the gradients, averaged over micro-batches and ranks
            self._engine.step()
            self.ranks.watch.touch()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        means = {name: value / self.accumulation for name, value in sums.items()} | self._reduction.metrics()
        means["grad_norm"] = self._set_applied()
        self.overflowed = self._reduction.overflowed
        if scale is not None:
            means["loss_scale"] = torch.tensor(scale)
            self.overflowed = not self.applied and scale > self._engine.optimizer.loss_scaler.min_scale
        if (step + 1) % self.config.ema_every == 0 and (self.stage == 0 or self.applied):
            self.averages.update(self.applied)
        return means

    def _set_applied(self) -> Tensor:
        """Set `applied`; returns the gradient norm.

        At ZeRO 0 only the device knows, and reading it would wait for a GPU in every step. At 1 to 3 DeepSpeed itself
        reads the norm in every step, and decides.
        """
        if self.stage == 0:
            is_finite = self._norm.isfinite()
            self.applied = is_finite.float() if is_finite.is_cuda else int(is_finite)
            return self._norm
        self.applied = int(self._engine.was_step_applied())
        if not self.applied and self.stage < 3 and self.config.offload != "none":
            # 0.19.8 forgets these buffers only after a step that was applied: the next step would add to them
            optimizer = self._engine.optimizer
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def _clip(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Clip the gradients, and let the optimizer skip a step whose gradient is not finite.

        The optimizer calls it at ZeRO 0, where DeepSpeed checks no gradient. Ranks agree: they have the same sums.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        self._norm = nn.utils.get_total_norm([weight.grad for weight in weights])
        if self.deepspeed_config["gradient_clipping"] > 0:
            nn.utils.clip_grads_with_norm_(weights, self.deepspeed_config["gradient_clipping"], self._norm)
        optimizer.found_inf = (~self._norm.isfinite()).float()  # type: ignore[attr-defined]  # read by AdamW's step

    @property
    def _loss_scale(self) -> float | None:
        """The dynamic loss scale of float16; None without one."""
        scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None)
        return float(scaler.cur_scale) if getattr(scaler, "dynamic", False) else None

    def weights_are_finite(self) -> bool:
        """Return whether all weights that the optimizer holds, on all ranks, are finite. Collective."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            weights = [safe_get_local_fp32_param(parameter) for parameter in self.model.parameters()]
        else:
            weights = [weight for group in self._engine.optimizer.param_groups for weight in group["params"]]
        are_finite = [weight.isfinite().all() for weight in weights]
        return not agree(bool(are_finite) and not torch.stack(are_finite).all().item(), self.ranks)

    def _averages(self, shapes: Mapping[str, torch.Size]) -> Averages:
        """Return the averaged weights, which begin as the weights are. Collective."""
        if self.stage == 3:
            return AveragesInParts(self._own_parts, shapes, self.config.ema_decay, self.ranks)
        return Averages(self._gather, self.config.ema_decay, self.ranks)

    def _own_parts(self) -> Weights:
        """Return this rank's parts of the float32 weights at stage 3, flat, on the CPU."""
        from deepspeed.utils import safe_get_local_fp32_param

        parts: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            begin, end = bounds(parameter.ds_numel, self.ranks)  # type: ignore[attr-defined]  # DeepSpeed's
            parts[name] = safe_get_local_fp32_param(parameter)[: end - begin].cpu()
        return parts

    def _gather(self) -> Weights:
        """Return the model's whole weights in float32. Collective.

        If ranks hold parts of them, only the first rank gets them, on the CPU: a GPU may not have room for all.
        """
        if self.stage < 3 and not is_half(self.deepspeed_config):
            return dict(self.model.named_parameters())
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self.model.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if self.ranks.is_first:
                gathered[name] = whole.reshape(getattr(parameter, "ds_shape", parameter.shape)).cpu()
        return gathered

    def save(self, directory: Path, step: int, state: Mapping[str, Any]) -> None:
        """Save a checkpoint, read it back, let `latest` name it, then drop old ones. Collective.

        With a `stage_dir`, a call that follows does all but the writing: `publish_staged`, or the next `save`.

        Args:
            directory: the run's checkpoints; the same folder for all ranks.
            step: optimizer steps done so far; names the checkpoint.
            state: plain numbers, strings and lists that `load` returns.

        Raises:
            OSError: it, or the one before it, could not be written; an earlier checkpoint stays good.
        """
        manifest = {"step": step, "ranks": self.ranks.size, "zero_stage": self.stage, "state": dict(state)}
        manifest |= {"optimizer": self.config.optimizer.kind}
        self.saver.save(directory, checkpoint_tag(step), manifest, self._write)

    def _write(self, directory: Path, tag: str) -> list[Path]:
        """Write this rank's files of a checkpoint, and return them.

        Raises:
            OSError, RuntimeError, SafetensorError: one could not be written.
        """
        folder = directory / tag
        written: list[Path] = []
        errors: list[Exception] = []
        with writes_recorded(written, errors):
            self._engine.save_checkpoint(str(directory), tag=tag, client_state={}, save_latest=False)
        if errors:
            raise errors[0]
        written += self._reduction.save(folder)
        written.append(folder / random_file(self.ranks.rank))
        write_public(written[-1], lambda path: save_file(random_states(self.ranks.device), path))
        return written + self.averages.save(folder)

    def load(self, directory: Path, tag: str | None = None, say: Say = logger.info) -> dict[str, Any]:
        """Resume from a checkpoint; returns the state given to `save`. Collective.

        Passes over damaged checkpoints to the newest good one, and lets `latest` name it. Restores random states if as
        many ranks saved them.

        Args:
            directory: the run's checkpoints.
            tag: the only one to load; None for the newest.
            say: told of a conversion for another number of ranks, which takes time.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none is good; or it is of another model, another optimizer, or a ZeRO stage that cannot be
                converted to this one.
        """
        tags = from_all_ranks(resumable_tags(directory) if tag is None else [tag], self.ranks)[0]
        if not tags:
            raise FileNotFoundError(f"no checkpoint in {directory}")
        good, wrong = first_good(directory, tags, self.ranks)
        if good is None:
            raise ValueError(
                f"the checkpoint {', '.join(str(directory / bad) for bad in tags)} cannot be loaded "
                f"({'; '.join(wrong)}): put back a good one and name it in {directory / LATEST}, or start anew "
                "with --fresh"
            )
        if wrong and self.ranks.is_first:
            logger.warning("%s: going back to %s, the newest good checkpoint", "; ".join(wrong), directory / good)
        manifest = read_manifest(directory / good)
        self._load_from(directory, good, manifest, say)
        on_first_rank(lambda: set_latest(directory, good), self.ranks)
        return dict(manifest["state"])

    def _load_from(self, directory: Path, tag: str, manifest: Mapping[str, Any], say: Say) -> None:
        """Load a checkpoint whose files are good; raises ValueError if it does not fit."""
        folder = directory / tag
        # checkpoints of version 0.1 do not name it
        saved_by, optimizer = manifest.get("optimizer", "adamw"), self.config.optimizer.kind
        if saved_by != optimizer:
            raise ValueError(
                f"{folder} was saved with optimizer {saved_by}, and this run's is {optimizer}, which cannot use its "
                f"state. Resume with `dalle-train STAGE … --optimizer {saved_by}`, or start anew with --fresh"
            )
        saved, now = (manifest["ranks"], manifest["zero_stage"]), (self.ranks.size, self.stage)
        is_other = resharding.must_reshard(folder, saved, now)
        if is_other:
            say(f"{tag} was saved by {saved[0]} rank{'s' if saved[0] > 1 else ''}: converting it for {now[0]}")
            resharding.convert(directory, tag, self.ranks)
        error: Exception | None = None
        settings = settings_of(self._engine.optimizer)
        try:
            # 0.19.8 prints while it loads what was saved at stage 1 in bf16
            with tensors_only(), plain_path(directory) as plain, contextlib.redirect_stdout(io.StringIO()):
                if is_other:
                    path = resharding.load_universal(self._engine, plain / UNIVERSAL, tag)
                else:
                    path, _ = self._engine.load_checkpoint(str(plain), tag=tag)
            if path is None:
                raise FileNotFoundError("files are missing")
            restore_settings(self._engine.optimizer, settings, self.deepspeed_config["gradient_clipping"])
            self.averages.load(folder, saved[0])
            if saved[0] == now[0]:
                restore_random_states(load_file(folder / random_file(self.ranks.rank)), self.ranks.device)
            self._reduction.load(folder, saved[0])
        except (*READ_ERRORS, SafetensorError) as caught:
            error = caught
        has_failed = agree(error is not None, self.ranks)  # from here on every rank has read what it needs
        if is_other and self.ranks.is_first:
            shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)
        if has_failed:
            reason = first_line(error) if error else "by another rank"
            raise ValueError(
                f"the checkpoint {folder} cannot be loaded ({reason}): its files are as they were written, so it is "
                f"of another model, precision or program. Name another one in {directory / LATEST}, or start anew "
                "with --fresh"
            ) from error
