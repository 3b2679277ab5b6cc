"""The commands, their flags and their help; groups of them have files of their own. What they do is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shoal import __version__
from shoal.cli.audit_commands import audit_app
from shoal.cli.bench_commands import bench
from shoal.cli.calibrate import calibrate
from shoal.cli.diagnose import diagnose
from shoal.cli.export import export
from shoal.cli.fleet_app import fleet_app
from shoal.cli.keys import keys_app
from shoal.cli.plan_commands import explain, plan
from shoal.cli.profile import profile
from shoal.cli.simulate import simulate
from shoal.cli.topology_command import topology
from shoal.config import parse_bytes

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(fleet_app, name="fleet")
app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.add_typer(bench, name="bench")
app.command()(simulate)
app.command()(calibrate)
app.command()(profile)
app.command()(export)
app.command()(diagnose)
app.command()(topology)
app.command()(plan)
app.command()(explain)

_ENGINE = "Engine"
_SERVER = "Server"
_PARALLEL = "Parallelism"

ENGINE_FLAGS = {
    "model": "model",
    "dtype": "dtype",
    "quantize": "quantize",
    "device": "device",
    "threads": "threads",
    "max_model_len": "max_len",
    "max_num_seqs": "max_sequences",
    "max_num_batched_tokens": "max_batch_tokens",
    "block_size": "block_size",
    "kv_cache_memory": "kv_cache_bytes",
    "kv_cache_dtype": "kv_dtype",
    "attention_backend": "attention",
    "prefix_caching": "prefix_caching",
    "depth": "depth",
    "warm_spares": "warm_spares",
    "prepare_grammars": "prepare_grammars",
    "tensor_parallel_size": "layout.tp",
    "pipeline_parallel_size": "layout.pp",
    "expert_parallel": "layout.ep",
    "context_parallel_size": "layout.cp",
    "data_parallel_size": "layout.dp",
    "expert_dispatch": "expert_dispatch",
    "expert_load": "expert_load",
    "redundant_experts": "redundant_experts",
    "launcher": "launch.launcher",
    "launch_host": "launch.host",
    "launch_port": "launch.port",
    "secret_file": "launch.secret_file",
    "ray_address": "launch.ray_address",
    "step_log": "step_log",
}
"""The field's names, which users know from other engines, and EngineConfig's."""
DEPLOYMENT_FLAGS = {
    "host": "host",
    "port": "port",
    "api_key": "api_key",
    "allow_remote": "allow_remote",
    "drain_seconds": "drain_seconds",
    "stall_seconds": "health.stall_seconds",
}
"""And GatewayConfig's keys."""
SERVER_FLAGS = {"served_model_name": "served_model_name", **DEPLOYMENT_FLAGS}
"""And ServeConfig's."""


