"""Signed checkpoints: the bytes of the format, and that nothing of them can be changed."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.audit.merkle import leaf_hash
from shoal.serve.audit.note import AuditError, Checkpoint, PublicKey, SigningKey, read_notes


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return SigningKey.load_or_create(tmp_path_factory.mktemp("key") / "signing.key")


def checkpoint(key: SigningKey, text: bytes = b"a") -> Checkpoint:
    leaf = leaf_hash(text)
    return Checkpoint(
        origin=f"{key.public.name}/chain-00000001", size=1, root=leaf, time=12, head=leaf, frontier=(leaf,), file="f"
    )


def test_a_note_is_what_the_specification_says(key: SigningKey) -> None:
    """Taken apart without the code that made it: text, empty line, em dash, name, base64(id || signature)."""
    text, _, signatures = key.sign(checkpoint(key)).decode().partition("\n\n")
    dash, name, encoded = signatures.rstrip("\n").split(" ")
    origin, size, root, *_ = text.split("\n")
    assert (dash, size) == ("—", "1")
    assert origin == f"{name}/chain-00000001"
    assert base64.b64decode(root) == hashlib.sha256(b"\x00a").digest()
    verifier_name, _, rest = str(key.public).partition("+")
    key_id, _, public = rest.partition("+")
    raw = base64.b64decode(public)
    assert (verifier_name, raw[:1]) == (name, b"\x01")
    assert bytes.fromhex(key_id) == hashlib.sha256(name.encode() + b"\n" + raw).digest()[:4]
    signature = base64.b64decode(encoded)
    assert signature[:4].hex() == key_id
    Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature[4:], (text + "\n").encode())


def test_what_was_signed_is_read(key: SigningKey) -> None:
    data = key.sign(checkpoint(key)) + key.sign(checkpoint(key, b"b"))
    notes = read_notes(data, {key.public.name: key.public})
    assert notes.checkpoints == [checkpoint(key), checkpoint(key, b"b")]
    assert (notes.problem, notes.whole_bytes) == (None, len(data))
    assert read_notes(b"", {}).problem is None


@given(data=st.data())
def test_every_change_is_found(key: SigningKey, data: st.DataObject) -> None:
    note = bytearray(key.sign(checkpoint(key)))
    position = data.draw(st.integers(0, len(note) - 1))
    note[position] ^= data.draw(st.integers(1, 255))
    notes = read_notes(bytes(note), {key.public.name: key.public})
    assert notes.problem is not None and not notes.checkpoints


@given(data=st.data())
def test_a_torn_end_is_told_from_a_change(key: SigningKey, data: st.DataObject) -> None:
    first, second = key.sign(checkpoint(key)), key.sign(checkpoint(key, b"b"))
    cut = data.draw(st.integers(1, len(second) - 1))
    notes = read_notes(first + second[:cut], {key.public.name: key.public})
    assert (notes.torn, notes.whole_bytes, len(notes.checkpoints)) == (True, len(first), 1)


def test_another_key_is_not_trusted(key: SigningKey, tmp_path: Path) -> None:
    other = SigningKey.load_or_create(tmp_path / "other.key")
    notes = read_notes(key.sign(checkpoint(key)), {other.public.name: other.public})
    assert notes.problem is not None and "is none of the given keys" in notes.problem


def test_a_key_is_made_once_and_kept_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    first = SigningKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(SigningKey.load_or_create(path).public) == str(first.public)
    assert [file.name for file in tmp_path.iterdir()] == ["signing.key"]
    path.chmod(0o644)
    with pytest.raises(AuditError, match=r"others can read .* chmod 600"):
        SigningKey.load_or_create(path)


def test_a_file_that_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    path.write_text("secret")
    path.chmod(0o600)
    with pytest.raises(AuditError, match="openssl genpkey -algorithm ed25519"):
        SigningKey.load_or_create(path)


def test_public_keys_are_checked(key: SigningKey) -> None:
    text = str(key.public)
    assert str(PublicKey.parse(text + "\n")) == text
    for wrong in ("", text.replace("shoal.audit", "shoal.other"), text[:-8], "a+b+c"):
        with pytest.raises(ValueError, match=r".+"):
            PublicKey.parse(wrong)
