"""What ended builds leave is read once: logs, errors, lists of artifacts; from servers that play along or not."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from jobs import collect as collect_job
from jobs import sweep as sweep_job
from pollers import endings
from tests.hub import clean_environment
from tests.stand import ON_SQLITE, environment, stands
from webhook_app import budget, collection, db, logs, models, queues
from webhook_app.budget import Pause
from webhook_app.lifecycle import Conclusion, ObservedBy, State
from webhook_app.logs import Log
from webhook_app.simulated.ci import LOGGED_SECRETS
from webhook_app.simulated.github import secondary_limit
from webhook_app.simulated.gitlab import rate_limited as gitlab_rate_limited
from webhook_app.simulated.httpd import Response, json_response

TOKEN = "ghp_0123456789abcdef0123456789abcdef0123"
LOGS = {"github": "/jobs/", "gitlab": "/trace", "jenkins": "/progressiveText"}


@pytest.fixture
def make_stand(engine, redis_client, monkeypatch):
    """`make_stand(platforms, builds, …)`: see `tests.stand.stands`."""
    with stands(engine, redis_client, monkeypatch) as make:
        yield make


def collect(stand, after=0.0):
    stand.clock.advance(after)
    collect_job.collect(stand.held)


def end(stand, build, **more):
    """The push that ends a build, as its platform would send it now."""
    truth = stand.world.truth(build.build_id)
    assert truth.terminal
    more.setdefault("attempt", truth.attempt if build.platform == "github" else None)
    more.setdefault("platform_at", stand.now())
    stand.push(build, State(truth.state), **{"conclusion": Conclusion(truth.conclusion)} | more)


def ended(make_stand, platform, kind="failure", **more):
    """A stand with one build that has just ended, and the build."""
    stand = make_stand((platform,), 1, kinds={platform: [kind]}, speed=1000, **more)
    (build,) = stand.world.builds
    stand.push(build)
    stand.clock.advance(600)
    end(stand, build)
    return stand, build


def left(stand, build, attempt=1):
    """What is known of an attempt."""
    with db.reading(stand.engine) as connection:
        return collection.of_attempt(connection, stand.row(build)["id"], attempt)


def states(stand, build, attempt=1):
    row = left(stand, build, attempt)
    return row["log_state"], row["log_reason"], row["artifacts_state"], row["artifacts_reason"]


def lines(stand, build, attempt=1):
    return logs.unpack(left(stand, build, attempt)["log"])


def artifacts(stand, build):
    with db.reading(stand.engine) as connection:
        rows = connection.execute(
            select(models.artifacts).where(models.artifacts.c.build == stand.row(build)["id"])
        )
        return [dict(row) for row in rows.mappings()]


def due_in(stand, build, attempt=1):
    due = left(stand, build, attempt)["due_at"]
    return due and (due - stand.now()).total_seconds()


@contextmanager
def answering(server, rules):
    """Where a pattern fits the path, answer so (a response, or a function of the request); returns the paths."""
    usual, asked = server._answer, []

    def answer(request):
        asked.append(request.path + (f"?{request.query}" if request.query else ""))
        for pattern, response in rules.items():
            if re.search(pattern, request.path):
                return response(request) if isinstance(response, Callable) else response
        return usual(request)

    server._answer = answer
    try:
        yield asked
    finally:
        server._answer = usual


# ---- once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_the_log_of_a_failed_build_is_read_once_and_tells_the_error(make_stand, platform):
    stand, build = ended(make_stand, platform)
    with answering(stand.servers[platform], {}) as asked:
        collect(stand)
        assert states(stand, build) == ("stored", None, "stored", None)
        assert due_in(stand, build) is None
        first = len(asked)
        collect(stand, after=86_400)
        assert len(asked) == first
    log = lines(stand, build)
    assert "FAIL tests/test_cart.py::test_tax_is_rounded" in log
    assert not any("\x1b" in line or re.match(r"\d{4}-\d\d-\d\dT", line) for line in log)
    row = stand.row(build)
    assert "FAIL tests/test_cart.py::test_tax_is_rounded; " in row["error"]
    assert row["error"].endswith("19.04 != 19.05")
    assert row["state"] == "failed"
    *_, failed, told = stand.events(build)
    assert (failed["type"], failed["data"]["error"]) == ("build.failed", None)
    assert (told["type"], told["observed_by"]) == ("build.progress", "poll")
    assert told["data"]["error"] == row["error"]
    assert (told["data"]["state"], told["data"]["previous_state"]) == ("failed", "failed")
    assert stand.redis.exists(queues.bell_key(queues.DELIVER))


@ON_SQLITE
@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_a_good_build_costs_one_request(make_stand, platform):
    stand, build = ended(make_stand, platform, "success")
    with answering(stand.servers[platform], {}) as asked:
        collect(stand, after=collection.LIST_DELAY_SECONDS - 1)
        assert asked == []
        collect(stand, after=1)
    assert len(asked) == 1
    assert states(stand, build) == (None, None, "stored", None)
    assert due_in(stand, build) is None
    assert stand.types(build)[-1] == "completed"


@ON_SQLITE
@pytest.mark.parametrize(
    ("platform", "requests"),
    [("github", {"/jobs": 1, "/logs": 1, "/artifacts": 1}), ("gitlab", {"/pipelines/": 1, "/trace": 1})],
)
def test_a_failed_build_costs_as_little_as_can_be(make_stand, platform, requests):
    stand, _ = ended(make_stand, platform)
    with answering(stand.servers[platform], {}) as asked:
        collect(stand)
    ours = [path.partition("?")[0] for path in asked if "_blobs" not in path]
    assert len(ours) == sum(requests.values()), ours
    for part, count in requests.items():
        assert sum(part in path for path in ours if part != "/jobs" or path.endswith("/jobs")) == count, ours


def test_an_end_of_ours_waits_for_the_word_of_the_platform(make_stand):
    stand = make_stand(("github",), 1, kinds={"github": ["failure"]}, speed=1000, BUILD_MAX_POLL_TIME="60000")
    (build,) = stand.world.builds
    stand.push(build)
    with answering(stand.servers["github"], {"/runs": Response(503)}):
        stand.poll(after=61)
        stand.poll(after=120)
    assert stand.row(build)["state"] == "timeout"
    collect(stand)
    assert left(stand, build) is None
    end(stand, build)
    collect(stand)
    assert states(stand, build) == ("stored", None, "stored", None)


@ON_SQLITE
def test_a_script_has_nothing_to_be_read(make_stand):
    from tests.test_sweep import Script, report

    stand = make_stand(("jenkins",), 0)
    report(stand, State.COMPLETED)
    assert left(stand, Script()) is None


@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_a_rerun_is_read_for_its_own_attempt(make_stand, platform):
    stand, build = ended(make_stand, platform)
    collect(stand)
    first = lines(stand, build)
    later = {"platform_at": stand.now() + timedelta(seconds=60), "observed_by": ObservedBy.POLL}
    more = {"attempt": 2} if platform == "github" else later
    stand.push(build, State.IN_PROGRESS, **more)
    assert (stand.row(build)["attempt"], stand.row(build)["error"]) == (2, None)
    stand.push(build, State.FAILED, conclusion=Conclusion.FAILURE, **more)
    server = stand.servers[platform]
    new = Response(200, b"##[error]the second attempt\n", {"Content-Type": "text/plain"})
    job = json_response({"jobs": [{"id": 77, "name": "again", "conclusion": "failure", "steps": [{}]}]})
    with answering(server, {"/attempts/2/jobs": job, "/jobs/77/logs": new, "/trace": new}):
        collect(stand)
    assert lines(stand, build, attempt=2)[0].endswith("the second attempt")
    assert lines(stand, build) == first
    assert "the second attempt" in stand.row(build)["error"]


# ---- not there -------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
@pytest.mark.parametrize("status", [404, 500, 503])
def test_what_is_not_there_yet_is_asked_for_again(make_stand, platform, status):
    stand, build = ended(make_stand, platform)
    blob = b'<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>'
    with answering(stand.servers[platform], {LOGS[platform] + r"?(\d+/logs)?$": Response(status, blob)}):
        collect(stand)
    reason = "not_found" if status == 404 else "unavailable"
    assert states(stand, build) == (None, reason, "stored", None)
    assert due_in(stand, build) == 15
    collect(stand, after=14)
    assert states(stand, build)[0] is None
    with answering(stand.servers[platform], {}) as asked:
        collect(stand, after=1)
    assert states(stand, build) == ("stored", None, "stored", None)
    assert stand.row(build)["error"]
    assert not any("artifacts" in path for path in asked), "they were read before"


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_it_is_given_up_with_the_last_reason(make_stand, platform):
    stand, build = ended(make_stand, platform)
    gone = {LOGS[platform] + r"?(\d+/logs)?$": Response(404), "artifacts|jobs$|api/json": Response(502)}
    waits = []
    with answering(stand.servers[platform], gone):
        while due_in(stand, build) is not None:
            waits.append(due_in(stand, build))
            collect(stand, after=waits[-1])
            assert len(waits) < 20
    assert waits == [0, 15, 60, 300, 900, 3600]
    log_reason = "unavailable" if platform == "gitlab" else "not_found"
    assert states(stand, build) == ("unavailable", log_reason, "unavailable", "unavailable")
    assert stand.row(build)["error"] is None
    assert stand.types(build)[-1] == "failed"


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_what_is_gone_is_not_asked_for_again(make_stand, platform):
    stand, build = ended(make_stand, platform)
    with answering(stand.servers[platform], {"logs$|trace$|Text$|artifacts$|api/json$": Response(410)}):
        collect(stand)
    assert states(stand, build)[:2] == ("unavailable", "gone")
    if platform != "gitlab":
        assert states(stand, build)[2:] == ("unavailable", "gone")
    assert due_in(stand, build) is None


@ON_SQLITE
@pytest.mark.parametrize(
    ("platform", "kind", "state"),
    [
        ("github", "startup_failure", "failed"),
        ("gitlab", "bad_yaml", "failed"),
        ("github", "stale", "timeout"),
    ],
)
def test_where_no_job_ran_there_is_no_log(make_stand, platform, kind, state):
    stand, build = ended(make_stand, platform, kind)
    assert stand.row(build)["state"] == state
    with answering(stand.servers[platform], {}) as asked:
        collect(stand)
    assert states(stand, build) == ("unavailable", "no_job_ran", "stored", None)
    assert not any("logs" in path or "trace" in path for path in asked)


@ON_SQLITE
def test_a_log_that_is_missing_holds_up_the_others_until_the_last_try(make_stand):
    stand, build = ended(make_stand, "github")
    jobs = json_response({"jobs": [
        {"id": 71, "name": "lost", "conclusion": "failure", "steps": [{}]},
        {"id": 72, "name": "kept", "conclusion": "timed_out", "steps": [{}]},
        {"id": 73, "name": "fine", "conclusion": "success", "steps": [{}]},
        {"id": 74, "name": "left out", "conclusion": "skipped", "steps": []},
    ]})  # fmt: skip
    rules = {
        "/attempts/1/jobs": jobs, "/jobs/71/logs": Response(404),
        "/jobs/72/logs": Response(200, b"ERROR: what the other says\n", {"Content-Type": "text/plain"}),
    }  # fmt: skip
    with answering(stand.servers["github"], rules) as asked:
        while due_in(stand, build) is not None:
            assert states(stand, build)[0] is None
            collect(stand, after=due_in(stand, build))
    assert lines(stand, build) == ["ERROR: what the other says"]
    assert stand.row(build)["error"] == "kept: ERROR: what the other says"
    assert not any("/73/" in path or "/74/" in path for path in asked)


@ON_SQLITE
@pytest.mark.parametrize("body", [b"<html>log in", b"[1, 2", b'{"jobs": 5}', b"", b'{"jobs":[{"id":"x"},7]}'])
def test_answers_that_do_not_fit_end_nothing(make_stand, body):
    stand, build = ended(make_stand, "github")
    with answering(
        stand.servers["github"], {"/jobs$": Response(200, body), "/artifacts$": Response(200, body)}
    ):
        collect(stand)
    assert states(stand, build)[1] in ("unreadable", "no_job_ran")
    assert stand.row(build)["state"] == "failed"


@ON_SQLITE
@pytest.mark.parametrize("platform", ["gitlab", "jenkins"])
def test_a_web_page_is_no_log(make_stand, platform):
    stand, build = ended(make_stand, platform)
    page = Response(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
    with answering(stand.servers[platform], {LOGS[platform]: page}):
        collect(stand)
    assert states(stand, build)[:2] == (None, "unreadable")


# ---- errors ----------------------------------------------------------------------------------


@ON_SQLITE
def test_annotations_are_asked_for_where_the_log_says_nothing(make_stand):
    stand, build = ended(make_stand, "github")
    log = Response(200, b"##[error]Process completed with exit code 2.\n", {"Content-Type": "text/plain"})
    notes = json_response([
        {"annotation_level": "warning", "path": "a.py", "start_line": 1, "message": "only a warning"},
        {"annotation_level": "failure", "path": ".github", "start_line": 9, "message": "Process completed with exit code 2."},
        {"annotation_level": "failure", "path": "a.py", "start_line": 3, "message": f"no access with {TOKEN}"},
        {"annotation_level": "failure", "path": 5, "message": None},
    ])  # fmt: skip
    with answering(stand.servers["github"], {r"/jobs/\d+/logs": log, r"/check-runs/\d+/annotations": notes}):
        collect(stand)
    assert stand.row(build)["error"].endswith(": a.py:3: no access with ***")


@ON_SQLITE
def test_a_weak_word_is_better_than_none(make_stand):
    stand, build = ended(make_stand, "github")
    log = Response(200, b"##[error]Process completed with exit code 2.\n", {"Content-Type": "text/plain"})
    with answering(stand.servers["github"], {r"/jobs/\d+/logs": log, "/check-runs/": Response(404)}):
        collect(stand)
    assert stand.row(build)["error"].endswith(": Process completed with exit code 2.")


@ON_SQLITE
def test_an_error_that_was_told_stays(make_stand):
    stand = make_stand(("github",), 1, kinds={"github": ["failure"]}, speed=1000)
    (build,) = stand.world.builds
    stand.clock.advance(600)
    end(stand, build, error="told by the platform")
    collect(stand)
    assert stand.row(build)["error"] == "told by the platform"
    assert stand.types(build)[-1] == "failed"


# ---- large, secret, broken -------------------------------------------------------------------


@ON_SQLITE
def test_no_secret_is_stored_or_told(make_stand):
    stand, build = ended(make_stand, "github", ADMIN_TOKEN="the-admin-token-of-tests")
    text = (
        f"\x1b[1m{TOKEN[:9]}\x1b[0m{TOKEN[9:]}\nERROR: the-admin-token-of-tests is wrong, password=hunter2\n"
    )
    log = Response(200, text.encode() * 3, {"Content-Type": "text/plain"})
    with answering(stand.servers["github"], {r"/jobs/\d+/logs": log}):
        collect(stand)
    shown = "\n".join(lines(stand, build)) + str(stand.events(build)) + stand.row(build)["error"]
    assert "***" in shown
    for secret in (TOKEN, TOKEN[:12], "the-admin-token-of-tests", "hunter2"):
        assert secret not in shown


def numbered(size):
    return b"".join(b"line %09d\n" % n for n in range(size // 15))


@ON_SQLITE
def test_of_a_huge_console_of_jenkins_only_the_ends_are_read(make_stand):
    stand, build = ended(make_stand, "jenkins")
    content = numbered(30_000_000)
    sent = []

    def text(request):
        start = int(request.parameter("start"))
        sent.append(start)
        return Response(
            200, content[start:], {"Content-Type": "text/plain", "X-Text-Size": str(len(content))}
        )

    with answering(stand.servers["jenkins"], {"/progressiveText": text}):
        collect(stand)
    assert sent == [0, len(content) - (logs.KEPT_BYTES - logs.HEAD_BYTES)]
    log = lines(stand, build)
    assert (log[0], log[-1]) == ("line 000000000", f"line {30_000_000 // 15 - 1:09d}")
    (between,) = [line for line in log if line.startswith("[…")]
    assert int(re.search(r"\d+", between)[0]) == len(content) - 15 * (len(log) - 1)
    assert left(stand, build)["log_truncated"]


@ON_SQLITE
def test_a_console_that_grows_is_read_when_it_is_complete(make_stand):
    stand, build = ended(make_stand, "jenkins")
    more = Response(
        200, b"first part\n", {"Content-Type": "text/plain", "X-Text-Size": "11", "X-More-Data": "true"}
    )
    with answering(stand.servers["jenkins"], {"/progressiveText": more}):
        collect(stand)
        assert states(stand, build)[:2] == (None, "unavailable")
    collect(stand, after=15)
    assert lines(stand, build)[-1] == "Finished: FAILURE"


@ON_SQLITE
def test_a_log_beyond_all_bounds_says_that_it_goes_on(make_stand, monkeypatch):
    monkeypatch.setattr(endings, "LOG_CAP_BYTES", 3_000_000)
    stand, build = ended(make_stand, "gitlab")
    huge = Response(200, numbered(5_000_000), {"Content-Type": "text/plain"})
    with answering(stand.servers["gitlab"], {"/trace": huge}):
        collect(stand)
    assert "it goes on" in lines(stand, build)[-1]
    assert left(stand, build)["log_truncated"]


CHILD = """
import re, resource, sys
from pathlib import Path
from jobs.collect import collect
import zipfile, lzma, bz2  # what a read may import is no growth
from jobs.resources import resources
def most():
    if sys.platform == "linux":  # there ru_maxrss begins with the most that the starter ever held
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = most()
collect()
print(most() - before)
"""


def child_environment(stand, url, redis_url, tmp_path):
    return clean_environment(
        environment(stand.world, stand.servers)
        | {"DATABASE_URL": url, "REDIS_URL": redis_url, "BUILDRELAY_DATA_DIR": str(tmp_path)}
    )


def past(stand):
    """The stand's builds ended before now, by the real clock of a child."""
    assert stand.clock() < time.time()


