"""The circuit breaker: when it opens, how long it waits, how it closes, and what goes through it."""

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import text, update

from tests.facts import NOON, at, github
from tests.test_deliveries import KEYS, Q, claim, record, rows, settle, subscribe, went
from webhook_app import circuit, db, deliveries, endpoints, models, replays, room, settings, subscribers
from webhook_app.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from webhook_app.lifecycle import State
from webhook_app.room import Room


def middle():
    return 0.5


def after(here, *outcomes, begun_in=None, now=NOON):
    """The circuit after tries that went so, each begun in the state that it then had."""
    for well in outcomes:
        here = here.after(well, begun_in or here.state, now, middle)
    return here


# ---- the rule --------------------------------------------------------------------------------


def test_five_failures_in_a_row_open_it_and_a_success_between_does_not():
    assert after(Circuit(), *[False] * 4).state == CLOSED
    assert after(Circuit(), *[False] * 4, True, *[False] * 4) == Circuit(failures_in_row=4)
    assert after(Circuit(), *[False] * 5) == Circuit(5, at(5), 5.0)


def test_each_failed_probe_doubles_the_wait_up_to_five_minutes():
    here, waits = after(Circuit(), *[False] * 5), []
    for _ in range(8):
        waits.append((here.probe_at - NOON).total_seconds())
        here = after(here, False)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    assert here.failures_in_row == 13


def test_waits_differ_by_a_fifth_so_that_many_circuits_do_not_probe_at_once():
    waits = [
        Circuit(4).after(False, CLOSED, NOON, lambda jitter=jitter: jitter).probe_at for jitter in (0, 1)
    ]
    assert waits == [at(4), at(6)]


def test_successes_close_it_step_by_step_and_a_failure_opens_it_again():
    here, limits = after(Circuit(), *[False] * 5), []
    for _ in range(5):
        here = after(here, True)
        limits.append(here.concurrency_limit)
    assert limits == [1, 2, 4, 8, None]
    assert here == Circuit()
    assert circuit.FULL_CONCURRENCY == room.FIRST_IN_FLIGHT
    again = after(Circuit(), *[False] * 8, True, True, False)
    assert (again.state, again.probe_wait_seconds, again.failures_in_row) == (OPEN, 5, 1)


def test_a_failure_of_a_try_that_began_before_changes_nothing():
    opened = after(Circuit(), *[False] * 5)
    assert after(opened, *[False] * 123, begun_in=CLOSED) == replace(opened, failures_in_row=128)
    closing = after(opened, True)
    assert after(closing, False, begun_in=CLOSED).state == HALF_OPEN
    assert after(closing, False, begun_in=OPEN).state == HALF_OPEN
    together = after(after(opened, True, True, True), *[False] * 4, begun_in=HALF_OPEN)
    assert (together.state, together.probe_wait_seconds) == (OPEN, 5), "four were under way when one failed"


@pytest.mark.parametrize(
    ("probe_at", "wait", "due"),
    [
        (at(1), 5, False), (at(0), 5, True), (at(-1), 5, True), (at(350), 300, False),
        (at(30), 5, False),  # the lease of a probe
        (at(7200), 5, True), (at(7200), 300, True),  # the clock was set back by two hours
    ],
)  # fmt: skip
def test_a_probe_is_due_at_its_time_and_whatever_happens_to_the_clock(probe_at, wait, due):
    assert Circuit(5, probe_at, wait).is_probe_due(NOON) is due


def test_no_lease_is_longer_than_a_circuit_believes():
    (timeout,) = [variable for variable in settings.VARIABLES if variable.name == "DELIVERY_TIMEOUT"]
    with pytest.raises(ValueError, match="to 60"):
        timeout.read("60.1")
    assert 60 + deliveries.LEASE_MARGIN_SECONDS < circuit.LONGEST_LEASE_SECONDS


# ---- in the store ----------------------------------------------------------------------------


def circuit_of(engine, subscriber=None):
    (row,) = [row for row in rows(engine, models.subscribers) if subscriber in (None, row["id"])]
    return circuit.of(row)


def opened(engine, messages=30, **wanted):
    """A subscriber with a backlog whose circuit has just opened, at the start; its id."""
    subscriber = subscribe(engine, **wanted)
    record(engine, *[github(Q, run=run) for run in range(messages)])
    settle(engine, *[went(message, 500) for message in claim(engine, most=10)])
    assert circuit_of(engine, subscriber).state == OPEN
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(update(models.subscribers).values(probe_at=at(5)))  # without jitter
    return subscriber


