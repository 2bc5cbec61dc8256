"""Tokens that platforms lend: renewed once for all workers, sealed at rest, never shown; against real HTTP."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select

from jobs import collect as collect_job
from tests.stand import FRESH, ON_SQLITE, stands
from tests.test_cli import NEW, OLD, Box, box  # noqa: F401
from webhook_app import budget, credentials, db, grants, models, outbound, platforms, sealing
from webhook_app.app import create_app
from webhook_app.credentials import Keyring, lane
from webhook_app.platforms import PollError, PollFault, PollTarget, Source, github, gitlab
from webhook_app.settings import SourceSettings
from webhook_app.simulated.github import GitHubServer, secondary_limit
from webhook_app.simulated.github_access import App
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Response, dropped, hang, json_response
from webhook_app.simulated.world import StepClock, World

# ruff: noqa: F811  fixtures are imported, and named again as arguments

KEYS = (Fernet.generate_key().decode(),)
HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


@dataclass
class Lender:
    """A simulated platform that lends tokens, the settings of a source there, and their clock."""

    server: Any
    settings: SourceSettings
    clock: StepClock
    path: str
    lifetime_minutes: int

    def now(self):
        return datetime.fromtimestamp(self.clock(), UTC)

    def after(self, wait):
        self.clock.advance(wait.total_seconds())
        return self.now()

    def asked(self):
        """Requests for a token, whatever came of them."""
        return self.server.count(self.path)

    def made(self):
        return len(self.server.access.issued) if self.settings.app else self.server.oauth.refreshes

    def revoke(self, source):
        (self.server.access if self.settings.app else self.server.oauth).revoke(source.token)

    def works(self, source):
        """Does the platform take this source's token?"""
        place = self.server.world.places[source.platform][0]
        key = f"{source.name}:{place.id}:1"
        target = PollTarget(key, key, place.full_name, None, 1, None)
        request = platforms.polled()[source.platform].repository_request(source, target)
        reply = outbound.send(
            "GET", request.url, request.headers, timeout_seconds=5, byte_cap=99999, guard=False
        )
        assert reply.status in (200, 401)
        return reply.status == 200


@pytest.fixture(scope="session")
def app():
    return App.create(42, 7)


@pytest.fixture
def hub(app):
    """GitHub, where an App is installed."""
    clock = StepClock()
    with GitHubServer(World(7, 1, platforms=("github",), now=clock), (), app=app) as server:
        ours = github.App("42", app.private_key, "7")
        settings = SourceSettings(
            Source("github", "github", server.url),
            app=ours,
            timeout_seconds=5,
            repositories=(server.world.places["github"][0].full_name,),
        )
        yield Lender(server, settings, clock, "/access_tokens", 60)


@pytest.fixture
def lab():
    """GitLab, where somebody has authorised an OAuth application."""
    clock = StepClock()
    with GitLabServer(World(7, 1, platforms=("gitlab",), now=clock), ()) as server:
        first = server.oauth.grant().refresh
        ours = gitlab.OAuth(server.oauth.client_id, server.oauth.client_secret, first)
        settings = SourceSettings(Source("gitlab", "gitlab", server.url), oauth=ours, timeout_seconds=5)
        yield Lender(server, settings, clock, "/oauth/token", 120)


def with_app(hub, *repositories, **more):
    """GitHub's settings with a change to the App, or to the repositories."""
    return replace(hub.settings, app=replace(hub.settings.app, **more), repositories=repositories)


