"""Compiles the native CPU kernels while shoal is installed. Everything else is in pyproject.toml.

The same source is compiled once for each instruction set; which one is loaded is decided at run time. Without a C++
compiler the installation goes on without them: shoal then computes with torch, and says so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).parent / "src" / "shoal" / "engine" / "native"


def _native() -> object:
    """The package that knows flags and file names, loaded by itself: shoal is not installed yet."""
    spec = importlib.util.spec_from_file_location("native", SOURCE / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {SOURCE / '__init__.py'}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        target = SOURCE if self.editable_mode else Path(self.build_lib) / "shoal" / "engine" / "native"
        build_kernels(target)


def build_kernels(target: Path) -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("warning: no C++ compiler: shoal will compute with torch, several times slower on a CPU", file=sys.stderr)
        return
    native = _native()
    for variant, (flags, _) in native.VARIANTS.items():  # type: ignore[attr-defined]
        output = target / native.library_path(variant).name  # type: ignore[attr-defined]
        # Renamed when it is whole: a running engine has the old file mapped.
        new = output.with_suffix(".new")
        command = [compiler, *native.COMPILER_FLAGS, *flags, str(SOURCE / "kernels.cpp"), "-o", str(new)]  # type: ignore[attr-defined]
        done = subprocess.run(command, check=False)
        if done.returncode == 0:
            os.replace(new, output)
        else:
            print(f"warning: the native CPU kernels ({variant}) could not be compiled", file=sys.stderr)


class PlatformDistribution(Distribution):
    """A wheel with kernels fits one platform, though it has no Python extension module."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:  # for development: compile in place
        build_kernels(SOURCE)
    else:
        setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
