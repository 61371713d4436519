"""What the house promises of its own source: read from it, not remembered."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import papaours_auth
from papaours_auth import Reason
from papaours_auth.http import status_of

SOURCE = Path(papaours_auth.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if "_examples" not in path.parts)
NAMES = {path: str(path.relative_to(SOURCE)) for path in FILES}

# From the inside out (design 2). A module may import from its own layer and those before it.
LAYERS = [
    {"exceptions.py", "_fork.py", "_locks.py", "_patience.py", "_threads.py", "names.py"},
    {"format.py", "digest.py", "model.py", "pepper_file.py", "verify.py", "http.py"},
    {
        "stores/__init__.py",
        "stores/records.py",
        "stores/memory.py",
        "stores/sqlite.py",
        "stores/sqlite_wal.py",
        "stores/redis.py",
        "stores/redis_feed.py",
        "stores/redis_layout.py",
        "stores/redis_errors.py",
        "stores/redis_place.py",
        "stores/redis_questions.py",
        "stores/redis_router.py",
        "stores/redis_wire.py",
        "stores/sql_level.py",
        "stores/sql_questions.py",
        "stores/sql_lock.py",
        "stores/sql_tables.py",
        "stores/sql_psycopg.py",
        "stores/sql_drivers.py",
        "stores/sql.py",
        "cache.py",
        "watcher.py",
        "usage/__init__.py",
        "usage/alert_table.py",
        "usage/alerts.py",
        "usage/courier.py",
        "usage/event.py",
        "usage/history.py",
        "usage/layout.py",
        "usage/ledger.py",
        "usage/ledger_sql.py",
        "usage/ledger_sqlite.py",
        "usage/memory.py",
        "usage/meter.py",
        "usage/mix.py",
        "usage/metrics.py",
        "usage/novelty.py",
        "usage/opentelemetry.py",
        "usage/prometheus.py",
        "usage/questions.py",
        "usage/reader.py",
        "usage/recorder.py",
        "usage/redis.py",
        "usage/repetition.py",
        "usage/rhythm.py",
        "usage/rollup.py",
        "usage/signs.py",
        "usage/sinks.py",
        "usage/spool.py",
        "usage/spooled.py",
        "usage/sql.py",
        "usage/sql_tables.py",
        "usage/sqlite.py",
        "usage/tally.py",
        "usage/watch.py",
    },
    {
        "outage.py",
        "authenticator.py",
        "keys.py",
        "testing.py",
        "throttle.py",
        "throttle_redis.py",
        "throttle_storage.py",
    },
    {"__init__.py", "_middleware.py", "readiness.py"},
    {
        "_asgi_guard.py",
        "_asgi_answer.py",
        "_asgi_lifespan.py",
        "_asgi_paths.py",
        "asgi.py",
        "wsgi.py",
        "_wsgi_answer.py",
        "_wsgi_body.py",
    },
    {
        "starlette.py",
        "fastapi.py",
        "flask.py",
        "cli.py",
        "cli_signs.py",
        "cli_streams.py",
        "cli_usage.py",
        "demo.py",
        "__main__.py",
    },
]
CARRIERS = [
    "stores/redis_errors.py",
    "stores/redis_place.py",
    "stores/redis_router.py",
    "stores/redis_wire.py",
]
RENDERERS = [
    "asgi.py",
    "_asgi_guard.py",
    "_asgi_answer.py",
    "wsgi.py",
    "_wsgi_answer.py",
    "starlette.py",
    "fastapi.py",
    "flask.py",
    "_middleware.py",
]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Name the modules of ours that a file imports, as in `LAYERS`."""
    package = path.relative_to(SOURCE).parent
    module = tree(path)
    for_types = {
        id(node)
        for test in ast.walk(module)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            base = (SOURCE / package).joinpath(*[".."] * (node.level - 1)).resolve()
            target = base.joinpath(*(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                for found in (target / f"{alias.name}.py", target.with_suffix(".py"), target / "__init__.py"):
                    if found.is_file():
                        yield str(found.relative_to(SOURCE))
                        break


def layer(name: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_point_one_way(path: Path) -> None:
    here = layer(NAMES[path])
    outward = [name for name in imported(path) if layer(name) > here]
    assert outward == []


def test_the_layers_name_every_file_and_no_other() -> None:
    assert set().union(*LAYERS) == set(NAMES.values())


def test_importing_the_package_imports_no_framework_and_no_driver() -> None:
    code = "import papaours_auth, sys; print(*sys.modules)"
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=unmeasured, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.partition(".")[0] for name in loaded}
    assert not top & {
        "starlette",
        "fastapi",
        "flask",
        "werkzeug",
        "sqlite3",
        "redis",
        "sqlalchemy",
        "psycopg",
        "pymysql",
        "uvicorn",
        "anyio",
        "limits",
        "prometheus_client",
        "opentelemetry",
    }
    assert not {name for name in loaded if name.startswith("papaours_auth.stores.") and "records" not in name}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_no_file_asserts_swallows_or_blocks_a_loop(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: python -O would drop it"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "asyncio.run" or path.name == "testing.py", f"line {node.lineno}"
            assert called != "time.sleep" or path.name == "demo.py", f"line {node.lineno}"


@pytest.mark.parametrize("name", RENDERERS)
def test_one_table_turns_a_reason_into_a_status(name: str) -> None:
    numbers = {node.value for node in ast.walk(tree(SOURCE / name)) if isinstance(node, ast.Constant)}
    assert not {number for number in numbers if isinstance(number, int) and 200 <= number < 600}


def test_every_reason_has_its_row() -> None:
    assert {reason: status_of(reason) for reason in Reason} == {
        Reason.MISSING_KEY: 401,
        Reason.MALFORMED_KEY: 401,
        Reason.AMBIGUOUS_CREDENTIALS: 400,
        Reason.UNKNOWN_KEY: 401,
        Reason.WRONG_ENVIRONMENT: 401,
        Reason.KEY_INACTIVE: 401,
        Reason.KEY_EXPIRED: 401,
        Reason.MACHINE_INACTIVE: 401,
        Reason.NETWORK_NOT_ALLOWED: 403,
        Reason.INSUFFICIENT_RIGHTS: 403,
        Reason.TOO_MANY_FAILURES: 429,
        Reason.STORE_UNAVAILABLE: 503,
    }


SECRET_WORDS = ("digest", "secret", "proof", "presented", "bearer", "pepper", "subkey")
PLAIN = ("_id", ".id")  # an id is no secret


def secrets_compared(module: ast.Module) -> list[str]:
    """Find comparisons by ``==`` whose sides are named like secrets; with a literal there is nothing to guess."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        named = [ast.unparse(side).lower() for side in sides]
        if (
            any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops)
            and not any(isinstance(side, ast.Constant) for side in sides)
            and any(word in side for word in SECRET_WORDS for side in named if not side.endswith(PLAIN))
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_pitfall_07_no_secret_is_compared_with_equals(path: Path) -> None:
    """CVE-2025-59425: `==` on secrets stops at the first byte that differs."""
    assert secrets_compared(tree(path)) == []


def test_pitfall_07_the_check_finds_what_it_is_for() -> None:
    assert secrets_compared(ast.parse("entry.digest == digest"))
    assert secrets_compared(ast.parse("if a != claim.pepper: pass"))
    assert not secrets_compared(ast.parse("a.pepper_id == b; digest is None"))


def test_pitfall_06_statements_are_made_of_our_own_words_alone() -> None:
    """CVE-2026-42208: a credential in a statement. Here only names of columns and question marks are put in."""
    allowed = {
        "', '.join(KEY_COLUMNS)", "', '.join(MACHINE_COLUMNS)", "', '.join(columns)", "marks", "table",
        "settings", "where",
        "_KEYS", "_MACHINES", "_TIP", "_TOLD", "SCHEMA_VERSION", "_MMAP_BYTES",
    }  # fmt: skip
    words = ("select ", "insert ", "update ", "delete ", "pragma ")
    for node in ast.walk(tree(SOURCE / "stores" / "sqlite.py")):
        if isinstance(node, ast.JoinedStr):
            text = (
                "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
                .lstrip()
                .lower()
            )
            if text.startswith(words):
                put_in = {
                    ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)
                }
                assert put_in <= allowed, f"line {node.lineno}: {put_in - allowed}"


def test_pitfall_24_nothing_on_the_request_path_can_administer() -> None:
    """CVE-2025-61928: keys made with a key. Verifiers import no `keys`, and call only what reads."""
    for name in ("authenticator.py", "cache.py", "watcher.py", "verify.py", *RENDERERS):
        assert "keys.py" not in set(imported(SOURCE / name)), name
    reading = {"lookup", "describe", "feed", "close", "aclose", "sync"}
    for name in ("authenticator.py", "watcher.py", *RENDERERS):
        for node in ast.walk(tree(SOURCE / name)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(
                ("_store", "_async_store", "_feed")
            ):
                assert node.attr in reading | {"read", "wait", "wake"}, f"{name}:{node.lineno} {node.attr}"


def test_pitfall_14_usage_cannot_reach_a_status() -> None:
    """It imports no store and no administration, and its statements name tables of its own alone.

    What carries commands to Redis knows of no record; test_usage_redis.py has the server itself hold us to our names.
    """
    for name in (name for name in NAMES.values() if name.startswith("usage/")):
        reached = {
            found for found in imported(SOURCE / name) if found == "keys.py" or found.startswith("stores/")
        }
        # What makes engines and what carries commands: none of them knows a key.
        assert reached <= {
            "stores/sqlite_wal.py",
            "stores/sql_drivers.py",
            "stores/sql_level.py",
            "stores/sql_questions.py",
            "stores/sql_lock.py",
            *CARRIERS,
        }, name
    following = {"into", "update", "from", "exists", "on"}
    for name in ("alert_table.py", "layout.py", "ledger_sqlite.py", "sqlite.py", "watch.py"):
        words = (SOURCE / "usage" / name).read_text(encoding="utf-8").split()
        tables = {after for word, after in pairwise(words) if word.strip('"') in following and "_" in after}
        assert tables
        assert all(
            table.startswith(("usage_", "sqlite_schema", "__future__", ".._fork", "..stores.sqlite_wal"))
            for table in tables
        ), name


@pytest.mark.parametrize("name", sorted({name for name in NAMES.values() if not name.startswith("_")}))
def test_every_public_name_says_what_it_is_for(name: str) -> None:
    module = tree(SOURCE / name)
    assert ast.get_docstring(module), "the file"
    for node in module.body:
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_front_door_is_sorted_and_every_name_on_it_exists() -> None:
    assert sorted(papaours_auth.__all__) == papaours_auth.__all__
    front = importlib.import_module("papaours_auth")
    assert all(hasattr(front, name) for name in papaours_auth.__all__)


PATCHABLE = {"threading", "queue", "_thread", "time", "select", "selectors", "socket"}
WAITING = {
    "Lock",
    "RLock",
    "Condition",
    "Event",
    "Semaphore",
    "BoundedSemaphore",
    "Barrier",
    "Thread",
    "SimpleQueue",
    "Queue",
}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_pitfall_46_nothing_that_waits_is_made_or_named_while_modules_are_imported(path: Path) -> None:
    """gevent may patch the interpreter later: what a module has by then is of the old kind for ever."""
    tree = ast.parse(path.read_text())
    named = [
        f"{node.lineno}: from {node.module} import {name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in PATCHABLE
        for name in node.names
        if name.name in WAITING
    ]
    assert not named
    made = [
        ast.unparse(call)
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in _calls_at_import(statement)
        if isinstance(call.func, ast.Attribute) and call.func.attr in WAITING
    ]
    assert not made


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Give the calls of a statement that run with it: not those in functions."""
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _calls_at_import(child)
