"""Every request that `platforms/github.py` makes, held against GitHub's own OpenAPI description.

Prism, a mock server, refuses what the description does not allow, and answers with its examples, which
our parsers must be able to read.  Functions are found by what they return, and called by the names of
their parameters: a new one is checked without a word here, unless it takes something new.
"""

import inspect
import json
import re
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests import node
from webhook_app import outbound, platforms
from webhook_app.lifecycle import Observation, ObservedBy, State
from webhook_app.platforms import Answer, Call, PollError, PollFault, PollTarget, Request, Source, github
from webhook_app.simulated import httpd
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.github_access import App
from webhook_app.simulated.world import StepClock, World
from webhook_app.supervisor import tied_to_parent
from webhook_app.times import utc_now

SOURCES = Path(__file__).parent / "openapi"
DESCRIPTION = "node_modules/@octokit/openapi/generated/api.github.com.json"
REPOSITORY, RUN, JOB = "octo-org/octo-repo", 30433642, 399444496
SOURCE = Source("github", "github", "https://api.github.com", "a-token")
NOTHING_TO_ASK = {"follow_up", "log_tail"}
"""They return a request on other platforms only."""

IMPOSSIBLE = {("installations_request", "account")}
"""In this list the account has to be a user and an enterprise at once, which GitHub's own example is not."""

ERRORS = {
    401: PollFault.UNAUTHORIZED, 403: PollFault.FORBIDDEN, 404: PollFault.NOT_FOUND, 410: PollFault.NOT_FOUND,
    451: PollFault.FORBIDDEN, 500: PollFault.UNAVAILABLE, 503: PollFault.UNAVAILABLE,
}  # fmt: skip


def requests_of(value):
    """The requests in what a function returned."""
    if isinstance(value, Call):
        return [value]
    if isinstance(value, Request):
        return [Call("GET", value.url, value.headers)]
    if isinstance(value, tuple):
        return [found for one in value for found in requests_of(one)]
    inner = getattr(value, "request", None)
    return requests_of(inner) if inner is not None else []


def makers():
    """Public functions of the module that return requests, by name."""
    return {
        name: function
        for name, function in inspect.getmembers(github, inspect.isfunction)
        if function.__module__ == github.__name__
        and not name.startswith("_")
        and re.search(r"\b(Request|Call|LogFile)\b", str(inspect.signature(function).return_annotation))
    }


PAGE = Answer(
    200,
    {
        "link": f'<{SOURCE.api_url}/repos/{REPOSITORY}/hooks/1/deliveries?per_page=100&cursor=v1_1>; rel="next"'
    },
    b"[]",
)


def arguments(**more):
    """What functions of the module are called with, by the names of their parameters."""
    key = f"github:{RUN}"
    build_id = f"github:octo-org:octo-repo:{RUN}"
    seen = Observation(
        source="github", platform="github", observed_by=ObservedBy.POLL, key=key, build_id=build_id, attempt=1,
        state=State.IN_PROGRESS,
    )  # fmt: skip
    job = ended_job()
    return {
        "source": SOURCE, "repository": REPOSITORY, "repositories": (REPOSITORY,), "since": utc_now(), "most": 30,
        "target": PollTarget(build_id, key, REPOSITORY, 562, 1, None), "seen": seen, "now": utc_now(),
        "proof": "a.jwt.proof", "installation_id": "1", "job": job, "jobs": (job,), "everything": False, "ref": "11",
        "file": None, "headers": {}, "after": 0, "most_bytes": 1000, "hook_id": "12345678",
        "delivery_id": "12345678", "url": "https://relay.example.com/webhooks/github", "secret": "s", "answer": PAGE,
        **more,
    }  # fmt: skip


def ended_job(job_id=JOB):
    """A job as the functions about logs take it."""
    kind = getattr(platforms, "EndedJob", None)
    return kind(id=job_id, name="build", failed=True, ran=True) if kind else None


def call(function, **more):
    known = arguments(**more)
    return function(**{name: known[name] for name in inspect.signature(function).parameters})


def unknown(function):
    """Parameters that this test has nothing for."""
    return set(inspect.signature(function).parameters) - arguments().keys()


