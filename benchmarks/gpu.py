"""On one NVIDIA GPU, in ten minutes: are the results right, how fast are they, and how close to the machine is that.

`make gpu`, or `python -m benchmarks.gpu`. First the tests marked `gpu`, which hold every fast path to its reference and
train and sample a small bundle; then the 1.3b recipe's training step, 512 candidates of one caption with it, and the
12b recipe's decoding step, with random weights. What was found is written after every part, so that nothing is lost
when one fails or the time is up: benchmarks/results/gpu.json, and the tables of benchmarks/README.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import torch

from benchmarks import made, measure, summary, train_step
from benchmarks.dvae import paper_dvae
from benchmarks.flops import read_cache, read_weights
from benchmarks.measure import RESULTS, ROOT, Options, Report
from dalle.cache import Decoder
from dalle.model import DALLE, DALLEConfig
from dalle.sampler.draw import uniforms
from dalle.sampling import PAPER_SAMPLING, choose
from dalle.stream import start_id, start_of_image_id
from dvae.fast.model import optimised
from rerank import CLIP, CLIPConfig, CLIPTokenizer
from storage.errors import reason_of
from training.plan.flops import training_flops
from training.recipes import recipe

SIDE = 8192
PICTURES = 32
"""Decoded and scored at a time."""
MINUTES = 10.0
"""After so many no further part begins."""

Part = Callable[[Options, Report], None]


# ------------------------------------------------------------------------------------------------ correctness


def correctness(options: Options, report: Report) -> None:
    """Run the tests that need a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={result}", str(ROOT / "tests")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        cases = read_tests(result) if result.exists() else {}
    failed = {name: reason for name, reason in cases.items() if reason}
    if len(failed) == len(cases):
        raise RuntimeError(f"no test passed:\n{(done.stdout + done.stderr)[-4000:]}")
    report.table("Tests that fail on this GPU", ["test", "reason"], list(failed.items()))
    report.line("tests on a GPU that fail", f"{len(cases)} tests", len(failed), 0, at_most=True, unit="")


def read_tests(path: Path) -> dict[str, str]:
    """Return the tests of a JUnit file that were run, each with the first line of why it failed, or nothing."""
    cases: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            wrong = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
            lines = [] if wrong is None else (wrong.get("message") or "failed").splitlines()
            cases[f"{case.get('classname')}.{case.get('name')}"] = lines[0][:200] if lines else ""
    return cases


# ------------------------------------------------------------------------------------------------ speed


def sizes(name: str) -> DALLEConfig:
    """Return a recipe's transformer of the paper's kind."""
    config = recipe(name).transformer.model
    assert isinstance(config, DALLEConfig)
    return config


def training(options: Options, report: Report) -> None:
    """Time the 1.3b recipe's step in bf16, compiled, for several batches; take the best."""
    config = sizes("1.3b")
    rate = product_rate(options)
    report.rates["bfloat16 products, TFLOP/s"] = rate / 1e12
    rows: list[list[measure.Cell]] = []
    for batch in (4, 8, 16, 32):
        torch.cuda.reset_peak_memory_stats()
        try:
            step = train_step.our_step(config, batch, bf16=True, compiled=True, device="cuda")
            seconds = median(measure.in_turns({"step": step}, options.n(10), warmup=3, label=f"batch {batch}")["step"])
        except torch.OutOfMemoryError:
            break
        finally:
            step = None  # type: ignore[assignment]  # the next batch needs the memory
            torch.cuda.empty_cache()
        gib = torch.cuda.max_memory_allocated() / 2**30
        rows.append([batch, seconds, batch / seconds, gib, training_flops(config) * batch / seconds / rate])
    report.table("1.3b, training step", ["batch", "s", "samples/s", "GiB", "of the products' rate"], rows)
    best = max(float(row[4] or 0) for row in rows)
    report.line("1.3b, training, bf16, compiled", "measured bf16 product rate", best, 0.45, unit=" of it")


def product_rate(options: Options) -> float:
    """Return the operations a second of large bf16 matrix products."""
    run = measure.repeated_product(torch.bfloat16, SIDE, SIDE, SIDE, 10, "cuda")
    return 10 * 2 * SIDE**3 / median(measure.in_turns({"products": run}, options.n(5), warmup=2)["products"])


def sampling(options: Options, report: Report) -> None:
    """Time 512 candidates of one caption with the 1.3b recipe, then also their pictures and CLIP's scores."""
    model = random_model(sizes("1.3b"))
    dvae = optimised(paper_dvae().cuda(), dtype=torch.bfloat16, compile=True)
    words = CLIPTokenizer.train(made.captions(1000), 4096)
    clip = CLIP(CLIPConfig(vocab_size=words.vocab_size), words).cuda().eval().bfloat16()
    tokens = torch.empty(0)

    def candidates() -> None:
        nonlocal tokens
        tokens = sampled(model, 512)

    @torch.inference_mode()
    def pictures() -> None:
        for some in torch.split(tokens.view(-1, 32, 32), PICTURES):
            clip.encode_image(dvae.decode(some))

    times = measure.in_turns({"tokens": candidates, "pictures": pictures}, options.n(2), label="512 candidates")
    seconds, further = median(times["tokens"]), median(times["pictures"])
    rows: list[list[measure.Cell]] = [
        ["image tokens", seconds, 512 / seconds],
        ["dVAE and CLIP ViT-B/32", further, 512 / further],
    ]
    report.table("512 candidates of one caption, 1.3b, 32×32 tokens", ["", "s", "candidates/s"], rows)
    report.line("512 candidates, 1.3b, tokens", "10 s", seconds, 10.0, at_most=True, unit=" s")


