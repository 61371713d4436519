"""Stores in PostgreSQL, MySQL or MariaDB, and SQLite, through SQLAlchemy Core; sync and async, one set of statements.

A lookup is one statement, so one snapshot. A change locks the one row of ``meta`` first and writes its tip last,
in one transaction with its line of the journal: numbers are gapless and in the order of the commits. On
PostgreSQL that transaction also notifies; watchers elsewhere, and where a pooler swallows it, poll.

Fork: the child starts with new connections, and leaves its parent's alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import selectors
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from sqlalchemy import (
    Connection,
    Engine,
    Select,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .._fork import hold_across_fork, notice_fork
from .._locks import WaitingLock
from .._patience import Patiences
from .._threads import Threads
from ..digest import PepperStatus
from ..exceptions import ConfigurationError, Conflict, NotFound, Overloaded, StoreUnavailable
from ..model import Key, Machine
from ..verify import Claim
from . import (
    Author,
    Change,
    Description,
    Epoch,
    Found,
    KeyColumns,
    MachineColumns,
    News,
    PepperRecord,
    Reading,
)
from .records import (
    KEY_COLUMNS,
    MACHINE_COLUMNS,
    Cell,
    difference,
    journal_text,
    key_row,
    machine_row,
    microseconds,
    moment,
    next_epoch,
    read_key,
    read_machine,
)
from .sql_drivers import DEFAULT_TIMEOUT, LoopEngines, read_url
from .sql_level import AtLevel, at_level, died_idle
from .sql_questions import (
    Row,
    Statements,
    Stray,
    ask,
    ask_pooled,
    changes_between,
    check_schema,
    described,
    found,
    minted_only,
    read_tip,
)
from .sql_tables import DEFAULT_PREFIX, SCHEMA_VERSION, Tables, create, is_missing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["AsyncSQLStore", "SQLStore", "Tables", "open_async_store", "open_store"]

logger = logging.getLogger("papaours_auth")

POLL_INTERVAL: Final = 0.02
"""Seconds between two looks at the tip where nothing is announced: 0.1 to 0.3 ms each, so 1 % of a connection."""
HEARD_WITHIN: Final = 1.0
"""Seconds within which PostgreSQL's announcements must prove to arrive. Until then, and else, the tip is polled."""

_WRITING: Final = {
    "postgresql": "READ COMMITTED",
    "mysql": "REPEATABLE READ",
    "mariadb": "REPEATABLE READ",
    "sqlite": "SERIALIZABLE",
}
_OURS: Final = "papaours-auth "

_T = TypeVar("_T")


def open_store(url: str, create: bool) -> SQLStore:
    """Open ``postgresql://``, ``mysql://``, ``mariadb://`` or ``sqlalchemy+sqlite://``.

    Nothing is asked of the server, so that an app starts while it is down; with ``create``, its tables are
    made or migrated at once.
    """
    place = read_url(url)
    store = SQLStore(place.engine(reading=True), writer=place.engine(reading=False), tables=place.tables)
    store.owned = True
    if create:
        try:
            store.create()
        except BaseException:
            store.close()
            raise
    return store


def open_async_store(url: str, create: bool) -> AsyncSQLStore:
    """Open the same for event loops."""
    place = read_url(url)
    return AsyncSQLStore(LoopEngines(place.async_engine), open_store(url, create), timeout=place.timeout)


