"""The one door through which BuildRelay opens a connection: deliveries to subscribers, reads of CI servers.

`send` makes one HTTP/1.1 request and keeps these promises, whoever the other side is:

* one deadline over everything: name look-up, connecting, TLS, sending, each byte of the answer;
* no more of an answer is read than `byte_cap`; it is asked for uncompressed and never decompressed;
* the address is judged after the name was resolved, and the connection goes to the judged address,
  while TLS still proves the name.  A name with one refused address is refused whole.  Of the judged
  addresses the first that answers is taken (`dialing`);
* TLS certificates are always verified;
* a redirect is an answer, unless `follow_redirects` is asked for;
* an answer that does not come whole is an error, unless `rest_seconds` says that its status line decides.

Connections are kept for reuse.  One was judged when it was opened, so it is used for at most
`LIFETIME_SECONDS`, and dropped after `IDLE_SECONDS` without use: then the name is resolved and
judged anew.  If a kept connection turns out to have been closed by the other side before a byte of
the answer came, the request is sent once more on a new one, provided that repeating it is harmless.

`HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` count, except for loopback addresses.  Behind a proxy it
is the proxy that resolves names, so the address guard then sees only addresses written in URLs, and
the proxy has to refuse internal ones.  `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE` or `SSL_CERT_FILE`
name the certificates to trust; without them it is the system's and those `requests` brings.

The wire is `http.client` over our own sockets, because only there can the deadline hold while
header lines drip in; it also takes a fifth of the processor time that `requests.Session` takes.
Answers to deliveries are read by `answers`.
"""

import atexit
import base64
import os
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException, HTTPResponse, IncompleteRead, LineTooLong
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urljoin, urlsplit

import requests.utils

from webhook_app import answers, dialing
from webhook_app.destinations import (
    FRAMING_HEADERS,
    OutboundError,
    Place,
    bad_header,
    bad_url,
    check_header,
    check_written_host,
    parse,
    refusal,
    written_address,
)
from webhook_app.dialing import Address

IDLE_SECONDS = 60.0
LIFETIME_SECONDS = 300.0
SWEEP_SECONDS = 10.0
IDLE_PER_ORIGIN = 128
"""As many as one subscriber may have under way (`room.MOST_IN_FLIGHT`): each closed one costs a handshake."""
IDLE_IN_ALL = 512
PIECE_BYTES = 64 * 1024
ANSWER_PIECE_BYTES = 8 * 1024
HEAD_BYTES = 64 * 1024
MOST_REDIRECTS = 5
Resolver = Callable[..., Sequence[tuple[Any, ...]]]
FORWARDED_HEADERS = frozenset({"accept", "accept-language", "user-agent", "range"})
"""What a redirect to another origin may see: no Authorization, PRIVATE-TOKEN, Cookie or anything unknown."""

_METHOD = re.compile(r"[A-Z]{1,16}")


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer.

    `headers` has lower-case names, repeated ones joined by a comma.  `body` holds at most `byte_cap`
    bytes; `truncated`: there was more.  `note`: what was odd after a status line that decided alone.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    truncated: bool
    duration_seconds: float
    note: str | None = None


class Sink(Protocol):
    """Where a body may go piece by piece."""

    def write(self, piece: bytes, /) -> object:
        """Take a piece; an `OSError` ends the request."""


