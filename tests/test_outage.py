"""While the store cannot answer: the breaker, what is served meanwhile, and what an operator sees."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from papaours_auth import (
    Authenticator,
    ConfigurationError,
    Identity,
    Keys,
    PepperRing,
    Reason,
    Refused,
    StoreUnavailable,
)
from papaours_auth.exceptions import UnreadableRecord
from papaours_auth.outage import FIRST_RETRY, FIRST_RETRY_WATCHED, LAST_RETRY, LAST_RETRY_WATCHED, Breaker
from papaours_auth.stores import Author, Description, Found, PepperRecord, Reading
from papaours_auth.verify import Claim
from support.doors import Door, Gate, Later, Spy, open_door
from support.servers import wait_until

if TYPE_CHECKING:
    from conftest import ManualClock

SEED = "pk_prod_abc123def456ghi789"
STRANGER = "pk_prod_0123456789abcdef"


@pytest.fixture
def seed(admin: Keys) -> str:
    """The id of the seed's key, which the store then has."""
    owner = admin.create_machine("Service", organisation="cfa-lyon", rights=["contrats:lecture"])
    return admin.import_key(owner.id, SEED, name="Production - Service").id


def unavailable(*_: object) -> Any:
    raise StoreUnavailable("no route to host")


def up(ask: Callable[[], Any]) -> Any:
    return ask()


# the breaker


def test_a_dead_store_is_asked_once_and_then_now_and_then(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock
) -> None:
    door = opens()
    spy.on_lookup = unavailable
    for _ in range(100):
        assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    assert spy.lookups == 1
    for tries, wait in ((2, 0.05), (3, 0.1), (4, 0.2), (5, 0.4), (6, LAST_RETRY), (7, LAST_RETRY)):
        clock.advance(wait * 0.99)
        assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
        assert spy.lookups == tries - 1
        clock.advance(wait * 0.02)
        assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
        assert spy.lookups == tries
    spy.on_lookup = up
    clock.advance(LAST_RETRY)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    assert door.authenticator.health().outages == 1


def test_the_watchers_reading_ends_an_outage_before_any_call_has_to_try(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock
) -> None:
    door = opens()
    spy.on_lookup = unavailable
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    assert not door.authenticator.health().ok
    spy.on_lookup = up
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    door.refresh()
    assert door.authenticator.health().ok
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY


def test_beside_a_watcher_calls_try_less_often(clock: ManualClock) -> None:
    """Each try may cost a call a whole timeout."""
    for watched, longest in ((bool, LAST_RETRY), (lambda: True, LAST_RETRY_WATCHED)):  # bool() is False
        breaker = Breaker(clock.monotonic, watched=watched)
        for _ in range(20):
            breaker.check()
            breaker.failed(StoreUnavailable("gone"))
            clock.advance(longest)
        breaker.check()
        breaker.failed(StoreUnavailable("gone"))
        clock.advance(longest * 0.99)
        with pytest.raises(StoreUnavailable, match="gone"):
            breaker.check()
        clock.advance(longest * 0.02)
        breaker.check()
        with pytest.raises(StoreUnavailable):
            breaker.check()  # one call at a time


def test_the_many_calls_that_one_outage_ends_count_once(clock: ManualClock) -> None:
    """Else a store that is gone for a moment is not tried again for seconds."""
    breaker = Breaker(clock.monotonic, watched=lambda: True)
    for _ in range(100):
        breaker.check()
    for _ in range(100):
        breaker.failed(StoreUnavailable("gone"))
    assert breaker.outages == 1
    clock.advance(FIRST_RETRY_WATCHED)
    breaker.check()


