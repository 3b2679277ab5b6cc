"""Whether a log is what its writers left: finds the first record that was changed, removed, moved or put in.

Four things are held against each other, none of which an editor without the signing key can make fit: the records'
numbers, each record's link to the one before, the signed checkpoints (root and head at their sizes), and what is kept
elsewhere: a copy of the checkpoints, or a size and root that someone noted.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from shoal.serve.audit.chain import (
    Head,
    Link,
    chains,
    checkpoint_files,
    decode_link,
    decode_record,
    first_seq,
    has_writer,
    public_keys,
    read_lines,
    segments,
)
from shoal.serve.audit.events import AuditGap, LogStarted
from shoal.serve.audit.merkle import Frontier, leaf_hash
from shoal.serve.audit.note import AuditError, Checkpoint, PublicKey, read_file

_STARTED = b'"event":{"kind":"log_started"'
_STOPPED = b'"event":{"kind":"log_stopped"'
_GAP = b'"event":{"kind":"audit_gap"'


class Expectation(msgspec.Struct, frozen=True):
    """What was noted of a log at an earlier time."""

    size: int
    root: bytes

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Raises ValueError."""
        size, separator, root = text.partition(":")
        try:
            decoded = bytes.fromhex(root) if len(root) == 64 else base64.b64decode(root, validate=True)
        except (ValueError, binascii.Error):
            decoded = b""
        if not separator or not size.isdigit() or len(decoded) != 32:
            raise ValueError(f"{text!r} is not SIZE:ROOT, as `shoal audit verify` prints it")
        return cls(int(size), decoded)

    def __str__(self) -> str:
        return f"{self.size}:{base64.b64encode(self.root).decode()}"


class ChainReport(msgspec.Struct, kw_only=True):
    chain: str
    ok: bool = True
    problem: str | None = None
    record: int | None = None
    """The first bad one."""
    file: str | None = None
    records: int = 0
    """Found good, counted from the chain's first."""
    first: int = 0
    """The oldest that is still there, where older ones were removed on purpose."""
    checkpoints: int = 0
    copied: int = 0
    """Checkpoints that the copy had of it."""
    key: str = ""
    unsigned: int = 0
    """At the end, that no checkpoint covers yet: they hang together, but whoever can write could replace them."""
    runs: int = 0
    """Processes that wrote to it."""
    crashes: int = 0
    """Of those, how many did not end in an orderly way; not counting one that may still be writing."""
    gaps: int = 0
    lost: int = 0
    """Events that the log itself says it has lost."""
    live: bool = False
    expect: str = ""
    """SIZE:ROOT of its end: note it elsewhere, and give it to a later verification."""


class Report(msgspec.Struct, kw_only=True):
    ok: bool
    chains: list[ChainReport]
    problems: list[str]
    """Those of the directory as a whole."""


class _Bad(Exception):
    def __init__(self, problem: str, record: int | None = None, file: Path | None = None) -> None:
        super().__init__(problem)
        self.record = record
        self.file = file


