"""Signed checkpoints: how large the tree is and what its root is, as C2SP signed notes with Ed25519.

    shoal.audit/1f3a9c2e/chain-5b0d2c11         origin: the key's name and the chain
    2000                                        records
    qINS1GRFhWHwdkUeqLEoP4yEMkTBBzxBkGwGQlVlVcs=  root of the Merkle tree
    time 1763736339123456789                    Unix nanoseconds
    head 9c1f...                                leaf hash of the last record, hexadecimal
    frontier 0Qz...= k2v...=                    roots of the perfect subtrees: from here the tree can be continued
    file 000000000000-20261121T144539Z-4242     in which it lies: it cannot be moved to another
                                                (an empty line)
    — shoal.audit/1f3a9c2e AbC...               signature over everything above the empty line

The first three lines are those of C2SP's checkpoints, so their witnesses and tools read them; the rest is ours.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from shoal.serve.audit.merkle import Frontier

_ED25519 = b"\x01"
_LINES = 9
"""Of one checkpoint, with the empty line and the signature."""


class AuditError(Exception):
    """The log cannot be written or read. The message is for the user."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    origin: str
    size: int
    root: bytes
    time: int
    head: bytes
    frontier: tuple[bytes, ...]
    file: str
    """Without suffix."""

    def text(self) -> str:
        return (
            f"{self.origin}\n{self.size}\n{_base64(self.root)}\ntime {self.time}\nhead {self.head.hex()}\n"
            f"frontier {' '.join(map(_base64, self.frontier))}\nfile {self.file}\n"
        )

    @property
    def chain(self) -> str:
        return self.origin.rpartition("/")[2]


class PublicKey:
    """Who signed. Written and read as a C2SP verifier key: name+id+base64."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self._raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.name = f"shoal.audit/{hashlib.sha256(self._raw).hexdigest()[:8]}"
        self.id = hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self._raw).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{_base64(_ED25519 + self._raw)}"

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Raises ValueError."""
        raw = base64.b64decode(text.strip().split("+", 2)[-1])  # base64 may hold a plus itself
        if len(raw) != 33 or raw[:1] != _ED25519:
            raise ValueError("not an Ed25519 verifier key")
        key = cls(Ed25519PublicKey.from_public_bytes(raw[1:]))
        if str(key) != text.strip():
            raise ValueError("its name or id does not belong to the key")
        return key

    def verifies(self, checkpoint: Checkpoint, signature: bytes) -> bool:
        try:
            self._key.verify(signature, checkpoint.text().encode())
        except InvalidSignature:
            return False
        return True


class SigningKey:
    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    def sign(self, checkpoint: Checkpoint) -> bytes:
        """The whole note."""
        text = checkpoint.text()
        signature = self._key.sign(text.encode())
        return f"{text}\n— {self.public.name} {_base64(self.public.id + signature)}\n".encode()

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """From a PEM file (PKCS#8) that only its owner can read. Raises AuditError, OSError."""
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                _create(path)
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise AuditError(f"{path}: others can read this signing key (mode {mode:03o}): chmod 600 {path}")
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise AuditError(f"{path}: is not an Ed25519 key; `openssl genpkey -algorithm ed25519` makes one")
        return cls(key)


def _create(path: Path) -> None:
    """Whole or not at all, and only one of several processes that start at once. Raises FileExistsError."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem)
        os.fsync(file.fileno())
    try:
        os.link(partial, path)
    finally:
        partial.unlink()


class Notes(msgspec.Struct, frozen=True):
    """What a file of checkpoints holds."""

    checkpoints: list[Checkpoint]
    texts: list[bytes]
    """The same, as they stand in the file."""
    problem: str | None = None
    """Why the one after the last in `checkpoints` is none."""
    torn: bool = False
    """The problem is but an end that is missing, as after a crash in the midst of a write."""
    whole_bytes: int = 0
    """Length of what `checkpoints` were read from."""


def read_file(path: Path, keys: dict[str, PublicKey]) -> Notes:
    """`read_notes` of a file that must hold checkpoints signed for it alone. Raises OSError."""
    notes = read_notes(path.read_bytes(), keys)
    for number, checkpoint in enumerate(notes.checkpoints):
        if (checkpoint.chain, checkpoint.file) != (path.parent.name, path.stem):
            problem = f"checkpoint {number + 1} was moved here from {checkpoint.chain}/{checkpoint.file}"
            return Notes(notes.checkpoints[:number], notes.texts[:number], problem)
    return notes


def read_notes(data: bytes, keys: dict[str, PublicKey]) -> Notes:
    """The checkpoints up to the first that is broken. `keys` by name: those that are trusted."""
    lines = data.split(b"\n")
    found: list[Checkpoint] = []
    texts: list[bytes] = []
    position = 0
    for start in range(0, len(lines) - _LINES, _LINES):  # the last of `lines` is what follows the last newline
        text = b"\n".join(lines[start : start + _LINES]) + b"\n"
        try:
            found.append(_read_note(text, keys))
        except ValueError as error:
            return Notes(found, texts, f"checkpoint {len(found) + 1} {error}", False, position)
        texts.append(text)
        position += len(text)
    if position < len(data):
        return Notes(found, texts, f"checkpoint {len(found) + 1} is incomplete", True, position)
    return Notes(found, texts, None, False, position)


def _read_note(note: bytes, keys: dict[str, PublicKey]) -> Checkpoint:
    """Raises ValueError, whose message goes on after "checkpoint 7 "."""
    broken = ValueError("is not a signed checkpoint")
    try:
        origin, size, root, stamp, head, frontier, file, empty, signature_line, _ = note.decode().split("\n")
        signed = re.fullmatch(r"— (\S+) (\S+)", signature_line)
        if empty or signed is None:
            raise broken
        checkpoint = Checkpoint(
            origin=origin,
            size=int(size),
            root=base64.b64decode(root, validate=True),
            time=int(stamp.removeprefix("time ")),
            head=bytes.fromhex(head.removeprefix("head ")),
            frontier=tuple(base64.b64decode(part, validate=True) for part in frontier.split(" ")[1:]),
            file=file.removeprefix("file "),
        )
        consistent = Frontier(checkpoint.size, checkpoint.frontier).root() == checkpoint.root
        signature = base64.b64decode(signed[2], validate=True)
    except ValueError:
        raise broken from None
    key = keys.get(signed[1])
    if key is None:
        raise ValueError(f"is signed by {signed[1]}, which is none of the given keys")
    canonical = f"{checkpoint.text()}\n— {key.name} {_base64(signature)}\n".encode()
    if signature[:4] != key.id or canonical != note or not key.verifies(checkpoint, signature[4:]):
        raise ValueError(f"was changed: the signature of {key.name} does not fit")
    if not consistent or not origin.startswith(f"{key.name}/"):
        raise broken
    return checkpoint


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
