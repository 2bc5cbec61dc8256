"""Every JSON shape of the API, in and out; the OpenAPI document is made of these.

Input is strict: unknown fields, wrong JSON types and text that no database can store are refused.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, missing, validates_schema
from marshmallow.validate import Length, OneOf, Range

from webhook_app import circuit, formats, results, subscribers, tokens, waiting
from webhook_app.lifecycle import Conclusion, ObservedBy, State
from webhook_app.platforms import PollFault
from webhook_app.queries import LARGEST_ID
from webhook_app.times import iso

MOST_ITEMS = 200
ITEMS = 50
NO_CURSOR = "This is no cursor of this list."

_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)

STATES = tuple(state.value for state in State)
CONCLUSIONS = tuple(conclusion.value for conclusion in Conclusion)
FAULTS = tuple(fault.value for fault in PollFault)
ORIGINS = tuple(origin.value for origin in ObservedBy)


# ---- fields ----------------------------------------------------------------------------------


class Text(fields.String):
    """Text that every database can store: no NUL, no half of a surrogate pair."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValidationError("This text can't be stored: it holds a NUL or half a character.")
        return text


class Whole(fields.Integer):
    """A whole number that is a JSON number; `5.0` is one."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self.make_error("invalid", input=value)
        return int(value)


class Truth(fields.Boolean):
    """JSON's true or false, and no words for them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Moment(fields.DateTime):
    """ISO 8601 with a zone in, UTC with `Z` out."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return iso(value)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except (ValueError, TypeError):
            moment = None
        if moment is None or moment.tzinfo is None or not _EARLIEST <= moment <= _LATEST:
            raise ValidationError("A time like 2026-11-01T10:00:00Z is needed.")
        return moment


class Number(fields.Integer):
    """A whole number of a query; an empty one (`?lastEventId=`) was not given."""

    def deserialize(self, value: Any, *given: Any, **named: Any) -> Any:
        """The default for an empty text."""
        return super().deserialize(missing if value == "" else value, *given, **named)


class Cursor(Text):
    """Where a list goes on: opaque to clients, inside the key of the last row shown.

    An empty one is refused: a client that has passed the last page must not begin anew.
    """

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        text = super()._deserialize(value, attr, data, **kwargs)
        try:
            key = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode("ascii")
        except (binascii.Error, ValueError):
            raise ValidationError(NO_CURSOR) from None
        if not key or not key.isprintable():
            raise ValidationError(NO_CURSOR)
        return key


class IdCursor(Cursor):
    """A cursor over whole numbers."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        key = super()._deserialize(value, attr, data, **kwargs)
        if not key.isdigit() or len(key) > 19 or int(key) > LARGEST_ID:
            raise ValidationError(NO_CURSOR)
        return int(key)


class PairCursor(Cursor):
    """A cursor over a text id and a whole number."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        name, _, number = super()._deserialize(value, attr, data, **kwargs).rpartition(" ")
        if not name or not number.isdigit() or len(number) > 19 or int(number) > LARGEST_ID:
            raise ValidationError(NO_CURSOR)
        return name, int(number)


def cursor(key: object) -> str:
    """The cursor that goes on after the row with this key."""
    return base64.urlsafe_b64encode(str(key).encode("ascii")).rstrip(b"=").decode("ascii")


def _event_glob(glob: str) -> None:
    try:
        subscribers.check_event_glob(glob)
    except ValueError as error:
        raise ValidationError(str(error)) from None


def _globs(*more: Callable[[str], None]) -> fields.List[Any]:
    return fields.List(
        Text(validate=[Length(1, subscribers.LONGEST_GLOB), *more]),
        validate=Length(max=subscribers.MOST_GLOBS),
        metadata={"description": "Globs; an empty list means all."},
    )


def _words(words: tuple[str, ...], about: str) -> fields.List[Any]:
    return fields.List(
        Text(validate=OneOf(words)), validate=Length(max=len(words)), metadata={"description": about}
    )


def _out(kind: Any, *args: Any, null: bool = False, about: str = "", **more: Any) -> Any:
    """A field of an answer: always there; `null` says that it may be null."""
    metadata = {"description": about} if about else {}
    return kind(*args, required=True, allow_none=null, metadata=metadata, **more)


def _word(words: tuple[str, ...], null: bool = False, about: str = "") -> Any:
    return _out(Text, null=null, about=about, validate=OneOf([*words, None] if null else words))


# ---- questions -------------------------------------------------------------------------------


class Strict(Schema):
    """Refuses what it does not know."""

    class Meta:
        """marshmallow's options."""

        unknown = RAISE