@ON_SQLITE
@pytest.mark.parametrize("platform", ["github", "gitlab"])
def test_the_memory_of_a_huge_log_is_flat(make_stand, store_url, redis_url, tmp_path, platform):
    stand, build = ended(make_stand, platform)
    past(stand)
    huge = Response(200, numbered(120_000_000), {"Content-Type": "text/plain"})
    with answering(stand.servers[platform], {r"/jobs/\d+/(logs|trace)": huge}):
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=child_environment(stand, store_url, redis_url, tmp_path),
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert lines(stand, build)[-1] == f"line {120_000_000 // 15 - 1:09d}"
    assert int(done.stdout) < 60_000, "KiB more than before, for a log of 120 MB"


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(4):
            archive.writestr(f"{n}_bomb.txt", b"\0" * 50_000_000)
    return Response(200, file.getvalue(), {"Content-Type": "application/zip"})


def ask_for_the_log(stand, build):
    row = stand.row(build)
    db.as_writer(stand.engine, lambda write: collection.want(write, row, stand.now(), log=True))


@ON_SQLITE
@pytest.mark.parametrize("answer", [bomb, lambda: Response(200, b"PK no zip"), lambda: Response(200, b"")])
def test_a_zip_that_is_none_or_too_large_is_given_up_at_once(make_stand, answer):
    stand, build = ended(make_stand, "github", "success")
    ask_for_the_log(stand, build)
    with answering(stand.servers["github"], {"/attempts/1/logs": answer()}):
        collect(stand)
    assert states(stand, build) == ("unavailable", "unreadable", "stored", None)
    assert due_in(stand, build) is None


