"""A shell script that starts one engine of another maker's, for the targets that are command lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.plan.export.deployable import Deployable, Pool
from shoal.plan.export.document import command, comment

Command = Callable[[Pool], tuple[Sequence[str], Sequence[str]]]
"""Words of the command and its arguments; `${PORT}`, `${NODE_RANK}`, `${MASTER_ADDR}` and `${HOST}` are set."""
Extra = Callable[[Pool], str]
"""Lines before the command."""
_VISIBLE = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES", "intel": "ZE_AFFINITY_MASK"}


def replica_script(
    d: Deployable,
    name: str,
    head: Sequence[str],
    make: Command,
    worker: Command | None = None,
    extra: Extra | None = None,
) -> str:
    """`worker` is the command on the further nodes of an engine, where it is another."""
    roles = [pool.role for pool in d.pools]
    spans = d.spans_nodes
    usage = f"./{name} {'|'.join(roles)} [REPLICA{' [NODE_RANK MASTER_ADDR]' if spans else ''}]"
    text = "#!/usr/bin/env bash\n" + comment(head)
    text += f"""\
set -euo pipefail
ROLE=${{1:-{roles[0]}}} REPLICA=${{2:-0}} NODE_RANK=${{3:-0}} MASTER_ADDR=${{4:-127.0.0.1}}
HOST=${{HOST:-0.0.0.0}}
usage() {{ echo "usage: {usage}; $1" >&2; exit 2; }}
export MASTER_ADDR NODE_RANK
"""
    text += 'case "$ROLE" in\n'
    for number, pool in enumerate(d.pools):
        text += f"  {pool.role})\n" + _indent(_case(d, pool, number, make, worker, extra)) + "    ;;\n"
    return text + '  *) usage "there is no role $ROLE" ;;\nesac\n'


def _case(d: Deployable, pool: Pool, number: int, make: Command, worker: Command | None, extra: Extra | None) -> str:
    place, beside = d.placement(pool), d.replicas_per_node(pool)
    lines = [
        f'((REPLICA < {pool.replicas})) || usage "{pool.role} has {pool.replicas} replicas, from 0"',
        f'((NODE_RANK < {place.nodes})) || usage "a replica is on {place.nodes} nodes, from 0"',
        f"PLACE=$((REPLICA % {beside}))  # among those on its node",
        f"PORT=${{PORT:-$(({8000 + 100 * number} + PLACE))}}",
    ]
    visible = _VISIBLE.get(d.device.vendor)
    if visible is not None and d.mig is None:
        lines += [
            f"FIRST=$((${{FIRST_DEVICE:-0}} + PLACE * {place.devices_per_node}))",
            f"export {visible}=$(seq -s, $FIRST $((FIRST + {place.devices_per_node - 1})))",
        ]
    text = "".join(f"{line}\n" for line in lines) + (extra(pool) if extra else "")
    if worker is not None and place.nodes > 1:
        text += "if ((NODE_RANK > 0)); then\n" + _indent("exec " + command(*worker(pool)) + "\n") + "fi\n"
    return text + "exec " + command(*make(pool)) + "\n"


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
