"""Signs of compromise: what is found, what is not, and that nothing loses, doubles or leaks an alert."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.event import listen
from sqlalchemy.pool import NullPool

from papaours_auth import cli, cli_signs
from papaours_auth.exceptions import ConfigurationError, InvalidInput, NotFound, StoreUnavailable
from papaours_auth.usage import Batch, Event, Recorder, Refusals, Sign, alert_table, open_sink
from papaours_auth.usage import watch as watch_module
from papaours_auth.usage.alerts import TITLES, Alert, Book, Finding, Subject, worse
from papaours_auth.usage.ledger import prefixed
from papaours_auth.usage.ledger_sql import SignsTables, SQLLedger
from papaours_auth.usage.mix import Mix
from papaours_auth.usage.novelty import Familiar
from papaours_auth.usage.repetition import Repetition
from papaours_auth.usage.rhythm import Rhythm
from papaours_auth.usage.signs import Clock, Detector, KeyHabits, networks_of, route_group
from papaours_auth.usage.sql import SQLSink
from papaours_auth.usage.sqlite import Retention, SQLiteSink
from papaours_auth.usage.watch import Watch, WatchingSink
from support.servers import wait_until
from support.sql_servers import MOST, SERVERS, SQLServer

MINUTE = 60_000_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
START = int(
    (TODAY - timedelta(days=70 + TODAY.weekday())).timestamp() * 1e6
)  # a Monday, which no sink forgets yet
KEPT = Retention(events=1000)
HOME, THIEF = "192.0.2.7", "203.0.113.9"
KEY_TEXT = "pk_prod_canary0Canary1canary2"


def call(at: int, **given: Any) -> Event:
    """One ordinary call, so many µs after the start."""
    return Event(
        1, f"e-{at}", START + at, given.get("key", "key-1"), "machine-1", given.get("address", HOME),
        given.get("method", "GET"), given.get("route", "/v1/contrats/{id}"), given.get("status", 200),
        given.get("reason", ""), "completed", "", "prod", 5, "",
    )  # fmt: skip


def ordinary(days: int, *, begin: int = 0, per_hour: int = 3, **given: Any) -> Iterator[Event]:
    """An office: so many calls in each hour of the working days, and fewer on the others."""
    for hour in range(begin * 24, (begin + days) * 24):
        working = hour // 24 % 7 < 5 and 8 <= hour % 24 < 18
        for number in range(per_hour if working else 1):
            yield call(hour * HOUR + number * MINUTE, **given)


def refused(
    at: int, network: str = "198.51.100.0/24", reason: str = "unknown_key", calls: int = 1
) -> Refusals:
    return Refusals((START + at) // MINUTE * MINUTE, reason, network, calls)


def found(detector: Detector, fed: Iterable[Event | Refusals]) -> list[Finding]:
    return [
        finding
        for one in fed
        for finding in (detector.refusals(one) if isinstance(one, Refusals) else detector.event(one))
    ]


def signs(detector: Detector, fed: Iterable[Event | Refusals]) -> set[Sign]:
    return {finding.sign for finding in found(detector, fed)}


@pytest.fixture
def learned() -> Detector:
    """A detector that has known key-1 for five weeks, in which nothing was unusual."""
    detector = Detector()
    assert found(detector, ordinary(35)) == []
    return detector


NOW = 35 * DAY + 10 * HOUR  # a Monday morning, when `learned` is


# the four signs


def test_a_call_from_a_new_network_is_a_sign_and_another_address_of_a_known_one_is_not(
    learned: Detector,
) -> None:
    assert found(learned, [call(NOW, address="192.0.2.200")]) == []
    (finding,) = found(learned, [call(NOW, address=THIEF)])
    assert finding.sign is Sign.ADDRESSES
    assert finding.evidence == {"networks": ["203.0.113.0/24"], "calls": 1, "known_networks": 1, "days": 35}
    assert found(learned, [call(NOW + 2 * DAY, address=THIEF)]) == []  # told once; known since


@pytest.mark.parametrize(
    ("known", "near", "far"),
    [
        ("2001:db8:1::1", "2001:db8:1:ffff::2", "2001:db8:2::1"),
        ("::ffff:192.0.2.1", "192.0.2.9", "192.0.3.9"),
    ],
)
def test_networks_are_24_and_48_bits_wide(known: str, near: str, far: str) -> None:
    assert networks_of(known)[0] == networks_of(near)[0] != networks_of(far)[0]


def test_a_client_that_roams_is_judged_by_wider_networks() -> None:
    detector = Detector()
    roaming = [call(day * DAY + HOUR, address=f"10.7.{day}.1") for day in range(60)]
    alerts = found(detector, roaming)
    assert 1 <= len(alerts) <= 3  # then it is known to roam
    assert found(detector, [call(61 * DAY, address="10.7.99.1")]) == []
    assert signs(detector, [call(61 * DAY, address="10.8.1.1")]) == {Sign.ADDRESSES}


def test_one_that_roams_everywhere_is_judged_by_how_many_a_day_brings() -> None:
    detector = Detector()
    found(detector, [call(day * DAY + HOUR, address=f"10.{day}.1.1") for day in range(60)])
    assert found(detector, [call(60 * DAY + HOUR, address="11.1.1.1")]) == []
    flood = [call(60 * DAY + HOUR + number, address=f"12.{number}.1.1") for number in range(6)]
    assert signs(detector, flood) == {Sign.ADDRESSES}


def test_nothing_is_new_while_it_is_learned() -> None:
    detector = Detector()
    early = [call(day * DAY, address=f"10.{day}.0.1", route=f"/r{chr(97 + day)}") for day in range(20)]
    assert found(detector, [*early, *ordinary(1)]) == []
    sparse = [call(day * DAY) for day in range(0, 44, 4)]  # 11 calls: too few to know it after three weeks
    assert found(Detector(), [*sparse, call(44 * DAY, address=THIEF)]) == []
    assert signs(Detector(), [*sparse, call(44 * DAY), call(49 * DAY), call(49 * DAY + 1, address=THIEF)])


def test_many_calls_are_a_sign_while_they_come(learned: Detector) -> None:
    findings = found(learned, [call(NOW + n * 10_000_000, address=HOME) for n in range(200)])
    assert {finding.sign for finding in findings} == {Sign.RISE}
    assert findings[0].time < START + NOW + 10 * MINUTE  # not when the hour is over
    assert len(findings) < 20  # told again when it has grown, not with each call
    assert (findings[0].evidence["in"], findings[0].evidence["expected"]) == ("hour", 3)


def test_calls_of_an_office_are_a_rise_at_night() -> None:
    """The same count is usual at eleven, and much too much at three: that is what a season is for."""

    def office() -> Detector:
        detector = Detector()
        assert found(detector, ordinary(35, per_hour=60)) == []
        return detector

    day = [call(35 * DAY + 11 * HOUR + n * 500_000) for n in range(60)]
    night = [call(35 * DAY + 3 * HOUR + n * 500_000) for n in range(60)]
    weekend = [call(40 * DAY + 11 * HOUR + n * 500_000) for n in range(60)]
    assert found(office(), day) == []
    assert signs(office(), night) == {Sign.RISE}
    assert signs(office(), [*ordinary(5, begin=35, per_hour=60), *weekend]) == {Sign.RISE}


def test_usual_bursts_are_no_sign_and_a_greater_one_is() -> None:
    def bursting(days: range, size: int) -> Iterator[Event]:
        for day in days:
            at = day * DAY + (day * 5 % 23) * HOUR
            burst = [call(at + n * 100_000) for n in range(size if day % 3 == 0 else 0)]
            yield from sorted([*ordinary(1, begin=day), *burst], key=lambda event: event.time)

    detector = Detector()
    found(detector, bursting(range(28), 100))
    assert found(detector, bursting(range(28, 48), 100)) == []
    assert signs(detector, bursting(range(48, 49), 600)) == {Sign.RISE}


def test_a_small_rise_that_lasts_is_found_where_its_hours_alone_are_not_out_of_the_usual() -> None:
    detector = Detector()
    found(detector, ordinary(35, per_hour=40))
    lasting = [call(NOW + hour * HOUR + n * MINUTE // 2) for hour in range(5) for n in range(84)]
    findings = found(detector, lasting)
    assert {finding.sign for finding in findings} == {Sign.RISE}
    assert START + NOW + 2 * HOUR <= findings[0].time < START + NOW + 5 * HOUR


LISTED, READ, WRITTEN = ("/v1/contrats", "/v1/contrats/{id}", "/v1/factures")


def mixed(days: int, *, begin: int = 0, import_of: int = 0) -> Iterator[Event]:
    """30 calls an hour, most of them to one route; on each third day an import, alike but for its size."""
    for hour in range(begin * 24, (begin + days) * 24):
        size = import_of if hour % 72 == 10 else 0
        for number in range(30 + size):
            route = LISTED if number % 10 else READ if number % 20 else WRITTEN
            yield call(hour * HOUR + number * 1_000_000, route=route)


def test_calls_out_of_proportion_are_a_rise_below_what_a_burst_may_have() -> None:
    def importing() -> Detector:
        detector = Detector()
        assert found(detector, mixed(35, import_of=300)) == []
        return detector

    alike = [event for event in mixed(1, begin=35, import_of=100) if event.time < START + NOW + HOUR]
    harvest = [call(NOW + n * 1_000_000, route=READ) for n in range(100)]
    before = [event for event in alike if event.time < START + NOW]
    assert found(importing(), alike) == []
    findings = found(importing(), [*before, *harvest])
    assert {finding.sign for finding in findings} == {Sign.RISE}
    calls, strange = findings[0].evidence["calls"], findings[0].evidence["out_of_mix"]
    assert isinstance(calls, int)
    assert isinstance(strange, int)
    assert 8 <= strange < calls < 100


def test_a_slow_harvest_is_found_in_the_day_where_no_hour_tells() -> None:
    def slowly(routes: list[str]) -> list[Finding]:
        detector = Detector()
        found(detector, mixed(34))
        harvest = [call(34 * DAY + n * HOUR // 17, route=routes[n % len(routes)]) for n in range(17 * 24)]
        fed = sorted([*mixed(1, begin=34), *harvest], key=lambda event: event.time)
        return found(detector, fed)

    assert {(finding.sign, finding.evidence["in"]) for finding in slowly([READ])} == {(Sign.RISE, "day")}
    assert slowly([LISTED] * 18 + [READ, WRITTEN]) == []


def test_other_proportions_without_more_calls_are_no_sign() -> None:
    detector = Detector()
    found(detector, mixed(35))
    before = [event for event in mixed(1, begin=35) if event.time < START + NOW]
    assert found(detector, [*before, *(call(NOW + n * 1_000_000, route=READ) for n in range(30))]) == []


def test_a_route_without_a_share_is_the_sign_of_resources_alone() -> None:
    detector = Detector()
    found(detector, mixed(35, import_of=300))
    before = [event for event in mixed(1, begin=35) if event.time < START + NOW]
    news = [call(NOW + n * 1_000_000, route="/v1/secrets") for n in range(100)]
    assert signs(detector, [*before, *news]) == {Sign.RESOURCES}


def test_a_job_of_the_night_may_follow_the_change_of_clocks() -> None:
    def nightly(days: range, hour: int) -> Iterator[Event]:
        for day in days:
            yield from (call(day * DAY + hour * HOUR + n * 10_000_000) for n in range(200))

    detector = Detector()
    assert found(detector, [*nightly(range(35), 3), *nightly(range(35, 42), 2)]) == []


def test_two_holidays_in_four_weeks_make_no_rise_of_the_days_after() -> None:
    def working(days: Iterable[int]) -> Iterator[Event]:
        for day in days:
            calls = {35: 2, 49: 2, 63: 160}.get(day, 120)
            for hour in range(8, 18):
                yield from (call(day * DAY + hour * HOUR + n * MINUTE // 3) for n in range(calls))

    assert found(Detector(), working(range(64))) == []


def test_proportions_are_bounded_and_begin_anew_where_all_were_forgotten() -> None:
    mix = Mix()
    for day in range(3):
        for number in range(500):
            mix.count(f"read /{day}-{number}")
        mix.end_hour()
        mix.end_day()
    assert all(len(names) <= 49 for names in mix.state())
    for _ in range(200):
        mix.end_day()
    mix.count("read /0-0")
    assert mix.state()[0] == {}
    assert (mix.of_hour(), mix.of_day()) == (0.0, 0.0)


def test_growth_raises_what_is_expected() -> None:
    detector = Detector()
    growing = (
        event for week in range(9) for event in ordinary(7, begin=week * 7, per_hour=round(5 * 1.4**week))
    )
    assert found(detector, growing) == []


@pytest.mark.parametrize(
    "reason", ["key_inactive", "key_expired", "network_not_allowed", "wrong_environment"]
)
def test_failures_of_a_known_key_are_a_sign_in_a_burst(learned: Detector, reason: str) -> None:
    failing = [call(NOW + n * 1_000_000, status=401, reason=reason) for n in range(12)]
    assert found(learned, failing[:9]) == []
    findings = found(learned, failing[9:])
    assert {finding.sign for finding in findings} == {Sign.ERRORS}
    assert findings[-1].evidence == {
        "failures": 12,
        "minutes": 20,
        "reasons": [reason],
        "networks": ["192.0.2.0/24"],
    }


def test_failures_are_a_sign_low_and_slow(learned: Detector) -> None:
    hourly = [call(NOW + n * HOUR, status=401, reason="key_expired") for n in range(20)]
    (first, *_) = found(learned, hourly)
    assert (first.sign, first.evidence["minutes"]) == (Sign.ERRORS, 24 * 60)
    detector = Detector()
    daily = [refused(day * DAY + n * 5 * HOUR) for day in range(8) for n in range(4)]
    (first, *_) = found(detector, daily)
    assert first.evidence["minutes"] == 7 * 24 * 60


def test_a_few_failures_now_and_then_are_none(learned: Detector) -> None:
    rare = [call(NOW + n * 3 * DAY, status=401, reason="key_expired") for n in range(10)]
    assert Sign.ERRORS not in signs(learned, rare)
    assert found(Detector(), [refused(day * DAY, calls=3) for day in range(30)]) == []


def test_who_fails_every_day_is_told_once_and_then_when_it_is_much_worse() -> None:
    detector = Detector()
    steady = [refused(day * DAY + n * 2 * HOUR) for day in range(40) for n in range(8)]
    findings = found(detector, steady)
    assert findings
    assert findings[-1].time < START + 20 * DAY
    assert signs(detector, [refused(41 * DAY, calls=60)]) == {Sign.ERRORS}


def test_refusals_without_a_known_key_are_told_of_their_network() -> None:
    (finding,) = found(Detector(), [refused(0, calls=5), refused(4 * MINUTE, calls=600)])
    assert finding.subject == Subject("network", "198.51.100.0/24")
    assert finding.severity == "high"
    assert finding.evidence["failures"] == 605


@pytest.mark.parametrize("reason", ["missing_key", "store_unavailable"])
def test_a_missing_key_is_no_attempt_and_an_outage_is_nobodys_fault(learned: Detector, reason: str) -> None:
    assert found(learned, [refused(NOW, reason=reason, calls=10_000)]) == []
    assert found(learned, [call(NOW + n, status=503, reason="store_unavailable") for n in range(15)]) == []


def test_the_first_call_to_a_group_of_routes_is_a_sign_and_another_object_of_a_known_one_is_not(
    learned: Detector,
) -> None:
    assert found(learned, [call(NOW, route="/v1/contrats/4711")]) == []
    (reading,) = found(learned, [call(NOW, route="/v1/paies/{id}")])
    (writing,) = found(learned, [call(NOW, method="DELETE")])
    assert (reading.sign, reading.severity) == (Sign.RESOURCES, "low")
    assert (writing.sign, writing.severity) == (Sign.RESOURCES, "medium")
    assert writing.evidence["routes"] == ["write /v1/contrats/*"]


def test_a_burst_of_403_is_a_sign_and_a_few_are_not(learned: Detector) -> None:
    denied = [call(NOW + n * MINUTE, status=403, reason="insufficient_rights") for n in range(12)]
    assert found(learned, denied[:9]) == []
    findings = found(learned, denied[9:])
    assert {finding.sign for finding in findings} == {Sign.RESOURCES}
    assert findings[-1].evidence["refused"] == 12


def test_404_counts_where_paths_are_guessed_and_teaches_nothing(learned: Detector) -> None:
    missing = [call(NOW - HOUR + n, status=404) for n in range(15)]  # a contract that is gone
    assert found(learned, missing) == []
    assert found(learned, [call(NOW, status=404, route="/nowhere")]) == []
    guessed = [call(NOW + n, status=404, route=f"/{chr(97 + n)}dmin") for n in range(12)]
    findings = found(learned, guessed)
    assert {finding.sign for finding in findings} == {Sign.RESOURCES}
    assert signs(learned, [call(NOW, route="/admin")]) == {Sign.RESOURCES}  # it exists: new all the same


@pytest.mark.parametrize(
    ("method", "route", "group"),
    [
        ("GET", "/v1/contrats/{id}", ("read /v1/contrats/*", "contrats")),
        ("HEAD", "/v1/contrats/12?x=1", ("read /v1/contrats/*", "contrats")),
        ("PATCH", "/v2/Contrats/<int:id>/lignes/9", ("write /v2/contrats/*/lignes", "contrats")),
        ("GET", "/a/b/c/d/e", ("read /a/b/c", "a")),
        ("GET", "/", ("read /", "")),
        ("GET", "", ("read /", "")),
        ("GET", "/x/" + "é" * 300, ("read /x/*", "x")),
        ("GET", f"/v1/{KEY_TEXT}", ("read /v1/*", "*")),
        ("GET", "/pk_prod_abcdefghijklmnop", ("read /*", "*")),
    ],
)
def test_routes_are_put_in_groups(method: str, route: str, group: tuple[str, str]) -> None:
    assert route_group(method, route) == group


# time


def test_absurd_times_raise_nothing_and_cost_nothing(learned: Detector) -> None:
    absurd = [-START, (1 << 62) - START, 365 * DAY * 60, -365 * DAY * 50]
    for at in absurd:
        found(learned, [call(at), call(NOW), refused(at)])
    assert found(learned, [call(NOW + n * HOUR) for n in range(6)]) == []
    assert signs(learned, [call(NOW + 6 * HOUR + n * 10_000_000) for n in range(200)]) == {Sign.RISE}
    assert KeyHabits(learned.habits["key key-1"].dump()).dump() == learned.habits["key key-1"].dump()


def test_a_key_that_begins_with_an_absurd_time_still_learns_for_three_weeks() -> None:
    for at in (-START, 365 * DAY * 60):
        detector = Detector()
        assert found(detector, [call(at), *ordinary(13), call(13 * DAY, address=THIEF)]) == []
        assert signs(detector, [*ordinary(25, begin=13), call(38 * DAY, address="198.18.0.1")])


def test_time_is_believed_when_two_agree() -> None:
    clock = Clock()
    assert [clock.take(at) for at in (0, DAY, 10 * DAY, 10 * DAY + HOUR)] == [True, True, False, True]
    assert clock.now == 10 * DAY + HOUR
    assert [clock.take(at) for at in (4 * DAY, 5 * DAY)] == [False, True]  # and back again
    assert [clock.take(at) for at in (90 * DAY, 5 * DAY, 90 * DAY)] == [False, True, False]
    weekly = Clock()
    for week in range(30):
        weekly.take(week * 7 * DAY)
    assert weekly.now == 28 * 7 * DAY  # one behind, and going on
    assert weekly.age == weekly.now


def test_events_out_of_order_find_the_same() -> None:
    events = [*ordinary(35), *(call(NOW + n * 10_000_000, address=THIEF) for n in range(200))]
    swapped = events.copy()
    for place in range(0, len(swapped) - 3, 3):
        swapped[place], swapped[place + 2] = swapped[place + 2], swapped[place]
    assert signs(Detector(), events) == signs(Detector(), swapped) == {Sign.ADDRESSES, Sign.RISE}
    assert (
        found(Detector(), [event for event in ordinary(60) for _ in range(2)]) == []
    )  # nor does doubling harm


def test_a_late_delivery_raises_nothing(learned: Detector) -> None:
    found(learned, ordinary(1, begin=35))
    assert found(learned, [call(35 * DAY + 9 * HOUR + n) for n in range(500)]) == []


# bounds


def test_pitfall_17_a_flood_of_networks_and_routes_grows_no_key() -> None:
    habits = KeyHabits()
    for number in range(3000):
        address = f"{number % 200 + 1}.{number // 200}.7.1"
        route = f"/{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}{chr(97 + number // 676)}/x"
        for _ in habits.event(call(number * MINUTE, address=address, route=route, status=200)):
            pass
        for _ in habits.event(call(number * HOUR, status=401, reason="key_expired")):
            pass
    assert len(habits.dump()) < 60_000


def test_pitfall_17_a_flood_of_keys_or_networks_is_bounded_and_hides_no_slow_one() -> None:
    detector = Detector(most=100)
    slow = [refused(day * DAY + n * 5 * HOUR, calls=2) for day in range(7) for n in range(4)]
    told = []
    for number, one in enumerate(slow):
        later = one.minute - START + MINUTE
        flood = [refused(later, f"10.{number}.{other}.0/24") for other in range(150 if number else 0)]
        told += found(detector, [one, *flood])
    assert {finding.subject.id for finding in told} == {"198.51.100.0/24"}
    found(detector, [call(n, key=f"key-{n}") for n in range(1000)])
    assert len(detector.habits) <= 100


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Event,
            st.just(1),
            st.text(max_size=5),
            st.integers(-(1 << 62), 1 << 62),
            st.sampled_from(["a", "b"]),
            st.text(max_size=5),
            st.one_of(st.text(max_size=64), st.ip_addresses().map(str)),
            st.text(max_size=16),
            st.text(max_size=256),
            st.integers(-1, 70_000),
            st.one_of(st.just(""), st.text(max_size=64)),
            st.just(""),
            st.just(""),
            st.just(""),
            st.integers(0, 1 << 32),
            st.just(""),
        ),
        max_size=40,
    )
)
def test_no_event_harms_the_detector_and_its_state_comes_back_as_it_was(events: list[Event]) -> None:
    whole, parts = Detector(), Detector()
    for event in events:
        expected = list(whole.event(event))
        parts = Detector(json.loads(json.dumps(parts.states())))  # as if each event came to a new process
        assert list(parts.event(event)) == expected
    assert parts.states() == whole.states()


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5)), max_size=60))
def test_repetition_counts_what_it_was_given(counted: list[tuple[int, int]]) -> None:
    repetition = Repetition()
    for minutes, times in counted:
        told = repetition.count(minutes * MINUTE, times)
        assert told is None or told.times >= 10
    assert repetition.total == sum(times for _, times in counted)


def test_rhythm_forgets_what_is_older_than_five_weeks() -> None:
    rhythm = Rhythm()
    for hour in range(24 * 60):
        rhythm.count(hour)
    assert len(json.dumps(rhythm.state())) < 12_000
    assert rhythm.count(10_000_000) is None  # years later: it begins anew
    assert all(rhythm.count(10_000_000 + hour) is None for hour in range(300) for _ in range(hour % 7))


def test_familiar_forgets_who_was_away_the_longest() -> None:
    familiar = Familiar()
    for number in range(300):
        familiar.meet(f"n-{number}", f"c-{number}", number, learning=True)
        familiar.meet("home", "c-home", number, learning=True)
    assert len(familiar) == 256
    assert "home" in familiar
    assert "n-0" not in familiar


# alerts


def finding(at: int, sign: Sign = Sign.ADDRESSES, **evidence: Any) -> Finding:
    return Finding(sign, Subject("key", "key-1", "machine-1"), START + at, "medium", evidence)


def test_an_open_alert_is_extended_and_a_closed_one_is_not() -> None:
    book = Book()
    book.note(finding(0, networks=["a"], calls=1))
    alert = book.note(finding(23 * HOUR, networks=["b"], calls=2))
    assert (alert.first, alert.last, alert.findings) == (START, START + 23 * HOUR, 2)
    assert alert.evidence == {"networks": ["a", "b"], "calls": 3}
    book.note(finding(3 * DAY, networks=["c"], calls=1))
    assert [len(alert.evidence["networks"]) for alert in book.changed()] == [2, 1]  # type: ignore[arg-type]


def test_evidence_is_of_the_worst_moment_and_lists_are_bounded() -> None:
    book = Book()
    book.note(finding(0, Sign.RISE, calls=100, expected=10.0, ratio=10.0))
    alert = book.note(finding(1, Sign.RISE, calls=500, expected=400.0, ratio=1.25))
    assert alert.evidence == {"calls": 100, "expected": 10.0, "ratio": 10.0}
    for number in range(50):
        alert = book.note(finding(number, networks=[f"n-{number}"], calls=1))
    assert alert.evidence["networks"] == [f"n-{number}" for number in range(10)]
    assert alert.evidence["calls"] == 50


def test_two_signs_on_one_key_within_a_day_are_high() -> None:
    book = Book()
    assert book.note(finding(0)).severity == "medium"
    assert book.note(finding(HOUR, Sign.RESOURCES)).severity == "high"
    assert book.note(finding(2 * HOUR)).severity == "high"
    assert Book().note(finding(3 * DAY)).severity == "medium"
    assert worse("low", "high") == worse("high", "low") == "high"


def test_what_to_do_is_in_the_words_of_the_document() -> None:
    alert = Book().note(finding(0))
    assert alert.next_steps("fr")[0] == "Désactivez immédiatement la clé."
    assert alert.next_steps("fr")[2] == "Mettez à jour vos systèmes avec la nouvelle clé."
    assert alert.next_steps()[0] == "Disable the key immediately."
    assert TITLES[Sign.ADDRESSES]["fr"] == "Des appels API depuis des adresses IP inhabituelles"
    network = Book().note(Finding(Sign.ERRORS, Subject("network", "n"), 0, "medium", {}))
    assert "désactiver" in network.next_steps("fr")[0]
    assert all(set(words) == {"en", "fr"} for words in TITLES.values())


# the usage file


class Place:
    """Where usage is kept, written as the recorder writes it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sink = self.another_sink()
        self.source: Path | str = url
        if isinstance(self.sink, SQLSink):
            self.engine, self._prefix = self.sink._engine, "papaours_"
        else:
            self.source, self._prefix = self.sink.path, ""
            self.engine = create_engine(f"sqlite:///{self.sink.path}", poolclass=NullPool)
        self._batch = count(1)

    def another_sink(self) -> SQLSink | SQLiteSink:
        sink = open_sink(self.url)
        assert isinstance(sink, SQLSink | SQLiteSink)
        sink._retention = KEPT
        return sink

    def write(self, fed: Iterable[Event | Refusals]) -> None:
        listed = list(fed)
        events = [one for one in listed if isinstance(one, Event)]
        refusals = [one for one in listed if isinstance(one, Refusals)]
        self.sink.write(Batch("p", next(self._batch), events, refusals))

    def change(self, statement: str) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql(prefixed(statement, self._prefix))

    def ask(self, statement: str) -> list[Any]:
        with self.engine.connect() as connection:
            rows = connection.exec_driver_sql(prefixed(statement, self._prefix)).all()
        return [tuple(row) for row in rows]


