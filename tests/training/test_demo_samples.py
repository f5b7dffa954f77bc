from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import training.demo.samples
from dalle.sampling import Samples, SamplingDefaults
from dvae.images import to_tensor
from training.demo.samples import (
    RANKINGS,
    RIGHT,
    SPLITS,
    WRONG,
    CheckedSamples,
    check_samples,
    different_captions,
    draw_curves,
    figure_of,
    samples_sheet,
    summary,
    table_of,
)
from training.drawings.shapes import draw, held_out_reason, parse, random_scene

RIGHT_OF_FOUR = [[True, False, False, False], [False, False, True, False], [False] * 4]


@pytest.fixture
def checked() -> CheckedSamples:
    # CLIP likes later candidates, the likelihood earlier ones
    return CheckedSamples(
        split="trained",
        captions=["one", "two", "three"],
        right=np.array(RIGHT_OF_FOUR),
        scores=torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(3, -1),
        log_likelihoods=torch.tensor([-1.0, -2.0, -3.0, -4.0]).expand(3, -1),
    )


@pytest.mark.parametrize(
    ("ranking", "n", "share"),
    [
        ("clip", 1, 2 / 12),
        ("oracle", 1, 2 / 12),
        ("clip", 2, 0),  # the later of each two is wrong
        ("likelihood", 2, 2 / 6),
        ("oracle", 2, 2 / 6),
        ("clip", 4, 0),
        ("likelihood", 4, 1 / 3),
        ("oracle", 4, 2 / 3),
    ],
)
def test_the_share_right_at_best_of_n(checked: CheckedSamples, ranking: str, n: int, share: float) -> None:
    assert checked.share_right(ranking, n) == pytest.approx(share)


def test_a_curve_begins_at_the_share_of_all_candidates_for_every_ranking(checked: CheckedSamples) -> None:
    for ranking in RANKINGS:
        curve = checked.curve(ranking)
        assert list(curve) == [1, 2, 4]
        assert curve[1] == pytest.approx(np.mean(RIGHT_OF_FOUR))


def test_the_table_and_the_summary_say_what_was_found(checked: CheckedSamples, tmp_path: Path) -> None:
    row = next(line for line in table_of([checked]).splitlines() if line.startswith(SPLITS["trained"]))
    assert [word for word in row.split() if "%" in word] == ["16.7%", "0.0%", "33.3%", "33.3%", "66.7%"]
    oracle = figure_of(checked).splitlines()[-1]
    assert [word for word in oracle.split() if "%" in word] == ["16.7%", "33.3%", "66.7%"]
    assert summary([checked])[0]["right"]["oracle"][4] == pytest.approx(2 / 3)
    draw_curves([checked], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 300


@pytest.mark.parametrize("split", SPLITS)
def test_captions_of_a_kind_are_different_and_of_that_kind(split: str) -> None:
    captions = different_captions(split, 20, share_of_three=0.0)
    assert len(set(captions)) == 20
    assert captions == different_captions(split, 20, share_of_three=0.0)
    reason = None if split == "trained" else split
    assert {held_out_reason(parse(told)) for told in captions} == {reason}


def test_samples_are_checked_ranked_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = different_captions("trained", 3, share_of_three=0.0)
    rng = np.random.default_rng(0)
    right = [to_tensor(draw(parse(told), rng, size=48)) for told in captions]
    wrong = to_tensor(draw(random_scene(rng, split="pair", share_of_three=0.0), rng, size=48))
    pictures = [torch.stack([wrong, image, wrong, wrong]) for image in right]

    def sample_tokens(group: list[str], n: int) -> Samples:
        numbers = torch.tensor([captions.index(told) for told in group])
        likelihoods = torch.tensor([-2.0, -1.0, -3.0, -4.0]).expand(len(group), -1)
        return Samples(tokens=numbers[:, None, None].expand(-1, n, 1), log_likelihoods=likelihoods)

    pipe = SimpleNamespace(
        sample_tokens=sample_tokens,
        decode=lambda tokens: pictures[int(tokens[0, 0])],
        clip=None,
        defaults=SamplingDefaults(rank="likelihood"),
    )
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    monkeypatch.setattr(training.demo.samples, "score", lambda clip, told, images: scores)
    said: list[str] = []
    checked, sections = check_samples(pipe, "trained", captions, said.append, n=4)
    assert checked.right.tolist() == [[False, True, False, False]] * 3
    assert checked.share_right("likelihood", 4) == 1
    assert checked.share_right("clip", 4) == 0
    assert len(sections) == 2
    assert sections[0].labels[:2] == ["right", "wrong"]
    assert sections[0].marks[:2] == [RIGHT, WRONG]
    assert said[-1].endswith("checked 3/3 captions")
    sheet = samples_sheet(sections, pipe)
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(0x1A, 0x8A, 0x3A), (0xD0, 0x20, 0x20)} <= colours
