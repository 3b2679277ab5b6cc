"""README and docs against the code: commands parse, examples decode, links lead somewhere, tables name what exists.

Fences marked `bash` hold commands that a reader may copy, those marked `python` programs, `yaml` settings, `json`
lines of requests. A fence without a mark is a transcript and is not checked.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer

from shoal.cli.app import ENGINE_FLAGS, app
from shoal.cli.batch import ChatLine, CompletionLine
from shoal.config import load_config
from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.plan.catalogue import cluster
from shoal.plan.hardware_file import read_hardware
from shoal.serve.access import ROUTES, RouteTable
from shoal.serve.deployment import Deployment, ModelDeployment, check
from shoal.serve.protocol import ChatRequest, CompletionRequest, Limits, TokenizeRequest, decode
from shoal.serve.server import ServeConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").glob("*.md"))
BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
}


def fences(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        found = re.findall(
            rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        for indent, text in found:
            yield page, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command, pipes taken apart."""
    found = []
    for page, text in fences("bash"):
        pending = ""
        for line in text.splitlines():
            if line.endswith("\\"):
                pending += line[:-1]
                continue
            pending += line + "\n"
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quote is still open: the command has further lines
                continue
            pending = ""
            while words:
                end = words.index("|") if "|" in words else len(words)
                found.append((page.name, words[:end]))
                words = words[end + 1 :]
        assert not pending, f"{page.name}: {pending} does not end"
    return found


COMMANDS = commands()


def of_program(name: str) -> list[Any]:
    return [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page, words in COMMANDS if words[0] == name]


def test_the_fences_were_read() -> None:
    """The checks below are of something."""
    programs = [words[0] for _, words in COMMANDS]
    assert programs.count("shoal") >= 10
    assert programs.count("curl") >= 4
    assert set(programs) <= {"shoal", "curl", "echo", "make", "python", "pip", "cd", "git"}


@pytest.mark.parametrize("words", of_program("shoal"))
def test_shoal_commands_parse(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command, rest = group.commands[words[1]], words[2:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(words[1], rest)  # raises where the line makes no sense
    assert context.params


def test_a_wrong_command_would_not_parse() -> None:
    with pytest.raises(typer.BadParameter.__mro__[1], match="No such option"):  # type: ignore[arg-type]
        test_shoal_commands_parse(["shoal", "serve", "m", "--max-length", "3"])


@pytest.mark.parametrize("words", of_program("curl"))
def test_curl_commands_reach_a_route_with_a_body_it_takes(words: list[str]) -> None:
    (url,) = [word for word in words if word.startswith("http")]
    path = re.sub(r"^http://[^/]+", "", url)
    assert ("POST" if "-d" in words else "GET") in (RouteTable(ROUTES).find(path) or {})
    if "-d" in words:
        decode(words[words.index("-d") + 1].encode(), BODIES[path], Limits())


def make_targets() -> list[str]:
    return re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_make_targets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", text, re.MULTILINE):
        assert target in make_targets()
    for command in re.findall(r"`shoal ([a-z]+)", text):
        assert command in typer.main.get_command(app).commands, command  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [pytest.param(text, id=page.name) for page, text in fences("python")])
def test_python_examples_are_programs(text: str) -> None:
    tree = ast.parse(text)
    assert any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body), "it runs as it stands"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("chat.completions.create"):
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            decode(msgspec.json.encode(arguments), ChatRequest, Limits())


@pytest.mark.parametrize("text", [pytest.param(text, id=page.name) for page, text in fences("yaml")])
def test_settings_load(text: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text, encoding="utf-8")
    if re.search(r"^devices:", text, re.MULTILINE):
        assert read_hardware(file).devices
    elif re.search(r"^nodes:", text, re.MULTILINE):
        assert cluster(str(file)).num_devices
    elif re.search(r"^models:", text, re.MULTILINE):
        check(load_config(Deployment, file, {}))
    else:
        assert load_config(ServeConfig, file, {"engine.model": "m"})


@pytest.mark.parametrize("text", [pytest.param(text, id=page.name) for page, text in fences("json")])
def test_request_lines_decode(text: str) -> None:
    for line in text.splitlines():
        decode(line.encode(), ChatLine if '"messages"' in line else CompletionLine, Limits())


