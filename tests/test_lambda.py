"""AWS Lambda by way of Mangum: no server, a process that is frozen between two calls, and killed at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from papaours_auth import Keys, open_store, parse_peppers
from support.counted import House
from support.run import bound
from support.servers import APPS, is_stopped, wait_until

MAX_STALENESS = 2.0


class Function:
    """The function's process, as Lambda treats it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def invoke(self, name: str, key: str) -> int:
        event = {
            "version": "2.0", "routeKey": "$default", "rawPath": "/s/200", "rawQueryString": "",
            "headers": {"x-api-key": key, "x-request-id": name}, "isBase64Encoded": False,
            "requestContext": {"http": {"method": "GET", "path": "/s/200", "protocol": "HTTP/1.1",
                                        "sourceIp": "203.0.113.9"}, "stage": "$default"},
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(event)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(self._process.pid), 10, what="the function to stop")

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def function(house: House, lifespan: str, *, spool: bool) -> Iterator[Function]:
    """Start a function, and kill it: Lambda tells nobody that it is over."""
    environ = {
        **os.environ,
        **house.door("lambda", spool=spool),
        "LIFESPAN": lifespan,
        "PYTHONPATH": str(APPS.parent),
    }
    process = subprocess.Popen(
        bound([sys.executable, "-m", "support.lambda_runtime"]),
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Function(process)
        finally:
            process.kill()


# With a lifespan, which Mangum runs around each call, what was recorded is delivered before the call ends.
@pytest.mark.parametrize(("lifespan", "spool"), [("auto", False), ("off", True)])
def test_a_frozen_function_refuses_a_key_that_was_disabled_meanwhile_and_loses_no_usage(
    lifespan: str, spool: bool, tmp_path: Path
) -> None:
    house = House(tmp_path)
    key = house.clients[0]
    with function(house, lifespan, spool=spool) as called:
        names = [f"call-{number}" for number in range(20)]
        assert {called.invoke(name, key.text) for name in names} == {200}
        called.freeze()
        with Keys(
            open_store(house.environ["PAPAOURS_STORE"]),
            peppers=parse_peppers(house.environ["PAPAOURS_PEPPER"]),
        ) as keys:
            keys.disable_key(key.key_id)
        time.sleep(MAX_STALENESS)  # nobody's thread runs: its trust is over all the same
        called.thaw()
        assert called.invoke("late", key.text) == 401
        assert called.invoke("other", house.clients[1].text) == 200
    if spool:
        house.drain()
    stored = Counter(request for request, _, _ in house.stored())
    assert stored == Counter([*names, "late", "other"])
