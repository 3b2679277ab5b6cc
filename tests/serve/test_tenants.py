"""Keys in a file: what is kept of them, who is let in, and what a broken file changes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.tenants import (
    KeyFile,
    KeyFileError,
    Keyring,
    Principal,
    StoredKey,
    Tenants,
    TenantSettings,
    cache_salt,
    cluster_secret,
    editing,
    new_key,
    read_keys,
    rotated,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def identify(key: StoredKey, given: str, now: datetime = NOW) -> str:
    """The tenant, or what is wrong."""
    found = Keyring([key]).identify(given, now)
    return found.tenant if isinstance(found, Principal) else found[0]


def test_a_key_names_its_tenant_and_only_its_hash_is_kept() -> None:
    key, text = new_key("acme", ["read", "generate"], NOW)
    found = Keyring([key]).identify(text, NOW)
    assert found == Principal(tenant="acme", key_id=key.id, scopes=("generate", "read"))
    stored = msgspec.json.encode(key).decode()
    secret = text.removeprefix(f"sk-shoal-{key.id}-")
    assert len(bytes.fromhex(secret)) == 32
    assert secret not in stored and key.id in stored


def test_no_two_keys_are_alike() -> None:
    assert len({new_key("acme", ["read"], NOW)[1][-64:] for _ in range(100)}) == 100


def test_what_is_not_the_key_is_refused() -> None:
    key, text = new_key("acme", ["read"], NOW)
    other, other_text = new_key("acme", ["read"], NOW)
    assert identify(key, text) == "acme"
    assert identify(key, "") == "missing"
    for wrong in (text[:-1], text + "0", text.upper(), f" {text}", text + "\n", "é" * 86, "x" * 10**6):
        assert identify(key, wrong) == "malformed"
    assert identify(key, other_text) == "unknown"
    assert identify(key, f"sk-shoal-{key.id}-{other_text[-64:]}") == "wrong_secret"


@given(st.integers(0, 63), st.sampled_from("0123456789abcdef"))
def test_no_digit_of_the_secret_may_be_wrong(position: int, digit: str) -> None:
    key, text = new_key("acme", ["read"], NOW)
    start = len(text) - 64 + position
    changed = text[:start] + digit + text[start + 1 :]
    assert identify(key, changed) == ("acme" if changed == text else "wrong_secret")


def test_a_key_is_valid_from_its_beginning_to_its_end() -> None:
    key, text = new_key("acme", ["read"], NOW, not_before=NOW + HOUR, expires=NOW + 2 * HOUR)
    found = [identify(key, text, NOW + hours * HOUR) for hours in (0, 1, 1.99, 2)]
    assert found == ["not_yet_valid", "acme", "acme", "expired"]
    with pytest.raises(KeyFileError, match="expire before"):
        new_key("acme", ["read"], NOW, not_before=NOW + HOUR, expires=NOW + HOUR)


def test_what_is_wrong_with_a_key_is_told_only_to_who_has_it() -> None:
    key, text = new_key("acme", ["read"], NOW)
    revoked = msgspec.structs.replace(key, revoked=NOW)
    assert identify(revoked, text) == "revoked"
    assert identify(revoked, text[:-64] + "0" * 64) == "wrong_secret"


def test_rotation_keeps_the_old_secret_for_a_while_and_no_longer() -> None:
    key, first = new_key("acme", ["read"], NOW)
    key, second = rotated(key, NOW, HOUR)
    assert second != first and second[:21] == first[:21]
    assert [identify(key, first, NOW + late) for late in (0 * HOUR, 0.99 * HOUR, HOUR)] == [
        "acme",
        "acme",
        "wrong_secret",
    ]
    assert identify(key, second, NOW + 1000 * HOUR) == "acme"
    # Rotated again within the grace period: that of the first secret does not grow.
    key, third = rotated(key, NOW + 0.5 * HOUR, 10 * HOUR)
    assert [identify(key, text, NOW + 2 * HOUR) for text in (first, second, third)] == ["wrong_secret", "acme", "acme"]
    key, fourth = rotated(key, NOW + 2 * HOUR, timedelta(0))
    assert [identify(key, text, NOW + 2 * HOUR) for text in (second, third, fourth)] == ["wrong_secret"] * 2 + ["acme"]
    assert len(key.secrets) == 1
    with pytest.raises(KeyFileError, match="is revoked: create a new one"):
        rotated(msgspec.structs.replace(key, revoked=NOW), NOW + HOUR, HOUR)


@pytest.mark.parametrize("tenant", ["", "a b", "../x", "é", "x" * 65, "-x", "a\n"])
def test_a_tenants_name_is_a_name(tenant: str) -> None:
    with pytest.raises(KeyFileError, match="is not a name"):
        new_key(tenant, ["read"], NOW)


# --- the file ---------------------------------------------------------------------------------------------------------


def write(path: Path, *keys: StoredKey) -> None:
    with editing(path, create=True) as stored:
        stored[:] = keys


def test_the_file_is_for_its_owner_alone_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, _ = new_key("acme", ["read"], NOW, name="laptop", expires=NOW + HOUR)
    write(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]
    assert read_keys(path).keys == [key]


def test_an_edit_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, new_key("acme", ["read"], NOW)[0])
    before = path.read_bytes()
    with pytest.raises(RuntimeError), editing(path) as keys:
        keys.clear()
        raise RuntimeError
    assert path.read_bytes() == before


def test_edits_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add(number: int) -> str:
        key, _ = new_key(f"tenant{number}", ["read"], NOW)
        with editing(path, create=True) as keys:
            keys.append(key)
        return key.id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(add, range(24)))
    assert sorted(key.id for key in read_keys(path).keys) == sorted(ids)


def test_another_process_waits_for_an_edit(tmp_path: Path) -> None:
    """The control: the lock is what keeps it out, and it goes on when the lock is gone."""
    path = tmp_path / "keys.json"
    program = (
        "import sys; from pathlib import Path; from shoal.serve.tenants import *\n"
        "print('ready', flush=True)\n"
        "with editing(Path(sys.argv[1]), create=True) as keys: keys.append(new_key('other', ['read'], utc_now())[0])"
    )
    with editing(path, create=True) as keys:
        other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.3)
        keys.append(new_key("mine", ["read"], NOW)[0])
    assert other.wait(30) == 0
    other.stdout.close()
    assert [key.tenant for key in read_keys(path).keys] == ["mine", "other"]


def test_a_file_that_others_can_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, new_key("acme", ["read"], NOW)[0])
    path.chmod(0o644)
    read_keys(path)
    path.chmod(0o660)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_keys(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["keys"][0].update(scopes=["root"]), "Invalid enum value 'root'"),
        (lambda tree: tree["keys"][0].update(tenants="x"), "unknown field `tenants`"),
        (lambda tree: tree["keys"][0].update(id="x"), "id"),
        (lambda tree: tree["keys"][0]["secrets"][0].update(sha256="é"), "sha256"),
        (lambda tree: tree["keys"][0].update(expires="2027-01-01T00:00:00"), "times need a zone"),
        (lambda tree: tree["keys"].append(tree["keys"][0]), "is there twice"),
        (lambda tree: tree.update(version=2), "version"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_what_is_wrong(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "keys.json"
    write(path, new_key("acme", ["read"], NOW)[0])
    tree = json.loads(path.read_text())
    assert callable(change)
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(KeyFileError, match=message) as error:
        read_keys(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="shoal keys create --tenant NAME --file"):
        KeyFile(tmp_path / "none.json")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_changes_are_seen_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    key, text = new_key("acme", ["read"], NOW)
    write(path, key)
    file = KeyFile(path, clock=clock)

    def tenant() -> str:
        found = file.ring.identify(text, NOW)
        return found.tenant if isinstance(found, Principal) else found[0]

    assert tenant() == "acme"
    write(path, msgspec.structs.replace(key, revoked=NOW))
    assert tenant() == "acme", "the file is not looked at for every request"
    clock.now += 1.0
    assert tenant() == "revoked"
    path.write_text("{")
    clock.now += 1.0
    assert tenant() == "revoked"
    assert file.problem is not None and "is not a file of keys" in file.problem
    path.unlink()
    clock.now += 1.0
    assert tenant() == "revoked"
    assert file.problem is not None and "does not exist" in file.problem
    write(path, key)
    clock.now += 1.0
    assert tenant() == "acme"
    assert file.problem is None
    path.chmod(0o666)
    clock.now += 1.0
    assert tenant() == "acme"
    assert file.problem is not None and "chmod" in file.problem
    path.chmod(0o600)
    clock.now += 1.0
    assert tenant() == "acme" and file.problem is None


# --- salts ------------------------------------------------------------------------------------------------------------


def test_tenants_have_different_salts_and_a_group_has_one() -> None:
    secret = bytes(32)
    salts = [cache_salt(secret, tenant, group) for tenant in ("a", "b") for group in ("", "g")]
    assert salts[1] == salts[3]
    assert len(set(salts)) == 3
    # A tenant cannot be named so that it has a group's salt, nor does another secret give the same.
    assert cache_salt(secret, "g") not in salts
    assert cache_salt(bytes(31) + b"\1", "a") not in salts
    assert len(bytes.fromhex(salts[0])) == 32


def test_the_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cluster_secret(path), range(8)))
    assert len(found) == 1 and len(found.pop()) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_a_secret_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    cluster_secret(path)
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        cluster_secret(path)
    path.write_text("password")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="not a secret of 64 hexadecimal digits"):
        cluster_secret(path)
    with pytest.raises(KeyFileError, match="No such file"):
        cluster_secret(tmp_path / "none" / "secret")


def test_settings_are_limits_and_a_cache_group() -> None:
    settings = msgspec.convert({"tokens_per_minute": 1000, "weight": 2, "cache_group": "public"}, TenantSettings)
    assert (settings.tokens_per_minute, settings.weight, settings.cache_group) == (1000, 2, "public")
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"tokens_per_hour": 1}, TenantSettings)


def test_the_default_entry_is_for_tenants_without_one() -> None:
    entries = {"default": {"concurrent_requests": 1}, "a": {"cache_group": "g"}, "b": {"cache_group": "g"}}
    tenants = Tenants(msgspec.convert(entries, dict[str, TenantSettings]), bytes(32))
    assert [tenants.settings(name).concurrent_requests for name in ("a", "c")] == [None, 1]
    assert tenants.salt("a") == tenants.salt("b") != tenants.salt("c") != tenants.salt("d")
    assert [tenants.settings(name).shows_cached_tokens for name in ("a", "c")] == [False, True]
    passed = [tenants.limiter.check(name, 1, 0.0) is None for name in ("a", "a", "c", "c", "d")]
    assert passed == [True, True, True, False, True]
    assert tenants.limiter.limits("a") is tenants.settings("a")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_edit_by_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, new_key("acme", ["read"], NOW)[0])
    os.chown(path, 12345, 12345)
    write(path, new_key("acme", ["read"], NOW)[0])
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345)
