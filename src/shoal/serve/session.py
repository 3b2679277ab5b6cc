"""A fleet with everything that its models need to generate text. Server, batch and chat open one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator
from typing import Any

from shoal.checkpoint.resolve import ModelFiles, load_spec
from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.config import EngineConfig
from shoal.core.degradation import Degrader
from shoal.core.retry_budget import RetryBudget
from shoal.engine.grammar import GrammarError
from shoal.serve.deployment import Deployment, EndpointAddress, ModelDeployment, engine_configs, fallbacks
from shoal.serve.endpoint import Endpoint, EndpointStartError
from shoal.serve.engine_client import EngineStartError, Progress
from shoal.serve.fleet import Fleet
from shoal.serve.generation import Generator
from shoal.serve.openai_endpoint import OpenAIEndpoint
from shoal.serve.pool import Pool
from shoal.serve.protocol import Limits
from shoal.serve.shoal_endpoint import ShoalEndpoint
from shoal.serve.tls import Certificates


class Session:
    """What `open_session` opened."""

    def __init__(self, deployment: Deployment, files: dict[str, ModelFiles]) -> None:
        self.deployment = deployment
        self.files = files
        """Of each model, by its name."""
        self.models = {model.name: model for model in deployment.models}
        budget = RetryBudget(ratio=deployment.retry_ratio)
        pools = {
            model.name: Pool(model.name, model.routing, model.failover, model.admission, budget, self._event)
            for model in deployment.models
        }
        degrader = Degrader(fallbacks(deployment), list(pools))
        self.fleet = Fleet(pools, degrader, deployment.health, deployment.supervision)
        self.certificates: list[Certificates] = []
        """Of endpoints: watched, and exchanged when their files are."""
        self.generators: dict[str, Generator] = {}
        self._numbers = {name: itertools.count() for name in pools}

    def _event(self, kind: str, message: str) -> None:
        self.fleet.say(kind, message)

    def add_engine(self, model: ModelDeployment, config: EngineConfig, **options: Any) -> asyncio.Future[None]:
        spare = options.pop("spare", False)
        endpoint = ShoalEndpoint(self._name(model.name), config, **options)
        return self.fleet.add(endpoint, self.fleet.pools[model.name], spare=spare)

    def add_address(self, model: ModelDeployment, address: EndpointAddress) -> tuple[str, asyncio.Future[None]]:
        name = address.name or self._name(model.name)
        endpoint: Endpoint = OpenAIEndpoint(
            name,
            address.openai,
            model=address.model,
            api_key=address.api_key,
            vocab_size=load_spec(self.files[model.name].path).vocab_size,
            max_sequences=address.max_sequences,
            tls=self._client_context(address),
        )
        return name, self.fleet.add(endpoint, self.fleet.pools[model.name])

    def _client_context(self, address: EndpointAddress) -> ssl.SSLContext | None:
        if address.tls is None:
            return None
        certificates = Certificates(address.tls, on_event=self._event)
        self.certificates.append(certificates)
        return certificates.client_context()

    def _name(self, model: str) -> str:
        taken = {member.name for member in self.fleet.members()}
        stem = model.replace("/", "-")
        return next(name for number in self._numbers[model] if (name := f"{stem}-{number}") not in taken)

    async def add_any(self, pool: Pool, address: EndpointAddress | None) -> str:
        """An endpoint at run time, once it is of use. Raises EndpointStartError."""
        model = self.models[pool.name]
        if address is None:
            config = engine_configs(model, f"{self.files[pool.name].path}")[0]
            before = set(pool.members)
            first = self.add_engine(model, config)
            name = next(name for name in pool.members if name not in before)
        else:
            name, first = self.add_address(model, address)
        try:
            await first
        except EndpointStartError:
            await self.fleet.remove(name)
            raise
        return name

    async def start(self, on_progress: Progress | None, recording: str | None) -> None:
        """Every endpoint. Raises EngineStartError if one of the fleet's own engines does not start."""
        own: list[asyncio.Future[None]] = []
        others: list[asyncio.Future[None]] = []
        for model in self.deployment.models:
            for number, config in enumerate(engine_configs(model, f"{self.files[model.name].path}")):
                first = not own
                own.append(
                    self.add_engine(
                        model,
                        config,
                        spare=number >= model.num_engines,
                        on_progress=on_progress if first else None,
                        recording=recording if first or recording is None else f"{recording}.{len(own)}",
                    )
                )
            others += [self.add_address(model, address)[1] for address in model.endpoints]
        self.fleet.start_watching()
        # Who cannot be reached yet is tried again; an engine that does not start is for the user to mend.
        await asyncio.gather(*others, return_exceptions=True)
        try:
            await asyncio.gather(*own)
        except EndpointStartError:
            for future in own:
                future.cancel()
            raise


@contextlib.asynccontextmanager
async def open_session(
    deployment: Deployment,
    files: dict[str, ModelFiles],
    *,
    on_progress: Progress | None = None,
    recording: str | None = None,
    drain_seconds: float = 0.0,
) -> AsyncIterator[Session]:
    """Start a fleet, and end it with the block. Raises EngineStartError or CheckpointError."""
    session = Session(deployment, files)
    # Tokenizers are read here while the engine processes read the weights.
    loading = {
        name: asyncio.create_task(asyncio.to_thread(load_tokenizer, found.path)) for name, found in files.items()
    }
    try:
        await session.start(on_progress, recording)
        for name, pool in session.fleet.pools.items():
            tokenizer = await loading[name]
            path = files[name].path
            vocab_size = load_spec(path).vocab_size
            session.generators[name] = Generator(pool, tokenizer, str(path), deployment.limits, vocab_size)
        try:
            for name, generator in session.generators.items():
                if session.models[name].prepare_grammars:
                    with contextlib.suppress(GrammarError):  # it is said to who asks for a grammar
                        await generator.grammars.start()
            yield session
        finally:
            for generator in session.generators.values():
                await generator.close()
    finally:
        await session.fleet.stop(drain_seconds)
        for task in loading.values():
            task.cancel()
        await asyncio.gather(*loading.values(), return_exceptions=True)


@contextlib.asynccontextmanager
async def open_generator(
    config: EngineConfig, files: ModelFiles, *, limits: Limits | None = None, on_progress: Progress | None = None
) -> AsyncIterator[Generator]:
    """One model for one command. Raises EngineStartError or CheckpointError."""
    deployment = single(config, files.name, limits=limits or Limits())
    async with open_session(deployment, {files.name: files}, on_progress=on_progress) as session:
        yield session.generators[files.name]


def single(config: EngineConfig, name: str, **settings: Any) -> Deployment:
    """The deployment of one model: each data-parallel rank is an endpoint."""
    if config.layout.dp > 1 and config.launch.launcher == "env":
        raise EngineStartError("dp does not go with the env launcher: start one server a replica")
    values = {field: getattr(config, field) for field in EngineConfig.__struct_fields__}
    return Deployment(models=[ModelDeployment(name=name, **values)], **settings)
