"""The simulated GitLab is as strict as the real one: tokens, limits, lists, traces, artifacts and webhooks."""

import base64
import io
import json
import zipfile
from collections import Counter

import pytest
import requests

from tests.asking import Inbox, ask, iso, next_page, one_build, told, world_of
from webhook_app.signing import sign_v1
from webhook_app.simulated.ci import LOGGED_SECRETS
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.sender import Secrets, Sender
from webhook_app.simulated.world import REPOSITORIES, StepClock, busy_world

TOKEN = {"PRIVATE-TOKEN": "simulated-gitlab-token"}
SIGNING_TOKEN = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
SECRETS = Secrets("github-secret-of-the-tests", "unused", "jenkins-secret-of-the-tests")
PLACE = REPOSITORIES["gitlab"][0]


@pytest.fixture
def clock():
    return StepClock(1_795_000_000.25)


def get(server, url, headers=TOKEN, **query):
    return ask(server, url, headers=headers, **query)


def send(server, method, url, body=None):
    return ask(server, url, method, headers=TOKEN | {"Content-Type": "application/json"}, body=body)


def project(place):
    return f"/api/v4/projects/{place.id}"


# Tokens and limits -------------------------------------------------------------------------------


def refresh(server, token, **changes):
    form = {
        "grant_type": "refresh_token", "refresh_token": token, "client_id": server.oauth.client_id,
        "client_secret": server.oauth.client_secret,
    } | changes  # fmt: skip
    body = "&".join(f"{name}={value}" for name, value in form.items()).encode()
    return ask(server, "/oauth/token", "POST", headers={}, body=body)


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_an_oauth_token_lasts_two_hours_and_a_refresh_kills_both_old_tokens(clock):
    with GitLabServer(world_of(clock, "gitlab", builds=0), port=None) as server:
        old = server.oauth.grant()
        assert get(server, project(PLACE), bearer(old.access)).status == 200
        clock.advance(7200)
        expired = get(server, project(PLACE), bearer(old.access))
        assert (expired.status, json.loads(expired.body)["error"]) == (401, "invalid_token")
        assert b"Token is expired" in expired.body
        new = told(refresh(server, old.refresh))
        assert new["expires_in"] == 7200
        assert b"revoked" in get(server, project(PLACE), bearer(old.access)).body
        assert get(server, project(PLACE), bearer(new["access_token"])).status == 200
        again = refresh(server, old.refresh)
        assert (again.status, json.loads(again.body)["error"]) == (400, "invalid_grant")
        assert refresh(server, new["refresh_token"], client_secret="wrong").status == 401
        server.oauth.revoke(new["access_token"])
        assert get(server, project(PLACE), bearer(new["access_token"])).status == 401
        assert server.oauth.refreshes == 1


def test_the_token_the_user_the_version_and_the_project(clock):
    with GitLabServer(world_of(clock, "gitlab", builds=0), port=None) as server:
        server.scopes, server.token_expires_on = ["read_api"], "2026-12-24"
        about = told(get(server, "/api/v4/personal_access_tokens/self"))
        assert (about["scopes"], about["expires_at"], about["active"]) == (["read_api"], "2026-12-24", True)
        assert told(get(server, "/api/v4/user"))["username"] == "mona-demo"
        assert told(get(server, "/api/v4/version"))["version"].startswith("19.")
        found = told(get(server, f"/api/v4/projects/{PLACE.full_name.replace('/', '%2F')}"))
        assert (found["id"], found["permissions"]["project_access"]["access_level"]) == (PLACE.id, 40)
        refused = send(server, "POST", f"{project(PLACE)}/hooks", {"url": "http://127.0.0.1:9"})
        assert (refused.status, json.loads(refused.body)["error"]) == (403, "insufficient_scope")
        server.hide(PLACE)
        assert get(server, project(PLACE)).status == 404


def test_a_limit_is_told_with_every_answer_and_counts_a_304(clock):
    world, build = one_build(clock, "gitlab", "success")
    with GitLabServer(world, limit=2, port=None) as server:
        first = get(server, server.path_of(build))
        again = get(server, server.path_of(build), TOKEN | {"If-None-Match": first.headers["ETag"]})
        assert (first.status, again.status) == (200, 304)
        assert [answer.headers["RateLimit-Remaining"] for answer in (first, again)] == ["1", "0"]
        refused = get(server, server.path_of(build))
        assert refused.status == 429
        assert refused.headers["RateLimit-Limit"] == "2"
        assert refused.headers["RateLimit-ResetTime"].endswith("GMT")
        clock.advance(int(refused.headers["Retry-After"]) + 1)
        assert get(server, server.path_of(build)).status == 200