@ON_SQLITE
def test_the_log_of_a_good_run_is_its_zip(make_stand):
    stand, build = ended(make_stand, "github", "success")
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    ask_for_the_log(stand, build)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0_build.txt", "\ufeff2026-11-01T10:00:00.0000000Z built\r\n")
        archive.writestr("1_te\nst.txt", f"{TOKEN}\n")
        archive.writestr("build/1_Set up job.txt", "step\n")
    with answering(stand.servers["github"], {"/attempts/1/logs": Response(200, file.getvalue())}) as asked:
        collect(stand)
    assert lines(stand, build) == ["=== build ===", "built", "=== test ===", "***"]
    assert not any("artifacts" in path for path in asked)


@pytest.mark.parametrize("platform", ["github", "gitlab", "jenkins"])
def test_every_kind_of_build_comes_to_an_end_of_its_collection_and_tells_no_secret(make_stand, platform):
    """Each script of the simulated platforms, whose jobs write a token into their logs."""
    stand = make_stand((platform,), 30, speed=1000, every_kind=True)
    stand.push_all()
    stand.clock.advance(3600)
    over = [build for build in stand.world.builds if stand.world.truth(build.build_id).terminal]
    for build in over:
        end(stand, build)
    attempts = {build: stand.row(build)["attempt"] for build in over}
    for wait in (0, *collection.RETRY_SECONDS, 3600):
        collect(stand, after=wait)
    for build in over:
        row = left(stand, build, attempts[build])
        assert (row["due_at"], row["artifacts_state"]) == (None, "stored"), (build.kind, dict(row))
        failed = stand.row(build)["state"] in ("failed", "timeout")
        assert row["wants_log"] == failed
        assert row["log_state"] in (("stored", "unavailable") if failed else (None,)), build.kind
        shown = str(lines(stand, build, attempts[build]) if row["log"] else "") + str(stand.events(build))
        assert LOGGED_SECRETS[platform] not in shown, build.kind
        assert LOGGED_SECRETS[platform][:14] not in shown
    stored = [left(stand, build, attempts[build])["log_state"] for build in over]
    assert "stored" in stored


