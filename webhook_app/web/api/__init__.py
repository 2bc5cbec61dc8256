"""The HTTP API: `register()` puts it, `/openapi.json` and `/docs` into an application."""

from flask import Flask, Response, redirect, request
from werkzeug.wrappers import Response as BaseResponse

from webhook_app import VERSION
from webhook_app.web.api import builds, docs, health, leavings, operations, progress, subscribers
from webhook_app.web.api.spec import BEARER, Api

TITLE = "BuildRelay"
OPENAPI = "3.1.0"


def register(app: Flask) -> None:
    """Add every operation under `/api`, those of health at the root, and the documents about them."""
    app.config |= {"OPENAPI_URL_PREFIX": "/", "OPENAPI_JSON_PATH": "openapi.json"}
    app.json.sort_keys = False  # type: ignore[attr-defined]  # fields stay in the order of their schema
    api = Api(app, spec_kwargs={"title": TITLE, "version": VERSION, "openapi_version": OPENAPI})
    api.spec.components.security_scheme(
        BEARER, {"type": "http", "scheme": "bearer", "description": "An API token with the scope named."}
    )
    for module in (builds, leavings, progress, subscribers, operations):
        api.register_blueprint(module.blueprint, url_prefix="/api")
    api.register_blueprint(health.blueprint)

    @app.after_request
    def keep_from_caches(answer: Response) -> Response:
        """Some answers hold a fresh secret, and all depend on the token."""
        if request.path.startswith("/api/"):
            answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    @app.get("/docs")
    def show_docs() -> Response:
        return docs.page(api.spec.to_dict())

    @app.get("/")
    def show_front() -> BaseResponse:
        return redirect("/docs")