def test_a_self_managed_instance_may_have_no_limits_or_not_tell_them(clock):
    world, build = one_build(clock, "gitlab", "success")
    with GitLabServer(world, port=None, limit=None) as server:
        answers = [get(server, server.path_of(build)) for _ in range(2100)]
        assert {answer.status for answer in answers} == {200}
        assert not limits_in(answers[-1])
    with GitLabServer(world, port=None, limit=1, limit_headers=False) as server:
        answers = [get(server, server.path_of(build)) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 429]
        assert not limits_in(answers[0]) + limits_in(answers[1])
        assert 1 <= int(answers[1].headers["Retry-After"]) <= 60


def limits_in(answer):
    return [name for name in answer.headers if name.startswith("RateLimit")]


# Lists -------------------------------------------------------------------------------------------


def test_a_retried_old_pipeline_is_found_by_what_was_updated_lately(clock):
    world, old = one_build(clock, "gitlab", "retry")
    clock.at = old.ends_at - 0.001
    since = clock.at - 3
    with GitLabServer(world, port=None) as server:
        query = {"order_by": "updated_at", "updated_after": "2026-11-18T11:06:00Z", "per_page": 1}
        url = f"{project(old.repository)}/pipelines"
        assert [item["id"] for item in told(get(server, url, **query))] == [old.run_id]
        assert told(get(server, url, created_after=iso(since))) == []
        assert [item["id"] for item in told(get(server, url, updated_after=iso(since)))] == [old.run_id]
        assert get(server, url, updated_after="yesterday").status == 400


def test_jobs_are_chosen_by_scope_and_come_in_pages(clock):
    world, build = one_build(clock, "gitlab", "retry")
    clock.at = build.ends_at
    with GitLabServer(world, port=None) as server:
        jobs = f"{server.path_of(build)}/jobs"
        failed = get(server, f"{jobs}?include_retried=true&scope[]=failed")
        assert [one["name"] for one in told(failed)] == ["unit"]
        assert told(get(server, f"{jobs}?scope[]=failed")) == []
        first = get(server, jobs, per_page=2)
        rest = get(server, next_page(first))
        assert [one["id"] for one in told(first) + told(rest)] == [
            one["id"] for one in told(get(server, jobs))
        ]
        assert first.headers["X-Next-Page"] == "2"


def test_a_busy_world_of_pipelines_is_listed_by_what_changed(clock):
    world = busy_world(clock, active=100, repositories=5, platform="gitlab", build_seconds=600)
    with GitLabServer(world, port=None) as server:
        clock.advance(300)
        seen = set()
        for place in world.places["gitlab"]:
            query = {"updated_after": iso(clock() - 60), "order_by": "updated_at", "per_page": 100}
            seen |= {item["id"] for item in told(get(server, f"{project(place)}/pipelines", **query))}
    changed = {
        build.run_id for build in world.builds
        if (moment := build.moment_at(clock())) and moment.at > clock() - 60
    }  # fmt: skip
    assert seen == changed
    assert len(seen) > 10


# Traces and artifacts ---------------------------------------------------------------------------


def failed_job(build):
    return next(one for one in build.moments[-1].jobs if one.status == "failed")


def trace(server, build, job, **query):
    return get(server, f"{project(build.repository)}/jobs/{job.id}/trace", **query)


def test_a_trace_grows_and_shows_sections_colours_and_a_secret(clock):
    world, build = one_build(clock, "gitlab", "failure")
    job = failed_job(build)
    with GitLabServer(world, port=None) as server:
        clock.at = job.started_at
        early = trace(server, build, job).body
        clock.at = build.ends_at
        whole = trace(server, build, job).body
        assert whole.startswith(early)
        assert len(whole) > len(early) > 0
        assert b"\r\x1b[0K" in whole
        assert b"section_end:" in whole
        assert b"section_end:" not in early
        assert LOGGED_SECRETS["gitlab"].encode() in whole
        skipped = next(one for one in build.moments[-1].jobs if one.started_at is None)
        assert trace(server, build, skipped).body == b""


