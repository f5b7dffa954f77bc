"""Which module may import which, and what may not be written: docs/design.md, checked by reading the source.

Every `import` counts wherever it stands, inside functions too. Messages name the file and the line.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest

from training.cli import data, train
from training.config import OptimizerConfig, TrainConfig
from training.data.filters import ShardFilter
from training.stage_recipes import CLIPRecipe, DVAERecipe, TransformerRecipe
from training.stages.encode import EncodeConfig
from training.stages.inputs import Inputs
from training.unclip_recipes import DecoderRecipe, PriorRecipe, UpsamplerRecipe

ROOT = Path(__file__).parents[1]
PACKAGES = ("storage", "dvae", "rerank", "unclip", "dalle", "training")
LONGEST_FUNCTION = 150
MODULES_IN_A_FOLDER = 12

LEAVES = {"dvae.colour", "dvae.compilation", "dvae.images", "dvae.png", "dvae.remarks"}
"""They know no model, and everything may import them."""

PIPELINE = {
    "dalle.best_of_n",
    "dalle.budget",
    "dalle.data.bundle",
    "dalle.editing.captions",
    "dalle.editing.edit",
    "dalle.editing.likelihood",
    "dalle.editing.redraw",
    "dalle.editing.regions",
    "dalle.editing.variations",
    "dalle.pipeline",
}
"""The modules of dalle that join the packages."""

_CORE = {"storage", "leaf", "dalle"}
_MODELS = {"dvae", "rerank", "unclip"}
_TRAINING = {
    "training.patches",
    "training.schedules",
    "training.config",
    "training.run_files",
    "training.ranks",
    "training.drawings",
}
ROOMS: dict[str, set[str]] = {
    "storage": set(),
    "leaf": {"storage"},
    "dvae": {"storage", "leaf"},
    "rerank": {"storage", "leaf"},
    "unclip": {"storage", "leaf"},
    "dalle": {"storage", "leaf"},
    "dalle.data": {"storage", "leaf"},
    "dalle.output": {*_CORE, "dalle.pipeline"},
    "dalle.pipeline": {*_CORE, *_MODELS, "dalle.data"},
    "dalle.unclip": {*_CORE, *_MODELS, "dalle.data", "dalle.pipeline"},
    "dalle.evaluation": {*_CORE, *_MODELS, "dalle.data", "dalle.output", "dalle.pipeline"},
    "dalle.importers": {"storage", "dalle", *_MODELS, "dalle.data", "dalle.pipeline"},
    "dalle.server": {*_CORE, "dalle.output", "dalle.pipeline", "dalle.unclip", "rerank"},
    "dalle.cli": {
        *_CORE,
        *_MODELS,
        "dalle.data",
        "dalle.output",
        "dalle.pipeline",
        "dalle.unclip",
        "dalle.evaluation",
        "dalle.importers",
        "dalle.server",
    },
    "training.patches": set(),
    "training.schedules": set(),
    "training.config": {"training.schedules"},
    "training.run_files": {"storage"},
    "training.drawings": set(),
    "training.ranks": {"storage", "dalle.output", "training.patches", "training.run_files"},
    "training.report": {"storage", "dalle.output", "training.run_files"},
    "training.data": {*_CORE, *_MODELS, "dalle.data", "dalle.output", "training.drawings"},
    "training.engine": {"storage", "dalle", "dalle.output", *_TRAINING},
    "training.loop": {"storage", "dalle.data", "dalle.output", "training.data", "training.engine", *_TRAINING},
    "training.unclip_recipes": {"unclip", "training.config", "training.schedules"},
    "training.stage_recipes": {
        "dalle",
        "dvae",
        "rerank",
        "training.config",
        "training.drawings",
        "training.schedules",
    },
    "training.recipes": {
        "dalle",
        *_MODELS,
        "training.config",
        "training.data",
        "training.drawings",
        "training.schedules",
        "training.stage_recipes",
        "training.unclip_recipes",
    },
    "training.plan": {"storage", "dalle", "dalle.output", *_MODELS, "training.engine", "training.recipes", *_TRAINING},
}
ROOMS["training.stages"] = {*ROOMS} - {"dalle.cli", "dalle.importers", "dalle.server", "training.report"}
ROOMS["training.demo"] = {*ROOMS} - {"dalle.cli", "dalle.importers", "dalle.server"}
ROOMS["training.cli"] = {*ROOMS} - {"dalle.server"}
"""What each folder may import of the others; "dalle" is its core, and a lone module of training a room of its own."""

FACADE = "dalle"
"""dalle/__init__.py names the public classes for type checkers and imports them on first use."""

LIBRARY_HOMES = {
    "deepspeed": {
        "training/engine/engine.py",
        "training/engine/parts/start.py",
        "training/engine/resharding.py",
        "training/patches.py",
    },
    "webdataset": {"storage/tar.py"},
    "tarfile": {"storage/tar.py"},
    "tyro": {"dalle/cli", "training/cli"},
    "tokenizers": {"storage/bpe.py", "dalle/family/texts"},
    "ftfy": {"storage/bpe.py", "dalle/family/texts"},
    "emoji": {"dalle/family/texts"},
    "unidecode": {"dalle/family/texts"},
    "msgpack": set(),
    "torch.jit": set(),
    "torchmetrics": {"dvae/metrics.py"},
    "tensorboard": {"training/loop/sinks.py"},
    "torch.utils.tensorboard": {"training/loop/sinks.py"},
    "wandb": {"training/loop/sinks.py"},
    "tqdm": {"dalle/output/progress.py"},
    "filelock": {"storage/lock.py"},
    "fsspec": {"storage/stores/remote.py"},
    "aiohttp": {"storage/stores/remote.py"},
    "jinja2": {"training/report/report.py"},
    "matplotlib": {"training/report/curves.py", "dalle/evaluation/tokenizers/plots.py"},
    "starlette": {f"dalle/server/{name}.py" for name in ("app", "page", "security", "state", "streams")},
    "uvicorn": {"dalle/server/serving.py"},
    "python_multipart": {"dalle/server/serving.py"},
    "multipart": set(),
    "prometheus_client": {"dalle/server/metrics.py"},
    "importlib": {"dalle/__init__.py"},  # names imported on first use; elsewhere it would hide an import from this test
    "yaml": set(),
    "dill": set(),
    "cloudpickle": set(),
    "joblib": set(),
}

INTERFACE = """
storage.models.directory:save_directory(path, kind, config, state, metadata, files)
storage.models.directory:load_directory(path, kind, config_type)
storage.models.directory:directory_hash(path)
dvae.images:open_image(source, name)
dvae.images:to_tensor(image)
dvae.images:to_image(pixels)
dvae.images:resize_and_crop(image, size)
dvae.images:dvae_augmentation(image, size, rng)
dvae.images:transformer_augmentation(image, size, rng)
dvae.images:square_crop(image, size, rng)
dvae.images:map_pixels(x)
dvae.images:unmap_pixels(x)
dvae:DVAEConfig(n_hid, n_init, n_groups, n_blocks, vocab_size, image_size)
dvae:DVAEConfig.downsampling
dvae:DVAEConfig.grid
dvae:DVAE(config)
dvae:DVAE.load(path)
dvae:DVAE.save(path, metadata)
dvae:DVAE.encode(images)
dvae:DVAE.decode(tokens)
dvae.codec:load_codec(path, device)
dvae.vqgan:VQGAN(config)
dvae.vqgan:VQGAN.load(path)
dvae.vqgan:VQGAN.save(path, metadata)
dvae.vqgan:VQGAN.encode(images)
dvae.vqgan:VQGAN.decode(tokens)
dvae.loss:dvae_loss(dvae, images, temperature, kl_weight, generator)
dvae.metrics:psnr(images, reconstructions)
dvae.metrics:ssim(images, reconstructions)
dvae.metrics:ms_ssim(images, reconstructions)
dvae.metrics:code_usage(tokens, vocab_size)
dvae.openai:import_openai(encoder_path, decoder_path)
storage.checkpoints.tensors:open_tensors(path)
dalle.importers.clip:import_clip(source, vocabulary, config, activation, image_size)
dalle.importers.mindalle:import_mindalle(weights, tokenizer)
dalle.importers.rudalle:import_rudalle(weights, version, heads)
dalle.importers.dalle_pytorch.bundle:import_dalle(source, tokenizer, vocabulary, sparse_as_dense)
dalle.importers.dalle_pytorch.bundle:import_vae(source)
dalle:Tokenizer.train(captions, vocab_size)
dalle:Tokenizer.load(file)
dalle:Tokenizer.save(file)
dalle:Tokenizer.vocab_size
dalle:Tokenizer.hash
dalle:Tokenizer.encode(caption, dropout, rng)
dalle:Tokenizer.text(captions, text_len, dropout, rngs)
dalle:DALLEConfig(n_layers, d_model, n_heads, text_len, grid, text_vocab, image_vocab)
dalle:DALLE(config)
dalle:DALLE.load(path)
dalle:DALLE.save(path, metadata)
dalle:DALLE.forward(text, image_tokens)
dalle:Pipeline.load(bundle)
dalle:Pipeline.generate(caption, n, keep, seed, temperature, top_k, top_p, guidance, rank, prefix)
dalle:Pipeline.best(request, sampling, rank, prefix)
dalle:Pipeline.edit(image, mask, caption, n, keep, seed, settings)
dalle:Pipeline.variations(image, caption, n, keep, strength, seed, settings)
dalle:Pipeline.rank_captions(image, captions, rank)
dalle:Pipeline.complete_caption(beginning, n, n_tokens, seed, temperature, top_k)
dalle:Pipeline.likelihood(caption, images)
dalle:Pipeline.sample_tokens(captions, n, sampling)
dalle:Pipeline.choose(caption, tokens, log_likelihoods, keep, rank)
dalle:Pipeline.prefix(image, keep_rows)
dalle:Pipeline.rank(captions, images)
dalle:UnCLIP.load(bundle, device, size, precision, memory)
dalle:UnCLIP.generate(caption, n, keep, seed, guidance, prior_guidance, prior_steps, steps, sampler, upsampler_steps)
dalle:UnCLIP.best(request, drawing, seed)
dalle:UnCLIP.edit(picture, mask, caption, n, keep, seed, drawing)
dalle:UnCLIP.variations(picture, n, eta, seed, drawing)
dalle:UnCLIP.interpolate(a, b, n, keep_ends, candidates, seed, drawing)
dalle:UnCLIP.text_diff(picture, before, after, theta, n, seed, drawing)
dalle:UnCLIP.probe(picture, dimensions, seed, drawing)
dalle:UnCLIP.principal_components(pictures)
dalle.attention:mask(kind, text_len, grid, kernel)
dalle.attention:layer_kinds(n_layers)
dalle.loss:stream_loss(text_logits, image_logits, text, image_tokens, config)
dalle.best_of_n:rank_order(scores, log_likelihoods, rank)
dalle.sampling:SamplingDefaults(temperature, top_k, top_p, guidance, rank)
dalle.sampling:Sampling(seed, temperature, top_k, top_p, guidance)
dalle.sampling:sample(model, text, seeds, sampling, prefix)
dalle.cli.main:main(argv)
rerank:CLIPConfig()
rerank:CLIP(config, tokenizer)
rerank:CLIP.load(path)
rerank:CLIP.save(path, metadata)
rerank:CLIP.encode_image(images, normalise)
rerank:CLIP.encode_text(ids)
rerank:CLIP.text_states(ids, normalise)
rerank:CLIPTokenizer.train(captions, vocab_size)
rerank:score(clip, captions, images)
unclip:Diffusion(schedule, n_steps, timesteps)
unclip:Prior.load(path)
unclip:Decoder.load(path)
unclip:Upsampler.load(path)
unclip.embeddings:sample_embeddings(prior, text, noise, steps, guidance, candidates, on_pass)
unclip.decoding:decode(decoder, embeddings, text, noise, start, steps, sampler, eta, guidance, known, on_pass)
unclip.decoding:invert(decoder, images, embeddings, text, steps, corrections, on_pass)
unclip.upsampler:upsample(upsampler, small, noise, steps, sampler, eta, on_pass)
unclip.latents:slerp(start, end, theta)
unclip.latents:monotone_path(candidates, wanted)
unclip.latents:text_difference(before, after)
dalle.importers.unclip.importing:import_unclip(folder, clip)
dalle.data.reader:ShardData.open(shards, captions, encoded)
dalle.data.reader:ShardData.order(seed, epoch)
training.data.batches:Share(seed, micro_batch, accumulation, rank, world_size, start_step)
training.data.batches:batches(data, transform, share, workers)
training.data.batches:validation_batches(data, transform, batch_size)
training.data.check_data:check_data(shards, out, workers, exclude)
training.data.duplicates:find_duplicates(data, against, clip, out, threshold)
training.data.manifest:Manifest.open(folder)
training.data.manifest:open_with_manifest(shards, manifest, captions, encoded)
training.stages.encode:encode_shards(shards, out, dvae, dvae_hash, config, ranks)
training.engine.engine:Engine(objective, config, ranks)
training.loop.fit:fit(stage, config, ranks, train, validation, spec, say)
training.recipes:recipe(name)
training.drawings.shapes:world(n, seed)
training.drawings.shape_checker:check(image, caption)
training.data.shards:make_shards(source, out)
training.data.shards:write_shards()
training.cli.main:main(argv)
""".strip().splitlines()
"""What callers rely on: module:name, and the parameters that they pass by name."""


class Import(NamedTuple):
    """One imported module."""

    importer: str
    """Module, with dots."""
    target: str
    """Module as written; for one of ours, the deepest module that it names."""
    place: str
    """file:line"""
    for_types_only: bool
    """Under `if TYPE_CHECKING:`."""


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(path) for path in sources()}


def targets_of(node: ast.Import | ast.ImportFrom, importer: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"{importer}, line {node.lineno}: imports are absolute"
    module = node.module or ""
    # `from dvae import images` imports dvae.images; `from dvae import DVAE` imports dvae
    return [f"{module}.{alias.name}" if f"{module}.{alias.name}" in OURS else module for alias in node.names]


def imports_of(tree: ast.Module, importer: str, file: str) -> Iterator[Import]:
    type_checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    in_type_checking = {id(inner) for block in type_checking for node in block.body for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets_of(node, importer):
                yield Import(importer, target, f"{file}:{node.lineno}", id(node) in in_type_checking)


@cache
def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports_of(parsed(path), module_name(path), relative(path))]


def package_of(module: str) -> str:
    return module.split(".")[0]


def room_of(module: str) -> str:
    """Return the folder that a module belongs to, as named in ROOMS."""
    package, *inner = module.split(".")
    if module in LEAVES:
        return "leaf"
    if module in PIPELINE:
        return "dalle.pipeline"
    if inner == ["__main__"]:
        return f"{package}.cli"
    is_core = len(inner) < 2 or inner[0] in ("family", "sampler")
    if package in ("storage", "dvae", "rerank", "unclip") or (package == "dalle" and is_core and module not in ROOMS):
        return package
    return ".".join([package, *inner[:1]])


def wrong_arrow(found: Import) -> str | None:
    """Why an import points the wrong way; None if it does not."""
    importer, target = found.importer, found.target
    if package_of(target) not in PACKAGES:
        return None
    if importer == FACADE:
        return None if found.for_types_only else "dalle/__init__.py imports on first use only"
    source, goal = room_of(importer), room_of(target)
    if target == FACADE and source == "dalle":
        return "dalle's own modules import each other, not the package"
    if source == goal:
        return None
    if source not in ROOMS or goal not in ROOMS:
        return f"{importer} or {target} is in no room: give it its place in ROOMS and in docs/design.md"
    return None if goal in ROOMS[source] else f"{source} may import {', '.join(sorted(ROOMS[source])) or 'nothing'}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{found.place}: {found.importer} imports {found.target}: {reason}"
        for found in all_imports()
        if (reason := wrong_arrow(found)) is not None
    ]
    assert not wrong, "imports against docs/design.md:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("dvae.model", "dalle.model"),
        ("dvae.images", "dvae.model"),
        ("storage.models.directory", "dvae.images"),
        ("training.ranks.ranks", "training.engine.engine"),
        ("training.engine.engine", "training.loop.fit"),
        ("dalle.data.reader", "training.data.manifest"),
        ("training.data.batches", "training.loop.fit"),
        ("training.report.status", "training.loop.fit"),
        ("training.recipes", "training.stages.clip"),
        ("training.stages.clip", "training.demo.demo"),
        ("rerank.model", "dvae.model"),
        ("rerank.score", "dvae"),
        ("unclip.prior", "rerank.model"),
        ("unclip.decoder", "dvae.model"),
        ("rerank.model", "unclip.conditions"),
        ("dalle.model", "unclip"),
        ("dalle.model", "dvae"),
        ("dalle.sampling", "rerank"),
        ("dalle.model", "dalle.pipeline"),
        ("dalle.sampling", "dalle"),
        ("dalle.cli.main", "training.cli.main"),
    ],
)
def test_a_wrong_arrow_is_noticed(importer: str, target: str) -> None:
    assert wrong_arrow(Import(importer, target, "file:1", False)) is not None


def test_an_import_inside_a_function_is_noticed() -> None:
    tree = ast.parse("def f():\n    from dalle import pipeline\n    import deepspeed.ops as ops")
    assert [found.target for found in imports_of(tree, "dvae.model", "f.py")] == ["dalle.pipeline", "deepspeed.ops"]


def test_every_folder_has_its_place_and_no_more_than_twelve_modules() -> None:
    rooms = {room_of(module) for module in OURS} - {"training"}
    assert rooms == set(ROOMS)
    folders = Counter(path.parent for path in sources() if path.stem not in ("__init__", "__main__"))
    crowded = [relative(folder) for folder, count in folders.items() if count > MODULES_IN_A_FOLDER]
    assert not crowded


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {module: set() for module in OURS}
    for found in all_imports():
        if found.target in OURS and not found.for_types_only:
            arrows[found.importer].add(found.target)
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_each_library_is_imported_in_its_one_place() -> None:
    wrong = [
        f"{found.place}: {library} belongs in {' and '.join(sorted(homes)) or 'no file'}"
        for found in all_imports()
        for library, homes in LIBRARY_HOMES.items()
        if f"{found.target}.".startswith(f"{library}.")
        and not any(f"{found.place.split(':')[0]}/".startswith(f"{home}/") for home in homes)
    ]
    assert not wrong, "\n".join(wrong)


def replaced_attributes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The attributes of imported libraries that a file assigns or sets, and the lines."""
    libraries = ("deepspeed", "torch")
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.startswith(libraries)
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(libraries):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                name = ast.unparse(part)
                if isinstance(part, ast.Attribute) and name.split(".")[0] in names and ".config." not in name:
                    yield name, node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            owner = ast.unparse(node.args[0])
            if owner.split(".")[0] in names:
                yield owner, node.lineno


