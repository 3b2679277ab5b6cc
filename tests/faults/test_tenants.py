"""Tenants on a live gateway: who is let in, what one learns of another, how much one can take from another.

Faults 34 (a noisy tenant) and 38 (a request sent twice), the door on every route, and the isolation of the prefix
cache, which `benchmarks/isolation.py` also measures from outside with a clock.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from shoal.serve.access import OPEN, ROUTES
from shoal.serve.tenants import SCOPES, Scope, editing, new_key, utc_now
from tests.checkpoints import VOCAB, make_checkpoint
from tests.serve.gateways import ENGINE, RunningFleet, running_fleet
from tests.serve.running import ENDLESS, LONG_CONTEXT, ROOM, wait_until, wire_bytes

TENANTS = {
    "twin-a": {"cache_group": "twins"},
    "twin-b": {"cache_group": "twins"},
    "few": {"requests_per_minute": 3},
    "short": {"tokens_per_minute": 100},
    "single": {"concurrent_requests": 1},
}
QUEUE = 16
"""Requests that may wait: a tenant alone has half of it."""
KEYS: dict[str, tuple[str, tuple[Scope, ...]]] = {
    # by name of the client: tenant and scopes
    "operator": ("operator", SCOPES),
    "gateway": ("gateway", ("generate", "engine")),
    "a": ("a", ("generate", "read")),
    "a's other key": ("a", ("generate",)),
    "b": ("b", ("generate", "read")),
    "few's other key": ("few", ("generate",)),
    **{name: (name, ("generate",)) for name in TENANTS},
}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


class Tenanted:
    def __init__(self, fleet: RunningFleet, keys: dict[str, str]) -> None:
        self.fleet = fleet
        self.operator = fleet.client
        self.clients = {
            name: httpx.Client(base_url=fleet.url, timeout=60, headers=bearer(key)) for name, key in keys.items()
        }

    def ask(self, name: str, prompt: list[int], **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **fields}
        return self.clients[name].post("/v1/completions", json=body, headers=headers)

    def cached(self, name: str, prompt: list[int]) -> int | None:
        """What the client is told."""
        answer = self.ask(name, prompt)
        assert answer.status_code == 200, answer.text
        count: int | None = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    def found_in_cache(self) -> float:
        """Tokens so far, by the engine's own count."""
        lines = self.operator.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("shoal:prefix_cache_hits_total"))

    def load(self) -> tuple[int, int]:
        """Requests that have an endpoint, and those that have none."""
        model = self.fleet.model()
        return model["running"], model["waiting"]

    def waiting(self) -> int:
        return self.load()[1]

    def endless(self, name: str, prompt: list[int]) -> socket.socket:
        """The connection of a stream that nobody reads: it goes on until the connection is closed."""
        address = urlsplit(self.fleet.url)
        connection = socket.create_connection((address.hostname, address.port), timeout=60)
        body = {"prompt": prompt, "stream": True, "max_tokens": ENDLESS, "ignore_eos": True}
        connection.sendall(wire_bytes(self.clients[name], "/v1/completions", body))
        return connection

    @contextlib.contextmanager
    def stream(self, name: str, prompt: list[int], **fields: Any) -> Iterator[tuple[str, Iterator[str]]]:
        """Its id and its lines, after the first one came."""
        body = {"prompt": prompt, "stream": True, "max_tokens": 400, "temperature": 0, "ignore_eos": True, **fields}
        with self.clients[name].stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            lines = response.iter_lines()
            next(lines)
            yield response.headers["x-request-id"], lines

    def raw(self, method: str, target: str, key: str = "") -> int:
        """The status for a request line exactly as given."""
        address = urlsplit(self.fleet.url)
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        try:
            connection.request(method, target, headers=bearer(key))
            return connection.getresponse().status
        finally:
            connection.close()


def prompt_of(seed: int, length: int = 64) -> list[int]:
    """No two share a block."""
    return [8 + (seed * 7919 + position * (seed % 13 + 1)) % (VOCAB - 8) for position in range(length)]


