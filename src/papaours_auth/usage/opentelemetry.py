"""Usage as OpenTelemetry metrics. Needs the API alone; what the app's SDK does with them is its own.

Attributes have the names of the semantic conventions where there are any. The metrics have names of ours: HTTP
instrumentation counts ``http.server.request.duration`` for every request, and these calls would be in it twice.

At least once: as `papaours_auth.usage.prometheus` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..exceptions import ConfigurationError

try:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
except ImportError as error:
    raise ConfigurationError(
        "OpenTelemetry metrics need its API, which is not installed: pip install 'papaours-auth[opentelemetry]'"
    ) from error

from .metrics import DURATIONS, PENDING, STATS, Result, Tallier, Tally, Watched
from .recorder import Recorder
from .sinks import Batch


class OpenTelemetrySink:
    """Counts calls by environment, status, reason and outcome, and their durations.

    ``meter_provider``: the app's; the global one by default. ``routes``, ``max_keys``, ``max_machines``: as on
    `papaours_auth.usage.prometheus.PrometheusSink`. Fork: what the SDK says of it. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        *,
        routes: Sequence[str] = (),
        max_keys: int = 0,
        max_machines: int = 0,
    ) -> None:
        self._tallier = Tallier(routes, max_keys, max_machines)
        self._watched = Watched()
        meter = get_meter("papaours_auth", meter_provider=meter_provider)
        self._calls = meter.create_counter("papaours.calls", "{call}", "Calls by known keys.")
        self._durations = meter.create_histogram(
            "papaours.call.duration",
            "s",
            "Time from a key's acceptance to the end of the answer.",
            explicit_bucket_boundaries_advisory=DURATIONS,
        )
        self._refusals = meter.create_counter("papaours.refusals", "{refusal}", "Refusals of nobody we know.")
        self._by = [
            (label, meter.create_counter(f"papaours.{what}.calls", "{call}", f"Calls by {what}."))
            for what, label in (
                ("route", "http.route"),
                ("key", "papaours.key.id"),
                ("machine", "papaours.machine.id"),
            )
        ]
        for name, words in STATS.items():
            meter.create_observable_counter(f"papaours.usage.{name}", [self._observe(name)], "{event}", words)
        meter.create_observable_up_down_counter(
            "papaours.usage.pending", [self._observe("pending")], "{event}", PENDING
        )

    def _observe(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        watched = self._watched  # the meter lives on, and is not to keep the sink
        return lambda _: [Observation(watched.sum(name))]

    def write(self, batch: Batch) -> None:
        """Count a batch, unless this process has."""
        tally = self._tallier.tally(batch)
        if tally is not None:
            self._add(tally)
            self._tallier.counted(batch)

    def _add(self, tally: Tally) -> None:
        for result, calls in tally.calls.items():
            self._calls.add(calls, _attributes(result) | {"papaours.outcome": result.outcome})
        for result, seconds in tally.durations:
            self._durations.record(seconds, _attributes(result))
        for reason, calls in tally.refusals.items():
            self._refusals.add(calls, {"error.type": reason})
        counted = (tally.routes, tally.keys, tally.machines)
        for (label, counter), counts in zip(self._by, counted, strict=True):
            for (value, result), calls in counts.items():
                counter.add(calls, {label: value, **_status(result)})

    def watch(self, recorder: Recorder) -> None:
        """Tell this recorder's own numbers too: recorded, delivered, pending, lost."""
        self._watched.add(recorder)


def _attributes(result: Result) -> dict[str, str | int]:
    given = _status(result)
    given["papaours.environment"] = result.environment
    if result.reason:
        given["error.type"] = result.reason
    return given


def _status(result: Result) -> dict[str, str | int]:
    return {"http.response.status_code": result.status} if result.status else {}
