"""The simulated GitHub is as strict as the real one: tokens, limits, lists, files and webhooks."""

import base64
import hashlib
import hmac
import io
import json
import threading
import zipfile
from collections import Counter
from urllib.parse import parse_qs

import pytest
import requests
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from tests.asking import Inbox, ask, message, next_page, one_build, told, world_of
from webhook_app.simulated import github
from webhook_app.simulated.ci import LOGGED_SECRETS
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.github_access import App
from webhook_app.simulated.httpd import Response
from webhook_app.simulated.sender import Secrets, Sender, plan_pushes
from webhook_app.simulated.targets import Target
from webhook_app.simulated.world import PLATFORMS, REPOSITORIES, StepClock, busy_world

SECRETS = Secrets(
    github="github-secret-of-the-tests", gitlab="gitlab-secret", jenkins="jenkins-secret-of-the-tests"
)
PLACE = REPOSITORIES["github"][0]


@pytest.fixture
def clock():
    return StepClock(1_795_000_000.25)


@pytest.fixture(scope="module")
def app():
    return App.create()


def as_user(token="simulated-github-token"):
    return {"Authorization": f"Bearer {token}", "User-Agent": "tests"}


def get(server, url, token="simulated-github-token", **query):
    return ask(server, url, headers=as_user(token), **query)


def send(server, method, url, body=None, token="simulated-github-token"):
    return ask(server, url, method, headers=as_user(token), body=body)


def runs_of(build):
    return f"/repos/{build.repository.full_name}/actions/runs"


def packed(content):
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=")


def jwt(app, now, **claims):
    """A JWT made here, by hand."""
    given = {"iat": int(now) - 60, "exp": int(now) + 540, "iss": str(app.app_id)} | claims
    text = packed({"alg": "RS256", "typ": "JWT"}) + b"." + packed(given)
    key = serialization.load_pem_private_key(app.private_key.encode(), None)
    signature = key.sign(text, padding.PKCS1v15(), hashes.SHA256())
    return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def issue(server, app, body=None, **claims):
    url = f"/app/installations/{app.installation_id}/access_tokens"
    return send(server, "POST", url, body, jwt(app, server.world.now(), **claims))


# Tokens ------------------------------------------------------------------------------------------


def test_an_app_finds_its_installation_and_gets_a_token_that_lasts_an_hour(clock, app):
    world, build = one_build(clock, "github", "success")
    with GitHubServer(world, app=app, port=None) as server:
        found = told(get(server, f"/repos/{PLACE.full_name}/installation", jwt(app, clock())))
        assert found["id"] == app.installation_id
        assert [each["id"] for each in told(get(server, "/app/installations", jwt(app, clock())))] == [
            app.installation_id
        ]
        made = told(issue(server, app))
        assert made["token"].startswith(f"ghs_{app.app_id}_")
        assert len(made["token"]) > 500
        assert made["expires_at"] == github.bodies.iso(clock() + 3600)
        assert get(server, runs_of(build), made["token"]).status == 200
        clock.advance(3599)
        assert get(server, runs_of(build), made["token"]).status == 200
        clock.advance(1)
        assert message(get(server, runs_of(build), made["token"])) == "Bad credentials"


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"exp": 1_795_000_700}, "'exp') is too far in the future"),
        ({"exp": 1_794_999_999}, "'exp') must be a numeric value representing the future"),
        ({"exp": None}, "'exp') must be a numeric value"),
        ({"iat": 1_795_000_090}, "'iat') must be an Integer"),
        ({"iss": "12"}, "'iss') must be an Integer"),
    ],
)
def test_a_jwt_must_be_timely_and_name_its_app(clock, app, claims, words):
    world = world_of(clock, "github", builds=0)
    with GitHubServer(world, app=app, port=None) as server:
        refused = issue(server, app, **claims)
        assert refused.status == 401
        assert words in message(refused)
        assert issue(server, app, iss=app.client_id).status == 201


def test_a_jwt_of_another_key_or_a_token_in_its_place_is_refused(clock, app):
    world = world_of(clock, "github", builds=0)
    forged = jwt(App.create(), clock())
    with GitHubServer(world, app=app, port=None) as server:
        for token in (forged, jwt(app, clock())[:-8] + "AAAAAAAA", "simulated-github-token", "a.b.c", ""):
            refused = get(server, "/app/installations", token)
            assert (refused.status, message(refused)) == (401, "A JSON web token could not be decoded")


