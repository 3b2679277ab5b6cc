"""`make demo`: fetch a small model, serve it, stream one answer to the terminal, stop. Uses the standard library alone."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path

MODEL = "smollm2-135m"
QUESTION = "Why do fish swim in schools? Answer in three sentences."
SHOAL = [sys.executable, "-m", "shoal"]


def main() -> int:
    print(f"\n$ shoal pull {MODEL}", flush=True)
    subprocess.run([*SHOAL, "pull", MODEL], check=True)
    print(f"\n$ shoal serve {MODEL} --port 0", flush=True)
    # Port 0 is any free one: the demo works beside whatever else runs here.
    server = subprocess.Popen([*SHOAL, "serve", MODEL, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        address = wait_for_address(server)
        if address is None:
            return server.wait() or 1
        stream_answer(address)
    finally:
        server.terminate()
        server.wait()
    how_to_go_on()
    return 0


def wait_for_address(server: subprocess.Popen[str]) -> str | None:
    """host:port, once the server says that it listens; None if it ended instead."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"http://(\S+)/v1", line):
            return found[1]
    return None


def stream_answer(address: str) -> None:
    """One chat completion, printed as it comes."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
    }
    print(f"\n$ curl -N http://{address}/v1/chat/completions -d '{json.dumps(request)}'\n", flush=True)
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
    print("\n", flush=True)
    connection.close()


def how_to_go_on() -> None:
    command = Path(sys.executable).parent / "shoal"
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    print(f"""\
The server is stopped. To go on:

  {shown} chat {MODEL}            talk with it here
  {shown} serve {MODEL}           an OpenAI-compatible API on http://127.0.0.1:8000/v1
  {shown} serve {MODEL} --dtype int8      the same, faster
  {shown} --help                         everything else; docs/ has a page on each command
""")


if __name__ == "__main__":
    sys.exit(main())
