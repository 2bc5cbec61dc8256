"""Artifacts on demand: fetched through us, kept on disk for the while, verified before a byte goes on.

A download is whole or it is an error: the platform's SHA-256 has to fit, or, where it tells none, the one
computed at the first download; and an answer whose end can't be known is refused.
"""

import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, cast

from sqlalchemy import Connection, select, update

from webhook_app import models, outbound, platforms
from webhook_app.account import Account
from webhook_app.db import Write
from webhook_app.destinations import OutboundError
from webhook_app.outbound import Reply
from webhook_app.platforms import Answer, PollError, PollFault, PollTarget, Request, Source
from webhook_app.platforms._read import poll_error

CAP_BYTES = 1024 * 1024 * 1024
DOWNLOAD_SECONDS = 300.0
MOST_AT_ONCE = 4
"""Downloads of one process: the threads that serve them are the same that take webhooks."""
BUSY_SECONDS = 5.0

Row = Mapping[Any, Any]
_a = models.artifacts.c
_seats = threading.BoundedSemaphore(MOST_AT_ONCE)


class NoDownload(Exception):
    """It can't be had: the HTTP `status` to answer with, and why, for people."""

    def __init__(self, status: int, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class TokenRefused(NoDownload):
    """The platform refuses our token; another one may do."""


@dataclass(frozen=True, slots=True)
class Download:
    """A whole, verified file, at its begin; whoever gets it closes it.  `digest` is 32 bytes of SHA-256."""

    file: BinaryIO
    size_bytes: int
    digest: bytes


def listed(connection: Connection, build: int, after: int, most: int) -> Sequence[Row]:
    """Artifacts of a build by name, from the one behind id `after` on."""
    statement = select(models.artifacts).where(_a.build == build, _a.id > after).order_by(_a.id).limit(most)
    return connection.execute(statement).mappings().all()


def find(connection: Connection, build: int, name: str) -> Row | None:
    """The artifact of this name."""
    statement = select(models.artifacts).where(_a.build == build, _a.name == name)
    return connection.execute(statement).mappings().one_or_none()


def is_expired(artifact: Row, now: datetime) -> bool:
    """Has its platform deleted it, or is about to?"""
    return artifact["expired"] or (artifact["expires_at"] is not None and artifact["expires_at"] <= now)


def fetch(account: Account, source: Source, target: PollTarget, artifact: Row) -> Download:
    """Download one and verify it; raises `NoDownload`.  `source` has a token that can be used.

    A person asks: it is charged, but waits for nobody.
    """
    if (artifact["size_bytes"] or 0) > CAP_BYTES:
        raise NoDownload(502, f"it has more than the {CAP_BYTES} bytes that are passed on")
    if not _seats.acquire(blocking=False):
        raise NoDownload(503, "too many downloads at once", BUSY_SECONDS)
    try:
        return _fetch(account, source, target, artifact)
    finally:
        _seats.release()


def _fetch(account: Account, source: Source, target: PollTarget, artifact: Row) -> Download:
    spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  it goes on to whoever asked
    try:
        sink = _Hashing(spool)
        _check(_get(account, source, target, artifact["ref"], sink), artifact)
        if artifact["digest"] not in (None, f"sha256:{sink.sha256.hexdigest()}"):
            raise NoDownload(502, "what the platform sent is not what it listed: its SHA-256 is another one")
        spool.seek(0)
        return Download(spool, sink.count, sink.sha256.digest())
    except BaseException:
        spool.close()
        raise


class _Hashing:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.count = 0

    def write(self, piece: bytes, /) -> None:
        self.sha256.update(piece)
        self.count += len(piece)
        self.file.write(piece)


def _get(account: Account, source: Source, target: PollTarget, ref: str, into: _Hashing) -> Reply:
    platform = platforms.file_api(source.platform)
    request = platform.artifact_request(source, target, ref) if platform else None
    if request is None:
        raise NoDownload(404, "this source has no API to read it from")
    try:
        with account.turn(DOWNLOAD_SECONDS) as turn:
            reply = _send(request, into)
            turn.answer = Answer(reply.status, reply.headers, reply.body)
            return reply
    except PollError as limit:
        raise NoDownload(503, str(limit), limit.retry_after_seconds) from limit


def _send(request: Request, into: _Hashing) -> Reply:
    try:
        return outbound.send(
            "GET",
            request.url,
            request.headers | {"Accept": "*/*"},
            timeout_seconds=DOWNLOAD_SECONDS,
            byte_cap=CAP_BYTES,
            guard=False,
            follow_redirects=True,
            into=into,
        )
    except OutboundError as error:
        status = 504 if error.reason == "timeout" else 502
        raise NoDownload(status, f"the platform did not send it whole: {error}") from error
    except OSError as error:
        raise NoDownload(503, f"it can't be kept while it is verified: {error.strerror}") from error


def _check(reply: Reply, artifact: Row) -> None:
    """Is it a file, that file, and whole?"""
    if reply.status in (404, 410):
        raise NoDownload(reply.status, "its platform does not have it (any more)")
    if reply.status != 200:
        fault = poll_error(Answer(reply.status, reply.headers, reply.body))
        if fault.fault is PollFault.UNAUTHORIZED:
            raise TokenRefused(502, f"the platform: {fault}")
        limited = fault.fault is PollFault.RATE_LIMITED
        raise NoDownload(503 if limited else 502, f"the platform: {fault}", fault.retry_after_seconds)
    if reply.truncated:
        raise NoDownload(502, f"it has more than the {CAP_BYTES} bytes that are passed on")
    if artifact["digest"] is None:
        _check_without_digest(reply, artifact["name"])


def _check_without_digest(reply: Reply, name: str) -> None:
    """What comes first is what later downloads are held against: a log-in page must not be that."""
    if not {"content-length", "transfer-encoding"} & set(reply.headers):
        raise NoDownload(502, "the platform does not tell where it ends")
    is_page = reply.headers.get("content-type", "").startswith("text/html")
    if is_page and not name.lower().endswith((".html", ".htm")):
        raise NoDownload(502, "a web page came instead: a log-in page of the platform or of a proxy?")


def note_digest(write: Write, artifact: Row, download: Download) -> None:
    """Keep the digest of a first download where the platform tells none."""
    write.connection.execute(
        update(models.artifacts)
        .where(_a.id == artifact["id"], _a.digest.is_(None))
        .values(digest=f"sha256:{download.digest.hex()}", digest_by="relay", size_bytes=download.size_bytes)
    )
