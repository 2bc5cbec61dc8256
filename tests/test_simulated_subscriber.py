"""The subscriber counts what is wrong with what it gets, and the judge can be trusted."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import requests
from standardwebhooks import Webhook

from tests.asking import world_of
from tests.simulation import end_of
from webhook_app.simulated.facts import Truth
from webhook_app.simulated.judge import judge
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.simulated.world import StepClock, World


@pytest.fixture
def clock() -> StepClock:
    return StepClock(1_795_000_000.25)


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


# The subscriber ----------------------------------------------------------------------------------

SECRET = "whsec_" + base64.b64encode(b"a-secret-of-the-subscriber").decode()


def message(webhook_id: str, sequence: int, state: str = "in_progress", **changes: Any) -> dict[str, Any]:
    conclusions = {"completed": "success", "failed": "failure"}
    data = {
        "build_id": "github:o:r:1", "sequence": sequence, "state": state, "attempt": 1,
        "conclusion": conclusions.get(state), **changes,
    }  # fmt: skip
    return {
        "id": webhook_id,
        "body": {"type": f"build.{state}", "timestamp": "2026-11-01T10:00:00Z", "data": data},
    }


@pytest.fixture
def deliver(http: requests.Session) -> Callable[..., int]:
    """Sign with an independent library, post, return the status."""

    def send(subscriber: Subscriber, content: dict[str, Any], secret: str = SECRET, **headers: str) -> int:
        body = json.dumps(content["body"])
        now = datetime.now(UTC)
        signed = {
            "webhook-id": content["id"], "webhook-timestamp": str(int(now.timestamp())),
            "webhook-attempt": "1",
            "webhook-signature": Webhook(secret).sign(content["id"], now, body),
        }  # fmt: skip
        return http.post(subscriber.url, data=body, headers={**signed, **headers}, timeout=60).status_code

    return send


@pytest.fixture
def subscriber() -> Iterator[Subscriber]:
    with Subscriber(SECRET) as one:
        yield one


def test_the_subscriber_keeps_good_messages_and_finds_no_fault(subscriber: Subscriber, deliver: Any) -> None:
    for n, state in enumerate(("queued", "in_progress", "completed"), start=1):
        assert deliver(subscriber, message(f"m{n}", n, state)) == 200
    assert subscriber.faults() == {}
    assert subscriber.sequences("github:o:r:1") == (1, 2, 3)
    assert [end[:4] for end in subscriber.ends("github:o:r:1")] == [(1, "completed", "success", 3)]
    assert subscriber.report()["messages"] == 3
    assert subscriber.types()["build.completed"] == 1


def test_the_subscriber_refuses_bad_and_old_signatures(subscriber: Subscriber, deliver: Any) -> None:
    other = "whsec_" + base64.b64encode(b"some-other-secret-entirely").decode()
    assert deliver(subscriber, message("m1", 1), other) == 401
    assert deliver(subscriber, message("m1", 1), **{"webhook-timestamp": "1600000000"}) == 401
    assert deliver(subscriber, message("m1", 1), **{"webhook-signature": ""}) == 401
    assert subscriber.report()["messages"] == 0
    assert subscriber.faults() == {"bad_signatures": 3}
    subscriber.add_secret(other)
    assert deliver(subscriber, message("m1", 1), other) == 200
    now = time.time()
    subscriber.remove_secret(other, signed_after=now + 60)
    assert deliver(subscriber, message("m2", 2), other) == 200
    subscriber.remove_secret(other, signed_after=now - 60)
    assert deliver(subscriber, message("m3", 3), other) == 401
    subscriber.remove_secret(other)
    assert deliver(subscriber, message("m3", 3), other) == 401


@pytest.mark.parametrize("attempt", ["", "0", "-1", "first"])
def test_the_subscriber_counts_bad_attempt_numbers(
    subscriber: Subscriber, deliver: Any, attempt: str
) -> None:
    deliver(subscriber, message("m1", 1), **{"webhook-attempt": attempt})
    assert subscriber.faults() == {"bad_attempts": 1}


def test_the_subscriber_counts_duplicates_disorder_gaps_and_doubled_events(
    subscriber: Subscriber, deliver: Any
) -> None:
    for content in (message("m1", 1), message("m1", 1), message("m3", 3)):
        deliver(subscriber, content)
    assert subscriber.report()["duplicates"] == 1
    assert subscriber.faults() == {"gaps": 1}
    deliver(subscriber, message("m2", 2))
    assert subscriber.faults() == {"order_violations": 1}
    deliver(subscriber, message("m2-again", 2))
    assert subscriber.faults() == {"order_violations": 1, "doubled_events": 1}


def test_the_subscriber_counts_what_it_cannot_read(subscriber: Subscriber, deliver: Any) -> None:
    deliver(subscriber, {"id": "m1", "body": {"type": "build.queued"}})
    deliver(subscriber, {"id": "m2", "body": {"type": "subscriber.test", "data": {}}})
    assert subscriber.faults() == {"unreadable": 1}


def test_the_subscriber_fails_the_first_tries_of_each_message_and_forgets_them(
    subscriber: Subscriber, deliver: Any
) -> None:
    subscriber.behave(fail_first=2, fail_status=503)
    assert [deliver(subscriber, message("m1", 1)) for _ in range(3)] == [503, 503, 200]
    assert deliver(subscriber, message("m2", 2)) == 503
    assert subscriber.sequences("github:o:r:1") == (1,)
    assert subscriber.report()["duplicates"] == 0
    subscriber.behave(fail_first=0, status=410)
    assert deliver(subscriber, message("m3", 3)) == 410
    assert subscriber.sequences("github:o:r:1") == (1,)


def test_the_subscriber_can_hang_and_be_slow(
    subscriber: Subscriber, http: requests.Session, deliver: Any
) -> None:
    subscriber.behave(hang=True)
    with pytest.raises(requests.Timeout):
        http.post(subscriber.url, data=b"{}", timeout=0.1)
    subscriber.behave(hang=False, delay_seconds=0.2)
    begun = time.monotonic()
    assert deliver(subscriber, message("m1", 1)) == 200
    assert time.monotonic() - begun >= 0.2


# The judge ---------------------------------------------------------------------------------------


@pytest.fixture
def settled(clock: StepClock) -> World:
    world = World(6, 60, every_kind=True, now=clock)
    clock.advance(end_of(world))
    return world


def fetch_truth(world: World) -> Callable[[str], dict[str, Any]]:
    def fetch(build_id: str) -> dict[str, Any]:
        truth = world.truth(build_id)
        assert truth
        return {"build_id": build_id, **truth._asdict()}

    return fetch


def test_the_judge_accepts_the_truth(settled: World) -> None:
    verdict = judge(settled, fetch_truth(settled), exact_gitlab_attempts=True)
    assert verdict.ok
    assert (verdict.builds, verdict.moving) == (60, 0)


@pytest.mark.parametrize(
    "lie", [{"state": "queued"}, {"conclusion": "neutral_"}, {"attempt": 9}, {"attempt": 0}, None]
)
def test_the_judge_finds_a_lie(settled: World, lie: dict[str, Any] | None) -> None:
    for platform in ("github", "gitlab", "jenkins"):
        victim = next(
            build for build in settled.builds if build.platform == platform and build.kind == "success"
        )
        told: dict[str, Any] = {
            build.build_id: fetch_truth(settled)(build.build_id) for build in settled.builds
        }
        told[victim.build_id] = lie and told[victim.build_id] | lie
        verdict = judge(settled, told.get)
        assert [difference.build_id for difference in verdict.wrong] == [victim.build_id]
        assert victim.build_id in str(verdict)


def test_the_judge_lets_gitlab_count_a_retry_as_the_same_attempt(settled: World) -> None:
    def fetch(build_id: str) -> dict[str, Any]:
        return fetch_truth(settled)(build_id) | ({"attempt": 1} if build_id.startswith("gitlab:") else {})

    assert judge(settled, fetch).ok
    kinds = {difference.kind for difference in judge(settled, fetch, exact_gitlab_attempts=True).wrong}
    assert kinds == {"retry", "retry_timeout", "optional_manual"}


def test_the_judge_leaves_out_what_changed_within_the_grace_time(clock: StepClock) -> None:
    world = world_of(clock, "jenkins", "success")
    ended_at = next(m.at for m in world.builds[0].moments if m.status == "completed")
    clock.at = ended_at + 1
    assert judge(world, lambda build_id: None, grace_seconds=2).moving == 1
    clock.at = ended_at + 3
    assert judge(world, lambda build_id: None, grace_seconds=2).moving == 0


def tell_end(deliver: Any, subscriber: Subscriber, truth: Truth, sequence: int, **changes: Any) -> None:
    facts = {"build_id": "jenkins:platform:web:1", "attempt": truth.attempt, "conclusion": truth.conclusion}
    deliver(subscriber, message(f"end-{sequence}", sequence, truth.state, **facts | changes))


def test_the_judge_wants_the_present_end_told_exactly_once(
    clock: StepClock, subscriber: Subscriber, deliver: Any
) -> None:
    world = next(
        w for seed in range(9) if (w := one_jenkins_build(seed, clock)).builds[0].repository.name == "web"
    )
    build = world.builds[0]
    clock.advance(end_of(world))
    truth = world.truth(build.build_id)
    assert truth
    assert judge(world, fetch_truth(world), subscriber).faults == (
        f"{build.build_id} (success): its end was never told",
    )
    tell_end(deliver, subscriber, truth, 1)
    assert judge(world, fetch_truth(world), subscriber).ok
    tell_end(deliver, subscriber, truth, 2)
    assert judge(world, fetch_truth(world), subscriber).faults == (
        f"{build.build_id} (success): attempt 1 ended 2 times",
    )
    tell_end(deliver, subscriber, Truth("failed", "failure", 2), 3)
    assert "the last end told was failed/failure, attempt 2" in str(
        judge(world, fetch_truth(world), subscriber)
    )


def one_jenkins_build(seed: int, clock: StepClock) -> World:
    return World(seed, 1, platforms=["jenkins"], kinds={"jenkins": ["success"]}, now=clock)


def test_the_judge_finds_an_end_of_what_is_open(
    clock: StepClock, subscriber: Subscriber, deliver: Any
) -> None:
    world = world_of(clock, "gitlab", "manual_forever")
    clock.advance(end_of(world))
    assert judge(world, fetch_truth(world), subscriber).ok
    tell_end(deliver, subscriber, Truth("timeout", "timed_out", 1), 1, build_id=world.builds[0].build_id)
    assert "is open" in judge(world, fetch_truth(world), subscriber).faults[0]
