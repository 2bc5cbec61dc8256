"""What all operations share: one decorator that routes, guards, validates and documents.

The OpenAPI document says what the program does because both come from the same arguments.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NoReturn, cast

import flask_smorest
import orjson
from flask import Request, request
from marshmallow import RAISE, Schema, ValidationError
from webargs import missing
from webargs.flaskparser import FlaskParser
from webargs.flaskparser import abort as _abort

from webhook_app.settings import Settings
from webhook_app.web import auth, schemas
from webhook_app.web.problems import problem

View = Callable[..., Any]
Shape = type[Schema]

BEARER = "bearer"
STORE_ID = "int(min=1, max=9223372036854775807)"
"""Route converter of numbers that a database can compare."""


class Parser(FlaskParser):
    """webargs' parser with orjson: for it, deep nesting and lone surrogates are a 400 and no fault."""

    DEFAULT_UNKNOWN_BY_LOCATION = {  # noqa: RUF012  webargs' own type
        **FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION,
        "query": RAISE,
        "json": RAISE,
    }

    def load_json(self, req: Request, schema: Schema) -> Any:
        """The body; `missing` if there is none."""
        body = req.get_data()
        if not body:
            return missing
        if not req.is_json:
            abort(415, "send application/json")
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            abort(400, "the body is not JSON")

    def handle_error(
        self,
        error: ValidationError,
        req: Request,
        schema: Schema,
        *,
        error_status_code: int | None,
        error_headers: Mapping[str, str] | None,
    ) -> NoReturn:
        """422 with what is wrong, by place and field; places in a list are named by text, as JSON needs."""
        _abort(422, exc=error, message="something is not valid, see errors", messages=_texts(error.messages))


def _texts(messages: Any) -> Any:
    if isinstance(messages, Mapping):
        return {str(name): _texts(inner) for name, inner in messages.items()}
    return messages


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """flask-smorest's blueprint with the strict parser."""

    ARGUMENTS_PARSER = Parser()


class Api(flask_smorest.Api):  # type: ignore[misc]
    """flask-smorest's Api, but errors are ours: the handlers of `problems`, and documented as such."""

    ERROR_SCHEMA = schemas.Problem

    def _register_error_handlers(self) -> None:
        """None: `problems.register` has them for the whole application."""

    def _register_responses(self) -> None:
        """Document errors with their media type."""
        self.DEFAULT_RESPONSE_CONTENT_TYPE = "application/problem+json"
        super()._register_responses()
        del self.DEFAULT_RESPONSE_CONTENT_TYPE  # the class has the usual one


def abort(status: int, detail: str, **fields: str) -> NoReturn:
    """End the request with a problem; `fields` says what is wrong with which field of the body."""
    messages = {"json": {name: [text] for name, text in fields.items()}} if fields else None
    _abort(status, message=detail, messages=messages)


def operation(
    blueprint: Blueprint,
    method: str,
    rule: str,
    answer: Shape | None,
    *,
    scope: str | None = "read",
    status: int = 200,
    query: Shape | None = None,
    body: Shape | None = None,
    body_needed: bool = True,
    errors: Iterable[int] = (),
    shaped: Mapping[int, Shape] | None = None,
    is_open: Callable[[Settings], bool] | None = None,
    also: str | None = None,
    media: str | None = None,
) -> Callable[[View], View]:
    """Register a view as an operation.  Its docstring is the documentation; its name the operation's id.

    `answer` shapes what it returns (None: no content).  `query` and `body` are handed in first, as
    dicts, in this order.  `scope` None: everybody may.  `errors`: further statuses it may answer with a
    problem; `shaped`: those it answers with a shape of its own.  `also`: another media type of the answer;
    `media`: it is no JSON but a file or text of that media type.
    """

    def decorate(view: View) -> View:
        wrapped = _answering(blueprint, status, answer, also, media)(_storable_path(view))
        if body is not None:
            wrapped = blueprint.arguments(body, required=body_needed)(wrapped)
        if query is not None:
            wrapped = blueprint.arguments(query, location="query")(wrapped)
        for code, shape in (shaped or {}).items():
            wrapped = blueprint.alt_response(code, schema=shape)(wrapped)
        for code in sorted(_problems(scope, body, errors) - set(shaped or {})):
            wrapped = blueprint.alt_response(code, HTTPStatus(code).name)(wrapped)
        security = _security(scope, is_open)
        wrapped = blueprint.doc(operationId=view.__name__, security=security)(wrapped)
        if body is not None and body_needed:
            wrapped = _with_body(wrapped)
        if scope is not None:
            wrapped = auth.needs(scope, is_open=is_open)(wrapped)
        blueprint.add_url_rule(rule, view.__name__, wrapped, methods=[method])
        return view

    return decorate


def _answering(
    blueprint: Blueprint, status: int, answer: Shape | None, also: str | None, media: str | None
) -> Callable[[View], View]:
    """Shape and document the answer."""
    if media is not None:
        content = {"type": "string"} | ({} if media.startswith("text/") else {"format": "binary"})
        decorator: Callable[[View], View] = blueprint.response(status, content, content_type=media)
        return decorator
    shaped = blueprint.response(status, answer)
    if also is None:
        return cast(Callable[[View], View], shaped)
    bodies = {"application/json": {"schema": answer}, also: {"schema": {"type": "string"}}}
    told = {"description": HTTPStatus(status).phrase, "content": bodies}
    other = blueprint.doc(responses={str(status): told})
    return lambda view: cast(View, shaped(other(view)))


def _problems(scope: str | None, body: Shape | None, errors: Iterable[int]) -> set[int]:
    guarded = {401, 403, 429, 503} if scope else set()
    return guarded | ({400, 415} if body else set()) | set(errors)


def _security(scope: str | None, is_open: Callable[[Settings], bool] | None) -> list[dict[str, list[str]]]:
    """OpenAPI's security requirement; an empty one says that it may also go without."""
    if scope is None:
        return []
    return [{BEARER: [scope]}] + ([{}] if is_open else [])


def _storable_path(view: View) -> View:
    """404 for a path that holds a NUL: no id does, and PostgreSQL would refuse the question."""

    @functools.wraps(view)
    def guarded(*args: Any, **path: Any) -> Any:
        if any(isinstance(value, str) and "\0" in value for value in path.values()):
            return problem(404, "there is nothing at this address")
        return view(*args, **path)

    return guarded


def _with_body(view: View) -> View:
    """422 without a body: where every field may be left out, nothing would else be missed."""

    @functools.wraps(view)
    def guarded(*args: Any, **path: Any) -> Any:
        return view(*args, **path) if request.get_data() else problem(422, "a JSON body is needed")

    return guarded


def page(rows: Sequence[Any], limit: int, key: Callable[[Any], object]) -> dict[str, Any]:
    """The envelope of a list, of one row more than `limit` if there is a next page."""
    shown = rows[:limit]
    more = len(rows) > limit
    return {"items": shown, "next_cursor": schemas.cursor(key(shown[-1])) if more else None}
