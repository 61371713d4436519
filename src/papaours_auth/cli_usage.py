"""``papaours-auth usage …``: questions about the use of keys, for people (tables) and programs (``--json``)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Final, Self, TypeAlias

from ._middleware import STORE_VARIABLE
from .cli import _SPAN, _UNITS, FINE, _command, _group, _keys, _table, _time
from .cli_streams import as_json, out, say
from .exceptions import ConfigurationError, InvalidInput, NotFound
from .model import Key, Machine
from .usage import Event
from .usage.questions import Count, LastUse, Report, StillUsed, Usage, rotations
from .usage.reader import micro, moment
from .usage.rollup import STEPS, Step

USAGE_VARIABLE: Final = "PAPAOURS_USAGE"
_BARS: Final = "▁▂▃▄▅▆▇█"
_PLAIN: Final = "_.-:=+*#"
_WIDTH: Final = 72
_Row: TypeAlias = Mapping[str, object]


# what commands share


class _Estate:
    """What the key store knows of the keys and machines that are asked about; nothing where none is named."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.keys: dict[str, Key] = {}
        self.machines: dict[str, Machine] = {}
        self.known = bool(options.store or os.environ.get(STORE_VARIABLE))
        with ExitStack() as stack:
            self._store = stack.enter_context(_keys(options)) if self.known else None
            if self._store is not None:
                self.keys = {key.id: key for key in self._store.keys()}  # noqa: SIM118 - no dictionary's
                self.machines = {machine.id: machine for machine in self._store.machines()}
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def key(self, text: str, usage: Usage) -> str:
        """Give the id of a key. One that is deleted is still in what was recorded. Raises `NotFound`."""
        try:
            return self._store.key(text).id if self._store is not None else text
        except NotFound:
            if usage.last_used(text) is None:
                raise
            return text

    def machine(self, text: str, usage: Usage) -> str:
        """Give the id of a machine, likewise."""
        try:
            return self._store.machine(text).id if self._store is not None else text
        except NotFound:
            if not usage.last_uses(machine_id=text):
                raise
            return text

    def of_key(self, key_id: str) -> dict[str, object]:
        """Name a key, and its machine where the store knows it."""
        key = self.keys.get(key_id)
        if key is None:
            return {"key": key_id}
        return {"key": key_id, "name": key.name, "status": key.status}


def usage_url(options: argparse.Namespace) -> str:
    """Give where usage is: ``--usage`` or the environment; a path is a file. Raises `ConfigurationError`."""
    url: str | None = getattr(options, "usage_url", None) or os.environ.get(USAGE_VARIABLE)
    if not url:
        raise ConfigurationError(
            f"no usage is named: set {USAGE_VARIABLE} to what your app records into (sqlite:///usage.db), or give "
            "--usage"
        )
    return url if "://" in url else f"sqlite:///{url}"


def _usage(options: argparse.Namespace) -> Usage:
    return Usage(usage_url(options))


def _moment(text: str) -> datetime:
    span = _SPAN.fullmatch(text)
    try:
        if span is not None:
            return datetime.now(UTC) - timedelta(**{_UNITS[span[2]]: int(span[1])})
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        found = None
    if found is None or found.tzinfo is None:
        raise InvalidInput(
            "a moment is a span before now (90d, 12h, 30m, 4w) or a time with its zone (2027-01-31T00:00Z)"
        )
    return found.astimezone(UTC)


def _since(text: str | None) -> datetime | None:
    return None if text is None else _moment(text)


def _show(rows: Iterable[_Row], options: argparse.Namespace, empty: str) -> None:
    found = list(rows)
    if options.json:
        for row in found:
            out(as_json(row, _plain))
    elif found:
        columns = dict.fromkeys(name for row in found for name in row)
        _table([{name: _cell(row.get(name)) for name in columns} for row in found])
    else:
        say(empty)


def _plain(value: object) -> str:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _counts(counts: Iterable[Count], name: str) -> list[_Row]:
    return [{name: count.of, "calls": count.calls, "last": count.last} for count in counts]


