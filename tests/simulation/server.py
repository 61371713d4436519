"""The store's side: real stores, reached over a network that delays, loses and doubles what it carries."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from papaours_auth import StoreUnavailable
from papaours_auth.stores import Change, Description, Epoch, Feed, Found, News, Reading, Store
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.stores.records import next_epoch
from papaours_auth.verify import PARTITIONS, Claim

from .world import Process, World

PARTS = 4


class PartitionedStore(MemoryStore):
    """A store that cannot change everything in one step: keys in parts, machines in one, a log in each.

    A lookup that finds a key reads its machine in a second step, from another snapshot.
    """

    def __init__(self) -> None:
        self.tips: dict[int, Epoch] = {}
        self.logs: dict[int, deque[Change]] = {}
        self.part_of: dict[str, int] = {}
        self.minted_only: dict[int, bool] = dict.fromkeys(range(PARTS), True)
        super().__init__()
        for part in range(PARTS + 1):
            self.tips[part] = next_epoch(None)
            self.logs[part] = deque([self._log[0]._replace(epoch=self.tips[part])])

    def add_key(self, key: Any, claim: Claim, kind: str, author: Any) -> None:
        self.part_of[key.id] = part_of(claim)
        super().add_key(key, claim, kind, author)
        self.minted_only[part_of(claim)] &= not claim.foreign

    def _append(self, author: Any, kind: str, subject: str, before: Any, after: Any) -> None:
        super()._append(author, kind, subject, before, after)
        self._append_to(self.part_of.get(subject, PARTS))

    def _append_to(self, part: int) -> None:
        self.tips[part] = next_epoch(self.tips[part])
        self.logs[part].append(self._log[-1]._replace(epoch=self.tips[part]))

    def delete_machine(self, machine_id: str, author: Any) -> None:
        """Delete it, and say so in every part that loses keys: else a restore of that part goes unseen."""
        parts = {self.part_of[key.id] for key in self.keys(machine_id=machine_id)}
        super().delete_machine(machine_id, author)
        for part in sorted(parts):
            self._append_to(part)

    def find_key(self, claim: Claim) -> Found:
        """The first step: the key, with a machine that is not to be believed."""
        part = part_of(claim)
        return Found(super().lookup(claim).record, {part: self.tips[part]})

    def find_machine(self, found: Found) -> Found:
        """The second step, later."""
        if found.record is None:
            return found
        machines = self.machines(found.record.key.machine_id)
        epochs = {**found.epochs, PARTS: self.tips[PARTS]}
        if not machines:  # deleted in between, with its keys
            return Found(None, epochs)
        record = found.record
        return Found(type(record)(record.key, machines[0], record.digest), epochs)

    def lookup(self, claim: Claim) -> Found:
        return self.find_machine(self.find_key(claim))

    def read_parts(self, known: Mapping[int, Epoch]) -> Reading:
        return Reading(self._installation, {part: self._news(part, known.get(part)) for part in self.tips})

    def _news(self, part: int, known: Epoch | None) -> News:
        log = self.logs[part]
        peppers = tuple(self._peppers.values()) if part == PARTS else None
        minted_only = range(part, PARTITIONS, PARTS) if self.minted_only.get(part) else ()
        if known is None or all(change.epoch != known for change in log):
            return News(self.tips[part], None, peppers, minted_only)
        changes = [(c.kind, c.subject) for c in log if c.epoch.seq > known.seq]
        return News(self.tips[part], changes, peppers, minted_only)


def part_of(claim: Claim) -> int:
    """Give the part of a partitioned store that a key is in."""
    return claim.partition % PARTS


def backup(store: MemoryStore) -> MemoryStore:
    """Copy a store as it is now."""
    twin = copy.copy(store)
    for name, value in vars(store).items():
        if isinstance(value, dict | deque):
            setattr(twin, name, copy.copy(value))
    if isinstance(twin, PartitionedStore):
        twin.logs = {part: copy.copy(log) for part, log in twin.logs.items()}
    twin._lock = threading.Lock()
    twin._changed = threading.Condition(twin._lock)
    return twin


class Server:
    """One store, which may be down, forgetful or restored from a backup."""

    def __init__(self, *, partitioned: bool) -> None:
        self.store: MemoryStore = PartitionedStore() if partitioned else MemoryStore()
        self.up = True
        self.on_step: Callable[[], None] = lambda: None

    def check(self) -> None:
        if not self.up:
            raise StoreUnavailable("connection refused, or a store without its installation mark")

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        if isinstance(self.store, PartitionedStore):
            return self.store.read_parts(known)
        return self.store.feed().read(known)

    def lookup_steps(self, claim: Claim) -> list[Callable[[Any], Any]]:
        """What a lookup does at the server, a step for each snapshot."""

        def first(_: object) -> Found:
            store = self.store
            return store.find_key(claim) if isinstance(store, PartitionedStore) else store.lookup(claim)

        def second(found: Found) -> Found:
            store = self.store
            return store.find_machine(found) if isinstance(store, PartitionedStore) else found

        return [first, second] if isinstance(self.store, PartitionedStore) else [first]


class Weather:
    """How bad the network is. Drawn once a seed, so that some seeds are calm and some are not."""

    def __init__(self, world: World) -> None:
        rng = world.rng
        self.loss = rng.choice((0.0, 0.0, 0.02, 0.1, 0.3))
        self.slow = rng.choice((0.0, 0.02, 0.1, 0.3))
        self.brisk = rng.choice((0.5, 0.8, 0.95))
        self.double = rng.choice((0.0, 0.1))
        self.deaf = rng.choice((0.0, 0.1, 0.5, 1.0))
        self.patience = rng.choice((0.5, 1.0, 4.0))
        """Seconds until the client gives a request up."""


class Network:
    """Carries requests of one process to the server, and announcements back."""

    def __init__(self, process: Process, server: Server, weather: Weather) -> None:
        self._process = process
        self._world = process.world
        self._server = server
        self._weather = weather
        self.cut = False
        self.last_fault = float("-inf")
        self.feeds: list[SimulatedFeed] = []
        self.muted: dict[int, float] = {}
        process.on_hold = self.fault

    def move_to(self, process: Process) -> None:
        """Belong to a child, whose feeds are not its parent's."""
        self._process = process
        process.on_hold = self.fault
        self.feeds.clear()

    def fault(self, lasting: float = 0.0) -> None:
        self.last_fault = max(self.last_fault, self._world.now + lasting)

    def _delay(self) -> float:
        rng = self._world.rng
        if rng.random() < self._weather.slow:
            delay = rng.choice((0.2, 0.5, 1.2, 2.5))
            self.fault(delay)
            return delay
        return rng.uniform(0.0002, 0.01 if rng.random() < self._weather.brisk else 0.15)

    def _lost(self) -> bool:
        lost = self.cut or self._world.rng.random() < self._weather.loss
        if lost:
            self.fault(self._weather.patience)
        return lost

    def call(self, what: str, steps: list[Callable[[Any], Any]], done: Callable[[Any], None]) -> None:
        """Have steps done at the server one after the other; answer with the last one's result or an error."""
        answered = False

        def answer(result: Any) -> None:
            nonlocal answered
            if not answered:
                answered = True
                done(result)

        def give_up() -> None:
            if not answered:
                self.fault()
                self._world.note(lambda: f"{self._process.name} gives up waiting for {what}")
                answer(StoreUnavailable("no answer in time"))

        self._world.after(self._weather.patience, give_up)
        for _ in range(1 + (self._world.rng.random() < self._weather.double)):
            self._travel(what, steps, None, answer)

    def _travel(
        self, what: str, steps: list[Callable[[Any], Any]], carried: Any, answer: Callable[[Any], None]
    ) -> None:
        if self._lost():
            self._world.note(lambda: f"a request of {self._process.name} is lost: {what}")
            return
        self._world.after(self._delay(), lambda: self._arrive(what, steps, carried, answer))

    def _arrive(
        self, what: str, steps: list[Callable[[Any], Any]], carried: Any, answer: Callable[[Any], None]
    ) -> None:
        try:
            self._server.check()
            result = steps[0](carried)
            self._server.on_step()
        except StoreUnavailable as error:
            self.fault()
            result = error
        self._world.note(lambda: f"the server does {what} for {self._process.name}: {brief(result)}")
        if steps[1:] and not isinstance(result, StoreUnavailable):
            self._travel(what, steps[1:], result, answer)
        elif self._lost():
            self._world.note(lambda: f"a reply to {self._process.name} is lost: {what}")
        else:
            self._world.after(self._delay(), lambda: answer(result))

    def announce(self) -> None:
        """Tell the process's feeds that something changed: late, doubled, or not at all."""
        if self.cut or self._world.rng.random() < self._weather.deaf:
            return
        for _ in range(1 + (self._world.rng.random() < self._weather.double)):
            self._world.after(self._delay(), self._wake_feeds)

    def _wake_feeds(self) -> None:
        for feed in self.feeds:
            feed.wake()

    def mute(self, part: int, seconds: float) -> None:
        """Let readings come without one part for a while."""
        self.muted[part] = self._world.now + seconds
        self.fault(seconds)


