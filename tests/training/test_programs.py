import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import tiny

import training.cli.main
import training.cli.train
import training.demo.demo
import training.plan.machine
import training.ranks.job
import training.recipes
import training.stages.program
from dalle.data.reader import ShardData
from dalle.evaluation.bundle import distinct_captions, evaluate
from dalle.family.transformers import new_transformer
from dalle.model import DALLE, DALLEConfig
from dalle.pipeline import Pipeline
from dalle.sampling import SamplingDefaults
from dvae import DVAE, DVAEConfig
from rerank import CLIP
from storage.models.directory import directory_hash
from training.config import TrainConfig
from training.demo.demo import run_demo
from training.drawings.wrong_captions import EXCHANGES
from training.engine.checkpoints import latest_tag
from training.loop.metrics import MetricLog
from training.plan.flops import flops_per_sample
from training.plan.options import PlanOptions
from training.plan.plan import make_plan
from training.plan.state import state_bytes
from training.plan.text import text as plan_text
from training.ranks.ranks import join
from training.ranks.stop import Interrupted
from training.recipes import RECIPES, Recipe, recipe
from training.run_files import read_metrics
from training.schedules import Cosine, Schedule, WarmupCosine, WarmupPlateau
from training.stages.all import train_all, what_next
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.inputs import Inputs