def next_due(engine):
    with db.reading(engine) as connection:
        return deliveries.next_due(connection)


def test_an_open_circuit_lets_one_message_go_at_a_time_and_says_when(engine):
    opened(engine)
    assert claim(engine, at(4)) == []
    assert next_due(engine) == at(5), "or the job would come again at once, for a backlog that may not go"
    (probe,) = claim(engine, at(5))
    assert (probe.circuit, probe.number) == (OPEN, 1)
    assert claim(engine, at(6)) == claim(engine, at(34)) == []
    assert next_due(engine) == at(35), "its lease"
    settle(engine, went(probe, 500), now=at(10))
    assert 8 <= (circuit_of(engine).probe_at - at(10)).total_seconds() <= 12
    assert claim(engine, at(17)) == []
    (probe,) = claim(engine, at(22))
    settle(engine, went(probe, 200), now=at(22))
    assert circuit_of(engine) == Circuit(concurrency_limit=1)


@pytest.mark.parametrize("ordered", [True, False])
def test_what_waits_for_the_probe_keeps_its_tries_and_its_time(engine, ordered):
    opened(engine, ordered=ordered)
    before = {row["id"]: row for row in rows(engine)}
    for minute in range(1, 4):
        (probe,) = claim(engine, at(600 * minute))
        settle(engine, went(probe, 500), now=at(600 * minute))
        before.pop(probe.id)
    left = {row["id"]: row for row in rows(engine)}
    assert {id_: left[id_] for id_ in before} == before


def test_a_probe_keeps_the_order_of_its_build(engine):
    subscribe(engine)
    record(engine, *[github(state, run=run) for run in range(8) for state in (Q, State.IN_PROGRESS)])
    settle(engine, *[went(message, 500) for message in claim(engine)])
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        # whatever the reason, the second message of each build is due and its first is not
        columns = models.messages.c
        connection.execute(update(models.messages).where(columns.sequence == 1).values(due_at=at(100)))
        connection.execute(update(models.messages).where(columns.sequence == 2).values(due_at=at(10)))
    assert claim(engine, at(50)) == []
    assert [message.data["sequence"] for message in claim(engine, at(101))] == [1]


def test_a_worker_killed_with_the_probe_in_its_hands_shuts_the_circuit_for_its_lease_only(engine):
    opened(engine)
    assert len(claim(engine, at(5))) == 1
    assert claim(engine, at(34.9)) == []
    assert len(claim(engine, at(35))) == 1


def test_of_two_workers_one_gets_the_probe(postgres_engine):
    """Each in the middle of its transaction: the second neither waits nor gets one."""
    opened(postgres_engine)
    claim_by = partial(deliveries.claim, now=at(5), room=Room(), timeout_seconds=15)
    with postgres_engine.begin() as first, postgres_engine.begin() as second:
        second.execute(text("SET LOCAL lock_timeout = '5s'"))  # a wait for the other is an error
        assert len(claim_by(first).messages) == 1
        assert claim_by(second).messages == []
        first.commit()
        assert claim_by(second).messages == []


def test_a_stale_look_does_not_let_a_second_probe_go(postgres_engine):
    """The other worker committed after this one had looked at the queues."""
    subscriber = opened(postgres_engine)
    with postgres_engine.begin() as connection:
        stale = dict(subscribers.get(connection, subscriber)) | {"first_due_at": NOON}
    assert len(claim(postgres_engine, at(5))) == 1
    assert Room().allowed(stale, at(5)) == 1
    with postgres_engine.begin() as connection:
        assert deliveries._permitted(connection, stale, at(5), 1) == 0


def test_while_it_closes_the_limit_holds_over_all_workers(engine):
    opened(engine, messages=80, ordered=False)
    now, sizes = at(5), []
    for _ in range(10):
        messages = claim(engine, now, room=Room())
        sizes.append(len(messages))
        assert claim(engine, now, room=Room()) == [] or circuit_of(engine).state == CLOSED
        if circuit_of(engine).state == CLOSED:
            break
        settle(engine, *[went(message) for message in messages], now=now)
    assert sizes == [1, 1, 2, 8, 16], "1, then 1, 2, and after two successes at once 8"


