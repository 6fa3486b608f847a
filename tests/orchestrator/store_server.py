"""MLflow's own tracking server in this process, which can be told to fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server


class Server:
    """MLflow's own tracking server over a SQLite file, on a port of its own, that can be told to fail."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.failing = False
        self.refused = 0
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.failing:
            self.refused += 1
            start_response("500 INTERNAL SERVER ERROR", [("Content-Type", "text/html")])
            return [b"<h1>Internal Server Error</h1>"]
        return self._application(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(application: Callable[..., Iterable[bytes]]) -> Iterator[tuple[Server, str]]:
    """The server around MLflow's application, and its address."""
    server = Server(application)
    listening = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