# ---- many, killed, short ---------------------------------------------------------------------


def pushed_ends(make_stand, count, kinds=("failure",), platform="github"):
    stand = make_stand((platform,), count, kinds={platform: list(kinds)}, speed=1000, spread=0)
    stand.push_all()
    stand.clock.advance(600)
    for build in stand.world.builds:
        end(stand, build)
    return stand


def test_failed_builds_come_first(make_stand):
    stand = pushed_ends(make_stand, 8, ("success", "failure"))
    kinds = {str(build.run_id): build.kind for build in stand.world.builds}
    assert set(kinds.values()) == {"success", "failure"}
    with answering(stand.servers["github"], {}) as asked:
        collect(stand, after=collection.LIST_DELAY_SECONDS)
    order = [kinds[found[1]] for path in asked if (found := re.search(r"/runs/(\d+)/artifacts", path))]
    assert order == sorted(order), "failure before success"
    assert len(order) == 8


@pytest.mark.parametrize(
    ("platform", "limit", "seconds"),
    [("github", lambda: secondary_limit(90), 90), ("gitlab", lambda: gitlab_rate_limited(45), 45)],
)
def test_a_limit_postpones_all_and_counts_for_none(make_stand, platform, limit, seconds):
    stand = pushed_ends(make_stand, 3, platform=platform)
    with answering(stand.servers[platform], {LOGS[platform]: limit()}) as asked:
        collect(stand)
        assert len(asked) <= 3, "one build; the others wait"
    assert stand.pauses()[platform][0] == pytest.approx(seconds, abs=1)
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {None}
    assert sum(left(stand, build)["tries"] for build in stand.world.builds) == 0
    collect(stand, after=seconds - 1)
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {None}
    collect(stand, after=2)
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {"stored"}


