"""Request traces as text to rows: when each came, how long it was, and which began alike. Told apart by their content.

    Azure LLM inference traces   CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    Mooncake                     JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks
    request logs                 JSONL: arrival_time (s), input_toks, output_toks
    lengths                      CSV: a column for prompts and one for outputs, perhaps one for the time in seconds

Times become seconds since the first request. A line that makes no sense is an error that names it: what is silently
left out of a trace is missing in every figure that comes of it.
"""

from __future__ import annotations

import calendar
import csv
import re
from collections.abc import Iterable, Sequence
from math import ceil, isfinite
from typing import Any

import msgspec

BLOCK_TOKENS = 512
"""That one of Mooncake's hashes stands for."""
_PROMPT = (
    "input_toks",
    "input_tokens",
    "input_length",
    "prompt_tokens",
    "num_prefill_tokens",
    "contexttokens",
    "input",
)
_OUTPUT = (
    "output_toks",
    "output_tokens",
    "output_length",
    "completion_tokens",
    "num_decode_tokens",
    "generatedtokens",
    "output",
)
_TIME = ("timestamp", "arrival_time_s", "arrival_time", "arrived_at", "arrival", "time_s", "time")
_MILLISECONDS = "timestamp"
"""A column of JSON lines that counts so, as Mooncake's does; in CSV it has dates or seconds."""
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(\.\d+)?\s*(?:Z|UTC|([+-])(\d\d):?(\d\d))?", re.IGNORECASE
)
_LONGEST_SHARE = 0.25
_LEAST_PAUSE = 60.0


class TraceError(ValueError):
    """The trace cannot be used. The message names file and line."""


class TraceRow(msgspec.Struct, frozen=True):
    line: int
    at: float | None
    """Seconds since the first request; None where the trace tells no times."""
    num_prompt: int
    """Tokens, at least 1; as `num_output`."""
    num_output: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of `BLOCK_TOKENS` tokens: equal prefixes of them are equal prefixes."""


def read_rows(text: str, name: str, *, longest_pause: float | None = None) -> list[TraceRow]:
    """Rows in order of time; all have one, or none. `name` is the file's, for errors. Raises TraceError.

    `longest_pause`: seconds without a request after which the recording is taken to have a hole, over which a rate
    would be too low; None: a quarter of the trace, at least a minute. The longest in Azure's and Mooncake's is 6%.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise TraceError(f"{name}: is empty")
    rows = _json_rows(name, lines) if first.lstrip().startswith("{") else _csv_rows(name, lines)
    if not rows:
        raise TraceError(f"{name}: has no requests")
    return _from_zero(name, rows, longest_pause)


def _json_rows(name: str, lines: Sequence[str]) -> list[TraceRow]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise TraceError(f"{where}: is not a JSON object: {error}") from None
        prompt, output, time = _columns(where, record)
        at = None if time is None else _time(where, time, record[time])
        if at is not None and time is not None and time.lower() == _MILLISECONDS and not isinstance(record[time], str):
            at /= 1000
        num_prompt, num_output = _length(where, prompt, record[prompt]), _length(where, output, record[output])
        rows.append(TraceRow(number, at, num_prompt, num_output, _blocks(where, record.get("hash_ids"), num_prompt)))
    return rows


def _csv_rows(name: str, lines: Sequence[str]) -> list[TraceRow]:
    reader = csv.reader(lines)
    filled = (cells for cells in reader if any(cell.strip() for cell in cells))
    rows = []
    try:
        header = [cell.strip() for cell in next(filled)]
        prompt, output, time = _columns(f"{name}:{reader.line_num}", header)
        for cells in filled:
            where = f"{name}:{reader.line_num}"
            if len(cells) != len(header):
                raise TraceError(f"{where}: has {len(cells)} cells, the header {len(header)}")
            record = dict(zip(header, cells, strict=True))
            at = None if time is None else _time(where, time, record[time])
            lengths = _length(where, prompt, record[prompt]), _length(where, output, record[output])
            rows.append(TraceRow(reader.line_num, at, *lengths))
    except csv.Error as error:
        raise TraceError(f"{name}:{reader.line_num}: is not CSV: {error}") from None
    return rows


