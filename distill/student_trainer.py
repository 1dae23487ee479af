"""`StudentTrainer`: one optimizer step per batch, on whatever loss it is given, in one process or as one of several ranks.

Every rank is given the whole batch and takes its share; what the loss is divided by is known before the cut, so gradients
and metrics are sums and do not depend on `max_tokens_per_microbatch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from distill.lora import adapter_state, load_adapter_state
from distill.student_config import TrainerConfig
from distill.student_loss import StepTotals, StudentBatch, StudentLoss
from policy.balance import balance_experts
from policy.interface import Policy
from policy.optim import parameter_groups
from policy.packing import balance_over_ranks, wasted_shares
from policy.parallel import clip_grad_norm, sum_over_ranks
from rollout.records import seed_for


class NonFiniteStudentError(RuntimeError):
    """Too many optimizer steps in a row had no finite loss or gradient; the batch is saved where the message says."""


def warmup_then_cosine(warmup_steps: int, num_steps: int, final_share: float) -> Callable[[int], float]:
    """Factor on the learning rate of step `step` (from 0): linear from 1 / warmup_steps to 1, then half a cosine from 1 at
    step `warmup_steps` towards `final_share` at `num_steps`, as transformers' `cosine_with_min_lr`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


class StudentTrainer:
    """Holds the student, its optimizer and its loss; the state between steps is weights, AdamW's moments and one count.

    `model` is in place already: on its device, spread by `parallelize` over the process group, or with adapters, beside
    which nothing learns. Where it is spread, all ranks make every call, with the same arguments, and get the same metrics.
    """

    def __init__(
        self,
        model: Policy,
        config: TrainerConfig,
        loss: StudentLoss,
        *,
        num_steps: int,
        seed: int,
        bad_batch_path: Path,
    ) -> None:
        self.model, self.config, self.loss = model, config, loss
        self.seed, self.bad_batch_path = seed, bad_batch_path
        self.spread = isinstance(model, FSDPModule)
        self.num_ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if self.spread else (1, 0)
        self.device = next(model.parameters()).device
        self.factor = warmup_then_cosine(round(config.warmup_share * num_steps), num_steps, config.final_lr_share)
        groups = _learning_groups(model, config)
        self.base_rates = [group["lr"] for group in groups]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.skipped_in_a_row = 0
        model.enable_activation_checkpointing(config.activation_checkpointing)

    def step(self, batch: StudentBatch, step: int) -> dict[str, float]:
        """Learn from the whole batch of step `step`, which its rate and the seed of its dropout follow from.

        Metrics are the loss's own, with `grad_norm`, `lr`, what was learned from and how well it was packed. A step whose
        loss or gradient is not finite is skipped; NonFiniteStudentError after `max_skipped_steps` in a row.
        """
        config = self.config
        self.model.train()
        self.adamw.zero_grad(set_to_none=True)
        torch.manual_seed(seed_for(self.seed, step, "dropout", self.rank))
        for group, rate in zip(self.adamw.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * self.factor(step)
        plan = balance_over_ranks(batch.lengths, self.num_ranks, config.max_tokens_per_microbatch)
        measured = self._backward(batch, plan[self.rank])
        norm = float(self._clip())
        finite = math.isfinite(norm) and all(map(math.isfinite, measured.values()))
        if finite:
            self.skipped_in_a_row = 0
            self.adamw.step()
        else:
            self._skip(batch, step, norm, measured)
        load = balance_experts(self.model, config.balance_gamma, sum_over_ranks if self.spread else None)
        packing, imbalance = wasted_shares(batch.lengths, plan, config.max_tokens_per_microbatch)
        return {
            **measured,
            "grad_norm": norm,
            "lr": config.lr * self.factor(step),
            "skipped": int(not finite),
            "num_sequences": len(batch.lengths),
            "num_tokens": len(batch.input_ids),
            "num_target_tokens": batch.num_targets,
            "num_microbatches": len(plan[self.rank]),
            "packing_waste": packing,
            "imbalance_waste": imbalance,
            **load.metrics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the student's weights that the next step depends on, with adapters, which are not among these."""
        if self.spread:
            raise ValueError("this trainer's state is spread over ranks: write it with the sharded checkpoint")
        return self.counters() | {"adamw": self.adamw.state_dict(), "adapters": dict(adapter_state(self.model))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        load_adapter_state(self.model, state["adapters"])
        self.adamw.load_state_dict(state["adamw"])
        self.load_counters(state)

    def counters(self) -> dict[str, Any]:
        """The state that is plain numbers."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_counters(self, state: Mapping[str, Any]) -> None:
        """Take up the numbers."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])

    def _backward(self, batch: StudentBatch, parts: list[list[int]]) -> dict[str, float]:
        """Gradients of this rank's micro-batches, which may hold nothing; the step's metrics."""
        totals = StepTotals.of(batch, len(self.model.mtp_layers))
        sums: dict[str, Tensor] = {}
        for sequences in parts:
            # Dense layers can't take an empty batch; experts can, and would count the placeholder's load.
            idle = not sequences and not self.model.moe_blocks
            part = batch.placeholder() if idle else batch.select(sequences)
            loss, metrics = self.loss(self.model, part.to(self.device), totals)
            loss.backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
        if self.spread and sums:
            names = sorted(sums)
            stacked = torch.stack([sums[name] for name in names])
            sum_over_ranks(stacked)
            sums = dict(zip(names, stacked, strict=True))
        return {name: float(value) for name, value in sums.items()}

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.spread:
            return clip_grad_norm(parameters, self.config.max_grad_norm)
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)

    def _skip(self, batch: StudentBatch, step: int, norm: float, measured: Mapping[str, float]) -> None:
        self.skipped_in_a_row += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.skipped_in_a_row < self.config.max_skipped_steps:
            return
        if self.rank == 0:
            self.bad_batch_path.parent.mkdir(parents=True, exist_ok=True)
            values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            torch.save(values | {"values": dict(batch.values)}, self.bad_batch_path)
        raise NonFiniteStudentError(
            f"step {step}: {self.skipped_in_a_row} optimizer steps in a row had no finite loss (the last: loss "
            f"{measured.get('loss')}, gradient norm {norm}). The batch is in {self.bad_batch_path}; lower trainer.lr, or "
            "look at its rows."
        )


def _learning_groups(model: Policy, config: TrainerConfig) -> list[dict[str, Any]]:
    """AdamW's groups: every parameter that learns; prediction layers without a loss have no gradient, so no state."""
    idle: set[int] = set()
    if not config.mtp_loss_weight:
        idle = {id(parameter) for layer in model.mtp_layers for parameter in layer.parameters()}
    groups = parameter_groups(model, config.lr, config.weight_decay, config.lr_scale)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad and id(p) not in idle]
    return [group for group in groups if group["params"]]
