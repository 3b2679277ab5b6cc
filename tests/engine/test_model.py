"""The Decoder against transformers on the same checkpoint, for every family and every arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint.errors import CheckpointError
from shoal.core.model_config import spec_from_config
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.model import Decoder
from shoal.engine.ops import TorchOps
from shoal.engine.weights import open_weights
from tests.checkpoints import FAMILIES, VOCAB, make_checkpoint
from tests.engine.paged import PagedRun

CPU = torch.device("cpu")


def arithmetic(name: str) -> tuple[Any, Any]:
    if name == "torch":
        return TorchOps(CPU), PortableAttention()
    native_ops = pytest.importorskip("shoal.engine.native_ops")
    native_attention = pytest.importorskip("shoal.engine.attention.native")
    if native_ops.unavailable_reason() is not None:
        pytest.skip(native_ops.unavailable_reason())
    ops = native_ops.NativeOps(threads=2)
    return ops, native_attention.NativeAttention(ops)


def load(path: Path, name: str = "torch", precision: Any = "float32") -> Decoder:
    ops, attention = arithmetic(name)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    if spec.mla is not None:
        attention = PortableAttention()  # no kernels attend to latents
    decoder = Decoder(spec, ops, attention, precision, device=CPU)
    source = open_weights(path)
    decoder.load(source)
    source.close()
    return decoder


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def reference_logits(path: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["torch", "native"])
def test_logits_equal_those_of_transformers_however_the_tokens_are_cut(checkpoint: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in (70, 33, 90)]
    expected = reference_logits(checkpoint, prompts)
    run = PagedRun(load(checkpoint, name), len(prompts))
    parts: list[list[torch.Tensor]] = [[], [], []]
    at = [0, 0, 0]
    # Whole prompts, chunks beside decodes, single tokens: what a step may hold.
    for sizes in [(20, 1, 64), (1, 7, 1), (48, 1, 1), (0, 16, 16), (1, 1, 1), (0, 7, 7)]:
        fed = {i: prompts[i][at[i] : at[i] + n] for i, n in enumerate(sizes) if n}
        for i, logits in run.extend(fed).items():
            parts[i].append(logits)
            at[i] += len(fed[i])
    for i, prompt in enumerate(prompts):
        assert at[i] == len(prompt)
        torch.testing.assert_close(torch.cat(parts[i]), expected[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.05), ("int8", 0.08)])
def test_lower_precisions_stay_close(tmp_path: Path, name: str, precision: str, bound: float) -> None:
    path = make_checkpoint("llama", tmp_path)
    prompt = torch.randint(5, VOCAB, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    (expected,) = reference_logits(path, [prompt])
    logits = PagedRun(load(path, name, precision), 1).extend({0: prompt})[0]
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < bound


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())

    def refused(**changes: Any) -> str:
        (path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError) as caught:
            load(path)
        return str(caught.value)

    assert "model.layers.3" in refused(num_hidden_layers=4)
    assert "(96, 64)" in refused(intermediate_size=80)
    assert "lm_head.weight is missing" in refused(tie_word_embeddings=False)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    """A bias that is left out computes another model without a word."""
    path = make_checkpoint("qwen2", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"no place for tensor model\.layers\.\d\.self_attn\.[qkv]_proj\.bias"):
        load(path)


def test_quantised_checkpoints_are_refused_as_such(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_checkpoint("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj."
    del tensors[name + "weight"]
    save_file(tensors | {name + "qweight": torch.zeros(8, 64, dtype=torch.int32)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight is missing: .* quantised"):
        load(path)


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3_plain"])
def test_progress_counts_every_byte_and_loading_again_replaces(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    decoder = load(path)
    size, layers = decoder.num_weight_bytes, len(decoder.layers)
    seen: list[tuple[int, int]] = []
    source = open_weights(path)
    figures = decoder.load(source, lambda *counts: seen.append(counts))
    stored = 4 * decoder.spec.num_parameters()
    assert seen == sorted(seen) and seen[-1] == (stored, stored) and figures.bytes_read == stored
    assert (decoder.num_weight_bytes, len(decoder.layers)) == (size, layers)
    assert size == 4 * decoder.spec.num_parameters()


def test_multimodal_names_and_configuration_give_the_same_text_model(tmp_path: Path) -> None:
    """Gemma 3 of 4B and more: the text model is a part of the file, its configuration a part of config.json."""
    from safetensors.torch import load_file, save_file

    path = make_checkpoint("gemma3_text", tmp_path)
    prompt = list(range(5, 45))
    expected = PagedRun(load(path), 1).extend({0: prompt})[0]
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "eos_token_id": 1}
    (path / "config.json").write_text(json.dumps(outer))
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        vision = {"vision_tower.embeddings.position_ids": torch.arange(4)}
        save_file(renamed | vision, path / "model.safetensors")
        assert torch.equal(PagedRun(load(path), 1).extend({0: prompt})[0], expected)
