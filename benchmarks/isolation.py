"""What one tenant learns of another by timing, and what it can take from another by flooding, as Markdown tables.

    python benchmarks/isolation.py             200 + 200 probes of each kind, a minute of each load
    python benchmarks/isolation.py --quick     a look: 40 + 40 probes, 15 seconds of each load

The prober. A victim sends prompts; another tenant then replays them among as many fresh ones, in random order, one at a
time on an idle server, and tries to tell them apart by the time to the first token. How well that works is the area
under the ROC curve: 0.5 is guessing, 1 is certainty. The victim repeats its prompts last, which proves that they were
in the cache all the time. The control is the same with both tenants in one `cache_group`.

The flood. A steady tenant sends less than a third of what the engine can do; a noisy one sends ten times as much and
ignores every refusal. The control is the same with both as one tenant, which is a gateway without fairness.

Both run over `shoal serve` with SmolLM2-135M: one engine, one thread. Exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import machine
import shoal
from measures import percentile

MODEL = "smollm2-135m"
ENGINE = {"dtype": "float32", "threads": 1, "max_sequences": 8, "max_len": 1024, "kv_cache_bytes": "1GiB"}
ROUND = 10
"""Prompts of the victim that are probed together: with those of the prober they must fit into the cache, which is never
larger than what `max_sequences` sequences of `max_len` need."""
PROMPT_TOKENS = 160
MOST_AUC, LEAST_CONTROL_AUC = 0.60, 0.95
ENOUGH = 200
"""Probes of either kind for which a prober that only guesses has an upper bound below MOST_AUC, 13 times in 14."""
BLOCK = 16
VOCAB = 49152
FIRST_TOKEN_ID = 17
"""Ids below are SmolLM2's control tokens."""
STEADY_SHARE = 0.3
"""Of capacity, that the steady tenant sends; the noisy one sends NOISE times that."""
NOISE = 10
LOAD_PROMPT_TOKENS, LOAD_OUTPUT_TOKENS = 64, 16
MAX_WAIT = 10.0
"""Seconds after which a request is refused rather than queued. Shorter than the default, so that short loads settle."""
GOOD_TTFT = 10.0
"""A first token is good if it comes within so many times the median of the tenant alone."""
LEAST_GOOD = 0.9
LEAD_SECONDS = 5.0
"""The noisy tenant begins so long before the steady one is measured."""
TENANTS = {
    "grouped-victim": {"cache_group": "shared"},
    "grouped-prober": {"cache_group": "shared"},
    "limited": {"concurrent_requests": 1},
}
ALONE, FAIR, LIMITED, CONTROL = "alone", "flooded, equal weights", "flooded, limited", "flooded, one tenant (control)"
SCENARIOS = {ALONE: None, FAIR: "noisy", LIMITED: "limited", CONTROL: "steady"}
"""With whose key the flood comes."""
CLIENTS = ("victim", "prober", "grouped-victim", "grouped-prober", "steady", "noisy", "limited")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- the fleet ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    url: str
    keys: dict[str, str]
    pid: int

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}

    def found_in_cache(self) -> float:
        """Prompt tokens so far, by the engine's own count."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers("operator")).text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith("shoal:prefix_cache_hits_total")
        )

    def wait_until_idle(self) -> None:
        while True:
            (model,) = httpx.get(f"{self.url}/fleet", headers=self.headers("operator")).json()["models"]
            if not model["running"] and not model["waiting"]:
                return
            time.sleep(0.2)


@contextlib.contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """As users start it: keys by `shoal keys create`, everything else in the deployment's file."""
    environment = {**os.environ, "PYTHONPATH": str(Path(shoal.__file__).parent.parent), "COLUMNS": "200"}
    command = [sys.executable, "-m", "shoal"]

    def create(tenant: str, *scopes: str) -> str:
        create = [*command, "keys", "create", "--file", str(folder / "keys.json"), "--tenant", tenant]
        create += [part for scope in scopes for part in ("--scope", scope)]
        made = subprocess.run(create, env=environment, check=True, capture_output=True, text=True)
        return made.stdout.strip()

    keys = {name: create(name, "generate") for name in CLIENTS}
    keys["operator"] = create("operator", "read", "metrics")
    model = {"name": MODEL, "model": MODEL, "admission": {"max_wait_seconds": MAX_WAIT}, **ENGINE}
    deployment = {"port": 0, "keys": str(folder / "keys.json"), "tenants": TENANTS, "models": [model]}
    (folder / "fleet.json").write_text(json.dumps(deployment))  # JSON is YAML
    process = subprocess.Popen(
        [*command, "serve", "--deployment", str(folder / "fleet.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the fleet did not start: {line!r}")
        fleet = Fleet(line.split()[-1].removesuffix("/v1"), keys, process.pid)
        while httpx.get(f"{fleet.url}/ready", headers=fleet.headers("operator")).status_code != 200:
            time.sleep(0.1)
        yield fleet
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# --- the prober -----------------------------------------------------------------------------------------------------


@dataclass
class Probing:
    """What the prober saw, and what the engine and the victim knew of it."""

    hits: list[float] = field(default_factory=list)
    """Seconds to the first token of prompts that the victim had sent."""
    misses: list[float] = field(default_factory=list)
    told: list[int | None] = field(default_factory=list)
    """`cached_tokens` in the prober's answers."""
    found: float = 0.0
    """Tokens that the engine found in its cache for the prober."""
    again: float = 0.0
    """Tokens that it found for the victim, which asked once more."""
    foreign: float = 0.0


def probe(fleet: Fleet, victim: str, prober: str, count: int, seed: int) -> Probing:
    rng, seen = random.Random(seed), Probing()
    load = machine.ForeignLoad(fleet.pid)
    with httpx.Client(base_url=fleet.url, timeout=120) as client:
        for begin in range(0, count, ROUND):
            prompts = [_prompt(rng, PROMPT_TOKENS) for _ in range(min(ROUND, count - begin))]
            for prompt in prompts:
                _ask(client, fleet.headers(victim), prompt)
            mixed = [(prompt, seen.hits) for prompt in prompts]
            mixed += [(_prompt(rng, PROMPT_TOKENS), seen.misses) for _ in prompts]
            rng.shuffle(mixed)
            before = fleet.found_in_cache()
            for prompt, times in mixed:
                ttft, cached = _ask(client, fleet.headers(prober), prompt)
                times.append(ttft)
                seen.told.append(cached)
            probed = fleet.found_in_cache()
            for prompt in prompts:
                _ask(client, fleet.headers(victim), prompt)
            seen.found += probed - before
            seen.again += fleet.found_in_cache() - probed
            say(f"{prober}: {len(seen.hits)} of {count}")
    seen.foreign = load.cores()
    return seen


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(length)]


def _body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    options = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, **options}


