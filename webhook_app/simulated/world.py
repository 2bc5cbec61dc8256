"""A deterministic world of builds under one clock.

The same seed, start and arguments give the same builds, to the last id and time.  Nothing runs in
the background: what a build is "now" is looked up in its script.  Real time is the default clock;
tests may pass their own and step it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random

from webhook_app.simulated import scripts
from webhook_app.simulated.facts import Build, Moment, Repository, Truth, seeded, truth_of

PLATFORMS = ("github", "gitlab", "jenkins")

REPOSITORIES: Mapping[str, tuple[Repository, ...]] = {
    "github": (
        Repository("github", 700_100_001, "Octo-Demo", "storefront"),
        Repository("github", 700_100_002, "Octo-Demo", "payments-api"),
        Repository("github", 700_100_003, "acme-labs", "mobile.app"),
    ),
    "gitlab": (
        Repository("gitlab", 4101, "acme", "shop-frontend"),
        Repository("gitlab", 4102, "acme", "infrastructure"),
    ),
    "jenkins": (
        Repository("jenkins", 1, "platform", "web"),
        Repository("jenkins", 2, "platform", "nightly"),
    ),
}
"""Where the builds run; mixed case and a dot on purpose."""

_BRANCHES = ("main", "main", "main", "develop", "feature/checkout-42", "release/2.1")
_WORKFLOWS = ("CI", "Release", "Nightly")
_TITLES = (
    "Fix rounding of taxes",
    "Update dependencies",
    "Add dark mode",
    "Retry flaky upload",
    "Tidy build cache",
)


class StepClock:
    """A clock that stands still until it is told to go on; call it for POSIX seconds."""

    def __init__(self, at: float = 1_795_000_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.at += seconds


class World:
    """Builds of several platforms, and the truth about each at any time.

    `builds`: how many.  `speed`: 10 makes a build of 60 s take 6 s.  `spread_seconds`: over which the
    builds begin (also divided by the speed).  `every_kind`: each kind of build comes at least once,
    as far as `builds` allows.  `kinds`: only these, by platform.  `now`: the clock, POSIX seconds.
    """

    def __init__(
        self,
        seed: int = 1,
        builds: int = 30,
        *,
        speed: float = 1.0,
        spread_seconds: float = 60.0,
        platforms: Sequence[str] = PLATFORMS,
        kinds: Mapping[str, Sequence[str]] | None = None,
        every_kind: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.seed = seed
        self.speed = speed
        self.platforms = tuple(platforms)
        self.now = now
        self.start_at = now()
        self._kinds = kinds or {}
        self._builds: dict[str, Build] = {}
        self._by_repository: dict[Repository, list[Build]] = {}
        self.extend(builds, spread_seconds=spread_seconds, every_kind=every_kind)

    @property
    def builds(self) -> tuple[Build, ...]:
        """All builds, those that have not begun included, in the order of planning."""
        return tuple(self._builds.values())

    def extend(
        self, builds: int, *, spread_seconds: float = 60.0, every_kind: bool = False
    ) -> tuple[Build, ...]:
        """Plan more builds that begin from now on; returns the new ones."""
        begin, already = self.now(), len(self._builds)
        picks = _pick_kinds(
            seeded(self.seed, "kinds", already), builds, self.platforms, self._kinds, every_kind
        )
        gap = spread_seconds / self.speed / max(builds, 1)
        planned = [
            self._plan(already + i, platform, kind, begin + i * gap)
            for i, (platform, kind) in enumerate(picks)
        ]
        return tuple(planned)

    def _plan(self, index: int, platform: str, kind: str, at: float) -> Build:
        rng = seeded(self.seed, "build", index)
        repository = rng.choice(REPOSITORIES[platform])
        siblings = self._by_repository.setdefault(repository, [])
        build = _make_build(self.seed, index, repository, len(siblings) + 1, kind, rng, at, self.speed)
        siblings.append(build)
        self._builds[build.build_id] = build
        return build

    def build(self, build_id: str) -> Build | None:
        """One build by its id in BuildRelay."""
        return self._builds.get(build_id)

    def of(self, repository: Repository) -> tuple[Build, ...]:
        """The builds of a repository, oldest first, those that have not begun included."""
        return tuple(self._by_repository.get(repository, ()))

    def repositories(self, platform: str) -> tuple[str, ...]:
        """As BuildRelay's settings want them: `owner/name`, GitLab's project id, Jenkins' `folder/job`."""
        if platform not in self.platforms:
            return ()
        places = REPOSITORIES[platform]
        return tuple(str(place.id) if platform == "gitlab" else place.full_name for place in places)

    def moment(self, build_id: str, at: float | None = None) -> Moment | None:
        """What the platform knows of a build now, or at `at`; None if it knows none."""
        build = self._builds.get(build_id)
        return build.moment_at(self.now() if at is None else at) if build else None

    def truth(self, build_id: str, at: float | None = None) -> Truth | None:
        """What BuildRelay ought to say of a build now, or at `at`; None before it begins."""
        moment = self.moment(build_id, at)
        return truth_of(self._builds[build_id].platform, moment) if moment else None

    @property
    def ends_at(self) -> float:
        """When the last script is over (builds may wait for a person even then)."""
        return max((build.ends_at for build in self._builds.values()), default=self.start_at)

    def settled(self) -> bool:
        """Are all scripts over?"""
        return self.now() >= self.ends_at


def _pick_kinds(
    rng: Random, builds: int, platforms: Sequence[str], kinds: Mapping[str, Sequence[str]], every_kind: bool
) -> list[tuple[str, str]]:
    """A (platform, kind) for each build."""
    weights = {
        (platform, kind): weight
        for platform in platforms
        for kind, weight in scripts.KINDS[platform].items()
        if platform not in kinds or kind in kinds[platform]
    }
    share = {p: sum(weight for (platform, _), weight in weights.items() if platform == p) for p in platforms}
    first = list(weights)[:builds] if every_kind else []
    equal = [weight / share[platform] for (platform, _), weight in weights.items()]
    picks = first + rng.choices(list(weights), equal, k=builds - len(first))
    rng.shuffle(picks)
    return picks


def _make_build(
    seed: int,
    index: int,
    repository: Repository,
    number: int,
    kind: str,
    rng: Random,
    at: float,
    speed: float,
) -> Build:
    serial = seed % 1000 * 100_000 + index
    run_id = {"github": 17_000_000_000, "gitlab": 2_100_000_000, "jenkins": 5_000}[
        repository.platform
    ] + serial
    job_id = {"github": 48_000_000_000, "gitlab": 9_100_000_000, "jenkins": 0}[
        repository.platform
    ] + serial * 100
    return Build(
        build_id=_build_id(repository, run_id, number),
        kind=kind,
        repository=repository,
        run_id=run_id,
        number=number,
        workflow=rng.choice(_WORKFLOWS),
        branch=rng.choice(_BRANCHES),
        commit=f"{rng.getrandbits(160):040x}",
        title=rng.choice(_TITLES),
        moments=scripts.write(repository.platform, kind, rng, at, speed, job_id),
    )


def _build_id(repository: Repository, run_id: int, number: int) -> str:
    if repository.platform == "github":
        return f"github:{repository.owner}:{repository.name}:{run_id}"
    if repository.platform == "gitlab":
        return f"gitlab:{repository.id}:{run_id}"
    return f"jenkins:{repository.owner}:{repository.name}:{number}"
