"""`record()`: THE write path.  Every fact about a build, pushed, polled or reported, enters here.

In one transaction (the caller's, which holds the writer's lock) a batch of facts is held against
the rows of their builds: verdict, state, events with their sequence, messages to subscribers.
Reads are in `queries`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, case, func, insert, or_, update

from webhook_app import (
    bulk,
    collection,
    deliveries,
    health,
    models,
    notices,
    platforms,
    polling,
    progress,
    results,
)
from webhook_app.db import Write
from webhook_app.lifecycle import (
    ENDED,
    Act,
    Conclusion,
    JobStatus,
    Observation,
    ObservedBy,
    Recorded,
    State,
    Use,
    Verdict,
    compare_use,
    verdict,
)
from webhook_app.platforms import Source
from webhook_app.polling import Pace
from webhook_app.times import iso

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PollFailed:
    """A poll of the build with this `key` told nothing: a `PollFault` word, and `message` for people."""

    key: str
    message: str
    fault: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A poll of the build with this `key`: the platform says what it said before."""

    key: str


@dataclass(frozen=True, slots=True)
class ErrorFound:
    """What the log of an ended attempt tells of its error, where the platform told none; no new state."""

    key: str
    attempt: int
    text: str


Fact = Observation | PollFailed | Unchanged | ErrorFound


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one fact: the build it went to (None: no such build), and what it changed.

    `missed`: a change that a poll was first to tell, though a push should have.  `unchanged`: a poll said
    that nothing changed.  `known`: it only took back an end of ours.  `reason`: why a build script's report
    changed nothing.
    """

    build: int | None
    build_id: str | None
    act: Act
    ask: bool = False
    events: int = 0
    missed: bool = False
    unchanged: bool = False
    known: bool = False
    reason: str | None = None

    @property
    def moved(self) -> bool:
        """Whether the build's state changed on its platform."""
        return self.act in _MOVES and not self.known


_MOVES = (Act.CREATE, Act.MOVE, Act.REOPEN)


@dataclass(slots=True)
class _Draft:
    """A build's row while facts are applied to it, and the events they make.

    `branch_found_at`: how many events the build had when its branch became known, if that was now.
    `corrected`: what late words tell of earlier attempts.
    """

    row: Row
    new: bool = False
    dirty: bool = False
    events: list[Row] = field(default_factory=list)
    superseded: list[Row] = field(default_factory=list)
    corrected: list[Row] = field(default_factory=list)
    ended: list[Row] = field(default_factory=list)
    branch_found_at: int | None = None

    def change(self, values: Mapping[str, Any]) -> None:
        self.row.update(values)
        self.dirty = True


def record(write: Write, facts: Sequence[Fact], now: datetime, pace: Pace) -> list[Outcome]:
    """Apply `facts` in their order and write what they change; one outcome per fact.

    Needs the writer's lock (`db.as_writer`).  Nothing is visible before the caller's commit.
    """
    drafts = _load(write, facts)
    outcomes = [_apply(write, drafts, fact, now, pace) for fact in facts]
    health.note(write.connection, facts, outcomes, now)
    touched = [draft for draft in drafts.distinct() if draft.dirty]
    _flush(write, touched, now)
    _plan_earlier(write, touched, now)
    deliveries.plan(write, [event for draft in touched for event in draft.events], now)
    return outcomes


class _Drafts:
    """The drafts of a batch, by key and by group."""

    def __init__(self, found: Iterable[Row]) -> None:
        self.by_key: dict[str, _Draft] = {}
        self.by_group: dict[str, _Draft] = {}
        for row in found:
            self.add(_Draft(row))

    def add(self, draft: _Draft) -> None:
        self.by_key[draft.row["key"]] = draft
        if draft.row["group_key"]:
            self.by_group[draft.row["group_key"]] = draft

    def of(self, fact: Fact) -> _Draft | None:
        if fact.key:
            return self.by_key.get(fact.key)
        return self.by_group.get(fact.group or "") if isinstance(fact, Observation) else None

    def distinct(self) -> Iterable[_Draft]:
        return self.by_key.values()


