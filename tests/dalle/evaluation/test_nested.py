import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import rank_order
from dalle.evaluation.nested.captions import Row, chosen_rows, list_hash, read_rows
from dalle.evaluation.nested.run import Nested, run_nested
from dalle.evaluation.nested.sample import Looks
from dalle.evaluation.nested.settings import NestedSettings
from dalle.evaluation.nested.shards import ShardFolder
from dalle.evaluation.numbers.inception_score import inception_score
from dalle.family.tokenizers import text_of
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking, Sampling, candidate_seed, sample
from dvae.images import to_tensor
from rerank import score
from storage.lock import FolderInUseError, locked

CAPTIONS = ["a red cube", "a blue cube on a red cube", "a green sphere"]
ROWS = [Row(number=number, caption=CAPTIONS[number % 3]) for number in range(7)]
SETTINGS = NestedSettings(best_of=(1, 2, 4, 8), shard_rows=3, batch_size=16)


class Colours:
    """In a network's place: mean colours as features, and as logits."""

    def __call__(self, images: list[Image.Image], radius: float = 0) -> dict[str, Tensor]:
        rows = torch.stack([to_tensor(image).mean((1, 2)) for image in images])
        return {"features": rows, "logits": 8 * rows}


LOOKS = Looks(network=Colours())  # type: ignore[arg-type]


def run(
    pipe: Pipeline, out: Path, rows: list[Row] = ROWS, settings: NestedSettings = SETTINGS, **more: object
) -> Nested:
    nested = run_nested(pipe, rows, settings, LOOKS, out, lambda line: None, **more)  # type: ignore[arg-type]
    assert nested is not None
    return nested


@pytest.fixture(scope="module")
def nested(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Nested:
    return run(pipe, tmp_path_factory.mktemp("nested") / "run")


# ------------------------------------------------------------------------------------------------ what is sampled


def test_candidates_are_functions_of_seed_row_caption_and_number(pipe: Pipeline, nested: Nested) -> None:
    # the obvious reference: one candidate after the other, each a batch of its own
    row = ROWS[4]
    text = text_of(pipe.tokenizer, [row.caption], pipe.dalle)
    for k in range(8):
        alone = sample(pipe.dalle, text, [candidate_seed(0, row.caption, k, row.number)])
        assert float(alone.log_likelihoods) == pytest.approx(float(nested.log_likelihoods[4, k]), abs=1e-3)
        cosine = score(pipe.clip, [row.caption], pipe.decode(alone.tokens[0]))
        assert float(cosine) == pytest.approx(float(nested.scores[4, k]), abs=1e-5)


def test_what_is_kept_is_the_best_of_the_first_n(pipe: Pipeline, nested: Nested) -> None:
    tokens = nested.read("tokens").long()
    for place, row in enumerate(ROWS):
        samples = pipe.sample_tokens([row.caption], 8, rows=[row.number])
        for at, n in enumerate(SETTINGS.best_of):
            best = int(rank_order(nested.scores[place, :n], nested.log_likelihoods[place, :n], "clip")[0])
            assert int(nested.kept[place, at]) == best
            assert torch.equal(tokens[place, at], samples.tokens[0, best])


@pytest.mark.parametrize("rank", ["clip", "likelihood", "both"])
def test_one_run_picks_what_separate_runs_pick(pipe: Pipeline, tmp_path: Path, rank: Ranking) -> None:
    several = run(pipe, tmp_path / "all", settings=NestedSettings(best_of=(1, 4, 8), rank=rank, shard_rows=7))
    for at, n in enumerate((1, 4, 8)):
        alone = run(pipe, tmp_path / f"{n}", settings=NestedSettings(best_of=(n,), rank=rank, shard_rows=2))
        assert torch.equal(alone.kept[:, 0], several.kept[:, at])
        assert torch.equal(alone.read("tokens")[:, 0], several.read("tokens")[:, at])


def test_equal_captions_in_several_rows_have_different_pictures(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a red cube\n" * 8)
    tokens = run(pipe, tmp_path / "run", read_rows(tmp_path / "captions.txt"), NestedSettings(best_of=(1,))).read(
        "tokens"
    )[:, 0]
    assert len({tuple(row) for row in tokens.tolist()}) == 8


def test_a_list_in_another_order_has_the_same_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"row": row.number, "caption": row.caption}) for row in ROWS]
    texts = {"a.jsonl": lines, "b.jsonl": lines[::-1]}
    for name, some in texts.items():
        (tmp_path / name).write_text("\n".join(some) + "\n")
    first, second = (chosen_rows(read_rows(tmp_path / name), 4) for name in texts)
    assert [(row.number, row.caption) for row in first] == [(row.number, row.caption) for row in second]
    assert list_hash(first) == list_hash(second)
    assert len(first) == 4
    assert list_hash(first) != list_hash(chosen_rows(ROWS, 5))


