"""What every exporter is given: one model, its engines and where they run, in nobody's dialect."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec
from shoal.core.layout import Layout

Role = Literal["serve", "prefill", "decode"]
Scaling = Literal["keda", "hpa"]
MAX_NAME = 40
"""Characters of a deployment's name: what is derived from it has to fit a DNS label of 63, with a pod's number."""

_GIB = 1 << 30
_MEMORY_PER_GPU = 16 * _GIB


class ExportError(Exception):
    """The target cannot have this deployment. The message names the field and what would do."""


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal engines. `layout` is of one engine: data parallelism is further engines, counted in `replicas`."""

    layout: Layout
    replicas: int = 1
    role: Role = "serve"
    attention_dp: int = 1
    """Groups of `layout.ranks` devices in an engine, each with attention of its own; experts are split over all."""

    @property
    def ranks(self) -> int:
        """Of one engine."""
        return self.layout.ranks * self.attention_dp

    def __str__(self) -> str:
        shape = f"{self.layout}" + (f" x attention-dp{self.attention_dp}" if self.attention_dp > 1 else "")
        times = f"{self.replicas} x ({shape})" if self.replicas > 1 else shape
        return times if self.role == "serve" else f"{times} for {self.role}"


class Placement(msgspec.Struct, frozen=True):
    """Of one engine of a pool."""

    nodes: int
    devices_per_node: int


