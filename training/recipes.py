"""Named sizes, from the demonstration to the paper's 12 billion parameters: plain functions that return frozen configurations.

A recipe says everything the four training programs need: tokenizer, dVAE, transformer and CLIP. The paper's values are the defaults of
the configurations; a recipe states what it changes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

from dalle.model import DALLEConfig
from dvae.model import DVAEConfig
from rerank.model import CLIPConfig
from training.config import OptimizerConfig, TrainConfig
from training.schedules import Cosine, WarmupCosine, WarmupPlateau


@dataclass(frozen=True, kw_only=True)
class DVAERecipe:
    """The first stage. Defaults: A.2 of the paper."""

    model: DVAEConfig = field(default_factory=DVAEConfig)
    """The dVAE."""
    train: TrainConfig
    """The run."""
    kl_weight: Cosine = field(default_factory=lambda: Cosine(start=0.0, end=6.6, steps=5_000))
    """β of the KL term."""
    temperature: Cosine = field(default_factory=lambda: Cosine(start=1.0, end=1 / 16, steps=150_000))
    """τ of the Gumbel-softmax."""
    encoder_output_gain: float = 1.0
    """Factor on the encoder's output convolution at the start. Deviation: small dVAEs collapse to a few codes at 1."""
    flip: bool = True
    """Mirror half of the training pictures, as the paper does for the dVAE; no for pictures whose captions say left and right."""


@dataclass(frozen=True, kw_only=True)
class TransformerRecipe:
    """The second stage. Defaults: B of the paper."""

    model: DALLEConfig = field(default_factory=DALLEConfig)
    """The transformer; `text_vocab` and `image_vocab` are taken from the tokenizer and the dVAE it is trained on."""
    train: TrainConfig
    """The run."""
    bpe_dropout: float = 0.1
    """Probability of leaving out a merge, in training only."""
    null_caption_probability: float = 0.0
    """Fraction of captions replaced by the empty one, which guidance needs; off in the paper."""


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe:
    """The reranker. Defaults: ViT-B/32 of the CLIP paper."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    """The two towers; `vocab_size` is taken from the captions."""
    train: TrainConfig
    """The run."""


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


CLIP_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, gradient_clipping=0.0)
"""The CLIP paper's, table 20, for a vision transformer."""

DVAE_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.0)
"""A.2 of the paper, which clips nothing."""


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


def _paper_transformer(model: DALLEConfig, *, zero_stage: int) -> TransformerRecipe:
    train = TrainConfig(
        steps=430_000,
        global_batch=1024,
        learning_rate=WarmupPlateau(),
        precision="bf16",
        zero_stage=zero_stage,
        activation_checkpointing=True,
        validate_every=5_000,
        checkpoint_every=1_000,
        log_every=50,
        workers=8,
    )
    return TransformerRecipe(model=model, train=train)


def _scaled(name: str, purpose: str, model: DALLEConfig, zero_stage: int) -> Recipe:
    return Recipe(
        name=name,
        purpose=purpose,
        dvae=paper_dvae(),
        transformer=_paper_transformer(model, zero_stage=zero_stage),
        clip=paper_clip(),
    )


def one_million() -> Recipe:
    """Return a transformer of about a million parameters on 8×8 tokens: for trying things out."""
    base = demo()
    model = dataclasses.replace(base.transformer.model, n_layers=4, d_model=128, n_heads=4)
    return dataclasses.replace(
        base,
        name="1m",
        purpose="about 1M parameters, 8×8 tokens: for trying things out",
        transformer=dataclasses.replace(base.transformer, model=model),
    )


def demo() -> Recipe:
    """Return the sizes of `make demo`: 64×64 pictures, 8×8 tokens, minutes on two CPU cores."""
    dvae = DVAERecipe(
        model=DVAEConfig(n_hid=32, n_init=32, n_blocks=1, vocab_size=512, image_size=64),
        train=TrainConfig(
            steps=1000,
            global_batch=32,
            optimizer=DVAE_OPTIMIZER,
            learning_rate=WarmupCosine(peak=2e-3, warmup=50, steps=1000, final=1e-4),
            ema_decay=0.98,
            ema_every=1,
            validate_every=0,
            log_every=50,
        ),
        kl_weight=Cosine(start=0.0, end=1.0, steps=500),
        temperature=Cosine(start=1.0, end=1 / 16, steps=800),
        encoder_output_gain=8.0,
        flip=False,
    )
    transformer = TransformerRecipe(
        model=DALLEConfig(
            n_layers=8, d_model=256, n_heads=4, text_len=40, grid=8, text_vocab=512, image_vocab=512, conv_kernel=5
        ),
        train=TrainConfig(
            steps=1500,
            global_batch=32,
            learning_rate=WarmupCosine(peak=1e-3, warmup=100, steps=1500, final=5e-5),
            ema_decay=0.98,
            ema_every=1,
            log_every=50,
        ),
    )
    clip = CLIPRecipe(
        model=CLIPConfig(
            image_size=64,
            patch_size=8,
            vision_width=128,
            vision_layers=4,
            vision_heads=4,
            context_length=48,
            vocab_size=512,
            text_width=128,
            text_layers=3,
            text_heads=4,
            embed_dim=128,
        ),
        train=TrainConfig(
            steps=800,
            global_batch=128,
            optimizer=CLIP_OPTIMIZER,
            learning_rate=WarmupCosine(peak=1e-3, warmup=50, steps=800),
            ema_decay=0.0,
            ema_every=1,
            log_every=50,
        ),
    )
    return Recipe(
        name="demo",
        purpose="the built-in world in minutes on two CPU cores",
        text_vocab=512,
        dvae=dvae,
        transformer=transformer,
        clip=clip,
    )


def fifty_million() -> Recipe:
    """Return the shape of the benchmarks: width 512, 8 layers, the paper's stream and vocabularies."""
    return _scaled(
        "50m", "width 512, 8 layers: the benchmarks' shape", DALLEConfig(n_layers=8, d_model=512, n_heads=8), 1
    )


def one_billion() -> Recipe:
    """Return 24 layers of width 2048: 1.3 billion parameters."""
    return _scaled(
        "1.3b", "24 layers of width 2048, for one large GPU", DALLEConfig(n_layers=24, d_model=2048, n_heads=32), 1
    )


def paper_2_8b() -> Recipe:
    """Return the paper's 2.8-billion-parameter model (Table 1): 64 layers of width 1920."""
    return _scaled("2.8b", "the paper's second size, width 1920", DALLEConfig(d_model=1920, n_heads=30), 2)


def paper_5_6b() -> Recipe:
    """Return the paper's 5.6-billion-parameter model (Table 1): 64 layers of width 2688."""
    return _scaled("5.6b", "the paper's third size, width 2688", DALLEConfig(d_model=2688, n_heads=42), 3)


def paper_12b() -> Recipe:
    """Return the paper's model (2.2, B.1): 64 layers of width 3968, 62 heads, 12 billion parameters."""
    return _scaled("12b", "the paper's model, width 3968", DALLEConfig(), 3)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "1m": one_million,
    "50m": fifty_million,
    "1.3b": one_billion,
    "2.8b": paper_2_8b,
    "5.6b": paper_5_6b,
    "12b": paper_12b,
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
