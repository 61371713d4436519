"""A labelled world: 50 keys that call for 90 days, each in its own way, and attacks planted among them.

It knows nothing of the detector: it imports the shape of an event from the library, and nothing else. Everything
follows from the seed.

What is ordinary, and looks like an attack to a naive eye: bursts of webhooks, month-end runs, holidays and the days
after them, deployments (new routes, new addresses, sometimes a minute of wrong keys), clients that roam, routes
called once a month, typing errors, customers whose cron job still has a deleted key, networks that fail a little
every day, keys that begin late, use that doubles for good, and a change of clocks.

In a harder world, bursts, the ends of months and nights have routes of their own, and one thief in four divides
calls among routes as the key does.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from papaours_auth.usage.event import Event, Refusals

SECOND: Final = 1_000_000
HOUR_S: Final = 3600
START: Final = 1_767_571_200  # Monday 2026-01-05, 00:00 UTC
KEYS, DAYS = 50, 90
QUIET_DAYS: Final = 30  # no attack before: nobody can tell what is unusual of an unknown


class Attack(NamedTuple):
    """A label: who is attacked (a key, or from which network), in which way, and when (seconds since 1970)."""

    sign: str
    strength: str
    subject: str
    begin: float
    end: float


class Call(NamedTuple):
    at: float
    address: str
    method: str
    route: str
    status: int
    reason: str = ""


@dataclass
class Caller:
    """A key, and how it is used."""

    key: str
    machine: str
    day_calls: float
    hours: list[float]
    weekdays: list[float]
    noise: float
    growth: float
    bursts_per_week: float
    burst_size: float
    month_end: float
    holidays_matter: bool
    addresses: list[str]
    roaming: Callable[[random.Random], str] | None
    routes: list[tuple[str, str]]
    weights: list[float]
    rare: list[tuple[str, str]]
    denied: float
    stray: float
    birth: int
    burst_mix: str = "as always"  # or the same few routes each time, or another one each time
    month_end_alone: bool = False  # what is more at the end of a month calls one route
    night_mix: bool = False  # other routes by night than by day
    changes: dict[int, list[Callable[[Caller, random.Random], None]]] = field(default_factory=dict)
    planted: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    bursts: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    misfires: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    cumulated: list[float] = field(default_factory=list)
    by_night: list[float] = field(default_factory=list)


NOUNS: Final = (
    "contrats factures apprenants entreprises formations absences notes utilisateurs documents paiements devis "
    "stages groupes salles plannings exports imports messages rapports organisations roles certificats"
).split()
VERBS: Final = ("GET", "GET", "GET", "POST", "PUT", "DELETE")
SUMMER: Final = 83  # Sunday 2026-03-29
HOLIDAYS: Final = (25, 26, 53, 54, 55, 56, 57, 58, 59, 74)


class World:
    """One seed's 90 days. `stream` gives events and refusals in about the order of their times."""

    def __init__(
        self, seed: int, *, keys: int = KEYS, days: int = DAYS, attacks: float = 1.0, harder: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.harder = random.Random(f"harder {seed}") if harder else None  # the rest is the same world
        self.days = days
        self.attacks: list[Attack] = []
        self.refused: dict[int, list[tuple[float, str, str, int]]] = defaultdict(list)
        self.callers = [self._caller(number, days) for number in range(keys)]
        for caller in self.callers:
            self._deployments(caller)
            if self.harder is not None:
                caller.burst_mix = self.harder.choice(["as always", "the same", "the same", "another"])
                caller.month_end_alone = self.harder.random() < 0.5
                caller.night_mix = self.harder.random() < 0.3
        self._strangers()
        self._plan(attacks)

    # who calls

    def _caller(self, number: int, days: int) -> Caller:
        rnd = self.random
        kind = rnd.choices(
            ["office", "always", "nightly", "webhook", "sparse"], [0.35, 0.25, 0.15, 0.15, 0.10]
        )[0]
        volume = 12.0 if kind == "sparse" else min(max(rnd.lognormvariate(math.log(220), 0.9), 30), 2500)
        routes = self._routes(rnd.randint(3, 14))
        roaming, addresses = self._addresses()
        return Caller(
            key=f"key-{number:02}",
            machine=f"machine-{number // 2:02}",
            day_calls=volume,
            hours=_profile(kind, rnd),
            weekdays=_weekdays(kind, rnd),
            noise=rnd.uniform(0.05, 0.35),
            growth=rnd.choice([0.0, 0.0, 0.002, 0.006]),
            bursts_per_week=rnd.uniform(1.0, 5.0)
            if kind == "webhook"
            else rnd.choice([0.0, 0.0, 0.0, 0.3, 1.0]),
            burst_size=rnd.uniform(0.1, 0.6),
            month_end=rnd.choice([1.0, 1.0, 1.0, 1.6, 2.5]),
            holidays_matter=kind in ("office", "sparse") or rnd.random() < 0.4,
            addresses=addresses,
            roaming=roaming,
            routes=routes,
            weights=[rnd.paretovariate(0.8) for _ in routes],
            rare=self._routes(rnd.choice([0, 0, 1, 2])),
            denied=rnd.choice([0.0, 0.0, 0.0005, 0.003]),
            stray=rnd.choice([1 / 60, 1 / 60, 1 / 60, 1 / 20, 1.0]),
            birth=0 if rnd.random() < 0.85 else rnd.randint(1, days // 2),
        )

    def _routes(self, count: int) -> list[tuple[str, str]]:
        rnd = self.random
        made = []
        for _ in range(count):
            noun, verb = rnd.choice(NOUNS), rnd.choice(VERBS)
            deep = rnd.choice(["", "/{id}", "/{id}", f"/{{id}}/{rnd.choice(NOUNS)}"])
            made.append((verb, f"/v1/{noun}{deep}"))
        return made

    def _addresses(self) -> tuple[Callable[[random.Random], str] | None, list[str]]:
        rnd = self.random
        way = rnd.choices(["one", "few", "cloud", "roaming", "six"], [0.45, 0.2, 0.1, 0.08, 0.17])[0]
        if way == "six":
            prefix = self._prefix6()
            return None, [f"{prefix}:{rnd.randrange(1 << 16):x}::{n + 1:x}" for n in range(rnd.randint(1, 3))]
        if way == "cloud":
            return None, [f"{self._prefix()}.{rnd.randint(1, 254)}" for _ in range(rnd.randint(5, 12))]
        if way == "roaming":
            carriers = [
                f"{rnd.randint(31, 95)}.{rnd.randint(0, 255)}" for _ in range(rnd.randint(2, 6))
            ]  # a carrier's /16
            return (lambda r: f"{r.choice(carriers)}.{r.randint(0, 255)}.{r.randint(1, 254)}"), []
        prefixes = [self._prefix() for _ in range(1 if way == "one" else rnd.randint(2, 3))]
        return None, [f"{rnd.choice(prefixes)}.{rnd.randint(1, 254)}" for _ in range(len(prefixes) * 2)]

    def _prefix(self) -> str:
        rnd = self.random
        return f"{rnd.randint(100, 191)}.{rnd.randint(0, 255)}.{rnd.randint(0, 255)}"

    def _prefix6(self) -> str:
        rnd = self.random
        return f"2a0{rnd.randrange(16):x}:{rnd.randrange(1 << 16):x}:{rnd.randrange(1 << 16):x}"

    # what changes

    def _deployments(self, caller: Caller) -> None:
        rnd = self.random
        day = rnd.expovariate(1 / 75)  # one in two and a half months
        while day < self.days:
            changes: list[Callable[[Caller, random.Random], None]] = []
            if rnd.random() < 0.7:
                routes = self._routes(rnd.randint(1, 3))
                changes.append(lambda c, r, routes=routes: _add_routes(c, r, routes))  # type: ignore[misc]
            if rnd.random() < 0.4:
                prefix = self._prefix() if rnd.random() < 0.5 else None
                changes.append(lambda c, r, prefix=prefix: _add_address(c, r, prefix))  # type: ignore[misc]
            if rnd.random() < 0.15:
                changes.append(lambda c, r: _grow(c, r.uniform(1.3, 2.5)))
            if rnd.random() < 0.2:
                self._misfire(caller, int(day))
            caller.changes.setdefault(int(day), []).extend(changes)
            day += rnd.expovariate(1 / 75)

    def _misfire(self, caller: Caller, day: int) -> None:
        """The new version starts with the key of another environment, until somebody sees it."""
        rnd = self.random
        begin = START + (day * 24 + rnd.randint(8, 17)) * HOUR_S
        address = caller.addresses[0] if caller.addresses else "198.18.0.1"
        for _ in range(rnd.randint(2, 14)):
            at = begin + rnd.uniform(0, 600)
            caller.misfires[_hour(at)].append(Call(at, address, *caller.routes[0], 401, "wrong_environment"))

    def _strangers(self) -> None:
        """Refusals of keys nobody knows: typing errors, scanners of the internet, a forgotten cron job."""
        rnd = self.random
        for _ in range(40):  # customers whose people type keys by hand
            network = f"{self._prefix()}.0/24"
            at = START + rnd.expovariate(1 / (20 * 86_400))
            while at < START + self.days * 86_400:
                self._refuse(at, network, rnd.choice(["unknown_key", "malformed_key"]), rnd.randint(1, 4))
                at += rnd.expovariate(1 / (20 * 86_400))
        for day in range(self.days):
            for _ in range(rnd.randint(20, 60)):  # scanners: no key at all, or a word
                at = START + day * 86_400 + rnd.uniform(0, 86_400)
                network = f"{self._prefix()}.0/24"
                self._refuse(at, network, "missing_key", int(rnd.paretovariate(0.7)) % 300 + 1)
                if rnd.random() < 0.2:
                    self._refuse(at, network, "malformed_key", rnd.randint(1, 5))
        for _ in range(4):  # a school, say, where somebody fails every day
            network, mean = f"{self._prefix()}.0/24", rnd.uniform(0.5, 8)
            at = START + rnd.expovariate(mean / 86_400)
            while at < START + self.days * 86_400:
                self._refuse(at, network, "unknown_key", 1)
                at += rnd.expovariate(mean / 86_400)
        for _ in range(2):  # the cron jobs
            network, at = f"{self._prefix()}.0/24", START + rnd.uniform(5, 75) * 86_400
            for _ in range(rnd.randint(60, 300)):
                self._refuse(at, network, "unknown_key", 1)
                at += 1800

    def _refuse(self, at: float, network: str, reason: str, calls: int) -> None:
        self.refused[_hour(at)].append((at, network, reason, calls))

    # attacks

    def _plan(self, amount: float) -> None:
        free = {caller.key: [(0.0, 0.0)] for caller in self.callers}
        for kind, strength, times, plant in ATTACKS:
            for _ in range(max(1, round(times * amount))):
                attack = self._planted(plant, self._victim(free), strength)
                self.attacks.append(Attack(kind, strength, *attack))
                if attack[0] in free:
                    free[attack[0]].append((attack[1], attack[2]))

    def _planted(self, plant: Plant, victim: Caller, strength: str) -> Planted:
        return plant(self, victim, self._moment(victim), strength)

    def _moment(self, victim: Caller) -> float:
        first = min(victim.birth + QUIET_DAYS, self.days - 10)
        return START + self.random.uniform(first, self.days - 9) * 86_400

    def _victim(self, free: dict[str, list[tuple[float, float]]]) -> Caller:
        """Choose who was attacked least, so that attacks on one key stay apart in most cases."""
        rnd = self.random
        least = min(len(taken) for taken in free.values())
        return rnd.choice([caller for caller in self.callers if len(free[caller.key]) == least])

    # the stream

    def stream(self) -> Iterator[Event | Refusals]:
        """Give everything. Events of different producers come up to some seconds out of order."""
        rnd = self.random
        number = 0
        for hour in range(self.days * 24):
            if hour % 24 == 0:
                for caller in self.callers:
                    for change in caller.changes.get(hour // 24, ()):
                        change(caller, rnd)
            fed: list[tuple[float, str, str, Call | tuple[float, str, str, int]]] = []
            for caller in self.callers:
                fed += [
                    (call.at + rnd.uniform(0, 3), caller.key, caller.machine, call)
                    for call in self._calls(caller, hour)
                ]
            fed += [(refused[0] + 61, "", "", refused) for refused in self.refused.get(hour, ())]
            for _, key, machine, what in sorted(fed, key=lambda entry: entry[0]):
                number += 1
                yield _event(number, key, machine, what) if isinstance(what, Call) else _refusals(what)

    def _calls(self, caller: Caller, hour: int) -> list[Call]:
        rnd = self.random
        if hour < caller.birth * 24:
            return []
        begin = START + hour * HOUR_S
        count = _poisson(self._rate(caller, hour), rnd)
        calls = [self._call(caller, hour, begin + rnd.random() * HOUR_S) for _ in range(count)]
        if rnd.random() < caller.bursts_per_week / 168:
            self._burst(caller, begin + rnd.random() * HOUR_S)
        calls += [
            Call(begin + rnd.random() * HOUR_S, _address(caller, rnd), *route, 200)
            for route in caller.rare
            if rnd.random() < 1 / (24 * 12)  # about every twelve days
        ]
        if rnd.random() < caller.stray / 24:  # a refusal now and then
            calls.append(
                Call(
                    begin + rnd.random() * HOUR_S,
                    _address(caller, rnd),
                    *caller.routes[0],
                    401,
                    "key_expired",
                )
            )
        later = (caller.bursts, caller.planted, caller.misfires)
        return calls + [call for calls in later for call in calls.pop(hour, ())]

    def _call(self, caller: Caller, hour: int, at: float) -> Call:
        day, of_day = divmod(hour, 24)
        call = _ordinary(caller, at, self.random, by_night=caller.night_mix and of_day < 6)
        more = 1 - 1 / caller.month_end if caller.month_end_alone and day % 30 in (28, 29) else 0.0
        if self.harder is not None and more and self.harder.random() < more:
            return _at_route(call, caller.routes[-1])
        return call

    def _burst(self, caller: Caller, begin: float) -> None:
        rnd = self.random
        seconds = rnd.uniform(300, 5400)
        alone: list[tuple[str, str]] = []
        if self.harder is not None and caller.burst_mix != "as always":
            alone = (
                caller.routes[:2] if caller.burst_mix == "the same" else [self.harder.choice(caller.routes)]
            )
        for _ in range(_poisson(caller.day_calls * caller.burst_size * rnd.lognormvariate(0, 0.6), rnd)):
            call = _ordinary(caller, begin + rnd.random() * seconds, rnd)
            if self.harder is not None and alone:
                call = _at_route(call, self.harder.choice(alone))
            caller.bursts[_hour(call.at)].append(call)

    def _rate(self, caller: Caller, hour: int) -> float:
        day, of_day = divmod(hour, 24)
        if day >= SUMMER:
            of_day = (of_day + 1) % 24  # people follow their clocks, not UTC
        rate = caller.day_calls * caller.hours[of_day] * caller.weekdays[day % 7] * (1 + caller.growth * day)
        if caller.holidays_matter and day in HOLIDAYS:
            rate *= 0.1
        if day % 30 in (28, 29):
            rate *= caller.month_end
        return rate * math.exp(self.random.gauss(0, caller.noise))

    def plain_peak(self, caller: Caller) -> float:
        """How many calls an ordinary busy hour has."""
        return caller.day_calls * max(caller.hours) * max(caller.weekdays)


def _profile(kind: str, rnd: random.Random) -> list[float]:
    if kind in ("office", "sparse"):
        shape = [math.exp(-(((hour - 13) / rnd.uniform(3, 4)) ** 2)) for hour in range(24)]
        shape = [value if 6 <= hour <= 20 else 0.0 for hour, value in enumerate(shape)]
    elif kind == "nightly":
        at = rnd.randint(0, 5)
        shape = [1.0 if hour in (at, at + 1) else 0.02 for hour in range(24)]
    else:
        phase = rnd.uniform(0, 24)
        shape = [1 + rnd.uniform(0.1, 0.6) * math.sin((hour - phase) / 24 * math.tau) for hour in range(24)]
    total = sum(shape)
    return [value / total for value in shape]


def _weekdays(kind: str, rnd: random.Random) -> list[float]:
    if kind in ("office", "sparse"):
        weekend = rnd.choice([0.0, 0.05, 0.3])
        return [1.0, 1.1, 1.0, 1.05, 0.85, weekend, weekend]
    return [rnd.uniform(0.8, 1.1) for _ in range(5)] + [rnd.uniform(0.3, 1.0) for _ in range(2)]


def _poisson(mean: float, rnd: random.Random) -> int:
    if mean > 40:
        return max(0, round(rnd.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), rnd.random(), 0
    while product > limit:
        product *= rnd.random()
        count += 1
    return count


def _hour(at: float) -> int:
    return int(at - START) // HOUR_S


def _address(caller: Caller, rnd: random.Random) -> str:
    if caller.roaming is None:
        return rnd.choice(caller.addresses)
    if not caller.addresses or rnd.random() < 0.02:  # now and then the carrier gives it another
        caller.addresses[:] = [caller.roaming(rnd)]
    return caller.addresses[0]


def _ordinary(caller: Caller, at: float, rnd: random.Random, *, by_night: bool = False) -> Call:
    if len(caller.cumulated) != len(caller.routes):
        caller.cumulated = list(itertools.accumulate(caller.weights))
        caller.by_night = list(itertools.accumulate(reversed(caller.weights)))
    weights = caller.by_night if by_night else caller.cumulated
    method, route = rnd.choices(caller.routes, cum_weights=weights)[0]
    chance = rnd.random()
    if chance < caller.denied:
        return Call(at, _address(caller, rnd), method, route, 403, "insufficient_rights")
    status = 200 if chance < 0.97 else 404 if chance < 0.99 else 500
    return Call(at, _address(caller, rnd), method, route, status)


def _at_route(call: Call, route: tuple[str, str]) -> Call:
    return call._replace(method=route[0], route=route[1])


def _add_routes(caller: Caller, rnd: random.Random, routes: list[tuple[str, str]]) -> None:
    caller.routes += routes
    caller.weights += [rnd.paretovariate(0.8) for _ in routes]


def _grow(caller: Caller, factor: float) -> None:
    caller.day_calls *= factor


def _add_address(caller: Caller, rnd: random.Random, prefix: str | None) -> None:
    if caller.addresses and caller.roaming is None:
        before = caller.addresses[0]
        if ":" in before:
            made = f"{before.rpartition('::')[0]}::{rnd.randint(256, 4096):x}"
        else:
            made = f"{prefix or before.rpartition('.')[0]}.{rnd.randint(1, 254)}"
        caller.addresses.append(made)


def _event(number: int, key: str, machine: str, call: Call) -> Event:
    return Event(
        1, f"g-{number}", int(call.at * SECOND), key, machine, call.address, call.method, call.route, call.status,
        call.reason, "completed", "", "prod", 1000, "",
    )  # fmt: skip


def _refusals(refused: tuple[float, str, str, int]) -> Refusals:
    at, network, reason, calls = refused
    return Refusals(int(at // 60) * 60 * SECOND, reason, network, calls)


# The attacks. Each gives its subject, its first and its last moment.

Planted = tuple[str, float, float]


def _put(caller: Caller, calls: list[Call]) -> Planted:
    for call in calls:
        caller.planted[_hour(call.at)].append(call)
    times = [call.at for call in calls]
    return caller.key, min(times), max(times)


def from_elsewhere(world: World, caller: Caller, at: float, strength: str) -> Planted:
    """The stolen key is used from a network of the thief's, on the routes the key is used for."""
    rnd = world.random
    address = f"{world._prefix()}.{rnd.randint(1, 254)}" if rnd.random() < 0.8 else f"{world._prefix6()}::7"
    near = caller.addresses[0] if caller.addresses else caller_address(caller, rnd)
    if strength == "20 calls, next door" and "." in near:  # the same provider
        address = f"{near.rsplit('.', 2)[0]}.{(int(near.split('.')[2]) + rnd.randint(1, 255)) % 256}.77"
    count, seconds = {"one call": (1, 1), "200 calls": (200, 6 * 3600)}.get(strength, (20, 3600))
    known = caller.routes[: max(1, len(caller.routes) // 2)]
    calls = [Call(at + rnd.uniform(0, seconds), address, *rnd.choice(known), 200) for _ in range(count)]
    return _put(caller, calls)


def harvest(world: World, caller: Caller, at: float, strength: str) -> Planted:
    """The stolen key is used from the machine itself, on its own routes, and much."""
    rnd = world.random
    peak = world.plain_peak(caller)
    factor, hours = {
        "2 x peak hour": (2, 8),
        "4 x peak hour": (4, 4),
        "8 x peak hour": (8, 2),
        "25 x peak hour": (25, 1),
    }[strength]
    count = int(max(factor * peak, 10.0) * hours)

    def address() -> str:
        return rnd.choice(caller.addresses) if caller.addresses else caller_address(caller, rnd)

    known = caller.routes[: max(1, len(caller.routes) // 2)]
    calls = [
        Call(at + rnd.uniform(0, hours * 3600), address(), *rnd.choice(known), 200) for _ in range(count)
    ]
    if world.harder is not None and world.harder.random() < 0.25:
        routes = world.harder.choices(caller.routes, caller.weights, k=count)
        calls = [_at_route(call, route) for call, route in zip(calls, routes, strict=True)]
    return _put(caller, calls)


def caller_address(caller: Caller, rnd: random.Random) -> str:
    """An address such as a roaming client has."""
    if caller.roaming is None:
        raise ValueError("this caller has addresses of its own")
    return caller.roaming(rnd)


FAILING: Final = {
    "15 in 5 minutes": (15, 300.0),
    "60 in an hour": (60, 3600.0),
    "600 in 10 minutes": (600, 600.0),
    "slow: 2 an hour, 3 days": (144, 3 * 86_400.0),
    "slower: 8 a day, 7 days": (56, 7 * 86_400.0),
    "slowest: 5 a day, 9 days": (45, 9 * 86_400.0),
}


def tried_key(world: World, caller: Caller, at: float, strength: str) -> Planted:
    """A disabled or bound key is tried again and again, from the network it is known in: only the failures tell."""
    rnd = world.random
    count, seconds = FAILING[strength]
    address = caller.addresses[0] if caller.addresses else caller_address(caller, rnd)
    reason = rnd.choice(["key_inactive", "key_expired", "wrong_environment"])
    calls = [
        Call(at + rnd.uniform(0, seconds), address, *caller.routes[0], 401, reason) for _ in range(count)
    ]
    return _put(caller, calls)


def guessed_keys(world: World, _: Caller, at: float, strength: str) -> Planted:
    """A network tries keys that nobody has."""
    rnd = world.random
    count, seconds = FAILING[strength]
    network = f"{world._prefix()}.0/24"
    times = sorted(at + rnd.uniform(0, seconds) for _ in range(count))
    for moment in times:
        world._refuse(moment, network, rnd.choice(["unknown_key", "malformed_key"]), 1)
    return network, times[0], times[-1]


def looks_around(world: World, caller: Caller, at: float, strength: str) -> Planted:
    """The stolen key is used from its own network, on resources it never asked for."""
    rnd = world.random
    used = {route.split("/")[2] for _, route in [*caller.routes, *caller.rare]}
    other = [noun for noun in NOUNS if noun not in used] or ["secrets"]
    count, kinds = {"one call": (1, 1), "10 calls": (10, 2), "200 calls": (200, 8)}[strength]
    routes = [(rnd.choice(["GET", "GET", "POST"]), f"/v1/{rnd.choice(other)}/{{id}}") for _ in range(kinds)]
    address = caller.addresses[0] if caller.addresses else caller_address(caller, rnd)
    calls = [Call(at + rnd.uniform(0, 60.0 * count), address, *rnd.choice(routes), 200) for _ in range(count)]
    return _put(caller, calls)


def pushes_doors(world: World, caller: Caller, at: float, strength: str) -> Planted:
    """The stolen key asks for what it has no right to, on routes it knows."""
    rnd = world.random
    count, seconds = {"12 refused": (12, 600), "60 refused": (60, 1800), "400 refused": (400, 3600)}[strength]
    address = caller.addresses[0] if caller.addresses else caller_address(caller, rnd)
    calls = [
        Call(at + rnd.uniform(0, seconds), address, *rnd.choice(caller.routes), 403, "insufficient_rights")
        for _ in range(count)
    ]
    return _put(caller, calls)


Plant = Callable[[World, Caller, float, str], Planted]
ATTACKS: Final[list[tuple[str, str, int, Plant]]] = [
    *[
        ("addresses", strength, 5, from_elsewhere)
        for strength in ("one call", "20 calls", "20 calls, next door", "200 calls")
    ],
    *[
        ("rise", strength, 5, harvest)
        for strength in ("2 x peak hour", "4 x peak hour", "8 x peak hour", "25 x peak hour")
    ],
    *[("errors", strength, 3, tried_key) for strength in FAILING],
    *[("errors", strength, 3, guessed_keys) for strength in FAILING],
    *[("resources", strength, 4, looks_around) for strength in ("one call", "10 calls", "200 calls")],
    *[("resources", strength, 3, pushes_doors) for strength in ("12 refused", "60 refused", "400 refused")],
]
