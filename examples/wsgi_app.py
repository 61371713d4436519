"""The contracts of a training center, as a WSGI app behind Papaours keys: the same API as asgi_app.py.

waitress-serve wsgi_app:app     with PAPAOURS_STORE and PAPAOURS_PEPPER_FILE set, as `papaours-auth init` prints them
"""

import json

from werkzeug.exceptions import Forbidden
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from papaours_auth.wsgi import PapaoursAuthMiddleware, identity_of

URLS = Map(
    [
        Rule("/healthz", endpoint="healthz", methods=["GET"]),
        Rule("/contracts", endpoint="contracts", methods=["GET"]),
        Rule("/contracts/<number>", endpoint="delete_contract", methods=["DELETE"]),
    ]
)


@Request.application
def api(request: Request) -> Response:
    endpoint, _ = URLS.bind_to_environ(request.environ).match()
    if endpoint == "healthz":
        return _json({"status": "ok"})
    identity = identity_of(request.environ)
    right = "contrats:lecture" if endpoint == "contracts" else "contrats:suppression"
    if identity is None or not identity.allows(right):
        raise Forbidden
    if endpoint == "delete_contract":
        return Response(status=204)
    return _json({"caller": identity.machine.name, "contracts": ["C-2026-001", "C-2026-002"]})


def _json(value: object) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), mimetype="application/json")


app = PapaoursAuthMiddleware(api, environment="prod", exempt=["/healthz"])
