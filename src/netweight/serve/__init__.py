"""Artifacts behind HTTP. Needs the extra `serve`."""

from netweight.serve.options import Options, Rollout
from netweight.serve.server import serve

__all__ = ["Options", "Rollout", "serve"]