def twelve_billion(options: Options, report: Report) -> None:
    """Time the 12b recipe's decoding step of 128 candidates against reading its weights and caches once."""
    config, n, steps = sizes("12b"), 128, 64
    model = random_model(config)
    middle = config.stream.n_image // 2
    prefix = torch.zeros(1, middle, dtype=torch.int64, device="cuda")
    decoder = Decoder(model, caption(config), counts=[n], prefix=prefix, compile=True)
    tokens = torch.zeros(n, dtype=torch.int64, device="cuda")

    def some() -> None:
        for _ in range(steps):
            decoder.step(tokens)

    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = measure.in_turns({"steps": some, "copy": lambda: target.copy_(source)}, options.n(5), label="12b")
    bandwidth = 2 * source.numel() / median(times["copy"])
    seconds = median(times["steps"]) / steps
    floor = 2 * (read_weights(config) + read_cache(config, n)) / bandwidth
    report.rates["copy, read + written, GB/s"] = bandwidth / 1e9
    rows: list[list[measure.Cell]] = [["step", 1000 * seconds], ["floor: weights and caches read once", 1000 * floor]]
    report.table(f"12b, one token for {n} candidates, ms", ["", "ms"], rows)
    report.line("12b, decoding step, N=128", "weight and cache bandwidth", floor / seconds, 0.5, unit=" of it")


# ------------------------------------------------------------------------------------------------ models


def caption(config: DALLEConfig) -> torch.Tensor:
    """Return a caption of full length, (1, T)."""
    text = torch.randint(config.text_vocab, (1, config.text_len), device="cuda")
    text[:, 0] = start_id(config.text_vocab)
    return text


def random_model(config: DALLEConfig) -> DALLE:
    """Return a bfloat16 model with random weights, made on the GPU, where the largest fits best."""
    with torch.device("meta"):
        model = DALLE(config)
    model = model.bfloat16().to_empty(device="cuda").eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def sampled(model: DALLE, n: int) -> torch.Tensor:
    """Return the image tokens of n candidates of one caption, (n, I)."""
    config = model.config
    decoder = Decoder(model, caption(config), counts=[n], compile=True)
    uniforms_NI = uniforms(range(n), config.stream.n_image).cuda()
    tokens = [torch.full((n,), start_of_image_id(config.image_vocab), device="cuda")]
    for i in range(config.stream.n_image):
        tokens.append(choose(decoder.step(tokens[-1]), uniforms_NI[:, i], PAPER_SAMPLING))
    return torch.stack(tokens[1:], dim=1)


# ------------------------------------------------------------------------------------------------ the program


PARTS: dict[str, Part] = {
    "correctness": correctness,
    "training": training,
    "sampling": sampling,
    "twelve_billion": twelve_billion,
}


def run(parts: Mapping[str, Part], options: Options, out: Path, minutes: float) -> bool:
    """Run parts while there is time, and write what was found after each; returns whether all of them succeeded."""
    report, began_at, succeeded = Report(benchmark="gpu"), time.perf_counter(), True
    for name, part in parts.items():
        if time.perf_counter() - began_at > 60 * minutes:
            report.notes.append(f"{name}: not measured, {minutes:g} minutes were over")
            succeeded = False
        else:
            measure.say(f"gpu: {name}")
            try:
                part(options, report)
            except Exception as error:  # what is wrong on a machine that nobody has tried is not known beforehand
                traceback.print_exc()
                report.notes.append(f"{name} failed: {reason_of(error, 300)}")
                succeeded = False
            torch.cuda.empty_cache()
        report.write(out)
    report.notes.append(f"took {time.perf_counter() - began_at:.0f} s")
    report.write(out)
    print("\n".join(["", *report.notes, f"wrote {out}"]), flush=True)
    return succeeded and all(line.met for line in report.lines)


def main() -> int:
    """Return the exit code: 1 if a part failed, or did not reach its lines."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"begin no part after so many ({MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help="one round: to try the program, not to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="JSON to write")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures on an NVIDIA GPU, and torch finds none here; `make bench` measures the CPU")
    torch.manual_seed(0)
    chosen = {name: part for name, part in PARTS.items() if not given.only or name in given.only}
    succeeded = run(chosen, Options(quick=given.quick), given.out, given.minutes)
    if given.out == RESULTS / "gpu.json":
        summary.write_pages(summary.results())
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
