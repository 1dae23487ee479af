"""Laws and values of ratios, surrogates, KL estimates, weights and their composition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.kl import kl_k1, kl_k2, kl_k3, kl_penalty
from grpo.losses import grpo_loss, token_weights
from grpo.mismatch import mismatch_correction
from grpo.segments import sequence_means, sequence_sums
from grpo.surrogates import cispo_surrogate, clipped_surrogate, policy_ratio, sapo_surrogate

LAW = settings(deadline=None, derandomize=True, max_examples=60)
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
IDS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
WHERE = {"completion_mask": MASK, "sequence_ids": IDS, "num_sequences": 3}


def weights(aggregation: Any = "token_mean"):
    return token_weights(**WHERE, aggregation=aggregation, constant_length=10, dtype=torch.float64)


def random_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    values = {name: -torch.rand(8, generator=generator, dtype=torch.float64) * 2 for name in names}
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)[IDS]
    return {**values, "advantages": advantages}


def loss_and_grad(inputs, where=None, correct=None, **options):
    where = where or WHERE
    logprobs = inputs["logprobs"].clone().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "logprobs"}
    correction = None
    if correct is not None:
        old = inputs["logprobs"] if inputs["old_logprobs"] is None else inputs["old_logprobs"]
        seen = (inputs["logprobs"], old, inputs["rollout_logprobs"], inputs["advantages"])
        correction = mismatch_correction(*seen, *where.values(), **correct)
    loss, terms = grpo_loss(logprobs, **rest, **where, **{"weights": weights(), "correction": correction, **options})
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], terms


EVERY_OPTION = {
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "kl_coef": 0.1,
    "kl_importance_weighted": True,
    "correct": {"truncate": "token", "mask": "sequence", "mask_max": 1.5, "off_policy_threshold": 0.1},
}
VARIANTS = [
    {},
    EVERY_OPTION,
    {"ratio_level": "sequence", **EVERY_OPTION},
    {"ratio_level": "none", "kl_coef": 0.1, "kl_estimator": "k1"},
    {"surrogate": "cispo", "kl_coef": 0.1, "kl_k2_gradient": True},
    {"surrogate": "sapo", "kl_coef": 0.1, "kl_estimator": "k2", "correct": {"truncate": "sequence"}},
    {"ratio_level": "sequence", "surrogate": "sapo", "kl_coef": 0.1, "kl_bound": 0.5, "kl_estimator": "abs"},
]
LEVELS = ["token", "sequence", "none"]
SURROGATES = ["clip", "cispo", "sapo"]


def test_ratio_by_token_and_by_sequence():
    log_ratio = torch.tensor([9.0, 0.1, -0.3, 9.0, 0.2, 0.4, -0.3, 9.0])
    token = policy_ratio(log_ratio, torch.zeros(8), MASK, IDS, 3)
    assert token.log().tolist() == pytest.approx([0, 0.1, -0.3, 0, 0.2, 0.4, -0.3, 0], abs=1e-6)
    sequence = policy_ratio(log_ratio, torch.zeros(8), MASK, IDS, 3, level="sequence")
    assert sequence.log().tolist() == pytest.approx([0, -0.1, -0.1, 0, 0.1, 0.1, 0.1, 0], abs=1e-6)


def test_without_a_level_the_ratio_is_one_and_carries_the_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, 0, -1, -1, -1, 0], requires_grad=True)
    ratio = policy_ratio(logprobs, torch.zeros(8), MASK, IDS, 3, level="none")
    assert ratio.tolist() == [1.0] * 8
    assert torch.autograd.grad(ratio.sum(), logprobs)[0].tolist() == MASK.float().tolist()


def test_log_ratios_are_held_within_their_bounds_without_gradient_beyond():
    logprobs = torch.tensor([0, 3.0, -3.0, 0, 0.5, 0.5, 0.5, 0], requires_grad=True)
    ratio = policy_ratio(logprobs, torch.zeros(8), MASK, IDS, 3, log_ratio_bounds=(-2.0, 1.0))
    assert ratio.log().tolist() == pytest.approx([0, 1, -2, 0, 0.5, 0.5, 0.5, 0])
    assert torch.autograd.grad(ratio.log().sum(), logprobs)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_sequence_sums_skip_masked_tokens():
    assert sequence_sums(torch.arange(8.0), MASK, IDS, 3).tolist() == [3.0, 15.0, 0.0]


def test_sequence_means_skip_masked_tokens_and_empty_sequences():
    means = sequence_means(torch.arange(8.0), MASK, IDS, 3)
    assert means.tolist() == [1.5, 5.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "expected"),
    [
        (1.5, 1.0, {}, -1.28),
        (1.5, -1.0, {}, 1.5),
        (0.5, 1.0, {}, -0.5),
        (0.5, -1.0, {}, 0.8),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.28),
        (5.0, -1.0, {"ratio_cap": 1.5}, 1.5),
        (5.0, -1.0, {"ratio_cap": 1.1}, 1.28),
        (5.0, -1.0, {"dual_clip": 1.1}, 1.1),
    ],
)
def test_clipped_surrogate(ratio, advantage, options, expected):
    loss = clipped_surrogate(torch.tensor([ratio]), torch.tensor([advantage]), clip_low=0.2, clip_high=0.28, **options)
    assert loss.item() == pytest.approx(expected)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ratio = torch.tensor([4.0, 1.0, 0.1])
    loss = cispo_surrogate(ratio, logprobs, torch.tensor([2.0, 2.0, 2.0]), ratio_max=1.5, ratio_min=0.5)
    assert loss.tolist() == [3.0, 2.0, 1.0]
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [-3.0, -2.0, -1.0]


def test_sapo_is_a_gate_around_one():
    ratio = torch.tensor([1.0, 1.0, 3.0, 0.0], requires_grad=True)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    loss = sapo_surrogate(ratio, advantages, temperature_positive=1.0, temperature_negative=2.0)
    gate = 1 / (1 + math.exp(-2.0))
    assert loss.tolist() == pytest.approx([-4.0, 2.0, -8 * gate, 4 * (1 - gate)])
    slopes = torch.autograd.grad(loss.sum(), ratio)[0].tolist()
    assert slopes == pytest.approx([-2.0, 2.0, -8 * gate * (1 - gate), 8 * gate * (1 - gate)])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_with_the_gradient_of_k2_an_estimate_keeps_its_value(estimator):
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5])
    options = {"estimator": estimator, "bound": 0.4}
    kl = kl_penalty(logprobs, ref, k2_gradient=True, **options)
    assert torch.equal(kl, kl_penalty(logprobs, ref, **options))
    assert torch.autograd.grad(kl.sum(), logprobs)[0].tolist() == pytest.approx([0.5, -1.0, 0.0])


def test_a_bound_holds_the_estimate_from_both_sides():
    values = kl_penalty(torch.tensor([0.0, -3.0, -0.2]), torch.tensor([-3.0, 0.0, 0.0]), estimator="k1", bound=1.0)
    assert values.tolist() == pytest.approx([1.0, -1.0, -0.2])


@LAW
@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1, max_size=20), st.booleans())
def test_k2_and_k3_are_never_negative(pairs, double):
    values = torch.tensor(pairs, dtype=torch.float64 if double else torch.float32)
    for estimate in (kl_k2, kl_k3):
        assert estimate(values[:, 0], values[:, 1]).min().item() >= 0
        assert estimate(values[:, 0], values[:, 0]).max().item() == 0


def test_the_estimators_agree_on_the_kl_of_a_distribution():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    kl = (p * (p / q).log()).sum().item()
    assert (p * kl_k1(p.log(), q.log())).sum().item() == pytest.approx(kl, abs=1e-6)
    assert (p * kl_k3(p.log(), q.log())).sum().item() == pytest.approx(kl, abs=1e-6)


def test_the_importance_weighted_k3_has_the_gradient_of_the_true_kl_off_policy():
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    old, ref = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref.log())).sum(), logits, retain_graph=True)
    ratio = logprobs.exp() / old
    (estimated,) = torch.autograd.grad((old * ratio * kl_k3(logprobs, ref.log())).sum(), logits)
    assert torch.allclose(estimated, true, atol=1e-12)


def test_token_weights_by_hand():
    fifth, per_sequence = 1 / 5, [0, 1 / 6, 1 / 6, 0, 1 / 9, 1 / 9, 1 / 9, 0]
    on = MASK.double()
    assert weights("token_mean").tolist() == pytest.approx((on * fifth).tolist())
    assert weights("sequence_mean").tolist() == pytest.approx(per_sequence)
    assert weights("sequence_sum").tolist() == pytest.approx((on / 3).tolist())
    assert weights("constant").tolist() == pytest.approx((on / 30).tolist())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_two_ranks_with_totals_are_those_of_one(aggregation):
    whole = weights(aggregation)
    totals = {"total_tokens": 5, "total_sequences": 3, "constant_length": 10, "dtype": torch.float64}
    first = token_weights(MASK[:3], IDS[:3], 1, aggregation=aggregation, **totals)
    second = token_weights(MASK[3:], IDS[3:] - 1, 2, aggregation=aggregation, **totals)
    assert torch.allclose(torch.cat([first, second]), whole)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="unknown aggregation"):
        weights("mean")
    with pytest.raises(ValueError, match="constant_length"):
        token_weights(**WHERE, aggregation="constant")
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_surrogate(torch.ones(1), torch.ones(1), clip_low=0.2, clip_high=0.2, dual_clip=0.5)
    inputs = random_inputs(0)
    for options, message in [({"ratio_level": "word"}, "ratio level"), ({"surrogate": "ppo"}, "surrogate")]:
        with pytest.raises(ValueError, match=message):
            loss_and_grad(inputs, **options)
    with pytest.raises(ValueError, match="KL estimator"):
        loss_and_grad(inputs, kl_estimator="k4")


@pytest.mark.parametrize(("option", "tensor"), [({"kl_coef": 0.1}, "ref_logprobs"), ({"entropy_coef": 0.1}, "entropy")])
def test_an_option_without_its_tensor_is_refused(option, tensor):
    with pytest.raises(ValueError, match=tensor):
        loss_and_grad({**random_inputs(0), tensor: None}, **option)


@LAW
@given(st.integers(0, 2**31), st.sampled_from(VARIANTS), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_never_matter(seed, options, junk):
    inputs = random_inputs(seed)
    loss, grad, terms = loss_and_grad(inputs, **options)
    spoiled = {name: torch.where(MASK, value, junk) for name, value in inputs.items()}
    spoiled_weights = torch.where(MASK, weights(), junk)
    other_loss, other_grad, other_terms = loss_and_grad(spoiled, **{**options, "weights": spoiled_weights})
    assert torch.equal(loss, other_loss)
    assert torch.equal(grad, other_grad)
    assert terms.metrics() == other_terms.metrics()


@LAW
@given(st.integers(0, 2**31), st.sampled_from(LEVELS), st.sampled_from(SURROGATES))
def test_zero_advantage_gives_zero_gradient(seed, level, surrogate):
    inputs = {**random_inputs(seed), "advantages": torch.zeros(8, dtype=torch.float64)}
    _, grad, _ = loss_and_grad(inputs, ratio_level=level, surrogate=surrogate)
    assert grad.abs().max().item() == 0


@LAW
@given(st.integers(0, 2**31), st.sampled_from(LEVELS), st.sampled_from(SURROGATES), st.sampled_from(AGGREGATIONS))
def test_on_policy_the_gradient_is_reinforce(seed, level, surrogate, aggregation):
    inputs = {**random_inputs(seed), "old_logprobs": None}
    weight = weights(aggregation)
    _, grad, terms = loss_and_grad(inputs, ratio_level=level, surrogate=surrogate, weights=weight)
    assert torch.allclose(grad, -weight * inputs["advantages"], atol=1e-12)
    assert terms.metrics()["ratio"] == pytest.approx(1.0)


@LAW
@given(st.integers(0, 2**31), st.sampled_from(SURROGATES), st.sampled_from(AGGREGATIONS))
def test_without_a_ratio_the_gradient_is_reinforce_off_policy_too(seed, surrogate, aggregation):
    inputs, weight = random_inputs(seed), weights(aggregation)
    _, grad, _ = loss_and_grad(inputs, ratio_level="none", surrogate=surrogate, weights=weight)
    assert torch.allclose(grad, -weight * inputs["advantages"], atol=1e-12)


def rearranged(inputs, weight, order):
    """The sequences of the call in another order, renumbered, as (inputs, weights, where)."""
    source = torch.cat([(sequence == IDS).nonzero()[:, 0] for sequence in order])
    ids = torch.cat([torch.full((int((s == IDS).sum()),), place) for place, s in enumerate(order)])
    where = {"completion_mask": MASK[source], "sequence_ids": ids, "num_sequences": len(order)}
    return {name: value[source] for name, value in inputs.items()}, weight[source], where, source


@LAW
@given(
    st.integers(0, 2**31),
    st.sampled_from(VARIANTS),
    st.sampled_from(AGGREGATIONS),
    st.permutations(range(3)),
    st.integers(0, 3),
)
def test_neither_order_nor_split_matters(seed, options, aggregation, order, cut):
    inputs, weight = random_inputs(seed), weights(aggregation)
    loss, grad, terms = loss_and_grad(inputs, weights=weight, **options)
    parts, gathered, total = [order[:cut], order[cut:]], torch.zeros_like(grad), 0.0
    sums = None
    for part in parts:
        if not part:
            continue
        some, some_weights, where, source = rearranged(inputs, weight, part)
        part_loss, part_grad, part_terms = loss_and_grad(some, where, weights=some_weights, **options)
        total += part_loss.item()
        gathered[source] = part_grad
        sums = part_terms if sums is None else sums + part_terms
    assert total == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(gathered, grad, atol=1e-13)
    assert sums is not None
    assert sums.metrics() == pytest.approx(terms.metrics(), abs=1e-12)


@LAW
@given(st.integers(0, 2**31), st.sampled_from(VARIANTS), st.sampled_from(AGGREGATIONS), st.integers(1, 4))
def test_padding_does_not_matter(seed, options, aggregation, amount):
    inputs = random_inputs(seed)
    loss, grad, terms = loss_and_grad(inputs, weights=weights(aggregation), **options)
    longer = {name: torch.cat([value, torch.full((amount,), 9.0)]) for name, value in inputs.items()}
    mask, ids = torch.cat([MASK, torch.zeros(amount, dtype=torch.bool)]), torch.cat([IDS, torch.full((amount,), 2)])
    where = {"completion_mask": mask, "sequence_ids": ids, "num_sequences": 3}
    padded = token_weights(**where, aggregation=aggregation, constant_length=10, dtype=torch.float64)
    other_loss, other_grad, other_terms = loss_and_grad(longer, where, weights=padded, **options)
    assert other_loss.item() == pytest.approx(loss.item(), abs=1e-13)
    assert torch.allclose(other_grad[:8], grad, atol=1e-14)
    assert other_grad[8:].abs().max().item() == 0
    assert other_terms.metrics() == pytest.approx(terms.metrics(), abs=1e-12)


@LAW
@given(st.integers(0, 2**31), st.sampled_from(AGGREGATIONS), st.sampled_from([0.0, 0.1]))
def test_the_gradient_is_the_derivative_of_the_loss(seed, aggregation, kl_coef):
    inputs = random_inputs(seed)

    def loss(logprobs, entropy):
        rest = {name: value for name, value in inputs.items() if name != "logprobs"}
        return grpo_loss(
            logprobs,
            **rest,
            **WHERE,
            weights=weights(aggregation),
            entropy=entropy,
            surrogate="sapo",
            kl_coef=kl_coef,
            kl_importance_weighted=True,
            entropy_coef=0.01,
        )[0]

    logprobs = inputs["logprobs"].clone().requires_grad_()
    entropy = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (logprobs, entropy))


def test_a_huge_log_ratio_leaves_loss_and_gradient_finite():
    inputs = {name: value.float() for name, value in random_inputs(0).items()}
    inputs = {**inputs, "logprobs": torch.zeros(8), "old_logprobs": torch.full((8,), -500.0)}
    for options in (
        {},
        {"ratio_level": "sequence"},
        {"surrogate": "cispo"},
        {"surrogate": "sapo"},
        {"kl_coef": 0.1, "kl_importance_weighted": True},
    ):
        loss, grad, _ = loss_and_grad(inputs, weights=weights().float(), **options)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
    far = {**inputs, "logprobs": torch.full((8,), -500.0), "old_logprobs": None}
    loss, grad, _ = loss_and_grad(far, weights=weights().float(), kl_coef=0.1)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_nan_on_a_completion_token_reaches_the_loss():
    inputs = random_inputs(0)
    loss, _, _ = loss_and_grad({**inputs, "logprobs": torch.where(torch.arange(8) == 4, math.nan, inputs["logprobs"])})
    assert loss.isnan()


def test_terms_by_hand():
    logprobs = torch.tensor([0, -1.0, -1.0, 0, -1.0, -1.0, -1.0, 0], dtype=torch.float64)
    log_ratio = torch.tensor([0, 0.5, -0.5, 0, 0.5, -0.5, 0.0, 0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[IDS]
    entropy = torch.full((8,), 0.7, dtype=torch.float64)
    inputs = {"logprobs": logprobs, "old_logprobs": logprobs - log_ratio, "advantages": advantages, "entropy": entropy}
    inputs = {**inputs, "ref_logprobs": logprobs - 0.2, "rollout_logprobs": logprobs - log_ratio + 0.01 * logprobs}
    options = {"kl_coef": 0.5, "kl_estimator": "k1", "entropy_coef": 0.1}
    loss, _, terms = loss_and_grad(inputs, **options)
    metrics = terms.metrics()
    policy = (-1.2 - math.exp(-0.5) + math.exp(0.5) + 0.8 + 1.0) / 5
    assert metrics["policy_loss"] == pytest.approx(policy)
    assert metrics["kl_loss"] == pytest.approx(0.1)
    assert metrics["kl"] == pytest.approx(0.2)
    assert metrics["entropy_loss"] == pytest.approx(-0.07)
    assert metrics["entropy"] == pytest.approx(0.7)
    assert loss.item() == pytest.approx(policy + 0.1 - 0.07)
    assert metrics["clipped_high"] == pytest.approx(0.2)
    assert metrics["clipped_low"] == pytest.approx(0.2)
    assert metrics["logprob_gap"] == pytest.approx(0.01)
    assert metrics["logprob_gap_max"] == pytest.approx(0.01)
    assert metrics["num_tokens"] == 5


def test_terms_of_two_calls_add_up():
    _, _, one = loss_and_grad(random_inputs(1), **EVERY_OPTION)
    _, _, two = loss_and_grad(random_inputs(2), **EVERY_OPTION)
    both = one + two
    assert both.loss.item() == pytest.approx(one.loss.item() + two.loss.item())
    assert both.num_tokens.item() == 10
    assert both.logprob_gap_max.item() == max(one.logprob_gap_max.item(), two.logprob_gap_max.item())
    assert both.metrics()["kl"] == pytest.approx((one.metrics()["kl"] + two.metrics()["kl"]) / 2)


def test_a_correction_touches_the_surrogate_only():
    inputs = random_inputs(3)
    inputs = {**inputs, "rollout_logprobs": inputs["old_logprobs"] + 5.0}
    loss, _, terms = loss_and_grad(inputs, kl_coef=0.1, correct={"mask": "token"})
    assert terms.policy_loss.item() == 0
    assert terms.mismatch_masked.item() == 5
    assert loss.item() == pytest.approx(terms.kl_loss.item())
    assert loss.item() == pytest.approx(loss_and_grad(inputs, kl_coef=0.1)[2].kl_loss.item())
    assert loss.item() > 0


def test_a_truncated_weight_scales_the_surrogate():
    inputs = random_inputs(4)
    inputs = {**inputs, "rollout_logprobs": inputs["old_logprobs"] - 1.0}
    plain = loss_and_grad(inputs)[0].item()
    loss, _, terms = loss_and_grad(inputs, correct={"truncate": "token", "truncate_max": 2.0})
    assert loss.item() == pytest.approx(2.0 * plain)
    assert terms.metrics()["mismatch_truncated"] == 1.0
    loss, _, terms = loss_and_grad(inputs, correct={"truncate": "token", "truncate_max": 3.0})
    assert loss.item() == pytest.approx(math.e * plain)
    assert terms.metrics()["mismatch_truncated"] == 0.0
    assert terms.metrics()["rollout_kl_k1"] == pytest.approx(-1.0)
    assert terms.metrics()["rollout_kl_k3"] == pytest.approx(math.e - 2.0)
    assert terms.metrics()["rollout_chi2"] == pytest.approx(math.e**2 - 1.0)
