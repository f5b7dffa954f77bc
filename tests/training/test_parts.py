"""A model of which each rank holds a part: its values, its averages, its export and its samples are the whole one's."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import forge_digests
from support.engines import Objective, averages_of, config, engine_of, train, transformer_objective
from support.ranks import on_ranks
from torch import Tensor, nn

from dalle.model import DALLE, DALLEConfig
from dalle.sampling import Sampling, sample
from dalle.stream import start_id
from storage.models.directory import save_directory
from training.config import TrainConfig
from training.engine.checkpoints import read_manifest, write_manifest
from training.engine.parts import spread as spreading
from training.engine.parts.averages import WeightsInParts
from training.engine.parts.buffers import buffer_sizes
from training.engine.parts.cutting import bounds, part_of
from training.engine.parts.drawing import drawn_in_parts, hand_over, made_whole
from training.engine.parts.spread import owner_of, spread
from training.ranks.ranks import Ranks, join

CONFIG = DALLEConfig(
    n_layers=3, d_model=32, n_heads=2, text_len=6, grid=4, text_vocab=37, image_vocab=29, conv_kernel=3
)
CODEBOOK = torch.randn(29, 7, generator=torch.Generator().manual_seed(3))
WEIGHTS = {"a": torch.arange(10.0).view(5, 2), "b": torch.tensor(3.0), "c": torch.arange(3.0)}


def whole_model(scale: float = 1.0, *, from_codebook: bool = False) -> DALLE:
    torch.manual_seed(5)
    model = DALLE(CONFIG)
    if scale != 1:
        model.initialise(scale=scale)
    if from_codebook:
        model.initialise_from_codebook(CODEBOOK)
    return model


def model_in_parts(ranks: Ranks, scale: float = 1.0, *, from_codebook: bool = False) -> DALLE:
    torch.manual_seed(5)
    with drawn_in_parts(ranks):
        model = DALLE(CONFIG)
        if scale != 1:
            model.initialise(scale=scale)
    if from_codebook:
        with made_whole((model.image_embedding, model.image_head), ranks):
            model.initialise_from_codebook(CODEBOOK)
    return model


def parts_of(ranks: Ranks, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: part_of(weight, ranks) for name, weight in weights}


def weights_in_parts(ranks: Ranks, weights: dict[str, Tensor]) -> WeightsInParts:
    shapes = {name: weight.shape for name, weight in weights.items()}
    return WeightsInParts(parts_of(ranks, weights.items()), shapes, ranks)


def lists(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """What tensors hold, to be returned by a process that ends."""
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def tokens_of_step(step: int, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(CONFIG.text_vocab, (n, CONFIG.text_len), generator=generator)
    text[:, 0] = start_id(CONFIG.text_vocab)
    image_tokens = torch.randint(CONFIG.image_vocab, (n, CONFIG.grid**2), generator=generator)
    return {"text": text, "image_tokens": image_tokens, "n_cut": torch.zeros(n)}


# ------------------------------------------------------------------------------------------------ cutting


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_cover_a_tensor_once_in_the_order_of_the_ranks(size: int) -> None:
    for numel in (1, 5, 6, 12):
        ranks = [dataclasses.replace(join(), rank=rank, size=size) for rank in range(size)]
        covered = [index for one in ranks for index in range(*bounds(numel, one))]
        assert covered == list(range(numel))


# ------------------------------------------------------------------------------------------------ first weights


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("size", [1, 3])
def test_drawn_in_parts_a_model_has_the_values_that_it_has_whole(scale: float, size: int) -> None:
    model = whole_model(scale)
    follows = torch.rand(2)
    for rank in range(size):
        ranks = dataclasses.replace(join(), rank=rank, size=size)
        drawn = model_in_parts(ranks, scale)
        assert torch.equal(torch.rand(2), follows), "the generator goes on as after a whole model"
        for (name, whole), (_, meta) in zip(model.named_parameters(), drawn.named_parameters(), strict=True):
            assert meta.is_meta
            assert meta.shape == whole.shape
            assert torch.equal(meta.drawn_part, part_of(whole, ranks)), name


def values_handed_over(ranks: Ranks, dtype: torch.dtype) -> dict[str, list[float]]:
    model, taken = model_in_parts(ranks, from_codebook=True), dict[int, Tensor]()

    def take(parameter: nn.Parameter) -> None:
        taken[id(parameter)] = parameter.detach().clone()

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    hand_over(model.parameters(), dtype, take, ranks)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == list(taken)
    return lists({name: taken[id(parameter)] for name, parameter in model.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_are_handed_over_one_by_one_also_after_the_codebook(tmp_path: Path, dtype: torch.dtype) -> None:
    model = whole_model(from_codebook=True)
    for found in on_ranks(tmp_path, values_handed_over, dtype, n_ranks=3):
        assert found == lists({name: weight.to(dtype) for name, weight in model.named_parameters()})


def test_a_fill_of_a_part_of_a_parameter_is_refused_rather_than_lost() -> None:
    with drawn_in_parts(join()), pytest.raises(TypeError, match="only a whole parameter"):
        nn.Embedding(4, 2, padding_idx=0)


# ------------------------------------------------------------------------------------------------ training


def life(
    ranks: Ranks, folder: Path, settings: TrainConfig, *, in_parts: bool
) -> tuple[list[float], dict[str, list[float]]]:
    """Train, save, and return the losses and the averages, and export them."""
    model = model_in_parts(ranks) if in_parts else whole_model()
    like = {name: torch.empty_like(weight, device="meta") for name, weight in model.state_dict().items()}
    engine = engine_of(transformer_objective(model), settings, ranks)
    assert all(weight.ds_tensor.numel() < weight.ds_numel for weight in engine.model.parameters()) or ranks.size == 1
    engine.train()
    size = 4 // ranks.size
    losses = []
    for step in range(3):
        mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
        batch = {name: tensor[mine] for name, tensor in tokens_of_step(step, 4).items()}
        losses.append(engine.step([batch], 1e-2, step)["loss"].item())
    engine.save(folder, 3, {})
    directory = folder / "model"
    engine.averages.use(lambda weights: save_directory(directory, "dalle", CONFIG, weights, like=like))
    return losses, lists(averages_of(engine))


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_drawn_in_parts_trains_as_one_that_every_rank_had(tmp_path: Path, precision: str, n_ranks: int) -> None:
    settings = config(zero_stage=3, precision=precision, ema_decay=0.7)
    whole, parts = (
        on_ranks(tmp_path, partial(life, in_parts=in_parts), tmp_path / f"{in_parts}", settings, n_ranks=n_ranks)
        for in_parts in (False, True)
    )
    assert not isinstance(parts[0], str), parts
    assert whole == parts
    files = [tmp_path / f"{in_parts}" / "model" / "model.safetensors" for in_parts in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lists(load_file(files[1])) == parts[0][1]


def test_stage_3_holds_a_small_part_of_a_model_gathered() -> None:
    shapes = [(100, 1000)] * 64 + [(1000,)]
    small, huge = buffer_sizes(3, shapes), buffer_sizes(3, [(4000, 16000)] * 200)
    assert small["stage3_max_reuse_distance"] == small["stage3_max_live_parameters"] == 6_401_000 // 16
    assert small["stage3_prefetch_bucket_size"] == small["reduce_bucket_size"] == 6_401_000 // 16
    assert huge["stage3_prefetch_bucket_size"] == 50_000_000
    assert huge["reduce_bucket_size"] == 500_000_000
    assert buffer_sizes(2, shapes) == {"reduce_bucket_size": 6_401_000}


# ------------------------------------------------------------------------------------------------ checkpoints


def save_averages(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    engine = engine_of(Objective(), config(zero_stage=3, ema_decay=0.7), ranks)
    engine.train()
    train(engine, range(2))
    engine.save(folder, 2, {})
    return lists(averages_of(engine))


def load_averages(ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    engine = engine_of(Objective(seed=1), config(zero_stage=3), ranks)
    engine.load(folder)
    return lists(averages_of(engine))


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        (2, 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 2), (2, 2), (2, 4), (4, 2)]),
    ],
)
def test_averages_in_parts_are_read_by_any_number_of_ranks(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    saved = on_ranks(tmp_path, save_averages, tmp_path / "c", n_ranks=saved_by)[0]
    assert isinstance(saved, dict), saved
    assert on_ranks(tmp_path, load_averages, tmp_path / "c", n_ranks=loaded_by)[0] == saved


@pytest.mark.slow
@pytest.mark.parametrize("loaded_by", [2, 1])
def test_averages_that_the_first_rank_once_saved_whole_are_read_in_parts(tmp_path: Path, loaded_by: int) -> None:
    saved = on_ranks(tmp_path, save_averages, tmp_path / "c")[0]
    folder = tmp_path / "c" / "step00000002"
    manifest = read_manifest(folder)
    for rank in range(2):
        name = f"ema_{rank:05d}.safetensors"
        (folder / name).unlink()
        del manifest["files"][name]
    shapes = {name: weight.shape for name, weight in Objective().model.named_parameters()}
    whole = {name: torch.tensor(values).view(shapes[name]) for name, values in saved.items()}
    save_file(whole, folder / "ema.safetensors")
    manifest["files"]["ema.safetensors"] = {"bytes": 0, "blake2b": ""}
    write_manifest(folder, manifest)
    forge_digests(folder)
    assert on_ranks(tmp_path, load_averages, tmp_path / "c", n_ranks=loaded_by)[0] == saved


# ------------------------------------------------------------------------------------------------ reading


def read(ranks: Ranks, names: list[str]) -> list[list[float]]:
    weights, found = weights_in_parts(ranks, WEIGHTS), list[list[float]]()
    if ranks.is_first:
        weights.lent_to(lambda lent: found.extend(lent[name].tolist() for name in names))
    else:
        weights.serve(lambda _: None)
    return found


def test_the_first_rank_reads_any_weights_in_any_order_and_the_others_none(tmp_path: Path) -> None:
    names = ["c", "a", "b", "a"]
    first, *others = on_ranks(tmp_path, read, names, n_ranks=3)
    assert first == [WEIGHTS[name].tolist() for name in names]
    assert others == [[], []]


def use_and_fail(ranks: Ranks) -> str:
    engine = engine_of(Objective(), config(zero_stage=3), ranks)

    def fail(weights: object) -> None:
        raise ValueError(f"the disk is full after {len(next(iter(weights.values())))} rows")  # type: ignore[attr-defined]

    try:
        engine.averages.use(fail)
    except (ValueError, OSError) as error:
        told = str(error)
    averages_of(engine)
    return told


def test_an_error_of_the_first_rank_while_it_reads_reaches_all(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, use_and_fail)
    assert first == "the disk is full after 8 rows"
    assert "the first rank failed" in second


# ------------------------------------------------------------------------------------------------ sampling


def test_layers_are_shared_out_evenly_and_the_first_rank_has_the_first() -> None:
    assert [owner_of(layer, 6, 4) for layer in range(6)] == [0, 0, 1, 2, 2, 3]
    assert [owner_of(layer, 2, 4) for layer in range(2)] == [0, 2]


TEXT = tokens_of_step(0, 2)["text"]


def sampled(model: DALLE, guidance: float) -> list[list[list[int]]]:
    tokens: list[list[list[int]]] = sample(
        model, TEXT, [1, 2, 3, 4], Sampling(guidance=guidance, top_k=20)
    ).tokens.tolist()
    return tokens


def sample_together(ranks: Ranks, guidance: float) -> tuple[list[list[list[int]]], int]:
    """Return the tokens, and the numbers of this rank's layers."""
    model = whole_model()
    for parameter in model.parameters():  # so that tokens depend on what the layers do
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    weights = weights_in_parts(ranks, dict(model.named_parameters()))
    if ranks.size == 1:
        return sampled(model, guidance), 0
    shared = spread(CONFIG, weights, 2 * len(TEXT))
    return sampled(shared, guidance), sum(parameter.numel() for parameter in shared.blocks.parameters())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_layers_spread_over_ranks_draw_the_tokens_of_the_whole_model(tmp_path: Path, guidance: float) -> None:
    (expected, _), *_ = on_ranks(tmp_path, sample_together, guidance, n_ranks=1)
    found = on_ranks(tmp_path, sample_together, guidance, n_ranks=2)
    assert not isinstance(found[0], str), found
    assert len(torch.tensor(expected).unique()) > 5
    assert found[0][0] == expected
    in_layers = sum(parameter.numel() for parameter in whole_model().blocks.parameters())
    assert found[0][1] + found[1][1] == in_layers
    assert max(found[0][1], found[1][1]) < in_layers


def spread_without_room(ranks: Ranks, free: float, n_rows: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spreading, "_free_bytes", lambda _: free if ranks.rank else torch.inf)
        try:
            spread(CONFIG, weights_in_parts(ranks, dict(whole_model().named_parameters())), n_rows)
        except torch.OutOfMemoryError as error:
            return str(error)
    return "spread"


@pytest.mark.parametrize(("free", "n_rows"), [(1e3, 1), (1e6, 1000)])
def test_where_one_rank_has_no_room_for_weights_or_sampling_none_samples(
    tmp_path: Path, free: float, n_rows: int
) -> None:
    found = on_ranks(tmp_path, spread_without_room, free, n_rows)
    assert found == ["a rank has no room for its share of the layers"] * 2
