"""Request targets that something reads in another way than something else."""

from __future__ import annotations

from itertools import product

OPEN = ("/healthz", "/public/", "/public/a")
GUARDED = "contracts"

_BETWEEN = (
    "/..", "/../", "/./", "//", "/%2e%2e/", "/.%2e/", "/%2E%2E%2F", "%2f..%2f", "%5c..%5c", "\\..\\", "/..;/",
    ";/../", "/..%00/", "/..%c0%af", "/%252e%252e/", "%252f..%252f", "/..%ef%bc%8f", "/\u2025/", "/..?/", "#/../",
    "/...//",
)  # fmt: skip
_TAILS = ("/", "//", ".", "%20", "%00", "%0a", "?x", ";x", "/.", "%2f", "x", "+")
TARGETS = sorted(
    {
        # through an open place to a guarded one, and the other way round
        *(f"{place}{between}{GUARDED}" for place, between in product(OPEN, _BETWEEN)),
        *(f"/{GUARDED}{between}{place.strip('/')}" for place, between in product(OPEN, _BETWEEN)),
        # spellings of an open place that a router may take for another route
        *(f"{place}{tail}" for place, tail in product(OPEN, _TAILS)),
        *("//healthz", "///healthz", "/.//healthz", "/HEALTHZ", "/Public/a", "/%68ealthz", "/publi%63/a", "/public"),
        *("/public%2fa", "//public/a", "/public//a", "/pub\u200blic/a", "/public/%2e", "/public/%2e%2e"),
        *("/public/..", "/publicity", "/healthz%ff"),
        # whole addresses, and what is no path
        *(f"http://a.example{path}" for path in ("/healthz", f"/{GUARDED}", "//healthz", f"/public/../{GUARDED}")),
        *(f"http://a.example/healthz@b.example/{GUARDED}", f"//a.example/{GUARDED}", f"//healthz/{GUARDED}", "*"),
        *("healthz", GUARDED),
        # the guarded place alone, however it is written
        *(f"/{GUARDED}", f"/{GUARDED}/", f"//{GUARDED}", f"/./{GUARDED}", f"/{GUARDED}?/healthz", "/", ""),
        f"/{GUARDED};/healthz",
    }
)  # fmt: skip
ROOT = "/api"
ROOTS = (
    "", ROOT, ROOT + ROOT, ROOT + "/", ROOT + "x", ROOT + "/..", ROOT + "%2f", "/API", "//api", "/%61pi",
    "/public" + ROOT, "/healthz" + ROOT, "/public/..", "/publ", "/publi",
)  # fmt: skip
"""What a target begins with behind a server that serves at ``ROOT``."""
