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
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec

from shoal.core.config import EngineConfig
from shoal.engine.launch.base import RankStart
from shoal.engine.launch.local import describe_exit, end_process, start_rank_process
from shoal.engine.rendezvous import LaunchError

_OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster of our own, about the least that Ray takes: what ranks send each other does not go through Ray."""
_STOP_SECONDS = 3.0
"""For an actor to end its rank's process and say so; it is killed afterwards in any case."""


class RankHolder:
    """The actor. Its two methods run on a thread each, so that `stop` is heard while `run` waits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, start: str) -> str:
        """Start the rank's process and wait for its end; returns how that was. `start` is a RankStart as JSON.

        The process dies with the thread that started it (PDEATHSIG is of threads), which is this one.
        """
        self._process = process = start_rank_process(msgspec.json.decode(start, type=RankStart))
        return f"(process {process.pid} on {socket.gethostname()}) {describe_exit(process.wait())}"

    def stop(self) -> None:
        """Nothing is left of the process when it returns."""
        if self._process is not None:
            end_process(self._process)


class RayLauncher:
    driver_port = 0

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._ray = _import_ray()
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        self._runs: dict[Any, int] = {}
        """What each actor's `run` will return, and its rank."""
        self._is_connected = False
        """By this launcher, which then disconnects too."""
        self._cpus_per_rank = float(config.threads or 1)

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
            holder = self._place(rank, bundle)
            self._actors.append(holder)
            # The argument of a call goes to the actor alone; a constructor's would be kept by Ray's head.
            self._runs[holder.run.remote(msgspec.json.encode(start).decode())] = rank

    def ended(self) -> str | None:
        if not self._runs:
            return None
        done, _ = self._ray.wait(list(self._runs), timeout=0)
        if not done:
            return None
        try:
            how = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            how = f"is lost with its Ray actor: {str(error).splitlines()[0]}"
        return f"rank {self._runs[done[0]]} {how}"

    def wait(self, seconds: float) -> None:
        if self._runs:
            self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=seconds)

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
        self._actors, self._groups, self._runs = [], [], {}
        if self._is_connected:
            self._is_connected = False
            with _kept_signals(), contextlib.suppress(Exception):
                self._ray.shutdown()  # ends a cluster that was started here, and no other

    # --- the cluster ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """To the cluster that is named, or that `ray start` made this machine a node of, or to a new one of ours."""
        ray, layout = self._ray, self._config.layout
        named = self._config.launch.ray_address or os.environ.get("RAY_ADDRESS")
        if ray.is_initialized():
            return
        own = {
            "num_cpus": self._cpus_per_rank * layout.ranks,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        with _kept_signals():
            try:
                if named is not None:
                    ray.init(address=named, logging_level="ERROR")
                else:
                    try:
                        ray.init(logging_level="ERROR", **own)
                    except ValueError:  # there is a cluster here, which has its own resources
                        ray.init(logging_level="ERROR")
            except Exception as error:  # Ray raises what it comes by
                raise LaunchError(
                    f"the Ray cluster {f'at {named}' if named else 'here'} cannot be used: "
                    f"{(str(error) or type(error).__name__).splitlines()[0]}; this machine has to be a node of it "
                    "(`ray start --address HOST:PORT`), and to have its token if it asks for one"
                ) from None
        self._is_connected = True

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
            return {"GPU": 1.0, "CPU": self._cpus_per_rank}
        return {"CPU": self._cpus_per_rank}

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

    def _place(self, rank: int, bundle: dict[str, float]) -> Any:
        group, place = divmod(rank, self._config.layout.tensor_ranks)
        strategy = importlib.import_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        holder = self._ray.remote(RankHolder).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=2,
            max_restarts=0,  # a rank alone is of no use: the driver builds the engine anew
            scheduling_strategy=strategy(self._groups[group], placement_group_bundle_index=place),
        )
        return holder.remote()


def _import_ray() -> Any:
    """Raises LaunchError where Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Leave CUDA_VISIBLE_DEVICES be where no GPU was asked for, as later Rays do.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
