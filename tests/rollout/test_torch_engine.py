"""The torch engine against the policy's own forward pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.checkpoint import CheckpointError, hf_state_dict
from policy.deepseek import DeepseekPolicy
from rollout.decoding import keep_top_k, keep_top_p, sample_tokens
from rollout.engine import SamplingParams
from rollout.torch_engine import TorchEngine

MakePolicy = Callable[[int], DeepseekPolicy]
SEEDS = list(range(8))


@torch.no_grad()
def full_logits(model: DeepseekPolicy, ids: list[int]) -> torch.Tensor:
    return model.lm_head(model(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_policys_before_and_after_new_weights(
    make_policy: MakePolicy, checkpoint_dir: Path, prompts: list[list[int]], largest_gap: Callable, temperature: float
) -> None:
    engine = TorchEngine(checkpoint_dir)
    params = SamplingParams(temperature=temperature, max_completion_tokens=40)
    assert largest_gap(make_policy(0), prompts, engine.generate(prompts, params, SEEDS), temperature) < 2e-5
    other = make_policy(1)
    engine.load_weights(hf_state_dict(other), 3)
    completions = engine.generate(prompts, params, SEEDS)
    assert largest_gap(other, prompts, completions, temperature) < 2e-5
    assert {completion.policy_version for completion in completions} == {3}


def test_greedy_tokens_are_those_of_the_full_forward(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    model = make_policy(0)
    params = SamplingParams(temperature=0.0, max_completion_tokens=80)  # long enough for the cache to grow
    for prompt, completion in zip(prompts, TorchEngine(model).generate(prompts, params, SEEDS), strict=True):
        logits = full_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
        assert completion.token_ids == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).amax(-1)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)


def test_a_completion_does_not_depend_on_its_batch(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_completion_tokens=30, stop_token_ids=tuple(range(6)))
    engine = TorchEngine(make_policy(0))
    together = engine.generate(prompts, params, SEEDS)
    assert engine.generate(prompts, params, SEEDS) == together
    backwards = engine.generate(prompts[::-1], params, SEEDS[::-1])[::-1]
    small = TorchEngine(make_policy(0), max_num_seqs=3).generate(prompts, params, SEEDS)
    for a, b, c in zip(together, backwards, small, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)
        assert a.logprobs == pytest.approx(c.logprobs, abs=2e-5)


def test_other_seeds_give_other_completions_of_the_same_prompt(
    make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    params = SamplingParams(max_completion_tokens=16)
    group = TorchEngine(make_policy(0)).generate([prompts[0]] * 8, params, SEEDS)
    assert len({tuple(completion.token_ids) for completion in group}) == 8


def test_a_stop_token_is_kept_and_ends_its_completion(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    stops = tuple(range(4))
    params = SamplingParams(max_completion_tokens=24, stop_token_ids=stops)
    completions = TorchEngine(make_policy(0)).generate(prompts * 4, params, list(range(32)))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(stops)
        assert (completion.token_ids[-1] in stops) == (completion.finish_reason == "stop")
        assert (len(completion.token_ids) == 24) or completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.token_ids)


def test_top_p_logprobs_are_those_of_the_kept_tokens(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    model = make_policy(0)
    params = SamplingParams(temperature=0.8, top_p=0.6, max_completion_tokens=20)
    for prompt, completion in zip(prompts, TorchEngine(model).generate(prompts, params, SEEDS), strict=True):
        logits = full_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1] / 0.8
        for row, token, logprob in zip(logits, completion.token_ids, completion.logprobs, strict=True):
            probabilities, order = row.softmax(-1).sort(descending=True)
            kept = int((probabilities.cumsum(0) < 0.6).sum()) + 1
            assert token in order[:kept]
            expected = (probabilities[order == token] / probabilities[:kept].sum()).log()
            assert logprob == pytest.approx(float(expected), abs=5e-5)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.05, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_it(values: list[float], top_p: float) -> None:
    logits = torch.tensor([values])
    kept = keep_top_p(logits, top_p)[0].isfinite()
    probabilities = logits[0].double().softmax(-1)
    assert probabilities[kept].sum() >= top_p - 1e-6
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-6
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14))
def test_top_k_keeps_the_k_largest_and_their_equals(values: list[int], top_k: int) -> None:
    kept = keep_top_k(torch.tensor([values], dtype=torch.float32), top_k)[0]
    bound = sorted(values, reverse=True)[min(top_k, len(values)) - 1] if top_k else min(values)
    assert kept.tolist() == [value if value >= bound else float("-inf") for value in values]


def test_top_p_counts_within_what_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 top-k leaves 4/7 and 3/7, of which the first alone reaches 0.5; without it two are needed.
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    uniform = torch.tensor([0.5], dtype=torch.float64)
    for top_k, kept in [(2, [False, True, False, False]), (0, [False, True, False, True])]:
        sampled = sample_tokens(logits, SamplingParams(top_k=top_k, top_p=0.5), uniform)
        assert sampled.distribution.isfinite()[0].tolist() == kept
        assert sampled.logprobs == sampled.distribution[0, sampled.token_ids]


def test_sampled_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens, logprobs, _ = sample_tokens(probabilities.log().expand(10_000, -1), SamplingParams(), uniforms)
    assert torch.bincount(tokens, minlength=5).tolist() == [5000, 0, 3000, 1500, 500]
    assert torch.allclose(logprobs.exp(), probabilities[tokens])


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_the_ends_of_the_uniform_range_never_pick_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]).log()
    tokens, *_ = sample_tokens(logits, SamplingParams(), torch.tensor([uniform], dtype=torch.float64))
    assert tokens.item() == (1 if uniform == 0.0 else 3)


def test_bfloat16_stays_close_and_keeps_the_routing_bias(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    model = make_policy(0)
    engine = TorchEngine(model, dtype="bfloat16")
    bias = engine.model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"])
    completions = engine.generate(prompts, SamplingParams(max_completion_tokens=1), SEEDS)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = full_logits(model, prompt)[-1].log_softmax(-1)[completion.token_ids[0]]
        assert completion.logprobs[0] == pytest.approx(float(expected), abs=0.5)


def test_the_given_model_is_left_alone(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    model = make_policy(0)
    engine = TorchEngine(model)
    engine.load_weights(hf_state_dict(make_policy(1)), 1)
    fresh = make_policy(0).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_do_not_fit_are_named_and_change_nothing(
    make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    engine = TorchEngine(make_policy(0))
    before = engine.generate(prompts, SamplingParams(max_completion_tokens=4), SEEDS)
    weights = hf_state_dict(make_policy(1))
    weights["model.surprise"] = weights.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.weight.*unknown model\.surprise"):
        engine.load_weights(weights, 1)
    assert engine.generate(prompts, SamplingParams(max_completion_tokens=4), SEEDS) == before


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1] * 250, SamplingParams(max_completion_tokens=10), r"prompt 1 has 250 tokens.*max_model_len=256"),
        ([], SamplingParams(max_completion_tokens=8), "prompt 1 is empty"),
        ([1], SamplingParams(max_completion_tokens=8, temperature=-1), "temperature"),
        ([1], SamplingParams(max_completion_tokens=0), "max_completion_tokens"),
        ([1], SamplingParams(max_completion_tokens=8, top_k=-1), "top_k must be"),
    ],
)
def test_impossible_requests_are_refused(
    make_policy: MakePolicy, prompt: list[int], params: SamplingParams, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TorchEngine(make_policy(0)).generate([[1, 2], prompt], params, [0, 1])


def test_neither_ray_nor_vllm_is_imported() -> None:
    code = "import sys, rollout.torch_engine; sys.exit(bool({'ray', 'vllm', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
