"""The command line. Heavy modules are imported by the command that needs them: `shoal --help` loads none."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from shoal import __version__
from shoal.core.config import EngineConfig

if TYPE_CHECKING:
    from shoal.checkpoint.resolve import ModelFiles
    from shoal.serve.generation import Generator

app = typer.Typer(
    help="Plans, serves and proves LLM inference.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="A built-in name, a checkpoint directory, a .gguf file, or a hub id.")]
DType = Annotated[
    str | None, typer.Option("--dtype", help="Weights: float32, bfloat16 or int8.", show_default="float32")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", show_default="auto")]
Threads = Annotated[int | None, typer.Option(help="CPU threads that compute.", show_default="one a core")]
MaxLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Longest context in tokens.", show_default="model's")
]
MaxSeqs = Annotated[int | None, typer.Option("--max-num-seqs", help="Sequences that run at once.", show_default="64")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", help="Token budget of a step.", show_default="512")
]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a KV block.", show_default="16")]
KVMemory = Annotated[
    str | None,
    typer.Option("--kv-cache-memory", help="Memory for the KV cache, as 2GiB.", show_default="from free memory"),
]
Prefix = Annotated[
    bool | None, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse KV of equal prefixes.")
]
Depth = Annotated[int | None, typer.Option(help="Steps planned ahead.", show_default="1")]


def engine_tree(**flags: Any) -> dict[str, Any]:
    """Flags by their names in EngineConfig; a size may be text."""
    from shoal.config import parse_bytes

    size = flags.pop("kv_cache_memory", None)
    return flags | {"kv_cache_bytes": None if size is None else parse_bytes(size)}


@app.command()
def serve(
    model: Model,
    host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0 is any free one.", show_default="8000")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients ask for.", show_default="MODEL")] = None,
    api_key: Annotated[str | None, typer.Option(help="Require `Authorization: Bearer KEY`.")] = None,
    allow_remote: Annotated[bool | None, typer.Option("--allow-remote", help="Listen beyond loopback.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; flags win over it.")] = None,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
    max_model_len: MaxLen = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    block_size: BlockSize = None,
    kv_cache_memory: KVMemory = None,
    prefix_caching: Prefix = None,
    depth: Depth = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Grace for running requests.", show_default="30")] = None,
    stall_seconds: Annotated[float | None, typer.Option(help="/ready fails after.", show_default="30")] = None,
    record: Annotated[Path | None, typer.Option(help="Write every scheduling decision to this file.")] = None,
) -> None:
    """Serve a model over an OpenAI-compatible API.

    **Examples**

        shoal serve smollm2-135m

        shoal serve ./Llama-3.2-1B --dtype int8 --port 9000 --max-model-len 8192

        shoal serve model.gguf --config serve.yaml
    """
    from shoal.config import load_tree, merge, to_config
    from shoal.serve.server import ServeConfig, listen
    from shoal.serve.server import serve as run_server

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "api_key": api_key,
        "allow_remote": allow_remote,
        "drain_seconds": drain_seconds,
        "stall_seconds": stall_seconds,
        "engine": engine_tree(
            model=model,
            dtype=dtype,
            device=device,
            threads=threads,
            max_len=max_model_len,
            max_sequences=max_num_seqs,
            max_batch_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            prefix_caching=prefix_caching,
            depth=depth,
        ),
    }
    began = time.monotonic()
    settings = to_config(merge(load_tree(config), flags), ServeConfig, str(config or "flags"))
    listener = listen(settings)
    files = fetch(model)

    def ready(url: str, engine: Any) -> None:
        info = engine.info
        out.print(
            f"[bold]{settings.served_model_name or files.name}[/bold] ready at [bold]{url}/v1[/bold] "
            f"after {time.monotonic() - began:.1f} s: {info.dtype} on {info.device} ({info.ops} kernels), "
            f"{gib(info.weight_bytes)} of weights, KV for {info.num_blocks * info.block_size:,} tokens"
        )
        out.print("Ctrl-C to stop.", style="dim")

    with loading_bar() as report:
        status = asyncio.run(
            run_server(
                settings,
                files,
                listener,
                on_progress=report,
                on_ready=lambda url, engine: (report("ready", 1.0), ready(url, engine))[1],
                recording=None if record is None else str(record),
            )
        )
    if status:
        raise SystemExit("shoal: the engine was lost; see above")


@app.command()
def generate(
    model: Model,
    input: Annotated[Path, typer.Option("--input", "-i", help="Requests, one JSON object a line.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers, in the same order.")],
    force: Annotated[bool, typer.Option("--force", help="Start over instead of resuming.")] = False,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
    max_model_len: MaxLen = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    kv_cache_memory: KVMemory = None,
) -> None:
    """Answer a file of requests.

    A line has `prompt` (text or token ids) or `messages`, and any sampling field of the API. An answer has `text`,
    `token_ids`, `finish_reason` and `usage`, or `error`. An interrupted run goes on where it stopped.

    **Example**

        shoal generate smollm2-135m --input questions.jsonl --output answers.jsonl
    """
    import msgspec
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from shoal.batch import Progress as Done
    from shoal.batch import count_lines, open_output, run_batch
    from shoal.config import to_config

    tree = engine_tree(
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
        max_len=max_model_len,
        max_sequences=max_num_seqs,
        max_batch_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
    )
    engine = to_config({k: v for k, v in tree.items() if v is not None}, EngineConfig, "flags")
    total = count_lines(input)
    try:
        sink, skip = open_output(output, force=force)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None
    if skip > total:
        raise typer.BadParameter(f"{output} has {skip} answers, {input} {total} requests: not the same run? --force")
    if skip:
        err.print(f"{output}: {skip} answers are there already, going on with the rest")
    if skip == total:
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=err,
    )
    began = time.monotonic()

    async def work(generator: Generator) -> Done:
        task = bar.add_task("generating", total=total, completed=skip, rate="")

        def show(done: Done) -> None:
            rate = done.tokens / max(1e-9, time.monotonic() - began)
            bar.update(task, completed=done.lines, rate=f"{rate:.0f} tokens/s")

        with bar:
            return await run_batch(generator, input, sink, skip, show)

    with sink:
        done = run_with_engine(msgspec.structs.replace(engine, model=model), work)
    err.print(
        f"{done.lines - skip} answers, {done.tokens:,} tokens in {time.monotonic() - began:.1f} s"
        + (f", [red]{done.errors} errors[/red]" if done.errors else "")
    )


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    dtype: DType = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Talk to a model on the terminal. `/reset` forgets the conversation, `/quit` or Ctrl-D ends it.

    **Example**

        shoal chat smollm2-135m --dtype int8
    """
    from shoal.config import to_config

    tree = engine_tree(model=model, dtype=dtype, device=device, threads=threads)
    engine = to_config({k: v for k, v in tree.items() if v is not None}, EngineConfig, "flags")

    async def work(generator: Generator) -> None:
        start = [] if system is None else [{"role": "system", "content": system}]
        messages: list[dict[str, Any]] = list(start)
        turn = 0
        while True:
            try:
                text = await asyncio.to_thread(input_line)
            except (EOFError, KeyboardInterrupt):
                return
            if text in ("/quit", "/exit"):
                return
            if text == "/reset":
                messages = list(start)
                continue
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            turn += 1
            answer = await say(generator, messages, temperature, max_tokens, f"turn-{turn}")
            messages.append({"role": "assistant", "content": answer})

    run_with_engine(engine, work)


