"""The packed batch, and the law that no way of cutting or ordering it changes loss or gradient."""

import dataclasses
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.algorithm_config import AlgorithmConfig
from grpo.batch import (
    Batch,
    build_batch,
    concat_batches,
    plan_microbatches,
    select_sequences,
    split_microbatches,
    split_minibatches,
    token_places,
    with_truncated_masked,
    with_weights,
)
from grpo.objective import policy_loss
from policy.packing import pack_by_length
from rollout.errors import UserError
from rollout.records import Sample, SamplingMask

LAW = settings(deadline=None, derandomize=True, max_examples=40)
VOCAB = 7


def make_sample(index, prompt, completion, logprobs=None):
    values = -0.1 * np.arange(1, len(completion) + 1) if logprobs is None else np.asarray(logprobs)
    return Sample(
        task_id=f"toy/{index}",
        sample_index=index,
        prompt_ids=tuple(prompt),
        completion_ids=tuple(completion),
        rollout_logprobs=values,
        policy_versions=(0, 0),
        finish_reason="stop",
        completion_text="",
    )


def with_mask(sample, seed):
    """The sample with what its sampling kept at each token: a few ids, or at some all of them (an empty span)."""
    random = np.random.default_rng(seed)
    spans = [
        [] if random.random() < 0.2 else sorted({t, *random.integers(VOCAB, size=2).tolist()})
        for t in sample.completion_ids
    ]
    ids = np.array([i for span in spans for i in span], dtype=np.int32)
    return dataclasses.replace(sample, sampling_mask=SamplingMask(np.cumsum([0, *map(len, spans)]), ids))


def spans_of(batch):
    """The kept ids of every token, by sample."""
    assert batch.sampling_mask is not None
    bounds = batch.sampling_mask.offsets.tolist()
    spans = [batch.sampling_mask.token_ids[a:b].tolist() for a, b in pairwise(bounds)]
    starts = batch.cu_seqlens.tolist()
    return {int(i): spans[a:b] for i, (a, b) in zip(batch.sequence_index, pairwise(starts), strict=True)}


@st.composite
def steps(draw):
    """A step's samples and advantages."""
    ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
    pairs = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=7))
    seed = draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    samples = [make_sample(i, p, c, -random.random(len(c))) for i, (p, c) in enumerate(pairs)]
    samples = [dataclasses.replace(s, finish_reason="length") if random.random() < 0.3 else s for s in samples]
    if draw(st.booleans()):
        samples = [with_mask(sample, seed + i) for i, sample in enumerate(samples)]
    return samples, random.normal(size=len(samples)).tolist()


def toy_logprobs(table, batch: Batch):
    """log p(token | token before it) of a bigram model, 0 at each sequence's first token."""
    previous = batch.input_ids.roll(1)
    values = table[previous].log_softmax(-1).gather(1, batch.input_ids[:, None]).squeeze(1)
    return torch.where(batch.position_ids > 0, values, torch.zeros_like(values))


def step_loss_and_grad(microbatches, **options):
    table = torch.linspace(-1, 1, VOCAB * VOCAB, dtype=torch.float64).sin().reshape(VOCAB, VOCAB).requires_grad_()
    losses, terms = [], None
    for batch in microbatches:
        logprobs = toy_logprobs(table, batch)
        filled = dataclasses.replace(
            batch, old_logprobs=batch.rollout_logprobs - 0.05, ref_logprobs=batch.rollout_logprobs - 0.3
        )
        loss, seen = policy_loss(AlgorithmConfig(kl_coef=0.05, **options), logprobs, batch=filled)
        loss.backward()
        losses.append(loss.item())
        terms = seen if terms is None else terms + seen
    return sum(losses), table.grad, terms


def assert_same_step(one, two):
    (loss, grad, terms), (other_loss, other_grad, other_terms) = one, two
    assert loss == pytest.approx(other_loss, abs=1e-12)
    assert torch.allclose(grad, other_grad, atol=1e-12)
    assert terms.metrics() == pytest.approx(other_terms.metrics(), abs=1e-12)


