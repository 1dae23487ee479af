"""Values and laws of the correction between engine and learner, and of what measures the distance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.mismatch import importance_weights, mismatch_correction, off_policy_keep, rollout_divergence

LAW = settings(deadline=None, derandomize=True, max_examples=60)
MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
IDS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
WHERE = (MASK, IDS, 3)
OLD = torch.zeros(8, dtype=torch.float64)
# log w: 0.1 and 0.5 in the first sequence, -0.3, -0.3 and 0.9 in the second
ROLLOUT = -torch.tensor([7.0, 0.1, 0.5, 7.0, -0.3, -0.3, 0.9, 7.0], dtype=torch.float64)


def correct(advantages=None, **options):
    advantages = torch.ones(8, dtype=torch.float64) if advantages is None else advantages
    return mismatch_correction(OLD, OLD, ROLLOUT, advantages, *WHERE, **options)


def test_importance_weights_by_hand():
    token = importance_weights(OLD, ROLLOUT, *WHERE, level="token")
    assert token.log().tolist() == pytest.approx([0, 0.1, 0.5, 0, -0.3, -0.3, 0.9, 0])
    product = importance_weights(OLD, ROLLOUT, *WHERE, level="sequence")
    assert product.log().tolist() == pytest.approx([0, 0.6, 0.6, 0, 0.3, 0.3, 0.3, 0])
    mean = importance_weights(OLD, ROLLOUT, *WHERE, level="sequence", sequence_ratio="geometric_mean")
    assert mean.log().tolist() == pytest.approx([0, 0.3, 0.3, 0, 0.1, 0.1, 0.1, 0])


def test_without_rules_nothing_changes():
    correction = correct()
    assert correction.scale.tolist() == MASK.double().tolist()
    assert not (correction.truncated | correction.dropped | correction.off_policy).any()


def test_truncation_by_token_and_by_sequence():
    token = correct(truncate="token", truncate_max=1.5)
    expected = [0, math.exp(0.1), 1.5, 0, math.exp(-0.3), math.exp(-0.3), 1.5, 0]
    assert token.scale.tolist() == pytest.approx(expected)
    assert token.truncated.nonzero()[:, 0].tolist() == [2, 6]
    sequence = correct(truncate="sequence", truncate_max=1.5)
    assert sequence.scale.tolist() == pytest.approx([0, 1.5, 1.5, 0, *[math.exp(0.3)] * 3, 0])
    assert sequence.truncated.nonzero()[:, 0].tolist() == [1, 2]


def test_a_mask_drops_and_leaves_the_rest_as_it_is():
    token = correct(mask="token", mask_min=0.8, mask_max=2.0)
    assert token.scale.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert token.dropped.nonzero()[:, 0].tolist() == [4, 5, 6]
    product = correct(mask="sequence", mask_min=0.5, mask_max=1.5)
    assert product.scale.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    mean = correct(mask="sequence", mask_min=0.5, mask_max=1.5, sequence_ratio="geometric_mean")
    assert mean.scale.tolist() == MASK.double().tolist()


def test_truncation_and_mask_together_weight_what_is_kept():
    both = correct(truncate="token", truncate_max=9.0, mask="token", mask_min=0.8, mask_max=2.0)
    assert both.scale.tolist() == pytest.approx([0, math.exp(0.1), math.exp(0.5), 0, 0, 0, 0, 0])
    assert not both.truncated.any()


def test_off_policy_keep_drops_only_drifted_sequences_with_negative_advantage():
    rollout = torch.tensor([0.0, 1, 1, 0, 0.1, 0.1, 0.1, 0])
    arguments = (torch.zeros(8), rollout)
    negative = off_policy_keep(*arguments, -torch.ones(8), *WHERE, threshold=0.5)
    assert negative.tolist() == [False, False, False, True, True, True, True, True]
    assert off_policy_keep(*arguments, torch.ones(8), *WHERE, threshold=0.5).all()


def test_the_off_policy_mask_sees_the_present_policy():
    drifted = torch.where(IDS == 0, -2.0, 0.0).double()
    correction = mismatch_correction(drifted, OLD, OLD, -torch.ones(8), *WHERE, off_policy_threshold=1.0)
    assert correction.off_policy.nonzero()[:, 0].tolist() == [1, 2]
    assert correction.scale.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


@LAW
@given(
    st.lists(st.floats(-60, 60), min_size=8, max_size=8),
    st.sampled_from(["none", "token", "sequence"]),
    st.sampled_from(["none", "token", "sequence"]),
    st.sampled_from(["product", "geometric_mean"]),
)
def test_factors_stay_within_their_bounds(gaps, truncate, mask, sequence_ratio):
    rollout = torch.tensor(gaps, dtype=torch.float32)
    correction = mismatch_correction(
        torch.zeros(8),
        torch.zeros(8),
        rollout,
        -torch.ones(8),
        *WHERE,
        truncate=truncate,
        truncate_max=3.0,
        mask=mask,
        sequence_ratio=sequence_ratio,
        off_policy_threshold=5.0,
    )
    assert torch.isfinite(correction.scale).all()
    assert ((correction.scale >= 0) & (correction.scale <= 3.0)).all()
    assert (correction.scale[correction.dropped | correction.off_policy | ~MASK] == 0).all()


@LAW
@given(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.sampled_from(["token", "sequence"]))
def test_masked_tokens_never_matter(junk, level):
    options = {"truncate": level, "mask": level, "mask_max": 1.9, "off_policy_threshold": 0.1}
    spoil = [torch.where(MASK, values, junk) for values in (OLD, OLD, ROLLOUT, -torch.ones(8).double())]
    plain, spoiled = correct(-torch.ones(8).double(), **options), mismatch_correction(*spoil, *WHERE, **options)
    assert torch.equal(plain.scale, spoiled.scale)
    for name in ("truncated", "dropped", "off_policy"):
        assert torch.equal(getattr(plain, name), getattr(spoiled, name))
    assert rollout_divergence(OLD, ROLLOUT, MASK) == rollout_divergence(spoil[1], spoil[2], MASK)


def test_a_broken_logprob_is_not_hidden():
    broken = torch.where(torch.arange(8) == 5, math.nan, OLD)
    options = {"mask": "sequence", "truncate": "token", "off_policy_threshold": 0.1}
    correction = mismatch_correction(broken, broken, ROLLOUT, -torch.ones(8).double(), *WHERE, **options)
    assert correction.scale[5].isnan()
    untouched = mismatch_correction(broken, OLD, ROLLOUT, -torch.ones(8).double(), *WHERE, off_policy_threshold=0.1)
    assert untouched.scale[5].item() == 1


def test_divergence_by_hand():
    sums = {name: value.item() for name, value in rollout_divergence(OLD, ROLLOUT, MASK).items()}
    logs = [0.1, 0.5, -0.3, -0.3, 0.9]
    assert sums["logprob_gap"] == pytest.approx(2.1)
    assert sums["logprob_gap_max"] == pytest.approx(0.9)
    assert sums["rollout_kl_k1"] == pytest.approx(-sum(logs))
    assert sums["rollout_kl_k3"] == pytest.approx(sum(math.exp(x) - 1 - x for x in logs))
    assert sums["rollout_chi2"] == pytest.approx(sum(math.exp(2 * x) - 1 for x in logs))


def test_the_estimates_are_those_of_two_distributions():
    engine, learner = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    each = [rollout_divergence(learner.log()[i : i + 1], engine.log()[i : i + 1], MASK[1:2]) for i in range(3)]
    mean = {name: sum(p * e[name] for p, e in zip(engine, each, strict=True)).item() for name in each[0]}
    kl = (engine * (engine / learner).log()).sum().item()
    assert mean["rollout_kl_k1"] == pytest.approx(kl)
    assert mean["rollout_kl_k3"] == pytest.approx(kl)
    assert mean["rollout_chi2"] == pytest.approx(((learner - engine) ** 2 / engine).sum().item())


@LAW
@given(st.lists(st.floats(-1e4, 1e4), min_size=8, max_size=8))
def test_the_distance_is_never_negative_and_always_finite(gaps):
    sums = rollout_divergence(torch.tensor(gaps), torch.zeros(8), MASK)
    assert sums["rollout_kl_k3"].item() >= 0
    assert all(math.isfinite(value.item()) for value in sums.values())


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="unknown level"):
        importance_weights(OLD, ROLLOUT, *WHERE, level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="geometric_mean"):
        importance_weights(OLD, ROLLOUT, *WHERE, level="sequence", sequence_ratio="sum")  # type: ignore[arg-type]
