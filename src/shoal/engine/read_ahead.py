"""Bytes of files in an order that is known beforehand, read by threads ahead of the one who makes something of them.

Reads go into one buffer of a fixed size, as into a ring: a group of extents is read as soon as those before it have
left room, and its bytes stay until the next group is taken. So a model is loaded with one copy of it in memory and the
ring, whose pages are touched for the first time only once. Reading leaves the files in the page cache, where other
ranks and the next start find them. The interpreter's lock is not held while the system reads.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError

RING_BYTES = 64 << 20
"""Read and not yet used, at most. A group of extents that is larger than this makes the ring as large as itself."""
PIECE_BYTES = 4 << 20
"""What one thread reads at a time: several fit the ring, and each is long beside what asking for it costs."""
THREADS = 4
"""A disk that serves several requests at once is faster for it; more threads would only take cores from the rest."""
_ALIGNMENT = 64


class Extent(NamedTuple):
    """Bytes of an open file."""

    path: Path
    """For messages."""
    descriptor: int
    offset: int
    length: int


class ReadFigures(msgspec.Struct, frozen=True):
    bytes_read: int
    waited_seconds: float
    """Whoever takes the groups waited for bytes."""
    reading_seconds: float
    """At least one thread was reading."""


def read_extent(extent: Extent) -> Tensor:
    """Its bytes as uint8. Raises CheckpointError."""
    data = torch.empty(extent.length, dtype=torch.uint8)
    _read_into(data.numpy().data, extent, 0)
    return data


def _read_into(target: memoryview, extent: Extent, start: int) -> None:
    """Fill `target` with what is `start` bytes into the extent."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(extent.descriptor, [target[done:]], extent.offset + start + done)
        except OSError as error:
            raise CheckpointError(extent.path, f"cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(extent.path, "is truncated: it ends before its last tensor, and did not when opened")
        done += count


class Ring:
    """Places in [0, size), given in order and given back in the same order, each in one piece."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._live: deque[tuple[int, int]] = deque()
        """(start, end), oldest first."""

    def place(self, length: int) -> int | None:
        """Where `length` bytes are free now; None if nowhere."""
        start = self._free_start(length)
        if start is not None:
            self._live.append((start, start + length))
        return start

    def _free_start(self, length: int) -> int | None:
        if not self._live:
            return 0 if length <= self.size else None
        oldest, newest = self._live[0][0], self._live[-1][1]
        if newest <= oldest:  # those in use begin near the end and go on at the beginning: free is between them
            return newest if newest + length <= oldest else None
        if newest + length <= self.size:
            return newest
        return 0 if length <= oldest else None

    def give_back_oldest(self) -> None:
        self._live.popleft()


class _Group:
    """Extents that are taken together, so that they must all be in the ring at once."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.extents = extents
        self.starts: list[int] = []
        """Of each extent, in the group's place."""
        self.size = 0
        for extent in extents:
            self.starts.append(self.size)
            self.size += -(-extent.length // _ALIGNMENT) * _ALIGNMENT
        self.place: int | None = None
        """In the ring; None before there is room, and always where there is nothing to read."""
        self.num_unread = sum(len(_cuts(extent)) for extent in extents)


class _Piece(NamedTuple):
    group: _Group
    number: int
    """Of the extent in its group."""
    start: int
    stop: int


def _cuts(extent: Extent) -> range:
    return range(0, extent.length, PIECE_BYTES)


class ReadAhead:
    """Used as a context: threads read from the first moment, and are gone at its end."""

    def __init__(
        self,
        groups: Sequence[Sequence[Extent]],
        *,
        progress: Callable[[int, int], None] | None = None,
        threads: int = THREADS,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """`progress` is called with the bytes taken so far and all that will be, whenever a group is taken."""
        self._groups = [_Group(extents) for extents in groups]
        self._pieces = [
            _Piece(group, number, start, min(start + PIECE_BYTES, extent.length))
            for group in self._groups
            for number, extent in enumerate(group.extents)
            for start in _cuts(extent)
        ]
        total = sum(group.size for group in self._groups)
        largest = max((group.size for group in self._groups), default=0)
        self._ring = Ring(max(largest, min(ring_bytes, total)))
        self._data = torch.empty(self._ring.size, dtype=torch.uint8)
        self._view = self._data.numpy().data
        self._progress = progress
        self._bytes_total = sum(extent.length for group in self._groups for extent in group.extents)
        self._bytes_taken = 0
        self._waited_seconds = 0.0
        self._reading_seconds = 0.0
        self._num_reading, self._reading_since = 0, 0.0
        self._next_group, self._next_piece = 0, 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        """Guards all of the above but the bytes themselves."""
        self._threads = [
            threading.Thread(target=self._run, name=f"shoal-read-{number}", daemon=True)
            for number in range(min(threads, len(self._pieces)))
        ]

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def figures(self) -> ReadFigures:
        return ReadFigures(self._bytes_taken, self._waited_seconds, self._reading_seconds)

    def take(self) -> list[Tensor]:
        """The next group's bytes as uint8, one tensor an extent. What the last call gave is overwritten from now on.

        Raises CheckpointError, whichever group it is that cannot be read.
        """
        with self._changed:
            if self._next_group and self._groups[self._next_group - 1].place is not None:
                self._ring.give_back_oldest()
                self._changed.notify_all()
            group = self._groups[self._next_group]
            self._next_group += 1
            began = time.monotonic()
            self._changed.wait_for(lambda: self._error is not None or group.num_unread == 0)
            self._waited_seconds += time.monotonic() - began
            if self._error is not None:
                raise self._error
            place = group.place or 0
        self._bytes_taken += sum(extent.length for extent in group.extents)
        if self._progress is not None:
            self._progress(self._bytes_taken, self._bytes_total)
        return [
            self._data[place + start : place + start + extent.length]
            for start, extent in zip(group.starts, group.extents, strict=True)
        ]

    # --- threads ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (piece := self._claim()) is not None:
            error: BaseException | None = None
            try:
                at = (piece.group.place or 0) + piece.group.starts[piece.number]
                target = self._view[at + piece.start : at + piece.stop]
                _read_into(target, piece.group.extents[piece.number], piece.start)
            except BaseException as caught:  # it is the taker's to deal with
                error = caught
            self._finish(piece, error)

    def _claim(self) -> _Piece | None:
        """The next piece, once there is room for its group; None if there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or self._placed(self._pieces[self._next_piece].group))
            if self._is_over():
                return None
            piece = self._pieces[self._next_piece]
            self._next_piece += 1
            if self._num_reading == 0:
                self._reading_since = time.monotonic()
            self._num_reading += 1
            return piece

    def _is_over(self) -> bool:
        return self._closed or self._error is not None or self._next_piece == len(self._pieces)

    def _placed(self, group: _Group) -> bool:
        if group.place is None:
            group.place = self._ring.place(group.size)
        return group.place is not None

    def _finish(self, piece: _Piece, error: BaseException | None) -> None:
        with self._changed:
            self._num_reading -= 1
            if self._num_reading == 0:
                self._reading_seconds += time.monotonic() - self._reading_since
            self._error = self._error or error
            piece.group.num_unread -= 1
            if piece.group.num_unread == 0 or error is not None:
                self._changed.notify_all()
