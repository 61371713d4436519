"""psycopg connections that never wait longer than they may, whatever the server does.

A server that was stopped or cut off answers nothing, and libpq waits for ever: ``statement_timeout`` is the
server's, keepalives are answered by a stopped server's kernel, and ``connect_timeout`` is 2 s at least. So the
deadline is kept here, around each exchange with the server; a connection that missed one is closed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg.waiting import wait_async

if TYPE_CHECKING:
    from psycopg.abc import PQGen

_T = TypeVar("_T")
LOOK_IN: Final = 0.1
"""Seconds after which an exchange is resumed although nothing came: psycopg's own."""


class Late(psycopg.OperationalError):
    """The server did not answer in time."""


def _until(
    exchange: Generator[Any, Any, _T], seconds: float, pgconn: psycopg.pq.abc.PGconn
) -> Generator[Any, Any, _T]:
    """Pass an exchange through until its time is up. psycopg looks in every 0.1 s while nothing comes.

    The looks are counted and not the time: a stalled event loop is no fault of the server's.
    """
    looks = math.ceil(seconds / LOOK_IN)
    try:
        state = next(exchange)
        while True:
            ready = yield state
            looks -= not ready
            if not ready and looks <= 0:
                pgconn.finish()  # half-way through an answer it is of no more use
                raise Late("no answer in time")
            state = exchange.send(ready)
    except StopIteration as stop:
        result: _T = stop.value
        return result


class BoundedConnection(psycopg.Connection[Any]):
    """A blocking connection. ``bound`` is how long it waits for one answer, in seconds."""

    bound = 1.0

    def wait(self, gen: PQGen[_T], *args: Any, **options: Any) -> _T:
        """See psycopg: run one exchange with the server."""
        return super().wait(_until(gen, self.bound, self.pgconn), *args, **options)


class AsyncBoundedConnection(psycopg.AsyncConnection[Any]):
    """The same for event loops. A cancelled exchange closes its connection.

    psycopg would ask the server to cancel too, over a connection more, and wait up to 5 s for it to say so: longer
    than any caller may wait.
    """

    bound = 1.0

    async def wait(self, gen: PQGen[_T], *args: Any, **options: Any) -> _T:
        """See psycopg: run one exchange with the server."""
        exchange = _until(gen, self.bound, self.pgconn)
        try:
            return await wait_async(exchange, self.pgconn.socket, *args, **{"interval": LOOK_IN, **options})
        except asyncio.CancelledError:
            self.pgconn.finish()  # half-way through an answer it is of no more use
            raise
