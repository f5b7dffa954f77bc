"""Plans a recipe before anything is allocated: parameters, arithmetic, bytes per GPU in every mode, and time.

Models are built on the meta device: the 12-billion-parameter recipe is planned in a second on a laptop. The bytes come
from training/plan/memory_model.py.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping

from torch import nn

from dalle.family.mini.config import MiniConfig
from dalle.family.transformers import Trained, TrainedConfig, new_transformer
from dalle.model import DALLEConfig
from dalle.output.text import GIB
from dvae.model import DVAE, DVAEConfig
from rerank.model import CLIP
from storage.disk import nearest_folder
from training.config import TrainConfig
from training.engine.muon import block_matrices
from training.engine.parts.buffers import live
from training.plan.advice import advice, divisors, recommended
from training.plan.costs.checkpoints import GB, Saved, Speeds, checkpoint_of, measured_speeds
from training.plan.costs.communication import Communication, Counts, Network, Step, communications, papers_rank
from training.plan.flops import (
    clip_flops,
    decoder_flops,
    dvae_flops,
    flops_per_sample,
    prior_flops,
    training_flops,
    upsampler_flops,
)
from training.plan.memory_model import Run, host_peak, moments, peak_bytes, training_peak
from training.plan.options import PlanOptions
from training.plan.pauses import pauses
from training.plan.state import Mode, Sizes, modes_of, preset_name, shapes_only, state_bytes
from training.plan.types import RESERVED_FRACTION, ModePlan, OtherStage, Plan
from training.recipes import Recipe
from unclip import Decoder, Prior, Upsampler

MAX_SAMPLES = 32
"""Largest micro-batch that the plan shows beside its own."""
H100_TFLOPS = {False: 989.0, True: 67.0}
"""Dense TFLOP/s of one H100 (SXM) by its data sheet, by whether they are in float32."""


def make_plan(recipe: Recipe, options: PlanOptions) -> Plan:
    """Plan a recipe's transformer, and parameters, arithmetic and state of its dVAE and CLIP.

    Raises:
        ValueError: an option is impossible, the GPUs cannot share the batch evenly, or the micro-batch does not divide
            the share of a GPU.
    """
    options.check()
    gpus = options.gpus
    config, train = recipe.transformer.model, recipe.transformer.train
    precision, optimizer = options.precision or train.precision, options.optimizer or train.optimizer.kind
    samples = _micro_batch(train, gpus, options.micro_batch)
    with shapes_only():
        model, dvae, clip = new_transformer(config), DVAE(recipe.dvae.model), CLIP(recipe.clip.model)
    parameters = model.n_parameters()
    run = Run(
        config=stand_in(config),
        sizes=Sizes.of(model),
        mode=Mode(zero_stage=0, precision="fp32"),
        gpus=gpus,
        micro_batch=samples,
        accumulation=train.global_batch // (gpus * samples),
        checkpointing=train.activation_checkpointing,
        optimizer=optimizer,
        dvae_weights=4.0 * sum(parameter.numel() for parameter in dvae.parameters()),
        dvae_working=_dvae_working(recipe.dvae.model),
    )
    speeds = _speeds(options)
    modes = tuple(_mode_plan(run, mode, train, options.gpu_memory, speeds) for mode in modes_of(precision))
    recommendation = recommended(recipe, gpus, samples, modes, optimizer)
    plan = Plan(
        recipe=recipe.name,
        purpose=recipe.purpose,
        model=stand_in(config),
        gpus=gpus,
        gpu_memory_gib=options.gpu_memory,
        precision=precision,
        optimizer=optimizer,
        checkpointing=train.activation_checkpointing,
        micro_batch=samples,
        accumulation=train.global_batch // (gpus * samples),
        global_batch=train.global_batch,
        steps=train.steps,
        parameters=parameters,
        flops_per_sample=flops_per_sample(config, parameters["attention"] + parameters["mlp"]),
        sparse_flops_per_sample=float(training_flops(config)),
        mfu=options.mfu,
        peak_tflops=options.peak_tflops or H100_TFLOPS[precision == "fp32"],
        modes=modes,
        recommendation=recommendation,
        advice=() if recommendation else tuple(advice(run, precision, train.global_batch, options.gpu_memory)),
        dvae=_other_stage(
            {"encoder": dvae.encoder, "decoder": dvae.decoder},
            dvae,
            dvae_flops(dvae.config),
            recipe.dvae.train,
            gpus,
            speeds,
        ),
        clip=_other_stage(
            {"image tower": clip.vision, "text tower": clip.text},
            clip,
            clip_flops(clip.config, recipe.clip.captions_per_picture),
            recipe.clip.train,
            gpus,
            speeds,
        ),
        unclip=_unclip_stages(recipe, gpus, speeds),
        checkpoint_every=train.checkpoint_every,
        keep_last=train.keep_last,
        keep_every=train.keep_every,
        disk=speeds,
        disk_free=shutil.disk_usage(nearest_folder(options.out)).free if options.out else None,
        network=_network(options),
        communication=(),
        gpu_hour_price=options.gpu_hour_price,
    )
    return dataclasses.replace(plan, communication=tuple(_communications(plan, model, train, options)))


def stand_in(config: TrainedConfig) -> DALLEConfig:
    """Return the model whose activations are counted: an encoder-decoder counts as a dense decoder of all its layers.

    A layer of either keeps about as much of a position, but each of the encoder-decoder's works on a part of the
    stream only: its own activations are fewer.
    """
    if not isinstance(config, MiniConfig):
        return config
    return DALLEConfig(
        n_layers=config.encoder_layers + config.decoder_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        text_len=config.text_len,
        grid=config.grid,
        text_vocab=config.text_vocab,
        image_vocab=config.image_vocab,
        attention="dense",
    )


def _speeds(options: PlanOptions) -> Speeds:
    """Return the speeds that are assumed: measured on the run's disk if it is named; --disk goes before that."""
    speeds = measured_speeds(options.out) if options.out else Speeds()
    if options.disk is None:
        return speeds
    return dataclasses.replace(speeds, write=options.disk * GB, read=options.disk * GB, source="given")


