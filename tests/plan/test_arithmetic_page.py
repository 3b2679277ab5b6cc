"""docs/arithmetic.md against the shipped models and devices: every figure is computed here, or derived on the page.

Three rules. Each equation (an indented line `label: expression = result`) is evaluated, and where its label names a
model or a device its result is what the shipped data give. Each cell of a table with figures is computed. Any other
figure in the text is one that an equation or a table has, or is on the short list of quoted ones.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from math import exp, log
from pathlib import Path

import pytest

from shoal.core.model_shape import AttentionShape, ModelShape
from shoal.plan import catalogue
from shoal.plan.models import model_shape, published_model

PAGE = (Path(__file__).parents[2] / "docs" / "arithmetic.md").read_text(encoding="utf-8")

# --- what the shipped data give ---------------------------------------------------------------------------------------


def cache_bytes(shape: ModelShape, tokens: int) -> float:
    """Of a sequence, in 16 bits, windows counted as far as they reach."""
    return sum(
        2 * layer.count * layer.attention.cache_elements() * min(tokens, windows(layer.attention) or tokens)
        for layer in shape.layers
    )


def windows(attention: AttentionShape) -> int | None:
    return attention.window if attention.kind == "windowed" else None


def every_head(shape: ModelShape) -> float:
    """The mistake: keys and values of a token for each query head."""
    return sum(
        2 * layer.count * layer.attention.num_heads * (layer.attention.head_dim + value_dim(layer.attention))
        for layer in shape.layers
        if layer.attention.kind != "linear"
    )


def value_dim(attention: AttentionShape) -> int:
    return attention.value_dim or attention.head_dim


def cache_of_rank(shape: ModelShape, ranks: int) -> float:
    total = 0.0
    for layer in shape.layers:
        heads = 1 if layer.attention.latent_dim else layer.attention.num_kv_heads
        total += 2 * layer.count * layer.attention.cache_elements() / min(ranks, heads)
    return total


def reduced(shape: ModelShape) -> int:
    """Bytes of a layer and token: behind attention and behind the MLP, in 16 bits."""
    return 2 * shape.hidden_size * 2


def matrices(shape: ModelShape) -> float:
    """Of the layers, that a token meets."""
    return sum(
        layer.count
        * (layer.attention.parameters + layer.mlp.parameters(shape.hidden_size, layer.mlp.num_experts_per_token))
        for layer in shape.layers
    )


def attended(shape: ModelShape, positions: float) -> float:
    """Operations of a token's attention to so many positions; for models of full attention."""
    return sum(
        4 * layer.count * layer.attention.num_heads * layer.attention.head_dim * positions for layer in shape.layers
    )


def operations(shape: ModelShape, context: int) -> float:
    """Of a token behind so many others; itself it attends to for free when there are none."""
    head = shape.vocab_size * shape.hidden_size
    return 2 * (matrices(shape) + head) + attended(shape, context + 1 if context else 0)


def experts_read(shape: ModelShape, tokens: int) -> float:
    mlp = shape.layers[-1].mlp
    return mlp.num_experts * (1 - (1 - mlp.num_experts_per_token / mlp.num_experts) ** tokens)


def expert_bytes(shape: ModelShape, experts: float) -> float:
    """Of so many experts of each layer, in 16 bits."""
    return sum(2 * layer.count * experts * 3 * shape.hidden_size * layer.mlp.expert_size for layer in shape.layers)


def streamed(shape: ModelShape) -> int:
    """Parameters that a decode step reads, the embedding left out."""
    return shape.num_parameters() - shape.vocab_size * shape.hidden_size


def all_reduce_seconds(ranks: int, size: int) -> float:
    """Of the shipped measurements, log-log between two points."""
    points = catalogue.link("nvlink4").all_reduce[ranks]
    (b0, s0), (b1, s1) = next((a, b) for a, b in zip(points, points[1:], strict=False) if a[0] <= size <= b[0])
    return exp(log(s0) + (log(s1) - log(s0)) * (log(size) - log(b0)) / (log(b1) - log(b0)))


