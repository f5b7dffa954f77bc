import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from dalle.evaluation.numbers.frechet import (
    FrechetReference,
    extrapolated,
    floor,
    frechet_distance,
    frechet_distance_of_features,
    least_for_limit,
    nuclear_distance,
)
from dalle.evaluation.numbers.moments import Moments, merge


def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def correlated(n: int, d: int, seed: int) -> Tensor:
    mixing = normals(d, d, 99) / math.sqrt(d)
    return normals(n, d, seed) @ mixing + 0.3


def test_moments_are_those_of_numpy() -> None:
    features = correlated(50, 7, 0)
    moments = Moments.of(features.float())
    assert moments.n == 50
    assert torch.allclose(moments.mean, features.float().double().mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance, np.cov(features.float().numpy().astype(np.float64).T), rtol=1e-10)


def test_a_mean_over_ranks_is_not_the_distance_of_all() -> None:
    reference, samples = Moments.of(normals(2000, 16, 0)), correlated(301, 16, 1)
    parts = [Moments.of(part) for part in (samples[:151], samples[151:])]
    whole = frechet_distance(Moments.of(samples), reference)
    assert frechet_distance(merge(parts), reference) == pytest.approx(whole, rel=1e-9)
    assert sum(frechet_distance(part, reference) for part in parts) / 2 > 1.02 * whole


def test_merged_moments_are_those_of_all_pictures_also_far_from_zero() -> None:
    features = correlated(301, 9, 1) + 1e4
    whole, parts = Moments.of(features), merge(Moments.of(part) for part in features.split(37))
    assert parts.n == whole.n == 301
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(parts.comoment, whole.comoment, rtol=1e-9, atol=1e-9)


def test_shards_merged_in_their_order_have_the_same_bits_whoever_computed_and_stored_them(tmp_path) -> None:
    shards = correlated(301, 9, 1).split(37)
    one = merge(Moments.of(shard) for shard in shards)
    for rank in (1, 0):  # two processes, each with every second shard, the later one first
        for number in range(rank, len(shards), 2):
            Moments.of(shards[number]).save(tmp_path / f"{number}.safetensors", {"shard": str(number)})
    read = [Moments.load(tmp_path / f"{number}.safetensors") for number in range(len(shards))]
    assert [about["shard"] for _, about in read] == [str(number) for number in range(len(shards))]
    two = merge(moments for moments, _ in read)
    assert (two.n, two.mean.tolist(), two.comoment.tolist()) == (one.n, one.mean.tolist(), one.comoment.tolist())
    reference = Moments.of(correlated(200, 9, 2))
    assert frechet_distance(two, reference) == frechet_distance(one, reference)


def test_files_that_hold_no_moments_are_refused(tmp_path) -> None:
    file = tmp_path / "moments.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        Moments.load(file)
    file.write_bytes(b"no moments")
    with pytest.raises(ValueError, match="holds no moments"):
        Moments.load(file)
    good = Moments.of(normals(5, 3, 0))
    Moments(n=5, mean=good.mean[:2], comoment=good.comoment).save(file)
    with pytest.raises(ValueError, match="do not belong together"):
        Moments.load(file)
    Moments(n=5, mean=good.mean.float(), comoment=good.comoment.float()).save(file)
    with pytest.raises(ValueError, match="expected torch"):
        Moments.load(file)
    Moments(n=5, mean=good.mean * math.inf, comoment=good.comoment).save(file)
    with pytest.raises(ValueError, match="not finite"):
        Moments.load(file)
    save_file({"n": torch.arange(3), "mean": good.mean, "comoment": good.comoment}, file)
    with pytest.raises(ValueError, match="do not belong together"):
        Moments.load(file)


@pytest.mark.parametrize("features", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_features_is_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match="expected floats of shape"):
        Moments.of(features)


def test_the_picture_with_features_that_are_not_finite_is_named() -> None:
    features = torch.zeros(4, 3)
    features[2, 1] = math.nan
    with pytest.raises(ValueError, match="picture 2 are not finite"):
        Moments.of(features)


def test_moments_of_different_networks_are_refused() -> None:
    first, second = Moments.of(normals(5, 3, 0)), Moments.of(normals(5, 4, 0))
    for use in (lambda: merge([first, second]), lambda: frechet_distance(first, second)):
        with pytest.raises(ValueError, match="same network"):
            use()
    three, four = normals(9, 3, 0), normals(9, 4, 0)
    for use in (lambda: nuclear_distance(three, four), lambda: FrechetReference(first).distance(four)):
        with pytest.raises(ValueError, match="same network"):
            use()
    with pytest.raises(ValueError, match="at least 2 on both sides"):
        nuclear_distance(three, three[:1])
    with pytest.raises(ValueError, match="at least one shard"):
        merge([])
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(first, Moments.of(normals(1, 3, 0)))


def exact(mean: Tensor, covariance: Tensor, n: int = 1000) -> Moments:
    return Moments(n=n, mean=mean.double(), comoment=covariance.double() * (n - 1))


