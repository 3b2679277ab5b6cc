"""Request traces, as a workload to plan for: lengths, and the rate of the busiest minute.

Known by their columns: Azure's (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's JSON lines (timestamp in ms,
input_length, output_length), and any CSV with a column for each length and, maybe, one of arrival times in seconds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

_TIMES = ("timestamp", "arrival_time_s", "arrived_at", "arrival_time", "arrival", "time_s", "time")
_INPUTS = (
    "contexttokens",
    "input_length",
    "input_toks",
    "num_prefill_tokens",
    "input_tokens",
    "prompt_tokens",
    "input",
)
_OUTPUTS = (
    "generatedtokens",
    "output_length",
    "output_toks",
    "num_decode_tokens",
    "output_tokens",
    "completion_tokens",
    "output",
)
_MILLISECONDS = ("timestamp",)
"""Columns of JSON lines that count so; those of CSV files are dates or seconds."""
LONGEST_PAUSE = 0.25
"""Of the whole trace: a longer one is a hole in the recording, and a rate over it would be too low. The longest in
Azure's and Mooncake's is 6%."""
LEAST_PAUSE = 60.0
WINDOW = 60.0
"""Seconds over which the busiest rate is counted."""


class TraceError(ValueError):
    """The trace cannot be planned for. The message names the file and the line."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    lengths: tuple[tuple[int, int], ...]
    """Of each request: tokens in, tokens out."""
    arrivals: tuple[float, ...] = ()
    """Seconds since the first; empty where the file has no times."""

    @property
    def mean_rate(self) -> float | None:
        """Requests a second, over the whole trace."""
        span = self.arrivals[-1] if self.arrivals else 0.0
        return (len(self.arrivals) - 1) / span if span > 0 else None

    @property
    def busiest_rate(self) -> float | None:
        """In the busiest minute, or over the whole if that is shorter."""
        if not self.arrivals or self.arrivals[-1] <= WINDOW:
            return self.mean_rate
        most, first = 0, 0
        for number, arrival in enumerate(self.arrivals):
            while arrival - self.arrivals[first] > WINDOW:
                first += 1
            most = max(most, number - first + 1)
        return most / WINDOW


def read_trace(path: Path) -> Trace:
    """Raises TraceError, or OSError."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = _json_lines(path, file) if path.suffix in (".jsonl", ".json") else _csv_lines(path, file)
        lengths: list[tuple[int, int]] = []
        times: list[tuple[int, float]] = []
        for line, arrival, tokens_in, tokens_out in rows:
            lengths.append((tokens_in, tokens_out))
            if arrival is not None:
                times.append((line, arrival))
    if not lengths:
        raise TraceError(f"{path}: it has no requests")
    _check_times(path, times)
    start = times[0][1] if times else 0.0
    return Trace(name=path.name, lengths=tuple(lengths), arrivals=tuple(time - start for _, time in times))


Row = tuple[int, float | None, int, int]


def _json_lines(path: Path, file: Iterable[str]) -> Iterator[Row]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            fields = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}, line {line}: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise TraceError(f"{path}, line {line}: not an object with a timestamp and lengths")
        names = _columns(path, line, fields)
        yield line, *_values(path, line, fields, names, scale=1e-3 if names[0] in _MILLISECONDS else 1.0)


def _csv_lines(path: Path, file: Iterable[str]) -> Iterator[Row]:
    reader = csv.DictReader(file)
    if reader.fieldnames is None:
        raise TraceError(f"{path}: it is empty")
    names = _columns(path, 1, dict.fromkeys(reader.fieldnames))
    for fields in reader:
        yield reader.line_num, *_values(path, reader.line_num, fields, names, scale=1.0)


def _columns(path: Path, line: int, fields: Mapping[str, Any]) -> tuple[str, str, str]:
    """The names that this file has for arrival ("" if it has none), input and output."""
    known = {name.strip().lower(): name for name in fields if name}
    found = [next((known[name] for name in names if name in known), "") for names in (_TIMES, _INPUTS, _OUTPUTS)]
    for what, names, name in (("input", _INPUTS, found[1]), ("output", _OUTPUTS, found[2])):
        if not name:
            there = ", ".join(fields) or "none"
            raise TraceError(
                f"{path}, line {line}: no column of {what} tokens among {there}; name one of them {', '.join(names)}"
            )
    return found[0], found[1], found[2]


def _values(
    path: Path, line: int, fields: Mapping[str, Any], names: tuple[str, str, str], scale: float
) -> tuple[float | None, int, int]:
    arrival = None if not names[0] else _time(path, line, names[0], fields.get(names[0]), scale)
    tokens = [_tokens(path, line, name, fields.get(name)) for name in names[1:]]
    return arrival, tokens[0], tokens[1]


def _time(path: Path, line: int, name: str, value: Any, scale: float) -> float:
    if value is None or value == "":
        raise TraceError(f"{path}, line {line}: {name} is missing")
    try:
        time = float(value) * scale
    except ValueError:
        try:  # Azure's dates have seven digits of a second, of which datetime takes six
            time = datetime.fromisoformat(str(value)[:26]).timestamp()
        except ValueError:
            raise TraceError(f"{path}, line {line}: {name} is {value!r}, neither seconds nor a date") from None
    if not math.isfinite(time) or time < 0:
        raise TraceError(f"{path}, line {line}: {name} is {value}: a time cannot be negative")
    return time


def _tokens(path: Path, line: int, name: str, value: Any) -> int:
    if value is None or value == "":
        raise TraceError(f"{path}, line {line}: {name} is missing")
    try:
        tokens = int(float(value))
    except (ValueError, OverflowError):
        raise TraceError(f"{path}, line {line}: {name} is {value!r}, not a number of tokens") from None
    if tokens < 0:
        raise TraceError(f"{path}, line {line}: {name} is {value}: there are no negative tokens")
    return tokens


def _check_times(path: Path, times: list[tuple[int, float]]) -> None:
    span = times[-1][1] - times[0][1] if times else 0.0
    for (before, earlier), (line, later) in zip(times, times[1:], strict=False):
        if later < earlier:
            raise TraceError(
                f"{path}, line {line}: it arrives {earlier - later:g} s before line {before}; sort the trace by time"
            )
        if later - earlier > max(LEAST_PAUSE, LONGEST_PAUSE * span):
            raise TraceError(
                f"{path}, line {line}: a gap: nothing arrives for {later - earlier:,.0f} of {span:,.0f} s;"
                f" cut the trace there"
            )
