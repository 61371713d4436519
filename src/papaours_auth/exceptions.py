"""Every error this library raises.

PapaoursAuthError
├── ConfigurationError     the app is set up wrongly: raised at start, says what, why, what to do
├── Refused                a request is not let in; ``reason`` says why
├── StoreUnavailable       the store cannot answer now: never "unknown key"
│   ├── Overloaded             it was not asked: this process has too many lookups under way
│   └── UnreadableRecord       it answers, but a record makes no sense
└── AdministrationError    a change was not made
    ├── InvalidInput           the words of the call are off
    ├── NotFound               no such machine or key
    ├── Conflict               it exists already, or a name fits several
    └── SystemMachineProtected Papaours' own machines are not ours to change
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Identity


class Reason(StrEnum):
    """Why a request is refused. `papaours_auth.http` gives each its status, challenge and words."""

    MISSING_KEY = "missing_key"
    MALFORMED_KEY = "malformed_key"
    AMBIGUOUS_CREDENTIALS = "ambiguous_credentials"
    UNKNOWN_KEY = "unknown_key"
    WRONG_ENVIRONMENT = "wrong_environment"
    KEY_INACTIVE = "key_inactive"
    KEY_EXPIRED = "key_expired"
    MACHINE_INACTIVE = "machine_inactive"
    NETWORK_NOT_ALLOWED = "network_not_allowed"
    INSUFFICIENT_RIGHTS = "insufficient_rights"
    TOO_MANY_FAILURES = "too_many_failures"
    STORE_UNAVAILABLE = "store_unavailable"


class PapaoursAuthError(Exception):
    """The root of the tree."""


class ConfigurationError(PapaoursAuthError):
    """The app is set up wrongly. One line: what, why, what to do. Never quotes a secret."""


class StoreUnavailable(PapaoursAuthError):
    """The store cannot answer now. A request meets 503, never 401.

    ``own_timer`` is True where a timer of this process ended the call. A stalled event loop may be the reason then,
    and the store may be well.
    """

    own_timer = False


class Overloaded(StoreUnavailable):
    """The store was not asked: a queue of this process is full. Stores raise it too, when all connections are in use.

    It is no outage: calls of other keys go on asking the store.
    """


class Refused(PapaoursAuthError):
    """A request is not let in.

    ``known`` names the caller where the key was recognised (its digest matched), so that usage can be
    attributed; it is never rendered. ``needs`` holds the rights that were asked for, ``retry_after`` the seconds
    after which to try again, where they are known.
    """

    def __init__(
        self,
        reason: Reason,
        *,
        known: Identity | None = None,
        needs: tuple[str, ...] = (),
        retry_after: int | None = None,
    ) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.known = known
        self.needs = needs
        self.retry_after = retry_after

    def copy(self) -> Refused:
        """Return the same refusal without the traceback and context of this one."""
        return Refused(self.reason, known=self.known, needs=self.needs, retry_after=self.retry_after)


class UnreadableRecord(StoreUnavailable):
    """The store answers, but one record makes no sense: that key meets 503, and others are not affected."""


class AdministrationError(PapaoursAuthError):
    """A change was not made; the store is as it was."""


class InvalidInput(AdministrationError):
    """The words of the call are off. Names the argument, never quotes a key."""


class NotFound(AdministrationError):
    """No such machine or key."""


class Conflict(AdministrationError):
    """It exists already, or one name fits several."""


class SystemMachineProtected(AdministrationError):
    """A system machine, its rights and its keys cannot be changed (document 02 of the series)."""
