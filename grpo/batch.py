"""The packed batch: every token of a set of sequences in flat tensors, and the ways to cut it by whole sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.losses import Aggregation, token_weights
from policy.logprobs import SamplingMask
from policy.packing import balance_over_ranks, layout
from rollout.errors import UserError
from rollout.records import Sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sequences of T tokens in all, prompt and completion, end to end; a field speaks of the token at its own index.

    `input_ids`, `position_ids` and `sequence_ids` (0 to B-1) are int64 [T]; `cu_seqlens` int32 [B+1], where each
    sequence starts, then T; `completion_mask` bool [T]; `rollout_logprobs` (nats, 0 on prompts) and `advantages` (one
    value per sequence) floating [T]. `sequence_index` int64 [B] is each sequence's place in the step's list of samples.
    `truncated` bool [B] is true where the completion was cut off at the length limit. `routed_experts` int64 [T, MoE
    layers, top-k] are the engine's choices, -1 where it made none, and `sampling_mask` the token ids that sampling kept,
    one span per token, empty on prompts: both None if not recorded.
    `old_logprobs`, `ref_logprobs` and `weights` [T] are None until the learner fills them, with `dataclasses.replace`.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    cu_seqlens: Tensor
    completion_mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    sequence_index: Tensor
    truncated: Tensor | None = None
    routed_experts: Tensor | None = None
    sampling_mask: SamplingMask | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.sequence_index.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, prompts and completions."""
        return self.input_ids.shape[0]

    @property
    def num_completion_tokens(self) -> int:
        """How many tokens the loss speaks about."""
        return int(self.completion_mask.sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        mask = None if self.sampling_mask is None else SamplingMask(*map(move, self.sampling_mask))
        return dataclasses.replace(self, **moved, sampling_mask=mask)

    def with_advantages(self, advantages: Sequence[float] | Tensor) -> Batch:
        """The same batch with other advantages, one per sequence (any shape of B values)."""
        values = torch.as_tensor(advantages, dtype=self.advantages.dtype).reshape(-1)
        if values.numel() != self.num_sequences:
            raise UserError(f"{self.num_sequences} samples need as many advantages, got {values.numel()}")
        return dataclasses.replace(self, advantages=values.to(self.sequence_ids.device)[self.sequence_ids])


_PER_TOKEN = (
    "input_ids",
    "position_ids",
    "completion_mask",
    "rollout_logprobs",
    "advantages",
    "routed_experts",
    "old_logprobs",
    "ref_logprobs",
    "weights",
)


def build_batch(
    samples: Sequence[Sample], advantages: Sequence[float] | Tensor, *, dtype: torch.dtype = torch.float32
) -> Batch:
    """Pack a whole step's samples, in order, with one advantage each (any shape of len(samples) values).

    The mask comes from the lengths alone. Raises UserError, naming the sample, for an empty prompt, log-probabilities
    that do not match the completion or are not finite, and an advantage that is not finite.
    """
    if not samples:
        raise UserError("there is no sample to build a batch from: every group was filtered out, or none was sampled")
    values = torch.as_tensor(advantages, dtype=dtype).reshape(-1)
    if values.numel() != len(samples):
        raise UserError(f"{len(samples)} samples need as many advantages, got {values.numel()}")
    for sample, advantage in zip(samples, values.tolist(), strict=True):
        _check_sample(sample, advantage)
    ids = [np.asarray(part, dtype=np.int64) for s in samples for part in (s.prompt_ids, s.completion_ids)]
    rollout = [part for s in samples for part in (np.zeros(len(s.prompt_ids)), np.asarray(s.rollout_logprobs))]
    prompt_lengths = torch.tensor([len(s.prompt_ids) for s in samples])
    lengths = prompt_lengths + torch.tensor([len(s.completion_ids) for s in samples])
    sequence_ids, position_ids, cu_seqlens = layout(lengths)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        position_ids=position_ids,
        sequence_ids=sequence_ids,
        cu_seqlens=cu_seqlens,
        completion_mask=position_ids >= prompt_lengths[sequence_ids],
        rollout_logprobs=torch.from_numpy(np.concatenate(rollout)).to(dtype),
        advantages=values[sequence_ids],
        sequence_index=torch.arange(len(samples)),
        truncated=torch.tensor([sample.finish_reason == "length" for sample in samples]),
        routed_experts=_routed_experts(samples),
        sampling_mask=_sampling_mask(samples),
    )