def test_without_budget_to_spare_everything_waits_and_nothing_is_dropped(make_stand):
    stand = pushed_ends(make_stand, 3)
    pause = Pause("github", stand.now() + timedelta(seconds=600), "rate_limited", "wait")
    db.as_writer(stand.engine, lambda write: budget.apply(write, pause, stand.now()))
    before = stand.requests()
    collect(stand, after=599)
    assert stand.requests() == before
    collect(stand, after=2)
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {"stored"}


def ledger(stand, **values):
    """What the lane of GitHub has left, as if states had been read with it."""
    lane = budget.lane_of(stand.held.settings.sources["github"], 0.1)

    def unit(write):
        budget.open_lane(write, lane, ["github"], stand.now())
        write.connection.execute(update(models.budgets).values(reckoned_at=stand.now(), **values))

    db.as_writer(stand.engine, unit)


def test_logs_yield_to_the_reading_of_states_and_are_charged(make_stand):
    stand = pushed_ends(make_stand, 3)
    reset_at = stand.now() + timedelta(seconds=600)
    ledger(stand, limit=5000, remaining=600, reset_at=reset_at, credit=1.0)
    before = stand.requests()
    collect(stand, after=1)
    assert stand.requests() == before
    ledger(stand, limit=5000, remaining=4000, reset_at=reset_at, credit=100.0)
    collect(stand, after=1)
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {"stored"}
    with db.reading(stand.engine) as connection:
        row = connection.execute(select(models.budgets)).mappings().one()
    assert row["counted"] == 9, "jobs, log and artifacts of three builds"
    assert row["remaining"] == stand.servers["github"].limit - stand.servers["github"].used()


