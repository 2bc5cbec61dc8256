"""Polling that fails is not silent: sources, notices, log, metrics, and builds that are taken up again."""

import logging
from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import select

from jobs import sweep as sweep_job
from tests.stand import FRESH, INTERVAL, ON_SQLITE, change, one_stale, stands
from webhook_app import api_health, db, health, histograms, models, queries
from webhook_app.lifecycle import State
from webhook_app.platforms import PollError, PollFault
from webhook_app.simulated import github as simulated_github
from webhook_app.simulated.httpd import Response, dropped, json_response


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


@pytest.fixture
def one(make_stand):
    """`one(platform, kind, …)`: see `tests.stand.one_stale`."""
    return partial(one_stale, make_stand)


def told(stand, name="github"):
    with db.reading(stand.engine) as connection:
        return health.snapshot(connection)[name]


def kinds(stand):
    return [one["kind"].removeprefix("source.") for one in stand.notices()]


def note(stand, *rounds, source="github"):
    """Rounds of polling, as the job notes them."""

    def unit(write):
        for one in rounds:
            api_health.note_round(write.connection, source, one, stand.now())

    db.as_writer(stand.engine, unit)


WORKED = api_health.Round(worked=True)


def failed(kind=PollFault.UNAVAILABLE, text="connect: refused"):
    return api_health.Round(worked=False, fault=PollError(kind, text))


# ---- a source that can't be read -------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_a_source_that_refuses_every_connection_is_told_once_and_its_return_once(make_stand, platform):
    stand = make_stand((platform,), 6, kinds={platform: ["success"]}, speed=0.001)
    stand.push_all()
    server = stand.servers[platform]
    server.inject(dropped())
    began = stand.clock() + FRESH
    stand.clock.advance(FRESH)
    while not stand.notices():
        assert stand.clock() < began + 300
        stand.discover(after=INTERVAL)
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"]) == ("source.unreachable", platform)
    assert "rounds of polling in a row failed (unavailable: " in notice["text"]
    assert stand.clock() >= began + 60
    for _ in range(20):
        stand.discover(after=INTERVAL)
    assert kinds(stand) == ["unreachable"]
    row = told(stand, platform)
    assert (row["api_error_kind"], row["api_failures"] > 3) == ("unavailable", True)
    assert row["api_failing_since"].timestamp() == pytest.approx(began, abs=2 * INTERVAL)
    server.clear_faults()
    while kinds(stand) != ["unreachable", "reachable"]:
        assert stand.clock() < began + 900
        stand.discover(after=INTERVAL)
    assert "can be read again, after" in stand.notices()[-1]["text"]
    row = told(stand, platform)
    assert (row["api_failing_since"], row["api_failures"]) == (None, 0)
    assert row["api_error"], "the last one stays to be seen"
    stand.discover(after=INTERVAL)
    stand.poll(after=INTERVAL)
    assert {stand.row(build)["consecutive_errors"] for build in stand.world.builds} == {0}


@ON_SQLITE
def test_a_failed_round_or_two_are_no_news(make_stand):
    stand = make_stand(("github",), 0)
    note(stand, failed(), failed())
    stand.clock.advance(3600)
    sweep_job.sweep(stand.held)
    note(stand, WORKED)
    note(stand, failed(), failed(), failed(), failed())
    stand.clock.advance(59)
    sweep_job.sweep(stand.held)
    note(stand, WORKED)
    assert kinds(stand) == []


@ON_SQLITE
def test_the_sweep_tells_of_a_source_whose_next_round_is_far_away(make_stand):
    stand = make_stand(("github",), 0)
    note(stand, failed(), failed(), failed())
    for _ in range(5):
        stand.clock.advance(15)
        sweep_job.sweep(stand.held)
    assert kinds(stand) == ["unreachable"]


@ON_SQLITE
@pytest.mark.parametrize("kind", [PollFault.RATE_LIMITED, PollFault.NOT_FOUND])
def test_a_limit_and_an_unknown_build_are_answers(make_stand, kind):
    stand = make_stand(("github",), 0)
    for _ in range(5):
        note(stand, failed(kind))
        stand.clock.advance(60)
    assert (kinds(stand), told(stand)["api_failing_since"]) == ([], None)


