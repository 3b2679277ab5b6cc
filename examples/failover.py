"""`make failover`: two engines behind a gateway. One is killed while it writes a poem, and the poem goes on.

The client is the standard library's: it asks once, and knows nothing of engines.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
FLEET = f"""\
models:
  - name: {MODEL}
    replicas: 2
"""
QUESTION = "Write a poem of eight lines about the sea."
ASKED = {"max_tokens": 110, "temperature": 0.7, "seed": 5, "stream": True}
TOKENS_BEFORE_THE_KILL = 30
SHOAL = str(Path(sys.executable).parent / "shoal")


def main() -> int:
    print(f"$ shoal pull {MODEL}", flush=True)
    subprocess.run([SHOAL, "pull", MODEL], check=True)
    with tempfile.TemporaryDirectory(prefix="shoal-failover-") as folder:
        file = Path(folder) / "fleet.yaml"
        file.write_text(FLEET, encoding="utf-8")
        print(f"\n$ cat fleet.yaml\n{FLEET}\n$ shoal serve --deployment fleet.yaml --port 0", flush=True)
        command = [SHOAL, "serve", "--deployment", str(file), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = wait_for_address(server)
                if address is None:
                    return server.wait() or 1
                return show(address)
            finally:
                server.terminate()


def wait_for_address(server: subprocess.Popen[str]) -> str | None:
    """host:port as soon as the gateway says that it listens; None if it ends instead."""
    address = None
    for line in server.stdout or ():
        print(line, end="", flush=True)
        if found := re.search(r"http://(\S+)/v1", line):
            address = found[1]
        if "Stop with Ctrl-C" in line:
            return address
    return None


def show(address: str) -> int:
    """The exit status: 0 where the poem that lost its engine is the undisturbed one."""
    undisturbed = "".join(text for text, _ in poem(address))
    print(f"\n> {QUESTION}     (temperature 0.7, seed 5)\n", flush=True)
    parts, times, killed_at, name = list[str](), list[float](), 0.0, ""
    for text, at in poem(address):
        if len(parts) == TOKENS_BEFORE_THE_KILL:
            endpoint = writer(address)
            name, pid = endpoint["name"], int(endpoint["address"].removeprefix("pid "))
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            print(f" [SIGKILL for {name}, pid {pid}, which writes this] ", end="", flush=True)
        parts.append(text)
        times.append(at)
        print(text, end="", flush=True)
    whole = "".join(parts)
    gaps = [(after - before, after > killed_at > 0) for before, after in zip(times, times[1:], strict=False)]
    usual = sorted(gap for gap, _ in gaps)[len(gaps) // 2]
    pause = max((gap for gap, is_after in gaps if is_after), default=0.0)
    print(f"\n\n  {len(parts)} pieces in one stream; the client saw a pause of {pause * 1e3:.0f} ms")
    print(f"  (usually {usual * 1e3:.0f} ms from one piece to the next) while another engine took the poem over.")
    is_same = whole == undisturbed
    print(f"  It is {'' if is_same else 'NOT '}the poem that comes when nothing is killed, character by character.")
    back = wait_until_ready(address, name)
    print(f"  {name} was started anew and is ready, {back['address']}." if back else f"  {name} is still starting.")
    print("\nThe gateway is stopped. docs/fleet.md has the rest: vLLM behind it, hangs, drains, overload, tenants.")
    return 0 if is_same else 1


def poem(address: str) -> Iterator[tuple[str, float]]:
    """Pieces of text, each with the monotonic second at which it came."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], **ASKED}
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the gateway answered {response.status}: {response.read().decode()}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise SystemExit(f"the stream failed: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield text, time.monotonic()
    connection.close()


def endpoints(address: str) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", "/fleet")
    status = json.loads(connection.getresponse().read())
    connection.close()
    found: list[dict[str, Any]] = status["models"][0]["endpoints"]
    return found


def writer(address: str) -> dict[str, Any]:
    """The endpoint that has the one request of this fleet."""
    return next(endpoint for endpoint in endpoints(address) if endpoint["requests"])


def wait_until_ready(address: str, name: str, seconds: float = 60.0) -> dict[str, Any] | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for endpoint in endpoints(address):
            if endpoint["name"] == name and endpoint["state"] == "ready" and endpoint["restarts"]:
                return endpoint
        time.sleep(0.1)
    return None


if __name__ == "__main__":
    sys.exit(main())