class _Chain:
    """One chain, read once from its first record to its last."""

    def __init__(self, path: Path, keys: dict[str, PublicKey], copies: Sequence[Checkpoint]) -> None:
        self.path = path
        self.report = ChainReport(chain=path.name, live=has_writer(path), copied=len(copies))
        self.started: list[LogStarted] = []
        self.expected: list[Expectation] = []
        self._keys = keys
        self._copies = copies
        self._signed: dict[int, Checkpoint] = {}
        self._opened: dict[str, int] = {}
        """By file, the size at the first checkpoint in it, which was signed before its first record was written."""
        self._good_size = 0
        """Of the last checkpoint that fits."""
        self._stopped: bool | None = None
        """Whether the last process so far has ended in order; None before the first."""

    def verify(self, expected: Sequence[Expectation], retained_from: int) -> ChainReport:
        self.expected = [each for each in expected if each.size]
        report = self.report
        try:
            self._read_checkpoints()  # before the records: a writer that lives may add both
            head = self._start(retained_from)
            report.first = head.size
            self._read_records(head)
            self._judge_end(head)
        except _Bad as bad:
            report.ok, report.problem, report.record = False, str(bad), bad.record
            report.file = None if bad.file is None else bad.file.name
        return report

    # --- what was signed --------------------------------------------------------------------------------------------

    def _read_checkpoints(self) -> None:
        files, size = checkpoint_files(self.path), 0
        for path in files:
            notes = read_file(path, self._keys)
            if notes.checkpoints:
                self._opened[path.stem] = notes.checkpoints[0].size
            for checkpoint in notes.checkpoints:
                if checkpoint.size < size:
                    raise _Bad(f"checkpoints are out of order: {checkpoint.size} records after {size}", file=path)
                size = checkpoint.size
                self._take(checkpoint, path)
            if notes.problem is not None and not (notes.torn and self.report.live and path == files[-1]):
                raise _Bad(notes.problem, file=path)
        for checkpoint in self._copies:
            self._take(checkpoint, self.path)
        self.report.checkpoints = len(self._signed)
        if not self._signed and not self.report.live:
            raise _Bad("there is no signed checkpoint", file=self.path)

    def _take(self, checkpoint: Checkpoint, path: Path) -> None:
        known = self._signed.setdefault(checkpoint.size, checkpoint)
        if (known.root, known.head) != (checkpoint.root, checkpoint.head):
            raise _Bad(f"two checkpoints over {checkpoint.size} records do not agree", file=path)
        self.report.key = checkpoint.origin.rpartition("/")[0]

    def _start(self, retained_from: int) -> Head:
        """The first record, or the checkpoint before the first one that was kept."""
        files = [path for path in segments(self.path) if path.stat().st_size]
        first = first_seq(files[0]) if files else 0
        if not first:
            return Head()
        if first > retained_from:
            raise _Bad(
                f"records 0 to {first - 1} are missing (if they were removed on purpose: --retained-from {first})",
                record=0,
            )
        checkpoint = self._signed.get(first)
        if checkpoint is None:
            raise _Bad(f"no checkpoint was signed just before record {first}, where the files begin", record=first)
        for expected in self.expected:
            if expected.size < first or (expected.size == first and expected.root != checkpoint.root):
                raise _Bad(f"{expected} cannot be confirmed: the records begin at {first}", record=first)
        self._good_size = first
        return Head(Frontier(first, checkpoint.frontier), checkpoint.head)

    # --- what is there ----------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[tuple[Path, bytes]]:
        """Lines of all files in order; an incomplete one only at the end of a chain that is being written."""
        files = segments(self.path)
        for path in files:
            if first_seq(path) is None:
                raise _Bad(f"{path.name} is no file of an audit log", file=path)
            with path.open("rb") as file:
                for line, whole in read_lines(file):
                    if whole:
                        yield path, line
                    elif not (self.report.live and path == files[-1]):
                        raise _Bad(
                            f"record {self.report.records} is incomplete: cut by a crash, which the next start says in "
                            "the log, or by someone",
                            record=self.report.records,
                            file=path,
                        )

    def _read_records(self, head: Head) -> None:
        self.report.records = head.size
        before: tuple[Path, bytes] | None = None
        lines = self._lines()
        for path, line in lines:
            seq = head.size
            link = self._link(path, line, seq)
            if link.prev != head.leaf.hex():
                raise self._broken_link(path, line, seq, before, next(lines, None))
            self._check_file(path, seq, line, new=before is None or path != before[0])
            self._check_alone(head, line, path)
            head.append(line)
            self._check_signed(head, path)
            self.report.records = head.size
            self._note_event(line)
            before = (path, line)

    def _link(self, path: Path, line: bytes, seq: int) -> Link:
        try:
            link = decode_link(line)
        except ValueError:
            raise _Bad(f"record {seq} was changed: it is no record", record=seq, file=path) from None
        if link.seq > seq:
            many = f"records {seq} to {link.seq - 1} are" if link.seq - 1 > seq else f"record {seq} is"
            raise _Bad(f"{many} missing, or moved", record=seq, file=path)
        if link.seq < seq:
            raise _Bad(f"record {seq} was put in or moved: it says it is record {link.seq}", record=seq, file=path)
        return link

    def _broken_link(
        self, path: Path, line: bytes, seq: int, before: tuple[Path, bytes] | None, after: tuple[Path, bytes] | None
    ) -> _Bad:
        """Either record `seq` or the one before was changed: not this one, if what comes later vouches for it."""
        leaf, vouched = leaf_hash(line), False
        if after is not None:
            try:
                vouched = decode_link(after[1]).prev == leaf.hex()
            except ValueError:
                vouched = False
        signed = self._signed.get(seq + 1)
        if before is None or not (vouched or (signed is not None and signed.head == leaf)):
            return _Bad(f"record {seq} was changed: it does not follow from the one before", record=seq, file=path)
        return _Bad(f"record {seq - 1} was changed: record {seq} does not follow from it", seq - 1, before[0])

    def _check_file(self, path: Path, seq: int, line: bytes, *, new: bool) -> None:
        """Without the key no file can be begun, and none be gone on with that a process has ended in order."""
        if not new:
            if self._stopped or _STARTED in line:
                raise _Bad(f"record {seq} was put in: it follows the end of a process in its file", seq, path)
        elif first_seq(path) != seq:
            raise _Bad(f"{path.name} begins with record {seq}: records were moved between files", seq, path)
        elif self._stopped and _STARTED not in line:
            raise _Bad(f"record {seq} was changed: a process must have begun here", seq, path)
        elif seq and self._opened.get(path.stem) != seq:
            raise _Bad(f"record {seq} was put in: no checkpoint was signed when {path.name} was begun", seq, path)

    def _check_alone(self, head: Head, line: bytes, path: Path) -> None:
        """Where the last record under a checkpoint is changed and those before are not, it can be named alone."""
        signed = self._signed.get(head.size + 1)
        if signed is not None and signed.head != leaf_hash(line):
            tree = head.tree.copy()
            tree.append(signed.head)
            if tree.root() == signed.root:
                raise _Bad(f"record {head.size} was changed: it is not the one that was signed", head.size, path)

    def _check_signed(self, head: Head, path: Path) -> None:
        signed = self._signed.get(head.size)
        if signed is not None:
            if (signed.root, signed.head) != (head.tree.root(), head.leaf):
                raise self._replaced(head.size, "are not those that were signed", path)
            self._good_size = head.size
        for expected in self.expected:
            if expected.size == head.size and expected.root != head.tree.root():
                raise self._replaced(head.size, f"are not those of {expected}", path)

    def _replaced(self, size: int, what: str, path: Path) -> _Bad:
        first = self._good_size
        records = f"records {first} to {size - 1}" if size - 1 > first else f"record {first}"
        return _Bad(f"{records} {what}", record=first, file=path)

    def _note_event(self, line: bytes) -> None:
        """Of the log itself, and by the bytes of its kind: a later version may know more kinds and more fields."""
        if _STARTED in line:
            self.report.runs += 1
            self.report.crashes += self._stopped is False
            self._stopped = False
        elif _STOPPED in line:
            self._stopped = True
        elif _GAP not in line:
            return
        try:
            event = decode_record(line).event
        except ValueError:
            return
        if isinstance(event, AuditGap):
            self.report.gaps += 1
            self.report.lost += event.lost
        elif isinstance(event, LogStarted):
            self.started.append(event)

    def _judge_end(self, head: Head) -> None:
        newest = max([*self._signed, *(each.size for each in self.expected)], default=0)
        if head.size < newest:
            count = f"records {head.size} to {newest - 1} are" if newest - 1 > head.size else f"record {head.size} is"
            raise _Bad(f"{count} missing: the log was cut off at its end", record=head.size)
        self.report.unsigned = head.size - self._good_size
        self.report.expect = str(Expectation(head.size, head.tree.root()))
        if not self.report.live:
            if self._stopped and self.report.unsigned:
                raise _Bad("the checkpoint of the orderly end is missing", file=self.path)
            self.report.crashes += self._stopped is False


