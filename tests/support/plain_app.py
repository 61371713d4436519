"""The README's app, recorded: it answers every scope alike, and has never heard of lifespan."""

import os

from papaours_auth.asgi import PapaoursAuthMiddleware, Receive, Scope, Send, identity_of
from papaours_auth.usage import Recorder


async def api(scope: Scope, receive: Receive, send: Send) -> None:
    caller = identity_of(scope)
    text = b"anybody" if scope["path"] == "/healthz" or caller is None else caller.machine.name.encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text})


# So long an interval that all hangs on the end.
recorder = Recorder(os.environ["USAGE"], interval=3600.0)
app = PapaoursAuthMiddleware(api, environment="prod", exempt=["/healthz"], usage=recorder)
