"""Options of `dalle-train`: what --help shows, what was given, and how it changes a recipe."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from support import tiny

import training.recipes
from training.cli.main import COMMANDS, main, read
from training.cli.options import arguments_of, changed_recipe
from training.config import TrainConfig
from training.recipes import RECIPES, Recipe, recipe
from training.schedules import Cosine

VERBS = [verb for group in COMMANDS.values() for verb in group]
REQUIRED = ["--data", "shards", "--out", "out"]


@pytest.fixture(autouse=True)
def _tiny_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setenv("COLUMNS", "120")


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def groups_of(text: str) -> dict[str, dict[str, str]]:
    """The options of every group of a help text, by its title, with what is said of them."""
    groups: dict[str, dict[str, str]] = {}
    name, lines = "", [line for line in text.splitlines() if line.strip("- ") or not line.strip()]
    for before, line in itertools.pairwise(lines):
        if not before.strip() and re.match(r" \w+ ?[\w ]* *$", line):
            title, name = line.strip(), ""
            groups[title] = {}
        elif found := re.match(r"  (?:-h, )?(--[\w.-]+|[A-Z]+\b)", line):
            name = found[1]
            groups[title][name] = line.strip()
        elif name and line.strip():
            groups[title][name] += f" {line.strip()}"
    return groups


def options_of(text: str) -> dict[str, str]:
    """The options of a help text, with what is said of them."""
    return {name: said for group in groups_of(text).values() for name, said in group.items()}


# ------------------------------------------------------------------------------------------------ help


def test_the_overview_names_every_command_and_a_wrong_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    assert main([]) == 1
    assert main(["transformerr", "demo"]) == 1
    assert "no command 'transformerr': did you mean 'transformer'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_sentence_for_every_option_and_no_none(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, verb)
    assert "None" not in said
    assert f"usage: dalle-train {verb} " in said
    assert "--help" in options_of(said)
    for name, words in options_of(said).items():
        assert name == "--help" or re.search(r"[a-z]{2}.*\.( \((default|required).*\))?\s*$", words), words


@pytest.mark.parametrize(("name", "steps"), [("12b", 430_000), ("demo", 1100)])
def test_help_shows_the_values_of_the_recipe(name: str, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, "transformer", name)
    options = options_of(said)
    train = recipe(name).transformer.train
    assert train.steps == steps
    for option, value in (
        ("steps", steps),
        ("learning-rate", train.learning_rate.peak),
        ("optimizer", train.optimizer.kind),
        ("precision", train.precision),
        ("zero-stage", train.zero_stage),
        ("checkpoint-every", train.checkpoint_every),
        ("init-scale", recipe(name).transformer.init_scale),
        ("workers", train.workers),
    ):
        assert f"(default: {value})" in options[f"--{option}"]
    assert f"Defaults are those of the recipe {name}." in said
    assert options["--offload"].startswith("--offload {none,optimizer,parameters} ")
    assert options["--compile"].startswith("--compile, --no-compile ")
    assert options["--fresh"].startswith("--fresh ")
    off = options["--activation-checkpointing"].endswith("more time.")
    assert off == (not train.activation_checkpointing), "(default: True) where the recipe has it on"


def test_help_without_a_recipe_says_whose_values_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, "dvae")
    told = "Defaults are those of the recipe demo: `dalle-train dvae RECIPE --help` shows another's."
    assert told in " ".join(said.split())
    assert re.match(r"RECIPE +Name of a recipe: demo, icons-cpu, .*12b", options_of(said)["RECIPE"])


def test_options_are_in_groups_with_those_that_vary_most_first(capsys: pytest.CaptureFixture[str]) -> None:
    groups = groups_of(help_of(capsys, "transformer", "12b"))
    assert list(groups) == [
        "positional arguments",
        "options",
        "transformer options",
        "data options",
        "validation and samples options",
        "checkpoints options",
        "memory and ranks options",
        "watching options",
        "advanced options",
    ]
    first = ["--help", "--data", "--out", "--fresh", "--steps", "--global-batch", "--micro-batch", "--learning-rate"]
    assert list(groups["options"])[: len(first)] == first
    assert "--compile" in groups["transformer options"]
    assert list(groups["checkpoints options"])[-2:] == ["--resume", "--resume-from"]


# ------------------------------------------------------------------------------------------------ what was given


def given(*words: str) -> dict[str, Any]:
    command = read(list(words))
    return command.given()  # type: ignore[attr-defined,no-any-return]


def test_an_option_counts_as_given_also_where_it_says_what_the_recipe_says() -> None:
    assert recipe("demo").dvae.train.precision == "autocast"
    options = given("dvae", "demo", *REQUIRED, "--precision", "autocast", "--log_every=7")
    assert options == {"data": ["shards"], "out": Path("out"), "precision": "autocast", "log_every": 7}
    changed = changed_recipe(recipe("demo"), "dvae", options).dvae
    assert changed.train.said == ("log_every", "precision")
    assert changed.warmup is not None
    assert changed.warmup.said == ("log_every", "precision")


def test_a_switch_can_be_given_both_ways() -> None:
    assert recipe("12b").transformer.train.activation_checkpointing
    options = given("transformer", "12b", *REQUIRED, "--no-activation-checkpointing", "--compile")
    assert (options["activation_checkpointing"], options["compile"]) == (False, True)
    train = changed_recipe(recipe("12b"), "transformer", options).transformer.train
    assert (train.activation_checkpointing, train.compile) == (False, True)
    assert arguments_of({"compile": True, "activation_checkpointing": False, "seed": 3}) == [
        "--compile",
        "--no-activation-checkpointing",
        "--seed",
        "3",
    ]


def test_a_dvae_takes_another_codebook_than_the_recipes() -> None:
    words = ["--codes", "256", "--downsampling", "8", "--image-size", "32", "--kl-weight", "6.6", "--no-warmup"]
    options = given("dvae", "photos-cpu", *REQUIRED, *words, "--steps", "100")
    changed = changed_recipe(recipe("photos-cpu"), "dvae", options).dvae
    assert (changed.model.vocab_size, changed.model.downsampling, changed.model.image_size) == (256, 8, 32)
    assert changed.model.n_hid == recipe("photos-cpu").dvae.model.n_hid
    assert changed.kl_weight == Cosine(start=0.0, end=6.6, steps=100)
    assert changed.warmup is None
    assert (
        changed_recipe(recipe("demo"), "dvae", given("dvae", "demo", *REQUIRED, "--kl-weight", "0")).dvae.kl_weight.peak
        == 0
    )
    assert changed_recipe(recipe("demo"), "dvae", given("dvae", "demo", *REQUIRED, "--warmup")) == recipe("demo")


def test_help_shows_the_recipes_codebook(capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(help_of(capsys, "dvae", "12b"))
    values = {"codes": 8192, "downsampling": 8, "image-size": 256, "kl-weight": 6.6}
    assert [f"(default: {value})" in options[f"--{name}"] for name, value in values.items()] == [True] * 4
    assert "default: True" not in options["--warmup"]
    assert "(default: True)" in options_of(help_of(capsys, "dvae", "demo"))["--warmup"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--downsampling", "6"], "--downsampling is 6; expected a power of two"),
        (["demo", "--downsampling", "0"], "--downsampling is 0; expected a power of two"),
        (["demo", "--downsampling", "32"], "image_size .48. must be a multiple of 32"),
        (["demo", "--codes", "1"], "vocab_size .1. must be a whole number of at least 2"),
        (["demo", "--kl-weight", "-1"], "--kl-weight is -1.0; expected a number of at least 0"),
        (["demo", "--kl-weight", "nan"], "--kl-weight is nan"),
        (["12b", "--warmup"], "this recipe has no warm-up"),
        (["demo", "--init", "runs/x/dvae", "--codes", "256"], "do not go with --init"),
    ],
)
def test_an_impossible_codebook_is_refused_before_any_data_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed_recipe(recipe(words[0]), "dvae", given("dvae", *words, *REQUIRED))


def test_nothing_given_changes_nothing() -> None:
    options = given("clip", "demo", *REQUIRED)
    assert changed_recipe(recipe("demo"), "clip", options) == recipe("demo")


@pytest.mark.parametrize(
    "words",
    [
        ["tiny", *REQUIRED],
        [*REQUIRED, "tiny"],
        ["--fresh", *REQUIRED, "tiny"],
        ["--data", "demo", "--out", "12b", "tiny"],
    ],
)
def test_the_recipe_is_found_wherever_it_stands(words: list[str]) -> None:
    command: Any = read(["dvae", *words])
    assert command.recipe == "tiny"
    assert command.size.steps == tiny.recipe().dvae.train.steps
    assert command.changed() == tiny.recipe()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dvae", "dmeo", *REQUIRED], "error: unknown recipe 'dmeo': did you mean 'demo'?"),
        (["dvae", "demo", *REQUIRED, "--stepps", "3"], "--steps INT"),
        (["dvae", "demo", *REQUIRED, "--learning-rate", "0"], "error: --learning-rate is 0.0; expected a number above"),
        (["dvae", "demo", *REQUIRED, "--timeout", "0"], "error: --timeout is 0.0; expected seconds above 0"),
        (["dvae", "demo", *REQUIRED, "--auto-restart", "-1"], "error: --auto-restart is -1; expected a number of"),
        (["demo", "--dvae.steps", "0"], "error: steps must be at least 1, got 0"),
        (["dvae", "demo", *REQUIRED, "--steps", "1" + "0" * 400], "error: steps must be at most 1,000,000,000"),
        (["dvae", "demo", *REQUIRED, "--seed", str(2**64)], "error: seed must be at most"),
        (["dvae", "demo", *REQUIRED, "--workers", "100000"], "error: workers must be at most 256"),
        (["dvae", "demo", *REQUIRED, "--global-batch", str(10**12)], "error: global_batch must be at most"),
        (["dvae", "demo", *REQUIRED, "--micro-batch", "0"], "error: micro_batch must be at least 1, got 0"),
        (["dvae", "demo", *REQUIRED, "--learning-rate", "nan"], "error: --learning-rate is nan; expected a number"),
        (["dvae", "demo", *REQUIRED, "--learning-rate", "inf"], "error: --learning-rate is inf; expected a number"),
        (["dvae", "demo", *REQUIRED, "--gradient-clipping", "nan"], "error: gradient_clipping must be a number of"),
        (["dvae", "demo", *REQUIRED, "--timeout", "1e300"], "error: --timeout is 1e+300; expected seconds above 0"),
        (["clip", "demo", *REQUIRED, "--hard-negatives", "9999"], "error: hard_negatives must be at most 1,000"),
        (["tokenizer", "demo", *REQUIRED, "--vocab-size", "1" + "0" * 30], "error: vocab_size must be at most"),
        (["all", "demo", *REQUIRED, "--encode-crops", "100000"], "error: --encode-crops must be at most 1,000"),
        (["encode", *REQUIRED, "--dvae", "none", "--crops", "100000"], "error: crops must be at most 1,000"),
        (["plan", "demo", "--gpu-memory", "nan"], "error: --gpu-memory must be above 0"),
        (["status", "none", "--watch", "inf"], "error: --watch must be above 0"),
        (["dvae", "demo", *REQUIRED, "--fresh", "--resume"], "error: --fresh starts anew"),
    ],
)
def test_a_wrong_option_ends_with_1_and_says_why(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------ all stages


def trains(chosen: Recipe) -> list[TrainConfig]:
    warmups = filter(None, [chosen.dvae.warmup, chosen.clip.warmup])
    return [chosen.dvae.train, chosen.clip.train, chosen.transformer.train, *warmups]


def test_options_of_all_stages_go_to_every_one_and_others_to_their_own() -> None:
    words = ["--seed", "3", "--precision", "fp32", "--validate-every", "9", "--timeout", "60"]
    words += ["--dvae.steps", "50", "--clip.hard-negatives", "1", "--transformer.learning-rate", "1e-3"]
    command: Any = read(["demo", *words, "--transformer.no-compile"])
    changed = command.changed(recipe("demo"))
    assert len(trains(changed)) == 5
    for train in trains(changed):
        assert (train.seed, train.precision, train.validate_every) == (3, "fp32", 9)
    assert (changed.dvae.train.steps, changed.clip.hard_negatives) == (50, 1)
    assert changed.transformer.train.learning_rate.peak == 1e-3
    assert changed.clip.train.steps == recipe("demo").clip.train.steps
    shared = ["--precision", "fp32", "--seed", "3", "--timeout", "60.0", "--validate-every", "9"]
    found = command.stage_arguments()
    for stage, own in {
        "dvae": ["--steps", "50"],
        "clip": ["--hard-negatives", "1"],
        "transformer": ["--learning-rate", "0.001", "--no-compile"],
    }.items():
        assert sorted(found[stage]) == sorted([*shared, *own])


@pytest.mark.parametrize("stage", ["dvae", "clip", "transformer"])
def test_the_command_of_a_stage_changes_the_recipe_as_all_does(stage: str) -> None:
    words = ["--seed", "3", "--zero-stage", "1", f"--{stage}.steps", "60", f"--{stage}.optimizer", "adamw"]
    everything: Any = read(["all", "demo", *REQUIRED, *words, "--transformer.compile"])
    alone: Any = read([stage, "demo", *REQUIRED, *everything.stage_arguments()[stage]])
    changed = everything.changed(recipe("demo"))
    assert getattr(alone.changed(), stage) == getattr(changed, stage) != getattr(recipe("demo"), stage)


def test_help_of_all_shows_a_value_where_the_stages_agree(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, "all", "12b")
    options = options_of(said)
    assert "(default: 3000000)" in options["--dvae.steps"]
    assert "(default: 430000)" in options["--transformer.steps"]
    assert "(default: 8)" in options["--workers"]
    assert "default" not in options["--precision"], "autocast, and bf16 for the transformer"
    groups = groups_of(said)
    assert {"dvae options", "clip options", "transformer options"} <= set(groups)
    assert "--transformer.compile" in groups["transformer options"]


@pytest.mark.slow
def test_every_recipe_has_values_for_every_option() -> None:
    for name in RECIPES:
        for verb in ("tokenizer", "dvae", "clip", "transformer", "all"):
            command: Any = read([verb, name, *REQUIRED])
            assert command.recipe == name
            if verb == "all":
                assert command.changed(recipe(name)) == recipe(name)


def test_a_plan_takes_its_options_as_they_are() -> None:
    command: Any = read(["plan", "1.3b", "--gpus", "2", "--gpu-memory", "24"])
    assert dataclasses.asdict(command.options) | {"gpus": 2, "gpu_memory": 24.0} == dataclasses.asdict(command.options)
