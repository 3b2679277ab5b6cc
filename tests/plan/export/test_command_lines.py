"""Command lines of other makers' servers: their flags exist, and say what was planned."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from shoal.config import load_config
from shoal.core.layout import Layout
from shoal.plan.export import Deployable, export
from shoal.plan.export.deployable import Pool
from shoal.serve.deployment import Deployment, check
from tests.plan.export.commands import flags, record
from tests.plan.export.deployables import deployable, disaggregated, spanning

KNOWN = json.loads((Path(__file__).parent / "known_flags.json").read_text(encoding="utf-8"))
MIXTURE = Pool(layout=Layout(tp=2), attention_dp=8)
VARIETY = [
    deployable(),
    deployable(dtype="float8", kv_dtype="float8", prefix_caching=False, kv_cache_bytes=1 << 30),
    deployable(dtype="int8", pools=(Pool(layout=Layout(tp=2, ep=2)),)),
    deployable(dtype="float4", pools=(Pool(layout=Layout(tp=2, cp=2)),)),
    deployable(dtype="float8-block", kv_dtype="bfloat16", max_len=None),
    deployable(dtype="float32", kv_dtype="float32", pools=(Pool(layout=Layout()),)),
    deployable(dtype="float16", kv_dtype="int8", block_size=64),
    spanning(),
    disaggregated(),
    deployable("2x8xH100:ndr", pools=(MIXTURE,)),
]


def vllm_calls(directory: Path, deployment: Deployable) -> list[list[str]]:
    """What `vllm` is called with, of every replica, on the first node and on another."""
    script = export(deployment, "vllm").files["vllm.sh"]
    found = []
    for pool in deployment.pools:
        ranks = ("0", "1") if deployment.placement(pool).nodes > 1 else ("0",)
        for rank in ranks:
            ((_, *words, _),) = record(
                directory, script, pool.role, str(pool.replicas - 1), rank, "10.0.0.1", programs=("vllm",)
            )
            found.append(words)
    return found


@pytest.mark.parametrize("deployment", VARIETY)
def test_flags_of_vllm_are_those_of_the_version(deployment: Deployable, tmp_path: Path) -> None:
    for words in vllm_calls(tmp_path, deployment):
        assert words[:2] == ["serve", "/models/llama-70b"]
        for flag, value in flags(words).items():
            assert flag in KNOWN["vllm"]["flags"], flag
            choices = KNOWN["vllm"]["flags"][flag]
            assert choices is None or value in choices, (flag, value)


def test_the_real_parser_of_vllm_takes_them(tmp_path: Path) -> None:
    """And every flag in the list is one of its own. It takes ten seconds to import, so it has to be asked for."""
    python = os.environ.get("SHOAL_VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM 0.32: SHOAL_VLLM_PYTHON=PYTHON")
    program = (
        "import json, sys\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "given = json.load(sys.stdin)\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "known = {f for action in parser._actions for f in action.option_strings}\n"
        "assert not set(given['flags']) - known, set(given['flags']) - known\n"
        "for words in given['calls']:\n"
        "    found = parser.parse_args(['--model', *words[1:]])\n"
        "    print(json.dumps([found.tensor_parallel_size, found.quantization, found.max_num_seqs]))\n"
    )
    calls = [words for deployment in VARIETY for words in vllm_calls(tmp_path, deployment)]
    given = json.dumps({"flags": list(KNOWN["vllm"]["flags"]), "calls": calls})
    done = subprocess.run(
        [python, "-c", program], input=given, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    understood = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(understood) == len(calls)
    assert understood[0] == [4, None, 64] and understood[1][1] == "fp8"


def test_an_engine_over_nodes(tmp_path: Path) -> None:
    leader, worker = map(flags, vllm_calls(tmp_path, spanning()))
    assert "--headless" not in leader and "--headless" in worker
    assert (leader["--nnodes"], leader["--node-rank"], worker["--node-rank"]) == ("2", "0", "1")
    assert leader["--master-addr"] == worker["--master-addr"] == "10.0.0.1"
    assert (leader["--tensor-parallel-size"], leader["--pipeline-parallel-size"]) == ("8", "2")


def test_groups_of_attention_over_nodes(tmp_path: Path) -> None:
    leader, worker = map(flags, vllm_calls(tmp_path, deployable("2x8xH100:ndr", pools=(MIXTURE,))))
    assert (leader["--data-parallel-size"], leader["--data-parallel-size-local"]) == ("8", "4")
    assert worker["--data-parallel-start-rank"] == "4" and "--data-parallel-start-rank" not in leader
    assert "--enable-expert-parallel" in leader


def test_context_parallelism_splits_prompt_and_cache(tmp_path: Path) -> None:
    (words,) = vllm_calls(tmp_path, deployable(pools=(Pool(layout=Layout(tp=2, cp=2)),)))
    found = flags(words)
    assert found["--prefill-context-parallel-size"] == found["--decode-context-parallel-size"] == "2"


@pytest.mark.parametrize(
    ("target", "script", "program"),
    [("vllm", "vllm.sh", "vllm"), ("sglang", "sglang.sh", "python3"), ("tensorrt-llm", "trtllm.sh", "trtllm-serve")],
)
def test_replicas_beside_each_other_get_the_next_devices_and_port(
    target: str, script: str, program: str, tmp_path: Path
) -> None:
    text = export(deployable(), target).files[script]
    seen = []
    for replica in ("0", "1"):
        ((*words, variables),) = record(tmp_path, text, "serve", replica, programs=(program,))
        seen.append((flags(words)["--port"], variables["CUDA_VISIBLE_DEVICES"]))
    assert seen == [("8000", "0,1,2,3"), ("8001", "4,5,6,7")]


def test_a_replica_too_many_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="serve has 2 replicas, from 0"):
        record(tmp_path, export(deployable(), "vllm").files["vllm.sh"], "serve", "2", programs=("vllm",))


def test_routers_name_every_server_of_both_pools(tmp_path: Path) -> None:
    for target, program in (("vllm", "vllm-router"), ("sglang", "python3")):
        text = export(disaggregated(), target).files["router.sh"]
        ((_, *words, _),) = record(tmp_path, text, programs=(program,))
        assert words.count("--prefill") == 3 and words.count("--decode") == 2
    assert "8998" in words  # SGLang's decode servers ask the prefill server here


@pytest.mark.parametrize("deployment", [d for d in VARIETY if d.kv_dtype != "int8"])
def test_flags_of_sglang(deployment: Deployable, tmp_path: Path) -> None:
    script = export(deployment, "sglang").files["sglang.sh"]
    for pool in deployment.pools:
        ((_, *words, _),) = record(tmp_path, script, pool.role, "0", programs=("python3",))
        found = flags(words)
        assert set(found) <= set(KNOWN["sglang"]["flags"]), set(found) - set(KNOWN["sglang"]["flags"])
        stages = int(found.get("--pp-size", "1"))
        assert int(found["--tp-size"]) * stages == pool.ranks


GROUPS_OF_ONE = deployable("2x8xH100:ndr", pools=(Pool(layout=Layout(), attention_dp=16),))


@pytest.mark.parametrize(
    "deployment",
    [d for d in VARIETY if all(p.layout.cp == p.attention_dp == 1 for p in d.pools)] + [GROUPS_OF_ONE],
)
def test_flags_of_tensorrt_llm(deployment: Deployable, tmp_path: Path) -> None:
    made = export(deployment, "tensorrt-llm")
    for pool in deployment.pools:
        program = "mpirun" if deployment.placement(pool).nodes > 1 else "trtllm-serve"
        ((_, *words, _),) = record(
            tmp_path, made.files["trtllm.sh"], pool.role, "0", programs=(program,), HOSTFILE="hosts"
        )
        found = flags(words)
        assert set(found) <= set(KNOWN["tensorrt-llm"]["flags"])
        assert int(found["--tp_size"]) * int(found.get("--pp_size", "1")) == pool.ranks
        settings = yaml.safe_load(made.files[found["--config"]])
        assert settings["kv_cache_config"]["dtype"] in ("auto", "fp8", "int8")
        assert ("cache_transceiver_config" in settings) == (pool.role != "serve")


def test_the_orchestrator_of_tensorrt_llm() -> None:
    found = yaml.safe_load(export(disaggregated(), "tensorrt-llm").files["disaggregated.yaml"])
    assert (found["context_servers"]["num_instances"], found["generation_servers"]["num_instances"]) == (3, 2)
    assert len(set(found["context_servers"]["urls"] + found["generation_servers"]["urls"])) == 5


def test_nim(tmp_path: Path) -> None:
    made = export(deployable(dtype="float8"), "nim")
    lines = [line for line in made.files["nim.env"].splitlines() if not line.startswith("#")]
    values = dict(line.split("=", 1) for line in lines)
    assert values["NIM_TENSOR_PARALLEL_SIZE"] == "4" and values["NIM_MAX_MODEL_LEN"] == "8192"
    passed = flags(values["NIM_PASSTHROUGH_ARGS"].split())
    assert passed["--quantization"] == "fp8" and set(passed) <= set(KNOWN["vllm"]["flags"])
    assert not set(passed) & {"--tensor-parallel-size", "--max-model-len"}  # they have variables
    ((_, *words, _),) = record(tmp_path, made.files["nim.sh"], "1", programs=("docker",), MODELS="/m", NGC_API_KEY="k")
    assert words[0] == "run" and '"device=4,5,6,7"' in words and "8001:8000" in words


@pytest.mark.parametrize("target", ["vllm", "sglang", "tensorrt-llm", "nim"])
def test_the_gateway_in_front_is_a_deployment(target: str, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(export(deployable(), target).files["gateway.yaml"])
    deployment = load_config(Deployment, file, {})
    check(deployment)
    assert [address.openai[-4:] for address in deployment.models[0].endpoints] == ["8000", "8001"]


def test_block_sizes_are_the_engines_own_unless_they_were_chosen(tmp_path: Path) -> None:
    (words,) = vllm_calls(tmp_path, deployable())
    assert "--block-size" not in words
    (words,) = vllm_calls(tmp_path, deployable(block_size=64))
    assert flags(words)["--block-size"] == "64"


def test_what_is_otherwise_is_said() -> None:
    def said(target: str, **changes: object) -> str:
        return " ".join(export(deployable(**changes), target).warnings)  # type: ignore[arg-type]

    assert "experts whole" in said("vllm", pools=(Pool(layout=Layout(tp=2, ep=2)),))
    assert "--decode-context-parallel-size" in said("vllm", pools=(Pool(layout=Layout(cp=2)),))
    assert "--attn-cp-size" in said("sglang", pools=(Pool(layout=Layout(cp=2)),))
    assert "AWQ" in said("vllm", dtype="int4")
    assert "kv_cache_bytes" in said("sglang", kv_cache_bytes=1)
    assert "expert_dispatch" in said("vllm", engine={"expert_dispatch": "all_to_all"})
    assert "expert_dispatch" not in said("kubernetes", engine={"expert_dispatch": "all_to_all"})
