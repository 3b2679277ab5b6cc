"""Text to token ids and back, and chat templates, for a checkpoint directory or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.checkpoint.chat_template import ChatTemplate
from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
"""Special tokens by which chat models end their turn; files do not always list them as end-of-text."""


class Tokenizer:
    """Raises nothing on any text: lone surrogates, which no encoding has, become U+FFFD."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int],
        bos_id: int | None,
        template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self.eos_ids = list(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.template = template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.is_byte_level = _is_byte_level(backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens spelled out in the text become their ids, as chat templates need."""
        clean = text.encode("utf-8", "replace").decode("utf-8") if _has_surrogates(text) else text
        return list(self._backend.encode(clean, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; b"" for an id without a token. Special tokens stand for their name."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self.is_byte_level:
            return b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text, special tokens spelled out. Raises TemplateError."""
        if self.template is None:
            from shoal.checkpoint.chat_template import TemplateError

            raise TemplateError("this model has no chat template: use /v1/completions")
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt, **variables)

    def to_json(self) -> str:
        """The tokenizer in the `tokenizer.json` form."""
        return str(self._backend.to_str())


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    decoder = msgspec.json.decode(backend.to_str()).get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))]
    return "ByteLevel" in kinds


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes (github.com/openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): bytes([b]) for b in printable}
    others = [b for b in range(256) if b not in printable]
    return table | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Of a checkpoint directory with `tokenizer.json`, or of a `.gguf` file. Raises CheckpointError."""
    path = Path(path)
    return _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)


# --- Hugging Face files ---------------------------------------------------------------------------------------------


def _from_directory(path: Path) -> Tokenizer:
    import tokenizers

    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(file, "is missing; shoal reads fast tokenizers only (tokenizer.json)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise CheckpointError(file, f"is not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = _json(path / "tokenizer_config.json")
    model = _json(path / "config.json")
    generation = _json(path / "generation_config.json")
    names = {key: _token_name(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    eos: list[int] = []
    for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
        eos += value if isinstance(value, list) else [] if value is None else [value]
    found = backend.token_to_id(names["eos_token"]) if names["eos_token"] else None
    eos += [] if found is None else [found]
    bos = model.get("bos_token_id")
    if names["bos_token"]:
        bos = backend.token_to_id(names["bos_token"])
    source = _template_source(path, settings)
    template = None if source is None else ChatTemplate(source, {k: v for k, v in names.items() if v})
    return Tokenizer(backend, eos_ids=eos + _turn_ends(backend), bos_id=bos, template=template)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from None


def _token_name(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _template_source(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def _turn_ends(backend: tokenizers.Tokenizer) -> list[int]:
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return [added[name] for name in TURN_ENDS if name in added]


# --- GGUF -----------------------------------------------------------------------------------------------------------

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": _LLAMA3_SPLIT, "llama3": _LLAMA3_SPLIT, "llama-v3": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}
_GPT2_LIKE = ("gpt-2", "default", "mpt", "olmo")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def _from_gguf(path: Path) -> Tokenizer:
    file = GGUFFile(path)
    metadata = file.metadata
    file.close()
    try:
        kind = metadata["tokenizer.ggml.model"]
        if kind == "gpt2":
            backend = _byte_level_bpe(path, metadata)
        elif kind == "llama":
            backend = _sentencepiece_bpe(metadata)
        else:
            raise CheckpointError(path, f"tokenizer model {kind!r} is not supported; supported: gpt2, llama")
    except KeyError as missing:
        raise CheckpointError(path, f"the metadata lacks {missing.args[0]!r}") from None
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
    }
    source = metadata.get("tokenizer.chat_template")
    names = {name: tokens[i] for name, i in ids.items() if i is not None}
    eos = [i for i in (ids["eos_token"], metadata.get("tokenizer.ggml.eot_token_id")) if i is not None]
    return Tokenizer(
        backend,
        eos_ids=eos + _turn_ends(backend),
        bos_id=ids["bos_token"],
        template=None if source is None else ChatTemplate(source, names),
    )


def _byte_level_bpe(path: Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    is_llama3 = _SPLITS.get(pre) == _LLAMA3_SPLIT
    backend = Tokenizer(models.BPE(vocab=_vocab(tokens), merges=merges, ignore_merges=is_llama3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre == "smollm":
        # Digits are split one by one before anything else; a conversion that leaves this out gives other numbers.
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
    elif pre in _GPT2_LIKE:
        backend.pre_tokenizer = byte_level
    else:
        supported = ", ".join(["smollm", *_SPLITS, *_GPT2_LIKE])
        raise CheckpointError(path, f"pre-tokenizer {pre!r} is not supported; supported: {supported}")
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, metadata, default_bos=False)
    return backend


def _sentencepiece_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = _vocab(tokens)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(vocab, metadata["tokenizer.ggml.scores"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    decode = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(decode)
    _add_special_tokens(backend, metadata, default_bos=True)
    return backend


def _vocab(tokens: list[str]) -> dict[str, int]:
    """A name that stands twice keeps its first id; the second gets one that no text can spell."""
    vocab: dict[str, int] = {}
    for number, token in enumerate(tokens):
        name = token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        vocab[name if name not in vocab else f"\x00{number}\x00{name}"] = number
    return vocab


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever adjacent pair yields the best-scored token: the same as merges in that order."""
    pairs = []
    for token, number in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                pairs.append((-scores[number], vocab[left], vocab[right], left, right))
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]


def _add_special_tokens(backend: tokenizers.Tokenizer, metadata: dict[str, Any], *, default_bos: bool) -> None:
    from tokenizers import AddedToken, processors

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
