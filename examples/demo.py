"""`make demo`: fetch a small model, serve it, stream one answer to the terminal, stop, and say how to go on.

The client is the standard library's: what the server sends is plain HTTP with server-sent events.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from pathlib import Path

MODEL = "smollm2-135m"
QUESTION = "In one sentence: why does a shoal of fish turn as one?"
SHOAL = str(Path(sys.executable).parent / "shoal")


def main() -> int:
    print(f"$ shoal pull {MODEL}", flush=True)
    subprocess.run([SHOAL, "pull", MODEL], check=True)
    # Port 0 is any free one: the demo works beside whatever else listens here.
    print(f"\n$ shoal serve {MODEL} --port 0", flush=True)
    with subprocess.Popen([SHOAL, "serve", MODEL, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            address = wait_for_address(server)
            if address is None:
                return server.wait() or 1
            stream_answer(address)
        finally:
            server.terminate()
    print("The server is stopped. To go on:\n")
    print(f"  {SHOAL} serve {MODEL}     # http://127.0.0.1:8000/v1 for any OpenAI client")
    print(f"  {SHOAL} chat {MODEL}      # talk with it here")
    print(f"  {SHOAL} --help")
    return 0


def wait_for_address(server: subprocess.Popen[str]) -> str | None:
    """host:port as soon as the server says that it listens; None if it ends instead."""
    for line in server.stdout or ():
        print(line, end="", flush=True)
        if found := re.search(r"http://(\S+)/v1", line):
            return found[1]
    return None


def stream_answer(address: str) -> None:
    """One chat completion, printed as it comes."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"\n> {QUESTION}\n", flush=True)
    connection = http.client.HTTPConnection(address, timeout=120)
    sent = first = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    num_tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            if text and first == sent:
                first = time.monotonic()
            print(text, end="", flush=True)
    connection.close()
    rate = (num_tokens - 1) / max(1e-9, time.monotonic() - first)
    print(f"\n\n  {num_tokens} tokens, the first after {(first - sent) * 1e3:.0f} ms, then {rate:.0f} a second\n")


if __name__ == "__main__":
    sys.exit(main())