def _limit() -> Number:
    return Number(load_default=ITEMS, validate=Range(1, MOST_ITEMS))


class PageQuery(Strict):
    """A page of a list ordered by number."""

    cursor = IdCursor(metadata={"description": "`next_cursor` of the page before."})
    limit = _limit()


class NamedPageQuery(Strict):
    """A page of a list ordered by a text id."""

    cursor = Cursor(load_default="", metadata={"description": "`next_cursor` of the page before."})
    limit = _limit()


class BuildsQuery(PageQuery):
    """Filters of `GET /api/builds`; several must all hold."""

    source = Text()
    repository = Text(metadata={"description": "`octo/hello`, in any case."})
    branch = Text(metadata={"description": "A branch of the repository; a fork's is `OWNER:BRANCH`."})
    forks = fields.Boolean(metadata={"description": "With `branch`: a fork's branch of that name as well."})
    state = Text(validate=OneOf(STATES))
    conclusion = Text(validate=OneOf(CONCLUSIONS))
    workflow = Text()
    since = Moment(metadata={"description": "First heard of at this time or later."})
    until = Moment(metadata={"description": "First heard of before this time."})


class LogQuery(Strict):
    """Which part of a build's log."""

    tail = Number(validate=Range(1, 100_000), metadata={"description": "Only the last lines."})
    attempt = Number(
        validate=Range(1, 2**31 - 1), metadata={"description": "An earlier attempt; else the present one."}
    )


class BuildEventsQuery(Strict):
    """Where a client that polls one build goes on."""

    lastEventId = Number(  # noqa: N815  the name of the progress API
        load_default=0,
        validate=Range(0, LARGEST_ID),
        metadata={"description": "Only events after this one."},
    )


class EventsQuery(Strict):
    """Where a client that was away goes on; `cursor` is the same as `after`."""

    after = Number(load_default=0, validate=Range(0, LARGEST_ID))
    cursor = Number(validate=Range(0, LARGEST_ID))
    strict = fields.Boolean(
        load_default=False, metadata={"description": "410 where the next event was deleted by retention."}
    )
    limit = _limit()


class InboundQuery(PageQuery):
    """Filters of `GET /api/inbound`."""

    source = Text()
    status = Text(validate=OneOf(("applied", "ignored", "unreadable")))


class DeliveriesQuery(PageQuery):
    """Filters of a subscriber's deliveries."""

    state = Text(validate=OneOf(("pending", "delivered", "dead")))


class DeadLettersQuery(Strict):
    """Filters of `GET /api/deliveries`, the dead-letter list."""

    state = Text(
        load_default="dead",
        validate=OneOf(("dead",)),
        metadata={"description": "Only dead ones are listed over all subscribers."},
    )
    reason = Text(metadata={"description": "As a delivery shows it: `http_500`, `timeout`, …"})
    subscriber = Text(metadata={"description": "The id of a subscriber."})
    cursor = PairCursor(metadata={"description": "`next_cursor` of the page before."})
    limit = _limit()


class BuildStatusQuery(Strict):
    """How long a silent build counts as running."""

    heartbeatTimeout = Number(load_default=90, validate=Range(1, 86_400))  # noqa: N815


# ---- bodies ----------------------------------------------------------------------------------


