"""The sender signs, loses, doubles and reorders pushes as it is told, and as platforms do."""

import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import requests

from tests.asking import world_of
from tests.simulation import GITHUB, SECRETS, SIGNING_TOKEN, end_of
from webhook_app.simulated.github import GitHubServer
from webhook_app.simulated.httpd import Request, Response, Server
from webhook_app.simulated.sender import Secrets, Sender, encode, plan_pushes
from webhook_app.simulated.world import REPOSITORIES, StepClock, World


@pytest.fixture
def clock() -> StepClock:
    return StepClock(1_795_000_000.25)


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


class Inbox:
    """Keeps what is posted; `answer(request)` decides on the status."""

    def __init__(self, answer: Callable[[Request], int] = lambda request: 202) -> None:
        self.requests: list[Request] = []
        self._answer = answer
        self.server = Server(self._handle)

    def _handle(self, request: Request) -> Response:
        self.requests.append(request)
        return Response(self._answer(request))


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    box = Inbox()
    yield box
    box.server.close()


def test_pushes_are_signed_as_each_platform_signs(clock: StepClock, inbox: Inbox) -> None:
    world = World(2, 30, now=clock)
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sent = sender.send_due()
    sender.close()
    assert sender.finished
    assert sent == len(inbox.requests) == len(sender.accepted()) == sender.report()["planned"]
    events = Counter()
    for request in inbox.requests:
        platform = request.path.removeprefix("/webhooks/")
        events[platform, request.headers.get("x-github-event") or request.headers.get("x-gitlab-event")] += 1
        if platform == "gitlab":
            assert request.headers["idempotency-key"] == request.headers["webhook-id"]
            text = b".".join(
                (
                    request.headers["webhook-id"].encode(),
                    request.headers["webhook-timestamp"].encode(),
                    request.body,
                )
            )
            key = base64.b64decode(SIGNING_TOKEN.removeprefix("whsec_"))
            digest = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
            assert request.headers["webhook-signature"] == f"v1,{digest}"
        else:
            secret = {"github": b"github-secret-of-the-tests", "jenkins": b"jenkins-secret-of-the-tests"}[
                platform
            ]
            digest = hmac.new(secret, request.body, hashlib.sha256).hexdigest()
            assert request.headers["x-hub-signature-256"] == f"sha256={digest}"
    assert set(events) == {
        ("github", "workflow_run"), ("github", "workflow_job"), ("gitlab", "Pipeline Hook"),
        ("gitlab", "Job Hook"),
        ("jenkins", None),
    }  # fmt: skip


def test_a_plain_gitlab_token_is_sent_as_such(clock: StepClock) -> None:
    world = world_of(clock, "gitlab", "success")
    push = plan_pushes(world.builds, 1)[0]
    headers, _ = encode(push, "https://gitlab.com", Secrets("a", "plain", "b"), 5)
    assert headers["X-Gitlab-Token"] == "plain"
    assert "webhook-signature" not in headers
    assert headers["webhook-id"] == push.delivery_id


def test_nothing_is_lost_doubled_or_late_unless_asked_for() -> None:
    world = World(4, 60, now=StepClock())
    pushes = plan_pushes(world.builds, 4)
    assert not any(push.lost or push.copy or push.late for push in pushes)
    assert len({push.delivery_id for push in pushes}) == len(pushes)
    for build in world.builds:
        order = [push.at for push in pushes if push.build is build]
        assert order == sorted(m.at for m in build.moments for _ in m.events)


def test_the_wanted_share_is_lost_doubled_and_reordered_and_the_seed_decides_which() -> None:
    world = World(4, 300, now=StepClock())
    pushes = plan_pushes(world.builds, 4, loss=0.2, double=0.3, reorder=0.25)
    assert pushes == plan_pushes(world.builds, 4, loss=0.2, double=0.3, reorder=0.25)
    assert pushes != plan_pushes(world.builds, 5, loss=0.2, double=0.3, reorder=0.25)
    events = [push for push in pushes if not push.copy]
    assert len(events) > 2000
    kept = [push for push in events if not push.lost]
    doubled = [push for push in pushes if push.copy]
    assert sum(push.lost for push in events) / len(events) == pytest.approx(0.2, abs=0.03)
    assert len(doubled) / len(kept) == pytest.approx(0.3, abs=0.03)
    assert {push.delivery_id for push in doubled} <= {push.delivery_id for push in kept}
    # The last push of each build can't be late, and it is one of about nine.
    assert 0.17 < sum(push.late for push in kept) / len(kept) < 0.27


