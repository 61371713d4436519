"""Checked by mypy, never run: what an app's own type checker sees of the public names."""

from typing import assert_type

from papaours_auth import (
    AsyncAuthenticator,
    AsyncKeys,
    Authenticator,
    Identity,
    Key,
    Keys,
    Machine,
    Reason,
    Refused,
    Secret,
    open_async_store,
    open_store,
)
from papaours_auth.asgi import PapaoursAuthMiddleware as ASGIMiddleware
from papaours_auth.asgi import Receive, Scope, Send
from papaours_auth.asgi import identity_of as asgi_identity
from papaours_auth.fastapi import PapaoursAuth as FastAPIAuth
from papaours_auth.keys import NewKey
from papaours_auth.stores import AsyncStore, Store
from papaours_auth.throttle import Throttle
from papaours_auth.wsgi import PapaoursAuthMiddleware as WSGIMiddleware


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    assert_type(asgi_identity(scope), Identity | None)


def stores() -> None:
    assert_type(open_store("memory://"), Store)
    assert_type(open_async_store("memory://"), AsyncStore)
    assert_type(open_async_store("memory://").sync, Store)


def blocking(store: Store) -> None:
    with Authenticator(store, environment="prod", max_staleness=1.0) as authenticator:
        assert_type(authenticator.authenticate("pk_prod_…"), Identity)
        assert_type(
            authenticator.authenticate(b"pk_prod_", client="192.0.2.1", needs=["a:lecture"]), Identity
        )
        assert_type(authenticator.cached(b"pk_prod_"), Identity | None)
        authenticator.authenticate(1)  # type: ignore[arg-type]  # a key is text or bytes
        authenticator.authenticate("pk", "192.0.2.1")  # type: ignore[call-arg]  # named, or they would be swapped
    Authenticator(store)  # type: ignore[call-arg]  # no environment: no default would be safe
    Authenticator(store, environment="prod", ttl=60)  # type: ignore[call-arg]  # no such option
    Authenticator(open_async_store("memory://"), environment="prod")  # type: ignore[arg-type]


async def waiting(store: AsyncStore, keys: Keys) -> None:
    async with AsyncAuthenticator(store, environment="prod") as authenticator:
        assert_type(await authenticator.authenticate("pk_prod_…"), Identity)
    assert_type(await AsyncKeys(keys).create_key("m", name="n", environment="prod"), NewKey)
    assert_type(await AsyncKeys(keys).machines(), list[Machine])
    await AsyncKeys(keys).create_key("m", name="n")  # type: ignore[call-arg]  # no environment
    AsyncAuthenticator(open_store("memory://"), environment="prod")  # type: ignore[arg-type]


def administration(keys: Keys) -> None:
    new = keys.create_key("m", name="n", environment="prod")
    assert_type(new.key, Key)
    assert_type(new.secret, Secret)
    assert_type(new.secret.reveal(), str)
    assert_type(keys.disable_key("k"), Key)


def identities(identity: Identity, refused: Refused) -> None:
    assert_type(identity.rights, frozenset[str])
    assert_type(identity.machine.organisation, str)
    assert_type(identity.allows("a:lecture", organisation="o"), bool)
    assert_type(refused.reason, Reason)
    assert_type(refused.retry_after, int | None)
    identity.rights = frozenset()  # type: ignore[misc]  # frozen


ASGIMiddleware(app, environment="prod", exempt=["/healthz"], trusted_proxies=["10.0.0.0/8"])
ASGIMiddleware(app, environment="prod", throttle=Throttle("30/minute", storage="redis://…"))
ASGIMiddleware(app, environment="prod", throttle=30)  # type: ignore[arg-type]  # 30 of what?
ASGIMiddleware(app, environment="prod", exempts=[])  # type: ignore[call-arg]
ASGIMiddleware(app, environment="prod", preflight="maybe")  # type: ignore[arg-type]
WSGIMiddleware(app, environment="prod")  # type: ignore[arg-type]  # an ASGI app
FastAPIAuth(environment="prod", required=False, throttle="30/minute", trusted_proxies=["unix"])
FastAPIAuth(environment="prod", exempt=["/healthz"])  # type: ignore[call-arg]  # the middleware's: a dependency is where it is
FastAPIAuth(environment="prod", everywhere=False)  # type: ignore[call-arg]
FastAPIAuth(environment="prod", preflight="pass")  # type: ignore[call-arg]