def test_every_field_speaks_about_its_own_index():
    batch = build_batch([make_sample(0, [5, 6], [1, 2]), make_sample(1, [4], [3, 0, 3])], [1.0, -2.0])
    assert batch.input_ids.tolist() == [5, 6, 1, 2, 4, 3, 0, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.completion_mask.tolist() == [False, False, True, True, False, True, True, True]
    assert batch.rollout_logprobs.tolist() == pytest.approx([0, 0, -0.1, -0.2, 0, -0.1, -0.2, -0.3])
    assert batch.advantages.tolist() == [1, 1, 1, 1, -2, -2, -2, -2]
    assert batch.sequence_index.tolist() == [0, 1]
    assert (batch.num_sequences, batch.num_tokens, batch.num_completion_tokens) == (2, 8, 5)
    assert batch.old_logprobs is None
    assert batch.weights is None


def test_what_sampling_kept_stands_at_its_token_and_is_empty_on_prompts():
    one, other = make_sample(0, [5, 6], [1, 2]), make_sample(1, [4], [3])
    kept = SamplingMask(np.array([0, 2, 3]), np.array([1, 5, 2], dtype=np.int32))
    one = dataclasses.replace(one, sampling_mask=kept)
    other = dataclasses.replace(other, sampling_mask=SamplingMask(np.array([0, 0]), np.array([], dtype=np.int32)))
    batch = build_batch([one, other], [1.0, -2.0])
    assert spans_of(batch) == {0: [[], [], [1, 5], [2]], 1: [[], []]}
    assert batch.sampling_mask is not None
    assert {tensor.dtype for tensor in batch.sampling_mask} == {torch.int64}
    assert spans_of(concat_batches([select_sequences(batch, [1]), select_sequences(batch, [0])])) == spans_of(batch)
    assert build_batch([make_sample(0, [1], [2])], [0.0]).sampling_mask is None
    with pytest.raises(UserError, match="sample 1 of task toy/1 has 1 completion tokens and a sampling_mask of none"):
        build_batch([one, make_sample(1, [4], [3])], [1.0, -2.0])
    short = dataclasses.replace(make_sample(1, [4], [3, 3]), sampling_mask=other.sampling_mask)
    with pytest.raises(UserError, match=r"sample 1 .* has 2 completion tokens and a sampling_mask of that of 1"):
        build_batch([one, short], [1.0, -2.0])


def test_completions_cut_off_at_the_limit_can_be_masked():
    cut = dataclasses.replace(make_sample(1, [4], [3, 0, 3]), finish_reason="length")
    batch = build_batch([make_sample(0, [5, 6], [1, 2]), cut], [1.0, -2.0])
    assert batch.truncated is not None
    assert batch.truncated.tolist() == [False, True]
    masked = with_truncated_masked(batch)
    assert masked.completion_mask.tolist() == [False, False, True, True, False, False, False, False]
    weights = with_weights(masked, aggregation="token_mean").weights
    assert weights is not None
    assert weights.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="truncated"):
        with_truncated_masked(dataclasses.replace(batch, truncated=None))


def test_advantages_can_be_replaced():
    batch = build_batch([make_sample(0, [5, 6], [1]), make_sample(1, [4], [3])], [1.0, -2.0])
    assert batch.with_advantages(torch.tensor([[3.0], [4.0]])).advantages.tolist() == [3, 3, 3, 4, 4]
    assert batch.advantages.tolist() == [1, 1, 1, -2, -2]
    with pytest.raises(UserError, match="2 samples need as many advantages, got 1"):
        batch.with_advantages([1.0])


def test_the_mask_comes_from_lengths_not_from_ids():
    batch = build_batch([make_sample(0, [0, 0], [0, 0, 0])], [1.0])
    assert batch.completion_mask.tolist() == [False, False, True, True, True]


@LAW
@given(
    steps(),
    st.sampled_from(["token_mean", "sequence_mean", "sequence_sum", "constant"]),
    st.sampled_from(
        [
            {},
            {"ratio_level": "sequence"},
            {"surrogate": "cispo", "cispo_ratio_max": 1.5},
            {"mismatch": {"off_policy_threshold": 0.1, "mask": "sequence", "truncate": "token", "truncate_max": 1.1}},
        ]
    ),
    st.data(),
)
def test_no_split_or_order_changes_loss_or_gradient(step, aggregation, options, data):
    samples, advantages = step
    batch = with_weights(
        build_batch(samples, advantages, dtype=torch.float64), aggregation=aggregation, constant_length=9
    )
    whole = step_loss_and_grad([batch], **options)
    longest = int(batch.cu_seqlens.diff().max())
    limit = data.draw(st.integers(longest, longest + batch.num_tokens))
    assert_same_step(whole, step_loss_and_grad(split_microbatches(batch, limit), **options))
    order = data.draw(st.permutations(range(len(samples))))
    cut = data.draw(st.integers(0, len(samples)))
    parts = [select_sequences(batch, part) for part in (order[:cut], order[cut:]) if part]
    assert_same_step(whole, step_loss_and_grad(parts, **options))


@LAW
@given(steps(), st.data())
def test_ranks_with_common_totals_add_up_to_one(step, data):
    samples, advantages = step
    batch = build_batch(samples, advantages, dtype=torch.float64)
    num_ranks = data.draw(st.integers(1, len(samples)))
    totals = {"total_tokens": batch.num_completion_tokens, "total_sequences": batch.num_sequences}
    ranks = split_minibatches(batch, num_ranks)
    for aggregation in ("token_mean", "sequence_mean"):
        shares = [with_weights(rank, aggregation=aggregation, **totals) for rank in ranks]
        whole = step_loss_and_grad([with_weights(batch, aggregation=aggregation)])
        assert_same_step(whole, step_loss_and_grad(shares))