@pytest.fixture(params=["sqlite", "sqlalchemy+sqlite", *MOST])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Place]]:
    """Make places of one kind, in which nothing was recorded."""
    made: list[Place] = []

    def make() -> Place:
        if request.param in SERVERS:
            server: SQLServer = request.getfixturevalue(f"{request.param}_server")
            made.append(Place(server.url(server.database())))
        else:
            made.append(Place(f"{request.param}:///{tmp_path}/usage {len(made)}.db"))
        return made[-1]

    yield make
    for place in made:
        place.engine.dispose()


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    place = new_place()
    place.write(ordinary(35))
    return place


@pytest.fixture
def file(tmp_path: Path) -> Place:
    """A file, for what only files have."""
    place = Place(f"sqlite:///{tmp_path}/usage #.db")
    place.write(ordinary(35))
    return place


def theft(at: int = NOW, calls: int = 6) -> list[Event]:
    return [call(at + n * MINUTE, address=THIEF) for n in range(calls)]


def test_a_watch_reads_each_event_once_and_keeps_what_it_found(place: Place) -> None:
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    assert watch.catch_up() == len(list(ordinary(35)))
    assert watch.alerts() == []
    place.write(theft())
    assert watch.step() == 6
    assert watch.step() == 0
    (alert,) = watch.alerts()
    assert told == [alert]
    assert (alert.sign, alert.first, alert.last) == (Sign.ADDRESSES, START + NOW, START + NOW + 5 * MINUTE)
    assert alert.evidence["calls"] == 6
    place.write(theft(NOW + HOUR, 5))
    watch.step()
    (extended,) = watch.alerts()
    assert (extended.id, extended.evidence["calls"]) == (alert.id, 11)
    assert told == [alert]  # an extension is no news
    assert watch.alerts(sign=Sign.RISE) == []
    assert watch.alerts(since=datetime.now(UTC)) == []


