"""What a model costs, from its config alone: parameters, decoding cache and FLOPs (memory: training_memory.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from policy.config import PolicyConfig

if TYPE_CHECKING:
    from policy.dense_config import DenseConfig


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters play which part; `active_experts` are those of `routed_experts` that one token passes through.

    `head` is 0 where it is the embedding itself; `projection` belongs to multi-token prediction (eh_proj); vectors are
    norm gains and biases of layers. Router biases, which no gradient moves, are not counted.
    """

    embedding: int = 0
    attention: int = 0
    dense_mlp: int = 0
    shared_experts: int = 0
    routed_experts: int = 0
    active_experts: int = 0
    router: int = 0
    projection: int = 0
    vectors: int = 0
    head: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values()) - self.active_experts

    @property
    def matrices(self) -> int:
        """Those that one token is multiplied with: of the experts the chosen ones, no vectors, no embedding."""
        inside = self.attention + self.dense_mlp + self.shared_experts + self.active_experts + self.router
        return inside + self.projection + (self.head or self.embedding)

    @property
    def active(self) -> int:
        """Those that one token passes through: the matrices and vectors, head included, input embedding not.

        The embedding is left out because a token reads one of its rows. That is how the published figures count
        (DeepSeek-V3's README_WEIGHTS.md: 36.6B, of which 0.9B for the head).
        """
        return self.matrices + self.vectors


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Of one layer: heads, widths of a key and of a value per head, values cached per token, and what decoding multiplies.

    `decoding_width` is the width per head of a score's and a weighted sum's product over the cache, together.
    """

    num_heads: int
    key_width: int
    value_width: int
    cached_values: int
    multi_head_values: int
    decoding_width: int
    is_latent: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelAccount:
    """A model taken apart: parameters outside of layers (`root`), of each layer, and of each layer that looks ahead."""

    model_type: str
    hidden_size: int
    attention: AttentionShape
    num_experts: int
    root: Parameters
    layers: tuple[Parameters, ...]
    mtp_layers: tuple[Parameters, ...] = ()

    @property
    def parameters(self) -> Parameters:
        """The model's, multi-token prediction left out."""
        return sum_of((self.root, *self.layers))

    @property
    def mtp(self) -> Parameters:
        """Those of multi-token prediction alone: it shares embedding and head with the model."""
        return sum_of(self.mtp_layers)

    @property
    def cached_values(self) -> int:
        """Values that the decoding cache keeps per token."""
        return len(self.layers) * self.attention.cached_values

    @property
    def multi_head_values(self) -> int:
        """The same for multi-head attention of the same size: a key and a value per head and layer."""
        return len(self.layers) * self.attention.multi_head_values


def sum_of(parts: Iterable[Parameters]) -> Parameters:
    """All parts together."""
    return sum(parts, Parameters())


def account_of(config: PolicyConfig | DenseConfig) -> ModelAccount:
    """Take a model apart; of a dense one, transformers' modules are built without memory and counted."""
    return _policy_account(config) if isinstance(config, PolicyConfig) else _dense_account(config)


def _policy_account(config: PolicyConfig) -> ModelAccount:
    vocab, hidden, depth = config.vocab_size, config.hidden_size, config.num_hidden_layers
    root = Parameters(
        embedding=vocab * hidden, head=0 if config.tie_word_embeddings else vocab * hidden, vectors=hidden
    )
    ahead = Parameters(projection=2 * hidden * hidden, vectors=3 * hidden)
    per_head = config.qk_nope_head_dim + config.v_head_dim
    return ModelAccount(
        model_type=config.model_type,
        hidden_size=hidden,
        attention=AttentionShape(
            num_heads=config.num_attention_heads,
            key_width=config.qk_head_dim,
            value_width=config.v_head_dim,
            cached_values=config.latent_dim,
            # As published (V2 section 2.1.4): the rotated part is there because of the latent, so it is not compared with.
            multi_head_values=config.num_attention_heads * per_head,
            decoding_width=config.latent_dim + config.kv_lora_rank,
            is_latent=True,
        ),
        num_experts=config.n_routed_experts,
        root=root,
        layers=tuple(_policy_layer(config, index) for index in range(depth)),
        mtp_layers=tuple(
            _policy_layer(config, depth + index) + ahead for index in range(config.num_nextn_predict_layers)
        ),
    )


def _policy_layer(config: PolicyConfig, index: int) -> Parameters:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * config.qk_head_dim
    attention = hidden * query if config.q_lora_rank is None else config.q_lora_rank * (hidden + query)
    attention += hidden * config.latent_dim + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    vectors = 2 * hidden + rank + (config.q_lora_rank or 0)
    if index < config.first_k_dense_replace:
        return Parameters(attention=attention, vectors=vectors, dense_mlp=3 * hidden * config.intermediate_size)
    expert = 3 * hidden * config.moe_intermediate_size
    return Parameters(
        attention=attention,
        vectors=vectors,
        shared_experts=config.n_shared_experts * expert,
        routed_experts=config.n_routed_experts * expert,
        active_experts=config.num_experts_per_tok * expert,
        router=config.n_routed_experts * hidden,
    )


def _dense_account(config: DenseConfig) -> ModelAccount:
    import torch

    from policy.dense import DensePolicy

    with torch.device("meta"):
        model = DensePolicy(config)
    num_layers, kv_heads, width = config.cache_shape
    root, layers = Parameters(), [Parameters()] * num_layers
    for name, parameter in model.named_parameters():
        count, parts = parameter.numel(), name.split(".")
        if parts[:2] == ["model", "layers"]:
            role = "vectors" if parameter.dim() == 1 else "dense_mlp" if parts[3] == "mlp" else "attention"
            layers[int(parts[2])] += Parameters(**{role: count})
        else:
            role = "vectors" if parameter.dim() == 1 else "embedding" if "embed" in name else "head"
            root += Parameters(**{role: count})
    heads = config.hf.num_attention_heads
    return ModelAccount(
        model_type=config.hf.model_type,
        hidden_size=config.hf.hidden_size,
        attention=AttentionShape(
            num_heads=heads,
            key_width=width,
            value_width=width,
            cached_values=2 * kv_heads * width,
            multi_head_values=2 * heads * width,
            decoding_width=2 * width,
        ),
        num_experts=0,
        root=root,
        layers=tuple(layers),
    )


def forward_flops(account: ModelAccount, context_tokens: int) -> int:
    """FLOPs of a forward pass per token, on average over a sequence of `context_tokens`; training takes three times that.

    Two for each active weight of a matrix, and attention's two products over the keys that a causal mask leaves, on
    average (context_tokens + 1) / 2; norms, activations and rotations are left out.
    """
    shape = account.attention
    per_key = 2 * shape.num_heads * (shape.key_width + shape.value_width)
    return 2 * account.parameters.matrices + len(account.layers) * per_key * (context_tokens + 1) // 2


def decoding_flops(account: ModelAccount, context_tokens: int) -> int:
    """FLOPs of decoding one token that sees `context_tokens` cached ones, its own included.

    Latent attention multiplies with the latents themselves: more FLOPs than over expanded keys, on far fewer bytes.
    """
    shape = account.attention
    per_key = 2 * shape.num_heads * shape.decoding_width
    return 2 * account.parameters.matrices + len(account.layers) * per_key * context_tokens
