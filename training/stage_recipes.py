"""What a recipe says of the first DALL·E's stages: dVAE, transformer and CLIP. Defaults are the papers'."""

import math
from dataclasses import dataclass, field

from dalle.family.transformers import TrainedConfig
from dalle.model import DALLEConfig
from dalle.sampling import SamplingDefaults
from dvae.model import DVAEConfig
from rerank.config import CLIPConfig
from training.config import TrainConfig, check_bounds
from training.drawings.wrong_captions import SOURCES, Source
from training.schedules import Cosine


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
    warmup: TrainConfig | None = None
    """A run as an autoencoder, from which the codebook is made: see `initialise_codebook` in stages/codebook.py. None
    starts from random weights, as the paper does."""
    warmup_noise: Cosine = field(default_factory=lambda: Cosine(start=0.0, end=0.0, steps=1))
    """Noise on the warm-up's bottleneck, in units of the bottleneck's RMS: see `autoencoder_loss`."""
    flip: bool = True
    """Mirror half of the training pictures, as the paper does for the dVAE; not if left and right matter in them."""


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """How the transformer is trained."""

    null_caption_probability: float = 0.0
    """Fraction of captions replaced by the empty one, which guidance needs, such as 0.1; none in the paper."""
    init_scale: float = 1.0
    """Factor of the standard deviations of the first weights; 1 for the paper's. A resumed run ignores it."""


@dataclass(frozen=True, kw_only=True)
class TransformerRecipe(TransformerOptions):
    """The second stage. Defaults: B of the paper."""

    model: TrainedConfig = field(default_factory=DALLEConfig)
    """The transformer; `text_vocab` and `image_vocab` are taken from the tokenizer and the dVAE it is trained on."""
    train: TrainConfig
    """The run."""
    bpe_dropout: float = 0.1
    """Probability of leaving out a merge, in training only."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How its bundles are sampled and ranked unless told otherwise: kept in the transformer's metadata."""
    first_captions: int = 0
    """In the first `first_share` of the steps, read only so many of a picture's captions, the first ones; 0 for all, as
    in the paper. In the built-in world those name the left or upper thing first: which words belong to which thing is
    learnt from these sooner."""
    first_share: float = 0.4
    """Share of the steps, in [0, 1]."""
    init_from_codebook: bool = False
    """Whether image tokens that look alike begin alike; not in the paper. See `DALLE.initialise_from_codebook`."""

    def __post_init__(self) -> None:
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale must be a number above 0, got {self.init_scale}")
        if self.first_captions < 0 or not 0 <= self.first_share <= 1:
            raise ValueError(
                "first_captions must be at least 0 and first_share in [0, 1], "
                f"got {self.first_captions} and {self.first_share}"
            )


MAX_HARD_NEGATIVES = 1000


@dataclass(frozen=True, kw_only=True)
class CLIPOptions:
    """How CLIP is trained."""

    hard_negatives: int = 0
    """Wrong captions per picture, made of its own by exchanging or replacing words, as further negatives. The text
    tower reads them all: 3 make its work four times as large."""


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe(CLIPOptions):
    """The reranker. Defaults: ViT-B/32 of the CLIP paper."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    """The two towers; `vocab_size` is taken from the captions."""
    train: TrainConfig
    """The run."""
    wrong_captions: Source = "words"
    """How they are made: words, of any English captions by exchanging listed words; world, of the built-in world's."""
    paraphrases: bool = False
    """Whether another caption of the same picture, where it has several, is to be near its caption."""
    warmup: TrainConfig | None = None
    """A run on the first captions of each picture, before the one on all: see `CLIPWarmupStage`."""
    warmup_captions: int = 1
    """How many of a picture's captions the warm-up takes, from the first."""
    embedding_scale: float = 1.0
    """Factor of the first embeddings' standard deviations; 1 as published. See `CLIP.initialise`."""

    def __post_init__(self) -> None:
        if self.warmup_captions < 1:
            raise ValueError(f"warmup_captions must be at least 1, got {self.warmup_captions}")
        check_bounds(self, {"hard_negatives": (0, MAX_HARD_NEGATIVES)})
        if self.wrong_captions not in SOURCES:
            raise ValueError(f"wrong_captions is {self.wrong_captions!r}; expected one of {', '.join(SOURCES)}")

    @property
    def captions_per_picture(self) -> int:
        """Captions that the text tower reads in a step for each picture."""
        return 1 + self.hard_negatives + self.paraphrases
