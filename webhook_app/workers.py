"""Who holds what: claims begin with the id of a worker process, and what a dead one held is freed.

A worker that has messages under way keeps a row in `workers`, with their ids, and renews it about once a
second.  Every worker that delivers watches the rows of the others: one that did not change for
`DEAD_AFTER_SECONDS` belongs to a worker that is dead, and its messages are due again.  The time is
measured by the clock of the one who watches, so clocks that differ or jump do no harm; and only while
the store can be written, since nobody can renew a row of a store that is away.

An id belongs to a lock file of the data directory.  The kernel opens the lock when its process ends, so
whoever gets it next knows that the former owner of this id is dead, and frees what that one held.
"""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

from sqlalchemy import Connection, Engine, bindparam, delete, literal_column, select, text, update

from webhook_app import db, models
from webhook_app.models import Moment

BEAT_SECONDS = 1.0
"""A row is renewed when nothing else has written it for so long."""
LOOK_SECONDS = 0.5
DEAD_AFTER_SECONDS = 5.0
DOUBTED_AFTER_SECONDS = 2.0
"""A row that did not change for so long is read as a writer would: where nobody may write, nobody is dead."""
GAP_SECONDS = 2.0
"""After so long without a look, what was seen before counts no more."""
RUN_DIRECTORY = "run"

_m, _s, _w = models.messages.c, models.subscribers.c, models.workers.c
_ID = re.compile("[0-9a-f]{16}")


# ---- the id of this process ------------------------------------------------------------------

_own: list[str] = []


def own_id() -> str:
    """The id of this process: 16 hexadecimal digits, another one in each living process."""
    if not _own:
        _own.append(_new_id())
    return _own[0]


def token(worker: str = "") -> str:
    """A new claim of this process, or of `worker`: `ID:RANDOM`."""
    return f"{worker or own_id()}:{secrets.token_hex(8)}"


def _new_id() -> str:
    return secrets.token_hex(8)


def begin(engine: Engine, data_dir: Path, role: str, now: datetime) -> int:
    """Take over from a dead process of this role on this machine; how many of its messages are due again.

    Called once, before anything is claimed.  Without a directory to write to, or while the store is away,
    this process gets an id of its own, and the watch of others (`Watch`) and the leases do the rest.
    """
    try:
        id_ = _locked_id(data_dir, role)
        freed = release(engine, id_, now)
    except (OSError, db.StoreUnavailable):
        return 0
    _own[:] = [id_]
    return freed


def _locked_id(data_dir: Path, role: str) -> str:
    """The id kept in the first lock file of this role that no living process holds; locked until we end."""
    for directory in (data_dir, data_dir / RUN_DIRECTORY):
        directory.mkdir(mode=0o700, exist_ok=True)
    for number in count():
        path = data_dir / RUN_DIRECTORY / f"{role}-{number}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return _kept_id(lock)
    raise AssertionError("unreachable")


def _kept_id(lock: int) -> str:
    """The id in the file, if this machine wrote it: a copy of the directory elsewhere is another worker's."""
    id_, _, host = os.pread(lock, 512, 0).decode(errors="replace").partition(" ")
    if _ID.fullmatch(id_) and host == os.uname().nodename:
        return id_
    made = _new_id()
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{made} {os.uname().nodename}".encode(), 0)
    return made


# ---- showing life ----------------------------------------------------------------------------

_SHOW = text(
    "INSERT INTO workers (id, alive_at, claimed) VALUES (:id, :now, :claimed) ON CONFLICT (id) DO UPDATE SET"
    " alive_at = excluded.alive_at, claimed = excluded.claimed"
).bindparams(bindparam("now", type_=Moment), bindparam("claimed", type_=_w.claimed.type))


def show(connection: Connection, worker: str, messages: Collection[int], now: datetime) -> None:
    """Note that the worker lives and has these messages under way; without any it needs no row.

    Run last in the transaction that changes what it has, after the rows of messages.
    """
    if messages:
        connection.execute(_SHOW, {"id": worker, "now": now, "claimed": sorted(messages)})
    else:
        connection.execute(delete(models.workers).where(_w.id == worker))


def disown(connection: Connection, worker: str, kept: Collection[int], now: datetime) -> None:
    """Free what a living worker's row has and it does not: the commit of that claim was not confirmed."""
    claimed: Sequence[int] | None = connection.execute(
        select(_w.claimed).where(_w.id == worker)
    ).scalar_one_or_none()
    lost = set(claimed or ()) - set(kept)
    if lost:
        theirs = (_m.id.in_(lost), _m.state == "pending", _m.claim.startswith(f"{worker}:"))
        connection.execute(update(models.messages).where(*theirs).values(due_at=now, claim=None))


def renew(engine: Engine, worker: str, now: datetime) -> None:
    """Note that the worker lives; raises `StoreUnavailable`."""
    alive = update(models.workers).where(_w.id == worker).values(alive_at=now)
    db.in_transaction(engine, lambda connection: connection.execute(alive))


# ---- freeing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Late:
    """A worker that is believed dead, and when it had shown life last, as it stands in its row."""

    worker: str
    alive_at: datetime


