"""Named sizes, from the demonstration to the paper's 12 billion parameters: functions that return configurations.

A recipe says everything the four training programs need: tokenizer, dVAE, transformer and CLIP. The paper's values are
the defaults of the configurations; a recipe states what it changes.

Order of the file: what a recipe is, recipes for CPUs, recipes of the paper's kind, and the table of all.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dalle.family.mini.config import MiniConfig
from dalle.family.transformers import TrainedConfig
from dalle.model import DALLEConfig
from dalle.sampling import SamplingDefaults
from dvae.model import DVAEConfig
from rerank.config import CLIPConfig
from training.config import OptimizerConfig, TrainConfig
from training.drawings.shapes import FROM_ONE_END
from training.schedules import Cosine, WarmupCosine, WarmupPlateau
from training.stage_recipes import CLIPRecipe, DVAERecipe, TransformerRecipe
from training.unclip_recipes import (
    DecoderRecipe,
    PriorRecipe,
    UpsamplerRecipe,
    cpu_decoder,
    cpu_prior,
    cpu_upsampler,
    paper_decoder,
    paper_prior,
    paper_upsampler,
    paper_upsampler2,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything from captions and pictures to a bundle."""

    name: str
    """As typed on the command line."""
    purpose: str
    """One line for `dalle-train plan`."""
    text_vocab: int = 16_384
    """Size of the BPE vocabulary, at most."""
    dvae: DVAERecipe
    transformer: TransformerRecipe
    clip: CLIPRecipe
    decoder: DecoderRecipe | None = None
    """DALL·E 2's, as the next two; None in recipes that have none of it."""
    prior: PriorRecipe | None = None
    upsampler: UpsamplerRecipe | None = None


CLIP_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, gradient_clipping=0.0)
"""The CLIP paper's, table 20, for a vision transformer."""

DVAE_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.0)
"""A.2 of the paper, which clips nothing."""


# ---- minutes on a CPU -------------------------------------------------------------------------------------


def _four_times(steps: int) -> int:
    """Return how often to validate, or to draw samples, in a run that does so four times, the end included."""
    return math.ceil(steps / 4)


