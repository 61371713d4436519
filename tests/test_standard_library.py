"""Verification needs the standard library alone, so that it works in every interpreter of a process.

mod_wsgi runs each site of an Apache process in an interpreter of its own, and `cryptography` can be imported in the
first of a process only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from conftest import PEPPER
from papaours_auth import Keys, PepperRing, open_store
from papaours_auth.digest import hkdf_sha256
from support.alone import run_alone

SEED = "pk_prod_abc123def456ghi789"

ONLY_STANDARD = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"papaours_auth"}:
            raise ImportError(f"{name} is not in the standard library")

for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
    del sys.modules[name]
sys.meta_path.insert(0, Refusing())
"""

VERIFYING = """
import asyncio
import papaours_auth.asgi, papaours_auth.wsgi

async def asgi_app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["papaours"].key.name.encode()})

async def ask_asgi(key):
    sent = []
    async def send(message):
        sent.append(message)
    async def receive():
        return {"type": "http.request"}
    guard = papaours_auth.asgi.PapaoursAuthMiddleware(asgi_app, environment="prod")
    headers = [(b"x-api-key", key.encode())]
    await guard({"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send)
    await guard.aclose()
    return sent[0]["status"], sent[1]["body"]

def wsgi_app(environ, start_response):
    start_response("200 OK", [])
    return [environ["papaours.identity"].key.name.encode()]

def ask_wsgi(key):
    status = []
    guard = papaours_auth.wsgi.PapaoursAuthMiddleware(wsgi_app, environment="prod")
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_X_API_KEY": key, "REMOTE_ADDR": ""}
    body = b"".join(guard(environ, lambda line, headers, exc_info=None: status.append(int(line[:3]))))
    guard.authenticator.close()
    return status[0], body

def verify(minted):
    foreign = "pk_prod_abc123def456ghi789"
    for key, name in ((minted, b"Production - Facturation"), (foreign, b"Production - Ancienne")):
        for status, body in (asyncio.run(ask_asgi(key)), ask_wsgi(key)):
            assert (status, body) == (200, name), (status, body)
    forged = minted[:-1] + ("0" if minted[-1] != "0" else "1")
    assert ask_wsgi(forged)[0] == asyncio.run(ask_asgi(forged))[0] == 401
"""


@pytest.fixture
def preamble(tmp_path: Path, ring: PepperRing) -> str:
    """Code that puts the store and the pepper into the environment and defines ``verify`` and ``minted``."""
    url = f"sqlite:///{tmp_path}/keys.db"
    store = open_store(url, create=True)
    keys = Keys(store, peppers=ring)
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    minted = keys.create_key(machine.id, name="Production - Facturation", environment="prod").secret.reveal()
    keys.import_key(machine.id, SEED, name="Production - Ancienne")
    store.close()
    environ = {"PAPAOURS_STORE": url, "PAPAOURS_PEPPER": PEPPER}
    return f"import os\nos.environ |= {environ!r}\nminted = {minted!r}\n{VERIFYING}"


def test_keys_are_verified_by_the_standard_library_alone(preamble: str) -> None:
    run_alone(f"{ONLY_STANDARD}\n{preamble}\nverify(minted)")


def test_importing_the_package_does_not_import_cryptography() -> None:
    run_alone(
        "import papaours_auth, papaours_auth.asgi, papaours_auth.wsgi, papaours_auth.cli, sys\n"
        "assert 'cryptography' not in sys.modules"
    )


IN_A_SECOND_INTERPRETER = """
import traceback

def in_a_second_interpreter(code):
    told = os.environ["TOLD"]
    code += "\\nimport gc, threading\\ngc.collect()\\n"  # an interpreter ends when its threads have
    code += "[thread.join(30) for thread in threading.enumerate() if thread.name.startswith('papaours')]"
    wrapped = f"import traceback\\ntry:\\n    exec({code!r}, {{}})"
    wrapped += "\\nexcept BaseException:\\n    said = traceback.format_exc()"
    wrapped += f"\\nelse:\\n    said = 'done'\\nopen({told!r}, 'w').write(said)"
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
        interpreters.run_string(interpreters.create(isolated=False), wrapped)
    else:
        interpreters.exec(interpreters.create("legacy"), wrapped)
    said = open(told).read()
    assert said == "done", said
"""


def test_keys_are_verified_in_a_second_interpreter_of_the_process(preamble: str, tmp_path: Path) -> None:
    """Which has modules of its own, as mod_wsgi's sites do."""
    told = f"import os\nos.environ['TOLD'] = {str(tmp_path / 'told')!r}\n"
    code = f"{preamble}\nverify(minted)"
    run_alone(f"{told}{code}\n{IN_A_SECOND_INTERPRETER}\nin_a_second_interpreter({code!r})")


# RFC 5869, appendix A: the test cases of SHA-256.
CASES = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        42,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        82,
        (
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87"
        ),
    ),
    (
        "0b" * 22,
        "",
        "",
        42,
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "length", "wanted"), CASES)
def test_subkeys_are_derived_as_rfc_5869_says(
    secret: str, salt: str, info: str, length: int, wanted: str
) -> None:
    made = hkdf_sha256(bytes.fromhex(secret), bytes.fromhex(info), length, salt=bytes.fromhex(salt))
    assert made.hex() == wanted


@given(
    secret=st.binary(min_size=1, max_size=200), info=st.binary(max_size=100), length=st.integers(1, 255 * 32)
)
def test_subkeys_are_derived_as_cryptography_derives_them(secret: bytes, info: bytes, length: int) -> None:
    oracle = HKDF(algorithm=SHA256(), length=length, salt=None, info=info)
    assert hkdf_sha256(secret, info, length) == oracle.derive(secret)


@pytest.mark.parametrize("length", [0, 255 * 32 + 1])
def test_a_subkey_longer_than_rfc_5869_allows_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 8160 bytes"):
        hkdf_sha256(b"secret", b"", length)
