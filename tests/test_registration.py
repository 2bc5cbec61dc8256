"""`buildrelay sources`: our webhooks are registered at the platforms, over their APIs, as a person would see it."""

import pytest

from tests.test_cli import box  # noqa: F401  a fixture
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.github_access import App
from webhook_app.simulated.gitlab import GitLabServer
from webhook_app.simulated.httpd import Response
from webhook_app.simulated.world import StepClock, World

URL = "http://127.0.0.1:9/relay"
"""Nobody listens there; the ping that GitHub sends goes nowhere."""
SIGNING = "whsec_dGVzdHRlc3R0ZXN0dGVzdHRlc3R0ZXN0dGVzdHRlc3Q="
GITHUB, GITLAB = "Octo-Demo/payments-api", "4101"


@pytest.fixture
def platforms(monkeypatch):
    world = World(7, 0, now=StepClock())
    with GitHubServer(world) as github, GitLabServer(world) as gitlab:
        for name, value in {
            "GITHUB_API_URL": github.url, "GITHUB_TOKEN": github.tokens[0], "GITHUB_WEBHOOK_SECRET": "hush-hush-hush-hush",
            "GITLAB_URL": gitlab.url, "GITLAB_TOKEN": gitlab.tokens[0], "GITLAB_WEBHOOK_SECRET": SIGNING,
            "PUBLIC_URL": URL,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield {"github": github, "gitlab": gitlab}


def hooks(server):
    return server.hooks.hooks


def test_github_hooks_are_registered_once_with_what_we_need(box, platforms):  # noqa: F811
    (line,) = box("sources", "connect", "github", GITHUB)
    (hook,) = hooks(platforms["github"])
    assert line == f"{GITHUB}: created (webhook {hook.id})"
    assert hook.config == {
        "url": f"{URL}/webhooks/github", "content_type": "json", "insecure_ssl": "0", "secret": "hush-hush-hush-hush",
    }  # fmt: skip
    assert (set(hook.events), hook.active) == ({"workflow_run", "workflow_job"}, True)
    hook.events, hook.active, hook.config["secret"] = ("push",), False, "another"
    (line,) = box("sources", "connect", "github", GITHUB)
    assert line == f"{GITHUB}: updated (webhook {hook.id})"
    (hook,) = hooks(platforms["github"])
    assert (set(hook.events), hook.active) == ({"workflow_run", "workflow_job"}, True)
    assert hook.config["secret"] == "hush-hush-hush-hush"


def test_gitlab_hooks_get_a_signing_token_or_a_plain_one(box, platforms, monkeypatch):  # noqa: F811
    box("sources", "connect", "gitlab", GITLAB)
    (hook,) = hooks(platforms["gitlab"])
    assert (hook.url, hook.signing_token, hook.token) == (f"{URL}/webhooks/gitlab", SIGNING, "")
    assert {name for name, on in hook.switches.items() if on} == {"pipeline_events", "job_events"}
    monkeypatch.setenv("GITLAB_WEBHOOK_SECRET", "a plain token of a hook")
    assert box("sources", "connect", "gitlab", GITLAB) == [f"{GITLAB}: updated (webhook {hook.id})"]
    assert [one.token for one in hooks(platforms["gitlab"])] == ["a plain token of a hook"]


def test_a_lent_token_registers_as_well(box, platforms, monkeypatch):  # noqa: F811
    app, server = App.create(), platforms["github"]
    server.app = server.access.app = app
    monkeypatch.setenv("GITHUB_TOKEN", "")
    monkeypatch.setenv("GITHUB_APP_ID", "4711")
    monkeypatch.setenv("GITHUB_APP_PRIVATE_KEY", app.private_key)
    (line,) = box("sources", "connect", "github", GITHUB)
    assert line.startswith(f"{GITHUB}: created")
    monkeypatch.setenv("GITHUB_APP_INSTALLATION_ID", "8")
    assert box("sources", "connect", "github", GITHUB, code=1) == "buildrelay: github: HTTP 404: Not Found"


@pytest.mark.parametrize(("source", "repository"), [("github", GITHUB), ("gitlab", GITLAB)])
def test_a_dry_run_changes_nothing(box, platforms, source, repository):  # noqa: F811
    assert box("sources", "connect", source, repository, "--dry-run") == [f"{repository}: would be created"]
    assert hooks(platforms[source]) == []
    box("sources", "connect", source, repository)
    (line,) = box("sources", "disconnect", source, repository, "--dry-run")
    assert "would be removed" in line
    assert len(hooks(platforms[source])) == 1


@pytest.mark.parametrize(("source", "repository"), [("github", GITHUB), ("gitlab", GITLAB)])
def test_a_hook_with_another_address_is_left_alone(box, platforms, source, repository):  # noqa: F811
    box("sources", "connect", source, repository, "--url", "http://127.0.0.1:9/other/")
    box("sources", "connect", source, repository)
    assert len(hooks(platforms[source])) == 2
    (line,) = box("sources", "disconnect", source, repository)
    assert "removed" in line
    assert box("sources", "disconnect", source, repository) == [f"{repository}: absent"]
    assert len(hooks(platforms[source])) == 1


@pytest.mark.parametrize(("source", "repository"), [("github", GITHUB), ("gitlab", GITLAB)])
def test_a_missing_permission_is_said_in_plain_words(box, platforms, source, repository):  # noqa: F811
    platforms["github"].permissions["repository_hooks"] = "read"
    platforms["gitlab"].access_level = 30
    said = box("sources", "connect", source, repository, code=1)
    assert "the token needs: " in said
    assert hooks(platforms[source]) == []


def test_what_can_not_be_is_refused(box, platforms, monkeypatch):  # noqa: F811
    assert "there is no source svn" in box("sources", "connect", "svn", "a/b", code=2)
    assert "names no repository" in box("sources", "connect", "github", "../admin", code=1)
    assert "HTTP 404" in box("sources", "connect", "github", "octo/none", code=1)
    platforms["github"].inject(Response(401, b"{}"), path_contains="/hooks")
    assert "HTTP 401" in box("sources", "connect", "github", GITHUB, code=1)
    monkeypatch.delenv("GITHUB_WEBHOOK_SECRET")
    assert "no webhook secret" in box("sources", "connect", "github", GITHUB, code=1)
    monkeypatch.delenv("PUBLIC_URL")
    assert "PUBLIC_URL is needed" in box("sources", "connect", "github", GITHUB, code=2)


def test_one_repository_that_fails_does_not_keep_the_others(box, platforms, capsys):  # noqa: F811
    box("sources", "connect", "github", "octo/none", GITHUB, code=1)
    assert len(hooks(platforms["github"])) == 1


def test_a_server_that_keeps_no_signing_token_gets_no_hook(box, platforms):  # noqa: F811
    """GitLab before 19.0 ignores the parameter: its pushes would be refused until it mutes the hook."""
    old = b'{"id": 7, "url": "u", "pipeline_events": true, "job_events": true, "token_present": false}'
    server = platforms["gitlab"]
    server.inject(Response(200, b"[]", {"Content-Type": "application/json"}), times=1, path_contains="/hooks")
    server.inject(Response(201, old), times=1, path_contains="/hooks")
    said = box("sources", "connect", "gitlab", GITLAB, code=1)
    assert "GitLab 19.0 or newer" in said
    assert server.count("/hooks/7") == 1, "it is removed again"


def test_the_secret_is_never_printed(box, platforms):  # noqa: F811
    for words in (["list"], ["connect", "github", GITHUB], ["connect", "gitlab", GITLAB]):
        said = "\n".join(box("sources", *words))
        assert "hush-hush-hush-hush" not in said
        assert SIGNING not in said
    (jenkins,) = {"\n".join(box("sources", "connect", "jenkins", "team/web"))}
    assert f"{URL}/webhooks/jenkins" in jenkins


def test_sources_are_listed(box, platforms, monkeypatch):  # noqa: F811
    monkeypatch.setenv("GITHUB_REPOS", GITHUB)
    lines = box("sources", "list")
    assert lines[0].split() == ["github", "github", "secret,", "token", "0", "pushes,", "0", "missed"]
    assert lines[1].strip() == GITHUB
