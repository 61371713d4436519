"""The command ``papaours-auth``: administration for people (tables) and programs (``--json``).

Exit codes: 0 fine; 1 refused, not found, or a check failed; 2 wrong usage or configuration; 3 the store
cannot answer; 4 done, but the answer could not be written. A key is printed once, on creation; `key verify` and
`key import` read it from standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import pwd
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, TypeVar
from urllib.parse import quote

from . import __version__
from . import cli_streams as streams
from ._middleware import STORE_VARIABLE, store_url
from .authenticator import Authenticator
from .cli_streams import as_json, out, say
from .digest import (
    PEPPER_FILE_VARIABLE,
    PEPPER_VARIABLE,
    new_pepper,
    parse_peppers,
    peppers_from_environment,
)
from .exceptions import (
    AdministrationError,
    ConfigurationError,
    InvalidInput,
    PapaoursAuthError,
    Refused,
    StoreUnavailable,
)
from .format import KeyFormat, Secret
from .http import render
from .keys import Keys, NewKey
from .model import Key, Machine
from .names import unclear
from .pepper_file import advice_on_git, read_pepper_file, write_pepper_file
from .stores import Store, open_store
from .stores.sqlite import path_of

FINE, REFUSED, USAGE, UNAVAILABLE, UNWRITTEN = 0, 1, 2, 3, 4
_T = TypeVar("_T")
Kind = Literal["change", "check", "list"]
"""What is left of a command whose answer cannot be written: something done, a verdict nobody got, or nothing."""
_SPAN: Final = re.compile(r"(\d{1,6})([mhdw])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    streams.prepare()
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        streams.finish()


def _main(arguments: Sequence[str]) -> int:
    # What --help and --version leave to be written is written as a list is.
    kind: Kind = "list"
    code: int = FINE
    try:
        options = _parser().parse_args([_well_formed(word) for word in arguments])
        kind = options.kind
        code = options.run(options)
        streams.flush()
    except SystemExit as end:  # argparse has said what there is to say
        return _ended(end.code if isinstance(end.code, int) else FINE)
    except streams.Unwritten as error:
        return _unwritten(error, kind, code)
    except (ConfigurationError, InvalidInput) as error:
        return _fail(USAGE, error)
    except AdministrationError as error:
        return _fail(REFUSED, error)
    except StoreUnavailable as error:
        return _fail(UNAVAILABLE, error)
    except OSError as error:
        return _fail(
            USAGE, f"the system refused what this needs ({error.strerror}): {error.filename or 'no file'}"
        )
    except KeyboardInterrupt:
        return 130
    return code


def _ended(code: int) -> int:
    try:
        streams.flush()
    except streams.Unwritten as error:
        return _unwritten(error, "list", code)
    return code


def _unwritten(error: streams.Unwritten, kind: Kind, code: int) -> int:
    """Give the exit code of a command whose answer could not be written: never one that says more than is true."""
    if code == FINE and kind == "list" and error.reader_gone:
        return FINE  # `papaours-auth key list | head`: the reader has seen enough
    done = "what was asked is done, but " if kind == "change" else ""
    say(f"papaours-auth: {done}the answer could not be written ({error})")
    return code or UNWRITTEN


def _well_formed(word: str) -> str:
    try:
        return os.fsencode(word).decode("utf-8")  # also where the locale knows ASCII alone
    except UnicodeError:
        raise InvalidInput("an argument is not UTF-8 text: check your terminal's encoding") from None


def _fail(code: int, error: object) -> int:
    say(f"papaours-auth: {error}")
    return code


# init and doctor


def _init(options: argparse.Namespace) -> int:
    url = options.store or os.environ.get(STORE_VARIABLE) or "sqlite:///papaours.db"
    if url.startswith("sqlite:"):
        url = "sqlite:///" + quote(os.fsencode(path_of(url).absolute()))
    pepper_file = _pepper_file(options)
    with contextlib.closing(open_store(url, create=True)) as store:
        if pepper_file is not None and _make_pepper(pepper_file, store):
            say(f"Made the pepper in {pepper_file}. Without it no key can be verified: back it up.")
        elif pepper_file is not None:
            say(f"Kept the pepper in {pepper_file}.")
        peppers = parse_peppers(read_pepper_file(pepper_file)) if pepper_file else peppers_from_environment()
        Keys(
            store, peppers=peppers, actor=_actor()
        )  # records the pepper, or finds that it is not this store's
    if pepper_file is not None and (advice := advice_on_git(pepper_file)) is not None:
        say(f"Warning: {advice}")
    say("The store is ready. Your app needs what follows in its environment; a shell sets it by:")
    say('  eval "$(papaours-auth init)"')
    streams.out_raw(f"export {STORE_VARIABLE}={shlex.quote(url)}")
    if pepper_file is not None:
        streams.out_raw(f"export {PEPPER_FILE_VARIABLE}={shlex.quote(str(pepper_file))}")
    return FINE


def _pepper_file(options: argparse.Namespace) -> Path | None:
    """Return where the pepper is or is to be; None where PAPAOURS_PEPPER holds it."""
    named = options.pepper_file or os.environ.get(PEPPER_FILE_VARIABLE)
    if os.environ.get(PEPPER_VARIABLE):
        if named:
            raise ConfigurationError(
                f"{PEPPER_VARIABLE} is set, and a pepper file is named: keep one of them"
            )
        return None
    return Path(named or "papaours.pepper").absolute()


def _make_pepper(path: Path, store: Store) -> bool:
    """Make a pepper unless its file is there; another one would be of no use to a store that has its own."""
    if os.path.lexists(path):
        return False
    if store.describe().peppers:
        raise ConfigurationError(
            f"this store has a pepper already, and {path} is not there: name the file that holds it by "
            f"--pepper-file or {PEPPER_FILE_VARIABLE}"
        )
    write_pepper_file(path, new_pepper() + "\n")
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
        out(f"{mark:8} {what:10} {found}")
    return worst


class _Warning(Exception):
    """Something works, and should still be looked at."""


def _check_pepper(_: argparse.Namespace) -> str:
    ring = peppers_from_environment()
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
    streams.check_reader()
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
    streams.check_reader()
    with _keys(options) as keys:
        old = keys.key(options.key)
        new = keys.rotate_key(old.id, name=options.name, expires=_expiry(options.expires))
        fields = _key_fields(keys)(new.key)
    _show_new(new, fields, options)
    say(f"The old key still works: papaours-auth key disable {old.id}, once nothing uses it.")
    return FINE


def _show_new(new: NewKey, fields: dict[str, str], options: argparse.Namespace) -> None:
    """Show a key just made. One whose text nobody got is disabled: no key is active that nobody has."""
    _warn_unclear(new.key)
    try:
        _print_new(new, fields, options)
        streams.flush()
    except (streams.Unwritten, KeyboardInterrupt):
        lost = f"The text of {new.key.id} could not be written, and cannot be shown again"
        try:
            with _keys(options) as keys:
                keys.disable_key(new.key.id)
        except PapaoursAuthError:
            say(f"{lost}. Disable it, and make another: papaours-auth key disable {new.key.id}")
        else:
            say(f"{lost}, so the key was disabled: make another.")
        raise


def _print_new(new: NewKey, fields: dict[str, str], options: argparse.Namespace) -> None:
    if options.quiet:
        out(new.secret.reveal())
    elif options.json:
        out(as_json({**fields, "key": new.secret.reveal()}))
    else:
        _table([fields])
        say("\nThe key, shown this once. It is secret in spite of its pk_: keep it in a vault.")
        out(new.secret.reveal())


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
                out(f"{_time(change.at)}  {change.kind}  by {change.actor}")
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
    del text  # most of the key is in it
    with Authenticator(_url(options), environment=environment, watch=False) as authenticator:
        try:
            identity = authenticator.authenticate(secret.reveal(), client=options.client, needs=options.needs)
        except Refused as refused:
            answer = render(refused)
            if options.json:
                out(as_json({"accepted": False, "reason": refused.reason, "status": answer.status}))
            else:
                out(f"refused: {refused.reason} ({answer.status}). {json.loads(answer.body)['detail']}")
            return UNAVAILABLE if answer.status == 503 else REFUSED
    if options.json:
        known = {"id": identity.key.id, "machine": identity.machine.id, "rights": sorted(identity.rights)}
        out(as_json({"accepted": True, **known}))
    else:
        out(f"accepted: {identity.key.name} ({identity.key.id}), of {identity.machine.name}")
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
        say(f"The name of {key.id} is not clear: {lack}. 'papaours-auth key rename' changes it.")


def _read_key() -> Secret:
    if sys.stdin is not None and sys.stdin.isatty():
        try:
            return Secret(getpass.getpass("Key (not shown): ").strip())
        except EOFError:
            raise InvalidInput("no key was typed") from None
    return Secret(streams.read_input())


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
            out(as_json(row))
    elif rows:
        _table(rows)
    else:
        say(empty)


def _table(rows: Sequence[dict[str, str]]) -> None:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        out("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())


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
    command.add_argument(
        "--pepper-file", metavar="PATH", help=f"default: {PEPPER_FILE_VARIABLE}, else papaours.pepper"
    )
    _command(commands, "doctor", _doctor, [store], "check pepper, store and keys", "check")
    command = _command(commands, "demo", _demo, [], "run two protected apps and call them", "check")
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
    _command(machines, "list", _machine_list, [listed], "list machines", "list")
    command = _command(machines, "show", _machine_show, [listed], "show a machine and its keys", "list")
    command.add_argument("machine", metavar="MACHINE", help="its id or exact name")
    for name, run, text in (
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
    command = _command(keys, "list", _key_list, [listed], "list keys", "list")
    command.add_argument("--machine", metavar="M", help="of this machine alone")
    command = _command(keys, "rename", _key_rename, [listed], "change a key's label")
    command.add_argument("key", metavar="KEY", help="its id or exact name")
    command.add_argument("name", metavar="NAME")
    command = _command(keys, "show", _key_show, [listed], "show a key and its history", "list")
    command.add_argument("key", metavar="KEY", help="its id or exact name")
    for name, run, text in (
        ("disable", _key_disable, "refuse it from now on"),
        ("enable", _key_enable, "let it in again"),
    ):
        command = _command(keys, name, run, [listed], text)
        command.add_argument("key", metavar="KEY", help="its id or exact name")
    command = _command(keys, "verify", _key_verify, [listed], "verify the key on standard input", "check")
    command.add_argument(
        "--env", metavar="ENV", help="the environment to accept; default: the one the key names"
    )
    command.add_argument("--client", metavar="ADDRESS", help="the caller's address")
    command.add_argument("--needs", metavar="RIGHT", action="append")

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
    kind: Kind = "change",
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, parents=parents)
    command.set_defaults(run=run, kind=kind)
    return command