class SubscriberChange(Strict):
    """What can be changed of a subscriber; what is not named stays."""

    url = Text(
        validate=Length(1, subscribers.LONGEST_URL),
        metadata={"description": "https; where events are posted."},
    )
    events = _globs(_event_glob)
    sources = _globs()
    repositories = _globs()
    branches = _globs()
    forks = Truth(metadata={"description": "`branches` and `changes` look at builds of forks as well."})
    description = Text(allow_none=True, validate=Length(max=subscribers.LONGEST_DESCRIPTION))
    rate_limit_per_second = Whole(allow_none=True, validate=Range(1, subscribers.MOST_PER_SECOND))
    ordered = Truth(metadata={"description": "One build's events in their order."})
    headers = fields.Dict(
        keys=Text(), values=Text(), metadata={"description": "Sent with each request; never shown again."}
    )
    format = Text(validate=OneOf(formats.FORMATS), metadata={"description": "The shape of the body."})
    states = _words(STATES, "States; an empty list means all.")
    conclusions = _words(CONCLUSIONS, "Conclusions; an empty list means all, also none.")
    changes = _words(
        results.CHANGES, "Only ends that changed the result of their workflow and branch so; empty means all."
    )


class NewSubscriber(SubscriberChange):
    """A callback URL and which events it wants."""

    url = Text(
        required=True,
        validate=Length(1, subscribers.LONGEST_URL),
        metadata={"description": "https; where events are posted."},
    )
    signing = Text(load_default="hmac", validate=OneOf(("hmac", "ed25519")))


class Rotation(Strict):
    """How long the previous secret goes on signing."""

    grace_seconds = Whole(
        load_default=subscribers.DEFAULT_GRACE_SECONDS,
        validate=Range(0, subscribers.MOST_GRACE_SECONDS),
    )


class Replay(Strict):
    """Which events are sent again."""

    since = Moment(required=True, metadata={"description": "Events recorded at this time or later."})
    until = Moment(metadata={"description": "Events recorded before this time; without it, all until now."})
    only = Text(  # type: ignore[assignment]  # a field here, an attribute of each schema there
        load_default="missing",
        validate=OneOf(("missing", "all")),
        metadata={"description": "`missing`: not those that were delivered."},
    )
    dry_run = Truth(load_default=False, metadata={"description": "Count only."})

    @validates_schema
    def _in_order(self, data: Mapping[str, Any], **_: Any) -> None:
        if "until" in data and data["until"] <= data["since"]:
            raise ValidationError("This is not after `since`.", "until")


class Redrive(Strict):
    """Which dead deliveries are sent again; without anything, all."""

    subscriber_id = Text()
    reason = Text()


class NewToken(Strict):
    """A token for a person or a program."""

    name = Text(required=True, validate=Length(1, 255))
    scopes = fields.List(
        Text(validate=OneOf(tokens.SCOPES)),
        required=True,
        validate=Length(1, len(tokens.SCOPES)),
    )


# ---- answers ---------------------------------------------------------------------------------


class Problem(Schema):
    """RFC 9457."""

    type = _out(Text)
    title = _out(Text)
    status = _out(fields.Integer)
    detail = _out(Text)
    errors = fields.Dict(metadata={"description": "What is wrong, by place and field."})


class Build(Schema):
    """One run, pipeline, Jenkins build or script run, in its current attempt."""

    build_id = _out(Text)
    source = _out(Text)
    platform = _out(Text)
    repository = _out(Text, null=True)
    workflow = _out(Text, null=True)
    branch = _out(Text, null=True)
    commit = _out(Text, null=True)
    number = _out(fields.Integer, null=True)
    attempt = _out(fields.Integer)
    state = _word(STATES)
    conclusion = _word(CONCLUSIONS, null=True)
    url = _out(Text, null=True)
    started_at = _out(Moment, null=True)
    ended_at = _out(Moment, null=True)
    duration_seconds = _out(fields.Float, null=True)
    progress = _out(fields.Integer, about="0 to 100; never falls within an attempt.")
    observed_by = _word(ORIGINS)
    trigger = _out(Text, null=True, about="What started it: `push`, `pull_request`, `schedule`, `tag`, …")
    head_repository = _out(Text, null=True, about="The fork that the commit is from; null: none, or gone.")
    is_fork = _out(fields.Boolean, about="It builds a fork's commit: its branch is none of the repository.")
    last_push_at = _out(Moment, null=True)
    last_poll_at = _out(Moment, null=True)
    error = _out(Text, null=True, about="Of its end; while it goes on, that polling it stopped after errors.")


