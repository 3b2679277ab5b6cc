"""What front and engine process say to each other: msgpack over one ZeroMQ pair, one message a step for all of it."""

from __future__ import annotations

import msgspec

from shoal.core.expert_load import ExpertLoad
from shoal.core.model_spec import ModelSpec
from shoal.core.start_report import StartProgress, StartReport
from shoal.core.types import EngineLoad, Output, Rejected, Request

HEARTBEAT_SECONDS = 1.0
"""Between messages of an idle engine."""


class Add(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    request_id: str
    index: int | None = None
    """One of its sequences; None is all."""


class Stop(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Give up everything and exit."""


ToEngine = Add | Abort | Stop


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a started engine is: limits for the front, figures for people."""

    spec: ModelSpec
    num_blocks: int
    block_size: int
    max_len: int
    weight_bytes: int
    kv_bytes: int
    device: str
    ops: str
    attention: str
    dtype: str
    start: StartReport
    """From the start of the engine process."""


class Starting(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    progress: StartProgress


class Started(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    info: EngineInfo
    load: EngineLoad


class StartFailed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    message: str
    """For the user: what is wrong and what to do."""


class Step(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What came of one step, or a sign of life between steps."""

    outputs: list[Output]
    rejected: list[Rejected]
    load: EngineLoad
    progress_at: float
    """Monotonic second of the last committed step, or of this message if there was nothing to do."""
    num_spares: int
    """Warm ones that are ready."""
    experts: ExpertLoad | None = None
    """Now and then, of a model with experts."""


FromEngine = Starting | Started | StartFailed | Step

encode = msgspec.msgpack.Encoder().encode
to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