@pytest.fixture(params=["hub", "lab"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def keyring(engine):
    yield Keyring(engine, KEYS)
    sealing.forget()


def fault(call, *arguments):
    with pytest.raises(PollError) as caught:
        call(*arguments)
    return caught.value.fault, str(caught.value)


def rows(engine):
    with db.reading(engine) as connection:
        return connection.execute(select(models.credentials)).all()


# ---- one token for all -----------------------------------------------------------------------


def test_a_source_with_a_token_of_its_own_is_left_as_it_is(keyring, engine):
    plain = SourceSettings(Source("github", "github", "https://api.github.com", "ghp_x"))
    now = datetime.now(UTC)
    assert keyring.source(plain, now) is plain.source
    assert keyring.refreshed(plain, plain.source, now) is None
    assert rows(engine) == []


def test_a_token_is_made_once_and_used_by_all(keyring, engine, either):
    made = keyring.source(either.settings, either.now())
    assert either.works(made)
    assert Keyring(engine, KEYS).source(either.settings, either.after(49 * MINUTE)) == made
    assert either.made() == 1


def test_it_is_renewed_ten_minutes_before_its_end(keyring, either):
    made = keyring.source(either.settings, either.now())
    before = (either.lifetime_minutes - 11) * MINUTE
    assert keyring.source(either.settings, either.after(before)) == made
    renewed = keyring.source(either.settings, either.after(2 * MINUTE))
    assert renewed != made
    assert either.works(renewed)
    assert either.made() == 2


def test_one_that_has_expired_is_renewed(keyring, either):
    made = keyring.source(either.settings, either.now())
    later = keyring.source(either.settings, either.after(24 * HOUR))
    assert later != made
    assert either.works(later)


def test_sources_with_the_same_settings_share_it(keyring, either):
    other = replace(either.settings, source=replace(either.settings.source, name="other"))
    made = keyring.source(either.settings, either.now())
    shared = keyring.source(other, either.now())
    assert (shared.name, shared.token) == ("other", made.token)
    assert either.made() == 1


def test_workers_that_want_one_at_once_make_one(engine, either):
    either.server.latency_seconds = 0.3
    with ThreadPoolExecutor(8) as threads:
        workers = [
            threads.submit(Keyring(engine, KEYS).source, either.settings, either.now()) for _ in range(8)
        ]
        made = {worker.result().token for worker in workers}
    assert len(made) == 1
    assert either.asked() == 1


def test_workers_that_are_refused_at_once_renew_once(engine, keyring, either):
    old = keyring.source(either.settings, either.now())
    either.server.latency_seconds = 0.3
    with ThreadPoolExecutor(8) as threads:
        workers = [
            threads.submit(Keyring(engine, KEYS).refreshed, either.settings, old, either.now())
            for _ in range(8)
        ]
        made = {worker.result().token for worker in workers}
    assert len(made) == 1
    assert made != {old.token}
    assert either.asked() == 2


def test_while_one_worker_renews_the_others_go_on_with_what_still_works(engine, keyring, either, wait_until):
    old = keyring.source(either.settings, either.now())
    late = either.after((either.lifetime_minutes - 5) * MINUTE)
    either.server.latency_seconds = 0.5
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(Keyring(engine, KEYS).source, either.settings, late)
        wait_until(lambda: either.asked() == 2)
        assert keyring.source(either.settings, late) == old
        assert first.result() != old
    assert either.asked() == 2


def test_a_worker_that_died_while_asking_keeps_nobody_for_long(engine, keyring, either):
    owner, now = credentials._owner(either.settings), either.now()
    until = now + 0.4 * SECOND
    assert db.as_writer(engine, lambda write: grants.lease(write, owner, 0, now, until))
    assert either.works(keyring.source(either.settings, now))
    assert either.made() == 1


# ---- refused tokens --------------------------------------------------------------------------


def test_a_revoked_token_is_renewed_once_and_no_second_time(keyring, hub):
    old = keyring.source(hub.settings, hub.now())
    hub.revoke(old)
    assert not hub.works(old)
    new = keyring.refreshed(hub.settings, old, hub.now())
    assert hub.works(new)
    hub.revoke(new)
    assert keyring.refreshed(hub.settings, new, hub.now()) is None
    assert hub.asked() == 2
    assert hub.works(keyring.refreshed(hub.settings, new, hub.after(2 * MINUTE)))


def test_a_refused_access_token_of_gitlab_takes_its_refresh_token_along(keyring, lab):
    old = keyring.source(lab.settings, lab.now())
    lab.revoke(old)
    expected = (
        PollFault.UNAUTHORIZED,
        ("HTTP 400: invalid_grant: The provided authorization grant is invalid, expired, revoked."),
    )
    assert fault(keyring.refreshed, lab.settings, old, lab.now()) == expected
    assert fault(keyring.refreshed, lab.settings, old, lab.now()) == expected
    assert lab.asked() == 2, "the failure is remembered for all"


def test_a_refresh_makes_the_old_token_worthless(keyring, lab):
    old = keyring.source(lab.settings, lab.now())
    new = keyring.refreshed(lab.settings, old, lab.now())
    assert lab.works(new)
    assert not lab.works(old)


def test_who_comes_late_with_a_refused_token_gets_the_newer_one(keyring, either):
    old = keyring.source(either.settings, either.now())
    new = keyring.refreshed(either.settings, old, either.now())
    assert keyring.refreshed(either.settings, old, either.now()) == new
    assert either.made() == 2


def test_where_the_first_refresh_token_is_used_up_a_new_one_begins_anew_at_once(keyring, lab):
    spent = replace(lab.settings, oauth=replace(lab.settings.oauth, refresh_token="spent"))
    assert fault(keyring.source, spent, lab.now())[0] is PollFault.UNAUTHORIZED
    assert lab.works(keyring.source(lab.settings, lab.now()))


def test_tokens_lost_between_the_answer_and_the_commit_are_told_as_unauthorized(keyring, engine, lab):
    first = keyring.source(lab.settings, lab.now())
    owner, now = credentials._owner(lab.settings), lab.after(3 * HOUR)
    assert db.as_writer(engine, lambda write: grants.lease(write, owner, 1, now, now + MINUTE))
    lab.revoke(first)  # as the refresh does whose answer died with its process
    assert fault(keyring.source, lab.settings, lab.after(2 * MINUTE))[0] is PollFault.UNAUTHORIZED


def test_a_foreign_application_is_refused(keyring, lab):
    wrong = replace(lab.settings, oauth=replace(lab.settings.oauth, client_secret="wrong"))
    told = fault(keyring.source, wrong, lab.now())
    reason = "HTTP 401: invalid_client: Client authentication failed due to unknown client."
    assert told == (PollFault.UNAUTHORIZED, reason)


# ---- GitHub Apps -----------------------------------------------------------------------------


def test_an_installation_is_found_by_a_repository_or_is_the_only_one(keyring, hub):
    (place,) = hub.settings.repositories
    by_place = with_app(hub, place, installation_id="")
    assert hub.works(keyring.source(by_place, hub.now()))
    assert hub.server.count(f"/repos/{place}/installation") == 1
    assert hub.works(keyring.source(with_app(hub, installation_id=""), hub.now()))
    assert hub.server.count("/app/installations") == 3


def test_the_first_repository_that_the_app_sees_counts(keyring, hub):
    settings = with_app(hub, "octo/hidden", *hub.settings.repositories, installation_id="")
    assert hub.works(keyring.source(settings, hub.now()))


def test_an_app_that_is_not_installed_there(keyring, hub):
    settings = with_app(hub, "octo/none", "octo/nil", installation_id="")
    told = "the GitHub App 42 is not installed on octo/none, octo/nil"
    assert fault(keyring.source, settings, hub.now()) == (PollFault.UNAUTHORIZED, told)
    assert hub.made() == 0


@pytest.mark.parametrize("ids", [(), (7, 8)])
def test_an_app_of_no_or_many_installations_has_to_be_told_which(keyring, hub, ids):
    hub.server.inject(json_response([{"id": one} for one in ids]), path_contains="/app/installations")
    told = f"the GitHub App 42 has {len(ids)} installations: name one, or a repository"
    settings = with_app(hub, installation_id="")
    assert fault(keyring.source, settings, hub.now()) == (PollFault.UNAUTHORIZED, told)


def test_an_installation_that_is_gone(keyring, hub):
    gone = with_app(hub, installation_id="8")
    assert fault(keyring.source, gone, hub.now()) == (PollFault.UNAUTHORIZED, "HTTP 404: Not Found")


def test_another_key_is_refused(keyring, hub):
    wrong = with_app(hub, private_key=App.create().private_key)
    told = fault(keyring.source, wrong, hub.now())
    assert told == (PollFault.UNAUTHORIZED, "HTTP 401: A JSON web token could not be decoded")


@pytest.mark.parametrize("ahead", [-60, -30, 0, 30, 60])
def test_a_clock_that_is_a_little_off_is_allowed_for(keyring, hub, ahead):
    assert hub.works(keyring.source(hub.settings, hub.now() + ahead * SECOND))
    assert hub.asked() == 1


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_clock_that_is_far_off_is_corrected_by_githubs(keyring, engine, hub, ahead, caplog):
    """And the token's end is kept by our clock, by which it will be looked at."""
    ours = hub.now() + ahead * SECOND
    assert hub.works(keyring.source(hub.settings, ours))
    assert hub.asked() == 2
    assert f"our clock is {ahead} s ahead of that of github" in caplog.text
    (row,) = rows(engine)
    assert abs(row.expires_at - ours - HOUR) < 5 * SECOND


def test_a_token_may_be_hundreds_of_characters_long(keyring, hub):
    token = keyring.source(hub.settings, hub.now()).token
    assert token.startswith("ghs_42_")
    assert len(token) > 500
    assert keyring.source(hub.settings, hub.now()).token == token


# ---- a platform in trouble -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (json_response({}, 503), PollFault.UNAVAILABLE),
        (Response(200, b"<html>", {"Content-Type": "text/html"}), PollFault.UNREADABLE),
        (Response(201, b"<html>", {"Content-Type": "text/html"}), PollFault.UNREADABLE),
        (json_response({"token": "two\nlines"}, 201), PollFault.UNREADABLE),
        (json_response({"access_token": None}), PollFault.UNREADABLE),
        (json_response({"message": "slow down"}, 429, {"Retry-After": "90"}), PollFault.RATE_LIMITED),
        (dropped(), PollFault.UNAVAILABLE),
        (hang(), PollFault.UNAVAILABLE),
    ],
    ids=["503", "html", "html 201", "no token", "null", "429", "cut", "time-out"],
)
def test_each_trouble_by_its_name(keyring, either, answer, expected):
    settings = replace(either.settings, timeout_seconds=0.5)
    either.server.inject(answer, times=1)
    assert fault(keyring.source, settings, either.now())[0] is expected
    made = keyring.source(settings, either.after(2 * MINUTE))
    assert either.works(made), "and it is over"


