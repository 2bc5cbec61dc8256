"""One call to the API of a platform: an `Answer` whatever its status, or a `PollError`."""

from webhook_app import outbound
from webhook_app.destinations import OutboundError
from webhook_app.platforms import Answer, Call, PollError, PollFault


def send(call: Call, timeout_seconds: float, most_bytes: int) -> Answer:
    """Send it; a GET follows redirects (a renamed repository), and no credentials with them to elsewhere."""
    try:
        reply = outbound.send(
            call.method,
            call.url,
            call.headers,
            call.body,
            timeout_seconds=timeout_seconds,
            byte_cap=most_bytes,
            guard=False,
            follow_redirects=call.method == "GET",
        )
    except OutboundError as error:
        raise PollError(PollFault.UNAVAILABLE, f"{error.reason}: {error}") from error
    if reply.truncated:
        raise PollError(PollFault.UNREADABLE, f"the answer has more than {most_bytes} bytes")
    return Answer(reply.status, reply.headers, reply.body)