@LAW
@given(steps(), st.integers(0, 3), st.data())
def test_concat_undoes_any_split(step, seed, data):
    samples, advantages = step
    batch = with_weights(build_batch(samples, advantages), aggregation="sequence_mean")
    parts = split_minibatches(batch, data.draw(st.integers(1, len(samples))), seed=seed)
    pieces = [piece for part in parts for piece in split_microbatches(part, 12)]
    again = concat_batches(pieces)
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(again, field.name)
        assert type(before) is type(after)
        if isinstance(before, tuple):
            assert all(map(torch.equal, before, after))
        else:
            assert before is None or torch.equal(before, after)


@LAW
@given(steps(), st.integers(1, 4), st.data())
def test_every_rank_s_share_is_whole_sequences_with_all_that_is_theirs(step, num_ranks, data):
    samples, advantages = step
    samples = [with_mask(sample, i) for i, sample in enumerate(samples)]
    batch = with_weights(build_batch(samples, advantages, dtype=torch.float64), aggregation="token_mean")
    longest = int(batch.cu_seqlens.diff().max())
    plan = plan_microbatches(batch, data.draw(st.integers(longest, 3 * longest)), num_ranks)
    shares = [select_sequences(batch, places) for own in plan for places in own]
    assert len({len(own) for own in plan}) == 1
    assert_same_step(step_loss_and_grad([batch]), step_loss_and_grad(shares))
    spans = {}
    for share in shares:
        spans |= spans_of(share)
        assert share.truncated is not None
        assert batch.truncated is not None
        assert torch.equal(share.truncated, batch.truncated[share.sequence_index])
    assert spans == spans_of(batch)
    together = [token_places(batch, places) for own in plan for places in own]
    assert sorted(torch.cat(together).tolist()) == list(range(batch.num_tokens))
    for places, share in zip(together, shares, strict=True):
        assert torch.equal(batch.input_ids[places], share.input_ids)


def test_minibatches_are_even_deterministic_and_whole():
    samples = [make_sample(i, [1], [2] * (i + 1)) for i in range(7)]
    batch = build_batch(samples, [0.0] * 7)
    in_order = [part.sequence_index.tolist() for part in split_minibatches(batch, 3)]
    assert in_order == [[0, 1], [2, 3], [4, 5, 6]]
    shuffled = [[part.sequence_index.tolist() for part in split_minibatches(batch, 3, seed=s)] for s in (5, 5, 6)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(chain(*shuffled[0])) == list(range(7))


@LAW
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120))
def test_packing_places_everything_once_within_capacity(lengths, capacity):
    bins = pack_by_length(lengths, capacity)
    assert sorted(chain(*bins)) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in places) for places in bins) <= capacity
    sums = sorted(sum(lengths[i] for i in places) for places in bins)
    assert len(sums) == 1 or sums[0] + sums[1] > capacity


def test_packing_fills_the_fullest_bin_that_has_room():
    assert pack_by_length([6, 5, 4, 4, 1], 10) == [[0, 2], [1, 3, 4]]


def test_a_sequence_above_the_limit_names_the_field_and_the_sample():
    batch = build_batch([make_sample(0, [1], [2]), make_sample(1, [1, 2, 3], [4, 5])], [0.0, 0.0])
    with pytest.raises(UserError, match=r"max_tokens_per_microbatch = 4 .* 5 tokens of sample 1"):
        split_microbatches(batch, 4)


@pytest.mark.parametrize("num_minibatches", [0, 2])
def test_an_impossible_number_of_minibatches_is_refused(num_minibatches):
    with pytest.raises(UserError, match="num_minibatches"):
        split_minibatches(build_batch([make_sample(0, [1], [2])], [0.0]), num_minibatches)


@pytest.mark.parametrize(
    ("sample", "advantage", "message"),
    [
        (make_sample(3, [], [1]), 0.0, "sample 3 of task toy/3 has an empty prompt"),
        (make_sample(3, [1], [1, 2], [-1.0]), 0.0, "2 completion tokens but 1 rollout_logprobs"),
        (make_sample(3, [1], [1, 2], [-1.0, np.nan]), 0.0, "not finite"),
        (make_sample(3, [1], [1]), float("nan"), "advantage nan"),
    ],
)
def test_broken_samples_are_named(sample, advantage, message):
    with pytest.raises(UserError, match=message):
        build_batch([sample], [advantage])


def test_samples_and_advantages_must_match_and_exist():
    with pytest.raises(UserError, match="1 samples need as many advantages, got 2"):
        build_batch([make_sample(0, [1], [2])], [0.0, 1.0])
    with pytest.raises(UserError, match="no sample"):
        build_batch([], [])


def test_to_moves_every_tensor():
    sample = with_mask(make_sample(0, [1], [2]), 0)
    moved = with_weights(build_batch([sample], [0.0]), aggregation="token_mean").to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(Batch) if field.name != "sampling_mask"]
    assert moved.sampling_mask is not None
    tensors += list(moved.sampling_mask)
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}


def test_concat_refuses_a_field_that_only_some_have():
    one = build_batch([make_sample(0, [1], [2])], [0.0])
    with pytest.raises(ValueError, match="weights"):
        concat_batches([one, with_weights(one, aggregation="token_mean")])
    with pytest.raises(ValueError, match="empty"):
        concat_batches([])
