"""Rows of measured end-to-end data as questions to the cost model: which engine, which load, which answer was measured.

What a row leaves unsaid is filled in by rules, each with its source, the same for all rows:

- InferenceX (its scripts, github.com/SemiAnalysisAI/InferenceX): lengths uniform in [0.8 L, L]; 10 requests a client,
  all clients at once; the engine takes 0.9 of memory (SGLang 0.82 to 0.85, TensorRT-LLM 0.9 of what its weights leave,
  which is what its flag means), batches as large as the concurrency; FP8 KV
  in TensorRT-LLM, in vLLM but for MLA, and in SGLang on Blackwell, else 16 bits; chunks of 8,192 tokens, in SGLang on
  Blackwell 16,384 or more; TensorRT-LLM as many as a sequence may be long. Where aggregated rows claim more devices
  than a host has, their tp was multiplied by ep on the way into the sample: they ran on one host.
- TensorRT-LLM's performance pages (docs/source, of the commits that rows name): the requests of QUEUED are queued at
  once; mixtures run with attention_dp over all devices; gpt-oss on Hopper keeps its cache in 16 bits.
- MLPerf: lengths of the datasets by the means that submitters' reports and the reference implementation state.
- A layout that is not stated is the fewest devices that hold the weights and as much again of cache as a quarter.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.memory import weight_bytes
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision, EngineShape, WeightPrecision
from shoal.core.hardware import Cluster
from shoal.core.layout import Layout
from shoal.core.model_shape import ModelShape
from shoal.plan import catalogue, models
from shoal.plan.hardware_file import CatalogueError
from shoal.plan.steady_state import (
    Lengths,
    ServingEstimate,
    Workload,
    closed_loop,
    disaggregated,
    offline,
    open_loop,
    static_batch,
    steady,
)

Row = dict[str, str]
METRICS = ("tpot", "ttft", "throughput")


class CannotAnswer(Exception):
    """Why not."""


class Question(msgspec.Struct, kw_only=True):
    row: str
    source: str
    device: str
    model: str
    engine: str
    mode: str
    kind: str
    """dense or mixture; empty where the model is not known."""
    doubtful: bool
    """Its throughput contradicts its own times by more than a half (some rows of Splitwise's table do)."""
    measured: dict[str, float]
    """tpot and ttft in seconds, throughput in output tokens/s."""


class Answer(msgspec.Struct, kw_only=True):
    predicted: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]


DATASETS = {
    # Mean input and output, spread as a share: MLPerf inference v5.1 datasets.
    "llama2-70b": (294, 294, 0.9),
    "mixtral-8x7b": (300, 145, 0.9),
    "llama3.1-405b": (9428, 685, 0.9),
    "llama3.1-8b": (778, 128, 0.5),
    "deepseek-r1": (800, 3700, 0.8),
}
PRECISIONS: dict[str, WeightPrecision] = {
    "fp16": "bfloat16",
    "bf16": "bfloat16",
    "fp8": "float8",
    "fp4": "float4",
    "int4": "int4",
    "int8": "int8",
    "nvfp4": "float4",
    "mxfp4": "float4",
    "w8a8": "int8",
    "w4a16": "int4",
    "awq": "int4",
    "gptq": "int4",
    "": "bfloat16",
}
HOST_DEVICES = 8
QUEUED = {
    ("128", "128"): 30000,
    ("128", "2048"): 3000,
    ("128", "4096"): 1500,
    ("500", "2000"): 3000,
    ("1000", "1000"): 3000,
    ("1000", "2000"): 1500,
    ("1024", "1024"): 3000,
    ("1024", "8192"): 1500,
    ("1024", "32768"): 1000,
    ("2048", "128"): 3000,
    ("2048", "2048"): 1500,
    ("5000", "500"): 1500,
    ("8192", "1024"): 1500,
    ("20000", "2000"): 1000,
    ("32768", "1024"): 1000,
}
"""Requests that TensorRT-LLM's performance pages queue, by input and output: of so few the batch often is all, and the
rate that they print is from the first request to the last answer."""


def read(row: Row) -> Question:
    measured: dict[str, float] = {}
    for name, column, scale in (("tpot", "tpot_ms", 1e-3), ("ttft", "ttft_ms", 1e-3), ("throughput", "out_tok_s", 1.0)):
        if row[column] and float(row[column]) > 0:
            measured[name] = float(row[column]) * scale
    try:
        kind = "mixture" if models.model_shape(row["model"]).is_mixture else "dense"
    except models.ModelError:
        kind = ""
    doubtful = False
    if row["mode"] == "static batch" and len(measured) == 3:
        batch, outputs = int(row["concurrency"]), int(row["osl"])
        own = batch * outputs / (measured["ttft"] + measured["tpot"] * (outputs - 1))
        doubtful = not 0.5 < own / measured["throughput"] < 1.5
    return Question(
        doubtful=doubtful,
        kind=kind,
        row=row["row_id"],
        source=row["source"],
        device=row["gpu"],
        model=row["model"].split("/")[-1],
        engine=engine_name(row),
        mode=row["mode"],
        measured=measured,
    )


