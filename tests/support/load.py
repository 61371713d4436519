"""A verifying process under load: told what to do on standard input, it says at the end what became of every call.

    python load.py '{"url": …, "pepper": …, "kind": "sync", "target": KEY, "others": [KEY, …], "options": {…}}'

Each line of standard input is the name of a phase that begins now; ``stop`` ends it. Of each phase it counts the
outcomes, by key, and keeps how long the calls took. Times are CLOCK_MONOTONIC, one for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from papaours_auth import AsyncAuthenticator, Authenticator, Refused, parse_peppers

LOOK_EVERY = 50
"""Calls between two looks at standard input."""
UNKNOWN = "pk_prod_0123456789abcdef"


class Phase:
    """What became of the calls of one phase."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.outcomes: dict[str, Counter[str]] = {
            "target": Counter(),
            "other": Counter(),
            "unknown": Counter(),
        }
        self.seconds: dict[int, list[float]] = {}  # by the second of the phase in which the call ended
        self.last_accepted = 0.0  # of the target: when that call was made
        self.first_accepted = 0.0  # of any other key, uncached ones included
        self.threads = 0

    def note(self, what: str, outcome: str, began: float, ended: float) -> None:
        self.outcomes[what][outcome] += 1
        self.seconds.setdefault(int(ended - self.began), []).append(ended - began)
        if outcome == "accepted" and what == "target":
            self.last_accepted = began
        if outcome == "accepted" and what == "other":
            self.first_accepted = self.first_accepted or ended

    def report(self) -> dict[str, Any]:
        taken = sorted(each for second in self.seconds.values() for each in second) or [0.0]
        return {
            "began": self.began,
            "outcomes": self.outcomes,
            "calls": sum(map(len, self.seconds.values())),
            "p50": taken[len(taken) // 2],
            "p99": _p99(taken),
            "p99_each_second": {second: _p99(sorted(each)) for second, each in self.seconds.items()},
            "longest": taken[-1],
            "last_accepted": self.last_accepted,
            "first_accepted": self.first_accepted,
            "threads": self.threads,
        }


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


class Caller:
    """Makes the calls in turn: the target, another key, now and then an unknown one."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.phases: dict[str, Phase] = {"start": Phase()}
        self.phase = self.phases["start"]
        self._target: str = given["target"]
        self._others = itertools.cycle(given["others"])

    def keys(self) -> Iterator[tuple[str, str]]:
        for number in itertools.count():
            yield "target", self._target
            yield "other", next(self._others)
            if number % 10 == 0:
                yield "unknown", UNKNOWN
            if number % LOOK_EVERY == 0:
                self.phase.threads = max(self.phase.threads, threading.active_count())
                if not self._listen():
                    return

    def _listen(self) -> bool:
        while select.select([sys.stdin], [], [], 0)[0]:
            word = sys.stdin.readline().strip()
            if word in ("", "stop"):
                return False
            self.phase = self.phases[word] = Phase()
            print(word, flush=True)
        return True

    def report(self) -> str:
        return json.dumps({name: phase.report() for name, phase in self.phases.items()})


def call(caller: Caller, authenticate: Callable[[str], object]) -> None:
    for what, key in caller.keys():
        began = time.monotonic()
        try:
            authenticate(key)
            outcome = "accepted"
        except Refused as refused:
            outcome = refused.reason.value
        caller.phase.note(what, outcome, began, time.monotonic())


async def acall(caller: Caller, authenticate: Callable[[str], Awaitable[object]]) -> None:
    for what, key in caller.keys():
        began = time.monotonic()
        try:
            await authenticate(key)
            outcome = "accepted"
        except Refused as refused:
            outcome = refused.reason.value
        caller.phase.note(what, outcome, began, time.monotonic())


async def serve(caller: Caller, authenticator: AsyncAuthenticator) -> None:
    async with authenticator:
        await acall(caller, authenticator.authenticate)


def main() -> None:
    given = json.loads(sys.argv[1])
    caller = Caller(given)
    options = {"environment": "prod", "peppers": parse_peppers(given["pepper"]), **given["options"]}
    print("ready", flush=True)
    if given["kind"] == "sync":
        with Authenticator(given["url"], **options) as authenticator:
            call(caller, authenticator.authenticate)
    else:
        asyncio.run(serve(caller, AsyncAuthenticator(given["url"], **options)))
    print(caller.report(), flush=True)


if __name__ == "__main__":
    main()
