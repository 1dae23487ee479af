"""vLLM, in its Ray actor, against the policy: one engine serves all tests, each of which syncs the weights it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from policy.checkpoint import hf_state_dict
from policy.deepseek import DeepseekPolicy
from policy.logprobs import SamplingMask, token_logprobs
from rollout.cluster import RayEngine
from rollout.decoding import keep_top_k, keep_top_p
from rollout.engine import SamplingParams
from rollout.engine_checks import EngineError, check_weights
from rollout.vllm_engine import _sampling_mask, checkpoint_shapes
from rollout.weights import WeightSync, WeightSyncError

MakePolicy = Callable[[int], DeepseekPolicy]
SEEDS = list(range(8))


@pytest.mark.stack
def test_logprobs_are_the_policys_before_and_after_new_weights(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]], largest_gap: Callable
) -> None:
    params = SamplingParams(max_completion_tokens=40)
    if vllm_engine.policy_version == 0:  # untouched: what it loaded from the checkpoint itself
        assert largest_gap(make_policy(0), prompts, vllm_engine.generate(prompts, params, SEEDS)) < 2e-5
    for version, seed in enumerate([1, 2, 0], start=1):
        model = make_policy(seed)
        vllm_engine.load_weights(hf_state_dict(model), version)
        completions = vllm_engine.generate(prompts, params, SEEDS)
        assert largest_gap(model, prompts, completions) < 2e-5
        assert {completion.policy_version for completion in completions} == {version}


@pytest.mark.stack
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_at_other_temperatures(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]], largest_gap: Callable, temperature: float
) -> None:
    model = make_policy(0)
    vllm_engine.load_weights(hf_state_dict(model), 10)
    params = SamplingParams(temperature=temperature, max_completion_tokens=20)
    completions = vllm_engine.generate(prompts, params, SEEDS)
    assert largest_gap(model, prompts, completions, temperature or 1.0) < 2e-5


@pytest.mark.stack
def test_a_completion_depends_on_its_seed_and_not_on_its_batch(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    vllm_engine.load_weights(hf_state_dict(make_policy(0)), 20)
    params = SamplingParams(max_completion_tokens=16)
    together = vllm_engine.generate(prompts, params, SEEDS)
    backwards = vllm_engine.generate(prompts[::-1], params, SEEDS[::-1])[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards]
    group = vllm_engine.generate([prompts[0]] * 8, params, SEEDS)
    assert group[0].token_ids == together[0].token_ids
    assert len({tuple(c.token_ids) for c in group}) == 8


@pytest.mark.stack
def test_a_stop_token_is_kept_and_every_token_has_its_logprob(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    vllm_engine.load_weights(hf_state_dict(make_policy(0)), 30)
    stops = tuple(range(4))
    params = SamplingParams(max_completion_tokens=24, stop_token_ids=stops)
    completions = vllm_engine.generate(prompts * 4, params, list(range(32)))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(stops)
        assert (completion.token_ids[-1] in stops) == (completion.finish_reason == "stop")
        assert (len(completion.token_ids) == 24) or completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.stack
def test_top_p_logprobs_are_those_of_the_kept_tokens(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    model = make_policy(0)
    vllm_engine.load_weights(hf_state_dict(model), 40)
    params = SamplingParams(temperature=0.8, top_p=0.6, max_completion_tokens=12)
    for prompt, completion in zip(prompts, vllm_engine.generate(prompts, params, SEEDS), strict=True):
        ids = torch.tensor(prompt + completion.token_ids)
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden
            logits = model.lm_head(hidden[len(prompt) - 1 : -1])
        expected = keep_top_p(logits / 0.8, 0.6).log_softmax(-1)
        expected = expected.gather(-1, ids[len(prompt) :, None]).squeeze(1)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=5e-5)


@pytest.mark.stack
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_policy_cut_to_what_was_kept_has_vllms_probabilities(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]], top_p: float
) -> None:
    model = make_policy(0)
    vllm_engine.load_weights(hf_state_dict(model), 45)
    params = SamplingParams(
        temperature=0.9, top_k=30, top_p=top_p, max_completion_tokens=24, stop_token_ids=(3,), return_sampling_mask=True
    )
    gaps: dict[bool, list[float]] = {True: [], False: []}
    sizes = set()
    for prompt, completion in zip(prompts, vllm_engine.generate(prompts, params, SEEDS), strict=True):
        assert completion.sampling_mask is not None
        offsets, kept = (torch.from_numpy(part.copy()).long() for part in completion.sampling_mask)
        assert len(offsets) == len(completion.token_ids) + 1
        sizes |= set(offsets.diff().tolist())
        ids = torch.tensor(prompt + completion.token_ids)
        mask = SamplingMask(torch.cat((torch.zeros(len(prompt), dtype=torch.long), offsets)), kept)
        for replayed, own in gaps.items():
            with torch.no_grad():
                said = token_logprobs(
                    model,
                    ids,
                    torch.arange(len(ids)),
                    torch.tensor([0, len(ids)]),
                    temperature=0.9,
                    sampling_mask=mask if replayed else None,
                )
            own += (said.logprobs[len(prompt) :] - torch.tensor(completion.logprobs)).abs().tolist()
            logits = model.lm_head(model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden)
            expected = keep_top_p(keep_top_k(logits[len(prompt) - 1 : -1] / 0.9, 30), top_p).isfinite()
            assert kept.tolist() == expected.nonzero()[:, 1].tolist()
    assert (sizes == {30}) if top_p == 1 else (1 <= min(sizes) < max(sizes) < 30)
    assert max(gaps[True]) < 2e-5
    assert max(gaps[False]) > 0.1


@pytest.mark.stack
def test_spans_are_empty_where_vllm_cuts_nothing_off_and_refused_where_it_cannot_tell(
    vllm_engine: RayEngine, make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    vllm_engine.load_weights(hf_state_dict(make_policy(0)), 46)
    for params in (
        SamplingParams(max_completion_tokens=5, return_sampling_mask=True),
        SamplingParams(max_completion_tokens=5, return_sampling_mask=True, temperature=0.0, top_k=4),
    ):
        for completion in vllm_engine.generate(prompts, params, SEEDS):
            assert completion.sampling_mask is not None
            assert completion.sampling_mask.offsets.tolist() == [0] * 6
            assert completion.sampling_mask.token_ids.tolist() == []
    plain = vllm_engine.generate(prompts, SamplingParams(max_completion_tokens=5, top_k=4), SEEDS)
    assert all(completion.sampling_mask is None for completion in plain)
    with pytest.raises(EngineError, match=r"return_sampling_mask set top_k beside top_p=0\.8"):
        vllm_engine.generate(
            prompts, SamplingParams(top_p=0.8, max_completion_tokens=5, return_sampling_mask=True), SEEDS
        )


def flat(*positions: list[tuple[int, float]]) -> SimpleNamespace:
    """As vLLM's FlatLogprobs: at each position the sampled token, then the likeliest, it among them or not."""
    ends = list(accumulate(map(len, positions)))
    pairs = [pair for position in positions for pair in position]
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[token for token, _ in pairs],
        logprobs=[math.log(p) if p else -math.inf for _, p in pairs],
    )