class _Route(NamedTuple):
    """What a kept connection is good for."""

    scheme: str
    host: str
    port: int
    proxy: str
    guard: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """One request on its way; `started` and `deadline` are readings of the monotonic clock."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    started: float
    deadline: float
    byte_cap: int
    guard: bool
    into: Sink | None
    resolver: Resolver
    rest_seconds: float | None = None


def send(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes = b"",
    *,
    timeout_seconds: float,
    byte_cap: int,
    guard: bool,
    follow_redirects: bool = False,
    into: Sink | None = None,
    resolver: Resolver = socket.getaddrinfo,
    rest_seconds: float | None = None,
) -> Reply:
    """Make one HTTP request; any status is a `Reply`, anything but an answer raises `OutboundError`.

    `guard` True: public addresses only, for URLs that others chose.  False: the operator's own URLs,
    internal networks included; cloud metadata, link-local and multicast stay refused.
    `follow_redirects`: GET only, at most five; another origin gets none of our credentials, and is no
    internal one if a public address (or one behind a proxy) redirects there.
    `into`: the body of a 2xx is written there piece by piece, and `Reply.body` stays empty; an `OSError`
    of its `write` comes out as it is.
    `resolver`: what to ask instead of `socket.getaddrinfo`.
    `rest_seconds`: the status line makes the `Reply`, and what follows may take so long, within the
    deadline; what is odd about it is its `note`.  For deliveries; it takes no `into`.
    `ValueError` means a mistake of the caller: no HTTP method, or redirects asked for with another than GET.

    Thread-safe; connections are shared by the threads of a process and not with its forks.
    """
    if follow_redirects and method != "GET":
        raise ValueError("only a GET can follow redirects")
    now = monotonic()
    until = now + timeout_seconds
    call = _Call(method, url, headers, body, now, until, byte_cap, guard, into, resolver, rest_seconds)
    reply, from_public = _attempt(call)
    redirects = 0
    while follow_redirects and _is_redirect(reply):
        redirects += 1
        if redirects > MOST_REDIRECTS:
            raise OutboundError("protocol", f"more than {MOST_REDIRECTS} redirects from {parse(url).host}")
        call = _redirected(call, reply.headers["location"], from_public)
        reply, from_public = _attempt(call)
    return reply


def close_idle() -> None:
    """Close the kept connections of this process and read proxies and trusted certificates anew."""
    _pool().close()
    _proxy_for.cache_clear()
    _tls_context.cache_clear()


# Addresses


def _judged_addresses(host: str, port: int, call: _Call) -> list[Address]:
    """Every address of a host, in the resolver's order; one refused address refuses the host."""
    found = _addresses(host, port, call)
    for address in found:
        shown = str(address.sockaddr[0]).partition("%")[0]
        why = refusal(ip_address(shown), call.guard)
        if why:
            raise OutboundError("address_refused", f"{host} resolves to {shown}, which is refused: {why}")
    return found


def _addresses(host: str, port: int, call: _Call) -> list[Address]:
    written = written_address(host)
    if isinstance(written, IPv6Address):
        return [Address(socket.AF_INET6, (host, port, 0, 0))]
    if written is not None:
        return [Address(socket.AF_INET, (host, port))]
    answers = _resolve(host, port, call)
    found = [Address(family, sockaddr) for family, _, _, _, sockaddr in answers]
    if not found:
        raise OutboundError("dns", f"{host} has no address")
    return list(dict.fromkeys(found))


def _resolve(host: str, port: int, call: _Call) -> Sequence[tuple[Any, ...]]:
    """Ask the resolver in a thread of its own: the C library's look-up knows no time limit.

    This is once per new connection; a daemon thread, so that a stuck look-up delays no exit.
    """
    answer: Future[Sequence[tuple[Any, ...]]] = Future()

    def ask() -> None:
        try:
            answer.set_result(call.resolver(host, port, 0, socket.SOCK_STREAM))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
            answer.set_exception(error)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        return answer.result(max(0.0, call.deadline - monotonic()))
    except TimeoutError:
        raise OutboundError("dns", f"the name {host} was not resolved in time") from None
    except (OSError, UnicodeError) as error:
        raise OutboundError("dns", f"the name {host} can't be resolved: {error}") from None


# Sockets that keep a deadline


class _Budget:
    """What one request may still take from its socket: time, and bytes."""

    __slots__ = ("allowance", "deadline", "ended", "received")

    def __init__(self, deadline: float, allowance: int) -> None:
        self.deadline = deadline
        self.allowance = allowance
        self.received = 0
        self.ended = False

    def remaining_seconds(self) -> float:
        """Seconds left, more than 0; raises `TimeoutError` when there are none."""
        remaining = self.deadline - monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        return remaining

    def took(self, count: int) -> int:
        """Note bytes that came in, 0 for the end; raises `OutboundError("too_large")` when it is too many."""
        self.ended = self.ended or count == 0
        self.received += count
        if self.received > self.allowance:
            raise OutboundError("too_large", "the answer's header or framing is too large")
        return count


