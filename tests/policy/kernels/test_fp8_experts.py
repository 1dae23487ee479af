"""The FP8 layers: outputs and gradients against the recipe written out in float64, and against exact products."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from policy.kernels import fp8_experts as module
from policy.kernels.errors import KernelUnavailableError
from policy.kernels.fp8_experts import Recipe, as_multiplied, fp8_experts, fp8_linear, quantised_weight
from policy.kernels.quantize import ACTIVATION_FLOOR, GRADIENT_FLOOR
from tests.policy.kernels.expert_operands import bits, relative_error
from tests.policy.kernels.interpreter import DEVICE

NAMES = ("out", "x", "gates", "gate_up", "down")


class Layer(NamedTuple):
    """Leaves of one layer and what is put into its backward."""

    x: Tensor
    gates: Tensor
    indices: Tensor
    gate_up: Tensor
    down: Tensor
    dout: Tensor


def layer(choices: Tensor, num_experts: int, hidden: int, width: int, dtype: torch.dtype = torch.float32) -> Layer:
    """Gaussian weights and rows; gradients a millionth as large, as they are in training."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    (num_tokens, top_k), device = choices.shape, DEVICE
    return Layer(
        normal(num_tokens, hidden).requires_grad_(),
        torch.rand(num_tokens, top_k, generator=generator).to(device).requires_grad_(),
        choices.to(device),
        nn.Parameter(normal(num_experts, 2 * width, hidden, scale=hidden**-0.5)),
        nn.Parameter(normal(num_experts, hidden, width, scale=width**-0.5)),
        normal(num_tokens, hidden, scale=1e-6),
    )


def ragged(num_tokens: int = 150) -> Tensor:
    """Choices of two of five experts: nearly all tokens to the first, one to the last, none to the fourth."""
    generator = torch.Generator().manual_seed(1)
    others = torch.randint(1, 3, (num_tokens,), generator=generator)
    choices = torch.stack((torch.zeros_like(others), others), 1)
    choices[7] = torch.tensor([4, 2])
    return choices


def computed(given: Layer, **options: Any) -> dict[str, Tensor]:
    """The layer's output and gradients by name."""
    out = fp8_experts(given.x, given.gates, given.indices, given.gate_up, given.down, **options)
    leaves = (given.x, given.gates, given.gate_up, given.down)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, given.dout)), strict=True))


def exact(given: Layer) -> dict[str, Tensor]:
    """The same in float64 without any rounding."""
    x, gates, gate_up, down = (leaf.detach().double().requires_grad_() for leaf in given[:2] + given[3:5])
    rows = []
    for token, experts in enumerate(given.indices.tolist()):
        row = x.new_zeros(x.shape[1])
        for slot, expert in enumerate(experts):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            row = row + gates[token, slot] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    out = torch.stack(rows)
    grads = torch.autograd.grad(out, (x, gates, gate_up, down), given.dout.double())
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def rounded(x: Tensor, height: int, width: int, floor: float, power_of_two: bool = False) -> Tensor:
    """x [M, K] with every tile of height x width rounded to e4m3 by its own scale, in float64."""
    out = torch.empty_like(x, dtype=torch.float64)
    for top in range(0, x.shape[0], height):
        for left in range(0, x.shape[1], width):
            tile = x[top : top + height, left : left + width].float()
            scale = torch.tensor(max(float(tile.abs().max()), floor)) / 448
            scale = torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale
            value = (tile / scale).to(torch.float8_e4m3fn).double() * scale.double()
            out[top : top + height, left : left + width] = value
    return out


