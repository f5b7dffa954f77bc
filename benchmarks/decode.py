"""Decoding: one image token for all N candidates of a caption, ours against a static cache and DALLE-pytorch.

Same shape as the training step. A token costs different decoders differently much at different positions, so each is
timed at several positions of the picture and integrated over all 1,024. Drawing the token is included. A static cache
keeps and reads all positions, with N copies of the caption, in float32: as LlamaGen does it, and "at its best", without
the copy of it that LlamaGen makes in each step. DALLE-pytorch is its `generate_images` as shipped.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.flops import decoding_flops
from benchmarks.measure import MIB, PRODUCTS_FLOPS, Options, Report
from dalle.cache import Decoder, bytes_per_candidate
from dalle.model import DALLE, DALLEConfig
from dalle.sampler.draw import uniforms
from dalle.sampling import PAPER_SAMPLING, choose
from dalle.stream import start_id, start_of_image_id

SHAPE = DALLEConfig(n_layers=8, d_model=512, n_heads=8)
DENSE = DALLEConfig(n_layers=8, d_model=512, n_heads=8, attention="dense")
N_IMAGE = SHAPE.stream.n_image

OURS, OURS_COMPILED = "ours, float32, eager", "ours, float32"
OURS_BF16, BEST = "ours, bf16, eager", "ours, best"
LLAMAGEN = "LlamaGen-style, eager"
LEAN, LEAN_COMPILED = "static cache at its best, eager", "static cache at its best, compiled"
SHIPPED, BFLOAT16 = "DALLE-pytorch, as shipped", "products, bfloat16"
ONCE = (SHIPPED, BFLOAT16)
"""Timed one token, or product, at a time; the others by blocks of tokens."""

Step = Callable[[], object]
"""One token for all candidates."""


def caption(n: int) -> Tensor:
    """Return a caption of full length, n times, (n, T)."""
    text = torch.randint(SHAPE.text_vocab, (1, SHAPE.text_len), generator=torch.Generator().manual_seed(0))
    text[:, 0] = start_id(SHAPE.text_vocab)
    return text.expand(n, -1)


@lru_cache
def our_model(dtype: torch.dtype) -> DALLE:
    """Return our model with random weights."""
    return _with_heads(DALLE(SHAPE)).to(dtype)


def _with_heads(model: DALLE) -> DALLE:
    """Give a model's image head, which starts at zero, random weights: so tokens are drawn from different logits."""
    torch.nn.init.normal_(model.image_head.weight, std=0.02)
    return model.eval().requires_grad_(False)


def our_step(n: int, position: int, *, dtype: torch.dtype, compiled: bool) -> Step:
    """Return our decoder's step from a position on: the caption read once, keys and values of it kept once."""
    prefix = torch.zeros(1, position, dtype=torch.int64)
    decoder = Decoder(our_model(dtype), caption(1), counts=[n], prefix=prefix, compile=compiled)
    uniforms_NI = uniforms(range(n), N_IMAGE)
    tokens_N = torch.full((n,), 0 if position else start_of_image_id(SHAPE.image_vocab))

    def step() -> None:
        nonlocal tokens_N
        uniforms_N = uniforms_NI[:, decoder.position]
        tokens_N = choose(decoder.step(tokens_N), uniforms_N, PAPER_SAMPLING)

    return step


@lru_cache(maxsize=4)
def static_cache(n: int, lean: bool, compiled: bool) -> peers.StaticCache:
    """Return a decoder that has read the caption n times."""
    return peers.StaticCache(_with_heads(DALLE(DENSE)), caption(n), lean=lean, compiled=compiled)


def static_step(n: int, position: int, *, lean: bool, compiled: bool) -> Step:
    """Return the static cache's step from a position on; what the cache holds before it does not change the time."""
    decoder, positions = static_cache(n, lean, compiled), itertools.count(position)
    tokens_N = torch.zeros(n, dtype=torch.int64)

    def step() -> None:
        nonlocal tokens_N
        tokens_N = peers.multinomial(decoder.step(tokens_N, next(positions)))

    return step


