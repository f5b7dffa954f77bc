"""Imported models of the family: one image token for all N candidates, ours against the package that published each.

Both have the same random weights, in one process, and take turns. Reading the caption, once for a picture, is not
measured; guidance and the drawing of the token are. The packages are those of tests/references.txt.

DALL·E mini whole, 12 + 12 layers × 1024, and min-dalle 0.4.11. A step of min-dalle costs the same at every position:
it reads all 256, and computes the caption's keys and values anew for every candidate. Ours reads those up to its own,
so it is timed near the beginning, the middle and the end.

ruDALLE's width and vocabularies, 2048 wide with 16 heads, and rudalle 1.1.3: 4 of Malevich's 24 layers, which fit
beside its caches for 64 candidates. It is timed after a few dozen tokens. There a step of rudalle is at its cheapest:
it computes norms and logits of the whole sequence anew, which is most of its work, and copies all keys and values, so
it takes longer with every token. Ours costs the same everywhere.
With 24 layers the logits are a smaller part: the table says how many times as many multiplications rudalle then does.

The VQGAN of DALL·E mini, f16 with 16,384 codes, and min-dalle's half of it: a picture of 256 × 256 decoded.
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
from dalle.attention import Kind
from dalle.family.mini.cache import MiniDecoder
from dalle.family.mini.config import MINI
from dalle.family.mini.model import DALLEMini
from dalle.family.variants.config import VariantConfig
from dalle.family.variants.model import VariantDALLE, VariantDecoder
from dalle.importers.rudalle import SAMPLING as RUDALLE_DEFAULTS
from dalle.importers.rudalle import published_name
from dalle.sampler.draw import guide, uniforms
from dalle.sampling import Sampling, choose
from dvae.vqgan import VQGAN, VQGANConfig

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
    parts = name.split(".")[:-1]
    if not (FOLDER / parts[0]).is_dir():
        raise FileNotFoundError(f"{parts[0]} is missing in {FOLDER}: `make references` installs it")
    for depth in range(1, len(parts) + 1):
        parent = types.ModuleType(".".join(parts[:depth]))
        parent.__path__ = [str(FOLDER.joinpath(*parts[:depth]))]
        sys.modules.setdefault(parent.__name__, parent)
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


RUDALLE_LAYERS, MALEVICH_LAYERS = 4, 24
"""Those that are measured, and those of the published model."""
KNOWN = 24
"""Image tokens that are there when a step is timed."""
RUDALLE_SAMPLING = RUDALLE_DEFAULTS.sampling()


@lru_cache
def our_rudalle() -> VariantDALLE:
    """Return a shallow ruDALLE with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"text_len": 128, "grid": 32, "text_vocab": 16_384, "image_vocab": 8_192}
    config = VariantConfig(n_layers=RUDALLE_LAYERS, d_model=2048, n_heads=16, variant="ruDALLE v3", **sizes)
    return VariantDALLE(config).eval().requires_grad_(False)


@lru_cache
def rudalle_model() -> Any:
    """Return rudalle's model with the weights of `our_rudalle`, mostly the same memory."""
    module = package("rudalle.dalle.model")
    ours = our_rudalle()
    config = ours.config
    with torch.device("meta"):
        model = module.DalleModel(
            device="cpu",
            num_layers=RUDALLE_LAYERS,
            vocab_size=config.n_text_ids,
            hidden_size=config.d_model,
            num_attention_heads=config.n_heads,
            embedding_dropout_prob=0.1,
            attention_dropout_prob=0.1,
            output_dropout_prob=0.1,
            text_seq_length=config.text_len,
            image_tokens_per_dim=config.grid,
            image_vocab_size=config.image_vocab,
            cogview_sandwich_layernorm=True,
            cogview_pb_relax=True,
        )
    state = {published_name(name): weight for name, weight in ours.state_dict().items() if "head" not in name}
    for end in ("weight", "bias"):
        heads = [getattr(head, end) for head in (ours.text_head, ours.image_head)]
        state[f"to_logits.1.{end}"] = torch.cat(heads)
    kinds: tuple[tuple[str, Kind], ...] = (("row", "row"), ("col", "column"), ("conv", "conv cut"))
    state |= {f"transformer.{name}_mask": ours.mask(kind) for name, kind in kinds}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def our_rudalle_run(n: int) -> Step:
    """Return a run of `TOKENS` tokens by our decoder."""
    model = our_rudalle()
    text = model.config.text_rows([list(range(100, 120))])
    decoder = VariantDecoder(model, text, [n], torch.zeros(1, KNOWN, dtype=torch.int64))
    uniforms_NI = uniforms(range(n), model.config.stream.n_image)
    tokens_N = choose(decoder.step(torch.zeros(n, dtype=torch.int64)), uniforms_NI[:, 0], RUDALLE_SAMPLING)

    def run() -> None:
        nonlocal tokens_N
        decoder.position = KNOWN + 1  # what the cache holds does not change the time
        for _ in range(TOKENS):
            logits_NV = decoder.step(tokens_N)
            tokens_N = choose(logits_NV, uniforms_NI[:, decoder.position], RUDALLE_SAMPLING)

    return run


