"""``papaours-auth usage``, as an administrator types it and as a program reads it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from papaours_auth.cli_usage import USAGE_VARIABLE, sparkline
from papaours_auth.usage import Batch, Event
from papaours_auth.usage.reader import micro
from papaours_auth.usage.sqlite import SQLiteSink
from test_cli import MACHINE, NAME, Result, Shell, create

NOW = datetime.now(UTC)
HOURS = [NOW - timedelta(hours=number) for number in (30, 3, 2, 2)]


class Estate:
    """A store with a key and its successor, and what was recorded of the old one, and of a key that is gone."""

    def __init__(self, shell: Shell, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shell = shell
        self.path = path
        self.old = create(shell, "--json").json["id"]
        self.machine = shell("machine", "show", MACHINE, "--json").json["id"]
        monkeypatch.setenv(USAGE_VARIABLE, f"sqlite:///{path}")

    def rotate(self) -> str:
        return self.shell("key", "rotate", NAME, "--json").json["id"]

    def record(self, *events: Event) -> None:
        SQLiteSink(self.path).write(Batch(f"p{len(events)}{id(events)}", 1, events))

    def event(self, at: datetime, key: str = "", machine: str = "", status: int = 200) -> Event:
        return Event(
            1, "p-1-1", micro(at), key or self.old, machine or self.machine, "192.0.2.7", "GET", "/contrats/{id}",
            status, "", "completed", "contrats", "prod", 1_500, "",
        )  # fmt: skip

    def __call__(self, *words: str) -> Result:
        return self.shell("usage", *words)

    def lines(self, *words: str) -> list[dict[str, Any]]:
        answer = self(*words, "--json")
        assert answer.code == 0, answer.err
        return [json.loads(line) for line in answer.out.splitlines()]


@pytest.fixture
def estate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Estate:
    monkeypatch.chdir(tmp_path)
    for name in ("PAPAOURS_STORE", "PAPAOURS_PEPPER", "PAPAOURS_PEPPER_FILE", USAGE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    shell = Shell(capsys, monkeypatch)
    shell.export(shell("init"))
    shell("machine", "create", MACHINE, "--organisation", "cfa-lyon")
    estate = Estate(shell, tmp_path / "usage.db", monkeypatch)
    estate.record(*(estate.event(at) for at in HOURS[:3]), estate.event(HOURS[3], status=404))
    estate.record(estate.event(HOURS[0], "key_gone", "machine_gone"))
    return estate


def iso(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def test_last_used_knows_keys_by_name_and_by_id(estate: Estate) -> None:
    for word in (NAME, estate.old):
        (line,) = estate.lines("last-used", word)
        assert (line["key"], line["name"], line["last"], line["calls"]) == (
            estate.old,
            NAME,
            iso(HOURS[2]),
            4,
        )
    assert NAME in estate("last-used", NAME).out
    (gone,) = estate.lines("last-used", "key_gone")
    assert gone["machine"] == "machine_gone"
    assert estate("last-used", "absent").code == 1


def test_last_used_lists_all_keys_also_those_that_never_were(estate: Estate) -> None:
    new = estate.rotate()
    lines = estate.lines("last-used")
    assert [line["key"] for line in lines] == [estate.old, "key_gone", new]
    assert lines[2]["last"] is None
    (line,) = estate.lines("last-used", new)
    assert (line["last"], line["calls"]) == (None, 0)


def test_unused_keys_are_listed(estate: Estate) -> None:
    assert [line["key"] for line in estate.lines("unused", "--since", "1d")] == ["key_gone"]
    assert [line["key"] for line in estate.lines("unused", "--since", "1h")] == ["key_gone", estate.old]
    assert [line["key"] for line in estate.lines("unused", "--since", "1h", "--machine", MACHINE)] == [
        estate.old
    ]
    answer = estate("unused")
    assert (answer.code, answer.out) == (0, "")
    assert "has been used" in answer.err


def test_a_key_that_was_never_used_is_unused_once_it_is_old_enough(estate: Estate) -> None:
    new = estate.rotate()
    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    assert new in [line["key"] for line in estate.lines("unused", "--since", later)]
    assert new not in [line["key"] for line in estate.lines("unused", "--since", "1h")]


def test_history_is_filtered_and_goes_on_at_its_cursor(estate: Estate) -> None:
    assert len(estate.lines("history")) == 5
    (line,) = estate.lines("history", "--key", NAME, "--status", "404")
    assert (line["time"], line["address"], line["duration"]) == (iso(HOURS[3]), "192.0.2.7", 1_500)
    assert len(estate.lines("history", "--machine", MACHINE, "--since", "5h")) == 3
    assert (
        len(estate.lines("history", "--until", "5h", "--route", "/contrats/{id}", "--address", "192.0.2.7"))
        == 2
    )
    first = estate("history", "--limit", "3")
    assert first.out.count("\n") == 4
    cursor = first.err.split()[-1]
    assert len(estate.lines("history", "--cursor", cursor)) == 2
    assert "No such call" in estate("history", "--status", "500").err


def test_a_series_is_drawn_and_listed(estate: Estate) -> None:
    drawn = estate("series", NAME, "--since", "12h").out.splitlines()
    assert "▅█" in drawn[0]
    assert sum(int(line.split()[-1]) for line in drawn[2:]) == 3
    assert [line["calls"] for line in estate.lines("series", "--machine", MACHINE, "--step", "day")][-1] >= 1
    assert estate("series").code == 2
    assert estate("series", NAME, "--machine", MACHINE).code == 2


def test_calls_are_counted_by_route_and_address(estate: Estate) -> None:
    for question, name, value in (
        ("routes", "route", "/contrats/{id}"),
        ("addresses", "address", "192.0.2.7"),
    ):
        assert [(line[name], line["calls"]) for line in estate.lines(question, NAME)] == [(value, 4)]
        assert value in estate(question, "--machine", MACHINE).out


def test_who_still_uses_a_replaced_key(estate: Estate) -> None:
    assert estate("still-used", NAME).code == 2  # nothing replaces it yet
    assert estate.lines("still-used") == []
    estate.rotate()
    assert "any more" in estate("still-used").err
    after = datetime.now(UTC)
    estate.record(estate.event(after))
    (line,) = estate.lines("still-used")
    assert (line["key"], line["last"], line["addresses"]) == (estate.old, iso(after), ["192.0.2.7"])
    assert estate.lines("still-used", NAME) == [line]
    assert "192.0.2.7" in estate("still-used", estate.old).out
    assert "/contrats/{id}" in estate("still-used").out


def test_a_report_sums_up_a_machine(estate: Estate) -> None:
    (report,) = estate.lines("report", MACHINE)
    assert (report["calls"], report["statuses"]) == (4, {"200": 3, "404": 1})
    assert report["last"] == iso(HOURS[2])
    assert [key["key"] for key in report["keys"]] == [estate.old]
    assert sum(day["calls"] for day in report["days"]) == 4
    shown = estate("report", estate.machine).out
    assert f"{MACHINE}: 4 calls" in shown
    assert "192.0.2.7" in shown
    assert estate("report", "absent").code == 1
    assert estate.lines("report", "machine_gone")[0]["calls"] == 1
    estate.shell("machine", "create", "Autre", "--organisation", "cfa-lyon")
    assert estate("report", "Autre").out.startswith("Autre: 0 calls")


def test_without_a_key_store_ids_do(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAPAOURS_STORE")
    (line,) = estate.lines("last-used", estate.old)
    assert (line["calls"], "name" in line) == (4, False)
    assert len(estate.lines("last-used")) == 2
    assert estate("still-used").code == 2
    assert estate.lines("still-used", estate.old, "--since", "2d")[0]["calls"] == 4
    assert "4 calls" in estate("report", estate.machine).out


def test_what_cannot_be_meant_or_read_has_its_exit_code(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert estate("history", "--since", "yesterday").code == 2
    assert estate("history", "--since", "2026-01-01T00:00").code == 2
    assert estate("history", "--limit", "0").code == 2
    assert estate("history", "--cursor", "x").code == 2
    assert estate("last-used", "--usage", "absent.db").code == 3
    assert estate("last-used", "--usage", "redis://x").code == 2
    assert len(estate.lines("last-used", "--usage", str(estate.path))) == 2
    monkeypatch.delenv(USAGE_VARIABLE)
    answer = estate("last-used")
    assert answer.code == 2
    assert USAGE_VARIABLE in answer.err


@pytest.mark.parametrize(
    ("encoding", "bars"), [("utf-8", "▁▂█"), ("ascii", "_.#"), ("latin-1", "_.#"), (None, "_.#")]
)
def test_a_sparkline_is_plain_where_the_encoding_has_no_bars(encoding: str | None, bars: str) -> None:
    assert sparkline([0, 1, 100], encoding) == bars


def test_a_sparkline_has_a_bounded_width_and_hides_nothing() -> None:
    assert len(sparkline([1] * 1_000)) <= 72
    assert sparkline([0] * 999 + [1])[-1] == "#"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "__"


def test_a_terminal_without_bars_is_drawn_plainly(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii")
    drawn = estate("series", NAME).out.splitlines()[0]
    assert "#" in drawn
    assert drawn.isascii()
