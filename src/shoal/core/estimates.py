"""What is learned online, in constant memory, from what is seen one value at a time: lines, and lengths of outputs."""

from __future__ import annotations

from math import exp, log2

import msgspec

RATE = 1 / 16
"""Weight of a new observation once there are as many as make this their mean: the last 16 or so count."""
PEERS_RATE = 1 / 512
"""The same for what all endpoints of a model showed together."""
RIDGE = 0.2
"""Pull of the slope to the peers', as a variance of x relative to its squared mean."""
PEERS_RIDGE = 0.01
"""Pull of the slope of all together to what is believed before anything is seen."""
MOST_SURPRISE = 4.0
"""A value is taken for at most so many times what was expected, and at least that fraction: one hiccup does not
condemn, and what really slowed down is known for it after a few values."""
TRUSTED = 4
"""Observations from which on surprise is limited."""


class Coefficients(msgspec.Struct, frozen=True):
    """y = intercept + slope * x, neither below 0."""

    intercept: float
    slope: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    def toward(self, other: Coefficients, share: float) -> Coefficients:
        """On the way to another: 0 is this one, 1 the other."""
        return Coefficients(
            self.intercept + (other.intercept - self.intercept) * share,
            self.slope + (other.slope - self.slope) * share,
        )


class Line:
    """A line through what was observed of late: seconds of a prefill by its tokens, of a step by its sequences.

    Where x varied too little to tell the slope, the line has the shape of `peers`, a line through what all endpoints
    showed, at its own height. A line without peers starts with `proportional`, the share of the mean that grows with x:
    1 is a line through the origin, 0 a constant.
    """

    __slots__ = (
        "_covariance",
        "_mean_x",
        "_mean_y",
        "_variance",
        "coefficients",
        "count",
        "peers",
        "proportional",
        "rate",
    )

    def __init__(self, *, peers: Line | None = None, proportional: float = 0.0, rate: float = RATE) -> None:
        self.peers = peers
        self.proportional = proportional
        self.rate = rate
        self.count = 0
        self.coefficients = Coefficients(0.0, 0.0)
        self._mean_x = self._mean_y = self._variance = self._covariance = 0.0

    def observe(self, x: float, y: float) -> None:
        """x > 0 and y > 0."""
        peers, was = self.peers, self.coefficients
        if peers is not None:
            peers.observe(x, y)
        if self.count >= TRUSTED:
            expected = was.intercept + was.slope * x
            if y * MOST_SURPRISE < expected:
                y = expected / MOST_SURPRISE
            elif y > expected * MOST_SURPRISE:
                y = expected * MOST_SURPRISE
        self.count = count = self.count + 1
        weight = 1 / count
        if weight < self.rate:
            weight = self.rate
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x = mean_x = self._mean_x + weight * dx
        self._mean_y = mean_y = self._mean_y + weight * dy
        self._variance = variance = (1 - weight) * (self._variance + weight * dx * dx)
        self._covariance = covariance = (1 - weight) * (self._covariance + weight * dx * dy)
        steepest = mean_y / mean_x
        if peers is None:
            believed, ridge = steepest * self.proportional, PEERS_RIDGE
        else:
            shape = peers.coefficients
            believed, ridge = shape.slope * mean_y / (shape.intercept + shape.slope * mean_x), RIDGE
        pull = ridge * mean_x * mean_x
        slope = (covariance + pull * believed) / (variance + pull)
        if slope < 0.0:
            slope = 0.0
        # At the steepest the line goes through the origin.
        intercept = mean_y - slope * mean_x
        self.coefficients = Coefficients(intercept, slope) if intercept > 0.0 else Coefficients(0.0, steepest)


BUCKETS_A_DOUBLING = 4
NUM_BUCKETS = 20 * BUCKETS_A_DOUBLING
EDGES = [0.0, *(2.0 ** (i / BUCKETS_A_DOUBLING) for i in range(NUM_BUCKETS))]
PRIOR_MEAN = 256.0
"""Tokens of an output, before any has been seen: an exponential distribution with this mean."""
PRIOR_WEIGHT = 4.0
"""Outputs that it counts for."""
MEMORY = 4096.0
"""Outputs after which the old ones count half."""


class OutputLengths:
    """How long outputs are, and so how much of one is still to come: never its limit alone, which few reach.

    Lengths are counted in buckets that grow by a quarter of a doubling. With S the share of outputs longer than x, the
    mean of what comes between g and m tokens, given that g have come, is the integral of S from g to m over S(g).
    """

    def __init__(self) -> None:
        self._counts = [
            PRIOR_WEIGHT * (exp(-low / PRIOR_MEAN) - exp(-high / PRIOR_MEAN))
            for low, high in zip(EDGES, [*EDGES[1:], float("inf")], strict=True)
        ]
        self._total = PRIOR_WEIGHT
        self._unread = 0
        self._tabulate()

    def observe(self, length: int) -> None:
        self._counts[_bucket(length)] += 1.0
        self._total += 1.0
        self._unread += 1
        if self._total > MEMORY:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2
        if self._unread >= self._total / 32:
            self._tabulate()

    def remaining(self, generated: float, most: float) -> float:
        """Tokens still to come, in the mean, of an output that has `generated` and ends at `most`."""
        if most <= generated:
            return 0.0
        survival, before = self._read(generated)
        _, until = self._read(most)
        return min(max((until - before) / survival, 1.0), most - generated)

    def _tabulate(self) -> None:
        """Survival at each edge, and its integral from 0 to there."""
        self._unread = 0
        left = self._total
        self._survival: list[float] = []
        self._integral: list[float] = []
        integral = 0.0
        for i, edge in enumerate(EDGES):
            share = max(left / self._total, 1e-9)
            if i:
                integral += (edge - EDGES[i - 1]) * (self._survival[-1] + share) / 2
            self._survival.append(share)
            self._integral.append(integral)
            left -= self._counts[i]

    def _read(self, length: float) -> tuple[float, float]:
        i = _bucket(length)
        share = self._survival[i]
        past = length - EDGES[i]
        if i + 1 < len(EDGES):
            end = share + (self._survival[i + 1] - share) * past / (EDGES[i + 1] - EDGES[i])
        else:
            end = share
        return end, self._integral[i] + past * (share + end) / 2


def _bucket(length: float) -> int:
    """Of the last edge that is not above the length."""
    if length < 1:
        return 0
    return min(int(log2(length) * BUCKETS_A_DOUBLING) + 1, NUM_BUCKETS)