@contextlib.contextmanager
def running_tenanted(folder: Path) -> Iterator[Tenanted]:
    checkpoint = make_checkpoint("llama", folder / "tiny", max_position_embeddings=LONG_CONTEXT)
    made = {name: new_key(tenant, scopes, utc_now()) for name, (tenant, scopes) in KEYS.items()}
    with editing(folder / "keys.json", create=True) as stored:
        stored += [key for key, _ in made.values()]
    deployment = {
        "models": [{"name": "tiny", "model": str(checkpoint), "admission": {"max_requests": QUEUE}, **ENGINE, **ROOM}],
        "journal": {"location": f"{folder}/journal.db"},
        "keys": f"{folder}/keys.json",
        "tenants": TENANTS,
    }
    with running_fleet(folder, deployment, headers=bearer(made["operator"][1])) as fleet:
        yield Tenanted(fleet, {name: text for name, (_, text) in made.items()})


@pytest.fixture(scope="module")
def tenanted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenanted]:
    with running_tenanted(tmp_path_factory.mktemp("tenants")) as tenanted:
        yield tenanted


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Tenanted]:
    """A fleet of one endpoint and no requests: others leave some behind, and the test of every route an endpoint."""
    with running_tenanted(tmp_path) as tenanted:
        yield tenanted


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key_unless_it_is_open_to_all(tenanted: Tenanted, method: str, path: str) -> None:
    target = path.replace("{name}", "some-name")
    is_open = ROUTES[method, path] == OPEN
    for key in ("", "sk-shoal-0123456789ab-" + 64 * "0", "no key"):
        assert (tenanted.raw(method, target, key) == 401) is not is_open
    answer = tenanted.operator.request(method, target)
    assert answer.status_code not in (401, 403), "the control: a key that may do everything"


SPELLINGS = ("/", "/nothing", "/v1", "/v1/", "/v1/models/", "//fleet", "/fleet/", "/x/../fleet", "/fleet;x", "/FLEET")


@pytest.mark.parametrize("target", [*SPELLINGS, "/%66leet"])
def test_what_does_not_exist_needs_a_key_too(tenanted: Tenanted, target: str) -> None:
    """Who has none is not told what there is, and no spelling of a path gets past the door."""
    assert tenanted.raw("GET", target) == 401
    key = tenanted.operator.headers["authorization"].removeprefix("Bearer ")
    assert tenanted.raw("GET", target, key) in ({200} if target == "/%66leet" else {400, 404})


@pytest.mark.parametrize("method", ["PUT", "OPTIONS", "TRACE", "DELETE", "PATCH"])
def test_no_method_gets_past_the_door(tenanted: Tenanted, method: str) -> None:
    assert tenanted.raw(method, "/fleet") == 401
    key = tenanted.operator.headers["authorization"].removeprefix("Bearer ")
    assert tenanted.raw(method, "/fleet", key) == 405


# --- the prefix cache -------------------------------------------------------------------------------------------------


def test_a_prompt_of_another_tenant_is_not_in_the_cache(tenanted: Tenanted) -> None:
    prompts = [prompt_of(seed) for seed in range(100, 112)]
    assert [tenanted.cached("a", prompt) for prompt in prompts] == [0] * len(prompts)
    assert [tenanted.cached("a", prompt) for prompt in prompts] == [48] * len(prompts), "the control: they are there"
    before = tenanted.found_in_cache()
    assert [tenanted.cached("b", prompt) for prompt in prompts] == [0] * len(prompts)
    assert tenanted.found_in_cache() == before, "it is not only hidden: the engine found nothing"


def test_two_keys_of_one_tenant_share_their_cache(tenanted: Tenanted) -> None:
    prompt = prompt_of(200)
    assert [tenanted.cached(name, prompt) for name in ("a", "a's other key", "b")] == [0, 48, 0]


