"""One read of a build from its platform: request, answer, and what it says as facts.

The builds of a repository will be read together here; today each is read by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pollers.stale import Due
from webhook_app import outbound, platforms
from webhook_app.builds import Fact, PollFailed
from webhook_app.destinations import OutboundError
from webhook_app.lifecycle import Conclusion, Observation, ObservedBy, State
from webhook_app.platforms import Answer, PollError, PollFault, Request
from webhook_app.settings import SourceSettings

ANSWER_CAP_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Reading:
    """What one read brought: facts to record, or the fault that says how long to leave the source alone."""

    due: Due
    facts: Sequence[Fact] = ()
    fault: PollError | None = None


def read(settings: SourceSettings, due: Due) -> Reading:
    """Read one build.  Never raises for what the platform or the network does."""
    try:
        return Reading(due, (_ask(settings, due),))
    except PollError as error:
        fault = error
    if fault.fault is PollFault.NOT_FOUND:
        return Reading(due, (_not_found(settings, due, fault),))
    if fault.fault in (PollFault.RATE_LIMITED, PollFault.UNAUTHORIZED):
        return Reading(due, (), fault)  # the source's trouble, not this build's
    return Reading(due, (PollFailed(due.target.key, f"{fault.fault.value}: {fault}"),), fault)


def _ask(settings: SourceSettings, due: Due) -> Observation:
    platform = platforms.find()[settings.source.platform]
    request = platform.poll_request(settings.source, due.target)
    if request is None:
        raise PollError(PollFault.UNREADABLE, "this build can't be polled")
    return complete(settings, platform.parse_poll(settings.source, due.target, fetch(settings, request)))


def complete(settings: SourceSettings, seen: Observation) -> Observation:
    """Ask for what a read left open; raises `PollError`.

    Where our token may not know it, the read counts as it is: otherwise such a build would never end.
    """
    platform = platforms.find()[settings.source.platform]
    request = platform.follow_up(settings.source, seen)
    if request is None:
        return seen
    try:
        return platform.parse_follow_up(seen, fetch(settings, request))
    except PollError as error:
        if error.fault in (PollFault.FORBIDDEN, PollFault.NOT_FOUND):
            return seen
        raise


def fetch(settings: SourceSettings, request: Request) -> Answer:
    """Send one read; raises `PollError` when there is no whole answer."""
    try:
        reply = outbound.send(
            "GET",
            request.url,
            request.headers,
            timeout_seconds=settings.timeout_seconds,
            byte_cap=ANSWER_CAP_BYTES,
            guard=False,
            follow_redirects=True,  # a renamed repository
        )
    except OutboundError as error:
        raise PollError(PollFault.UNAVAILABLE, f"{error.reason}: {error}") from error
    if reply.truncated:
        raise PollError(PollFault.UNREADABLE, f"the answer has more than {ANSWER_CAP_BYTES} bytes")
    return Answer(reply.status, reply.headers, reply.body)


def _not_found(settings: SourceSettings, due: Due, fault: PollError) -> Fact:
    """A build that only a request for polling named fails at once; one that was seen may just be hidden."""
    if not due.named_only:
        return PollFailed(due.target.key, f"{PollFault.NOT_FOUND.value}: {fault}")
    return Observation(
        source=settings.source.name,
        platform=settings.source.platform,
        observed_by=ObservedBy.POLL,
        key=due.target.key,
        build_id=due.target.build_id,
        state=State.FAILED,
        conclusion=Conclusion.FAILURE,
        error=f"not found on {settings.source.name}: {fault}",
        ours=True,
    )
