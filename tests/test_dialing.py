"""A host with several addresses: whichever answers first, held against real sockets on the loopback interface.

An address that answers nothing is a listener whose queue is full: the kernel drops what else comes.
"""

import errno
import select
import socket
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from tests.wire import OK, answering, failing, post, row, timed_out
from webhook_app import dialing, outbound
from webhook_app.dialing import Address, Failures, in_order

pytestmark = pytest.mark.usefixtures("plain_environment")

LONG = 3600.0


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    """Nothing has failed yet."""
    made = Failures()
    monkeypatch.setattr(dialing, "FAILURES", made)
    return made


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
SIX = socket.AF_INET6 if has_ipv6() else socket.AF_INET
"""Where there is no IPv6 the dead addresses are of IPv4: then only the order of the families is not seen."""


class Full:
    """An address that answers nothing until `drain` lets in who waits."""

    def __init__(self, family, stack):
        self.listener = stack.enter_context(
            socket.create_server((LOOPBACK[family], 0), family=family, backlog=0)
        )
        self.address = Address(family, self.listener.getsockname())
        self._fillers = []
        silent = 0
        while silent < 2:  # the queue has room for one or two
            silent = 0 if self._is_answering() else silent + 1
            assert len(self._fillers) < 20
        for sock in self._fillers:
            stack.callback(sock.close)

    def _is_answering(self):
        sock = socket.socket(self.address.family)
        sock.setblocking(False)
        sock.connect_ex(self.address.sockaddr)
        self._fillers.append(sock)
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        return bool(poller.poll(100))

    def drain(self):
        self.listener.settimeout(60)
        for _ in self._fillers:
            self.listener.accept()[0].close()

    @property
    def row(self):
        return (self.address.family, socket.SOCK_STREAM, 6, "", self.address.sockaddr)


@pytest.fixture
def full():
    """`full(family)`: an address that answers nothing."""
    if sys.platform != "linux":
        pytest.skip("only Linux drops what a full queue can't take")
    with ExitStack() as stack:
        yield lambda family=socket.AF_INET: Full(family, stack)


