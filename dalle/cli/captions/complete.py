"""`dalle complete-caption`: the text part of the transformer as a language model."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from dalle.best_of_n import check_n
from dalle.cli.command import resolve_device
from dalle.cli.options import DEFAULT_BUNDLE, Bundle, CaptionJSONLines, Device
from dalle.cli.terminal import print_table
from dalle.pipeline import Pipeline
from dalle.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class CompleteCaption:
    """Sample completions of a caption from the text part of the transformer."""

    beginning: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BEGINNING", help_behavior_hint="")]
    """How the caption begins; may be empty. Whole words are completed best."""
    bundle: Bundle = DEFAULT_BUNDLE
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """Completions."""
    tokens: int = 16
    """Tokens to draw at most; so many with the paper's transformer, which does not tell where a caption ends."""
    temperature: float = 1.0
    """Below 1 the captions are less varied; 0 always takes the likeliest token."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Sample from the k likeliest tokens only."""
    seed: int = 0
    """Same seed, same captions."""
    as_json: CaptionJSONLines = False
    device: Device = "auto"

    def run(self) -> None:
        """Print the table, or a JSON object for each completion."""
        check_n(self.n)
        Sampling(seed=self.seed, temperature=self.temperature, top_k=self.top_k)  # raises before a model is loaded
        pipe = Pipeline.load(self.bundle, resolve_device(self.device))
        completions = pipe.complete_caption(
            self.beginning,
            n=self.n,
            n_tokens=self.tokens,
            seed=self.seed,
            temperature=self.temperature,
            top_k=self.top_k,
        )
        if self.as_json:
            for one in completions:
                record = {
                    "caption": one.caption,
                    "nats": sum(one.log_likelihoods),
                    "nats_per_token": one.nats_per_token,
                }
                print(json.dumps({**record, "tokens": len(one.log_likelihoods), "ended": one.ended}))
            return
        rows = [[f"{one.nats_per_token:.3f}", f"{len(one.log_likelihoods)}", one.caption] for one in completions]
        print_table(("nats per token", "tokens", "caption"), rows)
