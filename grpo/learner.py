"""The learner: one rollout batch in, one or more AdamW steps on the GRPO loss, metrics out; in one process or several.

Imports neither ray nor vllm: with the torch engine it runs wherever torch does. Every rank is given the whole batch and
takes its share, so that what a loss is divided by needs no talk between ranks; gradients and metrics are then sums.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from grpo.batch import (
    Batch,
    plan_microbatches,
    select_sequences,
    split_minibatches,
    token_places,
    with_truncated_masked,
    with_weights,
)
from grpo.config import AlgorithmConfig, LearnerConfig
from grpo.learner_metrics import Update, over_ranks, step_metrics
from grpo.learner_optimizer import LearnerOptimizer
from grpo.learner_state import load_learner_state, save_learner_state
from grpo.losses import LossTerms
from grpo.objective import entropy_control, policy_loss
from grpo.reference import move_towards, reference_of
from policy.auxiliary import AuxiliaryTotals, auxiliary_loss
from policy.balance import balance_experts
from policy.deepseek import DeepseekPolicy
from policy.interface import Policy
from policy.kernels.dispatch import choose_backend
from policy.logprobs import TokenLogprobs, token_logprobs
from policy.packing import wasted_shares
from policy.parallel import clip_grad_norm, parallelize, sum_over_ranks
from rollout.errors import UserError

EPOCH_STRIDE = 0x9E3779B1  # between the seeds of a step's epochs; generators look at the lowest 32 bits alone


class NonFiniteLossError(RuntimeError):
    """Too many optimizer steps in a row had no finite loss or gradient; the batch is saved where the message says."""


class Learner:
    """Holds the policy, its optimizer and, when the KL has a weight, the reference it is measured against.

    `temperature` is that of the samples: log-probabilities are taken of the distribution that was sampled from. With a
    process group of several ranks, or for bfloat16, the policy is spread over it (`parallelize`), unless it comes so
    spread; then all ranks make every call, with the same arguments, and get the same metrics.
    """

    def __init__(
        self,
        model: Policy,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        seed: int,
        bad_batch_path: Path,
    ):
        self.config, self.algorithm = config, algorithm
        self.temperature, self.seed, self.bad_batch_path = temperature, seed, bad_batch_path
        self.model, self.num_ranks, self.rank = _placed(model, config)
        self.spread = isinstance(self.model, FSDPModule)
        self.device = next(self.model.parameters()).device
        if config.precision == "fp8":
            _compute_in_fp8(self.model, self.device)
        self.reference: Policy | None = None
        if algorithm.kl_coef > 0:
            precision = getattr(torch, config.dtype)
            self.reference = reference_of(self.model, expert_parallel=config.expert_parallel, precision=precision)
        self.optimizer = LearnerOptimizer(self.model, config)
        self.optimizer.set_rates(0)
        self.model.enable_activation_checkpointing(config.activation_checkpointing)
        self.entropy = entropy_control(algorithm)
        self.num_optimizer_steps = 0
        self.skipped_in_a_row = 0

    def step(self, batch: Batch | None, step: int) -> dict[str, float]:
        """Learn from one rollout batch; metrics are means over its completion tokens, as in `LossTerms.metrics`.

        Without a batch, where a step has nothing to teach, the reference alone moves on, and there are no metrics.

        Log-probabilities that `fill` left in the batch are used as they are; the others are computed once, before the
        first optimizer step. One whose loss or gradient is not finite is skipped and counted in `skipped`;
        NonFiniteLossError after `max_skipped_steps` in a row, with the minibatch saved.
        """
        if batch is None:
            self._move_reference(step)
            return {}
        algorithm, config = self.algorithm, self.config
        self._check_replay(batch)
        batch = batch.to("cpu")
        if algorithm.mask_truncated:
            batch = with_truncated_masked(batch)
        # With one optimizer step the policy that learns is the old one.
        batch = self._filled(batch, old=config.num_minibatches * config.num_epochs > 1)
        self.model.train()
        updates = [self._update(minibatch) for minibatch in self._minibatches(batch, step)]
        load = balance_experts(self.model, config.balance_gamma, sum_over_ranks if self.spread else None)
        self._move_reference(step)
        return step_metrics(updates, has_reference=self.reference is not None) | load.metrics()

    def fill(self, batch: Batch) -> Batch:
        """The batch, in main memory, with `old_logprobs` [T] under the present policy and, if there is a reference,
        its `ref_logprobs`; what is filled already stays."""
        self._check_replay(batch)
        return self._filled(batch.to("cpu"), old=True)

    def refresh_reference(self) -> None:
        """Make the policy's present weights the reference."""
        if self.reference is not None:
            move_towards(self.reference, self.model, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the policy's weights that the next step depends on; of a spread policy use `sharded_state`."""
        if self.spread:
            raise ValueError("this learner's state is spread over ranks: write it with sharded_state")
        return self._counters() | {
            "optimizer": self.optimizer.adamw.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.adamw.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        self._take_up(state)

    def sharded_state(self, folder: Path) -> None:
        """Write what `state_dict` holds into an existing folder, every rank its shards; collective."""
        save_learner_state(folder, self.model, self.optimizer.adamw, self.reference, self._counters())

    def load_sharded_state(self, folder: Path) -> None:
        """Take up what `sharded_state` wrote, on whatever number of ranks; collective."""
        self._take_up(load_learner_state(folder, self.model, self.optimizer.adamw, self.reference))

    def _counters(self) -> dict[str, Any]:
        return {
            "num_optimizer_steps": self.num_optimizer_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "entropy": {"coef": self.entropy.coef, "active": self.entropy.active},
        }

    def _take_up(self, counters: dict[str, Any]) -> None:
        self.num_optimizer_steps = counters["num_optimizer_steps"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.entropy = dataclasses.replace(self.entropy, **counters.get("entropy", {}))
        self.optimizer.set_rates(self.num_optimizer_steps)
        self.optimizer.rest()

    def _minibatches(self, batch: Batch, step: int) -> Iterator[Batch]:
        """What each optimizer step learns from, with weights: every epoch is split anew, by seed, step and epoch alone.

        Where filtering left fewer samples than there are to be minibatches, there are as many as samples.
        """
        algorithm = self.algorithm
        count = min(self.config.num_minibatches, batch.num_sequences)
        for epoch in range(self.config.num_epochs):
            seed = (self.seed * 1_000_003 + step + epoch * EPOCH_STRIDE) % 2**64
            for minibatch in split_minibatches(batch, count, seed=seed):
                yield with_weights(
                    minibatch, aggregation=algorithm.aggregation, constant_length=algorithm.constant_length
                )

    def _update(self, minibatch: Batch) -> Update:
        """One optimizer step, or none where loss or gradient is not finite; the schedule counts it all the same."""
        config = self.config
        self.optimizer.adamw.zero_grad(set_to_none=True)
        plan = plan_microbatches(minibatch, config.max_tokens_per_microbatch, self.num_ranks)
        terms = self._backward(minibatch, plan[self.rank])
        packing, imbalance = wasted_shares(minibatch.cu_seqlens.diff().tolist(), plan, config.max_tokens_per_microbatch)
        update = Update(
            terms=over_ranks(terms, self.device) if self.spread else terms,
            norm=float(self._clip()),
            lr=config.lr * self.optimizer.warmup(self.num_optimizer_steps),
            entropy_coef=self.entropy.applied,
            num_microbatches=len(plan[self.rank]),
            packing_waste=packing,
            imbalance_waste=imbalance,
        )
        self.num_optimizer_steps += 1
        if update.finite:
            self.skipped_in_a_row = 0
            if update.terms.num_tokens:  # where all is masked, momentum alone would move the weights
                self.optimizer.step()
            if math.isfinite(update.entropy):
                self.entropy = self.entropy.after(update.entropy)
        else:
            self._skip(minibatch, update)
        self.optimizer.set_rates(self.num_optimizer_steps)
        return update

    def _backward(self, minibatch: Batch, parts: list[list[int]]) -> LossTerms:
        """Gradients of this rank's micro-batches, which may hold nothing; what their losses were made of."""
        totals = AuxiliaryTotals.of(
            minibatch.position_ids, minibatch.completion_mask, minibatch.num_sequences, len(self.model.mtp_layers)
        )
        total: LossTerms | None = None
        for places in parts:
            loss, terms = self._loss(select_sequences(minibatch, places).to(self.device), totals)
            loss.backward()
            total = terms if total is None else total + terms
        assert total is not None  # a plan has at least one micro-batch
        return total

    def _clip(self) -> Tensor:
        if self.spread:
            return clip_grad_norm(self.model.parameters(), self.config.max_grad_norm)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)

    def _loss(self, part: Batch, totals: AuxiliaryTotals) -> tuple[Tensor, LossTerms]:
        config = self.config
        said = self._logprobs(self.model, part, auxiliary=True)
        loss, terms = policy_loss(
            self.algorithm, said.logprobs, batch=part, entropy=said.entropy, entropy_coef=self.entropy.applied
        )
        return loss + auxiliary_loss(
            said, totals, mtp_loss_weight=config.mtp_loss_weight, balance_alpha=config.balance_alpha
        ), terms

    def _logprobs(self, model: Policy, part: Batch, *, auxiliary: bool = False) -> TokenLogprobs:
        """What `model` says of the part's tokens, with what the auxiliary losses need if they have a weight."""
        return token_logprobs(
            model,
            part.input_ids,
            part.position_ids,
            part.cu_seqlens,
            mask=part.completion_mask,
            temperature=self.temperature,
            # The samples are the policy's own: their likelihood must not be raised, so the gradient stops at the drafts.
            mtp="detached" if auxiliary and self.config.mtp_loss_weight else False,
            routed_experts=part.routed_experts if self.algorithm.routing_replay else None,
            return_balance_loss=auxiliary and self.config.balance_alpha > 0,
            sampling_mask=part.sampling_mask if self.algorithm.sampling_mask_replay else None,
        )

    def _filled(self, batch: Batch, *, old: bool) -> Batch:
        models: dict[str, Policy | None] = {"ref_logprobs": self.reference}
        if old:
            models["old_logprobs"] = self.model
        missing = {f: model for f, model in models.items() if model is not None and getattr(batch, f) is None}
        return dataclasses.replace(batch, **{f: self._all_logprobs(model, batch) for f, model in missing.items()})

    @torch.no_grad()
    def _all_logprobs(self, model: Policy, batch: Batch) -> Tensor:
        """log-probabilities [T] of the whole batch under `model`, which the ranks share out and all get; collective."""
        out = torch.zeros(batch.num_tokens, device=self.device)
        for places in plan_microbatches(batch, self.config.max_tokens_per_microbatch, self.num_ranks)[self.rank]:
            said = self._logprobs(model, select_sequences(batch, places).to(self.device))
            out[token_places(batch, places).to(self.device)] = said.logprobs
        if self.spread:
            sum_over_ranks(out)  # every token is one rank's, and 0 on the others
        return out.cpu()

    def _check_replay(self, batch: Batch) -> None:
        """UserError where the algorithm replays what the batch does not hold."""
        for option, field in (("routing_replay", "routed_experts"), ("sampling_mask_replay", "sampling_mask")):
            if getattr(self.algorithm, option) and getattr(batch, field) is None:
                raise UserError(f"algorithm.{option} needs samples with their {field}, and the engine returned none")

    def _move_reference(self, step: int) -> None:
        """What the algorithm makes of the reference after a step."""
        every, decay = self.algorithm.reference_refresh_steps, self.algorithm.reference_ema_decay
        if every and (step + 1) % every == 0:
            self.refresh_reference()
        if decay is not None and self.reference is not None:
            move_towards(self.reference, self.model, 1 - decay)

    def _skip(self, minibatch: Batch, update: Update) -> None:
        self.skipped_in_a_row += 1
        self.optimizer.adamw.zero_grad(set_to_none=True)
        if self.skipped_in_a_row < self.config.max_skipped_steps:
            return
        if self.rank == 0:
            self.bad_batch_path.parent.mkdir(parents=True, exist_ok=True)
            values = {field.name: getattr(minibatch, field.name) for field in dataclasses.fields(minibatch)}
            if minibatch.sampling_mask is not None:
                values["sampling_mask"] = minibatch.sampling_mask._asdict()  # loads without our class
            torch.save(values, self.bad_batch_path)
        raise NonFiniteLossError(
            f"{self.skipped_in_a_row} optimizer steps in a row had no finite loss (the last: loss "
            f"{float(update.terms.loss)}, gradient norm {update.norm}). The batch is in {self.bad_batch_path}; look at its "
            "rollout_logprobs and advantages first."
        )


def _placed(model: Any, config: LearnerConfig) -> tuple[Policy, int, int]:
    """The policy where it learns, number of ranks and own rank; UserError where processes are missing or not wanted."""
    started = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if started else 1
    if isinstance(model, FSDPModule):
        return cast(Policy, model), world, dist.get_rank()
    # A group of one may be an engine's.
    if world > 1 or (started and config.dtype != "float32"):
        spread = parallelize(model, expert_parallel=config.expert_parallel, precision=getattr(torch, config.dtype))
        return spread, world, dist.get_rank()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"the learner was started as {os.environ['WORLD_SIZE']} processes, without a process group between them: "
            "start one process; learner.num_ranks with learner.placement = 'ray' starts the others"
        )
    if config.dtype != "float32":
        raise UserError(f"learner.dtype = {config.dtype!r} needs a process group, also of one process")
    return model.to(PartialState().device), 1, 0


def _compute_in_fp8(model: Policy, device: torch.device) -> None:
    """UserError for a policy, KernelUnavailableError for a device, that FP8 is not for."""
    if not isinstance(model, DeepseekPolicy):
        raise UserError("learner.precision = 'fp8' is for DeepSeek policies; a dense one learns in learner.dtype")
    choose_backend('learner.precision = "fp8"', torch.empty(0, device=device))
    model.set_precision("fp8")
