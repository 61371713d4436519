"""Engines made from a URL: which driver, and bounds on everything that may wait.

Options of ours in the URL are taken out before SQLAlchemy sees it; errors never show any of it.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from .._fork import hold_across_fork
from .._patience import Patiences
from ..exceptions import ConfigurationError, Overloaded, StoreUnavailable
from .sql_tables import DEFAULT_PREFIX, Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

DEFAULT_TIMEOUT: Final = 0.5
"""Seconds a verifier waits for a connection, and for each answer."""
WRITE_TIMEOUT: Final = 5.0
"""Seconds an administrator does: another's change may be under way."""
POOL_SIZE: Final = 10

# scheme of ours: SQLAlchemy's, for threads and for event loops; the driver's module; the extra that brings it
_DRIVERS: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg", "psycopg", "postgresql"),
    "mysql": ("mysql+pymysql", "mysql+asyncmy", "pymysql", "mysql"),
    "mariadb": ("mariadb+pymysql", "mariadb+asyncmy", "pymysql", "mysql"),
    "sqlalchemy+sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite", "sqlite3", "sql"),
}


class Place(NamedTuple):
    """What a URL says: where the database is, which tables, and how long to wait."""

    scheme: str
    url: URL
    tables: Tables
    timeout: float

    def engine(self, *, reading: bool) -> Engine:
        """Make an engine for threads: one that reads, each statement its own snapshot, or one that writes."""
        timeout = self.timeout if reading else max(self.timeout, WRITE_TIMEOUT)
        engine = create_engine(
            self.url.set(drivername=_DRIVERS[self.scheme][0]), **self._options(timeout, reading=reading)
        )
        _bound_connecting(engine, self._connecting(timeout), timeout)
        return engine

    def async_engine(self) -> AsyncEngine:
        """Make an engine for event loops, for reading."""
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(
            self.url.set(drivername=_DRIVERS[self.scheme][1]), **self._options(self.timeout, reading=True)
        )
        if self.scheme == "postgresql":
            _bound_async_psycopg(engine.sync_engine, self._connecting(self.timeout), self.timeout)
        return engine

    def _options(self, timeout: float, *, reading: bool) -> dict[str, Any]:
        options: dict[str, Any] = {
            "connect_args": self._connect_args(timeout),
            "hide_parameters": True,
            "pool_timeout": timeout,
            "pool_size": POOL_SIZE,
            "pool_use_lifo": True,  # what is not needed grows old and is closed
        }
        if reading:
            options |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
        return options

    def _connect_args(self, timeout: float) -> dict[str, Any]:
        if self.scheme == "postgresql":
            wanted = {
                "connect_timeout": max(2, math.ceil(timeout)),  # libpq takes no less
                "tcp_user_timeout": math.ceil(timeout * 1000),
                "keepalives_idle": 5,
                "keepalives_interval": 2,
                "keepalives_count": 2,
                "target_session_attrs": "read-write",  # a replica answers from the past
                "prepare_threshold": None,  # a pooler may give each statement another server process
                "application_name": "papaours-auth",
            }
            return {name: value for name, value in wanted.items() if name not in self.url.query}
        if self.scheme == "sqlalchemy+sqlite":
            return {"timeout": WRITE_TIMEOUT}
        # The drivers encode a password as Latin-1, and the server compares UTF-8.
        password = self.url.password
        secret = {} if password is None else {"password": str(password).encode().decode("latin-1")}
        return {"connect_timeout": math.ceil(timeout), "charset": "utf8mb4", **secret}

    def _connecting(self, timeout: float) -> float:
        """Give the time for a connection. Of several hosts the first may be the one that is away."""
        named = self.url.query.get("host", "")
        hosts = len(named) if isinstance(named, tuple) else 1 + named.count(",")
        return timeout if hosts == 1 else hosts * max(2.0, timeout)