def test_a_token_may_be_for_some_repositories_and_permissions_only(clock, app):
    world = world_of(clock, "github", builds=0)
    with GitHubServer(world, app=app, port=None) as server:
        some = {"repositories": ["storefront"], "permissions": {"metadata": "read", "actions": "read"}}
        token = told(issue(server, app, some))["token"]
        assert get(server, "/repos/octo-demo/STOREFRONT/actions/runs", token).status == 200
        assert get(server, "/repos/Octo-Demo/payments-api/actions/runs", token).status == 404
        refused = get(server, "/repos/Octo-Demo/storefront/hooks", token)
        assert (refused.status, message(refused)) == (403, "Resource not accessible by integration")
        assert issue(server, app, {"repositories": ["nothing"]}).status == 422
        assert issue(server, app, {"permissions": {"checks": "write"}}).status == 422


def test_an_etag_belongs_to_its_token_and_the_budget_to_the_installation(clock, app):
    world, build = one_build(clock, "github", "success")
    with GitHubServer(world, app=app, port=None) as server:
        old, new = (told(issue(server, app))["token"] for _ in range(2))
        tag = get(server, runs_of(build), old).headers["ETag"]
        statuses = [
            ask(server, runs_of(build), headers=as_user(token) | {"If-None-Match": tag}).status
            for token in (old, new)
        ]
        assert statuses == [304, 200]
        assert server.used(old) == server.used(new) == 2
        server.access.revoke(old)
        assert get(server, runs_of(build), old).status == 401
        assert get(server, runs_of(build), new).status == 200


# Limits ------------------------------------------------------------------------------------------


def test_the_budget_of_the_hour_may_be_refused_with_429(clock):
    world = world_of(clock, "github", builds=0)
    with GitHubServer(world, limit=1, port=None) as server:
        server.limits.limit_status = 429
        url = f"/repos/{PLACE.full_name}/actions/runs"
        assert get(server, url).status == 200
        refused = get(server, url)
        assert (refused.status, refused.headers["X-RateLimit-Remaining"]) == (429, "0")
        assert "Retry-After" not in refused.headers
        assert get(server, "/rate_limit").status == 200
        assert server.limits.refused == 1


def test_more_than_900_points_in_a_minute_break_the_secondary_limit_304_included(clock):
    world, build = one_build(clock, "github", "unapproved")
    with GitHubServer(world, port=None) as server:
        tag = get(server, runs_of(build)).headers["ETag"]
        tagged = as_user() | {"If-None-Match": tag}
        assert {ask(server, runs_of(build), headers=tagged).status for _ in range(894)} == {304}
        assert server.used() == 1
        assert send(server, "POST", f"/repos/{PLACE.full_name}/hooks", {}).status == 422, "a write costs 5"
        assert get(server, "/rate_limit").status == 200, "free"
        refused = get(server, runs_of(build))
        assert refused.status == 403
        assert "secondary rate limit" in message(refused)
        assert "Retry-After" not in refused.headers
        assert int(refused.headers["X-RateLimit-Remaining"]) > 4000
        clock.advance(59)
        assert get(server, runs_of(build)).status == 403, "it isn't over as soon as there is room again"
        clock.advance(1)
        assert get(server, runs_of(build)).status == 200
        assert server.secondary_hits == 2


def test_a_secondary_limit_may_tell_when_to_come_back(clock):
    world = world_of(clock, "github", builds=0)
    with GitHubServer(world, points=1, port=None) as server:
        server.limits.retry_after = 7
        answers = [get(server, f"/repos/{PLACE.full_name}") for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 403]
        assert answers[1].headers["Retry-After"] == "7"


def test_too_many_requests_at_once_break_the_secondary_limit(clock):
    world = world_of(clock, "github", builds=0)
    statuses, together = Counter(), threading.Barrier(3)
    with GitHubServer(world) as server:
        server.limits.concurrency, server.latency_seconds = 2, 2.0

        def read():
            together.wait(60)
            answer = requests.get(f"{server.url}/repos/{PLACE.full_name}", headers=as_user(), timeout=60)
            statuses[answer.status_code] += 1

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert statuses == {200: 2, 403: 1}
        assert (server.secondary_hits, server.most_in_flight) == (1, 3)


