"""A bundle of tiny random models, made once: shared by the tests of everything that uses a bundle."""

import shutil
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from benchmarks.measure import PeakMemory
from dalle.model import DALLE, DALLEConfig
from dalle.pipeline import Pipeline
from dalle.tokenizer import Tokenizer
from dvae import DVAE, DVAEConfig
from rerank import CLIP, CLIPConfig, CLIPTokenizer
from storage.models.directory import directory_hash
from storage.stores import files

CAPTIONS = ["a red cube on a blue cube", "a green sphere left of a red cube", "一只猫坐在椅子上"]
# the models of the tests are so small that threads only wait for one another, badly so on a busy machine
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

IMAGE_SIZE, GRID, TEXT_LEN = 16, 4, 24


def tiny_dvae(seed: int) -> DVAE:
    config = DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=32, image_size=IMAGE_SIZE)
    dvae = DVAE(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # the initial weights give nearly equal logits, hence nearly equal tokens and pictures
        for half in (dvae.encoder, dvae.decoder):
            output_weight, _ = list(half.parameters())[-2:]
            output_weight.mul_(50)
    return dvae


def tiny_dalle(tokenizer: Tokenizer) -> DALLE:
    torch.manual_seed(1)
    dalle = DALLE(
        DALLEConfig(
            n_layers=3,
            d_model=32,
            n_heads=2,
            text_len=TEXT_LEN,
            grid=GRID,
            text_vocab=tokenizer.vocab_size,
            image_vocab=32,
            conv_kernel=3,
        )
    )
    torch.nn.init.normal_(dalle.image_head.weight, std=0.3)  # zero at first: every token equally likely
    return dalle


def tiny_clip() -> CLIP:
    tokenizer = CLIPTokenizer.train(CAPTIONS, 300)
    torch.manual_seed(2)
    config = CLIPConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        context_length=24,
        vocab_size=tokenizer.vocab_size,
        text_width=16,
        text_layers=1,
        text_heads=2,
        embed_dim=8,
    )
    return CLIP(config, tokenizer)


@pytest.fixture
def rise_of_memory() -> Callable[[Callable[[], object]], int]:
    """Runs a function, and returns the bytes by which the peak of this process's memory rose above what it held."""

    def rise(function: Callable[[], object]) -> int:
        try:
            peak = PeakMemory()
        except OSError as error:
            pytest.skip(f"the peak of a process's memory cannot be reset here: {error}")
        function()
        return peak.bytes()

    return rise


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gives a test an empty cache of stores' files, and lets it know nothing of stores yet."""
    for table in ("_remotes", "_failures", "_caches"):
        monkeypatch.setattr(files, table, {})
    monkeypatch.setattr(files, "_is_gone", False)
    monkeypatch.setattr(files, "_chosen", None)
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let what tests of odd names log reach xdist, which sends UTF-8 alone."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a bundle; not to be changed, see `bundle_copy`."""
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    path.mkdir()
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    tokenizer.save(path / "tokenizer.json")
    tiny_dvae(0).save(path / "dvae")
    metadata = {"tokenizer_hash": tokenizer.hash, "dvae_hash": directory_hash(path / "dvae")}
    tiny_dalle(tokenizer).save(path / "dalle", metadata)
    tiny_clip().save(path / "clip")
    return path


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def pipe(bundle: Path) -> Pipeline:
    """The bundle, loaded."""
    return Pipeline.load(bundle)


@pytest.fixture(scope="session")
def another_dvae() -> Callable[[Path], None]:
    """Saves a dVAE of the same sizes with other weights."""
    return lambda path: tiny_dvae(7).save(path)
