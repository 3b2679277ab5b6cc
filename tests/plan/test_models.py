from __future__ import annotations

import csv
import fnmatch
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.model_config import spec_from_config
from shoal.plan.models import (
    ModelError,
    PublishedModel,
    _catalogue,
    _count,
    describe,
    model_shape,
    names,
    published_model,
)

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SHOAL_DATA", ROOT.parent / "shared")) / "data"
MODELS = {model.name: model for model in _catalogue()}

MUST_SHIP = [
    # fmt: off
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.3-70b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "mistral-7b",
    "deepseek-v3",
    "deepseek-r1",
    "deepseek-v3.1",
    "deepseek-v2-lite",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "gemma-3-1b",
    "gemma-3-4b",
    "gemma-3-12b",
    "gemma-3-27b",
    "minimax-m2.5",
    "qwen3.5-397b-a17b",
    "kimi-k2.5",
    "glm-5",
    "llama-4-scout",
    "llama-4-maverick",
    "bloom-176b",
    # fmt: on
]

# Numbers a token, over all layers, written from the published configurations and not through our shapes.
CACHE = {
    "llama-30b": 60 * 2 * 6656,
    "llama-65b": 80 * 2 * 8192,
    "codellama-70b": 80 * 2 * 8 * 128,
    "yi-34b": 60 * 2 * 8 * 128,
    "gemma-2-9b": 42 * 2 * 8 * 256,
    "gemma-2-27b": 46 * 2 * 16 * 128,
    "falcon-40b": 60 * 2 * 8 * 64,
    "starcoder2-15b": 40 * 2 * 4 * 128,
    "command-r-plus": 64 * 2 * 8 * 128,
    "phi-4": 40 * 2 * 10 * 128,
    "phi-3-mini": 32 * 2 * 3072,
    "llama-2-7b": 32 * 2 * 4096,
    "llama-2-13b": 40 * 2 * 5120,
    "llama-2-70b": 80 * 2 * 8 * 128,
    "codellama-34b": 48 * 2 * 8 * 128,
    "llama-3-8b": 32 * 2 * 8 * 128,
    "llama-3-70b": 80 * 2 * 8 * 128,
    "llama-3.1-8b": 32 * 2 * 8 * 128,
    "llama-3.1-70b": 327_680 // 2,
    "llama-3.1-405b": 516_096 // 2,
    "llama-3.2-1b": 16 * 2 * 8 * 64,
    "llama-3.2-3b": 28 * 2 * 8 * 128,
    "llama-3.3-70b": 327_680 // 2,
    "llama-4-scout": 48 * 2 * 8 * 128,
    "llama-4-maverick": 48 * 2 * 8 * 128,
    "smollm2-135m": 30 * 2 * 3 * 64,
    "smollm2-360m": 32 * 2 * 5 * 64,
    "smollm2-1.7b": 24 * 2 * 32 * 64,
    "mistral-7b-v0.1": 32 * 2 * 8 * 128,
    "mistral-7b": 32 * 2 * 8 * 128,
    "mistral-nemo-12b": 40 * 2 * 8 * 128,
    "mistral-small-24b": 40 * 2 * 8 * 128,
    "mistral-large-123b": 88 * 2 * 8 * 128,
    "mixtral-8x7b": 131_072 // 2,
    "mixtral-8x22b": 56 * 2 * 8 * 128,
    "mixtral-8x22b-instruct": 56 * 2 * 8 * 128,
    "qwen2.5-0.5b": 24 * 2 * 2 * 64,
    "qwen2.5-1.5b": 28 * 2 * 2 * 128,
    "qwen2.5-3b": 36 * 2 * 2 * 128,
    "qwen2.5-7b": 28 * 2 * 4 * 128,
    "qwen2.5-14b": 48 * 2 * 8 * 128,
    "qwen2.5-32b": 64 * 2 * 8 * 128,
    "qwen2.5-72b": 80 * 2 * 8 * 128,
    "qwen3-0.6b": 28 * 2 * 8 * 128,
    "qwen3-1.7b": 28 * 2 * 8 * 128,
    "qwen3-4b": 36 * 2 * 8 * 128,
    "qwen3-8b": 36 * 2 * 8 * 128,
    "qwen3-14b": 40 * 2 * 8 * 128,
    "qwen3-32b": 64 * 2 * 8 * 128,
    "qwen3-30b-a3b": 48 * 2 * 4 * 128,
    "qwen3-30b-a3b-2507": 48 * 2 * 4 * 128,
    "qwen3-235b-a22b": 94 * 2 * 4 * 128,
    "qwen3-235b-a22b-2507": 94 * 2 * 4 * 128,
    "qwen3-coder-480b-a35b": 62 * 2 * 8 * 128,
    "qwen3-next-80b-a3b": 12 * 2 * 2 * 256,
    "qwen3.5-27b": 16 * 2 * 4 * 256,
    "qwen3.5-35b-a3b": 10 * 2 * 2 * 256,
    "qwen3.5-122b-a10b": 12 * 2 * 2 * 256,
    "qwen3.5-397b-a17b": 15 * 2 * 2 * 256,
    "gemma-3-1b": 26 * 2 * 1 * 256,
    "gemma-3-4b": 34 * 2 * 4 * 256,
    "gemma-3-12b": 48 * 2 * 8 * 256,
    "gemma-3-27b": 62 * 2 * 16 * 128,
    "deepseek-v2-lite": 27 * 576,
    "deepseek-v2": 60 * 576,
    "deepseek-v3": 70_272 // 2,
    "deepseek-r1": 61 * 576,
    "deepseek-v3.1": 61 * 576,
    "deepseek-v3.2": 61 * (576 + 128),
    "kimi-k2": 61 * 576,
    "kimi-k2-thinking": 61 * 576,
    "kimi-k2.5": 61 * 576,
    "glm-5": 78 * (576 + 128),
    "glm-4.5": 92 * 2 * 8 * 128,
    "glm-4.6": 92 * 2 * 8 * 128,
    "glm-4.5-air": 46 * 2 * 8 * 128,
    "gpt-oss-20b": 24 * 2 * 8 * 64,
    "gpt-oss-120b": 36 * 2 * 8 * 64,
    "minimax-m2.5": 62 * 2 * 8 * 128,
    "bloom-176b": 70 * 2 * 112 * 128,
    "falcon-180b": 80 * 2 * 8 * 64,
    "gpt-j-6b": 28 * 2 * 16 * 256,
}

