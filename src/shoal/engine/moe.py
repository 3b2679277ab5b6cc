"""What follows attention in a layer: a dense MLP, or a mixture of experts, which is a router, experts and a dispatch.

Where ranks split features or experts among them, what either returns is its rank's contribution to tokens that all of
them have; `Summed` around it gathers tokens and adds up. Only a mixture that sends rows to the ranks of their experts
has a rank's own tokens, and all of their result.

Shapes: T tokens, H hidden, E experts of the model, K experts that a token visits, R rows, each a token on its way to
one expert, G groups of experts, J experts of a group.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec, MoESpec
from shoal.core.sharding import Shard
from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.expert_dispatch import AllToAllDispatch, ExpertDispatch, LocalDispatch
from shoal.engine.ops import Activation, Ops, PackedLinear
from shoal.engine.token_split import TokenSplit
from shoal.engine.weight_reader import WeightReader


class MLP(Protocol):
    contributes: bool
    """The result is summed over ranks, which all have the same tokens."""

    def forward(self, x_TH: Tensor) -> Tensor:
        """A new tensor (T, H)."""


class Summed:
    """An MLP to which every rank contributes for all tokens, as one that takes and gives the rank's own."""

    contributes = False

    def __init__(self, mlp: MLP, tokens: TokenSplit) -> None:
        self.mlp = mlp
        self._tokens = tokens

    def forward(self, x_TH: Tensor) -> Tensor:
        return self._tokens.sum(self.mlp.forward(self._tokens.gather(x_TH)))


class DenseMLP:
    contributes = True

    def __init__(self, ops: Ops, activation: Activation, gate_up: PackedLinear, down: PackedLinear) -> None:
        self._ops = ops
        self._activation = activation
        self._gate_up = gate_up
        self._down = down

    def forward(self, x_TH: Tensor) -> Tensor:
        return self._ops.linear(self._ops.gated(x_TH, self._gate_up, self._activation), self._down)