def _load(write: Write, facts: Sequence[Fact]) -> _Drafts:
    keys = {fact.key for fact in facts if fact.key}
    groups = {fact.group for fact in facts if isinstance(fact, Observation) and not fact.key and fact.group}
    found = bulk.find(write.connection, models.builds, "key", keys)
    return _Drafts(found + bulk.find(write.connection, models.builds, "group_key", groups))


def _apply(write: Write, drafts: _Drafts, fact: Fact, now: datetime, pace: Pace) -> Outcome:
    draft = drafts.of(fact)
    if draft is None and (not isinstance(fact, Observation) or not fact.key):
        return Outcome(None, None, Act.DROP)
    if draft is not None:
        _keep_estimate(draft, now)
    if not isinstance(fact, Observation):
        assert draft is not None
        if isinstance(fact, ErrorFound):
            return _note_error(draft, fact, now)
        return _apply_silence(draft, fact, now, pace)
    told = draft is not None and not polling.is_only_named(draft.row)
    polled = fact.observed_by is ObservedBy.POLL and not fact.ours
    overtook = polled and (draft is None or polling.push_was_due(draft.row, now, pace))
    decided = verdict(_recorded(draft.row) if draft and told else None, fact)
    decided = _unless_known(draft, fact, decided)
    known = draft is not None and _is_known(draft.row, fact, decided)
    if draft is None:
        draft = _Draft(_blank(write, fact, now), new=True)
    before = len(draft.events)
    if polled and not draft.new:
        _begin_polling(draft, now)
    _note_unlisted(draft, fact)
    _correct_attempt(draft, fact, decided)
    _apply_verdict(draft, fact, decided, now)
    drafts.add(draft)  # its group may be known only now
    _schedule(draft, fact, decided, now, pace)
    return Outcome(
        draft.row["id"],
        draft.row["build_id"],
        decided.act,
        decided.ask,
        len(draft.events) - before,
        missed=overtook and decided.act in _MOVES and not known,
        known=known,
        reason=decided.reason,
    )


def _is_known(row: Row, seen: Observation, decided: Verdict) -> bool:
    """Whether it only takes back an end of ours, so that nothing has changed on the platform."""
    told_before = seen.state is not None and seen.state.value == row["told_state"]
    return decided.act is Act.MOVE and polling.was_given_up(row) and told_before


def _note_unlisted(draft: _Draft, seen: Observation) -> None:
    """However late it is told: it never changes."""
    if seen.unlisted and not draft.row["unlisted"]:
        draft.change({"unlisted": True})


def _apply_silence(draft: _Draft, fact: PollFailed | Unchanged, now: datetime, pace: Pace) -> Outcome:
    """A poll that told nothing new: it moves the next one, and may be one too many."""
    before = len(draft.events)
    if polling.was_given_up(draft.row):
        _note_late_silence(draft, fact, now, pace)
    elif draft.row["next_poll_at"] is not None:
        # else it ended or was stopped by hand while we were reading
        if not (isinstance(fact, PollFailed) and draft.row["polling"] == "error"):
            _begin_polling(draft, now)
        if isinstance(fact, PollFailed):
            _note_failed_poll(draft, fact, now, pace)
        else:
            draft.change(polling.after_poll(draft.row, now, pace, ask=False))
        _give_up_when_overdue(draft, now, pace)
    events, unchanged = len(draft.events) - before, isinstance(fact, Unchanged)
    return Outcome(draft.row["id"], draft.row["build_id"], Act.ENRICH, events=events, unchanged=unchanged)


