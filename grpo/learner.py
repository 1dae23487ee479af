"""The learner: one rollout batch in, one or more AdamW steps on the GRPO loss, metrics out.

Imports neither ray nor vllm: with the torch engine it runs wherever torch does.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from grpo.batch import Batch, concat_batches, split_microbatches, split_minibatches, with_weights
from grpo.config import AlgorithmConfig, LearnerConfig
from grpo.losses import LossTerms, grpo_loss
from policy.auxiliary import AuxiliaryTotals, auxiliary_loss
from policy.balance import balance_experts
from policy.interface import Policy
from policy.logprobs import TokenLogprobs, token_logprobs
from policy.optim import parameter_groups, warmup_constant
from rollout.errors import UserError


class NonFiniteLossError(RuntimeError):
    """Too many optimizer steps in a row had no finite loss or gradient; the batch is saved where the message says."""


class Learner:
    """Holds the policy, its optimizer and, when the KL has a weight, the reference it is measured against.

    `temperature` is that of the samples: log-probabilities are taken of the distribution that was sampled from.
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
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"the learner was started as {self.accelerator.num_processes} processes and runs as one: "
                "start it without accelerate launch"
            )
        self.config, self.algorithm = config, algorithm
        self.temperature, self.seed, self.bad_batch_path = temperature, seed, bad_batch_path
        groups = parameter_groups(model, config.lr, config.weight_decay, config.lr_scale)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.model: Policy
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.warmup = warmup_constant(config.warmup_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.warmup)
        self.model.enable_activation_checkpointing(config.activation_checkpointing)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if algorithm.kl_coef > 0 else None
        self.num_optimizer_steps = 0
        self.skipped_in_a_row = 0

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Learn from one rollout batch; metrics are means over its completion tokens, as in `LossTerms.metrics`.

        An optimizer step whose loss or gradient is not finite is skipped and counted in `skipped`; NonFiniteLossError
        after `max_skipped_steps` in a row, with the minibatch saved.
        """
        self.model.train()
        batch = batch.to(self.accelerator.device)
        if self.reference is not None:
            batch = self._fill(batch, "ref_logprobs", self.reference)
        if self.config.num_minibatches > 1:
            batch = self._fill(batch, "old_logprobs", self.model)
        # With one minibatch the policy that learns is still the one before the first update.
        terms: list[LossTerms] = []
        norms: list[float] = []
        skipped = 0
        seed = self.seed * 1_000_003 + step
        for minibatch in split_minibatches(batch, self.config.num_minibatches, seed=seed):
            minibatch = with_weights(
                minibatch, aggregation=self.algorithm.aggregation, constant_length=self.algorithm.constant_length
            )
            term, norm = self._optimizer_step(minibatch)
            terms.append(term)
            norms.append(norm)
            skipped += not self._finite(term, norm)
        load = balance_experts(self.model, self.config.balance_gamma)
        return self._metrics(terms, norms, skipped) | load.metrics()

    def refresh_reference(self) -> None:
        """Make the policy's present weights the reference."""
        if self.reference is not None:
            self.reference.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the policy's weights that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "num_optimizer_steps": self.num_optimizer_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "reference": None if self.reference is None else self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.num_optimizer_steps = state["num_optimizer_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def _optimizer_step(self, minibatch: Batch) -> tuple[LossTerms, float]:
        self.optimizer.zero_grad(set_to_none=True)
        total: LossTerms | None = None
        totals = AuxiliaryTotals.of(
            minibatch.position_ids, minibatch.completion_mask, minibatch.num_sequences, len(self.model.mtp_layers)
        )
        for part in split_microbatches(minibatch, self.config.max_tokens_per_microbatch):
            loss, terms = self._loss(part, totals)
            self.accelerator.backward(loss)
            total = terms if total is None else total + terms
        assert total is not None  # a minibatch has at least one sample
        clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        assert clipped is not None
        norm = float(clipped)
        self.num_optimizer_steps += 1
        if self._finite(total, norm):
            self.skipped_in_a_row = 0
            self.optimizer.step()
        else:
            self._skip(minibatch, total, norm)
        with warnings.catch_warnings():
            # The first optimizer step may be skipped; its place in the schedule passes all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.schedule.step()
        return total, norm

    def _loss(self, part: Batch, totals: AuxiliaryTotals) -> tuple[Tensor, LossTerms]:
        algorithm = self.algorithm
        assert part.weights is not None
        said = self._logprobs(self.model, part, auxiliary=True)
        loss, terms = grpo_loss(
            said.logprobs,
            advantages=part.advantages,
            weights=part.weights,
            completion_mask=part.completion_mask,
            sequence_ids=part.sequence_ids,
            num_sequences=part.num_sequences,
            old_logprobs=part.old_logprobs,
            rollout_logprobs=part.rollout_logprobs,
            ref_logprobs=part.ref_logprobs,
            entropy=said.entropy.detach(),  # measured, not trained
            ratio_level=algorithm.ratio_level,
            surrogate=algorithm.surrogate,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            cispo_ratio_max=algorithm.cispo_ratio_max,
            kl_coef=algorithm.kl_coef,
            kl_estimator=algorithm.kl_estimator,
            kl_importance_weighted=algorithm.kl_importance_weighted,
        )
        config = self.config
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
        )

    @torch.no_grad()
    def _fill(self, batch: Batch, field: str, model: Policy) -> Batch:
        """The batch with `field` [T] set to log-probabilities under `model`."""
        parts = split_microbatches(batch, self.config.max_tokens_per_microbatch)
        filled = [dataclasses.replace(part, **{field: self._logprobs(model, part).logprobs}) for part in parts]
        return concat_batches(filled)

    @staticmethod
    def _finite(terms: LossTerms, norm: float) -> bool:
        return math.isfinite(norm) and bool(torch.isfinite(terms.loss))

    def _skip(self, minibatch: Batch, terms: LossTerms, norm: float) -> None:
        self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            self.bad_batch_path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {field.name: getattr(minibatch, field.name) for field in dataclasses.fields(minibatch)},
                self.bad_batch_path,
            )
            raise NonFiniteLossError(
                f"{self.skipped_in_a_row} optimizer steps in a row had no finite loss (the last: loss {float(terms.loss)}, "
                f"gradient norm {norm}). The batch is in "
                f"{self.bad_batch_path}; look at its rollout_logprobs and advantages first."
            )

    def _metrics(self, terms: list[LossTerms], norms: list[float], skipped: int) -> dict[str, float]:
        # A skipped minibatch must not blank out the others.
        finite = [(term, norm) for term, norm in zip(terms, norms, strict=True) if self._finite(term, norm)]
        terms = [term for term, _ in finite] or terms[:1]
        norms = [norm for _, norm in finite] or norms[:1]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        values = total.metrics()
        count = len(terms)
        metrics = {
            "loss": values["loss"] / count,
            "policy_loss": values["policy_loss"] / count,
            "kl_loss": values["kl_loss"] / count,
            "kl": values["kl"],
            "entropy": values["entropy"],
            "clip_fraction": values["clipped_low"] + values["clipped_high"] + values["clipped_dual"],
            "clip_fraction_low": values["clipped_low"],
            "clip_fraction_high": values["clipped_high"],
            "ratio_mean": values["ratio"],
            "logprob_gap_mean": values["logprob_gap"],
            "logprob_gap_max": values["logprob_gap_max"],
            "grad_norm": sum(norms) / count,
            "lr": self.config.lr * self.warmup(self.num_optimizer_steps - 1),
            "skipped": skipped,
        }
        if self.reference is None:  # there is no KL to speak of
            del metrics["kl"], metrics["kl_loss"]
        return metrics
