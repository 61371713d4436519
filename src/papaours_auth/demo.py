"""``papaours-auth demo``: two real servers behind real keys, called over HTTP, and a key revoked under load.

Everything it makes lives in one temporary folder and is gone afterwards. It uses the command line, as an
administrator would, and the two apps of ``examples/``.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from . import cli_streams as streams
from .exceptions import ConfigurationError
from .keys import Keys

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
PROMISE_SECONDS: Final = 2.0
"""The middlewares' default ``max_staleness``: what the demonstration holds the revocation to."""
AFTERWARDS: Final = 200
"""Calls made after the first refusal: the key must never come back."""
_NEEDED: Final = ("starlette", "uvicorn", "werkzeug", "waitress")


@dataclass(frozen=True)
class _Server:
    """A server under way, by the words a person reads."""

    name: str
    port: int

    def call(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        """Make one HTTP request and give its status and, where there is one, the refusal's code."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            return response.status, _code(response.getheader("Content-Type"), response.read())
        finally:
            connection.close()


def _code(content_type: str | None, body: bytes) -> str:
    return str(json.loads(body)["code"]) if content_type == "application/problem+json" else ""


@dataclass(frozen=True)
class _Case:
    """A request in plain words, and the answer that is right."""

    words: str
    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    path: str = "/contracts"


def run(*, keep: bool) -> int:
    """Run the demonstration and give 0, or 1 where any answer is not the right one."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the demonstration needs {', '.join(missing)}: pip install 'papaours-auth[demo]'"
        )
    with ExitStack() as stack:
        # Asked to stop, it stops its servers too.
        former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        stack.callback(signal.signal, signal.SIGTERM, former)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="papaours-demo-")))
        administrator = _Administrator(folder)
        keys = _prepare(administrator)
        servers = [
            _serve(stack, administrator.environ, "ASGI (uvicorn)", _uvicorn),
            _serve(stack, administrator.environ, "WSGI (waitress)", _waitress),
        ]
        right = _call_both(servers, _cases(keys)) & _revoke(administrator, servers, keys["production"])
        _say(
            "\nEvery answer was the right one."
            if right
            else "\nAn answer was wrong: see the lines marked WRONG."
        )
        if keep:
            _keep(administrator, servers)
        return 0 if right else 1


