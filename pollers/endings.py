"""One look at what an ended attempt left: its logs, an error that they tell, the list of its artifacts.

What can't be had is either `never` (with the reason) or not yet; nothing that a platform or the network
does comes out as an exception.  Logs are streamed: a log of any size costs the memory of what is kept.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, TypeVar, cast

from webhook_app import archives, logs, outbound, platforms
from webhook_app.account import Account
from webhook_app.collection import MOST_TRIES, Brought, Claimed, Found
from webhook_app.destinations import OutboundError
from webhook_app.logs import Keeper, Log
from webhook_app.outbound import Reply, Sink
from webhook_app.platforms import Answer, EndedJob, FileApi, LogFile, PollError, PollFault, Request, Source
from webhook_app.platforms._read import next_page, poll_error
from webhook_app.redaction import Redactor

Item = TypeVar("Item")

ANSWER_CAP_BYTES = 8 * 1024 * 1024
LOG_CAP_BYTES = 128 * 1024 * 1024
"""A log, the ZIP of a run, and all that is in it: more is not read."""
_GOES_ON = f"[… it goes on: more than {LOG_CAP_BYTES} bytes are not read …]"
LOOK_SECONDS = 90.0
MOST_PAGES = 5
MOST_LOGS = 20
RATE_LIMIT_SECONDS = 60.0
UNAUTHORIZED_SECONDS = 300.0
_OF_THE_SOURCE = (PollFault.RATE_LIMITED, PollFault.UNAUTHORIZED)


class Never(Exception):
    """It is not there and never will be; `str()` is the reason, one word."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was brought, and the fault that says how long to leave the source alone."""

    brought: Brought
    fault: PollError | None = None


def look(account: Account, source: Source, claimed: Claimed, redact: Redactor) -> Look:
    """Read what is still wanted of one attempt.

    One that was claimed too often has killed its readers; one that was replaced has left nothing.
    """
    if claimed.tries > MOST_TRIES or claimed.is_replaced:
        why = PollFault.NOT_FOUND if claimed.is_replaced else PollFault.UNAVAILABLE
        never = Found(never=why.value)
        return Look(Brought(never if claimed.wants_log else None, never if claimed.wants_artifacts else None))
    return _Reader(account, source, claimed, redact).look()


