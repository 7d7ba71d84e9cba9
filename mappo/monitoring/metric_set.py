"""The values of declared metrics. Only this module and `monitor.py` import prometheus_client."""

import math
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from mappo.monitoring.metrics import Metric

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # of the text that `MetricSet.text` returns


class MetricSet:
    """The values of declared metrics. It has no lock: its owner keeps updates and renderings apart."""

    def __init__(self, declared: Sequence[Metric], registry: CollectorRegistry | None = None):
        """Declare the metrics, in a new registry unless one is given; nothing has a value yet."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry(auto_describe=True)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in declared:
            arguments = (metric.name, metric.description, metric.label_names)
            if metric.kind == "gauge":
                self._gauges[metric.name] = Gauge(*arguments, registry=self.registry)
            elif metric.kind == "counter":
                self._counters[metric.name] = Counter(*arguments, registry=self.registry)
            else:
                self._histograms[metric.name] = Histogram(
                    *arguments, registry=self.registry, buckets=metric.bounds
                )

    def begin_at_zero(self, metric: Metric, **labels: str) -> None:
        """Show a counter or histogram at 0 for all its labels, so that Prometheus sees its first increase."""
        for combination in metric.combinations() if metric.kind != "gauge" else ():
            if metric.kind == "counter":
                self.add(metric.name, 0, **labels, **combination)
            else:
                self._histograms[metric.name].labels(**labels, **combination)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Add an amount to a counter."""
        assert math.isfinite(amount), "a counter can never recover from NaN or infinity"
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._histograms[name].labels(**labels).observe(value)

    def clear(self, name: str) -> None:
        """Drop all values of a metric."""
        {**self._gauges, **self._counters, **self._histograms}[name].clear()

    def remove(self, name: str, labels: dict[str, str]) -> None:
        """Drop the values of a metric that have these labels."""
        {**self._gauges, **self._counters, **self._histograms}[name].remove_by_labels(labels)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