def test_what_vllm_kept_is_what_has_a_probability() -> None:
    params = SamplingParams(top_k=3, return_sampling_mask=True)
    first = [(4, 0.3), (9, 0.7), (4, 0.3), (0, 0.0), (1, 0.0)]
    tied = [(7, 0.2), (2, 0.4), (8, 0.2), (5, 0.2)]  # the sampled token is not among those named beside it
    mask = _sampling_mask(flat(first, tied), params)
    assert mask.offsets.tolist() == [0, 2, 6]
    assert mask.token_ids.tolist() == [4, 9, 2, 5, 7, 8]


def test_more_ties_than_vllm_names_are_an_error_and_not_a_wrong_mask() -> None:
    params = SamplingParams(top_k=3, return_sampling_mask=True)
    with pytest.raises(RuntimeError, match=r"hold only 0\.900000 of the probability .* token 1.*place top_k=3"):
        _sampling_mask(flat([(4, 1.0), (4, 1.0)], [(1, 0.5), (1, 0.5), (2, 0.4)]), params)


@pytest.fixture
def without_repacking(vllm_engine: RayEngine) -> Iterator[None]:
    """vLLM as it comes: its reload leaves the CPU's packed experts wrong."""
    import ray

    def swap(_host: object, enabled: bool) -> None:
        from rollout import vllm_worker

        if enabled:
            vllm_worker.forget_packed_experts = vllm_worker.kept_aside  # type: ignore[attr-defined]
        else:
            vllm_worker.kept_aside = vllm_worker.forget_packed_experts  # type: ignore[attr-defined]
            vllm_worker.forget_packed_experts = lambda model: None

    ray.get(vllm_engine.actor.__ray_call__.remote(swap, False))
    yield
    ray.get(vllm_engine.actor.__ray_call__.remote(swap, True))


@pytest.mark.stack
def test_a_verified_sync_is_right_time_and_again(vllm_engine: RayEngine, make_policy: MakePolicy) -> None:
    sync = WeightSync(vllm_engine, vocab_size=96)
    for version, seed in enumerate([3, 4, 0], start=50):
        assert sync.publish(make_policy(seed), version).probe_gap_max < 1e-5


@pytest.mark.stack
@pytest.mark.usefixtures("without_repacking")
def test_experts_that_are_not_packed_again_are_named(vllm_engine: RayEngine, make_policy: MakePolicy) -> None:
    with pytest.raises(WeightSyncError, match="engine-0 is wrong in `experts`"):
        WeightSync(vllm_engine, vocab_size=96).publish(make_policy(1), 60)


@pytest.mark.stack
def test_weights_that_do_not_fit_are_listed(vllm_engine: RayEngine, make_policy: MakePolicy) -> None:
    weights = hf_state_dict(make_policy(0))
    weights["model.surprise"] = weights.pop("model.norm.weight")
    with pytest.raises(EngineError, match=r"1 missing: model\.norm\.weight; 1 unknown to the engine: model\.surprise"):
        vllm_engine.load_weights(weights, 70)
    assert vllm_engine.policy_version != 70


@pytest.mark.stack
def test_a_prompt_that_is_too_long_is_refused(vllm_engine: RayEngine) -> None:
    with pytest.raises(EngineError, match=r"ValueError: prompt 1 has 120 tokens.*max_model_len=128"):
        vllm_engine.generate([[1], [1] * 120], SamplingParams(max_completion_tokens=16), [0, 1])


def test_the_checkpoint_tells_names_and_shapes(checkpoint_dir: Path, make_policy: MakePolicy, tmp_path: Path) -> None:
    shapes = checkpoint_shapes(checkpoint_dir)
    expected = {name: tuple(weight.shape) for name, weight in hf_state_dict(make_policy(0)).items()}
    assert shapes == expected
    check_weights(shapes, expected)
    with pytest.raises(ValueError, match=r"1 of another shape: lm_head\.weight \[1\], not \[96, 64\]"):
        check_weights(shapes | {"lm_head.weight": (1,)}, expected)
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        checkpoint_shapes(tmp_path)
