"""Quantities as people write them: 500ms, 20/s, 80GiB, $30/h, 90%. A refusal names the value and shows an example."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_PER = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0, "day": 86400.0}
_PER_HOUR = {"h": 1.0, "hour": 1.0, "day": 24.0, "month": 730.0, "year": 8760.0}
_BYTES = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_COUNTS = {"": 1, "k": 1000, "m": 1000_000}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"


class UnitError(ValueError):
    """What was written is no such quantity. The message names it and shows what would do."""


def duration(text: str) -> float:
    """Seconds. A bare number is refused: it could be seconds or milliseconds."""
    number, unit = _split(text, "a duration", "500ms or 0.5s")
    if unit not in _SECONDS:
        raise _refusal(text, "a duration", "500ms or 0.5s", unit, _SECONDS)
    return number * _SECONDS[unit]


def rate(text: str) -> float:
    """Requests a second. A bare number is one."""
    number, unit = _split(text, "a rate", "20/s or 1200/min")
    if not unit:
        return number
    unit = unit.removesuffix("ps") + "/s" if unit in ("rps", "qps") else unit
    per = unit.rpartition("/")[2].strip()
    words = unit.rpartition("/")[0].strip()
    if "/" not in unit or per not in _PER or words not in ("", "r", "q", "req", "request", "requests"):
        raise _refusal(text, "a rate", "20/s or 1200/min", unit, [f"/{name}" for name in _PER])
    return number / _PER[per]


def size(text: str) -> int:
    """Bytes. KB, MB, GB, TB are powers of 1000 and KiB, MiB, GiB, TiB of 1024; a bare "G" would be either."""
    number, unit = _split(text, "a size", "80GB or 80GiB")
    if unit and unit not in _BYTES:
        raise _refusal(text, "a size", "80GB or 80GiB", unit, _BYTES)
    return int(number * _BYTES[unit or "b"])


def money_per_hour(text: str) -> float:
    """Dollars an hour. A bare number is that; a month has 730 hours."""
    number, unit = _split(text.replace("$", "", 1).replace(",", ""), "an amount of money", "$30/h or $20000/month")
    per = unit.lstrip("/").strip()
    if not unit:
        return number
    if not unit.startswith("/") or per not in _PER_HOUR:
        names = [f"/{name}" for name in _PER_HOUR]
        raise _refusal(text, "an amount of money", "$30/h or $20000/month", unit, names)
    return number / _PER_HOUR[per]


def share(text: str) -> float:
    """Of a whole, above 0: 90% or 0.9."""
    number, unit = _split(text, "a share", "90% or 0.9")
    if unit not in ("", "%"):
        raise _refusal(text, "a share", "90% or 0.9", unit, ["%"])
    value = number / 100 if unit == "%" else number
    if not 0 < value <= 1:
        raise UnitError(f"{text!r} is not a share: it must be above 0 and at most 100%; write 90% or 0.9")
    return value


def count(text: str) -> int:
    """Tokens: 2000, 2k or 1.5k; 128Ki is 131,072."""
    number, unit = _split(text, "a number of tokens", "2000 or 2k")
    if unit == "ki":
        return int(number * 1024)
    if unit not in _COUNTS:
        raise _refusal(text, "a number of tokens", "2000 or 2k", unit, ["k", "ki", "m"])
    return int(number * _COUNTS[unit])


def failures(text: str) -> str:
    """What may fail: 1gpu or 1node, as `Goal.survive` has it."""
    plain = re.sub(r"[\s-]", "", text.lower()).rstrip("s")
    known = {"1gpu": "gpu", "gpu": "gpu", "1device": "gpu", "1node": "node", "node": "node", "none": "", "0": ""}
    if plain not in known:
        raise UnitError(f"{text!r} is nothing that can be survived: write 1gpu, 1node or none")
    return known[plain]


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = re.fullmatch(rf"\s*{_NUMBER}\s*(.*?)\s*", text.strip().lower())
    if match is None:
        raise UnitError(f"{text!r} is not {what}: write {example}")
    return float(match[1]), match[2]


def _refusal(text: str, what: str, example: str, unit: str, known: Mapping[str, object] | list[str]) -> UnitError:
    names = ", ".join(known)
    why = f"the unit {unit!r} is none of {names}" if unit else f"it needs a unit ({names})"
    return UnitError(f"{text!r} is not {what}: {why}; write {example}")


# --- the other way ---------------------------------------------------------------------------------------------------


def show_duration(seconds: float) -> str:
    """Three digits: 4.21 ms, 512 ms, 1.35 s."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return "0 s" if seconds == 0 else f"{_digits(seconds / 1e-6)} us"


def show_bytes(amount: float) -> str:
    """In powers of 1000, as weights and bandwidths are spoken of."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if abs(amount) >= factor:
            return f"{_digits(amount / factor)} {unit}"
    return f"{amount:.0f} B"


def show_rate(per_second: float) -> str:
    return f"{_digits(per_second)}/s" if per_second >= 0.1 else f"{_digits(per_second * 60)}/min"


def show_money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars < 1000 else f"${dollars:,.0f}"


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