def _cpu_dvae(image_size: int, vocab_size: int, warmup_steps: int, steps: int) -> DVAERecipe:
    """Return a dVAE of 300 thousand parameters with 4×4 pixels to a token, warmed up as an autoencoder."""
    warmup = TrainConfig(
        steps=warmup_steps,
        global_batch=16,
        optimizer=dataclasses.replace(DVAE_OPTIMIZER, gradient_clipping=0.03),
        learning_rate=WarmupCosine(peak=4e-3, warmup=50, steps=warmup_steps, final=2e-4),
        ema_decay=0.0,
        ema_every=1,
        precision="autocast",
        log_every=100,
        validate_every=_four_times(warmup_steps),
    )
    train = dataclasses.replace(
        warmup,
        steps=steps,
        optimizer=dataclasses.replace(DVAE_OPTIMIZER, gradient_clipping=0.3),
        learning_rate=WarmupCosine(peak=2e-5, warmup=20, steps=steps, final=2e-6),
        ema_decay=0.99,
        validate_every=_four_times(steps),
        sample_every=_four_times(steps),
    )
    return DVAERecipe(
        model=DVAEConfig(n_hid=32, n_init=12, n_groups=3, n_blocks=1, vocab_size=vocab_size, image_size=image_size),
        train=train,
        warmup=warmup,
        kl_weight=Cosine(start=0.0, end=0.1, steps=steps),
        temperature=Cosine(start=0.3, end=1 / 16, steps=max(1, steps * 4 // 5)),
        flip=False,
    )


def _cpu_transformer(
    model: TrainedConfig,
    *,
    steps: int,
    batch: int,
    peak: float,
    bpe_dropout: float = 0.1,
    sampling: SamplingDefaults | None = None,
    first_captions: int = 0,
) -> TransformerRecipe:
    """Return a transformer run short enough for a CPU: a cosine, no plateaus, and an average over fewer steps.

    The matrices are trained by Muon, from weights eight times as large at first, and image tokens begin from the dVAE's
    codebook.
    """
    train = TrainConfig(
        steps=steps,
        global_batch=batch,
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.01, gradient_clipping=1.0),
        learning_rate=WarmupCosine(peak=peak, warmup=100, steps=steps, final=peak / 20),
        ema_decay=0.98,
        ema_every=1,
        precision="autocast",
        log_every=50,
        validate_every=_four_times(steps),
        sample_every=_four_times(steps),
    )
    return TransformerRecipe(
        model=model,
        train=train,
        bpe_dropout=bpe_dropout,
        init_scale=8.0,
        init_from_codebook=True,
        first_captions=first_captions,
        sampling=sampling or SamplingDefaults(),
    )


def _cpu_clip(image_size: int, patch_size: int, context_length: int, steps: int) -> CLIPRecipe:
    """Return a CLIP of two million parameters, trained by Muon."""
    model = CLIPConfig(
        image_size=image_size,
        patch_size=patch_size,
        vision_width=128,
        vision_layers=4,
        vision_heads=4,
        context_length=context_length,
        vocab_size=4096,
        text_width=128,
        text_layers=3,
        text_heads=4,
        embed_dim=128,
    )
    train = TrainConfig(
        steps=steps,
        global_batch=64,
        optimizer=dataclasses.replace(CLIP_OPTIMIZER, kind="muon", weight_decay=0.05, gradient_clipping=1.0),
        learning_rate=WarmupCosine(peak=2e-3, warmup=30, steps=steps),
        ema_decay=0.0,
        ema_every=1,
        precision="autocast",
        log_every=50,
        validate_every=_four_times(steps),
    )
    return CLIPRecipe(model=model, train=train)


def _demo_clip() -> CLIPRecipe:
    """Return a CLIP that is shown wrong captions of the built-in world, so that it has to hear order."""
    base = _cpu_clip(48, 6, 26, steps=300)
    rate = WarmupCosine(peak=2e-3, warmup=50, steps=200, final=5e-4)
    warmup = dataclasses.replace(
        base.train, steps=200, global_batch=32, learning_rate=rate, validate_every=_four_times(200)
    )
    return dataclasses.replace(
        base,
        warmup=warmup,
        warmup_captions=FROM_ONE_END,
        hard_negatives=2,
        wrong_captions="world",
        paraphrases=True,
        embedding_scale=8.0,
    )


def _demo_dvae() -> DVAERecipe:
    """Return a dVAE whose tokens tell of their own pixels alone, and of no grain: a small transformer learns them."""
    base = _cpu_dvae(48, 1024, warmup_steps=1200, steps=100)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, encoder_kernel=1),
        warmup_noise=Cosine(start=0.0, end=0.15, steps=1200),
    )


_DEMO_MODEL = DALLEConfig(
    n_layers=6, d_model=128, n_heads=4, text_len=24, grid=12, text_vocab=512, image_vocab=1024, conv_kernel=5
)


def demo() -> Recipe:
    """Return the sizes of `make demo`: 48×48 drawn pictures, 12×12 tokens, minutes on two CPU cores."""
    return Recipe(
        name="demo",
        purpose="the built-in world in minutes on two CPU cores",
        text_vocab=512,
        dvae=_demo_dvae(),
        transformer=_cpu_transformer(
            _DEMO_MODEL,
            steps=1100,
            batch=16,
            peak=3e-3,
            bpe_dropout=0.0,
            sampling=SamplingDefaults(temperature=0.3),
            first_captions=FROM_ONE_END,
        ),
        clip=_demo_clip(),
        decoder=cpu_decoder(1900, no_text=0.2),
        prior=cpu_prior(200),
    )


def mini_cpu() -> Recipe:
    """Return the demonstration with DALL·E mini's encoder-decoder in place of the paper's transformer.

    A step takes about as long as the demonstration's.
    """
    base = demo()
    model = MiniConfig(
        encoder_layers=3, decoder_layers=4, d_model=128, n_heads=4, d_glu=341, text_len=26, grid=12, text_vocab=512
    )
    fitted = model.fitted(text_vocab=512, image_vocab=1024, grid=12)
    return dataclasses.replace(
        base,
        name="mini-cpu",
        purpose="DALL·E mini's encoder-decoder on the built-in world, in minutes on two CPU cores",
        transformer=dataclasses.replace(base.transformer, model=fitted, init_scale=4.0),
        decoder=None,
        prior=None,
    )


