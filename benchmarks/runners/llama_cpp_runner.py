"""llama.cpp's server with parallel slots, driven over HTTP from this process; standard library only.

The server is started for each workload, outside of the measured time, with as many slots as there are requests and no
longer a context than they need: its best configuration for each.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from typing import Any

from protocol import Recorder, die_with_parent, peak_rss_bytes, serve

START_TIMEOUT = 60.0
"""Seconds."""
POLL_INTERVAL = 0.02


class LlamaServer:
    """One llama-server process."""

    def __init__(self, options: dict[str, Any], num_slots: int, slot_len: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        threads = str(options["threads"])
        command = [options["server"], "--model", options["model"], "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--parallel", str(num_slots), "--ctx-size", str(num_slots * slot_len)]
        command += ["--threads", threads, "--threads-batch", threads, "--no-warmup", "--log-disable"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)  # noqa: PLW1509
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self.process.returncode}")
            try:
                if asyncio.run(self._health()) == 200:
                    return
            except OSError:
                pass
            time.sleep(POLL_INTERVAL)
        raise RuntimeError(f"llama-server was not ready after {START_TIMEOUT:.0f} s")

    async def _health(self) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        return int(status.split()[1])

    async def complete(self, index: int, item: dict[str, Any], recorder: Recorder) -> None:
        """Stream one completion; tokens are recorded as they arrive."""
        body = json.dumps(
            {
                "prompt": item["prompt"],
                "n_predict": item["max_tokens"],
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "stream": True,
                "return_tokens": True,
            }
        ).encode()
        # The default limit of a line, 64 KiB, is less than the last event, which repeats the prompt.
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        writer.write(
            b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        status = await reader.readline()
        if int(status.split()[1]) != 200:
            raise RuntimeError(
                f"llama-server answered {status.decode().strip()}: {(await reader.read()).decode()[:300]}"
            )
        num_tokens = 0
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue  # HTTP headers, chunk sizes, blank lines
            event = json.loads(line[6:])
            if event["stop"]:
                # Text that is no whole character yet is held back, and its tokens with it: they count, undated, here.
                missing = event["tokens_predicted"] - num_tokens
                recorder.add(index, [-1] * missing)
                break
            recorder.add(index, event["tokens"])
            num_tokens += len(event["tokens"])
        writer.close()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LlamaCppEngine:
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options: `server` (executable), `model` (.gguf), `threads`."""
        self._options = options
        self.run([{"prompt": [100], "max_tokens": 1}])
        return {"first_token_at": self._done_at}

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        slot_len = max(len(item["prompt"]) + item["max_tokens"] for item in items)
        server = LlamaServer(self._options, len(items), -(-slot_len // 256) * 256)
        try:
            # The first pass over a fresh context sets up its buffers: not the engine's usual speed.
            asyncio.run(_serve_all(server, [{"prompt": [100, 101], "max_tokens": 2}]))
            recorder = asyncio.run(_serve_all(server, items))
            self._done_at = time.monotonic()
            return recorder.result() | {"peak_rss_bytes": peak_rss_bytes(server.process.pid)}
        finally:
            server.stop()

    def close(self) -> None:
        """No server runs between workloads."""


async def _serve_all(server: LlamaServer, items: list[dict[str, Any]]) -> Recorder:
    recorder = Recorder(items)
    await asyncio.gather(*(server.complete(index, item, recorder) for index, item in enumerate(items)))
    return recorder


if __name__ == "__main__":
    serve(LlamaCppEngine())
