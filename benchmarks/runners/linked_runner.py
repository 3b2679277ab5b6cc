"""One layout over the ranks of two hosts, driven from here: started on each host with RANK set, as users would.

The file that is named first holds one JSON object (`options` of EngineConfig, `items` to run, `repeats`). Rank 0 prints
one line with the seconds of each repeat; other ranks are agents of the engine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec
from shoal_runner import ShoalEngine

from shoal.core.config import EngineConfig
from shoal.engine.launch import shared_secret
from shoal.engine.launch.environment import Agent


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    if int(os.environ.get("RANK", "0")):
        launch = msgspec.convert(work["options"], EngineConfig).launch
        sys.exit(Agent(launch, shared_secret(launch)).run())
    engine = ShoalEngine()
    engine.load(work["options"])
    runs = [engine.run(work["items"]) for _ in range(1 + work["repeats"])][1:]
    engine.close()
    print(json.dumps({"seconds": [run["seconds"] for run in runs], "tokens": runs[-1]["tokens"]}), flush=True)


if __name__ == "__main__":
    main()