def test_tenants_of_a_group_share_a_cache_and_are_not_told_what_is_in_it(tenanted: Tenanted) -> None:
    """The negative control of the isolation: with one salt the engine does find what the other sent."""
    prompt, before = prompt_of(300), tenanted.found_in_cache()
    assert [tenanted.cached(name, prompt) for name in ("twin-a", "twin-b")] == [None, None]
    assert tenanted.found_in_cache() == before + 48
    assert tenanted.cached("a", prompt) == 0


@pytest.mark.parametrize("fields", [{"cache_salt": "x"}, {"cache_salt": ""}, {"resume": {"0": [5]}}])
def test_salts_and_sequences_to_go_on_with_are_for_gateways(tenanted: Tenanted, fields: dict[str, Any]) -> None:
    (field,) = fields
    refused = tenanted.ask("a", prompt_of(400), max_tokens=2, **fields)
    assert refused.status_code == 403 and refused.json()["error"]["param"] == field
    messages = [{"role": "user", "content": "hi"}]
    chat = tenanted.clients["gateway"].post("/v1/chat/completions", json={"messages": messages, **fields})
    assert chat.status_code == 400 and field in chat.json()["error"]["message"]
    allowed = tenanted.ask("gateway", prompt_of(400), max_tokens=2, **fields)
    assert allowed.status_code == 200, "the control: a key with the scope engine"


# --- streams ----------------------------------------------------------------------------------------------------------


def test_another_tenants_stream_cannot_be_read_or_disturbed(tenanted: Tenanted) -> None:
    with tenanted.stream("a", prompt_of(500)) as (request_id, lines):
        stolen = tenanted.clients["b"].get(f"/v1/streams/{request_id}")
        never = tenanted.clients["b"].get("/v1/streams/never-was")
        for answer in (stolen, never):
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_request"
        same = stolen.json()["error"]["message"].replace(request_id, "never-was")
        assert same == never.json()["error"]["message"], "that it exists is not told"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    # The control: its owner has it, with either key.
    for name in ("a", "a's other key"):
        assert tenanted.clients[name].get(f"/v1/streams/{request_id}").text.endswith("data: [DONE]\n\n")


def test_a_client_that_is_back_takes_over_its_own_stream(tenanted: Tenanted) -> None:
    """The control of the test above: a stream is cut when its own tenant asks for it again."""
    with tenanted.stream("a", prompt_of(501)) as (request_id, lines):
        again = tenanted.clients["a's other key"].get(f"/v1/streams/{request_id}")
        assert again.status_code == 200 and again.text.endswith("data: [DONE]\n\n")
        with contextlib.suppress(httpx.RemoteProtocolError):
            assert [line for line in lines if line][-1] != "data: [DONE]"


# --- limits -----------------------------------------------------------------------------------------------------------


def refused_for(answer: httpx.Response) -> str:
    assert answer.status_code == 429, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    code: str = answer.json()["error"]["code"]
    return code


def test_a_tenant_has_so_many_requests_a_minute_with_all_its_keys(tenanted: Tenanted) -> None:
    names = ["few", "few's other key", "few"]
    assert [tenanted.ask(name, prompt_of(600)).status_code for name in names] == [200] * 3
    assert refused_for(tenanted.ask("few's other key", prompt_of(600))) == "requests_per_minute"
    assert tenanted.ask("b", prompt_of(600)).status_code == 200, "the control: another tenant"


def test_a_tenant_has_so_many_tokens_a_minute(tenanted: Tenanted) -> None:
    assert tenanted.ask("short", prompt_of(601), max_tokens=10).status_code == 200
    assert refused_for(tenanted.ask("short", prompt_of(601), max_tokens=10)) == "tokens_per_minute"
    assert tenanted.ask("short", prompt_of(601, 8)).status_code == 200, "a small one still fits"


