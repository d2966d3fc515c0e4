"""Bodies of requests: bounded one by one, and all together."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from netweight.serve.problems import Problem, full, gone
from netweight.serve.schema import MOST_BYTES

MOST_HELD = 64 * MOST_BYTES  # of all requests that are still arriving: slow clients must not fill the memory


class Bodies:
    """What one process holds of requests until they are whole."""

    def __init__(self) -> None:
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """At most MOST_BYTES. Raises Problem."""
        headers = dict(request.scope["headers"])
        # Browsers ask nobody before a page sends text elsewhere, and any page may send it to this machine.
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            raise Problem(
                403,
                "other-site",
                "a page of another site asks (Sec-Fetch-Site); ask from the page of this server, or outside a browser.",
            )
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.strip().lower() != b"identity":
            raise Problem(415, "encoded-body", "send the JSON as it is, without Content-Encoding.")
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held += len(part)
                if size > MOST_BYTES:
                    raise Problem(
                        413, "too-large", f"a body may have {MOST_BYTES:,} bytes; send fewer texts at a time."
                    )
                if self._held > MOST_HELD:
                    raise full(1.0)
                parts.append(part)
        except ClientDisconnect:
            raise gone() from None
        finally:
            self._held -= size
        return b"".join(parts)
