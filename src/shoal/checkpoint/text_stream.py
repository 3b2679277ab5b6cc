"""Token ids to text, as they come: no half characters, nothing taken back, stop strings held back until sure."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from shoal.checkpoint.tokenizer import Tokenizer

_MOST_BYTES_OF_A_CHARACTER = 4


class _StopString:
    """Where a text stands with respect to one stop string (Knuth-Morris-Pratt: amortised O(1) a character)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters at the end of what was seen that begin the stop string: as many as possible."""
        self._shorter = [0] * len(text)
        """For a match of length n + 1: the next shorter one that ends at the same place."""
        length = 0
        for at in range(1, len(text)):
            while length and text[at] != text[length]:
                length = self._shorter[length - 1]
            length += text[at] == text[length]
            self._shorter[at] = length

    def push(self, character: str) -> bool:
        """Whether the stop string is complete with this character. Not to be called again after that."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


class TextStream:
    """The text of one sequence, piece by piece. Once a stop string was found nothing more comes out.

    Without stop strings the pieces together are what `Tokenizer.decode` gives for all ids; how ids are grouped into
    pushes changes neither the text nor where it stops. Of stop strings, the one that is complete first counts; of those
    that are complete at the same character, the longest.

    With `prompt_ids` the text continues that prompt: a leading space is kept, and a character that the prompt's last
    token left unfinished is completed. Without, it stands by itself, as an answer does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] = (),
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stops = [_StopString(text) for text in dict.fromkeys(stop) if text]
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_leading_space and all(i in self._skip for i in prompt_ids)
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped: str | None = None
        """The stop string that ended the text."""
        self.num_tokens = 0
        """That the text is made of: what was pushed, without what came behind a stop string."""
        context = [i for i in prompt_ids[-2 * _MOST_BYTES_OF_A_CHARACTER :] if i not in self._skip]
        for token_id in context[-_MOST_BYTES_OF_A_CHARACTER:]:
            self._decode(token_id)

    def push(self, token_ids: Iterable[int]) -> tuple[str, str | None]:
        """New text, and the stop string that ended it if one did."""
        pieces = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            pieces.append(self._release(self._decode(token_id)))
        return "".join(pieces), self.stopped

    def flush(self) -> str:
        """What is left at the end of the sequence: text held back, and U+FFFD for an unfinished character.

        `stopped` is set if that completes a stop string.
        """
        if self.stopped is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _release(self, piece: str) -> str:
        """The part of the text so far that no stop string can claim any more."""
        if not self._stops:
            return piece
        text = self._held + piece
        for at, character in enumerate(piece, len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.push(character)]
            if complete:
                self.stopped = max(complete, key=len)
                self._held = ""
                return text[: at if self._include_stop else at - len(self.stopped)]
        keep = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
