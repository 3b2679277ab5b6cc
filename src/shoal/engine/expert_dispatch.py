"""How rows, each a token on its way to one expert, reach the rank of that expert, and how results come back.

Shapes: T tokens that the rank has, H hidden, E experts of the model, K experts that a token visits, R rows,
C copies of an expert, N ranks of the group, P places along the expert axis, S slots: experts that a place holds, where
places with fewer leave some empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from shoal.core.expert_placement import Placement
from shoal.engine.comm.base import Comm

if TYPE_CHECKING:
    from shoal.engine.moe import Experts


class ExpertDispatch(Protocol):
    contributes: bool
    """Every rank has all tokens, and `run` returns its part of their results; else its own tokens and all of theirs."""

    def run(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        """Every token's weighted sum over its experts, or this rank's contribution to it: a new tensor (T, H)."""


class LocalDispatch:
    """Nothing moves: tokens visit those of their experts that are here, which on one rank are all."""

    contributes = True

    def run(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        num_tokens, num_visits = ids_TK.shape
        local_R = experts.local_E[ids_TK].flatten()
        together_TH = experts.weighted(x_TH, local_R, weights_TK)
        if together_TH is not None:
            return together_TH
        x_RH = x_TH.repeat_interleave(num_visits, dim=0)
        if experts.holds_all:
            y_RH = experts.forward(x_RH, local_R)
        else:
            here = (local_R >= 0).nonzero()[:, 0]
            y_RH = torch.zeros_like(x_RH)
            y_RH[here] = experts.forward(x_RH[here], local_R[here])
        return weighted_sum(y_RH.view(num_tokens, num_visits, -1), weights_TK)


class AllToAllDispatch:
    """Each row goes to the rank of its expert and comes back, to be weighted and added where its token is.

    So a token's sum is made in its router's order, of rows that were each computed whole: the bits of one rank, whoever
    holds the experts. Only where `tp` ranks of a place hold slices of each expert does a row go to all of them, and
    what they make of it is added in their order.

    Three exchanges: how many rows there are for each slot, the rows, sorted by slot, and the results. The sizes tell
    the receiver which row is for which expert.
    """

    contributes = False

    def __init__(self, comm: Comm, placement: Placement, num_experts: int, device: torch.device) -> None:
        """`comm` joins the ranks of all places, those of a place side by side."""
        self._comm = comm
        self._num_places = len(placement.held)
        self._tp = comm.size // self._num_places
        self._num_slots = max(map(len, placement.held))
        copies = placement.copies(num_experts)
        slots = [[place * self._num_slots + index for place, index in found] for found in copies]
        most = max(map(len, slots))
        self._slots_EC = torch.tensor([(found * most)[:most] for found in slots], device=device)
        """Slots of each expert's copies, over and over where others have more."""
        self._num_copies_E = torch.tensor([len(found) for found in slots], device=device)

    def run(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Tensor:
        comm, (num_tokens, num_visits), device = self._comm, ids_TK.shape, x_TH.device
        slots_R = self._slots_of(ids_TK).flatten()
        order_R = slots_R.argsort(stable=True)
        own_PS = torch.bincount(slots_R, minlength=self._num_places * self._num_slots)
        counts_NPS = comm.all_gather(own_PS).view(comm.size, self._num_places, self._num_slots)
        sizes_NP = counts_NPS.sum(dim=2).tolist()
        place, sizes = comm.rank // self._tp, sizes_NP[comm.rank]
        send = [size for size in sizes for _ in range(self._tp)]
        receive = [sizes_NP[source][place] for source in range(comm.size)]

        sent_R = order_R // num_visits
        if self._tp > 1:
            sent_R = torch.cat([part for part in torch.split(sent_R, sizes) for _ in range(self._tp)])
        received_RH = comm.all_to_all(x_TH[sent_R], send, receive)
        local_R = torch.arange(self._num_slots, device=device).repeat(comm.size)
        local_R = local_R.repeat_interleave(counts_NPS[:, place].flatten())
        back_RH = comm.all_to_all(experts.forward(received_RH, local_R), receive, send)

        y_RH = torch.empty((len(slots_R), x_TH.shape[1]), dtype=x_TH.dtype, device=device)
        y_RH[order_R] = self._summed(back_RH, sizes)
        return weighted_sum(y_RH.view(num_tokens, num_visits, x_TH.shape[1]), weights_TK)

    def _slots_of(self, ids_TK: Tensor) -> Tensor:
        """(T, K). Copies take turns by the token's place in the step, from another one on each rank."""
        turn_T = torch.arange(len(ids_TK), device=ids_TK.device) + self._comm.rank
        return self._slots_EC[ids_TK, turn_T[:, None] % self._num_copies_E[ids_TK]]

    def _summed(self, back_RH: Tensor, sizes: list[int]) -> Tensor:
        """Over the ranks of each place, in float32 as any sum over ranks, of rows in their order."""
        if self._tp == 1:
            return back_RH
        parts = iter(torch.split(back_RH, [size for size in sizes for _ in range(self._tp)]))
        sums = []
        for _ in sizes:
            total_RH = next(parts).float()
            for _ in range(1, self._tp):
                total_RH = total_RH + next(parts).float()
            sums.append(total_RH.to(back_RH.dtype))
        return torch.cat(sums)


def weighted_sum(y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """Over each token's experts, in the order in which its router named them, whatever else is in the batch: (T, H).

    Added up in float32, returned in y's precision.
    """
    total_TH = y_TKH[:, 0].float() * weights_TK[:, :1]
    for k in range(1, weights_TK.shape[1]):
        total_TH += y_TKH[:, k].float() * weights_TK[:, k : k + 1]
    return total_TH.to(y_TKH.dtype)
