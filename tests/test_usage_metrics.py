"""Usage as metrics: the same numbers to Prometheus and OpenTelemetry, by labels that are bounded in number."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from papaours_auth import Identity, PepperRing, Reason
from papaours_auth._fork import hold_across_fork
from papaours_auth.exceptions import ConfigurationError
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.usage import Batch, CallableSink, Event, Recorder, Refusals, Tee
from papaours_auth.usage.event import Outcome, begin_call
from papaours_auth.usage.opentelemetry import OpenTelemetrySink
from papaours_auth.usage.prometheus import PrometheusSink
from papaours_auth.usage.sqlite import SQLiteSink
from support.alone import run_alone
from support.usage import call_with_canaries

SEED = "pk_prod_abc123def456ghi789"
Labels = frozenset[tuple[str, str]]


def event(number: int = 0, **more: Any) -> Event:
    made = Event(
        1, f"p-1-{number}", 1_790_000_000_000_000, "key_1", "machine_1", "192.0.2.7", "GET", "/contrats/{id}", 200,
        "", "completed", "contrats", "prod", 20_000, "r-1",
    )  # fmt: skip
    return made._replace(**more)


BATCH = Batch(
    "p",
    1,
    [
        event(),
        event(1, status=204, duration=3_000_000),
        event(2, status=404, route="/nowhere/at/all"),
        event(3, status=401, reason="key_inactive", key_id="key_2", machine_id="machine_2", duration=100),
        event(4, status=0, outcome="failed", environment="test"),
        event(5, status=200, outcome="started", duration=0),
    ],
    [Refusals(0, "unknown_key", "192.0.2.0/24", 3), Refusals(60, "unknown_key", "198.51.100.0/24", 4)],
)
ASKED: dict[str, Any] = {"routes": ["/contrats/{id}"], "max_keys": 1, "max_machines": 5}


def prometheus(sink: PrometheusSink) -> dict[str, dict[Labels, float]]:
    """Read what is exposed, as Prometheus would."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(sink.render().decode()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