@pytest.mark.parametrize("code", ["torch.load = f", "setattr(torch, 'load', f)", "torch.a, x = 1, 2"])
def test_a_replaced_attribute_is_noticed(code: str) -> None:
    assert list(replaced_attributes(ast.parse(f"import torch\n{code}")))


def test_attributes_of_libraries_are_replaced_in_one_file() -> None:
    found = {relative(path): list(replaced_attributes(parsed(path))) for path in sources()}
    assert found.pop("training/patches.py")
    wrong = [f"{file}:{line}: {name}" for file, assigned in found.items() for name, line in assigned]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_utils() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    found = [relative(path) for path in sources() if path.stem in names or path.parent.name in names]
    assert not found, f"{', '.join(found)}: name a module for what it holds"


def test_tests_import_no_tests() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    wrong = [
        found.place
        for path in tests
        for found in imports_of(parsed(path), path.stem, relative(path))
        if found.target.startswith("test_")
    ]
    assert not wrong, f"what tests share is in a folder support/: {', '.join(wrong)}"


def calls(path: Path) -> Iterator[tuple[ast.Call, str, str]]:
    """The calls of a file: the node, the name as written ("torch.load", "eval"), and file:line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), f"{relative(path)}:{node.lineno}"


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None if it is not given, or computed."""
    values = [item.value.value for item in call.keywords if item.arg == name and isinstance(item.value, ast.Constant)]
    return values[0] if values else None


