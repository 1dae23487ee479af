"""What a student's optimizer step is given, what it minimises, and how a loss is plugged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from policy.auxiliary import AuxiliaryTotals, auxiliary_loss
from policy.interface import Policy
from policy.logprobs import token_logprobs
from policy.packing import layout


@dataclass(frozen=True)
class StudentBatch:
    """Packed sequences: ids [T], positions [T] from 0 in each, cumulative lengths [B + 1], and which tokens are targets.

    `targets` [T] is false at the first token of every sequence, which nothing predicts. `values` are further tensors with
    one row per token, for losses that need them: what a teacher said of each, for instance.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Sequence[Tensor],
        prompt_lengths: Sequence[int],
        *,
        loss_on_prompt: bool = False,
        values: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> StudentBatch:
        """Rows of ids [n], of which the first so many are the prompt's; `values` by name, one [n, ...] for each row."""
        lengths = torch.tensor([len(row) for row in rows])
        sequence_ids, position_ids, cu_seqlens = layout(lengths)
        first = 1 if loss_on_prompt else torch.tensor(prompt_lengths).clamp(min=1)[sequence_ids]
        return cls(
            input_ids=torch.cat(list(rows)).long(),
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            targets=position_ids >= first,
            values={name: torch.cat(list(parts)) for name, parts in (values or {}).items()},
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence [B]."""
        return self.cu_seqlens.diff().tolist()

    @property
    def num_targets(self) -> int:
        """How many tokens are targets."""
        return int(self.targets.sum())

    def select(self, sequences: Sequence[int]) -> StudentBatch:
        """The batch of some of the sequences, in that order; none at all make an empty batch."""
        starts = self.cu_seqlens.tolist()
        spans = [torch.arange(starts[index], starts[index + 1]) for index in sequences]
        places = torch.cat([torch.zeros(0, dtype=torch.long), *spans])
        _, position_ids, cu_seqlens = layout(torch.tensor([len(span) for span in spans], dtype=torch.long))
        return StudentBatch(
            input_ids=self.input_ids[places],
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            targets=self.targets[places],
            values={name: value[places] for name, value in self.values.items()},
        )

    def placeholder(self) -> StudentBatch:
        """The first token alone, which is no target: for a rank that has nothing to learn but must pass through all
        layers with the others, where these can't take an empty batch."""
        values = {name: [value[:1]] for name, value in self.values.items()}
        return StudentBatch.of([self.input_ids[:1]], [1], values=values)

    def to(self, device: torch.device | str) -> StudentBatch:
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "values"}
        return replace(self, **tensors, values={name: value.to(device) for name, value in self.values.items()})


@dataclass(frozen=True)
class StepTotals:
    """Of one whole optimizer step, over all micro-batches and ranks: what its sums are divided by."""

    num_targets: int
    auxiliary: AuxiliaryTotals

    @classmethod
    def of(cls, batch: StudentBatch, prediction_depth: int) -> StepTotals:
        """Counted from the step's batch, before it is cut."""
        auxiliary = AuxiliaryTotals.of(batch.position_ids, batch.targets, len(batch.lengths), prediction_depth)
        return cls(batch.num_targets, auxiliary)


class StudentLoss(Protocol):
    """What a student minimises: called for each micro-batch of a step, and the sum over all of them is the step's loss.

    So every term is divided by the step's totals, never by what the micro-batch holds. The second value are metrics
    (scalars without gradient), also shares that are added up. Without targets all are 0, and so is the gradient: a rank
    may have nothing to do.
    """

    def __call__(
        self, model: Policy, batch: StudentBatch, totals: StepTotals
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...


def next_token_loss(logprobs: Tensor, targets: Tensor, num_targets: int) -> Tensor:
    """A micro-batch's share of the mean negative log-likelihood over a step's targets, a scalar in nats.

    `logprobs` [T] of each token given those before it, `targets` [T] the tokens that count. With all of a step's rows in
    one call it is transformers' loss of `labels` (its mean over labels that are not -100).
    """
    return -torch.where(targets, logprobs, 0.0).sum() / num_targets


@dataclass(frozen=True)
class SupervisedLoss:
    """Next-token prediction on the targets, with a DeepSeek policy's auxiliary losses where they have a weight."""

    mtp_loss_weight: float = 0.0
    balance_alpha: float = 0.0

    def __call__(self, model: Policy, batch: StudentBatch, totals: StepTotals) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The micro-batch's share, and of the metrics `loss`, `entropy` and where there is one `auxiliary_loss`."""
        said = token_logprobs(
            model,
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            mask=batch.targets,
            mtp=bool(model.mtp_layers) and self.mtp_loss_weight > 0,
            return_balance_loss=bool(model.moe_blocks) and self.balance_alpha > 0,
        )
        loss = next_token_loss(said.logprobs, batch.targets, totals.num_targets)
        auxiliary = auxiliary_loss(
            said, totals.auxiliary, mtp_loss_weight=self.mtp_loss_weight, balance_alpha=self.balance_alpha
        )
        metrics = {"loss": loss.detach(), "entropy": said.entropy.detach().sum() / totals.num_targets}
        if self.mtp_loss_weight or self.balance_alpha:
            metrics["auxiliary_loss"] = auxiliary.detach()
        return loss + auxiliary, metrics