class Metered:
    """An OpenTelemetry sink, and what the app's SDK makes of it."""

    def __init__(self, **options: Any) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])
        self.sink = OpenTelemetrySink(self.provider, **options)

    def read(self) -> dict[str, dict[Labels, Any]]:
        data = self._reader.get_metrics_data()
        self.provider.shutdown()
        return {
            metric.name: {labelled(point.attributes or {}): point for point in metric.data.data_points}
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def labelled(labels: Mapping[str, object]) -> Labels:
    return frozenset((name, str(value)) for name, value in labels.items())


def of(**labels: str) -> Labels:
    return frozenset(labels.items())


def test_prometheus_counts_calls_and_durations() -> None:
    sink = PrometheusSink(**ASKED)
    sink.write(BATCH)
    found = prometheus(sink)

    def result(
        status: str, reason: str = "", outcome: str = "completed", environment: str = "prod"
    ) -> Labels:
        return of(environment=environment, status=status, reason=reason, outcome=outcome)

    assert found["papaours_calls_total"] == {
        result("2xx"): 2,
        result("4xx"): 1,
        result("4xx", "key_inactive"): 1,
        result("none", "", "failed", "test"): 1,
        result("2xx", "", "started"): 1,
    }
    assert found["papaours_refusals_total"] == {of(reason="unknown_key"): 7}
    durations = found["papaours_call_duration_seconds_count"]
    assert durations == {  # a call that has not ended has no duration
        of(environment="prod", status="2xx"): 2,
        of(environment="prod", status="4xx"): 2,
        of(environment="test", status="none"): 1,
    }
    assert found["papaours_call_duration_seconds_sum"][of(environment="prod", status="2xx")] == 3.02
    buckets = found["papaours_call_duration_seconds_bucket"]
    assert buckets[of(environment="prod", status="4xx", le="0.005")] == 1
    assert buckets[of(environment="prod", status="4xx", le="0.025")] == 2
    assert found["papaours_route_calls_total"][of(route="other", status="4xx")] == 1
    assert found["papaours_route_calls_total"][of(route="/contrats/{id}", status="2xx")] == 3
    assert found["papaours_key_calls_total"][of(key_id="other", status="4xx")] == 1  # one key was asked for
    assert found["papaours_machine_calls_total"][of(machine_id="machine_2", status="4xx")] == 1


def test_opentelemetry_counts_the_same() -> None:
    metered = Metered(**ASKED)
    metered.sink.write(BATCH)
    found = metered.read()
    calls = {labels: point.value for labels, point in found["papaours.calls"].items()}
    prod = {"papaours.environment": "prod", "papaours.outcome": "completed"}
    assert calls == {
        labelled({**prod, "http.response.status_code": 200}): 1,
        labelled({**prod, "http.response.status_code": 204}): 1,
        labelled({**prod, "http.response.status_code": 404}): 1,
        labelled({**prod, "http.response.status_code": 401, "error.type": "key_inactive"}): 1,
        labelled({**prod, "papaours.environment": "test", "papaours.outcome": "failed"}): 1,
        labelled({**prod, "http.response.status_code": 200, "papaours.outcome": "started"}): 1,
    }
    assert found["papaours.refusals"][labelled({"error.type": "unknown_key"})].value == 7
    slow = found["papaours.call.duration"][
        labelled({"papaours.environment": "prod", "http.response.status_code": 204})
    ]
    assert (slow.count, slow.sum, slow.explicit_bounds[0]) == (1, 3.0, 0.005)
    routes = found["papaours.route.calls"]
    assert routes[labelled({"http.route": "other", "http.response.status_code": 404})].value == 1
    assert (
        labelled({"papaours.key.id": "other", "http.response.status_code": 401})
        in found["papaours.key.calls"]
    )
    assert len(found["papaours.machine.calls"]) == 5


def test_what_was_not_asked_for_is_not_there() -> None:
    sink, metered = PrometheusSink(), Metered()
    sink.write(BATCH)
    metered.sink.write(BATCH)
    names = {*prometheus(sink), *metered.read()}
    assert not [name for name in names if any(word in name for word in ("route", "key", "machine"))]


def series(sink: PrometheusSink) -> int:
    return sum(len(samples) for name, samples in prometheus(sink).items() if not name.endswith("_bucket"))


def test_pitfall_31_labels_are_bounded_in_number_and_hold_nothing_a_client_makes_up() -> None:
    def absurd(number: int) -> Event:
        return event(
            number,
            address=f"192.0.2.{number}",
            method=f"M{number}",
            route=f"/secret-{number}",
            environment=f"env{number}",
            reason=f"reason{number}",
            outcome=f"outcome{number}",
            status=number * 7,
            key_id=f"key_{number}",
            machine_id=f"machine_{number}",
            request_id=f"r-{number}",
            service=f"s{number}",
        )

    refusals = [Refusals(0, f"reason{number}", f"192.0.{number}.0/24", 1) for number in range(500)]
    sink = PrometheusSink(routes=["/a"], max_keys=3, max_machines=3)
    sizes = []
    for round_ in range(2):
        events = [absurd(number + 5_000 * round_) for number in range(5_000)]
        sink.write(Batch("p", round_, events, refusals))
        sizes.append(series(sink))
    assert sizes[0] < 700  # 21 environments by 6 classes of status, three times, and little else
    assert sizes[1] <= sizes[0] + 10
    text = sink.render().decode()
    assert not [word for word in ("192.0", "secret", "M12", "r-12", "s12") if word in text]
    metered = Metered(routes=["/a"], max_keys=3, max_machines=3)
    metered.sink.write(Batch("p", 1, [absurd(number) for number in range(5_000)], refusals))
    names = {value for metric in metered.read().values() for labels in metric for _, value in labels}
    assert len(names) < 600  # 500 codes of status are the app's to send
    assert not [name for name in names if "192.0" in name or "secret" in name or "r-" in name]


def test_a_batch_that_comes_again_is_not_counted_again() -> None:
    sink, metered = PrometheusSink(), Metered()
    for given in (BATCH, BATCH, Batch("q", 1, [event()]), Batch("p", 2, [event()]), BATCH):
        sink.write(given)
        metered.sink.write(given)
    assert sum(prometheus(sink)["papaours_calls_total"].values()) == 8
    assert sum(point.value for point in metered.read()["papaours.calls"].values()) == 8


def test_what_is_remembered_of_batches_is_bounded() -> None:
    sink = PrometheusSink()
    for number in range(1_500):
        sink.write(Batch(f"p{number}", 1, [event()]))
    assert len(sink._tallier._counted) == 1_000
    assert sum(prometheus(sink)["papaours_calls_total"].values()) == 1_500


def test_a_sink_that_failed_in_a_tee_has_nothing_counted_twice(tmp_path: Path) -> None:
    metrics = PrometheusSink()
    failing = iter([True, False])

    def sometimes(_: Batch) -> None:
        if next(failing):
            raise OSError

    tee = Tee(SQLiteSink(tmp_path / "usage.db"), metrics, CallableSink(sometimes))
    with pytest.raises(OSError):
        tee.write(BATCH)
    tee.write(BATCH)
    assert sum(prometheus(metrics)["papaours_calls_total"].values()) == 6


CALLER = Identity(
    KeyInfo("key_1", "Production", "prod", "", None),
    MachineInfo("machine_1", "Facturation", "cfa-lyon", False),
    (),
    frozenset(),
)


def test_a_recorders_own_numbers_are_told() -> None:
    is_down = True

    def sometimes(_: Batch) -> None:
        if is_down:
            raise OSError

    metrics, metered = PrometheusSink(), Metered()
    recorder = Recorder(CallableSink(sometimes), interval=3600.0, max_pending=2)
    metrics.watch(recorder)
    metered.sink.watch(recorder)
    for _ in range(2):
        recorder.done(begin_call(CALLER, "192.0.2.7", "GET"), Outcome.COMPLETED)
    assert not recorder.flush()
    assert prometheus(metrics)["papaours_usage_pending"] == {of(): 2}
    assert prometheus(metrics)["papaours_usage_sink_failures_total"][of()] >= 1
    is_down = False
    recorder.flush()
    recorder.close()
    recorder.done(begin_call(CALLER, "192.0.2.7", "GET"), Outcome.COMPLETED)  # too late
    found, told, stats = prometheus(metrics), metered.read(), recorder.stats()
    assert stats[:4] == (3, 2, 0, 1)
    for name in ("recorded", "delivered", "lost", "sink_failures"):
        assert found[f"papaours_usage_{name}_total"] == {of(): getattr(stats, name)}
        assert told[f"papaours.usage.{name}"][of()].value == getattr(stats, name)
    assert found["papaours_usage_pending"] == {of(): 0}
    assert told["papaours.usage.pending"][of()].value == 0
    del recorder
    gc.collect()
    assert prometheus(metrics)["papaours_usage_recorded_total"] == {of(): 0}  # it is not kept alive


@pytest.mark.parametrize("door", ["asgi", "wsgi"])
def test_pitfall_28_no_key_is_in_a_label(ring: PepperRing, door: str) -> None:
    metrics, metered = PrometheusSink(max_keys=5), Metered(max_keys=5)
    recorder = Recorder(Tee(metrics, metered.sink), interval=3600.0)
    call_with_canaries(door, ring, recorder, SEED)
    found, told = prometheus(metrics), metered.read()
    assert sum(found["papaours_key_calls_total"].values()) == 1
    assert found["papaours_refusals_total"] == {of(reason=Reason.UNKNOWN_KEY): 1}
    assert SEED[8:] not in metrics.render().decode() + repr(told)


COMMON = """
import os, threading, time
from papaours_auth import Identity
from papaours_auth.model import KeyInfo, MachineInfo
from papaours_auth.usage import Batch, Event, Recorder
from papaours_auth.usage.event import Outcome, begin_call
from papaours_auth.usage.prometheus import PrometheusSink

stop = threading.Event()
"""
RENDERED = """
event = Event(1, "p-1-0", 0, "k", "m", "", "GET", "/", 200, "", "completed", "", "prod", 5, "")
sink = PrometheusSink()
sink.write(Batch("p", 1, [event] * 6))

def calls():
    lines = [line for line in sink.render().decode().splitlines() if line.startswith("papaours_calls_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)

def scrape():
    while not stop.is_set():
        sink.render()

thread = threading.Thread(target=scrape)
thread.start()
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        sink.write(Batch("child", 1, [event]))
        os._exit(0 if calls() == 1 else 1)
    children.append(child)
stop.set()
thread.join()
assert {os.waitpid(child, 0)[1] for child in children} == {0}
assert calls() == 6
"""
# Each recorder of many, so that whichever comes first in a set is met.
BUSY = """
caller = Identity(
    KeyInfo("k", "Production", "prod", "", None), MachineInfo("m", "Facturation", "cfa-lyon", False), (), frozenset()
)
recorders = [Recorder(PrometheusSink(), interval=3600.0) for _ in range(4)]

def busy(recorder):
    while not stop.is_set():
        for _ in range(200):
            recorder.done(begin_call(caller, "192.0.2.7", "GET"), Outcome.COMPLETED)
        recorder.flush()

threads = [threading.Thread(target=busy, args=(recorder,)) for recorder in recorders]
for thread in threads:
    thread.start()
began = time.monotonic()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
took = time.monotonic() - began
stop.set()
for thread in threads:
    thread.join()
assert took < 9, "a recorder that cannot get its sink to end waits for 10 s"
"""


def test_a_child_begins_at_nothing_while_another_thread_renders() -> None:
    run_alone(COMMON + RENDERED)


class Told:
    """Something to hold across a fork, that tells when it was asked."""

    def __init__(self, name: str, told: list[str]) -> None:
        self._name, self._told = name, told

    def before_fork(self) -> None:
        self._told.append(f"hold {self._name}")

    def after_fork(self, *, child: bool) -> None:
        self._told.append(f"let {self._name} go")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_pitfall_22_a_fork_holds_recorders_before_the_locks_their_sinks_need() -> None:
    told: list[str] = []
    sink, recorder = Told("sink", told), Told("recorder", told)
    hold_across_fork(sink)
    hold_across_fork(recorder, first=True)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert told == ["hold recorder", "hold sink", "let sink go", "let recorder go"]


def test_pitfall_22_a_fork_does_not_wait_for_a_sink_that_waits_for_it() -> None:
    run_alone(COMMON + BUSY)


WORKER = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from papaours_auth.usage import Batch, Event
from papaours_auth.usage.prometheus import PrometheusSink
sink = PrometheusSink()
call = Event(1, "p-1-0", 0, "k", "m", "", "GET", "/", 200, "", "completed", "", "prod", 5, "")
child = os.fork()
sink.write(Batch("child" if child == 0 else "parent", 1, [call]))
if child:
    assert os.waitpid(child, 0)[1] == 0
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
"""


def test_prometheus_client_adds_up_the_processes_where_it_is_told_to(tmp_path: Path) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, check=True, env=environ
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("papaours_calls_total")]
    assert [line.rpartition(" ")[2] for line in lines] == ["2.0"]


def test_a_registry_of_the_apps_own_takes_one_sink() -> None:
    registry = CollectorRegistry()
    PrometheusSink(registry).write(BATCH)
    assert registry.get_sample_value("papaours_refusals_total", {"reason": "unknown_key"}) == 7
    with pytest.raises(ConfigurationError, match="already"):
        PrometheusSink(registry)


@pytest.mark.parametrize("options", [{"routes": "/a"}, {"max_keys": -1}, {"max_machines": -1}])
def test_what_is_set_up_wrongly_is_told_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        PrometheusSink(**options)
    with pytest.raises(ConfigurationError):
        OpenTelemetrySink(MeterProvider(), **options)


@pytest.mark.parametrize(
    ("module", "missing"), [("prometheus", "prometheus_client"), ("opentelemetry", "opentelemetry.metrics")]
)
def test_without_the_library_one_is_told_what_to_install(module: str, missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"try: import papaours_auth.usage.{module}\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigurationError")
    assert f"papaours-auth[{module}]" in said
