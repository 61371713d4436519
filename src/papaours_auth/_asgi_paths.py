"""Whether a request's path is exempt, in every way that an app could read it.

A server tells an app ``path`` (decoded), mostly ``raw_path`` (as it was sent), and ``root_path``, below which the app
is served. Frameworks make different routes of them. Starlette takes ``root_path`` off where a slash follows it;
Django, Quart and BlackSheep wherever it begins the path; Litestar wherever it occurs; Falcon and Sanic never.
BlackSheep and Sanic read ``raw_path``. Some servers have ``root_path`` begin the path, some do not, and daphne lets
the client choose it.
"""

from __future__ import annotations

import re
import sys
from typing import Final
from urllib.parse import unquote

from ._asgi_guard import Scope
from .http import Gate, is_plain

_ENCODED: Final = re.compile(rb"%(?!20|[89A-Fa-f][0-9A-Fa-f])")
"""An encoded character that need not be encoded, or that means something where it is decoded (``%2f``)."""


def is_exempt(gate: Gate, scope: Scope, *, strips: bool, own_root: str) -> bool:
    """Return whether a request may pass without a key because of its path. In doubt, it may not.

    ``strips``: the app is known to take ``root_path`` off, as Starlette does. Otherwise it may or may not, and the
    whole path must be exempt as well as what is below ``root_path``. ``own_root``: see `own_root_of`.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path") or ""
    if root:
        below = path[len(root) :]
        if (
            not path.startswith(root)
            or below[:1] not in ("", "/")
            or not is_plain(root)
            or root.endswith("/")
        ):
            return False
        if gate.guards(below) or (not strips and gate.guards(path)):
            return False
    elif gate.guards(path):
        return False
    if own_root and path.startswith(own_root) and gate.guards(path[len(own_root) :]):
        return False
    raw = scope.get("raw_path")
    return raw is None or _is_read_alike(raw, path, root)


def _is_read_alike(raw: bytes, path: str, root: str) -> bool:
    """Return whether a path is the same before and after it is decoded, but for what has to be encoded."""
    raw = raw.partition(b"?")[0]
    # A client's raw path lacks the root path on some servers: then the two paths differ.
    return (
        not _ENCODED.search(raw)
        and raw.startswith(root.encode())
        and unquote(raw.decode("latin-1"), errors="replace") == path
    )


def own_root_of(app: object) -> str:
    """Return the root path that an app sets itself when it is called, where the guard around it cannot see it."""
    modules = {kind.__module__ for kind in type(app).__mro__}
    if "fastapi.applications" in modules:
        return str(getattr(app, "root_path", ""))
    if "django.core.handlers.asgi" in modules:
        return getattr(sys.modules["django.conf"].settings, "FORCE_SCRIPT_NAME", None) or ""
    return ""
