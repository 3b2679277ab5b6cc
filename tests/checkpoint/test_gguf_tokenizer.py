"""Tokenizers rebuilt from GGUF metadata, against hand-checked facts and independent implementations of the rules."""

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.tokenizer import load_tokenizer
from tests.checkpoint.gguf_files import BYTE_TOKENS, byte_level_metadata, sentencepiece_metadata, write_gguf

TEXTS = [
    "Hello, world! It's 12,345.67 and we'll see.",
    "naïve café — “quotes” … ½ ² Ⅷ ٣٤",
    "日本語のテキスト、改行\n\n次の行",
    "😀😃👩‍👩‍👧‍👦 🇫🇷 flags",
    "   leading and   runs    of  spaces\t\ttabs\r\n\r\n  ",
    "def f(x):\n    return x ** 2  # ok\n",
    "a\u0301 combining, \u00a0no-break, \u3000wide, \u200bzero, \x00nul",
    "",
    " ",
]


@pytest.fixture(scope="module")
def smol(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def library(smol):
    """The same tokenizer with the `tokenizers` library's own decoder."""
    return tokenizers.Tokenizer.from_str(smol.to_json())


def spell(tokenizer, ids):
    return [tokenizer.token_bytes(i).decode() for i in ids]


# --- SmolLM2 --------------------------------------------------------------------------------------------------------


def test_smollm2_facts(smol):
    assert smol.vocab_size == 49152
    assert smol.bos_id == 1
    assert smol.eos_ids == [2, 0]
    assert smol.id_of("<|im_end|>") == 2
    assert len(smol.special_ids) == 17


def test_smollm2_splits_digits_one_by_one(smol):
    assert smol.encode("1234567890") == [33, 34, 35, 36, 37, 38, 39, 40, 41, 32]
    assert spell(smol, smol.encode("In 2024, x=3.14")) == [
        "In",
        " ",
        "2",
        "0",
        "2",
        "4",
        ",",
        " x",
        "=",
        "3",
        ".",
        "1",
        "4",
    ]
    # The vocabulary has longer numbers, left from training: they must not be used.
    assert spell(smol, smol.encode("100 200")) == ["1", "0", "0", " ", "2", "0", "0"]


def test_smollm2_cuts_words_as_gpt2_does(smol):
    assert spell(smol, smol.encode("Hello world, it's fine.")) == ["Hello", " world", ",", " it", "'s", " fine", "."]
    assert smol.encode("Hello world") == [19556, 905]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trips(smol, text):
    assert smol.decode(smol.encode(text), skip_special_tokens=False) == text


# The vocabulary lacks tokens for these bytes, unseen in training: planes 4 to 11 of Unicode and six control characters.
ABSENT_BYTES = {*range(0xF5, 0x100), 0xC0, 0xC1, 0xF1, 0xF2, 0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
CONTROLS = "".join(chr(byte) for byte in ABSENT_BYTES if byte < 0x80)


def test_smollm2_lacks_some_bytes(smol):
    present = {piece[0] for i in range(smol.vocab_size) if len(piece := smol.token_bytes(i)) == 1}
    assert set(range(256)) - present == ABSENT_BYTES
    assert smol.encode("a\x04b") == smol.encode("a") + smol.encode("b")  # dropped, as by the `tokenizers` library


CHARACTERS = st.characters(codec="utf-8", exclude_characters=CONTROLS).filter(lambda c: not 0x40000 <= ord(c) < 0xC0000)


@given(st.text(CHARACTERS, max_size=80))
@settings(max_examples=150, deadline=None)
def test_smollm2_round_trips_anything_else(smol, text):
    assert smol.decode(smol.encode(text), skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=100, deadline=None)
def test_smollm2_decodes_random_ids_as_the_library(smol, library, ids):
    assert smol.decode(ids) == library.decode(ids)


def test_smollm2_chat(smol):
    text = smol.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smol.encode(text, add_special_tokens=False)
    assert [ids.count(1), ids.count(2)] == [3, 2]
    assert smol.encode("Hi") == smol.encode("Hi", add_special_tokens=False)  # this model wants no begin-of-text


# --- how the families cut text --------------------------------------------------------------------------------------

MERGES = ["1 2", "12 3", "123 4", "Ġ a", "Ġ Ġ", "ĠĠ Ġ", "' S", "a b", "Ċ Ċ", "e Ì", "! Ċ"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "1234", ["1234"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("default", "x'S", ["x", "'", "S"]),
        ("llama-bpe", "x'S", ["x", "'S"]),
        ("default", "    a", ["   ", " a"]),
        ("smollm", "    a", ["   ", " a"]),
        ("llama-bpe", "    a", ["   ", " a"]),
        ("llama-bpe", "!\n", ["!\n"]),
        ("default", "!\n", ["!", "\n"]),
    ],
)
def test_the_pre_tokenizer_decides_what_may_merge(tmp_path, pre, text, pieces):
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata(pre, MERGES, ["<end>"]))
    tokenizer = load_tokenizer(path)
    assert spell(tokenizer, tokenizer.encode(text)) == pieces


def test_qwen_normalises_and_others_do_not(tmp_path):
    composed, decomposed = "\u00e9", "e\u0301"
    qwen = load_tokenizer(write_gguf(tmp_path / "q.gguf", byte_level_metadata("qwen2", MERGES, ["<end>"])))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    smol = load_tokenizer(write_gguf(tmp_path / "s.gguf", byte_level_metadata("smollm", MERGES, ["<end>"])))
    assert smol.decode(smol.encode(decomposed)) == decomposed


def test_who_puts_a_begin_of_text_in_front(tmp_path):
    def first(pre, **settings):
        metadata = byte_level_metadata(pre, MERGES, ["<end>", "<begin>"], bos_token_id=1, **settings)
        return load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata)).encode("a")[0]

    assert first("llama-bpe") == 1
    assert first("llama-bpe", add_bos_token=False) != 1
    assert first("smollm") != 1
    assert first("smollm", add_bos_token=True) == 1


