import os
from pathlib import Path

import pytest
from support import tiny

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, also by the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards of the built-in world, 24 captioned pictures; not to be changed."""
    return tiny.write_world(tmp_path_factory.mktemp("world"))
