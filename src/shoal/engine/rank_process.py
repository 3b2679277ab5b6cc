"""A rank as a process: join the driver, load a part of the model, run step plans. The same for every launcher.

Started as `python -m shoal.engine.rank_process` with a RankStart on the first line of standard input. It exits when
that ends, when the driver is gone, or when told to.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

import msgspec

from shoal.core.start_report import Laps, StartProgress
from shoal.core.types import WorkerFailure
from shoal.engine.channel import Channel, ChannelClosed
from shoal.engine.child import bind_to_parent, first_line, plain
from shoal.engine.launch.base import LOST, NEVER_JOINED, STOPPED, RankStart
from shoal.engine.rank_messages import (
    Allocate,
    Beat,
    Count,
    Counted,
    Done,
    HoldsWeights,
    Load,
    LoadedPart,
    Measure,
    Progressed,
    RankFailed,
    Ready,
    Run,
    Stop,
    encode,
    to_rank,
)
from shoal.engine.rendezvous import LaunchError, join


class Rank:
    def __init__(self, channel: Channel, start: RankStart) -> None:
        self._channel = channel
        self._rank = start.rank
        self._own_device = start.own_device

    def run(self) -> int:
        """Until told to stop, or until the driver is gone."""
        load = self._next()
        if not isinstance(load, Load):
            return STOPPED
        try:
            laps = Laps(f"rank {self._rank}", time.monotonic())
            from shoal.engine.groups import open_groups  # brings torch
            from shoal.engine.worker import Loaded, Seat, Worker

            laps.end("import", time.monotonic())
            local_rank = 0 if self._own_device else load.local_rank
            comms = open_groups(load.groups, self._rank, self._channel, load.config, local_rank)
            laps.end("rendezvous", time.monotonic())
            seat = Seat(rank=self._rank, local_rank=local_rank, ranks_on_host=load.ranks_on_host)
            worker = Worker(load.config, seat, comms, load.expert_rows, laps)
            worker.load(self._report)
            self._send(HoldsWeights())
            if not isinstance(self._next(), Measure):
                return STOPPED
            part = worker.measure(self._report)
            self._send(LoadedPart(part.num_blocks, part.max_len))
            agreed = self._next()
            if not isinstance(agreed, Allocate):
                return STOPPED
            self._send(Ready(worker.allocate(Loaded(agreed.num_blocks, agreed.max_len), self._report)))
        except Exception as error:
            if isinstance(error, ChannelClosed):
                raise
            self._send(RankFailed(plain(error)))
            return LOST
        draws = worker.draws
        while isinstance(message := self._next(), Run | Count):
            if isinstance(message, Count):
                self._send(Counted(worker.expert_rows()))
                continue
            result = worker.step(message.plan)
            if draws or isinstance(result, WorkerFailure):
                self._send(Done(result))
        return STOPPED if isinstance(message, Stop) else LOST

    def beat(self, every: float) -> None:
        """Say now and then that this rank lives, from a thread of its own."""

        def run() -> NoReturn:
            pause = threading.Event()
            while True:
                try:
                    self._send(Beat())
                except ChannelClosed:
                    os._exit(LOST)  # whatever the main thread waits for will not come
                pause.wait(every)

        threading.Thread(target=run, name="heartbeat", daemon=True).start()

    def _report(self, progress: StartProgress) -> None:
        self._send(Progressed(progress))

    def _next(self) -> object:
        received = self._channel.receive()
        if received is None:
            raise ChannelClosed("nothing was received")
        return to_rank.decode(received)

    def _send(self, message: msgspec.Struct) -> None:
        self._channel.send(encode(message))


def main() -> int:
    line = first_line()
    bind_to_parent()
    if not line:
        return LOST  # the parent died before it could say what to run
    start = msgspec.json.decode(line, type=RankStart)
    try:
        channel = join(start.address, bytes.fromhex(start.secret), start.rank, start.world_size, start.join_seconds)
    except LaunchError as error:
        print(f"shoal: {error}", file=sys.stderr, flush=True)
        return NEVER_JOINED
    rank = Rank(channel, start)
    rank.beat(start.beat_seconds)
    try:
        status = rank.run()
    except ChannelClosed:
        status = LOST  # the driver is gone
    sys.stderr.flush()
    os._exit(status)  # threads of libraries may wait for ranks that are gone


if __name__ == "__main__":
    sys.exit(main())
