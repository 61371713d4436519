"""A flood of distinct forged keys: what it costs the store, the memory, and the clients with valid keys.

Store reads and memory are counted in the process, over a million keys. The effect on valid clients is measured over
HTTP, in open loop: one client process with a valid key and one with forged ones, windows with and without the latter
in turn, at one uvicorn worker on cores of its own.

Foreign keys, which anyone can invent and only the store can tell, come over 1,500 connections to a store that holds
one: at a tenth of what the worker can refuse, and at more than all of it. Beside the client whose key is remembered
there is one whose keys are not, each a lookup.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple, TypeAlias, cast

from papaours_auth import Authenticator, KeyFormat, PepperRing, Refused, open_store
from papaours_auth.digest import PEPPER_VARIABLE
from papaours_auth.stores import Found, Store
from papaours_auth.verify import Claim

from .harness import Result, on_cores, percentile, quartiles, resampled
from .open_loop import Client
from .server import CASES, serving
from .subjects import TRUST, foreign, forged, many_keys, new_peppers, one_key, place

Pair: TypeAlias = tuple[list[float], list[float]]
"""Latencies of a quiet window and of its flooded neighbour, in microseconds."""

FORGED: Final = 1_000_000
BATCH: Final = 10_000
FOREIGN: Final = 50_000
GOAL: Final = 1.2
SHARE: Final = 0.1
"""Forged keys come at this share of what the server can refuse."""
VALID_RATE: Final = 500.0  # requests a second: some 15 % of what the worker can do
WINDOW: Final = 1.5  # seconds; shorter in a short run, which shows that it works and no figure
TURNS: Final = 25
CAPACITY_KEYS: Final = 50_000
FOREIGN_CONNECTIONS: Final = 750  # of each of two clients: one process may wait for no more than 1,024
COLD_RATE: Final = 40.0  # keys a second that nobody asked for before
FOREIGN_GOAL: Final = 1.5
OVERLOAD: Final = 3.0
LUA: Final = """\
local keys, at = {{}}, 0
for key in io.lines("{keys}") do keys[#keys + 1] = key end
request = function()
  at = at % #keys + 1
  return wrk.format("GET", "/", {{["X-API-KEY"] = keys[at]}})
end
"""


class Counting:
    """A store that counts its lookups."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lookups = 0

    def lookup(self, claim: Claim) -> Found:
        self.lookups += 1
        return self._store.lookup(claim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def run(scale: float = 1.0) -> Result:
    result = Result("flood", "A flood of distinct forged keys")
    peppers, store = new_peppers(), open_store("memory://")
    valid = one_key(store, peppers)[0]
    count = max(100, int(FORGED * min(1.0, scale)))
    _flood(result, "forged in our format", forged, count, store, peppers, valid)
    _flood(result, "foreign", foreign, max(100, int(FOREIGN * min(1.0, scale))), store, peppers, valid)
    turns, window = max(2, int(TURNS * scale)), WINDOW * min(1.0, 0.1 + scale)
    _over_http(result, turns=turns, window=window)
    _foreign_over_http(result, turns=turns, window=window)
    return result


def _flood(
    result: Result,
    what: str,
    make: Callable[[], bytes],
    count: int,
    store: Store,
    peppers: PepperRing,
    valid: str,
) -> None:
    """Refuse so many keys."""
    counting = Counting(store)
    options: Any = {"environment": "prod", "peppers": peppers, "max_staleness": TRUST}
    options["format"] = KeyFormat(foreign=True)  # or no foreign key would be looked up: this store holds none
    with Authenticator(cast("Store", counting), **options) as authenticator:
        authenticator.authenticate(valid)
        spent, memory = 0, 0.0
        asked = counting.lookups
        for done in range(0, count, BATCH):
            keys = [make() for _ in range(min(BATCH, count - done))]
            begin = time.perf_counter_ns()
            _refuse(authenticator, keys)
            spent += time.perf_counter_ns() - begin
            if done == BATCH:
                memory = resident()  # what the bounded negative cache may hold is there by now
        reads = counting.lookups - asked
        still = authenticator.cached(valid.encode()) is not None
    result.add(f"{what}: distinct keys presented", count, "keys")
    result.add(f"{what}: store reads", reads, "reads", goal=0 if make is forged else None)
    result.add(f"{what}: refused", count / spent * 1e9, "keys/s")
    if memory:
        result.add(f"{what}: memory grown after the first 20,000", resident() - memory, "MiB", goal=4)
    result.add(f"{what}: a valid key is still in the cache", float(still), "", goal=1, at_most=False)


def _refuse(authenticator: Authenticator, keys: list[bytes]) -> None:
    for key in keys:
        try:
            authenticator.authenticate(key)
        except Refused:
            continue
        raise RuntimeError("a forged key came in")


def resident(pid: int | str = "self") -> float:
    """Give the resident memory of a process in MiB (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


def refused_a_second(port: int, folder: Path) -> float:
    """Measure how many forged keys, all distinct, the server refuses a second: by wrk, or a client of ours."""
    if shutil.which("wrk") is None:
        with Client(port, "forged") as client:
            client.begin(20_000, 0.2)
            begin = time.perf_counter()
            return len(client.end("401")) / (time.perf_counter() - begin)
    keys, script = folder / "keys", folder / "forged.lua"
    keys.write_bytes(b"\n".join(forged() for _ in range(CAPACITY_KEYS)))
    script.write_text(LUA.format(keys=keys), encoding="ascii")
    asked = subprocess.run(
        ["wrk", "-t1", "-c16", "-d2s", "-s", str(script), f"http://127.0.0.1:{port}/"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Requests/sec:\s+([\d.]+)", asked.stdout)
    if found is None:
        raise RuntimeError(f"wrk prints something else now: {asked.stdout}")
    return float(found[1])


def _over_http(result: Result, *, turns: int, window: float) -> None:
    """Hold valid clients' latencies in windows with a flood against those in windows without, in turn."""
    with place("sqlite") as there, TemporaryDirectory() as folder, ExitStack() as stack:
        key = one_key(there.url, there.peppers)[0]
        guard = {"PAPAOURS_STORE": there.url, PEPPER_VARIABLE: there.secret}
        server = stack.enter_context(serving(CASES[0], guard, key))
        with on_cores(last=True):
            capacity = refused_a_second(server.port, Path(folder))
            valid, attacker = (stack.enter_context(Client(server.port, who)) for who in (key, "forged"))
            pairs, memory = _windows(valid, attacker, capacity * SHARE, turns, window, server.pid)
    _report_http(result, capacity, pairs, memory)


def _windows(
    valid: Client, attacker: Client, forged_a_second: float, turns: int, window: float, pid: int
) -> tuple[list[Pair], float]:
    """Give the latencies of each pair of windows, and by how many MiB the server grew after the first ones."""
    pairs: list[Pair] = []
    memory = 0.0
    for turn in range(turns + 2):
        found: dict[bool, list[float]] = {}
        for flooded in (True, False) if turn % 2 else (False, True):
            attacker.begin(forged_a_second if flooded else 0.0, window + 0.1)
            valid.begin(VALID_RATE, window)
            found[flooded] = valid.end("200")
            attacker.end("401")
        if turn == 1:  # the first two warm everything
            memory = resident(pid)
        elif turn > 1:
            pairs.append((found[False], found[True]))
    return pairs, resident(pid) - memory


class Clients(NamedTuple):
    """Who calls one server: a key that is remembered, keys that are not, and two who invent theirs."""

    warm: Client
    cold: Client
    attackers: Sequence[Client]

    def window(self, flood: float, seconds: float) -> tuple[list[float], Counter[str]]:
        """Return the latencies of the remembered key, and the statuses of all valid ones."""
        for attacker in self.attackers:
            attacker.begin(flood / len(self.attackers), seconds + 0.1)
        self.warm.begin(VALID_RATE, seconds)
        self.cold.begin(COLD_RATE, seconds)
        latencies, statuses = self.warm.result()
        statuses += self.cold.result()[1]
        for attacker in self.attackers:
            attacker.result()
        return latencies, statuses


def _foreign_over_http(result: Result, *, turns: int, window: float) -> None:
    """Flood a store that holds a foreign key with invented ones, over 1,500 connections."""
    with place("sqlite") as there, TemporaryDirectory() as folder, ExitStack() as stack:
        key = one_key(there.url, there.peppers)[0]
        needed = int((2 * (turns + 1) + 2) * window * COLD_RATE * 3) + 100
        cold = Path(folder) / "cold"
        cold.write_text("\n".join(many_keys(there.url, there.peppers, needed)), encoding="ascii")
        guard = {"PAPAOURS_STORE": there.url, PEPPER_VARIABLE: there.secret}
        server = stack.enter_context(serving(CASES[0], guard, key))
        with on_cores(last=True):
            capacity = refused_a_second(server.port, Path(folder))
            attackers = [
                stack.enter_context(Client(server.port, "foreign", FOREIGN_CONNECTIONS)) for _ in range(2)
            ]
            clients = Clients(
                stack.enter_context(Client(server.port, key)),
                stack.enter_context(Client(server.port, f"@{cold}")),
                attackers,
            )
            clients.window(0.0, window)  # warms everything
            quiet, tenth, more = [], [], []
            for _ in range(turns):
                quiet.append(clients.window(0.0, window))
                tenth.append(clients.window(capacity * SHARE, window))
            more += [clients.window(capacity * OVERLOAD, window) for _ in range(max(1, turns // 5))]
    _report_foreign(result, quiet, tenth, more)


Windows: TypeAlias = list[tuple[list[float], Counter[str]]]


def _report_foreign(result: Result, quiet: Windows, tenth: Windows, more: Windows) -> None:
    def refused(windows: Windows) -> int:
        return sum(count for _, statuses in windows for status, count in statuses.items() if status != "200")

    name = "HTTP: foreign keys over 1,500 connections"
    pairs = [(a[0], b[0]) for a, b in zip(quiet, tenth, strict=True)]
    answers = sum(statuses.total() for _, statuses in (*tenth, *more))
    result.add(f"{name}: answers to valid clients", answers, "", note=f"{COLD_RATE:.0f} a second are lookups")
    result.add(f"{name}, at 10 %: valid keys refused", refused(tenth), "", goal=0)
    result.add(f"{name}, at {OVERLOAD:.0f} times the capacity: valid keys refused", refused(more), "", goal=0)
    result.add(
        f"{name}, at 10 %: valid clients' p99, flooded / quiet",
        p99_ratio(pairs),
        spread=resampled(pairs, p99_ratio),
        goal=FOREIGN_GOAL,
        note="spread: nine of ten resamplings of the windows",
        reason="an invented key that is looked up takes the one worker as long as any uncached call does",
    )
    each = [percentile(latencies, 0.99) for latencies, _ in more]
    result.add(
        f"{name}, at {OVERLOAD:.0f} times the capacity: valid clients' p99",
        statistics.median(each),
        "µs",
        note="the worker is busy with refusing all the while: requests queue before anybody has read their key",
    )


def p99_ratio(pairs: Sequence[Pair]) -> float:
    """Give flooded / quiet: the median over the pairs, of which a window with a stall of the machine is one."""
    return statistics.median(percentile(loud, 0.99) / percentile(quiet, 0.99) for quiet, loud in pairs)


def _report_http(result: Result, capacity: float, pairs: Sequence[Pair], memory: float) -> None:
    answers = sum(len(quiet) + len(loud) for quiet, loud in pairs)
    # Quiet windows against quiet ones, by turns: what the ratio would be of nothing at all.
    control = [(a[0], b[0]) for a, b in zip(pairs[::2], pairs[1::2], strict=False)]
    bounds = "spread: nine of ten resamplings of the windows"
    lower, upper = resampled(control, p99_ratio) if control else (0.0, 0.0)
    reason = (
        "a refusal takes the one worker as long as any small answer does, and valid requests queue behind it; "
        f"by chance alone this ratio of two quiet windows was {lower:.2f} to {upper:.2f} here"
    )
    result.add(
        "HTTP: capacity: forged keys refused", capacity, "a second", note="uvicorn, FastAPI JSON route"
    )
    result.add("HTTP: answers to valid clients", answers, "", note=f"{VALID_RATE:.0f} a second")
    for which, when in enumerate(("quiet", "forged keys at 10 %")):
        for share in (0.5, 0.99):
            each = [percentile(pair[which], share) for pair in pairs]
            name = f"HTTP: valid clients' p{share * 100:.0f} of a window, {when}"
            result.add(name, statistics.median(each), "µs", spread=quartiles(each))
    result.add(
        "HTTP: valid clients' p99, flooded / quiet",
        p99_ratio(pairs),
        spread=resampled(pairs, p99_ratio),
        goal=GOAL,
        note=bounds,
        reason=reason,
    )
    if control:
        result.add(
            "HTTP: valid clients' p99, quiet / quiet (control)",
            p99_ratio(control),
            spread=(lower, upper),
            note=bounds,
        )
    result.add("HTTP: the server's memory grown", memory, "MiB", goal=4)
