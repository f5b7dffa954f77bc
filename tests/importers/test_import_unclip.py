"""An unCLIP as diffusers writes it becomes ours; beside diffusers itself in test_unclip_parity.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from unclip_files import DECODER, PRIOR, UPSAMPLER, small_clip, write_unclip

from dalle.cli.main import main
from dalle.importers.unclip.importing import import_unclip
from unclip import Decoder, Prior, Upsampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("karlo")
    write_unclip(path)
    return path


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if not name.startswith("null_text"):
            assert torch.equal(found[name], weight), name


def test_every_weight_arrives_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_unclip(tmp_path / "karlo")
    clip = small_clip()
    clip.save(tmp_path / "clip")
    (tmp_path / "karlo" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n", encoding="utf-8")
    out = tmp_path / "out"
    assert main(["import-unclip", str(tmp_path / "karlo"), "--clip", str(tmp_path / "clip"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "creativeml-openrail-m" in printed
    assert "upsampler-32" in printed
    prior, decoder = Prior.load(out / "prior"), Decoder.load(out / "decoder")
    upsampler = Upsampler.load(out / "upsampler-32")
    assert (prior.config, decoder.config, upsampler.config) == (PRIOR, DECODER, UPSAMPLER)
    for found, expected in zip((prior, decoder, upsampler), models, strict=True):
        assert_same(found.state_dict(), expected.state_dict())
    assert clip.tokenizer is not None
    empty = clip.text_states(clip.tokenizer.tokenize([""], 9), normalise=False)
    for model in (prior, decoder):
        torch.testing.assert_close(model.null_text.features.data, empty.features[0])
        torch.testing.assert_close(model.null_text.states.data, empty.states[0, :2])
    metadata = json.loads((out / "prior" / "config.json").read_text(encoding="utf-8"))["metadata"]
    assert "prior/diffusion_pytorch_model.safetensors" in metadata["source_sha256"]


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of a folder, in whose JSON file some values are others."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    content = json.loads((to / file).read_text(encoding="utf-8"))
    (to / file).unlink()
    (to / file).write_text(json.dumps(content | values), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("prior/config.json", {"norm_in_type": "layer"}, "norm_in_type 'layer'"),
        ("prior_scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ("prior/config.json", {"num_layers": 3}, "transformer_blocks.2.*missing"),
        ("prior/config.json", {"num_layers": 1}, "not known here: transformer_blocks.1"),
        ("decoder/config.json", {"mid_block_type": "UNetMidBlock2D"}, "UNetMidBlock2D'"),
        ("decoder/config.json", {"class_embed_type": None}, "class_embed_type None"),
        ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "variance_type"),
        ("text_proj/config.json", {"clip_embeddings_dim": "16"}, "expected a whole number"),
        ("super_res_first/config.json", {"add_attention": True}, "add_attention True"),
        ("super_res_first/config.json", {"down_block_types": ["DownBlock2D"] * 2}, "a level of the kind 'DownBlock2D'"),
    ],
)
def test_what_is_computed_in_another_way_is_refused(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_unclip(changed(folder, tmp_path / "other", file, **values), small_clip())


def test_a_clip_of_other_sizes_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", "prior/config.json")
    (other / "text_proj" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*text_proj"):
        import_unclip(other, small_clip())
    with pytest.raises(FileNotFoundError, match=r"no weights in .*nothing"):
        import_unclip(tmp_path / "nothing", small_clip())
    longer = changed(folder, tmp_path / "longer", "prior/config.json", num_embeddings=10)
    with pytest.raises(ValueError, match="import the CLIP that it was trained with"):
        import_unclip(longer, small_clip())
