"""One record with the proof that it is in a log, for someone who is to see no other record.

    c2sp.org/tlog-proof@v1
    extra eyJzZXEiOjEyLC...              the record's line, base64
    index 12                             its number
    k2vA...=                             hashes beside the way to the root, from the leaf upwards
                                         (an empty line)
    shoal.audit/1f3a9c2e/chain-5b0d2c11  a checkpoint over it
    ...

Whoever has the public key can check it, without the log.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal.serve.audit.chain import checkpoint_files, first_seq, read_lines, segments
from shoal.serve.audit.merkle import inclusion_proof, leaf_hash, root_of, verify_inclusion
from shoal.serve.audit.note import AuditError, Checkpoint, PublicKey, read_file, read_notes

_HEADER = "c2sp.org/tlog-proof@v1"


class Proven(msgspec.Struct, frozen=True):
    chain: str
    seq: int
    record: bytes
    """Its line."""
    checkpoint: Checkpoint


def prove(chain: Path, seq: int, keys: dict[str, PublicKey]) -> str:
    """Raises AuditError, OSError."""
    checkpoint, note = _covering(chain, seq, keys)
    files = [path for path in segments(chain) if path.stat().st_size]
    if not files or first_seq(files[0]) != 0:
        raise AuditError(f"{chain}: its first records were removed: nothing can be proven any more, only verified")
    lines: list[bytes] = []
    for path in files:
        with path.open("rb") as file:
            lines += [line for line, _ in read_lines(file)][: checkpoint.size - len(lines)]
        if len(lines) == checkpoint.size:
            break
    leaves = [leaf_hash(line) for line in lines]
    if root_of(leaves) != checkpoint.root:
        raise AuditError(f"{chain}: is not genuine: see `shoal audit verify {chain.parent}`")
    return f"{_head(lines[seq], seq, inclusion_proof(leaves, seq))}\n\n{note.decode()}"


def _head(record: bytes, seq: int, steps: Sequence[bytes]) -> str:
    hashes = [base64.b64encode(step).decode() for step in steps]
    return "\n".join([_HEADER, f"extra {base64.b64encode(record).decode()}", f"index {seq}", *hashes])


def _covering(chain: Path, seq: int, keys: dict[str, PublicKey]) -> tuple[Checkpoint, bytes]:
    """The first checkpoint over a record."""
    for path in checkpoint_files(chain):
        notes = read_file(path, keys)
        for checkpoint, text in zip(notes.checkpoints, notes.texts, strict=True):
            if checkpoint.size > seq:
                return checkpoint, text
    raise AuditError(f"{chain}: no checkpoint covers record {seq}")


def check(text: str, keys: Sequence[PublicKey]) -> Proven:
    """Raises AuditError."""
    head, _, note = text.partition("\n\n")
    not_one = AuditError("this is not a proof as `shoal audit prove` makes it")
    try:
        _, extra, index, *hashes = head.split("\n")
        record = base64.b64decode(extra.removeprefix("extra "), validate=True)
        seq = int(index.removeprefix("index "))
        steps = [base64.b64decode(step, validate=True) for step in hashes]
    except ValueError:
        raise not_one from None
    if _head(record, seq, steps) != head:  # base64 and numbers can be spelled in several ways
        raise not_one
    notes = read_notes(note.encode(), {key.name: key for key in keys})
    if notes.problem is not None or len(notes.checkpoints) != 1:
        raise AuditError(f"not proven: {notes.problem or 'it must have one checkpoint'}")
    (checkpoint,) = notes.checkpoints
    if not verify_inclusion(leaf_hash(record), seq, checkpoint.size, steps, checkpoint.root):
        raise AuditError("not proven: the record is not the one that was signed")
    return Proven(checkpoint.chain, seq, record, checkpoint)
