"""The command line, as an administrator types it and as a program reads it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pwd
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from papaours_auth import cli, open_store
from papaours_auth.digest import new_pepper

SEED = "pk_prod_abc123def456ghi789"
MACHINE = "Service de facturation"
NAME = "Production - Service Facturation"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.out)
        return found


class Shell:
    """Types commands in a folder of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *words: str, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        pipe = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(data))
        self._monkeypatch.setattr("sys.stdin", pipe)
        try:
            code = cli.main(words)
        except SystemExit as exit_:  # argparse ends the process itself
            code = int(exit_.code or 0)
        return Result(code, *self._capsys.readouterr())

    def export(self, result: Result) -> None:
        """Set what `init` printed."""
        for line in result.out.splitlines():
            export, assignment = shlex.split(line)
            assert export == "export"
            name, _, value = assignment.partition("=")
            self._monkeypatch.setenv(name, value)


@pytest.fixture
def bare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell where nothing is set up."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PAPAOURS_")]:
        monkeypatch.delenv(name)
    return Shell(capsys, monkeypatch)


@pytest.fixture
def shell(bare: Shell) -> Shell:
    """A shell with a store, a pepper and a machine."""
    bare.export(bare("init"))
    assert (
        bare("machine", "create", MACHINE, "--organisation", "cfa-lyon", "--right", "contrats:lecture").code
        == 0
    )
    return bare


