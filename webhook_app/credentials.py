"""The token a source is polled with, shared by all workers: as configured, or lent by the platform.

A GitHub App gets an installation token of an hour, GitLab's OAuth an access token of two.  They lie
sealed in the store (`webhook_app.grants`) and are renewed some minutes before their end, or at once
when one is refused; whoever has the row's lease asks the platform, the others take what it brings.

GitLab voids the old access and refresh token as soon as it has made new ones.  Should the process
die, or the store go away, between that answer and our commit, then nobody knows a living token any
more: the next refresh is refused, the source is paused, admins get the notice `source.unauthorized`,
and a person has to authorise again and set `GITLAB_OAUTH_REFRESH_TOKEN` anew.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from sqlalchemy import Engine

from webhook_app import api_health, calls, db, grants, sealing
from webhook_app.grants import Held, Owner
from webhook_app.platforms import Answer, Call, Grant, PollError, PollFault, Source, github, gitlab
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

EARLY = timedelta(minutes=10)
"""A token of an hour is renewed at 50 minutes, a shorter one after five sixths of its time."""

REFUSED_AGAIN = timedelta(minutes=1)
"""A token that just took the place of a refused one, and is refused as well: a third would not help."""

TRY_AGAIN = timedelta(seconds=30)
"""How long nobody asks again after a failed renewal."""

SKEW = timedelta(seconds=30)
ANSWER_CAP_BYTES = 1024 * 1024
LOOKED_AT = 3
"""In so many of the configured repositories an App's installation is looked for."""
WAIT_SECONDS = 0.05
GRACE = timedelta(seconds=5)


def lane(settings: SourceSettings) -> str:
    """What the platform counts our requests against, as a name without the token in it.

    `github:app:APP:INSTALLATION` (where that is looked up, the source's name; off github.com with
    `@HOST`), `PLATFORM:HOST:DIGEST` of the token (of OAuth: the first), or `PLATFORM:HOST:anonymous`.
    """
    source = settings.source
    host = urlsplit(source.api_url).netloc.lower()
    if settings.app is not None:
        place = "" if host == "api.github.com" else f"@{host}"
        return f"github:app:{settings.app.app_id}:{settings.app.installation_id or source.name}{place}"
    secret = settings.oauth.refresh_token if settings.oauth else source.token
    return f"{source.platform}:{host}:{_digest(secret)[:16] if secret else 'anonymous'}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _owner(settings: SourceSettings) -> Owner:
    """What gets the tokens, so that other settings get others."""
    source, app, oauth = settings.source, settings.app, settings.oauth
    if app is not None:
        parts = (app.app_id, app.installation_id, *([] if app.installation_id else settings.repositories))
    else:
        parts = (oauth.client_id, oauth.refresh_token) if oauth else ()
    return Owner(_digest(source.api_url, *parts), source.name)


