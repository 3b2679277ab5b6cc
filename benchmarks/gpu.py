"""The engine on one card, each figure beside what the card itself does in the same run. No network, no checkpoint.

    python benchmarks/gpu.py --quick              about 5 minutes
    python benchmarks/gpu.py --full               up to 8: every section, more steps
    python benchmarks/gpu.py --check              the tests that need a card first, then --quick, in 10 minutes together
    python benchmarks/gpu.py --device cpu --tiny  the same code over tiny models, in seconds, on any machine

Prints Markdown; --json FILE keeps the figures. Without a card the exit status is 2. Sections are processes of their
own; what goes wrong in one is said in its place. Needs torch >= 2.11 and msgspec; no other package of shoal's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for place in (ROOT / "src", ROOT / "benchmarks"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

try:
    import msgspec  # noqa: F401  (the one package of shoal's that a machine with torch may lack)
except ImportError:
    sys.exit("benchmarks/gpu.py needs msgspec beside torch: pip install msgspec")

from gpu_report import Row, as_json, describe, markdown  # noqa: E402  (the lines above say where it is)

SECONDS = {"quick": 400.0, "full": 470.0}
MOST_OF_ESTIMATE = 2.5
"""Times what a section is thought to take it may take: one that hangs leaves the others their time."""
CHECK_SECONDS = 570.0
"""Of tests and benchmark together."""
TEST_SECONDS = 200.0
NO_DEVICE = USAGE = 2
_QUICK_LEAVES_OUT = ("long", "profile")


class UsageError(Exception):
    """The message is for the user."""


def main(arguments: list[str] | None = None) -> int:
    asked = _parse(arguments)
    if asked.child is not None:
        return _child(asked)
    try:
        return _measure(asked)
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE


def _measure(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    device = _device(asked.device)
    if device is None:
        print("there is no GPU here: torch sees no CUDA device. See --device cpu --tiny", file=sys.stderr)
        return NO_DEVICE
    budget = asked.seconds or SECONDS["full" if asked.full else "quick"]
    names, status = _names(asked), 0
    if asked.check:
        status = _tests(TEST_SECONDS)
        budget = CHECK_SECONDS - (time.monotonic() - began)
    rows, notes = _sections(asked, names, device, time.monotonic() + budget)
    rows += comparisons(rows, has_targets=not asked.tiny)
    command = shlex.join(["python", *sys.argv])
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    notes.append(f"{time.monotonic() - began:.0f} s in all.")
    machine = describe(device)
    print(markdown(rows, machine, command, date, notes))
    if asked.json is not None:
        asked.json.write_text(
            json.dumps({"command": command, "date": date, "machine": machine, "rows": as_json(rows), "notes": notes}),
            encoding="utf-8",
        )
    return status


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer steps, without the longest sections (the default)")
    size.add_argument("--full", action="store_true", help="every section")
    parser.add_argument("--check", action="store_true", help="the tests that need a card first")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny models: the code paths and no figures")
    parser.add_argument("--sections", default="", metavar="A,B", help="only these")
    parser.add_argument("--seconds", type=float, help="most that it may take")
    parser.add_argument("--depth", type=int, default=2, help="steps planned ahead; 1 is synchronous")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--isolated", action="store_true", help="sections in processes of their own on a CPU too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.device == "cpu" and not asked.tiny and asked.child is None:
        parser.error("--device cpu needs --tiny: these models are of a GPU's size")
    return asked


def _device(name: str) -> str | None:
    """None where it is not there."""
    if name == "cpu":
        return name
    import torch

    index = torch.device(name).index or 0
    return name if torch.cuda.is_available() and index < torch.cuda.device_count() else None


def _names(asked: argparse.Namespace) -> list[str]:
    from gpu_sections import SECTIONS

    if asked.sections:
        names = [name.strip() for name in asked.sections.split(",") if name.strip()]
        for name in names:
            if name not in SECTIONS:
                raise UsageError(f"--sections: there is no {name!r}; there are {', '.join(SECTIONS)}")
        return names
    left_out = () if asked.full or asked.tiny else _QUICK_LEAVES_OUT
    return [name for name in SECTIONS if name not in left_out]


def _sections(asked: argparse.Namespace, names: list[str], device: str, deadline: float) -> tuple[list[Row], list[str]]:
    """The card's own figures, then section after section while time suffices."""
    from gpu_sections import ESTIMATES

    alone = device == "cpu" and not asked.isolated
    rows: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="shoal-gpu-") as folder:
        job = {"device": device, "tiny": asked.tiny, "full": asked.full, "depth": asked.depth, "folder": folder}
        for name in ("ceilings", *names):
            left = deadline - time.monotonic()
            if left < (0.0 if asked.tiny else ESTIMATES.get(name, 0.0)):
                notes.append(f"- {name}: left out, for {left:.0f} s were left")
                continue
            print(f"{name}: {left:.0f} s left", file=sys.stderr, flush=True)
            most = min(left, MOST_OF_ESTIMATE * ESTIMATES.get(name, 30.0))
            found, problem = _run(job | {"section": name, "seconds": most}, alone=alone)
            if name == "ceilings":
                job["ceilings"] = found[0] if found else None
                found = found[1:]
            rows += [Row(**row) for row in found]
            if problem:
                notes.append(f"- {name}: {problem}")
    return rows, notes


