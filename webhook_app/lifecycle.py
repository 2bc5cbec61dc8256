"""The state machine of a build: what was seen, and what it changes.  Pure: no clock, no I/O.

An `Observation` is what one push, poll or report says about one build.  `verdict` holds it
against what is recorded (`Recorded`) and says what to do.  Nothing here knows a platform;
the platform modules translate into these words (spec section 3).

The rules, in the order they are tried:

* a lower attempt changes nothing; a higher one opens that attempt, even if the end of the
  one before was never seen;
* inside an attempt a build only moves up: queued < in_progress < an end;
* an end told by the platform is final for its attempt.  An end that we set ourselves
  (polling gave up, heartbeat lost, not found) yields to a later word;
* an identity can be used twice: a Jenkins job that was made again numbers its builds from 1, a
  restored server gives ids once more.  The platform's queue id and its time of creation tell the
  uses apart; the newer use is a new attempt, words about the older one change nothing;
* a build script numbers no attempts either: `build_started` after an end opens the next one, and any
  other report after an end that the script told changes nothing (see `_reported`);
* a platform without attempt numbers (GitLab) shows a re-run by its jobs: a retry makes job
  ids larger than any seen, a played manual job wakes up.  With that evidence, with an end whose
  own time is later than that of the end we know, or with a poll that tells another state at a time
  later than all we know, a new attempt opens.  Without it, `running` after `success` may be a retry
  or a late delivery: the verdict is `ASK`, and a poll decides.

Order comes from attempt, rank, job ids and the platform's own clock, never from the time of
arrival.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum


class State(StrEnum):
    """The state of a build; the last four are ends."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"

    @property
    def terminal(self) -> bool:
        """Is this an end?"""
        return self not in (State.QUEUED, State.IN_PROGRESS)

    @property
    def rank(self) -> int:
        """0 queued, 1 in progress, 2 any end."""
        return 2 if self.terminal else int(self is State.IN_PROGRESS)


class Conclusion(StrEnum):
    """Why a build is over (or, for `action_required`, why it waits)."""

    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLED = "cancelled"
    NEUTRAL = "neutral"
    SKIPPED = "skipped"
    TIMED_OUT = "timed_out"
    ACTION_REQUIRED = "action_required"
    STALE = "stale"


class ObservedBy(StrEnum):
    """Where a fact comes from: an inbound webhook, our own read, or a build script."""

    PUSH = "push"
    POLL = "poll"
    REPORT = "report"


