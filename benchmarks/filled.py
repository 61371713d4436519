"""Stores with many keys in them: made by the store's own administration once, and multiplied by its database.

A million calls of `Keys.create_key` would take an hour. What the databases make has random digests and ids, as real
keys have; those that are presented are minted as real ones are. Each machine has `COMMON` keys.
"""

from __future__ import annotations

import itertools
import random
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import redis

from papaours_auth import KeyFormat, Keys, PepperRing, open_store, parse_peppers
from papaours_auth.digest import new_pepper
from papaours_auth.stores.records import KEY_COLUMNS, MACHINE_COLUMNS, key_row, machine_row
from papaours_auth.verify import PARTITIONS, partition
from support.redis_servers import NEWEST, redis_server
from support.sql_servers import SQLServer, mariadb, postgresql

PRESENTED: Final = 10_000
"""Keys that are presented: uniform among the digests, as all digests are uniform."""
COMMON: Final = 100
DIGEST_COLUMNS: Final = ("digest", "key_id", "pepper_id", "algorithm")
PATIENCE: Final = 30
"""Seconds a store is waited for: a server that was just filled, on a busy machine, is slow to answer."""
_BATCH: Final = 10_000


class Filled(NamedTuple):
    """A store with so many keys, of which some can be presented. ``bytes_each`` is what a key takes in it."""

    url: str
    peppers: PepperRing
    keys: list[bytes]
    bytes_each: float
    port: int = 0
    """The server's, by which ``url`` may be led through a proxy."""


class Model(NamedTuple):
    """What is multiplied: the columns of a machine and a key, and what is minted under its peppers."""

    machine: dict[str, Any]  # Any: cells, whatever the column holds
    key: dict[str, Any]
    peppers: PepperRing
    presented: list[bytes]

    def digests(self) -> Iterator[tuple[bytes, str]]:
        """Give the digest of each presented key, and the id it is to have."""
        for number, key in enumerate(self.presented):
            yield self.peppers.primary.digest(key), f"{number:032x}"


def modelled(url: str, size: int) -> Model:
    """Make one machine and one key in a store, and mint what is to be presented."""
    peppers = parse_peppers(new_pepper())
    store = open_store(url, create=True)
    with Keys(store, peppers=peppers) as keys:
        machine = keys.create_machine(
            "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
        )
        new = keys.create_key(machine.id, name="Production - Service Facturation", environment="prod")
    minted = [
        KeyFormat().mint("prod", tag=peppers.primary.tag).reveal().encode()
        for _ in range(min(size, PRESENTED))
    ]
    made = Model(
        dict(zip(MACHINE_COLUMNS, machine_row(machine), strict=True)),
        dict(zip(KEY_COLUMNS, key_row(new.key), strict=True)),
        peppers,
        minted,
    )
    store.close()
    return made


# SQLite


def sqlite(stack: ExitStack, sizes: Sequence[int]) -> dict[int, Filled]:
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="papaours-")))
    return {size: _sqlite_file(folder / f"{size}.db", size) for size in sizes}


def _sqlite_file(path: Path, size: int) -> Filled:
    url = f"sqlite:///{path}"
    model = modelled(url, size)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in _sqlite_statements(model, size - len(model.presented)):
        connection.execute(statement)
    connection.execute("begin")
    _insert_presented(lambda sql, rows: connection.executemany(sql, rows), model, "?")
    connection.execute("commit")
    for statement in (
        "create index keys_by_name on keys (name)",
        "create index keys_of_machine on keys (machine_id)",
        "create index digests_of_key on digests (key_id)",
    ):
        connection.execute(statement)
    connection.close()
    connection = sqlite3.connect(
        path
    )  # anew: SQLite does not change the journal of one with temporary tables
    connection.execute("pragma journal_mode = wal")
    connection.close()
    return Filled(url, model.peppers, model.presented, path.stat().st_size / size)


def _sqlite_statements(model: Model, count: int) -> Iterator[str]:
    """Fill sorted, without a journal, and with the indexes made at the end: minutes become seconds."""
    yield from ("pragma journal_mode = off", "pragma synchronous = off", "pragma cache_size = -500000")
    yield from ("drop index keys_by_name", "drop index keys_of_machine", "drop index digests_of_key", "begin")
    yield "create temp table numbers as " + _numbers(count)
    yield f"create temp table owners as {_numbers(count // COMMON + 1)}"
    yield "alter table owners add column id"
    yield "update owners set id = lower(hex(randomblob(16)))"
    yield _copied("machines", model.machine, {"id": "id"}, "owners order by id")
    owner = f"(select id from owners where owners.rowid = 1 + numbers.n % {count // COMMON + 1})"
    ids = {"id": "lower(hex(randomblob(16)))", "machine_id": owner}
    yield _copied("keys", model.key, ids, "numbers order by 1")
    digest = {"digest": "randomblob(32)", "key_id": "id", "pepper_id": f"'{model.peppers.primary.id}'"}
    yield _copied(
        "digests",
        {**digest, "algorithm": "hmac-sha256"},
        digest,
        f"keys where id <> '{model.key['id']}' order by 1",
    )
    yield "commit"


