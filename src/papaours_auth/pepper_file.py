"""The file a pepper is kept in: it is made for its owner alone, and read only while that is so."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Final

from .exceptions import ConfigurationError

_LONGEST: Final = 1 << 16
"""Bytes. A device or a database given by mistake is not read to its end."""
_OWNER_ALONE: Final = 0o077
_GROUP_MAY_READ: Final = 0o027


def read_pepper_file(path: str | Path) -> str:
    """Return a pepper file's text. Raises `ConfigurationError` where it cannot be read, or others may read it.

    The rule is the one PostgreSQL has for its private keys: the file is its owner's alone (0600), or root's and
    readable by a group (0640). A file on a read-only mount is taken as it is: containers mount their secrets
    so, for the one user they have, and its mode could not be changed from inside.
    """
    try:
        with Path(path).open("rb") as file:
            exposed = _exposed(file.fileno())
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise ConfigurationError(
                f"the pepper file {path} is longer than {_LONGEST} bytes: it is another file"
            )
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the pepper file {path} cannot be read ({_reason(error)}): "
            "check PAPAOURS_PEPPER_FILE and the file's owner"
        ) from None
    if exposed:
        raise ConfigurationError(
            f"the pepper file {path} {exposed}: chmod 600 {shlex.quote(str(path))}, "
            "and make a new pepper if somebody did"
        )
    return text


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _exposed(descriptor: int) -> str:
    """Return in words who else may read an open file; nothing where nobody may."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
        return ""
    reader = os.geteuid()
    if reader not in (0, status.st_uid) and status.st_uid != 0:
        return "belongs to another user, who may read it: chown it to the user who runs the app"
    if status.st_mode & (_GROUP_MAY_READ if status.st_uid == 0 else _OWNER_ALONE):
        return f"may be read by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def write_pepper_file(path: Path, text: str) -> None:
    """Make a pepper file, 0600, whole or not at all. Raises `ConfigurationError`, also where it is there already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        raise _not_made(path, error) from None
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _not_made(path, error) from None


def _not_made(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the pepper file {path} cannot be made ({error.strerror}): check the folder and its owner"
    )


def advice_on_git(path: Path) -> str | None:
    """Return what to do so that Git leaves a file alone; None where it does, or no work tree is around it."""
    tree = next((folder for folder in path.parents if (folder / ".git").exists()), None)
    if tree is None or _ignored(path):
        return None
    line = "/" + "".join(f"\\{c}" if c in "\\*?[ " else c for c in path.relative_to(tree).as_posix())
    return (
        f"{path} is inside a Git work tree that does not ignore it, so it could be committed. "
        f"Add it to {tree}/.gitignore:\n"
        f"  printf '%s\\n' {shlex.quote(line)} >> {shlex.quote(str(tree / '.gitignore'))}"
    )


def _ignored(path: Path) -> bool:
    """Whether Git says that it ignores a file. Without a Git that can say so: no."""
    git = shutil.which("git")
    if git is None:
        return False
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A work tree's own settings can name programs to run for its index: they are not needed here.
    command = [
        git,
        "-C",
        str(path.parent),
        "-c",
        "core.fsmonitor=false",
        "check-ignore",
        "-q",
        "--",
        path.name,
    ]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
