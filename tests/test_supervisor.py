"""The supervisor: its rules as plain functions, and its promises with real processes."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import settings, supervisor
from webhook_app.supervisor import Child, Timing, due_for_term, next_wait, split_lines

SCRIPT = """
import json, signal, sys
from pathlib import Path
from webhook_app.supervisor import Child, Timing, supervise

spec = json.loads(sys.argv[1])
for number in (signal.SIGHUP, signal.SIGINT):  # ignored where the tests run under nohup or in the background
    signal.signal(number, signal.SIG_DFL)
def child(name, command, ready, ends_last=False):
    ready = Path(ready).exists if ready else None
    return Child(name, ("/bin/sh", "-c", command), ready=ready, ends_last=ends_last)
def on_ready():
    print("all ready", flush=True)
if Path("subreaper").exists():
    import ctypes
    ctypes.CDLL(None).prctl(36, 1)
def missing(pids):
    return "" if Path("served").exists() else f"{len(pids)} serve nobody"
sys.exit(supervise([child(*entry) for entry in spec["children"]], on_ready=on_ready,
                   missing=missing if Path("missing").exists() else None,
                   pid_dir=Path(spec["pid_dir"]), timing=Timing(**spec["timing"])))
"""
QUICK = {"first_wait_seconds": 0.05, "longest_wait_seconds": 0.2}


@pytest.fixture
def start(tmp_path):
    """`with start((name, shell command, ready file or None, ends last?), …)`: a supervisor in `tmp_path`."""

    @contextmanager
    def run(*children, **timing):
        spec = {"children": children, "pid_dir": str(tmp_path / "run"), "timing": QUICK | timing}
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(spec)],
            cwd=tmp_path,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
            | {"PYTHONPATH": str(Path(supervisor.__file__).parent.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    return run


@pytest.fixture
def pid_of(tmp_path, wait_until):
    """`pid_of(name, but=None)`: the pid a child wrote into its file, once it is another than `but`."""

    def read(name, but=None):
        file = tmp_path / f"{name}.pid"
        wait_until(lambda: file.exists() and file.read_text().endswith("\n") and int(file.read_text()) != but)
        return int(file.read_text())

    return read


def lasting(name, before=""):
    """A shell command that writes its pid and stays."""
    return f"{before}; echo $$ > {name}.pid; exec sleep 600".removeprefix("; ")


def gone(pid):
    return not supervisor.identity(pid)


def read_until(process, text):
    """The lines up to the one that contains `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")


def test_the_wait_doubles_up_to_its_limit_and_begins_anew_after_a_steady_life():
    timing, waits = Timing(), [0.0]
    for _ in range(7):
        waits.append(next_wait(timing, waits[-1], lived_seconds=1))
    assert waits[1:] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert next_wait(timing, 5.0, lived_seconds=30) == 0.2


def test_term_goes_to_all_at_once_but_for_what_the_others_need():
    last = [True, False, False]
    assert due_for_term([True, True, True], last, in_time=True) == [1, 2]
    assert due_for_term([True, True, False], last, in_time=True) == [1]
    assert due_for_term([True, False, False], last, in_time=True) == [0]
    assert due_for_term([True, True, True], last, in_time=False) == [0, 1, 2]
    assert due_for_term([False, False, False], last, in_time=True) == []
    assert due_for_term([], [], in_time=True) == []


@given(st.lists(st.binary(max_size=20)))
def test_lines_come_out_whole_however_the_bytes_arrive(chunks):
    seen, pending = [], b""
    for chunk in chunks:
        lines, pending = split_lines(pending, chunk)
        seen += lines
    whole = b"".join(chunks)
    assert [line.removesuffix(b"\r") for line in whole.split(b"\n")] == [*seen, pending.removesuffix(b"\r")]


def test_a_line_without_end_is_cut_and_not_collected_for_ever():
    lines, rest = split_lines(b"x" * supervisor.LONGEST_LINE, b"y")
    assert [len(line) for line in lines] == [supervisor.LONGEST_LINE + 1]
    assert rest == b""


def test_labels_are_equally_wide_and_coloured_only_on_a_terminal():
    assert supervisor.labels(["up", "worker"], colour=False) == [b"up     | ", b"worker | "]
    coloured = supervisor.labels(["a", "b"], colour=True)
    assert coloured[0] != coloured[1]
    assert all(re.fullmatch(rb"\x1b\[\d+m. \| \x1b\[0m", label) for label in coloured)


def test_all_is_over_within_ten_seconds_at_the_default_timing():
    most = supervisor.TIMING.stop_seconds + supervisor.KILL_SECONDS + supervisor.LAST_WORDS_SECONDS
    assert most < 10
    assert supervisor.TIMING.stop_seconds == settings.load({}).stop_grace_seconds


def test_all_is_ready_when_nothing_is_missing_any_more(start, tmp_path):
    (tmp_path / "missing").touch()
    with start(
        ("a", "sleep 0.5; touch served; exec sleep 600", None), ("b", "exec sleep 600", None)
    ) as process:
        read_until(process, "all ready")
        assert (tmp_path / "served").exists()


def test_what_is_missing_for_long_is_said_and_a_stop_waits_for_nothing(start, tmp_path, monkeypatch):
    (tmp_path / "missing").touch()
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", "from webhook_app import supervisor\n"
                        "supervisor.NOT_READY_SECONDS = 0\n" + SCRIPT)  # fmt: skip
    with start(("a", "exec sleep 600", None), ("b", "exec sleep 600", None)) as process:
        read_until(process, "up | not ready yet: 2 serve nobody")
        process.terminate()
        assert process.wait(60) == 0
        assert "all ready" not in process.stdout.read()


def test_whose_parent_died_leaves_no_zombie_where_we_adopt_it(start, pid_of, tmp_path, wait_until):
    (tmp_path / "subreaper").touch()
    orphan = "sh -c 'read line < go & echo $! > orphan.pid'"
    os.mkfifo(tmp_path / "go")
    with start(("a", lasting("a", orphan), None), ("b", lasting("b"), None)) as process:
        read_until(process, "all ready")
        first, adopted = pid_of("a"), pid_of("orphan")
        stat = Path(f"/proc/{adopted}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[1] == str(process.pid))
        (tmp_path / "go").write_text("\n")
        wait_until(lambda: not stat.exists())
        os.kill(first, signal.SIGKILL)
        assert "a ended (SIGKILL)" in read_until(process, "a ended")[-1], "its own end is still told"
        pid_of("a", but=first)
        process.terminate()
        assert process.wait(60) == 0


def test_children_print_line_by_line_with_their_name(start, pid_of):
    chatty = "printf 'out\\r\\n'; echo err >&2; printf 'no end'"
    with start(("redis", lasting("a"), None), ("web", lasting("b", chatty), None)) as process:
        assert "all ready" in read_until(process, "err")
        assert pid_of("b")
        process.terminate()
        rest = process.stdout.read()
        assert process.wait() == 0
    assert "web   | no end" in rest


def test_children_start_in_order_each_when_the_one_before_is_ready(start, pid_of):
    slow = lasting("first", "sleep 0.2; touch first.ready")
    then = "test -e first.ready && echo in order || echo too early"
    with start(("first", slow, "first.ready"), ("second", f"{then}; exec sleep 600", None)) as process:
        lines = read_until(process, "second")
        assert lines[-1] == "second | in order"
        process.terminate()


def test_a_killed_child_comes_back_and_the_others_do_not_notice(start, pid_of):
    with start(("one", lasting("one"), None), ("two", lasting("two"), None)) as process:
        read_until(process, "all ready")
        one, two = pid_of("one"), pid_of("two")
        os.kill(two, signal.SIGKILL)
        assert read_until(process, "ended")[-1] == "up  | two ended (SIGKILL); next start in 0.05 s"
        assert pid_of("two", but=two) != two
        assert pid_of("one") == one
        assert not gone(one)
        process.terminate()


def test_lines_without_labels_and_our_own_in_another_form(tmp_path):
    child = Child("web", ("/bin/sh", "-c", "echo hello; exit 3"), ready=lambda: False)
    with (tmp_path / "out").open("wb") as out:
        assert supervisor.supervise([child], out=out, labelled=False, own_line="<{}>".format) == 1
    lines = set((tmp_path / "out").read_text().splitlines())
    assert lines == {"hello", "<web ended (exit code 3)>", "<web did not start>"}


def test_children_that_die_at_the_same_moment_all_come_back(start, pid_of):
    with start(("one", lasting("one"), None), ("two", lasting("two"), None)) as process:
        read_until(process, "all ready")
        one, two = pid_of("one"), pid_of("two")
        os.kill(process.pid, signal.SIGSTOP)
        for pid in (one, two):
            os.kill(pid, signal.SIGKILL)
        os.kill(process.pid, signal.SIGCONT)
        assert pid_of("one", but=one) != one
        assert pid_of("two", but=two) != two
        process.terminate()


def test_a_child_that_keeps_dying_is_started_again_with_growing_waits(start):
    with start(("web", "exit 3", None)) as process:
        seen = [read_until(process, "ended")[-1] for _ in range(4)]
        process.terminate()
    assert seen == [
        f"up  | web ended (exit code 3); next start in {wait} s" for wait in (0.05, 0.1, 0.2, 0.2)
    ]


def test_what_a_dead_child_leaves_in_its_group_is_ended_too(start, pid_of, wait_until):
    family = "sleep 600 & echo $! > helper.pid; " + lasting("web")
    with start(("web", family, None)) as process:
        web, helper = pid_of("web"), pid_of("helper")
        os.kill(web, signal.SIGKILL)
        wait_until(lambda: gone(helper))
        process.terminate()


def test_children_lead_their_own_sessions_so_ctrl_c_does_not_reach_them(start, pid_of):
    with start(("web", lasting("web"), None)) as process:
        assert os.getsid(pid_of("web")) == pid_of("web")
        process.terminate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_every_child_what_the_others_need_last(start, pid_of, number, tmp_path):
    def polite(name, after=""):
        return f"trap '{after} echo {name} >> order; exit' TERM; echo $$ > {name}.pid; while :; do sleep 0.02; done"

    together = "touch {0}.asked; while [ ! -e {1}.asked ]; do sleep 0.02; done;"
    needed = ("needed", polite("needed"), None, True)
    one, two = (
        (name, polite(name, together.format(name, other)), None) for name, other in ("ab", "ba")
    )  # each ends only when the other was asked to as well
    with start(needed, one, two, stop_seconds=60) as process:
        pids = [pid_of("needed"), pid_of("a"), pid_of("b")]
        read_until(process, "all ready")
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "order").read_text().split()[-1] == "needed"
    assert sorted((tmp_path / "order").read_text().split()) == ["a", "b", "needed"]
    assert all(map(gone, pids))
    assert not list((tmp_path / "run").iterdir())


def test_a_second_stop_signal_changes_nothing_and_no_child_gets_term_twice(
    start, pid_of, tmp_path, wait_until
):
    slow = "trap 'echo term >> terms' TERM; echo $$ > slow.pid; while [ ! -e go ]; do sleep 0.02; done; echo end > end"
    quick = "trap 'touch asked; exit' TERM; echo $$ > quick.pid; while :; do sleep 0.02; done"
    with start(("slow", slow, None), ("quick", quick, None), stop_seconds=60) as process:
        slow_pid, quick_pid = pid_of("slow"), pid_of("quick")
        read_until(process, "all ready")
        process.terminate()
        wait_until(lambda: gone(quick_pid))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            process.send_signal(number)
        (tmp_path / "go").touch()
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "terms").read_text().split() == ["term"]
    assert (tmp_path / "end").exists()
    assert gone(slow_pid)


def test_children_that_got_term_from_elsewhere_are_not_started_again(start, pid_of):
    """As on a platform that signals every process at once; their ends are all seen, at once too."""
    with start(("one", lasting("one"), None), ("two", lasting("two"), None), stop_seconds=600) as process:
        pids = [pid_of("one"), pid_of("two")]
        read_until(process, "all ready")
        os.kill(process.pid, signal.SIGSTOP)  # so that it learns of all of it at once
        for pid in (*pids, process.pid):
            os.kill(pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGCONT)
        output = process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert "next start" not in output


def test_a_child_that_ignores_term_is_killed_in_time_and_the_others_end_tidily(start, pid_of, tmp_path):
    def tidy(name):
        return f"trap 'echo tidy > {name}.end; exit' TERM; echo $$ > {name}.pid; while :; do sleep 0.02; done"

    deaf = lasting("deaf", "trap '' TERM")
    needed = ("needed", tidy("needed"), None, True)
    with start(needed, ("tidy", tidy("tidy"), None), ("deaf", deaf, None), stop_seconds=2) as process:
        pids = [pid_of("needed"), pid_of("tidy"), pid_of("deaf")]
        read_until(process, "all ready")
        process.terminate()
        output = process.stdout.read()
        assert process.wait() == 0
    assert "deaf did not end within 2 s: killed" in output
    assert (tmp_path / "tidy.end").read_text() == "tidy\n"
    assert all(map(gone, pids))


def test_no_child_survives_a_killed_supervisor(start, pid_of, wait_until, tmp_path):
    deaf = lasting("deaf", "trap '' TERM HUP INT")
    with start(("web", lasting("web"), None), ("deaf", deaf, None)) as process:
        pids = [pid_of("web"), pid_of("deaf")]
        process.kill()
        process.wait()
        if sys.platform != "linux":  # there the next start ends them
            supervisor.end_leftovers(tmp_path / "run")
        wait_until(lambda: all(map(gone, pids)))


@pytest.mark.parametrize(
    ("command", "reason", "seconds"),
    [("exit 4", "web ended (exit code 4)", 60), ("sleep 600", "web was not ready within 2 s", 2)],
)
def test_a_child_that_does_not_get_ready_fails_the_start_and_ends_the_others(
    start, pid_of, command, reason, seconds
):
    children = ("redis", lasting("redis"), "redis.pid"), ("web", command, "never")
    with start(*children, start_seconds=seconds) as process:
        output = process.stdout.read()
        assert process.wait() == 1
        assert gone(pid_of("redis"))
    assert f"up    | {reason}\n" in output
    assert "all ready" not in output


def test_a_command_that_does_not_exist_fails_the_start(tmp_path):
    with (tmp_path / "out").open("w+b") as out:
        assert supervisor.supervise([Child("web", (str(tmp_path / "missing"),))], out=out) == 1
    assert b"web can't be started" in (tmp_path / "out").read_bytes()


def test_the_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    with (tmp_path / "out").open("w+b") as out:
        supervisor.supervise([Child("web", ("/nowhere/at/all",))], out=out)
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    assert after == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_terminal_that_goes_away_stops_nothing(start, pid_of):
    with start(
        ("web", "while :; do echo line; sleep 0.01; done", None), ("b", lasting("b"), None)
    ) as process:
        read_until(process, "all ready")
        process.stdout.close()
        first = pid_of("b")
        os.kill(first, signal.SIGKILL)  # its restart shows that the supervisor goes on
        assert pid_of("b", but=first)
        process.terminate()
        assert process.wait(timeout=60) == 0


def recorded(pid):
    return [pid, supervisor.identity(pid)]


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


def test_leftovers_of_a_dead_supervisor_are_ended(sleeper, tmp_path):
    file = tmp_path / "up-1.json"
    file.write_text(json.dumps({"supervisor": [os.getpid(), "earlier"], "children": [recorded(sleeper.pid)]}))
    assert supervisor.end_leftovers(tmp_path) == [sleeper.pid]
    assert sleeper.wait(timeout=60) == -signal.SIGKILL
    assert not file.exists()


def test_another_process_that_got_the_number_is_left_alone(sleeper, tmp_path):
    content = {"supervisor": [os.getpid(), "earlier"], "children": [[sleeper.pid, "earlier"]]}
    (tmp_path / "up-1.json").write_text(json.dumps(content))
    assert supervisor.end_leftovers(tmp_path) == []
    assert sleeper.poll() is None


def test_children_of_a_supervisor_that_runs_are_left_alone(sleeper, tmp_path):
    file = tmp_path / "up-1.json"
    file.write_text(json.dumps({"supervisor": recorded(os.getpid()), "children": [recorded(sleeper.pid)]}))
    assert supervisor.end_leftovers(tmp_path) == []
    assert sleeper.poll() is None
    assert file.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"supervisor": 1, "children": 2}', "null"])
def test_a_pid_file_without_its_content_is_cleared_away(tmp_path, content):
    (tmp_path / "up-1.json").write_text(content)
    assert supervisor.end_leftovers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_pid_file_that_can_not_be_written_ends_nothing(start, pid_of, wait_until, tmp_path):
    with start(("web", lasting("web"), "go"), ("late", lasting("late"), None)) as process:
        wait_until((tmp_path / "run" / f"up-{process.pid}.json").exists)  # its first draft is gone
        (tmp_path / "run" / f"up-{process.pid}.draft").mkdir()
        (tmp_path / "go").touch()
        read_until(process, "all ready")
        first = pid_of("late")
        os.kill(first, signal.SIGKILL)
        assert pid_of("late", but=first)
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_the_pid_file_names_the_supervisor_and_its_children(start, pid_of, tmp_path):
    with start(("web", lasting("web"), None)) as process:
        read_until(process, "all ready")
        (file,) = (tmp_path / "run").glob("up-*.json")
        content = json.loads(file.read_text())
        assert content == {"supervisor": recorded(process.pid), "children": [recorded(pid_of("web"))]}
        process.terminate()


def test_an_ended_process_has_no_identity(sleeper):
    assert supervisor.identity(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert supervisor.identity(sleeper.pid) == ""
