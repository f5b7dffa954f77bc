"""Folders of an unCLIP as diffusers writes them, from small models of ours with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rerank import CLIP, CLIPConfig, CLIPTokenizer
from unclip import Decoder, Prior, Upsampler
from unclip.decoder import DecoderConfig
from unclip.prior import PriorConfig
from unclip.unet import UNet
from unclip.upsampler import UpsamplerConfig

WIDTH, TEXT_LEN = 16, 9
"""Of the embeddings and the text tower; positions of text."""


@torch.no_grad()
def with_random_weights(model: Any, seed: int = 0) -> Any:
    """The same model, for use, with weights all of which matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        is_scale = weight.ndim == 1 and "norm" in name and name.endswith("weight")
        fan_in = weight[0].numel() if weight.ndim > 1 and "position" not in name else 25
        weight.copy_(1 + 0.2 * drawn if is_scale else drawn * fan_in**-0.5)
    return model.eval().requires_grad_(False)


def small_clip() -> CLIP:
    tokenizer = CLIPTokenizer.train(["a red cube", "a blue ball"], 300)
    config = CLIPConfig(
        image_size=16,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        context_length=TEXT_LEN,
        vocab_size=tokenizer.vocab_size,
        text_width=WIDTH,
        text_layers=1,
        text_heads=2,
        embed_dim=WIDTH,
    )
    torch.manual_seed(0)
    return CLIP(config, tokenizer).eval().requires_grad_(False)


PRIOR = PriorConfig(
    embed_dim=WIDTH,
    text_width=WIDTH,
    text_len=TEXT_LEN,
    width=32,
    n_layers=2,
    n_heads=2,
    scale=1.0,
    normalised=False,
    clamp=5.0,
    null_length=2,
)
DECODER = DecoderConfig(
    image_size=8,
    width=32,
    multiples=(1, 2, 3),
    n_blocks=2,
    attention=(1, 2),
    head_width=16,
    context_width=24,
    dropout=0.0,
    embed_dim=WIDTH,
    text_width=WIDTH,
    text_len=TEXT_LEN,
    scale=1.0,
    normalised=False,
    null_length=2,
)
UPSAMPLER = UpsamplerConfig(
    image_size=32,
    input_size=8,
    crop=32,
    width=32,
    multiples=(1, 2),
    n_blocks=1,
    dropout=0.0,
    scale_shift=False,
    degradation="none",
    enlarging="bicubic",
    has_last=True,
)


def unet_config(config: Any, attending: str) -> dict[str, Any]:
    """The fields that both kinds of U-Nets have."""
    kinds = {way: (f"Resnet{way}sampleBlock2D", f"{attending}{way}Block2D") for way in ("Down", "Up")}
    levels = range(len(config.multiples))
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.n_blocks,
        "down_block_types": [kinds["Down"][level in config.attention] for level in levels],
        "up_block_types": [kinds["Up"][level in config.attention] for level in reversed(levels)],
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
    }


def prior_config() -> dict[str, Any]:
    return {
        "num_attention_heads": PRIOR.n_heads,
        "attention_head_dim": PRIOR.width // PRIOR.n_heads,
        "num_layers": PRIOR.n_layers,
        "embedding_dim": WIDTH,
        "num_embeddings": TEXT_LEN,
    }


def decoder_config() -> dict[str, Any]:
    return unet_config(DECODER, "SimpleCrossAttn") | {
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": DECODER.head_width,
        "cross_attention_dim": DECODER.context_width,
        "class_embed_type": "identity",
    }


def text_proj_config() -> dict[str, Any]:
    return {
        "clip_extra_context_tokens": DECODER.n_tokens,
        "clip_embeddings_dim": WIDTH,
        "time_embed_dim": DECODER.embedding_width,
        "cross_attention_dim": DECODER.context_width,
    }


def upsampler_config() -> dict[str, Any]:
    return unet_config(UPSAMPLER, "Attn") | {"add_attention": False}


def scheduler_config(prediction: str, variance: str, clip_range: float = 1.0) -> dict[str, Any]:
    return {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "variance_type": variance,
        "clip_sample": True,
        "clip_sample_range": clip_range,
    }