def _note_late_silence(draft: _Draft, fact: PollFailed | Unchanged, now: datetime, pace: Pace) -> None:
    """A read of a build that we ended ourselves told nothing: it is read again, ever more slowly."""
    if draft.row["next_poll_at"] is None:
        return  # it was stopped by hand, or has been missing for long, while we were reading
    if isinstance(fact, PollFailed):
        draft.change(polling.after_late_error(draft.row, now, pace, fact.message, fact.fault))
    else:
        draft.change(polling.read_on(draft.row, now, pace))


def _recorded(row: Row) -> Recorded:
    return Recorded(
        attempt=row["attempt"],
        state=State(row["state"]),
        told_state=State(row["told_state"]),
        conclusion=Conclusion(row["conclusion"]) if row["conclusion"] else None,
        waiting=row["waiting"],
        platform_at=row["platform_at"],
        jobs={int(id_): JobStatus(job["status"]) for id_, job in row["jobs"].items()},
        jobs_complete=row["jobs_complete"],
        attempt_base=row["attempt_base"],
        ended_at=None if row["ended_synthetic"] and row["platform"] != "script" else row["ended_at"],
        queue_id=row["queue_id"],
        created_at=row["platform_created_at"],
        doubtful=row["doubtful"],
        **(_of_script(row) if row["platform"] == "script" else {}),
    )


def _blank(write: Write, seen: Observation, now: datetime) -> Row:
    """The row of a build nobody has spoken of before."""
    return {
        "id": write.new_id("builds"),
        "build_id": seen.build_id,
        "key": seen.key,
        "lookup": seen.build_id.casefold(),
        "group_key": None,
        "source": seen.source,
        "platform": seen.platform,
        "repository": None,
        "workflow": None,
        "branch": None,
        "commit": None,
        "number": None,
        "url": None,
        "sequence": 0,
        "last_push_at": None,
        "last_poll_at": None,
        "watched_at": None,
        "unlisted": False,
        "trigger": None,
        "head_repository": None,
        "is_fork": False,
        "queue_id": None,
        "platform_created_at": None,
        "attempt_base": 0,
        "created_at": now,
        "updated_at": now,
        "attempt": 1,
        "observed_by": seen.observed_by.value,
        "preview_url": None,
    } | _blank_attempt()


def _blank_attempt() -> Row:
    """Columns that begin anew with each attempt."""
    return {
        "state": State.QUEUED.value,
        "told_state": State.QUEUED.value,
        "conclusion": None,
        "raw_status": None,
        "raw_conclusion": None,
        "waiting": False,
        "error": None,
        "started_at": None,
        "ended_at": None,
        "started_synthetic": False,
        "ended_synthetic": False,
        "platform_at": None,
        "jobs": {},
        "jobs_complete": False,
        "progress": 0,
        "progress_basis": "none",
        "report": {},
    } | polling.fresh_attempt()


# ---- what a verdict changes ------------------------------------------------------------------


def _apply_verdict(draft: _Draft, seen: Observation, decided: Verdict, now: datetime) -> None:
    if decided.act in (Act.DROP, Act.ASK):
        return
    previous = None if decided.act is Act.CREATE else draft.row["state"]
    _begin_attempt(draft, seen, decided)
    _note_report(draft, seen, decided)
    _take_facts(draft, seen)
    _take_ref(draft, seen)
    moved = decided.act is not Act.ENRICH
    concluded = decided.conclusion != draft.row["conclusion"]
    if moved:
        _enter(draft, seen, decided, now)
    elif concluded:
        draft.change({"conclusion": decided.conclusion})
    _take_times(draft, seen)
    advanced = _take_progress(draft, seen)
    type_ = None
    if moved:
        type_ = f"build.{decided.state.value}"
    elif seen.detail is not None:
        type_ = "build.reported"
    elif advanced or concluded:
        type_ = "build.progress"
    if type_ is not None:
        draft.change({"observed_by": seen.observed_by.value})
        _add_event(draft, type_, seen, now, previous)


