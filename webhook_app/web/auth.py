"""Who may do what: `Authorization: Bearer TOKEN`, and the scope an operation needs."""

import functools
from collections.abc import Callable
from typing import Any

from flask import Response, g, request

from webhook_app import db, tokens
from webhook_app.settings import Settings
from webhook_app.web.problems import problem
from webhook_app.web.state import state

View = Callable[..., Any]

REALM = 'Bearer realm="buildrelay"'


def needs(scope: str, *, is_open: Callable[[Settings], bool] | None = None) -> Callable[[View], View]:
    """Decorate a view: 401 without a known token, 403 if its scopes don't include `scope`.

    429 after many wrong tokens.  `is_open`: settings under which the view needs no token at all.  Raises
    `StoreUnavailable` if a token can't be looked up; the bootstrap token needs no look-up.
    """

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            refused = None if is_open and is_open(state().settings) else _refusal(scope)
            return view(*args, **kwargs) if refused is None else refused

        return guarded

    return decorate


def may(scope: str) -> bool:
    """Whether the token of this request includes a scope; False where none was looked at."""
    return scope in g.get("scopes", ())


def _refusal(scope: str) -> Response | None:
    presented = _presented()
    if presented is None:
        return problem(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": REALM})
    scopes = _scopes(presented)
    if scopes is None:
        return _unknown()
    g.scopes = scopes
    if scope not in scopes:
        challenge = f'{REALM}, error="insufficient_scope", scope="{scope}"'
        return problem(403, f"a token with scope {scope} is needed", {"WWW-Authenticate": challenge})
    return None


def _unknown() -> Response:
    """401, or 429 if many wrong tokens came from this address; right ones from there pass all the same."""
    wait = state().guesses.note(request.remote_addr or "")
    if wait:
        return problem(429, "too many wrong tokens came from this address", {"Retry-After": str(wait)})
    return problem(401, "the token is unknown", {"WWW-Authenticate": f'{REALM}, error="invalid_token"'})


def _presented() -> str | None:
    """The token of the request, if it brings one."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _scopes(presented: str) -> frozenset[str] | None:
    held = state()
    if tokens.is_bootstrap(presented, held.settings.admin_token):
        return tokens.included(("admin",))
    with db.reading(held.engine) as connection:
        return tokens.authenticate(connection, presented)
