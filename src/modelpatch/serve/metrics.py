"""Counters of a server, for Prometheus."""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = tuple(n / 20 for n in range(1, 21))
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where the workers of one server add up their counts


def forget(process: int) -> None:
    """Remove the gauges of a worker that ended; its counters stay."""
    if FOLDER in os.environ:
        mark_process_dead(process)


class Metrics:
    """Counters of one server. All workers of one supervisor are added up."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"modelpatch_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"modelpatch_{name}", text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"modelpatch_{name}", text, registry=registry, multiprocess_mode="livesum")

        self.requests = counter("requests", "HTTP requests", "method", "route", "status")
        self.request_seconds = histogram("request_seconds", "Time to answer an HTTP request", SECONDS, "route")
        self.hits = counter("cache_hits", "Patches that were resident when a request asked for them")
        self.misses = counter("cache_misses", "Patches that were not resident when a request asked for them")
        self.loads = counter("loads", "Patches loaded, by outcome", "outcome")
        self.load_seconds = histogram("load_seconds", "Time to read, validate, bind and try a patch", SECONDS)
        self.evictions = counter("evictions", "Patches that gave room to others")
        self.queue_seconds = histogram("queue_seconds", "Time an image waited for the engine", SECONDS)
        self.batch_images = histogram("batch_images", "Images in a batch", (1, 2, 4, 8, 16, 32, 64, 128))
        self.shared = histogram("shared_fraction", "Share of a batch's separate work that was saved", SHARES)
        self.resident = gauge("resident_patches", "Patches that are resident")
        self.resident_bytes = gauge("resident_bytes", "Bytes of the patches that are resident")
        self.waiting = gauge("queue_images", "Images that wait for the engine")

    def text(self) -> bytes:
        """The counts in Prometheus' text format."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)
