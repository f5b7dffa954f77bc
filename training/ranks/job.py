"""The life of a training command: joining the ranks, and one line that says why they ended; restarts, if asked for."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from dalle.output.text import Say, to_stderr
from storage.errors import reason_of
from training.ranks.environment import is_supervised, tell_supervisor
from training.ranks.ranks import Ranks, join, leave
from training.ranks.stop import Ended, Interrupted
from training.ranks.supervisor import supervise
from training.ranks.watch import MAX_TIMEOUT_S, TIMEOUT_S

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """When a job ends by itself, and whether it starts again."""

    timeout: float = TIMEOUT_S
    """Seconds in which something must move, four times as many before the first step. Then the stacks of all ranks are
    written to stacks/ in the run's directory, the ranks that fell behind are named, and training ends."""
    auto_restart: int = 0
    """Restarts, from the newest checkpoint, after a crash, a kill, a lost rank or a hang."""

    def check(self) -> None:
        """Raise ValueError, which names the option, where a value is impossible."""
        if not 0 < self.timeout <= MAX_TIMEOUT_S:
            raise ValueError(
                f"--timeout is {self.timeout}; expected seconds above 0, such as 1800, and at most {MAX_TIMEOUT_S:,}"
            )
        if self.auto_restart < 0:
            raise ValueError(f"--auto-restart is {self.auto_restart}; expected a number of restarts, such as 3")


@contextmanager
def joined(options: JobOptions | None = None, arguments: Sequence[str] = ()) -> Iterator[tuple[Ranks, Say]]:
    """Join the ranks; inside, the second value prints lines on the first rank alone.

    Args:
        options: the defaults if None.
        arguments: of `dalle-train`, which a supervisor repeats.

    Raises:
        ValueError: an option is impossible.
        Ended: a supervisor has run the command, and its restarts, as child processes.
        Interrupted: raised inside, and reported.
        RankLostError: another rank is gone; in place of the RuntimeError that a collective raised inside.
    """
    options = JobOptions() if options is None else options
    options.check()
    if options.auto_restart and not is_supervised():
        raise Ended(supervise(arguments, options.auto_restart))
    ranks = join(options.timeout)
    say: Say = to_stderr_if_open if ranks.is_first else (lambda _line: None)
    ranks.watch.start()
    hook, threading.excepthook = threading.excepthook, _warn_of_thread
    try:
        yield ranks, say
        leave()
    except Interrupted as stopped:
        say(str(stopped))
        leave()
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None and ranks.watch.run:
            error.filename = str(ranks.watch.run)  # of a file that was open: the disk is full, or fails
        lost = ranks.watch.lost_rank_error(error)
        if lost is None:
            if isinstance(error, ValueError):
                tell_supervisor("final")
            ranks.watch.tell_failure(reason_of(error))
        else:
            tell_supervisor("lost")
        leave(after_error=True)
        if lost is not None:
            raise lost from error
        raise
    finally:
        threading.excepthook = hook
        ranks.watch.stop()


def to_stderr_if_open(line: str) -> None:
    """Print a line; a closed stderr, of a terminal or a launcher that is gone, must not stop training."""
    with suppress(OSError):
        to_stderr(line)


def _warn_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Warn in one line of a thread, such as the one that writes TensorBoard's files, that could not write."""
    if isinstance(failed.exc_value, OSError):
        logger.warning("%s ended: %s", failed.thread.name if failed.thread else "a thread", failed.exc_value)
    else:
        threading.__excepthook__(failed)