class JobStatus(StrEnum):
    """The status of one job of a build, as far as progress needs it."""

    QUEUED = "queued"
    MANUAL = "manual"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFact:
    """One job of a build.  Jobs measure progress and give evidence of a retry; they never end a build."""

    id: int
    name: str
    status: JobStatus
    steps_done: int = 0
    steps_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """What a build script tells beside the state: recorded as a `build.reported` event.

    `type` is the script's own word (`stage_started`, `task_completed`, …), `data` its JSON fields.
    """

    type: str
    data: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one push, poll or report says about one build.

    `key` identifies the build whatever the case or the present name of its repository
    (`github:RUN_ID`); `build_id` is the id shown if the build is new.  With an empty `key` the
    observation names no build itself and goes to the one whose `group` it shares (a GitHub check
    run knows only its check suite), or to none.

    `state` None: nothing is said about the state (a job's event, a word we do not know).
    `attempt` None: the platform has no attempt numbers.
    `waiting`: a person or a date is awaited; such a build never times out.
    `platform_at`: the platform's clock for this fact, aware UTC.
    `jobs_complete`: `jobs` is the whole list of the attempt, not one job of it.
    `doubtful`: contradictory in itself (over, but without a conclusion): read it again at once.
    `ours`: an end that BuildRelay sets, not the platform.
    `progress`: percent told by the sender; None lets the jobs say.
    `expected_seconds`: how long the platform expects this build to take in all.
    `unlisted`: its platform's lists do not show it, so their silence says nothing.
    `trigger`: what started it, in the platform's word; `pull_request` and `tag` on every platform.
    `branch`: as it is shown, `OWNER:BRANCH` for a fork's and `refs/tags/NAME` for a tag; None: not known.
    `head_repository`: the fork that the commit is from.  `is_fork` None: this does not say.
    `queue_id`, `created_at`: what tells two uses of one identity apart; both stay through all attempts.
    `job_created_at`: when the job it is about was created, which is after its build was.
    `begins`: a build script says that a run of it begins here.
    `reported_at`: when a build script says that this happened, if it says so; it orders attempts only.
    """

    source: str
    platform: str
    observed_by: ObservedBy
    key: str
    build_id: str
    group: str | None = None
    attempt: int | None = None
    state: State | None = None
    conclusion: Conclusion | None = None
    raw_status: str | None = None
    raw_conclusion: str | None = None
    waiting: bool = False
    repository: str | None = None
    workflow: str | None = None
    branch: str | None = None
    commit: str | None = None
    number: int | None = None
    url: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    platform_at: datetime | None = None
    jobs: tuple[JobFact, ...] = ()
    jobs_complete: bool = False
    progress: int | None = None
    expected_seconds: float | None = None
    error: str | None = None
    doubtful: bool = False
    unlisted: bool = False
    ours: bool = False
    detail: Detail | None = None
    preview_url: str | None = None
    trigger: str | None = None
    head_repository: str | None = None
    is_fork: bool | None = None
    queue_id: str | None = None
    created_at: datetime | None = None
    job_created_at: datetime | None = None
    begins: bool = False
    reported_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What the state machine needs to know of a recorded build.

    `told_state` is the last state the platform told; it differs from `state` only after an end
    that we set ourselves.  `jobs` maps job ids of the current attempt to their status;
    `jobs_complete`: they were the whole list when the state was last told.
    `attempt_base`: attempts of earlier uses of this identity: the platform counts from 1 again after them.
    `ended_at`: the platform's time of the end, None if it is not known; a script's may be ours.
    `queue_id`, `created_at`: as in `Observation`.  `doubtful`: a push left open what a poll decides.
    Of a build script's attempt: `begun`: the script has said that it began; `script_start`, `script_end`:
    when it began and ended by the script's own clock; `started_at`: by that or by ours; `deploying`: it plans
    and deploys, so that its start lies in the middle.
    """

    attempt: int
    state: State
    told_state: State
    conclusion: Conclusion | None = None
    waiting: bool = False
    platform_at: datetime | None = None
    jobs: dict[int, JobStatus] = field(default_factory=dict)
    jobs_complete: bool = False
    attempt_base: int = 0
    ended_at: datetime | None = None
    queue_id: str | None = None
    created_at: datetime | None = None
    doubtful: bool = False
    begun: bool = False
    script_start: datetime | None = None
    script_end: datetime | None = None
    deploying: bool = False
    started_at: datetime | None = None

    @property
    def platform_attempt(self) -> int:
        """The number of the attempt as the platform counts."""
        return self.attempt - self.attempt_base


class Act(Enum):
    """What an observation does to a build."""

    CREATE = "create"  # the first word about this build
    MOVE = "move"  # same attempt, a later state
    REOPEN = "reopen"  # a re-run: the next attempt begins
    ENRICH = "enrich"  # same state, perhaps more facts
    DROP = "drop"  # late, doubled or older: changes nothing
    ASK = "ask"  # cannot be decided from this alone: poll now


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do: for CREATE, MOVE and REOPEN the new attempt and state; `ask` wants a poll at once.

    `anew`: the attempt is the first of a new use of the identity.
    `reason`: why a build script's report is dropped, for its author.
    """

    act: Act
    attempt: int
    state: State
    conclusion: Conclusion | None
    ask: bool = False
    anew: bool = False
    reason: str | None = None


WHOLE_SECONDS = timedelta(seconds=1)
"""Webhooks of GitLab carry whole seconds, REST milliseconds: two times closer than this may be the same."""


def verdict(recorded: Recorded | None, seen: Observation) -> Verdict:
    """Hold an observation against what is recorded of its build (None: nothing yet)."""
    if recorded is None:
        return Verdict(
            Act.CREATE,
            max(seen.attempt or 1, 1),
            seen.state or State.QUEUED,
            seen.conclusion,
            ask=seen.doubtful,
        )
    if seen.ours:
        return _own_end(recorded, seen)
    if seen.observed_by is ObservedBy.REPORT:
        return _reported(recorded, seen)
    return _of_a_platform(recorded, seen)


def _of_a_platform(recorded: Recorded, seen: Observation) -> Verdict:
    """What a push or a poll does."""
    use = compare_use(recorded, seen)
    if use is not Use.SAME:
        return _begin_anew(recorded, seen) if use is Use.NEWER else _drop(recorded)
    if seen.attempt is not None and seen.attempt != recorded.platform_attempt:
        return _other_attempt(recorded, seen, seen.attempt)
    return _same_attempt(recorded, seen)


def _same_attempt(recorded: Recorded, seen: Observation) -> Verdict:
    if seen.state is None:
        return _stay(recorded, seen)
    if recorded.told_state.terminal:
        return _after_the_end(recorded, seen, seen.state)
    if recorded.state.terminal:
        return _after_our_own_end(recorded, seen, seen.state)
    if seen.attempt is None and _is_older(recorded, seen):
        return _drop(recorded)
    if seen.state.rank > recorded.state.rank:
        return _move(recorded, seen, seen.state)
    if seen.state.rank < recorded.state.rank and not seen.waiting:
        return _drop(recorded)
    return _stay(recorded, seen)


def _drop(recorded: Recorded) -> Verdict:
    return Verdict(Act.DROP, recorded.attempt, recorded.state, recorded.conclusion)


def _ask(recorded: Recorded) -> Verdict:
    return Verdict(Act.ASK, recorded.attempt, recorded.state, recorded.conclusion, ask=True)


def _stay(recorded: Recorded, seen: Observation) -> Verdict:
    conclusion = recorded.conclusion
    if not recorded.state.terminal and seen.state is not None and not _precedes(recorded, seen):
        conclusion = seen.conclusion
    return Verdict(Act.ENRICH, recorded.attempt, recorded.state, conclusion, ask=seen.doubtful)


def _move(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    return Verdict(Act.MOVE, recorded.attempt, state, seen.conclusion, ask=seen.doubtful)


def _reopen(seen: Observation, attempt: int) -> Verdict:
    return Verdict(Act.REOPEN, attempt, seen.state or State.QUEUED, seen.conclusion, ask=seen.doubtful)


class Use(Enum):
    """Which use of an identity an observation is about, seen from the recorded one."""

    SAME = "same"
    NEWER = "newer"
    OLDER = "older"


MEASURED_TWICE = timedelta(minutes=1)
"""Jenkins tells a build's start in some messages, in others it follows from the end: they differ by less."""


def compare_use(recorded: Recorded, seen: Observation) -> Use:
    """Tell which use of the identity an observation is about.

    Queue ids decide where both are known.  Else a build that was created after all we know of the recorded
    one (its end included) is another, and one of which all was over before that was created is an earlier.
    """
    if recorded.queue_id is not None and seen.queue_id is not None:
        return _compare_queue_ids(recorded, seen)
    if seen.created_at is not None and _is_created_after(recorded, seen, seen.created_at):
        return Use.NEWER
    if recorded.created_at is None:
        return Use.SAME
    if seen.created_at is None:
        of_earlier = _precedes_creation(recorded.created_at, seen.job_created_at)
        return Use.OLDER if of_earlier else Use.SAME
    latest = max(filter(None, (seen.platform_at, seen.ended_at, seen.created_at)))
    return Use.OLDER if _precedes_creation(recorded.created_at, latest) else Use.SAME


def _precedes_creation(created_at: datetime, at: datetime | None) -> bool:
    return at is not None and at < created_at - MEASURED_TWICE


def _compare_queue_ids(recorded: Recorded, seen: Observation) -> Use:
    """Other queue ids are other builds; the time of creation orders them, or else the ids themselves.

    A controller that was set up anew begins with 1 again: so a start after the end is another build as well.
    """
    known_at = recorded.ended_at if recorded.told_state.terminal else None
    started_later = known_at is not None and seen.created_at is not None and seen.created_at > known_at
    if recorded.queue_id == seen.queue_id:
        return Use.NEWER if started_later else Use.SAME
    if recorded.created_at is not None and seen.created_at is not None:
        return Use.NEWER if seen.created_at > recorded.created_at else Use.OLDER
    known, told = recorded.queue_id or "", seen.queue_id or ""
    return Use.NEWER if (len(told), told) > (len(known), known) else Use.OLDER


def _is_created_after(recorded: Recorded, seen: Observation, created_at: datetime) -> bool:
    """Whether it was created after all that is known of the recorded use.

    A higher attempt number is a re-run, whatever its times.
    """
    known = max(filter(None, (recorded.platform_at, recorded.ended_at, recorded.created_at)), default=None)
    margin = WHOLE_SECONDS if recorded.told_state.terminal else MEASURED_TWICE
    is_rerun = seen.attempt is not None and seen.attempt > recorded.platform_attempt
    return known is not None and not is_rerun and created_at > known + margin


def _begin_anew(recorded: Recorded, seen: Observation) -> Verdict:
    opened = _reopen(seen, recorded.attempt + max(seen.attempt or 1, 1))
    return replace(opened, anew=True)


def _own_end(recorded: Recorded, seen: Observation) -> Verdict:
    """We end only what is still open."""
    if recorded.state.terminal or seen.state is None:
        return _drop(recorded)
    return _move(recorded, seen, seen.state)


def _other_attempt(recorded: Recorded, seen: Observation, attempt: int) -> Verdict:
    """`attempt` is the platform's number."""
    newer = attempt > recorded.platform_attempt
    return _reopen(seen, recorded.attempt_base + attempt) if newer else _drop(recorded)


def _after_our_own_end(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    """The end was ours: a later word of the platform takes its place, an older one does not."""
    later = (
        state.rank > recorded.told_state.rank
        or seen.observed_by is not ObservedBy.PUSH
        or _is_later(recorded, seen)
    )
    return _move(recorded, seen, state) if later else _drop(recorded)


def _after_the_end(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    """The platform said it is over; only a re-run without a number can still be news."""
    if seen.attempt is not None:
        return _stay(recorded, seen) if state is recorded.state else _drop(recorded)
    if not recorded.jobs and recorded.platform_at is None:
        return _stay(recorded, seen) if state is recorded.state else _drop(recorded)
    if _ended_anew(recorded, seen):
        return _reopen(seen, recorded.attempt + 1)
    if _is_older(recorded, seen):
        return _drop(recorded)
    if _job_evidence(recorded, seen):
        return _reopen(seen, recorded.attempt + 1)
    if _same_end(recorded.state, seen, state):
        return _stay(recorded, seen)
    if _ended_before(recorded, seen):
        return _drop(recorded)
    if seen.observed_by is ObservedBy.POLL:
        return _poll_after_the_end(recorded, seen, state)
    return _ask(recorded)


def _same_end(known: State, seen: Observation, state: State) -> bool:
    """GitLab's REST shows a time-out as a plain failure as long as nobody reads its jobs."""
    blurred = seen.observed_by is ObservedBy.POLL and (known, state) == (State.TIMEOUT, State.FAILED)
    return state is known or blurred


def _ended_anew(recorded: Recorded, seen: Observation) -> bool:
    """Whether the platform reports an end later than the one we know, so that it ran again in between.

    A poll tells what is true now: it is held against all we know, also where no end has a time.
    """
    if seen.ended_at is None:
        return False
    known = (recorded.ended_at, recorded.platform_at if seen.observed_by is ObservedBy.POLL else None)
    latest = max(filter(None, known), default=None)
    return latest is not None and seen.ended_at >= latest + WHOLE_SECONDS


def _ended_before(recorded: Recorded, seen: Observation) -> bool:
    """Whether it reports an end earlier than the one we know."""
    if seen.ended_at is None or recorded.ended_at is None:
        return False
    return seen.ended_at <= recorded.ended_at - WHOLE_SECONDS


def _poll_after_the_end(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    """A poll whose clock is later shows a re-run; one within the same second is read again.

    Another end within that second is believed when the read was made for it: a push had told of one.
    """
    if _is_later(recorded, seen, WHOLE_SECONDS) or (state.terminal and recorded.doubtful):
        return _reopen(seen, recorded.attempt + 1)
    return _ask(recorded)


def _job_evidence(recorded: Recorded, seen: Observation) -> bool:
    """Does a job show a re-run: a new id after the end, or a manual job that was played?

    Only where the jobs are those of the end: one that a poll told may lie after jobs we saw waiting.
    """
    if not recorded.jobs or not recorded.jobs_complete:
        return False
    largest = max(recorded.jobs)
    awake = (JobStatus.QUEUED, JobStatus.IN_PROGRESS, JobStatus.COMPLETED)
    return any(
        job.id > largest or (recorded.jobs.get(job.id) is JobStatus.MANUAL and job.status in awake)
        for job in seen.jobs
    )


def _is_older(recorded: Recorded, seen: Observation) -> bool:
    """Do job ids, or else the platform's clock, show that this is from before what we know?"""
    if seen.jobs_complete and seen.jobs and recorded.jobs:
        newest_seen, newest_known = max(job.id for job in seen.jobs), max(recorded.jobs)
        if newest_seen < newest_known:
            return True
        if newest_seen > newest_known and recorded.jobs_complete:
            return False
    if seen.platform_at is None or recorded.platform_at is None:
        return False
    return seen.platform_at < recorded.platform_at - WHOLE_SECONDS


def _precedes(recorded: Recorded, seen: Observation) -> bool:
    if seen.platform_at is None or recorded.platform_at is None:
        return False
    return seen.platform_at < recorded.platform_at


def _is_later(recorded: Recorded, seen: Observation, margin: timedelta = timedelta(0)) -> bool:
    if seen.platform_at is None or recorded.platform_at is None:
        return False
    return seen.platform_at > recorded.platform_at + margin


# ---- reports of build scripts ----------------------------------------------------------------

ENDED = "the run has ended already; build_started opens its next attempt"
OF_AN_EARLIER_RUN = "its timestamp is before the start of the present attempt"
BEFORE_THE_END = "its timestamp is before the end of the run: a late report"
KNOWN_START = "this start of the run was reported before"

CLOCKS_DIFFER = timedelta(minutes=5)
"""A script's clock and ours are compared only as far as the tolerance of signatures goes."""


def _reported(recorded: Recorded, seen: Observation) -> Verdict:
    """What a build script's report does; one that is dropped says why.

    Scripts number no attempts, and their times may come from several machines: such a time tells whether a
    report belongs to the present attempt, it never orders the reports of one attempt.
    """
    if seen.state is None:
        return _stay(recorded, seen)
    if _is_of_an_earlier_run(recorded, seen):
        return _ignored(recorded, OF_AN_EARLIER_RUN)
    if not recorded.state.terminal:
        return _while_it_runs(recorded, seen, seen.state)
    if seen.begins:
        return _begun_after_the_end(recorded, seen, seen.state)
    if not recorded.told_state.terminal:
        return _move(recorded, seen, seen.state)
    return _stay(recorded, seen) if seen.state is recorded.state else _ignored(recorded, ENDED)


def _while_it_runs(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    """A repeated start is the same one, unless the script says that it came later: then an end was lost."""
    started_anew = _is_before(recorded.script_start, seen.reported_at) and not recorded.deploying
    if seen.begins and started_anew:
        return _reopen(seen, recorded.attempt + 1)
    return _move(recorded, seen, state) if state.terminal else _stay(recorded, seen)


def _begun_after_the_end(recorded: Recorded, seen: Observation, state: State) -> Verdict:
    """`build_started` after an end opens the next attempt, unless its time shows that it is late.

    An end of ours may have come before the first `build_started` of the attempt, which then belongs to it:
    in a deployment that report comes in the middle.
    """
    ours, at, start = not recorded.told_state.terminal, seen.reported_at, recorded.script_start
    if ours and not recorded.begun:
        return _move(recorded, seen, state)
    if at is not None and start is not None and at <= start:
        return _ignored(recorded, KNOWN_START)
    end = recorded.ended_at if start is None else recorded.script_end
    if not ours and _is_before(at, end):
        return _ignored(recorded, BEFORE_THE_END)
    return _reopen(seen, recorded.attempt + 1)


def _is_of_an_earlier_run(recorded: Recorded, seen: Observation) -> bool:
    """Whether its time shows that a report belongs to a run before the present attempt.

    Not in a first attempt, before which none is known: a clock that is wrong must not cost a build its end.
    """
    began = recorded.script_start
    if began is None and recorded.started_at is not None:
        began = recorded.started_at - CLOCKS_DIFFER
    return recorded.attempt > 1 and _is_before(seen.reported_at, began)


def _is_before(moment: datetime | None, other: datetime | None) -> bool:
    return moment is not None and other is not None and moment < other


def _ignored(recorded: Recorded, reason: str) -> Verdict:
    return Verdict(Act.DROP, recorded.attempt, recorded.state, recorded.conclusion, reason=reason)