def read_url(text: str) -> Place:
    """Read a store's URL. Raises `ConfigurationError`, which quotes the scheme alone."""
    scheme, _, rest = text.partition("://")
    sqlalchemy_name, _, module, extra = _DRIVERS[scheme]
    if find_spec(module) is None:
        raise ConfigurationError(f"{scheme}:// stores need {module}: pip install 'papaours-auth[{extra}]'")
    try:
        url = make_url(f"{sqlalchemy_name}://{rest}")
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"the {scheme}:// URL cannot be read: write {scheme}://user:password@host/database, with odd "
            "characters percent-encoded (PAPAOURS_STORE)"
        ) from None
    if not url.database or url.database == ":memory:":
        raise ConfigurationError(f"the {scheme}:// URL names no database: write it after the host")
    schema, prefix, timeout = (url.query.get(name) for name in ("schema", "prefix", "timeout"))
    tables = Tables(
        DEFAULT_PREFIX if prefix is None else str(prefix), None if schema is None else str(schema)
    )
    return Place(
        scheme, url.difference_update_query(["schema", "prefix", "timeout"]), tables, _seconds(timeout)
    )


def _seconds(written: object) -> float:
    try:
        seconds = DEFAULT_TIMEOUT if written is None else float(str(written))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 60:
        raise ConfigurationError("the timeout of a SQL store is a number of seconds, above 0 and at most 60")
    return seconds


def _bound_connecting(engine: Engine, connecting: float, timeout: float) -> None:
    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> Any:
        if dialect.driver == "psycopg":
            from .sql_psycopg import BoundedConnection

            connection = connect_within(connecting, lambda: BoundedConnection.connect(*arguments, **options))
            connection.bound = timeout
            return connection
        if dialect.driver == "pymysql":
            # Not in the arguments the async driver shares: it knows no such options.
            options = options | {"read_timeout": timeout, "write_timeout": timeout}
        return connect_within(connecting, lambda: dialect.connect(*arguments, **options))


def _bound_async_psycopg(engine: Engine, connecting: float, timeout: float) -> None:
    from .sql_psycopg import AsyncBoundedConnection

    patience = Patiences(connecting)

    async def connect(*arguments: Any, **options: Any) -> AsyncBoundedConnection:
        try:
            with patience.bound():
                connection = await AsyncBoundedConnection.connect(*arguments, **options)
        except TimeoutError:
            error = StoreUnavailable("the SQL store takes no connection in time")
            error.own_timer = True
            raise error from None
        connection.bound = timeout
        return connection

    @event.listens_for(engine, "do_connect")
    def prepare(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        options["async_creator_fn"] = connect


def connect_within(seconds: float, connect: Callable[[], Any]) -> Any:
    """Connect in a thread of its own and leave it there when it takes too long: name lookup, TCP, the server.

    Drivers bound these apart, or in whole seconds, or not at all. A connection that comes late is closed.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            connection = connect()
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return
        if future.set_running_or_notify_cancel():
            future.set_result(connection)
        else:
            connection.close()

    try:
        threading.Thread(target=run, name="papaours-sql-connect", daemon=True).start()
    except RuntimeError as error:
        raise Overloaded(f"the SQL store cannot be connected to: {error}") from None
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.cancel():
            raise StoreUnavailable("the SQL store takes no connection in time") from None
        return future.result()  # it came just now


class LoopEngines:
    """One engine for each event loop, made when it first asks: a connection belongs to the loop that opened it."""

    def __init__(self, make: Callable[[], AsyncEngine]) -> None:
        self._make = make
        self._open: dict[asyncio.AbstractEventLoop, tuple[AsyncEngine, AsyncGenerator[None, None]]] = {}
        hold_across_fork(self)

    async def here(self) -> AsyncEngine:
        """Give the running loop's engine."""
        loop = asyncio.get_running_loop()
        found = self._open.get(loop)
        if found is None:
            self._open = {other: kept for other, kept in [*self._open.items()] if not other.is_closed()}
            engine = self._make()
            found = self._open[loop] = engine, _until_the_loop_ends(engine)
            await anext(found[1])
        return found[0]

    async def aclose(self) -> None:
        """Close what this loop has open."""
        found = self._open.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found[1].aclose()

    def before_fork(self) -> None:
        """Do nothing: the parent's loops go on."""

    def after_fork(self, *, child: bool) -> None:
        """Leave the parent's connections alone in a child."""
        if child:
            _abandoned.append(self._open)
            self._open = {}


_abandoned: list[object] = []


async def _until_the_loop_ends(engine: AsyncEngine) -> AsyncGenerator[None, None]:
    # `asyncio.run` closes the generators that are open before it closes the loop: the last moment at which a
    # connection of that loop can be closed.
    try:
        yield
    finally:
        await engine.dispose()
