"""Figures for Prometheus, in a registry of each server's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _Read(Collector):
    """A counter behind a function."""

    def __init__(self, name: str, what: str, read: Callable[[], float]) -> None:
        self.name, self.what, self.read = name, what, read

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Prometheus's."""
        yield CounterMetricFamily(self.name, self.what, value=self.read())


class Metrics:
    """What is counted. Route labels are the server's own paths, so that clients cannot make up new ones."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answered = 0
        r = self.registry
        self.requests = Counter(
            "nextflow_ar_requests", "Answered HTTP requests.", ["route", "method", "status"], registry=r
        )
        self.seconds = Histogram(
            "nextflow_ar_request_seconds", "Time of HTTP requests.", ["route"], buckets=_SECONDS, registry=r
        )
        self.pictures = Counter("nextflow_ar_pictures", "Finished pictures.", registry=r)
        self.previews = Counter("nextflow_ar_partial_pictures", "Partial pictures sent.", registry=r)
        self.tokens = Counter("nextflow_ar_tokens", "Tokens read and written.", ["way", "kind"], registry=r)
        self.cancelled = Counter("nextflow_ar_cancelled", "Orders whose client went away.", registry=r)
        self.failures = Counter("nextflow_ar_engine_failures", "Steps of the engine that failed.", registry=r)
        self.step_seconds = Histogram(
            "nextflow_ar_step_seconds", "Time of the engine's steps.", buckets=_SECONDS, registry=r
        )

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(f"nextflow_ar_{name}", what, registry=self.registry).set_function(read)

    def watch_count(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A counter that somebody else keeps, read when somebody looks."""
        self.registry.register(_Read(f"nextflow_ar_{name}", what, read))

    def used(self, way: str, text: int, image: int) -> None:
        """Count tokens; ``way``: "in" or "out"."""
        self.tokens.labels(way, "text").inc(text)
        self.tokens.labels(way, "image").inc(image)

    def page(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
