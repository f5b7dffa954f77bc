import io
import json
import os
import re
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.best_of_n import rank_order
from dalle.cli import features
from dalle.cli.command import resolve_device, run_command
from dalle.cli.computing import n_bytes
from dalle.cli.generate import read_captions
from dalle.cli.importing import import_dvae
from dalle.cli.main import main
from dalle.data import pictures, reader
from dalle.model import DALLE
from dalle.output.sheets import slug
from dalle.pipeline import Pipeline
from dvae import DVAE
from dvae.images import to_image
from rerank import CLIP
from storage.models.directory import directory_hash
from training.cli.main import main as train

CAPTION = "a red cube on a blue cube"


def save_noise(path: Path, seed: int, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, one of them in a folder of its own, and a text file."""
    path = tmp_path / "pictures"
    for seed, name in enumerate(["a.png", "b.png", "deeper/c.png", "d.png"]):
        save_noise(path / name, seed)
    (path / "notes.txt").write_text("not a picture")
    return path


def make_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def assert_one_line_error(capsys, argv: list, *words: str) -> None:
    """The program must end with code 1 and one last line that says what is wrong."""
    assert main([str(argument) for argument in argv]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert errors.endswith(lines[0] + "\n")
    for word in words:
        assert word in lines[0]


# generate


def generate(bundle: Path, out: Path, *options: str) -> int:
    return main(["generate", "--bundle", str(bundle), "--out", str(out), "-n", "4", "--keep", "2", *options])


def test_generate_writes_pictures_a_sheet_and_a_line_for_each(bundle, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION, "一只猫 🐈", "--seed", "5") == 0
    assert "4 pictures" in capsys.readouterr().out
    assert Image.open(out / "sheet.png").width > 128
    lines = results(out)
    assert [(line["caption"], line["rank"]) for line in lines] == [
        (CAPTION, 1),
        (CAPTION, 2),
        ("一只猫 🐈", 1),
        ("一只猫 🐈", 2),
    ]
    assert lines[0]["file"] == "a-red-cube-on-a-blue-cube/01.png"
    assert lines[0]["score"] >= lines[1]["score"]
    for line in lines:
        with Image.open(out / line["file"]) as image:
            assert image.size == (16, 16)
            assert image.text["caption"] == line["caption"]
            assert image.text["seed"] == "5"
            assert int(image.text["candidate"]) == line["candidate"]
            assert float(image.text["score"]) == line["score"]
            assert float(image.text["log_likelihood"]) == line["log_likelihood"] < 0
            assert image.text["ranked_by"] == "clip"
            assert image.text["temperature"] == "1.0"
            assert json.loads(image.text["hashes"])["dvae"] == directory_hash(bundle / "dvae")


def test_the_same_command_gives_the_same_pictures(bundle, tmp_path):
    for name in ("one", "two"):
        assert generate(bundle, tmp_path / name, CAPTION) == 0
    for file in ("01.png", "02.png"):
        one, two = (Image.open(tmp_path / name / slug(CAPTION) / file).tobytes() for name in ("one", "two"))
        assert one == two


def test_a_second_run_keeps_other_captions_and_replaces_its_own(bundle, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION, "another") == 0
    assert generate(bundle, out, CAPTION, "--keep", "1", "--seed", "1") == 0
    assert "note: replaced the 2 pictures of an earlier run" in capsys.readouterr().err
    assert [(line["caption"], line["seed"]) for line in results(out)] == [("another", 0)] * 2 + [(CAPTION, 1)]
    assert sorted(path.name for path in (out / slug(CAPTION)).iterdir()) == ["01.png"]


def test_captions_are_read_from_a_file_and_each_is_used_once(bundle, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text(f"\ufeffa cube\r\n\n  {CAPTION}  \n", encoding="utf-8")
    assert generate(bundle, tmp_path / "out", CAPTION, "--captions", str(file)) == 0
    assert [line["caption"] for line in results(tmp_path / "out")] == [CAPTION] * 2 + ["a cube"] * 2


def test_a_picture_is_completed_from_its_top_rows(bundle, tmp_path):
    picture = save_noise(tmp_path / "picture.png", 0)
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION, "--image", str(picture), "--keep-rows", "2") == 0
    assert {(line["keep_rows"], line["image"]) for line in results(out)} == {(2, str(picture))}
    assert generate(bundle, out, CAPTION, "--image", str(picture)) == 0
    assert {line["keep_rows"] for line in results(out)} == {1}  # 15 of 32 rows


def test_pictures_say_what_changed_their_distribution_and_their_precision(bundle, tmp_path):
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION, "--early-abandon", "--batch-size", "2") == 0
    for line in results(out):
        with Image.open(out / line["file"]) as image:
            assert "not the best of n whole candidates" in image.text["early_abandon"]
            assert image.text["batch_size"] == "2"
            assert image.text["precision"] == "fp32"
    assert generate(bundle, out, CAPTION, "--precision", "bf16") == 0
    assert {(line["precision"], line["batch_size"]) for line in results(out)} == {("bf16", 4)}
    assert generate(bundle, out, CAPTION) == 0
    assert not [line for line in results(out) if "early_abandon" in line or "batch_size" in line]


@pytest.mark.parametrize("rank", ["likelihood", "both"])
def test_pictures_are_ranked_as_asked_and_say_so(bundle, tmp_path, capsys, rank):
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION, "--rank", rank, "-n", "9", "--keep", "9", "--top-p", "0.9") == 0
    ranked_by = {"likelihood": "likelihood", "both": "CLIP and likelihood"}[rank]
    assert f"note: sampling at temperature 1, top-p 0.9, ranked by {ranked_by}\n" in capsys.readouterr().err
    lines = results(out)
    numbers = [torch.tensor([line[name] for line in lines]) for name in ("score", "log_likelihood")]
    order = sorted(range(9), key=lambda row: lines[row]["candidate"])
    expected = rank_order(*(column[order] for column in numbers), rank)
    assert [line["candidate"] for line in lines] == expected.tolist()
    assert {line["ranked_by"] for line in lines} == {rank}
    with Image.open(out / lines[0]["file"]) as image:
        assert (image.text["ranked_by"], image.text["top_p"]) == (rank, "0.9")


@pytest.fixture
def warm_bundle(bundle_copy) -> Path:
    """A bundle that says how it is sampled."""
    dalle = DALLE.load(bundle_copy / "dalle")
    sampling = {"temperature": 0.5, "top_k": None, "top_p": 0.9, "guidance": 1.0, "rank": "both"}
    dalle.save(bundle_copy / "dalle", {**dalle.metadata, "sampling": sampling})
    return bundle_copy


def used(out: Path) -> dict[str, object]:
    """The settings in the lines of a run."""
    (settings,) = {tuple((name, line.get(name)) for name in SETTINGS) for line in results(out)}
    return {name: value for name, value in settings if value is not None}


SETTINGS = ("temperature", "top_k", "top_p", "guidance", "ranked_by")


def test_a_bundles_settings_are_used_unless_others_are_given(bundle, warm_bundle, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(warm_bundle, out, CAPTION) == 0
    assert "note: sampling at temperature 0.5, top-p 0.9, ranked by CLIP and likelihood\n" in capsys.readouterr().err
    assert used(out) == {"temperature": 0.5, "top_p": 0.9, "guidance": 1.0, "ranked_by": "both"}
    assert generate(warm_bundle, out, CAPTION, "--temperature", "0.8", "--rank", "likelihood", "--top-k", "9") == 0
    assert used(out) == {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "guidance": 1.0, "ranked_by": "likelihood"}
    assert generate(warm_bundle, out, CAPTION, "--paper-sampling") == 0
    assert used(out) == {"temperature": 1.0, "guidance": 1.0, "ranked_by": "clip"}
    assert generate(bundle, tmp_path / "paper", CAPTION) == 0
    for file in ("01.png", "02.png"):
        one, two = (Image.open(path / slug(CAPTION) / file).tobytes() for path in (out, tmp_path / "paper"))
        assert one == two


@pytest.mark.slow
def test_candidates_are_sampled_in_batches_that_fit_the_memory(bundle, tmp_path, monkeypatch):
    sizes = []
    best = Pipeline.best
    monkeypatch.setattr(
        Pipeline,
        "best",
        lambda *arguments, **options: sizes.append(options["batch_size"]) or best(*arguments, **options),
    )
    for memory in ("1GB", "100KB", "1 B"):
        assert generate(bundle, tmp_path / "out", CAPTION, "--memory", memory, "-n", "40") == 0
    assert sizes[0] == 40
    assert 1 <= sizes[1] < 40
    assert sizes[2] == 1


def test_sizes_of_memory_have_units():
    sizes = {"4GB": 4 * 10**9, "1.5GiB": 3 << 29, "512 mib": 1 << 29, " 10kb ": 10_000, "1TB": 10**12, "7B": 7}
    assert {size: n_bytes(size) for size in sizes} == sizes
    for wrong in ("", "4", "GB", "-1GB", "0GB", "0.1B", "1e3MB", "4 gigabytes", "nanGB", "9" * 400 + "GB"):
        with pytest.raises(ValueError, match="is not a number with a unit: give something like 4GB"):
            n_bytes(wrong)


def test_an_interrupted_run_shows_the_captions_that_are_done(bundle, tmp_path, capsys, monkeypatch):
    best = Pipeline.best

    def interrupted(pipe, request, *arguments, **options):
        if request.caption == "three":
            raise KeyboardInterrupt
        return best(pipe, request, *arguments, **options)

    monkeypatch.setattr(Pipeline, "best", interrupted)
    assert generate(bundle, tmp_path / "none", "three", "one") == 1
    assert list((tmp_path / "none").iterdir()) == []
    out = tmp_path / "out"
    assert generate(bundle, out, "one", "two", "three", "four") == 1
    assert [line["caption"] for line in results(out)] == ["one"] * 2 + ["two"] * 2
    assert "note: sheet.png shows the first 2 of 4 captions\nerror: stopped\n" in capsys.readouterr().err
    monkeypatch.undo()
    assert generate(bundle, tmp_path / "two", "one", "two") == 0
    sheets = [Image.open(path / "sheet.png").tobytes() for path in (out, tmp_path / "two")]
    assert sheets[0] == sheets[1]


def test_one_picture_is_not_pictures(bundle, tmp_path, capsys):
    assert generate(bundle, tmp_path / "out", CAPTION, "-n", "1", "--keep", "1") == 0
    assert re.search(r"^1 picture in .* \(1 candidate in \d+ s\)$", capsys.readouterr().out, re.MULTILINE)


def test_a_sheet_is_not_replaced_without_a_word(bundle, tmp_path, capsys):
    assert generate(bundle, tmp_path / "out", CAPTION) == 0
    assert "sheet.png" not in capsys.readouterr().err
    assert generate(bundle, tmp_path / "out", "another") == 0
    assert "note: replaced the sheet.png of an earlier run\n" in capsys.readouterr().err


def test_captions_of_any_characters_are_printed_and_named_safely(bundle, tmp_path, capsys):
    captions = ["a\x1b[2Jb", "a\rb\nc", "\u202eabc", "a\0", "a\tb" * 50]
    assert generate(bundle, tmp_path / "out\x1b[2J", *captions, "--temperature", "1e-38") == 0
    output = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in output.out + output.err)
    names = [path.name for path in (tmp_path / "out\x1b[2J").iterdir()]
    assert len(names) == len(captions) + 2
    assert all(re.fullmatch(r"[a-z0-9-]+|sheet\.png|results\.jsonl", name) for name in names)
    assert [line["caption"] for line in results(tmp_path / "out\x1b[2J")][::2] == captions


@pytest.mark.slow
def test_numbers_at_the_edge_of_their_range_end_in_words_or_pictures(bundle, tmp_path, capsys):
    options = ["generate", CAPTION, "--bundle", bundle, "--out", tmp_path / "out"]
    for wrong in (
        ["--guidance", "1e30"], ["--temperature", "1e400"], ["--temperature", "nan"], ["--top-p", "-0.0"],
        ["-n", str(10**18)], ["--keep", str(10**18)], ["--top-k", str(10**18)],
    ):  # fmt: skip
        assert_one_line_error(capsys, [*options, *wrong], "must be" if "--keep" not in wrong else "keep is")
    for option, value in (("temperature", 1e-38), ("temperature", 1e300), ("top-p", 1e-320), ("guidance", -0.0)):
        assert generate(bundle, tmp_path / "out", CAPTION, f"--{option}", str(value)) == 0
    for seed in (2**64, -(2**70)):
        assert generate(bundle, tmp_path / "out", CAPTION, "--seed", str(seed)) == 0
        assert {line["seed"] for line in results(tmp_path / "out")} == {seed}


def test_a_caption_is_never_a_path(bundle, tmp_path):
    out = tmp_path / "deep" / "out"
    assert generate(bundle, out, "../../escaped", "/tmp/x") == 0
    assert {path.parent.parent for path in tmp_path.rglob("01.png")} == {out}


def test_a_caption_of_10000_characters_works_with_a_warning(bundle, tmp_path, capsys):
    assert generate(bundle, tmp_path / "out", "cube " * 2_000) == 0
    assert re.search(r"^warning: the caption .* were cut$", capsys.readouterr().err, re.MULTILINE)


def test_wrong_requests_end_in_one_line(bundle, tmp_path, capsys):
    common = ["generate", "--bundle", bundle, "--out", tmp_path / "out"]
    assert_one_line_error(capsys, [*common, CAPTION, "-n", "0"], "n is 0")
    assert_one_line_error(capsys, [*common, CAPTION, "-n", "2", "--keep", "3"], "keep is 3")
    assert_one_line_error(capsys, [*common, " "], "caption is empty")
    assert_one_line_error(capsys, [*common, CAPTION, "a\udcffb"], r"the caption 'a\udcffb' is not Unicode text")
    assert_one_line_error(capsys, common, "no captions")
    assert_one_line_error(capsys, [*common, CAPTION, "--temperature", "-1"], "temperature")
    assert_one_line_error(capsys, [*common, CAPTION, "--keep-rows", "1"], "--image")
    assert_one_line_error(
        capsys,
        [*common, CAPTION, "--paper-sampling", "--top-p", "0.9", "--rank", "both"],
        "--paper-sampling is temperature 1, ranked by CLIP: leave out --top-p and --rank",
    )
    assert_one_line_error(capsys, [*common, CAPTION, "--device", "abacus"], "abacus")
    assert_one_line_error(capsys, [*common, CAPTION, "--memory", "4"], "'4'", "4GB")
    assert_one_line_error(capsys, [*common, CAPTION, "--batch-size", "0"], "batch_size is 0")
    assert_one_line_error(
        capsys, [*common, CAPTION, "-n", "8", "--keep", "5", "--early-abandon"], "keep is 5", "only 4 of 8"
    )
    assert_one_line_error(capsys, [*common, CAPTION, "--captions", tmp_path / "none.txt"], "none.txt")
    assert_one_line_error(capsys, [*common, CAPTION, "--image", tmp_path / "none.png"], "none.png")
    picture = save_noise(tmp_path / "picture.png", 0)
    assert_one_line_error(
        capsys, [*common, CAPTION, "--image", picture, "--keep-rows", "4"], "keep_rows is 4", "0 to 3"
    )
    assert not (tmp_path / "out" / slug(CAPTION)).exists()


def test_wrong_bundles_end_in_one_line(bundle_copy, another_dvae, tmp_path, capsys):
    common = ["generate", CAPTION, "--out", tmp_path / "out", "--bundle"]
    assert_one_line_error(capsys, [*common, tmp_path / "nowhere"], "nowhere", "make demo")
    dalle = DALLE.load(bundle_copy / "dalle")
    dalle.save(bundle_copy / "dalle", {**dalle.metadata, "sampling": {"temperature": "hot"}})
    assert_one_line_error(capsys, [*common, bundle_copy], "sampling defaults", "temperature is 'hot'")
    another_dvae(bundle_copy / "dvae")
    assert_one_line_error(capsys, [*common, bundle_copy], "trained with the dvae", "dalle-train transformer")
    (bundle_copy / "tokenizer.json").unlink()
    assert_one_line_error(capsys, [*common, bundle_copy], "tokenizer.json", "dalle-train tokenizer")


def test_a_place_that_cannot_be_written_to_is_found_before_sampling(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "best", lambda *_, **__: pytest.fail("sampled"))
    file = tmp_path / "file"
    file.write_text("")
    assert_one_line_error(capsys, ["generate", CAPTION, "--bundle", bundle, "--out", file], "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "results.jsonl").write_text('{"caption": "x", "file": "../../precious.png"}\n')
    assert_one_line_error(capsys, ["generate", CAPTION, "--bundle", bundle, "--out", foreign], "results.jsonl", "--out")


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(bundle, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert generate(bundle, out, CAPTION) == 0
    before = results(out)

    def full(self, path, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    argv = ["generate", CAPTION, "--bundle", bundle, "--out", out, "-n", "4", "--keep", "2", "--seed", "1"]
    assert_one_line_error(capsys, argv, "No space left on device")
    assert results(out) == before


# rank and search


def rank(capsys, *argv: object) -> list[dict]:
    assert main(["rank", CAPTION, *map(str, argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rank_sorts_pictures_and_folders_by_score(bundle, folder, tmp_path, capsys):
    single = save_noise(tmp_path / "single.png", 9)
    ranking = rank(capsys, single, folder, "--bundle", bundle)
    assert {Path(entry["picture"]).name for entry in ranking} == {"single.png", "a.png", "b.png", "c.png", "d.png"}
    scores = [entry["score"] for entry in ranking]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_rank_gives_generated_pictures_the_scores_they_were_generated_with(bundle, tmp_path, capsys):
    assert generate(bundle, tmp_path / "out", CAPTION) == 0
    capsys.readouterr()
    ranking = rank(capsys, tmp_path / "out" / slug(CAPTION), "--clip", bundle / "clip")
    assert [Path(entry["picture"]).name for entry in ranking] == ["01.png", "02.png"]
    expected = [line["score"] for line in results(tmp_path / "out")]
    assert [entry["score"] for entry in ranking] == pytest.approx(expected, abs=2e-2)  # pixels are rounded to 8 bits


@pytest.mark.parametrize("size", [8, 40])
def test_rank_and_search_show_clip_what_generate_showed_it_whatever_its_size(bundle_copy, size, tmp_path, capsys):
    clip = CLIP.load(bundle_copy / "clip")
    torch.manual_seed(size)
    CLIP(replace(clip.config, image_size=size), clip.tokenizer).save(bundle_copy / "clip")
    assert generate(bundle_copy, tmp_path / "out", CAPTION) == 0
    capsys.readouterr()
    expected = [line["score"] for line in results(tmp_path / "out")]
    pngs = tmp_path / "out" / slug(CAPTION)
    ranking = rank(capsys, pngs, "--bundle", bundle_copy)
    found, _ = search_for(capsys, bundle_copy, pngs, tmp_path / "found")
    assert [entry["score"] for entry in ranking] == pytest.approx(expected, abs=1.5e-4)  # pixels are rounded to 8 bits
    assert [entry["score"] for entry in found] == pytest.approx(expected, abs=1.5e-4)


def test_rank_prints_a_table_and_writes_a_sheet_when_told_where(bundle, folder, tmp_path, capsys):
    assert main(["rank", CAPTION, str(folder), "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["score", "picture"]
    assert len(table) == 5
    assert (tmp_path / "out" / f"{slug(CAPTION)}.png").is_file()


def search_for(capsys, bundle: Path, folder: Path, out: Path, *options: str) -> tuple[list[dict], str]:
    argv = ["search", CAPTION, str(folder), "--bundle", str(bundle), "--out", str(out), "--json", *options]
    assert main(argv) == 0
    output = capsys.readouterr()
    return [json.loads(line) for line in output.out.splitlines()], output.err


def test_search_finds_what_rank_finds(bundle, folder, tmp_path, capsys):
    found, _ = search_for(capsys, bundle, folder, tmp_path / "out")
    ranking = rank(capsys, folder, "--bundle", bundle)
    assert [entry["picture"] for entry in found] == [entry["picture"] for entry in ranking]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in ranking], abs=1e-5)
    assert (tmp_path / "out" / f"{slug(CAPTION)}.png").is_file()
    top, _ = search_for(capsys, bundle, folder, tmp_path / "out", "--top", "2")
    assert top == found[:2]


def test_a_second_search_embeds_only_new_and_changed_pictures(bundle, folder, tmp_path, capsys):
    first, messages = search_for(capsys, bundle, folder, tmp_path)
    assert "4 pictures, 4 of them new or changed" in messages
    again, messages = search_for(capsys, bundle, folder, tmp_path)
    assert "4 pictures, 0 of them new or changed" in messages
    assert again == first
    save_noise(folder / "a.png", 99, size=(40, 40))
    save_noise(folder / "e.png", 5)
    (folder / "d.png").unlink()
    changed, messages = search_for(capsys, bundle, folder, tmp_path)
    assert "4 pictures, 2 of them new or changed" in messages
    assert {Path(entry["picture"]).name for entry in changed} == {"a.png", "b.png", "c.png", "e.png"}
    fresh = rank(capsys, folder, "--bundle", bundle)
    assert [entry["score"] for entry in changed] == pytest.approx([entry["score"] for entry in fresh], abs=1e-5)


def test_features_are_kept_per_clip_in_a_hidden_file(bundle, folder, tmp_path, capsys):
    search_for(capsys, bundle, folder, tmp_path)
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == [f".dalle-search-{directory_hash(bundle / 'clip')}.safetensors"]


def test_damaged_features_are_computed_again(bundle, folder, tmp_path, capsys):
    first, _ = search_for(capsys, bundle, folder, tmp_path)
    features.feature_file(folder, directory_hash(bundle / "clip")).write_bytes(b"damaged")
    again, messages = search_for(capsys, bundle, folder, tmp_path)
    assert again == first
    assert "warning:" in messages
    assert "4 of them new" in messages


def test_features_of_another_view_are_embedded_again(bundle, folder, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(features, "VIEW", "another")
        search_for(capsys, bundle, folder, tmp_path)
    for message in ("4 of them new or changed", "0 of them new or changed"):
        _, messages = search_for(capsys, bundle, folder, tmp_path)
        assert message in messages


def test_a_folder_that_cannot_be_written_to_is_searched_all_the_same(bundle, folder, tmp_path, capsys, monkeypatch):
    def read_only(path, write):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(features, "replace_file", read_only)
    found, messages = search_for(capsys, bundle, folder, tmp_path)
    assert len(found) == 4
    assert "could not be kept" in messages


def test_what_was_embedded_before_an_interruption_is_kept(bundle, folder, monkeypatch, pipe):
    monkeypatch.setattr(features, "EMBEDDING_BATCH", 2)
    clip_hash = directory_hash(bundle / "clip")

    def interrupt(done: float, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.folder_features(pipe.clip, clip_hash, folder, progress=interrupt)
    assert features.folder_features(pipe.clip, clip_hash, folder).n_embedded == 2


def test_unreadable_pictures_in_a_folder_are_counted_and_named(bundle, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for command in ("rank", "search"):
        options = ["--out", str(tmp_path / "out")]
        assert main([command, CAPTION, str(folder), "--bundle", str(bundle), *options]) == 0
        assert re.search(r"^warning: 1 picture was skipped: .*broken\.png", capsys.readouterr().err, re.MULTILINE)


def test_wrong_pictures_end_in_one_line(bundle, tmp_path, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken" / "x.png"
    empty.mkdir()
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    where = ["--bundle", bundle, "--out", tmp_path / "out"]
    for command in (["rank", CAPTION], ["search", CAPTION], ["reconstruct"]):
        assert_one_line_error(capsys, [*command, empty, *where], "no pictures in the folder")
        assert_one_line_error(capsys, [*command, tmp_path / "none", *where], "none")
        assert_one_line_error(capsys, [*command, broken.parent, *where], "none of the 1 pictures")
    for command in (["rank", CAPTION], ["reconstruct"]):
        assert_one_line_error(capsys, [*command, broken, *where], "x.png")
    assert_one_line_error(capsys, ["rank", "", broken, *where], "caption is empty")
    assert_one_line_error(capsys, ["search", CAPTION, empty, "--top", "0", *where], "--top is 0")
    assert_one_line_error(capsys, ["rank", CAPTION, broken, "--clip", tmp_path / "no-clip"], "no-clip")


# reconstruct


def reconstruct(bundle: Path, out: Path, *argv: object) -> dict:
    assert main(["reconstruct", *map(str, argv), "--bundle", str(bundle), "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_reconstruct_measures_files_folders_and_shards(bundle, folder, tmp_path, capsys):
    shard = make_shard(
        tmp_path / "000.tar", {"0.png": (folder / "a.png").read_bytes(), "0.txt": b"a caption", "1.png": b"broken"}
    )
    single = save_noise(tmp_path / "single.png", 9)
    report = reconstruct(bundle, tmp_path / "out", single, folder, shard)
    names = [entry["name"] for entry in report["pictures"]]
    assert names[0] == str(single)
    assert names[-1] == "000.tar/0.png"
    assert len(names) == 6
    same_picture = [entry["psnr"] for entry in report["pictures"] if Path(entry["name"]).name in ("a.png", "0.png")]
    assert same_picture[0] == same_picture[1]
    mean = sum(entry["psnr"] for entry in report["pictures"]) / 6
    assert report["mean"]["psnr"] == pytest.approx(mean)
    assert report["pictures"][0]["bits_per_pixel"] == pytest.approx(16 * 5 / 256)
    assert 1 <= report["pictures"][0]["codes_used"] <= 16
    assert report["dvae"] == directory_hash(bundle / "dvae")
    assert len(report["skipped"]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[0].split("  ")[-1] == "picture"
    assert re.search(r"^ *\d+\.\d\d .* mean$", output.out, re.MULTILINE)
    assert "warning: 1 picture was skipped" in output.err


def test_the_sheet_shows_no_more_pictures_than_its_limit(bundle, folder, tmp_path):
    reconstruct(bundle, tmp_path / "few", folder, "--sheet-limit", "1")
    reconstruct(bundle, tmp_path / "all", folder)
    few, every = (Image.open(tmp_path / name / "reconstructions.png") for name in ("few", "all"))
    assert few.height < every.height


def test_pictures_are_reconstructed_at_the_size_asked_for(bundle, folder, tmp_path):
    report = reconstruct(bundle, tmp_path / "out", folder / "a.png", "--size", "32", "--dvae", bundle / "dvae")
    assert report["size"] == 32
    assert report["pictures"][0]["bits_per_pixel"] == pytest.approx(5 / 16)


def test_wrong_shards_and_sizes_end_in_one_line(bundle, folder, tmp_path, capsys):
    where = ["--bundle", bundle, "--out", tmp_path / "out"]
    data = (folder / "a.png").read_bytes()
    whole = make_shard(tmp_path / "whole.tar", {"0.png": data, "1.png": data}).read_bytes()
    for length in (700, len(data), 512 + len(data) // 512 * 512 + 512, 2000):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        assert_one_line_error(capsys, ["reconstruct", tmp_path / "cut.tar", *where], "cut.tar")
    (tmp_path / "text.tar").write_text("no tar")
    assert_one_line_error(capsys, ["reconstruct", tmp_path / "text.tar", *where], "text.tar", "tar file")
    make_shard(tmp_path / "captions.tar", {"0.txt": b"a caption"})
    assert_one_line_error(capsys, ["reconstruct", tmp_path / "captions.tar", *where], "no pictures in the shard")
    assert_one_line_error(capsys, ["reconstruct", folder, "--size", "18", *where], "size is 18", "multiple of 4")
    assert_one_line_error(capsys, ["reconstruct", folder, "--sheet-limit", "0", *where], "--sheet-limit is 0")


def test_a_damaged_header_does_not_lose_pictures_silently(bundle, folder, tmp_path, capsys):
    data = (folder / "a.png").read_bytes()
    shard = make_shard(tmp_path / "ten.tar", {f"{i}.png": data for i in range(10)})
    with tarfile.open(shard) as tar:
        fifth = tar.getmembers()[5].offset
    damaged = bytearray(shard.read_bytes())
    damaged[fifth : fifth + 100] = b"\xff" * 100
    shard.write_bytes(damaged)
    words = ("ten.tar has a damaged header at byte", "5 whole samples before it", "copy or make it again")
    assert_one_line_error(capsys, ["reconstruct", shard, "--bundle", bundle, "--out", tmp_path / "out"], *words)


def test_links_and_pictures_too_large_in_shards_are_skipped_in_words(folder, tmp_path, monkeypatch):
    data = (folder / "a.png").read_bytes()
    shard = make_shard(tmp_path / "s.tar", {"0.png": data, "../1.png": data, "2.png": data + bytes(100)})
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
    monkeypatch.setattr(reader, "MAX_PICTURE_BYTES", len(data) + 99)
    found = pictures.Pictures([shard])
    assert [name for name, _ in found] == ["s.tar/0.png"]
    reasons = ("1.png is a link, a sparse file, or leads out", "3.png is a link", "2.png is too large")
    assert len(found.skipped) == len(reasons)
    assert all(reason in skipped for reason, skipped in zip(reasons, found.skipped, strict=True))


def test_what_a_shard_holds_twice_or_empty_is_told(folder, tmp_path):
    data = (folder / "a.png").read_bytes()
    shard = make_shard(tmp_path / "s.tar", {"0.png": data, "0.jpg": data, "1.png": b"", "2.IMG": data})
    found = pictures.Pictures([shard])
    assert [name for name, _ in found] == ["s.tar/0.png", "s.tar/2.IMG"]
    assert any("s.tar/1.png is empty" in reason for reason in found.skipped)
    assert any("1 members whose sample has such a member already" in reason for reason in found.skipped)


# import-dvae


def test_import_dvae_saves_what_was_read(tmp_path, monkeypatch, capsys, bundle):
    monkeypatch.setattr(import_dvae, "import_openai", lambda encoder, decoder: DVAE.load(bundle / "dvae"))
    assert main(["import-dvae", "encoder.pkl", "decoder.pkl", "--out", str(tmp_path / "dvae")]) == 0
    assert directory_hash(tmp_path / "dvae") == directory_hash(bundle / "dvae")
    assert directory_hash(tmp_path / "dvae") in capsys.readouterr().out


def test_importing_something_else_ends_in_one_line(tmp_path, capsys):
    file = tmp_path / "x.pkl"
    file.write_bytes(b"no pickle")
    assert_one_line_error(capsys, ["import-dvae", file, file, "--out", tmp_path / "dvae"], "x.pkl")
    assert_one_line_error(capsys, ["import-dvae", tmp_path / "y.pkl", file, "--out", tmp_path / "dvae"], "y.pkl")
    assert not (tmp_path / "dvae").exists()


# what all programs share


@pytest.mark.parametrize("argv", [[], ["paint"], ["rank"], ["generate", "x", "-n", "many"], ["generate", "--nn", "3"]])
def test_usage_errors_exit_with_1_and_are_explained(argv, capsys):
    assert main(argv) == 1
    errors = capsys.readouterr().err
    assert errors
    assert "Traceback" not in errors


def test_help_shows_the_verbs_and_the_options(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("generate", "rank", "search", "reconstruct", "serve", "--debug"))
    assert all(f"import-{kind}" in shown for kind in ("dvae", "clip", "vqgan"))
    assert main(["generate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("-n", "--keep", "--seed", "--captions", "Same seed, same pictures"))
    assert all(option in shown for option in ("--early-abandon", "changes the", "--precision", "--compile", "--memory"))
    assert all(option in shown for option in ("--rank", "--paper-sampling", "(default: as the bundle"))
    assert all(group in shown for group in ("sampling options", "completion options", "compute options"))
    assert "default: None" not in shown


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["rank", "x", str(tmp_path / "none.png"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "error: two lines"),
        (OSError(28, "No space left on device", "x.png"), "error: No space left on device: x.png"),
        (FileNotFoundError("no bundle here"), "error: no bundle here"),
        (KeyboardInterrupt(), "error: stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: not enough memory on the device"),
    ],
)
def test_errors_of_the_user_are_one_line(error, line, capsys):
    def fail() -> None:
        raise error

    assert run_command(fail) == 1
    assert capsys.readouterr().err.startswith(line)


def test_errors_of_the_program_are_not_hidden():
    def fail() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        run_command(fail)


def test_a_file_of_captions_must_be_text_with_captions(tmp_path):
    file = tmp_path / "captions.txt"
    for text in ("", "\n \n", "\ufeff", "\u200b\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="no captions in"):
            read_captions(file)
    for data, words in (
        (b"\xff\xfe\x00", "line 1 is not UTF-8"),
        (b"a\r\n" * 9 + b"\xff", "line 10 is not UTF-8"),
        (b"a cube\r\n\r\nanother\na caf\xe9\n", "line 4 is not UTF-8 text"),
        ("a cube\n".encode("utf-16-le"), "line 1 holds a NUL, as UTF-16"),
        (b"a cube\ra\0b", "line 2 holds a NUL"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_captions(file)
    file.write_text("a\x0bred\u2028circle\r\n\u200b\na square\r", encoding="utf-16")
    assert read_captions(file) == ["a\x0bred\u2028circle", "a square"]
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no captions at"):
            read_captions(path)


def test_lines_of_captions_end_as_lines_of_files_do(tmp_path, caplog):
    caplog.set_level("INFO", "dalle")
    file = tmp_path / "captions.txt"
    inside = [f"a{c}b" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029\t\x1b\u200d"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r".join(inside).encode() + b"\r\n\r\n one \n\n\ntwo")
    assert read_captions(file) == [*inside, "one", "two"]
    assert f"13 captions in {file}; 3 empty lines left out" in caplog.text


def test_captions_may_come_from_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("a cube\na sphere\n",))
    writer.start()
    assert read_captions(pipe) == ["a cube", "a sphere"]
    writer.join()


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:7", "xpu", "privateuseone", "nonsense"])
def test_every_command_refuses_a_device_that_cannot_compute(bundle, folder, tmp_path, capsys, device):
    shard = make_shard(tmp_path / "0.tar", {"0.png": (folder / "a.png").read_bytes(), "0.txt": b"a caption"})
    out, with_bundle = ["--out", tmp_path / "out"], ["--bundle", bundle]
    commands = [
        (main, ["generate", CAPTION, *with_bundle, *out]),
        (main, ["rank", CAPTION, folder, *with_bundle]),
        (main, ["search", CAPTION, folder, *with_bundle, *out]),
        (main, ["reconstruct", folder, *with_bundle, *out]),
        (train, ["evaluate", bundle, "--data", shard]),
        (train, ["duplicates", "--data", shard, "--clip", bundle, *out]),
        (train, ["encode", "--data", shard, "--dvae", bundle / "dvae", *out]),
    ]
    for program, argv in commands:
        assert program([*map(str, argv), "--device", device]) == 1
        errors = capsys.readouterr().err
        assert f"error: there is no device '{device}' to compute on: give one of auto, cpu" in errors.splitlines()[-1]
        assert "Traceback" not in errors


def test_a_gpu_that_is_not_there_is_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:99"):
        resolve_device("cuda:99")
