"""Profiles within the GPU benchmark: how busy the card is under load, and what the parts of a step take."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch.profiler import ProfilerActivity, profile

from gpu_engine import config_of
from gpu_report import Row
from shoal.bench.calibration.points import StepPoint
from shoal.bench.calibration.step_timing import StepTiming
from shoal.bench.profile.trace import read_profile
from shoal.core.cost.kernels import by_part
from shoal.engine.profiling import ProfiledExecutor

if TYPE_CHECKING:
    from gpu_sections import Setting
    from shoal.core.cost.kernels import PartWork

STEPS = 6
SHOWN = 8
"""Parts of a step that have a row."""


class Window:
    """Traces what the device does between two steps of a run."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._profiler: Any = None
        self._done: Any = None

    def on_step(self, steps: int) -> None:
        if steps == self._first:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.__enter__()
        elif steps == self._last and self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._done, self._profiler = self._profiler, None

    def figures(self) -> tuple[float, float] | None:
        """Share of the window in which something ran; the median over steps of the longest pause within a step's time.

        None where the run ended before the window did.
        """
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
        if self._done is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._done.export_chrome_trace(str(path))
            events = msgspec.json.decode(path.read_bytes())["traceEvents"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        spans = sorted(
            (event["ts"], event["ts"] + event.get("dur", 0)) for event in events if event.get("cat") in kinds
        )
        return busy_and_pause(spans, self._last - self._first)


def busy_and_pause(spans: list[tuple[float, float]], steps: int) -> tuple[float, float] | None:
    """Of what ran, as (start, end) in microseconds, ascending: the share of the time, and the median over steps of the
    longest pause, in seconds. The window is cut into as many equal pieces as it has steps."""
    if len(spans) < 2:
        return None
    start, end = spans[0][0], max(stop for _, stop in spans)
    pauses: list[tuple[float, float]] = []
    until, busy = start, 0.0
    for began, ended in spans:
        if began > until:
            pauses.append((until, began - until))
        busy += max(0.0, ended - max(began, until))
        until = max(until, ended)
    piece = max((end - start) / max(1, steps), 1e-9)
    longest: dict[int, float] = {}
    for at, length in pauses:
        number = int((at - start) / piece)
        longest[number] = max(longest.get(number, 0.0), length)
    each = list(longest.values()) + [0.0] * max(0, steps - len(longest))
    return busy / (end - start), statistics.median(each) / 1e6


def profile_rows(path: Path, setting: Setting, model: str) -> Any:
    """The parts of a step of decode, of a batch of them and of prefill: milliseconds and share."""
    scale = setting.scale
    points = {
        f"decode, batch 1, context {scale.context:,}": StepPoint(decodes=1, context=scale.context),
        f"decode, batch {scale.batch}, context {scale.batch_context:,}": StepPoint(
            decodes=scale.batch, context=scale.batch_context
        ),
        f"prefill, {scale.chunk:,} tokens": StepPoint(chunk=scale.chunk),
    }
    from gpu_sections import card, kernels_of

    config = config_of(
        "bfloat16",
        model=str(path),
        load_format="random",
        device=setting.device,
        max_len=max(scale.chunk, scale.batch_context, scale.context) + 2,
        max_sequences=scale.batch + 1,
        max_batch_tokens=scale.chunk,
        prefix_caching=False,
    )
    device = None if setting.ceilings is None else card(setting.ceilings)
    executor = ProfiledExecutor(config)
    try:
        info = executor.start()
        timing = StepTiming(
            executor,
            list(points.values()),
            block_tokens=config.block_tokens,
            vocab_size=info.spec.vocab_size,
            max_batch_tokens=config.max_batch_tokens,
        )
        timing.fill(lambda share: None)
        for name, point in points.items():
            work = {} if device is None else by_part(kernels_of(info.spec, point.shape(), device), device)
            yield from _parts(executor, timing, point, f"{model}, profile: {name}", work, setting.folder)
    finally:
        executor.stop()


def _parts(
    executor: ProfiledExecutor,
    timing: StepTiming,
    point: StepPoint,
    section: str,
    work: dict[str, PartWork],
    folder: Path,
) -> Any:
    trace = folder / "trace.json"
    for _ in range(3):
        timing.step(point)
    with executor.traced(trace):
        for _ in range(STEPS):
            timing.step(point)
    found = read_profile(trace)
    rows = [(part.name, part.seconds, part.kernels) for part in found.parts]
    rows += [("gaps within a step", found.gap_within, ()), ("gaps between steps", found.gap_between, ())]
    total = sum(seconds for _, seconds, _ in rows) or 1.0
    for name, seconds, kernels in rows[:SHOWN] + rows[-2:]:
        longest = f"; {kernels[0].name[:60]}" if kernels else ""
        limit = 1e3 * work[name].limit_seconds if name in work else None
        note = f"{seconds / total:.0%} of the step{longest}"
        yield Row(section, name, 1e3 * seconds, unit="ms a step", limit=limit, least=True, note=note)
