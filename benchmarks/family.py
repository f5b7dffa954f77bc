"""Imported models of the family: one image token for all N candidates, ours against the package that published each.

Both have the same random weights, in one process, and take turns. Reading the caption, once for a picture, is not
measured; guidance and the drawing of the token are. The packages are those of tests/references.txt.

DALL·E mini whole, 12 + 12 layers × 1024, and min-dalle 0.4.11. A step of min-dalle costs the same at every position:
it reads all 256, and computes the caption's keys and values anew for every candidate. Ours reads those up to its own,
so it is timed near the beginning, the middle and the end.
"""

import importlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Options, Report
from dalle.family.mini.cache import MiniDecoder
from dalle.family.mini.config import MINI
from dalle.family.mini.model import DALLEMini
from dalle.sampling import Sampling, choose, guide, uniforms

FOLDER = Path(sys.prefix) / "published"
SAMPLING = Sampling(top_k=256, guidance=16.0)
"""min-dalle's defaults."""
N_IMAGE = MINI.stream.n_image
TOKENS = 4
"""In a row, of ours, at each of the places where it is timed."""
STARTS = (0, (N_IMAGE - TOKENS) // 2, N_IMAGE - TOKENS)
PLAN = {1: 5, 8: 5, 64: 3}
"""By N: rounds."""
LIMITS = {8: 5.0, 64: 20.0}
"""By N: how many times as fast ours has to be."""

THEIRS, EAGER, COMPILED = "min-dalle", "ours, eager", "ours"

Step = Callable[[], object]
"""One token for all candidates."""


def package(name: str) -> Any:
    """Import a module of a reference package without running the package's own __init__.

    Raises:
        FileNotFoundError: it is not installed.
    """
    top = name.split(".")[0]
    if not (FOLDER / top).is_dir():
        raise FileNotFoundError(f"{top} is missing in {FOLDER}: `make references` installs it")
    if top not in sys.modules:
        parent = types.ModuleType(top)
        parent.__path__ = [str(FOLDER / top)]
        sys.modules[top] = parent
    return importlib.import_module(name)


@lru_cache
def our_mini() -> DALLEMini:
    """Return DALL·E mini with random weights."""
    torch.manual_seed(0)
    return DALLEMini(MINI).eval().requires_grad_(False)


@lru_cache
def min_dalle() -> Any:
    """Return min-dalle's decoder with the weights of `our_mini`, mostly the same memory."""
    module = package("min_dalle.models.dalle_bart_decoder")
    with torch.device("meta"):
        decoder = module.DalleBartDecoder(
            image_vocab_count=MINI.n_image_ids - 1,
            embed_count=MINI.d_model,
            attention_head_count=MINI.n_heads,
            glu_embed_count=MINI.d_glu,
            layer_count=MINI.decoder_layers,
            device="cpu",
        )
    ours, ones = our_mini().decoder, torch.ones(MINI.d_glu)
    state = {
        "embed_tokens.weight": ours.embedding.weight,
        "embed_positions.weight": ours.position_embedding.weight,
        "lm_head.weight": ours.head.weight,
    }
    norms = {"layernorm_embedding": ours.embedding_norm, "final_ln": ours.final_norm}
    for i, block in enumerate(ours.layers()):
        at = f"layers.{i}"
        own = block.attention.qkv.weight.chunk(3)
        cross = [block.cross.query.weight, *block.cross.key_value.weight.chunk(2)]
        for name, rows in (("self_attn", own), ("encoder_attn", cross)):
            state |= {f"{at}.{name}.{letter}_proj.weight": part for letter, part in zip("qkv", rows, strict=True)}
        state[f"{at}.self_attn.out_proj.weight"] = block.attention.out.weight
        state[f"{at}.encoder_attn.out_proj.weight"] = block.cross.out.weight
        halves = [*block.glu.wide.weight.chunk(2), block.glu.out.weight]
        state |= {f"{at}.glu.fc{number}.weight": rows for number, rows in enumerate(halves)}
        norms |= {
            f"{at}.pre_self_attn_layer_norm": block.attention_norm,
            f"{at}.self_attn_layer_norm": block.attention_out_norm,
            f"{at}.pre_encoder_attn_layer_norm": block.cross_norm,
            f"{at}.encoder_attn_layer_norm": block.cross_out_norm,
            f"{at}.glu.ln0": block.glu.norm,
            f"{at}.glu.ln1": block.glu.middle_norm,
        }
    for name, norm in norms.items():
        state[f"{name}.bias"] = norm.bias
        state[f"{name}.weight"] = ones[: len(norm.bias)] if norm.weight is None else norm.weight
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def captions() -> Tensor:
    """Return a caption of 20 tokens, and the empty one, (2, T)."""
    return torch.stack([MINI.text_rows([list(range(100, 120))])[0], MINI.null_caption()])


class OurMini:
    """Our decoder, timed at several positions."""

    def __init__(self, n: int, *, compiled: bool) -> None:
        self._decoder = MiniDecoder(our_mini(), captions(), [n, n], compile=compiled)
        self._uniforms_NI = uniforms(range(n), N_IMAGE)
        self._tokens_N = torch.zeros(n, dtype=torch.int64)

    def step(self) -> None:
        """Draw the next token of all candidates."""
        position = self._decoder.position
        logits_BV = guide(self._decoder.step(self._tokens_N.repeat(2)), SAMPLING.guidance)
        self._tokens_N = choose(logits_BV, self._uniforms_NI[:, position], SAMPLING)

    def run(self) -> None:
        """Draw `TOKENS` tokens at each of `STARTS`; what the cache holds before them does not change the time."""
        for start in STARTS:
            self._decoder.position = start
            for _ in range(TOKENS):
                self.step()


def min_dalle_step(n: int) -> Step:
    """Return min-dalle's step in the middle of the picture, as its `generate_raw_image_stream` calls it."""
    rows = [1] * n + [0] * n  # the empty caption first
    with torch.inference_mode():
        encoded_PTD, _ = our_mini().encoder(captions())
        fixed = {
            "settings": torch.tensor([SAMPLING.temperature, SAMPLING.top_k or 0, SAMPLING.guidance]),
            "attention_mask": captions()[rows].not_equal(MINI.pad)[:, None, None, :],
            "encoder_state": encoded_PTD[rows],
            "prev_tokens": torch.zeros(n, 1, dtype=torch.int64),
            "token_index": torch.tensor([N_IMAGE // 2]),
        }
        state = torch.zeros(MINI.decoder_layers, 4 * n, N_IMAGE, MINI.d_model)

    @torch.inference_mode()
    def step() -> None:
        min_dalle().sample_tokens(attention_state=state, **fixed)

    return step


def mini(n: int, options: Options, report: Report) -> None:
    """DALL·E mini: milliseconds of a token for n candidates."""
    runs = {THEIRS: min_dalle_step(n), EAGER: OurMini(n, compiled=False).run, COMPILED: OurMini(n, compiled=True).run}
    times = measure.in_turns(runs, options.n(PLAN[n]), label=f"DALL·E mini, N={n}")
    for name in (EAGER, COMPILED):
        times[name] = [seconds / (len(STARTS) * TOKENS) for seconds in times[name]]
    report.samples[f"DALL·E mini, N={n}"] = times
    if n in LIMITS:
        report.line(f"DALL·E mini, N={n}, float32", THEIRS, measure.ratio(times, THEIRS, COMPILED), LIMITS[n])


def mini_by_n(options: Options, report: Report) -> None:
    """The times of all N together."""
    found = {n: report.samples[name] for n in PLAN if (name := f"DALL·E mini, N={n}") in report.samples}
    rows: list[list[measure.Cell]] = [
        [name, *(1000 * median(times[name]) for times in found.values())] for name in (THEIRS, EAGER, COMPILED)
    ]
    for name in (EAGER, COMPILED):
        rows.append([f"{name}: times as fast", *(measure.ratio(times, THEIRS, name) for times in found.values())])
    measured = f"{len(STARTS) * TOKENS} of {N_IMAGE} tokens measured"
    title = f"DALL·E mini, guided: one token for all N candidates, ms; {measured}"
    report.table(title, ["", *(f"N={n}" for n in found)], rows)


PARTS: dict[str, Callable[[Options, Report], None]] = {
    **{f"mini-N={n}": partial(mini, n) for n in PLAN},
    "mini-by-N": mini_by_n,
}


if __name__ == "__main__":
    measure.main("family", __doc__, PARTS)
