"""Grammars: checks that cost nothing, a compiler that can be killed, states that follow what is drawn."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import xgrammar

from shoal.engine import grammar_state
from shoal.engine.grammar import (
    MAX_SOURCE_BYTES,
    GrammarCompiler,
    GrammarError,
    GrammarTimeout,
    check_source,
    compile_grammar,
)
from shoal.engine.grammar_state import GrammarFactory
from tests.engine.vocabulary import TinyVocabulary

VOCABULARY = TinyVocabulary()
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
# Every alternative overlaps with all others: 24 KB of pattern that compile for about a minute.
EXPLOSIVE = "(" + "|".join(f"a{{{i},{i + 500}}}[a-z]*b" for i in range(400)) + ")*"


@pytest.fixture(scope="module")
def compiler():
    return xgrammar.GrammarCompiler(VOCABULARY.info(), max_threads=1, cache_enabled=False)


@pytest.fixture(scope="module")
def factory():
    return GrammarFactory(VOCABULARY.info)


def allowed(state, vocab_size=VOCABULARY.vocab_size):
    """Ids that the state allows next."""
    bitmask = torch.zeros(2, -(-vocab_size // 32), dtype=torch.int32)
    state.fill_bitmask(bitmask, 1)
    bits = np.unpackbits(bitmask[1].numpy().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:vocab_size]).tolist())


def accepts(state, text):
    """Whether the text, to its end, is a sentence of the grammar."""
    for token in VOCABULARY.encode(text):
        if token not in allowed(state):
            return False
        state.accept(token)
    return VOCABULARY.eos_id in allowed(state)


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (
            "json_schema",
            SCHEMA,
            ['{"a": 1, "b": "x"}', '{"a": -20, "b": "y"}'],
            ['{"a": 1}', '{"a": "1"}', '{"b": "x"}', '{ "a": 1, "b": "x"}'],
        ),
        ("json_object", "", ["{}", '{"q": [1, {"z": null}]}'], ["[]", "3", '{"q"}']),
        ("regex", r"[a-c]{2}\d+", ["ab1", "cc123"], ["a1", "ab", "abc1"]),
        ("choice", '["yes", "no \\"q\\" {x}", "no"]', ["yes", 'no "q" {x}', "no"], ["ye", "maybe", "yesno"]),
        ("ebnf", 'root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "()"]),
    ],
)
def test_each_kind_admits_its_sentences_and_no_others(kind, source, good, bad, compiler, factory):
    compiled = compile_grammar(kind, source, compiler)
    for text in good:
        assert accepts(factory.state(compiled), text), text
    for text in bad:
        assert not accepts(factory.state(compiled), text), text


def test_tokens_of_several_characters_and_control_tokens(compiler, factory):
    """A control token's name is no text, though its characters would fit; nor is padding beyond the vocabulary."""
    state = factory.state(compile_grammar("regex", "[^0]*", compiler))
    everything = set(range(VOCABULARY.vocab_size))
    assert allowed(state) == everything - {VOCABULARY.encode("0")[0], VOCABULARY.special_ids[0]}
    padded = VOCABULARY.vocab_size + 40
    info = VOCABULARY.info(padded)
    compiled = compile_grammar("regex", "[^0]*", xgrammar.GrammarCompiler(info, max_threads=1))
    assert max(allowed(GrammarFactory(lambda: info).state(compiled), padded)) == VOCABULARY.eos_id


def test_after_the_end_only_end_of_text_can_be_drawn(compiler, factory):
    state = factory.state(compile_grammar("choice", '["ab"]', compiler))
    for token in VOCABULARY.encode("ab"):
        state.accept(token)
    assert allowed(state) == {VOCABULARY.eos_id} and not state.is_terminated
    state.accept(VOCABULARY.eos_id)
    assert allowed(state) == {VOCABULARY.eos_id} and state.is_terminated
    state.accept(VOCABULARY.eos_id)
    with pytest.raises(GrammarError, match="follows the end"):
        state.accept(3)


