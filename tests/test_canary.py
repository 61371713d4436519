"""Pitfall 28: a canary key goes through every path, and is looked for wherever it must not be."""

from __future__ import annotations

import gc
import io
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest

from papaours_auth import (
    Authenticator,
    KeyFormat,
    Keys,
    PapaoursAuthError,
    PepperRing,
    Refused,
    StoreUnavailable,
    open_store,
)
from papaours_auth.http import render
from papaours_auth.stores.sqlite import SQLiteStore
from papaours_auth.verify import Claim
from papaours_auth.wsgi import PapaoursAuthMiddleware

FOREIGN = "pk_prod_canary0Canary1canary2"


class Everything:
    """What a person could come to read: all logs at all levels, tracebacks, reprs, answers."""

    def __init__(self) -> None:
        self._log = io.StringIO()
        self.handler = logging.StreamHandler(self._log)
        self.handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s %(exc_info)s"))
        self._rest: list[str] = []

    def see(self, *things: object) -> None:
        for thing in things:
            self._rest += [str(thing), repr(thing), f"{thing!s:>20}"]
            if isinstance(thing, BaseException):
                self._rest.append("".join(traceback.format_exception(thing)))
                self._rest.append(repr(thing.args))
                self._rest.append(repr(vars(thing)))

    @property
    def text(self) -> str:
        return self._log.getvalue() + "\n".join(self._rest)


@pytest.fixture
def everything() -> Iterator[Everything]:
    seen = Everything()
    root = logging.getLogger()
    former = root.level
    root.addHandler(seen.handler)
    root.setLevel(1)
    yield seen
    root.removeHandler(seen.handler)
    root.setLevel(former)


def secrets_of(key: str, ring: PepperRing) -> list[str]:
    """Every text that gives a key away: itself, all of it but a few characters, and its digests."""
    digests = [candidate.digest for candidate in ring.candidates(key.encode())]
    return [key, key[8:], key[:-4], *(digest.hex() for digest in digests), *(repr(d)[2:-1] for d in digests)]


def attempt(everything: Everything, call: Callable[..., object], *args: object, **options: object) -> None:
    try:
        everything.see(call(*args, **options))
    except PapaoursAuthError as error:
        everything.see(error)
        if isinstance(error, Refused):
            everything.see(render(error), render(error, accept_language="fr"))


def test_pitfall_28_no_key_is_seen_anywhere(tmp_path: Path, ring: PepperRing, everything: Everything) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    new = keys.create_key(
        machine.id, name="Production - Canari", environment="prod", networks=["192.0.2.0/24"]
    )
    imported = keys.import_key(machine.id, FOREIGN, name="Production - Canari étranger")
    minted = new.secret.reveal()
    canaries = [minted, FOREIGN]

    authenticator = Authenticator(store, environment="prod", peppers=ring, watch=False)
    staging = Authenticator(store, environment="staging", peppers=ring, watch=False)
    everything.see(keys, new, imported, ring, store, authenticator, machine)
    everything.see(*keys.journal(), *store.keys(), *store.machines(), store.describe())
    for canary in canaries:
        damaged = [
            canary[:-1],
            canary + "!",
            canary.upper(),
            f"{canary},{canary}",
            f"Bearer {canary}",
            canary * 9,
        ]
        for text in [canary, *damaged]:
            for who in (authenticator, staging):
                attempt(everything, who.authenticate, text)
                attempt(everything, who.authenticate, text, client="192.0.2.1")
                attempt(everything, who.authenticate, text, client="192.0.2.1", needs="contrats:lecture")
        attempt(everything, keys.import_key, machine.id, canary, name="Production - Canari")
        attempt(everything, keys.create_machine, canary, organisation=canary)
        attempt(everything, keys.rename_key, new.key.id, f"Production {canary}")
        attempt(everything, keys.key, canary)
    for change in (keys.disable_key, keys.enable_key, keys.disable_key):
        everything.see(change(new.key.id), change(imported.id))
        authenticator.refresh()
        for canary in canaries:
            attempt(everything, authenticator.authenticate, canary)
    authenticator.close()
    staging.close()
    store.close()

    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Canari" in files
    for canary in canaries:
        for secret in secrets_of(canary, ring):
            assert secret not in everything.text
        for text in (canary, canary[8:], canary[:-4]):
            assert text.encode() not in files


def test_pitfall_28_no_key_is_seen_when_the_store_breaks_in_the_middle_of_a_call(
    tmp_path: Path, ring: PepperRing, everything: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"sqlite:///{tmp_path}/keys.db", create=True)
    Keys(store, peppers=ring)

    def broken(self: SQLiteStore, claim: Claim) -> object:
        everything.see(claim)
        raise StoreUnavailable("broken on purpose")

    monkeypatch.setattr(SQLiteStore, "lookup", broken)
    authenticator = Authenticator(store, environment="prod", peppers=ring, format=KeyFormat(foreign=True))
    attempt(everything, authenticator.authenticate, FOREIGN)
    app = PapaoursAuthMiddleware(lambda environ, start_response: [b""], authenticator=authenticator)
    environ: dict[str, object] = {"HTTP_AUTHORIZATION": f"Bearer {FOREIGN}"}
    setup_testing_defaults(environ)

    def start_response(
        status: str, headers: list[tuple[str, str]], _: object = None, /
    ) -> Callable[[bytes], object]:
        everything.see(status, headers)
        return bytes

    everything.see(*app(environ, start_response))
    authenticator.close()
    assert "broken on purpose" in everything.text
    for secret in secrets_of(FOREIGN, ring):
        assert secret not in everything.text


def test_pitfall_28_the_authenticator_holds_no_key_text(
    keys: Keys, store: SQLiteStore, ring: PepperRing
) -> None:
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    keys.import_key(machine.id, FOREIGN, name="Production - Canari")
    authenticator = Authenticator(store, environment="prod", peppers=ring, watch=False)
    authenticator.refresh()
    authenticator.authenticate(FOREIGN.encode())
    with pytest.raises(Refused):
        authenticator.authenticate(FOREIGN + "x")
    seen: set[int] = set()
    waiting: list[object] = [authenticator]
    texts: list[bytes] = []
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or type(thing).__name__ in ("module", "function", "type", "frame"):
            continue
        seen.add(id(thing))
        if isinstance(thing, str | bytes):
            texts.append(thing.encode("utf-8", "replace") if isinstance(thing, str) else thing)
        waiting += gc.get_referents(thing)
    assert len(authenticator._cache.entries) == 1  # it does hold the key's entry…
    assert len(authenticator._cache.unknown) == 1
    assert b"Production - Canari" in texts
    assert not [text for text in texts if FOREIGN[8:].encode() in text]  # …and not its text
