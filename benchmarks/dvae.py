"""The dVAE at 256×256 pixels: ours against OpenAI's package with the same weights, and what encoding once saves
training.

The paper's architecture, 54 million parameters to encode and 44 million to decode, random weights, one picture at a
time.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import measure, peers, train_step
from benchmarks.measure import Options, Report
from dvae import DVAE, DVAEConfig
from dvae.fast.model import optimised

OURS, BEST, THEIRS = "ours, float32", "ours, best", "OpenAI's DALL-E"
GIVEN = "given"

Half = Callable[[Tensor], Tensor]


def our_halves(dvae: DVAE) -> dict[str, tuple[Half, Half]]:
    """Return our encode and decode by name: equal to the model in float32, and our best."""
    equal, best = (optimised(dvae, dtype=dtype, compile=True) for dtype in (torch.float32, torch.bfloat16))
    return {OURS: (equal.encode, equal.decode), BEST: (best.encode, best.decode)}


def paper_dvae() -> DVAE:
    """Return the paper's dVAE with random weights."""
    return DVAE(DVAEConfig(), generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)


def time(options: Options, report: Report) -> None:
    """Seconds of encoding and decoding a picture, and how far the results are from OpenAI's."""
    dvae = paper_dvae()
    halves = {THEIRS: peers.openai_dvae(dvae), **our_halves(dvae)}
    images = torch.rand(1, 3, 256, 256)
    tokens = torch.randint(dvae.config.vocab_size, (1, 32, 32))
    encodes = {name: partial(encode, images) for name, (encode, _) in halves.items()}
    decodes = {name: partial(decode, tokens) for name, (_, decode) in halves.items()}
    rows: list[list[measure.Cell]] = []
    for what, subjects, difference in (
        ("encode", encodes, _tokens_changed),
        ("decode", decodes, _largest_difference),
    ):
        times = measure.in_turns(subjects, options.n(5), warmup=2, label=f"dVAE, {what}")
        report.samples[what] = times
        expected = subjects[THEIRS]()
        for name, run in subjects.items():
            ratio = measure.ratio(times, THEIRS, name)
            rows.append([f"{what}, {name}", median(times[name]), ratio, difference(run(), expected)])
        best = measure.ratio(times, THEIRS, BEST)
        report.line(f"dVAE {what}, 256×256, our best", THEIRS, best, 3.3)
        if what == "decode":
            report.line("dVAE decode, float32", THEIRS, measure.ratio(times, THEIRS, OURS), 1.5)
            error = float((decodes[OURS]() - expected).abs().max())
            report.line("dVAE decode, float32, difference", THEIRS, error, 1e-5, at_most=True, unit="")
    report.table("dVAE, one picture", ["", "s", f"× {THEIRS}", "difference"], rows)


def _tokens_changed(found: Tensor, expected: Tensor) -> str:
    return f"{100 * float((found != expected).float().mean()):.2g}% of tokens"


def _largest_difference(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max()):.1e}"


def encode_once(options: Options, report: Report) -> None:
    """Seconds of a training step of two samples with their tokens at hand, and with their pictures encoded in it."""
    dvae, images = paper_dvae(), torch.rand(2, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    step = train_step.STEPS[train_step.BEST](train_step.SHAPE, 2)
    encodes = {"as training encodes": dvae.encode, "by our best": our_halves(dvae)[BEST][0]}
    subjects: dict[str, Callable[[], object]] = {GIVEN: step}
    subjects |= {
        f"encoded in the step, {name}": partial(_both, encode, images, step) for name, encode in encodes.items()
    }
    times = measure.in_turns(subjects, options.n(5), label="encode once")
    report.samples["encode once"] = times
    ratios = {name: measure.ratio(times, name, GIVEN) for name in subjects}
    rows: list[list[measure.Cell]] = [[name, median(times[name]), ratio] for name, ratio in ratios.items()]
    report.table("Training step, our best, batch 2", ["image tokens", "s", f"× {GIVEN}"], rows)
    for name, ratio in ratios.items():
        if name != GIVEN:
            report.line("training step, our best, tokens encoded once", name, ratio, 1.8)


def _both(encode: Half, images: Tensor, step: Callable[[], object]) -> None:
    encode(images)
    step()


if __name__ == "__main__":
    measure.main("dvae", __doc__, {"time": time, "encode_once": encode_once})
