"""The GGUF header reader against the `gguf` library's writer and reader, and against damaged files."""

import random
import struct

import numpy as np
import pytest

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.gguf_file import GGUFFile
from tests.checkpoint.gguf_files import write_gguf

METADATA = {
    "a.int": 7,
    "a.float": 0.5,
    "a.bool": True,
    "a.text": "naïve 漢字",
    "a.ints": [1, 2, 3],
    "a.floats": [0.25, -1.0],
    "a.texts": ["", "x", "😀"],
}


@pytest.fixture
def file(tmp_path):
    tensors = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.ones(5, np.float16)}
    return write_gguf(tmp_path / "m.gguf", METADATA, tensors)


def test_reads_what_the_library_writes(file):
    read = GGUFFile(file)
    assert {key: read.metadata[key] for key in METADATA} == METADATA
    assert read.metadata["general.architecture"] == "llama"
    assert read.tensors["w"].shape == (3, 4)
    entry = read.tensors["w"]
    assert read.data[entry.offset : entry.offset + 48] == np.arange(12, dtype=np.float32).tobytes()
    read.close()


def test_agrees_with_the_library_on_a_real_model(smollm2):
    from gguf import GGUFReader

    read, reference = GGUFFile(smollm2), GGUFReader(smollm2)
    assert len(read.tensors) == len(reference.tensors) == 272
    for tensor in reference.tensors:
        entry = read.tensors[tensor.name]
        assert (entry.offset, entry.kind) == (tensor.data_offset, tensor.tensor_type.value)
        assert entry.shape == tuple(int(n) for n in reversed(tensor.shape))
    assert read.metadata["tokenizer.ggml.tokens"][33] == "1"
    for key in ("llama.rope.freq_base", "llama.block_count", "tokenizer.chat_template"):
        assert read.metadata[key] == reference.get_field(key).contents()
    read.close()


def test_every_truncation_of_the_header_is_refused_by_name(file):
    whole = file.read_bytes()
    reader = GGUFFile(file)
    header = min(entry.offset for entry in reader.tensors.values()) - 32  # the rest of it is padding
    reader.close()
    for size in range(0, header, 3):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf") as caught:
            GGUFFile(file)
        assert "truncated" in caught.value.reason or "cannot be read" in caught.value.reason or size < 4


def test_flipped_bytes_never_raise_anything_else(file):
    whole = bytearray(file.read_bytes())
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            GGUFFile(file).close()
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 something else entirely", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "a count of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "unknown type 77"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,
            "nested",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"w" + struct.pack("<I", 99), "99 dimensions"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, reason):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_split_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GGUFFile(write_gguf(tmp_path / "part.gguf", {"split.count": 3}))
    with pytest.raises(CheckpointError, match="alignment is 0"):
        GGUFFile(write_gguf(tmp_path / "odd.gguf", {"general.alignment": 0}))
