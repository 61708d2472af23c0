"""The file of a monitor: SQLite, so that what a call has returned is there after a crash."""

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .alerts import Alert

FORMAT = 1
BUSY = 10.0  # seconds that a writer waits for another
TABLES = """
CREATE TABLE alerts (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, time REAL NOT NULL, severity TEXT NOT NULL,
  source TEXT NOT NULL, message TEXT NOT NULL, details TEXT NOT NULL, acknowledged REAL
);
CREATE TABLE outbox (
  alert TEXT NOT NULL REFERENCES alerts (id), sink TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  due REAL NOT NULL DEFAULT 0, error TEXT, delivered REAL, PRIMARY KEY (alert, sink)
);
CREATE INDEX waiting ON outbox (sink, due) WHERE delivered IS NULL;
CREATE TABLE kept (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE points (
  number INTEGER PRIMARY KEY AUTOINCREMENT, series TEXT NOT NULL, batch INTEGER NOT NULL, time REAL NOT NULL,
  label TEXT, checkpoint TEXT, value REAL, standardised REAL, size INTEGER NOT NULL, signals TEXT NOT NULL
);
CREATE INDEX series_points ON points (series, number);
CREATE TABLE pieces (window TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (window, number));
"""
_ALERT = "alerts.id, alerts.time, severity, source, message, details, acknowledged"


class StateError(RuntimeError):
    """A state file cannot be used: another process writes it, or it is not one."""