@ON_SQLITE
def test_a_source_that_is_off_is_left_alone(make_stand):
    stand = make_stand(("github",), 1, kinds={"github": ["failure"]}, speed=1000, ENABLE_GH="false")
    (build,) = stand.world.builds
    stand.clock.advance(600)
    end(stand, build)
    before = stand.requests()
    collect(stand)
    assert stand.requests() == before


def test_a_killed_worker_loses_nothing(make_stand, store_url, redis_url, tmp_path, wait_until):
    stand, build = ended(make_stand, "github")
    past(stand)
    arrived = threading.Event()

    def hang(request):
        arrived.set()
        return Response(delay_seconds=60, drop=True)

    with answering(stand.servers["github"], {r"/jobs/\d+/logs": hang}):
        child = subprocess.Popen(
            [sys.executable, "-c", "from jobs.collect import collect; collect()"],
            env=child_environment(stand, store_url, redis_url, tmp_path),
        )
        assert arrived.wait(60)
        os.kill(child.pid, signal.SIGKILL)
        child.wait(60)
    assert states(stand, build) == (None, None, None, None)
    stand.clock.at = time.time()
    collect(stand)
    assert states(stand, build)[0] is None, "it is still leased"
    collect(stand, after=collection.LEASE_SECONDS + 1)
    assert states(stand, build) == ("stored", None, "stored", None)


