"""Load against mock engines in this process: what is counted must be what was done to the streams."""

import asyncio
import json
import math
import time
from contextlib import asynccontextmanager

import httpx
import pytest

from gateway.arrivals import Arrival, Phase, from_trace, poisson, to_trace
from gateway.load import Shape, figures_of, make_streams, measure, percentile
from gateway.mock_openai import BLOCK_TOKENS, Engine, PrefixCache, serve
from gateway.streams import Stream
from gateway.timing import Law, Schedule
from gateway.tokens import vocabulary

WORDS = vocabulary("")
FAST = Law(ttft=0.0, itl=0.001)


@asynccontextmanager
async def mocks(count=1, law=FAST, max_len=4096):
    engines = [Engine("mock", WORDS, Schedule(law), max_len) for _ in range(count)]
    servers = await serve(engines, [0] * count)
    try:
        yield engines, [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    finally:
        for server in servers:
            server.close()


async def run_load(urls, *, arrivals=None, shape=None, patience=10.0):
    arrivals = arrivals or [Arrival(0.002 * i, 10, 5) for i in range(30)]
    streams, expected, _, cpu = await measure(urls, arrivals, shape or Shape(), WORDS, warm=2, patience=patience)
    return streams, expected, figures_of(streams, expected, WORDS, cpu)


@pytest.mark.parametrize("shape", [Shape(), Shape(prompt="ids"), Shape(api="chat"), Shape(extra='{"n": 1}')])
def test_what_mocks_say_is_exact(shape):
    async def run():
        async with mocks(2) as (engines, urls):
            _, _, figures = await run_load(urls, shape=shape)
            return figures, [engine.finished for engine in engines]

    figures, finished = asyncio.run(run())
    assert (figures.completed, figures.failed, figures.unequal) == (30, 0, 0)
    assert figures.tokens == figures.events == 150
    assert finished == [15, 15]
    assert figures.ttft_p50 <= figures.ttft_p99 <= figures.e2e_p99 < math.inf


@asynccontextmanager
async def between(url, spoil):
    """A proxy for one mock that hands every read of the answer through `spoil`."""
    host, port = url.removeprefix("http://").split(":")

    async def pump(reader, writer, change):
        while data := await reader.read(1 << 16):
            data = change(data)
            if data is None:
                break
            writer.write(data)
        writer.close()

    async def handle(reader, writer):
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, back, lambda data: data), pump(there, writer, spoil), return_exceptions=True)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def through(spoil, **options):
    async def run():
        async with mocks() as (_, urls), between(urls[0], spoil) as url:
            _, _, figures = await run_load([url], **options)
            return figures

    return asyncio.run(run())


class Nth:
    """Changes one read that holds a token, the `number`th of all, and counts that it did."""

    def __init__(self, number, change):
        self.left, self.change, self.done = number, change, 0

    def __call__(self, data):
        if b"token_ids" in data:
            self.left -= 1
            if self.left == 0:
                self.done += 1
                return self.change(data)
        return data


def chunks(data):
    """The HTTP chunks in what was read. Mocks write one for each token, never one without its end."""
    made, rest = [], data
    while rest:
        size = int(rest.split(b"\r\n", 1)[0], 16)
        end = rest.index(b"\r\n") + 2 + size + 2
        made.append(rest[:end])
        rest = rest[end:]
    return made


def test_a_lost_a_repeated_and_a_changed_token_are_seen():
    one = {"arrivals": [Arrival(0.0, 10, 8)]}
    assert through(lambda data: data, **one).unequal == 0
    for change, missing, duplicate in (
        (lambda data: b"".join(chunks(data)[1:]), 1, 0),
        (lambda data: chunks(data)[0] + data, 0, 1),
        (lambda data: data.replace(b'"token_ids":[1', b'"token_ids":[9', 1).replace(b":[2", b":[8", 1), 1, 1),
    ):
        spoil = Nth(4, change)
        figures = through(spoil, **one)
        assert spoil.done == 1
        assert (figures.missing_tokens, figures.duplicate_tokens, figures.unequal) == (missing, duplicate, 1)


def test_a_stream_that_breaks_off_is_infinitely_late():
    spoil = Nth(4, lambda data: None)
    figures = through(spoil, arrivals=[Arrival(0.0, 10, 8)])
    assert spoil.done == 1
    assert (figures.completed, figures.failed) == (0, 1)
    assert figures.ttft_p50 == math.inf and "connection was lost" in figures.first_error


def test_a_server_that_does_not_answer_in_time_and_one_that_is_not_there():
    figures = through(lambda data: b"", arrivals=[Arrival(0.0, 10, 8)], patience=0.2)
    assert figures.failed == 1 and "not done" in figures.first_error

    async def run():
        streams, _, _, _ = await measure(
            ["http://127.0.0.1:1"], [Arrival(0.0, 1, 1)], Shape(), WORDS, warm=0, patience=1.0
        )
        return streams[0].error

    assert "cannot connect" in asyncio.run(run())


def test_a_slow_server_does_not_slow_the_load_down():
    async def run():
        async with mocks(law=Law(ttft=0.3, itl=0.0, slots=1)) as (_, urls):
            arrivals = [Arrival(0.01 * i, 10, 1) for i in range(4)]
            streams, _, figures = await run_load(urls, arrivals=arrivals)
            return streams, figures

    streams, figures = asyncio.run(run())
    assert max(stream.sent for stream in streams) < min(stream.ended for stream in streams)
    assert figures.ttft_p99 > 3 * figures.ttft_p50 * 0.5  # those behind wait for those before them
    assert figures.completed == 4


