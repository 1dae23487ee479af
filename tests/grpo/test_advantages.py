"""Laws and values of the group advantages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import group_advantages, informative_groups

LAW = settings(deadline=None, derandomize=True, max_examples=60)
REWARD = st.floats(-5, 5, allow_nan=False)


@st.composite
def reward_tables(draw):
    size = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(REWARD, min_size=size, max_size=size), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float64)


@LAW
@given(reward_tables(), st.sampled_from(["group", "none"]), st.sampled_from([0, 1]))
def test_advantages_of_a_group_sum_to_zero(rewards, std, ddof):
    advantages = group_advantages(rewards, std=std, ddof=ddof, eps=1e-4)
    assert advantages.shape == rewards.shape
    assert advantages.sum(dim=1).abs().max().item() < 1e-9


@LAW
@given(REWARD, st.integers(1, 9), st.sampled_from(["group", "none"]), st.sampled_from([0, 1]))
def test_equal_rewards_give_exactly_zero(reward, size, std, ddof):
    advantages = group_advantages(torch.full((2, size), reward), std=std, ddof=ddof, eps=0.0)
    assert torch.equal(advantages, torch.zeros(2, size))


@LAW
@given(reward_tables(), st.floats(0.1, 10), st.floats(-3, 3))
def test_with_std_only_the_shape_of_the_rewards_counts(rewards, scale, shift):
    rewards = rewards.round(decimals=2)
    scaled = group_advantages(rewards * scale + shift, eps=0.0)
    assert torch.allclose(
        scaled[informative_groups(rewards)], group_advantages(rewards, eps=0.0)[informative_groups(rewards)]
    )


def test_values_with_both_ddof_and_without_std():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    sample = group_advantages(rewards, ddof=1, eps=0.0)
    population = group_advantages(rewards, ddof=0, eps=0.0)
    assert sample[0].tolist() == pytest.approx(
        [math.sqrt(3) / 2, -math.sqrt(3) / 2, -math.sqrt(3) / 2, math.sqrt(3) / 2]
    )
    assert population[0].tolist() == pytest.approx([1, -1, -1, 1])
    assert group_advantages(rewards, std="none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(rewards, ddof=0, eps=0.5)[0, 0].item() == pytest.approx(0.5)


def test_a_group_of_one_has_no_advantage():
    assert group_advantages(torch.tensor([[3.0], [-1.0]])).tolist() == [[0.0], [0.0]]


def test_informative_groups_are_those_with_different_rewards():
    assert informative_groups(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match="group 1, sample 2"):
        group_advantages(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, bad]]))


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(3), {}, "group_size"),
        (torch.zeros(3, 0), {}, "group_size"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "floating"),
        (torch.zeros(3, 2), {"std": "batch"}, "'group' or 'none'"),
        (torch.zeros(3, 2), {"ddof": -1}, "negative"),
    ],
)
def test_bad_arguments_are_refused(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)
