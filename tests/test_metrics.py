"""`GET /metrics` over real databases and a real Redis, read as Prometheus reads it."""

import re
import time
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, insert, text, update

from tests.caller import ADMIN, KEY, SECRET, subscribe
from tests.facts import github
from tests.test_api import _register_worker
from webhook_app import VERSION, api_health, builds, db, health, metrics, models, platforms, queues
from webhook_app.lifecycle import State
from webhook_app.times import utc_now

Q, P, C = State.QUEUED, State.IN_PROGRESS, State.COMPLETED


def scrape(api):
    """{(name, label, …): value}, parsed as Prometheus parses it; no token is sent."""
    answer = api.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def source(found, metric, name="github"):
    return found.get((f"buildrelay_{metric}", name))


def execute(engine, statement, *values):
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(statement, *values)


# ---- what is told ----------------------------------------------------------------------------


def test_names_types_and_labels_are_as_prometheus_wants_them(api):
    """What `promtool check metrics` looks at."""
    api.record(github(P, platform_at=utc_now()), now=utc_now())
    for family in text_string_to_metric_families(api.client.get("/metrics").text):
        name = family.name.removeprefix("buildrelay_")
        if family.type == "counter":  # the parser takes the suffix off
            name += "_total"
        about = metrics.METRICS[name]
        assert family.type in ("counter", "gauge", "histogram"), name
        assert (family.type == "counter") == name.endswith("_total")
        assert (family.type == "histogram") == about.is_histogram
        assert family.documentation == about.meaning
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert not re.search(
            r"_(count|sum|bucket|gauge|counter|ms|s|minutes|hours|days|percent|kb|mb)(_|$)", name
        ), name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(about.labels), name
    told = {label for about in metrics.METRICS.values() for label in about.labels}
    assert told == {"source", "platform", "state", "bell", "reason", "version", "schema", "origin", "kind"}


def test_push_health_of_each_configured_source(api):
    now = utc_now()
    api.record(github(Q), github(P), now=now - timedelta(seconds=200))
    api.record(github(C, by="poll", platform_at=now), now=now - timedelta(seconds=100))
    found = scrape(api)
    assert found[("buildrelay_source_info", "github", "github")] == 1
    assert source(found, "pushes_total") == 2
    assert source(found, "polls_total") == 1
    assert source(found, "changes_pushed_total") == 2
    assert source(found, "missed_pushes_total") == 1
    assert source(found, "late_pushes_total") == 0
    assert source(found, "push_share_ratio") == pytest.approx(2 / 3)
    assert source(found, "newest_fact_age_seconds") >= 100
    assert (source(found, "source_deaf"), source(found, "source_paused")) == (0, 0)
    assert source(found, "pushes_total", "jenkins") == 0
    assert source(found, "push_share_ratio", "jenkins") is None
    assert source(found, "newest_fact_age_seconds", "jenkins") is None


def test_how_long_after_a_change_it_was_recorded_by_who_told_it(api):
    now = utc_now()
    times = [now - timedelta(seconds=seconds) for seconds in (0.5, 1, 20, 4000)]
    listening = now - timedelta(days=1)
    db.as_writer(api.engine, lambda write: health.listen(write.connection, ["github"], listening))
    api.record(*[github(P, run=run, platform_at=at) for run, at in enumerate(times)], now=now)
    api.record(github(P, run=0), github(P, run=9), now=now)  # no change; a change without a time
    ahead = github(C, run=0, by="poll", platform_at=now + timedelta(seconds=5))
    history = github(C, run=70, by="poll", platform_at=listening - timedelta(seconds=1))
    api.record(ahead, history, github(C, run=2, by="poll", platform_at=times[2]), now=now)
    found = scrape(api)
    name = "buildrelay_detection_latency_seconds"
    pushed = {key[1]: value for key, value in found.items() if key[0] == f"{name}_bucket" and "push" in key}
    assert pushed == {
        "1.0": 2, "5.0": 2, "15.0": 2, "30.0": 3, "60.0": 3, "300.0": 3, "1800.0": 3, "+Inf": 4,
    }  # fmt: skip
    assert found[(f"{name}_sum", "push", "github")] == pytest.approx(4021.5)
    assert found[(f"{name}_count", "push", "github")] == 4
    assert found[(f"{name}_bucket", "1.0", "poll", "github")] == 1
    assert found[(f"{name}_count", "poll", "github")] == 2