def test_refusals_are_read_as_they_grow_and_never_twice(place: Place) -> None:
    watch = Watch(place.source)
    place.write([refused(NOW, calls=4)])
    watch.catch_up()
    place.write([refused(NOW, calls=4)])  # the same minute: the row grows
    watch.catch_up()
    assert watch.alerts() == []
    place.write([refused(NOW, calls=4), refused(NOW, reason="missing_key", calls=999)])
    watch.catch_up()
    (alert,) = watch.alerts()
    assert (alert.subject.kind, alert.evidence["failures"]) == ("network", 12)
    assert watch.step() == 0


def test_refusals_that_fill_a_batch_make_events_wait(place: Place) -> None:
    place.write([refused(n * MINUTE, f"10.0.{n}.0/24") for n in range(25)])
    watch = Watch(place.source, batch=10)
    assert [watch.step() for _ in range(3)] == [10, 10, 15]
    assert place.ask("select event from usage_signs_position") == [(10,)]


def test_a_restart_between_any_two_events_finds_the_same(new_place: Callable[[], Place]) -> None:
    events = [*ordinary(30), *theft(30 * DAY + HOUR)]
    alerts = []
    for batch in (5000, 97):
        place = new_place()
        place.write(events)
        while Watch(place.source, batch=batch).step():  # each step by a new process
            pass
        alerts.append(Watch(place.source).alerts())
    assert alerts[0] == alerts[1] != []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("where", ["_feed", "_forget", "_log"])