@lru_cache
def _shipped() -> object:
    return peers.dalle_pytorch(SHAPE).eval()


def shipped_step(n: int, position: int) -> Step:
    """Return DALLE-pytorch's step at one position."""
    return partial(peers.one_token, _shipped(), caption(n), position)


SUBJECTS: dict[str, Callable[[int, int], Step]] = {
    SHIPPED: shipped_step,
    LLAMAGEN: partial(static_step, lean=False, compiled=False),
    LEAN: partial(static_step, lean=True, compiled=False),
    LEAN_COMPILED: partial(static_step, lean=True, compiled=True),
    OURS: partial(our_step, dtype=torch.float32, compiled=False),
    OURS_COMPILED: partial(our_step, dtype=torch.float32, compiled=True),
    OURS_BF16: partial(our_step, dtype=torch.bfloat16, compiled=False),
    BEST: partial(our_step, dtype=torch.bfloat16, compiled=True),
    BFLOAT16: lambda n, position: measure.products(torch.bfloat16),
}
"""What is compared, by name: number of candidates and first position -> step. benchmarks/memory.py looks here, too."""


def timed(
    n: int, names: Sequence[str], starts: Sequence[int], rounds: int, block: int, report: Report
) -> measure.Times:
    """Return the seconds of a token for all n candidates, averaged over the picture, of every round.

    Args:
        n: candidates.
        names: of SUBJECTS, taken in turns.
        starts: positions to time at; there are `block · (rounds + 1)` tokens after each.
        rounds: how often.
        block: tokens in a row.
        report: keeps the single times.
    """
    by_start: list[measure.Times] = []
    for start in starts:
        runs: dict[str, Callable[[], object]] = {}
        for name in names:
            runs[name] = partial(_repeat, SUBJECTS[name](n, start), 1 if name in ONCE else block)
            if name not in ONCE or start == starts[0]:  # those that need no warming up take seconds a token
                measure.say(f"N={n}, position {start}: warming up, {name}")
                runs[name]()
        times = measure.in_turns(runs, rounds, warmup=0, label=f"N={n}, position {start}")
        by_start.append({k: [t / (1 if k in ONCE else block) for t in values] for k, values in times.items()})
        report.samples[f"N={n}, position {start}"] = by_start[-1]
    static_cache.cache_clear()
    return {
        name: [over_the_picture(starts, [times[name][r] for times in by_start]) for r in range(rounds)]
        for name in names
    }


def _repeat(step: Step, n: int) -> None:
    for _ in range(n):
        step()


