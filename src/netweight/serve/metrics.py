"""What Prometheus sees."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from netweight.serve.hosted import Hosted, Models
from netweight.serve.steady import Said

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SURE = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": "netweight"}
        self.requests = Counter("requests", "Requests by outcome", ("model", "status"), **named)  # type: ignore[arg-type]
        self.latency = Histogram("request_seconds", "From arrival to a 200", ("model",), buckets=_SECONDS, **named)  # type: ignore[arg-type]
        self.batches = Histogram("batch_rows", "Rows that an engine took at a time", ("model",), buckets=_ROWS, **named)  # type: ignore[arg-type]
        self.busy = Counter("engine_seconds", "Time that an engine worked", ("model",), **named)  # type: ignore[arg-type]
        self.answered = Counter("rows", "Rows by the tier that answered", ("model", "tier"), **named)  # type: ignore[arg-type]
        self.failed = Counter("tier_failures", "Answered requests that a tier failed", ("model", "tier"), **named)  # type: ignore[arg-type]
        self.alerts = Counter("alerts", "Signals that left what was certified", ("model", "signal"), **named)  # type: ignore[arg-type]
        self.drift = Gauge("drift", "Evidence of a change; 1 raises the alarm", ("model", "signal"), **named)  # type: ignore[arg-type]
        self.sure = Histogram("confidence", "Confidence of answers", ("model",), buckets=_SURE, **named)  # type: ignore[arg-type]

    def watch(self, models: Models) -> None:
        """Also show how much waits for each model, and how candidates do."""
        self.registry.register(_Depth(models))

    def batch(self, model: str, rows: int, seconds: float) -> None:
        """A turn of a tier; `rows` that were begun in it."""
        if rows:  # a later tier's turn begins none
            self.batches.labels(model).observe(rows)
        self.busy.labels(model).inc(seconds)

    def said(self, hosted: Hosted, said: Said) -> None:
        """A request was answered."""
        for i, tier in enumerate(hosted.engine.tiers):
            rows = int((said.outputs.tier == i).sum())
            if rows:
                self.answered.labels(hosted.name, tier.name).inc(rows)
        for name in said.failed:
            self.failed.labels(hosted.name, name).inc()
        sure = self.sure.labels(hosted.name)
        for value in said.outputs.confidence.tolist():
            sure.observe(value)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _Depth(Collector):
    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[GaugeMetricFamily]:
        depth = GaugeMetricFamily("netweight_queue_depth", "Requests that wait for an engine", labels=("model",))
        for hosted in self._models:
            depth.add_metric((hosted.name,), len(hosted.queue))
        yield depth
        verdicts = {"harmful": -1, "undecided": 0, "safe": 1}
        names = {
            "rows": "Rows that were compared with a candidate",
            "different": "Rows on which the candidate says something else",
            "failed": "Requests that the candidate failed",
            "verdict": "-1 harmful, 0 undecided, 1 safe",
        }
        for key, said in names.items():
            gauge = GaugeMetricFamily(f"netweight_candidate_{key}", said, labels=("model",))
            for name, trial in list(self._models.trials.items()):
                state = trial.state()
                gauge.add_metric((name,), verdicts[state[key]] if key == "verdict" else state[key])
            yield gauge
