"""The embedded store: one SQLite file, safe with several processes.

WAL mode, ``synchronous=FULL``; a lookup is one statement, so one snapshot. No connection crosses a fork: they
are closed before it and opened anew after it, in parent and child (SQLite's own rule, "How To Corrupt" 2.6).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, cast
from urllib.parse import quote, unquote_to_bytes

from .._fork import hold_across_fork, in_own_process, notice_fork
from .._threads import Threads
from ..digest import PepperStatus
from ..exceptions import ConfigurationError, Conflict, NotFound, Overloaded, StoreUnavailable
from ..model import Key, Machine, Record
from ..verify import PARTITIONS, Claim
from . import (
    Author,
    Change,
    Description,
    Epoch,
    Feed,
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
from .sqlite_wal import turn_to_wal

POLL_INTERVAL: Final = 0.02
"""Seconds between two looks at ``PRAGMA data_version``: 6 µs each, so 0.03 % of a core."""
LOG_READ: Final = 10_000
"""Changes a watcher reads at once: further behind, it drops its whole cache."""
BUSY_TIMEOUT: Final = 5.0
"""Seconds an administrator's write waits for another's. Lookups never wait: WAL readers meet no lock."""
LOOKUP_THREADS: Final = 6
"""Threads for an event loop's lookups: more than an authenticator uses for foreign keys at a time."""
MOST_WAITING: Final = 1_000
"""Lookups of event loops that may wait for those threads; more are `Overloaded`."""
_MMAP_BYTES: Final = 1 << 30

_MIGRATIONS: Final = tuple(Path(__file__).with_name(f"sqlite_{version}.sql") for version in (1, 2))
SCHEMA_VERSION: Final = len(_MIGRATIONS)

_KEYS: Final = ", ".join(f"k.{name}" for name in KEY_COLUMNS)
_MACHINES: Final = ", ".join(f"m.{name}" for name in MACHINE_COLUMNS)
_TIP: Final = "(select seq, nonce from changes order by seq desc limit 1)"
# In one text, so that a reading is one statement, and so one snapshot: see `_SQLiteFeed`.
_TOLD: Final = (
    "(select group_concat(id || ' ' || hex(proof) || ' ' || status, char(10)) from peppers), meta.minted_only"
)
_LOG: Final = (  # of words of ours
    f"select meta.installation, c.seq, c.nonce, c.kind, c.subject, {_TOLD} from meta left join changes c "  # noqa: S608
    "on c.seq >= coalesce(?, (select max(seq) from changes)) order by c.seq limit ?"
)
_LOG_END: Final = f"select meta.installation, tip.seq, tip.nonce, '', '', {_TOLD} from meta join {_TIP} tip"  # noqa: S608
_FIRST_KEY, _FIRST_MACHINE = 4, 4 + len(KEY_COLUMNS)

_File: TypeAlias = tuple[int, int]  # device and inode
_T = TypeVar("_T")


def open_store(url: str, create: bool) -> SQLiteStore:
    """Open ``sqlite:///relative.db`` or ``sqlite:////absolute.db``; with ``create``, make or migrate it."""
    return SQLiteStore(path_of(url), create=create)


def open_async_store(url: str, create: bool) -> AsyncSQLiteStore:
    """Open the same for event loops."""
    return AsyncSQLiteStore(open_store(url, create))


def path_of(url: str) -> Path:
    """Give the file an ``sqlite:///`` URL names. Raises `ConfigurationError`."""
    rest = url.removeprefix("sqlite://")
    path = os.fsdecode(unquote_to_bytes(os.fsencode(rest[1:])))
    if not rest.startswith("/") or not path or "?" in rest or path.startswith(":memory:") or "\0" in path:
        raise ConfigurationError(
            "an SQLite store is a file: sqlite:///relative.db or sqlite:////absolute.db, without options "
            "(memory:// is the store in memory)"
        )
    return Path(path)


