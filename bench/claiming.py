"""Claiming: how long the next 100 due messages take among a million delivered ones, and the store's plan."""

import re
import tempfile
import time
from pathlib import Path

from sqlalchemy import Engine, Text, cast, event, func, insert, literal, select, text, true, update

from bench import recording, servers
from bench.table import Row, measured
from tests.facts import PACE
from webhook_app import db, deliveries, models
from webhook_app.room import Room
from webhook_app.times import utc_now

PART = "claiming"
SUBSCRIBERS, EVENTS = 100, 10_000
DUE, SPREAD = 100, 10
TIMES = 30
GOAL_MS = 5.0
_e, _s = models.events.c, models.subscribers.c


def run() -> list[Row]:
    """On SQLite and on PostgreSQL; the plans are printed whole."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        rows = _measure("SQLite", f"sqlite:///{Path(name) / 'claiming.db'}")
    with servers.postgresql() as (url, _):
        return rows + _measure("PostgreSQL", url)


def _measure(store: str, url: str) -> list[Row]:
    servers.prepare(url)
    engine = db.connect(url)
    urls = [f"https://{number}.example.com/" for number in range(SUBSCRIBERS)]
    recording.subscribe(engine, urls, sources=["elsewhere"])
    _fill(engine)
    one = recording.subscribe(engine, urls[:1])
    recording.record(engine, DUE * (TIMES + 1), PACE)
    of_one = [_claim_ms(engine, DUE) for _ in range(TIMES)]
    plan = _plan(engine)
    recording.remove(engine, one)
    recording.subscribe(engine, urls[:SPREAD])
    recording.record(engine, DUE // SPREAD * TIMES, PACE)
    of_several = [_claim_ms(engine, DUE // SPREAD) for _ in range(TIMES)]
    engine.dispose()
    what = f"{store}: the next {DUE} beside {SUBSCRIBERS * EVENTS} delivered messages"
    return [
        measured(PART, f"{what}, of 1 subscriber", of_one, "{:.1f} ms", most=GOAL_MS),
        measured(PART, f"{what}, of {SPREAD}", of_several, "{:.1f} ms"),
        Row(PART, f"{store}: how the messages are found", plan),
    ]


def _fill(engine: Engine) -> None:
    """A delivered message of each event for each subscriber."""
    recording.record(engine, 1, PACE)
    now = utc_now()
    numbered = select(_s.id, func.row_number().over(order_by=_s.id).label("place")).subquery()
    number = (numbered.c.place - 1) * EVENTS + _e.id
    columns = ["id", "message_id", "subscriber", "event", "state", "attempts", "created_at", "settled_at"]
    moment = literal(now, models.messages.c.created_at.type)
    values = (
        number,
        literal("msg_") + cast(number, Text),
        numbered.c.id,
        _e.id,
        literal("delivered"),
        literal(1),
    )
    messages = select(*values, moment, moment).select_from(numbered.join(models.events, true()))
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        first = dict(connection.execute(select(models.events)).mappings().one()) | {
            "build": None,
            "sequence": None,
        }
        connection.execute(insert(models.events), [first | {"id": id_} for id_ in range(2, EVENTS + 1)])
        connection.execute(insert(models.messages).from_select(columns, messages))
        given = {"events": EVENTS, "messages": SUBSCRIBERS * EVENTS}
        connection.execute(update(models.counters).values(**given))
        if engine.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))  # as its autovacuum does


def _claim_ms(engine: Engine, each: int) -> float:
    """Milliseconds of a claim of the next messages, `each` of a subscriber, without its commit."""
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        began = time.perf_counter()
        room = Room(2 * DUE * SPREAD, per_host=DUE, first=each)
        count = len(deliveries.claim(connection, utc_now(), room, 15).messages)
        seconds = time.perf_counter() - began
    if count != DUE:
        raise RuntimeError(f"{count} messages were claimed instead of {DUE}")
    return seconds * 1000


def _plan(engine: Engine) -> str:
    """The indexes by which the statements of a claim find messages, and whether one reads the whole table."""
    statements: dict[str, object] = {}

    def keep(_connection, _cursor, statement, parameters, *_):
        if "messages" in statement:
            statements.setdefault(statement, parameters)

    event.listen(engine, "before_cursor_execute", keep)
    _claim_ms(engine, DUE)
    event.remove(engine, "before_cursor_execute", keep)
    explain = "EXPLAIN" if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    plans = []
    with db.reading(engine) as connection:
        for statement, parameters in statements.items():
            lines = connection.exec_driver_sql(f"{explain} {statement}", parameters)
            plans.append("\n".join(str(line[-1]) for line in lines))
    print(f"\n{engine.dialect.name}, the statements of a claim:", *plans, sep="\n\n")
    text_ = "\n".join(plans)
    walked = sorted(set(re.findall(r"ix_messages_\w+", text_)))
    scans = re.search(r"Seq Scan on messages\b|SCAN m(essages)?$", text_, re.MULTILINE)
    return ", ".join([*walked, "**the whole table**" if scans else "never the whole table"])