def test_a_limit_is_kept_by_all_workers(keyring, engine, hub):
    hub.server.inject(secondary_limit(90), times=1)
    assert fault(keyring.source, hub.settings, hub.now())[0] is PollFault.RATE_LIMITED
    with pytest.raises(PollError) as caught:
        Keyring(engine, KEYS).source(hub.settings, hub.after(80 * SECOND))
    assert caught.value.retry_after_seconds == 90
    assert hub.asked() == 1
    assert hub.works(keyring.source(hub.settings, hub.after(20 * SECOND)))


def test_a_token_that_still_works_is_used_while_no_new_one_is_to_be_had(keyring, hub):
    old = keyring.source(hub.settings, hub.now())
    hub.server.inject(json_response({}, 503), times=2)
    late = hub.after(55 * MINUTE)
    assert keyring.source(hub.settings, late) == old
    assert keyring.source(hub.settings, late) == old
    assert hub.asked() == 2, "the failure is remembered"
    assert fault(keyring.source, hub.settings, hub.after(6 * MINUTE))[0] is PollFault.UNAVAILABLE
    assert keyring.source(hub.settings, hub.after(MINUTE)) != old


def test_one_deadline_is_over_all_that_is_asked(keyring, hub):
    """Each of the two answers alone would be in time."""
    hub.server.latency_seconds = 0.4
    settings = replace(with_app(hub, *hub.settings.repositories, installation_id=""), timeout_seconds=0.6)
    assert fault(keyring.source, settings, hub.now())[0] is PollFault.UNAVAILABLE


