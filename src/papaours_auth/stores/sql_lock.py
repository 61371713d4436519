"""A lock of the database's own, under which one process at a time makes tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from sqlalchemy import Connection, func, select

from ..exceptions import ConfigurationError

_LOOK_UP: Final = 1
"""Seconds of waiting in one statement: all of it would take longer than a connection waits for an answer."""


class Lock(NamedTuple):
    """What it is called on MySQL and MariaDB, its number on PostgreSQL, and what tables it is for."""

    name: str
    number: int
    what: str


@contextmanager
def alone(connection: Connection, lock: Lock, seconds: int) -> Iterator[None]:
    """Hold it: MySQL commits at each `create table`, so no transaction would do.

    Raises `ConfigurationError` where another process holds it for longer than so many seconds (MySQL and MariaDB).
    """
    name = connection.dialect.name
    if name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(lock.number)))
        yield  # given up with the transaction
    elif name in ("mysql", "mariadb"):
        end = time.monotonic() + seconds
        while not connection.scalar(select(func.get_lock(lock.name, min(seconds, _LOOK_UP)))):
            if time.monotonic() >= end:
                raise ConfigurationError(
                    f"another process has been making the {lock.what} tables for too long"
                )
        try:
            yield
            connection.commit()  # before the next one looks
        finally:
            connection.execute(select(func.release_lock(lock.name)))
    else:
        connection.exec_driver_sql("begin immediate")
        yield