def test_a_tenant_has_so_many_requests_at_once(tenanted: Tenanted) -> None:
    with tenanted.stream("single", prompt_of(602), max_tokens=ENDLESS):
        assert refused_for(tenanted.ask("single", prompt_of(603))) == "concurrent_requests"
        assert tenanted.ask("b", prompt_of(603)).status_code == 200, "the control: another tenant"
    # Its client has left, and with it the request.
    wait_until(lambda: tenanted.ask("single", prompt_of(603)).status_code == 200, "the limit to be free again")


# --- a request sent twice ---------------------------------------------------------------------------------------------


def test_a_request_sent_twice_is_done_once_for_each_tenant(tenanted: Tenanted) -> None:
    same = {"headers": {"idempotency-key": "order-66"}}
    first = tenanted.ask("a", prompt_of(700), **same)
    assert first.status_code == 200
    for name in ("a", "a's other key"):
        again = tenanted.ask(name, prompt_of(700), **same)
        assert again.status_code == 409 and first.headers["x-request-id"] in again.json()["error"]["message"]
    other = tenanted.ask("b", prompt_of(700), **same)
    assert other.status_code == 200 and other.headers["x-request-id"] != first.headers["x-request-id"]
    assert tenanted.ask("a", prompt_of(700)).status_code == 200, "the control: without the key"


def test_a_request_that_was_refused_leaves_nothing(tenanted: Tenanted) -> None:
    same = {"headers": {"idempotency-key": "order-67"}}
    with tenanted.stream("single", prompt_of(701), max_tokens=ENDLESS):
        refused = tenanted.ask("single", prompt_of(702), **same)
        assert refused_for(refused) == "concurrent_requests"
        gone = tenanted.clients["single"].get(f"/v1/streams/{refused.headers['x-request-id']}")
        assert gone.status_code == 404, "what never ran cannot be gone on with"
    assert tenanted.ask("b", prompt_of(702), max_tokens=0, **same).status_code == 400
    assert tenanted.ask("b", prompt_of(702), **same).status_code == 200, "the key is free for what is sent instead"
    wait_until(lambda: tenanted.ask("single", prompt_of(702), **same).status_code == 200, "the limit to be free")
    assert tenanted.ask("single", prompt_of(702), **same).status_code == 409, "the control: now it was used"


# --- a noisy tenant ---------------------------------------------------------------------------------------------------


def test_a_flood_of_one_tenant_leaves_room_for_another(alone: Tenanted) -> None:
    """Fault 34: all slots are taken and half of the queue, and still a request of another tenant is accepted, and goes
    before those that wait. Its control is the same request of the tenant that floods: refused.

    No request ends by itself, so that nothing moves but what is moved here.
    """
    held, half = list[socket.socket](), QUEUE // 2
    with contextlib.ExitStack() as flood:
        while alone.waiting() < half:
            held.append(flood.enter_context(alone.endless("a", prompt_of(800 + len(held)))))
            wait_until(lambda: sum(alone.load()) == len(held), "the request to be accepted")
        refused = [alone.ask("a", prompt_of(850 + number)) for number in range(5)]
        assert {refused_for(answer) for answer in refused} == {"tenant_share"}
        with ThreadPoolExecutor(1) as thread:
            for waiting in range(half, half - 6, -2):
                wait_until(lambda: alone.waiting() == waiting, "the free place to be taken")  # noqa: B023
                taken = thread.submit(alone.ask, "b", prompt_of(900 + waiting), max_tokens=2)
                wait_until(lambda: alone.waiting() == waiting + 1, "the other tenant's to wait too")  # noqa: B023
                for _ in range(2):  # of those that run: the engine has one more than it has places for
                    held.pop(0).close()
                assert taken.result().status_code == 200, taken.result().text
                assert alone.waiting() >= waiting - 2, "those who waited before it still wait"
    gone = [alone.clients["a"].get(f"/v1/streams/{one.headers['x-request-id']}").status_code for one in refused]
    assert set(gone) == {404}, "a flood of refused requests fills no journal"
    wait_until(lambda: sum(alone.load()) == 0, "the flood to be over")