def test_a_late_push_goes_out_after_a_later_one_of_its_build() -> None:
    world = World(4, 100, now=StepClock())
    sending = [push for push in plan_pushes(world.builds, 4, loss=0.3, reorder=0.3) if not push.lost]
    late = [push for push in sending if push.late]
    assert late
    for push in late:
        before = [
            other for other in sending[: sending.index(push)]
            if other.build is push.build and other.moment.at >= push.moment.at
        ]  # fmt: skip
        assert before, "overtaken by nothing"


def test_a_doubled_push_has_the_same_bytes(clock: StepClock, inbox: Inbox) -> None:
    world = world_of(clock, "jenkins", "success", builds=3)
    sender = Sender(world, inbox.server.url, SECRETS, double=1.0)
    clock.advance(end_of(world) + 5)
    sender.send_due()
    sender.close()
    assert set(Counter(request.body for request in inbox.requests).values()) == {2}
    assert sender.report()["doubled"] == 12


def test_only_a_2xx_counts_as_accepted_and_platforms_do_not_retry(clock: StepClock) -> None:
    statuses = iter([202, 503, 401, 200])
    inbox = Inbox(lambda request: next(statuses))
    world = world_of(clock, "jenkins", "success")
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sender.send_due()
    inbox.server.close()
    sender.close()
    assert [sent.status for sent in sender.results] == [202, 503, 401, 200]
    assert len(sender.accepted()) == 2
    assert (sender.report()["refused"], sender.report()["unanswered"]) == (2, 0)


def test_a_refused_connection_is_no_delivery(clock: StepClock, inbox: Inbox) -> None:
    inbox.server.close()
    world = world_of(clock, "jenkins", "success")
    sender = Sender(world, inbox.server.url, SECRETS)
    clock.advance(end_of(world))
    sender.send_due()
    sender.close()
    assert sender.report()["unanswered"] == 4
    assert not sender.accepted()


def test_with_retries_every_push_is_accepted_in_the_end(wait_until: Callable[..., None]) -> None:
    failures = iter([500, 503, 401, 502])
    inbox = Inbox(lambda request: next(failures, 202))
    world = World(1, 6, speed=400, spread_seconds=10, kinds={"gitlab": ["success"]})
    with Sender(world, inbox.server.url, SECRETS, retry_until_accepted=True) as sender:
        wait_until(lambda: sender.finished)
    inbox.server.close()
    report = sender.report()
    assert report["accepted"] == report["planned"] == len(inbox.requests) - 4


def test_a_failed_delivery_is_listed_and_sent_again_under_its_guid(
    clock: StepClock, inbox: Inbox, http: requests.Session
) -> None:
    world = world_of(clock, "github", "success", builds=12)
    sender = Sender(world, inbox.server.url, SECRETS, loss=0.5)
    clock.advance(end_of(world))
    sender.send_due()
    with GitHubServer(world) as server:
        server.deliveries = sender
        server.hook_url = f"{inbox.server.url}/webhooks/github"
        place = next(place for place in REPOSITORIES["github"] if world.of(place))
        hooks = f"{server.url}/repos/{place.full_name}/hooks"
        hook = http.get(hooks, headers=GITHUB).json()[0]
        listed = http.get(f"{hooks}/{hook['id']}/deliveries?status=failure", headers=GITHUB).json()
        assert listed
        assert all(delivery["status"] != "OK" for delivery in listed)
        guid = listed[0]["guid"]
        assert guid not in {request.headers["x-github-delivery"] for request in inbox.requests}
        again = http.post(f"{hooks}/{hook['id']}/deliveries/{listed[0]['id']}/attempts", headers=GITHUB)
        assert again.status_code == 202
        assert sender.send_due() == 1
        assert inbox.requests[-1].headers["x-github-delivery"] == guid
        newest = http.get(f"{hooks}/{hook['id']}/deliveries", headers=GITHUB).json()[0]
        assert (newest["guid"], newest["redelivery"], newest["status"]) == (guid, True, "OK")
    sender.close()


def test_a_ping_is_sent_for_each_github_repository(clock: StepClock, inbox: Inbox) -> None:
    sender = Sender(world_of(clock, "github", "success"), inbox.server.url, SECRETS)
    assert sender.ping() == [202, 202, 202]
    sender.close()
    assert {request.headers["x-github-event"] for request in inbox.requests} == {"ping"}