# Lists and repositories -------------------------------------------------------------------------


def test_a_rerun_keeps_its_place_in_the_list_and_is_not_back_on_page_1(clock):
    world = world_of(clock, "github", "rerun", spread_seconds=0)
    old = world.builds[0]
    while len(world.of(old.repository)) < 4:
        clock.advance(0.01)
        world.extend(1)
    clock.at = old.ends_at
    with GitHubServer(world, port=None) as server:
        first = get(server, runs_of(old), per_page=3)
        assert old.run_id not in [run["id"] for run in told(first)["workflow_runs"]]
        second = told(get(server, next_page(first)))["workflow_runs"]
        assert [(run["id"], run["run_attempt"]) for run in second] == [(old.run_id, 2)]


def test_a_list_lags_behind_while_a_single_read_is_right(clock):
    world, build = one_build(clock, "github", "success")
    with GitHubServer(world, list_lag_seconds=10, filtered_lag_seconds=30, port=None) as server:
        clock.at = build.ends_at + 1
        assert told(get(server, runs_of(build)))["workflow_runs"][0]["status"] != "completed"
        assert told(get(server, runs_of(build), status="completed"))["total_count"] == 0
        clock.at = build.ends_at + 10
        assert told(get(server, runs_of(build)))["workflow_runs"][0]["status"] == "completed"
        assert told(get(server, runs_of(build), status="completed"))["total_count"] == 0
        assert told(get(server, f"{runs_of(build)}/{build.run_id}"))["status"] == "completed"
        clock.at = build.ends_at + 40
        assert told(get(server, runs_of(build), status="completed"))["total_count"] == 1


def test_links_keep_the_filters_of_the_query(clock):
    world = world_of(clock, "github", "success", builds=12)
    clock.at = world.ends_at + 60
    with GitHubServer(world, port=None) as server:
        url, seen = f"/repos/{PLACE.full_name}/actions/runs?status=completed&per_page=1", []
        while url:
            answer = get(server, url)
            seen += [run["id"] for run in told(answer)["workflow_runs"]]
            url = next_page(answer)
        assert seen == [build.run_id for build in world.of(PLACE)][::-1]
        assert len(seen) > 1


def test_a_deleted_run_a_hidden_repository_and_a_missing_permission(clock):
    world, build = one_build(clock, "github", "success")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        job = f"/repos/{build.repository.full_name}/actions/jobs/{build.moments[-1].jobs[0].id}"
        assert get(server, job).status == 200
        server.delete(build.build_id)
        for url in (f"{runs_of(build)}/{build.run_id}", f"{runs_of(build)}/{build.run_id}/jobs", job):
            assert get(server, url).status == 404
        assert get(server, f"/repos/{build.repository.full_name}").status == 200
        server.permissions["actions"] = "none"
        assert message(get(server, runs_of(build))) == "Resource not accessible by personal access token"
        server.hide(build.repository)
        assert get(server, f"/repos/{build.repository.full_name}").status == 404
        server.hide(build.repository, False)
        server.inject(github.sso_required(), times=1)
        assert "required; url=" in get(server, runs_of(build)).headers["X-GitHub-SSO"]


def test_a_renamed_repository_answers_at_its_id(clock):
    world, build = one_build(clock, "github", "success")
    with GitHubServer(world, port=None) as server:
        server.rename(build.repository, "Octo-Demo", "boutique")
        moved = get(server, f"{runs_of(build)}?per_page=5")
        assert moved.status == 301
        assert moved.headers["Location"].endswith(
            f"/repositories/{build.repository.id}/actions/runs?per_page=5"
        )
        run = told(get(server, moved.headers["Location"]))["workflow_runs"][0]
        assert (run["id"], run["repository"]["full_name"]) == (build.run_id, "Octo-Demo/boutique")
        assert told(get(server, "/repos/octo-demo/boutique"))["id"] == build.repository.id


