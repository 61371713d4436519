"""What both middlewares take: one set of options, and one anonymous caller."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypedDict

from .authenticator import Options
from .exceptions import ConfigurationError
from .throttle import Throttle
from .usage import Recorder
from .usage.event import LONGEST_ROUTE

STORE_VARIABLE: Final = "PAPAOURS_STORE"
_HIDDEN: Final = "(hidden: it looks like a key)"


class GateOptions(TypedDict, total=False):
    """Which requests need a key. `papaours_auth.http.Gate` says what each means."""

    exempt: Sequence[str] | None
    protect: Sequence[str] | None
    required: bool
    preflight: Literal["refuse", "pass"]
    trusted_proxies: Sequence[str]


class MiddlewareOptions(GateOptions, Options, total=False):
    """Everything a middleware takes besides the app, the environment, the store or the authenticator."""

    throttle: Throttle | str | None


def split_options(options: MiddlewareOptions) -> tuple[GateOptions, Options, Throttle | None]:
    """Part the gate's options from the authenticator's and the throttle. Raises `ConfigurationError`."""
    gate: Mapping[str, object] = {k: v for k, v in options.items() if k in GateOptions.__annotations__}
    rest: Mapping[str, object] = {k: v for k, v in options.items() if k not in gate and k != "throttle"}
    throttle = options.get("throttle")
    if isinstance(throttle, str):
        throttle = Throttle(throttle)
    return GateOptions(**gate), Options(**rest), throttle  # type: ignore[typeddict-item]  # parted by name just above


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


def recordable(text: str, mark: str) -> str:
    """Give a text as it may be recorded: bounded, and hidden where somebody put a key into it (``mark``: pk_)."""
    short = text[:LONGEST_ROUTE]  # what waits in memory is bounded too, not only what is kept
    return _HIDDEN if mark in short else short


def needed(environment: str | None) -> str:
    """Give the environment, or raise `ConfigurationError` where none was named."""
    if environment is None:
        raise ConfigurationError(
            "no environment: say which keys this app accepts, for example environment='prod'"
        )
    return environment


class Anonymous:
    """A caller without a key, where none is needed. Answers to Starlette's names, as `Identity` does."""

    is_authenticated = False
    display_name = ""
    identity = ""
    scopes: frozenset[str] = frozenset()


ANONYMOUS: Final = Anonymous()
