"""The policy against transformers' DeepseekV2 and V3 in fp32: logits and the gradient of every parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policy.account import account_of
from policy.checkpoint import save_policy
from policy.config import PolicyConfig, YarnScaling
from policy.deepseek import DeepseekPolicy
from tests.policy.builders import TINY, packed_logits, random_sequences, tiny_policy

transformers = pytest.importorskip("transformers")

LENGTHS = (17, 1, 9, 30, 5)
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.6)
V2 = replace(TINY, topk_method="greedy", norm_topk_prob=False, n_shared_experts=2)
CASES = {
    "plain": TINY,
    "q_lora": replace(TINY, q_lora_rank=20),
    "groups": replace(TINY, n_group=4, topk_group=2, routed_scaling_factor=2.5, q_lora_rank=20),
    "all_moe_raw_gates": replace(TINY, first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=2),
    "tied": replace(TINY, tie_word_embeddings=True, rope_theta=500.0),
    "latent_512": replace(TINY, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=2),
    "large_weights": replace(TINY, initializer_range=0.25, q_lora_rank=20),
    "yarn": replace(TINY, rope_scaling=YARN, initializer_range=0.2),
    "v2_lite": replace(V2, rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707), initializer_range=0.2),
    "v2": replace(
        V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, q_lora_rank=20
    ),
}


def reference_of(model: DeepseekPolicy, folder: Path) -> torch.nn.Module:
    """transformers' model of the checkpoint that `save_policy` writes."""
    save_policy(model, folder)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return reference.eval()


def one_by_one(reference: torch.nn.Module, sequences: list[list[int]]) -> Tensor:
    """Logits [T, V] with no packing at all."""
    return torch.cat([reference(torch.tensor([sequence]), use_cache=False).logits[0] for sequence in sequences])


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekPolicy, torch.nn.Module]:
    """The policy of a case and its twin in transformers."""
    config: PolicyConfig = CASES[request.param]
    model = tiny_policy(config)
    return model, reference_of(model, tmp_path_factory.mktemp(request.param))


def test_packed_logits_are_those_of_transformers_one_by_one(pair: tuple[DeepseekPolicy, torch.nn.Module]) -> None:
    model, reference = pair
    sequences = random_sequences(LENGTHS)
    with torch.no_grad():
        ours, theirs = packed_logits(model, sequences), one_by_one(reference, sequences)
    assert theirs.std() > 0.2  # large enough that a wrong layer would show
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_gradients_of_every_parameter_are_those_of_transformers(
    pair: tuple[DeepseekPolicy, torch.nn.Module],
) -> None:
    model, reference = pair
    sequences = random_sequences(LENGTHS, seed=1)
    upstream = torch.randn(sum(LENGTHS), model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    for network, logits in ((model, packed_logits(model, sequences)), (reference, one_by_one(reference, sequences))):
        network.zero_grad()
        (logits * upstream).sum().backward()
    theirs = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        wanted, got = theirs[name].grad, parameter.grad
        assert wanted is not None, name
        assert got is not None, name
        assert wanted.abs().max() > 0, name
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def test_an_expert_that_no_token_chose_has_a_zero_gradient() -> None:
    model = tiny_policy()
    packed_logits(model, random_sequences([2], seed=3)).square().sum().backward()  # 6 choices for 8 experts
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            assert parameter.grad is not None
            by_expert = parameter.grad.abs().flatten(1).amax(1)
            assert by_expert.isfinite().all(), name
            assert (by_expert == 0).sum() >= 2, name
            assert (by_expert > 0).sum() >= 3, name


def test_parameter_counts_are_those_of_transformers(tmp_path: Path) -> None:
    counted = account_of(TINY).parameters
    assert counted.total == sum(parameter.numel() for parameter in reference_of(tiny_policy(), tmp_path).parameters())
    idle = 3 * TINY.hidden_size * TINY.moe_intermediate_size * (TINY.n_routed_experts - TINY.num_experts_per_tok)
    assert counted.total - counted.active == TINY.num_moe_layers * idle + TINY.vocab_size * TINY.hidden_size


def test_weights_come_from_the_seed_alone() -> None:
    first, again, other = (DeepseekPolicy(TINY) for _ in range(3))
    first.reset_parameters(3)
    again.reset_parameters(3)
    other.reset_parameters(4)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    experts = first.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert not torch.equal(experts, other.get_parameter("model.layers.1.mlp.experts.down_proj"))
    assert float(experts.detach().std()) == pytest.approx(TINY.initializer_range, rel=0.05)
