"""Tokenizers of Hugging Face directories: ids, text, bytes of tokens, end-of-text ids, chat templates, bad files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.checkpoint.chat_template import TemplateError
from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.tokenizer import load_tokenizer
from tests.checkpoints import save_tokenizer

MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Hi 🐟"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def copy(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_facts(tokenizer):
    assert tokenizer.vocab_size == 512
    assert tokenizer.eos_ids == [2, 4]
    assert tokenizer.bos_id == 1
    assert tokenizer.special_ids >= {0, 1, 2, 3, 4}
    assert tokenizer.id_of("<|im_end|>") == 4
    assert tokenizer.id_of("no such token") is None


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_same_ids_as_transformers_and_back(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 511), max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_random_ids_decode_as_in_transformers(tokenizer, reference, ids, skip):
    assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_chat_template_as_in_transformers(tokenizer, reference):
    tools = [{"type": "function", "function": {"name": "f", "description": "<é> & 'quoted'", "parameters": {}}}]
    for offered in (None, tools):
        text = tokenizer.apply_chat_template(MESSAGES, offered)
        expected = reference.apply_chat_template(MESSAGES, tools=offered, tokenize=False, add_generation_prompt=True)
        assert text == expected
        ids = reference.apply_chat_template(MESSAGES, tools=offered, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == reference.apply_chat_template(
        MESSAGES, tokenize=False
    )


def test_special_tokens_in_text_are_parsed(tokenizer):
    ids = tokenizer.encode("<|im_start|>user", add_special_tokens=False)
    assert ids[0] == 3
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user"


def test_surrogates_are_no_error(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud800c")) == "a😀b\ufffdc"


def test_bytes_of_tokens(tokenizer):
    fish = tokenizer.encode("🐟")
    assert b"".join(tokenizer.token_bytes(i) for i in fish) == "🐟".encode()
    assert tokenizer.token_bytes(4) == b"<|im_end|>"
    assert tokenizer.token_text(fish[0]) == "\ufffd"
    for nothing in (512, 1 << 70, -1):
        assert tokenizer.token_bytes(nothing) == b""
    assert tokenizer.decode([512, 1 << 70, -1]) == ""


def test_every_token_is_the_bytes_that_the_library_decodes(tokenizer):
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_text(token_id) == tokenizer.decode([token_id], skip_special_tokens=False)


def test_template_from_its_own_file_comes_first(copy):
    (copy / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert load_tokenizer(copy).apply_chat_template(MESSAGES) == "<s>Be <b>brief</b>.</s>"


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def test_named_templates_and_none(copy):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(copy / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(copy).apply_chat_template(MESSAGES) == "yes"
    edit(copy / "tokenizer_config.json", chat_template=None)
    with pytest.raises(TemplateError, match="has no chat template"):
        load_tokenizer(copy).apply_chat_template(MESSAGES)


def test_tokens_may_be_written_with_their_properties(copy):
    edit(copy / "tokenizer_config.json", eos_token={"content": "<|im_end|>", "special": True}, bos_token=None)
    (copy / "generation_config.json").unlink()
    (copy / "config.json").write_text(json.dumps({"eos_token_id": [7], "bos_token_id": 5}))
    read = load_tokenizer(copy)
    assert (read.eos_ids, read.bos_id) == ([7, 4], 5)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: is missing"),
        ("tokenizer.json", "{}", r"tokenizer\.json: is not a tokenizer"),
        ("tokenizer.json", "{", r"tokenizer\.json: is not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: is not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is neither text nor a list"),
        ("generation_config.json", '{"eos_token_id": "end"}', r"generation_config\.json: eos_token_id must be"),
    ],
)
def test_bad_files_are_named(copy, file, content, reason):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer(copy)


def test_an_unknown_decoder_is_refused(copy):
    edit(copy / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(CheckpointError, match=r"decoder \(WordPiece\) is not supported"):
        load_tokenizer(copy)
    edit(copy / "tokenizer.json", decoder=None)
    with pytest.raises(CheckpointError, match=r"decoder \(none\) is not supported"):
        load_tokenizer(copy)