def test_known_distances() -> None:
    same = Moments.of(correlated(500, 20, 0))
    assert abs(frechet_distance(same, same)) < 1e-6
    shift = torch.tensor([0.5, -2.0, 3.0])
    zero, one = torch.zeros(3), torch.eye(3)
    assert frechet_distance(exact(zero, one), exact(shift, one)) == pytest.approx(float(shift @ shift), abs=1e-9)
    first, second = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 0.25, 2.0])
    expected = float((first.sqrt() - second.sqrt()).square().sum()) + float(shift @ shift)
    for form in ("eigh", "product"):
        got = frechet_distance(exact(zero, first.diag()), exact(shift, second.diag()), form=form)
        assert got == pytest.approx(expected, rel=1e-6)


def test_the_three_forms_and_torchmetrics_agree() -> None:
    first, second = correlated(300, 40, 1), normals(280, 40, 2)
    a, b = Moments.of(first), Moments.of(second)
    expected = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    others = [
        frechet_distance(a, b),
        frechet_distance(a, b, form="product"),
        nuclear_distance(first, second),
        frechet_distance_of_features(first, second),
        FrechetReference(b).distance(first),
    ]
    assert others == [pytest.approx(expected, rel=1e-6)] * 5


def test_fewer_pictures_than_features_agree_too_and_are_told(caplog) -> None:
    first, second = correlated(30, 50, 1), normals(40, 50, 2)
    a, b = Moments.of(first), Moments.of(second)
    with caplog.at_level(logging.WARNING):
        by_moments = frechet_distance(a, b)
    assert "singular (n=30, 50 features)" in caplog.text
    caplog.clear()
    assert nuclear_distance(first, second) == pytest.approx(by_moments, rel=1e-6)
    assert caplog.text == ""
    many = normals(400, 50, 3)  # one side has more pictures than features
    assert nuclear_distance(first, many) == pytest.approx(frechet_distance(a, Moments.of(many)), rel=1e-6)
    caplog.clear()
    assert frechet_distance_of_features(first, second) == pytest.approx(by_moments, rel=1e-6)
    assert "singular (n=30, 50 features)" in caplog.text
    caplog.clear()
    assert FrechetReference(b).distance(first) == pytest.approx(by_moments, rel=1e-6)
    assert "singular (n=30, 50 features)" in caplog.text


class Flat(torch.nn.Module):
    """Pictures of 2 × 4 pixels as 24 features."""

    num_features = 24

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


def test_torchmetrics_with_our_module_and_bytes_gives_the_same() -> None:
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.integers(0, 256, (200, 3, 2, 4), dtype=np.uint8))
    fake = torch.from_numpy(rng.integers(0, 200, (150, 3, 2, 4), dtype=np.uint8))
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 4), antialias=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance_of_features(Flat()(fake), Flat()(real))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)


def test_the_floor_is_above_zero_and_rises_as_n_falls() -> None:
    reference = normals(1000, 32, 3)
    whole, half, small = floor(reference), floor(reference, 250), floor(reference, 125)
    assert [whole.n, half.n, small.n] == [500, 250, 125]
    assert 0 < whole.distance < half.distance < small.distance
    assert floor(reference, 10_000) == whole
    assert floor(reference, seed=1) != whole
    # the drawn ones against all others, as samples are against all of the reference
    order = torch.from_numpy(np.random.default_rng(0).permutation(1000))
    directly = frechet_distance_of_features(reference[order[:125]], reference[order[125:]])
    assert small.distance == pytest.approx(directly, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        floor(reference[:3])


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_line_through_1_over_n_removes_most_of_the_bias(shift: float, truth: float) -> None:
    samples, reference = normals(1000, 64, 1), normals(1000, 64, 2)
    samples[:, 0] += shift
    plain = frechet_distance_of_features(samples, reference)
    assert plain > truth + 1.5  # 2.2 above it
    assert extrapolated(samples, reference) == pytest.approx(truth, abs=0.35)


def test_the_line_against_moments_leaves_the_bias_of_the_reference() -> None:
    samples, reference = normals(1000, 32, 1), normals(20_000, 32, 2)
    by_moments = extrapolated(samples, Moments.of(reference))
    assert abs(by_moments) < 0.15 < frechet_distance_of_features(samples, reference)
    with pytest.raises(ValueError, match="at least 16 samples"):
        extrapolated(samples[:10], reference)


def test_a_line_through_fewer_pictures_than_features_is_far_off_and_told(caplog: pytest.LogCaptureFixture) -> None:
    samples, reference = normals(520, 64, 1), normals(4000, 64, 2)
    moments = Moments.of(reference)
    with caplog.at_level(logging.WARNING):
        assert abs(extrapolated(samples, reference[:520])) < 1
        assert abs(extrapolated(samples, moments)) < 1
        assert caplog.text == ""
        assert extrapolated(samples[:128], moments) < -3  # below any distance; the truth is 0
        assert "FD∞ is far off: there are 128 pictures; for 64 features give at least 260" in caplog.text
        caplog.clear()
        assert abs(extrapolated(samples, reference[:128])) > 1
    assert "there are 128 pictures" in caplog.text
    assert [least_for_limit(dimension) for dimension in (1, 64, 2048)] == [16, 260, 8196]


def test_the_line_tells_every_point() -> None:
    samples, reference = normals(40, 4, 1), normals(40, 4, 2)
    for others in (reference, Moments.of(reference), FrechetReference(Moments.of(reference))):
        told: list[tuple[int, int]] = []
        extrapolated(samples, others, points=3, progress=lambda done, total, told=told: told.append((done, total)))
        assert told == [(1, 3), (2, 3), (3, 3)]
