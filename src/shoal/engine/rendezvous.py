"""How the ranks of an engine find their driver: it listens, they join, both sides prove that they know the secret."""

from __future__ import annotations

import os
import platform
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal.engine.channel import MAX_FRAME, Channel, ChannelClosed, is_proof, new_nonce, proof
from shoal.engine.rank_messages import Challenge, Join, Refused, Welcome, encode, to_driver, to_rank

_HANDSHAKE_SECONDS = 2.0
_RETRY_SECONDS = 0.05


class LaunchError(Exception):
    """The ranks of an engine did not come together. The message is for the user."""


class Member(msgspec.Struct, frozen=True):
    """A rank that has joined."""

    channel: Channel
    rank: int
    pid: int
    host: str
    joined_at: float
    """Monotonic second of the driver."""


class Rendezvous:
    """The driver's side. Raises LaunchError if the address cannot be listened on."""

    def __init__(self, host: str, port: int, secret: bytes, world_size: int) -> None:
        self._secret = secret
        self._world_size = world_size
        self._complaints: list[str] = []
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.socket(family, socket.SOCK_STREAM)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(world_size + 8)
        except OSError as error:
            reason = error.strerror or error
            raise LaunchError(
                f"the ranks' driver cannot listen on {host}:{port}: {reason}; set launch.host to an address of this "
                "machine and launch.port to a free port (0 is any)"
            ) from None
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    def wait(
        self, seconds: float, lost: Callable[[], str | None], *, clock: Callable[[], float] = time.monotonic
    ) -> list[Member]:
        """Every rank, in order; nobody can join afterwards. `lost` says whether one that was started has ended.

        Raises LaunchError.
        """
        members: dict[int, Member] = {}
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        deadline = clock() + seconds
        try:
            while len(members) < self._world_size:
                if (ended := lost()) is not None:
                    raise LaunchError(f"{ended} before it had joined; what it said is above")
                if clock() > deadline:
                    raise LaunchError(self._missing(members, seconds))
                if poll.poll(_RETRY_SECONDS * 1000):
                    self._accept(members)
        except BaseException:
            for member in members.values():
                member.channel.close()
            raise
        finally:
            self.close()
        return [members[rank] for rank in range(self._world_size)]

    def close(self) -> None:
        self._listener.close()

    def _missing(self, members: dict[int, Member], seconds: float) -> str:
        missing = [str(rank) for rank in range(self._world_size) if rank not in members]
        complaints = f" ({'; '.join(self._complaints)})" if self._complaints else ""
        return (
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing)} of {self._world_size} did not join at "
            f"{self.address} within {seconds:g} s{complaints}: check that they were started and can reach this address"
        )

    def _accept(self, members: dict[int, Member]) -> None:
        connection, peer = self._listener.accept()
        channel = Channel(connection)
        try:
            members.update(self._welcome(channel, members))
            return
        except ChannelClosed as error:
            reason = str(error)
        except msgspec.DecodeError:
            reason = "it does not speak shoal's protocol"
        self._complaints = [*self._complaints[-3:], f"a connection from {peer[0]} was turned away: {reason}"]
        channel.close()

    def _welcome(self, channel: Channel, members: dict[int, Member]) -> dict[int, Member]:
        nonce = new_nonce()
        channel.send(encode(Challenge(nonce)))
        received = channel.receive(_HANDSHAKE_SECONDS)
        join = None if received is None else to_driver.decode(received)
        if not isinstance(join, Join):
            raise ChannelClosed("it did not introduce itself")
        if not is_proof(join.proof, _rank_proof(self._secret, nonce, join)):
            channel.send(encode(Refused("the secret is wrong: every rank needs the driver's")))
            raise ChannelClosed("it has another secret")
        reason = None
        if join.world_size != self._world_size:
            reason = f"the engine has {self._world_size} ranks, and rank {join.rank} was told {join.world_size}"
        elif not 0 <= join.rank < self._world_size:
            reason = f"there is no rank {join.rank} among {self._world_size}"
        elif join.rank in members:
            reason = f"rank {join.rank} has joined already (process {members[join.rank].pid})"
        if reason is not None:
            channel.send(encode(Refused(reason)))
            raise ChannelClosed(reason)
        channel.send(encode(Welcome(proof(self._secret, "driver", join.nonce, nonce))))
        channel.max_frame = MAX_FRAME
        return {join.rank: Member(channel, join.rank, join.pid, join.host, time.monotonic())}


def join(address: str, secret: bytes, rank: int, world_size: int, seconds: float) -> Channel:
    """A rank's side: trusted on both sides when it returns. Raises LaunchError."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            channel = Channel(socket.create_connection((host, int(port)), timeout=_HANDSHAKE_SECONDS))
            return _introduce(channel, secret, rank, world_size)
        except (OSError, ChannelClosed, msgspec.DecodeError) as error:
            # A driver that ends one launch and begins the next leaves whoever comes between them in the lurch.
            if time.monotonic() > deadline:
                raise LaunchError(f"rank {rank} cannot reach the driver at {address}: {error}") from None
            time.sleep(_RETRY_SECONDS)


def _introduce(channel: Channel, secret: bytes, rank: int, world_size: int) -> Channel:
    challenge = _next(channel)
    if not isinstance(challenge, Challenge):
        raise ChannelClosed("what listens there is no driver")
    said = Join(rank, world_size, os.getpid(), machine_name(), new_nonce(), b"")
    channel.send(encode(msgspec.structs.replace(said, proof=_rank_proof(secret, challenge.nonce, said))))
    answer = _next(channel)
    if isinstance(answer, Refused):
        raise LaunchError(f"rank {rank} was refused: {answer.reason}")
    expected = proof(secret, "driver", said.nonce, challenge.nonce)
    if not isinstance(answer, Welcome) or not is_proof(answer.proof, expected):
        raise LaunchError(f"rank {rank}: who listens at the driver's address does not know the secret")
    channel.max_frame = MAX_FRAME
    return channel


def _next(channel: Channel) -> object:
    received = channel.receive(_HANDSHAKE_SECONDS)
    if received is None:
        raise ChannelClosed("it said nothing")
    return to_rank.decode(received)


def _rank_proof(secret: bytes, nonce: bytes, join: Join) -> bytes:
    return proof(secret, "rank", nonce, join.nonce, struct.pack(">qq", join.rank, join.world_size))


def machine_name() -> str:
    """The same for all processes that share this machine's memory, whatever host names containers give it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
