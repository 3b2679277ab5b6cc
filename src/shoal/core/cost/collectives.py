"""Time of collectives over a link: measured points where the link has them, else the best of the known algorithms.

`size` is the tensor that is reduced, gathered (whole), or sent, in bytes; alpha a small message's latency in seconds,
beta a direction's bandwidth. Ring, tree, one-shot and two-shot all-reduce after Thakur, Rabenseifner and Gropp (2005).
"""

from __future__ import annotations

from bisect import bisect_left
from math import ceil, exp, log, log2

from shoal.core.hardware import Cluster, LinkSpec

Points = tuple[tuple[int, float], ...]


def interpolate(points: Points, size: float) -> float:
    """Log-log between two points; below the first its latency, above the last its bandwidth."""
    if size <= points[0][0]:
        return points[0][1]
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    at = bisect_left(points, (size, 0.0))
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    share = log(size / x0) / log(x1 / x0)
    return exp(log(y0) + share * log(y1 / y0))


def all_reduce(link: LinkSpec, ranks: int, size: float) -> float:
    if ranks <= 1 or size <= 0:
        return 0.0
    if ranks in link.all_reduce:
        return interpolate(link.all_reduce[ranks], size)
    near = [known for known in link.all_reduce if known < ranks]
    modelled = _all_reduce_law(link, ranks, size)
    if not near:
        return modelled
    closest = max(near)
    return interpolate(link.all_reduce[closest], size) * modelled / _all_reduce_law(link, closest, size)


def _all_reduce_law(link: LinkSpec, ranks: int, size: float) -> float:
    alpha, beta = link.latency, link.bandwidth * link.reached
    one_shot = alpha + (ranks - 1) * size / beta
    two_shot = 2 * alpha + 2 * (ranks - 1) / ranks * size / beta
    ring = 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * size / beta
    tree = 2 * ceil(log2(ranks)) * alpha + 2 * size / beta
    # Shots need every rank to reach every other at once; a network's ranks take turns at one port.
    return min(one_shot, two_shot, ring, tree) if link.kind in ("scale-up", "memory") else min(ring, tree)


def all_gather(link: LinkSpec, ranks: int, size: float) -> float:
    """`size` of the whole, of which each rank has a part at first. A reduce-scatter takes as long."""
    if ranks <= 1 or size <= 0:
        return 0.0
    hops = 1 if link.kind in ("scale-up", "memory") else ranks - 1
    return hops * link.latency + (ranks - 1) / ranks * size / (link.bandwidth * link.reached)


reduce_scatter = all_gather


def send(link: LinkSpec, size: float) -> float:
    return link.latency + size / (link.bandwidth * link.reached) if size > 0 else 0.0


def all_to_all(cluster: Cluster, ranks: int, stride: int, size: float) -> float:
    """`size` that one rank sends in all, evenly over the ranks, of which those on its node take the scale-up link."""
    if ranks <= 1 or size <= 0:
        return 0.0
    local = cluster.ranks_per_node(ranks, stride)
    near = cluster.scale_up
    inside = near.latency + size * (local - 1) / ranks / (near.bandwidth * near.reached)
    if local >= ranks:
        return inside
    far = cluster.link(ranks, stride)
    outside = far.latency + size * (ranks - local) / ranks / (far.bandwidth * far.reached)
    return max(inside, outside)


def cluster_all_reduce(cluster: Cluster, ranks: int, stride: int, size: float) -> float:
    """Within a node; across nodes reduce-scatter inside, all-reduce of each part over the network, all-gather inside,
    or over the network alone, whichever is faster."""
    if ranks <= 1 or size <= 0:
        return 0.0
    flat = all_reduce(cluster.link(ranks, stride), ranks, size)
    by_node = _by_node(cluster, ranks, stride, size)
    return flat if by_node is None else min(flat, by_node)


def _by_node(cluster: Cluster, ranks: int, stride: int, size: float) -> float | None:
    """None where all ranks are on one node, or each is on another."""
    local = cluster.ranks_per_node(ranks, stride)
    if not 1 < local < ranks:
        return None
    inside = 2 * all_gather(cluster.scale_up, local, size)
    return inside + all_reduce(cluster.link(ranks, stride), -(-ranks // local), size / local)


# --- bytes that one rank sends, by link, on the ways that the times above are of --------------------------------------


def all_reduce_sent(cluster: Cluster, ranks: int, stride: int, size: float) -> dict[str, float]:
    if ranks <= 1 or size <= 0:
        return {}
    link, by_node = cluster.link(ranks, stride), _by_node(cluster, ranks, stride, size)
    if by_node is None or all_reduce(link, ranks, size) < by_node:
        return {link.name: wire_bytes(ranks, size)}
    local = cluster.ranks_per_node(ranks, stride)
    return {cluster.scale_up.name: wire_bytes(local, size), link.name: wire_bytes(-(-ranks // local), size / local)}


def all_to_all_sent(cluster: Cluster, ranks: int, stride: int, size: float) -> dict[str, float]:
    local = cluster.ranks_per_node(ranks, stride)
    sent = {cluster.scale_up.name: size * (local - 1) / ranks}
    if local < ranks:
        sent[cluster.link(ranks, stride).name] = size * (ranks - local) / ranks
    return sent


def wire_bytes(ranks: int, size: float) -> float:
    """By a ring or two shots."""
    return 2 * (ranks - 1) / ranks * size if ranks > 1 else 0.0
