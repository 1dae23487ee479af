"""The DeepSeek-V2 and V3 architecture (arXiv 2405.04434 and 2412.19437, section 2) over flat packed tokens.

It reads from top to bottom, which is why it is one long file. Shape letters: T tokens of all sequences of a micro-batch,
B sequences, L longest sequence, D model, H heads, E experts, M layers with experts, K top-k, N nope width, R rope width,
C kv_lora_rank, V value width, n tokens decoded at once per sequence. Parameter names are Hugging Face's; routed experts
are stacked in memory ([E, ...]) and one entry per expert on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policy.config import PolicyConfig, Precision
from policy.kernels.fp8_experts import as_multiplied, fp8_experts, fp8_linear
from policy.kernels.mla_attention import mla_attention
from policy.kernels.route import route

# Up to this length, plain products are faster on the CPU than its fused attention (90 tokens: 45 ms against 88).
SHORT_SEQUENCE = 256


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
    """Where the T packed tokens lie in a [B, L] rectangle: rows [T], flat indices [T], B and L; and cu_seqlens [B + 1]."""

    rows: Tensor
    slots: Tensor
    num_sequences: int
    longest: int
    cu_seqlens: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, cu_seqlens: Tensor) -> Packing:
        """From positions [T] (0.. in each sequence) and cumulative lengths [B + 1]."""
        lengths = cu_seqlens.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=position_ids.device), lengths)
        return cls(rows, rows * longest + position_ids, len(lengths), longest, cu_seqlens)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], zero where there is no token."""
        flat = x.new_zeros(self.num_sequences * self.longest, *x.shape[1:])
        return flat.index_copy(0, self.slots, x).unflatten(0, (self.num_sequences, self.longest))

    def ahead(self, ids: Tensor, depth: int) -> Tensor:
        """The ids [T] `depth` places further on in each sequence, 0 behind its end, whatever is packed next to it."""
        inside = (self.rows.roll(-depth) == self.rows) & (self.slots.roll(-depth) == self.slots + depth)
        return torch.where(inside, ids.roll(-depth), 0)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.slots)


