"""A soak: twenty minutes of load with random faults, and how memory and open files grow: `python benchmarks/soak.py`.

Slopes are least squares over everything after the first quarter, in which caches fill. An engine that is killed begins
anew with another process: its slope is that of the process that ran longest. With `--faults drain,leave`, which leave
engines alive, theirs is of the whole time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from faults import ENGINE, MODEL, progress
from shoal import __version__
from shoal.bench.faults.catalogue import KINDS, Kind
from shoal.bench.faults.deployment import Deployment, FleetWatch
from shoal.bench.faults.injectors import NotInjected
from shoal.bench.faults.oracle import tally
from shoal.bench.faults.report import Row
from shoal.bench.faults.suite import Options, Suite
from shoal.bench.processes import comes_true, open_files, resident_bytes

FAULTS = ("kill", "hang", "slow", "drain", "leave", "slow-reader", "slow-loris", "bad-bodies", "client-reset")
SAMPLE_SECONDS = 2.0
MIB = 1 << 20


class Sample(NamedTuple):
    at: float
    resident: int
    files: int


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line of least squares, per second; 0 where there are not two points."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


async def sample(watch: FleetWatch, deployment: Deployment, into: dict[str, dict[int, list[Sample]]]) -> None:
    while True:
        now = time.monotonic()
        pids = {"gateway": deployment.gateways[0].pid}
        for name, endpoint in watch.endpoints.items():
            process = deployment.process_of(endpoint)
            if process is not None:
                pids[name] = process.pid
        for name, pid in pids.items():
            one = Sample(now, resident_bytes(pid), open_files(pid))
            if one.resident:
                into.setdefault(name, {}).setdefault(pid, []).append(one)
        await asyncio.sleep(SAMPLE_SECONDS)


async def disturb(suite: Suite, kinds: list[Kind], seconds: float, rng: random.Random) -> tuple[list[Row], Row]:
    """Random faults under load for so long: a row for each kind, and one that has the tally of all."""
    rows = {kind.name: Row(fault=kind.name) for kind in kinds}
    load = suite.load()
    load.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(2.0, 8.0))
        kind = rng.choice(kinds)
        progress(kind.name, int(seconds - max(0.0, until - time.monotonic())), int(seconds))
        try:
            await suite.strike(kind, rows[kind.name], load)
        except NotInjected as error:
            # An endpoint may still be on its way back from the last fault.
            print(f"not proved: {kind.name}: {error}", file=sys.stderr)
    await load.stop()
    total = Row(fault="all")
    total.tally = tally(load.outcomes, suite.references, [spec.number for spec in suite.unstable])
    return list(rows.values()), total


def growth_lines(samples: dict[str, dict[int, list[Sample]]]) -> tuple[list[str], bool]:
    lines = [
        "| process | minutes | RSS at the end MiB | RSS slope MiB/min | files first, last |",
        "|---|---|---|---|---|",
    ]
    flat = True
    for name, by_pid in samples.items():
        longest = max(by_pid.values(), key=lambda run: run[-1].at - run[0].at)
        kept = longest[len(longest) // 4 :]
        minutes = (longest[-1].at - longest[0].at) / 60
        rise = slope([(one.at / 60, one.resident / MIB) for one in kept])
        # A process that lives for two minutes between two kills shows how its memory fills, not whether it leaks.
        flat = flat and (minutes < 10 or rise < 1.0)
        files = f"{kept[0].files}, {kept[-1].files}"
        lines.append(f"| {name} | {minutes:.1f} | {longest[-1].resident / MIB:.0f} | {rise:+.2f} | {files} |")
    return lines, flat


async def run(given: argparse.Namespace) -> int:
    rng = random.Random(given.seed)
    options = Options(version=__version__, streams=given.streams, seed=given.seed, patience=180.0, kills=1)
    samples: dict[str, dict[int, list[Sample]]] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as directory:
        file = Path(directory) / "fleet.yaml"
        model = {"name": MODEL, "model": MODEL, "replicas": given.replicas, **ENGINE}
        journal = {"location": str(Path(directory) / "journal.db")}
        file.write_text(yaml.safe_dump({"models": [model], "journal": journal}))
        deployment = Deployment(file)
        watch = FleetWatch(deployment)
        suite = None
        sampling = None
        try:
            await deployment.start()
            await watch.start()
            await comes_true(lambda: watch.all_ready, 300, every=0.1)
            suite = Suite(deployment, watch, options)
            await suite.measure_undisturbed()
            kinds = [kind for kind in KINDS if kind.name in given.faults.split(",") and not kind.lacks(suite.arena)]
            suite.go_through_proxies()
            sampling = asyncio.create_task(sample(watch, deployment, samples))
            rows, total = await disturb(suite, kinds, given.minutes * 60, rng)
        finally:
            if sampling is not None:
                sampling.cancel()
            if suite is not None:
                suite.arena.close()
            await watch.stop()
            await deployment.stop()
    lines, flat = growth_lines(samples)
    t = total.tally
    broken = t.failed + t.lost + t.duplicate_tokens + t.missing_tokens + t.other_tokens + t.unequal
    print(f"shoal {__version__}, seed {given.seed}, {given.minutes:g} minutes, {given.streams} clients at once\n")
    struck = ", ".join(f"{row.injected} x {row.fault}" for row in rows if row.injected)
    print(f"Faults: {struck}.\n")
    print(
        f"{t.offered} requests, {t.completed} completed, {t.refused} refused, {t.failed} failed, {t.lost} lost; "
        f"{t.unequal} answers unequal, {t.duplicate_tokens} tokens duplicate, {t.missing_tokens} missing, "
        f"{t.other_tokens} other.\n"
    )
    print("\n".join([*lines, *t.complaints]))
    return 0 if flat and not broken else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="of these at random; default: %(default)s")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
