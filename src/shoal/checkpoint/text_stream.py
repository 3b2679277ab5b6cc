"""Token ids to text, as they come: no half characters, nothing taken back, stop strings held back until they are sure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from shoal.checkpoint.tokenizer import Tokenizer


class _ByteLevelDecoder:
    """Exact: the bytes of the tokens in a row, through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For tokenizers whose decoder looks at neighbours: the difference between two decodings of the last few tokens."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._ids: list[int] = []
        self._emitted = 0
        """Leading ids whose text is out; the rest are an unfinished character."""

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith("\ufffd") and len(self._ids) - self._emitted < 8:
            return ""  # at most 4 bytes make a character, so 8 tokens that do not are not going to
        # One token of context stays: the decoder may strip a leading space from the very first.
        self._ids = self._ids[max(0, self._emitted - 1) :] if not text else self._ids[-1:]
        self._emitted = len(self._ids)
        return text

    def _pending(self) -> str:
        whole = self._decode(self._ids)
        return whole[len(self._decode(self._ids[: self._emitted])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def flush(self) -> str:
        text = self._pending()
        self._emitted = len(self._ids)
        return text


class TextStream:
    """The text of one sequence. Once a stop string was found nothing more comes out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = (_ByteLevelDecoder if tokenizer.is_byte_level else _WindowDecoder)(tokenizer, skip)
        self._stop = [s for s in stop if s]
        self._include_stop = include_stop
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text, and the stop string that ended it if one did."""
        text = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            text += self._release(self._decoder.push(token_id))
        return text, self.stopped

    def flush(self) -> str:
        """What is left at the end of the sequence, held back or unfinished."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text + held

    def _release(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda hit: hit[0] + len(hit[1]))
            self._held = ""
            return text[: at + len(self.stopped)] if self._include_stop else text[:at]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