def test_a_state_resumes_behind_what_was_generated(compiler, factory):
    compiled = compile_grammar("json_schema", SCHEMA, compiler)
    tokens = VOCABULARY.encode('{"a": 12, "b')
    state = factory.state(compiled)
    for done, token in enumerate(tokens):
        assert allowed(factory.state(compiled, tokens[:done])) == allowed(state)
        state.accept(token)
    with pytest.raises(GrammarError, match="does not fit"):
        factory.state(compiled, VOCABULARY.encode("[1]"))


def test_a_grammar_that_becomes_too_expensive_is_stopped(compiler, factory, monkeypatch):
    """Compiles in a millisecond, then costs more with every token. The limit is lowered to keep the test short."""
    monkeypatch.setattr(grammar_state, "TOKEN_CPU_SECONDS", 0.01)
    state = factory.state(compile_grammar("regex", "((a{1,50}){1,50}){1,50}b", compiler))
    token = VOCABULARY.encode("a")[0]
    with pytest.raises(GrammarError, match="too ambiguous"):
        for _ in range(60):
            allowed(state)
            state.accept(token)


def test_a_grammar_for_another_vocabulary_is_refused(compiler):
    compiled = compile_grammar("choice", '["ab"]', compiler)
    with pytest.raises(GrammarError, match="cannot be used by this engine"):
        GrammarFactory(lambda: VOCABULARY.info(500)).state(compiled)


def test_the_factory_reads_a_grammar_and_the_vocabulary_once(compiler):
    loads = []

    def load():
        loads.append(1)
        return VOCABULARY.info()

    factory = GrammarFactory(load, max_grammars=2)
    compiled = [compile_grammar("choice", f'["{text}"]', compiler) for text in ("a", "b", "c")]
    assert not loads
    for text in (compiled[0], compiled[1], compiled[0], compiled[2], compiled[0], compiled[1]):
        factory.state(text)
    assert len(loads) == 1


def test_a_prepared_factory_has_the_vocabulary_before_the_first_grammar(compiler):
    loads = []

    def load():
        loads.append(1)
        return VOCABULARY.info()

    factory = GrammarFactory(load)
    factory.prepare()
    assert len(loads) == 1
    factory.state(compile_grammar("choice", '["a"]', compiler))
    assert len(loads) == 1


def test_what_cannot_be_prepared_is_said_to_who_asks_for_a_grammar(compiler):
    def load():
        raise GrammarError("no end-of-text token")

    factory = GrammarFactory(load)
    factory.prepare()
    with pytest.raises(GrammarError, match="no end-of-text"):
        factory.state(compile_grammar("choice", '["a"]', compiler))


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "a" * (MAX_SOURCE_BYTES + 1), "bytes"),
        ("json_schema", "[" * 60_000, "JSON"),
        ("json_schema", '{"a":' * 80 + "1" + "}" * 80, "nested deeper"),
        ("json_schema", '{"type": ', "not valid JSON"),
        ("json_schema", "[1]", "object"),
        ("regex", "(" * 65 + "a" + ")" * 65, "nested deeper"),
        ("ebnf", "root ::= " + "(" * 65 + '"a"' + ")" * 65, "nested deeper"),
        ("choice", '"a"', "list"),
        ("choice", "[]", "list"),
        ("choice", '["a", ""]', "non-empty"),
        ("regex", "\ud800", "surrogate"),
    ],
)
def test_what_needs_no_compiler_to_refuse(kind, source, message):
    with pytest.raises(GrammarError, match=message):
        check_source(kind, source)


def test_a_grammar_that_is_too_large_once_compiled(compiler):
    leaf = {"type": "string"}
    for level in range(4):
        leaf = {"type": "object", "properties": {f"p{level}{i}": leaf for i in range(4)}}
    source = json.dumps(leaf)
    with pytest.raises(GrammarError, match="too large once compiled"):
        compile_grammar("json_schema", source, compiler)


# --- the helper process ---------------------------------------------------------------------------------------------


