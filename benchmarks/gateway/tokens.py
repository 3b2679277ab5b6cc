"""What mock engines say: token ids that follow from all tokens before them, so that every transcript can be checked.

The next token is a function of the checksum of the whole sequence so far, prompt and output. So every replica says the
same, a prompt with a part of its answer appended is answered with the rest, and a token that is lost or comes twice on
the way changes nothing that an engine says: the receiver sees it by comparing.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

from shoal.checkpoint.resolve import resolve
from shoal.checkpoint.tokenizer import Tokenizer, load_tokenizer

FIRST_ID, LAST_ID = 1000, 40000
"""Of the ids that may be said: ordinary ones of any common vocabulary, end-of-text is none of them."""
_ID_BYTES = 4


def state_of(tokens: Sequence[int]) -> int:
    """What the next token depends on."""
    return crc32(array("I", tokens))


def state_after(state: int, token: int) -> int:
    return crc32(token.to_bytes(_ID_BYTES, sys.byteorder), state)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids that mocks say, each with its text: plain words, so that text is the same however it is cut."""

    ids: list[int]
    texts: dict[int, str]
    tokenizer: Tokenizer | None
    path: str
    """Where the tokenizer lies, for `root` of /v1/models; empty without one."""

    def next(self, state: int) -> int:
        # A checksum is linear in its input: multiplied and shifted, neighbouring states have unrelated tokens.
        return self.ids[((state * 2654435761 & 0xFFFFFFFF) >> 5) % len(self.ids)]

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """What every mock says after these."""
        said, state = [], state_of(tokens)
        for _ in range(count):
            said.append(self.next(state))
            state = state_after(state, said[-1])
        return said

    def text(self, tokens: Iterable[int]) -> str:
        return "".join(self.texts[token] for token in tokens)

    @lru_cache(maxsize=4096)  # noqa: B019 - there is one vocabulary, and it lives as long as the process
    def encode(self, text: str) -> list[int]:
        """As a server of the model would; bytes without a tokenizer. Cached: it is most of what a request costs."""
        return list(text.encode()) if self.tokenizer is None else self.tokenizer.encode(text)

    def encode_chat(self, messages: list[dict[str, object]]) -> list[int]:
        return self._encode_chat(json.dumps(messages))

    @lru_cache(maxsize=4096)  # noqa: B019
    def _encode_chat(self, messages: str) -> list[int]:
        if self.tokenizer is None:
            return self.encode(messages)
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(json.loads(messages)), add_special_tokens=False)


@lru_cache(maxsize=2)
def vocabulary(model: str) -> Vocabulary:
    """Of a model (built-in name or path), whose tokenizer alone is read; made up if the name is empty."""
    if not model:
        ids = list(range(FIRST_ID, LAST_ID))
        return Vocabulary(ids, {token: f" t{token}" for token in ids}, None, "")
    path = resolve(model).path
    tokenizer = load_tokenizer(path)
    texts = {token: tokenizer.token_bytes(token).decode("ascii", "ignore") for token in range(FIRST_ID, LAST_ID)}
    texts = {token: text for token, text in texts.items() if text.startswith(" ") and text[1:].isalpha()}
    return Vocabulary(list(texts), texts, tokenizer, str(path))


@dataclass(frozen=True)
class Difference:
    """How a transcript is not what it should be. All zero and not unequal: exact."""

    missing: int = 0
    duplicate: int = 0
    """Tokens that came more often than they should, or should not have come at all."""
    unequal: bool = False


def compare(received: list[int], expected: list[int]) -> Difference:
    if received == expected:
        return Difference()
    got, due = Counter(received), Counter(expected)
    return Difference((due - got).total(), (got - due).total(), True)