def rope_frequencies(config: PolicyConfig, device: torch.device) -> Tensor:
    """Radians per position [R/2] of each rotary pair, in fp32: with YaRN (arXiv 2309.00071, section 3.2), slow pairs are
    interpolated and fast ones, which turn more than beta_fast times within the original context, are left alone."""
    width, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pairs = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    frequencies = theta ** (-pairs / width)
    if yarn is None:
        return frequencies

    def pair_that_turns(times: float) -> float:
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    interpolated = ((pairs / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - interpolated) + frequencies / yarn.factor * interpolated


def rope_angles(position_ids: Tensor, config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, R/2] of each rotary pair's angle, in fp32 whatever the weights' type, times YaRN's factor."""
    angles = position_ids[:, None].float() * rope_frequencies(config, position_ids.device)
    yarn = config.rope_scaling
    factor = 1.0 if yarn is None else yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [T, ..., R] by angles [T, R/2]; pairs come out as two halves, as in the release."""
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1).to(x.dtype)


class LatentCache:
    """The decoding cache: per layer, sequence and position the C compressed values and R rotated key values only.

    `lengths` [B] counts the tokens of each sequence that are in it; what lies behind them is never read.
    """

    def __init__(self, values: Tensor, lengths: Tensor):
        self.values = values  # [layers, B, capacity + 1, C + R]; the last slot takes what has no position
        self.lengths = lengths

    @property
    def capacity(self) -> int:
        """Tokens that fit, per sequence."""
        return self.values.shape[2] - 1

    def write(self, layer: int, rows: Tensor, position_ids: Tensor, latents: Tensor) -> None:
        """Put latents [..., C + R] at rows and positions [...]; a negative position is written nowhere that is read."""
        slots = torch.where(position_ids < 0, self.capacity, position_ids)
        self.values[layer, rows, slots] = latents.to(self.values.dtype)

    def select(self, rows: Tensor, capacity: int) -> LatentCache:
        """A copy of sequences `rows` (repeats allowed) with room for `capacity` tokens each."""
        layers, _, _, width = self.values.shape
        values = self.values.new_zeros(layers, len(rows), capacity + 1, width)
        used = min(capacity, self.capacity)
        values[:, :, :used] = self.values[:, rows, :used]
        return LatentCache(values, self.lengths[rows])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over what is not ahead, [B, H, L, V] from q and k [B, H, L, N + R] and v [B, H, L, V]."""
    (num, heads, length, width), value_width = q.shape, v.shape[-1]
    if q.device.type == "cpu" and length <= SHORT_SEQUENCE:
        ahead = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).expand(num * heads, -1, -1)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=scale).softmax(-1).bmm(v).unflatten(0, (num, heads))
    # Where all widths are one, torch has a fused kernel that never holds the [L, L] scores.
    v = F.pad(v, (0, width - value_width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :value_width]


class Linear(nn.Linear):
    """A projection without bias; with precision "fp8" its three products are blockwise FP8's."""

    def __init__(self, in_features: int, out_features: int, precision: Precision):
        super().__init__(in_features, out_features, bias=False)
        self.precision: Precision = precision

    def forward(self, input: Tensor) -> Tensor:
        if self.precision == "fp8":
            return fp8_linear(input, self.weight)
        return super().forward(input)

    def multiplied(self) -> Tensor:
        """The weight [out, in] that inputs are multiplied by: in FP8, not quite the one that is trained."""
        return as_multiplied(self.weight) if self.precision == "fp8" else self.weight


class MultiHeadLatentAttention(nn.Module):
    """MLA: keys and values from one latent of C + R values per token (equations 1-11)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, config.precision)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, config.precision)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, config.precision)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, config.precision)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), config.precision
        )
        self.o_proj = Linear(heads * config.v_head_dim, hidden, config.precision)
        self.scale = config.attention_scale
        self.precision: Precision = config.precision

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
        if self.precision == "fp8":
            out = mla_attention(q_nope, q_rope, k_nope, k_rope, v, packing.cu_seqlens, self.scale)
            return self.o_proj(out.flatten(1)), latent
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, config.num_attention_heads, -1)), -1)
        # Padding is on the right and attention is causal, so no token sees it.
        q, k, v = (packing.pad(t).transpose(1, 2) for t in (q, k, v))
        out = causal_attention(q, k, v, self.scale)
        return self.o_proj(packing.unpad(out.transpose(1, 2)).flatten(1)), latent

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """n tokens per sequence, kv_b_proj absorbed into query and output: x [B * n, D], cache [B, S, C + R], mask [B, n, S]."""
        config = self.config
        q_nope, q_rope = self.queries(x, cos, sin)
        up = self.kv_b_proj.multiplied().unflatten(0, (config.num_attention_heads, -1))
        up_k, up_v = up.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        query = torch.cat((torch.einsum("thn,hnc->thc", q_nope, up_k), q_rope), -1).unflatten(0, mask.shape[:2])
        scores = torch.einsum("bnhc,bsc->bnhs", query, cache).float() * self.scale
        weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(x.dtype)
        compressed = torch.einsum("bnhs,bsc->bnhc", weights, cache[..., : config.kv_lora_rank]).flatten(0, 1)
        return self.o_proj(torch.einsum("thc,hvc->thv", compressed, up_v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, precision: Precision):
        super().__init__()
        self.gate_proj = Linear(hidden, width, precision)
        self.up_proj = Linear(hidden, width, precision)
        self.down_proj = Linear(width, hidden, precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """A layer's choice: gates [T, K] in fp32, experts [T, K], and all scores [T, E] in fp32."""

    gates: Tensor
    experts: Tensor
    scores: Tensor


class Router(nn.Module):
    """Which K experts a token goes to, and with what weight; V3's router or V2's, by `topk_method`."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        self.precision: Precision = config.precision
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
            self.e_score_correction_bias: Tensor

    def forward(self, x: Tensor, replay: Tensor | None = None) -> Routing:
        """The routing of x [T, D]; where `replay` [T, K] is not negative, it is the choice, and gates are still today's."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        if self.precision == "fp8":
            return self._fused(logits, scores, replay)
        experts = self.choose(scores.detach())
        if replay is not None:
            experts = torch.where(replay >= 0, replay, experts)
        gates = scores.gather(-1, experts)
        if config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(gates * config.routed_scaling_factor, experts, scores)

    def _fused(self, logits: Tensor, scores: Tensor, replay: Tensor | None) -> Routing:
        """The same by the kernel that goes with FP8 experts."""
        config = self.config
        unbiased = config.topk_method != "noaux_tc"
        experts, gates = route(
            logits,
            None if unbiased else self.e_score_correction_bias.float(),
            num_groups=config.n_group,
            topk_group=config.topk_group,
            top_k=config.num_experts_per_tok,
            scoring=config.scoring_func,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            group_score="max" if unbiased else "top2_sum",
            replay=None if replay is None else replay.long(),
        )
        return Routing(gates, experts, scores)

    def choose(self, scores: Tensor) -> Tensor:
        """The K chosen experts [T, K] by scores [T, E]: V3's bias takes part here and nowhere else (equation 16)."""
        config = self.config
        unbiased = config.topk_method != "noaux_tc"
        choice = scores if unbiased else scores + self.e_score_correction_bias
        if config.n_group > 1:
            by_group = choice.unflatten(-1, (config.n_group, -1))
            quality = by_group.amax(-1) if unbiased else by_group.topk(2, -1).values.sum(-1)
            best = quality.topk(config.topk_group, -1).indices
            allowed = torch.zeros_like(quality, dtype=torch.bool).scatter(-1, best, True)
            choice = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        return choice.topk(config.num_experts_per_tok, -1).indices


def sequence_balance_loss(routing: Routing, packing: Packing) -> Tensor:
    """Sum over experts of load times mean score, [B], 1 where balanced (V3 equations 17-20 without alpha; V2's seq_aux).

    The load counts the experts that were used, as V2's released code does; only the scores carry a gradient.
    """
    num_experts, (num_tokens, top_k) = routing.scores.shape[-1], routing.experts.shape
    shape = (packing.num_sequences, num_experts)
    tokens = routing.scores.new_zeros(shape[0], 1).index_add(0, packing.rows, routing.scores.new_ones(num_tokens, 1))
    chosen = (packing.rows[:, None] * num_experts + routing.experts).flatten()
    load = torch.bincount(chosen, minlength=shape[0] * num_experts).view(shape) * num_experts / (top_k * tokens)
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    mean_share = share.new_zeros(shape).index_add(0, packing.rows, share) / tokens
    return (load * mean_share).sum(-1)


class Experts(nn.Module):
    """All routed experts' weights, stacked: gate_up_proj [E, 2 * width, D] (gate rows first), down_proj [E, D, width]."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.precision: Precision = config.precision
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_routed_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.n_routed_experts, hidden, width))

    def forward(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Sum of gate * expert(x) over each token's K experts; tokens are sorted by expert for grouped products."""
        if self.precision == "fp8":
            return fp8_experts(x, gates, experts, self.gate_up_proj, self.down_proj)
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
        self.shared_experts = MLP(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, config.precision
        )
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)
        self.load: Tensor

    def forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.gate(x, replay)
        return self.experts(x, routing.gates, routing.experts) + self.shared_experts(x), routing