class SQLiteStore:
    """Lookup, feed and administration over one file. Safe to share between threads and across a fork."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        # Absolute at once: an app that changes its directory later still means the same file.
        self._path = path.absolute()
        if create:
            _create(self._path)
        _check_file(self._path)
        self._readers = _Pool(self._path, read_only=True)
        self._writers = _Pool(self._path, read_only=False)
        self._lookups: dict[int, str] = {}
        try:
            _check_schema(self._path, self._readers)
        except BaseException:
            self.close()
            raise

    # verification

    def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        digests = [candidate.digest for candidate in claim.candidates]
        statement = self._lookups.get(len(digests)) or self._lookup_statement(len(digests))
        connection = self._readers.take()
        try:
            row = connection.execute(statement, digests).fetchone()
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        finally:
            self._readers.give(connection)
        if row is None or row[0] is None:
            raise StoreUnavailable(
                "the SQLite store has lost its installation mark: restore it from a backup"
            )
        epochs = {0: Epoch(row[1], row[2])}
        if row[3] is None:
            return Found(None, epochs)
        key = read_key(row[_FIRST_KEY:_FIRST_MACHINE])
        return Found(Record(key, read_machine(row[_FIRST_MACHINE:]), row[3]), epochs)

    def _lookup_statement(self, candidates: int) -> str:
        marks = ", ".join("?" * candidates)
        statement = f"""
            select meta.installation, tip.seq, tip.nonce, d.digest, {_KEYS}, {_MACHINES}
            from meta join {_TIP} tip
            left join digests d on d.digest in ({marks})
            left join keys k on k.id = d.key_id
            left join machines m on m.id = k.machine_id
            limit 1"""  # noqa: S608 - names of ours and question marks
        self._lookups[candidates] = statement
        return statement

    def describe(self) -> Description:
        """See `Lookup.describe`."""
        with self._reading() as connection:
            mark = connection.execute("select installation from meta").fetchone()
            rows = connection.execute("select id, proof, status from peppers order by id").fetchall()
        if mark is None:
            raise StoreUnavailable(
                "the SQLite store has lost its installation mark: restore it from a backup"
            )
        return Description(mark[0], tuple(PepperRecord(*row) for row in rows))

    def feed(self) -> Feed:
        """See `Lookup.feed`."""
        return _SQLiteFeed(self._path)

    def close(self) -> None:
        """See `Lookup.close`."""
        self._readers.close()
        self._writers.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = self._readers.take()
        try:
            yield connection
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        finally:
            self._readers.give(connection)

    # administration

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Hold the one write transaction: all of it happens, or nothing."""
        connection = self._writers.take()
        try:
            connection.execute("begin immediate")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("rollback")
                raise
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        finally:
            self._writers.give(connection)

    def add_pepper(self, pepper: PepperRecord, author: Author) -> None:
        """See `Store.add_pepper`."""
        with self._writing() as connection:
            if connection.execute("select 1 from peppers where id = ?", (pepper.id,)).fetchone():
                raise Conflict(f"the store already has a pepper {pepper.id!r}")
            connection.execute("insert into peppers (id, proof, status) values (?, ?, ?)", pepper)
            _append(connection, author, "pepper.added", pepper.id, {}, {"status": pepper.status})

    def set_pepper_status(self, pepper_id: str, status: PepperStatus, author: Author) -> None:
        """See `Store.set_pepper_status`."""
        with self._writing() as connection:
            found = dict(connection.execute("select id, status from peppers").fetchall())
            if pepper_id not in found:
                raise NotFound(f"the store has no pepper {pepper_id!r}")
            wanted: dict[str, str] = {pepper_id: status}
            if status == "primary":
                wanted |= {other: "accept" for other, now in found.items() if now == "primary"} | wanted
            for id_, after in wanted.items():
                if found[id_] != after:
                    connection.execute("update peppers set status = ? where id = ?", (after, id_))
                    _append(
                        connection, author, f"pepper.{after}", id_, {"status": found[id_]}, {"status": after}
                    )

    def count_digests(self, pepper_id: str) -> int:
        """See `Store.count_digests`."""
        with self._reading() as connection:
            row = connection.execute(
                "select count(*) from digests where pepper_id = ?", (pepper_id,)
            ).fetchone()
            return int(row[0])

    def add_machine(self, machine: Machine, author: Author) -> None:
        """See `Store.add_machine`."""
        with self._writing() as connection:
            if connection.execute("select 1 from machines where id = ?", (machine.id,)).fetchone():
                raise Conflict(f"the store already has a machine {machine.id}")
            _insert(connection, "machines", MACHINE_COLUMNS, machine_row(machine))
            _append(connection, author, "machine.created", machine.id, {}, {"name": machine.name})

    def update_machine(self, machine_id: str, columns: MachineColumns, kind: str, author: Author) -> Machine:
        """See `Store.update_machine`."""
        with self._writing() as connection:
            machine = _machine(connection, machine_id)
            was = {name: getattr(machine, name) for name in columns}
            if _update(connection, "machines", machine_id, was, columns, kind, author):
                return _machine(connection, machine_id)
            return machine

    def delete_machine(self, machine_id: str, author: Author) -> None:
        """See `Store.delete_machine`."""
        with self._writing() as connection:
            machine = _machine(connection, machine_id)
            connection.execute(
                "delete from digests where key_id in (select id from keys where machine_id = ?)",
                (machine_id,),
            )
            connection.execute("delete from keys where machine_id = ?", (machine_id,))
            connection.execute("delete from machines where id = ?", (machine_id,))
            _append(connection, author, "machine.deleted", machine_id, {"name": machine.name}, {})

    def machines(self, id_or_name: str | None = None) -> list[Machine]:
        """See `Store.machines`."""
        where, values = _where({"(id = ? or name = ?)": id_or_name})
        statement = f"select {', '.join(MACHINE_COLUMNS)} from machines {where} order by created_at, id"  # noqa: S608
        with self._reading() as connection:
            return [read_machine(row) for row in connection.execute(statement, values).fetchall()]

    def add_key(self, key: Key, claim: Claim, kind: str, author: Author) -> None:
        """See `Store.add_key`."""
        with self._writing() as connection:
            _machine(connection, key.machine_id)
            there = connection.execute("select 1 from keys where id = ?", (key.id,)).fetchone()
            digests = [candidate.digest for candidate in claim.candidates]
            marks = ", ".join("?" * len(digests))
            there = (
                there
                or connection.execute(
                    f"select 1 from digests where digest in ({marks})",  # noqa: S608 - question marks
                    digests,
                ).fetchone()
            )
            if there:
                raise Conflict("the store already has this key")
            _insert(connection, "keys", KEY_COLUMNS, key_row(key))
            first = claim.candidates[0]
            connection.execute(
                "insert into digests (digest, key_id, pepper_id, algorithm) values (?, ?, ?, ?)",
                (first.digest, key.id, first.pepper_id, first.algorithm),
            )
            if claim.foreign:
                connection.execute("update meta set minted_only = 0")
            after: dict[str, Cell] = {"machine_id": key.machine_id, "name": key.name}
            _append(connection, author, kind, key.id, {}, after)

    def update_key(self, key_id: str, columns: KeyColumns, kind: str, author: Author) -> Key:
        """See `Store.update_key`."""
        with self._writing() as connection:
            key = _key(connection, key_id)
            was = {name: getattr(key, name) for name in columns}
            if _update(connection, "keys", key_id, was, columns, kind, author):
                return _key(connection, key_id)
            return key

    def keys(self, id_or_name: str | None = None, *, machine_id: str | None = None) -> list[Key]:
        """See `Store.keys`."""
        where, values = _where({"(id = ? or name = ?)": id_or_name, "machine_id = ?": machine_id})
        statement = f"select {', '.join(KEY_COLUMNS)} from keys {where} order by created_at, id"  # noqa: S608
        with self._reading() as connection:
            return [read_key(row) for row in connection.execute(statement, values).fetchall()]

    def journal(self, subject: str | None = None, *, limit: int = 100) -> list[Change]:
        """See `Store.journal`."""
        where, values = _where({"subject = ?": subject})
        statement = (
            f"select seq, nonce, at, actor, kind, subject, before, after from changes {where} "  # noqa: S608
            "order by seq desc limit ?"
        )
        with self._reading() as connection:
            rows = connection.execute(statement, (*values, limit)).fetchall()
        return [Change(Epoch(row[0], row[1]), moment(row[2]), *row[3:]) for row in rows]