class State:
    """A state file, open for writing by one process or for reading by any.

    A second writer is refused, by a lock that the operating system takes back from a process that dies. Transactions
    with alerts wait for the disk (``synchronous = FULL``); others survive the death of the process, and after a loss of
    power the file is as it was at some moment after the last alert.

    Args:
        path: File, made where it is missing; beside it stand ``-wal``, ``-shm`` and ``.lock``.
        read_only: Read alone: nothing is locked and nothing is made.

    Raises:
        StateError: Another process writes it, it is not such a file, or a newer version wrote it.
        FileNotFoundError: It is to be read and is missing.

    Example:
        >>> import tempfile
        >>> from mlx_bulwark.monitor import Alert, State
        >>> state = State(tempfile.mkdtemp() + "/monitor.sqlite")
        >>> with state.transaction(durable=True):
        ...     state.add_alert(Alert("info", "demo", "hello"), sinks=["file"])
        True
        >>> state.close()
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        self._lock: int | None = None
        self._process, self._turn, self._durable = os.getpid(), threading.RLock(), False
        if read_only and not self.path.is_file():
            raise FileNotFoundError(2, "No such state file", str(self.path))
        if not read_only:
            self._lock = _locked(self.path)
        try:
            self._database = self._open()
        except BaseException:
            self._unlock()
            raise

    def _open(self) -> sqlite3.Connection:
        address = self.path.absolute().as_uri() + ("?mode=ro" if self.read_only else "?mode=rwc")
        try:
            database = sqlite3.connect(address, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)
            try:
                if not self.read_only:
                    database.execute("PRAGMA journal_mode = WAL")
                    _make_tables(database)
                (found,) = database.execute("PRAGMA user_version").fetchone()
                if found != FORMAT:
                    raise StateError(f"[State] path must be of format {FORMAT} but {self.path} is of format {found}")
            except BaseException:
                database.close()
                raise
        except sqlite3.DatabaseError as e:
            raise StateError(f"[State] path must be a monitor's state but {self.path} is not: {e}") from None
        return database

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All that is written within is there after a crash, or nothing of it.

        Args:
            durable: Return when it is on the disk.
        """
        self._refuse_fork()
        with self._turn:
            if self._database.in_transaction:  # part of the one around it
                if durable and not self._durable:
                    raise RuntimeError("[State] transaction must be durable within a durable one but that is not")
                yield
                return
            self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._database.execute("BEGIN IMMEDIATE")
            self._durable = durable
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise StateError("[State] a monitor must be used in the process that opened it but was carried into a fork")

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        self._refuse_fork()
        with self._turn:
            return self._database.execute(query, values).fetchall()

    def add_alert(self, alert: Alert, sinks: list[str]) -> bool:
        """Write down an alert and that each sink is to have it; False where its id is there already.

        Args:
            alert: The alert.
            sinks: Names.
        """
        with self.transaction(durable=True):
            new = self._database.execute(
                "INSERT OR IGNORE INTO alerts (id, time, severity, source, message, details) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    alert.id,
                    alert.time,
                    alert.severity,
                    alert.source,
                    alert.message,
                    json.dumps(dict(alert.details), sort_keys=True),
                ),
            ).rowcount
            if new:
                rows = [(alert.id, sink) for sink in sinks]
                self._database.executemany("INSERT INTO outbox (alert, sink) VALUES (?, ?)", rows)
        return bool(new)

    def alerts(self, *, last: int | None = None, open_only: bool = False) -> list[tuple[Alert, float | None]]:
        """Return alerts, the oldest first, each with the time at which it was acknowledged or None.

        Args:
            last: Only so many, the newest.
            open_only: Only those that nobody has acknowledged.
        """
        which = "WHERE acknowledged IS NULL" if open_only else ""
        rows = self._rows(
            f"SELECT {_ALERT} FROM alerts {which} ORDER BY number DESC LIMIT ?", -1 if last is None else last
        )
        return [(_alert(row), row[6]) for row in reversed(rows)]

    def count_alerts(self, *, open_only: bool = False) -> dict[tuple[str, str], int]:
        """Return how many alerts there are, by severity and source."""
        which = "WHERE acknowledged IS NULL" if open_only else ""
        rows = self._rows(f"SELECT severity, source, count(*) FROM alerts {which} GROUP BY severity, source")
        return {(severity, source): n for severity, source, n in rows}

    def due(self, sink: str, now: float, last: int) -> list[tuple[Alert, int]]:
        """Return alerts that a sink is to have now, the oldest first, each with the attempts so far.

        Args:
            sink: Its name.
            now: Seconds since 1970.
            last: At most so many.
        """
        rows = self._rows(
            f"SELECT {_ALERT}, attempts FROM outbox JOIN alerts ON alerts.id = outbox.alert "
            "WHERE sink = ? AND delivered IS NULL AND due <= ? ORDER BY number LIMIT ?",
            sink,
            now,
            last,
        )
        return [(_alert(row), row[7]) for row in rows]

    def delivered(self, alert: Alert, sink: str, time: float) -> None:
        """Write down that a sink has an alert."""
        with self.transaction():  # if a loss of power takes this back, the sink gets the id again and knows it
            self._database.execute(
                "UPDATE outbox SET delivered = ?, error = NULL, attempts = attempts + 1 WHERE alert = ? AND sink = ?",
                (time, alert.id, sink),
            )

    def failed(self, alert: Alert, sink: str, error: str, due: float) -> None:
        """Write down that a sink did not take an alert, why, and when to try again."""
        with self.transaction():
            self._database.execute(
                "UPDATE outbox SET attempts = attempts + 1, error = ?, due = ? WHERE alert = ? AND sink = ?",
                (error, due, alert.id, sink),
            )

    def pending(self) -> dict[str, dict[str, Any]]:
        """Return, by sink, how many alerts wait, how often the worst was tried, and the last error."""
        rows = self._rows(
            "SELECT sink, sum(delivered IS NULL), max((delivered IS NULL) * attempts), max(error), count(*) "
            "FROM outbox GROUP BY sink"
        )
        return {s: {"waiting": n, "attempts": a, "error": e, "alerts": total} for s, n, a, e, total in rows}

    def keep(self, values: Mapping[str, Any]) -> None:
        """Write JSON values by name.

        Args:
            values: JSON values.
        """
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        with self.transaction():
            self._database.executemany(
                "INSERT INTO kept VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", rows
            )

    def kept(self) -> dict[str, Any]:
        """Return all that ``keep`` has written."""
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM kept")}

    def add_points(self, points: list[dict[str, Any]], keep: int) -> None:
        """Append points to the series of charts, and forget the oldest.

        Args:
            points: Of the columns of the table, each.
            keep: Points of a series that are kept.
        """
        if not points:
            return
        names = ("series", "batch", "time", "label", "checkpoint", "value", "standardised", "size", "signals")
        rows = [tuple(json.dumps(p[n]) if n == "signals" else p.get(n) for n in names) for p in points]
        with self.transaction():
            self._database.executemany(
                f"INSERT INTO points ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", rows
            )
            for series in {p["series"] for p in points}:
                self._database.execute(
                    "DELETE FROM points WHERE series = :series AND number <= "
                    "(SELECT number FROM points WHERE series = :series ORDER BY number DESC LIMIT 1 OFFSET :keep)",
                    {"series": series, "keep": keep},
                )

    def points(self, series: str | None = None) -> list[dict[str, Any]]:
        """Return the points of a series, or of all, the oldest first.

        Args:
            series: Name.
        """
        names = "series, batch, time, label, checkpoint, value, standardised, size, signals"
        which, values = ("", ()) if series is None else ("WHERE series = ?", (series,))
        rows = self._rows(f"SELECT {names} FROM points {which} ORDER BY number", *values)
        points = [dict(zip(names.split(", "), row, strict=True)) for row in rows]
        return [p | {"signals": json.loads(p["signals"])} for p in points]

    def add_piece(self, window: str, number: int, data: bytes) -> None:
        """Append rows to a window.

        Args:
            window: Name.
            number: Of the piece; the same number replaces.
            data: Bytes.
        """
        with self.transaction():
            self._database.execute("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?)", (window, number, data))

    def drop_pieces(self, window: str) -> None:
        """Empty a window."""
        with self.transaction():
            self._database.execute("DELETE FROM pieces WHERE window = ?", (window,))

    def pieces(self, window: str) -> list[bytes]:
        """Return what is in a window, the oldest first."""
        return [data for (data,) in self._rows("SELECT data FROM pieces WHERE window = ? ORDER BY number", window)]

    def close(self) -> None:
        """Close the file; another process may write it now."""
        with self._turn:
            if os.getpid() == self._process:
                self._database.close()
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def acknowledge(path: str | os.PathLike[str], ids: list[str], time: float) -> list[str]:
    """Mark alerts as seen by a person, also while a monitor runs; return the ids that are of no alert.

    Args:
        path: State file.
        ids: Of alerts.
        time: Seconds since 1970.

    Raises:
        StateError: It is not a state file.
        FileNotFoundError: It is missing.
    """
    State(path, read_only=True).close()  # refuses what is none
    unknown = []
    database = sqlite3.connect(Path(path).absolute().as_uri() + "?mode=rw", uri=True, timeout=BUSY)
    try:
        with database:
            for i in ids:
                change = "UPDATE alerts SET acknowledged = coalesce(acknowledged, ?) WHERE id = ?"
                if not database.execute(change, (time, i)).rowcount:
                    unknown.append(i)
    finally:
        database.close()
    return unknown


def _locked(path: Path) -> int:
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StateError(f"[State] path must be written by one monitor but another one writes {path}") from None
    return lock


def _make_tables(database: sqlite3.Connection) -> None:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if found or tables:
        return
    statements = "".join(f"{s};" for s in TABLES.split(";") if s.strip())
    database.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {FORMAT}; COMMIT;")


def _alert(row: tuple[Any, ...]) -> Alert:
    names = ("id", "time", "severity", "source", "message", "details")
    content = dict(zip(names, row[:6], strict=True))
    return Alert.from_json(content | {"details": json.loads(content["details"])})
