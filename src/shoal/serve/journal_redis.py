"""A journal's store in Redis, for gateways of several hosts. Needs the extra `redis`.

Leases and retention are counted by the server, so the hosts' clocks do not matter. What Redis has acknowledged
survives any gateway; what survives Redis itself is a matter of its own persistence and replicas.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from shoal.serve.journal_store import (
    TOLD_SECONDS,
    Batch,
    Fragment,
    JournalConfig,
    JournaledRequest,
    JournalEntry,
    StoreError,
    assembled,
)

_T = TypeVar("_T")
_PREFIX = "shoal:journal:"
_LEAST_KEPT = 3600
"""Seconds that a request which has not ended is kept at least: nothing is written while its prompt is prefilled."""

# Scripts, because each must be atomic. `filed`, `ended` and `released` name requests of other owners only if this
# gateway was told so before: `taken` is looked at first, in the same script.
_COMMIT = """
local prefix, gateway, lease, retention, kept = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local taken = redis.call('SMEMBERS', prefix .. 'taken:' .. gateway)
if #taken > 0 then
    redis.call('DEL', prefix .. 'taken:' .. gateway)
    return taken
end
redis.call('SET', prefix .. 'lease:' .. gateway, '1', 'PX', lease)
local log, clears = prefix .. 'log:' .. gateway, ARGV[7] == '1'
local position = 11
local function following() position = position + 1 return ARGV[position] end
for _ = 1, ARGV[8] do
    local key, entry = prefix .. 'request:' .. following(), following()
    if redis.call('HSETNX', key, 'entry', entry) == 1 then
        redis.call('HSET', key, 'owner', gateway, 'owners', gateway)
        redis.call('PEXPIRE', key, kept)
    end
end
if ARGV[6] ~= '' then
    redis.call('RPUSH', log, ARGV[6])
    redis.call('PEXPIRE', log, kept)
end
for _ = 1, ARGV[9] do
    local id, fragment = following(), following()
    redis.call('RPUSH', prefix .. 'fragments:' .. id, fragment)
    redis.call('PEXPIRE', prefix .. 'fragments:' .. id, kept)
    redis.call('PEXPIRE', prefix .. 'request:' .. id, kept)
end
if clears then redis.call('DEL', log) end
for number = 1, ARGV[10] + ARGV[11] do
    local id = following()
    local key = prefix .. 'request:' .. id
    if redis.call('HGET', key, 'owner') == gateway then
        redis.call('HDEL', key, 'owner')
        if number <= tonumber(ARGV[10]) then
            redis.call('HSET', key, 'ended', '1')
            redis.call('PEXPIRE', key, retention)
            redis.call('PEXPIRE', prefix .. 'fragments:' .. id, retention)
        end
    end
end
return {}
"""
_CLAIM = """
local prefix, gateway, lease, id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = prefix .. 'request:' .. id
if redis.call('EXISTS', key) == 0 or redis.call('HEXISTS', key, 'ended') == 1 then return 0 end
local owner = redis.call('HGET', key, 'owner')
if owner and owner ~= gateway then
    if redis.call('EXISTS', prefix .. 'lease:' .. owner) == 1 then return 0 end
    redis.call('SADD', prefix .. 'taken:' .. owner, id)
    redis.call('EXPIRE', prefix .. 'taken:' .. owner, ARGV[5])