def made(**more):
    """(name, request) of everything that can be asked, each way of asking it."""
    found = {name: requests_of(call(one, **more)) for name, one in makers().items() if not unknown(one)}
    if "log_files" in found:
        found["log_files"] += requests_of(call(github.log_files, **{**more, "everything": True}))
    return [(name, request) for name, requests in sorted(found.items()) for request in requests]


MADE = made()
NAMED = [pytest.param(name, request, id=f"{name} {urlsplit(request.url).path}") for name, request in MADE]


# ---- the description, and Prism in front of it -----------------------------------------------


@dataclass(frozen=True)
class Description:
    """GitHub's description, less the paths nobody asks for."""

    paths: dict
    components: dict

    def resolve(self, thing):
        while "$ref" in thing:
            kind, name = thing["$ref"].removeprefix("#/components/").split("/")
            thing = self.components[kind][name]
        return thing

    def cut(self, paths):
        """A document of these paths and of what they mention."""
        components, left = {}, [paths]
        while left:
            for kind, name in set(re.findall(r'"#/components/(\w+)/([^"]+)"', json.dumps(left.pop()))):
                if name not in components.setdefault(kind, {}):
                    components[kind][name] = self.components[kind][name]
                    left.append(components[kind][name])
        info = {"title": "GitHub", "version": "1"}
        return {"openapi": "3.0.3", "info": info, "paths": paths, "components": components}

    def place(self, request):
        """(path, what can be done there) of a request; where two paths fit, that with fewer variables."""
        path = urlsplit(request.url).path
        fitting = [one for one in self.paths if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", one), path)]
        assert fitting, f"GitHub knows no {path}"
        template = min(fitting, key=lambda one: one.count("{"))
        return template, self.paths[template]

    def operation(self, request):
        template, item = self.place(request)
        assert request.method.lower() in item, f"GitHub knows no {request.method} {template}"
        return item, item[request.method.lower()]

    def query_names(self, request):
        item, operation = self.operation(request)
        parameters = map(self.resolve, item.get("parameters", []) + operation.get("parameters", []))
        return {one["name"] for one in parameters if one["in"] == "query"}

    def statuses(self, request):
        return {int(code) for code in self.operation(request)[1]["responses"]}


@pytest.fixture(scope="session")
def packages(pytestconfig):
    """Where Prism and the description are; the package's eleven other descriptions are 400 MB."""
    directory = node.install(SOURCES, pytestconfig)
    for path in (directory / DESCRIPTION).parent.glob("*.json"):
        if path.name != Path(DESCRIPTION).name:
            path.unlink()
    return directory


@pytest.fixture(scope="session")
def description(packages):
    whole = json.loads((packages / DESCRIPTION).read_text())
    return Description(whole["paths"], whole["components"])


@pytest.fixture(scope="session")
def start(packages, description, tmp_path_factory, wait_until):
    """`start("mock")`, `start("proxy", url)`: a Prism that knows the operations we use; gives its URL."""
    path = tmp_path_factory.mktemp("openapi") / "used.json"
    path.write_text(json.dumps(description.cut(dict(description.place(request) for _, request in MADE))))
    with ExitStack() as stack:

        def begin(mode, *upstream):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            binary = packages / "node_modules/.bin/prism"
            command = [binary, mode, "--host", "127.0.0.1", "--port", str(port), path, *upstream]
            log = path.with_name(f"{mode}.log")
            out = stack.enter_context(log.open("w"))
            process = stack.enter_context(
                subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=tied_to_parent())
            )
            stack.callback(process.terminate)
            wait_until(lambda: "Prism is listening" in log.read_text() or process.poll() is not None, 60)
            assert process.poll() is None, log.read_text()
            return f"http://127.0.0.1:{port}"

        yield begin


@pytest.fixture(scope="session")
def prism(start):
    return start("mock")


def sent(base, request, **headers):
    """The answer to a request that goes to `base` in place of GitHub."""
    place = urlsplit(request.url)
    url = f"{base}{place.path}?{place.query}" if place.query else f"{base}{place.path}"
    reply = outbound.send(
        request.method,
        url,
        request.headers | headers,
        request.body,
        timeout_seconds=30,
        byte_cap=2**24,
        guard=False,
    )
    return Answer(reply.status, reply.headers, reply.body)