def over_the_picture(starts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the mean over all positions of what was measured at some: trapezoids between them, flat beyond."""
    positions = [0, *starts, N_IMAGE - 1]
    values = [seconds[0], *seconds, seconds[-1]]
    area = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(positions, positions[1:], values, values[1:], strict=False))
    return area / (N_IMAGE - 1)


def spread(count: int, steps: int) -> list[int]:
    """Return `count` starts from the first to the last position after which `steps` tokens are left."""
    last = N_IMAGE - steps
    return [round(i * last / (count - 1)) for i in range(count)]


PLAN: dict[int, tuple[tuple[str, ...], int, int, int]] = {
    1: ((SHIPPED, LLAMAGEN, LEAN, LEAN_COMPILED, OURS, OURS_COMPILED, BEST), 5, 5, 16),
    8: ((SHIPPED, LLAMAGEN, LEAN, OURS, OURS_COMPILED, BEST), 5, 3, 8),
    64: ((LLAMAGEN, LEAN, OURS, OURS_COMPILED, BEST), 3, 3, 2),
    256: ((OURS, BEST, BFLOAT16), 3, 5, 4),
}
"""By N: subjects, positions, rounds, tokens in a row."""


def time(n: int, options: Options, report: Report) -> None:
    """Milliseconds of a token for n candidates."""
    names, n_starts, rounds, block = PLAN[n]
    rounds = options.n(rounds)
    times = timed(n, names, spread(n_starts, block * (rounds + 1)), rounds, block, report)
    report.samples[f"N={n}"] = times
    for what, slow, fast, limit in LINES.get(n, ()):
        report.line(f"decode, N={n}, {what}", slow, measure.ratio(times, slow, fast), limit)
    if BFLOAT16 in times:
        work = n * decoding_flops(SHAPE) / PRODUCTS_FLOPS
        share = median(work * floor / t for floor, t in zip(times[BFLOAT16], times[BEST], strict=True))
        report.line(f"decode, N={n}, our best", "the arithmetic floor in bf16", share, 0.6, unit=" of it")


LINES: dict[int, tuple[tuple[str, str, str, float], ...]] = {
    1: (("float32", LEAN_COMPILED, OURS_COMPILED, 1.2), ("our best", LEAN_COMPILED, BEST, 3.0)),
    8: (
        ("our best", LLAMAGEN, BEST, 9.0),
        ("float32", SHIPPED, OURS_COMPILED, 400.0),
        ("our best", SHIPPED, BEST, 1000.0),
    ),
    64: (("float32", LLAMAGEN, OURS_COMPILED, 18.0), ("our best", LLAMAGEN, BEST, 40.0)),
}
"""By N: what of ours, against whom, ours, and how many times as fast it has to be."""


def by_n(options: Options, report: Report) -> None:
    """The times of all N together."""
    found = {n: report.samples[f"N={n}"] for n in PLAN if f"N={n}" in report.samples}
    milliseconds = {n: {name: 1000 * median(t) for name, t in times.items()} for n, times in found.items()}
    shown = [name for name in SUBJECTS if name != BFLOAT16 and any(name in times for times in found.values())]
    rows = [[name, *(milliseconds[n].get(name) for n in found)] for name in shown]
    report.table("One token for all N candidates, ms", ["", *(f"N={n}" for n in found)], rows)
    for name in shown:
        x = [n for n in found if name in milliseconds[n]]
        y = [milliseconds[n][name] / n for n in x]
        if len(x) < 2:
            continue  # no curve
        report.series.append(measure.Series(plot="n-time", name=name, x=x, y=y))
    if {1, 256} <= found.keys():
        falls = 256 * milliseconds[1][BEST] / milliseconds[256][BEST]
        report.line("time per candidate, N=1 to 256, our best", "itself at N=1", falls, 12.0)


def memory(options: Options, report: Report) -> None:
    """Cache bytes of a further candidate, and peak memory of decoding by N, each in a process of its own."""
    full = static_cache(1, True, False).bytes_per_candidate()
    static_cache.cache_clear()
    rows: list[list[str | float]] = [["static cache, N copies of the caption, float32", full / MIB, 1.0]]
    for dtype, limit, name in ((torch.float32, 1 / 3, "float32"), (torch.bfloat16, 1 / 6, "bf16")):
        ours = bytes_per_candidate(SHAPE, dtype)
        rows.append([f"ours, {name}", ours / MIB, ours / full])
        what = f"cache memory per further candidate, {name}"
        report.line(what, "full attention, N copies, float32", ours / full, limit, at_most=True, unit=" of it")
    report.table("Cache of a further candidate", ["", "MiB", "of full attention"], rows)
    counts = tuple(PLAN)
    peaks: list[list[str | float | None]] = []
    for name in (LEAN, OURS, OURS_BF16):
        x = [n for n in counts if name != LEAN or n <= 64]  # 256 of its caches are 10 GiB
        y = [measure.peak_memory("decode", name, n) / MIB for n in x]
        report.series.append(measure.Series(plot="n-memory", name=name, x=x, y=y))
        peaks.append([name, *y, *[None] * (len(counts) - len(y))])
    report.table("Peak memory of decoding, MiB, weights included", ["", *(f"N={n}" for n in counts)], peaks)


PARTS: dict[str, Callable[[Options, Report], None]] = {
    **{f"N={n}": partial(time, n) for n in PLAN},
    "by-N": by_n,
    "memory": memory,
}


if __name__ == "__main__":
    measure.main("decode", __doc__, PARTS)
