"""Usage as Prometheus metrics, counted and written by `prometheus_client`.

At least once: a batch that comes again to this process is not counted again, but one that a killed process had
counted and not yet taken off its spool is counted by its heir too. Each process counts for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from ..exceptions import ConfigurationError

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigurationError(
        "Prometheus metrics need prometheus_client, which is not installed: pip install 'papaours-auth[prometheus]'"
    ) from error

from .._fork import hold_across_fork, notice_fork
from .metrics import DURATIONS, PENDING, STATS, Tallier, Tally, Watched
from .recorder import Recorder
from .sinks import Batch

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `PrometheusSink.render` gives."""


class PrometheusSink:
    """Counts calls by environment, class of status, reason and outcome, and their durations.

    - ``registry``: where the metrics are; one of its own by default. Two sinks cannot share one.
    - ``routes``: route templates to count by; calls on all others are ``other``.
    - ``max_keys``, ``max_machines``: count by so many ids of keys and machines too; by none by default.

    Fork: a child begins at 0, unless PROMETHEUS_MULTIPROC_DIR has `prometheus_client` keep the numbers of all
    processes. Raises `ConfigurationError`.
    """

    content_type = CONTENT_TYPE

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        routes: Sequence[str] = (),
        max_keys: int = 0,
        max_machines: int = 0,
    ) -> None:
        self._tallier = Tallier(routes, max_keys, max_machines)
        self.registry = registry if registry is not None else CollectorRegistry()
        self._watched = Watched()
        self._lock = threading.Lock()  # so that no other thread is in a metric while the process forks
        try:
            self._make(self.registry, by=(bool(routes), max_keys > 0, max_machines > 0))
        except ValueError:
            raise ConfigurationError(
                "this registry has Papaours' metrics already: one PrometheusSink for each"
            ) from None
        hold_across_fork(self)

    def _make(self, registry: CollectorRegistry, by: tuple[bool, bool, bool]) -> None:
        self._calls = Counter(
            "papaours_calls",
            "Calls by known keys.",
            ("environment", "status", "reason", "outcome"),
            registry=registry,
        )
        self._durations = Histogram(
            "papaours_call_duration_seconds",
            "Time from a key's acceptance to the end of the answer.",
            ("environment", "status"),
            buckets=DURATIONS,
            registry=registry,
        )
        self._refusals = Counter(
            "papaours_refusals", "Refusals of nobody we know.", ("reason",), registry=registry
        )
        self._by = [
            Counter(f"papaours_{what}_calls", f"Calls by {what}.", (label, "status"), registry=registry)
            if wanted
            else None
            for what, label, wanted in zip(
                ("route", "key", "machine"), ("route", "key_id", "machine_id"), by, strict=True
            )
        ]
        registry.register(_Stats(self._watched))

    def write(self, batch: Batch) -> None:
        """Count a batch, unless this process has."""
        notice_fork()
        with self._lock:
            tally = self._tallier.tally(batch)
            if tally is not None:
                self._add(tally)
                self._tallier.counted(batch)

    def _add(self, tally: Tally) -> None:
        for result, calls in tally.calls.items():
            self._calls.labels(result.environment, result.status_class, result.reason, result.outcome).inc(
                calls
            )
        for result, seconds in tally.durations:
            self._durations.labels(result.environment, result.status_class).observe(seconds)
        for reason, calls in tally.refusals.items():
            self._refusals.labels(reason).inc(calls)
        for counter, counted in zip(self._by, (tally.routes, tally.keys, tally.machines), strict=True):
            if counter is not None:
                for (value, result), calls in counted.items():
                    counter.labels(value, result.status_class).inc(calls)

    def watch(self, recorder: Recorder) -> None:
        """Tell this recorder's own numbers too: recorded, delivered, pending, lost."""
        self._watched.add(recorder)

    def render(self) -> bytes:
        """Write everything in this sink's registry, in the text format."""
        notice_fork()
        with self._lock:
            return generate_latest(self.registry)

    def before_fork(self) -> None:
        """Wait for a thread that counts or renders."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child from 0, or what its parent counted would be counted twice."""
        if child and not {"PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"} & os.environ.keys():
            for metric in (self._calls, self._durations, self._refusals, *self._by):
                if metric is not None:
                    metric.clear()
        if child:
            self._lock = threading.Lock()
        else:
            self._lock.release()


class _Stats(Collector):
    """Reads the recorders when it is asked."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterable[Metric]:
        for name, words in STATS.items():
            yield CounterMetricFamily(f"papaours_usage_{name}", words, value=self._watched.sum(name))
        yield GaugeMetricFamily("papaours_usage_pending", PENDING, value=self._watched.sum("pending"))
