"""TLS and mTLS over a real uvicorn: rotation loses nothing, the wrong side is refused, and everyone is told why."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from shoal.serve.http_connection import LimitedConnection
from shoal.serve.protocol import Limits
from shoal.serve.tls import Certificates, TlsConfig, TlsError, require_safe_listener, use_tls
from tests.serve.certificates import Authority, replace
from tests.serve.running import until

HOST = "127.0.0.1"
GATEWAY, ENGINE = "spiffe://shoal/gateway", "spiffe://shoal/engine"


class Files:
    """Certificate, key and authorities of one side, in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.certificate, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        self.ca = directory / f"{name}-ca.pem"

    def write(self, pair: tuple[bytes, bytes] | None = None, ca: bytes | None = None) -> None:
        if pair is not None:
            replace(self.certificate, pair[0])
            replace(self.key, pair[1])
        if ca is not None:
            replace(self.ca, ca)

    def config(self, *, mutual: bool = True, names: tuple[str, ...] = ()) -> TlsConfig:
        ca = str(self.ca) if mutual else None
        return TlsConfig(certificate=str(self.certificate), key=str(self.key), ca=ca, allowed_names=names)


class Sides:
    def __init__(self, directory: Path) -> None:
        self.authority = Authority("shoal")
        self.server, self.client = Files(directory, "server"), Files(directory, "client")
        self.server.write(self.authority.issue("localhost", HOST, ENGINE), self.authority.pem)
        self.client.write(self.authority.issue(GATEWAY), self.authority.pem)


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path)