def _numbers(count: int) -> str:
    counted = f"counted(n) as (select 1 union all select n + 1 from counted where n < {count})"
    return f"with recursive {counted} select n from counted where n <= {count}"


def _copied(
    table: str, cells: Mapping[str, Any], made: Mapping[str, str], source: str, quote: str = '"'
) -> str:
    """Write the insertion of a row's copies; ``made`` are expressions in place of its cells."""
    values = ", ".join(made.get(name) or _literal(cell) for name, cell in cells.items())
    return f"insert into {table} ({_listed(cells, quote)}) select {values} from {source}"


def _listed(names: Iterable[str], quote: str = '"') -> str:
    return ", ".join(quote + name + quote for name in names)


def _literal(cell: Any) -> str:
    if cell is None:
        return "null"
    return str(cell) if isinstance(cell, int) else "'" + cell.replace("'", "''") + "'"


def _insert_presented(
    insert: Callable[[str, list[tuple[Any, ...]]], object],
    model: Model,
    mark: str,
    *,
    prefix: str = "",
    quote: str = '"',
) -> None:
    pairs = list(model.digests())
    keys = [tuple({**model.key, "id": id_}.values()) for _, id_ in pairs]
    digests = [(digest, id_, model.peppers.primary.id, "hmac-sha256") for digest, id_ in pairs]
    for table, columns, rows in (("keys", KEY_COLUMNS, keys), ("digests", DIGEST_COLUMNS, digests)):
        marks = ", ".join([mark] * len(columns))
        insert(f"insert into {prefix}{table} ({_listed(columns, quote)}) values ({marks})", rows)


# PostgreSQL and MariaDB


class _SQL(NamedTuple):
    """How a database counts from 1 to {count}, makes an id or a digest from a number, and quotes a name."""

    numbers: str
    number: str
    id: str  # of {kind} and number {n}
    digest: str
    quote: str
    sizes: str  # bytes of all tables of {database}
    begin: tuple[str, ...]
    finish: str


_POSTGRESQL: Final = _SQL(
    "generate_series(1, {count}) as n",
    "n",
    "md5('{kind}' || {n})",
    "sha256(('d' || n)::bytea)",
    '"',
    "select pg_database_size('{database}')",
    ("set session_replication_role = replica",),  # no foreign key is looked up
    "vacuum analyze",
)
_MARIADB: Final = _SQL(
    "seq_1_to_{count}",
    "seq",
    "md5(concat('{kind}', {n}))",
    "unhex(sha2(concat('d', seq), 256))",
    "`",
    "select sum(data_length + index_length) from information_schema.tables where table_schema = '{database}'",
    ("set foreign_key_checks = 0", "set unique_checks = 0"),
    "analyze table papaours_keys, papaours_digests, papaours_machines",
)


def postgresql_databases(stack: ExitStack, sizes: Sequence[int]) -> dict[int, Filled]:
    server = stack.enter_context(postgresql())
    return {size: _sql_database(server, _POSTGRESQL, size) for size in sizes}


def mariadb_databases(stack: ExitStack, sizes: Sequence[int]) -> dict[int, Filled]:
    server = stack.enter_context(mariadb())
    return {size: _sql_database(server, _MARIADB, size) for size in sizes}


def _sql_database(server: SQLServer, words: _SQL, size: int) -> Filled:
    name = server.database()
    url = f"{server.url(name)}?timeout={PATIENCE}"
    model = modelled(url, size)
    (empty,) = server.execute(words.sizes.format(database=name))[0]
    if size > len(model.presented):
        server.execute(*_sql_statements(model, words, size - len(model.presented)), database=name)
    _insert_presented(
        lambda sql, rows: _many(server, name, sql, rows),
        model,
        "%s",
        prefix="papaours_",
        quote=words.quote,
    )
    server.execute(words.finish, database=name)
    (full,) = server.execute(words.sizes.format(database=name))[0]
    taken = float(str(full)) - float(str(empty))
    return Filled(url, model.peppers, model.presented, taken / size, server.port)