def test_the_account_its_scopes_and_a_wrong_clock(clock, app):
    world = world_of(clock, "github", builds=0)
    with GitHubServer(world, app=app, port=None) as server:
        answer = get(server, "/user")
        assert told(answer)["login"] == "mona-demo"
        assert answer.headers["X-OAuth-Scopes"] == server.scopes
        assert answer.headers["Date"] == "Wed, 18 Nov 2026 11:06:40 GMT"
        server.date_skew_seconds = -90
        assert get(server, "/user").headers["Date"] == "Wed, 18 Nov 2026 11:05:10 GMT"
        installation = get(server, "/user", told(issue(server, app))["token"])
        assert installation.status == 403
        assert "X-OAuth-Scopes" not in installation.headers


# Logs and annotations ---------------------------------------------------------------------------


def job_log(server, build, job, token="simulated-github-token"):
    return get(server, f"/repos/{build.repository.full_name}/actions/jobs/{job.id}/logs", token)


def blob(server, redirect, **headers):
    assert redirect.status == 302, redirect
    return ask(server, redirect.headers["Location"], headers=headers)


def test_a_log_is_behind_a_link_that_lasts_a_minute_and_wants_no_token(clock):
    world, build = one_build(clock, "github", "failure")
    clock.at = build.ends_at
    with GitHubServer(world) as server:
        redirect = job_log(server, build, build.moments[-1].jobs[-1])
        url = redirect.headers["Location"]
        assert url.startswith(server.blob_url)
        assert server.blob_url != server.url
        assert requests.get(url, headers=as_user(), timeout=60).status_code == 400
        assert requests.get(url, timeout=60).status_code == 200
        assert requests.get(url.replace("sig=", "sig=0"), timeout=60).status_code == 403
        clock.advance(60)
        late = requests.get(url, timeout=60)
        assert late.status_code == 403
        assert "AuthenticationFailed" in late.text


def test_a_log_looks_as_github_writes_it_and_gives_a_secret_away(clock):
    world, build = one_build(clock, "github", "failure")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        server.extra_log_lines = ("registry login as ci:hunter2-hunter2",)
        raw = blob(server, job_log(server, build, build.moments[-1].jobs[-1])).body
        assert raw.startswith(b"\xef\xbb\xbf2026-11-")
        text = raw.decode("utf-8-sig")
        assert "##[error]Process completed with exit code 1.\r\n" in text
        assert "\x1b[31mFAIL" in text
        assert LOGGED_SECRETS["github"] in text
        assert "ci:hunter2-hunter2" in text
        server.log_bytes = 3_000_000
        huge = blob(server, job_log(server, build, build.moments[-1].jobs[-1])).body
        assert len(huge) > 3_000_000
        assert b"##[error]" in huge[-1000:]


@pytest.mark.parametrize(("kind", "index"), [("cancelled", -1), ("skipped", 0), ("cancelled_queued", 0)])
def test_a_job_that_was_cancelled_or_skipped_never_has_a_log(clock, kind, index):
    world, build = one_build(clock, "github", kind)
    clock.at = build.ends_at + 1000
    with GitHubServer(world, port=None) as server:
        assert job_log(server, build, build.moments[-1].jobs[index]).status == 404


def test_a_log_exists_when_its_job_is_over_and_is_gone_after_retention(clock):
    world, build = one_build(clock, "github", "success")
    first = build.moments[-1].jobs[0]
    with GitHubServer(world, port=None) as server:
        clock.at = first.finished_at - 0.001
        missing = blob(server, job_log(server, build, first))
        assert missing.status == 404
        assert b"BlobNotFound" in missing.body
        clock.at = first.finished_at
        assert blob(server, job_log(server, build, first)).status == 200
        assert get(server, f"{runs_of(build)}/{build.run_id}/logs").status == 404, "the run isn't over"
        clock.at = build.ends_at + 91 * 86_400
        assert job_log(server, build, first).status == 410
        assert get(server, f"{runs_of(build)}/{build.run_id}/logs").status == 410
        server.files.retention_seconds = 400 * 86_400
        assert job_log(server, build, first).status == 302


def test_the_logs_of_a_run_are_one_zip_with_a_file_per_job_of_that_attempt(clock):
    world, build = one_build(clock, "github", "rerun")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        for path, failed in (("logs", False), ("attempts/1/logs", True)):
            content = blob(server, get(server, f"{runs_of(build)}/{build.run_id}/{path}")).body
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert "1_test.txt" in archive.namelist()
                assert "test/1_Set up job.txt" in archive.namelist()
                assert (b"##[error]" in archive.read("1_test.txt")) is failed


