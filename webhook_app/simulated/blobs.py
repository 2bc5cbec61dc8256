"""The store beside a platform's API that its redirects lead to: signed links, good for a while."""

import hashlib
import hmac
import secrets
from collections.abc import Callable

from webhook_app.simulated.httpd import Request, Response

PREFIX = "/_blobs/"


class Blobs:
    """`url`: the store's own address.  `seconds`: for how long a link is good, by the clock `now`."""

    def __init__(self, url: str, now: Callable[[], float], seconds: float) -> None:
        self.url = url
        self.seconds = seconds
        self._now = now
        self._key = secrets.token_bytes(32)

    def link(self, name: str) -> Response:
        """A redirect to this blob."""
        path, until = PREFIX + name, str(self._now() + self.seconds)
        location = f"{self.url}{path}?se={until}&sig={self._signature(path, until)}"
        return Response(302, headers={"Location": location})

    def _signature(self, path: str, until: str) -> str:
        return hmac.new(self._key, f"{path}\n{until}".encode(), hashlib.sha256).hexdigest()

    def refusal(self, request: Request) -> Response | None:
        """Why this request gets nothing; None if its link is good.  A foreign `Authorization` is a fault."""
        if request.headers.get("authorization"):
            return problem(400, "InvalidAuthenticationInfo")
        until = request.parameter("se")
        genuine = hmac.compare_digest(request.parameter("sig"), self._signature(request.path, until))
        if not genuine or self._now() >= float(until):
            return problem(403, "AuthenticationFailed")
        return None


def problem(status: int, code: str) -> Response:
    """An error in the XML of such stores."""
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    )
    return Response(status, body.encode(), {"Content-Type": "application/xml"})