def rudalle_step(n: int) -> Step:
    """Return rudalle's step after `KNOWN` tokens, as its `generate_images` calls it."""
    model, config = rudalle_model(), our_rudalle().config
    text = config.text_rows([list(range(100, 120))])
    known = torch.cat([text.where(text < config.text_vocab, 0), torch.zeros(1, KNOWN, dtype=torch.int64)], dim=1)
    mask = torch.ones(n, 1, config.stream.length, config.stream.length).tril_()
    with torch.inference_mode():
        _, cache = model(known, mask[:1], use_cache=True)
        cache = {layer: [kept.repeat(n, *[1] * (kept.ndim - 1)) for kept in of_one] for layer, of_one in cache.items()}
    out = torch.cat([known, torch.zeros(1, 1, dtype=torch.int64)], dim=1).repeat(n, 1)
    uniforms_N = uniforms(range(n), 1)[:, 0]

    @torch.inference_mode()
    def step() -> None:
        logits, _ = model(out, mask, use_cache=True, cache={layer: tuple(kept) for layer, kept in cache.items()})
        choose(logits[:, -1, config.n_text_ids :], uniforms_N, RUDALLE_SAMPLING)

    return step


def rudalle(n: int, options: Options, report: Report) -> None:
    """ruDALLE: milliseconds of a token for n candidates."""
    label = f"ruDALLE, {RUDALLE_LAYERS} layers, N={n}"
    subjects = {"ours": our_rudalle_run(n), "rudalle": rudalle_step(n)}
    times = measure.in_turns(subjects, options.n(PLAN[n]), label=label)
    times["ours"] = [seconds / TOKENS for seconds in times["ours"]]
    report.samples[label] = times
    if n in LIMITS:
        report.line(f"{label}, float32", "rudalle", measure.ratio(times, "rudalle", "ours"), LIMITS[n])


def rudalle_work(n_layers: int, known: float) -> float:
    """Return how many times as many weights rudalle multiplies with as ours, for a token after so many."""
    config = our_rudalle().config
    layers, row = 12 * n_layers * config.d_model**2, config.d_model
    logits = (config.text_len + 1 + known) * (config.n_text_ids + config.image_vocab)
    return (layers + row * logits) / (layers + row * config.image_vocab)


def rudalle_by_n(_options: Options, report: Report) -> None:
    """The times of all N together."""
    found = {
        n: report.samples[name] for n in PLAN if (name := f"ruDALLE, {RUDALLE_LAYERS} layers, N={n}") in report.samples
    }
    rows: list[list[measure.Cell]] = [
        [name, *(1000 * median(times[name]) for times in found.values())] for name in ("rudalle", "ours")
    ]
    rows.append(["times as fast", *(measure.ratio(times, "rudalle", "ours") for times in found.values())])
    for n_layers in (RUDALLE_LAYERS, MALEVICH_LAYERS):
        for known, where in ((KNOWN, "there"), (511.5, "on average")):
            label = f"multiplications, times as many, {n_layers} layers, {where}"
            rows.append([label, *[rudalle_work(n_layers, known)] * len(found)])
    title = f"ruDALLE's shape, {RUDALLE_LAYERS} layers: one token for all N candidates after {KNOWN}, ms"
    report.table(title, ["", *(f"N={n}" for n in found)], rows)


def vqgan(options: Options, report: Report) -> None:
    """VQGAN f16: milliseconds of decoding one picture, which convolutions take nearly all of."""
    torch.manual_seed(0)
    ours = VQGAN(VQGANConfig(pixels="unit", has_encoder=False)).eval()
    theirs = package("min_dalle.models.vqgan_detokenizer").VQGanDetokenizer().eval()
    state = {name.removeprefix("quantize."): weight for name, weight in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True, assign=True)
    tokens = torch.randint(ours.config.vocab_size, (1, ours.config.grid, ours.config.grid))
    their_step = torch.inference_mode()(partial(theirs, False, tokens.flatten(1)))
    times = measure.in_turns(
        {"ours": partial(ours.decode, tokens), THEIRS: their_step}, options.n(5), label="VQGAN f16"
    )
    report.samples["VQGAN f16"] = times
    rows: list[list[measure.Cell]] = [[name, 1000 * median(times[name])] for name in (THEIRS, "ours")]
    rows.append(["times as fast", measure.ratio(times, THEIRS, "ours")])
    report.table("VQGAN f16: a picture of 256 × 256 decoded, ms", ["", "N=1"], rows)


PARTS: dict[str, Callable[[Options, Report], None]] = {
    **{f"mini-N={n}": partial(mini, n) for n in PLAN},
    "mini-by-N": mini_by_n,
    **{f"rudalle-N={n}": partial(rudalle, n) for n in PLAN},
    "rudalle-by-N": rudalle_by_n,
    "vqgan": vqgan,
}


if __name__ == "__main__":
    measure.main("family", __doc__, PARTS)
