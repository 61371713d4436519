"""HTTP, once for all frameworks: where a key sits, whom a path lets pass, ONE table from reason to answer.

ASGI and WSGI give the same answer by construction: WSGI servers join repeated headers with commas, so ASGI
headers are joined likewise before anything is decided.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Literal, NamedTuple

from .exceptions import ConfigurationError, Reason, Refused
from .model import Address, Network, parse_address, parse_network

_REALM: Final = "papaours"
RETRY_AFTER: Final = 5
"""Seconds after which a client should try again where nothing tells better (RFC 9110 section 10.2.3)."""
_TYPE: Final = "tag:papaours.fr,2026:problem/"  # RFC 9457 section 3.1.1: a URI that need not be fetched


class Answer(NamedTuple):
    """A whole HTTP answer to a refused request."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def status_line(self) -> str:
        """Status and phrase, as WSGI wants them."""
        return f"{self.status} {HTTPStatus(self.status).phrase}"


class _Row(NamedTuple):
    status: int
    error: str | None  # of the Bearer challenge, RFC 6750 section 3.1; None: a challenge without error
    english: tuple[str, str]
    french: tuple[str, str]


_TABLE: Final[Mapping[Reason, _Row]] = {
    Reason.MISSING_KEY: _Row(
        401,
        None,
        ("API key missing", "Send a Papaours API key as 'Authorization: Bearer' or 'X-API-KEY'."),
        ("Clé API absente", "Envoyez une clé API Papaours par 'Authorization: Bearer' ou 'X-API-KEY'."),
    ),
    Reason.MALFORMED_KEY: _Row(
        401,
        "invalid_token",
        ("API key malformed", "This is not a Papaours API key: check that it was copied whole."),
        (
            "Clé API mal formée",
            "Ceci n'est pas une clé API Papaours : vérifiez qu'elle est copiée en entier.",
        ),
    ),
    Reason.AMBIGUOUS_CREDENTIALS: _Row(
        400,
        "invalid_request",
        ("Ambiguous credentials", "Send exactly one API key, once."),
        ("Identifiants ambigus", "Envoyez une seule clé API, une seule fois."),
    ),
    Reason.UNKNOWN_KEY: _Row(
        401,
        "invalid_token",
        ("API key unknown", "No such API key exists."),
        ("Clé API inconnue", "Cette clé API n'existe pas."),
    ),
    Reason.WRONG_ENVIRONMENT: _Row(
        401,
        "invalid_token",
        ("Wrong environment", "This API key belongs to another environment."),
        ("Mauvais environnement", "Cette clé API appartient à un autre environnement."),
    ),
    Reason.KEY_INACTIVE: _Row(
        401,
        "invalid_token",
        ("API key inactive", "This API key has been deactivated."),
        ("Clé API inactive", "Cette clé API a été désactivée."),
    ),
    Reason.KEY_EXPIRED: _Row(
        401,
        "invalid_token",
        ("API key expired", "This API key has expired: create another one."),
        ("Clé API expirée", "Cette clé API a expiré : créez-en une autre."),
    ),
    Reason.MACHINE_INACTIVE: _Row(
        401,
        "invalid_token",
        ("Machine inactive", "The machine this API key belongs to has been deactivated."),
        ("Machine inactive", "La machine à laquelle appartient cette clé API a été désactivée."),
    ),
    Reason.NETWORK_NOT_ALLOWED: _Row(
        403,
        None,
        ("Network not allowed", "This API key may not be used from this network."),
        ("Réseau non autorisé", "Cette clé API ne peut pas être utilisée depuis ce réseau."),
    ),
    Reason.INSUFFICIENT_RIGHTS: _Row(
        403,
        "insufficient_scope",
        ("Insufficient rights", "The machine lacks a right that this call needs."),
        ("Droits insuffisants", "La machine n'a pas un droit d'accès nécessaire à cet appel."),
    ),
    Reason.TOO_MANY_FAILURES: _Row(
        429,
        None,
        ("Too many failures", "Too many failed attempts: wait before trying again."),
        ("Trop d'échecs", "Trop de tentatives en échec : attendez avant de réessayer."),
    ),
    Reason.STORE_UNAVAILABLE: _Row(
        503,
        None,
        ("Temporarily unavailable", "API keys cannot be verified right now: try again in a few seconds."),
        (
            "Temporairement indisponible",
            "Les clés API ne peuvent pas être vérifiées pour le moment : réessayez dans quelques secondes.",
        ),
    ),
}

Language = Literal["en", "fr"]


def status_of(reason: Reason) -> int:
    """Give the status a reason is answered with."""
    return _TABLE[reason].status


def render(refused: Refused, *, accept_language: str = "") -> Answer:
    """Turn a refusal into its answer: a problem document (RFC 9457) in English or French. Quotes no input."""
    return _render(
        refused.reason, refused.needs, language(accept_language), refused.retry_after or RETRY_AFTER
    )


