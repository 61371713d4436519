"""Eight deliberate bugs, for the test that the simulation can fail. They exist here alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from papaours_auth import Identity, StoreUnavailable
from papaours_auth.stores import Author, Epoch, Feed, Reading
from papaours_auth.verify import Standing

from .scenario import App, Bug, Scene
from .server import SimulatedFeed


class NoEpochOnFill(Bug):
    """An answer from before a change is put back after it (pitfall 15)."""

    invariant = "a"

    def arrange(self, scene: Scene) -> None:
        """Keys are changed while they are looked up, answers are slow and announcements are not, and keys live."""
        scene.spite, scene.rest, scene.lifetime, scene.mortality = 0.4, 2.5, 300.0, 0.1
        weather = scene.weather
        weather.loss, weather.slow, weather.deaf, weather.patience = 0.0, 0.3, 0.0, 4.0

    def install(self, app: App) -> None:
        cache, fill = app.cache, app.cache.fill

        def unstamped(
            digest: bytes,
            standing: Standing,
            epochs: Mapping[int, Epoch],
            **times: Any,
        ) -> Any:
            known = cache.epochs
            return fill(
                digest,
                standing,
                {part: known.get(part, epoch) for part, epoch in epochs.items()},
                **times,
            )

        app.cache.fill = unstamped  # type: ignore[method-assign]  # the bug


class CacheIgnoresExpiry(Bug):
    """An entry outlives its key (pitfall 16)."""

    invariant = "a"

    def install(self, app: App) -> None:
        fill = app.cache.fill

        def endless(digest: bytes, standing: Standing, *rest: Any, **times: Any) -> Any:
            return fill(digest, standing._replace(expires_at=None), *rest, **times)

        app.cache.fill = endless  # type: ignore[method-assign]  # the bug


class _Adopting:
    """Takes the tip it finds after an interruption for the one it left (pitfall 18)."""

    def __init__(self, feed: SimulatedFeed) -> None:
        self._feed = feed
        self._broken = False
        self.process = feed.process
        self.wait, self.wake, self.close = feed.wait, feed.wake, feed.close

    def read(self, known: Mapping[int, Epoch]) -> Reading:
        try:
            reading = self._feed.read(known)
        except StoreUnavailable:
            self._broken = True
            raise
        if self._broken and known:
            news = {part: news._replace(changes=()) for part, news in reading.news.items()}
            reading = reading._replace(news=news)
        self._broken = False
        return reading


class WatcherIgnoresReconnect(Bug):
    """What changed while the connection was down is never applied."""

    invariant = "a"

    def feed(self, feed: SimulatedFeed) -> Feed:
        return _Adopting(feed)


class UsageWritesStatus(Bug):
    """Each use writes the key back as it was in the cache (pitfall 14: keyshield)."""

    invariant = "d"

    def accepted(self, app: App, identity: Identity) -> None:
        def write(_: object) -> None:
            author = Author("usage", identity_time)
            if identity.key.id in server.store._keys:
                server.store.update_key(identity.key.id, {"status": "active"}, "key.used", author)

        server, identity_time = app.scene.server, app.scene.keys._now()
        app.network.call("usage", [write], lambda answer: None)


class NoFlightBound(Bug):
    """Lookups pile up without end while the store is slow (pitfall 21)."""

    invariant = "e"

    def install(self, app: App) -> None:
        app.authenticator._check_room = lambda claim: None  # type: ignore[method-assign]  # the bug


class TrustWithoutHeartbeat(Bug):
    """No news is taken for good news."""

    invariant = "a"

    def install(self, app: App) -> None:
        cache, apply = app.cache, app.cache.apply

        def believing(reading: Reading, *, sent: float) -> None:
            apply(reading, sent=sent)
            cache._trust = dict.fromkeys(cache._trust, float("inf"))
            cache.trusted_until = float("inf")

        app.cache.apply = believing  # type: ignore[method-assign]  # the bug


class MarkIsNeverTakenBack(Bug):
    """A foreign key that was added after a reading told of none stays unknown."""

    invariant = "c"

    def install(self, app: App) -> None:
        cache = app.cache

        def keeping(partition: int, told: Collection[int]) -> None:
            cache._minted_only.update(dict.fromkeys(told, partition))

        app.cache._tell_minted_only = keeping  # type: ignore[method-assign]  # the bug


class MarkIsNotBelieved(Bug):
    """Foreign keys are looked up whatever the store says: anybody can make work for it."""

    invariant = "h"

    def install(self, app: App) -> None:
        app.cache.minted_only = lambda partition, now: False  # type: ignore[method-assign]  # the bug


ALL: Final[dict[str, type[Bug]]] = {
    bug.__name__: bug
    for bug in (
        NoEpochOnFill,
        CacheIgnoresExpiry,
        WatcherIgnoresReconnect,
        UsageWritesStatus,
        NoFlightBound,
        TrustWithoutHeartbeat,
        MarkIsNeverTakenBack,
        MarkIsNotBelieved,
    )
}