class _TimedSocket(socket.socket):
    """A TCP socket on which each call waits only until the deadline of the request.

    `http.client` reads through `recv_into`, line by line: this is where a dripping header is cut.
    """

    budget = _Budget(0.0, 0)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(self.budget.remaining_seconds())
        return self.budget.took(super().recv_into(buffer, nbytes, flags))

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.settimeout(self.budget.remaining_seconds())  # for the whole of it, in C
        super().sendall(data, flags)


class _TimedTLSSocket(ssl.SSLSocket):
    """The same over TLS."""

    budget = _Budget(0.0, 0)

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.budget.remaining_seconds())
        return self.budget.took(super().recv_into(buffer, nbytes, flags))

    def send(self, data: Any, flags: int = 0) -> int:
        self.settimeout(self.budget.remaining_seconds())  # `sendall` comes by here for each part
        return super().send(data, flags)


@dataclass(slots=True)
class _Link:
    """An open connection; times are readings of the monotonic clock."""

    route: _Route
    sock: _TimedSocket | _TimedTLSSocket
    opened: float
    idle_since: float
    is_public: bool = False

    def usable(self, now: float) -> bool:
        """Young, not idle for long, and silent: a readable one was closed, or says what nobody asked."""
        fresh = now - self.idle_since < IDLE_SECONDS and now - self.opened < LIFETIME_SECONDS
        return fresh and not _is_readable(self.sock)


def _is_readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


class _Pool:
    """Idle connections by route, the one used last on top."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[_Route, list[_Link]] = {}
        self._count = 0
        self._swept = monotonic()

    def take(self, route: _Route) -> _Link | None:
        """A connection that is still good, or None."""
        while True:
            with self._lock:
                links = self._idle.get(route)
                if not links:
                    return None
                link = links.pop()
                self._count -= 1
            if link.usable(monotonic()):
                return link
            link.sock.close()

    def put(self, link: _Link) -> None:
        """Keep a connection for reuse, if there is room for it."""
        now = link.idle_since = monotonic()
        with self._lock:
            expired = self._take_expired(now) if now - self._swept > SWEEP_SECONDS else []
            links = self._idle.setdefault(link.route, [])
            if len(links) < IDLE_PER_ORIGIN and self._count < IDLE_IN_ALL:
                links.append(link)
                self._count += 1
            else:
                expired.append(link)
        for each in expired:
            each.sock.close()

    def close(self) -> None:
        """Close every idle connection."""
        with self._lock:
            idle, self._idle, self._count = self._idle, {}, 0
        _close_all(idle)

    def abandon(self) -> None:
        """Close our copies of another process's connections; its lock may have been forked while held."""
        _close_all(self._idle)

    def _take_expired(self, now: float) -> list[_Link]:
        self._swept = now
        expired: list[_Link] = []
        for route, links in list(self._idle.items()):
            old = [link for link in links if now - link.idle_since >= IDLE_SECONDS]
            expired += old
            self._idle[route] = links[len(old) :]  # the oldest lie at the bottom
            if not self._idle[route]:
                del self._idle[route]
        self._count -= len(expired)
        return expired


def _close_all(idle: Mapping[_Route, Sequence[_Link]]) -> None:
    for links in idle.values():
        for link in links:
            link.sock.close()


_pools: dict[int, _Pool] = {}


def _pool() -> _Pool:
    """The pool of this process.  A fork gets its own: a shared connection would mix up the answers."""
    process_id = os.getpid()
    pool = _pools.get(process_id)
    if pool is None:
        if not _pools:
            atexit.register(close_idle)
        for inherited in [_pools.pop(other, None) for other in list(_pools) if other != process_id]:
            if inherited is not None:
                inherited.abandon()
        pool = _pools.setdefault(process_id, _Pool())
    return pool


# Opening a connection


