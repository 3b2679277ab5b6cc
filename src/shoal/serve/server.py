"""`shoal serve`: start the fleet, listen, drain on SIGTERM or Ctrl-C, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from shoal.checkpoint.resolve import ModelFiles
from shoal.core.config import EngineConfig
from shoal.serve.deployment import Deployment, GatewayConfig
from shoal.serve.engine_client import Progress
from shoal.serve.http import Server
from shoal.serve.http_connection import LimitedConnection
from shoal.serve.session import Session, open_session, single
from shoal.serve.tls import Certificates, TlsError, require_safe_listener, use_tls


class ServeConfig(GatewayConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on engines of its own: the deployment that needs no file."""

    engine: EngineConfig
    served_model_name: str | None = None
    """What clients ask for; None is the model's own name."""

    def deployment(self, files: ModelFiles) -> Deployment:
        settings = {name: getattr(self, name) for name in GatewayConfig.__struct_fields__}
        return single(self.engine, self.served_model_name or files.name, **settings)


class ListenError(Exception):
    """The address cannot be listened on. The message is for the user."""


def listen(config: GatewayConfig) -> socket.socket:
    """Bind first, load later: a taken port is known at once. Raises ListenError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"host {config.host!r} cannot be resolved: {error}") from None
    family, kind, protocol, _, address = found[0]
    if not config.allow_remote and not ipaddress.ip_address(address[0]).is_loopback:
        raise ListenError(
            f"{config.host} can be reached from other machines: pass --allow-remote (and --api-key) if that is meant"
        )
    if config.api_key is None and config.keys is None:
        try:
            # Whoever reaches it may do everything, so it has to be sure of who does.
            require_safe_listener(
                config.host, config.tls, allow_remote=config.allow_remote, name="a listener without keys"
            )
        except TlsError as error:
            raise ListenError(f"{error}; or give --api-key, or `keys` in the file") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {config.host}:{config.port}: {error.strerror}; try --port 0") from None
    return listener


async def serve(
    deployment: Deployment,
    files: dict[str, ModelFiles],
    listener: socket.socket,
    *,
    on_progress: Progress | None = None,
    on_ready: Callable[[str, Session], None] | None = None,
    recording: str | None = None,
) -> int:
    """Until a signal ends it. `files` has each model's by its name. Returns the exit status."""
    stop, hurry = asyncio.Event(), asyncio.Event()  # the first signal, and one more while requests go on
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    opening = contextlib.AsyncExitStack()
    async with opening:
        session = open_session(deployment, files, on_progress=on_progress, recording=recording)
        starting = asyncio.create_task(opening.enter_async_context(session))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # stopped while the model was loading: there is nothing to drain
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        stopping.cancel()
        await _listen_until_stopped(starting.result(), listener, stop, hurry, on_ready)
        return 0


async def _listen_until_stopped(
    session: Session,
    listener: socket.socket,
    stop: asyncio.Event,
    hurry: asyncio.Event,
    on_ready: Callable[[str, Session], None] | None,
) -> None:
    config = session.deployment
    server = Server(session)
    await server.open()
    watching = [asyncio.create_task(one.watch()) for one in session.certificates]
    settings = uvicorn.Config(
        server.app,
        http=LimitedConnection.with_limits(config.limits),
        ws="none",
        log_level="warning",
        lifespan="off",
        timeout_keep_alive=10,
        timeout_graceful_shutdown=max(1, int(config.drain_seconds)),
        server_header=False,
        proxy_headers=False,
        access_log=False,
    )
    if config.tls is not None:
        certificates = Certificates(config.tls, on_event=session.fleet.say)
        watching.append(asyncio.create_task(certificates.watch()))
        settings = use_tls(settings, certificates.server_context())
    front = _Front(settings)
    listening = asyncio.create_task(front.serve(sockets=[listener]))
    while not front.started and not listening.done():
        await asyncio.sleep(0.005)
    # What was made so far stays: it is not to be looked through again and again while streams wait. A collection of the
    # young takes milliseconds with thousands of streams, and they make no cycles that would be worth more of it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    if on_ready is not None:
        host, port = listener.getsockname()[:2]
        scheme = "http" if config.tls is None else "https"
        on_ready(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", session)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([listening, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    session.fleet.draining = True
    front.should_exit = True  # closes the listener, then waits for what runs, at most drain_seconds
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([listening, hurrying], return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not listening.done():
        await session.fleet.stop()  # ends every stream with an error, and with them the connections
    await listening
    await server.close()
    for task in watching:
        task.cancel()


class _Front(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by `serve`, which drains the engine too."""
        yield
