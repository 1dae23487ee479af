"""The released FP8 format: exact where it can be, bounded where it can't, whatever the size of the last blocks."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.fp8_format import (
    QUANTIZATION_CONFIG,
    dequantise,
    is_quantised,
    quantise,
    quantization_problem,
    scale_shape,
)

sizes = st.integers(1, 300)


def weight_of(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    """Blocks of very different magnitudes, as of layers that learned at different rates."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(-(-rows // 128), -(-columns // 128), generator=generator)
    magnitudes = (spread * blocks).exp().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return torch.randn(rows, columns, generator=generator) * magnitudes


def by_the_definition(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The format block by block, as its description says it."""
    rows, columns = weight.shape
    quantised, scale = torch.empty_like(weight), torch.empty(scale_shape((rows, columns)))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = weight[i : i + 128, j : j + 128]
            scale[i // 128, j // 128] = block.abs().max() / 448
            quantised[i : i + 128, j : j + 128] = block / scale[i // 128, j // 128]
    return quantised.to(torch.float8_e4m3fn), scale


@settings(deadline=None, derandomize=True, max_examples=25)
@given(sizes, sizes, st.integers(0, 999))
def test_every_block_is_scaled_by_its_own_maximum(rows: int, columns: int, seed: int) -> None:
    weight = weight_of(rows, columns, seed, spread=5.0)
    quantised, scale = quantise(weight)
    expected, expected_scale = by_the_definition(weight)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(sizes, sizes, st.integers(0, 999), st.floats(0, 8))
def test_what_was_quantised_once_stays_as_it_is(rows: int, columns: int, seed: int, spread: float) -> None:
    quantised, scale = quantise(weight_of(rows, columns, seed, spread))
    again, scale_again = quantise(dequantise(quantised, scale))
    assert torch.equal(scale, scale_again)
    assert torch.equal(quantised.view(torch.uint8), again.view(torch.uint8))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(sizes, sizes, st.integers(0, 999))
def test_a_detour_through_bfloat16_keeps_the_bytes(rows: int, columns: int, seed: int) -> None:
    """A bf16 value is within 2**-8 of the fp32 one, and the halfway points of e4m3 are 2**-5 away."""
    quantised, scale = quantise(weight_of(rows, columns, seed, spread=3.0))
    again, scale_again = quantise(dequantise(quantised, scale).bfloat16())
    assert torch.equal(quantised.view(torch.uint8), again.view(torch.uint8))
    assert ((scale_again / scale - 1).abs() <= 2**-8).all()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(sizes, sizes, st.integers(0, 999))
def test_the_error_is_half_a_step_of_e4m3(rows: int, columns: int, seed: int) -> None:
    """Relative to the value 2**-4, or, for what is small within its block, 2**-10 of the scale."""
    weight = weight_of(rows, columns, seed, spread=3.0)
    quantised, scale = quantise(weight)
    of_each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    error = (dequantise(quantised, scale) - weight).abs()
    assert (error <= torch.maximum(weight.abs() * 2**-4, of_each * 2**-10) * (1 + 1e-6)).all()


def test_values_on_the_grid_are_exact() -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()]
    weight = torch.zeros(130, 254)
    weight[1, : len(grid)], weight[129, : len(grid)] = grid, grid * 2**-20
    quantised, scale = quantise(weight)
    assert torch.equal(dequantise(quantised, scale), weight)
    assert scale[0].tolist() == [1.0, 1.0]
    assert scale[1].tolist() == [2**-20, 2**-20]


def test_rows_can_be_dequantised_by_themselves() -> None:
    quantised, scale = quantise(weight_of(300, 200, seed=3, spread=4.0))
    whole = dequantise(quantised, scale)
    for first, last in ((0, 1), (127, 129), (100, 300), (256, 257)):
        assert torch.equal(dequantise(quantised[first:last], scale, first), whole[first:last])


def test_blocks_of_zeros_and_of_the_smallest_numbers_are_finite() -> None:
    tiny = torch.finfo(torch.float32).tiny
    weight = torch.zeros(129, 256)
    weight[:, 128:] = torch.tensor([tiny, -2 * tiny]).repeat(64)
    quantised, scale = quantise(weight)
    assert scale.tolist() == [[1.0, tiny], [1.0, tiny]]
    assert torch.equal(dequantise(quantised, scale), weight)


def test_the_largest_numbers_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    quantised, scale = quantise(torch.tensor([[largest, -largest, largest / 3]]))
    assert quantised.float()[0, :2].tolist() == [448.0, -448.0]
    assert (dequantise(quantised, scale * (1 - 2**-20)) / largest)[0, 2] == pytest.approx(1 / 3, rel=2**-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(130, 5)
    quantised, scale = quantise(weight)
    weight[129, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(weight)
    with pytest.raises(ValueError, match="NaN or infinity"):
        dequantise(quantised, torch.where(torch.tensor([[False], [True]]), value, scale))
    quantised.view(torch.uint8)[3, 3] = 0x7F  # e4m3's NaN
    with pytest.raises(ValueError, match="NaN or infinity"):
        dequantise(quantised, scale)


# Of the released V3: which weights have scales beside them.
RELEASED = {
    "model.layers.0.self_attn.q_a_proj.weight": True,
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": True,
    "model.layers.0.self_attn.kv_b_proj.weight": True,
    "model.layers.0.self_attn.o_proj.weight": True,
    "model.layers.0.mlp.gate_proj.weight": True,
    "model.layers.3.mlp.experts.255.down_proj.weight": True,
    "model.layers.3.mlp.shared_experts.up_proj.weight": True,
    "model.layers.61.mlp.experts.7.gate_proj.weight": True,
    "model.layers.3.mlp.gate.weight": False,
    "model.embed_tokens.weight": False,
    "lm_head.weight": False,
    "model.layers.61.eh_proj.weight": False,
    "model.layers.61.embed_tokens.weight": False,
    "model.layers.61.shared_head.head.weight": False,
}
RELEASED_VECTORS = (
    "model.layers.0.self_attn.q_a_layernorm.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias",
    "model.layers.0.self_attn.q_proj.bias",
)


def test_the_release_says_which_weights_are_quantised() -> None:
    assert {name: is_quantised(name, (576, 7168)) for name in RELEASED} == RELEASED
    assert not any(is_quantised(name, (1536,)) for name in RELEASED_VECTORS)
    assert scale_shape((576, 7168)) == (5, 56)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
        (QUANTIZATION_CONFIG | {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        (QUANTIZATION_CONFIG | {"weight_block_size": None}, "weight_block_size=None"),
        (QUANTIZATION_CONFIG | {"fmt": "e5m2"}, "fmt='e5m2'"),
        ("fp8", "quantization_config='fp8'"),
    ],
)
def test_other_formats_are_named(config: object, named: str) -> None:
    problem = quantization_problem({"quantization_config": config})
    assert problem is not None
    assert re.search(named, problem)
    assert quantization_problem({"quantization_config": QUANTIZATION_CONFIG}) is None
    assert quantization_problem({}) is None
