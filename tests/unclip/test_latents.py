import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.latents import PrincipalComponents, monotone_path, slerp, slerp_noise, text_difference


def units(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_slerp_goes_along_the_circle_at_equal_speed() -> None:
    a, b = units(5), units(5, seed=1)
    angle = (a * b).sum(dim=1).acos()
    for theta in (0.0, 0.25, 0.5, 1.0):
        between = slerp(a, b, theta)
        assert between.dtype == torch.float32
        torch.testing.assert_close(between.norm(dim=1), torch.ones(5))
        torch.testing.assert_close((a * between).sum(dim=1).clamp(max=1).acos(), theta * angle, atol=1e-3, rtol=0)
        torch.testing.assert_close(slerp(b, a, 1 - theta), between)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_lengths_of_vectors_are_interpolated_too() -> None:
    a, b = 2 * units(3), 4 * units(3, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.25).norm(dim=1), torch.full((3,), 2.5))


def test_parallel_vectors_go_straight_and_opposite_ones_are_refused() -> None:
    a = units(2).double()
    near = F.normalize(a + 1e-7 * units(2, seed=1).double(), dim=-1)
    torch.testing.assert_close(slerp(a, near, 0.5), F.normalize(a + near, dim=-1))
    assert torch.equal(slerp(a, a, 0.3), a) or torch.allclose(slerp(a, a, 0.3), a)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match=r"expected equal shapes, \[0, 1\]"):
        slerp(a, near, 1.5)


def test_noise_between_noises_is_still_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 3, 24, 24, generator=generator), torch.randn(3, 3, 24, 24, generator=generator)
    between = slerp_noise(a, b, 0.5)
    assert between.shape == a.shape
    assert float(between.std()) == pytest.approx(1.0, abs=0.03)
    assert float(((a + b) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.03)  # a line loses a third
    torch.testing.assert_close(slerp_noise(a, b, 1.0), b)


@pytest.mark.parametrize("seed", range(40))
def test_the_monotone_path_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = [1, 3, 4, 2, 1] if seed % 2 else [1, 2, 1, 1]  # with so few, many must return
    candidates = [units(count, 6, int(torch.randint(1000, (), generator=generator))) for count in counts]
    wanted = torch.randn(len(counts), 6, generator=generator)
    direction = candidates[-1][0] - candidates[0][0]

    def cost(path: tuple[int, ...]) -> tuple[float, float]:
        taken = torch.stack([some[k] for some, k in zip(candidates, path, strict=True)])
        falls = -(taken @ direction).diff().clamp(max=0).sum()
        return round(float(falls), 5), -float(F.cosine_similarity(taken, wanted, dim=1).sum())

    assert monotone_path(candidates, wanted) == list(min(itertools.product(*map(range, counts)), key=cost))


def test_of_equal_returns_the_cosines_choose() -> None:
    def at(progress: float, rest: int) -> Tensor:
        """A unit embedding (1, 5), its progress in its first number, the rest of its length in another."""
        vector = torch.zeros(1, 5)
        vector[0, 0], vector[0, rest] = progress, (1 - progress**2) ** 0.5
        return vector

    first, last, peak = at(-0.5, 1), at(0.5, 1), at(0.9, 2)
    along, back = at(0.9, 3), at(0.7, 4)  # from the peak to the last in one step or in two
    wanted = torch.cat([first, peak, along, last])
    assert monotone_path([first, peak, torch.cat([back, along]), last], wanted) == [0, 0, 1, 0]


def test_a_picture_that_is_embedded_twice_does_not_return() -> None:
    here, there = torch.eye(4)[None, 0], torch.eye(4)[None, 1]
    again = F.normalize(here - 1e-7 * there, dim=1)
    beyond = F.normalize(here + there, dim=1)
    # the second picture is the first with another rounding; it fits, the other does not
    assert monotone_path([here, torch.cat([again, beyond]), there], torch.cat([here, here, there])) == [0, 0, 0]


def test_a_path_has_a_candidate_at_each_place_and_one_at_both_ends() -> None:
    one, two = torch.eye(4)[:1], torch.eye(4)[:2]
    for candidates, count in (([two, one], 2), ([one, two], 2), ([one, one], 3), ([one, one[:0], one], 3)):
        with pytest.raises(ValueError, match="expected one at the first place and the last"):
            monotone_path(candidates, torch.ones(count, 4))


def test_a_text_difference_is_the_direction_between_two_captions() -> None:
    before, after = units(4), units(4, seed=1)
    difference = text_difference(before, after)
    torch.testing.assert_close(difference.norm(dim=1), torch.ones(4))
    lengths = (after - before).norm(dim=1, keepdim=True)
    torch.testing.assert_close(before + lengths * difference, after, atol=1e-6, rtol=0)
    assert ((difference * after).sum(dim=1) > 0).all()
    with pytest.raises(ValueError, match="same embedding"):
        text_difference(before, before)


def test_principal_components_are_those_of_the_covariance() -> None:
    spread = torch.linspace(3, 0.1, 12).double()
    given = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)).double() * spread + 5
    found = PrincipalComponents.of(given)
    covariance = torch.cov(given.T)
    torch.testing.assert_close(found.components @ covariance @ found.components.T, torch.diag(found.variances))
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(12).double())
    torch.testing.assert_close(found.rebuilt(given, 12), given)
    assert torch.equal(found.rebuilt(given, 0), found.mean.expand(400, 12))
    errors = [float((found.rebuilt(given, k) - given).square().sum()) / 399 for k in range(13)]
    torch.testing.assert_close(
        torch.tensor(errors[:-1]), torch.stack([found.variances[k:].sum() for k in range(12)]).float()
    )
    assert found.count_for(1.0) == 12
    assert found.count_for(float(found.variances[:3].sum() / found.variances.sum())) == 3


def test_the_signs_of_components_do_not_depend_on_the_order_of_the_embeddings() -> None:
    given = units(60).double()
    shuffled = given[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(PrincipalComponents.of(shuffled).components, PrincipalComponents.of(given).components)
    few = PrincipalComponents.of(given[:4])
    assert few.components.shape == (3, 16)
    torch.testing.assert_close(few.rebuilt(given[:4], 3), given[:4])
    with pytest.raises(ValueError, match="expected 0 to 3"):
        few.rebuilt(given, 4)
