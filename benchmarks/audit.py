"""Time that the audit log takes of a request on the hot path: `AuditLog.record`, and what the thread behind it costs.

    python benchmarks/audit.py

Two tables. The first times each call while records come at a steady rate, as requests do, with the thread at work
beside it; between two calls the caches grow cold, as they do between requests. The second is how many records a second
the thread encodes, hashes and writes when nothing holds it up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from shoal.serve.audit.events import RequestCompleted
from shoal.serve.audit.log import AuditConfig, AuditLog

TARGET_US = 20.0


def completed(number: int) -> RequestCompleted:
    """As large as a real one."""
    return RequestCompleted(
        request_id=f"chatcmpl-{number:032x}",
        tenant="acme",
        key_id="k7f3a9c2e",
        address="127.0.0.1",
        model="llama-70b",
        served_model="smollm2-135m",
        degradation="llama-70b is down",
        route="/v1/chat/completions",
        weights_digest="ab" * 32,
        config_digest="cd" * 32,
        endpoints=["llama-70b/0", "smollm2-135m/1"],
        retries=1,
        parameters={"temperature": 0.7, "top_p": 0.95, "max_tokens": 256},
        prompt_tokens=512,
        completion_tokens=64,
        finish_reasons=["stop"],
        status=200,
        ttft_ms=120,
        duration_ms=1900,
    )


def record_times(directory: Path, *, rate: float, count: int, prompt_tokens: int) -> tuple[list[float], list[float]]:
    """Microseconds of making each event, and of recording it, at `rate` calls a second."""
    log = AuditLog(AuditConfig(directory=str(directory)))
    prompt = list(range(prompt_tokens))
    making, recording = [], []
    due = time.perf_counter()
    for number in range(count):
        due += 1 / rate
        while (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        began = time.perf_counter()
        event = completed(number)
        made = time.perf_counter()
        log.record(event, prompt=prompt)
        recording.append((time.perf_counter() - made) * 1e6)
        making.append((made - began) * 1e6)
    if not log.close() or log.lost:
        raise RuntimeError(f"the log lost events: {log.state}")
    return making, recording


def written_per_second(directory: Path, *, count: int, fsync: str) -> float:
    config = AuditConfig(directory=str(directory), queue_records=count + 10, fsync=fsync)  # type: ignore[arg-type]
    log = AuditLog(config)
    prompt = list(range(512))
    began = time.perf_counter()
    for number in range(count):
        log.record(completed(number), prompt=prompt)
    log.close(timeout=600)
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the audit log's calls, as Markdown tables.")
    parser.add_argument("--records", type=int, default=5000, help="of each row; default 5000")
    arguments = parser.parse_args()
    if arguments.records < 100:
        parser.error(f"--records must be at least 100, got {arguments.records}")
    print(f"AuditLog.record of a completed request, and the making of its event, microseconds (target {TARGET_US:g})\n")
    print("| requests a second | prompt tokens | record: median | p99 | event: median | p99 |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for rate, prompt_tokens in ((400.0, 512), (2000.0, 512), (400.0, 8192)):
            times = record_times(Path(folder), rate=rate, count=arguments.records, prompt_tokens=prompt_tokens)
            cells = [
                f"{statistics.median(part):.1f} | {statistics.quantiles(part, n=100)[98]:.1f}" for part in times[::-1]
            ]
            print(f"| {rate:g} | {prompt_tokens} | {' | '.join(cells)} |")
        print("\nThe thread behind it, on its own\n\n| fsync | records a second |\n| --- | --- |")
        for fsync in ("interval", "record"):
            print(f"| {fsync} | {written_per_second(Path(folder), count=arguments.records, fsync=fsync):,.0f} |")


if __name__ == "__main__":
    main()
