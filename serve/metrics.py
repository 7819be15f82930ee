"""What Prometheus scrapes of one ingress replica."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters of requests, by route pattern and status, and of rows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        self.requests = Counter("scopeworks_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "scopeworks_request_seconds",
            "Time to the end of the answer",
            ["route"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.rows = Counter("scopeworks_rows", "Rows computed", ["operation"], registry=self.registry)
        self.inside = Gauge("scopeworks_requests_inside", "Requests in the house", registry=self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
