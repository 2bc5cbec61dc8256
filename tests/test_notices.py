"""In-app notices of builds: one for each start and end of a script, and for what an end changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from tests.caller import pages
from tests.facts import at, github, gitlab
from tests.test_script_reports import ANY
from tests.test_script_runs import END, FAILURE, MIDDLE, START, fall_silent, report
from webhook_app import db, models, notices
from webhook_app.lifecycle import Conclusion, State

Q, P, C, F, T = State.QUEUED, State.IN_PROGRESS, State.COMPLETED, State.FAILED, State.TIMEOUT


def told(api, *prefixes):
    """Kind, subject and text of the notices, oldest first."""
    items, _ = pages(api, "/api/notifications", limit=3)
    found = [(one["kind"], one["subject"], one["text"]) for one in reversed(items)]
    return [one for one in found if one[0].startswith(prefixes)]


def test_a_script_that_starts_and_ends_is_two_notices(api):
    about = {"origin": "server", "repo": "webshop", "branch": "main"}
    report(api, START, **about)
    for event in ("stage_started", MIDDLE, "heartbeat", START, "plan_generated", "deploy_progress"):
        report(api, event, **about)
    report(api, END, durationMs=72_000)
    report(api, END)
    assert told(api, "") == [
        ("script.started", "script:r", "Build script server of webshop, branch main (script:r) started."),
        (
            "script.completed", "script:r",
            "Build script server of webshop, branch main (script:r) completed after 1 min 12 s.",
        ),
    ]  # fmt: skip


def test_a_script_that_fails_tells_its_error_and_stage_and_what_it_broke(api):
    report(api, START, timestamp="2026-11-01T10:00:00Z")
    failure = {"stage": "Frontend Build", "message": "exit code 2"}
    report(api, FAILURE, timestamp="2026-11-01T11:03:05Z", **failure)
    assert told(api, "") == [
        ("script.started", "script:r", "Build script (script:r) started."),
        (
            "script.failed", "script:r",
            "Build script (script:r) failed after 1 h 3 min in stage Frontend Build: exit code 2.",
        ),
        (
            "build.broke", "script:r",
            "Build script (script:r) broke: it failed after 1 h 3 min in stage Frontend Build: exit code 2.",
        ),
    ]  # fmt: skip


def test_each_attempt_of_a_script_has_its_notices(api):
    for end in (FAILURE, FAILURE, END):
        report(api, START)
        report(api, end)
    assert [(kind, "attempt" in text and text[text.index("attempt") :][:9]) for kind, _, text in told(api, "")] == [
        ("script.started", False), ("script.failed", False), ("build.broke", False),
        ("script.started", "attempt 2"), ("script.failed", "attempt 2"), ("build.still_failing", "attempt 2"),
        ("script.started", "attempt 3"), ("script.completed", "attempt 3"), ("build.fixed", "attempt 3"),
    ]  # fmt: skip


def test_a_lost_heartbeat_is_a_failure_and_the_life_after_it_is_no_start(api):
    report(api, START)
    fall_silent(api)
    report(api, "heartbeat")
    report(api, END)
    kinds = [kind for kind, _, _ in told(api, "")]
    assert kinds == ["script.started", "script.failed", "build.broke", "script.completed", "build.fixed"]
    assert "no heartbeat for 90 s" in told(api, "script.failed")[0][2]


def test_a_script_whose_end_comes_first_is_told_once(api):
    report(api, END, durationMs=400)
    report(api, "heartbeat")
    assert told(api, "") == [
        ("script.completed", "script:r", "Build script (script:r) completed after 0.4 s.")
    ]


def test_what_any_build_changes_for_its_branch_is_told(api):
    times = {"started_at": at(0), "ended_at": at(191)}
    api.record(github(C, run=1), now=at(300))
    api.record(
        github(Q, run=2),
        github(P, run=2, **times),
        github(F, run=2, error="tests\nfailed.", **times),
        now=at(300),
    )
    api.record(github(F, run=3, attempt=4, ended_at=at(9)), github(T, run=4), now=at(300))
    api.record(github(C, run=5, **times), github(C, run=6), gitlab(F, 0, None), now=at(300))
    assert told(api, "") == [
        (
            "build.broke", "github:Octo:Repo:2",
            "CI of Octo/Repo, branch main (github:Octo:Repo:2) broke: it failed after 3 min 11 s: tests failed.",
        ),
        (
            "build.still_failing", "github:Octo:Repo:3",
            "CI of Octo/Repo, branch main (github:Octo:Repo:3, attempt 4) still fails: it failed.",
        ),
        (
            "build.still_failing", "github:Octo:Repo:4",
            "CI of Octo/Repo, branch main (github:Octo:Repo:4) still fails: it timed out.",
        ),
        (
            "build.fixed", "github:Octo:Repo:5",
            "CI of Octo/Repo, branch main (github:Octo:Repo:5) is fixed: it completed after 3 min 11 s.",
        ),
        ("build.broke", "gitlab:1:1", "Build of group/project (gitlab:1:1) broke: it failed."),
    ]  # fmt: skip


def test_what_is_no_result_and_what_comes_twice_makes_none(api):
    api.record(github(State.CANCELLED, run=1), github(C, run=2, conclusion=Conclusion.SKIPPED))
    api.record(github(P, run=3), github(C, run=3), github(C, run=3), github(P, run=3))
    assert told(api, "") == []
    api.record(github(F, run=4), github(F, run=4), github(Q, run=4))
    api.record(github(F, run=4))
    assert [kind for kind, _, _ in told(api, "")] == ["build.broke"]


def test_a_notice_is_there_with_its_event_or_not_at_all(local, monkeypatch):
    monkeypatch.setattr(notices, "of_events", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local.record(github(F))
    monkeypatch.undo()
    with db.reading(local.engine) as connection:
        assert connection.execute(select(models.events.c.id)).all() == []
    local.record(github(F))
    assert len(told(local, "")) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.04, "0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"),
        (59.6, "1 min"), (72, "1 min 12 s"), (3599, "59 min 59 s"), (3600, "1 h"), (3785, "1 h 3 min"),
        (86_399, "23 h 59 min"), (86_400, "1 d"), (100_000, "1 d 3 h"),
    ],
)  # fmt: skip
def test_durations_as_people_write_them(seconds, words):
    assert notices.duration(seconds) == words


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\r\n\tb \x1b[31mred\x1b[0m", "a b [31mred [0m"), ("x\u202eevil\u2028y", "x evil y"),
        ("é 語", "é 語"), ("", ""), ("a" * 11, "a" * 9 + "…"), ("a" * 10, "a" * 10),
    ],
)  # fmt: skip
def test_a_text_from_outside_is_one_printable_line(text, line):
    most = 10 if text.startswith("aa") else 100
    assert notices.one_line(text, most) == line


def test_what_looks_like_a_secret_is_masked(api):
    report(api, FAILURE, message="push to https://bot:hunter2@git.example.com failed, token=abcdef123456")
    for _, _, text in told(api, ""):
        assert "hunter2" not in text
        assert "abcdef123456" not in text


@given(st.dictionaries(st.sampled_from(["stage", "durationMs", "x"]), ANY))
def test_whatever_a_script_tells_its_notices_are_made(detail):
    data = {
        "build_id": "script:r", "platform": "script", "state": "failed", "attempt": 1, "error": "x" * 5000,
        "duration_seconds": None, "detail": detail, **dict.fromkeys(("repository", "workflow", "branch"), "y" * 300),
    }  # fmt: skip
    event = {"build": 1, "type": "build.failed", "change": "broke", "data": data}
    made = notices.of_events([event], {(1, 1)}, at(0))
    assert [one["kind"] for one in made] == ["script.failed", "build.broke"]
    assert all(len(one["text"]) < 1100 and one["text"].isprintable() for one in made)
