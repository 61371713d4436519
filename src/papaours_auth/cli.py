"""The command ``papaours-auth``: administration for people (tables) and programs (``--json``).

Exit codes: 0 fine; 1 refused, not found, or a check failed; 2 wrong usage or configuration; 3 the store
cannot answer; 4 done, but the answer could not be written. A key is printed once, on creation; `key verify` and
`key import` read it from standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import os
import pwd
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from . import __version__
from ._middleware import STORE_VARIABLE, store_url
from .authenticator import Authenticator
from .digest import (
    PEPPER_FILE_VARIABLE,
    new_pepper,
    parse_peppers,
    peppers_from_environment,
)
from .exceptions import AdministrationError, ConfigurationError, InvalidInput, Refused, StoreUnavailable
from .format import KeyFormat, Secret
from .http import render
from .keys import Keys, NewKey
from .model import Key, Machine
from .names import unclear
from .stores import open_store
from .stores.sqlite import path_of

FINE, REFUSED, USAGE, UNAVAILABLE, UNWRITTEN = 0, 1, 2, 3, 4
_T = TypeVar("_T")
_SPAN: Final = re.compile(r"(\d{1,6})([mhdw])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no "…" must not cost anybody a key
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parser().parse_args([_well_formed(word) for word in arguments or sys.argv[1:]])
        code: int = options.run(options)
        sys.stdout.flush()
    except (ConfigurationError, InvalidInput) as error:
        return _fail(USAGE, error)
    except AdministrationError as error:
        return _fail(REFUSED, error)
    except StoreUnavailable as error:
        return _fail(UNAVAILABLE, error)
    except BrokenPipeError:  # `papaours-auth key list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except OSError as error:  # a full disk behind a redirection
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(
            f"papaours-auth: the answer could not be written ({error.strerror}), though what was asked is done"
        )
        return UNWRITTEN
    except KeyboardInterrupt:
        return 130
    return code


def _well_formed(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise InvalidInput("an argument is not UTF-8 text: check your terminal's encoding") from None
    return word


def _fail(code: int, error: Exception) -> int:
    _say(f"papaours-auth: {error}")
    return code


def _say(text: str) -> None:
    """Tell a person something: on standard error, so that standard output stays for programs."""
    print(text, file=sys.stderr)  # noqa: T201 - a command line prints


def _out(text: str) -> None:
    print(text)  # noqa: T201 - a command line prints


# init and doctor


def _init(options: argparse.Namespace) -> int:
    url = options.store or os.environ.get(STORE_VARIABLE) or "sqlite:///papaours.db"
    if url.startswith("sqlite:"):
        url = f"sqlite:///{path_of(url).absolute()}"
    pepper_file = Path(options.pepper_file).absolute()
    made = _write_pepper(pepper_file)
    with (
        contextlib.closing(open_store(url, create=True)) as store,
        Keys(store, peppers=parse_peppers(pepper_file.read_text(encoding="utf-8")), actor=_actor()),
    ):
        pass  # opening it records the pepper, or finds that it is not this store's
    _say(
        f"{'Made' if made else 'Kept'} the pepper in {pepper_file}. Without it no key can be verified: back it up."
    )
    _say("The store is ready. Set these where your app runs:")
    _out(f"{STORE_VARIABLE}={shlex.quote(url)}")
    _out(f"{PEPPER_FILE_VARIABLE}={shlex.quote(str(pepper_file))}")
    return FINE


def _write_pepper(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigurationError(
            f"the pepper file {path} cannot be made ({error.strerror}): check the folder and its owner"
        ) from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(new_pepper() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _doctor(options: argparse.Namespace) -> int:
    """Run every check that can be run, and say of each what was found."""
    worst = FINE
    for what, check in _CHECKS:
        try:
            found, mark = check(options), "ok"
        except _Warning as warning:
            found, mark = str(warning), "warning"
        except StoreUnavailable as error:
            found, mark, worst = str(error), "FAILED", max(worst, UNAVAILABLE)
        except ConfigurationError as error:
            found, mark, worst = str(error), "FAILED", max(worst, REFUSED)
        _out(f"{mark:8} {what:10} {found}")
    return worst


class _Warning(Exception):
    """Something works, and should still be looked at."""


def _check_pepper(_: argparse.Namespace) -> str:
    ring = peppers_from_environment()
    path = os.environ.get(PEPPER_FILE_VARIABLE)
    if path and Path(path).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise _Warning(f"others may read {path}: chmod 600 it")
    return f"{len(ring.peppers)} given: {', '.join(pepper.id for pepper in ring.peppers)}"


def _check_store(options: argparse.Namespace) -> str:
    url = _url(options)
    with contextlib.closing(open_store(url)) as store:
        installation = store.describe().installation
        unchecked: Sequence[str] = getattr(store, "warnings", ())  # some stores have any
    if unchecked:
        raise _Warning("; ".join(unchecked))
    return f"{url.partition('://')[0]}, installation {installation[:8]}…"


def _check_match(options: argparse.Namespace) -> str:
    with contextlib.closing(open_store(_url(options))) as store:
        description = store.describe()
        if not description.peppers:
            raise _Warning("the store has no pepper yet: it takes yours with the first key")
        ring = peppers_from_environment().bound_to(
            description.installation, {record.id: record[1:] for record in description.peppers}
        )
    if ring.primary_missing:
        raise ConfigurationError(
            "the store's primary pepper is not among yours: newer keys would all be unknown"
        )
    return "the peppers are this store's"


def _check_keys(options: argparse.Namespace) -> str:
    with contextlib.closing(open_store(_url(options))) as store:
        machines, keys = store.machines(), store.keys()
    active = sum(key.status == "active" for key in keys)
    if not keys:
        raise _Warning("the store has no key yet: papaours-auth machine create, then key create")
    return f"{len(machines)} machines, {active} active keys, {len(keys) - active} inactive"


_CHECKS: Final[Sequence[tuple[str, Callable[[argparse.Namespace], str]]]] = (
    ("pepper", _check_pepper),
    ("store", _check_store),
    ("match", _check_match),
    ("keys", _check_keys),
)


# machines


def _machine_create(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        machine = keys.create_machine(
            options.name,
            organisation=options.organisation,
            description=options.description,
            rights=options.right,
        )
    _show([machine], _machine_fields, options)
    return FINE


def _machine_list(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        _show(
            keys.machines(), _machine_fields, options, "There is no machine yet: papaours-auth machine create"
        )
    return FINE


def _machine_show(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        machine = keys.machine(options.machine)
        _show([machine], _machine_fields, options)
        if not options.json:
            empty = "Aucune clé API associée à cette machine: papaours-auth key create"
            _show(keys.keys(machine.id), _key_fields(keys), options, empty)
    return FINE


def _machine_disable(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        _show([keys.disable_machine(options.machine)], _machine_fields, options)
    return FINE


def _machine_enable(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        _show([keys.enable_machine(options.machine)], _machine_fields, options)
    return FINE


def _machine_fields(machine: Machine) -> dict[str, str]:
    return {
        "id": machine.id,
        "name": machine.name,
        "organisation": machine.organisation,
        "status": machine.status,
        "rights": " ".join(dict.fromkeys(grant.right for grant in machine.grants)),
        "created": _time(machine.created_at),
    }


# keys


def _key_create(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        new = keys.create_key(
            options.machine,
            name=options.name,
            environment=options.env,
            usage=options.usage,
            expires=_expiry(options.expires),
            networks=options.network,
        )
        fields = _key_fields(keys)(new.key)
    _show_new(new, fields, options)
    return FINE


def _key_rotate(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        old = keys.key(options.key)
        new = keys.rotate_key(old.id, name=options.name, expires=_expiry(options.expires))
        fields = _key_fields(keys)(new.key)
    _show_new(new, fields, options)
    _say(f"The old key still works: papaours-auth key disable {old.id}, once nothing uses it.")
    return FINE


def _show_new(new: NewKey, fields: dict[str, str], options: argparse.Namespace) -> None:
    _warn_unclear(new.key)
    try:
        _print_new(new, fields, options)
        sys.stdout.flush()
    except OSError:
        _say(
            f"The text of {new.key.id} could not be written, and cannot be shown again: disable it, make another."
        )
        raise


def _print_new(new: NewKey, fields: dict[str, str], options: argparse.Namespace) -> None:
    if options.quiet:
        _out(new.secret.reveal())
    elif options.json:
        _out(json.dumps({**fields, "key": new.secret.reveal()}, ensure_ascii=False))
    else:
        _table([fields])
        _say("\nThe key, shown this once. It is secret in spite of its pk_: keep it in a vault.")
        _out(new.secret.reveal())


def _key_import(options: argparse.Namespace) -> int:
    secret = _read_key()
    with _keys(options) as keys:
        key = keys.import_key(
            options.machine,
            secret,
            name=options.name,
            environment=options.env,
            expires=_expiry(options.expires),
            networks=options.network,
        )
        _show([key], _key_fields(keys), options)
    _warn_unclear(key)
    return FINE


def _key_list(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        empty = "There is no key yet: papaours-auth key create"
        _show(keys.keys(options.machine), _key_fields(keys), options, empty)
    return FINE


def _key_show(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        key = keys.key(options.key)
        _show([key], _key_fields(keys), options)
        if not options.json:
            for change in keys.journal(key.id):
                _out(f"{_time(change.at)}  {change.kind}  by {change.actor}")
    return FINE


def _key_rename(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        key = keys.rename_key(options.key, options.name)
        _show([key], _key_fields(keys), options)
    _warn_unclear(key)
    return FINE


def _key_disable(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        _show([keys.disable_key(options.key)], _key_fields(keys), options)
    return FINE


def _key_enable(options: argparse.Namespace) -> int:
    with _keys(options) as keys:
        _show([keys.enable_key(options.key)], _key_fields(keys), options)
    return FINE


def _key_verify(options: argparse.Namespace) -> int:
    secret = _read_key()
    text = KeyFormat().read(secret.reveal().encode("utf-8", "surrogatepass"))
    environment = options.env or (text.environment if text is not None else "prod")
    with Authenticator(_url(options), environment=environment, watch=False) as authenticator:
        try:
            identity = authenticator.authenticate(secret.reveal(), client=options.client, needs=options.needs)
        except Refused as refused:
            answer = render(refused)
            if options.json:
                _out(json.dumps({"accepted": False, "reason": refused.reason, "status": answer.status}))
            else:
                _out(f"refused: {refused.reason} ({answer.status}). {json.loads(answer.body)['detail']}")
            return UNAVAILABLE if answer.status == 503 else REFUSED
    if options.json:
        known = {"id": identity.key.id, "machine": identity.machine.id, "rights": sorted(identity.rights)}
        _out(json.dumps({"accepted": True, **known}, ensure_ascii=False))
    else:
        _out(f"accepted: {identity.key.name} ({identity.key.id}), of {identity.machine.name}")
    return FINE


def _key_fields(keys: Keys) -> Callable[[Key], dict[str, str]]:
    def fields(key: Key) -> dict[str, str]:
        expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
        return {
            "id": key.id,
            "name": key.name,
            "environment": key.environment,
            "status": "expired" if expired and key.status == "active" else key.status,
            "looks like": keys.printable(key),
            "machine": key.machine_id,
            "created": _time(key.created_at),
            "expires": _time(key.expires_at) if key.expires_at is not None else "",
        }

    return fields


def _warn_unclear(key: Key) -> None:
    lack = unclear(key.name)
    if lack is not None:
        _say(f"The name of {key.id} is not clear: {lack}. 'papaours-auth key rename' changes it.")


def _read_key() -> Secret:
    if sys.stdin.isatty():
        return Secret(getpass.getpass("Key (not shown): ").strip())
    return Secret(sys.stdin.buffer.read(10_000).decode("utf-8", "replace").strip())


def _expiry(text: str | None) -> datetime | timedelta | None:
    if text is None:
        return None
    span = _SPAN.fullmatch(text)
    if span:
        return timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            "--expires is a span (90d, 12h, 30m, 4w) or a time with its zone (2027-01-31T00:00Z)"
        ) from None


def _demo(options: argparse.Namespace) -> int:
    from .demo import run  # its servers are an extra

    return run(keep=options.keep)


# what commands share


def _keys(options: argparse.Namespace) -> Keys:
    return Keys(_url(options), actor=_actor())


def _url(options: argparse.Namespace) -> str:
    return options.store or store_url()


def _actor() -> str:
    # Not getpass.getuser(): that believes LOGNAME, and the journal is to name who it was.
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return f"uid {os.getuid()}"
    return name if name.isprintable() else f"uid {os.getuid()}"


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%SZ")


def _show(
    items: Iterable[_T],
    fields: Callable[[_T], dict[str, str]],
    options: argparse.Namespace,
    empty: str = "",
) -> None:
    rows = [fields(item) for item in items]
    if options.json:
        for row in rows:
            _out(json.dumps(row, ensure_ascii=False))
    elif rows:
        _table(rows)
    else:
        _say(empty)


def _table(rows: Sequence[dict[str, str]]) -> None:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        _out("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="papaours-auth",
        description="Administer Papaours API keys: machines carry rights, their keys prove who calls.",
        epilog="exit codes: 0 fine; 1 refused or not found; 2 usage or configuration; 3 store unavailable; "
        "4 done, but the answer could not be written",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--store", metavar="URL", help=f"the key store (default: {STORE_VARIABLE})")
    listed = argparse.ArgumentParser(add_help=False, parents=[store])
    listed.add_argument("--json", action="store_true", help="one JSON object a line")
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--expires", metavar="WHEN", help="90d, 12h, or a time with its zone; default: never")
    limits.add_argument(
        "--network", metavar="CIDR", action="append", default=[], help="refuse it elsewhere; may be repeated"
    )

    command = _command(commands, "init", _init, [store], "make a pepper (0600) and a store")
    command.add_argument("--pepper-file", metavar="PATH", default="papaours.pepper")
    _command(commands, "doctor", _doctor, [store], "check pepper, store and keys")
    command = _command(commands, "demo", _demo, [], "run two protected apps and call them")
    command.add_argument("--keep", action="store_true", help="leave the servers up")

    machines = _group(commands, "machine", "machines and their rights")
    command = _command(machines, "create", _machine_create, [listed], "create a machine")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--organisation", required=True, metavar="ORG", help="its home organisation")
    command.add_argument("--description", default="", metavar="TEXT")
    command.add_argument(
        "--right",
        metavar="RIGHT",
        action="append",
        default=[],
        help="contrats:lecture[@org-a,org-b]; may be repeated",
    )
    _command(machines, "list", _machine_list, [listed], "list machines")
    for name, run, text in (
        ("show", _machine_show, "show a machine and its keys"),
        ("disable", _machine_disable, "refuse all its keys from now on"),
        ("enable", _machine_enable, "let its keys in again"),
    ):
        command = _command(machines, name, run, [listed], text)
        command.add_argument("machine", metavar="MACHINE", help="its id or exact name")

    keys = _group(commands, "key", "keys")
    command = _command(keys, "create", _key_create, [listed, limits], "create a key and show it, once")
    command.add_argument("--machine", required=True, metavar="M", help="its id or exact name")
    command.add_argument("--name", required=True, help="its label: environment, system, version")
    command.add_argument("--env", required=True, metavar="ENV", help="prod, test, dev or staging")
    command.add_argument("--usage", default="", help="a word of the key's text, as in pk_prod_export_…")
    command.add_argument("--quiet", action="store_true", help="print the key alone")
    command = _command(keys, "rotate", _key_rotate, [listed], "create a key's successor and show it, once")
    command.add_argument("key", metavar="KEY", help="its id or exact name; it stays until it is disabled")
    command.add_argument("--name", help="default: the same with the next version")
    command.add_argument("--expires", metavar="WHEN", help="default: after as long as the old one's life")
    command.add_argument("--quiet", action="store_true", help="print the key alone")
    command = _command(keys, "import", _key_import, [listed, limits], "take in a key from standard input")
    command.add_argument("--machine", required=True, metavar="M", help="its id or exact name")
    command.add_argument("--name", required=True, help="its label: environment, system, version")
    command.add_argument("--env", metavar="ENV", help="default: the one the key names")
    command = _command(keys, "list", _key_list, [listed], "list keys")
    command.add_argument("--machine", metavar="M", help="of this machine alone")
    command = _command(keys, "rename", _key_rename, [listed], "change a key's label")
    command.add_argument("key", metavar="KEY", help="its id or exact name")
    command.add_argument("name", metavar="NAME")
    for name, run, text in (
        ("show", _key_show, "show a key and its history"),
        ("disable", _key_disable, "refuse it from now on"),
        ("enable", _key_enable, "let it in again"),
    ):
        command = _command(keys, name, run, [listed], text)
        command.add_argument("key", metavar="KEY", help="its id or exact name")
    command = _command(keys, "verify", _key_verify, [listed], "verify the key on standard input")
    command.add_argument(
        "--env", metavar="ENV", help="the environment to accept; default: the one the key names"
    )
    command.add_argument("--client", metavar="ADDRESS", help="the caller's address")
    command.add_argument("--needs", metavar="RIGHT", action="append", default=[])

    from .cli_signs import add_signs  # both import this module
    from .cli_usage import add_usage

    add_usage(commands, listed)
    add_signs(commands)
    return parser


def _group(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    group = commands.add_parser(name, help=text, description=text)
    return group.add_subparsers(metavar="COMMAND", required=True)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    parents: list[argparse.ArgumentParser],
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, parents=parents)
    command.set_defaults(run=run)
    return command
