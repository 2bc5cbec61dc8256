"""Logs as they are kept: two ends of any size, clean, without secrets; and the lines that tell an error."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import logs
from webhook_app.logs import Keeper, Log, error_of, joined, pack, shares, text_of, unpack
from webhook_app.redaction import redactor

TOKEN = "ghp_0123456789abcdef0123456789abcdef0123"
REDACT = redactor(["our-own-secret"])


def kept(content, head=10_000, tail=10_000, piece=None):
    keeper = Keeper(head, tail)
    step = piece or max(len(content), 1)
    for at in range(0, len(content), step):
        keeper.write(content[at : at + step])
    return text_of(keeper, REDACT)


# ---- two ends --------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(1, 40), st.integers(1, 40))
def test_a_keeper_holds_the_two_ends_whatever_the_pieces(pieces, head, tail):
    keeper = Keeper(head, tail)
    for piece in pieces:
        keeper.write(piece)
    whole = b"".join(pieces)
    assert bytes(keeper.head) == whole[:head]
    assert keeper.tail == whole[head:][-tail:]
    assert keeper.omitted == max(len(whole) - head - tail, 0)


def test_a_keeper_takes_no_more_memory_than_it_keeps():
    keeper = Keeper(1000, 5000)
    for _ in range(2000):
        keeper.write(b"x" * 4096)
        assert len(keeper.head) + len(keeper._tail) <= 1000 + 2 * 5000 + 4096
    assert keeper.total == 2000 * 4096


def test_what_does_not_fit_is_left_out_at_line_ends_and_said():
    content = b"".join(b"line %06d\n" % n for n in range(100_000))
    log = kept(content, 1000, 2000)
    assert log.truncated
    (between,) = [n for n, line in enumerate(log.lines) if line.startswith("[…")]
    assert log.lines[0] == "line 000000"
    assert log.lines[-1] == "line 099999"
    assert all(len(line) == 11 for line in log.lines[:between] + log.lines[between + 1 :])
    left_out = 100_000 - (len(log.lines) - 1)
    assert log.lines[between] == f"[… {left_out * 12} bytes left out …]"
    assert not kept(content[:3000], 1000, 2000).truncated


@pytest.mark.parametrize("head", range(60, 140, 3))
@pytest.mark.parametrize("end", [b"\n", b" ", b""])
def test_no_part_of_a_secret_stays_at_a_cut(head, end):
    for secret in (TOKEN, "our-own-secret"):
        content = (
            b"a" * 70 + end + secret.encode() + end + b"b" * 5000 + end + b"c" * 70 + end + secret.encode()
        )
        shown = "\n".join(kept(content, head, head).lines)
        for at in range(len(secret) - 7):
            assert secret[at : at + 8] not in shown, (head, shown)


@given(st.integers(1, 200), st.integers(0, 120))
def test_no_secret_is_saved_by_the_border_of_two_pieces(piece, before):
    content = b"x" * before + b"\n" + TOKEN.encode() + b"\nour-own-secret\npassword=hunter2\n"
    shown = "\n".join(kept(content, piece=piece).lines)
    assert not any(secret in shown for secret in (TOKEN[:12], "our-own", "hunter2"))
    shown = "\n".join(kept(content, 7, 10_000, piece).lines)  # the border of head and tail
    assert not any(secret in shown for secret in (TOKEN[:12], "our-own", "hunter2"))


def test_a_private_key_across_the_cut_is_gone():
    body = "".join(f"MIIEpAIBAAKCAQEA{n:048d}\n" for n in range(24))
    key = f"-----BEGIN PRIVATE KEY-----\n{body}-----END PRIVATE KEY-----\n"
    content = f"start\n{key}{'middle ' * 20 + chr(10)}{'x' * 70_000}\n{key}end\n".encode()
    for size in range(200, 2000, 97):
        log = kept(content, size, size)
        assert "MII" not in "\n".join(log.lines), size
        assert log.lines[-1] == "end"


# ---- clean -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        ("\ufeff2026-11-01T10:00:00.1234567Z hello\r\n", ("hello",)),
        ("2026-11-01T10:00:00.1234567Z \n2026-11-01T10:00:01Z end\n", ("", "end")),
        ("2026-11-01T10:00:00.123456Z 00O gitlab\n", ("gitlab",)),
        ("[2026-11-01T10:00:00.123Z] jenkins\n", ("jenkins",)),
        ("\x1b[31;1mFAIL\x1b[0;m test", ("FAIL test",)),
        ("\x1b[38;5;196mred\x1b[K\x1b[0m", ("red",)),
        ("\x1b]8;;https://example.com\x07link\x1b]8;;\x07", ("link",)),
        ("\x1b]0;title\x1b\\text", ("text",)),
        ("section_start:1560896352:script[collapsed=true]\r\x1b[0Krun\n", ("run",)),
        ("a\nsection_end:1560896353:script\r\x1b[0K\nb", ("a", "", "b")),
        ("\x1b[8mha:////4AAAB+LCAAA=\x1b[0mStarted", ("Started",)),
        ("10 %\r50 %\r100 %\n", ("100 %",)),
        ("bell\x07 nul\x00 del\x7f tab\there", ("bell nul del tab\there",)),
        ("\u202egnp.exe", ("gnp.exe",)),
        ("half an escape \x1b", ("half an escape ",)),
        ("", ()),
        ("\n\n", ()),
        ("a\n\nb\n\n", ("a", "", "b")),
    ],
)
def test_lines_are_clean(raw, lines):
    assert kept(raw.encode()).lines == lines


def test_what_is_no_utf_8_is_replaced():
    assert kept(b"caf\xe9 \xff\xfe \xf0\x9f\x98").lines == ("caf� �� �",)
    assert kept("žluťoučký kůň".encode(), 4, 100).lines == ("žluťoučký kůň",), (
        "cut between head and tail only"
    )


def test_the_stamp_of_a_line_is_cut_and_a_time_that_a_line_tells_is_not():
    text = "2026-11-01T10:00:00.1Z built at 2026-11-01T09:00:00Z\nsince 2026-11-01T08:00:00Z\n"
    assert kept(text.encode()).lines == ("built at 2026-11-01T09:00:00Z", "since 2026-11-01T08:00:00Z")


def test_a_secret_behind_a_colour_or_a_time_stamp_is_found():
    colour = f"{TOKEN[:10]}\x1b[1m{TOKEN[10:]}"
    assert kept(colour.encode()).lines == ("***",)
    stamped = "".join(
        f"2026-11-01T10:00:00.0000000Z {line}\n"
        for line in (
            "-----BEGIN RSA PRIVATE KEY-----",
            "MIIEpAIBAAKCAQEA",
            "-----END RSA PRIVATE KEY-----",
            "x",
        )
    )
    assert kept(stamped.encode()).lines == ("***", "x")


@given(st.binary(max_size=3000))
def test_any_bytes_become_lines_that_every_database_can_store(content):
    log = kept(content, 500, 500)
    assert unpack(pack(log)) == list(log.lines)
    assert all("\0" not in line and "\n" not in line for line in log.lines)


def test_an_endless_line_is_cut():
    log = kept(b"y" * 100_000, 200_000, 1)
    assert [len(line) for line in log.lines] == [logs.LONGEST_LINE]


@pytest.mark.parametrize(
    "piece", ["\x1b[", "\x1b]", "\r", "section_start:1:", "##[error]", "a:1: error", "\x1bP", "\x1b[8mha:"]
)
def test_no_log_makes_it_slow(piece):
    """A pattern whose time grew with the square of the length would not come to an end here."""
    content = (piece * (1_000_000 // len(piece))).encode()
    log = kept(content, 500_000, 600_000)
    error_of(log.lines)


def test_several_logs_share_the_room():
    for count in (1, 2, 5, 20):
        head, tail = shares(count)
        assert count * (head + tail) <= max(logs.KEPT_BYTES, count * logs.LEAST_BYTES)
    both = joined([("build", Log(("a",))), ("test", Log(("b", "c"), truncated=True))])
    assert both == Log(("=== build ===", "a", "=== test ===", "b", "c"), truncated=True)
    assert joined([("build", Log(("a",)))]) == Log(("a",))


def test_noise_is_kept_small():
    rng = random.Random(1)
    content = b"".join(b"%x\n" % rng.getrandbits(200) for _ in range(50_000))
    log = kept(content, *shares(1))
    assert len(pack(log)) < logs.KEPT_BYTES


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("##[error]src/a.py:3: boom\n##[error]Process completed with exit code 1.", "src/a.py:3: boom"),
        ("##[error]Process completed with exit code 1.", "Process completed with exit code 1."),
        ("::error file=a.py,line=1::wrong type", "wrong type"),
        ("ok\nFAIL tests/a.py::b\nAssertionError: 1 != 2\nError: Process completed with exit code 1.",
         "FAIL tests/a.py::b; AssertionError: 1 != 2"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'a'", "KeyError: 'a'"),
        ("E   assert 1 == 2\nFAILED tests/test_a.py::test_b - assert 1 == 2", "E   assert 1 == 2; FAILED tests/test_a.py::test_b - assert 1 == 2"),
        ("main.c:3:5: error: expected ';'\nmake: *** [all] Error 1", "main.c:3:5: error: expected ';'; make: *** [all] Error 1"),
        ("error[E0308]: mismatched types", "error[E0308]: mismatched types"),
        ("fatal: not a git repository", "fatal: not a git repository"),
        ("npm ERR! code ELIFECYCLE", "npm ERR! code ELIFECYCLE"),
        ("java.lang.IllegalStateException: no\nCaused by: x", "java.lang.IllegalStateException: no; Caused by: x"),
        ("panic: runtime error: index out of range", "panic: runtime error: index out of range"),
        ("ERROR: Job failed: exit code 1", "ERROR: Job failed: exit code 1"),
        ("148 tests passed, 0 errors\nno error here\nCompiling error_handler", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_last_lines_that_tell_an_error_are_the_error(log, error):
    assert error_of(log.split("\n")) == error


def test_an_error_is_short():
    told = error_of(f"ERROR: {n} {'x' * 400}" for n in range(50))
    assert len(told) == logs.LONGEST_ERROR
    assert told.startswith("ERROR: 47")