class Router:
    """Which experts each token visits and what each of them counts. Computed in float32 whatever activations are.

    Softmax over all experts' logits, then the best: Mixtral (arXiv 2401.04088), Qwen3. Sigmoid of each logit, the best
    by corrected scores within the best groups: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Equal scores are
    resolved by torch.topk, as in transformers, or by fused kernels, which take the lowest number.
    """

    def __init__(self, ops: Ops, spec: MoESpec, weight: PackedLinear, correction_E: Tensor | None = None) -> None:
        """`weight` is packed as float32; `correction_E`, float32, is added to scores while experts are chosen."""
        self._ops = ops
        self._spec = spec
        self._weight = weight
        self._correction_E = correction_E

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Experts' numbers (T, K), int64, best first, and their weights (T, K), float32."""
        spec = self._spec
        logits_TE = self._ops.linear(x_TH.float(), self._weight)
        if self._ops.fused is not None:
            return self._ops.fused.route(logits_TE, spec, self._correction_E)
        scores_TE = _sigmoid(logits_TE) if spec.scoring == "sigmoid" else logits_TE.softmax(dim=1)
        ranked_TE = scores_TE if self._correction_E is None else scores_TE + self._correction_E
        if spec.num_groups > 1:
            ranked_TE = self._of_best_groups(ranked_TE)
        ids_TK = ranked_TE.topk(spec.num_experts_per_token, dim=1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if spec.normalised:
            # Sigmoids may all be 0.
            weights_TK = weights_TK / (_sum_in_order(weights_TK) + 1e-20)
        return ids_TK, weights_TK * spec.scaling

    def _of_best_groups(self, ranked_TE: Tensor) -> Tensor:
        """The same with -inf for experts of other groups. A group is as good as its two best experts together."""
        num_groups = self._spec.num_groups
        ranked_TGJ = ranked_TE.view(len(ranked_TE), num_groups, ranked_TE.shape[1] // num_groups)
        groups_TG = _sum_in_order(ranked_TGJ.topk(2, dim=2).values).squeeze(2)
        best = groups_TG.topk(self._spec.num_groups_per_token, dim=1).indices
        is_other_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, best, False)
        return ranked_TGJ.masked_fill(is_other_TG[:, :, None], float("-inf")).flatten(1)


def _sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), an element's result the same wherever in the tensor it stands.

    torch.sigmoid computes the elements behind the last whole vector in another way than those before, so a token's
    experts would depend on its batch. Softmax is computed row by row, all rows alike.
    """
    return torch.stack([x, torch.zeros_like(x)], dim=-1).softmax(dim=-1)[..., 0]


def _sum_in_order(x: Tensor) -> Tensor:
    """Over the last dimension, which is kept with size 1, one after the other: torch.sum promises no order."""
    total = x[..., :1]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i : i + 1]
    return total


class Experts:
    """The routed experts of one layer that this rank holds: any of them, or a slice of the features of each.

    Elsewhere they have their numbers in the model; here they are counted from 0, which is called local.
    """

    def __init__(
        self,
        ops: Ops,
        activation: Activation,
        num_experts: int,
        held: list[int],
        mlps: list[tuple[PackedLinear, PackedLinear]],
        device: torch.device,
    ) -> None:
        """`held` are numbers in a model of `num_experts`; `mlps` their gated pairs and down matrices, in that order."""
        self._ops = ops
        self._activation: Activation = activation
        self._fused = ops.fused
        self._packed = None if ops.fused is None else ops.fused.pack_experts(mlps)
        # Packed into one they are not kept one by one.
        mlps = mlps if self._packed is None else []
        self._mlps = [DenseMLP(ops, activation, gate_up, down) for gate_up, down in mlps]
        self._num_held = len(held)
        self.held = held
        self._held = torch.tensor(held, dtype=torch.int64)
        self.holds_all = len(held) == num_experts
        local_E = torch.full((num_experts,), -1, dtype=torch.int64)
        local_E[self._held] = torch.arange(len(held))
        self.local_E = local_E.to(device)
        """Local number of each expert, -1 for one that is elsewhere."""
        counts_on = torch.device("cpu") if self._packed is None else device
        self._held = self._held.to(counts_on)
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=counts_on)
        """Rows that each expert has computed here since `start_counting`, where they are counted."""

    def start_counting(self) -> None:
        self.load_E.zero_()

    def rows(self) -> list[int]:
        """Of each expert that is held, how many it has computed since counting started."""
        return [int(count) for count in self.load_E[self._held].tolist()]

    def weighted(self, x_TH: Tensor, local_R: Tensor, weights_TK: Tensor) -> Tensor | None:
        """Each token's sum over its experts that are here, (T, H), without waiting for the device; None if it cannot.

        An expert elsewhere has a number below 0.
        """
        if self._fused is None or self._packed is None:
            return None
        y_RH = self._grouped(x_TH, local_R, weights_TK.shape[1])
        return self._fused.combine(y_RH, local_R, weights_TK)

    def _grouped(self, x_TH: Tensor, local_R: Tensor, visits: int) -> Tensor:
        if self._fused is None:
            raise RuntimeError("experts were packed by ops that are not there")
        y_RH, counts = self._fused.experts(x_TH, local_R, self._packed, self._activation, visits)
        self.load_E.index_add_(0, self._held, counts.long())
        return y_RH

    def forward(self, x_RH: Tensor, local_R: Tensor) -> Tensor:
        """Each row by the expert with the local number beside it: (R, H), in the rows' order.

        One product for each expert that has rows, over all of them.
        """
        if self._packed is not None:
            return self._grouped(x_RH, local_R, 1)
        # On an accelerator the host waits here: the sizes of the products are not known before.
        counts = torch.bincount(local_R, minlength=self._num_held).cpu()
        self.load_E[self._held] += counts
        by_expert_R = local_R.argsort(stable=True)
        y_RH = torch.empty_like(x_RH)
        start = 0
        for mlp, count in zip(self._mlps, counts.tolist(), strict=True):
            if count:
                rows = by_expert_R[start : start + count]
                y_RH[rows] = mlp.forward(x_RH[rows])
                start += count
        return y_RH


class MoEBlock:
    """A mixture of experts: the routed ones, and the shared ones that every token visits."""

    def __init__(self, router: Router, experts: Experts, dispatch: ExpertDispatch, shared: DenseMLP | None) -> None:
        self.contributes = dispatch.contributes
        self.router = router
        self.experts = experts
        self.dispatch = dispatch
        self.shared = shared

    def forward(self, x_TH: Tensor) -> Tensor:
        ids_TK, weights_TK = self.router.route(x_TH)
        y_TH = self.dispatch.run(x_TH, ids_TK, weights_TK, self.experts)
        if self.shared is not None:
            y_TH += self.shared.forward(x_TH)
        return y_TH


# --- checkpoints ----------------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    """What a layer's parts are called in a checkpoint."""

    block: str
    gate: str
    up: str
    down: str

    def expert(self, prefix: str, number: int) -> tuple[str, str, str]:
        return self.mlp(f"{prefix}{self.block}.experts.{number}.")

    def mlp(self, prefix: str) -> tuple[str, str, str]:
        return f"{prefix}{self.gate}.weight", f"{prefix}{self.up}.weight", f"{prefix}{self.down}.weight"


