"""Virtual time: what is to happen, in order. Of several things at one time the one that was asked for first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush

Action = Callable[[], object]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[int], object], int]] = []
        self._num_events = 0

    def at(self, time: float, action: Action) -> None:
        self.call(max(time, self.now), lambda _: action(), 0)

    def call(self, time: float, action: Callable[[int], object], argument: int) -> None:
        """As `at`, without a closure: for what happens with every step."""
        self._num_events += 1
        heappush(self._events, (time, self._num_events, action, argument))

    @property
    def is_empty(self) -> bool:
        return not self._events

    def run(self, arrivals: Iterator[tuple[float, Action]], until: float) -> None:
        """Until nothing is left to happen or `until` has come. `arrivals` are in order of time, and go before other
        things of the same time."""
        events = self._events
        coming = next(arrivals, None)
        while events or coming is not None:
            if coming is not None and (not events or coming[0] <= events[0][0]):
                if coming[0] > until:
                    break
                self.now = max(self.now, coming[0])
                coming[1]()
                coming = next(arrivals, None)
                continue
            if events[0][0] > until:
                break
            self.now, _, action, argument = heappop(events)
            action(argument)
