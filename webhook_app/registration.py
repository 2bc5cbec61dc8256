"""Our webhooks at the platforms: found, registered, repaired, removed, and their failed deliveries.

Here the pure calls of `platforms` are sent.  Everything raises `PollError` for what a platform or the
network does; no secret is in any message.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from urllib.parse import urlsplit

from webhook_app import calls, platforms
from webhook_app.account import Account
from webhook_app.platforms import Answer, Call, Hook, HookApi, HookDelivery, PollFault
from webhook_app.settings import SourceSettings

ANSWER_CAP_BYTES = 16 * 1024 * 1024
MOST_PAGES = 10
HIDDEN = (PollFault.FORBIDDEN, PollFault.NOT_FOUND)
"""What a platform answers where the token may not see webhooks; GitHub and GitLab both hide with 404."""


class RegistrationError(Exception):
    """It can't be done so; the message says what would have to be different."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where deliveries of a source arrive.  `base` empty: our public address is not known."""

    source: str
    base: str = ""

    @property
    def url(self) -> str:
        """The whole URL, without a known base only its path."""
        return f"{self.base}/webhooks/{self.source}"

    def is_at(self, url: str) -> bool:
        """Does a registered URL lead here?  Without a known base its path decides."""
        try:
            if self.base:
                return _plain(url) == _plain(self.url)
            return urlsplit(url).path.rstrip("/").endswith(self.url)
        except ValueError:  # half an IPv6 address: somebody else's
            return False


def _plain(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url.rstrip("/"))
    return parts.scheme, parts.netloc.casefold(), parts.path


@dataclass(frozen=True, slots=True)
class Done:
    """What was done, or (on a dry run) would be: created, updated, removed, absent; and to which hook."""

    action: str
    hook_id: str


def ask(account: Account, call: Call, timeout_seconds: float | None = None) -> Answer:
    """Send one call; any status is an `Answer`, anything else a `PollError`."""
    most_seconds = min(timeout_seconds or inf, account.settings.timeout_seconds)
    with account.turn(most_seconds) as turn:
        turn.answer = calls.send(call, most_seconds, ANSWER_CAP_BYTES)
        return turn.answer


def find_hooks(account: Account, repository: str, timeout_seconds: float | None = None) -> tuple[Hook, ...]:
    """The webhooks of a repository."""
    settings = account.settings
    api = _api(settings)
    call = api.list_hooks(settings.source, repository)
    if call is None:
        raise RegistrationError(f"{repository!r} names no repository of {settings.source.name}")
    return api.parse_hooks(ask(account, call, timeout_seconds))


def _api(settings: SourceSettings) -> HookApi:
    api = platforms.hook_api(settings.source.platform)
    if api is None:
        raise RegistrationError(f"the webhooks of {settings.source.platform} are not managed from here")
    return api


def permission(settings: SourceSettings) -> str:
    """What a token needs to manage webhooks, for people."""
    return _api(settings).HOOK_PERMISSION


def ours(hooks: Iterable[Hook], address: Address) -> Hook | None:
    """Our webhook among those of a repository."""
    return next((hook for hook in hooks if address.is_at(hook.url)), None)


# ---- registering -----------------------------------------------------------------------------


def connect(account: Account, repository: str, address: Address, *, dry_run: bool = False) -> Done:
    """Register our webhook, or set the one that is there right; raises `RegistrationError` as well.

    Safe to repeat.  A webhook with another address is left alone.
    """
    settings = account.settings
    api, source = _api(settings), settings.source
    if not settings.webhook_secrets:
        raise RegistrationError(f"{source.name} has no webhook secret: set one first")
    found = ours(find_hooks(account, repository), address)
    if dry_run:
        return Done("updated" if found else "created", found.id if found else "")
    secret = settings.webhook_secrets[0]
    call = (
        api.update_hook(source, repository, found.id, address.url, secret)
        if found
        else api.create_hook(source, repository, address.url, secret)
    )
    made = api.parse_hook(ask(account, call))
    if made.has_secret is not True:
        _withdraw(account, repository, made, existed=found is not None)
    return Done("updated" if found else "created", made.id)


def _withdraw(account: Account, repository: str, made: Hook, *, existed: bool) -> None:
    """A server that ignores our kind of secret would send what we must refuse, until it mutes the hook."""
    settings = account.settings
    if not existed and made.id:
        ask(account, _api(settings).delete_hook(settings.source, repository, made.id))
    raise RegistrationError(
        f"{settings.source.name} kept no secret: signing tokens (whsec_…) need GitLab 19.0 or newer; "
        "set any other text as the webhook secret"
    )


def disconnect(account: Account, repository: str, address: Address, *, dry_run: bool = False) -> Done:
    """Remove our webhook; no harm if there is none."""
    settings = account.settings
    found = ours(find_hooks(account, repository), address)
    if found is None:
        return Done("absent", "")
    if not dry_run:
        answer = ask(account, _api(settings).delete_hook(settings.source, repository, found.id))
        if answer.status != 404:
            _api(settings).parse_hook(answer)
    return Done("removed", found.id)


def faults(settings: SourceSettings, hook: Hook) -> list[str]:
    """What is wrong with our webhook as it is registered, for people; empty if nothing is."""
    missing = sorted(_api(settings).HOOK_EVENTS - hook.events)
    return [
        message
        for wrong, message in (
            (hook.alert is not None, hook.alert or ""),
            (bool(missing), f"it does not send {', '.join(missing)}"),
            (hook.has_secret is False, "it has no secret, so we refuse what it sends"),
            (hook.last_status == 401, "we refused its last delivery (401): its secret is not ours"),
        )
        if wrong
    ]


def has_failed(hook: Hook) -> bool:
    """Did its last delivery fail for another reason than a wrong secret?"""
    return hook.last_status not in (None, 401) and not 200 <= (hook.last_status or 0) < 300


# ---- failed deliveries -----------------------------------------------------------------------


def failed_deliveries(account: Account, repository: str, hook: Hook, since: datetime) -> list[HookDelivery]:
    """One try of each delivery about builds of which no try succeeded, oldest first, as far as `since`.

    Its newest try: that one the platform keeps the longest.
    """
    tries: dict[str, list[HookDelivery]] = {}
    for delivery in _deliveries(account, repository, hook, since):
        known = delivery.envelope.event in _api(account.settings).DELIVERED_EVENTS
        if known and delivery.id and delivery.envelope.delivery_id:
            tries.setdefault(delivery.envelope.delivery_id, []).append(delivery)
    failed = [group[0] for group in tries.values() if not any(one.ok for one in group)]
    return failed[::-1]


def _deliveries(account: Account, repository: str, hook: Hook, since: datetime) -> Iterator[HookDelivery]:
    api, source = _api(account.settings), account.settings.source
    call: Call | None = api.list_deliveries(source, repository, hook.id)
    for _ in range(MOST_PAGES):
        if call is None:
            return
        answer = ask(account, call)
        page = api.parse_deliveries(hook.id, answer)
        yield from (one for one in page if one.at is None or one.at >= since)
        if _is_before(page, since):
            return
        call = api.next_deliveries(source, answer)


def _is_before(page: Sequence[HookDelivery], since: datetime) -> bool:
    return bool(page) and page[-1].at is not None and page[-1].at < since


def redeliver(account: Account, repository: str, hook: Hook, delivery: HookDelivery) -> None:
    """Ask the platform to send a delivery once more."""
    api = _api(account.settings)
    api.parse_hook(ask(account, api.redeliver(account.settings.source, repository, hook.id, delivery.id)))