@pytest.fixture
def closed():
    """An address that refuses: bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Address(socket.AF_INET, bound.getsockname())


@pytest.fixture
def living():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Address(socket.AF_INET, listener.getsockname())


class Maker:
    """Makes sockets, keeps them, and calls `on` with the number of each."""

    def __init__(self, on=lambda number: None):
        self.made, self._on = [], on

    def __call__(self, family):
        self._on(len(self.made))
        self.made.append(socket.socket(family))
        return self.made[-1]


def dial(addresses, maker=None, seconds=LONG):
    deadline = time.monotonic() + seconds

    def remaining():
        if time.monotonic() >= deadline:
            raise TimeoutError
        return deadline - time.monotonic()

    return dialing.connect(addresses, maker or Maker(), remaining)


def addresses(*names):
    return [Address(socket.AF_INET6 if ":" in name else socket.AF_INET, (name, 443)) for name in names]


def names(found):
    return [each.sockaddr[0] for each in found]


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ("2::1 2::2 2::3 1.1.1.1 1.1.1.2", "2::1 1.1.1.1 2::2 1.1.1.2 2::3"),
        ("1.1.1.1 1.1.1.2 2::1 2::2 2::3 2::4", "1.1.1.1 2::1 1.1.1.2 2::2 2::3 2::4"),
        ("1.1.1.1 2::1 2::2", "1.1.1.1 2::1 2::2"),
        ("", ""),
    ],
)
def test_families_take_turns_and_that_of_the_first_is_first(given, order):
    assert names(in_order(addresses(*given.split()), lambda _: False)) == order.split()


def test_the_first_family_is_that_of_the_first_address_even_if_that_failed():
    given = addresses("2::1", "1.1.1.1", "2::2")
    order = in_order(given, lambda each: each.sockaddr[0] == "2::1")
    assert names(order) == ["2::2", "1.1.1.1", "2::1"]


def test_what_failed_lately_comes_last():
    given = addresses("2::1", "2::2", "1.1.1.1", "1.1.1.2")
    order = in_order(given, lambda each: each.sockaddr[0] in ("2::1", "1.1.1.1"))
    assert names(order) == ["2::2", "1.1.1.2", "2::1", "1.1.1.1"]


def test_a_failure_is_known_for_a_while_and_forgotten_when_the_address_answers(monkeypatch):
    now = 0.0
    failed = Failures(lambda: now)
    monkeypatch.setattr(dialing, "FAILED_KEPT", 2)
    one, two, three = addresses("1.1.1.1", "1.1.1.2", "1.1.1.3")
    failed.note(one)
    failed.note(two)
    failed.forget(two)
    assert (failed.lately(one), failed.lately(two)) == (True, False)
    now = dialing.FAILED_SECONDS
    assert not failed.lately(one)
    for each in (one, two, three):
        failed.note(each)
    assert [failed.lately(each) for each in (one, two, three)] == [False, True, True]


def test_threads_may_note_and_forget_at_once():
    failed, many = Failures(), addresses(*(f"1.1.{a}.{b}" for a in range(8) for b in range(250)))

    def work():
        for each in many:
            failed.note(each)
            failed.lately(each)
            failed.forget(each)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(map(failed.lately, many))


def test_a_host_with_four_dead_ipv6_addresses_and_a_living_ipv4_one_is_reached(serve, full, failures):
    server = serve(answering(OK))
    dead = [full(SIX) for _ in range(4)]

    def resolve(_host, port, *_rest):
        return [*(each.row for each in dead), row("127.0.0.1", port)]

    for _ in range(2):
        assert post(f"http://hook.test:{server.port}/", resolver=resolve).status == 200
        outbound.close_idle()
    assert server.connections == 2
    assert any(failures.lately(each.address) for each in dead)
    assert not failures.lately(Address(socket.AF_INET, ("127.0.0.1", server.port)))


def test_after_a_failure_the_next_begins_at_once(closed, living, monkeypatch, failures):
    monkeypatch.setattr(dialing, "DELAY_SECONDS", LONG)
    with dial([closed, closed, living]) as sock:
        assert sock.getpeername() == living.sockaddr
    assert (failures.lately(closed), failures.lately(living)) == (True, False)


def test_without_an_answer_the_next_begins_after_a_while_and_the_losers_are_closed(full, living, failures):
    maker, dead = Maker(), full()
    with dial([dead.address, living], maker) as sock:
        assert sock.getpeername() == living.sockaddr
        assert [each.fileno() >= 0 for each in maker.made] == [False, True]
    assert failures.lately(dead.address)
    assert in_order([dead.address, living], failures.lately) == [living, dead.address]


def test_an_earlier_one_goes_on_and_may_still_win(full):
    slow, dead = full(), full()
    maker = Maker(lambda number: slow.drain() if number == 1 else None)
    with dial([slow.address, dead.address], maker) as sock:
        assert sock.getpeername() == slow.address.sockaddr
        assert [each.fileno() >= 0 for each in maker.made] == [True, False]


def test_all_of_it_is_within_the_deadline(full):
    dead = [full() for _ in range(3)]
    maker = Maker()
    with pytest.raises(TimeoutError):
        dial([each.address for each in dead], maker, seconds=0.4)
    assert all(each.fileno() == -1 for each in maker.made)
    timed_out(
        lambda: post(
            "http://hook.test/", timeout_seconds=0.3, resolver=lambda *_: [each.row for each in dead]
        )
    )


def test_when_all_refuse_it_is_a_connect_error(closed):
    refused = lambda *_: [row("127.0.0.1", closed.sockaddr[1])] * 2  # noqa: E731
    error = failing(lambda: post("http://hook.test/", resolver=refused))
    assert error.reason == "connect"
    assert "refused" in str(error)


class NoIPv6(socket.socket):
    """A socket on a machine without IPv6: it can't be made, or finds no way at once."""

    code: int | None = None
    raised: OSError | None = None

    def connect_ex(self, address):
        if address[0] != "::1":
            return super().connect_ex(address)
        if self.raised is not None:
            raise self.raised
        return self.code


def without_ipv6(monkeypatch, how):
    """Have `outbound` make sockets of such a machine; those that were made, and the families asked for."""
    made, asked = [], []

    def make(family, *kind):
        asked.append(family)
        if family == socket.AF_INET6 and how == errno.EAFNOSUPPORT:
            raise OSError(how, "Address family not supported by protocol")
        sock = outbound_socket(socket.AF_INET, *kind)
        sock.code, sock.raised = (how, None) if isinstance(how, int) else (None, how)
        made.append(sock)
        return sock

    class outbound_socket(NoIPv6, outbound._TimedSocket):  # noqa: N801
        pass

    monkeypatch.setattr(outbound, "_TimedSocket", make)
    return made, asked


