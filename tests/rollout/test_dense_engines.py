"""Dense policies in the engines: the torch engine's decoding, and vLLM before and after syncs of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from policy.checkpoint import CheckpointError, hf_state_dict, save_policy
from policy.layer_groups import layer_group
from rollout.cluster import EngineConfig, RayEngine, start_engine
from rollout.engine import SamplingParams
from rollout.torch_engine import TorchEngine
from rollout.vllm_engine import checkpoint_shapes, sampling_uses
from rollout.weights import WeightSync, WeightSyncError
from tests.policy.dense_builders import SHAPES, VOCAB, dense_policy

SEEDS = list(range(8))
GROUPS = ("embedding", "norms", "attention", "dense_mlp", "head")


@pytest.mark.parametrize("name", SHAPES)
def test_the_torch_engine_samples_from_the_policy_before_and_after_a_sync(
    name: str, prompts: list[list[int]], largest_gap: Callable
) -> None:
    engine = TorchEngine(dense_policy(name))
    params = SamplingParams(max_completion_tokens=90, stop_token_ids=(1, 2))  # the cache grows, and rows leave it
    completions = engine.generate(prompts, params, SEEDS)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    assert largest_gap(dense_policy(name), prompts, completions) < 2e-5
    other = dense_policy(name, 1)
    report = WeightSync(engine, vocab_size=VOCAB).publish(other, 3)
    assert (report.version, engine.policy_version) == (3, 3)
    assert report.probe_gap_max < 2e-5
    assert largest_gap(other, prompts, engine.generate(prompts, params, SEEDS)) < 2e-5


def test_greedy_tokens_of_the_torch_engine_are_those_of_the_full_forward(
    prompts: list[list[int]], tmp_path: Path
) -> None:
    model = dense_policy("qwen3")
    save_policy(model, tmp_path)
    engine = TorchEngine(tmp_path, max_num_seqs=3)
    completions = engine.generate(prompts, SamplingParams(temperature=0.0, max_completion_tokens=30), SEEDS)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor(prompt + completion.token_ids)
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)])).hidden
        assert completion.token_ids == model.lm_head(hidden[len(prompt) - 1 : -1]).argmax(-1).tolist()


def test_the_torch_engine_in_half_precision_stays_close(prompts: list[list[int]], largest_gap: Callable) -> None:
    model = dense_policy("qwen2")
    completions = TorchEngine(model, dtype="bfloat16").generate(
        prompts, SamplingParams(max_completion_tokens=20), SEEDS
    )
    assert 1e-5 < largest_gap(model, prompts, completions) < 0.3


def test_drafts_and_routing_are_refused() -> None:
    with pytest.raises(ValueError, match="num_draft_tokens=1, but the policy of engine-0 has 0 layers"):
        TorchEngine(dense_policy("qwen3"), num_draft_tokens=1)
    with pytest.raises(ValueError, match="no routed experts"):
        TorchEngine(dense_policy("qwen3"), return_routed_experts=True)


def test_weights_of_another_model_are_refused_by_name() -> None:
    engine = TorchEngine(dense_policy("qwen3"))
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        engine.load_weights(hf_state_dict(dense_policy("qwen3_tied")), 1)


class FaultyEngine(TorchEngine):
    """Spoils the weights of one group: keeps its own, or takes the numbers in the wrong order."""

    lost = garbled = ""

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        own = {name: weight.clone() for name, weight in hf_state_dict(self.model).items()}
        taken = dict(weights)
        for name, weight in weights.items():
            if layer_group(name) == self.lost:
                taken[name] = own[name]
            if layer_group(name) == self.garbled:
                taken[name] = weight.flatten().flip(0).reshape(weight.shape)
        super().load_weights(taken, version)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_stays_behind_is_named(group: str) -> None:
    assert {layer_group(name) for name in hf_state_dict(dense_policy("qwen2_untied"))} == set(GROUPS)
    engine = FaultyEngine(dense_policy("qwen2_untied"))
    sync = WeightSync(engine, vocab_size=VOCAB)
    sync.publish(dense_policy("qwen2_untied"), 0)
    engine.lost = group
    with pytest.raises(WeightSyncError, match=f"still seems to hold the previous `{group}` weights"):
        sync.publish(dense_policy("qwen2_untied", 1), 1)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_is_garbled_is_named(group: str) -> None:
    engine = FaultyEngine(dense_policy("qwen2_untied"))
    engine.garbled = group
    expected = f"engine-0 is wrong in `{group}`"
    if group in ("embedding", "head"):
        expected = "setting norms, dense_mlp, attention to zero, one at a time"
    with pytest.raises(WeightSyncError, match=expected):
        WeightSync(engine, vocab_size=VOCAB).publish(dense_policy("qwen2_untied", 1), 1)


# vLLM, one engine per family.


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def dense_engine(
    request: pytest.FixtureRequest, ray_cluster: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, RayEngine]]:
    """The name of a shape, and vLLM with the checkpoint of its policy of seed 0."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp(request.param)
    save_policy(dense_policy(request.param), folder)
    config = EngineConfig(max_model_len=64, kv_cache_gib=0.1)
    engine = start_engine(config, folder, ray_cluster / f"vllm-{request.param}.log")
    yield request.param, engine
    engine.close()


@pytest.mark.stack
def test_vllm_agrees_with_the_policy_before_and_after_syncs(
    dense_engine: tuple[str, RayEngine], prompts: list[list[int]], largest_gap: Callable
) -> None:
    name, engine = dense_engine
    params = SamplingParams(max_completion_tokens=40)
    assert largest_gap(dense_policy(name), prompts, engine.generate(prompts, params, SEEDS)) < 2e-5
    sync = WeightSync(engine, vocab_size=VOCAB)
    for version, seed in enumerate([1, 2, 0], start=1):
        model = dense_policy(name, seed)
        assert sync.publish(model, version).probe_gap_max < 2e-5
        completions = engine.generate(prompts, params, SEEDS)
        assert largest_gap(model, prompts, completions) < 2e-5
        assert {completion.policy_version for completion in completions} == {version}


@pytest.mark.stack
def test_a_lost_update_of_one_group_is_named(dense_engine: tuple[str, RayEngine]) -> None:
    name, engine = dense_engine
    sync = WeightSync(engine, vocab_size=VOCAB)
    first, second = dense_policy(name, 3), dense_policy(name, 4)
    sync.publish(first, 10)
    mixed = {
        key: hf_state_dict(first)[key] if layer_group(key) == "attention" else weight
        for key, weight in hf_state_dict(second).items()
    }
    engine.load_weights(mixed, 11)
    with pytest.raises(WeightSyncError, match="still seems to hold the previous `attention` weights"):
        sync.verify(second, 11)


def test_vllm_is_given_what_it_loads_and_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = dense_policy("qwen2")
    save_policy(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(weights, tmp_path / "model.safetensors")
    expected = {name: tuple(weight.shape) for name, weight in hf_state_dict(model).items()}
    assert checkpoint_shapes(tmp_path) == expected
    config = {"num_hidden_layers": 2}
    assert sampling_uses("lm_head.weight", config)
    assert [sampling_uses(f"model.layers.{i}.mlp.up_proj.weight", config) for i in range(4)] == [
        True,
        True,
        False,
        False,
    ]