class AsyncSQLiteStore:
    """The same file for event loops: lookups run in a few threads of its own, started at first use."""

    def __init__(self, sync: SQLiteStore) -> None:
        self._sync = sync
        self._threads = Threads(LOOKUP_THREADS, name="papaours-sqlite", waiting=MOST_WAITING - LOOKUP_THREADS)

    @property
    def sync(self) -> SQLiteStore:
        """The blocking twin."""
        return self._sync

    async def lookup(self, claim: Claim) -> Found:
        """See `Lookup.lookup`."""
        return await self._run(lambda: self._sync.lookup(claim))

    async def describe(self) -> Description:
        """See `Lookup.describe`."""
        return await self._run(self._sync.describe)

    async def aclose(self) -> None:
        """See `AsyncStore.aclose`."""
        self._sync.close()
        self._threads.stop()

    async def _run(self, call: Callable[[], _T]) -> _T:
        asked = self._threads.ask(call)
        if asked is None:
            raise Overloaded("the SQLite store is slower than the calls come in")
        # Shielded, so that callers who leave cannot fill the queue with what nobody counts.
        return await asyncio.shield(asyncio.wrap_future(asked))


class _SQLiteFeed:
    """Looks at the tip through one connection that is never written, shared, or left in an open read.

    (`data_version` is blind to its own connection's commits and stands still while one reads.) Beside threads
    that compute, whatever lets go of the interpreter may wait 5 ms to get it back: hence few calls into SQLite.
    """

    def __init__(self, path: Path) -> None:
        self._pool = _Pool(path, read_only=True)
        self._looking = threading.Lock()  # one at a time: the pool then gives the same connection to all
        self._seen: tuple[sqlite3.Connection | None, int] = (None, 0)
        self._file: _File | None = None
        self._next_look = 0.0
        self._woken = threading.Event()

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        tip = known.get(0)
        with self._looking:
            rows, same_file = self._rows(tip)
        if not rows:
            raise StoreUnavailable(
                "the SQLite store has lost its installation mark: restore it from a backup"
            )
        epoch = Epoch(*rows[-1][1:3])
        unbroken = tip is not None and same_file and Epoch(*rows[0][1:3]) == tip
        changes = [(row[3], row[4]) for row in rows[1:]] if unbroken else None
        minted_only = range(PARTITIONS) if rows[-1][6] else ()
        return Reading(rows[0][0], {0: News(epoch, changes, _read_peppers(rows[-1][5]), minted_only)})

    def _rows(self, tip: Epoch | None) -> tuple[list[Any], bool]:
        """Give the log from the known tip on, or its last row alone; and whether the file is the same."""
        connection = self._pool.take()
        try:
            # What was looked at before the tip is read serves: a commit in between is seen by the next look.
            if self._seen[0] is not connection:
                self._look(connection)
            file, self._file = self._file, self._pool.file
            rows = connection.execute(_LOG, (tip.seq if tip is not None else None, LOG_READ + 1)).fetchall()
            if rows and (len(rows) > LOG_READ or rows[0][1] is None):
                rows = connection.execute(_LOG_END).fetchall()
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        finally:
            self._pool.give(connection)
        return rows, file in (None, self._file)

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not self._woken.wait(max(0.0, min(self._next_look, end) - time.monotonic())):
            now = time.monotonic()
            self._next_look = now + POLL_INTERVAL  # however long the look takes
            if now >= end or self._changed():
                return
        self._woken.clear()

    def _changed(self) -> bool:
        with self._looking:
            try:
                connection = self._pool.take()
            except StoreUnavailable:
                return False  # the next reading says so
            try:
                return self._look(connection)
            except sqlite3.Error:
                return True
            finally:
                self._pool.give(connection)

    def _look(self, connection: sqlite3.Connection) -> bool:
        """Tell whether somebody wrote since the last look. Another connection is another file, or a fork."""
        before = self._seen
        self._seen = (connection, int(connection.execute("pragma data_version").fetchone()[0]))
        return self._seen != before

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._pool.discard()
        self.wake()