@ON_SQLITE
def test_a_refused_token_is_told_once_and_so_is_its_end(one):
    """Its pause has a notice of its own."""
    stand, build = one()
    stand.servers["github"].inject(json_response({"message": "Bad credentials"}, 401))
    for _ in range(6):
        stand.poll(after=301)
        sweep_job.sweep(stand.held)
    assert kinds(stand) == ["unauthorized"]
    assert told(stand)["api_error"] == "HTTP 401: Bad credentials"
    stand.servers["github"].clear_faults()
    stand.poll(after=301)
    assert kinds(stand) == ["unauthorized", "reachable"]
    assert stand.row(build)["consecutive_errors"] == 0


@ON_SQLITE
def test_secrets_in_what_an_api_says_are_masked(one):
    stand, build = one("github", GITHUB_WEBHOOK_SECRET="the-hooks-own-secret")
    said = {"message": "token=hunter2-hunter2, the-hooks-own-secret, ghp_0123456789abcdefghij"}
    stand.servers["github"].inject(json_response(said, 502))
    stand.poll()
    for text in (told(stand)["api_error"], stand.row(build)["poll_error"]):
        assert "HTTP 502" in text
        for secret in ("hunter2", "the-hooks-own-secret", "ghp_0123"):
            assert secret not in text


@ON_SQLITE
@pytest.mark.parametrize("named_only", [True, False])
def test_secrets_in_the_error_of_a_build_that_is_gone_are_masked(one, named_only):
    """It is ours, and holds what the platform said; nothing else of the round has an error."""
    stand, build = one("github", GITHUB_WEBHOOK_SECRET="the-hooks-own-secret")
    if named_only:
        change(stand, build, {"requested": True, "raw_status": None, "last_push_at": None})
    said = {"message": "Not Found for the-hooks-own-secret, ghp_0123456789abcdefghij"}
    server = stand.servers["github"]
    server.inject(json_response(said, 404), path_contains=f"/actions/runs/{build.run_id}")
    server.delete(build.build_id)
    for _ in range(1 if named_only else 15):
        stand.poll(after=60)
    row = stand.row(build)
    assert row["state"] == "failed"
    ends = [event["data"]["error"] for event in stand.events(build) if event["type"] == "build.failed"]
    for text in (row["error"], *ends):
        assert ("not found on" if named_only else "deleted on") in text
        assert "the-hooks-own-secret" not in text
        assert "ghp_0123" not in text


# ---- what is counted and logged --------------------------------------------------------------


@ON_SQLITE
def test_errors_are_counted_by_kind_and_requests_are_timed(one):
    stand, _ = one(speed=0.0001, BUILD_MAX_POLL_TIME="86400000")
    server = stand.servers["github"]
    answers = [
        simulated_github.server_error(502), dropped(), json_response({"message": "no"}, 403), Response(200, b"<"),
    ]  # fmt: skip
    for answer in answers:
        server.inject(answer)
        stand.poll(after=3600)
        server.clear_faults()
    stand.poll(after=3600)
    with db.reading(stand.engine) as connection:
        counts = api_health.errors(connection)
        (timed,) = [row for row in histograms.stored(connection) if row.metric == histograms.API]
        made = connection.execute(select(models.budgets.c.requests)).scalar_one()
    assert {kind for source, kind in counts if source == "github"} == {
        "unavailable",
        "forbidden",
        "unreadable",
    }
    assert min(counts.values()) >= 1
    assert sum(timed.counts) == made > 5


@ON_SQLITE
def test_a_round_is_one_line_and_a_failed_one_a_warning_that_says_why(one, caplog):
    caplog.set_level(logging.INFO, "jobs.poll")
    stand, build = one(speed=0.001)
    stand.poll()
    (line,) = (record for record in caplog.records if record.msg == "polled")
    assert (line.levelno, "errors" in line.fields) == (logging.INFO, False)
    caplog.clear()
    stand.servers["github"].inject(simulated_github.server_error(502))
    stand.poll(after=INTERVAL)
    (line,) = (record for record in caplog.records if record.msg == "polled")
    assert line.levelno == logging.WARNING
    assert line.fields["error"].startswith("HTTP 502")
    names = ("source", "repository", "kind", "errors")
    assert [line.fields[name] for name in names] == ["github", build.repository.full_name, "unavailable", 1]


@ON_SQLITE
def test_a_token_that_can_not_be_had_is_logged_as_well(one, caplog):
    stand, _ = one()
    stand.servers["github"].inject(json_response({"message": "Bad credentials"}, 401))
    stand.poll()
    (line,) = (record for record in caplog.records if record.msg == "polled")
    assert line.fields["kind"] == "unauthorized"