# ---- at rest ---------------------------------------------------------------------------------


def test_nothing_secret_is_stored_shown_or_logged(keyring, engine, either, caplog):
    caplog.set_level(logging.DEBUG)
    settings, secrets = either.settings, []
    source = keyring.source(settings, either.now())
    renewed = keyring.refreshed(settings, source, either.now())
    sent = renewed.token + (f" {settings.oauth.client_secret}" if settings.oauth else "")
    either.server.inject(json_response({"message": f"no {sent}", "error": f"no {sent}"}, 403))
    with pytest.raises(PollError) as caught:
        keyring.refreshed(settings, renewed, either.after(2 * MINUTE))
    assert "no ***" in str(caught.value)
    if settings.app:
        proof = github.app_jwt(settings.app, either.now())
        request = github.installation_token_request(source, proof, "7")
        secrets = [proof, "PRIVATE KEY"]
    else:
        request = gitlab.refresh_request(source, settings.oauth, settings.oauth.refresh_token)
        secrets = [settings.oauth.refresh_token, settings.oauth.client_secret]
    with db.reading(engine) as connection:
        held = grants.held(connection, credentials._owner(settings), KEYS)
    secrets += [source.token, renewed.token, *([held.grant.refresh_token] if settings.oauth else [])]
    shown = json.dumps([[str(value) for value in row] for row in rows(engine)]) + caplog.text
    shown += repr((source, renewed, settings, request, held, caught.value))
    assert [secret for secret in secrets if secret in shown] == []