def brief(result: object) -> str:
    if isinstance(result, Found):
        seqs = {part: epoch.seq for part, epoch in result.epochs.items()}
        return f"{'no record' if result.record is None else result.record.key.name} at {seqs}"
    if isinstance(result, Reading):
        return ", ".join(
            f"part {part} at {news.epoch.seq} {'all' if news.changes is None else list(news.changes)}"
            for part, news in result.news.items()
            if news.changes is None or news.changes
        )
    return type(result).__name__


class SimulatedFeed:
    """A feed whose readings travel: what the real watcher's loop is given."""

    def __init__(self, remote: RemoteStore) -> None:
        self.process = remote.process
        self.remote = remote
        self._woken = False
        self._wake: Callable[[Any], None] | None = None
        remote.network.feeds.append(self)

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        server, known = self.remote.server, dict(known)
        answer = self.process.block(
            lambda done: self.remote.network.call("read", [lambda _: server.read(known)], done)
        )
        if isinstance(answer, StoreUnavailable):
            raise answer
        assert isinstance(answer, Reading)
        muted, now = self.remote.network.muted, self.process.world.now
        heard = {part: news for part, news in answer.news.items() if muted.get(part, 0.0) <= now}
        return Reading(answer.installation, heard)

    def wait(self, timeout: float) -> None:
        if not self._woken:
            self.process.block(lambda wake: self._sleep(wake, timeout))
        self._woken = False

    def _sleep(self, wake: Callable[[Any], None], timeout: float) -> None:
        def once(_: object) -> None:
            if self._wake is once:
                self._wake = None
                wake(None)

        self._wake = once
        self.process.world.after(timeout, lambda: once(None))

    def wake(self) -> None:
        self._woken = True
        if self._wake is not None:
            wake = self._wake
            self.process.world.after(0.0, lambda: wake(None))

    def close(self) -> None:
        self.wake()