class SQLStore:
    """Lookup, feed and administration over an engine, which stays the caller's to close.

    ``prefix`` and ``schema`` say which tables. ``writer`` is another engine for administration, whose role may
    do more. Bounds on waiting are those of the engines: `docs/sql.md` has a recipe.
    """

    owned = False

    def __init__(
        self,
        engine: Engine,
        *,
        prefix: str = DEFAULT_PREFIX,
        schema: str | None = None,
        writer: Engine | None = None,
        tables: Tables | None = None,
    ) -> None:
        if engine.dialect.name not in _WRITING:
            raise ConfigurationError(
                "a SQL store is in PostgreSQL, MySQL, MariaDB or SQLite: no other database was tried"
            )
        self.tables = tables if tables is not None else Tables(prefix, schema)
        self._engine = engine
        self._writer = writer if writer is not None else engine
        self._reads = AtLevel(engine, "AUTOCOMMIT")
        self._writes = AtLevel(self._writer, _WRITING[engine.dialect.name])
        self._statements = Statements(self.tables)
        self.seen = False  # its tables, once: what is missing later was lost
        self._closed = False
        hold_across_fork(self)

    def create(self) -> None:
        """Make or migrate the tables, safely with others doing the same. Raises `ConfigurationError`."""
        self._check_open()
        try:
            with self._writes.connect() as connection:
                create(connection, self.tables)
                connection.commit()
        except SQLAlchemyError as error:
            raise _misled(error) or ConfigurationError(
                f"the SQL store cannot be made ({_cause(error)}): check the URL and what its role may do"
            ) from None
        self.describe()

    # verification

    def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        values = {"digests": [candidate.digest for candidate in claim.candidates]}
        return self._read(lambda connection: found(ask_pooled(connection, self._statements.lookup, values)))

    def describe(self) -> Description:
        """See `Lookup.describe`."""
        return self._read(lambda connection: described(ask_pooled(connection, self._statements.describe, {})))

    def feed(self) -> SQLFeed:
        """See `Lookup.feed`."""
        return SQLFeed(self)

    def close(self) -> None:
        """See `Lookup.close`. An engine that was given stays open."""
        self._closed = True
        self._dispose()

    def _dispose(self) -> None:
        if self.owned:
            self._engine.dispose()
            self._writer.dispose()

    def __del__(self) -> None:
        # A WSGI middleware is never told that its app is gone: what it opened is closed with it.
        self._dispose()

    def connect(self) -> Connection:
        """Give a connection for reading, each statement by itself. Raises `StoreUnavailable`."""
        self._check_open()
        with _outages():
            return self._reads.connect()

    def _read(self, question: Callable[[Connection], _T]) -> _T:
        """Ask once; twice where the connection had died in the pool, which one learns by asking."""
        self._check_open()
        begin = time.monotonic()
        try:
            with self._reads.connect() as connection:
                answer = question(connection)
        except SQLAlchemyError as error:
            if not died_idle(error, begin):
                raise self.judged(error) from None
        else:
            self.seen = True
            return answer
        with _outages(), self._reads.connect() as connection:
            return question(connection)

    def judged(self, error: SQLAlchemyError) -> StoreUnavailable | ConfigurationError:
        """Tell an outage from tables that were never there, or that are of another schema."""
        if not self.seen and isinstance(error, DBAPIError) and not error.connection_invalidated:
            with suppress(SQLAlchemyError, StoreUnavailable), self._reads.connect() as connection:
                if is_missing(connection, self.tables):
                    return ConfigurationError(
                        "the SQL store's tables are not there: run 'papaours-auth init', or check schema and "
                        "prefix in the URL (PAPAOURS_STORE)"
                    )
                try:
                    check_schema(
                        connection.scalar(select(self.tables.meta.c.schema_version)) or SCHEMA_VERSION
                    )
                except ConfigurationError as wrong:
                    return wrong
        return _misled(error) or _unavailable(error)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the SQL store is closed")

    # administration

    @contextmanager
    def _writing(self) -> Iterator[_Change]:
        """Hold the one write transaction: all of it happens, or nothing."""
        self._check_open()
        with _outages(), self._writes.connect() as connection:
            change = _Change(connection, self.tables)
            change.lock()
            yield change
            change.finish()
            connection.commit()

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """See `Store.add_pepper`."""
        peppers = self.tables.peppers
        with self._writing() as change:
            if change.has(select(peppers.c.id).where(peppers.c.id == pepper.id)):
                raise Conflict(f"the store already has a pepper {pepper.id!r}")
            change.run(insert(peppers).values(pepper._asdict()))
            change.append(author, "pepper.added", pepper.id, {}, {"status": pepper.status})

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """See `Store.set_pepper_status`."""
        peppers = self.tables.peppers
        with self._writing() as change:
            found: dict[str, str] = {row.id: row.status for row in change.run(select(peppers))}
            if pepper_id not in found:
                raise NotFound(f"the store has no pepper {pepper_id!r}")
            wanted: dict[str, str] = {pepper_id: status}
            if status == "primary":
                wanted |= {other: "accept" for other, now in found.items() if now == "primary"} | wanted
            for id_, after in wanted.items():
                before = found[id_]
                if before != after:
                    change.run(update(peppers).where(peppers.c.id == id_).values(status=after))
                    change.append(author, f"pepper.{after}", id_, {"status": before}, {"status": after})

    def count_digests(self, pepper_id: str) -> int:
        """See `Store.count_digests`."""
        digests = self.tables.digests
        statement = select(func.count()).select_from(digests).where(digests.c.pepper_id == pepper_id)
        return self._read(lambda connection: int(connection.scalar(statement) or 0))

    def add_machine(self, machine: Machine, author: Author) -> None:
        """See `Store.add_machine`."""
        machines = self.tables.machines
        with self._writing() as change:
            if change.has(select(machines.c.id).where(machines.c.id == machine.id)):
                raise Conflict(f"the store already has a machine {machine.id}")
            change.run(insert(machines).values(dict(zip(MACHINE_COLUMNS, machine_row(machine), strict=True))))
            change.append(author, "machine.created", machine.id, {}, {"name": machine.name})

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """See `Store.update_machine`."""
        with self._writing() as change:
            machine = change.machine(machine_id)
            was = {name: getattr(machine, name) for name in columns}
            if change.update(self.tables.machines, machine_id, was, columns, kind, author):
                return change.machine(machine_id)
            return machine

    def delete_machine(self, machine_id: str, author: Author) -> None:
        """See `Store.delete_machine`."""
        machines, keys, digests = self.tables.machines, self.tables.keys, self.tables.digests
        with self._writing() as change:
            machine = change.machine(machine_id)
            of_machine = select(keys.c.id).where(keys.c.machine_id == machine_id)
            change.run(delete(digests).where(digests.c.key_id.in_(of_machine)))
            change.run(delete(keys).where(keys.c.machine_id == machine_id))
            change.run(delete(machines).where(machines.c.id == machine_id))
            change.append(author, "machine.deleted", machine_id, {"name": machine.name}, {})

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """See `Store.machines`."""
        table = self.tables.machines
        statement = select(*(table.c[name] for name in MACHINE_COLUMNS)).order_by(
            table.c.created_at, table.c.id
        )
        if id_or_name is not None:
            statement = statement.where(or_(table.c.id == id_or_name, table.c.name == id_or_name))
        rows = self._read(lambda connection: connection.execute(statement).all())
        return _exactly(id_or_name, [read_machine(row) for row in rows])

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """See `Store.add_key`."""
        keys, digests = self.tables.keys, self.tables.digests
        candidates = [candidate.digest for candidate in claim.candidates]
        with self._writing() as change:
            change.minted_only &= not claim.foreign
            change.machine(key.machine_id)
            if change.has(select(keys.c.id).where(keys.c.id == key.id)) or change.has(
                select(digests.c.digest).where(digests.c.digest.in_(candidates))
            ):
                raise Conflict("the store already has this key")
            change.run(insert(keys).values(dict(zip(KEY_COLUMNS, key_row(key), strict=True))))
            first = claim.candidates[0]
            change.run(
                insert(digests).values(
                    digest=first.digest, key_id=key.id, pepper_id=first.pepper_id, algorithm=first.algorithm
                )
            )
            after: dict[str, Cell] = {"machine_id": key.machine_id, "name": key.name}
            change.append(author, kind, key.id, {}, after)

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """See `Store.update_key`."""
        with self._writing() as change:
            key = change.key(key_id)
            was = {name: getattr(key, name) for name in columns}
            if change.update(self.tables.keys, key_id, was, columns, kind, author):
                return change.key(key_id)
            return key

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """See `Store.keys`."""
        table = self.tables.keys
        statement = select(*(table.c[name] for name in KEY_COLUMNS)).order_by(table.c.created_at, table.c.id)
        if id_or_name is not None:
            statement = statement.where(or_(table.c.id == id_or_name, table.c.name == id_or_name))
        if machine_id is not None:
            statement = statement.where(table.c.machine_id == machine_id)
        rows = self._read(lambda connection: connection.execute(statement).all())
        return _exactly(id_or_name, [read_key(row) for row in rows])

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """See `Store.journal`."""
        table = self.tables.changes
        statement = select(table).order_by(table.c.seq.desc()).limit(limit)
        if subject is not None:
            statement = statement.where(table.c.subject == subject)
        rows = self._read(lambda connection: connection.execute(statement).all())
        return [Change(Epoch(row[0], bytes(row[1])), moment(row[2]), *row[3:]) for row in rows]

    def before_fork(self) -> None:
        """Do nothing: the parent's connections stay the parent's."""

    def after_fork(self, *, child: bool) -> None:
        """Start with new connections in a child."""
        if child:
            _leave(self._engine)
            _leave(self._writer)


