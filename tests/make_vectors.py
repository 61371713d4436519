"""Makes tests/vectors.json with the standard library alone, so that it can disagree with the library.

    python tests/make_vectors.py > tests/vectors.json

The recipe, in full: docs/design/keys.md.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import zlib

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PEPPERS = {"p1": bytes(range(32)), "p2": hashlib.sha512(b"papaours-auth test pepper").digest()}
INSTALLATION = "00112233445566778899aabbccddeeff"
HEADS = ["pk_prod_", "pk_test_", "pk_dev_", "pk_staging_", "pk_prod_export_", "pk_prod_cf_export_"]
RANDOMS = ["0" * 24, "z" * 24, "abcDEF123456ghiJKL789012"]
FOREIGN = ["pk_prod_abc123def456ghi789", "pk_prod_export_a1b2c3d4e5f6", "pk_test_consultation_x9y8z7w6v5u4"]


def hkdf(pepper: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes out: one round of expansion."""
    extracted = hmac.new(bytes(32), pepper, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def base62(value: int, width: int) -> str:
    text = ""
    while value:
        text = ALPHABET[value % 62] + text
        value //= 62
    return text.rjust(width, "0")


def mac(pepper: bytes, use: str, message: str) -> bytes:
    key = hkdf(pepper, f"papaours-auth/v1/{use}".encode())
    return hmac.new(key, message.encode(), hashlib.sha256).digest()


def minted(pepper: bytes, tagged: str) -> dict[str, str | int]:
    tag = int.from_bytes(mac(pepper, "tag", tagged)[:4], "big")
    checked = tagged + base62(tag, 6)
    checksum = zlib.crc32(checked.encode())
    key = checked + base62(checksum, 6)
    return {"key": key, "tag": tag, "checksum": checksum, "digest": mac(pepper, "digest", key).hex()}


def make() -> dict[str, object]:
    return {
        id_: {
            "pepper": pepper.hex(),
            "installation": INSTALLATION,
            "proof": mac(pepper, "check", INSTALLATION).hex(),
            "minted": [minted(pepper, head + random) for head in HEADS for random in RANDOMS],
            "foreign": [{"key": key, "digest": mac(pepper, "digest", key).hex()} for key in FOREIGN],
        }
        for id_, pepper in PEPPERS.items()
    }


if __name__ == "__main__":
    json.dump(make(), sys.stdout, indent=1)
    sys.stdout.write("\n")