def _read_peppers(text: str | None) -> list[PepperRecord]:
    """Read what `_TOLD` writes of them. Raises `StoreUnavailable` for what nobody wrote by `Keys`."""
    lines = [line.split(" ") for line in text.split("\n")] if text is not None else []
    try:
        return [
            PepperRecord(id_, bytes.fromhex(proof), cast("PepperStatus", status))
            for id_, proof, status in lines
        ]
    except ValueError as error:
        raise StoreUnavailable("the peppers in the SQLite store cannot be read") from error


class _Pool:
    """Open connections to one file: as many as are in use at once, none of them across a fork.

    Each `take` compares the path's inode with the one that is open (by ``os.stat``: opening and closing the
    file would drop SQLite's POSIX locks), so a file put in its place is noticed at once.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._path = path
        self._read_only = read_only
        self._closed = False
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._idle: list[sqlite3.Connection] = []
        self._taken: dict[sqlite3.Connection, _File] = {}
        self._forking = False
        self.file: _File | None = None

    def take(self) -> sqlite3.Connection:
        """Give a connection for a short while. Raises `StoreUnavailable`."""
        if not in_own_process():
            notice_fork()
        try:
            status = os.stat(self._path)  # noqa: PTH116 - Path.stat costs 1 µs more on each lookup
        except OSError as error:
            raise StoreUnavailable(f"the SQLite store's file cannot be reached ({error.strerror})") from None
        file = (status.st_dev, status.st_ino)
        with self._condition:
            if self._closed:
                raise StoreUnavailable("the SQLite store is closed")
            if file != self.file:
                self._close_idle()
                self.file = file
            connection = self._idle.pop() if self._idle else self._connect()
            self._taken[connection] = file
        return connection

    def give(self, connection: sqlite3.Connection) -> None:
        """Take a connection back, unless its file was replaced meanwhile: nobody may read the old one again."""
        with self._condition:
            if self._taken.pop(connection, None) == self.file and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()
            if self._forking:  # else nobody waits: 1 µs less of a lookup
                self._condition.notify_all()

    def close(self) -> None:
        """Close for good."""
        with self._condition:
            self._closed = True
            self._close_idle()

    def discard(self) -> None:
        """Close what is open; later takes open anew."""
        with self._condition:
            self._close_idle()

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(self._path))}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        try:
            connection.execute("pragma foreign_keys = on")
            connection.execute("pragma synchronous = full")
            if self._read_only:
                connection.execute("pragma query_only = on")
                connection.execute(f"pragma mmap_size = {_MMAP_BYTES}")
            mode = connection.execute("pragma journal_mode").fetchone()[0]
        except sqlite3.Error as error:
            connection.close()
            raise _unavailable(error) from error
        if mode != "wal":
            connection.close()
            raise StoreUnavailable(f"the SQLite store is in journal mode {mode!r}, not 'wal'")
        return connection

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    # A WSGI middleware is never told that its app is gone: what it opened is closed with it.
    __del__ = _close_idle

    def before_fork(self) -> None:
        """Close every connection, waiting for those in use; hold the pool until the fork is done."""
        self._condition.acquire()
        self._forking = True
        self._condition.wait_for(lambda: not self._taken, timeout=BUSY_TIMEOUT)
        self._close_idle()

    def after_fork(self, *, child: bool) -> None:
        """Let the pool be used again; a child's starts empty.

        After a fork in C a child has copies of idle connections, and closes them: while SQLite remembers one, it
        takes locks on the file for held that only the parent holds. A connection that was in use at the fork is
        left alone: closing it might wait for a thread of the parent's.
        """
        if not child:
            self._forking = False
            self._condition.release()
            return
        _abandoned.extend(self._taken)
        self._close_idle()
        self._reset()


_abandoned: list[sqlite3.Connection] = []  # never closed: that would be using the parent's connection


def _create(path: Path) -> None:
    """Make the file (0600) and bring its schema up to date, safely with others doing the same."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigurationError(
            f"the SQLite store {path} cannot be made ({error.strerror}): check the folder and its owner"
        ) from None
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        turn_to_wal(connection)
        connection.execute("pragma synchronous = full")
        connection.execute("begin immediate")
        version = int(connection.execute("pragma user_version").fetchone()[0])
        if version == 0 and connection.execute("select 1 from sqlite_master limit 1").fetchone():
            raise ConfigurationError(f"{path} is another program's SQLite database: choose another file")
        for migration in _MIGRATIONS[version:]:
            for statement in migration.read_text(encoding="utf-8").split(";\n\n"):
                connection.execute(statement)
        if version == 0:
            now = time.time_ns() // 1000
            installation = secrets.token_hex(16)
            connection.execute("insert into meta values (1, ?, ?, 1)", (installation, now))
            _append(connection, Author("papaours-auth", moment(now)), "store.created", installation, {}, {})
        if version < SCHEMA_VERSION:
            connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        connection.execute("commit")
    except sqlite3.Error as error:
        raise ConfigurationError(
            f"{path} cannot be made an SQLite store ({error}): check the file, or choose another"
        ) from None
    finally:
        connection.close()


