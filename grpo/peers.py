"""Other trainers' loss options in groupzero's terms, and the check of a recorded answer of theirs against our loss.

A case is what a peer computed, as padded [B, T] lists: `source`, `config` (its options), `inputs`, and its answers
`advantages` [B], `loss` and `grad_logprobs` [B, T]. docs/LOSSES.md has the same mapping as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo.advantages import group_advantages
from grpo.losses import grpo_loss, token_weights


class UnsupportedPeerOptionError(ValueError):
    """A peer's option, or a value of it, that has no counterpart here; the message names both."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Keyword arguments for `group_advantages`, `token_weights` and `grpo_loss` that together make up a peer's loss."""

    advantage: Mapping[str, Any]
    weights: Mapping[str, Any]
    loss: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CaseDifference:
    """Largest absolute difference between a recorded answer and ours, in each of the three things recorded."""

    advantages: float
    loss: float
    grad_logprobs: float

    @property
    def worst(self) -> float:
        """The largest of the three; NaN if any of them is."""
        values = (self.advantages, self.loss, self.grad_logprobs)
        return math.nan if any(math.isnan(value) for value in values) else max(values)


_TRL_AGGREGATION = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant",
}
_TRL_KEYS = {
    "loss_type",
    "importance_level",
    "kl_coef",
    "kl_estimator",
    "kl_importance_weighted",
    "clip_low",
    "clip_high",
    "cispo_upper",
    "ratio_cap",
    "off_policy_mask_threshold",
    "dr_grpo_length",
    "advantage_eps",
    "advantage_std_ddof",
}
_VERL_AGGREGATION = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant",
}
_VERL_KEYS = {
    "policy_loss",
    "aggregation",
    "kl_estimator",
    "kl_coef",
    "clip_low",
    "clip_high",
    "dual_clip",
    "advantage_eps",
    "advantage_std_ddof",
}


def trl_options(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> LossOptions:
    """TRL's GRPOTrainer: no clamp of log-ratios, `delta` caps r, only the surrogate masked, all sequences count."""
    _refuse_unknown("TRL", config, _TRL_KEYS)
    aggregation = _choice("TRL", config, "loss_type", _TRL_AGGREGATION)
    level = _choice("TRL", config, "importance_level", {"token": "token", "sequence": "sequence"})
    estimator = _choice("TRL", config, "kl_estimator", {"k3": "k3", "k2": "k2", "k1": "k1", None: "k3"})
    is_cispo = config["loss_type"] == "cispo"
    weights: dict[str, Any] = {"aggregation": aggregation}
    if aggregation == "constant":
        weights["constant_length"] = config["dr_grpo_length"]
    loss: dict[str, Any] = {
        "ratio_level": level,
        "surrogate": "cispo" if is_cispo else "clip",
        "clip_low": config["clip_low"],
        "clip_high": config["clip_high"],
        "ratio_cap": config["ratio_cap"],
        "off_policy_threshold": config["off_policy_mask_threshold"],
        "kl_coef": config["kl_coef"],
        "kl_estimator": estimator,
        "kl_importance_weighted": config["kl_importance_weighted"],
        "max_log_ratio": math.inf,
    }
    if is_cispo:
        loss["cispo_ratio_max"] = config["cispo_upper"]
    return LossOptions(advantage=_advantage(config), weights=weights, loss=loss)


def verl_options(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> LossOptions:
    """verl's core_algos: log-ratios within +-20 nats, k3 within +-10, sequences without completion tokens not counted.

    Its GSPO gives each token the sequence's ratio with the gradient of the token alone; with weights that are equal
    within a sequence, as all of these are, that is the gradient of the sequence's ratio.
    """
    _refuse_unknown("verl", config, _VERL_KEYS)
    level = _choice("verl", config, "policy_loss", {"vanilla": "token", "gspo": "sequence"})
    aggregation = _choice("verl", config, "aggregation", _VERL_AGGREGATION)
    estimators = {None: "k3", "k1": "k1", "kl": "k1", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3"}
    estimator = _choice("verl", config, "kl_estimator", estimators)
    lengths = [sum(row) for row in inputs["completion_mask"]]
    weights: dict[str, Any] = {"aggregation": aggregation, "total_sequences": sum(n > 0 for n in lengths)}
    if aggregation == "constant":
        weights["constant_length"] = len(inputs["completion_mask"][0])
    loss: dict[str, Any] = {
        "ratio_level": level,
        "clip_low": config["clip_low"],
        "clip_high": config["clip_high"],
        "dual_clip": config["dual_clip"] if level == "token" else None,
        "kl_coef": config["kl_coef"] if config["kl_estimator"] is not None else 0.0,
        "kl_estimator": estimator,
        "kl_bound": 10.0 if estimator == "k3" else None,
    }
    return LossOptions(advantage=_advantage(config), weights=weights, loss=loss)


PEERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], LossOptions]] = {
    "trl": trl_options,
    "verl": verl_options,
}


def case_options(case: Mapping[str, Any]) -> LossOptions:
    """Our keyword arguments for a recorded case; raises UnsupportedPeerOptionError where it cannot be expressed."""
    peer = str(case["source"]).split()[0].lower()
    if peer not in PEERS:
        raise UnsupportedPeerOptionError(f"no mapping for the source {case['source']!r}: known are {', '.join(PEERS)}")
    return PEERS[peer](case["config"], case["inputs"])


def check_case(case: Mapping[str, Any]) -> CaseDifference:
    """Compute a recorded case in float64, advantages included, and compare; raises UnsupportedPeerOptionError."""
    options, inputs = case_options(case), case["inputs"]
    rewards = torch.tensor(inputs["rewards"], dtype=torch.float64)
    advantages = group_advantages(rewards, **options.advantage).reshape(-1)
    mask = torch.tensor(inputs["completion_mask"]).bool()
    num_sequences, width = mask.shape
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    flat = {name: torch.tensor(inputs[name], dtype=torch.float64).reshape(-1) for name in names}
    logprobs = flat.pop("logprobs").requires_grad_()
    sequence_ids = torch.arange(num_sequences).repeat_interleave(width)
    where = {"completion_mask": mask.reshape(-1), "sequence_ids": sequence_ids, "num_sequences": num_sequences}
    loss, _ = grpo_loss(
        logprobs,
        **flat,
        **where,
        advantages=advantages[sequence_ids],
        weights=token_weights(**where, **options.weights, dtype=torch.float64),
        **options.loss,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return CaseDifference(
        advantages=_gap(advantages, case["advantages"]),
        loss=_gap(loss.detach(), case["loss"]),
        grad_logprobs=_gap(gradient.reshape(num_sequences, width), case["grad_logprobs"]),
    )


def _advantage(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"std": "group", "ddof": config["advantage_std_ddof"], "eps": config["advantage_eps"]}


def _gap(ours: Tensor, theirs: Any) -> float:
    return float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())


def _refuse_unknown(peer: str, config: Mapping[str, Any], known: set[str]) -> None:
    unknown, missing = sorted(config.keys() - known), sorted(known - config.keys())
    if unknown or missing:
        raise UnsupportedPeerOptionError(f"{peer} options not understood: {unknown}; missing: {missing}")


def _choice(peer: str, config: Mapping[str, Any], key: str, choices: Mapping[Any, str]) -> str:
    if config[key] not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise UnsupportedPeerOptionError(
            f"{peer} option {key} = {config[key]!r} has no counterpart here: known are {known}"
        )
    return choices[config[key]]
