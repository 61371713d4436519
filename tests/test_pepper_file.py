"""Where a pepper is kept: who may read it, and that no repository gets it unnoticed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from papaours_auth import Authenticator, ConfigurationError
from papaours_auth.digest import new_pepper, peppers_from_environment
from papaours_auth.pepper_file import read_pepper_file, write_pepper_file
from test_cli import Shell

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
NOBODY = 65534


@pytest.fixture
def bare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell where nothing is set up."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PAPAOURS_")]:
        monkeypatch.delenv(name)
    return Shell(capsys, monkeypatch)


def kept(folder: Path, mode: int, owner: int | None = None) -> Path:
    path = folder / "papaours.pepper"
    path.write_text(new_pepper())
    if owner is not None:
        os.chown(path, owner, NOBODY)
    path.chmod(mode)
    return path


def read_as(user: int, path: Path) -> str:
    """Read it in a child that is another user; its error, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"crashed"
        try:
            os.setgroups([NOBODY])
            os.setgid(NOBODY)
            os.setuid(user)
            read_pepper_file(path)
            said = b""
        except ConfigurationError as error:
            said = str(error).encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_pepper_of_its_owner_alone_is_read(tmp_path: Path, mode: int) -> None:
    assert read_pepper_file(kept(tmp_path, mode)).startswith("p1:")


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o444, 0o620, 0o602, 0o660, 0o601])
def test_a_pepper_that_others_may_read_or_change_is_refused_with_what_to_do(
    tmp_path: Path, mode: int
) -> None:
    path = kept(tmp_path, mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        read_pepper_file(path)
    with pytest.raises(ConfigurationError, match="read by others"):
        Authenticator(
            "memory://",
            environment="prod",
            peppers=peppers_from_environment({"PAPAOURS_PEPPER_FILE": str(path)}),
        )


@AS_ROOT
def test_roots_file_may_be_read_by_a_group_and_nobody_elses(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    assert read_as(NOBODY, kept(tmp_path, 0o640, 0)) == ""
    assert "read by others" in read_as(NOBODY, kept(tmp_path, 0o640, NOBODY))
    assert read_as(NOBODY, kept(tmp_path, 0o600, NOBODY)) == ""
    assert "belongs to another user" in read_as(NOBODY, kept(tmp_path, 0o640, 4242))
    assert read_as(0, kept(tmp_path, 0o600, 4242)) == ""
    assert "Permission denied" in read_as(NOBODY, kept(tmp_path, 0o600, 4242))


def test_a_secret_that_is_mounted_read_only_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Docker (0444) and Kubernetes (0644, 0640 with fsGroup) mount them: the mode is not the app's to change."""
    path = kept(tmp_path, 0o644)
    monkeypatch.setattr("os.fstatvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert read_pepper_file(path).startswith("p1:")


def test_a_secret_that_is_really_mounted_read_only_is_taken_as_it_is(tmp_path: Path) -> None:
    path = kept(tmp_path, 0o644)
    code = "import sys; from papaours_auth.pepper_file import *; print(read_pepper_file(sys.argv[1])[:3], end='')"
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    script = f'{mount} && exec {sys.executable} -c "{code}" {path}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.stdout == "p1:", done.stderr


def test_a_pepper_given_by_a_pipe_is_read(tmp_path: Path) -> None:
    """`PAPAOURS_PEPPER_FILE=<(vault read …)`, which has no mode that others could use."""
    fifo = tmp_path / "pepper"
    os.mkfifo(fifo, 0o644)
    with subprocess.Popen(["sh", "-c", f"echo '{new_pepper()}' > {fifo}"]):
        assert read_pepper_file(fifo).startswith("p1:")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/null"])
def test_a_device_is_not_read_to_its_end(device: str) -> None:
    with pytest.raises(ConfigurationError):
        peppers_from_environment({"PAPAOURS_PEPPER_FILE": device})


def test_a_pepper_that_cannot_be_written_whole_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        write_pepper_file(tmp_path / "pepper", new_pepper())
    assert list(tmp_path.iterdir()) == []


# init


def test_init_takes_the_pepper_that_the_environment_names(
    bare: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It made another one, and bound the store to it: the app then found every key unknown."""
    named = tmp_path / "named.pepper"
    named.write_text(text := new_pepper())
    named.chmod(0o600)
    monkeypatch.setenv("PAPAOURS_PEPPER_FILE", str(named))
    done = bare("init")
    assert done.code == 0
    assert f"export PAPAOURS_PEPPER_FILE={named}" in done.out.splitlines()
    assert named.read_text() == text
    assert not (tmp_path / "papaours.pepper").exists()
    assert bare("doctor").code == 1  # PAPAOURS_STORE is not set yet
    bare.export(done)
    assert bare("doctor").code == 0


def test_init_makes_the_pepper_where_the_environment_names_it(
    bare: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAPAOURS_PEPPER_FILE", "named.pepper")
    assert bare("init").code == 0
    assert stat.S_IMODE((tmp_path / "named.pepper").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named.pepper", "papaours.db"]


def test_init_takes_the_pepper_in_the_environment(
    bare: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAPAOURS_PEPPER", new_pepper())
    done = bare("init")
    assert done.code == 0
    assert done.out.splitlines() == [f"export PAPAOURS_STORE=sqlite:///{tmp_path}/papaours.db"]
    assert not (tmp_path / "papaours.pepper").exists()
    bare.export(done)
    assert bare("doctor").code == 0
    both = bare("init", "--pepper-file", "papaours.pepper")
    assert (both.code, "keep one" in both.err) == (2, True)


@pytest.mark.parametrize("what", ["a folder", "a link to nothing"])
def test_init_does_not_say_that_something_is_done_which_is_not(
    bare: Shell, tmp_path: Path, what: str
) -> None:
    if what == "a folder":
        (tmp_path / "there").mkdir()
    else:
        (tmp_path / "there").symlink_to(tmp_path / "nothing")
    done = bare("init", "--pepper-file", str(tmp_path / "there"))
    assert (done.code, done.out) == (2, "")
    assert "cannot be read" in done.err
    assert "done" not in done.err
    assert "ready" not in done.err


# Git


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


needs_git = pytest.mark.skipif(
    shutil.which("git") is None, reason="git is not on this machine, and is no Python package"
)


@needs_git
def test_a_pepper_in_a_work_tree_that_does_not_ignore_it_is_told(bare: Shell, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    done = bare("init")
    assert done.code == 0
    assert "inside a Git work tree that does not ignore it" in done.err
    line = done.err.splitlines()[[("printf" in line) for line in done.err.splitlines()].index(True)]
    assert not (tmp_path / ".gitignore").exists()  # people's files are theirs
    subprocess.run(["sh", "-c", line], check=True)
    again = bare("init")
    assert (again.code, "Git" in again.err) == (0, False)
    git(tmp_path, "add", ".")
    git(tmp_path, "add", "-f", "papaours.pepper")
    assert "does not ignore it" in bare("init").err  # ignored, and tracked all the same


@needs_git
@pytest.mark.parametrize("name", ["#pepper", "!pepper", "a pepper ", "[a]*?\\pepper", "été.pepper"])
def test_the_line_for_gitignore_is_right_whatever_the_files_name(
    bare: Shell, tmp_path: Path, name: str
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "conf").mkdir()
    done = bare("init", "--pepper-file", f"conf/{name}")
    subprocess.run(["sh", "-c", done.err[done.err.index("printf") :].splitlines()[0]], check=True)
    assert "Git" not in bare("init", "--pepper-file", f"conf/{name}").err


def test_a_work_tree_is_seen_without_git(
    bare: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").write_text("gitdir: /elsewhere\n")  # as in a worktree or a submodule
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "inside a Git work tree" in bare("init").err


@needs_git
def test_nothing_is_said_outside_a_work_tree(bare: Shell) -> None:
    assert "Git" not in bare("init").err