def _open(route: _Route, call: _Call) -> _Link:
    """Connect, through the proxy if there is one, and agree on TLS."""
    budget = _Budget(call.deadline, HEAD_BYTES)
    try:
        sock: _TimedSocket | _TimedTLSSocket = _connect(route, call, budget)
        is_public = bool(route.proxy) or _is_public(sock)
        if route.scheme == "https":
            sock = _over_tls(sock, route, budget)
    except TimeoutError:
        raise OutboundError("timeout", f"{route.host} was not reached in time") from None
    except ssl.SSLError as error:
        raise OutboundError("tls", f"TLS with {route.host} failed: {_reason_of(error)}") from None
    except (OSError, HTTPException) as error:
        raise OutboundError("connect", f"no connection to {route.host} port {route.port}: {error}") from None
    now = monotonic()
    return _Link(route, sock, opened=now, idle_since=now, is_public=is_public)


def _is_public(sock: socket.socket) -> bool:
    return refusal(ip_address(sock.getpeername()[0].partition("%")[0]), guard=True) is None


def _connect(route: _Route, call: _Call, budget: _Budget) -> _TimedSocket:
    if not route.proxy:
        return _dial(_judged_addresses(route.host, route.port, call), budget)
    proxy = urlsplit(route.proxy)
    sock = _dial(_addresses(proxy.hostname or "", proxy.port or 80, call), budget)
    if route.scheme == "https":
        try:
            _tunnel(sock, route)
        except BaseException:
            sock.close()
            raise
    return sock


def _dial(addresses: Sequence[Address], budget: _Budget) -> _TimedSocket:
    """Connect to the first address that answers."""
    sock = dialing.connect(
        addresses, lambda family: _TimedSocket(family, socket.SOCK_STREAM), budget.remaining_seconds
    )
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:  # some systems refuse it once the other side has gone
        sock.close()
        raise
    sock.budget = budget
    return sock


def _over_tls(sock: socket.socket, route: _Route, budget: _Budget) -> _TimedTLSSocket:
    try:
        sock.settimeout(budget.remaining_seconds())  # the handshake takes it as its deadline
        wrapped = _tls_context(_trust_path()).wrap_socket(sock, server_hostname=route.host)
    except BaseException:
        sock.close()
        raise
    assert isinstance(wrapped, _TimedTLSSocket)
    wrapped.budget = budget
    return wrapped


