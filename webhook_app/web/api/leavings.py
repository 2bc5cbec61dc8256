"""What a build leaves: its log and its artifacts."""

import base64
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from flask import Response, request
from sqlalchemy import Connection
from werkzeug.wsgi import FileWrapper

from webhook_app import artifacts, collection, db, logs, queries, queues
from webhook_app import settings as settings_
from webhook_app.account import Account
from webhook_app.artifacts import Download, NoDownload, TokenRefused
from webhook_app.collection import STORED, UNAVAILABLE
from webhook_app.credentials import Keyring
from webhook_app.lifecycle import State
from webhook_app.platforms import PollError, PollTarget
from webhook_app.queries import Row
from webhook_app.settings import SourceSettings
from webhook_app.times import utc_now
from webhook_app.web import schemas
from webhook_app.web.api.builds import need_build
from webhook_app.web.api.spec import Blueprint, abort, operation, page
from webhook_app.web.problems import problem
from webhook_app.web.state import state

blueprint = Blueprint("leavings", __name__, description="What a build leaves: log and artifacts")

PENDING = "pending"
RETRY_AFTER_SECONDS = 5
MOST_REPORTS = 5000


def _standing(build: Row, attempt: int, held: Row | None, what: str) -> tuple[str, str | None]:
    """State and reason of a log or a list of artifacts (`what`)."""
    if held is not None and held[f"{what}_state"] is not None:
        return held[f"{what}_state"], held[f"{what}_reason"]
    if attempt != build["attempt"] and (held is None or held["due_at"] is None):
        return UNAVAILABLE, "not_kept"
    if attempt == build["attempt"] and not State(build["state"]).terminal:
        return PENDING, "not_ended"
    source = state().settings.sources.get(build["source"])
    if source is None or not source.can_poll:
        return UNAVAILABLE, "source_off"
    kept_since = utc_now() - timedelta(days=state().settings.retention_days)
    if held is None and (build["ended_at"] or build["updated_at"]) < kept_since:
        return UNAVAILABLE, "past_retention"
    return PENDING, (held[f"{what}_reason"] if held is not None else None) or "queued"


def _ask_for_it(build: Row, held: Row | None, *, log: bool) -> None:
    """Have it read, unless that is under way: who asks again does not hurry a platform that has nothing."""
    first = held is not None and held["tries"] == 0 and held["due_at"] is not None
    if held is None or (log and not held["wants_log"]) or (first and held["due_at"] > utc_now()):
        db.as_writer(state().engine, lambda write: collection.want(write, build, utc_now(), log=log))
    elif not held["asked"]:
        db.as_writer(state().engine, lambda write: collection.note_asked(write, build))
    else:
        return
    state().bell.ring(queues.COLLECT)


# ---- logs ------------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/builds/<string:build_id>/logs", schemas.BuildLog,
    query=schemas.LogQuery, errors=[404], shaped={202: schemas.BuildLog}, also="text/plain",
)  # fmt: skip
def get_build_log(asked: dict[str, Any], build_id: str) -> Any:
    """Get the log of a build: the failed jobs' if it failed, else all.

    It is read once when a build has failed, for other ends when it is asked for here: then the answer is
    202 with state `pending`; ask again.  At most 1 MiB is kept, head and tail; secrets are masked, terminal
    codes and time stamps cut.  With `Accept: text/plain` it comes as text, and is a 404 if there is none.
    """
    with db.reading(state().engine) as connection:
        build = need_build(connection, build_id)
        attempt: int = asked.get("attempt") or build["attempt"]
        if build["platform"] == "script":
            return _log_answer(build, attempt, STORED, None, _reported(connection, build, attempt), asked)
        held = collection.of_attempt(connection, build["id"], attempt)
    status, reason = _standing(build, attempt, held, "log")
    if status == PENDING and reason != "not_ended" and attempt == build["attempt"]:
        _ask_for_it(build, held, log=True)
    lines = logs.unpack(held["log"]) if held is not None and status == STORED else []
    return _log_answer(build, attempt, status, reason, lines, asked, held)


def _log_answer(
    build: Row,
    attempt: int,
    status: str,
    reason: str | None,
    lines: list[str],
    asked: Mapping[str, Any],
    held: Row | None = None,
) -> Any:
    shown = lines[-asked["tail"] :] if "tail" in asked else lines
    code = 202 if status == PENDING else 200
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == PENDING else {}
    if request.accept_mimetypes.best_match(["application/json", "text/plain"]) == "text/plain":
        return _as_text(status, reason, shown, code, headers)
    return (
        {
            "build_id": build["build_id"],
            "attempt": attempt,
            "state": status,
            "reason": reason,
            "truncated": held is not None and held["log_truncated"],
            "lines": shown,
        },
        code,
        headers,
    )


def _as_text(
    status: str, reason: str | None, lines: list[str], code: int, headers: dict[str, str]
) -> Response:
    if status == UNAVAILABLE:
        return problem(404, f"there is no log: {reason}")
    text = "".join(f"{line}\n" for line in lines)
    return Response(text, code, headers, content_type="text/plain; charset=utf-8")


def _reported(connection: Connection, build: Row, attempt: int) -> list[str]:
    """What a script has reported is its log."""
    redact = state().redact
    rows = queries.build_events(connection, build["id"], 0, MOST_REPORTS)
    told = [row["data"].get("detail") or {} for row in rows if row["data"]["attempt"] == attempt]
    return (
        redact("\n".join(_report(detail) for detail in told if "type" in detail)).split("\n") if told else []
    )


