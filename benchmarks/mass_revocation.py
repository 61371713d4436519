"""100,000 keys disabled at once: does verification of the others stall?

One process remembers 100,000 keys of one machine and one of another. A thread verifies the latter as fast as it can
while (a) the machine is disabled, one change that evicts them all, or (b) every key is disabled by itself, as fast as
the store takes it. The longest call is compared with the longest of a quiet time just before, in the same run.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from papaours_auth import Authenticator, Keys, Refused, open_store, parse_peppers
from papaours_auth.stores import Author, Store

KEYS = 100_000
QUIET_SECONDS = 2.0
AUTHOR = Author("the benchmark", datetime.now(UTC))


def main() -> int:
    peppers = parse_peppers("p1:" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    print(f"{'':44} {'calls':>9} {'p99':>9} {'longest':>9} {'took':>8}")
    failed = False
    for what, revoke in (
        ("the machine of 100,000 keys, one change", by_machine),
        ("each of 100,000 keys by itself", by_key),
    ):
        store = open_store("memory://")
        keys = Keys(store, peppers=peppers)
        crowd = keys.create_machine("Service de facturation", organisation="cfa-lyon").id
        other = keys.create_machine("Portail", organisation="cfa-lyon").id
        watched = keys.create_key(other, name="Production - Portail", environment="prod").secret.reveal()
        made = [keys.create_key(crowd, name=f"Production - {n}", environment="prod") for n in range(KEYS)]
        with Authenticator(
            store, environment="prod", peppers=peppers, max_known=KEYS + 1, lifetime=3600
        ) as authenticator:
            for new in made:
                authenticator.authenticate(new.secret.reveal())
            authenticator.authenticate(watched)
            row("quiet", *measure(authenticator, watched, lambda: time.sleep(QUIET_SECONDS)))
            ids = [new.key.id for new in made]
            row(what, *measure(authenticator, watched, partial(revoke, store, crowd, ids)))
            failed |= let_in(authenticator, made[-1].secret.reveal())
    print("WRONG: a disabled key came in" if failed else "no disabled key came in")
    return int(failed)


def by_machine(store: Store, machine: str, ids: list[str]) -> None:
    store.update_machine(machine, {"status": "inactive"}, "machine.disabled", AUTHOR)
    time.sleep(QUIET_SECONDS)  # until the watcher has applied it


def by_key(store: Store, machine: str, ids: list[str]) -> None:
    for id_ in ids:
        store.update_key(id_, {"status": "inactive"}, "key.disabled", AUTHOR)
    time.sleep(QUIET_SECONDS)


def measure(authenticator: Authenticator, key: str, act: Callable[[], object]) -> tuple[list[float], float]:
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
    act()
    done.set()
    calling.join()
    return sorted(taken), time.perf_counter() - begin


def row(what: str, taken: list[float], seconds: float) -> None:
    p99, longest = taken[len(taken) * 99 // 100] * 1e6, taken[-1] * 1e3
    print(f"{what:44} {len(taken):9} {p99:6.1f} µs {longest:6.1f} ms {seconds:6.1f} s")


def let_in(authenticator: Authenticator, key: str) -> bool:
    try:
        authenticator.authenticate(key)
    except Refused:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
