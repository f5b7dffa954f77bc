import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from dalle.cli.main import main
from dalle.evaluation import networks
from dalle.evaluation.features.names import (
    distance_name,
    extrapolated_name,
    floor_name,
    kid_name,
    mmd_name,
    score_name,
)
from dalle.evaluation.features.nets import CLIPFeatures, FeatureNet, InceptionFeatures, in_equal_batches
from dalle.evaluation.features.profiles import (
    BLURS,
    PROFILES,
    Profile,
    ProfileNets,
    prepared,
    tf_pixels,
    unnormalised_pixels,
)
from dalle.evaluation.features.reference import Reference, ReferenceKey, picture_list_hash, reference
from dalle.evaluation.features.resize import resized, to_bytes
from dalle.evaluation.numbers.frechet import frechet_distance_of_features
from dalle.evaluation.numbers.kernels import KID
from dvae.images import to_image
from rerank import CLIP
from storage.models.directory import directory_hash


def pictures(n: int, height: int, width: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8) for _ in range(n)]
    return [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in small]


def as_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(256, 256), (480, 640), (100, 64), (299, 299)])
def test_the_first_tensorflows_resize_mixes_four_pixels_on_its_own_grid(size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8))
    found = resized(images, "tf1")
    for y, x in ((0, 0), (298, 298), (5, 250), (123, 77)):
        at_y, at_x = y * size[0] / 299, x * size[1] / 299
        top, left = int(at_y + 1e-4), int(at_x + 1e-4)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        for c in range(3):
            pixels = images[0, c].double()
            upper = pixels[top, left] + (pixels[top, right] - pixels[top, left]) * (at_x - left)
            lower = pixels[bottom, left] + (pixels[bottom, right] - pixels[bottom, left]) * (at_x - left)
            assert float(found[0, c, y, x]) == pytest.approx(float(upper + (lower - upper) * (at_y - top)), abs=0.02)
    if size == (299, 299):
        assert torch.equal(found, images.float())


