"""Where alerts go besides the log: a webhook."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.request
from urllib.parse import urlsplit

from netweight.connect import Still
from netweight.errors import OptionError
from netweight.monitor.watch import Alert

log = logging.getLogger("netweight.monitor")
_SECONDS = 5.0
_WAITS = (0.5, 2.0)  # before the second and the third try


class Webhook:
    """Posts alerts as JSON. Raises OptionError for anything but an http or https URL without user and password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise OptionError("the URL of a webhook holds a user or password, which are not sent; leave them out.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"{url!r} is no URL that alerts can be posted to; use http:// or https://.")
        self._url, self._host = url, parts.hostname
        self._opener = urllib.request.build_opener(Still)

    def __call__(self, alert: Alert) -> bool:
        """Whether it was taken; three tries. Failures go to the log, without the URL, which may be secret."""
        body = json.dumps(alert.to_dict()).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        for wait in (*_WAITS, None):
            try:
                with self._opener.open(request, timeout=_SECONDS):
                    return True
            except (OSError, ValueError, http.client.HTTPException) as problem:
                log.warning("the webhook at %s did not take an alert: %s", self._host, type(problem).__name__)
            if wait is not None:
                time.sleep(wait)
        return False