class Attempt(Schema):
    """One attempt of a build, as it stands or as it stood when the next one began."""

    attempt = _out(fields.Integer)
    state = _word(STATES)
    conclusion = _word(CONCLUSIONS, null=True)
    started_at = _out(Moment, null=True)
    ended_at = _out(Moment, null=True)
    duration_seconds = _out(fields.Float, null=True)
    progress = _out(fields.Integer)
    observed_by = _word(ORIGINS)
    error = _out(Text, null=True)


COLLECTED = ("stored", "pending", "unavailable")
REASONS = (
    "Why it is not there: `not_ended`, `queued`, or the platform's last answer (`not_found`, `unavailable`, "
    "`unreadable`); for good: these, `gone`, `forbidden`, `no_job_ran`, `too_large`, `not_offered`, "
    "`not_kept`, `source_off`, `past_retention`."
)


class BuildLog(Schema):
    """The log of an attempt, as far as it is kept."""

    build_id = _out(Text)
    attempt = _out(fields.Integer)
    state = _word(COLLECTED)
    reason = _out(Text, null=True, about=REASONS)
    truncated = _out(fields.Boolean, about="It was larger than what is kept; a line says where.")
    lines = _out(fields.List, Text())


class Artifact(Schema):
    """A file that a build left."""

    name = _out(Text)
    size_bytes = _out(fields.Integer, null=True)
    digest = _out(Text, null=True, about="`sha256:…` of what a download brings.")
    digest_by = _word(("platform", "relay"), null=True)
    created_at = _out(Moment, null=True)
    expires_at = _out(Moment, null=True)
    expired = _out(fields.Boolean)


class ProgressEvent(Schema):
    """An event in the words of the progress API."""

    id = _out(fields.Integer)
    sequence = _out(fields.Integer)
    type = _out(Text)
    data = _out(fields.Dict)
    timestamp = _out(Moment)
    observedBy = _word(ORIGINS)  # noqa: N815


class ProgressEvents(Schema):
    """Events of a build; hand `lastEventId` in again to go on."""

    buildId = _out(Text)  # noqa: N815
    events = _out(fields.List, fields.Nested(ProgressEvent))
    lastEventId = _out(fields.Integer)  # noqa: N815


class ProgressStatus(Schema):
    """How far a build is, in the words of the progress API."""

    buildId = _out(Text)  # noqa: N815
    status = _word(("unknown", "planning", "executing", "deploying", "completed", "failed"))
    state = _word(STATES, null=True)
    conclusion = _word(CONCLUSIONS, null=True)
    progress = _out(fields.Integer, about="0 to 100; it never falls within an attempt.")
    progressBasis = _word(("steps", "jobs", "history", "report", "none"))  # noqa: N815
    etaSeconds = _out(  # noqa: N815
        fields.Float,
        null=True,
        about="By earlier runs. Null: it does not run, has no history, or takes longer than all of them.",
    )
    previewUrl = _out(Text, null=True)  # noqa: N815
    error = _out(Text, null=True)
    eventCount = _out(fields.Integer)  # noqa: N815
    lastUpdate = _out(Moment, null=True)  # noqa: N815


class Polling(Schema):
    """Whether a build is polled, why, and how that goes."""

    buildId = _out(Text)  # noqa: N815
    isPolling = _out(fields.Boolean)  # noqa: N815
    reason = _out(Text, about="One word: why it is, or is not, being polled.")
    pollCount = _out(fields.Integer)  # noqa: N815
    lastPollTime = _out(Moment, null=True)  # noqa: N815
    nextPollTime = _out(Moment, null=True)  # noqa: N815
    consecutiveErrors = _out(fields.Integer)  # noqa: N815
    error = _out(Text, null=True)


