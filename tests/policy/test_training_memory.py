"""The memory to train: by hand, and as a law that all ranks' shares are the whole."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.account import account_of
from policy.config import PolicyConfig
from policy.training_memory import PRECISIONS, TrainingMemoryError, training_memory
from tests.policy.builders import TINY

ROOT = Path(__file__).resolve().parents[2]
SMALL = replace(TINY, v_head_dim=24)


def named(name: str) -> PolicyConfig:
    return PolicyConfig(**tomllib.loads((ROOT / "configs/models" / f"{name}.toml").read_text()))


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 16), ("bf16", 18)])
def test_one_rank_keeps_the_same_for_every_parameter(precision: str, bytes_each: int) -> None:
    config = replace(SMALL, num_nextn_predict_layers=1)
    account = account_of(config)
    memory = training_memory(account, precision)
    assert memory.gathered == 0
    assert memory.total == bytes_each * (account.parameters.total + account.mtp.total)


def test_fp8_narrows_the_matrices_of_blocks_alone() -> None:
    account = account_of(named("deepseek_v3"))
    whole = account.parameters + account.mtp
    wide = 2 * 129280 * 7168 + whole.router + whole.vectors
    memory = training_memory(account, "fp8")
    assert memory.weights == pytest.approx((whole.total - wide) * (1 + 4 / 16384) + 2 * wide, abs=1)
    assert memory.master_weights == memory.gradients == memory.optimizer_states == 4 * whole.total


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    precision=st.sampled_from(sorted(PRECISIONS)),
    replicas=st.integers(1, 4),
    expert_parallel=st.sampled_from([1, 2, 4, 8]),
)
def test_the_shares_of_all_ranks_are_the_whole(precision: str, replicas: int, expert_parallel: int) -> None:
    account, num_ranks = account_of(SMALL), replicas * expert_parallel
    alone, each = training_memory(account, precision), training_memory(account, precision, num_ranks, expert_parallel)
    for name in ("weights", "master_weights", "gradients", "optimizer_states"):
        assert 0 <= num_ranks * getattr(each, name) - getattr(alone, name) < num_ranks


def test_experts_are_gathered_from_the_ranks_that_share_them() -> None:
    # One expert layer of V2 is the largest block: bf16 weights and bf16 gradients, 4 bytes per parameter.
    account = account_of(named("deepseek_v2"))
    layer, root = account.layers[1], account.root
    others = layer.total - layer.routed_experts
    assert training_memory(account, "bf16", 64).gathered == 4 * layer.total
    assert training_memory(account, "bf16", 64, 2).gathered == 4 * (others + layer.routed_experts // 2)
    # Split eight ways, it is smaller than embedding and head; split over all ranks, no expert is shared at all.
    assert training_memory(account, "bf16", 64, 8).gathered == 4 * root.total
    assert training_memory(account, "bf16", 2, 2).gathered == 4 * root.total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp16", 1, 1), "precision must be one of fp32, bf16, fp8"),
        (("bf16", 0, 1), "does not divide the number of ranks, 0"),
        (("bf16", 6, 4), "expert_parallel=4 does not divide the number of ranks, 6"),
        (("bf16", 3, 3), "8 experts can't be split evenly over 3 ranks"),
    ],
)
def test_a_split_that_comes_out_uneven_is_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(TrainingMemoryError, match=message):
        training_memory(account_of(SMALL), *arguments)
