"""How a chain of records lies on disk; what the writer and the verifier must agree on.

    DIR/
      signing.key                    Ed25519, mode 0600
      1f3a9c2e.pub                   its public half
      chain-5b0d2c11/                one writer at a time, which holds `lock`
        lock
        000000000000-20261121T144539Z-4242.jsonl         first record, when the file was begun, process id
        000000000000-20261121T144539Z-4242.checkpoints
        000000057120-20261122T090000Z-5151.jsonl
        000000057120-20261122T090000Z-5151.checkpoints   the first one signs the 57,120 records before

A record is one line: `seq` counts from 0 through all files of a chain, `prev` is the leaf hash of the record before.
A leaf is the line's bytes without the newline: SHA-256(0x00 || line), which is also its leaf in the Merkle tree. So
there is no second form to be canonical: another spelling of the same JSON is another leaf.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from shoal.serve.audit.events import Event
from shoal.serve.audit.merkle import Frontier, leaf_hash
from shoal.serve.audit.note import PublicKey

CHECKPOINTS = "checkpoints"
NO_RECORD = bytes(32)
"""`prev` of the first record."""
_SEGMENT = re.compile(r"(\d{12})-\d{8}T\d{6}Z-\d+\.jsonl")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seq: int
    time: int
    """Unix nanoseconds when the event happened, not when it was written."""
    prev: str
    event: Event


class Link(msgspec.Struct, frozen=True):
    """A record as far as the chain goes; whatever its event is."""

    seq: int
    prev: str


decode_record = msgspec.json.Decoder(Record).decode
decode_link = msgspec.json.Decoder(Link).decode


class Head:
    """Where a chain ends: what the next record must follow."""

    __slots__ = ("leaf", "tree")

    def __init__(self, tree: Frontier | None = None, leaf: bytes = NO_RECORD) -> None:
        self.tree = Frontier() if tree is None else tree
        self.leaf = leaf
        """Of the last record."""

    @property
    def size(self) -> int:
        return self.tree.size

    def copy(self) -> Head:
        return Head(self.tree.copy(), self.leaf)

    def line(self, stamp: int, event: bytes) -> bytes:
        """The next record with its newline, and the head moves on to it. `event` is JSON."""
        line = b'{"seq":%d,"time":%d,"prev":"%s","event":%s}' % (self.size, stamp, self.leaf.hex().encode(), event)
        self.append(line)
        return line + b"\n"

    def append(self, line: bytes) -> None:
        self.leaf = leaf_hash(line)
        self.tree.append(self.leaf)


def segment_stem(seq: int) -> str:
    return f"{seq:012d}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"


def first_seq(segment: Path) -> int | None:
    """By its name; None where the name is not one that a writer gives."""
    match = _SEGMENT.fullmatch(segment.name)
    return None if match is None else int(match[1])


def segments(chain: Path) -> list[Path]:
    """The files of records, in the chain's order."""
    return sorted(chain.glob("*.jsonl"))


def checkpoint_files(chain: Path) -> list[Path]:
    """In the chain's order: of a chain, or of its copy."""
    return sorted(chain.glob(f"*.{CHECKPOINTS}"))


def chains(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("chain-*") if path.is_dir())


def read_lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """(line without newline, whether it had one). Only the last one of a file can have none."""
    for line in file:
        yield (line[:-1], True) if line.endswith(b"\n") else (line, False)


def public_keys(directory: Path) -> dict[str, PublicKey]:
    """By name, those that the writers of a directory left in it. Raises ValueError, OSError."""
    found = {}
    for path in sorted(directory.glob("*.pub")):
        key = PublicKey.parse(path.read_text(encoding="utf-8"))
        found[key.name] = key
    return found


def try_lock(chain: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the chain's lock until it is closed; None where a writer has it. Raises OSError.

    A shared lock only asks whether a writer lives: it creates nothing; FileNotFoundError where none ever did.
    """
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    descriptor = os.open(chain / "lock", flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def has_writer(chain: Path) -> bool:
    with contextlib.suppress(OSError):
        descriptor = try_lock(chain, shared=True)
        if descriptor is None:
            return True
        os.close(descriptor)
    return False