def test_the_table_of_settings_has_every_engine_flag() -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--([a-z-]+)` \| `engine\.([\w.]+)` \|", page, re.MULTILINE)
    flags = {flag.removeprefix("no-").replace("-", "_"): key for flag, key in rows}
    assert flags == {flag: key for flag, key in ENGINE_FLAGS.items() if flag != "model"}
    known = set(EngineConfig.__struct_fields__)
    known |= {f"layout.{name}" for name in Layout.__struct_fields__}
    known |= {f"launch.{name}" for name in LaunchConfig.__struct_fields__}
    assert set(flags.values()) <= known


# --- docs/fleet.md ---------------------------------------------------------------------------------------------------

FLEET = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[tuple[str, str]]:
    """(key, default) of the table below a heading of fleet.md."""
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", FLEET, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)


def shown(field: msgspec.structs.FieldInfo) -> str:
    """A default as the tables write it."""
    if field.required:
        return "needed"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "below"
    if value is None or value in ("", (), [], {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, tuple)):
        return ", ".join(f"`{one}`" for one in ([value] if isinstance(value, str) else value))
    if field.name.endswith("bytes"):
        power = next((power for power in (3, 2, 1) if value % 1024**power == 0), 0)
        return f"{value // 1024**power} {('', 'KiB', 'MiB', 'GiB')[power]}".strip()
    return f"{value:g}" if isinstance(value, float) else str(value)


def structs_in(kind: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for inner in get_args(kind):
        yield from structs_in(inner)


def sections(
    kind: type[msgspec.Struct], heading: str, prefix: str
) -> Iterator[tuple[str, list[msgspec.structs.FieldInfo]]]:
    """Every mapping of the file below this one: the heading of its table, and its keys."""
    fields = list(msgspec.structs.fields(kind))
    if kind is ModelDeployment:  # what it has from its engines is in serve.md
        fields = [
            field for field in fields if field.name == "model" or field.name not in EngineConfig.__struct_fields__
        ]
    yield heading, fields
    for field in fields:
        for inner in structs_in(field.type):
            path = f"{prefix}{field.name}"
            yield from sections(inner, f"`{path}`", f"{path}[]." if inner is ModelDeployment else f"{path}.")


SECTIONS = {
    heading: fields
    for heading, fields in sections(Deployment, "The file", "")
    # An endpoint's is the listener's: one table does for both.
    if heading != "`models[].endpoints.tls`"
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_deployment_file_is_documented_in_full(heading: str) -> None:
    wanted = {field.name: shown(field) for field in SECTIONS[heading]}
    if heading == "`models`":
        wanted["model"] = "`name`"  # which no type can say
    assert dict(rows_of(heading)) == wanted


def test_the_sections_were_found() -> None:
    assert {"The file", "`models`", "`models[].endpoints`", "`models[].fallback`", "`tls`", "`tenants`"} <= set(
        SECTIONS
    )
    assert [key for key, _ in rows_of("The file")][-1] == "models"


def test_the_table_of_routes_is_the_one_that_is_enforced() -> None:
    rows = re.findall(r"^\| `(GET|POST|DELETE) (/\S*)` \| (.*?) \|", FLEET, re.MULTILINE)
    found = {(method, path): tuple(re.findall(r"`(\w+)`", cell)) for method, path, cell in rows}
    assert found == ROUTES


def test_the_fleet_of_the_example_loads(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    (text,) = re.findall(
        r'^FLEET = f"""\\\n(.*?)"""', (ROOT / "examples" / "failover.py").read_text(), re.MULTILINE | re.DOTALL
    )
    file.write_text(text.replace("{MODEL}", "m"), encoding="utf-8")
    check(load_config(Deployment, file, {}))


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = [
        re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in re.findall(r"^##+ (.*)", FLEET, re.MULTILINE)
    ]
    anchors = {f"{name}-{n}" if n else name for at, name in enumerate(headings) for n in [headings[:at].count(name)]}
    assert set(re.findall(r"\]\(#([^)]+)\)", FLEET)) <= anchors


def test_the_index_has_every_decision() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))