async def say(
    generator: Generator, messages: list[dict[str, Any]], temperature: float, max_tokens: int, request_id: str
) -> str:
    """Stream one answer to the terminal and return it."""
    from shoal.serve.errors import ApiError
    from shoal.serve.protocol import ChatRequest

    body = ChatRequest(messages=messages, temperature=temperature, max_tokens=max_tokens)
    parts: list[str] = []
    try:
        job = await generator.job(body, generator.chat_prompt(messages), request_id)
        async for piece in generator.run(job):
            parts.append(piece.text)
            out.file.write(piece.text)
            out.file.flush()
    except ApiError as error:
        err.print(f"[red]{error.message}[/red]")
    out.print()
    return "".join(parts)


def input_line() -> str:
    return input("> " if sys.stdin.isatty() else "")


@app.command()
def pull(model: Model) -> None:
    """Fetch a model and print where it is.

    **Example**

        shoal pull smollm2-135m
    """
    out.print(str(fetch(model).path), soft_wrap=True)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """List the built-in models and whether they are on this machine.

    **Example**

        shoal models --json
    """
    from shoal.checkpoint.builtin import BUILTINS, cached_path

    rows = [
        {
            "name": model.name,
            "description": model.description,
            "bytes": model.size,
            "licence": model.licence,
            "path": None if (path := cached_path(model)) is None else str(path),
        }
        for model in BUILTINS.values()
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("model", "what it is", "size", "licence", "on this machine")
    for row in rows:
        here = row["path"] or "no: shoal pull " + str(row["name"])
        table.add_row(str(row["name"]), str(row["description"]), gib(row["bytes"]), str(row["licence"]), str(here))
    out.print(table)


@app.command()
def info(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context to reckon with.", show_default="model's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a model is and what of it fits in this machine's memory.

    **Examples**

        shoal info smollm2-135m

        shoal info ./Qwen3-8B --context 32768 --json
    """
    from shoal.checkpoint.resolve import load_spec
    from shoal.model_info import describe, print_description

    files = fetch(model)
    facts = describe(files.name, load_spec(files.path), context)
    if as_json:
        print_json(facts)
    else:
        print_description(facts, out)


# --- shared ---------------------------------------------------------------------------------------------------------


def run_with_engine(config: EngineConfig, work: Any) -> Any:
    """Fetch the model, start an engine, run `work(generator)`; Ctrl-C and SIGTERM end it cleanly."""
    from shoal.serve.session import open_generator

    files = fetch(config.model)

    async def main() -> Any:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with loading_bar() as report:
            opening = open_generator(config, files, on_progress=report)
            generator = await opening.__aenter__()
        try:
            return await work(generator)
        finally:
            await opening.__aexit__(None, None, None)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def fetch(model: str) -> ModelFiles:
    """Resolve a model, with a bar if it must be downloaded."""
    from shoal.checkpoint.resolve import resolve

    with loading_bar() as report:
        return resolve(model, progress=lambda what, done, total: report(what, done / max(1, total)))


@contextmanager
def loading_bar() -> Iterator[Any]:
    """`report(what, fraction)` shows a bar while something long goes on; it vanishes at 1.0 and at the end."""
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=err, transient=True)
    task = bar.add_task("", total=1.0, start=True)
    started = False

    def report(what: str, fraction: float) -> None:
        nonlocal started
        if fraction >= 1.0 and started:
            bar.stop()
            started = False
        elif fraction < 1.0:
            if not started:
                bar.start()
                started = True
            bar.update(task, description=what, completed=fraction)

    try:
        yield report
    finally:
        if started:
            bar.stop()


def gib(num_bytes: Any) -> str:
    value = float(num_bytes)
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def print_json(value: Any) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    sys.stdout.buffer.flush()


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Plans, serves and proves LLM inference."""


def main() -> None:
    """Entry point: a user's mistake is one line and a status, never a traceback."""
    from shoal.checkpoint.builtin import PullError
    from shoal.checkpoint.errors import CheckpointError, ModelNotFound
    from shoal.config import ConfigError

    expected: tuple[type[BaseException], ...] = (CheckpointError, ModelNotFound, PullError, ConfigError)
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        os._exit(130)  # threads waiting for input must not hold the exit up
    except Exception as error:
        if not isinstance(error, expected) and type(error).__name__ not in ("EngineStartError", "ListenError"):
            raise
        err.print(f"[red]shoal:[/red] {error}", soft_wrap=True)
        raise SystemExit(1) from None