# ---- builds are taken up again ---------------------------------------------------------------


def given_up(stand, builds):
    for _ in range(3):
        stand.poll(after=3600)
    for build in builds:
        assert (stand.row(build)["polling"], stand.row(build)["state"]) == ("error", "in_progress")


def failing_stand(make_stand, count, monkeypatch=None):
    stand = make_stand(
        ("github",), count, kinds={"github": ["success"]}, speed=0.0001, BUILD_MAX_CONSECUTIVE_ERRORS="2",
        BUILD_MAX_POLL_TIME="86400000", BUILD_POLL_INTERVAL="1000", GITHUB_REPOS="",
    )  # fmt: skip
    stand.push_all()
    stand.clock.advance(FRESH)
    stand.servers["github"].inject(dropped())
    return stand


def test_builds_that_polling_gave_up_on_are_taken_up_when_the_source_answers_again(make_stand):
    stand = failing_stand(make_stand, 6)
    given_up(stand, stand.world.builds)
    last = stand.row(stand.world.builds[0])["last_poll_at"]
    stand.servers["github"].clear_faults()
    change(stand, stand.world.builds[0], {"next_poll_at": stand.now()})  # one of them, or a list, is first
    stand.poll(after=1)
    for build in stand.world.builds:
        row = stand.row(build)
        assert (row["polling"], row["consecutive_errors"], row["poll_error"]) == ("active", 0, None)
        assert row["last_poll_at"] > last
        assert stand.types(build)[-2:] == ["polling_error", "polling_started"]


@ON_SQLITE
@pytest.mark.parametrize(("outage", "seconds"), [(True, 60), (False, 300)])
def test_a_list_that_is_not_found_after_an_outage_is_asked_for_again_soon(make_stand, outage, seconds):
    """A proxy that stands again before its platform does answers so: each list may show that it is back."""
    stand = make_stand(("github",), 1)
    if outage:
        stand.servers["github"].inject(dropped())
        for _ in range(3):
            stand.discover(after=60)
        stand.servers["github"].clear_faults()
    stand.servers["github"].inject(json_response({"message": "Not Found"}, 404))
    stand.discover(after=60)
    with db.reading(stand.engine) as connection:
        due = set(connection.execute(select(models.places.c.next_list_at)).scalars())
    assert {(at - stand.now()).total_seconds() for at in due} == {seconds}


def test_builds_are_taken_up_in_portions(make_stand, monkeypatch):
    monkeypatch.setattr(api_health, "MOST_RESUMED", 2)
    stand = failing_stand(make_stand, 6)
    given_up(stand, stand.world.builds)
    stand.clock.advance(1)
    note(stand, WORKED)
    for left in (4, 2, 0, 0):
        assert sum(stand.wait(build) > 0 for build in stand.world.builds) == left
        note(stand, WORKED)
    assert (told(stand)["resume_from"], told(stand)["resume_before"]) == (None, None)


@ON_SQLITE
def test_a_failure_between_two_portions_leaves_none_out(make_stand, monkeypatch):
    monkeypatch.setattr(api_health, "MOST_RESUMED", 2)
    stand = failing_stand(make_stand, 6)
    given_up(stand, stand.world.builds)
    stand.clock.advance(1)
    note(stand, WORKED, failed(), WORKED, failed(), failed(), failed(), WORKED, WORKED)
    assert {stand.wait(build) for build in stand.world.builds} == {0}


def test_what_fails_while_the_source_answers_is_not_made_due_again_and_again(make_stand, monkeypatch):
    """One repository forbidden: it is read each hour, not with each round that works."""
    monkeypatch.setattr(api_health, "MOST_RESUMED", 1)
    stand = failing_stand(make_stand, 6)
    given_up(stand, stand.world.builds)
    bad = stand.world.builds[0].repository.full_name
    theirs = [build for build in stand.world.builds if build.repository.full_name == bad]
    assert 0 < len(theirs) < 6
    stand.servers["github"].clear_faults()
    stand.servers["github"].inject(json_response({"message": "no"}, 403), path_contains=bad)
    for build in stand.world.builds:
        change(stand, build, {"next_poll_at": stand.now()})
    for _ in range(30):
        stand.poll(after=30)
    for build in stand.world.builds:
        assert stand.row(build)["polling"] == ("error" if build in theirs else "active")
    before = [stand.row(build)["poll_count"] for build in theirs]
    for _ in range(5):
        stand.poll(after=30)
    assert [stand.row(build)["poll_count"] for build in theirs] == before
    stand.servers["github"].clear_faults()
    stand.poll(after=86_400)
    assert {stand.row(build)["polling"] for build in theirs} == {"active"}


