"""The check of a recorded answer of another trainer against our loss, in float64.

A case is what a peer computed, as padded [B, T] lists: `source`, `config` (its options), `inputs`, and its answers
`advantages` [B], `loss` and `grad_logprobs` [B, T]. grpo/peer_trl.py and grpo/peer_verl.py say what their options are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.advantages import group_advantages
from grpo.losses import grpo_loss, token_weights
from grpo.mismatch import Correction, mismatch_correction
from grpo.peer_options import LossOptions, Part, PeerTensors, UnsupportedPeerOptionError
from grpo.peer_trl import trl_options
from grpo.peer_verl import verl_options

__all__ = ["BrokenCaseError", "CaseDifference", "UnsupportedPeerOptionError", "case_options", "check_case"]

TOLERANCE = 1e-8
"""Largest difference from a peer's loss, or gradient, that counts as agreement: of values above 1, relative to them."""


class BrokenCaseError(ValueError):
    """A recorded case that lacks something or contradicts itself; the message says what."""


@dataclass(frozen=True, kw_only=True)
class CaseDifference:
    """Largest difference between a recorded answer and ours, over max(1, |recorded|), in each of the three recorded."""

    advantages: float
    loss: float
    grad_logprobs: float

    @property
    def worst(self) -> float:
        """The largest of the three; NaN if any of them is."""
        values = (self.advantages, self.loss, self.grad_logprobs)
        return math.nan if any(math.isnan(value) for value in values) else max(values)


PEERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], LossOptions]] = {
    "trl": trl_options,
    "verl": verl_options,
}


def case_options(case: Mapping[str, Any]) -> LossOptions:
    """Our options for a recorded case; raises UnsupportedPeerOptionError where it cannot be expressed."""
    peer = str(case["source"]).split()[0].lower() if str(case["source"]).split() else ""
    if peer not in PEERS:
        raise UnsupportedPeerOptionError(f"no mapping for the source {case['source']!r}: known are {', '.join(PEERS)}")
    return PEERS[peer](case["config"], case["inputs"])


def check_case(case: Mapping[str, Any]) -> CaseDifference:
    """Compute a recorded case in float64, advantages included, and compare.

    Raises UnsupportedPeerOptionError for an option without counterpart, BrokenCaseError for a case that is none.
    """
    _check_form(case)
    options = case_options(case)
    try:
        tensors = _case_tensors(case["inputs"])
        advantages = _case_advantages(case["inputs"], options)
        answers = {name: _float64(case[name]) for name in ("advantages", "loss", "grad_logprobs")}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BrokenCaseError(f"the case cannot be read: {type(error).__name__}: {error}") from error
    tensors = replace(tensors, advantages=advantages[tensors.sequence_ids])
    loss = torch.stack([_part_loss(part, tensors) for part in options.parts]).sum()
    (gradient,) = torch.autograd.grad(loss, tensors.logprobs)
    ours = {
        "advantages": advantages,
        "loss": loss.detach(),
        "grad_logprobs": gradient.reshape(tensors.num_sequences, tensors.width),
    }
    return CaseDifference(**{name: _gap(name, value, answers[name]) for name, value in ours.items()})


def _part_loss(part: Part, tensors: PeerTensors) -> Tensor:
    if part.change is not None:
        tensors = part.change(tensors)
    weights = token_weights(*tensors.where, **part.weights, dtype=torch.float64)
    if part.rescale is not None:
        weights = weights * part.rescale(tensors)
    loss, _ = grpo_loss(
        tensors.logprobs,
        old_logprobs=tensors.old_logprobs,
        ref_logprobs=tensors.ref_logprobs,
        advantages=tensors.advantages,
        completion_mask=tensors.completion_mask,
        sequence_ids=tensors.sequence_ids,
        num_sequences=tensors.num_sequences,
        weights=weights,
        correction=_correction(part, tensors),
        **part.loss,
    )
    return loss


def _correction(part: Part, tensors: PeerTensors) -> Correction | None:
    if part.correction is None and part.factor is None:
        return None
    rollout = tensors.old_logprobs if tensors.rollout_logprobs is None else tensors.rollout_logprobs
    correction = mismatch_correction(
        tensors.logprobs.detach(),
        tensors.old_logprobs,
        rollout,
        tensors.advantages,
        *tensors.where,
        **(part.correction or {}),
    )
    return correction if part.factor is None else replace(correction, scale=correction.scale * part.factor(tensors))


def _case_advantages(inputs: Mapping[str, Any], options: LossOptions) -> Tensor:
    rewards = _float64(inputs["rewards"])
    if rewards.ndim == 1:
        rewards = rewards.reshape(-1, int(inputs["group_size"]))
    if options.lone_reward and rewards.shape[1] == 1:
        eps = options.advantage["eps"] if options.advantage["std"] == "group" else 0.0
        return (rewards / (torch.tensor(1.0) + eps)).reshape(-1)  # verl adds the two in float32
    return group_advantages(rewards, **options.advantage).reshape(-1)


def _case_tensors(inputs: Mapping[str, Any]) -> PeerTensors:
    mask = _float64(inputs["completion_mask"]) != 0
    num_sequences, width = mask.shape
    flat = {
        name: None if inputs.get(name) is None else _float64(inputs[name]).reshape(num_sequences * width)
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    }
    logprobs = _float64(inputs["logprobs"]).reshape(num_sequences * width)
    old = flat["old_logprobs"]
    return PeerTensors(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() if old is None else old,
        ref_logprobs=flat["ref_logprobs"],
        rollout_logprobs=flat["rollout_logprobs"],
        advantages=torch.zeros_like(logprobs),
        completion_mask=mask.reshape(-1),
        sequence_ids=torch.arange(num_sequences).repeat_interleave(width),
        num_sequences=num_sequences,
        width=width,
    )


def _check_form(case: Mapping[str, Any]) -> None:
    parts = {"source": str, "config": Mapping, "inputs": Mapping, "advantages": list, "loss": int | float}
    for name, kind in {**parts, "grad_logprobs": list}.items():
        if name not in case:
            raise BrokenCaseError(f"the case has no {name!r}")
        if not isinstance(case[name], kind):
            raise BrokenCaseError(f"the case's {name!r} is {type(case[name]).__name__}")
    if missing := sorted({"completion_mask", "logprobs", "rewards"} - set(case["inputs"])):
        raise BrokenCaseError(f"the case's inputs lack {', '.join(missing)}")


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _gap(name: str, ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise BrokenCaseError(f"the case's {name!r} has the shape {list(theirs.shape)}, not {list(ours.shape)}")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # equal infinities differ by NaN
    relative = (ours - theirs).abs() / theirs.abs().clamp(min=1.0)
    return float(torch.where(same, torch.zeros_like(ours), relative).max())
