"""shoal's own files, by starting them: gateway and engines as their pods, script and container would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.config import load_config
from shoal.core.layout import Layout
from shoal.plan.export import Deployable, export
from shoal.plan.export.deployable import Pool
from shoal.serve.deployment import Deployment, check
from shoal.serve.server import ServeConfig
from tests.checkpoints import make_checkpoint
from tests.plan.export.commands import flags, record
from tests.plan.export.deployables import deployable, of_kind, spanning
from tests.plan.export.schemas import pod_templates

ROOT = Path(__file__).parents[3]
SHOAL = [sys.executable, "-m", "shoal"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("export") / "tiny")


def tiny(checkpoint: Path, **changes: Any) -> Deployable:
    values: dict[str, Any] = {
        "pools": (Pool(layout=Layout(), replicas=2),),
        "model": str(checkpoint),
        "served_name": "tiny",
        "dtype": "float32",
        "max_len": 64,
        "max_sequences": 4,
        "engine": {"threads": 1},
        "drain_seconds": 1.0,
    }
    return deployable("4xcpu", **(values | changes))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def running(words: list[str], **variables: str) -> Iterator[subprocess.Popen[str]]:
    """In a process group of its own: nothing of it is left."""
    process = subprocess.Popen(words, env={**ENVIRONMENT, **variables}, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def ask(url: str, key: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def succeeds(probe: list[str]) -> bool:
    """A probe's command as the kubelet runs it."""
    words = [sys.executable, *probe[1:]]
    return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


def make_keys(directory: Path, head: str) -> list[str]:
    """A client's key, and of some targets the one of probes: by the commands that the head of an export says. The file
    is keys.json."""
    commands = re.findall(r"^#   shoal (keys create .*)$", head, re.MULTILINE)
    keys = []
    for command in commands:
        words = [*SHOAL, *command.split()]
        done = subprocess.run(words, env=ENVIRONMENT, cwd=directory, capture_output=True, text=True, check=True)
        keys.append(re.findall(r"\b(sk-\S+)", done.stdout)[0])
    return keys


def test_pods_of_engine_and_gateway_serve(checkpoint: Path, tmp_path: Path) -> None:
    """Files of the ConfigMaps, filled in by the init containers' program, served by the containers' command, asked by
    their probes; of two engines one is not there."""
    made = export(tiny(checkpoint), "kubernetes")
    client_key, probe_key = make_keys(tmp_path, *made.files.values())
    secret = tmp_path / "engine-key"
    secret.write_text("k" * 64 + "\n")
    (tmp_path / "probe-key").write_text(probe_key + "\n")
    ports = {"llama-engine": free_port(), "llama-gateway": free_port()}
    commands, probes = {}, {}
    for kind, name in (("StatefulSet", "llama-engine"), ("Deployment", "llama-gateway")):
        (template,) = pod_templates(of_kind(made, kind))
        fill, server = template["spec"]["initContainers"][0], template["spec"]["containers"][0]
        (text,) = of_kind(made, "ConfigMap", name)["data"].values()
        file = tmp_path / f"{name}.template"
        # What a cluster would give them: addresses by name, secrets where they are mounted.
        text = re.sub(r"http://llama-engine-0\S+", f"http://127.0.0.1:{ports['llama-engine']}", text)
        text = re.sub(r"http://llama-engine-1\S+", f"http://127.0.0.1:{free_port()}", text)
        text = text.replace("/etc/shoal/secrets/keys.json", str(tmp_path / "keys.json"))
        file.write_text(text.replace("/etc/shoal/secrets/cluster-secret", str(tmp_path / "cluster-secret")))
        filled = tmp_path / f"{name}.yaml"
        words = [sys.executable, *fill["command"][1:3], str(file), str(filled), str(secret)]
        subprocess.run(words, check=True)
        assert stat.S_IMODE(filled.stat().st_mode) == 0o600 and "@ENGINE_KEY@" not in filled.read_text()
        assert server["command"] + server["args"][:2] == ["shoal", "serve", "--deployment"]
        commands[name] = [*SHOAL, *server["args"][:2], str(filled), "--port", str(ports[name])]
        probe = server["readinessProbe"]["exec"]["command"]
        key = {"engine-key": secret, "probe-key": tmp_path / "probe-key"}[probe[-1].rpartition("/")[2]]
        probes[name] = [*probe[:-2], probe[-2].replace(":8000", f":{ports[name]}"), str(key)]
    assert not succeeds(probes["llama-engine"])
    with running(commands["llama-engine"]) as engine, running(commands["llama-gateway"]) as gateway:
        wait_for(lambda: succeeds(probes["llama-engine"]), "the engine is ready", engine)
        wait_for(lambda: succeeds(probes["llama-gateway"]), "the gateway is ready", gateway)
        url = f"http://127.0.0.1:{ports['llama-gateway']}"
        answer = ask(f"{url}/v1/completions", client_key, {"prompt": "a b c", "max_tokens": 3, "ignore_eos": True})
        assert answer["model"] == "tiny" and answer["usage"]["completion_tokens"] == 3
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/v1/models", "wrong")
        fleet = ask(f"{url}/fleet", probe_key)
        states = {e["name"]: e["state"] for e in fleet["models"][0]["endpoints"]}
        assert states["llama-0"] == "ready" and states["llama-1"] != "ready"


