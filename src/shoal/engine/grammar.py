"""Structured output: grammars compiled in a process that can be killed.

    front                          helper process (python -m shoal.engine.grammar)        engine
    GrammarCompiler.compile  --->  xgrammar compiles, within a time and a size limit
                             <---  compiled grammar as JSON
    Request.sampling.grammar --------------------------------------------------------->   grammar_state.GrammarFactory
                                                                                          fill_bitmask, accept

A schema of a few kilobytes can take minutes and gigabytes to compile, in native code that nothing can interrupt. So
compilation has a process of its own: past its time it is killed and a new one is started. Other grammars compile at
once and become ever more expensive with each token, because they are ambiguous: `grammar_state` stops those.

xgrammar brings torch and transformers with it (seconds to import), so it is imported where it is first needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import msgspec

from shoal.core.types import GrammarKind

if TYPE_CHECKING:
    import xgrammar

MAX_SOURCE_BYTES = 64 * 1024
MAX_NESTING = 64
"""Of a schema's JSON, and of a pattern's or grammar's brackets."""
MAX_COMPILED_BYTES = 16 * 1024 * 1024
"""Of the compiled form. The engine reads it back at about 50 MB/s, between two steps."""
COMPILE_SECONDS = 2.0

_HELPER_DATA_BYTES = 3 * 1024**3
_LENGTH = struct.Struct("<I")


class GrammarError(ValueError):
    """The grammar is invalid, too large, or cannot be followed. The message is for the client."""


class GrammarTimeout(GrammarError):
    """Compiling took longer than the limit."""


# --- vocabulary -----------------------------------------------------------------------------------------------------


class Vocabulary(Protocol):
    """What a tokenizer must say of its tokens; `shoal.checkpoint.tokenizer.Tokenizer` does."""

    @property
    def special_ids(self) -> Iterable[int]:
        """Control tokens: they are no text, so no grammar may produce them."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text; b"" for an id without a token."""


def tokenizer_info(tokenizer: Vocabulary, logits_vocab_size: int, stop_ids: Sequence[int]) -> xgrammar.TokenizerInfo:
    """xgrammar's view of a vocabulary: each token's bytes, and the end-of-text ids that may end a grammar.

    `logits_vocab_size` is the width of the model's logits, which may be padded beyond the tokenizer's vocabulary.
    Front and engine must build it from the same arguments: a compiled grammar fits no other.
    """
    import xgrammar

    if not stop_ids:
        raise GrammarError("structured output needs a model with an end-of-text token, and this one names none")
    special = set(tokenizer.special_ids) | set(stop_ids)
    # An empty token is one that xgrammar never allows, which is right for control tokens and for padding.
    pieces = [b"" if token_id in special else tokenizer.token_bytes(token_id) for token_id in range(logits_vocab_size)]
    stops = sorted({token_id for token_id in stop_ids if token_id < logits_vocab_size})
    return xgrammar.TokenizerInfo(
        pieces, xgrammar.VocabType.RAW, vocab_size=logits_vocab_size, stop_token_ids=stops, add_prefix_space=False
    )


# --- checks before compiling ----------------------------------------------------------------------------------------


def check_source(kind: GrammarKind, source: str) -> None:
    """Refuse, in well under 10 ms, what needs no compiler to refuse. Raises GrammarError."""
    if kind == "json_object":
        return
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"the {kind} grammar contains a lone surrogate, which is no text") from None
    if size > MAX_SOURCE_BYTES:
        raise GrammarError(f"the {kind} grammar has {size} bytes; the limit is {MAX_SOURCE_BYTES}")
    if kind == "choice":
        _read_choices(source)
    elif kind == "json_schema":
        schema = _read_json(kind, source)
        if not isinstance(schema, (dict, bool)):
            raise GrammarError(f"a JSON schema is an object, got {type(schema).__name__}")
        if _depth(schema) > MAX_NESTING:
            raise GrammarError(f"the JSON schema is nested deeper than {MAX_NESTING} levels")
    elif _bracket_depth(source) > MAX_NESTING:
        raise GrammarError(f"the {kind} grammar has brackets nested deeper than {MAX_NESTING} levels")


def _read_json(kind: GrammarKind, source: str) -> object:
    try:
        return msgspec.json.decode(source)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(f"the {kind} grammar is not valid JSON: {error}") from None


def _read_choices(source: str) -> list[str]:
    choices = _read_json("choice", source)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("choices must be a JSON list of one or more non-empty strings")
    return choices