def test_a_step_that_is_killed_loses_and_doubles_nothing(
    place: Place, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, within and after the transaction."""
    Watch(place.source).catch_up()
    place.write(theft())
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(watch_module, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        Watch(place.source).step()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    assert watch.catch_up() == (0 if where == "_log" else 6)
    (alert,) = watch.alerts()
    assert alert.evidence["calls"] == 6


def test_of_two_that_read_the_same_one_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    Watch(place.source).catch_up()
    place.write(theft())
    feed = watch_module._feed

    def overtaken(*given: Any) -> None:
        monkeypatch.setattr(watch_module, "_feed", feed)
        assert Watch(place.source).step() == 6
        feed(*given)

    monkeypatch.setattr(watch_module, "_feed", overtaken)
    slow = Watch(place.source)
    assert slow.step() == 6
    assert slow.step() == 0
    (alert,) = slow.alerts()
    assert alert.evidence["calls"] == 6
    assert alert.findings == 6


def test_several_threads_may_watch_one_file(place: Place) -> None:
    place.write(theft())
    threads = [threading.Thread(target=Watch(place.source, batch=50).catch_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Watch(place.source).catch_up()
    (alert,) = Watch(place.source).alerts()
    assert alert.evidence["calls"] == 6


def test_an_alert_is_told_until_the_telling_works(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Alert] = []

    def notify(alert: Alert) -> None:
        told.append(alert)
        if len(told) < 3:
            raise OSError(KEY_TEXT)

    watch = Watch(place.source, notify=notify)
    watch.catch_up()
    place.write(theft())
    for _ in range(5):
        watch.step()
    assert len(told) == 3
    assert caplog.text.count("sign of compromise") == 1
    assert caplog.text.count("telling of an alert failed: OSError") == 1
    assert KEY_TEXT not in caplog.text


def test_a_reader_goes_on_where_it_stopped_and_a_new_one_hears_of_what_comes(place: Place) -> None:
    place.write(theft())
    known: list[Alert] = []
    Watch(place.source, notify=known.append).catch_up()
    known.clear()
    place.write([call(NOW + HOUR, method="POST")])
    Watch(place.source).catch_up()  # nobody of that name is there to hear
    new: list[Alert] = []
    Watch(place.source, notify=known.append).step()
    Watch(place.source, notify=new.append, reader="new").step()
    assert [alert.sign for alert in known] == [Sign.RESOURCES]
    assert new == []


def test_a_reader_that_was_forgotten_hears_of_what_comes(place: Place) -> None:
    """As where tables are replaced by others."""
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    watch.catch_up()
    place.change("delete from usage_signs_told")
    assert watch.step() == 0
    place.write(theft())
    watch.step()
    assert len(told) == 1


def test_a_worse_alert_is_told_again(place: Place) -> None:
    told: list[str] = []
    watch = Watch(place.source, notify=lambda alert: told.append(f"{alert.sign} {alert.severity}"))
    watch.catch_up()
    for fed in (theft(), theft(NOW + HOUR), [call(NOW + HOUR, method="POST")], theft(NOW + 2 * HOUR)):
        place.write(fed)
        watch.step()
    assert told == ["addresses medium", "resources high", "addresses high"]


def test_a_muted_sign_is_kept_and_not_told(place: Place) -> None:
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    watch.catch_up()
    place.write(theft())
    watch.step()
    (alert,) = watch.alerts()
    muted = watch.mute(alert.id, datetime.fromtimestamp(START / 1e6, UTC) + timedelta(days=50))
    assert muted.muted
    place.write([call(40 * DAY, address="198.18.0.1")])  # closed by now: another, born muted
    watch.step()
    assert [alert.muted for alert in watch.alerts()] == [True, True]
    assert len(told) == 1
    place.write([*ordinary(1, begin=52), call(53 * DAY, address="198.19.0.1")])  # the muting is over
    watch.step()
    assert [alert.muted for alert in watch.alerts()] == [False, True, True]
    assert len(told) == 2
    assert not watch.unmute(alert.id).muted
    assert not any(alert.muted for alert in watch.alerts())


def test_a_muting_that_ends_while_the_alert_goes_on_is_told(place: Place) -> None:
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    watch.catch_up()
    place.write(theft(calls=1))
    watch.step()
    watch.mute(told[0].id, datetime.fromtimestamp((START + NOW + HOUR) / 1e6, UTC))
    place.write([call(NOW + 30 * MINUTE, address=THIEF)])
    watch.step()
    assert len(told) == 1
    place.write([call(NOW + 2 * HOUR, address=THIEF)])
    watch.step()
    assert len(told) == 2


def test_what_cannot_be_done_says_so(place: Place) -> None:
    watch = Watch(place.source)
    for wrong in (watch.alert, watch.mute, watch.unmute):
        with pytest.raises(NotFound):
            wrong(4711)
    with pytest.raises(InvalidInput):
        watch.alerts(since=datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point


def test_nothing_is_made_where_nothing_was_recorded(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        Watch(tmp_path / "absent.db").step()
    assert not (tmp_path / "absent.db").exists()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.executescript("create table a(b)")
        with pytest.raises(StoreUnavailable):
            Watch(tmp_path / "other.db").step()
        tables = other.execute("select name from sqlite_schema").fetchall()
    assert tables == [("a",)]  # nothing is made in another's file


@pytest.mark.parametrize("kind", SERVERS)
def test_nothing_is_made_in_a_database_where_nothing_was_recorded(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server: SQLServer = request.getfixturevalue(f"{kind}_server")
    place = Place(server.url(server.database()))
    with pytest.raises(StoreUnavailable, match="recorded"):
        Watch(place.url).step()
    assert inspect(place.engine).get_table_names() == []
    place.engine.dispose()


def test_a_file_is_watched_without_sqlalchemy(file: Place) -> None:
    file.write(theft())
    code = (
        "import sys; sys.modules['sqlalchemy'] = None; from papaours_auth import cli; cli.main(sys.argv[1:])"
    )
    words = ["signs", "--usage", file.url, "--since", "2026-01-01T00:00Z", "--json"]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["sign"] == "addresses"


def test_a_file_that_is_replaced_is_watched_on(file: Place) -> None:
    watch = Watch(file.source)
    watch.catch_up()
    for path in Path(file.source).parent.iterdir():
        path.unlink()
    with pytest.raises(StoreUnavailable):
        watch.step()
    Place(file.url).write(theft())
    assert watch.step() == 6


def test_a_state_of_another_version_is_not_read_and_its_key_learned_anew(place: Place) -> None:
    watch = Watch(place.source)
    watch.catch_up()
    place.change("update usage_signs set state = '[0, \"what only another version knows\"]'")
    place.write(theft())
    assert watch.step() == 6
    assert watch.alerts() == []


def test_events_whose_numbers_began_anew_are_read(place: Place) -> None:
    """All was forgotten by retention, so SQLite gives the numbers again."""
    watch = Watch(place.source)
    watch.catch_up()
    place.change("delete from usage_events")
    assert watch.step() == 0
    place.write(theft())
    assert watch.step() == 6
    assert len(watch.alerts()) == 1


def test_states_and_alerts_in_the_file_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(watch_module._MOST, "network", 5)
    monkeypatch.setattr(alert_table, "MOST", 5)
    watch = Watch(place.source)
    place.write([*theft(), *(refused(NOW + n * MINUTE, f"10.0.{n}.0/24", calls=20) for n in range(30))])
    watch.catch_up()
    assert place.ask("select kind, count(*) from usage_signs group by 1") == [("key", 1), ("network", 5)]
    kept = [alert.subject.kind for alert in watch.alerts()]
    assert (kept.count("network"), kept.count("key")) == (5, 1)


def test_refusals_are_remembered_as_long_as_the_file_has_them(place: Place) -> None:
    """Also where no event is left to tell the time by: none is read twice."""
    watch = Watch(place.source)
    place.write([refused(HOUR, calls=9), refused(2 * HOUR, calls=9)])
    watch.catch_up()
    place.change("delete from usage_events")
    assert watch.step() == 0
    place.change(f"delete from usage_refusals where minute = {START + HOUR}")
    place.change(f"update usage_signs_position set turn = {watch_module._TIDY_EVERY}")
    place.write(theft())
    watch.catch_up()
    assert place.ask("select minute from usage_signs_refusals") == [(START + 2 * HOUR,)]
    assert watch.step() == 0


def test_alerts_come_in_process_through_a_sink_and_recording_never_suffers(
    new_place: Callable[[], Place], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Alert] = []
    place = new_place()
    sink = WatchingSink(place.sink, Watch(place.source, notify=told.append))
    with Recorder(sink, interval=3600):
        sink.write(Batch("p", 1, list(ordinary(35))))
    sink.write(Batch("p", 2, theft()))
    sink.write(Batch("p", 2, theft()))  # its reply was lost
    assert [alert.evidence["calls"] for alert in told] == [6]

    def broken(*_: object) -> None:
        raise ValueError(KEY_TEXT)

    monkeypatch.setattr(watch_module, "_feed", broken)
    sink.write(Batch("p", 3, theft(NOW + HOUR)))
    sink.write(Batch("p", 4, theft(NOW + 2 * HOUR)))
    assert caplog.text.count("looking for signs failed: ValueError") == 1
    assert KEY_TEXT not in caplog.text
    assert place.ask("select count(*) from usage_events")[0][0] == len(list(ordinary(35))) + 18


def test_pitfall_28_no_key_is_in_an_alert_a_log_or_a_table(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """An event whose texts are a key's: no recorder writes one, and still."""
    caplog.set_level(1)
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    watch.catch_up()
    canaries = [KEY_TEXT, "pk_prod_abcdefghijklmnopqrstu"]
    fed: list[Event | Refusals] = []
    for number, canary in enumerate(canaries):
        texts = {"route": f"/v1/{canary}/x", "method": canary[:16], "address": canary}
        fed += [call(NOW + n, **texts, status=401, reason=canary) for n in range(20)]
        fed += [call(NOW + n, **texts, status=403) for n in range(20)]
        fed += [call(NOW + number, **texts), refused(NOW, canary, canary, 50)]
    place.write(fed)
    watch.catch_up()
    assert {alert.sign for alert in told} >= {Sign.ERRORS, Sign.RESOURCES}
    dumped = [str(place.ask(f"select * from {table}")) for table in ("usage_signs", "usage_alerts")]
    everything = "\n".join([caplog.text, repr(told), *dumped])
    assert "sign of compromise" in everything
    for canary in canaries:
        assert canary not in everything
        assert canary[8:] not in everything


def test_usage_statements_name_tables_of_usage_alone(file: Place) -> None:
    Watch(file.source).catch_up()
    tables = {name for (name,) in file.ask("select name from sqlite_schema where type = 'table'")}
    assert {name for name in tables if not name.startswith(("usage_", "sqlite_"))} == set()


# servers, where numbers of events are given out before they can be read


class Paused:
    """A recorder of its own, whose batch waits before its commit, or when its events have their numbers."""

    def __init__(
        self,
        place: Place,
        fed: list[Event],
        producer: str = "slow",
        *,
        fails: bool = False,
        numbered: bool = False,
    ) -> None:
        self._sink = place.another_sink()
        assert isinstance(self._sink, SQLSink)
        self._sink.create()
        self._written, self._go, self._fails = threading.Event(), threading.Event(), fails
        if numbered:
            listen(self._sink._engine, "before_cursor_execute", self._wait_numbered)
        else:
            listen(self._sink._engine, "commit", self._wait)
        self._thread = threading.Thread(target=self._write, args=(Batch(producer, 1, fed),))
        self._thread.start()
        assert self._written.wait(20)

    def _wait_numbered(self, connection: Connection, _: object, statement: str, *__: object) -> None:
        if "usage_series" in statement:  # the next after the events, which PostgreSQL has from a COPY
            self._wait(connection)

    def _write(self, batch: Batch) -> None:
        with contextlib.suppress(OSError):
            self._sink.write(batch)

    def _wait(self, connection: Connection) -> None:
        self._written.set()
        assert self._go.wait(60)
        if self._fails:
            connection.invalidate()
            raise OSError("the network is away")

    def finish(self) -> None:
        self._go.set()
        self._thread.join()


@pytest.fixture(params=MOST)
def served(request: pytest.FixtureRequest) -> Iterator[Place]:
    server: SQLServer = request.getfixturevalue(f"{request.param}_server")
    place = Place(server.url(server.database()))
    place.write(ordinary(35))
    yield place
    place.engine.dispose()


def other(number: int) -> Event:
    """A call of another key: nobody waits for the row of a key that a slow batch has."""
    return call(NOW + number, key="key-2")


@pytest.mark.parametrize("served", SERVERS, indirect=True)
@pytest.mark.parametrize("numbered", [True, False])
def test_an_event_that_appears_below_others_is_not_missed(served: Place, numbered: bool) -> None:
    watch = Watch(served.source)
    watch.catch_up()
    slow = Paused(served, theft(), numbered=numbered)
    served.write([other(1), other(2)])
    try:
        assert [watch.catch_up(), Watch(served.source).catch_up()] == [0, 0]
    finally:
        slow.finish()
    assert served.ask("select max(id) from usage_events where key_id = 'key-1'") < served.ask(
        "select min(id) from usage_events where key_id = 'key-2'"
    )
    assert watch.catch_up() == 8
    (alert,) = watch.alerts()
    assert alert.evidence["calls"] == 6


@pytest.mark.parametrize("served", SERVERS, indirect=True)
def test_what_is_not_below_a_batch_under_way_does_not_wait_for_it(served: Place) -> None:
    watch = Watch(served.source)
    watch.catch_up()
    served.write([other(1)])
    slow = Paused(served, theft())
    try:
        assert watch.catch_up() == 1
        served.write([other(2)])
        assert watch.catch_up() == 0
        later = Paused(served, [call(NOW, key="key-3")], "later")
        slow.finish()
        # Of those that worked when 9 could be read, none does: whoever came since adds no lower number.
        assert watch.catch_up() == 7
    finally:
        slow.finish()
    later.finish()
    assert watch.catch_up() == 1


def test_numbers_that_a_batch_took_in_vain_are_not_waited_for(served: Place) -> None:
    watch = Watch(served.source)
    watch.catch_up()
    failing = Paused(served, [other(0)] * 3, fails=True)
    served.write(theft())
    try:
        assert watch.catch_up() == 0
    finally:
        failing.finish()
    # A server ends the transaction of a connection that is gone a moment later.
    wait_until(lambda: watch.catch_up() == 6, 10, what="the batch to be given up")
    assert Watch(served.source).catch_up() == 0


def test_of_batches_that_end_in_any_order_while_two_watch_each_event_is_read_once(served: Place) -> None:
    """The number of calls that a key's state has counted is the number of its events."""
    order = Random(7)
    watches = [Watch(served.source), Watch(served.source)]
    watches[0].catch_up()
    for number in range(8):
        batches = [
            Paused(served, [call(NOW + n, key=f"key-{number}{part}") for n in range(7)], f"p{number}{part}")
            for part in "abc"
        ]
        served.write([other(number)])
        order.shuffle(batches)
        for batch in batches:
            order.choice(watches).step()
            batch.finish()
    looking = [threading.Thread(target=watch.catch_up) for watch in watches]
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join()
    watches[0].catch_up()
    counted = {
        place: json.loads(state)[2] for place, state in served.ask("select place, state from usage_signs")
    }
    expected = {f"key key-{number}{part}": 7 for number in range(8) for part in "abc"}
    assert counted == {"key key-1": len(list(ordinary(35))), "key key-2": 8, **expected}


def test_an_engine_prefix_and_schema_of_ones_own(postgresql_server: SQLServer) -> None:
    name = postgresql_server.database()
    postgresql_server.execute("create schema audit authorization papaours", database=name)
    url = f"{postgresql_server.url(name)}?schema=audit&prefix=auth_"
    Place(url).write([*ordinary(35), *theft()])
    engine = create_engine(postgresql_server.url(name).replace("://", "+psycopg://", 1), poolclass=NullPool)
    assert Watch(SQLLedger(engine, prefix="auth_", schema="audit")).catch_up()
    (alert,) = Watch(url).alerts()
    assert postgresql_server.execute("select id from audit.auth_usage_alerts", database=name) == [(alert.id,)]
    assert set(SignsTables("auth_", "audit").metadata.tables) == {
        f"audit.auth_usage_{table}"
        for table in ("alerts", "signs", "signs_position", "signs_refusals", "signs_told")
    }
    engine.dispose()


def test_a_number_is_not_given_again_where_a_wrong_clock_made_the_newest_event_too_old(place: Place) -> None:
    """Or the one that gets it would not be read."""
    watch = Watch(place.source)
    watch.catch_up()
    place.write([*theft(calls=1), call(-200 * DAY)])
    assert watch.catch_up() == 2
    place.sink._retention = Retention(events=150)
    place.sink._pruned = float("-inf")
    place.write([refused(NOW)])
    assert watch.catch_up() == 1
    assert place.ask(f"select count(*) from usage_events where time < {START}") == [(1,)]  # the newest
    place.write(theft(NOW + MINUTE, calls=1))
    assert watch.catch_up() == 1
    place.sink._pruned = float("-inf")
    place.write([])
    assert place.ask(f"select count(*) from usage_events where time < {START}") == [(0,)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_watch_crosses_a_fork(served: Place) -> None:
    watch = Watch(served.source)
    watch.catch_up()
    served.write(theft())
    child = os.fork()
    if not child:
        os._exit(watch.step())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert watch.step() == 0
    assert len(watch.alerts()) == 1


def test_connections_that_died_in_the_pool_cost_one_step_at_most(postgresql_server: SQLServer) -> None:
    name = postgresql_server.database()
    place = Place(postgresql_server.url(name))
    place.write([*ordinary(35), *theft()])
    watch = Watch(place.source)
    watch.catch_up()
    for _ in range(2):
        postgresql_server.execute(
            f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
        )
        assert watch.mute(1).muted
    place.engine.dispose()


def test_tables_that_went_are_made_again_after_one_failure(served: Place) -> None:
    watch = Watch(served.source)
    watch.catch_up()
    served.change("drop table usage_signs_position")
    with pytest.raises(StoreUnavailable, match="recorded"):
        watch.mute(1)
    assert watch.step() == len(list(ordinary(35)))


def test_tables_that_are_being_made_are_not_watched_yet(served: Place) -> None:
    """MySQL commits at each of them; the version is the last."""
    served.change("delete from usage_schema")
    with pytest.raises(StoreUnavailable, match="recorded"):
        Watch(served.source).step()


def test_tables_that_a_newer_version_made_are_left_alone(served: Place) -> None:
    served.change("update usage_schema set version = 99")
    with pytest.raises(ConfigurationError, match="newer"):
        Watch(served.source).step()


def test_a_muting_between_a_steps_reading_and_its_writing_holds(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Alert] = []
    watch = Watch(place.source, notify=told.append)
    watch.catch_up()
    place.write(theft())
    watch.step()
    place.write([call(40 * DAY, address="198.18.0.1")])  # opens another alert
    feed = watch_module._feed

    def muted_meanwhile(*given: Any) -> None:
        monkeypatch.setattr(watch_module, "_feed", feed)
        Watch(place.source).mute(told[0].id)
        feed(*given)

    monkeypatch.setattr(watch_module, "_feed", muted_meanwhile)
    watch.catch_up()
    assert [alert.muted for alert in watch.alerts()] == [True, True]
    assert len(told) == 1


# the command line


@pytest.fixture
def run(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.delenv("PAPAOURS_USAGE", raising=False)
    monkeypatch.setenv("LANG", "C")
    place.write(theft())

    def typed(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["signs", *words])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return (code, *capsys.readouterr())

    return typed


def test_the_command_lists_shows_and_mutes(
    place: Place,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = place.url
    since = "2026-01-01T00:00Z"
    code, out, err = run("--usage", url, "--since", since)
    assert code == 0
    assert out.splitlines()[0].split()[:4] == ["id", "sign", "severity", "of"]
    assert "addresses" in out
    assert "203.0.113.0/24" in out
    assert "signs show" in err
    assert "sign of compromise" not in caplog.text  # that is the app's
    monkeypatch.setenv("PAPAOURS_USAGE", url)
    assert run("--since", "1h")[1:] == ("", "No sign of compromise.\n")
    assert run("--since", since, "--sign", "rise")[1] == ""

    code, out, _ = run("--json", "--since", since)
    (line,) = out.splitlines()
    alert = json.loads(line)
    assert (alert["sign"], alert["key"], alert["muted"]) == ("addresses", "key-1", False)
    assert alert["evidence"]["calls"] == 6
    assert alert["next"][0] == "Disable the key immediately."
    assert json.loads(run("show", "1", "--json")[1]) == alert
    assert json.loads(run("--json", "show", "1")[1]) == alert

    assert "1. Disable the key immediately." in run("show", "1")[1]
    monkeypatch.setenv("LANG", "fr_FR.UTF-8")
    assert "1. Désactivez immédiatement la clé." in run("show", "1")[1]

    assert "until 20" in run("mute", "1", "--for", "30d")[1]
    assert "for ever" in run("mute", "1")[1]
    assert json.loads(run("--json", "--since", since)[1])["muted"]
    assert not json.loads(run("unmute", "1", "--json")[1])["muted"]


def test_the_commands_exit_codes(
    place: Place, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    url = place.url
    assert run()[0] == 2  # no usage is named
    assert run("--usage", "redis://localhost/0")[0] == 2
    assert run("--usage", "postgresql://user:secret@127.0.0.1:1/x")[0] == 3
    assert run("--usage", url, "--since", "yesterday")[0] == 2
    assert run("--usage", url, "--since", "2026-01-01")[0] == 2
    assert run("--usage", url, "--sign", "luck")[0] == 2
    assert run("mute", "1", "--for", "soon", "--usage", url)[0] == 2
    assert run("mute", "4711", "--usage", url)[0] == 1
    assert run("--usage", str(tmp_path / "absent.db"))[0] == 3
    assert "secret" not in run("--usage", "postgresql://user:secret@127.0.0.1:1/x")[2]


def test_follow_prints_what_comes(
    place: Place, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = count()

    begun = threading.Event.wait  # of threads that connect

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout is None:
            return begun(event)
        turn = next(waits)
        if turn == 0:
            place.write([call(NOW + HOUR, method="POST")])
        elif turn == 2:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(threading.Event, "wait", wait)
    url = place.url
    code, out, _ = run("--usage", url, "--json", "--follow", "--since", "2026-01-01T00:00Z")
    assert code == 130
    assert [json.loads(line)["sign"] for line in out.splitlines()] == ["addresses", "resources"]


def test_absurd_times_of_alerts_are_printed() -> None:
    assert cli_signs._moment(1 << 62).year == 9999
    assert cli_signs._moment(-(1 << 62)).year == 1


# the labelled world


@pytest.mark.slow
def test_a_small_world_is_judged_well() -> None:
    benchmark = pytest.importorskip(
        "benchmarks.signs", reason="benchmarks/ is not here: this is the built wheel"
    )
    figures = {figure.name: figure.value for figure in benchmark.run(0.01).figures}
    for sign in Sign:
        assert figures[f"{sign}: recall"] >= 0.6
        assert figures[f"{sign}: false alarms per key and month"] <= 2.5


def test_the_world_is_the_same_for_the_same_seed() -> None:
    generator = pytest.importorskip("benchmarks.signs.generator", reason="likewise")
    worlds = [generator.World(seed, keys=3, days=20, attacks=0.1) for seed in (7, 7, 8)]
    streams = [list(world.stream()) for world in worlds]
    assert streams[0] == streams[1] != streams[2]
    assert worlds[0].attacks == worlds[1].attacks


def test_the_world_and_the_detector_share_nothing_but_the_event() -> None:
    generator = pytest.importorskip("benchmarks.signs.generator", reason="likewise")
    source = Path(generator.__file__).read_text(encoding="utf-8")
    ours = [line for line in source.splitlines() if "papaours_auth" in line]
    assert ours == ["from papaours_auth.usage.event import Event, Refusals"]


def test_the_log_is_the_apps_to_fill(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    Watch(place.source).catch_up()
    place.write(theft())
    Watch(place.source, log=False).catch_up()  # as the command does
    assert caplog.text == ""
    Watch(place.source).step()
    assert (
        caplog.text.count("sign of compromise 1 (medium): API calls from unusual IP addresses: key key-1")
        == 1
    )