class Circuit(Schema):
    """The circuit breaker of a subscriber: what it still gets after failures in a row."""

    state = _word(circuit.STATES)
    failures_in_row = _out(fields.Integer, about="Without a success between; five open it.")
    probe_at = _out(Moment, null=True, about="While it is open: when one message is tried next.")
    probe_wait_seconds = _out(fields.Float, null=True, about="Doubled by each probe that fails, up to 300.")
    concurrency_limit = _out(
        fields.Integer, null=True, about="While it is half open: requests under way at once, at most."
    )


class Subscriber(Schema):
    """A registered callback URL.  Its secret is shown only when it is made."""

    id = _out(Text)
    url = _out(
        Text,
        about="Whole for tokens with `write`; others see scheme, host and the last four characters.",
    )
    events = _out(fields.List, Text())
    sources = _out(fields.List, Text())
    repositories = _out(fields.List, Text())
    branches = _out(fields.List, Text())
    forks = _out(fields.Boolean)
    description = _out(Text, null=True)
    rate_limit_per_second = _out(fields.Integer, null=True)
    ordered = _out(fields.Boolean)
    headers = _out(
        fields.Dict, null=True, about="Names with masked values; null if no key in ENCRYPTION_KEYS fits."
    )
    format = _word(formats.FORMATS)
    states = _out(fields.List, Text())
    conclusions = _out(fields.List, Text())
    changes = _out(fields.List, Text())
    signing = _word(("hmac", "ed25519"))
    public_key = _out(Text, null=True, about="`whpk_…`, for `ed25519`: what verifies the messages.")
    origin = _word(("api", "settings"))
    state = _word(("active", "disabled"))
    disabled_reason = _out(Text, null=True)
    failing_since = _out(Moment, null=True)
    failures = _out(fields.Integer)
    warned_percent = _out(fields.Integer, about="The stage that was told on the way to be disabled.")
    on_probation = _out(fields.Boolean, about="One more failure disables it.")
    slow_until = _out(Moment, null=True, about="Left alone until then.")
    circuit = _out(fields.Nested, Circuit)
    created_at = _out(Moment)
    updated_at = _out(Moment)


class Health(Schema):
    """The last 500 tries of a subscriber."""

    tries = _out(fields.Integer)
    success_rate = _out(fields.Float, null=True, about="0 to 1.")
    p50_ms = _out(fields.Integer, null=True)
    p95_ms = _out(fields.Integer, null=True)
    last_error = _out(Text, null=True)


class SubscriberWithHealth(Subscriber):
    """A registered callback URL, and how it fares."""

    health = _out(fields.Nested, Health)


class CreatedSubscriber(Subscriber):
    """A new subscriber, with its secret, this once."""

    secret = _out(Text, about="`whsec_…`; for Ed25519 the public key `whpk_…`.")


class NewSecret(Schema):
    """The new secret, this once."""

    secret = _out(Text)
    previous_expires_at = _out(Moment, null=True)


class Tested(Schema):
    """A test message, and the answer to its first try; nulls: none came in time."""

    delivery_id = _out(Text, about="Also the `webhook-id` of its requests.")
    state = _word(("pending", "delivered", "dead"))
    status_code = _out(fields.Integer, null=True)
    reason = _out(Text, null=True, about="Null after a try: a 2xx.")
    response = _out(Text, null=True, about="The beginning of what came back.")


class Counted(Schema):
    """How many deliveries."""

    count = _out(fields.Integer)


_WAITING = "What a pending one waits for; else null. " + " ".join(
    f"`{word}`: {meaning}." for word, meaning in waiting.WORDS.items()
)


