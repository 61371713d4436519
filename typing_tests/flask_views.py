"""Checked by mypy, never run: views under the decorators keep their types."""

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from flask import request

from papaours_auth import Identity
from papaours_auth.flask import PapaoursAuth, identity, require

auth = PapaoursAuth(environment="prod", proxy_drops_underscores=True, trusted_proxies=["10.0.0.0/8"])
PapaoursAuth(environment="prod", protect=["/api/*"])  # type: ignore[call-arg]  # no such option
PapaoursAuth(environment="prod", exempt="/healthz")


@auth.required
def any_caller(number: int) -> str:
    return identity().machine.name


@auth.required("contrats:lecture", "contrats:écriture", organisation_from="organisation")
def with_rights(organisation: str) -> str:
    return organisation


@auth.required("contrats:lecture", organisation=lambda: request.args["organisation"])
async def waits(number: int, *, short: bool = False) -> bytes:
    return b""


view: Callable[[int], str] = any_caller
any_caller("1")  # type: ignore[arg-type]
assert_type(with_rights("cfa-lyon"), str)
waiting: Coroutine[Any, Any, bytes] = waits(1, short=True)
assert_type(require("contrats:lecture", organisation="cfa-lyon"), Identity)
auth.required()  # type: ignore[call-overload]  # without a right, it is written without parentheses
auth.required("contrats:lecture", organisation=None)  # type: ignore[call-overload]  # not found is not "any"
