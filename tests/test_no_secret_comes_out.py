"""Two hundred forms of secrets through every entrance: none comes out at any exit.

Each entrance has secrets of its own, so that one which is seen says where it came in.
"""

import hashlib
import hmac
import io
import json
import logging
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from jobs import collect as collect_job
from jobs import deliver as deliver_job
from tests.caller import ADMIN, KEY, SECRET
from tests.leaks import Leak, leaks
from tests.stand import ON_SQLITE, stands
from webhook_app import cli, db, loglines, models, settings
from webhook_app.lifecycle import Conclusion, State
from webhook_app.redaction import SHAPES
from webhook_app.simulated.httpd import Request, Response, Server, json_response

SAMPLES = Path(__file__).parent / "samples"
FORMATS = ("standard", "cloudevents", "slack", "teams", "provider")
OWN_HEADER = "a-custom-header-of-this-subscriber"


def alone(seed: str) -> list[Leak]:
    """The forms that are secrets by themselves, whatever stands around them: those that a name may hold."""
    found = [leak for leak in leaks(seed) if leak.secret not in SHAPES.name(leak.text)]
    assert len(found) > 140
    return found


@dataclass
class Scene:
    """An application, its jobs, simulated platforms and a receiver, on one store."""

    api: Any
    stand: Any
    receiver: "Receiver"
    log: io.StringIO
    answers: list[str] = field(default_factory=list)
    """What pushes, reports and requests were answered."""

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        more = {"Content-Type": "application/json"} | headers
        self.answers.append(self.api.client.post(path, data=body, headers=more).text)

    def report(self, **fields: Any) -> None:
        body = json.dumps({"runId": "run-1", "event": "stage_started"} | fields).encode()
        self.post("/api/internal/build-events", body, {"X-Build-Token": "script-token-of-the-tests"})


