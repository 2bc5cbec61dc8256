"""Histories of builds that went wrong in real use: what was pushed, in its order, and what must come out.

Those in `tests/histories/` go through the running program; the others are invented, 500 for each platform,
and told out of order: with forks, identities used twice, re-runs and late ends, one true state comes out.
"""

import hashlib
import hmac
import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.facts import PACE
from tests.hub import running, subscribed, until
from webhook_app import builds, db, inbox, models, platforms
from webhook_app.platforms import Answer, PollTarget, Source

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))


# ---- histories of real use -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    """A BuildRelay that can poll nothing: what is pushed is all it has."""
    off = {"ENABLE_GH": "false", "ENABLE_GITLAB": "false", "ENABLE_JENKINS": "false"}
    with running({**off, "GITLAB_WEBHOOK_SECRET": "a plain token of the tests"}) as hub:
        yield hub


def post(hub, push, number):
    """Post one push of a history, signed as its platform does; its answer."""
    body = json.dumps(push["body"]).encode()
    secret = hub.secrets.get(f"{push['source'].upper()}_WEBHOOK_SECRET", "a plain token of the tests")
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    unique = f"{number}-{hashlib.sha256(body).hexdigest()}"
    headers = {
        "github": {"X-GitHub-Event": push.get("event"), "X-GitHub-Delivery": unique},
        "gitlab": {"X-Gitlab-Event": push.get("event"), "X-Gitlab-Token": secret, "webhook-id": unique},
        "jenkins": {},
    }[push["source"]]
    headers |= {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={digest}"}
    answer = hub.post(push["source"], headers, body)
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted"), answer.text
    return answer.json()["build_id"]


def seconds(shown):
    return shown and datetime.fromisoformat(shown).timestamp()


@pytest.mark.parametrize("history", HISTORIES, ids=lambda path: path.stem)
def test_a_history_of_real_use_comes_out_right(program, history):
    case = json.loads(history.read_text(encoding="utf-8"))
    expected = case["expect"]
    with (
        subscribed(program) as everything,
        subscribed(program, branches=["main"]) as of_main,
        subscribed(program, branches=["main"], changes=["broke", "fixed"]) as changes,
        subscribed(program, repositories=["grp/*"]) as of_group,
    ):
        ids = list(dict.fromkeys(post(program, push, number) for number, push in enumerate(case["push"])))
        messages = {build_id: everything.wait_for(program, build_id) for build_id in ids}
        build = program.build(expected.get("build_id", ids[-1]))
        for name in ("state", "conclusion", "attempt", "duration_seconds"):
            assert build[name] == expected.get(name, build[name]), name
        for name in ("started_at", "ended_at"):
            assert seconds(build[name]) == expected.get(name, seconds(build[name])), name
        if "repository_in_every_message" in expected:
            (told,) = messages.values()
            wanted = expected["repository_in_every_message"]
            assert {message["data"]["repository"] for message in told} == {wanted}
            assert of_group.wait_for(program, build["build_id"]) == told
        if "messages_to_a_subscriber_of_branches_main" in expected:
            wanted = expected["messages_to_a_subscriber_of_branches_main"]
            for build_id in wanted:
                of_main.wait_for(program, build_id)
            drained(program)
            assert [build_id for build_id in ids if of_main.messages(build_id)] == wanted
        if "messages_to_changes_broke_fixed_on_main" in expected:
            drained(program)
            assert [build_id for build_id in ids if changes.messages(build_id)] == []


def drained(hub):
    """Wait until nothing is on its way to any subscriber."""

    def done():
        found = hub.get("/api/subscribers")["items"]
        pages = [hub.get(f"/api/subscribers/{one['id']}/deliveries?state=pending") for one in found]
        return all(not page["items"] for page in pages)

    until(done, 60, "all messages are delivered")


# ---- invented histories, out of order ------------------------------------------------------------

MANY = 500
BEGIN = datetime(2026, 11, 2, 8, 0, tzinfo=UTC)


@dataclass
class History:
    """What a platform pushes about one identity, a list for each use of it, and what a read shows at the end.

    `branch` is the one that must be shown, `duration` that of the last run, in seconds.
    """

    platform: str
    uses: list = field(default_factory=list)
    truth: dict = field(default_factory=dict)
    state: str = ""
    branch: str | None = None
    is_fork: bool = False
    duration: float | None = None

    def push(self, body, event=None):
        self.uses[-1].append((body, event))


def stamp(at):
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"


def github_history(chance, number):
    """A run with re-runs, perhaps of a fork's `main`; perhaps a restored server gives its id once more."""
    history = History("github", is_fork=chance.random() < 0.3)
    history.branch = "stranger:main" if history.is_fork else "main"
    clock = BEGIN
    for _use in range(1 + (chance.random() < 0.3)):
        history.uses.append([])
        created_at = clock
        for attempt in range(1, chance.choice((1, 1, 2, 3)) + 1):
            run = github_run(number, history.is_fork, created_at, clock, attempt)
            began, length = clock, chance.randrange(5, 600)
            steps = [("queued", None, 0), ("in_progress", None, 3), ("completed", conclusion(chance), length)]
            for status, ended_as, after in steps:
                at = began + timedelta(seconds=after)
                run = run | {"status": status, "conclusion": ended_as, "updated_at": stamp(at)}
                history.push({"workflow_run": run, "repository": run["repository"]}, "workflow_run")
            history.push(github_job(run, number), "workflow_job")
            history.state, history.duration = github_state(run["conclusion"]), length
            clock = began + timedelta(seconds=length + chance.randrange(120, 4000))
    history.truth = run
    return history


def conclusion(chance):
    return chance.choice(("success", "failure", "cancelled"))


def github_state(word):
    return {"success": "completed", "failure": "failed", "cancelled": "cancelled"}[word]


def github_run(number, is_fork, created_at, began, attempt):
    base = {"id": 1, "full_name": "octo/web"}
    return {
        "id": number, "name": "CI", "event": "pull_request" if is_fork else "push", "head_branch": "main",
        "head_sha": "c0ffee", "run_number": 7, "run_attempt": attempt, "created_at": stamp(created_at),
        "run_started_at": stamp(began), "repository": base,
        "head_repository": {"id": 2, "full_name": "stranger/web"} if is_fork else base,
    }  # fmt: skip


def github_job(run, number):
    job = {
        "id": number * 10 + run["run_attempt"], "run_id": number, "run_attempt": run["run_attempt"],
        "status": "in_progress", "name": "build", "head_branch": "main", "steps": [],
        "created_at": run["run_started_at"],
    }  # fmt: skip
    return {"workflow_job": job, "repository": run["repository"]}


def gitlab_history(chance, number):
    """A pipeline that is retried, with jobs or without (an external one), perhaps of a fork's `main`."""
    history = History("gitlab", is_fork=chance.random() < 0.3)
    history.branch = "500:main" if history.is_fork else "main"
    with_jobs, clock, job_id = chance.random() < 0.6, BEGIN, number * 100
    for _use in range(1 + (chance.random() < 0.3)):
        history.uses.append([])
        created_at, finished_at = clock, None
        for _run in range(chance.choice((1, 2, 3))):
            job_id += 1
            began, length = clock, chance.randrange(5, 600)
            for status, after in (("running", 2), (chance.choice(("success", "failed", "canceled")), length)):
                at = began + timedelta(seconds=after)
                finished_at = at if status != "running" else finished_at
                job = {
                    "id": job_id, "name": "t", "status": status, "created_at": stamp(began),
                    "started_at": stamp(began + timedelta(seconds=2)),
                    "finished_at": stamp(at) if status != "running" else None,
                }  # fmt: skip
                told = {
                    "id": number, "status": status, "ref": "main", "tag": False, "sha": "c0ffee",
                    "source": "merge_request_event" if history.is_fork else "push",
                    "created_at": stamp(created_at), "finished_at": finished_at and stamp(finished_at),
                }  # fmt: skip
                history.push(gitlab_hook(told, [job] if with_jobs else [], history.is_fork), "Pipeline Hook")
            history.state = {"success": "completed", "failed": "failed", "canceled": "cancelled"}[status]
            clock = at + timedelta(seconds=chance.randrange(120, 4000))
    history.truth = told | {
        "project_id": 77, "updated_at": told["finished_at"], "web_url": None,
        "ref": "refs/merge-requests/3/head" if history.is_fork else "main",
    }  # fmt: skip
    return history


def gitlab_hook(pipeline, jobs, is_fork):
    request = {"source_project_id": 500, "target_project_id": 77} if is_fork else None
    project = {"id": 77, "path_with_namespace": "grp/app"}
    return {
        "object_kind": "pipeline", "object_attributes": pipeline, "merge_request": request,
        "project": project, "builds": jobs,
    }  # fmt: skip


def jenkins_history(chance, number):
    """Build 1 of a job that is deleted and made again, each time with another queue id."""
    history = History("jenkins", branch=f"feature/{number}")
    clock, queue_id, path = BEGIN, 400, f"job/web/job/feature%252F{number}/1/"
    history.uses.append([])  # queue ids tell all of them apart, in whatever order they come
    for _use in range(chance.choice((1, 2, 3))):
        queue_id += chance.randrange(1, 50)
        result, length = chance.choice(("SUCCESS", "FAILURE", "ABORTED")), chance.randrange(1, 600)
        at = int(clock.timestamp() * 1000)
        end = at + length * 1000
        phases = [("QUEUED", at - 50), ("STARTED", at), ("COMPLETED", end), ("FINALIZED", end + 900)]
        for phase, when in phases:
            over = {"status": result, "duration": length * 1000} if when > at else {}
            build = {"number": 1, "queue_id": queue_id, "timestamp": when, "phase": phase, "url": path}
            history.push({"name": "x", "build": build | over})
        history.truth = {
            "number": 1, "building": False, "result": result, "timestamp": at, "duration": length * 1000,
            "queueId": queue_id,
        }  # fmt: skip
        history.state = {"SUCCESS": "completed", "FAILURE": "failed", "ABORTED": "cancelled"}[result]
        clock += timedelta(seconds=length + chance.randrange(5, 4000))
    return history


def script_history(chance, number):
    """Runs under one id, each with its own time; an end may come when the next run is under way."""
    history, clock, late = History("script"), BEGIN, []
    for run in range(chance.choice((1, 2, 3))):
        history.uses.append([])
        length = chance.randrange(10, 600)
        end = chance.choice(("build_completed", "build_failed"))
        events = [("build_started", 0), ("stage_started", 1), ("heartbeat", 5), (end, length)]
        for event, after in events:
            at = clock + timedelta(seconds=after)
            history.push({"runId": f"nightly/{number}", "event": event, "timestamp": stamp(at), "run": run})
        history.uses[-1] += late
        late = [history.uses[-1].pop(3)] if chance.random() < 0.3 else []
        history.state = "completed" if end == "build_completed" else "failed"
        history.duration = length
        clock += timedelta(seconds=length + chance.randrange(60, 4000))
    history.uses[-1] += late
    return history


MAKERS = {
    "github": github_history, "gitlab": gitlab_history, "jenkins": jenkins_history, "script": script_history,
}  # fmt: skip


def shuffled(history, use, again, chance):
    """A use in some order; what a script sends about a run comes after its start."""
    first = use[:1] if history.platform == "script" else []
    rest = use[len(first) :] + [again.pop() for _ in range(len(again) // 2)]
    chance.shuffle(rest)
    return first + rest


def tell(engine, source, history, chance):
    """Take the pushes shuffled, a few in one transaction; the ids of what they name.

    Some come twice, and those about an earlier use of the identity may do so amid a later one.
    """
    told, again = [], []
    for use in history.uses:
        again += chance.sample(use, len(use) // 3)
        told += shuffled(history, use, again, chance)
    told += again
    named = set()
    while told:
        few, told = told[:3], told[3:]
        arrivals = [inbox.read(source, headers_of(history, event), encoded(body)) for body, event in few]
        receipts = inbox.take(engine, arrivals, BEGIN + timedelta(days=20), PACE)
        named |= {receipt.build_id for receipt in receipts if receipt.build_id}
    return named


def encoded(body):
    return json.dumps(body).encode()


def headers_of(history, event):
    name = {"github": "x-github-event", "gitlab": "x-gitlab-event"}.get(history.platform, "x-event")
    return {name: event or ""}


def read_once(engine, source, history, row):
    """What polling does with a build that is due: one read, of the truth."""
    platform = platforms.polled()[history.platform]
    target = PollTarget(
        row["build_id"], row["key"], row["repository"], row["number"], row["attempt"], row["url"],
        row["attempt_base"],
    )  # fmt: skip
    answer = Answer(200, {}, encoded(history.truth))
    seen = platform.parse_poll(source, target, answer)
    at = BEGIN + timedelta(days=21)
    db.as_writer(engine, lambda write: builds.record(write, [seen], at, PACE))


def row_of(engine, build_id):
    with db.reading(engine) as connection:
        found = connection.execute(select(models.builds).where(models.builds.c.build_id == build_id))
        return dict(found.mappings().one())


@pytest.mark.parametrize("platform", MAKERS)
def test_one_true_state_comes_out_of_every_order(engine, platform):
    source = Source(platform, platform, "https://ci.example.com")
    for number in range(1, MANY + 1):
        chance = random.Random(f"{platform} {number}")
        history = MAKERS[platform](chance, number)
        (build_id,) = tell(engine, source, history, chance)
        row = row_of(engine, build_id)
        if row["next_poll_at"] is not None:
            read_once(engine, source, history, row)
            row = row_of(engine, build_id)
        shown = (row["state"], row["branch"], row["is_fork"], row["next_poll_at"])
        assert shown == (history.state, history.branch, history.is_fork, None), number
        assert row["started_at"] is None or row["started_at"] <= row["ended_at"], number
        if history.duration is not None:
            assert (row["ended_at"] - row["started_at"]).total_seconds() == history.duration, number
