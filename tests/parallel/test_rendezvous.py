"""Ranks that do not come, come twice, know another secret or are not ranks at all: each is said by name."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.engine.channel import Channel, ChannelClosed
from shoal.engine.executor import open_executor
from shoal.engine.launch import make_launcher, shared_secret
from shoal.engine.rendezvous import LaunchError, Member, Rendezvous, join

SECRET = b"s" * 32


class Waiting:
    """A driver that waits for two ranks on a thread, until it is told that they are late."""

    def __init__(self) -> None:
        self._late = 0.0
        self.rendezvous = Rendezvous("127.0.0.1", 0, SECRET, 2)
        self.members: list[Member] = []
        self.error: LaunchError | None = None
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self.members = self.rendezvous.wait(60.0, lambda: None, clock=lambda: time.monotonic() + self._late)
        except LaunchError as error:
            self.error = error

    def end(self) -> str:
        """What it says when its time is up."""
        self._late = 60.0
        self._thread.join()
        self.rendezvous.close()
        return str(self.error)


@contextmanager
def waiting() -> Iterator[Waiting]:
    driver = Waiting()
    try:
        yield driver
    finally:
        driver.end()


def test_two_ranks_join_in_any_order_and_can_talk() -> None:
    with waiting() as driver:
        channels = {rank: join(driver.rendezvous.address, SECRET, rank, 2, 60) for rank in (1, 0)}
        assert driver.end() == "None"
        assert [member.rank for member in driver.members] == [0, 1]
        channels[1].send(b"x" * 1_000_000)
        assert driver.members[1].channel.receive(60) == b"x" * 1_000_000
        assert driver.members[0].channel.receive(0.01) is None
        channels[0].close()
        with pytest.raises(ChannelClosed):
            driver.members[0].channel.receive(60)


def test_a_rank_that_never_arrives_is_named() -> None:
    with waiting() as driver:
        join(driver.rendezvous.address, SECRET, 0, 2, 60)
        assert "rank 1 of 2 did not join at 127.0.0.1:" in driver.end()
    with waiting() as driver:
        assert "ranks 0, 1 of 2 did not join" in driver.end()


def test_a_wrong_secret_is_refused_on_both_sides() -> None:
    with waiting() as driver:
        with pytest.raises(LaunchError, match="rank 0 was refused: the secret is wrong"):
            join(driver.rendezvous.address, b"t" * 32, 0, 2, 60)
        error = driver.end()
    assert "ranks 0, 1 of 2" in error and "turned away: it has another secret" in error


@pytest.mark.parametrize(
    ("rank", "world_size", "reason"),
    [
        (0, 3, "the engine has 2 ranks, and rank 0 was told 3"),
        (2, 2, "there is no rank 2 among 2"),
        (1, 2, "rank 1 has joined already"),
    ],
)
def test_a_rank_that_does_not_belong_is_told_why(rank: int, world_size: int, reason: str) -> None:
    with waiting() as driver:
        join(driver.rendezvous.address, SECRET, 1, 2, 60)
        with pytest.raises(LaunchError, match=reason):
            join(driver.rendezvous.address, SECRET, rank, world_size, 60)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 5) + b"\xc1\xc1\xc1\xc1\xc1", b""])
def test_a_stranger_costs_nothing_and_ranks_still_join(said: bytes) -> None:
    with waiting() as driver:
        host, _, port = driver.rendezvous.address.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(said)
            if not said:
                stranger.shutdown(socket.SHUT_WR)
            for rank in (0, 1):
                join(driver.rendezvous.address, SECRET, rank, 2, 60)
        assert driver.end() == "None"


def test_a_driver_that_does_not_know_the_secret_is_not_obeyed() -> None:
    """Somebody else listens at the address: the rank leaves before it reads anything from it."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            channel = Channel(connection)
            channel.send(b"\x82\xa4type\xa9Challenge\xa5nonce\xc4\x01x")
            channel.receive(60)
            channel.send(b"\x82\xa4type\xa7Welcome\xa5proof\xc4\x01x")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LaunchError, match="does not know the secret"):
            join(f"127.0.0.1:{impostor.getsockname()[1]}", SECRET, 0, 2, 60)
        thread.join()


def test_a_port_in_use_and_an_address_that_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use.*launch.port"
        ):
            Rendezvous("127.0.0.1", port, SECRET, 2)
    with pytest.raises(LaunchError, match="cannot listen on 192.0.2.1:0"):
        Rendezvous("192.0.2.1", 0, SECRET, 2)


def test_nobody_listens() -> None:
    with pytest.raises(LaunchError, match="rank 0 cannot reach the driver at 127.0.0.1:1"):
        join("127.0.0.1:1", SECRET, 0, 2, 0.1)


# --- what the launchers need ----------------------------------------------------------------------------------------


def test_secrets(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert len(shared_secret(LaunchConfig())) == 32 and shared_secret(LaunchConfig()) != shared_secret(LaunchConfig())
    with pytest.raises(LaunchError, match="need a secret.*launch.secret_file"):
        shared_secret(LaunchConfig(launcher="env"))
    file = tmp_path / "secret"
    with pytest.raises(LaunchError, match="No such file"):
        shared_secret(LaunchConfig(secret_file=str(file)))
    file.write_bytes(b"short\n")
    with pytest.raises(LaunchError, match="holds 5 bytes of at least 16"):
        shared_secret(LaunchConfig(secret_file=str(file)))
    file.write_bytes(b"0123456789abcdef\n")
    assert shared_secret(LaunchConfig(launcher="env", secret_file=str(file))) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK must be a number, not 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "ranks count from 0"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "only rank 0 drives"),
    ],
)
def test_an_environment_that_makes_no_sense(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=reason):
        make_launcher(EngineConfig(model="any", launch=LaunchConfig(launcher="env")))


def test_a_world_of_another_size_than_the_layout(monkeypatch: pytest.MonkeyPatch, tmp_path, unused_port: int) -> None:  # type: ignore[no-untyped-def]
    from tests.checkpoints import make_checkpoint

    environment = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port - 1)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "secret").write_bytes(SECRET)
    launch = LaunchConfig(launcher="env", secret_file=str(tmp_path / "secret"))
    path = make_checkpoint("llama", tmp_path)
    executor = open_executor(EngineConfig(model=str(path), layout=Layout(tp=2), launch=launch))
    with pytest.raises(LaunchError, match="WORLD_SIZE is 3, and the layout has 2 ranks"):
        executor.start()


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
