"""Stores with keys in them, peppers and forged keys: what the benchmarks verify."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from papaours_auth import KeyFormat, Keys, PepperRing, open_store, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores import Store

# Whose servers are imported only where one is started: under valgrind an import of SQLAlchemy takes ten seconds.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TRUST: Final = 3600.0
"""``max_staleness`` where freshness is not what is measured: no reading of the epoch falls into a round."""


class Place(NamedTuple):
    """A store under way, by its URL, and the peppers of its keys."""

    url: str
    peppers: PepperRing
    secret: str
    """The peppers as PAPAOURS_PEPPER has them, for other processes."""


def new_peppers() -> PepperRing:
    return parse_peppers(new_pepper())


def forged() -> bytes:
    """Make a key of our format with a right checksum, by someone who has no pepper."""
    return KeyFormat().mint("prod", tag=lambda _: secrets.randbits(32)).reveal().encode()


def foreign() -> bytes:
    """Make a key of a format that is not ours, and that nobody issued."""
    return f"pk_prod_{secrets.token_hex(10)}".encode()


def shared_stores() -> tuple[str, ...]:
    """Give the stores that several processes can share, and this machine can start."""
    from support.redis_servers import NEWEST
    from support.sql_servers import mariadb_binary, postgresql_binaries

    startable = {"redis": NEWEST, "postgresql": postgresql_binaries(), "mariadb": mariadb_binary()}
    return ("sqlite", *(name for name, binary in startable.items() if binary is not None))


def left_out_stores() -> list[str]:
    """Say of each store that is not measured why."""
    absent = {"redis", "postgresql", "mariadb"} - set(shared_stores())
    return [f"{name}: this machine has no server for it" for name in sorted(absent)]


def left_out_usage() -> str:
    return "usage recording: what is measured here records nothing (see benchmarks/usage.py)"


@contextmanager
def place(name: str) -> Iterator[Place]:
    """Make an empty store, with a server of its own where it needs one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        url = _serve(name, folder, stack)
        open_store(url, create=True).close()
        secret = new_pepper()
        yield Place(url, parse_peppers(secret), secret)


def _serve(name: str, folder: Path, stack: ExitStack) -> str:
    if name == "sqlite":
        return f"sqlite:///{folder / 'keys.db'}"
    from support.redis_servers import NEWEST, redis_server
    from support.sql_servers import mariadb, postgresql

    if name == "redis" and NEWEST is not None:
        return f"redis://{stack.enter_context(redis_server(NEWEST, folder)).address}"
    if name in ("postgresql", "mariadb"):
        server = stack.enter_context(postgresql() if name == "postgresql" else mariadb())
        return server.url(server.database())
    raise ValueError(f"no benchmark can start a {name!r} store")


def many_keys(url: str, peppers: PepperRing, count: int) -> list[str]:
    """Make a machine with so many keys, and one foreign key beside them, so that no key is refused by its shape."""
    with Keys(url, peppers=peppers) as keys:
        machine = keys.create_machine("Portail partenaires", organisation="cfa-lyon").id
        keys.import_key(machine, foreign().decode(), name="Production - Ancienne clef")
        made = [keys.create_key(machine, name=f"Banc {n}", environment="prod") for n in range(count)]
    return [new.secret.reveal() for new in made]


def one_key(store: Store | str, peppers: PepperRing) -> tuple[str, str]:
    """Make a machine and a key. Gives the key's text and its id."""
    with Keys(store, peppers=peppers) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        new = keys.create_key(machine.id, name="Production - Banc d'essai", environment="prod")
    return new.secret.reveal(), new.key.id
