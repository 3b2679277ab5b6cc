"""The rings: what may import what, and what no part of shoal may do. Each rule is first shown to catch its offence."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "shoal"
MODULES = sorted(SOURCE.rglob("*.py"))

RINGS: dict[str, tuple[str, ...]] = {
    # What each part may import of shoal, besides itself. A dotted name allows that module alone.
    "core": (),
    "checkpoint": ("core",),
    "engine": ("core", "checkpoint"),
    "serve": ("core", "checkpoint", "engine.executor", "engine.child", "engine.grammar", "__version__"),
    "bench": ("core",),
    "sim": ("core",),
    "plan": ("core",),
    "config": (),
    "cli": (
        "core",
        "checkpoint",
        "engine.child",
        "engine.device_timing",
        "engine.executor",
        "engine.memory",
        "engine.launch",
        "engine.profiling",
        "serve",
        "bench",
        "plan",
        "sim",
        "config",
        "__version__",
    ),
    "__main__": ("cli",),
    "__init__": (),
}
CORE_MAY_IMPORT = frozenset(sys.stdlib_module_names) | {"msgspec", "shoal"}
CORE_MAY_NOT_IMPORT = frozenset(
    [
        "asyncio",
        "concurrent",
        "ctypes",
        "datetime",
        "glob",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "pickle",
    ]
    + ["queue", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "socketserver", "ssl"]
    + ["subprocess", "sys", "tempfile", "threading", "time", "uuid"]
)
CORE_MAY_NOT_CALL = frozenset({"id", "open", "input", "print", "hash"})
FORBIDDEN_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"})
TORCH_CUDA_ALLOWED = frozenset({"engine/devices.py", "engine/graphs.py", "engine/memory.py", "cli/models.py"})
MAX_LINES = 500


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def ring_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, those inside functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative imports are not used here"
            if node.module == "shoal":
                yield from ((node.lineno, f"shoal.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; "" if it is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


# --- the rules: each gives (line, what is wrong) ----------------------------------------------------------------------


def ring_offences(tree: ast.AST, ring: str) -> Iterator[tuple[int, str]]:
    allowed = (ring, *RINGS[ring])
    for line, name in imports(tree):
        if not name.startswith("shoal."):
            continue
        target = name.removeprefix("shoal.")
        if not any(target == entry or target.startswith(f"{entry}.") for entry in allowed):
            yield line, f"{ring} may not import {name}"


def core_offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree):
        top = name.split(".")[0]
        if top not in CORE_MAY_IMPORT or top in CORE_MAY_NOT_IMPORT:
            yield line, f"core may not import {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CORE_MAY_NOT_CALL:
            yield node.lineno, f"core may not call {node.func.id}()"
    yield from set_iterations(tree)


def set_iterations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Places where a set's order, which differs between processes, could reach a plan."""
    sets = {name for node in ast.walk(tree) for name in _names_of_sets(node)}
    for node in ast.walk(tree):
        walked: list[ast.expr] = []
        if isinstance(node, (ast.For, ast.comprehension)):
            walked = [node.iter]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("list", "tuple", "iter", "enumerate", "zip", "map"):
            walked = list(node.args)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
            walked = [] if node.args else [node.func.value]
        elif isinstance(node, ast.Starred):
            walked = [node.value]
        for expression in walked:
            if _is_set(expression) or dotted(expression) in sets:
                yield expression.lineno, f"the order of the set {ast.unparse(expression)} is used"


def _names_of_sets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.AnnAssign):
        if _is_set_type(node.annotation) or (node.value and _is_set(node.value)):
            yield dotted(node.target)
    elif isinstance(node, ast.Assign) and _is_set(node.value):
        yield from (dotted(target) for target in node.targets)
    elif (
        isinstance(node, ast.arg)
        and node.annotation
        and ast.unparse(node.annotation).startswith(("set[", "frozenset["))
    ):
        yield node.arg


def _is_set_type(annotation: ast.expr) -> bool:
    return ast.unparse(annotation).startswith(("set[", "frozenset["))


def _is_set(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd, ast.Sub, ast.BitXor)):
        return _is_set(node.left) or _is_set(node.right)
    is_call = isinstance(node, ast.Call) and dotted(node.func) in ("set", "frozenset")
    return is_call or isinstance(node, (ast.Set, ast.SetComp))