Cell = Callable[[ModelShape], float]
ROWS_ARE_MODELS: dict[str, tuple[Cell, ...]] = {
    "parameters of": (
        lambda shape: shape.num_parameters(),
        lambda shape: shape.num_parameters(active=True),
        lambda shape: published_model(shape.name).published.parameters - published_model(shape.name).published.beside,
    ),
    "KV cache of": (
        lambda shape: shape.kv_bytes_per_token(2),
        every_head,
        lambda shape: every_head(shape) / shape.kv_bytes_per_token(2),
        lambda shape: cache_bytes(shape, 131_072),
    ),
    "all-reduce of": (
        reduced,
        lambda shape: shape.num_layers * reduced(shape),
        lambda shape: shape.num_layers * reduced(shape) * 2 * 7 / 8,
    ),
}
COLUMNS_ARE_MODELS: dict[str, Callable[[ModelShape, int], float]] = {
    "tp": cache_of_rank,
    "operations of a token behind": operations,
    "attention in a prompt of": lambda shape, tokens: attended(shape, tokens / 2) / (2 * matrices(shape)),
    "experts that are read by": experts_read,
}

L70, V3, MIXTRAL = (model_shape(name) for name in ("llama-3.1-70b", "deepseek-v3", "mixtral-8x7b"))
SHAPES = (L70, V3, MIXTRAL, *map(model_shape, ("llama-3.1-405b", "qwen3.5-397b-a17b")))
H100, H200 = catalogue.device("h100"), catalogue.device("h200")
NVLINK, NDR = catalogue.link("nvlink4"), catalogue.link("ndr")
DRAFT = published_model("deepseek-v3").published.beside - 41_540_496 - 2 * V3.vocab_size * V3.hidden_size
RING_BYTES = 80 * reduced(L70) * 2 * 7 / 8
WAITS = 2 * L70.num_layers * all_reduce_seconds(8, 16_384)
STREAM = streamed(L70) / 8 / H100.memory_bandwidth

EQUATIONS: dict[str, float | None] = {
    # None: plain arithmetic with figures that others claim.
    "Attention of a layer, Llama-3.1-70B": L70.layers[0].attention.parameters,
    "MLP of a layer, Llama-3.1-70B": L70.layers[0].mlp.parameters(L70.hidden_size),
    "Model, Llama-3.1-70B": L70.num_parameters(),
    "Bytes in 16 bits, Llama-3.1-70B": 2 * L70.num_parameters(),
    "Draft layer and its embeddings, DeepSeek-V3": published_model("deepseek-v3").published.beside - 41_540_496,
    "Checkpoint, DeepSeek-V3": published_model("deepseek-v3").published.parameters,
    "Token, Llama-3.1-70B": L70.kv_bytes_per_token(2),
    "Token, Llama-3.1-405B": model_shape("llama-3.1-405b").kv_bytes_per_token(2),
    "Token, DeepSeek-V3": V3.kv_bytes_per_token(2),
    "States of a sequence, Qwen3.5-397B-A17B": 4
    * sum(layer.count * layer.attention.state_elements for layer in model_shape("qwen3.5-397b-a17b").layers),
    "Said, 64 heads": None,
    "True, 8 heads with keys and values": cache_bytes(L70, 128_000),
    "True, 128k as a power of two": cache_bytes(L70, 131_072),
    "Of a layer and token, Llama-3.1-70B": reduced(L70),
    "Of a token, Llama-3.1-70B": L70.num_layers * reduced(L70),
    "Each GPU sends at tp 8, Llama-3.1-70B": RING_BYTES,
    "Said": None,
    "Times too much": 8e9 / reduced(L70),
    "Bytes over NVLink 4": RING_BYTES / NVLINK.bandwidth,
    "Bytes over NDR": RING_BYTES / NDR.bandwidth,
    "Waits of a token, Llama-3.1-70B": 2 * L70.num_layers,
    "Waits over NVLink 4, 8 GPUs": WAITS,
    "Waits over NDR, at the least": 2 * L70.num_layers * NDR.latency,
    "Prefill of 8,192 tokens, one all-reduce, Llama-3.1-70B": 8_192 * reduced(L70) / 2,
    "Matrices, Llama-3.1-70B": operations(L70, 0),
    "Attention at 8,192 tokens, Llama-3.1-70B": attended(L70, 8_192),
    "16 bits, one rank of 8 H100, Llama-3.1-70B": 2 * STREAM,
    "8 bits, the same": STREAM,
    "Said, by the bandwidth alone": 1 / STREAM,
    "With 0.8 of the bandwidth and the waits": STREAM / 0.8 + WAITS,
    "Experts read by 8 tokens, Mixtral-8x7B": experts_read(MIXTRAL, 8),
    "Bytes of them in 16 bits, Mixtral-8x7B": expert_bytes(MIXTRAL, experts_read(MIXTRAL, 8)),
    "Bytes of all experts in 16 bits, Mixtral-8x7B": expert_bytes(MIXTRAL, 8),
    "Dispatch of a token and layer, DeepSeek-V3": 8 * V3.hidden_size * (1 + 4 / 128),
    "Combine of a token and layer, DeepSeek-V3": 8 * V3.hidden_size * 2,
    "Experts read by 32 tokens, DeepSeek-V3": experts_read(V3, 32),
    "Cache of a layer and token, DeepSeek-V3": V3.kv_bytes_per_token(2) / V3.num_layers,
    "Operations of a decode token on it, all heads": 2
    * V3.layers[0].attention.num_heads
    * (2 * V3.layers[0].attention.latent_dim - V3.layers[0].attention.rope_dim),
    "Operations a byte": 128 * (576 + 512) * 2 / 1152,
    "H100": H100.rates["bfloat16"] / H100.memory_bandwidth,
    "H200": H200.rates["bfloat16"] / H200.memory_bandwidth,
    "Memory that a program sees, H100": H100.memory_bytes,
    "Dense, H100 FP8": H100.rates["float8"],
    "All tokens by output": None,
}

