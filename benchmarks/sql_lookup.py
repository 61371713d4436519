"""What a lookup in PostgreSQL costs with few keys and with many, and how soon a disabled key is refused elsewhere.

    python benchmarks/sql_lookup.py [MANY]        (1,000,000 where none is given)

Rounds over both tables are interleaved; the figure is the ratio of the medians. Goals: 1.5 at most (design 11), and
50 ms at the 99th percentile from a change's commit to the last acceptance.
"""

from __future__ import annotations

import base64
import hashlib
import random
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from papaours_auth import Authenticator, Keys, PepperRing, Refused, open_store, parse_peppers
from papaours_auth.digest import Candidate
from papaours_auth.stores import Store
from papaours_auth.verify import Claim
from support.sql_servers import SQLServer, mariadb, mariadb_binary, postgresql

FEW, ROUNDS, CALLS, CHANGES = 1_000, 40, 100, 200
GOAL, GOAL_MS = 1.5, 50.0

FILL_KEYS = (
    "insert into papaours_keys select 'key_' || n, '{machine}', 'Banc d''essai ' || n, 'prod', '', 'abcd', "
    "'active', 0, 'bench', null, null, '[]', '{{}}' from generate_series(1, {count}) n"
)
FILL_DIGESTS = (
    "insert into papaours_digests select sha256(('k' || n)::bytea), 'key_' || n, '{pepper}', 'hmac-sha256' "
    "from generate_series(1, {count}) n"
)


def main() -> int:
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    ring = parse_peppers("p1:" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    with postgresql() as server:
        missed = compare(server, ring, many)
        missed |= report_delays("PostgreSQL", server.url(server.database()), ring)
    if mariadb_binary() is not None:
        with mariadb() as server:
            report_delays("MariaDB (no goal)", server.url(server.database()), ring)
    with tempfile.TemporaryDirectory() as folder:
        missed |= report_delays("SQLite by SQLAlchemy", f"sqlalchemy+sqlite:///{folder}/keys.db", ring)
    print(f"goals: {'MISSED' if missed else 'reached'}")
    return int(missed)


def compare(server: SQLServer, ring: PepperRing, many: int) -> bool:
    sizes = (FEW, many)
    stores = {count: filled(server, ring, count) for count in sizes}
    found: dict[int, list[float]] = {count: [] for count in sizes}
    for _ in range(ROUNDS):
        for count in sizes:
            found[count] += timed(stores[count], count)
    for count in sizes:
        stores[count].close()
        print(f"a lookup among {count:>9,} keys {statistics.median(found[count]) / 1000:7.0f} µs")
    ratio = statistics.median(found[many]) / statistics.median(found[FEW])
    print(f"ratio {ratio:.2f}, goal {GOAL}")
    return ratio > GOAL


def filled(server: SQLServer, ring: PepperRing, count: int) -> Store:
    name = server.database()
    store = open_store(server.url(name), create=True)
    machine = Keys(store, peppers=ring).create_machine("Banc", organisation="cfa-lyon")
    given = {"machine": machine.id, "pepper": ring.primary.id, "count": count}
    server.execute(FILL_KEYS.format(**given), FILL_DIGESTS.format(**given), "vacuum analyze", database=name)
    for number in range(
        1, count + 1, max(1, count // 2000)
    ):  # the pages an app's own traffic would keep warm
        store.lookup(claim(number))
    return store


def claim(number: int) -> Claim:
    return Claim("prod", 0, (Candidate("p1", hashlib.sha256(f"k{number}".encode()).digest()),))


def timed(store: Store, count: int) -> list[float]:
    """Look for keys drawn at random, and give the nanoseconds of each."""
    claims = [claim(random.randint(1, count)) for _ in range(CALLS)]
    times: list[float] = []
    for wanted in claims:
        begin = time.perf_counter_ns()
        found = store.lookup(wanted)
        times.append(time.perf_counter_ns() - begin)
        if found.record is None:
            raise SystemExit("a key was not found: the figures mean nothing")
    return times


def report_delays(name: str, url: str, ring: PepperRing) -> bool:
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Banc", organisation="cfa-lyon")
    new = keys.create_key(machine.id, name="Production - Banc", environment="prod")
    with Authenticator(url, environment="prod", peppers=ring, max_staleness=2.0) as authenticator:
        authenticator.authenticate(new.secret.reveal())
        delays = sorted(delay(keys, new.key.id, authenticator, new.secret.reveal()) for _ in range(CHANGES))
    store.close()
    p99 = delays[int(len(delays) * 0.99)]
    print(f"disabled to last acceptance, {name}: median {statistics.median(delays):.1f} ms, p99 {p99:.1f} ms")
    return p99 > GOAL_MS


def delay(keys: Keys, key_id: str, authenticator: Authenticator, text: str) -> float:
    """Give the milliseconds from a change's return to the last call that was let in."""
    keys.enable_key(key_id)
    while refuses(authenticator, text):
        time.sleep(0.001)
    keys.disable_key(key_id)
    committed = last = time.perf_counter()
    while not refuses(authenticator, text):
        last = time.perf_counter()
        time.sleep(0.0002)
    return (last - committed) * 1000


def refuses(authenticator: Authenticator, text: str) -> bool:
    try:
        authenticator.authenticate(text)
    except Refused:
        return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
