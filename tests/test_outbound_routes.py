"""The outgoing door on longer ways: redirects, TLS, proxies.

Nothing here leaves the loopback interface.  Names are resolved by a function of the test.
"""

import base64
import datetime
import io
import os
import select
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.wire import (
    OK,
    Connection,
    answering,
    dripping,
    failing,
    get,
    once,
    post,
    redirecting,
    resolving,
    row,
    timed_out,
)
from webhook_app import outbound
from webhook_app.destinations import parse

pytestmark = pytest.mark.usefixtures("plain_environment")


# Redirects

SECRETS = {
    "Authorization": "Bearer s",
    "PRIVATE-TOKEN": "s",
    "Cookie": "s",
    "X-Unknown": "s",
    "Accept": "application/json",
}


def test_a_redirect_is_an_answer_unless_it_is_to_be_followed(serve):
    target = serve(answering(OK))
    server = serve(answering(redirecting(target.url)))
    assert get(server.url).status == 302
    assert target.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_origin_keeps_the_credentials(serve, status):
    server = serve(answering(redirecting("/other?x=1", status), OK))
    sink = io.BytesIO()
    reply = get(server.url, headers=SECRETS, follow_redirects=True, into=sink)
    assert (reply.status, sink.getvalue()) == (200, b"ok")
    assert server.asked[1].line == "GET /other?x=1 HTTP/1.1"
    assert server.asked[1].headers["authorization"] == "Bearer s"


def test_another_origin_gets_no_credentials(serve):
    target = serve(answering(OK))
    server = serve(answering(redirecting(f"{target.url}?sig=1#fragment")))
    assert get(server.url, headers=SECRETS, follow_redirects=True).status == 200
    assert server.asked[0].headers["private-token"] == "s"
    assert target.asked[0].line == "GET /hook?sig=1 HTTP/1.1"
    assert set(target.asked[0].headers) == {"host", "accept-encoding", "accept"}


def test_another_name_for_the_same_server_gets_no_credentials(serve):
    server = serve(answering(OK))
    here = serve(answering(redirecting(f"http://other.test:{server.port}/")))
    get(here.url, headers=SECRETS, follow_redirects=True, resolver=resolving(other_test="127.0.0.1"))
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("https://a.test/x", "https://a.test:443/y", True),
        ("http://a.test/x", "https://a.test/y", True),
        ("http://a.test:8080/x", "https://a.test/y", False),
        ("http://a.test/x", "https://b.test/y", False),
        ("https://a.test/x", "https://a.test:8443/y", False),
        ("https://a.test/x", "https://A.test./y", True),
    ],
)
def test_who_may_see_the_credentials(before, after, same):
    assert outbound._is_same_owner(parse(before), parse(after)) is same


def test_redirects_come_to_an_end(serve):
    server = serve(answering(redirecting("/again")))
    assert failing(lambda: get(server.url, follow_redirects=True)).reason == "protocol"
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "address_refused"),
        ("http://meta.test/", "address_refused"),
        ("file:///etc/passwd", "bad_url"),
        ("http://[", "bad_url"),
        ("http://u:p@hook.test/", "bad_url"),
    ],
)
def test_each_step_of_a_redirect_is_judged(serve, location, reason):
    server = serve(answering(redirecting(location)))
    resolver = resolving(meta_test="169.254.169.254")
    assert failing(lambda: get(server.url, follow_redirects=True, resolver=resolver)).reason == reason


@pytest.fixture
def public(monkeypatch):
    """127.0.0.1 counts as a public address once it is connected to."""
    judge = outbound.refusal
    monkeypatch.setattr(
        outbound,
        "refusal",
        lambda address, guard: None if str(address) == "127.0.0.1" else judge(address, guard),
    )


INTERNAL = ["http://127.0.0.2:9/", "http://10.0.0.1/admin", "http://localhost:9/", "http://inside.test:9/"]