async def app(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[str]:
    listener = socket.create_server((HOST, 0))
    config = uvicorn.Config(app, http=LimitedConnection.with_limits(Limits()), lifespan="off", log_level="warning")
    server = uvicorn.Server(use_tls(config, context))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"https://{HOST}:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        await running
        listener.close()


def client(context: ssl.SSLContext) -> httpx.AsyncClient:
    """Each request on a connection of its own."""
    return httpx.AsyncClient(verify=context, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)


async def ask(url: str, context: ssl.SSLContext) -> str:
    async with client(context) as asking:
        return (await asking.get(url)).text


def twice(certificates: Certificates) -> None:
    certificates.look()
    certificates.look()


def uvloop_too(body: Callable[[], Any]) -> None:
    import uvloop

    asyncio.run(body())
    uvloop.run(body())


def test_mutual_tls_by_names(sides: Sides) -> None:
    async def body() -> None:
        server = Certificates(sides.server.config(names=(GATEWAY,))).server_context()
        context = Certificates(sides.client.config(names=(ENGINE,))).client_context()
        async with serving(server) as url:
            assert await ask(url, context) == "https"

    uvloop_too(body)


def test_who_is_refused_and_what_each_side_is_told(sides: Sides, caplog: pytest.LogCaptureFixture) -> None:
    other = Authority("someone else")
    ours = sides.authority

    def speak(pair: tuple[bytes, bytes] | None, ca: bytes, names: tuple[str, ...] = ()) -> ssl.SSLContext:
        sides.client.write(pair, ca)
        config = sides.client.config(names=names) if pair is not None else TlsConfig(ca=str(sides.client.ca))
        return Certificates(config, clock=lambda: time.time() - 86400 * 1.5).client_context()

    # Who the client is, what it is told of a server that it does not believe, what the server's log says.
    cases: list[tuple[ssl.SSLContext, str, str]] = [
        (speak(None, ours.pem), "", "peer did not return a certificate"),
        (speak(other.issue(GATEWAY), ours.pem), "", "unable to get local issuer certificate"),
        (speak(ours.issue(GATEWAY, end_days=-1), ours.pem), "", "certificate has expired"),
        (speak(ours.issue(ENGINE), ours.pem), "", f"the certificate is of {ENGINE}, not of {GATEWAY}"),
        (speak(ours.issue(GATEWAY), other.pem), "certificate verify failed", ""),
        (speak(ours.issue(GATEWAY), ours.pem, (GATEWAY,)), f"not of {GATEWAY}", ""),
    ]

    async def body() -> None:
        server = Certificates(sides.server.config(names=(GATEWAY,))).server_context()
        async with serving(server) as url:
            for context, told, logged in cases:
                caplog.clear()
                with pytest.raises(httpx.TransportError) as error:
                    await ask(url, context)
                assert told in str(error.value)
                await until(lambda: logged in caplog.text, "the server to come to it")  # noqa: B023
            good = speak(ours.issue(GATEWAY), ours.pem)
            assert await ask(url, good) == "https"

    uvloop_too(body)


def test_a_server_that_is_not_the_one_asked_for_is_refused(sides: Sides) -> None:
    async def body() -> None:
        sides.server.write(sides.authority.issue("elsewhere.example"))
        server = Certificates(sides.server.config(mutual=False)).server_context()
        async with serving(server) as url:
            context = Certificates(TlsConfig(ca=str(sides.client.ca))).client_context()
            with pytest.raises(httpx.ConnectError, match="IP address mismatch"):
                await ask(url, context)
            by_name = TlsConfig(ca=str(sides.client.ca), allowed_names=("elsewhere.example",))
            assert await ask(url, Certificates(by_name).client_context()) == "https"

    asyncio.run(body())


def test_rotation_of_everything_under_load_loses_no_request(sides: Sides) -> None:
    """Certificates of both sides, then the authority: the new one beside the old, and then alone."""

    async def body() -> None:
        events: list[str] = []
        ours = Certificates(sides.server.config(), on_event=lambda kind, message: events.append(kind))
        theirs = Certificates(sides.client.config())
        seen: dict[int, int] = {}
        failed: list[Exception] = []
        stop = asyncio.Event()

        async def load(url: str, context: ssl.SSLContext) -> None:
            while not stop.is_set():
                try:
                    reader, writer = await asyncio.open_connection(HOST, int(url[:-1].rpartition(":")[2]), ssl=context)
                    shown = writer.get_extra_info("ssl_object").getpeercert()
                    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    assert b"https" in await reader.read()
                    writer.close()
                    seen[shown["serialNumber"]] = seen.get(shown["serialNumber"], 0) + 1
                except Exception as error:
                    failed.append(error)

        async def everyone_saw_new() -> None:
            twice(theirs)
            twice(ours)
            before = sum(seen.values())
            while sum(seen.values()) < before + 20 and not failed:
                await asyncio.sleep(0.005)

        context = theirs.client_context()
        async with serving(ours.server_context()) as url:
            loads = [asyncio.create_task(load(url, context)) for _ in range(4)]
            await everyone_saw_new()
            new = Authority("the next")
            both = sides.authority.pem + new.pem
            for pair_of, ca in ((sides.authority, None), (None, both), (new, None), (None, new.pem)):
                if pair_of is not None:
                    sides.server.write(pair_of.issue(HOST))
                    sides.client.write(pair_of.issue(GATEWAY))
                sides.server.write(ca=ca)
                sides.client.write(ca=ca)
                await everyone_saw_new()
            stop.set()
            await asyncio.gather(*loads)
            assert failed == [] and len(seen) == 3
            assert events == ["certificate_reloaded"] * 4
            # The authority that was removed is believed no more: the rotation was real.
            sides.client.write(sides.authority.issue(GATEWAY))
            with pytest.raises(httpx.TransportError):
                await ask(url, Certificates(sides.client.config()).client_context())

    asyncio.run(body())


def test_a_broken_pair_is_refused_and_the_old_one_serves_on(sides: Sides) -> None:
    async def body() -> None:
        events: list[tuple[str, str]] = []
        certificates = Certificates(sides.server.config(), on_event=lambda *event: events.append(event))
        context = Certificates(sides.client.config()).client_context()
        ours = sides.authority
        half = ours.issue(HOST)
        async with serving(certificates.server_context()) as url:
            broken: list[tuple[Callable[[], object], str]] = [
                (lambda: replace(sides.server.certificate, half[0]), "the key is not the certificate's"),
                (lambda: replace(sides.server.certificate, b"-----BEGIN"), "is no PEM file with a certificate"),
                (lambda: sides.server.certificate.unlink(), "cannot be read: No such file or directory"),
                (lambda: sides.server.write(ours.issue(HOST, end_days=-1)), "expired on"),
                (lambda: sides.server.write(ours.issue(HOST, begin_days=1)), "is this machine's clock right?"),
                (lambda: sides.server.write(ours.issue(HOST), ca=b"nothing"), "is no PEM file with a certificate"),
            ]
            for breaks, message in broken:
                breaks()
                certificates.look()
                assert events == []  # not before it is seen a second time
                certificates.look()
                certificates.look()
                assert [kind for kind, _ in events] == ["certificate_refused"]  # said once
                assert message in events[0][1] and "stays in use" in events[0][1]
                assert await ask(url, context) == "https"
                events.clear()
            sides.server.write(ca=ours.pem)
            twice(certificates)
            assert [kind for kind, _ in events] == ["certificate_reloaded"]
            assert await ask(url, context) == "https"

    asyncio.run(body())


def test_the_watch_sees_a_new_pair_by_itself(sides: Sides) -> None:
    async def body() -> None:
        reloaded = asyncio.Event()
        certificates = Certificates(sides.server.config(), on_event=lambda *_: reloaded.set())
        watching = asyncio.create_task(certificates.watch(0.01))
        await asyncio.sleep(0.05)
        assert not reloaded.is_set()
        sides.server.write(sides.authority.issue(HOST))
        await asyncio.wait_for(reloaded.wait(), 60)
        watching.cancel()

    asyncio.run(body())


def test_what_expires_within_two_weeks_is_said_once_a_day(sides: Sides) -> None:
    now, events = [time.time()], list[str]()
    sides.server.write(sides.authority.issue(HOST, end_days=20))
    certificates = Certificates(
        sides.server.config(), on_event=lambda kind, text: events.append(f"{kind}: {text}"), clock=lambda: now[0]
    )
    for _ in range(24 * 5):
        certificates.look()
        now[0] += 3600
    assert events == []
    for _ in range(24 * 4):
        certificates.look()
        now[0] += 3600
    assert len(events) in (3, 4)
    assert re.match(r"certificate_expiring: .*server.pem expires in 1[34]\.\d days, on ", events[0])
    now[0] += 86400 * 30
    certificates.look()
    assert "has expired" in events[-1]
    sides.server.write(sides.authority.issue(HOST, end_days=200))
    before = len(events)
    twice(certificates)
    certificates.look()
    assert [event.partition(":")[0] for event in events[before:]] == ["certificate_reloaded"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TlsConfig(), "tls.certificate is not set: a listener needs one, and its key"),
        (TlsConfig(certificate="/none.pem"), "tls.certificate /none.pem cannot be read: No such file or directory"),
        (TlsConfig(ca="/none.pem"), "tls.ca /none.pem cannot be read: No such file or directory"),
    ],
)
def test_bad_files_at_the_start(config: TlsConfig, message: str) -> None:
    with pytest.raises(TlsError) as error:
        Certificates(config).server_context()
    assert str(error.value) == message


