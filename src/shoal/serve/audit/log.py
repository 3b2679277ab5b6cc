"""The audit log of a process: a queue that never waits, and a thread that writes.

Whoever records an event pays for a timestamp and an append to a deque. The thread encodes, hashes and writes; where the
disk fails it tries again, keeps what it has, and counts what no longer fits. A failure is an event like any other: as
soon as writing works again, `audit_gap` says what was lost and why.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from shoal import __version__
from shoal.serve.audit.chain import chains, checkpoint_files, public_keys
from shoal.serve.audit.events import (
    AuditGap,
    AuthenticationFailed,
    ContentPolicy,
    Event,
    LogStarted,
    LogStopped,
    with_content,
)
from shoal.serve.audit.note import AuditError, SigningKey, read_file
from shoal.serve.audit.writer import ChainWriter, claim

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

_GATHER_SECONDS = 0.02
"""The thread lets so much time pass between two looks at the queue."""
_BUSY_SECONDS = 1.0
"""So long after a record the thread goes on looking of itself: to wake it costs a caller more than the record does."""
_RETRY_SECONDS = 0.25
_SYNC_SECONDS = 1.0
_BATCH = 16
"""Records in one write: a fraction of a millisecond of work, after which other threads get their turn."""


class AuditConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    directory: str
    """Where the log lies. Several gateways may share it: each writes a chain of its own."""
    content: ContentPolicy = "digest"
    """digest: SHA-256 of the prompt's token ids; none; full: the token ids of prompt and answer."""
    fail_closed: bool = False
    """Requests are refused while the log cannot be written."""
    fsync: Literal["interval", "record"] = "interval"
    """interval: to the disk once a second; record: after every write, which gathers what came within 20 ms."""
    checkpoint_records: int = 1000
    checkpoint_seconds: float = 60.0
    """A checkpoint is signed after so many records or so long after the last, whichever comes first."""
    copy_to: str | None = None
    """Directory, best on another host, that also gets every checkpoint: only so is it found that log and checkpoints
    were both put back to an older state."""
    signing_key: str | None = None
    """PEM file with an Ed25519 key, made where there is none. None is `signing.key` in the directory."""
    queue_records: int = 10_000
    """Events that wait to be written at most."""
    rotate_bytes: int = 64 * 1024 * 1024
    """Size after which a new file is begun."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_records", "checkpoint_seconds", "queue_records", "rotate_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")


class _Outage:
    """What could not be logged, since writing last worked."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.since = time.time_ns()
        self.lost = 0


