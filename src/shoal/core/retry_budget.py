"""How many retries the traffic pays for: when endpoints fail, sending everything twice is what finishes them off."""

from __future__ import annotations

from math import exp


class RetryBudget:
    """Retries are at most `ratio` of the requests of the last seconds, and `floor` more so that few requests may retry.

    Both are counts that fade over `window_seconds`, so a quiet hour saves up nothing for a bad minute.
    """

    def __init__(self, *, ratio: float = 0.2, floor: float = 3.0, window_seconds: float = 10.0) -> None:
        self._ratio = ratio
        self._floor = floor
        self._window = window_seconds
        self._requests = 0.0
        self._retries = 0.0
        self._seen = 0.0

    def request(self, now: float) -> None:
        """A client's request came in, not one that is sent anew."""
        self._fade(now)
        self._requests += 1.0

    def retry(self, now: float) -> bool:
        """Whether one more retry may be sent; it is counted if so."""
        self._fade(now)
        if self._retries + 1.0 > self._floor + self._ratio * self._requests:
            return False
        self._retries += 1.0
        return True

    def _fade(self, now: float) -> None:
        if now > self._seen:
            keep = exp((self._seen - now) / self._window)
            self._requests *= keep
            self._retries *= keep
            self._seen = now
