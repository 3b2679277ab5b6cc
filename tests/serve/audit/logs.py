"""Logs to test with, and what is in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from shoal.serve.audit.chain import Record, chains, decode_record, segments
from shoal.serve.audit.events import Event, RequestCompleted
from shoal.serve.audit.log import AuditConfig, AuditLog
from shoal.serve.audit.verify import ChainReport, verify_directory


def open_log(directory: Path, **settings: Any) -> AuditLog:
    return AuditLog(AuditConfig(directory=str(directory), **settings))


def completed(number: int, **fields: Any) -> RequestCompleted:
    return RequestCompleted(request_id=f"r{number}", model="m", status=200, tenant="acme", **fields)


def lines_of(directory: Path) -> list[bytes]:
    """Of the only chain, without newlines."""
    (chain,) = chains(directory)
    return [line for path in segments(chain) for line in path.read_bytes().splitlines()]


def records_of(directory: Path) -> list[Record]:
    return [decode_record(line) for line in lines_of(directory)]


def events_of(directory: Path, *kinds: type[Any]) -> list[Event]:
    return [record.event for record in records_of(directory) if isinstance(record.event, kinds)]


def verified(directory: Path) -> ChainReport:
    report = verify_directory(directory)
    assert report.ok, report
    return report.chains[0]


def spawn(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