def _network(options: PlanOptions) -> Network | None:
    """Return the GPUs and the speeds between them, in bytes a second; None if none is given."""
    if options.network is None:
        return None
    per_host = min(options.gpus, options.gpus_per_host)
    return Network(
        gpus=options.gpus,
        per_host=per_host,
        in_host=options.gpu_link * 1e9 / 8,
        between_hosts=options.network * 1e9 / 8,
    )


def _communications(plan: Plan, model: Trained, train: TrainConfig, options: PlanOptions) -> Iterator[Communication]:
    """Yield the rows of the table of communication; none without a network."""
    if plan.network is None:
        return
    rank = options.powersgd_rank or train.powersgd_rank or papers_rank(model.config.d_model)
    sizes = Sizes.of(model)
    step = Step(
        counts=Counts.of(model, rank),
        mode=Mode(zero_stage=1, precision=plan.precision),
        accumulation=plan.accumulation,
        ema_every=train.ema_every,
        live=live(sizes.total, sizes.largest),
        optimizer=plan.optimizer,
    )
    yield from communications(step, rank, plan.network, computing_s=plan.computing_s, steps=plan.steps)


def _micro_batch(train: TrainConfig, gpus: int, wanted: int | None) -> int:
    """Return the samples per GPU and forward pass: as wanted, or the recipe's, or fewer if many GPUs share the batch.

    Raises:
        ValueError: the GPUs cannot share the batch evenly, or `wanted` does not divide the share of one.
    """
    share, rest = divmod(train.global_batch, gpus)
    if rest:
        raise ValueError(
            f"{gpus} GPUs cannot share a batch of {train.global_batch} evenly: give --gpus a number that divides it"
        )
    if wanted is None:
        return math.gcd(train.micro_batch or share, share)
    if wanted < 1 or share % wanted:
        raise ValueError(
            f"--micro-batch {wanted} does not divide the {share} samples of a GPU (a batch of {train.global_batch} on "
            f"{gpus} GPUs): give one of {', '.join(map(str, divisors(share)))}"
        )
    return wanted


def _dvae_working(config: DVAEConfig) -> float:
    """Return the encoder's working bytes per picture: input, branch and sum of a block of its first group."""
    return 4.0 * 3 * config.n_hid * config.image_size**2


def _mode_plan(run: Run, mode: Mode, train: TrainConfig, gpu_memory_gib: float, speeds: Speeds) -> ModePlan:
    usable = gpu_memory_gib * (1 - RESERVED_FRACTION) * GIB
    run = dataclasses.replace(run, mode=mode)
    totals = {n: peak_bytes(run, train.global_batch, n) for n in divisors(train.global_batch // run.gpus)}
    shown = {n for n in totals if n <= MAX_SAMPLES and n.bit_count() == 1} | {run.micro_batch}
    moment, memory = training_peak(run)
    start = moments(run)["start"].total
    saved = Saved(total=run.sizes.total, by_muon=run.by_muon)
    return ModePlan(
        preset=preset_name(mode),
        mode=mode,
        moment=moment,
        peak=memory,
        total=memory.total,
        start=start,
        sampling=pauses(run)["sampling"].total,
        host=host_peak(run),
        fits=max(memory.total, start) <= usable,
        totals={n: total for n, total in totals.items() if n in shown},
        largest_micro_batch=max((n for n, total in totals.items() if total <= usable), default=0),
        checkpoint=checkpoint_of(saved, mode, run.gpus, train, speeds),
    )


def _unclip_stages(recipe: Recipe, gpus: int, speeds: Speeds) -> dict[str, OtherStage]:
    """Return the needs of DALL·E 2's stages, as far as a recipe has them."""
    stages = {}
    with shapes_only():
        if recipe.prior is not None:
            prior = Prior(recipe.prior.model)
            stages["prior"] = _other_stage(
                {"blocks": prior.blocks}, prior, prior_flops(prior), recipe.prior.train, gpus, speeds
            )
        if recipe.decoder is not None:
            decoder = Decoder(recipe.decoder.model)
            stages["decoder"] = _other_stage(
                {"U-Net": decoder.unet}, decoder, decoder_flops(decoder), recipe.decoder.train, gpus, speeds
            )
        if recipe.upsampler is not None:
            upsampler = Upsampler(recipe.upsampler.model)
            stages["upsampler"] = _other_stage(
                {"U-Net": upsampler.unet}, upsampler, upsampler_flops(upsampler), recipe.upsampler.train, gpus, speeds
            )
    return stages


def _other_stage(
    parts: Mapping[str, nn.Module],
    model: nn.Module,
    forward_flops: int,
    train: TrainConfig,
    gpus: int,
    speeds: Speeds,
) -> OtherStage:
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    by_muon = sum(p.numel() for p in block_matrices(model)) if train.optimizer.kind == "muon" else 0
    mode = Mode(zero_stage=train.zero_stage, precision=train.precision)
    stages = range(1 if train.precision == "bf16" else 0, 4)
    return OtherStage(
        parameters=counts | {"total": total},
        flops_per_sample=3.0 * forward_flops,
        precision=train.precision,
        state={stage: state_bytes(total, train.precision, stage, gpus, by_muon=by_muon) for stage in stages},
        checkpoint=checkpoint_of(Saved(total=total, by_muon=by_muon), mode, gpus, train, speeds),
    )
