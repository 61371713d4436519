"""An authenticator behind one face, sync or async, over a store that counts and into which faults are put."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from papaours_auth import AsyncAuthenticator, Authenticator, Identity, Reason, Refused
from papaours_auth.stores import AsyncStore, Description, Epoch, Feed, Found, Reading, Store
from papaours_auth.verify import Claim


class Spy:
    """A real store, seen from the verifying side: lookups are counted, answers pass through the test's hands."""

    def __init__(self, store: Store) -> None:
        self.real = store
        self.claims: list[Claim] = []
        self.on_lookup: Callable[[Callable[[], Found]], Found] = lambda ask: ask()
        self.on_read: Callable[[Callable[[], Reading]], Reading] = lambda ask: ask()
        self.on_wait: Callable[[Callable[[], None]], None] = lambda wait: wait()
        self.on_describe: Callable[[Callable[[], Description]], Description] = lambda ask: ask()
        self.wakes = 0

    @property
    def lookups(self) -> int:
        return len(self.claims)

    @property
    def store(self) -> Store:
        return cast("Store", self)  # administration goes to the real one

    def lookup(self, claim: Claim) -> Found:
        self.claims.append(claim)
        return self.on_lookup(lambda: self.real.lookup(claim))

    def describe(self) -> Description:
        return self.on_describe(self.real.describe)

    def feed(self) -> Feed:
        return _SpyFeed(self, self.real.feed())

    def __getattr__(self, name: str) -> Any:  # Any: whatever the real store has
        return getattr(self.real, name)


class _SpyFeed:
    def __init__(self, spy: Spy, feed: Feed) -> None:
        self._spy = spy
        self._feed = feed

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        return self._spy.on_read(lambda: self._feed.read(known))

    def wait(self, timeout: float) -> None:
        self._spy.on_wait(lambda: self._feed.wait(timeout))

    def wake(self) -> None:
        self._spy.wakes += 1
        self._feed.wake()

    def close(self) -> None:
        self._feed.close()


class Threaded:
    """Any store for event loops, each call in a thread: so that a fault put into the sync one serves both."""

    def __init__(self, store: Store) -> None:
        self.sync = store

    async def lookup(self, claim: Claim) -> Found:
        return await asyncio.to_thread(self.sync.lookup, claim)

    async def describe(self) -> Description:
        return await asyncio.to_thread(self.sync.describe)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.sync.close)


class Door(NamedTuple):
    """An authenticator of either kind, asked the same way."""

    authenticator: Authenticator | AsyncAuthenticator
    authenticate: Callable[..., Identity]
    start: Callable[[], None]
    close: Callable[[], None]

    def knock(self, key: str | bytes, **options: Any) -> Identity | Reason:
        """Give who comes in, or why nobody does."""
        try:
            return self.authenticate(key, **options)
        except Refused as refused:
            return refused.reason

    def refresh(self) -> None:
        self.authenticator.refresh()


def open_door(kind: str, store: str | Store, **options: Any) -> Door:
    """Open a ``"sync"`` or an ``"async"`` one; each question to the latter has an event loop of its own."""
    if kind == "sync":
        authenticator = Authenticator(store, environment="prod", **options)
        return Door(authenticator, authenticator.authenticate, authenticator.start, authenticator.close)
    for_loops: str | AsyncStore = store if isinstance(store, str) else Threaded(store)
    twin = AsyncAuthenticator(for_loops, environment="prod", **options)
    return Door(
        twin,
        lambda key, **asked: asyncio.run(twin.authenticate(key, **asked)),
        lambda: asyncio.run(twin.start()),
        lambda: asyncio.run(twin.aclose()),
    )


class Gate:
    """Holds lookups until it is opened, and tells when one has come."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._opened = threading.Event()

    def hold(self) -> None:
        self.reached.release()
        if not self._opened.wait(30):
            raise AssertionError("the gate was never opened")

    def before(self, ask: Callable[[], Found]) -> Found:
        self.hold()
        return ask()

    def open(self) -> None:
        self._opened.set()


class Later:
    """A call in a thread of its own, and what became of it."""

    def __init__(self, call: Callable[[], Identity | Reason]) -> None:
        self._answers: list[Identity | Reason | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Identity | Reason]) -> None:
        try:
            self._answers.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self._answers.append(error)

    def answer(self) -> Identity | Reason:
        self._thread.join(30)
        if not self._answers:
            raise AssertionError("no answer within 30 seconds")
        answer = self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer
