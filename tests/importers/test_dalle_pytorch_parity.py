"""DALLE-pytorch's files beside the package that wrote them, with random weights; `make references` installs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from many_captions import captions
from references import reference
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from dalle.family.dalle_pytorch.attention import mask
from dalle.family.dalle_pytorch.cache import DALLEPytorchDecoder
from dalle.importers.dalle_pytorch.bundle import import_vae
from dalle.importers.dalle_pytorch.texts import CLIP_IDS, import_tokenizer
from dalle.importers.dalle_pytorch.transformer import import_transformer
from storage.checkpoints.tensors import open_tensors

T, V, TEXT, GRID = 6, 40, 50, 8
VAE = {"image_size": 32, "num_tokens": V, "codebook_dim": 16, "num_layers": 2, "num_resnet_blocks": 1, "hidden_dim": 8}
SIZES = {"num_text_tokens": TEXT, "text_seq_len": T, "dim": 24, "depth": 3, "heads": 2, "dim_head": 16}
FOUR = ("full", "axial_row", "axial_col", "conv_like")
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "as 0.14": {"rotary_emb": False, "shift_tokens": False},
    "reversible": {"reversible": True},
    "mixed types": {"depth": 5, "attn_types": FOUR},
    "stable and sandwich": {"stable": True, "sandwich_norm": True},
    "shared": {"shared_attn_ids": (0, 1, 0), "shared_ff_ids": (0, 0, 1), "share_input_output_emb": True},
    "odd widths": {"dim": 26, "dim_head": 10, "reversible": True, "attn_types": FOUR, "stable": True},
}
GENERATOR = torch.Generator().manual_seed(1)
CAPTIONS = [torch.randint(0, TEXT, (n,), generator=GENERATOR).tolist() for n in (3, T, 0)]
IMAGES = torch.randint(0, V, (3, GRID**2), generator=GENERATOR)


def with_random_weights(model: nn.Module) -> Any:
    """The same module, in which biases, norms and scales matter too."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "scale" in name or weight.ndim == 1:
                weight.normal_(std=0.3).add_(1.0 if "norm.weight" in name else 0.0)
    return model.eval()


def saved(path: Path, **options: Any) -> Any:
    """The package's model, after it was saved as its training script does."""
    package = reference("dalle_pytorch.dalle_pytorch")
    torch.manual_seed(0)
    model = with_random_weights(package.DALLE(vae=package.DiscreteVAE(**VAE), **{**SIZES, **options}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    # the script's own settings have no sandwich_norm; a newer one saves these two always
    hparams = {**SIZES, "shift_tokens": True, "rotary_emb": True, **options}
    hparams.pop("sandwich_norm", None)
    content = {"hparams": hparams, "vae_params": VAE, "epoch": 1, "version": "1.6.6", "vae_class_name": "DiscreteVAE"}
    content |= {"weights": model.state_dict(), "opt_state": optimizer.state_dict(), "scheduler_state": None}
    torch.save(content, path)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_transformer_computes_the_same(tmp_path: Path, name: str) -> None:
    theirs = saved(tmp_path / "dalle.pt", **CASES[name])
    ours = import_transformer(open_tensors(tmp_path / "dalle.pt"), codec_vocab=V, codec_grid=GRID).model
    text = ours.config.text_rows(CAPTIONS)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids + [0] * (T - len(ids)) for ids in CAPTIONS]), IMAGES)
        text_logits, image_logits = ours(text, IMAGES)
    torch.testing.assert_close(text_logits, expected[:, :T, : TEXT + T], atol=1e-5, rtol=0)
    torch.testing.assert_close(image_logits, expected[:, T:, TEXT + T :], atol=1e-5, rtol=0)
    decoder = DALLEPytorchDecoder(ours, text, [1, 1, 1], IMAGES[:, : GRID + 1])
    for i in range(GRID + 1, GRID**2):
        torch.testing.assert_close(decoder.step(IMAGES[:, i - 1]), expected[:, T + i, TEXT + T :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "axial_row", "axial_col", "conv_like"])
def test_who_sees_whom_is_what_the_package_computes(kind: str) -> None:
    package = reference("dalle_pytorch.attention")
    length = T + GRID**2
    classes = {
        "full": lambda: package.Attention(4, length, heads=1, dim_head=4),
        "axial_row": lambda: package.SparseAxialCausalAttention(4, length, GRID, axis=0, heads=1, dim_head=4),
        "axial_col": lambda: package.SparseAxialCausalAttention(4, length, GRID, axis=1, heads=1, dim_head=4),
        "conv_like": lambda: package.SparseConvCausalAttention(4, length, GRID, heads=1, dim_head=4),
    }
    torch.manual_seed(0)
    module = classes[kind]().double()
    x_SSD = torch.randn(length, 4, dtype=torch.float64).repeat(length, 1, 1)
    with torch.no_grad():
        before_SSD = module(x_SSD)
        x_SSD.diagonal(dim1=0, dim2=1).add_(1)  # in the n-th copy only position n is another
        changed_SS = (module(x_SSD) - before_SSD).abs().amax(-1).T
    assert torch.equal(changed_SS > 1e-9, mask(kind, T, GRID, torch.device("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("n_blocks", [0, 2])
def test_the_vae_computes_the_same(tmp_path: Path, n_blocks: int) -> None:
    package = reference("dalle_pytorch.dalle_pytorch")
    torch.manual_seed(0)
    params = {**VAE, "num_resnet_blocks": n_blocks, "channels": 3}
    theirs = package.DiscreteVAE(**params).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(3)
    torch.save({"hparams": params, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    ours = import_vae(tmp_path / "vae.pt").codec.codec
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = theirs.get_codebook_indices(images)
    assert len(tokens.unique()) > 5
    assert torch.equal(ours.encode(images).flatten(1), tokens)
    pictures = (theirs.decode(tokens) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.decode(tokens.view(4, GRID, GRID)), pictures, atol=1e-5, rtol=0)


def test_500_captions_have_the_same_ids_as_in_the_package(tmp_path: Path) -> None:
    package = reference("dalle_pytorch.tokenizer")
    vocabulary = Path(package.__file__).parent / "data" / "bpe_simple_vocab_16e6.txt"
    ours, _ = import_tokenizer(None, vocabulary, tmp_path, CLIP_IDS)
    assert ours.vocab_size == package.SimpleTokenizer().vocab_size
    theirs = package.SimpleTokenizer(vocabulary)
    found = captions(500)
    assert [ours.encode(caption) for caption in found] == [theirs.encode(caption) for caption in found]


def hugging_face(path: Path) -> Path:
    """A tokenizer with a template that adds tokens, as BERT's has, which the package takes out."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(captions(200), trainers.WordPieceTrainer(vocab_size=900, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))
    return path


def test_a_hugging_face_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    package = reference("dalle_pytorch.tokenizer")
    theirs = package.HugTokenizer(hugging_face(tmp_path / "bpe.json"))
    ours, _ = import_tokenizer(tmp_path / "bpe.json", None, tmp_path, theirs.vocab_size)
    ours.save(tmp_path / "tokenizer.json")
    again = type(ours).load(tmp_path / "tokenizer.json")
    assert again.hash == ours.hash
    found = captions(500)
    assert [again.encode(caption) for caption in found] == [theirs.encode(caption) for caption in found]