def test_a_group_of_pods_serves(checkpoint: Path, tmp_path: Path) -> None:
    """The command of a LeaderWorkerSet's leader, with what Kubernetes and the controller would fill in."""
    deployment = tiny(checkpoint, pools=(Pool(layout=Layout(tp=2)),), start_seconds=60)
    made = export(deployment, "lws")
    (text,) = of_kind(made, "ConfigMap", "llama-engine")["data"].values()
    file, secret = tmp_path / "serve.yaml", tmp_path / "rank-secret"
    secret.write_text("r" * 64)
    text = text.replace("/etc/shoal/secrets/rank-secret", str(secret)).replace("@ENGINE_KEY@", "k" * 64)
    file.write_text(text)
    (container,) = pod_templates(of_kind(made, "LeaderWorkerSet"))[0]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    filled = {
        "LWS_GROUP_SIZE": "1",
        "LWS_WORKER_INDEX": "0",
        "LWS_LEADER_ADDRESS": "127.0.0.1",
        "POD_IP": "127.0.0.1",
    }
    words = [re.sub(r"\$\((\w+)\)", lambda name: filled[name[1]], word) for word in container["args"]]
    words = [f"--config={file}" if word.startswith("--config=") else word for word in words]
    words = [f"--master-port={free_port()}" if word.startswith("--master-port=") else word for word in words]
    port = free_port()
    with running([sys.executable, "-m", "torch.distributed.run", *words, "--port", str(port)]) as group:

        def ready() -> bool:
            with contextlib.suppress(OSError):
                return bool(ask(f"http://127.0.0.1:{port}/ready", "k" * 64)["ready"])
            return False

        wait_for(ready, "the group is ready", group)
        body = {"prompt": "a b c", "max_tokens": 3, "ignore_eos": True}
        assert ask(f"http://127.0.0.1:{port}/v1/completions", "k" * 64, body)["usage"]["completion_tokens"] == 3


_SRUN = """\
#!{python}
# As Slurm's: starts the tasks of a step, numbered, and waits for them.
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
at = max(i for i, word in enumerate(sys.argv) if word.startswith("--") and sys.argv[i + 1:i + 2] == ["bash"]) + 1
tasks = int([word.split("=")[1] for word in options if word.startswith("--ntasks=")][0])
runs = [
    subprocess.Popen(sys.argv[at:], env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_NTASKS": str(tasks)}})
    for n in range(tasks)
]
sys.exit(max(run.wait() for run in runs))
"""


