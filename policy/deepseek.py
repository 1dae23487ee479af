"""The DeepSeek-V3 architecture (arXiv 2412.19437, section 2) over flat packed tokens, read from top to bottom.

Shape letters: T tokens of all sequences of a micro-batch, B sequences, L longest sequence, D model, H heads, E experts,
K top-k, N nope width, R rope width, C kv_lora_rank, V value width. Parameter names are Hugging Face's; routed experts are
stacked in memory ([E, ...]) and one entry per expert on disk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.config import PolicyConfig


class _Normalise(torch.autograd.Function):
    """x / rms(x) with a backward of three passes; torch's composite takes five times as long on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).unsqueeze(-1)
        normed = wide * inverse
        ctx.save_for_backward(normed, inverse)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        normed, inverse = ctx.saved_tensors
        grad = grads[0].float()
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / normed.shape[-1]
        return (torch.addcmul(grad, normed, along, value=-1) * inverse).to(grads[0].dtype), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (eps is added to the mean square)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = _Normalise.apply(x, self.eps)
        assert isinstance(normed, Tensor)
        return normed * self.weight


class Packing(NamedTuple):
    """Where the T packed tokens lie in a [B, L] rectangle: flat indices [T], B and L."""

    slots: Tensor
    num_sequences: int
    longest: int

    @classmethod
    def of(cls, position_ids: Tensor, cu_seqlens: Tensor) -> Packing:
        """From positions [T] (0.. in each sequence) and cumulative lengths [B + 1]."""
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=position_ids.device), lengths)
        return cls(rows * longest + position_ids, len(lengths), longest)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], zero where there is no token."""
        flat = x.new_zeros(self.num_sequences * self.longest, *x.shape[1:])
        return flat.index_copy(0, self.slots, x).unflatten(0, (self.num_sequences, self.longest))

    def unpad(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.slots)


def rope_angles(position_ids: Tensor, rope_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, R/2] of each rotary pair's angle, in fp32 whatever the weights' type."""
    frequencies = theta ** (-torch.arange(0, rope_dim, 2, device=position_ids.device, dtype=torch.float32) / rope_dim)
    angles = position_ids[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [T, ..., R] by angles [T, R/2]; pairs come out as two halves, as in the release."""
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1).to(x.dtype)


class LatentCache:
    """The decoding cache: per layer, sequence and position the C compressed values and R rotated key values only."""

    def __init__(
        self, config: PolicyConfig, num_sequences: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (config.num_hidden_layers, num_sequences, max_length, config.latent_dim)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_sequences, dtype=torch.long, device=device)

    def write_prompts(self, latents: list[Tensor], position_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Take the per-layer latents [T, C + R] of packed prompts, one per sequence of the cache."""
        lengths = cu_seqlens.diff()
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=position_ids.device), lengths)
        for layer, latent in enumerate(latents):
            self.values[layer, rows, position_ids] = latent
        self.lengths = lengths.clone()

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but `rows` [num_kept], in that order."""
        self.values = self.values[:, rows]
        self.lengths = self.lengths[rows]


class MultiHeadLatentAttention(nn.Module):
    """MLA: keys and values from one latent of C + R values per token (equations 1-11)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.scale = config.qk_head_dim**-0.5

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries without rotation [T, H, N] and rotated [T, H, R]."""
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        nope, rope = q.unflatten(-1, (config.num_attention_heads, -1)).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), -1
        )
        return nope, rotate(rope, cos, sin)

    def latent(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What a token leaves behind for later ones [T, C + R]: normalised compressed values, rotated shared key."""
        compressed, rope = self.kv_a_proj_with_mqa(x).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1
        )
        return torch.cat((self.kv_a_layernorm(compressed), rotate(rope, cos, sin)), -1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Causal attention within each packed sequence, keys and values expanded: ([T, D], latents [T, C + R])."""
        config = self.config
        q_nope, q_rope = self.queries(x, cos, sin)
        latent = self.latent(x, cos, sin)
        compressed, k_rope = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_nope, v = (
            self.kv_b_proj(compressed)
            .unflatten(-1, (config.num_attention_heads, -1))
            .split((config.qk_nope_head_dim, config.v_head_dim), -1)
        )
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, config.num_attention_heads, -1)), -1)
        # Padding is on the right and attention is causal, so no token sees it.
        q, k, v = (packing.pad(t).transpose(1, 2) for t in (q, k, v))
        # Of one width, torch has a fused kernel that never holds the [L, L] scores.
        v = F.pad(v, (0, config.qk_head_dim - config.v_head_dim))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)[..., : config.v_head_dim]
        return self.o_proj(packing.unpad(out.transpose(1, 2)).flatten(1)), latent

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """One token per sequence, kv_b_proj absorbed into query and output: x [B, D], cache [B, S, C + R], mask [B, S]."""
        config = self.config
        q_nope, q_rope = self.queries(x, cos, sin)
        up = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        up_k, up_v = up.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        query = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope, up_k), q_rope), -1)
        scores = torch.einsum("bhc,bsc->bhs", query, cache).float() * self.scale
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).to(x.dtype)
        compressed = torch.einsum("bhs,bsc->bhc", weights, cache[..., : config.kv_lora_rank])
        return self.o_proj(torch.einsum("bhc,hvc->bhv", compressed, up_v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores; the bias takes part in the choice only, the gate is the raw score (equations 12-16)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.e_score_correction_bias: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [T, K] in fp32 and chosen experts [T, K]."""
        config = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if config.n_group > 1:
            by_group = choice.unflatten(-1, (config.n_group, -1))
            best = by_group.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
            allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        experts = choice.topk(config.num_experts_per_tok, -1).indices
        gates = scores.gather(-1, experts)
        if config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates * config.routed_scaling_factor, experts


class Experts(nn.Module):
    """All routed experts' weights, stacked: gate_up_proj [E, 2 * width, D] (gate rows first), down_proj [E, D, width]."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_routed_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.n_routed_experts, hidden, width))

    def forward(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Sum of gate * expert(x) over each token's K experts; tokens are sorted by expert for grouped products."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.gate_up_proj.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[order // top_k], self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        out = torch.empty_like(out).index_copy(0, order, out)
        return (out.unflatten(0, (-1, top_k)) * gates[..., None].to(out.dtype)).sum(1)


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared expert; keeps the load [E] of training passes for the bias update."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)
        self.load: Tensor

    def forward(self, x: Tensor) -> Tensor:
        gates, experts = self.gate(x)
        if self.training:
            self.load += torch.bincount(experts.flatten(), minlength=self.load.numel())
        return self.experts(x, gates, experts) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals; the first k layers are dense."""

    def __init__(self, config: PolicyConfig, index: int):
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        attended, latent = self.self_attn(self.input_layernorm(x), cos, sin, packing)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), latent

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, index: int, rows: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        cache.values[index, rows, cache.lengths] = self.self_attn.latent(normed, cos, sin)
        span = int(cache.lengths.max()) + 1
        mask = torch.arange(span, device=x.device) <= cache.lengths[:, None]
        x = x + self.self_attn.decode(normed, cos, sin, cache.values[index, :, :span], mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekPolicy(nn.Module):
    """A DeepSeek-V3 causal language model; `forward` gives final hidden states, `lm_head` turns them into logits."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, latents: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states [T, D] of packed sequences: ids [T], positions [T] from 0 in each, cumulative lengths [B + 1].

        `latents`, when a list is given, receives each layer's [T, C + R] for a decoding cache.
        """
        packing = Packing.of(position_ids, cu_seqlens)
        cos, sin = rope_angles(position_ids, self.config.qk_rope_head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x, latent = layer(x, cos, sin, packing)
            if latents is not None:
                latents.append(latent)
        return self.model.norm(x)

    def decode(self, input_ids: Tensor, cache: LatentCache) -> Tensor:
        """Hidden states [B, D] of one more token per sequence, whose latents the cache takes in."""
        cos, sin = rope_angles(cache.lengths, self.config.qk_rope_head_dim, self.config.rope_theta)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        x = self.model.embed_tokens(input_ids)
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            x = layer.decode(x, cos, sin, cache, index, rows)
        cache.lengths = cache.lengths + 1
        return self.model.norm(x)

    def reset_parameters(self, seed: int) -> None:
        """Normal weights of standard deviation initializer_range from `seed`; norm gains 1, router biases 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                else:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * self.config.initializer_range)
            for _, buffer in self.named_buffers():
                buffer.zero_()

    @torch.no_grad()
    def balance_experts(self, gamma: float) -> float:
        """Aux-loss-free balancing (arXiv 2408.15664): move each bias by gamma towards even load, forget the load.

        Returns the largest max-violation, max(load) / mean(load) - 1, over the layers.
        """
        worst = 0.0
        for layer in self.model.layers:
            if isinstance(mlp := layer.mlp, MixtureOfExperts) and mlp.load.sum() > 0:
                mean = mlp.load.mean()
                worst = max(worst, float(mlp.load.max() / mean - 1))
                mlp.gate.e_score_correction_bias += gamma * torch.sign(mean - mlp.load)
                mlp.load.zero_()
        return worst

    def num_parameters(self) -> tuple[int, int]:
        """(total, active per token) parameter counts, embeddings included."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for n, p in self.named_parameters() if ".mlp.experts." in n)
        return total, total - routed + routed * self.config.num_experts_per_tok // self.config.n_routed_experts