_USUAL = _Names("mlp", "gate_proj", "up_proj", "down_proj")
_NAMES = {"mixtral": _Names("block_sparse_moe", "w1", "w3", "w2")}


def mlp_shapes(spec: ModelSpec, number: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of layer `number`'s MLP or mixture of experts in a checkpoint."""
    prefix, hidden, moe = f"model.layers.{number}.", spec.hidden_size, spec.moe

    def shapes_of(names: tuple[str, str, str], features: int) -> dict[str, tuple[int, ...]]:
        return dict(zip(names, [(features, hidden), (features, hidden), (hidden, features)], strict=True))

    if moe is None or not spec.has_experts(number):
        return shapes_of(_USUAL.mlp(prefix + "mlp."), spec.intermediate_size)
    names = _NAMES.get(spec.family, _USUAL)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}{names.block}.gate.weight": (moe.num_experts, hidden)}
    if moe.router_bias:
        shapes[f"{prefix}{names.block}.gate.e_score_correction_bias"] = (moe.num_experts,)
    for expert in range(moe.num_experts):
        shapes |= shapes_of(names.expert(prefix, expert), moe.expert_intermediate_size)
    if moe.shared_size:
        shapes |= shapes_of(names.mlp(f"{prefix}{names.block}.shared_experts."), moe.shared_size)
    return shapes


def load_mlp(
    reader: WeightReader, spec: ModelSpec, number: int, shard: Shard, tensor: Comm | None = None
) -> DenseMLP | MoEBlock:
    """Layer `number`'s MLP or mixture of experts, or the part of it that this rank holds.

    `tensor` joins the ranks that hold the other parts.
    """
    prefix, moe = f"model.layers.{number}.", spec.moe
    if moe is None or not spec.has_experts(number):
        gate, up, down = _USUAL.mlp(prefix + "mlp.")
        gate_up = reader.gated(gate, up, shard.mlp)
        return DenseMLP(reader.ops, spec.activation, gate_up, reader.linear([(down, None)], columns=shard.mlp))
    names = _NAMES.get(spec.family, _USUAL)
    block = f"{prefix}{names.block}."
    # int8 would choose other experts.
    weight = reader.linear([(block + "gate.weight", None)], precision="float32")
    correction_E = reader.vector(block + "gate.e_score_correction_bias") if moe.router_bias else None
    held, features, mlps = list(shard.experts(number)), shard.expert_features, []
    for expert in held:
        gate, up, down = names.expert(prefix, expert)
        mlps.append((reader.gated(gate, up, features), reader.linear([(down, None)], columns=features)))
    shared = None
    part = shard.shared_features
    if len(part):
        gate, up, down = names.mlp(block + "shared_experts.")
        gate_up = reader.gated(gate, up, part)
        shared = DenseMLP(reader.ops, spec.activation, gate_up, reader.linear([(down, None)], columns=part))
    dispatch: ExpertDispatch = LocalDispatch()
    if shard.expert_dispatch == "all_to_all":
        dispatch = AllToAllDispatch(tensor or NullComm(), shard.placements[number], moe.num_experts, reader.device)
    return MoEBlock(
        Router(reader.ops, moe, weight, correction_E),
        Experts(reader.ops, spec.activation, moe.num_experts, held, mlps, reader.device),
        dispatch,
        shared,
    )
