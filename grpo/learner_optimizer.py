"""AdamW of the learner: a rate per layer group that warms up, and states that may rest in main memory."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config import LearnerConfig
from policy.interface import Policy
from policy.optim import parameter_groups, warmup_constant
from policy.sharding import local


class LearnerOptimizer:
    """AdamW over the policy's layer groups; the experts, which other ranks share, are a group of their own.

    The rate of an optimizer step follows from its number alone, so that beside `adamw` there is no state.
    """

    def __init__(self, model: Policy, config: LearnerConfig):
        groups = parameter_groups(model, config.lr, config.weight_decay, config.lr_scale)
        if not config.mtp_loss_weight:  # drafts then have no gradient: without states there is nothing to save
            idle = {id(parameter) for layer in model.mtp_layers for parameter in layer.parameters()}
            for group in groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in idle]
            groups = [group for group in groups if group["params"]]
        self.base_rates = [group["lr"] for group in groups]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.warmup = warmup_constant(config.warmup_steps)
        self.offload = config.offload_optimizer
        self.device = next(model.parameters()).device

    def set_rates(self, num_steps_done: int) -> None:
        """Set every group's rate to that of the optimizer step after so many."""
        for group, rate in zip(self.adamw.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * self.warmup(num_steps_done)

    def step(self) -> None:
        """One step of AdamW; states that rest in main memory come to the device for it and go back."""
        if self.offload:
            self._move_states(self.device)
        self.adamw.step()
        self.rest()

    def rest(self) -> None:
        """Put the states where they rest between steps; also after loading them."""
        if self.offload:
            self._move_states(torch.device("cpu"))

    @torch.no_grad()
    def _move_states(self, device: torch.device) -> None:
        for state in self.adamw.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim():  # AdamW's count of steps stays in main memory anyway
                    shard = local(value)
                    shard.data = shard.data.to(device)
