"""An app that is built first, patched by gevent then, and called last. Run as a script, by `test_gevent`.

Each lock that the library made before the patching is watched. Where its holder lets another greenlet run, that one
may want the lock too, and the whole thread waits for ever. The script prints which locks those were, and what was
answered.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

HELD: dict[Watched, object] = {}


class Watched:
    """A lock that knows who holds it. It may be an `RLock`."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._depth = 0
        self.made = _maker()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken:
            self._depth += 1
            HELD[self] = greenlet.getcurrent()
        return taken

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            HELD.pop(self, None)
        self._lock.release()

    def locked(self) -> bool:
        return bool(self._depth)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _maker() -> str:
    """Name the line that makes a lock; nothing for a line that is not the library's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == threading.__file__:
        frame = frame.f_back
    name = frame.f_code.co_filename
    return f"{name.rpartition('/')[2]}:{frame.f_lineno}" if "/papaours_auth/" in name else ""


def watched(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: Watched(make()) if _maker() else make()


# Before the library is imported, so that it finds these.
import greenlet  # noqa: E402

_lock, _rlock = threading.Lock, threading.RLock
threading.Lock, threading.RLock = watched(_lock), watched(_rlock)  # type: ignore[assignment]

from papaours_auth import Keys, Refused, open_store  # noqa: E402
from papaours_auth.digest import new_pepper, parse_peppers  # noqa: E402
from papaours_auth.exceptions import Reason  # noqa: E402
from papaours_auth.stores import Epoch, Found, Reading, Store  # noqa: E402
from papaours_auth.stores.memory import MemoryStore  # noqa: E402
from papaours_auth.throttle import Throttle  # noqa: E402
from papaours_auth.usage import Batch, Recorder  # noqa: E402
from papaours_auth.usage.sqlite import SQLiteSink  # noqa: E402
from papaours_auth.verify import Claim  # noqa: E402
from papaours_auth.wsgi import PapaoursAuthMiddleware  # noqa: E402
from support.calls import environ_of, run_wsgi, wsgi_ok  # noqa: E402

CALLERS = 12
TURN = 0.01  # seconds: whoever waits lets the others run


class SlowStore(MemoryStore):
    """A store that waits wherever it is asked, as one in a network does."""

    def lookup(self, claim: Claim) -> Found:
        time.sleep(TURN)
        return super().lookup(claim)

    def describe(self) -> Any:
        time.sleep(TURN)
        return super().describe()

    def feed(self) -> Any:
        return SlowFeed(super().feed())


class SlowFeed:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        time.sleep(TURN)
        reading: Reading = self._inner.read(known)
        return reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class SlowSink(SQLiteSink):
    """A sink that waits. It fails where it is given a batch while it is at one."""

    at_work = False

    def write(self, batch: Batch) -> None:
        assert not self.at_work, "two deliveries at once"
        self.at_work = True
        time.sleep(TURN)
        super().write(batch)
        self.at_work = False


def main(url: str, usage: str, spool: str) -> None:
    peppers = parse_peppers(new_pepper())
    store: str | Store = SlowStore() if url == "slow" else url
    keys = Keys(store if isinstance(store, SlowStore) else open_store(url, create=True), peppers=peppers)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    made = [
        keys.create_key(machine.id, name=f"Clef {number}", environment="prod").secret.reveal()
        for number in range(CALLERS)
    ]
    recorder = Recorder(SlowSink(usage), spool=spool or None, interval=0.02)
    throttle = Throttle("1000/minute", storage=url if url.startswith("redis") else "memory://")
    app = PapaoursAuthMiddleware(
        wsgi_ok, environment="prod", store=store, peppers=peppers, usage=recorder, timeout=30.0
    )

    from gevent import monkey

    monkey.patch_all()
    import gevent

    faulthandler.dump_traceback_later(25, exit=True)
    held: set[str] = set()

    def switched(event: str, args: tuple[object, object]) -> None:
        held.update(lock.made for lock, holder in list(HELD.items()) if holder is args[0] and lock.made)

    greenlet.settrace(switched)

    def call(name: str, key: str) -> int:
        environ = environ_of(headers=[("X-API-KEY", key), ("X-Request-Id", name)])
        return int(run_wsgi(app, environ)[0].split()[0])

    def work(number: int) -> list[int]:
        statuses = [call(f"{number}-{each}", made[(number + each) % CALLERS]) for each in range(5)]
        recorder.flush()
        throttle.judge(Refused(Reason.UNKNOWN_KEY), f"203.0.113.{number}")
        app.authenticator.health()
        return statuses

    jobs = [gevent.spawn(work, number) for number in range(CALLERS)]
    gevent.joinall(jobs, raise_error=True)
    again = [gevent.spawn(recorder.refused, Reason.UNKNOWN_KEY, "203.0.113.9") for _ in range(CALLERS)]
    gevent.joinall(
        [*again, gevent.spawn(recorder.close), gevent.spawn(app.authenticator.close)], raise_error=True
    )
    greenlet.settrace(None)
    statuses = [status for job in jobs for status in job.value]
    sys.stdout.write(json.dumps({"statuses": statuses, "held": sorted(held), "lost": recorder.stats().lost}))


if __name__ == "__main__":
    main(*sys.argv[1:])
