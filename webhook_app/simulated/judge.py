"""Holds what BuildRelay says, and what its subscriber was told, against the truth of the world."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from webhook_app.simulated.facts import Build, Truth
from webhook_app.simulated.subscriber import Subscriber
from webhook_app.simulated.world import World


@dataclass(frozen=True, slots=True)
class Difference:
    """A build that BuildRelay shows otherwise than its platform; `shown` None: not at all."""

    build_id: str
    kind: str
    truth: Truth
    shown: Truth | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`builds`: how many were judged; `moving`: left out, since they changed within the grace time.

    `faults`: what the subscriber could not accept, one line each.
    """

    builds: int
    moving: int
    wrong: tuple[Difference, ...]
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Is everything true?"""
        return not self.wrong and not self.faults

    def __str__(self) -> str:
        """One line for the whole, then one for each build or fault."""
        lines = [
            f"{self.builds} builds judged: {len(self.wrong)} wrong, {len(self.faults)} subscriber faults"
        ]
        for each in self.wrong:
            shown = "not known" if each.shown is None else _words(each.shown)
            lines.append(f"{each.build_id} ({each.kind}): {shown}, but truly {_words(each.truth)}")
        return "\n".join([*lines, *self.faults])


def judge(
    world: World,
    fetch_build: Callable[[str], Mapping[str, Any] | None],
    subscriber: Subscriber | None = None,
    *,
    exact_gitlab_attempts: bool = False,
    grace_seconds: float = 0.0,
) -> Verdict:
    """Compare every build that has begun with the truth now.

    `fetch_build(build_id)` gives the build's JSON of spec section 7, or None.  GitLab numbers no attempts:
    if an end before a retry was lost, the retry may honestly count as the same attempt, so a lower number
    is accepted there unless `exact_gitlab_attempts`.  `grace_seconds`: builds that changed so recently
    are left out.
    """
    begun = [build for build in world.builds if world.truth(build.build_id)]
    still = [build for build in begun if _stands_still(world, build, grace_seconds)]
    wrong: list[Difference] = []
    faults = [
        f"subscriber: {count} {name}" for name, count in (subscriber.faults() if subscriber else {}).items()
    ]
    for build in still:
        truth = world.truth(build.build_id)
        assert truth is not None
        shown = _shown(fetch_build(build.build_id))
        if shown is None or not _same(build, shown, truth, exact_gitlab_attempts):
            wrong.append(Difference(build.build_id, build.kind, truth, shown))
        elif subscriber:
            faults += [
                f"{build.build_id} ({build.kind}): {fault}" for fault in _end_faults(subscriber, build, shown)
            ]
    return Verdict(len(still), len(begun) - len(still), tuple(wrong), tuple(faults))


def _stands_still(world: World, build: Build, grace_seconds: float) -> bool:
    now = world.now()
    return world.truth(build.build_id, now - grace_seconds) == world.truth(build.build_id, now)


def _shown(content: Mapping[str, Any] | None) -> Truth | None:
    return Truth(content["state"], content["conclusion"], content["attempt"]) if content else None


def _same(build: Build, shown: Truth, truth: Truth, exact_gitlab_attempts: bool) -> bool:
    if build.platform == "gitlab" and not exact_gitlab_attempts:
        return shown[:2] == truth[:2] and 1 <= shown.attempt <= truth.attempt
    return shown == truth


def _end_faults(subscriber: Subscriber, build: Build, shown: Truth) -> Iterable[str]:
    """The present end was told once, as the last word; no attempt ended twice; what is open has no end."""
    ends = subscriber.ends(build.build_id)
    told = Counter(end.attempt for end in ends)
    yield from (f"attempt {attempt} ended {n} times" for attempt, n in told.items() if n > 1)
    if not shown.terminal:
        if told[shown.attempt]:
            yield f"attempt {shown.attempt} was told to have ended, but is open"
        return
    if not ends:
        yield "its end was never told"
        return
    last = max(ends, key=lambda end: end.sequence)
    if (last.state, last.conclusion, last.attempt) != shown:
        yield f"the last end told was {last.state}/{last.conclusion}, attempt {last.attempt}"


def _words(truth: Truth) -> str:
    return f"{truth.state}/{truth.conclusion}, attempt {truth.attempt}"