def words_of(refused: Refused, *, accept_language: str = "") -> str:
    """Return what a refusal says to people, in English or French."""
    row = _TABLE[refused.reason]
    return (row.french if language(accept_language) == "fr" else row.english)[1]


@lru_cache(maxsize=256)
def _render(reason: Reason, needs: tuple[str, ...], tongue: Language, retry_after: int) -> Answer:
    row = _TABLE[reason]
    title, detail = row.french if tongue == "fr" else row.english
    body = json.dumps(
        {"type": _TYPE + reason, "title": title, "status": row.status, "detail": detail, "code": reason},
        ensure_ascii=False,
    ).encode("utf-8")
    headers = [
        ("Content-Type", "application/problem+json"),
        ("Content-Language", tongue),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("Vary", "Accept-Language"),
    ]
    if row.status == 401 or row.error is not None:
        headers.append(("WWW-Authenticate", _challenge(row.error, needs)))
    if row.status in (429, 503):
        headers.append(("Retry-After", str(retry_after)))
    return Answer(row.status, tuple(headers), body)


_SCOPE: Final = re.compile(r"[!#-\[\]-~]+")


def _challenge(error: str | None, needs: tuple[str, ...]) -> str:
    parts = [f'Bearer realm="{_REALM}"']
    if error is not None:
        parts.append(f'error="{error}"')
    # What RFC 6750 section 3 does not allow in scope, a right with an accent say, is left out, not mangled.
    scope = " ".join(need for need in needs if _SCOPE.fullmatch(need))
    if scope and error == "insufficient_scope":
        parts.append(f'scope="{scope}"')
    return ", ".join(parts)


def language(accept_language: str) -> Language:
    """Choose the language of an answer by Accept-Language (RFC 9110 section 12.5.4); English by default."""
    best: dict[str, float] = {}
    for item in accept_language[:200].split(","):
        tag, _, weight = item.partition(";")
        primary = tag.strip().lower().partition("-")[0]
        match = re.fullmatch(r"\s*[qQ]=([01](?:\.\d{0,3})?)\s*", weight)
        quality = float(match[1]) if match else 1.0
        best[primary] = max(best.get(primary, 0.0), quality)
    english = best.get("en", best.get("*", 0.0))
    french = best.get("fr", best.get("*", 0.0))
    return "fr" if french > english else "en"


# Where a key may sit in a request

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_CREDENTIALS: Final = re.compile(rb"\s*" + _TOKEN + rb"(?:[ \t]+(?!=)|\s*$)")
"""What begins like ``scheme`` or ``scheme SP …`` and is no ``name=value`` parameter (RFC 9110 section 11.4)."""


def join_headers(values: Sequence[bytes]) -> bytes | None:
    """Join a header's values as WSGI servers do; None where there is none."""
    return b",".join(values) if values else None


def credentials(authorization: bytes | None, x_api_key: bytes | None, *, token: bytes) -> bytes:
    """Find the one key in a request's two headers, or raise `Refused`.

    Both values are as joined by commas where a header came several times; ``token`` is the word our keys
    begin with, and its ``_``. Another scheme, or a Bearer value that is not ours (a JWT, say), counts as absent.
    """
    bearer = _bearer(authorization) if authorization is not None else None
    if bearer is not None and not bearer.startswith(token):
        bearer = None
    named = x_api_key.strip(b" \t") if x_api_key is not None else b""
    if b"," in named:
        raise Refused(Reason.AMBIGUOUS_CREDENTIALS)
    if bearer is None:
        if not named:
            raise Refused(Reason.MISSING_KEY)
        return named
    if named and not hmac.compare_digest(bearer, named):
        raise Refused(Reason.AMBIGUOUS_CREDENTIALS)
    return bearer


def _bearer(value: bytes) -> bytes | None:
    value = value.strip(b" \t")
    is_bearer = value[:6].lower() == b"bearer" and value[6:7] in (b"", b" ", b",")
    if b"," in value:
        # One header sent twice, and joined by an intermediary or a WSGI server. A single credential of
        # another scheme may contain commas too, but only between parameters.
        rest = value.split(b",")[1:]
        if is_bearer or any(not part.strip() or _CREDENTIALS.match(part) for part in rest):
            raise Refused(Reason.AMBIGUOUS_CREDENTIALS)
        return None
    return value[6:].strip(b" ") if is_bearer else None


# Whom a path lets pass


_MISREAD: Final = re.compile(r"[\\;%?#]")
"""What something behind us might read anew: a backslash as a slash, parameters, a second encoding, a URL's parts."""


def is_plain(path: str) -> bool:
    """Return whether a path can be read in one way only."""
    return (
        path.startswith("/")
        and "//" not in path
        and not _MISREAD.search(path)
        and path.isprintable()
        and not any(segment in (".", "..") for segment in path.split("/"))
    )


