"""docs/planning.md against the code: every command on it runs, its figures are computed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.config import load_config
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape, StepShape
from shoal.core.layout import Layout
from shoal.plan.catalogue import cluster
from shoal.plan.models import model_shape
from shoal.plan.setups import per_million
from shoal.serve.deployment import Deployment, check

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]
IMPOSSIBLE = ("llama-3.1-405b --on 8xH100", "--itl-p99 5ms")


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("shoal serve")])
def test_every_command_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{number * 0.4},{400 + 3 * number},{50 + number}\n" for number in range(200))
    Path("requests.csv").write_text("arrival,input_tokens,output_tokens\n" + rows)
    if line.startswith("shoal export"):
        (written,) = [other for other in COMMANDS if "--write" in other]
        assert main(shlex.split(written)[1:]) == 0
        capsys.readouterr()
    status = main(shlex.split(line)[1:])
    said = capsys.readouterr()
    assert status == (1 if any(part in line for part in IMPOSSIBLE) else 0), said.err
    assert said.out or "--output" in line
    if "--write" in line:
        check(load_config(Deployment, Path("deployment.yaml"), {}))
        assert Path("plan.html").read_text().startswith("<!doctype html>")


def test_the_file_that_is_written_is_the_one_that_is_served() -> None:
    assert [line for line in COMMANDS if line.startswith("shoal serve")] == ["shoal serve --deployment deployment.yaml"]
    assert any("--write deployment.yaml" in line for line in COMMANDS)


def test_the_answer_of_the_page_is_the_one_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(COMMANDS[0])[1:])
    out = capsys.readouterr().out
    (answer,) = re.findall(r"^Answer\n  (.*)$", PAGE, re.MULTILINE)
    assert answer in out
    assert "Do not disaggregate" in out


def test_what_the_readme_shows_is_what_its_command_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ((command, shown),) = re.findall(r"```bash\n(shoal plan .*)\n```\n\n```\n(.*?)```", readme, re.DOTALL)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(shlex.split(command)[1:]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines():
        wanted = " ".join(line.split()).removesuffix(" ...")
        assert any(one.startswith(wanted) for one in said), line


ROWS = re.findall(r"^\| `(\S+)` (\w+) \|(.*)\|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[2].split('|')[0].strip()}")
def test_the_cost_table_is_computed(row: tuple[str, str, str]) -> None:
    """Bounds to the last digit shown; predictions as far as a better cost model may move them."""
    on, weights, cells = row
    price, said, said_cost, most, least_cost, predicted, predicted_cost = (
        float(cell.replace(",", "")) for cell in cells.split("|")
    )
    assert said_cost == pytest.approx(per_million(price, said), abs=0.005), "their division holds"
    devices = cluster(on)
    engine = EngineShape(
        model=model_shape("llama-3.1-70b"),
        cluster=devices,
        layout=Layout(tp=devices.num_devices),
        weights=weights,  # type: ignore[arg-type]
        profile="vllm",
        max_batch_tokens=2048,
    )
    cost = CostModel(engine)
    bound = 16 * devices.device.memory_bandwidth / cost.memory().weights
    assert most == pytest.approx(bound, abs=0.51) and said > 2.3 * bound
    assert least_cost == pytest.approx(per_million(price, bound), abs=0.006)
    found = 16 / cost.step(StepShape(decode_rows=16, decode_context=16_000, sampled=16)).seconds
    assert predicted == pytest.approx(found, rel=0.15)
    assert predicted_cost == pytest.approx(per_million(price, found), rel=0.15)
    held = cost.memory().cache / (1000 * cost.memory().bytes_per_token)
    assert (held < 16) == (on == "H100"), "what the page says of KV"
    assert held > 100 or on != "MI300X"


def test_the_table_has_four_setups() -> None:
    assert len(ROWS) == 4
