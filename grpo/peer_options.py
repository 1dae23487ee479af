"""How another trainer's loss is said in groupzero's terms, and how its options are read.

A peer's loss is the sum of one or more of our losses, each with its own weights (verl may sum surrogate and KL in two
ways). Options may be missing, then the peer's default holds. The peers are in grpo/peer_trl.py and grpo/peer_verl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grpo.segments import sequence_sums


class UnsupportedPeerOptionError(ValueError):
    """A peer's option, or a value of it, that has no counterpart here; the message names both."""


@dataclass(frozen=True, kw_only=True)
class PeerTensors:
    """A case's padded tensors laid flat, [B * T] each; `rollout_logprobs` and `ref_logprobs` None if not recorded."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    completion_mask: Tensor
    sequence_ids: Tensor
    num_sequences: int
    width: int
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

    @property
    def where(self) -> tuple[Tensor, Tensor, int]:
        """Mask, sequence ids and their number, as our functions take them."""
        return self.completion_mask, self.sequence_ids, self.num_sequences

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of every sequence [B]."""
        ones = torch.ones_like(self.logprobs.detach())
        return sequence_sums(ones, *self.where)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of our losses: keywords of `token_weights`, `mismatch_correction` and `grpo_loss`.

    `factor` [B * T] multiplies the surrogate, `rescale` [B * T] the weights; `change` replaces tensors first.
    """

    weights: Mapping[str, Any]
    loss: Mapping[str, Any] = field(default_factory=dict)
    correction: Mapping[str, Any] | None = None
    factor: Callable[[PeerTensors], Tensor] | None = None
    rescale: Callable[[PeerTensors], Tensor] | None = None
    change: Callable[[PeerTensors], PeerTensors] | None = None


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Keywords of `group_advantages`, and the parts whose losses add up to the peer's.

    `lone_reward` says that a group of one has its reward, over 1 + eps where there is a std, as advantage (verl).
    """

    advantage: Mapping[str, Any]
    parts: tuple[Part, ...]
    lone_reward: bool = False


class Options:
    """A peer's options, each read once, by the first of its names that is there; what is left over is unknown."""

    def __init__(self, peer: str, config: Mapping[str, Any]):
        self.peer, self.rest = peer, dict(config)

    def read(self, *names: str, default: Any = None) -> Any:
        """The value of an option, or `default` where it is missing; refused if two of its names disagree."""
        found = {name: self.rest.pop(name) for name in names if name in self.rest}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise UnsupportedPeerOptionError(f"{self.peer} options say different things: {found}")
        return values[0] if values else default

    def number(self, *names: str, default: float | None) -> Any:
        """The same, for a number or None; bools and texts are refused."""
        value = self.read(*names, default=default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UnsupportedPeerOptionError(f"{self.peer} option {names[0]} = {value!r} is not a number")
        return value

    def choose(self, choices: Mapping[Any, Any], *names: str, default: Any) -> Any:
        """What the option's value means in `choices`; refused, by name, if it is none of them."""
        value = self.read(*names, default=default)
        try:
            return choices[value]
        except (KeyError, TypeError):
            known = ", ".join(str(choice) for choice in choices)
            raise UnsupportedPeerOptionError(
                f"{self.peer} option {names[0]} = {value!r} has no counterpart here: known are {known}"
            ) from None

    def finish(self) -> None:
        """Refuse what nobody read."""
        if self.rest:
            raise UnsupportedPeerOptionError(f"{self.peer} options not understood: {self.rest}")


def advantage_options(options: Options, *, eps: float) -> dict[str, Any]:
    """Keywords of `group_advantages`; both peers divide by the group's std with ddof 1 unless told otherwise."""
    stds = {"group": "group", "batch": "batch", "none": "none", True: "group", False: "none", None: "group"}
    names = ("advantage_std", "scale_rewards", "norm_adv_by_std_in_grpo", "std")
    baselines = {
        **dict.fromkeys((None, "group_mean", "mean", "grpo", "grpo_vectorized"), "group_mean"),
        **dict.fromkeys(("leave_one_out", "rloo", "rloo_vectorized"), "leave_one_out"),
    }
    baseline = options.choose(baselines, "advantage_baseline", "adv_estimator", default=None)
    std = options.choose(stds, *names, default="none" if baseline == "leave_one_out" else "group")
    ddof = options.number("advantage_std_ddof", "advantage_ddof", default=1)
    return {
        "baseline": baseline,
        "std": std,
        "ddof": 1 if ddof is None else ddof,
        "eps": options.number("advantage_eps", default=eps),
    }


def sapo_temperatures(options: Options) -> dict[str, Any]:
    """SAPO's two temperatures by any of their names; both peers have the same defaults."""
    names = {"positive": "pos", "negative": "neg"}
    return {
        f"sapo_temperature_{name}": options.number(
            f"sapo_temperature_{short}",
            f"sapo_temperature_{name}",
            f"tau_{short}",
            f"sapo_tau_{short}",
            default=default,
        )
        for (name, short), default in zip(names.items(), (1.0, 1.05), strict=True)
    }


def without_surrogate(tensors: PeerTensors) -> PeerTensors:
    """The same with advantages of 0, for a part that is the KL alone."""
    return replace(tensors, advantages=torch.zeros_like(tensors.advantages))


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)
