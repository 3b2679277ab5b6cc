"""Grammars in the engine: what each sequence may generate next, token by token."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shoal.engine.grammar import GrammarError, plain_message

if TYPE_CHECKING:
    import torch
    import xgrammar

TOKEN_CPU_SECONDS = 0.1
"""Processor time after which a single token is too expensive: the others in the batch wait for it. An ambiguous
grammar, such as ((a{1,50}){1,50}){1,50}, compiles at once and then costs a third more with every token."""


class GrammarState:
    """How far one sequence has come in its grammar. Raises GrammarError where it cannot go on."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, tokens: Sequence[int] = ()) -> None:
        """`tokens` were generated before: a sequence that comes back after a preemption resumes behind them."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._stop_ids = list(self._matcher.stop_token_ids)
        self._cpu_seconds = 0.0
        for token in tokens:
            self.accept(token)

    @property
    def is_terminated(self) -> bool:
        """An end-of-text token was accepted."""
        return bool(self._matcher.is_terminated())

    def fill_bitmask(self, bitmask_SW: torch.Tensor, row: int) -> None:
        """Set row `row` of an int32 CPU tensor (S, ceil(V / 32)): bit i of word w allows token 32 w + i.

        Once the grammar has ended only end-of-text tokens are allowed, so that the text stays a sentence of it even
        for a client that goes on past them.
        """
        if self.is_terminated:
            words = bitmask_SW[row].zero_().numpy().view("uint32")
            for token in self._stop_ids:
                words[token >> 5] |= 1 << (token & 31)
            return
        began = time.thread_time()
        self._matcher.fill_next_token_bitmask(bitmask_SW, row)
        self._cpu_seconds = time.thread_time() - began

    def accept(self, token: int) -> None:
        """Advance over a drawn token."""
        if self.is_terminated:
            if token not in self._stop_ids:
                raise GrammarError(f"token {token} follows the end of the grammar")
            return
        began = time.thread_time()
        if not self._matcher.accept_token(token):
            raise GrammarError(f"token {token} does not fit the grammar")
        seconds = self._cpu_seconds + time.thread_time() - began
        self._cpu_seconds = 0.0
        if seconds > TOKEN_CPU_SECONDS:
            raise GrammarError(
                f"the grammar is too ambiguous to follow: one token took {seconds * 1000:.0f} ms of processor time "
                f"and the limit is {TOKEN_CPU_SECONDS * 1000:.0f} ms; avoid repetitions within repetitions"
            )


class GrammarFactory:
    """Makes the states of an engine's sequences. Keeps the grammars used last: `n` sequences and preemptions share."""

    def __init__(self, load_info: Callable[[], xgrammar.TokenizerInfo], max_grammars: int = 32) -> None:
        """`load_info` is called once, by `prepare` or when the first grammar comes."""
        self._load_info = load_info
        self._info: xgrammar.TokenizerInfo | None = None
        self._max_grammars = max_grammars
        self._grammars: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()

    def prepare(self) -> None:
        """Do now what the first grammar would wait for. What fails is said to the one who asks for a grammar."""
        with contextlib.suppress(Exception):
            self._info = self._load_info()

    def state(self, compiled: str, tokens: Sequence[int] = ()) -> GrammarState:
        """A state behind `tokens`. Raises GrammarError if `compiled` is not a grammar for this vocabulary."""
        grammar = self._grammars.get(compiled)
        if grammar is None:
            grammar = self._read(compiled)
            self._grammars[compiled] = grammar
            while len(self._grammars) > self._max_grammars:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(compiled)
        return GrammarState(grammar, tokens)

    def _read(self, compiled: str) -> xgrammar.CompiledGrammar:
        import xgrammar

        if self._info is None:
            self._info = self._load_info()
        try:
            return xgrammar.CompiledGrammar.deserialize_json(compiled, self._info)
        except RuntimeError as error:
            raise GrammarError(f"the compiled grammar cannot be used by this engine: {plain_message(error)}") from error
