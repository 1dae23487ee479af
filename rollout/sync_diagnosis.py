"""After a weight sync that failed its probe: which layer group is to blame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from policy.checkpoint import load_hf_state_dict
from policy.interface import Policy
from policy.layer_groups import LAYER_GROUPS, layer_group
from policy.logprobs import token_logprobs
from rollout.engine import Completion, Engine

EXPLAINED = 0.1  # a cause explains a gap when less than this share of it is left without the cause
# Narrow before wide: without experts a wrong router is harmless too. Without embedding or head all gaps are 0, so these
# two cannot be told apart this way.
NEUTRALISED = ("norms", "router_bias", "router", "shared_experts", "dense_mlp", "attention", "experts")


@dataclass(frozen=True)
class Gap:
    """|engine's - learner's| log-probability over a probe's completion tokens, in nats; NaN counts as infinite."""

    mean: float
    largest: float
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Completion]


Measure = Callable[[Sequence[Sequence[int]], Sequence[Completion]], Gap]  # of prompts and what an engine sampled


@torch.no_grad()
def measure_gap(model: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
    """Score with the model what an engine sampled at temperature 1."""
    device = next(model.parameters()).device
    sequences = [[*prompt, *c.token_ids] for prompt, c in zip(prompts, completions, strict=True)]
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    position_ids = torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])
    cu_seqlens = torch.tensor([0, *(len(sequence) for sequence in sequences)], device=device).cumsum(0)
    logprobs = token_logprobs(model, input_ids, position_ids, cu_seqlens)[0].cpu()
    ends = cu_seqlens[1:].tolist()
    own = torch.cat([logprobs[end - len(c.token_ids) : end] for end, c in zip(ends, completions, strict=True)])
    theirs = torch.tensor([value for c in completions for value in c.logprobs])
    gaps = (own - theirs).abs().nan_to_num(nan=float("inf"))
    return Gap(float(gaps.mean()), float(gaps.max()), prompts, completions)


class SyncDiagnosis:
    """Tries causes for `gap` until one explains it; afterwards the engine's weights are not to be used.

    `weights` are those that the engine was given, `scratch` a policy that may be filled with others.
    """

    def __init__(
        self,
        engine: Engine,
        scratch: Policy,
        weights: Mapping[str, Tensor],
        version: int,
        gap: Gap,
        tolerance: float,
        *,
        previous: Mapping[str, Tensor] | None,
        probe: Callable[[Engine, Measure, int], Gap],
    ) -> None:
        self.engine, self.version, self.gap, self.tolerance = engine, version, gap, tolerance
        self.current = {name: weight.detach().cpu() for name, weight in weights.items()}
        self.previous = previous
        self.probe = probe
        self.scratch = scratch.eval()

    def in_words(self) -> str:
        """The layer group to suspect, and why."""
        return self._stale() or self._wrong() or self._unexplained()

    def _stale(self) -> str | None:
        """Do the previous weights of one group, or of all, give the engine's log-probabilities?"""
        if self.previous is None:
            return None
        name, gap = self.engine.name, self.gap.mean
        left = {group: self._gap_with_previous([group]) for group in self._changed_groups()}
        everything = self._gap_with_previous(LAYER_GROUPS)
        best = min(left, key=left.__getitem__, default=None)
        if best is not None and self._explains(left[best]) and left[best] <= everything:
            return (
                f"{name} still seems to hold the previous `{best}` weights: with them the gap falls from {gap:.2g} to "
                f"{left[best]:.2g} nats. Look at how its load_weights handles `{best}`."
            )
        if self._explains(everything):
            return (
                f"{name} still has the previous weights entirely: with them the gap falls from {gap:.2g} to "
                f"{everything:.2g} nats. Its load_weights had no effect; see the engine's log."
            )
        return None

    def _wrong(self) -> str | None:
        """Is the engine right once a group is set to zero (norms: to one) on both sides?"""
        for group in self._neutralised():
            weights = {
                name: torch.full_like(weight, float(group == "norms")) if layer_group(name) == group else weight
                for name, weight in self.current.items()
            }
            self.engine.load_weights(weights, self.version)
            load_hf_state_dict(self.scratch, weights, "the diagnosis")
            remaining = self.probe(self.engine, partial(measure_gap, self.scratch), 2 * self.version).mean
            if remaining <= self.tolerance:
                constant = int(group == "norms")
                return (
                    f"{self.engine.name} is wrong in `{group}`: with these weights set to {constant} on both sides the "
                    f"gap falls from {self.gap.mean:.2g} to {remaining:.2g} nats. They are garbled on their way into "
                    f"the engine, or it computes `{group}` otherwise than the policy."
                )
        return None

    def _unexplained(self) -> str:
        return (
            f"No single group explains it: neither previous weights nor setting {', '.join(self._neutralised())} to zero, one "
            f"at a time, brings {self.engine.name} and the learner together. Suspect `embedding` or `head`, several "
            "groups at once, or another config.json or type than the learner's."
        )

    def _neutralised(self) -> list[str]:
        """The groups to try that the policy has: a dense one has no experts."""
        present = {layer_group(name) for name in self.current}
        return [group for group in NEUTRALISED if group in present]

    def _gap_with_previous(self, groups: Sequence[str]) -> float:
        assert self.previous is not None
        weights = {k: self.previous[k] if layer_group(k) in groups else v for k, v in self.current.items()}
        load_hf_state_dict(self.scratch, weights, "the diagnosis")
        return measure_gap(self.scratch, self.gap.prompts, self.gap.completions).mean

    def _changed_groups(self) -> list[str]:
        assert self.previous is not None
        changed = {layer_group(k) for k, v in self.current.items() if not torch.equal(v, self.previous[k])}
        return [group for group in LAYER_GROUPS if group in changed]

    def _explains(self, remaining: float) -> bool:
        return remaining <= max(EXPLAINED * self.gap.mean, min(self.tolerance, self.gap.mean / 2))
