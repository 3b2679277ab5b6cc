"""Prometheus' text format, as samples that can be asked for by name."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
"""Sorted by name, so that equal labels are equal keys."""


class NotAnExposition(ValueError):
    """The text is not in Prometheus' format. The message says where it stops being so."""


class Sample(msgspec.Struct, frozen=True):
    labels: dict[str, str]
    value: float

    @property
    def key(self) -> Labels:
        return tuple(sorted(self.labels.items()))


class Exposition(msgspec.Struct, frozen=True):
    """What one scrape said."""

    samples: dict[str, list[Sample]]
    """By the name of the line: counters with their _total, histograms as _bucket, _sum and _count."""

    def __contains__(self, name: str) -> bool:
        return name in self.samples

    def __getitem__(self, name: str) -> list[Sample]:
        return self.samples.get(name, [])

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)


def parse(text: str) -> Exposition:
    """Raises NotAnExposition, also for a text without a single sample."""
    samples: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(Sample(dict(sample.labels), float(sample.value)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = text.lstrip()[:40].replace("\n", " ")
        raise NotAnExposition(f"not Prometheus text: {error} (it begins with {shown!r})") from None
    if not samples:
        raise NotAnExposition("there is no metric in it")
    return Exposition(samples)