HOW = [errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EADDRNOTAVAIL, socket.gaierror(-9, "no such family")]


def six(port):
    return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_without_ipv6_a_host_with_both_families_is_reached(serve, monkeypatch, failures, how):
    monkeypatch.setattr(dialing, "DELAY_SECONDS", LONG)  # what can't be tried is not waited for
    server = serve(answering(OK))
    made, asked = without_ipv6(monkeypatch, how)
    resolve = lambda _host, port, *_: [six(port), row("127.0.0.1", port)]  # noqa: E731
    assert post(f"http://hook.test:{server.port}/", resolver=resolve).status == 200
    outbound.close_idle()
    assert asked == [socket.AF_INET6, socket.AF_INET]
    assert all(each.fileno() == -1 for each in made)
    assert failures.lately(Address(socket.AF_INET6, ("::1", server.port, 0, 0)))
    assert post(f"http://hook.test:{server.port}/", resolver=resolve).status == 200
    assert asked[2:] == [socket.AF_INET]
    outbound.close_idle()


@pytest.mark.parametrize("how", HOW, ids=str)
def test_without_ipv6_a_host_with_nothing_else_is_a_connect_error(monkeypatch, how):
    made, _ = without_ipv6(monkeypatch, how)
    error = failing(lambda: post("http://hook.test/", resolver=lambda _host, port, *_: [six(port)] * 2))
    assert error.reason == "connect"
    assert all(each.fileno() == -1 for each in made)


def test_what_can_not_be_tried_does_not_end_those_under_way(full, failures):
    slow, impossible = full(), Address(socket.AF_INET6, ("::1", 443, 0, 0))

    def on(number):
        if number == 1:
            slow.drain()
            raise OSError(errno.EAFNOSUPPORT, "no such family")

    maker = Maker(on)
    with dial([slow.address, impossible], maker) as sock:
        assert sock.getpeername() == slow.address.sockaddr
    assert failures.lately(impossible)


def test_whatever_is_raised_no_socket_stays_open(full):
    def on(number):
        if number == 1:
            raise RuntimeError("a fault of ours")

    maker = Maker(on)
    with pytest.raises(RuntimeError):
        dial([full().address, full().address], maker)
    odd = Maker()
    with pytest.raises(OverflowError):
        dial([Address(socket.AF_INET, ("127.0.0.1", 70_000))], odd)
    assert [each.fileno() for each in (*maker.made, *odd.made)] == [-1, -1]


def test_a_connection_whose_options_can_not_be_set_is_closed(serve, monkeypatch):
    made = []

    class Refusing(outbound._TimedSocket):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

        def setsockopt(self, *given):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(outbound, "_TimedSocket", Refusing)
    assert failing(lambda: post(serve(answering(OK)).url)).reason == "connect"
    assert [each.fileno() for each in made] == [-1]


def test_no_more_than_so_many_are_tried_and_the_next_go_begins_with_the_others(closed, living):
    with ExitStack() as stack:
        refusing = []
        for _ in range(dialing.MOST_ADDRESSES + 1):
            bound = stack.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            refusing.append(Address(socket.AF_INET, bound.getsockname()))
        maker = Maker()
        with pytest.raises(ConnectionRefusedError):
            dial([*refusing, living], maker)
        assert len(maker.made) == dialing.MOST_ADDRESSES
        with dial([*refusing, living]) as sock:
            assert sock.getpeername() == living.sockaddr


def test_a_proxy_with_a_dead_address_is_reached(serve, full, monkeypatch):
    server, dead = serve(answering(OK)), full(SIX)
    monkeypatch.setenv("http_proxy", f"http://proxy.test:{server.port}")

    def resolve(host, port, *_rest):
        assert host == "proxy.test"
        return [dead.row, row("127.0.0.1", port)]

    assert post("http://hook.test/", resolver=resolve).status == 200
    assert server.asked[0].line == "POST http://hook.test/ HTTP/1.1"