class Delivery(Schema):
    """One event for one subscriber."""

    id = _out(Text, about="Also the `webhook-id` of its requests.")
    subscriber_id = _out(Text)
    event_id = _out(fields.Integer)
    build_id = _out(Text, null=True)
    sequence = _out(fields.Integer, null=True)
    type = _out(Text)
    state = _word(("pending", "delivered", "dead"))
    attempt_count = _out(fields.Integer)
    next_attempt_at = _out(Moment, null=True, attribute="due_at")
    reason = _out(Text, null=True, about="Of the last failure.")
    waiting_for = _word(tuple(waiting.WORDS), null=True, about=_WAITING)
    created_at = _out(Moment)
    settled_at = _out(Moment, null=True)


class DeliveryAttempt(Schema):
    """One HTTP try."""

    number = _out(fields.Integer)
    started_at = _out(Moment)
    duration_seconds = _out(fields.Float)
    status_code = _out(fields.Integer, null=True)
    reason = _out(Text, null=True, about="Null: a 2xx.")
    response = _out(Text, null=True, about="The beginning of what came back.")
    note = _out(Text, null=True, about="What was odd about the answer, or where a redirect leads.")


class DeliveryWithAttempts(Delivery):
    """One event for one subscriber, and each try."""

    attempts = _out(fields.List, fields.Nested(DeliveryAttempt))


class Event(Schema):
    """A recorded change; `data` is what subscribers get."""

    id = _out(fields.Integer)
    build_id = _out(Text, null=True)
    sequence = _out(fields.Integer, null=True)
    type = _out(Text)
    timestamp = _out(Moment)
    data = _out(fields.Dict)


class Inbound(Schema):
    """A verified delivery as it came, without its content."""

    id = _out(fields.Integer)
    source = _out(Text)
    event = _out(Text)
    hook_id = _out(Text)
    delivery_id = _out(Text)
    status = _word(("applied", "ignored", "unreadable"))
    reason = _out(Text, null=True)
    build_id = _out(Text, null=True)
    received_at = _out(Moment)


class InboundWithBody(Inbound):
    """A verified delivery with its content; what may be secret is masked."""

    headers = _out(fields.Dict)
    body = _out(Text)
    truncated = _out(fields.Boolean)


class Reprocessed(Schema):
    """What became of a delivery that was taken once more."""

    status = _word(("accepted", "ignored", "unreadable"))
    build_id = _out(Text, null=True)
    reason = _out(Text, null=True)
    events = _out(fields.Integer, about="How many events it made.")


class Notice(Schema):
    """Something admins are told."""

    id = _out(fields.Integer)
    kind = _out(Text)
    subject = _out(Text)
    text = _out(Text)
    created_at = _out(Moment)
    read_at = _out(Moment, null=True)


class Token(Schema):
    """An API token, without the token."""

    id = _out(Text)
    name = _out(Text)
    scopes = _out(fields.List, Text(validate=OneOf(tokens.SCOPES)))
    created_at = _out(Moment)


class CreatedToken(Token):
    """A new token, this once."""

    token = _out(Text)


class Budget(Schema):
    """What a token may still ask.  `limit`, `remaining` and `reset_at` are null where the platform is silent.

    `per_hour`: what polling spends at the pace of the last ten minutes; `forecast_remaining`: what that
    leaves at the reset.  `requests` and `counted`: made ever, and those of them that cost budget.
    """

    limit = _out(fields.Integer, null=True)
    remaining = _out(fields.Integer, null=True)
    reset_at = _out(Moment, null=True)
    per_hour = _out(fields.Integer)
    forecast_remaining = _out(fields.Integer, null=True)
    requests = _out(fields.Integer)
    counted = _out(fields.Integer)


class FailingRepository(Schema):
    """A repository whose builds can't be listed, while the source may answer otherwise."""

    repository = _out(Text)
    error = _out(Text)
    failing_since = _out(Moment)
    errors_in_row = _out(fields.Integer)


