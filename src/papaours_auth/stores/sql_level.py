"""Connections at an isolation level, also where those of the pool have died meanwhile.

MySQL and MariaDB are asked to set it. What a driver raises at that SQLAlchemy passes on as it is, so that no
handler of `SQLAlchemyError` sees it, and keeps what else is in the pool, which died with it.
"""

from __future__ import annotations

import time
from typing import Final, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .._fork import notice_fork

AT_ONCE: Final = 0.1
"""Seconds in which a connection that had died in the pool says so."""


class AtLevel:
    """An engine, and the isolation level that its connections are given with."""

    def __init__(self, engine: Engine, level: str) -> None:
        self._engine = engine
        self._level = level

    def connect(self) -> Connection:
        """Give a connection; a new one where that of the pool turns out to be dead."""
        notice_fork()
        begin = time.monotonic()
        try:
            return self._connect()
        except DBAPIError as error:
            if not died_idle(error, begin):
                raise
        return self._connect()

    def _connect(self) -> Connection:
        connection = self._engine.connect()
        try:
            return at_level(connection, self._level)
        except BaseException:
            connection.close()
            raise


def at_level(connection: Connection, level: str) -> Connection:
    """Set the level. What the driver raises comes as a `DBAPIError`, and a pool of dead connections is emptied."""
    dialect = connection.dialect
    try:
        return connection.execution_options(isolation_level=level)
    except dialect.loaded_dbapi.Error as error:
        gone = dialect.is_disconnect(error, None, None)
        told = DBAPIError.instance(
            None, None, error, dialect.loaded_dbapi.Error, hide_parameters=True, connection_invalidated=gone,
            dialect=dialect,
        )  # fmt: skip
        if gone:
            connection.invalidate(error)
            connection.engine.dispose()
        raise cast("DBAPIError", told) from None


def died_idle(error: Exception, begin: float) -> bool:
    """Tell whether a connection turned out to be dead at once: worth a second try, unlike one that timed out."""
    return (
        isinstance(error, DBAPIError) and error.connection_invalidated and time.monotonic() - begin < AT_ONCE
    )