def verify_directory(
    directory: Path,
    *,
    keys: Sequence[PublicKey] = (),
    copy: Path | None = None,
    expected: Sequence[tuple[str | None, Expectation]] = (),
    retained_from: int = 0,
) -> Report:
    """Every chain. Without `keys` those in the copy are trusted, or else those in the directory.

    Raises AuditError, OSError.
    """
    found = chains(directory)
    names = [path.name for path in found]
    if not found and copy is None:
        raise AuditError(f"{directory}: there is no audit log here: no directory named chain-*")
    if copy is not None and copy.resolve() == directory.resolve():
        raise AuditError(f"--copy {copy} is the log itself: give the directory that checkpoints were copied to")
    trusted = {key.name: key for key in keys} or (_keys_of(copy) if copy else {}) or _keys_of(directory)
    if not trusted:
        raise AuditError(f"{directory}: there is no public key (*.pub) here: give one with --public-key")
    copies = {} if copy is None else _copies(copy, trusted, names)
    if len(found) > 1 and any(name is None for name, _ in expected):
        raise AuditError(f"--expect must say which chain it is of, as {names[0]}:SIZE:ROOT: there are {len(found)}")
    problems = [f"{name} is missing: the copy has checkpoints of it" for name in copies if name not in names]
    problems += [f"{name} is missing: it was expected" for name, _ in expected if name and name not in names]
    verified = []
    for path in found:
        chain = _Chain(path, trusted, copies.get(path.name, []))
        chain.verify([each for name, each in expected if name in (None, path.name)], retained_from)
        verified.append(chain)
    problems += _missed_by_others(verified)
    reports = [chain.report for chain in verified]
    return Report(ok=not problems and all(report.ok for report in reports), chains=reports, problems=problems)


