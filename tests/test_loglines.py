"""Each line of the log has its time and level, in the form that is set, whatever is in it."""

import json
import logging
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from tests import hub as hubs
from tests.caller import jenkins
from tests.facts import at
from webhook_app import db, health, loglines, up
from webhook_app.settings import load

TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
PAIR = re.compile(r'([\w.]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |$)')


def read(format_, line):
    """A line as a collector reads it."""
    assert len(line.splitlines()) == 1, line
    if format_ == "json":
        return json.loads(line)
    pairs = PAIR.findall(line)
    assert "".join(f"{name}={value} " for name, value in pairs) == f"{line} "
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


def record(message, *args, level=logging.INFO, error=None, **fields):
    trace = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("jobs.poll", level, "poll.py", 1, message, args, trace)
    made.created = 1795413600.0126
    if fields:
        made.fields = fields
    return made


def test_a_line_of_logfmt():
    write = loglines.Formatter("logfmt").format
    assert write(record("redis does not answer: %s", "no", level=logging.WARNING)) == (
        'time=2026-11-23T06:00:00.012Z level=warning logger=jobs.poll msg="redis does not answer: no"'
    )
    assert write(record("push", source="github", status=202, late=True, build_id=None, reason="")) == (
        'time=2026-11-23T06:00:00.012Z level=info event=push source=github status=202 late=true reason=""'
    )


def test_a_line_of_json():
    write = loglines.Formatter("json").format
    assert json.loads(write(record("push", source="github", status=202, ms=1.5, build_id=None))) == {
        "time": "2026-11-23T06:00:00.012Z", "level": "info", "event": "push", "source": "github",
        "status": 202, "ms": 1.5,
    }  # fmt: skip
    assert json.loads(write(record("plain", level=logging.ERROR)))["msg"] == "plain"


@pytest.mark.parametrize("format_", loglines.FORMATS)
@given(text=st.text(st.characters(), max_size=50))
def test_a_value_comes_back_as_it_was_and_begins_no_line(format_, text):
    line = loglines.Formatter(format_).format(record("push", source=text, status=401))
    found = read(format_, line)
    assert (found["source"], str(found["status"]), found["event"]) == (text, "401", "push")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    assert read(format_, loglines.Formatter(format_).format(record("%s", text)))["msg"] == text


@pytest.mark.parametrize("format_", loglines.FORMATS)
def test_what_pretends_to_be_a_line_or_a_field_is_none(format_):
    forged = 'x\ntime=2026-01-01T00:00:00.000Z level=info event=push status=202 reason="'
    line = loglines.Formatter(format_).format(record("push", source=forged, status=401))
    assert read(format_, line)["source"] == forged
    assert str(read(format_, line)["status"]) == "401"


@pytest.mark.parametrize("format_", loglines.FORMATS)
def test_a_trace_is_one_value_and_the_end_of_a_long_one_is_kept(format_):
    try:
        raise ValueError("x" * 10_000 + " at last")
    except ValueError as error:
        line = loglines.Formatter(format_).format(record("a fault", level=logging.ERROR, error=error))
    trace = read(format_, line)["trace"]
    assert trace.endswith(" at last")
    assert len(trace) == loglines.LONGEST_VALUE + 1


def test_a_supervisor_labels_lines_for_people_and_leaves_json_whole():
    told = up.log_lines(load({}))
    assert told["labelled"]
    assert read("logfmt", told["own_line"]("deliver ended"))["msg"] == "deliver ended"
    told = up.log_lines(load({"LOG_FORMAT": "JSON"}))
    assert not told["labelled"]
    assert TIME.fullmatch(json.loads(told["own_line"]("deliver ended"))["time"])


# ---- what is logged --------------------------------------------------------------------------


def events(caplog, name):
    return [one.fields for one in caplog.records if one.msg == name and hasattr(one, "fields")]


def test_each_push_is_a_line_accepted_or_refused(local, caplog):
    caplog.set_level(logging.INFO)
    jenkins(local, {})
    jenkins(local, {"phase": 5})
    local("POST", "/webhooks/jenkins", 401, json={}, headers={"X-Build-Token": "guessed-secret"})
    local("POST", "/webhooks/nobody%0Alevel=info", 404, data=b"")
    lines = events(caplog, "push")
    assert [(one["source"], one["status"], one["result"]) for one in lines] == [
        ("jenkins", 202, "accepted"),
        ("jenkins", 202, "unreadable"),
        ("jenkins", 401, "refused"),
        ("nobody\nlevel=info", 404, "refused"),
    ]
    assert lines[0]["build_id"] == "jenkins:web:5"
    assert lines[0]["delivery_id"]
    assert lines[1]["reason"]
    assert lines[2]["reason"] == "the signature or token is missing, wrong or too old"
    assert all(one["duration_ms"] >= 0 for one in lines)
    assert "guessed-secret" not in str(lines)