def test_a_failure_while_it_closes_opens_it_again(engine):
    opened(engine)
    for _ in range(2):
        (message,) = claim(engine, at(5))
        settle(engine, went(message), now=at(5))
    one, two = claim(engine, at(5))
    settle(engine, went(one, 500), now=at(6))
    here = circuit_of(engine)
    assert (here.state, here.probe_wait_seconds, here.concurrency_limit) == (OPEN, 5, None)
    settle(engine, went(two, 500), now=at(7))
    assert circuit_of(engine) == replace(here, failures_in_row=2)


def test_what_was_under_way_when_it_opened_does_not_lengthen_the_wait(engine):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(128)])
    messages = list(claim(engine, most=256))
    settle(engine, *[went(messages.pop(), 500) for _ in range(5)])
    before = circuit_of(engine)
    settle(engine, *[went(message, 500) for message in messages], now=at(3))
    assert circuit_of(engine) == replace(before, failures_in_row=128)


def test_a_success_between_is_seen_within_what_comes_back_together(engine):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(20)])
    messages = list(claim(engine))
    outcomes = [500, 500, 500, 500, 200, 500, 500, 500, 500]
    settle(engine, *[went(messages.pop(), status) for status in outcomes])
    assert circuit_of(engine) == Circuit(failures_in_row=4)
    settle(engine, went(messages.pop(), 500))
    assert circuit_of(engine).state == OPEN


@pytest.mark.parametrize("reason", [deliveries.NO_KEY, "internal_TypeError"])
def test_a_fault_of_ours_opens_nothing_and_lengthens_nothing(engine, reason):
    subscribe(engine)
    record(engine, *[github(Q, run=run) for run in range(20)])
    faulty = [replace(went(message, 500), status_code=None, reason=reason) for message in claim(engine)]
    settle(engine, *faulty)
    assert circuit_of(engine) == Circuit()


def test_a_fault_of_ours_with_the_probe_in_hand_costs_its_lease(engine):
    opened(engine)
    (probe,) = claim(engine, at(5))
    settle(engine, replace(went(probe, 500), status_code=None, reason="internal_TypeError"), now=at(6))
    assert circuit_of(engine).probe_wait_seconds == 5
    assert claim(engine, at(34)) == []
    assert len(claim(engine, at(35))) == 1


def test_a_clock_that_is_set_back_by_two_hours_delays_no_probe(engine):
    opened(engine)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(update(models.messages).values(due_at=at(-10_000)))
    assert len(claim(engine, at(-7200))) == 1


def test_each_change_of_its_state_is_a_line_of_the_log(engine, caplog):
    caplog.set_level("INFO")
    subscriber = opened(engine)
    (probe,) = claim(engine, at(5))
    settle(engine, went(probe), now=at(5))
    for _ in range(4):
        settle(engine, *map(went, claim(engine, at(6))), now=at(6))
    assert circuit_of(engine).state == CLOSED
    lines = [(one.levelname, one.fields) for one in caplog.records if one.msg == "circuit"]
    assert [(level, fields["state"]) for level, fields in lines] == [
        ("WARNING", OPEN), ("INFO", HALF_OPEN), ("INFO", CLOSED),
    ]  # fmt: skip
    assert {fields["subscriber_id"] for _, fields in lines} == {subscriber}
    assert lines[0][1]["failures_in_row"] == 5
    assert lines[0][1]["probe_at"].endswith("Z")


# ---- beside the other rules ------------------------------------------------------------------


def test_a_pause_that_the_endpoint_asked_for_holds_for_the_probe(engine):
    opened(engine)
    (probe,) = claim(engine, at(5))
    settle(engine, went(probe, 503, retry_after="600"), now=at(5))
    assert claim(engine, at(300)) == []
    assert next_due(engine) == at(605)
    assert len(claim(engine, at(605))) == 1


