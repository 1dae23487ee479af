"""An engine in plain torch: batched decoding with the policy's own layers, for any machine and without vLLM or Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from policy.checkpoint import load_hf_state_dict, load_policy
from policy.deepseek import DeepseekPolicy, LatentCache
from rollout.engine import Completion, SamplingParams
from rollout.engine_checks import check_request


class TorchEngine:
    """Samples with the policy's cached decoding; a completion depends on its prompt, seed and the weights alone.

    `model_or_dir` is a checkpoint folder or a model, which is copied. Batch mates change a completion only through
    float noise. The cache holds kv_lora_rank + qk_rope_head_dim values per token and layer.
    """

    def __init__(
        self,
        model_or_dir: DeepseekPolicy | str | Path,
        *,
        dtype: str = "float32",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        device: str | torch.device | None = None,
        name: str = "engine-0",
    ) -> None:
        self.name = name
        self.policy_version = 0
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch_dtype(dtype)
        given = isinstance(model_or_dir, DeepseekPolicy)
        self.model = copy.deepcopy(model_or_dir) if given else load_policy(Path(model_or_dir))
        self.model.to(self.device).eval().requires_grad_(False)
        # Parameters only: the routing bias moves in steps too small for half precision.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; log-probabilities are those of `sample_tokens`."""
        check_request(prompts, params, seeds, self.max_model_len)
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.max_num_seqs):
            wave = slice(start, start + self.max_num_seqs)
            completions += self._generate_wave(prompts[wave], params, seeds[wave])
        return completions

    def _generate_wave(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """All prompts at once; finished sequences leave the batch when a quarter of it is done."""
        num, limit = len(prompts), params.max_completion_tokens
        uniforms = sequence_uniforms(seeds, limit).to(self.device)
        stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=self.device)
        tokens = torch.zeros(num, limit, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(num, limit, dtype=torch.float32, device=self.device)
        lengths = torch.full((num,), limit, device=self.device)
        stopped = torch.zeros(num, dtype=torch.bool, device=self.device)
        live = torch.arange(num, device=self.device)  # row of the batch -> index in the wave
        hidden, cache = self._prefill(prompts, limit)
        for step in range(limit):
            logits = self.model.lm_head(hidden).float()
            tokens[live, step], logprobs[live, step] = sample_tokens(logits, params, uniforms[live, step])
            newly = torch.isin(tokens[live, step], stops) & ~stopped[live]
            lengths[live[newly]] = step + 1
            stopped[live[newly]] = True
            active = (~stopped[live]).nonzero().squeeze(1)
            if step + 1 == limit or not len(active):
                break
            if len(active) <= 0.75 * len(live):
                live, cache = live[active], _resized(self.model, cache, active, cache.values.shape[2])
            if int(cache.lengths.max()) >= cache.values.shape[2]:
                everyone = torch.arange(len(live), device=self.device)
                cache = _resized(self.model, cache, everyone, cache.values.shape[2] * 3 // 2 + 1)
            hidden = self.model.decode(tokens[live, step], cache)
        columns = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [
            Completion(
                token_ids=ids[:length],
                logprobs=values[:length],
                finish_reason="stop" if ended else "length",
                policy_version=self.policy_version,
            )
            for ids, values, length, ended in columns
        ]

    def _prefill(self, prompts: Sequence[Sequence[int]], limit: int) -> tuple[Tensor, LatentCache]:
        """Last hidden state [B, D] and cache of B prompts; a prompt that occurs several times is computed once."""
        distinct = {tuple(prompt): None for prompt in prompts}
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=self.device)
        cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        input_ids = torch.tensor([token for prompt in distinct for token in prompt], device=self.device)
        position_ids = torch.cat([torch.arange(len(prompt), device=self.device) for prompt in distinct])
        latents: list[Tensor] = []
        hidden = self.model(input_ids, position_ids, cu_seqlens, latents)[cu_seqlens[1:] - 1]
        longest = int(lengths.max())
        cache = LatentCache(self.model.config, len(distinct), longest, self.dtype, self.device)
        cache.write_prompts(latents, position_ids, cu_seqlens)
        return hidden[rows], _resized(self.model, cache, rows, longest + min(limit, 64))

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights and take `version`; CheckpointError lists names or shapes that don't fit."""
        load_hf_state_dict(self.model, weights, f"the update of {self.name} to version {version}")
        self.policy_version = version

    def close(self) -> None:
        """Nothing to free: the model goes with the engine."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of "float32", "bfloat16" or "float16"; ValueError for another name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def sequence_uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Uniform numbers [B, num_tokens] in [0, 1), fp64, one stream per sequence from its own seed."""
    streams = [torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(streams)


def sample_tokens(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Token [B] and its log-probability [B] from logits [B, V] and one uniform number [B] each, by inverting the CDF.

    As in vLLM's processed log-probabilities, these are after temperature and top-p; temperature 0 takes the largest
    logit and gives its log-probability at temperature 1.
    """
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(1)
    logprobs = keep_top_p(logits / params.temperature, params.top_p).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    targets = uniforms.clamp(max=1 - 1e-12) * cdf[:, -1]
    tokens = torch.searchsorted(cdf, targets[:, None], right=True)
    return tokens.squeeze(1), logprobs.gather(-1, tokens).squeeze(1)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] with -inf outside the smallest set of most probable tokens whose probability reaches top_p."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = 0.0
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, ordered)


def _resized(model: DeepseekPolicy, cache: LatentCache, rows: Tensor, capacity: int) -> LatentCache:
    """The cache of sequences `rows` [B] (repeats allowed), with room for `capacity` tokens each."""
    fresh = LatentCache(model.config, len(rows), capacity, cache.values.dtype, cache.values.device)
    used = int(cache.lengths.max())
    fresh.values[:, :, :used] = cache.values[:, rows, :used]
    fresh.lengths = cache.lengths[rows]
    return fresh
