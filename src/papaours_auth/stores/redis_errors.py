"""The kind of an error that Redis answers with, whichever version says it, in a script or outside one.

Redis before 7 wraps what fails inside a script (``ERR Error running script (call to f_…): @user_script:1: -OOM …``),
and no version, Valkey included, marks a missing permission there with NOPERM. Who reads redis-py's exception classes
alone takes an out-of-memory server, or a replica, for a broken script.
"""

from __future__ import annotations

import re
from typing import Final

from redis.exceptions import ResponseError

_IN_SCRIPT: Final = re.compile(r"ERR Error running script \(call to \w+\): (?:@\w+: ?\d+: )+-?")
_FORBIDDEN_IN_SCRIPT: Final = re.compile(
    r"(?:ERR )?(?:The user executing the script can't |ACL failure in script)"
)

REPLICA: Final = frozenset({"READONLY", "MASTERDOWN"})
"""What a server says that is a replica, and was a primary when it was chosen."""

_MEANING: Final = {
    "NOPERM": "the Redis user lacks a permission: compare it with docs/stores/redis.md",
    "READONLY": "the Redis server asked is a replica now",
    "MASTERDOWN": "the Redis server asked is a replica now, and has lost its primary",
    "OOM": "Redis has no memory left for what is written (OOM): see maxmemory",
    "MISCONF": "Redis takes no changes, because it cannot save its data (MISCONF): see its log",
    "NOREPLICAS": "Redis takes no changes, because too few replicas follow it (NOREPLICAS)",
    "CLUSTERDOWN": "the Redis Cluster is down, or nobody serves this part of it (CLUSTERDOWN)",
    "TRYAGAIN": "a part of the Redis Cluster is moving to another node (TRYAGAIN): try again",
    "BUSY": "Redis is busy with a script that does not end (BUSY)",
}


def kind_of(error: ResponseError) -> str:
    """Return the word that says what is wrong: ``OOM``, ``READONLY``, ``NOPERM``, …; ``ERR`` where there is none."""
    text = str(error)
    if error.status_code is not None:  # redis-py has cut the word off
        text = f"{error.status_code} {text}"
    text = _IN_SCRIPT.sub("", text, count=1)
    if _FORBIDDEN_IN_SCRIPT.match(text):
        return "NOPERM"
    word = text.partition(" ")[0]
    return word if word.isupper() and word.isalpha() else "ERR"


def meaning_of(error: ResponseError) -> str:
    """Say what an error means. Its text is not quoted: it may hold words of the command."""
    kind = kind_of(error)
    return _MEANING.get(kind, f"Redis refuses with {kind}")