def test_errors_and_durations_of_each_api(make_api, store_url):
    api = make_api(store_url, GITHUB_TOKEN="ghp_secret")
    measured = api_health.Measured()
    for seconds in (0.05, 0.3, 60):
        measured.note("github", seconds, platforms.Answer(200, {}, b""))
    measured.note("github", 30, platforms.PollError(platforms.PollFault.UNAVAILABLE, "timeout"))
    measured.note("gone", 1, platforms.Answer(404, {}, b""))
    fault = platforms.PollError(platforms.PollFault.UNAVAILABLE, "timeout")

    now = utc_now()

    def unit(write):
        api_health.note_round(write.connection, "github", api_health.Round(False, fault), now)

    db.as_writer(api.engine, lambda write: measured.store(write.connection))
    for _ in range(2):
        db.as_writer(api.engine, unit)
    assert source(scrape(api), "source_failing") == 0
    db.as_writer(api.engine, unit)
    found = scrape(api)
    assert found[("buildrelay_api_errors_total", "unavailable", "github")] == 1
    assert found[("buildrelay_api_errors_total", "forbidden", "github")] == 0
    assert source(found, "api_request_duration_seconds_count") == 4
    assert source(found, "api_request_duration_seconds_sum") == pytest.approx(90.35)
    assert found[("buildrelay_api_request_duration_seconds_bucket", "0.5", "github")] == 2
    assert not any("gone" in key for key in found)
    assert source(found, "source_failing") == 1
    (told,) = (item for item in api("GET", "/api/sources")["items"] if item["name"] == "github")
    assert (told["last_error"], told["last_error_kind"]) == ("timeout", "unavailable")
    assert told["last_error_at"] == told["failing_since"] is not None
    assert (told["errors_in_row"], told["failing_repositories"]) == (3, [])


def test_builds_that_polling_gave_up_on_are_counted_apart(api):
    api.record(github(P, run=1), github(P, run=2), now=utc_now())
    for _ in range(3):
        api.record(builds.PollFailed("github:1", "unavailable: x", "unavailable"), now=utc_now())
    found = scrape(api)
    assert source(found, "builds_unwatched") == 1
    assert found[("buildrelay_builds_open", "github", "in_progress")] == 1


def test_a_push_that_was_only_late_takes_nothing_from_a_counter(api):
    """A counter that falls would look like one that began anew."""
    now = utc_now()
    api.record(github(Q), now=now - timedelta(seconds=200))
    api.record(github(P, by="poll", platform_at=now), now=now - timedelta(seconds=20))
    api.record(github(P), now=now)
    found = scrape(api)
    assert (source(found, "missed_pushes_total"), source(found, "late_pushes_total")) == (1, 1)
    (told,) = (item for item in api("GET", "/api/sources")["items"] if item["name"] == "github")
    assert (told["missed_pushes"], told["late_pushes"]) == (0, 1)


def test_deaf_and_paused_sources(api):
    now = utc_now()
    rows = [
        {"name": "github", "deaf_since": now, "paused_until": now + timedelta(seconds=60)},
        {"name": "gitlab", "deaf_since": None, "paused_until": now - timedelta(seconds=60)},
        {"name": "no longer configured", "deaf_since": now, "paused_until": now},
    ]
    execute(api.engine, insert(models.sources), rows)
    found = scrape(api)
    assert (source(found, "source_deaf"), source(found, "source_paused")) == (1, 1)
    assert (source(found, "source_deaf", "gitlab"), source(found, "source_paused", "gitlab")) == (0, 0)
    assert source(found, "source_deaf", "no longer configured") is None