def test_two_workers_never_read_the_same_build(make_stand, store_url, redis_url, tmp_path):
    stand = pushed_ends(make_stand, 12, platform="gitlab")
    past(stand)
    both, lock, workers = threading.Event(), threading.Lock(), set()

    def slowly(request):
        """The first two requests wait for each other: both workers are at it."""
        with lock:
            workers.add(request.path)
            if len(workers) >= 2:
                both.set()
        both.wait(60)
        return usual(request)

    usual = stand.servers["gitlab"]._answer
    env = child_environment(stand, store_url, redis_url, tmp_path)
    with answering(stand.servers["gitlab"], {r"/pipelines/\d+/jobs$": slowly}) as asked:
        command = [sys.executable, "-c", "from jobs.collect import collect; collect()"]
        children = [subprocess.Popen(command, env=env) for _ in range(2)]
        assert [child.wait(240) for child in children] == [0, 0]
    assert both.is_set()
    read = [path for path in asked if re.search(r"/pipelines/\d+/jobs", path)]
    assert len(read) == len(set(read)) == 12
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {"stored"}


@ON_SQLITE
def test_two_workers_ask_github_one_after_the_other(make_stand, store_url, redis_url, tmp_path, wait_until):
    stand = pushed_ends(make_stand, 4)
    past(stand)
    lock, under_way, most = threading.Lock(), [], []

    def wanted():
        with db.reading(stand.engine) as connection:
            return connection.execute(select(models.budgets.c.wanted_by)).scalar() is not None

    def slowly(request):
        """The first one is answered when another one waits, here or for its turn."""
        with lock:
            under_way.append(request)
            most.append(len(under_way))
        if len(most) == 1:
            wait_until(lambda: wanted() or len(most) > 1)
        try:
            return usual(request)
        finally:
            with lock:
                under_way.remove(request)

    usual = stand.servers["github"]._answer
    env = child_environment(stand, store_url, redis_url, tmp_path)
    with answering(stand.servers["github"], {"/repos/": slowly}):
        command = [sys.executable, "-c", "from jobs.collect import collect; collect()"]
        children = [subprocess.Popen(command, env=env) for _ in range(2)]
        assert [child.wait(240) for child in children] == [0, 0]
    assert max(most) == 1
    assert {left(stand, build)["log_state"] for build in stand.world.builds} == {"stored"}