class _Administrator:
    """Someone at a shell, elsewhere: every command is a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = os.environ | {
            "PAPAOURS_STORE": f"sqlite:///{folder / 'papaours.db'}",
            "PAPAOURS_PEPPER_FILE": str(folder / "papaours.pepper"),
        }
        self.environ.pop("PAPAOURS_PEPPER", None)

    @property
    def store(self) -> str:
        return self.environ["PAPAOURS_STORE"]

    def command(self, *words: str) -> str:
        """Run ``papaours-auth …``, showing it, and give what it printed."""
        _say("$ papaours-auth " + " ".join(f"'{word}'" if " " in word else word for word in words))
        done = subprocess.run(  # noqa: S603 - our own command, without a shell
            [sys.executable, "-m", "papaours_auth", *words],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ConfigurationError(
                f"the demonstration's own command failed ({done.returncode}): {done.stderr}"
            )
        return done.stdout.strip()


def _prepare(administrator: _Administrator) -> dict[str, str]:
    """Make a store, a machine and three keys. Gives their texts by what each is for."""
    _say("An administrator makes a store, a machine with one right, and three keys:\n")
    administrator.command("init")
    machine = "Service de facturation"
    administrator.command(
        "machine", "create", machine, "--organisation", "cfa-lyon", "--right", "contrats:lecture"
    )
    keys = {
        use: administrator.command(
            "key", "create", "--machine", machine, "--name", name, "--env", environment, "--quiet"
        )
        for use, name, environment in (
            ("production", "Production - Service Facturation", "prod"),
            ("test", "Test - Service Facturation", "test"),
            ("inactive", "Production - Service Facturation v1", "prod"),
        )
    }
    administrator.command("key", "disable", "Production - Service Facturation v1")
    for use, key in keys.items():
        path = administrator.folder / f"{use}.key"
        path.touch(mode=0o600)
        path.write_text(key, encoding="ascii")
    return keys


def _cases(keys: Mapping[str, str]) -> list[_Case]:
    production = keys["production"]
    forged = production[:-1] + ("0" if production[-1] != "0" else "1")
    return [
        _Case("the health check, which is exempt, without a key", 200, path="/healthz"),
        _Case("no key at all", 401, "missing_key"),
        _Case("the production key, Authorization: Bearer", 200, headers=_bearer(production)),
        _Case("the production key, X-API-KEY", 200, headers={"X-API-KEY": production}),
        _Case(
            "the same in other cases: authorization: bEaReR",
            200,
            headers={"authorization": f"bEaReR {production}"},
        ),
        _Case("the same key in both headers", 200, headers=_bearer(production) | {"x-api-key": production}),
        _Case(
            "two different keys",
            400,
            "ambiguous_credentials",
            _bearer(production) | {"X-API-KEY": keys["test"]},
        ),
        _Case("the production key with its last character changed", 401, "malformed_key", _bearer(forged)),
        _Case("a key nobody ever made", 401, "unknown_key", {"X-API-KEY": "pk_prod_0123456789abcdef"}),
        _Case("the test key, on this production app", 401, "wrong_environment", _bearer(keys["test"])),
        _Case("the inactive key", 401, "key_inactive", _bearer(keys["inactive"])),
        _Case(
            "a right the machine lacks: deleting a contract",
            403,
            headers=_bearer(production),
            method="DELETE",
            path="/contracts/C-2026-001",
        ),
    ]


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _call_both(servers: Sequence[_Server], cases: Sequence[_Case]) -> bool:
    _say("\nTwo apps are up, both behind keys. Each request goes to both:\n")
    rows = [("request", "expected", *(server.name for server in servers), "")]
    right = True
    for case in cases:
        answers = [server.call(case.method, case.path, case.headers) for server in servers]
        as_expected = all(answer == (case.status, case.code) for answer in answers)
        right &= as_expected
        got = (_words(*answer) for answer in answers)
        rows.append((case.words, _words(case.status, case.code), *got, "" if as_expected else "WRONG"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return right


def _words(status: int, code: str) -> str:
    return f"{status} {code}".strip()


class _Caller(threading.Thread):
    """Calls one server with one key as fast as it answers, until the key was refused long enough."""

    def __init__(self, server: _Server, key: str) -> None:
        super().__init__(name=f"demo-{server.port}", daemon=True)
        self.server = server
        self.accepted = 0
        self.refused_at = 0.0
        self.accepted_again = 0
        self.failure = ""
        self.giving_up = threading.Event()
        self._key = key

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            afterwards = 0
            while afterwards < AFTERWARDS and not self.giving_up.is_set():
                connection.request("GET", "/contracts", headers=_bearer(self._key))
                response = connection.getresponse()
                answer = response.status, _code(response.getheader("Content-Type"), response.read())
                self._count(answer)
                afterwards += bool(self.refused_at)
        except (OSError, http.client.HTTPException) as error:
            self.failure = type(error).__name__
        finally:
            connection.close()

    def _count(self, answer: tuple[int, str]) -> None:
        if answer == (200, ""):
            self.accepted += 1
            self.accepted_again += bool(self.refused_at)
        elif answer == (401, "key_inactive"):
            self.refused_at = self.refused_at or time.time()
        else:
            self.failure = _words(*answer)


def _revoke(administrator: _Administrator, servers: Sequence[_Server], key: str) -> bool:
    """Disable a key in another process while both apps are called with it. Gives whether all held."""
    _say(
        "\nBoth apps are now called with the production key as fast as they answer. Elsewhere, somebody types:\n"
    )
    callers = [_Caller(server, key) for server in servers]
    for caller in callers:
        caller.start()
    _wait_for(lambda: all(caller.accepted >= AFTERWARDS or caller.failure for caller in callers))
    administrator.command("key", "disable", "Production - Service Facturation")
    for caller in callers:
        caller.join(PROMISE_SECONDS + 10)
        caller.giving_up.set()
    with Keys(administrator.store) as keys:
        stored = keys.key("Production - Service Facturation")
        disabled_at = keys.journal(stored.id)[0].at.timestamp()
    _say("")
    return all([_report(caller, disabled_at) for caller in callers]) & (stored.status == "inactive")  # noqa: C419 - all speak


def _report(caller: _Caller, disabled_at: float) -> bool:
    name = caller.server.name
    if caller.failure or not caller.refused_at:
        _say(f"{name}: WRONG, {caller.failure or 'the key is still accepted'}")
        return False
    milliseconds = (caller.refused_at - disabled_at) * 1000
    in_time = milliseconds <= PROMISE_SECONDS * 1000
    _say(
        f"{name}: {caller.accepted} calls accepted, then refused {milliseconds:.0f} ms after it was disabled "
        f"(promised: {PROMISE_SECONDS * 1000:.0f}), and accepted {caller.accepted_again} times in the "
        f"{AFTERWARDS} calls after that{'' if in_time and not caller.accepted_again else '  WRONG'}"
    )
    return in_time and not caller.accepted_again


# servers


def _uvicorn(port: int) -> list[str]:
    return ["uvicorn", "asgi_app:app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]


def _waitress(port: int) -> list[str]:
    return ["waitress", f"--listen=127.0.0.1:{port}", "wsgi_app:app"]


def _serve(
    stack: ExitStack, environ: Mapping[str, str], name: str, command: Callable[[int], list[str]]
) -> _Server:
    """Start a server of the example apps, wait until it answers, and stop it with the stack."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - the stack closes it
    process = subprocess.Popen(  # noqa: S603 - our own apps, without a shell
        [sys.executable, "-m", *command(port)],
        env={**environ, "PYTHONPATH": str(_examples())},
        stderr=log,
    )
    stack.callback(_stop, process)
    server = _Server(name, port)
    _wait_for(lambda: process.poll() is not None or _answers(server))
    if process.poll() is not None:
        log.seek(0)
        raise ConfigurationError(f"the demonstration's {name} server did not start:\n{log.read()}")
    return server


