"""Servers that have no command of their own: ``python -m plain_servers SERVER MODULE:APP PORT``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from werkzeug.serving import run_simple

UWSGI = Path(sys.executable).with_name("uwsgi")  # of PyPI's pyuwsgi


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def main(server: str, app: str, port: str, *more: str) -> None:
    module, _, name = app.partition(":")
    if server == "uwsgi":
        options = f"--http-socket=127.0.0.1:{port} --module={app} --enable-threads --need-app --die-on-term"
        os.execv(UWSGI, ["uwsgi", *options.split(), *more])
    if server == "uwsgi-workers":
        options = f"--http-socket=127.0.0.1:{port} --module={app} --master --processes=2"
        os.execv(UWSGI, ["uwsgi", *options.split(), *more])
    application = getattr(import_module(module), name)
    if server == "wsgiref":
        make_server("127.0.0.1", int(port), application, Threaded, Quiet).serve_forever()
    else:
        run_simple("127.0.0.1", int(port), application, threaded=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