def test_a_trace_can_be_read_in_parts_only_where_the_server_knows_how(clock):
    world, build = one_build(clock, "gitlab", "failure")
    clock.at = build.ends_at
    with GitLabServer(world, port=None) as server:
        whole = trace(server, build, failed_job(build)).body
        assert trace(server, build, failed_job(build), byte_offset=10, byte_limit=5).body == whole
        server.files.ranges = True
        assert trace(server, build, failed_job(build), byte_offset=10, byte_limit=5).body == whole[10:15]


def test_a_trace_may_lie_in_an_object_storage_that_must_not_see_the_token(clock):
    world, build = one_build(clock, "gitlab", "failure")
    clock.at = build.ends_at
    with GitLabServer(world) as server:
        server.files.redirect = True
        url = f"{server.url}{project(build.repository)}/jobs/{failed_job(build).id}/trace"
        redirect = requests.get(url, headers=TOKEN, allow_redirects=False, timeout=60)
        assert redirect.status_code == 302
        assert "AssertionError" in requests.get(redirect.headers["Location"], timeout=60).text
        assert server.files.leaks == 0
        assert requests.get(url, headers=TOKEN, timeout=60).status_code == 200
        assert server.files.leaks == 1, "a client that keeps its headers over the redirect"
        clock.advance(601)
        assert requests.get(redirect.headers["Location"], timeout=60).status_code == 403


def test_artifacts_are_a_zip_until_they_expire_or_are_erased(clock):
    world, build = one_build(clock, "gitlab", "failure")
    clock.at = build.ends_at
    compiled, unit = build.moments[-1].jobs[:2]
    with GitLabServer(world, port=None) as server:
        url = f"{project(build.repository)}/jobs/{compiled.id}"
        job = told(get(server, url))
        assert job["artifacts"][0]["file_type"] == "archive"
        assert (
            job["artifacts_expire_at"]
            == server.files.job(build, build.moments[-1], compiled)["artifacts_expire_at"]
        )
        content = get(server, f"{url}/artifacts").body
        assert len(content) == job["artifacts_file"]["size"]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.read("compile/app.txt") == get(server, f"{url}/artifacts/compile/app.txt").body
        assert get(server, f"{url}/artifacts/nothing").status == 404
        server.files.erase(unit.id)
        erased = told(get(server, f"{project(build.repository)}/jobs/{unit.id}"))
        assert (erased["erased_at"] is not None, erased["artifacts"]) == (True, [])
        assert trace(server, build, unit).status == 404
        clock.advance(30 * 86_400)
        assert get(server, f"{url}/artifacts").status == 404
        assert "artifacts_file" not in told(get(server, url))


# Webhooks ---------------------------------------------------------------------------------------


@pytest.fixture
def inbox():
    box = Inbox("/webhooks/gitlab", 200)
    yield box
    box.server.close()


def hook_body(url, **more):
    return {"url": url, "pipeline_events": True, "signing_token": SIGNING_TOKEN} | more


def test_a_hook_is_made_changed_and_deleted_and_never_shows_its_tokens(clock):
    hooks = f"{project(PLACE)}/hooks"
    with GitLabServer(world_of(clock, "gitlab", builds=0), port=None) as server:
        made = told(send(server, "POST", hooks, hook_body("https://relay.example/webhooks/gitlab")))
        assert (made["pipeline_events"], made["job_events"], made["push_events"]) == (True, False, True)
        assert (made["signing_token_present"], made["token_present"]) == (True, False)
        assert not {"token", "signing_token"} & set(made)
        assert (made["alert_status"], made["disabled_until"]) == ("executable", None)
        assert told(get(server, hooks)) == [made]
        url = f"{hooks}/{made['id']}"
        changed = told(send(server, "PUT", url, {"url": made["url"], "job_events": True, "token": "t"}))
        assert (changed["job_events"], changed["pipeline_events"], changed["token_present"]) == (True,) * 3
        assert send(server, "PUT", url, {"job_events": True}).status == 400, "the url is required"
        assert send(server, "POST", hooks, {"url": "relay"}).status == 422
        assert send(server, "POST", hooks, hook_body("https://a.example", signing_token="x")).status == 422
        server.access_level = 30
        assert get(server, hooks).status == 403
        server.access_level = 40
        assert send(server, "DELETE", url).status == 204
        assert get(server, url).status == 404


