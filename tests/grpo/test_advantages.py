"""Laws and values of the group advantages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import group_advantages, informative_groups, reward_advantages

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
        (torch.zeros(3, 2), {"std": "sample"}, "'batch' or 'none'"),
        (torch.zeros(3, 2), {"baseline": "median"}, "leave_one_out"),
        (torch.zeros(3, 2), {"judged": torch.ones(3, dtype=torch.bool)}, "judged"),
        (torch.zeros(3, 2), {"ddof": -1}, "negative"),
    ],
)
def test_bad_arguments_are_refused(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)


@LAW
@given(reward_tables(), st.sampled_from(["group", "batch", "none"]))
def test_leave_one_out_compares_with_the_others(rewards, std):
    size = rewards.shape[1]
    advantages = group_advantages(rewards, baseline="leave_one_out", std=std)
    factor = size / max(size - 1, 1)
    assert torch.allclose(advantages, factor * group_advantages(rewards, std=std), atol=1e-12)
    if size > 1 and std == "none":
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)
        assert torch.allclose(advantages, rewards - others, atol=1e-12)


def test_the_std_of_the_batch_is_that_of_all_its_rewards():
    rewards = torch.tensor([[1.0, 0.0], [4.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    std = rewards.std(correction=1).item()
    advantages = group_advantages(rewards, std="batch", eps=0.1)
    expected = torch.tensor([[0.5, -0.5], [0.0, 0.0], [1.5, -1.5]], dtype=torch.float64) / (std + 0.1)
    assert torch.allclose(advantages, expected, atol=1e-12)


@LAW
@given(
    st.integers(0, 2**31),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from(["group_mean", "leave_one_out"]),
    st.sampled_from([math.nan, math.inf, 1e30]),
)
def test_samples_without_a_verdict_take_no_part(seed, std, baseline, junk):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    judged = torch.rand(3, 4, generator=generator) < 0.6
    options = {"std": std, "baseline": baseline, "eps": 1e-3}
    spoiled = group_advantages(torch.where(judged, rewards, junk), judged=judged, **options)
    assert torch.equal(spoiled, group_advantages(rewards, judged=judged, **options))
    assert (spoiled[~judged] == 0).all()
    if std != "batch":
        for row, keep, advantages in zip(rewards, judged, spoiled, strict=True):
            if keep.any():
                alone = group_advantages(row[keep].unsqueeze(0), **options)[0]
                assert torch.allclose(advantages[keep], alone, atol=1e-12)


def test_fewer_than_two_judged_samples_have_no_advantage():
    judged = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 2.0, 7.0]])
    assert torch.equal(group_advantages(rewards, judged=judged, std="none"), torch.zeros(3, 3))
    assert informative_groups(rewards, judged).tolist() == [False, False, False]


def test_each_reward_is_normalised_on_its_own():
    accuracy = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    length = torch.tensor([[0.0, 0.0, 100.0, 100.0]], dtype=torch.float64)
    rewards, weights = {"accuracy": accuracy, "length": length}, {"accuracy": 1.0, "length": 0.5}
    advantages = reward_advantages(rewards, weights, ddof=0, eps=0.0)
    assert advantages[0].tolist() == pytest.approx([0.5, -1.5, -0.5, 1.5])
    assert reward_advantages(rewards, weights, std="none")[0].tolist() == pytest.approx([-24.5, -25.5, 24.5, 25.5])
    whitened = reward_advantages(rewards, weights, std="batch", ddof=0, eps=0.0)
    assert torch.allclose(whitened, advantages / math.sqrt(1.25), atol=1e-12)


@LAW
@given(reward_tables(), st.floats(0.1, 3), st.sampled_from(["group", "none"]))
def test_one_reward_alone_is_the_group_advantage(rewards, weight, std):
    alone = reward_advantages({"r": rewards}, {"r": weight}, std=std)
    assert torch.allclose(alone, weight * group_advantages(rewards, std=std), atol=1e-12)


def test_rewards_that_say_nothing_give_zero_and_names_must_agree():
    nothing = reward_advantages({"a": torch.ones(2, 3)}, {"a": 1.0}, std="batch", eps=0.0)
    assert torch.equal(nothing, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="same names"):
        reward_advantages({"a": torch.ones(2, 3)}, {"b": 1.0})