def write_private(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def create(shell: Shell, *words: str, name: str = NAME, env: str = "prod") -> Result:
    return shell("key", "create", "--machine", MACHINE, "--name", name, "--env", env, *words)


def test_init_makes_a_private_pepper_and_a_store_and_prints_what_to_set(bare: Shell, tmp_path: Path) -> None:
    done = bare("init")
    assert done.code == 0
    assert done.out.splitlines() == [
        f"export PAPAOURS_STORE=sqlite:///{tmp_path}/papaours.db",
        f"export PAPAOURS_PEPPER_FILE={tmp_path}/papaours.pepper",
    ]
    assert (tmp_path / "papaours.pepper").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "papaours.db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "papaours.pepper").read_text().strip() not in done.out + done.err


def test_init_again_keeps_what_is_there(bare: Shell, tmp_path: Path) -> None:
    bare.export(bare("init"))
    before = (tmp_path / "papaours.pepper").read_bytes()
    again = bare("init")
    assert again.code == 0
    assert "Kept" in again.err
    assert (tmp_path / "papaours.pepper").read_bytes() == before


def test_init_refuses_a_pepper_that_is_not_the_stores(bare: Shell, tmp_path: Path) -> None:
    bare("init")
    done = bare("init", "--pepper-file", str(tmp_path / "other.pepper"))
    assert done.code == 2
    assert "has a pepper already" in done.err
    assert not (tmp_path / "other.pepper").exists()
    write_private(tmp_path / "other.pepper", new_pepper())
    done = bare("init", "--pepper-file", str(tmp_path / "other.pepper"))
    assert done.code == 2
    assert "not the one this store was made with" in done.err


def test_a_key_is_printed_once_on_creation(shell: Shell) -> None:
    made = create(shell)
    key = made.out.splitlines()[-1]
    assert made.code == 0
    assert key.startswith("pk_prod_")
    for words in (
        ["key", "list"],
        ["key", "show", NAME],
        ["key", "list", "--json"],
        ["machine", "show", MACHINE],
    ):
        assert key not in shell(*words).out


def test_quiet_prints_the_key_alone(shell: Shell) -> None:
    made = create(shell, "--quiet")
    assert made.out.count("\n") == 1
    assert made.out.startswith("pk_prod_")


def test_json_names_what_programs_read_and_shows_the_key_on_creation_alone(shell: Shell) -> None:
    made = create(shell, "--json").json
    assert {"id", "name", "environment", "status", "key"} <= made.keys()
    shown = shell("key", "show", made["id"], "--json").json
    assert shown == {name: value for name, value in made.items() if name != "key"}


def test_a_key_goes_through_its_life(shell: Shell) -> None:
    key = create(shell, "--quiet").out.strip()
    assert shell("key", "verify", stdin=key).out.startswith("accepted: " + NAME)
    assert shell("key", "disable", NAME).code == 0
    refused = shell("key", "verify", stdin=key)
    assert (refused.code, refused.out.partition(".")[0]) == (1, "refused: key_inactive (401)")
    assert shell("key", "enable", NAME).code == 0
    assert shell("key", "rename", NAME, "Production - Service Facturation v2").code == 0
    assert shell("key", "verify", stdin=key + "\n").code == 0
    assert shell("machine", "disable", MACHINE).code == 0
    assert shell("key", "verify", "--json", stdin=key).json["reason"] == "machine_inactive"
    assert shell("machine", "enable", MACHINE).code == 0
    history = shell("key", "show", "Production - Service Facturation v2").out
    kinds = [line.split()[2] for line in history.splitlines()[2:]]
    assert kinds == ["key.renamed", "key.enabled", "key.disabled", "key.created"]


def test_a_key_is_rotated_and_the_old_one_works_on(shell: Shell) -> None:
    old = create(shell, "--quiet", name="Production - A").out
    rotated = shell("key", "rotate", "Production - A", "--json")
    assert rotated.code == 0
    assert rotated.json["name"] == "Production - A v2"
    assert "The old key still works: papaours-auth key disable key_" in rotated.err
    for key in (old, rotated.json["key"]):
        assert shell("key", "verify", stdin=key).code == 0
    assert shell("key", "rotate", "nobody").code == 1


def test_the_seeds_key_is_imported_and_verified(shell: Shell) -> None:
    done = shell("key", "import", "--machine", MACHINE, "--name", NAME, stdin=SEED)
    assert done.code == 0
    assert SEED not in done.out + done.err
    assert shell("key", "verify", stdin=SEED).code == 0


def test_verify_tells_environment_rights_and_networks(shell: Shell) -> None:
    key = create(shell, "--quiet", "--network", "192.0.2.0/24").out.strip()
    verify = ["key", "verify", "--json", "--client", "192.0.2.1"]
    assert shell(*verify, "--needs", "contrats:lecture", stdin=key).json["accepted"]
    assert (
        shell(*verify, "--needs", "contrats:suppression", stdin=key).json["reason"] == "insufficient_rights"
    )
    assert shell(*verify[:3], "--client", "198.51.100.1", stdin=key).json["reason"] == "network_not_allowed"
    assert shell(*verify, "--env", "test", stdin=key).json["reason"] == "wrong_environment"


@pytest.mark.parametrize("expires", ["90d", "12h", "2w", "30m", "2090-01-31T00:00+01:00"])
def test_expiry_is_a_span_or_a_time(shell: Shell, expires: str) -> None:
    assert create(shell, "--json", "--expires", expires).json["expires"].startswith("20")


@pytest.mark.parametrize(
    "expires", ["soon", "2090-01-31", "2001-01-31T00:00Z", "0d", "999999w", "9999-12-31T23:59-14:00"]
)
def test_a_wrong_expiry_is_told_and_makes_no_key(shell: Shell, expires: str) -> None:
    done = create(shell, "--expires", expires)
    assert done.code == 2
    assert "expires" in done.err
    assert shell("key", "list").out == ""


def test_tables_say_what_to_do_where_there_is_nothing(bare: Shell) -> None:
    bare.export(bare("init"))
    assert "papaours-auth machine create" in bare("machine", "list").err
    assert bare("machine", "create", MACHINE, "--organisation", "cfa-lyon").code == 0
    assert "Aucune clé API associée à cette machine" in bare("machine", "show", MACHINE).err
    assert "papaours-auth key create" in bare("key", "list").err


def test_an_unclear_name_is_told_but_taken(shell: Shell) -> None:
    done = create(shell, name="Clé 1")
    assert done.code == 0
    assert "not clear" in done.err
    assert "not clear" not in create(shell).err


USES: list[tuple[Sequence[str], int, str]] = [
    (["key", "show", "nothing"], 1, "no key with this id"),
    (["machine", "disable", "nothing"], 1, "no machine with this id"),
    (
        ["key", "create", "--machine", "nothing", "--name", NAME, "--env", "prod"],
        1,
        "no machine with this id",
    ),
    (
        ["key", "create", "--machine", MACHINE, "--name", NAME, "--env", "production"],
        2,
        "prod, test, dev, staging",
    ),
    (["key", "create", "--machine", MACHINE, "--name", " ", "--env", "prod"], 2, "name is empty"),
    (["key", "create", "--machine", MACHINE, "--name", SEED, "--env", "prod"], 2, "contains a key"),
    (["machine", "create", "m", "--organisation", "o", "--right", "contrats"], 2, "<permission>:<operation>"),
    (["machine", "create", "m", "--organisation", "o", "--right", "contrats:danser"], 2, "lecture"),
    (["key", "list", "--store", "nothing"], 2, "not written as a URL"),
    (["key", "list", "--store", "oracle://u:hunter2@h/d"], 2, "no store is known for 'oracle'"),
    (["key", "list", "--store", "sqlite:///missing.db"], 2, "papaours-auth init"),
    (["key"], 2, "COMMAND"),
    ([], 2, "COMMAND"),
]


@pytest.mark.parametrize(
    ("words", "code", "said"), USES, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_wrong_use_has_its_exit_code_and_one_clear_line(
    shell: Shell, words: Sequence[str], code: int, said: str
) -> None:
    done = shell(*words)
    assert done.code == code
    assert said in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "hunter2" not in done.err
    assert SEED not in done.err


@pytest.mark.parametrize("stdin", ["", "nonsense", b"\xff\xfe\x00", "pk_prod_", "x" * 20_000])
def test_import_refuses_what_is_no_key_without_repeating_it(shell: Shell, stdin: str | bytes) -> None:
    done = shell("key", "import", "--machine", MACHINE, "--name", NAME, stdin=stdin)
    assert done.code == 2
    assert "this is no key" in done.err


def test_disabling_needs_no_pepper(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    create(shell)
    monkeypatch.delenv("PAPAOURS_PEPPER_FILE")
    assert shell("key", "disable", NAME).code == 0
    assert shell("key", "list", "--json").json["status"] == "inactive"
    assert "no pepper" in create(shell).err


def test_a_store_that_cannot_answer_has_its_own_exit_code(shell: Shell, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "papaours.db")
    connection.execute("delete from meta")
    connection.commit()
    connection.close()
    assert shell("key", "verify", stdin=SEED).code == 3
    doctor = shell("doctor")
    assert doctor.code == 3
    assert "installation mark" in doctor.out


def test_the_doctor_finds_a_healthy_estate_healthy(shell: Shell) -> None:
    create(shell)
    done = shell("doctor")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["ok"] * 4


def test_the_doctor_names_each_ailment(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "papaours.pepper").chmod(0o644)
    exposed = shell("doctor")
    assert (exposed.code, "chmod 600" in exposed.out) == (1, True)
    write_private(tmp_path / "papaours.pepper", new_pepper())
    wrong = shell("doctor")
    assert (wrong.code, "not the one this store was made with" in wrong.out) == (1, True)
    monkeypatch.delenv("PAPAOURS_PEPPER_FILE")
    assert "no pepper" in shell("doctor").out
    monkeypatch.delenv("PAPAOURS_STORE")
    assert "no store" in shell("doctor").out


def test_an_unreadable_pepper_file_is_told(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAPAOURS_PEPPER_FILE", str(tmp_path))  # a folder: not even root can read it
    assert "cannot be read" in create(shell).err


def test_the_console_script_runs_as_a_process_of_its_own(shell: Shell) -> None:
    create(shell)
    command = [sys.executable, "-m", "papaours_auth", "key", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["name"] == NAME


def test_a_reader_that_has_seen_enough_is_no_error(shell: Shell) -> None:
    for number in range(60):
        create(shell, name=f"Production - Service Facturation v{number}")
    command = f"{sys.executable} -m papaours_auth key list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_a_store_that_breaks_in_the_middle_has_its_exit_code(shell: Shell, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "papaours.db")) as connection:
        connection.execute("drop table digests")
        connection.execute("drop table keys")
    listed = shell("key", "list")
    assert (listed.code, listed.out) == (3, "")
    assert "cannot answer" in listed.err
    assert shell("key", "create", "--machine", MACHINE, "--name", NAME, "--env", "prod").code == 3


def test_ctrl_c_ends_a_command_as_shells_expect(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_table", interrupted)
    assert shell("machine", "list").code == 130


def test_init_takes_another_store_and_tells_where_a_pepper_cannot_be(bare: Shell) -> None:
    assert bare("init", "--store", "memory://").code == 0
    missing = bare("init", "--pepper-file", "nowhere/papaours.pepper")
    assert missing.code == 2
    assert "cannot be made" in missing.err


def test_the_doctor_tells_of_a_store_that_has_no_pepper_yet(bare: Shell, tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/papaours.db", create=True).close()
    write_private(tmp_path / "papaours.pepper", new_pepper())
    bare.export(Result(0, f"export PAPAOURS_STORE=sqlite:///{tmp_path}/papaours.db", ""))
    bare.export(Result(0, f"export PAPAOURS_PEPPER_FILE={tmp_path}/papaours.pepper", ""))
    done = bare("doctor")
    assert done.code == 0
    assert "the store has no pepper yet" in done.out
    assert "the store has no key yet" in done.out


def test_the_doctor_tells_of_a_primary_pepper_that_is_elsewhere(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "papaours.pepper").write_text(new_pepper(["p1"]))
    done = shell("doctor")
    assert done.code == 1
    assert "the store's primary pepper is not among yours" in done.out


def test_a_machine_is_shown_as_json_alone(shell: Shell) -> None:
    create(shell)
    shown = shell("machine", "show", MACHINE, "--json")
    assert shown.json["name"] == MACHINE
    assert shown.out.count("\n") == 1


def test_a_key_typed_by_a_person_is_not_echoed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    key = create(shell, "--quiet").out.strip()
    monkeypatch.setattr("getpass.getpass", lambda prompt: f" {key} ")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert cli._read_key().reveal() == key


def test_the_journal_names_the_user_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody\telse")
    assert cli._actor() == pwd.getpwuid(os.getuid()).pw_name

    def nameless(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nameless)
    assert cli._actor() == f"uid {os.getuid()}"
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_name="a\tb"))
    assert cli._actor() == f"uid {os.getuid()}"


def run_cli(*words: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "papaours_auth", *words]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, timeout=60, check=False
    )


def test_a_terminal_that_knows_no_ellipsis_costs_nobody_a_key(shell: Shell) -> None:
    words = ("key", "create", "--machine", MACHINE, "--name", NAME, "--env", "prod")
    done = run_cli(*words, PYTHONIOENCODING="iso-8859-1")
    assert done.returncode == 0, done.stderr
    key = done.stdout.split()[-1].decode()
    assert shell("key", "verify", stdin=key).code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_key_that_could_not_be_written_is_named_so_that_it_can_be_disabled(shell: Shell) -> None:
    words = ("key", "create", "--machine", MACHINE, "--name", NAME, "--env", "prod", "--quiet")
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "papaours_auth", *words]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 4, done.stderr
    key_id = shell("key", "list", "--json").json["id"]
    assert f"The text of {key_id} could not be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_argument_that_is_no_text_is_refused_in_one_line(shell: Shell) -> None:
    refused = shell("key", "disable", "\udcff")
    assert (refused.code, refused.out) == (2, "")
    assert "not UTF-8" in refused.err