def _begin_attempt(draft: _Draft, seen: Observation, decided: Verdict) -> None:
    """Make room for a new attempt; its time of creation counts from now on, should a re-run have one."""
    if decided.act is Act.REOPEN:
        _supersede(draft)
        draft.change({"platform_created_at": seen.created_at or draft.row["platform_created_at"]})
    if decided.anew:
        _begin_anew(draft, seen)
    if decided.act in (Act.CREATE, Act.REOPEN):
        draft.change({"attempt": decided.attempt})


def _supersede(draft: _Draft) -> None:
    """Keep the old attempt's record and clear the row for the next one."""
    row = draft.row
    kept = (
        "attempt", "state", "conclusion", "started_at", "ended_at", "started_synthetic", "ended_synthetic",
        "progress", "observed_by", "error",
    )  # fmt: skip
    draft.superseded.append({"build": row["id"]} | {name: row[name] for name in kept})
    draft.change(_blank_attempt())


def _begin_anew(draft: _Draft, seen: Observation) -> None:
    """Forget what was true of the earlier use of this identity only."""
    names = ("workflow", "branch", "commit", "number", "url", "trigger", "head_repository", "queue_id")
    now = {"attempt_base": draft.row["attempt"], "platform_created_at": seen.created_at}
    draft.change(dict.fromkeys(names) | {"is_fork": False, "unlisted": False, "group_key": None} | now)


def _correct_attempt(draft: _Draft, seen: Observation, decided: Verdict) -> None:
    """Note the end of an earlier attempt that the platform tells late: it replaces one of ours, or none."""
    attempt = draft.row["attempt_base"] + (seen.attempt or 0)
    late = decided.act is Act.DROP and seen.attempt is not None and attempt < draft.row["attempt"]
    ended = seen.state is not None and seen.state.terminal and not seen.ours
    if late and ended and seen.state and compare_use(_recorded(draft.row), seen) is Use.SAME:
        times = {"the_start": seen.started_at, "the_end": seen.ended_at}
        conclusion = seen.conclusion.value if seen.conclusion else None
        end = {"the_state": seen.state.value, "the_conclusion": conclusion} | times
        draft.corrected.append({"the_build": draft.row["id"], "the_attempt": attempt} | end)
        draft.dirty = True


def _enter(draft: _Draft, seen: Observation, decided: Verdict, now: datetime) -> None:
    """Take the new state; a later end takes the error of the earlier one away."""
    state = decided.state
    ended_at = None if seen.ours else seen.ended_at or seen.platform_at
    values: Row = {
        "state": state.value,
        "conclusion": decided.conclusion.value if decided.conclusion else None,
        "waiting": seen.waiting,
        "ended_at": (ended_at or now) if state.terminal else None,
        "ended_synthetic": state.terminal and ended_at is None,
        "error": seen.error,
    }
    if not seen.ours:
        values["told_state"] = state.value
        values["jobs_complete"] = seen.jobs_complete
    draft.change(values)
    if state.terminal and not seen.ours and seen.platform != "script":
        draft.ended.append(collection.ended(draft.row, now))
    if state is State.IN_PROGRESS and draft.row["started_at"] is None:
        draft.change({"started_at": now, "started_synthetic": True})


def _take_times(draft: _Draft, seen: Observation) -> None:
    """Let the platform's times replace ours, and keep what is impossible out: no end before its start."""
    row = draft.row
    if row["started_at"] is not None and row["started_synthetic"] and seen.started_at is not None:
        draft.change({"started_at": seen.started_at, "started_synthetic": False})
    over = State(row["state"]).terminal
    if over and row["ended_synthetic"] and seen.ended_at is not None and not seen.ours:
        draft.change({"ended_at": seen.ended_at, "ended_synthetic": False})
    started, ended = row["started_at"], row["ended_at"]
    if started is None or ended is None or started <= ended:
        return
    if row["started_synthetic"]:
        draft.change({"started_at": None, "started_synthetic": False})
    else:
        draft.change({"ended_at": started})


