"""Optimizers of the policy: AdamW with a learning rate per layer group, Muon for training from random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from policy.layer_groups import layer_group


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One optimizer group per layer group, its rate `lr * lr_scale[group]` (1 where not named); norms never decay.

    A group in `lr_scale` that no parameter belongs to is a ValueError.
    """
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(layer_group(name), []).append(parameter)
    if unknown := set(lr_scale) - members.keys():
        raise ValueError(f"lr_scale names {sorted(unknown)}; this model's parameters are {', '.join(sorted(members))}")
    return [
        {
            "name": group,
            "params": parameters,
            "lr": lr * lr_scale.get(group, 1.0),
            "weight_decay": 0.0 if group == "norms" else weight_decay,
        }
        for group, parameters in members.items()
    ]


def warmup_constant(warmup_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at an optimizer step: linear from 1 / warmup_steps to 1, then 1."""
    return lambda step: min(1.0, (step + 1) / max(1, warmup_steps))


def warmup_then_linear(warmup_steps: int, decay_from: int, num_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate: linear warm-up, 1 until `decay_from`, then linear to 0 at `num_steps`."""
    return lambda step: min(
        1.0, (step + 1) / max(1, warmup_steps), max(0.0, (num_steps - step) / max(1, num_steps - decay_from))
    )


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iteration (Jordan et al. 2024; update scaled to AdamW's RMS as in
    arXiv 2502.16982), over the last two dimensions, so that stacked experts [E, out, in] are taken as E matrices.

    torch.optim.Muon takes 2-D parameters only; this one exists for the stacked experts.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter, update in _orthogonalised(members, (self._direction(p, group["momentum"]) for p in members)):
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Where Nesterov's momentum points, which this moves on."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        return parameter.grad.lerp(state["momentum"].lerp_(parameter.grad, 1 - momentum), momentum)


def _orthogonalised(parameters: list[Tensor], directions: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with its orthogonalised direction; one at a time, or all at once where ranks share the work."""
    if parameters and hasattr(parameters[0], "placements"):  # a DTensor; to import that type takes a second
        from policy.sharded_muon import orthogonalise_sharded

        directions = orthogonalise_sharded(list(directions), orthogonalise)
    else:
        directions = map(orthogonalise, directions)
    return zip(parameters, directions, strict=True)


def orthogonalise(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices [..., m, n], approximately (quintic Newton-Schulz, singular values 0.7-1.2)."""
    # bfloat16, as in the original: the iteration tolerates its rounding, and processors multiply it several times faster.
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