def is_alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_compiler_process_compiles_refuses_and_is_killed():
    """One helper for all of it, since it takes seconds to start."""

    async def scenario():
        compiler = GrammarCompiler(VOCABULARY.info().serialize_json(), seconds=0.8)
        assert compiler.pid is None
        await compiler.start()
        first = compiler.pid
        # Valid, and the same text as compiled here.
        compiled = await compiler.compile("json_schema", SCHEMA)
        assert accepts(GrammarFactory(VOCABULARY.info).state(compiled), '{"a": 1, "b": "x"}')
        assert await compiler.compile("json_schema", SCHEMA) is compiled, "found in the cache"
        assert await compiler.compile("json_object", "whatever") == await compiler.compile("json_object", "")
        # Invalid: the message says why, without the library's own file names, and the helper lives on.
        for kind, source, message in (
            ("regex", "(a", "invalid regex grammar: Regex parsing error"),
            ("json_schema", '{"type": "nope"}', 'Unsupported type "nope"'),
            ("ebnf", "root ::= missing", 'Rule "missing" is not defined'),
        ):
            with pytest.raises(GrammarError, match=message) as caught:
                await compiler.compile(kind, source)
            assert ".cc" not in str(caught.value) and not isinstance(caught.value, GrammarTimeout)
        assert compiler.pid == first
        # A client that leaves does not disturb the others that wait for the same grammar, nor the next ones.
        waiting = [asyncio.create_task(compiler.compile("regex", "[ab]+c")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert (await asyncio.gather(*waiting[1:]))[0] == await compiler.compile("regex", "[ab]+c")
        assert compiler.pid == first
        # Explosive: killed at the limit, and remembered.
        with pytest.raises(GrammarTimeout, match=r"longer than 0\.8 s"):
            await compiler.compile("regex", EXPLOSIVE)
        assert not is_alive(first) and compiler.pid is None
        with pytest.raises(GrammarTimeout):
            await compiler.compile("regex", EXPLOSIVE)
        assert compiler.pid is None, "not tried again"
        # The next grammar gets a new helper.
        assert await compiler.compile("regex", "x+")
        second = compiler.pid
        assert second not in (None, first)
        await compiler.close()
        assert not is_alive(second)

    asyncio.run(scenario())


def test_the_cache_is_bounded_by_bytes(monkeypatch):
    async def scenario():
        compiler = GrammarCompiler("", cache_bytes=3000)
        compiled = []

        async def pretend(job):
            compiled.append(job.source)
            return "x" * 1000

        monkeypatch.setattr(compiler, "_compile", pretend)
        for source in ("a", "b", "a", "c", "b", "a", "c"):
            await compiler.compile("regex", source)
        return compiled

    # Two fit: "a" is used last when "c" comes, so "b" goes, and so on.
    assert asyncio.run(scenario()) == ["a", "b", "c", "b", "a", "c"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "compiling"])
def test_the_helper_dies_with_a_killed_parent(busy):
    """SIGKILL leaves the parent no chance to clean up; the helper may be deep in native code."""
    parent_code = (
        "import asyncio, sys\n"
        "from shoal.engine.grammar import GrammarCompiler\n"
        "from tests.engine.test_grammar import EXPLOSIVE, VOCABULARY\n"
        "async def main():\n"
        "    compiler = GrammarCompiler(VOCABULARY.info().serialize_json(), seconds=60)\n"
        "    await compiler.start()\n"
        "    print(compiler.pid, flush=True)\n"
        f"    await (compiler.compile('regex', EXPLOSIVE) if {busy} else asyncio.sleep(60))\n"
        "asyncio.run(main())\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True, env=environment)
    helper = int(parent.stdout.readline())
    try:
        assert is_alive(helper)
        if busy:
            before = cpu_ticks(helper)
            wait_until(lambda: cpu_ticks(helper) > before + 20)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        wait_until(lambda: not is_alive(helper))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rsplit(")", 1)[1].split()[11])


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