def _report(detail: Mapping[str, Any]) -> str:
    """`stage_completed compile: 12 files`."""
    subject = " ".join(str(detail[name]) for name in ("type", "stage") if detail.get(name))
    words = [str(detail[name]) for name in ("message", "error") if detail.get(name)]
    return ": ".join([subject, *words])


# ---- artifacts -------------------------------------------------------------------------------


@operation(
    blueprint, "GET", "/builds/<string:build_id>/artifacts", schemas.ArtifactPage,
    query=schemas.PageQuery, errors=[404],
)  # fmt: skip
def list_artifacts(asked: dict[str, Any], build_id: str) -> Any:
    """List the artifacts of a build, by name.

    The list is read once when a build ends; `state` is `pending` before.
    """
    limit, now = asked["limit"], utc_now()
    with db.reading(state().engine) as connection:
        build = need_build(connection, build_id)
        held = collection.of_attempt(connection, build["id"], build["attempt"])
        rows = artifacts.listed(connection, build["id"], asked.get("cursor", 0), limit + 1)
    status, reason = (UNAVAILABLE, "not_offered")
    if build["platform"] != "script":
        status, reason = _standing(build, build["attempt"], held, "artifacts")  # type: ignore[assignment]
    if status == PENDING and reason != "not_ended":
        _ask_for_it(build, held, log=False)
    shown = [{**row, "expired": artifacts.is_expired(row, now)} for row in rows]
    return page(shown, limit, lambda row: row["id"]) | {"state": status, "reason": reason}


@operation(
    blueprint, "GET", "/builds/<string:build_id>/artifacts/<path:name>", None,
    errors=[404, 410, 502, 504], media="application/octet-stream",
)  # fmt: skip
def download_artifact(build_id: str, name: str) -> Any:
    """Download an artifact: a ZIP on GitHub and GitLab, the file itself on Jenkins.

    It is fetched from the platform now, and sent only when all of it is here and its SHA-256 fits;
    `Repr-Digest` tells it.  410: it has expired.  502, 504: the platform did not send it whole.
    """
    with db.reading(state().engine) as connection:
        build = need_build(connection, build_id)
        artifact = artifacts.find(connection, build["id"], name)
    if artifact is None:
        abort(404, "the build has no artifact of this name; its list may not be read yet")
    if artifacts.is_expired(artifact, utc_now()):
        return problem(410, "the artifact has expired")
    if request.method == "HEAD":
        return Response(headers=_about(build, artifact))
    try:
        download = _fetch(build, artifact)
    except NoDownload as error:
        seconds = error.retry_after_seconds
        return problem(error.status, str(error), {"Retry-After": str(round(seconds))} if seconds else None)
    return _attachment(build, artifact, download)


def _fetch(build: Row, artifact: Row) -> Download:
    source = state().settings.sources.get(build["source"])
    if source is None or not source.can_poll:
        raise NoDownload(404, "its source is switched off or not configured any more")
    target = PollTarget(
        build["build_id"], build["key"], build["repository"], build["number"], build["attempt"], build["url"],
        build["attempt_base"],
    )  # fmt: skip
    download = _with_a_token(source, target, artifact)
    if artifact["digest"] is None:
        db.as_writer(state().engine, lambda write: artifacts.note_digest(write, artifact, download))
    return download


def _with_a_token(source: SourceSettings, target: PollTarget, artifact: Row) -> Download:
    """Download with a token that can be used; a refused one is renewed once."""
    keyring = Keyring(state().engine, state().settings.encryption_keys)
    account = Account(source, state().engine, state().settings.api_budget_reserve)
    try:
        lent = keyring.source(source, utc_now())
        account.secrets = [*settings_.secret_texts(state().settings), lent.token]
        try:
            return artifacts.fetch(account, lent, target, artifact)
        except TokenRefused:
            renewed = keyring.refreshed(source, lent, utc_now())
            if renewed is None:
                raise
            return artifacts.fetch(account, renewed, target, artifact)
    except PollError as error:
        raise NoDownload(502, f"there is no token to read it with: {error}") from error


def _attachment(build: Row, artifact: Row, download: Download) -> Response:
    digest = base64.b64encode(download.digest).decode()
    headers = _about(build, artifact) | {
        "Content-Length": str(download.size_bytes),
        "Repr-Digest": f"sha-256=:{digest}:",
        "ETag": f'"{download.digest.hex()}"',
    }
    answer = Response(FileWrapper(download.file, 64 * 1024), headers=headers, direct_passthrough=True)
    answer.call_on_close(download.file.close)
    return answer


def _about(build: Row, artifact: Row) -> dict[str, str]:
    """Headers of a file that a browser saves and never shows."""
    zipped = build["platform"] != "jenkins"
    name = _file_name(artifact["name"], zipped)
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return {
        "Content-Type": "application/zip" if zipped else "application/octet-stream",
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }


def _file_name(name: str, zipped: bool) -> str:
    """One part of a path, that does not climb and is not hidden."""
    part = name.replace("/", "_") if zipped else name.rpartition("/")[2]
    part = re.sub(r"[\\\x00-\x1f\x7f]", "_", part).lstrip(".") or "artifact"
    return part if not zipped or part.lower().endswith(".zip") else f"{part}.zip"
