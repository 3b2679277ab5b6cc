"""Appends records and checkpoints to one chain, and goes on where another process left it. Blocking, no threads.

Every method that raises OSError has left the chain as it was before: it may be called again.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from shoal.serve.audit.chain import (
    CHECKPOINTS,
    Head,
    chains,
    checkpoint_files,
    decode_link,
    first_seq,
    read_lines,
    segment_stem,
    segments,
    try_lock,
)
from shoal.serve.audit.merkle import Frontier
from shoal.serve.audit.note import Checkpoint, SigningKey, read_file


class DamagedChain(Exception):
    """What is on disk is not what a writer left there, a crash allowed for. It is not written to any more."""


class AppendFile:
    """A file that only ever grows by whole writes: what was written in part is cut off again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = os.fstat(self._descriptor).st_size
        self._torn = False

    def append(self, data: bytes) -> None:
        self._repair()
        self._torn = True
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            with contextlib.suppress(OSError):  # else before the next append
                self._repair()
            raise
        self._torn = False
        self.size += len(data)

    def _repair(self) -> None:
        if self._torn:
            os.ftruncate(self._descriptor, self.size)
            self._torn = False

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._repair()
        os.close(self._descriptor)


class ChainWriter:
    """Holds the chain's lock from `claim` to `close`."""

    def __init__(self, chain: Path, lock: int, key: SigningKey, *, rotate_bytes: int, copy_to: Path | None) -> None:
        """Raises DamagedChain, OSError; the lock is still the caller's then."""
        self.chain = chain
        self.repairs: list[tuple[str, int]] = []
        """What a crash had left half written, and was cut off; and how many events it was."""
        self.copy_error: str | None = None
        """Why the newest checkpoint is not in the copy."""
        self.unsynced = False
        """Records are in the file, but not surely on the disk."""
        self._lock = lock
        self._key = key
        self._rotate_bytes = rotate_bytes
        self._copy_to = None if copy_to is None else copy_to / chain.name
        self._cuts: list[tuple[Path, int]] = []
        newest = self._newest_checkpoint(chain)
        self.head = self._read_records(newest)
        self._compare_copy()
        for path, size in self._cuts:  # only now that the rest is known to be sound: evidence stays as it is
            os.truncate(path, size)
        self.signed_size = 0 if newest is None else newest.size
        self._stem = segment_stem(self.head.size)
        """Of the names of the files that are written to, or will be."""
        self._segment: AppendFile | None = None
        self._checkpoints: AppendFile | None = None
        self._copy: AppendFile | None = None

    # --- where the last process left it -----------------------------------------------------------------------------

    def _newest_checkpoint(self, folder: Path) -> Checkpoint | None:
        """Only the newest file that has one is read: a start does not take longer for all that was ever signed."""
        for path in reversed(checkpoint_files(folder)):
            notes = read_file(path, {self._key.public.name: self._key.public})
            if notes.problem is not None:
                if not notes.torn:
                    raise DamagedChain(f"{path}: {notes.problem}")
                self._cuts.append((path, notes.whole_bytes))
                cut = path.stat().st_size - notes.whole_bytes
                self.repairs.append((f"{path.name}: cut off {cut} bytes of an incomplete checkpoint", 0))
            if notes.checkpoints:
                return notes.checkpoints[-1]
        return None

    def _read_records(self, newest: Checkpoint | None) -> Head:
        """The head: the newest checkpoint's, moved on over the records after it, each of which must follow."""
        head = Head() if newest is None else Head(Frontier(newest.size, newest.frontier), newest.head)
        files = [path for path in segments(self.chain) if path.stat().st_size > 0]
        begins = {path: first_seq(path) for path in files}
        if head.size and not files:
            raise _missing(self.chain, 0, head.size)
        later = [path for path in files if (begins[path] or 0) >= head.size]
        earlier = [path for path in files if path not in later]
        for path in earlier[-1:] + later:
            seq = begins[path]
            if seq is None or seq > head.size:
                raise DamagedChain(f"{path}: does not begin with record {head.size}")
            self._follow(path, seq, head, last=path == files[-1])
        return head

    def _follow(self, path: Path, seq: int, head: Head, *, last: bool) -> None:
        """Over the records of one file. Those before the checkpoint are only counted."""
        signed, good_bytes = head.size, 0
        with path.open("rb") as file:
            for line, whole in read_lines(file):
                if not whole:
                    if not last:
                        raise DamagedChain(f"{path}: its last line is incomplete")
                    break
                if seq >= signed:
                    try:
                        link = decode_link(line)
                    except ValueError:
                        raise DamagedChain(f"{path}: record {seq} is not one") from None
                    if (link.seq, link.prev) != (head.size, head.leaf.hex()):
                        raise DamagedChain(f"{path}: record {seq} does not follow from the one before")
                    head.append(line)
                good_bytes += len(line) + 1
                seq += 1
        if seq < head.size:
            raise _missing(path, seq, head.size)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # whoever wrote it may not have come to that
            file.seek(good_bytes)
            torn = file.read()
        if torn:
            self._cuts.append((path, good_bytes))
            digest = sha256(torn).hexdigest()
            what = f"{path.name}: cut off {len(torn)} bytes of an incomplete record (SHA-256 {digest})"
            self.repairs.append((what, 1))

    def _compare_copy(self) -> None:
        """So that a log which was put back to an older state is not continued as if nothing had been."""
        copied = None if self._copy_to is None else self._newest_checkpoint(self._copy_to)
        if copied is None:
            return
        if copied.size > self.head.size or (copied.size == self.head.size and copied.head != self.head.leaf):
            raise DamagedChain(f"it ends with {self.head.size} records, and {self._copy_to} has signed {copied.size}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(self, events: Sequence[tuple[int, bytes]]) -> None:
        """(time, event as JSON) of each, as one write. Raises OSError, and then none of them is a record."""
        if self._segment is not None and self._segment.size >= self._rotate_bytes:
            self.sync()
            self._close_files()
            self._stem = segment_stem(self.head.size)
        if self._segment is None:
            self._segment = self._open_segment()
        head = self.head.copy()
        data = b"".join([head.line(stamp, event) for stamp, event in events])
        self.unsynced = True
        self._segment.append(data)
        self.head = head

    def _open_segment(self) -> AppendFile:
        """The first checkpoint of a file signs what is before it: so older files can be removed, and it be verified."""
        segment = AppendFile(self.chain / f"{self._stem}.jsonl")
        try:
            if self._checkpoints is None:
                self._checkpoints = AppendFile(self.chain / f"{self._stem}.{CHECKPOINTS}")
            _sync_directory(self.chain)
            if self.head.size:
                self._sign()
        except OSError:
            segment.close()
            raise
        return segment

    def sync(self) -> None:
        """Raises OSError."""
        if self.unsynced and self._segment is not None:
            self._segment.sync()
            self.unsynced = False

    def checkpoint(self) -> None:
        """Sign what there is, if there is anything new. Raises OSError.

        The records are on the disk before: a checkpoint that survives a power failure alone would look like a log that
        was cut.
        """
        if self.head.size > self.signed_size:
            self.sync()
            self._sign()

    def _sign(self) -> None:
        if self._checkpoints is None:
            return
        tree = self.head.tree
        checkpoint = Checkpoint(
            origin=f"{self._key.public.name}/{self.chain.name}",
            size=tree.size,
            root=tree.root(),
            time=time.time_ns(),
            head=self.head.leaf,
            frontier=tuple(tree.hashes),
            file=self._stem,
        )
        note = self._key.sign(checkpoint)
        self._checkpoints.append(note)
        self._checkpoints.sync()
        self.signed_size = tree.size
        self._write_copy(note)

    def _write_copy(self, note: bytes) -> None:
        """Checkpoints may be missing in the copy, for each stands for all before it: a failure ends with the next."""
        if self._copy_to is None:
            return
        try:
            if self._copy is None:
                self._copy_to.mkdir(parents=True, exist_ok=True)
                self._copy = AppendFile(self._copy_to / f"{self._stem}.{CHECKPOINTS}")
            self._copy.append(note)
            self._copy.sync()
            self.copy_error = None
        except OSError as error:
            self.copy_error = f"{self._copy_to}: {error.strerror}"

    def _close_files(self) -> None:
        for file in (self._segment, self._checkpoints, self._copy):
            if file is not None:
                file.close()
        self._segment = self._checkpoints = self._copy = None

    def close(self) -> None:
        self._close_files()
        os.close(self._lock)


def _missing(where: Path, first: int, size: int) -> DamagedChain:
    return DamagedChain(f"{where}: records {first} to {size - 1} are missing, which a checkpoint has signed")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(
    directory: Path, key: SigningKey, *, rotate_bytes: int, copy_to: Path | None
) -> tuple[ChainWriter, list[str]]:
    """A chain of this key's that no process writes to, else a new one; and what is wrong with those passed over.

    Raises OSError.
    """
    damaged: list[str] = []
    for chain in chains(directory):
        if _is_of_another(chain, key):
            continue
        lock = _wait_for_lock(chain)
        if lock is None:
            continue
        try:
            return ChainWriter(chain, lock, key, rotate_bytes=rotate_bytes, copy_to=copy_to), damaged
        except DamagedChain as error:
            damaged.append(f"{chain.name} is damaged: {error}")
        except OSError as error:
            damaged.append(f"{chain.name} cannot be read: {error}")
        os.close(lock)
    chain = directory / f"chain-{os.urandom(4).hex()}"
    chain.mkdir()
    lock = try_lock(chain)
    if lock is None:
        raise BlockingIOError(f"{chain}: another process took this new chain")
    return ChainWriter(chain, lock, key, rotate_bytes=rotate_bytes, copy_to=copy_to), damaged


def _wait_for_lock(chain: Path) -> int | None:
    """A writer keeps it for good; a verifier that asks whether there is one, for a moment."""
    for _ in range(5):
        lock = try_lock(chain)
        if lock is not None:
            return lock
        time.sleep(0.01)
    return None


def _is_of_another(chain: Path, key: SigningKey) -> bool:
    """Whether another key signed it: after a change of keys the old one's chains are finished."""
    for path in checkpoint_files(chain)[:1]:
        with path.open("rb") as file:
            name, _, signed_chain = file.readline().decode(errors="replace").strip().rpartition("/")
        ours = name == key.public.name
        return not ours and signed_chain == chain.name and re.fullmatch(r"shoal\.audit/[0-9a-f]{8}", name) is not None
    return False