# --- one section ------------------------------------------------------------------------------------------------------


def _run(job: dict[str, Any], *, alone: bool) -> tuple[list[dict[str, Any]], str]:
    """What it gave until it ended, and what went wrong with it."""
    if alone:
        found: list[dict[str, Any]] = []
        problem = ""
        try:
            for row in rows_of(job):
                found.append(row)
        except Exception as error:  # one section's defect is not the others'
            problem = f"{type(error).__name__}: {error}"
        return found, problem
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=job["seconds"], env=environment, check=False
        )
        output, error, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, error, status = _text(late.stdout), "ended: its time was up", -1
    prefix = "row: "
    found = [json.loads(line.removeprefix(prefix)) for line in output.splitlines() if line.startswith(prefix)]
    if status == 0:
        return found, ""
    sys.stderr.write(error[-4000:] + "\n")  # all of it, for who looks; one line in the report
    return found, (error.strip().splitlines() or [f"exit status {status}"])[-1][:300]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _child(asked: argparse.Namespace) -> int:
    for row in rows_of(json.loads(asked.child)):
        print("row: " + json.dumps(row))
    # A thread of the rival's may still compute: nothing is left to clean up.
    sys.stdout.flush()
    os._exit(0)


def rows_of(job: dict[str, Any]) -> Any:
    """Rows of one section as dicts; before those of `ceilings` the ceilings themselves."""
    from gpu_ceilings import Ceilings, measure
    from gpu_sections import FULL, QUICK, SECTIONS, TINY, Setting, ceiling_rows, wait_for_memory

    if job["section"] == "ceilings":
        import torch

        found = measure(torch.device(job["device"]), tiny=job["tiny"])
        yield found.as_dict()
        yield from (dataclasses.asdict(row) for row in ceiling_rows(found))
        return
    ceilings = job.get("ceilings")
    setting = Setting(
        device=job["device"],
        scale=TINY if job["tiny"] else FULL if job["full"] else QUICK,
        tiny=job["tiny"],
        folder=Path(job["folder"]),
        ceilings=None if ceilings is None else Ceilings(**ceilings),
        depth=job["depth"],
        seconds=job["seconds"],
    )
    wait_for_memory(setting.device)
    for row in SECTIONS[job["section"]](setting):
        yield dataclasses.asdict(row)


# --- across sections --------------------------------------------------------------------------------------------------


def comparisons(rows: list[Row], *, has_targets: bool) -> list[Row]:
    """Ratios of rows of different sections: precisions, and the rival."""
    found: list[Row] = []
    values = {(row.section, row.what): row.value for row in rows if row.value}
    for what, target in (("decode, batch 1,", 1.6), ("prefill,", 1.4)):
        pairs = [
            (value, values.get((section.replace("bfloat16", "fp8 weights"), name)))
            for (section, name), value in values.items()
            if section.endswith(", bfloat16") and name.startswith(what)
        ]
        for plain, quantised in pairs:
            if quantised and plain:
                name = f"FP8 weights beside bfloat16, {what.strip(',')}"
                found.append(Row("Comparisons", name, plain / quantised, unit="×", target=target))
    rates = {name: value for (section, name), value in values.items() if "mixed load" in section}
    rival = rates.get("transformers, continuous batching")
    if rates.get("shoal") and rival:
        found.append(
            Row("Comparisons", "mixed load, shoal beside transformers", rates["shoal"] / rival, unit="×", target=5.0)
        )
    if not has_targets:
        found = [dataclasses.replace(row, target=None) for row in found]
    return found


def _tests(seconds: float) -> int:
    """Tests that need a card, and those of kernels without the interpreter. 1 if any failed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")])
    status = 0
    for what, arguments in (("gpu", ["-m", "gpu", "tests/engine"]), ("kernels", ["tests/kernels"])):
        if not (ROOT / arguments[-1]).is_dir():
            print(f"tests, {what}: there are none", file=sys.stderr)
            continue
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x" if what == "gpu" else "-q",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        print(f"tests, {what}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds / 2, check=False)
            status = status or int(done.returncode not in (0, 5))  # 5: nothing was collected
        except subprocess.TimeoutExpired:
            print(f"tests, {what}: not done after {seconds / 2:.0f} s", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
