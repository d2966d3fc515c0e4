"""Artifacts behind HTTP. Needs the extra `serve`."""

from netweight.serve.server import Options, serve

__all__ = ["Options", "serve"]
