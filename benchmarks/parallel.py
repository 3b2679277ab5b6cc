"""Everything about parallelism on this machine: collectives, layouts, slowed links, cold start, in one report.

    python benchmarks/parallel.py                             an hour; root and iproute2 for the links
    python benchmarks/parallel.py --quick                     one round of each: a quarter of an hour
    python benchmarks/parallel.py --only collectives,links

Each part is a program of its own with more options; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

QUICK = {
    "collectives": ["--rounds", "1"],
    "layouts": ["--rounds", "1"],
    "links": ["--repeats", "1"],
    "cold_start": ["--rounds", "1", "--gigabytes", "1"],
}
"""What makes each part, in order, a look."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Every benchmark of parallelism, one after the other, as Markdown.")
    parser.add_argument("--only", default=",".join(QUICK), help="parts, separated by commas; default: all")
    parser.add_argument("--quick", action="store_true", help="one round of each")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = [part for part in chosen if part not in QUICK]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is unknown; there are {', '.join(QUICK)}")
    failed = []
    for part in chosen:
        print(f"# {part.replace('_', ' ').capitalize()}\n", flush=True)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / f"{part}.py"), *(QUICK[part] if arguments.quick else [])],
            check=False,
        )
        print(flush=True)
        if done.returncode:
            failed.append(part)
    if failed:
        sys.exit(f"these parts failed, what they said is above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