def forbidden_everywhere(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield line, f"{name} is forbidden: it runs what it reads"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS or name == "torch.load":
                yield node.lineno, f"{name}() is forbidden: it runs what it reads"


def cuda_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.cuda":
            yield node.lineno, "torch.cuda belongs where devices are chosen: ask a tensor or a torch.device instead"
    yield from ((line, f"{name} is for devices") for line, name in imports(tree) if name.startswith("torch.cuda"))


# --- every rule catches what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "offence"),
    [
        (lambda t: ring_offences(t, "core"), "from shoal.engine.ops import Ops"),
        (lambda t: ring_offences(t, "engine"), "def f():\n    import shoal.serve.http"),
        (lambda t: ring_offences(t, "serve"), "from shoal.engine.worker import Worker"),
        (lambda t: ring_offences(t, "checkpoint"), "from shoal import cli"),
        (core_offences, "import torch"),
        (core_offences, "from time import monotonic"),
        (core_offences, "def f(x):\n    return id(x)"),
        (core_offences, "def f(x: set[int]):\n    return [y for y in x]"),
        (core_offences, "class A:\n    def f(self):\n        self.x: set[int] = set()\n        self.x.pop()"),
        (core_offences, "seen = set()\nfor x in seen | {1}:\n    pass"),
        (core_offences, "a = [*{1, 2}]"),
        (forbidden_everywhere, "import pickle"),
        (forbidden_everywhere, "import torch\ntorch.load('x')"),
        (forbidden_everywhere, "eval('1')"),
        (cuda_uses, "import torch\ntorch.cuda.synchronize()"),
    ],
)
def test_rules_catch_their_offence(rule: object, offence: str) -> None:
    assert callable(rule)
    assert list(rule(ast.parse(offence)))


@pytest.mark.parametrize(
    "innocent",
    ["seen: set[int] = set()\nfound = 3 in seen", "for x in sorted({1, 2}):\n    pass", "d = {}\nd.pop('a')"],
)
def test_rules_leave_the_innocent_alone(innocent: str) -> None:
    assert not list(core_offences(ast.parse(innocent)))


# --- the code keeps them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ring = ring_of(path)
    assert ring in RINGS, f"{ring} is in no ring: add it to RINGS and to docs/architecture.md"
    offences = [*ring_offences(tree, ring), *forbidden_everywhere(tree)]
    if ring == "core":
        offences += core_offences(tree)
    if name_of(path) not in TORCH_CUDA_ALLOWED:
        offences += cuda_uses(tree)
    assert not offences, "\n".join(f"{name_of(path)}:{line}: {what}" for line, what in offences)


@pytest.mark.parametrize(
    "path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_core_brings_no_heavy_module() -> None:
    """In a fresh interpreter: what an import brings at second hand shows in no source file."""
    program = (
        "import pkgutil, sys, importlib, shoal.core\n"
        "for m in pkgutil.iter_modules(shoal.core.__path__): importlib.import_module(f'shoal.core.{m.name}')\n"
        "print(*sys.modules)"
    )
    loaded = _run(program)
    assert "shoal.core.scheduler" in loaded
    assert not loaded & {"torch", "numpy", "asyncio", "zmq", "starlette", "random", "jinja2"}


def test_cli_brings_no_heavy_module() -> None:
    loaded = _run("import sys, shoal.cli.app; print(*sys.modules)")
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "zmq", "starlette", "uvicorn", "xgrammar", "jinja2", "tokenizers", "gguf"}


def _run(program: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_engine_comes_without_triton() -> None:
    """It is an extra: only its own kernels, and what is imported together with them, may need it."""
    lazy = "shoal.engine.kernels.", "shoal.engine.triton_"
    loaded = _run("import sys, shoal.engine.worker; print(*sys.modules)")
    assert not [name for name in loaded if name.startswith(lazy)]


def test_dependencies_are_those_that_are_imported() -> None:
    """A package that is imported and not declared breaks a fresh installation; one that is not used burdens it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement.split(">=")[0].strip().lower().replace("-", "_") for requirement in project["dependencies"]}
    module_of = {"pyzmq": "zmq", "pyyaml": "yaml"}
    available = {module_of.get(name, name) for name in declared}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    used = (
        {name.split(".")[0] for tree in trees for _, name in imports(tree)} - set(sys.stdlib_module_names) - {"shoal"}
    )
    # Triton comes with torch where torch is for a GPU; elsewhere its kernels are never imported.
    assert used - {"triton"} <= available
    assert available - used <= {"httptools"}, "only uvicorn's HTTP parser is needed without an import"
