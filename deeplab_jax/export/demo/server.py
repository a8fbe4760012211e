"""Serves the demo's folder to browsers."""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import sys
from typing import Any

from deeplab_jax.utils.errors import UserError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the types and headers that the page needs."""

    # The system's table of types lacks some of these, and browsers refuse modules of other types.
    extensions_map = {  # noqa: RUF012
        "": "application/octet-stream",
        ".html": "text/html; charset=utf-8",
        ".json": "application/json",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        # Browsers give threads to WebAssembly only on a page with the first two.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_head(self) -> Any:
        try:
            return super().send_head()
        except ValueError:  # a zero byte in the path
            self.send_error(http.HTTPStatus.NOT_FOUND)
            return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the page was closed meanwhile
            super().handle_error(request, client_address)


def make_server(
    folder: pathlib.Path, host: str = "127.0.0.1", port: int = 8000
) -> http.server.ThreadingHTTPServer:
    """Returns a server of the files in a folder, which holds the port and does not answer yet.

    Args:
      folder: what to serve.
      host: address to listen at; 0.0.0.0 also answers other machines.
      port: 0 takes any free port.

    Raises:
      UserError: the port is in use, or the address is none of this machine.
    """
    try:
        return _Server((host, port), functools.partial(Handler, directory=os.fspath(folder)))
    except OSError as error:
        raise UserError(
            f"cannot serve at {host} port {port}: {error.strerror}. Choose another port by --port "
            "(0: any that is free), or an address of this machine by --host"
        ) from None
