"""Rows of the GPU benchmark and the Markdown that they become: each figure beside its limit, with its spread."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("what", "measured", "unit", "limit", "of the limit", "target", "reached", "")


@dataclass
class Row:
    section: str
    what: str
    value: float | None = None
    """Median. None: not measured, and `note` says why."""
    low: float | None = None
    high: float | None = None
    unit: str = ""
    limit: float | None = None
    """In the same unit: what the card's own rates, from this run, would allow."""
    least: bool = False
    """The limit is the least that the value can be (a time), not the most (a rate)."""
    target: float | None = None
    """Of `fraction` where there is a limit, else of the value."""
    most: bool = False
    """The target is not to be exceeded."""
    note: str = ""

    @property
    def fraction(self) -> float | None:
        """Of the limit that is reached; 1 is all of it."""
        if self.value is None or not self.limit or not self.value:
            return None
        return self.limit / self.value if self.least else self.value / self.limit

    @property
    def reached(self) -> bool | None:
        if self.target is None or self.value is None:
            return None
        found = self.value if self.limit is None else self.fraction
        return None if found is None else (found <= self.target if self.most else found >= self.target)

    def cells(self) -> list[str]:
        measured = "not available" if self.value is None else shown(self.value)
        if self.value is not None and self.low is not None and self.high is not None:
            measured += f" ({shown(self.low)}–{shown(self.high)})"
        limit = "" if self.limit is None else shown(self.limit)
        fraction = "" if self.fraction is None else f"{self.fraction:.0%}"
        target = ""
        if self.target is not None:
            sign = "≤" if self.most else "≥"
            target = f"{sign} {self.target:.0%}" if self.limit is not None else f"{sign} {self.target:g}"
        reached = {None: "", True: "yes", False: "**no**"}[self.reached]
        return [self.what, measured, self.unit, limit, fraction, target, reached, self.note]


def shown(value: float) -> str:
    """Three significant digits and no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(f"{abs(value):.0f}") + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def markdown(rows: list[Row], machine: dict[str, Any], command: str, date: str, notes: list[str]) -> str:
    lines = [f"`{command}`, {date}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    sections = dict.fromkeys(row.section for row in rows)
    for section in sections:
        lines += ["", f"## {section}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line(row.cells()) for row in rows if row.section == section]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"fraction": row.fraction, "reached": row.reached} for row in rows]


def describe(device: str) -> dict[str, Any]:
    """Card, driver, versions. No setting of the card is changed, only read."""
    import torch

    found: dict[str, Any] = {}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        found["card"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, sm{properties.major}{properties.minor}"
        )
        found["driver"] = _driver()
        found["CUDA"] = torch.version.cuda
    found["host"] = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}"
    )
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [text for name in ("triton", "transformers") if (text := _version(name))]
    found["versions"] = ", ".join(versions)
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
