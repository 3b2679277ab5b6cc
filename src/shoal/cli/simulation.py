"""`shoal simulate`: a deployment file and flags to a simulation, run with a bar, its report printed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import msgspec
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from shoal.cli.calibration_file import read_calibration
from shoal.cli.errors import CommandError
from shoal.cli.simulation_report import Result, Setup, print_result, write_requests
from shoal.cli.terminal import error_console, format_bytes, passing_bar, print_json
from shoal.cli.trace_file import read_trace
from shoal.config import ConfigError, load_config
from shoal.core.config import SchedulerConfig
from shoal.core.cost.calibration import Calibration
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision, EngineShape, StepShape, WeightPrecision
from shoal.core.hardware import Cluster, LinkSpec
from shoal.core.request_trace import TraceError
from shoal.core.router import Router
from shoal.plan import catalogue, units
from shoal.plan.models import ModelError, model_shape
from shoal.plan.units import show_duration
from shoal.serve.deployment import Deployment, DeploymentError, ModelDeployment, check
from shoal.sim.autoscale import Autoscaler, Autoscaling, AutoscalingError, Measure
from shoal.sim.faults import Fault, FaultError, parse, schedule
from shoal.sim.fleet_simulation import FleetSimulation, FrontEnd
from shoal.sim.gateway import Rules
from shoal.sim.law import Laws, remembered
from shoal.sim.requests import Arrival
from shoal.sim.summary import Target, summarise
from shoal.sim.traces import arrivals, synthetic

VOCABULARY = 1 << 31
"""Token ids of a simulation are names, one a prompt or a block of it: they need not be the model's."""
Number = TypeVar("Number", int, float)
REPORT_SECONDS = 1.0
"""Live, an engine reports its load with every step. It tells a router what other gateways sent, and here are none."""
_DEFAULT_SECONDS = 600.0
_SHORTEST_INTERVAL = 0.1
_TYPICAL_STEP = StepShape(decode_rows=1, decode_context=1, sampled=1)
_SCALE_TARGETS = {"queue": 4.0, "running": 0.7, "kv": 0.7}


