"""The group of one."""

from __future__ import annotations

import pytest
import torch

from shoal.engine.comm.base import NullComm


def test_a_null_group_has_everything_already() -> None:
    comm, x = NullComm(), torch.arange(3.0)
    assert comm.all_reduce_(x) is x and comm.broadcast_(x, 0) is x
    assert torch.equal(comm.all_gather(x), x[None]) and torch.equal(comm.reduce_scatter(x[None]), x)
    assert torch.equal(comm.all_to_all(x, [3], [3]), x)
    with pytest.raises(ValueError, match="nobody to send to"):
        comm.send(x, 1)
    with pytest.raises(ValueError, match="nobody to receive from"):
        comm.receive_(x, 1)
    comm.close()
