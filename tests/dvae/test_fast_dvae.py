import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dvae import DVAE, DVAEConfig
from dvae.fast import kernels
from dvae.fast import model as fast
from dvae.fast.choice import Choice
from dvae.fast.model import FastDVAE, optimised, pictures_at_once
from dvae.images import unmap_pixels

SMALL = DVAEConfig(n_hid=16, n_init=8, n_groups=3, n_blocks=2, vocab_size=64, image_size=16)


def model(config: DVAEConfig = SMALL) -> DVAE:
    """A dVAE with random biases too, whose branches weigh as much as its identity path."""
    generator = torch.Generator().manual_seed(0)
    dvae = DVAE(config, generator=generator).eval().requires_grad_(False)
    for name, weight in dvae.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.3, generator=generator)
        elif "conv_4" in name:
            weight.mul_(config.n_layers)
    return dvae


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def drawn_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are compiled too."""
    monkeypatch.setattr(fast, "MIN_WIDTH", 0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile returns functions as they are, of small models too: the same arithmetic, without the wait."""
    kernels._compiled.cache_clear()
    monkeypatch.setattr(fast, "MIN_WIDTH", 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    kernels._compiled.cache_clear()


def locations(decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The location μ behind decoded pictures, which shows errors that the pixels' range hides."""
    pixels = decode(tokens).double()
    assert pixels.min() > 0, "the inverse of unmap_pixels needs pixels that were not clamped"
    assert pixels.max() < 1, "the inverse of unmap_pixels needs pixels that were not clamped"
    return torch.logit(0.1 + 0.8 * pixels)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("n_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_the_copy_computes_what_the_model_computes(n_groups: int, n_blocks: int) -> None:
    dvae = model(dataclasses.replace(SMALL, n_groups=n_groups, n_blocks=n_blocks))
    copy, f = optimised(dvae, dtype=torch.float32), dvae.config.downsampling
    for n, rows, columns in ((1, 4, 4), (2, 3, 5), (3, 1, 2)):
        images = pictures(n, 3, rows * f, columns * f)
        tokens = dvae.encode(images)
        assert torch.equal(copy.encode(images), tokens)
        stats = dvae.decoder.from_tokens(tokens)
        with torch.inference_mode():
            found = torch.stack([copy._decode._locations(one) for one in tokens])
        assert (found - stats[:, :3]).abs().max() < 1e-5 * stats.std()
        assert torch.allclose(copy.decode(tokens), unmap_pixels(stats[:, :3].sigmoid()), atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("compile", "tokens_changed", "error"), [(True, 0.005, 0.01), (False, 0.03, 0.06)])
def test_bfloat16_changes_few_tokens_and_pictures_by_little(compile: bool, tokens_changed: float, error: float) -> None:
    dvae = model(dataclasses.replace(SMALL, n_hid=64, n_init=32, vocab_size=256))
    copy = optimised(dvae, dtype=torch.bfloat16, compile=compile)
    images, tokens = pictures(16, 3, 32, 32), drawn_tokens(4, 8, 8)
    assert (copy.encode(images) != dvae.encode(images)).float().mean() < tokens_changed
    expected, found = dvae.decode(tokens), copy.decode(tokens)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert (found - expected).std() < error * expected.std()


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_with_a_small_gain_the_identity_path_decides_and_no_token_changes_in_bfloat16() -> None:
    dvae = DVAE(dataclasses.replace(SMALL, n_blocks=4), generator=torch.Generator().manual_seed(0)).eval()
    images = pictures(32, 3, 32, 32)
    tokens = dvae.encode(images)
    assert len(tokens.unique()) > 10
    assert torch.equal(optimised(dvae, dtype=torch.bfloat16).encode(images), tokens)
    plain = optimised(dvae, dtype=torch.bfloat16, compile=False).encode(images)
    assert 0 < (plain != tokens).float().mean() < 0.03


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contract_is_the_models(compile: bool, dtype: torch.dtype) -> None:
    dvae = model()
    copy = optimised(dvae, dtype=dtype, compile=compile)
    assert copy.config == SMALL
    images, tokens = pictures(2, 3, 16, 8), drawn_tokens(2, 4, 2)
    images_before, tokens_before = images.clone(), tokens.clone()
    for method, given in (("encode", images), ("decode", tokens), ("encode", images[:0]), ("decode", tokens[:0])):
        expected, found = getattr(dvae, method)(given), getattr(copy, method)(given)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert not found.is_inference()
        assert not found.requires_grad
    assert torch.equal(images, images_before)
    assert torch.equal(tokens, tokens_before)
    for method, wrong in (
        ("encode", images[0]),
        ("encode", images[..., :7]),
        ("encode", images.byte()),
        ("decode", tokens[0]),
        ("decode", tokens.int()),
        ("decode", tokens + 64),
        ("decode", tokens[:, :0]),
    ):
        with pytest.raises(ValueError, match=rf"{method} was given") as models:
            getattr(dvae, method)(wrong)
        with pytest.raises(ValueError, match=rf"{method} was given") as copies:
            getattr(copy, method)(wrong)
        assert str(models.value) == str(copies.value)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", [True, False])
def test_a_copy_does_not_change_with_its_model_nor_the_model_with_its_copy(compile: bool) -> None:
    dvae, images = model(), pictures(1, 3, 16, 16)
    before = {name: weight.clone() for name, weight in dvae.state_dict().items()}
    copy = optimised(dvae, dtype=torch.bfloat16, compile=compile)
    tokens = copy.encode(images)
    assert all(torch.equal(weight, before[name]) for name, weight in dvae.state_dict().items())
    for weight in dvae.parameters():
        weight.zero_()
    assert torch.equal(copy.encode(images), tokens)


@pytest.mark.usefixtures("uncompiled")
def test_pictures_of_other_sizes_in_between_change_nothing() -> None:
    copy = optimised(model(), dtype=torch.float32)
    images, tokens = pictures(1, 3, 16, 16), drawn_tokens(1, 4, 4)
    first = copy.encode(images), copy.decode(tokens)
    copy.encode(pictures(2, 3, 32, 8))
    copy.decode(drawn_tokens(2, 9, 3))
    assert torch.equal(copy.encode(images), first[0])
    assert torch.equal(copy.decode(tokens), first[1])


def test_the_choice_is_that_of_float32_however_close_the_logits_are() -> None:
    generator = torch.Generator().manual_seed(0)
    # 16 groups of rows that bfloat16 cannot tell apart
    weight = torch.randn(16, 1, 40, generator=generator) + 1e-4 * torch.randn(16, 8, 40, generator=generator)
    weight, bias = weight.flatten(0, 1), torch.randn(16, 1, generator=generator).expand(16, 8).flatten()
    h_NC = torch.randn(500, 40, generator=generator).relu()
    logits_NV = h_NC.double() @ weight.double().T + bias
    assert len(logits_NV.argmax(dim=1).unique()) > 40
    rounded = (h_NC.bfloat16() @ weight.bfloat16().T + bias.bfloat16()).argmax(dim=1, keepdim=True)
    tokens = Choice(weight, bias)(h_NC)[:, None]
    highest_N1 = logits_NV.amax(dim=1, keepdim=True)
    assert (highest_N1 - logits_NV.gather(1, rounded)).max() > 1e-2
    assert (highest_N1 - logits_NV.gather(1, tokens)).max() < 1e-5


def test_logits_that_are_all_candidates_are_computed_again_at_once() -> None:
    weight, bias = torch.zeros(64, 8), torch.full((64,), 1.0)
    bias[37] += 1e-4
    assert Choice(weight, bias)(torch.ones(5, 8)).tolist() == [37] * 5


class NoCompilerError(RuntimeError):
    pass


@pytest.mark.usefixtures("any_width")
def test_without_a_compiler_the_copy_runs_uncompiled_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_: Any) -> None:
        raise NoCompilerError("No working C++ compiler found\nin any of these folders")

    kernels._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: cannot)
    dvae, images = model(), pictures(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        copy = optimised(dvae, dtype=torch.float32)
        tokens = copy.encode(images)
        copy.decode(tokens)
    kernels._compiled.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "the fast dVAE cannot be compiled (No working C++ compiler found) and runs uncompiled, more slowly"
    ]
    assert torch.equal(tokens, dvae.encode(images))
    assert torch.equal(copy.decode(tokens), dvae.decode(tokens))


def test_what_would_not_gain_and_what_is_not_to_be_compiled_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_compiled", None)
    with caplog.at_level(logging.INFO):
        narrow = optimised(model())
        wide = optimised(model(dataclasses.replace(SMALL, n_hid=128, n_groups=2, n_blocks=1)), compile=False)
        assert narrow.encode(pictures(1, 3, 16, 16)).shape == (1, 4, 4)
        assert wide.encode(pictures(1, 3, 16, 16)).shape == (1, 8, 8)
    assert not caplog.records


def test_a_dtype_that_it_is_not_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected torch.float32 or torch.bfloat16"):
        optimised(model(), dtype=torch.float16)


def test_the_number_of_pictures_grows_with_the_budget_and_shrinks_with_their_size() -> None:
    paper = DVAEConfig()
    assert pictures_at_once(paper, 0) == 1
    assert pictures_at_once(paper, 4 * 2**30) == 11
    assert pictures_at_once(paper, 8 * 2**30) == 23
    assert pictures_at_once(dataclasses.replace(paper, image_size=128), 4 * 2**30) == 46
    # the logits of a dVAE that does not shrink its pictures are larger than its activations
    flat = DVAEConfig(n_hid=4, n_groups=1, vocab_size=8192, image_size=64)
    assert pictures_at_once(flat, 2**30) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("any_width")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_computes_the_same_and_compiles_once_for_all_sizes(dtype: torch.dtype) -> None:
    kernels._compiled.cache_clear()
    dvae = model(dataclasses.replace(SMALL, n_hid=64, n_init=32, n_groups=4))
    copy: FastDVAE = optimised(dvae, dtype=dtype)
    for n, rows, columns in ((1, 8, 8), (3, 8, 8), (2, 12, 16), (1, 17, 5)):
        images, tokens = pictures(n, 3, 8 * rows, 8 * columns), drawn_tokens(n, rows, columns)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found, decoded = copy.encode(images), copy.decode(tokens)
        differ = (found != dvae.encode(images)).float().mean()
        assert differ == 0 if dtype == torch.float32 else differ < 0.05
        expected = dvae.decode(tokens)
        assert (decoded - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.usefixtures("uncompiled")
def test_encoders_with_other_kernels_are_copied_plainly() -> None:
    dvae = model(dataclasses.replace(SMALL, encoder_kernel=1))
    fast_dvae = optimised(dvae, dtype=torch.float32)
    images = pictures(2, 3, 16, 16)
    assert torch.equal(fast_dvae.encode(images), dvae.encode(images))


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_changes_few_tokens_of_the_papers_dvae() -> None:
    dvae = DVAE(DVAEConfig(), generator=torch.Generator().manual_seed(0)).eval().cuda()
    images = torch.rand(4, 3, 256, 256, device="cuda")
    copy = optimised(dvae, dtype=torch.bfloat16)
    assert (copy.encode(images) != dvae.encode(images)).float().mean() < 0.08
    assert (copy.decode(dvae.encode(images)) - dvae.decode(dvae.encode(images))).abs().mean() < 0.02
