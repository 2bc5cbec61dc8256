"""The shapes of a message: what they must hold, and that nothing in an event can break out of them."""

import json
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook_app import formats
from webhook_app.formats import Told

AT = datetime(2026, 11, 1, 10, 0, tzinfo=UTC)
BUILD = {
    "build_id": "github:octo:web:1", "sequence": 3, "event_id": 7, "source": "github", "platform": "github",
    "repository": "octo/web", "workflow": "CI", "branch": "main", "commit": "c0ffee" * 6, "number": 12,
    "attempt": 1, "state": "failed", "previous_state": "in_progress", "conclusion": "failure",
    "url": "https://github.com/octo/web/actions/runs/1", "started_at": "2026-11-01T09:58:30Z",
    "ended_at": "2026-11-01T10:00:00Z", "duration_seconds": 90.0, "progress": 60, "observed_by": "push",
    "error": None,
}  # fmt: skip


def told(type_="build.failed", change=None, **data):
    return Told("msg_1", type_, AT, BUILD | data, change)


def rendered(format_, message):
    kind, body = formats.render(format_, message)
    return kind, json.loads(body)


def slack_text(message):
    return rendered("slack", message)[1]["blocks"][0]["text"]["text"]


def card(message):
    return rendered("teams", message)[1]["attachments"][0]["content"]


def teams_text(message):
    return card(message)["body"][0]["text"]


def test_the_standard_body():
    kind, body = rendered("standard", told())
    assert kind == "application/json"
    assert body == {"type": "build.failed", "timestamp": "2026-11-01T10:00:00Z", "data": BUILD}


def test_cloudevents_has_the_required_attributes():
    kind, body = rendered("cloudevents", told())
    assert kind == "application/cloudevents+json"
    assert body == {
        "specversion": "1.0", "id": "msg_1", "source": "/buildrelay/github", "type": "build.failed",
        "subject": "github:octo:web:1", "time": "2026-11-01T10:00:00Z", "datacontenttype": "application/json",
        "data": BUILD,
    }  # fmt: skip


def test_cloudevents_leaves_out_a_subject_that_is_not():
    _, body = rendered("cloudevents", Told("msg_2", "subscriber.test", AT, {"subscriber_id": "sub_1"}))
    assert "subject" not in body
    assert body["source"] == "/buildrelay/hub"


@pytest.mark.parametrize(
    ("change", "data", "line"),
    [
        (None, {}, "octo/web CI #12 failed on main"),
        ("broke", {}, "octo/web CI #12 broke on main"),
        ("fixed", {"state": "completed"}, "octo/web CI #12 is fixed on main"),
        ("still_failing", {"attempt": 2}, "octo/web CI #12 still fails on main (attempt 2)"),
        (None, {"state": "in_progress", "branch": None, "number": None}, "octo/web CI in progress"),
        (None, {"repository": None, "workflow": None, "branch": None}, "github:octo:web:1 #12 failed"),
    ],
)  # fmt: skip
def test_people_read_one_line(change, data, line):
    message = told(change=change, **data)
    assert rendered("slack", message)[1]["text"].endswith(" " + line)
    assert re.sub(r"\\(.)", r"\1", teams_text(message)).endswith(" " + line)


def test_what_is_about_no_build_is_told_too():
    message = Told("msg_3", "subscriber.test", AT, {"subscriber_id": "sub_1", "message": "This is a test."})
    assert slack_text(message).endswith("This is a test.")
    assert teams_text(message).endswith("This is a test.")


@pytest.mark.parametrize(
    ("branch", "shown"),
    [
        ("<!channel>", "&lt;!channel&gt;"), ("a&b", "a&amp;b"), ("&lt;", "&amp;lt;"),
        ("<https://evil.example|ok>", "&lt;https://evil.example|ok&gt;"), ("a\n\n>quote", "a &gt;quote"),
    ],
)  # fmt: skip
def test_slack_shows_markup_as_text(branch, shown):
    text = slack_text(told(branch=branch))
    assert f"on {shown}" in text
    assert text.startswith("❌ <https://github.com/octo/web/actions/runs/1|")
    assert text.count("<") == text.count(">") == 1


