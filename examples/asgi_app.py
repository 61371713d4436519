"""The contracts of a training center, as an ASGI app behind Papaours keys.

uvicorn asgi_app:app        with PAPAOURS_STORE and PAPAOURS_PEPPER_FILE set, as `papaours-auth init` prints them
"""

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from papaours_auth.starlette import PapaoursAuthMiddleware, identity


def healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


@requires("contrats:lecture")
def contracts(request: Request) -> Response:
    return JSONResponse({"caller": identity(request).machine.name, "contracts": ["C-2026-001", "C-2026-002"]})


@requires("contrats:suppression")
def delete_contract(request: Request) -> Response:
    return Response(status_code=204)


app = PapaoursAuthMiddleware(
    Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/contracts", contracts),
            Route("/contracts/{number}", delete_contract, methods=["DELETE"]),
        ]
    ),
    environment="prod",
    exempt=["/healthz"],
)
