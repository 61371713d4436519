"""What metrics tell of calls, for `prometheus` and `opentelemetry`: sums by labels of few values each.

No address, no path, no name: what a client or a customer can make up is no label (a time series for each would be
kept for ever). Routes are those the app lists; ids of keys and machines only where it asks, and so many of them.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from ..exceptions import ConfigurationError, Reason
from .event import Event, Outcome
from .recorder import Recorder
from .sinks import Batch

OTHER: Final = "other"
DURATIONS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Bounds of the buckets, in seconds: those of OpenTelemetry's ``http.server.request.duration``."""
_ENVIRONMENTS: Final = 20
_PRODUCERS: Final = 1_000
_REASONS: Final = frozenset(("", *Reason))
_OUTCOMES: Final = frozenset(outcome.name.lower() for outcome in Outcome)


class Result(NamedTuple):
    """How a call came out. ``status`` is 0 where none was sent, or none that there is."""

    environment: str
    status: int
    reason: str
    outcome: str

    @property
    def status_class(self) -> str:
        """``2xx`` for 204; ``none`` where there is no status."""
        return f"{self.status // 100}xx" if self.status else "none"


class Tally(NamedTuple):
    """What a batch adds. The latter three are empty where the app did not ask for them."""

    calls: Counter[Result]
    durations: Sequence[tuple[Result, float]]
    """In seconds, of the calls that ended."""
    refusals: Counter[str]
    """Of nobody we know, by reason."""
    routes: Counter[tuple[str, Result]]
    keys: Counter[tuple[str, Result]]
    machines: Counter[tuple[str, Result]]


class Bounded:
    """Lets so many values of a label through, those that come first, and makes the others one."""

    def __init__(self, most: int, known: Sequence[str] = ()) -> None:
        self._most = most
        self._known = set(known)

    def __call__(self, value: str) -> str:
        """Give the value, or `OTHER`."""
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value


class Tallier:
    """Makes a `Tally` of each batch that this process has not counted yet. For one thread at a time.

    ``routes``: templates to tell apart, as events have them; ``max_keys``, ``max_machines``: how many ids. What is
    beyond is `OTHER`. Raises `ConfigurationError`.
    """

    def __init__(self, routes: Sequence[str], max_keys: int, max_machines: int) -> None:
        if isinstance(routes, str):
            raise ConfigurationError(f"routes is a list, as in [{routes!r}]")
        if max_keys < 0 or max_machines < 0:
            raise ConfigurationError("max_keys and max_machines must not be below 0")
        self._environment = Bounded(_ENVIRONMENTS)
        self._route = Bounded(0, routes) if routes else None
        self._key = Bounded(max_keys) if max_keys else None
        self._machine = Bounded(max_machines) if max_machines else None
        self._counted: OrderedDict[str, int] = OrderedDict()  # each producer's highest sequence

    def tally(self, batch: Batch) -> Tally | None:
        """Add a batch up; None where it was counted."""
        if self._counted.get(batch.producer, -1) >= batch.sequence:
            return None
        results = [self._result(event) for event in batch.events]
        pairs = list(zip(batch.events, results, strict=True))
        ended = [(result, event.duration / 1e6) for event, result in pairs if result.outcome != "started"]
        refusals: Counter[str] = Counter()
        for refused in batch.refusals:
            refusals[refused.reason if refused.reason in _REASONS else OTHER] += refused.calls
        return Tally(
            Counter(results),
            ended,
            refusals,
            _by(self._route, [(event.route, result) for event, result in pairs]),
            _by(self._key, [(event.key_id, result) for event, result in pairs]),
            _by(self._machine, [(event.machine_id, result) for event, result in pairs]),
        )

    def counted(self, batch: Batch) -> None:
        """Remember a batch."""
        self._counted[batch.producer] = batch.sequence
        self._counted.move_to_end(batch.producer)
        if len(self._counted) > _PRODUCERS:
            self._counted.popitem(last=False)

    def _result(self, event: Event) -> Result:
        return Result(
            self._environment(event.environment),
            event.status if 100 <= event.status <= 599 else 0,
            event.reason if event.reason in _REASONS else OTHER,
            event.outcome if event.outcome in _OUTCOMES else OTHER,
        )


def _by(label: Bounded | None, pairs: Sequence[tuple[str, Result]]) -> Counter[tuple[str, Result]]:
    return Counter() if label is None else Counter((label(value), result) for value, result in pairs)


class Watched:
    """The recorders whose own numbers are told, summed up. Keeps none alive."""

    def __init__(self) -> None:
        self._recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()

    def add(self, recorder: Recorder) -> None:
        """Tell this one's numbers too."""
        self._recorders.add(recorder)

    def sum(self, name: str) -> int:
        """Give a field of `Stats`, over all of them."""
        return sum(getattr(recorder.stats(), name) for recorder in list(self._recorders))


STATS: Final = {
    "recorded": "Calls recorded by this process.",
    "delivered": "Calls that the sink has taken.",
    "lost": "Calls that could not be kept.",
    "sink_failures": "Deliveries that failed, and were tried again.",
}
"""The counters of `Stats`, and what they say; ``pending`` is a gauge."""
PENDING: Final = "Calls that wait for their delivery."
