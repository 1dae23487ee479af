"""From an algorithm's config to advantages, penalised rewards and the loss of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.algorithm_config import AlgorithmConfig, MismatchConfig
from grpo.batch import build_batch, concat_batches, select_sequences, with_weights
from grpo.losses import grpo_loss
from grpo.objective import advantages_for, cispo_ratio_max, entropy_control, penalised_rewards, policy_loss
from rollout.records import Sample

LAW = settings(deadline=None, derandomize=True, max_examples=40)
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.2, 0.4, 0.6, 0.8]], dtype=torch.float64)


def algorithm(**options):
    return AlgorithmConfig(**{"kl_coef": 0.0, **options})


ALGORITHMS = [
    algorithm(),
    algorithm(kl_coef=0.1, clip_high=10.0, aggregation="sequence_mean", dual_clip=3.0),
    algorithm(ratio_level="sequence", aggregation="sequence_mean", ratio_cap=1.5),
    algorithm(surrogate="cispo", cispo_eps_high=0.5, kl_coef=0.1, kl_estimator="k2"),
    algorithm(surrogate="sapo", aggregation="constant", constant_length=6, kl_coef=0.1, kl_bound=0.2),
    algorithm(ratio_level="none", aggregation="sequence_sum", kl_coef=0.1, kl_importance_weighted=True),
    algorithm(mismatch=MismatchConfig(truncate="token", mask="sequence", off_policy_threshold=0.1)),
    algorithm(mismatch=MismatchConfig(truncate="sequence", sequence_ratio="geometric_mean", truncate_max=1.1)),
]


def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt, length = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
    return Sample(
        task_id=f"t{seed}",
        sample_index=0,
        prompt_ids=tuple(range(prompt)),
        completion_ids=tuple(range(length)),
        rollout_logprobs=-torch.rand(length, generator=generator).numpy(),
        policy_versions=(0, 0),
        finish_reason="stop",
        completion_text="",
    )


def batch_of(seed, rule, num_sequences=4):
    generator = torch.Generator().manual_seed(seed)
    samples = [sample(seed + i) for i in range(num_sequences)]
    batch = build_batch(samples, torch.randn(num_sequences, generator=generator), dtype=torch.float64)
    logprobs = -torch.rand(batch.num_tokens, generator=generator, dtype=torch.float64)
    drift = torch.randn(2, batch.num_tokens, generator=generator, dtype=torch.float64) * 0.3
    batch = replace(batch, old_logprobs=logprobs + drift[0])
    if rule.kl_coef:
        batch = replace(batch, ref_logprobs=logprobs + drift[1])
    return with_weights(batch, aggregation=rule.aggregation, constant_length=rule.constant_length), logprobs


def loss_and_grad(rule, batch, logprobs, **options):
    logprobs = logprobs.clone().requires_grad_()
    loss, terms = policy_loss(rule, logprobs, batch=batch, **options)
    return loss, torch.autograd.grad(loss, logprobs)[0], terms


def test_advantages_follow_the_config():
    rloo = advantages_for(REWARDS, None, algorithm(advantage_baseline="leave_one_out", advantage_std="none"))
    assert rloo[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    population = advantages_for(REWARDS, None, algorithm(advantage_ddof=0, advantage_eps=0.5))
    assert population[0].tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])
    judged = torch.tensor([[True, True, False, False], [False, False, False, True]])
    some = advantages_for(REWARDS, judged, algorithm(advantage_std="none"))
    assert some.tolist() == [[0.5, -0.5, 0, 0], [0, 0, 0, 0]]
    batch = advantages_for(REWARDS, None, algorithm(advantage_std="batch", advantage_eps=0.0))
    assert batch[0, 0].item() == pytest.approx(0.5 / REWARDS.std().item())


def test_advantages_per_reward_need_the_rewards():
    rule = algorithm(advantage_per_reward=True, advantage_eps=0.0)
    parts = {"a": REWARDS, "b": 100 * REWARDS}
    each = advantages_for(REWARDS, None, rule, components=parts, weights={"a": 1.0, "b": 1.0})
    assert torch.allclose(each, 2 * advantages_for(REWARDS, None, algorithm(advantage_eps=0.0)))
    with pytest.raises(ValueError, match="components"):
        advantages_for(REWARDS, None, rule)


def test_the_kl_comes_off_the_reward():
    rule = algorithm(kl_coef=0.5, kl_estimator="k1", kl_placement="reward", kl_bound=2.0)
    mask, ids = torch.tensor([False, True, True, False, True]), torch.tensor([0, 0, 0, 1, 1])
    logprobs, ref = torch.tensor([math.nan, -1.0, -1.0, math.inf, -1.0]), torch.tensor([0.0, -1.5, -9.0, 0.0, -0.5])
    rewards = penalised_rewards(torch.tensor([1.0, 2.0]), logprobs, ref, mask, ids, rule)
    assert rewards.tolist() == pytest.approx([1 - 0.5 * (0.5 + 2.0), 2 + 0.5 * 0.5])


def test_with_the_kl_in_the_reward_the_loss_measures_it_only():
    rule = algorithm(kl_coef=0.5, kl_placement="reward")
    batch, logprobs = batch_of(1, rule)
    loss, _, terms = loss_and_grad(rule, batch, logprobs)
    assert loss.item() == pytest.approx(terms.policy_loss.item())
    assert terms.kl.item() > 0
    assert terms.kl_loss.item() == 0


@pytest.mark.parametrize(("option", "value"), [("cispo_ratio_max", 5.0), ("cispo_eps_high", 4.0)])
def test_cispo_has_one_bound_by_two_names(option, value):
    rule = algorithm(surrogate="cispo", **{option: value})
    assert cispo_ratio_max(rule) == 5.0
    assert cispo_ratio_max(algorithm()) == math.inf
    batch, logprobs = batch_of(2, rule)
    batch = replace(batch, old_logprobs=logprobs - 3.0, advantages=torch.ones_like(logprobs))
    _, grad, _ = loss_and_grad(rule, batch, logprobs)
    assert grad.sum().item() == pytest.approx(-5.0)


def test_every_option_reaches_the_loss():
    rule = algorithm(
        ratio_level="sequence",
        clip_low=0.1,
        clip_high=0.15,
        dual_clip=1.3,
        ratio_cap=1.4,
        kl_coef=0.2,
        kl_estimator="k2",
        kl_importance_weighted=True,
        kl_bound=0.05,
    )
    batch, logprobs = batch_of(3, rule)
    # Every bound is met: the four sequences' ratios lie far below, far above, and both with either sign of A.
    shift = torch.tensor([-0.9, 0.9, -0.9, 0.9], dtype=torch.float64)[batch.sequence_ids]
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[batch.sequence_ids]
    assert batch.old_logprobs is not None
    batch = replace(batch, old_logprobs=batch.old_logprobs - shift, advantages=sign * batch.advantages.abs())
    where = {name: getattr(batch, name) for name in ("completion_mask", "sequence_ids", "num_sequences", "weights")}
    tensors = {name: getattr(batch, name) for name in ("advantages", "old_logprobs", "ref_logprobs")}
    options = rule.model_dump(
        include={
            "ratio_level",
            "clip_low",
            "clip_high",
            "dual_clip",
            "ratio_cap",
            "kl_coef",
            "kl_estimator",
            "kl_importance_weighted",
            "kl_bound",
        }
    )
    expected, _ = grpo_loss(logprobs, **where, **tensors, **options)
    assert policy_loss(rule, logprobs, batch=batch)[0].item() == pytest.approx(expected.item(), abs=1e-15)
    for name, other in {
        "clip_low": 0.3,
        "clip_high": 0.3,
        "dual_clip": 1.2,
        "ratio_cap": 1.25,
        "kl_bound": 9.0,
        "ratio_level": "token",
        "kl_estimator": "k3",
        "kl_importance_weighted": False,
    }.items():
        changed = policy_loss(rule.model_copy(update={name: other}), logprobs, batch=batch)[0].item()
        assert changed != pytest.approx(expected.item(), abs=1e-9), name


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"surrogate": "cispo", "cispo_ratio_max": 1.2}, {"cispo_ratio_max": 1.1}),
        ({"surrogate": "cispo", "cispo_ratio_max": 1.2}, {"cispo_ratio_min": 0.9}),
        ({"surrogate": "sapo"}, {"sapo_temperature_positive": 2.0}),
        ({"surrogate": "sapo"}, {"sapo_temperature_negative": 2.0}),
        ({"mismatch": {"truncate": "sequence"}}, {"mismatch": {"truncate": "token"}}),
        ({"mismatch": {"truncate": "token"}}, {"mismatch": {"truncate": "token", "truncate_max": 0.9}}),
        ({"mismatch": {"mask": "token"}}, {"mismatch": {"mask": "token", "mask_min": 0.9}}),
        ({"mismatch": {"mask": "token"}}, {"mismatch": {"mask": "token", "mask_max": 1.1}}),
        (
            {"mismatch": {"truncate": "sequence", "truncate_max": 9.0}},
            {"mismatch": {"truncate": "sequence", "truncate_max": 9.0, "sequence_ratio": "geometric_mean"}},
        ),
        ({}, {"mismatch": {"off_policy_threshold": -1.0}}),
    ],
)
def test_every_choice_changes_the_loss(options, changed):
    rule = algorithm(**options)
    batch, logprobs = batch_of(7, rule, num_sequences=12)
    before = policy_loss(rule, logprobs, batch=batch)[0].item()
    assert policy_loss(algorithm(**{**options, **changed}), logprobs, batch=batch)[0].item() != before


def test_the_entropy_is_trained_only_with_a_coefficient():
    rule = algorithm()
    batch, logprobs = batch_of(4, rule)
    entropy = torch.rand(batch.num_tokens, dtype=torch.float64, requires_grad=True)
    measured, terms = policy_loss(rule, logprobs.clone().requires_grad_(), batch=batch, entropy=entropy)
    measured.backward()
    assert entropy.grad is None
    assert terms.metrics()["entropy"] == pytest.approx(entropy[batch.completion_mask].mean().item())
    loss, terms = policy_loss(rule, logprobs, batch=batch, entropy=entropy, entropy_coef=0.1)
    (grad,) = torch.autograd.grad(loss, entropy)
    assert batch.weights is not None
    assert torch.allclose(grad, -0.1 * batch.weights)
    assert terms.entropy_loss.item() == pytest.approx(-0.1 * terms.metrics()["entropy"])


def test_the_first_entropy_bonus_is_that_of_the_config():
    control = entropy_control(
        algorithm(entropy_coef=0.002, entropy_target=0.3, entropy_coef_step=0.001, entropy_coef_max=0.0025)
    )
    assert control.applied == 0.002
    assert control.after(0.2).applied == 0.0025
    assert control.after(0.4).coef == pytest.approx(0.001)
    assert entropy_control(algorithm(entropy_coef=0.05)).after(9.0).applied == 0.05


def test_on_policy_the_mismatch_is_measured_from_the_present_policy():
    rule = algorithm(mismatch=MismatchConfig(truncate="token", truncate_max=100.0))
    batch, logprobs = batch_of(5, rule)
    batch = replace(batch, old_logprobs=None, rollout_logprobs=logprobs - 0.5)
    _, grad, terms = loss_and_grad(rule, batch, logprobs)
    assert batch.weights is not None
    assert torch.allclose(grad, -math.exp(0.5) * batch.weights * batch.advantages * batch.completion_mask)
    assert terms.metrics()["logprob_gap"] == pytest.approx(0.5)


@LAW
@given(st.integers(0, 10_000), st.sampled_from(ALGORITHMS), st.permutations(range(4)), st.integers(1, 3))
def test_neither_order_nor_micro_batches_matter(seed, rule, order, cut):
    batch, logprobs = batch_of(seed, rule)
    loss, grad, terms = loss_and_grad(rule, batch, logprobs)
    batch = replace(batch, input_ids=torch.arange(batch.num_tokens))  # so that a token's place can be found again
    total, parts, gathered = 0.0, None, torch.zeros_like(grad)
    for chosen in (order[:cut], order[cut:]):
        part = select_sequences(batch, chosen)
        part_loss, part_grad, part_terms = loss_and_grad(rule, part, logprobs[part.input_ids])
        total += part_loss.item()
        gathered[part.input_ids] = part_grad
        parts = part_terms if parts is None else parts + part_terms
    assert parts is not None
    assert total == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(gathered, grad, atol=1e-12)
    assert parts.metrics() == pytest.approx(terms.metrics(), abs=1e-12)
    whole = concat_batches([select_sequences(batch, order)])
    assert torch.equal(whole.input_ids, batch.input_ids)


@LAW
@given(st.integers(0, 10_000), st.sampled_from(ALGORITHMS), st.sampled_from([2, 3]))
def test_ranks_with_the_step_s_totals_add_up_to_one(seed, rule, num_ranks):
    batch, logprobs = batch_of(seed, rule)
    loss, _, _ = loss_and_grad(rule, batch, logprobs)
    batch = replace(batch, weights=None, input_ids=torch.arange(batch.num_tokens))
    totals = {"total_tokens": batch.num_completion_tokens, "total_sequences": batch.num_sequences}
    total = 0.0
    for rank in range(num_ranks):
        share = select_sequences(batch, range(rank, 4, num_ranks))
        share = with_weights(share, aggregation=rule.aggregation, constant_length=rule.constant_length, **totals)
        total += policy_loss(rule, logprobs[share.input_ids], batch=share)[0].item()
    assert total == pytest.approx(loss.item(), abs=1e-12)


@LAW
@given(st.integers(0, 10_000), st.sampled_from([rule for rule in ALGORITHMS if not rule.kl_coef]))
def test_zero_advantages_give_zero_gradient(seed, rule):
    batch, logprobs = batch_of(seed, rule)
    _, grad, _ = loss_and_grad(rule, replace(batch, advantages=torch.zeros_like(logprobs)), logprobs)
    assert grad.abs().max().item() == 0


@LAW
@given(st.integers(0, 10_000), st.sampled_from(ALGORITHMS))
def test_on_policy_every_algorithm_is_reinforce(seed, rule):
    rule = rule.model_copy(update={"kl_coef": 0.0})
    batch, logprobs = batch_of(seed, rule)
    batch = replace(batch, old_logprobs=None, ref_logprobs=None, rollout_logprobs=logprobs)
    _, grad, _ = loss_and_grad(rule, batch, logprobs)
    assert batch.weights is not None
    assert torch.allclose(grad, -batch.weights * batch.advantages * batch.completion_mask, atol=1e-12)


@LAW
@given(st.integers(0, 10_000), st.sampled_from(ALGORITHMS), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_stands_on_prompts_never_matters(seed, rule, junk):
    batch, logprobs = batch_of(seed, rule)
    loss, grad, terms = loss_and_grad(rule, batch, logprobs)
    names = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages", "weights")
    values = {name: getattr(batch, name) for name in names}
    spoiled = {name: None if v is None else torch.where(batch.completion_mask, v, junk) for name, v in values.items()}
    other = loss_and_grad(rule, replace(batch, **spoiled), torch.where(batch.completion_mask, logprobs, junk))
    assert torch.equal(loss, other[0])
    assert torch.equal(grad, other[1])
    assert terms.metrics() == other[2].metrics()


def test_a_batch_that_is_not_ready_is_refused():
    rule = algorithm(kl_coef=0.1)
    batch, logprobs = batch_of(6, rule)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(rule, logprobs, batch=replace(batch, ref_logprobs=None))
    with pytest.raises(ValueError, match="with_weights"):
        policy_loss(rule, logprobs, batch=replace(batch, weights=None))
