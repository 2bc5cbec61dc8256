"""Who may ask the simulated GitLab: personal tokens for ever, OAuth tokens for two hours."""

import secrets
from collections.abc import Callable, Mapping
from typing import NamedTuple

from webhook_app.simulated.httpd import Response, json_response


class Pair(NamedTuple):
    """An access token with the refresh token that came with it."""

    access: str
    refresh: str
    expires_at: float


class OAuth:
    """An OAuth application with one user.  A refresh makes both old tokens worthless at once."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.client_id = "simulated-application"
        self.client_secret = secrets.token_hex(16)
        self.lifetime_seconds = 7200.0
        self.refreshes = 0
        self._now = now
        self._pairs: dict[str, Pair] = {}  # by access token
        self._dead: set[str] = set()

    def grant(self) -> Pair:
        """A new pair, as after a person agreed; older ones stay."""
        pair = Pair(secrets.token_hex(32), secrets.token_hex(32), self._now() + self.lifetime_seconds)
        self._pairs[pair.access] = pair
        return pair

    def revoke(self, access: str) -> None:
        """Neither token of this pair is good any more."""
        if self._pairs.pop(access, None):
            self._dead.add(access)

    def knows(self, access: str) -> bool:
        """Did this token ever come from here?"""
        return access in self._pairs or access in self._dead

    def objection(self, access: str) -> Response | None:
        """Why this access token is refused; None if it is good."""
        pair = self._pairs.get(access)
        if pair is None:
            return _refused(
                "invalid_token", "Token was revoked. You have to re-authorize from the user.", 401
            )
        if pair.expires_at <= self._now():
            text = "Token is expired. You can either do re-authorization or token refresh."
            return _refused("invalid_token", text, 401)
        return None

    def token(self, form: Mapping[str, str]) -> Response:
        """`POST /oauth/token` with `grant_type=refresh_token`."""
        if (form.get("client_id"), form.get("client_secret")) != (self.client_id, self.client_secret):
            return _refused("invalid_client", "Client authentication failed due to unknown client.", 401)
        if form.get("grant_type") != "refresh_token":
            return _refused("unsupported_grant_type", "The grant type is not supported.", 400)
        old = next((pair for pair in self._pairs.values() if pair.refresh == form.get("refresh_token")), None)
        if old is None:
            return _refused(
                "invalid_grant", "The provided authorization grant is invalid, expired, revoked.", 400
            )
        self.revoke(old.access)
        self.refreshes += 1
        new = self.grant()
        return json_response({
            "access_token": new.access, "refresh_token": new.refresh, "token_type": "Bearer",
            "expires_in": int(self.lifetime_seconds), "scope": "api", "created_at": int(self._now()),
        })  # fmt: skip


def _refused(error: str, description: str, status: int) -> Response:
    return json_response({"error": error, "error_description": description}, status)