def test_bodies_in_any_pieces_are_one_stream():
    body = b'data: {"prompt_token_ids":[7],"token_ids":[1,2]}\n\ndata: {"token_ids":[3]}\n\ndata: [DONE]\n\n'
    for size in range(1, len(body)):
        stream = Stream(0, b"")
        for at in range(0, len(body), size):
            stream.received(body[at : at + size], float(at))
        assert (stream.ids, stream.counts, stream.finished) == ([1, 2, 3], [2, 1], True)


def test_an_engine_speaks_like_vllm():
    async def run():
        async with mocks(max_len=64) as (engines, urls), httpx.AsyncClient(base_url=urls[0]) as client:
            models = (await client.get("/v1/models")).json()
            assert (await client.get("/health")).status_code == 200
            assert models["data"][0]["max_model_len"] == 64
            asked = {"prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True}
            whole = (await client.post("/v1/completions", json=asked)).json()
            assert whole["choices"][0]["token_ids"] == WORDS.continuation([1, 2, 3], 4)
            assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            streamed = (await client.post("/v1/completions", json=asked | {"stream": True, "n": 2})).text
            assert streamed.count('"finish_reason":"length"') == 2 and streamed.endswith("data: [DONE]\n\n")
            long = await client.post("/v1/completions", json={"prompt": [1] * 60, "max_tokens": 5})
            assert long.status_code == 400 and "64 tokens" in long.json()["error"]["message"]
            assert "vllm:generation_tokens_total" in (await client.get("/metrics")).text
            return engines[0].generated_tokens

    assert asyncio.run(run()) == 12


def test_a_client_that_leaves_frees_its_slot():
    async def run():
        async with mocks(law=Law(ttft=0.0, itl=0.001, slots=1)) as (engines, urls):
            host, port = urls[0].removeprefix("http://").split(":")
            streams, _ = make_streams([Arrival(0.0, 5, 4000)], Shape(), WORDS, ["mock"], 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(streams[0].request)
            await reader.readuntil(b"token_ids")
            assert engines[0].schedule.num_running == 1
            writer.transport.abort()
            deadline = time.monotonic() + 5
            while engines[0].schedule.num_running and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert engines[0].schedule.num_running == 0

    asyncio.run(run())


def test_arrivals_follow_from_the_seed():
    phases = [Phase(10.0, 50.0), Phase(10.0, 150.0)]
    made = poisson(phases, 10, 5, seed=3)
    assert made == poisson(phases, 10, 5, seed=3) != poisson(phases, 10, 5, seed=4)
    assert all(a.at < b.at for a, b in zip(made, made[1:], strict=False)) and made[-1].at < 20.0
    first = sum(arrival.at < 10.0 for arrival in made)
    assert 400 < first < 600 and 1300 < len(made) - first < 1700


def test_traces(tmp_path):
    azure = tmp_path / "trace.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.9951690,374,44\n"
    )
    assert from_trace(azure, speed=2.0) == [Arrival(0.0, 374, 44), Arrival(2.0, 396, 109)]
    mooncake = tmp_path / "trace.jsonl"
    mooncake.write_text('{"timestamp": 500, "input_length": 3, "output_length": 0}\n')
    assert from_trace(mooncake) == [Arrival(0.0, 3, 1)]


def test_a_trace_is_read_as_it_was_written(tmp_path):
    arrivals = [Arrival(0.0, 10, 5), Arrival(0.25, 30, 7, 20)]
    to_trace(arrivals, tmp_path / "t.jsonl")
    assert from_trace(tmp_path / "t.jsonl") == arrivals


def test_prompts_share_what_the_trace_says():
    arrivals = [Arrival(0.0, 30, 5, 20), Arrival(0.0, 40, 5, 20), Arrival(0.0, 30, 5)]
    streams, _ = make_streams(arrivals, Shape(prompt="ids"), WORDS, ["host"], seed=1)
    prompts = [json.loads(stream.request.split(b"\r\n\r\n")[1])["prompt"] for stream in streams]
    assert [len(prompt) for prompt in prompts] == [30, 40, 30]
    assert prompts[0][:20] == prompts[1][:20] != prompts[2][:20]
    assert prompts[0][20:] != prompts[1][20:30]


def test_a_mock_computes_only_what_its_prefix_cache_has_not():
    block = BLOCK_TOKENS
    cache = PrefixCache(4 * block)
    prompt = list(range(3 * block + 10))
    assert cache.use(prompt) == 0
    assert cache.use(prompt) == 3 * block
    assert cache.use([*prompt[: 2 * block], *range(90_000, 90_000 + block)]) == 2 * block
    assert cache.use(prompt[:block]) == block - 1  # the last token is computed in any case
    cache.use(list(range(70_000, 70_000 + 4 * block)))
    assert cache.use(prompt) == 0  # evicted
    cache.clear()
    assert cache.use(prompt) == 0
    assert [PrefixCache(0).use(prompt) for _ in range(2)] == [0, 0]


def test_percentiles_count_failures_as_infinite():
    assert percentile([1.0, 2.0, 3.0, math.inf], 0.5) == 2.0
    assert percentile([1.0, 2.0, 3.0, math.inf], 0.99) == math.inf
    assert math.isnan(percentile([], 0.5))
