"""Parallelism over two hosts whose link gets slower, beside one host: where tensor, pipeline and context stop paying.

    python benchmarks/links.py                   prints a Markdown table (root, Linux, iproute2)

The hosts are network namespaces of this machine with one core each, joined by a link that a token bucket slows down;
collectives go over it through gloo. One host alone has one core too: what a user with one machine has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import model_files
from engines import MAX_LEN
from hosts import HOSTS, Hosts
from report import spread
from shoal.core.model_spec import ModelSpec
from workloads import make_workloads

RUNNER = Path(__file__).parent / "runners" / "linked_runner.py"
RATES: list[int | None] = [None, 10_000, 1_000, 200]
"""Mb/s; None is as fast as the kernel copies."""
LAYOUTS: list[tuple[str, dict[str, int]]] = [
    ("one host", {}),
    ("tp2", {"tp": 2}),
    ("pp2", {"pp": 2}),
    ("cp2", {"cp": 2}),
]
SEQUENCES, PROMPT, OUTPUT = 8, 64, 32


def run(hosts: Hosts, layout: dict[str, int], model: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each repeat, and the tokens."""
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    prompts = make_workloads(49152)["b"].items
    items = [{"prompt": (item.prompt * PROMPT)[:PROMPT], "max_tokens": OUTPUT} for item in prompts[:SEQUENCES]]
    options: dict[str, Any] = {"model": model, "max_len": MAX_LEN, "threads": 1, "prefix_caching": False}
    options |= {"kv_cache_bytes": 1 << 29, "layout": layout}
    if layout:
        launch = {"launcher": "env", "comm": "gloo", "host": hosts.addresses[0], "secret_file": str(secret)}
        options["launch"] = launch | {"collective_seconds": 120.0}
    file = folder / "work.json"
    file.write_text(json.dumps({"options": options, "items": items, "repeats": repeats}))
    environment = {"WORLD_SIZE": str(HOSTS), "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29500"}
    ranks = range(HOSTS) if layout else range(1)
    processes = [hosts.run(rank, [str(RUNNER), str(file)], RANK=str(rank), **environment) for rank in ranks]
    try:
        text, _ = processes[0].communicate(timeout=1800)
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    if not text:
        raise RuntimeError(f"{layout}: the driver said nothing; what it wrote to standard error is above")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def formula_bytes(layout: dict[str, int], spec: ModelSpec) -> float:
    """Bytes that reach the rank that is sent most, for a token of this work, as docs/parallelism.md has them."""
    layers, hidden, heads, kv_heads, d = (
        spec.num_layers,
        spec.hidden_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
    )
    drawn = OUTPUT / (PROMPT + OUTPUT)
    """Of all tokens, those that come with logits."""
    if "tp" in layout:
        return 4 * ((2 * layers + 1) * hidden + drawn * spec.vocab_size / 2)
    if "pp" in layout:
        return 4 * hidden
    # Half of the tokens are the other rank's.
    return 4 * (layers * (heads + 2 * kv_heads) * d + layers * heads * (d + 1) + hidden) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description="tp2, pp2 and cp2 over a link that gets slower, as Markdown.")
    parser.add_argument("--repeats", type=int, default=5, help="of each cell; default 5")
    arguments = parser.parse_args()
    paths = model_files.prepare(Path("~/.cache/shoal/bench-models").expanduser())
    model = str(paths.float32)
    tokens = (1 + arguments.repeats) * SEQUENCES * (PROMPT + OUTPUT)
    traffic = []
    hosts = Hosts()
    lines, reference = [], None
    try:
        reason = hosts.make()
        if reason is not None:
            sys.exit(f"no hosts can be made: {reason}")
        for megabits in RATES:
            hosts.limit(megabits)
            name = "not limited" if megabits is None else f"{megabits:,} Mb/s"
            cells, medians = [], {}
            for layout_name, layout in LAYOUTS:
                before = [hosts.received_bytes(host) for host in range(HOSTS)]
                with tempfile.TemporaryDirectory() as folder:
                    result = run(hosts, layout, model, arguments.repeats, Path(folder))
                if megabits is None and layout:
                    sent = max(hosts.received_bytes(host) - before[host] for host in range(HOSTS)) / tokens
                    traffic.append([layout_name, f"{formula_bytes(layout, paths.spec):,.0f}", f"{sent:,.0f}"])
                reference = reference or result["tokens"]
                if result["tokens"] != reference:
                    sys.exit(f"{layout_name} at {name}: other tokens than one host")
                rates = [SEQUENCES * OUTPUT / seconds for seconds in result["seconds"]]
                medians[layout_name] = statistics.median(rates)
                cells.append(spread(rates, 1))
                print(f"{name} {layout_name}: {cells[-1]} tok/s", file=sys.stderr, flush=True)
            lines.append([name, *cells, max(medians, key=medians.__getitem__)])
    finally:
        hosts.remove()
    titles = ["link", *(f"{name}, output tok/s" for name, _ in LAYOUTS), "fastest"]
    command = subprocess.list2cmdline(["python", "benchmarks/links.py", *sys.argv[1:]])
    print(
        f"`{command}`, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}: {SEQUENCES} sequences, {PROMPT} tokens in,"
    )
    print(f"{OUTPUT} out, float32, one core a host; medians of {arguments.repeats}, the range in brackets.\n")
    for line in [titles, ["---"] * len(titles), *lines]:
        print("| " + " | ".join(line) + " |")
    print("\nBytes a token, prompt and output, that reach the host that is sent most, with everything TCP adds:\n")
    for line in [["layout", "by the formula", "measured"], ["---"] * 3, *traffic]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