def _missed_by_others(verified: Sequence[_Chain]) -> list[str]:
    """Chains that were there, or longer, when another one began."""
    sizes = {chain.path.name: chain.report for chain in verified}
    problems = []
    for chain in verified:
        for started in chain.started:
            for name, size in started.chains.items():
                report = sizes.get(name)
                if report is None:
                    problems.append(f"{name} is missing: {chain.path.name} says that it had {size} records")
                elif report.ok and report.records < size:
                    problems.append(f"{name} was cut off: {chain.path.name} says that it had {size} records")
    return list(dict.fromkeys(problems))


def _keys_of(directory: Path) -> dict[str, PublicKey]:
    try:
        return public_keys(directory)
    except ValueError as error:
        raise AuditError(f"{directory}: a public key there is not one: {error}") from None


def _copies(copy: Path, keys: dict[str, PublicKey], names: Sequence[str]) -> dict[str, list[Checkpoint]]:
    """Checkpoints of the copy by chain, without those of other logs, which other keys signed. Raises AuditError."""
    found: dict[str, list[Checkpoint]] = {}
    for path in [file for chain in chains(copy) for file in checkpoint_files(chain)]:
        name = path.parent.name
        notes = read_file(path, keys)
        if name in names and notes.problem is not None and not notes.torn:
            raise AuditError(f"{path}: {notes.problem}")
        if name in names or notes.checkpoints:
            found.setdefault(name, []).extend(notes.checkpoints)
    if not found:
        raise AuditError(f"{copy}: there is no copy of this log's checkpoints here (chain-*/*.checkpoints)")
    return found
