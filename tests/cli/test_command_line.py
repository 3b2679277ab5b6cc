"""The command line itself: help, errors of users, models as numbers, a server from start to SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from shoal import __version__
from shoal.checkpoint.resolve import load_spec
from shoal.cli import main
from shoal.cli.models import fit
from shoal.core.start_report import StartReport
from tests.cli.conftest import SHOAL, run_shoal

COMMANDS = ("serve", "generate", "chat", "pull", "models", "info")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"shoal {command}" in text


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = "".join(capsys.readouterr())
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prove"], "No such command"),
        (["serve"], "name a model"),
        (["serve", "m", "--prot", "1"], "No such option: --prot"),
        (["serve", "m", "--port", "70000"], "65535"),
        (["serve", "m", "--port", "many"], "--port"),
        (["serve", "m", "--dtype", "fp8"], "'fp8' is not one of 'float32', 'bfloat16', 'int8'"),
        (["serve", "m", "--kv-cache-memory", "2G"], "'2G' is not a size: write 2GiB"),
        (["serve", "m", "--threads", "0"], "--threads"),
        (["generate", "m"], "Missing option"),
        (["chat", "m", "--temperature", "-1"], "--temperature"),
        (["info", "m", "n"], "unexpected extra argument"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "--help`" in errors, "it says what to do next"
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull", "smollm2"], "the nearest built-in model is smollm2-135m"),
        (["info", "/etc/hostname"], "is not a .gguf file"),
        (["info", "."], "config.json: is missing"),
        (["serve", "smollm2-135m", "--host", "0.0.0.0"], "--allow-remote"),
        (["serve", "smollm2-135m", "--host", "no.such.host.invalid"], "cannot be resolved"),
        (["serve", "smollm2-135m", "--config", "none.yaml"], "none.yaml: No such file"),
        (["serve", "smollm2-135m", "--record", "no/where"], "no/where: No such file"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_taken_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "smollm2-135m", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on" in capsys.readouterr().err


def test_what_the_engine_refuses_is_said_in_flags(checkpoint: Path) -> None:
    done = run_shoal(["serve", checkpoint, "--port", 0, "--max-model-len", 99999])
    assert (done.returncode, done.stdout) == (1, "")
    assert "--max-model-len is 99999" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_defect_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("shoal.cli.models.print_models", broken)
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([*SHOAL, "models", "--json"], stdout=write, stderr=subprocess.PIPE, text=True) as process:
        os.close(write)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == ""


def test_models(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "shoal pull smollm2-135m" in " ".join(capsys.readouterr().out.split())
    assert main(["models", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["name"], model["path"]) == ("smollm2-135m", None)


def test_pull_prints_the_path(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{checkpoint}\n"


def test_info(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--json", "--max-model-len", "128"]) == 0
    facts = json.loads(capsys.readouterr().out)
    spec = load_spec(checkpoint)
    # Counted from the files themselves, not by the formulas.
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "np") as tensors:
        stored = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert facts["parameters"] == stored == spec.num_parameters()
    assert [row["dtype"] for row in facts["fits"]] == ["float32", "bfloat16", "int8"]
    assert all(row["fits"] and row["sequences"] == row["kv_tokens"] // 128 for row in facts["fits"])
    assert main(["info", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert f"{stored:,}" in text
    assert "sequences of 32,768" in text


def test_fit_is_the_engines_own_rule(checkpoint: Path) -> None:
    spec = load_spec(checkpoint)
    weights, per_token = spec.weight_bytes("float32"), spec.kv_bytes_per_token(4)
    length = 1024
    assert not fit(spec, "m", "float32", length, weights, "cpu").fits
    enough = weights + 10 * length * per_token
    assert fit(spec, "m", "float32", length, enough, "cpu").sequences == 4, "of free memory, a CPU engine takes 40%"
    assert fit(spec, "m", "float32", length, enough, "cuda").sequences == 9, "an accelerator's is its own"
    assert fit(spec, "m", "int8", length, enough, "cuda").kv_bytes_per_token == per_token // 2


def test_serve_until_sigterm(tmp_path: Path, checkpoint: Path) -> None:
    settings, recording = tmp_path / "serve.yaml", tmp_path / "run.msgpack"
    settings.write_text("port: 1\nserved_model_name: tiny\nengine:\n  kv_cache_bytes: 8MiB\n")
    command = [*SHOAL, "serve", str(checkpoint), "--config", str(settings), "--port", "0", "--record", str(recording)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"tiny is served at (http://\S+)/v1", line)
        assert found, line
        with urllib.request.urlopen(f"{found[1]}/v1/models", timeout=30) as response:
            assert [model["id"] for model in json.load(response)["data"]] == ["tiny"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert recording.stat().st_size > 0


def test_the_load_report_accounts_for_the_whole_start(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "start.json"
    command = [*SHOAL, "serve", str(checkpoint), "--port", "0", "--kv-cache-memory", "8MiB", "--api-key", "secret"]
    command += ["--tensor-parallel-size", "2", "--threads", "1", "--load-report", "--load-report-json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        while not any("converted s" in line for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], "the server ended"
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    report = msgspec.json.decode(file.read_bytes(), type=StartReport)
    phases = [(phase.where.split()[0], phase.name) for phase in report.phases]
    assert phases == (
        [("command", "import"), ("command", "resolve")]
        + [("engine", name) for name in ("import", "spawn", "rendezvous")]
        + [("rank", name) for name in ("import", "rendezvous", "open", "read", "convert", "allocate", "warm-up")]
        + [("command", "listen"), ("command", "first token")]
    )
    assert all(phase.seconds >= 0 for phase in report.phases)
    assert 0 <= report.other_seconds < 0.25 * report.total_seconds
    assert [rank.rank for rank in report.ranks] == [0, 1] and all(rank.bytes_read for rank in report.ranks)
    text = "".join(lines) + rest
    assert all(name in text for _, name in phases) and f"{report.total_seconds:.2f}" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    line = {"bash": "COMP_WORDS", "zsh": "_TYPER_COMPLETE_ARGS", "fish": "_TYPER_COMPLETE_ARGS"}[shell]
    environment = os.environ | {"_SHOAL_COMPLETE": f"complete_{shell}", line: "shoal serve smol", "COMP_CWORD": "2"}
    if shell == "fish":
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    done = subprocess.run([sys.executable, "-m", "shoal"], env=environment, capture_output=True, text=True, check=False)
    assert "smollm2-135m" in done.stdout
