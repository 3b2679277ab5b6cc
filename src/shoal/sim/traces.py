"""Traces: when requests came, how long they were, and which began alike. Public formats, told apart by their content.

    Azure LLM inference traces   CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    Mooncake                     JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks
    request logs                 JSONL: arrival_time (s), input_toks, output_toks
    lengths                      CSV: a column for prompts and one for outputs, perhaps one for the time in seconds

Times become seconds since the first request. A line that makes no sense is an error that names it: what is silently
left out of a trace is missing in every figure that comes of it.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from math import isfinite, log, sqrt
from pathlib import Path
from typing import Any

import msgspec

from shoal.sim.requests import Arrival

MOONCAKE_BLOCK = 512
"""Tokens that one of its hashes stands for."""
FIRST_TOKEN = 16
"""Ids below are not used for prompts: what is drawn is one of them."""
LONGEST_PAUSE = 600.0
"""Seconds without a request after which a trace is taken to have a hole."""
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
_TIME = ("timestamp", "arrival_time_s", "arrival_time", "arrived_at", "arrival", "time")


class TraceError(Exception):
    """The trace cannot be used. The message names file and line."""


class Row(msgspec.Struct, frozen=True):
    line: int
    at: float | None
    """Seconds, of any clock; None where the trace tells no times."""
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of `MOONCAKE_BLOCK` tokens: equal prefixes of them are equal prefixes."""


