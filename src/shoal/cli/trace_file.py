"""A request trace as the commands read it."""

from __future__ import annotations

from pathlib import Path

from shoal.core.request_trace import TraceError, TraceRow, read_rows


def read_trace(file: Path, *, longest_pause: float | None = None) -> list[TraceRow]:
    """See `read_rows`. Raises TraceError."""
    try:
        return read_rows(file.read_text(encoding="utf-8"), str(file), longest_pause=longest_pause)
    except OSError as error:
        raise TraceError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{file}: cannot be read: it is not UTF-8 text (byte {error.start:,})") from None