def unclip_cpu() -> Recipe:
    """Return the demonstration with longer runs of DALL·E 2's stages, and an upsampler from 48 to 96 pixels."""
    return dataclasses.replace(
        demo(),
        name="unclip-cpu",
        purpose="DALL·E 2 on the built-in world, in hours on two CPU cores",
        decoder=cpu_decoder(8000),
        prior=cpu_prior(1000),
        upsampler=cpu_upsampler(400),
    )


def one_million() -> Recipe:
    """Return a transformer of about a million parameters on 12×12 tokens: for trying things out."""
    base = demo()
    model = dataclasses.replace(_DEMO_MODEL, n_layers=4)
    return dataclasses.replace(
        base,
        name="1m",
        purpose="about 1M parameters, 12×12 tokens: for trying things out",
        transformer=dataclasses.replace(base.transformer, model=model),
        decoder=None,
        prior=None,
    )


def icons_cpu() -> Recipe:
    """Return the sizes for a few thousand captioned icons: 64×64 pictures, 16×16 tokens, two CPU cores."""
    return _small_pictures("icons-cpu", "a few thousand captioned icons on two CPU cores", transformer_steps=850)


def photos_cpu() -> Recipe:
    """Return the sizes for a few thousand captioned photographs, otherwise as `icons_cpu`."""
    return _small_pictures("photos-cpu", "a few thousand captioned photographs on two CPU cores", transformer_steps=800)


def _small_pictures(name: str, purpose: str, *, transformer_steps: int) -> Recipe:
    """Return a recipe for 64×64 pictures and 16×16 tokens, with captions of up to 31 tokens."""
    model = DALLEConfig(
        n_layers=6, d_model=192, n_heads=3, text_len=32, grid=16, text_vocab=4096, image_vocab=1024, conv_kernel=7
    )
    return Recipe(
        name=name,
        purpose=purpose,
        text_vocab=4096,
        dvae=_cpu_dvae(64, 1024, warmup_steps=1500, steps=200),
        transformer=_cpu_transformer(model, steps=transformer_steps, batch=16, peak=3e-3),
        clip=_cpu_clip(64, 8, 40, steps=400),
    )


# ---- the paper's kind -------------------------------------------------------------------------------------


def paper_dvae() -> DVAERecipe:
    """Return the paper's first stage (A.2): 3,000,000 updates of 512 pictures."""
    train = TrainConfig(
        steps=3_000_000,
        global_batch=512,
        optimizer=DVAE_OPTIMIZER,
        learning_rate=Cosine(start=1e-4, end=1.25e-6, steps=1_200_000),
        ema_decay=0.999,
        ema_every=1,
        precision="autocast",
        validate_every=10_000,
        sample_every=10_000,
        checkpoint_every=5_000,
        log_every=100,
        workers=8,
    )
    return DVAERecipe(train=train)


def _paper_transformer(
    model: DALLEConfig, *, zero_stage: int, micro_batch: int, sample_every: int
) -> TransformerRecipe:
    """Return the paper's second stage (B.2).

    Sample pictures are drawn by a whole float32 copy of the weights on the first rank's device, beside its part of the
    training: from 2.8 billion parameters on (11 GB) they wait until the end.
    """
    train = TrainConfig(
        steps=430_000,
        global_batch=1024,
        micro_batch=micro_batch,
        learning_rate=WarmupPlateau(),
        precision="bf16",
        zero_stage=zero_stage,
        activation_checkpointing=True,
        validate_every=5_000,
        sample_every=sample_every,
        checkpoint_every=1_000,
        log_every=50,
        workers=8,
    )
    return TransformerRecipe(model=model, train=train)


def paper_clip() -> CLIPRecipe:
    """Return ViT-B/32 with the CLIP paper's optimizer: batches of 32,768, and about 32 epochs of 400 million pairs."""
    train = TrainConfig(
        steps=390_000,
        global_batch=32_768,
        optimizer=CLIP_OPTIMIZER,
        learning_rate=WarmupCosine(peak=5e-4, warmup=2_000, steps=390_000),
        ema_decay=0.0,
        ema_every=1,
        precision="autocast",
        zero_stage=1,
        validate_every=5_000,
        checkpoint_every=1_000,
        log_every=100,
        workers=8,
    )
    return CLIPRecipe(train=train)