def budget(**more):
    now = utc_now()
    return {
        "lane": "github:lane", "sources": ["github", "gone"], "limit": 5000, "remaining": 4000,
        "reset_at": now + timedelta(seconds=1800), "credit": 1.0, "turns": 1.0, "reckoned_at": now, "price": 0.4,
        "per_hour": 1800.0, "strikes": 0, "requests": 900, "counted": 360,
    } | more  # fmt: skip


def test_budgets_with_pace_and_the_forecast_of_the_api(make_api, store_url):
    api = make_api(store_url, GITHUB_TOKEN="ghp_secret")
    execute(api.engine, insert(models.budgets), budget())
    found = scrape(api)
    assert (source(found, "budget_limit"), source(found, "budget_remaining")) == (5000, 4000)
    assert 1700 < source(found, "budget_reset_seconds") <= 1800
    assert source(found, "budget_pace_per_second") == 0.5
    assert (source(found, "requests_total"), source(found, "requests_counted_total")) == (900, 360)
    (told,) = (item for item in api("GET", "/api/sources")["items"] if item["name"] == "github")
    assert abs(source(found, "budget_forecast_remaining") - told["budget"]["forecast_remaining"]) <= 5
    assert source(found, "budget_limit", "gone") is None


@pytest.mark.parametrize("nothing", [{"reset_at": None}, {"reset_at": utc_now()}, {"remaining": None}])
def test_a_budget_of_which_little_is_known_has_no_forecast(api, nothing):
    execute(api.engine, insert(models.budgets), budget(limit=None, **nothing))
    found = scrape(api)
    assert source(found, "budget_forecast_remaining") is None
    assert source(found, "budget_limit") is None
    assert source(found, "requests_total") == 900


def test_open_builds_and_how_far_polling_is_behind(make_api, store_url):
    api = make_api(store_url, GITHUB_TOKEN="ghp_secret")
    now = utc_now()
    api.record(github(Q, run=1), github(P, run=2), github(P, run=3), now=now - timedelta(seconds=300))
    api.record(github(C, run=3), github(C, run=4), now=now)
    found = scrape(api)
    assert source(found, "polling_behind_seconds") >= 200
    assert found[("buildrelay_builds_open", "github", "queued")] == 1
    assert found[("buildrelay_builds_open", "github", "in_progress")] == 1
    assert found[("buildrelay_builds_open", "gitlab", "queued")] == 0


def test_messages_subscribers_and_what_could_not_be_read(api):
    subscribe(api)
    idle = subscribe(api)
    api("PATCH", f"/api/subscribers/{idle['id']}", json={"events": ["build.failed"]})
    now = utc_now()
    api.record(github(Q), github(P), github(C), now=now - timedelta(seconds=500))
    found = scrape(api)
    pending = found[("buildrelay_messages_pending",)]
    assert pending == 3
    assert found[("buildrelay_messages_overdue_seconds",)] >= 500
    assert found[("buildrelay_subscribers", "active")] == 2
    assert found[("buildrelay_subscribers", "disabled")] == 0
    assert found[("buildrelay_circuits_open",)] == 0
    two = api("GET", "/api/subscribers")["items"][1]["id"]
    columns = models.subscribers.c
    execute(api.engine, update(models.subscribers).values(probe_at=utc_now()))
    execute(api.engine, update(models.subscribers).where(columns.id == two).values(state="disabled"))
    assert scrape(api)[("buildrelay_circuits_open",)] == 1
    messages = models.messages.c
    first = update(models.messages).where(messages.sequence == 1)
    execute(api.engine, first.values(state="dead", reason="http_503", due_at=None))
    rest = update(models.messages).where(messages.state == "pending")
    execute(api.engine, rest.values(due_at=now + timedelta(seconds=600)))
    execute(api.engine, insert(models.inbound), {
        "id": 1, "source": "github", "hook_id": "1", "event": "push", "delivery_id": "d", "headers": {}, "body": b"",
        "status": "unreadable", "received_at": now,
    })  # fmt: skip
    found = scrape(api)
    assert found[("buildrelay_messages_pending",)] == pending - 1
    assert found[("buildrelay_messages_overdue_seconds",)] == 0
    assert found[("buildrelay_messages_dead", "http_503")] == 1
    assert found[("buildrelay_inbound_unreadable",)] == 1