QUOTED = {
    # Measured or said by others, with the words around them in the text.
    "37": "billion, DeepSeek-V3's card",
    "459": "GB/s of bus bandwidth, NCCL's tables",
    "900": "GB/s, both directions",
    "6.5": "ms measured, vLLM",
    "167": "GB said",
    "1.1": "times, SGLang with FP8 KV on H200, aiconfigurator's tables",
    "1.45": "times, vLLM, the same",
    "400": "Gbit/s of NDR",
    "6": "operations a parameter in training",
}

# --- reading the page -------------------------------------------------------------------------------------------------

UNITS = {
    "": 1.0,
    "B": 1.0,
    "bytes": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "s": 1.0,
    "ms": 1e-3,
    "µs": 1e-6,
    "GB/s": 1e9,
    "TB/s": 1e12,
    "FLOP": 1.0,
    "GFLOP": 1e9,
    "TFLOP/s": 1e12,
    "%": 0.01,
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
QUANTITY = re.compile(
    r"(\d[\d,]*(?:\.\d+)?)\s*(GB/s|TB/s|TFLOP/s|GFLOP|FLOP|KiB|MiB|GiB|KB|MB|GB|TB|bytes|ms|µs|B|s|%)?(?![\w])"
)
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def quantity(text: str) -> tuple[float, float]:
    """Value of `42.9 GB`, and half of its last digit's worth."""
    found = QUANTITY.fullmatch(text.strip())
    assert found, f"{text!r} is no number with a unit"
    number, unit = found[1].replace(",", ""), UNITS[found[2] or ""]
    decimals = len(number.partition(".")[2])
    return float(number) * unit, 0.5 * 10.0**-decimals * unit


def evaluate(expression: str) -> float:
    plain = QUANTITY.sub(lambda found: repr(quantity(found[0])[0]), expression)
    for sign, python in (("×", "*"), ("−", "-"), ("^", "**")):
        plain = plain.replace(sign, python)
    return value(ast.parse(plain.strip(), mode="eval").body)


def value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    assert isinstance(node, ast.BinOp), ast.dump(node)
    return OPERATORS[type(node.op)](value(node.left), value(node.right))


def agrees(said: str, true: float) -> bool:
    """To the digits that are written, and a little for operands that were rounded before."""
    number, half = quantity(said)
    return abs(number - true) <= half * 1.001


def equations() -> list[tuple[str, str, list[str]]]:
    found = []
    for line in PAGE.splitlines():
        if line.startswith("    ") and re.search(r": \S.* = \d", line):
            label, _, rest = line.strip().partition(": ")
            expression, *results = rest.split(" = ")
            found.append((label, expression, results))
    return found


def tables() -> dict[str, tuple[list[str], list[list[str]]]]:
    """By the first cell of the header: the header and the rows."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
        found[rows[0][0]] = rows[0], rows[2:]
    return found


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "expression", "results"), equations(), ids=[label for label, _, _ in equations()])
def test_equations(label: str, expression: str, results: list[str]) -> None:
    derived = evaluate(expression)
    expected = EQUATIONS[label]
    for result in results:
        number, half = quantity(result)
        # Operands with three digits may move the result by some of its last ones.
        assert abs(number - derived) <= max(half, 0.003 * derived if "." in expression else 0), (result, derived)
        if expected is not None:
            assert agrees(result, expected), (result, expected)


def test_operands_are_of_the_models_the_devices_or_of_this_page() -> None:
    """A slip in the fifth digit of an operand does not show in a result of three."""
    known = {float(number) for shape in SHAPES for number in NUMBER.findall(repr(shape).replace(",", " , "))}
    known |= {128_000.0, 131_072.0, 1_024.0, 100.0}
    known |= {2 * 16 * 128.0 + 64 * 128}  # q, k and v of a linear layer of Qwen3.5-397B-A17B
    known |= {spec.memory_bandwidth / 1e12 for spec in (H100, H200)} | {link.bandwidth / 1e9 for link in (NVLINK, NDR)}
    known |= {H100.rates["bfloat16"] / 1e12, 2 * H100.rates["float8"] / 1e12, H100.memory_bytes / 2**20}
    known |= {streamed(L70), DRAFT}
    known |= {41_540_496.0, *(float(shape.num_parameters()) for shape in SHAPES)}
    known |= {quantity(result)[0] for _, _, results in equations() for result in results}
    known |= {float(number) for _, _, results in equations() for result in results for number in parts(result)[:1]}
    for label, expression, _ in equations():
        for number in parts(expression):
            if len(str(number).replace(".0", "").replace(".", "")) > 2:
                assert number in known, (label, number)


def parts(text: str) -> list[float]:
    """Its numbers, without their units."""
    return [float(found[1].replace(",", "")) for found in QUANTITY.finditer(text)]


def test_every_expected_equation_is_on_the_page() -> None:
    labels = [label for label, _, _ in equations()]
    assert sorted(labels) == sorted(EQUATIONS)


@pytest.mark.parametrize("name", ROWS_ARE_MODELS)
def test_tables_with_a_model_a_row(name: str) -> None:
    _, rows = tables()[name]
    assert len(rows) >= 5
    for model, *cells in rows:
        assert len(cells) == len(ROWS_ARE_MODELS[name])
        for cell, compute in zip(cells, ROWS_ARE_MODELS[name], strict=True):
            assert agrees(cell, compute(model_shape(model))), (model, cell, compute(model_shape(model)))


@pytest.mark.parametrize("name", COLUMNS_ARE_MODELS)
def test_tables_with_a_model_a_column(name: str) -> None:
    header, rows = tables()[name]
    models = [model_shape(cell.partition(",")[0]) for cell in header[1:]]
    for first, *cells in rows:
        for shape, cell in zip(models, cells, strict=True):
            true = COLUMNS_ARE_MODELS[name](shape, int(first.replace(",", "")))
            assert agrees(cell, true), (shape.name, first, cell, true)


def figures(text: str) -> list[str]:
    """Numbers, without those of model names, references and powers."""
    text = re.sub(
        r"`[^`]*`|[A-Za-z][\w.]*-[\w.-]*\d[\w.-]*|\b(?:NVLink|FP|H|Qwen|Gemma)\s?\d[\w.]*|10⁹|2³⁰|\d+[kB]\b", " ", text
    )
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_no_other_figure_is_on_the_page() -> None:
    checked = set(QUOTED)
    prose = []
    names = {*ROWS_ARE_MODELS, *COLUMNS_ARE_MODELS}
    table = ""
    for line in PAGE.splitlines():
        if line.startswith("|"):
            table = table or line.strip("|").split("|")[0].strip()
        else:
            table = ""
        if table in names or (line.startswith("    ") and " = " in line):
            checked.update(figures(line))
        else:
            prose.append(line)
    unknown = {figure for line in prose for figure in figures(line) if len(figure) > 1} - checked
    assert not unknown
    # What is quoted is still quoted.
    said = {figure for line in prose for figure in figures(line)}
    assert set(QUOTED) <= said


def test_the_checks_catch_a_wrong_figure() -> None:
    assert agrees("327,680 B", 327_680)
    assert not agrees("327,681 B", 327_680)
    assert agrees("42.9 GB", 42.949e9)
    assert not agrees("42.8 GB", 42.949e9)
    assert evaluate("2 × (8,192 + 1) × 1 bytes / 2 KB − 3 ^ 2") == pytest.approx(2 * 8193 / 2000 - 9)
