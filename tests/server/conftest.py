from collections.abc import Iterator

import pytest
from servers.images import LiveServer, running

from dalle.pipeline import Pipeline


@pytest.fixture(scope="session")
def server(pipe: Pipeline) -> Iterator[LiveServer]:
    """A server of the tiny bundle; not to be ended."""
    with running(LiveServer(lambda: pipe, models=("tiny", "dall-e-2"), created=1_700_000_000)) as live:
        yield live
