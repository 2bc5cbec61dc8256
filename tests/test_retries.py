"""The whole schedule by table: the clock and the jitter are arguments."""

from datetime import timedelta

import pytest

from tests.facts import at
from webhook_app.retries import RetryPolicy, percent_to_disable, retry_after_seconds, slow_down, warning_due
from webhook_app.settings import load

SCHEDULE = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)


def test_the_default_schedule_is_that_of_standard_webhooks():
    assert load({}).delivery_retry_schedule == SCHEDULE
    assert sum(SCHEDULE) == 75 * 3600 + 35 * 60 + 5


@pytest.mark.parametrize(("number", "base"), list(enumerate(SCHEDULE, start=1)))
@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_each_wait_has_twenty_percent_of_jitter(number, base, jitter, factor):
    assert RetryPolicy(SCHEDULE, lambda: jitter).wait(number, 500, None, at(0)) == pytest.approx(
        base * factor
    )


def test_after_the_last_wait_the_message_is_given_up():
    assert RetryPolicy(SCHEDULE, lambda: 0.5).wait(10, 500, None, at(0)) is None


@pytest.mark.parametrize(
    ("status", "asked", "seconds"),
    [
        (500, None, None), (None, None, None), (429, None, 60), (502, None, 60), (504, None, 60),
        (503, None, None), (503, "120", 120), (429, "7", 7), (500, "nonsense", None), (500, "-5", None),
        (500, "1.5", None), (503, "Sun, 01 Nov 2026 12:01:40 GMT", 100),
        (503, "Sun, 01 Nov 2026 11:00:00 GMT", 0), (503, "999999999999", 86400), (429, "\u0663", 60),
    ],
)  # fmt: skip
def test_an_endpoint_may_ask_to_be_left_alone(status, asked, seconds):
    assert slow_down(status, asked, at(0)) == seconds
    wait = RetryPolicy(SCHEDULE, lambda: 0.5).wait(1, status, asked, at(0))
    assert wait == max(5, seconds or 0)


def test_a_date_without_zone_is_utc_as_all_dates_of_http_are():
    assert retry_after_seconds("Sun, 01 Nov 2026 12:01:40", at(0)) == 100


@pytest.mark.parametrize(
    ("hours", "failures", "percent"),
    [
        (0, 0, 0), (200, 1, 5), (1, 500, 0), (60, 20, 50), (60, 10, 50), (90, 14, 70), (108, 18, 90),
        (120, 20, 100), (500, 99, 100),
    ],
)  # fmt: skip
def test_an_endpoint_is_disabled_by_time_and_count(hours, failures, percent):
    assert percent_to_disable(at(0), failures, at(0) + timedelta(hours=hours)) == percent
    assert percent_to_disable(None, failures, at(0)) == 0


@pytest.mark.parametrize(
    ("percent", "warned", "stage"),
    [(49, 0, None), (50, 0, 50), (69, 50, None), (70, 50, 70), (95, 0, 90), (95, 90, None), (100, 70, 90)],
)
def test_warnings_come_once_per_stage(percent, warned, stage):
    assert warning_due(percent, warned) == stage