NAMES = list(RECIPES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A bundle trained by the programs; not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "bundle"
    inputs = Inputs(data=[shards], validation=[shards], out=out)
    train_all(tiny.recipe(), inputs, join(), lambda line: None)
    return out


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` is a recipe, of this process alone, which keeps its process group: DeepSpeed cannot join a second."""
    monkeypatch.setattr(training.plan.machine, "usable_cores", lambda: 1)
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)


def run(*arguments: object) -> int:
    return training.cli.main.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------- end to end


def test_what_was_trained_is_a_bundle_that_generates_and_ranks(bundle: Path) -> None:
    pipe = Pipeline.load(bundle)
    result = pipe.generate("a small red circle left of a large blue square on a white background", n=3, keep=2)
    assert result.images.shape == (2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    assert pipe.dalle.metadata["dvae_hash"] == directory_hash(bundle / "dvae")
    assert pipe.dalle.metadata["step"] == 4
    assert pipe.defaults == tiny.recipe().transformer.sampling != SamplingDefaults()
    for stage in ("dvae-warmup", "dvae", "clip", "transformer"):
        lines = read_metrics(bundle / "training" / stage)
        assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if line["split"] == "validation"] == [4]
    assert (bundle / "samples.png").is_file()
    evaluation = json.loads((bundle / "evaluation.json").read_text())
    assert evaluation["samples"] == tiny.N_SAMPLES
    assert list(evaluation["exchanged_captions"]["fractions"]) == list(EXCHANGES)


@pytest.mark.slow
def test_the_command_line_trains_the_same_bundle_part_by_part(tmp_path: Path, bundle: Path, shards: Path) -> None:
    out = tmp_path / "out"
    for stage in ("tokenizer", "dvae", "clip", "transformer"):
        assert run(stage, "tiny", "--data", shards, "--out", out) == 0
    assert Pipeline.load(out).hashes == Pipeline.load(bundle).hashes
    assert run("evaluate", out, "--data", shards, "--captions", 2) == 0
    assert (out / "samples.png").is_file()


def test_captions_of_another_world_have_no_table_of_exchanged_ones(tmp_path: Path, bundle_copy: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "png")
    data = tiny.write_tar(tmp_path / "a.tar", [("a.png", buffer.getvalue()), ("a.txt", b"a dog left of a cat")])
    assert run("evaluate", bundle_copy, "--data", data, "--captions", 1) == 0
    assert "exchanged_captions" not in json.loads((bundle_copy / "evaluation.json").read_text())


def test_the_command_line_says_how_many_hard_negatives(tmp_path: Path, shards: Path) -> None:
    command = ["clip", "tiny", "--data", shards, "--out", tmp_path, "--steps", 2, "--log-every", 1]
    assert run(*command, "--hard-negatives", 2) == 0
    lines = read_metrics(tmp_path / "training" / "clip")
    assert all(0 <= line["hard_negatives_right"] <= 1 for line in lines)
    assert run(*command, "--fresh", "--hard-negatives", -1) == 1


@pytest.mark.slow
def test_options_replace_the_recipes_values(tmp_path: Path, bundle_copy: Path, shards: Path) -> None:
    shutil.rmtree(bundle_copy / "training" / "transformer")
    options = ["--steps", 2, "--global-batch", 6, "--micro-batch", 3, "--seed", 5, "--log-every", 2, "--workers", 1]
    more = ["--null-caption-probability", 0.1, "--activation-checkpointing", "--zero-stage", 1]
    command = ["transformer", "tiny", "--data", shards, "--out", bundle_copy, *options, *more]
    assert run(*command, "--precision", "bf16") == 0
    record = json.loads((bundle_copy / "training" / "transformer" / "config.json").read_text())["training"]
    assert [record[name] for name in ("steps", "global_batch", "micro_batch", "seed", "zero_stage")] == [2, 6, 3, 5, 1]
    assert record["activation_checkpointing"] is True
    assert Pipeline.load(bundle_copy).dalle.metadata["null_caption_probability"] == 0.1


@pytest.mark.parametrize("stage", ["transformer", "clip"])
def test_muon_is_an_option_and_goes_on_with_itself_alone(
    bundle_copy: Path, shards: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(bundle_copy / "training" / stage)
    scale = ["--init-scale", 8] if stage == "transformer" else []
    command = [stage, "tiny", "--data", shards, "--out", bundle_copy, *scale, "--steps"]
    assert run(*command, 2, "--optimizer", "muon") == 0
    record = json.loads((bundle_copy / "training" / stage / "config.json").read_text())["training"]
    assert record["optimizer"]["kind"] == "muon"
    assert run(*command, 4) == 1
    assert "was saved with optimizer muon, and this run's is adamw" in " ".join(capsys.readouterr().err.split())
    assert run(*command, 4, "--optimizer", "muon") == 0


def test_muon_is_refused_for_the_dvae(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dvae", "tiny", "--data", shards, "--out", tmp_path, "--optimizer", "muon") == 1
    assert "DVAE has none: use --optimizer adamw here" in " ".join(capsys.readouterr().err.split())


def test_the_scale_of_the_first_weights_is_that_of_the_recipe(bundle_copy: Path, shards: Path) -> None:
    deviations = []
    for scale in (1, 8):
        command = ["transformer", "tiny", "--data", shards, "--out", bundle_copy, "--fresh", "--steps", 1]
        assert run(*command, "--init-scale", scale, "--learning-rate", 1e-9) == 0
        deviations.append(Pipeline.load(bundle_copy).dalle.text_embedding.weight.std().item())
    assert deviations[1] / deviations[0] == pytest.approx(8, rel=0.1)
    assert run(*command, "--init-scale", 0) == 1


@pytest.mark.parametrize("stage", ["dvae", "clip"])
@pytest.mark.parametrize("precision", [["autocast"], ["bf16", "--zero-stage", 2]])
def test_stages_train_in_lower_precision(tmp_path: Path, shards: Path, stage: str, precision: Sequence[object]) -> None:
    assert run(stage, "tiny", "--data", shards, "--out", tmp_path, "--steps", 2, "--precision", *precision) == 0
    lines = read_metrics(tmp_path / "training" / stage)
    assert len(lines) == 2
    assert all(line["loss"] is not None for line in lines)


@pytest.mark.parametrize("stage", ["dvae", "clip", "transformer"])
def test_a_stage_trained_in_two_parts_is_the_same_bit_for_bit(
    tmp_path: Path, bundle: Path, shards: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if stage == "transformer":
        shutil.copytree(bundle / "dvae", out / "dvae")
        shutil.copy(bundle / "tokenizer.json", out)
    command = [stage, "tiny", "--data", shards, "--out", out]
    whole, half = tiny.recipe(), tiny.recipe(steps=2)
    half = dataclasses.replace(half, dvae=dataclasses.replace(half.dvae, warmup=whole.dvae.warmup))
    with monkeypatch.context() as patch:
        patch.setitem(training.recipes.RECIPES, "tiny", lambda: half)
        assert run(*command) == 0
    assert run(*command) == 0
    name = "dalle" if stage == "transformer" else stage
    assert directory_hash(out / name) == directory_hash(bundle / name)


@pytest.mark.slow
def test_a_warm_up_in_two_parts_leads_to_the_same_dvae_and_is_not_repeated_after_it(
    tmp_path: Path, bundle: Path, shards: Path
) -> None:
    inputs = Inputs(data=[shards], out=tmp_path / "out")
    said: list[str] = []

    def train(warmup_steps: int, steps: int) -> None:
        tiny_recipe = tiny.recipe()
        warmup, run = (dataclasses.replace(tiny_recipe.dvae.train, steps=n) for n in (warmup_steps, steps))
        dvae = dataclasses.replace(tiny_recipe.dvae, warmup=warmup, train=run)
        train_dvae(dataclasses.replace(tiny_recipe, dvae=dvae), inputs, join(), said.append)

    train(2, 1)
    shutil.rmtree(tmp_path / "out" / "training" / "dvae")  # as if it had ended within the warm-up
    train(4, 2)
    assert any("dvae-warmup: resuming from step 2 of 4" in line for line in said)
    said.clear()
    shutil.rmtree(tmp_path / "out" / "training" / "dvae-warmup")
    train(4, 4)
    assert not any("dvae-warmup" in line for line in said)
    assert directory_hash(tmp_path / "out" / "dvae") == directory_hash(bundle / "dvae")


def test_a_warm_up_takes_the_options_and_the_proportion_of_steps(tmp_path: Path, shards: Path) -> None:
    options = ["--steps", 1, "--global-batch", 6, "--micro-batch", 3, "--seed", 5, "--learning-rate", 1e-5]
    assert run("dvae", "tiny", "--data", shards, "--out", tmp_path, *options) == 0
    for stage, steps in (("dvae-warmup", 1), ("dvae", 1)):
        record = json.loads((tmp_path / "training" / stage / "config.json").read_text())["training"]
        assert [record[name] for name in ("steps", "global_batch", "micro_batch", "seed")] == [steps, 6, 3, 5]
        assert record["learning_rate"]["peak"] == (1e-5 if stage == "dvae" else 2e-3)


@pytest.mark.slow
def test_clip_goes_on_from_its_warm_up_and_from_a_warm_up_that_was_interrupted(tmp_path: Path, shards: Path) -> None:
    chosen = tiny.recipe()
    said: list[str] = []

    def train(out: str, warmup_steps: int, steps: int) -> str:
        warmup, run = (dataclasses.replace(chosen.clip.train, steps=n) for n in (warmup_steps, steps))
        clip = dataclasses.replace(chosen.clip, warmup=warmup, train=run, warmup_captions=5, embedding_scale=8.0)
        inputs = Inputs(data=[shards], out=tmp_path / out)
        return directory_hash(train_clip(dataclasses.replace(chosen, clip=clip), inputs, join(), said.append))

    whole = train("whole", 4, 4)
    train("parts", 2, 1)
    shutil.rmtree(tmp_path / "parts" / "training" / "clip")  # as if it had ended within the warm-up
    train("parts", 4, 2)
    assert any("clip-warmup: resuming from step 2 of 4" in line for line in said)
    said.clear()
    assert train("parts", 4, 4) == whole
    assert not any("clip-warmup" in line for line in said)


def test_all_ends_with_where_the_bundle_is_and_says_if_it_was_not_measured(tmp_path: Path) -> None:
    unmeasured = what_next(Inputs(data=[tmp_path], out=tmp_path / "my out"))
    assert f"`dalle-train evaluate '{tmp_path}/my out' --data SHARDS` measures it" in unmeasured
    measured = what_next(Inputs(data=[tmp_path], validation=[tmp_path], out=tmp_path / "mine"))
    assert measured == f'bundle: {tmp_path}/mine\nnext:   dalle generate "…" --bundle {tmp_path}/mine'


def test_a_run_of_other_steps_has_its_schedules_stretched(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Recipe] = []
    monkeypatch.setattr(training.cli.train, "train_dvae", lambda chosen, *_, **__: given.append(chosen))
    for steps in (50, 400):
        assert run("dvae", "demo", "--data", shards, "--out", tmp_path, "--steps", steps) == 0
        before, after = recipe("demo").dvae, given[-1].dvae
        assert before.warmup is not None
        assert after.warmup is not None
        factor = steps / before.train.steps
        assert after.warmup.steps == before.warmup.steps * factor
        pairs = [(before.train.learning_rate, after.train.learning_rate)]
        pairs += [(before.kl_weight, after.kl_weight), (before.temperature, after.temperature)]
        warmups = [(before.warmup.learning_rate, after.warmup.learning_rate), (before.warmup_noise, after.warmup_noise)]
        for old, new, run_steps in [(*pair, before.train.steps) for pair in pairs] + [
            (*pair, before.warmup.steps) for pair in warmups
        ]:
            for part in (0.3, 0.75, 1.0):
                at = round(part * run_steps)
                assert new.at(round(at * factor)) == pytest.approx(old.at(at), rel=0.1, abs=1e-6)
    plateau = recipe("12b").transformer.train.learning_rate
    assert plateau.stretched(0.1) == plateau


@pytest.mark.parametrize(
    "schedule",
    [Cosine(start=2e-4, end=1e-5, steps=9), WarmupCosine(peak=2e-4, warmup=3, steps=9, final=1e-6), WarmupPlateau()],
)
def test_a_schedule_with_another_peak_is_in_proportion(schedule: Schedule) -> None:
    ratios = {round(schedule.with_peak(1e-2).at(step) / schedule.at(step), 6) for step in range(12)}
    assert ratios == {round(1e-2 / max(schedule.at(step) for step in range(6_000)), 6)}


@pytest.mark.parametrize("name", ["demo", "icons-cpu", "photos-cpu", "mini-cpu", "1m"])
def test_recipes_for_cpus_validate_and_draw_about_four_times(name: str) -> None:
    chosen = recipe(name)
    assert chosen.dvae.warmup is not None
    for train in (chosen.dvae.warmup, chosen.dvae.train, chosen.transformer.train, chosen.clip.train):
        assert 3 <= train.steps / train.validate_every <= 4
        draws = train is not chosen.clip.train and train is not chosen.dvae.warmup
        assert train.sample_every == (train.validate_every if draws else 0)


def test_an_interrupted_training_ends_with_0_because_the_same_command_goes_on(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("stopped at step 3: the same command goes on from there")

    monkeypatch.setattr(training.cli.train, "train_clip", interrupted)
    assert run("clip", "tiny", "--data", shards, "--out", tmp_path) == 0
    assert "the same command goes on" in capsys.readouterr().err


def test_a_named_tokenizer_and_dvae_become_part_of_the_bundle(
    tmp_path: Path, bundle: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    named = ["--tokenizer", bundle / "tokenizer.json", "--dvae", bundle / "dvae"]
    assert run("transformer", "tiny", "--data", shards, "--out", out, *named) == 0
    shutil.copytree(bundle / "clip", out / "clip")
    assert Pipeline.load(out).hashes == Pipeline.load(bundle).hashes
    DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=16)).save(tmp_path / "other")
    command = ["transformer", "tiny", "--data", shards, "--out", out, "--dvae", tmp_path / "other", "--fresh"]
    assert run(*command) == 1
    assert "is another than --dvae" in capsys.readouterr().err
    assert Pipeline.load(out).hashes == Pipeline.load(bundle).hashes


def test_the_demonstration_refuses_another_world_and_replaces_it_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.demo.demo, "N_VALIDATION", 4)
    trained: list[str] = []

    def record(stage: str) -> Callable[..., None]:
        def train(_recipe: object, inputs: Inputs, *_: object) -> None:
            if latest_tag(inputs.run_directory(stage) / "checkpoints") is None:
                trained.append(stage)
                checkpoints = inputs.run_directory(stage) / "checkpoints"
                (checkpoints / "step00000001").mkdir(parents=True)
                (checkpoints / "latest").write_text("step00000001")

        return train

    for stage in ("dvae", "clip", "transformer"):
        monkeypatch.setattr(training.demo.demo, f"train_{stage}", record(stage))
    monkeypatch.setattr(training.demo.demo, "_finish", lambda *_: None)
    all_stages = ["dvae", "clip", "transformer"]
    for n, fresh, expected in ((8, False, all_stages), (8, False, []), (9, False, None), (9, True, all_stages)):
        monkeypatch.setattr(training.demo.demo, "N_TRAIN", n)
        trained.clear()
        tokenizer = tmp_path / "tokenizer.json"
        before = tokenizer.stat().st_mtime_ns if tokenizer.exists() else None
        if expected is None:
            with pytest.raises(ValueError, match=r"demonstration of another world .* or --fresh to replace it"):
                run_demo(recipe("demo"), tmp_path, join(), lambda line: None)
            assert tokenizer.stat().st_mtime_ns == before
            assert latest_tag(tmp_path / "training" / "clip" / "checkpoints") == "step00000001"
            continue
        run_demo(recipe("demo"), tmp_path, join(), lambda line: None, fresh=fresh)
        assert trained == expected
        assert (tokenizer.stat().st_mtime_ns != before) == bool(expected)


@pytest.mark.parametrize("fresh", [False, True])
def test_the_demonstration_leaves_the_runs_of_others_alone(bundle_copy: Path, fresh: bool) -> None:
    before = sorted(bundle_copy.rglob("*"))
    with pytest.raises(ValueError, match="runs that are not a demonstration's"):
        run_demo(recipe("demo"), bundle_copy, join(), lambda line: None, fresh=fresh)
    assert before
    assert sorted(bundle_copy.rglob("*")) == before


@pytest.mark.slow
def test_a_fresh_dvae_interrupted_in_its_warm_up_does_not_go_on_from_the_old_one(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["dvae", "tiny", "--data", shards, "--out", tmp_path]
    assert run(*command) == 0

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training.stages.program, "fit", interrupted)
        assert run(*command, "--fresh") == 0
    assert latest_tag(tmp_path / "training" / "dvae" / "checkpoints") is None
    assert run(*command) == 0
    assert latest_tag(tmp_path / "training" / "dvae" / "checkpoints") is not None


def test_a_tokenizer_is_not_replaced_without_fresh(
    bundle_copy: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", "tiny", "--data", shards, "--out", bundle_copy]
    assert run(*command) == 1
    assert "--fresh" in capsys.readouterr().err
    assert run(*command, "--fresh") == 0


def test_the_demonstration_refuses_to_run_on_several_ranks(tmp_path: Path) -> None:
    place = dataclasses.replace(join(), size=4)
    with pytest.raises(ValueError, match="runs in one process, and a launcher started it in 4"):
        run_demo(recipe("demo"), tmp_path / "out", place, lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zero_stage", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_dvae_learns_the_same_at_every_zero_stage(tmp_path: Path, shards: Path, zero_stage: int) -> None:
    # at a high rate, AdamW's first steps turn rounding in a gradient near 0 into another code here and there
    command = ["dvae", "tiny", "--data", shards, "--learning-rate", 1e-3]
    losses = []
    for stage in (zero_stage, 0):
        out = tmp_path / f"stage{stage}"
        assert run(*command, "--out", out, "--zero-stage", stage) == 0
        lines = read_metrics(out / "training" / "dvae")
        losses.append([line["loss"] for line in lines if line["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dvae_goes_on_from_given_weights(tmp_path: Path, bundle: Path, shards: Path) -> None:
    arguments = ["dvae", "tiny", "--data", shards, "--out", tmp_path, "--init", bundle / "dvae", "--steps", 1]
    assert run(*arguments) == 0
    before, after = DVAE.load(bundle / "dvae").state_dict(), DVAE.load(tmp_path / "dvae").state_dict()
    distances = [float(((before[name] - after[name]) / (1 + before[name].abs())).abs().max()) for name in before]
    assert 0 < max(distances) < 0.01


def test_only_recipes_of_the_built_in_world_have_hard_negatives() -> None:
    assert {name for name in NAMES if recipe(name).clip.hard_negatives} == {"demo", "mini-cpu", "1m", "unclip-cpu"}
    assert recipe("demo").clip.wrong_captions == "world"
    assert recipe("icons-cpu").clip.wrong_captions == "words"


@pytest.mark.parametrize("change", ["other shards", "a shard more", "a shard gone"])
def test_clip_resumes_on_changed_data_with_its_own_tokenizer_and_a_warning(
    tmp_path: Path, bundle_copy: Path, shards: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    if change == "other shards":
        data = tiny.write_world(tmp_path / "other", seed=7)
    elif change == "a shard more":
        tiny.write_world(tmp_path / "more", 8, seed=7)
        shutil.copy(tmp_path / "more" / "world-000000.tar", data / "world-000003.tar")
    else:
        (data / "world-000002.tar").unlink()
    before = (bundle_copy / "clip" / "tokenizer.json").read_bytes()
    assert run("clip", "tiny", "--data", data, "--out", bundle_copy, "--steps", 6) == 0
    said = capsys.readouterr().err
    assert "clip: resuming from step 4 of 6" in said
    assert ("the resumed run has as many" if change == "other shards" else "the run began with 24") in said
    assert (bundle_copy / "clip" / "tokenizer.json").read_bytes() == before
    assert read_metrics(bundle_copy / "training" / "clip")[-1]["step"] == 6


def test_a_resumed_run_tells_what_else_it_is_told_than_before(
    bundle_copy: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["clip", "tiny", "--data", shards, "--validation", shards, "--out", bundle_copy]
    assert run(*same, "--steps", 5, "--learning-rate", 1e-5, "--hard-negatives", 1, "--gradient-clipping", 2) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " from here on" in line]
    for change in (
        "steps was 4 and is 5",
        "learning_rate.peak was 0.002 and is 1e-05",
        "optimizer.gradient_clipping was 0.0 and is 2.0",
        "hard_negatives was 0 and is 1",
    ):
        assert f"clip: {change} from here on" in told
    assert not any("model" in line or "seed" in line for line in told)
    more = ["--steps", 6, "--learning-rate", 1e-5, "--hard-negatives", 1, "--gradient-clipping", 2]
    assert run(*same[:4], "--validation", shards / "world-000000.tar", *same[6:], *more) == 0
    said = capsys.readouterr().err
    told = [line for line in said.splitlines() if " from here on" in line]
    # the schedule, too, is stretched with the steps
    assert [line for line in told if "learning_rate." not in line] == ["clip: steps was 5 and is 6 from here on"]
    assert "validated on other samples than before" in said


def test_evaluation_measures_what_its_name_says(bundle: Path, shards: Path) -> None:
    pipe = Pipeline.load(bundle)
    data = ShardData.open([shards], captions=True)
    whole, batched = evaluate(pipe, data), evaluate(pipe, data, batch_size=7)
    for name, value in dataclasses.asdict(whole).items():
        assert dataclasses.asdict(batched)[name] == pytest.approx(value, rel=1e-4), name
    assert whole.image_gain == pytest.approx(whole.image_unigram - whole.image_loss)
    assert 1 <= whole.codes_used <= whole.codes == 32
    assert 0 <= whole.retrieval <= 1
    assert whole.retrieval_size <= tiny.N_SAMPLES
    assert "CLIP retrieval" in whole.table()


def test_captions_for_the_sheet_are_distinct_and_as_many_as_asked(shards: Path) -> None:
    chosen = distinct_captions(ShardData.open([shards], captions=True), 5)
    assert len(set(chosen)) == 5


# ----------------------------------------------------------------------------------------------------- errors


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "png")
    return buffer.getvalue()


Arguments = Sequence[object]


def wrong_inputs(folder: Path, shards: Path) -> Iterator[tuple[Arguments, str]]:
    """Yield command lines and what each is told."""
    out = folder / "out"

    def on(data: Path) -> Arguments:
        return ["--data", data, "--out", out]

    (folder / "empty").mkdir()
    whole = next(iter(shards.glob("*.tar"))).read_bytes()
    (folder / "cut").mkdir()
    (folder / "cut" / "a.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "text").mkdir()
    (folder / "text" / "a.tar").write_text("no tar")
    tar(folder / "mute" / "a.tar", {"1.png": png()})
    (folder / "broken.json").write_text("{")
    (folder / "unknown.json").write_text('{"zero_optimisation": {}}')
    (folder / "recompute.json").write_text('{"activation_checkpointing": {"partition_activations": true}}')
    (folder / "batch.json").write_text('{"train_batch_size": 64}')
    (folder / "file").write_text("x")
    yield ["dvae", "demmo", *on(shards)], "unknown recipe 'demmo': did you mean 'demo'"
    yield ["plan", "demmo"], "did you mean 'demo'"
    for stage in ("tokenizer", "dvae", "clip", "all"):
        yield [stage, "tiny", *on(folder / "missing")], "missing"
    yield ["dvae", "tiny", *on(folder / "empty")], "empty"
    yield ["dvae", "tiny", *on(folder / "cut")], "a.tar"
    yield ["dvae", "tiny", *on(folder / "text")], "a.tar"
    yield ["clip", "tiny", *on(folder / "mute")], "has no captions"
    yield ["dvae", "tiny", *on(shards), "--validation", folder / "missing"], "missing"
    yield ["transformer", "tiny", *on(shards)], "tokenizer"
    for name, told in (
        ("broken", "not valid JSON"),
        ("unknown", "did you mean"),
        ("batch", "train_batch_size"),
        ("recompute", "--activation-checkpointing decides"),
    ):
        yield ["dvae", "tiny", *on(shards), "--deepspeed-config", folder / f"{name}.json"], told
    yield ["dvae", "tiny", *on(shards), "--deepspeed-config", folder / "none.json"], "no DeepSpeed configuration at"
    yield ["dvae", "tiny", *on(shards), "--init", folder / "none"], "none"
    for option, value in (
        ("--steps", 0),
        ("--global-batch", 0),
        ("--micro-batch", 3),
        ("--micro-batch", 0),
        ("--zero-stage", 7),
        ("--workers", -1),
        ("--seed", -1),
        ("--max-bad-fraction", 2),
        ("--log-every", 0),
        ("--checkpoint-every", 0),
        ("--validate-every", -1),
        ("--precision", "bf16"),
    ):
        yield ["dvae", "tiny", *on(shards), option, value], option.removeprefix("--").replace("-", "_")
    yield ["clip", "tiny", *on(shards), "--micro-batch", 2], "negatives are the whole batch"
    yield ["tokenizer", "tiny", *on(shards), "--vocab-size", 3], "3"
    yield ["tokenizer", "tiny", "--data", shards, "--out", folder / "file"], "file"
    yield ["dvae", "tiny", "--data", shards, "--out", folder / "file"], "file"
    yield ["evaluate", folder / "none", "--data", shards], "none"
    yield ["plan", "demo", "--gpus", 0], "--gpus must be at least 1"
    yield ["plan", "demo", "--gpu-memory", 0], "--gpu-memory must be above 0"
    yield ["shards", folder / "none", "--out", out], "none"


def test_wrong_inputs_end_in_one_line_and_exit_code_1(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, told in wrong_inputs(tmp_path, shards):
        code = run(*arguments)
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 1, (arguments, said)
        assert len(errors) == 1, (arguments, said)
        assert said.splitlines()[-1] == errors[0], (arguments, said)
        assert told in errors[0], (arguments, said)
        assert "Traceback" not in said, (arguments, said)


def test_wrong_inputs_to_a_bundle_end_in_one_line(
    bundle_copy: Path, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        assert run(*arguments, "--data", shards) == 1
        lines = capfd.readouterr().err.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        return lines[-1]

    transformer = ["transformer", "tiny", "--out", bundle_copy]
    assert "--captions must be at least 1" in said("evaluate", bundle_copy, "--captions", 0)
    assert "no device 'gpu7'" in said("evaluate", bundle_copy, "--device", "gpu7")
    assert "null_caption_probability" in said(*transformer, "--null-caption-probability", 2, "--fresh")
    DVAE(DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=16)).save(bundle_copy / "dvae")
    assert "another dvae_hash" in said(*transformer, "--steps", 9)
    assert "trained with the dvae" in said("evaluate", bundle_copy)
    shutil.rmtree(bundle_copy / "dvae")
    assert "dvae" in said(*transformer)


def test_a_usage_error_is_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("dvae", "tiny") == 1
    assert run("dvae", "tiny", "--steps", "many") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_shards_are_made_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes(png())
        (tmp_path / "in" / f"{number}.txt").write_text(f"a black picture {number}")
    assert run("shards", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert len(ShardData.open([tmp_path / "out"], captions=True)) == 3


# --------------------------------------------------------------------------------------------- metrics and plan


def test_metrics_of_later_steps_are_dropped_and_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, "train", {"loss": float(step), "bad": float("inf")})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricLog(tmp_path, 3)
    log.write(4, "train", {"loss": 40.0})
    log.close()
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert lines[0]["bad"] is None


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "unclip-paper-1024" else n for n in NAMES]
)
def test_every_recipe_constructs_and_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = recipe(name)
    assert chosen.name == name
    with torch.device("meta"):
        new_transformer(chosen.transformer.model)
        dvae = DVAE(chosen.dvae.model)
        CLIP(chosen.clip.model)
    assert dvae.config.grid == chosen.transformer.model.grid
    assert dvae.config.vocab_size == chosen.transformer.model.image_vocab
    assert run("plan", name) == 0
    assert chosen.purpose in capsys.readouterr().out
    assert run("plan") == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(("name", "billions"), [("1.3b", 1.3), ("2.8b", 2.8), ("5.6b", 5.6), ("12b", 12.29)])
def test_the_large_recipes_have_as_many_parameters_as_their_names_say(name: str, billions: float) -> None:
    with torch.device("meta"):
        total = DALLE(recipe(name).transformer.model).n_parameters()["total"]
    assert total / 1e9 == pytest.approx(billions, rel=0.06 if name != "12b" else 4e-4)


def test_zero_divides_the_state_of_adam_as_published() -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, K = 12, 64 GPUs: 31.4, 16.6 and 1.9 GB
    totals = [state_bytes(7_500_000_000, "bf16", stage, 64).total / 1e9 for stage in (1, 3)]
    assert totals == pytest.approx([31.4, 2.1], rel=0.03)
    with pytest.raises(ValueError, match="bf16"):
        state_bytes(1, "bf16", 0, 1)


def test_the_arithmetic_of_a_step_is_that_counted_by_hand() -> None:
    config = DALLEConfig(
        n_layers=2, d_model=16, n_heads=2, text_len=24, grid=4, text_vocab=300, image_vocab=32, conv_kernel=3
    )
    S, d = 24 + 16, 16
    block = 2 * S * (4 * d * d + 8 * d * d)  # multiplications: q, k, v, output and an MLP of 4·d; the same again adds
    pairs = 2 * 2 * S * S * d  # of two layers: queries with keys, weights with values
    heads = 24 * d * 300 + 16 * d * 32
    assert flops_per_sample(config, 2 * 12 * d * d) == 3 * 2 * (block + pairs + heads)


@pytest.mark.parametrize(("gpus", "micro_batch"), [(16, 8), (128, 8), (512, 2), (1024, 1)])
def test_a_plan_takes_the_recipes_micro_batch_or_the_share_of_a_gpu_if_that_is_less(
    gpus: int, micro_batch: int
) -> None:
    text = plan_text(make_plan(recipe("12b"), PlanOptions(gpus=gpus, gpu_memory=80)))
    assert f"micro-batch {micro_batch}," in text
    assert (f"train with --micro-batch {micro_batch}" in text) == (micro_batch < 8)


@pytest.mark.parametrize("gpus", [24, 4096])
def test_a_plan_for_gpus_that_cannot_share_the_batch_is_refused(gpus: int) -> None:
    with pytest.raises(ValueError, match=f"{gpus} GPUs cannot share a batch of 1024 evenly"):
        plan_text(make_plan(recipe("12b"), PlanOptions(gpus=gpus, gpu_memory=80)))


def test_a_plan_says_what_does_not_fit() -> None:
    text = plan_text(make_plan(recipe("12b"), PlanOptions(gpus=8, gpu_memory=80)))
    stages = [line for line in text.splitlines() if line.strip().startswith("ZeRO")]
    assert len(stages) == 4
    assert "does not fit" in stages[0]
    assert "does not fit" not in stages[3]
    assert "12,29" in text


def test_train_configs_of_all_recipes_share_their_batch_among_8_ranks_or_2_cores() -> None:
    for name in NAMES:
        chosen = recipe(name)
        ranks = 2 if name.endswith("-cpu") else 8
        configs: list[TrainConfig] = [chosen.dvae.train, chosen.transformer.train, chosen.clip.train]
        if chosen.dvae.warmup is not None:
            configs.append(chosen.dvae.warmup)
        for config in configs:
            assert config.batch_of(ranks)[0] * config.batch_of(ranks)[1] * ranks == config.global_batch


@pytest.mark.slow
def test_compiled_training_is_training(bundle_copy: Path, shards: Path) -> None:
    losses = []
    for extra in ([], ["--compile"]):
        shutil.rmtree(bundle_copy / "training" / "transformer", ignore_errors=True)
        command = ["transformer", "tiny", "--data", shards, "--out", bundle_copy, "--steps", 3, "--log-every", 1]
        assert run(*command, "--fresh", *extra) == 0
        lines = read_metrics(bundle_copy / "training" / "transformer")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
