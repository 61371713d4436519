"""Stores with keys in them, peppers and forged keys: what the benchmarks verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from papaours_auth import Keys, PepperRing, open_store, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores import Store

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


def shared_stores() -> tuple[str, ...]:
    """Give the stores that several processes can share, and this machine can start."""
    return ("sqlite",)


def left_out_stores() -> list[str]:
    """Say of each store that is not measured why."""
    absent = [name for name in ("redis", "sql") if find_spec(f"papaours_auth.stores.{name}") is None]
    return [
        f"{name}: the store is not in this version"
        if name in absent
        else f"{name}: the benchmarks cannot start its server yet"
        for name in ("redis", "sql")
    ]


def left_out_usage() -> str:
    return "usage recording: not in this version, so what is measured records nothing"


@contextmanager
def place(name: str) -> Iterator[Place]:
    """Make an empty store in a folder of its own."""
    with ExitStack() as stack:
        if name != "sqlite":
            raise ValueError(f"no benchmark can start a {name!r} store")
        folder = stack.enter_context(TemporaryDirectory())
        url = f"sqlite:///{Path(folder) / 'keys.db'}"
        open_store(url, create=True).close()
        secret = new_pepper()
        yield Place(url, parse_peppers(secret), secret)


def one_key(store: Store | str, peppers: PepperRing) -> tuple[str, str]:
    """Make a machine and a key. Gives the key's text and its id."""
    with Keys(store, peppers=peppers) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        new = keys.create_key(machine.id, name="Production - Banc d'essai", environment="prod")
    return new.secret.reveal(), new.key.id
