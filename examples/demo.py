"""`make demo`: fetch the default model, serve it, stream one answer, stop, and say how to go on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

MODEL = "smollm2-135m"
QUESTION = "In one sentence: why does a shoal of fish turn as one?"
SHOAL = str(Path(sys.executable).parent / "shoal")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit("the server did not start; see above")


def stream_answer(url: str) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first = time.monotonic(), 0.0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                first = first or (time.monotonic() if text else 0.0)
                print(text, end="", flush=True)
    rate = (tokens - 1) / max(1e-9, time.monotonic() - first)
    print(f"\n\n  {tokens} tokens, the first after {(first - began) * 1e3:.0f} ms, then {rate:.0f} a second\n")


def main() -> None:
    subprocess.run([SHOAL, "pull", MODEL], check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"$ shoal serve {MODEL} --port {port}", flush=True)
    with subprocess.Popen([SHOAL, "serve", MODEL, "--port", str(port)]) as server:
        try:
            wait_until_ready(url, server)
            print(f"\n> {QUESTION}\n", flush=True)
            stream_answer(url)
        finally:
            server.terminate()
    venv = Path(sys.executable).parent
    print("Go on with:\n")
    print(f"  {venv}/shoal serve {MODEL}        # http://127.0.0.1:8000/v1 for any OpenAI client")
    print(f"  {venv}/shoal chat {MODEL}         # talk to it here")
    print(f"  {venv}/shoal --help")


if __name__ == "__main__":
    main()