def bf16(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def recipe_in_float64(given: Layer, pow2: bool = False) -> dict[str, Tensor]:
    """The recipe expert by expert without plan, permutation or kernels: what is rounded, and over which tiles."""
    x, gates, dout = given.x.detach(), given.gates.detach(), given.dout
    width = given.down.shape[2]
    out, dx = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    dgates = torch.zeros(gates.shape, dtype=torch.float64)
    dgate_up, ddown = torch.zeros(given.gate_up.shape).double(), torch.zeros(given.down.shape).double()
    for expert in range(len(given.down)):
        token, slot = (given.indices == expert).nonzero(as_tuple=True)
        gate, up = (rounded(w, 128, 128, ACTIVATION_FLOOR, pow2) for w in given.gate_up[expert].detach().chunk(2))
        down = rounded(given.down[expert].detach(), 128, 128, ACTIVATION_FLOOR, pow2)
        if not len(token):
            continue
        own, prob, dy = x[token], gates[token, slot].double()[:, None], dout[token]
        q = rounded(own, 1, 128, ACTIVATION_FLOOR, pow2)
        g, u = bf16(q @ gate.T), bf16(q @ up.T)
        activation = F.silu(g) * u * prob
        out.index_add_(0, token, bf16(rounded(activation, 1, 128, ACTIVATION_FLOOR, pow2) @ down.T))
        da = bf16(rounded(dy, 1, 128, GRADIENT_FLOOR, pow2) @ down)
        dgates[token, slot] = (da * F.silu(g) * u).sum(1)
        sigmoid = g.sigmoid()
        dg, du = da * prob * u * sigmoid * (1 + g * (1 - sigmoid)), da * prob * F.silu(g)
        dh_gate, dh_up = (rounded(d, 1, 128, GRADIENT_FLOOR, pow2) for d in (dg, du))
        dx.index_add_(0, token, bf16(dh_gate @ gate + dh_up @ up))
        columns = rounded(own, 128, 1, ACTIVATION_FLOOR, pow2)
        for half, d in enumerate((dg, du)):
            part = rounded(d, 128, 1, GRADIENT_FLOOR, pow2).T @ columns
            dgate_up[expert, half * width : (half + 1) * width] = part
        tall = rounded(activation, 128, 1, ACTIVATION_FLOOR, pow2)
        ddown[expert] = rounded(dy, 128, 1, GRADIENT_FLOOR, pow2).T @ tall
    return dict(zip(NAMES, (out, dx, dgates, dgate_up, ddown), strict=True))


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "power_of_two"),
    [
        (48, 16, torch.float32, False),
        (144, 80, torch.bfloat16, False),
        (128, 128, torch.float32, True),
    ],
)
def test_experts_follow_the_recipe(hidden: int, width: int, dtype: torch.dtype, power_of_two: bool) -> None:
    given = layer(ragged(), 5, hidden, width, dtype)
    got, want = computed(given, power_of_two=power_of_two), recipe_in_float64(given, power_of_two)
    # Left are the stores in bf16, and the few values that float32 rounds to the other neighbour.
    assert {name: relative_error(got[name].cpu(), want[name]) < 3e-3 for name in NAMES} == dict.fromkeys(NAMES, True)
    assert {name: got[name].dtype for name in NAMES} == dict.fromkeys(NAMES, dtype) | {"gates": torch.float32}


def test_experts_are_off_the_exact_layer_by_the_noise_of_e4m3() -> None:
    given = layer(torch.rand(256, 8, generator=torch.Generator().manual_seed(3)).topk(2).indices, 8, 128, 128)
    got, want = computed(given), exact(given)
    errors = {name: relative_error(got[name].cpu(), want[name].cpu()) for name in NAMES}
    # One product of gaussians: 3.7 %. Behind a second one, whose operand carries the first one's error, up to 7.
    assert {name: 0.03 < error < 0.07 for name, error in errors.items()} == dict.fromkeys(NAMES, True), errors