class Keyring:
    """Sources with a token that can be used.  `encryption_keys`: newest first, for the tokens at rest.

    Thread-safe; holds nothing but the engine, so any number of processes may have one.
    """

    def __init__(self, engine: Engine, encryption_keys: Sequence[str]) -> None:
        self._engine = engine
        self._keys = tuple(encryption_keys)

    def source(self, settings: SourceSettings, now: datetime) -> Source:
        """The source with its token: as configured, or lent and not near its end.

        May ask the platform, or wait for another worker that does.  Raises `PollError`; one that is
        UNAUTHORIZED is the settings' or the installation's trouble, and no build's.
        """
        if settings.app is None and settings.oauth is None:
            return settings.source
        held = self._held(settings)
        if held.grant is not None and now < _renew_at(held, held.grant):
            return _lent(settings, held.grant)
        return self._renew(settings, held, now, refused=False)

    def refreshed(self, settings: SourceSettings, refused: Source, now: datetime) -> Source | None:
        """After a 401: the source with another token than `refused` has, or None if there is none to get.

        Where somebody has renewed it meanwhile, that is it.  Otherwise asks the platform, once; a new
        token that is refused at once as well is not renewed again.  Raises `PollError`.
        """
        if settings.app is None and settings.oauth is None:
            return None
        held = self._held(settings)
        if held.grant is None or held.grant.access_token != refused.token:
            return self.source(settings, now)
        if held.refused_at is not None and now < held.refused_at + REFUSED_AGAIN:
            return None
        renewed = self._renew(settings, held, now, refused=True)
        return renewed if renewed.token != refused.token else None

    def _renew(self, settings: SourceSettings, seen: Held, now: datetime, *, refused: bool) -> Source:
        """Get the token after `seen`, or take the one that somebody else gets meanwhile."""
        begun = time.monotonic()
        while True:
            at = now + timedelta(seconds=time.monotonic() - begun)
            held = self._held(settings)
            if held.grant is not None and held.version != seen.version:
                return _lent(settings, held.grant)
            spare = None if refused else _alive(held, at)
            if held.failure is not None and held.is_given_up(at):
                return _or_raise(settings, spare, held.failure)
            lease = self._lease(settings, held, at)
            if lease is not None:
                return self._ask(settings, held, lease, at, refused=refused)
            if spare is not None:
                return _lent(settings, spare)
            time.sleep(WAIT_SECONDS)

    def _ask(
        self, settings: SourceSettings, held: Held, lease: str, at: datetime, *, refused: bool
    ) -> Source:
        """Ask the platform, as the holder of the lease."""
        owner = _owner(settings)
        try:
            grant = _asked(settings, held, at)
        except PollError as error:
            failure = api_health.masked(error, _secrets(settings, held))
            log.warning("no token: source=%s fault=%s: %s", owner.source, failure.fault.value, failure)
            retry_at = at + max(TRY_AGAIN, timedelta(seconds=error.retry_after_seconds or 0))
            db.as_writer(self._engine, lambda write: grants.fail(write, owner, lease, failure, retry_at))
            return _or_raise(settings, None if refused else _alive(held, at), failure)
        stored = db.as_writer(
            self._engine,
            lambda write: grants.store(write, owner, held.version, grant, self._keys, at, refused),
        )
        log.info("token renewed: source=%s expires_at=%s", owner.source, grant.expires_at.isoformat())
        newer = None if stored else self._held(settings).grant  # we took so long that another asked as well
        return _lent(settings, newer or grant)

    def _held(self, settings: SourceSettings) -> Held:
        """What is stored.  An App gets a new token where no key opens the old one; OAuth can't."""
        with db.reading(self._engine) as connection:
            held = grants.held(connection, _owner(settings), self._keys)
        if held.closed is not None and settings.app is None:
            raise PollError(PollFault.UNAUTHORIZED, str(held.closed)) from held.closed
        return held

    def _lease(self, settings: SourceSettings, held: Held, at: datetime) -> str | None:
        """The lease outlives the asking; it is not taken where the answer could not be sealed."""
        try:
            sealing.seal("", self._keys)
        except sealing.SealError as error:
            raise PollError(PollFault.UNAUTHORIZED, str(error)) from error
        if held.is_leased(at):
            return None
        until = at + timedelta(seconds=settings.timeout_seconds) + GRACE
        owner = _owner(settings)
        return db.as_writer(self._engine, lambda write: grants.lease(write, owner, held.version, at, until))


def with_token(engine: Engine, encryption_keys: Sequence[str], settings: SourceSettings) -> SourceSettings:
    """The source's settings with a token that can be used now, for a command; raises `PollError`."""
    source = Keyring(engine, encryption_keys).source(settings, utc_now())
    return replace(settings, source=source)


def _renew_at(held: Held, grant: Grant) -> datetime:
    begun = held.refreshed_at or grant.expires_at
    return grant.expires_at - min(EARLY, (grant.expires_at - begun) / 6)


def _alive(held: Held, at: datetime) -> Grant | None:
    """The token that is near its end, while it still works."""
    return held.grant if held.grant is not None and at < held.grant.expires_at else None


def _lent(settings: SourceSettings, grant: Grant) -> Source:
    return replace(settings.source, token=grant.access_token, lent=True)


def _secrets(settings: SourceSettings, held: Held) -> list[str]:
    """What we may have sent to get a token, and what it is to replace."""
    known = [settings.source.token]
    known += [settings.app.private_key] if settings.app else []
    known += [settings.oauth.client_secret, settings.oauth.refresh_token] if settings.oauth else []
    known += [held.grant.access_token, held.grant.refresh_token] if held.grant else []
    return [text for text in known if text]