def test_other_settings_get_tokens_of_their_own_and_meet_no_others(keyring, engine, hub):
    one = keyring.source(hub.settings, hub.now())
    other = with_app(hub, installation_id="")
    assert keyring.source(other, hub.now()) != one
    assert keyring.source(hub.settings, hub.now()) == one
    assert len(rows(engine)) == 2
    keyring.source(other, hub.after(timedelta(days=31)))
    assert len(rows(engine)) == 1, "former settings are forgotten in time"


def test_without_a_key_to_seal_with_no_token_is_asked_for(engine, either):
    told = fault(Keyring(engine, ()).source, either.settings, either.now())
    assert told[0] is PollFault.UNAUTHORIZED
    assert told[1].startswith("ENCRYPTION_KEYS is empty")
    assert either.asked() == 0


def test_where_no_key_opens_them_an_app_gets_a_new_token(keyring, engine, hub):
    keyring.source(hub.settings, hub.now())
    other = Keyring(engine, (Fernet.generate_key().decode(),))
    assert hub.works(other.source(hub.settings, hub.now()))


def test_where_no_key_opens_them_oauth_says_so_and_loses_nothing(keyring, engine, lab):
    made = keyring.source(lab.settings, lab.now())
    other = Keyring(engine, (Fernet.generate_key().decode(),))
    told = fault(other.source, lab.settings, lab.now())
    assert told[0] is PollFault.UNAUTHORIZED
    assert "none of the 1 keys" in told[1]
    assert keyring.source(lab.settings, lab.now()) == made


def test_rekey_seals_them_with_the_newest_key(box, lab, monkeypatch):
    made = Keyring(box.engine, (OLD,)).source(lab.settings, lab.now())
    monkeypatch.setenv("ENCRYPTION_KEYS", f"{NEW},{OLD}")
    assert box("rekey") == ["1 sealed with the newest key"]
    assert box("rekey") == ["0 sealed with the newest key"]
    assert Keyring(box.engine, (NEW,)).source(lab.settings, lab.now()) == made
    monkeypatch.setenv("ENCRYPTION_KEYS", Fernet.generate_key().decode())
    assert "the secrets of gitlab open with none" in box("rekey", code=1)


# ---- in the polling job ----------------------------------------------------------------------


@pytest.fixture
def stand_of(engine, redis_client, monkeypatch, app):
    """`stand_of(platform)`: a stale build to poll with lent tokens alone, and who lends them."""
    with stands(engine, redis_client, monkeypatch) as make:

        def made(platform):
            stand = make((platform,), 1, kinds={platform: ["success"]}, speed=0.1, ENCRYPTION_KEYS=KEYS[0])
            server, settings = stand.servers[platform], stand.held.settings
            plain = settings.sources[platform]
            ours = replace(plain, source=replace(plain.source, token=""))
            server.tokens = ()
            if platform == "github":
                server.app = server.access.app = app
                ours = replace(ours, app=github.App("42", app.private_key))
            else:
                oauth = server.oauth
                first = oauth.grant().refresh
                ours = replace(ours, oauth=gitlab.OAuth(oauth.client_id, oauth.client_secret, first))
            sources = {**settings.sources, platform: ours}
            stand.held = replace(stand.held, settings=replace(settings, sources=sources))
            stand.push_all()
            return stand, Lender(server, ours, stand.clock, "", 0)

        yield made
    sealing.forget()


@ON_SQLITE
@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_a_build_is_polled_to_its_end_with_lent_tokens(stand_of, platform):
    stand, lender = stand_of(platform)
    (build,) = stand.world.builds
    stand.poll(after=FRESH)
    assert (stand.row(build)["poll_count"], lender.made()) == (1, 1)
    if platform == "github":
        lender.server.access.revoke(lender.server.access.issued[-1])
    stand.poll(after=stand.world.ends_at - stand.clock() + FRESH)
    assert stand.row(build)["state"] == "completed"
    assert lender.made() == {"github": 2, "gitlab": 1}[platform]
    assert (stand.pauses(), stand.notices()) == ({}, [])