def _take_ref(draft: _Draft, seen: Observation) -> None:
    """Take whose branch it is; what one word takes for a branch, a fuller one may show to be a tag."""
    row = draft.row
    values: Row = {}
    if seen.is_fork and not row["is_fork"]:
        values |= {"is_fork": True, "head_repository": seen.head_repository}
    if seen.branch is not None and row["branch"] != seen.branch:
        whole = bool(values) or seen.branch == f"refs/tags/{row['branch']}"
        if row["branch"] is None:
            draft.branch_found_at = row["sequence"]
        if row["branch"] is None or whole:
            values |= {"branch": seen.branch}
    if values:
        draft.change(values)


def _take_facts(draft: _Draft, seen: Observation) -> None:
    """Fill what is unknown; take what may change from whoever is not older than we know."""
    row = draft.row
    values: Row = {}
    for name in ("workflow", "commit", "number", "url", "started_at", "trigger", "queue_id"):
        told = getattr(seen, name)
        if told is not None and row[name] is None:
            values[name] = told
    if seen.created_at is not None and row["platform_created_at"] is None:
        values["platform_created_at"] = seen.created_at
    known_at = row["platform_at"]
    older = seen.platform_at is not None and known_at is not None and seen.platform_at < known_at
    if not older:
        for name in ("repository", "raw_status", "raw_conclusion", "platform_at", "preview_url"):
            told = getattr(seen, name)
            if told is not None and told != row[name]:
                values[name] = told
        if seen.state is not None and not seen.ours:
            values["waiting"] = seen.waiting
    if seen.group and seen.key and row["group_key"] is None:
        values["group_key"] = seen.group
    if any(row[name] != value for name, value in values.items()):
        draft.change(values)


def _keep_estimate(draft: _Draft, now: datetime) -> None:
    """Keep what the status may have shown of history: the state that comes now may show less."""
    report, estimated = draft.row["report"], progress.estimate(draft.row, now)
    if estimated > report.get(progress.ESTIMATED, 0):
        draft.change({"report": {**report, progress.ESTIMATED: estimated}})


def _take_progress(draft: _Draft, seen: Observation) -> bool:
    """Fold jobs, reports and told percentages in; it never falls.  Did it rise enough for an event?"""
    row = draft.row
    told = None
    if seen.jobs:
        jobs = _merge_jobs(
            {} if seen.jobs_complete else row["jobs"],
            row["jobs"],
            seen,
            over=State(row["told_state"]).terminal and bool(row["jobs"]),
        )
        if jobs != row["jobs"]:
            draft.change({"jobs": jobs})
        told = progress.of_jobs(jobs, complete=seen.jobs_complete or row["jobs_complete"])
    if seen.detail is not None:
        report, told = progress.of_report(row["report"], seen.detail)
        draft.change({"report": report})
    if seen.expected_seconds is not None:
        draft.change({"report": {progress.EXPECTED: [seen.expected_seconds]} | row["report"]})
    if seen.progress is not None:
        told = progress.Progress(min(seen.progress, 99), "report")
    if row["state"] == State.COMPLETED.value:
        told = progress.Progress(100, row["progress_basis"])
    if told is None or told.percent <= row["progress"]:
        return False
    tell = progress.is_worth_telling(row["progress"], told.percent) and not State(row["state"]).terminal
    draft.change({"progress": told.percent, "progress_basis": told.basis})
    return tell


_JOB_RANK = {JobStatus.QUEUED: 0, JobStatus.MANUAL: 0, JobStatus.IN_PROGRESS: 1, JobStatus.COMPLETED: 2}


def _merge_jobs(start: Row, known: Row, seen: Observation, *, over: bool) -> Row:
    """Jobs by id, as stored; a job that was further already stays there.

    A job we first hear of after the end belongs to a re-run: kept here, it would hide that re-run.
    """
    merged = dict(start)
    for job in seen.jobs:
        old = known.get(str(job.id))
        if old is None and over and not seen.jobs_complete:
            continue
        if old is not None and _JOB_RANK[JobStatus(old["status"])] > _JOB_RANK[job.status]:
            merged[str(job.id)] = old
            continue
        merged[str(job.id)] = {
            "name": job.name,
            "status": job.status.value,
            "steps_done": max(job.steps_done, old["steps_done"] if old else 0),
            "steps_total": job.steps_total,
        }
    return merged