class Source(Schema):
    """A configured CI instance, its push health, and how its API answers."""

    name = _out(Text)
    platform = _out(Text)
    can_poll = _out(fields.Boolean)
    paused_until = _out(Moment, null=True)
    pause_reason = _out(Text, null=True)
    last_push_at = _out(Moment, null=True)
    last_poll_at = _out(Moment, null=True)
    pushes = _out(fields.Integer)
    polls = _out(fields.Integer)
    missed_pushes = _out(fields.Integer, about="Changes a poll told first, less those pushed soon after.")
    late_pushes = _out(
        fields.Integer, about="Changes whose push came within a minute after a poll told them."
    )
    push_share = _out(fields.Float, null=True)
    newest_fact_age_seconds = _out(fields.Float, null=True)
    deaf_since = _out(Moment, null=True)
    behind_seconds = _out(fields.Float)
    last_error = _out(Text, null=True, about="Of its API; kept when it answers again.")
    last_error_kind = _word(FAULTS, null=True)
    last_error_at = _out(Moment, null=True)
    failing_since = _out(Moment, null=True, about="Since when no round of polling read anything; null: fine.")
    errors_in_row = _out(fields.Integer, about="Rounds of polling in a row that read nothing.")
    failing_repositories = _out(fields.List, fields.Nested(FailingRepository), about="The first 50.")
    budget = _out(fields.Nested, Budget, null=True)


class ActiveRun(Schema):
    """A build script's run, as far as it told."""

    runId = _out(Text)  # noqa: N815
    buildId = _out(Text)  # noqa: N815
    status = _out(Text)
    env = _out(Text, null=True)
    origin = _out(Text, null=True)
    command = _out(Text, null=True)
    host = _out(Text, null=True)
    pid = _out(fields.Integer, null=True)
    stage = _out(Text, null=True)
    message = _out(Text, null=True)
    repo = _out(Text, null=True)
    branch = _out(Text, null=True)
    commit = _out(Text, null=True)
    progress = _out(fields.Integer)
    startedAt = _out(Moment, null=True)  # noqa: N815
    lastHeartbeatAt = _out(Moment, null=True)  # noqa: N815


class BuildStatus(Schema):
    """Does a build script run now?"""

    success = _out(fields.Boolean)
    running = _out(fields.Boolean)
    activeRun = _out(fields.Nested, ActiveRun, null=True)  # noqa: N815
    updatedAt = _out(Moment)  # noqa: N815


class Healthy(Schema):
    """The process answers."""

    status = _out(Text)


class Check(Schema):
    """One thing the service stands on."""

    ok = _out(fields.Boolean)
    detail = _out(Text)


class ReadinessQuery(Strict):
    """What the service is to be ready for."""

    wanted_for = Text(
        data_key="for",
        validate=OneOf(("reception",)),
        metadata={"description": "`reception`: only what accepting a push needs; else everything."},
    )


class Readiness(Schema):
    """All that the service stands on."""

    status = _word(("ready", "unready"))
    checks = _out(fields.Dict, keys=Text(), values=fields.Nested(Check))


def page_of(item: type[Schema], name: str) -> type[Schema]:
    """The shape of a list of `item`: `{"items": […], "next_cursor": …}`."""
    content: Mapping[str, Any] = {
        "items": _out(fields.List, fields.Nested(item)),
        "next_cursor": _out(Text, null=True, about="Null: this is the last page."),
    }
    return Schema.from_dict(dict(content), name=name)


BuildPage = page_of(Build, "BuildPage")
AttemptPage = page_of(Attempt, "AttemptPage")


class ArtifactPage(page_of(Artifact, "Artifacts")):  # type: ignore[misc]
    """One page of a build's artifacts, and whether the list was read."""

    state = _word(COLLECTED)
    reason = _out(Text, null=True, about=REASONS)


PollingPage = page_of(Polling, "PollingPage")
SubscriberPage = page_of(Subscriber, "SubscriberPage")
DeliveryPage = page_of(Delivery, "DeliveryPage")


class EventPage(page_of(Event, "Events")):  # type: ignore[misc]
    """One page of events, and how far back they go."""

    oldest_id = _out(Number, null=True, about="The oldest event that is kept; null: none is.")


InboundPage = page_of(Inbound, "InboundPage")
NoticePage = page_of(Notice, "NoticePage")
TokenPage = page_of(Token, "TokenPage")
SourcePage = page_of(Source, "SourcePage")
