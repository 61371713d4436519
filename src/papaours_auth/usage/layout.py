"""The tables of usage in an SQLite file, version 2, and how a file of version 1 becomes one.

Version 1 had no table that says so. What it wrote stays; the counts by route and address are made of its events.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Final

from ..exceptions import ConfigurationError
from .rollup import MOST_DISTINCT, STEPS

VERSION: Final = 2
IDENTITY: Final = {
    "usage_events": "id",
    "usage_series": "key_id, step, start, status",
    "usage_routes": "key_id, step, start, route",
    "usage_addresses": "key_id, step, start, address",
    "usage_refusals": "minute, reason, network",
    "usage_batches": "producer",
}
"""What tells a row of each table from the others."""

# The order of the columns is version 1's: a process that still runs it writes by place, and goes on.
# Of the indexes of events there is one for each filter, in the order of time: a page is read from where it begins,
# and never sorted.
_TABLES: Final = """
create table if not exists usage_schema(version integer not null) strict;
create table if not exists usage_batches(producer text primary key, sequence integer not null, at integer not null)
  strict, without rowid;
create table if not exists usage_events(id integer primary key, event_id text not null, time integer not null,
  key_id text not null, machine_id text not null, address text not null, method text not null, route text not null,
  status integer not null, reason text not null, outcome text not null, service text not null,
  environment text not null, duration integer not null, request_id text not null) strict;
create index if not exists usage_events_time on usage_events(time);
create index if not exists usage_events_key on usage_events(key_id, time);
create index if not exists usage_events_address on usage_events(address, time);
create index if not exists usage_events_route on usage_events(route, time);
create index if not exists usage_events_status on usage_events(status, time);
create table if not exists usage_series(step text not null, start integer not null, key_id text not null,
  status integer not null, calls integer not null, primary key(key_id, step, start, status)) strict, without rowid;
create index if not exists usage_series_start on usage_series(step, start);
create table if not exists usage_routes(key_id text not null, step text not null, start integer not null,
  route text not null, calls integer not null, last integer not null, primary key(key_id, step, start, route))
  strict, without rowid;
create index if not exists usage_routes_start on usage_routes(step, start);
create table if not exists usage_addresses(key_id text not null, step text not null, start integer not null,
  address text not null, calls integer not null, last integer not null, primary key(key_id, step, start, address))
  strict, without rowid;
create index if not exists usage_addresses_start on usage_addresses(step, start);
create table if not exists usage_keys(key_id text primary key, machine_id text not null, first integer not null,
  last integer not null, calls integer not null) strict, without rowid;
create table if not exists usage_refusals(minute integer not null, reason text not null, network text not null,
  count integer not null, primary key(minute, reason, network)) strict, without rowid
"""
_COUNTED: Final = """
insert into usage_{table} select key_id, '{step}', time / {width} * {width}, {column}, count(*), max(time)
  from usage_events group by 1, 3, 4
"""
_MOVED: Final = ";".join(
    [
        "insert into usage_series select step, start, key_id, status, calls from usage_series_1",
        "drop table usage_series_1",
        *(
            _COUNTED.format(table=table, column=column, step=step, width=STEPS[step])
            for table, column in (("routes", "route"), ("addresses", "address"))
            for step in MOST_DISTINCT
        ),
    ]
)


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables or bring them up to date, safely with others doing the same.

    Raises `ConfigurationError` where a newer papaours-auth made them.
    """
    with transaction(connection):
        found = version_of(connection)
        if found > VERSION:
            raise newer()
        if found == 1:
            connection.execute("alter table usage_series rename to usage_series_1")
        _run(connection, _TABLES)
        if found == 1:
            _run(connection, _MOVED)
        if found != VERSION:
            connection.execute("insert into usage_schema values (?)", (VERSION,))


def _run(connection: sqlite3.Connection, script: str) -> None:
    for statement in script.split(";"):  # `executescript` would commit first
        connection.execute(statement)


def version_of(connection: sqlite3.Connection) -> int:
    """Tell which version's tables a file has; 0 where it has none."""
    tables = {
        name
        for (name,) in connection.execute(
            "select name from sqlite_schema where type = 'table' and name in ('usage_schema', 'usage_events')"
        )
    }
    if "usage_schema" in tables:
        found: int | None = connection.execute("select max(version) from usage_schema").fetchone()[0]
        return found or 0
    return int("usage_events" in tables)


def newer() -> ConfigurationError:
    """Say that a file is ahead of us."""
    return ConfigurationError("a newer papaours-auth made these usage tables: upgrade this one")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the one write transaction: all of it happens, or nothing."""
    connection.execute("begin immediate")
    try:
        yield
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")