def _note_error(draft: _Draft, fact: ErrorFound, now: datetime) -> Outcome:
    """Fill an error that nobody told, once, and say so in one event; the state stays."""
    row = draft.row
    wanted = row["attempt"] == fact.attempt and row["error"] is None and State(row["state"]).terminal
    if wanted:
        draft.change({"error": fact.text})
        _add_event(draft, "build.progress", None, now, row["state"])
    return Outcome(row["id"], row["build_id"], Act.ENRICH if wanted else Act.DROP, events=int(wanted))


# ---- reports of build scripts ----------------------------------------------------------------

_BEGUN, _START, _END = "begun", "script_start", "script_end"
"""What a build's `report` keeps of an attempt: the script said that it began, and when it began and ended."""

_OF_ONE_RUN = ("workflow", "branch", "commit", "number", "url", "preview_url")
_NEWS = ("repository", "workflow", "branch", "commit", "url", "preview_url")


def _of_script(row: Row) -> Row:
    """What the state machine asks of a script's attempt."""
    report = row["report"]
    return {
        "begun": report.get(_BEGUN, False),
        "script_start": _parsed(report.get(_START)),
        "script_end": _parsed(report.get(_END)),
        "deploying": bool(report.get("planned")) or report.get("phase") in ("planning", "deploying"),
        "started_at": row["started_at"],
    }


