"""Batched decoding in plain torch: the loop behind the torch engine, with or without drafts by multi-token prediction.

Drafts change nothing but the speed. Every token is sampled from the policy's own distribution with the uniform number of
its place in the sequence; a draft was right if it is that token. So a completion is the same with drafts and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.packing import layout
from rollout.engine import Completion, SamplingParams
from rollout.records import SamplingMask


class Decoding:
    """The sequences of one call: `run` writes them to their end.

    Sizes: B sequences of the call, b of them still in the batch, n tokens of each decoded at once, k drafts. `model` has
    `new_cache`, `prefill` and `decode`, and for drafts `look_ahead` (see `policy.deepseek.DeepseekPolicy`).
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_draft_tokens: int = 0,
        return_routed_experts: bool = False,
    ) -> None:
        self.model, self.prompts, self.params = model, prompts, params
        self.dtype, self.device, self.num_drafts = dtype, device, num_draft_tokens
        num, limit = len(prompts), params.max_completion_tokens
        self.limit = limit
        self.uniforms = sequence_uniforms(seeds, limit).to(device)
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        # Prompts and what follows; behind it room for drafts, and a last column for what counts nowhere.
        self.width = int(self.prompt_lengths.max()) + limit + num_draft_tokens + 1
        self.known = torch.zeros(num, self.width, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(num, self.width, dtype=torch.float32, device=device)
        self.generated = torch.zeros(num, dtype=torch.long, device=device)
        self.stopped = torch.zeros(num, dtype=torch.bool, device=device)
        self.drafted, self.accepted = torch.zeros_like(self.generated), torch.zeros_like(self.generated)
        self.routed: Tensor | None = None  # [B, width, M, K], -1 where nothing was forwarded
        self.return_routed_experts = return_routed_experts
        self.kept = KeptTokens(num, limit) if params.return_sampling_mask else None
        self.live = torch.arange(num, device=device)  # row of the batch -> sequence

    def run(self, policy_version: int) -> list[Completion]:
        """Decode until every sequence has ended; one completion per prompt, in order."""
        hidden = self._prefill()
        drafts = self.live.new_zeros(len(self.live), 0)
        while True:
            right = self._choose(hidden, drafts)
            active = (~self._ended()).nonzero().squeeze(1)
            if not len(active):
                return self._completions(policy_version)
            if len(active) <= 0.75 * len(self.live):  # copying the cache costs less than decoding what has ended
                hidden, right, self.tail = hidden[active], right[active], self.tail[active]
                self.live, self.cache = self.live[active], self.cache.select(active, self.cache.capacity)
            self.cache.lengths = self._lengths() - 1  # all but the newest token, which is decoded next
            drafts = self._draft(hidden, right)
            newest = self.known[self.live, self.cache.lengths][:, None]
            hidden = self._decode(torch.cat((newest, drafts), 1))

    def _ended(self) -> Tensor:
        return self.stopped[self.live] | (self.generated[self.live] >= self.limit)

    def _lengths(self) -> Tensor:
        """Known tokens [b] of the sequences in the batch."""
        return self.prompt_lengths[self.live] + self.generated[self.live]

    def _prefill(self) -> Tensor:
        """Hidden states [B, 1, D] at the last tokens of the prompts; a prompt that occurs several times is computed once."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in self.prompts))
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in self.prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=self.device)
        sequence_ids, position_ids, cu_seqlens = layout(lengths)
        input_ids = torch.tensor([token for prompt in distinct for token in prompt], device=self.device)
        options = {"mtp": True} if self.num_drafts else {}
        cache = self.model.new_cache(len(distinct), int(lengths.max()), self.dtype, self.device, **options)
        experts: list[Tensor] = []
        collected = {"experts": experts} if self.return_routed_experts else {}
        hidden = self.model.prefill(input_ids, position_ids, cu_seqlens, cache, **collected)
        known = self.known.new_zeros(len(distinct), self.width)
        known[sequence_ids, position_ids] = input_ids
        self.known = known[rows]
        if self.return_routed_experts:
            chosen = torch.stack(experts, 1)  # [T, M, K]
            routed = chosen.new_full((len(distinct), self.width, *chosen.shape[1:]), -1)
            routed[sequence_ids, position_ids] = chosen
            self.routed = routed[rows]
        self.cache = cache.select(rows, int(lengths.max()) + min(self.limit, 64) + self.num_drafts)
        ends = cu_seqlens[1:].long() - 1
        # The hidden states before the last, which deeper drafts look back to.
        back = torch.arange(min(1 - self.num_drafts, 0), 0, device=self.device)
        self.tail = hidden[(ends[:, None] + back).clamp(min=0)][rows]
        return hidden[ends][rows][:, None]

    def _choose(self, hidden: Tensor, drafts: Tensor) -> Tensor:
        """Sample behind hidden states [b, n, D] and keep what follows from right drafts [b, n - 1]; how many were right [b]."""
        num, n = hidden.shape[:2]
        live, ended = self.live, self._ended()
        place = self.generated[live][:, None] + torch.arange(n, device=self.device)
        uniforms = self.uniforms[live].gather(1, place.clamp(max=self.limit - 1))
        logits = self.model.lm_head(hidden.flatten(0, 1)).float()
        sampled = sample_tokens(logits, self.params, uniforms.flatten())
        tokens, logprobs = sampled.token_ids.view(num, n), sampled.logprobs.view(num, n)
        right = (tokens[:, :-1] == drafts).long().cumprod(1).sum(1)
        stops = torch.isin(tokens, self.stops)
        kept = torch.arange(n, device=self.device) <= right[:, None]
        kept &= (place < self.limit) & (stops.long().cumsum(1) - stops.long() == 0) & ~ended[:, None]
        columns = torch.where(kept, self.prompt_lengths[live][:, None] + place, self.width - 1)
        self.known[live[:, None], columns] = tokens
        self.logprobs[live[:, None], columns] = logprobs
        if self.kept is not None and self.params.cuts_off:
            self.kept.add(sampled.distribution[kept.flatten()], live[:, None].expand(num, n)[kept], place[kept])
        self.generated[live] += kept.sum(1)
        self.stopped[live] |= (kept & stops).any(1)
        self.drafted[live] += (n - 1) * ~ended
        self.accepted[live] += (kept.sum(1) - 1).clamp(min=0)
        return right

    def _draft(self, hidden: Tensor, right: Tensor) -> Tensor:
        """k tokens [b, k] that are likely to come next, from the hidden states [b, n, D] of the tokens decoded last.

        Depth m looks at position p and the token at p + m. Positions from k - 1 before the decoded ones are computed
        again, since deeper layers saw drafts there that may have been wrong.
        """
        if not self.num_drafts:
            return self.live.new_zeros(len(self.live), 0)
        k, live = self.num_drafts, self.live
        rows = torch.arange(len(live), device=self.device)
        window = torch.cat((self.tail, hidden), 1)
        newest = self._lengths() - 1
        first = newest - 1 - right - (k - 1)
        positions = first[:, None] + torch.arange(window.shape[1], device=self.device)
        self._make_room(window.shape[1])
        last = k - 1 + right  # where in the window the token before the newest lies
        self.tail = window[rows[:, None], last[:, None] + torch.arange(2 - k, 1, device=self.device)]
        for depth in range(1, k + 1):
            ahead = self.known[live].gather(1, (positions + depth).clamp(0, self.width - 1))
            window = self.model.look_ahead(window, ahead, positions, self.cache, depth)
            place = (self.generated[live] + depth - 1).clamp(max=self.limit - 1)
            uniforms = self.uniforms[live].gather(1, place[:, None]).squeeze(1)
            sampled = sample_tokens(self.model.lm_head(window[rows, last]).float(), self.params, uniforms)
            self.known[live, newest + depth] = sampled.token_ids
        return self.known[live[:, None], newest[:, None] + torch.arange(1, k + 1, device=self.device)]

    def _decode(self, input_ids: Tensor) -> Tensor:
        """Hidden states [b, n, D] of ids [b, n] behind the cache."""
        self._make_room(input_ids.shape[1])
        if self.routed is None:
            return self.model.decode(input_ids, self.cache)
        experts: list[Tensor] = []
        hidden = self.model.decode(input_ids, self.cache, experts=experts)
        positions = self.cache.lengths[:, None] + torch.arange(input_ids.shape[1], device=self.device)
        # Behind a draft that turns out wrong, the true token is decoded later and takes its place.
        self.routed[self.live[:, None], positions] = torch.stack(experts, 1).unflatten(0, input_ids.shape)
        return hidden

    def _make_room(self, num_tokens: int) -> None:
        needed = int(self.cache.lengths.max()) + num_tokens
        if needed > self.cache.capacity:
            everyone = torch.arange(len(self.live), device=self.device)
            self.cache = self.cache.select(everyone, max(needed, self.cache.capacity * 3 // 2))

    def _completions(self, policy_version: int) -> list[Completion]:
        completions = []
        masks = None if self.kept is None else self.kept.masks(self.generated.tolist())
        for row, prompt in enumerate(self.prompts):
            start, end = len(prompt), len(prompt) + int(self.generated[row])
            completions.append(
                Completion(
                    token_ids=self.known[row, start:end].tolist(),
                    logprobs=self.logprobs[row, start:end].tolist(),
                    finish_reason="stop" if self.stopped[row] else "length",
                    policy_version=policy_version,
                    routed_experts=self._routing(row, end),
                    sampling_mask=None if masks is None else masks[row],
                    num_draft_tokens=int(self.drafted[row]),
                    num_accepted_tokens=int(self.accepted[row]),
                )
            )
        return completions

    def _routing(self, row: int, end: int) -> np.ndarray | None:
        """[prompt + completion, M, K]; the last token was sampled and not forwarded, so its entries are -1."""
        if self.routed is None:
            return None
        routed = self.routed[row, :end].to(torch.int16).cpu().numpy()
        routed[end - 1] = -1
        return routed


def sequence_uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Uniform numbers [B, num_tokens] in [0, 1), fp64, one stream per sequence from its own seed."""
    streams = [torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(streams)


class SampledTokens(NamedTuple):
    """Ids [B] and log-probabilities [B] of sampled tokens, and the distribution's log-probabilities [B, V]: -inf if cut off."""

    token_ids: Tensor
    logprobs: Tensor
    distribution: Tensor


def sample_tokens(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> SampledTokens:
    """One token for each row of logits [B, V] and each uniform number [B], by inverting the CDF.

    As in vLLM's processed log-probabilities, these are after temperature, top-k and top-p; temperature 0 takes the
    largest logit and gives its log-probability at temperature 1.
    """
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return SampledTokens(tokens, logprobs.gather(-1, tokens[:, None]).squeeze(1), logprobs)
    kept = keep_top_p(keep_top_k(logits / params.temperature, params.top_k), params.top_p)
    logprobs = kept.log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    targets = uniforms.clamp(max=1 - 1e-12) * cdf[:, -1]
    tokens = torch.searchsorted(cdf, targets[:, None], right=True)
    return SampledTokens(tokens.squeeze(1), logprobs.gather(-1, tokens).squeeze(1), logprobs)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits [B, V] with -inf below the k-th largest of a row, so that its equals stay, as in vLLM; 0 keeps all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, -1).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


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


class KeptTokens:
    """Collects, in any order, which ids sampling kept at the tokens of several sequences."""

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        self.num_sequences, self.max_tokens = num_sequences, max_tokens
        self.slots: list[np.ndarray] = []  # sequence * max_tokens + place, once per kept id
        self.token_ids: list[np.ndarray] = []

    def add(self, distribution: Tensor, sequences: Tensor, places: Tensor) -> None:
        """What is finite in rows [m, V], each of a token [m] of a sequence [m]."""
        rows, token_ids = distribution.isfinite().nonzero(as_tuple=True)
        self.slots.append((sequences * self.max_tokens + places)[rows].cpu().numpy())
        self.token_ids.append(token_ids.to(torch.int32).cpu().numpy())

    def masks(self, lengths: Sequence[int]) -> list[SamplingMask]:
        """One mask per sequence, of as many spans as it has tokens."""
        slots = np.concatenate([np.empty(0, np.int64), *self.slots])
        order = np.argsort(slots, kind="stable")  # ids of a token stay ascending
        token_ids = np.concatenate([np.empty(0, np.int32), *self.token_ids])[order]
        first_of = np.searchsorted(slots[order], np.arange(self.num_sequences * self.max_tokens + 1))
        masks = []
        for sequence, length in enumerate(lengths):
            start = sequence * self.max_tokens
            offsets = first_of[start : start + length + 1].astype(np.int64)
            masks.append(SamplingMask(offsets - offsets[0], token_ids[offsets[0] : offsets[-1]].copy()))
        return masks
