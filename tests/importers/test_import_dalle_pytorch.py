"""Files of DALLE-pytorch, made by hand: what is read, what is told, what is refused."""

import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_pytorch_files import CASES, GRID, TEXT, VAE_PARAMS, D, T, V, file_of, vae_weights
from PIL import Image
from torch import Tensor

from dalle.cli.main import main
from dalle.family.tokenizers import load_tokenizer
from dalle.importers.dalle_pytorch.bundle import import_dalle, import_vae
from dalle.importers.dalle_pytorch.texts import import_tokenizer
from dalle.pipeline import Pipeline
from dvae import DVAE, DVAEConfig
from dvae.codec import load_codec
from dvae.discrete import DiscreteVAE
from dvae.vqgan import VQGAN, VQGANConfig
from storage.bpe import OpenAIPairs

GENERATOR = torch.Generator().manual_seed(1)
CAPTIONS = [torch.randint(1, TEXT, (n,), generator=GENERATOR).tolist() for n in (5, T, 0, T + 4)]
IMAGES = torch.randint(0, V, (4, GRID**2), generator=GENERATOR)


def changed(**parts: Any) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        for name, new in parts.items():
            content[name] = {key: value for key, value in {**content[name], **new}.items() if value is not None}
        return content

    return change


AT = "transformer.layers.layers.0.0.fn.fn.fn"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "gMLP": (changed(hparams={"attn_types": ("full", "mlp")}), "layers of type mlp, the gMLPs"),
    "sparse": (changed(hparams={"attn_types": ("sparse",)}), "3 sparse layers, .* nobody can .* --sparse-as-dense"),
    "another kind": (changed(hparams={"attn_types": ("swin",)}), "layers of type 'swin', expected full"),
    "new option": (changed(hparams={"moe": 4}), "hparams say moe, which is not known here"),
    "no depth": (changed(hparams={"depth": None}), "hparams say depth is None, expected a whole number"),
    "depth": (changed(hparams={"depth": 4}), "has 3 layers, but its hparams say 4"),
    "rotary": (
        changed(hparams={"rotary_emb": True}),
        "hparams say rotary_emb is True, but the weights are of the other",
    ),
    "width": (changed(hparams={"dim": 32}), r"text_embedding\.weight has the shape \(530, 24\) instead of \(530, 32\)"),
    "heads": (changed(hparams={"heads": 3}), "has the shape"),
    "other VAE": (changed(hparams={"num_text_tokens": 49}), "570 logits, but 49 text tokens, 12 pads and the 40 image"),
    "sharing": (changed(hparams={"shared_ff_ids": (0,)}), "is not transformer.*, which it should repeat"),
    "cut": (changed(weights={f"{AT}.to_out.0.bias": None}), r"has no .*attentions\.0\.out\.bias"),
    "twice": (changed(weights={f"{AT}.fn.to_out.0.bias": torch.ones(D)}), "which are the same weight"),
    "more": (changed(weights={"clip.bias": torch.ones(3)}), "1 weights that no DALLE-pytorch has .* clip.bias"),
    "RMSNorm": (changed(weights={"transformer.layers.layers.0.0.fn.norm.g": torch.ones(D)}), "1 weights that no DALLE"),
    "no head": (changed(weights={"to_logits.1.weight": None}), r"has no to_logits\.1\.weight: it is cut"),
    "DeepSpeed": (
        lambda content: content | {"weights": "look into consolidating"},
        "no weights but a note, 'look into",
    ),
    "no VAE": (
        lambda content: content | {"weights": {"to_logits.0.bias": torch.ones(2)}},
        r"holds to_logits \(1\): expected a vae\.pt or a dalle\.pt",
    ),
    "CLIP": (lambda _: {"logit_scale": torch.ones(1)}, r"holds logit_scale: expected a vae\.pt or a dalle\.pt"),
    "only a VAE": (
        lambda content: {"hparams": VAE_PARAMS, "weights": vae_weights()},
        "is a VAE, without a transformer: expected a dalle.pt; `dalle import-dvae` takes it",
    ),
    "no hparams": (
        lambda content: content | {"hparams": {}},
        "has no hparams: expected a file that DALLE-pytorch's training",
    ),
    "transparent": (
        changed(vae_params={"channels": 4}, weights={"vae.encoder.0.0.weight": torch.ones(8, 4, 4, 4)}),
        "4 channels",
    ),
    "pixels": (changed(vae_params={"normalization": ((0.4,), (0.2,))}), "vae_params say normalization, which is not"),
    "tokens": (changed(vae_params={"num_tokens": 41}), "has num_tokens 40, but its vae_params say 41"),
    "size": (changed(vae_params={"image_size": 25}), r"image_size \(25\) must be a multiple of 4"),
    "its VAE is cut": (changed(weights={"vae.decoder.4.bias": None}), r"decoder\.4\.bias is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_computed_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    path, content = file_of(tmp_path / "dalle.pt")
    torch.save(change(content), path)
    with pytest.raises(ValueError, match=message):
        import_dalle(path, vocabulary=merges(tmp_path))


def merges(folder: Path) -> Path:
    """CLIP's list of merges, of as many as the transformers of these tests have ids for."""
    path = folder / "bpe_simple_vocab_16e6.txt"
    path.write_text("\n".join(["#version: 0.2", "c a", "ca t</w>", "r e", "re d</w>", ""]))
    return path


def test_a_file_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    path, content = file_of(tmp_path / "dalle.pt")
    for place in ("opt_state", "hparams"):
        torch.save(content | {place: Touch()}, path)
        for read in (import_dalle, import_vae):
            with pytest.raises(ValueError, match=r"would run code: it names (posix|nt)\.system"):
                read(path)
    assert not (tmp_path / "marker").exists()


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer",
    ),
    "page": (lambda _: b"<!DOCTYPE html><html>", "is a web page, not a checkpoint"),
    "cut": (lambda data: data[: len(data) // 2], "is cut off"),
    "nothing": (lambda _: b"", "is empty"),
    "damaged": (lambda data: data[:5000] + b"x" * 5000 + data[10000:], "download it again"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", ["import-dvae", "import-bundle"])
def test_a_wrong_file_is_named_in_one_line(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str
) -> None:
    change, message = FILES[name]
    path, _ = file_of(tmp_path / "dalle.pt")
    path.write_bytes(change(path.read_bytes()))
    options = ["dalle-pytorch", "--clip", str(bundle / "clip")] if verb == "import-bundle" else []
    assert main([verb, *options, str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_strides_beyond_the_data_are_refused(tmp_path: Path) -> None:
    path, content = file_of(tmp_path / "dalle.pt")
    view = torch.zeros(3 * T)[: T + 1].as_strided((T + 1, D), (1, 0))
    torch.save(content | {"weights": content["weights"] | {"text_pos_emb.weight": view}}, path)
    with pytest.raises(ValueError, match=r"text_pos_emb\.weight of shape \(13, 24\) does not fit its data"):
        import_dalle(path)


def test_tokenizers_are_told_apart_and_compared_with_the_transformer(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "dalle.pt")
    with pytest.raises(ValueError, match=r"has 518 text tokens, and CLIP's tokenizer 49,408: .* give its file with"):
        import_dalle(path)
    text = import_dalle(path, vocabulary=merges(tmp_path)).tokenizer
    assert text.vocab_size == TEXT
    assert text.encode("RED  cat&amp;<|endoftext|>")[:2] == [515, 513]
    assert max(text.encode("RED  cat&amp;<|endoftext|>")) < TEXT - 2
    pairs = OpenAIPairs([("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")])
    (tmp_path / "bpe.json").write_text(pairs.to_json())
    with pytest.raises(ValueError, match=r"bpe\.json has 516 ids, but the transformer 518"):
        import_dalle(path, tokenizer=tmp_path / "bpe.json")
    for data in ("{}", "no numbers", "3 4"):
        (tmp_path / "bad").write_text(data)
        with pytest.raises(ValueError, match="bad"):
            import_dalle(path, tokenizer=tmp_path / "bad")
    (tmp_path / "bpe.model").write_text("4 1\n9601 4\n97 5\n98 6\n65 7\n5 6 8\n1 0 2 3\n")
    text, name = import_tokenizer(tmp_path / "bpe.model", None, tmp_path, 9)
    assert name == "YouTokenToMe, bpe.model"
    assert text.encode("Ab ab\u00a0") == [4, 7, 6, 4, 8, 1]
    text.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.hash, again.encode("aB")) == (text.hash, [4, 5, 1])
    with pytest.raises(FileNotFoundError, match="expected the tokenizer that the transformer was trained with"):
        import_dalle(path, tokenizer=tmp_path / "missing.json")


def test_sparse_layers_without_blocks_are_dense_if_asked(tmp_path: Path) -> None:
    sparse, _ = file_of(tmp_path / "sparse.pt", attn_types=("full", "sparse"))
    dense, _ = file_of(tmp_path / "dense.pt", attn_types=("full",))
    found = import_dalle(sparse, vocabulary=merges(tmp_path), sparse_as_dense=True)
    assert "1 sparse layers see everything, since their blocks are lost: pictures are not as they were" in str(found)
    assert found.transformer_metadata["assumed"] == list(found.transformer.notes)
    text = found.transformer.model.config.text_rows(CAPTIONS)
    with torch.no_grad():
        expected = import_dalle(dense, vocabulary=merges(tmp_path)).transformer.model(text, IMAGES)[1]
        assert torch.equal(found.transformer.model(text, IMAGES)[1], expected)
    drawn = import_dalle(
        file_of(tmp_path / "drawn.pt", **CASES["sparse"])[0], vocabulary=merges(tmp_path), sparse_as_dense=True
    )
    assert "sparse" in drawn.transformer.model.config.kinds


def openai_weights() -> tuple[dict[str, Tensor], DVAE]:
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=V))
    names = {name: re.sub("bias$", "b", re.sub("weight$", "w", name)) for name in dvae.state_dict()}
    short = {name: re.sub("^encoder", "vae.enc", re.sub("^decoder", "vae.dec", new)) for name, new in names.items()}
    return {short[name]: weight for name, weight in dvae.state_dict().items()}, dvae


def vqgan_weights() -> tuple[dict[str, Tensor], VQGAN]:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(width=32, multiples=(1, 1, 2), n_blocks=1, attention=(2,), code_width=8, vocab_size=V))
    weights = {f"vae.model.{name}": weight for name, weight in vqgan.state_dict().items()}
    return weights | {"vae.model.loss.discriminator.main.0.weight": torch.ones(3)}, vqgan


@pytest.mark.parametrize("make", [openai_weights, vqgan_weights])
def test_a_vae_of_others_is_told_by_its_weights(
    tmp_path: Path, make: Callable[[], tuple[dict[str, Tensor], Any]]
) -> None:
    path, content = file_of(tmp_path / "dalle.pt")
    weights, codec = make()
    own = {name: weight for name, weight in content["weights"].items() if not name.startswith("vae.")}
    torch.save({**content, "vae_params": None, "weights": own | weights}, path)
    found = import_dalle(path, vocabulary=merges(tmp_path))
    assert type(found.codec.codec) is type(codec)
    tokens = torch.randint(0, V, (1, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.codec.codec.decode(tokens), codec.eval().decode(tokens))
    assert found.codec.codec.config.image_size == 256
    assert not [name for name in found.left if name.startswith("weights.vae.") and ".loss." not in name]


def test_an_import_holds_the_weights_once_and_one_tensor(
    tmp_path: Path, rise_of_memory: Callable[[Callable[[], object]], int]
) -> None:
    d, inner = 1152, 64
    shapes = {"to_logits.0.weight": (d,), "to_logits.0.bias": (d,), "to_logits.1.weight": (TEXT + T + V, d)}
    shapes |= {"to_logits.1.bias": (TEXT + T + V,), "text_emb.weight": (TEXT + T, d), "image_emb.weight": (V, d)}
    shapes |= {"text_pos_emb.weight": (T + 1, d), "image_pos_emb.weights.0": (1, GRID, 1, d)}
    shapes |= {"image_pos_emb.weights.1": (1, 1, GRID, d)}
    for half in (0, 1):
        shapes |= {f"transformer.layers.layers.0.{half}.fn.norm.{leaf}": (d,) for leaf in ("weight", "bias")}
        shapes[f"transformer.layers.layers.0.{half}.scale"] = (1, 1, d)
    at, mlp = "transformer.layers.layers.0.0.fn.fn.fn.", "transformer.layers.layers.0.1.fn.fn.net."
    shapes |= {f"{at}to_qkv.weight": (3 * inner, d), f"{at}to_out.0.weight": (d, inner), f"{at}to_out.0.bias": (d,)}
    shapes |= {
        f"{mlp}0.weight": (8 * d, d),
        f"{mlp}0.bias": (8 * d,),
        f"{mlp}3.weight": (d, 4 * d),
        f"{mlp}3.bias": (d,),
    }
    weights = {name: torch.ones(shape, dtype=torch.half) for name, shape in shapes.items()}
    hparams = {"num_text_tokens": TEXT, "text_seq_len": T, "dim": d, "depth": 1, "heads": 1, "dim_head": inner}
    moments = {str(i): torch.ones(2**25) for i in range(2)}
    weights |= {f"vae.{name}": weight for name, weight in vae_weights().items()}
    content = {"hparams": hparams, "vae_params": VAE_PARAMS, "version": "1.6.6", "weights": weights}
    torch.save(content | {"opt_state": moments}, tmp_path / "x.pt")
    n_bytes = 4 * sum(weight.numel() for weight in weights.values())
    kept: list[object] = []
    rise = rise_of_memory(lambda: kept.append(import_dalle(tmp_path / "x.pt", vocabulary=merges(tmp_path))))
    # with the optimizer's moments, twice 128 MiB, or with another copy, it would be more
    assert n_bytes * 0.9 < rise < n_bytes * 1.6


def test_the_command_makes_a_bundle_that_draws_and_reconstructs(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = file_of(tmp_path / "dalle.pt", **CASES["all kinds"])
    merges(tmp_path)
    out = tmp_path / "bundle"
    given = ["--vocabulary", str(merges(tmp_path)), "--clip", str(bundle / "clip"), "--out", str(out)]
    assert main(["import-bundle", "dalle-pytorch", str(path), *given]) == 0
    told = capsys.readouterr().out
    for line in (
        r"read: +.*dalle\.pt, torch\.save, sha256 [0-9a-f]{16}…",
        r"model: +DALLE-pytorch 1\.6\.6, [\d,]+ parameters, 3 layers of 24, 2 heads of 16, attention full \(1\), axial",
        r"text: +CLIP's BPE, 518 ids, 12 positions",
        r"codec: +DALLE-pytorch's own VAE, 40 tokens, 6×6 of a picture of 24 pixels, which are in \[-1, 1\] inside",
        r"assumed: +nothing",
        r"left: +weights\.logits_mask, opt_state\.state",
        r"licence: +not stated in the file",
        r"bundle of tokenizer [0-9a-f]{16}, dvae [0-9a-f]{16}, .* in .*bundle",
    ):
        assert re.search(line, told), line
    metadata = json.loads((out / "dalle" / "config.json").read_text())["metadata"]
    assert metadata["source_sha256"] in told.replace("…", "") or len(metadata["source_sha256"]) == 64
    pipe = Pipeline.load(out)
    assert pipe.defaults.top_k is None
    drawn = tmp_path / "drawn"
    settings = ["-n", "4", "--keep", "2", "--out", str(drawn)]
    assert main(["generate", "a red cat", "--bundle", str(out), *settings]) == 0
    pictures = sorted(drawn.glob("*/*.png"))
    assert Image.open(pictures[0]).size == (24, 24)
    capsys.readouterr()
    assert main(["reconstruct", str(pictures[0]), "--bundle", str(out), "--out", str(tmp_path / "again")]) == 0
    assert list((tmp_path / "again").rglob("*.png"))


def test_import_dvae_takes_a_vae_of_dalle_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"hparams": VAE_PARAMS, "weights": vae_weights()}, tmp_path / "vae.pt")
    assert main(["import-dvae", str(tmp_path / "vae.pt"), "--out", str(tmp_path / "dvae")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"codec: +DALLE-pytorch's own VAE, 40 tokens, 6×6", told)
    vae = load_codec(tmp_path / "dvae")
    assert isinstance(vae, DiscreteVAE)
    images = torch.rand(1, 3, 24, 24)
    assert torch.equal(vae.encode(images), import_vae(tmp_path / "vae.pt").codec.codec.encode(images))


def test_one_half_of_openais_dvae_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("dall_e.encoder")
    module.Encoder = type("Encoder", (), {"__module__": "dall_e.encoder"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    monkeypatch.setitem(sys.modules, "dall_e.encoder", module)
    torch.save(module.Encoder(), tmp_path / "encoder.pkl")
    assert main(["import-dvae", str(tmp_path / "encoder.pkl"), "--out", str(tmp_path / "dvae")]) == 1
    assert "one half of OpenAI's dVAE: give encoder.pkl and decoder.pkl" in capsys.readouterr().err