def test_a_failed_job_has_annotations_under_its_own_id(clock):
    world, build = one_build(clock, "github", "failure")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        good, bad = build.moments[-1].jobs
        checks = f"/repos/{build.repository.full_name}/check-runs"
        found = told(get(server, f"{checks}/{bad.id}/annotations"))
        assert [(one["annotation_level"], one["path"]) for one in found] == [
            ("failure", "tests/test_cart.py"), ("failure", ".github"),
        ]  # fmt: skip
        assert told(get(server, f"{checks}/{bad.id}"))["output"]["annotations_count"] == 2
        assert told(get(server, f"{checks}/{good.id}/annotations")) == []
        assert get(server, f"{checks}/1/annotations").status == 404


# Artifacts --------------------------------------------------------------------------------------


def test_artifacts_come_in_pages_with_their_digest_and_names_come_back_with_a_rerun(clock):
    world, build = one_build(clock, "github", "rerun")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        url, listed = f"{runs_of(build)}/{build.run_id}/artifacts?per_page=2", []
        while url:
            answer = get(server, url)
            assert told(answer)["total_count"] == 3
            listed += told(answer)["artifacts"]
            url = next_page(answer)
        assert Counter(one["name"] for one in listed) == {"test-report": 2, "dist": 1}
        assert len({one["created_at"] for one in listed}) == 2
        for one in listed:
            content = blob(server, get(server, one["archive_download_url"])).body
            assert one["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
            assert one["size_in_bytes"] == len(content)
            assert one == told(get(server, one["url"]))
        named = told(get(server, f"{runs_of(build)}/{build.run_id}/artifacts", name="dist"))
        assert named["total_count"] == 1


def test_an_artifact_expires(clock):
    world, build = one_build(clock, "github", "success")
    clock.at = build.ends_at
    with GitHubServer(world, port=None) as server:
        server.files.retention_seconds = 86_400
        url = f"{runs_of(build)}/{build.run_id}/artifacts"
        one = told(get(server, url))["artifacts"][0]
        assert (one["expired"], one["expires_at"]) == (False, github.bodies.iso(clock() + 86_400))
        clock.advance(86_400)
        assert told(get(server, url))["artifacts"][0]["expired"] is True
        assert get(server, one["archive_download_url"]).status == 410


def test_a_download_may_break_off_and_a_blob_may_be_another_one(clock):
    world, build = one_build(clock, "github", "success")
    clock.at = build.ends_at
    with GitHubServer(world) as server:
        one = told(get(server, f"{runs_of(build)}/{build.run_id}/artifacts"))["artifacts"][0]
        location = get(server, one["archive_download_url"]).headers["Location"]
        whole = requests.get(location, timeout=60).content
        server.inject(Response(200, whole, cut_after=len(whole) - 10), times=1, path_contains="/_blobs/")
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(location, timeout=60)
        server.inject(Response(200, b"something else"), times=1, path_contains="/_blobs/")
        assert requests.get(location, timeout=60).content != whole
        assert requests.get(location, timeout=60).content == whole


# Webhooks ---------------------------------------------------------------------------------------


def events_of(inbox):
    return [request.headers["x-github-event"] for request in inbox.requests]


@pytest.fixture
def inbox():
    box = Inbox("/webhooks/github", 202)
    yield box
    box.server.close()


def hook_body(url, secret="s3cret", **more):
    config = {"url": url, "content_type": "json", "secret": secret}
    return {"name": "web", "events": ["workflow_run", "workflow_job"], "config": config} | more


def test_a_hook_is_made_pinged_changed_and_deleted(clock, inbox):
    world = world_of(clock, "github", builds=0)
    hooks = f"/repos/{PLACE.full_name}/hooks"
    with GitHubServer(world, port=None) as server:
        assert told(get(server, hooks)) == []
        made = told(send(server, "POST", hooks, hook_body(inbox.url)))
        assert made["config"]["secret"] == "********"
        assert made["last_response"]["status"] == "active"
        assert events_of(inbox) == ["ping"]
        digest = hmac.new(b"s3cret", inbox.requests[0].body, hashlib.sha256).hexdigest()
        assert inbox.requests[0].headers["x-hub-signature-256"] == f"sha256={digest}"
        assert json.loads(inbox.requests[0].body)["hook_id"] == made["id"]
        again = send(server, "POST", hooks, hook_body(inbox.url))
        assert (again.status, "already exists" in again.body.decode()) == (422, True)
        assert send(server, "POST", hooks, hook_body("no-address")).status == 422
        url = f"{hooks}/{made['id']}"
        changed = told(send(server, "PATCH", url, {"active": False, "events": ["push"]}))
        assert (changed["active"], changed["events"]) == (False, ["push"])
        assert "secret" not in told(send(server, "PATCH", url, {"config": {"url": inbox.url}}))["config"]
        inbox.status = 401
        assert send(server, "POST", f"{url}/pings").status == 204
        assert "x-hub-signature-256" not in inbox.requests[1].headers
        assert parse_qs(inbox.requests[1].body.decode())["payload"], "the form is the default"
        assert told(get(server, url))["last_response"]["code"] == 401
        deliveries = told(get(server, f"{url}/deliveries"))
        assert [one["status"] for one in deliveries] == ["Invalid HTTP Response: 401", "OK"]
        assert send(server, "DELETE", url).status == 204
        assert get(server, url).status == 404
        assert told(get(server, hooks)) == []


def test_hooks_need_their_permission_and_there_are_at_most_20(clock, inbox):
    world = world_of(clock, "github", builds=0)
    hooks = f"/repos/{PLACE.full_name}/hooks"
    with GitHubServer(world, port=None) as server:
        for n in range(20):
            assert send(server, "POST", hooks, hook_body(f"{inbox.url}?{n}")).status == 201
        assert send(server, "POST", hooks, hook_body(inbox.url)).status == 422
        server.permissions["repository_hooks"] = "read"
        assert len(told(get(server, hooks, per_page=100))) == 20
        assert send(server, "POST", hooks, hook_body(inbox.url)).status == 403
        assert told(get(server, f"/repos/{PLACE.full_name}"))["permissions"]["admin"] is False
        server.permissions["repository_hooks"] = "none"
        assert get(server, hooks).status == 403


def pushing_world(clock):
    world = world_of(clock, "github", "success", builds=6)
    return world, next(place for place in REPOSITORIES["github"] if world.of(place))


def test_a_registered_hook_gets_the_events_it_asked_for_under_its_own_secret(clock, inbox):
    world, place = pushing_world(clock)
    with GitHubServer(world, port=None) as server:
        hooks = {"github": server.hooks}
        sender = Sender(world, "http://127.0.0.1:9", SECRETS, hooks=hooks)
        url = f"/repos/{place.full_name}/hooks"
        told(send(server, "POST", url, hook_body(inbox.url, events=["workflow_run"])))
        clock.at = world.ends_at
        sender.send_due()
        sender.close()
        ours = [push for build in world.of(place) for moment in build.moments for push in moment.events]
        wanted = [event for event in ours if event.name == "workflow_run"]
        assert Counter(events_of(inbox)) == {"ping": 1, "workflow_run": len(wanted)}
        report = sender.report()
        assert report["accepted"] == len(wanted)
        assert report["unsent"] == report["planned"] - len(wanted)
        digest = hmac.new(b"s3cret", inbox.requests[-1].body, hashlib.sha256).hexdigest()
        assert inbox.requests[-1].headers["x-hub-signature-256"] == f"sha256={digest}"


def test_deliveries_are_paged_by_cursor_shown_whole_and_sent_again_under_their_guid(clock, inbox):
    world, place = pushing_world(clock)
    with GitHubServer(world, port=None) as server:
        sender = Sender(world, "http://127.0.0.1:9", SECRETS, hooks={"github": server.hooks})
        server.deliveries = sender
        hook = told(send(server, "POST", f"/repos/{place.full_name}/hooks", hook_body(inbox.url)))
        inbox.status = 503
        clock.at = world.ends_at
        sender.send_due()
        base = f"/repos/{place.full_name}/hooks/{hook['id']}/deliveries"
        url, listed, pages = f"{base}?per_page=3&status=failure", [], 0
        while url:
            answer = get(server, url)
            listed += told(answer)
            url, pages = next_page(answer), pages + 1
        assert len(listed) == len(inbox.requests) - 1 == len({one["id"] for one in listed})
        assert pages == -(-len(listed) // 3)
        assert {one["status_code"] for one in listed} == {503}
        told_last = told(get(server, f"{base}/{listed[0]['id']}"))
        assert told_last["request"]["headers"]["X-GitHub-Delivery"] == listed[0]["guid"]
        assert told_last["request"]["payload"] == json.loads(inbox.requests[-1].body)
        assert told_last["response"]["payload"] == "noted"
        inbox.status = 202
        assert send(server, "POST", f"{base}/{listed[0]['id']}/attempts").status == 202
        sender.send_due()
        sender.close()
        assert inbox.requests[-1].headers["x-github-delivery"] == listed[0]["guid"]
        assert inbox.requests[-1].body == inbox.requests[-2].body
        newest = told(get(server, base))[0]
        assert (newest["guid"], newest["redelivery"], newest["status"]) == (listed[0]["guid"], True, "OK")
        assert send(server, "POST", f"{base}/999999/attempts").status == 404


def test_the_deliveries_of_an_app_are_listed_and_repeated_with_its_jwt(clock, inbox, app):
    world, _ = pushing_world(clock)
    with GitHubServer(world, app=app, port=None) as server:
        sender = Sender(world, "http://127.0.0.1:9", SECRETS, hooks={"github": server.hooks})
        server.deliveries, server.hooks.app = sender, Target(inbox.url, "app-secret", 99)
        inbox.status = 500
        clock.at = world.ends_at
        sender.send_due()
        token = jwt(app, clock())
        assert get(server, "/app/hook/deliveries").status == 401, "a JWT is needed"
        listed, url = [], "/app/hook/deliveries?status=failure&per_page=100"
        while url:
            answer = get(server, url, token)
            listed += told(answer)
            url = next_page(answer)
        assert len(listed) == len(inbox.requests) == sender.report()["planned"]
        assert told(get(server, "/app/hook/config", token))["url"] == inbox.url
        one = f"/app/hook/deliveries/{listed[0]['id']}"
        assert told(get(server, one, token))["guid"] == listed[0]["guid"]
        assert send(server, "POST", f"{one}/attempts", token=token).status == 202
        assert sender.send_due() == 1
        sender.close()
        assert inbox.requests[-1].headers["x-github-delivery"] == listed[0]["guid"]


# For benchmarks ---------------------------------------------------------------------------------


def test_a_busy_world_keeps_about_its_number_of_builds_running(clock):
    world = busy_world(clock, active=200, repositories=20, build_seconds=600, changes=5)
    for _ in range(10):
        running = [
            build for build in world.builds
            if (moment := world.moment(build.build_id)) and moment.status != "completed"
        ]  # fmt: skip
        assert 180 <= len(running) <= 220
        assert {len(build.moments) for build in running} == {5}
        assert {len(world.begun(place, clock())) > 5 for place in world.places["github"]} == {True}
        clock.advance(300)
    assert (
        busy_world(clock, active=9, repositories=3).builds
        == busy_world(clock, active=9, repositories=3).builds
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_builds_of_a_busy_world_end_and_are_pushed_on_every_platform(clock, platform):
    world = busy_world(
        clock, active=20, repositories=4, platform=platform, build_seconds=100, span_seconds=100
    )
    clock.at = world.ends_at
    ends = Counter(world.truth(build.build_id).state for build in world.builds)
    assert set(ends) == {"completed", "failed"}
    assert sum(ends.values()) == 40
    for build in world.builds:
        pushes = plan_pushes([build], seed=1)
        assert pushes[0].at == build.begins_at
        assert pushes[-1].at == build.ends_at


def test_a_busy_world_is_served_whole_without_a_socket(clock):
    world = busy_world(clock, active=60, repositories=3, build_seconds=600)
    with GitHubServer(world, port=None) as server:
        shown = {
            run["id"]: run["status"]
            for place in world.places["github"]
            for run in told(get(server, f"/repos/{place.full_name}/actions/runs", per_page=100))[
                "workflow_runs"
            ]
        }
    begun = {build.run_id: moment.status for build in world.builds if (moment := build.moment_at(clock()))}
    assert shown == begun
    assert server.count("/actions/runs") == 3
