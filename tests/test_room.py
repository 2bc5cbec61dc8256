"""What a worker allows each subscriber: more with each success, little after a failure, a share of the host."""

from dataclasses import asdict
from datetime import timedelta

from tests.facts import at
from webhook_app.circuit import Circuit
from webhook_app.room import CAUTION_IN_FLIGHT, FIRST_IN_FLIGHT, IN_FLIGHT, MOST_IN_FLIGHT, Room, host_of

NOW = at(0)


def row(id_="sub_1", url="https://one.example/hook", **more):
    return {
        "id": id_, "url": url, "first_due_at": NOW, "slow_until": None, "on_probation": False,
        "failing_since": None, **asdict(Circuit()), **more,
    }  # fmt: skip


def fill(room, one):
    """Begin all that is allowed; how many."""
    count = 0
    while (more := room.allowed(one, NOW)) > 0:
        room.began(one, more)
        count += more
    return count


def test_each_success_allows_one_more_up_to_a_bound():
    room, one = Room(), row()
    assert fill(room, one) == FIRST_IN_FLIGHT
    for _ in range(10):
        room.ended(one, well=True)
    assert fill(room, one) == 20
    for _ in range(300):
        room.ended(one, well=True)
        fill(room, one)
    assert room.subscribers == {"sub_1": MOST_IN_FLIGHT}


def test_a_failure_begins_anew():
    room, one = Room(), row()
    room.began(one, 40)
    for _ in range(40):
        room.ended(one, well=True)
    assert room.allowed(one, NOW) == FIRST_IN_FLIGHT + 40
    room.began(one)
    room.ended(one, well=False)
    assert room.allowed(one, NOW) == FIRST_IN_FLIGHT
    assert room.allowed(row(failing_since=NOW), NOW) == CAUTION_IN_FLIGHT
    assert room.allowed(row(failing_since=NOW, on_probation=True), NOW) == 1


def test_nothing_before_it_is_due_or_while_the_endpoint_asked_for_a_pause():
    later = NOW + timedelta(seconds=1)
    assert Room().allowed(row(first_due_at=later), NOW) == 0
    assert Room().allowed(row(slow_until=later), NOW) == 0
    assert Room().allowed(row(slow_until=NOW), NOW) == FIRST_IN_FLIGHT


def test_many_that_hang_leave_room_for_others():
    room = Room()
    for number in range(10):
        assert fill(room, row(f"sub_{number}", f"https://{number}.example/")) == FIRST_IN_FLIGHT
    assert room.free == IN_FLIGHT - 10 * FIRST_IN_FLIGHT
    assert fill(room, row("sub_good")) == FIRST_IN_FLIGHT


def test_the_subscribers_of_a_host_share_its_bound():
    room = Room(per_host=20)
    assert fill(room, row("sub_1", "https://one.example/a")) == FIRST_IN_FLIGHT
    assert fill(room, row("sub_2", "https://ONE.example.:8443/b")) == 20 - FIRST_IN_FLIGHT
    assert fill(room, row("sub_3", "http://two.example/")) == FIRST_IN_FLIGHT
    room.ended(row("sub_1", "https://one.example/a"), well=True)
    assert room.allowed(row("sub_2", "https://one.example/b"), NOW) == 1


def test_books_to_plan_with_leave_the_real_ones_as_they_are():
    room, one = Room(), row()
    plan = room.copy()
    plan.began(one, 5)
    assert (room.subscribers, room.hosts) == ({}, {})
    room.began(one)
    room.ended(one, well=True)
    assert plan.allowed(one, NOW) == FIRST_IN_FLIGHT + 1 - 5


def test_a_url_that_cannot_be_read_is_a_host_of_its_own():
    assert host_of("https://[broken") == "https://[broken"