class Receiver:
    """An endpoint that keeps what it gets and answers with secrets, its own headers and a redirect in turn."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.texts = [leak.text for leak in leaks("answers")]
        self.places = [
            word for leak in alone("redirects") for word in leak.text.split() if SHAPES.name(word) != word
        ]

    def __call__(self, request: Request) -> Response:
        self.got.append(request.body.decode() + json.dumps({**request.headers, "x-own": ""}))
        number = len(self.got)
        if number % 4 == 0:
            place = self.places.pop() if self.places else "x"
            return Response(302, b"moved", {"Location": f"/{place}"})
        told, self.texts = self.texts[:40], [*self.texts[40:], *self.texts[:40]]
        return Response(500, "\n".join([*told, f"your header: {request.headers.get('x-own')}"]).encode())


# ---- entrances -------------------------------------------------------------------------------


def reports(scene: Scene) -> None:
    """Free texts of build scripts, in known fields and in others, at any depth."""
    for texts in together(leaks("reports"), 5):
        scene.report(
            command=texts[0], message="\n".join(texts), stage=texts[-1], host=texts[0], notes={"list": texts},
            data={"inner": {"deep": texts}}, env=texts[0],
        )  # fmt: skip


def errors_of_reports(scene: Scene) -> None:
    for at, texts in enumerate(together(leaks("errors"), 4)):
        told = "\n".join(texts)
        scene.report(runId=f"failed-{at}", event="build_failed", stage="Build", message=told, error=told)


def fields_of_reports(scene: Scene) -> None:
    found = [leak.secret for leak in leaks("fields")]
    for at in range(0, len(found), 10):
        some = found[at : at + 10]
        scene.report(
            data={"password": some, "settings": {"apiKey": some, "db": [{"token": one} for one in some]}}
        )


def names_of_reports(scene: Scene) -> None:
    """What is compared or looked up: run ids, ids of events, branches, commits, addresses, names of fields."""
    for at, leak in enumerate(alone("names")):
        line, url = leak.text.replace("\n", " "), f"https://ci.example/?token={leak.secret}"
        scene.report(
            runId=line[:250] if at % 3 else "named", event="build_started", branch=line, commit=line, name=line,
            repo=line, url=url, previewUrl=f"https://me:{leak.secret}@preview.example/", eventId=line,
        )  # fmt: skip
        scene.report(runId="named", timestamp="never", **{line[:200]: 1, "durationMs": line})
        scene.report(runId="named", event=leak.text)


def together(found: list[Leak], count: int) -> list[list[str]]:
    """The texts of these forms, so many at a time."""
    return [[leak.text for leak in found[at : at + count]] for at in range(0, len(found), count)]


def sample(platform: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    folder = SAMPLES / platform / name
    return json.loads((folder / "body.json").read_text()), json.loads((folder / "headers.json").read_text())


def github(scene: Scene) -> None:
    for at, leak in enumerate(alone("github")):
        for kind in ("run_in_progress", "job_in_progress"):
            body, headers = sample("github", kind)
            run = body.get("workflow_run") or body["workflow_job"]
            run |= {
                "id": 5000 + at,
                "run_id": 5000 + at,
                "name": leak.text,
                "head_branch": leak.text,
                "display_title": leak.text,
            }
            run |= {
                "workflow_name": leak.text,
                "html_url": f"https://github.com/o/w?token={leak.secret}",
                "event": leak.text,
            }
            sign_and_post(scene, body, headers | {"X-GitHub-Delivery": f"{kind}-{at}"})


def sign_and_post(scene: Scene, body: dict[str, Any], headers: dict[str, str]) -> None:
    raw = json.dumps(body).encode()
    digest = hmac.new(SECRET.encode(), raw, hashlib.sha256).hexdigest()
    shown = {name: value for name, value in headers.items() if name.lower() != "x-hub-signature-256"}
    scene.post("/webhooks/github", raw, shown | {"X-Hub-Signature-256": f"sha256={digest}"})


def gitlab(scene: Scene) -> None:
    for at, leak in enumerate(alone("gitlab")):
        body, headers = sample("gitlab", "pipeline_running")
        body["object_attributes"] |= {
            "id": 7000 + at,
            "name": leak.text,
            "ref": leak.text,
            "source": leak.text,
        }
        body["object_attributes"] |= {
            "url": f"https://me:{leak.secret}@gitlab.example/x",
            "detailed_status": leak.text,
        }
        body["commit"] = {
            "id": "7111be6be7f5ff0558607111aa00bb11cc22dd33",
            "title": leak.text,
            "message": leak.text,
        }
        body["builds"] = [{"id": at, "name": leak.text, "status": "running", "failure_reason": leak.text}]
        kept = {name: value for name, value in headers.items() if name.lower() == "x-gitlab-event"}
        event = {"X-Gitlab-Event-UUID": f"uuid-{at}", "X-Gitlab-Token": "gitlab-token-of-the-tests"}
        scene.post("/webhooks/gitlab", json.dumps(body).encode(), kept | event)


def jenkins(scene: Scene) -> None:
    for at, leak in enumerate(alone("jenkins")):
        body = {
            "name": "web", "display_name": leak.text, "url": "job/web/",
            "build": {
                "number": at + 1, "phase": "STARTED", "url": f"job/web/{at + 1}/", "log": leak.text,
                "full_url": f"https://me:{leak.secret}@jenkins.example.com/job/web/{at + 1}/",
                "scm": {"branch": leak.text, "commit": leak.text, "url": f"https://{leak.secret}@git.example/x"},
                "parameters": {"PASSWORD": leak.secret}, "notes": leak.text,
            },
        }  # fmt: skip
        scene.post(
            "/webhooks/jenkins", json.dumps(body).encode(), {"X-Build-Token": "jenkins-token-of-the-tests"}
        )


def polls(scene: Scene) -> None:
    """What the API of a platform answers: runs with such names, and errors."""
    stand = scene.stand
    server, told = stand.servers["github"], leaks("polls")
    names = iter(alone("polls") * 20)
    usual = server._answer

    def answer(request: Request) -> Response:
        reply = usual(request)
        with suppress(ValueError):
            return json_response(renamed(json.loads(reply.body), names), reply.status)
        return reply

    server._answer = answer
    begun = max(build.begins_at for build in stand.world.builds)
    stand.clock.at = begun + 10
    stand.push_all()
    for _ in range(3):
        stand.poll(61)
    for leak in told:
        server._answer = lambda _, leak=leak: json_response({"message": leak.text}, 500)
        stand.poll(600)
        server._answer = lambda _, leak=leak: json_response({"message": leak.text}, 403)
        stand.discover(600)
    server._answer = usual


def renamed(value: Any, names: Any) -> Any:
    """A JSON value with secrets in the place of all names and branches."""
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {name: renamed(inner, names) for name, inner in value.items()}
    texts = {"name", "head_branch", "display_title", "event"} if "run_number" in value else set()
    return kept | {name: next(names).text for name in texts & set(kept)}


def logs_and_artifacts(scene: Scene) -> None:
    """What an ended build leaves: its log, with the error in it, and names of its artifacts."""
    stand = scene.stand
    server, text = stand.servers["github"], "\n".join(f"error: {leak.text}" for leak in leaks("logs"))
    names = [leak.text for leak in alone("artifacts")]
    listed = [{"id": at, "name": name, "size_in_bytes": 1, "expired": False} for at, name in enumerate(names)]
    usual = server._answer

    def answer(request: Request) -> Response:
        if request.path.endswith("/logs"):
            return Response(200, text.encode(), {"Content-Type": "text/plain"})
        if request.path.endswith("/artifacts"):
            return json_response({"total_count": len(listed), "artifacts": listed})
        reply = usual(request)
        if request.path.endswith("/jobs"):
            content = json.loads(reply.body)
            for job in content["jobs"]:
                job |= {"name": names[0], "status": "completed", "conclusion": "failure"}
            return json_response(content)
        return reply

    server._answer = answer
    for build in stand.world.builds:
        stand.push(build, State.FAILED, conclusion=Conclusion.FAILURE, attempt=1, platform_at=stand.now())
    for _ in range(4):
        stand.clock.advance(600)
        collect_job.collect(stand.held)
    server._answer = usual


def deliveries(scene: Scene) -> None:
    """The receiver answers with secrets."""
    deliver_job.deliver(scene.stand.held)


def requests(scene: Scene) -> None:
    """Whoever asks or reports in vain gets an answer and a line of the log."""
    for leak in alone("requests"):
        line = leak.text.replace("\n", " ").replace("\x1b", "")
        for path in (f"/webhooks/{line}", f"/api/builds/{line}"):
            scene.answers.append(scene.api.client.post(path, data=b"{}").text)
        query = {"state": line, "limit": line, line[:60]: "1"}
        got = scene.api.client.get(
            "/api/builds", query_string=query, headers={"Authorization": f"Bearer {ADMIN}"}
        )
        scene.answers.append(got.text)
        logging.getLogger("webhook_app.somewhere").warning("it failed: %s", leak.text)
        try:
            raise RuntimeError(leak.text)
        except RuntimeError:
            logging.getLogger("jobs.somewhere").exception("a fault")


def settings_errors(scene: Scene) -> None:
    for leak in alone("settings"):
        for name in ("POLL_INTERVAL", "PUBLIC_URL", "LOG_LEVEL", "GITHUB_API_URL", "BUILDRELAY_CONFIG"):
            try:
                settings.load({name: leak.text})
            except settings.SettingsError as error:
                scene.answers.append(str(error))


ENTRANCES = {
    "reports": reports, "errors": errors_of_reports, "fields": fields_of_reports, "names": names_of_reports,
    "github": github, "gitlab": gitlab, "jenkins": jenkins, "polls": polls, "logs": logs_and_artifacts,
    "artifacts": None, "answers": deliveries, "redirects": None, "requests": requests, "settings": settings_errors,
}  # fmt: skip
"""By the seed of their secrets; None: filled by the one before."""


# ---- exits -----------------------------------------------------------------------------------


def all_of(api: Any, path: str) -> list[dict[str, Any]]:
    items, cursor = [], None
    while True:
        page = api("GET", path, query_string={"limit": 100} | ({"cursor": cursor} if cursor else {}))
        items += page["items"]
        if not page["items"] or (cursor := page["next_cursor"]) is None:
            return items


def stored(engine: Any) -> str:
    """All that is in the store beside bodies that senders have signed."""
    found = []
    with db.reading(engine) as connection:
        for table in models.metadata.sorted_tables:
            rows = [dict(row) for row in connection.execute(select(table)).mappings()]
            found += [
                {name: value for name, value in row.items() if name not in ("body", "log")} for row in rows
            ]
    return json.dumps(found, default=str, ensure_ascii=False)


def exits(scene: Scene, capsys: Any, monkeypatch: Any) -> dict[str, str]:
    api, shown = scene.api, {}
    lists = (
        "builds",
        "events",
        "inbound",
        "notifications",
        "sources",
        "subscribers",
        "deliveries",
        "polling",
    )
    items = {name: all_of(api, f"/api/{name}") for name in lists}
    shown |= {f"/api/{name}": items[name] for name in lists}
    ids = [build["build_id"] for build in items["builds"]]
    for tail in ("", "/events", "/status", "/logs", "/artifacts", "/attempts"):
        shown[f"/api/builds/ID{tail}"] = [
            api.client.get(f"/api/builds/{id_}{tail}", headers=bearer()).text
            for id_ in (ids[::10] if tail else ids)
        ]
    shown["public progress"] = [api.client.get(f"/api/builds/{id_}/status").text for id_ in ids[::10]]
    shown["/api/inbound/ID"] = [api("GET", f"/api/inbound/{row['id']}") for row in items["inbound"][::3]]
    tried = [
        row for one in items["subscribers"] for row in all_of(api, f"/api/subscribers/{one['id']}/deliveries")
    ]
    shown["/api/deliveries/ID"] = [api("GET", f"/api/deliveries/{row['id']}") for row in tried[::10]]
    shown["/api/admin/build-status"] = api("GET", "/api/admin/build-status?heartbeatTimeout=3600")
    shown["/metrics"] = api.client.get("/metrics").text
    shown["messages"] = scene.receiver.got
    shown["answers"] = scene.answers
    shown["log"] = scene.log.getvalue()
    shown["store"] = stored(api.engine)
    for name, value in {
        "DATABASE_URL": str(api.engine.url),
        "ENCRYPTION_KEYS": KEY,
        "ADMIN_TOKEN": ADMIN,
    }.items():
        monkeypatch.setenv(name, value)
    for command in (
        ["sources", "list"],
        ["subscribers", "list"],
        ["deliveries", "list"],
        *(["deliveries", "show", row["id"]] for row in tried[:20]),
    ):
        with pytest.raises(SystemExit):
            cli.main(command)
    shown["command line"] = capsys.readouterr()
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in shown.items()
    }


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {ADMIN}"}


# ---- the table -------------------------------------------------------------------------------


@pytest.fixture
def scene(engine, store_url, redis_client, make_api, monkeypatch):
    receiver, log = Receiver(), io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(loglines.Formatter("logfmt"))
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.INFO)
    root.addHandler(handler)
    with stands(engine, redis_client, monkeypatch) as make, Server(receiver) as server:
        stand = make(
            ("github",), 3, kinds={"github": ["failure"]}, ENCRYPTION_KEYS=KEY, ALLOW_PRIVATE_CALLBACKS="true",
            GITHUB_WEBHOOK_SECRET=SECRET, MAX_CONSECUTIVE_ERRORS="1000000",
        )  # fmt: skip
        api = make_api(store_url, ALLOW_PRIVATE_CALLBACKS="true", PUBLIC_PROGRESS="true")
        for format_ in FORMATS:
            wanted = {"url": server.url, "format": format_, "headers": {"X-Own": OWN_HEADER}}
            api("POST", "/api/subscribers", 201, json=wanted)
        yield Scene(api, stand, receiver, log)
    root.removeHandler(handler)


@ON_SQLITE
def test_nothing_that_is_secret_comes_out_wherever_it_came_in(scene, capsys, monkeypatch):
    for enter in filter(None, ENTRANCES.values()):
        enter(scene)
    shown = exits(scene, capsys, monkeypatch)
    words = {exit_: "\n".join(set(re.findall("[A-Za-z0-9]{12,}", text))) for exit_, text in shown.items()}
    secrets = {entrance: leaks(entrance) for entrance in ENTRANCES}
    seen = [
        f"from {entrance} to {exit_}: {[leak.name for leak in found if leak.secret in text]}"
        for entrance, found in secrets.items()
        for exit_, text in words.items()
        if any(leak.secret in text for leak in found)
    ]
    assert not seen, "\n".join(seen)
    assert not [exit_ for exit_, text in shown.items() if OWN_HEADER in text and exit_ != "messages"]
    for exit_ in shown.keys() - {
        "/metrics",
        "/api/sources",
        "/api/subscribers",
        "/api/polling",
        "/api/deliveries",
    }:
        assert "***" in shown[exit_], f"{exit_} showed nothing of what came in"
