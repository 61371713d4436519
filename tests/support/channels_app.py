"""Django Channels inside the middleware: sessions for people in the browser, keys for machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import django
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

from papaours_auth.asgi import PapaoursAuthMiddleware, Receive, Scope, Send, identity_of

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="of tests alone, and long enough for what Django checks",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DJANGO_DB"]}},
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)
django.setup()


def healthz(request: Any) -> Any:
    return HttpResponse("ok")


urlpatterns = [path("healthz", healthz)]


async def live(scope: Scope, receive: Receive, send: Send) -> None:
    """Say who is there: the machine by its key, and the person by the session."""
    caller = identity_of(scope)
    await receive()
    await send({"type": "websocket.accept"})
    text = f"{caller.machine.name if caller else 'nobody'}, {scope['user'].get_username() or 'anonymous'}"
    await send({"type": "websocket.send", "text": text})
    await send({"type": "websocket.close"})


def log_somebody_in() -> None:
    """Make a person and a session, and write the session's key where the test looks for it."""
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
    from django.contrib.auth.models import User
    from django.contrib.sessions.backends.db import SessionStore
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    person = User.objects.create_user("ada")
    session = SessionStore()
    session[SESSION_KEY] = str(person.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = person.get_session_auth_hash()
    session.save()
    Path(os.environ["SESSION"]).write_text(session.session_key)


log_somebody_in()
routes = [path("live", live), path("public/live", live)]
app = PapaoursAuthMiddleware(
    ProtocolTypeRouter({"http": get_asgi_application(), "websocket": AuthMiddlewareStack(URLRouter(routes))}),
    environment="prod",
    exempt=["/healthz", "/public/*"],
)
