"""ModelSpec: what a model is, and its exact parameter, byte and FLOP counts. `model_config` reads it from files."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.quantization import QuantScheme

RopeKind = Literal["default", "linear", "llama3", "yarn"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding of one kind of layer."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_len: int | None = None
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None derives 0.1 ln(factor) + 1."""


class UnsupportedModel(ValueError):
    """The checkpoint is of an architecture that shoal does not run, or lacks what its architecture needs."""


class MoESpec(msgspec.Struct, frozen=True, kw_only=True):
    """Experts, and how a token's are chosen: scores, the best of them (perhaps of the best groups), weights."""

    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    num_shared_experts: int = 0
    """Visited by every token, beside the routed ones."""
    first_dense_layers: int = 0
    """Leading layers with a dense MLP."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits."""
    router_bias: bool = False
    """A correction of each expert's score when experts are chosen, not when they are weighted (DeepSeek-V3)."""
    num_groups: int = 1
    """The experts in groups of equal size, each ranked by its two best (DeepSeek-V3)."""
    num_groups_per_token: int = 1
    """Best groups that a token's experts may be of."""
    normalised: bool = True
    """A token's weights are divided by their sum."""
    scaling: float = 1.0
    """Factor on a token's weights."""

    @property
    def shared_size(self) -> int:
        """Features of the shared experts, which are one MLP."""
        return self.num_shared_experts * self.expert_intermediate_size


class MLASpec(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention (DeepSeek)."""

    q_lora_rank: int | None
    """None: queries are projected directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    interleaved_rope: bool = True
    """Rotated pairs are neighbours, not one of each half."""

    @property
    def qk_head_dim(self) -> int:
        """Of a query and of an expanded key: the part without positions, then the rotated one."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers that the cache keeps of a token, for all heads together."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    family: str
    """Architecture by its field name in lower case: llama, mistral, qwen2, qwen3, gemma3_text, mixtral, ..."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """With latent attention, of a query and an expanded key."""
    vocab_size: int
    max_len: int
    """Longest context in tokens."""
    norm_eps: float
    rope: RopeSpec
    rope_local: RopeSpec | None = None
    """For sliding-window layers where they differ (Gemma 3)."""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    """With latent attention, on the projections to the low ranks."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sandwich_norms: bool = False
    """Norms after attention and MLP too (Gemma 3)."""
    norm_plus_one: bool = False
    """Checkpoint stores norm weights minus one (Gemma 3 safetensors)."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """None is head_dim ** -0.5."""
    window: int | None = None
    """Sliding window in tokens."""
    windowed_layers: tuple[bool, ...] = ()
    """Which layers have the window; () means every layer if `window` is set."""
    moe: MoESpec | None = None
    mla: MLASpec | None = None
    num_draft_layers: int = 0
    """Layers behind the last in the file, which predict further tokens (DeepSeek-V3). Neither run nor counted."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    quantization: QuantScheme | None = None
    """How the checkpoint's matrices are stored; None is in floats."""

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rope_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_dense_layers

    def is_windowed(self, layer: int) -> bool:
        return self.window is not None and (not self.windowed_layers or self.windowed_layers[layer])

    def attention_matrices(self) -> int:
        """Parameters of one layer's projections, without biases and norms."""
        h, n = self.hidden_size, self.num_heads
        if self.mla is None:
            return h * (2 * n + 2 * self.num_kv_heads) * self.head_dim
        m = self.mla
        queries = n * m.qk_head_dim
        query = h * queries if m.q_lora_rank is None else m.q_lora_rank * (h + queries)
        latent = h * m.latent_dim
        expand = m.kv_lora_rank * n * (m.qk_nope_head_dim + m.v_head_dim)
        return query + latent + expand + n * m.v_head_dim * h

    def attention_vectors(self) -> int:
        """Parameters of one layer's biases and norms within attention."""
        output = self.hidden_size if self.output_bias else 0
        if self.mla is not None:
            q_rank = self.mla.q_lora_rank or 0
            biases = q_rank + self.mla.latent_dim if self.qkv_bias else 0
            return biases + q_rank + self.mla.kv_lora_rank + output
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = 2 * self.head_dim if self.qk_norm else 0
        return biases + norms + output

    def mlp_matrices(self, layer: int, *, active: bool = False) -> int:
        """Parameters of one layer's MLP or router and experts; `active` counts the experts that one token visits."""
        h, moe = self.hidden_size, self.moe
        if moe is None or not self.has_experts(layer):
            return 3 * h * self.intermediate_size
        experts = (moe.num_experts_per_token if active else moe.num_experts) + moe.num_shared_experts
        return experts * 3 * h * moe.expert_intermediate_size + moe.num_experts * h

    def _matrices(self, *, active: bool) -> int:
        """Of all layers."""
        mlps = sum(self.mlp_matrices(layer, active=active) for layer in range(self.num_layers))
        return mlps + self.num_layers * self.attention_matrices()

    def _vectors(self) -> int:
        """Norms, biases and score corrections, of all layers and behind them."""
        norms = (4 if self.sandwich_norms else 2) * self.hidden_size
        corrections = 0
        if self.moe is not None and self.moe.router_bias:
            corrections = (self.num_layers - self.moe.first_dense_layers) * self.moe.num_experts
        return self.num_layers * (self.attention_vectors() + norms) + corrections + self.hidden_size

    def _count(self, *, active: bool) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self._matrices(active=active) + self._vectors()

    def num_parameters(self) -> int:
        return self._count(active=False)

    def num_active_parameters(self) -> int:
        """Parameters that one token visits, both embeddings counted."""
        return self._count(active=True)

    def weight_bytes(self, precision: str) -> int:
        """Bytes of all weights when every one is stored in `precision`, scales of quantised ones left out."""
        return self.num_parameters() * PRECISION_BYTES[precision]

    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for one token: keys and values of every layer, or MLA's latent."""
        if self.mla is not None:
            return self.num_layers * self.mla.latent_dim
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        return self.kv_elements_per_token() * bytes_per_element

    def kv_bytes(self, num_tokens: int, bytes_per_element: int) -> int:
        """Bytes that later tokens can still read of a sequence of `num_tokens`: windowed layers read one window.

        The least that a cache could keep; one that pages all layers alike keeps num_tokens * kv_bytes_per_token.
        """
        positions = sum(self._visible(layer, num_tokens) for layer in range(self.num_layers))
        return positions * self.kv_bytes_per_token(bytes_per_element) // self.num_layers

    def _visible(self, layer: int, context_len: int) -> int:
        """Positions that the last token of a context attends to, itself included."""
        return min(context_len, self.window) if self.window is not None and self.is_windowed(layer) else context_len

    def flops_per_token(self, context_len: int, *, with_head: bool = True) -> int:
        """Floating-point operations to compute one token that attends to `context_len` positions, itself included.

        Two operations (multiply, add) for each element of a matrix that the token meets (Kaplan et al.,
        arXiv 2001.08361, table 1) and, for attention, two products of head_dim for each position and head: scores and
        the weighted sum. Windowed layers see at most their window. Norms, biases, rope, softmax and activations are
        left out. MLA is counted without absorbing its up-projections into the queries.
        """
        head = self.vocab_size * self.hidden_size if with_head else 0
        per_position = 4 * self.num_heads * self.head_dim
        if self.mla is not None:
            m = self.mla
            per_position = 2 * self.num_heads * (m.qk_head_dim + m.v_head_dim)
        positions = sum(self._visible(layer, context_len) for layer in range(self.num_layers))
        return 2 * (self._matrices(active=True) + head) + per_position * positions


PRECISION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
