"""A vocabulary small enough to read: printable characters, a few longer tokens, and control tokens at the end."""

from shoal.engine.grammar import tokenizer_info


class TinyVocabulary:
    """Ids 0..94 are the characters 32..126, then `words`, then the special tokens <pad> and <end>."""

    words = (b'{"', b'":', b" true", b"ab", "é".encode(), b"\n")

    def __init__(self):
        self.pieces = [bytes([code]) for code in range(32, 127)] + list(self.words) + [b"<pad>", b"<end>"]
        self.vocab_size = len(self.pieces)
        self.eos_id = self.vocab_size - 1
        self.special_ids = (self.eos_id - 1, self.eos_id)

    def token_bytes(self, token_id):
        return self.pieces[token_id] if token_id < self.vocab_size else b""

    def encode(self, text):
        """One token a character."""
        return [self.pieces.index(char.encode()) for char in text]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids if i not in self.special_ids).decode(errors="replace")

    def info(self, logits_vocab_size=None):
        return tokenizer_info(self, logits_vocab_size or self.vocab_size, [self.eos_id])