class AuditLog:
    """`record` may be called from any thread."""

    def __init__(self, config: AuditConfig, *, config_digest: str = "") -> None:
        """Takes up the chain of an earlier process or begins one, and starts the thread. Raises AuditError."""
        self.config = config
        self.written = 0
        """Records of this process on file, those of the log itself too."""
        self.lost = 0
        """Events that will never be in the log."""
        self._queue: deque[tuple[int, Event, Sequence[int] | None, Sequence[Sequence[int]] | None]] = deque()
        self._pending: deque[tuple[int, bytes]] = deque()
        """Encoded, so that prompts are let go even while the disk is full. Of the thread alone."""
        self._num_pending = 0
        self._outage: _Outage | None = None
        self._outage_lock = threading.Lock()
        self._failure: str | None = None
        """Why the last write did not succeed."""
        self._wake = threading.Event()
        """Set while the thread looks of itself."""
        self._busy_until = 0.0
        self._idle = threading.Condition()
        """Notified whenever the thread has done what there was to do, or failed to."""
        self._working = False
        self._closing = False
        self._close_by = 0.0
        self._stopped = False
        self._writer, self._warning = self._open(config_digest)
        self._checkpoint_at = self._sync_at = time.monotonic()  # the first records are signed at once
        self._wake.set()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def _open(self, config_digest: str) -> tuple[ChainWriter, str | None]:
        config = self.config
        directory = Path(config.directory)
        copy_to = None if config.copy_to is None else Path(config.copy_to)
        try:
            for path in filter(None, (directory, copy_to)):
                path.mkdir(mode=0o750, parents=True, exist_ok=True)
            if copy_to is not None and copy_to.resolve() == directory.resolve():
                raise AuditError(f"copy_to: {copy_to} is the log's own directory: give another")
            key = SigningKey.load_or_create(
                Path(config.signing_key) if config.signing_key else directory / "signing.key"
            )
            for path in filter(None, (directory, copy_to)):
                public = path / f"{key.public.name.rpartition('/')[2]}.pub"
                if not public.exists():
                    public.write_text(f"{key.public}\n", encoding="utf-8")
            sizes = _sizes(directory)
            writer, damaged = claim(directory, key, rotate_bytes=config.rotate_bytes, copy_to=copy_to)
        except ValueError as error:
            raise AuditError(f"{directory}: a public key there is not one: {error}") from None
        except OSError as error:
            where = error.filename or directory
            raise AuditError(f"{where}: the audit log cannot be opened: {error.strerror or error}") from None
        started = LogStarted(
            version=__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
            config_digest=config_digest,
            content=config.content,
            fail_closed=config.fail_closed,
            chains={name: size for name, size in sizes.items() if name != writer.chain.name},
        )
        now = time.time_ns()
        found = [AuditGap(reason=what, until=now) for what in damaged]
        found += [AuditGap(reason=f"crash: {what}", lost=lost, until=now) for what, lost in writer.repairs]
        events: list[Event] = [started, *found]
        self._queue.extend((now, event, None, None) for event in events)
        for what in damaged:
            _log.error("audit: %s: a new chain was begun; `shoal audit verify %s` says more", what, directory)
        return writer, damaged[0] if damaged else None

    # --- for everyone -----------------------------------------------------------------------------------------------

    def record(
        self,
        event: Event,
        *,
        prompt: Sequence[int] | None = None,
        outputs: Sequence[Sequence[int]] | None = None,
    ) -> bool:
        """False where the event is lost, and with `fail_closed` also while the log cannot be written.

        Token ids are kept as they are given until the thread has read them: the caller must not change them any more.
        """
        limit = self.config.queue_records
        if isinstance(event, AuthenticationFailed):
            limit //= 2  # what anyone can cause without a key must not push out the rest
        if self._closing or len(self._queue) + self._num_pending >= limit:
            self._lose("the log is closed" if self._closing else "more events than could be written")
            return False
        self._queue.append((time.time_ns(), event, prompt, outputs))
        if not self._wake.is_set():
            self._wake.set()
        return self.ready

    @property
    def ready(self) -> bool:
        """Whether requests may be taken: false only with `fail_closed`, while the log fails or its queue is full."""
        return not self.config.fail_closed or (
            self._failure is None
            and not self._closing
            and len(self._queue) + self._num_pending < self.config.queue_records
        )

    @property
    def state(self) -> str:
        """What is wrong, or "ok"."""
        if self._failure is not None:
            return self._failure
        if self._outage is not None:
            return f"{self._outage.lost} events were lost: {self._outage.reason}"
        return self._writer.copy_error or self._warning or "ok"

    @property
    def queued(self) -> int:
        return len(self._queue) + self._num_pending

    @property
    def chain(self) -> Path:
        return self._writer.chain

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything that was recorded is in the file. False where that did not happen in time."""
        with self._idle:
            self._wake.set()
            return self._idle.wait_for(lambda: not (self.queued or self._working or self._outage), timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Write what waits, sign it, and end. False where not everything could be written in time."""
        if not self._closing:
            self._close_by = time.monotonic() + timeout
            self._closing = True
            self._wake.set()
        self._thread.join(timeout + 2 * _RETRY_SECONDS)
        complete = not self._thread.is_alive() and self._stopped and not self.queued and self._failure is None
        if not complete:
            _log.error("audit: the log was closed with %d events that are in no record", self.queued)
        return complete

    def _lose(self, reason: str) -> None:
        with self._outage_lock:
            self.lost += 1
            if self._outage is None:
                self._outage = _Outage(reason)
                _log.error("audit: events are being lost: %s", reason)
            self._outage.lost += 1
        self._wake.set()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                if time.monotonic() >= self._busy_until:
                    self._wake.clear()
                    # Asked after the clearing: what came before it has woken nobody.
                    if not self._queue and self._outage is None and not self._closing:
                        self._wake.wait(self._pause())
                if not self._closing:
                    time.sleep(_GATHER_SECONDS)
                closing = self._closing
                self._working = True
                worked = self._work(closing=closing)
                with self._idle:
                    self._working = False
                    self._idle.notify_all()
                if closing and (worked or time.monotonic() >= self._close_by):
                    break
                if not worked:
                    time.sleep(_RETRY_SECONDS)
                    self._busy_until = math.inf  # until it works
        except Exception as error:
            _log.exception("audit: the thread that writes the log has ended")
            self._failure = f"the log is not written any more: {type(error).__name__}: {error}"
        finally:
            self._writer.close()
            with self._idle:
                self._idle.notify_all()

    def _pause(self) -> float | None:
        """Seconds until something is due without a further event; None where nothing is, as while the gateway idles."""
        due = [self._sync_at] if self._writer.unsynced else []
        if self._writer.head.size > self._writer.signed_size:
            due.append(self._checkpoint_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _work(self, *, closing: bool) -> bool:
        """Write all that waits. False where the disk did not take it."""
        writer, before = self._writer, self.written
        try:
            if not self._stopped:
                self._write_waiting()
                self._end_outage()
                if closing:  # nothing may follow it
                    writer.append([(time.time_ns(), _encode(LogStopped(lost=self.lost)))])
                    self._stopped = True
                    self.written += 1
            now = time.monotonic()
            if writer.unsynced and now >= self._sync_at:
                writer.sync()
                self._sync_at = now + _SYNC_SECONDS
            if closing or now >= self._checkpoint_at:
                self._checkpoint()
        except OSError as error:
            self._fail(error)
            return False
        self._failure = None
        if self.written > before:
            self._busy_until = now + _BUSY_SECONDS
        elif self._busy_until == math.inf:
            self._busy_until = now
        return True

    def _write_waiting(self) -> None:
        """Raises OSError; what is not written by then stays in `_pending`."""
        writer = self._writer
        while self._encode_some():
            room = self.config.checkpoint_records - (writer.head.size - writer.signed_size)
            batch = list(islice(self._pending, max(1, min(_BATCH, room))))
            writer.append(batch)
            for _ in batch:
                self._pending.popleft()
            self._num_pending -= len(batch)
            self.written += len(batch)
            if self.config.fsync == "record":
                writer.sync()
            if writer.head.size - writer.signed_size >= self.config.checkpoint_records:
                self._checkpoint()

    def _encode_some(self) -> bool:
        """Into `_pending`, up to a batch of it. True where there is something to write."""
        while self._queue and len(self._pending) < _BATCH:
            self._encode_one()
        return bool(self._pending)

    def _encode_one(self) -> None:
        stamp, event, prompt, outputs = self._queue[0]
        try:
            encoded = _encode(with_content(event, self.config.content, prompt, outputs))
        except Exception as error:  # one event must not stop the log
            self._queue.popleft()
            self._lose(f"{type(event).__name__} cannot be encoded: {error}")
            return
        self._pending.append((stamp, encoded))
        self._num_pending += 1  # before it leaves the queue: `queued` may count it twice, but never misses it
        self._queue.popleft()

    def _checkpoint(self) -> None:
        self._writer.checkpoint()
        self._checkpoint_at = time.monotonic() + self.config.checkpoint_seconds

    def _end_outage(self) -> None:
        """Everything that is still there has been written: now the record of what is not. Raises OSError."""
        outage = self._outage
        if outage is None:
            return
        now, lost = time.time_ns(), outage.lost
        gap = AuditGap(reason=outage.reason, lost=lost, since=outage.since, until=now)
        self._writer.append([(now, _encode(gap))])
        self.written += 1
        _log.warning("audit: the log is written again; %d events were lost: %s", lost, outage.reason)
        with self._outage_lock:
            outage.lost -= lost
            if outage.lost == 0:
                self._outage = None
            else:  # more were lost meanwhile
                outage.since = now

    def _fail(self, error: OSError) -> None:
        reason = f"{self._writer.chain}: {error.strerror or error}"
        with self._outage_lock:
            if self._outage is None:
                self._outage = _Outage(reason)
                _log.error("audit: the log cannot be written: %s", reason)
        self._failure = reason
        while self._queue:  # so that it holds no prompts
            self._encode_one()


def _sizes(directory: Path) -> dict[str, int]:
    """How many records each chain has, as far as its newest checkpoint says so."""
    keys = public_keys(directory)
    sizes = {}
    for chain in chains(directory):
        for path in reversed(checkpoint_files(chain)):
            notes = read_file(path, keys)
            if notes.checkpoints:
                sizes[chain.name] = notes.checkpoints[-1].size
                break
    return sizes
