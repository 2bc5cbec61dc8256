"""What a client or a neighbour on the machine writes into a request moves it to no other path, with real gunicorn."""

import json
import shutil
import socket

import pytest

from tests.test_hooks import GITHUB, JENKINS, Server, run
from webhook_app import models, signing


@pytest.fixture(scope="module")
def server(migrated_sqlite, redis_url, tmp_path_factory, wait_until):
    directory = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_sqlite, directory / "store.db")
    made = Server(f"sqlite:///{directory / 'store.db'}", redis_url, directory, wait_until)
    yield made
    made.stop()


def ask(server, target, *headers, method="GET", body=b""):
    """Status and body of the answer to a request whose target and headers are written as they are given."""
    lines = [f"{method} {target} HTTP/1.1", "Host: relay.example.com", "Connection: close", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


MOVES = [
    "SCRIPT_NAME: /webhooks", "SCRIPT_NAME: /elsewhere", "SCRIPT_NAME: /", "Script-Name: /webhooks",
    "PATH_INFO: /healthz", "Path-Info: /healthz", "X-Script-Name: /webhooks", "X_SCRIPT_NAME: /webhooks",
    "X-Forwarded-Prefix: /webhooks", "X-Forwarded-Path: /healthz", "X-Original-URL: /healthz",
    "X-Rewrite-URL: /healthz", "X-Forwarded-Host: evil.example", "X-Forwarded-For: 127.0.0.1",
    "Forwarded: for=127.0.0.1;host=evil.example;proto=https", "X-Forwarded-Port: 1", "REMOTE_USER: admin",
    "REQUEST_METHOD: POST", "X-HTTP-Method-Override: DELETE", "wsgi.url_scheme: https",
]  # fmt: skip


@pytest.mark.parametrize("header", MOVES)
def test_no_header_moves_a_request(server, header):
    assert ask(server, "/webhooks/healthz", header) == ask(server, "/webhooks/healthz")
    assert ask(server, "/healthz", header) == (200, b'{"status":"ok"}\n')
    assert ask(server, "/api/builds", header)[0] == 401


@pytest.mark.parametrize("name", ["X_Hub_Signature_256", "X-Hub_Signature-256", "X_HUB_SIGNATURE_256"])
def test_a_signature_counts_under_its_own_name_only(server, name):
    body = json.dumps(run()).encode()
    signature = signing.github_signature(GITHUB, body)
    event = "X-GitHub-Event: workflow_run"
    signed = ask(server, "/webhooks/github", event, f"{name}: {signature}", method="POST", body=body)
    assert signed[0] == 401
    wrong = f"X-Hub-Signature-256: {signing.github_signature('of another', body)}"
    both = ask(server, "/webhooks/github", event, wrong, f"{name}: {signature}", method="POST", body=body)
    assert both[0] == 401


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/webhooks/github/../jenkins", 404), ("/webhooks/..%2fjenkins", 404), ("/webhooks/%2e%2e/metrics", 404),
        ("/webhooks//jenkins", 404), ("/webhooks/jenkins/", 404), ("/webhooks/jenkins%00", 404),
        ("/webhooks/jenkins;x", 404), ("/webhooks/JENKINS", 404), ("/webhooks/%", 404),
        ("/webhooks/jenkins?source=github", 202), ("http://relay.example.com/webhooks/jenkins", 202),
        ("http://evil.example/webhooks/jenkins", 202), ("/webhooks/%6aenkins", 202),
    ],
)  # fmt: skip
def test_a_webhook_goes_to_the_source_that_its_path_names(server, target, status):
    body = {"name": "web", "url": "job/web/", "build": {"url": "job/web/5/", "number": 5, "phase": "STARTED"}}
    answer = ask(server, target, f"X-Build-Token: {JENKINS}", method="POST", body=json.dumps(body).encode())
    assert answer[0] == status, answer


@pytest.mark.parametrize(
    "target",
    [
        "//metrics",
        "///metrics",
        "//api/builds",
        "%2f/metrics",
        "/%2fmetrics",
        "/webhooks/../metrics",
        "/webhooks/..%2fmetrics",
        "/./metrics",
    ],
)
def test_nothing_else_is_found_by_another_spelling(server, target):
    status, body = ask(server, target)
    assert status in (400, 404, 405), body
    assert b"buildrelay_" not in body


def test_none_of_this_left_a_trace_of_another_source(server):
    assert {row["source"] for row in server.inbound()} <= {"jenkins"}
    assert server.count(models.notices) == 0
