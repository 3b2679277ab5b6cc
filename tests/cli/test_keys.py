"""`shoal keys` as a user types it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.serve.tenants import KeyFile, Principal


class Keys:
    def __init__(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file = file
        self._capsys = capsys

    def __call__(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """What it wrote to standard output and to standard error."""
        assert main(["keys", *arguments, "--file", str(self.file)]) == status
        captured = self._capsys.readouterr()
        return captured.out, captured.err

    def tenant(self, key: str, later: timedelta = timedelta(0)) -> str:
        found = KeyFile(self.file).ring.identify(key, datetime.now(UTC) + later)
        return found.tenant if isinstance(found, Principal) else found[0]


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Keys:
    return Keys(tmp_path / "keys.json", capsys)


def test_a_key_is_printed_once_and_works(keys: Keys) -> None:
    out, err = keys("create", "--tenant", "acme", "--expires", "2d")
    key = out.strip()
    assert keys.tenant(key) == "acme"
    assert keys.tenant(key, timedelta(days=3)) == "expired"
    assert "shown only this once" in err and key not in err
    assert key[-64:] not in "".join([*keys("list"), *keys("list", "--json")])


def test_rotate_and_revoke(keys: Keys) -> None:
    made = json.loads(keys("create", "--tenant", "acme", "--scope", "read", "--scope", "admin", "--json")[0])
    assert made["scopes"] == ["read", "admin"]
    first, second = made["key"], keys("rotate", made["id"], "--grace", "1h")[0].strip()
    assert [keys.tenant(key) for key in (first, second)] == ["acme", "acme"]
    assert [keys.tenant(key, timedelta(hours=2)) for key in (first, second)] == ["wrong_secret", "acme"]
    third = json.loads(keys("rotate", made["id"], "--grace", "0s", "--json")[0])["key"]
    assert [keys.tenant(key) for key in (first, second, third)] == ["wrong_secret", "wrong_secret", "acme"]
    assert "is revoked" in keys("revoke", made["id"])[0]
    assert keys.tenant(third, timedelta(seconds=1)) == "revoked"
    (listed,) = json.loads(keys("list", "--json")[0])
    assert (listed["id"], listed["state"]) == (made["id"], "revoked")
    assert "revoked" in keys("list")[0]


def test_mistakes_are_said_in_one_line(keys: Keys) -> None:
    assert "does not exist: `shoal keys create" in keys("list", status=1)[1]
    key_id = json.loads(keys("create", "--tenant", "acme", "--json")[0])["id"]
    wrong = key_id[:-1] + ("0" if key_id[-1] != "0" else "1")
    assert f"the nearest is {key_id}" in keys("revoke", wrong, status=1)[1]
    assert "tenant 'a b' is not a name" in keys("create", "--tenant", "a b", status=1)[1]
    assert "the nearest is admin" in keys("create", "--tenant", "x", "--scope", "admn", status=2)[1]
    assert "'soon' is no moment" in keys("create", "--tenant", "x", "--expires", "soon", status=2)[1]
    assert "'1y' is not a time" in keys("rotate", key_id, "--grace", "1y", status=2)[1]
    assert "would expire before" in keys("create", "--tenant", "x", "--expires", "2020-01-01", status=1)[1]