def write_part(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def write_schedulers(folder: Path) -> None:
    for name, config in {
        "prior": scheduler_config("sample", "fixed_small_log", 5.0),
        "decoder": scheduler_config("epsilon", "learned_range"),
        "super_res": scheduler_config("epsilon", "fixed_small_log"),
    }.items():
        path = folder / f"{name}_scheduler"
        path.mkdir(parents=True)
        (path / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")


def _renamed(module: nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{key}": weight for key, weight in module.state_dict().items()}


def _split(linear: nn.Linear, names: list[str]) -> dict[str, Tensor]:
    parts = zip(linear.weight.chunk(len(names)), linear.bias.chunk(len(names)), names, strict=True)
    return {
        f"{name}.{kind}": each for weight, bias, name in parts for kind, each in (("weight", weight), ("bias", bias))
    }


def _block(layer: Any, name: str) -> dict[str, Tensor]:
    block = layer.block
    state = _renamed(block.norm_in, f"{name}.norm1") | _renamed(block.conv_in, f"{name}.conv1")
    state |= _renamed(block.embedding, f"{name}.time_emb_proj") | _renamed(block.norm_out, f"{name}.norm2")
    state |= _renamed(block.conv_out, f"{name}.conv2")
    return state | (_renamed(block.skip, f"{name}.conv_shortcut") if isinstance(block.skip, nn.Conv2d) else {})


def _attention(attention: Any, name: str) -> dict[str, Tensor]:
    state = _renamed(attention.norm, f"{name}.group_norm") | _renamed(attention.out, f"{name}.to_out.0")
    state |= _split(attention.qkv, [f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"])
    return state | _split(attention.context_kv, [f"{name}.add_k_proj", f"{name}.add_v_proj"])


def unet_state(unet: UNet) -> dict[str, Tensor]:
    """The weights by diffusers' names."""
    state = _renamed(unet.time[0], "time_embedding.linear_1") | _renamed(unet.time[2], "time_embedding.linear_2")
    state |= _renamed(unet.conv_in, "conv_in") | _renamed(unet.norm_out, "conv_norm_out")
    state |= _renamed(unet.conv_out, "conv_out")
    for way, layers, resampler in (("down", unet.down, "downsamplers"), ("up", unet.up, "upsamplers")):
        level, place = 0, 0
        for layer in layers:
            assert not isinstance(layer, nn.ModuleList)
            name = f"{way}_blocks.{level}"
            if layer.block.resampling != "none":  # type: ignore[union-attr]
                state |= _block(layer, f"{name}.{resampler}.0")
                level, place = level + 1, 0
                continue
            state |= _block(layer, f"{name}.resnets.{place}")
            if layer.attention is not None:
                state |= _attention(layer.attention, f"{name}.attentions.{place}")
            place += 1
    for place, layer in enumerate(unet.middle):
        state |= _block(layer, f"mid_block.resnets.{place}")
    if unet.middle[0].attention is not None:
        state |= _attention(unet.middle[0].attention, "mid_block.attentions.0")
    return state


def text_proj_state(decoder: Decoder) -> dict[str, Tensor]:
    state = _renamed(decoder.image_time, "clip_image_embeddings_project_to_time_embeddings")
    state |= _renamed(decoder.text_time, "embedding_proj") | _renamed(decoder.text_states, "encoder_hidden_states_proj")
    state |= _renamed(decoder.text_norm, "text_encoder_hidden_states_norm")
    n_tokens = decoder.config.n_tokens
    for kind, weight in decoder.tokens.named_parameters():
        # token j takes every fourth output, from the j-th on
        theirs = torch.empty_like(weight)
        for token, rows in enumerate(weight.chunk(n_tokens)):
            theirs[token::n_tokens] = rows
        state[f"clip_extra_context_tokens_proj.{kind}"] = theirs
    return state | {"learned_classifier_free_guidance_embeddings": decoder.null_image}


def prior_state(prior: Prior) -> dict[str, Tensor]:
    state = _renamed(prior.time[0], "time_embedding.linear_1") | _renamed(prior.time[2], "time_embedding.linear_2")
    for ours, theirs in {
        "text_states": "encoder_hidden_states_proj",
        "text_features": "embedding_proj",
        "noised": "proj_in",
        "norm": "norm_out",
        "answer": "proj_to_clip_embeddings",
    }.items():
        state |= _renamed(prior.get_submodule(ours), theirs)
    for i, block in enumerate(prior.blocks):
        name = f"transformer_blocks.{i}"
        state |= _split(block.qkv, [f"{name}.attn1.to_{kind}" for kind in "qkv"])  # type: ignore[arg-type]
        for ours, theirs in {"out": "attn1.to_out.0", "norm1": "norm1", "norm2": "norm3"}.items():
            state |= _renamed(block.get_submodule(ours), f"{name}.{theirs}")
        state |= _renamed(block.get_submodule("mlp_in"), f"{name}.ff.net.0.proj")
        state |= _renamed(block.get_submodule("mlp_out"), f"{name}.ff.net.2")
    state |= {"positional_embedding": prior.positions[None], "prd_embedding": prior.last[None, None]}
    return state | {"clip_mean": prior.mean[None], "clip_std": prior.deviation[None]}


def write_unclip(folder: Path) -> tuple[Prior, Decoder, Upsampler]:
    """Write a whole folder; returns the models that its weights are of, but for what stands in for a caption."""
    prior, decoder = with_random_weights(Prior(PRIOR)), with_random_weights(Decoder(DECODER))
    upsampler = with_random_weights(Upsampler(UPSAMPLER))
    generator = torch.Generator().manual_seed(1)
    prior.mean.copy_(torch.randn(WIDTH, generator=generator))
    prior.deviation.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    write_part(folder / "prior", prior_config(), prior_state(prior))
    write_part(folder / "decoder", decoder_config(), unet_state(decoder.unet))
    write_part(folder / "text_proj", text_proj_config(), text_proj_state(decoder))
    write_part(folder / "super_res_first", upsampler_config(), unet_state(upsampler.unet))
    write_part(folder / "super_res_last", upsampler_config(), unet_state(upsampler.last))
    write_schedulers(folder)
    return prior, decoder, upsampler
