"""A fault run: first undisturbed, to compare with; then each fault under load, with its proof, its control, its row."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from shoal.bench.faults.catalogue import KINDS, Arena, Kind
from shoal.bench.faults.clients import Client, Load, Outcome, Phase
from shoal.bench.faults.deployment import Deployment, DeploymentError, FleetWatch
from shoal.bench.faults.hostile import Overload
from shoal.bench.faults.injectors import NotInjected
from shoal.bench.faults.oracle import Tally, differences, tally
from shoal.bench.faults.proxy import ProxyThread
from shoal.bench.faults.report import Report, Row
from shoal.bench.faults.workload import Spec, mix, unseen, with_stop
from shoal.bench.processes import comes_true
from shoal.core.fleet_types import EndpointStatus

_PHASES: tuple[Phase, ...] = ("queued", "prefill", "first_token", "decode", "last_token")

OPENED_AHEAD = 2
"""Idle connections to an endpoint that a gateway keeps ready: SPARE_CONNECTIONS of serve/http_client.py, by a test."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    faults: tuple[str, ...] = ()
    """Empty is all of them."""
    streams: int = 32
    kills: int = 5
    """Times that faults with phases are repeated."""
    seed: int = 0
    requests: int = 24
    """Different requests."""
    max_tokens: int = 48
    undisturbed_seconds: float = 10.0
    patience: float = 60.0
    """A request without an end after so many seconds is lost."""
    window: float | None = None
    """Seconds for which faults that stay do so; None is each one's own."""
    warm_seconds: float = 1.0
    """Of load before a fault, so that requests are in every phase."""
    settle_seconds: float = 15.0
    """In which a fleet without requests must have freed everything."""
    return_seconds: float = 120.0
    """In which an endpoint must serve again."""
    greedy_only: bool = False
    model: str = ""
    """Of the deployment's; empty is its first."""
    headers: dict[str, str] = {}


Progress = Callable[[str, int, int], None]
"""(what happens now, faults done, faults in all)."""


def chosen(names: Sequence[str]) -> list[Kind]:
    """Kinds by name, in the catalogue's order. Raises DeploymentError for a name that is none."""
    known = [kind.name for kind in KINDS]
    for name in names:
        if name not in known:
            raise DeploymentError(f"there is no fault {name!r}; there are {', '.join(known)}")
    return [kind for kind in KINDS if not names or kind.name in names]


async def run_suite(deployment: Deployment, options: Options, progress: Progress) -> Report:
    """The deployment has been started."""
    kinds = chosen(options.faults)
    watch = FleetWatch(deployment)
    await watch.start()
    suite = None
    try:
        progress("waits for every endpoint", 0, len(kinds))
        if not await comes_true(lambda: watch.all_ready, options.return_seconds, every=0.05):
            states = ", ".join(f"{endpoint.name} is {endpoint.state}" for endpoint in watch.endpoints.values())
            raise DeploymentError(f"not every endpoint became ready: {states or 'there is none'}")
        suite = Suite(deployment, watch, options)
        progress("runs undisturbed", 0, len(kinds))
        await suite.measure_undisturbed()
        rows = []
        for number, kind in enumerate(kinds):
            progress(kind.name, number, len(kinds))
            rows.append(await suite.row(kind))
        return suite.report(rows)
    finally:
        if suite is not None:
            suite.arena.close()
        await watch.stop()


