"""One seed: processes that verify, an administrator who changes, faults between them, and the invariants."""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple
from unittest import mock

from papaours_auth import (
    AsyncAuthenticator,
    Identity,
    KeyFormat,
    Keys,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
    parse_peppers,
)
from papaours_auth import authenticator as authenticator_module
from papaours_auth.authenticator import Options
from papaours_auth.cache import Cache, Clock
from papaours_auth.digest import PepperStatus
from papaours_auth.stores import Author, Feed, PepperRecord
from papaours_auth.stores.memory import MemoryStore
from papaours_auth.verify import Claim, partition
from papaours_auth.watcher import Watcher

from .oracle import Asked, KeyFacts, Truth, Violation
from .server import PARTS, Network, RemoteStore, Server, SimulatedFeed, Weather, backup
from .world import START, Lock, Process, ProcessClock, World

DURATION = 12.0
MAX_STALENESS = 2.0
EPSILON = 1e-6
PEPPERS = parse_peppers(
    ",".join(f"p{n}:{base64.urlsafe_b64encode(bytes(range(n, n + 32))).decode()}" for n in range(1, 5))
)
"""The administrator's. A process begins with the first of them, as many as were handed out by then."""
ON_THE_REQUEST = (Reason.NETWORK_NOT_ALLOWED, Reason.INSUFFICIENT_RIGHTS)
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


class Bug:
    """A deliberate mistake, put into a simulated process. Without one: this class, which does nothing."""

    invariant = ""

    def arrange(self, scene: Scene) -> None:
        """Make what it takes for it to show likely. The draws are made already."""

    def install(self, app: App) -> None:
        """Break a process that has just begun."""

    def feed(self, feed: SimulatedFeed) -> Feed:
        """Break its feed."""
        return feed

    def accepted(self, app: App, identity: Identity) -> None:
        """Do what must not be done when a key was let in."""


class SimulatedWatcher(Watcher):
    """The real watcher; its thread is a greenlet, and its lock lets the others run."""

    def __init__(self, cache: Cache, feed: Feed, clock: Clock, *, max_staleness: float) -> None:
        super().__init__(cache, feed, clock, max_staleness=max_staleness)
        self.process: Process = feed.process  # type: ignore[attr-defined]  # a simulated feed, or a bug's
        self._polling = Lock(self.process)  # type: ignore[assignment]  # as far as it is used

    def start(self) -> None:
        if not self.alive:
            self.alive = True
            self.process.spawn(self._run)


class Limits(NamedTuple):
    """Bounds small enough to be met."""

    known: int
    unknown: int
    flights: int


