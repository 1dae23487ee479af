"""Token log-probabilities: against full logits by hand, whatever the chunks, the mask and the neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.logprobs import SamplingMask, token_logprobs
from tests.policy.builders import TINY, VOCAB, pack, packed_logits, random_sequences, tiny_policy

LENGTHS = (7, 1, 12, 4)
MODEL = tiny_policy()


def by_hand(sequences: list[list[int]], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [T] from each sequence's full logits, in fp64."""
    logprobs, entropies = [], []
    for sequence in sequences:
        table = (packed_logits(MODEL, [sequence]).double() / temperature).log_softmax(-1)
        logprobs.append(torch.zeros(1, dtype=torch.float64))
        logprobs.append(table[:-1].gather(1, torch.tensor(sequence[1:], dtype=torch.long)[:, None]).squeeze(1))
        entropies.append(torch.zeros(1, dtype=torch.float64))
        entropies.append(-(table[:-1].exp() * table[:-1]).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_values_are_those_of_the_full_logits(temperature: float) -> None:
    sequences = random_sequences(LENGTHS)
    logprobs, entropy, *_ = token_logprobs(MODEL, *pack(sequences), temperature=temperature)
    expected, expected_entropy = by_hand(sequences, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 1e-5
    assert (entropy - expected_entropy).abs().max() < 1e-5
    assert (entropy >= 0).all()
    assert (entropy <= math.log(VOCAB) + 1e-5).all()


def test_first_tokens_are_zero_and_nothing_else_is() -> None:
    input_ids, position_ids, cu_seqlens = pack(random_sequences(LENGTHS))
    logprobs, entropy, *_ = token_logprobs(MODEL, input_ids, position_ids, cu_seqlens)
    first = torch.zeros(len(input_ids), dtype=torch.bool)
    first[cu_seqlens[:-1].long()] = True
    assert (logprobs[first] == 0).all()
    assert (entropy[first] == 0).all()
    assert (logprobs[~first] < 0).all()


def test_chunks_change_neither_value_nor_gradient() -> None:
    packed = pack(random_sequences(LENGTHS))
    upstream = torch.randn(len(packed[0]), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for chunk_tokens in (4096, 5, 1):
        MODEL.zero_grad()
        logprobs, entropy, *_ = token_logprobs(MODEL, *packed, temperature=0.8, chunk_tokens=chunk_tokens)
        (logprobs * upstream).sum().backward()
        grads = {name: p.grad.clone() for name, p in MODEL.named_parameters() if p.grad is not None}
        outcomes.append((logprobs.detach(), entropy, grads))
    whole = outcomes[0]
    assert len(whole[2]) == len(list(MODEL.parameters()))
    for logprobs, entropy, grads in outcomes[1:]:
        assert torch.allclose(logprobs, whole[0], atol=1e-6)
        assert torch.allclose(entropy, whole[1], atol=1e-6)
        for name, grad in grads.items():
            assert (grad - whole[2][name]).abs().max() <= 1e-5 * whole[2][name].abs().max(), name


def test_the_gradient_is_that_of_log_softmax() -> None:
    sequences = random_sequences([9, 5], seed=4)
    grads = []
    for masked in (False, True):
        MODEL.zero_grad()
        if masked:
            mask = torch.ones(14, dtype=torch.bool)
            values, *_ = token_logprobs(MODEL, *pack(sequences), mask=mask, chunk_tokens=4)
        else:
            values, _ = by_hand(sequences, 1.0)
        (values * torch.linspace(-1, 1, 14)).sum().backward()
        grads.append({name: p.grad.clone() for name, p in MODEL.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() < 2e-5 * grad.abs().max(), name


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.data())
def test_a_mask_zeroes_what_it_hides_and_leaves_the_rest(data: st.DataObject) -> None:
    packed = pack(random_sequences(LENGTHS))
    total = sum(LENGTHS)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    with torch.no_grad():
        full = token_logprobs(MODEL, *packed)[:2]
        part = token_logprobs(MODEL, *packed, mask=mask, chunk_tokens=data.draw(st.integers(1, 9)))[:2]
    for whole, masked in zip(full, part, strict=True):
        assert torch.allclose(masked, whole * mask, atol=1e-6)
        assert (masked[~mask] == 0).all()


def test_an_empty_mask_still_has_a_zero_gradient() -> None:
    MODEL.zero_grad()
    packed = pack(random_sequences(LENGTHS))
    logprobs, entropy, *_ = token_logprobs(MODEL, *packed, mask=torch.zeros(sum(LENGTHS), dtype=torch.bool))
    logprobs.sum().backward()
    assert logprobs.abs().sum() == entropy.sum() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in MODEL.parameters())


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12),
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=15), max_size=4),
    st.integers(0, 4),
)
def test_a_sequence_does_not_depend_on_what_it_is_packed_with(
    sequence: list[int], others: list[list[int]], place: int
) -> None:
    place = min(place, len(others))
    start = sum(map(len, others[:place]))
    with torch.no_grad():
        alone, alone_entropy, *_ = token_logprobs(MODEL, *pack([sequence]))
        packed, entropy, *_ = token_logprobs(MODEL, *pack([*others[:place], sequence, *others[place:]]))
    own = slice(start, start + len(sequence))
    assert torch.allclose(packed[own], alone, atol=1e-5)
    assert torch.allclose(entropy[own], alone_entropy, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=12), st.data())
