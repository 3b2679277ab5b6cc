"""Proofs of single records: true for what is in the log, for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.serve.audit.chain import chains, public_keys, segments
from shoal.serve.audit.note import AuditError, SigningKey
from shoal.serve.audit.proof import check, prove
from tests.serve.audit.logs import completed, lines_of, open_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("audit")
    for _ in range(2):
        audit = open_log(directory, checkpoint_records=5, rotate_bytes=2000)
        for number in range(12):
            audit.record(completed(number))
        assert audit.close()
    return directory


def test_every_record_can_be_proven(log: Path) -> None:
    keys = public_keys(log)
    for seq, line in enumerate(lines_of(log)):
        proven = check(prove(chains(log)[0], seq, keys), list(keys.values()))
        assert (proven.seq, proven.record, proven.chain) == (seq, line, chains(log)[0].name)


@settings(deadline=None)
@given(data=st.data())
def test_a_changed_proof_proves_nothing(log: Path, data: st.DataObject) -> None:
    keys = public_keys(log)
    text = prove(chains(log)[0], 7, keys)
    position = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda character: character != text[position]))
    with pytest.raises(AuditError):
        check(text[:position] + other + text[position + 1 :], list(keys.values()))


def test_another_key(log: Path, tmp_path: Path) -> None:
    other = SigningKey.load_or_create(tmp_path / "key").public
    with pytest.raises(AuditError, match="none of the given keys"):
        check(prove(chains(log)[0], 3, public_keys(log)), [other])


def test_what_cannot_be_proven(tmp_path: Path) -> None:
    log = open_log(tmp_path, rotate_bytes=1)
    assert log.flush()
    log.record(completed(1))
    assert log.close()
    keys = public_keys(tmp_path)
    first, second, *_ = segments(log.chain)
    second.write_bytes(second.read_bytes().replace(b"r1", b"r2"))
    with pytest.raises(AuditError, match="is not genuine"):
        prove(log.chain, 1, keys)
    first.unlink()
    with pytest.raises(AuditError, match="first records were removed"):
        prove(log.chain, 1, keys)