def _depth(value: object) -> int:
    """Nesting of a JSON value, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _bracket_depth(source: str) -> int:
    """Nesting of round brackets, those in quotes or escaped included: an upper limit is all that is wanted."""
    depth = deepest = 0
    for bracket in re.findall(r"[()]", source):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


# --- in the front ---------------------------------------------------------------------------------------------------


class _Job(msgspec.Struct, array_like=True):
    kind: GrammarKind
    source: str


class _Reply(msgspec.Struct, array_like=True):
    """A compiled grammar, or why there is none."""

    compiled: str | None
    error: str | None


class GrammarCompiler:
    """Compiles grammars in one helper process, one at a time; remembers what it compiled, and what it refused.

    For one asyncio loop. The helper is started by `start` or the first `compile`, and dies with this process.
    """

    def __init__(
        self, vocabulary: str, *, seconds: float = COMPILE_SECONDS, cache_bytes: int = 64 * 1024 * 1024
    ) -> None:
        """`vocabulary` is a serialised `tokenizer_info`, or `vocabulary_of_checkpoint`: no xgrammar in this process."""
        self._vocabulary = vocabulary.encode()
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[str, str], str | GrammarError] = OrderedDict()
        self._pending: dict[tuple[str, str], asyncio.Task[str]] = {}
        self._lock = asyncio.Lock()
        self._helper: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the helper, while it runs."""
        return None if self._helper is None or self._helper.returncode is not None else self._helper.pid

    async def start(self) -> None:
        """Start the helper now and wait until it is ready, so that the first grammar does not pay for it."""
        async with self._lock:
            await self._running_helper()

    async def compile(self, kind: GrammarKind, source: str) -> str:
        """The compiled grammar for `shoal.core.types.Grammar`.

        Raises GrammarError if it is invalid or too large, GrammarTimeout if compiling took longer than the limit.
        Requests for the same grammar share one compilation; one that is cancelled does not disturb the others.
        """
        if kind == "json_object":
            source = ""
        check_source(kind, source)
        key = (kind, source)
        if key not in self._cache:
            task = self._pending.get(key)
            if task is None:
                task = self._pending[key] = asyncio.create_task(self._compile_and_remember(kind, source))
                task.add_done_callback(lambda done: self._forget(key, done))
            return await asyncio.shield(task)
        self._cache.move_to_end(key)
        known = self._cache[key]
        if isinstance(known, GrammarError):
            raise type(known)(str(known))
        return known

    async def close(self) -> None:
        """Kill the helper. Compilations that wait for it end with GrammarError."""
        for task in list(self._pending.values()):
            task.cancel()
        await self._kill_helper()

    def _forget(self, key: tuple[str, str], done: asyncio.Task[str]) -> None:
        self._pending.pop(key, None)
        if not done.cancelled():
            # Marks the exception as seen: every client that waited for it may have left.
            done.exception()

    async def _compile_and_remember(self, kind: GrammarKind, source: str) -> str:
        known: str | GrammarError
        try:
            async with self._lock:
                known = await self._compile(_Job(kind, source))
        except GrammarError as error:
            known = error
        self._cache[kind, source] = known
        self._cached_bytes += _entry_bytes(source, known)
        while self._cached_bytes > self._cache_bytes:
            (_, old_source), old = self._cache.popitem(last=False)
            self._cached_bytes -= _entry_bytes(old_source, old)
        if isinstance(known, GrammarError):
            raise known
        return known

    async def _compile(self, job: _Job) -> str:
        helper = await self._running_helper()
        try:
            async with asyncio.timeout(self._seconds):
                await _write_frame(helper, msgspec.msgpack.encode(job))
                reply = msgspec.msgpack.decode(await _read_frame(helper), type=_Reply)
        except TimeoutError:
            await self._kill_helper()
            raise GrammarTimeout(
                f"compiling the {job.kind} grammar took longer than {self._seconds:g} s; simplify it"
            ) from None
        except (asyncio.IncompleteReadError, OSError):
            await self._kill_helper()
            raise GrammarError(f"compiling the {job.kind} grammar needed too much memory; simplify it") from None
        except BaseException:
            # Cancelled half-way: an answer to this job must not be taken for the next one's.
            await self._kill_helper()
            raise
        if reply.compiled is None:
            raise GrammarError(f"invalid {job.kind} grammar: {reply.error}")
        return reply.compiled

    async def _running_helper(self) -> asyncio.subprocess.Process:
        """The helper, started if need be. The caller holds the lock."""
        if self._helper is not None and self._helper.returncode is None:
            return self._helper
        command = (sys.executable, "-m", __name__, str(os.getpid()), repr(self._seconds))
        self._helper = helper = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        try:
            await _write_frame(helper, self._vocabulary)
            await _read_frame(helper)
        except (asyncio.IncompleteReadError, OSError):
            await self._kill_helper()
            raise GrammarError("structured output is not available: the grammar compiler did not start") from None
        except BaseException:
            await self._kill_helper()
            raise
        return helper

    async def _kill_helper(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            helper.kill()
        await helper.wait()


def _entry_bytes(source: str, known: str | GrammarError) -> int:
    return len(source) + len(known if isinstance(known, str) else str(known)) + 256


async def _write_frame(helper: asyncio.subprocess.Process, payload: bytes) -> None:
    if helper.stdin is None:
        raise OSError("the helper has no standard input")
    helper.stdin.write(_LENGTH.pack(len(payload)) + payload)
    await helper.stdin.drain()


async def _read_frame(helper: asyncio.subprocess.Process) -> bytes:
    if helper.stdout is None:
        raise OSError("the helper has no standard output")
    (length,) = _LENGTH.unpack(await helper.stdout.readexactly(_LENGTH.size))
    return await helper.stdout.readexactly(length)


# --- in the helper process ------------------------------------------------------------------------------------------


def compile_grammar(kind: GrammarKind, source: str, compiler: xgrammar.GrammarCompiler) -> str:
    """Compile and serialise. Raises GrammarError. May take any time and memory: call it where it can be killed."""
    try:
        compiled = _compile_kind(kind, source, compiler)
        # Serialising takes several times this much memory again, so the size is checked before.
        if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
            raise GrammarError("it is too large once compiled; simplify it")
        text: str = compiled.serialize_json()
    except (RuntimeError, MemoryError) as error:
        raise GrammarError(plain_message(error)) from error
    if len(text) > MAX_COMPILED_BYTES:
        raise GrammarError("it is too large once compiled; simplify it")
    return text


def _compile_kind(kind: GrammarKind, source: str, compiler: xgrammar.GrammarCompiler) -> xgrammar.CompiledGrammar:
    if kind in ("json_schema", "json_object"):
        # One line, a space after each comma and colon. Free white space would let a weak model write blanks for ever.
        schema = source if kind == "json_schema" else '{"type": "object", "additionalProperties": true}'
        return compiler.compile_json_schema(schema, any_whitespace=False)
    if kind == "regex":
        return compiler.compile_regex(source)
    if kind == "choice":
        return compiler.compile_grammar("root ::= " + " | ".join(_quote(choice) for choice in _read_choices(source)))
    return compiler.compile_grammar(source)


def _quote(text: str) -> str:
    """A literal of xgrammar's EBNF."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'


def plain_message(error: BaseException) -> str:
    """xgrammar's message without its time stamp and source position."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip() or type(error).__name__


def _read_exactly(stream: BinaryIO) -> bytes:
    """One frame, or SystemExit where the parent has closed its end."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise SystemExit(0)
    (length,) = _LENGTH.unpack(header)
    payload = stream.read(length)
    if len(payload) < length:
        raise SystemExit(0)
    return payload


def _send(stream: BinaryIO, payload: bytes) -> None:
    stream.write(_LENGTH.pack(len(payload)) + payload)
    stream.flush()


def _bind_to_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent dies, and limit its memory. Linux; elsewhere the alarm does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform != "linux":
        return
    import resource

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        # The parent died before the line above took effect.
        raise SystemExit(0)
    resource.setrlimit(resource.RLIMIT_DATA, (_HELPER_DATA_BYTES, _HELPER_DATA_BYTES))


class _CheckpointVocabulary(msgspec.Struct, forbid_unknown_fields=True):
    checkpoint: str
    logits_vocab_size: int


def vocabulary_of_checkpoint(path: str, logits_vocab_size: int) -> str:
    """For GrammarCompiler: let the helper read the tokenizer itself, as the engine does."""
    return msgspec.json.encode(_CheckpointVocabulary(path, logits_vocab_size)).decode()


def _load_vocabulary(message: bytes) -> xgrammar.TokenizerInfo:
    import xgrammar

    try:
        source = msgspec.json.decode(message, type=_CheckpointVocabulary)
    except msgspec.ValidationError:
        return xgrammar.TokenizerInfo.deserialize_json(message.decode())
    from shoal.checkpoint.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source.checkpoint)
    return tokenizer_info(tokenizer, source.logits_vocab_size, tokenizer.eos_ids)


def main(arguments: list[str]) -> None:
    """The helper: read the vocabulary, say that it is ready, then answer one job after the other until end of input."""
    parent_pid, seconds = int(arguments[0]), float(arguments[1])
    _bind_to_parent(parent_pid)
    jobs, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints must not end up between two replies.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    vocabulary = _read_exactly(jobs)
    import xgrammar

    info = _load_vocabulary(vocabulary)
    compiler: Any = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    # Up to here messages help to see why it did not start; from here on clients' grammars would fill the log.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    _send(replies, b"ready")
    while True:
        job = msgspec.msgpack.decode(_read_exactly(jobs), type=_Job)
        # The parent kills a slow job. Should it be gone, the kernel does: native code heeds nothing else.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        try:
            reply = _Reply(compile_grammar(job.kind, job.source, compiler), None)
        except GrammarError as error:
            reply = _Reply(None, str(error))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _send(replies, msgspec.msgpack.encode(reply))


if __name__ == "__main__":
    main(sys.argv[1:])
