"""Which faults there are: how each is made, what it needs of a deployment, and what must hold under it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from shoal.bench.faults import hostile, injectors
from shoal.bench.faults.clients import Client
from shoal.bench.faults.deployment import Deployment, FleetWatch, free_port
from shoal.bench.faults.injectors import Fault, NotInjected
from shoal.bench.faults.operations import KillTwice, RollingRestart, drain, stop_gateway
from shoal.bench.faults.proxy import ProxyThread
from shoal.bench.faults.workload import Spec
from shoal.bench.processes import Process, descendants, find
from shoal.core.fleet_types import EndpointStatus


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What must hold under a fault beside what always must: nothing lost, failed, repeated, missing or unequal."""

    refusals: bool = False
    """New requests may be refused meanwhile."""
    breaks: bool = False
    """Connections to clients may end; each then resumes its stream."""
    detect_seconds: float | None = None
    """/fleet shows it within this."""
    gap_seconds: float | None = None
    """The longest gap is at most what it takes to prefill again what was there, as measured, and this."""
    returns: bool = False
    """The endpoint serves again by itself."""


class Arena:
    """What a fault may be aimed at, and what to aim it at in a control."""

    def __init__(
        self,
        deployment: Deployment,
        watch: FleetWatch,
        *,
        model: str,
        headers: dict[str, str],
        rng: random.Random,
        specs: Sequence[Spec],
        client: Client,
    ) -> None:
        self.deployment = deployment
        self.watch = watch
        self.model = model
        self.headers = headers
        self.rng = rng
        self.specs = specs
        self.client = client
        self.capacity = 0.0
        self.tokens_per_second = 0.0
        self.longest_answer = 0.0
        """Seconds from request to end, without faults."""
        self.target: EndpointStatus | None = None
        self._decoys: list[subprocess.Popen[bytes]] = []
        self.idle_proxy = ProxyThread("127.0.0.1", free_port())
        """Nothing passes through it."""
        self.client_proxies: dict[str, ProxyThread] = {}
        """Between clients and gateways, by the gateway's URL, while a fault wants them."""

    @property
    def endpoint(self) -> EndpointStatus:
        if self.target is None:
            raise NotInjected("no endpoint was ready to be aimed at")
        return self.target

    def gateway(self, *, decoy: bool) -> str:
        return f"http://127.0.0.1:{free_port()}" if decoy else self.deployment.urls()[0]

    def decoy(self) -> Process:
        """A process that nobody misses."""
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        self._decoys.append(started)
        process = find(started.pid)
        assert process is not None
        return process

    def process(self) -> Process:
        process = self.deployment.process_of(self.endpoint)
        if process is None:
            raise NotInjected(f"endpoint {self.endpoint.name} has no process at the moment")
        return process

    def proxy(self) -> ProxyThread:
        proxy = self.deployment.proxy_of(self.endpoint)
        assert proxy is not None, "faults of links are tried only where there is a proxy"
        return proxy

    def end_control(self) -> None:
        for decoy in self._decoys:
            decoy.kill()
            decoy.wait()
        self._decoys.clear()

    def close(self) -> None:
        self.end_control()
        for proxy in [self.idle_proxy, *self.client_proxies.values()]:
            proxy.close()


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    about: str
    make: Callable[[Arena, bool], Fault]
    """True aims it at nothing, for the control."""
    lacks: Callable[[Arena], str]
    """What the deployment lacks for it; empty if nothing."""
    contract: Contract
    window: float = 0.0
    """Seconds for which it stays."""
    by_phase: bool = False
    """It is repeated, each time in another phase of some request."""
    loaded: bool = True
    """The usual clients are at work meanwhile."""
    through_proxies: bool = False
    """Clients reach gateways through proxies."""
    target: Callable[[Arena, EndpointStatus], bool] = lambda arena, endpoint: True
    """Whether an endpoint can be its target."""


def _has_process(arena: Arena, endpoint: EndpointStatus) -> bool:
    return arena.deployment.process_of(endpoint) is not None


def _has_child(arena: Arena, endpoint: EndpointStatus) -> bool:
    process = arena.deployment.process_of(endpoint)
    return process is not None and bool(descendants(process.pid))


def _has_proxy(arena: Arena, endpoint: EndpointStatus) -> bool:
    return arena.deployment.proxy_of(endpoint) is not None


def _needs(test: Callable[[Arena, EndpointStatus], bool], reason: str, least: int = 2) -> Callable[[Arena], str]:
    """At least one endpoint that passes, among enough that one can be lost."""

    def lacks(arena: Arena) -> str:
        endpoints = list(arena.watch.endpoints.values())
        if not any(test(arena, endpoint) for endpoint in endpoints):
            return reason
        return "" if len(endpoints) >= least else f"it needs {least} endpoints"

    return lacks


