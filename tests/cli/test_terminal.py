"""What a bar says while weights load."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.cli.terminal import StartBar
from shoal.core.start_report import StartProgress

GIB = 1 << 30


def test_the_bar_says_how_much_is_read_and_how_fast() -> None:
    bar = StartBar("tiny", Console(file=io.StringIO()))
    reports = [
        (100.0, StartProgress("starting the ranks", 0.0)),
        (101.0, StartProgress("loading the weights", 0.25, GIB, 4 * GIB)),
        (103.0, StartProgress("loading the weights", 0.75, 3 * GIB, 4 * GIB)),
        (104.0, StartProgress("warming up", 0.0)),
    ]
    details = [bar._detail(progress, now) for now, progress in reports]
    # 2 GiB in the 2 s since bytes were first heard of.
    assert details == ["", "1.0 GiB of 4.0 GiB", "3.0 GiB of 4.0 GiB, 1.07 GB/s", ""]
    bar.report(reports[-1][1])
    assert bar._progress.tasks[0].description == "tiny: warming up"
