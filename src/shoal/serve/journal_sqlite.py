"""A journal's store in a SQLite file, for the gateways of one host.

Commits go to the write-ahead log without waiting for the disk: they survive the death of every process, and of the
last moments before a power failure some may be missing, never torn. Leases are counted by CLOCK_MONOTONIC, which all
processes of a host share and no change of the date moves; a time ahead of it is of before a reboot.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal.serve.journal_store import (
    TOLD_SECONDS,
    Batch,
    Fragment,
    JournalConfig,
    JournaledRequest,
    JournalEntry,
    StoreError,
    assembled,
)

_VERSION = 1
_PAGE = 4096
_SCHEMA = """
CREATE TABLE gateways (gateway TEXT PRIMARY KEY, renewed REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE requests (
    id TEXT PRIMARY KEY, owner TEXT, ended INTEGER NOT NULL DEFAULT 0, touched REAL NOT NULL, entry BLOB NOT NULL);
CREATE INDEX requests_touched ON requests (ended, touched);
CREATE TABLE fragments (request_id TEXT NOT NULL, fragment BLOB NOT NULL);
CREATE INDEX fragments_request ON fragments (request_id);
CREATE TABLE log (number INTEGER PRIMARY KEY, gateway TEXT NOT NULL, touched REAL NOT NULL, fragments BLOB NOT NULL);
CREATE TABLE taken (gateway TEXT, request_id TEXT, PRIMARY KEY (gateway, request_id)) WITHOUT ROWID;
CREATE TABLE reserved (
    tenant TEXT, key TEXT, request_id TEXT NOT NULL, touched REAL NOT NULL, PRIMARY KEY (tenant, key)) WITHOUT ROWID;
CREATE INDEX reserved_touched ON reserved (touched);
"""
_fragments = msgspec.msgpack.Decoder(list[Fragment])
_fragment = msgspec.msgpack.Decoder(Fragment)
_entry = msgspec.msgpack.Decoder(JournalEntry)


class SqliteStore:
    def __init__(self, config: JournalConfig, gateway: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._gateway = gateway
        self._clock = clock
        self._path = Path(config.location)
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Prompts are in it. SQLite gives its other two files the mode of this one.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            os.chmod(self._path, 0o600)
        except OSError as error:
            raise StoreError(f"journal {self._path} cannot be written: {error.strerror}") from None
        try:
            connection = sqlite3.connect(self._path, timeout=1.0, isolation_level=None)
            self._connection = connection
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA secure_delete = FAST")
            connection.execute(f"PRAGMA max_page_count = {max(64, self._config.max_bytes // _PAGE)}")
            with self._transaction() as transaction:
                version = transaction.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        transaction.execute(statement)
                    transaction.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.Error as error:
            self.close()
            raise StoreError(f"journal {self._path} cannot be used: {error}; remove it or name another file") from None
        if version not in (0, _VERSION):
            self.close()
            raise StoreError(f"journal {self._path} was written by another version of shoal; remove it")

    def commit(self, batch: Batch) -> list[str]:
        encode = msgspec.msgpack.encode
        with self._transaction() as on:
            now = self._clock()
            taken = on.execute("DELETE FROM taken WHERE gateway = ? RETURNING request_id", [self._gateway]).fetchall()
            if taken:
                return [request_id for (request_id,) in taken]
            self._renew(on, now)
            if batch.entries:
                on.executemany(
                    "INSERT INTO requests (id, owner, touched, entry) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    [(entry.request_id, self._gateway, now, encode(entry)) for entry in batch.entries],
                )
            if batch.log:
                on.execute(
                    "INSERT INTO log (gateway, touched, fragments) VALUES (?, ?, ?)",
                    [self._gateway, now, encode(batch.log)],
                )
            if batch.filed:
                on.executemany(
                    "INSERT INTO fragments VALUES (?, ?)", [(one.request_id, encode(one)) for one in batch.filed]
                )
            if batch.clears_log:
                on.execute("DELETE FROM log WHERE gateway = ?", [self._gateway])
            mine = "WHERE id = ? AND owner = ?"
            if batch.ended:
                on.executemany(
                    f"UPDATE requests SET ended = 1, owner = NULL, touched = ? {mine}",
                    [(now, request_id, self._gateway) for request_id in batch.ended],
                )
            if batch.released:
                on.executemany(
                    f"UPDATE requests SET owner = NULL, touched = ? {mine}",
                    [(now, request_id, self._gateway) for request_id in batch.released],
                )
        return []

    def load(self, request_ids: Sequence[str]) -> dict[str, JournaledRequest]:
        rows: dict[str, tuple[bytes, int]] = {}
        fragments: dict[str, list[Fragment]] = {}
        with self._transaction("BEGIN") as on:  # all of it as of one moment
            for request_id in request_ids:
                row = on.execute("SELECT entry, ended FROM requests WHERE id = ?", [request_id]).fetchone()
                if row is not None:
                    rows[request_id] = row
                    filed = on.execute("SELECT fragment FROM fragments WHERE request_id = ?", [request_id])
                    fragments[request_id] = [_fragment.decode(blob) for (blob,) in filed]
            if any(not ended for _, ended in rows.values()):
                for (blob,) in on.execute("SELECT fragments FROM log"):
                    for one in _fragments.decode(blob):
                        if one.request_id in fragments:
                            fragments[one.request_id].append(one)
        return {
            request_id: assembled(_entry.decode(entry), fragments[request_id], ended=bool(ended))
            for request_id, (entry, ended) in rows.items()
        }

    def claim(self, request_id: str) -> bool:
        with self._transaction() as on:
            now = self._clock()  # not before the lock was had: what others wrote meanwhile would lie ahead
            row = on.execute(
                "SELECT owner, ended, renewed FROM requests LEFT JOIN gateways ON gateway = owner WHERE id = ?",
                [request_id],
            ).fetchone()
            if row is None or row[1]:
                return False
            owner, _, renewed = row
            if owner not in (None, self._gateway):
                if renewed is not None and 0 <= now - renewed < self._config.lease_seconds:
                    return False
                on.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", [owner, request_id])
            on.execute("DELETE FROM taken WHERE gateway = ? AND request_id = ?", [self._gateway, request_id])
            on.execute("UPDATE requests SET owner = ?, touched = ? WHERE id = ?", [self._gateway, now, request_id])
            self._renew(on, now)
        return True

    def reserve(self, tenant: str, key: str, request_id: str) -> str | None:
        with self._transaction() as on:
            row = on.execute("SELECT request_id FROM reserved WHERE tenant = ? AND key = ?", [tenant, key]).fetchone()
            if row is not None:
                return str(row[0])
            on.execute("INSERT INTO reserved VALUES (?, ?, ?, ?)", [tenant, key, request_id, self._clock()])
        return None

    def unreserve(self, tenant: str, key: str, request_id: str) -> None:
        with self._transaction() as on:
            on.execute(
                "DELETE FROM reserved WHERE tenant = ? AND key = ? AND request_id = ?", [tenant, key, request_id]
            )

    def purge(self) -> None:
        """What is too old, and then what ended first until nine tenths of the room are enough."""
        with self._transaction() as on:
            now = self._clock()
            leases = [now - self._config.lease_seconds, now]
            live = "owner IN (SELECT gateway FROM gateways WHERE renewed BETWEEN ? AND ?)"
            for old, bound in (("touched < ?", now - self._config.retention_seconds), ("touched > ?", now)):
                # `ended` is named because the index begins with it.
                self._delete(on, f"ended IN (0, 1) AND {old} AND (owner IS NULL OR NOT {live})", [bound, *leases])
                on.execute(f"DELETE FROM log WHERE {old}", [bound])
                on.execute(f"DELETE FROM reserved WHERE {old}", [bound])
            # A gateway that was stopped and goes on must still be told what it has lost.
            on.execute("DELETE FROM gateways WHERE NOT renewed BETWEEN ? AND ?", [now - TOLD_SECONDS, now])
            on.execute("DELETE FROM taken WHERE gateway NOT IN (SELECT gateway FROM gateways)")
        while self._used() > 0.9 * self._config.max_bytes:
            with self._transaction() as on:
                first = "id IN (SELECT id FROM requests WHERE ended = 1 ORDER BY touched LIMIT 256)"
                if not self._delete(on, first, []):
                    return

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _renew(self, on: sqlite3.Connection, now: float) -> None:
        on.execute("INSERT OR REPLACE INTO gateways VALUES (?, ?)", [self._gateway, now])

    def _delete(self, on: sqlite3.Connection, where: str, values: Sequence[float]) -> int:
        on.execute(f"DELETE FROM fragments WHERE request_id IN (SELECT id FROM requests WHERE {where})", values)
        return on.execute(f"DELETE FROM requests WHERE {where}", values).rowcount

    def _used(self) -> int:
        with self._transaction("BEGIN") as on:
            pages = on.execute("PRAGMA page_count").fetchone()[0] - on.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages) * _PAGE

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        connection = self._connection
        if connection is None:
            raise StoreError("journal is closed")
        try:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise StoreError(f"journal {self._path}: {error}") from None