def test_scheduler_workers_and_build(api):
    redis = api.app.extensions["buildrelay"].redis
    found = scrape(api)
    assert found[("buildrelay_redis_up",)] == 1
    assert ("buildrelay_scheduler_beat_age_seconds",) not in found
    assert {bell: found[("buildrelay_workers", bell)] for bell in queues.JOBS} == dict.fromkeys(
        queues.JOBS, 0
    )
    assert found[("buildrelay_wrong_tokens_total",)] == 0
    for _ in range(2):
        api.as_("brt_wrong")("GET", "/api/builds", 401)
    assert scrape(api)[("buildrelay_wrong_tokens_total",)] == 2
    redis.set(queues.BEAT_KEY, str(int(time.time()) - 7))
    _register_worker(redis, [queues.DELIVER, queues.POLL])
    _register_worker(redis, [queues.DELIVER])
    found = scrape(api)
    assert found[("buildrelay_scheduler_beat_age_seconds",)] >= 7
    assert found[("buildrelay_workers", "deliver")] == 2
    assert found[("buildrelay_workers", "poll")] == 1
    assert found[("buildrelay_workers", "sweep")] == 0
    (info,) = (labels for labels in found if labels[0] == "buildrelay_build_info")
    assert re.fullmatch(r"\d{4}", info[1])
    assert info[2] == VERSION


def test_nothing_secret_and_no_repository_is_told(make_api, store_url):
    api = make_api(store_url, GITHUB_TOKEN="ghp_secret")
    subscriber = subscribe(api, headers={"X-Api-Key": "very-secret-value"})
    api.record(github(P), now=utc_now())
    execute(api.engine, insert(models.budgets), budget())
    told = api.client.get("/metrics").text
    secrets = (
        ADMIN,
        KEY,
        SECRET,
        "ghp_secret",
        "very-secret-value",
        subscriber["secret"],
        "whsec_",
        "gitlab-token-of-the-tests",
    )
    for word in (*secrets, subscriber["id"], "hooks.example.com", "Octo", "github:lane", "c0ffee"):
        assert word not in told


# ---- when something is away ------------------------------------------------------------------


def test_without_a_store_it_is_a_503(make_api, tmp_path):
    for away in (f"sqlite:///{tmp_path}/missing/store.db", f"sqlite:///{tmp_path}/without-tables.db"):
        answer = make_api(away).client.get("/metrics")
        assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
        assert answer.headers["Retry-After"]


def test_without_redis_the_rest_is_told(make_api, store_url, tmp_path):
    api = make_api(store_url, REDIS_URL=f"unix://{tmp_path / 'no.sock'}")
    found = scrape(api)
    assert found[("buildrelay_redis_up",)] == 0
    assert not any(key[0].startswith(("buildrelay_scheduler", "buildrelay_workers")) for key in found)
    assert source(found, "pushes_total") == 0


# ---- what a scrape costs ---------------------------------------------------------------------


def statements_of(api):
    seen = []

    def note(_connection, _cursor, statement, *_):
        seen.append(statement)

    event.listen(api.engine, "before_cursor_execute", note)
    try:
        scrape(api)
    finally:
        event.remove(api.engine, "before_cursor_execute", note)
    return [statement for statement in seen if statement != "BEGIN"]


def test_the_number_of_statements_does_not_grow(api):
    few = statements_of(api)
    for run in range(1, 20):
        subscribe(api)
        api.record(github(P, run=run), github(P, run=run + 100, by="poll"), now=utc_now())
    assert len(statements_of(api)) == len(few) <= 12