def _ask(client: httpx.Client, headers: dict[str, str], prompt: list[int]) -> tuple[float, int | None]:
    """Seconds to the first token, and how many cached ones the answer tells of."""
    ttft, usage = None, None
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=_body(prompt, 1), headers=headers) as response:
        if response.status_code != 200:
            raise SystemExit(f"a probe was refused: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                ttft = ttft or time.perf_counter() - began
                usage = json.loads(line[6:]).get("usage") or usage
    if ttft is None or usage is None:
        raise SystemExit("a probe had no answer")
    return ttft, usage["prompt_tokens_details"]["cached_tokens"]


def auc_of_faster(hits: Sequence[float], misses: Sequence[float]) -> tuple[float, float, float]:
    """Chance that a hit is faster than a miss, ties counted half, and its 95% interval (DeLong et al. 1988)."""
    hit, miss = np.asarray(hits)[:, None], np.asarray(misses)[None, :]
    wins = (hit < miss) + 0.5 * (hit == miss)
    auc = float(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / len(hits) + wins.mean(axis=0).var(ddof=1) / len(misses)
    half = 1.96 * float(variance) ** 0.5
    return auc, max(0.0, auc - half), min(1.0, auc + half)


def report_probing(isolated: Probing, shared: Probing) -> bool:
    """Print the table. Whether tenants are isolated, and the measurement would have shown if they were not."""
    print(f"\n## A tenant that times another's prompts ({PROMPT_TOKENS} tokens each)\n")
    head = "| tenants | probes | TTFT of replayed, ms | of fresh, ms | AUC (95%) | told cached | engine found "
    print(f"{head}| victim found again | foreign cores |\n|{' --- |' * 9}")
    for name, seen in (("each its own salt", isolated), ("one cache_group (control)", shared)):
        auc, low, high = auc_of_faster(seen.hits, seen.misses)
        spread = [f"{statistics.median(times) * 1e3:.1f}" for times in (seen.hits, seen.misses)]
        told = ", ".join(dict.fromkeys("hidden" if count is None else str(count) for count in seen.told))
        cells = [name, f"{len(seen.hits)} + {len(seen.misses)}", *spread, f"{auc:.3f} ({low:.3f} to {high:.3f})", told]
        cells += [f"{seen.found:.0f}", f"{seen.again:.0f}", f"{seen.foreign:.2f}"]
        print(f"| {' | '.join(cells)} |")
    cached = len(isolated.hits) * ((PROMPT_TOKENS - 1) // BLOCK * BLOCK)
    auc, _, high = auc_of_faster(isolated.hits, isolated.misses)
    control = auc_of_faster(shared.hits, shared.misses)[0]
    enough = len(isolated.hits) >= ENOUGH
    verdicts = {
        f"isolated: AUC {'and its upper bound ' if enough else ''}at most {MOST_AUC}": max(auc, 1 - auc) <= MOST_AUC
        and (high <= MOST_AUC or not enough),
        "isolated: the prober is told of no cached token and the engine found none": not any(isolated.told)
        and not isolated.found,
        "isolated: the victim's prompts were all in the cache": isolated.again == cached,
        f"control: AUC at least {LEAST_CONTROL_AUC}": control >= LEAST_CONTROL_AUC,
        "control: every replayed prompt was found, and nobody was told": shared.found == cached
        and set(shared.told) == {None},
    }
    return _print_verdicts(verdicts)


def _print_verdicts(verdicts: dict[str, bool]) -> bool:
    print()
    for what, held in verdicts.items():
        print(f"- {'held' if held else '**BROKEN**'}: {what}")
    return all(verdicts.values())


# --- the flood ------------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """Of one tenant in one scenario."""

    ttfts: list[float] = field(default_factory=list)
    completed: int = 0
    refused: int = 0

    @property
    def offered(self) -> int:
        return self.completed + self.refused

    def ttft(self, fraction: float) -> float:
        """A percentile over all that was offered: who is refused waits for ever."""
        return percentile([*self.ttfts, *[math.inf] * self.refused], fraction)

    def good(self, limit: float) -> float:
        """Share of what was offered that had its first token in time."""
        return sum(ttft <= limit for ttft in self.ttfts) / self.offered


class Load:
    """Requests over as many connections as it takes: those that a server makes wait must not hold up others."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(base_url=fleet.url, timeout=120, limits=limits)
        self._fleet = fleet
        self._rng = random.Random(seed)

    async def one(self, name: str, sent: Sent) -> None:
        ttft = None
        body = _body(_prompt(self._rng, LOAD_PROMPT_TOKENS), LOAD_OUTPUT_TOKENS)
        began = time.perf_counter()
        headers = self._fleet.headers(name)
        async with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                if response.status_code not in (429, 503):
                    raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
                sent.refused += 1
                return
            async for line in response.aiter_lines():
                if ttft is None and line.startswith("data: {"):
                    ttft = time.perf_counter() - began
        assert ttft is not None
        sent.ttfts.append(ttft)
        sent.completed += 1

    async def poisson(self, name: str, rate: float, seconds: float, seed: int, sent: Sent) -> None:
        """Open loop: who waits does not send less. Until all have ended."""
        rng, due = random.Random(seed), time.perf_counter()
        end = due + seconds
        async with asyncio.TaskGroup() as group:
            while (due := due + rng.expovariate(rate)) < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self.one(name, sent))

    async def capacity(self, name: str, seconds: float) -> float:
        """Requests a second, with two waiting for each that runs."""
        sent, began = Sent(), time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() < began + seconds:
                await self.one(name, sent)

        async with asyncio.TaskGroup() as group:
            for _ in range(2 * int(ENGINE["max_sequences"])):
                group.create_task(worker())
        return sent.completed / (time.perf_counter() - began)

    async def close(self) -> None:
        await self._client.aclose()


async def flood(fleet: Fleet, seconds: float, seed: int) -> tuple[float, dict[str, tuple[Sent, Sent]]]:
    """Capacity, and by scenario what the steady and the noisy tenant had of it."""
    load = Load(fleet, seed)
    await load.one("steady", Sent())
    capacity = await load.capacity("steady", max(8.0, seconds / 4))
    rate = capacity * STEADY_SHARE
    say(f"capacity: {capacity:.2f} requests a second")
    results: dict[str, tuple[Sent, Sent]] = {}
    for scenario, noisy in SCENARIOS.items():
        await asyncio.to_thread(fleet.wait_until_idle)
        steady, noise = results[scenario] = Sent(), Sent()
        async with asyncio.TaskGroup() as group:
            flooding = None
            if noisy is not None:
                flooding = group.create_task(load.poisson(noisy, NOISE * rate, math.inf, seed + 1, noise))
                await asyncio.sleep(LEAD_SECONDS)
            # The same arrivals in every scenario. The flood goes on until the last one has its answer.
            await load.poisson("steady", rate, seconds, seed, steady)
            if flooding is not None:
                flooding.cancel()
        say(f"{scenario}: {steady.completed} of {steady.offered} completed")
    await load.close()
    return capacity, results


def report_flood(capacity: float, results: dict[str, tuple[Sent, Sent]]) -> bool:
    """Print the table. Whether the steady tenant was kept from harm, and would not have been without fairness."""
    print(f"\n## A tenant that floods ({LOAD_PROMPT_TOKENS} tokens in, {LOAD_OUTPUT_TOKENS} out)\n")
    base, limit = results[ALONE][0].ttft(0.99), GOOD_TTFT * results[ALONE][0].ttft(0.5)
    rate = capacity * STEADY_SHARE
    print(f"Requests a second: capacity {capacity:.1f}, steady tenant {rate:.1f}, noisy tenant {NOISE * rate:.1f}.")
    print(f"Good is a first token within {_ms(limit)} ms, {GOOD_TTFT:g} times the median alone.\n")
    print(
        "| steady tenant | offered | refused | TTFT p50, ms | p99 | p99 beside alone | good | noisy tenant: completed ",
        end="",
    )
    print(f"| refused |\n|{' --- |' * 9}")
    for scenario, (steady, noise) in results.items():
        cells = [scenario, str(steady.offered), str(steady.refused), *(_ms(steady.ttft(part)) for part in (0.5, 0.99))]
        ratio = steady.ttft(0.99) / base
        cells += [f"{ratio:.1f} x" if math.isfinite(ratio) else "-", f"{steady.good(limit):.1%}"]
        cells += [str(noise.completed), str(noise.refused)] if noise.offered else ["-", "-"]
        print(f"| {' | '.join(cells)} |")
    alone, fair, limited, control = (results[name][0] for name in SCENARIOS)
    verdicts = {
        "the flood was more than the engine could do: some of it was refused": all(
            results[name][1].refused for name in (FAIR, LIMITED)
        ),
        "no request of the steady tenant was refused": not alone.refused + fair.refused + limited.refused,
        f"at least {LEAST_GOOD:.0%} of it was good": min(fair.good(limit), limited.good(limit)) >= LEAST_GOOD,
        "control: as one tenant at most half of it was good": control.good(limit) <= 0.5,
    }
    return _print_verdicts(verdicts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if math.isfinite(seconds) else "refused"


def main() -> int:
    parser = argparse.ArgumentParser(description="Isolation of tenants, as Markdown tables.")
    parser.add_argument("--quick", action="store_true", help="40 + 40 probes, 15 seconds of each load")
    parser.add_argument("--seed", type=int, default=1, help="of prompts, order and arrivals; default 1")
    parser.add_argument("--only", choices=["prober", "flood"], help="one of the two")
    arguments = parser.parse_args()
    count, seconds = (40, 15.0) if arguments.quick else (200, 60.0)
    held = []
    what = machine.describe()
    print(
        f"# Isolation of tenants\n\n{what['cpu']}, {what['cores']} cores, shoal {shoal.__version__}, {MODEL} float32, ",
        end="",
    )
    print(f"one engine with one thread, seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder, running_fleet(Path(folder)) as fleet:
        if arguments.only != "flood":
            isolated = probe(fleet, "victim", "prober", count, arguments.seed)
            shared = probe(fleet, "grouped-victim", "grouped-prober", count, arguments.seed)
            held.append(report_probing(isolated, shared))
        if arguments.only != "prober":
            held.append(report_flood(*asyncio.run(flood(fleet, seconds, arguments.seed))))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