def _routed_experts(samples: Sequence[Sample]) -> Tensor | None:
    """[T, M, K] if every sample has its own, None if none has; UserError for anything between, naming the sample."""
    if all(sample.routed_experts is None for sample in samples):
        return None
    parts = []
    for s in samples:
        length = len(s.prompt_ids) + len(s.completion_ids)
        if s.routed_experts is None or len(s.routed_experts) != length:
            found = "none" if s.routed_experts is None else f"those of {len(s.routed_experts)}"
            raise UserError(
                f"sample {s.sample_index} of task {s.task_id} has {length} tokens and routed_experts of {found}: "
                "the engine must return them for every token of every sample, or for no sample"
            )
        parts.append(s.routed_experts.astype(np.int64))
    return torch.from_numpy(np.concatenate(parts))


def _sampling_mask(samples: Sequence[Sample]) -> SamplingMask | None:
    """A span for each of the T tokens, if every sample has its own; UserError for anything between, naming the sample."""
    if all(sample.sampling_mask is None for sample in samples):
        return None
    counts, token_ids = [], []
    for s in samples:
        if s.sampling_mask is None or len(s.sampling_mask.offsets) != len(s.completion_ids) + 1:
            found = "none" if s.sampling_mask is None else f"that of {len(s.sampling_mask.offsets) - 1}"
            raise UserError(
                f"sample {s.sample_index} of task {s.task_id} has {len(s.completion_ids)} completion tokens and a "
                f"sampling_mask of {found}: the engine must return it for every token of every sample, or for no sample"
            )
        counts += [np.zeros(len(s.prompt_ids), dtype=np.int64), np.diff(s.sampling_mask.offsets)]
        token_ids.append(s.sampling_mask.token_ids)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    return SamplingMask(torch.from_numpy(offsets), torch.from_numpy(np.concatenate(token_ids).astype(np.int64)))


def with_truncated_masked(batch: Batch) -> Batch:
    """The batch whose completions that were cut off at the length limit are out of its `completion_mask`.

    Before `with_weights`: their tokens then count in no mean. Raises ValueError where the batch does not know them.
    """
    if batch.truncated is None:
        raise ValueError("the batch does not say which completions were cut off: build it with `truncated`")
    keep = ~batch.truncated[batch.sequence_ids]
    return dataclasses.replace(batch, completion_mask=batch.completion_mask & keep)


def with_weights(
    batch: Batch,
    *,
    aggregation: Aggregation,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
    constant_length: int | None = None,
) -> Batch:
    """The batch with `weights` for one optimizer step; see `grpo.losses.token_weights` for the arguments.

    Call it on a whole minibatch, before `split_microbatches`; with several ranks the totals are those over all.
    """
    weights = token_weights(
        batch.completion_mask,
        batch.sequence_ids,
        batch.num_sequences,
        aggregation=aggregation,
        total_tokens=total_tokens,
        total_sequences=total_sequences,
        constant_length=constant_length,
        dtype=batch.advantages.dtype,
    )
    return dataclasses.replace(batch, weights=weights)


def select_sequences(batch: Batch, indices: Sequence[int]) -> Batch:
    """A batch of the sequences at `indices` (places in this batch), in that order; `weights` are kept as they are."""
    chosen = torch.tensor(list(indices), dtype=torch.int64, device=batch.input_ids.device)
    sequence_ids, _, cu_seqlens = layout(batch.cu_seqlens.diff().long()[chosen])
    source = token_places(batch, indices)
    per_token = {name: getattr(batch, name) for name in _PER_TOKEN}
    taken: dict[str, Any] = {name: None if value is None else value[source] for name, value in per_token.items()}
    return Batch(
        **taken,
        sequence_ids=sequence_ids,
        cu_seqlens=cu_seqlens,
        sequence_index=batch.sequence_index[chosen],
        truncated=None if batch.truncated is None else batch.truncated[chosen],
        sampling_mask=None if batch.sampling_mask is None else batch.sampling_mask.select(source),
    )