def test_pitfall_21_a_store_whose_first_reading_is_slow_holds_up_one_caller_at_most(
    spy: Spy, ring: PepperRing, seed: str
) -> None:
    gate = Gate()
    reads: list[object] = []

    def slow(ask: Callable[[], Reading]) -> Reading:
        reads.append(ask)
        gate.hold()
        raise StoreUnavailable("timed out")

    spy.on_read = slow
    authenticator = Authenticator(spy.store, environment="prod", peppers=ring, timeout=30.0)

    def knock(key: str) -> Reason:
        with pytest.raises(Refused) as refusal:
            authenticator.authenticate(key)
        return refusal.value.reason

    first = Later(lambda: knock(STRANGER))
    assert gate.reached.acquire(timeout=30)
    wait_until(lambda: authenticator._checked, 10, what="the store to be checked")
    others = [Later(partial(knock, f"{STRANGER}{number}")) for number in range(20)]
    assert {caller.answer() for caller in others} == {Reason.UNKNOWN_KEY}
    assert len(reads) == 1
    gate.open()
    assert first.answer() is Reason.STORE_UNAVAILABLE
    spy.on_read = up
    authenticator.close()


def test_a_try_that_never_ends_does_not_keep_others_from_trying(clock: ManualClock) -> None:
    breaker = Breaker(clock.monotonic, watched=lambda: False)
    breaker.failed(StoreUnavailable("gone"))
    clock.advance(FIRST_RETRY)
    breaker.check()  # whoever this is hangs
    clock.advance(LAST_RETRY)
    breaker.check()


def test_one_record_that_makes_no_sense_is_no_outage_for_the_others(
    opens: Callable[..., Door], spy: Spy, seed: str
) -> None:
    door = opens()

    def unreadable(ask: Callable[[], Found]) -> Found:
        raise UnreadableRecord("the store's record of a key cannot be read")

    spy.on_lookup = unreadable
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    spy.on_lookup = up
    assert isinstance(door.knock(SEED), Identity)


def test_an_app_without_the_primary_pepper_still_lets_known_keys_in(
    opens: Callable[..., Door], spy: Spy, seed: str
) -> None:
    """Unknown keys meet 503 there, and must not open the breaker for the others."""
    door = opens()
    author = Author("test", datetime.now(UTC))
    spy.real.add_pepper(PepperRecord("p2", b"2" * 32, "accept"), author)
    spy.real.set_pepper_status("p2", "primary", author)
    door.refresh()
    assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
    assert isinstance(door.knock(SEED), Identity)


def test_amendment_03_a_store_that_keeps_answering_from_its_past_is_an_outage(
    opens: Callable[..., Door], spy: Spy, admin: Keys, seed: str
) -> None:
    """A replica, say: each answer is older than what the watcher has applied."""
    door = opens()
    past: list[Found] = []

    def remembers(ask: Callable[[], Found]) -> Found:
        past.append(ask())
        return past[0]

    spy.on_lookup = remembers
    assert isinstance(door.knock(SEED), Identity)
    admin.disable_key(seed)
    door.refresh()
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert len(past) == 9  # the first, and eight tries


