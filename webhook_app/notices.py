"""What admins are told of builds: scripts that start and end, and what an end changed for its branch.  Pure.

One notice for each such event, stored in the transaction that records the event.  Stages and heartbeats make
none.  Texts from outside are shown on pages: one line each, of bounded length, with what looks like a secret
masked.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from webhook_app import redaction, results

Event = Mapping[str, Any]
Notice = dict[str, Any]
Begun = set[tuple[int, int]]
"""Builds and their attempts that began just now."""

SCRIPT = "script"
NAME_CHARS = 120
ERROR_CHARS = 300

_ENDS = {"build.completed": "script.completed", "build.failed": "script.failed"}
_CHANGES = {results.BROKE: "broke", results.FIXED: "is fixed", results.STILL_FAILING: "still fails"}
_mask = redaction.redactor(())


def of_events(events: Iterable[Event], begun: Begun, now: datetime) -> list[Notice]:
    """The notices that these events make, in their order; `begun`: attempts that began with one of them."""
    waiting = set(begun)
    made: list[Notice] = []
    for event in events:
        data = event["data"]
        if data["platform"] == SCRIPT:
            made += _of_script(event, waiting, now)
        if event["change"] is not None and not data.get("is_fork"):
            told = f"{_subject(data)} {_CHANGES[event['change']]}: it {_end(event)}"
            made.append(_notice(f"build.{event['change']}", data, told, now))
    return made


def _of_script(event: Event, waiting: Begun, now: datetime) -> Iterable[Notice]:
    """A start is told once per attempt: one that goes on after an end of ours does not start again."""
    data, started = event["data"], (event["build"], event["data"]["attempt"])
    if event["type"] == "build.in_progress" and started in waiting:
        waiting.discard(started)
        yield _notice("script.started", data, f"{_subject(data)} started", now)
    elif event["type"] in _ENDS:
        yield _notice(_ENDS[event["type"]], data, f"{_subject(data)} {_end(event)}", now)


def _notice(kind: str, data: Mapping[str, Any], text: str, now: datetime) -> Notice:
    return {"kind": kind, "subject": data["build_id"], "text": f"{text}.", "created_at": now}


def _subject(data: Mapping[str, Any]) -> str:
    """`CI of octo/web, branch main (github:octo:web:7, attempt 2)`, `Build script nightly (script:7)`."""
    workflow, repository, branch = (
        one_line(data[name] or "", NAME_CHARS) for name in ("workflow", "repository", "branch")
    )
    what = f"Build script {workflow}".rstrip() if data["platform"] == SCRIPT else workflow or "Build"
    names = f"{what} of {repository}" if repository else what
    where = f", branch {branch}" if branch else ""
    attempt = f", attempt {data['attempt']}" if data["attempt"] > 1 else ""
    return f"{names}{where} ({data['build_id']}{attempt})"


def _end(event: Event) -> str:
    """`failed after 1 min 12 s in stage Frontend Build: exit code 2`."""
    data, detail = event["data"], event["data"].get("detail") or {}
    words = [{"completed": "completed", "timeout": "timed out"}.get(data["state"], "failed")]
    seconds = _seconds(data, detail)
    if seconds is not None:
        words.append(f"after {duration(seconds)}")
    error = data["error"] or ""
    stage = detail.get("stage")
    if isinstance(stage, str) and stage and data["state"] != "completed":
        words.append(f"in stage {one_line(stage, NAME_CHARS)}")
        error = error.removeprefix(f"{stage}: ")
    reason = one_line(error, ERROR_CHARS).rstrip(".")
    return " ".join(words) + (f": {reason}" if reason else "")


def _seconds(data: Mapping[str, Any], detail: Mapping[str, Any]) -> float | None:
    """How long it took: by a script's own word, or else from start to end."""
    told = detail.get("durationMs")
    if isinstance(told, int) and not isinstance(told, bool) and 0 <= told < 2**63:
        return told / 1000
    seconds: float | None = data["duration_seconds"]
    return seconds


def duration(seconds: float) -> str:
    """As people write it: `0.4 s`, `12 s`, `1 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    whole = round(seconds)
    for (large, unit), (small, rest_unit) in pairwise((*_UNITS, (1, "s"))):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {unit}" + (f" {rest} {rest_unit}" if rest else "")
    return f"{whole} s"


_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def one_line(text: str, most: int) -> str:
    """A text from outside as one printable line of at most so many characters, secrets masked."""
    masked = _mask(text[: 10 * most])
    line = " ".join("".join(char if char.isprintable() else " " for char in masked).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
