"""`shoal export`: what is read, what is written where, and what is said of mistakes."""

from __future__ import annotations

import json
import re
import shlex
import stat
from pathlib import Path

import pytest
import yaml

from shoal.cli import main
from shoal.plan.export import TARGETS

FLEET = """\
drain_seconds: 20
tenants: {default: {concurrent_requests: 4}}
limits: {body_bytes: 9MiB}
models:
  - name: llama-70b
    model: /models/llama-70b
    dtype: bfloat16
    replicas: 2
    layout: {tp: 4}
    max_len: 8192
    routing: {policy: least_tokens}
    depth: 2
"""


def plan(**changes: object) -> dict[str, object]:
    """As `shoal plan --json` prints it, without what is told to people alone."""

    def pool(role: str, replicas: int, tp: int, tokens: int) -> dict[str, object]:
        shape = {"tp": tp, "pp": 1, "ep": 1, "cp": 1, "attention_dp": 1}
        engine = {"shape": shape, "weights": "float8", "cache": "float8", "max_batch_tokens": tokens}
        return {"role": role, "replicas": replicas, "engine": {**engine, "max_sequences": 64}}

    asked = {"model": "llama-3.1-70b", "cluster": "2x8xH100:ndr", "longest": 4096}
    setup = {"pools": [pool("prefill", 2, 4, 8192), pool("decode", 1, 8, 2048)], "devices": 16}
    return {"asked": asked, "answer": {"setup": setup}, "impossible": None, **changes}


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET)
    return file


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """In one line, with a status that is not 0."""
    assert main(["export", *map(str, arguments)]) in (1, 2)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and "Traceback" not in said
    return lines[0]


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TARGETS)
    assert main(["export", "--list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(TARGETS)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert "shoal export --list" in said and "--max-replicas" in said


def test_manifests_come_alone_on_standard_output(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that they can be piped into kubectl: notes go elsewhere."""
    assert main(["export", str(fleet), "--to", "kubernetes", "--on", "8xH100"]) == 0
    said = capsys.readouterr()
    kinds = [document["kind"] for document in yaml.safe_load_all(said.out)]
    assert "StatefulSet" in kinds and said.err.startswith("note: ")


def test_settings_of_the_deployment_arrive(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(fleet), "--to", "kubernetes", "--on", "8xH100", "--output", str(tmp_path / "out")]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    maps = [d for d in yaml.safe_load_all(Path(path).read_text()) if d["kind"] == "ConfigMap"]
    files = {name: yaml.safe_load(text) for document in maps for name, text in document["data"].items()}
    gateway, engine = files["gateway.yaml"], files["engine.yaml"]
    assert gateway["tenants"] == {"default": {"concurrent_requests": 4}}
    assert gateway["models"][0]["routing"] == {"policy": "least_tokens"}
    assert gateway["drain_seconds"] == engine["drain_seconds"] == 20
    assert engine["limits"] == gateway["limits"] == {"body_bytes": 9 << 20}  # what one takes the other must
    assert engine["models"][0]["depth"] == 2 and engine["models"][0]["layout"] == {"tp": 4}


def test_scripts_can_be_run(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(fleet), "--to", "vllm", "--on", "8xH100", "-o", str(tmp_path / "out")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["vllm.sh", "gateway.yaml"]
    assert [bool(path.stat().st_mode & stat.S_IXUSR) for path in paths] == [True, False]


def test_json_has_files_and_warnings(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(fleet), "--to", "lws", "--on", "8xH100", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["devices"] == 8 and made["device"] == "H100-SXM" and made["warnings"]
    assert list(made["files"]) == ["llama-70b.yaml"]


def test_flags_reach_the_manifests(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--name big --namespace llm --image r/shoal:1 --claim weights --priority-class high --max-replicas 3"
    flags += " --node-selector pool=a --node-selector gpu=h100 --shared-memory 2GiB --host-memory 64GiB"
    flags += " --scaling hpa --gateways 3 --topology-key rack --start-seconds 60"
    assert main(["export", str(fleet), "--to", "kubernetes", "--on", "8xH100", *flags.split()]) == 0
    objects = list(yaml.safe_load_all(capsys.readouterr().out))
    assert {document["metadata"]["namespace"] for document in objects} == {"llm"}
    (engines,) = [document for document in objects if document["kind"] == "StatefulSet"]
    pod = engines["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert engines["metadata"]["name"] == "big-engine" and container["image"] == "r/shoal:1"
    assert pod["priorityClassName"] == "high" and pod["nodeSelector"] == {"pool": "a", "gpu": "h100"}
    assert container["resources"]["limits"]["memory"] == "64Gi"
    assert container["startupProbe"]["failureThreshold"] == 6
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "weights"
    assert volumes["shm"]["emptyDir"]["sizeLimit"] == "2Gi"
    assert [document for document in objects if document["kind"] == "HorizontalPodAutoscaler"]


def test_rdma_devices_by_name(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.write_text(FLEET.replace("replicas: 2", "replicas: 1").replace("tp: 4", "tp: 8, pp: 2"))
    assert main(["export", str(fleet), "--to", "lws", "--on", "2x8xH100:ndr", "--rdma", "rdma/ib=8"]) == 0
    assert capsys.readouterr().out.count("rdma/ib: '8'") == 4  # requests and limits of leader and worker


def test_a_plan_with_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan()))
    assert main(["export", str(file), "--to", "dynamo"]) == 0
    said = capsys.readouterr()
    (graph,) = yaml.safe_load_all(said.out)
    types = {c["type"]: c["replicas"] for c in graph["spec"]["components"]}
    assert types == {"frontend": 2, "prefill": 2, "decode": 1}
    (container,) = graph["spec"]["components"][1]["podTemplate"]["spec"]["containers"]
    # The checkpoint that has such weights: nothing is left to quantise.
    assert container["args"][1] == "nvidia/Llama-3.1-70B-Instruct-FP8" and "--quantization" not in container["args"]
    assert "token budgets differ" in said.err
    refused = error_of(capsys, file, "--to", "kubernetes")
    assert "no separate prefill and decode pools yet" in refused and str(file) in refused
    assert main(["export", str(file), "--to", "vllm", "--model-path", "/models/fp8"]) == 0
    said = capsys.readouterr()
    assert "vllm serve /models/fp8" in said.out and "--quantization fp8" in said.out
    assert "leave it out if the model is quantised already" in said.err


def test_a_plan_without_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan(answer=None, impossible={"bound": "no engine is that fast"})))
    assert "no answer to export: no engine is that fast" in error_of(capsys, file, "--to", "vllm")


def test_who_starts_ranks_is_the_targets_to_say(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan's deployment may say ray, for it does not know where it will run."""
    fleet.write_text(
        FLEET + "    launch: {launcher: ray, ray_address: 'x:1', silence_seconds: 4}\n    warm_spares: 1\n"
    )
    for target, spares in (("kubernetes", True), ("lws", False)):
        assert main(["export", str(fleet), "--to", target, "--on", "8xH100"]) == 0
        said = capsys.readouterr()
        assert "launcher: ray" not in said.out and "ray_address" not in said.out and "silence_seconds: 4" in said.out
        assert ("warm_spares: 1" in said.out) == spares == ("warm_spares" not in said.err)


def test_engines_of_a_cpu_need_no_cluster(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.write_text("models:\n  - {name: smollm2-135m, device: cpu, replicas: 2}\n")
    assert main(["export", str(fleet), "--to", "compose"]) == 0
    assert "driver: nvidia" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a target"),
        (["--to", "kubernets", "--on", "8xH100"], "nearest is kubernetes"),
        (["--to", "lws"], "--on: say where it runs"),
        (["--to", "lws", "--on", "8xH10"], "nearest is H100"),
        (["--to", "lws", "--on", "4xH100"], "needs 8 devices, and 4xH100 has 4"),
        (["--to", "lws", "--on", "8xH100", "--model", "lama"], "nearest is llama-70b"),
        (["--to", "lws", "--on", "8xH100", "--name", "A_b"], "use a-b"),
        (["--to", "lws", "--on", "8xH100", "--max-replicas", "1"], "less than the 2 replicas"),
        (["--to", "lws", "--on", "8xH100", "--rdma", "hca"], "--rdma: 'hca' is no KEY=VALUE, as rdma/hca=1"),
        (["--to", "lws", "--on", "8xH100", "--rdma", "hca=x"], "write hca=1"),
        (["--to", "lws", "--on", "8xH100", "--node-selector", "x"], "--node-selector"),
        (["--to", "lws", "--on", "8xH100", "--host-memory", "64G"], "is not a size"),
        (["--to", "lws", "--on", "8xH100", "--scaling", "none"], "keda"),
    ],
)
def test_mistakes_are_named(fleet: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in error_of(capsys, fleet, *arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "name at least one"),
        ("models:\n  - {name: a, endpoints: [{openai: 'http://h'}]}", "only endpoints"),
        ("models: [{name: a}, {name: b}]", "choose one with --model: a, b"),
        ("models: [{name: a, layot: {}}]", "the nearest is"),
        ("{}", "it has no models, nor a plan: 'asked' is missing"),
        ('{"asked": {}, "answer": {"setup": {"pools": []}}}', "nor a plan"),
    ],
)
def test_files_that_are_no_deployment(fleet: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    fleet.write_text(text)
    assert said in error_of(capsys, fleet, "--to", "compose", "--on", "8xH100")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no.yaml: No such file" in error_of(capsys, tmp_path / "no.yaml", "--to", "compose")


def test_what_is_left_behind_is_said(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.write_text(
        FLEET + "    spares: 1\n    fallback: small\n    endpoints: [{openai: 'http://h'}]\n  - {name: small}\n"
        "journal: {location: /var/j.db}\n"
    )
    arguments = ["export", str(fleet), "--to", "kubernetes", "--on", "8xH100", "--model", "llama-70b"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    for word in ("spares", "fallback", "1 endpoints", "journal", "--model: small"):
        assert re.search(f"note: .*{word}", said.err), word
    assert "# Note: spares" in said.out and "/var/j.db" not in said.out


PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
COMMANDS = [
    line for fence in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in fence.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "fleet.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    assert program == "shoal" and main(words) == 0
    assert capsys.readouterr().out


def test_the_page_has_a_section_a_target() -> None:
    assert re.findall(r"^## (\S+)$", PAGE, re.MULTILINE) == list(TARGETS)
    assert re.findall(r"^\| \[`(\S+)`\]\(#\1\) \|", PAGE, re.MULTILINE) == list(TARGETS)
    assert {word for command in COMMANDS for word in re.findall(r"--to (\S+)", command)} == set(TARGETS)
