"""The door: every route without a key, with each scope, and every spelling of a path that is not in the table."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve import http
from shoal.serve.access import OPEN, ROUTES, Access, Denied, Headers
from shoal.serve.tenants import SCOPES, KeyFile, Principal, editing, new_key

NOW = datetime(2026, 1, 1, tzinfo=UTC)
EXAMPLES = {key: (key[0], re.sub(r"\{\w+\}", "some-name", key[1])) for key in ROUTES}
GUARDED = [key for key, scopes in ROUTES.items() if scopes != OPEN]


def bearer(key: str) -> Headers:
    return [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]


class Door:
    def __init__(self, directory: Path) -> None:
        path = directory / "keys.json"
        end = NOW + timedelta(days=1)
        self.keys = {scope: new_key(f"tenant-{scope}", [scope], NOW, expires=end) for scope in SCOPES}
        with editing(path, create=True) as stored:
            stored += [key for key, _ in self.keys.values()]
        self.now = NOW
        self.access = Access(KeyFile(path), clock=lambda: self.now)

    def check(self, method: str, path: str, headers: Headers = ()) -> str:
        """The tenant, or the status and the reason."""
        answer = self.access.check(method, path, headers)
        return f"{answer.status} {answer.reason}" if isinstance(answer, Denied) else answer.tenant


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    return Door(tmp_path_factory.mktemp("door"))


def test_every_route_of_the_server_is_in_the_table() -> None:
    """What is not cannot be asked for, so a forgotten one shows at once; this says which."""
    text = Path(http.__file__).read_text(encoding="utf-8")
    routes = re.findall(r'Route\("([^"]+)", .*methods=(\w+)\)', text)
    assert len(routes) >= 11
    for path, method in routes:
        assert (method.upper(), re.sub(r":path\}", "}", path)) in ROUTES


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_a_route_without_a_key(door: Door, route: tuple[str, str]) -> None:
    expected = "" if ROUTES[route] == OPEN else "401 missing"
    assert door.check(*EXAMPLES[route]) == expected
    wrong = "" if ROUTES[route] == OPEN else "401 malformed"
    assert door.check(*EXAMPLES[route], bearer("wrong")) == wrong


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_route_with_a_key_of_one_scope(door: Door, route: tuple[str, str], scope: str) -> None:
    expected = f"tenant-{scope}" if scope in ROUTES[route] else "403 scope"
    assert door.check(*EXAMPLES[route], bearer(door.keys[scope][1])) == expected


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_a_key_that_has_expired(door: Door, route: tuple[str, str]) -> None:
    key = door.keys[ROUTES[route][0]][1]
    assert door.check(*EXAMPLES[route], bearer(key)) == f"tenant-{ROUTES[route][0]}"
    door.now = NOW + timedelta(days=1)
    try:
        assert door.check(*EXAMPLES[route], bearer(key)) == "401 expired"
    finally:
        door.now = NOW


def test_an_open_route_gives_no_rights() -> None:
    access = Access(api_key="secret")
    answer = access.check("GET", "/health", [])
    assert isinstance(answer, Principal) and answer.scopes == ()


ODD = [
    "http://localhost/metrics",
    "//metrics",
    "/metrics/",
    "/metrics//",
    "/v1/../metrics",
    "/./metrics",
    "/metrics/.",
    "/metrics/..",
    "/metrics;a=b",
    "/metrics%2f",
    "/metrics?x",
    "/metrics\\",
    "/metrics\n",
    "/metrics ",
    "/métrics",
    "metrics",
    "*",
    "",
    "/v1/models/../../metrics",
    "/v1/models//metrics",
]


@pytest.mark.parametrize("path", ODD)
def test_an_odd_path_is_refused_with_and_without_a_key(door: Door, path: str) -> None:
    assert door.check("GET", path) == "401 missing"
    for scope in SCOPES:
        assert door.check("GET", path, bearer(door.keys[scope][1])) == "400 bad_target"
    assert isinstance(Access().check("GET", path, []), Denied)


@given(st.text(alphabet="/.%\\;abmetricsh\n", max_size=20).map(lambda text: f"/{text}"))
def test_no_spelling_of_a_path_is_let_in_but_those_of_the_table(path: str) -> None:
    answer = Access(api_key="secret").check("GET", path, [])
    assert isinstance(answer, Denied) or path in ("/health", "/dashboard") or path.startswith("/dashboard/")


def test_what_does_not_exist_is_not_told_to_strangers(door: Door) -> None:
    read = bearer(door.keys["read"][1])
    unknown = (("GET", "/nothing"), ("PUT", "/metrics"), ("TRACE", "/health"), ("GET", "/v1/chat/completions"))
    for method, path in unknown:
        assert door.check(method, path) == "401 missing"
    assert door.check("GET", "/nothing", read) == "404 no_route"
    assert door.check("PUT", "/metrics", read) == "405 method"
    assert door.check("GET", "/", read) == "404 no_route"
    assert door.check("HEAD", "/v1/models", read) == "tenant-read"
    assert door.check("GET", "/v1/models/org/name-1.5:q4", read) == "tenant-read"


def test_the_header_is_bearer_and_there_once(door: Door) -> None:
    key = door.keys["read"][1].encode()
    for value in (key, b"Basic " + key, b"Bearer", b"Bearer  ", b""):
        assert door.check("GET", "/v1/models", [(b"authorization", value)]) == "401 missing"
    for value in (b"bearer " + key, b"Bearer   " + key):
        assert door.check("GET", "/v1/models", [(b"authorization", value)]) == "tenant-read"
    twice = [(b"authorization", b"Bearer " + key), (b"authorization", b"Bearer x")]
    assert door.check("GET", "/v1/models", twice) == "400 bad_target"
    hosts = [(b"host", b"a"), *bearer(key.decode())]
    assert door.check("GET", "/v1/models", hosts) == "400 bad_target"


def test_without_keys_everybody_may_do_everything_that_is_in_the_table() -> None:
    access = Access()
    assert access.is_open
    for route in ROUTES:
        answer = access.check(*EXAMPLES[route], [])
        assert isinstance(answer, Principal) and answer.tenant == "default" and set(answer.scopes) == set(SCOPES)
    missing = access.check("GET", "/nothing", [])
    assert isinstance(missing, Denied) and missing.status == 404


def test_a_single_key_may_do_everything() -> None:
    access = Access(api_key="secret")
    assert not access.is_open
    for route in GUARDED:
        answer = access.check(*EXAMPLES[route], bearer("secret"))
        assert isinstance(answer, Principal) and answer.key_id == "api-key"
        for wrong in ("secre", "secrets", "", "é"):
            assert isinstance(access.check(*EXAMPLES[route], bearer(wrong)), Denied)


def test_an_empty_file_of_keys_lets_nobody_in(tmp_path: Path) -> None:
    """It is not the same as no file: whoever names one wants a door."""
    with editing(tmp_path / "keys.json", create=True):
        pass
    access = Access(KeyFile(tmp_path / "keys.json"))
    for route in GUARDED:
        assert isinstance(access.check(*EXAMPLES[route], []), Denied)


def test_refusals_are_counted_and_name_the_key_but_never_the_secret(tmp_path: Path) -> None:
    door = Door(tmp_path)
    key, text = door.keys["read"]
    for wrong in (text[:-64] + "0" * 64, text[:-64] + "1" * 64):
        answer = door.access.check("GET", "/v1/models", bearer(wrong))
        assert isinstance(answer, Denied) and answer.key_id == key.id
        assert wrong[-64:] not in str(answer.body())
    door.check("GET", "/metrics", bearer(text))
    door.check("GET", "/v1/models", bearer(text))
    assert dict(door.access.denied) == {"wrong_secret": 2, "scope": 1}


def test_answers_have_openais_form(door: Door) -> None:
    answer = door.access.check("GET", "/metrics", bearer(door.keys["read"][1]))
    assert isinstance(answer, Denied)
    assert answer.body()["error"] == {
        "message": "this API key has the scopes read; GET /metrics needs metrics",
        "type": "permission_error",
        "param": None,
        "code": "insufficient_scope",
    }
