"""The gateway's cost and behaviour under load, beside the Rust routers, over mock engines.

    python benchmarks/gateway.py compare                      added latency, most streams/s, CPU: half an hour
    python benchmarks/gateway.py overload --url http://...    three times the capacity for a minute, then normal
    python benchmarks/gateway.py routing                      TTFT by routing policy, where they differ: half an hour
    python benchmarks/gateway.py load --url http://...        one open-loop run against anything that speaks OpenAI
    python benchmarks/gateway.py mock --ports 8101,8102       mock OpenAI engines
    python benchmarks/gateway.py serve-mocks -- serve ...     shoal, whose engines are mocks

`... COMMAND --help` lists the options; see benchmarks/README.md.
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "compare": ("compare", "main"),
    "overload": ("overload", "main"),
    "routing": ("routing_live", "main"),
    "load": ("load", "main"),
    "mock": ("mock_openai", "main"),
    "serve-mocks": ("mock_engine", "main"),
    "mock-engine": ("mock_engine", "engine_main"),
}
"""Name -> module of the package `gateway`, which is found before this file, and its function. The last is not for
people: `serve-mocks` starts it."""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"{__doc__}\nthe command is one of {', '.join(COMMANDS)}")
    module, function = COMMANDS[sys.argv[1]]
    sys.exit(getattr(import_module(f"gateway.{module}"), function)(sys.argv[2:]))


if __name__ == "__main__":
    main()