def _or_raise(settings: SourceSettings, spare: Grant | None, error: PollError) -> Source:
    if spare is None:
        raise error
    return _lent(settings, spare)


# ---- asking the platform -------------------------------------------------------------------------


def _asked(settings: SourceSettings, held: Held, now: datetime) -> Grant:
    """A new token, with one deadline over all requests it takes; raises `PollError`."""
    call = _Asking(settings.source, time.monotonic() + settings.timeout_seconds, now)
    try:
        if settings.app is not None:
            return _installation_token(call, settings, settings.app)
        assert settings.oauth is not None
        return _oauth_token(call, settings.oauth, held)
    except PollError as error:
        raise _as_the_sources(error) from error


def _as_the_sources(error: PollError) -> PollError:
    """Forbidden and not found mean the App here, and no build: to be told like a refused token."""
    if error.fault not in (PollFault.FORBIDDEN, PollFault.NOT_FOUND):
        return error
    return PollError(PollFault.UNAUTHORIZED, str(error), error.retry_after_seconds)


@dataclass(frozen=True, slots=True)
class _Asking:
    """What the requests for one token share; `deadline` is a reading of the monotonic clock."""

    source: Source
    deadline: float
    now: datetime

    def send(self, request: Call) -> Answer:
        """One request, none of whose answers raises; `PollError` if there is no whole answer."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise PollError(PollFault.UNAVAILABLE, "timeout: a token was not to be had in time")
        return calls.send(request, remaining, ANSWER_CAP_BYTES)

    def as_app(self, app: github.App, make: Callable[[str], Call]) -> Answer:
        """Send what `make` makes of the App's JWT; once more by GitHub's clock if ours is far off."""
        answer = self.send(make(github.app_jwt(app, self.now)))
        theirs = github.clock(answer)
        if answer.status != 401 or theirs is None or abs(theirs - self.now) < SKEW:
            return answer
        ahead = (self.now - theirs).total_seconds()
        log.warning("our clock is %.0f s ahead of that of %s", ahead, self.source.name)
        return self.send(make(github.app_jwt(app, theirs)))


def _installation_token(call: _Asking, settings: SourceSettings, app: github.App) -> Grant:
    installation = app.installation_id or _installation(call, settings.repositories[:LOOKED_AT], app)
    answer = call.as_app(
        app, lambda proof: github.installation_token_request(call.source, proof, installation)
    )
    return github.parse_installation_token(answer, call.now)


def _installation(call: _Asking, repositories: Sequence[str], app: github.App) -> str:
    """Where the App is installed: for the first repository that it can see, or at all."""
    if not repositories:
        return _only_installation(call, app)
    missing: PollError | None = None
    for repository in repositories:
        answer = call.as_app(app, _installation_request(call.source, repository))
        try:
            return github.parse_installation(answer)
        except PollError as error:
            if error.fault is not PollFault.NOT_FOUND:
                raise
            missing = error
    told = f"the GitHub App {app.app_id} is not installed on {', '.join(repositories)}"
    raise PollError(PollFault.NOT_FOUND, told) from missing


def _installation_request(source: Source, repository: str) -> Callable[[str], Call]:
    return lambda proof: github.installation_request(source, proof, repository)


def _only_installation(call: _Asking, app: github.App) -> str:
    answer = call.as_app(app, lambda proof: github.installations_request(call.source, proof))
    found = github.parse_installations(answer)
    if len(found) != 1:
        raise PollError(
            PollFault.NOT_FOUND,
            f"the GitHub App {app.app_id} has {len(found)} installations: name one, or a repository",
        )
    return found[0]


def _oauth_token(call: _Asking, oauth: gitlab.OAuth, held: Held) -> Grant:
    """By the newest refresh token, which at first is the one of the settings."""
    refresh_token = held.grant.refresh_token if held.grant is not None else oauth.refresh_token
    answer = call.send(gitlab.refresh_request(call.source, oauth, refresh_token))
    grant = gitlab.parse_refresh(answer, call.now)
    return grant if grant.refresh_token else replace(grant, refresh_token=refresh_token)