def test_the_numbers_of_a_text_are_those_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red cube\n\n  a blue cube \n")
    assert [(row.number, row.caption) for row in read_rows(tmp_path / "a.txt")] == [
        (0, "a red cube"),
        (2, "a blue cube"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no captions"),
        ('{"caption": 3}', "line 1 is no caption"),
        ("[1]", "line 1 is no caption"),
        ('{"caption": "a", "row": -1}', "line 1 is no caption"),
        ('{"caption": "a", "row": 1}\n{"caption": "b", "row": 1}', '2 captions have "row" 1'),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / "a.jsonl")


def test_groups_have_the_best_of_each(pipe: Pipeline, tmp_path: Path) -> None:
    nested = run(pipe, tmp_path / "run", settings=NestedSettings(best_of=(8,), pictures=4))
    assert nested.kept.shape == (7, 5)
    for scores, (best, *groups) in zip(nested.scores, nested.kept.tolist(), strict=True):
        assert groups == [2 * g + int(scores[2 * g : 2 * g + 2].argmax()) for g in range(4)]
        assert best in groups


# ------------------------------------------------------------------------------------------------ shards


def test_a_run_goes_on_from_the_shards_that_are_there_with_the_bits_of_one(
    pipe: Pipeline, nested: Nested, tmp_path: Path
) -> None:
    run(pipe, tmp_path / "run")
    (tmp_path / "run" / "00001.safetensors").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    said: list[str] = []
    again = run_nested(pipe, ROWS, SETTINGS, LOOKS, tmp_path / "run", said.append)
    assert again is not None
    assert said[0].startswith("2 of 3 shards are there")
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert torch.equal(again.scores, nested.scores)
    assert torch.equal(again.read("tokens"), nested.read("tokens"))
    for column in range(len(SETTINGS.best_of)):
        one, other = ([each.read(name, column) for name in ("features", "logits")] for each in (nested, again))
        assert torch.equal(one[0], other[0])
        assert inception_score(one[1], splits=2) == inception_score(other[1], splits=2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sampling": Sampling(seed=1)}, "sampling seed is 0 there, 1 here"),
        ({"best_of": (1, 2, 4)}, r"best of is \[1, 2, 4, 8\] there, \[1, 2, 4\] here"),
        ({"rank": "both"}, 'rank is "clip" there, "both" here'),
        ({"batch_size": 8}, "--batch-size is 8"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    nested: Nested, pipe: Pipeline, changed: dict[str, Any], words: str
) -> None:
    settings = NestedSettings(**{**vars(SETTINGS), **changed})
    with pytest.raises(ValueError, match=words):
        run(pipe, nested.folder.folder, settings=settings)


def test_another_bundle_or_list_is_refused_and_replaced_when_asked(pipe: Pipeline, tmp_path: Path) -> None:
    settings = NestedSettings(best_of=(1,), shard_rows=2)
    before = run(pipe, tmp_path / "run", ROWS[:4], settings)
    with pytest.raises(ValueError, match="captions is"):
        run(pipe, tmp_path / "run", ROWS[:3], settings)
    other = Pipeline(
        **{part: getattr(pipe, part) for part in ("tokenizer", "dalle", "dvae", "clip")}, hashes={"dvae": "other"}
    )
    with pytest.raises(ValueError, match="bundle dvae is"):
        run(other, tmp_path / "run", ROWS[:4], settings)
    after = run(pipe, tmp_path / "run", ROWS[:3], settings, fresh=True)
    assert torch.equal(after.scores, before.scores[:3])
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 2


def test_shards_of_another_key_or_damaged_ones_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    settings = NestedSettings(best_of=(1,), shard_rows=2)
    nested = run(pipe, tmp_path / "run", ROWS[:4], settings)
    other = ShardFolder(tmp_path / "other", {"seed": 1}, 2, batch_size=1)
    path = nested.folder.path(0)
    kept = path.read_bytes()
    path.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        run(pipe, tmp_path / "run", ROWS[:4], settings)
    other.write(0, {"rows": torch.arange(2)}, {"seconds": {}})
    path.write_bytes(other.path(0).read_bytes())
    with pytest.raises(ValueError, match="is of another run"):
        run(pipe, tmp_path / "run", ROWS[:4], settings)
    path.write_bytes(nested.folder.path(1).read_bytes())
    with pytest.raises(ValueError, match="holds other captions"):
        run(pipe, tmp_path / "run", ROWS[:4], settings)


def test_a_run_that_another_process_works_on_is_not_forgotten(tmp_path: Path) -> None:
    ShardFolder(tmp_path, {"seed": 0}, 2, batch_size=1).write(0, {"rows": torch.arange(2)}, {})
    with locked(tmp_path / ".00001"), pytest.raises(FolderInUseError, match="is in use by process"):
        ShardFolder(tmp_path, {"seed": 1}, 2, batch_size=1, fresh=True)
    assert ShardFolder(tmp_path, {"seed": 0}, 2, batch_size=1).missing() == [1]
    assert ShardFolder(tmp_path, {"seed": 1}, 2, batch_size=1, fresh=True).missing() == [0, 1]