def _reason_of(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.reason or str(error)


def _trust_path() -> str:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        path = os.environ.get(name)
        if path:
            return path
    return ""


@lru_cache(maxsize=4)
def _tls_context(trust_path: str) -> ssl.SSLContext:
    """Certificates and host names are verified; TLS 1.2 at least (`ssl.create_default_context`)."""
    try:
        if not trust_path:
            context = ssl.create_default_context()
            context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
        elif Path(trust_path).is_dir():
            context = ssl.create_default_context(capath=trust_path)
        else:
            context = ssl.create_default_context(cafile=trust_path)
    except OSError as error:
        raise OutboundError("tls", f"the trusted certificates {trust_path} can't be read: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = _TimedTLSSocket
    return context


# Proxies


@lru_cache(maxsize=1024)
def _proxy_for(scheme: str, host: str, port: int) -> str:
    """The proxy the environment names for a host, or ""; loopback never goes through one."""
    address = written_address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return ""
    url = f"{scheme}://{_bracketed(host)}:{port}/"
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    if not proxy:
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        given = proxy.partition("://")[0]  # the rest may hold a password
        raise OutboundError("connect", f"a proxy of the form http://HOST:PORT is needed, not {given}://…")
    return proxy


def _proxy_authorization(proxy: str) -> str | None:
    parts = urlsplit(proxy)
    if not parts.username:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode("ascii")


def _tunnel(sock: _TimedSocket, route: _Route) -> None:
    """Have the proxy connect us to the host (RFC 9110 section 9.3.6)."""
    authority = f"{_bracketed(route.host)}:{route.port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    credentials = _proxy_authorization(route.proxy)
    if credentials:
        lines.append(f"Proxy-Authorization: {credentials}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    response = HTTPResponse(sock, method="CONNECT")
    try:
        response.begin()
        if not 200 <= response.status < 300:
            raise OutboundError("connect", f"the proxy did not connect to {route.host}: {response.status}")
    finally:
        response.close()


# One exchange


class _CannotWrite(Exception):
    """`into` refused a piece; its argument is the error."""


class _Stale(Exception):
    """A kept connection had been closed by the other side before it answered anything."""


def _attempt(call: _Call) -> tuple[Reply, bool]:
    """The answer, and whether it came from a public address."""
    place = parse(call.url)
    check_written_host(place.host, call.guard)
    proxy = _proxy_for(place.scheme, place.host, place.port)
    head = _head(call, place, proxy)
    route = _Route(place.scheme, place.host, place.port, proxy, call.guard)
    link = _pool().take(route) if _is_repeatable(call) else None
    if link is not None:
        try:
            return _exchange(link, call, head, reused=True), link.is_public
        except _Stale:
            pass
    link = _open(route, call)
    return _exchange(link, call, head, reused=False), link.is_public


def _is_repeatable(call: _Call) -> bool:
    """May this be sent twice (RFC 9110 section 9.2.2)?  If not, it gets a new connection to begin with.

    Receivers of webhooks tell a repetition by its webhook-id.
    """
    return call.method not in ("POST", "PATCH") or any(name.lower() == "webhook-id" for name in call.headers)


def _head(call: _Call, place: Place, proxy: str) -> bytes:
    """The request line and the headers.  Everything in it was checked, so nothing can end a line early."""
    if not _METHOD.fullmatch(call.method):
        raise ValueError(f"{call.method!r} is no HTTP method")
    authority = _authority(place)
    lines = [f"{call.method} {place.target} HTTP/1.1", f"Host: {authority}", "Accept-Encoding: identity"]
    if proxy and place.scheme == "http":
        lines[0] = f"{call.method} http://{authority}{place.target} HTTP/1.1"
        credentials = _proxy_authorization(proxy)
        lines += [f"Proxy-Authorization: {credentials}"] if credentials else []
    for name, value in call.headers.items():
        check_header(name, value)
        if name.lower() in FRAMING_HEADERS:
            raise bad_header(f"the header {name} is set by the connection itself")
        lines.append(f"{name}: {value}")
    if call.body or call.method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(call.body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _authority(place: Place) -> str:
    default = 443 if place.scheme == "https" else 80
    return _bracketed(place.host) + ("" if place.port == default else f":{place.port}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _exchange(link: _Link, call: _Call, head: bytes, reused: bool) -> Reply:
    """Send and read on an open connection, then keep it or close it."""
    budget = link.sock.budget = _Budget(call.deadline, HEAD_BYTES + 8 * call.byte_cap)
    try:
        sent = _transmit(link.sock, head, call.body)
        receive = _receive if call.rest_seconds is None else _receive_status
        reply, keep = receive(link.sock, call, budget)
    except BaseException as error:
        link.sock.close()
        if isinstance(error, _CannotWrite):
            raise error.args[0] from None
        if not isinstance(error, (OSError, HTTPException)):
            raise
        if reused and not budget.received and not isinstance(error, TimeoutError):
            raise _Stale from None
        raise _as_outbound(error, link.route.host) from None
    if sent and keep:
        _pool().put(link)
    else:
        link.sock.close()
    return reply


def _as_outbound(error: OSError | HTTPException, host: str) -> OutboundError:
    if isinstance(error, TimeoutError):
        return OutboundError("timeout", f"{host} did not answer in full in time")
    if isinstance(error, LineTooLong):
        return OutboundError("too_large", f"{host} sent a header line that is too long")
    if isinstance(error, (ConnectionError, IncompleteRead)):
        return OutboundError("disconnected", f"{host} closed the connection before its answer was whole")
    if isinstance(error, ssl.SSLError):
        return OutboundError("tls", f"TLS with {host} failed: {_reason_of(error)}")
    if isinstance(error, OSError):
        return OutboundError("disconnected", f"the connection to {host} broke: {error}")
    return OutboundError("protocol", f"{host} did not answer in HTTP/1.1: {type(error).__name__}")


def _transmit(sock: socket.socket, head: bytes, body: bytes) -> bool:
    """Send it all; False if the other side stopped listening, which does not keep it from answering."""
    try:
        if len(body) <= PIECE_BYTES:
            sock.sendall(head + body)
        else:
            sock.sendall(head)
            sock.sendall(body)
    except ConnectionError:
        return False
    return True


def _receive(sock: _TimedSocket | _TimedTLSSocket, call: _Call, budget: _Budget) -> tuple[Reply, bool]:
    """Read one answer; also: can the connection be used again?"""
    response = HTTPResponse(sock, method=call.method)
    try:
        response.begin()
        while 100 <= response.status < 200 and response.status != 101:
            response.headers = None  # type: ignore[assignment]  # 102 and 103 only announce; read on
            response.begin()
        if budget.ended:
            raise IncompleteRead(b"")  # to `http.client` the end of the connection is the end of the header
        if response.status == 101:
            raise OutboundError("protocol", "the server switched to a protocol nobody asked for")
        headers = _lowered(response)
        bodiless = response.length == 0
        body, truncated = (b"", False) if bodiless else _read_body(response, call)
        keep = not (truncated or response.will_close or _is_ambiguous(headers, bodiless))
        return Reply(response.status, headers, body, truncated, monotonic() - call.started), keep
    finally:
        response.close()


def _receive_status(sock: _TimedSocket | _TimedTLSSocket, call: _Call, budget: _Budget) -> tuple[Reply, bool]:
    """Read one answer of which the status line decides; also: can the connection be used again?"""
    buffer = bytearray(ANSWER_PIECE_BYTES)

    def receive() -> bytes:
        return bytes(buffer[: sock.recv_into(buffer)])

    def shorten() -> None:
        budget.deadline = min(call.deadline, monotonic() + (call.rest_seconds or 0.0))

    try:
        answer = answers.read(receive, shorten, call.byte_cap)
    except answers.NoStatusLine as error:
        host = parse(call.url).host
        raise OutboundError("protocol", f"{host} did not answer in HTTP/1.1: {error}") from None
    took = monotonic() - call.started
    body = bytes(answer.body)
    return Reply(answer.status, answer.headers, body, answer.truncated, took, answer.note), answer.keep


def _lowered(response: HTTPResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for written, value in response.headers.items():
        name = written.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _is_ambiguous(headers: Mapping[str, str], bodiless: bool) -> bool:
    """Could its end be read in two ways?  Then nothing more is read from this connection."""
    return "transfer-encoding" in headers and (bodiless or "content-length" in headers)


def _read_body(response: HTTPResponse, call: _Call) -> tuple[bytes, bool]:
    """The body up to the cap, and whether there was more."""
    into = call.into if 200 <= response.status < 300 else None
    pieces: list[bytes] = []
    count = 0
    while count < call.byte_cap:
        piece = _read(response, min(PIECE_BYTES, call.byte_cap - count))
        if not piece:
            break
        count += len(piece)
        if into is None:
            pieces.append(piece)
        else:
            _write(into, piece)
    truncated = bool(_read(response, 1))
    if response.length and not truncated:
        raise IncompleteRead(b"", response.length)
    return b"".join(pieces), truncated


def _read(response: HTTPResponse, most: int) -> bytes:
    try:
        return response.read(most)
    except (ValueError, OverflowError):
        raise HTTPException("a chunk has a negative size") from None


def _write(into: Sink, piece: bytes) -> None:
    try:
        into.write(piece)
    except OSError as error:
        raise _CannotWrite(error) from None


# Redirects


def _is_redirect(reply: Reply) -> bool:
    return reply.status in (301, 302, 303, 307, 308) and "location" in reply.headers


def _redirected(call: _Call, location: str, from_public: bool) -> _Call:
    """The request that a redirect asks for; credentials stay with the origin they were meant for.

    From a public address it leads to no internal one: whoever answers there may not choose what we reach.
    """
    try:
        url = urljoin(call.url, location)
    except ValueError:
        raise bad_url("the redirect's address can't be read") from None
    before, after = parse(call.url), parse(url)
    if before.scheme == "https" and after.scheme == "http":
        raise OutboundError("protocol", f"{before.host} redirects from https to http")
    if _is_same_owner(before, after):
        return replace(call, url=url)
    kept = {name: value for name, value in call.headers.items() if name.lower() in FORWARDED_HEADERS}
    return replace(call, url=url, headers=kept, guard=call.guard or from_public)


def _is_same_owner(before: Place, after: Place) -> bool:
    """The same origin, or the step from http to https on the default ports of one host."""
    if before[:3] == after[:3]:
        return True
    return before.host == after.host and (before.port, after.port) == (80, 443)