@ON_SQLITE
@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_where_no_token_is_lent_the_source_is_paused_and_admins_are_told(stand_of, platform):
    stand, lender = stand_of(platform)
    (build,) = stand.world.builds
    if platform == "github":
        lender.server.app = None
    else:
        lender.revoke(Source("gitlab", "gitlab", token=next(iter(lender.server.oauth._pairs))))
    for _ in range(3):
        stand.poll(after=budget.UNAUTHORIZED_SECONDS + FRESH)
    assert stand.pauses()[platform][1] == "unauthorized"
    (notice,) = stand.notices()
    assert (notice["kind"], notice["subject"]) == ("source.unauthorized", platform)
    assert (stand.row(build)["state"], stand.row(build)["consecutive_errors"]) == ("in_progress", 0)
    assert lender.server.count() <= 6


@ON_SQLITE
def test_a_token_that_somebody_renews_between_two_pages_of_a_list_is_taken(stand_of, keyring):
    stand, lender = stand_of("gitlab")
    (build,) = stand.world.builds
    stand.discover()
    server, usual = lender.server, lender.server._answer

    def two_pages(request):
        answer = usual(request)
        if not request.path.endswith("/pipelines") or "page=2" in request.query:
            return answer
        ours = Source("gitlab", "gitlab", token=request.headers["authorization"].split()[1])
        if lender.made() == 1:
            keyring.refreshed(lender.settings, ours, stand.now())
        more = f'<{server.url}{request.path}?{request.query}&page=2>; rel="next"'
        return replace(answer, headers={**answer.headers, "Link": more})

    server._answer = two_pages
    stand.discover(after=60)
    server._answer = usual
    assert lender.made() == 2
    assert (stand.pauses(), stand.notices()) == ({}, [])
    stand.poll(after=stand.world.ends_at - stand.clock() + FRESH)
    assert stand.row(build)["state"] == "completed"


# ---- lanes -----------------------------------------------------------------------------------


def test_the_budget_a_source_spends_has_a_name_without_its_token():
    hub, lab = (
        Source("github", "github", "https://api.github.com"),
        Source("g", "gitlab", "https://G.example:81"),
    )
    app = github.App("42", "pem", "7")
    assert lane(SourceSettings(hub, app=app)) == "github:app:42:7"
    assert lane(SourceSettings(hub, app=github.App("42", "pem"))) == "github:app:42:github"
    assert lane(SourceSettings(replace(hub, api_url="https://ghe.example/api/v3"), app=app)) == (
        "github:app:42:7@ghe.example"
    )
    assert lane(SourceSettings(hub)) == "github:api.github.com:anonymous"
    assert lane(SourceSettings(replace(hub, token="abc"))) == "github:api.github.com:ba7816bf8f01cfea"
    assert lane(SourceSettings(replace(lab, token="abc"))) == "gitlab:g.example:81:ba7816bf8f01cfea"
    oauth = gitlab.OAuth("client", "secret", "abc")
    assert lane(SourceSettings(lab, oauth=oauth)) == "gitlab:g.example:81:ba7816bf8f01cfea"


@ON_SQLITE
@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_what_a_build_left_is_listed_and_downloaded_with_lent_tokens(
    stand_of, platform, store_url, redis_url
):
    stand, lender = stand_of(platform)
    (build,) = stand.world.builds
    stand.poll(after=stand.world.ends_at - stand.clock() + FRESH)
    assert stand.row(build)["state"] == "completed"
    stand.clock.advance(time.time() - stand.clock())
    if platform == "github":
        lender.server.access.revoke(lender.server.access.issued[-1])
    collect_job.collect(stand.held)
    values = replace(
        stand.held.settings,
        database_url=store_url,
        redis_url=redis_url,
        admin_token="the-admin-token-of-tests",
    )
    app = create_app(values)
    try:
        client, headers = app.test_client(), {"Authorization": "Bearer the-admin-token-of-tests"}
        path = f"/api/builds/{build.build_id}/artifacts"
        listed = client.get(path, headers=headers).json
        assert (listed["state"], bool(listed["items"])) == ("stored", True)
        if platform == "github":
            lender.server.access.revoke(lender.server.access.issued[-1])
        name = listed["items"][0]["name"]
        answer = client.get(f"{path}/{name}", headers=headers, buffered=True)
        assert (answer.status_code, len(answer.data) > 0) == (200, True)
    finally:
        app.extensions["buildrelay"].engine.dispose()
        app.extensions["buildrelay"].redis.close()
    assert (stand.pauses(), stand.notices()) == ({}, [])
