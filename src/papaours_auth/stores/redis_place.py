"""Where a Redis store is: what its URL says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from ..exceptions import ConfigurationError

if find_spec("redis") is None:
    raise ConfigurationError(
        "Redis needs redis-py, which is not installed: pip install 'papaours-auth[redis]'"
    )

_FORM: Final = (
    "a Redis store is written redis://[user:password@]host[:port][/db] (rediss:// with TLS), "
    "redis+cluster://host[:port][,host…] or redis+sentinel://host[:port][,host…]/service[/db], with options "
    "after '?': prefix, timeout, connections, wait_replicas, wait_timeout, tls, ca_certs, certfile, keyfile, "
    "sentinel_username, sentinel_password; a password is percent-encoded"
)


class Node(NamedTuple):
    """A server to ask. Sentinels have credentials and settings of their own."""

    host: str
    port: int
    sentinel: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says."""

    kind: Literal["single", "cluster", "sentinel"]
    nodes: tuple[Node, ...]
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    certificates: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "papaours"
    timeout: float = 0.5
    connections: int = 32
    wait_replicas: int = 0
    wait_timeout: int = 1000

    def settings(self, node: Node) -> dict[str, Any]:  # Any: keyword arguments of redis-py's
        """Give the keyword arguments of a connection to a node."""
        username, password = self.username, self.password
        if node.sentinel:
            username, password = self.sentinel_username, self.sentinel_password
        given: dict[str, Any] = {
            "host": node.host,
            "port": node.port,
            "username": username,
            "password": password,
            "protocol": 2,
            "socket_keepalive": True,
        }
        if not node.sentinel:
            given["db"] = self.db
        if self.tls:
            given |= {f"ssl_{name}": value for name, value in self.certificates.items()}
            given |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
        return given


def place_of(url: str) -> Place:
    """Read a URL. Raises `ConfigurationError`, which quotes nothing of it."""
    try:
        return _place(url)
    except (ValueError, KeyError):
        raise ConfigurationError(_FORM) from None


def _place(url: str) -> Place:
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    username, colon, password = credentials.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    kinds: Mapping[str, Literal["single", "cluster", "sentinel"]] = {
        "redis": "single", "rediss": "single", "redis+cluster": "cluster", "redis+sentinel": "sentinel",
    }  # fmt: skip
    kind = kinds[scheme]
    service, path = _service(path) if kind == "sentinel" else ("", path)
    if kind == "cluster" and path:
        raise ValueError("a cluster has one database")
    nodes = tuple(_node(host, kind == "sentinel") for host in hosts.split(","))
    if kind == "single" and len(nodes) > 1:
        raise ValueError("several hosts")
    return Place(
        kind,
        nodes,
        service,
        int(path or 0),
        unquote(username) or None,
        unquote(password) if colon else None,
        tls=scheme == "rediss" or _switch(options.pop("tls", "no")),
        certificates={
            name: options.pop(name) for name in ("ca_certs", "certfile", "keyfile") if name in options
        },
        **_options(options),
    )


def _service(path: str) -> tuple[str, str]:
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("no service")
    return unquote(service), db


def _node(text: str, sentinel: bool) -> Node:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path or parts.query or parts.fragment:
        raise ValueError("no host")
    return Node(parts.hostname, parts.port or (26379 if sentinel else 6379), sentinel)


def _switch(text: str) -> bool:
    return {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}[text.lower()]


def _options(given: dict[str, str]) -> dict[str, Any]:  # Any: of several types, each checked here
    readers: Mapping[str, Callable[[str], object]] = {
        "prefix": _prefix, "timeout": _seconds, "connections": _count, "wait_replicas": int,
        "wait_timeout": _count, "sentinel_username": str, "sentinel_password": str,
    }  # fmt: skip
    return {name: readers[name](value) for name, value in given.items()}


def _prefix(text: str) -> str:
    # It stands in hash tags and in ACL patterns: no braces, no wildcards, no colons.
    if not 0 < len(text) <= 64 or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in text):
        raise ValueError("prefix")
    return text


def _seconds(text: str) -> float:
    if not 0 < float(text) <= 60:
        raise ValueError("timeout")
    return float(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError("count")
    return int(text)