def test_pillows_resizes_are_those_of_each_picture_alone() -> None:
    images = torch.stack([as_bytes(image) for image in pictures(2, 64, 80, 0)])
    bilinear = resized(images, "pil-bilinear")
    whole = np.asarray(to_image(images[1].float() / 255).resize((299, 299), Image.Resampling.BILINEAR))
    assert torch.equal(bilinear[1], torch.from_numpy(np.array(whole)).permute(2, 0, 1).float())
    bicubic = resized(images, "pil-bicubic-float")
    red = Image.fromarray(images[1, 0].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    assert torch.equal(bicubic[1, 0], torch.from_numpy(np.array(red)).clamp(0, 255))
    assert not torch.equal(bicubic, bicubic.round())  # not rounded to bytes
    for wrong in (images.float(), images[0], images[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            resized(wrong, "tf1")


def test_floats_are_rounded_not_cut() -> None:
    values = torch.tensor([0.0, 0.5 / 255 + 1e-4, 0.999, 1.0, 1.5, -1.0])
    assert to_bytes(values).tolist() == [0, 1, 255, 255, 255, 0]
    images = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_bytes(images), as_bytes(to_image(images)))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_blur_is_pillows_on_the_cropped_picture_and_radius_0_changes_no_bit(profile) -> None:
    image = pictures(1, 200, 300, 1)[0]
    plain = prepared(image, profile, side=64)
    assert (plain.shape, plain.dtype) == ((3, 64, 64), torch.uint8)
    assert torch.equal(prepared(image, profile, radius=0, side=64), plain)
    square = Image.fromarray(plain.permute(1, 2, 0).numpy())
    for radius in BLURS[1:]:
        expected = as_bytes(square.filter(ImageFilter.GaussianBlur(radius)))
        assert torch.equal(prepared(image, profile, radius=radius, side=64), expected)
    # what has the size already, such as a sample, stays as it is
    assert torch.equal(prepared(square, profile, side=64), plain)
    for radius, side in ((-1, 64), (float("nan"), 64), (float("inf"), 64), (0, 0)):
        with pytest.raises(ValueError, match="expected a radius"):
            prepared(image, profile, radius=radius, side=side)
    for mode in ("RGBA", "L"):
        with pytest.raises(ValueError, match=f"mode {mode}; expected RGB"):
            prepared(image.convert(mode), profile)


def test_crops_differ() -> None:
    image = Image.new("RGB", (96, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    centre, squashed = (prepared(image, PROFILES[name], side=30) for name in ("tf", "dalle2021"))
    assert centre[0].float().mean() < 10  # blue alone
    assert squashed[0].float().mean() == pytest.approx(170, abs=5)  # two thirds are red


def test_pixels_of_both_scales() -> None:
    pixels = torch.tensor([0.0, 128.0, 255.0]).expand(3, 3).T.reshape(3, 3, 1, 1)
    assert tf_pixels(pixels)[:, 0, 0, 0].tolist() == [-1, 0, 127 / 128]
    black, _, white = unnormalised_pixels(pixels)[:, :, 0, 0].tolist()
    assert black == pytest.approx([-0.03, -0.088, -0.188])
    assert white == pytest.approx([0.428, 0.36, 0.262])


class StandIn(nn.Module):
    """In Inception's place: pixels at 299 × 299 to 8 features, by a pool and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)
        rng = np.random.default_rng(3)
        self.mix = torch.from_numpy(rng.standard_normal((8, 3 * 20 * 20), dtype=np.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 299, 299)
        return F.adaptive_avg_pool2d(pixels, 20).flatten(1) @ self.mix.T

    def logits(self, features: Tensor, *, bias: bool) -> Tensor:
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


def net_of(profile_name: str) -> InceptionFeatures:
    profile = PROFILES[profile_name]
    pixels = unnormalised_pixels if profile.unnormalised else tf_pixels
    return InceptionFeatures(StandIn(), "ab12cd34" * 8, f"inception-{profile.scale}", profile.resize, pixels, 8)


class AsModule(nn.Module):
    """A feature net as torchmetrics wants one."""

    def __init__(self, net: FeatureNet) -> None:
        super().__init__()
        self.net, self.num_features = net, net.dimension

    def forward(self, images: Tensor) -> Tensor:
        return self.net.features(images)


@pytest.mark.slow
def test_the_profiles_differ_on_the_same_pictures_and_each_agrees_with_torchmetrics() -> None:
    real, fake = pictures(64, 128, 160, 1), pictures(64, 128, 128, 2)
    found = {}
    for name in ("dalle2021", "tf", "clean"):
        net, profile = net_of(name), PROFILES[name]
        sides = [torch.stack([prepared(image, profile, side=96) for image in side]) for side in (fake, real)]
        found[name] = frechet_distance_of_features(*(in_equal_batches(net.features, side) for side in sides))
        metric = FrechetInceptionDistance(feature=AsModule(net), input_img_size=(3, 299, 299), antialias=False)
        metric.update(sides[1], real=True)
        metric.update(sides[0], real=False)
        assert found[name] == pytest.approx(float(metric.compute()), rel=1e-5)
    assert len({f"{value:.6g}" for value in found.values()}) == 3


@pytest.mark.slow
def test_the_lines_of_the_command_name_the_profile_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def loaded(profile: Profile, *_: object) -> ProfileNets:
        return ProfileNets(net_of(profile.name), net_of(profile.name))

    monkeypatch.setattr(networks, "load_profile", loaded)
    (tmp_path / "made").mkdir()
    for number, image in enumerate(pictures(6, 64, 64, 2)):
        image.save(tmp_path / "made" / f"{number}.png")
    (tmp_path / "captions.txt").write_text("a red cube\n" * 6)
    with tarfile.open(tmp_path / "real.tar", "w") as tar:
        for number, image in enumerate(pictures(8, 64, 80, 1)):
            image.save(tmp_path / f"{number}.png")
            tar.add(tmp_path / f"{number}.png", f"{number}.png")
    found = {}
    for name in ("dalle2021", "tf", "clean"):
        given = [tmp_path / "made", tmp_path / "captions.txt", "--reference", tmp_path / "real.tar", "--profile", name]
        more = ["--features", "weights.pth", "--blur", "0,2", "--out", tmp_path / name]
        assert main(["evaluate", *map(str, [*given, *more])]) == 0
        out = capfd.readouterr().out
        lines = [line for line in out.splitlines() if line.startswith("FD")]
        scale = f"FD-inception-{PROFILES[name].scale} (n=6, weights ab12cd34)"
        assert len(lines) == 3
        assert all(line.startswith(scale) for line in lines)
        assert f"profile {name}: " in out
        # said once, for the three sets of pictures
        assert out.count("note: no IS, which needs 1,000 pictures") == 1
        assert out.count("note: no FD∞, which needs 36 pictures of each side for 8 features") == 1
        record = json.loads((tmp_path / name / "evaluation.json").read_text())["best_of"]
        assert record["blurred"]["0"]["inception_score"] is None
        found[name] = record["blurred"]["0"]["fd"]
    assert len({f"{value:.6g}" for value in found.values()}) == 3


@pytest.mark.slow
def test_blurring_the_reference_alone_gives_another_number_than_blurring_both() -> None:
    real, fake = pictures(16, 64, 64, 1), pictures(16, 64, 64, 2)
    net, profile = net_of("tf"), PROFILES["tf"]

    def features(side: list[Image.Image], radius: float) -> Tensor:
        return in_equal_batches(net.features, (prepared(image, profile, radius=radius, side=64) for image in side))

    both = frechet_distance_of_features(features(fake, 4), features(real, 4))
    alone = frechet_distance_of_features(features(fake, 0), features(real, 4))
    sharp = frechet_distance_of_features(features(fake, 0), features(real, 0))
    assert alone > 1.1 * sharp
    assert alone > 2 * both


def test_logits_with_and_without_the_bias() -> None:
    net = net_of("tf")
    images = torch.stack([as_bytes(image) for image in pictures(2, 40, 40, 0)])
    features, without = net.features_and_logits(images)
    again, with_bias = net.features_and_logits(images, bias=True)
    assert torch.equal(features, again)
    bias = net.net.fc.bias.detach()
    assert torch.allclose(with_bias - without, bias.expand(2, 5), atol=1e-4)


def test_every_batch_has_the_same_size_so_that_a_picture_has_the_same_bits_in_any_shard() -> None:
    images = [as_bytes(image) for image in pictures(11, 16, 16, 0)]
    sizes, done = [], []

    def compute(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch.flatten(1).float()

    rows = in_equal_batches(compute, iter(images), batch_size=4, progress=done.append)
    assert torch.equal(rows, torch.stack(images).flatten(1).float())
    assert (sizes, done) == ([4, 4, 4], [4, 8, 11])
    for wrong in (lambda: in_equal_batches(compute, []), lambda: in_equal_batches(compute, images, batch_size=0)):
        with pytest.raises(ValueError, match="at least"):
            wrong()
    with pytest.raises(ValueError, match=r"picture 5 is of shape \(3, 8, 8\), those before of \(3, 16, 16\)"):
        in_equal_batches(compute, [*images[:5], as_bytes(pictures(1, 8, 8, 0)[0])], batch_size=4)


def test_features_of_our_clip_are_those_that_rank(bundle: Path) -> None:
    clip = CLIP.load(bundle / "clip")
    net = CLIPFeatures(clip, directory_hash(bundle / "clip"))
    images = torch.stack([as_bytes(image) for image in pictures(3, 32, 32, 0)])
    features = net.features(images)
    assert features.shape == (3, net.dimension)
    assert torch.equal(features, clip.encode_image(images.float() / 255).detach())
    assert distance_name(net, 3) == f"FD-own-clip (n=3, weights {directory_hash(bundle / 'clip')[:8]})"


def test_no_name_is_a_bare_fid_and_each_says_n_and_weights() -> None:
    net = net_of("dalle2021")
    names = [
        distance_name(net, 30_000),
        extrapolated_name(net, 30_000),
        floor_name(net, 2500),
        kid_name(net, 30_000, KID(0.1, 0.01, 100, 1000)),
        mmd_name(net, 30_000, "v-statistic"),
        score_name(net, 30_000, 10),
        score_name(net, 30_000, 10, bias=True),
    ]
    assert names == [
        "FD-inception-dmgan (n=30000, weights ab12cd34)",
        "FD∞-inception-dmgan (n=30000, weights ab12cd34)",
        "floor of FD-inception-dmgan (n=2500, weights ab12cd34)",
        "KID-inception-dmgan (100 subsets of 1000, n=30000, weights ab12cd34)",
        "MMD-inception-dmgan (v-statistic, σ=10, ×1000, n=30000, weights ab12cd34)",
        "IS-inception-dmgan (no bias, 10 splits in order, n=30000, weights ab12cd34)",
        "IS-inception-dmgan (with bias, 10 splits in order, n=30000, weights ab12cd34)",
    ]


KEY = ReferenceKey(
    pictures=picture_list_hash([("a.png", b"1"), ("b.png", b"2")]),
    profile="tf",
    crop="centre",
    side=256,
    radius=0,
    network="inception-tf",
    weights="ab12",
    batch_size=32,
)


def counting(values: Tensor) -> Iterator[Tensor]:
    yield values
    raise AssertionError("computed again")


def test_a_reference_is_computed_once_and_a_hit_is_visible(tmp_path: Path) -> None:
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 4), dtype=np.float32))
    values = counting(features)
    first = reference(KEY, lambda: next(values), tmp_path / "new")
    second = reference(KEY, lambda: next(values), tmp_path / "new")
    assert first.note == f"reference: 9 pictures, computed now, {KEY.digest[:8]}"
    assert second.note == f"reference: 9 pictures, from cache, {KEY.digest[:8]}"
    assert torch.equal(second.features, features)
    for one, other in ((first.moments.mean, second.moments.mean), (first.moments.comoment, second.moments.comoment)):
        assert torch.equal(one, other)
    assert not reference(KEY, lambda: features, None).from_cache


def test_a_key_is_one_of_its_values_however_they_are_written() -> None:
    assert ReferenceKey(**{**vars(KEY), "radius": 0.0}).digest == KEY.digest
    assert picture_list_hash([("caf\udce9.png", b"1")]) != picture_list_hash([("cafe.png", b"1")])


@pytest.mark.parametrize(
    "other",
    [
        {"pictures": picture_list_hash([("b.png", b"2"), ("a.png", b"1")])},
        {"pictures": picture_list_hash([("a.png", b"1"), ("b.png", b"3")])},
        {"profile": "clean"},
        {"crop": "squash"},
        {"side": 64},
        {"radius": 1.0},
        {"network": "own-clip"},
        {"weights": "ab13"},
        {"batch_size": 16},
    ],
    ids=str,
)
def test_anything_that_changes_features_changes_the_key(other: dict[str, object], tmp_path: Path) -> None:
    made: list[Reference] = []
    for key in (KEY, ReferenceKey(**{**vars(KEY), **other})):
        made.append(reference(key, lambda: torch.eye(3), tmp_path))
    assert [each.from_cache for each in made] == [False, False]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_or_foreign_file_is_computed_again_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference(KEY, lambda: torch.eye(3), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    with caplog.at_level(logging.WARNING):
        file.write_bytes(whole[:-5])
        assert not reference(KEY, lambda: torch.eye(3), tmp_path).from_cache
        file.write_bytes(whole.replace(b"centre", b"squash"))
        assert not reference(KEY, lambda: torch.eye(3), tmp_path).from_cache
        # one bit of a number, which leaves the file well formed
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not reference(KEY, lambda: torch.eye(3), tmp_path).from_cache
        file.write_bytes(whole.replace(b"comoment", b"cumoment"))
        assert not reference(KEY, lambda: torch.eye(3), tmp_path).from_cache
    assert caplog.text.count("is computed again") == 4
    assert caplog.text.count("its numbers are damaged") == 1
    assert reference(KEY, lambda: torch.zeros(0), tmp_path).from_cache
