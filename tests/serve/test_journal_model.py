"""The journal against a model: gateways that are killed, stopped and started over one store, in any order."""

from __future__ import annotations

import asyncio
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.serve.journal import Journal
from shoal.serve.journal_sqlite import SqliteStore
from shoal.serve.journal_store import JournalConfig, JournaledRequest
from tests.serve.journal_stores import tokens
from tests.serve.journal_writer import entry

LEASE = 300.0


class Incarnation:
    """One gateway process, as long as it lives."""

    def __init__(self, name: str, subject: Journal, now: float) -> None:
        self.name = name
        self.subject = subject
        self.renewed = now
        self.lost: list[str] = []


class JournalMachine(RuleBasedStateMachine):
    """Two gateways over one store, their clock and their commits in our hand; each may be killed and started anew."""

    names = [f"r{i}" for i in range(4)]

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.started = 0
        self.said: dict[str, int] = {}
        """Tokens of each request that its owner has said."""
        self.settled: dict[str, int] = {}
        self.owner: dict[str, Incarnation] = {}
        self.over: set[str] = set()
        self.gateways = [self.start(), self.start()]

    def teardown(self) -> None:
        for gateway in self.gateways:
            self.loop.run_until_complete(self.abandon(gateway.subject))
        self.loop.close()
        self.directory.cleanup()

    def start(self) -> Incarnation:
        self.started += 1
        config = JournalConfig(
            location=f"{self.directory.name}/j.db", commit_seconds=1e6, round_seconds=200, lease_seconds=LEASE
        )
        name = f"g{self.started}"
        lost: list[str] = []
        store = SqliteStore(config, name, lambda: self.now)
        subject = Journal(store, config, on_lost=lost.append, clock=lambda: self.now)
        self.loop.run_until_complete(subject.open())
        incarnation = Incarnation(name, subject, self.now)
        incarnation.lost = lost
        return incarnation

    async def abandon(self, subject: Journal) -> None:
        """Nothing pending is written. Its thread and connection end only for our own sake."""
        if subject._timer is not None:
            subject._timer.cancel()
        for task in subject._tasks:
            task.cancel()
        await asyncio.gather(*subject._tasks, return_exceptions=True)
        await subject._call(subject._store.close)
        subject._thread.shutdown()

    async def commit(self, subject: Journal) -> None:
        if subject._timer is not None:
            subject._timer.cancel()
        subject._due()
        assert subject._commit is not None
        await subject._commit

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def accept(self, number: int, name: str) -> None:
        if name not in self.said:
            self.gateways[number].subject.accepted(entry(name))
            self.said[name], self.owner[name] = 0, self.gateways[number]
            self.settle(number)  # before its first byte

    @rule(number=st.integers(0, 1), count=st.integers(1, 3))
    def generate(self, number: int, count: int) -> None:
        """Whoever has lost a request without having been told says what must never be found."""
        gateway = self.gateways[number]
        for name in list(gateway.subject._offsets):
            if self.owner[name] is gateway:
                said = self.said[name]
                gateway.subject.progress(name, 0, tokens(0, said + count, said))
                self.said[name] += count
            else:
                gateway.subject.progress(name, 0, [-1] * count)

    @rule(number=st.integers(0, 1))
    def settle(self, number: int) -> None:
        gateway = self.gateways[number]
        believed = set(gateway.subject._offsets)
        self.loop.run_until_complete(self.commit(gateway.subject))
        gateway.renewed = self.now
        owned = {name for name in believed if self.owner[name] is gateway}
        assert set(gateway.subject._offsets) == owned
        assert sorted(gateway.lost) == sorted(believed - owned)
        gateway.lost.clear()
        self.settled |= {name: self.said[name] for name in owned}

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def end(self, number: int, name: str) -> None:
        gateway = self.gateways[number]
        if name in gateway.subject._offsets:
            gateway.subject.finished(name, 0, "stop")
            gateway.subject.ended(name)
            if self.owner[name] is gateway:
                self.over.add(name)
                self.settled[name] = self.said[name]
            self.settle(number)

    @rule(seconds=st.sampled_from([50.0, 200.0, 350.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(number=st.integers(0, 1))
    def kill(self, number: int) -> None:
        self.loop.run_until_complete(self.abandon(self.gateways[number].subject))
        self.gateways[number] = self.start()

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def claim(self, number: int, name: str) -> None:
        gateway = self.gateways[number]
        self.settle(number)
        found = self.loop.run_until_complete(gateway.subject.claim(name, "t"))
        may = name in self.said and name not in self.over and self.owner[name] is not gateway
        assert (found is not None) == (may and self.now - self.owner[name].renewed >= LEASE)
        if found is not None:
            self.said[name] = len(found.sequences[0].token_ids)
            self.owner[name] = gateway

    @invariant()
    def what_is_found_is_a_prefix_with_all_that_was_settled(self) -> None:
        subject = self.gateways[0].subject
        load = subject._call(lambda: subject._store.load(list(self.said)))
        found: dict[str, JournaledRequest] = self.loop.run_until_complete(load)
        for name in self.said:
            got = found[name].sequences[0].token_ids
            assert got == tokens(0, len(got)) and len(got) >= self.settled.get(name, 0), name
            assert found[name].ended == (name in self.over), name


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
