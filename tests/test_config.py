"""The configuration tree: strict keys, units, precedence, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ConfigError, load_config, parse_bytes
from shoal.core.config import EngineConfig
from shoal.core.degradation import DegradationPolicy
from shoal.serve.deployment import Deployment
from shoal.serve.server import ServeConfig


def load(tmp_path: Path, text: str, **flags: object) -> ServeConfig:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return load_config(ServeConfig, file, {"engine.model": "m", **{k.replace("__", "."): v for k, v in flags.items()}})


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("17", 17), ("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000), (" 3 kib ", 3072)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "2G", "-1", "GiB", "1e9", "2 GiB free", "0x10", "٣GiB x"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert "is not a size" in str(error)


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    text = "port: 9000\nhost: localhost\nengine:\n  dtype: int8\n  kv_cache_bytes: 64MiB\nlimits:\n  n: 4\n"
    config = load(tmp_path, text, port=9001, host=None, engine__depth=2)
    assert (config.port, config.host, config.drain_seconds) == (9001, "localhost", 30.0)
    assert (config.engine.dtype, config.engine.kv_cache_bytes, config.engine.depth) == ("int8", 64 << 20, 2)
    assert (config.engine.block_size, config.limits.n) == (16, 4)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing\n") == ServeConfig(engine=EngineConfig(model="m"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 9000", "unknown key prot; the nearest is port"),
        ("dtype: int8", "unknown key dtype; the nearest is engine.dtype"),
        ("engine:\n  max_sequence: 3", "unknown key engine.max_sequence; the nearest is engine.max_sequences"),
        ("qqqq: 1", "unknown key qqqq; the nearest is "),
        ("1: 2", "unknown key 1; the nearest is "),
        ("port: high", "port: expected `int`, got `str`"),
        ("port: yes", "port: expected `int`, got `bool`"),
        ("engine: 3", "engine must be a mapping"),
        ("engine:\n  dtype: fp8", "engine.dtype: invalid enum value 'fp8'"),
        ("engine:\n  kv_cache_bytes: 2G", "engine.kv_cache_bytes: '2G' is not a size"),
        ("port: 1\nport: 2", "port is given twice"),
        ("- port", "must be a mapping of keys"),
        ("a: [", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("? [a, b]\n: 1", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "serve.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_may_stand_for_what_a_mapping_would_describe(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("models:\n- {name: a, fallback: b}\n- {name: b, fallback: {fallback: c, max_wait: 3}}\n- name: c\n")
    first, second, _ = load_config(Deployment, file, {}).models
    assert (first.fallback, second.fallback) == ("b", DegradationPolicy(fallback="c", max_wait=3.0))
    file.write_text("models: [{name: a, endpoints: [there]}]\n")
    with pytest.raises(ConfigError, match=r"models\[0\]\.endpoints\[0\] must be a mapping"):
        load_config(Deployment, file, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(ServeConfig, tmp_path / "none.yaml", {})


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match="missing required field `model`"):
        load_config(EngineConfig, None, {})
