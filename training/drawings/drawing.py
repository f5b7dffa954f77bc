"""The built-in world as samples of shards, drawn by any number of processes: the same samples in one order.

It imports no torch, so that the processes are there at once.
"""

import io
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

from training.drawings.shapes import world

CHUNK = 100
"""Drawings that a process sends at once."""

DrawnSample = tuple[str, bytes, str, Sequence[str], dict[str, object]]
"""Key, PNG, "png", captions and nothing else, as `write_shards` takes them."""


def draw_world(n: int, seed: int, *, size: int, share_of_three: float, processes: int) -> Iterator[DrawnSample]:
    """Yield the first n drawings of a data set; see `training.drawings.shapes.world` for the arguments.

    Args:
        n: how many.
        seed: of the data set.
        size: side of the pictures in pixels.
        share_of_three: share of scenes with three things.
        processes: that draw; 1 for this one alone.

    Raises:
        OSError: a process has ended early.
    """
    chunks = [range(first, min(first + CHUNK, n)) for first in range(0, n, CHUNK)]
    processes = min(processes, len(chunks))  # others would have nothing to draw
    if processes <= 1:
        for chunk in chunks:
            yield from _drawn(chunk, seed, size, share_of_three)
        return
    context = multiprocessing.get_context("spawn")
    readers = []
    for k in range(processes):
        reader, writer = context.Pipe(duplex=False)
        arguments = (writer, chunks[k::processes], seed, size, share_of_three)
        context.Process(target=_send, args=arguments, daemon=True).start()
        writer.close()  # the process has its own: when this one is gone, it cannot send, and ends
        readers.append(reader)
    for number in range(len(chunks)):
        try:
            yield from readers[number % processes].recv()
        except EOFError:
            raise OSError("a process that draws has ended early") from None


def _send(writer: Connection, chunks: Sequence[range], seed: int, size: int, share_of_three: float) -> None:
    try:
        for chunk in chunks:
            writer.send(_drawn(chunk, seed, size, share_of_three))
    except (OSError, KeyboardInterrupt):
        pass  # the first process is gone, or Ctrl-C has reached this one too


def _drawn(chunk: range, seed: int, size: int, share_of_three: float) -> list[DrawnSample]:
    samples: list[DrawnSample] = []
    for drawing in world(chunk.stop, seed, size=size, share_of_three=share_of_three, start=chunk.start):
        buffer = io.BytesIO()
        drawing.image.save(buffer, "png", compress_level=1)
        samples.append((drawing.key, buffer.getvalue(), "png", drawing.captions, {}))
    return samples