class Suite:
    """What all faults of a run share: the requests, their undisturbed answers, and the arena."""

    def __init__(self, deployment: Deployment, watch: FleetWatch, options: Options) -> None:
        assert watch.status is not None, "the watch has looked"
        self._deployment = deployment
        self._watch = watch
        self._options = options
        self._rng = random.Random(options.seed)
        self._via_proxies = False
        models = [model.name for model in watch.status.models]
        model = options.model or models[0]
        if model not in models:
            raise DeploymentError(f"the deployment has no model {model!r}; it has {', '.join(models)}")
        self._specs = mix(
            model,
            seed=options.seed,
            count=options.requests,
            max_tokens=options.max_tokens,
            greedy_only=options.greedy_only,
        )
        self._client = Client(self._urls, options.headers, patience=options.patience, name=f"faults-{options.seed}")
        self.arena = Arena(
            deployment,
            watch,
            model=model,
            headers=options.headers,
            rng=self._rng,
            specs=self._specs,
            client=self._client,
        )
        self.references: dict[int, Outcome] = {}
        self.unstable: list[Spec] = []
        self._undisturbed = Tally()
        self._prefill_seconds = 0.05
        self._prefill_again = 0.0
        """Seconds in which the others prefill what an endpoint has, beside what they do anyway."""
        self._strikes: list[tuple[float, float]] = []
        """From when until when the faults of the present row struck."""

    def _urls(self) -> list[str]:
        urls = self._deployment.urls()
        return [self.arena.client_proxies[url].url for url in urls] if self._via_proxies else urls

    # --- without faults ---------------------------------------------------------------------------------------------

    async def measure_undisturbed(self) -> None:
        """Every request once, then all under load: what differs between the two can be compared with nothing."""
        limit = asyncio.Semaphore(max(1, self._options.streams // 2))

        async def ask(spec: Spec) -> Outcome:
            async with limit:
                return await self._client.run(spec)

        await self._use_every_gateway()
        stops = [spec for spec in self._specs if spec.feature == "stop"]
        for spec, outcome in zip(stops, await asyncio.gather(*map(ask, stops)), strict=True):
            self._specs[spec.number] = with_stop(spec, outcome.choices[0].text if outcome.choices else "")
        for spec, outcome in zip(self._specs, await asyncio.gather(*map(ask, self._specs)), strict=True):
            if outcome.end != "completed":
                raise DeploymentError(f"request {spec.label} {outcome.end} without any fault: {outcome.error}")
            self.references[spec.number] = outcome
        load = self.load()
        began = time.monotonic()
        load.start()
        await asyncio.sleep(self._options.undisturbed_seconds)
        await load.stop()
        self._learn(load.outcomes, time.monotonic() - began)
        await self._measure_prefill()

    async def _measure_prefill(self) -> None:
        """As many prompts as move when an endpoint is lost, as long as these are, at once, and cached nowhere.

        Each endpoint gets as many as when an equal share of the clients' requests moves to all others.
        """
        load = self.load()
        load.start()
        await asyncio.sleep(self._options.warm_seconds)
        count = -(-self._options.streams // max(1, len(self._watch.endpoints) - 1))
        known = [outcome.usage for outcome in self.references.values() if outcome.usage is not None]
        length = sum(prompt + generated // 2 for prompt, generated in known) // max(1, len(known))
        specs = [unseen(self.arena.model, max(1, length), self._rng) for _ in range(count)]
        outcomes = await asyncio.gather(*(self._client.run(spec) for spec in specs))
        await load.stop()
        self._prefill_again = max(
            ((outcome.first_token or outcome.ended) - outcome.sent for outcome in outcomes), default=0.0
        )

    async def _use_every_gateway(self) -> None:
        """What one starts only when it is first needed would look like a leak of the next fault."""
        options = self._options
        spec = next((spec for spec in self._specs if spec.feature == "schema"), self._specs[0])
        for url in self._deployment.urls():
            client = Client(partial(list[str], [url]), options.headers, patience=options.patience, name="first")
            await client.run(spec)

    def _learn(self, outcomes: list[Outcome], seconds: float) -> None:
        differing = {
            outcome.spec
            for outcome in outcomes
            if outcome.end == "completed" and differences(outcome, self.references[outcome.spec])
        }
        self.unstable = [spec for spec in self._specs if spec.number in differing]
        self._undisturbed = tally(outcomes, self.references, differing)
        bad = self._undisturbed.failed + self._undisturbed.lost
        if bad:
            raise DeploymentError(f"{bad} requests failed without any fault: {self._undisturbed.complaints[0]}")
        waits = sorted(o.first_token - o.sent for o in outcomes if o.first_token is not None)
        if waits:
            self._prefill_seconds = waits[len(waits) // 2] / 2
        self.arena.capacity = self._undisturbed.completed / seconds
        self.arena.tokens_per_second = self._undisturbed.tokens / seconds
        self.arena.longest_answer = max(outcome.ended - outcome.sent for outcome in outcomes)

    def load(self) -> Load:
        """Clients that have not begun yet."""
        lengths = {number: outcome.num_tokens for number, outcome in self.references.items()}
        load = Load(
            self._client,
            self._specs,
            lengths,
            streams=self._options.streams,
            seed=self._rng.getrandbits(32),
        )
        load.prefill_seconds = self._prefill_seconds
        return load

    # --- one fault --------------------------------------------------------------------------------------------------

    async def row(self, kind: Kind) -> Row:
        if reason := kind.lacks(self.arena):
            return Row(fault=kind.name, skipped=reason)
        row = Row(fault=kind.name)
        self._strikes.clear()
        began = time.time()
        await self._use_every_gateway()
        await self._settle()
        before = self._deployment.footprint()
        if kind.through_proxies:
            self.go_through_proxies()
        try:
            row.control = await self._control(kind)
            outcomes = await self._under_load(kind, row)
        except NotInjected as error:
            row.breaches.append(f"not proved: {error}")
            outcomes = []
        finally:
            self._via_proxies = False
        row.tally = tally(outcomes, self.references, [spec.number for spec in self.unstable], self._strikes)
        await self._look_for_leaks(row, before)
        if self._watch.status is not None:
            row.events = [f"{e.kind}: {e.message}" for e in self._watch.status.events if e.time >= began]
        self._judge(kind, row)
        return row

    async def _control(self, kind: Kind) -> str:
        """The same fault aimed at nothing, under the same load: its proof must fail. Raises NotInjected if it holds."""
        load = self.load()
        if kind.loaded:
            load.start()
            await asyncio.sleep(self._options.warm_seconds)
        self.arena.target = self._pick(kind)
        try:
            fault = kind.make(self.arena, True)
            try:
                await fault.inject()
                await asyncio.sleep(min(self._window(kind), self._options.warm_seconds))
                proof = await fault.verify()
            finally:
                await fault.heal()
        except NotInjected as error:
            return str(error)
        finally:
            self.arena.end_control()
            await load.stop()
        raise NotInjected(f"aimed at nothing it was proved all the same: {proof}")

    async def _under_load(self, kind: Kind, row: Row) -> list[Outcome]:
        load = self.load()
        if kind.loaded:
            load.start()
            await asyncio.sleep(self._options.warm_seconds)
        extra: list[Outcome] = []
        try:
            for number in range(self._options.kills if kind.by_phase else 1):
                if kind.by_phase:
                    if number:
                        await asyncio.sleep(self._options.warm_seconds)  # what came back gets its share of the load
                    await load.reach(_PHASES[number % len(_PHASES)], 5.0)
                extra += await self.strike(kind, row, load)
        finally:
            await load.stop()
        return load.outcomes + extra

    async def strike(self, kind: Kind, row: Row, load: Load) -> list[Outcome]:
        """One fault, proved and healed, while clients are at work. What came of requests of its own is returned."""
        self.arena.target = target = self._pick(kind)
        has_process = target is not None and self._deployment.process_of(target) is not None
        fault = kind.make(self.arena, False)
        for phase, count in load.census().items():
            row.phases[phase] = row.phases.get(phase, 0) + count
        began = time.monotonic()
        try:
            await fault.inject()
            await asyncio.sleep(self._window(kind))
            row.evidence.append(await fault.verify())
            row.injected += 1
        finally:
            self._strikes.append((began, time.monotonic()))
            await fault.heal()
            row.breaches += fault.breaches
        if kind.contract.returns and target is not None:
            await self._await_return(target.name, began, row, has_process=has_process)
        elif target is not None and (noticed := self._watch.noticed(target.name, began)) is not None:
            row.detection = max(row.detection or 0.0, noticed - began)
        return fault.outcomes if isinstance(fault, Overload) else []

    async def _await_return(self, name: str, began: float, row: Row, *, has_process: bool) -> None:
        def returned() -> bool:
            endpoint = self._watch.endpoints.get(name)
            lives = endpoint is not None and self._deployment.process_of(endpoint) is not None
            return self._watch.restored(name, began) is not None and self._watch.all_ready and lives >= has_process

        until = time.monotonic() + self._options.return_seconds
        target = self._watch.endpoints.get(name)
        # A gateway that has noticed nothing yet still calls it ready.
        while target is not None and not await self._deployment.serves(target) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        came = await comes_true(returned, until - time.monotonic(), every=0.05)
        noticed, restored = self._watch.noticed(name, began), self._watch.restored(name, began)
        if noticed is None:
            row.breaches.append(f"/fleet never showed that {name} was gone")
            return
        row.detection = max(row.detection or 0.0, noticed - began)
        if not came or restored is None:
            row.breaches.append(f"{name} did not serve again within {self._options.return_seconds:g} s")
            return
        row.recovery = max(row.recovery or 0.0, restored - began)

    def _pick(self, kind: Kind) -> EndpointStatus | None:
        """The busiest that is ready and can be its target, so that the fault strikes what matters."""
        able = [endpoint for endpoint in self._watch.ready if kind.target(self.arena, endpoint)]
        return max(able, key=lambda endpoint: (endpoint.requests, self._rng.random()), default=None)

    def _window(self, kind: Kind) -> float:
        return self._options.window if kind.window and self._options.window is not None else kind.window

    def go_through_proxies(self) -> None:
        """Requests from now on, so that clients' connections can be reset."""
        for gateway in self._deployment.gateways:
            if gateway.url not in self.arena.client_proxies:
                self.arena.client_proxies[gateway.url] = ProxyThread("127.0.0.1", gateway.port)
        self._via_proxies = True

    # --- what must hold ---------------------------------------------------------------------------------------------

    async def _settle(self) -> bool:
        return await comes_true(
            lambda: self._watch.all_ready and self._watch.idle, self._options.settle_seconds, every=0.05
        )

    async def _look_for_leaks(self, row: Row, before: dict[str, int]) -> None:
        if not await self._settle():
            row.breaches.append(
                f"the fleet was not idle and ready {self._options.settle_seconds:g} s after the last request"
            )
        row.kv_left = self._watch.kv_usage

        # Connections to endpoints that speak HTTP are kept to be used again: of each as many as clients were at it, and
        # those that are opened ahead.
        by_http = sum(endpoint.kind == "openai" for endpoint in self._watch.endpoints.values())
        pooled = (self._options.streams + OPENED_AHEAD) * by_http

        def grown() -> dict[str, int]:
            after = self._deployment.footprint()
            more = {what: after.get(what, 0) - count for what, count in before.items()}
            return {what: by for what, by in more.items() if by > (pooled if what.startswith("files") else 0)}

        # Connections end a moment after their answers.
        await comes_true(lambda: not grown(), 5.0, every=0.1)
        row.left_over = grown()

    def _judge(self, kind: Kind, row: Row) -> None:
        t, contract = row.tally, kind.contract
        for name in ("failed", "lost", "duplicate_tokens", "missing_tokens", "other_tokens", "unequal"):
            if count := getattr(t, name):
                row.breaches.append(f"{count} {name.replace('_', ' ')}")
        if t.refused + t.expired and not contract.refusals:
            row.breaches.append(f"{t.refused} refused, {t.expired} expired")
        if t.breaks and not contract.breaks:
            row.breaches.append(f"{t.breaks} answers were broken off")
        if t.unanswered and not (contract.breaks or contract.refusals):
            row.breaches.append(f"{t.unanswered} connections were broken off before an answer")
        row.breaches += t.complaints
        if contract.gap_seconds is not None:
            row.gap_limit = self._prefill_again + contract.gap_seconds
            if t.gap_at_fault > row.gap_limit:
                row.late.append(f"a fault made a gap of {t.gap_at_fault:.2f} s, over {row.gap_limit:.2f} s")
        if contract.detect_seconds is not None and (row.detection or 0.0) > contract.detect_seconds:
            row.late.append(f"noticed after {row.detection:.2f} s, later than {contract.detect_seconds:g} s")
        if row.kv_left:
            row.breaches.append(f"{row.kv_left:.1%} of KV blocks were left in use")
        row.breaches += [f"{count} more {what} than before" for what, count in row.left_over.items()]

    def report(self, rows: list[Row]) -> Report:
        return Report(
            version=self._options.version,
            seed=self._options.seed,
            streams=self._options.streams,
            endpoints=[f"{e.name} ({e.kind} {e.layout} {e.dtype})".strip() for e in self._watch.endpoints.values()],
            undisturbed=self._undisturbed,
            prefill_again=self._prefill_again,
            capacity=self.arena.capacity,
            tokens_per_second=self.arena.tokens_per_second,
            unstable=[spec.label for spec in self.unstable],
            rows=rows,
        )


async def run_faults(
    file: Path, options: Options, progress: Progress, *, environment: dict[str, str] | None = None
) -> Report:
    """Start the deployment, run, and leave nothing behind. Two gateways are started where a fault needs them."""
    needs_two = any(kind.name.startswith("gateway-") for kind in chosen(options.faults))
    deployment = Deployment(file, gateways=1 + needs_two, headers=options.headers, environment=environment)
    try:
        progress("starts the deployment", 0, len(chosen(options.faults)))
        await deployment.start()
        return await run_suite(deployment, options, progress)
    finally:
        with contextlib.suppress(ProcessLookupError):
            await deployment.stop()