def sparkline(values: Sequence[int], encoding: str | None = None) -> str:
    """Draw numbers as bars, at most 72: neighbors are added up. Plain characters where the encoding has no bars."""
    try:
        _BARS.encode(encoding or "ascii")
        marks = _BARS
    except (UnicodeEncodeError, LookupError):
        marks = _PLAIN
    each = -(-len(values) // _WIDTH) or 1
    sums = [sum(values[place : place + each]) for place in range(0, len(values), each)]
    most = max(sums, default=0)
    return "".join(marks[0] if not value else marks[-(-value * 7 // most)] for value in sums)


def _draw(points: Sequence[tuple[datetime, int]], step: Step, since: datetime) -> str:
    """Draw a series, with the steps it leaves out."""
    width = STEPS[step]
    found = {micro(start): calls for start, calls in points}
    first, last = micro(since) // width * width, micro(datetime.now(UTC)) // width * width
    first = max(first, min(found, default=last))
    steps = range(first, max([last, *found]) + width, width)
    bars = sparkline([found.get(start, 0) for start in steps], sys.stdout.encoding)
    return f"{bars}  {_time(moment(first))} to now"


# the questions


def _last_used(options: argparse.Namespace) -> int:
    usage = _usage(options)
    with _Estate(options) as estate:
        if options.key is not None:
            key = estate.key(options.key, usage)
            found = usage.last_used(key)
            rows = [
                _use(found, estate) if found is not None else {**estate.of_key(key), "last": None, "calls": 0}
            ]
        else:
            uses = usage.last_uses()
            rows = [_use(use, estate) for use in uses]
            rows += _never(estate, {use.key_id for use in uses}, None)
    _show(rows, options, "No call has been recorded yet.")
    return FINE


def _unused(options: argparse.Namespace) -> int:
    usage, since = _usage(options), _moment(options.since)
    with _Estate(options) as estate:
        machine = estate.machine(options.machine, usage) if options.machine is not None else None
        uses = usage.unused_since(since, machine_id=machine)
        used = {use.key_id for use in usage.last_uses(machine_id=machine)}
        rows = [*_never(estate, used, since, machine), *(_use(use, estate) for use in uses)]
    _show(rows, options, "Every key has been used since.")
    return FINE


def _never(
    estate: _Estate, used: set[str], before: datetime | None, machine: str | None = None
) -> Iterator[dict[str, object]]:
    """Name keys that were never used, of those made ``before``: a key made today is not unused yet."""
    for key in estate.keys.values():
        if (
            key.id not in used
            and (before is None or key.created_at < before)
            and machine in (None, key.machine_id)
        ):
            yield {**estate.of_key(key.id), "machine": key.machine_id, "last": None, "calls": 0}


def _use(use: LastUse, estate: _Estate) -> dict[str, object]:
    return {
        **estate.of_key(use.key_id),
        "machine": use.machine_id,
        "last": use.last,
        "calls": use.calls,
        "first": use.first,
    }


def _history(options: argparse.Namespace) -> int:
    usage = _usage(options)
    with _Estate(options) as estate:
        key = estate.key(options.key, usage) if options.key is not None else None
        machine = estate.machine(options.machine, usage) if options.machine is not None else None
    events: list[Event] = []
    cursor = options.cursor
    while len(events) < options.limit:
        page = usage.history(
            key_id=key, machine_id=machine, address=options.address, route=options.route, status=options.status,
            since=_since(options.since), until=_since(options.until), cursor=cursor,
            limit=min(options.limit - len(events), 1_000),
        )  # fmt: skip
        events += page
        cursor = page.cursor
        if cursor is None:
            break
    _show(
        map(_event, events) if not options.json else map(_whole, events), options, "No such call is recorded."
    )
    if cursor is not None:
        say(f"There may be more: --cursor {cursor}")
    return FINE


def _event(event: Event) -> _Row:
    return {
        "time": moment(event.time), "key": event.key_id, "address": event.address, "method": event.method,
        "route": event.route, "status": event.status or "none", "reason": event.reason, "outcome": event.outcome,
        "ms": f"{event.duration / 1000:.1f}",
    }  # fmt: skip


def _whole(event: Event) -> _Row:
    return {**event._asdict(), "time": moment(event.time)}


def _subject(options: argparse.Namespace, usage: Usage) -> tuple[str | None, str | None]:
    with _Estate(options) as estate:
        key = estate.key(options.key, usage) if options.key is not None else None
        machine = estate.machine(options.machine, usage) if options.machine is not None else None
    return key, machine


def _series(options: argparse.Namespace) -> int:
    usage, since = _usage(options), _moment(options.since)
    key, machine = _subject(options, usage)
    points = usage.series(key, options.step, since, _since(options.until), machine_id=machine)
    if points and not options.json:
        out(_draw(points, options.step, since))
    _show(
        ({"start": start, "calls": calls} for start, calls in points), options, "No call is recorded since."
    )
    return FINE


def _routes(options: argparse.Namespace) -> int:
    usage = _usage(options)
    key, machine = _subject(options, usage)
    counts = usage.by_route(
        key, _moment(options.since), _since(options.until), machine_id=machine, limit=options.limit
    )
    _show(_counts(counts, "route"), options, "No call is recorded since.")
    return FINE


def _addresses(options: argparse.Namespace) -> int:
    usage = _usage(options)
    key, machine = _subject(options, usage)
    counts = usage.by_address(
        key, _moment(options.since), _since(options.until), machine_id=machine, limit=options.limit
    )
    _show(_counts(counts, "address"), options, "No call is recorded since.")
    return FINE


def _still_used(options: argparse.Namespace) -> int:
    usage, since = _usage(options), _since(options.since)
    with _Estate(options) as estate:
        rotated = rotations(estate.keys.values())
        if options.key is not None:
            key = estate.key(options.key, usage)
            at = since or rotated.get(key)
            if at is None:
                raise InvalidInput(
                    "no key that is known here replaces this one: name the key store, or say --since"
                )
            rotated = {key: at}
        elif not estate.known:
            raise InvalidInput(
                f"which keys were replaced, the key store knows: set {STORE_VARIABLE}, or name a key"
            )
        found = [usage.still_used(key, since or at) for key, at in rotated.items()]
        rows = [_still(use, estate) for use in found if use is not None]
    if options.key is not None and rows and not options.json:
        _show_users(next(use for use in found if use is not None))
    else:
        _show(rows, options, "Nothing uses a replaced key any more: papaours-auth key disable")
    return FINE


def _still(use: StillUsed, estate: _Estate) -> _Row:
    return {
        **estate.of_key(use.key_id),
        "since": use.since,
        "last": use.last,
        "calls": use.calls,
        "addresses": [count.of for count in use.addresses],
        "routes": [count.of for count in use.routes],
    }


def _show_users(use: StillUsed) -> None:
    out(f"{use.key_id} was used after {_time(use.since)}: {use.calls} calls, the last {_time(use.last)}\n")
    for name, counts in (("address", use.addresses), ("route", use.routes)):
        _table([{column: _cell(value) for column, value in row.items()} for row in _counts(counts, name)])
        out("")


def _report(options: argparse.Namespace) -> int:
    usage = _usage(options)
    with _Estate(options) as estate:
        report = usage.report(
            estate.machine(options.machine, usage), _moment(options.since), limit=options.limit
        )
        machine = estate.machines.get(report.machine_id)
        name = machine.name if machine is not None else ""
        keys = [_use(use, estate) for use in report.keys]
        keys += _never(estate, {use.key_id for use in report.keys}, None, report.machine_id)
    if options.json:
        _show([_reported(report, name, keys)], options, "")
        return FINE
    out(f"{name or report.machine_id}: {report.calls} calls since {_time(report.since)}")
    if report.days:
        out(_draw(report.days, "day", report.since))
    for rows in _parts(report, keys):
        out("")
        _show(rows, options, "")
    return FINE


def _parts(report: Report, keys: list[dict[str, object]]) -> Iterator[Sequence[_Row]]:
    statuses = [
        {"status": status or "none", "calls": calls} for status, calls in sorted(report.statuses.items())
    ]
    parts = (keys, statuses, _counts(report.routes, "route"), _counts(report.addresses, "address"))
    return (part for part in parts if part)


def _reported(report: Report, name: str, keys: list[dict[str, object]]) -> _Row:
    return {
        "machine": report.machine_id,
        "name": name,
        "since": report.since,
        "calls": report.calls,
        "last": max((use.last for use in report.keys), default=None),
        "keys": keys,
        "statuses": {str(status): calls for status, calls in report.statuses.items()},
        "routes": _counts(report.routes, "route"),
        "addresses": _counts(report.addresses, "address"),
        "days": [{"start": start, "calls": calls} for start, calls in report.days],
    }


# the words


def usage_option() -> argparse.ArgumentParser:
    """Give what every command that reads usage takes: ``--usage``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--usage",
        metavar="URL",
        dest="usage_url",
        help=f"where calls are recorded (default: {USAGE_VARIABLE})",
    )
    return parser


def add_usage(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], listed: argparse.ArgumentParser
) -> None:
    """Add ``usage`` and its questions to the command line."""
    questions = _group(commands, "usage", "questions about the use of keys")
    parents = [listed, usage_option()]
    command = _command(questions, "last-used", _last_used, parents, "when keys were last used", "list")
    command.add_argument("key", metavar="KEY", nargs="?", help="its id or exact name; default: all")
    command = _command(questions, "unused", _unused, parents, "list keys that nobody uses", "list")
    command.add_argument("--machine", metavar="M", help="of this machine alone")
    _add_since(command, "90d")

    command = _command(questions, "history", _history, parents, "list calls, the newest first", "list")
    for name, letter in (("--key", "K"), ("--machine", "M"), ("--address", "A"), ("--route", "R")):
        command.add_argument(name, metavar=letter)
    command.add_argument("--status", metavar="N", type=int)
    _add_since(command, None)
    _add_until(command)
    _add_limit(command, 50)
    command.add_argument("--cursor", metavar="C", help="go on where an earlier answer ended")

    command = _command(questions, "series", _series, [*parents, _subjects()], "count calls over time", "list")
    command.add_argument("--step", choices=list(STEPS), default="hour")
    _add_since(command, "1d")
    _add_until(command)
    for name, run, text in (
        ("routes", _routes, "count calls by route"),
        ("addresses", _addresses, "count calls by address"),
    ):
        command = _command(questions, name, run, [*parents, _subjects()], text, "list")
        _add_since(command, "30d")
        _add_until(command)
        _add_limit(command, 20)

    command = _command(
        questions, "still-used", _still_used, parents, "who still uses a key that was replaced", "list"
    )
    command.add_argument("key", metavar="KEY", nargs="?", help="its id or exact name; default: all")
    _add_since(command, None)
    command = _command(questions, "report", _report, parents, "sum up a machine's use", "list")
    command.add_argument("machine", metavar="MACHINE", help="its id or exact name")
    _add_since(command, "30d")
    _add_limit(command, 10)


def _subjects() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("key", metavar="KEY", nargs="?", help="its id or exact name")
    parser.add_argument("--machine", metavar="M", help="of this machine instead")
    return parser


def _add_since(command: argparse.ArgumentParser, default: str | None) -> None:
    text = "90d, 12h, or a time with its zone; default: "
    command.add_argument("--since", metavar="WHEN", default=default, help=text + (default or "all there is"))


def _add_until(command: argparse.ArgumentParser) -> None:
    command.add_argument("--until", metavar="WHEN", help="before that; default: now")


def _add_limit(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument(
        "--limit", metavar="N", type=_count, default=default, help=f"rows; default: {default}"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError("a number from 1 to 1000000")
    return int(text)