def _check_file(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigurationError(f"the SQLite store {path} is not a file: check PAPAOURS_STORE")
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no SQLite store at {path}: check PAPAOURS_STORE, or make one with 'papaours-auth init'"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the SQLite store {path} cannot be reached ({error.strerror}): check the path and its owner"
        ) from None
    # Readers in WAL mode write too: the log's index beside the file, which SQLite makes where it is not there.
    if not os.access(path, os.R_OK | os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"the SQLite store {path} and its folder must be readable and writable for every process that verifies "
            "(SQLite's WAL mode needs it): check owner and mode"
        )


def _check_schema(path: Path, pool: _Pool) -> None:
    try:
        connection = pool.take()
    except StoreUnavailable as error:
        raise ConfigurationError(f"the SQLite store {path} cannot be opened: {error}") from None
    try:
        version = int(connection.execute("pragma user_version").fetchone()[0])
    finally:
        pool.give(connection)
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the SQLite store {path} has schema {version}, made by a newer papaours-auth: upgrade this one"
        )
    raise ConfigurationError(
        f"{path} is not a store of this papaours-auth (schema {version}): run 'papaours-auth init' on it"
    )


def _unavailable(error: sqlite3.Error) -> StoreUnavailable:
    # SQLite's messages name tables and causes, never values.
    return StoreUnavailable(f"the SQLite store cannot answer: {error}")