class Deployable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """Of the whole, a DNS label; objects are named after it."""
    model: str
    """What is loaded: a path on the machines that serve, or a hub id."""
    served_name: str
    """What clients ask for."""
    pools: tuple[Pool, ...]
    """One that serves, or one that prefills and one that decodes."""
    device: DeviceSpec
    devices_per_node: int
    network: LinkSpec | None = None
    """Between nodes."""
    dtype: str = "bfloat16"
    """Of the weights: float32, bfloat16, float16, float8, float8-block, int8, int4, float4."""
    quantised: bool = False
    """The model's files hold weights of that kind already, and nothing has to quantise them."""
    kv_dtype: str = "auto"
    max_len: int | None = None
    max_sequences: int = 64
    max_batch_tokens: int = 512
    block_size: int | None = None
    """Tokens of a KV block; None is the engine's own choice, which may depend on how it computes attention."""
    prefix_caching: bool = True
    kv_cache_bytes: int | None = None
    """Of one rank."""
    engine: dict[str, Any] = {}
    """Further settings of shoal's engine that are not as by default, by their keys."""
    serving: dict[str, Any] = {}
    """Of the model in the gateway: routing, failover, admission."""
    gateway: dict[str, Any] = {}
    """Of the gateway itself: limits, tenants, health, ..."""
    drain_seconds: float = 30.0
    image: str | None = None
    """Container; None is the target's usual one."""
    namespace: str = "default"
    claim: str | None = None
    """PersistentVolumeClaim with the model; None is NAME-models."""
    mig: str | None = None
    """MIG profile of the slice that a rank gets instead of a whole device: 1g.10gb."""
    rdma: tuple[str, int] | None = None
    """Kubernetes resource of the RDMA devices, and how many a pod gets."""
    gateways: int = 2
    max_replicas: int | None = None
    """Engines up to which an autoscaler may go; None is without one."""
    scaling: Scaling = "keda"
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    """Where an autoscaler asks."""
    monitoring_namespace: str = "monitoring"
    priority_class: str | None = None
    node_selector: dict[str, str] = {}
    topology_key: str | None = None
    """Node label: replicas are spread over its values (None is zones), and an engine of several nodes has one for
    itself (None is without)."""
    shared_memory_bytes: int | None = None
    """Of /dev/shm in a pod; None is derived from its devices."""
    host_memory_bytes: int | None = None
    """Of a pod; None is derived from its devices."""
    start_seconds: int = 1800
    """An engine may take so long until it serves, loading the weights included."""
    notes: tuple[str, ...] = ()
    """What was lost on the way here; every export repeats it."""

    # --- what follows from it -----------------------------------------------------------------------------------------

    @property
    def is_gpu(self) -> bool:
        return self.device.vendor != "cpu"

    @property
    def is_disaggregated(self) -> bool:
        return any(pool.role != "serve" for pool in self.pools)

    @property
    def pool(self) -> Pool:
        """Of a deployment that is not disaggregated."""
        (pool,) = self.pools
        return pool

    @property
    def num_devices(self) -> int:
        return sum(pool.ranks * pool.replicas for pool in self.pools)

    @property
    def spans_nodes(self) -> bool:
        return any(self.placement(pool).nodes > 1 for pool in self.pools)

    @property
    def needs_network(self) -> bool:
        """Engines send KV or partial results to other nodes."""
        return self.spans_nodes or self.is_disaggregated

    def placement(self, pool: Pool) -> Placement:
        """Nodes of one engine, with equally many ranks each: all on one, else as few as divide them."""
        ranks = pool.ranks
        devices = max(count for count in range(1, min(ranks, self.devices_per_node) + 1) if ranks % count == 0)
        return Placement(ranks // devices, devices)

    def replicas_per_node(self, pool: Pool) -> int:
        """Engines of this pool that fit beside each other on a node; 1 where one takes several."""
        return max(1, self.devices_per_node // self.placement(pool).devices_per_node)

    @property
    def model_claim(self) -> str:
        return self.claim or f"{self.name}-models"

    @property
    def is_path(self) -> bool:
        """The model lies on the machines that serve, and nothing is fetched."""
        return self.model.startswith("/")


def shared_memory(d: Deployable, devices: int) -> int:
    """Bytes of /dev/shm for so many ranks: far above what NCCL and our collectives take, and taken only when used."""
    return d.shared_memory_bytes or (max(1, devices) + 1) * _GIB


def host_memory(d: Deployable, devices: int) -> int:
    """Bytes for a container with so many ranks, /dev/shm included. On a CPU the device is a share of the host; for a
    GPU there are pinned buffers, CUDA contexts, and what of the weights is read and not yet on the device."""
    if d.host_memory_bytes is not None:
        return d.host_memory_bytes
    each = _MEMORY_PER_GPU if d.is_gpu else d.device.memory_bytes
    return devices * each + shared_memory(d, devices)


def host_cpus(d: Deployable, devices: int) -> int:
    """For a GPU's rank: its own thread, the engine's, NCCL's, and one to read weights with."""
    threads = d.engine.get("threads")
    return devices * (threads or 4) if d.is_gpu else devices * (threads or 1) + 1


def is_label(text: str) -> bool:
    """RFC 1123, as names of Kubernetes objects are checked."""
    return re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", text) is not None and len(text) <= 63


def label(text: str) -> str:
    """The nearest DNS label that begins with a letter: names of services must. It leaves room for what is appended."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower().rstrip("/").rpartition("/")[2]).strip("-")
    if not plain[:1].isalpha():
        plain = f"m-{plain}".strip("-")
    return plain[:MAX_NAME].strip("-")


def rdma_of(network: LinkSpec | None) -> tuple[str, int] | None:
    """The resource that the usual device plugins publish for such a link; None where it needs none.

    Mellanox's shared RDMA plugin and NVIDIA's network operator let the administrator choose a name below rdma/, AWS's
    plugin has vpc.amazonaws.com/efa (4 an instance is the least of p4d).
    """
    if network is None or network.kind != "network":
        return None
    name = f"{network.name} {' '.join(network.aliases)}".lower()
    if "efa" in name:
        return ("vpc.amazonaws.com/efa", 4)
    words = ("infiniband", "roce", "hdr", "ndr", "xdr", "edr")
    return ("rdma/hca", 1) if any(word in name for word in words) else None


def require(deployable: Deployable) -> None:
    """Raise ExportError where the parts contradict each other, whatever the target."""
    d = deployable
    if not is_label(d.name) or len(d.name) > MAX_NAME or not d.name[:1].isalpha():
        raise ExportError(f"name: {d.name!r} is no DNS label of up to {MAX_NAME} characters; use {label(d.name)}")
    if not is_label(d.namespace):
        raise ExportError(f"namespace: {d.namespace!r} is no DNS label; use {label(d.namespace)}")
    for field in ("model", "served_name"):
        text = getattr(d, field)
        if not text or not text.isprintable():
            raise ExportError(f"{field}: {text!r} is no name: it is empty or has characters that do not print")
    if not d.pools or sorted(pool.role for pool in d.pools) not in (["serve"], ["decode", "prefill"]):
        raise ExportError("pools: either one that serves, or one that prefills and one that decodes")
    for pool in d.pools:
        if pool.layout.dp != 1:
            raise ExportError("layout.dp: data parallelism is further replicas here")
        if pool.replicas < 1:
            raise ExportError(f"replicas: {pool.replicas} is not at least 1")
    if d.max_replicas is not None and (d.is_disaggregated or d.max_replicas < d.pools[0].replicas):
        least = sum(pool.replicas for pool in d.pools)
        raise ExportError(
            "max_replicas: pools of prefill and decode are not scaled one by one; leave it out"
            if d.is_disaggregated
            else f"max_replicas: {d.max_replicas} is less than the {least} replicas there are"
        )
    if d.spans_nodes and d.is_gpu and d.network is None:
        raise ExportError("layout: an engine spans nodes, and the cluster has no network; write it as 2x8xH100:ndr")
    if d.mig is not None and any(pool.ranks > 1 for pool in d.pools):
        raise ExportError(
            "layout: a MIG slice cannot talk to others, so an engine is one rank; use tp 1, pp 1, ep 1, cp 1"
        )


def with_cluster(cluster: Cluster) -> dict[str, Any]:
    """Fields of a Deployable that a cluster decides. A slice is called by its device and profile: H100-SXM:1g.10gb."""
    return {
        "mig": cluster.device.name.partition(":")[2] or None,
        "device": cluster.device,
        "devices_per_node": cluster.devices_per_node,
        "network": cluster.network,
        "rdma": rdma_of(cluster.network),
    }