@pytest.fixture
def ask(prism):
    """`ask(request, prefer)`: send it to Prism in place of GitHub.

    With GitHub's own media type, which its description leaves out, Prism finds no answer to give.
    """

    def send(request, prefer=None):
        assert request.headers["Accept"] == "application/vnd.github+json"
        return sent(prism, request, Accept="application/json", **({"Prefer": prefer} if prefer else {}))

    return send


def violations(name, answer):
    """What Prism found wrong, less the one thing that the description has wrong."""
    found = json.loads(answer.headers.get("sl-violations", "[]"))
    return [one for one in found if (name, one["location"][-1]) not in IMPOSSIBLE]


# ---- the checks ------------------------------------------------------------------------------


def test_the_requests_are_all_found():
    assert {name: unknown(one) for name, one in makers().items() if unknown(one)} == {}, (
        "say above what they take"
    )
    assert {"poll_request", "list_request", "installation_token_request"} <= {name for name, _ in MADE}
    assert makers().keys() - {name for name, _ in MADE} <= NOTHING_TO_ASK


def test_prism_refuses_what_the_description_does_not_allow(ask):
    """What would make every other check here pass in vain."""
    run = next(request for name, request in MADE if name == "poll_request")
    runs = next(request for name, request in MADE if name == "list_request")
    assert ask(replace(run, url=run.url + "x")).status == 422
    assert ask(replace(runs, url=runs.url + "&page=first")).status == 422
    assert ask(replace(run, url=run.url + "/elsewhere")).status == 404
    assert ask(replace(run, method="POST")).status == 405
    token = next(request for name, request in MADE if name == "installation_token_request")
    body = replace(
        token, body=b'{"repositories": "all"}', headers=token.headers | {"Content-Type": "application/json"}
    )
    assert ask(body).status == 422


@pytest.mark.parametrize(("name", "request_made"), NAMED)
def test_each_request_is_one_that_github_describes(ask, description, name, request_made):
    asked = {key for key, _ in parse_qsl(urlsplit(request_made.url).query)}
    assert asked <= description.query_names(request_made)
    answer = ask(request_made)
    good = {status for status in description.statuses(request_made) if status < 400}
    assert answer.status in good, answer.body[:500]
    assert [one for one in violations(name, answer) if one["location"][0] == "request"] == []


def fault_of(parse, answer):
    try:
        call(parse, answer=answer)
    except PollError as error:
        return error.fault
    return None


PARSERS = {
    "create_hook": "parse_hook", "update_hook": "parse_hook", "list_hooks": "parse_hooks",
    "list_deliveries": "parse_deliveries", "next_deliveries": "parse_deliveries", "token_call": "parse_token",
}  # fmt: skip


def parsers():
    """(name, request, parser) of each request whose answer is read."""
    named = [
        (name, request, PARSERS.get(name, f"parse_{name.removesuffix('_request')}")) for name, request in MADE
    ]
    found = [(name, request, getattr(github, parser, None)) for name, request, parser in named]
    return [pytest.param(*one, id=one[0]) for one in found if one[2] is not None]


READ = {
    "poll_request": (
        lambda seen: (seen.key, seen.build_id, seen.state, seen.attempt, seen.branch, seen.number, seen.workflow),
        ("github:30433642", "github:octocat:Hello-World:30433642", State.QUEUED, 1, "octo-org:main", 562, "Build"),
    ),
    "list_request": (
        lambda listed: [seen.key for seen in getattr(listed, "observations", listed)], ["github:30433642"],
    ),
    "repository_request": (lambda nothing: nothing, None),
    "installation_request": (lambda found: found, "1"),
    "installations_request": (lambda found: found, ("1",)),
    "installation_token_request": (lambda grant: (grant.access_token[:4], bool(grant.refresh_token)), ("ghs_", False)),
    "annotations_request": (lambda failures: failures, ()),  # the example is a warning
    "artifacts_request": (lambda found: [one.name for one in found], ["Rails", "Test output"]),
}  # fmt: skip
"""What is looked at of what was read, and what it is."""


@pytest.mark.parametrize(("name", "request_made", "parse"), parsers())
def test_each_example_answer_is_read(ask, name, request_made, parse):
    read = call(parse, answer=ask(request_made))
    look, expected = READ.get(name, (bool, True))
    assert look(read) == expected


