"""The configuration tree, from a YAML file and from flags: typed, strict, with units as people write them.

The tree is the msgspec structs themselves (`ServeConfig`, and `EngineConfig` below it), so a new field is at once a new
key. Precedence, lowest first: the field's default, the file, the flags. An unknown key is an error, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import msgspec

Config = TypeVar("Config", bound=msgspec.Struct)

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


class ConfigError(Exception):
    """A key or value that makes no sense. The message names it and says what would."""


def parse_bytes(text: str) -> int:
    """Bytes of "2GiB", "512 MiB", "1.5GB" or a plain number. Raises ValueError.

    KB, MB, GB, TB are powers of 1000 and KiB, MiB, GiB, TiB of 1024. A bare "G" is refused: it means either.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write 2GiB, 512MiB, 1.5GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def load_config(kind: type[Config], file: Path | None, flags: Mapping[str, Any]) -> Config:
    """A `kind` from `file` (YAML, may be None) and `flags`: dotted keys with values, None where not given.

    Raises ConfigError.
    """
    tree = {} if file is None else _read(file)
    source = "the configuration" if file is None else str(file)
    _check_keys(tree, kind, source, "")
    for key, value in flags.items():
        if value is not None:
            _set(tree, key.split("."), value)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from None


def _read(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice: YAML's own readers keep the last and say nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{file}: {key} is given twice")
            return super().construct_mapping(node, deep)

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of keys to values, not {type(tree).__name__}")
    return tree


def _check_keys(tree: dict[Any, Any], kind: type[msgspec.Struct], source: str, prefix: str) -> None:
    """Every key is a field, or an error with the nearest one. Sizes with units become bytes on the way."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            everywhere = [*fields, *(f"{name}.{inner}" for name, inner in _nested(fields))]
            near = get_close_matches(f"{key}", everywhere, n=1, cutoff=0.5) or get_close_matches(
                f"{prefix}{key}", [f"{prefix}{name}" for name in everywhere], n=1, cutoff=0.0
            )
            raise ConfigError(f"{source}: unknown key {prefix}{key}; the nearest is {prefix}{near[0].strip('.')}")
        inner_kind, is_list = _struct_of(fields[key])
        if inner_kind is not None:
            if is_list and not isinstance(value, list):
                raise ConfigError(f"{source}: {prefix}{key} must be a list, not {value!r}")
            for number, item in enumerate(value if is_list else [value]):
                where = f"{prefix}{key}[{number}]" if is_list else f"{prefix}{key}"
                if item is None and not is_list:
                    continue
                if isinstance(item, str) and str in get_args(fields[key]):
                    continue  # a short form, such as the name of what a mapping would describe
                if not isinstance(item, dict):
                    raise ConfigError(f"{source}: {where} must be a mapping of keys to values, not {item!r}")
                _check_keys(item, inner_kind, source, f"{where}.")
        elif key.endswith("_bytes") and isinstance(value, str):
            try:
                tree[key] = parse_bytes(value)
            except ValueError as error:
                raise ConfigError(f"{source}: {prefix}{key}: {error}") from None


def _struct_of(kind: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """The struct that a field is, or may be, or is a list of; and whether it is a list."""
    is_list = get_origin(kind) is list
    for option in get_args(kind) if is_list or isinstance(kind, UnionType) else (kind,):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return option, is_list
    return None, False


def _nested(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """(section, key) of every key one level down: a key in the wrong section is the commonest mistake."""
    return [
        (name, inner.name)
        for name, kind in fields.items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        for inner in msgspec.structs.fields(kind)
    ]


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for section in path[:-1]:
        tree = tree.setdefault(section, {})
    tree[path[-1]] = value


def _explain(message: str) -> str:
    """msgspec's message with the key first."""
    match = re.fullmatch(r"(.*) - at `\$\.(.*)`", message)
    if match is None:
        return message
    return f"{match[2]}: {match[1][0].lower()}{match[1][1:]}"