def test_an_outage_is_logged_when_it_begins_and_when_it_ends_and_not_for_each_call(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    door = opens()
    spy.on_lookup = unavailable
    with caplog.at_level(logging.DEBUG, "papaours_auth"):
        for _ in range(50):
            door.knock(STRANGER)
            clock.advance(FIRST_RETRY)
        spy.on_lookup = up
        clock.advance(LAST_RETRY)
        door.knock(STRANGER)
    assert [record.getMessage() for record in caplog.records] == [
        "the key store cannot be asked, so uncached calls meet 503: no route to host",
        "the key store answers again",
    ]


def test_a_second_outage_is_tried_and_logged_as_soon_as_the_first(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    door = opens()
    tries: list[None] = []

    def fails(_: object) -> Any:
        tries.append(None)
        raise StoreUnavailable("no route to host")

    for outage in (1, 2, 3):
        caplog.clear()
        tries.clear()
        with caplog.at_level(logging.WARNING, "papaours_auth"):
            spy.on_lookup = spy.on_describe = fails
            for pause in (0, FIRST_RETRY, *[LAST_RETRY] * 4):  # the last of them are rare
                clock.advance(pause)
                assert door.knock(STRANGER) is Reason.STORE_UNAVAILABLE
                if pause == FIRST_RETRY:
                    assert len(tries) == 2
            spy.on_lookup = spy.on_describe = up
            door.refresh()
            assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
        assert [record.getMessage() for record in caplog.records] == [
            "the key store cannot be asked, so uncached calls meet 503: no route to host",
            "the key store answers again",
        ]
        assert door.authenticator.health().outages == outage
        clock.advance(1)
        door.authenticator._cache.unknown.clear()  # so that the next outage is noticed by the same key


def test_with_a_real_watcher_a_store_that_comes_back_is_used_within_a_second(
    opens: Callable[..., Door], spy: Spy, seed: str
) -> None:
    door = open_door("sync", spy.store, peppers=opens().authenticator._given, max_staleness=2.0)
    spy.on_lookup = spy.on_read = unavailable
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    spy.on_lookup = spy.on_read = up
    wait_until(lambda: isinstance(door.knock(SEED), Identity), 5, what="the store to be used again")
    door.close()


# what is served meanwhile


@pytest.fixture
def lenient(opens: Callable[..., Door], seed: str) -> Door:
    return opens(on_outage="serve_cached", max_age=600.0)


def test_known_keys_are_served_in_an_outage_until_max_age_and_are_marked_and_counted(
    lenient: Door, spy: Spy, clock: ManualClock
) -> None:
    fresh = lenient.knock(SEED)
    assert isinstance(fresh, Identity)
    assert not fresh.stale
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(599.9)  # past max_staleness, and past the entry's own lifetime
    stale = lenient.knock(SEED)
    assert isinstance(stale, Identity)
    assert stale.stale
    assert (stale.key, stale.rights) == (fresh.key, fresh.rights)
    assert lenient.authenticator.health().stale_answers == 1
    clock.advance(0.2)
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE


def test_max_age_counts_from_the_last_reading_that_was_applied(
    lenient: Door, spy: Spy, clock: ManualClock
) -> None:
    assert isinstance(lenient.knock(SEED), Identity)
    clock.advance(100)
    lenient.refresh()
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(599.9)
    assert isinstance(lenient.knock(SEED), Identity)
    clock.advance(0.2)
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE


def test_max_age_is_over_at_the_instant_it_names(lenient: Door, spy: Spy, clock: ManualClock) -> None:
    assert isinstance(lenient.knock(SEED), Identity)
    read_at = clock.mono
    spy.on_lookup = spy.on_read = unavailable
    clock.mono = read_at + 599.875
    assert isinstance(lenient.knock(SEED), Identity)
    clock.mono = read_at + 600.0
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE


def test_peppers_that_are_not_the_stores_are_an_outage_in_which_nobody_is_served(
    lenient: Door, spy: Spy, clock: ManualClock
) -> None:
    """The store answers: what it says is that nothing here can be verified any more. That is no news gone old."""
    assert isinstance(lenient.knock(SEED), Identity)

    def another(pepper: PepperRecord) -> PepperRecord:
        return pepper._replace(proof=b"?" * 32)

    def tells(ask: Callable[[], Reading]) -> Reading:
        reading = ask()
        news = reading.news[0]
        peppers = tuple(another(pepper) for pepper in spy.real.describe().peppers)
        return reading._replace(news={0: news._replace(peppers=peppers)})

    def describes(ask: Callable[[], Description]) -> Description:
        description = ask()
        return description._replace(peppers=tuple(another(pepper) for pepper in description.peppers))

    spy.on_describe = describes
    clock.advance(10)  # the feed is silent: nothing has been evicted, and it is asked for the peppers again
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE
    spy.on_read = tells
    clock.advance(10)
    lenient.refresh()
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert lenient.authenticator.health().stale_answers == 0


def test_what_a_request_needs_is_asked_in_an_outage_too(lenient: Door, spy: Spy, clock: ManualClock) -> None:
    assert isinstance(lenient.knock(SEED), Identity)
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(10)
    assert isinstance(lenient.knock(SEED, needs="contrats:lecture"), Identity)
    assert lenient.knock(SEED, needs="contrats:suppression") is Reason.INSUFFICIENT_RIGHTS


def test_pitfall_16_an_expiry_ends_a_key_in_an_outage_too(
    lenient: Door, spy: Spy, admin: Keys, clock: ManualClock
) -> None:
    owner = admin.machines()[0].id
    key = admin.create_key(
        owner, name="Production - Court", environment="prod", expires=timedelta(seconds=60)
    )
    lenient.refresh()
    assert isinstance(lenient.knock(key.secret.reveal()), Identity)
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(59)
    assert isinstance(lenient.knock(key.secret.reveal()), Identity)
    clock.advance(1)
    assert lenient.knock(key.secret.reveal()) is Reason.STORE_UNAVAILABLE


def test_pitfall_21_refused_and_unknown_keys_meet_503_in_an_outage(
    lenient: Door, spy: Spy, admin: Keys, seed: str, clock: ManualClock
) -> None:
    """They may have been enabled or created meanwhile: a 401 could be wrong."""
    admin.disable_key(seed)
    lenient.refresh()
    assert lenient.knock(SEED) is Reason.KEY_INACTIVE
    assert lenient.knock(STRANGER) is Reason.UNKNOWN_KEY
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(10)
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE
    assert lenient.knock(STRANGER) is Reason.STORE_UNAVAILABLE


def test_a_change_that_was_heard_holds_in_an_outage(
    lenient: Door, spy: Spy, admin: Keys, seed: str, clock: ManualClock
) -> None:
    assert isinstance(lenient.knock(SEED), Identity)
    admin.disable_key(seed)
    lenient.refresh()
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(10)
    assert lenient.knock(SEED) is Reason.STORE_UNAVAILABLE


def test_a_store_that_answers_is_asked_though_cached_answers_would_be_served(
    lenient: Door, spy: Spy, admin: Keys, seed: str, clock: ManualClock
) -> None:
    assert isinstance(lenient.knock(SEED), Identity)
    spy.on_read = unavailable  # the watcher is deaf, lookups are not
    admin.disable_key(seed)
    clock.advance(10)
    assert lenient.knock(SEED) is Reason.KEY_INACTIVE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_outage": "serve_cached"}, "go together"),
        ({"max_age": 600.0}, "go together"),
        ({"on_outage": "panic"}, "on_outage is 'refuse' or 'serve_cached'"),
        ({"on_outage": "serve_cached", "max_age": 1.0}, "at least max_staleness"),
        ({"on_outage": "serve_cached", "max_age": float("inf")}, "max_age must be a number"),
    ],
)
def test_an_outage_policy_that_means_nothing_stops_at_the_start(
    opens: Callable[..., Door], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        opens(**options)


# what an operator sees


def test_health_tells_how_it_is_without_asking_anybody(
    opens: Callable[..., Door], spy: Spy, clock: ManualClock, seed: str
) -> None:
    door = opens()
    assert not door.authenticator.health().ok  # nobody has been here: the peppers were not checked yet
    assert isinstance(door.knock(SEED), Identity)
    assert door.knock(STRANGER) is Reason.UNKNOWN_KEY
    clock.advance(0.5)
    health = door.authenticator.health()
    assert (health.ok, health.known, health.unknown, health.outages) == (True, 1, 1, 0)
    assert health.trusted_for == pytest.approx(1.5)
    assert not health.watching
    spy.on_lookup = spy.on_read = unavailable
    clock.advance(10)
    assert door.knock(SEED) is Reason.STORE_UNAVAILABLE
    health = door.authenticator.health()
    assert (health.ok, health.trusted_for, health.outages) == (False, 0.0, 1)
    assert health.error == "no route to host"


def test_health_does_not_suffer_from_peppers_that_are_merely_not_known_at_the_moment(
    opens: Callable[..., Door], seed: str, clock: ManualClock
) -> None:
    """The next call asks for them. That nothing was read for a while is told by ``trusted_for``."""
    door = opens()
    assert isinstance(door.knock(SEED), Identity)
    clock.advance(door.authenticator.max_staleness)
    health = door.authenticator.health()
    assert (health.ok, health.trusted_for) == (True, 0.0)


def test_a_claim_is_all_that_a_store_sees(opens: Callable[..., Door], spy: Spy, seed: str) -> None:
    opens().knock(SEED)
    assert all(isinstance(claim, Claim) for claim in spy.claims)