def test_ends_of_turns_are_found(tmp_path):
    specials = ["<|end_of_text|>", "<|eot_id|>", "<|other|>"]
    metadata = byte_level_metadata("llama-bpe", MERGES, specials, eot_token_id=1)
    assert load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata)).eos_ids == [0, 1]


# --- SentencePiece --------------------------------------------------------------------------------------------------

WORDS = ["▁a", "ab", "▁ab", "abc", "▁▁", "bc", "▁", "a", "b", "c", "é", "▁b", "cab", "▁▁▁"]


TOKENS = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *WORDS]


def best_pair_first(text, tokens, scores):
    """SentencePiece's rule, straight from its description: join the adjacent pair whose token scores best; leftmost
    among equals; until none is left. What is then no token is spelled in bytes."""
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [left + right for left, right in pairwise(parts)]
        pairs = [(scores[token], -at) for at, token in enumerate(joined) if token in tokens]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = []
    for part in parts:
        spelled += [part] if part in tokens else [f"<0x{byte:02X}>" for byte in part.encode()]
    return spelled


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", sentencepiece_metadata(WORDS)))


@given(st.text(alphabet="abc é😀\n", max_size=25))
@example("abc ab  cab   é")
@settings(max_examples=200, deadline=None)
def test_sentencepiece_merges_the_best_pair_first(spm, text):
    scores = {word: -rank for rank, word in enumerate(WORDS)}
    names = [TOKENS[i] for i in spm.encode(text, add_special_tokens=False)]
    assert names == best_pair_first(text, set(WORDS), scores)
    assert spm.decode(spm.encode(text)) == text


def test_sentencepiece_facts(spm):
    assert (spm.bos_id, spm.eos_ids) == (1, [2])
    assert spm.encode("a")[0] == 1
    assert spm.special_ids == {0, 1, 2}
    assert spm.token_bytes(3 + 0xE2) == b"\xe2"
    assert spm.token_bytes(spm.id_of("▁ab")) == b" ab"
    assert spm.decode([spm.id_of("▁ab"), spm.id_of("▁ab")]) == "ab ab"


def test_gemma_adds_no_space_and_keeps_its_own_tokens(tmp_path):
    metadata = sentencepiece_metadata(WORDS + ["<start_of_turn>", "  "], add_space_prefix=False)
    metadata["tokenizer.ggml.token_type"][-2:] = [3, 4]
    gemma = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata, arch="gemma3"))
    assert spell(gemma, gemma.encode("<start_of_turn>ab  a b")) == ["<s>", "<start_of_turn>", "ab", "  ", "a", " b"]
    assert gemma.decode(gemma.encode(" a")) == " a"
    assert gemma.decode(gemma.encode("<start_of_turn>ab  a")) == "ab  a"


# --- bad files ------------------------------------------------------------------------------------------------------


def without(metadata, key):
    return {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, r"pre-tokenizer 'tekken' is not supported; supported: smollm, llama-bpe"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"tokenizer.ggml.merges": ["no such"]}, "makes no sense"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "makes no sense"),
        ({"tokenizer.ggml.bos_token_id": 99999, "tokenizer.ggml.add_bos_token": True}, "makes no sense"),
    ],
)
def test_bad_metadata_is_named(tmp_path, change, reason):
    path = write_gguf(tmp_path / "bad.gguf", byte_level_metadata("smollm", MERGES, ["<end>"]) | change)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{reason}"):
        load_tokenizer(path)


@pytest.mark.parametrize("key", ["model", "tokens", "merges", "token_type"])
def test_missing_metadata_is_named(tmp_path, key):
    metadata = without(byte_level_metadata("smollm", MERGES, ["<end>"]), key)
    with pytest.raises(CheckpointError, match=f"lacks 'tokenizer.ggml.{key}'"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))


def test_a_name_that_stands_twice(tmp_path):
    metadata = sentencepiece_metadata([*WORDS, "ab"])
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    assert tokenizer.vocab_size == 259 + len(WORDS) + 1
    assert tokenizer.id_of("ab") == 259 + WORDS.index("ab")
