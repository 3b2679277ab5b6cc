"""The journal: what a gateway keeps of its requests, so that a client can have the rest of its stream from another one.

A client that reconnects with its request id and last event id, to the gateway that it had, to that one restarted or to
one beside it, is served from here: `claim` hands a request to exactly one gateway, with the tokens generated so far.

What it promises. Whatever `settled` was awaited for survives the gateway's SIGKILL (a power failure only as far as the
store does: see the stores). What was said since, at most one group commit of about 20 ms, may be missing, though the
client may have received it. A request must therefore be settled before its first byte is sent; tokens need not be:
those that are missing are generated again, the same ones, because a draw depends on (seed, sequence, position) alone,
and those that the client has are skipped by its last event id. What is kept of a sequence is always a prefix of it.
Where an endpoint cannot promise the same tokens (`EndpointInfo.exact_resume` is false), settling before each send can.

Everything but the constructor is called on the event loop. What is called with every token only appends to a list: a
thread writes, one batch at a time, and what comes meanwhile is merged into the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from shoal.core.types import FinishReason, TokenLogprobs
from shoal.serve.journal_redis import RedisStore
from shoal.serve.journal_sqlite import SqliteStore
from shoal.serve.journal_store import Batch, Fragment, JournalConfig, JournaledRequest, JournalEntry, Store, StoreError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _Pending:
    """What has been said since the last commit began."""

    def __init__(self) -> None:
        self.entries: dict[str, JournalEntry] = {}
        self.fragments: dict[tuple[str, int], Fragment] = {}
        self.ended: list[str] = []
        self.released: list[str] = []
        self.size = 0


class Journal:
    def __init__(
        self,
        store: Store,
        config: JournalConfig,
        *,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_lost` is told of each request that another gateway has claimed: it must be given up here, silently."""
        self._store = store
        self._config = config
        self._on_lost = on_lost
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending = _Pending()
        self._offsets: dict[str, dict[int, int]] = {}
        """Of each request under way here: tokens by sequence that the journal was told of."""
        self._tails: dict[tuple[str, int], Fragment] = {}
        """What is in the log and not yet filed. Of the writing thread alone, as is the next."""
        self._filed_at = clock()
        self._loads: list[tuple[str, asyncio.Future[JournaledRequest | None]]] = []
        self._settling: list[asyncio.Future[None]] = []
        self._commit: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_soon = False
        """The timer is for a commit, not only for the next renewal of leases."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._off_until = 0.0
        self._trouble: str | None = None
        self._closing = False

    @property
    def state(self) -> str:
        """ok, or why it is off: then serving goes on, and nothing is kept."""
        return "ok" if self._trouble is None else f"off: {self._trouble}"

    async def open(self) -> None:
        """Raises StoreError: at the start a store that cannot be used is the user's to mend."""
        self._loop = asyncio.get_running_loop()
        try:
            await self._call(self._store.open)
        except StoreError:
            self._thread.shutdown()
            raise
        self._spawn(self._purge_now_and_then())

    async def close(self) -> None:
        """Write what is pending and release what is under way, so that another gateway may claim it at once."""
        self._closing = True
        for request_id in list(self._offsets):
            self.released(request_id)
        await self.settled()
        if self._commit is not None:
            await asyncio.gather(self._commit, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(StoreError):
            await self._call(self._store.close)
        self._thread.shutdown()

    # --- with every request and token: cheap, never waits ---------------------------------------------------------

    def accepted(self, entry: JournalEntry) -> None:
        if self._is_off():
            return
        self._offsets[entry.request_id] = dict.fromkeys(range(entry.request.n), 0)
        self._pending.entries[entry.request_id] = entry
        self._add_size(len(entry.body) + 8 * len(entry.request.prompt) + 1000)

    def refused(self, request_id: str) -> None:
        """In the same turn of the loop as `accepted`: it never began, and nothing of it is written. Or else a flood of
        refused requests would fill the store."""
        self._offsets.pop(request_id, None)
        self._pending.entries.pop(request_id, None)

    def progress(
        self, request_id: str, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Tokens of a sequence, in order, from where the journal ends: after `claim` those generated again are said
        too. Unknown ids, as of requests accepted while the journal was off, are ignored."""
        fragment = self._fragment(request_id, index)
        if fragment is not None:
            fragment.token_ids.extend(token_ids)
            self._offsets[request_id][index] += len(token_ids)
            size = 8 * len(token_ids)
            if logprobs:
                fragment.logprobs.extend(logprobs)
                size += sum(32 + 16 * len(one.top_ids) for one in logprobs)
            self._add_size(size)

    def finished(
        self, request_id: str, index: int, finish: FinishReason, stop_token: int | None = None, num_cached: int = 0
    ) -> None:
        """After the sequence's last tokens."""
        fragment = self._fragment(request_id, index)
        if fragment is not None:
            fragment.finish, fragment.stop_token, fragment.num_cached = finish, stop_token, num_cached
            self._soon()

    def ended(self, request_id: str) -> None:
        """Nothing more will be generated. It stays loadable for `retention_seconds`."""
        if self._offsets.pop(request_id, None) is not None:
            self._pending.ended.append(request_id)
            self._soon()

    def released(self, request_id: str) -> None:
        """This gateway does not go on with it, and another one may claim it at once."""
        if self._offsets.pop(request_id, None) is not None:
            self._pending.released.append(request_id)
            self._soon()

    # --- now and then: may wait for the store ---------------------------------------------------------------------

    async def settled(self) -> None:
        """Until all that was said is committed, or the journal is off. To be awaited before the first byte is sent."""
        if not self._is_off() and (self._commit is not None or not self._is_idle()):
            done = self._loop.create_future()
            self._settling.append(done)
            self._hurry()
            await done

    async def load(self, request_id: str, tenant: str) -> JournaledRequest | None:
        """What is known of a request. Another tenant's looks unknown. Raises StoreError."""
        await self.settled()
        done: asyncio.Future[JournaledRequest | None] = self._loop.create_future()
        self._loads.append((request_id, done))
        if len(self._loads) == 1:
            self._spawn(self._load_all())
        found = await done
        return None if found is None or found.entry.tenant != tenant else found

    async def claim(self, request_id: str, tenant: str) -> JournaledRequest | None:
        """Make a request this gateway's own and return it; None if it is unknown, has ended, goes on here already, or
        is another live gateway's. Of gateways that claim at the same time exactly one gets it. Raises StoreError."""
        found = await self.load(request_id, tenant)
        if found is None or found.ended or request_id in self._offsets or self._closing:
            return None
        if not await self._call(lambda: self._store.claim(request_id)):
            return None
        # Loaded again: the gateway that had it may have written more until its lease went over to this one.
        found = await self.load(request_id, tenant)
        if found is None or found.ended or request_id in self._offsets:
            return None
        self._offsets[request_id] = {index: len(one.token_ids) for index, one in found.sequences.items()}
        # Said anew: a part of it may be in the log of the gateway that had it alone, which is not kept for ever.
        for index, one in found.sequences.items():
            copy = Fragment(request_id, index, 0, list(one.token_ids), list(one.logprobs))
            copy.finish, copy.stop_token, copy.num_cached = one.finish, one.stop_token, one.num_cached
            self._pending.fragments[request_id, index] = copy
        self._soon()
        return found

    async def reserve(self, tenant: str, idempotency_key: str, request_id: str) -> str | None:
        """The request that has this key already, else None: then `request_id` has it from now on, for the retention.
        While the store fails no key is known."""
        return await self._ask(lambda: self._store.reserve(tenant, idempotency_key, request_id))

    async def unreserve(self, tenant: str, idempotency_key: str, request_id: str) -> None:
        """Of a request that was refused after all, so that it can be sent again."""
        await self._ask(lambda: self._store.unreserve(tenant, idempotency_key, request_id))

    # --- when to write --------------------------------------------------------------------------------------------

    def _fragment(self, request_id: str, index: int) -> Fragment | None:
        offsets = self._offsets.get(request_id)
        if offsets is None:
            return None
        fragment = self._pending.fragments.get((request_id, index))
        if fragment is None:
            fragment = Fragment(request_id, index, offsets[index], [], [])
            self._pending.fragments[request_id, index] = fragment
        return fragment

    def _add_size(self, size: int) -> None:
        self._pending.size += size
        if self._pending.size > self._config.max_pending:
            self._turn_off("the store is too slow for this load", _Pending())
        elif not self._is_soon:
            self._soon()

    def _is_idle(self) -> bool:
        pending = self._pending
        return not (pending.entries or pending.fragments or pending.ended or pending.released)

    def _is_off(self) -> bool:
        return self._trouble is not None and self._clock() < self._off_until

    def _soon(self) -> None:
        if not self._is_soon:
            self._is_soon = True
            self._arm(self._config.commit_seconds)

    def _hurry(self) -> None:
        within = self._config.settle_seconds
        if self._timer is None or self._timer.when() > self._loop.time() + within:
            self._is_soon = True
            self._arm(within)

    def _renew_later(self) -> None:
        """A gateway with nothing under way has no leases, and arms nothing."""
        if self._offsets and self._timer is None:
            self._arm(self._config.lease_seconds / 3)

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._due)

    def _due(self) -> None:
        self._timer, self._is_soon = None, False
        if self._is_off():
            self._arm(self._off_until - self._clock())
        elif self._commit is None:
            self._commit = self._loop.create_task(self._commit_pending())

    async def _commit_pending(self) -> None:
        pending, self._pending = self._pending, _Pending()
        settling, self._settling = self._settling, []
        began, lost = self._clock(), list[str]()
        try:
            while True:
                try:
                    await self._call(lambda: self._write(pending, lost))
                    if self._trouble is not None and self._clock() >= self._off_until:
                        _log.warning("journal on again")
                        self._trouble = None
                    break
                except Exception as error:  # whatever it is, serving goes on
                    is_known = isinstance(error, StoreError) and self._trouble is None and not self._closing
                    if not is_known or self._clock() - began > self._config.patience_seconds:
                        self._turn_off(str(error) or type(error).__name__, pending)
                        break
                    await self._ask(self._store.purge)  # for room may be all that is missing
                    await asyncio.sleep(10 * self._config.commit_seconds)
        finally:
            self._commit = None
            self._forget(lost)
            _wake(settling)
            if self._settling:
                self._hurry()
            elif not self._is_idle():
                self._soon()
            self._renew_later()

    def _forget(self, lost: Sequence[str]) -> None:
        for request_id in lost:
            if self._offsets.pop(request_id, None) is not None:
                pending = self._pending.fragments
                self._pending.fragments = {key: one for key, one in pending.items() if key[0] != request_id}
                if self._on_lost is not None:
                    self._on_lost(request_id)

    def _turn_off(self, reason: str, unwritten: _Pending) -> None:
        """What runs is not written any more, for a gap would follow. What was written of it stays a prefix, and is
        released as soon as the store is there again."""
        _log.error("journal off for %g s: %s", self._config.retry_seconds, reason)
        self._trouble = reason
        self._off_until = self._clock() + self._config.retry_seconds
        given_up = [*unwritten.released, *unwritten.ended, *self._pending.released, *self._pending.ended]
        self._pending = _Pending()
        self._pending.released = [*given_up, *self._offsets]
        self._offsets.clear()
        _wake(self._settling)
        self._soon()

    # --- what to write: in the thread -----------------------------------------------------------------------------

    def _write(self, pending: _Pending, lost: list[str]) -> None:
        """Adds to `lost` the requests that other gateways have claimed."""
        while True:
            batch, tails = self._batch(pending, lost)
            taken = self._store.commit(batch)
            if not taken:
                self._tails = tails
                if batch.clears_log:
                    self._filed_at = self._clock()
                return
            lost += taken

    def _batch(self, pending: _Pending, lost: Sequence[str]) -> tuple[Batch, dict[tuple[str, int], Fragment]]:
        """And what will be unfiled afterwards."""
        gone = {*pending.ended, *pending.released}
        clears_log = self._clock() - self._filed_at >= self._config.round_seconds
        tails = dict(self._tails)  # of lost requests too: those are in a log that may be cleared now
        log = []
        for key, fragment in pending.fragments.items():
            if key[0] not in lost:
                tails[key] = _joined(tails.get(key), fragment)
                if key[0] not in gone and not clears_log:
                    log.append(fragment)
        filed = [tails.pop(key) for key in [key for key in tails if clears_log or key[0] in gone]]
        batch = Batch(
            entries=list(pending.entries.values()),
            log=log,
            filed=filed,
            clears_log=clears_log,
            ended=[one for one in pending.ended if one not in lost],
            released=[one for one in pending.released if one not in lost],
        )
        return batch, tails

    # --- the thread -----------------------------------------------------------------------------------------------

    async def _load_all(self) -> None:
        """After a gateway's death its clients come together: those that come while the log is read share one reading
        of it, the next."""
        while self._loads:
            loads = list(self._loads)
            ids = [request_id for request_id, _ in loads]
            found: dict[str, JournaledRequest] = {}
            trouble: StoreError | None = None
            try:
                found = await self._call(functools.partial(self._store.load, ids))
            except StoreError as error:
                trouble = error
            del self._loads[: len(loads)]
            for request_id, done in loads:
                if not done.done():
                    if trouble is None:
                        done.set_result(found.get(request_id))
                    else:
                        done.set_exception(trouble)

    async def _purge_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self._config.retention_seconds / 4))
            if not self._is_off():
                await self._ask(self._store.purge)

    async def _ask(self, call: Callable[[], _T]) -> _T | None:
        try:
            return await self._call(call)
        except StoreError as error:
            _log.warning("journal: %s", error)
            return None

    async def _call(self, call: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(self._thread, call)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def open_store(config: JournalConfig, gateway: str) -> Store:
    """`gateway` names this process and no other, earlier or later: a restarted gateway has a new one."""
    if config.location.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(config, gateway)
    return SqliteStore(config, gateway)


def _wake(settling: Sequence[asyncio.Future[None]]) -> None:
    for done in settling:
        if not done.done():
            done.set_result(None)


def _joined(tail: Fragment | None, fragment: Fragment) -> Fragment:
    """A new one: a commit that fails is tried again from the same parts. Where they overlap the later one counts."""
    known = 0 if tail is None else fragment.offset - tail.offset
    if tail is None or known < 0:
        return fragment
    return Fragment(
        tail.request_id,
        tail.index,
        tail.offset,
        tail.token_ids[:known] + fragment.token_ids,
        tail.logprobs[:known] + fragment.logprobs,
        fragment.finish,
        fragment.stop_token,
        max(tail.num_cached, fragment.num_cached),
    )
