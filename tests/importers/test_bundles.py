"""Bundles that imports write."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.data.bundle import load_bundle
from dalle.importers.bundles import StreamedModel, check_free, write_bundle
from dalle.model import DALLE
from dalle.pipeline import Pipeline
from dalle.tokenizer import Tokenizer
from dvae import DVAE


class Read(Mapping[str, Tensor]):
    """Weights that are read when they are asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.asked = state, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def streamed(dalle: DALLE, state: Mapping[str, Tensor]) -> StreamedModel:
    with torch.device("meta"):
        like = DALLE(dalle.config).state_dict()
    return StreamedModel(kind="dalle", config=dalle.config, state=state, like=like)


def write(source: Path, out: Path, transformer: StreamedModel | DALLE) -> dict[str, str]:
    return write_bundle(
        out,
        tokenizer=Tokenizer.load(source / "tokenizer.json"),
        codec=DVAE.load(source / "dvae"),
        transformer=transformer,
        clip=source / "clip",
        codec_metadata={"source": "a"},
        metadata={"source": "b", "null_caption_probability": 0.1, "sampling": {"guidance": 2.0}},
    )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_written_bundle_loads_and_draws_what_its_parts_draw(bundle: Path, tmp_path: Path, is_streamed: bool) -> None:
    dalle = DALLE.load(bundle / "dalle")
    state = Read(dalle.state_dict())
    hashes = write(bundle, tmp_path / "out", streamed(dalle, state) if is_streamed else dalle)
    assert len(set(state.asked)) == len(state.asked) == (len(state) if is_streamed else 0)
    written = load_bundle(tmp_path / "out", "cpu", "fp32")
    assert written.hashes == hashes == load_bundle(bundle, "cpu", "fp32").hashes
    assert written.dalle.metadata["source"] == "b"
    pipe = Pipeline.load(tmp_path / "out")
    assert pipe.defaults.guidance == 2
    drawn = [Pipeline.load(path).sample_tokens(["a red cube"], n=2).tokens for path in (bundle, tmp_path / "out")]
    assert drawn[0].shape == drawn[1].shape
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_is_written_whole_or_not_at_all(bundle: Path, tmp_path: Path) -> None:
    dalle = DALLE.load(bundle / "dalle")
    wrong = {**dalle.state_dict(), "final_norm.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"final_norm\.bias is torch\.float32 \(3,\) instead of"):
        write(bundle, tmp_path / "out", streamed(dalle, wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_and_a_folder_without_clip_are_refused_first(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("kept")
    for taken in (tmp_path, tmp_path / "x"):
        with pytest.raises(ValueError, match="is there already"):
            check_free(taken, bundle / "clip")
    with pytest.raises(FileNotFoundError, match="no clip in"):
        check_free(tmp_path / "out", tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a dvae, not a clip"):
        check_free(tmp_path / "out", bundle / "dvae")
    check_free(tmp_path / "out", bundle / "clip")
