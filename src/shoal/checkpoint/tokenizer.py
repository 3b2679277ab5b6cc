"""Text to token ids and back, and chat templates, for a checkpoint directory or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from shoal.checkpoint.chat_template import ChatTemplate, TemplateError
from shoal.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
)
"""Special tokens that end a turn or a text in the supported families; files do not list all of theirs."""


class UnsupportedTokenizer(ValueError):
    """The tokenizer turns ids into text in a way that shoal does not know. The loader names the file."""


class Tokenizer:
    """Text to ids through the `tokenizers` library; ids to text through the bytes that each token stands for.

    Since text is nothing but the tokens' bytes in a row, a stream of tokens, the log-probabilities of single tokens and
    a decoded answer agree by construction. Where the bytes are no UTF-8, U+FFFD replaces each maximal invalid part.
    Instances may be shared by threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int],
        bos_id: int | None,
        template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self._added = {
            i: (str(token.content), token.special) for i, token in backend.get_added_tokens_decoder().items()
        }
        self.special_ids = frozenset(i for i, (_, special) in self._added.items() if special)
        """Control tokens. They are no text; `decode` leaves them out unless told otherwise."""
        ends = [i for name in _ENDS for i, added in self._added.items() if added == (name, True)]
        self.eos_ids = list(dict.fromkeys([*eos_ids, *ends]))
        """Ids that end an answer, the file's own first."""
        self.bos_id = bos_id
        self.template = template
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in self._added), 0)
        """One more than the largest id. The model's logits may be wider."""
        self._scheme, self.strips_leading_space = _decoding_scheme(backend)
        self._bytes_of: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of any text. Special tokens that the text spells out become their ids, as in transformers.

        `add_special_tokens` puts the begin-of-text token in front where the model wants one; what a chat template made
        has it already. A lone surrogate, which is no character, becomes U+FFFD.
        """
        return list(self._backend.encode(_without_surrogates(text), add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. An id without a token adds nothing."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skip).decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; b"" for an id without a token. Special tokens stand for their name."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._find_bytes(token_id) if 0 <= token_id < self.vocab_size else b""
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._added[token_id][0] if token_id in self._added else self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._scheme == "byte_level":
            if token_id not in self._added and all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
            return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return str(piece).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token by itself, for people; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """Id of a token by its name in the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def apply_chat_template(
        self,
        /,  # a variable may be called `self`
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text, special tokens spelled out: `encode` it with `add_special_tokens=False`.

        Raises TemplateError.
        """
        if self.template is None:
            raise TemplateError("this model has no chat template: use text completions")
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt, **variables)

    def to_json(self) -> str:
        """The tokenizer in the form of `tokenizer.json`."""
        return str(self._backend.to_str())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Of a checkpoint directory with `tokenizer.json`, or of a `.gguf` file. Raises CheckpointError."""
    path = Path(path)
    try:
        if path.suffix == ".gguf":
            from shoal.checkpoint.gguf_tokenizer import tokenizer_from_gguf

            return tokenizer_from_gguf(path)
        return _from_directory(path)
    except UnsupportedTokenizer as error:
        raise CheckpointError(path, str(error)) from None


# --- bytes of tokens ------------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (github.com/openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoding_scheme(backend: tokenizers.Tokenizer) -> tuple[Literal["byte_level", "sentencepiece"], bool]:
    """How tokens spell bytes, and whether the text loses one leading space. Raises UnsupportedTokenizer."""
    state = {} if backend.decoder is None else msgspec.json.decode(backend.decoder.__getstate__())
    steps = {step["type"]: step for step in state.get("decoders", [state]) if step}
    kinds = set(steps)
    if kinds and kinds <= {"ByteLevel", "Fuse"}:
        return "byte_level", False
    if "Replace" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return "sentencepiece", bool(steps.get("Strip", {}).get("start"))
    if kinds == {"Metaspace"}:
        return "sentencepiece", steps["Metaspace"].get("prepend_scheme") != "never"
    found = " + ".join(steps) or "none"
    raise UnsupportedTokenizer(
        f"the tokenizer's decoder ({found}) is not supported; supported: ByteLevel, SentencePiece"
    )


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs become what they stand for
    return text


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
    keys = ("bos_token", "eos_token", "pad_token", "unk_token")
    names = {key: name for key in keys if (name := _token_name(settings.get(key)))}
    eos = _ids(path / "generation_config.json", generation) + _ids(path / "config.json", model)
    if "eos_token" in names and (found := backend.token_to_id(names["eos_token"])) is not None:
        eos.append(found)
    bos = backend.token_to_id(names["bos_token"]) if "bos_token" in names else model.get("bos_token_id")
    source = _template_source(path, settings)
    template = None if source is None else ChatTemplate(source, names)
    return Tokenizer(backend, eos_ids=eos, bos_id=bos, template=template)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from None


def _ids(path: Path, config: dict[str, Any]) -> list[int]:
    """End-of-text ids: an int, a list of them, or none."""
    value = config.get("eos_token_id")
    ids: Sequence[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(path, f"eos_token_id must be an integer or a list of them, not {value!r}")
    return list(ids)


def _token_name(value: Any) -> str | None:
    """A token by its name alone, or with its properties."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _template_source(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(file, f"cannot be read: {error}") from None
    template = settings.get("chat_template", _json(path / "chat_template.json").get("chat_template"))
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(path / "tokenizer_config.json", "chat_template is neither text nor a list of named ones")
    return template
