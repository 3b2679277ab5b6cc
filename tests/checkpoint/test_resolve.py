"""From MODEL to files, and from files to a ModelSpec; every refusal names what was wrong."""

import json

import numpy as np
import pytest

from shoal.checkpoint.errors import CheckpointError, ModelNotFound
from shoal.checkpoint.resolve import load_spec, resolve
from tests.checkpoint.gguf_files import llama_metadata, write_gguf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


def test_a_directory_and_a_gguf_file(checkpoint, tmp_path, monkeypatch):
    assert resolve(str(checkpoint)).path == checkpoint.resolve()
    assert resolve(str(checkpoint)).name == "my-model"
    monkeypatch.chdir(tmp_path)
    assert resolve("my-model").path == checkpoint.resolve()
    file = write_gguf(tmp_path / "weights.Q8_0.gguf")
    assert resolve("weights.Q8_0.gguf").path == file.resolve()
    assert resolve(str(file)).name == "weights.Q8_0"


def test_a_built_in_name(smollm2):
    files = resolve("smollm2-135m", download=False)
    assert (files.name, files.path) == ("smollm2-135m", smollm2)
    spec = load_spec(files.path)
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.vocab_size) == ("llama", 30, 576, 49152)
    assert spec.tied_embeddings
    assert spec.num_parameters() == 134_515_008


def test_a_built_in_name_that_was_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelNotFound, match="shoal pull smollm2-135m"):
        resolve("smollm2-135m", download=False)


@pytest.mark.parametrize("name", ["smolm2", "", "/no/such/place", "a/b/c", "no such\nthing", "model.gguf"])
def test_names_that_are_nothing(name):
    with pytest.raises(ModelNotFound, match="nearest built-in model is smollm2-135m"):
        resolve(name)


def test_a_hub_id_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"(?s)acme/smollm2: not in the local hub cache.*such as smollm2-135m"):
        resolve("acme/smollm2", download=False)


def test_files_that_are_no_model(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a \.gguf file; give the directory"):
        (checkpoint / "model.safetensors").write_bytes(b"")
        resolve(str(checkpoint / "model.safetensors"))
    folder = tmp_path / "ggufs"
    folder.mkdir()
    write_gguf(folder / "a.gguf")
    with pytest.raises(CheckpointError, match=r"give the file itself, such as .*a\.gguf"):
        resolve(str(folder))


def test_spec_of_a_directory(checkpoint):
    spec = load_spec(checkpoint)
    assert (spec.family, spec.num_layers, spec.num_kv_heads) == ("llama", 2, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"config\.json: is missing"),
        ("{", r"config\.json: is not valid JSON"),
        ("[1]", r"config\.json: is not valid JSON"),
        (json.dumps(LLAMA | {"architectures": ["BertModel"], "model_type": "bert"}), "(?i)bert"),
        (json.dumps(LLAMA | {"hidden_size": "wide"}), "my-model"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}), "num_hidden_layers"),
    ],
)
def test_bad_configurations_are_named(checkpoint, content, reason):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_spec(checkpoint)


def test_spec_of_a_gguf_file_takes_what_only_tensors_tell(tmp_path):
    tensors = {
        "token_embd.weight": np.zeros((40, 64), np.float32),
        "rope_freqs.weight": np.array([1, 1, 3, 8, 8, 8, 8, 8], np.float32),
    }
    tied = load_spec(write_gguf(tmp_path / "a.gguf", llama_metadata(), tensors))
    assert (tied.vocab_size, tied.tied_embeddings, tied.qkv_bias) == (40, True, False)
    assert (tied.rope.kind, tied.rope.factor) == ("llama3", 8.0)
    more = {
        "token_embd.weight": tensors["token_embd.weight"],
        "output.weight": tensors["token_embd.weight"],
        "blk.0.attn_q.bias": np.zeros(64, np.float32),
    }
    untied = load_spec(write_gguf(tmp_path / "b.gguf", llama_metadata(), more))
    assert (untied.tied_embeddings, untied.qkv_bias, untied.rope.kind) == (False, True, "default")


def test_bad_gguf_files_are_named(tmp_path):
    embedding = {"token_embd.weight": np.zeros((40, 64), np.float32)}
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        load_spec(write_gguf(tmp_path / "a.gguf", llama_metadata()))
    with pytest.raises(CheckpointError, match=r"b\.gguf: .*'mamba' is not supported"):
        load_spec(write_gguf(tmp_path / "b.gguf", {}, embedding, arch="mamba"))
    lacking = llama_metadata()
    del lacking["llama.block_count"]
    with pytest.raises(CheckpointError, match=r"c\.gguf: .*llama\.block_count"):
        load_spec(write_gguf(tmp_path / "c.gguf", lacking, embedding))


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_fetched_from_a_hub_where_they_are_needed(monkeypatch, tmp_path, weights):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **how: asked.append(how) or str(tmp_path))
    assert resolve("acme/smollm2", weights=weights).path == tmp_path
    patterns = asked[0]["allow_patterns"]
    assert "*.json" in patterns and any("safetensors" in pattern for pattern in patterns) == weights
