"""The layout table: every layout gives the tokens of one rank, greedy and sampled with a seed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from shoal.checkpoint.builtin import pull
from shoal.checkpoint.resolve import resolve
from shoal.core.config import EngineConfig
from shoal.core.layout import Layout, LayoutError
from shoal.core.types import Output, Request
from shoal.engine.executor import open_executor
from shoal.engine.memory import OutOfMemory
from shoal.engine.step_log import read_ranks, read_submitted
from shoal.serve.errors import ApiError
from shoal.serve.metrics import own_engines
from shoal.serve.pool import Pool
from shoal.serve.session import open_session, single
from tests.checkpoints import VOCAB, make_checkpoint
from tests.parallel.engines import LAUNCH, Counts, Tokens, requests, run_layout

LAYOUTS = [
    Layout(tp=2),
    Layout(tp=3),
    Layout(tp=4),
    Layout(pp=2),
    Layout(pp=3),
    Layout(tp=2, pp=2),
    Layout(cp=2),
    Layout(tp=2, cp=2),
    Layout(cp=2, pp=2),
]
GLOO = msgspec.structs.replace(LAUNCH, comm="gloo")
SMOLLM2_WORK = requests(49152, count=8, max_tokens=16)
TINY_WORK = requests(VOCAB, count=6, max_tokens=32)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return pull("smollm2-135m")


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> Tokens:
    return run_layout(smollm2, Layout(), SMOLLM2_WORK)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_expected(tiny: Path) -> Tokens:
    return run_layout(tiny, Layout(), TINY_WORK)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_smollm2_nine_heads_and_three_kv_heads(smollm2: Path, expected: Tokens, layout: Layout) -> None:
    assert run_layout(smollm2, layout, SMOLLM2_WORK) == expected


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(tp=2), {"depth": 2}),
        (Layout(pp=2), {"depth": 4}),
        (Layout(tp=2, pp=2), {"max_batch_tokens": 64, "ops": "torch"}),
        (Layout(tp=2), {"launch": GLOO}),
        (Layout(pp=2), {"launch": GLOO}),
    ],
    ids=str,
)
def test_depth_chunks_arithmetic_and_transport_change_nothing(
    tiny: Path, tiny_expected: Tokens, layout: Layout, options: dict[str, object]
) -> None:
    assert run_layout(tiny, layout, TINY_WORK, **options) == tiny_expected


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", Layout(tp=2)),
        ("gemma3_text", Layout(pp=2)),
        ("gemma3_text", Layout(cp=2)),
        ("llama_biased", Layout(tp=2)),
    ],
    ids=str,
)
def test_biases_norms_and_windows(family: str, layout: Layout, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    assert run_layout(path, layout, TINY_WORK) == run_layout(path, Layout(), TINY_WORK)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tokens]]:
    """By family: a checkpoint with experts, and the tokens of one rank."""
    made = {}
    for family in ("mixtral", "qwen3_moe", "deepseek_v3"):
        changes = {"num_local_experts": 8} if family == "mixtral" else {}
        path = make_checkpoint(family, tmp_path_factory.mktemp(family), **changes)
        made[family] = path, run_layout(path, Layout(), TINY_WORK)
    return made


# What splits experts, for every way to route and to hold them; all else, for the family that has most of its own.
EXPERTS_SPLIT = [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2), Layout(tp=3)]


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in ("mixtral", "qwen3_moe", "deepseek_v3") for layout in EXPERTS_SPLIT]
    + [("deepseek_v3", Layout(tp=4)), ("deepseek_v3", Layout(pp=3)), ("deepseek_v3", Layout(cp=2))]
    + [("deepseek_v3", Layout(tp=2, cp=2)), ("qwen3_moe", Layout(cp=2, pp=2)), ("mixtral", Layout(tp=2, pp=2))],
    ids=str,
)
def test_experts(mixtures: dict[str, tuple[Path, Tokens]], family: str, layout: Layout) -> None:
    path, expected = mixtures[family]
    assert run_layout(path, layout, TINY_WORK) == expected


@pytest.mark.parametrize(
    ("family", "layout", "dispatch", "num_visits", "num_layers"),
    [
        ("mixtral", Layout(ep=2), "all_gather", 2, 3),
        ("qwen3_moe", Layout(ep=2, pp=2), "all_to_all", 3, 3),
        ("deepseek_v3", Layout(tp=2, ep=2), "all_to_all", 3, 2),
    ],
    ids=str,
)
def test_tokens_split_between_attentions_are_computed_once(
    family: str, layout: Layout, dispatch: str, num_visits: int, num_layers: int, tmp_path: Path
) -> None:
    path = make_checkpoint(family, tmp_path, **({"num_local_experts": 8} if family == "mixtral" else {}))
    counts = Counts(TINY_WORK, layout.ep, num_visits=num_visits, num_layers=num_layers)
    found = run_layout(path, layout, TINY_WORK, counts, expert_dispatch=dispatch)
    assert found == run_layout(path, Layout(), TINY_WORK)
    assert counts.load.expert_imbalance > counts.load.rank_imbalance > 1


def test_a_prompt_that_does_not_fit_the_kv_of_one_rank_runs_on_two(tiny: Path) -> None:
    long = requests(VOCAB, count=1, max_tokens=8)[0]
    long = msgspec.structs.replace(long, prompt=[7 + i * i % 400 for i in range(300)])
    one_rank = 200 * 3 * 2 * 2 * 16 * 4  # bytes of 200 tokens
    with pytest.raises(OutOfMemory, match="set max_len to at most"):
        run_layout(tiny, Layout(), [long], kv_cache_bytes=one_rank, max_len=320)
    expected = run_layout(tiny, Layout(), [long])
    assert run_layout(tiny, Layout(cp=2), [long], kv_cache_bytes=one_rank, max_len=320) == expected


def test_two_replicas_of_two_ranks_answer_as_one_rank_and_share_the_work(tiny: Path, tiny_expected: Tokens) -> None:
    config = EngineConfig(
        model=str(tiny), layout=Layout(tp=2, dp=2), kv_cache_bytes=64 << 20, max_len=512, launch=LAUNCH
    )
    files = resolve(str(tiny))

    class Collected:
        """Of one request of one sequence."""

        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.whole = asyncio.get_running_loop().create_future()

        def output(self, output: Output) -> None:
            self.tokens += output.token_ids
            if output.finish is not None:
                self.whole.set_result(self.tokens)

        def failed(self, error: ApiError) -> None:
            self.whole.set_exception(error)

    async def answer(pool: Pool, request: Request) -> list[int]:
        collected = Collected()
        pool.submit(request, collected)
        return await collected.whole

    async def run() -> tuple[list[list[int]], list[int]]:
        async with open_session(single(config, "m"), {"m": files}) as session:
            pool = session.fleet.pools["m"]
            answers = await asyncio.gather(*(answer(pool, request) for request in TINY_WORK))
            return answers, [engine.load.generated_tokens for engine in own_engines(pool) if engine.load]

    answers, generated = asyncio.run(run())
    assert dict(zip(tiny_expected, answers, strict=True)) == tiny_expected
    assert len(generated) == 2 and min(generated) > 0


def test_every_rank_writes_down_its_steps_and_the_driver_when_it_sent_them(tiny: Path, tmp_path: Path) -> None:
    run_layout(tiny, Layout(pp=2), TINY_WORK[:2], step_log=str(tmp_path))
    ranks, submitted = read_ranks(tmp_path), {entry.plan_id: entry for entry in read_submitted(tmp_path)}
    plans = [[step.plan_id for step in ranks[rank] if step.plan_id > 0] for rank in (0, 1)]
    assert plans[0] == plans[1] and len(plans[0]) >= TINY_WORK[0].max_tokens
    for first, last in zip(ranks[0], ranks[1], strict=True):
        assert last.ended > first.began and 0 <= last.waited <= last.ended - last.began
        assert first.waited == 0  # nobody stands before it
        if first.plan_id > 0:
            assert submitted[first.plan_id].began < first.began
    assert sum(step.waited for step in ranks[1]) > 0


def test_nothing_is_left_behind(tiny: Path) -> None:
    run_layout(tiny, Layout(tp=2), TINY_WORK[:1])
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"shoal-{os.getpid()}-")]


def test_a_layout_that_cannot_work_is_refused_before_anything_starts(smollm2: Path) -> None:
    with pytest.raises(LayoutError, match="tp 10 needs as many attention heads.*layouts that work: tp5 x pp2"):
        open_executor(EngineConfig(model=str(smollm2), layout=Layout(tp=10)))
