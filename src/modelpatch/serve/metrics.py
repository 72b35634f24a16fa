"""Counters of a server, for Prometheus."""

import os
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = tuple(n / 20 for n in range(1, 21))


class Metrics:
    """Counters of one server. All workers of one supervisor are added up."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="modelpatch", registry=self.registry)
        gauge = partial(Gauge, namespace="modelpatch", registry=self.registry, multiprocess_mode="livesum")
        histogram = partial(Histogram, namespace="modelpatch", registry=self.registry, buckets=SECONDS)
        self.requests = counter("requests", "HTTP requests", ("method", "route", "status"))
        self.request_seconds = histogram("request_seconds", "Time to answer an HTTP request", ("route",))
        self.hits = counter("cache_hits", "Patches that were resident when a request asked for them")
        self.misses = counter("cache_misses", "Patches that were not resident when a request asked for them")
        self.loads = counter("loads", "Patches loaded, by outcome", ("outcome",))
        self.load_seconds = histogram("load_seconds", "Time to read, validate, bind and try a patch")
        self.evictions = counter("evictions", "Patches that gave room to others")
        self.queue_seconds = histogram("queue_seconds", "Time an image waited for the engine")
        self.batch_images = histogram("batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
        self.shared = histogram("shared_fraction", "Share of a batch's separate work that was saved", buckets=SHARES)
        self.resident = gauge("resident_patches", "Patches that are resident")
        self.resident_bytes = gauge("resident_bytes", "Bytes of the patches that are resident")
        self.request_bytes = gauge("request_bytes", "Bytes of the bodies of requests that arrive or are being answered")
        self.macs = counter("macs", "Multiply-adds that the images of a tenant cost, heads left out", ("tenant",))
        self.waiting = gauge("queue_images", "Images of requests that are being answered")

    def text(self) -> bytes:
        """The counts in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)
