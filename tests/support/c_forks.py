"""An app whose process forks in C: what its children answer, record and share. Run as a script, by `test_forks`.

``hookless``: no hook of Python's runs, in nobody. ``after-only``: the child runs os' *after* hooks alone, as uWSGI's
workers do. The script prints a report in JSON, one for the parent and one for each child.
"""

from __future__ import annotations

import _imp
import asyncio
import ctypes
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from papaours_auth import Keys, _fork, open_store
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.digest import new_pepper, parse_peppers
from papaours_auth.stores import Feed
from papaours_auth.stores.sqlite import _Pool
from papaours_auth.usage import Recorder
from papaours_auth.usage.sqlite import SQLiteSink
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware
from support.calls import environ_of, http_scope, run_wsgi, wsgi_ok

CALLS = 50
CHILDREN = 2
MAX_STALENESS = 2.0
SLACK = 5.0  # of a loaded machine
C = ctypes.PyDLL(None)  # which keeps the interpreter's lock


class Plan(NamedTuple):
    door: str
    store: str
    usage: str
    spool: str
    fork: str
    warm: bool
    """Whether the parent has answered calls before it forks: its cache, its threads and its connections are there."""


def fork(kind: str) -> int:
    pid: int
    if kind == "hookless":
        pid = C.fork()
        return pid
    _imp.acquire_lock()  # which the *after* hooks of Python 3.13 let go of, whatever ran before
    pid = C.fork()
    if pid == 0:
        C.PyOS_AfterFork_Child()
    else:
        _imp.release_lock()
    return pid


async def asgi_ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


class App:
    """The app under test, and a way to call it."""

    def __init__(self, plan: Plan) -> None:
        self.recorder = None
        if plan.usage:
            self.recorder = Recorder(
                SQLiteSink(plan.usage), spool=plan.spool or None, interval=3600
            )  # delivers at its start and at its end
        options: Any = {
            "environment": "prod", "store": plan.store, "usage": self.recorder,
            "max_staleness": MAX_STALENESS, "timeout": 30.0,
        }  # fmt: skip
        self.guard: ASGIMiddleware | WSGIMiddleware
        if plan.door == "asgi":
            self.guard = ASGIMiddleware(asgi_ok, **options)
        else:
            self.guard = WSGIMiddleware(wsgi_ok, **options)

    def call(self, calls: Iterator[tuple[str, str]]) -> list[int]:
        """Make calls one after another, each a request id and a key. Gives their statuses."""
        if isinstance(self.guard, ASGIMiddleware):
            return asyncio.run(self._acall(self.guard, calls))
        return [self._call_wsgi(self.guard, *call) for call in calls]

    async def _acall(self, guard: ASGIMiddleware, calls: Iterator[tuple[str, str]]) -> list[int]:
        return [await self._call_asgi(guard, *call) for call in calls]

    async def _call_asgi(self, guard: ASGIMiddleware, name: str, key: str) -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("nothing is to be received")

        async def send(message: Any) -> None:
            sent.append(message)

        await guard(http_scope(headers=[("X-API-KEY", key), ("X-Request-Id", name)]), receive, send)
        return int(sent[0]["status"])

    @staticmethod
    def _call_wsgi(guard: WSGIMiddleware, name: str, key: str) -> int:
        environ = environ_of(headers=[("X-API-KEY", key), ("X-Request-Id", name)])
        return int(run_wsgi(guard, environ)[0].split()[0])


def named(who: str, key: str, number: int) -> Iterator[tuple[str, str]]:
    return ((f"{who}-{each}", key) for each in range(number))


def sockets() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(str(path.readlink()))
    return {name for name in found if name.startswith("socket:")}


def until_refused(app: App, who: str, key: str, since: float) -> float:
    """Call until the key is refused. Gives how long after ``since`` it was last let in."""
    last = since
    for number in range(100_000):
        asked = time.monotonic()
        ((status),) = app.call(iter([(f"{who}-revoked-{number}", key)]))
        if status == 401:
            return last - since
        assert status == 200, status
        last = asked
        assert asked < since + MAX_STALENESS + SLACK, "still let in"
        time.sleep(0.01)  # between two calls of a client
    raise AssertionError


