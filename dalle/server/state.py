"""What the routes share: the engine, the metrics, the pictures that are kept, and how requests are answered."""

import asyncio
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from dalle.best_of_n import Ranked
from dalle.editing.edit import Edited
from dalle.editing.redraw import Redrawn
from dalle.editing.variations import Varied
from dalle.pipeline import Pipeline
from dalle.server.api.errors import APIError, not_yet, wrong
from dalle.server.api.requests import Ask, Endpoint, Limits, UnCLIPLimits
from dalle.server.metrics import Metrics
from dalle.server.pictures import Results, region_of, varying
from dalle.server.queueing.batch import Source, Varying, Work
from dalle.server.queueing.engine import Engine
from dalle.server.queueing.jobs import Job, Previews
from dalle.unclip.metadata import settings_of
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.results import Edited as EditedByUnCLIP
from storage.errors import reason_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server answers, beyond `Rules`."""

    models: tuple[str, ...]
    """As of `Limits`."""
    created: int = 0
    """Seconds since 1970 when the bundle was made."""
    best_of: int = 16
    max_n: int = 10
    max_candidates: int = 512
    timeout_s: float = 600.0
    public_url: str | None = None
    """Where links to pictures lead; by default where the request was sent to."""
    log_prompts: bool = False
    result_bytes: int = 256_000_000
    """Of pictures that are kept for an hour."""


@dataclass
class State:
    """What the routes share."""

    engine: Engine
    metrics: Metrics
    settings: Settings
    results: Results = field(init=False)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a picture that was sent is decoded: one at a time, each may take some 150 MB."""
    is_draining: bool = False
    """Whether the server ends: it is no longer ready."""

    def __post_init__(self) -> None:
        self.results = Results(self.settings.result_bytes)
        queue = self.engine.queue
        watch = self.metrics.watch
        watch("dalle_queue_jobs", "Requests that wait.", lambda: queue.n_jobs)
        watch("dalle_running_jobs", "Requests that are drawn.", lambda: queue.n_running)
        watch("dalle_queue_candidates", "Candidates of requests that wait.", lambda: queue.n_candidates)
        watch("dalle_result_bytes", "Pictures that are kept.", lambda: self.results.n_bytes)
        watch("dalle_ready", "Whether requests are taken: 0 or 1.", lambda: float(self.is_ready))

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine.pipe is not None and not self.is_draining

    def pipe(self) -> Pipeline:
        """Return the bundle.

        Raises:
            APIError: it is not loaded yet, or the server ends.
        """
        if self.is_draining:
            raise not_yet("the server ends: it takes no more requests", 5)
        if self.engine.pipe is None:
            raise not_yet("the bundle is still loaded: try again in some seconds", 5)
        return self.engine.pipe

    def limits(self) -> Limits:
        """Return what requests may ask for; raises as `pipe`."""
        pipe, settings = self.pipe(), self.settings
        return Limits(
            models=settings.models,
            native=pipe.dvae.config.image_size,
            grid=pipe.dalle.config.grid,
            image_vocab=pipe.dalle.config.image_vocab,
            defaults=pipe.defaults,
            best_of=settings.best_of,
            max_n=min(settings.max_n, settings.max_candidates),
            max_candidates=settings.max_candidates,
            unclip=_unclip_limits(self.engine.unclip),
        )

    def job(
        self, ask: Ask, owner: str, kind: str, *, source: Source | None = None, previews: Previews | None = None
    ) -> Job:
        """Return the job of what is asked for.

        Raises:
            APIError: it cannot be sampled.
        """
        settings = ask.settings
        try:
            work = Work(
                caption=ask.prompt,
                n=ask.best_of,
                keep=ask.n,
                sampling=settings.sampling(ask.seed),
                rank=settings.rank,
                source=source,
                drawing=ask.drawing,
            )
        except ValueError as error:
            raise APIError(400, reason_of(error)) from error
        return Job(work, owner=owner, timeout_s=self.settings.timeout_s, previews=previews, kind=kind)

    async def source(self, ask: Ask, files: Mapping[str, bytes]) -> Source:
        """Return what is drawn anew of a picture that was sent.

        Raises:
            APIError: there is none, or something is wrong with it.
        """
        if "image" not in files:
            raise wrong("image", "there is no image: send the picture to start from", "missing")
        limits, image = self.limits(), files["image"]
        side = ask.native
        async with self.opening:
            if ask.strength is not None:
                if ask.drawing is not None and self.engine.unclip is not None:
                    side = self.engine.unclip.seen_size
                return await asyncio.to_thread(varying, image, ask.strength, side=side)
            rows, mask = ask.keep_rows, files.get("mask")
            return await asyncio.to_thread(region_of, image, mask, rows, side=side, grid=limits.grid)

    def texts(self, job: Job, place: int) -> dict[str, Any]:
        """Return what is told of a finished job's picture, as `dalle generate` writes it into its PNGs."""
        result, work = job.result, job.work
        assert result is not None
        settings, hashes = self._settings(work)
        about = {
            "caption": work.caption,
            **result.described()[place],
            "seed": work.sampling.seed,
            **settings,
            "best_of": work.n,
            "hashes": hashes,
        }
        if isinstance(result, Redrawn):
            about["unknown_tokens"] = result.n_unknown
        if isinstance(result, Edited | EditedByUnCLIP):
            about["original_seam"] = result.region.original_seam
        if isinstance(work.source, Varying):
            about["strength" if work.drawing is None else "eta"] = work.source.strength
        about |= details(result, place)
        return {name: value for name, value in about.items() if value is not None}

    def _settings(self, work: Work) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Return how a work was drawn, and the hashes of the parts that drew it."""
        pipe, unclip = self.engine.pipe, self.engine.unclip
        assert pipe is not None
        if work.drawing is None:
            return dataclasses.asdict(work.sampling), pipe.hashes
        assert unclip is not None
        is_varied = isinstance(work.source, Varying)
        guidance = 1 if is_varied else work.drawing.guidance_or()
        return settings_of(unclip, work.drawing, guidance, work.n, of_captions=not is_varied), unclip.hashes

    def note(self, request: Request, ask: Ask) -> None:
        """Say in the log what is asked for, without its words."""
        digest = hashlib.sha256(ask.prompt.encode()).hexdigest()[:8]
        words = f" {ask.prompt!r}" if self.settings.log_prompts else f" of {len(ask.prompt)} characters ({digest})"
        request.state.note = f"the best {ask.n} of {ask.best_of}, caption{words}"


def _unclip_limits(unclip: UnCLIP | None) -> UnCLIPLimits | None:
    if unclip is None:
        return None
    can: dict[Endpoint, bool] = {
        "generations": unclip.prior is not None,
        "edits": unclip.prior is not None and unclip.decoder.config.inpaints,
        "variations": True,
    }
    endpoints = frozenset(endpoint for endpoint, is_there in can.items() if is_there)
    return UnCLIPLimits(endpoints=endpoints, native=unclip.image_size, n_steps=unclip.decoder.config.n_steps)


def details(result: Ranked, place: int) -> dict[str, float]:
    """Return what is told of one picture that starts from another."""
    if isinstance(result, Edited | EditedByUnCLIP):
        return {"seam": float(result.seams[place])}
    if isinstance(result, Varied):
        return {"changed_tokens": result.n_changed[place]}
    return {}