def test_names_without_an_authority_are_refused(sides: Sides) -> None:
    config = sides.server.config(mutual=False, names=(GATEWAY,))
    with pytest.raises(TlsError, match="tls.allowed_names is set and tls.ca is not"):
        Certificates(config).server_context()


def test_internal_listeners_are_on_loopback_or_ask_for_certificates() -> None:
    mutual = TlsConfig(certificate="c", key="k", ca="a")
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        require_safe_listener(host, None, allow_remote=False)
    for host in ("0.0.0.0", "::", "", "10.0.0.1"):
        with pytest.raises(TlsError, match="use 127.0.0.1, or set allow_remote"):
            require_safe_listener(host, mutual, allow_remote=False)
        for tls, missing in ((None, "tls.certificate"), (TlsConfig(certificate="c", key="k"), "tls.ca")):
            with pytest.raises(TlsError, match=f"engine: .*and {missing} is not set"):
                require_safe_listener(host, tls, allow_remote=True, name="engine")
        require_safe_listener(host, mutual, allow_remote=True)


@contextlib.contextmanager
def plain_tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """One connection, over blocking sockets."""
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            plain = listener.accept()[0]
            with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                connection.sendall(b"hello")
            plain.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(("name", "is_let_in"), [(GATEWAY, True), ("spiffe://shoal/other", False)])
def test_blocking_sockets_are_checked_too(
    sides: Sides, name: str, is_let_in: bool, caplog: pytest.LogCaptureFixture
) -> None:
    context = Certificates(sides.client.config(names=(ENGINE,))).client_context()
    caplog.set_level(logging.WARNING)
    server = Certificates(sides.server.config(names=(name,))).server_context()
    with (
        plain_tls_server(server) as port,
        socket.create_connection((HOST, port)) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as made,
    ):
        try:
            got = made.recv(10)
        except OSError:
            got = b""
        session = made.session
        assert session is None or not session.has_ticket  # there is no way in but by a certificate
    assert got == (b"hello" if is_let_in else b"")
    assert ("the certificate is of" in caplog.text) != is_let_in