def _nothing(arena: Arena) -> str:
    return ""


def _two_gateways(arena: Arena) -> str:
    if len(arena.deployment.gateways) < 2:
        return "it needs a second gateway"
    return _journal(arena)


def _journal(arena: Arena) -> str:
    assert arena.watch.status is not None
    return "the deployment keeps no journal" if arena.watch.status.journal == "off" else ""


_PROCESS = _needs(_has_process, "no endpoint is a process on this host")
_CHILD = _needs(_has_child, "no endpoint has a process below its own")
_LINK = _needs(_has_proxy, "no endpoint is reached by an http URL")


def _on_process(make: Callable[[Process, Process], Fault]) -> Callable[[Arena, bool], Fault]:
    return lambda arena, control: make(arena.decoy() if control else arena.process(), arena.process())


def _on_link(make: Callable[[ProxyThread, ProxyThread], Fault]) -> Callable[[Arena, bool], Fault]:
    return lambda arena, control: make(arena.idle_proxy if control else arena.proxy(), arena.proxy())


def _flap(arena: Arena, control: bool) -> Fault:
    name = arena.endpoint.name

    def serving() -> Process | None:
        endpoint = arena.watch.endpoints.get(name)
        return arena.deployment.process_of(endpoint) if endpoint is not None and endpoint.state == "ready" else None

    return injectors.Flap(arena.decoy() if control else None, serving)


def _gateway_kill(arena: Arena, control: bool) -> Fault:
    return stop_gateway(arena.deployment, arena.decoy() if control else None, with_kill=True)


def _gateway_term(arena: Arena, control: bool) -> Fault:
    return stop_gateway(arena.deployment, arena.decoy() if control else None, with_kill=False)


def _client_reset(arena: Arena, control: bool) -> Fault:
    proxy = arena.client_proxies[arena.deployment.urls()[0]]
    return injectors.reset(arena.idle_proxy if control else proxy, proxy)


def _no_files(arena: Arena, control: bool) -> Fault:
    gateway = arena.deployment.gateways[arena.watch.gateway]
    process = gateway.identity
    if process is None:
        raise NotInjected("the gateway does not run")
    return hostile.NoFiles(arena.decoy() if control else process, process, gateway.url)


def _sent_twice(arena: Arena, control: bool) -> Fault:
    url, number = arena.gateway(decoy=control), arena.rng.getrandbits(32)
    return hostile.SentTwice(url, arena.headers, arena.rng.choice(arena.specs), f"twice-{number}")


def _overload(arena: Arena, control: bool) -> Fault:
    streamed = [spec for spec in arena.specs if spec.stream and spec.feature in ("greedy", "seeded")]
    return hostile.Overload(
        arena.client,
        streamed or arena.specs,
        capacity=arena.capacity,
        tokens_per_second=arena.tokens_per_second,
        longest_answer=arena.longest_answer,
        offered=0.5 if control else 3.0,
    )


_MOVES = Contract(detect_seconds=1.0, gap_seconds=1.0, returns=True)
_HANGS = Contract(detect_seconds=3.0, gap_seconds=4.0, returns=True)
_HARMLESS = Contract()