def test_linear_is_off_the_exact_product_by_the_noise_of_e4m3() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 67, 208, generator=generator).to(DEVICE).requires_grad_()
    weight = nn.Parameter(torch.randn(80, 208, generator=generator).to(DEVICE))
    dy = torch.randn(3, 67, 80, generator=generator).to(DEVICE) * 1e-6
    out = fp8_linear(x, weight)
    got = (out.detach(), *torch.autograd.grad(out, (x, weight), dy))
    want = (x @ weight.T, dy @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert 0.03 < relative_error(ours.detach(), theirs.detach()) < 0.04


def test_kernels_give_what_the_definitions_give() -> None:
    given = layer(ragged(20), 5, 48, 16, torch.bfloat16)
    got, want = computed(given, backend="triton"), computed(given, backend="torch")
    assert {name: relative_error(got[name], want[name]) < 3e-3 for name in NAMES} == dict.fromkeys(NAMES, True)


def test_a_token_does_not_depend_on_the_others() -> None:
    given = layer(ragged(), 5, 48, 16)
    alone = given._replace(**{name: getattr(given, name)[:9] for name in ("gates", "indices", "dout")}, x=given.x[:9])
    whole, part = computed(given), computed(alone)
    for name in ("out", "x", "gates"):
        assert torch.equal(bits(whole[name][:9]), bits(part[name]))


def test_a_token_that_is_not_finite_spoils_itself_alone() -> None:
    given = layer(ragged(), 5, 48, 16)
    before = computed(given)["out"]
    with torch.no_grad():
        given.x[3, 5] = torch.inf
    after = computed(given)["out"]
    assert after[3].isnan().all()
    after[3] = before[3]
    assert torch.equal(after, before)


def test_no_tokens_give_gradients_of_zero() -> None:
    given = layer(torch.zeros(0, 2, dtype=torch.long), 3, 48, 16)
    fp8_experts(*given[:5]).sum().backward()
    fp8_linear(given.x, given.gate_up[0]).sum().backward()
    for weight in (given.gate_up, given.down):
        assert weight.grad is not None
        assert not weight.grad.any()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    given = layer(ragged(), 5, 48, 16)
    want = computed(given)
    x, gate_up = given.x.detach(), given.gate_up.detach()
    out = fp8_experts(x, given.gates, given.indices, gate_up, given.down)
    gates, down = torch.autograd.grad(out, (given.gates, given.down), given.dout)
    assert torch.equal(gates, want["gates"])
    assert torch.equal(down, want["down"])


def test_a_weight_is_quantised_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = module.quantize_weight
    monkeypatch.setattr(module, "quantize_weight", lambda *args, **kw: calls.append(1) or plain(*args, **kw))
    weight = nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    x = torch.ones(2, 48, device=DEVICE)
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    for step in range(1, 4):
        for _ in range(2):  # micro-batches
            fp8_linear(x, weight).sum().backward()
        assert len(calls) == step
        optimizer.step()
    assert torch.equal(fp8_linear(x, weight), fp8_linear(x, weight.detach().clone()))


def test_in_a_process_group_no_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(16, 16))
    kept = quantised_weight(weight, Recipe())
    assert quantised_weight(weight, Recipe()) is kept
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert quantised_weight(weight, Recipe()) is not kept


def test_as_multiplied_is_what_linear_multiplies_by() -> None:
    weight = nn.Parameter(torch.randn(80, 208, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    x = 448 * torch.eye(208, device=DEVICE)  # e4m3 holds it, with scale 1
    want = (448 * as_multiplied(weight).T).bfloat16().float()
    assert torch.equal(fp8_linear(x, weight), want)
    assert 0.01 < relative_error(as_multiplied(weight), weight.detach()) < 0.04


def test_what_does_not_fit_is_refused() -> None:
    given = layer(ragged(), 5, 48, 16)
    with pytest.raises(ValueError, match=r"gate_up \[5, 32, 48\] and down \[5, 48, 8\]"):
        fp8_experts(given.x, given.gates, given.indices, given.gate_up, given.down[:, :, :8])
    with pytest.raises(ValueError, match=r"weight \[80, 40\] must be"):
        fp8_linear(given.x, torch.zeros(80, 40, device=DEVICE))


def test_a_device_that_cannot_compute_it_is_an_error() -> None:
    with pytest.raises(KernelUnavailableError, match="runs on the CPU and on NVIDIA GPUs, not on meta"):
        fp8_linear(torch.zeros(4, 16, device="meta"), torch.zeros(16, 16, device="meta"))