def unsafe(call: ast.Call, name: str, file: str) -> str | None:
    """Why a call must not be there; None if it may."""
    last = name.rpartition(".")[2]
    if name == "torch.load":
        # DeepSpeed's checkpoints for resuming are torch files; everything for use is safetensors
        is_home = file == "training/patches.py" and keyword(call, "weights_only") is True
        return None if is_home else "torch.load is for training/patches.py alone, with weights_only=True"
    if name in {"eval", "exec", "compile", "__import__", "input"}:
        return f"{name} hides what a program does"
    if name in {"pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "marshal.loads", "os.system", "os.popen"}:
        return f"{name} executes what it reads"
    if name.startswith("torch.jit.") or last in {"extractall", "unpack_archive"}:
        return "it runs, or writes anywhere, what a file says: storage/checkpoints reads files of others"
    if last == "load_state_dict" and keyword(call, "strict") is False:
        return "strict=False would let a wrong checkpoint sample noise"
    if keyword(call, "allow_pickle") is True or keyword(call, "shell") is True:
        return "it executes what it is given"
    return None


def test_nothing_loads_pickles_or_runs_code_or_loads_half_a_checkpoint() -> None:
    wrong = [
        f"{place}: {reason}"
        for path in sources()
        for call, name, place in calls(path)
        if (reason := unsafe(call, name, relative(path))) is not None
    ]
    assert not wrong, "\n".join(wrong)


def pickle_uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is used of pickle, as "pickle.name" or as an import of a name, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            yield f"pickle.{node.attr}", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield from ((f"pickle.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (("pickle as", node.lineno) for alias in node.names if alias.name == "pickle" and alias.asname)


def test_only_the_restricted_reader_touches_pickles() -> None:
    allowed = {"storage/checkpoints/pickles.py": {"pickle.Unpickler"}}
    # naming the exception, which torch.load raises, reads nothing
    wrong = [
        f"{relative(path)}:{line}: {use}"
        for path in sources()
        for use, line in pickle_uses(parsed(path))
        if use not in {"pickle.UnpicklingError"} | allowed.get(relative(path), set())
    ]
    assert not wrong, "pickles execute what they hold:\n" + "\n".join(wrong)
    assert list(pickle_uses(ast.parse("from pickle import load"))) == [("pickle.load", 1)]


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "pickle.loads(data)",
        "exec(text)",
        "model.load_state_dict(state, strict=False)",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
        "archive.extractall()",
    ],
)
def test_an_unsafe_call_is_noticed(code: str) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert unsafe(call, ast.unparse(call.func), "dalle/model.py") is not None


def test_no_function_is_longer_than_150_lines() -> None:
    long = [
        f"{relative(path)}:{node.lineno}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("entry", INTERFACE)
def test_the_public_interface_is_there(entry: str) -> None:
    path, _, parameters = entry.rstrip(")").partition("(")
    module, _, names = path.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        assert hasattr(found, name), f"{path} is part of the interface, but there is no {name}"
        found = getattr(found, name)
    missing = (
        set(parameters.split(", ")) - {""} - (set(inspect.signature(found).parameters) if callable(found) else set())
    )
    assert not missing, f"{path} has no parameter {', '.join(sorted(missing))}"


@pytest.mark.parametrize("package", ["dalle", "dvae", "rerank", "unclip"])
def test_a_package_exports_two_to_five_names(package: str) -> None:
    exported = importlib.import_module(package).__all__
    assert 2 <= len(exported) <= 5
    assert all(hasattr(importlib.import_module(package), name) for name in exported)


def test_imports_cost_only_what_they_need() -> None:
    program = """
import json, sys
heavy = ["torch", "deepspeed", "webdataset", "tensorboard", "torchmetrics", "tyro", "training", "wandb", "starlette"]
loaded = {}
import dalle
loaded["dalle"] = [name for name in heavy if name in sys.modules]
import dvae, rerank
dalle.Pipeline, dalle.DALLE, dalle.Tokenizer
loaded["packages"] = [name for name in heavy if name in sys.modules]
import training.cli.train, training.cli.data, training.cli.look
loaded["dalle-train"] = [name for name in heavy if name in sys.modules]
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert loaded["dalle"] == [], "`import dalle` must cost nothing: public names are imported on first use"
    assert loaded["packages"] == ["torch"], "models and pipeline need torch and nothing else that is heavy"
    late = {"deepspeed", "webdataset", "tensorboard", "torchmetrics", "wandb"}
    assert not late & set(loaded["dalle-train"]), "imported where they are used"


def test_the_overview_of_dalle_train_needs_no_torch() -> None:
    program = "import sys, training.cli.main as m; code = m.main(['--help']); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


CONFIGURATIONS = {
    "tokenizer": (Inputs,),
    "dvae": (Inputs, TrainConfig, OptimizerConfig, DVAERecipe),
    "clip": (Inputs, TrainConfig, OptimizerConfig, CLIPRecipe),
    "transformer": (Inputs, TrainConfig, OptimizerConfig, TransformerRecipe),
    "decoder": (Inputs, TrainConfig, OptimizerConfig, DecoderRecipe),
    "prior": (Inputs, TrainConfig, OptimizerConfig, PriorRecipe),
    "upsampler": (Inputs, TrainConfig, OptimizerConfig, UpsamplerRecipe),
    "all": (Inputs, TrainConfig, OptimizerConfig, DVAERecipe, CLIPRecipe, TransformerRecipe),
    "demo": (TrainConfig, OptimizerConfig, DVAERecipe, CLIPRecipe, TransformerRecipe),
    "encode": (EncodeConfig,),
    "shards": (ShardFilter,),
}
"""What the options of a command of `dalle-train` are put into."""


def declarations(kind: type) -> Iterator[tuple[str, type]]:
    """The options of a command or a group, each with the class that declares it."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from declarations(hints[field.name])
        else:
            yield from ((field.name, owner) for owner in declaring(kind, field.name))


@pytest.mark.parametrize("verb", CONFIGURATIONS)
def test_an_option_is_declared_once_by_the_class_that_owns_it(verb: str) -> None:
    options = list(declarations((train.COMMANDS | data.COMMANDS)[verb]))
    for configuration in CONFIGURATIONS[verb]:
        hints = get_type_hints(configuration)
        for field in dataclasses.fields(configuration):
            owners = declaring(configuration, field.name)
            assert len(owners) == 1, f"{field.name} is declared in {owners}"
            # --learning-rate and --optimizer are a number and a word, which change what is a class of its own there
            if is_simple(hints[field.name]):
                others = {owner for name, owner in options if name == field.name} - {owners[0]}
                assert not others, f"--{field.name} of {verb} is declared in {owners[0]} and again in {others}"


def declaring(kind: type, name: str) -> list[type]:
    return [base for base in kind.__mro__ if name in vars(base).get("__annotations__", {})]


def is_simple(hint: Any) -> bool:
    return not any(dataclasses.is_dataclass(kind) for kind in (hint, *get_args(hint)))