def pushing(clock, inbox, builds=8, **body):
    """A server and a sender that pushes to one registered hook."""
    world = world_of(clock, "gitlab", "success", builds=builds)
    server = GitLabServer(world, port=None)
    sender = Sender(world, "http://127.0.0.1:9", SECRETS, hooks={"gitlab": server.hooks})
    server.hooks.sendings = sender
    place = next(place for place in REPOSITORIES["gitlab"] if world.of(place))
    hook = told(send(server, "POST", f"{project(place)}/hooks", hook_body(inbox.url, **body)))
    return world, server, sender, f"{project(place)}/hooks/{hook['id']}"


def test_a_test_sends_the_newest_real_pipeline_signed(clock, inbox):
    world, server, sender, url = pushing(clock, inbox)
    clock.at = world.ends_at
    assert send(server, "POST", f"{url}/test/pipeline_events").status == 201
    request = inbox.requests[0]
    expected = sign_v1(
        SIGNING_TOKEN, request.headers["webhook-id"], int(request.headers["webhook-timestamp"]), request.body
    )
    assert request.headers["webhook-signature"] == expected
    assert json.loads(request.body)["object_attributes"]["id"] in {build.run_id for build in world.builds}
    inbox.status = 401
    assert send(server, "POST", f"{url}/test/pipeline_events").status == 422
    sender.close()


def test_a_hook_that_fails_four_times_is_silent_for_a_minute_then_for_two(clock, inbox):
    world, server, sender, url = pushing(clock, inbox, builds=30)
    server.hooks.auto_disable, inbox.status = True, 401
    clock.at = world.start_at + 15
    sender.send_due()
    assert len(inbox.requests) == 4
    hook = told(get(server, url))
    assert hook["alert_status"] == "temporarily_disabled"
    assert hook["disabled_until"] == "2026-11-18T11:07:55.250Z"
    assert sender.report()["unsent"] > 0
    clock.advance(60)
    assert told(get(server, url))["alert_status"] == "executable"
    sender.send_due()
    assert len(inbox.requests) == 5, "one more try, and it is silent for two minutes"
    clock.advance(119)
    assert told(get(server, url))["alert_status"] == "temporarily_disabled"
    inbox.status = 200
    assert send(server, "POST", f"{url}/test/pipeline_events").status == 201
    assert told(get(server, url))["alert_status"] == "executable"
    sender.close()


def test_forty_failures_disable_a_hook_until_a_test_succeeds(clock, inbox):
    world, server, sender, url = pushing(clock, inbox)
    server.hooks.auto_disable, inbox.status = True, 500
    clock.at = world.ends_at
    for _ in range(40):
        send(server, "POST", f"{url}/test/pipeline_events")
    clock.advance(10 * 86_400)
    assert told(get(server, url))["alert_status"] == "disabled"
    inbox.status = 204
    send(server, "POST", f"{url}/test/pipeline_events")
    assert told(get(server, url))["alert_status"] == "executable"
    sender.close()


def test_events_are_listed_by_status_and_sent_again_under_the_same_key_five_times_a_minute(clock, inbox):
    world, server, sender, url = pushing(clock, inbox)
    inbox.status = 503
    clock.at = world.ends_at
    sender.send_due()
    listed, page = [], f"{url}/events?per_page=3&status=server_failure"
    while page:
        answer = get(server, page)
        listed += told(answer)
        page = next_page(answer)
    assert len(listed) == len(inbox.requests) > 3
    assert told(get(server, f"{url}/events", status="successful")) == []
    newest = listed[0]
    assert (newest["response_status"], newest["trigger"]) == ("503", "pipeline_hooks")
    assert newest["request_data"] == json.loads(inbox.requests[-1].body)
    inbox.status = 200
    answers = [send(server, "POST", f"{url}/events/{newest['id']}/resend") for _ in range(6)]
    assert Counter(answer.status for answer in answers) == {201: 5, 429: 1}
    assert told(answers[0]) == {"response_status": 200}
    keys = {request.headers["idempotency-key"] for request in inbox.requests[-5:]}
    assert keys == {newest["request_headers"]["Idempotency-Key"]}
    clock.advance(7 * 86_400)
    assert told(get(server, f"{url}/events", status="server_failure")) == []
    sender.close()
