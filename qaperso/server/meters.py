"""What a server counts, for Prometheus. No label holds a querier, a key or a text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        fixed = dict(registry=self.registry)
        self.requests = Counter(
            "qaperso_requests", "Answers by endpoint and HTTP status.", ["endpoint", "status"], **fixed
        )
        self.seconds = Histogram(
            "qaperso_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            **fixed,
        )
        self.first = Histogram(
            "qaperso_first_token_seconds", "From a chat request to its reply's first token.", buckets=SECONDS, **fixed
        )
        self.tokens = Counter("qaperso_tokens", "Tokens read as prompts and written as replies.", ["kind"], **fixed)
        self.steps = Histogram("qaperso_step_seconds", "Of steps of the batch on the device.", buckets=SECONDS, **fixed)
        self.running = Gauge("qaperso_replies_running", "Replies that have a slot.", **fixed)
        self.waiting = Gauge("qaperso_replies_waiting", "Replies that wait for a slot.", **fixed)
        self.rejected = Counter("qaperso_rejected", "Requests turned away since the queue was full.", **fixed)
        self.cancelled = Counter(
            "qaperso_cancelled",
            "Replies ended before their end: the client left, time was over, a stop came, the querier was forgotten.",
            **fixed,
        )
        self.enrolled = Gauge("qaperso_queriers_enrolled", "Queriers who were enrolled here.", **fixed)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
