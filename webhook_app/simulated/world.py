"""A deterministic world of builds under one clock.

The same seed, start and arguments give the same builds, to the last id and time.  Nothing runs in
the background: what a build is "now" is looked up in its script.  Real time is the default clock;
tests may pass their own and step it.
"""

import time
from bisect import bisect_right, insort
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
    `places`: where the builds run, by platform.
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
        places: Mapping[str, Sequence[Repository]] = REPOSITORIES,
    ) -> None:
        self.seed = seed
        self.speed = speed
        self.platforms = tuple(platforms)
        self.now = now
        self.start_at = now()
        self.ends_at = self.start_at
        """When the last script is over (builds may wait for a person even then)."""
        self.places = places
        self._kinds = kinds or {}
        self._builds: dict[str, Build] = {}
        self._by_repository: dict[Repository, list[Build]] = {}
        self._by_run: dict[tuple[Repository, int], Build] = {}
        self._by_number: dict[tuple[Repository, int], Build] = {}
        self._by_job: dict[tuple[str, int], Build] = {}
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
        repository = rng.choice(self.places[platform])
        number = len(self._by_repository.get(repository, ())) + 1
        build = _make_build(self.seed, index, repository, number, kind, rng, at, self.speed)
        self.add(build)
        return build

    def add(self, build: Build) -> None:
        """Take in a build that somebody else wrote; its ids must be new."""
        place = build.repository
        insort(self._by_repository.setdefault(place, []), build, key=_begin)
        self._builds[build.build_id] = build
        self._by_run[place, build.run_id] = build
        self._by_number[place, build.number] = build
        for moment in build.moments:
            for job in moment.jobs:
                self._by_job[place.platform, job.id] = build
        self.ends_at = max(self.ends_at, build.ends_at)

    def build(self, build_id: str) -> Build | None:
        """One build by its id in BuildRelay."""
        return self._builds.get(build_id)

    def of(self, repository: Repository) -> tuple[Build, ...]:
        """The builds of a repository, oldest first, those that have not begun included."""
        return tuple(self._by_repository.get(repository, ()))

    def begun(self, repository: Repository, at: float) -> list[Build]:
        """The builds of a repository that had begun at `at`, newest first, whatever became of them since."""
        siblings = self._by_repository.get(repository, [])
        return siblings[: bisect_right(siblings, at, key=_begin)][::-1]

    def run(self, repository: Repository, run_id: int) -> Build | None:
        """One build by its `run_id`."""
        return self._by_run.get((repository, run_id))

    def numbered(self, repository: Repository, number: int) -> Build | None:
        """One build by its number."""
        return self._by_number.get((repository, number))

    def with_job(self, platform: str, job_id: int) -> Build | None:
        """The build that has this job at some time; only GitHub's and GitLab's job ids are unique."""
        return self._by_job.get((platform, job_id))

    def repositories(self, platform: str) -> tuple[str, ...]:
        """As BuildRelay's settings want them: `owner/name`, GitLab's project id, Jenkins' `folder/job`."""
        if platform not in self.platforms:
            return ()
        places = self.places[platform]
        return tuple(str(place.id) if platform == "gitlab" else place.full_name for place in places)

    def moment(self, build_id: str, at: float | None = None) -> Moment | None:
        """What the platform knows of a build now, or at `at`; None if it knows none."""
        build = self._builds.get(build_id)
        return build.moment_at(self.now() if at is None else at) if build else None

    def truth(self, build_id: str, at: float | None = None) -> Truth | None:
        """What BuildRelay ought to say of a build now, or at `at`; None before it begins."""
        moment = self.moment(build_id, at)
        return truth_of(self._builds[build_id].platform, moment) if moment else None

    def settled(self) -> bool:
        """Are all scripts over?"""
        return self.now() >= self.ends_at


def _begin(build: Build) -> float:
    return build.begins_at


def busy_world(
    now: Callable[[], float],
    *,
    active: int,
    repositories: int,
    build_seconds: float = 1800.0,
    changes: int = 3,
    span_seconds: float = 3600.0,
    jitter: float = 0.1,
    platform: str = "github",
    seed: int = 1,
) -> World:
    """A world for benchmarks in which about `active` builds run at every moment from now on.

    They begin evenly over time, those that run already included, each in a repository picked by chance.
    Each takes `build_seconds`, give or take the share `jitter`, and changes `changes` (≥ 3) times, its begin
    and its end included.  New ones begin until `span_seconds` are over.
    """
    places = [
        Repository(platform, 710_000_000 + n, f"load-{n % 10}", f"repo-{n}") for n in range(repositories)
    ]
    world = World(seed, 0, platforms=[platform], now=now, places={platform: places})
    rng, gap = seeded(seed, "busy", active), build_seconds / active
    first = now() - build_seconds
    for index in range(int(active * (1 + span_seconds / build_seconds))):
        seconds = build_seconds * rng.uniform(1 - jitter, 1 + jitter)
        at = first + (index + rng.random()) * gap
        world.add(_steady_build(world, index, rng.choice(places), at, seconds, changes, rng))
    return world


def _steady_build(
    world: World, index: int, repository: Repository, at: float, seconds: float, changes: int, rng: Random
) -> Build:
    run_id, job_id = _ids(repository.platform, world.seed, index)
    number = len(world.of(repository)) + 1
    good = rng.random() < 0.8
    return Build(
        build_id=_build_id(repository, run_id, number),
        kind="success" if good else "failure",
        repository=repository,
        run_id=run_id,
        number=number,
        workflow=rng.choice(_WORKFLOWS),
        branch=rng.choice(_BRANCHES),
        commit=f"{rng.getrandbits(160):040x}",
        title=rng.choice(_TITLES),
        moments=scripts.write_steady(repository.platform, at, seconds, changes, good, job_id),
    )


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
    run_id, job_id = _ids(repository.platform, seed, index)
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


def _ids(platform: str, seed: int, index: int) -> tuple[int, int]:
    """The run id of a build, and the id of its first job."""
    serial = seed % 1000 * 100_000 + index
    runs = {"github": 17_000_000_000, "gitlab": 2_100_000_000, "jenkins": 5_000}
    jobs = {"github": 48_000_000_000, "gitlab": 9_100_000_000, "jenkins": 0}
    return runs[platform] + serial, jobs[platform] + serial * 100


def _build_id(repository: Repository, run_id: int, number: int) -> str:
    if repository.platform == "github":
        return f"github:{repository.owner}:{repository.name}:{run_id}"
    if repository.platform == "gitlab":
        return f"gitlab:{repository.id}:{run_id}"
    return f"jenkins:{repository.owner}:{repository.name}:{number}"