class Paths:
    """Some paths: exact ones, and what is in whole folders, written ``/public/*``.

    ``/public/`` alone is not in it: routers that ignore a trailing slash take it for ``/public``.
    Raises `ConfigurationError` for a pattern that no path could ever match; ``option`` is named in it.
    """

    def __init__(self, option: str, patterns: Iterable[str]) -> None:
        self._exact: set[str] = set()
        folders: set[str] = set()
        for pattern in patterns:
            whole = pattern.removesuffix("*")
            if not is_plain(whole) or "*" in whole or (whole != pattern and not whole.endswith("/")):
                raise ConfigurationError(
                    f"{option}: {pattern!r} is neither a path like '/healthz' nor a folder like '/public/*'"
                )
            (self._exact if whole == pattern else folders).add(whole)
        self._folders = tuple(folders)
        self._roots = folders - {"/"}

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and (
            path in self._exact or (path.startswith(self._folders) and path not in self._roots)
        )


_UNIX: Final = "unix"


@dataclass(frozen=True, slots=True)
class _Proxies:
    networks: tuple[Network, ...]
    unix: bool

    def trusts(self, peer: str) -> bool:
        """Whether a peer is trusted. One that is no address is a Unix socket, whatever a server calls it.

        uWSGI calls it 0.0.0.0, from which no connection ever comes.
        """
        parsed = parse_address(peer)
        return self.unix if parsed is None or parsed.is_unspecified else self.contains(parsed)

    def contains(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def _proxies(texts: Sequence[str]) -> _Proxies:
    try:
        networks = tuple(parse_network(text) for text in texts if text != _UNIX)
    except ValueError:
        raise ConfigurationError(
            "trusted_proxies: each is an address, a CIDR block without host bits such as 10.0.0.0/8, or 'unix'"
        ) from None
    return _Proxies(networks, _UNIX in texts)


# Some proxies put the port behind the address, which needs brackets where it is an IPv6 one.
_HOP: Final = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d{1,5})?|([0-9.]+):\d{1,5}|([0-9A-Fa-f:.]+)")


def _hop(text: str) -> Address | None:
    match = _HOP.fullmatch(text.strip(" \t"))
    return parse_address(match[match.lastindex or 0]) if match else None


class Gate:
    """What a middleware is set to: which requests need a key, and whose word on addresses counts.

    - ``exempt``: paths that need no key. They are the application's own (``root_path`` or ``SCRIPT_NAME`` taken
      off), decoded, and never built from ``Host``. A path that could be read in two ways (``//``, ``..``) always
      needs a key.
    - ``required=False``: a request without any key passes as anonymous; a bad key, or an outage, never does.
    - ``everywhere=False``: the guard finds out who calls and refuses nobody. The routes say what they need
      (``require``, or the framework's own way), and there a caller is refused for what the guard found.
    - ``preflight``: ``"pass"`` lets CORS preflight requests (OPTIONS with Origin and
      Access-Control-Request-Method, which browsers send without credentials) through to the app;
      ``"refuse"``, the default, treats them like any other request.
    - ``trusted_proxies``: addresses, CIDR blocks or ``"unix"``, whose ``X-Forwarded-For`` is believed, read from the
      right; without it, or with a value that is no address, the client is unknown.
    """

    def __init__(
        self,
        *,
        exempt: Sequence[str] | None = None,
        required: bool = True,
        everywhere: bool = True,
        preflight: Literal["refuse", "pass"] = "refuse",
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        if not everywhere and (exempt is not None or not required or preflight != "refuse"):
            raise ConfigurationError(
                "everywhere=False refuses nobody: exempt, required=False and preflight have nothing to add to it"
            )
        for option, value in (("exempt", exempt), ("trusted_proxies", trusted_proxies)):
            if isinstance(value, str):
                raise ConfigurationError(f"{option} is a list, as in [{value!r}]")
        if preflight not in ("refuse", "pass"):
            raise ConfigurationError("preflight is 'refuse' or 'pass'")
        self.required = required
        self.everywhere = everywhere
        self.passes_preflight = preflight == "pass"
        self._exempt = Paths("exempt", exempt) if exempt is not None else None
        self._proxies = _proxies(trusted_proxies) if trusted_proxies else None

    @property
    def everything(self) -> bool:
        """Whether all paths are treated alike, so that none need be looked at."""
        return self._exempt is None

    @property
    def believes_proxies(self) -> bool:
        """Whether any proxy's word on addresses counts."""
        return self._proxies is not None

    def guards(self, path: str) -> bool:
        """Tell whether a path needs a key."""
        path = path or "/"
        return self._exempt is None or not is_plain(path) or path not in self._exempt

    def client(self, peer: str, forwarded_for: bytes | None) -> str | None:
        """Return the client's address: the peer's, or the last one before the proxies that are trusted.

        ``forwarded_for`` is X-Forwarded-For, joined by commas; None where there is none, or none that can be
        believed. Return None where the address cannot be known: a trusted proxy is never the client itself.
        """
        if self._proxies is None or not self._proxies.trusts(peer):
            return peer or None
        if forwarded_for is None:
            return None
        address = None
        for hop in reversed(forwarded_for.decode("latin-1").split(",")):
            address = _hop(hop)
            if address is None:
                return None
            if not self._proxies.contains(address):
                break
        return str(address)
