"""Where a request may go: URLs, custom headers and addresses, judged.  Nothing is opened or resolved here."""

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal, NamedTuple
from urllib.parse import quote, urlsplit

import idna
from ssrfguard import BlockedAddressError, Policy

URL_LENGTH = 2048
CUSTOM_HEADERS = 20
CUSTOM_HEADER_BYTES = 8 * 1024

INTERNAL_NETWORKS = (
    "127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
    "198.18.0.0/15", "fc00::/7",
)  # fmt: skip
"""What may be reached beside public addresses when the guard is off; link-local and the like stay refused."""

METADATA_ADDRESSES = {
    "100.100.100.200": "Alibaba Cloud",
    "168.63.129.16": "Azure",
    "fd00:42::42": "Scaleway",
    "fd00:100::100:200": "Alibaba Cloud",
    "fd00:a9fe:a9fe::1": "Linode",
    "fd00:c1::a9fe:a9fe": "Oracle Cloud",
    "fd00:ec2::23": "AWS EKS Pod Identity",
    "fd00:ec2::254": "AWS EC2",
    "fd20:ce::254": "Google Cloud",
}
"""Metadata services outside 169.254.0.0/16 (which is refused anyway): they hand out credentials, so never."""

NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are the IPv4 address that is reached
SIX_TO_FOUR = IPv6Network("2002::/16")  # RFC 7526: given up
GLOBAL_UNICAST = IPv6Network("2000::/3")  # RFC 4291 section 2.5.4; nothing else is routed in the open

IPAddress = IPv4Address | IPv6Address
Reason = Literal[
    "address_refused", "bad_header", "bad_url", "connect", "disconnected", "dns", "protocol", "timeout",
    "tls", "too_large",
]  # fmt: skip


class OutboundError(Exception):
    """No usable answer came.

    `reason` is the metric label, `str()` names the host but never the path or a header, which may hold
    secrets.  `permanent`: the same request can't succeed later either.
    """

    def __init__(self, reason: Reason, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.permanent = permanent


class Place(NamedTuple):
    """A URL as it is used: `host` in ASCII without brackets, `target` the path and query."""

    scheme: str
    host: str
    port: int
    target: str


def check_callback_url(url: str, allow_private: bool) -> None:
    """Judge a subscriber's URL when it is registered; what its name resolves to is judged when connecting.

    https only (http too with `allow_private`), at most 2048 characters, no credentials, fragment or
    control characters, and no internal address in any spelling.  Raises `OutboundError` with reason
    `bad_url` or `address_refused`, permanent.
    """
    if len(url) > URL_LENGTH:
        raise bad_url(f"the URL is longer than {URL_LENGTH} characters")
    if "#" in url:
        raise bad_url("the URL has a fragment (#…), which is never sent")
    place = parse(url)
    if place.scheme == "http" and not allow_private:
        raise bad_url("the URL must begin with https:// (http needs ALLOW_PRIVATE_CALLBACKS=true)")
    check_written_host(place.host, guard=not allow_private)


MASKED = " …"
"""Stands in a shown URL where its path was.  `parse` refuses a blank, so nothing is ever sent there."""
TAIL_LENGTH = 4


def shown(url: str) -> str:
    """A callback URL as everybody may see it: `https://HOST[:PORT]/ …` and its last four characters.

    Path and query may be a secret, as they are of Slack and Teams; without any the URL is shown whole.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # was taken by an earlier version
        return MASKED.strip()
    host = parts.netloc.rpartition("@")[2]
    rest = parts._replace(scheme="", netloc="").geturl().lstrip("/")
    return f"{parts.scheme}://{host}/{MASKED}{rest[-TAIL_LENGTH:]}" if rest or host != parts.netloc else url


def origin(url: str) -> tuple[str, str, int] | str:
    """Scheme, host and port of a URL, whole or in its shown form; the URL itself if it has none."""
    try:
        return parse(url.partition(MASKED)[0])[:3]
    except OutboundError:  # was taken by an earlier version
        return url


def check_headers(headers: Mapping[str, str]) -> None:
    """Judge the custom headers of a subscriber: at most 20, 8 KiB in all, none that BuildRelay or HTTP sets.

    Raises `OutboundError("bad_header")`, permanent; the message names the header, never its value.
    """
    if len(headers) > CUSTOM_HEADERS:
        raise bad_header(f"more than {CUSTOM_HEADERS} headers")
    seen: set[str] = set()
    for name, value in headers.items():
        check_header(name, value)
        read = _as_read(name)
        if read in seen:
            raise bad_header(f"the header {name} is given twice")
        if read in RESERVED_HEADERS or read.startswith(RESERVED_PREFIXES):
            raise bad_header(f"the header {name} is set by BuildRelay or by HTTP itself")
        if read in PLATFORM_HEADERS and read != name.lower():
            raise bad_header(f"the header {name} is read as {read} by some receivers: write it so")
        seen.add(read)
    if sum(len(name) + len(value) for name, value in headers.items()) > CUSTOM_HEADER_BYTES:
        raise bad_header(f"more than {CUSTOM_HEADER_BYTES} bytes of headers")


def _as_read(name: str) -> str:
    """A header's name as programs get it from CGI, WSGI and PHP, where `X_A` and `X-A` are the same."""
    return re.sub(r"[^a-z0-9]", "-", name.lower())


# Headers and URLs, as they are written

FRAMING_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "accept-encoding", "connection"})
"""Set by `send` alone; RFC 9112 section 6."""

RESERVED_HEADERS = FRAMING_HEADERS | {
    "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer", "upgrade",
    "expect", "content-encoding", "content-type", "user-agent", "http2-settings", "proxy",
}  # fmt: skip
"""Hop-by-hop headers (RFC 9110 section 7.6.1), those that describe the body, which is ours, and `Proxy`:
CGI programs take it for HTTP_PROXY."""

