"""EngineCore against a worker that checks what it is asked to do."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.replay import RecordingCore, decode_all, replay
from shoal.core.types import Output, Request, StepPlan, WorkerFailure
from tests.core.worker_model import ModelWorker

VOCAB = 11
Texts = dict[tuple[str, int], tuple[list[int], str]]


def make_config(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "num_blocks": 16,
        "max_len": 48,
        "vocab_size": VOCAB,
        "block_size": 4,
        "max_sequences": 4,
        "max_batch_tokens": 8,
    }
    return SchedulerConfig(**(values | changes))  # type: ignore[arg-type]


def make_worker(config: SchedulerConfig) -> ModelWorker:
    return ModelWorker(config.block_size, config.vocab_size, config.num_blocks, is_pipeline=config.stages > 1)


def drive(core: EngineCore, worker: ModelWorker, now: float = 0.0, max_steps: int = 2000) -> list[Output]:
    """Run to the end with as many plans in flight as depth allows. Fails if it does not end."""
    outputs: list[Output] = []
    waiting: deque[StepPlan] = deque()
    for _ in range(max_steps):
        while (plan := core.plan(now)) is not None:
            core.check()
            waiting.append(plan)
        outputs += core.take_outputs()
        if not waiting:
            assert not core.has_work()
            return outputs
        oldest = waiting.popleft()
        outputs += core.commit(oldest.plan_id, worker.step(oldest), now)
        core.check()
    raise AssertionError("the requests did not end")


def texts(outputs: list[Output]) -> Texts:
    """Tokens and finish reason of each sequence."""
    result: Texts = {}
    for output in outputs:
        tokens, finish = result.get((output.request_id, output.index), ([], ""))
        assert not finish, "output after the last one"
        result[output.request_id, output.index] = (tokens + output.token_ids, output.finish or "")
    return result


def requests(seed: int = 0) -> list[Request]:
    lengths = [3, 17, 30, 1, 9, 24, 12, 5]
    return [
        Request(id=f"r{i}", prompt=[(seed + i * 7 + j * j) % VOCAB for j in range(n)], max_tokens=3 + 5 * (i % 3))
        for i, n in enumerate(lengths)
    ]


def run(config: SchedulerConfig, batch: list[Request]) -> tuple[Texts, EngineCore]:
    core, worker = EngineCore(config), make_worker(config)
    for request in batch:
        assert core.add(request, 0.0) is None
    return texts(drive(core, worker)), core


def test_every_request_gets_its_tokens_whatever_the_schedule() -> None:
    expected, _ = run(make_config(num_blocks=200, max_batch_tokens=500, prefix_caching=False), requests())
    assert all(finish == "length" for _, finish in expected.values())
    for depth, stages in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 3), (4, 2)):
        for max_batch_tokens in (4, 7, 64):
            for num_blocks in (12, 20, 100):
                config = make_config(
                    depth=depth, stages=stages, max_batch_tokens=max_batch_tokens, num_blocks=num_blocks
                )
                result, core = run(config, requests())
                assert result == expected, (depth, stages, max_batch_tokens, num_blocks)
                assert core.load().num_free_blocks == num_blocks


@pytest.mark.parametrize("stages", [2, 3])
def test_a_pipeline_has_a_batch_of_other_sequences_for_every_stage(stages: int) -> None:
    config = make_config(stages=stages, depth=stages, max_sequences=6, max_batch_tokens=64, num_blocks=60)
    core, worker = EngineCore(config), make_worker(config)
    for i in range(6):
        assert core.add(Request(id=str(i), prompt=[i], max_tokens=46), 0.0) is None
    plans: deque[StepPlan] = deque()
    for step in range(60):
        while (plan := core.plan(0.0)) is not None:
            plans.append(plan)
        slots = [row.slot for plan in plans for row in plan.rows]
        assert len(set(slots)) == len(slots), "a sequence in two batches at once"
        if step >= 2 * stages:
            assert [len(plan.rows) for plan in plans] == [6 // stages] * stages
        oldest = plans.popleft()
        core.commit(oldest.plan_id, worker.step(oldest), 0.0)


def test_losing_the_workers_while_nothing_runs_forgets_what_they_held() -> None:
    config = make_config()
    core, worker = EngineCore(config), make_worker(config)
    assert core.add(Request(id="a", prompt=[1] * 12, max_tokens=4), 0.0) is None
    drive(core, worker)
    assert core.fail("lost", 0.0) == [] and core.load().failures == 1
    core.check()
    assert core.add(Request(id="b", prompt=[1] * 12, max_tokens=4), 0.0) is None
    outputs = drive(core, make_worker(config))
    assert outputs[-1].finish == "length" and core.load().cached_tokens == 0


def test_blocks_run_out_and_the_tokens_stay_the_same() -> None:
    batch = [Request(id=f"r{i}", prompt=[i] * 10, max_tokens=30) for i in range(4)]
    roomy, core = run(make_config(num_blocks=100, max_batch_tokens=100), batch)
    assert core.load().preemptions == 0
    tight, core = run(make_config(num_blocks=12), batch)
    assert core.load().preemptions > 0
    assert tight == roomy


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_first_in_order_that_runs_short_spares_rows_already_planned(length: int) -> None:
    batch = [
        Request(id="decodes", prompt=[1] * length, max_tokens=30, priority=1),
        Request(id="prefills", prompt=[2] * 40, max_tokens=4),
    ]
    results = []
    for num_blocks in (100, 13):
        config = make_config(num_blocks=num_blocks, max_sequences=2, max_batch_tokens=4)
        core, worker = EngineCore(config), make_worker(config)
        core.add(batch[0], 0.0)
        plan = core.plan(0.0)
        assert plan is not None
        outputs = core.commit(plan.plan_id, worker.step(plan), 0.0)
        core.add(batch[1], 1.0)
        results.append(texts(outputs + drive(core, worker)))
        assert (core.load().preemptions > 0) == (num_blocks == 13)
    assert results[0] == results[1]


def test_a_shared_prompt_is_computed_once_though_all_arrive_together() -> None:
    shared = [i % VOCAB for i in range(32)]
    batch = [Request(id=f"r{i}", prompt=[*shared, i, i], max_tokens=2) for i in range(6)]
    config = make_config(num_blocks=100, max_sequences=6, max_batch_tokens=100)
    core, worker = EngineCore(config), make_worker(config)
    for request in batch:
        core.add(request, 0.0)
    drive(core, worker)
    # 32 shared once, then per request: two tokens of its own and one generated token fed back.
    assert worker.num_computed == 32 + 6 * (2 + 1)
    assert core.load().cached_tokens == 5 * 32


def test_salts_do_not_share() -> None:
    config = make_config(num_blocks=100, max_batch_tokens=100)
    core, worker = EngineCore(config), make_worker(config)
    for salt in ("a", "b"):
        core.add(Request(id=salt, prompt=[1] * 16, max_tokens=1, cache_salt=salt), 0.0)
    drive(core, worker)
    assert core.load().cached_tokens == 0


def test_n_sequences_share_the_prompt_and_end_each() -> None:
    config = make_config(num_blocks=100, max_batch_tokens=100)
    core, worker = EngineCore(config), make_worker(config)
    core.add(Request(id="r", prompt=list(range(9)), max_tokens=3, n=3), 0.0)
    result = texts(drive(core, worker))
    assert sorted(result) == [("r", 0), ("r", 1), ("r", 2)]
    assert worker.num_computed == 8 + 3 * (1 + 2)


def test_abort_frees_blocks_at_once_and_one_sequence_alone() -> None:
    config = make_config(num_blocks=100, max_batch_tokens=100)
    core = EngineCore(config)
    core.add(Request(id="r", prompt=list(range(9)), max_tokens=9, n=2), 0.0)
    plan = core.plan(0.0)
    assert plan is not None and core.load().num_free_blocks < 100
    core.abort("r", 0.0, index=1)
    assert [(o.index, o.finish) for o in core.take_outputs()] == [(1, "abort")]
    core.abort("r", 0.0)
    core.abort("nobody", 0.0)
    assert [(o.index, o.finish) for o in core.take_outputs()] == [(0, "abort")]
    assert core.load().num_free_blocks == 100
    assert core.commit(plan.plan_id, make_worker(config).step(plan), 0.0) == []
    assert not core.has_work()


def test_deadlines_end_what_waits_and_what_runs() -> None:
    config = make_config(max_sequences=1)
    core, worker = EngineCore(config), make_worker(config)
    core.add(Request(id="runs", prompt=[1], max_tokens=40, deadline=5.0), 0.0)
    core.add(Request(id="waits", prompt=[1], max_tokens=40, deadline=6.0), 0.0)
    for now in (1.0, 2.0):
        plan = core.plan(now)
        assert plan is not None
        core.commit(plan.plan_id, worker.step(plan), now)
    assert core.plan(7.0) is None
    assert [(o.request_id, o.finish) for o in core.take_outputs()] == [("runs", "deadline"), ("waits", "deadline")]
    assert not core.has_work()


def test_stop_tokens_end_a_sequence_and_are_counted() -> None:
    config = make_config(num_blocks=100)
    full, _ = run(config, [Request(id="r", prompt=[1, 2], max_tokens=20)])
    tokens = full["r", 0][0]
    stop = tokens[4]
    first = tokens.index(stop)
    core, worker = EngineCore(config), make_worker(config)
    core.add(Request(id="r", prompt=[1, 2], max_tokens=20, stop_token_ids=[stop]), 0.0)
    outputs = drive(core, worker)
    assert texts(outputs)["r", 0] == (tokens[: first + 1], "stop")
    assert outputs[-1].stop_token == stop


def test_priority_goes_first_and_age_overtakes_it() -> None:
    config = make_config(max_sequences=1, priority_aging=10.0)
    core, worker = EngineCore(config), make_worker(config)
    core.add(Request(id="old-low", prompt=[1], max_tokens=1, priority=1), 0.0)
    core.add(Request(id="young-high", prompt=[2], max_tokens=1, priority=0), 5.0)
    core.add(Request(id="younger-high", prompt=[3], max_tokens=1, priority=0), 11.0)
    order = [o.request_id for o in drive(core, worker, now=11.0)]
    assert order == ["young-high", "old-low", "younger-high"]


def test_a_worker_failure_ends_what_runs_and_spares_what_waits() -> None:
    config = make_config(max_sequences=2, depth=2)
    core = EngineCore(config)
    for i in range(4):
        core.add(Request(id=f"r{i}", prompt=[i, i], max_tokens=4), 0.0)
    first, second = core.plan(0.0), core.plan(0.0)
    assert first is not None and second is not None
    outputs = core.commit(first.plan_id, WorkerFailure(first.plan_id, "the device is gone"), 0.0)
    assert [(o.request_id, o.finish, o.error) for o in outputs] == [
        ("r0", "lost", "the device is gone"),
        ("r1", "lost", "the device is gone"),
    ]
    core.check()
    assert core.commit(second.plan_id, WorkerFailure(second.plan_id, ""), 0.0) == []
    result = texts(drive(core, make_worker(config)))
    assert {key: finish for key, (_, finish) in result.items()} == {("r2", 0): "length", ("r3", 0): "length"}
    assert core.load().failures == 1


def test_a_sequence_that_fails_leaves_the_batch_alone() -> None:
    config = make_config(num_blocks=100, max_batch_tokens=100)
    batch = requests()[:3]
    expected, _ = run(config, batch)
    core, worker = EngineCore(config), make_worker(config)
    for request in batch:
        core.add(request, 0.0)
    plan = core.plan(0.0)
    assert plan is not None
    victim = next(a.slot for a in plan.assigned if a.request_id == "r1")
    outputs = core.commit(plan.plan_id, worker.step(plan, fail_slots=(victim,)), 0.0)
    core.check()
    result = texts(outputs + drive(core, worker))
    assert result["r1", 0] == ([], "error")
    assert {k: v for k, v in result.items() if k[0] != "r1"} == {k: v for k, v in expected.items() if k[0] != "r1"}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": []}, "prompt", "no tokens"),
        ({"prompt": [1] * 48}, "prompt", "47"),
        ({"prompt": [VOCAB]}, "prompt", "[0, 11)"),
        ({"prompt": [-1]}, "prompt", "[0, 11)"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 99}, None, "limit is 8"),
        ({"id": "taken"}, "id", "taken"),
    ],
)
def test_what_cannot_run_is_rejected_by_field(changes: dict[str, object], field: str | None, words: str) -> None:
    core = EngineCore(make_config(max_waiting=8))
    assert core.add(Request(id="taken", prompt=[1], max_tokens=1), 0.0) is None
    values: dict[str, object] = {"id": "r", "prompt": [1], "max_tokens": 1}
    rejected = core.add(Request(**(values | changes)), 0.0)  # type: ignore[arg-type]
    assert rejected is not None and rejected.field == field and words in rejected.reason
    assert core.load().num_waiting == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"max_batch_tokens": 3}, "max_batch_tokens"), ({"max_len": 65}, "max_len"), ({"depth": 0}, "depth")],
)
def test_a_configuration_that_serves_nobody_is_refused(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EngineCore(make_config(**changes))


class CoreMachine(RuleBasedStateMachine):
    """Clients come and go, steps run late, sequences and workers fail: nothing leaks, everything ends, it replays."""

    @initialize(
        depth=st.integers(1, 3),
        stages=st.integers(1, 3),
        num_blocks=st.integers(6, 24),
        max_sequences=st.integers(1, 5),
        extra_tokens=st.integers(0, 20),
        caching=st.booleans(),
    )
    def start(
        self, depth: int, stages: int, num_blocks: int, max_sequences: int, extra_tokens: int, caching: bool
    ) -> None:
        self.config = make_config(
            depth=max(depth, stages),
            stages=stages,
            num_blocks=num_blocks,
            max_len=min(48, num_blocks * 4),
            max_sequences=max_sequences,
            max_batch_tokens=max_sequences + extra_tokens,
            prefix_caching=caching,
        )
        self.lines: list[bytes] = []
        self.core = RecordingCore(self.config, self.lines.append)
        self.worker = make_worker(self.config)
        self.plans: deque[StepPlan] = deque()
        self.outputs: list[Output] = []
        self.accepted: dict[str, Request] = {}
        self.now = 0.0
        self.num_plans = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=40),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        deadline=st.none() | st.integers(1, 40),
        stop=st.lists(st.integers(0, VOCAB - 1), max_size=1),
    )
    def add(
        self, prompt: list[int], max_tokens: int, n: int, priority: int, deadline: int | None, stop: list[int]
    ) -> None:
        request = Request(
            id=f"r{len(self.accepted)}",
            prompt=prompt,
            max_tokens=max_tokens,
            n=n,
            priority=priority,
            deadline=None if deadline is None else self.now + deadline,
            stop_token_ids=stop,
        )
        if self.core.add(request, self.now) is None:
            self.accepted[request.id] = request
        else:
            assert len(prompt) >= self.config.max_len

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), index=st.none() | st.integers(0, 2))
    def abort(self, data: st.DataObject, index: int | None) -> None:
        self.core.abort(data.draw(st.sampled_from(sorted(self.accepted))), self.now, index)

    @rule(times=st.integers(1, 4))
    def plan(self, times: int) -> None:
        for _ in range(times):
            self.now += 1.0
            plan = self.core.plan(self.now)
            if plan is not None:
                self.num_plans += 1
                assert plan.num_tokens <= self.config.max_batch_tokens
                assert all(row.num_tokens > 0 for row in plan.rows)
                self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule(times=st.integers(1, 4), fail=st.booleans())
    def commit(self, times: int, fail: bool) -> None:
        for i in range(min(times, len(self.plans))):
            plan = self.plans.popleft()
            slots = (plan.rows[0].slot,) if fail and i == 0 else ()
            self.outputs += self.core.commit(plan.plan_id, self.worker.step(plan, slots), self.now)

    @precondition(lambda self: self.plans)
    @rule()
    def lose_worker(self) -> None:
        plan = self.plans[0]
        self.outputs += self.core.commit(plan.plan_id, WorkerFailure(plan.plan_id, "lost"), self.now)
        self.plans.clear()
        self.worker = make_worker(self.config)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "core"):
            self.core.check()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(3000):
            self.plan(1)
            if not self.plans:
                break
            self.commit(1, False)
        self.outputs += self.core.take_outputs()
        assert not self.core.has_work(), "an accepted request did not end"
        load = self.core.load()
        assert load.num_free_blocks == self.config.num_blocks and load.num_live_tokens == 0
        ended = texts(self.outputs)
        assert sorted(ended) == sorted((r.id, i) for r in self.accepted.values() for i in range(r.n))
        assert all(finish for _, finish in ended.values())
        self.compare_with_runs_alone(ended)
        assert replay(decode_all(self.lines), check=False) == self.num_plans

    def compare_with_runs_alone(self, ended: Texts) -> None:
        """What came out is what each request yields alone in an engine, or the beginning of it."""
        for request in self.accepted.values():
            alone, _ = run(make_config(num_blocks=100), [msgspec.structs.replace(request, deadline=None)])
            for index in range(request.n):
                tokens, finish = ended[request.id, index]
                expected, reason = alone[request.id, index]
                if finish in ("stop", "length") and self.config.max_len == 48:
                    assert (tokens, finish) == (expected, reason)
                else:
                    assert tokens == expected[: len(tokens)]


CoreMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCoreMachine = CoreMachine.TestCase


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_a_request_goes_on_elsewhere_with_what_it_has(cut: int) -> None:
    """Cut off after any number of tokens, the sequences that have not ended end as they would have."""
    config = make_config(num_blocks=100, max_len=64)
    whole = Request(id="r", prompt=[1, 2, 3, 4, 5], max_tokens=10, n=3, min_tokens=2, stop_token_ids=[7])
    expected, _ = run(config, [whole])
    begun = {index: tokens[:cut] for (_, index), (tokens, _) in expected.items()}
    left = {index: tokens for index, tokens in begun.items() if len(expected["r", index][0]) > len(tokens)}
    assert left, "the control: something is left to do"
    rest, _ = run(config, [msgspec.structs.replace(whole, resume=left)])
    assert {key: (begun[key[1]] + tokens, finish) for key, (tokens, finish) in rest.items()} == {
        key: value for key, value in expected.items() if key[1] in left
    }


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ({}, "no sequence"),
        ({2: [1]}, "sequence 2"),
        ({0: [1] * 4}, "4 tokens already"),
        ({1: [VOCAB]}, "token ids"),
    ],
)
def test_what_cannot_be_resumed_is_refused(resume: dict[int, list[int]], words: str) -> None:
    core = EngineCore(make_config())
    rejected = core.add(Request(id="r", prompt=[1], max_tokens=4, n=2, resume=resume), 0.0)
    assert rejected is not None and rejected.field == "resume" and words in rejected.reason
    assert not core.has_work()