class App:
    """A process with its authenticator, from its start to its crash."""

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene = scene
        world = scene.world
        self.process = Process(world, name, hold=scene.hold)
        self.clock = ProcessClock(self.process, world.rng.uniform(-0.02, 0.02))
        self.ring = PepperRing(PEPPERS.peppers[: scene.handed_out])
        self.held = frozenset(pepper.id for pepper in self.ring.peppers)
        self.network = Network(self.process, scene.server, scene.weather)
        self.network.fault()
        self.store = RemoteStore(self.process, scene.server, self.network)
        self.store.break_feed = scene.bug.feed
        self.store.on_lookup = self._looks_up
        self.authenticator = AsyncAuthenticator(self.store, environment="prod", **self._options())
        self.cache = self.authenticator._cache
        self.changes = 0
        self.looking: set[object] = set()
        self.flying: set[object] = set()
        self.latest: dict[object, tuple[asyncio.Future[Any], int]] = {}
        self.cache.on_change.append(self._count_change)
        self._take_off = self.authenticator._take_off
        self.authenticator._take_off = self._takes_off  # type: ignore[method-assign]  # to look on
        self._land = self.authenticator._land
        self.authenticator._land = self._lands  # type: ignore[method-assign]  # likewise
        scene.bug.install(self)

    def fork(self, *, child: bool) -> None:
        """Fork, and go on as the child: all that ran is gone, all that was remembered is there. Or as the parent."""
        self.authenticator.before_fork()
        if child:
            parent = self.process
            self.process = Process(self.scene.world, parent.name, hold=self.scene.hold)
            parent.dead = True
            self.clock.process = self.store.process = self.process
            self.network.move_to(self.process)
            self.looking, self.flying = set(), set()
        self.authenticator.after_fork(child=child)

    def _options(self) -> Options:
        scene = self.scene
        options: Options = {
            "peppers": self.ring,
            "max_staleness": MAX_STALENESS,
            "max_known": scene.limits.known,
            "max_unknown": scene.limits.unknown,
            "max_flights": scene.limits.flights,
            "max_foreign_flights": scene.limits.flights,
            "lifetime": scene.lifetime,
            "timeout": 2.0,
            "clock": self.clock,
        }
        if scene.max_age is not None:
            options |= {"on_outage": "serve_cached", "max_age": scene.max_age}
        return options

    def _count_change(self) -> None:
        self.changes += 1

    def _takes_off(self, name: object, flight: asyncio.Future[Any], claim: Claim) -> None:
        before, changes = self.latest.get(name, (flight, -1))
        if changes == self.changes and not before.done():
            raise Violation("e", f"{self.process.name} has two flights for one key")
        self.latest[name] = flight, self.changes
        self.flying.add(flight)
        self._take_off(name, flight, claim)

    def _lands(self, name: object, flight: asyncio.Future[Any]) -> None:
        self.flying.discard(flight)
        self._land(name, flight)

    def _looks_up(self, claim: Claim) -> Callable[[], None]:
        looking, lookup = self.looking, object()
        looking.add(lookup)
        self.scene.judge_lookup(self, claim)
        if len(looking) > 2 * self.scene.limits.flights:  # of minted keys, and of foreign ones
            raise Violation("e", f"{self.process.name} has more lookups under way than max_flights")
        return lambda: looking.discard(lookup)

    def check_bounds(self) -> None:
        """Invariant (e), after every step."""
        cache, limits = self.cache, self.scene.limits
        known = len(cache.entries)
        if known > limits.known or len(cache.unknown) > limits.unknown:
            raise Violation("e", f"{self.process.name} keeps more entries than it may")
        if len(cache._by_key) > known or len(cache._by_machine) > known:
            raise Violation("e", f"{self.process.name} indexes what it no longer keeps")
        under_way = self.authenticator._minted.under_way, self.authenticator._invented.under_way
        if max(map(len, under_way)) > limits.flights:
            raise Violation("e", f"{self.process.name} has more flights under way than max_flights")

    def ask(self, asked: Asked) -> None:
        """Begin a verification, as a request would; sometimes its key is changed while it is under way.

        Then the same is asked again when the bound is over: what was kept wrongly shows.
        """
        scene = self.scene
        if scene.rng.random() < scene.spite:
            delay = scene.rng.choice((0.005, 0.02, 0.1, 0.3))
            scene.world.after(delay, lambda: scene.toggle(asked.text))
            again = delay + MAX_STALENESS + 0.1
            scene.world.after(again, lambda: self.process.post(lambda: self._begin(asked)))
        self.process.post(lambda: self._begin(asked))

    def _begin(self, asked: Asked) -> None:
        task = self.process.loop.create_task(self._verify(asked))
        if self.scene.world.rng.random() < 0.03:  # the client goes away
            self.process.loop.call_later(self.scene.world.rng.uniform(0, 0.02), task.cancel)

    async def _verify(self, asked: Asked) -> None:
        began = self.scene.world.now
        client = "192.0.2.7" if asked.inside else "198.51.100.1"
        try:
            identity = await self.authenticator.authenticate(asked.text, client=client, needs=asked.needs)
        except Refused as refused:
            # A key let in during an outage may lack a right, or call from elsewhere. That refusal bears no mark.
            stale = isinstance(refused.__context__, StoreUnavailable) and refused.reason in ON_THE_REQUEST
            self.scene.judge(self, asked, refused.reason.value, None, began, stale=stale)
        except asyncio.CancelledError:
            raise
        except Violation as violation:
            self.scene.violation = self.scene.violation or violation
        else:
            self.scene.judge(self, asked, "accept", identity, began, stale=identity.stale)
            self.scene.bug.accepted(self, identity)