def _parsed(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _note_report(draft: _Draft, seen: Observation, decided: Verdict) -> None:
    """Keep what a script says of its attempt's begin and end; a new run has its own commit and addresses."""
    if seen.observed_by is not ObservedBy.REPORT:
        return
    if decided.act is Act.REOPEN:
        told = {name: getattr(seen, name) for name in _OF_ONE_RUN}
        draft.change(told | {name: told[name] or draft.row[name] for name in ("workflow", "branch")})
    noted: Row = {_BEGUN: True} if seen.begins else {}
    if seen.reported_at is not None and seen.begins:
        noted[_START] = iso(seen.reported_at)
    if seen.reported_at is not None and seen.state is not None and seen.state.terminal:
        noted[_END] = iso(seen.reported_at)
    if noted:
        draft.change({"report": noted | draft.row["report"]})


def _unless_known(draft: _Draft | None, seen: Observation, decided: Verdict) -> Verdict:
    """A script may report its end twice; the second time counts only for what the first did not say."""
    again = decided.act is Act.ENRICH and seen.observed_by is ObservedBy.REPORT and decided.state.terminal
    if draft is None or not again:
        return decided
    row = draft.row
    news = any(getattr(seen, name) is not None and row[name] is None for name in _NEWS)
    return decided if news else replace(decided, act=Act.DROP, reason=ENDED)


# ---- events ----------------------------------------------------------------------------------


def _add_event(
    draft: _Draft,
    type_: str,
    seen: Observation | None,
    now: datetime,
    previous_state: str | None,
    detail: Row | None = None,
) -> None:
    """Append an event; its data is what subscribers get, a snapshot of the build as it is now."""
    row = draft.row
    draft.change({"sequence": row["sequence"] + 1})
    by = seen.observed_by.value if seen is not None else ObservedBy.POLL.value
    if seen is not None and seen.detail is not None:
        detail = {"type": seen.detail.type, **seen.detail.data}
    draft.events.append(
        {
            "build": row["id"],
            "sequence": row["sequence"],
            "type": type_,
            "change": None,
            "observed_by": by,
            "timestamp": now,
            "data": _snapshot(row, previous_state, by) | ({"detail": detail} if detail else {}),
        }
    )


def _snapshot(row: Row, previous_state: str | None, observed_by: str) -> Row:
    started, ended = row["started_at"], row["ended_at"]
    return {
        "build_id": row["build_id"],
        "sequence": row["sequence"],
        "event_id": 0,  # given when it is written
        "source": row["source"],
        "platform": row["platform"],
        "repository": row["repository"],
        "workflow": row["workflow"],
        "branch": row["branch"],
        "commit": row["commit"],
        "trigger": row["trigger"],
        "head_repository": row["head_repository"],
        "is_fork": row["is_fork"],
        "number": row["number"],
        "attempt": row["attempt"],
        "state": row["state"],
        "previous_state": previous_state,
        "conclusion": row["conclusion"],
        "url": row["url"],
        "started_at": iso(started),
        "ended_at": iso(ended),
        "duration_seconds": duration_seconds(started, ended),
        "progress": row["progress"],
        "observed_by": observed_by,
        "error": row["error"],
    }


def duration_seconds(started: datetime | None, ended: datetime | None) -> float | None:
    """Seconds from start to end, never negative; None while either is unknown."""
    if started is None or ended is None:
        return None
    return max((ended - started).total_seconds(), 0.0)


# ---- polling ---------------------------------------------------------------------------------


def _schedule(draft: _Draft, seen: Observation, decided: Verdict, now: datetime, pace: Pace) -> None:
    """Move the next poll, and record what polling itself did."""
    if seen.ours:
        _end_polling(draft, now, pace)
        return
    if seen.observed_by is ObservedBy.POLL:
        _note_poll(draft, decided, now, pace)
    elif polling.was_given_up(draft.row):
        draft.change(polling.after_late_push(draft.row, now, pace))
        return
    else:
        draft.change(polling.after_push(draft.row, now, pace, ask=decided.ask))
    row = draft.row
    if not State(row["state"]).terminal:
        _give_up_when_overdue(draft, now, pace)
    elif not row["doubtful"]:
        if row["polling"] == "active":
            _add_event(draft, "build.polling_completed", None, now, row["state"], _poll_detail(row))
        _end_polling(draft, now, pace)


def _end_polling(draft: _Draft, now: datetime, pace: Pace) -> None:
    """Poll no more; but what only we have ended is read on, since the platform may tell otherwise."""
    row = draft.row
    read_on = polling.was_given_up(row) and row["platform"] != "script"
    draft.change(polling.read_on(row, now, pace) if read_on else polling.ended(row))


def _note_poll(draft: _Draft, decided: Verdict, now: datetime, pace: Pace) -> None:
    if draft.row["polling"] == "stopped":
        draft.change({"last_poll_at": now})
        return  # it was stopped by hand while we were reading
    _begin_polling(draft, now)
    draft.change(polling.after_poll(draft.row, now, pace, ask=decided.ask))


def _begin_polling(draft: _Draft, now: datetime) -> None:
    """Record that polling has begun: once per attempt, and once more after each end of ours."""
    row = draft.row
    if row["polling"] not in ("active", "stopped") and not State(row["state"]).terminal:
        draft.change({"polling": "active"})
        _add_event(draft, "build.polling_started", None, now, row["state"], _poll_detail(row))


def _note_failed_poll(draft: _Draft, fact: PollFailed, now: datetime, pace: Pace) -> None:
    row = draft.row
    had_stopped = row["polling"] == "error"
    draft.change(polling.after_error(row, now, pace, fact.message, fact.fault))
    if row["polling"] == "error" and not had_stopped:
        _add_event(draft, "build.polling_error", None, now, row["state"], _poll_detail(row))


def _give_up_when_overdue(draft: _Draft, now: datetime, pace: Pace) -> None:
    row = draft.row
    if State(row["state"]).terminal or row["polling"] == "error" or not polling.overdue(row, now):
        return
    previous = row["state"]
    _add_event(draft, "build.polling_timeout", None, now, previous, _poll_detail(row))
    draft.change(
        {
            "state": State.TIMEOUT.value,
            "conclusion": Conclusion.TIMED_OUT.value,
            "ended_at": now,
            "ended_synthetic": True,
            "error": f"no end after {row['poll_count']} polls",
            "polling": "timeout",
            "observed_by": ObservedBy.POLL.value,
        }
    )
    _add_event(draft, "build.timeout", None, now, previous)
    _end_polling(draft, now, pace)


def _poll_detail(row: Row) -> Row:
    return {
        "poll_count": row["poll_count"],
        "consecutive_errors": row["consecutive_errors"],
        "error": row["poll_error"],
    }


# ---- writing ---------------------------------------------------------------------------------


def _flush(write: Write, drafts: Sequence[_Draft], now: datetime) -> None:
    connection = write.connection
    for draft in drafts:
        draft.row["updated_at"] = now
    bulk.insert(connection, models.builds, [draft.row for draft in drafts if draft.new])
    bulk.update(connection, models.builds, [draft.row for draft in drafts if not draft.new])
    bulk.insert(connection, models.attempts, [old for draft in drafts for old in draft.superseded])
    corrected = [late for draft in drafts for late in draft.corrected]
    if corrected:
        connection.execute(_CORRECT, corrected)
    collection.plan(write, [ended for draft in drafts for ended in draft.ended])
    events = [event for draft in drafts for event in draft.events]
    for event in events:
        event["id"] = event["data"]["event_id"] = write.new_id("events")
    if events:
        results.note_changes(connection, events)
        bulk.insert(connection, models.events, events)
        bulk.insert(connection, models.notices, notices.of_events(events, _begun(drafts), now))


def _begun(drafts: Sequence[_Draft]) -> set[tuple[int, int]]:
    """Builds and their attempts that these facts have begun."""
    new = {(draft.row["id"], 1) for draft in drafts if draft.new}
    return new | {(old["build"], old["attempt"] + 1) for draft in drafts for old in draft.superseded}


_a = models.attempts.c
_CORRECT = (
    update(models.attempts)
    .where(
        _a.build == bindparam("the_build"),
        _a.attempt == bindparam("the_attempt"),
        or_(_a.ended_synthetic, _a.ended_at.is_(None)),
    )
    .values(
        state=bindparam("the_state"),
        conclusion=bindparam("the_conclusion"),
        error=None,
        started_at=func.coalesce(
            bindparam("the_start", type_=models.Moment), case((~_a.started_synthetic, _a.started_at))
        ),
        ended_at=func.coalesce(bindparam("the_end", type_=models.Moment), _a.ended_at),
        started_synthetic=False,
        ended_synthetic=False,
    )
)


def _plan_earlier(write: Write, drafts: Sequence[_Draft], now: datetime) -> None:
    """Send events from before a branch was known to those who want this branch, in their order.

    A job's push that overtakes its run's does not tell whose branch it names.
    """
    for draft in drafts:
        if draft.branch_found_at:
            ref = {name: draft.row[name] for name in ("branch", "head_repository", "is_fork")}
            deliveries.plan_by_branch(write, draft.row["id"], draft.branch_found_at, ref, now)


# ---- named by a request ----------------------------------------------------------------------

LONGEST_NAME = 1000


def named(write: Write, build_id: str, source: Source, now: datetime) -> Row:
    """Store a build of which only the id is known: queued, and due for its first poll; its row.

    Needs the writer's lock; the caller has found no such build.  Raises `ValueError` if the id can't be
    one of this source.
    """
    seen = platforms.polled()[source.platform].named(source, build_id)
    if seen is None or len(build_id) > LONGEST_NAME:
        raise ValueError(f"{source.platform} builds have no id of this form")
    row = _blank(write, seen, now) | polling.request(now)
    row |= {"repository": seen.repository, "workflow": seen.workflow, "number": seen.number}
    write.connection.execute(insert(models.builds), row)
    return row