def _columns(where: str, there: Iterable[str]) -> tuple[str, str, str | None]:
    """The names that this file has for prompt, output and time."""
    spelled = {name.lower(): name for name in there}
    found: list[str | None] = []
    for known in (_PROMPT, _OUTPUT, _TIME):
        names = [name for name in known if name in spelled]
        if len(names) > 1:
            raise TraceError(f"{where}: {spelled[names[0]]} and {spelled[names[1]]} may both be meant; leave one")
        found.append(spelled[names[0]] if names else None)
    prompt, output, time = found
    if prompt is None or output is None:
        raise TraceError(
            f"{where}: needs a column for prompt tokens ({', '.join(_PROMPT[:4])}, ...) and one for output tokens "
            f"({', '.join(_OUTPUT[:4])}, ...); there are {', '.join(spelled.values()) or 'none'}"
        )
    return prompt, output, time


def _time(where: str, name: str, value: object) -> float:
    """Seconds: a number, or a date with a time of day, which is UTC unless it says otherwise."""
    number = _number(value)
    if number is None and isinstance(value, str):
        number = _date(value.strip())
    if number is None:
        raise TraceError(f"{where}: {name} {_shown(value)}, neither seconds nor a date and time")
    if number < 0:
        raise TraceError(f"{where}: {name} is {number:g}: a time cannot be negative")
    return number


def _date(text: str) -> float | None:
    """Seconds since 1970; None of what is no date. Azure's fractions have seven digits."""
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    if not 1 <= month <= 12 or year < 1 or not 1 <= day <= calendar.monthrange(year, month)[1]:
        return None
    if hour > 23 or minute > 59 or second > 59:
        return None
    fraction, sign, hours, minutes = found.groups()[6:]
    east = 0 if sign is None else (int(hours) * 3600 + int(minutes) * 60) * (1 if sign == "+" else -1)
    return calendar.timegm((year, month, day, hour, minute, second)) - east + float(fraction or 0)


def _length(where: str, name: str, value: object) -> int:
    number = _number(value)
    if number is None or number != int(number):
        raise TraceError(f"{where}: {name} {_shown(value)}, not a number of tokens")
    if number < 1:
        raise TraceError(f"{where}: {name} is {number:g}; a request has at least one token of each")
    return int(number)


def _number(value: object) -> float | None:
    """None of what is no number, or no finite one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def _shown(value: object) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "is empty"
    return f"is {value!r}"


def _blocks(where: str, hashes: object, num_prompt: int) -> tuple[int, ...]:
    if hashes is None:
        return ()
    if not isinstance(hashes, list) or not all(type(item) is int for item in hashes):
        raise TraceError(f"{where}: hash_ids must be a list of whole numbers")
    wanted = -(-num_prompt // BLOCK_TOKENS)
    if len(hashes) != wanted:
        raise TraceError(
            f"{where}: {num_prompt} tokens are {wanted} blocks of {BLOCK_TOKENS}; hash_ids has {len(hashes)}"
        )
    return tuple(hashes)


def _from_zero(name: str, rows: list[TraceRow], longest_pause: float | None) -> list[TraceRow]:
    times = [row.at for row in rows if row.at is not None]
    if not times:
        return rows
    if len(times) < len(rows):
        line = next(row.line for row in rows if row.at is None)
        raise TraceError(f"{name}:{line}: has no time, and other lines have one")
    span = times[-1] - times[0]
    longest = max(_LEAST_PAUSE, _LONGEST_SHARE * span) if longest_pause is None else longest_pause
    moved, before = [], times[0]
    for row, at in zip(rows, times, strict=True):
        if at < before:
            raise TraceError(f"{name}:{row.line}: time goes back by {before - at:g} s; sort the trace by time")
        if at - before > longest:
            raise TraceError(
                f"{name}:{row.line}: no request for {at - before:,.0f} of {span:,.0f} s before this line: a gap in the "
                f"trace; cut it there, or allow it with --longest-pause {ceil(at - before)}s"
            )
        moved.append(msgspec.structs.replace(row, at=at - times[0]))
        before = at
    return moved