# What model cards say, in billions, and how exactly they say it.
ACTIVE = {
    "mixtral-8x7b": (12.88, 0.005),
    "mixtral-8x22b": (39.15, 0.01),
    "qwen3-30b-a3b": (3.35, 0.01),
    "qwen3-235b-a22b": (22.19, 0.01),
    "deepseek-v3": (37.55, 0.01),
    "deepseek-v2": (21.4, 0.05),
    "deepseek-v2-lite": (2.66, 0.01),
    "kimi-k2": (32.9, 0.05),
    "llama-4-scout": (17.2, 0.05),
    "llama-4-maverick": (17.2, 0.05),
    "glm-4.5": (33.6, 0.05),
    "minimax-m2.5": (11.0, 0.05),
}


@pytest.mark.parametrize("name", MUST_SHIP)
def test_the_well_known_models_ship(name: str) -> None:
    assert model_shape(name).name == name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_are_the_published_ones(model: PublishedModel) -> None:
    published = model.published.parameters - model.published.beside
    ours = model.shape.num_parameters()
    assert abs(ours - published) <= 0.001 * published
    # Headers of checkpoints count what we count. The rest: buffers of Kimi's, and a card that counts otherwise.
    if not model.name.startswith("kimi") and model.name != "gpt-j-6b":
        assert ours == published


@pytest.mark.parametrize("name", MODELS)
def test_cache_of_a_token_is_exact(name: str) -> None:
    assert model_shape(name).kv_bytes_per_token(2) == 2 * CACHE[name]


def test_the_two_figures_that_everybody_asks_for() -> None:
    assert model_shape("llama-3.1-70b").kv_bytes_per_token(2) == 327_680
    assert model_shape("deepseek-v3").kv_bytes_per_token(2) == 70_272


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    billions, tolerance = ACTIVE[name]
    assert model_shape(name).num_parameters(active=True) / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)])
def test_active_parameters_as_gpt_oss_counts_them(name: str, billions: float) -> None:
    """Without the embedding, and of biases too only those of the chosen experts (arXiv 2508.10925, table 1)."""
    shape = model_shape(name)
    biases = sum(
        layer.count * 3 * layer.mlp.expert_size * (layer.mlp.num_experts - layer.mlp.num_experts_per_token)
        for layer in shape.layers
    )
    embedding = shape.vocab_size * shape.hidden_size
    assert (shape.num_parameters(active=True) - embedding - biases) / 1e9 == pytest.approx(billions, abs=0.005)


