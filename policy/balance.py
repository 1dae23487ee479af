"""Auxiliary-loss-free balancing: each expert's bias moves against its measured load (arXiv 2408.15664)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.interface import Policy


@dataclass(frozen=True)
class ExpertLoad:
    """Tokens per expert since the last update, fp32 [E], by index of the layer."""

    by_layer: Mapping[int, Tensor]

    def max_violation(self) -> dict[int, float]:
        """How much more than its share the busiest expert of each layer had: max(load) / mean(load) - 1."""
        return {layer: float(load.max() / load.mean() - 1) for layer, load in self.by_layer.items() if load.sum() > 0}

    def metrics(self) -> dict[str, float]:
        """`max_violation` over all layers and per layer, with the busiest and the idlest expert's share of the mean."""
        violations = self.max_violation()
        named = {"max_violation": max(violations.values())} if violations else {}
        for layer, violation in violations.items():
            load = self.by_layer[layer]
            named[f"max_violation/layer_{layer}"] = violation
            named[f"min_load/layer_{layer}"] = float(load.min() / load.mean())
        return named


@torch.no_grad()
def balance_experts(model: Policy, gamma: float, all_reduce: Callable[[Tensor], None] | None = None) -> ExpertLoad:
    """Move each bias by gamma towards even load and forget the load; returns it. With gamma 0, it only measures.

    `all_reduce` sums a tensor over the ranks in place, where each counted its own tokens. V2's routers have no bias:
    their load is measured, and a gamma other than 0 is a ValueError. A dense policy has no load.
    """
    loads: dict[int, Tensor] = {}
    for index, block in model.moe_blocks.items():
        if gamma and not hasattr(block.gate, "e_score_correction_bias"):
            raise ValueError(
                f"gamma={gamma} moves routing biases, which the routers of this policy (V2's) lack: set it to 0"
            )
        load = block.load.clone()
        if all_reduce is not None:
            all_reduce(load)
        block.load.zero_()
        if gamma and load.sum() > 0:
            block.gate.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
        loads[index] = load
    return ExpertLoad(loads)