def test_the_script_for_slurm_serves(checkpoint: Path, tmp_path: Path) -> None:
    """On one machine with a stand-in for srun: two ranks meet, and the gateway finds their engine."""
    made = export(tiny(checkpoint, pools=(Pool(layout=Layout(tp=2)),), start_seconds=60), "slurm")
    (text,) = made.files.values()
    (client_key,) = make_keys(tmp_path, text)
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {
        "srun": _SRUN.format(python=sys.executable),
        "scontrol": "#!/bin/sh\necho 127.0.0.1\n",
        "shoal": f'#!/bin/sh\nexec {sys.executable} -m shoal "$@"\n',
    }
    for name, program in programs.items():
        (tools / name).write_text(program)
        (tools / name).chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(f"cd {tmp_path}\n{text}")
    port, base, ranks = free_port(), free_port(), free_port()
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_CPUS_PER_TASK": "1",
        "SHOAL_GATEWAY_PORT": str(port),
        "SHOAL_ENGINE_PORT": str(base),
        "SHOAL_RANKS_PORT": str(ranks),
    }
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(OSError):
            return bool(ask(f"{url}/ready", client_key)["ready"])
        return False

    with running(["bash", str(script)], **variables) as job:
        wait_for(ready, "the engine is ready", job)
        answer = ask(f"{url}/v1/completions", client_key, {"prompt": "a b c", "max_tokens": 3, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 3
        job.send_signal(signal.SIGTERM)
        job.wait(60)
        assert not list(tmp_path.glob(".llama-7*"))  # with the keys


def test_the_script_for_slurm_gives_every_engine_its_nodes(tmp_path: Path) -> None:
    (text,) = export(spanning(), "slurm").files.values()
    assert "#SBATCH --nodes=4\n" in text and "#SBATCH --gres=gpu:8\n" in text
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'n0\\nn1\\nn2\\nn3\\n'\n")
    (tools / "scontrol").chmod(0o755)
    # The gateway's file goes with the job, so what it is started with is kept here.
    script = text.replace('shoal serve --deployment "$dir/gateway.yaml"', f'cp "$dir/gateway.yaml" {tmp_path}; shoal')
    calls = record(
        tmp_path,
        f"cd {tmp_path}\n{script}",
        programs=("srun", "shoal"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n[0-3]",
        SLURM_CPUS_PER_TASK="4",
        PATH=f"{tools}:{tmp_path / 'tools'}:{os.environ['PATH']}",
    )
    steps = [flags(words[1:]) for words in calls if words[0] == "srun"]
    assert sorted(re.findall(r"--nodelist=\S+", f"{step}")[0].strip("',:") for step in steps) == [
        "--nodelist=n0,n1",
        "--nodelist=n2,n3",
    ]
    (model,) = yaml.safe_load((tmp_path / "gateway.yaml").read_text())["models"]
    assert [e["openai"] for e in model["endpoints"]] == ["http://n0:8001", "http://n2:8001"]
    assert len({e["api_key"] for e in model["endpoints"]}) == 1 and len(model["endpoints"][0]["api_key"]) == 64


def test_compose_and_ray_files_are_deployments(checkpoint: Path, tmp_path: Path) -> None:
    for target, layout in (("compose", Layout()), ("ray", Layout(tp=2))):
        made = export(tiny(checkpoint, pools=(Pool(layout=layout, replicas=2),)), target)
        file = tmp_path / "fleet.yaml"
        file.write_text(made.files["fleet.yaml"].replace("@HOST@", "127.0.0.1"))
        deployment = load_config(Deployment, file, {})
        check(deployment)
        (model,) = deployment.models
        assert model.num_engines == 2 and model.layout == layout and model.device == "cpu"


def test_ranks_of_a_group_read_a_serve_configuration(tmp_path: Path) -> None:
    (text,) = of_kind(export(spanning(), "lws"), "ConfigMap", "llama-engine")["data"].values()
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    config = load_config(ServeConfig, file, {"engine.model": "m"})
    assert config.engine.launch.launcher == "env" and config.engine.layout == Layout(tp=8, pp=2)
    assert config.engine.device == "cuda"


def test_settings_of_the_engine_arrive_whole(tmp_path: Path) -> None:
    engine = {"expert_dispatch": "all_to_all", "depth": 2, "launch": {"silence_seconds": 5.0}}
    made = export(deployable(engine=engine, prefix_caching=False, kv_dtype="bfloat16"), "kubernetes")
    file = tmp_path / "engine.yaml"
    (text,) = of_kind(made, "ConfigMap", "llama-engine")["data"].values()
    file.write_text(text)
    (model,) = load_config(Deployment, file, {}).models
    assert (model.expert_dispatch, model.depth, model.launch.silence_seconds) == ("all_to_all", 2, 5.0)
    assert (model.prefix_caching, model.kv_dtype, model.layout, model.max_len) == (
        False,
        "bfloat16",
        Layout(tp=4),
        8192,
    )


def test_compose_is_what_its_specification_says() -> None:
    """Keys and forms of compose-spec/compose-spec, schema/compose-spec.json."""
    project = yaml.safe_load(export(deployable(), "compose").files["compose.yaml"])
    assert set(project) <= {"name", "services", "networks", "volumes", "secrets", "configs", "include", "version"}
    (service,) = project["services"].values()
    known = (
        "image entrypoint command user restart init read_only cap_drop security_opt tmpfs shm_size ulimits environment"
    )
    known += " ports stop_grace_period healthcheck secrets configs volumes labels deploy devices group_add"
    assert set(service) <= set(known.split())
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 8, "capabilities": ["gpu"]}
    assert set(service["secrets"]) == set(project["secrets"])
    assert {one["source"] for one in service["configs"]} == set(project["configs"])
    assert set(service["healthcheck"]) <= {"test", "interval", "timeout", "retries", "start_period", "start_interval"}
    for duration in ("interval", "timeout", "start_period"):
        assert re.fullmatch(r"\d+s", service["healthcheck"][duration])
    assert service["healthcheck"]["test"][0] == "CMD" and service["read_only"]