def test_probes_alone_bring_a_dead_endpoint_to_its_end(engine):
    """120 h and 20 failures, with a warning at each stage before, in steps of five hours."""
    opened(engine, messages=60, ordered=False)
    now, acts, tries = at(5), [], 0
    while rows(engine, models.subscribers)[0]["state"] == "active" and now < at(10 * 86_400):
        with engine.connect().execution_options(writing=True) as connection, connection.begin():
            connection.execute(update(models.subscribers).values(probe_at=now, slow_until=None))
        messages = claim(engine, now)
        assert len(messages) == 1
        tries += 1
        acts += settle(engine, went(messages[0], 500, begun=now), now=now)
        now += timedelta(hours=5)
    assert acts == ["warn", "warn", "warn", "probe", "disable"]
    assert 20 <= tries <= 30


def test_the_last_probe_before_it_is_disabled_is_one_of_the_circuit(engine):
    opened(engine)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        spoilt = {"failing_since": at(-5 * 86_400), "failures": 30, "on_probation": True}
        connection.execute(update(models.subscribers).values(slow_until=at(300), **spoilt))
    assert claim(engine, at(299)) == []
    (probe,) = claim(engine, at(300))
    assert claim(engine, at(300)) == []
    assert settle(engine, went(probe, 500, begun=at(300)), now=at(301)) == ["disable"]


def test_410_disables_through_an_open_circuit(engine):
    opened(engine)
    (probe,) = claim(engine, at(5))
    assert settle(engine, went(probe, 410), now=at(5)) == ["disable"]


@pytest.mark.parametrize("way", ["enable", "new url"])
def test_a_clean_record_has_a_closed_circuit(engine, way):
    subscriber = opened(engine)

    def unit(write):
        if way == "enable":
            endpoints.enable(write, subscriber, at(1))
        else:
            row = subscribers.get(write.connection, subscriber)
            subscribers.edit(write, row, {"url": "https://example.net/moved"}, KEYS, at(1))

    db.as_writer(engine, unit)
    assert circuit_of(engine) == Circuit()
    assert len(claim(engine, at(1), room=Room())) == room.FIRST_IN_FLIGHT


# ---- what a person asks for ------------------------------------------------------------------


def retry(engine, message, now):
    db.in_transaction(engine, lambda connection: deliveries.retry(connection, message, now))


def test_a_retry_by_hand_goes_at_once_and_before_the_backlog(engine):
    opened(engine)
    last = rows(engine)[-1]
    retry(engine, last["id"], at(1))
    (message,) = claim(engine, at(1))
    assert (message.id, message.circuit) == (last["id"], OPEN)
    assert claim(engine, at(2)) == []
    settle(engine, went(message), now=at(2))
    assert circuit_of(engine).state == HALF_OPEN, "its success is that of a probe"


def test_a_test_goes_at_once_beside_a_probe_that_hangs(engine):
    subscriber = opened(engine)
    room = Room()
    (probe,) = claim(engine, at(5), room=room)
    room.began(rows(engine, models.subscribers)[0])
    message_id = db.as_writer(engine, lambda write: endpoints.plan_test(write, subscriber, at(6)))
    (message,) = claim(engine, at(6), room=room)
    assert message.message_id == message_id
    assert claim(engine, at(7), room=room) == []
    settle(engine, went(message), now=at(7))
    settle(engine, replace(went(probe), status_code=None, reason="timeout"), now=at(20))
    assert circuit_of(engine).state == HALF_OPEN, "the probe began before that success"


def test_a_test_goes_before_a_backlog_of_a_closed_circuit(engine):
    subscriber = subscribe(engine, rate_limit_per_second=1)
    record(engine, *[github(Q, run=run) for run in range(30)])
    message_id = db.as_writer(engine, lambda write: endpoints.plan_test(write, subscriber, at(6)))
    assert [message.message_id for message in claim(engine, at(6))] == [message_id]


@pytest.mark.parametrize("kind", ["replay", "redrive", "redrive of all"])
def test_a_replay_and_a_redrive_are_tried_at_once(engine, kind):
    subscriber = opened(engine)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        dead = {"state": "dead", "due_at": None, "reason": "http_500", "settled_at": NOON}
        connection.execute(update(models.messages).where(models.messages.c.id == 30).values(dead))
    with db.reading(engine) as connection:
        row = subscribers.get(connection, subscriber)
    if kind == "replay":
        assert replays.replay(engine, row, replays.Range(at(-60), at(60), True), at(1)).count == 1
    else:
        replays.redrive(engine, subscriber if kind == "redrive" else None, None, at(1))
    assert len(claim(engine, at(1))) == 1
    assert claim(engine, at(2)) == []
