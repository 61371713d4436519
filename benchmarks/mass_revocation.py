"""100,000 keys disabled at once: does verification of the others stall?

One process remembers 100,000 keys of one machine and one of another. A thread verifies the latter as fast as it can
while (a) the machine is disabled, one change that evicts them all, or (b) every key is disabled by itself, as fast as
the store takes it. The longest call is compared with the longest of a quiet time just before, in the same run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

from papaours_auth import Authenticator, Keys, Refused, open_store
from papaours_auth.stores import Author, Store

from .harness import Result, percentile
from .subjects import new_peppers

KEYS: Final = 100_000
QUIET: Final = 2.0
"""Seconds of nothing before, and of waiting until the watcher has applied everything after."""
AUTHOR: Final = Author("the benchmark", datetime.now(UTC))


def run(scale: float = 1.0) -> Result:
    count = max(100, int(KEYS * min(1.0, scale)))
    result = Result("mass_revocation", f"{count:,} keys disabled at once, and one key verified meanwhile")
    _measure(result, "their machine disabled, one change", by_machine, count)
    _measure(result, "each disabled by itself", by_key, count)
    return result


def _measure(result: Result, what: str, revoke: Callable[[Store, str, list[str]], None], count: int) -> None:
    store, peppers = open_store("memory://"), new_peppers()
    keys = Keys(store, peppers=peppers)
    crowd = keys.create_machine("Service de facturation", organisation="cfa-lyon").id
    other = keys.create_machine("Portail", organisation="cfa-lyon").id
    watched = keys.create_key(other, name="Production - Portail", environment="prod").secret.reveal()
    made = [keys.create_key(crowd, name=f"Production - {n}", environment="prod") for n in range(count)]
    with Authenticator(
        store, environment="prod", peppers=peppers, max_known=count + 1, lifetime=3600
    ) as authenticator:
        for new in made:
            authenticator.authenticate(new.secret.reveal())
        authenticator.authenticate(watched)
        quiet, _ = measured(authenticator, watched, lambda: time.sleep(QUIET))
        acting = partial(revoke, store, crowd, [new.key.id for new in made])
        loud, seconds = measured(authenticator, watched, acting)
        late = sum(let_in(authenticator, new.secret.reveal()) for new in made)
    for name, taken in (("quiet", quiet), ("meanwhile", loud)):
        result.add(f"{what}: p99 {name}", percentile(taken, 0.99) * 1e6, "µs")
        result.add(f"{what}: longest {name}", max(taken) * 1e3, "ms")
    result.add(f"{what}: took", seconds, "s")
    result.add(f"{what}: disabled keys let in afterwards", late, "", goal=0)


def by_machine(store: Store, machine: str, ids: list[str]) -> None:
    store.update_machine(machine, {"status": "inactive"}, "machine.disabled", AUTHOR)
    time.sleep(QUIET)


def by_key(store: Store, machine: str, ids: list[str]) -> None:
    for id_ in ids:
        store.update_key(id_, {"status": "inactive"}, "key.disabled", AUTHOR)
    time.sleep(QUIET)


def measured(authenticator: Authenticator, key: str, act: Callable[[], object]) -> tuple[list[float], float]:
    """Give the seconds each call took while something went on, and how long that was."""
    taken: list[float] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            begin = time.perf_counter()
            authenticator.authenticate(key)
            taken.append(time.perf_counter() - begin)

    calling = threading.Thread(target=call)
    calling.start()
    begin = time.perf_counter()
    try:
        act()
    finally:
        done.set()
        calling.join()
    return taken, time.perf_counter() - begin


def let_in(authenticator: Authenticator, key: str) -> bool:
    try:
        authenticator.authenticate(key)
    except Refused:
        return False
    return True