def _examples() -> Path:
    """Find the example apps: in the wheel beside this file, in a clone in ``examples/``."""
    here = Path(__file__).resolve()
    for folder in (here.with_name("_examples"), here.parents[2] / "examples"):
        if (folder / "asgi_app.py").is_file():
            return folder
    raise ConfigurationError("the example apps are not installed: run the demonstration from a clone")


def _answers(server: _Server) -> bool:
    try:
        return server.call("GET", "/healthz", {})[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ConfigurationError(f"the demonstration's servers did not answer in {START_SECONDS:.0f} s")
        time.sleep(0.02)


def _keep(administrator: _Administrator, servers: Sequence[_Server]) -> None:
    """Leave the servers up until somebody presses Ctrl-C, and say how to call them."""
    administrator.command("key", "enable", "Production - Service Facturation")
    _say("\nThe key is active again, and the servers stay up. To try, in another shell:\n")
    for server in servers:
        url = f"http://127.0.0.1:{server.port}/contracts"
        for use, header in (("production", "Authorization: Bearer "), ("test", "X-API-KEY: ")):
            _say(f'curl -i -H "{header}$(cat {administrator.folder / use}.key)" {url}')
    _say(
        f"\nTo administer them:\n\nexport PAPAOURS_STORE={administrator.store} "
        f"PAPAOURS_PEPPER_FILE={administrator.environ['PAPAOURS_PEPPER_FILE']}\n"
        f"{sys.executable} -m papaours_auth key list\n\nCtrl-C stops the servers and removes everything."
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        _say("")


def _say(text: str) -> None:
    streams.out(text)
    streams.flush()  # a person watches it happen
