"""A tokenizer rebuilt from the metadata of a GGUF file, which holds its parts but not its rules.

What a `tokenizer.json` says in full (how text is cut before merging, what is normalised, what is put in front) follows
here from `tokenizer.ggml.model` and `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.checkpoint.chat_template import ChatTemplate
from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.gguf_file import GGUFFile
from shoal.checkpoint.tokenizer import Tokenizer, UnsupportedTokenizer

if TYPE_CHECKING:
    import tokenizers

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text (github.com/meta-llama/llama3, llama/tokenizer.py): a fact of the model."""
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen 2 and 3: the same, but every digit by itself."""
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}
_GPT2_LIKE = ("gpt-2", "default")

# Kinds of token, by llama.cpp's numbers.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """Raises CheckpointError or UnsupportedTokenizer."""
    file = GGUFFile(path)
    metadata = file.metadata
    file.close()
    try:
        return _rebuild(metadata)
    except (CheckpointError, UnsupportedTokenizer):
        raise
    except KeyError as missing:
        raise CheckpointError(path, f"the metadata lacks {missing.args[0]!r}") from None
    except Exception as error:  # the tokenizers library raises plain Exception for parts that do not fit together
        raise CheckpointError(path, f"the tokenizer's metadata makes no sense: {error}") from None


def _rebuild(metadata: dict[str, Any]) -> Tokenizer:
    kind = metadata["tokenizer.ggml.model"]
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata)
    elif kind == "llama":
        backend = _sentencepiece_bpe(metadata)
    else:
        raise UnsupportedTokenizer(f"tokenizer model {kind!r} is not supported; supported: gpt2, llama")
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    source = metadata.get("tokenizer.chat_template")
    eos = [ids.get("eos_token"), metadata.get("tokenizer.ggml.eot_token_id")]
    return Tokenizer(
        backend,
        eos_ids=[i for i in eos if i is not None],
        bos_id=ids.get("bos_token"),
        template=None if source is None else ChatTemplate(source, {name: tokens[i] for name, i in ids.items()}),
    )


def _byte_level_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The kind of GPT-2: text is cut by a regular expression, each part is merged as UTF-8 bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    is_llama3 = _SPLITS.get(pre) == _LLAMA3_SPLIT
    vocab = _vocab(metadata["tokenizer.ggml.tokens"])
    # Llama 3 takes a part that is a token as it stands, whether or not merges lead there.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3))
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
        raise UnsupportedTokenizer(f"pre-tokenizer {pre!r} is not supported; supported: {supported}")
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, metadata, default_bos=is_llama3)
    return backend


def _sentencepiece_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The kind of Llama 2, Mistral and Gemma: the whole text is merged as characters, unknown ones as bytes."""
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
        name = token if token.isascii() else token.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
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
    """Control tokens and the author's own, which are found in the text before it is cut."""
    from tokenizers import AddedToken, processors

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    control, user_defined = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