def token_places(batch: Batch, indices: Sequence[int]) -> Tensor:
    """Where the tokens of the sequences at `indices` stand in this batch, one sequence after the other; int64 [n]."""
    chosen = torch.tensor(list(indices), dtype=torch.int64, device=batch.input_ids.device)
    sequence_ids, position_ids, _ = layout(batch.cu_seqlens.diff().long()[chosen])
    return batch.cu_seqlens.long()[chosen][sequence_ids] + position_ids


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of all sequences, put back in the order of `sequence_index`: undoes any split of a step.

    Raises ValueError where an optional field is present in some of the batches only.
    """
    if not batches:
        raise ValueError("nothing to concatenate: the list of batches is empty")
    joined: dict[str, Any] = {}
    for name in (*_PER_TOKEN, "truncated", "sampling_mask"):
        values = [getattr(batch, name) for batch in batches]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values):
            raise ValueError(f"{name} is present in {len(present)} of {len(values)} batches: fill it in all or in none")
        join = _join_masks if name == "sampling_mask" else torch.cat
        joined[name] = join(present) if present else None
    lengths = torch.cat([batch.cu_seqlens.diff().long() for batch in batches])
    sequence_ids, _, cu_seqlens = layout(lengths)
    sequence_index = torch.cat([batch.sequence_index for batch in batches])
    whole = Batch(**joined, sequence_ids=sequence_ids, cu_seqlens=cu_seqlens, sequence_index=sequence_index)
    return select_sequences(whole, sequence_index.argsort(stable=True).tolist())


def _join_masks(masks: Sequence[SamplingMask]) -> SamplingMask:
    counts = torch.cat([mask.offsets.diff() for mask in masks])
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return SamplingMask(offsets, torch.cat([mask.token_ids for mask in masks]))


def split_minibatches(batch: Batch, num_minibatches: int, *, seed: int | None = None) -> list[Batch]:
    """Cut a step by whole sequences into `num_minibatches` parts whose sizes differ by at most one sequence.

    In order, or shuffled by `seed` alone (R1-Zero splits at random). Raises UserError if a part would be empty.
    """
    count = batch.num_sequences
    if not 1 <= num_minibatches <= count:
        raise UserError(
            f"num_minibatches = {num_minibatches} cannot split {count} samples: set it between 1 and {count}"
        )
    order = range(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [count * part // num_minibatches for part in range(num_minibatches + 1)]
    return [select_sequences(batch, order[start:end]) for start, end in pairwise(bounds)]


def split_microbatches(batch: Batch, max_tokens_per_microbatch: int) -> list[Batch]:
    """Cut a minibatch into micro-batches of at most that many tokens: longest first, each where it fits best.

    Neither loss nor gradient depends on it (weights are fixed before). Raises UserError for a sequence above the limit.
    """
    (own,) = plan_microbatches(batch, max_tokens_per_microbatch)
    return [select_sequences(batch, places) for places in own]


def plan_microbatches(batch: Batch, max_tokens_per_microbatch: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """The places of each micro-batch's sequences, for every rank; see `balance_over_ranks`.

    Raises UserError for a sequence above the limit.
    """
    lengths = batch.cu_seqlens.diff().tolist()
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > max_tokens_per_microbatch:
        raise UserError(
            f"max_tokens_per_microbatch = {max_tokens_per_microbatch} is below the {lengths[longest]} tokens of sample "
            f"{int(batch.sequence_index[longest])}: raise it to the longest prompt plus completion, or shorten those"
        )
    return balance_over_ranks(lengths, num_ranks, max_tokens_per_microbatch)


def _check_sample(sample: Sample, advantage: float) -> None:
    name = f"sample {sample.sample_index} of task {sample.task_id}"
    if not sample.prompt_ids:
        raise UserError(f"{name} has an empty prompt: its first token would have nothing to be predicted from")
    if len(sample.rollout_logprobs) != len(sample.completion_ids):
        raise UserError(
            f"{name} has {len(sample.completion_ids)} completion tokens but {len(sample.rollout_logprobs)} "
            "rollout_logprobs: the engine must return one per sampled token"
        )
    if not np.isfinite(sample.rollout_logprobs).all():
        raise UserError(f"{name} has a rollout_logprob that is not finite: the engine's weights or sampling are broken")
    if not np.isfinite(advantage):
        raise UserError(f"{name} has the advantage {advantage}: its reward is not a number")
