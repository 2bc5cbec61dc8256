"""Is the process alive, and is all there that it stands on?  No token: balancers and monitors ask."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flask import Response
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from webhook_app import api_health, db, health, metrics, migrations, queues
from webhook_app.db import StoreUnavailable
from webhook_app.times import iso, utc_now
from webhook_app.web import schemas
from webhook_app.web.api.spec import Blueprint, operation
from webhook_app.web.state import Checks, state

log = logging.getLogger(__name__)

blueprint = Blueprint("health", __name__, description="Health of the service")


@operation(blueprint, "GET", "/healthz", schemas.Healthy, scope=None)
def get_health() -> Any:
    """Say that this process answers; nothing else is looked at."""
    return {"status": "ok"}


@operation(
    blueprint,
    "GET",
    "/readyz",
    schemas.Readiness,
    scope=None,
    query=schemas.ReadinessQuery,
    shaped={503: schemas.Readiness},
)
def get_readiness(query: dict[str, Any]) -> Any:
    """Look at the database (by a write), its migrations, Redis (by a write), the scheduler and the workers.

    503 if one is missing, and each says what is wrong with it: a full disk, a database or Redis that is
    read-only, a Redis out of memory.  With `for=reception` only what accepting a push needs counts: Redis
    only wakes the workers.  What was found is answered for a second, whoever asks.  That a CI platform is
    away shows in `sources`, and makes nothing unready: it is not our fault, and pushes are taken.
    """
    groups = RECEPTION if query.get("wanted_for") == "reception" else RECEPTION | RELAY
    checks: Checks = {}
    for group, members in groups.items():
        found = state().recent(group, partial(_look, group, members))
        checks |= found or {name: {"ok": False, "detail": "the check hangs"} for name in members}
    ready = all(check["ok"] for name, check in checks.items() if name != "sources")
    return {"status": "ready" if ready else "unready", "checks": checks}, 200 if ready else 503


def _look(group: str, members: Mapping[str, Callable[[], tuple[bool, str]]]) -> Checks:
    """The checks of a group; what changed since the last look is a line of the log."""
    checks = {name: _checked(check) for name, check in members.items()}
    wrong = "; ".join(
        f"{name}: {check['detail']}"
        for name, check in checks.items()
        if not check["ok"] and name != "sources"
    )
    if _told.get(group, "") != wrong:
        _told[group] = wrong
        log.warning("not ready: %s", wrong or "over, all is well again")
    return checks


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
    except StoreUnavailable as error:
        ok, detail = False, error.plain
    except SQLAlchemyError as error:
        ok, detail = False, db.unavailable(error).plain
    except RedisError as error:
        ok, detail = False, queues.trouble(error)
    return {"ok": ok, "detail": detail}


def _database() -> tuple[bool, str]:
    name = state().engine.dialect.name
    try:
        db.try_write(state().engine)
    except db.SchemaMissing:
        return True, f"{name} answers"
    return True, f"{name} takes writes"


def _migrations() -> tuple[bool, str]:
    return _STANDINGS[migrations.standing(state().engine)]


_STANDINGS = {
    migrations.CURRENT: (True, "the schema is current"),
    migrations.NEWER: (True, "the schema is newer than this program, and has all that it needs"),
    migrations.OLDER: (False, "the schema is not current: run `buildrelay migrate`"),
    migrations.UNUSABLE: (False, "the schema is newer than this program, and lacks what it needs: update it"),
}


def _redis() -> tuple[bool, str]:
    queues.try_write(state().redis)
    return True, "Redis takes writes"


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


RECEPTION = {"reception": {"database": _database, "migrations": _migrations}}
RELAY = {"relay": {"redis": _redis, "scheduler": _scheduler, "workers": _workers, "sources": _sources}}
"""The checks by group: what accepting a push needs, and what else relaying it does."""

_told: dict[str, str] = {}
"""By group: what the log of this process said last."""