class LayerOutput(NamedTuple):
    """Hidden states [T, D], latents [T, C + R], and of a layer with experts its choice [T, K] and, if asked, loss [B]."""

    hidden: Tensor
    latent: Tensor
    experts: Tensor | None = None
    balance_loss: Tensor | None = None


class DecodingStep(NamedTuple):
    """What all layers share of one decoding step: rows [B, 1], positions [B, n], angles [B * n, R/2], mask [B, n, span]."""

    rows: Tensor
    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor
    span: int

    @classmethod
    def at(cls, position_ids: Tensor, config: PolicyConfig) -> DecodingStep:
        """For positions [B, n]; each token sees the cache up to and including its own position."""
        rows = torch.arange(len(position_ids), device=position_ids.device)[:, None]
        cos, sin = rope_angles(position_ids.flatten(), config)
        span = int(position_ids.max()) + 1
        # A token without position sees slot 0, so that its softmax is defined; what it computes is not used.
        mask = torch.arange(span, device=position_ids.device) <= position_ids[..., None].clamp(min=0)
        return cls(rows, position_ids, cos, sin, mask, span)


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; in the first k layers the feed-forward is dense."""

    def __init__(self, config: PolicyConfig, index: int):
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size, config.precision) if dense else MixtureOfExperts(config)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, replay: Tensor | None, balance: bool
    ) -> LayerOutput:
        """Packed tokens; with `recompute`, activations inside are computed again in backward instead of kept."""
        if self.recompute and torch.is_grad_enabled():
            output = checkpoint(self._run, x, cos, sin, packing, replay, balance, use_reentrant=False)
            assert isinstance(output, LayerOutput)
            return output
        return self._run(x, cos, sin, packing, replay, balance)

    def _run(
        self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, replay: Tensor | None, balance: bool
    ) -> LayerOutput:
        attended, latent = self.self_attn(self.input_layernorm(x), cos, sin, packing)
        x = x + attended
        hidden, routing = self._feed_forward(x, replay)
        if routing is None:
            return LayerOutput(hidden, latent)
        loss = sequence_balance_loss(routing, packing) if balance else None
        return LayerOutput(hidden, latent, routing.experts, loss)

    def _feed_forward(self, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            out, routing = self.mlp(normed, replay)
            return x + out, routing
        return x + self.mlp(normed), None

    def run_cached(self, x: Tensor, step: DecodingStep, cache: LatentCache, index: int) -> tuple[Tensor, Tensor | None]:
        """x [B * n, D] at the step's positions: the same for the next layer, and the experts' choice [B * n, K]."""
        normed = self.input_layernorm(x)
        latent = self.self_attn.latent(normed, step.cos, step.sin)
        cache.write(index, step.rows, step.position_ids, latent.unflatten(0, step.position_ids.shape))
        x = x + self.self_attn.decode(normed, step.cos, step.sin, cache.values[index, :, : step.span], step.mask)
        x, routing = self._feed_forward(x)
        return x, None if routing is None else routing.experts


class DecoderLayer(Block):
    """One of the main model's layers."""

    forward = Block.run