@pytest.mark.parametrize("location", INTERNAL)
def test_a_public_server_does_not_redirect_to_an_internal_one(serve, public, location):
    server, resolver = serve(answering(redirecting(location))), resolving(inside_test="127.0.0.2")
    asked = failing(lambda: get(server.url, follow_redirects=True, resolver=resolver))
    assert asked.reason == "address_refused"
    again = failing(lambda: get(server.url, follow_redirects=True, resolver=resolver))
    assert again.reason == "address_refused", "over the connection that was kept as well"


def test_nor_over_a_public_one_in_between(serve, public, monkeypatch):
    last = serve(answering(redirecting("http://127.0.0.2:9/")))
    first = serve(answering(redirecting(last.url.replace("127.0.0.1", "here.test"))))
    resolver = resolving(here_test="127.0.0.1")
    error = failing(lambda: get(first.url, follow_redirects=True, resolver=resolver))
    assert error.reason == "address_refused"
    assert len(last.asked) == 1


@pytest.mark.parametrize("location", INTERNAL[:1] + INTERNAL[3:])
def test_an_internal_server_may_redirect_to_another(serve, location):
    server, resolver = serve(answering(redirecting(location))), resolving(inside_test="127.0.0.2")
    assert failing(lambda: get(server.url, follow_redirects=True, resolver=resolver)).reason == "connect"


def test_behind_a_proxy_a_server_counts_as_public(serve, monkeypatch):
    proxy = serve(answering(redirecting("http://127.0.0.1:9/")))
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert failing(lambda: get("http://api.test/", follow_redirects=True)).reason == "address_refused"


def test_only_a_get_follows():
    with pytest.raises(ValueError, match="GET"):
        post("http://127.0.0.1:1/", follow_redirects=True)


def test_the_deadline_is_one_for_all_steps(serve):
    def slow(connection: Connection) -> None:
        while connection.read_request() is not None:
            connection.gone(0.15)
            connection.say(redirecting("/again"))

    server = serve(slow)
    timed_out(lambda: get(server.url, follow_redirects=True, timeout_seconds=0.25))


# TLS