@pytest.mark.parametrize(("name", "request_made", "parse"), parsers())
def test_each_described_error_is_read_as_what_it_is(ask, description, name, request_made, parse):
    for status in sorted(description.statuses(request_made) & ERRORS.keys()):
        answer = ask(request_made, f"code={status}")
        assert answer.status == status
        with pytest.raises(PollError) as caught:
            call(parse, answer=answer)
        assert caught.value.fault is ERRORS[status]


@pytest.mark.parametrize(("name", "request_made", "parse"), parsers())
def test_answers_of_every_described_shape_are_read_or_named_unreadable(ask, name, request_made, parse):
    """Made up at random within the description: nulls, empty lists, fields left out."""
    for _ in range(5):
        answer = ask(request_made, "dynamic=true")
        assert answer.status < 300, answer.body[:500]
        assert fault_of(parse, answer) in (None, PollFault.UNREADABLE)


# ---- the simulated GitHub --------------------------------------------------------------------


GONE = {"delete_hook", "redeliver", "next_deliveries"}
"""What these ask about is not there, or not for long."""


def artifact_of(server, build):
    """The id of what a build left."""
    path = f"/repos/{build.repository.full_name}/actions/runs/{build.run_id}/artifacts"
    headers = {"authorization": f"Bearer {server.tokens[0]}", "user-agent": "test"}
    listed = json.loads(server.answer(httpd.Request("GET", path, "", headers, b"")).body)
    return str(listed["artifacts"][0]["id"])


def hook_of(server, build):
    """The id of the webhook that every repository has there."""
    path = f"/repos/{build.repository.full_name}/hooks"
    headers = {"authorization": f"Bearer {server.tokens[0]}", "user-agent": "test"}
    return str(json.loads(server.answer(httpd.Request("GET", path, "", headers, b"")).body)[0]["id"])


@pytest.fixture(scope="session")
def simulated():
    """A simulated GitHub whose builds have ended, and what to ask it."""
    clock, app = StepClock(), App.create()
    world = World(7, 6, platforms=("github",), kinds={"github": ["failure", "success"]}, now=clock)
    clock.advance(world.ends_at - clock() + 60)
    with GitHubServer(world, app=app) as server:
        server.hook_url = "https://elsewhere.example.com/webhooks/github"
        build = next(one for one in world.builds if one.moments[-1].conclusion == "success")
        repository, now = build.repository.full_name, datetime.fromtimestamp(clock(), UTC)
        job = ended_job(build.moments[-1].jobs[0].id)
        yield server, {
            "source": replace(SOURCE, token=server.tokens[0]), "now": now, "repository": repository,
            "repositories": (repository,), "job": job, "jobs": (job,), "ref": artifact_of(server, build),
            "target": PollTarget(build.build_id, f"github:{build.run_id}", repository, build.number, 1, None),
            "proof": github.app_jwt(github.App(str(app.app_id), app.private_key), now),
            "installation_id": str(app.installation_id), "hook_id": hook_of(server, build),
        }  # fmt: skip


def test_the_simulated_github_answers_as_the_description_says(start, description, simulated):
    """Else tests against it would prove nothing about the real one.

    Prism would follow a redirect, with our token: those are asked for without it.
    """
    server, asked = simulated
    watched = start("proxy", server.url)
    for name, request in made(**asked):
        if name in GONE:
            continue
        good = {status for status in description.statuses(request) if status < 400}
        answer = sent(server.url if good == {302} else watched, request)
        assert answer.status in good, (name, request.url, answer.body[:300])
        assert violations(name, answer) == [], (name, request.url)


def test_prism_sees_what_does_not_fit_in_an_answer(start, simulated):
    server, asked = simulated
    watched = start("proxy", server.url)
    run = next(request for name, request in made(**asked) if name == "poll_request")
    server.inject(httpd.json_response({"id": "one"}))
    assert "must be integer" in sent(watched, run).headers["sl-violations"]
    server.clear_faults()


def test_the_proof_of_an_app_is_a_header_like_any_token(ask):
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    proof = github.app_jwt(github.App("42", key.decode()), utc_now())
    assert ask(github.installations_request(SOURCE, proof)).status == 200


def test_the_lock_names_no_registry():
    node.check_lock(SOURCES, "@octokit/openapi", "@stoplight/prism-cli")
