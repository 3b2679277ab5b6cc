"""Published models by name: their shapes, how many parameters they are said to have, and in what they are stored.

`models/*.yaml` holds them, each as fields of its config.json, where the engine knows the architecture, or as a
ModelShape. There a count of parameters may be written as a product, [rows, columns], or as a sum of named counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import yaml

from shoal.core.cost.types import WeightPrecision
from shoal.core.model_config import spec_from_config
from shoal.core.model_shape import AttentionShape, ModelShape, shape_of
from shoal.core.model_spec import ModelSpec, UnsupportedModel


class ModelError(ValueError):
    """A model that is not known, or a file that does not describe one."""


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A count by others, to hold the shape against."""

    parameters: int
    source: str
    beside: int = 0
    """Of these, what is no part of the language model: a vision encoder, draft layers, scales of quantised weights."""


class PublishedModel(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    shape: ModelShape
    checkpoints: dict[str, WeightPrecision]
    """Ids on the hub, and what most of their weights are stored in. The first is the original."""
    published: Published
    aliases: tuple[str, ...] = ()

    @property
    def precision(self) -> WeightPrecision:
        """Of the original checkpoint."""
        return next(iter(self.checkpoints.values()))


class LayerKind(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    attention: str
    """full, windowed, latent, sparse or linear, with the size that belongs to it."""
    experts: str
    """Empty for a dense MLP."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What `describe` says, for people and as JSON."""

    name: str
    parameters: int
    active_parameters: int
    published: Published
    kv_bytes_per_token: int
    """In 16 bits, of a token that every layer still sees."""
    max_len: int
    precision: WeightPrecision
    checkpoints: dict[str, WeightPrecision]
    layers: tuple[LayerKind, ...]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model in a file, before its counts are summed."""

    name: str
    checkpoints: dict[str, WeightPrecision]
    published: dict[str, Any]
    config: dict[str, Any] | None = None
    shape: dict[str, Any] | None = None
    aliases: tuple[str, ...] = ()


_VARIANT = re.compile(
    r"(-(instruct|chat|it|base|hf|fp8|fp4|nvfp4|mxfp4|bf16|awq|gptq|int4|int8|w4a16|w8a8|dynamic|gguf|4bit|8bit|v\d))+$"
)
"""Ends of names whose models have the shape of the one without: tuned, or stored in another precision."""


def names() -> list[str]:
    """Of all published models, sorted."""
    return sorted(model.name for model in _catalogue())


def model_shape(name_or_path: str, read: Callable[[Path], ModelSpec] | None = None) -> ModelShape:
    """Shape of a published model (its name, an alias or an id of the hub), or of one in a file.

    A path is of a config.json or its directory, of a YAML in the catalogue's form with one model, or of whatever
    `read` makes a ModelSpec of (GGUF). Raises ModelError.
    """
    path = Path(name_or_path)
    is_path = path.is_file() or (path / "config.json").is_file()
    if is_path or name_or_path.startswith((".", "/", "~")):
        return _shape_of_path(path.expanduser(), read)
    return published_model(name_or_path).shape


def published_model(name: str) -> PublishedModel:
    """Raises ModelError, which names the nearest."""
    index = _index()
    last_part = _key(name.rsplit("/", 1)[-1])
    found = index.get(_key(name)) or index.get(last_part) or index.get(_VARIANT.sub("", last_part))
    if found is None:
        near = get_close_matches(last_part, index, n=3, cutoff=0.5)
        nearest = sorted({index[key].name for key in near})
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ModelError(f"model {name!r} is not known{hint}. A path of its config.json works too")
    return found


def describe(name: str) -> Description:
    """A published model in figures. Raises ModelError."""
    model = published_model(name)
    shape = model.shape
    return Description(
        name=model.name,
        parameters=shape.num_parameters(),
        active_parameters=shape.num_parameters(active=True),
        published=model.published,
        kv_bytes_per_token=int(shape.kv_bytes_per_token(2)),
        max_len=shape.max_len,
        precision=model.precision,
        checkpoints=model.checkpoints,
        layers=tuple(
            LayerKind(
                count=layer.count,
                attention=_attention(layer.attention),
                experts=f"{layer.mlp.num_experts_per_token} of {layer.mlp.num_experts}"
                if layer.mlp.num_experts
                else "",
            )
            for layer in shape.layers
        ),
    )


def _attention(attention: AttentionShape) -> str:
    size = {
        "full": f"{attention.num_kv_heads} of {attention.num_heads} heads keep keys and values",
        "windowed": f"the last {attention.window} tokens",
        "latent": f"{attention.latent_dim} numbers a token",
        "sparse": f"{attention.window} tokens of all",
        "linear": f"a state of {attention.state_elements} numbers",
    }
    return f"{attention.kind}: {size[attention.kind]}"


# --- files ----------------------------------------------------------------------------------------------------------

_COUNTS = ("parameters", "whole", "vectors", "norms", "other_parameters", "state_elements", "beside")


@lru_cache(maxsize=1)
def _catalogue() -> tuple[PublishedModel, ...]:
    directory = files("shoal.plan") / "models"
    paths = sorted((path for path in directory.iterdir() if path.name.endswith(".yaml")), key=lambda path: path.name)
    return tuple(model for path in paths for model in _models(path.read_text(encoding="utf-8"), path.name))


@lru_cache(maxsize=1)
def _index() -> dict[str, PublishedModel]:
    """By every key that a model is found under; a name goes before another model's alias."""
    index: dict[str, PublishedModel] = {}
    for keys in (_names_of, _aliases_of, _last_parts_of):
        for model in _catalogue():
            for key in keys(model):
                index.setdefault(_key(key), model)
    return index


def _names_of(model: PublishedModel) -> tuple[str, ...]:
    return (model.name,)


def _aliases_of(model: PublishedModel) -> tuple[str, ...]:
    return (*model.aliases, *model.checkpoints)


def _last_parts_of(model: PublishedModel) -> tuple[str, ...]:
    return tuple(key.rsplit("/", 1)[-1] for key in _aliases_of(model))


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


def _models(text: str, file: str) -> list[PublishedModel]:
    try:
        # The C parser is absent from some builds of PyYAML; it reads the same, ten times faster.
        document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        entries = msgspec.convert(document, list[_Entry])
    except yaml.YAMLError as error:
        raise ModelError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        raise ModelError(f"{file} does not describe models: {error}") from None
    return [_published(entry, file) for entry in entries]


def _published(entry: _Entry, file: str) -> PublishedModel:
    where = f"{file}, {entry.name}"
    if (entry.config is None) == (entry.shape is None):
        raise ModelError(f"{where}: give one of config and shape")
    try:
        if entry.config is not None:
            shape = shape_of(spec_from_config(entry.config), entry.name)
        else:
            shape = msgspec.convert({"name": entry.name, **_summed(entry.shape)}, ModelShape)
        published = msgspec.convert(_summed(entry.published), Published)
    except (UnsupportedModel, msgspec.ValidationError, TypeError) as error:
        raise ModelError(f"{where}: {error}") from None
    return PublishedModel(
        name=entry.name, shape=shape, checkpoints=entry.checkpoints, published=published, aliases=entry.aliases
    )


def _summed(value: Any) -> Any:
    """The same, with products and sums of counts worked out."""
    if isinstance(value, dict):
        return {key: _count(item) if key in _COUNTS else _summed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_summed(item) for item in value]
    return value


def _count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count(item) for item in value.values())
    if isinstance(value, list):
        return prod(_count(item) for item in value)
    if type(value) is not int:
        raise TypeError(f"{value!r} is no count: an integer, a list of factors, or named counts to add")
    return value


def _shape_of_path(path: Path, read: Callable[[Path], ModelSpec] | None) -> ModelShape:
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ModelError(f"{path} has no config.json")
    if not file.is_file():
        raise ModelError(f"{path} does not exist")
    try:
        if file.suffix == ".json":
            config = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ModelError(f"{file} is no config.json: it holds a {type(config).__name__}, not an object")
            return shape_of(spec_from_config(config), path.stem if path.is_file() else path.resolve().name)
        if file.suffix in (".yaml", ".yml"):
            found = _models(file.read_text(encoding="utf-8"), str(file))
            if len(found) != 1:
                raise ModelError(f"{file} describes {len(found)} models, not one")
            return found[0].shape
        if read is not None:
            return shape_of(read(file), file.stem)
    except UnsupportedModel as error:
        raise ModelError(f"{file}: {error}. Its shape can be given as YAML, as the published ones are") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    raise ModelError(f"{file} is none of config.json, YAML, or a directory with config.json")