def engine_name(row: Row) -> str:
    name = row["engine"].lower()
    if row["source"].startswith("MLPerf") and name.startswith("tensorrt"):
        return "tensorrt-executor"
    if "sglang" in name:
        return "sglang"
    if "tensorrt" in name or "trtllm" in name or "trt-llm" in name:
        return "tensorrt-llm"
    return "vllm-2023" if "2023" in name else "vllm"


def answer(row: Row, calibration: Calibration | None = None) -> Answer:
    """Raises CannotAnswer with the reason."""
    try:
        return _answer_row(row, calibration)
    except (models.ModelError, CatalogueError) as error:
        raise CannotAnswer(str(error)) from error
    except (ValueError, ZeroDivisionError) as error:
        # What is missing in a row, or is written as no other row has it, is that row's matter.
        raise CannotAnswer(f"the row does not say enough: {error}") from error


def _answer_row(row: Row, calibration: Calibration | None) -> Answer:
    shape = models.model_shape(row["model"])
    device = catalogue.device(device_name(row["gpu"])).name
    if row["mode"] == "disagg":
        return answer_disaggregated(row, shape, device, calibration)
    layout, groups = layout_of(row, shape, device)
    per_replica = layout.ranks * groups
    replicas = max(1, int(row["n_gpus"] or per_replica) // per_replica) if row["source"].startswith("MLPerf") else 1
    work = workload_of(row)
    cost = model_of(row, shape, device, layout, groups, calibration)
    found, median = measure(row, cost, work, replicas)
    if found.refused:
        raise CannotAnswer(f"memory: {found.refused}")
    return _answer(found, replicas, median)


def measure(row: Row, cost: CostModel, work: Workload, replicas: int) -> tuple[ServingEstimate, bool]:
    """The load of the row, and whether its figures are medians."""
    load = row["load_kind"]
    if row["mode"] == "static batch":
        batch = int(row["concurrency"] or 1)
        return static_batch(cost, work.inputs.high, work.outputs.high, batch), False
    if load.startswith("offline"):
        is_page = row["source"].startswith("TensorRT-LLM perf-overview")
        queued = QUEUED.get((row["isl"], row["osl"])) if is_page else None
        return closed_loop(cost, work, queued, requests=queued) if queued else offline(cost, work), False
    if load.startswith("open-loop"):
        rate = float(row["request_rate"]) / replicas
        if row["stat"].endswith("of 300 requests"):
            return open_loop(cost, work, rate, requests=300), True
        found = open_loop(cost, work, rate)
        if not row["source"].startswith("MLPerf"):
            return found, True
        # Over a long run what comes in goes out, up to what there is; an estimate's run fills and empties the batch.
        most = offline(cost, work).requests_per_second
        share = min(rate, most) * work.outputs.mean / found.output_tokens_per_second
        found = msgspec.structs.replace(
            found,
            output_tokens_per_second=found.output_tokens_per_second * share,
            low=found.low * share,
            high=found.high * share,
        )
        if steady(cost, work, rate).saturated:
            # It was served within the benchmark's limits, so no queue grew without end: where the model says that one
            # does, it is the capacity that is wrong, and the wait is that of a system near its own.
            found = msgspec.structs.replace(found, ttft=steady(cost, work, 0.9 * most).ttft)
        return found, True
    concurrency = int(float(row["concurrency"]))
    poll = poll_steps(row, cost.engine.cluster.device.name, concurrency)
    wait = wait_steps(row, concurrency)
    found = closed_loop(cost, work, concurrency, requests=10 * concurrency, poll_steps=poll, wait_steps=wait)
    return found, False


def wait_steps(row: Row, concurrency: int) -> int:
    """InferenceX starts TensorRT-LLM with batch_wait_timeout_iters 20 for Llama below 8 devices, and 40 for DeepSeek
    from 64 clients, both for 1024 tokens in and out; with attention_dp, timeout_iters 60 to fill all groups.
    """
    if engine_name(row) == "tensorrt-llm" and row["source"].startswith("AIC") and number(row["attn_dp"]) > 1:
        return 60
    if (
        engine_name(row) != "tensorrt-llm"
        or "uniform[0.8" not in row["len_note"]
        or (row["isl"], row["osl"]) != ("1024",) * 2
    ):
        return 0
    if "Llama" in row["model"]:
        return 20 if number(row["tp"]) < 8 else 0
    return 40 if 64 <= concurrency < 256 else 0


def poll_steps(row: Row, device: str, concurrency: int) -> int:
    """InferenceX starts SGLang on Blackwell with --scheduler-recv-interval 30, or 10 below 16 clients.

    A request waits longer than half of an interval in the mean, some three quarters, as B300 rows with the flag and
    without it show.
    """
    if (
        "GLM" in row["model"]
        or engine_name(row) != "sglang"
        or not row["source"].startswith("AIC")
        or not device.startswith(("B2", "B3", "GB"))
    ):
        return 1
    return 45 if concurrency >= 16 else 15


def _answer(found: ServingEstimate, replicas: int, median: bool) -> Answer:
    ttft, tpot = (found.ttft.p50, found.tpot.p50) if median else (found.ttft.mean, found.tpot.mean)
    rate = found.output_tokens_per_second * replicas
    return Answer(
        predicted={"ttft": ttft, "tpot": tpot, "throughput": rate},
        low={
            "ttft": ttft * found.ttft.low / found.ttft.mean,
            "tpot": tpot * found.tpot.low / found.tpot.mean if found.tpot.mean else 0.0,
            "throughput": found.low * replicas,
        },
        high={
            "ttft": ttft * found.ttft.high / found.ttft.mean,
            "tpot": tpot * found.tpot.high / found.tpot.mean if found.tpot.mean else 0.0,
            "throughput": found.high * replicas,
        },
    )


# --- what a row says --------------------------------------------------------------------------------------------------


def device_name(text: str) -> str:
    """Without what a submitter says of a host: counts, virtualisation, power caps."""
    if "," in text:
        raise CannotAnswer(f"two kinds of devices in one system: {text}")
    return re.sub(r"^Virtualized |-pcap$", "", text)


def workload_of(row: Row) -> Workload:
    if row["isl"] == "dataset" or not row["isl"].isdigit():
        if row["model"] not in DATASETS:
            raise CannotAnswer(f"the lengths of {row['model']}'s dataset are not stated")
        inputs, outputs, spread = DATASETS[row["model"]]
        return Workload(inputs=Lengths.spread(inputs, spread), outputs=Lengths.spread(outputs, spread))
    inputs, outputs = int(row["isl"]), int(row["osl"]) if row["osl"].isdigit() else 1
    if "uniform[0.8" in row["len_note"]:
        return Workload(
            inputs=Lengths.uniform(round(0.8 * inputs), inputs), outputs=Lengths.uniform(round(0.8 * outputs), outputs)
        )
    if "ShareGPT" in row["len_note"]:
        return Workload(inputs=Lengths.spread(inputs, 0.9), outputs=Lengths.spread(outputs, 0.5))
    return Workload(inputs=Lengths.fixed(inputs), outputs=Lengths.fixed(outputs))


def number(text: str) -> int:
    return int(float(text)) if text else 1


def layout_of(row: Row, shape: ModelShape, device: str) -> tuple[Layout, int]:
    """Layout and attention_dp."""
    tp, pp, ep, groups = (number(row[name]) for name in ("tp", "pp", "ep", "attn_dp"))
    if shape.is_mixture and "MoE rows used attention DP" in row["note"]:
        return Layout(pp=pp), tp
    if not row["tp"]:
        return (Layout(pp=pp), groups) if groups > 1 else (fewest(row, shape, device), 1)
    if row["source"].startswith("AIC") and groups > 1:
        # One device a group: recorded as tp = groups = the devices (vLLM), or as ep, and the groups times ep.
        return Layout(), tp if tp > 1 else ep
    if row["source"].startswith("AIC") and tp > HOST_DEVICES and ep > 1:
        tp //= ep
    if not shape.is_mixture:
        return Layout(tp=tp, pp=pp), groups
    if groups > 1:
        return Layout(ep=tp, pp=pp), groups
    return Layout(tp=max(1, tp // ep), ep=min(ep, tp), pp=pp), 1


def fewest(row: Row, shape: ModelShape, device: str) -> Layout:
    for tp in (1, 2, 4, 8):
        cost = model_of(row, shape, device, Layout(tp=tp), 1, None)
        budget = cost.memory()
        if budget.cache > 0.2 * budget.weights:
            return Layout(tp=tp)
    raise CannotAnswer("no layout is stated, and no host holds the model")


def cluster_of(device: str, devices: int) -> Cluster:
    name = {"GB200": "GB200-NVL72", "GB300": "GB300-NVL72"}.get(device)
    if devices <= HOST_DEVICES:
        return catalogue.cluster(f"{devices}x{device}" if devices > 1 else device)
    if name is not None:
        return catalogue.cluster(f"{devices}x{device}")
    return catalogue.cluster(f"{-(-devices // HOST_DEVICES)}x{HOST_DEVICES}x{device}:ndr")


def model_of(
    row: Row, shape: ModelShape, device: str, layout: Layout, groups: int, calibration: Calibration | None
) -> CostModel:
    engine = engine_name(row)
    cluster = cluster_of(device, layout.ranks * groups)
    if row["gpu"].endswith("-pcap"):
        # Capped at half of the power (Splitwise, section 4): the clock goes with its square root or so.
        own = cluster.device
        slow = msgspec.structs.replace(own, rates={name: rate * 0.5**0.5 for name, rate in own.rates.items()})
        cluster = msgspec.structs.replace(cluster, device=slow)
    weights = PRECISIONS.get(row["weights"].lower())
    if weights is None:
        raise CannotAnswer(f"weights {row['weights']!r} are of no precision that is known")
    if "gpt-oss" in row["model"].lower():
        weights = "float4"  # What its only checkpoint is stored in; rows name the operands.
    inputs, outputs = (int(row[name]) if row[name].isdigit() else 0 for name in ("isl", "osl"))
    concurrency = int(float(row["concurrency"])) if row["concurrency"] not in ("", "inf") else 0
    limits = re.search(r"max_(?:batch|num_seqs)=(\d+) max_num_(?:batched_)?tokens=(\d+)", row["note"])
    chunk = 8192
    blackwell = device.startswith(("B2", "B3", "GB"))
    if engine == "sglang" and blackwell:
        chunk = 16384
    if engine == "tensorrt-llm" and inputs and row["source"].startswith("AIC"):
        chunk = max(8192, inputs + outputs) if shape.is_mixture else inputs + outputs + 200
    sequences = max(1, -(-concurrency // groups)) if concurrency else 2048
    if row["len_note"].startswith("NVIDIA internal"):
        # Its TTFT holds about 1/c of a request's whole time: one of the c slots was not to be had.
        sequences = max(1, sequences - 1)
    if limits:
        sequences, chunk = int(limits.group(1)), int(limits.group(2))
    shaped = EngineShape(
        model=shape,
        cluster=cluster,
        layout=layout,
        attention_dp=groups,
        weights=weights,
        cache=cache_of(row, shape, device),
        profile=engine,
        max_batch_tokens=chunk,
        max_sequences=sequences,
        memory_share=0.85 if engine == "sglang" else 0.9,
    )
    if engine == "tensorrt-llm":
        free = max(0.0, 1 - weight_bytes(shaped) / cluster.device.memory_bytes)
        shaped = msgspec.structs.replace(shaped, memory_share=1 - 0.1 * free)
    return CostModel(shaped, calibration)


def cache_of(row: Row, shape: ModelShape, device: str) -> CachePrecision:
    stated = row["kv"].split(" ")[0].lower()
    if "gpt-oss" in row["model"] and row["source"].startswith("TensorRT-LLM") and device.startswith(("H100", "H200")):
        return "bfloat16"
    if stated in ("fp8", "fp16", "bf16"):
        return "float8" if stated == "fp8" else "bfloat16"
    if stated == "auto" or row["weights"] in ("", "bf16", "fp16"):
        return "bfloat16"
    engine = engine_name(row)
    blackwell = device.startswith(("B2", "B3", "GB"))
    if engine.startswith("tensorrt") or (engine == "sglang" and blackwell):
        return "float8"
    latent = any(layer.attention.latent_dim for layer in shape.layers)
    return "float8" if engine == "vllm" and not latent else "bfloat16"


# --- pools ------------------------------------------------------------------------------------------------------------


def pool(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def answer_disaggregated(row: Row, shape: ModelShape, device: str, calibration: Calibration | None) -> Answer:
    prompts, tokens = pool(row["prefill_cfg"]), pool(row["decode_cfg"])
    if "workers" not in prompts or "workers" not in tokens:
        raise CannotAnswer("how many workers each pool has is not stated")
    costs = []
    for stated in (prompts, tokens):
        tp, groups, ep = stated.get("tp", 1), stated.get("adp", 1), stated.get("ep", 1)
        layout = Layout(ep=tp) if groups > 1 else Layout(tp=max(1, tp // ep), ep=min(ep, tp))
        costs.append(model_of(row, shape, device, layout, groups, calibration))
    concurrency = int(float(row["concurrency"]))
    found = disaggregated(
        costs[0],
        prompts.get("workers", 1),
        costs[1],
        tokens.get("workers", 1),
        workload_of(row),
        concurrency,
        requests=None,
    )
    if found.refused:
        raise CannotAnswer(f"memory: {found.refused}")
    return _answer(found, 1, False)


def rows_of(path: Path) -> list[Row]:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