class Twin:
    """The blocking twin, as far as a watcher's thread asks it."""

    def __init__(self, remote: RemoteStore) -> None:
        self._remote = remote

    def feed(self) -> Feed:
        return self._remote.feed()

    def describe(self) -> Description:
        remote = self._remote
        steps = [lambda _: remote.server.store.describe()]
        answer = remote.process.block(lambda done: remote.network.call("describe", steps, done))
        if isinstance(answer, StoreUnavailable):
            raise answer
        assert isinstance(answer, Description)
        return answer


class RemoteStore:
    """The server as one process sees it: an `AsyncStore`."""

    def __init__(self, process: Process, server: Server, network: Network) -> None:
        self.process = process
        self.server = server
        self.network = network
        self.break_feed: Callable[[SimulatedFeed], Feed] = lambda feed: feed
        self.on_lookup: Callable[[Claim], Callable[[], None]] = lambda claim: lambda: None

    @property
    def sync(self) -> Store:
        return Twin(self)  # type: ignore[return-value]  # administration goes to the server's own

    def feed(self) -> Feed:
        return self.break_feed(SimulatedFeed(self))

    async def _call(self, what: str, steps: list[Callable[[Any], Any]]) -> Any:
        process = self.process
        waiting = process.loop.create_future()

        def done(answer: Any) -> None:
            if not waiting.done():
                waiting.set_result(answer)

        self.network.call(what, steps, lambda answer: process.post(lambda: done(answer)))
        answer = await waiting
        if isinstance(answer, StoreUnavailable):
            raise answer
        return answer

    async def lookup(self, claim: Claim) -> Found:
        landed = self.on_lookup(claim)
        try:
            found: Found = await self._call("lookup", self.server.lookup_steps(claim))
        finally:
            landed()
        return found

    async def describe(self) -> Description:
        description: Description = await self._call("describe", [lambda _: self.server.store.describe()])
        return description

    async def aclose(self) -> None:
        pass