def claim(stand, source="github"):
    return db.in_transaction(
        stand.engine, lambda connection: collection.claim(connection, source, stand.now())
    )


def settle(stand, claimed, brought):
    return db.as_writer(stand.engine, lambda write: collection.settle(write, claimed, brought, stand.now()))


def test_who_comes_after_the_lease_settles_nothing(make_stand):
    stand, build = ended(make_stand, "github")
    first = claim(stand)
    assert claim(stand) is None
    stand.clock.advance(collection.LEASE_SECONDS + 1)
    second = claim(stand)
    assert (first.tries, second.tries) == (1, 2)
    late = collection.Brought(log=collection.Found(value=Log(("late",))))
    assert not settle(stand, first, late)
    assert states(stand, build)[0] is None
    assert settle(stand, second, collection.Brought(log=collection.Found(value=Log(("good",)))))
    assert lines(stand, build) == ["good"]
    assert due_in(stand, build) == 60, "the artifacts are still wanted"


def test_what_is_asked_for_while_it_is_read_is_read_next(make_stand):
    stand, build = ended(make_stand, "github", "success")
    stand.clock.advance(collection.LIST_DELAY_SECONDS)
    claimed = claim(stand)
    ask_for_the_log(stand, build)
    assert claim(stand) is None, "the claim holds"
    assert settle(stand, claimed, collection.Brought(artifacts=collection.Found(value=())))
    assert due_in(stand, build) == 0
    assert claim(stand).wants_log


def test_a_build_that_kills_every_worker_is_given_up(make_stand):
    stand, build = ended(make_stand, "github")
    for tries in range(1, collection.MOST_TRIES + 1):
        assert claim(stand).tries == tries
        stand.clock.advance(collection.LEASE_SECONDS + 1)
    before = stand.requests()
    collect(stand)
    assert states(stand, build) == ("unavailable", "unavailable", "unavailable", "unavailable")
    assert due_in(stand, build) is None
    assert stand.requests() == before


@pytest.mark.parametrize("platform", ["jenkins", "github"])
def test_a_build_that_another_has_replaced_has_left_nothing(make_stand, platform):
    """What its platform would give under that identity is the other one's."""
    stand, build = ended(make_stand, platform)
    stand.push(build, State.IN_PROGRESS, created_at=stand.now() + timedelta(hours=1))
    assert (stand.row(build)["attempt"], stand.row(build)["attempt_base"]) == (2, 1)
    before = stand.requests()
    collect(stand)
    assert states(stand, build) == ("unavailable", "not_found", "unavailable", "not_found")
    assert stand.requests() == before


# ---- retention -------------------------------------------------------------------------------


def test_logs_and_lists_go_with_their_retention(make_stand, monkeypatch):
    monkeypatch.setattr(sweep_job, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(sweep_job, "BUSY_SECONDS", 0.0)
    stand = pushed_ends(make_stand, 3, ("success",))
    collect(stand, after=collection.LIST_DELAY_SECONDS)
    assert artifacts(stand, stand.world.builds[0])
    stand.clock.advance(89 * 86_400)
    sweep_job.sweep(stand.held)
    assert all(left(stand, build) for build in stand.world.builds)
    stand.clock.advance(2 * 86_400)
    sweep_job.sweep(stand.held)
    assert sum(left(stand, build) is None for build in stand.world.builds) == 2
    for _ in range(3):
        sweep_job.sweep(stand.held)
    assert not any(left(stand, build) or artifacts(stand, build) for build in stand.world.builds)
