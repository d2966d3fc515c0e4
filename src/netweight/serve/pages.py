"""The playground: one page at `/` that asks this server, with nothing from elsewhere."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FILES = importlib.resources.files("netweight.serve") / "playground"


def _paths() -> Mapping[str, str]:
    """The file behind each path."""
    names = [file.name for file in _FILES.iterdir() if file.name != "index.html"]
    return {"/": "index.html"} | {f"/playground/{name}": name for name in sorted(names)}


PATHS = _paths()


def playground(app: Starlette) -> None:
    """Add the page. Its files are read now, once."""
    for path, name in PATHS.items():
        app.router.routes.append(Route(path, _file(name), methods=["GET"], include_in_schema=False))


def _file(name: str) -> Response:
    kind = _TYPES[name[name.rindex(".") :]]
    return Response((_FILES / name).read_bytes(), headers=_HEADERS, media_type=kind)