class MtpLayer(Block):
    """Multi-token prediction, one depth (V3 section 2.2): from the hidden state at a token and the token after next.

    As in the released checkpoint, vLLM and transformers, the embedding comes first into eh_proj, and the hidden states
    that come in and go out are those after a final norm.
    """

    def __init__(self, config: PolicyConfig, index: int):
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self, x: Tensor, ahead: Tensor, cos: Tensor, sin: Tensor, packing: Packing, balance: bool
    ) -> LayerOutput:
        """Hidden states [T, D] of one depth less and embeddings [T, D] of the tokens ahead."""
        output = self.run(self._joined(x, ahead), cos, sin, packing, None, balance)
        return output._replace(hidden=self.shared_head["norm"](output.hidden))

    def look_ahead(self, x: Tensor, ahead: Tensor, step: DecodingStep, cache: LatentCache, index: int) -> Tensor:
        """The same over the cache: x and ahead [B * n, D]."""
        x, _ = self.run_cached(self._joined(x, ahead), step, cache, index)
        return self.shared_head["norm"](x)

    def _joined(self, x: Tensor, ahead: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(ahead), self.hnorm(x)), -1))


class DeepseekModel(nn.Module):
    """Embedding, layers (those of multi-token prediction last) and final norm."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MtpLayer(config, i) if i >= depth else DecoderLayer(config, i)
            for i in range(depth + config.num_nextn_predict_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


Head = Callable[[Tensor, Tensor, int], Any]
MtpMode = bool | Literal["detached"]


class PolicyOutput(NamedTuple):
    """What a forward pass gives; the last three only if asked for.

    `hidden` [T, D] are hidden states after the final norm, or what `head` made of them; `mtp` the same for each depth of
    multi-token prediction; `balance_loss` [B] is summed over layers, without alpha; `routed_experts` is [T, M, K].
    """

    hidden: Any
    mtp: tuple[Any, ...] = ()
    balance_loss: Tensor | None = None
    routed_experts: Tensor | None = None


class DeepseekPolicy(nn.Module):
    """A DeepSeek-V2 or V3 causal language model: hidden states, or what a head makes of them and of lm_head's weight."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def main_layers(self) -> list[DecoderLayer]:
        """The decoder layers without those of multi-token prediction."""
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def mtp_layers(self) -> list[MtpLayer]:
        """One layer per depth of multi-token prediction."""
        return [layer for layer in self.model.layers if isinstance(layer, MtpLayer)]

    @property
    def moe_blocks(self) -> dict[int, MixtureOfExperts]:
        """The expert blocks by index of their layer, those of multi-token prediction included."""
        layers = enumerate([*self.main_layers, *self.mtp_layers])
        return {index: layer.mlp for index, layer in layers if isinstance(layer.mlp, MixtureOfExperts)}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        head: Head | None = None,
        mtp: MtpMode = False,
        routed_experts: Tensor | None = None,
        return_routed_experts: bool = False,
        return_balance_loss: bool = False,
    ) -> PolicyOutput:
        """Packed sequences: ids [T], positions [T] from 0 in each, cumulative lengths [B + 1].

        With `mtp` the layers of multi-token prediction are computed too; "detached" keeps their gradient to themselves.
        `head(hidden, weight, depth)` gets hidden states [T, D] and lm_head's weight [V, D] inside this call, while a
        sharded weight is whole. `routed_experts` [T, M, K] replays choices of experts; negative entries are chosen now.
        """
        apply_head: Head = head or (lambda hidden, weight, depth: hidden)
        x, packing = self.model.embed_tokens(input_ids), Packing.of(position_ids, cu_seqlens)
        cos, sin = rope_angles(position_ids, self.config)
        experts, losses = [], []
        for output in self._layer_outputs(x, cos, sin, packing, routed_experts, return_balance_loss):
            x = output.hidden
            experts += [] if output.experts is None else [output.experts]
            losses += [] if output.balance_loss is None else [output.balance_loss]
        hidden = self.model.norm(x)
        ahead = []
        detached = mtp == "detached"
        weight = self.lm_head.weight.detach() if detached else self.lm_head.weight
        drafted = self._mtp_outputs(hidden, input_ids, cos, sin, packing, return_balance_loss, detached) if mtp else ()
        for depth, output in enumerate(drafted, 1):
            ahead.append(apply_head(output.hidden, weight, depth))
            losses += [] if output.balance_loss is None else [output.balance_loss]
        return PolicyOutput(
            apply_head(hidden, self.lm_head.weight, 0),
            tuple(ahead),
            torch.stack(losses).sum(0) if losses else None,
            torch.stack(experts, 1) if return_routed_experts and experts else None,
        )

    def _layer_outputs(
        self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, replay: Tensor | None, balance: bool
    ) -> Iterator[LayerOutput]:
        """Layer after layer, so that nobody holds more of an output than it needs; counts the load in training."""
        moe_index = 0
        for layer in self.main_layers:
            is_moe = isinstance(layer.mlp, MixtureOfExperts)
            chosen = replay[:, moe_index] if replay is not None and is_moe else None
            output = layer(x, cos, sin, packing, chosen, balance)
            self._count(layer, output)
            moe_index += is_moe
            x = output.hidden
            yield output

    def _mtp_outputs(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        packing: Packing,
        balance: bool,
        detached: bool = False,
    ) -> Iterator[LayerOutput]:
        """Depth after depth; of the last tokens of a sequence, which have nothing ahead, no use is made."""
        hidden = hidden.detach() if detached else hidden
        for depth, layer in enumerate(self.mtp_layers, 1):
            ahead = self.model.embed_tokens(packing.ahead(input_ids, depth))
            output = layer(hidden, ahead.detach() if detached else ahead, cos, sin, packing, balance)
            self._count(layer, output)
            hidden = output.hidden
            yield output

    def _count(self, layer: Block, output: LayerOutput) -> None:
        counts = self.training and torch.is_grad_enabled()
        if counts and output.experts is not None and isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.load += torch.bincount(output.experts.flatten(), minlength=layer.mlp.load.numel())

    def set_precision(self, precision: Precision) -> None:
        """Compute from now on as `config.precision` says: for weights that were loaded by a config without it."""
        self.config = replace(self.config, precision=precision)
        modules: list[Any] = list(self.modules())
        for module in modules:
            if hasattr(module, "precision"):
                module.precision = precision

    def enable_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the input of each layer for backward, and compute the rest again."""
        for layer in [*self.main_layers, *self.mtp_layers]:
            layer.recompute = enabled

    # Decoding, for sampling only.

    def new_cache(
        self, num_sequences: int, capacity: int, dtype: torch.dtype, device: torch.device, *, mtp: bool = False
    ) -> LatentCache:
        """An empty cache for `capacity` tokens of each sequence; `mtp` adds room for the layers that draft."""
        num_layers = len(self.model.layers) if mtp else self.config.num_hidden_layers
        values = torch.zeros(
            num_layers, num_sequences, capacity + 1, self.config.latent_dim, dtype=dtype, device=device
        )
        return LatentCache(values, torch.zeros(num_sequences, dtype=torch.long, device=device))

    def prefill(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        cache: LatentCache,
        experts: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of packed prompts, one per sequence of the cache, which takes in their latents.

        A list `experts` receives the choice [T, K] of every layer with experts.
        """
        x, packing = self.model.embed_tokens(input_ids), Packing.of(position_ids, cu_seqlens)
        cos, sin = rope_angles(position_ids, self.config)
        for index, output in enumerate(self._layer_outputs(x, cos, sin, packing, None, False)):
            cache.write(index, packing.rows, position_ids, output.latent)
            if experts is not None and output.experts is not None:
                experts.append(output.experts)
            x = output.hidden
        hidden = self.model.norm(x)
        if len(cache.values) > self.config.num_hidden_layers:
            drafted = self._mtp_outputs(hidden, input_ids, cos, sin, packing, False)
            for index, output in enumerate(drafted, self.config.num_hidden_layers):
                cache.write(index, packing.rows, position_ids, output.latent)
        cache.lengths = cu_seqlens.diff().to(cache.lengths.dtype)
        return hidden

    def decode(self, input_ids: Tensor, cache: LatentCache, experts: list[Tensor] | None = None) -> Tensor:
        """Hidden states [B, n, D] of ids [B, n] behind the cache's lengths, which the caller moves on by what it keeps."""
        num_tokens = input_ids.shape[1]
        positions = cache.lengths[:, None] + torch.arange(num_tokens, device=input_ids.device)
        step = DecodingStep.at(positions, self.config)
        x = self.model.embed_tokens(input_ids).flatten(0, 1)
        for index, layer in enumerate(self.main_layers):
            x, chosen = layer.run_cached(x, step, cache, index)
            if experts is not None and chosen is not None:
                experts.append(chosen)
        return self.model.norm(x).unflatten(0, input_ids.shape)

    def look_ahead(
        self, hidden: Tensor, ahead_ids: Tensor, position_ids: Tensor, cache: LatentCache, depth: int
    ) -> Tensor:
        """Hidden states [B, n, D] of depth `depth` (from 1) at positions [B, n], from those of the depth before.

        `ahead_ids` [B, n] are the tokens `depth` places after the positions; negative positions are computed for nothing.
        """
        step = DecodingStep.at(position_ids, self.config)
        index = self.config.num_hidden_layers + depth - 1
        ahead = self.model.embed_tokens(ahead_ids).flatten(0, 1)
        out = self.mtp_layers[depth - 1].look_ahead(hidden.flatten(0, 1), ahead, step, cache, index)
        return out.unflatten(0, position_ids.shape)

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
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Router biases and loads 0, as after `reset_parameters`, or after `to_empty` has left them arbitrary."""
        for buffer in self.buffers():
            buffer.zero_()
