"""An imported unCLIP, and the steps of sampling, beside diffusers; `make references` installs that."""

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unclip_files import (
    DECODER,
    PRIOR,
    TEXT_LEN,
    UPSAMPLER,
    WIDTH,
    decoder_config,
    prior_config,
    small_clip,
    text_proj_config,
    upsampler_config,
    with_random_weights,
    write_schedulers,
)

from dalle.importers.unclip.importing import import_unclip
from unclip import Decoder, Diffusion, Prior, Upsampler
from unclip.conditions import Text
from unclip.sampling import Predictor, sample_ddpm


def diffusers(name: str) -> Any:
    """A class of diffusers; the test is skipped where it is missing."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: `make references` does it")
    text_proj = "diffusers.pipelines.deprecated.unclip.text_proj"
    with contextlib.redirect_stderr(io.StringIO()):
        module = importlib.import_module(text_proj if name == "UnCLIPTextProjModel" else "diffusers")
        return getattr(module, name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_text(count: int = 3) -> Text:
    mask = torch.arange(TEXT_LEN) < torch.tensor([TEXT_LEN, 2, 4])[:count, None]
    return Text(normal(count, WIDTH, seed=4), normal(count, TEXT_LEN, WIDTH, seed=5), mask)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Their networks, with random weights."""
    torch.manual_seed(0)
    networks = {
        "prior": diffusers("PriorTransformer")(**prior_config()),
        "decoder": diffusers("UNet2DConditionModel")(**decoder_config()),
        "text_proj": diffusers("UnCLIPTextProjModel")(**text_proj_config()),
        "super_res_first": diffusers("UNet2DModel")(**upsampler_config()),
        "super_res_last": diffusers("UNet2DModel")(**upsampler_config()),
    }
    return {name: with_random_weights(model, seed) for seed, (name, model) in enumerate(networks.items())}


