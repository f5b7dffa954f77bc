import io
import json
import math
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from dalle.cli.main import main
from dalle.evaluation.distances import Reference, distances
from dalle.evaluation.features.nets import CLIPFeatures, in_equal_batches
from dalle.evaluation.given import given_files
from dalle.evaluation.nested.captions import Row
from dalle.evaluation.nested.cost import cost_of
from dalle.evaluation.nested.curves import curve
from dalle.evaluation.nested.run import Nested
from dalle.evaluation.nested.settings import NestedSettings
from dalle.evaluation.nested.shards import ShardFolder
from dalle.evaluation.numbers.frechet import frechet_distance_of_features
from dalle.evaluation.numbers.moments import Moments
from dalle.model import DALLE, DALLEConfig
from dvae import DVAE, DVAEConfig
from dvae.images import resize_and_crop
from rerank import CLIP, CLIPConfig

N = 8


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:

    path = tmp_path_factory.mktemp("shards") / "0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(N):
            for ending, data in (("png", png(number)), ("txt", f"a red cube {number % 3}".encode())):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


COMMAND = ("--best-of", "1,2", "--blur", "0,40", "--captions", "1", "--shard-captions", "3")


@pytest.fixture(scope="module")
def evaluated(bundle: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation, with a list of half of the samples, and pictures in both layouts."""
    out = tmp_path_factory.mktemp("evaluated")
    lines = [json.dumps({"shard": "0.tar", "key": f"{number:03}"}) for number in range(0, N, 2)]
    (out / "half.jsonl").write_text("\n".join(lines) + "\n")
    more = ["--without", out / "half.jsonl", "--save-pictures", out / "pictures", "--out", out]
    assert run("evaluate", bundle, "--data", shard, *COMMAND, *more) == 0
    return out


# ------------------------------------------------------------------------------------------------ curves


def nested_of(scores: torch.Tensor, right: torch.Tensor, tmp_path: Path) -> Nested:
    n, m = scores.shape
    settings = NestedSettings(best_of=tuple(k for k in (1, 2, 4, 8) if k <= m))
    return Nested(
        rows=[Row(number=number, caption="a") for number in range(n)],
        settings=settings,
        folder=ShardFolder(tmp_path / "run", {}, 0, batch_size=1),
        scores=scores,
        log_likelihoods=-scores,
        judged=None,
        right=right,
        kept=torch.zeros(n, 1),
        caption_features=torch.zeros(n, 1),
    )


def test_points_of_the_curve(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 8, generator=generator)
    right = torch.rand(40, 8, generator=generator) < 0.2 + 0.3 * scores
    points = {(point.rank, point.n): point for point in curve(nested_of(scores, right, tmp_path))}
    one, all_of_them = points["clip", 1].right, points["clip", 8].right
    assert one is not None
    assert all_of_them is not None
    assert one.subsets == pytest.approx(float(right.double().mean()))
    assert all_of_them.subsets == pytest.approx(all_of_them.mean)
    for n in (1, 2, 4, 8):
        oracle = points["oracle", n].right
        assert oracle is not None
        assert oracle.low <= oracle.mean <= oracle.high + 1e-9
        for rank in ("clip", "likelihood", "both"):
            found = points[rank, n].right
            assert found is not None
            assert oracle.mean >= found.mean
    # a place among N is no place among M
    assert points["both", 4].right.subsets is None  # type: ignore[union-attr]
    # the likelihood is the opposite of CLIP here: it picks the lowest cosines
    assert points["likelihood", 8].clip.mean == pytest.approx(float(scores.amin(1).mean()))  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ the command


def test_what_is_written(evaluated: Path) -> None:
    record = json.loads((evaluated / "evaluation.json").read_text())
    assert record["samples"] == N
    assert {"psnr", "image_loss", "retrieval"} <= record.keys()
    found = record["best_of"]
    assert found["captions"] == N
    assert list(found["distances"]) == ["1", "2"]
    assert list(found["blurred"]) == ["0", "40"]
    assert found["blurred"]["0"] == found["distances"]["2"]
    for each in (*found["distances"].values(), *found["blurred"].values()):
        assert each["fd"] >= each["floor"]["distance"] - 3 * each["spread"]
        assert each["limit"] is None
    assert len([note for note in found["notes"] if note.startswith("no FD∞, which needs")]) == 1
    lines = [json.loads(line) for line in (evaluated / "captions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(N))
    picked = [line["candidates"]["clip"][line["picks"]["clip"]["2"]] for line in lines]
    at_two = next(point for point in found["curve"] if (point["rank"], point["n"]) == ("clip", 2))
    assert math.fsum(picked) / N == pytest.approx(at_two["clip"]["mean"], abs=1e-6)


def test_without_half_of_the_samples_numbers_are_those_of_the_other_half(
    evaluated: Path, bundle: Path, shard: Path
) -> None:

    found = json.loads((evaluated / "evaluation.json").read_text())["best_of"]["without_overlap"]
    parts = [load_file(path) for path in sorted((evaluated / "evaluation").glob("0*.safetensors"))]
    features = torch.cat([part["features"] for part in parts])[1::2, -1]
    (whole,) = (
        load_file(path)["features"]
        for path in (evaluated / "evaluation").glob("reference-*")
        if (radius := re.search(r'"radius\W+([\d.]+)', path.read_bytes()[:4096].decode(errors="replace")))
        and float(radius[1]) == 0
    )
    real = whole[1::2]
    directly = distances(features, Reference(moments=Moments.of(real), features=real, note=""))
    assert found["captions"] == N // 2
    assert found["distances"]["2"]["fd"] == pytest.approx(directly.fd, rel=1e-9)
    assert found["distances"]["2"]["n_reference"] == N // 2


def test_both_sides_are_blurred(evaluated: Path, bundle: Path) -> None:
    net = CLIPFeatures(CLIP.load(bundle / "clip"), "")

    def features(images: list[Image.Image], radius: float) -> torch.Tensor:
        squares = [resize_and_crop(image, 256).filter(ImageFilter.GaussianBlur(radius)) for image in images]
        pixels = [torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]
        return in_equal_batches(net.features, pixels)

    made = [Image.open(path) for path in sorted((evaluated / "pictures").iterdir())]
    real = [Image.open(io.BytesIO(png(number))) for number in range(N)]
    both = frechet_distance_of_features(features(made, 40), features(real, 40))
    alone = frechet_distance_of_features(features(made, 0), features(real, 40))
    found = json.loads((evaluated / "evaluation.json").read_text())["best_of"]["blurred"]["40"]["fd"]
    assert found == pytest.approx(both, rel=1e-3)
    assert found != pytest.approx(alone, rel=1e-2)


def test_lists_leave_out_samples_of_another_reference_too(
    evaluated: Path, bundle: Path, shard: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(shard, tmp_path / "other.tar")
    command = ["evaluate", evaluated / "pictures", evaluated / "captions.jsonl", "--data", shard, "--judge", bundle]
    more = ["--blur", "0", "--without", evaluated / "half.jsonl", "--out", tmp_path / "out"]
    (tmp_path / "same").mkdir()
    same = shutil.copy(shard, tmp_path / "same" / "0.tar")  # the samples that the list names, in another folder
    for reference, said in (
        (same, "4 of 8 captions; 4 of 8 reference pictures"),
        (tmp_path / "other.tar", "4 of 8 captions; all 8 reference pictures, of which the lists name none"),
    ):
        assert run(*command, "--reference", reference, *more) == 0
        assert f"without the samples of --without: {said}" in capfd.readouterr().out


@pytest.mark.slow
def test_again_says_the_same_and_uses_what_is_there(
    evaluated: Path, bundle: Path, shard: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def told() -> dict[str, object]:
        record: dict[str, object] = json.loads((evaluated / "evaluation.json").read_text())["best_of"]
        return {name: value for name, value in record.items() if name != "seconds"}

    before = told()
    again = ["evaluate", bundle, "--data", shard, *COMMAND, "--without", evaluated / "half.jsonl", "--out", evaluated]
    assert run(*again) == 0
    out, err = capfd.readouterr()
    assert told() == before
    assert "3 of 3 shards are there" in err
    assert "from cache" in out
    assert "* The same CLIP picks and judges" in out
    assert "cosine by the CLIP that ranks*" in out
    assert not re.search(r"^\s*FID", out, re.MULTILINE)
    distance_lines = [line for line in out.splitlines() if line.startswith("FD")]
    assert len(distance_lines) == 8
    assert all(
        re.match(r"FD-own-clip \(n=\d+, weights [0-9a-f]{8}\) .* \d[\d.e-]* \(n=\d+\)", line) for line in distance_lines
    )
    assert out.count("note: no FD∞") == 1
    assert "FD∞ is far off" not in err
    assert run(*again, "--seed", 1) == 1
    assert "sampling seed is 0 there, 1 here" in capfd.readouterr().err


def test_pictures_of_another_system_are_measured_alike(
    evaluated: Path, bundle: Path, shard: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--judge", bundle, "--data", shard, "--blur", "0,2", "--out", tmp_path]
    assert run("evaluate", evaluated / "pictures", evaluated / "captions.jsonl", *more) == 0
    assert "FD-own-clip" in capfd.readouterr().out
    of_bundle = json.loads((evaluated / "evaluation.json").read_text())["best_of"]
    of_folder = json.loads((tmp_path / "evaluation.json").read_text())["best_of"]
    assert of_folder["distances"]["1"]["fd"] == pytest.approx(of_bundle["distances"]["2"]["fd"], rel=1e-3)
    (given,) = of_folder["curve"]
    at_two = next(point for point in of_bundle["curve"] if (point["rank"], point["n"]) == ("clip", 2))
    assert given["judge"]["mean"] == pytest.approx(at_two["clip"]["mean"], abs=0.02)


def test_geneval_has_a_folder_a_prompt_with_four_pictures(bundle: Path, tmp_path: Path) -> None:
    lines = ['{"tag": "colors",  "prompt": "a red cube"}', '{"prompt":"a green sphere", "include": []}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    more = ["--best-of", "4", "--layout", "geneval", "--save-pictures", tmp_path / "made", "--out", tmp_path / "out"]
    assert run("evaluate", bundle, tmp_path / "prompts.jsonl", *more) == 0
    for number, line in enumerate(lines):
        folder = tmp_path / "made" / f"{number:05}"
        assert (folder / "metadata.jsonl").read_text() == line
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == [f"{k:04}.png" for k in range(4)]
        assert len({path.read_bytes() for path in samples}) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to sample"),
        (["--best-of", "4,2"], "expected ascending numbers"),
        (["--best-of", "x"], "expected numbers with commas"),
        (["--blur", "1,2"], "expected ascending radii from 0 on"),
        (["--layout", "geneval", "--best-of", "1,6"], "which 4 does not divide"),
        (["--images", "0", "--data", "SHARD"], "at least 1 caption"),
        (["--without", "none.jsonl", "--data", "SHARD"], "no file none.jsonl"),
        (["--profile", "tf", "--data", "SHARD"], "--profile tf needs Inception's weights"),
        (["--features", "none.pth", "--profile", "own", "--data", "SHARD"], "--profile own is for --features own"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    bundle: Path, shard: Path, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [str(shard) if argument == "SHARD" else argument for argument in arguments]
    assert run("evaluate", bundle, *given, "--out", tmp_path) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last


# ------------------------------------------------------------------------------------------------ cost


def test_a_large_evaluation_is_planned_with_hours_and_disk() -> None:
    with torch.device("meta"):
        dalle = DALLE(DALLEConfig(n_layers=24, d_model=2048, n_heads=16, text_vocab=16384, image_vocab=8192))
        dvae, clip = DVAE(DVAEConfig()), CLIP(CLIPConfig())
    cost = cost_of(dalle, dvae, clip, NestedSettings(best_of=(1, 2, 4, 8, 16, 32)), 30_000, n_features=2048)
    assert cost.candidates == 960_000
    # 2 FLOP a weight and token, 1,024 tokens, and the decoder's 154 GMAC
    assert cost.operations == pytest.approx(960_000 * 2 * (1.22e9 * 1024 + 154e9), rel=0.1)
    assert 1.5 < cost.hours(400e12) < 2.5
    tokens, features = 30_000 * 6 * 1024 * 2, 30_000 * 6 * 2048 * 4
    assert tokens + features < cost.disk < 1.3 * (tokens + features)
    assert "960,000 candidates" in cost.text(1e12, "cpu")


def test_a_plan_writes_nothing(bundle: Path, shard: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", bundle, "--data", shard, "--plan", "--out", tmp_path / "out") == 0
    assert "8 captions × 16 = 128 candidates" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ given pictures


def test_pictures_numbered_from_1_are_those_of_the_rows_in_order(tmp_path: Path) -> None:
    rows = [Row(number=number, caption="a") for number in range(11)]
    for number in range(1, 12):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    assert [int(path.stem) for path in given_files(tmp_path, rows)] == list(range(1, 12))


def test_two_pictures_of_one_number_are_refused_and_of_a_folder_the_first_counts(tmp_path: Path) -> None:
    rows = [Row(number=number, caption="a") for number in range(2)]
    for name in ("00000/samples/0001.png", "00000/samples/0000.png", "00001.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    assert given_files(tmp_path, rows) == [tmp_path / "00000/samples/0000.png", tmp_path / "00001.png"]
    (tmp_path / "1.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"00001\.png and .*[/\\]1\.png have the same number"):
        given_files(tmp_path, rows)
