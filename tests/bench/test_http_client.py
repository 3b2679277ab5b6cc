"""The client against answers that are whole, cut short, slow, or no HTTP at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench.http_client import ConnectionLost, Exchange, events, fetch

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nX-Name: a\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello"


async def served(answer: bytes, act: Callable[[str], object]) -> bytes:
    """What the server got while `act` ran against one that answers so and closes."""
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await reader.readuntil(b"\r\n\r\n"))
        for byte in answer:
            writer.write(bytes([byte]))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        await act(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")  # type: ignore[misc]
    return bytes(got)


@pytest.mark.parametrize("answer", [WHOLE, CHUNKED, UNTIL_CLOSE])
def test_whole_answers(answer: bytes) -> None:
    async def act(url: str) -> None:
        found = await fetch(url, "/path", headers={"x-request-id": "r"})
        assert (found.status, found.body) == (200, b"hello")
        assert found.headers.get("x-name", "a") == "a"

    got = asyncio.run(served(answer, act))
    assert got.startswith(b"GET /path HTTP/1.1\r\n") and b"\r\nx-request-id: r\r\n" in got


@pytest.mark.parametrize("answer", [b"", WHOLE[:-1], CHUNKED[:-5], WHOLE[:20], b"no HTTP at all\r\n\r\n"])
def test_answers_that_are_cut_short(answer: bytes) -> None:
    async def act(url: str) -> None:
        with pytest.raises(ConnectionLost):
            await fetch(url, "/")

    asyncio.run(served(answer, act))


def test_whether_an_answer_had_begun_is_known() -> None:
    async def act(url: str) -> None:
        exchange = await Exchange.connect(url)
        await exchange.send("GET", "/")
        assert not exchange.answered
        with pytest.raises(ConnectionLost):
            await exchange.whole()
        assert exchange.answered
        exchange.close()

    asyncio.run(served(CHUNKED[:-5], act))


def test_nobody_listens() -> None:
    with pytest.raises(ConnectionLost, match="cannot connect"):
        asyncio.run(fetch("http://127.0.0.1:9", "/"))


@given(st.lists(st.integers(1, 12), max_size=30), st.sampled_from(["\n", "\r\n"]))
def test_events_however_they_are_cut(sizes: list[int], newline: str) -> None:
    lines = [
        "id: 1",
        "data: {}",
        "",
        ": a comment",
        "",
        "event: x",
        "data: a",
        "data: é",
        "",
        "data:[DONE]",
        "",
        "data: cut",
    ]
    raw = newline.join(lines).encode()

    async def chunks() -> AsyncIterator[bytes]:
        at = 0
        for size in [*sizes, len(raw)]:
            yield raw[at : at + size]
            at += size

    async def collect() -> list[tuple[str | None, str]]:
        return [event async for event in events(chunks())]

    assert asyncio.run(collect()) == [("1", "{}"), (None, "a\né"), (None, "[DONE]")]
