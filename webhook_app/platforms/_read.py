"""What the platform modules share: reading JSON from strangers, and reading the failures of their APIs.

Whatever is handed in, only `NotJson`, `Unreadable` and `PollError` come out.  Optional fields of
the wrong type count as absent (None); a field without which nothing can be said is `Unreadable`.
Texts come out as every database can store them: no NUL, no lone surrogate, never endless.
"""

import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from math import isfinite, nan
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote, urlsplit

import orjson

from webhook_app.platforms import Answer, Headers, Limits, NotJson, PollError, PollFault, Source, Unreadable
from webhook_app.times import http_date

USER_AGENT = "BuildRelay"

NAME_CHARS = 255
URL_CHARS = 2048
TEXT_CHARS = 2000

_MOST_DIGITS = 1000
_SIGNED_64 = range(-(2**63), 2**63)
_SIGNED_32 = range(2**31)
_DIGITS = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FAR_FUTURE = datetime(2200, 1, 1, tzinfo=UTC)


# ---- bodies --------------------------------------------------------------------------------------


def loads(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; `NotJson`, or `Unreadable` where the JSON is something else.

    orjson is on the path of every webhook; what it refuses though it is JSON (lone surrogates in
    escapes, a byte order mark) gets a second reading by the standard library.
    """
    value = _value(body)
    if not isinstance(value, dict):
        raise Unreadable("the body is JSON, but no object")
    return value


def _value(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return _loads_slowly(body)


def _loads_slowly(body: bytes) -> Any:
    return _standard(body, parse_constant=_no_number, parse_float=_finite)


def loads_leniently(body: bytes) -> dict[str, Any]:
    """As `loads`, but numbers that JSON or Python lacks (`1e999`, endless digits) are NaN or infinite."""
    return mapping(_standard(body, parse_int=_any_int))


def _any_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else nan


def numbers_as_written(body: bytes) -> dict[str, Any]:
    """A JSON object with each number as the text in the body: no digit of an id is rounded away."""
    return mapping(_standard(body, parse_int=str, parse_float=str, parse_constant=str))


def _standard(body: bytes, **how: Any) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"), **how)
    except RecursionError as error:
        raise Unreadable("the body is nested too deeply") from error
    except ValueError as error:  # bad UTF-8 and endless digits as well
        raise NotJson("the body is not JSON") from error


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number beyond every float")
    return value


def form_payload(body: bytes) -> bytes:
    """The `payload` parameter of a form-encoded body, or `NotJson`.

    Read from the raw bytes: a web framework's form parser has limits of its own.
    """
    try:
        fields = parse_qs(body.decode("ascii"), strict_parsing=True, errors="strict", max_num_fields=16)
        (payload,) = fields["payload"]
    except (ValueError, KeyError) as error:
        raise NotJson("the body is not a form with one `payload`") from error
    return payload.encode()


def is_form(headers: Headers) -> bool:
    """Does the content type, less its parameters, say form-encoded?"""
    media_type = headers.get("content-type", "").partition(";")[0].strip().casefold()
    return media_type == "application/x-www-form-urlencoded"


def digest(body: bytes) -> str:
    """SHA-256 of the raw body, in hex: the delivery id where the platform sends none."""
    return hashlib.sha256(body).hexdigest()


# ---- fields --------------------------------------------------------------------------------------


def text(value: object, limit: int = NAME_CHARS) -> str | None:
    """A text that can be stored, at most `limit` characters; None for anything else, or if empty."""
    return clean(value, limit) or None if isinstance(value, str) else None


def clean(value: str, limit: int) -> str:
    """`value` without NUL and lone surrogates (PostgreSQL refuses both), cut to `limit` characters.

    And to three times as many bytes: PostgreSQL's indexes hold 2704, and one has three names side by side.
    """
    value = value[: 2 * limit].replace("\0", "")[:limit]
    if not value.isascii():
        value = value.encode("utf-8", "replace")[: 3 * limit].decode("utf-8", "ignore")
    return value


def whole(value: object) -> int | None:
    """An integer of 64 bits with sign; None for anything else, `true` included."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value in _SIGNED_64
    return value if fits and isinstance(value, int) else None


def count(value: object) -> int | None:
    """An integer from 0 that fits a 32 bit column: an attempt, a number of steps."""
    number = whole(value)
    return number if number is not None and number in _SIGNED_32 else None


def size(value: object) -> int | None:
    """A number of bytes, from 0."""
    number = whole(value)
    return number if number is not None and number >= 0 else None


def sha256(value: object) -> str | None:
    """`sha256:` and 64 hex digits, lower case; None for anything else, another algorithm included."""
    told = (text(value) or "").casefold()
    return told if re.fullmatch("sha256:[0-9a-f]{64}", told) else None


def percent(value: object) -> int | None:
    """A number from 0 to 100, rounded down; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        return None
    return int(value)


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A JSON array; empty for anything else."""
    return value if isinstance(value, list) else []


def web_url(value: object) -> str | None:
    """An http or https address, safe as a link on a page; None for anything else."""
    url = text(value, URL_CHARS + 1)
    if url is None or len(url) > URL_CHARS or not url.isprintable() or " " in url:
        return None
    return url if url.startswith(("https://", "http://")) and _host("/".join(url.split("/", 3)[:3])) else None


@lru_cache(256)
def _host(origin: str) -> str | None:
    """The host of `https://HOST`; remembered, since most links lead to the same few."""
    try:
        return urlsplit(origin).hostname
    except ValueError:  # half an IPv6 address
        return None


def moment(value: object) -> datetime | None:
    """An aware UTC time out of ISO 8601 with a zone, `2016-08-12 15:23:28 UTC`, or Unix milliseconds.

    None for anything else, a time without a zone and one before 1970 or after 2199 included.
    """
    try:
        found = _moment(value)
    except (ValueError, OverflowError):
        return None
    return found if found is not None and _EPOCH < found < _FAR_FUTURE else None


def _moment(value: object) -> datetime | None:
    if isinstance(value, str) and len(value) <= 40:
        found = datetime.fromisoformat(value.replace(" UTC", "+00:00"))
        return found.astimezone(UTC) if found.tzinfo is not None else None
    milliseconds = whole(value)
    return None if milliseconds is None else _EPOCH + timedelta(milliseconds=milliseconds)


def rounded(value: object) -> int | None:
    """A whole number of 64 bits, also from a fraction or from digits in a text; None for anything else."""
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and abs(value) < _SIGNED_64.stop:
        value = round(value)
    return whole(value)


def name_part(value: str) -> str:
    """A name as part of a build id: each byte that is not plainly safe in a URL becomes `~HH`."""
    return re.sub(rb"[^A-Za-z0-9._-]", lambda found: b"~%02X" % found[0][0], value.encode()).decode()


def name_of_part(part: str) -> str:
    """The name that `name_part` has written."""
    raw = re.sub(rb"~([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), part.encode())
    return raw.decode("utf-8", "replace")


def need_text(data: dict[str, Any], name: str, limit: int = NAME_CHARS) -> str:
    """The text in field `name` (its last dotted part), or `Unreadable`."""
    found = text(_field(data, name), limit)
    if found is None:
        raise Unreadable(f"{name}: a text is needed")
    return found


def need_id(data: dict[str, Any], name: str) -> int:
    """The id, a whole number above 0, in field `name` (its last dotted part), or `Unreadable`."""
    found = whole(_field(data, name))
    if found is None or found <= 0:
        raise Unreadable(f"{name}: a whole number above 0 is needed")
    return found


def need_mapping(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object in field `name` (its last dotted part), or `Unreadable`."""
    found = _field(data, name)
    if not isinstance(found, dict):
        raise Unreadable(f"{name}: an object is needed")
    return found


def _field(data: dict[str, Any], name: str) -> Any:
    return data.get(name.rpartition(".")[2])


def plain(value: object, depth: int = 6) -> Any:
    """Any JSON value made storable: texts cleaned, huge integers as floats, nothing below `depth` levels.

    A number that is none (NaN, infinity) becomes None.
    """
    if isinstance(value, str):
        return clean(value, TEXT_CHARS)
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict | list) and depth == 0:
        return None
    if isinstance(value, dict):
        return {clean(key, NAME_CHARS): plain(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner, depth - 1) for inner in value]
    if isinstance(value, int) and value not in _SIGNED_64:
        return _as_float(value)
    return value


def _as_float(value: int) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def path_part(value: str) -> str:
    """One part of a URL path, percent-encoded."""
    return quote(value, safe="")


# ---- answers of a REST API -----------------------------------------------------------------------

_LONGEST_WAIT_SECONDS = 86_400.0


def fetched(answer: Answer, status: int = 200) -> dict[str, Any]:
    """The JSON object of a 200 (or `status`) answer, or `PollError`."""
    if answer.status != status:
        raise poll_error(answer)
    try:
        return loads(answer.body)
    except (NotJson, Unreadable) as error:
        raise PollError(PollFault.UNREADABLE, f"HTTP {status}, but {error}") from error


def answered_at(answer: Answer) -> datetime | None:
    """The platform's own clock when it answered; whole seconds."""
    return http_date(answer.headers.get("date", ""))


def bearer(value: object, name: str) -> str:
    """A token that fits into a header, however long, or `PollError`; the message does not hold it."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value.strip():
        raise PollError(PollFault.UNREADABLE, f"{name}: a token is needed")
    return value


def fetched_items(answer: Answer) -> list[dict[str, Any]]:
    """The JSON objects of a 200 answer that is a list, or `PollError`."""
    if answer.status != 200:
        raise poll_error(answer)
    try:
        value = _value(answer.body)
    except (NotJson, Unreadable) as error:
        raise PollError(PollFault.UNREADABLE, f"HTTP 200, but {error}") from error
    if not isinstance(value, list):
        raise PollError(PollFault.UNREADABLE, "HTTP 200, but the body is no list")
    return [item for item in value if isinstance(item, dict)]


def listed(value: object) -> list[dict[str, Any]]:
    """The objects of a list that an answer must have, or `PollError`."""
    if not isinstance(value, list):
        raise PollError(PollFault.UNREADABLE, "HTTP 200, but the list is missing")
    return [item for item in value if isinstance(item, dict)]


def poll_error(answer: Answer) -> PollError:
    """What an answer other than 200 means.

    Waits come from `Retry-After`, else from the reset of a limit that is used up; often nothing tells.
    https://docs.github.com/en/rest/using-the-rest-api/best-practices-for-using-the-rest-api
    https://docs.gitlab.com/administration/settings/user_and_ip_rate_limits/
    """
    message = f"HTTP {answer.status}{_explanation(answer)}"
    if _is_limited(answer):
        return PollError(PollFault.RATE_LIMITED, message, _limit_wait_seconds(answer))
    return PollError(_fault(answer.status), message, _retry_after_seconds(answer.headers))


def _fault(status: int) -> PollFault:
    known = {
        401: PollFault.UNAUTHORIZED,
        403: PollFault.FORBIDDEN,
        404: PollFault.NOT_FOUND,
        408: PollFault.UNAVAILABLE,
        410: PollFault.NOT_FOUND,
        451: PollFault.FORBIDDEN,
    }
    return PollFault.UNAVAILABLE if status >= 500 else known.get(status, PollFault.UNREADABLE)


def _explanation(answer: Answer) -> str:
    """The `message` of a JSON answer, as GitHub and GitLab send it: `: Not Found`."""
    try:
        said = text(loads(answer.body).get("message"), 200)
    except (NotJson, Unreadable):
        said = None
    return f": {said}" if said else ""


def _is_limited(answer: Answer) -> bool:
    """429, or a 403 that shows it: GitHub's secondary limit looks like "forbidden" but for its text."""
    if answer.status != 403:
        return answer.status == 429
    return (
        "retry-after" in answer.headers
        or _none_remaining(answer.headers)
        or b"rate limit" in answer.body[:10_000].lower()
    )


def _limit_wait_seconds(answer: Answer) -> float | None:
    told = _retry_after_seconds(answer.headers)
    if told is None and _none_remaining(answer.headers):
        told = _reset_seconds(answer.headers)
    return told


def limits(answer: Answer) -> Limits | None:
    """The budget as `x-ratelimit-…` (GitHub) or `ratelimit-…` (GitLab) headers tell it; None without them."""
    limit, remaining = (_limit_header(answer.headers, name) for name in ("limit", "remaining"))
    reset_seconds = _reset_seconds(answer.headers)
    if reset_seconds is None or not all(re.fullmatch("[0-9]{1,12}", text) for text in (limit, remaining)):
        return None
    return Limits(int(limit), int(remaining), reset_seconds)


def next_page(source: Source, answer: Answer) -> str | None:
    """The address of the next page by the `Link` header, if it is one of this API."""
    for part in answer.headers.get("link", "").split(","):
        found = re.fullmatch(r'\s*<([^<>\s]+)>\s*;\s*rel="next"\s*', part)
        if found and found[1].startswith(f"{source.api_url}/"):
            return found[1]
    return None


def _none_remaining(headers: Headers) -> bool:
    return _limit_header(headers, "remaining") == "0"


def _limit_header(headers: Headers, name: str) -> str:
    """GitHub writes `x-ratelimit-…`, GitLab `ratelimit-…`."""
    return headers.get(f"x-ratelimit-{name}") or headers.get(f"ratelimit-{name}") or ""


def _reset_seconds(headers: Headers) -> float | None:
    """Seconds until the limit's reset, by the platform's own clock."""
    reset, now = _limit_header(headers, "reset"), http_date(headers.get("date", ""))
    if now is None or re.fullmatch("[0-9]{1,12}", reset) is None:
        return None
    return _bounded(int(reset) - now.timestamp())


def _retry_after_seconds(headers: Headers) -> float | None:
    """`Retry-After` in seconds; its date form is held against the answer's own `Date`."""
    told = headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", told):
        return _bounded(float(told))
    until, now = http_date(told), http_date(headers.get("date", ""))
    return None if until is None or now is None else _bounded((until - now).total_seconds())


def _bounded(seconds: float) -> float:
    return min(max(seconds, 1.0), _LONGEST_WAIT_SECONDS)


def done(answer: Answer) -> dict[str, Any]:
    """The JSON object of a 2xx answer to a change, empty where it has none; or `PollError`."""
    if not 200 <= answer.status < 300:
        raise poll_error(answer)
    try:
        return loads(answer.body)
    except (NotJson, Unreadable):
        return {}
