"""What the front counts, in Prometheus' text format."""

from twin_merging_hf.errors import require_extra

from .upstreams import Upstreams


class Metrics:
    """Counters of one front. Raises `TwinMergingError` if prometheus-client is not installed."""

    def __init__(self) -> None:
        prometheus = require_extra("prometheus_client", "serve")
        self._write, self.content_type = prometheus.generate_latest, prometheus.CONTENT_TYPE_LATEST
        self._registry = registry = prometheus.CollectorRegistry()

        def make(kind, name, text, labels=(), **kwargs):
            return kind(f"twin_merging_{name}", text, labels, registry=registry, **kwargs)

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        self.requests = make(counter, "requests", "Requests by path and status", ("path", "status"))
        self.routes = make(
            counter,
            "routes",
            "Prompts by model; chosen by the router or by the request. `base` by the router is the none route",
            ("model", "by"),
        )
        self.seconds = make(
            histogram, "request_seconds", "From a request to the end of its response", ("path",),
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )  # fmt: skip
        self.router_seconds = make(
            histogram, "router_batch_seconds", "Of one batch of the router",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )  # fmt: skip
        self.router_rows = make(
            histogram, "router_batch_rows", "Prompts in one batch of the router", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.failures = make(counter, "upstream_failures", "Requests that an engine failed", ("upstream", "what"))
        self.healthy = make(gauge, "upstream_healthy", "1 if an engine is there with all models", ("upstream",))
        self.in_flight = make(gauge, "upstream_in_flight", "Requests that wait for an engine", ("upstream",))

    def batch(self, rows: int, seconds: float) -> None:
        self.router_rows.observe(rows)
        self.router_seconds.observe(seconds)

    def failed(self, upstream: str, what: str) -> None:
        self.failures.labels(upstream, what).inc()

    def text(self, upstreams: Upstreams) -> bytes:
        for upstream in upstreams.all:
            self.healthy.labels(upstream.name).set(float(upstream.healthy))
            self.in_flight.labels(upstream.name).set(upstream.in_flight)
        return self._write(self._registry)
