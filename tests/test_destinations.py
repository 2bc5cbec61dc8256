"""Where the outgoing door may lead: addresses judged when connecting, URLs of subscribers, headers.

Nothing here leaves the loopback interface.  Names are resolved by a function of the test.
"""

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire import (
    OK,
    answering,
    failing,
    post,
    resolving,
    row,
)
from webhook_app import outbound
from webhook_app.destinations import OutboundError, check_callback_url, check_headers, parse
from webhook_app.outbound import send

pytestmark = pytest.mark.usefixtures("plain_environment")


# The address guard

REFUSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "100.64.0.1", "169.254.169.254", "169.254.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "100.100.100.200",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8",
    "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a83f:8110", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:808:808::1", "2001::1", "2001:0:53aa:64c:0:7877:80ff:fffe", "2001:db8::1",
    "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "3fff::1", "5f00::1", "4000::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "64:ff9b::808:808"]
INTERNAL = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "::1",
    "fc00::1",
]
NEVER = sorted(set(REFUSED) - set(INTERNAL) - {"127.8.8.8", "172.31.255.255", "64:ff9b::7f00:1"})


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", REFUSED)
def test_an_internal_address_is_refused_behind_a_name(dialled, address):
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=address)))
    assert (error.reason, error.permanent, dialled) == ("address_refused", False, [])
    assert "hook.test" in str(error)


@pytest.mark.parametrize("address", REFUSED)
def test_an_internal_address_is_refused_when_written(dialled, address):
    url = f"https://{bracketed(address)}/"
    error = failing(lambda: post(url, guard=True))
    assert (error.reason, error.permanent, dialled) == ("address_refused", True, [])
    error = failing(lambda: check_callback_url(url, allow_private=False))
    assert (error.reason, error.permanent) == ("address_refused", True)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(dialled, address):
    check_callback_url(f"https://{bracketed(address)}/", allow_private=False)
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("connect", [address])