RESERVED_PREFIXES = ("webhook-",)

PLATFORM_HEADERS = frozenset(
    {
        "x-hub-signature", "x-hub-signature-256", "x-github-event", "x-github-delivery", "x-gitlab-event",
        "x-gitlab-token", "x-build-token", "authorization",
    }
)  # fmt: skip
"""What receivers of platforms' webhooks look at: taken as they are written, in no other spelling."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")  # RFC 9110 section 5.6.2
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 section 5.5, as latin-1
_NEVER_IN_A_URL = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff\u2028\u2029]")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_JOINERS = "\u200c\u200d"
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_KEPT_IN_TARGET = "/?%:@!$&'()*+,;=~[]"


def bad_url(message: str) -> OutboundError:
    """The refusal of a URL."""
    return OutboundError("bad_url", message, permanent=True)


def _refused(message: str) -> OutboundError:
    return OutboundError("address_refused", message, permanent=True)


def bad_header(message: str) -> OutboundError:
    """The refusal of a header."""
    return OutboundError("bad_header", message, permanent=True)


def check_header(name: object, value: object) -> None:
    """Refuse what would break out of its line, or is no header at all."""
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise bad_header("a header's name must be a token of letters, digits and hyphens")
    if not isinstance(value, str) or not _FIELD_VALUE.fullmatch(value):
        raise bad_header(f"the header {name} holds a line break, a control character or one outside latin-1")


@lru_cache(maxsize=1024)
def parse(url: str) -> Place:
    """The one reading of a URL: what is checked is what is connected to."""
    if _NEVER_IN_A_URL.search(url):
        raise bad_url("the URL holds a space, a control character or a backslash")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise bad_url("the URL can't be read: its host or port is malformed") from None
    if parts.scheme not in ("http", "https") or not host:
        raise bad_url("a URL that begins with https:// or http:// and a host is needed")
    if "@" in parts.netloc:
        raise bad_url("the URL holds credentials; they belong in a header")
    if port == 0:
        raise bad_url("port 0 can't be connected to")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    default = 443 if parts.scheme == "https" else 80
    return Place(parts.scheme, _plain_host(host), port or default, quote(target, safe=_KEPT_IN_TARGET))


def _plain_host(host: str) -> str:
    """The host in lower-case ASCII, as the resolver and the certificate know it; no disguised numbers."""
    if ":" in host:
        return _plain_ipv6(host)
    host = (host.lower() if host.isascii() else _in_ascii(host)).removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise bad_url("the host is no valid name")
    if _NUMBER.fullmatch(labels[-1]) and written_address(host) is None:
        # 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1 to the C library.
        raise _refused(f"{host} is an address in disguise; four decimal numbers are needed")
    return host


def _in_ascii(host: str) -> str:
    """An internationalised name as browsers read it (UTS 46 as https://url.spec.whatwg.org/ has it).

    IDNA 2008 alone refuses names that exist, such as those with emoji.
    """
    try:
        return ".".join(map(_label_in_ascii, idna.uts46_remap(host, std3_rules=False).split(".")))
    except (UnicodeError, ValueError):
        raise bad_url("the host is no valid internationalised name") from None


def _label_in_ascii(label: str) -> str:
    if label.isascii():
        return label
    joiners = [at for at, character in enumerate(label) if character in _JOINERS]
    if label.startswith("xn--") or not all(idna.core.valid_contextj(label, at) for at in joiners):
        raise ValueError("not a label")
    idna.core.check_initial_combiner(label)
    idna.core.check_bidi(label)
    return "xn--" + label.encode("punycode").decode("ascii")


def _plain_ipv6(host: str) -> str:
    address = None if "%" in host else written_address(host)
    if address is None:
        raise bad_url("the host is no valid IPv6 address")
    return str(address)


def written_address(host: str) -> IPAddress | None:
    """The address a host is written as; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


# Addresses


@lru_cache(maxsize=1024)
def check_written_host(host: str, guard: bool) -> None:
    """Refuse what can be refused without asking for the name."""
    if guard and (host == "localhost" or host.endswith(".localhost")):
        raise _refused(f"{host} is this machine")
    address = written_address(host)
    if address is not None:
        why = refusal(address, guard)
        if why:
            raise _refused(f"{host} is refused: {why}")


def refusal(address: IPAddress, guard: bool) -> str | None:
    """Why an address may not be connected to, or None.

    Only NAT64 is looked through, since an IPv6-only network reaches all of IPv4 that way; every other
    form that wraps an IPv4 address (mapped, compatible, 6to4, Teredo) has no use here.
    """
    if isinstance(address, IPv6Address) and address in NAT64:
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    cloud = METADATA_ADDRESSES.get(str(address))
    if cloud:
        return f"it is a metadata service ({cloud})"
    if isinstance(address, IPv6Address) and not _is_plain_ipv6(address, guard):
        return "it is no ordinary IPv6 address"
    try:
        _policy(guard).check_address(address)
    except BlockedAddressError as blocked:
        return blocked.reason
    return None


def _is_plain_ipv6(address: IPv6Address, guard: bool) -> bool:
    if address in GLOBAL_UNICAST:
        return address not in SIX_TO_FOUR
    return not guard and any(
        isinstance(network, IPv6Network) and address in network for network in _policy(guard).allowed_networks
    )


@lru_cache(maxsize=2)
def _policy(guard: bool) -> Policy:
    networks: list[IPv4Network | IPv6Network] = []
    if not guard:
        networks = [IPv6Network(each) if ":" in each else IPv4Network(each) for each in INTERNAL_NETWORKS]
    return Policy(allowed_networks=tuple(networks))
