"""Every command, and every way its standard streams and surroundings can fail: exit code and words stay true.

The commands are those that the parser has: a new one is here by construction.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from papaours_auth import Keys, StoreUnavailable, cli, open_store
from papaours_auth import cli_streams as streams
from papaours_auth.digest import new_pepper, peppers_from_environment
from papaours_auth.usage import Batch, Event
from papaours_auth.usage.sqlite import SQLiteSink
from papaours_auth.usage.watch import Watch
from support.commands import CLOSED, NO_READER, Commands, Done, commands, leaves

pytestmark = pytest.mark.slow

MACHINE, KEY = "Service de facturation", "Production - Service Facturation"
SEED = "pk_prod_abc123def456ghi789"
FULL = "/dev/full"

COMMANDS = dict(leaves(cli._parser()))
ADMINISTRATION = [words for words in COMMANDS if words[0] in ("init", "doctor", "key")]
SAMPLES = {
    "machine": MACHINE, "key": KEY, "name": "Production - Portail Partenaires", "organisation": "cfa-lyon",
    "env": "prod", "alert": "1",
}  # fmt: skip
"""What is typed for an argument that must be given."""
MORE: dict[tuple[str, ...], list[str]] = {
    ("usage", name): ["--machine", MACHINE] for name in ("series", "routes", "addresses")
}
"""What a command needs besides, for all that its parser knows."""
READS_A_KEY = {("key", "import"), ("key", "verify")}
CHANGES = {
    ("init",), ("machine", "create"), ("machine", "disable"), ("machine", "enable"),
    ("key", "create"), ("key", "rotate"), ("key", "import"), ("key", "rename"), ("key", "disable"), ("key", "enable"),
    ("signs", "mute"), ("signs", "unmute"),
}  # fmt: skip
NOTHING_LEFT_TO_DO = {("init",), ("machine", "enable"), ("key", "enable"), ("signs", "unmute")}
"""Of these: what they bring about is so already where they are tried."""
SHOWS_A_KEY = {("key", "create"), ("key", "rotate")}
VERDICTS = {("doctor",), ("key", "verify")}

needs_full = pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no /dev/full")
every_command = pytest.mark.parametrize(
    "words", [words for words in COMMANDS if words != ("demo",)], ids=" ".join
)


def typed(words: Sequence[str]) -> list[str]:
    """What a person types for a command: its words, and every argument that must be given."""
    given = list(words)
    for action in COMMANDS[tuple(words)]:
        if action.required and action.nargs != "?":
            sample = SAMPLES[action.dest]  # a new argument needs a sample above
            given += [action.option_strings[-1], sample] if action.option_strings else [sample]
    return given + MORE.get(tuple(words), [])


class Place(NamedTuple):
    """A folder with a store, its pepper and recorded usage, all of which one command may change."""

    folder: Path
    run: Commands
    environ: Mapping[str, str]

    def __call__(self, words: Sequence[str], **streams: str) -> Done:
        streams.setdefault("stdin", str(self.folder / ("new.key" if "import" in words else "known.key")))
        return self.run(*typed(words), cwd=self.folder, environ=self.environ, **streams)

    def state(self) -> tuple[int, ...]:
        """How many changes were ever made here."""
        counts = []
        for file, table in (("papaours.db", "changes"), ("usage.db", "usage_alerts where muted_until > 0")):
            with closing(sqlite3.connect(f"file:{self.folder / file}?mode=ro", uri=True)) as connection:
                counts += connection.execute(f"select count(*) from {table}").fetchone()
        return tuple(counts)

    def keys(self) -> dict[str, str]:
        """Name every key's status."""
        with closing(sqlite3.connect(self.folder / "papaours.db")) as connection:
            return dict(connection.execute("select id, status from keys").fetchall())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands(tmp_path_factory.mktemp("streams")) as run:
        yield run


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each test gets a copy of: two keys, calls by one of them, and an alert."""
    folder = tmp_path_factory.mktemp("estate")
    pepper = folder / "papaours.pepper"
    pepper.write_text(new_pepper())
    pepper.chmod(0o600)
    url = f"sqlite:///{folder}/papaours.db"
    open_store(url, create=True).close()
    with Keys(url, peppers=peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(pepper)})) as keys:
        machine = keys.create_machine(MACHINE, organisation="cfa-lyon", rights=["contrats:lecture"])
        new = keys.create_key(machine.id, name=KEY, environment="prod")
    (folder / "known.key").write_text(new.secret.reveal())
    (folder / "new.key").write_text(SEED)
    now = int(new.key.created_at.timestamp()) * 1_000_000
    events = [
        Event(1, f"p-1-{n}", now - n, new.key.id, machine.id, "192.0.2.7", "GET", "/", 401, "key_inactive",
              "completed", "s", "prod", 1, "")
        for n in range(60)
    ]  # fmt: skip
    SQLiteSink(folder / "usage.db").write(Batch("p", 1, events))
    watch = Watch(f"sqlite:///{folder}/usage.db", log=False)
    watch.catch_up()
    assert [alert.id for alert in watch.alerts()] == [1]
    return folder


@pytest.fixture(scope="module")
def usually() -> dict[tuple[str, ...], Done]:
    """How commands end where nothing fails."""
    return {}


@pytest.fixture
def place(run: Commands, estate: Path, tmp_path: Path) -> Place:
    folder = tmp_path / "place"
    shutil.copytree(estate, folder)
    environ = {
        "PATH": os.environ["PATH"],
        "PAPAOURS_STORE": f"sqlite:///{folder}/papaours.db",
        "PAPAOURS_PEPPER_FILE": str(folder / "papaours.pepper"),
        "PAPAOURS_USAGE": f"sqlite:///{folder}/usage.db",
    }
    return Place(folder, run, environ)


def check(done: Done) -> None:
    assert "Traceback" not in done.err, done.err
    assert "Exception ignored" not in done.err, done.err
    assert done.code in (0, 1, 2, 3, 4), done


@every_command
def test_every_command_is_tried_where_nothing_fails(place: Place, words: tuple[str, ...]) -> None:
    before = place.state()
    done = place(words)
    check(done)
    assert done.code == 0, done
    changed = place.state() != before
    assert changed == (words in CHANGES - NOTHING_LEFT_TO_DO)


@every_command
def test_without_standard_input(place: Place, words: tuple[str, ...]) -> None:
    before = place.state()
    done = place(words, stdin=CLOSED)
    check(done)
    if words in READS_A_KEY:
        assert (done.code, done.out, place.state()) == (2, "", before)
        assert "standard input" in done.err
    else:
        assert done.code == 0, done


@pytest.mark.parametrize("stream", [CLOSED, NO_READER, pytest.param(FULL, marks=needs_full)])
@every_command
def test_an_answer_that_cannot_be_written(
    place: Place, usually: dict[tuple[str, ...], Done], words: tuple[str, ...], stream: str
) -> None:
    usual = usually.get(words) or usually.setdefault(words, place(words)) if words not in CHANGES else None
    keys = place.keys()
    before = place.state()
    done = place(words, stdout=stream)
    check(done)
    made = place.keys().keys() - keys.keys()
    if words in SHOWS_A_KEY:
        # Nobody has the key: either it was not made, or it opens nothing and is named.
        assert done.code in (2, 4)
        assert ("nothing was done" in done.err) == (place.state() == before)
        for key in made:
            assert place.keys()[key] == "inactive"
            assert key in done.err
    elif words in CHANGES:
        assert done.code == 4, done
        assert "what was asked is done" in done.err
    elif usual is not None and not usual.out:
        assert done == usual
    elif words in VERDICTS or stream != NO_READER:
        assert done.code == 4, done
        assert "could not be written" in done.err
        assert "is done" not in done.err
    else:  # `| head`: the reader has seen enough
        assert done.code == 0
        assert "could not be written" not in done.err


@pytest.mark.parametrize("words", [("key", "verify"), ("doctor",)], ids=" ".join)
@pytest.mark.parametrize("stream", [CLOSED, NO_READER, pytest.param(FULL, marks=needs_full)])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_bad_verdict_never_ends_as_a_good_one(
    place: Place, words: tuple[str, ...], stream: str, unbuffered: bool
) -> None:
    (place.folder / "papaours.pepper").write_text(new_pepper(["p1"]))
    environ = {**place.environ, **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})}
    done = place.run(
        *words, cwd=place.folder, environ=environ, stdout=stream, stdin=str(place.folder / "new.key")
    )
    check(done)
    assert done.code != 0


@pytest.mark.parametrize("stream", [CLOSED, pytest.param(FULL, marks=needs_full)])
@every_command
def test_words_for_people_that_cannot_be_written_stop_nothing(
    place: Place, words: tuple[str, ...], stream: str
) -> None:
    before = place.state()
    done = place(words, stderr=stream)
    check(done)
    assert done.code == 0, done
    assert (place.state() != before) == (words in CHANGES - NOTHING_LEFT_TO_DO)
    if words in SHOWS_A_KEY:
        assert done.out.splitlines()[-1].startswith("pk_prod_")
    assert "keep it in a vault" not in done.out  # what is for people is in no answer for programs


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_refusal_is_as_true_with_a_stream_closed(place: Place, stream: str) -> None:
    words = ("key", "create", "--machine", "nobody", "--name", KEY, "--env", "prod")
    done = place.run(*words, cwd=place.folder, environ=place.environ, **{stream: CLOSED})
    check(done)
    assert done.code == (2 if stream == "stdout" else 1)
    usage = place.run("key", "nonsense", cwd=place.folder, environ=place.environ, **{stream: CLOSED})
    check(usage)
    assert usage.code == 2


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("key", "create", "--help")], ids=" ".join)
def test_help_that_cannot_be_written(place: Place, words: tuple[str, ...]) -> None:
    for stream, code in ((CLOSED, 4), (NO_READER, 0), *([(FULL, 4)] if Path(FULL).exists() else [])):
        done = place.run(*words, cwd=place.folder, environ=place.environ, stdout=stream)
        check(done)
        assert done.code == code, (stream, done)


@pytest.mark.parametrize("stream", [CLOSED, NO_READER, pytest.param(FULL, marks=needs_full)])
def test_the_demonstration_stops_where_nobody_can_see_it(place: Place, stream: str) -> None:
    done = place.run("demo", cwd=place.folder, environ=place.environ, stdout=stream)
    check(done)
    assert done.code == 4
    assert "could not be written" in done.err


def test_a_lost_key_that_cannot_be_disabled_either_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise streams.Unwritten(OSError(errno.ENOSPC, "No space left on device"))

    def away(*_: object) -> None:
        raise StoreUnavailable("the store cannot answer")

    for name, value in place.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("papaours_auth.cli_streams.flush", lost)
    monkeypatch.setattr(Keys, "disable_key", away)
    before = place.keys()
    assert cli.main(typed(("key", "create"))) == 4
    (made,) = place.keys().keys() - before.keys()
    assert f"papaours-auth key disable {made}" in capsys.readouterr().err


def test_a_key_that_nobody_types_is_no_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_d(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", ctrl_d)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert cli.main(["key", "verify"]) == 2


def test_descriptors_that_are_closed_are_no_files_of_ours(place: Place) -> None:
    """A store opened as descriptor 1 would have answers written into it."""
    done = place.run(
        "machine", "list", cwd=place.folder, environ=place.environ, stdin=CLOSED, stdout=CLOSED, stderr=CLOSED
    )
    assert done.code == 4
    assert place(("machine", "list")).code == 0


UNUSABLE = ["a folder", "not readable", "not there", "a file of something else"]


@pytest.mark.parametrize("how", UNUSABLE)
@every_command
def test_a_store_a_pepper_and_usage_that_cannot_be_used(
    place: Place, words: tuple[str, ...], how: str
) -> None:
    for file in ("papaours.db", "papaours.pepper", "usage.db"):
        path = place.folder / file
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "not readable":
            path.symlink_to(path)  # not even root can read it
        elif how == "a file of something else":
            path.write_bytes(b"\xff\xfe" + b"x" * 5000)
            path.chmod(0o600)
    done = place(words)
    check(done)
    if words == ("init",) and how == "not there":
        assert done.code == 0
        return
    assert done.code in (1, 2, 3), done
    assert "papaours-auth: " in done.err or "FAILED" in done.out
    if words != ("doctor",):
        assert done.out == ""
        assert "is done" not in done.err


@pytest.mark.parametrize(
    "words", [words for words in COMMANDS if words[0] in ("init", "doctor", "key")], ids=" ".join
)
def test_without_home_locale_and_a_folder_to_be_in(place: Place, words: tuple[str, ...]) -> None:
    gone = place.folder / "gone"
    gone.mkdir()
    script = f'cd {gone} && rmdir {gone} && exec {sys.executable} -X utf8=0 -m papaours_auth "$@" 2>&1'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *typed(words)],
        env={**place.environ, "LC_ALL": "C"},
        input=(place.folder / ("new.key" if "import" in words else "known.key")).read_bytes(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert b"Traceback" not in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout


class Real(NamedTuple):
    redirection: str
    code: int


REAL = {
    "stdout closed": Real(">&-", 2),
    "stdout without a reader": Real("| :", 2),
    "stdin closed": Real("<&-", 0),
    "stderr closed": Real("2>&-", 0),
    **(
        {"stdout full": Real(f">{FULL}", 4), "stderr full": Real(f"2>{FULL}", 0)}
        if Path(FULL).exists()
        else {}
    ),
}


@pytest.mark.parametrize("real", REAL.values(), ids=REAL)
def test_a_shell_of_ones_own_meets_the_same(place: Place, real: Real) -> None:
    """What the tests above arrange in a fork, a shell does to a process from its start."""
    before = place.keys()
    command = (
        f"{sys.executable} -m papaours_auth key create --machine '{MACHINE}' --name v2 --env prod --quiet"
    )
    if real.redirection == "| :":  # and the reader is gone for certain
        script = f"mkfifo gone; : <gone & exec 3>gone; wait; {command} >&3"
    else:
        script = f"{command} {real.redirection}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place.folder,
        env=dict(place.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    check(Done(done.returncode, done.stdout, done.stderr))
    assert done.returncode == real.code, done
    made = {status for key, status in place.keys().items() if key not in before}
    if real.code == 0:
        assert made == {"active"}
        assert done.stdout.startswith("pk_prod_")
    else:
        assert made == ({"inactive"} if real.code == 4 else set())


def test_a_json_answer_is_json_on_a_terminal_that_knows_no_accents(place: Place) -> None:
    typed_ = ["machine", "create", "Trésorerie", "--organisation", "cfa-lyon", "--json"]
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "papaours_auth", *typed_],
        env={**place.environ, "LC_ALL": "C"}, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "Trésorerie"
    assert place.run("machine", "show", "Trésorerie", cwd=place.folder, environ=place.environ).code == 0


def test_what_was_not_asked_of_an_unknown_error_is_told_truly(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system that is not about the answer was told as 'done, but the answer could not be written'."""

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cli, "_keys", broken)
    assert cli.main(["machine", "list"]) == 2