def test_no_push_is_a_line_above_the_level_info(local, caplog):
    caplog.set_level(logging.WARNING)
    jenkins(local, {})
    assert caplog.records == []


def test_each_notice_is_a_line(local, caplog):
    caplog.set_level(logging.INFO)
    db.in_transaction(
        local.engine, lambda held: health.tell(held, "source.deaf", "github", "No pushes", at(0))
    )
    assert events(caplog, "notice") == [{"kind": "source.deaf", "subject": "github", "text": "No pushes"}]


def test_a_notice_is_logged_once_and_only_if_it_is_stored(local, caplog):
    caplog.set_level(logging.INFO)
    tries = []

    def unit(connection):
        health.tell(connection, "source.deaf", "github", "No pushes", at(0))
        assert events(caplog, "notice") == []
        tries.append(connection)
        if len(tries) == 1:
            raise OperationalError("", {}, Exception("database is locked"))

    db.in_transaction(local.engine, unit)
    assert (len(tries), len(events(caplog, "notice"))) == (2, 1)

    def undone(connection):
        health.tell(connection, "source.hears", "github", "Pushes", at(1))
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="ours"):
        db.in_transaction(local.engine, undone)
    assert len(events(caplog, "notice")) == 1


# ---- the processes ---------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path, migrated_sqlite):
    (tmp_path / "buildrelay.db").write_bytes(migrated_sqlite.read_bytes())
    return hubs.clean_environment(
        {
            "BUILDRELAY_DATA_DIR": str(tmp_path),
            "REDIS_URL": f"unix://{tmp_path}/no.sock",
            "PORT": str(hubs.free_port()),
            "WEB_CONCURRENCY": "1",
            "LOG_FORMAT": "json",
        }
    )


def lines_of(log):
    return [read("json", line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("command", ["worker", "scheduler"])
def test_each_line_of_a_process_has_time_and_level(tmp_path, environment, command):
    log = tmp_path / "log"
    with hubs.started([sys.executable, "-m", "webhook_app", command], log, environment) as process:
        hubs.until(lambda: "Redis does not answer" in log.read_text(), hubs.PATIENCE_SECONDS, "a line")
        process.terminate()
        process.wait(hubs.PATIENCE_SECONDS)
    for line in lines_of(log):
        assert TIME.fullmatch(line["time"])
        assert line["level"] == "warning"


def test_each_line_of_the_web_process_has_time_and_level_gunicorns_own_too(tmp_path, environment):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--config", "python:webhook_app.gunicorn_conf", "wsgi:app"]
    command += ["--access-logfile", "-", "--log-level", "info"]
    misspelt = {"GITHUB_WEBHOOK_SECRETS": "hush"}
    with hubs.started(command, log, environment | misspelt) as process:
        url = f"http://127.0.0.1:{environment['PORT']}/webhooks/github"
        hubs.until(lambda: "event" in log.read_text() or _refused(url), hubs.PATIENCE_SECONDS, "a push")
        hubs.until(
            lambda: "POST /webhooks/github" in log.read_text(), hubs.PATIENCE_SECONDS, "its access line"
        )
        process.terminate()
        process.wait(hubs.PATIENCE_SECONDS)
    lines = lines_of(log)
    assert all(TIME.fullmatch(line["time"]) and line["level"] for line in lines)
    assert {"gunicorn.error", "gunicorn.access"} <= {line.get("logger") for line in lines}
    (push, *_) = [line for line in lines if line.get("event") == "push"]
    assert (push["source"], push["status"], push["result"]) == ("github", 415, "refused")
    (warned,) = [line for line in lines if "did you mean" in line.get("msg", "")]
    assert warned["msg"] == "GITHUB_WEBHOOK_SECRETS is no setting: did you mean GITHUB_WEBHOOK_SECRET?"


def _refused(url):
    made = subprocess.run(
        [sys.executable, "-c", f"import requests; requests.post({url!r}, data=b'x', timeout=60)"],
        capture_output=True,
        check=False,
    )
    return made.returncode == 0


def test_a_fault_that_ends_a_process_is_one_line(tmp_path, environment):
    script = "from webhook_app import loglines; loglines.setup('json', 'INFO'); raise RuntimeError('at last')"
    made = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 1
    (line,) = made.stderr.splitlines()
    assert (read("json", line)["level"], read("json", line)["trace"][-7:]) == ("critical", "at last")
