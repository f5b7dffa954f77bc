"""On one NVIDIA GPU: the fast paths against their references, and how close to the machine they come.

Training the 1.3b recipe, 512 candidates of one caption with it, and the 12b recipe's decoding step with random weights.
"""

import sys
from statistics import median

import torch

from benchmarks import made, measure, train_step
from benchmarks.dvae import paper_dvae
from benchmarks.flops import read_cache, read_weights
from benchmarks.measure import Options, Report
from dalle.attention import KINDS, Kind, mask, masked_attention
from dalle.cache import Decoder
from dalle.model import DALLE, DALLEConfig
from dalle.sampling import PAPER_SAMPLING, choose, uniforms
from dalle.sparse_attention import sparse_attention
from dalle.stream import start_id, start_of_image_id
from dvae.fast.model import optimised
from rerank import CLIP, CLIPConfig, CLIPTokenizer
from training.plan.flops import training_flops
from training.recipes import recipe

SIDE, TEXT_LEN, KERNEL = 8192, 256, 11
PICTURES = 32
"""Decoded and scored at a time."""


# ------------------------------------------------------------------------------------------------ correctness


def correctness(options: Options, report: Report) -> None:
    """Hold every fast path to its reference on this device."""
    rows: list[list[measure.Cell]] = []
    for grid, text_len in ((8, 19), (16, 64), (32, TEXT_LEN)):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
            for kind in KINDS:
                error = attention_error(kind, text_len, grid, dtype)
                rows.append([f"attention and gradient, {kind}, grid {grid}, {dtype}", error, limit])
    for n in (1, 64):
        for compiled in (False, True):
            rows.append([f"decoding, N={n}, {'compiled' if compiled else 'eager'}", decoding_error(n, compiled), 1e-3])
    rows.append(["dVAE, bf16, compiled: share of tokens that change", tokens_changed(), 0.08])
    report.table("Correctness", ["against the reference", "largest difference", "allowed"], rows)
    failed = [row[0] for row in rows if not float(row[1] or 0) <= float(row[2] or 0)]
    report.line("correctness on CUDA, paths that fail", "their references", len(failed), 0, at_most=True, unit="")


def attention_error(kind: Kind, text_len: int, grid: int, dtype: torch.dtype) -> float:
    """Return the largest difference of output and gradients from float32 `masked_attention`, relative."""
    inputs = [torch.randn(2, 4, text_len + grid**2, 64, device="cuda").to(dtype) for _ in range(4)]
    *qkv, gradient = inputs
    wide = [x.float().requires_grad_() for x in qkv]
    narrow = [x.clone().requires_grad_() for x in qkv]
    expected = masked_attention(wide[0], wide[1], wide[2], mask(kind, text_len, grid, KERNEL, "cuda"))
    found = sparse_attention(narrow[0], narrow[1], narrow[2], kind=kind, text_len=text_len, grid=grid, kernel=KERNEL)
    pairs = zip(
        [found.detach(), *torch.autograd.grad(found, narrow, gradient)],
        [expected.detach(), *torch.autograd.grad(expected, wide, gradient.float())],
        strict=True,
    )
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def decoding_error(n: int, compiled: bool) -> float:
    """Return the largest difference of a small model's decoded logits from its whole forward pass, float32."""
    config = DALLEConfig(n_layers=4, d_model=128, n_heads=2, text_len=19, grid=8, text_vocab=64, image_vocab=128)
    model = DALLE(config).cuda().eval()
    torch.nn.init.normal_(model.image_head.weight)
    text, tokens = caption(config), torch.randint(128, (n, 64), device="cuda")
    decoder = Decoder(model, text, counts=[n], compile=compiled)
    inputs = torch.cat([torch.full((n, 1), start_of_image_id(128), device="cuda"), tokens[:, :-1]], dim=1)
    found = torch.stack([decoder.step(inputs[:, i]).clone() for i in range(64)], dim=1)
    with torch.inference_mode():
        expected = model(text.expand(n, -1), tokens)[1]
    return float((found - expected).abs().max() / expected.abs().max())


def tokens_changed() -> float:
    """Return the share of the tokens of a picture that our fastest encoder gives otherwise than the plain one."""
    dvae, images = paper_dvae().cuda(), torch.rand(4, 3, 256, 256, device="cuda")
    fast = optimised(dvae, dtype=torch.bfloat16, compile=True)
    return float((fast.encode(images) != dvae.encode(images)).float().mean())


# ------------------------------------------------------------------------------------------------ speed


def training(options: Options, report: Report) -> None:
    """Time the 1.3b recipe's step in bf16, compiled, for several batches; take the best."""
    config = recipe("1.3b").transformer.model
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
    model = random_model(recipe("1.3b").transformer.model)
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
    config, n, steps = recipe("12b").transformer.model, 128, 64
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


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures on an NVIDIA GPU, and torch finds none here; `make bench` measures the CPU")
    parts = {"correctness": correctness, "training": training, "sampling": sampling, "twelve_billion": twelve_billion}
    measure.main("gpu", __doc__, parts)
