"""A store of shards, a web server on loopback, that fails before a run, in it, and for good."""

import shutil
import signal
from functools import partial
from pathlib import Path

from jobs import Job, wait_for
from runs import Course, Fault, last_step, require, require_equal
from servers.web import Web, serving

AT_STEP = 6
SHARDS = "world-{000000..000005}.tar"


def _hurry(_rank: int) -> None:
    """Let a rank give a store up within seconds."""
    from storage.stores import errors

    errors.PATIENCE = errors.Patience(attempts=3, stall_s=2.0, min_speed=4096, first_wait_s=0.1)


def _command(course: Course, bundle: Path, web: Web, cache: Path) -> list[str]:
    """Return the command that trains from the store; the cache holds less than half of the shards."""
    size = sum(path.stat().st_size for path in web.folder.glob("*.tar"))
    return course.command(bundle, "--cache", cache, "--cache-gb", 0.45 * size / 1e9, data=f"{web.url}/{SHARDS}")


def _passing(course: Course, name: str) -> tuple[str, str]:
    """Let every way of failing pass before each shard is fetched."""
    bundle = course.bundle(name)
    faults = ["500", "cut", "closed", "hang", "drip", "cut"]
    with serving(course.world) as web:
        for number, fault in enumerate(faults):
            web.faults[f"world-{number:06}.tar"] = [fault, "503"]
        said = course.finish(_command(course, bundle, web, course.scratch / "caches" / name), name, inject=_hurry)
        asked = sum(web.gets().values())
    require_equal(bundle, course.straight())
    n_told = said.count("trying again")
    require(n_told >= len(faults), f"only {n_told} failures were told: {said[-800:]}")
    return f"{n_told} failures were told, each shard once a process, {asked} requests; the run ended", "nothing"


def _lasting(course: Course, name: str, *, fault: str, words: str) -> tuple[str, str]:
    """Let a store fail in the middle of a run until both ranks have ended, and resume when it works again."""
    bundle = course.bundle(name)
    with serving(course.world) as web:
        command = _command(course, bundle, web, course.scratch / "caches" / name)
        with Job(course.scratch / "logs" / name, command, inject=_hurry) as job:
            wait_for(lambda: last_step(bundle) >= AT_STEP or not job.is_running(), f"step {AT_STEP}")
            web.always = fault
            codes = job.wait()
            said = job.said()
        require(codes == [1, 1], f"the ranks ended with {codes}: {said[-800:]}")
        require(words in said, f"it is not told: {said[-800:]}")
        require("Traceback" not in said, f"a traceback: {said[-1500:]}")
        web.always = ""
        course.finish(command, f"{name}-end", inject=_hurry)
    require_equal(bundle, course.straight())
    line = next(line for line in said.splitlines() if line.startswith("error: ") and words in line)
    return f"both ranks ended with 1: {line[:160]}", "nothing, once the store worked again"


def _killed(course: Course, name: str) -> tuple[str, str]:
    """Kill both ranks while shards are fetched, and start the command again."""
    bundle, cache = course.bundle(name), course.scratch / "caches" / name
    with serving(course.world) as web:
        web.faults[""] = ["slow"] * 6
        command = _command(course, bundle, web, cache)
        with Job(course.scratch / "logs" / name, command) as job:
            wait_for(lambda: any(path.stat().st_size for path in cache.rglob("*.partial")), "a fetch")
            for rank in (0, 1):
                job.send(rank, signal.SIGKILL)
            job.wait()
        web.faults[""] = []
        left = [path.name[1:].removesuffix(".partial") for path in cache.rglob("*.partial")]
        course.finish(command, f"{name}-end")
        resumed = [shard for shard in left if any(web.ranges_of(shard))]
    require_equal(bundle, course.straight())
    require(resumed, f"none of {left} was gone on with")
    shutil.rmtree(cache)
    return f"{len(resumed)} of {len(left)} fetches were gone on with where they were; the run ended", "nothing"


FAULTS = [
    Fault(name="store fails for a while", injected="at the first fetch of each shard, twice", run=_passing),
    *(
        Fault(
            name=f"store {what}",
            injected=f"after step {AT_STEP}",
            run=partial(_lasting, fault=fault, words=words),
        )
        for what, fault, words in (
            ("is gone", "closed", "its store fails"),
            ("answers 500", "500", "its store fails"),
            ("hangs", "hang", "does not answer"),
            ("drips", "drip", "does not answer"),
            ("cuts every body", "cut", "its store fails"),
            ("forbids: its keys have expired", "403", "its store forbids it"),
            ("gives pages of HTML", "html", "a page of HTML"),
        )
    ),
    Fault(name="kill -9 in a fetch", injected="of both ranks, at the first bytes", run=_killed),
]