def kinds(name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in model_shape(name).layers:
        found[layer.attention.kind] = found.get(layer.attention.kind, 0) + layer.count
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1-405b", {"full": 126}),
        ("mistral-7b-v0.1", {"windowed": 32}),
        ("mistral-7b", {"full": 32}),
        ("gemma-3-27b", {"windowed": 52, "full": 10}),
        ("gpt-oss-120b", {"windowed": 18, "full": 18}),
        ("llama-4-scout", {"windowed": 36, "full": 12}),
        ("llama-4-maverick", {"windowed": 36, "full": 12}),
        ("deepseek-v3", {"latent": 61}),
        ("kimi-k2.5", {"latent": 61}),
        ("deepseek-v3.2", {"sparse": 61}),
        ("glm-5", {"sparse": 78}),
        ("qwen3.5-397b-a17b", {"linear": 45, "full": 15}),
    ],
)
def test_kinds_of_attention(name: str, expected: dict[str, int]) -> None:
    assert kinds(name) == expected


@pytest.mark.parametrize(
    ("name", "dense", "mixed"),
    [("deepseek-v3", 3, 58), ("kimi-k2", 1, 60), ("llama-4-maverick", 24, 24), ("glm-5", 3, 75), ("qwen3-32b", 64, 0)],
)
def test_layers_with_experts(name: str, dense: int, mixed: int) -> None:
    shape = model_shape(name)
    found = [
        sum(layer.count for layer in shape.layers if bool(layer.mlp.num_experts) is kind) for kind in (False, True)
    ]
    assert found == [dense, mixed]
    assert shape.is_mixture is bool(mixed)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("llama-3.1-70b", "bfloat16"),
        ("deepseek-v3", "float8-block"),
        ("gpt-oss-120b", "float4"),
        ("kimi-k2.5", "int4"),
        ("minimax-m2.5", "float8-block"),
    ],
)
def test_precision_of_the_original_checkpoint(name: str, precision: str) -> None:
    assert published_model(name).precision == precision


