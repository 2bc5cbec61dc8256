"""Is the process alive, and is all there that it stands on?  No token: balancers and monitors ask."""

import time
from collections.abc import Callable
from typing import Any

from flask import Response
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from webhook_app import api_health, db, health, metrics, migrations, queues
from webhook_app.db import StoreUnavailable
from webhook_app.times import iso, utc_now
from webhook_app.web import schemas
from webhook_app.web.api.spec import Blueprint, operation
from webhook_app.web.state import state

blueprint = Blueprint("health", __name__, description="Health of the service")


@operation(blueprint, "GET", "/healthz", schemas.Healthy, scope=None)
def get_health() -> Any:
    """Say that this process answers; nothing else is looked at."""
    return {"status": "ok"}


@operation(blueprint, "GET", "/readyz", schemas.Readiness, scope=None, shaped={503: schemas.Readiness})
def get_readiness() -> Any:
    """Look at the database, its migrations, Redis, the scheduler and the workers; 503 if one is missing.

    Webhooks are taken as long as the database answers: Redis only wakes the workers.  That a CI platform is
    away shows in `sources`, and makes nothing unready: it is not our fault, and pushes are taken.
    """
    checks = {
        "database": _checked(_database),
        "migrations": _checked(_migrations),
        "redis": _checked(_redis),
        "scheduler": _checked(_scheduler),
        "workers": _checked(_workers),
    }
    ready = all(check["ok"] for check in checks.values())
    checks["sources"] = _checked(_sources)
    return {"status": "ready" if ready else "unready", "checks": checks}, 200 if ready else 503


@operation(blueprint, "GET", "/metrics", None, scope=None, errors=[503], media="text/plain")
def get_metrics() -> Any:
    """Tell push share, missed pushes, budgets, backlogs and workers in Prometheus' text format.

    All of it is read when asked, so every web process tells the same.
    """
    held, now = state(), utc_now()
    with db.reading(held.engine) as connection:
        told = metrics.of_store(connection, held.settings.sources, now)
    held.guesses.flush()
    told += metrics.of_redis(held.redis, now)
    return Response(metrics.exposition(told), content_type=metrics.CONTENT_TYPE)


def _sources() -> tuple[bool, str]:
    with db.reading(state().engine) as connection:
        told = health.snapshot(connection)
    since = {name: api_health.failing_since(told.get(name, {})) for name in state().settings.sources}
    failing = [
        f"{name} can't be read since {iso(at)} ({told[name]['api_error_kind']})"
        for name, at in since.items()
        if at is not None
    ]
    return not failing, "; ".join(failing) or "no source is known to fail"


def _checked(check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    """Run a check; what is away is not ready.  The detail names no address and no secret."""
    try:
        ok, detail = check()
    except (StoreUnavailable, SQLAlchemyError):
        ok, detail = False, "the database does not answer"
    except RedisError as error:
        ok, detail = False, f"Redis does not answer ({type(error).__name__})"
    return {"ok": ok, "detail": detail}


def _database() -> tuple[bool, str]:
    with db.reading(state().engine) as connection:
        connection.execute(text("SELECT 1"))
    return True, f"{state().engine.dialect.name} answers"


def _migrations() -> tuple[bool, str]:
    if migrations.is_current(state().engine):
        return True, "the schema is current"
    return False, "the schema is not current: run `buildrelay migrate`"


def _redis() -> tuple[bool, str]:
    state().redis.ping()
    return True, "Redis answers"


def _scheduler() -> tuple[bool, str]:
    beat = queues.beat(state().redis)
    if beat is None:
        return False, "no scheduler is running"
    return True, f"last pass {max(int(time.time()) - beat, 0)} s ago"


def _workers() -> tuple[bool, str]:
    served = queues.workers(state().redis)
    missing = [name for name in queues.JOBS if not served[name]]
    if missing:
        return False, f"no worker serves {', '.join(missing)}"
    return True, "every bell is served"
