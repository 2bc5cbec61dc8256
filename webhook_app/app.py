"""`create_app()`: settings in, a Flask application out.  Importing this module does nothing."""

from collections.abc import Sequence

from flask import Flask

from webhook_app import db, inbox, queues, settings
from webhook_app.health import Refusals
from webhook_app.inbox import Arrival, Receipt
from webhook_app.settings import Settings
from webhook_app.times import utc_now
from webhook_app.web import hooks, problems
from webhook_app.web.api import register as register_api
from webhook_app.web.guesses import Guesses
from webhook_app.web.state import State

REDIS_TIMEOUT_SECONDS = 0.5


def create_app(values: Settings | None = None) -> Flask:
    """A web application over the store and Redis that `values` (default: the environment) names.

    Raises `SettingsError` for a value that can't be used; connects to nothing yet.
    """
    values = values or settings.load()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = hooks.MOST_API_BYTES
    app.extensions["buildrelay"] = state = _state(values)
    problems.register(app)
    register_api(app)
    app.wsgi_app = hooks.in_front_of(app.wsgi_app, state)  # type: ignore[method-assign,assignment]
    return app


def _state(values: Settings) -> State:
    engine = db.connect(
        values.database_url,
        values.sqlite_synchronous,
        busy_seconds=db.RECEPTION_BUSY_SECONDS,
        pooler=values.database_pooler,
    )
    redis = queues.connect(values.redis_url, REDIS_TIMEOUT_SECONDS)
    bell = queues.Bell(redis)
    pace = settings.pace(values)

    def take(arrivals: Sequence[Arrival]) -> list[Receipt]:
        return inbox.take(engine, arrivals, utc_now(), pace)

    def ring(receipts: Sequence[Receipt]) -> None:
        if any(receipt.events for receipt in receipts):
            bell.ring(queues.DELIVER)
        if any(receipt.ask for receipt in receipts):
            bell.ring(queues.POLL)

    take_together = db.GroupCommit(take, after=ring)
    refusals, guesses, redact = Refusals(engine), Guesses(redis), settings.redact(values)
    return State(values, engine, redis, bell, pace, take_together, refusals, guesses, redact)
