"""What is special about the store in a file: other processes, forks, crashes, and hands that meddle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from papaours_auth import (
    ConfigurationError,
    Keys,
    PepperRing,
    StoreUnavailable,
    open_async_store,
    open_store,
)
from papaours_auth.stores import Author, Found, Store
from papaours_auth.stores import sqlite as sqlite_module
from papaours_auth.stores.sqlite import SQLiteStore
from papaours_auth.stores.sqlite_wal import turn_to_wal
from papaours_auth.verify import PARTITIONS, Claim, read
from support.servers import wait_until

SEED = "pk_prod_abc123def456ghi789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{path}", create=True)
    yield store
    store.close()


@pytest.fixture
def claim(keys: Keys, ring: PepperRing) -> Claim:
    """The seed's key, which the store then has."""
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    keys.import_key(machine.id, SEED, name="Production")
    claim = read(SEED.encode(), format=keys._format, peppers=ring)
    assert isinstance(claim, Claim)
    return claim


def edit(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for part in statement.split("; "):
            connection.execute(part)
        connection.commit()


def put_in_place(other: Path, path: Path) -> None:
    """Put another database in a store's place, as the documentation says: without the former one's log.

    SQLite would read the new file through the old log, and nothing of ours could tell.
    """
    for log in ("-wal", "-shm"):
        path.with_name(path.name + log).unlink(missing_ok=True)
    other.replace(path)


ADD_KEYS = """
import sys
from papaours_auth import Keys, parse_peppers
with Keys(sys.argv[1], peppers=parse_peppers(sys.argv[2])) as keys:
    for n in range(25):
        keys.create_key("Service", name=f"Production {sys.argv[3]}.{n}", environment="prod")
"""


def test_processes_that_write_at_once_lose_nothing(keys: Keys, store: Store, path: Path) -> None:
    from conftest import PEPPER

    keys.create_machine("Service", organisation="cfa-lyon")
    command = [sys.executable, "-c", ADD_KEYS, f"sqlite:///{path}", PEPPER]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert len(store.keys()) == 100
    seqs = [change.epoch.seq for change in store.journal(limit=1000)]
    assert seqs == list(range(len(seqs), 0, -1))


def test_processes_that_create_at_once_make_one_store(tmp_path: Path) -> None:
    code = (
        "import sys; from papaours_auth import open_store; "
        "print(open_store(sys.argv[1], create=True).describe().installation)"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new.db"]
    creators = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    outputs = {creator.communicate(timeout=60)[0] for creator in creators}
    assert len(outputs) == 1
    assert {creator.returncode for creator in creators} == {0}


class Locked:
    """A connection whose file another process turns to WAL at the same time, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.said: list[str] = []

    def execute(self, statement: str) -> None:
        self.said.append(statement)
        if statement == "pragma journal_mode = wal":
            self.times -= 1
            if self.times >= 0:
                raise sqlite3.OperationalError("database is locked")


def test_a_file_that_another_turns_to_wal_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, wait = "pragma journal_mode = wal", ["begin immediate", "rollback"]
    connection = Locked(2)
    turn_to_wal(cast("Any", connection))
    assert connection.said == [turn, *wait, turn, *wait, turn]
    monkeypatch.setattr("papaours_auth.stores.sqlite_wal._PATIENCE", -1.0)
    with pytest.raises(sqlite3.OperationalError):
        turn_to_wal(cast("Any", Locked(1)))


def test_a_fork_leaves_parent_and_child_with_connections_of_their_own(
    store: Store, claim: Claim, keys: Keys, path: Path
) -> None:
    assert store.lookup(claim).record is not None
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number in range(20):
                keys.create_key("Service de facturation", name=f"Enfant {number}", environment="prod")
                assert store.lookup(claim).record is not None
            code = 0
        finally:
            os._exit(code)
    for number in range(20):
        keys.create_key("Service de facturation", name=f"Parent {number}", environment="prod")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(store.keys()) == 41
    check = sqlite3.connect(path)
    assert check.execute("pragma integrity_check").fetchone() == ("ok",)
    check.close()


def test_pitfall_21_callers_who_leave_a_slow_store_do_not_pile_up_in_its_queue(
    path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papaours_auth.stores.sqlite.MOST_WAITING", 6)
    twin = open_async_store(f"sqlite:///{path}")
    look, gate = twin.sync.lookup, threading.Event()

    def slow(claim: Claim) -> Found:
        gate.wait(30)
        return look(claim)

    monkeypatch.setattr(twin.sync, "lookup", slow)

    async def scene() -> None:
        callers = [asyncio.create_task(twin.lookup(claim)) for _ in range(6)]
        await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        with pytest.raises(StoreUnavailable, match="slower than the calls come in"):
            await twin.lookup(claim)
        gate.set()
        while twin._threads._asked:  # type: ignore[attr-defined]  # an AsyncSQLiteStore
            await asyncio.to_thread(time.sleep, 0.001)
        assert (await twin.lookup(claim)).record is not None
        await twin.aclose()

    asyncio.run(scene())


def test_a_fork_waits_for_lookups_under_way(store: Store, claim: Claim) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            store.lookup(claim)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if store.lookup(claim).record is not None else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


CRASH = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("begin immediate")
connection.execute("update keys set status = 'inactive'")
print("in the middle", flush=True)
signal.pause()
"""


def test_a_crash_in_the_middle_of_a_change_leaves_the_store_whole(
    store: Store, claim: Claim, keys: Keys, path: Path
) -> None:
    writer = subprocess.Popen([sys.executable, "-c", CRASH, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    # A write lock held elsewhere keeps no lookup waiting (it would be 5 s).
    begin = time.monotonic()
    record = store.lookup(claim).record
    assert record is not None
    assert record.key.status == "active"
    assert time.monotonic() - begin < 4
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    again = store.lookup(claim).record
    assert again == record
    assert keys.disable_key(record.key.id).status == "inactive"


def test_a_lookup_is_one_statement_on_a_connection_that_cannot_write(
    store: SQLiteStore, claim: Claim
) -> None:
    connection = store._readers.take()
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    store._readers.give(connection)
    assert store.lookup(claim).record is not None
    assert len(statements) == 1
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("update keys set status = 'active'")


def test_amendment_08_changes_survive_a_power_cut_as_far_as_sqlite_can_tell(store: SQLiteStore) -> None:
    connection = store._writers.take()
    assert connection.execute("pragma synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    assert connection.execute("pragma foreign_keys").fetchone() == (1,)
    store._writers.give(connection)


@pytest.mark.parametrize("statement", ["delete from changes", "update changes set actor = 'nobody'"])
def test_the_journal_can_only_grow(store: Store, claim: Claim, path: Path, statement: str) -> None:
    before = store.journal()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        edit(path, statement)
    assert store.journal() == before


MEDDLED = {
    "pragma ignore_check_constraints = on; update keys set status = 'asleep'": "record of a key cannot be read",
    "delete from meta": "installation mark",
    "update keys set networks = 'nonsense'": "record of a key cannot be read",
    "update machines set grants = '[{}]'": "record of a machine cannot be read",
    "drop table digests": "cannot answer",
}


@pytest.mark.parametrize(("statement", "said"), MEDDLED.items())
def test_a_store_that_makes_no_sense_is_an_outage_not_an_unknown_key(
    store: Store, claim: Claim, path: Path, statement: str, said: str
) -> None:
    edit(path, statement)
    with pytest.raises(StoreUnavailable, match=said):
        store.lookup(claim)


def test_a_peppers_record_that_makes_no_sense_is_an_outage(store: Store, path: Path) -> None:
    """Any other error would end the watcher."""
    edit(path, "insert into peppers (id, proof, status) values ('a b', zeroblob(32), 'retired')")
    feed = store.feed()
    with pytest.raises(StoreUnavailable, match="peppers in the SQLite store cannot be read"):
        feed.read({})
    feed.close()


def test_a_file_that_is_away_is_an_outage_and_comes_back(store: Store, claim: Claim, path: Path) -> None:
    feed = store.feed()
    feed.read({})
    away = path.with_suffix(".away")
    path.rename(away)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.lookup(claim)
    with pytest.raises(StoreUnavailable):
        feed.read({})
    away.rename(path)
    assert store.lookup(claim).record is not None
    assert feed.read({}).news
    feed.close()


def test_amendment_08_another_file_in_its_place_is_noticed_at_once(
    store: Store, claim: Claim, path: Path
) -> None:
    feed = store.feed()
    known = {0: feed.read({}).news[0].epoch}
    other = path.with_name("other.db")
    open_store(f"sqlite:///{other}", create=True).close()
    put_in_place(other, path)
    assert store.lookup(claim).record is None
    reading = feed.read(known)
    assert reading.news[0].changes is None
    assert reading.installation == store.describe().installation
    feed.close()


def test_amendment_08_a_connection_in_use_while_the_file_is_replaced_is_never_used_again(
    store: SQLiteStore, claim: Claim, path: Path
) -> None:
    """It is on the old file still: given back, it would answer from there for ever."""
    other = path.with_name("other.db")
    open_store(f"sqlite:///{other}", create=True).close()
    under_way = store._readers.take()
    put_in_place(other, path)
    newer = store._readers.take()
    store._readers.give(newer)
    store._readers.give(under_way)
    assert store._readers._idle == [newer]
    assert store.lookup(claim).record is None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        under_way.execute("select 1")


def test_a_connection_given_back_after_the_end_is_closed(store: SQLiteStore) -> None:
    connection = store._readers.take()
    store.close()
    store._readers.give(connection)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("select 1")


def test_a_name_is_found_by_an_index(store: SQLiteStore, keys: Keys, path: Path) -> None:
    """A key is disabled by its name at night, among a million."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for table in ("keys", "machines"):
            statement = f"explain query plan select 1 from {table} where (id = 'x' or name = 'x')"
            plan = [row[3] for row in connection.execute(statement)]
            assert not [step for step in plan if step.startswith("SCAN")], plan


def test_a_restored_backup_is_another_history(store: Store, keys: Keys, claim: Claim, path: Path) -> None:
    backup = path.with_name("backup.db")
    edit(path, f"vacuum into '{backup}'")
    key = keys.keys()[0]
    keys.disable_key(key.id)
    feed = store.feed()
    known = {0: feed.read({}).news[0].epoch}
    copy = sqlite3.connect(backup)
    copy.execute("pragma journal_mode = wal")
    copy.close()
    put_in_place(backup, path)
    keys.rename_key(key.id, "Autre")  # as many changes as before, and another nonce
    assert feed.read(known).news[0].changes is None
    feed.close()


def test_the_file_is_its_owners_alone(store: Store, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_paths_with_odd_characters_are_files_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a b%20ç.db"
    from urllib.parse import quote

    store = open_store(f"sqlite:///{quote(str(path))}", create=True)
    assert store.describe().installation
    store.close()
    assert path.exists()


def test_an_app_that_changes_its_directory_keeps_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite:///keys.db", create=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.describe().installation
    store.close()


def wrong_schema(path: Path, version: int) -> None:
    open_store(f"sqlite:///{path}", create=True).close()
    edit(path, f"pragma user_version = {version}")


def other_program(path: Path, version: int) -> None:
    edit(path, "create table accounts (id)")


def not_wal(path: Path, version: int) -> None:
    open_store(f"sqlite:///{path}", create=True).close()
    edit(path, "pragma journal_mode = delete")


def no_database(path: Path, version: int) -> None:
    path.write_bytes(b"This is no database, and long enough to be seen as one." * 100)


@pytest.mark.parametrize(
    ("make", "version", "create", "said"),
    [
        (wrong_schema, 99, False, "made by a newer papaours-auth"),
        (wrong_schema, 0, False, "run 'papaours-auth init'"),
        (other_program, 0, True, "another program's"),
        (other_program, 0, False, "not 'wal'|run 'papaours-auth init'"),
        (not_wal, 0, False, "not 'wal'"),
        (no_database, 0, False, "cannot be opened"),
        (no_database, 0, True, "cannot be made"),
        (lambda path, version: path.mkdir(), 0, False, "is not a file"),
    ],
)
def test_what_is_no_store_of_ours_stops_at_start(
    path: Path, make: object, version: int, create: bool, said: str
) -> None:
    make(path, version)  # type: ignore[operator]  # each row is a callable
    with pytest.raises(ConfigurationError, match=said) as error:
        open_store(f"sqlite:///{path}", create=create)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "minted_only"), [("key.created", True), ("key.imported", False)])
def test_a_file_of_schema_1_that_is_migrated_tells_of_foreign_keys_by_its_journal(
    path: Path, kind: str, minted_only: bool
) -> None:
    first = Path(sqlite_module.__file__).with_name("sqlite_1.sql").read_text(encoding="utf-8")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma journal_mode = wal")
        for statement in first.split(";\n\n"):
            connection.execute(statement)
        connection.execute("insert into meta values (1, 'ours', 0)")
        for seq, told in ((1, "store.created"), (2, kind), (3, "key.disabled")):
            connection.execute(
                "insert into changes values (?, randomblob(16), 0, 'Alice', ?, 'key_1', '{}', '{}')",
                (seq, told),
            )
        connection.execute("pragma user_version = 1")
        connection.commit()
    with pytest.raises(ConfigurationError, match="run 'papaours-auth init'"):
        open_store(f"sqlite:///{path}")
    for _ in range(2):
        store = open_store(f"sqlite:///{path}", create=True)
        reading = store.feed().read({})
        assert (reading.installation, reading.news[0].epoch.seq) == ("ours", 3)
        assert list(reading.news[0].minted_only) == (list(range(PARTITIONS)) if minted_only else [])
        store.close()


def test_pitfall_54_a_process_of_schema_1_that_has_the_file_open_cannot_hide_the_foreign_key_it_adds(
    path: Path,
) -> None:
    """Else the verifiers of this version would refuse that key for ever."""
    store = open_store(f"sqlite:///{path}", create=True)
    assert list(store.feed().read({}).news[0].minted_only) == list(range(PARTITIONS))
    edit(
        path, "insert into changes values (2, randomblob(16), 0, 'Alice', 'key.created', 'key_1', '{}', '{}')"
    )
    assert list(store.feed().read({}).news[0].minted_only) == list(range(PARTITIONS))
    edit(
        path,
        "insert into changes values (3, randomblob(16), 0, 'Alice', 'key.imported', 'key_2', '{}', '{}')",
    )
    assert list(store.feed().read({}).news[0].minted_only) == []
    store.close()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be made"):
        open_store(f"sqlite:///{tmp_path}/nowhere/keys.db", create=True)


def test_a_watcher_elsewhere_hears_of_a_change_in_another_process(
    store: Store, keys: Keys, claim: Claim, path: Path
) -> None:
    other = open_store(f"sqlite:///{path}")
    feed = other.feed()
    known = {0: feed.read({}).news[0].epoch}
    heard = threading.Event()

    def wait() -> None:
        feed.wait(60)
        heard.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    key = keys.keys()[0]
    code = "import sys; from papaours_auth import Keys; Keys(sys.argv[1]).disable_key(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}", key.id], check=True)
    wait_until(heard.is_set, 10, what="the change to be heard")
    waiting.join()
    assert feed.read(known).news[0].changes == [("key.disabled", key.id)]
    feed.close()
    other.close()


def test_a_file_that_its_reader_may_not_read_stops_at_start(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read anything: the system's answer is put in."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigurationError, match="must be readable and writable"):
        open_store(f"sqlite:///{path}")


def test_a_folder_that_cannot_be_entered_stops_at_start(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(ConfigurationError, match=r"cannot be reached \(Permission denied\)"):
        open_store(f"sqlite:///{path}")


def test_a_change_that_breaks_off_leaves_nothing_behind(store: SQLiteStore, keys: Keys, path: Path) -> None:
    keys.create_machine("Service de facturation", organisation="cfa-lyon")
    edit(path, "create trigger broken before insert on changes begin select raise(rollback, 'broken');end")
    with pytest.raises(StoreUnavailable, match="broken"):
        keys.disable_machine("Service de facturation")
    assert store.machines()[0].status == "active"


def test_a_pepper_keeps_its_status_where_it_has_it_already(store: Store, keys: Keys) -> None:
    before = store.journal()
    store.set_pepper_status("p1", "primary", Author("test", datetime.now(UTC)))
    assert store.journal() == before


def test_a_feed_that_cannot_look_says_that_something_may_have_changed(
    store: Store, claim: Claim, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = store.feed()
    feed.read({})
    away = path.with_suffix(".away")
    path.rename(away)
    feed.wait(0.05)  # no error: the next reading says so
    away.rename(path)

    def broken(connection: sqlite3.Connection) -> bool:
        raise sqlite3.OperationalError

    monkeypatch.setattr(feed, "_look", broken)
    feed.wait(60)
    feed.close()
