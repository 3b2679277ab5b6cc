"""Who may ask: API keys in a file, what their tenants may use, and the salt that keeps their caches apart.

A key is `sk-shoal-ID-SECRET`. The id finds the entry and is no secret; of the secret, 256 random bits, only the SHA-256
is kept. A slow password hash would add nothing but the time it takes: it makes up for what people choose, and nobody
guesses 256 bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from shoal.core.rate_limit import RateLimiter, TenantLimits

_log = logging.getLogger(__name__)

Scope = Literal["generate", "read", "metrics", "admin", "engine"]
"""generate: ask models · read: which models there are, one's own use · metrics: of the whole gateway, for monitoring ·
admin: see and change the fleet · engine: another shoal gateway, which brings salts and sequences to go on with."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate", "read")
DEFAULT_TENANT = "default"
"""Whose requests are, where there are no keys or only one."""
KeyProblem = Literal["missing", "malformed", "unknown", "wrong_secret", "revoked", "expired", "not_yet_valid"]

_PREFIX = "sk-shoal-"
_KEY = re.compile(r"sk-shoal-([0-9a-f]{12})-([0-9a-f]{64})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Id = Annotated[str, Meta(pattern=r"^[0-9a-f]{12}\Z")]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Tenant = Annotated[str, Meta(pattern=f"^{_TENANT.pattern}\\Z")]
_LONGEST_KEY = 256
_CHECK_SECONDS = 1.0
"""Between two looks at the file: a revoked key is refused after so long at most."""


class KeyFileError(Exception):
    """Keys cannot be read or written, or there is no such key. The message is for the user."""


class TenantSettings(TenantLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the deployment says of one tenant."""

    cache_group: str = ""
    """Tenants of one group share cached prefixes, and can tell by timing what the others' prompts begin with. Empty is
    a cache of one's own."""

    @property
    def shows_cached_tokens(self) -> bool:
        """Of a cache that others fill, the number of cached tokens tells what they asked."""
        return not self.cache_group


# --- keys -----------------------------------------------------------------------------------------------------------


class StoredSecret(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    sha256: _Digest
    expires: datetime | None = None
    """End of the grace period, once it was replaced."""


class StoredKey(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    id: _Id
    tenant: _Tenant
    scopes: tuple[Scope, ...]
    created: datetime
    name: str = ""
    """What people call it."""
    not_before: datetime | None = None
    expires: datetime | None = None
    revoked: datetime | None = None
    secrets: list[StoredSecret]
    """The current one first."""

    def problem(self, now: datetime) -> KeyProblem | None:
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return "not_yet_valid" if self.not_before is not None and now < self.not_before else None


class KeySet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    version: Literal[1] = 1
    keys: list[StoredKey] = []


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who sent a request, by the key alone."""

    tenant: str
    key_id: str
    """Empty where no key was asked for."""
    scopes: tuple[Scope, ...]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


def new_key(
    tenant: str,
    scopes: Sequence[Scope],
    now: datetime,
    *,
    name: str = "",
    not_before: datetime | None = None,
    expires: datetime | None = None,
) -> tuple[StoredKey, str]:
    """An entry and the key itself, which is nowhere else. Raises KeyFileError."""
    if _TENANT.fullmatch(tenant) is None:
        raise KeyFileError(f"tenant {tenant!r} is not a name: up to 64 letters, digits and . _ - are")
    if not scopes:
        raise KeyFileError(f"a key without scopes can do nothing: give one of {', '.join(SCOPES)}")
    if expires is not None and expires <= max(now, not_before or now):
        raise KeyFileError("the key would expire before it is valid")
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    key = StoredKey(
        id=key_id,
        tenant=tenant,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        created=now,
        name=name,
        not_before=not_before,
        expires=expires,
        secrets=[StoredSecret(_digest(secret))],
    )
    return key, f"{_PREFIX}{key_id}-{secret}"


def rotated(key: StoredKey, now: datetime, grace: timedelta) -> tuple[StoredKey, str]:
    """The entry with a new secret, and the new key. What was valid stays so for the grace period."""
    problem = key.problem(now)
    if problem in ("revoked", "expired"):
        raise KeyFileError(f"key {key.id} is {problem}: create a new one")
    secret, until = secrets.token_hex(32), now + grace
    kept = [
        StoredSecret(old.sha256, until if old.expires is None else min(old.expires, until))
        for old in key.secrets
        if old.expires is None or old.expires > now
    ]
    kept = kept if grace > timedelta(0) else []
    return msgspec.structs.replace(key, secrets=[StoredSecret(_digest(secret)), *kept]), f"{_PREFIX}{key.id}-{secret}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keyring:
    """Keys by id."""

    def __init__(self, keys: Sequence[StoredKey] = ()) -> None:
        self._keys = {key.id: key for key in keys}

    def identify(self, given: str, now: datetime) -> Principal | tuple[KeyProblem, str]:
        """Whose key it is, or what is wrong with it and the id that it names. Only who knows the secret is told more
        than "unknown" and "wrong_secret"."""
        match = _KEY.fullmatch(given) if len(given) <= _LONGEST_KEY else None
        if match is None:
            return ("malformed" if given else "missing"), ""
        key, digest = self._keys.get(match[1]), _digest(match[2])
        if key is None:
            return "unknown", match[1]
        valid = False
        for secret in key.secrets:
            same = hmac.compare_digest(secret.sha256, digest)
            valid |= same and (secret.expires is None or now < secret.expires)
        if not valid:
            return "wrong_secret", key.id
        problem = key.problem(now)
        return (problem, key.id) if problem else Principal(tenant=key.tenant, key_id=key.id, scopes=key.scopes)


# --- files ----------------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> KeySet:
    """Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            # Hashes of 256 bits may be read by others; who may write decides who is let in.
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o022:
                raise KeyFileError(f"{path} can be changed by other users: `chmod 600 {path}`")
            content = file.read()
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist: `shoal keys create --tenant NAME --file {path}` makes it") from None
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from None
    try:
        found = msgspec.json.decode(content, type=KeySet)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is not a file of keys: {error}") from None
    for key_id, count in Counter(key.id for key in found.keys).items():
        if count > 1:
            raise KeyFileError(f"{path}: key {key_id} is there twice")
    for key in found.keys:
        times = [key.created, key.not_before, key.expires, key.revoked, *(secret.expires for secret in key.secrets)]
        if any(when is not None and when.tzinfo is None for when in times):
            raise KeyFileError(f"{path}: key {key.id}: times need a zone, as in 2026-01-31T12:00:00Z")
    return found


@contextlib.contextmanager
def editing(path: Path, *, create: bool = False) -> Iterator[list[StoredKey]]:
    """The keys as a list to change; written whole, in one move, when the body ends without an error.

    Raises KeyFileError. Others that edit wait; those that read see the old file or the new one.
    """
    path = path.resolve()
    with _locked_directory(path.parent):
        keys = [] if create and not path.exists() else list(read_keys(path).keys)
        yield keys
        text = msgspec.json.format(msgspec.json.encode(KeySet(keys=keys)), indent=2) + b"\n"
        _write_whole(path, text)


@contextlib.contextmanager
def _locked_directory(directory: Path) -> Iterator[None]:
    """The directory, because the file itself is replaced by every writer."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyFileError(f"{directory}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_whole(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Mode 0600. Raises FileExistsError where it is there and must not be replaced, KeyFileError otherwise."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            if path.exists() and (before := path.stat()).st_uid != os.geteuid():
                # As root: the gateway, which runs as the owner, must still be able to read it.
                os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


class KeyFile:
    """The keys of a file, as it is now: read again once it has changed.

    A file that has become unreadable or broken changes nothing: those who had access keep it, and `problem` says so.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._clock = clock
        self.problem: str | None = None
        self._looked = clock()
        self._stamp = self._stamp_now()
        self._ring = Keyring(read_keys(path).keys)

    @property
    def ring(self) -> Keyring:
        now = self._clock()
        if now - self._looked >= _CHECK_SECONDS:
            self._looked = now
            stamp = self._stamp_now()
            if stamp != self._stamp or self.problem:
                self._read(stamp)
        return self._ring

    def _read(self, stamp: tuple[int, ...] | None) -> None:
        try:
            self._ring = Keyring(read_keys(self._path).keys)
            self.problem = None
            _log.info("keys were read again from %s", self._path)
        except KeyFileError as error:
            if self.problem != str(error):
                _log.error("%s; the keys read before stay valid", error)
            self.problem = str(error)
        self._stamp = stamp

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


# --- cache isolation ------------------------------------------------------------------------------------------------


def cluster_secret(path: Path) -> bytes:
    """32 bytes, made at the first call. Gateways that share it give a tenant the same salt. Raises KeyFileError."""
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            # Of two gateways that start at once, one writes it and both read it.
            _write_whole(path, secrets.token_hex(32).encode() + b"\n", replace=False)
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o027:
                raise KeyFileError(f"{path} can be read by other users: `chmod 600 {path}`")
            text = file.read().strip()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from None
    if re.fullmatch(rb"[0-9a-f]{64}", text) is None:
        raise KeyFileError(f"{path} is not a secret of 64 hexadecimal digits: remove it, and a new one is made")
    return bytes.fromhex(text.decode())


def cache_salt(secret: bytes, tenant: str, isolation_class: str = "") -> str:
    """The salt of a tenant's prefix cache, or of a group's that shares one.

    Who does not know the secret cannot compute another tenant's salt, and so can never ask for its blocks.
    """
    kind, name = (b"group", isolation_class) if isolation_class else (b"tenant", tenant)
    return hmac.new(secret, b"shoal-cache-salt\0" + kind + b"\0" + name.encode(), hashlib.sha256).hexdigest()


class Tenants:
    """What the deployment says of all tenants; the entry `default` is for those without one."""

    def __init__(self, settings: Mapping[str, TenantSettings], secret: bytes) -> None:
        self._settings = settings
        self._default = settings.get(DEFAULT_TENANT, TenantSettings())
        self._secret = secret
        self._salts: dict[str, str] = {}
        self.limiter = RateLimiter(settings, self._default)

    def settings(self, tenant: str) -> TenantSettings:
        return self._settings.get(tenant, self._default)

    def salt(self, tenant: str) -> str:
        """For `Request.cache_salt`."""
        salt = self._salts.get(tenant)
        if salt is None:
            salt = self._salts[tenant] = cache_salt(self._secret, tenant, self.settings(tenant).cache_group)
        return salt


def utc_now() -> datetime:
    return datetime.now(UTC)
