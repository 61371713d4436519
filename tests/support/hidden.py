"""`make test BARE=1`: a PATH without any server, as on a machine that has what PyPI brings and no more."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from . import run

SERVERS = (
    *("redis-server", "valkey-server", "redis-sentinel", "mariadb*", "mysql*", "postgres", "initdb", "pg_*"),
    *("memcached", "nginx", "haproxy", "caddy", "envoy", "apache2*", "httpd", "uwsgi*", "wrk*", "docker*"),
)
"""Names of what is hidden. Whatever a new test looks for on the PATH and can do without belongs here."""


def asked_for() -> bool:
    """Whether the servers of this machine are to be hidden."""
    return bool(os.environ.get("PAPAOURS_BARE"))


def which(name: str) -> str | None:
    """Return where a server is: on the PATH, or where Debian keeps them for root alone. Not if they are hidden."""
    places = [*os.get_exec_path(), *(() if asked_for() else ("/usr/sbin", "/usr/local/sbin"))]
    return shutil.which(name, path=os.pathsep.join(places))


def hide() -> None:
    """Where asked for, let the PATH of this process and its children lead to links to everything but servers."""
    folder = run.folder() / "bin"
    if asked_for() and not folder.exists():  # the workers of a run inherit the PATH
        folder.mkdir()
        for place in reversed(os.get_exec_path()):
            _link(Path(place), folder)
        os.environ["PATH"] = str(folder)


def _link(place: Path, folder: Path) -> None:
    """Link what is in a place. What an earlier place has too is linked to last, and wins."""
    for program in place.iterdir() if place.is_dir() else ():
        if not any(fnmatch(program.name, server) for server in SERVERS):
            link = folder / program.name
            link.unlink(missing_ok=True)
            link.symlink_to(program.absolute())
