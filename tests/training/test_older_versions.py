"""What version 0.1 (commit 25307f4) wrote loads, and goes on as it would have gone on there.

tests/fixtures/v0.1 was made by that version with the recipe of support/tiny.py: a bundle, the transformer's checkpoint
after 4 steps with a manifest, and the encoded tokens of the same shard.
"""

import shutil
from pathlib import Path

import pytest
from support import tiny

import training.cli.main
import training.plan.machine
import training.ranks.job
import training.recipes
from dalle.pipeline import Pipeline
from training.report.status import show_status
from training.run_files import read_metrics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1"
CAPTION = "a small red circle above a large blue square on a white background"
TOKENS = [
    [23, 14, 10, 23, 7, 4, 15, 23, 6, 15, 16, 17, 2, 25, 31, 29],
    [2, 24, 23, 24, 27, 15, 0, 15, 12, 31, 20, 25, 21, 13, 4, 22],
]
SCORES = [-0.2170141488313675, -0.21822994947433472]
LOSSES = [3.651789903640747, 3.604743480682373, 3.5638439655303955, 3.540874719619751]
"""Of the steps 5 to 8, as version 0.1 went on."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, named from the working directory as it was there."""
    shutil.copytree(FIXTURE, tmp_path / "v0.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.plan.machine, "usable_cores", lambda: 1)
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)
    return Path("v0.1")


def test_a_bundle_gives_the_same_pictures(old: Path) -> None:
    result = Pipeline.load(old / "bundle").generate(CAPTION, n=4, keep=2, seed=5)
    assert result.tokens.tolist() == TOKENS
    assert result.scores.tolist() == pytest.approx(SCORES, abs=1e-5)


def test_a_run_with_a_manifest_goes_on(old: Path) -> None:
    options = ("--data", "v0.1/shards", "--manifest", "v0.1/manifest", "--out", "v0.1/bundle", "--steps", "8")
    assert training.cli.main.main(["transformer", "tiny", *options]) == 0
    lines = read_metrics(old / "bundle" / "training" / "transformer")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines][4:] == pytest.approx(LOSSES, abs=1e-4)


def test_encoded_tokens_are_trained_on(old: Path) -> None:
    parts = ("--tokenizer", "v0.1/bundle/tokenizer.json", "--dvae", "v0.1/bundle/dvae")
    assert training.cli.main.main(["transformer", "tiny", "--data", "v0.1/tokens", "--out", "new", *parts]) == 0
    assert (Path("new") / "dalle" / "model.safetensors").is_file()


def test_the_status_of_a_run_is_shown(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_status(old / "bundle", watch_s=None)
    assert "transformer" in capsys.readouterr().out