def free(engine: Engine, late: Late, now: datetime) -> int:
    """Make the messages of a dead worker due at once; how many.  0 if it has shown life since.

    Of several that free the same worker one does it.  A worker that lives after all finds its claims gone:
    a success of its still counts, a failure changes nothing.
    """
    return db.in_transaction(engine, lambda connection: _free(connection, late, now))


def _free(connection: Connection, late: Late, now: datetime) -> int:
    """Messages are locked before the row of the worker, in the order of their ids: as `show` comes last."""
    mine = (_w.id == late.worker, _w.alive_at == late.alive_at)
    claimed: Sequence[int] | None = connection.execute(select(_w.claimed).where(*mine)).scalar_one_or_none()
    if claimed is None:
        return 0
    theirs = select(_m.id).where(
        _m.id.in_(claimed), _m.state == "pending", _m.claim.startswith(f"{late.worker}:")
    )
    theirs = theirs.add_columns(_m.subscriber, _m.due_at).order_by(_m.id)
    rows = connection.execute(theirs.with_for_update(of=models.messages)).all()
    if not connection.execute(delete(models.workers).where(*mine)).rowcount:
        return 0
    for subscriber in sorted({row.subscriber for row in rows}):
        ids = [row.id for row in rows if row.subscriber == subscriber]
        _make_due(connection, subscriber, ids, now)
    _free_probes(connection, {(row.subscriber, row.due_at) for row in rows}, now)
    return len(rows)


def _make_due(connection: Connection, subscriber: str, ids: Sequence[int], now: datetime) -> None:
    """Make messages due before what their subscriber waits for: they had their turn already."""
    waiting = select(_m.due_at).where(_m.state == literal_column("'pending'"), _m.subscriber == subscriber)
    first = connection.execute(waiting.order_by(_m.due_at).limit(1)).scalar_one()
    due_at = min(now, first - timedelta(milliseconds=1))
    connection.execute(update(models.messages).where(_m.id.in_(ids)).values(due_at=due_at, claim=None))


def _free_probes(connection: Connection, leases: Collection[tuple[str, datetime]], now: datetime) -> None:
    """Let open circuits whose probe the dead worker had send another at once: it was leased as the claim.

    `leases`: subscribers, and until when their messages were claimed.
    """
    for subscriber, until in sorted(leases):
        probing = (_s.id == subscriber, _s.probe_at == until)
        connection.execute(update(models.subscribers).where(*probing).values(probe_at=now))


def release(engine: Engine, worker: str, now: datetime) -> int:
    """Free all that a worker held that is known to be dead; how many messages.  Raises `StoreUnavailable`.

    That is messages, the use of tokens, the renewal of lent tokens, and ended builds to be looked at.  Of
    these only the ones looked at for the first time: another may be what kills its readers, and waits for
    its lease.
    """

    def unit(connection: Connection) -> int:
        _release_leases(connection, f"{worker}:", now)
        alive_at = connection.execute(select(_w.alive_at).where(_w.id == worker)).scalar_one_or_none()
        return 0 if alive_at is None else _free(connection, Late(worker, alive_at), now)

    return db.in_transaction(engine, unit)


def _release_leases(connection: Connection, prefix: str, now: datetime) -> None:
    lanes, lent, ended = models.budgets, models.credentials, models.collections
    owned = lanes.c.owner.startswith(prefix) | lanes.c.owner.startswith(f"turn:{prefix}")
    connection.execute(update(lanes).where(owned).values(owner=None, owned_until=None))
    asking = lent.c.lease.startswith(prefix)
    connection.execute(update(lent).where(asking).values(lease=None, leased_until=None))
    looking = (ended.c.due_at.is_not(None), ended.c.claim.startswith(prefix), ended.c.tries <= 1)
    connection.execute(update(ended).where(*looking).values(claim=None, due_at=now))


@dataclass(slots=True)
class Watch:
    """What one living worker has seen of the others' rows; `clock`: monotonic, in seconds."""

    worker: str
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[datetime, float]] = field(default_factory=dict)
    _looked: float = 0.0

    def late(self, engine: Engine) -> list[Late]:
        """Look at the rows once more: those who are dead now.  Raises `StoreUnavailable`."""
        began = self.clock()
        rows = _rows(engine, any(began - since > DOUBTED_AFTER_SECONDS for _, since in self._seen.values()))
        now = self.clock()
        known = self._seen if now - self._looked <= GAP_SECONDS else {}
        self._looked = now
        self._seen = {
            worker: known[worker] if worker in known and known[worker][0] == alive_at else (alive_at, now)
            for worker, alive_at in rows
            if worker != self.worker
        }
        return [
            Late(worker, alive_at)
            for worker, (alive_at, since) in self._seen.items()
            if now - since >= DEAD_AFTER_SECONDS
        ]


def _rows(engine: Engine, as_writer: bool) -> list[tuple[str, datetime]]:
    rows = select(_w.id, _w.alive_at)
    if as_writer:
        locked = rows.order_by(_w.id).with_for_update()
        return db.in_transaction(engine, lambda write: [tuple(row) for row in write.execute(locked)])
    with db.reading(engine) as connection:
        return [tuple(row) for row in connection.execute(rows)]