@dataclass
class Authority:
    """A certificate authority for one test run."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    folder: Path

    @property
    def path(self) -> str:
        return str(self.folder / "authority.pem")

    def context(self, name: str, days: int = 30) -> ssl.SSLContext:
        """A server that shows a certificate for `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = _certificate(name, key, self.certificate.subject, self.key, [alternative], days)
        path = self.folder / f"{name}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _certificate(name, key, issuer, issuer_key, extensions, days=30) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    is_authority = not extensions
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = builder.add_extension(
        x509.KeyUsage(digital_signature=True, key_cert_sign=is_authority, crl_sign=is_authority, **usage),
        critical=True,
    )
    if not is_authority:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    certificate = _certificate("test authority", key, name, key, [])
    made = Authority(key, certificate, tmp_path_factory.mktemp("tls"))
    Path(made.path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return made


@pytest.fixture
def trusted(authority, monkeypatch) -> Authority:
    monkeypatch.setenv("SSL_CERT_FILE", authority.path)
    return authority


HOOK = resolving(hook_test="127.0.0.1", other_test="127.0.0.1")


def test_tls_proves_the_name_although_the_connection_goes_to_an_address(serve, trusted):
    context = trusted.context("hook.test")
    named: list[str | None] = []
    context.sni_callback = lambda _sock, name, _context: named.append(name)
    server = serve(answering(OK), context)
    for _ in range(3):
        assert post(f"https://hook.test:{server.port}/x", resolver=HOOK).body == b"ok"
    assert named == ["hook.test"]
    assert server.connections == 1
    assert server.asked[0].headers["host"] == f"hook.test:{server.port}"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("hook.test.", "hook.test"),
        ("b\xfccher.test", "xn--bcher-kva.test"),
        ("b\xfccher.test\u3002", "xn--bcher-kva.test"),
        ("i\u2764.test", "xn--i-7iq.test"),
    ],
)
def test_tls_proves_a_name_without_its_last_dot_and_in_ascii(serve, trusted, written, name):
    context = trusted.context(name)
    named: list[str | None] = []
    context.sni_callback = lambda _sock, given, _context: named.append(given)
    server = serve(answering(OK), context)
    asked: list[str] = []

    def resolve(host, port, *_rest):
        asked.append(host)
        return [row("127.0.0.1", port)]

    assert post(f"https://{written}:{server.port}/x", resolver=resolve).body == b"ok"
    assert named == asked == [name]
    assert server.asked[0].headers["host"] == f"{name}:{server.port}"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_each_variable_names_the_trusted_certificates(serve, authority, monkeypatch, variable):
    monkeypatch.setenv(variable, authority.path)
    server = serve(answering(OK), authority.context("hook.test"))
    assert get(f"https://hook.test:{server.port}/", resolver=HOOK).status == 200


def test_a_certificate_for_another_name_is_refused(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test"))
    error = failing(lambda: post(f"https://other.test:{server.port}/", resolver=HOOK))
    assert (error.reason, error.permanent) == ("tls", False)
    assert "other.test" in str(error)
    assert server.asked == []


def test_an_expired_certificate_is_refused(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test", days=-1))
    error = failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK))
    assert error.reason == "tls"
    assert "expired" in str(error)


def test_an_unknown_authority_is_refused(serve, authority):
    server = serve(answering(OK), authority.context("hook.test"))
    assert failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK)).reason == "tls"
    assert server.asked == []


def test_a_server_without_tls_is_a_tls_error(serve, trusted):
    server = serve(lambda connection: connection.say(b"220 mail.test ESMTP\r\n") or connection.gone(60))
    assert failing(lambda: post(f"https://hook.test:{server.port}/", resolver=HOOK)).reason == "tls"


def test_a_missing_bundle_is_told(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/bundle.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"https://hook.test:{listening.getsockname()[1]}/"
        error = failing(lambda: post(url, resolver=HOOK))
    assert error.reason == "tls"
    assert "/nowhere/bundle.pem" in str(error)


def test_a_handshake_that_never_comes_is_cut_at_the_deadline(serve, trusted):
    server = serve(lambda connection: connection.gone(60) and connection.read_request())
    timed_out(lambda: post(f"https://hook.test:{server.port}/", timeout_seconds=0.3, resolver=HOOK))


@pytest.mark.parametrize(
    "prefix", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"]
)
def test_a_drip_through_tls_is_cut_at_the_deadline(serve, trusted, prefix):
    server = serve(dripping(prefix, b"z"), trusted.context("hook.test"))
    timed_out(lambda: post(f"https://hook.test:{server.port}/", timeout_seconds=0.25, resolver=HOOK))


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (b"HTTP/1.1 200 OK\r\n", "the connection was closed within the header"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfour", "closed 5 bytes before the end of the body"),
        (OK, None),
    ],
)
def test_a_status_line_decides_through_tls_too(serve, trusted, answer, note):
    server = serve(once(answer), trusted.context("hook.test"))
    reply = post(f"https://hook.test:{server.port}/", resolver=HOOK, rest_seconds=60)
    assert reply.status == 200
    assert note in reply.note if note else reply.note is None


def test_a_large_body_goes_through_tls_whole(serve, trusted):
    server = serve(answering(OK), trusted.context("hook.test"))
    body = os.urandom(3_000_000)
    assert post(f"https://hook.test:{server.port}/", body, resolver=HOOK).status == 200
    assert server.asked[0].body == body


def test_a_kept_tls_connection_that_closes_is_replaced(serve, trusted):
    def handle(connection: Connection) -> None:
        connection.read_request()
        connection.say(OK)
        if connection.index == 0:
            connection.read_request()

    server = serve(handle, trusted.context("hook.test"))
    for _ in range(2):
        assert post(f"https://hook.test:{server.port}/", resolver=HOOK).status == 200
    assert server.connections == 2


def test_a_redirect_never_leaves_tls(serve, trusted):
    target = serve(answering(OK))
    server = serve(answering(redirecting(target.url)), trusted.context("hook.test"))
    url = f"https://hook.test:{server.port}/"
    assert failing(lambda: get(url, follow_redirects=True, resolver=HOOK)).reason == "protocol"
    assert target.connections == 0


# Proxies


def proxying(connection: Connection) -> None:
    """A proxy that connects to the port asked for, on this machine."""
    asked = connection.read_request()
    if asked is None:
        return
    if not asked.line.startswith("CONNECT"):
        connection.say(OK)
        return
    port = int(asked.line.split()[1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as target:
        connection.say(b"HTTP/1.1 200 Connection established\r\n\r\n")
        _relay(connection.sock, target)


def _relay(one: socket.socket, two: socket.socket) -> None:
    other = {one: two, two: one}
    while True:
        readable, _, _ = select.select([one, two], [], [], 5)
        for sock in readable:
            data = sock.recv(65536)
            if not data:
                return
            other[sock].sendall(data)


def nobody(*_args) -> list:
    raise AssertionError("behind a proxy no name is resolved here")


def test_https_goes_through_the_proxy_and_tls_still_proves_the_name(serve, trusted, monkeypatch):
    proxy = serve(proxying)
    server = serve(answering(OK), trusted.context("hook.test"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss@127.0.0.1:{proxy.port}")
    for _ in range(2):
        assert post(f"https://hook.test:{server.port}/x", guard=True, resolver=nobody).status == 200
    (connect,) = proxy.asked
    assert connect.line == f"CONNECT hook.test:{server.port} HTTP/1.1"
    assert connect.headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert "proxy-authorization" not in server.asked[0].headers


def test_http_through_a_proxy_names_the_whole_url(serve, monkeypatch):
    proxy = serve(proxying)
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert get("http://hook.test:81/x?y=z", resolver=nobody).status == 200
    assert proxy.asked[0].line == "GET http://hook.test:81/x?y=z HTTP/1.1"
    assert proxy.asked[0].headers["host"] == "hook.test:81"


def test_no_proxy_is_honoured(serve, monkeypatch):
    server = serve(answering(OK))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", ".test")
    assert get(f"http://hook.test:{server.port}/", resolver=HOOK).status == 200


def test_loopback_never_goes_through_a_proxy(serve, monkeypatch):
    server = serve(answering(OK))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert get(server.url).status == 200


def test_an_internal_address_is_refused_behind_a_proxy_too(monkeypatch, dialled):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert failing(lambda: post("https://169.254.169.254/", guard=True)).reason == "address_refused"
    assert failing(lambda: post("https://0x7f.1/", guard=True)).reason == "address_refused"
    assert dialled == []


def test_a_proxy_that_refuses_is_a_connect_error(serve, monkeypatch):
    proxy = serve(once(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    error = failing(lambda: post("https://hook.test/", guard=True))
    assert error.reason == "connect"
    assert "407" in str(error)


@pytest.mark.parametrize(
    "proxy",
    ["https://user:swordfish@127.0.0.1:1", "socks5://user:swordfish@127.0.0.1:1", "http://user:swordfish@[::1",
     "http://user:swordfish@127.0.0.1:99999", "http://"],
)  # fmt: skip
def test_proxies_that_cannot_be_used_are_named(monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    error = failing(lambda: post("https://hook.test/", guard=True))
    assert error.reason == "connect"
    assert "swordfish" not in str(error)


def test_a_dripping_proxy_is_cut_at_the_deadline(serve, monkeypatch):
    proxy = serve(dripping(b"HTTP/1.1 200 OK\r\nX: ", b"y"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    timed_out(lambda: post("https://hook.test/", timeout_seconds=0.25))
