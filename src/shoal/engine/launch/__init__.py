"""Launchers: they start the processes of an engine's ranks and tell them where the driver is. Nothing else."""

from __future__ import annotations

import secrets
from pathlib import Path

from shoal.core.config import EngineConfig, LaunchConfig
from shoal.engine.launch.base import Launcher
from shoal.engine.rendezvous import LaunchError

__all__ = ["LaunchError", "make_launcher", "shared_secret"]

_SHORTEST_SECRET = 16


def make_launcher(config: EngineConfig) -> Launcher:
    """Raises LaunchError where the launcher's surroundings lack something."""
    if config.launch.launcher == "env":
        from shoal.engine.launch.environment import EnvironmentLauncher

        return EnvironmentLauncher(config.launch)
    if config.launch.launcher == "ray":
        from shoal.engine.launch.ray_cluster import RayLauncher

        return RayLauncher(config)
    from shoal.engine.launch.local import LocalLauncher

    return LocalLauncher(config.launch)


def shared_secret(config: LaunchConfig) -> bytes:
    """What every rank must know: the file's, or one of this launch where no one else needs it. Raises LaunchError."""
    if config.secret_file is None:
        if config.launcher != "env":
            return secrets.token_bytes(32)
        raise LaunchError(
            "ranks that others start need a secret to join with: write one to a file that every rank can read "
            "(`openssl rand -hex 32 > shoal.secret`) and set launch.secret_file"
        )
    try:
        secret = Path(config.secret_file).read_bytes().strip()
    except OSError as error:
        raise LaunchError(f"secret file {config.secret_file}: {error.strerror or error}") from None
    if len(secret) < _SHORTEST_SECRET:
        raise LaunchError(f"secret file {config.secret_file}: holds {len(secret)} bytes of at least {_SHORTEST_SECRET}")
    return secret