MANY = 100_000
NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < :many) SELECT i FROM n"


def multiply(engine, table, many=MANY, **own):
    """Make so many rows of the first one of `table`, with these expressions over `n.i`."""
    values = {column.name: f'b."{column.name}"' for column in table.c} | {"id": "n.i"} | own
    columns = ", ".join(f'"{name}"' for name in values)
    select_ = f"SELECT {', '.join(values.values())} FROM {table.name} b, ({NUMBERS}) n WHERE b.id = 1"
    execute(engine, text(f"INSERT INTO {table.name} ({columns}) {select_}"), {"many": many})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"ANALYZE {table.name}")


def keyed(*names):
    return dict.fromkeys(names, "'k' || n.i")


def fill(api):
    """100 000 builds (200 open), deliveries (20 unreadable), events and messages (1 in 100 pending, 1 dead)."""
    subscribe(api)
    now = utc_now()
    api.record(github(P), now=now)
    execute(api.engine, insert(models.inbound), {
        "id": 1, "source": "github", "hook_id": "1", "event": "push", "delivery_id": "d", "headers": {}, "body": b"",
        "status": "applied", "received_at": now,
    })  # fmt: skip
    multiply(
        api.engine, models.builds, **keyed("build_id", "key", "lookup"),
        next_poll_at="CASE WHEN n.i % 500 = 0 THEN b.next_poll_at END",
        state="CASE WHEN n.i % 500 = 0 THEN b.state ELSE 'completed' END",
    )  # fmt: skip
    unreadable = "CASE WHEN n.i % 5000 = 0 THEN 'unreadable' ELSE 'applied' END"
    multiply(api.engine, models.inbound, delivery_key="'d' || n.i", status=unreadable)
    multiply(api.engine, models.events, sequence="n.i")
    state = "CASE n.i % 100 WHEN 0 THEN 'pending' WHEN 1 THEN 'dead' ELSE 'delivered' END"
    multiply(
        api.engine, models.messages, message_id="'m' || n.i", event="n.i", state=state, reason="'http_500'"
    )


def plan(engine, statement):
    explain = {"sqlite": "EXPLAIN QUERY PLAN ", "postgresql": "EXPLAIN ANALYZE "}[engine.dialect.name]
    compiled = str(statement.compile(engine, compile_kwargs={"literal_binds": True}))
    with db.reading(engine) as connection:
        told = connection.execute(text(explain + compiled.replace(":", r"\:")))
        return "\n".join(str(row[-1]) for row in told)


def test_among_a_hundred_thousand_rows_of_each_kind_it_walks_small_indexes(api):
    fill(api)
    found = scrape(api)
    assert found[("buildrelay_builds_open", "github", "in_progress")] == 1 + MANY // 500
    assert found[("buildrelay_messages_pending",)] == 1 + MANY // 100
    assert found[("buildrelay_messages_dead", "http_500")] == MANY // 100 - 1
    assert found[("buildrelay_inbound_unreadable",)] == MANY // 5000
    for statement, index in (
        (metrics.OPEN, "ix_builds_due"), (metrics.PENDING, "ix_messages_due"),
        (metrics.DEAD, "ix_messages_dead"), (metrics.UNREADABLE, "ix_inbound_unreadable"),
    ):  # fmt: skip
        told = plan(api.engine, statement)
        assert index in told, told
        assert not re.search(r"Seq Scan|SCAN (builds|messages|inbound)$", told, re.MULTILINE), told


def test_more_than_it_counts_is_told_as_that_many(local):
    subscribe(local)
    local.record(github(P), now=utc_now())
    many = metrics.MOST + 5
    multiply(local.engine, models.events, many, sequence="n.i")
    multiply(local.engine, models.messages, many, message_id="'m' || n.i", event="n.i")
    assert scrape(local)[("buildrelay_messages_pending",)] == metrics.MOST