@dataclass(slots=True)
class _Reader:
    """One look: the platform, the time left, and the answers so far (GitLab tells two things in one)."""

    account: Account
    source: Source
    claimed: Claimed
    redact: Redactor
    platform: FileApi = field(init=False)
    deadline: float = field(init=False)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        platform = platforms.file_api(self.source.platform)
        assert platform is not None
        self.platform = platform
        self.deadline = time.monotonic() + LOOK_SECONDS

    def look(self) -> Look:
        """The log first: with it comes the error."""
        log = artifacts = None
        try:
            if self.claimed.wants_log:
                log = self._find(self._log)
            if self.claimed.wants_artifacts:
                artifacts = self._find(self._artifacts)
        except PollError as fault:
            seconds = fault.retry_after_seconds or (
                RATE_LIMIT_SECONDS if fault.fault is PollFault.RATE_LIMITED else UNAUTHORIZED_SECONDS
            )
            return Look(Brought(log, artifacts, self.error, postponed_seconds=seconds), fault)
        return Look(Brought(log, artifacts, self.error))

    def _find(self, read: Callable[[], object]) -> Found:
        """What `read` brings, or why not; a fault of the whole source is raised."""
        try:
            return Found(value=read())
        except Never as reason:
            return Found(never=str(reason))
        except PollError as fault:
            if fault.fault in _OF_THE_SOURCE:
                raise
            if fault.fault is PollFault.FORBIDDEN:
                return Found(never=fault.fault.value)
            return Found(not_yet=fault.fault.value)

    # Lists --------------------------------------------------------------------------------------

    def _items(
        self, request: Request | None, parse: Callable[[Answer], tuple[Item, ...]]
    ) -> tuple[Item, ...]:
        """The items of all pages."""
        if request is None:
            return ()
        if request.url not in self.answers:
            self.answers[request.url] = list(self._pages(request))
        return tuple(item for answer in self.answers[request.url] for item in parse(answer))

    def _pages(self, request: Request) -> Iterable[Answer]:
        following: Request | None = request
        for _ in range(MOST_PAGES):
            if following is None:
                return
            answer = _answer(self._send(following, ANSWER_CAP_BYTES))
            yield answer
            more = next_page(self.source, answer)
            following = replace(following, url=more) if more else None

    def _artifacts(self) -> object:
        request = self.platform.artifacts_request(self.source, self.claimed.target)
        if request is None or not self.claimed.is_current:
            raise Never("not_offered" if request is None else "not_kept")
        found = platforms.newest(self._items(request, self.platform.parse_artifacts))
        return tuple(replace(one, name=self.redact.identity(one.name)) for one in found)

    # Logs ---------------------------------------------------------------------------------------

    def _log(self) -> Log:
        source, target = self.source, self.claimed.target
        request = self.platform.ended_jobs_request(source, target)
        jobs = self._items(request, self.platform.parse_ended_jobs)
        files = self.platform.log_files(source, target, jobs, not self.claimed.failed)[:MOST_LOGS]
        found, missing = self._texts(files)
        if self.claimed.wants_error:
            self.error = self._error(found, jobs, titled=len(jobs) > 0)
        if not found:
            raise missing or Never("no_job_ran")
        return logs.joined(found)

    def _texts(self, files: Sequence[LogFile]) -> tuple[list[tuple[str, Log]], Exception | None]:
        """Each log by its title, and why one is missing.  It holds up the others only until the last try."""
        head, tail = logs.shares(len(files))
        found: list[tuple[str, Log]] = []
        missing: Exception | None = None
        for file in files:
            try:
                texts = self._zipped(file) if file.zipped else [(file.title, self._plain(file, head, tail))]
                found += [(self.redact.name(title), text) for title, text in texts]
            except Never as reason:
                missing = reason
            except PollError as fault:
                if not self.claimed.last_try or fault.fault in _OF_THE_SOURCE:
                    raise
                missing = fault
        return found, missing

    def _plain(self, file: LogFile, head: int, tail: int) -> Log:
        """A log that is one text; only its two ends are read if the end can be asked for."""
        keeper, most = Keeper(head, tail), LOG_CAP_BYTES
        reply = self._take(file.request, keeper, head if file.tailed else most)
        if file.tailed and reply.truncated:
            end = self.platform.log_tail(file, reply.headers, keeper.total, tail)
            if end is not None:
                keeper.skip(end[1] - keeper.total)
                reply = self._take(end[0], keeper, most)
        if self.platform.log_grows(reply.headers) and not self.claimed.last_try:
            raise PollError(PollFault.UNAVAILABLE, "the log still grows")
        text = logs.text_of(keeper, self.redact)
        return replace(text, lines=(*text.lines, _GOES_ON), truncated=True) if reply.truncated else text

    def _take(self, request: Request, into: Sink, most_bytes: int) -> Reply:
        """Stream an answer; raises `Never` or `PollError` if it is no log."""
        reply = self._send(request, most_bytes, into)
        if reply.status != 200:
            raise poll_error(_answer(reply))
        if reply.headers.get("content-type", "").startswith("text/html"):
            raise PollError(PollFault.UNREADABLE, "HTTP 200, but a web page")
        return reply

    def _zipped(self, file: LogFile) -> list[tuple[str, Log]]:
        with tempfile.TemporaryFile() as spool:
            if self._take(file.request, cast(Sink, spool), LOG_CAP_BYTES).truncated:
                raise Never("too_large")
            try:
                return self._unzipped(spool)
            except archives.BadArchive as error:
                raise Never("unreadable") from error

    def _unzipped(self, spool: BinaryIO) -> list[tuple[str, Log]]:
        names = archives.text_files(spool)[:MOST_LOGS]
        head, tail = logs.shares(len(names))
        room = LOG_CAP_BYTES
        found = []
        for name in names:
            keeper = Keeper(head, tail)
            room -= archives.read(spool, name, keeper.write, room)
            found.append((_title(name), logs.text_of(keeper, self.redact)))
        return found

    # Errors -------------------------------------------------------------------------------------

    def _error(
        self, found: Sequence[tuple[str, Log]], jobs: Sequence[EndedJob], *, titled: bool
    ) -> str | None:
        """The first log that tells one; else what the platform says of the first failed job."""
        told = [(title, error) for title, log in found if (error := logs.error_of(log.lines))]
        strong = next(((title, error) for title, error in told if not logs.says_nothing(error)), None)
        best = strong or self._annotated(jobs) or next(iter(told), None)
        return best and logs.short(f"{best[0]}: {best[1]}" if titled else best[1])

    def _annotated(self, jobs: Sequence[EndedJob]) -> tuple[str, str] | None:
        """It costs a request, and is only worth it where the logs say nothing."""
        job = next((job for job in jobs if job.failed), None)
        if job is None:
            return None
        request = self.platform.annotations_request(self.source, self.claimed.target, job)
        try:
            notes = self._items(request, self.platform.parse_annotations)
        except (Never, PollError):
            return None
        texts = [self.redact(note) for note in notes if not logs.says_nothing(note)]
        return (self.redact.name(job.name), "; ".join(texts[: logs.MOST_ERROR_LINES])) if texts else None

    # The wire -----------------------------------------------------------------------------------

    def _send(self, request: Request, most_bytes: int, into: Sink | None = None) -> Reply:
        """One GET within the time of this look; raises `Never` for what is gone."""
        with self.account.turn(self._left()) as turn:
            left = self._left()
            most_seconds = left if into is not None else min(left, self.account.settings.timeout_seconds)
            try:
                reply = outbound.send(
                    "GET",
                    request.url,
                    request.headers,
                    timeout_seconds=most_seconds,
                    byte_cap=most_bytes,
                    guard=False,
                    follow_redirects=True,
                    into=turn.over_at_first(into) if into is not None else None,
                )
            except OutboundError as error:
                raise PollError(PollFault.UNAVAILABLE, f"{error.reason}: {error}") from error
            turn.answer = Answer(reply.status, reply.headers, reply.body)
        if reply.status == 410:
            raise Never("gone")
        return reply

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise PollError(PollFault.UNAVAILABLE, "timeout: the look took too long")
        return left


def _answer(reply: Reply) -> Answer:
    if reply.truncated:
        raise PollError(PollFault.UNREADABLE, f"the answer has more than {ANSWER_CAP_BYTES} bytes")
    return Answer(reply.status, reply.headers, reply.body)


def _title(name: str) -> str:
    """`0_build.txt` → `build`; whatever else a name holds, it is one short printable word."""
    bare = name.removesuffix(".txt").rpartition("/")[2]
    number, mark, rest = bare.partition("_")
    title = rest if mark and number.isdigit() else bare
    return "".join(letter for letter in title if letter.isprintable())[:100]
