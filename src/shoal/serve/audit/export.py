"""Records of all chains of a directory, in the order of their times, between two moments."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from shoal.serve.audit.chain import chains, read_lines, segments
from shoal.serve.audit.note import AuditError
from shoal.serve.audit.ocsf import to_ocsf

ExportFormat = Literal["jsonl", "ocsf"]


class _When(msgspec.Struct):
    time: int


_decode_time = msgspec.json.Decoder(_When).decode
_encode = msgspec.json.Encoder().encode


def export_lines(directory: Path, *, since: int | None, until: int | None, form: ExportFormat) -> Iterator[bytes]:
    """JSON lines without newlines; `since` and `until` are Unix nanoseconds, the latter no more included.

    jsonl is the records as they lie in the files, with the name of their chain. Raises AuditError: a line that is no
    record ends an export, for what follows may not be genuine.
    """
    found = chains(directory)
    if not found:
        raise AuditError(f"{directory}: there is no audit log here: no directory named chain-*")
    for when, chain, line in heapq.merge(*(_records(path) for path in found)):
        if (since is None or when >= since) and (until is None or when < until):
            yield _encode(to_ocsf(chain, line)) if form == "ocsf" else b'{"chain":"%s",%s' % (chain.encode(), line[1:])


def _records(chain: Path) -> Iterator[tuple[int, str, bytes]]:
    for path in segments(chain):
        with path.open("rb") as file:
            for number, (line, whole) in enumerate(read_lines(file), start=1):
                if not whole:  # being written, or cut by a crash: `verify` tells which
                    continue
                try:
                    when = _decode_time(line).time
                except ValueError:
                    raise AuditError(
                        f"{path}: line {number} is no record: see `shoal audit verify {chain.parent}`"
                    ) from None
                yield when, chain.name, line