@dataclass
class Faults:
    """How often what happens to processes and server, a second. Drawn once a seed."""

    cut: float
    crash: float
    hold: float
    jump: float
    down: float
    mute: float
    restore: float


class Scene:
    """Everything of one seed."""

    def __init__(self, seed: int, bug: Bug, *, traced: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.bug = bug
        self.world = World(rng, traced=traced)
        self.partitioned = rng.random() < 0.5
        self.server = Server(partitioned=self.partitioned)
        self.server.on_step = self.check_statuses
        self.truth = Truth(self.partitioned)
        self.weather = Weather(self.world)
        self.limits = Limits(rng.choice((3, 100)), rng.choice((2, 100)), rng.choice((3, 1_000)))
        self.lifetime = rng.choice((1.0, 300.0, 300.0))
        self.spite = rng.choice((0.0, 0.1, 0.4))
        self.mortality = rng.choice((0.1, 0.3, 0.8))
        self.zeal = rng.choice((0.3, 1.5))
        self.hold = rng.choice((0.0, 0.0, 0.002, 0.01))
        self.faults = Faults(*(rng.choice((0.0, 0.0, 0.1, 0.4)) for _ in range(7)))
        self.policies = random.Random(f"policies of {seed}")  # apart: the course of a seed stays what it was
        self.rest = self.policies.choice((0.0, 2.5))
        self.max_age = self.policies.choice((None, None, 2.2, 3.0, 6.0))
        self.violation: Violation | None = None
        self.judged = 0
        self.stale = 0
        self.pool = [self._text() for _ in range(10)]
        self.strangers = [self._text() for _ in range(6)]
        self.backups: list[tuple[MemoryStore, Any]] = []
        self.forks = self.policies.choice((0.0, 0.0, 0.1, 0.4))
        self.rotates = self.policies.random() < 0.4
        self.handed_out = 2
        bug.arrange(self)
        self._prepare()
        self.apps = [App(self, f"process {n}") for n in range(1, 4)]
        self.world.after_step = self._check

    def _text(self) -> str:
        return f"pk_{self.rng.choice(('prod', 'prod', 'test'))}_" + "".join(self.rng.choices(ALPHABET, k=18))

    # the administrator

    @property
    def keys(self) -> Keys:
        return Keys(self.server.store, peppers=PEPPERS, clock=ServerClock(self.world))

    def _prepare(self) -> None:
        keys = self.keys
        self.truth.set_pepper(self.world.now, PEPPERS.peppers[0].id, "primary")
        self._add_pepper()
        for _ in range(3):
            self.create_machine(keys)
        for _ in range(4):
            self.create_key(keys)

    def create_machine(self, keys: Keys) -> None:
        machine = keys.create_machine("Machine", organisation="cfa", rights=["contrats:lecture"])
        self.truth.set_machine(self.world.now, machine.id, active=True)

    def part_of(self, text: str) -> int:
        return partition(text.encode()) % (PARTS if self.partitioned else 1)

    def create_key(self, keys: Keys, *, machine: str | None = None) -> None:
        rng = self.rng
        free = [text for text in self.pool if text not in self.truth.existing()]
        machines = [id_ for id_, history in self.truth.machines.items() if history.last is not None]
        if not machines:
            return
        machine = machine or rng.choice(machines)
        expires = START + self.world.now + rng.uniform(0.3, 10.0) if rng.random() < self.mortality else None
        bound = rng.random() < 0.2
        environment = "prod" if rng.random() < 0.9 else "test"
        options: dict[str, Any] = {
            "name": f"K{rng.randrange(10_000)}",
            "environment": environment,
            "expires": None if expires is None else datetime.fromtimestamp(expires, UTC),
            "networks": ["192.0.2.0/24"] if bound else [],
        }
        if free and rng.random() < 0.7:
            text = rng.choice(free)
            key = keys.import_key(machine, text, **options)
            self.truth.add_foreign(self.world.now, self.part_of(text))
        else:
            key, secret = (new := keys.create_key(machine, **options)).key, new.secret
            text = secret.reveal()
            self.truth.minted[text] = self.truth.primary
        facts = KeyFacts(
            key.id, key.name, machine, environment, self.truth.primary, expires=expires, bound=bound
        )
        self.truth.set_key(self.world.now, text, facts)
        self.world.note(lambda: f"the administrator adds {facts}")

    def administer(self) -> None:
        """Make one change, unless the store is away."""
        self.world.after(self.rng.expovariate(self.zeal), self.administer)
        if not self.server.up:
            return
        change = self.rng.choice(
            (
                self.create_key,
                *[self._toggle_key] * 3,
                *[self._toggle_machine] * 2,
                self._rotate,
                self._rename,
                self._delete_machine,
                self._promote_pepper,
            )
        )
        change(self.keys)
        self.check_statuses()
        self.announce()

    def announce(self) -> None:
        for app in self.apps:
            app.network.announce()

    def _some_key(self) -> tuple[str, KeyFacts] | None:
        existing = list(self.truth.existing().items())
        return self.rng.choice(existing) if existing else None

    def _set_active(self, keys: Keys, text: str, facts: KeyFacts, *, active: bool) -> None:
        (keys.enable_key if active else keys.disable_key)(facts.id)
        self.truth.set_key(self.world.now, text, replace(facts, active=active))
        self.world.note(lambda: f"the administrator sets {facts.name} active={active}")

    def _toggle_key(self, keys: Keys) -> None:
        if chosen := self._some_key():
            self._set_active(keys, *chosen, active=not chosen[1].active)

    def toggle(self, text: str) -> None:
        """Disable or enable the key of this text, where there is one that was left alone for a while."""
        facts = self.truth.existing().get(text)
        now = self.world.now
        if facts is not None and self.server.up and not self.truth.keys[text].changes(now - self.rest, now):
            self._set_active(self.keys, text, facts, active=not facts.active)
            self.announce()

    def _rotate(self, keys: Keys) -> None:
        """Make a replacement now, and disable the old key later."""
        if not (chosen := self._some_key()):
            return
        text, facts = chosen
        self.create_key(keys, machine=facts.machine)
        self.world.after(self.rng.uniform(0.1, 3.0), lambda: self._retire(text, facts.id))

    def _retire(self, text: str, key_id: str) -> None:
        facts = self.truth.existing().get(text)
        if facts is not None and facts.id == key_id and self.server.up:
            self._set_active(self.keys, text, facts, active=False)
            self.announce()

    def _rename(self, keys: Keys) -> None:
        if chosen := self._some_key():
            text, facts = chosen
            renamed = replace(facts, name=f"K{self.rng.randrange(10_000)}")
            keys.rename_key(facts.id, renamed.name)
            self.truth.set_key(self.world.now, text, renamed)

    def _toggle_machine(self, keys: Keys) -> None:
        alive = [(id_, h.last) for id_, h in self.truth.machines.items() if h.last is not None]
        if alive:
            id_, active = self.rng.choice(alive)
            (keys.disable_machine if active else keys.enable_machine)(id_)
            self.truth.set_machine(self.world.now, id_, active=not active)
            self.world.note(lambda: f"the administrator sets machine {id_} active={not active}")

    def _delete_machine(self, keys: Keys) -> None:
        alive = [id_ for id_, history in self.truth.machines.items() if history.last is not None]
        if len(alive) > 1 and self.rng.random() < 0.3:
            id_ = self.rng.choice(alive)
            self.server.store.delete_machine(id_, Author("simulation", datetime.now(UTC)))
            self.truth.set_machine(self.world.now, id_, None)
            self.create_machine(keys)
            self.world.note(lambda: f"the administrator deletes machine {id_}")

    def _promote_pepper(self, keys: Keys) -> None:
        self._set_pepper(self.rng.choice(PEPPERS.peppers[:2]).id, "primary")

    def _set_pepper(self, pepper: str, status: PepperStatus) -> None:
        self.server.store.set_pepper_status(pepper, status, Author("simulation", datetime.now(UTC)))
        self.truth.set_pepper(self.world.now, pepper, status)
        self.world.note(lambda: f"the administrator makes pepper {pepper} {status}")

    def tend_peppers(self) -> None:
        """Take one step in the life of a pepper, unless the store is away."""
        self.world.after(self.policies.expovariate(1.5), self.tend_peppers)
        if not self.server.up:
            return
        self.policies.choice(
            (
                self._add_pepper,
                *[self._deploy] * 2,
                *[self._replace_primary] * 2,
                self._retire_pepper,
                self._readmit,
            )
        )()
        self.announce()

    def _add_pepper(self) -> None:
        store = self.server.store
        installation, there = store.describe()
        unknown = [pepper for pepper in PEPPERS.peppers if pepper.id not in {record.id for record in there}]
        if unknown:
            record = PepperRecord(unknown[0].id, unknown[0].proof(installation), "accept")
            store.add_pepper(record, Author("simulation", datetime.now(UTC)))
            self.truth.set_pepper(self.world.now, record.id, "accept")
            self.world.note(lambda: f"the administrator adds pepper {record.id}")

    def _deploy(self) -> None:
        """Hand out what there is, to who begins from now on; one process does at once."""
        self.handed_out = max(self.handed_out, len(self.server.store.describe().peppers))
        self._restart(self.policies.randrange(len(self.apps)))

    def _pepper_that_is(self, status: PepperStatus) -> str | None:
        there = [record.id for record in self.server.store.describe().peppers if record.status == status]
        return self.policies.choice(there) if there else None

    def _replace_primary(self) -> None:
        """Also by one that not every process has."""
        if pepper := self._pepper_that_is("accept"):
            self._set_pepper(pepper, "primary")
            self.create_key(self.keys)

    def _retire_pepper(self) -> None:
        """Retire one that no key uses; or one that leaked, whose keys must go with it."""
        pepper = self._pepper_that_is("accept")
        if pepper and (not self.server.store.count_digests(pepper) or self.policies.random() < 0.5):
            self._set_pepper(pepper, "retired")
            self.world.after(MAX_STALENESS + 0.1, lambda: self._ask_for_keys_of(pepper))

    def _ask_for_keys_of(self, pepper: str) -> None:
        for text, facts in self.truth.existing().items():
            if facts.pepper == pepper:
                for app in self.apps:
                    app.ask(Asked(text, inside=True, needs=""))

    def _readmit(self) -> None:
        if pepper := self._pepper_that_is("retired"):
            self._set_pepper(pepper, "accept")

    # faults

    def plan_faults(self) -> None:
        faults = self.faults
        for rate, event in (
            (faults.cut, self._cut),
            (faults.crash, self._crash),
            (faults.hold, self._hold),
            (faults.jump, self._jump),
            (faults.down, self._go_down),
            (faults.mute, self._mute),
            (faults.restore, self._restore),
            (self.forks, self._fork),
        ):
            if rate:
                self._again(rate, event)

    def _again(self, rate: float, event: Callable[[], None]) -> None:
        def happen() -> None:
            event()
            self._again(rate, event)

        self.world.after(self.rng.expovariate(rate), happen)

    def _cut(self) -> None:
        app, seconds = self.rng.choice(self.apps), self.rng.choice((0.3, 1.0, 2.5, 5.0))
        self.world.note(lambda: f"{app.process.name} is cut off for {seconds} s")
        app.network.cut = True
        app.network.fault(seconds)

        def mend() -> None:
            app.network.cut = False

        self.world.after(seconds, mend)

    def _crash(self) -> None:
        self._restart(self.rng.randrange(len(self.apps)))

    def _restart(self, place: int) -> None:
        app = self.apps[place]
        self.world.note(lambda: f"{app.process.name} crashes and begins anew")
        app.process.dead = True
        self.apps[place] = App(self, app.process.name)

    def _fork(self) -> None:
        app = self.policies.choice(self.apps)
        child = self.policies.random() < 0.8
        if not app.process.held:
            self.world.note(
                lambda: f"{app.process.name} forks, and goes on as the {'child' if child else 'parent'}"
            )
            app.fork(child=child)

    def _hold(self) -> None:
        app, seconds = self.rng.choice(self.apps), self.rng.choice((0.1, 0.6, 1.5, 2.1, 4.0))
        self.world.note(lambda: f"{app.process.name} stands still for {seconds} s")
        app.process.hold(seconds)

    def _jump(self) -> None:
        app, seconds = self.rng.choice(self.apps), self.rng.choice((-8.0, -1.0, -0.03, 0.03, 3.0, 8.0))
        self.world.note(lambda: f"the wall clock of {app.process.name} jumps by {seconds} s")
        app.clock.jump(seconds)

    def _mute(self) -> None:
        app, part = self.rng.choice(self.apps), self.rng.randrange(PARTS + 1)
        if self.partitioned:
            self.world.note(lambda: f"{app.process.name} hears nothing of part {part} for 4 s")
            app.network.mute(part, 4.0)

    def _everyone(self, lasting: float = 0.0) -> None:
        for app in self.apps:
            app.network.fault(lasting)

    def _go_down(self) -> None:
        if not self.server.up:
            return
        seconds = self.rng.choice((0.2, 1.0, 3.0))
        self.world.note(lambda: f"the store is away for {seconds} s")
        self.server.up = False
        self._everyone(seconds)

        def come_back() -> None:
            self.server.up = True
            self._everyone()

        self.world.after(seconds, come_back)

    def _restore(self) -> None:
        """Take a backup, or go back to one: an administrative act, after which the backup is the truth."""
        if self.backups and self.server.up and self.rng.random() < 0.6:
            store, truth = self.rng.choice(self.backups)
            self.world.note(lambda: "the store is restored from a backup")
            self.server.store = backup(store)
            self.truth.restore(self.world.now, truth)
            self._everyone()
        else:
            self.backups.append((backup(self.server.store), self.truth.snapshot()))

    # verification

    def load(self, place: int, rate: float) -> None:
        """Let one process be asked, again and again; sometimes a burst of keys at once."""
        self.world.after(self.rng.expovariate(rate), lambda: self.load(place, rate))
        for _ in range(8 if self.rng.random() < 0.02 else 1):
            self.apps[place].ask(self._question())

    def _question(self) -> Asked:
        rng = self.rng
        if rng.random() < 0.03:
            forged = KeyFormat().mint("prod", tag=lambda _: 0x1234).reveal()
            return Asked(forged, inside=True, needs="", malformed=True)
        luck = rng.random()
        texts = list(self.truth.keys)[-4:] if luck < 0.5 else list(self.truth.keys) if luck < 0.8 else []
        needs = rng.choice(("", "", "", "contrats:lecture", "contrats:écriture"))
        return Asked(
            rng.choice(texts or [*self.pool, *self.strangers]), inside=rng.random() < 0.7, needs=needs
        )

    # the invariants

    def judge(
        self, app: App, asked: Asked, answer: str, identity: Identity | None, began: float, *, stale: bool
    ) -> None:
        """Hold an answer against the truth: invariants (a), (b), (c), (f), (g)."""
        self.judged += 1
        said = f"{answer}, stale" if stale else answer
        self.world.note(lambda: f"{app.process.name} answers {said} to {asked}")
        try:
            if stale or answer == "store_unavailable":
                self._check_outage(app, began)
            if answer != "store_unavailable":
                bound = self.max_age if stale and self.max_age is not None else MAX_STALENESS
                self._check_answer(app, asked, answer, identity, bound)
                self._check_watch(app, answer, began)
                self.stale += stale
        except Violation as violation:
            self.violation = self.violation or violation

    def _is_calm(self, app: App, began: float) -> bool:
        """Tell whether no fault touched a process for the bound and a client's patience before."""
        return began > app.network.last_fault + MAX_STALENESS + self.weather.patience

    def judge_lookup(self, app: App, claim: Claim) -> None:
        """Invariant (h): no store is asked for a foreign key that it cannot have."""
        now, part = self.world.now, claim.partition % (PARTS if self.partitioned else 1)
        since = now - MAX_STALENESS - self.weather.patience
        trusted = app.cache.trusted_until > app.clock.uptime(now)
        if (
            claim.foreign
            and trusted
            and self._is_calm(app, now)
            and self.truth.primary_held(app.held, since, now)
            and not self.truth.primary_missing(app.held, since, now)
            and not self.truth.holds_foreign(part, since, now)
        ):
            self.violation = self.violation or Violation("h", f"{app.process.name} looks up a foreign key")

    def _check_watch(self, app: App, answer: str, began: float) -> None:
        trusted = app.cache.trusted_until > app.clock.uptime(app.process.last_reading)
        if not trusted and answer != "malformed_key" and self._is_calm(app, began):
            raise Violation("g", f"{app.process.name} trusts nothing, and no fault keeps it from reading")

    def _check_outage(self, app: App, began: float) -> None:
        full = len(app.flying) >= self.limits.flights
        cannot_tell = self.truth.primary_missing(app.held, began - MAX_STALENESS, self.world.now)
        if self._is_calm(app, began) and not full and not cannot_tell:
            raise Violation("c", f"{app.process.name} reports an outage of a store that answers")

    def _check_answer(
        self, app: App, asked: Asked, answer: str, identity: Identity | None, bound: float
    ) -> None:
        until = app.process.last_reading
        since = until - bound - EPSILON
        offsets = app.clock.since(since)
        right = self.truth.answers(asked, since, until, offsets, app.held)
        if answer in right:
            if identity is not None and identity.key.name not in right[answer]:
                raise Violation(
                    "a", f"an identity is called {identity.key.name}, and was not within the bound"
                )
            return
        said = f"{app.process.name} says {answer}, which was not so within the bound: {sorted(right)}"
        if answer != "accept":
            raise Violation("c" if "accept" in right else "f", said)
        raise Violation("a" if self.truth.ever_valid(asked.text) else "b", said)

    def check_statuses(self) -> None:
        """Invariant (d): the store says what administration has said, and nothing else."""
        store = self.server.store
        said = {facts.id: facts.active for facts in self.truth.existing().values()}
        found = {key.id: key.status == "active" for key in store._keys.values()}
        machines = {id_: h.last for id_, h in self.truth.machines.items() if h.last is not None}
        if said != found or machines != {m.id: m.status == "active" for m in store._machines.values()}:
            self.violation = self.violation or Violation("d", "a status in the store is not administration's")

    def _check(self) -> None:
        for app in self.apps:
            app.check_bounds()
        if self.violation is not None:
            raise self.violation

    def run(self) -> None:
        self.administer()
        self.plan_faults()
        if self.rotates:
            self.tend_peppers()
        rate = self.rng.choice((5.0, 10.0, 20.0))
        for place in range(len(self.apps)):
            self.load(place, rate)
        self.world.run(DURATION)


class ServerClock:
    """The administrator's clock, which is right."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    def time(self) -> float:
        return START + self._world.now


@contextmanager
def determined(seed: int) -> Iterator[None]:
    """Let ``secrets`` draw from the seed, and authenticators take the simulated watcher."""
    rng = random.Random(~seed)
    with (
        mock.patch.object(secrets, "token_bytes", lambda size=32: rng.randbytes(size)),
        mock.patch.object(secrets, "token_hex", lambda size=32: rng.randbytes(size).hex()),
        mock.patch.object(secrets, "randbelow", rng.randrange),
        mock.patch.object(authenticator_module, "Watcher", SimulatedWatcher),
    ):
        yield


class Outcome(NamedTuple):
    """What became of a seed."""

    violation: Violation | None
    judged: int
    stale: int
    trace: list[str]


def run(seed: int, bug: Bug | None = None, *, traced: bool = False) -> Outcome:
    """Run one seed. The same seed does the same, to the last draw."""
    with determined(seed):
        scene = Scene(seed, bug or Bug(), traced=traced)
        try:
            scene.run()
        except Violation as violation:
            return Outcome(violation, scene.judged, scene.stale, scene.world.trace)
        finally:
            scene.world.end()
        return Outcome(None, scene.judged, scene.stale, scene.world.trace)