def _complete_model(incomplete: str) -> list[str]:
    """Built-in names; where none fits, the shell goes on with files."""
    from shoal.checkpoint.builtin import BUILTINS

    return [name for name in BUILTINS if name.startswith(incomplete)]


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Model = Annotated[
    str,
    typer.Argument(
        help="A built-in name, a checkpoint directory, a .gguf file, or a hub id.",
        autocompletion=_complete_model,
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    typer.Option(help="Precision of the weights. [default: float32]", rich_help_panel=_ENGINE),
]
Quantize = Annotated[
    Literal["fp8", "int8", "int4"] | None,
    typer.Option(help="Make the matrices of a float checkpoint this at load.", rich_help_panel=_ENGINE),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [default: auto]", rich_help_panel=_ENGINE)
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: one a core]", rich_help_panel=_ENGINE)]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Longest sequence in tokens. [default: the model's]", rich_help_panel=_ENGINE)
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(min=1, help="Sequences that run at once. [default: 64]", rich_help_panel=_ENGINE)
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(min=1, help="Token budget of one step. [default: 512]", rich_help_panel=_ENGINE)
]
BlockSize = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a KV block. [default: 16]", rich_help_panel=_ENGINE)
]
KVCacheMemory = Annotated[
    int | None,
    typer.Option(parser=_size, metavar="SIZE", help="As 2GiB. [default: from what is free]", rich_help_panel=_ENGINE),
]
AttentionBackend = Annotated[
    Literal["auto", "native", "triton", "varlen", "flashinfer", "portable"] | None,
    typer.Option(help="auto is the best that serves the model on the device. [default: auto]", rich_help_panel=_ENGINE),
]
KVCacheDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float8", "int8"] | None,
    typer.Option(help="auto is float32 with float32 weights, else bfloat16. [default: auto]", rich_help_panel=_ENGINE),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--prefix-caching/--no-prefix-caching", help="Reuse the KV of equal prefixes.", rich_help_panel=_ENGINE
    ),
]
Depth = Annotated[
    int | None, typer.Option(min=1, help="Steps planned ahead of results. [default: 1]", rich_help_panel=_ENGINE)
]
TensorParallelSize = Annotated[
    int | None, typer.Option(min=1, help="Ranks that split every layer. [default: 1]", rich_help_panel=_PARALLEL)
]
PipelineParallelSize = Annotated[
    int | None, typer.Option(min=1, help="Stages that split the layers. [default: 1]", rich_help_panel=_PARALLEL)
]
ExpertParallel = Annotated[
    int | None, typer.Option(min=1, help="Ranks that split the experts. [default: 1]", rich_help_panel=_PARALLEL)
]
ContextParallelSize = Annotated[
    int | None, typer.Option(min=1, help="Ranks that split every KV cache. [default: 1]", rich_help_panel=_PARALLEL)
]
DataParallelSize = Annotated[
    int | None, typer.Option(min=1, help="Engines beside each other. [default: 1]", rich_help_panel=_PARALLEL)
]
LauncherName = Annotated[
    Literal["local", "env", "ray"] | None,
    typer.Option(
        "--launcher",
        help="Who starts the ranks: local, ray, or env for torchrun and Slurm. [default: local]",
        rich_help_panel=_PARALLEL,
    ),
]
RayAddress = Annotated[
    str | None, typer.Option(help="Of the Ray cluster. [default: the one that runs here]", rich_help_panel=_PARALLEL)
]
ExpertDispatch = Annotated[
    Literal["replicate", "all_gather", "all_to_all"] | None,
    typer.Option(help="How tokens reach experts on other ranks. [default: replicate]", rich_help_panel=_PARALLEL),
]
ExpertLoad = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="What /v1/experts said: spread that load.", rich_help_panel=_PARALLEL),
]
RedundantExperts = Annotated[
    int | None,
    typer.Option(min=0, help="Copies of busy experts on a rank. [default: 0]", rich_help_panel=_PARALLEL),
]
LaunchHost = Annotated[
    str | None, typer.Option(help="Address that ranks talk over. [default: 127.0.0.1]", rich_help_panel=_PARALLEL)
]
LaunchPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Of the ranks' driver.", rich_help_panel=_PARALLEL)
]
SecretFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="What every rank must know to join.", rich_help_panel=_PARALLEL)
]
StepLogDirectory = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Write down when each rank ran each step.", rich_help_panel=_PARALLEL),
]
WarmSpares = Annotated[
    int | None,
    typer.Option(min=0, help="Loaded ranks that wait for others to fail. [default: 0]", rich_help_panel=_PARALLEL),
]
PrepareGrammars = Annotated[
    bool | None,
    typer.Option("--prepare-grammars", help="Be ready for structured output first.", rich_help_panel=_ENGINE),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _engine_flags(context: typer.Context) -> dict[str, Any]:
    """Flags of this command by their keys in EngineConfig; None where not given."""
    return {key: context.params.get(flag) for flag, key in ENGINE_FLAGS.items()}


def _require_none_beside(flag: str, context: typer.Context, allowed: set[str]) -> None:
    """Everything else is in the file."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in allowed and context.params.get(name) not in (None, False):
            raise typer.BadParameter(f"goes into the file of {flag}", param_hint=parameter.opts[-1])


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plans, serves and proves LLM inference.

    Begin with `shoal chat smollm2-135m` or `shoal serve smollm2-135m`.
    """


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A built-in name, a checkpoint directory, a .gguf file, or a hub id.",
            autocompletion=_complete_model,
            show_default=False,
        ),
    ] = None,
    deployment: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Serve the fleet of this file.", rich_help_panel=_SERVER),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]", rich_help_panel=_SERVER)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 is any free one. [default: 8000]", rich_help_panel=_SERVER)
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients ask for. [default: the model's name]", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send as a bearer token.", rich_help_panel=_SERVER)
    ] = None,
    allow_remote: Annotated[
        bool | None, typer.Option("--allow-remote", help="Listen beyond loopback.", rich_help_panel=_SERVER)
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Time for running requests at the end. [default: 30]", rich_help_panel=_SERVER),
    ] = None,
    stall_seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="An engine may take so long for a step. [default: 2]", rich_help_panel=_SERVER),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Settings; flags go before them.", rich_help_panel=_SERVER),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what the scheduler saw, to replay it.", rich_help_panel=_SERVER),
    ] = None,
    load_report: Annotated[
        bool,
        typer.Option("--load-report", help="Print where the time to the first token went.", rich_help_panel=_SERVER),
    ] = False,
    load_report_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write that as JSON.", rich_help_panel=_SERVER)
    ] = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    block_size: BlockSize = None,
    kv_cache_memory: KVCacheMemory = None,
    kv_cache_dtype: KVCacheDtype = None,
    attention_backend: AttentionBackend = None,
    prefix_caching: PrefixCaching = None,
    depth: Depth = None,
    tensor_parallel_size: TensorParallelSize = None,
    pipeline_parallel_size: PipelineParallelSize = None,
    expert_parallel: ExpertParallel = None,
    context_parallel_size: ContextParallelSize = None,
    data_parallel_size: DataParallelSize = None,
    expert_dispatch: ExpertDispatch = None,
    expert_load: ExpertLoad = None,
    redundant_experts: RedundantExperts = None,
    warm_spares: WarmSpares = None,
    prepare_grammars: PrepareGrammars = None,
    launcher: LauncherName = None,
    launch_host: LaunchHost = None,
    launch_port: LaunchPort = None,
    secret_file: SecretFile = None,
    ray_address: RayAddress = None,
    step_log: StepLogDirectory = None,
) -> int:
    """Serve a model over an OpenAI-compatible API.

    **Examples**

    - `shoal serve smollm2-135m`
    - `shoal serve ./Llama-3.2-1B-Instruct --dtype int8 --port 9000`
    - `shoal serve model.gguf --max-model-len 4096 --kv-cache-memory 2GiB`
    - `shoal serve smollm2-135m --config serve.yaml`
    - `shoal serve smollm2-135m --tensor-parallel-size 2`
    - `shoal serve --deployment fleet.yaml`
    """
    from shoal.cli.serving import run_deployment, run_server

    if deployment is not None:
        _require_none_beside("--deployment", context, {"deployment", *DEPLOYMENT_FLAGS})
        return run_deployment(deployment, {key: context.params[flag] for flag, key in DEPLOYMENT_FLAGS.items()})
    if model is None:
        raise typer.BadParameter("name a model, or a fleet with --deployment FILE.yaml", param_hint="MODEL")
    engine = {f"engine.{key}": value for key, value in _engine_flags(context).items()}
    flags = engine | {key: context.params[flag] for flag, key in SERVER_FLAGS.items()}
    return run_server(model, config, flags, record, load_report=load_report, load_report_json=load_report_json)


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    input: Annotated[Path, typer.Option("--input", "-i", metavar="IN.jsonl", help="Requests, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="Answers, one a line.")],
    force: Annotated[bool, typer.Option("--force", help="Begin anew, over the answers that are there.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="For requests that do not say. [default: the API's]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="For requests that do not say. [default: 1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For requests that do not say. [default: random]")] = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    block_size: BlockSize = None,
    kv_cache_memory: KVCacheMemory = None,
    kv_cache_dtype: KVCacheDtype = None,
    prefix_caching: PrefixCaching = None,
) -> int:
    """Answer a file of requests.

    A line of the input is a JSON object with `prompt` or `messages`, any field of the API, and an `id` of your own. A
    line of the output is its answer, in the same order, with `text`, `token_ids`, `finish_reason` and `usage`, or with
    `error`. After an interruption the same command goes on where it stopped.

    **Examples**

    - `shoal generate smollm2-135m --input questions.jsonl --output answers.jsonl`
    - `shoal generate smollm2-135m -i in.jsonl -o out.jsonl --dtype int8 --max-tokens 64 --temperature 0`
    """
    from shoal.cli.batch import Defaults, generate_file

    defaults = Defaults(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return generate_file(model, _engine_flags(context), input, output, defaults, force=force)


@app.command()
def chat(
    context: typer.Context,
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int | None, typer.Option(help="For the same answers every time.")] = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    kv_cache_memory: KVCacheMemory = None,
) -> int:
    """Talk with a model on the terminal.

    `/reset` forgets the conversation, `/quit` or Ctrl-D ends it, Ctrl-C stops an answer. Lines can be piped in.

    **Examples**

    - `shoal chat smollm2-135m`
    - `shoal chat smollm2-135m --dtype int8 --system "You answer in one sentence."`
    """
    from shoal.cli.chat import talk

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return talk(model, _engine_flags(context), system, sampling)


@app.command()
def pull(model: Model) -> None:
    """Fetch a model to this machine and print where it lies.

    **Examples**

    - `shoal pull smollm2-135m`
    - `shoal pull HuggingFaceTB/SmolLM2-360M-Instruct`
    """
    from shoal.cli.models import pull_model

    pull_model(model)


@app.command()
def models(as_json: Json = False) -> None:
    """List the built-in models and say which are on this machine.

    **Examples**

    - `shoal models`
    - `shoal models --json`
    """
    from shoal.cli.models import print_models

    print_models(as_json=as_json)


@app.command()
def info(
    model: Model,
    context_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Tokens of a sequence. [default: the model's]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model is, what it weighs, and what of it fits in this machine's memory.

    **Examples**

    - `shoal info smollm2-135m`
    - `shoal info ./Qwen3-8B --max-model-len 32768 --json`
    """
    from shoal.cli.models import print_info

    print_info(model, context_len, as_json=as_json)