@pytest.mark.parametrize(
    ("branch", "shown"),
    [
        ("[ok](https://evil.example)", r"\[ok\](https://evil.example)"), ("**bold**", r"\*\*bold\*\*"),
        ("a_b_c", r"a\_b\_c"), ("`code`", r"\`code\`"), ("back\\slash", r"back\\slash"), ("<b>", r"\<b\>"),
        ("~~gone~~", r"\~\~gone\~\~"),
    ],
)  # fmt: skip
def test_teams_shows_markdown_as_text(branch, shown):
    assert teams_text(told(branch=branch)).endswith(f"on {shown}")


@pytest.mark.parametrize(
    "url",
    [
        None, "", "!channel", "@U012AB3CD", "javascript:alert(1)", "https://a.example/|text", "https://a b",
        "https://a.example/>x", "data:text/html,x", "https://a.example/" + "x" * 2000,
        "https://a.example/?" + "&" * 900,
    ],
)  # fmt: skip
def test_only_a_plain_web_address_is_linked(url):
    assert "<" not in slack_text(told(url=url))
    assert "actions" not in card(told(url=url))


def test_the_build_is_one_click_away():
    (action,) = card(told())["actions"]
    assert (action["type"], action["url"]) == ("Action.OpenUrl", BUILD["url"])
    assert slack_text(told(url="https://a.example/?a=1&b=2")).startswith(
        "❌ <https://a.example/?a=1&amp;b=2|"
    )


def test_facts_are_shown_and_cut():
    message = told(error="&" * 5000)
    fields = {
        field["text"].partition("\n")[0]: field["text"]
        for field in rendered("slack", message)[1]["blocks"][1]["fields"]
    }
    assert set(fields) == {"*Commit*", "*Duration*", "*Error*"}
    assert fields["*Duration*"] == "*Duration*\n90 s"
    assert max(map(len, fields.values())) <= 2000
    assert re.fullmatch(r"(&amp;)+", fields["*Error*"].partition("\n")[2])
    (facts,) = [part["facts"] for part in card(message)["body"] if part["type"] == "FactSet"]
    assert [fact["title"] for fact in facts] == ["Commit", "Duration", "Error"]


def test_an_unknown_format_is_a_key_error():
    with pytest.raises(KeyError):
        formats.render("html", told())


texts = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
numbers = st.one_of(st.none(), st.integers(0, 2**63 - 1))
events = st.fixed_dictionaries(
    {},
    optional={
        "build_id": texts, "repository": texts, "workflow": texts, "branch": texts, "commit": texts,
        "source": texts, "error": texts, "url": st.one_of(texts, st.just(BUILD["url"])), "message": texts,
        "state": st.one_of(texts, st.sampled_from(["failed", "completed", "timeout"])), "number": numbers,
        "attempt": numbers, "duration_seconds": st.one_of(st.none(), st.floats(0), st.integers(0, 10**9)),
        "detail": st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9), max_size=3),
    },
)  # fmt: skip
changes = st.sampled_from([None, "broke", "fixed", "still_failing"])


@given(st.sampled_from(formats.FORMATS), events, changes)
def test_every_event_is_valid_json_and_the_same_bytes_each_time(format_, data, change):
    message = Told("msg_1", "build.failed", AT, data, change)
    kind, body = formats.render(format_, message)
    assert kind.endswith("json")
    assert isinstance(json.loads(body), dict)
    assert formats.render(format_, Told("msg_1", "build.failed", AT, dict(data), change)) == (kind, body)


@given(events, changes)
def test_nothing_from_outside_marks_up_a_slack_message(data, change):
    _, body = rendered("slack", Told("msg_1", "build.failed", AT, data, change))
    for block in body["blocks"]:
        for text in [block["text"]["text"]] if "text" in block else [one["text"] for one in block["fields"]]:
            linked = re.sub(r"<https?://[^\s<>|]+\|([^<>]*)>", r"\1", text)
            assert not re.search(r"[<>]", linked)
            assert not re.search(r"&(?!amp;|lt;|gt;)", linked)
            assert len(text) <= 3000


@given(events, changes)
def test_nothing_from_outside_marks_up_a_teams_card(data, change):
    message = Told("msg_1", "build.failed", AT, data, change)
    body = card(message)["body"]
    shown = [body[0]["text"], *(fact["value"] for part in body[1:] for fact in part["facts"])]
    for text in shown:
        assert not re.search(r"[\[\]*_`<>~]", re.sub(r"\\.", "", text))