@pytest.fixture(scope="module")
def ours(theirs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is imported of the folder that diffusers writes."""
    folder, out = tmp_path_factory.mktemp("karlo"), tmp_path_factory.mktemp("imported")
    for name, model in theirs.items():
        model.save_pretrained(folder / name)
    write_schedulers(folder)
    import_unclip(folder, small_clip()).save(out)
    return out


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_the_prior_predicts_the_same_embeddings(theirs: dict[str, Any], ours: Path, timestep: int) -> None:
    prior, text, x = Prior.load(ours / "prior"), some_text(), normal(3, WIDTH)
    assert prior.config == PRIOR
    expected = theirs["prior"](
        x,
        timestep=timestep,
        proj_embedding=text.features,
        encoder_hidden_states=text.states,
        attention_mask=text.mask,
    ).predicted_image_embedding
    timesteps = torch.full((3,), timestep)
    assert expected.std() > 0.1
    torch.testing.assert_close(prior(x, timesteps, text), expected, atol=1e-5, rtol=0)
    memory, visible = prior.remember(text)
    torch.testing.assert_close(prior.continued(x, timesteps, memory, visible), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(prior.unscaled(x), theirs["prior"].post_process_latents(x), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_the_decoder_predicts_the_same_noise_and_variance(theirs: dict[str, Any], ours: Path, timestep: int) -> None:
    decoder, text, embeddings = Decoder.load(ours / "decoder"), some_text(), normal(3, WIDTH, seed=6)
    assert decoder.config == DECODER
    x, twice = normal(3, 3, 8, 8), Text(*(torch.cat([tensor, tensor]) for tensor in text))
    # their guidance: the null embedding in the first half
    states, embedding = theirs["text_proj"](
        image_embeddings=embeddings,
        prompt_embeds=twice.features,
        text_encoder_hidden_states=twice.states,
        do_classifier_free_guidance=True,
    )
    expected = theirs["decoder"](
        sample=torch.cat([x, x]),
        timestep=timestep,
        encoder_hidden_states=states,
        class_labels=embedding,
        attention_mask=torch.nn.functional.pad(twice.mask, (4, 0), value=True),
    ).sample
    no_image = torch.tensor([True] * 3 + [False] * 3)
    timesteps = torch.full((6,), timestep)
    found = decoder(torch.cat([x, x]), timesteps, torch.cat([embeddings, embeddings]), twice, no_image)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("is_last", [False, True])
def test_the_upsampler_predicts_the_same_noise(theirs: dict[str, Any], ours: Path, is_last: bool) -> None:
    upsampler = Upsampler.load(ours / "upsampler-32")
    assert upsampler.config == UPSAMPLER
    x, enlarged = normal(2, 3, 32, 32), normal(2, 3, 32, 32, seed=1)
    network = theirs["super_res_last" if is_last else "super_res_first"]
    expected = network(sample=torch.cat([x, enlarged], dim=1), timestep=300).sample
    assert expected.std() > 0.1
    found = upsampler(x, torch.full((2,), 300), enlarged, is_last=is_last)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def with_exact_tables(scheduler: Any, process: Diffusion) -> Any:
    """Their scheduler with our tables in place of its own, which agree, but are float32."""
    ours = {"alphas_cumprod": process.alphas_bar, "betas": process.betas, "alphas": 1 - process.betas}
    for name, table in ours.items():
        torch.testing.assert_close(getattr(scheduler, name).double(), table, atol=1e-6, rtol=1e-3)
        setattr(scheduler, name, table)
    return scheduler


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("prediction", "name"), [("noise", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_a_step_of_ddim_is_theirs(schedule: Any, prediction: Any, name: str) -> None:
    process = Diffusion(schedule)
    scheduler = diffusers("DDIMScheduler")(
        beta_schedule=SCHEDULES[schedule], prediction_type=name, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(1000)
    scheduler = with_exact_tables(scheduler, process)
    x, output, noise = (
        normal(2, 3, 4, 4).double(),
        normal(2, 3, 4, 4, seed=1).double(),
        normal(2, 3, 4, 4, seed=2).double(),
    )
    for eta in (0.0, 0.7):
        for step in (1, 400, 900):
            expected = scheduler.step(output, step, x, eta=eta, variance_noise=noise).prev_sample
            x0 = process.x0_of(prediction, output, x, step)
            found = process.ddim_step(x, x0, step, eta, noise)
            torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=0)


def test_a_step_of_ddpm_is_theirs() -> None:
    process = Diffusion("cosine")
    x, output = normal(2, 3, 4, 4), normal(2, 6, 4, 4, seed=1)
    scheduler = diffusers("DDPMScheduler")(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True
    )
    scheduler = with_exact_tables(scheduler, process)
    for step in (1, 400, 990):
        generator = torch.Generator().manual_seed(3)
        expected = scheduler.step(output, step, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        predictor = Predictor(network=lambda x, t: output, prediction="noise", process=process, clamp=1.0)
        x0, log_variance = predictor.estimate(x, step)
        assert log_variance is not None
        torch.testing.assert_close(
            process.ddpm_step(x, x0, step, noise, log_variance), expected.float(), atol=1e-5, rtol=1e-5
        )


def test_karlos_sampling_of_the_prior_takes_the_same_steps() -> None:
    scheduler = diffusers("UnCLIPScheduler")(
        prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0
    )
    scheduler.set_timesteps(25)
    process = Diffusion("cosine").respaced(25)
    scheduler = with_exact_tables(scheduler, Diffusion("cosine"))
    assert process.timesteps[::-1] == scheduler.timesteps.tolist()
    start, x0 = normal(4, 8), 4 * normal(4, 8, seed=1)
    noises = {timestep: normal(4, 8, seed=timestep + 10) for timestep in process.timesteps}
    x = start.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        before = scheduler.timesteps[i + 1] if i + 1 < 25 else None
        stepped = scheduler.step(
            x0 + 0.1 * x, timestep, x, prev_timestep=before, generator=_Fixed(noises[int(timestep)])
        )
        x = stepped.prev_sample
    predictor = Predictor(network=lambda x, t: x0 + 0.1 * x, prediction="x0", process=process, clamp=5.0)
    torch.testing.assert_close(
        sample_ddpm(predictor, start, lambda step: noises[step]), x.float(), atol=1e-5, rtol=1e-5
    )


class _Fixed:
    """Stands for a generator in whose place noise is given: see `given_noise`."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise


@pytest.fixture(autouse=True)
def given_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let their scheduler use the noise that a `_Fixed` holds."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: `make references` does it")
    scheduling_unclip = importlib.import_module("diffusers.schedulers.scheduling_unclip")
    plain = scheduling_unclip.randn_tensor

    def drawn(shape: Any, generator: Any = None, **settings: Any) -> Tensor:
        return generator.noise if isinstance(generator, _Fixed) else plain(shape, generator=generator, **settings)

    monkeypatch.setattr(scheduling_unclip, "randn_tensor", drawn)