@pytest.mark.parametrize("address", INTERNAL)
def test_without_the_guard_internal_addresses_are_allowed(dialled, address):
    check_callback_url(f"http://{bracketed(address)}:8080/", allow_private=True)
    error = failing(lambda: post("http://hook.test/", resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("connect", [address])


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_refused_without_the_guard_too(dialled, address):
    error = failing(lambda: post("http://hook.test/", resolver=resolving(hook_test=address)))
    assert (error.reason, dialled) == ("address_refused", [])
    assert (
        failing(lambda: check_callback_url(f"http://{bracketed(address)}/", True)).reason == "address_refused"
    )


@pytest.mark.parametrize("answers", [["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"]])
def test_a_name_with_one_internal_address_is_refused_whole(dialled, answers):
    error = failing(lambda: post("https://hook.test/", guard=True, resolver=resolving(hook_test=answers)))
    assert (error.reason, dialled) == ("address_refused", [])


def test_a_rebinding_name_is_connected_to_the_judged_address_only(dialled):
    answers = iter(["8.8.8.8", "127.0.0.1"])

    def rebinding(_host, port, *_rest):
        return [row(next(answers), port)]

    assert failing(lambda: post("https://hook.test/", guard=True, resolver=rebinding)).reason == "connect"
    assert dialled == ["8.8.8.8"]
    assert (
        failing(lambda: post("https://hook.test/", guard=True, resolver=rebinding)).reason
        == "address_refused"
    )
    assert dialled == ["8.8.8.8"]


def test_the_next_address_is_tried_when_one_does_not_answer(serve):
    server = serve(answering(OK))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed_port = unused.getsockname()[1]

    def two(_host, port, *_rest):
        return [row("127.0.0.1", closed_port), row("127.0.0.1", port)]

    assert post(f"http://hook.test:{server.port}/", resolver=two).status == 200


# URLs of subscribers


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/",
        "https://hooks.example.com:8443/a/b?c=d&e=%20",
        "https://b\xfccher.example/\xfc",
        "https://xn--bcher-kva.example/",
        "https://EXAMPLE.com./x",
        "https://b\xfccher.example./x",
        "https://i\u2764.ws/",
        "https://i\u2764\ufe0f.ws/",
        "https://my_service.example.com/x",
        "https://1.example.com/",
        "https://example.com/@user/it's[1]",
    ],
)
def test_good_callback_urls(url):
    check_callback_url(url, allow_private=False)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("example.com/x", "bad_url"),
        ("//example.com/x", "bad_url"),
        ("http://example.com/", "bad_url"),
        ("ftp://example.com/", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("https://", "bad_url"),
        ("https:///path", "bad_url"),
        ("https://user:pw@example.com/", "bad_url"),
        ("https://user@example.com/", "bad_url"),
        ("https://@example.com/", "bad_url"),
        ("https://example.com@127.0.0.1/", "bad_url"),
        ("https://127.0.0.1\\@example.com/", "bad_url"),
        ("https://example.com/#part", "bad_url"),
        ("https://example.com#@127.0.0.1/", "bad_url"),
        ("https://example.com/a b", "bad_url"),
        ("https://example.com/\r\nX: y", "bad_url"),
        ("https://exam\tple.com/", "bad_url"),
        ("https://example.com/\0", "bad_url"),
        ("https://example.com/\x7f", "bad_url"),
        ("https://example.com/\ud800", "bad_url"),
        (" https://example.com/", "bad_url"),
        ("https://example.com/" + "a" * 2030, "bad_url"),
        ("https://" + "a." * 130 + "com/", "bad_url"),
        ("https://" + "a" * 64 + ".com/", "bad_url"),
        ("https://exa..mple.com/", "bad_url"),
        ("https://-example.com/", "bad_url"),
        ("https://ex%61mple.com/", "bad_url"),
        ("https://example.com:0/", "bad_url"),
        ("https://example.com:65536/", "bad_url"),
        ("https://example.com:abc/", "bad_url"),
        ("https://example.com:-1/", "bad_url"),
        ("https://[::1/", "bad_url"),
        ("https://[fe80::1%25eth0]/", "bad_url"),
        ("https://[1:2]/", "bad_url"),
        ("https://localhost/", "address_refused"),
        ("https://LOCALHOST./", "address_refused"),
        ("https://db.localhost:5432/", "address_refused"),
        ("https://2130706433/", "address_refused"),
        ("https://0x7f000001/", "address_refused"),
        ("https://0x7f.1/", "address_refused"),
        ("https://0177.0.0.1/", "address_refused"),
        ("https://127.1/", "address_refused"),
        ("https://127.0.0.1./", "address_refused"),
        ("https://127.0.0.0x1/", "address_refused"),
        ("https://0/", "address_refused"),
        ("https://\u2460\u2461\u2466.0.0.1/", "address_refused"),
        ("https://\uff11\uff12\uff17\u30020\u30020\u30021/", "address_refused"),
        ("https://\u24c1ocalhost/", "address_refused"),
        ("https://\uff11\uff12\uff17.0.0.1/", "address_refused"),
        ("https://127\u30020\u30020\u30021/", "address_refused"),
        ("https://127\uff0e0\uff0e0\uff0e1\u3002/", "address_refused"),
        ("https://\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1/", "address_refused"),
        ("https://\uff10x7f000001/", "address_refused"),
        ("https://l\xadocalhost\u3002/", "address_refused"),
        ("https://a\u200db.example/", "bad_url"),
        ("https://\u0301a.example/", "bad_url"),
        ("https://\u05d0a.example/", "bad_url"),
        ("https://xn--\xfc.example/", "bad_url"),
        ("https://\xfc*.example/", "bad_url"),
        ("https://\xfc..example/", "bad_url"),
        ("https://" + "\u2764" * 80 + ".ws/", "bad_url"),
        ("https://[0:0:0:0:0:ffff:7f00:1]/", "address_refused"),
    ],
)
def test_bad_callback_urls(url, reason):
    error = failing(lambda: check_callback_url(url, allow_private=False))
    assert (error.reason, error.permanent) == (reason, True)
    assert "pw" not in str(error)
    # Refused at the registration, refused at the sending: but for the rules of registrations alone.
    if not url.startswith("http://") and "#" not in url and len(url) <= 2048:
        assert failing(lambda: post(url, guard=True, resolver=resolving())).reason == reason


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("example.com.", "example.com"),
        ("B\xdcCHER.example", "xn--bcher-kva.example"),
        ("b\xfccher\u3002example\u3002", "xn--bcher-kva.example"),
        ("stra\xdfe.de", "xn--strae-oqa.de"),  # not "strasse": since 2008 that is another name
        ("i\u2764.ws", "xn--i-7iq.ws"),
        ("i\u2764\ufe0f.ws", "xn--i-7iq.ws"),
        ("xn--i-7iq.ws", "xn--i-7iq.ws"),
        ("\U0001fae0.ws", "xn--129h.ws"),
        ("\u2603.net", "xn--n3h.net"),
        ("a_\xfc.example", "xn--a_-yka.example"),
        ("\u05d0\u05d1\u05d2.example", "xn--4dbcd.example"),
        ("\uff45xample.com", "example.com"),
    ],
)
def test_a_host_is_read_as_browsers_read_it(written, read):
    assert parse(f"https://{written}/").host == read


