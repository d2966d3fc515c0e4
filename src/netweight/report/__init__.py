"""One self-contained HTML page from a manifest, a certificate and measurements: no script, nothing fetched."""

from netweight.report.examples import Example
from netweight.report.page import render

__all__ = ["Example", "render"]
