"""The deployment: what is served, by which endpoints, and by which rules. Read from the file that users write."""

from __future__ import annotations

import os

import msgspec

from shoal.core.admission import AdmissionConfig
from shoal.core.config import EngineConfig
from shoal.core.degradation import BadDegradation, DegradationPolicy, check_policies
from shoal.core.failover import FailoverConfig
from shoal.core.health import HealthConfig
from shoal.core.layout import Layout
from shoal.core.router import RoutingConfig
from shoal.serve.audit.log import AuditConfig
from shoal.serve.fleet import SupervisionConfig
from shoal.serve.journal_store import JournalConfig
from shoal.serve.protocol import Limits
from shoal.serve.tenants import TenantSettings
from shoal.serve.tls import TlsConfig
from shoal.serve.tracing import TracingConfig


class EndpointAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that runs already."""

    openai: str
    """Its URL, with or without /v1."""
    model: str | None = None
    """What it calls the model; None is the one that it serves."""
    api_key: str | None = None
    name: str | None = None
    max_sequences: int | None = None
    """That it is sent at once; None is 256. It should be what the server runs at once (vLLM: --max-num-seqs): what is
    beyond that waits in the gateway, where priorities, fairness and deadlines decide."""
    tls: TlsConfig | None = None
    """How an https:// address is spoken to."""


class ModelDeployment(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model that clients ask for. Its engines are configured by the fields of EngineConfig, beside these."""

    name: str
    """What clients ask for."""
    model: str = ""
    """What is loaded: a built-in name, a checkpoint, a hub id. Of a model that runs elsewhere its tokenizer is needed.
    Empty is `name`."""
    replicas: int | None = None
    """Engines to start; None is one, or none where `endpoints` are given."""
    spares: int = 0
    """Further engines that are kept loaded and get requests only while another endpoint is lost."""
    endpoints: list[EndpointAddress] = []
    fallback: str | DegradationPolicy | None = None
    """Another model of this deployment that serves requests for this one while it is down or overloaded."""
    routing: RoutingConfig = RoutingConfig()
    failover: FailoverConfig = FailoverConfig()
    admission: AdmissionConfig = AdmissionConfig()

    @property
    def num_engines(self) -> int:
        """To start here, without spares: a data-parallel rank is an engine."""
        replicas = (0 if self.endpoints else 1) if self.replicas is None else self.replicas
        return replicas * self.layout.dp


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front: where it listens and how it treats requests and endpoints."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any free one."""
    api_key: str | None = None
    allow_remote: bool = False
    """Listen beyond loopback. Without `tls` the connection is not encrypted."""
    tls: TlsConfig | None = None
    drain_seconds: float = 30.0
    """How long requests may go on after SIGTERM, or at an endpoint that is drained."""
    keys: str | None = None
    """File of API keys (`shoal keys`). Without keys everybody who reaches the listener may do everything."""
    cluster_secret: str | None = None
    """File, made at the first start, from which the salts of the tenants' prefix caches are derived: gateways with the
    same one share what their endpoints have cached. None is a secret that ends with the process."""
    tenants: dict[str, TenantSettings] = {}
    """Limits by tenant; `default` is for those that are not named."""
    journal: JournalConfig | None = None
    """Where requests are kept, so that a client that lost its connection can have the rest, also from another gateway
    with the same journal. None is nowhere."""
    audit: AuditConfig | None = None
    tracing: TracingConfig | None = None
    retry_ratio: float = 0.2
    """Retries and hedges are at most so many for each request."""
    limits: Limits = Limits()
    health: HealthConfig = HealthConfig()
    supervision: SupervisionConfig = SupervisionConfig()


class Deployment(GatewayConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    models: list[ModelDeployment]


class DeploymentError(Exception):
    """The deployment cannot be. The message names the key and says what would do."""


def check(deployment: Deployment) -> None:
    """Raise DeploymentError where the parts do not fit each other."""
    if not deployment.models:
        raise DeploymentError("models is empty: name at least one")
    names = [model.name for model in deployment.models]
    for number, model in enumerate(deployment.models):
        where = f"models[{number}]"
        if not model.name:
            raise DeploymentError(f"{where}.name is empty")
        if names.count(model.name) > 1:
            raise DeploymentError(f"{where}.name is {model.name!r}, and another model has that name")
        if model.num_engines == 0 and not model.endpoints:
            raise DeploymentError(f"{where}: {model.name!r} has no endpoints and no replicas; give either")
        for address in model.endpoints:
            if not address.openai.startswith(("http://", "https://")):
                raise DeploymentError(f"{where}.endpoints: {address.openai!r} is not a URL: write http://HOST:PORT")
    try:
        check_policies(fallbacks(deployment), names)
    except BadDegradation as error:
        raise DeploymentError(f"{error}") from None


def redacted(deployment: Deployment) -> Deployment:
    """Without what is secret: for digests and logs."""
    models = [
        msgspec.structs.replace(
            model, endpoints=[msgspec.structs.replace(one, api_key=one.api_key and "...") for one in model.endpoints]
        )
        for model in deployment.models
    ]
    return msgspec.structs.replace(deployment, api_key=deployment.api_key and "...", models=models)


def fallbacks(deployment: Deployment) -> dict[str, DegradationPolicy]:
    """By the model that has one."""
    return {
        model.name: DegradationPolicy(fallback=model.fallback) if isinstance(model.fallback, str) else model.fallback
        for model in deployment.models
        if model.fallback is not None
    }


def wanted_files(deployment: Deployment) -> dict[str, tuple[str, bool]]:
    """Of each model, by its name: what users call the files, and whether its weights are needed or its tokenizer alone,
    because all its endpoints run already."""
    return {
        model.name: (model.model or model.name, model.num_engines + model.spares > 0) for model in deployment.models
    }


def engine_configs(model: ModelDeployment, path: str) -> list[EngineConfig]:
    """Of each engine to start, spares last: its share of the cores, or its devices."""
    names = EngineConfig.__struct_fields__
    config = EngineConfig(**{name: getattr(model, name) for name in names})
    layout, count = config.layout, model.num_engines + model.spares
    alone = Layout(tp=layout.tp, pp=layout.pp, ep=layout.ep, cp=layout.cp)
    threads = config.threads
    if threads is None and count > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // (count * alone.ranks))
    configs = []
    for number in range(count):
        device = config.device
        if device.startswith("cuda") and count > 1:
            device = f"cuda:{int(device.partition(':')[2] or 0) + number * alone.ranks}"
        step_log = config.step_log
        if step_log is not None and count > 1:
            step_log = f"{step_log}/replica-{number}"
        configs.append(
            msgspec.structs.replace(
                config,
                model=path,
                layout=alone,
                threads=threads,
                device=device,
                step_log=step_log,
                prepare_grammars=config.prepare_grammars or count > 1,
            )
        )
    return configs