def test_a_build_in_its_back_off_is_due_at_once_when_the_source_answers_again(make_stand):
    stand, builds, before = in_back_off(make_stand)
    note(stand, failed(), failed(), WORKED)
    assert before.isdisjoint({0})
    assert [stand.wait(build) for build in builds] == [0, 0]


def test_a_round_or_two_that_failed_change_no_back_off(make_stand):
    stand, builds, before = in_back_off(make_stand)
    note(stand, failed(), WORKED)
    assert {stand.wait(build) for build in builds} == before


def test_what_failed_before_the_source_did_or_by_itself_keeps_its_back_off(make_stand):
    stand, (first, second), before = in_back_off(make_stand)
    change(stand, first, {"last_poll_at": stand.now().replace(year=2020)})
    change(stand, second, {"poll_fault": "forbidden"})
    note(stand, failed(), failed(), WORKED)
    assert {stand.wait(build) for build in (first, second)} == before


def in_back_off(make_stand):
    """A stand whose last round failed, its builds, and the seconds until they are due."""
    stand = failing_stand(make_stand, 2)
    stand.poll()
    for build in stand.world.builds:
        change(stand, build, {"next_poll_at": stand.now().replace(year=2099)})
    stand.clock.advance(1)
    return stand, stand.world.builds, {stand.wait(build) for build in stand.world.builds}


BAD = [
    lambda: json_response({"message": "Resource not accessible"}, 403),
    lambda: Response(200, b"<html>"),
    lambda: simulated_github.server_error(502),
]  # fmt: skip