def test_a_checkpoint_in_another_precision_is_the_same_model() -> None:
    model = published_model("nvidia/DeepSeek-R1-NVFP4")
    assert model.name == "deepseek-r1"
    assert model.checkpoints["nvidia/DeepSeek-R1-NVFP4"] == "float4"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("LLAMA3.1-70b", "llama-3.1-70b"),
        ("Qwen/Qwen3.5-397B-A17B", "qwen3.5-397b-a17b"),
        ("gpt_oss_20b", "gpt-oss-20b"),
        ("somebody/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("zhipuai/GLM-5", "glm-5"),
        ("bigscience/bloom", "bloom-176b"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "qwen2.5-72b"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen2.5-7b"),
        ("RedHatAI/Meta-Llama-3.1-405B-Instruct-FP8-dynamic", "llama-3.1-405b"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b-instruct"),
    ],
)
def test_many_names_of_one_model(said: str, name: str) -> None:
    assert model_shape(said) == model_shape(name)
    assert model_shape(said).name == name


def test_no_two_models_claim_one_name() -> None:
    claimed: dict[str, str] = {}
    for model in MODELS.values():
        whole = {model.name, *model.aliases, *model.checkpoints}
        for key in whole | {key.rsplit("/", 1)[-1] for key in whole}:
            assert claimed.setdefault(key.lower(), model.name) == model.name, key
    assert len(claimed) > 150


@given(st.sampled_from(sorted(MODELS)), st.randoms(use_true_random=False))
def test_case_does_not_matter(name: str, random: Any) -> None:
    said = "".join(letter.upper() if random.random() < 0.5 else letter for letter in name)
    assert model_shape(said).name == name


def test_names_are_sorted_and_each_can_be_described() -> None:
    assert names() == sorted(MODELS)
    for name in names():
        description = describe(name)
        assert json.loads(msgspec.json.encode(description))["parameters"] == description.parameters
        assert sum(layer.count for layer in description.layers) == model_shape(name).num_layers


def test_a_description() -> None:
    found = describe("deepseek-ai/DeepSeek-V3")
    assert found.active_parameters < found.parameters == 671_026_419_200
    assert found.kv_bytes_per_token == 70_272
    assert [(layer.count, layer.attention, layer.experts) for layer in found.layers] == [
        (3, "latent: 576 numbers a token", ""),
        (58, "latent: 576 numbers a token", "8 of 256"),
    ]


@pytest.mark.parametrize(
    ("said", "nearest"),
    [
        ("llama-3.1-7b", "llama-3.1-70b"),
        ("meta-llama/Llama-3.1-71B", "llama-3.1-70b"),
        ("mixtral-8x8b", "mixtral-8x7b"),
    ],
)
def test_an_unknown_name_gets_the_nearest(said: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"'{said}' is not known; nearest: .*{nearest}"):
        model_shape(said)


def test_a_name_that_is_near_nothing() -> None:
    with pytest.raises(ModelError, match=r"^model 'zzzz' is not known\. A path of its config\.json works too$"):
        model_shape("zzzz")


def test_every_measured_model_is_known() -> None:
    rows = DATA / "e2e_measured.csv"
    if not rows.is_file():
        pytest.skip(f"{rows} is absent")
    with rows.open(newline="", encoding="utf-8") as file:
        found = {row["model"] for row in csv.DictReader(file)}
    assert len(found) > 20
    for name in sorted(found):
        assert model_shape(name).num_layers > 0


# --- files ------------------------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
SHAPE = """
- name: mine
  checkpoints: {me/mine: bfloat16}
  shape:
    hidden_size: 8
    vocab_size: 10
    max_len: 16
    layers:
      - count: 3
        norms: [2, 8]
        attention: {kind: full, num_heads: 2, num_kv_heads: 1, head_dim: 4, parameters: {q: [8, 2, 4], rest: 100}}
        mlp: {intermediate_size: 32}
  published: {parameters: 1, source: myself}
"""


def test_a_directory_with_a_config(tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    shape = model_shape(str(directory))
    assert shape.name == "tiny"
    assert shape.num_parameters() == spec_from_config(CONFIG).num_parameters()
    assert model_shape(str(directory / "config.json")).layers == shape.layers


def test_a_file_in_the_form_of_the_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SHAPE, encoding="utf-8")
    attention = model_shape(str(file)).layers[0].attention
    assert attention.parameters == 8 * 2 * 4 + 100


def test_other_files_are_read_by_whom_the_caller_says(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    shape = model_shape(str(file), read=lambda path: spec_from_config(CONFIG))
    assert (shape.name, shape.num_layers) == ("model", 2)
    with pytest.raises(ModelError, match=r"none of config\.json, YAML"):
        model_shape(str(file))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "holds a list, not an object"),
        ("config.json", '{"architectures": ["LlamaForCausalLLM"]}', "nearest: LlamaForCausalLM"),
        ("config.json", json.dumps({**CONFIG, "hidden_size": "x"}), "wrong kind"),
        ("m.yaml", "- name: [", "is not YAML"),
        ("m.yaml", SHAPE.replace("head_dim", "heads_dim"), "unknown field `heads_dim`"),
        ("m.yaml", SHAPE.replace("rest: 100", "rest: many"), "'many' is no count"),
        ("m.yaml", SHAPE.replace("bfloat16", "float7"), "float7"),
        ("m.yaml", SHAPE + SHAPE, "describes 2 models, not one"),
        ("m.yaml", SHAPE.replace("  shape:", "  config: {}\n  shape:"), "give one of config and shape"),
    ],
)
def test_files_that_do_not_describe_a_model(tmp_path: Path, file: str, text: str, message: str) -> None:
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        model_shape(str(path))


def test_a_directory_without_a_config_does_not_hide_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-oss-20b").mkdir()
    assert model_shape("gpt-oss-20b").num_layers == 24
    (tmp_path / "gpt-oss-20b" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert model_shape("gpt-oss-20b").num_layers == 2


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        model_shape(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_shape(str(tmp_path))


@given(
    st.recursive(st.integers(0, 100), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9)
)
def test_counts_add_in_mappings_and_multiply_in_lists(value: Any) -> None:
    assert _count({"all": value}) == _count(value) == _count([value, 1])
    assert _count({"a": value, "b": value}) == _count([2, value])


def test_the_wheel_has_the_catalogue() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = patterns["tool"]["setuptools"]["package-data"]["shoal.plan"]
    plan = ROOT / "src" / "shoal" / "plan"
    for file in sorted(plan.glob("models/*")):
        assert any(fnmatch.fnmatch(str(file.relative_to(plan)), pattern) for pattern in patterns), file
