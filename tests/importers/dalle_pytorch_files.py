"""Files as DALLE-pytorch's training script saves them, with random weights, and its forward pass written out plainly.

Names, settings and what is computed: lucidrains/DALLE-pytorch at 58c1e1a and its history; sparse layers as DeepSpeed.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

T, V, TEXT, D, HEADS, K, GRID = 12, 40, 518, 24, 2, 16, 6
S = T + GRID**2
HPARAMS = {"num_text_tokens": TEXT, "text_seq_len": T, "dim": D, "heads": HEADS, "dim_head": K, "loss_img_weight": 7}
VAE_PARAMS = {"image_size": 24, "num_tokens": V, "codebook_dim": 12, "num_layers": 2, "hidden_dim": 8}
VAE_PARAMS |= {"num_resnet_blocks": 1, "channels": 3}

CASES: dict[str, dict[str, Any]] = {
    "rotary and shift": {"rotary_emb": True, "shift_tokens": True},
    "of 2021": {"version": None, "wrappers": (1, 1)},
    "reversible": {"reversible": True},
    "all kinds": {"attn_types": ("full", "axial_row", "axial_col", "conv_like"), "shift_tokens": True},
    "window of before 1.5": {"attn_types": ("conv_like",), "version": "1.4.2"},
    "stable": {"stable": True, "sandwich": True},
    "shared": {"shared_attn_ids": ("0", "1", "0"), "shared_ff_ids": (3, 3, 5), "share_input_output_emb": True},
    "sparse": {"attn_types": ("axial_row", "sparse"), "layout": True},
    "one pad for all": {"pads": False, "version": None, "attn_types": ("full", "axial_col", "conv_like")},
    "before scales": {"scales": False, "pads": False, "version": None},
    "0.12.4": {"version": None, "stable": True, "norm": 1},
}


def random(generator: torch.Generator, *shape: int, around: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5) + around


def vae_weights(**params: Any) -> dict[str, Tensor]:
    """Weights of its DiscreteVAE."""
    p, g = VAE_PARAMS | params, torch.Generator().manual_seed(5)
    hidden, blocks, layers = p["hidden_dim"], p["num_resnet_blocks"], p["num_layers"]
    found = {"codebook.weight": random(g, p["num_tokens"], p["codebook_dim"])}

    def convolution(name: str, *shape: int, n_out: int | None = None) -> None:
        found[f"{name}.weight"] = random(g, *shape) * math.sqrt(shape[-1] / math.prod(shape[1:])) * 1.4
        found[f"{name}.bias"] = random(g, n_out or shape[0])

    def block(name: str) -> None:
        for i, side in ((0, 3), (2, 3), (4, 1)):
            convolution(f"{name}.net.{i}", hidden, hidden, side, side)

    for i in range(layers):
        convolution(f"encoder.{i}.0", hidden, hidden if i else p["channels"], 4, 4)
    first = 1 if blocks else 0
    if blocks:
        convolution("decoder.0", hidden, p["codebook_dim"], 1, 1)
    for i in range(blocks):
        block(f"encoder.{layers + i}")
        block(f"decoder.{first + i}")
    for i in range(layers):
        n_in = hidden if i or blocks else p["codebook_dim"]
        convolution(f"decoder.{first + blocks + i}.0", n_in, hidden, 4, 4, n_out=hidden)
    convolution(f"encoder.{layers + blocks}", p["num_tokens"], hidden, 1, 1)
    convolution(f"decoder.{first + blocks + layers}", p["channels"], hidden, 1, 1)
    return found


def file_of(path: Path, *, depth: int = 3, version: str | None = "1.6.6", **case: Any) -> tuple[Path, dict[str, Any]]:
    """Write a dalle.pt; returns it and its content."""
    g = torch.Generator().manual_seed(0)
    keys = ("reversible", "attn_types", "stable", "shift_tokens", "rotary_emb", "shared_attn_ids", "shared_ff_ids")
    hparams = HPARAMS | {"depth": depth} | {key: case[key] for key in keys if key in case}
    if case.get("share_input_output_emb"):
        hparams["share_input_output_emb"] = True
    shift = case.get("shift_tokens", False)
    wrappers = case.get("wrappers", (3, 3) if shift else (2, 1))
    n_text = TEXT + (T if case.get("pads", True) else 0)
    norm = case.get("norm", 0)
    weights = {
        "logits_mask": torch.ones(1, S, 3, dtype=torch.bool),
        f"to_logits.{norm}.weight": random(g, D, around=1.0),
        f"to_logits.{norm}.bias": random(g, D),
        f"to_logits.{norm + 1}.weight": random(g, n_text + V, D),
        f"to_logits.{norm + 1}.bias": random(g, n_text + V),
    }
    if case.get("share_input_output_emb"):
        for part in ("text_emb", "image_emb"):
            weights |= {f"{part}.linear.{leaf}": weights[f"to_logits.1.{leaf}"] for leaf in ("weight", "bias")}
    else:
        weights |= {"text_emb.weight": random(g, n_text, D) * 2, "image_emb.weight": random(g, V, D) * 2}
    if case.get("rotary_emb"):
        weights["transformer.pos_emb"] = random(g, 1, S + 1, 12) * 9
    else:
        dot = "." if version else "_"
        weights["text_pos_emb.weight"] = random(g, T + 1, D)
        weights[f"image_pos_emb.weights{dot}0"] = random(g, 1, GRID, 1, D)
        weights[f"image_pos_emb.weights{dot}1"] = random(g, 1, 1, GRID, D)
    inner: dict[tuple[str, str], dict[str, Tensor]] = {}
    ids = [case.get(key) or range(depth) for key in ("shared_attn_ids", "shared_ff_ids")]
    for layer in range(depth):
        for half, (side, shared) in enumerate(zip("fg", ids, strict=True)):
            number = f"blocks.{layer}.{side}.net" if case.get("reversible") else f"layers.{layer}.{half}"
            at = f"transformer.layers.{number}."
            if case.get("scales", True):
                weights[f"{at}scale"] = random(g, 1, 1, D)
                at += "fn."
            for name in ("norm", "norm_out") if case.get("sandwich") else ("norm",):
                weights |= {f"{at}{name}.weight": random(g, D, around=1.0), f"{at}{name}.bias": random(g, D)}
            if half == 0:
                sizes = {"to_qkv.weight": (3 * HEADS * K, D), "to_out.0.weight": (D, HEADS * K), "to_out.0.bias": (D,)}
            else:
                sizes = {"net.0.weight": (8 * D, D), "net.0.bias": (8 * D,)}
                sizes |= {"net.3.weight": (D, 4 * D), "net.3.bias": (D,)}
            key = (side, str(shared[layer % len(shared)]))
            inner.setdefault(key, {name: random(g, *shape) * 1.5 for name, shape in sizes.items()})
            weights |= {f"{at}{'fn.' * wrappers[half]}{name}": weight for name, weight in inner[key].items()}
            types = case.get("attn_types", ("full",))
            if half == 0 and case.get("layout") and types[layer % len(types)] == "sparse":
                n = S // 16
                drawn = torch.rand(n, n, generator=g).round().tril().fill_diagonal_(1).long()
                weights[f"{at}{'fn.' * wrappers[0]}attn_fn.master_layout"] = drawn.expand(HEADS, n, n).clone()
    weights |= {f"vae.{name}": weight for name, weight in vae_weights().items()}
    content: dict[str, Any] = {"hparams": hparams, "vae_params": VAE_PARAMS}
    content |= {"epoch": 3, "vae_class_name": "DiscreteVAE"} | ({"version": version} if version else {})
    content |= {"weights": weights, "scheduler_state": None}
    content["opt_state"] = {"state": {0: {"step": 3, "exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 3e-4}]}
    torch.save(content, path)
    return path, content


def _sees(kind: str, query: int, key: int, layout: Tensor | None) -> bool:
    if key > query:
        return False
    if kind == "sparse":
        assert layout is not None
        return bool(layout[0, query // 16, key // 16])
    if kind == "full" or key <= T:
        return True
    (row, column), (r, c) = divmod(query - T - 1, GRID), divmod(key - T - 1, GRID)
    near = {
        "axial_row": row == r,
        "axial_col": column == c,
        "conv_like": 0 <= row - r < 5 and 0 <= column - c < 5,
        "centred": abs(row - r) <= 2 and abs(column - c) <= 2,
    }
    return near[kind]


def _shifted(x: Tensor) -> Tensor:
    out = x.clone()
    half, quarter = D // 2, D // 4
    for position in range(x.shape[1]):
        cell = position - T - 1
        if cell < 0:
            out[:, position, :half] = x[:, position - 1, :half] if position else 0
        else:
            out[:, position, :quarter] = x[:, position - GRID, :quarter] if cell >= GRID else 0
            out[:, position, quarter:half] = x[:, position - 1, quarter:half] if cell % GRID else 0
    return out


def plain_logits(content: dict[str, Any], text: Tensor, image: Tensor) -> Tensor:
    """Logits of all positions, (B, S, text and image ids), of raw text ids, 0 for none, and all image tokens."""
    w, hparams = content["weights"], content["hparams"]
    norm = 1 if "to_logits.2.weight" in w else 0
    head, bias = w[f"to_logits.{norm + 1}.weight"], w[f"to_logits.{norm + 1}.bias"]
    n_text = len(head) - V
    is_word = F.pad(F.pad(text, (1, 0), value=1) != 0, (0, GRID**2 - 1), value=True)
    if n_text > TEXT:
        text, is_word = torch.where(text == 0, torch.arange(T) + TEXT, text), is_word | True
    h = torch.cat(
        [w.get("text_emb.weight", head)[F.pad(text, (1, 0))], w.get("image_emb.weight", head[n_text:])[image]], 1
    )
    if "text_pos_emb.weight" in w:
        rows, columns = (w[name] for name in sorted(w) if name.startswith("image_pos_emb"))
        h = h + torch.cat([w["text_pos_emb.weight"], (rows + columns).reshape(-1, D)])
    h = h[:, :-1]
    layout = next((w[name] for name in w if name.endswith("master_layout")), None)
    types = hparams.get("attn_types", ("full",))
    is_old = content.get("version", "0") < "1.5"

    def rotated(x: Tensor) -> Tensor:
        if "transformer.pos_emb" not in w:
            return x
        angles = w["transformer.pos_emb"][0, :S]
        turned = torch.stack([-x[..., 1:12:2], x[..., 0:12:2]], -1).flatten(-2)
        return torch.cat([x[..., :12] * angles.cos() + turned * angles.sin(), x[..., 12:]], -1)

    def branch(layer: int, half: int, h: Tensor) -> Tensor:
        parts = [f"layers.layers.{layer}.{half}.", f"layers.blocks.{layer}.{'fg'[half]}.net."]
        own = {name.split("fn.")[-1]: value for name, value in w.items() if any(part in name for part in parts)}
        own = {
            name.split(f".{layer}.{half}.")[-1].split(f"{'fg'[half]}.net.")[-1]: value for name, value in own.items()
        }
        x = F.layer_norm(h, (D,), own["norm.weight"], own["norm.bias"])
        x = _shifted(x) if hparams.get("shift_tokens") else x
        if half:
            values, gates = F.linear(x, own["net.0.weight"], own["net.0.bias"]).chunk(2, -1)
            x = F.linear(values * F.gelu(gates), own["net.3.weight"], own["net.3.bias"])
        else:
            kind = types[layer % len(types)]
            kind = "centred" if kind == "conv_like" and is_old else kind
            mask = torch.tensor([[_sees(kind, q, k, layout) for k in range(S)] for q in range(S)])
            mask = mask & (is_word[:, None] | ((torch.arange(S) <= T)[:, None] if kind != "full" else False))
            q, k, v = (x @ own["to_qkv.weight"].T).view(len(x), S, 3, HEADS, K).permute(2, 0, 3, 1, 4)
            scores = rotated(q) @ rotated(k).mT * K**-0.5
            x = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ rotated(v)
            x = F.linear(x.transpose(1, 2).flatten(2), own["to_out.0.weight"], own["to_out.0.bias"])
        if "norm_out.weight" in own:
            x = F.layer_norm(x, (D,), own["norm_out.weight"], own["norm_out.bias"])
        return x * own.get("scale", 1.0)

    one = two = h
    for layer in range(hparams["depth"]):
        if hparams.get("reversible"):
            one = one + branch(layer, 0, two)
            two = two + branch(layer, 1, one)
        else:
            one = one + branch(layer, 0, one)
            one = one + branch(layer, 1, one)
    h = (one + two) / 2 if hparams.get("reversible") else one
    h = h / h.amax(-1, keepdim=True) if hparams.get("stable") else h
    return F.linear(F.layer_norm(h, (D,), w[f"to_logits.{norm}.weight"], w[f"to_logits.{norm}.bias"]), head, bias)