def _scaled(
    name: str, purpose: str, model: DALLEConfig, *, zero_stage: int, micro_batch: int, sample_every: int = 0
) -> Recipe:
    transformer = _paper_transformer(model, zero_stage=zero_stage, micro_batch=micro_batch, sample_every=sample_every)
    return Recipe(name=name, purpose=purpose, dvae=paper_dvae(), transformer=transformer, clip=paper_clip())


def fifty_million() -> Recipe:
    """Return the shape of the benchmarks: width 512, 8 layers, the paper's stream and vocabularies."""
    model = DALLEConfig(n_layers=8, d_model=512, n_heads=8)
    purpose = "width 512, 8 layers: the benchmarks' shape"
    return _scaled("50m", purpose, model, zero_stage=1, micro_batch=32, sample_every=5_000)


def one_billion() -> Recipe:
    """Return 24 layers of width 2048: 1.3 billion parameters."""
    model = DALLEConfig(n_layers=24, d_model=2048, n_heads=32)
    purpose = "24 layers of width 2048, for one large GPU"
    return _scaled("1.3b", purpose, model, zero_stage=1, micro_batch=16, sample_every=5_000)


def paper_2_8b() -> Recipe:
    """Return the paper's 2.8-billion-parameter model (Table 1): 64 layers of width 1920."""
    model = DALLEConfig(d_model=1920, n_heads=30)
    return _scaled("2.8b", "the paper's second size, width 1920", model, zero_stage=2, micro_batch=8)


def paper_5_6b() -> Recipe:
    """Return the paper's 5.6-billion-parameter model (Table 1): 64 layers of width 2688."""
    model = DALLEConfig(d_model=2688, n_heads=42)
    return _scaled("5.6b", "the paper's third size, width 2688", model, zero_stage=3, micro_batch=8)


def paper_12b() -> Recipe:
    """Return the paper's model (2.2, B.1): 64 layers of width 3968, 62 heads, 12 billion parameters."""
    return _scaled("12b", "the paper's model, width 3968", DALLEConfig(), zero_stage=3, micro_batch=8)


def unclip_paper() -> Recipe:
    """Return DALL·E 2's sizes (Ramesh et al. 2022, table 3), and its CLIP's (C): ViT-H/16, a text tower of width 1024.

    Tokenizer, dVAE and transformer are those of the first DALL·E, which its stages do not need.
    """
    clip = CLIPConfig(
        image_size=256,
        patch_size=16,
        vision_width=1280,
        vision_layers=32,
        vision_heads=16,
        context_length=256,
        text_width=1024,
        text_layers=24,
        text_heads=16,
        embed_dim=1024,
    )
    return dataclasses.replace(
        paper_12b(),
        name="unclip-paper",
        purpose="DALL·E 2: prior, decoder and upsampler of the paper",
        clip=dataclasses.replace(paper_clip(), model=clip),
        decoder=paper_decoder(),
        prior=paper_prior(),
        upsampler=paper_upsampler(),
    )


def unclip_paper_1024() -> Recipe:
    """Return the same with the second upsampler in place of the first."""
    return dataclasses.replace(
        unclip_paper(),
        name="unclip-paper-1024",
        purpose="DALL·E 2, with the second upsampler",
        upsampler=paper_upsampler2(),
    )


# ---- all of them ------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "icons-cpu": icons_cpu,
    "photos-cpu": photos_cpu,
    "mini-cpu": mini_cpu,
    "1m": one_million,
    "50m": fifty_million,
    "1.3b": one_billion,
    "2.8b": paper_2_8b,
    "5.6b": paper_5_6b,
    "12b": paper_12b,
    "unclip-cpu": unclip_cpu,
    "unclip-paper": unclip_paper,
    "unclip-paper-1024": unclip_paper_1024,
}


def recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown recipe {name!r}: {hint}there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def recipes_with(stage: str) -> list[str]:
    """Return the names of the recipes that have a stage."""
    return [name for name in RECIPES if getattr(recipe(name), stage) is not None]


def stage_of(recipe: Recipe, stage: str) -> Any:
    """Return what a recipe says about a stage.

    Raises:
        ValueError: it does not have the stage.
    """
    of = getattr(recipe, stage)
    if of is None:
        raise ValueError(f"the recipe {recipe.name} has no {stage}: use one of {', '.join(recipes_with(stage))}")
    return of