def work(app: App, who: str, key: str, mine: str, pipe: tuple[int, int]) -> dict[str, Any]:
    """Do what a worker does: calls, then a key that is disabled meanwhile."""
    inherited = sockets()
    statuses = app.call(named(who, key, CALLS))
    statuses += app.call(named(f"{who}-own", mine, 1))
    os.write(pipe[1], b"!")
    late = until_refused(app, who, mine, float(os.read(pipe[0], 64)))
    health = app.guard.authenticator.health()
    report: dict[str, Any] = {
        "who": who,
        "refused": [status for status in statuses if status != 200],
        "late": late,
        "ok": health.ok,
        "error": health.error,
        "watching": health.watching,
        "threads": len(list(Path("/proc/self/task").iterdir())),  # whatever Python believes
        "sockets": sorted(sockets() - inherited),
    }
    if app.recorder is not None:
        app.recorder.close()
        report["producer"] = app.recorder.producer
        report["stats"] = app.recorder.stats()._asdict()
    return report


@contextmanager
def quiet(app: App) -> Iterator[None]:
    """Keep the threads of this process waiting for a lock.

    One that is inside SQLite would leave SQLite's own locks held in the child, and one that waits for the
    interpreter's would leave that broken where no hook runs: no library can mend either. What the children do find
    is our locks held, those of the pools of connections.
    """
    while app.recorder is not None and app.recorder.stats().pending:
        app.recorder.flush()
    with ExitStack() as stack:
        watcher = app.guard.authenticator._watcher
        if watcher is not None:
            stack.enter_context(parked(watcher._feed))
        for pool in [pool for pool in _fork._known if isinstance(pool, _Pool)]:
            stack.enter_context(pool._condition)
            assert not pool._taken
        yield


@contextmanager
def parked(feed: Feed) -> Iterator[None]:
    """Have a watcher's thread wait for a lock, in place of its feed."""
    arrived, lock = threading.Event(), threading.Lock()

    def wait(timeout: float) -> None:
        arrived.set()
        with lock:
            pass

    with lock:
        vars(feed)["wait"] = wait
        feed.wake()
        assert arrived.wait(10)
        time.sleep(0.05)  # from there to the lock it makes a step
        yield
        del vars(feed)["wait"]


def child(app: App, plan: Plan, body: Callable[[tuple[int, int]], dict[str, Any]]) -> tuple[int, int, int]:
    """Fork in C. Gives the child, and the ends of two pipes: from it, and to it."""
    (from_child, child_out), (child_in, to_child) = os.pipe(), os.pipe()
    with quiet(app):
        pid = fork(plan.fork)
        if pid == 0:
            end(body, child_in, child_out)
    os.close(child_out)
    os.close(child_in)
    return pid, from_child, to_child


def end(body: Callable[[tuple[int, int]], dict[str, Any]], child_in: int, child_out: int) -> NoReturn:
    """Do a child's work, report, and end. Where it hangs, it says where."""
    faulthandler.dump_traceback_later(30)
    code = 1
    try:
        report = body((child_in, child_out))
        os.write(child_out, json.dumps(report).encode())
        code = 0
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        os.write(child_out, json.dumps({"failed": repr(error)}).encode())
    finally:
        os._exit(code)


def main(plan: Plan) -> None:
    peppers = parse_peppers(os.environ.setdefault("PAPAOURS_PEPPER", new_pepper()))
    keys = Keys(open_store(plan.store, create=True), peppers=peppers)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    made = [
        keys.create_key(machine.id, name=f"Clef {number}", environment="prod")
        for number in range(CHILDREN + 1)
    ]
    texts = [new.secret.reveal() for new in made]
    app = App(plan)
    if plan.warm:
        calls = [(f"before-{number}", text) for number, text in enumerate(texts * 2)]
        assert set(app.call(iter(calls))) == {200}
    children = [
        child(
            app,
            plan,
            lambda pipe, number=number: work(app, f"child{number}", texts[0], texts[number + 1], pipe),  # type: ignore[misc]
        )
        for number in range(CHILDREN)
    ]
    reports = []
    statuses = app.call(named("parent", texts[0], CALLS))
    for number, (pid, reading, writing) in enumerate(children):
        ready = os.read(reading, 65_536)
        if ready == b"!":
            keys.disable_key(made[number + 1].key.id)
            os.write(writing, str(time.monotonic()).encode())
            ready = b""
        with os.fdopen(reading, "rb") as pipe:
            reports.append(json.loads(ready + pipe.read()))
        os.waitpid(pid, 0)
    statuses += app.call(named("parent-after", texts[0], 1))
    if app.recorder is not None:
        app.recorder.close()
    reports.append(
        {
            "who": "parent",
            "refused": [status for status in statuses if status != 200],
            "producer": app.recorder.producer if app.recorder is not None else "",
            "sockets": sorted(sockets()),
        }
    )
    sys.stdout.write(json.dumps(reports))
    sys.stdout.flush()
    os._exit(0)  # children that are no hook's are no business of the interpreter's end


if __name__ == "__main__":
    main(Plan(*json.loads(sys.argv[1])))
