"""The fleet's HTTP client against raw sockets: what ends an answer, what is refused, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shoal.serve.http_client import HttpClient, HttpError
from tests import virtual_time


@contextlib.asynccontextmanager
async def answering(
    answer: bytes, *, then_close: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server that answers every request with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
                if then_close:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{'https' if tls else 'http'}://{'localhost' if tls else host}:{port}"
        server.close()


async def fetch(url: str, **options: object) -> tuple[int, bytes]:
    client = HttpClient(url, **options)  # type: ignore[arg-type]
    try:
        response = await client.fetch("GET", "/x", seconds=1.0, max_bytes=1000)
        return response.status, response.body
    finally:
        client.close()


@pytest.mark.parametrize(
    ("answer", "then_close"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\n\r\nhi", True),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", True),
    ],
)
def test_where_an_answer_ends(answer: bytes, then_close: bool) -> None:
    async def main() -> None:
        async with answering(answer, then_close=then_close) as url:
            assert await fetch(url) == (200, b"hi")

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("answer", "then_close", "kind", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n", False, "lost", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, False, "lost", "head is larger"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", True, "lost", "closed before"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", False, "timeout", "no answer to GET /x within 1 s"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n" + b"z" * 1001, False, "lost", "larger than 1000 bytes"),
        (b"", True, "closed", "closed before"),
    ],
)
def test_what_is_no_answer(answer: bytes, then_close: bool, kind: str, message: str) -> None:
    async def main() -> None:
        async with answering(answer, then_close=then_close) as url:
            with pytest.raises(HttpError, match=message) as caught:
                await fetch(url)
            assert caught.value.kind == kind

    virtual_time.run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        async with answering(b"") as url:
            pass
        with pytest.raises(HttpError, match="refuses connections") as caught:
            await fetch(url)
        assert caught.value.kind == "refused"
        with pytest.raises(HttpError) as caught:
            await fetch("http://host.invalid:1")
        assert caught.value.kind == "unreachable"

    virtual_time.run(main())


def test_a_header_cannot_be_smuggled_in() -> None:
    with pytest.raises(ValueError, match="line break"):
        HttpClient("http://127.0.0.1:1", headers={"authorization": "Bearer a\r\nx: y"})


def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)

    async def main() -> None:
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(certificate, key)
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", tls=server) as url:
            assert await fetch(url, tls=trusting) == (200, b"hi")
            with pytest.raises(HttpError, match="certificate verify failed") as caught:
                await fetch(url)
            assert caught.value.kind == "unreachable"

    virtual_time.run(main())


def self_signed(directory: Path) -> tuple[Path, Path]:
    """For localhost."""
    pytest.importorskip("cryptography")
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_connections_are_kept_ready_and_used_again() -> None:
    async def main() -> None:
        connections: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await client.fetch("GET", "/", seconds=1.0)
            async with asyncio.timeout(5):
                while len(connections) < 3:  # the one that was needed, and two
                    await asyncio.sleep(0.01)
            for _ in range(3):
                answers = [client.fetch("GET", "/", seconds=1.0) for _ in range(3)]
                assert [answer.status for answer in await asyncio.gather(*answers)] == [200] * 3
            assert len(connections) < 6, "three at once need three, and at most two more are opened ahead"
            client.close()

    virtual_time.run(main())