def _append(
    connection: sqlite3.Connection,
    author: Author,
    kind: str,
    subject: str,
    before: Mapping[str, Cell],
    after: Mapping[str, Cell],
) -> None:
    row = connection.execute("select seq, nonce from changes order by seq desc limit 1").fetchone()
    epoch = next_epoch(Epoch(*row) if row is not None else None)
    connection.execute(
        "insert into changes (seq, nonce, at, actor, kind, subject, before, after) values (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *epoch,
            microseconds(author.at),
            author.actor,
            kind,
            subject,
            journal_text(before),
            journal_text(after),
        ),
    )


def _insert(connection: sqlite3.Connection, table: str, columns: Sequence[str], row: Sequence[Cell]) -> None:
    marks = ", ".join("?" * len(columns))
    connection.execute(f"insert into {table} ({', '.join(columns)}) values ({marks})", row)  # noqa: S608


def _update(
    connection: sqlite3.Connection,
    table: str,
    id_: str,
    was: Mapping[str, object],
    columns: KeyColumns | MachineColumns,
    kind: str,
    author: Author,
) -> bool:
    before, after = difference(was, cast("Mapping[str, object]", columns))
    if not after:
        return False
    settings = ", ".join(f"{name} = ?" for name in after)
    connection.execute(f"update {table} set {settings} where id = ?", (*after.values(), id_))  # noqa: S608
    _append(connection, author, kind, id_, before, after)
    return True


def _machine(connection: sqlite3.Connection, machine_id: str) -> Machine:
    statement = f"select {', '.join(MACHINE_COLUMNS)} from machines where id = ?"  # noqa: S608
    row = connection.execute(statement, (machine_id,)).fetchone()
    if row is None:
        raise NotFound(f"the store has no machine {machine_id}")
    return read_machine(row)


def _key(connection: sqlite3.Connection, key_id: str) -> Key:
    statement = f"select {', '.join(KEY_COLUMNS)} from keys where id = ?"  # noqa: S608
    row = connection.execute(statement, (key_id,)).fetchone()
    if row is None:
        raise NotFound(f"the store has no key {key_id}")
    return read_key(row)


def _where(conditions: Mapping[str, str | None]) -> tuple[str, tuple[str, ...]]:
    given = {condition: value for condition, value in conditions.items() if value is not None}
    values = tuple(value for condition, value in given.items() for _ in range(condition.count("?")))
    return ("where " + " and ".join(given) if given else "", values)
