"""Reading what strangers send: times, texts, numbers, links, and the failures of an API."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app.platforms import (
    Answer,
    NotJson,
    PollError,
    PollFault,
    Unreadable,
    _read,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-11-01T10:00:00Z", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2020-01-20T09:42:40.000-08:00", datetime(2020, 1, 20, 17, 42, 40, tzinfo=UTC)),
        ("2021-02-23T02:41:37.886Z", datetime(2021, 2, 23, 2, 41, 37, 886000, tzinfo=UTC)),
        ("2016-08-12 15:23:28 UTC", datetime(2016, 8, 12, 15, 23, 28, tzinfo=UTC)),
        ("2026-01-12T09:30:00.123+0800", datetime(2026, 1, 12, 1, 30, 0, 123000, tzinfo=UTC)),
        (1793577604000, datetime(2026, 11, 2, 0, 0, 4, tzinfo=UTC)),
        ("2026-11-01T10:00:00", None),
        ("2026-11-01", None),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("soon", None),
        ("", None),
        (0, None),
        (10**30, None),
        (True, None),
        (1.5, None),
        ([], None),
        (None, None),
    ],
)
def test_moment(value, expected):
    assert _read.moment(value) == expected


def test_text_is_storable():
    assert _read.loads(b'{"a": "x\\ud800y\\u0000z"}') == {"a": "x\ud800y\0z"}
    assert _read.text("x\ud800y\0z") == "x?yz"
    assert _read.text("\0") is None
    assert _read.text("abc", 2) == "ab"
    assert [_read.text(value) for value in (None, 1, True, ["a"], {})] == [None] * 5


def test_whole():
    assert [_read.whole(value) for value in (0, -(2**63), 2**63 - 1)] == [0, -(2**63), 2**63 - 1]
    assert [_read.whole(value) for value in (2**63, True, 1.0, "1", None)] == [None] * 5
    assert _read.whole(_read.loads(b'{"n": 99999999999999999999}')["n"]) is None


DATE = "Sun, 01 Nov 2026 10:00:00 GMT"


@given(st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
def test_loads_gives_an_object_or_says_why_not(body):
    try:
        value = _read.loads(body)
    except (NotJson, Unreadable):
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("status", "headers", "body", "fault", "wait"),
    [
        (304, {}, b"", PollFault.UNREADABLE, None),
        (301, {"location": "https://ci.example.com/repositories/1"}, b"", PollFault.UNREADABLE, None),
        (401, {}, b"{}", PollFault.UNAUTHORIZED, None),
        (403, {}, b'{"message":"Resource not accessible"}', PollFault.FORBIDDEN, None),
        (403, {"retry-after": "30"}, b"", PollFault.RATE_LIMITED, 30),
        (403, {"x-ratelimit-remaining": "0"}, b"", PollFault.RATE_LIMITED, None),
        (404, {}, b"", PollFault.NOT_FOUND, None),
        (410, {}, b"", PollFault.NOT_FOUND, None),
        (422, {}, b"", PollFault.UNREADABLE, None),
        (429, {}, b"", PollFault.RATE_LIMITED, None),
        (429, {"retry-after": "0"}, b"", PollFault.RATE_LIMITED, 1),
        (429, {"retry-after": "Sun, 01 Nov 2026 10:02:00 GMT"}, b"", PollFault.RATE_LIMITED, None),
        (
            429,
            {"retry-after": "Sun, 01 Nov 2026 10:02:00 GMT", "date": DATE},
            b"",
            PollFault.RATE_LIMITED,
            120,
        ),
        (
            429,
            {"ratelimit-remaining": "0", "ratelimit-reset": "1793527215", "date": DATE},
            b"",
            PollFault.RATE_LIMITED,
            15,
        ),
        (502, {}, b"<html>", PollFault.UNAVAILABLE, None),
        (503, {"retry-after": "7"}, b"", PollFault.UNAVAILABLE, 7),
        (408, {}, b"", PollFault.UNAVAILABLE, None),
        (200, {}, b"<html>", PollFault.UNREADABLE, None),
        (200, {}, b"[]", PollFault.UNREADABLE, None),
    ],
)
def test_faults_of_an_answer(status, headers, body, fault, wait):
    with pytest.raises(PollError) as refusal:
        _read.fetched(Answer(status, headers, body))
    assert (refusal.value.fault, refusal.value.retry_after_seconds) == (fault, wait)


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "https://",
        "http://[",
        "https://a b",
        "//x",
        "https://x/\n",
        "x" * 9000,
        5,
        None,
    ],
)
def test_links_are_web_addresses(url):
    assert _read.web_url(url) is None
