"""The change feed of the Redis store."""

from __future__ import annotations

import logging
import math
import os
import select
from collections.abc import Mapping
from contextlib import suppress
from socket import socket
from typing import Final

from .._fork import hold_across_fork, notice_fork
from .._locks import WaitingLock
from ..exceptions import StoreUnavailable
from . import (
    Epoch,
    Reading,
)
from .redis_place import Node, Place
from .redis_questions import Questions
from .redis_router import refused
from .redis_wire import Link, Wire, connect, hear

logger = logging.getLogger("papaours_auth")

_RECONNECT: Final = 0.05  # seconds a watcher pauses after a lost subscription


class RedisFeed:
    """Reads the tips; subscribes only so that `wait` may end early. A lost subscription costs speed, not truth.

    It subscribes before it reads: what changes after the reading is then announced.
    """

    def __init__(self, place: Place, questions: Questions) -> None:
        self._place = place
        self._ask = questions
        self._wire = Wire(place, questions.router)
        self._refused = False
        self._reset()
        hold_across_fork(self)

    def _reset(self) -> None:
        self._lock = WaitingLock()
        self._listener: tuple[Node, Link] | None = None
        self._wakes, self._waker = os.pipe()
        for end in (self._wakes, self._waker):
            os.set_blocking(end, False)

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        """See `Feed.read`."""
        notice_fork()
        try:
            self._subscribe()
            reading = self._wire.drive(self._ask.read(known))
        except StoreUnavailable:
            self._ask.router.forget()
            raise
        self._follow()
        return reading

    def _subscribe(self) -> None:
        with self._lock:
            if self._listener is not None or self._refused:
                return
            nodes = self._wire.drive(self._ask.router.nodes())
            for node in dict.fromkeys(nodes.values()):  # on Cluster any node announces for all
                with suppress(StoreUnavailable):
                    self._listener = self._listening(node)
                    return

    def _listening(self, node: Node) -> tuple[Node, Link] | None:
        link = connect(self._place, node, self._place.timeout)
        try:
            (reply,) = self._wire.once(link, node, ("SUBSCRIBE", self._ask.layout.channel))
        except StoreUnavailable:
            link.disconnect()
            raise
        if isinstance(reply, list):
            return node, link
        link.disconnect()
        self._refused = True  # by the ACL: it will not change its mind
        logger.warning(
            "the Redis store announces no changes to this app, so it finds them by asking: %s", refused(reply)
        )
        return None

    def _follow(self) -> None:
        """Hang up on a node that is no longer one of the store's: it will announce nothing."""
        with self._lock:
            if self._listener is not None and not self._ask.router.knows(self._listener[0]):
                self._hang_up()

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        listener = self._listener
        if listener is None:
            self._rest(timeout)
            return
        heard = listener[1]._sock  # noqa: SLF001 - redis-py cannot wait for two things at once
        if heard is not None and not self._hears(listener) and not self._rest(timeout, heard):
            self._hears(listener)

    def _rest(self, timeout: float, *sockets: socket) -> bool:
        """Wait for a wake-up, or for something to come in. Tells whether it was a wake-up."""
        poll = select.poll()
        for source in (self._wakes, *[each.fileno() for each in sockets]):
            poll.register(source, select.POLLIN)
        woken = self._wakes in [source for source, _ in poll.poll(math.ceil(timeout * 1000))]
        if woken:
            with suppress(BlockingIOError):  # another thread has taken it
                os.read(self._wakes, 4096)
        return woken

    def _hears(self, listener: tuple[Node, Link]) -> bool:
        """Take in announcements. A lost subscription is news too, after a short pause."""
        heard = hear(listener[1])
        if heard is not None:
            return heard
        with self._lock:
            self._hang_up()
        self._rest(_RECONNECT)
        return True

    def _hang_up(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener[1].disconnect()

    def wake(self) -> None:
        """See `Feed.wake`."""
        with suppress(BlockingIOError):  # so full that it will be noticed
            os.write(self._waker, b"!")

    def close(self) -> None:
        """See `Feed.close`."""
        self.wake()
        with self._lock:
            self._hang_up()
        self._wire.discard()

    def __del__(self) -> None:
        self._hang_up()
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._wakes)
        os.close(self._waker)

    def before_fork(self) -> None:
        """Keep other threads from being in the middle of a subscription."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; a child without its parent's subscription."""
        if not child:
            self._lock.release()
            return
        self._hang_up()
        self._close_pipe()
        self._reset()
