"""Requests beside the polling, for logs, downloads and webhooks: each is charged to the lane of its token.

Background work is `patient`: where a platform wants the requests of a token one after the other, each
waits for its turn in the lane.  People do not wait, and may use the reserve; a limit that the platform
has set is kept by everybody.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import Engine

from webhook_app import api_health, budget, db
from webhook_app.budget import Lane, Spent
from webhook_app.destinations import OutboundError
from webhook_app.outbound import Sink
from webhook_app.platforms import Answer, PollError, PollFault, polled
from webhook_app.platforms._read import poll_error
from webhook_app.settings import SourceSettings
from webhook_app.times import iso, utc_now

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
"""Between two looks of whoever waits for a turn, whether it has come."""
MARGIN = timedelta(seconds=10)


@dataclass(slots=True)
class Account:
    """What one source is asked beside the polling.

    `engine` None, or a store that is away: nothing is noted.  `reserve`: see `budget.Lane`.  `secrets`: what
    the text of an error that is noted must not show, besides the source's own token.
    """

    settings: SourceSettings
    engine: Engine | None
    reserve: float = 0.0
    patient: bool = False
    clock: Callable[[], datetime] = utc_now
    secrets: Sequence[str] = ()

    @property
    def lane(self) -> Lane:
        """The lane of the source's token."""
        return budget.lane_of(self.settings, self.reserve)

    @contextmanager
    def turn(self, most_seconds: float) -> Iterator["Turn"]:
        """Around one request that takes `most_seconds`; as long it may be waited for.

        Raises `PollError` before anything is asked: there is a limit to be waited for, or no turn to be had.
        """
        self._refuse_while_limited()
        turn = Turn(self)
        if self.patient and polled()[self.settings.source.platform].MANNERS.at_once == 1:
            turn.wait(most_seconds)
        try:
            yield turn
        except Exception as error:
            turn.failure = _failure(error)
            raise
        finally:
            turn.end()

    def keep(self, unit: Callable[[db.Write], object]) -> None:
        """Write to the store; one that is away is not tried again, since somebody may be waiting."""
        if self.engine is None:
            return
        try:
            db.as_writer(self.engine, unit)
        except db.StoreUnavailable as error:
            log.warning("not noted: a request to %s: %s", self.settings.source.name, error)
            self.engine = None

    def _refuse_while_limited(self) -> None:
        if self.engine is None:
            return
        name, now = self.settings.source.name, self.clock()
        try:
            with db.reading(self.engine) as connection:
                until = budget.limited_until(connection, name, now)
        except db.StoreUnavailable:
            self.engine = None
            return
        if until is not None:
            told = f"{name} is left alone until {iso(until)}: a limit was reached"
            raise PollError(PollFault.RATE_LIMITED, told, (until - now).total_seconds())


@dataclass(slots=True)
class Turn:
    """One request.  Whoever makes it notes the answer; none: there was none, and `failure` says why."""

    account: Account
    owner: str = field(default_factory=budget.turn_owner)
    answer: Answer | None = None
    failure: PollError | None = None

    def wait(self, most_seconds: float) -> None:
        """Own the lane; raises `PollError` if it does not come free in time."""
        account, begun = self.account, time.monotonic()
        engine = account.engine
        assert engine is not None, "who waits has a store"

        def unit(write: db.Write) -> object:
            now = account.clock()
            until = now + timedelta(seconds=most_seconds) + MARGIN
            return budget.take(write, account.lane, [account.settings.source.name], self.owner, until, now)

        while db.as_writer(engine, unit) is None:
            if time.monotonic() - begun > most_seconds:
                raise PollError(PollFault.UNAVAILABLE, "timeout: others ask with the same token")
            time.sleep(LOOK_SECONDS)

    def over_at_first(self, into: Sink) -> Sink:
        """`into`, for a body: when it begins to come the next request may be made."""
        return _Beginning(self, into)

    def give_back(self) -> None:
        """Let the next one ask."""
        self.account.keep(lambda write: budget.give_back(write, self.account.lane, self.owner))

    def end(self) -> None:
        """Charge the request, give the lane back, and keep to a limit that was reached."""
        account, now, answer = self.account, self.account.clock(), self.answer
        source = account.settings.source
        told = polled()[source.platform].limits(answer) if answer else None
        fault = _limit(answer) if answer else None
        worked = answer is not None and answer.status < 400
        failure = self.failure or (poll_error(answer) if answer and not worked else None)

        def unit(write: db.Write) -> None:
            budget.open_lane(write, account.lane, [source.name], now)
            faults = [fault] if fault else []
            after = budget.settle(
                write, account.lane, self.owner, Spent(1, 1, told), now, faults, worked=worked
            )
            if failure:
                api_health.note_failed_request(write.connection, source, failure, now, account.secrets)
            if fault:
                budget.note(write, set(), [(source.name, fault)], now, after.strikes - 1)

        account.keep(unit)


def _failure(error: Exception) -> PollError | None:
    """What an exception that ended a request says of the API; None: nothing, it is ours."""
    cause = error if isinstance(error, PollError) else error.__cause__
    if isinstance(cause, OutboundError):
        return PollError(PollFault.UNAVAILABLE, f"{cause.reason}: {cause}")
    return cause if isinstance(cause, PollError) else None


def _limit(answer: Answer) -> PollError | None:
    """The limit that an answer tells of, if it does."""
    if answer.status not in (403, 429):
        return None
    fault = poll_error(answer)
    return fault if fault.fault is PollFault.RATE_LIMITED else None


@dataclass(slots=True)
class _Beginning:
    """A body's sink that gives the turn back with the first piece."""

    turn: Turn
    into: Sink
    begun: bool = False

    def write(self, piece: bytes, /) -> None:
        if not self.begun:
            self.begun = True
            self.turn.give_back()
        self.into.write(piece)