end
redis.call('SREM', prefix .. 'taken:' .. gateway, id)
redis.call('HSET', key, 'owner', gateway, 'owners', redis.call('HGET', key, 'owners') .. '\\n' .. gateway)
redis.call('SET', prefix .. 'lease:' .. gateway, '1', 'PX', lease)
return 1
"""
_UNRESERVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisStore:
    def __init__(self, config: JournalConfig, gateway: str) -> None:
        self._gateway = gateway
        self._url = config.location
        self._lease = round(config.lease_seconds * 1000)
        self._retention = round(config.retention_seconds * 1000)
        self._kept = max(self._retention, _LEAST_KEPT * 1000)
        self._redis: Any = None

    def open(self) -> None:
        try:
            redis = importlib.import_module("redis")
        except ImportError:
            raise StoreError('a journal in Redis needs the extra "redis": pip install "shoal[redis]"') from None
        self._error: type[Exception] = redis.RedisError
        try:
            self._redis = redis.Redis.from_url(
                self._url, socket_timeout=1.0, socket_connect_timeout=1.0, health_check_interval=0
            )
        except ValueError as error:
            raise StoreError(f"journal {_shown(self._url)} is no Redis URL: {error}") from None
        self._try(self._redis.ping)

    def commit(self, batch: Batch) -> list[str]:
        encode = msgspec.msgpack.encode
        arguments: list[Any] = [_PREFIX, self._gateway, self._lease, self._retention, self._kept]
        arguments += [encode(batch.log) if batch.log else b"", int(batch.clears_log)]
        arguments += [len(batch.entries), len(batch.filed), len(batch.ended), len(batch.released)]
        for entry in batch.entries:
            arguments += [entry.request_id, encode(entry)]
        for fragment in batch.filed:
            arguments += [fragment.request_id, encode(fragment)]
        arguments += [*batch.ended, *batch.released]
        taken = self._try(lambda: self._redis.eval(_COMMIT, 0, *arguments))
        return [request_id.decode() for request_id in taken]

    def load(self, request_ids: Sequence[str]) -> dict[str, JournaledRequest]:
        return self._try(lambda: self._load(request_ids))

    def _load(self, request_ids: Sequence[str]) -> dict[str, JournaledRequest]:
        # The log first: what is moved out of it meanwhile is then found filed. What is found twice does no harm.
        with self._redis.pipeline(transaction=False) as pipeline:
            for request_id in request_ids:
                pipeline.hmget(f"{_PREFIX}request:{request_id}", "entry", "ended", "owners")
            heads = dict(zip(request_ids, pipeline.execute(), strict=True))
        owners = {owner for _, ended, owners in heads.values() if owners and not ended for owner in owners.split(b"\n")}
        logged: dict[str, list[Fragment]] = {}
        for owner in sorted(owners):
            for blob in self._redis.lrange(f"{_PREFIX}log:{owner.decode()}", 0, -1):
                for one in msgspec.msgpack.decode(blob, type=list[Fragment]):
                    logged.setdefault(one.request_id, []).append(one)
        with self._redis.pipeline(transaction=False) as pipeline:
            for request_id in request_ids:
                pipeline.lrange(f"{_PREFIX}fragments:{request_id}", 0, -1)
            filed = dict(zip(request_ids, pipeline.execute(), strict=True))
        found = {}
        for request_id, (entry, ended, _) in heads.items():
            if entry is not None:
                fragments = [msgspec.msgpack.decode(blob, type=Fragment) for blob in filed[request_id]]
                fragments += logged.get(request_id, [])
                decoded = msgspec.msgpack.decode(entry, type=JournalEntry)
                found[request_id] = assembled(decoded, fragments, ended=ended is not None)
        return found

    def claim(self, request_id: str) -> bool:
        arguments = (_PREFIX, self._gateway, self._lease, request_id, TOLD_SECONDS)
        return bool(self._try(lambda: self._redis.eval(_CLAIM, 0, *arguments)))

    def reserve(self, tenant: str, key: str, request_id: str) -> str | None:
        name = _reserved(tenant, key)
        before = self._try(lambda: self._redis.set(name, request_id, nx=True, get=True, px=self._retention))
        return None if before is None else str(before.decode())

    def unreserve(self, tenant: str, key: str, request_id: str) -> None:
        self._try(lambda: self._redis.eval(_UNRESERVE, 1, _reserved(tenant, key), request_id))

    def purge(self) -> None:
        """Redis forgets by itself."""

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()
            self._redis = None

    def _try(self, call: Callable[[], _T]) -> _T:
        if self._redis is None:
            raise StoreError("journal is closed")
        try:
            return call()
        except (self._error, msgspec.MsgspecError) as error:
            raise StoreError(f"journal {_shown(self._url)}: {error}") from None


def _reserved(tenant: str, key: str) -> str:
    return f"{_PREFIX}reserved:{len(tenant)}:{tenant}:{key}"


def _shown(url: str) -> str:
    """Without the password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
