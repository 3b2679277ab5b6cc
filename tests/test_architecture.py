"""docs/architecture.md against the code: every module is named, none that does not exist, arrows as in its table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "src" / "shoal").rglob("*.py"))


def test_every_module_is_named_and_none_that_does_not_exist() -> None:
    named = re.findall(r"^\| `(shoal/[\w/]+\.py)` \|", PAGE, re.MULTILINE)
    existing = [str(path.relative_to(ROOT / "src")) for path in SOURCES]
    assert named == existing
    for file in re.findall(r"`([\w]+\.(?:h|cpp))`", PAGE):
        assert (ROOT / "src/shoal/engine/native" / file).exists(), file
    for dotted in re.findall(r"`((?:core|checkpoint|engine|serve|bench|sim|plan|cli)\.[a-z_]+)`", PAGE):
        assert (ROOT / "src/shoal" / (dotted.replace(".", "/") + ".py")).exists(), dotted


def imports_of(path: Path) -> set[str]:
    """Modules of shoal that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shoal":
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "shoal"}
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_imports_follow_the_table_of_rings() -> None:
    allowed: dict[str, list[str]] = {}
    for name, cell in re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE):
        allowed[name] = re.findall(r"`(\w+)`", cell)
    assert set(allowed) == {"core", "checkpoint", "engine", "serve", "bench", "sim", "plan", "config", "cli"}
    everything = set(allowed)
    used: dict[str, set[str]] = {name: set() for name in allowed}
    for path in SOURCES:
        package = path.relative_to(ROOT / "src" / "shoal").parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        for module in imports_of(path):
            target = package_of(module)
            if target in everything - {package}:
                used[package].add(target)
                assert package == "cli" or target in allowed[package], f"{path} imports {module}"
    # The table claims no more than the code does: an arrow that nobody uses is not architecture.
    for package, targets in allowed.items():
        assert set(targets) <= used[package], f"{package} does not import all of {targets}"


def test_serve_uses_of_the_engine_only_what_the_page_says() -> None:
    used = set()
    for path in (ROOT / "src/shoal/serve").glob("*.py"):
        used |= {".".join(m.split(".")[:3]) for m in imports_of(path) if m.startswith("shoal.engine.")}
    assert used <= {"shoal.engine.executor", "shoal.engine.child", "shoal.engine.grammar"}, used
