"""`shoal export`: from a deployment or a plan to a Deployable, and from what an exporter made of it to files."""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
import typer

from shoal.cli.errors import CommandError
from shoal.config import load_config
from shoal.core.config import EngineConfig
from shoal.core.hardware import Cluster
from shoal.core.layout import Layout
from shoal.plan import catalogue, models
from shoal.plan.export import TARGETS, Deployable, Export, ExportError, export
from shoal.plan.export.deployable import Pool, Role, label, with_cluster
from shoal.serve.deployment import Deployment, DeploymentError, GatewayConfig, ModelDeployment, check

_TYPED = {"dtype", "kv_dtype", "max_len", "max_sequences", "max_batch_tokens", "block_size", "prefix_caching"}
_TYPED |= {"kv_cache_bytes"}
"""Keys of an engine that a Deployable has of its own, under the same names."""
_OWN_PLACES = {"tls", "journal", "audit"}
"""Sections of the gateway that name files of the machine it runs on."""
_REPLACED = {"host", "port", "allow_remote", "api_key", "keys", "cluster_secret", "drain_seconds", "models"}
_DECIDED = {"model", "device", "layout"}
_OWN_FILES = {"step_log", "expert_load"}
_PATIENCE = {"join_seconds", "silence_seconds", "collective_seconds", "comm", "one_shot_bytes"}
_ROLES: dict[str, Role] = {"both": "serve", "serve": "serve", "prefill": "prefill", "decode": "decode"}


def list_targets(*, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: what for name, (_, what) in TARGETS.items()}, indent=2))
        return
    width = max(map(len, TARGETS))
    for name, (_, what) in TARGETS.items():
        print(f"{name:{width}}  {what}")


