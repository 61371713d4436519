"""A fork in C while a thread of the parent's holds every lock of the library's. Run as a script, by `test_forks`.

The child does all that a worker does. A lock that no reset has made anew would hold it up for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from papaours_auth import (
    AsyncAuthenticator,
    Authenticator,
    Keys,
    Refused,
    _fork,
    open_async_store,
    open_store,
)
from papaours_auth.digest import new_pepper, parse_peppers
from papaours_auth.exceptions import Reason
from papaours_auth.throttle import Throttle
from papaours_auth.usage import Outcome, Recorder, Tee, begin_call
from papaours_auth.usage.prometheus import PrometheusSink
from papaours_auth.usage.sqlite import SQLiteSink


def locks(thing: object, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Give every lock that can be reached from an object of the library's, and where it is."""
    if id(thing) in seen or not type(thing).__module__.startswith("papaours_auth"):
        return
    seen.add(id(thing))
    names = [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
    for name in names:
        value = getattr(thing, name, None)
        if hasattr(value, "acquire") and not isinstance(value, type):
            yield f"{type(thing).__name__}.{name}", value
        yield from locks(value, seen)


def hold_all() -> list[str]:
    """Hold every lock in a thread that never lets go. Gives where they are."""
    held: list[str] = []
    done = threading.Event()

    def hold() -> None:
        seen: set[int] = set()
        for forker in _fork._all():
            for name, lock in locks(forker, seen):
                if lock.acquire(timeout=10):
                    held.append(name)
        done.set()
        threading.Event().wait()

    threading.Thread(target=hold, daemon=True).start()
    assert done.wait(30)
    return held


class App:
    """All parts that know forks, used once."""

    def __init__(self, url: str, folder: str) -> None:
        peppers = parse_peppers(new_pepper())
        keys = Keys(open_store(url, create=True), peppers=peppers)
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        self.key = keys.create_key(machine.id, name="Production", environment="prod").secret.reveal()
        options: Any = {"environment": "prod", "peppers": peppers, "watch": False}
        self.memory = Authenticator("memory://", **options)
        self.blocking = Authenticator(url, **options)
        self.waiting = AsyncAuthenticator(open_async_store(url), **options)
        self.recorders = [
            Recorder(Tee(SQLiteSink(f"{folder}/usage.db"), PrometheusSink()), spool=spool, interval=3600)
            for spool in (None, f"{folder}/spool")
        ]
        self.throttle = Throttle("10/minute", storage=url if url.startswith("redis") else "memory://")
        self.work()

    def work(self) -> None:
        for authenticator in (self.memory, self.blocking):
            authenticator.refresh()
            authenticator.health()
        identity = self.blocking.authenticate(self.key)
        assert asyncio.run(self.waiting.authenticate(self.key)) == identity
        assert self.throttle.judge(Refused(Reason.UNKNOWN_KEY), "203.0.113.9").reason is Reason.UNKNOWN_KEY
        for recorder in self.recorders:
            call = begin_call(identity, "203.0.113.9", "GET")
            call.status = 200
            recorder.sent(call)
            recorder.done(call, Outcome.COMPLETED)
            recorder.refused(Reason.UNKNOWN_KEY, "203.0.113.9")
            assert recorder.flush()
            assert recorder.health().ok


def main(url: str, folder: str) -> None:
    app = App(url, folder)
    held = hold_all()
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        code = 1
        try:
            app.work()
            for recorder in app.recorders:
                recorder.close()
            code = 0
        finally:
            os._exit(code)
    sys.stdout.write("\n".join(held))
    sys.stdout.flush()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
