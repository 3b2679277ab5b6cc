"""benchmarks/rival_answers.py: reading both planners' answers, from what aiconfigurator 0.12.0 wrote once."""

import pytest

pytest.importorskip("shoal.plan.catalogue")

from benchmarks import rival_answers  # noqa: E402

# Of `cli default`, Llama-3.1-70B on eight H200; columns that are not read are left out.
TOGETHER = """concurrency,request_rate,bs,ttft,tpot,seq/s,num_total_gpus,tp,dp,parallel,num_tokens
28,1.851,28,525.542,29.266,1.851,4,4,1,tp4pp1dp1etp1ep1,4027.0
"""
APART = """concurrency,ttft,tpot,seq/s,num_total_gpus,(p)workers,(p)parallel,(d)workers,(d)parallel
40,897.179,17.926,3.611,8,2,tp2pp1dp1etp1ep1,1,tp4pp1dp1etp1ep1
"""
# Of `cli recommend`: the fewest GPUs for 20 requests a second.
FEWEST = """concurrency,ttft,tpot,seq/s,num_total_gpus,parallel,num_tokens,replicas_needed,total_gpus_needed
40,707.543,27.164,2.805,4,tp4pp1dp1etp1ep1,4039.0,8,32
"""
MISSED = """concurrency,ttft,tpot,seq/s,num_total_gpus,parallel,num_tokens
2,955.547,35.476,0.107,8,tp8pp1dp1etp1ep1,4001.0
"""
TOO_LARGE = """19:45:20 [aiconfigurator] [I] [main.py:2148] Starting experiment: disagg
19:45:20 [aiconfigurator] [E] [main.py:2206] No successful experiment runs to compare. If this is a frontier or ...
19:45:20 [aiconfigurator] [E] [main.py:2215]   -> Experiment agg failed: sweep_agg: no results — model does not fit in \
GPU memory for any parallel config. Try increasing --total-gpus, using a quantized model, or more VRAM per GPU.
"""
ESTIMATE = """
  TTFT:             423.073 ms
  TPOT:             34.464 ms
  Request Latency:  31406.580 ms
------------------------------------------------------------
  tokens/s:         1,831.97
  tokens/s/gpu:     229.00
"""


def saved(folder, mode, text):
    (folder / mode).mkdir()
    (folder / mode / "best_config_topn.csv").write_text(text)


def test_answers_of_a_cluster(tmp_path):
    saved(tmp_path, "agg", TOGETHER)
    saved(tmp_path, "disagg", APART)
    found = rival_answers.read_answers(tmp_path, 8)
    together, apart = found["agg"][0], found["disagg"][0]
    assert (str(together), together.gpus, together.concurrency) == ("2 x (tp4)", 8, 28)
    assert together.rate == pytest.approx(3.702)
    assert (str(apart), apart.gpus) == ("2 x (tp2) for prefill + 1 x (tp4) for decode", 8)
    assert apart.rate == pytest.approx(3.611)


def test_the_fewest_gpus_come_from_its_own_count(tmp_path):
    saved(tmp_path, "agg", FEWEST)
    one = rival_answers.read_answers(tmp_path, None)["agg"][0]
    assert (one.engines, one.gpus) == (8, 32)
    assert one.rate == pytest.approx(8 * 2.805)


def test_what_misses_a_target_is_no_answer(tmp_path):
    """Its file holds the nearest to a target that nothing meets; its tables say that nothing does."""
    saved(tmp_path, "agg", MISSED)
    found = rival_answers.read_answers(tmp_path, 64)["agg"]
    assert rival_answers.best(found, 1000, 30) is None
    assert rival_answers.best(found, 1000, 36) is found[0]


def test_no_answer_has_its_reason():
    told = "sweep_agg: no results — model does not fit in GPU memory for any parallel config"
    assert rival_answers.failure(TOO_LARGE) == told
    memory = "Traceback ...\nRuntimeError: OOM: the model 'x' does not fit in GPU memory. Try increasing tp_size."
    assert rival_answers.failure(memory) == "OOM: the model 'x' does not fit in GPU memory"
    nothing = (
        "20:03:27 [aiconfigurator] [W] [main.py:2173] Experiment disagg returned no results. Possible causes: (1) ..."
    )
    assert rival_answers.failure(nothing) == "Experiment disagg returned no results"
    usage = "usage: ...\naiconfigurator estimate: error: argument --backend: invalid choice: 'mlx'"
    assert rival_answers.failure(usage) == "argument --backend: invalid choice: 'mlx'"
    assert rival_answers.failure(ESTIMATE) == ""


def test_an_estimate_is_read():
    assert rival_answers.estimate(ESTIMATE) == {"ttft_ms": 423.073, "tpot_ms": 34.464, "tokens_per_second": 1831.97}
    assert rival_answers.estimate(TOO_LARGE) == {}


@pytest.mark.parametrize(
    ("parallel", "layout", "groups", "exact"),
    [
        ("tp8pp1dp1etp8ep1", (8, 1, 1), 1, True),
        ("tp8pp1dp1etp1ep8", (1, 8, 1), 1, True),
        ("tp2pp1dp4etp1ep8", (1, 2, 1), 4, True),
        ("tp2pp2dp4etp2ep4", (2, 1, 2), 4, True),
        ("tp2pp1dp4etp8ep1", (2, 1, 1), 4, False),
        ("tp1pp1dp8etp1ep8", (1, 1, 1), 8, True),
    ],
)
def test_layouts_of_mixtures(parallel, layout, groups, exact):
    """It names how attention and how experts are split; ours names one split, and groups of it."""
    made, made_groups, is_exact = rival_answers.our_layout(rival_answers.axes(parallel), mixture=True)
    assert ((made.tp, made.ep, made.pp), made_groups, is_exact) == (layout, groups, exact)


def test_plans_are_read():
    shape = {"tp": 4, "pp": 1, "ep": 1, "cp": 1, "attention_dp": 1}
    pools = [{"engine": {"shape": shape}, "replicas": 2, "role": "both"}]
    assert rival_answers.plan_layout({"answer": {"setup": {"pools": pools}}}) == "2 x (tp4)"
    told = {
        "bound": "rate: 8 x H200-SXM carry 3.77/s at most (tp4 x pp2), and 100/s is asked",
        "nearest": "--rate 3.59/s",
    }
    assert rival_answers.most_rate({"impossible": told}) == (3.59, 3.77)
    assert rival_answers.most_rate({"impossible": None}) == (0.0, 0.0)


def test_its_layout_by_our_model(tmp_path):
    saved(tmp_path, "agg", TOGETHER)
    one = rival_answers.read_answers(tmp_path, 8)["agg"][0]
    ours = rival_answers.ask_ours("llama-3.1-70b", "4xH200", one, "bfloat16", "bfloat16", (4000, 500))
    assert ours.exact and not ours.closed.refused
    assert 0.5 < ours.closed.tpot.mean * 1e3 / one.tpot_ms < 2
    assert 0.5 < ours.closed.requests_per_second / (one.rate / one.engines) < 2
