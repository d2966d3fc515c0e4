"""Artifacts behind HTTP. Needs the extra `serve`."""

from netweight.serve.server import serve

__all__ = ["serve"]