def read(path: Path, *, longest_pause: float = LONGEST_PAUSE) -> list[Row]:
    """Rows in order of time, the first at 0. Raises TraceError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise TraceError(f"{path}: is empty")
    rows = _json_rows(path, lines) if first.lstrip().startswith("{") else _csv_rows(path, lines)
    if not rows:
        raise TraceError(f"{path}: has no requests")
    return _from_zero(path, rows, longest_pause)


def _json_rows(path: Path, lines: list[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line.encode(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}:{number}: is not a JSON object: {error}") from None
        names = {name.lower(): name for name in record}
        prompt, output, time = (_column(path, number, names, known) for known in (_PROMPT, _OUTPUT, _TIME))
        if prompt is None or output is None:
            raise _no_lengths(path, number, list(record))
        hashes = record.get("hash_ids")
        at = None if time is None else _number(path, number, time, record[time])
        if hashes is not None and at is not None:
            at /= 1000
        num_prompt = _length(path, number, prompt, record[prompt])
        num_output = _length(path, number, output, record[output])
        blocks = () if hashes is None else _hashes(path, number, hashes, num_prompt)
        rows.append(Row(number, at, num_prompt, num_output, blocks))
    return rows


def _hashes(path: Path, line: int, hashes: object, num_prompt: int) -> tuple[int, ...]:
    if not isinstance(hashes, list) or not all(isinstance(item, int) and item >= 0 for item in hashes):
        raise TraceError(f"{path}:{line}: hash_ids must be a list of numbers, none below 0")
    wanted = -(-num_prompt // MOONCAKE_BLOCK)
    if len(hashes) != wanted:
        raise TraceError(
            f"{path}:{line}: {num_prompt} tokens are {wanted} blocks of {MOONCAKE_BLOCK}; hash_ids has {len(hashes)}"
        )
    return tuple(hashes)


def _csv_rows(path: Path, lines: list[str]) -> list[Row]:
    reader = csv.reader(lines)
    header = next(reader)
    names = {name.strip().lower(): str(index) for index, name in enumerate(header)}
    found = [_column(path, 1, names, known) for known in (_PROMPT, _OUTPUT, _TIME)]
    if found[0] is None or found[1] is None:
        raise _no_lengths(path, 1, header)
    prompt, output = int(found[0]), int(found[1])
    time = None if found[2] is None else int(found[2])
    rows = []
    for cells in reader:
        line = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise TraceError(f"{path}:{line}: has {len(cells)} cells, the header {len(header)}")
        rows.append(
            Row(
                line,
                None if time is None else _time(path, line, header[time], cells[time]),
                _length(path, line, header[prompt], cells[prompt]),
                _length(path, line, header[output], cells[output]),
            )
        )
    return rows


def _column(path: Path, line: int, names: dict[str, str], known: Sequence[str]) -> str | None:
    found = [name for name in known if name in names]
    if len(found) > 1:
        raise TraceError(f"{path}:{line}: {found[0]} and {found[1]} may both be meant; leave one")
    return names[found[0]] if found else None


def _no_lengths(path: Path, line: int, header: list[str]) -> TraceError:
    return TraceError(
        f"{path}:{line}: needs a column for prompt tokens ({', '.join(_PROMPT[:4])}, ...) and one for output tokens "
        f"({', '.join(_OUTPUT[:4])}, ...); there are {', '.join(header) or 'none'}"
    )


def _time(path: Path, line: int, name: str, cell: str) -> float:
    """Seconds: a number, or a date with a time of day."""
    try:
        return _number(path, line, name, float(cell))
    except ValueError:
        pass
    try:
        # Fractions have seven digits in Azure's traces, and six are what Python reads.
        whole, _, fraction = cell.strip().partition(".")
        return datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}+00:00").timestamp()
    except ValueError:
        what = "is empty" if not cell.strip() else f"is {cell.strip()!r}, neither seconds nor a date and time"
        raise TraceError(f"{path}:{line}: {name} {what}") from None


def _number(path: Path, line: int, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise TraceError(f"{path}:{line}: {name} is {value!r}, not a number of seconds")
    if value < 0:
        raise TraceError(f"{path}:{line}: {name} is {value:g}: a time cannot be negative")
    return float(value)


def _length(path: Path, line: int, name: str, value: object) -> int:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(value, str) and not value.strip():
        raise TraceError(f"{path}:{line}: {name} is empty")
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
        raise TraceError(f"{path}:{line}: {name} is {value!r}, not a number of tokens")
    if number < 1:
        raise TraceError(f"{path}:{line}: {name} is {number:g}; a request has at least one token of each")
    return int(number)


def _from_zero(path: Path, rows: list[Row], longest_pause: float) -> list[Row]:
    timed = [row.at is not None for row in rows]
    if not any(timed):
        return rows
    if not all(timed):
        line = rows[timed.index(False)].line
        raise TraceError(f"{path}:{line}: has no time, and other lines have one")
    first = rows[0].at or 0.0
    moved, before = [], first
    for row in rows:
        at = row.at or 0.0
        if at < before:
            raise TraceError(f"{path}:{row.line}: time goes back by {before - at:g} s; sort the trace by time")
        if at - before > longest_pause:
            raise TraceError(
                f"{path}:{row.line}: no request for {at - before:,.0f} s before this line: the trace has a gap; cut it "
                f"there, or allow it with --longest-pause {at - before:.0f}s"
            )
        moved.append(msgspec.structs.replace(row, at=at - first))
        before = at
    return moved


# --- from rows to arrivals --------------------------------------------------------------------------------------------


def arrivals(
    rows: Sequence[Row],
    rng: random.Random,
    *,
    rate: float | None = None,
    repeat: int = 1,
    limit: int | None = None,
    prefix: int = 0,
) -> list[Arrival]:
    """Requests of a trace. `rate`: requests a second; a trace without times has Poisson arrivals at it, the clock of
    one with times is scaled to it. `repeat`: so many copies lie over one another, each moved by a random part of the
    trace's length, and none shares prompts with another. `limit`: what clients allow as output; None is twice what
    comes. `prefix`: so many tokens at the beginning of every prompt are the same.
    """
    if rate is not None and not rate > 0:
        raise TraceError(f"the rate must be above 0, got {rate:g}")
    times = _times(rows, rng, rate)
    span = times[-1] * len(rows) / max(len(rows) - 1, 1) if times else 0.0
    names = 1 + max((max(row.blocks) for row in rows if row.blocks), default=0)
    made = []
    for copy in range(repeat):
        moved = rng.random() * span if copy else 0.0
        for number, (row, time) in enumerate(zip(rows, times, strict=True)):
            own = copy * len(rows) + number
            at = time + moved
            made.append(
                Arrival(
                    id=f"{own}",
                    at=at - span if at >= span > 0 else at,
                    runs=_runs(row, own, copy * names, prefix),
                    num_output=row.num_output,
                    limit=max(row.num_output, limit or 2 * row.num_output),
                    blocks=None,
                )
            )
    return sorted(made, key=lambda arrival: arrival.at)


def _times(rows: Sequence[Row], rng: random.Random, rate: float | None) -> list[float]:
    if any(row.at is None for row in rows):
        if rate is None:
            raise TraceError("the trace tells lengths only: give the rate of arrivals with --rate")
        at, times = 0.0, []
        for _ in rows:
            at += rng.expovariate(rate)
            times.append(at)
        return times
    times = [row.at or 0.0 for row in rows]
    if rate is None:
        return times
    if times[-1] <= 0.0:
        raise TraceError("all requests of the trace come at one time: there is no rate to scale")
    factor = (len(rows) - 1) / times[-1] / rate
    return [time * factor for time in times]


def _runs(row: Row, own: int, offset: int, prefix: int) -> tuple[tuple[int, int], ...]:
    """The prompt, of tokens that stand for what is known of it."""
    if row.blocks:
        last = row.num_prompt - MOONCAKE_BLOCK * (len(row.blocks) - 1)
        names = [FIRST_TOKEN + offset + name for name in row.blocks]
        return (*((name, MOONCAKE_BLOCK) for name in names[:-1]), (names[-1], last))
    if 0 < prefix < row.num_prompt:
        return ((FIRST_TOKEN, prefix), (FIRST_TOKEN + 1 + own, row.num_prompt - prefix))
    return ((FIRST_TOKEN + 1 + own, row.num_prompt),)


def synthetic(count: int, num_prompt: int, num_output: int, spread: float, rng: random.Random) -> list[Row]:
    """Lengths without times: log-normal with these means, and `spread` as the ratio of deviation to mean."""

    def draw(mean: int) -> Callable[[], int]:
        if spread <= 0:
            return lambda: mean
        sigma = sqrt(log(1 + spread * spread))
        return lambda: max(1, round(rng.lognormvariate(log(mean) - sigma * sigma / 2, sigma)))

    prompt, output = draw(num_prompt), draw(num_output)
    return [Row(number, None, prompt(), output()) for number in range(1, count + 1)]
