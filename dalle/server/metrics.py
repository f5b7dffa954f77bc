"""What the server counts, for Prometheus. No caption, key or address is a label."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from dalle.server.queueing.engine import BatchTimes
from dalle.server.queueing.jobs import Job

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counts jobs, batches and what they took."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._jobs = Counter("dalle_jobs", "Requests by how they ended.", ["kind", "outcome"], registry=self._registry)
        self._stages = Histogram(
            "dalle_seconds",
            "Seconds that jobs were queued, and that batches took for sampling, and for decoding and ranking.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._candidates = Counter("dalle_candidates_sampled", "Candidates sampled.", registry=self._registry)
        self._tokens = Counter("dalle_tokens_sampled", "Image tokens sampled.", registry=self._registry)
        self._batch_jobs = Histogram(
            "dalle_batch_jobs", "Requests that shared a batch.", buckets=_SIZES, registry=self._registry
        )
        self._batch_candidates = Histogram(
            "dalle_batch_candidates", "Candidates of a batch.", buckets=_SIZES, registry=self._registry
        )

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a number that is looked up whenever the metrics are read."""
        Gauge(name, description, registry=self._registry).set_function(value)

    def job_ended(self, job: Job) -> None:
        """Count a job."""
        self._jobs.labels(job.kind, job.state).inc()
        if job.begun_at == job.begun_at:  # not NaN: it has begun
            self._stages.labels("queued").observe(job.begun_at - job.submitted_at)

    def refused(self, kind: str) -> None:
        """Count a request that became no job."""
        self._jobs.labels(kind, "refused").inc()

    def batch_done(self, times: BatchTimes) -> None:
        """Count a batch."""
        self._stages.labels("sampling").observe(times.sampling_s)
        self._stages.labels("judging").observe(times.judging_s)
        self._candidates.inc(times.n_candidates)
        self._tokens.inc(times.n_tokens)
        self._batch_jobs.observe(times.n_jobs)
        self._batch_candidates.observe(times.n_candidates)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self._registry)