KINDS: tuple[Kind, ...] = (
    Kind(
        name="kill",
        about="SIGKILL for an engine",
        make=_on_process(injectors.Kill),
        lacks=_PROCESS,
        target=_has_process,
        contract=_MOVES,
        by_phase=True,
    ),
    Kind(
        name="kill-twice",
        about="SIGKILL for an engine, and for the one that its requests move to",
        make=lambda arena, control: KillTwice(
            arena.deployment, arena.watch, arena.endpoint, arena.decoy if control else None
        ),
        lacks=_needs(_has_process, "no endpoint is a process on this host", least=3),
        target=_has_process,
        contract=Contract(returns=True),
    ),
    Kind(
        name="hang",
        about="SIGSTOP for a while: the process lives, its sockets are open, nothing comes",
        make=_on_process(injectors.Hang),
        lacks=_PROCESS,
        target=_has_process,
        contract=_HANGS,
        window=12.0,
    ),
    Kind(
        name="child",
        about="SIGKILL for the largest process below an endpoint's own, which lives on",
        make=_on_process(injectors.KillChild),
        lacks=_CHILD,
        target=_has_child,
        contract=Contract(returns=True),
    ),
    Kind(
        name="slow",
        about="stopped for 80% of the time",
        make=_on_process(injectors.Slow),
        lacks=_PROCESS,
        target=_has_process,
        contract=_HARMLESS,
        window=5.0,
    ),
    Kind(
        name="flap",
        about="killed again as soon as it is back, three times",
        make=_flap,
        lacks=_PROCESS,
        target=_has_process,
        contract=Contract(returns=True),
    ),
    Kind(
        name="reset",
        about="TCP reset of all connections to an endpoint",
        make=_on_link(injectors.reset),
        lacks=_LINK,
        target=_has_proxy,
        contract=Contract(gap_seconds=1.0),
        by_phase=True,
    ),
    Kind(
        name="cut",
        about="connections to an endpoint reset after 1,500 bytes of answer",
        make=_on_link(injectors.cut),
        lacks=_LINK,
        target=_has_proxy,
        contract=_HARMLESS,
        window=2.0,
    ),
    Kind(
        name="partition",
        about="nothing passes to or from an endpoint for a while, then what was held arrives late",
        make=_on_link(injectors.partition),
        lacks=_LINK,
        target=_has_proxy,
        contract=_HANGS,
        window=6.0,
    ),
    Kind(
        name="partition-replies",
        about="one way: an endpoint hears and is not heard",
        make=_on_link(injectors.partition_replies),
        lacks=_LINK,
        target=_has_proxy,
        contract=_HANGS,
        window=6.0,
    ),
    Kind(
        name="delay",
        about="200 ms more each way",
        make=_on_link(injectors.delay),
        lacks=_LINK,
        target=_has_proxy,
        contract=_HARMLESS,
        window=4.0,
    ),
    Kind(
        name="throttle",
        about="4,000 bytes a second",
        make=_on_link(injectors.throttle),
        lacks=_LINK,
        target=_has_proxy,
        contract=_HARMLESS,
        window=4.0,
    ),
    Kind(
        name="drain",
        about="an endpoint is drained, and added again",
        make=lambda arena, control: drain(
            arena.deployment, arena.watch, "nobody" if control else arena.endpoint.name, arena.endpoint
        ),
        lacks=_needs(lambda arena, endpoint: True, "there is no endpoint"),
        contract=Contract(gap_seconds=1.0),
        window=1.0,
    ),
    Kind(
        name="rolling-restart",
        about="every engine is restarted in turn",
        make=lambda arena, control: RollingRestart(arena.deployment, arena.watch, aimed_at_nothing=control),
        lacks=_PROCESS,
        contract=Contract(gap_seconds=1.0),
    ),
    Kind(
        name="gateway-term",
        about="SIGTERM for a gateway while another runs",
        make=_gateway_term,
        lacks=_two_gateways,
        contract=Contract(breaks=True),
    ),
    Kind(
        name="gateway-kill",
        about="SIGKILL for a gateway while another runs; clients reconnect",
        make=_gateway_kill,
        lacks=_two_gateways,
        contract=Contract(breaks=True),
    ),
    Kind(
        name="client-reset",
        about="TCP reset of all connections of clients, who reconnect",
        make=_client_reset,
        lacks=_journal,
        contract=Contract(breaks=True),
        through_proxies=True,
    ),
    Kind(
        name="leave",
        about="clients leave before an answer, before the first token, after 1, 8 and all but one",
        make=lambda arena, control: hostile.Leave(
            arena.gateway(decoy=control), arena.headers, arena.model, (None, 0, 1, 8, 32)
        ),
        lacks=_nothing,
        contract=_HARMLESS,
    ),
    Kind(
        name="slow-reader",
        about="a client that asks for much and reads nothing",
        make=lambda arena, control: hostile.SlowReader(arena.gateway(decoy=control), arena.headers, arena.model),
        lacks=_nothing,
        contract=_HARMLESS,
        window=4.0,
    ),
    Kind(
        name="slow-loris",
        about="16 connections that send their headers a byte at a time",
        make=lambda arena, control: hostile.SlowLoris(arena.gateway(decoy=control)),
        lacks=_nothing,
        contract=_HARMLESS,
        window=4.0,
    ),
    Kind(
        name="bad-bodies",
        about="bodies that are malformed, out of range, deeply nested or too large",
        make=lambda arena, control: hostile.BadBodies(arena.gateway(decoy=control), arena.headers),
        lacks=_nothing,
        contract=_HARMLESS,
    ),
    Kind(
        name="no-files",
        about="the gateway may open no more files while connections arrive",
        make=_no_files,
        lacks=_nothing,
        contract=Contract(refusals=True),
        window=3.0,
    ),
    Kind(
        name="sent-twice",
        about="the same request, under the same id, twice at once",
        make=_sent_twice,
        lacks=_nothing,
        contract=_HARMLESS,
    ),
    Kind(
        name="overload",
        about="requests with deadlines arrive at three times the capacity",
        make=_overload,
        lacks=_nothing,
        contract=Contract(refusals=True),
        window=60.0,
        loaded=False,
    ),
)
