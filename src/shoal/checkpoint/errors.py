"""What can be wrong with a model on disk. The message is for the user: it names the file and the reason."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(Exception):
    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class ModelNotFound(Exception):
    """No built-in name, directory, file or reachable hub id by that name."""
