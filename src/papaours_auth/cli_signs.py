"""``papaours-auth signs``: the signs of compromise, for people (tables) and programs (``--json``)."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from .cli import _SPAN, _UNITS, FINE, _command, _table, _time
from .cli_streams import as_json, flush, out, say
from .cli_usage import USAGE_VARIABLE, usage_url
from .exceptions import InvalidInput
from .usage.alerts import FOREVER, TITLES, Alert, Sign
from .usage.watch import Watch

_EVERY: Final = 1.0  # seconds between two looks
Wait = Callable[[float], object]


def add_signs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of ``papaours-auth``."""
    usage = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: given before or after the subcommand, it is the same; a default would undo the former.
    usage.add_argument(
        "--usage", dest="usage_url", metavar="URL", default=argparse.SUPPRESS,
        help=f"where calls are recorded (default: {USAGE_VARIABLE})",
    )  # fmt: skip
    usage.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object a line"
    )
    text = "look for signs of compromise in what was recorded, and list the alerts"
    signs = _command(commands, "signs", _signs, [usage], text, "list")
    signs.add_argument("--since", metavar="WHEN", default="7d", help="90d, 12h, or a time; default: 7d")
    signs.add_argument("--sign", choices=[sign.value for sign in Sign], help="of this sign alone")
    signs.add_argument("--follow", action="store_true", help="go on, and print each alert as it comes")
    group = signs.add_subparsers(metavar="[COMMAND]")
    for name, run, words in (
        ("show", _show, "show an alert, and what to do"),
        ("mute", _mute, "stay silent about an alert's sign for its key or network; it stays in the list"),
        ("unmute", _unmute, "end a muting"),
    ):
        command = _command(group, name, run, [usage], words, "list" if name == "show" else "change")
        command.add_argument("alert", metavar="ID", type=int, help="the alert's number")
        if name == "mute":
            command.add_argument("--for", dest="span", metavar="SPAN", help="30d, 12h; default: for ever")


def _signs(options: argparse.Namespace) -> int:
    watch = _watch(options)
    since, sign = _since(options.since), Sign(options.sign) if options.sign else None
    watch.catch_up()
    _print(watch.alerts(since=since, sign=sign), options)
    if options.follow:
        follow(options, sign)
    return FINE


def follow(options: argparse.Namespace, sign: Sign | None, wait: Wait | None = None) -> None:
    """Print each alert that is opened or becomes worse, until the process is interrupted."""
    pause = wait or threading.Event().wait
    watch = _watch(options)
    place = watch.news()[1]
    while True:
        watch.catch_up()
        alerts, place = watch.news(place)
        _print([alert for alert in alerts if sign is None or alert.sign is sign], options, empty=False)
        flush()
        pause(_EVERY)


def _show(options: argparse.Namespace) -> int:
    alert = _watch(options).alert(options.alert)
    if getattr(options, "json", False):
        _print([alert], options)
        return FINE
    language = _language()
    out(f"{TITLES[alert.sign][language]} ({alert.severity})")
    for name, value in _fields(alert).items():
        out(f"  {name:10} {value}")
    for number, step in enumerate(alert.next_steps(language), 1):
        out(f"{number}. {step}")
    return FINE


def _mute(options: argparse.Namespace) -> int:
    until = None if options.span is None else datetime.now(UTC) + _span(options.span)
    _print([_watch(options).mute(options.alert, until)], options)
    return FINE


def _unmute(options: argparse.Namespace) -> int:
    _print([_watch(options).unmute(options.alert)], options)
    return FINE


def _watch(options: argparse.Namespace) -> Watch:
    return Watch(usage_url(options), log=False)  # the app's log is the app's to fill


def _print(alerts: Iterable[Alert], options: argparse.Namespace, *, empty: bool = True) -> None:
    listed = list(alerts)
    if getattr(options, "json", False):
        for alert in listed:
            out(as_json(_as_json(alert)))
    elif listed:
        _table([_fields(alert) for alert in listed])
        say("What to do: papaours-auth signs show ID. To be silent about one: papaours-auth signs mute ID.")
    elif empty:
        say("No sign of compromise.")


def _fields(alert: Alert) -> dict[str, str]:
    return {
        "id": str(alert.id),
        "sign": alert.sign,
        "severity": alert.severity,
        "of": f"{alert.subject.kind} {alert.subject.id}",
        "first": _time(_moment(alert.first)),
        "last": _time(_moment(alert.last)),
        "muted": _muted(alert),
        "evidence": ", ".join(f"{name} {_figure(value)}" for name, value in alert.evidence.items()),
    }


def _as_json(alert: Alert) -> dict[str, object]:
    return {
        "id": alert.id,
        "sign": alert.sign,
        "title": alert.title,
        "severity": alert.severity,
        "key" if alert.subject.kind == "key" else "network": alert.subject.id,
        "machine": alert.subject.machine_id,
        "first": _moment(alert.first).isoformat(),
        "last": _moment(alert.last).isoformat(),
        "findings": alert.findings,
        "evidence": alert.evidence,
        "muted": alert.muted,
        "next": alert.next_steps(),
    }


def _figure(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _muted(alert: Alert) -> str:
    if not alert.muted:
        return ""
    return "for ever" if alert.muted_until >= FOREVER else f"until {_time(_moment(alert.muted_until))}"


def _moment(microseconds: int) -> datetime:
    """Read a time that a call had; an absurd one as the earliest or latest there is."""
    try:
        return datetime.fromtimestamp(microseconds / 1e6, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC) if microseconds > 0 else datetime.min.replace(tzinfo=UTC)


def _language() -> Literal["en", "fr"]:
    return "fr" if os.environ.get("LANG", "").lower().startswith("fr") else "en"


def _since(text: str) -> datetime:
    if _SPAN.fullmatch(text):
        return datetime.now(UTC) - _span(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise InvalidInput("--since is a span (90d, 12h) or a time with its zone (2027-01-31T00:00Z)")
    return found


def _span(text: str) -> timedelta:
    span = _SPAN.fullmatch(text)
    if span is None:
        raise InvalidInput("--for is a span: 30d, 12h, 4w")
    return min(timedelta(**{_UNITS[span[2]]: int(span[1])}), timedelta(days=36_500))