def test_a_token_does_not_depend_on_what_follows_it(sequence: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(2, len(sequence)))
    with torch.no_grad():
        whole, *_ = token_logprobs(MODEL, *pack([sequence]))
        prefix, *_ = token_logprobs(MODEL, *pack([sequence[:cut]]))
    assert torch.allclose(whole[:cut], prefix, atol=1e-5)


@torch.no_grad()
def test_entropy_is_never_negative_even_where_one_token_is_certain() -> None:
    model = tiny_policy(seed=5)
    model.lm_head.weight.mul_(3000)
    logprobs, entropy, *_ = token_logprobs(model, *pack(random_sequences([60], seed=6)))
    assert (entropy >= 0).all()
    assert entropy[1:].min() < 1e-3
    assert (logprobs <= 0).all()
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(MODEL, *pack([[1, 2, 3]]), temperature=temperature)


@torch.no_grad()
def test_the_entropy_of_a_uniform_policy_is_log_vocab() -> None:
    model = tiny_policy()
    model.lm_head.weight.zero_()
    logprobs, entropy, *_ = token_logprobs(model, *pack(random_sequences([5])))
    assert torch.allclose(entropy[1:], torch.full((4,), math.log(TINY.vocab_size)), atol=1e-5)
    assert torch.allclose(logprobs[1:], torch.full((4,), -math.log(TINY.vocab_size)), atol=1e-5)


def kept_ids(sequences: list[list[int]], num_prompt: int = 2, seed: int = 3) -> list[list[int]]:
    """For each token of each sequence what its sampling kept: nothing said of prompts, elsewhere 6 ids with its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        sorted({token, *torch.randperm(VOCAB, generator=generator)[:6].tolist()}) if place >= num_prompt else []
        for sequence in sequences
        for place, token in enumerate(sequence)
    ]


def as_mask(kept: list[list[int]]) -> SamplingMask:
    counts = torch.tensor([0, *map(len, kept)])
    return SamplingMask(counts.cumsum(0), torch.tensor([token for ids in kept for token in ids], dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_within_a_sampling_mask_the_kept_ids_alone_share_the_probability(temperature: float) -> None:
    sequences = random_sequences(LENGTHS)
    kept, (input_ids, position_ids, cu_seqlens) = kept_ids(sequences), pack(sequences)
    masked = token_logprobs(
        MODEL, input_ids, position_ids, cu_seqlens, temperature=temperature, sampling_mask=as_mask(kept), chunk_tokens=5
    )
    plain, plain_entropy = by_hand(sequences, temperature)
    logits = packed_logits(MODEL, sequences).double() / temperature
    for place, ids in enumerate(kept):
        if not ids:  # a prompt's token: the whole vocabulary
            assert masked.logprobs[place] == pytest.approx(float(plain[place]), abs=1e-5)
            assert masked.entropy[place] == pytest.approx(float(plain_entropy[place]), abs=1e-5)
            continue
        among = logits[place - 1, ids].log_softmax(-1)
        assert masked.logprobs[place] == pytest.approx(float(among[ids.index(int(input_ids[place]))]), abs=1e-5)
        assert masked.entropy[place] == pytest.approx(float(-(among.exp() * among).sum()), abs=1e-5)


@torch.no_grad()
def test_a_sampling_mask_and_a_token_mask_go_together_and_drafts_are_not_cut() -> None:
    model = tiny_policy(replace(TINY, num_nextn_predict_layers=2))
    sequences = random_sequences(LENGTHS)
    packed, sampling_mask = pack(sequences), as_mask(kept_ids(sequences))
    mask = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0)) < 0.5
    both = token_logprobs(model, *packed, mask=mask, sampling_mask=sampling_mask, mtp=True)
    cut, plain = (token_logprobs(model, *packed, sampling_mask=m, mtp=True) for m in (sampling_mask, None))
    assert torch.allclose(both.logprobs, cut.logprobs * mask, atol=1e-6)
    assert torch.allclose(both.entropy, cut.entropy * mask, atol=1e-6)
    assert (cut.logprobs - plain.logprobs).max() > 0.5
    for drafted, expected in zip(cut.mtp_logprobs, plain.mtp_logprobs, strict=True):
        assert torch.equal(drafted, expected)


def test_a_token_that_its_sampling_did_not_keep_is_named() -> None:
    sequences = random_sequences(LENGTHS)
    kept, (input_ids, position_ids, cu_seqlens) = kept_ids(sequences), pack(sequences)
    token = int(input_ids[5])
    kept[5] = [token + 1 if token + 1 < VOCAB else 0]
    with pytest.raises(ValueError, match=f"token 5 of the packed sequences has the id {token}, .* the 1 ids"):
        token_logprobs(MODEL, input_ids, position_ids, cu_seqlens, sampling_mask=as_mask(kept))
    mask = torch.ones(len(input_ids), dtype=torch.bool)
    mask[5] = False  # nobody asks for it
    token_logprobs(MODEL, input_ids, position_ids, cu_seqlens, mask=mask, sampling_mask=as_mask(kept))
    with pytest.raises(ValueError, match="has 23 spans for 24 tokens"):
        token_logprobs(MODEL, input_ids, position_ids, cu_seqlens, sampling_mask=as_mask(kept[:-1]))