@ON_SQLITE
@pytest.mark.parametrize("bad", BAD, ids=["forbidden", "unreadable", "unavailable"])
@pytest.mark.parametrize("step", [7, 15])
def test_one_bad_repository_keeps_its_back_off_however_rounds_fall(make_stand, bad, step):
    """Its reads often make a round of their own: such a round says nothing of the source."""
    stand = make_stand(("github",), 12, kinds={"github": ["success"]}, speed=0.0001)
    stand.push_all()
    name = stand.world.builds[0].repository.full_name
    theirs = [build for build in stand.world.builds if build.repository.full_name == name]
    assert 0 < len(theirs) < 12
    server = stand.servers["github"]
    server.inject(bad(), path_contains=name)
    stand.clock.advance(FRESH)
    for _ in range(900 // step):
        stand.poll(after=step)
        assert not api_health.is_failing(told(stand))
    is_list_known = bad is not BAD[2]  # the repository is in no settings
    assert kinds(stand) == ["repository_unreadable"] * is_list_known
    for build in theirs:
        types = stand.types(build)
        assert types.count("polling_started") == 1
        assert types.count("polling_error") <= 1
    tries = 3 if bad is BAD[2] else 1
    most = 8 * len(theirs) + 15  # doubled waits in 15 minutes, and a list a minute
    assert 0 < server.count(name) <= tries * most


@ON_SQLITE
@pytest.mark.parametrize("kind", [PollFault.FORBIDDEN, PollFault.UNREADABLE])
def test_a_build_that_fails_while_nothing_else_is_read_says_nothing_of_the_source(make_stand, kind):
    stand = make_stand(("github",), 2, kinds={"github": ["success"]}, speed=0.0001)
    stand.discover()
    note(stand, *[failed(kind)] * 3)
    stand.clock.advance(61)
    note(stand, failed(kind))
    sweep_job.sweep(stand.held)
    assert (kinds(stand), told(stand)["api_failing_since"]) == ([], None)


@ON_SQLITE
@pytest.mark.parametrize("bad", BAD[:2], ids=["forbidden", "unreadable"])
def test_a_source_that_forbids_everything_is_told_as_a_whole(make_stand, bad):
    stand = make_stand(("github",), 12, kinds={"github": ["success"]}, speed=0.0001)
    stand.push_all()
    stand.servers["github"].inject(bad())
    for _ in range(30):
        stand.discover(after=60)
    assert kinds(stand) == ["unreachable"]
    stand.servers["github"].clear_faults()
    for _ in range(6):
        stand.discover(after=60)
    assert kinds(stand) == ["unreachable", "reachable"]


def test_a_build_that_was_stopped_by_hand_or_is_not_known_stays_as_it_is(make_stand):
    stand = failing_stand(make_stand, 2)
    given_up(stand, stand.world.builds)
    first, second = stand.world.builds
    change(stand, first, {"polling": "stopped", "next_poll_at": None})
    change(stand, second, {"poll_fault": "not_found"})
    note(stand, WORKED)
    assert (stand.row(first)["polling"], stand.wait(first)) == ("stopped", None)
    assert (stand.row(second)["polling"], stand.wait(second) > 0) == ("error", True)


# ---- lists of one repository -----------------------------------------------------------------


@ON_SQLITE
@pytest.mark.parametrize("answer", [dropped, lambda: json_response({"message": "no"}, 403)])
def test_a_repository_whose_list_fails_while_others_are_read_is_told(make_stand, answer):
    """Nobody would find a build there whose every push was lost."""
    stand = make_stand(("github",), 8, kinds={"github": ["success"]}, speed=0.0001)
    names = sorted({build.repository.full_name for build in stand.world.builds})
    assert len(names) > 1
    bad = names[0]
    stand.servers["github"].inject(answer(), path_contains=f"{bad}/actions/runs")
    for _ in range(30):
        stand.discover(after=60)
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"]) == ("source.repository_unreadable", f"github: {bad}")
    with db.reading(stand.engine) as connection:
        (row,) = queries.failing_repositories(connection)["github"]
    assert (row["repository"], row["errors_in_row"] >= 3) == (bad, True)
    assert told(stand)["api_failing_since"] is None
    stand.servers["github"].clear_faults()
    stand.discover(after=600)
    assert kinds(stand) == ["repository_unreadable", "repository_readable"]
    with db.reading(stand.engine) as connection:
        assert queries.failing_repositories(connection) == {}


@ON_SQLITE
def test_a_repository_that_is_not_there_is_told_as_such(make_stand):
    """As one that is misspelt in the settings."""
    stand = make_stand(("github",), 4, kinds={"github": ["success"]}, speed=0.0001)
    of = stand.held.settings.sources["github"]
    stand.held.settings.sources["github"] = replace(of, repositories=(*of.repositories, "octo/mispelt"))
    for _ in range(30):
        stand.discover(after=60)
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"]) == ("source.not_found", "github: octo/mispelt")


@ON_SQLITE
def test_while_the_whole_source_fails_its_repositories_are_not_told_one_by_one(make_stand):
    stand = make_stand(("github",), 8, kinds={"github": ["success"]}, speed=0.0001)
    stand.servers["github"].inject(dropped())
    for _ in range(20):
        stand.discover(after=60)
    assert kinds(stand) == ["unreachable"]


# ---- requests beside the polling -------------------------------------------------------------


@ON_SQLITE
def test_a_log_that_can_not_be_read_is_counted_and_shown_as_the_last_error(make_stand, caplog):
    from jobs import collect as collect_job

    secret = {"GITHUB_WEBHOOK_SECRET": "the-hooks-own-secret"}
    stand = make_stand(("github",), 1, kinds={"github": ["failure"]}, speed=0.1, **secret)
    (build,) = stand.world.builds
    stand.push(build, State.FAILED)
    said = {"message": "no, the-hooks-own-secret"}
    stand.servers["github"].inject(json_response(said, 502))
    collect_job.collect(stand.held)
    with db.reading(stand.engine) as connection:
        counts = api_health.errors(connection)
    assert counts["github", "unavailable"] >= 1
    assert told(stand)["api_error"] == "HTTP 502: no, ***"
    assert told(stand)["api_failing_since"] is None, "rounds of polling tell that"


def test_several_rounds_in_one_transaction_count_each(make_stand):
    stand = make_stand(("github",), 0)
    measured = api_health.Measured()
    for _ in range(3):
        measured.note("github", 0.2, PollError(PollFault.UNAVAILABLE, "x"))
    for _ in range(2):
        db.as_writer(stand.engine, lambda write: measured.store(write.connection))
    with db.reading(stand.engine) as connection:
        assert connection.execute(select(models.api_errors)).mappings().one()["count"] == 6
        (row,) = histograms.stored(connection)
    assert (row.counts[1], row.seconds) == (6, pytest.approx(1.2))