def test_where_private_callbacks_are_allowed():
    for url in (
        "http://localhost:9000/x",
        "http://127.0.0.1/",
        "http://builder/",
        "https://192.168.0.7/",
        "http://[::1]:1/",
    ):
        check_callback_url(url, allow_private=True)
    for url in ("http://169.254.169.254/", "http://2130706433/", "http://0.0.0.0:80/"):
        assert (
            failing(lambda url=url: check_callback_url(url, allow_private=True)).reason == "address_refused"
        )


URL_PIECES = st.sampled_from(
    ["https://", "http://", "example.com", "127.0.0.1", "[", "]", "::1", "@", ":", "/", "#", "?", "%", "\\",
     ".", "..", "0x7f", "xn--", "443", "99999", "\u3002", "\u0130", "\xad", "\u200d", "\ud800", "\0", "\r\n",
     "[v1.a]"]
)  # fmt: skip


@given(
    st.one_of(st.text(), st.lists(st.one_of(URL_PIECES, st.text(max_size=3)), max_size=9).map("".join)),
    st.booleans(),
)
@settings(max_examples=500)
def test_a_callback_url_is_accepted_or_refused_but_never_breaks(url, allow_private):
    with suppress(OutboundError):
        check_callback_url(url, allow_private)


SPELLINGS: list[Callable[[int], str]] = [
    lambda number: str(ipaddress.IPv4Address(number)),
    str,
    hex,
    lambda number: f"0{number:o}",
    lambda number: ".".join(f"0{byte:o}" for byte in number.to_bytes(4)),
    lambda number: ".".join(hex(byte) for byte in number.to_bytes(4)),
    lambda number: f"{number >> 24}.{number & 0xFFFFFF}",
    lambda number: f"{number >> 24}.{number >> 16 & 0xFF}.{number & 0xFFFF}",
    lambda number: f"[::ffff:{ipaddress.IPv4Address(number)}]",
    lambda number: f"[::{ipaddress.IPv4Address(number)}]",
    lambda number: f"[64:ff9b::{ipaddress.IPv4Address(number)}]",
    lambda number: f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
]
PRIVATE_NETWORKS = [
    ipaddress.IPv4Network(each)
    for each in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
    )
]


@given(
    st.sampled_from(PRIVATE_NETWORKS).flatmap(lambda network: st.ip_addresses(network=network)),
    st.sampled_from(SPELLINGS),
)
@settings(max_examples=300)
def test_no_spelling_of_an_internal_address_is_accepted(address, spelling):
    error = failing(lambda: check_callback_url(f"https://{spelling(int(address))}/", allow_private=False))
    assert error.reason == "address_refused"


# Headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer x"},
        {"X-Key": ""},
        {"X_Api_Key": "x", "X-Gitlab-Token": "x", "x-build-token": "x"},
        {"x-name": "caf\xe9\tz"},
        {f"x-{n}": "v" for n in range(20)},
    ],
)
def test_good_custom_headers(headers):
    check_headers(headers)


SMUGGLED = [
    {"X": "a\r\nY: b"}, {"X": "a\nY: b"}, {"X": "a\rb"}, {"X": "a\0b"}, {"X": "a\x1fb"}, {"X": "\x7f"},
    {"X": "\u20ac"}, {"X": "\u010d\u010a"}, {"X": "\ud800"}, {"": "a"}, {"X Y": "a"}, {"X:": "a"},
    {"X\r\nY": "a"}, {" X": "a"}, {"X\0": "a"}, {"X\xe9": "a"}, {"(X)": "a"}, {"X": 1}, {"X": None}, {1: "a"},
    {"X" * 257: "a"},
]  # fmt: skip


@pytest.mark.parametrize("headers", SMUGGLED)
def test_headers_that_would_break_the_line_are_refused_everywhere(serve, headers):
    error = failing(lambda: check_headers(headers))
    assert (error.reason, error.permanent) == ("bad_header", True)
    server = serve(answering(OK))
    assert failing(lambda: post(server.url, headers=headers)).reason == "bad_header"
    assert server.connections == 0


@pytest.mark.parametrize(
    "name",
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer", "Upgrade",
     "Expect", "Proxy-Authorization", "Proxy-Connection", "Webhook-Id", "webhook-anything", "Content-Type",
     "Content-Encoding", "Accept-Encoding", "User-Agent", "Content_Length", "TRANSFER_ENCODING", "webhook_id",
     "Webhook.Signature", "X_Hub_Signature_256", "x_hub-signature-256", "X_GitHub_Event", "X.Gitlab.Token",
     "X_Build_Token", "Proxy_Authorization"],
)  # fmt: skip
def test_headers_that_are_ours_or_of_the_connection_are_refused(name):
    assert failing(lambda: check_headers({name: "x"})).reason == "bad_header"


def test_too_many_too_large_or_doubled_headers_are_refused():
    for headers in (
        {f"x-{n}": "v" for n in range(21)},
        {"x": "v" * 9000},
        {"X-A": "1", "x-a": "2"},
        {"X-A": "1", "X_A": "2"},
    ):
        assert failing(lambda headers=headers: check_headers(headers)).reason == "bad_header"


@pytest.mark.parametrize(
    "name", ["host", "Content-Length", "Transfer-Encoding", "Connection", "Accept-Encoding"]
)
def test_no_caller_sets_what_frames_a_request(name):
    assert failing(lambda: post("http://127.0.0.1:1/", headers={name: "1"})).reason == "bad_header"


def test_a_refused_header_does_not_show_its_value():
    assert "swordfish" not in str(failing(lambda: check_headers({"X": "swordfish\r\n"})))


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4))
def test_whatever_passes_the_check_makes_exactly_its_lines(headers):
    try:
        check_headers(headers)
    except OutboundError:
        return
    call = outbound._Call("POST", "http://x.test/", headers, b"", 0.0, 0.0, 0, True, None, resolving())
    head = outbound._head(call, parse(call.url), "")
    assert head.count(b"\r\n") == head.count(b"\n") == head.count(b"\r") == 1 + 2 + len(headers) + 2


def test_a_method_is_a_method():
    with pytest.raises(ValueError, match="HTTP method"):
        send("GET / HTTP/1.1\r\nX:", "http://127.0.0.1:1/", {}, timeout_seconds=1, byte_cap=1, guard=False)
