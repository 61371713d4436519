"""What both middlewares share: their options, and whose identity counts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypedDict

from .authenticator import AsyncAuthenticator, Authenticator, Options
from .exceptions import ConfigurationError, Reason, Refused
from .format import MAX_LENGTH, KeyFormat
from .model import Identity, Unset
from .throttle import Throttle
from .usage import Recorder
from .usage.event import LONGEST_ROUTE
from .verify import authorize

STORE_VARIABLE: Final = "PAPAOURS_STORE"
REFUSAL: Final = "papaours.refusal"
"""Where in a scope or environ a guard that refuses nobody (``everywhere=False``) notes why it would have refused."""
_HIDDEN: Final = "(hidden: it looks like a key)"


class GateOptions(TypedDict, total=False):
    """Which requests need a key. `papaours_auth.http.Gate` says what each means."""

    exempt: Sequence[str] | None
    required: bool
    everywhere: bool
    preflight: Literal["refuse", "pass"]
    trusted_proxies: Sequence[str]


class CallerOptions(Options, total=False):
    """How a guard finds out who calls: what every front takes besides environment, store and authenticator."""

    required: bool
    trusted_proxies: Sequence[str]
    throttle: Throttle | str | None


class MiddlewareOptions(CallerOptions, total=False):
    """The same, and which requests need a key: for what sees a request before any route does."""

    exempt: Sequence[str] | None
    everywhere: bool
    preflight: Literal["refuse", "pass"]


class WSGIOptions(MiddlewareOptions, total=False):
    """The same on WSGI, and what only WSGI has to ask. `papaours_auth.wsgi.Guard` says what it means."""

    proxy_drops_underscores: bool


def split_options(options: MiddlewareOptions) -> tuple[GateOptions, Options, Throttle | None]:
    """Part the gate's options from the authenticator's and the throttle.

    Raises `ConfigurationError`, and `TypeError` for an option that there is not.
    """
    known_only(options, MiddlewareOptions)
    gate: Mapping[str, object] = {k: v for k, v in options.items() if k in GateOptions.__annotations__}
    rest: Mapping[str, object] = {k: v for k, v in options.items() if k not in gate and k != "throttle"}
    throttle = options.get("throttle")
    if isinstance(throttle, str):
        throttle = Throttle(throttle)
    return GateOptions(**gate), Options(**rest), throttle  # type: ignore[typeddict-item]  # parted by name just above


def known_only(options: Mapping[str, object], front: type) -> None:
    """Raise `TypeError` for an option that this front has not. One that it could not honour would be worse."""
    for name in options:
        if name not in front.__annotations__:
            raise TypeError(f"there is no option {name!r}")


def store_url() -> str:
    """Give the store that PAPAOURS_STORE names. Raises `ConfigurationError`."""
    url = os.environ.get(STORE_VARIABLE, "")
    if not url:
        raise ConfigurationError(
            f"no store: set {STORE_VARIABLE}, for example to sqlite:///papaours.db, or give one; "
            "make one with 'papaours-auth init'"
        )
    return url


def recorder_for(usage: Recorder | str | None) -> Recorder | None:
    """Give the recorder an app asked for. Raises `ConfigurationError`."""
    return Recorder(usage) if isinstance(usage, str) else usage


def recordable(text: str, format: KeyFormat) -> str:  # noqa: A002 - the field's own word
    """Return a text as it may be recorded: bounded, and hidden where somebody put a key into it.

    A key that the bound would cut is found too: what is left of it would give most of it away.
    """
    if "_" not in text and "%" not in text and text.isascii() and len(text) <= LONGEST_ROUTE:
        return text  # most are: without a call, as cheap as the two texts of a request should be
    if len(text) > LONGEST_ROUTE:
        text = text[: LONGEST_ROUTE + 4 * MAX_LENGTH]  # a key's length, and room for its encoding
    return _HIDDEN if format.found_in(text) else text[:LONGEST_ROUTE]


def needed(environment: str | None) -> str:
    """Give the environment, or raise `ConfigurationError` where none was named."""
    if environment is None:
        raise ConfigurationError(
            "no environment: say which keys this app accepts, for example environment='prod'"
        )
    return environment


def vouched(found: object, authenticator: Authenticator | AsyncAuthenticator) -> Identity | None:
    """Return the identity that a guard further out found, if this same authenticator verified its key.

    None otherwise: then the key is judged anew. Another authenticator may accept another environment, or ask
    another store. Every integration that takes over an identity asks here.
    """
    return found if isinstance(found, Identity) and found.vouched_by == authenticator.id else None


def known(caller: Identity | None, refusal: Refused | None) -> Identity:
    """Return the caller, or raise `Refused` if there is none.

    ``refusal`` is what a guard that refuses nobody (``everywhere=False``) noted of this request, if anything.
    """
    if caller is None:
        # A copy: an error that is raised keeps the frames it passes, and the noted one outlives them.
        raise refusal.copy() if refusal is not None else Refused(Reason.MISSING_KEY)
    return caller


def authorized(caller: Identity, rights: Sequence[str], organisation: str | Unset) -> Identity:
    """Return the caller if it has these rights, or raise `Refused`. `InvalidInput`: see `verify.authorize`."""
    answer = authorize(caller, rights, organisation)
    if isinstance(answer, Refused):
        try:
            raise answer
        finally:
            del answer  # an error whose frame holds it is a cycle
    return answer