@dataclass(frozen=True, kw_only=True)
class Options:
    """As the flags are written."""

    on: str
    trace: Path | None = None
    rate: str | None = None
    input_tokens: str | None = None
    output_tokens: str | None = None
    spread: float = 0.5
    requests: int | None = None
    duration: str | None = None
    prefix: str | None = None
    repeat: int = 1
    longest_pause: str | None = None
    seed: int = 0
    model: str = ""
    replicas: int | None = None
    weights: str | None = None
    cache: str | None = None
    profile: str = "shoal"
    calibration: Path | None = None
    start: str = "60s"
    faults: tuple[str, ...] = ()
    faults_file: Path | None = None
    scale_on: Measure | None = None
    scale_target: float | None = None
    min_replicas: int = 1
    max_replicas: int | None = None
    scale_down_after: str = "300s"
    until: str | None = None
    ttft: str | None = None
    tpot: str | None = None
    e2e: str | None = None
    interval: str = "10s"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What every replica is."""

    shape: EngineShape
    cost: CostModel
    scheduler: SchedulerConfig
    calibration: Calibration | None

    def slower_link(self, factor: float) -> Laws:
        """Where links have 1/factor of their bandwidth."""
        cluster = self.shape.cluster
        network = None if cluster.network is None else _slower(cluster.network, factor)
        slow = msgspec.structs.replace(cluster, scale_up=_slower(cluster.scale_up, factor), network=network)
        return _laws(CostModel(msgspec.structs.replace(self.shape, cluster=slow), self.calibration))


def _laws(cost: CostModel) -> Laws:
    return Laws(remembered(cost.seconds), cost.stage_seconds if cost.engine.layout.pp > 1 else None)


def run_simulation(file: Path, options: Options, *, course: bool, requests_csv: Path | None, as_json: bool) -> None:
    """Raises CommandError or ConfigError for whatever the user can put right."""
    try:
        target = Target(
            ttft=_duration("--ttft", options.ttft),
            tpot=_duration("--tpot", options.tpot),
            e2e=_duration("--e2e", options.e2e),
        )
        deployment, model = _model(file, options)
        for setting in _left_out(deployment, model):
            error_console().print(f"note: the simulation leaves out {setting}", style="yellow", highlight=False)
        engine = _engine(model, options)
        load = _load(options)
        simulation = _simulation(deployment, model, engine, load, options)
        if requests_csv is not None:
            requests_csv.touch()  # before the minutes that a run may take
        seconds = _run(simulation, len(load))
    except (TraceError, FaultError, AutoscalingError, ModelError, catalogue.CatalogueError) as error:
        raise CommandError(str(error)) from None
    cluster, gpus = engine.shape.cluster, engine.shape.num_devices
    result = Result(
        setup=_setup(model, engine, simulation, options),
        summary=summarise(simulation, target, gpus, cluster.dollars_per_device_hour),
        samples=simulation.samples,
        events=simulation.events,
    )
    if requests_csv is not None:
        write_requests(requests_csv, simulation.outcomes.values())
    if as_json:
        print_json(result)
    else:
        print_result(result, seconds, course=course)


# --- what is simulated ------------------------------------------------------------------------------------------------


def _model(file: Path, options: Options) -> tuple[Deployment, ModelDeployment]:
    deployment = load_config(Deployment, file, {})
    try:
        check(deployment)
    except DeploymentError as error:
        raise ConfigError(f"{file}: {error}") from None
    names = [model.name for model in deployment.models]
    if options.model and options.model not in names:
        raise CommandError(f"--model: {file} has no {options.model!r}; there are {', '.join(names)}")
    model = deployment.models[names.index(options.model) if options.model else 0]
    if not model.num_engines and options.replicas is None:
        raise CommandError(
            f"{file}: the endpoints of {model.name!r} run elsewhere, and nothing is known of their engines; say how "
            "many there are like the one described, with --replicas"
        )
    return deployment, model


def _left_out(deployment: Deployment, model: ModelDeployment) -> list[str]:
    """What the file asks for and would change the outcome, and the simulation does not do."""
    asked = {
        "tenants and their limits": deployment.tenants,
        f"fallback of {model.name!r}": model.fallback,
        "failover.hedge_seconds": model.failover.hedge_seconds,
        f"the {len(deployment.models) - 1} other models of the file": len(deployment.models) > 1,
        f"the {len(model.endpoints)} endpoints that run elsewhere": model.endpoints and model.num_engines,
    }
    return [what for what, is_there in asked.items() if is_there]


def _engine(model: ModelDeployment, options: Options) -> Engine:
    cluster = catalogue.cluster(options.on)
    shape = EngineShape(
        model=model_shape(model.model or model.name),
        cluster=cluster,
        layout=msgspec.structs.replace(model.layout, dp=1),
        weights=_weights(model, options),
        cache=_cache(model, options, cluster),
        profile=options.profile,
        block_size=model.block_size,
        max_batch_tokens=model.max_batch_tokens,
        max_sequences=model.max_sequences,
    )
    if shape.num_devices > cluster.num_devices:
        raise CommandError(
            f"a replica in {shape.layout} needs {shape.num_devices} devices, and --on {options.on} has "
            f"{cluster.num_devices}"
        )
    calibration = read_calibration(options.calibration, cluster.device)
    try:
        cost = CostModel(shape, calibration)
    except ValueError as error:
        raise CommandError(f"--profile or --on: {error}") from None
    return Engine(shape=shape, cost=cost, scheduler=_scheduler(model, shape, cost), calibration=calibration)


def _scheduler(model: ModelDeployment, shape: EngineShape, cost: CostModel) -> SchedulerConfig:
    """As the engine would configure its own (`serve/engine_process.py`)."""
    budget = cost.memory()
    if budget.cache < 0:
        raise CommandError(
            f"{model.name} in {shape.weights} does not fit {shape.num_devices} x {shape.cluster.device.name} in "
            f"{shape.layout}: {format_bytes(-budget.cache)} too much on each; use more devices or fewer bits"
        )
    tokens = budget.cache_tokens
    if model.kv_cache_bytes is not None:
        tokens = int(model.kv_cache_bytes / budget.bytes_per_token)
    num_blocks = tokens // model.block_tokens
    most = min(model.max_len or shape.model.max_len, num_blocks * model.block_tokens)
    if most < 2:
        raise CommandError(f"{model.name}: no room for a sequence: the KV cache holds {tokens} tokens")
    return SchedulerConfig(
        num_blocks=num_blocks,
        max_len=most,
        vocab_size=VOCABULARY,
        block_size=model.block_tokens,
        max_sequences=model.max_sequences,
        max_batch_tokens=model.max_batch_tokens,
        depth=max(model.depth, model.layout.pp),
        stages=model.layout.pp,
        prefix_caching=model.prefix_caching,
    )


def _weights(model: ModelDeployment, options: Options) -> WeightPrecision:
    return _one_of("--weights", options.weights or model.dtype, get_args(WeightPrecision))  # type: ignore[return-value]


def _cache(model: ModelDeployment, options: Options, cluster: Cluster) -> CachePrecision:
    chosen = options.cache or model.kv_dtype
    if chosen == "auto":
        wide = cluster.device.vendor == "cpu" and _weights(model, options) == "float32"
        chosen = "float32" if wide else "bfloat16"
    return _one_of("--cache", chosen, get_args(CachePrecision))  # type: ignore[return-value]


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise CommandError(f"{flag}: {value!r} is none of {', '.join(known)}")
    return value


def _slower(link: LinkSpec, factor: float) -> LinkSpec:
    """What a message takes beyond the time of an empty one is by the bandwidth."""
    tables = {
        ranks: tuple((size, points[0][1] + (seconds - points[0][1]) * factor) for size, seconds in points)
        for ranks, points in link.all_reduce.items()
    }
    return msgspec.structs.replace(link, bandwidth=link.bandwidth / factor, all_reduce=tables)


# --- its load ---------------------------------------------------------------------------------------------------------


def _load(options: Options) -> list[Arrival]:
    rng = random.Random(options.seed)
    rate = None if options.rate is None else _quantity("--rate", units.rate, options.rate)
    prefix = 0 if options.prefix is None else _quantity("--prefix", units.count, options.prefix)
    if options.trace is not None:
        if options.input_tokens or options.output_tokens:
            raise CommandError("--input and --output are of a load without a trace; leave them, or --trace")
        pause = _duration("--longest-pause", options.longest_pause)
        rows = read_trace(options.trace, longest_pause=pause)[: options.requests]
    else:
        if rate is None or options.input_tokens is None or options.output_tokens is None:
            raise CommandError("give a --trace, or --rate with --input and --output")
        prompt = _quantity("--input", units.count, options.input_tokens)
        output = _quantity("--output", units.count, options.output_tokens)
        if prompt < 1 or output < 1:
            raise CommandError("--input and --output must be at least 1 token")
        count = options.requests or max(
            1, round(rate * (_duration("--duration", options.duration) or _DEFAULT_SECONDS))
        )
        rows = synthetic(count, prompt, output, options.spread, rng)
    made = arrivals(rows, rng, rate=rate, repeat=options.repeat, prefix=prefix)
    most = _duration("--duration", options.duration)
    return made if most is None else [arrival for arrival in made if arrival.at <= most]


def _duration(flag: str, text: str | None) -> float | None:
    return None if text is None else _quantity(flag, units.duration, text)


def _quantity(flag: str, read_text: Callable[[str], Number], text: str) -> Number:
    try:
        return read_text(text)
    except units.UnitError as error:
        raise CommandError(f"{flag}: {error}") from None


# --- the simulation ---------------------------------------------------------------------------------------------------


def _simulation(
    deployment: Deployment, model: ModelDeployment, engine: Engine, load: list[Arrival], options: Options
) -> FleetSimulation:
    replicas = options.replicas or model.num_engines
    room = engine.shape.cluster.num_devices // engine.shape.num_devices
    scaling = _scaling(options, room - model.spares)
    if replicas + model.spares > room:
        raise CommandError(
            f"{replicas + model.spares} replicas of {engine.shape.num_devices} devices need "
            f"{(replicas + model.spares) * engine.shape.num_devices}, and --on {options.on} has "
            f"{engine.shape.cluster.num_devices}: room for {room}"
        )
    if not load:
        raise CommandError(f"no request comes within --duration {options.duration}")
    front, laws = engine.cost.profile, _laws(engine.cost)
    simulation = FleetSimulation(
        Router(model.routing),
        load,
        replicas,
        engine.scheduler,
        laws.step,
        stage_law=laws.stage,
        rules=Rules(
            admission=model.admission,
            health=deployment.health,
            failover=model.failover,
            retry_ratio=deployment.retry_ratio,
            hung_seconds=deployment.supervision.hung_seconds,
        ),
        spares=model.spares,
        report_interval=REPORT_SECONDS,
        start_seconds=_duration("--start", options.start) or 0.0,
        front=FrontEnd(
            delay=front.front_seconds,
            request_seconds=front.front_request_seconds,
            token_seconds=front.front_token_seconds,
            # shoal's gateway is one process; of other engines each has a front of its own.
            processes=1 if front.name == "shoal" else replicas,
        ),
        router_block_size=model.routing.block_size,
        sample_interval=_interval(options),
        until=_duration("--until", options.until) or float("inf"),
    )
    schedule(_faults(options), simulation, engine.slower_link, model.launch.silence_seconds)
    if scaling is not None:
        Autoscaler(scaling, simulation)
    return simulation


def _interval(options: Options) -> float:
    seconds = _duration("--interval", options.interval) or 0.0
    if seconds < _SHORTEST_INTERVAL:
        raise CommandError(f"--interval is {options.interval}: it must be at least {show_duration(_SHORTEST_INTERVAL)}")
    return seconds


def _scaling(options: Options, room: int) -> Autoscaling | None:
    if options.scale_on is None:
        if options.scale_target is not None or options.max_replicas is not None or options.min_replicas > 1:
            raise CommandError(
                "--scale-target, --min-replicas and --max-replicas are of scaling: say with --scale-on what on"
            )
        return None
    most = room if options.max_replicas is None else options.max_replicas
    if most > room:
        raise CommandError(f"--max-replicas: {most} do not fit --on {options.on}: room for {room}")
    return Autoscaling(
        measure=options.scale_on,
        target=_SCALE_TARGETS[options.scale_on] if options.scale_target is None else options.scale_target,
        least=options.min_replicas,
        most=most,
        down_seconds=_duration("--scale-down-after", options.scale_down_after) or 0.0,
    )


def _faults(options: Options) -> list[Fault]:
    texts = list(options.faults)
    if options.faults_file is not None:
        lines = _lines(options.faults_file)
        texts += [line for line in (line.partition("#")[0].strip() for line in lines) if line]
    return [parse(text, units.duration) for text in texts]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"--faults: {file} is not UTF-8 text (byte {error.start:,})") from None


def _run(simulation: FleetSimulation, count: int) -> float:
    """Seconds that it took."""
    began = shown = time.perf_counter()
    columns = (BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
    with passing_bar(error_console(), *columns) as bar:
        task = bar.add_task("simulating", total=count, detail="")

        def tick(simulation: FleetSimulation) -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown > 0.2:
                shown = now
                ended = len(simulation.outcomes) - len(simulation.gateway.flights)
                bar.update(task, completed=ended, detail=f"{ended:,} of {count:,} requests, {simulation.now:,.0f} s")

        simulation.on_tick = tick
        simulation.run()
    return time.perf_counter() - began


def _setup(model: ModelDeployment, engine: Engine, simulation: FleetSimulation, options: Options) -> Setup:
    shape, config = engine.shape, engine.scheduler
    return Setup(
        model=shape.model.name,
        cluster=shape.cluster.name or options.on,
        replicas=options.replicas or model.num_engines,
        spares=model.spares,
        layout=f"{shape.layout}",
        weights=shape.weights,
        cache=shape.cache,
        profile=engine.cost.profile.name,
        policy=model.routing.policy,
        kv_tokens=config.num_blocks * config.block_size,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        provenance=engine.cost.step(_TYPICAL_STEP).provenance,
        seed=options.seed,
    )
