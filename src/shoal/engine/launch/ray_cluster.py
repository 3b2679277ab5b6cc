"""Ranks on a Ray cluster: Ray places them, and places them anew when the engine is built anew.

Ranks that split the same layers talk most, so each such group of them is packed onto one node (a placement group with
STRICT_PACK, a bundle a rank); groups of other stages or contexts may be elsewhere. In each bundle an actor holds one
rank's process, the same program as with every launcher: plans and collectives do not pass through Ray.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from shoal.core.config import EngineConfig
from shoal.engine.launch.base import RankStart
from shoal.engine.launch.local import describe_exit, end_process, start_rank_process
from shoal.engine.rendezvous import LaunchError

_STOP_SECONDS = 3.0
"""For an actor to end its rank's process and say so; it is killed afterwards in any case."""


class RankHolder:
    """The actor. `ended` waits in a thread of its own, so that `stop` is heard meanwhile."""

    def __init__(self, start: str) -> None:
        """`start` is a RankStart as JSON: nothing that Ray would have to pickle."""
        self._process = start_rank_process(msgspec.json.decode(start, type=RankStart))

    def ended(self) -> str:
        """How the process ended, once it has."""
        return f"(process {self._process.pid} on {socket.gethostname()}) {describe_exit(self._process.wait())}"

    def stop(self) -> None:
        end_process(self._process)


class RayLauncher:
    driver_port = 0

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._ray = _import_ray()
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        self._endings: dict[Any, int] = {}
        """What each actor's `ended` will give, and its rank."""

    def launch(self, address: str, secret: bytes, world_size: int) -> None:
        """Connect, reserve places for all ranks, start them. Raises LaunchError."""
        self._connect()
        self._require_reachable(address)
        bundle = self._bundle(world_size)
        self._reserve(bundle, world_size)
        launch = self._config.launch
        for rank in range(world_size):
            start = RankStart(
                address=address,
                secret=secret.hex(),
                rank=rank,
                world_size=world_size,
                join_seconds=launch.join_seconds,
                beat_seconds=launch.silence_seconds / 4,
                own_device="GPU" in bundle,
            )
            self._actors.append(self._place(rank, start, bundle))
        self._endings = {actor.ended.remote(): rank for rank, actor in enumerate(self._actors)}

    def ended(self) -> str | None:
        if not self._endings:
            return None
        done, _ = self._ray.wait(list(self._endings), timeout=0)
        if not done:
            return None
        try:
            how = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            how = f"is lost with its Ray actor: {str(error).splitlines()[0]}"
        return f"rank {self._endings[done[0]]} {how}"

    def wait(self, seconds: float) -> None:
        if self._endings:
            self._ray.wait(list(self._endings), num_returns=len(self._endings), timeout=seconds)

    def kill(self) -> None:
        """Also of a cluster that has gone away meanwhile."""
        with contextlib.suppress(Exception):
            self._ray.wait([actor.stop.remote() for actor in self._actors], len(self._actors), timeout=_STOP_SECONDS)
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor, no_restart=True)
        for group in self._groups:
            with contextlib.suppress(Exception):
                self._ray.util.remove_placement_group(group)
        self._actors, self._groups, self._endings = [], [], {}

    # --- the cluster ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """To the cluster that is asked for or runs here; with none, a new one of this machine alone, on loopback."""
        ray, address = self._ray, self._config.launch.ray_address
        if ray.is_initialized():
            return
        with _kept_signals():
            try:
                ray.init(address=address or "auto", log_to_driver=True, logging_level="ERROR")
            except ConnectionError as error:
                if address is not None or "RAY_ADDRESS" in os.environ:
                    raise LaunchError(f"there is no Ray cluster at {address or os.environ['RAY_ADDRESS']}") from error
                ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, logging_level="ERROR")

    def _require_reachable(self, address: str) -> None:
        host = address.rpartition(":")[0]
        nodes = {node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]}
        if len(nodes) > 1 and ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            own = self._ray.util.get_node_ip_address()
            raise LaunchError(
                f"the Ray cluster has {len(nodes)} nodes, which cannot reach {host}: set launch.host to this machine's "
                f"address among them (Ray calls it {own})"
            )

    def _bundle(self, world_size: int) -> dict[str, float]:
        """What Ray reserves for a rank."""
        device = self._config.device
        gpus = self._ray.cluster_resources().get("GPU", 0)
        if device.startswith("cuda") or (device == "auto" and gpus >= world_size):
            return {"GPU": 1.0, "CPU": 1.0}
        return {"CPU": 1.0}

    def _reserve(self, bundle: dict[str, float], world_size: int) -> None:
        size, seconds = self._config.layout.tensor_ranks, self._config.launch.join_seconds
        make = self._ray.util.placement_group
        self._groups = [make([bundle] * size, strategy="STRICT_PACK") for _ in range(world_size // size)]
        ready = [group.ready() for group in self._groups]
        placed, _ = self._ray.wait(ready, num_returns=len(ready), timeout=seconds)
        if len(placed) == len(ready):
            return
        free = self._ray.available_resources()
        has = ", ".join(f"{free.get(name, 0):g} {name} free of {n:g}" for name, n in self._resources(bundle).items())
        asked = " and ".join(f"{n:g} {name}" for name, n in bundle.items())
        raise LaunchError(
            f"Ray could not place the ranks within {seconds:g} s: {len(ready)} groups of {size} on one node each, with "
            f"{asked} a rank; the cluster has {has} (`ray status`): add nodes, stop what runs, or take a smaller layout"
        )

    def _resources(self, bundle: dict[str, float]) -> dict[str, float]:
        total = self._ray.cluster_resources()
        return {name: total.get(name, 0.0) for name in bundle}

    def _place(self, rank: int, start: RankStart, bundle: dict[str, float]) -> Any:
        group, place = divmod(rank, self._config.layout.tensor_ranks)
        strategy = importlib.import_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        holder = self._ray.remote(RankHolder).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=2,
            max_restarts=0,  # a rank alone is of no use: the driver builds the engine anew
            scheduling_strategy=strategy(self._groups[group], placement_group_bundle_index=place),
        )
        return holder.remote(msgspec.json.encode(start).decode())


def _import_ray() -> Any:
    """Raises LaunchError where Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # what later Rays do: leave CUDA_VISIBLE_DEVICES be
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise LaunchError("the launcher is ray, and Ray is not installed: pip install 'shoal[ray]'") from None


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray ends its driver on SIGTERM; this process has its own ways."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            with contextlib.suppress(ValueError):  # not the main thread: then Ray has not touched them
                signal.signal(number, handler)
