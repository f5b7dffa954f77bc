"""Models and sampling run on a GPU that is not there: no device is mixed, no type is wrong, and what waits is known.

Numbers are not checked here: the tensors have none. The tests marked `gpu` check them on a real one.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from phantom import CAN_PRETEND, Phantom, phantom_gpu
from torch import Tensor

from dalle.attention import KINDS
from dalle.cache import Decoder
from dalle.loss import training_loss
from dalle.model import DALLE, DALLEConfig
from dalle.pipeline import Pipeline
from dalle.sampling import Sampling, sample
from dvae import DVAE, DVAEConfig
from dvae.fast.model import optimised
from dvae.loss import dvae_loss
from dvae.metrics import code_usage
from rerank import CLIP, CLIPConfig
from rerank.loss import contrastive_loss
from training.engine.objective import MicroBatch, on_device
from training.loop.means import Means
from training.ranks.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux and g++")]
SIZES = DALLEConfig(n_layers=6, d_model=64, n_heads=2, text_len=7, grid=4, text_vocab=30, image_vocab=32, conv_kernel=3)
CAPTION = "a red cube on a blue cube"


@pytest.fixture
def gpu() -> Iterator[Phantom]:
    with phantom_gpu() as phantom:
        yield phantom


def streams(batch: int, sizes: DALLEConfig = SIZES) -> tuple[Tensor, Tensor]:
    """Text ids and image tokens on the GPU; they were waited for before a test begins to count."""
    text = torch.randint(sizes.text_vocab, (batch, sizes.text_len))
    return text.pin_memory().to("cuda", non_blocking=True), torch.randint(32, (batch, 16)).pin_memory().to(
        "cuda", non_blocking=True
    )


def on_gpu(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.pin_memory()
    return model.to("cuda", non_blocking=True)


# ------------------------------------------------------------------------------------------------ the phantom


def test_tensors_of_two_devices_cannot_be_added(gpu: Phantom) -> None:
    with pytest.raises(RuntimeError, match=r"two.* devices"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_what_the_host_reads_is_counted_where_it_is_read(gpu: Phantom) -> None:
    tokens = torch.ones(1, 2, 2, dtype=torch.int64, device="cuda")
    code_usage(tokens, 32)
    assert gpu.waits == {"read at dvae/metrics:code_usage": 1}
    assert [bool(tokens.max() > 0), float(tokens.float().mean()), tokens.flatten().tolist()] == [
        True,
        1.0,
        [0, 1, 2, 3],
    ]
    assert sum(gpu.waits.values()) == 4


def test_a_copy_of_ordinary_memory_waits_and_one_of_pinned_memory_does_not(gpu: Phantom) -> None:
    large = torch.ones(1 << 20)
    large.to("cuda", non_blocking=True)
    torch.tensor([1.0], device="cuda")
    assert gpu.waits == {"copy to the GPU at a check": 2}
    large.pin_memory().to("cuda", non_blocking=True)
    torch.tensor([1.0]).to("cuda", non_blocking=True)
    assert sum(gpu.waits.values()) == 2


def test_sizes_that_only_the_device_knows_are_waits(gpu: Phantom) -> None:
    x = torch.ones(4, device="cuda")
    counts = torch.ones(4, dtype=torch.int64, device="cuda")
    (x > 0).nonzero()
    x[x > 0]
    x.repeat_interleave(counts)
    assert sum(gpu.waits.values()) == 3
    x.repeat_interleave(counts, output_size=4)
    assert sum(gpu.waits.values()) == 3


def test_nothing_may_wait_while_a_graph_is_recorded(gpu: Phantom) -> None:
    with pytest.raises(RuntimeError, match="not allowed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(3, device="cuda").sum().item()


# ------------------------------------------------------------------------------------------------ training


def test_a_micro_batch_reaches_the_gpu_without_a_wait(gpu: Phantom) -> None:
    batch = MicroBatch(tensors={"images": torch.rand(4, 3, 256, 256)}, noise_seed=0, measure=False)
    sent = on_device({"batch": batch, "x": torch.zeros(1 << 20), "step": 1}, torch.device("cuda", 0))
    assert isinstance(sent["batch"], MicroBatch)
    assert sent["batch"].tensors["images"].device == sent["x"].device == torch.device("cuda", 0)
    assert not gpu.waits


def test_means_of_numbers_of_both_devices_wait_when_they_are_taken(gpu: Phantom) -> None:
    means = Means()
    applied = torch.ones((), device="cuda")
    for _ in range(3):
        means.add({"loss": torch.zeros((), device="cuda"), "bytes_sent": torch.tensor(7.0)}, applied)
    assert not gpu.waits
    assert set(means.take(Ranks(rank=0, size=1, device=torch.device("cuda", 0)))) == {"loss", "bytes_sent"}
    assert gpu.waits == {"read at training/loop/means:take": 1}


@pytest.mark.parametrize(
    ("attention", "precision", "checkpointing"),
    [
        *[("paper", precision, again) for precision in ("float32", "autocast", "bfloat16") for again in (False, True)],
        *[(kind, "float32", False) for kind in KINDS],
    ],
)
def test_the_transformers_loss_and_gradients_wait_for_nothing(
    gpu: Phantom, attention: str, precision: str, checkpointing: bool
) -> None:
    sizes = dataclasses.replace(SIZES, attention=attention)
    model = on_gpu(DALLE(sizes))
    assert isinstance(model, DALLE)
    model.activation_checkpointing = checkpointing
    model = model.bfloat16() if precision == "bfloat16" else model
    for kind in sizes.kinds:
        model.mask(kind)
    text, tokens = streams(3)
    gpu.waits.clear()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "autocast"):
        loss = training_loss(model, text, tokens).total
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device.type, parameter.grad.dtype) == ("cuda", parameter.dtype)
    assert not gpu.waits


@pytest.mark.parametrize("autocast", [False, True])
def test_the_dvaes_loss_and_gradients_wait_for_nothing(gpu: Phantom, autocast: bool) -> None:
    dvae = on_gpu(DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=16)))
    assert isinstance(dvae, DVAE)
    images = torch.rand(2, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        generator = torch.Generator("cuda").manual_seed(0)
        loss = dvae_loss(dvae, images, temperature=1.0, kl_weight=1.0, generator=generator).total
    loss.backward()
    assert all(parameter.grad is not None for parameter in dvae.parameters())
    assert not gpu.waits


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_clips_loss_and_gradients_wait_for_nothing(gpu: Phantom, precision: str) -> None:
    clip = on_gpu(small_clip())
    clip = clip.bfloat16() if precision == "bfloat16" else clip
    images, ids = torch.rand(2, 3, 20, 24, device="cuda"), torch.ones(2, 8, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "autocast"):
        loss = contrastive_loss(*clip(images, ids))
    loss.backward()
    assert all(parameter.grad is not None for parameter in clip.parameters())
    assert not gpu.waits


def small_clip() -> CLIP:
    return CLIP(
        CLIPConfig(
            image_size=16,
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            context_length=24,
            vocab_size=300,
            text_width=16,
            text_layers=1,
            text_heads=2,
            embed_dim=8,
        )
    )


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [0, 7])
def test_decoding_waits_for_graphs_to_be_recorded_and_then_for_nothing(
    gpu: Phantom, dtype: torch.dtype, known: int
) -> None:
    model = on_gpu(DALLE(SIZES)).to(dtype).eval()
    assert isinstance(model, DALLE)
    text, tokens = streams(2)
    Decoder(model, text, counts=[3, 2])  # makes what all decoders share
    gpu.waits.clear()
    decoder = Decoder(model, text, counts=[3, 2], prefix=tokens[:, :known])
    assert not gpu.waits
    inputs = torch.zeros(5, dtype=torch.int64, device="cuda")
    logits = [decoder.step(inputs) for _ in range(known, 16)]
    assert {(tuple(each.shape), each.dtype) for each in logits} == {((5, 32), torch.float32)}
    # one for each column of the grid
    assert gpu.waits == {"record a CUDA graph at dalle/cache:_record": 4}


def test_a_recorded_step_begins_with_a_copy_for_each_kind_of_layer_not_for_each_layer(gpu: Phantom) -> None:
    model = on_gpu(DALLE(SIZES)).eval()
    assert isinstance(model, DALLE)
    decoder = Decoder(model, streams(1)[0], counts=[4])
    inputs = torch.zeros(4, dtype=torch.int64, device="cuda")
    for _ in range(8):
        decoder.step(inputs)
    copies = 0

    def counted(func: object, *_: object) -> None:
        nonlocal copies
        copies += func is torch.ops.aten.copy_.default

    gpu.watch = counted
    decoder.step(inputs)
    assert copies == 2 + 2 * 3  # the tokens and their place; slot and bias of rows, columns and the convolution


SETTINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7, top_k=5, top_p=0.9),
    Sampling(guidance=3.0, temperature=0.5),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampling_waits_before_the_first_token_alone(gpu: Phantom, sampling: Sampling) -> None:
    model = on_gpu(DALLE(SIZES)).eval()
    assert isinstance(model, DALLE)
    text, tokens = streams(2)
    waits: list[Counter[str]] = []

    def on_step(_: Tensor) -> None:
        waits.append(Counter(gpu.waits))

    samples = sample(model, text, range(6), sampling, prefix=tokens[:1, :3], on_step=on_step)
    assert (samples.tokens.device.type, samples.tokens.dtype) == ("cuda", torch.int64)
    during = waits[-1] - waits[0]
    assert set(during) <= {"record a CUDA graph at dalle/cache:_record"}
    assert gpu.waits == waits[-1]


@pytest.mark.parametrize(
    ("rank", "early_abandon", "precision"),
    [("clip", True, "fp32"), ("likelihood", False, "fp32"), ("both", False, "bf16")],
)
def test_a_bundle_generates_and_gives_results_on_the_cpu(
    bundle: Path, gpu: Phantom, rank: str, early_abandon: bool, precision: str
) -> None:
    pipe = Pipeline.load(bundle, "cuda", precision=precision, memory=1 << 20)
    result = pipe.generate(CAPTION, n=6, keep=2, batch_size=3, rank=rank, early_abandon=early_abandon)
    held = (result.images, result.scores, result.log_likelihoods, result.tokens)
    assert {tensor.device.type for tensor in held} == {"cpu"}
    assert all(not type(tensor).__name__.startswith("Fake") for tensor in held)
    assert pipe.rank([CAPTION], result.images).device.type == "cpu"


def test_decoding_pictures_waits_for_the_range_of_their_tokens_alone(gpu: Phantom) -> None:
    dvae = on_gpu(DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=16)))
    assert isinstance(dvae, DVAE)
    fast = optimised(dvae, dtype=torch.bfloat16)
    gpu.waits.clear()
    for each in (dvae, fast):
        images = each.decode(each.encode(torch.rand(2, 3, 16, 16, device="cuda")))
        assert (tuple(images.shape), images.dtype, images.device.type) == ((2, 3, 16, 16), torch.float32, "cuda")
    assert set(gpu.waits) == {"read at dvae/model:check_tokens"}