def _sql_statements(model: Model, words: _SQL, count: int) -> Iterator[str]:
    owners = max(1, count // COMMON)
    id_, owner = (words.id.format(kind=kind, n=words.number) for kind in "km")
    some = words.id.format(kind="m", n=f"(1 + mod({words.number}, {owners}))")
    pepper = f"'{model.peppers.primary.id}'"
    digest = {"digest": words.digest, "key_id": id_, "pepper_id": pepper, "algorithm": "'hmac-sha256'"}
    every, quote = words.numbers.format(count=count), words.quote
    machines = words.numbers.format(count=owners)
    yield from words.begin
    # Sorted: a tree that grows at its end is made in a tenth of the time.
    yield _copied("papaours_machines", model.machine, {"id": owner}, f"{machines} order by 1", quote)
    yield _copied("papaours_keys", model.key, {"id": id_, "machine_id": some}, f"{every} order by 1", quote)
    yield _copied("papaours_digests", digest, digest, f"{every} order by 1", quote)


def _many(server: SQLServer, database: str, sql: str, rows: list[tuple[Any, ...]]) -> None:
    from sqlalchemy import create_engine

    engine = create_engine(server.admin(database))
    with engine.begin() as connection:
        connection.exec_driver_sql(sql, rows)
    engine.dispose()


# Redis


def redis_prefixes(stack: ExitStack, sizes: Sequence[int]) -> dict[int, Filled]:
    """Fill one server, a prefix for each size."""
    if NEWEST is None:
        raise RuntimeError("no Redis server here")
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="papaours-")))
    server = stack.enter_context(redis_server(NEWEST, folder))
    with redis.Redis(port=server.port) as client:
        return {size: _redis_prefix(client, server.port, size) for size in sizes}


def _redis_prefix(client: redis.Redis, port: int, size: int) -> Filled:
    prefix = f"k{size}"
    url = f"redis://127.0.0.1:{port}/?prefix={prefix}&timeout={PATIENCE}"
    before = _used(client)
    model = modelled(url, size)
    pairs = [
        (digest, id_, partition(key))
        for (digest, id_), key in zip(model.digests(), model.presented, strict=True)
    ]
    random_ = (
        (secrets.token_bytes(32), secrets.token_hex(16), random.randrange(PARTITIONS))
        for _ in range(size - len(pairs))
    )
    template = _redis_template(client, prefix, model)
    every = itertools.chain(pairs, random_)
    while batch := list(itertools.islice(every, _BATCH)):
        template.write(client, batch)
    return Filled(url, model.peppers, model.presented, (_used(client) - before) / size, port)


class _RedisTemplate(NamedTuple):
    """The records of one key in Redis, to be written again under other ids."""

    prefix: str
    id: bytes
    owner: bytes
    key: bytes
    of: bytes
    named: bytes

    def write(
        self, client: Any, batch: list[tuple[bytes, str, int]]
    ) -> None:  # Any: redis-py's, without types
        pipeline = client.pipeline(transaction=False)
        for place in {place for _, _, place in batch}:
            start = f"{{{self.prefix}:{place:02}}}:".encode()
            pairs = [(digest, id_.encode()) for digest, id_, at in batch if at == place]
            ids = [id_ for _, id_ in pairs]
            owners = [word for digest, id_ in pairs for word in (digest, self.owner.replace(self.id, id_))]
            pipeline.execute_command("HSET", start + b"digests", *owners)
            back = [word for digest, id_ in pairs for word in (id_, digest)]
            pipeline.execute_command("HSET", start + b"digest-of", *back)
            records = [word for id_ in ids for word in (id_, self.key.replace(self.id, id_))]
            pipeline.execute_command("HSET", start + b"keys", *records)
            pipeline.execute_command("SADD", start + self.named, *ids)
            pipeline.execute_command("SADD", start + self.of, *ids)
        pipeline.execute()


def _redis_template(client: Any, prefix: str, model: Model) -> _RedisTemplate:
    id_ = model.key["id"].encode()
    for place in range(PARTITIONS):
        start = f"{{{prefix}:{place:02}}}:"
        key = client.hget(start + "keys", id_)
        if key is not None:
            owner = client.hget(start + "digests", client.hget(start + "digest-of", id_))
            of, named = f"of:{model.key['machine_id']}", f"named:{model.key['name']}"
            return _RedisTemplate(prefix, id_, owner, key, of.encode(), named.encode())
    raise RuntimeError("the key that was made is in no partition: the layout is another one now")


def _used(client: Any) -> int:
    return int(client.info("memory")["used_memory"])
