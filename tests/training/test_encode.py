import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny
from support.tiny import all_keys, write_tar

import training.cli.main
import training.ranks.job
import training.recipes
import training.stages.all
import training.stages.encode
import training.stages.transformer
from dalle.data.image_tokens import Description, Encoding, pack, read_description, unpack
from dalle.data.reader import Sample, ShardData, sample_rng
from dalle.model import DALLE
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from dvae.images import open_image, resize_and_crop, to_tensor, transformer_augmentation
from storage.models.directory import directory_hash
from training.data.batches import Share, batches
from training.ranks.ranks import join
from training.ranks.stop import Interrupted
from training.recipes import Recipe
from training.run_files import read_metrics
from training.stages.codebook import initialise_codebook
from training.stages.encode import EncodeConfig, EncodeReport, encode_shards
from training.stages.inputs import Inputs
from training.stages.transformer import TransformerStage, train_transformer

CROPS, SEED = 3, 5


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` is a recipe, and a command leaves the process group to the next one: DeepSpeed cannot join a second."""
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)


def run(*arguments: object) -> int:
    return training.cli.main.main([str(argument) for argument in arguments])


def encode(
    pictures: Path, out: Path, dvae: Path, *, options: Mapping[str, Any] | None = None, **config: Any
) -> EncodeReport:
    settings = EncodeConfig(**{"crops": CROPS, "seed": SEED, "workers": 0, **config})
    coder, name = DVAE.load(dvae), directory_hash(dvae)
    return encode_shards([pictures], out, coder, name, settings, join(), **(options or {}))


def save_dvae(folder: Path, shards: Path, seed: int) -> None:
    """Save a dVAE whose tokens differ from picture to picture."""
    pictures = tiny.open_world(shards)
    views = [resize_and_crop(open_image(pictures.read(i).image_bytes), 16) for i in range(len(pictures))]
    torch.manual_seed(seed)
    model = DVAE(tiny.recipe().dvae.model)
    initialise_codebook(model, torch.stack([to_tensor(view) for view in views]), seed=seed)
    model.save(folder)


@pytest.fixture(scope="module")
def dvae(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The directory of a dVAE; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "dvae"
    save_dvae(folder, shards, 0)
    return folder


@pytest.fixture(scope="module")
def another_dvae(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The directory of a dVAE of the same sizes with other weights; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "dvae"
    save_dvae(folder, shards, 1)
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, shards: Path, dvae: Path) -> Path:
    """The tokens of `shards`; not to be changed."""
    out = tmp_path_factory.mktemp("encoded") / "tokens"
    encode(shards, out, dvae)
    return out


@pytest.fixture
def encoded_copy(encoded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(encoded, tmp_path / "tokens")


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def change(shard: Path, edit: Callable[[dict[str, bytes]], object]) -> None:
    """Rewrite a shard with its members changed."""
    inside = members(shard)
    edit(inside)
    write_tar(shard, list(inside.items()))


# ---------------------------------------------------------------------------------------------------- encoding


def test_tokens_are_those_that_the_dvae_gives_the_same_crops(shards: Path, encoded: Path, dvae: Path) -> None:
    coder, pictures = DVAE.load(dvae), tiny.open_world(shards)
    tokens = ShardData.open([encoded], captions=True, encoded=True)
    assert tokens.encoding == Encoding(
        dvae_hash=directory_hash(dvae), image_size=16, grid=4, vocab_size=32, crops=CROPS, seed=SEED
    )
    with_other_crops = 0
    for i in range(len(pictures)):
        sample = pictures.read(i)
        picture = open_image(sample.image_bytes)
        generators = [sample_rng(SEED, crop, sample.key, "encoding") for crop in range(1, 1 + CROPS)]
        views = [resize_and_crop(picture, 16), *(transformer_augmentation(picture, 16, rng) for rng in generators)]
        expected = coder.encode(torch.stack([to_tensor(view) for view in views]))
        found = tokens.read(i).image_tokens
        assert found is not None
        assert found.tolist() == expected.tolist()
        assert len({view.tobytes() for view in views}) > 1
        with_other_crops += len({view.tobytes() for view in found}) > 1
    assert with_other_crops > len(pictures) // 2


def test_keys_captions_and_their_order_are_kept_byte_for_byte(tmp_path: Path, dvae: Path) -> None:
    picture = png(np.zeros((16, 16, 3), np.uint8))
    inside = [
        ("d.x/é b.png", picture),
        ("d.x/é b.cap", "\ufeffone\r\n\r\n two \n".encode()),
        ("d.x/é b.json", b'{ "n":1}'),
    ]
    inside += [("z.png", picture), ("z.json", b'{"captions": ["three"]}\n'), ("a.jpg", picture), ("a.txt", b"four")]
    encode(write_tar(tmp_path / "in" / "s.tar", inside), tmp_path / "out", dvae)
    made = members(tmp_path / "out" / "s.tar")
    tokens = {name: made.pop(name) for name in list(made) if name.endswith(".tokens")}
    assert list(tokens) == ["d.x/é b.tokens", "z.tokens", "a.tokens"]
    del made[".encoded.json"]
    assert made == {"d.x/é b.txt": inside[1][1], "d.x/é b.json": inside[2][1], "z.json": inside[4][1], "a.txt": b"four"}
    data = ShardData.open([tmp_path / "out"], captions=True, encoded=True)
    assert all_keys(data) == ["d.x/é b", "z", "a"]
    assert data.captions(0) == ("one", "two")


def test_the_same_pictures_make_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, shards: Path, encoded: Path, dvae: Path
) -> None:
    report = encode(shards, tmp_path / "again", dvae, workers=2)
    assert contents(tmp_path / "again") == contents(encoded)
    assert (report.n_written, report.n_samples, report.n_skipped) == (3, tiny.N_SAMPLES, 0)
    assert [path.name for path in report.shards] == [path.name for path in sorted(shards.glob("*.tar"))]


def test_views_of_a_picture_depend_on_seed_key_and_number_alone(
    tmp_path: Path, shards: Path, dvae: Path, encoded: Path
) -> None:
    encode(shards, tmp_path / "more", dvae, crops=CROPS + 1)
    encode(shards, tmp_path / "other", dvae, seed=SEED + 1)
    few, more, other = (
        ShardData.open([folder], captions=True, encoded=True)
        for folder in (encoded, tmp_path / "more", tmp_path / "other")
    )
    n_different = 0
    for i in range(len(few)):
        ours, theirs, others = (data.read(i).image_tokens for data in (few, more, other))
        assert ours is not None
        assert theirs is not None
        assert others is not None
        assert ours.tolist() == theirs[: 1 + CROPS].tolist()
        assert ours[0].tolist() == others[0].tolist()
        n_different += ours[1:].tolist() != others[1:].tolist()
    assert n_different > len(few) / 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_encoding_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, shards: Path, encoded: Path, dvae: Path, number: signal.Signals
) -> None:
    def stop(done: int, total: int) -> None:
        assert total == tiny.N_SAMPLES
        if done > 10:
            os.kill(os.getpid(), number)

    out = tmp_path / "tokens"
    with pytest.raises(
        Interrupted, match=r"1 of 3 shards are encoded in .*tokens, the same command continues from there"
    ):
        encode(shards, out, dvae, batch_size=8, options={"progress": stop})
    (first,) = sorted(out.iterdir())  # no half shard
    written_at = first.stat().st_mtime_ns
    report = encode(shards, out, dvae)
    assert contents(out) == contents(encoded)
    assert first.stat().st_mtime_ns == written_at
    assert (report.n_written, report.n_samples) == (2, 16)
    assert "2 shards of image tokens; 1 shards were there already" in str(report)


def test_what_a_killed_encoding_left_is_cleared_away_and_never_read(
    tmp_path: Path, shards: Path, encoded: Path, dvae: Path
) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    (out / ".world-000001.tar.77.partial").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no shards in the folder"):
        ShardData.open([out], captions=True, encoded=True)
    encode(shards, out, dvae)
    assert contents(out) == contents(encoded)


def test_a_full_disk_is_said_in_words_and_complete_shards_are_kept(
    tmp_path: Path, shards: Path, encoded: Path, dvae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = itertools.count()

    def fsync(_: int) -> None:
        if next(synced) == 2:  # after the first shard and its folder
            raise OSError(errno.ENOSPC, "full")

    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            OSError, match=r"cannot make .*world-000001\.tar: No space left on device; .*; the shards before"
        ):
            encode(shards, out, dvae)
    assert [path.name for path in out.iterdir()] == ["world-000000.tar"]
    encode(shards, out, dvae)
    assert contents(out) == contents(encoded)


@pytest.mark.parametrize(("changed", "told"), [({"crops": 2}, "crops 2, not 3"), ({"seed": 6}, "seed 6, not 5")])
def test_a_folder_of_other_crops_or_seed_is_refused_until_encoded_anew(
    shards: Path, encoded_copy: Path, dvae: Path, changed: dict[str, Any], told: str
) -> None:
    before = contents(encoded_copy)
    with pytest.raises(ValueError, match=rf"made differently \({told}\): give another --out.*or --fresh"):
        encode(shards, encoded_copy, dvae, **changed)
    assert contents(encoded_copy) == before
    encode(shards, encoded_copy, dvae, fresh=True, **changed)
    assert contents(encoded_copy).keys() == before.keys()
    assert contents(encoded_copy) != before


def test_a_folder_of_another_dvae_is_refused(shards: Path, encoded_copy: Path, another_dvae: Path) -> None:
    with pytest.raises(ValueError, match=rf"dvae_hash {directory_hash(another_dvae)}, not"):
        encode(shards, encoded_copy, another_dvae)


def test_a_shard_that_has_changed_since_it_was_encoded_is_noticed(
    tmp_path: Path, shards: Path, encoded_copy: Path, dvae: Path
) -> None:
    pictures = shutil.copytree(shards, tmp_path / "pictures")

    def reword(inside: dict[str, bytes]) -> None:
        inside[next(name for name in inside if name.endswith(".txt"))] = b"another caption"

    change(pictures / "world-000001.tar", reword)
    with pytest.raises(ValueError, match=r"world-000001\.tar was made of another shard than .*--fresh"):
        encode(pictures, encoded_copy, dvae)
    encode(pictures, encoded_copy, dvae, fresh=True)
    assert "another caption" in " ".join(ShardData.open([encoded_copy], captions=True, encoded=True).captions(8))


@pytest.mark.parametrize("fresh", [False, True])
def test_pictures_are_never_written_over(tmp_path: Path, shards: Path, dvae: Path, fresh: bool) -> None:
    pictures = shutil.copytree(shards, tmp_path / "pictures")
    with pytest.raises(
        ValueError, match=r"world-000000\.tar is no shard of image tokens: give --out a folder of its own"
    ):
        encode(pictures, pictures, dvae, fresh=fresh)
    assert contents(pictures) == contents(shards)


def test_fresh_leaves_the_tokens_of_other_pictures_alone(
    tmp_path: Path, encoded_copy: Path, dvae: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = tiny.write_world(tmp_path / "more", 4, seed=1)
    (more / "world-000000.tar").rename(more / "more.tar")
    encode(more, encoded_copy, dvae, fresh=True)
    assert len(contents(encoded_copy)) == 4
    assert "holds 3 shards of other pictures too" in caplog.text
    with pytest.raises(ValueError, match="or delete it"):
        encode(more, encoded_copy, dvae, crops=1, fresh=True)


def test_two_shards_of_one_name_are_refused(tmp_path: Path, shards: Path, dvae: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(shards, tmp_path / "in" / name)
    with pytest.raises(ValueError, match=r"would both become .*world-000000\.tar: rename one, or encode them into two"):
        encode(tmp_path / "in", tmp_path / "out", dvae)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_unusable_pictures_are_skipped_named_counted_and_bounded(
    tmp_path: Path, dvae: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = png(np.full((20, 16, 3), 99, np.uint8))
    inside = [(f"{n}.{field}", data) for n in range(10) for field, data in (("png", good), ("txt", b"a"))]
    inside[6] = ("3.png", b"BROKEN")
    pictures = write_tar(tmp_path / "in" / "s.tar", inside)
    write_tar(tmp_path / "in" / "t.tar", [("x.png", b"BROKEN"), ("x.txt", b"b")])
    with caplog.at_level(logging.WARNING):
        report = encode(tmp_path / "in", tmp_path / "out", dvae, max_bad_fraction=0.2)
    assert (report.n_written, report.n_samples, report.n_skipped) == (1, 9, 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.tar"]
    assert "unusable sample 3" in caplog.text
    assert "t.tar has no usable picture: it is left out" in caplog.text
    again = encode(tmp_path / "in", tmp_path / "out", dvae, max_bad_fraction=0.2)
    assert (again.n_written, again.shards) == (0, report.shards)
    with pytest.raises(ValueError, match=r"1 unusable samples after reading .* of 10.*--max-bad-fraction 0\.05"):
        encode(pictures, tmp_path / "strict", dvae, max_bad_fraction=0.05)
    with pytest.raises(ValueError, match="all 1 pictures are unusable"):
        encode(tmp_path / "in" / "t.tar", tmp_path / "none", dvae, max_bad_fraction=1.0)


def test_the_whole_samples_of_a_truncated_shard_can_be_encoded(tmp_path: Path, shards: Path, dvae: Path) -> None:
    whole = (shards / "world-000000.tar").read_bytes()
    cut = tmp_path / "in" / "cut.tar"
    cut.parent.mkdir()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"truncated.*--skip-damaged-shards"):
        encode(cut, tmp_path / "out", dvae)
    report = encode(cut, tmp_path / "out", dvae, skip_damaged_shards=True)
    assert 0 < report.n_samples < 8


@pytest.mark.parametrize(
    "wrong", [{"crops": -1}, {"seed": -1}, {"batch_size": 0}, {"workers": -1}, {"max_bad_fraction": 2.0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EncodeConfig(**wrong)


# ------------------------------------------------------------------------------------------------ what is read


ENCODING = Encoding(dvae_hash="0" * 16, image_size=8, grid=2, vocab_size=10, crops=1, seed=0)
TOKENS = np.arange(8).reshape(2, 2, 2)


def with_checksum(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "little")


@pytest.mark.parametrize("vocab_size", [10, 1 << 16, (1 << 16) + 1])
def test_tokens_come_back_as_they_were_in_the_fewest_bytes(vocab_size: int) -> None:
    encoding = dataclasses.replace(ENCODING, vocab_size=vocab_size)
    largest = np.where(TOKENS == 7, vocab_size - 1, TOKENS)
    member = pack(largest, encoding)
    assert len(member) == encoding.n_bytes == (2 if vocab_size <= 1 << 16 else 4) * 8 + 4
    assert unpack(member, encoding).tolist() == largest.tolist()


NPY = io.BytesIO()
np.save(NPY, np.array([print], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (b"", "0 bytes of image tokens, expected 20"),
        (pack(TOKENS, ENCODING)[:-1], "19 bytes of image tokens, expected 20 for 2 views of 2×2"),
        (pack(TOKENS, ENCODING)[:7] + b"\1" + pack(TOKENS, ENCODING)[8:], "damaged"),
        (b"\0" * 19 + b"\1", "damaged"),
        (with_checksum(TOKENS.astype("<u2").tobytes().replace(b"\7", b"\12")), r"up to 10, expected 0 … 9"),
        (pickle.dumps(print), "bytes of image tokens"),
        (NPY.getvalue(), "bytes of image tokens"),
    ],
    ids=["empty", "truncated", "changed", "zeros", "out of range", "pickle", "pickle in npy"],
)
def test_tokens_that_were_cut_or_changed_are_refused_and_nothing_is_unpickled(
    member: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))
    with pytest.raises(ValueError, match=told):
        unpack(member, ENCODING)


def test_a_damaged_sample_is_unusable_and_names_its_member(encoded_copy: Path) -> None:
    shard = encoded_copy / "world-000000.tar"
    name = next(name for name in members(shard) if name.endswith(".tokens"))
    for damage in (lambda data: data[:-9], lambda data: data + b"more"):
        change(shard, lambda inside, damage=damage: inside.update({name: damage(inside[name])}))  # type: ignore[misc]
        with pytest.raises(ValueError, match=rf"world-000000\.tar: {name}: .*expected"):
            ShardData.open([shard], captions=True, encoded=True).read(0)


def test_hostile_members_are_ignored_and_counted(encoded_copy: Path) -> None:
    shard = encoded_copy / "world-000000.tar"
    inside = members(shard)
    link = tarfile.TarInfo("link.tokens")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hostile = [("../../up.tokens", b"1"), ("../../up.txt", b"1"), ("/abs.tokens", b"1")]
    write_tar(shard, [*inside.items(), *hostile, link])
    data = ShardData.open([shard], captions=True, encoded=True)
    assert len(data) == 8
    assert data.report.n_ignored_members == 4
    link = tarfile.TarInfo(".encoded.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(shard, [link, *list(inside.items())[1:]])
    assert read_description(shard) is None
    with pytest.raises(ValueError, match="has no pictures"):
        ShardData.open([shard], captions=True, encoded=True)


@pytest.mark.parametrize(
    ("change_it", "told"),
    [
        (lambda record: b"{", r"its \.encoded\.json is damaged"),
        (lambda record: b"[1]", r"its \.encoded\.json is damaged"),
        (
            lambda record: json.dumps({**record, "format": 2}).encode(),
            r"is of format 2, and this version reads 1: update",
        ),
        (lambda record: json.dumps({**record, "more": "x"}).encode(), "more"),
        (lambda record: json.dumps({**record, "source": 1}).encode(), "source"),
        (
            lambda record: json.dumps({**record, "encoding": {**record["encoding"], "grid": -4}}).encode(),
            "grid must be",
        ),
        (
            lambda record: json.dumps({**record, "encoding": {**record["encoding"], "grid": "4"}}).encode(),
            "grid must be",
        ),
        (lambda record: json.dumps({**record, "encoding": {}}).encode(), "dvae_hash"),
    ],
)
def test_a_damaged_description_is_refused(encoded_copy: Path, change_it: Callable[[Any], bytes], told: str) -> None:
    shard = encoded_copy / "world-000001.tar"
    change(shard, lambda inside: inside.update({".encoded.json": change_it(json.loads(inside[".encoded.json"]))}))
    with pytest.raises(ValueError, match=rf"world-000001\.tar.*{told}"):
        ShardData.open([encoded_copy], captions=True, encoded=True)


def test_a_description_says_of_what_a_shard_was_made(encoded: Path, shards: Path) -> None:
    description = read_description(encoded / "world-000002.tar")
    fingerprint = tiny.open_world(shards).fingerprint(2)
    assert description is not None
    assert (description.source, description.source_fingerprint) == ("world-000002.tar", fingerprint)
    assert Description.from_json(description.to_json(), Path("x")) == description
    assert read_description(shards / "world-000002.tar") is None
    assert len({tiny.open_world(shards).fingerprint(n) for n in range(3)}) == 3


def test_shards_of_pictures_and_of_tokens_are_not_mixed(shards: Path, encoded: Path) -> None:
    for first, second in ((shards, encoded), (encoded, shards)):
        with pytest.raises(
            ValueError, match=r"tokens/world.* holds image tokens and .*world.* pictures: give shards of one"
        ):
            ShardData.open([first, second / "world-000001.tar"], captions=True, encoded=True)


def test_tokens_that_were_made_differently_are_not_mixed(
    tmp_path: Path, shards: Path, encoded: Path, dvae: Path
) -> None:
    encode(shards, tmp_path / "other", dvae, crops=1)
    with pytest.raises(ValueError, match=r"other/world.* holds other image tokens than .*\(crops 1, not 3\)"):
        ShardData.open([encoded, tmp_path / "other"], captions=True, encoded=True)


def test_tokens_are_refused_where_pictures_are_needed(encoded: Path) -> None:
    with pytest.raises(ValueError, match=r"holds image tokens, and pictures are needed here.*\(world-000000\.tar, …\)"):
        ShardData.open([encoded], captions=False)


def test_a_shard_of_tokens_without_tokens_is_named(encoded_copy: Path) -> None:
    def without_tokens(inside: dict[str, bytes]) -> None:
        for name in [name for name in inside if name.endswith(".tokens")]:
            del inside[name]

    change(encoded_copy / "world-000000.tar", without_tokens)
    with pytest.raises(ValueError, match=r"world-000000\.tar has no image tokens: expected KEY\.tokens"):
        ShardData.open([encoded_copy], captions=True, encoded=True)


# ---------------------------------------------------------------------------------------------------- training


def write_identical_crops(folder: Path, n: int = 12) -> Path:
    """Write pictures of the size that the dVAE takes, of which every crop is the whole, with one caption each."""
    rng = np.random.default_rng(0)
    inside = []
    for number in range(n):
        blocks = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        inside += [(f"{number}.png", png(blocks)), (f"{number}.txt", f"picture {number}".encode())]
    write_tar(folder / "same.tar", inside)
    return folder


@pytest.fixture
def out(tmp_path: Path, bundle: Path, dvae: Path) -> Path:
    """A bundle's directory with a tokenizer and a dVAE."""
    folder = tmp_path / "bundle"
    shutil.copytree(dvae, folder / "dvae")
    shutil.copy(bundle / "tokenizer.json", folder)
    return folder


def train(inputs: Inputs, recipe: Recipe | None = None) -> list[dict[str, Any]]:
    """Train the transformer, and return its metrics without the times."""
    train_transformer(recipe or tiny.recipe(), inputs, join(), lambda line: None)
    lines = read_metrics(inputs.run_directory("transformer"))
    return [{name: line.get(name) for name in ("step", "split", "loss", "image_loss", "text_loss")} for line in lines]


@pytest.mark.slow
def test_training_on_tokens_is_training_on_the_crops_they_are_of(tmp_path: Path, out: Path) -> None:
    pictures = write_identical_crops(tmp_path / "pictures")
    encode(pictures, tmp_path / "tokens", out / "dvae")
    encode(pictures, tmp_path / "centre", out / "dvae", crops=0)
    transformer = dataclasses.replace(tiny.recipe().transformer, bpe_dropout=0.0)
    recipe = dataclasses.replace(tiny.recipe(), transformer=transformer)
    other = shutil.copytree(out, tmp_path / "other")
    in_the_loop = train(Inputs(data=[pictures], validation=[pictures], out=out), recipe)
    before = train(Inputs(data=[tmp_path / "tokens"], validation=[tmp_path / "centre"], out=other), recipe)
    assert before == in_the_loop
    assert [line["split"] for line in before] == ["train"] * 4 + ["validation"]
    assert directory_hash(out / "dalle") == directory_hash(other / "dalle")
    assert DALLE.load(other / "dalle").metadata == DALLE.load(out / "dalle").metadata


def test_training_on_tokens_opens_no_picture_and_does_not_run_the_encoder(
    out: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DVAE, "encode", lambda *_: pytest.fail("the dVAE was run"))
    monkeypatch.setattr(training.stages.transformer, "open_image", lambda *_: pytest.fail("a picture was opened"))
    lines = train(Inputs(data=[encoded], validation=[encoded], out=out))
    assert len(lines) == 5
    assert (out / "training" / "transformer" / "samples" / "step00000004.png").is_file()


@pytest.mark.slow
def test_validation_pictures_may_go_with_training_tokens(out: Path, shards: Path, encoded: Path) -> None:
    other = shutil.copytree(out, out.parent / "other")
    mixed, tokens = (
        train(Inputs(data=[encoded], validation=[validation], out=folder))
        for validation, folder in ((shards, out), (encoded, other))
    )
    assert mixed == tokens


@pytest.fixture
def stage(out: Path) -> TransformerStage:
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    recipe = tiny.recipe().transformer
    model = DALLE(dataclasses.replace(recipe.model, text_vocab=tokenizer.vocab_size))
    return TransformerStage(recipe, model, tokenizer, DVAE.load(out / "dvae"), out / "dalle", [], {})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_sees_the_same_tokens(encoded: Path, stage: TransformerStage, workers: int) -> None:
    data = ShardData.open([encoded], captions=True, encoded=True)
    alone, ahead = (
        list(batches(data, stage.transform, Share(seed=3, micro_batch=5, max_steps=8), workers=n)) for n in (0, workers)
    )
    for ours, theirs in zip(alone, ahead, strict=True):
        assert ours.keys == theirs.keys
        assert ours.tensors.keys() == {"text", "image_tokens", "n_cut"}
        assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


def numbered(number: int, n_views: int) -> Sample:
    """A sample whose tokens say which view they are of."""
    views = np.arange(n_views, dtype=np.uint16)[:, None, None].repeat(4, axis=1).repeat(4, axis=2)
    return Sample(key=f"{number}", image_bytes=b"", captions=("a red cube",), image_tokens=views)


def test_every_epoch_takes_one_of_the_random_crops_and_validation_the_centre(stage: TransformerStage) -> None:
    def crop(number: int, epoch: int) -> int:
        rng = sample_rng(0, epoch, f"{number}", "training")
        tokens = stage.transform(numbered(number, 4), rng)["image_tokens"]
        assert tokens.shape == (16,)
        assert tokens.dtype == torch.int64
        assert tokens.min() == tokens.max()
        return int(tokens[0])

    taken = {(number, epoch): crop(number, epoch) for number in range(20) for epoch in range(6)}
    assert set(taken.values()) == {1, 2, 3}
    assert all(len({taken[number, epoch] for epoch in range(6)}) > 1 for number in range(20))
    assert taken == {place: crop(*place) for place in taken}
    centre = stage.transform_for_validation(numbered(0, 4), np.random.default_rng(0))["image_tokens"]
    assert centre.tolist() == [0] * 16


def test_a_run_on_tokens_in_two_parts_is_the_same_bit_for_bit(tmp_path: Path, out: Path, encoded: Path) -> None:
    whole = shutil.copytree(out, tmp_path / "whole")
    train(Inputs(data=[encoded], out=whole))
    train(Inputs(data=[encoded], out=out), tiny.recipe(steps=2))
    train(Inputs(data=[encoded], out=out))
    assert directory_hash(out / "dalle") == directory_hash(whole / "dalle")


def test_tokens_of_another_dvae_are_refused_before_training(out: Path, encoded: Path, another_dvae: Path) -> None:
    shutil.copytree(another_dvae, out / "dvae", dirs_exist_ok=True)
    for inputs in (Inputs(data=[encoded], out=out), Inputs(data=[encoded], validation=[encoded], out=out)):
        with pytest.raises(
            ValueError, match=r"holds image tokens of another dVAE than .*\(dvae_hash .*\): encode the pict"
        ):
            train(inputs)
    assert not (out / "training").exists()


@pytest.mark.parametrize(("name", "value"), [("grid", 8), ("vocab_size", 64), ("image_size", 32)])
def test_tokens_of_another_grid_or_vocabulary_are_refused(out: Path, encoded_copy: Path, name: str, value: int) -> None:
    def claim(inside: dict[str, bytes]) -> None:
        record = json.loads(inside[".encoded.json"])
        record["encoding"][name] = value
        inside[".encoded.json"] = json.dumps(record).encode()

    for shard in encoded_copy.iterdir():
        change(shard, claim)
    with pytest.raises(ValueError, match=rf"another dVAE than .*\({name} {value}, not \d+\)"):
        train(Inputs(data=[encoded_copy], out=out))


def test_centre_crops_alone_are_not_trained_on(tmp_path: Path, out: Path, shards: Path) -> None:
    encode(shards, tmp_path / "centre", out / "dvae", crops=0)
    with pytest.raises(ValueError, match=r"centre crops only, which are for validation: .*--crops 1 or more"):
        train(Inputs(data=[tmp_path / "centre"], out=out))


def test_damaged_tokens_are_counted_while_training_and_too_many_stop_it(out: Path, encoded_copy: Path) -> None:
    names = [name for name in members(encoded_copy / "world-000000.tar") if name.endswith(".tokens")]
    change(encoded_copy / "world-000000.tar", lambda inside: inside.update(dict.fromkeys(names[:2], b"cut")))
    with pytest.raises(
        ValueError, match=r"unusable samples after reading.*world-000000\.tar \(\d\).*3 bytes of image tok"
    ):
        train(Inputs(data=[encoded_copy], out=out), tiny.recipe(steps=8))
    recipe = tiny.recipe(steps=8, max_bad_fraction=0.1)
    train(Inputs(data=[encoded_copy], out=out, fresh=True), recipe)
    lines = read_metrics(out / "training" / "transformer")
    assert lines[-1]["bad_samples"] >= 2


# ------------------------------------------------------------------------------------------------ command lines


def test_pictures_are_encoded_and_trained_on_from_the_command_line(
    out: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = out.parent / "tokens"
    command = ["encode", "--data", shards, "--dvae", out / "dvae", "--out", tokens, "--crops", 2, "--workers", 0]
    assert run(*command, "--device", "cpu") == 0
    assert "encoded 24 pictures, 2 random crops and the centre crop of each, into 3 shards" in capsys.readouterr().err
    assert run(*command) == 0
    assert "encoded 0 pictures" in capsys.readouterr().err
    assert run(*command, "--seed", 1) == 1
    assert "(seed 1, not 0)" in capsys.readouterr().err
    assert run("transformer", "tiny", "--data", tokens, "--validation", tokens, "--out", out) == 0
    assert DALLE.load(out / "dalle").metadata["dvae_hash"] == directory_hash(out / "dvae")
    assert run("tokenizer", "tiny", "--data", tokens, "--out", out.parent / "fromtokens") == 0
    capsys.readouterr()
    for stage in ("dvae", "clip"):
        assert run(stage, "tiny", "--data", tokens, "--out", out.parent / "other") == 1
        assert "pictures are needed here" in capsys.readouterr().err


@pytest.mark.slow
def test_all_stages_train_with_pictures_encoded_once(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Inputs] = []
    original = training.stages.all.train_transformer

    def record(recipe: Recipe, inputs: Inputs, *rest: Any) -> Path:
        trained.append(inputs)
        return original(recipe, inputs, *rest)

    monkeypatch.setattr(training.stages.all, "train_transformer", record)
    command = ["all", "tiny", "--data", shards, "--validation", shards, "--out", tmp_path]
    command += ["--one-at-a-time", "--encode-crops"]
    assert run(*command, 0) == 1
    assert "--encode-crops must be at least 1" in capsys.readouterr().err
    assert run(*command, 2) == 0
    (inputs,) = trained
    assert list(inputs.data) == sorted((tmp_path / "encoded" / "train").iterdir())
    assert list(inputs.validation) == sorted((tmp_path / "encoded" / "validation").iterdir())
    for part, crops in ((inputs.data, 2), (inputs.validation, 0)):
        encoding = ShardData.open(part, captions=True, encoded=True).encoding
        assert encoding is not None
        assert encoding.crops == crops
    assert (tmp_path / "evaluation.json").is_file()
    assert run(*command, 2) == 0  # all is there

    def interrupted(*_: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training.stages.all, "train_clip", interrupted)
        assert run(*command, 2, "--fresh") == 0
    assert not (tmp_path / "encoded").exists(), "the tokens are of the dVAE of before"
    assert run(*command, 2, "--fresh") == 0


def test_an_interrupted_encoding_ends_with_0(
    out: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = itertools.count()

    def interrupted(*arguments: Any) -> bytes:
        if next(packed) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return pack(*arguments)

    command = ["encode", "--data", shards, "--dvae", out / "dvae", "--out", out.parent / "tokens", "--workers", 1]
    with monkeypatch.context() as patch:
        patch.setattr(training.stages.encode, "pack", interrupted)
        assert run(*command) == 0
    assert "0 of 3 shards are encoded" in capsys.readouterr().err
    assert run(*command) == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--crops", -1], "crops must be at least 0"),
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--max-bad-fraction", 2], "max_bad_fraction must be in"),
        (["--device", "gpu7"], "no device 'gpu7'"),
        (["--dvae", "none"], "no dvae in none"),
        (["--data", "none"], "no shard none"),
    ],
)
def test_wrong_options_end_in_one_line(
    out: Path, shards: Path, wrong: Sequence[object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = wrong
    given = {"--data": shards, "--dvae": out / "dvae", "--out": out.parent / "tokens", option: value}
    assert run("encode", *itertools.chain.from_iterable(given.items())) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert not (out.parent / "tokens").exists()
