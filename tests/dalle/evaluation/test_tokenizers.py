"""Several tokenizers side by side: `dalle reconstruct PICTURES --dvae A B`."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli.main import main
from dalle.data.pictures import Pictures
from dalle.evaluation.numbers.frechet import frechet_distance_of_features
from dalle.evaluation.reconstruction import reconstructions
from dalle.evaluation.tokenizers.codes import by_frequency, drawn, entropy_by_place, mosaic
from dalle.evaluation.tokenizers.comparison import Comparison
from dalle.evaluation.tokenizers.contenders import Contender, Prior, load_contenders
from dalle.evaluation.tokenizers.pictures import crop_side, error_map, worst_place
from dalle.evaluation.tokenizers.rates import nats_of, rates
from dalle.family.tokenizers import text_of
from dalle.pipeline import Pipeline
from dalle.sampler.likelihood import log_likelihoods
from dvae import DVAE, DVAEConfig
from dvae.images import resize_and_crop, to_image, to_tensor
from dvae.vqgan import VQGAN, VQGANConfig
from rerank import CLIP
from rerank.score import embed_images
from storage.drawn import is_sheet
from storage.models.directory import directory_hash

CPU = torch.device("cpu")
CAPTION = "a red cube on a blue cube"


def noise(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    return to_image(torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))


def png(seed: int) -> bytes:
    data = io.BytesIO()
    noise(seed).save(data, format="PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, two of them with captions; not to be changed."""
    path = tmp_path_factory.mktemp("pictures")
    for seed in range(5):
        noise(seed).save(path / f"{seed}.png")
    (path / "1.txt").write_text(f"\n{CAPTION}\nanother")
    (path / "3.json").write_text(json.dumps({"caption": CAPTION}))
    (path / "4.txt").write_text(" ")
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE with 8×8 pixels to a token and pictures of 32 pixels."""
    path = tmp_path_factory.mktemp("models") / "large"
    config = DVAEConfig(n_hid=8, n_init=8, n_groups=4, n_blocks=1, vocab_size=16, image_size=32)
    DVAE(config, generator=torch.Generator().manual_seed(3)).save(path)
    return path


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("models") / "vqgan"
    sizes = {"multiples": (1, 1), "attention": (), "n_blocks": 1, "z_channels": 8, "code_width": 8}
    VQGAN(VQGANConfig(width=32, vocab_size=24, image_size=16, **sizes)).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def compared(
    bundle: Path, large: Path, vqgan: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """What the command writes for a bundle, a dVAE of other sizes and a VQGAN."""
    out = tmp_path_factory.mktemp("compared")
    models = ["--dvae", str(bundle), str(large), str(vqgan), "--clip", str(bundle)]
    assert main(["reconstruct", str(folder), *models, "--codes", "--out", str(out)]) == 0
    return out, json.loads((out / "comparison.json").read_text())


def contender(path: Path) -> Contender:
    return load_contenders([path], device=CPU)[0]


# ------------------------------------------------------------------------------------------------ the command


def test_each_reads_at_its_own_size_and_all_are_measured_at_the_largest(
    compared: tuple[Path, dict], large: Path, bundle: Path, folder: Path
) -> None:
    _, report = compared
    tiny, other, gan = report["tokenizers"]
    assert (report["size"], report["n"], report["n_captions"]) == (32, 5, 2)
    assert [each["size"] for each in report["tokenizers"]] == [16, 32, 16]
    assert [each["tokens"] for each in report["tokenizers"]] == [16, 16, 64]
    assert [each["bits"]["raw"] for each in report["tokenizers"]] == pytest.approx([16 * 5, 16 * 4, 64 * math.log2(24)])
    assert tiny["bits_per_pixel"]["raw"] == pytest.approx(80 / 32**2)
    assert [each["hash"] for each in (tiny, other)] == [directory_hash(bundle / "dvae"), directory_hash(large)]
    # the one of the largest size is measured as if alone, but for rounding to 8 bits
    named = [(str(path), Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    alone = [one.measures.psnr for one in reconstructions(DVAE.load(large), named, 32)]
    assert [one["psnr"] for one in other["pictures"]] == pytest.approx(alone, abs=0.02)
    assert other["mean"]["psnr"] == pytest.approx(sum(one["psnr"] for one in other["pictures"]) / 5)
    # a smaller one by hand: decoded at 16 pixels, enlarged, beside the original of 32
    codec = DVAE.load(bundle / "dvae")
    with torch.no_grad():
        drawn_16 = codec.decode(codec.encode(to_tensor(resize_and_crop(named[0][1], 16))[None]))[0]
    enlarged = to_image(drawn_16).resize((32, 32), Image.Resampling.LANCZOS)
    error = (to_tensor(enlarged) - to_tensor(resize_and_crop(named[0][1], 32))).square().mean()
    assert tiny["pictures"][0]["psnr"] == pytest.approx(float(-10 * error.log10()), abs=1e-4)
    assert gan["codes"] == 24


def test_bits_under_the_transformer_are_its_likelihood_given_the_captions(
    compared: tuple[Path, dict], pipe: Pipeline, folder: Path
) -> None:
    _, report = compared
    total = 0.0
    for number in range(5):
        found = pipe.likelihood(CAPTION, [Image.open(folder / f"{number}.png")])
        each = found.with_caption if number in (1, 3) else found.without_caption
        total -= float(each.sum())
    bits = report["tokenizers"][0]["bits"]
    assert bits["transformer"] == pytest.approx(total / 5 / math.log(2), rel=1e-4)
    assert bits["transformer"] != pytest.approx(bits["entropy"], rel=1e-3)
    assert report["tokenizers"][1]["bits"]["transformer"] is None


def test_the_distance_is_that_of_clips_features_at_the_common_size(
    compared: tuple[Path, dict], bundle: Path, large: Path, folder: Path
) -> None:
    _, report = compared
    clip, codec = CLIP.load(bundle / "clip"), DVAE.load(large)
    originals = torch.stack([to_tensor(resize_and_crop(Image.open(folder / f"{i}.png"), 32)) for i in range(5)])
    with torch.no_grad():
        decoded = torch.stack([to_tensor(to_image(image)) for image in codec.decode(codec.encode(originals))])
    wanted = frechet_distance_of_features(embed_images(clip, originals), embed_images(clip, decoded))
    found = report["tokenizers"][1]["distance"]
    assert found["distance"] == pytest.approx(wanted, rel=1e-4)
    assert (found["n"], report["distance"]) == (5, f"FD-own-clip {directory_hash(bundle / 'clip')[:8]}")
    assert found["floor"] > 0
    assert "singular" in found["note"]


def test_sheets_and_plots_are_written_with_a_column_for_each(compared: tuple[Path, dict]) -> None:
    out, _ = compared
    sheets = ["reconstructions.png", "worst.png", "codes-tiny.png", "codes-large.png", "codes-vqgan.png"]
    assert {path.name for path in out.iterdir()} == {
        *sheets,
        "codes.png",
        "comparison.json",
        "rate-distortion.png",
        "rate-distortion.svg",
    }
    assert all(is_sheet(out / name) for name in sheets)
    assert Image.open(out / "reconstructions.png").width == 2 * 16 + 4 * 128 + 3 * 12
    svg = (out / "rate-distortion.svg").read_text()
    assert all(
        f">{word}<" in svg for word in ("tiny", "large", "vqgan", "PSNR, dB", "MS-SSIM", "under the transformer")
    )
    assert "FD-own-clip" in svg


def test_the_table_has_a_line_for_each_tokenizer(
    bundle: Path, large: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reconstruct", str(folder), "--dvae", str(bundle / "dvae"), str(large), "--out", str(tmp_path / "out")]
    assert main([*words, "--size", "16"]) == 0
    printed = capsys.readouterr()
    heads, *lines = printed.out.splitlines()
    assert heads.split("  ")[-1] == "tokenizer"
    assert [line.split()[-1] for line in lines[:2]] == ["tiny", "large"]
    assert lines[0].split()[-5:-1] == ["80", lines[0].split()[-4], "-", "0.312"]  # no transformer was given
    assert "fewer than 10 tokens for each code of tiny, large" in printed.err
    assert "own size" not in printed.err, "--size gives one for all"
    assert json.loads((tmp_path / "out/comparison.json").read_text())["size"] == 16
    assert not (tmp_path / "out/codes.png").exists()


def test_one_picture_is_enough_and_has_no_distance(
    bundle: Path, large: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reconstruct", str(folder / "0.png"), "--dvae", str(bundle), str(large), "--clip", str(bundle / "clip")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "it needs at least 2 pictures, there is 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/comparison.json").read_text())["tokenizers"][0]["distance"] is None
    assert "FD-own-clip" not in (tmp_path / "out/rate-distortion.svg").read_text()


def test_one_tokenizer_is_reconstructed_as_before(bundle: Path, folder: Path, tmp_path: Path) -> None:
    for name, dvae in (("bundle", bundle), ("dvae", bundle / "dvae")):
        assert main(["reconstruct", str(folder), "--dvae", str(dvae), "--out", str(tmp_path / name)]) == 0
        assert {path.name for path in (tmp_path / name).iterdir()} == {"metrics.json", "reconstructions.png"}
    assert (tmp_path / "bundle/metrics.json").read_text() == (tmp_path / "dvae/metrics.json").read_text()


def test_what_cannot_be_compared_ends_in_a_line(
    bundle: Path, large: Path, vqgan: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, empty, broken = tmp_path / "decoder", tmp_path / "empty", tmp_path / "broken"
    whole = VQGAN.load(vqgan)
    config = VQGANConfig(**{**vars(whole.config), "has_encoder": False})
    VQGAN(config).save(decoder)
    empty.mkdir()
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no picture")

    def error(pictures: Path, *words: object) -> str:
        assert main(["reconstruct", str(pictures), "--out", str(tmp_path / "out"), *map(str, words)]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    two = ("--dvae", bundle, large)
    assert "decoder is a decoder alone, it cannot read pictures: import one with both" in error(
        folder, "--dvae", bundle, decoder
    )
    assert f"multiple of 8, the pixels per side that one token of {large}" in error(folder, *two, "--size", "20")
    assert "is given twice: give each tokenizer once" in error(folder, "--dvae", large, large.parent / "." / "large")
    assert "nothing" in error(folder, "--dvae", large, tmp_path / "nothing")
    assert "no pictures in the folder" in error(empty, *two)
    assert "none of the 1 pictures" in error(broken, *two)
    assert "clip" in error(folder, *two, "--clip", bundle / "dvae")
    assert "no bundle at" in error(folder, "--codes", "--bundle", tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ its parts


def test_names_tell_tokenizers_apart(bundle: Path, large: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a/run/dvae", tmp_path / "b/run/dvae", tmp_path / "c/other", bundle]
    for path in paths[:3]:
        DVAE.load(large).save(path)
    names = [one.name for one in load_contenders(paths, device=CPU)]
    assert names == ["a/run", "b/run", "other", "tiny"]


def test_a_transformer_counts_only_at_the_size_of_its_grid(bundle: Path) -> None:
    assert load_contenders([bundle], device=CPU)[0].prior is not None
    assert load_contenders([bundle], device=CPU, size=32)[0].prior is None


def test_a_transformer_of_another_dvae_is_refused(bundle_copy: Path, another_dvae: Callable[[Path], None]) -> None:
    another_dvae(bundle_copy / "dvae")
    with pytest.raises(ValueError, match="trained with the dvae"):
        load_contenders([bundle_copy], device=CPU)


def test_nats_are_the_sums_that_decoding_finds(pipe: Pipeline) -> None:
    tokens_NYX = torch.randint(0, 32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    prior = Prior(tokenizer=pipe.tokenizer, transformer=pipe.dalle)
    captions = [CAPTION, None, "a green sphere left of a red cube"]
    texts = [
        pipe.dalle.config.null_caption()[None] if c is None else text_of(pipe.tokenizer, [c], pipe.dalle)
        for c in captions
    ]
    slow = [
        -float(log_likelihoods(pipe.dalle, text, tokens.flatten()[None]).sum())
        for text, tokens in zip(texts, tokens_NYX, strict=True)
    ]
    nats, n_cut = nats_of(prior, tokens_NYX, [*captions[:2], "a red cube on a blue cube " * 9])
    assert nats[:2] == pytest.approx(slow[:2], rel=1e-5)
    assert n_cut == 1
    assert nats_of(prior, tokens_NYX, captions)[0] == pytest.approx(slow, rel=1e-5)


def test_rates_of_known_tokens() -> None:
    tokens = torch.tensor([[[0, 0], [1, 2]], [[0, 0], [1, 2]]])
    found = rates(tokens, 8, [math.log(2), 3 * math.log(2)])
    assert (found.tokens, found.raw, found.transformer) == (4, 12.0, pytest.approx(2.0))
    assert found.entropy == pytest.approx(4 * 1.5)
    assert found.per_pixel(16) == {"raw": 0.75, "entropy": pytest.approx(6 / 16), "transformer": pytest.approx(1 / 8)}
    assert rates(tokens, 8, []).per_pixel(16)["transformer"] is None


def test_entropy_by_place_is_that_of_each_place_alone() -> None:
    tokens = torch.randint(0, 5, (40, 2, 3), generator=torch.Generator().manual_seed(1))
    tokens[:, 1, 2] = 4
    found = entropy_by_place(tokens, 5)
    for y in range(2):
        for x in range(3):
            alone = rates(tokens[:, y : y + 1, x : x + 1], 5, [])
            assert found[y, x] == pytest.approx(alone.entropy)
    assert found[1, 2] == 0


def test_codes_are_ordered_by_use_and_drawn_alone_and_flat(large: Path) -> None:
    order, counts = by_frequency(torch.tensor([[3, 3, 1], [1, 3, 0]]), 6)
    assert (order.tolist(), counts.tolist()) == ([3, 1, 0, 2, 4, 5], [3, 2, 1, 0, 0, 0])
    codec = contender(large).codec
    codes = torch.tensor([5, 0])
    for side in (1, 4):
        images = drawn(codec, codes, side=side)
        with torch.no_grad():
            wanted = to_image(codec.decode(torch.full((1, side, side), 5))[0])
        assert images[0].size == (8 * side, 8 * side)
        assert np.array_equal(np.asarray(images[0]), np.asarray(wanted))


def test_a_mosaic_enlarges_by_whole_pixels_and_marks_codes_that_are_not_used() -> None:
    tiles = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "lime", "black")]
    sheet = mosaic(tiles, n_used=2, tile=10, gap=2)
    assert sheet.size == (24, 24)
    assert [sheet.getpixel((5, 5)), sheet.getpixel((17, 5)), sheet.getpixel((5, 17))] == [
        (0, 0, 255),
        (0, 255, 0),
        (0, 0, 0),
    ]
    assert sheet.getpixel((0, 0)) == (255, 255, 255), "8 of 10 pixels, centred"
    assert sheet.getpixel((0, 12)) == (190, 30, 30)


def test_errors_and_where_they_are_largest() -> None:
    original = Image.new("RGB", (32, 32), "black")
    image = original.copy()
    image.paste((64, 32, 0), (20, 8, 24, 12))
    found = error_map(original, image)
    assert found.getpixel((0, 0)) == 0
    assert found.getpixel((21, 9)) == int(32 * 255 / 64)
    left, top = worst_place([found, found], 8)
    assert 16 <= left <= 20
    assert 4 <= top <= 8
    assert (crop_side(16), crop_side(48), crop_side(256), crop_side(1)) == (16, 32, 64, 1)


def test_the_worst_pictures_are_kept_the_worst_first(bundle: Path, large: Path) -> None:
    comparison = Comparison(load_contenders([bundle / "dvae", large], device=CPU, size=16))
    pictures = [(str(seed), noise(seed, (16, 16))) for seed in range(7)]
    found = comparison.add(pictures[:3], {}) + comparison.add(pictures[3:], {})
    assert [one.name for one in comparison.worst] == [one.name for one in sorted(found, key=lambda one: one.psnr)[:4]]
    first = found[0]
    assert first.psnr == pytest.approx((first.measures[0].psnr + first.measures[1].psnr) / 2)


def test_nothing_compared_is_said() -> None:
    codec = DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=2, n_blocks=1, vocab_size=4, image_size=16))
    with pytest.raises(ValueError, match="no pictures were compared"):
        Comparison([Contender(name="x", codec=codec, hash="", size=16)]).standings()
    with pytest.raises(ValueError, match="no tokenizers: give at least one"):
        load_contenders([], device=CPU)


def test_captions_of_shards_are_found_too(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.txt": CAPTION.encode(), "b.png": png(1), "c.png": png(2), "c.json": b'{"text": "x"}'}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for captions in (True, False):
        pictures = Pictures([tmp_path / "s.tar"], captions=captions)
        assert [name for name, _ in pictures] == ["s.tar/a.png", "s.tar/b.png", "s.tar/c.png"]
        assert pictures.captions == ({"s.tar/a.png": CAPTION, "s.tar/c.png": "x"} if captions else {})