_Listed = TypeVar("_Listed", Machine, Key)


def _exactly(id_or_name: str | None, found: list[_Listed]) -> list[_Listed]:
    """Compare again: MySQL pads with blanks, so that "a" is "a " to it."""
    return [item for item in found if id_or_name is None or id_or_name in (item.id, item.name)]


_abandoned: list[object] = []  # never closed: that would be using the parent's connections


def _leave(engine: Engine) -> None:
    _abandoned.append(engine.pool)
    engine.dispose(close=False)


class _Change:
    """The transaction of one change, from the lock on the tip to the new tip."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self.run = connection.execute
        self._connection = connection
        self._dialect = connection.dialect.name
        self._tables = tables
        self._tip = self._new = Epoch(0, b"")
        self.minted_only = True
        """Whether the store may go on saying that it holds no foreign key, if it does."""

    def lock(self) -> None:
        """Wait for the change before this one, and read the tip it left."""
        meta = self._tables.meta
        if self._dialect == "sqlite":  # knows no "for update"; a write locks it
            self.run(update(meta).values(seq=meta.c.seq))
        tip = Statements(self._tables).tip.with_for_update()
        (row,) = ask_pooled(self._connection, tip, {}, may_be_empty=True) or (None,)
        self._tip = self._new = read_tip(row)

    def append(
        self, author: Author, kind: str, subject: str, before: Mapping[str, Cell], after: Mapping[str, Cell]
    ) -> None:
        """Write a line of the journal."""
        self._new = next_epoch(self._new)
        self.run(
            insert(self._tables.changes).values(
                seq=self._new.seq, nonce=self._new.nonce, at=microseconds(author.at), actor=author.actor,
                kind=kind, subject=subject, before=journal_text(before), after=journal_text(after),
            )
        )  # fmt: skip

    def finish(self) -> None:
        """Set the tip, and announce it with the commit."""
        if self._new == self._tip:
            return
        values = {"seq": self._new.seq, "nonce": self._new.nonce}
        if not self.minted_only:
            values["minted_only"] = 0
        self.run(update(self._tables.meta).values(values))
        if self._dialect == "postgresql":
            self.run(select(func.pg_notify(self._tables.channel, "")))

    def has(self, statement: Select[Any]) -> bool:
        """Tell whether there is such a row."""
        return self.run(statement.limit(1)).first() is not None

    def machine(self, machine_id: str) -> Machine:
        """Read a machine. Raises `NotFound`."""
        table = self._tables.machines
        row = self.run(
            select(*(table.c[name] for name in MACHINE_COLUMNS)).where(table.c.id == machine_id)
        ).first()
        if row is None:
            raise NotFound(f"the store has no machine {machine_id}")
        return read_machine(row)

    def key(self, key_id: str) -> Key:
        """Read a key. Raises `NotFound`."""
        table = self._tables.keys
        row = self.run(select(*(table.c[name] for name in KEY_COLUMNS)).where(table.c.id == key_id)).first()
        if row is None:
            raise NotFound(f"the store has no key {key_id}")
        return read_key(row)

    def update(
        self,
        table: Any,
        id_: str,
        was: Mapping[str, object],
        columns: KeyColumns | MachineColumns,
        kind: str,
        author: Author,
    ) -> bool:
        """Write what differs, and tell whether anything did."""
        before, after = difference(was, cast("Mapping[str, object]", columns))
        if after:
            self.run(update(table).where(table.c.id == id_).values(after))
            self.append(author, kind, id_, before, after)
        return bool(after)


def _ask_at_level(connection: Connection, statement: Select[Any], values: Mapping[str, Any]) -> Sequence[Row]:
    return ask_pooled(at_level(connection, "AUTOCOMMIT"), statement, values)


class AsyncSQLStore:
    """The same for event loops, over an async engine and the blocking store beside it.

    ``engine`` and what ``sync`` is stay the caller's to close, unless they came from a URL.
    """

    def __init__(
        self,
        engine: AsyncEngine | LoopEngines,
        sync: Engine | SQLStore,
        *,
        prefix: str = DEFAULT_PREFIX,
        schema: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self._engine = engine
        self._sync = sync if isinstance(sync, SQLStore) else SQLStore(sync, prefix=prefix, schema=schema)
        self._patience = Patiences(3 * timeout)
        self._judges = Threads(1, name="papaours-sql")
        self._statements = Statements(self._sync.tables)
        self._closed = False

    @property
    def sync(self) -> SQLStore:
        """The blocking twin."""
        return self._sync

    async def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        digests = [candidate.digest for candidate in claim.candidates]
        return found(await self._read(self._statements.lookup, {"digests": digests}))

    async def describe(self) -> Description:
        """See `Lookup.describe`."""
        return described(await self._read(self._statements.describe, {}))

    async def aclose(self) -> None:
        """See `AsyncStore.aclose`."""
        self._closed = True
        if isinstance(self._engine, LoopEngines):
            await self._engine.aclose()
        await asyncio.to_thread(self._sync.close)

    async def _read(self, statement: Select[Any], values: Mapping[str, Any]) -> Sequence[Row]:
        if self._closed:
            raise StoreUnavailable("the SQL store is closed")
        begin = time.monotonic()
        try:
            return await self._ask(statement, values)
        except SQLAlchemyError as error:
            if not died_idle(error, begin):
                # Tables that were seen are not looked for: an outage takes none of the app's threads.
                judged = self._sync.judged(error) if self._sync.seen else await self._judged(error)
                if isinstance(judged, StoreUnavailable):
                    judged.own_timer = _timed_out(error)
                raise judged from None
        with _outages():
            return await self._ask(statement, values)

    async def _judged(self, error: SQLAlchemyError) -> StoreUnavailable | ConfigurationError:
        asked = self._judges.ask(partial(self._sync.judged, error))
        return _unavailable(error) if asked is None else await asyncio.wrap_future(asked)

    async def _ask(self, statement: Select[Any], values: Mapping[str, Any]) -> Sequence[Row]:
        notice_fork()
        try:
            # The drivers' own bounds come first; this one is for those that have none.
            with self._patience.bound():
                engine = self._engine
                if isinstance(engine, LoopEngines):
                    engine = await engine.here()
                async with engine.connect() as connection:
                    rows = await connection.run_sync(_ask_at_level, statement, values)
                    self._sync.seen = True
                    return rows
        except TimeoutError:
            error = StoreUnavailable("the SQL store does not answer in time")
            error.own_timer = True
            raise error from None


class SQLFeed:
    """Looks at the tip through a connection of its own, and listens on it where the server announces.

    ``announcements`` is True once one has arrived, None until it is known, False where the tip is polled.
    """

    def __init__(self, store: SQLStore) -> None:
        self._store = store
        self._statements = Statements(store.tables)
        self._tip: Epoch | None = None
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._using = WaitingLock()  # the connection: a reading in one thread, a look in another
        self._connection: Connection | None = None
        self._listening: Any = None  # the psycopg connection
        self._heard = False
        self._test = ""
        self._test_ends = 0.0
        self.announcements: bool | None = False
        self._waker = _Waker()

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        """See `Feed.read`.

        Tip and peppers are one snapshot. What led to that tip stands in the log for good: it is asked for
        afterwards, and only where the tip has moved.
        """
        notice_fork()
        since = known.get(0)
        with self._using:
            rows = self._ask(self._statements.describe)
            installation, peppers = described(rows)
            self._tip = tip = read_tip(rows[0])
            changes: list[tuple[str, str]] | None = None
            if since == tip:
                changes = []
            elif since is not None:
                changes = changes_between(
                    self._ask(self._statements.log, known=since.seq, tip=tip.seq), since, tip
                )
        return Reading(installation, {0: News(tip, changes, peppers, minted_only(rows))})

    def _ask(self, statement: Select[Any], **values: int) -> Sequence[Row]:
        """Ask; once more where the connection had died meanwhile."""
        begin, fresh = time.monotonic(), self._connection is None
        try:
            return self._ask_once(statement, values)
        except SQLAlchemyError as error:
            if fresh or not died_idle(error, begin):
                raise _unavailable(error) from None
        with _outages():
            return self._ask_once(statement, values)

    def _ask_once(self, statement: Select[Any], values: Mapping[str, int]) -> Sequence[Row]:
        try:
            return ask(self._connected(), statement, values)
        except (SQLAlchemyError, Stray):
            self._disconnect()
            raise

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._store.connect()
            driver = self._connection.connection.driver_connection
            self._connection.detach()  # from the pool: it is kept for as long as it lives
            if self._connection.dialect.driver == "psycopg":
                self._listen(self._connection, driver)
        return self._connection

    def _listen(self, connection: Connection, driver: Any) -> None:
        channel = connection.dialect.identifier_preparer.quote_identifier(self._store.tables.channel)
        connection.exec_driver_sql(f"listen {channel}")
        self._listening = driver
        self._listening.add_notify_handler(self._hear)  # those that come with an answer
        self._test, self._test_ends, self.announcements = "", 0.0, None

    def _disconnect(self) -> None:
        connection, self._connection, self._listening = self._connection, None, None
        self.announcements = False
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.close()

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        end = time.monotonic() + timeout
        self._send_test()
        while not self._changed():
            left = end - time.monotonic()
            if left <= 0 or self._waker.wait(
                self._listening, left if self._hears() else min(left, POLL_INTERVAL)
            ):
                return

    def _hears(self) -> bool:
        """Tell whether waiting for announcements will do; there is nothing to poll without a connection."""
        if self.announcements is None and self._test and time.monotonic() >= self._test_ends:
            self.announcements = False
            logger.warning(
                "the SQL store's announcements do not arrive (a pooler in transaction mode swallows LISTEN): "
                "its tip is polled every %d ms instead",
                POLL_INTERVAL * 1000,
            )
        return bool(self.announcements) or self._connection is None

    def _send_test(self) -> None:
        """Announce something to ourselves by way of another connection, to see whether it arrives."""
        if self.announcements is not None or self._test:
            return
        self._test = _OURS + secrets.token_hex(8)
        self._test_ends = time.monotonic() + HEARD_WITHIN
        with suppress(SQLAlchemyError, StoreUnavailable), self._store.connect() as other:
            other.execute(select(func.pg_notify(self._store.tables.channel, self._test)))

    def _hear(self, announcement: Any) -> None:
        payload = announcement.payload
        payload = payload if isinstance(payload, str) else ""
        self._heard |= not payload.startswith(_OURS)  # others test too
        if self.announcements is None and (payload == self._test or not payload):
            self.announcements = True

    def _changed(self) -> bool:
        with self._using:
            if self._connection is None:
                return False  # the next reading connects
            if self._listening is not None:
                self._take_announcements()
            if self._heard or self._hears():
                heard, self._heard = self._heard, False
                return heard
            try:
                rows = self._connection.execute(self._statements.tip, {"word": 0}).all()
            except SQLAlchemyError:
                self._disconnect()
                return True  # the next reading says so
        # One that is gone the next reading tells of, which must not come at once for as long as it is gone. Another's
        # answer brings a reading about, no more.
        return bool(rows) and Epoch(rows[0][3], bytes(rows[0][4])) != self._tip

    def _take_announcements(self) -> None:
        """Take what has arrived by itself, without asking the server anything."""
        try:
            self._listening.pgconn.consume_input()
            while announcement := self._listening.pgconn.notifies():
                self._hear(_Announcement(announcement.extra.decode()))
        except self._listening.Error:
            self._disconnect()
            self._heard = True

    def wake(self) -> None:
        """See `Feed.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """See `Feed.close`."""
        with self._using:
            self._disconnect()
        self.wake()

    def before_fork(self) -> None:
        """Wait for a reading under way."""
        self._using.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Leave the parent's connection alone in a child."""
        if child:
            _abandoned.append((self._connection, self._listening, self._waker))
            self._reset()
        else:
            self._using.release()


class _Announcement(NamedTuple):
    payload: str


class _Waker:
    """A pipe to oneself, so that another thread can end a wait for a socket."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        weakref.finalize(self, _close_pipe, self._out, self._in).atexit = False

    def wake(self) -> None:
        """End a wait, or the next one."""
        with suppress(BlockingIOError):  # full: it is awake
            os.write(self._in, b"!")

    def wait(self, listening: Any, timeout: float) -> bool:
        """Wait for a wake (True), for the listening connection's socket, or for the time to pass."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            if listening is not None:
                with suppress(listening.Error):  # closed just now by another thread
                    selector.register(listening.fileno(), selectors.EVENT_READ)
            ready = {key.fd for key, _ in selector.select(timeout)}
        if self._out not in ready:
            return False
        os.read(self._out, 4096)
        return True


def _close_pipe(*ends: int) -> None:
    for end in ends:
        os.close(end)


# errors: what a driver says may hold a host, a user, a value; its class and number do not


def _cause(error: SQLAlchemyError) -> str:
    original = error.orig if isinstance(error, DBAPIError) else None
    if original is None:
        return type(error).__name__
    number = getattr(original, "sqlstate", None) or next(
        (item for item in original.args[:1] if isinstance(item, int)), None
    )
    return type(original).__name__ if number is None else f"{type(original).__name__} {number}"


def _misled(error: SQLAlchemyError) -> ConfigurationError | None:
    if isinstance(error, InvalidRequestError) and "not a MariaDB" in str(error):
        return ConfigurationError(
            "the mariadb:// URL leads to a MySQL server: write mysql:// (PAPAOURS_STORE)"
        )
    return None


def _unavailable(error: SQLAlchemyError) -> StoreUnavailable:
    if isinstance(error, PoolTimeoutError):
        return Overloaded("all connections to the SQL store are in use: see the engine's pool_size")
    return StoreUnavailable(f"the SQL store cannot answer ({_cause(error)})")


def _timed_out(error: SQLAlchemyError) -> bool:
    """Whether a timer of the driver's ended the connecting, which on an event loop may be the loop's fault."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError) or type(cause).__name__ == "ConnectionTimeout":  # psycopg's
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def _outages() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise _unavailable(error) from None