def write(
    file: Path,
    target: str,
    output: str,
    *,
    on: str | None,
    model: str | None,
    rdma: str | None,
    node_selector: list[str],
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """Raises CommandError or ConfigError."""
    try:
        if rdma is not None:
            given["rdma"] = _resource(rdma)
        if node_selector:
            given["node_selector"] = dict(_pair(text, "--node-selector") for text in node_selector)
        deployable = read(file, on, model, given)
        made = export(deployable, target)
    except (ExportError, catalogue.CatalogueError) as error:
        raise CommandError(f"{file}: {error}") from None
    if as_json:
        print(json.dumps(_as_json(deployable, made), indent=2))
        return
    for warning in made.warnings:
        _say("note", warning)
    if output == "-":
        sys.stdout.write(printed(made))
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made.files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(0o755)
        print(path)


def printed(made: Export) -> str:
    """One file as it is, so that it can be piped; several with their names."""
    if len(made.files) == 1:
        return next(iter(made.files.values()))
    return "".join(f"# ===== {name}\n{text}\n" for name, text in made.files.items())


def _as_json(deployable: Deployable, made: Export) -> dict[str, Any]:
    return {
        "target": made.target,
        "name": deployable.name,
        "model": deployable.served_name,
        "devices": deployable.num_devices,
        "device": deployable.device.name,
        "files": made.files,
        "warnings": list(made.warnings),
    }


def _say(kind: str, text: str) -> None:
    typer.secho(f"{kind}: ", fg=typer.colors.YELLOW, bold=True, err=True, nl=False)
    typer.echo(text, err=True)


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        example = "rdma/hca=1" if flag == "--rdma" else "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3"
        raise CommandError(f"{flag}: {text!r} is no KEY=VALUE, as {example}")
    return key, value


def _resource(text: str) -> tuple[str, int]:
    name, value = _pair(text, "--rdma")
    if not value.isdigit() or int(value) < 1:
        raise CommandError(f"--rdma: {value!r} is no number of devices; write {name}=1")
    return name, int(value)


# --- what is exported ------------------------------------------------------------------------------------------------


def read(file: Path, on: str | None, model: str | None, given: dict[str, Any]) -> Deployable:
    """Of a plan's JSON or of a deployment file. Raises CommandError, ConfigError, ExportError or CatalogueError."""
    plan = _plan(file)
    if plan is not None:
        return from_plan(plan, on, given)
    deployment = load_config(Deployment, file, {})
    try:
        check(deployment)
    except DeploymentError as error:
        raise CommandError(f"{file}: {error}") from None
    return from_deployment(deployment, on, model, given)


def _plan(file: Path) -> dict[str, Any] | None:
    """What `shoal plan --json` printed; None of any other file."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return None
    return tree if isinstance(tree, dict) and "models" not in tree else None


def from_deployment(
    deployment: Deployment, on: str | None, name: str | None, given: dict[str, Any], notes: tuple[str, ...] = ()
) -> Deployable:
    model = _chosen(deployment, name)
    engines = model.num_engines
    found = [*notes]
    if engines == 0:
        raise ExportError(f"model {model.name} has no engines of its own, only endpoints: there is nothing to place")
    if model.endpoints:
        found.append(
            f"{len(model.endpoints)} endpoints that run elsewhere are left out; add them to the gateway's file."
        )
    if model.spares:
        found.append(f"spares: {model.spares} engines more are left out; add them as replicas.")
    gateway = _changed(deployment, GatewayConfig(), set(GatewayConfig.__struct_fields__) - _REPLACED)
    for section in sorted(_OWN_PLACES & set(gateway)):
        del gateway[section]
        found.append(f"{section} names files of the machine it was written for and is left out.")
    if model.fallback is not None:
        found.append("fallback is another model and is left out: export that one, too.")
    if len(deployment.models) > 1:
        others = ", ".join(other.name for other in deployment.models if other is not model)
        found.append(f"the deployment's other models are exported one by one, with --model: {others}.")
    layout = Layout(**{axis: getattr(model.layout, axis) for axis in ("tp", "pp", "ep", "cp")})
    cluster = _cluster(on, model, layout.ranks * engines)
    pool = Pool(layout=layout, replicas=engines)
    _require_room(cluster, [pool])
    typed = {key: getattr(model, key) for key in sorted(_TYPED)}
    if model.block_size == EngineConfig(model="").block_size:
        typed["block_size"] = None  # shoal's own choice is no wish of whoever wrote the file
    engine = _changed(model, EngineConfig(model=""), set(EngineConfig.__struct_fields__) - _TYPED - _DECIDED)
    for key in sorted(_OWN_FILES & set(engine)):
        del engine[key]
        found.append(f"{key} is a path of the machine it was written for and is left out.")
    if "launch" in engine:
        # Who starts the ranks, and where they meet, is the target's to say.
        engine["launch"] = {key: value for key, value in engine["launch"].items() if key in _PATIENCE}
    values: dict[str, Any] = {
        "name": label(model.name),
        "model": model.model or model.name,
        "served_name": model.name,
        "pools": (pool,),
        "engine": engine,
        "serving": _changed(model, ModelDeployment(name=""), {"routing", "failover", "admission"}),
        "gateway": gateway,
        "drain_seconds": deployment.drain_seconds,
        "notes": tuple(found),
    }
    return Deployable(**(typed | values | with_cluster(cluster) | given))


def from_plan(plan: dict[str, Any], on: str | None, given: dict[str, Any]) -> Deployable:
    """Of what was asked and of the answer's pools, as `shoal plan --json` prints them (shoal.plan.planner.Plan)."""
    try:
        asked, answer = plan["asked"], plan["answer"]
        if answer is None:
            bound = (plan.get("impossible") or {}).get("bound", "nothing meets the goal")
            raise ExportError(f"the plan has no answer to export: {bound}")
        pools = answer["setup"]["pools"]
        name, first = asked["model"], pools[0]["engine"]
        checkpoint, stored = _checkpoint(name, first["weights"])
        values: dict[str, Any] = {
            "name": label(name),
            "model": checkpoint,
            "quantised": stored == first["weights"] and "model" not in given,
            "served_name": name,
            "pools": tuple(_pool(pool) for pool in pools),
            "dtype": first["weights"],
            "kv_dtype": first["cache"],
            "max_len": asked["longest"],
            "max_sequences": max(pool["engine"]["max_sequences"] for pool in pools),
            "max_batch_tokens": max(pool["engine"]["max_batch_tokens"] for pool in pools),
        }
        cluster = catalogue.cluster(on or asked["cluster"])
    except (KeyError, IndexError, TypeError) as error:
        raise ExportError(f"it is neither a deployment, for it has no models, nor a plan: {error} is missing") from None
    if len(pools) > 1 and len({pool["engine"]["max_batch_tokens"] for pool in pools}) > 1:
        budget = values["max_batch_tokens"]
        values["notes"] = (f"the pools' token budgets differ; both get the larger, {budget}: set the other's by hand.",)
    _require_room(cluster, list(values["pools"]))
    return Deployable(**(values | with_cluster(cluster) | given))


def _checkpoint(name: str, weights: str) -> tuple[str, str | None]:
    """What is loaded for a model of the catalogue, and what that is stored in: the id on the hub that has such weights,
    or the original."""
    try:
        found = models.published_model(name).checkpoints
    except models.ModelError:
        return name, None
    return next(((one, stored) for one, stored in found.items() if stored == weights), next(iter(found.items())))


def _pool(pool: dict[str, Any]) -> Pool:
    shape = pool["engine"]["shape"]
    layout = Layout(**{axis: shape.get(axis, 1) for axis in ("tp", "pp", "ep", "cp")})
    role = _ROLES[pool.get("role", "both")]
    return Pool(layout=layout, replicas=pool["replicas"], role=role, attention_dp=shape.get("attention_dp", 1))


def _chosen(deployment: Deployment, name: str | None) -> ModelDeployment:
    names = [model.name for model in deployment.models]
    if name is None and len(names) == 1:
        return deployment.models[0]
    if name is None:
        raise ExportError(f"it has {len(names)} models; choose one with --model: {', '.join(names)}")
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ExportError(f"--model: there is no {name!r}; the nearest is {near}")
    return deployment.models[names.index(name)]


def _cluster(on: str | None, model: ModelDeployment, ranks: int) -> Cluster:
    """On a CPU a rank is a share of the machine; of GPUs their kind has to be said."""
    if on is not None:
        return catalogue.cluster(on)
    if model.device == "cpu":
        return catalogue.cluster(f"{ranks}xcpu")
    raise ExportError(
        "--on: say where it runs, as --on 8xH100 or --on 2x8xH100:ndr (`shoal topology` shows this machine)"
    )


def _require_room(cluster: Cluster, pools: list[Pool]) -> None:
    needed = sum(pool.ranks * pool.replicas for pool in pools)
    if needed > cluster.num_devices:
        raise ExportError(
            f"it needs {needed} devices, and {cluster.name or 'the cluster'} has {cluster.num_devices}; give a larger "
            "cluster with --on, or fewer replicas"
        )


def _changed(values: msgspec.Struct, defaults: msgspec.Struct, names: set[str]) -> dict[str, Any]:
    """Those of the fields that are not as by default, in the order of the struct; of nested ones what is not, too."""
    found: dict[str, Any] = {}
    for name in values.__struct_fields__:
        if name not in names:
            continue
        value, default = getattr(values, name), getattr(defaults, name)
        if value == default:
            continue
        if isinstance(value, msgspec.Struct) and isinstance(default, type(value)):
            found[name] = _changed(value, default, set(value.__struct_fields__))
        elif isinstance(value, dict):
            found[name] = {key: _from_nothing(inner) for key, inner in value.items()}
        else:
            found[name] = _from_nothing(value)
    return found


def _from_nothing(value: Any) -> Any:
    """Of a struct what is not as by default, where it has one for every field; else all of it."""
    if isinstance(value, msgspec.Struct) and not any(field.required for field in msgspec.structs.fields(value)):
        return _changed(value, type(value)(), set(value.__struct_fields__))
    return msgspec.to_builtins(value)
