"""What the driver of an engine and its ranks say to each other: msgpack, one frame a message."""

from __future__ import annotations

import msgspec

from shoal.core.config import EngineConfig
from shoal.core.expert_load import HeldRows
from shoal.core.layout import Axis
from shoal.core.start_report import StartProgress
from shoal.core.types import StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import WorkerInfo

# --- rank to driver, before it is trusted ---------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    rank: int
    world_size: int
    """As the rank was told: of one engine."""
    pid: int
    host: str
    """Name of the machine, the same for all ranks on it."""
    nonce: bytes
    proof: bytes
    """HMAC over both nonces, rank and world size."""


# --- driver to rank -------------------------------------------------------------------------------------------------


class Challenge(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    proof: bytes
    """That the driver knows the secret too."""


class Refused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    reason: str


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ranks that talk along one axis, and over what."""

    axis: Axis
    ranks: list[int]
    backend: str
    """shared_memory, gloo or nccl."""
    path: str
    """Of the shared memory; for the others a name that no other group has."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    config: EngineConfig
    local_rank: int
    ranks_on_host: int
    groups: list[Group]
    expert_rows: dict[int, list[int]] = {}
    """By layer, for each expert: what `config.expert_load` says."""


class Measure(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """See how much KV there is room for. All ranks have their weights: what they run for it they run together."""


class Allocate(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The KV that every rank has room for."""

    num_blocks: int
    max_len: int


class Run(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    plan: StepPlan


class Count(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Say what your experts have computed."""


class StoreReply(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    value: bytes


class Stop(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Exit, and do not come back."""


# --- rank to driver -------------------------------------------------------------------------------------------------


class Progressed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    progress: StartProgress
    """Of this rank alone."""


class StoreSet(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    key: str
    value: bytes


class StoreGet(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Answered as soon as somebody has set the key."""

    key: str


class HoldsWeights(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """All of its part is loaded."""


class LoadedPart(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    num_blocks: int
    max_len: int


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    info: WorkerInfo


class Done(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    result: StepResult | WorkerFailure


class Counted(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    rows: list[HeldRows]


class Beat(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The rank lives."""


class RankFailed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """It could not start. The message is for the user."""

    message: str


ToRank = Challenge | Welcome | Refused | Load | Measure | Allocate | Run | Count | StoreReply | Stop
ToDriver = (
    Join | Progressed | StoreSet | StoreGet | HoldsWeights | LoadedPart | Ready | Done | Counted | Beat | RankFailed
)

encode = msgspec.msgpack.Encoder().encode
to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
to_driver: msgspec.msgpack.Decoder[ToDriver] = msgspec.msgpack.Decoder(ToDriver)
